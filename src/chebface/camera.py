"""The one place for coordinates: scaled orthographic projection, pixels, depth, and the one y flip.

Metres in the head frame (x the subject's left, y up, z towards the camera) go to ndc, y up, with [-1, 1] across the
wide crop (crop.py); ndc goes to pixels, y down, whose centres are at integers. Every function takes numpy arrays and
torch tensors alike, keeps gradients, and imports neither for the other.
"""

from __future__ import annotations

import sys
from typing import Any

from chebface.errors import InputError


def _namespace(array: Any) -> Any:
    return sys.modules[type(array).__module__.partition(".")[0]]


def _check(name: str, array: Any, least: int, exact: bool) -> None:
    if array.ndim < 1 or array.shape[-1] < least or (exact and array.shape[-1] != least):
        wanted = f"(..., {least})" if exact else f"(..., at least {least})"
        raise InputError(f"{name}: expected {wanted}, got {tuple(array.shape)}")


def project(points: Any, camera: Any) -> Any:
    """Project metres to ndc with a scaled orthographic camera: (s (x + tx), s (y + ty), -s z).

    Args:
        points: (..., N, 3) float, metres.
        camera: (..., 3) float: scale s (1/m), tx, ty (m).

    Returns:
        (..., N, 3) ndc: x and y in [-1, 1] inside the wide crop, y up; the third is depth, smaller is nearer.

    Raises:
        InputError: a last dimension is not 3.
    """
    _check("points", points, 3, exact=True)
    _check("camera", camera, 3, exact=True)
    scale, tx, ty = (camera[..., None, i] for i in range(3))
    parts = [scale * (points[..., 0] + tx), scale * (points[..., 1] + ty), -scale * points[..., 2]]
    return _namespace(points).stack(parts, -1)


def ndc_to_px(ndc: Any, height: int, width: int) -> Any:
    """Ndc to pixels of a (height, width) picture: x_px = (x + 1) W / 2 - 0.5, y_px = (1 - y) H / 2 - 0.5.

    Args:
        ndc: (..., C) float, C at least 2; what follows x and y (depth) is kept as it is.

    Returns:
        (..., C) pixels, centres at integers.

    Raises:
        InputError: the last dimension is below 2.
    """
    _check("ndc", ndc, 2, exact=False)
    x = (ndc[..., 0] + 1) * (width / 2) - 0.5
    y = (1 - ndc[..., 1]) * (height / 2) - 0.5
    return _namespace(ndc).stack([x, y, *(ndc[..., i] for i in range(2, ndc.shape[-1]))], -1)


def px_to_ndc(points_px: Any, height: int, width: int) -> Any:
    """The inverse of ndc_to_px.

    Args:
        points_px: (..., C) float, C at least 2; what follows x and y is kept as it is.

    Returns:
        (..., C) ndc, y up.

    Raises:
        InputError: the last dimension is below 2.
    """
    _check("points_px", points_px, 2, exact=False)
    x = (points_px[..., 0] + 0.5) * (2 / width) - 1
    y = 1 - (points_px[..., 1] + 0.5) * (2 / height)
    return _namespace(points_px).stack([x, y, *(points_px[..., i] for i in range(2, points_px.shape[-1]))], -1)
