"""Meshes coarse to coarser: quadric edge collapse that keeps a subset of the vertices, and the maps between levels.

    hierarchy = for_head(open_head())   # 5023 -> 1256 -> 314 -> 79 -> 20, kept in the user's cache

Going down selects vertices; going up reads the coarser surface at the point nearest to each finer vertex. The same
mesh gives the same bytes on every machine: float64, elementwise IEEE arithmetic only, ties broken by index.

How (after Garland and Heckbert): a vertex v moves onto a neighbour u and is gone. Its cost is the sum of squared
distances of u to the planes that v and u stand for, weighted by area; open borders add planes upright on them, and a
little of the squared distance to the vertices themselves spreads vertices evenly where a surface is flat.
- A collapse may not change the topology (the link condition) nor leave a vertex without a triangle, and one that
  turns a triangle over waits until nothing else is left. When even those are used up, topology gives way.
- Separate parts, such as eyeballs, shrink to a tetrahedron or a triangle. Then a part may be dropped whole, at the
  cost of its area times the squared distance to the nearest other part; its vertices go `up` to the nearest surface
  that is left. While a part is there, its vertices go up to it alone.
- Triangles with a repeated corner and repeated triangles are left out; those without area are harmless.
"""

from __future__ import annotations

import hashlib
import heapq
import io
import json
import warnings
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from chebface.cache import cache_dir
from chebface.errors import AssetError, InputError
from chebface.heads.asset import Head
from chebface.kernels.graph import Graph
from chebface.mesh import write_whole

SIZES = (1256, 314, 79, 20)
VERSION = 1  # of the method: another one makes other files
BORDER = 10.0  # weight of the planes upright on an open border
SPREAD = 1e-3  # weight of the squared distance to the vertices themselves
TURN = 0.2  # cosine between a triangle's old and new normal, below which it counts as turned over
WEIGHT_GRID = 2.0**20  # barycentric weights are multiples of 1 / this, so that they sum to 1 exactly
_BROKEN = (ValueError, KeyError, OSError, EOFError, RuntimeError, TypeError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True, eq=False)
class Level:
    """One mesh of a hierarchy, V vertices in the order of the finest; `down` and `up` lead to the next coarser one."""

    vertices: np.ndarray  # (V, 3) float32, m
    faces: np.ndarray  # (F, 3) int32
    graph: Graph
    down: np.ndarray | None  # (V_next,) int32, rising: the vertices that the next level keeps; None at the last
    up_index: np.ndarray | None  # (V, 3) int32: corners of a triangle of the next level
    up_weight: np.ndarray | None  # (V, 3) float32: where on it; rows sum to 1


