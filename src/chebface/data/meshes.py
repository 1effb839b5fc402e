"""Registered meshes to train the mesh encoder with: a folder of them, or heads sampled from a morphable one.

Folders, in this order of trial; `<actor>` is one person:
- MICA's layout: `[NAME/]registrations/<actor>/*.obj`;
- MICA's parameters, where a head is given: `[NAME/]FLAME_parameters/<actor>/*.npz`, `betas` being 300 shape numbers
  and then expression; the mesh is the head of that shape, without expression and pose;
- any folder of OBJ, PLY and npz files. The actor is the subfolder a file lies in; for files that lie in the folder
  itself, the name up to the first underscore. An npz holds `vertices` (N, 3) or (S, N, 3), may hold `faces` (M, 3) and
  may name the S actors in `actors`.
All meshes must have one topology. They are held in memory: 60 KB for each mesh of FLAME's size.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from chebface import params
from chebface.errors import AssetError, InputError
from chebface.heads.asset import Head
from chebface.mesh import read_obj, read_ply

UNITS = {"m": 1.0, "cm": 0.01, "mm": 0.001}
SPAN = (0.02, 2.0)  # metres: a head's mesh measures less than this and more than that, whatever it includes
CLIP = 3.0  # standard deviations
NAMED = 5  # files that an error names
_BROKEN = (ValueError, KeyError, OSError, EOFError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True, eq=False)
class Meshes:
    """S meshes of one topology, and whose they are."""

    vertices: np.ndarray  # (S, N, 3) float32, m
    faces: np.ndarray  # (M, 3) int32
    actors: tuple[str, ...]  # S names
    about: dict[str, Any] = field(default_factory=dict)  # where they are from, for a model card

    def __len__(self) -> int:
        return len(self.vertices)

    @property
    def sha256(self) -> str:
        """Digest of vertices, faces and actors."""
        digest = hashlib.sha256("\0".join(self.actors).encode())
        digest.update(np.ascontiguousarray(self.faces).tobytes())
        digest.update(np.ascontiguousarray(self.vertices).tobytes())
        return digest.hexdigest()

    def split(self, held_out: float, seed: int = 0) -> tuple[Meshes, Meshes]:
        """Two sets that share no actor; the second has about the share `held_out` of the actors, at least one.

        Raises:
            InputError: held_out is not between 0 and 1, or there are fewer than two actors.
        """
        if not 0 < held_out < 1:
            raise InputError(f"held_out: expected a share between 0 and 1, got {held_out}")
        people = sorted(set(self.actors))
        if len(people) < 2:
            raise InputError(f"meshes: expected two actors or more, to hold one out, got {people}")
        count = min(max(1, round(held_out * len(people))), len(people) - 1)
        chosen = np.random.default_rng(seed).permutation(len(people))[:count]
        out = {people[i] for i in chosen}
        away = np.array([actor in out for actor in self.actors])
        return self._take(np.flatnonzero(~away)), self._take(np.flatnonzero(away))

    def _take(self, wanted: np.ndarray) -> Meshes:
        return Meshes(self.vertices[wanted], self.faces, tuple(self.actors[i] for i in wanted), self.about)


def sample_head(
    head: Head, people: int, *, seed: int = 0, expressions: int = 1, strength: float = 0.0, first: int = 0
) -> Meshes:
    """Draw people from a head: shape numbers normal and clipped at 3, each person with one or more expressions.

    Args:
        head: the head.
        people: how many; their names are their indices.
        seed: of everything; person i is the same however many there are.
        expressions: meshes per person.
        strength: of expressions; 0 for none. A blendshape head gets a few at up to this strength, a statistical one
            normal numbers of this deviation.
        first: the index of the first person.

    Raises:
        InputError: fewer than one person or expression.
    """
    if people < 1 or expressions < 1:
        raise InputError(f"people, expressions: expected at least 1, got {people}, {expressions}")
    shape = np.empty((people, params.PARTS["shape"]), np.float32)
    expression = np.zeros((people, expressions, params.PARTS["expression"]), np.float32)
    for i in range(people):
        rng = np.random.default_rng([seed, first + i])
        shape[i] = np.clip(rng.normal(size=shape.shape[1]), -CLIP, CLIP)
        if strength:
            expression[i] = strength * _draw_expressions(rng, expression.shape[1:], bool(head.expression_names))
    flat = (head.shape_dirs.reshape(len(head.shape_dirs), -1), head.expression_dirs.reshape(expression.shape[2], -1))
    vertices = np.empty((people, expressions, head.template.size), np.float32)
    for start in range(0, people, 512):  # in parts: the products' temporaries stay small
        part = slice(start, start + 512)
        vertices[part] = (head.template.reshape(-1) + shape[part] @ flat[0])[:, None]
        if strength:
            vertices[part] += expression[part] @ flat[1]
    about = {
        "source": f"sampled from head {head.name} {head.version}",
        "head_sha256": head.sha256,
        "people": people,
        "expressions": expressions,
        "strength": strength,
        "seed": seed,
    }
    actors = tuple(str(first + i) for i in range(people) for _ in range(expressions))
    return Meshes(vertices.reshape(-1, *head.template.shape), head.faces, actors, about)


def _draw_expressions(rng: np.random.Generator, shape: tuple[int, ...], blendshapes: bool) -> np.ndarray:
    if not blendshapes:
        return rng.normal(size=shape)
    return rng.beta(1.1, 2.0, shape) * (rng.random(shape) < 0.15)


def read_folder(folder: str | Path, head: Head | None = None, *, unit: str = "m") -> Meshes:
    """Read a folder of registered meshes in one of the layouts above.

    Args:
        folder: the folder.
        head: whose topology meshes without faces have, and whose parameters are read.
        unit: of the files: m, cm or mm.

    Raises:
        InputError: an unknown unit.
        AssetError: no such folder, no mesh in it, or files that cannot be used: unreadable, not finite, of another
            topology than the most, or of a size that is no head's in that unit. They are counted, the first are named.
    """
    folder = Path(folder)
    if unit not in UNITS:
        raise InputError(f"unit: expected one of {', '.join(UNITS)}, got {unit!r}")
    if not folder.is_dir():
        raise AssetError(f"meshes {folder}: no such folder")
    layout, files, read = _find(folder, head)
    parts: list[_Part] = []
    problems: list[str] = []
    for path, actor in files:
        try:
            found = read(path, actor)
            _check(found, path)
            parts.append(found)
        except AssetError as error:
            problems.append(str(error))
    standard = _settle(parts, head, folder)
    span = SPAN[0] / UNITS[unit], SPAN[1] / UNITS[unit]
    for part in parts:
        problems += _misfits(part, standard, span, unit)
    if problems:
        more = f" and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        raise AssetError(
            f"meshes {folder}: {len(problems)} of {len(files)} files cannot be used: "
            f"{'; '.join(problems[:NAMED])}{more}. Mend them or take them away"
        )
    vertices = np.concatenate([part.vertices for part in parts])
    vertices *= np.float32(UNITS[unit])
    actors = tuple(actor for part in parts for actor in part.actors)
    about = {"source": layout, "meshes": len(vertices), "people": len(set(actors))}
    return Meshes(vertices, standard, actors, about)


@dataclass(frozen=True)
class _Part:
    """What one file holds."""

    path: Path
    vertices: np.ndarray  # (S, N, 3) float32, in the files' unit
    faces: np.ndarray | None
    actors: tuple[str, ...]

    @property
    def topology(self) -> tuple[int, bytes]:
        return self.vertices.shape[1], b"" if self.faces is None else hashlib.sha256(self.faces.tobytes()).digest()


_Read = Callable[[Path, str], _Part]


def _find(folder: Path, head: Head | None) -> tuple[str, list[tuple[Path, str]], _Read]:
    """The layout's name, (file, actor) in a fixed order, and the reader of one."""

    def below(kind: str, suffixes: set[str]) -> Iterator[tuple[Path, str]]:
        for top in (folder / kind, *sorted(folder.glob(f"*/{kind}"))):
            for path in sorted(top.glob("*/*")):
                if path.suffix.lower() in suffixes:
                    yield path, path.parent.relative_to(folder).as_posix().replace(f"{kind}/", "")

    registered = list(below("registrations", {".obj", ".ply"}))
    if registered:
        return "registrations in MICA's layout", registered, _read_mesh
    fitted = list(below("FLAME_parameters", {".npz"}))
    if fitted and head is not None:
        return f"parameters in MICA's layout, on head {head.name}", fitted, lambda path, actor: _pose(path, actor, head)
    if fitted:
        raise AssetError(f"meshes {folder}: holds FLAME parameters, which want a head; name it in the settings (head)")
    kinds = {".obj", ".ply", ".npz"}
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in kinds and path.is_file())
    if not paths:
        raise AssetError(
            f"meshes {folder}: no .obj, .ply or .npz in it; expected MICA's layout (registrations/<actor>/*.obj) or "
            "files of one topology"
        )
    return "files", [(path, _actor(path, folder)) for path in paths], _read_mesh


