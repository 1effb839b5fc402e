"""What serving costs over running the same files in this process: latency, throughput, overload, a peer's loop."""

from __future__ import annotations

import functools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.analyzer import Analyzer, fetch_analyzer
from bench.load import Answers, Meter, closed_loop, open_loop, take_turns
from bench.record import check, make_record
from chebface.client import Client, Retry
from chebface.client.stream import Batcher
from chebface.client.wire import Deadline
from chebface.errors import ChebfaceError, ConfigError, MissingDependencyError, ServerError
from chebface.repository import OPERATORS, find_model
from chebface.server import Server, stop_signals
from chebface.signature import CROP, MAX_BATCH, RECONSTRUCT

CASES = ("reconstruct", "throughput", "overload", "peer")
CONCURRENCIES = (1, 2, 4, 8, 16, 32)
LOADS = (0.25, 0.5, 0.75, 0.9)  # of the capacity, at Poisson times
OVERLOAD = 10.0  # times the capacity
FACES = 8  # in a request of the overload: the callers shall not take the processor that they ask for
CALLERS = 64  # of the overload, beyond those whose requests fill the queue
SETTLE_S = 3.0  # of overload before memory is looked at: the first full batches at once make room for themselves
FLOODERS = 2  # processes of theirs: one interpreter alone would be late
REFUSED_MS, SERVED = 50.0, 3.0  # what the overload may cost: p99 of refusals; of the served, times the unloaded p99
FLAT = 1.02  # memory at its end, times that at half its time
PIECES = 3  # of a row's time, each with a piece of its rival
STABLE = 0.15  # the most that the rate of a piece may differ from their mean
LIMIT = 1e-5  # m and parameters: the same files in another process and another batch
PERCENTILES = (50, 90, 95, 99)
HERE = "onnxruntime in process"
_SEED = 7
_ROOT = Path(__file__).resolve().parent.parent

Say = Callable[[str], None]
Row = dict[str, Any]


def measure(
    seconds: float = 6.0,
    cases: Sequence[str] = CASES,
    concurrencies: Sequence[int] = CONCURRENCIES,
    repository: str | Path = "triton_models",
    overload_s: float = 120.0,
    work: str | Path | None = None,
    say: Say = lambda line: None,
) -> list[Row]:
    """Rows of one real server over a model repository, each against a rival that takes turns with it.

    reconstruct: one face per request from one caller, by gRPC with shared memory, gRPC and HTTP, against onnxruntime
    over the same files in this process, with as many threads as the served model has: `added_ms`, between the medians.
    throughput: one face per request from `concurrency` callers, by the client's threads, with and without
    the micro-batches of `Client.map`, and by perf_analyzer (and that
    at Poisson times, `load` of the capacity), against the same files here in batches of that size with all cores:
    `ratio` of faces per second. `unstable`: the pieces differ by more than STABLE from their mean.
    overload: requests of FACES at Poisson times, OVERLOAD times the capacity: `p99_ms` of the served against
    `allowed_ms` (SERVED times the unloaded p99, and the longest that the queue lets a request wait),
    `refused_p99_ms`, memory before, at half the time, most and after.
    peer: crop to vertices, against the demo's backbone and mapping and then smplx's FLAME in torch eager, one face at
    a time: `ratio` of the medians, `throughput_ratio` with 8 callers; the demo weights in fp32 and, with our decode and
    its basis in fixed point, in int8, exported for it, with as many instances as the repository has.

    Args:
        seconds: of each row.
        cases: of CASES.
        concurrencies: callers at once.
        repository: as `python -m export` leaves it.
        overload_s: of the case overload.
        work: folder that keeps the exports of the case peer, for the next time; None takes a temporary one.
        say: called with one line per step.

    Raises:
        ConfigError: an unknown case, or a number out of range.
        AssetError: the repository is not filled.
        MissingDependencyError: no server, or something that the case peer needs.
        DisagreesError: the server computes something else than the files do here.
        ServerError: it failed.
    """
    if unknown := sorted(set(cases) - set(CASES)):
        raise ConfigError(f"case: expected some of {', '.join(CASES)}, got {', '.join(unknown)}")
    if not concurrencies or not all(1 <= count <= MAX_BATCH for count in concurrencies):
        raise ConfigError(f"concurrency: expected 1..{MAX_BATCH}, got {', '.join(map(str, concurrencies)) or 'none'}")
    if seconds <= 0 or overload_s <= 0:
        raise ConfigError(f"seconds: expected more than 0, got {seconds:g} and {overload_s:g} for the overload")
    rows: list[Row] = []
    runs: dict[str, Callable[[_Course], Iterator[Row]]] = {
        "reconstruct": _latency,
        "throughput": functools.partial(_throughput, concurrencies=concurrencies),
        "overload": _overload,
    }
    with stop_signals():
        if plain := [case for case in CASES[:-1] if case in cases]:
            with _serve(Path(repository), seconds, overload_s, say) as course:
                for case in plain:
                    for row in runs[case](course):
                        say(spell(row))
                        rows.append(row)
        if CASES[-1] in cases:
            with tempfile.TemporaryDirectory() as name:
                for row in _peer(Path(repository), Path(work or name), Path(name), seconds, say):
                    say(spell(row))
                    rows.append(row)
    return rows


