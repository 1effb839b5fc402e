"""Requests over one gRPC channel, which all threads share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chebface.client.memory import Region
from chebface.client.wire import Address, Failure, Part, Request, Transport
from chebface.errors import MissingDependencyError


class GrpcTransport(Transport):
    """Triton's gRPC interface."""

    name = "gRPC"

    def __init__(
        self, address: Address, *, headers: Mapping[str, str], admin: tuple[str, str] | None, ca: bytes | None
    ) -> None:
        """Nothing is sent yet.

        Args:
            address: of the server.
            headers: sent with each request, as gRPC metadata.
            admin: key and value that open the restricted interfaces.
            ca: certificates (PEM) to trust instead of the system's.

        Raises:
            MissingDependencyError: tritonclient is not installed.
        """
        try:
            import grpc
            from tritonclient.grpc import service_pb2, service_pb2_grpc
        except ImportError as error:
            raise MissingDependencyError("tritonclient is not installed: pip install 'chebface[client]'") from error
        self.url, self.is_local = str(address), address.is_local
        self._messages: Any = service_pb2
        self._grpc = grpc
        self._metadata = tuple((key.lower(), value) for key, value in headers.items())
        self._admin = ((f"triton-grpc-protocol-{admin[0].lower()}", admin[1]),) if admin else ()
        options: list[tuple[str, int]] = [
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", -1),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 500),
            ("grpc.max_reconnect_backoff_ms", 2000),
            ("grpc.use_local_subchannel_pool", 1),  # two clients are two connections
        ]
        if address.is_local:
            options.append(("grpc.enable_http_proxy", 0))
        target = f"{address.host}:{address.port}"
        if address.is_encrypted:
            credentials = grpc.ssl_channel_credentials(root_certificates=ca)
            self._channel = grpc.secure_channel(target, credentials, options)
        else:
            self._channel = grpc.insecure_channel(target, options)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def close(self) -> None:
        """End the channel."""
        self._channel.close()

    def _call(self, method: str, message: Any, timeout_s: float, metadata: tuple[tuple[str, str], ...] = ()) -> Any:
        try:
            return getattr(self._stub, method)(message, timeout=timeout_s, metadata=self._metadata + metadata)
        except self._grpc.RpcError as error:
            raise Failure(error.code().name, error.details() or "") from error
        except ValueError as error:  # closed by another thread
            raise Failure("CANCELLED", str(error)) from error

    def send(self, request: Request, timeout_s: float, region: Region | None = None) -> dict[str, Part]:
        """See Transport."""
        message = self._messages.ModelInferRequest(model_name=request.model.name)
        message.parameters["timeout"].int64_param = max(1, int(timeout_s * 1e6))
        if request.is_urgent:
            message.parameters["priority"].uint64_param = request.priority
        for tensor, array, content in zip(request.inputs, request.arrays, request.contents, strict=True):
            place = message.inputs.add(name=tensor.name, datatype=tensor.dtype, shape=array.shape)
            if region is None:
                message.raw_input_contents.append(bytes(content))
            else:
                _point(place.parameters, region, tensor.name)
        for tensor in request.outputs:
            wanted = message.outputs.add(name=tensor.name)
            if region is not None:
                _point(wanted.parameters, region, tensor.name)
        answer = self._call("ModelInfer", message, timeout_s)
        contents = answer.raw_output_contents
        return {
            output.name: Part(
                output.datatype,
                tuple(output.shape),
                contents[k] if region is None and k < len(contents) else None,
            )
            for k, output in enumerate(answer.outputs)
        }

    def probe(self, what: str, timeout_s: float) -> bool:
        """See Transport."""
        try:
            if what == "live":
                return bool(self._call("ServerLive", self._messages.ServerLiveRequest(), timeout_s).live)
            return bool(self._call("ServerReady", self._messages.ServerReadyRequest(), timeout_s).ready)
        except Failure:
            return False

    def register(self, name: str, key: str, size: int, timeout_s: float) -> None:
        """See Transport."""
        message = self._messages.SystemSharedMemoryRegisterRequest(name=name, key=key, offset=0, byte_size=size)
        self._call("SystemSharedMemoryRegister", message, timeout_s, self._admin)

    def unregister(self, name: str, timeout_s: float) -> None:
        """See Transport."""
        message = self._messages.SystemSharedMemoryUnregisterRequest(name=name)
        self._call("SystemSharedMemoryUnregister", message, timeout_s, self._admin)


def _point(parameters: Any, region: Region, tensor: str) -> None:
    offset, size = region.places[tensor]
    parameters["shared_memory_region"].string_param = region.name
    parameters["shared_memory_offset"].int64_param = offset
    parameters["shared_memory_byte_size"].int64_param = size
