"""Score a folder of predictions: every image a pair of scan and mesh, each kept when done, then the numbers of all.

A report folder holds settings.json (what was asked), pairs/<subject>/<challenge>/<image>.npz (one per scored image, the
unit of resuming), summary.json, and what the official tool leaves, under its names and in its layout:
<method>[_metrical]_computed_distances[_<challenge>].npy and the same with .meanmedian behind it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from chebface import __version__
from chebface.errors import AssetError, ChebfaceError, InputError, MissingDependencyError
from chebface.files import whole, write_whole
from chebface.now import metric
from chebface.now.dataset import (
    UNITS_MM,
    Dataset,
    LandmarkSource,
    Scan,
    Shot,
    check_unit,
    detect_unit,
    find_extra,
    find_prediction,
    read_prediction,
    read_scan,
)

FORMAT = 1
SETTINGS, SUMMARY, PAIRS = "settings.json", "summary.json", "pairs"
ERRORS = ("distances_mm", "kept")  # of a pair
_CHUNK = 4  # images of one subject that go to a process together where there are few subjects
_MANY = 5  # files that a message names
_FREE = {"challenges"}  # settings that may differ between runs into one folder
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "IGL_NUM_THREADS")
Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Task:
    """What a process needs to score images."""

    dataset: Dataset
    predictions: Path
    output: Path
    source: LandmarkSource
    metrical: bool
    unit: str | None
    threads: int = 0  # of one fit; 0: as many as there are cores


def score(
    predictions: str | Path,
    dataset: Dataset,
    output: str | Path,
    source: LandmarkSource,
    *,
    method: str = "chebface",
    metrical: bool = False,
    unit: str | None = None,
    jobs: int = 1,
    allow_missing: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score every image of a benchmark, and write a report folder.

    Args:
        predictions: <subject>/<challenge>/<image>.obj or .ply.
        dataset: from `open_dataset`.
        output: the report folder; finished pairs in it are kept if their files and the settings are the same.
        source: from `landmark_source`.
        method: names the files in the official layout.
        metrical: score at the size that was predicted, instead of fitting the scale.
        unit: of the predictions: m, dm, cm or mm. None detects it, with a warning, where it counts (metrical).
        jobs: processes.
        allow_missing: end well with missing, extra or unreadable predictions; they are counted all the same.
        progress: called with images done and in all.

    Returns:
        summary.json: median_mm, mean_mm, std_mm, vertices, images of "all" and each challenge; missing, extra,
        unreadable, warnings.

    Raises:
        InputError: an argument that cannot be.
        AssetError: missing, extra or unreadable predictions (unless allowed; the summary is written first), none that
            can be scored, or the folder holds a run with other settings.
    """
    folder, output = Path(predictions), Path(output)
    if jobs < 1:
        raise InputError(f"jobs: expected 1 or more, got {jobs}")
    if unit is not None and unit not in UNITS_MM:
        raise InputError(f"unit: expected one of {', '.join(UNITS_MM)}, got {unit!r}")
    if not method or not method.isprintable() or Path(method).name != method:
        raise InputError(f"method: expected what can be part of a file's name, got {method!r}")
    if not folder.is_dir():
        raise AssetError(f"predictions {folder}: no such folder; expected <subject>/<challenge>/<image>.obj in it")
    missing = [shot for shot in dataset.asked if find_prediction(folder, shot) is None]
    there = [shot for shot in dataset.asked if shot not in missing]
    extra = find_extra(folder, dataset)
    warnings: list[str] = []
    if metrical and unit is None:
        unit = _detect_unit(folder, there, source)
        warnings.append(f"unit: not declared; the size of the first mesh says {unit}")
    _keep_settings(
        output,
        {
            "format": FORMAT,
            "version": __version__,
            "benchmark": dataset.benchmark,
            "method": method,
            "dataset": dataset.folder.resolve().name,
            "dataset_folder": str(dataset.folder.resolve()),
            "predictions_folder": str(folder.resolve()),
            "challenges": list(dataset.challenges),
            "metrical": metrical,
            "radius": dataset.layout.radius,
            "unit": unit,
            "landmarks": source.name,
        },
    )
    for shot in missing:
        pair_path(output, shot).unlink(missing_ok=True)
    task = Task(dataset, folder, output, source, metrical, unit, threads=int(jobs > 1))
    errors = {}
    for done, (shot, error) in enumerate(_score_all(task, there, jobs), 1):
        if error:
            errors[shot.line] = error
        if progress:
            progress(done, len(there))
    scored = [shot for shot in there if shot.line not in errors]
    if mirrored := [shot.line for shot in scored if _is_mirrored(pair_path(output, shot))]:
        warnings.append(f"{_list(mirrored)}: the landmarks fit better mirrored, and so they are; check x, y, z")
    trouble = missing or extra or errors
    complete = bool(scored) and (not trouble or allow_missing)
    summary = {
        "benchmark": dataset.benchmark,
        "method": method,
        "metrical": metrical,
        "radius": dataset.layout.radius,
        "unit": unit,
        "complete": complete,
        "challenges": _write_numbers(task, method, scored, official=complete),
        "missing": [shot.line for shot in missing],
        "extra": extra,
        "unreadable": [{"file": shot.line, "error": errors[shot.line]} for shot in there if shot.line in errors],
        "warnings": warnings,
        "commit": _commit(),
        "version": __version__,
    }
    _write_json(output / SUMMARY, summary)
    if not complete:
        raise AssetError(_complaint(folder, output, summary, bool(scored)))
    return summary


