"""What int8 is calibrated with: ranges that an earlier export saved, crops, photographs, or nothing in particular."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from chebface import signature
from chebface.errors import AssetError
from export.parity import SEED

CALIBRATION, CALIBRATION_CROPS = "calibration.json", "calibration.npy"  # beside an export: ranges and tries, the crops
CALIBRATION_COUNT, CALIBRATION_SEED = 64, SEED + 1  # of synthetic crops


def read_calibration(path: str | Path) -> dict[str, Any]:
    """What to calibrate int8 with, as keywords of `export_onnx`.

    Args:
        path: calibration.json of an earlier int8 export, or its folder: the same ranges again; an .npy file of aligned
            crops (n, 112, 112, 3) uint8 RGB; or a folder of pictures, of which those of 112 x 112 are aligned crops and
            all others photographs to find faces in.

    Returns:
        `calibration`, or `crops_for_calibration`.

    Raises:
        AssetError: nothing there, or not such things.
    """
    path, side = Path(path), signature.CROP_PX
    saved = path / CALIBRATION if path.is_dir() else path
    wanted = (
        f"expected {CALIBRATION} of an int8 export, an .npy file of (n, {side}, {side}, 3) uint8, or a folder of "
        f"photographs or {side} x {side} crops"
    )
    try:
        if saved.suffix == ".json" and saved.is_file():
            return {"calibration": _read_ranges(saved)}
        crops = _read_pictures(path) if path.is_dir() else np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
    except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
        raise AssetError(f"calibration {path}: {wanted} ({error or 'it is empty'})") from error
    if crops.ndim != 4 or crops.shape[1:] != (side, side, 3) or crops.dtype != np.uint8 or not len(crops):
        raise AssetError(f"calibration {path}: {wanted}, got {crops.shape} {crops.dtype}")
    return {"crops_for_calibration": crops}


def _read_ranges(path: Path) -> dict[str, Any]:
    known: dict[str, Any] = json.loads(path.read_text())
    ranges = {str(name): float(value) for name, value in known["ranges"].items()}
    return {"ranges": ranges} | {key: known[key] for key in ("method", "crops", "crops_sha256")}


def _read_pictures(folder: Path) -> np.ndarray:
    """Aligned crops (n, 112, 112, 3) uint8 of a folder's pictures."""
    from chebface import crop, photo
    from chebface.detect import open_detector

    crops, side = [], signature.CROP_PX
    detector = None
    for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in {".png", ".jpg", ".jpeg"}):
        image = photo.read(path)
        if image.shape == (side, side, 3):
            crops.append(image)
            continue
        detector = detector or open_detector()
        crops += [crop.align(image, found.points_px).aligned_u8 for found in detector.detect(image)]
    if not crops:
        raise ValueError("no picture with a face in it")
    return np.stack(crops)


def describe_calibration(crops: np.ndarray | None, calibration: Mapping[str, Any] | None) -> str:
    """What an int8 export is calibrated with, to tell whether it has changed."""
    if calibration:
        return describe_ranges(calibration)
    if crops is None:
        return f"synthetic, {CALIBRATION_COUNT}, seed {CALIBRATION_SEED}"
    return f"given, {len(crops)}, sha256 {hashlib.sha256(np.ascontiguousarray(crops).tobytes()).hexdigest()}"


def describe_ranges(calibration: Mapping[str, Any]) -> str:
    """The digest of ranges."""
    ranges = json.dumps(calibration["ranges"], sort_keys=True)
    return f"{calibration['method']}, ranges sha256 {hashlib.sha256(ranges.encode()).hexdigest()}"
