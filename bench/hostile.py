"""Hostile inputs and clients: bytes that no honest client sends, and connections that are held or dropped."""

from __future__ import annotations

import functools
import http.client
import io
import json
import os
import random
import resource
import select
import socket
import struct
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chebface import photo
from chebface.errors import ServerError, ServerUnavailableError
from chebface.proxy import JSON_KB
from chebface.signature import DECODE, RECONSTRUCT, RECONSTRUCT_PHOTO, SERVED, TOPOLOGY, Model, Tensor

MOST_MB = 500  # that reading hostile photos may add to this process
_HOST = "127.0.0.1"
_TIME_S = 60.0  # no word by then is no answer
_LENGTH = "Inference-Header-Content-Length"
_INFER = "/inference.GRPCInferenceService/ModelInfer"
_SIZES = (0, -1, 2, 33, 111, 2**31, 2**31 - 1, 2**62, 2**63 - 1, -(2**63))
_STRANGE: tuple[Any, ...] = (*_SIZES, 1e300, "112", None, [], {}, True, "\0")


class RefusedError(ServerError):
    """The other side answered with an error."""


class ClosedError(ServerUnavailableError):
    """The other side ended the connection of what was no whole request."""


class Target:
    """The server at its two ports."""

    def __init__(self, ports: Mapping[str, int], token: str, crop_u8: np.ndarray, repository: Path) -> None:
        """Nothing is sent yet; crop_u8 is (112, 112, 3) RGB."""
        self.ports, self.token, self.crop_u8 = ports, token, crop_u8
        self.takes_photos = (repository / RECONSTRUCT_PHOTO.name).is_dir()
        self._kept: http.client.HTTPConnection | None = None
        self._channel: Any = None
        self._before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def close(self) -> None:
        """End its connections."""
        if self._kept is not None:
            self._kept.close()
        if self._channel is not None:
            self._channel.close()

    def photo_memory_mb(self) -> float:
        """What this process's memory has grown by at most."""
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self._before_kb) / 1024

    def post(self, model: str, body: Any, **headers: str) -> None:
        """One request over HTTP; a 200 is an answer.

        Raises:
            RefusedError: another status.
        """
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        for _ in range(2):
            fresh = self._kept is None
            kept = self._kept = self._kept or http.client.HTTPConnection(_HOST, self.ports["http"], timeout=_TIME_S)
            try:
                kept.request(
                    "POST", f"/v2/models/{model}/infer", body, fields | {"Authorization": f"Bearer {self.token}"}
                )
                answer = kept.getresponse()
                content = answer.read()
            except (ConnectionError, http.client.HTTPException):
                kept.close()
                self._kept = None
                if fresh:
                    raise
                continue  # it was ended while it lay idle
            if answer.will_close or answer.status != 200:
                kept.close()
                self._kept = None
            if answer.status != 200:
                raise RefusedError(f"HTTP {answer.status}: {content[:200]!r}")
            return

    def call(self, message: bytes) -> None:
        """One ModelInfer over gRPC.

        Raises:
            RefusedError: the server says no.
        """
        import grpc

        try:
            self._method()(message, timeout=_TIME_S, metadata=self._metadata())
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                raise TimeoutError("no answer") from error
            raise RefusedError(f"{error.code().name}: {error.details()}") from error

    def cancel(self, message: bytes, after_s: float) -> None:
        """One ModelInfer that is cancelled."""
        call = self._method().future(message, timeout=_TIME_S, metadata=self._metadata())
        time.sleep(after_s)
        call.cancel()

    def _metadata(self) -> list[tuple[str, str]]:
        return [("authorization", f"Bearer {self.token}")]

    def _method(self) -> Any:
        import grpc

        self._channel = self._channel or grpc.insecure_channel(f"{_HOST}:{self.ports['grpc']}")
        return self._channel.unary_unary(_INFER)

    def open(self, kind: str = "http") -> socket.socket:
        """A bare connection."""
        return socket.create_connection((_HOST, self.ports[kind]), timeout=_TIME_S)

    def raw(self, content: bytes, kind: str = "http") -> None:
        """Bytes as they are, and then the end.

        Raises:
            RefusedError, ClosedError: what came back.
        """
        with self.open(kind) as connection:
            try:
                for at in range(0, len(content), 1 << 16):
                    connection.sendall(content[at : at + (1 << 16)])
                    if select.select([connection], [], [], 0)[0]:
                        break  # it has heard enough
                connection.shutdown(socket.SHUT_WR)
                said = connection.recv(1 << 16)
            except TimeoutError:
                raise
            except OSError as error:
                raise ClosedError(str(error)) from error
        if said.startswith(b"HTTP/1.1 2"):
            return
        raise RefusedError(repr(said[:60])) if said else ClosedError("without a word")

    def begin(self, *headers: str) -> bytes:
        """The head of a POST, without the empty line after it."""
        lines = (f"POST /v2/models/{RECONSTRUCT.name}/infer HTTP/1.1", "Host: x", f"Authorization: Bearer {self.token}")
        return "\r\n".join((*lines, *headers)).encode()


