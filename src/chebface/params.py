"""The 486 numbers that the regressor predicts, by name and slice.

Order and sizes are the paper's (section 3.1); pose and camera follow DECA. No other file may write a slice.
"""

from __future__ import annotations

from typing import Any

from chebface.errors import InputError

PARTS: dict[str, int] = {
    "shape": 300,  # identity coefficients, unit standard deviation
    "pose": 6,  # axis-angle in radians: head (3), jaw (3)
    "expression": 100,
    "texture": 50,  # albedo coefficients, unit standard deviation
    "camera": 3,  # scale (1/m), tx, ty (m): see camera.py
    "light": 27,  # 9 spherical harmonics x RGB, row-major (9, 3)
}
TOTAL = sum(PARTS.values())

SLICES: dict[str, slice] = {}
_start = 0
for _name, _size in PARTS.items():
    SLICES[_name] = slice(_start, _start + _size)
    _start += _size

HEAD_POSE = slice(0, 3)  # within "pose"
JAW_POSE = slice(3, 6)


def split(parameters: Any) -> dict[str, Any]:
    """Name the parts of a parameter array.

    Args:
        parameters: (..., 486), any array library that slices.

    Returns:
        Views by part name, each (..., size); light is (..., 27).

    Raises:
        InputError: the last dimension is not 486.
    """
    if parameters.ndim < 1 or parameters.shape[-1] != TOTAL:
        raise InputError(f"parameters: expected (..., {TOTAL}), got {tuple(parameters.shape)}")
    return {name: parameters[..., part] for name, part in SLICES.items()}