@dataclass(frozen=True)
class Served:
    """What a repository's configuration says of the network: the number of threads is what both sides get."""

    threads: int  # of one instance
    instances: int
    queue_size: int
    queue_timeout_ms: float


def read_config(repository: Path) -> Served:
    """The network's config.pbtxt, as far as measurements must know it; what it does not say is Triton's default."""
    text = (repository / RECONSTRUCT.name / "config.pbtxt").read_text()

    def find(pattern: str, default: int) -> int:
        found = re.search(pattern, text)
        return int(found[1]) if found else default

    return Served(
        find(r'"intra_op_thread_count" value \{ string_value: "(\d+)"', 1),
        find(r"instance_group \[ \{ count: (\d+)", 1),
        find(r"max_queue_size: (\d+)", 0),
        find(r"default_timeout_microseconds: (\d+)", 0) / 1e3,
    )


@dataclass(frozen=True)
class _Course:
    """A running server, the ways to it, and the files in this process."""

    repository: Path
    server: Server
    clients: dict[str, Client]
    config: Served
    seconds: float
    overload_s: float
    say: Say

    def row(
        self, case: str, implementation: str, rival: str, times: tuple[list[float], list[float]], **facts: Any
    ) -> Row:
        cuts = np.percentile(times[0], PERCENTILES)
        facts |= {f"p{cut}_ms": round(float(value), 4) for cut, value in zip(PERCENTILES, cuts, strict=True)}
        facts |= {"served_threads": self.config.threads, "instances": self.config.instances, "pass": "forward"}
        facts |= {"runtime": self.server.runtime}
        return make_record(bench="serve", case=case, implementation=implementation, rival=rival, times=times, **facts)

    def ways(self, crop: np.ndarray, callers: int) -> dict[str, Callable[[], Sequence[np.ndarray]]]:
        """What one of so many callers does: a request of his own, or with the others' as `Client.map` does it."""
        (first, memory), (second, wire), *_ = self.clients.items()
        batcher = Batcher(memory._ask_heads, memory.max_batch, callers)
        return {
            f"{first}, map": lambda: batcher.ask(crop, Deadline(memory.deadline_s)),
            first: functools.partial(memory._infer, crop),
            second: functools.partial(wire._infer, crop),
        }


@contextmanager
def _serve(repository: Path, seconds: float, overload_s: float, say: Say) -> Iterator[_Course]:
    with ExitStack() as stack:
        say(f"starting a server over {repository}")
        server = stack.enter_context(Server(repository))
        never = Retry(attempts=1)
        clients = {
            "sdk, gRPC with shared memory": Client(
                server.url, retry=never, shared_memory="on", admin=server.admin_header
            ),
            "sdk, gRPC": Client(server.url, retry=never, shared_memory="off"),
            "sdk, HTTP": Client(server.http_url, retry=never, shared_memory="off"),
        }
        for client in clients.values():
            stack.enter_context(client)
        yield _Course(repository, server, clients, read_config(repository), seconds, overload_s, say)


def _draw(count: int) -> np.ndarray:
    return np.random.default_rng(_SEED).integers(0, 256, (count, *CROP.shape), dtype=np.uint8)


