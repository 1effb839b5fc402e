"""Distances from points to a triangle mesh that is laid on them, and how they change as it moves.

Two implementations of one definition: libigl's tree with numpy, and surface.cpp, compiled at first use.
`implementation()` says which one runs.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chebface import native
from chebface.errors import InputError, MissingDependencyError

_SOURCE = Path(__file__).with_name("surface.cpp")
_SHARE = 500  # points that are worth a thread
_STILL = 1e-12  # a point nearer than this, of the largest coordinate, is on the surface


def implementation() -> str:
    """Which code runs: "native", or "libigl (why)"."""
    why = native.why_missing(_SOURCE)
    return "native" if why is None else f"libigl ({why})"


@dataclass(frozen=True, eq=False)
class Pose:
    """A similarity: y = scale * rotation @ x + translation."""

    scale: float
    rotation: np.ndarray  # (3, 3), orthogonal
    translation: np.ndarray  # (3,)

    def apply(self, points: np.ndarray) -> np.ndarray:
        """Move points (P, 3)."""
        moved: np.ndarray = self.scale * (points @ self.rotation.T) + self.translation
        return moved

    def undo(self, points: np.ndarray) -> np.ndarray:
        """The points (P, 3) that `apply` moves to these."""
        back: np.ndarray = (points - self.translation) @ self.rotation / self.scale
        return back

    def move(self, step: np.ndarray, centre: np.ndarray, arm: float) -> Pose:
        """Translate by step[:3], turn about the centre by the axis step[3:6] / arm, grow by exp(step[6] / arm).

        With an arm as long as the points are far from the centre, all seven are lengths of like weight.
        """
        turn, growth = rotation_about(step[3:6] / arm), np.exp(step[6] / arm)
        translation = growth * turn @ (self.translation - centre) + centre + step[:3]
        u, _, v = np.linalg.svd(turn @ self.rotation)  # rounding adds up; a rotation stays one
        return Pose(float(self.scale * growth), u @ v, translation)


@dataclass(frozen=True, eq=False)
class Linear:
    """Distances at a pose and, for the seven parameters of `Pose.move`, the normal equations of their squares."""

    distances: np.ndarray  # (S,) float64 d, unsigned
    cost: float  # the sum of their squares
    gradient: np.ndarray  # (7,) J^T d, with J the derivatives of d
    normal: np.ndarray  # (7, 7) J^T J


class Surface:
    """A triangle mesh prepared for nearest-point queries. Exact, in float64.

    Args:
        vertices: (N, 3) float, any unit.
        faces: (M, 3) int.
        threads: for a `Cloud` of many points; 0 for as many as this process may have.

    Raises:
        InputError: wrong shapes, numbers that are not finite, no faces, or an index out of range.
        MissingDependencyError: there is neither a C++ compiler nor libigl.
    """

    def __init__(self, vertices: np.ndarray, faces: np.ndarray, threads: int = 0) -> None:
        self.threads = threads if threads > 0 else _count_cores()
        self.vertices = np.ascontiguousarray(check_points("vertices", vertices))
        self.faces = np.ascontiguousarray(_check_faces(faces, len(self.vertices)))
        self.still = _STILL * float(np.abs(self.vertices).max())
        self._library = _open()
        if self._library is None:
            self._tree = _make_igl_tree(self.vertices, self.faces)
            return
        sizes = ctypes.c_int64(len(self.faces)), ctypes.c_double(self.still)
        self._tree = ctypes.c_void_p(self._library.surface_make(_pointer(self.vertices), _pointer(self.faces), *sizes))
        weakref.finalize(self, self._library.surface_free, self._tree)

    def nearest(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Find the nearest point of the surface.

        Args:
            points: (P, 3), the unit of the mesh.

        Returns:
            closest (P, 3) float64, the triangle it is on (P,) int64, and the distance (P,) float64.

        Raises:
            InputError: a wrong shape, or numbers that are not finite.
        """
        points = np.ascontiguousarray(check_points("points", points))
        if self._library is None:
            _, triangle, closest = self._tree.squared_distance(self.vertices, self.faces, points)
            return closest, triangle, lengths(points - closest)
        closest, triangle, distance = np.empty_like(points), np.empty(len(points), np.int64), np.empty(len(points))
        self._library.surface_nearest(
            self._tree,
            _pointer(points),
            ctypes.c_int64(len(points)),
            *(_pointer(array) for array in (closest, triangle, distance)),
        )
        return closest, triangle, distance

    def normals(self, triangle: np.ndarray) -> np.ndarray:
        """Unit normals (P, 3) of triangles (P,); zero for one without area."""
        a, b, c = (self.vertices[self.faces[triangle, k]] for k in range(3))
        normal = np.cross(b - a, c - a)
        length = lengths(normal)[:, None]
        unit: np.ndarray = np.divide(normal, length, out=np.zeros_like(normal), where=length > 0)
        return unit


