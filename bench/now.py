"""The NoW protocol against the benchmark's official code, on the same scans and meshes: numbers, costs, times.

The official code is brought by whoever runs this, installed as its own README says; here it is only called. The rows in
results/ had now_evaluation at 7bd1498, MPI-IS/mesh at 49e7042 and flame-fitting at ca806ce, under Python 3.8, numpy
1.19.5, scipy 1.5.4, chumpy 0.70 and CGAL 5.5.1.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.record import check, make_record
from chebface.errors import AssetError, MissingDependencyError
from chebface.mesh import read_obj
from chebface.now import metric, surface

AGREEMENT = 0.005  # of our median and mean with the official ones, relative
RIVAL_NAME = "official now_evaluation"
ROUNDS = 5  # of ours, for each of the official code
# Runs in the official code's own interpreter, which is older than ours.
_DRIVER = """
import sys, time
import numpy as np
checkout, given, into = sys.argv[1:]
sys.path.insert(0, checkout)
import scan2mesh_computations, scan2mesh_computations_metrical
pair = np.load(given)
scan = [pair[name] for name in ("scan_vertices", "scan_faces", "scan_landmarks")]
mesh = [pair[name] for name in ("vertices", "faces", "landmarks")]
metrical = str(pair["unit"]) != ""
module = scan2mesh_computations_metrical if metrical else scan2mesh_computations
began = time.perf_counter(), time.process_time()
distances = module.compute_errors(*scan, *mesh, *([str(pair["unit"])] if metrical else []))
ended = time.perf_counter(), time.process_time()
np.savez(into, distances=np.ravel(distances), wall=ended[0] - began[0], cpu=ended[1] - began[1])
"""


@dataclass(frozen=True, eq=False)
class Pair:
    """A scan in mm and a prediction in metres."""

    name: str
    scan_vertices: np.ndarray  # (V, 3) mm
    scan_faces: np.ndarray  # (K, 3)
    scan_landmarks: np.ndarray  # (7, 3) mm
    vertices: np.ndarray  # (N, 3) m
    faces: np.ndarray  # (M, 3)
    landmarks: np.ndarray  # (7, 3) m


def measure(official: Path, python: str, assets: Path | None = None) -> list[dict[str, Any]]:
    """Rows for every pair, non-metrical and metrical: both sides' numbers, costs and times.

    Args:
        official: a checkout of the official evaluation with what it needs beside it.
        python: the interpreter that it runs in.
        assets: a folder with FLAME Open and real scans; without it the built-in head is all there is.

    Raises:
        AssetError: the official code does not run.
        DisagreesError: medians or means differ by more than AGREEMENT, or our cost is above the official one.
    """
    if not (official / "scan2mesh_computations.py").is_file():
        raise AssetError(f"official code: no scan2mesh_computations.py in {official}; name its checkout")
    return [_measure_one(pair, metrical, official, python) for pair in pairs(assets) for metrical in (False, True)]


def pairs(assets: Path | None) -> Iterator[Pair]:
    """Scans made of a head (dense, noisy, turned, with holes and outliers), and real ones from the assets."""
    template, directions, faces, seven = _open_head() if assets is None else _flame_open(assets)
    dice = np.random.default_rng(0)
    people = [template + directions @ dice.standard_normal(directions.shape[2]) for _ in range(3)]
    still: _Motion = (1000.0, np.eye(3), np.zeros(3))
    for name, steps, truth, guess, motion in (
        ("dense, mean head", 2, people[0], template, still),
        ("dense, another person", 2, people[1], people[2], _any_motion(dice)),
        ("mean head", 1, people[2], template, _any_motion(dice)),
    ):
        points, triangles = _subdivide(truth, faces, steps)
        points = _place(points + 2e-4 * dice.standard_normal(points.shape), motion)
        marks = _place(seven(truth), motion)
        yield Pair(name, points, triangles, marks, guess, faces, seven(guess))
    points, triangles = _spoil(points, triangles, marks, dice)
    yield Pair("holes and outliers", points, triangles, marks, people[1], faces, seven(people[1]))
    other, other_faces = _subdivide(people[1], faces, 1)
    other = other + 1e-4 * dice.standard_normal(other.shape)
    yield Pair("another topology", points, triangles, marks, other, other_faces, seven(people[1]))
    if assets is None:
        return
    scan = read_obj(assets / "scans/meshmonk/target.obj")
    mask = read_obj(assets / "scans/meshmonk/floating.obj")
    marks, on_mask = _marks_on_both(scan.vertices, mask.vertices, template, faces, seven)
    yield Pair("real scan, registered mask", scan.vertices, scan.faces, marks, mask.vertices / 1e3, mask.faces, on_mask)
    yield Pair("real scan, mean head", scan.vertices, scan.faces, marks, template, faces, seven(template))
    yield Pair("real scan, a person", scan.vertices, scan.faces, marks, people[0], faces, seven(people[0]))


_Motion = tuple[float, np.ndarray, np.ndarray]  # scale, rotation (3, 3), translation (3,)
_Seven = Callable[[np.ndarray], np.ndarray]  # vertices (N, 3) -> the seven landmarks (7, 3)


def _measure_one(pair: Pair, metrical: bool, official: Path, python: str) -> dict[str, Any]:
    case = f"{pair.name}, {'metrical' if metrical else 'non-metrical'}"
    mesh = (pair.vertices, pair.faces, pair.landmarks)
    times: tuple[list[float], list[float]] = ([], [])
    used: list[float] = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter(), time.process_time()
        ours = metric.fit(pair.scan_vertices, pair.scan_landmarks, *mesh, metrical=metrical, unit_mm=1000.0)
        times[0].append((time.perf_counter() - began[0]) * 1e3)
        used.append(time.process_time() - began[1])
    del times[0][0], used[0]  # the first loads libigl
    theirs = _run_official(pair, metrical, official, python)
    times[1].append(theirs["wall"] * 1e3)
    mine, other = metric.summarize(ours.distances_mm), metric.summarize(theirs["distances"])
    cost = float(theirs["distances"] @ theirs["distances"])
    check(f"{case}: cost above the official one", ours.cost / cost - 1, 1e-9)
    error = max(abs(mine[name] / other[name] - 1) for name in ("median_mm", "mean_mm"))
    facts = {name: round(mine[name], 6) for name in ("median_mm", "mean_mm", "std_mm")}
    facts |= {f"rival_{name}": round(other[name], 6) for name in ("median_mm", "mean_mm", "std_mm")}
    return make_record(
        bench="now",
        case=case,
        implementation=surface.implementation(),
        rival=RIVAL_NAME,
        times=times,
        **{"pass": "forward", "batch": 1, "threads": len(os.sched_getaffinity(0))},
        check=check(case, error, AGREEMENT),
        vertices=int(mine["vertices"]),
        **facts,
        cost=round(ours.cost, 4),
        rival_cost=round(cost, 4),
        cpu_ratio=round(theirs["cpu"] / float(np.median(used)), 2),
    )


def _run_official(pair: Pair, metrical: bool, official: Path, python: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        given, into = Path(folder) / "pair.npz", Path(folder) / "answer.npz"
        fields = {name: value for name, value in vars(pair).items() if name != "name"}
        np.savez(given, unit=np.array("m" if metrical else ""), **fields)
        command = [python, "-c", _DRIVER, str(official.resolve()), str(given), str(into)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise MissingDependencyError(
                f"{python}: cannot be run ({error}); name the official code's Python"
            ) from error
        if done.returncode:
            raise AssetError(f"official code: failed on {pair.name}: {done.stderr.strip()[-500:]}")
        with np.load(into, allow_pickle=False) as answer:
            return {"distances": answer["distances"], **{name: float(answer[name]) for name in ("wall", "cpu")}}


def _open_head() -> tuple[np.ndarray, np.ndarray, np.ndarray, _Seven]:
    from chebface.heads import open_head

    head = open_head()
    chosen = np.array(metric.LANDMARKS_51) + 17
    corners, weights = head.faces[head.landmark_triangles[chosen]], head.landmark_barycentric[chosen]
    directions = np.moveaxis(head.shape_dirs[:60], 0, 2).astype(np.float64)
    return head.template.astype(np.float64), directions, np.asarray(head.faces), _make_seven(corners, weights)


def _flame_open(assets: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, _Seven]:
    chosen = list(metric.LANDMARKS_51)
    try:
        with np.load(assets / "flame_open/flame2023_open_id60.npz", allow_pickle=False) as model:
            template, directions, faces = model["v_template"], model["shapedirs"], model["faces"]
        with np.load(assets / "flame_topology/landmark_embedding.npz", allow_pickle=False) as marks:
            corners = faces[marks["static_lmk_faces_idx"][chosen]]
            weights = marks["static_lmk_bary_coords"][chosen]
    except OSError as error:
        raise AssetError(f"assets: {error}; name a folder with flame_open, flame_topology and scans") from error
    return template.astype(np.float64), directions.astype(np.float64), faces, _make_seven(corners, weights)


def _make_seven(corners: np.ndarray, weights: np.ndarray) -> _Seven:
    return lambda vertices: np.einsum("pk,pkc->pc", weights, vertices[corners])


def _any_motion(dice: np.random.Generator) -> _Motion:
    rotation, _ = np.linalg.qr(dice.standard_normal((3, 3)))
    return 1000.0, rotation * np.sign(np.linalg.det(rotation)), 50 * dice.standard_normal(3)


def _place(points: np.ndarray, motion: _Motion) -> np.ndarray:
    scale, rotation, translation = motion
    placed: np.ndarray = scale * points @ rotation.T + translation
    return placed


def _subdivide(vertices: np.ndarray, faces: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Each triangle into four, at the middles of its edges."""
    for _ in range(steps):
        edges = np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), 1)
        unique, where = np.unique(edges, axis=0, return_inverse=True)
        ab, bc, ca = (where.reshape(3, -1) + len(vertices)).astype(faces.dtype)
        a, b, c = faces.T
        vertices = np.concatenate([vertices, vertices[unique].mean(1)])
        faces = np.concatenate([np.stack(three, 1) for three in ((a, ab, ca), (b, bc, ab), (c, ca, bc), (ab, bc, ca))])
    return vertices, faces


