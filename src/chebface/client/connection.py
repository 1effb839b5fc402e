"""Requests to one or several servers: sent, repeated where that is safe, and failed as this package's errors."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from chebface.client.memory import Memory
from chebface.client.wire import Address, Deadline, Failure, Part, Request, Retry, Transport, blame_photo, classify
from chebface.errors import (
    ConfigError,
    InputError,
    PhotoError,
    ServerBusyError,
    ServerError,
    ServerUnavailableError,
)
from chebface.signature import PRIORITIES, Model, Tensor

PROBE_S = 1.0  # how long a server that missed a deadline may take to say that it is alive
TOKENS, REFILL = 10.0, 0.1  # repeats after "busy": what is saved up, and what each success adds


def open_transport(
    address: Address,
    *,
    token: str | None = None,
    headers: Mapping[str, str] | None = None,
    admin: tuple[str, str] | None = None,
    ca_file: str | Path | None = None,
) -> Transport:
    """The transport for an address, by its scheme.

    Raises:
        ConfigError: a token that would travel in plain text, or certificates that cannot be read.
        MissingDependencyError: tritonclient is not installed (gRPC).
    """
    if (token or admin) and not (address.is_encrypted or address.is_local):
        raise ConfigError(f"token, admin: {address} would show them to everyone on the way: use grpcs:// or https://")
    ca = None
    if ca_file is not None:
        import ssl

        try:
            ca = Path(ca_file).read_bytes()
            ssl.create_default_context(cadata=ca.decode())
        except (OSError, ValueError) as error:
            raise ConfigError(f"ca_file: {ca_file} is not a file of PEM certificates ({error})") from error
    fields = dict(headers or {}) | ({"authorization": f"Bearer {token}"} if token else {})
    if address.scheme in ("http", "https"):
        from chebface.client.over_http import HttpTransport

        return HttpTransport(address, headers=fields, admin=admin, ca=ca)
    from chebface.client.over_grpc import GrpcTransport

    return GrpcTransport(address, headers=fields, admin=admin, ca=ca)


class Connection:
    """Arrays in, arrays out. Threads share it."""

    def __init__(
        self, transports: Sequence[Transport], *, retry: Retry, shared_memory: str, priority: str = "normal"
    ) -> None:
        """Nothing is sent yet.

        Args:
            transports: one per server; the next takes over where one is busy or away.
            retry: when to send again.
            shared_memory: "auto", "on" or "off".
            priority: of signature.PRIORITIES.

        Raises:
            ConfigError: no transport, or another word for shared_memory or priority.
        """
        if not transports:
            raise ConfigError("url: expected at least one server, got none")
        if shared_memory not in ("auto", "on", "off"):
            raise ConfigError(f"shared_memory: expected 'auto', 'on' or 'off', got {shared_memory!r}")
        if priority not in PRIORITIES:
            raise ConfigError(f"priority: expected {' or '.join(map(repr, PRIORITIES))}, got {priority!r}")
        self._priority = PRIORITIES[priority]
        self._lines = [(transport, Memory(transport, shared_memory)) for transport in transports]
        self._retry = retry
        self._current = 0
        self._tokens = TOKENS
        self._lock = threading.Lock()
        self._closed = False
        self.repeats = 0  # requests that were sent again

    @property
    def url(self) -> str:
        """The server that is asked now."""
        return self._lines[self._current][0].url

    def describe(self) -> str:
        """How requests travel to the server that is asked now."""
        transport, memory = self._lines[self._current]
        return f"{transport.name}, {memory}"

    def close(self) -> None:
        """End the connections; further calls fail. Safe to call twice."""
        with self._lock:
            closed, self._closed = self._closed, True
        if not closed:
            for transport, memory in self._lines:
                memory.close()
                transport.close()

    def is_ready(self, timeout_s: float) -> bool:
        """Whether one of the servers answers and says that its models are loaded."""
        return not self._closed and any(transport.probe("ready", timeout_s) for transport, _ in self._lines)

    def infer(
        self,
        model: Model,
        inputs: Mapping[str, np.ndarray],
        deadline: Deadline,
        *,
        outputs: Sequence[Tensor] | None = None,
    ) -> dict[str, np.ndarray]:
        """Run one model on one request.

        Args:
            model: its entry in signature.py.
            inputs: arrays by tensor name; batched models want the batch dimension in front.
            deadline: the answer's; repeats and waits included.
            outputs: those that should come back; None is all but those on request.

        Returns:
            Arrays by output name, which may be read-only.

        Raises:
            InputError: an array is not what signature.py says, or the client is closed.
            ServerUnavailableError, ServerBusyError, ServerError: the server is away, too busy, or failed.
            PhotoError, NoFaceError: what the server says of a photo.
        """
        request = Request.make(model, inputs, outputs, self._priority)
        failed = 0
        while True:
            if self._closed:
                raise InputError(f"the client of {self.url} is closed: make a new one")
            at = self._current
            transport, memory = self._lines[at]
            try:
                parts = self._send(transport, memory, request, deadline)
                answer = request.read(parts, transport.url)
            except Failure as failure:
                failed += 1
                error = blame_photo(failure) or classify(
                    failure,
                    transport.url,
                    model.name if failed == 1 else f"{model.name} (try {failed})",
                    deadline.seconds,
                    lambda what, transport=transport: transport.probe(what, PROBE_S),  # type: ignore[misc]
                )
                wait_s = self._retry.wait_s(failed, random.random())
                if failed >= self._retry.attempts or wait_s >= deadline.left_s() or not self._may_repeat(error):
                    raise error from failure
                with self._lock:
                    self.repeats += 1
                    if self._current == at:
                        self._current = (at + 1) % len(self._lines)
                time.sleep(wait_s)
            else:
                self._tokens = min(TOKENS, self._tokens + REFILL)
                return answer

    def _may_repeat(self, error: ServerError | PhotoError) -> bool:
        """Busy is repeated only while most requests get through: repeats would keep an overloaded server overloaded."""
        if isinstance(error, ServerBusyError):
            with self._lock:
                self._tokens = max(0.0, self._tokens - 1)
                return self._tokens > TOKENS / 2
        return isinstance(error, ServerUnavailableError)

    def _send(self, transport: Transport, memory: Memory, request: Request, deadline: Deadline) -> dict[str, Part]:
        region = memory.lease(request, _left(deadline, request, transport))
        if region is None:
            return transport.send(request, _left(deadline, request, transport))
        try:
            parts = region.read(transport.send(request, max(1e-3, deadline.left_s()), region))
        except BaseException as error:
            if isinstance(error, Failure) and not error.is_lost:
                memory.give_back(region)
                if error.says(("shared memory region",)):
                    memory.forget()
                    return transport.send(request, _left(deadline, request, transport))
            else:
                memory.abandon(region)
            raise
        memory.give_back(region)
        return parts


def _left(deadline: Deadline, request: Request, transport: Transport) -> float:
    left_s = deadline.left_s()
    if left_s <= 0:
        raise ServerBusyError(
            f"{transport.url}: {request.model.name}: deadline_s ({deadline.seconds:g}) passed before the request was "
            "sent: raise it"
        )
    return left_s