def _actor(path: Path, folder: Path) -> str:
    if path.parent == folder:
        return path.stem.split("_")[0]
    return path.parent.relative_to(folder).as_posix()


def _read_mesh(path: Path, actor: str) -> _Part:
    if path.suffix.lower() == ".npz":
        return _read_npz(path, actor)
    mesh = (read_obj if path.suffix.lower() == ".obj" else read_ply)(path)
    return _Part(path, mesh.vertices[None].astype(np.float32), mesh.faces if len(mesh.faces) else None, (actor,))


def _read_npz(path: Path, actor: str) -> _Part:
    arrays = _load(path)
    vertices, faces = arrays.get("vertices"), arrays.get("faces")
    if vertices is None or vertices.ndim not in (2, 3) or vertices.shape[-1] != 3 or vertices.dtype.kind != "f":
        raise AssetError(f"mesh {path}: expected `vertices` (N, 3) or (S, N, 3) floats, got {_say(vertices)}")
    if faces is not None and (faces.ndim != 2 or faces.shape[1] != 3 or faces.dtype.kind not in "iu"):
        raise AssetError(f"mesh {path}: expected `faces` (M, 3) integers, got {_say(faces)}")
    vertices = (vertices if vertices.ndim == 3 else vertices[None]).astype(np.float32)
    actors = arrays.get("actors")
    if actors is None:
        names = (actor,) * len(vertices)
    elif actors.shape != (len(vertices),):
        raise AssetError(f"mesh {path}: expected `actors` ({len(vertices)},), got {_say(actors)}")
    else:
        names = tuple(str(name) for name in actors)
    return _Part(path, vertices, None if faces is None else faces.astype(np.int32), names)


