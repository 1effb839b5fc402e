"""Requests over HTTP, with as many kept connections as there are threads that ask at once.

The standard library's client, not tritonclient.http: that one shares a gevent pool of fixed size between threads, and
hangs when there are more threads than connections.
"""

from __future__ import annotations

import http.client
import json
import ssl
import threading
import time
from collections.abc import Mapping
from typing import Any

from chebface.client.memory import Region
from chebface.client.wire import Address, Failure, Part, Request, Transport

KEPT = 32  # idle connections at most
_LENGTH = "Inference-Header-Content-Length"
_PIECE = 1 << 20  # bytes read at once; the clock is looked at between two pieces


class HttpTransport(Transport):
    """Triton's HTTP interface, with tensors as raw bytes behind the JSON."""

    name = "HTTP"

    def __init__(
        self, address: Address, *, headers: Mapping[str, str], admin: tuple[str, str] | None, ca: bytes | None
    ) -> None:
        """Nothing is sent yet.

        Args:
            address: of the server.
            headers: sent with each request.
            admin: name and value of the header that opens the restricted interfaces.
            ca: certificates (PEM) to trust instead of the system's.
        """
        self.url, self.is_local = str(address), address.is_local
        self._address = address
        self._headers, self._admin = dict(headers), dict([admin] if admin else ())
        self._tls = None
        if address.is_encrypted:
            self._tls = ssl.create_default_context(cadata=ca.decode() if ca else None)
        self._idle: list[http.client.HTTPConnection] = []
        self._lock = threading.Lock()
        self._closed = False

    def close(self) -> None:
        """End the idle connections now, the others when their request is over."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _connect(self, timeout_s: float) -> http.client.HTTPConnection:
        host, port = self._address.host.strip("[]"), self._address.port
        if self._tls is not None:
            return http.client.HTTPSConnection(host, port, timeout=timeout_s, context=self._tls)
        return http.client.HTTPConnection(host, port, timeout=timeout_s)

    def _exchange(
        self,
        method: str,
        path: str,
        timeout_s: float,
        body: list[Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[bytearray, int]:
        """One exchange: the answer's body and the length of its JSON part.

        Raises:
            Failure: no answer in time, or a status other than 200.
        """
        end = time.monotonic() + timeout_s
        parts = [memoryview(part).cast("B") for part in body or ()]
        fields = {**self._headers, **(headers or {}), "Content-Length": str(sum(len(part) for part in parts))}
        while True:
            with self._lock:
                kept = self._idle.pop() if self._idle else None
            connection = kept or self._connect(timeout_s)
            try:
                connection.timeout = max(1e-3, end - time.monotonic())
                if connection.sock is not None:
                    connection.sock.settimeout(connection.timeout)
                connection.request(method, path, iter(parts), fields)
                answer = connection.getresponse()
                content = _read(answer, connection, end)
            except TimeoutError as error:
                connection.close()
                raise Failure("DEADLINE_EXCEEDED", str(error)) from error
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                if kept is not None and isinstance(error, (ConnectionError, http.client.BadStatusLine)):
                    continue  # the server ended it while it lay idle; a new one tells whether there is a server
                raise Failure("UNAVAILABLE", f"{type(error).__name__}: {error}") from error
            except BaseException:
                connection.close()
                raise
            with self._lock:
                keep = not (self._closed or answer.will_close) and len(self._idle) < KEPT
                if keep:
                    self._idle.append(connection)
            if not keep:
                connection.close()
            if answer.status != 200:
                raise Failure(f"HTTP {answer.status}", _message(content))
            length = answer.getheader(_LENGTH, "")
            return content, int(length) if length.isdigit() else len(content)

    def send(self, request: Request, timeout_s: float, region: Region | None = None) -> dict[str, Part]:
        """See Transport."""
        contents = request.contents
        inputs = [
            {
                "name": tensor.name,
                "datatype": tensor.dtype,
                "shape": list(array.shape),
                "parameters": _point(region, tensor.name) if region else {"binary_data_size": len(content)},
            }
            for tensor, array, content in zip(request.inputs, request.arrays, contents, strict=True)
        ]
        outputs = [
            {"name": tensor.name, "parameters": _point(region, tensor.name) if region else {"binary_data": True}}
            for tensor in request.outputs
        ]
        parameters = {"timeout": max(1, int(timeout_s * 1e6))}
        if request.is_urgent:
            parameters["priority"] = request.priority
        head = json.dumps({"inputs": inputs, "outputs": outputs, "parameters": parameters}).encode()
        content, length = self._exchange(
            "POST",
            f"/v2/models/{request.model.name}/infer",
            timeout_s,
            [head, *(() if region else contents)],
            {_LENGTH: str(len(head)), "Content-Type": "application/octet-stream"},
        )
        try:
            return _take_apart(content, length)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Failure("BROKEN", f"the answer is not Triton's ({error!r})") from error

    def probe(self, what: str, timeout_s: float) -> bool:
        """See Transport."""
        try:
            self._exchange("GET", f"/v2/health/{what}", timeout_s)
        except Failure:
            return False
        return True

    def register(self, name: str, key: str, size: int, timeout_s: float) -> None:
        """See Transport."""
        body = json.dumps({"key": key, "offset": 0, "byte_size": size}).encode()
        self._exchange("POST", f"/v2/systemsharedmemory/region/{name}/register", timeout_s, [body], self._admin)

    def unregister(self, name: str, timeout_s: float) -> None:
        """See Transport."""
        self._exchange("POST", f"/v2/systemsharedmemory/region/{name}/unregister", timeout_s, [b""], self._admin)


def _read(answer: http.client.HTTPResponse, connection: http.client.HTTPConnection, end: float) -> bytearray:
    """The body, within the deadline as a whole: a socket's own time out counts anew for each piece."""
    content = bytearray()
    while True:
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError("the answer came too slowly")
        if connection.sock is not None:  # http.client lets go of it before the last piece
            connection.sock.settimeout(left)
        piece = answer.read1(_PIECE)
        if not piece:
            if answer.length:
                raise http.client.IncompleteRead(bytes(content), answer.length)
            answer.close()  # else the connection takes no further request
            return content
        content += piece


def _take_apart(content: bytearray, length: int) -> dict[str, Part]:
    """Outputs by name: the JSON says which, their bytes follow in the same order."""
    parts, at, view = {}, length, memoryview(content)
    for output in json.loads(content[:length])["outputs"]:
        size = output.get("parameters", {}).get("binary_data_size")
        raw = None if size is None else view[at : at + size]
        parts[output["name"]] = Part(output["datatype"], tuple(output["shape"]), raw)
        at += size or 0
    return parts


def _message(content: bytearray) -> str:
    try:
        return str(json.loads(content)["error"])
    except (ValueError, KeyError, TypeError):
        return content[:300].decode(errors="replace")


def _point(region: Region, tensor: str) -> dict[str, Any]:
    offset, size = region.places[tensor]
    return {"shared_memory_region": region.name, "shared_memory_offset": offset, "shared_memory_byte_size": size}
