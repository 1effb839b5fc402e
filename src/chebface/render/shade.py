"""A head to a lit picture: texture, normals, nine harmonics of light, then a renderer.

As data/synthetic.py draws: albedo times irradiance at the vertices, linear in between, and these numbers are the
picture's, without gamma. Nothing is clamped, so that a colour that leaves [0, 1] still has a gradient to come back by.
Keep it outside of autocast, as the head layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from chebface import camera, params
from chebface.crop import WIDE_MATRIX, WIDE_PX
from chebface.errors import AssetError, InputError
from chebface.render import Renderer
from chebface.render.light import irradiance
from chebface.signature import CROP_PX

if TYPE_CHECKING:
    from chebface.heads.asset import Head

_SMALLEST = 1e-30  # squared length (m^4) below which the faces around a vertex have no direction


class Normals(nn.Module):
    """Unit normals at the vertices of one topology, as `mesh.vertex_normals`, for torch.

    Sums run over a table of the faces around each vertex, forwards and backwards, so that the same input gives the same
    bits on any device: scattered additions on a GPU do not.

    Args:
        faces: (M, 3) int, counter-clockwise seen from outside.
        count: vertices N.
    """

    faces: Tensor  # (M, 3)
    around: Tensor  # (N, most) corners 3 m + k at each vertex, 3 M where there are no more

    def __init__(self, faces: np.ndarray, count: int) -> None:
        super().__init__()
        corners = np.argsort(faces, axis=None, kind="stable")
        valence = np.bincount(faces.ravel(), minlength=count)
        around = np.full((count, max(1, valence.max(initial=0))), faces.size, np.int64)
        place = np.arange(faces.size) - np.repeat(np.cumsum(valence) - valence, valence)
        around[faces.ravel()[corners], place] = corners
        self.register_buffer("faces", torch.from_numpy(faces.astype(np.int64)), persistent=False)
        self.register_buffer("around", torch.from_numpy(around), persistent=False)

    def forward(self, vertices: Tensor) -> Tensor:
        """Vertices (B, N, 3) in metres to unit normals (B, N, 3); (0, 0, 1) where there is no face around."""
        rows = vertices.permute(1, 2, 0).flatten(1)  # (N, 3 B): wide rows are quick to gather
        a, b, c = _Corners.apply(rows, self.faces, self.around).unflatten(-1, (3, -1)).unbind(1)  # (M, 3, B) each
        normals = torch.linalg.cross(b - a, c - a, dim=1).flatten(1)
        sums = _Around.apply(normals[:, None].expand(-1, 3, -1), self.faces, self.around)
        sums = sums.unflatten(1, (3, -1)).permute(2, 0, 1)  # (B, N, 3)
        square = (sums * sums).sum(-1, keepdim=True)
        found = square > _SMALLEST
        length = torch.where(found, square, 1).sqrt()
        return torch.where(found, sums / length, sums.new_tensor((0.0, 0.0, 1.0)))


class _Corners(torch.autograd.Function):
    """Values at vertices (N, C) to the corners of faces (M, 3, C); `_Around` is its adjoint."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, faces: Tensor, around: Tensor) -> Tensor:
        ctx.save_for_backward(faces, around)
        return values.index_select(0, faces.flatten()).unflatten(0, (-1, 3))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Around.apply(grad, *ctx.saved_tensors), None, None


class _Around(torch.autograd.Function):
    """The sum (N, C) over the corners of faces (M, 3, C) at each vertex."""

    @staticmethod
    def forward(ctx: Any, corners: Tensor, faces: Tensor, around: Tensor) -> Tensor:
        ctx.save_for_backward(faces, around)
        flat = torch.nn.functional.pad(corners.flatten(0, 1), (0, 0, 0, 1))  # a last row of zeros
        summed = flat.index_select(0, around[:, 0])
        for column in around.T[1:]:
            summed += flat.index_select(0, column)
        return summed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Corners.apply(grad, *ctx.saved_tensors), None, None


