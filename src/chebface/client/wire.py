"""The protocol without input or output: what may be sent, what an answer must be, what a failure means, what to repeat.

gRPC, HTTP and the fake of `testing` carry what is decided here; Client and AsyncClient share it.
"""

from __future__ import annotations

import abc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from chebface.errors import (
    ConfigError,
    InputError,
    NoFaceError,
    PhotoError,
    ServerBusyError,
    ServerError,
    ServerUnavailableError,
)
from chebface.signature import BUSY_TEXTS, DEAD_TEXTS, PHOTO_ERRORS, PRIORITIES, Model, Tensor

if TYPE_CHECKING:
    from chebface.client.memory import Region

NUMPY_TYPES: dict[str, Any] = {
    "FP32": np.float32,
    "FP16": np.float16,
    "UINT8": np.uint8,
    "INT32": np.int32,
    "BYTES": np.object_,
}
SCHEMES = ("grpc", "grpcs", "http", "https")
LOST = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "UNKNOWN", "HTTP 502", "HTTP 504")
_LOCAL = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class Address:
    """Where a server listens, and how to talk to it."""

    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        prefix = "" if self.scheme == "grpc" else f"{self.scheme}://"
        return f"{prefix}{self.host}:{self.port}"

    @property
    def is_local(self) -> bool:
        """Whether it is this machine's loopback."""
        return self.host in _LOCAL

    @property
    def is_encrypted(self) -> bool:
        """Whether the scheme means TLS."""
        return self.scheme in ("grpcs", "https")


def parse_url(url: str) -> Address:
    """An address from host:port (gRPC), or with grpc://, grpcs://, http:// or https:// in front.

    Raises:
        ConfigError: another scheme, no port, or a path.
    """
    scheme, mark, rest = url.partition("://")
    if not mark:
        scheme, rest = "grpc", url
    host, _, port = rest.rstrip("/").rpartition(":")
    known = scheme in SCHEMES and host and "/" not in host
    if not known or not (port.isascii() and port.isdigit()) or not 1 <= int(port) <= 65535:
        raise ConfigError(
            f"url: expected host:port of Triton's gRPC interface, such as localhost:8001, or one that begins with "
            f"{', '.join(f'{name}://' for name in SCHEMES)}; got {url!r}"
        )
    return Address(scheme, host, int(port))


class Deadline:
    """When a call has to be over. It runs from the moment it is made."""

    def __init__(self, deadline_s: float) -> None:
        """
        Raises:
            ConfigError: not a finite number above 0.
        """
        if not (deadline_s > 0 and math.isfinite(deadline_s)):
            raise ConfigError(f"deadline_s: expected a number of seconds above 0, got {deadline_s}")
        self.seconds = deadline_s
        self._end = time.monotonic() + deadline_s

    def left_s(self) -> float:
        """Seconds that are left; below 0 when it has passed."""
        return self._end - time.monotonic()


@dataclass(frozen=True)
class Retry:
    """When a failed request is sent again: after a busy or an unavailable server, never after a bad request.

    Inference has no effect on the server, so that a request whose answer was lost is safe to repeat too. The wait
    before try k + 1 is drawn evenly from [0, min(most_s, first_s 2^(k - 1))], and no wait outlasts the deadline.

    Source: M. Brooker, "Exponential backoff and jitter", AWS Architecture Blog (2015), full jitter.
    """

    attempts: int = 3  # tries in all; 1 never repeats
    first_s: float = 0.05
    most_s: float = 2.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or not 0 < self.first_s <= self.most_s:
            raise ConfigError(f"retry: expected attempts of at least 1 and 0 < first_s <= most_s, got {self}")

    def wait_s(self, failed: int, chance: float) -> float:
        """Seconds to wait after so many failures in a row; chance is drawn from [0, 1)."""
        return chance * min(self.most_s, self.first_s * 2.0 ** min(failed - 1, 60))


class Failure(Exception):
    """What a transport raises: the code of gRPC or "HTTP 503", and the server's own words."""

    def __init__(self, status: str, text: str) -> None:
        super().__init__(f"{status}: {text}")
        self.status, self.text = status, text

    @property
    def is_lost(self) -> bool:
        """Whether no word of the server itself came back, so that it may still be at work."""
        return self.status in LOST and not self.says((*BUSY_TEXTS, "restricted"))

    def says(self, texts: Sequence[str]) -> bool:
        """Whether one of the texts (lower case) is in the server's words."""
        low = self.text.lower()
        return any(words in low for words in texts)


