"""A small synthetic head in FLAME's layout, for tests that need no real face."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np

from chebface.heads.asset import CONTOUR_STEPS, Head

RADII = np.array([0.075, 0.115, 0.095])  # half width, height, depth; m
JOINT_PLACES = np.array(
    [[0, -0.13, -0.03], [0, -0.08, -0.02], [0, -0.03, 0.0], [0.031, 0.025, 0.06], [-0.031, 0.025, 0.06]]
)


def make_head(n_rings: int = 16, seed: int = 0, texture: bool = True) -> Head:
    """Make a closed, star-shaped head of n_rings * 2 n_rings + 2 vertices, with a nose so that it has a front.

    x is the subject's left, y up, z forward; metres. The bases are smooth and random, about 4 mm per vertex in
    all; the skinning is smooth; landmarks lie in iBUG's order where a face would have them.
    """
    rng = np.random.default_rng(seed)
    direction, faces = _sphere(n_rings)
    template = (
        direction * RADII * (1 + 0.18 * _bump(direction, 0, -3, 9) + 0.03 * _bump(direction, 0, -40, 20))[:, None]
    )
    smooth = _harmonics(direction)

    triangles, barycentric = _cast(template, faces, _landmarks())
    contour = [_cast(template, faces, _aim(*_jaw_line(step))) for step in range(CONTOUR_STEPS)]
    shape = _basis(rng, smooth, 300, 0.004)
    expression = _basis(rng, smooth, 100, 0.003) * (template[:, 2] > 0)[None, :, None]
    regressor = _affine_weights(template, JOINT_PLACES)
    azimuth = np.degrees(np.arctan2(direction[:, 0], direction[:, 2]))
    elevation = np.degrees(np.arcsin(direction[:, 1]))
    skin = np.array([0.72, 0.53, 0.44]) + 0.06 * smooth[:, 1:4]
    tones = rng.normal(size=(50, smooth.shape[1], 3)) * 0.02 / np.arange(1, 51)[:, None, None]
    return Head(
        name=f"test{n_rings}",
        version=str(seed),
        licence="Apache-2.0",
        source="heads_for_tests.make_head",
        template=_float(template),
        faces=faces.astype(np.int32),
        shape_dirs=_float(shape),
        expression_dirs=_float(expression),
        pose_dirs=_float(_basis(rng, smooth, 36, 0.002)),
        joint_regressor=_float(regressor),
        skin_weights=_float(_skinning(template)),
        landmark_triangles=triangles.astype(np.int32),
        landmark_barycentric=_float(barycentric),
        contour_triangles=np.stack([row[0] for row in contour]).astype(np.int32),
        contour_barycentric=_float(np.stack([row[1] for row in contour])),
        uv=_float(np.stack([azimuth / 360 + 0.5, elevation / 180 + 0.5], axis=1)),
        uv_faces=faces.astype(np.int32),
        texture_mean=_float(np.clip(skin, 0, 1)),
        texture_dirs=_float(np.einsum("nh,khc->knc", smooth, tones) * texture),
        masks=_regions(azimuth, elevation),
        expression_names=("jawOpen", "smileLeft", "smileRight"),
    )


def _float(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, dtype=np.float32)


def _aim(azimuth_deg: np.ndarray, elevation_deg: np.ndarray) -> np.ndarray:
    """Unit directions (..., 3) from degrees to the subject's left and degrees up."""
    azimuth, elevation = np.radians(azimuth_deg), np.radians(elevation_deg)
    return np.stack(
        [np.sin(azimuth) * np.cos(elevation), np.sin(elevation), np.cos(azimuth) * np.cos(elevation)], axis=-1
    )