def _spoil(
    points: np.ndarray, faces: np.ndarray, marks: np.ndarray, dice: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Three holes of 12 mm, and one vertex in fifty up to 30 mm off, as hair is."""
    centres = points[dice.choice(np.flatnonzero(_gap(points, marks) < 60), 3)]
    keep = _gap(points, centres) > 12
    far = dice.random(len(points)) < 0.02
    points = points + far[:, None] * 10 * dice.standard_normal(points.shape).clip(-3, 3)
    index = np.cumsum(keep) - 1
    return points[keep], index[faces[keep[faces].all(1)]]


def _gap(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    gap: np.ndarray = np.min([np.linalg.norm(points - other, axis=1) for other in others], axis=0)
    return gap


def _marks_on_both(
    scan: np.ndarray, mask: np.ndarray, template: np.ndarray, faces: np.ndarray, seven: _Seven
) -> tuple[np.ndarray, np.ndarray]:
    """The seven on a scan that has none: a head is laid into it, tip of the nose on tip of the nose, and refined.

    Returns:
        (7, 3) mm at vertices of the scan, (7, 3) m at vertices of the mask registered to it.
    """
    head = template * 1e3
    shift = scan[scan[:, 2].argmax()] - head[head[:, 2].argmax()]
    found = metric.fit(scan, seven(head) + shift, head, faces, seven(head))
    placed = _place(seven(head), (found.scale, found.rotation, found.translation_mm))
    on_scan, on_mask = (
        points[[np.linalg.norm(points - p, axis=1).argmin() for p in placed]] for points in (scan, mask)
    )
    return on_scan, on_mask / 1e3
