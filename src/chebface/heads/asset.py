"""The one head file: npz arrays in FLAME's layout plus a JSON header, checked whenever it is read or written."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from chebface.errors import AssetError
from chebface.files import whole
from chebface.params import PARTS

FORMAT = 1
JOINTS = ("root", "neck", "jaw", "left_eye", "right_eye")
PARENTS = (-1, 0, 1, 1, 1)
REGIONS = ("face", "nose", "lips", "eye_region", "forehead", "ears", "eyeballs", "scalp", "neck")
# What reading a damaged npz can end in.
_BROKEN = (ValueError, KeyError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
CONTOUR_STEPS = 79  # degrees of yaw: 0..39 to one side, then 1..39 to the other, as in FLAME


@dataclass(frozen=True)
class Head:
    """A morphable head in FLAME's layout. x is the subject's left, y up, z forward; metres.

    N vertices, M triangles, T texture points. Every array is C-contiguous; floats are float32, indices int32.
    """

    name: str
    version: str
    licence: str
    source: str
    template: np.ndarray  # (N, 3) m
    faces: np.ndarray  # (M, 3)
    shape_dirs: np.ndarray  # (300, N, 3) m per standard deviation
    expression_dirs: np.ndarray  # (100, N, 3) m per unit
    pose_dirs: np.ndarray  # (36, N, 3) m per entry of (R - I) of neck, jaw, left eye, right eye, row-major
    joint_regressor: np.ndarray  # (5, N), rows sum to 1
    skin_weights: np.ndarray  # (N, 5), rows sum to 1
    landmark_triangles: np.ndarray  # (68,)
    landmark_barycentric: np.ndarray  # (68, 3)
    contour_triangles: np.ndarray  # (79, 17): the jaw line seen at each degree of yaw
    contour_barycentric: np.ndarray  # (79, 17, 3)
    uv: np.ndarray  # (T, 2) in [0, 1], v up
    uv_faces: np.ndarray  # (M, 3) into uv
    texture_mean: np.ndarray  # (N, 3) RGB albedo in [0, 1]
    texture_dirs: np.ndarray  # (50, N, 3) per standard deviation
    masks: dict[str, np.ndarray] = field(default_factory=dict)  # region -> (N,) bool
    expression_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check(self)

    @cached_property
    def sha256(self) -> str:
        """Digest of names and arrays: the identity of the head, the same on every machine that made it."""
        digest = hashlib.sha256()
        for name, array in sorted(self._arrays().items()):
            digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    @property
    def facts(self) -> dict[str, str]:
        """What every artefact made with this head records of it."""
        return {"name": self.name, "version": self.version, "licence": self.licence, "sha256": self.sha256}

    def _arrays(self) -> dict[str, np.ndarray]:
        arrays = {f.name: getattr(self, f.name) for f in fields(self)}
        named = {name: value for name, value in arrays.items() if isinstance(value, np.ndarray)}
        return named | {f"mask_{region}": mask for region, mask in self.masks.items()}


def _shapes(n: int, m: int, t: int) -> dict[str, tuple[int, ...]]:
    return {
        "template": (n, 3),
        "faces": (m, 3),
        "shape_dirs": (PARTS["shape"], n, 3),
        "expression_dirs": (PARTS["expression"], n, 3),
        "pose_dirs": (36, n, 3),
        "joint_regressor": (len(JOINTS), n),
        "skin_weights": (n, len(JOINTS)),
        "landmark_triangles": (68,),
        "landmark_barycentric": (68, 3),
        "contour_triangles": (CONTOUR_STEPS, 17),
        "contour_barycentric": (CONTOUR_STEPS, 17, 3),
        "uv": (t, 2),
        "uv_faces": (m, 3),
        "texture_mean": (n, 3),
        "texture_dirs": (PARTS["texture"], n, 3),
    }


_LIMITS = {  # index array -> the array whose length bounds it
    "faces": "template",
    "landmark_triangles": "faces",
    "contour_triangles": "faces",
    "uv_faces": "uv",
}


def _check(head: Head) -> None:
    if head.template.ndim != 2 or head.faces.ndim != 2 or head.uv.ndim != 2:
        raise AssetError(f"head {head.name}: template, faces and uv must be two-dimensional")
    for name, shape in _shapes(len(head.template), len(head.faces), len(head.uv)).items():
        array = getattr(head, name)
        want = np.int32 if name in _LIMITS else np.float32
        if array.shape != shape or array.dtype != want:
            raise AssetError(
                f"head {head.name}: {name}: expected {shape} {np.dtype(want)}, got {array.shape} {array.dtype}"
            )
        if want is np.float32 and not np.isfinite(array).all():
            raise AssetError(f"head {head.name}: {name} has values that are not finite")
    for name, bound in _LIMITS.items():
        array, limit = getattr(head, name), len(getattr(head, bound))
        if array.size and (array.min() < 0 or array.max() >= limit):
            raise AssetError(f"head {head.name}: {name} points outside {bound} (0..{limit - 1})")
    for name, sums in (("joint_regressor", head.joint_regressor.sum(1)), ("skin_weights", head.skin_weights.sum(1))):
        if np.abs(sums - 1).max() > 1e-3:
            raise AssetError(f"head {head.name}: rows of {name} must sum to 1")
    for region, mask in head.masks.items():
        if mask.shape != (len(head.template),) or mask.dtype != np.bool_:
            raise AssetError(f"head {head.name}: mask {region}: expected ({len(head.template)},) bool")


def save(head: Head, path: str | Path) -> Path:
    """Write a head file, whole or not at all.

    Raises:
        OSError: the disk refuses.
    """
    path = Path(path)
    header = {
        "format": FORMAT,
        "name": head.name,
        "version": head.version,
        "licence": head.licence,
        "source": head.source,
        "units": {"length": "m", "angle": "rad"},
        "sha256": head.sha256,
        "expression_names": list(head.expression_names),
        "regions": sorted(head.masks),
    }
    arrays: dict[str, Any] = {"header": np.frombuffer(json.dumps(header).encode(), np.uint8), **head._arrays()}
    with whole(path) as partial, open(partial, "wb") as file:
        np.savez_compressed(file, **arrays)
    return path


def load(path: str | Path) -> Head:
    """Read and check a head file.

    Raises:
        AssetError: missing, not a head file, of another format, damaged, or not what its digest says.
    """
    path = Path(path)
    if not path.is_file():
        raise AssetError(f"head file {path}: not found; `chebface head build` makes the open head")
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        header = json.loads(arrays.pop("header").tobytes())
    except _BROKEN as error:
        raise AssetError(f"head file {path}: not a whole chebface head ({error}); build or import it again") from error
    version = header.get("format") if isinstance(header, dict) else None
    if version != FORMAT:
        raise AssetError(f"head file {path}: format {version}, wanted {FORMAT}; build or import it again")
    masks = {name[5:]: arrays.pop(name) for name in list(arrays) if name.startswith("mask_")}
    try:
        head = Head(
            **{key: header[key] for key in ("name", "version", "licence", "source")},
            **arrays,
            masks=masks,
            expression_names=tuple(header["expression_names"]),
        )
    except (TypeError, KeyError) as error:
        raise AssetError(f"head file {path}: its parts are not those of a head ({error})") from error
    if head.sha256 != header.get("sha256"):
        raise AssetError(f"head file {path}: contents differ from the recorded sha256; build or import it again")
    return head
