"""PyTorch3D's rasteriser behind the renderer protocol: hard edges, one face a pixel, no perspective correction.

Its picture: x to the left, y up, both in [-1, 1] over the shorter side and square pixels; row 0 is the top one; smaller
z is nearer, and a face with a corner at z below 1e-8 is left out. Faces smaller than 1e-8 in those units are left out
too, and a pixel centre exactly on an edge belongs to no face.

Source: its cameras notes and `rasterize_meshes` (Ravi et al. 2020); its INSTALL.md for installing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from chebface import camera
from chebface.errors import MissingDependencyError
from chebface.render import check_batch

FIX = "pip install --no-build-isolation git+https://github.com/facebookresearch/pytorch3d.git (wants a C++ compiler)"
_NEAR = 1.0  # the nearest point's z


class Pytorch3dRenderer:
    """A renderer of one mesh topology on any device; on a CPU it takes seconds.

    Args:
        faces: (M, 3) integer triangle list.

    Raises:
        MissingDependencyError: pytorch3d cannot be imported.
    """

    name = "pytorch3d"

    def __init__(self, faces: np.ndarray | torch.Tensor) -> None:
        self._rasterize, self._interpolate, self._meshes = _import()
        self.faces = torch.as_tensor(faces).to(torch.int64).contiguous()

    def render(
        self, points_px: torch.Tensor, attributes: torch.Tensor, height: int, width: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw vertex attributes; float32.

        Args:
            points_px: (B, N, 3) x, y in pixels (integers are pixel centres) and depth, smaller is nearer; finite.
            attributes: (B, N, C).
            height, width: of the picture, in pixels.

        Returns:
            image (B, C, H, W), zero outside, and mask (B, H, W) bool.

        Raises:
            InputError: shapes that do not fit together.
        """
        check_batch(points_px, attributes)
        self.faces = self.faces.to(points_px.device)
        points = to_ndc(points_px.float(), height, width)
        triangle, _, barycentric, _ = self._rasterize(
            self._meshes(verts=points, faces=self.faces.expand(len(points), -1, -1)),
            image_size=(height, width),
            blur_radius=0.0,
            faces_per_pixel=1,
            perspective_correct=False,
        )  # (B, H, W, 1), counted over the whole batch
        corners = attributes.float()[:, self.faces].flatten(0, 1)  # (B M, 3, C)
        image = self._interpolate(triangle, barycentric, corners)[..., 0, :]  # (B, H, W, C)
        return image.permute(0, 3, 1, 2), triangle[..., 0] >= 0


def to_ndc(points_px: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Pixels and depth (B, N, 3) to the package's coordinates (B, N, 3).

    Depth keeps its unit and is moved so that the nearest point of each item is at z = 1; it decides what is seen and
    carries no gradient.
    """
    x, y, depth = camera.px_to_ndc(points_px, height, width).unbind(-1)
    depth = depth.detach()
    short = min(height, width)
    return torch.stack([-x * (width / short), y * (height / short), depth - depth.amin(-1, keepdim=True) + _NEAR], -1)


def _import() -> tuple[Any, Any, Any]:
    try:
        from pytorch3d.ops import interpolate_face_attributes
        from pytorch3d.renderer.mesh.rasterize_meshes import rasterize_meshes
        from pytorch3d.structures import Meshes
    except (ImportError, OSError) as error:  # OSError: built for another torch
        raise MissingDependencyError(f"renderer pytorch3d: cannot be imported ({error}); {FIX}") from error
    return rasterize_meshes, interpolate_face_attributes, Meshes
