"""Run a model over a benchmark's images: the face that the benchmark's box shows, as its neutral head.

The box is made square, moved down by 12 % and enlarged 1.6 times, as DECA and its successors do for NoW. In that part
of the photograph a face is looked for; where none is found, the box itself says where it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chebface import params
from chebface.crop import ARCFACE_POINTS_PX
from chebface.detect import Detection, Detector, open_detector
from chebface.errors import AssetError, ChebfaceError
from chebface.files import whole, write_whole
from chebface.heads import Head
from chebface.mesh import write_obj
from chebface.now.dataset import Dataset, Shot, head_landmarks
from chebface.photo import read

if TYPE_CHECKING:
    from chebface.pipeline import Pipeline

SCALE = 1.6  # Source: DECA, decalib/datasets; also MICA
DOWN = 0.12  # of the box's side
RECORD = "predict.json"
_BOX_PX, _BOX_CENTRE_PX = 100.0, (55.5, 62.0)  # the box in the aligned crop, roughly; for photos without a detection


def square(box_px: np.ndarray) -> tuple[np.ndarray, float]:
    """The part of a photo to look at: centre (2,) and side in pixels, of a box (4,) left, top, right, bottom."""
    left, top, right, bottom = box_px
    side = (right - left + bottom - top) / 2
    return np.array([(left + right) / 2, (top + bottom) / 2 + DOWN * side]), SCALE * side


def cut_out(image_u8: np.ndarray, centre_px: np.ndarray, side_px: float) -> np.ndarray:
    """A square of a photo (H, W, 3) uint8, in its own pixels; black outside of it.

    Raises:
        AssetError: the square lies outside the photo.
    """
    side = max(round(side_px), 1)
    x0, y0 = (round(float(c) - side / 2) for c in centre_px)
    height, width = image_u8.shape[:2]
    rows, columns = slice(max(y0, 0), min(y0 + side, height)), slice(max(x0, 0), min(x0 + side, width))
    if rows.start >= rows.stop or columns.start >= columns.stop:
        raise AssetError(f"box around {np.round(centre_px).tolist()}: outside of a photo of {width} x {height} pixels")
    out = np.zeros((side, side, 3), np.uint8)
    out[rows.start - y0 : rows.stop - y0, columns.start - x0 : columns.stop - x0] = image_u8[rows, columns]
    return out


class BoxDetector(Detector):
    """Gives exactly one face of a square around a box: the one found there that shares most with the box, or the
    one that the box claims. Counts the latter."""

    name = "box"
    threshold = 0.0

    def __init__(self, inner: Detector) -> None:
        """
        Args:
            inner: what looks for faces.
        """
        self.inner = inner
        self.boxed = True  # False: whole photographs come, of which the largest face is taken, if any
        self.claimed = 0  # squares without a detection

    def detect(self, image_u8: np.ndarray) -> list[Detection]:
        """The face in a square (S, S, 3) uint8 that `cut_out` made.

        Raises:
            InputError: not an image.
        """
        if not self.boxed:
            return self.inner.detect(image_u8)[:1]
        side = len(image_u8) / SCALE
        middle = np.array([len(image_u8) / 2 - 0.5, len(image_u8) / 2 - 0.5 - DOWN * side])
        box = np.concatenate([middle - side / 2, middle + side / 2])
        found = [(_shared(box, face.box_px), face) for face in self.inner.detect(image_u8)]
        share, best = max(found, key=lambda each: each[0], default=(0.0, None))
        if best is not None and share > 0:
            return [best]
        self.claimed += 1
        points = middle + (ARCFACE_POINTS_PX - _BOX_CENTRE_PX) * (side / _BOX_PX)
        return [Detection(box, 0.0, points)]

    def _find(self, picture_u8: np.ndarray) -> np.ndarray:
        return self.inner._find(picture_u8)


def predict(
    open_pipeline: Callable[[Detector], Pipeline],
    head: Head,
    dataset: Dataset,
    folder: str | Path,
    *,
    about: dict[str, Any] | None = None,
    detector: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write <subject>/<challenge>/<image>.obj, metres, and the seven landmarks as .npy, for every image asked for.

    Finished predictions are kept. Photos that cannot be used are listed; their predictions are then missing.

    Args:
        open_pipeline: makes the pipeline that uses a detector.
        head: the head of its model.
        dataset: from `open_dataset`.
        folder: for the predictions.
        about: what else tells one model from another, for the record.
        detector: a name for `open_detector`.
        progress: called with images done and in all.

    Returns:
        predict.json: "head", "detector", "claimed" (images where only the box said where the face is), "failed".

    Raises:
        AssetError: the folder holds predictions of another model, or the pipeline has another head.
        MissingDependencyError: no detector.
    """
    folder = Path(folder)
    wanted: dict[str, Any] = {"head": head.facts, "detector": detector, "scale": SCALE, **(about or {})}
    record = wanted | {"claimed": _check_record(folder, wanted)}
    looking = BoxDetector(open_detector(detector))
    pipeline = open_pipeline(looking)
    if pipeline.topology.head.get("sha256") != head.sha256:
        raise AssetError(f"head {head.name}: the model was made with {pipeline.topology.head.get('name')}; give that")
    failed = []
    for done, shot in enumerate(dataset.asked, 1):
        if not (folder / f"{shot.stem}.obj").is_file():
            before = looking.claimed
            try:
                _predict_one(pipeline, looking, head, dataset, shot, folder)
            except ChebfaceError as error:
                failed.append({"file": shot.line, "error": str(error)})
            if looking.claimed > before and shot.line not in record["claimed"]:
                record["claimed"].append(shot.line)
            _write_record(folder, record)
        if progress:
            progress(done, len(dataset.asked))
    record["failed"] = failed
    _write_record(folder, record)
    return record


