"""Keep a server alive: started anew when it dies or when a face no longer goes through it, and each time said why."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from threading import Event
from typing import TYPE_CHECKING, Any, Protocol

from chebface.errors import ChebfaceError, ServerError, ServerUnavailableError

if TYPE_CHECKING:
    from chebface.proxy import Proxy
    from chebface.server import Server

FIRST_WAIT_S, MOST_WAIT_S = 1.0, 30.0  # before a restart; doubled while they follow each other
LIMIT, WITHIN_S = 5, 600.0  # restarts in that time; one more ends it, for somebody must look
_WARNINGS = ("failed", "restarting", "proxy restarted", "not renewed")


class Report(Protocol):
    """Told each event, in words, with its facts."""

    def __call__(self, event: str, /, **facts: Any) -> None: ...


def write_event(say: Callable[[str], None], as_json: bool) -> Report:
    """Events as lines: readable ones, or one JSON object each with time (UTC), level, event and its facts."""

    def report(event: str, /, **facts: Any) -> None:
        if as_json:
            now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
            level = "error" if event == "gave up" else "warning" if event in _WARNINGS else "info"
            say(json.dumps({"time": now, "level": level, "event": event} | facts, default=str))
        else:
            say(event + "".join(f"\n  {name}: {value}" for name, value in facts.items()))

    return report


def supervise(
    server: Server,
    proxy: Proxy | None = None,
    *,
    report: Report,
    every_s: float = 10.0,
    limit: int = LIMIT,
    first_wait_s: float = FIRST_WAIT_S,
    renew: Event | None = None,
    prove: Callable[[Server], object] = lambda server: None,
) -> None:
    """Start a server, and start it anew each time it fails; runs until it is interrupted, and then stops all it has.

    A renewal brings in what the repository has now without one failed request: a second server is started beside the
    first, `prove` finds it right, the proxy asks it from then on, and the first ends when it has answered what
    it was asked. Where the second is not as it should be, the first stays.

    Args:
        server: not started yet.
        proxy: what stands in front of it, when it is opened: shut while the server is away, restarted when it dies.
        report: told what happens: "removed leftovers", "opened", "ready", "failed", "restarting", "proxy restarted",
            "renewing", "renewed", "not renewed", "gave up", "draining".
        every_s: from one canary to the next.
        limit: restarts within WITHIN_S; one more is an error.
        first_wait_s: before the first restart.
        renew: set by who wants a renewal. With a proxy.
        prove: given a second server before it is asked; raises where its answers are not right.

    Raises:
        ServerUnavailableError: it cannot be started at all, or has failed too often.
        AssetError, MissingDependencyError: the repository or a program is not there.
    """
    restarts, started = _Restarts(limit, first_wait_s, report), False
    try:
        while True:
            try:
                server.start()
                if server.swept:
                    report("removed leftovers", of="a killed run", paths=server.swept)
                if proxy is not None and started:
                    _open_again(proxy, server, report)
                elif proxy is not None:
                    proxy.start(server.ports)
                    report("opened", to=str(proxy))
                started = True
                report("ready", **_facts(server))
                while True:
                    server.watch(
                        every_s, meanwhile=lambda: _keep(proxy, report) and renew is not None and renew.is_set()
                    )
                    if proxy is not None and renew is not None:
                        renew.clear()
                        server = _renew(server, proxy, report, prove)
            except ServerError as error:
                if not started:
                    raise
                if proxy is not None:
                    proxy.shut()
                report("failed", reason=str(error).partition("\n")[0], detail=str(error).partition("\n")[2])
                server.stop()
                restarts.wait(error)
    finally:
        try:
            report("draining")
        finally:
            if proxy is not None:  # first, so that what is on its way still finds the server
                proxy.stop()
            server.stop()


class _Restarts:
    """How many there were of late, and how long to wait before the next."""

    def __init__(self, limit: int, first_wait_s: float, report: Report) -> None:
        self._limit, self._first_wait_s, self._report = limit, first_wait_s, report
        self._failures: deque[float] = deque()

    def wait(self, error: ServerError) -> None:
        failures, now = self._failures, time.monotonic()
        while failures and now - failures[0] > WITHIN_S:
            failures.popleft()
        failures.append(now)
        if len(failures) > self._limit:
            self._report("gave up", failures=len(failures), within_s=WITHIN_S)
            raise ServerUnavailableError(
                f"the server failed {len(failures)} times within {WITHIN_S:g} s, the last time so: {error}"
            ) from error
        wait_s = min(MOST_WAIT_S, self._first_wait_s * 2 ** (len(failures) - 1))
        self._report("restarting", restart=len(failures), of=self._limit, wait_s=wait_s)
        time.sleep(wait_s)


def _open_again(proxy: Proxy, server: Server, report: Report) -> None:
    """Before another server; one that died meanwhile is started, which is no fault of that server."""
    if proxy.is_running():
        proxy.lead(server.ports)
    _keep(proxy, report, server.ports)
    proxy.open()


def _keep(proxy: Proxy | None, report: Report, ports: Mapping[str, int] | None = None) -> bool:
    """Start the proxy anew where it died, before the server of these ports. Returns whether there is one."""
    if proxy is not None and not proxy.is_running():
        said = proxy.log[-2000:]
        proxy.stop()
        proxy.start(ports)
        report("proxy restarted", detail=said)
    return proxy is not None


def _renew(server: Server, proxy: Proxy, report: Report, prove: Callable[[Server], object]) -> Server:
    """The server to go on with: another in the place of this one, or this one where the other is not well."""
    report("renewing")
    other = server.again()
    try:
        other.start()
        prove(other)
        proxy.lead(other.ports)
    except (ChebfaceError, OSError) as error:
        other.stop()
        report("not renewed", reason=str(error).partition("\n")[0], detail=str(error).partition("\n")[2])
        return server
    except BaseException:
        other.stop()
        raise
    server.stop()
    report("renewed", **_facts(other))
    return other


def _facts(server: Server) -> dict[str, Any]:
    facts = {"grpc": server.url, "http": server.http_url, "pid": server.pid, "onnxruntime": server.runtime}
    return facts | {"seconds": round(server.started_in_s, 1)}