@dataclass(frozen=True)
class Part:
    """One output as it came: its type and shape by the server's word, its bytes (None: in shared memory)."""

    dtype: str
    shape: tuple[int, ...]
    content: bytes | bytearray | memoryview | None


@dataclass(frozen=True, eq=False)
class Request:
    """A checked request: its inputs with contiguous arrays for them, and the outputs that are wanted."""

    model: Model
    inputs: tuple[Tensor, ...]
    arrays: tuple[np.ndarray, ...]
    outputs: tuple[Tensor, ...]
    batch: int | None
    priority: int = PRIORITIES["normal"]

    @classmethod
    def make(
        cls,
        model: Model,
        inputs: Mapping[str, np.ndarray],
        outputs: Sequence[Tensor] | None = None,
        priority: int = PRIORITIES["normal"],
    ) -> Request:
        """Check arrays against the signature.

        Args:
            model: its entry in signature.py.
            inputs: arrays by tensor name; batched models want the batch dimension in front.
            outputs: those of the model's that should come back; None is all but those on request.
            priority: of signature.PRIORITIES.

        Raises:
            InputError: an array is not what signature.py says.
        """
        given = (*model.inputs, *(tensor for tensor in model.optional if tensor.name in inputs))
        for tensor in given:
            array = inputs[tensor.name]
            shape = array.shape[1:] if model.batched else array.shape
            empty = model.batched and not len(array)
            if shape != tensor.shape or array.dtype != NUMPY_TYPES[tensor.dtype] or empty:
                wanted = ("B", *tensor.shape) if model.batched else tensor.shape
                raise InputError(
                    f"{tensor.name}: expected ({', '.join(map(str, wanted))}) {tensor.dtype}, "
                    f"got {array.shape} {array.dtype}"
                )
        arrays = tuple(np.ascontiguousarray(inputs[tensor.name]) for tensor in given)
        batch = len(arrays[0]) if model.batched else None
        return cls(model, given, arrays, tuple(outputs or model.outputs), batch, priority)

    @property
    def is_urgent(self) -> bool:
        """Whether its priority is another than what a server takes for granted."""
        return self.priority != PRIORITIES["normal"]

    @property
    def contents(self) -> tuple[memoryview | bytes, ...]:
        """The inputs as they travel."""
        return tuple(pack(array) for array in self.arrays)

    def shape_of(self, tensor: Tensor) -> tuple[int, ...]:
        """The whole shape of an input or output in this request; -1 where only the answer tells."""
        return tensor.shape if self.batch is None else (self.batch, *tensor.shape)

    def size_of(self, tensor: Tensor) -> int:
        """Bytes of an input or output in this request; 0 where only its content tells."""
        shape = self.shape_of(tensor)
        if tensor.dtype == "BYTES" or -1 in shape:
            return 0
        return math.prod(shape) * np.dtype(NUMPY_TYPES[tensor.dtype]).itemsize

    def read(self, parts: Mapping[str, Part], where: str) -> dict[str, np.ndarray]:
        """Arrays by output name, from what came back.

        Raises:
            ServerError: an output is missing, or not what signature.py says.
        """
        return {tensor.name: self._read_one(tensor, parts.get(tensor.name), where) for tensor in self.outputs}

    def _read_one(self, tensor: Tensor, part: Part | None, where: str) -> np.ndarray:
        shape, got = self.shape_of(tensor), "nothing"
        if part is not None and part.content is not None:
            got = f"{part.shape} {part.dtype} in {len(part.content)} bytes"
            if part.dtype == tensor.dtype and _fits(part.shape, shape):
                shape = part.shape
                if tensor.dtype == "BYTES":
                    items = _split_bytes(part.content)
                    if len(items) == math.prod(shape):
                        return np.array(items, np.object_).reshape(shape)
                elif len(part.content) == math.prod(shape) * np.dtype(NUMPY_TYPES[tensor.dtype]).itemsize:
                    return np.frombuffer(part.content, NUMPY_TYPES[tensor.dtype]).reshape(shape)
        raise ServerError(
            f"{where}: {self.model.name}: {tensor.name}: expected {shape} {tensor.dtype}, got {got}; "
            "the server's models are from another version of chebface"
        )


