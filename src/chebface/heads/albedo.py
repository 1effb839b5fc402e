"""Procedural skin: a mean albedo and fifty directions per vertex, painted by rule on the open head.

RGB as a photograph shows it under even white light, in [0, 1]. One unit of a direction is one standard deviation.
Order: melanin, haemoglobin, yellowness, hair colour (light), hair (grey), scalp bare or covered, brow darkness, lip
redness, lip lightness, beard shadow, under-eye shade, cheek redness, nose redness, eye colour (dark), eye colour
(blue), sclera tint, lid shade, forehead light, then pairs of smooth fields, each a cosine pattern over position times
lightness or times redness, falling in amplitude with frequency; three odd (asymmetric) patterns come last.
"""

from __future__ import annotations

import numpy as np

from chebface.heads.makehuman import HEAD_PARTS
from chebface.heads.marks import HAIRLINE, LEFT, RIGHT, Layout
from chebface.params import PARTS

TONE_GRID = 2.0**16
SKIN = np.array([0.70, 0.52, 0.43])
LIP = np.array([0.60, 0.34, 0.32])
HAIR = np.array([0.20, 0.15, 0.12])
SCLERA = np.array([0.86, 0.84, 0.82])
IRIS = np.array([0.32, 0.23, 0.16])
PUPIL = np.array([0.04, 0.04, 0.04])
INNER = np.array([0.42, 0.17, 0.16])  # mouth cavity and tongue
IRIS_RADIUS = 0.0062
MELANIN = np.array([-0.155, -0.128, -0.108])  # darker
BLOOD = np.array([0.010, -0.016, -0.012])
YELLOW = np.array([0.004, 0.002, -0.015])
LIGHT = np.array([0.02, 0.02, 0.02])


