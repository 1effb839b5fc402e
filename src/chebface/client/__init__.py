"""Photograph -> Face over a Triton server; installs and imports without torch."""

from __future__ import annotations

import json
import threading
from types import TracebackType

import numpy as np

from chebface import signature
from chebface.client.channel import Channel
from chebface.detect import Detector
from chebface.errors import ConfigError, ServerError
from chebface.pipeline import Pipeline, Topology
from chebface.signature import RECONSTRUCT, TOPOLOGY

__all__ = ["Client"]


class Client(Pipeline):
    """Reconstructs faces with a Triton server; one gRPC channel, which threads may share.

    >>> with Client("localhost:8001") as client:      # doctest: +SKIP
    ...     face = client.reconstruct("me.jpg")
    """

    def __init__(
        self,
        url: str = "localhost:8001",
        *,
        detector: str | Detector = "auto",
        timeout_s: float = 30.0,
        max_batch: int = signature.MAX_BATCH,
    ) -> None:
        """Nothing is sent yet.

        Args:
            url: host:port of the server's gRPC interface.
            detector: as for Reconstructor.
            timeout_s: how long one request may take, queue included.
            max_batch: faces per request; a photo with more sends several.

        Raises:
            ConfigError: a value that cannot be.
            MissingDependencyError: tritonclient is not installed.
        """
        if not 1 <= max_batch <= signature.MAX_BATCH:
            raise ConfigError(f"max_batch: expected 1..{signature.MAX_BATCH}, got {max_batch}")
        super().__init__(detector=detector)
        self.max_batch = max_batch
        self._channel = Channel(url, timeout_s)
        self._topology: Topology | None = None
        self._topology_lock = threading.Lock()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def url(self) -> str:
        """The server's host:port."""
        return self._channel.url

    def close(self) -> None:
        """End the connection. Safe to call twice."""
        self._channel.close()

    def is_ready(self) -> bool:
        """Whether a server answers and says that its models are loaded."""
        return self._channel.is_ready()

    @property
    def topology(self) -> Topology:
        """Triangles and facts of the head that the server was exported with; asked for once.

        Raises:
            ServerUnavailableError, ServerBusyError, ServerError: as for `reconstruct`.
        """
        with self._topology_lock:
            if self._topology is None:
                request = {TOPOLOGY.inputs[0].name: np.zeros(TOPOLOGY.inputs[0].shape, np.int32)}
                answer = self._channel.infer(TOPOLOGY, request)
                triangles, facts = (answer[tensor.name] for tensor in TOPOLOGY.outputs)
                try:
                    head = dict(json.loads(facts[0]))
                except (ValueError, TypeError) as error:
                    raise ServerError(f"{self.url}: topology: head is not a JSON object ({error})") from error
                self._topology = Topology(faces=triangles, head=head)
            return self._topology

    def _infer(self, crops_u8: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        answer = self._channel.infer(RECONSTRUCT, {RECONSTRUCT.inputs[0].name: crops_u8})
        parameters, vertices, landmarks = (answer[tensor.name] for tensor in RECONSTRUCT.outputs)
        return parameters, vertices, landmarks
