"""Quads to triangles, and edges split at their middle, longest first, the same on both sides of the face."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from chebface.errors import InputError


@dataclass(frozen=True)
class Refined:
    """A triangle mesh and how its points come from the coarse ones. N vertices, M triangles, T texture points.

    Vertex i >= the coarse count is the middle of `parents[i - coarse]`, two earlier vertices; so any per-vertex
    quantity follows with `extend`, exactly linearly.
    """

    faces: np.ndarray  # (M, 3)
    uv: np.ndarray  # (T, 2)
    uv_faces: np.ndarray  # (M, 3)
    parents: np.ndarray  # (N - coarse, 2)
    mirror: np.ndarray  # (N,)

    def extend(self, values: np.ndarray, axis: int = 0) -> np.ndarray:
        """Carry per-vertex values from the coarse mesh to this one.

        Args:
            values: coarse vertices along `axis`, float64.
        """
        rows = np.moveaxis(values, axis, 0)
        out = np.empty((len(rows) + len(self.parents), *rows.shape[1:]), dtype=np.float64)
        out[: len(rows)] = rows
        for index, (a, b) in enumerate(self.parents, start=len(rows)):
            out[index] = (out[a] + out[b]) / 2
        return np.ascontiguousarray(np.moveaxis(out, 0, axis))


def triangulate(
    vertices: np.ndarray, quads: np.ndarray, uv_quads: np.ndarray, mirror: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Cut each quad (Q, 4) along its shorter diagonal, mirrored quads alike; (2Q, 3) faces and texture faces.

    Lengths are compared in whole nanometres and ties go to the diagonal with the lower side-free vertex number, so
    that a mirrored pair can never differ by rounding.
    """
    side_free = np.minimum(np.arange(len(vertices)), mirror)

    def rank(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        length = np.rint(np.linalg.norm(vertices[a] - vertices[b], axis=1) * 1e9).astype(np.int64)
        return length * len(vertices) + np.minimum(side_free[a], side_free[b])

    first = rank(quads[:, 0], quads[:, 2]) <= rank(quads[:, 1], quads[:, 3])
    corners = np.where(first[:, None, None], [[0, 1, 2], [0, 2, 3]], [[0, 1, 3], [1, 2, 3]])
    rows = np.arange(len(quads))[:, None, None]
    return quads[rows, corners].reshape(-1, 3), uv_quads[rows, corners].reshape(-1, 3)


def split_edges(
    vertices: np.ndarray,
    faces: np.ndarray,
    uv: np.ndarray,
    uv_faces: np.ndarray,
    *,
    mirror: np.ndarray,
    region: np.ndarray,
    points: int,
    triangles: int,
    first: tuple[tuple[int, int], ...] = (),
) -> Refined:
    """Split edges until the mesh has exactly `points` vertices and `triangles` triangles.

    An interior split adds one vertex and two triangles, a boundary split one and one; so the two counts fix how many
    of each. Interior edges are taken from `region`, the longest first (then the lowest vertex numbers); an edge off
    the midline is always split together with its mirror image.

    Args:
        vertices: (N, 3) metres, mirror symmetric.
        faces, uv_faces: (M, 3).
        uv: (T, 2).
        mirror: (N,) the vertex on the other side.
        region: (N,) bool, mirror symmetric: where interior edges are split.
        first: interior edges of one side to split before all others, wherever they are, each with its mirror image.

    Raises:
        InputError: the counts cannot be reached by splitting symmetric edges.
    """
    interior = (triangles - len(faces)) - (points - len(vertices))
    boundary = (points - len(vertices)) - interior
    if interior < 0 or boundary < 0:
        raise InputError(
            f"split_edges: {len(vertices)} vertices and {len(faces)} triangles cannot become {points} and {triangles}"
        )
    work = _Work(vertices, faces, uv, uv_faces, mirror=mirror, region=region)
    for a, b in first:
        work.split_pair(_edge(a, b))
        interior -= 2
    work.split(boundary, on_boundary=True)
    work.split(interior, on_boundary=False)
    return Refined(
        faces=np.array(work.faces),
        uv=np.array(work.uv),
        uv_faces=np.array(work.uv_faces),
        parents=np.array(work.parents, dtype=np.int64).reshape(-1, 2),
        mirror=np.array(work.mirror),
    )


class _Work:
    def __init__(
        self,
        vertices: np.ndarray,
        faces: np.ndarray,
        uv: np.ndarray,
        uv_faces: np.ndarray,
        *,
        mirror: np.ndarray,
        region: np.ndarray,
    ) -> None:
        self.vertices = [tuple(row) for row in vertices.tolist()]
        self.faces: list[list[int]] = faces.tolist()
        self.uv: list[tuple[float, float]] = [(u, v) for u, v in uv.tolist()]
        self.uv_faces: list[list[int]] = uv_faces.tolist()
        self.mirror: list[int] = mirror.tolist()
        self.region: list[bool] = region.tolist()
        self.parents: list[tuple[int, int]] = []
        self.uv_middles: dict[tuple[int, int], int] = {}
        self.around: dict[tuple[int, int], list[int]] = {}
        for index, face in enumerate(self.faces):
            for edge in _edges(face):
                self.around.setdefault(edge, []).append(index)

    def split(self, count: int, on_boundary: bool) -> None:
        while count:
            pairs = self._longest(on_boundary, single_only=count == 1)
            if pairs is None:
                raise InputError(f"split_edges: {count} splits are left and no edge to take them symmetrically")
            middles = [self._split(edge) for edge in pairs]
            self.mirror.extend(middles[::-1])
            count -= len(pairs)

    def split_pair(self, edge: tuple[int, int]) -> None:
        image = _edge(self.mirror[edge[0]], self.mirror[edge[1]])
        self.mirror.extend([self._split(edge), self._split(image)][::-1])

    def _longest(self, on_boundary: bool, single_only: bool) -> list[tuple[int, int]] | None:
        best: tuple[int, int, int] | None = None
        choice: list[tuple[int, int]] | None = None
        for edge, faces in self.around.items():
            if (len(faces) == 1) != on_boundary or not (on_boundary or (self.region[edge[0]] and self.region[edge[1]])):
                continue
            a, b = edge
            image = _edge(self.mirror[a], self.mirror[b])
            if image < edge or (single_only and image != edge):
                continue
            score = (self._length_nm(a, b), -a, -b)
            if best is None or score > best:
                best, choice = score, [edge] if image == edge else [edge, image]
        return choice

    def _length_nm(self, a: int, b: int) -> int:
        p, q = self.vertices[a], self.vertices[b]
        return round(sum((s - t) ** 2 for s, t in zip(p, q, strict=True)) ** 0.5 * 1e9)

    def _split(self, edge: tuple[int, int]) -> int:
        a, b = edge
        middle = len(self.vertices)
        self.vertices.append(tuple((s + t) / 2 for s, t in zip(self.vertices[a], self.vertices[b], strict=True)))
        self.region.append(self.region[a] and self.region[b])
        self.parents.append(edge)
        for index in self.around.pop(edge):
            face, uv_face = self.faces[index], self.uv_faces[index]
            corner = next(k for k in range(3) if {face[k], face[(k + 1) % 3]} == {a, b})
            i, j, k = face[corner], face[(corner + 1) % 3], face[(corner + 2) % 3]
            ui, uj, uk = uv_face[corner], uv_face[(corner + 1) % 3], uv_face[(corner + 2) % 3]
            um = self._uv_middle(ui, uj)
            new = len(self.faces)
            self.faces[index], self.uv_faces[index] = [i, middle, k], [ui, um, uk]
            self.faces.append([middle, j, k])
            self.uv_faces.append([um, uj, uk])
            moved = self.around[_edge(j, k)]
            moved[moved.index(index)] = new
            self.around[_edge(middle, k)] = [index, new]
            self.around.setdefault(_edge(i, middle), []).append(index)
            self.around.setdefault(_edge(middle, j), []).append(new)
        return middle

    def _uv_middle(self, a: int, b: int) -> int:
        key = _edge(a, b)
        if key not in self.uv_middles:
            (ua, va), (ub, vb) = self.uv[a], self.uv[b]
            self.uv_middles[key] = len(self.uv)
            self.uv.append(((ua + ub) / 2, (va + vb) / 2))
        return self.uv_middles[key]


def _edge(a: int, b: int) -> tuple[int, int]:
    return (a, b) if a < b else (b, a)


def _edges(face: list[int]) -> list[tuple[int, int]]:
    return [_edge(face[k], face[(k + 1) % 3]) for k in range(3)]