def _fits(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a shape is the wanted one, in which -1 is any number above 0."""
    return len(found) == len(wanted) and all(
        size == want or (want == -1 and size > 0) for size, want in zip(found, wanted, strict=True)
    )


def pack(array: np.ndarray) -> memoryview | bytes:
    """A contiguous array as it travels: its bytes; strings each behind their length."""
    if array.dtype == np.object_:
        return b"".join(len(item).to_bytes(4, "little") + item for item in array.ravel().tolist())
    return array.data.cast("B")


def _split_bytes(content: bytes | bytearray | memoryview) -> list[bytes]:
    """The strings of a BYTES tensor, each behind its length (4 bytes, little endian); cut short, too few come out."""
    items, at = [], 0
    while at + 4 <= len(content):
        size = int.from_bytes(content[at : at + 4], "little")
        if at + 4 + size > len(content):
            break
        items.append(bytes(content[at + 4 : at + 4 + size]))
        at += 4 + size
    return items


class Transport(abc.ABC):
    """One way to a server. Threads share it; a call ends within its time.

    Subclass it (or use `chebface.client.testing.FakeTransport`) to test a program without a server.
    """

    name: str  # how requests travel, for messages
    url: str  # of the server, for messages
    is_local = False  # whether the server may share this machine's memory

    @abc.abstractmethod
    def send(self, request: Request, timeout_s: float, region: Region | None = None) -> dict[str, Part]:
        """Send one request, tell the server how long it has, and wait for the answer.

        Raises:
            Failure: no answer, or the server says no.
        """

    @abc.abstractmethod
    def probe(self, what: str, timeout_s: float) -> bool:
        """Whether the server says that it is "live", or "ready". Never raises."""

    def register(self, name: str, key: str, size: int, timeout_s: float) -> None:
        """Make a region of this machine's shared memory known to the server.

        Raises:
            Failure: it refuses.
        """
        raise Failure("UNIMPLEMENTED", "this transport has no shared memory")

    def unregister(self, name: str, timeout_s: float) -> None:
        """Make the server forget a region.

        Raises:
            Failure: it refuses.
        """
        raise Failure("UNIMPLEMENTED", "this transport has no shared memory")

    def close(self) -> None:  # noqa: B027
        """End every connection. Safe to call twice."""


def blame_photo(failure: Failure) -> PhotoError | None:
    """The error where the server says that it is the photo's, not its own."""
    for mark, kind in zip(PHOTO_ERRORS, (NoFaceError, PhotoError), strict=True):
        if mark in failure.text:
            return kind(failure.text.partition(mark)[2])
    return None


def classify(
    failure: Failure,
    where: str,
    what: str,
    deadline_s: float,
    probe: Callable[[str], bool],
) -> ServerError:
    """The error that a failure means. Code alone says little: UNAVAILABLE is busy, restricted or away.

    Args:
        failure: what the transport raised.
        where: the server's url.
        what: the model that was asked.
        deadline_s: what the call had in all.
        probe: asks the server whether it is "live" or "ready"; called only where the answer decides.
    """
    code, text = failure.status, failure.text
    kind: type[ServerError] = ServerError
    hint = ""
    if failure.says(BUSY_TEXTS):
        kind, hint = ServerBusyError, f"send less at a time, or raise deadline_s ({deadline_s:g})"
    elif code == "DEADLINE_EXCEEDED":
        text = f"no answer within deadline_s ({deadline_s:g})"
        if probe("live"):
            kind, hint = ServerBusyError, "the server is alive: send less at a time, or raise deadline_s"
        else:
            kind, hint = ServerUnavailableError, "the server does not say that it is alive either: is it running?"
    elif failure.says(DEAD_TEXTS):
        kind, hint = ServerUnavailableError, "a part of the server died: restart it"
    elif failure.says(("restricted",)):
        hint = "the server does not offer this to everyone"
    elif failure.says(("unknown model", "is not ready")) or code in ("NOT_FOUND", "HTTP 404"):
        if probe("ready"):
            hint = "serve a repository made by `python -m export all`"
        else:  # a server that is going down forgets its models first
            kind, hint = ServerUnavailableError, "the server is not ready"
    elif code == "HTTP 429" or (code == "RESOURCE_EXHAUSTED" and not failure.says(("larger than max",))):
        kind, hint = ServerBusyError, "a limit in front of the server refuses more: send less at a time"
    elif code in ("UNAUTHENTICATED", "PERMISSION_DENIED", "HTTP 401", "HTTP 403"):
        hint = "the token is missing or wrong: give token="
    elif code in ("UNAVAILABLE", "CANCELLED", "HTTP 502", "HTTP 503", "HTTP 504"):
        kind, hint = ServerUnavailableError, "is a server running there? `chebface serve` starts one"
    return kind(f"{where}: {what}: {code or 'failed'}: {text}{'; ' if hint else ''}{hint}")
