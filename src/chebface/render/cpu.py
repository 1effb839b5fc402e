"""The built-in renderer: runs anywhere, differentiable in vertices and attributes through barycentric interpolation.

Gradients flow inside the silhouette (as in DECA's and MICA's use of pytorch3d); visibility itself has none.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch

from chebface import native
from chebface.render import check_batch, raster


class CpuRenderer:
    """A renderer of one mesh topology on the CPU.

    Args:
        faces: (M, 3) integer triangle list.
    """

    name = "cpu"

    def __init__(self, faces: np.ndarray | torch.Tensor) -> None:
        self.faces = np.ascontiguousarray(torch.as_tensor(faces).cpu().numpy(), np.int32)

    def render(
        self, points_px: torch.Tensor, attributes: torch.Tensor, height: int, width: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw vertex attributes.

        Args:
            points_px: (B, N, 3) x, y in pixels (integers are pixel centres) and depth, smaller is nearer.
            attributes: (B, N, C).
            height, width: of the picture, in pixels.

        Returns:
            image (B, C, H, W), zero outside, and mask (B, H, W) bool.

        Raises:
            InputError: shapes that do not fit together.
        """
        check_batch(points_px, attributes)
        points, values = points_px.cpu(), attributes.cpu()
        triangles = np.empty((len(points), height, width), np.int32)
        barycentrics = np.empty((*triangles.shape, 3), np.float32)
        drawn = points.detach().numpy()

        def rasterize(item: int) -> None:
            triangles[item], barycentrics[item] = raster.rasterize(drawn[item], self.faces, height, width)

        _for_each(len(points), rasterize)
        if native.load(raster._SOURCE) is None:
            items = zip(points, values, triangles, barycentrics, strict=True)
            image = torch.stack([_interpolate_reference(p, v, self.faces, t, b) for p, v, t, b in items])
        else:
            image = _Interpolate.apply(points, values, self.faces, triangles, barycentrics)
        mask = torch.from_numpy(triangles >= 0)
        return image.permute(0, 3, 1, 2).to(points_px.device), mask.to(points_px.device)


def _for_each(count: int, run: Callable[[int], None]) -> None:
    """Do something for every picture of a batch, on as many threads as torch has."""
    if count == 1 or torch.get_num_threads() == 1:
        for item in range(count):
            run(item)
    else:
        list(_pool(torch.get_num_threads()).map(run, range(count)))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def _interpolate_reference(
    points: torch.Tensor, attributes: torch.Tensor, faces: np.ndarray, triangle: np.ndarray, barycentric: np.ndarray
) -> torch.Tensor:
    """The definition: barycentrics as a function of the points, autograd does the rest. (N, 3), (N, C) -> (H, W, C)."""
    height, width = triangle.shape
    corner = torch.from_numpy(faces[np.maximum(triangle, 0)].astype(np.int64))  # (H, W, 3)
    p0, p1, p2 = points[corner].unbind(2)
    x = torch.arange(width, dtype=points.dtype).expand(height, width)
    y = torch.arange(height, dtype=points.dtype)[:, None].expand(height, width)
    a, b = p1 - p0, p2 - p0
    area = a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]
    seen = torch.from_numpy(triangle >= 0)
    area = torch.where(seen, area, 1.0)
    dx, dy = x - p0[..., 0], y - p0[..., 1]
    b1 = (b[..., 1] * dx - b[..., 0] * dy) / area
    b2 = (a[..., 0] * dy - a[..., 1] * dx) / area
    weights = torch.stack([1 - b1 - b2, b1, b2], -1) * seen[..., None]
    return torch.einsum("hwk,hwkc->hwc", weights, attributes[corner])


class _Interpolate(torch.autograd.Function):
    """raster.cpp's interpolation and its adjoint; float32. (B, N, 3), (B, N, C) -> (B, H, W, C)."""

    @staticmethod
    def forward(ctx: Any, points: torch.Tensor, attributes: torch.Tensor, faces, triangle, barycentric) -> torch.Tensor:
        points, attributes = points.float().contiguous(), attributes.float().contiguous()
        image = torch.empty(*triangle.shape, attributes.shape[2])

        def draw(item: int) -> None:
            native.load(raster._SOURCE).interpolate(  # type: ignore[union-attr]
                _pointer(attributes[item]),
                ctypes.c_int64(attributes.shape[2]),
                _pointer(faces),
                _pointer(triangle[item]),
                _pointer(barycentric[item]),
                ctypes.c_int64(triangle[item].size),
                _pointer(image[item]),
            )

        _for_each(len(points), draw)
        ctx.save_for_backward(points, attributes)
        ctx.arrays = faces, triangle, barycentric
        return image

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_image: torch.Tensor) -> tuple:
        points, attributes = ctx.saved_tensors
        faces, triangle, barycentric = ctx.arrays
        grad_image = grad_image.float().contiguous()
        grad_attributes, grad_points = torch.zeros_like(attributes), torch.zeros_like(points)

        def pull(item: int) -> None:
            native.load(raster._SOURCE).interpolate_backward(  # type: ignore[union-attr]
                _pointer(points[item]),
                _pointer(attributes[item]),
                ctypes.c_int64(attributes.shape[2]),
                _pointer(faces),
                _pointer(triangle[item]),
                _pointer(barycentric[item]),
                ctypes.c_int64(triangle[item].size),
                _pointer(grad_image[item]),
                _pointer(grad_attributes[item]),
                _pointer(grad_points[item]),
            )

        _for_each(len(points), pull)
        return grad_points, grad_attributes, None, None, None


def _pointer(array: np.ndarray | torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.data_ptr() if isinstance(array, torch.Tensor) else array.ctypes.data)