def _pose(path: Path, actor: str, head: Head) -> _Part:
    betas = _load(path).get("betas")
    wanted = params.PARTS["shape"]
    if betas is None or betas.size < wanted or betas.dtype.kind != "f":
        raise AssetError(f"parameters {path}: expected `betas` with {wanted} shape numbers or more, got {_say(betas)}")
    shape = betas.reshape(-1)[:wanted].astype(np.float32)
    vertices = head.template + np.tensordot(shape, head.shape_dirs, 1)
    return _Part(path, vertices[None].astype(np.float32), head.faces, (actor,))


def _load(path: Path) -> dict[str, np.ndarray]:
    try:
        # From memory: numpy leaves a file open that is no zip.
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except _BROKEN as error:
        raise AssetError(f"file {path}: not a whole npz of plain arrays ({error})") from error


def _say(array: np.ndarray | None) -> str:
    return "none" if array is None else f"{array.shape} {array.dtype}"


def _check(part: _Part, path: Path) -> None:
    if part.vertices.shape[1] == 0 or len(part.vertices) == 0:
        raise AssetError(f"mesh {path}: has no vertices")
    if not np.isfinite(part.vertices).all():
        raise AssetError(f"mesh {path}: has coordinates that are not finite")


def _settle(parts: list[_Part], head: Head | None, folder: Path) -> np.ndarray:
    """The faces that most of the files have."""
    votes = Counter(part.topology for part in parts if part.faces is not None)
    if votes:
        most = votes.most_common(1)[0][0]
        return next(part.faces for part in parts if part.faces is not None and part.topology == most)
    if head is not None:
        return head.faces
    if not parts:
        return np.empty((0, 3), np.int32)
    raise AssetError(f"meshes {folder}: no file has faces; put `faces` (M, 3) into one, or name the head they are of")


def _misfits(part: _Part, faces: np.ndarray, span: tuple[float, float], unit: str) -> list[str]:
    count = int(faces.max()) + 1
    found = part.vertices.shape[1]
    if part.faces is not None and not np.array_equal(part.faces, faces):
        return [
            f"mesh {part.path}: another topology ({found} vertices, {len(part.faces)} triangles; the most have "
            f"{count} and {len(faces)})"
        ]
    if found != count:
        return [f"mesh {part.path}: {found} vertices, where the faces are of {count}"]
    size = float((part.vertices.max(1) - part.vertices.min(1)).max())
    if not span[0] <= size <= span[1]:
        return [f"mesh {part.path}: spans {size:g} {unit}, which is no head; set unit to the files' own"]
    return []
