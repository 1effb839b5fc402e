"""A leaf model for Triton's Python backend: onnxruntime over the model.onnx that lies beside it.

server.py copies this file as model.py into the run-time repository of the pip server, which has no native
onnxruntime backend; in the NGC container the native backend reads the same model.onnx and this file is not used.
It runs inside the server's Python stub, so it stands alone: nothing of chebface is imported.
"""

from __future__ import annotations

import json
import os
from typing import Any


class TritonPythonModel:
    """One model instance; Triton calls initialize once and execute for every batch of requests."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the model file named by the repository path and version in `args`."""
        import onnxruntime

        config = json.loads(args["model_config"])
        options = onnxruntime.SessionOptions()
        threads = {key: int(value["string_value"]) for key, value in config["parameters"].items() if "thread" in key}
        options.intra_op_num_threads = threads.get("intra_op_thread_count", 1)
        options.inter_op_num_threads = threads.get("inter_op_thread_count", 1)
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the cores are shared
        folder = os.path.join(args["model_repository"], args["model_version"])
        path, operators = os.path.join(folder, "model.onnx"), os.path.join(folder, "operators.so")
        if os.path.exists(operators):  # our own kernels, which the file names
            options.register_custom_ops_library(operators)
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.batched = config["max_batch_size"] > 0
        self.inputs = [tensor["name"] for tensor in config["input"]]

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request with the outputs that it names; those that the scheduler grouped run as one batch."""
        import numpy as np
        import triton_python_backend_utils as backend

        def read(request: Any, name: str) -> Any:
            return backend.get_input_tensor_by_name(request, name).as_numpy()

        def run(names: list[str], feeds: dict[str, Any]) -> dict[str, Any]:
            arrays = self.session.run(names, feeds)
            texts = [np.char.encode(a.astype(str), "utf-8").astype(object) if a.dtype == object else a for a in arrays]
            return dict(zip(names, texts, strict=True))

        def respond(arrays: dict[str, Any], names: list[str]) -> Any:
            return backend.InferenceResponse(
                [backend.Tensor(name, np.ascontiguousarray(arrays[name])) for name in names]
            )

        wanted = [list(request.requested_output_names()) for request in requests]
        if not self.batched:
            feeds = [{name: read(request, name) for name in self.inputs} for request in requests]
            return [respond(run(names, feed), names) for names, feed in zip(wanted, feeds, strict=True)]
        parts = {name: [read(request, name) for request in requests] for name in self.inputs}
        ends = np.cumsum([len(part) for part in parts[self.inputs[0]]])
        feed = {name: part[0] if len(part) == 1 else np.concatenate(part) for name, part in parts.items()}
        arrays = run(sorted({name for names in wanted for name in names}), feed)
        split = {name: np.split(array, ends[:-1]) for name, array in arrays.items()}
        return [respond({name: split[name][k] for name in names}, names) for k, names in enumerate(wanted)]
