"""The NoW protocol for one scan and one predicted mesh: crop, seven landmarks, refinement, distances to the surface.

The definition is the evaluation code of the NoW benchmark (Sanyal, Bolkart, Feng and Black, "Learning to Regress 3D
Face Shape and Expression From an Image Without 3D Supervision", CVPR 2019), in both of its forms: non-metrical, where a
similarity is found, and metrical, where the prediction's unit is trusted and only a rigid motion is found. Start and
cost are the official ones; the minimum is sought further down than the official optimiser goes, which stops as soon as
one step gains less than 0.01 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from chebface.errors import InputError
from chebface.now.surface import Cloud, Linear, Pose, Surface, check_points, lengths

NOW_RADIUS, STIRLING_RADIUS = 1.4, 1.2  # of the crop, in units of the mean of the two lengths of `crop_scan`
# Right outer and inner eye corner, left inner and outer, nose bottom, right and left mouth corner: the seven among the
# 51 inner points (the usual 68 without the first 17).
LANDMARKS_51 = (19, 22, 25, 28, 16, 31, 37)

_COARSE = 2000  # scan vertices of the first refinement
_WORTH = 3  # times as many there have to be for it to be worth while
_GAIN = 1e-9  # of the cost: what no further step is made for
_TRIES = 200  # steps, taken or refused; about ten is usual
_PART = 20  # one of as many vertices is looked at first
_OFF = 0.5  # landmarks may be as far from their mesh as half of their own spread


@dataclass(frozen=True, eq=False)
class Fit:
    """A prediction aligned with a scan, and what is left between them: scan ~ scale * rotation @ v + translation_mm."""

    distances_mm: np.ndarray  # (S,) float64, unsigned, from each kept scan vertex to the aligned surface
    kept: np.ndarray  # (S,) int64, the scan vertices inside the crop, ascending
    scale: float  # mm per unit of the prediction
    rotation: np.ndarray  # (3, 3); see `mirrored`
    translation_mm: np.ndarray  # (3,)
    cost: float  # sum of squared distances after refinement, mm^2
    start_cost: float  # the same where refinement started

    @property
    def mirrored(self) -> bool:
        """Whether `rotation` is a reflection: the official Procrustes takes one where the landmarks fit better so."""
        return float(np.linalg.det(self.rotation)) < 0


def crop_scan(scan_vertices: np.ndarray, landmarks_mm: np.ndarray, radius: float = NOW_RADIUS) -> np.ndarray:
    """Find the scan vertices that count: those inside a sphere around the face.

    With bridge the middle between the inner eye corners, the centre is nose + 0.3 (bridge - nose), and the sphere's
    radius `radius` * (|outer eye corners| + |bridge - nose|) / 2.

    Args:
        scan_vertices: (V, 3) mm.
        landmarks_mm: (7, 3) of the scan, in the order of LANDMARKS_51.
        radius: NOW_RADIUS or STIRLING_RADIUS.

    Returns:
        (S,) int64, ascending.

    Raises:
        InputError: wrong shapes, numbers that are not finite, or nothing inside.
    """
    vertices = check_points("scan_vertices", scan_vertices)
    landmarks = _check_landmarks("landmarks_mm", landmarks_mm)
    if not (np.isfinite(radius) and radius > 0):
        raise InputError(f"radius: expected a positive number, {NOW_RADIUS} for NoW, got {radius}")
    right, left, nose = landmarks[0], landmarks[3], landmarks[4]
    bridge = (landmarks[1] + landmarks[2]) / 2
    centre = nose + 0.3 * (bridge - nose)
    reach = radius * (np.linalg.norm(right - left) + np.linalg.norm(bridge - nose)) / 2
    kept = np.flatnonzero(lengths(vertices - centre) <= reach)
    if not len(kept):
        away = lengths(vertices - centre).min()
        raise InputError(
            f"landmarks_mm: no scan vertex within {reach:.4g} mm of the face's centre, the nearest is {away:.4g} mm "
            "away; check that landmarks and scan belong together and are both in mm"
        )
    return kept


def fit(
    scan_vertices_mm: np.ndarray,
    scan_landmarks_mm: np.ndarray,
    vertices: np.ndarray,
    faces: np.ndarray,
    landmarks: np.ndarray,
    *,
    metrical: bool = False,
    unit_mm: float = 1.0,
    radius: float = NOW_RADIUS,
    start: Literal["official", "rigid"] = "official",
    threads: int = 0,
) -> Fit:
    """Align a predicted mesh with a scan, and measure what is left.

    The start is Procrustes, with scale, on the seven landmarks. From there the sum over the kept scan vertices of the
    squared distance to the nearest point of the surface is brought to a minimum: over scale, rotation and translation,
    or, metrical, over rotation and translation with the scale held at `unit_mm`.

    Args:
        scan_vertices_mm: (V, 3); they need no faces.
        scan_landmarks_mm: (7, 3), in the order of LANDMARKS_51.
        vertices: (N, 3) of the prediction, any unit.
        faces: (M, 3) int.
        landmarks: (7, 3) on the prediction, in its unit.
        metrical: trust the unit of the prediction.
        unit_mm: mm per unit of the prediction (1000 for metres); without `metrical` it plays no part.
        radius: of the crop, see `crop_scan`.
        start: where the metrical refinement starts. "official" takes rotation and translation from the Procrustes
            with scale although the scale is then `unit_mm`, as the official code does: when the two scales differ, the
            mesh starts beside the scan by their difference times the landmarks' distance from the prediction's origin.
            "rigid" lays the centroids of the landmarks on each other.
        threads: 0 for as many as this process may have; 1 where processes already share the work.

    Returns:
        The alignment and the distances.

    Raises:
        InputError: an argument has a wrong shape, value or unit, landmarks are not on their mesh, or the crop is empty.
        MissingDependencyError: there is neither a C++ compiler nor libigl.
    """
    if start not in ("official", "rigid"):
        raise InputError(f"start: expected 'official' or 'rigid', got {start!r}")
    if not (np.isfinite(unit_mm) and unit_mm > 0):
        raise InputError(f"unit_mm: expected a positive number, 1000 for metres, got {unit_mm}")
    scan = check_points("scan_vertices_mm", scan_vertices_mm)
    targets = _check_landmarks("scan_landmarks_mm", scan_landmarks_mm)
    sources = _check_landmarks("landmarks", landmarks)
    kept = crop_scan(scan, targets, radius)
    points = scan[kept]
    for part in (points[::_PART], scan):  # near some of the scan is near the scan
        gaps = np.array([lengths(part - target).min() for target in targets])
        if gaps.max() <= _OFF * _spread(targets):
            break
    _check_near("scan_landmarks_mm", targets, gaps, "scan")
    surface = Surface(vertices, faces, threads)
    _check_near("landmarks", sources, surface.nearest(sources)[2], "mesh")

    pose = _procrustes(targets, sources)
    if metrical:
        shift = pose.translation if start == "official" else targets.mean(0) - unit_mm * pose.rotation @ sources.mean(0)
        pose = Pose(float(unit_mm), pose.rotation, shift)
    start_cost, pose, end = _refine(surface, points, pose, scaling=not metrical)
    return Fit(end.distances, kept, pose.scale, pose.rotation, pose.translation, end.cost, start_cost)


def summarize(distances_mm: np.ndarray) -> dict[str, float]:
    """The benchmark's numbers for pooled distances.

    Args:
        distances_mm: (S,), of every vertex of every image together.

    Returns:
        median_mm, mean_mm, std_mm (of the whole, not a sample) and vertices.

    Raises:
        InputError: there are none, or one is not a finite number.
    """
    pooled = np.asarray(distances_mm, np.float64).ravel()
    if not len(pooled) or not np.isfinite(pooled).all():
        raise InputError(f"distances_mm: expected finite numbers, got {np.isfinite(pooled).sum()} among {len(pooled)}")
    return {
        "median_mm": float(np.median(pooled)),
        "mean_mm": float(pooled.mean()),
        "std_mm": float(pooled.std()),
        "vertices": len(pooled),
    }


def _procrustes(targets: np.ndarray, sources: np.ndarray) -> Pose:
    """The similarity that brings sources (P, 3) nearest to targets (P, 3) by least squares; it may mirror.

    Source: Schoenemann and Carroll, "Fitting one matrix to another under choice of a central dilation and a rigid
    motion", Psychometrika 35 (1970).
    """
    to, of = targets - targets.mean(0), sources - sources.mean(0)
    u, stretch, v = np.linalg.svd(to.T @ of)
    rotation, scale = u @ v, stretch.sum() / (of * of).sum()
    return Pose(float(scale), rotation, targets.mean(0) - scale * rotation @ sources.mean(0))


def _refine(surface: Surface, points: np.ndarray, start: Pose, *, scaling: bool) -> tuple[float, Pose, Linear]:
    """The cost at the start, the pose at the minimum, and what is there."""
    centre = points.mean(0)
    arm = float(np.sqrt(((points - centre) ** 2).sum(1).mean())) or 1.0
    cloud = Cloud(surface, points, centre, arm)
    pose, state, bend = start, cloud.linearize(start), np.zeros((7, 7))
    start_cost = state.cost
    stride = -(-len(points) // _COARSE)
    if stride >= _WORTH:  # most of the way with a part of the points: the rest is two or three steps with all of them
        some = cloud.thin(stride)
        near, _, guess = _descend(some, start, some.linearize(start), bend, scaling=scaling, gain=1e-4)
        found = cloud.linearize(near)
        if found.cost < start_cost:
            pose, state, bend = near, found, guess * (len(points) / len(some.points))
    pose, state, _ = _descend(cloud, pose, state, bend, scaling=scaling, gain=_GAIN)
    return start_cost, pose, state


def _descend(
    cloud: Cloud, pose: Pose, state: Linear, bend: np.ndarray, *, scaling: bool, gain: float
) -> tuple[Pose, Linear, np.ndarray]:
    """Levenberg-Marquardt, until a step promises less than `gain` of the cost.

    J^T J leaves out how the surface bends under the points; `bend` (7, 7) is what is learnt of it from each step's
    change of the gradient, by a symmetric correction of rank one.

    Source: Dennis, Gay and Welsch, "An adaptive nonlinear least-squares algorithm", ACM TOMS 7 (1981).
    """
    count = 7 if scaling else 6
    damping, step = 1e-6, np.zeros(7)
    for _ in range(_TRIES):
        gradient, plain = state.gradient[:count], state.normal[:count, :count]
        full = plain + bend[:count, :count]
        if np.linalg.eigvalsh(full - plain / 100)[0] <= 0:  # not a bowl: what was learnt does not hold here
            bend, full = np.zeros((7, 7)), plain
        damped = full + damping * (np.trace(plain) / count or 1.0) * np.eye(count)
        step[:count] = -np.linalg.solve(damped, gradient)
        promised = -step[:count] @ (2 * gradient + full @ step[:count])
        if promised <= gain * state.cost:
            break
        trial = pose.move(step, cloud.centre, cloud.arm)
        found = cloud.linearize(trial)
        missed = found.gradient - state.gradient - (found.normal + bend) @ step
        along = missed @ step
        if abs(along) > 1e-3 * np.linalg.norm(missed) * np.linalg.norm(step):
            bend = bend + np.outer(missed, missed) / along
        if found.cost < state.cost:
            pose, state, damping = trial, found, max(damping / 10, 1e-9)
        elif promised <= 1e-9 * state.cost:
            break
        else:
            damping = max(10 * damping, 1e-2)
    return pose, state, bend


def _check_landmarks(name: str, landmarks: np.ndarray) -> np.ndarray:
    if np.shape(landmarks) != (7, 3):
        raise InputError(f"{name}: expected (7, 3), in the order of LANDMARKS_51, got {np.shape(landmarks)}")
    landmarks = check_points(name, landmarks)
    if np.linalg.matrix_rank(landmarks - landmarks.mean(0), tol=1e-6 * (_spread(landmarks) or 1)) < 2:
        raise InputError(f"{name}: expected seven points of a face, got points on one line")
    return landmarks


def _check_near(name: str, landmarks: np.ndarray, gaps: np.ndarray, what: str) -> None:
    worst = int(gaps.argmax())
    if gaps[worst] > _OFF * _spread(landmarks):
        raise InputError(
            f"{name}: expected points on the {what}, got row {worst} {gaps[worst]:.4g} away from it, with "
            f"{_spread(landmarks):.4g} between the seven and their middle; check their order, unit and file"
        )


def _spread(points: np.ndarray) -> float:
    return float(np.sqrt(((points - points.mean(0)) ** 2).sum(1).mean()))
