"""A leaf model for Triton's Python backend: onnxruntime over the model.onnx that lies beside it.

repository.py copies this file as model.py where backend.cpp cannot be had, for want of a compiler; with it, and in the
NGC container with NVIDIA's, a backend named onnxruntime reads the same model.onnx and this file is not used.
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
        import numpy
        import onnxruntime
        import triton_python_backend_utils

        self.numpy, self.backend = numpy, triton_python_backend_utils
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

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request with the outputs that it names; those that the scheduler grouped run as one batch."""
        if len(requests) == 1 or not self.batched:
            return [self._respond(self._run([request], self._names([request]))) for request in requests]
        arrays = self._run(requests, self._names(requests))
        answers, first = [], 0
        for request in requests:
            last = first + len(request.inputs()[0].as_numpy())
            answers.append(self._respond({name: arrays[name][first:last] for name in request.requested_output_names()}))
            first = last
        return answers

    def _names(self, requests: list[Any]) -> list[str]:
        return sorted({name for request in requests for name in request.requested_output_names()})

    def _run(self, requests: list[Any], names: list[str]) -> dict[str, Any]:
        parts: dict[str, list[Any]] = {}
        for request in requests:
            for tensor in request.inputs():
                parts.setdefault(tensor.name(), []).append(tensor.as_numpy())
        feed = {name: part[0] if len(part) == 1 else self.numpy.concatenate(part) for name, part in parts.items()}
        return dict(zip(names, self.session.run(names, feed), strict=True))

    def _respond(self, arrays: dict[str, Any]) -> Any:
        encode = self.numpy.char.encode
        texts = {name: encode(a.astype(str), "utf-8").astype(object) for name, a in arrays.items() if a.dtype == object}
        return self.backend.InferenceResponse([self.backend.Tensor(*pair) for pair in (arrays | texts).items()])
