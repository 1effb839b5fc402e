"""Folders in MICA's layout: photographs of people whose FLAME shape is known, as they are and packed into shards.

Below ROOT, for each dataset NAME (FACEWAREHOUSE, LYHM, STIRLING, FLORENCE, D3DFACS, FRGC, BP4D, BU3DFE, ...):

    NAME/FLAME_parameters/<actor>/*.npz    `betas`: 300 shape numbers, then expression
    NAME/images/<actor>/*                  photographs; `<name>_kpt.npy` or `.txt` beside one: its 68 landmarks, pixels
    NAME/arcface_input/<actor>/*           MICA's crops of them, 224 px, for who has no photographs
    image_paths/NAME.npy                   MICA's list, if it is there: actor -> ([<actor>/<picture>], <actor>/<npz>)

Without a list all pictures are taken, with the first npz of each actor by name. Of the parameters only the shape is
used: expression and pose are those of the actor's one scan, not of the photographs. The registrations are not read, nor
the .npy beside the crops, which hold the same pixels at 112 px.

A photograph becomes the wide frame by the five points of its landmarks, where it has any, or of the largest face that
the detector finds. A crop needs neither: insightface puts the aligned pixel x of the 112 px template at 2 x.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from chebface import params, photo
from chebface.config import Pack, to_dict
from chebface.crop import (
    ARCFACE_POINTS_PX,
    WIDE_MATRIX,
    WIDE_PX,
    compose,
    estimate_similarity,
    five_points,
    transform,
    warp,
)
from chebface.data.sample import INDEX, Sample, Shards, is_held_out, write_shard
from chebface.detect import Detector, open_detector
from chebface.errors import AssetError, InputError, PhotoError
from chebface.files import write_whole
from chebface.heads import open_head
from chebface.heads.unpickle import read_named
from chebface.signature import CROP_PX, LANDMARKS

PARAMETERS, PHOTOS, CROPS = "FLAME_parameters", "images", "arcface_input"
PARTS = ("train", "held-out")
REPORT = "report.json"
_PLAN = "plan.json"
_SOURCES = {"auto": (PHOTOS, CROPS), "images": (PHOTOS,), "arcface": (CROPS,)}
_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
_OUTSIDE = 0.1  # of the picture's longer side: a chin or an ear may be cut off, but not more
_BLOCK = 64  # photographs in work at a time


@dataclass(frozen=True)
class Problem:
    """Something that could not be used, and how many photographs that costs."""

    kind: str  # missing or broken, and what
    path: str  # below the root
    detail: str
    photos: int


@dataclass(frozen=True)
class Report:
    """What became of the folders."""

    photos: dict[str, int]  # by part: train, held-out
    actors: dict[str, int]
    problems: tuple[Problem, ...]

    @property
    def left_out(self) -> dict[str, int]:
        """Photographs that could not be used, by kind of problem."""
        counts: Counter[str] = Counter()
        for problem in self.problems:
            counts[problem.kind] += problem.photos
        return dict(counts)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "photos": self.photos,
            "actors": self.actors,
            "left_out": self.left_out,
            "problems": [asdict(problem) for problem in self.problems],
        }


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture that is there, of an actor whose shape is known."""

    actor: str  # NAME/<actor>
    path: Path
    shape: np.ndarray  # (300,) float32
    is_crop: bool  # one of MICA's
    landmarks: Path | None


class _UnusableError(Exception):
    """A picture cannot be used: kind of problem, file, detail."""

    def __init__(self, kind: str, path: Path, detail: str) -> None:
        super().__init__(kind, path, detail)
        self.kind, self.path, self.detail = kind, path, detail


def find_names(root: str | Path) -> list[str]:
    """The datasets below a folder: those that have FLAME parameters.

    Raises:
        AssetError: none.
    """
    names = sorted(path.parent.name for path in Path(root).glob(f"*/{PARAMETERS}") if path.is_dir())
    if not names:
        raise AssetError(f"dataset {root}: no NAME/{PARAMETERS} in it; give the folder that holds MICA's datasets")
    return names