@dataclass(frozen=True, eq=False)
class Hierarchy:
    """Meshes from fine to coarse."""

    levels: tuple[Level, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many vertices each level has, the finest first."""
        return tuple(len(level.vertices) for level in self.levels)

    @property
    def sha256(self) -> str:
        """Digest of every array: the identity of the hierarchy, for files that depend on it."""
        digest = hashlib.sha256()
        for name, array in sorted(_arrays(self).items()):
            digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()


def build(vertices: np.ndarray, faces: np.ndarray, sizes: tuple[int, ...] = SIZES) -> Hierarchy:
    """Make coarser and coarser meshes.

    Args:
        vertices: (N, 3) float, any unit; taken as float32.
        faces: (M, 3) int.
        sizes: how many vertices the coarser levels have; falling, below N, 3 at least.

    Raises:
        InputError: a wrong shape or type, an empty mesh, vertices that are not finite, a vertex in no triangle, sizes
            that do not fall or cannot be reached.
    """
    points, triangles = _check(vertices, faces)
    sizes = tuple(int(size) for size in sizes)
    if not sizes or any(a <= b for a, b in zip((len(points), *sizes), sizes, strict=False)) or sizes[-1] < 3:
        raise InputError(f"sizes: expected numbers falling from below {len(points)} (the mesh) to 3, got {sizes}")
    graph = Graph.from_faces(triangles, len(points))
    collapse = _Collapse(points.astype(np.float64), triangles)
    part = collapse.part_of
    levels = []
    alive = np.arange(len(points))
    for size in sizes:
        collapse.reduce(size)
        kept, new_triangles = collapse.current()
        down = np.searchsorted(alive, kept).astype(np.int32)
        coarse = np.searchsorted(kept, new_triangles).astype(np.int32)
        up_index, up_weight = _project(points[alive], part[alive], points[kept], coarse, part[kept], down)
        levels.append(Level(points[alive], triangles, graph, down, up_index, up_weight))
        alive, triangles, graph = kept, coarse, Graph.from_faces(coarse, len(kept))
    levels.append(Level(points[alive], triangles, graph, None, None, None))
    return Hierarchy(tuple(levels))


def for_head(head: Head) -> Hierarchy:
    """The hierarchy of a head with the usual SIZES: read from the user's cache, or built and kept there."""
    path = cache_dir() / "hierarchies" / f"{head.sha256[:12]}-v{VERSION}.npz"
    if path.is_file():
        try:
            return load(path, head_sha256=head.sha256)
        except AssetError as error:
            warnings.warn(f"{error}; building it again", RuntimeWarning, stacklevel=2)
    hierarchy = build(head.template, head.faces)
    save(hierarchy, path, head_sha256=head.sha256)
    return hierarchy


def save(hierarchy: Hierarchy, path: str | Path, *, head_sha256: str = "") -> Path:
    """Write a hierarchy file, whole or not at all.

    Args:
        head_sha256: of the head that it belongs to, if any.

    Raises:
        OSError: the disk refuses.
    """
    header = {
        "format": VERSION,
        "sizes": hierarchy.sizes,
        "head_sha256": head_sha256,
        "sha256": hierarchy.sha256,
    }
    content = io.BytesIO()
    text = np.frombuffer(json.dumps(header).encode(), np.uint8)
    np.savez_compressed(content, header=text, **_arrays(hierarchy))
    return write_whole(path, content.getvalue())


def load(path: str | Path, *, head_sha256: str | None = None) -> Hierarchy:
    """Read and check a hierarchy file.

    Args:
        head_sha256: of the head that it must belong to; any where None.

    Raises:
        AssetError: missing, not a hierarchy, of another format or head, damaged, or not what its digest says.
    """
    path = Path(path)
    if not path.is_file():
        raise AssetError(f"hierarchy file {path}: not found; chebface.hierarchy.for_head makes one")
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        header = json.loads(arrays.pop("header").tobytes())
        if header["format"] != VERSION:
            raise AssetError(f"hierarchy file {path}: format {header['format']}, wanted {VERSION}; build it again")
        hierarchy = Hierarchy(tuple(_read_level(arrays, index, size) for index, size in enumerate(header["sizes"])))
        digest, owner = header["sha256"], header["head_sha256"]
    except _BROKEN as error:
        raise AssetError(f"hierarchy file {path}: not a whole hierarchy ({error}); delete it") from error
    if hierarchy.sha256 != digest:
        raise AssetError(f"hierarchy file {path}: contents differ from the recorded sha256; delete it")
    if head_sha256 is not None and owner != head_sha256:
        raise AssetError(f"hierarchy file {path}: made for head {owner[:12]}, wanted {head_sha256[:12]}; delete it")
    return hierarchy


_PARTS = ("vertices", "faces", "down", "up_index", "up_weight")


def _arrays(hierarchy: Hierarchy) -> dict[str, np.ndarray]:
    return {
        f"{index}_{name}": np.ascontiguousarray(getattr(level, name))
        for index, level in enumerate(hierarchy.levels)
        for name in _PARTS
        if getattr(level, name) is not None
    }


def _read_level(arrays: dict[str, np.ndarray], index: int, size: int) -> Level:
    faces = arrays[f"{index}_faces"]
    down, up_index, up_weight = (arrays.get(f"{index}_{name}") for name in ("down", "up_index", "up_weight"))
    graph = Graph.from_faces(faces, size)
    return Level(arrays[f"{index}_vertices"], faces, graph, down, up_index, up_weight)


def _check(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The vertices as (N, 3) float32, the triangles worth keeping as (F, 3) int32."""
    vertices, faces = np.asarray(vertices), np.asarray(faces)
    if vertices.ndim != 2 or vertices.shape[1] != 3 or vertices.dtype.kind != "f":
        raise InputError(f"vertices: expected (N, 3) floats, got {vertices.shape} {vertices.dtype}")
    if not len(vertices) or not faces.size:
        raise InputError(f"the mesh is empty: {len(vertices)} vertices, {len(faces)} triangles")
    if faces.ndim != 2 or faces.shape[1] != 3 or faces.dtype.kind not in "iu":
        raise InputError(f"faces: expected (M, 3) integers, got {faces.shape} {faces.dtype}")
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise InputError(f"faces: expected vertices in 0..{len(vertices) - 1}, got {faces.min()}..{faces.max()}")
    bad = np.flatnonzero(~np.isfinite(vertices).all(1) | (np.abs(vertices) > 1e15).any(1))
    if len(bad):
        raise InputError(
            f"vertices: vertex {bad[0]} is not finite ({len(bad)} such); expected finite coordinates below 1e15"
        )
    corners = np.sort(faces, 1)
    whole = (corners[:, 0] != corners[:, 1]) & (corners[:, 1] != corners[:, 2])
    first = np.unique(corners, axis=0, return_index=True)[1]
    wanted = np.zeros(len(faces), bool)
    wanted[first] = True
    kept = faces[wanted & whole]
    lonely = np.setdiff1d(np.arange(len(vertices)), kept)
    if len(lonely):
        raise InputError(
            f"faces: vertex {lonely[0]} is in no triangle ({len(lonely)} such, triangles with a repeated corner do not "
            "count); drop unused vertices from the mesh"
        )
    return np.ascontiguousarray(vertices, np.float32), np.ascontiguousarray(kept, np.int32)


def _quadrics(points: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """(N, 10): for each vertex the upper triangle of the sum of weight * (n, d)(n, d)^T over its planes."""
    a, b, c = (points[faces[:, k]] for k in range(3))
    normal, double = _unit(np.cross(b - a, c - a))
    area = double / 2
    total = np.zeros((len(points), 10))
    plane = _plane_quadric(normal, a, area / 3)
    shares = np.zeros(len(points))
    for k in range(3):
        np.add.at(total, faces[:, k], plane)
        np.add.at(shares, faces[:, k], area / 3)

    edges = np.stack([faces, np.roll(faces, -1, 1)], 2).reshape(-1, 2)
    owner = np.repeat(np.arange(len(faces)), 3)
    key = np.sort(edges, 1) @ np.array([len(points), 1])
    _, first, count = np.unique(key, return_index=True, return_counts=True)
    border = np.sort(first[count == 1])
    start, end = points[edges[border, 0]], points[edges[border, 1]]
    along = end - start
    upright, length = _unit(np.cross(along, normal[owner[border]]))
    plane = _plane_quadric(upright, start, BORDER * length * length / 2)
    for k in range(2):
        np.add.at(total, edges[border, k], plane)

    x, y, z = points.T
    weight, zero = SPREAD * shares, np.zeros(len(points))
    square = x * x + y * y + z * z
    point = np.stack([weight, zero, zero, -weight * x, weight, zero, -weight * y, weight, -weight * z, weight * square])
    return total + point.T


def _plane_quadric(normal: np.ndarray, point: np.ndarray, weight: np.ndarray) -> np.ndarray:
    a, b, c = normal.T
    d = -(a * point[:, 0] + b * point[:, 1] + c * point[:, 2])
    rows = [a * a, a * b, a * c, a * d, b * b, b * c, b * d, c * c, c * d, d * d]
    return (np.stack(rows) * weight).T


def _unit(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors and lengths; zeros stay zeros."""
    length = np.sqrt(vectors[:, 0] * vectors[:, 0] + vectors[:, 1] * vectors[:, 1] + vectors[:, 2] * vectors[:, 2])
    return vectors / np.where(length > 0, length, 1)[:, None], length


def _find_parts(faces: np.ndarray, n: int) -> np.ndarray:
    """(N,) the connected part of each vertex, numbered by its first vertex."""
    label = np.arange(n)
    while True:
        low = label[faces].min(1)
        new = label.copy()
        for k in range(3):
            np.minimum.at(new, faces[:, k], low)
        new = new[new]
        if (new == label).all():
            return np.unique(label, return_inverse=True)[1].reshape(-1)
        label = new


class _Collapse:
    """A mesh that loses one vertex at a time, or a whole part."""

    def __init__(self, points: np.ndarray, faces: np.ndarray) -> None:
        points = points - (points.min(0) + points.max(0)) / 2  # far from the origin the sums would lose digits
        self.part_of = _find_parts(faces, len(points))
        self.points: list[tuple[float, float, float]] = [(p[0], p[1], p[2]) for p in points.tolist()]
        self.quadrics: list[list[float]] = _quadrics(points, faces).tolist()
        self.faces: dict[int, list[int]] = dict(enumerate(faces.tolist()))
        self.faces_of: list[set[int]] = [set() for _ in self.points]
        for index, face in self.faces.items():
            for v in face:
                self.faces_of[v].add(index)
        self.count = len(self.points)
        self.members: list[set[int]] = [set() for _ in range(int(self.part_of.max()) + 1)]
        for v, part in enumerate(self.part_of.tolist()):
            self.members[part].add(v)
        a, b, c = (points[faces[:, k]] for k in range(3))
        areas = _unit(np.cross(b - a, c - a))[1] / 2
        self.area = np.bincount(self.part_of[faces[:, 0]], areas, len(self.members)).tolist()
        self.version = [0] * len(self.points)
        # (cost, v, u, version of v, version of u), or (cost, -1, part, 0, 0) to drop a part
        self.heap: list[tuple[float, int, int, int, int]] = []
        self.waiting: dict[tuple[int, int], str] = {}  # (v, u) -> why refused for now
        for v in range(len(self.points)):
            for u in self._around(v):
                self._push(v, u)
        for part in range(len(self.members)):
            self._offer_to_drop(part)

    def reduce(self, size: int) -> None:
        """Take vertices away until `size` are left."""
        late = []  # parts too large to drop without going below size
        while self.count > size:
            if not self.heap:
                self._force(size)
                continue
            entry = heapq.heappop(self.heap)
            _, v, u, v_version, u_version = entry
            if v < 0:
                if self.count - len(self.members[u]) < size:
                    late.append(entry)
                else:
                    self._drop(u)
            elif self.version[v] == v_version and self.version[u] == u_version:
                refusal = self._refusal(v, u)
                if refusal is None:
                    self._merge(v, u)
                else:
                    self.waiting[v, u] = refusal
        for entry in late:
            heapq.heappush(self.heap, entry)

    def current(self) -> tuple[np.ndarray, np.ndarray]:
        """The vertices that are left, rising, and their triangles; both by the numbers of the first mesh."""
        faces = np.array([self.faces[index] for index in sorted(self.faces)], np.int64)
        return np.unique(faces), faces

    def _around(self, v: int) -> set[int]:
        return {w for index in self.faces_of[v] for w in self.faces[index]} - {v}

    def _cost(self, v: int, u: int) -> float:
        q = [a + b for a, b in zip(self.quadrics[v], self.quadrics[u], strict=True)]
        x, y, z = self.points[u]
        xx = q[0] * x + 2 * (q[1] * y + q[2] * z + q[3])
        yy = q[4] * y + 2 * (q[5] * z + q[6])
        zz = q[7] * z + 2 * q[8]
        return max(x * xx + y * yy + z * zz + q[9], 0.0)

    def _push(self, v: int, u: int) -> None:
        self.waiting.pop((v, u), None)
        heapq.heappush(self.heap, (self._cost(v, u), v, u, self.version[v], self.version[u]))

    def _refusal(self, v: int, u: int) -> str | None:
        """Why v must not move onto u: "gone", "isolates", "topology", "turns"; None where it may."""
        mine, theirs = self.faces_of[v], self.faces_of[u]
        shared = mine & theirs
        if not shared:
            return "gone"
        opposite = {w for index in shared for w in self.faces[index]} - {v, u}
        if any(self.faces_of[w] <= shared for w in opposite) or mine | theirs == shared:
            return "isolates"
        rims = {frozenset(self.faces[index]) - {u} for index in theirs - shared}
        staying = [self.faces[index] for index in mine - shared]
        if (
            self._around(v) & self._around(u) != opposite
            or any(frozenset(face) - {v} in rims for face in staying)
            or (len(shared) > 1 and self._on_border(v) and self._on_border(u))
        ):
            return "topology"
        return "turns" if any(self._turns(face, v, u) for face in staying) else None

    def _on_border(self, v: int) -> bool:
        seen: dict[int, int] = {}
        for index in self.faces_of[v]:
            for w in self.faces[index]:
                seen[w] = seen.get(w, 0) + 1
        return 1 in seen.values()

    def _turns(self, face: list[int], v: int, u: int) -> bool:
        before = _normal(*(self.points[w] for w in face))
        after = _normal(*(self.points[u if w == v else w] for w in face))
        size = _dot(before, before)
        if size == 0.0:
            return False
        product = _dot(before, after)
        return product <= 0.0 or product * product < TURN * TURN * size * _dot(after, after)

    def _merge(self, v: int, u: int) -> None:
        there = {frozenset(self.faces[index]) for index in self.faces_of[u]}
        for index in sorted(self.faces_of[v]):
            face = self.faces[index]
            moved = [u if w == v else w for w in face]
            if u in face or frozenset(moved) in there:
                for w in face:
                    self.faces_of[w].discard(index)
                del self.faces[index]
            else:
                self.faces[index] = moved
                self.faces_of[u].add(index)
        self.faces_of[v] = set()
        self.quadrics[u] = [a + b for a, b in zip(self.quadrics[u], self.quadrics[v], strict=True)]
        self._remove(v)
        self.version[u] += 1
        for w in self._around(u):
            self._push(u, w)
            self._push(w, u)
            for z in self._around(w):
                for edge in ((w, z), (z, w)):
                    if edge in self.waiting:
                        self._push(*edge)
        self._offer_to_drop(int(self.part_of[v]))

    def _remove(self, v: int) -> None:
        self.version[v] += 1
        self.count -= 1
        self.members[self.part_of[v]].discard(v)

    def _offer_to_drop(self, part: int) -> None:
        if 0 < len(self.members[part]) <= 4:
            cost = self._drop_cost(part)
            if cost is not None:
                heapq.heappush(self.heap, (cost, -1, part, 0, 0))

    def _drop_cost(self, part: int) -> float | None:
        """The part's first area times the mean squared distance of its vertices to other parts; None if the last."""
        others = [v for other, members in enumerate(self.members) if other != part for v in sorted(members)]
        if not others:
            return None
        rest = np.array([self.points[v] for v in others])
        total = 0.0
        for v in sorted(self.members[part]):
            apart = rest - self.points[v]
            square = apart[:, 0] * apart[:, 0] + apart[:, 1] * apart[:, 1] + apart[:, 2] * apart[:, 2]
            total += float(square.min())
        return float(self.area[part]) * total / len(self.members[part])

    def _drop(self, part: int) -> None:
        members = sorted(self.members[part])
        if not members or len(members) == self.count:
            return
        for v in members:
            for index in self.faces_of[v]:
                self.faces.pop(index, None)
            self.faces_of[v] = set()
            self._remove(v)

    def _force(self, size: int) -> None:
        """Do the least bad thing when no ordinary collapse is left."""
        for reason in ("turns", "topology"):
            found = [
                (self._cost(v, u), v, u)
                for (v, u), why in self.waiting.items()
                if why == reason and self._refusal(v, u) == reason
            ]
            if found:
                _, v, u = min(found)
                del self.waiting[v, u]
                self._merge(v, u)
                return
            if reason == "turns":
                small = [part for part, members in enumerate(self.members) if 0 < len(members) <= self.count - size]
                costs = [(cost, part) for part in small if (cost := self._drop_cost(part)) is not None]
                if costs:
                    self._drop(min(costs)[1])
                    return
        raise InputError(f"sizes: this mesh cannot be brought below {self.count} vertices, wanted {size}")


def _normal(
    a: tuple[float, float, float], b: tuple[float, float, float], c: tuple[float, float, float]
) -> tuple[float, float, float]:
    px, py, pz = b[0] - a[0], b[1] - a[1], b[2] - a[2]
    qx, qy, qz = c[0] - a[0], c[1] - a[1], c[2] - a[2]
    return py * qz - pz * qy, pz * qx - px * qz, px * qy - py * qx


def _dot(a: tuple[float, float, float], b: tuple[float, float, float]) -> float:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _project(
    points: np.ndarray,
    parts: np.ndarray,
    coarse_points: np.ndarray,
    coarse_faces: np.ndarray,
    coarse_parts: np.ndarray,
    down: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """For each point (V, 3) the nearest triangle of the coarser mesh, of its own part while there is one.

    Returns:
        (V, 3) int32 corners and (V, 3) float32 weights; a point that is itself in the coarser mesh gets weight 1.
    """
    points, coarse_points = points.astype(np.float64), coarse_points.astype(np.float64)
    middle = (points.min(0) + points.max(0)) / 2  # as in _Collapse
    points, coarse_points = points - middle, coarse_points - middle
    index = np.zeros((len(points), 3), np.int32)
    weight = np.zeros((len(points), 3))
    face_parts = coarse_parts[coarse_faces[:, 0]]
    everything = np.arange(len(coarse_faces))
    corners = coarse_points[coarse_faces]
    for part in np.unique(parts):
        mine = np.flatnonzero(parts == part)
        own = np.flatnonzero(face_parts == part)
        triangles = own if len(own) else everything
        face, where = _nearest(points[mine], corners[triangles])
        index[mine] = coarse_faces[triangles[face]]
        weight[mine] = where
    kept = np.arange(len(down))
    face_of = np.zeros(len(down), np.int64)
    for k in range(3):
        face_of[coarse_faces[::-1, k]] = everything[::-1]
    index[down] = coarse_faces[face_of]
    weight[down] = index[down] == kept[:, None]
    steps = np.rint(weight * WEIGHT_GRID)
    steps[np.arange(len(steps)), steps.argmax(1)] += WEIGHT_GRID - steps.sum(1)
    return index, (steps / WEIGHT_GRID).astype(np.float32)


def _nearest(points: np.ndarray, corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest of the triangles (F, 3, 3) to each point (V, 3), the first of equals, and where on it (V, 3)."""
    centre = (corners[:, 0] + corners[:, 1] + corners[:, 2]) / 3
    radius = np.max([_unit(corners[:, k] - centre)[1] for k in range(3)], 0)
    best = np.zeros(len(points), np.int64)
    where = np.zeros((len(points), 3))
    for start in range(0, len(points), 256):
        some = points[start : start + 256]
        apart = np.zeros((len(some), len(centre)))
        for axis in range(3):
            step = some[:, axis, None] - centre[None, :, axis]
            apart += step * step
        apart = np.sqrt(apart)
        # A triangle lies within its radius of its centre: the rest cannot hold the nearest point.
        rows, cols = np.nonzero(apart - radius <= (apart + radius).min(1, keepdims=True) * (1 + 1e-9))
        weights, square = _closest(some[rows], corners[cols])
        order = np.lexsort((cols, square, rows))
        first = order[np.unique(rows[order], return_index=True)[1]]
        best[start : start + 256] = cols[first]
        where[start : start + 256] = weights[first]
    return best, where


def _closest(points: np.ndarray, corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where on its triangle (P, 3, 3) each point (P, 3) is nearest: barycentrics (P, 3), squared distance (P,)."""

    def dot(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        product: np.ndarray = p[:, 0] * q[:, 0] + p[:, 1] * q[:, 1] + p[:, 2] * q[:, 2]
        return product

    a, b, c = (corners[:, k] for k in range(3))
    best = np.full(len(points), np.inf)
    weights = np.zeros((len(points), 3))

    def offer(candidate: np.ndarray, allowed: np.ndarray) -> None:
        at = candidate[:, :1] * a + candidate[:, 1:2] * b + candidate[:, 2:] * c
        square = dot(points - at, points - at)
        better = allowed & (square < best)
        best[better] = square[better]
        weights[better] = candidate[better]

    for k in range(3):  # the three sides, ends included
        start, along = corners[:, k], corners[:, (k + 1) % 3] - corners[:, k]
        length = dot(along, along)
        t = np.clip(dot(points - start, along) / np.where(length > 0, length, 1), 0, 1)
        candidate = np.zeros((len(points), 3))
        candidate[:, k], candidate[:, (k + 1) % 3] = 1 - t, t
        offer(candidate, np.ones(len(points), bool))
    u, v, w = b - a, c - a, points - a  # the inside
    uu, uv, vv, wu, wv = dot(u, u), dot(u, v), dot(v, v), dot(w, u), dot(w, v)
    determinant = uu * vv - uv * uv
    safe = np.where(determinant > 0, determinant, 1)
    second, third = (vv * wu - uv * wv) / safe, (uu * wv - uv * wu) / safe
    candidate = np.stack([1 - second - third, second, third], 1)
    offer(candidate, (determinant > 0) & (candidate >= 0).all(1))
    return weights, best