def _tensor(tensor: Tensor, batch: int | None, size: int, **changes: Any) -> dict[str, Any]:
    shape = list(tensor.shape) if batch is None else [batch, *tensor.shape]
    facts = {"name": tensor.name, "shape": shape, "datatype": tensor.dtype}
    return facts | {"parameters": {"binary_data_size": size}} | changes


def _body(inputs: list[dict[str, Any]], content: bytes) -> tuple[bytes, str]:
    head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    return head + content, str(len(head))


def _honest(target: Target) -> tuple[bytes, str]:
    content = target.crop_u8.tobytes()
    return _body([_tensor(RECONSTRUCT.inputs[0], 1, len(content))], content)


def _flip(content: bytes, rng: random.Random, most: int = 20) -> bytes:
    """Some bytes changed; now and then cut short, or longer than it was."""
    flipped = bytearray(content)
    for _ in range(rng.randint(1, most)):
        flipped[rng.randrange(len(flipped))] = rng.randrange(256)
    how = rng.random()
    if how < 0.15:
        del flipped[rng.randrange(len(flipped)) :]
    elif how < 0.25:
        flipped += rng.randbytes(rng.randint(1, 4000))
    return bytes(flipped)


def _flipped_bodies(target: Target, rng: random.Random) -> None:
    body, length = _honest(target)
    head = int(length)  # half of them in the JSON
    body = _flip(body[:head], rng)[:head].ljust(head) + body[head:] if rng.random() < 0.5 else _flip(body, rng)
    target.post(RECONSTRUCT.name, body, **{_LENGTH: length})


def _wrong_tensors(target: Target, rng: random.Random) -> None:
    model: Model = rng.choice([one for one in SERVED.values() if one.inputs[0].dtype != "BYTES"])
    tensor, content = model.inputs[0], rng.randbytes(rng.choice([0, 1, 4, 1944, 37632, 100_000]))
    honest = _tensor(tensor, 1 if model.batched else None, len(content))
    if rng.random() < 0.1:  # room is made for these before a number is read
        honest |= {"shape": rng.choice([[2**31 - 1, 33], [9999, 9999, 9999], [1_000_000_000]]), "data": [0]}
        honest.pop("parameters")
    for _ in range(rng.randint(0, 3)):
        what = rng.choice(["name", "shape", "dims", "datatype", "size", "more", "region", "data"])
        if what == "shape":
            honest["shape"] = rng.choice(_STRANGE)
        elif what == "dims":
            honest["shape"] = [rng.choice(_STRANGE) for _ in range(rng.randint(0, 6))]
        elif what == "size":
            honest["parameters"] = {"binary_data_size": rng.choice(_STRANGE)}
        elif what == "more":
            honest["parameters"] = {str(rng.choice(_STRANGE)): rng.choice(_STRANGE)}
        elif what == "region":
            honest["parameters"] = {"shared_memory_region": "x", "shared_memory_byte_size": rng.choice(_STRANGE)}
        elif what == "data":
            honest["data"] = [rng.choice(_STRANGE) for _ in range(rng.randint(0, 9))]
        else:
            honest[what] = rng.choice([*_STRANGE, "FP16", "FP32", "BYTES", "UINT8", "crop", "parameters", 5000 * "x"])
    body, length = _body([honest] * rng.choice([1, 1, 1, 0, 2, 9]), content)
    target.post(model.name, body, **{_LENGTH: length})


def _field(number: int, content: bytes | int) -> bytes:
    """A protobuf field: a varint, or bytes behind their length."""
    if isinstance(content, int):
        return _varint(number << 3) + _varint(content)
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    value, out = value % 2**64, bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _message(name: str, tensor: str, dtype: str, shape: list[int], *contents: bytes) -> bytes:
    """KServe's ModelInferRequest."""
    described = _field(1, tensor.encode()) + _field(2, dtype.encode()) + b"".join(_field(3, size) for size in shape)
    return _field(1, name.encode()) + _field(5, described) + b"".join(_field(7, content) for content in contents)