def pair_path(output: Path, shot: Shot) -> Path:
    """Where the result of an image lies."""
    return output / PAIRS / f"{shot.stem}.npz"


def read_distances(output: Path, shots: Iterable[Shot]) -> list[np.ndarray]:
    """The distances of scored images, each (S,) float32, mm.

    Raises:
        AssetError: a pair is missing or damaged.
    """
    return [read_pair(pair_path(output, shot), *ERRORS)["distances_mm"] for shot in shots]


def _score_all(task: Task, shots: list[Shot], jobs: int) -> Iterator[tuple[Shot, str]]:
    """Each image with its error, "" for none, in the order in which they are done."""
    groups = [list(same) for _, same in groupby(shots, lambda shot: shot.subject)]
    size = len(shots) if len(groups) >= 2 * jobs else _CHUNK  # with subjects enough, each scan is read once
    chunks = [group[k : k + size] for group in groups for k in range(0, len(group), size)]
    if jobs == 1 or len(chunks) < 2:
        yield from ((shot, score_one(task, shot)) for shot in shots)
        return
    with _pool(min(jobs, len(chunks))) as pool:
        futures = [pool.submit(_score_chunk, task, chunk) for chunk in chunks]
        try:
            for future in as_completed(futures):
                yield from future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


@contextmanager
def _pool(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Fresh processes of one thread each: the libraries read how many when they are loaded."""
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    try:
        # Not forked: the progress bar has a thread, and what it holds would be held for ever in the copy.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, context, initializer=_leave_interrupts) as pool:
            yield pool
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _leave_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to every process; the first one ends the others


def _score_chunk(task: Task, shots: list[Shot]) -> list[tuple[Shot, str]]:
    return [(shot, score_one(task, shot)) for shot in shots]


def score_one(task: Task, shot: Shot) -> str:
    """Score one image into its pair file, unless that is there already and its inputs are unchanged.

    Returns:
        What is wrong with its files, "" for nothing.
    """
    pair = pair_path(task.output, shot)
    try:
        path = find_prediction(task.predictions, shot)
        if path is None:
            raise AssetError(f"prediction {task.predictions / shot.stem}.obj: gone since the run began")
        files = task.dataset.scan_files(shot.subject)
        stamp = _stamp((*files, path, path.with_suffix(".npy"), path.with_suffix(".txt")))
        if pair.is_file() and _is_current(pair, stamp):
            return ""
        scan = _read_scan(*files, _stamp(files))
        prediction = read_prediction(path, task.source)
        if task.metrical and task.unit:
            check_unit(path, prediction.landmarks, task.unit)
        fit = metric.fit(
            scan.vertices,
            scan.landmarks,
            prediction.vertices,
            prediction.faces,
            prediction.landmarks,
            metrical=task.metrical,
            unit_mm=UNITS_MM[task.unit or "mm"],
            radius=task.dataset.layout.radius,
            threads=task.threads,
        )
    except MissingDependencyError:
        raise
    except ChebfaceError as error:
        pair.unlink(missing_ok=True)
        return str(error)
    with whole(pair) as partial, open(partial, "wb") as file:
        np.savez(
            file,
            distances_mm=fit.distances_mm.astype(np.float32),
            kept=fit.kept.astype(np.int32),
            scale=np.float64(fit.scale),
            rotation=np.asarray(fit.rotation, np.float64),
            translation_mm=np.asarray(fit.translation_mm, np.float64),
            cost=np.float64(fit.cost),
            start_cost=np.float64(fit.start_cost),
            stamp=np.array(stamp),
        )
    return ""


@lru_cache(maxsize=1)
def _read_scan(path: Path, marks: Path, stamp: str) -> Scan:
    return read_scan(path, marks)


def _stamp(files: Iterable[Path]) -> str:
    """Names, sizes and times of files: other files, another stamp. Those that are not there count as such."""
    states = ((path.name, path.stat()) for path in files if path.is_file())
    return " ".join(f"{name}:{state.st_size}:{state.st_mtime_ns}" for name, state in states)


def _is_current(pair: Path, stamp: str) -> bool:
    try:
        return str(read_pair(pair, "stamp")["stamp"]) == stamp
    except AssetError:
        return False


def read_pair(path: Path, *names: str) -> dict[str, np.ndarray]:
    """Arrays of a scored image: distances_mm and kept, (S,) each, cost, start_cost, scale, rotation, ...

    Raises:
        AssetError: damaged, or an array is missing.
    """
    try:
        # Opened here, since numpy leaves a damaged file open.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            pair = {name: archive[name] for name in names}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise AssetError(f"pair {path}: cannot be read ({error}); delete it and run the evaluation again") from error
    if set(ERRORS) <= pair.keys() and not 0 < pair["distances_mm"].size == pair["kept"].size:
        raise AssetError(f"pair {path}: has no distances, or not one each; delete it and run the evaluation again")
    return pair


def _is_mirrored(pair: Path) -> bool:
    return bool(np.linalg.det(read_pair(pair, "rotation")["rotation"]) < 0)


def _keep_settings(output: Path, settings: dict[str, Any]) -> None:
    """Write the settings of a new run, or see that those of the run in the folder are the same."""
    path = output / SETTINGS
    if path.is_file():
        try:
            before = dict(json.loads(path.read_bytes()))
        except (ValueError, TypeError) as error:
            raise AssetError(f"{path}: damaged ({error}); give another folder, or delete this one") from error
        keys = [key for key in {**before, **settings} if key not in _FREE and before.get(key) != settings.get(key)]
        if keys:
            changes = "; ".join(f"{key} was {before.get(key)!r}, is {settings.get(key)!r}" for key in keys)
            raise AssetError(f"{output}: holds a run with other settings ({changes}); give another folder")
    _write_json(path, settings)


def _detect_unit(folder: Path, shots: list[Shot], source: LandmarkSource) -> str | None:
    """The unit by the first mesh that can be read; None when there is none."""
    for shot in shots:
        path = find_prediction(folder, shot)
        try:
            landmarks = read_prediction(path, source).landmarks if path else None
        except ChebfaceError:
            continue  # it is named when its turn comes
        if landmarks is not None:
            return detect_unit(landmarks)
    return None


def _write_numbers(task: Task, method: str, scored: list[Shot], *, official: bool) -> dict[str, dict[str, Any]]:
    """The numbers of all images and of each challenge that has some; the official files, if official."""
    prefix = f"{method}_metrical" if task.metrical else method
    for old in sorted(task.output.glob("*_computed_distances*")):
        if old.name.startswith(f"{prefix}_computed_distances"):
            old.unlink()
    whole_benchmark = task.dataset.challenges == task.dataset.layout.challenges
    distances = dict(zip(scored, read_distances(task.output, scored), strict=True))
    numbers = {}
    for name in ("all", *task.dataset.challenges):
        shots = [shot for shot in scored if name in ("all", shot.challenge)]
        if not shots:
            continue
        pooled = np.concatenate([distances[shot] for shot in shots]).astype(np.float64)
        numbers[name] = metric.summarize(pooled) | {"images": len(shots)}
        if official and (name != "all" or whole_benchmark):
            asked = sum(name in ("all", shot.challenge) for shot in task.dataset.asked)
            path = task.output / f"{prefix}_computed_distances{'' if name == 'all' else f'_{name}'}.npy"
            write_official(path, shots, [distances[shot] for shot in shots], asked - len(shots))
    return numbers


def write_official(path: Path, shots: list[Shot], distances: list[np.ndarray], missing: int) -> None:
    """Write computed_distances.npy as the official tool does, and the .meanmedian beside it.

    The npy is a pickled dictionary: "computed_distances" a list of (S,) float64, mm; "num_missing_files"; "input_files"
    an array of lines. The .meanmedian is two lines, median and mean. Unlike there, the distances of an image stand in
    the order of the scan's vertices instead of shuffled, are float32 numbers in float64, and images of challenges that
    were not asked for do not count as missing.

    Args:
        path: ends in .npy.
        shots: the scored images.
        distances: of each, (S,) mm.
        missing: images without a score.

    Raises:
        OSError: the disk refuses.
    """
    arrays = [np.asarray(array, np.float64) for array in distances]
    content = {
        "computed_distances": arrays,
        "num_missing_files": missing,
        "input_files": np.array([shot.line for shot in shots]),
    }
    with whole(path) as partial, open(partial, "wb") as file:
        np.save(file, content, allow_pickle=True)  # type: ignore[arg-type]
    pooled = np.concatenate(arrays)
    write_whole(f"{path}.meanmedian", f"{float(np.median(pooled))}\n{float(np.mean(pooled))}\n".encode())


def _complaint(folder: Path, output: Path, summary: dict[str, Any], scored: bool) -> str:
    unreadable = [f"{each['file']}: {each['error']}" for each in summary["unreadable"]]
    parts = [
        f"{len(names)} {what} ({_list(names)})"
        for what, names in (("missing", summary["missing"]), ("extra", summary["extra"]), ("unreadable", unreadable))
        if names
    ]
    rest = "--allow-missing ends well with them" if scored else "nothing could be scored"
    return f"predictions {folder}: {'; '.join(parts)}; all are in {output / SUMMARY}; {rest}"


def _list(names: list[str]) -> str:
    return ", ".join(names[:_MANY]) + (f", and {len(names) - _MANY} more" if len(names) > _MANY else "")


def _commit() -> str:
    """The commit of the source tree that this runs from, "" when it is not one."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return ""
    return done.stdout.strip()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_whole(path, json.dumps(content, indent=1).encode() + b"\n")