class Shader(nn.Module):
    """Draws a head in its own skin under a light; `to` moves it, and its buffers stay out of state_dict.

    Args:
        head: with a face mask.
        renderer: of the head's faces.
        size: side of the picture in pixels; the camera's frame is the wide one (crop.py).

    Raises:
        AssetError: the head has no face mask.
    """

    skin: Tensor  # (3 N,) the mean albedo
    skin_dirs: Tensor  # (50, 3 N)
    face: Tensor  # (N, 1) 1 in the face region

    def __init__(self, head: Head, renderer: Renderer, size: int = WIDE_PX) -> None:
        super().__init__()
        if "face" not in head.masks:
            raise AssetError(f"head {head.name}: has no face mask; import it again with --masks")
        self.renderer, self.size = renderer, size
        self.normals = Normals(head.faces, len(head.template))
        for name, array in (
            ("skin", head.texture_mean.reshape(-1)),
            ("skin_dirs", head.texture_dirs.reshape(len(head.texture_dirs), -1)),
            ("face", head.masks["face"][:, None]),
        ):
            self.register_buffer(name, torch.tensor(array, dtype=torch.float32), persistent=False)

    def draw(self, vertices: Tensor, parameters: Tensor, *, lit: bool = True) -> tuple[Tensor, Tensor]:
        """Draw heads: (mean + texture . dirs) * irradiance(normals, light), through the camera.

        Differentiable in vertices, texture, light and camera.

        Args:
            vertices: (B, N, 3) m, posed.
            parameters: (B, 486): texture, light and camera are read.
            lit: False draws the albedo alone.

        Returns:
            image (B, 3, H, W) RGB, zero outside of the head, not clamped; and mask (B, H, W) bool, where the head's
            face region is what is seen.

        Raises:
            InputError: shapes that do not fit the head.
        """
        count = len(self.face)
        if vertices.ndim != 3 or vertices.shape[1:] != (count, 3):
            raise InputError(f"vertices: expected (B, {count}, 3), got {tuple(vertices.shape)}")
        if parameters.shape != (len(vertices), params.TOTAL):
            raise InputError(f"parameters: expected {(len(vertices), params.TOTAL)}, got {tuple(parameters.shape)}")
        parts = params.split(parameters)
        color = torch.addmm(self.skin, parts["texture"], self.skin_dirs).unflatten(1, (count, 3))
        if lit:
            color = color * irradiance(self.normals(vertices), parts["light"])
        points = camera.ndc_to_px(camera.project(vertices, parts["camera"]), self.size, self.size)
        values = torch.cat([color, self.face.expand(len(color), -1, -1)], -1)
        image, seen = self.renderer.render(points, values, self.size, self.size)
        return image[:, :3], seen & (image[:, 3].detach() > 0.5)


def hold_skin(parameters: Tensor) -> Tensor:
    """The same parameters (B, 486), texture and light without gradient: what the identity loss draws with."""
    parts = params.split(parameters)
    return torch.cat([part.detach() if name in {"texture", "light"} else part for name, part in parts.items()], -1)


def wide_to_aligned(image: Tensor) -> Tensor:
    """The aligned crop out of the wide frame: (B, C, 224, 224) -> (B, C, 112, 112), bilinear, differentiable.

    The two frames differ by a zoom and a shift, so it is one product from either side, and black beyond the frame.

    Raises:
        InputError: another size.
    """
    if image.ndim != 4 or image.shape[2:] != (WIDE_PX, WIDE_PX):
        raise InputError(f"image: expected (B, C, {WIDE_PX}, {WIDE_PX}), got {tuple(image.shape)}")
    columns, rows = (_tents(WIDE_MATRIX[axis, axis], WIDE_MATRIX[axis, 2]).to(image) for axis in (0, 1))
    return rows @ image @ columns.T


def _tents(zoom: float, shift: float) -> Tensor:
    """Bilinear weights (112, 224) along one side: aligned pixel i looks at the wide pixel zoom i + shift."""
    at = zoom * torch.arange(CROP_PX, dtype=torch.float64) + shift
    return (1 - (at[:, None] - torch.arange(WIDE_PX)).abs()).clamp(min=0)
