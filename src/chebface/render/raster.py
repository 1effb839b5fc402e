"""Rasterisation of a triangle mesh: which triangle each pixel sees, and where on it. numpy in, numpy out.

Two implementations of one definition: `rasterize_reference`, vectorised numpy, and raster.cpp, compiled at first use.
`implementation()` says which one `rasterize` runs.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np

from chebface import native
from chebface.errors import InputError

INSIDE = -1e-6  # a barycentric above this counts as inside: closes cracks along shared edges
_SOURCE = Path(__file__).with_name("raster.cpp")


def implementation() -> str:
    """Which code runs: "native", or "reference (why)"."""
    why = native.why_missing(_SOURCE)
    return "native" if why is None else f"reference ({why})"


def rasterize(points_px: np.ndarray, faces: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the nearest triangle at every pixel centre.

    Args:
        points_px: (N, 3) float32: x, y in pixels (integers are pixel centres) and depth, smaller is nearer.
        faces: (M, 3) int32.
        height, width: of the picture, in pixels.

    Returns:
        triangle (H, W) int32, -1 where there is none, and barycentric (H, W, 3) float32, zero there. Both windings
        are drawn; of two triangles at equal depth the first wins.

    Raises:
        InputError: a wrong shape, an index out of range, or a size below one.
    """
    points = np.ascontiguousarray(points_px, np.float32)
    triangles = np.ascontiguousarray(faces, np.int32)
    _check(points, triangles, height, width)
    library = native.load(_SOURCE)
    if library is None:
        return rasterize_reference(points, triangles, height, width)
    triangle = np.empty((height, width), np.int32)
    barycentric = np.empty((height, width, 3), np.float32)
    size = ctypes.c_int64(len(triangles))
    library.rasterize(
        _pointer(points), _pointer(triangles), size, height, width, _pointer(triangle), _pointer(barycentric)
    )
    return triangle, barycentric


def rasterize_reference(
    points_px: np.ndarray, faces: np.ndarray, height: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """The definition of `rasterize`: same arguments, same answer, any machine."""
    triangle = np.full(height * width, -1, np.int32)
    barycentric = np.zeros((height * width, 3), np.float32)
    corners = np.asarray(points_px, np.float64)[faces]  # (M, 3, 3)
    corners = np.where(np.isfinite(corners).all((1, 2), keepdims=True), corners, 0)  # no area: draws nothing
    origin, a, b = corners[:, 0], corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    area = a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]
    size = np.array([width, height])
    low = np.ceil(np.clip(corners[..., :2].min(1), 0, size)).astype(np.int64)
    high = np.floor(np.clip(corners[..., :2].max(1), -1, size - 1)).astype(np.int64)
    count = np.clip(high - low + 1, 0, None)
    wanted = np.flatnonzero((np.abs(area) > 1e-12) & (count > 0).all(1))
    if not len(wanted):
        return triangle.reshape(height, width), barycentric.reshape(height, width, 3)

    # One row per (triangle, pixel of its bounding box).
    pixels = count[wanted].prod(1)
    t = np.repeat(wanted, pixels)
    k = np.arange(pixels.sum()) - np.repeat(np.cumsum(pixels) - pixels, pixels)
    x, y = low[t, 0] + k % count[t, 0], low[t, 1] + k // count[t, 0]
    dx, dy = x - origin[t, 0], y - origin[t, 1]
    b1 = (b[t, 1] * dx - b[t, 0] * dy) / area[t]
    b2 = (a[t, 0] * dy - a[t, 1] * dx) / area[t]
    b0 = 1 - b1 - b2
    hit = (b0 >= INSIDE) & (b1 >= INSIDE) & (b2 >= INSIDE)
    t, pixel, weights = t[hit], (y * width + x)[hit], np.stack([b0, b1, b2], 1)[hit]
    depth = (weights * corners[t, :, 2]).sum(1)
    order = np.lexsort((t, depth, pixel))
    seen, first = np.unique(pixel[order], return_index=True)
    nearest = order[first]
    triangle[seen] = t[nearest]
    barycentric[seen] = weights[nearest]
    return triangle.reshape(height, width), barycentric.reshape(height, width, 3)


def interpolate(attributes: np.ndarray, faces: np.ndarray, triangle: np.ndarray, barycentric: np.ndarray) -> np.ndarray:
    """Spread values at vertices over the pixels.

    Args:
        attributes: (N, C) float; faces: (M, 3); triangle: (H, W); barycentric: (H, W, 3), as `rasterize` gives them.

    Returns:
        (H, W, C) float32, zero where no triangle is.

    Raises:
        InputError: arrays that do not fit together.
    """
    if attributes.ndim != 2 or (len(faces) and faces.max() >= len(attributes)):
        raise InputError(f"attributes: expected (N, C) with N above {faces.max(initial=-1)}, got {attributes.shape}")
    if triangle.ndim != 2 or (triangle.size and triangle.max() >= len(faces)):
        raise InputError(f"triangle: expected (H, W) below {len(faces)}, got {triangle.shape}")
    if barycentric.shape != (*triangle.shape, 3):
        raise InputError(f"barycentric: expected {(*triangle.shape, 3)}, got {barycentric.shape}")
    library = native.load(_SOURCE)
    if library is None:
        return interpolate_reference(attributes, faces, triangle, barycentric)
    values = np.ascontiguousarray(attributes, np.float32)
    image = np.empty((*triangle.shape, values.shape[1]), np.float32)
    arrays = [
        np.ascontiguousarray(a, k) for a, k in ((faces, np.int32), (triangle, np.int32), (barycentric, np.float32))
    ]
    channels, pixels = ctypes.c_int64(values.shape[1]), ctypes.c_int64(triangle.size)
    library.interpolate(_pointer(values), channels, *(_pointer(a) for a in arrays), pixels, _pointer(image))
    return image


def interpolate_reference(
    attributes: np.ndarray, faces: np.ndarray, triangle: np.ndarray, barycentric: np.ndarray
) -> np.ndarray:
    """The definition of `interpolate`: same arguments, same answer, any machine."""
    corners = np.asarray(attributes, np.float32)[faces[np.maximum(triangle, 0)]]  # (H, W, 3, C)
    return np.einsum("hwk,hwkc->hwc", barycentric, corners)  # barycentrics are zero where no triangle is


def _check(points: np.ndarray, faces: np.ndarray, height: int, width: int) -> None:
    if points.ndim != 2 or points.shape[1] != 3:
        raise InputError(f"points_px: expected (N, 3), got {points.shape}")
    if faces.ndim != 2 or faces.shape[1] != 3:
        raise InputError(f"faces: expected (M, 3), got {faces.shape}")
    if len(faces) and (faces.min() < 0 or faces.max() >= len(points)):
        raise InputError(f"faces: indices must be in 0..{len(points) - 1}, got {faces.min()}..{faces.max()}")
    if height < 1 or width < 1:
        raise InputError(f"height, width: expected at least 1, got {height}, {width}")


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