def open_here(repository: Path, threads: int) -> Callable[[np.ndarray], list[np.ndarray]]:
    """The network in this process: crops (B, 112, 112, 3) uint8 to what `reconstruct` answers.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError("onnxruntime is not installed: pip install 'chebface[server]'") from error
    path, options = find_model(repository, RECONSTRUCT.name), onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # as served: it loses on a busy core
    if (library := path.with_name(OPERATORS)).is_file():
        options.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [tensor.name for tensor in RECONSTRUCT.outputs]
    return lambda crops_u8: session.run(names, {CROP.name: crops_u8})


def _compare(name: str, found: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> dict[str, Any]:
    error = max(float(np.abs(one - other).max()) for one, other in zip(found, wanted, strict=True))
    return check(name, error, LIMIT)


def _latency(course: _Course) -> Iterator[Row]:
    crop, here = _draw(1), open_here(course.repository, course.config.threads)
    wanted = here(crop)
    checks = {name: _compare(name, client._infer(crop), wanted) for name, client in course.clients.items()}
    sides: dict[str, Callable[[], Any]] = {
        name: functools.partial(client._infer, crop) for name, client in course.clients.items()
    }
    times = take_turns({HERE: functools.partial(here, crop)} | sides, course.seconds * (1 + len(sides)))
    for name in sides:
        added_ms = round(float(np.median(times[name]) - np.median(times[HERE])), 3)
        facts = {"batch": 1, "threads": course.config.threads, "check": checks[name], "added_ms": added_ms}
        yield course.row("reconstruct", name, HERE, (times[name], times[HERE]), **facts)


def _throughput(course: _Course, concurrencies: Sequence[int]) -> Iterator[Row]:
    cores = len(os.sched_getaffinity(0))
    here = open_here(course.repository, cores)
    analyzer = _find_analyzer(course.say)
    most = 0.0
    for count in concurrencies:
        offline = functools.partial(here, _draw(count))
        facts = {"concurrency": count, "batch": count, "threads": cores}
        for name, ask in course.ways(_draw(count)[-1:], count).items():
            row = _load(course, ask, name, count, offline, facts)
            most = max(most, row["faces_per_s"])
            yield row
        if analyzer:
            yield _analyze(course, offline, facts, analyzer, concurrency=count)
    if analyzer:
        offline = functools.partial(here, _draw(8))
        for load in LOADS:
            facts = {"batch": 8, "threads": cores}
            yield _analyze(course, offline, facts | {"load": load}, analyzer, rate=load * most)


def _load(
    course: _Course,
    ask: Callable[[], Sequence[np.ndarray]],
    name: str,
    count: int,
    offline: Callable[[], list[np.ndarray]],
    facts: Row,
) -> Row:
    """One count of callers; pieces of it and of offline batches in turns, so that a busy neighbour slows both."""
    checked = _compare(name, ask(), [array[-1:] for array in offline()])
    closed_loop(ask, count, 0.3)
    ours: list[Answers] = []
    theirs: list[float] = []
    meters: list[dict[str, float]] = []
    meter = Meter(course.server)
    for _ in range(PIECES):
        theirs += take_turns({"": offline}, course.seconds / PIECES / 3)[""]
        meter.start()
        ours.append(closed_loop(ask, count, course.seconds / PIECES))
        meters.append(meter.read())
    rates = [piece.per_s for piece in ours]
    facts = facts | {"check": checked} | {key: round(float(np.mean([m[key] for m in meters])), 3) for key in meters[0]}
    latencies = [each for piece in ours for each in piece.served_ms]
    row = course.row("throughput", name, f"{HERE}, batches of {facts['batch']}", (latencies, theirs), **facts)
    mean = float(np.mean(rates))
    unstable = any(abs(rate - mean) > STABLE * mean for rate in rates)
    return row | _compare_rates(mean, facts["batch"], theirs) | {"unstable": unstable}


def _compare_rates(per_s: float, batch: int, theirs_ms: Sequence[float]) -> Row:
    rival = 1e3 * batch / float(np.median(theirs_ms))
    return {"faces_per_s": round(per_s, 2), "rival_faces_per_s": round(rival, 2), "ratio": round(per_s / rival, 3)}


def _find_analyzer(say: Say) -> Analyzer | None:
    try:
        return fetch_analyzer()
    except ChebfaceError as error:
        say(f"note: no rows of perf_analyzer: {error}")
        return None


def _analyze(course: _Course, offline: Callable[[], Any], facts: Row, analyzer: Analyzer, **wish: Any) -> Row:
    """A row by perf_analyzer; offline batches run before and after it."""
    meter = Meter(course.server)
    name = "perf_analyzer" + (", Poisson" if "rate" in wish else "") + ", gRPC with shared memory"
    theirs = take_turns({"": offline}, course.seconds / 6)[""]
    meter.start()
    found = analyzer.run(course.server, seconds=course.seconds, **wish)
    spent = meter.read()
    theirs += take_turns({"": offline}, course.seconds / 6)[""]
    rival = f"{HERE}, batches of {facts['batch']}"
    row = course.row("throughput", name, rival, ([found["p50_ms"]], theirs), **facts, **spent)
    del row["rounds"]
    row |= {key: round(found[key], 4) for key in ("p50_ms", "p90_ms", "p95_ms", "p99_ms", "delayed")}
    return row | _compare_rates(found["faces_per_s"], facts["batch"], theirs) | {"unstable": found["unstable"]}


def _overload(course: _Course) -> Iterator[Row]:
    name = "sdk, gRPC"
    crops, config = _draw(FACES), course.config
    ask = functools.partial(course.clients[name]._infer, crops)
    calm = closed_loop(ask, 1, course.seconds)
    capacity = closed_loop(ask, MAX_BATCH // FACES, course.seconds).per_s
    calm_p99 = float(np.percentile(calm.served_ms, 99))
    allowed = SERVED * calm_p99 + (config.queue_timeout_ms or float("inf"))
    meter = Meter(course.server)
    unloaded_mb = meter.memory_mb()
    rate, callers = OVERLOAD * capacity / FLOODERS, (CALLERS + config.queue_size) // FLOODERS
    with ProcessPoolExecutor(FLOODERS, mp_context=multiprocessing.get_context("spawn")) as processes:

        def flood(seconds: float) -> list[Future[Answers]]:
            url = course.server.url
            return [processes.submit(_flood, url, rate, seconds, callers, seed) for seed in range(FLOODERS)]

        wait(flood(SETTLE_S))
        before = meter.memory_mb()
        meter.start()
        course.say(f"{OVERLOAD:g} times {FACES * capacity:.0f} faces/s for {course.overload_s:g} s")
        floods = flood(course.overload_s)
        middle = _sample(meter, floods) or [before]
        answers = Answers.join([each.result() for each in floods])
    spent, half = meter.read(), middle[len(middle) // 2]
    if not answers.served_ms:
        raise ServerError(f"overload: nothing was served; {len(answers.failed)} failed: {answers.failed[:1]}")
    total = len(answers.served_ms) + len(answers.refused_ms) + len(answers.failed)
    refused_p99 = float(np.percentile(answers.refused_ms, 99)) if answers.refused_ms else 0.0
    row = course.row("overload", name, "unloaded", (answers.served_ms, calm.served_ms), batch=FACES, threads=1)
    served_p99 = float(row["p99_ms"])
    yield row | {
        "seconds": course.overload_s,
        "load": round(answers.per_s / capacity, 2),  # what came of OVERLOAD
        "requests": total,
        "served": len(answers.served_ms),
        "refused": len(answers.refused_ms),
        "failed": len(answers.failed),
        "ratio": round(len(answers.served_ms) / course.overload_s / capacity, 3),  # of the capacity still served
        "unloaded_p99_ms": round(calm_p99, 3),
        "queue_limit_ms": config.queue_timeout_ms,
        "queue_size": config.queue_size,
        "allowed_ms": round(allowed, 1),
        "refused_p50_ms": round(float(np.median(answers.refused_ms)), 3) if answers.refused_ms else 0.0,
        "refused_p99_ms": round(refused_p99, 3),
        "late_p99_ms": round(float(np.percentile(answers.late_ms, 99)), 3),  # the callers' own: they share the cores
        "memory_mb_unloaded": unloaded_mb,
        "memory_mb_before": before,
        "memory_mb_half": half,
        "memory_mb_most": max(before, *middle),
        "memory_mb_after": spent["memory_mb"],
        "server_cores": spent["server_cores"],
        "unstable": answers.per_s < 0.8 * OVERLOAD * capacity,
        "passed": served_p99 <= allowed
        and refused_p99 < REFUSED_MS
        and not answers.failed
        and spent["memory_mb"] <= FLAT * half,
    }


def _sample(meter: Meter, loads: Sequence[Future[Answers]]) -> list[float]:
    """The server's memory every now and then, until the loads are over."""
    found = []
    while wait(loads, timeout=2.0).not_done:
        found.append(meter.memory_mb())
    return found


