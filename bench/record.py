"""One record for every measurement, and the alternating timing behind it."""

from __future__ import annotations

import datetime
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from chebface.errors import ChebfaceError


class DisagreesError(ChebfaceError):
    """What is to be timed does not compute what its reference computes."""

    exit_code = 3


def race(ours: Callable[[], Any], rival: Callable[[], Any], *, seconds: float) -> tuple[list[float], list[float]]:
    """Time two functions in turns, so that a busy neighbour slows both. Milliseconds of every round."""
    times: tuple[list[float], list[float]] = ([], [])
    for function in (ours, rival):
        function()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for function, into in zip((ours, rival), times, strict=True):
            began = time.perf_counter()
            function()
            into.append((time.perf_counter() - began) * 1e3)
    return times


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread for a while."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make_record(
    *, bench: str, case: str, implementation: str, rival: str, times: tuple[list[float], list[float]], **facts: Any
) -> dict[str, Any]:
    """A row: medians, ratio (rival's median over ours), and where it was measured."""
    ours, theirs = (statistics.median(t) for t in times)
    row = {"bench": bench, "case": case, "what": "cpu", "implementation": implementation, "rival": rival}
    figures = {
        "median_ms": round(ours, 4),
        "p99_ms": round(float(np.percentile(times[0], 99)), 4),
        "rival_median_ms": round(theirs, 4),
        "ratio": round(theirs / ours, 2),
        "rounds": len(times[0]),
    }
    return row | facts | figures | where()


def check(name: str, error: float, limit: float) -> dict[str, Any]:
    """The error against the reference, as a record keeps it.

    Raises:
        DisagreesError: above the limit; such a thing is not timed.
    """
    if not error <= limit:
        raise DisagreesError(f"{name}: error {error:g} against its reference, limit {limit:g}; it is not timed")
    return {"error": error, "limit": limit, "passed": True}


def where() -> dict[str, Any]:
    """Commit, machine and date, as every row has them."""
    root = Path(__file__).resolve().parent.parent
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {"commit": commit, "machine": _processor(), "date": datetime.date.today().isoformat()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return f"{models[0]} x {len(models)}"
    except (OSError, IndexError):
        return platform.processor() or platform.machine()