def find_pictures(root: str | Path, name: str, config: Pack) -> tuple[list[Picture], list[Problem]]:
    """Every picture of a dataset that is there, in a fixed order, and what is missing or has no usable parameters.

    Args:
        root: holds the datasets.
        name: of one of them, as its folder is called.
        config: `pictures` and `lists` are used.

    Raises:
        AssetError: a folder is not there at all, or a list cannot be read.
        UnsafeFileError: a list asks for code to be run.
    """
    root = Path(root)
    folder = root / name
    if not (folder / PARAMETERS).is_dir():
        raise AssetError(f"dataset {folder}: no {PARAMETERS} in it; expected MICA's layout, {PARAMETERS}/<actor>/*.npz")
    sources = _SOURCES[config.pictures]
    if not any((folder / source).is_dir() for source in sources):
        raise AssetError(
            f"dataset {folder}: no {' or '.join(sources)} in it; MICA's files come without photographs: put those of "
            f"the dataset's publisher at {PHOTOS}/<actor>/"
        )
    pictures: list[Picture] = []
    problems: list[Problem] = []
    for actor, relatives, parameters in _list(root, name, config):
        if parameters is None:
            what = f"{name}/{PARAMETERS}/{actor}"
            problems.append(Problem("missing parameters", what, "no .npz for this actor", len(relatives)))
            continue
        try:
            shape = _read_shape(folder / PARAMETERS / parameters)
        except _UnusableError as error:
            what = error.path.relative_to(root).as_posix()
            problems.append(Problem(error.kind, what, error.detail, len(relatives)))
            continue
        if not relatives:
            problems.append(Problem("no pictures", f"{name}/{PARAMETERS}/{actor}", "parameters without a picture", 0))
        for relative in relatives:
            source = next((s for s in sources if (folder / s / relative).is_file()), None)
            if source is None:
                what = f"{name}/{relative}"
                problems.append(Problem("missing picture", what, f"in the list, not in {' or '.join(sources)}", 1))
                continue
            path = folder / source / relative
            pictures.append(Picture(f"{name}/{actor}", path, shape, source == CROPS, _landmarks_of(path)))
    return pictures, problems


def _list(root: Path, name: str, config: Pack) -> Iterator[tuple[str, list[str], str | None]]:
    """Each actor with pictures, <actor>/<picture>, and parameters, <actor>/<npz>."""
    path = (Path(config.lists) if config.lists else root / "image_paths") / f"{name}.npy"
    if path.is_file():
        yield from _read_list(path)
        return
    if config.lists:
        raise AssetError(f"image list {path}: not found; set lists to the folder that holds it, or to nothing")
    folder = root / name
    found: dict[str, set[str]] = {}
    for source in _SOURCES[config.pictures]:
        for file in (folder / source).glob("*/*"):
            if file.suffix.lower() in _SUFFIXES and file.is_file():
                found.setdefault(file.parent.name, set()).add(f"{file.parent.name}/{file.name}")
    actors = {path.name for path in (folder / PARAMETERS).iterdir() if path.is_dir()}
    for actor in sorted(actors | found.keys()):
        files = sorted((folder / PARAMETERS / actor).glob("*.npz"))
        yield actor, sorted(found.get(actor, ())), f"{actor}/{files[0].name}" if files else None


def _read_list(path: Path) -> Iterator[tuple[str, list[str], str | None]]:
    for actor, entry in read_named(path).items():
        match entry:
            case ([*relatives], str(parameters)) if all(isinstance(relative, str) for relative in relatives):
                for inside in (str(actor), parameters, *relatives):
                    if PurePosixPath(inside).is_absolute() or ".." in PurePosixPath(inside).parts:
                        raise AssetError(f"image list {path}: {inside!r} leads out of the dataset's folder")
                yield str(actor), list(relatives), parameters
            case _:
                wanted = "([pictures], 'actor/x.npz')"
                raise AssetError(f"image list {path}: actor {actor!r}: expected {wanted}, got {entry!r:.80}")


def _landmarks_of(picture: Path) -> Path | None:
    places = (picture.with_name(f"{picture.stem}_kpt{suffix}") for suffix in (".npy", ".txt"))
    return next((place for place in places if place.is_file()), None)


def _read_shape(path: Path) -> np.ndarray:
    if not path.is_file():
        raise _UnusableError("missing parameters", path, "in the list, not there")
    try:
        arrays = read_named(path)
    except AssetError as error:
        raise _UnusableError("broken parameters", path, str(error)) from error
    wanted = params.PARTS["shape"]
    betas = arrays.get("betas")
    if betas is None:
        names = ", ".join(map(str, arrays)) or "nothing"
        raise _UnusableError("broken parameters", path, f"expected `betas`, got {names}")
    betas = np.asarray(betas)
    if betas.dtype.kind != "f" or betas.size < wanted or betas.size != max(betas.shape):
        detail = f"expected `betas` ({wanted} or more,) floats, got {betas.shape} {betas.dtype}"
        raise _UnusableError("broken parameters", path, detail)
    shape = betas.reshape(-1)[:wanted].astype(np.float32)
    if not np.isfinite(shape).all():
        raise _UnusableError("broken parameters", path, "`betas` are not finite")
    return shape