def _predict_one(
    pipeline: Pipeline, looking: BoxDetector, head: Head, dataset: Dataset, shot: Shot, folder: Path
) -> None:
    image_u8, box = read(dataset.picture(shot)), dataset.box(shot)
    looking.boxed = box is not None
    face = pipeline.reconstruct(image_u8 if box is None else cut_out(image_u8, *square(box)))
    weights = face.parameters[params.SLICES["shape"]].astype(np.float64)
    vertices = head.template + np.tensordot(weights, head.shape_dirs, 1)
    path = folder / f"{shot.stem}.obj"
    # The mesh comes last: where it is, its landmarks are.
    with whole(path.with_suffix(".npy")) as partial, open(partial, "wb") as file:
        np.save(file, head_landmarks(head).locate(vertices, head.faces))
    write_obj(path, vertices, head.faces, comment=f"chebface; metres; head {head.name} {head.version}, {head.licence}")


def _check_record(folder: Path, wanted: dict[str, Any]) -> list[str]:
    """The images of an unfinished run whose box alone said where the face is."""
    path = folder / RECORD
    if not path.is_file():
        if folder.is_dir() and any(folder.rglob("*.obj")):
            raise AssetError(f"{folder}: has meshes but no {RECORD}, so they are another method's; give a new folder")
        return []
    try:
        before = dict(json.loads(path.read_bytes()))
        claimed = [str(line) for line in before["claimed"]]
    except (ValueError, TypeError, KeyError) as error:
        raise AssetError(f"{path}: damaged ({error}); give another folder, or delete this one") from error
    changed = [key for key, value in wanted.items() if before.get(key) != value]
    if changed:
        raise AssetError(f"{folder}: holds predictions of another {' and '.join(changed)}; give another folder")
    return claimed


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    write_whole(folder / RECORD, json.dumps(record, indent=1).encode() + b"\n")


def _shared(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two boxes (4,)."""
    sides = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0)
    both = float(np.prod(sides))
    return both / max(float(np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2])) - both, 1e-9)
