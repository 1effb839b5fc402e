"""Load on a server: callers that wait for their answer, callers that do not, and what the server spends meanwhile."""

from __future__ import annotations

import http.client
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from chebface.errors import ServerBusyError, ServerError
from chebface.server import Server
from chebface.signature import MODELS, RECONSTRUCT
from chebface.wheel import HOST

RAMP = 0.2  # of a closed loop's time, before it counts
TURN_S = 0.2
_TICKS = os.sysconf("SC_CLK_TCK")
_PARTS = ("queue", "compute_input", "compute_infer", "compute_output")


def take_turns(sides: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of every call; the sides take turns of TURN_S until the time of all is over."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < 5:
        for name, call in sides.items():
            call()  # the other sides' caches
            turn = time.perf_counter() + TURN_S
            while True:
                began = time.perf_counter()
                call()
                ended = time.perf_counter()
                times[name].append(1e3 * (ended - began))
                if ended > turn:
                    break
    return times


@dataclass
class Answers:
    """What callers saw."""

    served_ms: list[float] = field(default_factory=list)
    refused_ms: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)  # neither served nor refused
    late_ms: list[float] = field(default_factory=list)  # behind the plan of an open loop, when it was sent
    per_s: float = 0.0  # answers of a closed loop, requests that an open loop has sent

    @classmethod
    def join(cls, parts: Sequence[Answers]) -> Answers:
        """Those of callers who worked at the same time."""
        whole = cls(per_s=sum(part.per_s for part in parts))
        for part in parts:
            for name in ("served_ms", "refused_ms", "failed", "late_ms"):
                getattr(whole, name).extend(getattr(part, name))
        return whole

    def call(self, ask: Callable[[], Any]) -> None:
        """Ask once."""
        began = time.perf_counter()
        try:
            ask()
            self.served_ms.append(1e3 * (time.perf_counter() - began))
        except ServerBusyError:
            self.refused_ms.append(1e3 * (time.perf_counter() - began))
        except ServerError as error:
            self.failed.append(str(error)[:200])


def closed_loop(ask: Callable[[], Any], concurrency: int, seconds: float) -> Answers:
    """So many callers, each of whom asks again as soon as he has an answer, and has one at least that counts: those of
    the first RAMP do not, nor those after the end.

    Raises:
        ServerError: a call failed or was refused.
    """
    began = time.perf_counter()
    first, last = began + RAMP * seconds, began + seconds
    parts: list[Answers] = []
    ends = [last]

    def work() -> None:
        own, kept = Answers(), 0
        parts.append(own)
        while not own.failed and not own.refused_ms and (time.perf_counter() < last or not kept):
            own.call(ask)
            now = time.perf_counter()
            if (kept and now >= last) or now < first:
                del own.served_ms[kept:]
            elif len(own.served_ms) > kept:
                kept += 1
                ends.append(now)

    _run_threads(work, concurrency)
    answers = Answers.join(parts)
    if bad := answers.failed + ["busy"] * len(answers.refused_ms):
        raise ServerError(f"{len(bad)} of {concurrency} callers failed: {bad[0]}")
    answers.per_s = len(answers.served_ms) / (max(ends) - first)
    return answers


def open_loop(ask: Callable[[], Any], rate: float, seconds: float, callers: int, seed: int = 0) -> Answers:
    """Requests at Poisson times, whatever becomes of them.

    Args:
        ask: one request.
        rate: requests per second on average.
        seconds: of sending.
        callers: the most requests in flight; with too few, requests are late (`late_ms`).
        seed: of the times.
    """
    gaps = np.random.default_rng(seed).exponential(1 / rate, int(rate * seconds * 1.2) + 100)
    times = np.cumsum(gaps)
    plan = iter(times[times < seconds].tolist())
    parts: list[Answers] = []
    lock = threading.Lock()
    began = time.perf_counter()

    def work() -> None:
        own = Answers()
        parts.append(own)
        while True:
            with lock:
                due = next(plan, None)
            if due is None or time.perf_counter() - began > seconds:
                break
            time.sleep(max(0.0, began + due - time.perf_counter()))
            own.late_ms.append(1e3 * (time.perf_counter() - began - due))
            own.call(ask)

    _run_threads(work, callers)
    answers = Answers.join(parts)
    answers.per_s = len(answers.late_ms) / seconds
    return answers


def _run_threads(work: Callable[[], None], count: int) -> None:
    threads = [threading.Thread(target=work, name=f"chebface-load-{k}") for k in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class Meter:
    """What a server spends between `start` and `read`: its own statistics, processor time and memory."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._before: tuple[float, float, dict[str, float]] = (0.0, 0.0, {})

    def start(self) -> None:
        """Remember where its counters stand."""
        self._before = time.perf_counter(), self._cpu_s(), self._statistics()

    def read(self) -> dict[str, float]:
        """Since `start`: {"queue_share", "compute_share"} of the time that requests spent in the server,
        {"server_batch"} faces in a run of the network, {"server_cores"} busy on average, and {"memory_mb"} now.

        Raises:
            ServerError: the statistics do not say what they should.
        """
        began, cpu_s, before = self._before
        now = {key: value - before.get(key, 0) for key, value in self._statistics().items()}
        total = max(now["total"], sum(now[part] for part in _PARTS), 1.0)
        return {
            "queue_share": round(now["queue"] / total, 3),
            "compute_share": round(sum(now[part] for part in _PARTS[1:]) / total, 3),
            "server_batch": round(now["faces"] / max(now["runs"], 1.0), 2),
            "server_cores": round((self._cpu_s() - cpu_s) / (time.perf_counter() - began), 2),
            "memory_mb": self.memory_mb(),
        }

    def memory_mb(self) -> float:
        """Of all its processes, what they share counted once."""
        kb = 0
        for path in self._processes():
            try:
                lines = (path / "smaps_rollup").read_text().splitlines()
                kb += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
            except OSError:  # it ended meanwhile
                continue
        return round(kb / 1024, 1)

    def _processes(self) -> list[Path]:
        """Those of the server's session, which it leads."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if os.getsid(int(path.name)) == self._server.pid:
                    found.append(path)
            except (ProcessLookupError, PermissionError):
                continue
        return found

    def _cpu_s(self) -> float:
        ticks = 0
        for path in self._processes():
            try:
                fields = (path / "stat").read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])  # user and system
            except OSError:
                continue
        return ticks / _TICKS

    def _statistics(self) -> dict[str, float]:
        model = self._ask(RECONSTRUCT.name)
        try:
            times = model["inference_stats"]
            found = {part: float(times[part]["ns"]) for part in _PARTS}
            found |= {"total": float(times["success"]["ns"])}
            return found | {"faces": float(model["inference_count"]), "runs": float(model["execution_count"])}
        except (KeyError, TypeError) as error:
            raise ServerError(f"the server's statistics are not what Triton 2.51 gives: {error!r}") from error

    def _ask(self, model: str) -> dict[str, Any]:
        connection = http.client.HTTPConnection(HOST, self._server.ports["http"], timeout=10)
        try:
            connection.request(
                "GET", f"/v2/models/{MODELS[model].name}/stats", headers=dict([self._server.admin_header])
            )
            answer = connection.getresponse()
            text = answer.read().decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"{model}: no statistics ({error!r})") from error
        finally:
            connection.close()
        try:
            return dict(json.loads(text)["model_stats"][0])
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ServerError(f"{model}: no statistics: HTTP {answer.status} {text[:200]}") from error
