"""Official FLAME files to one head file, without chumpy and without running what a pickle asks for.

Keys, shapes and units are those of the FLAME, DECA and MICA downloads; `unpickle` reads the files themselves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from chebface.errors import AssetError
from chebface.heads.asset import CONTOUR_STEPS, JOINTS, PARENTS, REGIONS, Head
from chebface.heads.unpickle import read_named
from chebface.mesh import read_obj
from chebface.params import PARTS

LICENCE = "FLAME licence (research only unless FLAME 2023 Open, CC-BY-4.0)"
SKIN_RGB = (0.71, 0.54, 0.45)  # a middle skin tone, for heads that come without a texture space
_MASK_PARTS = {"ears": ("left_ear", "right_ear"), "eyeballs": ("left_eyeball", "right_eyeball")}
_MODEL_KEYS = ("v_template", "f", "shapedirs", "posedirs", "J_regressor", "weights", "kintree_table")


def read_flame(
    path: str | Path,
    *,
    landmarks: str | Path | None = None,
    contour: str | Path | None = None,
    masks: str | Path | None = None,
    texture: str | Path | None = None,
    uv: str | Path | None = None,
    name: str | None = None,
    version: str | None = None,
    licence: str = LICENCE,
) -> Head:
    """Read a FLAME model and the files that go with it.

    Args:
        path: generic_model.pkl, flame2023.pkl, flame2023_Open.pkl, or an npz with the same keys.
        landmarks: landmark_embedding.npy (DECA, MICA), or flame_static_embedding_68.pkl, or the 51-point
            flame_static_embedding.pkl; npz copies too. Required.
        contour: flame_dynamic_embedding.npy; needed unless `landmarks` has the contour tables itself.
        masks: FLAME_masks.pkl. Without it the head has no region masks.
        texture: FLAME_texture.npz (BGR, 0..255), sampled at the vertices. Without it the mean is one middle skin
            tone and the 50 directions are zero.
        uv: head_template_uv.obj or head_template.obj with texture coordinates. Without it they are taken from
            `texture`; without either they are a cylinder around the head, one point per vertex, seam at the back.
        name: of the head; the file's own name otherwise.
        version: of the head; "1" otherwise.
        licence: what the user holds the files under.

    Raises:
        AssetError: a file is missing, damaged, incomplete or made for another mesh.
        UnsafeFileError: a pickle names a class that arrays do not need.
    """
    path = Path(path)
    model = read_named(path)
    missing = [key for key in _MODEL_KEYS if key not in model]
    if missing:
        raise AssetError(f"{path}: not a whole FLAME model, no {', '.join(missing)}; get it at flame.is.tue.mpg.de")
    template = _array(path, model, "v_template", (None, 3))
    n = len(template)
    faces = _array(path, model, "f", (None, 3))
    want = PARTS["shape"] + PARTS["expression"]
    dirs = _array(path, model, "shapedirs", (n, 3, None))
    if dirs.shape[2] < want:
        raise AssetError(
            f"{path}: shapedirs: wanted {PARTS['shape']} shape + {PARTS['expression']} expression directions, "
            f"got {dirs.shape[2]}; take the full model"
        )
    dirs = np.moveaxis(dirs[:, :, :want], 2, 0)  # (400, N, 3)
    parents = _array(path, model, "kintree_table", (2, len(JOINTS)))[0]
    if tuple(parents[1:]) != PARENTS[1:]:
        raise AssetError(f"{path}: kintree_table: wanted parents {PARENTS}, got {tuple(parents.tolist())}")
    if landmarks is None:
        raise AssetError(
            "landmarks: no file given; take landmark_embedding.npy from DECA's or MICA's data folder, or "
            "flame_static_embedding_68.pkl with flame_dynamic_embedding.npy as contour"
        )
    space = read_named(Path(texture)) if texture is not None else {}
    uv_points, uv_faces = _read_uv(uv, texture, space, template, faces)
    if texture is None:
        tones = np.tile(SKIN_RGB, (n, 1)), np.zeros((PARTS["texture"], n, 3))
    else:
        corners = np.stack([faces.ravel(), uv_faces.ravel()], axis=1)
        tones = _sample_texture(Path(texture), space, uv_points, corners, n)
    points, triangles = _read_landmarks(Path(landmarks), None if contour is None else Path(contour))
    return Head(
        name=name or path.stem,
        version=version or "1",
        licence=licence,
        source=", ".join(Path(file).name for file in (path, landmarks, contour, masks, texture, uv) if file),
        template=_floats(template),
        faces=_indices(faces),
        shape_dirs=_floats(dirs[: PARTS["shape"]]),
        expression_dirs=_floats(dirs[PARTS["shape"] :]),
        pose_dirs=_floats(np.moveaxis(_array(path, model, "posedirs", (n, 3, 36)), 2, 0)),
        joint_regressor=_floats(_array(path, model, "J_regressor", (len(JOINTS), n))),
        skin_weights=_floats(_array(path, model, "weights", (n, len(JOINTS)))),
        landmark_triangles=_indices(triangles[0]),
        landmark_barycentric=_floats(points[0]),
        contour_triangles=_indices(triangles[1]),
        contour_barycentric=_floats(points[1]),
        uv=_floats(uv_points),
        uv_faces=_indices(uv_faces),
        texture_mean=_floats(tones[0]),
        texture_dirs=_floats(tones[1]),
        masks={} if masks is None else _read_masks(Path(masks), n),
    )


def _floats(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, np.float32)


def _indices(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, np.int32)


def _array(path: Path, record: dict[str, Any], key: str, shape: tuple[int | None, ...]) -> np.ndarray:
    """One numeric array of a file, its shape checked; None matches any length."""
    array = record.get(key)
    if isinstance(array, list):  # the contour tables are published as lists of rows
        try:
            array = np.array(array)
        except ValueError:  # rows of several lengths; the message below says what was wanted
            pass
    if (
        isinstance(array, np.ndarray)
        and array.dtype.kind in "iuf"
        and array.ndim == len(shape)
        and all(want in (None, got) for want, got in zip(shape, array.shape, strict=True))
    ):
        return array
    wanted = ", ".join("*" if size is None else str(size) for size in shape)
    got = f"{array.shape} {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
    raise AssetError(f"{path}: {key}: expected numbers ({wanted}), got {got}")


def _read_landmarks(path: Path, contour: Path | None) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Barycentric ((68, 3), (79, 17, 3)) and triangles ((68,), (79, 17)): the static points, the contour tables."""
    steps = (CONTOUR_STEPS, 17)
    record = read_named(path)
    if "static_lmk_faces_idx" in record:
        triangles = _array(path, record, "static_lmk_faces_idx", (51,))
        weights = _array(path, record, "static_lmk_bary_coords", (51, 3))
    else:
        triangles = _array(path, record, "lmk_face_idx", (None,))
        weights = _array(path, record, "lmk_b_coords", (len(triangles), 3))
        if len(triangles) not in (51, 68):
            raise AssetError(f"{path}: lmk_face_idx: expected 51 or 68 landmarks, got {len(triangles)}")
    if contour is not None:
        rows = read_named(contour)
        contour_triangles = _array(contour, rows, "lmk_face_idx", steps)
        contour_weights = _array(contour, rows, "lmk_b_coords", (*steps, 3))
    elif "dynamic_lmk_faces_idx" in record:
        contour_triangles = _array(path, record, "dynamic_lmk_faces_idx", steps)
        contour_weights = _array(path, record, "dynamic_lmk_bary_coords", (*steps, 3))
    else:
        raise AssetError(f"contour: no file given and {path} has no contour tables; give flame_dynamic_embedding.npy")
    if len(triangles) == 51:  # the jaw line seen from the front completes them
        triangles = np.concatenate([contour_triangles[0], triangles])
        weights = np.concatenate([contour_weights[0], weights])
    return (weights, contour_weights), (triangles, contour_triangles)


