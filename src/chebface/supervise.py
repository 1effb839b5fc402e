"""Keep a server alive: started anew when it dies or when a face no longer goes through it, and each time said why."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Protocol

from chebface.errors import ServerError, ServerUnavailableError

if TYPE_CHECKING:
    from chebface.proxy import Proxy
    from chebface.server import Server

FIRST_WAIT_S, MOST_WAIT_S = 1.0, 30.0  # before a restart; doubled while they follow each other
LIMIT, WITHIN_S = 5, 600.0  # restarts in that time; one more ends it, for somebody must look
_WARNINGS = ("failed", "restarting", "proxy restarted")


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
) -> None:
    """Start a server, and start it anew each time it fails; runs until it is interrupted.

    Stopping both is the caller's: the proxy first, so that what is on its way still finds the server.

    Args:
        server: not started yet.
        proxy: what stands in front of it, when it is opened: shut while the server is away, restarted when it dies.
        report: told what happens: "removed leftovers", "opened", "ready", "failed", "restarting", "proxy restarted",
            "gave up".
        every_s: from one canary to the next.
        limit: restarts within WITHIN_S; one more is an error.
        first_wait_s: before the first restart.

    Raises:
        ServerUnavailableError: it cannot be started at all, or has failed too often.
        AssetError, MissingDependencyError: the repository or a program is not there.
    """
    failures: deque[float] = deque()
    started = False
    while True:
        try:
            server.start()
            if server.swept:
                report("removed leftovers", of="a killed run", paths=server.swept)
            if proxy is not None and started:
                proxy.open()
            elif proxy is not None:
                proxy.start(server.ports)
                report("opened", to=str(proxy))
            started = True
            report(
                "ready", grpc=server.url, http=server.http_url, pid=server.pid, seconds=round(server.started_in_s, 1)
            )
            server.watch(every_s, meanwhile=lambda: _keep(proxy, report))
        except ServerError as error:
            if not started:
                raise
            if proxy is not None:
                proxy.shut()
            report("failed", reason=str(error).partition("\n")[0], detail=str(error).partition("\n")[2])
            server.stop()
            now = time.monotonic()
            while failures and now - failures[0] > WITHIN_S:
                failures.popleft()
            failures.append(now)
            if len(failures) > limit:
                report("gave up", failures=len(failures), within_s=WITHIN_S)
                raise ServerUnavailableError(
                    f"the server failed {len(failures)} times within {WITHIN_S:g} s, the last time so: {error}"
                ) from error
            wait_s = min(MOST_WAIT_S, first_wait_s * 2 ** (len(failures) - 1))
            report("restarting", restart=len(failures), of=limit, wait_s=wait_s)
            time.sleep(wait_s)


def _keep(proxy: Proxy | None, report: Report) -> None:
    if proxy is not None and not proxy.is_running():
        said = proxy.log[-2000:]
        proxy.stop()
        proxy.start()
        report("proxy restarted", detail=said)