def _honest_message(target: Target) -> bytes:
    crop = RECONSTRUCT.inputs[0]
    return _message(RECONSTRUCT.name, crop.name, crop.dtype, [1, *crop.shape], target.crop_u8.tobytes())


def _flipped_messages(target: Target, rng: random.Random) -> None:
    message = _honest_message(target)
    head = len(message) - target.crop_u8.size
    if rng.random() < 0.7:  # in what describes the crop
        target.call(_flip(message[:head], rng, 5)[:head].ljust(head, b"\0") + message[head:])
    else:
        target.call(_flip(message, rng))


def _wrong_messages(target: Target, rng: random.Random) -> None:
    names = [*SERVED, "", "other", "../decode", 9000 * "x"]
    dtypes = ["UINT8", "FP32", "FP16", "BYTES", "INT32", "", "X"]
    shape = [rng.choice(_SIZES) for _ in range(rng.randint(0, 5))]
    contents = [rng.randbytes(rng.choice([0, 1, 1944, 37632])) for _ in range(rng.choice([0, 1, 1, 2, 50]))]
    model = rng.choice(names)
    tensor = SERVED[model].inputs[0].name if model in SERVED else "crop"
    target.call(_message(model, tensor, rng.choice(dtypes), shape, *contents))


def _not_finite(target: Target, rng: random.Random) -> None:
    values = np.random.default_rng(rng.randrange(2**32)).normal(size=(2, *DECODE.inputs[0].shape)).astype(np.float32)
    values[rng.randrange(2), :: rng.randint(1, 99)] = rng.choice([np.nan, np.inf, -np.inf, 3e38, 1e-45])
    body, length = _body([_tensor(DECODE.inputs[0], 2, values.nbytes)], values.tobytes())
    target.post(DECODE.name, body, **{_LENGTH: length})


def _zero_size(target: Target, rng: random.Random) -> None:
    crop, parameters, request = RECONSTRUCT.inputs[0], DECODE.inputs[0], TOPOLOGY.inputs[0]
    empty = _field(1, RECONSTRUCT.name.encode())
    rng.choice(
        [
            lambda: target.post(RECONSTRUCT.name, b""),
            lambda: target.post(RECONSTRUCT.name, b"", **{_LENGTH: "0"}),
            lambda: target.post(RECONSTRUCT.name, b"{}"),
            lambda: target.post(RECONSTRUCT.name, *_named(_body([], b""))),
            lambda: target.post(RECONSTRUCT.name, *_named(_body([_tensor(crop, 0, 0)], b""))),
            lambda: target.post(RECONSTRUCT.name, *_named(_body([_tensor(crop, 0, 0, shape=[1, 0, 112, 3])], b""))),
            lambda: target.post(DECODE.name, *_named(_body([_tensor(parameters, 0, 0)], b""))),
            lambda: target.post(TOPOLOGY.name, *_named(_body([_tensor(request, None, 0, shape=[0])], b""))),
            lambda: target.call(b""),
            lambda: target.call(empty),
            lambda: target.call(_message(RECONSTRUCT.name, crop.name, crop.dtype, [0, *crop.shape], b"")),
            lambda: target.call(_message(DECODE.name, parameters.name, parameters.dtype, [1, 0], b"")),
        ]
    )()


def _named(body: tuple[bytes, str]) -> tuple[bytes]:
    return (body[0],)  # JSON alone: without its length


def _no_http(target: Target, rng: random.Random) -> None:
    body, length = _honest(target)
    whole = target.begin(f"Content-Length: {len(body)}", f"{_LENGTH}: {length}") + b"\r\n\r\n" + body
    head = whole.index(b"\r\n\r\n")
    kinds = [
        lambda: rng.randbytes(rng.randint(1, 3000)),
        lambda: _flip(whole[:head], rng) + whole[head:],
        lambda: whole[: rng.randrange(head)],
        lambda: whole.replace(b"HTTP/1.1", rng.choice([b"HTTP/9.9", b"", b"HTTP/1.1 HTTP/1.1", b"FTP/1.1"])),
        lambda: whole.replace(b"Content-Length", b"Transfer-Encoding: chunked\r\nContent-Length", 1),
        lambda: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + rng.randbytes(rng.randint(0, 3000)),
    ]
    target.raw(rng.choice(kinds)(), rng.choice(["http", "http", "grpc"]))