def _flood(url: str, rate: float, seconds: float, callers: int, seed: int) -> Answers:
    crops = _draw(FACES)
    with Client(url, retry=Retry(attempts=1), shared_memory="off") as client:
        client._infer(crops)
        return open_loop(functools.partial(client._infer, crops), rate, seconds, callers, seed)


def _peer(repository: Path, work: Path, folder: Path, seconds: float, say: Say) -> Iterator[Row]:
    import torch

    from bench import latency
    from chebface import checkpoint
    from chebface.flame import Flame
    from chebface.heads import open_head
    from chebface.regressor import normalize_crop

    cores = len(os.sched_getaffinity(0))
    head, regressor = open_head(), checkpoint.load_regressor()[0]
    course = latency._Course(work, folder, head, (1,), cores, seconds)
    crops = latency._paint(head, range(latency._CHECKED))
    with latency._use_threads(cores), torch.no_grad():
        smplx = latency._open_smplx(course, 1)

        def loop(crop: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                return smplx(regressor(normalize_crop(torch.from_numpy(crop))))

        wanted = Flame(head).decode(regressor(normalize_crop(torch.from_numpy(crops))))[0].numpy()
        each = np.concatenate([loop(crops[k : k + 1]).copy() for k in range(len(crops))])
        latency._check_mm("peer", each, wanted, latency.SMPLX_MM)
        own = ("--operators", "native", "--basis", "fixed")
        for precision, options, limits in (("fp32", (), latency.FLOAT_MM), ("int8", own, latency.INT8_MM)):
            say(f"exporting the demo weights in {precision}")
            where = folder / precision
            exported = course.export("--checkpoint", str(checkpoint.DEMO), "--precision", precision, *options)
            _fill(exported, where, read_config(repository).instances)
            with _serve(where, seconds, 0.0, say) as served:
                name, client = next(iter(served.clients.items()))
                found = np.concatenate([client._infer(crops[k : k + 1])[1].copy() for k in range(len(crops))])
                checked = latency._check_mm(f"{precision}, served", found, wanted, limits)
                crop = crops[:1]
                sides: dict[str, Callable[[], Any]] = {
                    "ours": functools.partial(client._infer, crop),
                    "peer": functools.partial(loop, crop),
                }
                times = take_turns(sides, seconds)
                rates = []
                theirs: list[float] = []
                for _ in range(PIECES):
                    rates.append(closed_loop(sides["ours"], 8, seconds / PIECES).per_s)
                    theirs += take_turns({"": sides["peer"]}, seconds / PIECES / 3)[""]
                per_s, rival = float(np.mean(rates)), 1e3 / float(np.median(theirs))
                facts = {"precision": precision, "batch": 1, "threads": cores, "check": checked, "concurrency": 8}
                row = served.row(
                    "peer",
                    f"{name}, {precision}{' and own decode' if options else ''}",
                    "torch + smplx",
                    (times["ours"], times["peer"]),
                    **facts,
                )
                yield row | {
                    "faces_per_s": round(per_s, 2),
                    "rival_faces_per_s": round(rival, 2),
                    "throughput_ratio": round(per_s / rival, 2),
                    "unstable": any(abs(rate - per_s) > STABLE * per_s for rate in rates),
                }


def _fill(exported: Path, repository: Path, instances: int) -> None:
    command = [sys.executable, "-m", "export", "repository", "-o", str(exported), "--repository", str(repository)]
    command += ["--target", "pip"]  # which takes our operators, too
    done = subprocess.run(
        [*command, "--instances", str(instances)], cwd=_ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ChebfaceError(f"export repository: {done.stderr.strip()[-500:]}")


def spell(row: Row) -> str:
    """A row in one line."""
    what = f"{row['case']}, {row['implementation']}"
    if "concurrency" in row:
        what += f", {row['concurrency']} at once"
    elif row["case"] == "throughput":
        what += f", load {row['load']:g}"
    parts = [f"p50 {row['p50_ms']:.2f}, p99 {row['p99_ms']:.2f} ms, {row['ratio']:.2f}x {row['rival']}"]
    parts += [f"{row['added_ms']:+.2f} ms"] if "added_ms" in row else []
    parts += [f"{row['throughput_ratio']:.2f}x its throughput"] if "throughput_ratio" in row else []
    if row["case"] == "overload":
        parts.append(
            f"load {row['load']:g}: {row['served']} served (p99 allowed {row['allowed_ms']:.0f} ms), {row['refused']} "
            f"refused (p99 {row['refused_p99_ms']:.1f} ms), {row['failed']} failed, memory "
            f"{row['memory_mb_before']:.0f} -> {row['memory_mb_half']:.0f} -> {row['memory_mb_after']:.0f} MB"
        )
    return f"{what}: {'; '.join(parts)}{' (unstable)' if row.get('unstable') else ''}"


def make_table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table."""
    head = ("case", "by", "at once", "ratio", "against", "added ms", "p50", "p90", "p95", "p99 ms", "queue", "compute")
    lines = [head, ("---",) * len(head)]
    for row in rows:
        load = str(row["concurrency"]) if "concurrency" in row else f"load {row['load']:g}" if "load" in row else "1"
        times = [f"{row[f'p{cut}_ms']:.2f}" for cut in PERCENTILES]
        ratio = f"{row['ratio']:.2f}" + (f", {row['throughput_ratio']:.2f}" if "throughput_ratio" in row else "")
        added = f"{row['added_ms']:+.2f}" if "added_ms" in row else ""
        shares = [f"{row[key]:.0%}" if key in row else "" for key in ("queue_share", "compute_share")]
        unstable = " (unstable)" if row.get("unstable") else ""
        lines.append((row["case"], row["implementation"], load + unstable, ratio, row["rival"], added, *times, *shares))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(rows: Sequence[Row], folder: str | Path) -> list[Path]:
    """Plots of the case throughput, latency over what is served at it, a file for each way; and of the overload.

    Returns:
        The files, PNG.
    """
    from chebface.files import whole
    from chebface.render.chart import bars, stack

    pictures = {}
    loads: dict[str, list[Row]] = {}
    for row in rows:
        if row["case"] == "throughput":
            loads.setdefault(row["implementation"], []).append(row)
        if row["case"] == "overload":
            values = {key: row[f"{key}_ms"] for key in ("unloaded_p99", "p50", "p99", "allowed", "refused_p99")}
            title = f"Overload, {row['load']:g} times the capacity, {row['seconds']:g} s: ms"
            memory = {key: row[f"memory_mb_{key}"] for key in ("before", "half", "most", "after")}
            pictures["overload"] = stack(
                [
                    bars(title, list(values), {"ms": list(values.values())}, log=True),
                    bars("Memory of the server: MB", list(memory), {"MB": list(memory.values())}),
                ]
            )
    for name, group in loads.items():
        at = [f"{row['concurrency']} at once" if "concurrency" in row else f"load {row['load']:g}" for row in group]
        over = [f"{row['faces_per_s']:.0f}/s" for row in group]
        latency = {f"p{cut}": [row[f"p{cut}_ms"] for row in group] for cut in PERCENTILES}
        shares = {key: [row[f"{key}_share"] for row in group] for key in ("queue", "compute")}
        pictures[re.sub(r"\W+", "-", name.lower())] = stack(
            [
                bars(f"{name}: latency, ms, over faces per second", over, latency),
                bars("faces per second against offline batches", at, {"ratio": [row["ratio"] for row in group]}),
                bars("where requests spent their time in the server: share", at, shares),
            ]
        )
    paths = []
    for name, picture in pictures.items():
        path = Path(folder) / f"{name}.png"
        with whole(path) as partial:
            picture.save(partial, "PNG")
        paths.append(path)
    return paths
