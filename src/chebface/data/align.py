"""The aligned crop out of a wide frame, several times faster than `crop.warp` and the same to the bit.

Every sample of a training is aligned by one and the same matrix, so where each pixel comes from is known beforehand.
`implementation()` says whether the native code runs; where it does not give what `warp` gives, `warp` does.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import numpy as np

from chebface import native
from chebface.crop import WIDE_MATRIX, WIDE_PX, invert, transform, warp
from chebface.errors import InputError
from chebface.signature import CROP_PX

_SOURCE = Path(__file__).with_name("align.cpp")
_MATRIX = invert(WIDE_MATRIX)  # wide px -> aligned px


def align_reference(wide_u8: np.ndarray) -> np.ndarray:
    """The definition of `align_wide`: same argument, same answer, any machine."""
    return warp(wide_u8, _MATRIX, CROP_PX)


def align_wide(wide_u8: np.ndarray) -> np.ndarray:
    """Cut the aligned crop out of a wide frame.

    Args:
        wide_u8: (224, 224, 3) uint8 RGB.

    Returns:
        (112, 112, 3) uint8.

    Raises:
        InputError: another shape or dtype.
    """
    if wide_u8.shape != (WIDE_PX, WIDE_PX, 3) or wide_u8.dtype != np.uint8:
        raise InputError(f"wide_u8: expected {(WIDE_PX, WIDE_PX, 3)} uint8, got {wide_u8.shape} {wide_u8.dtype}")
    return align_reference(wide_u8) if _why_not() else _align_native(wide_u8)


def implementation() -> str:
    """Which code runs: "native", or "reference (why)"."""
    why = _why_not()
    return "native" if why is None else f"reference ({why})"


@cache
def _why_not() -> str | None:
    """Why the native code is not used. Pillow's roundings are its build's, so one picture of noise is compared."""
    if (why := native.why_missing(_SOURCE)) is not None:
        return why
    noise = np.random.default_rng(0).integers(0, 256, (WIDE_PX, WIDE_PX, 3), np.uint8)
    same = np.array_equal(_align_native(noise), align_reference(noise))
    return None if same else "Pillow rounds otherwise on this machine"


def _align_native(wide_u8: np.ndarray) -> np.ndarray:
    picture, out = np.ascontiguousarray(wide_u8), np.empty((CROP_PX, CROP_PX, 3), np.uint8)
    arrays = (*_taps(), out)
    stride, size = ctypes.c_int64(3 * WIDE_PX), ctypes.c_int64(CROP_PX)
    library = native.load(_SOURCE)
    library.align(_pointer(picture), stride, size, *(_pointer(array) for array in arrays))  # type: ignore[union-attr]
    return out


@cache
def _taps() -> tuple[np.ndarray, ...]:
    """What align.cpp wants to know of columns and rows: place and share, twice; in `warp`'s and Pillow's arithmetic."""
    back = invert(_MATRIX)
    corner = np.floor(transform(np.array([-1.0, -1.0]), back)) - 2  # warp cuts there first
    zoom, shift = back[:, :2].diagonal(), back[:, 2] - corner + 0.5 - back[:, :2].sum(1) * 0.5
    at = zoom * (np.arange(CROP_PX)[:, None] + 0.5) + shift - 0.5
    low = np.floor(at)
    columns, rows = (low + corner).astype(np.int64).T
    dx, dy = (at - low).T
    return (3 * columns[:, None] + np.arange(3)).ravel(), dx.repeat(3), rows.copy(), dy.copy()


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
