"""What every format of a model costs on this machine, beside what it computes: torch, onnxruntime, OpenVINO, our own
operators, TensorRT.

All are timed in turns, so that a busy neighbour slows all of them, and none whose answers are not within the limits of
its precision. Times are of one call, arrays in and arrays out; on a GPU the copies are in them.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import os
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chebface.errors import AssetError, ChebfaceError, ConfigError, InputError, MissingDependencyError
from chebface.files import write_whole
from chebface.signature import DECODE, ENCODE, MODELS, RECONSTRUCT, REGRESS, VERTICES_M, Model, Tensor
from export.engines import Batch, Log, find_compiler, open_engine, why_not_run
from export.folder import room
from export.parity import (
    DEVICES,
    HELD_OUT,
    SEED,
    Exam,
    ParityError,
    check_device,
    find_failures,
    make_crops,
    open_file,
    set_exam,
)
from export.precision import PRECISIONS
from export.to_engine import BATCH, build_engine
from export.to_onnx import Modules, export_onnx, open_modules

CASES = (RECONSTRUCT.name, REGRESS.name, DECODE.name, ENCODE.name)
REPORT = "benchmark.json"
TURN_S = 0.02  # that a side runs before it is another's turn
_FIRST_S = 0.01  # of the closing table's turns: many files, little time

Run = Callable[[np.ndarray], np.ndarray]
Say = Callable[[str], None]


@dataclass(frozen=True)
class _Format:
    """A row to be: what opens it, the files that it is, and whose limits it keeps."""

    name: str
    precision: str
    limits: str  # of LIMITS
    make: Callable[[], tuple[Run, list[Path], Mapping[str, float]]]  # runs, its files, what is known of its parity


class _NotRunError(ChebfaceError):
    """Made, but not for this machine to run."""

    def __init__(self, reason: str, files: Sequence[Path]) -> None:
        super().__init__(reason)
        self.files = files


def benchmark(
    output: str | Path,
    *,
    model: str = RECONSTRUCT.name,
    precisions: Sequence[str] = PRECISIONS,
    batch: int = 1,
    device: str = DEVICES[0],
    threads: int | None = None,
    seconds: float = 0.5,
    profile: Batch | Sequence[Batch] = BATCH,
    workspace_mb: int | None = None,
    force: bool = False,
    say: Say = lambda line: None,
    **wishes: Any,
) -> dict[str, Any]:
    """Export one model in every format and precision, prove each on held-out crops, and time them in turns.

    Args:
        output: folder of the exports, one folder each; what is up to date there stays. benchmark.json is written, too.
        model: of CASES; decode and encode are float32 whatever the precision is.
        precisions: some of PRECISIONS.
        batch: faces in a call.
        device: cpu or cuda, of torch and onnxruntime.
        threads: of torch, sessions and operators; None is torch's own number.
        seconds: of each row.
        profile, workspace_mb: of the engines, see `build_engine`.
        force: export and build anew.
        say: called with one line per step.
        wishes: checkpoint, head_name, encoder, opset, simplify, crops_for_calibration or calibration; see
            `export_onnx`.

    Returns:
        `model`, `batch`, `device`, `threads`, `crops`, `failed` and `rows`. A row has `format`, `precision`, `mb`;
        `mean_mm` and `max_mm`, or `descriptor_min_cosine`: the worse of what this runtime answered and what the export
        found (half precision is emulated there); `p50_ms`, and `ratio`, torch's over it; or `note`, why it was not
        timed. `failed` names rows beyond their limits.

    Raises:
        ConfigError: a model, precision, batch, device or count that cannot be had.
        AssetError: weights, encoder and head do not fit; encode of a head without encoder; no space left.
        MissingDependencyError: torch, onnx or onnxruntime is not installed, or cuda is not there.
    """
    _check_wishes(model, precisions, batch, threads, seconds)
    check_device(device)
    folder, case = Path(output), MODELS[model]
    asked = ("checkpoint", "head_name", "encoder")
    modules = open_modules(*(wishes.get(key) for key in asked), say=say)
    with _use_threads(threads) as count:
        say("making held-out crops, and torch's answers")
        crops, source = make_crops(modules.head, HELD_OUT, SEED)
        exam = set_exam(case, modules.regressor, modules.flame, modules.encoder, crops)
        shop = _Shop(folder, case, modules, batch, device, count, profile, workspace_mb, force, wishes, say)
        rows, runs = [], {}
        for each in shop.formats(precisions):
            say(f"{each.name} {each.precision}: opening and comparing")
            row, run = _open(each, exam, batch)
            rows.append(row)
            if run:
                runs[len(rows) - 1] = run
        say(f"timing {len(runs)} formats in turns, {seconds * len(runs):.0f} s")
        given = exam.given[_places(batch, batch)]
        times = race([functools.partial(run, given) for run in runs.values()], seconds * len(runs))
    medians = {place: statistics.median(each) for place, each in zip(runs, times, strict=True)}
    for place, median in medians.items():
        rows[place] |= {"p50_ms": round(median, 4), "ratio": round(medians[0] / median, 2)}
    report = {
        "model": model,
        "batch": batch,
        "device": device,
        "threads": count,
        "crops": {"count": len(crops), "source": source},
        "failed": [f"{row['format']} {row['precision']}" for row in rows if row.pop("failed", False)],
        "rows": rows,
    }
    with room(folder / REPORT):
        write_whole(folder / REPORT, json.dumps(report, indent=1).encode() + b"\n")
    return report


def time_files(
    folder: str | Path,
    files: Iterable[str],
    modules: Modules,
    *,
    batch: int = 1,
    device: str = DEVICES[0],
    seconds: float = 0.1,
) -> dict[str, dict[str, Any]]:
    """Each file of an export against torch, in turns: `p50_ms` and `ratio` by model name, or `note`, why not.

    Args:
        folder: of `python -m export onnx`, whose parity was just proven.
        files: model names.
        modules: what they were exported from.
        batch: faces in a call.
        device: cpu or cuda.
        seconds: of each file.
    """
    found: dict[str, dict[str, Any]] = {}
    with _use_threads(None) as count:
        crops = make_crops(modules.head, 1, SEED)[0]
        for name in [name for name in files if name in CASES]:
            exam = set_exam(MODELS[name], modules.regressor, modules.flame, modules.encoder, crops)
            given = exam.given[_places(batch, batch, 1)]
            try:
                run = _onnx_run(Path(folder) / f"{name}.onnx", exam.output, device, count)
                run(given)
            except AssetError as error:
                found[name] = {"note": _brief(error)}
                continue
            sides = [functools.partial(each, given) for each in (_torch_run(MODELS[name], modules, device), run)]
            theirs, ours = (statistics.median(each) for each in race(sides, 2 * seconds, _FIRST_S))
            found[name] = {"p50_ms": round(ours, 4), "ratio": round(theirs / ours, 2)}
    return found


def race(sides: Sequence[Callable[[], Any]], seconds: float, turn_s: float = TURN_S) -> list[list[float]]:
    """Milliseconds of every call of each side, at least five; they take turns until the time is over."""
    times: list[list[float]] = [[] for _ in sides]
    end = time.perf_counter() + seconds
    while sides and (time.perf_counter() < end or len(times[-1]) < 5):
        for side, into in zip(sides, times, strict=True):
            side()  # the others' threads and caches
            turn = time.perf_counter() + turn_s
            while True:
                began = time.perf_counter()
                side()
                ended = time.perf_counter()
                into.append((ended - began) * 1e3)
                if ended > turn:
                    break
    return times


def _check_wishes(model: str, precisions: Sequence[str], batch: int, threads: int | None, seconds: float) -> None:
    if model not in CASES:
        raise ConfigError(f"model: expected one of {', '.join(CASES)}, got {model!r}")
    if unknown := sorted(set(precisions) - set(PRECISIONS)) or not precisions:
        raise ConfigError(f"precision: expected some of {', '.join(PRECISIONS)}, got {unknown or 'none'}")
    for name, value in (("batch", batch), ("threads", 1 if threads is None else threads)):
        if value < 1:
            raise ConfigError(f"{name}: expected 1 at least, got {value}")
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"seconds: expected more than 0, got {seconds}")


@contextmanager
def _use_threads(count: int | None) -> Iterator[int]:
    """So many threads for torch and our operators, for a while; None is as many as torch takes."""
    import torch

    variable = "CHEBFACE_THREADS"
    before, torch_before = os.environ.get(variable), torch.get_num_threads()
    count = count or torch_before
    os.environ[variable] = str(count)
    torch.set_num_threads(count)
    try:
        yield count
    finally:
        torch.set_num_threads(torch_before)
        os.environ.pop(variable)
        if before is not None:
            os.environ[variable] = before


@dataclass(frozen=True)
class _Shop:
    """Where formats are made."""

    folder: Path
    model: Model
    modules: Modules
    batch: int
    device: str
    threads: int
    profile: Batch | Sequence[Batch]
    workspace_mb: int | None
    force: bool
    wishes: Mapping[str, Any]
    say: Say

    def formats(self, precisions: Sequence[str]) -> Iterator[_Format]:
        cast = self.model in (REGRESS, RECONSTRUCT)
        kept = [each for each in PRECISIONS if each in precisions] if cast else ["fp32"]
        yield _Format("torch", "fp32", "fp32", self._torch)
        for each in kept:
            yield _Format("onnxruntime", each, each, functools.partial(self._onnxruntime, each))
        if self.device == DEVICES[0]:
            if self.model is not REGRESS:
                yield _Format("native operators", "fp32", "fp32", functools.partial(self._native, "fp32"))
            if self.model is DECODE:
                yield _Format("native operators", "fixed basis", "fixed", functools.partial(self._native, "fixed"))
            for each in kept:
                yield _Format("OpenVINO", each, each, functools.partial(self._openvino, each))
        for each in kept:
            yield _Format("TensorRT", each, each, functools.partial(self._tensorrt, each))

    def _export(self, name: str, **changes: Any) -> tuple[Path, dict[str, Any]]:
        wishes = {**self.wishes, **changes}
        if wishes.get("precision", "fp32") != "int8":
            wishes = {key: value for key, value in wishes.items() if "calibration" not in key}
        folder = self.folder / name
        return folder, export_onnx(folder, device=self.device, force=self.force, say=self.say, **wishes)

    def _torch(self) -> tuple[Run, list[Path], Mapping[str, float]]:
        return _torch_run(self.model, self.modules, self.device), [], {}

    def _onnxruntime(self, precision: str) -> tuple[Run, list[Path], Mapping[str, float]]:
        folder, manifest = self._export(precision, precision=precision)
        path = folder / f"{self.model.name}.onnx"
        output = _output(self.model)
        run = _onnx_run(path, output.name, self.device, self.threads)
        return run, [path], manifest["parity"]["artefacts"].get(self.model.name, {})

    def _native(self, basis: str) -> tuple[Run, list[Path], Mapping[str, float]]:
        folder, manifest = self._export(f"native-{basis}", operators="native", basis=basis)
        path = folder / f"{self.model.name}.onnx"
        run = _onnx_run(path, _output(self.model).name, self.device, self.threads)
        return run, [path], manifest["parity"]["artefacts"].get(self.model.name, {})

    def _openvino(self, precision: str) -> tuple[Run, list[Path], Mapping[str, float]]:
        if importlib.util.find_spec("openvino") is None:
            raise MissingDependencyError("not installed: pip install openvino")
        import openvino

        folder, manifest = self._export(precision, precision=precision)
        path = folder / f"{self.model.name}.onnx"
        (given,), wanted = self.model.inputs, _output(self.model)
        # A CPU with bf16 would compute all in it, the head too: 0.4 mm.
        settings: dict[str, str | int] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        settings["INFERENCE_NUM_THREADS"] = self.threads
        core = openvino.Core()
        network = core.read_model(str(path))
        network.reshape({given.name: [self.batch, *given.shape]})
        request = core.compile_model(network, "CPU", settings).create_infer_request()

        def run(array: np.ndarray) -> np.ndarray:
            answers = request.infer({given.name: array}, share_inputs=True, share_outputs=True)
            answer: np.ndarray = answers[wanted.name]
            return answer

        return run, [path], manifest["parity"]["artefacts"].get(self.model.name, {})

    def _tensorrt(self, precision: str) -> tuple[Run, list[Path], Mapping[str, float]]:
        compiler = find_compiler()
        folder, manifest = self._export(precision, precision=precision)
        report = build_engine(
            folder / f"{self.model.name}.onnx",
            folder / "engines",
            batch=self.profile,
            workspace_mb=self.workspace_mb,
            force=self.force,
            say=self.say,
        )
        plan = folder / "engines" / report["engine"]["file"]
        if reason := why_not_run(compiler, report["architecture"]):
            raise _NotRunError(f"built with {compiler.title}; not run: {reason}", [plan])
        ranges = [(low, best, high) for low, best, high in report["settings"]["batch"]]
        engine, (given,), wanted = (
            open_engine(compiler, plan.read_bytes(), ranges, Log()),
            self.model.inputs,
            self.model,
        )
        known = manifest["parity"]["artefacts"].get(self.model.name, {})
        return lambda array: engine({given.name: array})[_output(wanted).name], [plan], known


def _open(each: _Format, exam: Exam, batch: int) -> tuple[dict[str, Any], Run | None]:
    """A row without its times, and what is to be timed, if it may."""
    row: dict[str, Any] = {"format": each.name, "precision": each.precision}
    try:
        run, files, known = each.make()
        row |= _size(files)
        places = _places(len(exam.given), batch)
        parts = [exam.given[places[first : first + batch]] for first in range(0, len(places), batch)]
        found = exam.grade(np.concatenate([run(part).copy() for part in parts])[: len(exam.given)])
    except _NotRunError as error:
        return row | _size(error.files) | {"note": str(error)}, None
    except ParityError as error:
        return row | {"note": f"not timed: {_brief(error)}", "failed": True}, None
    except InputError as error:
        return row | {"note": f"cannot be had: {_brief(error)}"}, None
    except (AssetError, MissingDependencyError, RuntimeError) as error:
        return row | {"note": f"not run: {_brief(error)}"}, None
    if each.name != "torch":
        row |= {key: (min if "cosine" in key else max)(value, known.get(key, value)) for key, value in found.items()}
    if failures := find_failures(exam.model.name, row, each.limits):
        return row | {"note": f"not timed: {'; '.join(failures)}", "failed": True}, None
    return row, run


def _places(count: int, batch: int, there: int | None = None) -> np.ndarray:
    """Indices of `count` items (of `there`), again from the first until the last batch is full."""
    full: np.ndarray = np.arange(-(-count // batch) * batch) % (there or count)
    return full


def _size(files: Sequence[Path]) -> dict[str, float]:
    size = sum(
        each.stat().st_size for path in files for each in (path, path.with_name(f"{path.name}.data")) if each.is_file()
    )
    return {"mb": round(size / 1e6, 1)} if files else {}


def _brief(error: BaseException) -> str:
    """The first line of what was the matter in the end."""
    while error.__cause__ is not None and not isinstance(error, ParityError | InputError | MissingDependencyError):
        error = error.__cause__
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error))
    line = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= 100 else f"{line[:97]}..."


def _output(model: Model) -> Tensor:
    """The output that is judged."""
    return VERTICES_M if model in (DECODE, RECONSTRUCT) else model.outputs[0]


def _onnx_run(path: Path, output: str, device: str, threads: int) -> Run:
    session = open_file(path, device=device, threads=threads)
    (given,) = session.get_inputs()
    names = [each.name for each in session.get_outputs()]

    def run(array: np.ndarray) -> np.ndarray:
        answers: list[np.ndarray] = session.run(names, {given.name: array})
        return answers[names.index(output)]

    return run


def _torch_run(model: Model, modules: Modules, device: str) -> Run:
    import torch

    from chebface.regressor import normalize_crop

    regressor: Any = copy.deepcopy(modules.regressor).to(device)
    flame = modules.flame.to(device)
    encoder: Any = copy.deepcopy(modules.encoder).to(device) if modules.encoder is not None else None

    @torch.no_grad()
    def run(array: np.ndarray) -> np.ndarray:
        given = torch.from_numpy(array).to(device)
        if model is ENCODE:
            answer = encoder.encode(given)
        elif model is DECODE:
            answer = flame.decode(given)[0]
        else:
            answer = regressor(normalize_crop(given))
            if model is RECONSTRUCT:
                answer = flame.decode(answer)[0]
        made: np.ndarray = answer.cpu().numpy()
        return made

    return run