def _gigabytes(target: Target, rng: random.Random) -> None:
    huge = rng.choice([2**30, 2**31, 2**40, 2**63 - 1, 2**64])
    crop = target.crop_u8.tobytes()
    body, length = _honest(target)
    rng.choice(
        [
            lambda: target.raw(target.begin(f"Content-Length: {huge}", f"{_LENGTH}: 99") + b"\r\n\r\n" + crop),
            lambda: target.raw(target.begin("X: " + (1 << 20) * "x") + b"\r\n\r\n"),
            lambda: target.raw(target.begin(*(f"X{k}: {100 * 'x'}" for k in range(10_000))) + b"\r\n\r\n"),
            lambda: target.raw(b"POST /" + (1 << 20) * b"x" + b" HTTP/1.1\r\n\r\n"),
            lambda: target.post(RECONSTRUCT.name, body, **{_LENGTH: str(huge)}),
            lambda: target.post(RECONSTRUCT.name, body, **{_LENGTH: str(int(length) + rng.randint(-40, 40))}),
            lambda: target.post(RECONSTRUCT.name, bytes(17 << 20), **{_LENGTH: "99"}),
            lambda: target.post(RECONSTRUCT.name, *_body([_tensor(RECONSTRUCT.inputs[0], 1, huge)], crop)[:1]),
            lambda: target.call(
                _message(RECONSTRUCT.name, RECONSTRUCT.inputs[0].name, "UINT8", [huge, 112, 112, 3], crop)
            ),
            lambda: target.call(_message(RECONSTRUCT.name, RECONSTRUCT.inputs[0].name, "UINT8", [1], bytes(17 << 20))),
        ]
    )()


def _deep_json(target: Target, rng: random.Random) -> None:
    opening, closing = rng.choice([(b"[", b"]"), (b'{"a":', b"}"), (b'{"inputs":[', b"]}")])
    size = rng.choice([2 << 20, JSON_KB << 10, 9999])  # refused, and the longest that is let through
    count = size // (len(opening) + len(closing))
    deep = opening * count + (closing * count if rng.random() < 0.7 else b"")
    where = rng.choice([{}, {_LENGTH: str(len(deep))}, {_LENGTH: "-1"}])
    target.post(RECONSTRUCT.name, deep, **where)


def _tiny_chunks(target: Target, rng: random.Random) -> None:
    head = target.begin("Transfer-Encoding: chunked", f"{_LENGTH}: 100", "Connection: close")
    count = rng.choice([1_000_000, 10_000, 10_000, 10_000])
    with target.open() as connection:
        connection.sendall(head + b"\r\n\r\n" + b"1\r\nx\r\n" * count + b"0\r\n\r\n")
        said = connection.recv(1 << 16)
    raise RefusedError(repr(said[:60])) if said else ConnectionError("closed without a word")


def _take(target: Target, content: bytes) -> None:
    """An image file to the model that reads such, or to the reader in this process."""
    if not target.takes_photos:
        photo.read(content)
        return
    packed = len(content).to_bytes(4, "little") + content
    body, length = _body([_tensor(RECONSTRUCT_PHOTO.inputs[0], None, len(packed))], packed)
    target.post(RECONSTRUCT_PHOTO.name, body, **{_LENGTH: length})


@functools.cache
def _image(kind: str) -> bytes:
    from PIL import Image

    rng, out = np.random.default_rng(0), io.BytesIO()
    small = rng.integers(0, 256, (13, 17, 3), np.uint8)
    Image.fromarray(small).resize((170, 130)).save(out, kind)
    return out.getvalue()


def _flipped_photos(target: Target, rng: random.Random) -> None:
    _take(target, _flip(_image(rng.choice(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])), rng))


