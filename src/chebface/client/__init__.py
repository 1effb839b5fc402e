"""Photograph -> Face over a Triton server, by gRPC or HTTP; installs and imports without torch.

    with Client("localhost:8001") as client:
        face = client.reconstruct("me.jpg", deadline_s=2)
        for result in client.map(paths, errors="return"):
            ...

What fails is one of three: PhotoError (this photo; the next may be good), ServerBusyError (try later) or
ServerUnavailableError (nobody there); all are ChebfaceError. `chebface.client.testing` has a server that is none.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from chebface import signature
from chebface.client.connection import PROBE_S, Connection, open_transport
from chebface.client.wire import Deadline, Retry, Transport, parse_url
from chebface.detect import Detector
from chebface.errors import ConfigError, PhotoError, ServerError
from chebface.face import Face
from chebface.photo import Photo, name
from chebface.pipeline import Pipeline, Prepared, Topology
from chebface.served import to_file
from chebface.signature import (
    DETECTED,
    LANDMARKS_M,
    MOST,
    PARAMETERS,
    PHOTO,
    RECONSTRUCT,
    RECONSTRUCT_PHOTO,
    REGRESS,
    TOPOLOGY,
    VERTICES_HALF,
    Tensor,
)

if TYPE_CHECKING:
    from chebface.client.aio import AsyncClient

__all__ = ["AsyncClient", "Client", "Retry", "Transport"]

_OUTPUTS = {"fp32": RECONSTRUCT.outputs, "fp16": (PARAMETERS, VERTICES_HALF, LANDMARKS_M)}


class Client(Pipeline):
    """Reconstructs faces with a Triton server. Threads may share a client, and should: it keeps its connections.

    >>> with Client("localhost:8001") as client:      # doctest: +SKIP
    ...     face = client.reconstruct("me.jpg")
    """

    def __init__(
        self,
        url: str | Sequence[str] = "localhost:8001",
        *,
        detector: str | Detector = "auto",
        vertices: str = "fp32",
        priority: str = "normal",
        deadline_s: float = 30.0,
        max_batch: int = signature.MAX_BATCH,
        retry: Retry | None = None,
        shared_memory: str = "auto",
        token: str | None = None,
        headers: Mapping[str, str] | None = None,
        admin: tuple[str, str] | None = None,
        ca_file: str | os.PathLike[str] | None = None,
        transport: Transport | None = None,
    ) -> None:
        """Nothing is sent yet.

        Args:
            url: host:port of the server's gRPC interface; grpcs://, http:// and https:// in front choose another
                way. Several urls: the next one takes over while one is busy or away.
            detector: as for Reconstructor, or "server": the server finds the faces, and this side needs no detector.
                Files are then sent as they are (JPEG, PNG or WebP of at most 10 MiB), arrays as PNG.
            vertices: how they travel. "fp16" is half the bytes and rounds them: on a head, 0.02 mm on average and
                0.25 mm at most; they are float32 here all the same.
            priority: "high" goes before "normal" in the server's queues.
            deadline_s: how long a call may take unless it says otherwise: reading, detection, repeats and queue
                included. The server is told what is left of it. Where it passes, finding out whether the server is
                alive takes up to PROBE_S more.
            max_batch: faces per request; a photo with more sends several.
            retry: when to send again; None is Retry().
            shared_memory: with a server on this machine, "auto" uses it where the server lets it, "on" makes a
                refusal an error, "off" does not ask. `carrier` says what came of it.
            token: sent as bearer token; in plain text to this machine only.
            headers: sent with each request.
            admin: name and key of the server's restricted interfaces (`Server.admin_header`), which shared memory
                is one of.
            ca_file: certificates (PEM) to trust instead of the system's.
            transport: another way to a server, or `testing.FakeTransport`; url and what goes with it are not used.

        Raises:
            ConfigError: a value that cannot be.
            MissingDependencyError: tritonclient is not installed (gRPC; HTTP does without).
        """
        if not 1 <= max_batch <= signature.MAX_BATCH:
            raise ConfigError(f"max_batch: expected 1..{signature.MAX_BATCH}, got {max_batch}")
        if vertices not in _OUTPUTS:
            raise ConfigError(f"vertices: expected {' or '.join(map(repr, _OUTPUTS))}, got {vertices!r}")
        self.deadline_s = Deadline(deadline_s).seconds
        self._sends_photos = isinstance(detector, str) and detector == "server"
        super().__init__(detector="auto" if self._sends_photos else detector)
        self._outputs = _OUTPUTS[vertices]
        self.max_batch = max_batch
        if transport is None:
            addresses = [parse_url(one) for one in ([url] if isinstance(url, str) else url)]
            ca = None if ca_file is None else Path(ca_file)
            ways = [open_transport(at, token=token, headers=headers, admin=admin, ca_file=ca) for at in addresses]
        else:
            ways = [transport]
        self._connection = Connection(ways, retry=retry or Retry(), shared_memory=shared_memory, priority=priority)
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
        """The server that is asked now."""
        return self._connection.url

    @property
    def carrier(self) -> str:
        """How requests travel now: gRPC or HTTP, and whether in shared memory, or why not."""
        return self._connection.describe()

    @property
    def repeats(self) -> int:
        """How many requests were sent again since the client was made."""
        return self._connection.repeats

    def close(self) -> None:
        """End the connections, remove the shared memory. Safe to call twice."""
        self._connection.close()

    def is_ready(self) -> bool:
        """Whether a server answers and says that its models are loaded."""
        return self._connection.is_ready(min(PROBE_S, self.deadline_s))

    @property
    def topology(self) -> Topology:
        """Triangles and facts of the head that the server was exported with; asked for once.

        Raises:
            ServerUnavailableError, ServerBusyError, ServerError: as for `reconstruct`.
        """
        return self._ask_topology(Deadline(self.deadline_s))

    def reconstruct(self, photo: Photo, *, deadline_s: float | None = None) -> Face:
        """Reconstruct the largest face of a photograph.

        Args:
            photo: a path, the bytes of an image file, or an array (H, W, 3) uint8 RGB.
            deadline_s: how long this call may take; None is the client's.

        Returns:
            The face.

        Raises:
            PhotoError: the photo cannot be read or is outside the limits.
            NoFaceError: no face was found.
            ServerBusyError: the server refused, or did not answer in time though it is alive.
            ServerUnavailableError: no server answers, or a part of it died.
            ServerError: it failed otherwise; the same request would fail again.
            MissingDependencyError: no detector is installed.
            ConfigError: the deadline is not above 0.
        """
        return self._reconstruct(photo, 1, self._deadline(deadline_s), self._ask_heads)[0]

    def reconstruct_all(self, photo: Photo, *, deadline_s: float | None = None) -> list[Face]:
        """Reconstruct every face of a photograph.

        Args, Raises: as `reconstruct`.

        Returns:
            The faces, largest first; at least one.
        """
        return self._reconstruct(photo, None, self._deadline(deadline_s), self._ask_heads)

    def parameters(self, photo: Photo, *, deadline_s: float | None = None) -> np.ndarray:
        """The parameters of the largest face alone: the server decodes no mesh and sends none.

        Args, Raises: as `reconstruct`.

        Returns:
            (486,) float32, see params.py.
        """
        deadline = self._deadline(deadline_s)
        if self._sends_photos:
            answer = self._ask_photo(photo, 1, deadline, RECONSTRUCT_PHOTO.outputs[:1])
        else:
            crops_u8 = self._prepare(photo, most=1).crops_u8
            answer = self._connection.infer(REGRESS, {REGRESS.inputs[0].name: crops_u8}, deadline)
        (parameters,) = self._check([answer[REGRESS.outputs[0].name]], REGRESS.outputs)
        return parameters[0]

    @overload
    def map(
        self,
        photos: Iterable[Photo],
        *,
        concurrency: int = 8,
        errors: Literal["raise"] = "raise",
        deadline_s: float | None = None,
    ) -> Iterator[Face]: ...

    @overload
    def map(
        self,
        photos: Iterable[Photo],
        *,
        concurrency: int = 8,
        errors: Literal["return"],
        deadline_s: float | None = None,
    ) -> Iterator[Face | PhotoError | ServerError]: ...

    def map(
        self,
        photos: Iterable[Photo],
        *,
        concurrency: int = 8,
        errors: Literal["raise", "return"] = "raise",
        deadline_s: float | None = None,
    ) -> Iterator[Any]:
        """Reconstruct the largest face of each of many photographs.

        Photos are taken as results are: a generator may be endless. Crops that are ready at the same time share a
        request of up to max_batch.

        Args:
            photos: as for `reconstruct`.
            concurrency: how many are worked on at once.
            errors: "raise" ends at the first photo that fails; "return" gives its error in its place, a PhotoError
                or a ServerError, and goes on.
            deadline_s: how long each photo may take from when it is begun; a request is given the time of the
                youngest photo in it.

        Returns:
            One result per photo, in order.

        Raises:
            ConfigError: a value that cannot be.
            As `reconstruct`, while it is read.
        """
        from chebface.client.stream import in_order

        return in_order(self._plan(concurrency, errors, deadline_s), photos, concurrency)

    def _plan(self, concurrency: int, errors: str, deadline_s: float | None) -> Callable[[Photo], Any]:
        """What `map` does with one photo."""
        from chebface.client.stream import Batcher

        if concurrency < 1:
            raise ConfigError(f"concurrency: expected at least 1, got {concurrency}")
        if errors not in ("raise", "return"):
            raise ConfigError(f"errors: expected 'raise' or 'return', got {errors!r}")
        self._deadline(deadline_s)
        batcher = Batcher(self._ask_heads, self.max_batch, concurrency)

        def work(photo: Photo) -> Any:
            try:
                return self._reconstruct(photo, 1, self._deadline(deadline_s), batcher.ask)[0]
            except (PhotoError, ServerError) as error:
                if errors == "raise":
                    raise
                return error

        return work

    def _deadline(self, deadline_s: float | None) -> Deadline:
        return Deadline(self.deadline_s if deadline_s is None else deadline_s)

    def _reconstruct(
        self,
        photo: Photo,
        most: int | None,
        deadline: Deadline,
        ask: Callable[[np.ndarray, Deadline], tuple[np.ndarray, ...]],
    ) -> list[Face]:
        if self._sends_photos:
            return self._reconstruct_there(photo, most, deadline)
        prepared = self._prepare(photo, most)
        began = time.perf_counter()
        crops_u8 = prepared.crops_u8
        parts = [ask(crops_u8[k : k + self.max_batch], deadline) for k in range(0, len(crops_u8), self.max_batch)]
        joined = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]  # writable, and no larger than needed
        outputs = self._check(joined, self._outputs)
        infer_ms = 1e3 * (time.perf_counter() - began)
        self._ask_topology(deadline)
        return self._finish(prepared, outputs, infer_ms)

    def _reconstruct_there(self, photo: Photo, most: int | None, deadline: Deadline) -> list[Face]:
        began = time.perf_counter()
        by_name = {tensor.name: tensor for tensor in RECONSTRUCT_PHOTO.every_output}
        heads = [by_name[tensor.name] for tensor in self._outputs]
        answer = self._ask_photo(photo, most, deadline, (*heads, *DETECTED))
        prepared = Prepared.from_arrays(answer, began)
        outputs = self._check([np.array(answer[tensor.name], np.float32) for tensor in heads], heads)
        infer_ms = 1e3 * (time.perf_counter() - began) - sum(prepared.timings_ms.values())
        self._ask_topology(deadline)
        return self._finish(prepared, outputs, infer_ms)

    def _ask_photo(
        self, photo: Photo, most: int | None, deadline: Deadline, outputs: Sequence[Tensor]
    ) -> dict[str, np.ndarray]:
        inputs = {PHOTO.name: np.array([to_file(photo)], np.object_)}
        if most is not None:
            inputs[MOST.name] = np.array([most], np.int32)
        try:
            return self._connection.infer(RECONSTRUCT_PHOTO, inputs, deadline, outputs=outputs)
        except PhotoError as error:  # the server knows its bytes only
            raise type(error)(str(error).replace(name(b""), name(photo), 1)) from error

    def _ask_heads(self, crops_u8: np.ndarray, deadline: Deadline) -> tuple[np.ndarray, ...]:
        inputs = {RECONSTRUCT.inputs[0].name: crops_u8}
        answer = self._connection.infer(RECONSTRUCT, inputs, deadline, outputs=self._outputs)
        return tuple(_widen(answer[tensor.name]) for tensor in self._outputs)

    def _infer(self, crops_u8: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        parameters, vertices, landmarks = self._ask_heads(crops_u8, Deadline(self.deadline_s))
        return parameters, vertices, landmarks

    def _ask_topology(self, deadline: Deadline) -> Topology:
        with self._topology_lock:
            if self._topology is None:
                request = {TOPOLOGY.inputs[0].name: np.zeros(TOPOLOGY.inputs[0].shape, np.int32)}
                answer = self._connection.infer(TOPOLOGY, request, deadline)
                triangles, facts = (answer[tensor.name] for tensor in TOPOLOGY.outputs)
                try:
                    head = dict(json.loads(facts[0]))
                except (ValueError, TypeError) as error:
                    raise ServerError(f"{self.url}: topology: head is not a JSON object ({error})") from error
                self._topology = Topology(faces=triangles, head=head)
            return self._topology

    def _check(self, arrays: list[np.ndarray], tensors: Sequence[Tensor]) -> list[np.ndarray]:
        for tensor, array in zip(tensors, arrays, strict=True):
            if not np.isfinite(array).all():
                raise ServerError(f"{self.url}: {tensor.name}: has values that are not finite; check the weights")
        return arrays


def _widen(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype == np.float16 else array


def __getattr__(name: str) -> Any:
    if name == "AsyncClient":  # asyncio alone takes longer to import than the rest of this package
        from chebface.client.aio import AsyncClient

        return AsyncClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
