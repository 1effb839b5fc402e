"""One gRPC channel to a Triton server: arrays in, arrays out, failures as this package's errors."""

from __future__ import annotations

from typing import Any

import numpy as np

from chebface.errors import (
    ConfigError,
    InputError,
    MissingDependencyError,
    ServerBusyError,
    ServerError,
    ServerUnavailableError,
)
from chebface.signature import BUSY_TEXTS, DEAD_TEXTS, Model, Tensor

NUMPY_TYPES = {"FP32": np.float32, "UINT8": np.uint8, "INT32": np.int32, "BYTES": np.object_}
PROBE_S = 2.0  # how long a server that missed a deadline may take to say that it is alive


def parse_url(url: str) -> str:
    """host:port of a gRPC address, with or without grpc:// in front.

    Raises:
        ConfigError: another scheme, or no port.
    """
    scheme, mark, rest = url.partition("://")
    if mark and scheme != "grpc":
        raise ConfigError(f"url: expected host:port of Triton's gRPC interface (usually 8001), got {url!r}")
    address = (rest if mark else url).rstrip("/")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 1 <= int(port) <= 65535 or "/" in host:
        raise ConfigError(f"url: expected host:port of Triton's gRPC interface, such as localhost:8001, got {url!r}")
    return address


class Channel:
    """One channel, shared by all threads that use it."""

    def __init__(self, url: str, timeout_s: float) -> None:
        """Nothing is sent yet.

        Raises:
            ConfigError: the url or the time out cannot be.
            MissingDependencyError: tritonclient is not installed.
        """
        self.url = parse_url(url)
        if not timeout_s > 0:
            raise ConfigError(f"timeout_s: expected above 0, got {timeout_s}")
        self.timeout_s = timeout_s
        try:
            import tritonclient.grpc as triton
        except ImportError as error:
            raise MissingDependencyError("tritonclient is not installed: pip install 'chebface[client]'") from error
        self._triton = triton
        options: list[tuple[str, int]] = [
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", -1),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 500),
            ("grpc.max_reconnect_backoff_ms", 2000),
        ]
        if self.url.rpartition(":")[0] in ("localhost", "127.0.0.1", "[::1]"):
            options.append(("grpc.enable_http_proxy", 0))
        self._client: Any = triton.InferenceServerClient(self.url, channel_args=options)

    def close(self) -> None:
        """End the channel; further calls fail. Safe to call twice."""
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def is_ready(self) -> bool:
        """Whether a server answers at this address and says that its models are loaded."""
        from tritonclient.utils import InferenceServerException

        try:
            return bool(self._open().is_server_ready(client_timeout=min(PROBE_S, self.timeout_s)))
        except InferenceServerException:
            return False

    def _open(self) -> Any:
        if self._client is None:
            raise InputError(f"the client of {self.url} is closed: make a new one")
        return self._client

    def infer(self, model: Model, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run one model on one request.

        Args:
            model: its entry in signature.py.
            inputs: arrays by tensor name; batched models want the batch dimension in front.

        Returns:
            Arrays by output name.

        Raises:
            InputError: an array is not what signature.py says, or the client is closed.
            ServerUnavailableError, ServerBusyError, ServerError: the server is away, too busy, or failed.
        """
        from tritonclient.utils import InferenceServerException

        requests = []
        for tensor in model.inputs:
            array = inputs[tensor.name]
            _check(array, tensor, model.batched)
            request = self._triton.InferInput(tensor.name, array.shape, tensor.dtype)
            request.set_data_from_numpy(np.ascontiguousarray(array))
            requests.append(request)
        wanted = [self._triton.InferRequestedOutput(tensor.name) for tensor in model.outputs]
        try:
            answer = self._open().infer(
                model.name,
                requests,
                outputs=wanted,
                client_timeout=self.timeout_s,
                timeout=int(self.timeout_s * 1e6),  # the server drops what nobody waits for any more
            )
        except InferenceServerException as error:
            raise self._translate(error, model) from error
        batch = len(inputs[model.inputs[0].name]) if model.batched else None
        arrays = {}
        for tensor in model.outputs:
            array = answer.as_numpy(tensor.name)
            shape = tensor.shape if batch is None else (batch, *tensor.shape)
            if array is None or array.shape != shape or array.dtype != NUMPY_TYPES[tensor.dtype]:
                got = "nothing" if array is None else f"{array.shape} {array.dtype}"
                raise ServerError(
                    f"{self.url}: {model.name}: {tensor.name}: expected {shape} {tensor.dtype}, got {got}; "
                    "the server's models are from another version of chebface"
                )
            arrays[tensor.name] = array
        return arrays

    def _translate(self, error: Any, model: Model) -> ServerError:
        """Triton's code alone says little (UNAVAILABLE is busy, restricted or away), so the message is read too."""
        code, text = (error.status() or "").rpartition(".")[2], error.message() or ""
        low = text.lower()
        kind: type[ServerError] = ServerError
        hint = ""
        if any(words in low for words in BUSY_TEXTS):
            kind, hint = ServerBusyError, f"send less at a time, or raise timeout_s ({self.timeout_s:g})"
        elif code == "DEADLINE_EXCEEDED":
            text = f"no answer within timeout_s ({self.timeout_s:g})"
            if self._is_live():
                kind, hint = ServerBusyError, "the server is alive: send less at a time, or raise timeout_s"
            else:
                kind, hint = ServerUnavailableError, "the server does not say that it is alive either: is it running?"
        elif any(words in low for words in DEAD_TEXTS):
            kind, hint = ServerUnavailableError, "a part of the server died: restart it"
        elif "restricted" in low:
            hint = "the server does not offer this to everyone"
        elif "unknown model" in low or "is not ready" in low or code == "NOT_FOUND":
            if self.is_ready():
                hint = "serve a repository made by `python -m export all`"
            else:  # a server that is going down forgets its models first
                kind, hint = ServerUnavailableError, "the server is not ready"
        elif code in ("UNAVAILABLE", "CANCELLED"):
            kind, hint = ServerUnavailableError, "is a server running there? `chebface serve` starts one"
        return kind(f"{self.url}: {model.name}: {code or 'failed'}: {text}{'; ' if hint else ''}{hint}")

    def _is_live(self) -> bool:
        from tritonclient.utils import InferenceServerException

        try:
            return bool(self._open().is_server_live(client_timeout=PROBE_S))
        except InferenceServerException:
            return False


def _check(array: np.ndarray, tensor: Tensor, batched: bool) -> None:
    shape = array.shape[1:] if batched else array.shape
    if shape != tensor.shape or array.dtype != NUMPY_TYPES[tensor.dtype] or (batched and not len(array)):
        wanted = ("B", *tensor.shape) if batched else tensor.shape
        raise InputError(
            f"{tensor.name}: expected ({', '.join(map(str, wanted))}) {tensor.dtype}, got {array.shape} {array.dtype}"
        )
