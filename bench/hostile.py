"""Inputs that mean harm, as bytes on a socket: what a server survives by itself, and what a proxy must stop."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import socket
import zlib
from collections.abc import Callable, Iterator

import numpy as np

from chebface.canary import draw_face
from chebface.server import Server
from chebface.signature import RECONSTRUCT_PHOTO
from chebface.wheel import HOST

Send = Callable[[], str | None]  # sends one and says what is wrong with the answer, if anything is


def direct_inputs(server: Server, rng: np.random.Generator) -> Iterator[tuple[str, Send]]:
    """Kinds by name, to be sent to the server itself."""
    from PIL import Image

    port, crop = server.ports["http"], draw_face()
    file = io.BytesIO()
    Image.fromarray(crop).resize((224, 224)).save(file, "JPEG")
    whole, request = file.getvalue(), http_request(crop[None])

    def fuzzed() -> str | None:
        content = bytearray(whole[: rng.integers(1, len(whole) + 1)] if rng.random() < 0.3 else whole)
        for place in rng.integers(0, len(content), rng.integers(1, 30)):
            content[place] = rng.integers(256)
        return _photo(port, bytes(content))

    def noise() -> str | None:
        return _photo(port, rng.bytes(int(rng.integers(0, 3000))))

    def wrong_tensor() -> str | None:
        shape = [int(v) for v in rng.integers(-2, 200, rng.integers(0, 5))]
        kind = str(rng.choice(["UINT8", "FP32", "INT64", "BYTES", "BOOL", "FP16", "NONE", ""]))
        return _post(port, http_request(crop[None], shape=shape, kind=kind))

    def not_finite() -> str | None:
        values = rng.choice([np.nan, np.inf, -np.inf, 3e38, -3e38, 0.0], (1, 486)).astype(np.float32)
        return _post(port, http_request(values, "decode", "parameters", "FP32"))

    def zero_size() -> str | None:
        return _post(port, http_request(crop[None][:0]))

    def broken_json() -> str | None:
        body = bytearray(request.partition(b"\r\n\r\n")[2][:300])
        for place in rng.integers(0, len(body), 5):
            body[place] = rng.integers(256)
        return _post(port, _raw("reconstruct", bytes(body)))

    def fuzzed_request() -> str | None:
        content = bytearray(request[:400])
        for place in rng.integers(0, len(content), rng.integers(1, 8)):
            content[place] = rng.integers(256)
        return _post(port, bytes(content), answer=False)

    def garbage_for_grpc() -> str | None:
        start = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" if rng.random() < 0.5 else b""
        return _post(server.ports["grpc"], start + rng.bytes(int(rng.integers(1, 500))), answer=False)

    def long_header() -> str | None:
        head = b"POST /v2/models/reconstruct/infer HTTP/1.1\r\nHost: a\r\nInference-Header-Content-Length: "
        return _post(
            port, head + b"9" * int(rng.integers(1, 30)) + b"\r\nContent-Length: 9999999999\r\n\r\n{}", answer=False
        )

    yield "a fuzzed photo", fuzzed
    yield "noise for a photo", noise
    yield "a decompression bomb", lambda: _photo(port, _bomb(20_000))
    yield "a tensor of wrong shape or type", wrong_tensor
    yield "NaN and infinity", not_finite
    yield "no faces at all", zero_size
    yield "broken JSON", broken_json
    yield "a fuzzed request", fuzzed_request
    yield "garbage for gRPC", garbage_for_grpc
    yield "a header of gigabytes", long_header


def proxied_inputs(port: int) -> Iterator[tuple[str, Send]]:
    """Kinds by name, to be sent to the HTTP port of a proxy: they end Triton 2.51, or fill its memory."""
    deep = b"[" * 1_000_000 + b"]" * 1_000_000

    def chunks() -> str | None:
        with contextlib.suppress(OSError), socket.create_connection((HOST, port), 30) as line:
            line.sendall(b"POST /v2/models/reconstruct/infer HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
            for _ in range(1000):
                line.sendall(b"1\r\n[\r\n" * 1000)
            line.sendall(b"0\r\n\r\n")
            return _read_answer(line, True)
        return None  # it closed the connection, as it may

    yield "JSON two million deep, by the proxy", lambda: _post(port, _raw("reconstruct", deep), answer=False)
    yield "a million chunks, by the proxy", chunks
    yield "300 MB, by the proxy", lambda: _post(port, _raw("reconstruct", b"{}", 300_000_000), answer=False)


def _photo(port: int, content: bytes) -> str | None:
    body = len(content).to_bytes(4, "little") + content
    return _post(port, http_request(body, RECONSTRUCT_PHOTO.name, "photo", "BYTES", [1]))


def _bomb(side: int) -> bytes:
    """A PNG of side x side pixels in one colour: small as a file."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    size = side.to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    rows = zlib.compress(bytes((side + 1) * 1000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def http_request(
    content: np.ndarray | bytes,
    model: str = "reconstruct",
    name: str = "crop",
    kind: str = "UINT8",
    shape: list[int] | None = None,
) -> bytes:
    """One inference request over HTTP with a binary tensor; what is said of the tensor need not be so."""
    data = content if isinstance(content, bytes) else content.tobytes()
    if shape is None:
        shape = list(content.shape) if isinstance(content, np.ndarray) else [1]
    tensor = {"name": name, "shape": shape, "datatype": kind, "parameters": {"binary_data_size": len(data)}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return _raw(model, head + data, extra=f"Inference-Header-Content-Length: {len(head)}\r\n")


def _raw(model: str, body: bytes, length: int | None = None, extra: str = "") -> bytes:
    line = f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: {HOST}\r\n{extra}"
    return f"{line}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


def _post(port: int, request: bytes, answer: bool = True) -> str | None:
    """Send bytes as they are; what is wrong with the answer. Without `answer`, none at all is well, too: what was sent
    is no request."""
    try:
        with socket.create_connection((HOST, port), 10) as line:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                line.sendall(request)
            return _read_answer(line, answer)
    except ConnectionRefusedError:
        return "nobody listens any more"


def _read_answer(line: socket.socket, wanted: bool) -> str | None:
    if not wanted:
        line.settimeout(0.2)
    reply = http.client.HTTPResponse(line)
    try:
        reply.begin()
        reply.read()
        return None
    except (OSError, http.client.HTTPException) as error:
        return f"no answer: {error!r}" if wanted else None