def paint(layout: Layout, masks: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Paint the head.

    Args:
        layout: the head's geometry.
        masks: its regions, each (N,) bool.

    Returns:
        mean (N, 3) in [0, 1] and directions (50, N, 3), float32, in steps of 1 / TONE_GRID.
    """
    skin, lips, hair, brows, eyes = _materials(layout, masks)
    iris, pupil = _eye_rings(layout, masks["eyeballs"])
    inner = (~skin & ~masks["eyeballs"]).astype(float)
    cover = np.maximum(brows, hair)  # how much hair hides the skin
    bare = np.where(skin, 1 - cover, 0.0)

    mean = np.where(skin[:, None], SKIN, INNER)
    mean = mean + (lips * 0.9)[:, None] * (LIP - mean) + cover[:, None] * (HAIR - mean)
    ball = SCLERA + iris[:, None] * (IRIS - SCLERA)
    ball = ball + pupil[:, None] * (PUPIL - ball)
    mean = np.where(masks["eyeballs"][:, None], ball, mean)

    beard = _beard(layout) * bare * (1 - lips)
    under_eye = _bump(layout.vertices, (0.029, 0.006, 0.035), (0.016, 0.008, 0.03)) * bare
    cheeks = _bump(layout.vertices, (0.040, -0.015, 0.025), (0.024, 0.024, 0.04)) * bare
    nose = _bump(layout.vertices, (0.0, -0.012, 0.062), (0.020, 0.022, 0.025)) * bare
    lids = eyes * bare
    forehead = masks["forehead"] * bare
    melanin = bare * (1 - 0.25 * lips) + 0.25 * brows * skin
    melanin = melanin + 0.35 * inner + 0.08 * hair
    patches = [
        (melanin, MELANIN),
        (bare, BLOOD),
        (bare, YELLOW),
        (cover, np.array([0.16, 0.12, 0.08])),
        (hair, np.array([0.10, 0.11, 0.12])),
        (hair, (SKIN - HAIR) * 0.30),
        (brows, np.array([-0.07, -0.07, -0.07])),
        (lips * skin, np.array([0.045, -0.035, -0.025])),
        (lips * skin, np.array([0.04, 0.04, 0.04])),
        (beard, np.array([-0.055, -0.052, -0.045])),
        (under_eye, np.array([-0.05, -0.055, -0.045])),
        (cheeks, np.array([0.022, -0.024, -0.019])),
        (nose, np.array([0.022, -0.025, -0.020])),
        (iris * (1 - pupil), np.array([-0.10, -0.09, -0.07])),
        (iris * (1 - pupil), np.array([-0.05, 0.02, 0.12])),
        (masks["eyeballs"] * (1 - iris), np.array([-0.02, -0.035, -0.045])),
        (lids, np.array([-0.045, -0.050, -0.045])),
        (forehead, np.array([0.025, 0.025, 0.022])),
    ]
    directions = [field[:, None] * colour for field, colour in patches]
    directions += _fields(layout.vertices, np.where(skin, 1 - 0.6 * cover, 0.0), PARTS["texture"] - len(directions))
    return _to_tone(np.clip(mean, 0, 1)), _to_tone(np.stack(directions))


def _materials(layout: Layout, masks: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    x, y, z = layout.vertices.T
    # The sockets behind the lids count as skin, so that a fold of theirs that comes through a lid is not seen.
    outside = [HEAD_PARTS.index(name) for name in ("head", "eye_cavity.L", "eye_cavity.R")]
    skin = (layout.part[:, outside].max(1) > 0) & ~masks["eyeballs"]
    lips = masks["lips"].astype(float)
    back = np.clip((y - HAIRLINE[0] + HAIRLINE[1] * x * x) / 0.012 + 0.5, 0, 1)  # above the hairline
    temple = np.clip((-0.022 - z) / 0.012, 0, 1) * np.clip((y + 0.005) / 0.02, 0, 1)
    nape = np.clip((-0.055 - z) / 0.02, 0, 1) * np.clip((y + 0.045) / 0.02, 0, 1)
    hair = np.maximum(np.maximum(back, temple), nape) * ~masks["ears"] * skin * 0.85
    brows = _brows(layout) * skin * 0.75
    eyes = masks["eye_region"] * np.maximum(0, 1 - ((np.abs(x) - 0.0295) / 0.02) ** 2 - ((y - 0.027) / 0.011) ** 2)
    return skin, lips, hair, brows, eyes


def _brows(layout: Layout) -> np.ndarray:
    """(N,) 0..1: near the line through the brow landmarks, both sides."""
    line = []
    for index in (*range(17, 22), *range(22, 27)):
        vertices = layout.vertices[[layout.vertex(name) for name in RIGHT.get(index) or RIGHT[LEFT[index]]]].mean(0)
        line.append(vertices * [1 if index in RIGHT else -1, 1, 1])
    points = np.array(line)
    nearest = np.full(len(layout.vertices), np.inf)
    for k in (*range(4), *range(5, 9)):
        a, b = points[k], points[k + 1]
        t = np.clip(((layout.vertices - a) * (b - a)).sum(1) / ((b - a) ** 2).sum(), 0, 1)
        nearest = np.minimum(nearest, ((layout.vertices - a - t[:, None] * (b - a)) ** 2).sum(1))
    return np.maximum(0, 1 - nearest / 0.0058**2)


def _eye_rings(layout: Layout, balls: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Iris and pupil, (N,) 0..1: by distance from each eyeball's own forward axis."""
    iris, pupil = np.zeros(len(balls)), np.zeros(len(balls))
    for side in (-1, 1):
        ball = balls & (layout.vertices[:, 0] * side > 0)
        points = layout.vertices[ball]
        centre = (points.max(0) + points.min(0)) / 2
        front = points[:, 2] > centre[2] + 0.004
        off = np.sqrt(((points[:, :2] - centre[:2]) ** 2).sum(1))
        iris[ball] = np.where(front, np.clip((IRIS_RADIUS + 0.0010 - off) / 0.0020, 0, 1), 0)
        pupil[ball] = np.where(front, np.clip((0.0020 - off) / 0.0010, 0, 1), 0)
    return iris, pupil


def _beard(layout: Layout) -> np.ndarray:
    x, y, z = layout.vertices.T
    below = np.clip((-0.022 - y - 0.10 * np.abs(x)) / 0.012, 0, 1)
    above = np.clip((y + 0.115) / 0.02, 0, 1)
    return below * above * np.clip((z + 0.03) / 0.02, 0, 1)


def _bump(points: np.ndarray, centre: tuple[float, ...], radii: tuple[float, ...]) -> np.ndarray:
    """A smooth hill (N,) at a place and its mirror image, 1 at its top, 0 beyond its radii."""
    from_centre = (np.abs(points) * [1, 0, 0] + points * [0, 1, 1] - np.array(centre)) / np.array(radii)
    return np.maximum(0, 1 - (from_centre**2).sum(1)) ** 2


def _fields(points: np.ndarray, where: np.ndarray, count: int) -> list[np.ndarray]:
    """Cosine patterns over position, rising in frequency: even ones in lightness and redness, then odd ones."""
    x, y, z = (points / 0.1).T
    triples = [(i, j, k) for i in range(4) for j in range(4) for k in range(2) if 0 < i + j + k <= 3]
    triples.sort(key=lambda f: (f[0] ** 2 + f[1] ** 2 + f[2] ** 2, f))
    waves = [
        (np.cos(2.2 * i * x) * np.cos(2.2 * j * y + 0.7 * j) * np.cos(2.2 * k * z))
        / (1 + 0.35 * (i * i + j * j + k * k))
        for i, j, k in triples
    ]
    odd = [np.sin(2.2 * x) * np.cos(2.2 * j * y + 0.7 * j) / (1.7 + 0.35 * j * j) for j in range(3)]
    waves = [*waves[: count // 2 - len(odd)], *odd]
    return [(where * (wave - wave.mean()))[:, None] * colour for wave in waves for colour in (LIGHT, BLOOD)]


def _to_tone(values: np.ndarray) -> np.ndarray:
    return (np.rint(values * TONE_GRID) / TONE_GRID + 0.0).astype(np.float32)