def _read_masks(path: Path, n: int) -> dict[str, np.ndarray]:
    record = read_named(path)
    masks = {}
    for region in REGIONS:
        mask = np.zeros(n, bool)
        for part in _MASK_PARTS.get(region, (region,)):
            indices = _array(path, record, part, (None,)).astype(np.int64)
            if indices.size and (indices.min() < 0 or indices.max() >= n):
                raise AssetError(f"{path}: {part} points outside the {n} vertices; it is made for another mesh")
            mask[indices] = True
        masks[region] = mask
    return masks


def _read_uv(
    uv: str | Path | None, texture: str | Path | None, space: dict[str, Any], template: np.ndarray, faces: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Texture points (T, 2), v up, and their triangles (M, 3), in the order of faces."""
    if uv is not None:
        mesh = read_obj(uv)
        if mesh.uv is None or mesh.uv_faces is None:
            raise AssetError(f"{uv}: has no texture coordinates; take FLAME's head_template.obj")
        if not np.array_equal(mesh.faces, faces):
            raise AssetError(f"{uv}: its triangles are not the model's; take FLAME's head_template.obj")
        return mesh.uv, mesh.uv_faces
    if texture is not None:
        shape = (len(faces), 3)
        return _array(Path(texture), space, "vt", (None, 2)), _array(Path(texture), space, "ft", shape)
    x, y, z = template.T
    height = (y - y.min()) / (y.max() - y.min())
    return np.stack([np.arctan2(x, z) / (2 * np.pi) + 0.5, height], axis=1), faces


def _sample_texture(
    path: Path, space: dict[str, Any], uv: np.ndarray, corners: np.ndarray, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mean (N, 3) and directions (50, N, 3) in RGB: bilinear at each vertex, averaged over its texture points.

    corners (3 M, 2) pairs each triangle corner's vertex with its texture point.
    """
    count = PARTS["texture"]
    mean = _array(path, space, "mean", (None, None, 3))
    height, width = mean.shape[:2]
    dirs = _array(path, space, "tex_dir", (height, width, 3, None))
    if dirs.shape[3] < count:
        raise AssetError(f"{path}: tex_dir: wanted {count} directions, got {dirs.shape[3]}")
    pairs = np.unique(corners.astype(np.int64), axis=0)
    if pairs[:, 1].min() < 0 or pairs[:, 1].max() >= len(uv):
        raise AssetError(f"{path}: texture triangles point outside the {len(uv)} texture points")
    spread = np.bincount(pairs[:, 0], minlength=n)
    column = np.clip(uv[pairs[:, 1], 0] * width - 0.5, 0, width - 1)  # row 0 is the top, v = 1
    row = np.clip((1 - uv[pairs[:, 1], 1]) * height - 0.5, 0, height - 1)
    left, top = column.astype(int), row.astype(int)
    found = np.zeros((n, 3, 1 + count))
    for y, x in ((0, 0), (0, 1), (1, 0), (1, 1)):
        share = np.abs(1 - y - (row - top)) * np.abs(1 - x - (column - left)) / spread[pairs[:, 0]]
        at = np.minimum(top + y, height - 1), np.minimum(left + x, width - 1)
        pixels = np.concatenate([mean[at][..., None], dirs[at][..., :count]], axis=-1)
        np.add.at(found, pairs[:, 0], share[:, None, None] * pixels)
    found = found[:, ::-1] / 255  # BGR to RGB
    return np.clip(found[..., 0], 0, 1), np.moveaxis(found[..., 1:], 2, 0)