def _sphere(n_rings: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit directions (N, 3) and outward triangles (M, 3): rings from the crown down, the seam at the back."""
    columns = 2 * n_rings
    elevation = 90 - 180 * np.arange(1, n_rings + 1) / (n_rings + 1)
    azimuth = 360 * np.arange(columns) / columns - 180
    rings = _aim(np.tile(azimuth, n_rings), np.repeat(elevation, columns))
    direction = np.concatenate([rings, [[0, 1, 0], [0, -1, 0]]])
    crown, base = len(rings), len(rings) + 1
    here, there = np.arange(columns), (np.arange(columns) + 1) % columns
    faces = [np.stack([np.full(columns, crown), here, there], axis=1)]
    for ring in range(n_rings - 1):
        a, b = ring * columns + here, ring * columns + there
        faces += [np.stack([a, a + columns, b], axis=1), np.stack([b, a + columns, b + columns], axis=1)]
    last = (n_rings - 1) * columns
    faces.append(np.stack([np.full(columns, base), last + there, last + here], axis=1))
    return direction, np.concatenate(faces)


def _bump(direction: np.ndarray, azimuth: float, elevation: float, width: float) -> np.ndarray:
    """(N,) a bell of the given width in degrees about one direction."""
    angle = np.degrees(np.arccos(np.clip(direction @ _aim(np.array(azimuth), np.array(elevation)), -1, 1)))
    return np.exp(-0.5 * (angle / width) ** 2)


def _harmonics(direction: np.ndarray) -> np.ndarray:
    """(N, 35): every monomial in x, y, z up to degree four; smooth over the head."""
    x, y, z = direction.T
    powers = [(i, j, k) for i in range(5) for j in range(5) for k in range(5) if i + j + k <= 4]
    powers.sort(key=sum)
    return np.stack([x**i * y**j * z**k for i, j, k in powers], axis=1)


def _basis(rng: np.random.Generator, smooth: np.ndarray, count: int, total_m: float) -> np.ndarray:
    """(count, N, 3) smooth random directions of falling size, total_m per vertex when all vary by one."""
    basis = np.einsum("nh,khc->knc", smooth, rng.normal(size=(count, smooth.shape[1], 3)))
    basis *= 0.97 ** np.arange(count)[:, None, None]
    return basis * total_m / np.sqrt((basis**2).sum(0).sum(-1).mean())


def _affine_weights(points: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The smallest weights (J, N), each row summing to 1, that take points (N, 3) to places (J, 3)."""
    system = np.concatenate([points.T, np.ones((1, len(points)))])
    return (np.linalg.pinv(system) @ np.concatenate([places.T, np.ones((1, len(places)))])).T


def _skinning(template: np.ndarray) -> np.ndarray:
    """(N, 5): root below, neck above, jaw low in front, a little of each eye around it."""
    x, y, z = template.T
    jaw = _rise((-y - 0.035) / 0.015) * _rise((z - 0.01) / 0.02)
    eyes = [np.exp(-((np.abs(template - place) / 0.02) ** 2).sum(1)) for place in JOINT_PLACES[3:]]
    root = _rise((-y - 0.085) / 0.01) * _rise((-z) / 0.02)
    weights = np.stack([root, np.full_like(x, 0.3), jaw, *eyes], axis=1)
    return weights / weights.sum(1, keepdims=True)


def _rise(value: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(value, -30, 30)))