@functools.cache
def _png(width: int, height: int, true: bool = True) -> bytes:
    """A black PNG of one bit per pixel; not `true` has a header alone."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer, pixels = zlib.compressobj(), b""
    for _ in range(height if true else 0):
        pixels += packer.compress(bytes(1 + -(-width // 8)))
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    whole = chunk(b"IHDR", header) + chunk(b"IDAT", pixels + packer.flush()) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + whole


def _bombs(target: Target, rng: random.Random) -> None:
    jpeg, bitmap = _image("JPEG"), bytearray(_image("BMP"))
    at = jpeg.index(b"\xff\xc0") + 5
    bitmap[18:26] = struct.pack("<ii", 30_000, 30_000)
    _take(
        target,
        rng.choice(
            [
                *(
                    _png(20_000, 20_000),
                    _png(2**31 - 1, 2**31 - 1, False),
                    _png(1, 1),
                    _png(20_000, 1),
                    _png(0, 9, False),
                ),
                jpeg[:at] + struct.pack(">HH", 65_500, 65_500) + jpeg[at + 4 :],
                jpeg[:at] + struct.pack(">HH", 0, 0) + jpeg[at + 4 :],
                bytes(bitmap),
                b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + _image("GIF")[10:],
                *(b"", b"\0", bytes(15 << 20), _image("PNG")[:40]),
            ]
        ),
    )


@dataclass(frozen=True)
class Kind:
    """One kind of hostile input, how often it is sent at each scale, what sends one, and whether Triton bears it alone.

    2.51 dies of deep JSON, of huge shapes in JSON and of a million tiny chunks: nginx keeps those from it. The others
    go to both by turns.
    """

    name: str
    small: int
    full: int
    send: Callable[[Target, random.Random], None]
    direct: bool = True


KINDS = (
    Kind("bodies with changed bytes", 30, 2000, _flipped_bodies),
    Kind("wrong names, shapes and types", 30, 2000, _wrong_tensors, False),
    Kind("gRPC messages with changed bytes", 30, 1500, _flipped_messages),
    Kind("gRPC of wrong shapes and types", 30, 1000, _wrong_messages),
    Kind("NaN and infinity", 10, 200, _not_finite),
    Kind("zero-size", 12, 200, _zero_size),
    Kind("bytes that are no HTTP", 30, 1000, _no_http),
    Kind("gigabyte headers", 10, 150, _gigabytes),
    Kind("deep JSON", 10, 100, _deep_json, False),
    Kind("tiny chunks", 1, 20, _tiny_chunks, False),
    Kind("photos with changed bytes", 60, 2000, _flipped_photos),
    Kind("decompression bombs and empty photos", 13, 100, _bombs),
)


def hold_slowly(target: Target, count: int, seconds: float) -> tuple[int, int]:
    """Hold connections that send a byte now and then, stop in the middle, or never read their answer.

    Returns:
        How many the server ended within the time, of how many. A body that comes a byte at a time, for ever, is none
        of those: it costs one connection of the proxy, and its address has a limit of them.
    """
    body, length = _honest(target)
    whole = target.begin(f"Content-Length: {len(body)}", f"{_LENGTH}: {length}") + b"\r\n\r\n" + body
    large = _body([_tensor(RECONSTRUCT.inputs[0], 32, 32 * target.crop_u8.size)], 32 * target.crop_u8.tobytes())
    unread = target.begin(f"Content-Length: {len(large[0])}", f"{_LENGTH}: {large[1]}") + b"\r\n\r\n" + large[0]
    styles = [whole[:50], whole[:-100], whole[:-30_000], unread]
    held = []
    for k in range(count):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(_TIME_S)
        connection.connect((_HOST, target.ports["http"]))
        connection.sendall(styles[k % 4])
        held.append(connection)
    ended: set[int] = set()
    deadline = time.monotonic() + seconds
    wanted = [k for k in range(count) if k % 4 != 2]
    while time.monotonic() < deadline and not ended.issuperset(wanted):
        for k in set(range(count)) - ended:
            try:
                if k % 4 in (0, 2):  # drips: its head, its body
                    held[k].sendall(b"x")
                poll = select.poll()
                poll.register(held[k], select.POLLRDHUP)
                if any(event & (select.POLLRDHUP | select.POLLHUP | select.POLLERR) for _, event in poll.poll(0)):
                    ended.add(k)
            except OSError:
                ended.add(k)
        time.sleep(0.5)
    for connection in held:
        connection.close()
    return len(ended.intersection(wanted)), len(wanted)


def vanish(target: Target, count: int) -> int:
    """Connections dropped in the middle of a request, before the answer, and in the middle of it. Returns how many."""
    body, length = _honest(target)
    whole = target.begin(f"Content-Length: {len(body)}", f"{_LENGTH}: {length}") + b"\r\n\r\n" + body
    for k in range(count):
        style = k % 5
        if style == 4:
            target.cancel(_honest_message(target), (0, 0.001, 0.005)[k // 5 % 3])
            continue
        with target.open() as connection:
            connection.sendall((whole[:60], whole[: len(whole) // 2], whole, whole)[style])
            if style == 3:
                connection.recv(1000)
            if k % 2:  # a reset, not an end
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return count


def count_handles(pid: int) -> int:
    """Open files of a process."""
    return len(os.listdir(f"/proc/{pid}/fd"))