def read_sample(picture: Picture, detector: Detector | None) -> Sample | Problem:
    """Make the sample of a picture, or say what is the matter with it.

    Args:
        picture: one of `find_pictures`.
        detector: for photographs without landmarks; not used for others.

    Returns:
        a sample that knows the shape and, where there is a file of them, the landmarks; or a problem.
    """
    try:
        return _read(picture, detector)
    except _UnusableError as error:
        return Problem(error.kind, str(error.path), error.detail, 1)


def _read(picture: Picture, detector: Detector | None) -> Sample:
    try:
        image_u8 = photo.read(picture.path)
    except PhotoError as error:
        raise _UnusableError("broken picture", picture.path, str(error)) from error
    landmarks = None if picture.landmarks is None else _read_landmarks(picture.landmarks, image_u8.shape[:2])
    if picture.is_crop:
        aligned = _align_crop(picture.path, image_u8.shape[:2])
    else:
        aligned = _align_photo(picture.path, image_u8, landmarks, detector)
    to_wide = compose(WIDE_MATRIX, aligned)
    points = None if landmarks is None else transform(landmarks, to_wide).astype(np.float32)
    return Sample(warp(image_u8, to_wide, WIDE_PX), picture.actor, picture.shape, None, points)


def _align_crop(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """From one of insightface's crops, which may be any multiple of 112 px wide, to the aligned crop."""
    height, width = shape
    if height != width or width % CROP_PX:
        raise _UnusableError("broken picture", path, f"expected a crop of 224 x 224, got {width} x {height}")
    scale = CROP_PX / width
    return np.array([[scale, 0.0, 0.0], [0.0, scale, 0.0]])


def _align_photo(
    path: Path, image_u8: np.ndarray, landmarks: np.ndarray | None, detector: Detector | None
) -> np.ndarray:
    """From the photograph to the aligned crop."""
    if landmarks is not None:
        five = five_points(landmarks)
    else:
        faces = [] if detector is None else detector.detect(image_u8)
        if not faces:
            detail = "none found; give its landmarks, or use MICA's crops (pictures=arcface)"
            raise _UnusableError("no face", path, detail)
        five = faces[0].points_px
    try:
        return estimate_similarity(five, ARCFACE_POINTS_PX)
    except InputError as error:
        raise _UnusableError("broken landmarks", path, str(error)) from error


def _read_landmarks(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """(68, 2) float64 in pixels of the picture beside the file."""
    try:
        content = io.BytesIO(path.read_bytes())
        points = np.load(content, allow_pickle=False) if path.suffix == ".npy" else np.loadtxt(content)
    except (OSError, ValueError, EOFError) as error:
        raise _UnusableError("broken landmarks", path, str(error)) from error
    if points.ndim != 2 or len(points) != LANDMARKS or points.shape[1] < 2 or points.dtype.kind not in "fiu":
        detail = f"expected ({LANDMARKS}, 2 or more) numbers, got {points.shape} {points.dtype}"
        raise _UnusableError("broken landmarks", path, detail)
    points = points[:, :2].astype(np.float64)
    height, width = shape
    margin = _OUTSIDE * max(height, width)
    inside = (points > -margin).all(1) & (points < (width + margin, height + margin)).all(1)  # not where not finite
    if not inside.all():
        number = int(np.flatnonzero(~inside)[0])
        detail = f"{(~inside).sum()} outside the picture of {width} x {height}, number {number} at {points[number]}"
        raise _UnusableError("broken landmarks", path, detail)
    return points


def pack(
    root: str | Path,
    names: list[str],
    folder: str | Path,
    config: Pack,
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Turn datasets into shards: FOLDER/train and FOLDER/held-out, which share no actor, and FOLDER/report.json.

    Shards that are there already are kept, so an interrupted run goes on.

    Args:
        root: holds the datasets.
        names: which of them, as their folders are called.
        folder: made if it is not there.
        config: settings.
        workers: threads; None means one per core.
        progress: called with pictures done and pictures in all.

    Returns:
        what was packed, and what was left out and why.

    Raises:
        InputError: no names, one twice, or a head that FLAME's numbers are not for.
        AssetError: a dataset without the expected parts, no picture that can be used for a part, or a folder that holds
            something else.
    """
    root, folder = Path(root), Path(folder)
    if not names or len(set(names)) < len(names):
        raise InputError(f"names: expected one or more datasets, each once, got {names}")
    head = open_head(config.head)
    if head.name == "chebface-open":
        raise InputError("head: the numbers in MICA's files are FLAME's, not the open head's; set head to that FLAME")
    pictures: list[Picture] = []
    problems: list[Problem] = []
    for name in names:
        found, lacking = find_pictures(root, name, config)
        pictures += found
        problems += lacking
    parts: dict[str, list[Picture]] = {part: [] for part in PARTS[: 2 if config.held_out else 1]}
    for picture in pictures:
        parts[PARTS[is_held_out(picture.actor, config.held_out, config.seed)]].append(picture)
    for part, its in parts.items():
        if not its:
            raise AssetError(
                f"dataset {root}: {len(pictures)} pictures of {len({p.actor for p in pictures})} actors leave none for "
                f"{part}{_first(problems)}; mend them, or set held_out or seed to something else"
            )
    about = {"layout": "mica", "datasets": names, "settings": to_dict(config), "head": head.facts}
    _begin(folder / _PLAN, about | {"pictures": _digest(pictures, root)})
    detector = None
    if any(not picture.is_crop and picture.landmarks is None for picture in pictures):
        detector = open_detector(config.detector, threads=1)
    packer = _Packer(root, config, detector, len(pictures), progress)
    shards: dict[str, list[str]] = {}
    photos: dict[str, int] = {}
    actors: dict[str, int] = {}
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for part, its in parts.items():
            shards[part], lost = packer.pack(folder / part, its, pool)
            problems += lost
            if len(lost) == len(its):
                raise AssetError(f"dataset {root}: no picture for {part} can be used{_first(lost)}")
            photos[part] = len(its) - len(lost)
    for part, written in shards.items():
        _write_json(folder / part / INDEX, about | {"part": part, "count": photos[part], "shards": written})
        with Shards(folder / part) as packed:
            actors[part] = len(set(packed.actors))
    report = Report(photos, actors, tuple(problems))
    _write_json(folder / REPORT, report.to_dict())
    return report


class _Packer:
    """Packs pictures into shards, and keeps beside each shard what was left out of it."""

    def __init__(
        self,
        root: Path,
        config: Pack,
        detector: Detector | None,
        total: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.root, self.config, self.detector = root, config, detector
        self.total, self.progress, self.done = total, progress, 0

    def pack(self, folder: Path, pictures: list[Picture], pool: ThreadPoolExecutor) -> tuple[list[str], list[Problem]]:
        """Write the shards of a part: their names, and what was left out."""
        names, problems = [], []
        for start in range(0, len(pictures), self.config.shard):
            its = pictures[start : start + self.config.shard]
            path = folder / f"{start // self.config.shard:05d}.tar"
            beside = path.with_suffix(".left-out.json")
            if path.is_file():
                self._advance(len(its))
            else:
                lost: list[Problem] = []
                # The list is in its place before the shard is: where there is a shard, there is its list.
                write_shard(path, self._samples(its, pool, lost, beside), self.config.jpeg_quality)
            problems += [Problem(**problem) for problem in json.loads(beside.read_text())]
            names.append(path.name)
        return names, problems

    def _samples(
        self, pictures: list[Picture], pool: ThreadPoolExecutor, lost: list[Problem], beside: Path
    ) -> Iterator[Sample]:
        for start in range(0, len(pictures), _BLOCK):
            block = pictures[start : start + _BLOCK]
            for made in pool.map(lambda picture: read_sample(picture, self.detector), block):
                if isinstance(made, Sample):
                    yield made
                else:
                    where = Path(made.path).relative_to(self.root).as_posix()
                    lost.append(Problem(made.kind, where, made.detail, made.photos))
            self._advance(len(block))
        _write_json(beside, [asdict(problem) for problem in lost])

    def _advance(self, count: int) -> None:
        self.done += count
        if self.progress:
            self.progress(self.done, self.total)


def _first(problems: list[Problem]) -> str:
    return f" (first problem: {problems[0].kind}, {problems[0].path}: {problems[0].detail})" if problems else ""


def _digest(pictures: list[Picture], root: Path) -> str:
    """Of everything that the shards are made from, as far as sizes tell."""
    digest = hashlib.sha256()
    for picture in pictures:
        for path in filter(None, (picture.path, picture.landmarks)):
            digest.update(f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\0".encode())
        digest.update(f"{picture.actor}\0".encode() + picture.shape.tobytes())
    return digest.hexdigest()


def _begin(plan: Path, about: dict[str, Any]) -> None:
    if plan.is_file() and json.loads(plan.read_text()) != about:
        raise AssetError(
            f"dataset {plan.parent}: was begun with other settings, another head or other pictures; choose an empty "
            "folder"
        )
    _write_json(plan, about)


def _write_json(path: Path, content: Any) -> Path:
    return write_whole(path, json.dumps(content, indent=2).encode() + b"\n")