def _cast(template: np.ndarray, faces: np.ndarray, aims: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where rays from the middle leave the mesh: triangles (P,), barycentric (P, 3)."""
    corners = template[faces]  # (M, 3, 3)
    weights = np.einsum("pc,mck->pmk", aims, np.linalg.inv(corners))  # aim = weights @ corners
    triangles = weights.min(-1).argmax(1)
    chosen = np.clip(weights[np.arange(len(aims)), triangles], 0, None)
    return triangles, chosen / chosen.sum(1, keepdims=True)


def _jaw_line(step: int) -> tuple[np.ndarray, np.ndarray]:
    """The contour in degrees at a row of FLAME's table: 1..39 turn to the subject's left, 40..78 to the right."""
    along = np.linspace(-1, 1, 17)
    azimuth, elevation = 85 * along, -48 + 45 * np.abs(along) ** 2
    hidden, turn = (along > 0, step) if step < 40 else (along < 0, step - 39)
    return np.where(hidden, azimuth * (1 - turn / 90), azimuth), elevation


def _landmarks() -> np.ndarray:
    """Unit directions (68, 3) of iBUG's points."""
    contour = np.stack(_jaw_line(0), axis=1)
    brow = np.array([[-42, 22], [-35, 26], [-27, 27], [-19, 26], [-12, 23]])
    bridge = np.array([[0, 14], [0, 9], [0, 4], [0, -2]])
    nostrils = np.array([[-10, -9], [-5, -10], [0, -11], [5, -10], [10, -9]])
    eye = np.array([[-35, 13], [-29, 16], [-22, 16], [-15, 13], [-22, 11], [-29, 11]])
    turn = np.linspace(np.pi, -np.pi, 12, endpoint=False)
    outer = np.stack([18 * np.cos(turn), -24 + 7 * np.sin(turn)], axis=1)
    turn = np.linspace(np.pi, -np.pi, 8, endpoint=False)
    inner = np.stack([13 * np.cos(turn), -24 + 2 * np.sin(turn)], axis=1)
    mirror = np.array([-1, 1])
    parts = [contour, brow, brow[::-1] * mirror, bridge, nostrils, eye, eye[[3, 2, 1, 0, 5, 4]] * mirror, outer, inner]
    places = np.concatenate(parts)
    return _aim(places[:, 0], places[:, 1])


def _regions(azimuth: np.ndarray, elevation: np.ndarray) -> dict[str, np.ndarray]:
    side = np.abs(azimuth)
    face = (side < 60) & (elevation > -55) & (elevation < 45)
    return {
        "face": face,
        "nose": (side < 12) & (elevation > -14) & (elevation < 16),
        "lips": (side < 20) & (elevation > -34) & (elevation < -14),
        "eye_region": (side > 8) & (side < 45) & (elevation > 5) & (elevation < 30),
        "forehead": (side < 50) & (elevation >= 25) & (elevation < 55),
        "ears": (side > 75) & (side < 105) & (np.abs(elevation) < 20),
        "eyeballs": (side > 18) & (side < 32) & (elevation > 9) & (elevation < 18),
        "scalp": (elevation >= 45) | ((side >= 105) & (elevation > -20)),
        "neck": elevation <= -60,
    }


def write_flame(head: Head, folder: Path) -> Path:
    """Write a head as FLAME's own files, under the names that smplx looks for; the path of the model."""
    dirs = np.concatenate([head.shape_dirs, head.expression_dirs])
    model = {
        "v_template": head.template.astype(np.float64),
        "f": head.faces.astype(np.uint32),
        "shapedirs": np.moveaxis(dirs, 0, 2).astype(np.float64),
        "posedirs": np.moveaxis(head.pose_dirs, 0, 2).astype(np.float64),
        "J_regressor": head.joint_regressor.astype(np.float64),
        "weights": head.skin_weights.astype(np.float64),
        "kintree_table": np.array([[2**32 - 1, 0, 1, 1, 1], [0, 1, 2, 3, 4]], np.int64),
        "bs_style": "lbs",
        "bs_type": "lrotmin",
    }
    static = {
        "lmk_face_idx": head.landmark_triangles[17:].astype(np.uint32),
        "lmk_b_coords": head.landmark_barycentric[17:].astype(np.float64),
    }
    contour = {
        "lmk_face_idx": head.contour_triangles.astype(np.uint32),
        "lmk_b_coords": head.contour_barycentric.astype(np.float64),
    }
    path = folder / "FLAME_NEUTRAL.pkl"
    path.write_bytes(pickle.dumps(model, protocol=2))
    (folder / "flame_static_embedding.pkl").write_bytes(pickle.dumps(static, protocol=2))
    np.save(folder / "flame_dynamic_embedding.npy", np.array(contour, dtype=object), allow_pickle=True)
    return path
