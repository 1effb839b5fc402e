"""`reconstruct_photo` for Triton's Python backend: chebface.served around the models that the server has anyway.

repository.py copies this file as model.py. It runs inside the server's Python stub and needs chebface there, with a
detector (`pip install 'chebface[detect]'`; deploy/Dockerfile does). Where it is missing, the server starts all the
same, and each photo is answered with the reason: crops need none of it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any


class _Refused(Exception):
    """What another model of the server said, for the client to hear."""

    def __init__(self, error: Any) -> None:
        super().__init__(error.message())
        self.error = error


class TritonPythonModel:
    """One instance, one photo at a time; several stand side by side."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the detector that `args` names in its configuration."""
        import triton_python_backend_utils as backend

        facts = {key: value["string_value"] for key, value in json.loads(args["model_config"])["parameters"].items()}
        self._deadline = 0.0
        self._served: Any = None
        self._refusal = ""
        try:
            from chebface import signature
            from chebface.errors import ChebfaceError
            from chebface.served import Served
        except ImportError as error:
            self._refusal = (
                f"chebface is not installed for the server's python3 ({error}): pip install 'chebface[detect]'"
            )
        else:
            if signature.digest() != facts["chebface.signature"]:
                self._refusal = "another version of chebface filled this model repository: install that for the server"
            try:
                self._served = Served(self._ask, detector=facts["chebface.detector"])
                if facts["chebface.detector_opened"] == "at start":
                    _ = self._served.detector
            except ChebfaceError as error:
                self._refusal = str(error)
        if self._refusal:
            backend.Logger.log_warn(f"reconstruct_photo answers no photo: {self._refusal}")

    def _ask(self, model: Any, crops_u8: Any) -> Mapping[str, Any]:
        """Another model of this server, within what is left of the request's time."""
        import triton_python_backend_utils as backend

        left_us = max(1, int(1e6 * (self._deadline - time.monotonic()))) if self._deadline else 0
        request = backend.InferenceRequest(
            model_name=model.name,
            requested_output_names=[tensor.name for tensor in model.outputs],
            inputs=[backend.Tensor(model.inputs[0].name, crops_u8)],
            timeout=left_us,
        )
        response = request.exec()
        if response.has_error():
            raise _Refused(response.error())
        return {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request with the outputs that it names, or with what its photo or the server lacks."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        import triton_python_backend_utils as backend

        def refuse(text: str, code: Any) -> Any:
            return backend.InferenceResponse(error=backend.TritonError(text, code))

        if self._refusal:
            return refuse(self._refusal, backend.TritonError.UNSUPPORTED)
        from chebface.errors import InputError, PhotoError

        self._deadline = time.monotonic() + request.timeout() / 1e6 if request.timeout() else 0.0
        content = backend.get_input_tensor_by_name(request, "photo").as_numpy()[0]
        most = backend.get_input_tensor_by_name(request, "most")
        options = {} if most is None else {"most": int(most.as_numpy()[0])}
        try:
            arrays = self._served.answer(content, list(request.requested_output_names()), **options)
        except (PhotoError, InputError) as error:
            return refuse(f"{type(error).__name__}: {error}", backend.TritonError.INVALID_ARG)
        except _Refused as refused:
            return backend.InferenceResponse(error=refused.error)
        except Exception as error:  # one photo's failure is no reason to end the instance
            return refuse(f"{type(error).__name__}: {error}", backend.TritonError.INTERNAL)
        return backend.InferenceResponse([backend.Tensor(name, array) for name, array in arrays.items()])