class Cloud:
    """Points that a surface is laid on. What it takes to know about the surface is kept from pose to pose.

    Args:
        surface: in its own place and unit.
        points: (S, 3) float64, where the poses lead to.
        centre, arm: (3,), length > 0: see `Pose.move`.
    """

    def __init__(self, surface: Surface, points: np.ndarray, centre: np.ndarray, arm: float) -> None:
        self.surface, self.centre, self.arm = surface, centre, arm
        self.points = np.ascontiguousarray(points, np.float64)
        self._order = np.arange(len(points))
        self._library = surface._library
        if self._library is None:
            return
        count = ctypes.c_int64(len(points))
        self._cloud = ctypes.c_void_p(self._library.surface_cloud(_pointer(self.points), count, _pointer(self._order)))
        weakref.finalize(self, self._library.surface_cloud_free, self._cloud)
        self._chunks = self._library.surface_chunks(count)
        threads = max(1, min(surface.threads, len(points) // _SHARE))
        self._pool = ThreadPoolExecutor(threads - 1) if threads > 1 else None
        self._helpers = threads - 1

    def thin(self, stride: int) -> Cloud:
        """One in `stride` of the points, spread evenly."""
        return Cloud(self.surface, self.points[self._order[::stride]], self.centre, self.arm)

    def linearize(self, pose: Pose) -> Linear:
        """Distances of the points to the surface at a pose, and their normal equations.

        A distance changes as the nearest point's motion along the line between the two; that the nearest point slides
        on the surface has no part in it. On the surface itself that line is the normal.
        """
        library = self._library
        if library is None:
            return self._linearize(pose)
        numbers = np.array([pose.scale, *pose.rotation.ravel(), *pose.translation, *self.centre, self.arm], np.float64)
        taken, distances, sums = np.zeros(1, np.int64), np.empty(len(self.points)), np.empty((self._chunks, 8, 8))
        given = [self.surface._tree, self._cloud, *map(_pointer, (numbers, taken, distances, sums))]
        # A foreign call lets other threads run; which of them takes a chunk changes nothing.
        others = (
            [self._pool.submit(library.surface_linearize, *given) for _ in range(self._helpers)] if self._pool else []
        )
        library.surface_linearize(*given)
        for other in others:
            other.result()
        whole = sums.sum(0)
        return Linear(distances, float(whole[7, 7]), whole[:7, 7], whole[:7, :7])

    def _linearize(self, pose: Pose) -> Linear:
        """The definition of `linearize`."""
        local = pose.undo(self.points)  # the mesh stays where its tree was built
        closest, triangle, distance = self.surface.nearest(local)
        on = distance <= self.surface.still
        direction = (local - closest) / np.where(on, 1, distance)[:, None]
        direction[on] = self.surface.normals(triangle[on])
        direction = direction @ pose.rotation.T
        from_centre = (pose.apply(closest) - self.centre) / self.arm
        growth = np.einsum("sc,sc->s", direction, from_centre)
        jacobian = -np.column_stack([direction, np.cross(from_centre, direction), growth])
        distances = distance * pose.scale
        return Linear(distances, float(distances @ distances), jacobian.T @ distances, jacobian.T @ jacobian)


def rotation_about(axis: np.ndarray) -> np.ndarray:
    """The rotation (3, 3) about an axis (3,) by its length in rad. Source: Rodrigues' formula."""
    angle = np.linalg.norm(axis)
    x, y, z = axis
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    turned: np.ndarray = np.eye(3) + np.sinc(angle / np.pi) * cross
    return turned + np.sinc(angle / (2 * np.pi)) ** 2 / 2 * cross @ cross


def lengths(vectors: np.ndarray) -> np.ndarray:
    """Lengths (S,) of vectors (S, 3)."""
    length: np.ndarray = np.sqrt(np.einsum("sc,sc->s", vectors, vectors))
    return length


def check_points(name: str, points: np.ndarray) -> np.ndarray:
    """Points (N, 3) as float64.

    Raises:
        InputError: another shape or kind, none at all, or a number that is not finite.
    """
    points = np.asarray(points)
    if points.ndim != 2 or points.shape[1] != 3 or not len(points) or points.dtype.kind not in "fiu":
        raise InputError(f"{name}: expected (N, 3) numbers, at least one row, got {points.shape} {points.dtype}")
    points = points.astype(np.float64, copy=False)
    if not np.isfinite(points).all():
        bad = np.flatnonzero(~np.isfinite(points).all(1))
        raise InputError(f"{name}: expected finite numbers, got {points[bad[0]]} at {bad[0]}, {len(bad)} such in all")
    return points


def _check_faces(faces: np.ndarray, count: int) -> np.ndarray:
    faces = np.asarray(faces)
    if faces.ndim != 2 or faces.shape[1] != 3 or not len(faces) or faces.dtype.kind not in "iu":
        raise InputError(
            f"faces: expected (M, 3) integers, at least one row, got {faces.shape} {faces.dtype}; "
            "distances are to a surface, a cloud of points has none"
        )
    if faces.min() < 0 or faces.max() >= count:
        raise InputError(f"faces: expected indices in 0..{count - 1}, got {faces.min()}..{faces.max()}")
    return faces.astype(np.int64, copy=False)


def _count_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _open() -> ctypes.CDLL | None:
    library = native.load(_SOURCE)
    if library is not None:
        library.surface_make.restype = library.surface_cloud.restype = ctypes.c_void_p
        library.surface_free.argtypes = library.surface_cloud_free.argtypes = [ctypes.c_void_p]
        library.surface_chunks.restype = ctypes.c_int64
    return library


def _make_igl_tree(vertices: np.ndarray, faces: np.ndarray) -> Any:
    try:
        import igl
    except ImportError as error:
        raise MissingDependencyError(
            f"distances to a surface: no native code ({native.why_missing(_SOURCE)}) and no libigl ({error}); "
            'pip install "chebface[now]", or install a C++ compiler'
        ) from error
    tree = igl.AABB()
    tree.init(vertices, faces)
    return tree


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
