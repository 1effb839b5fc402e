"""NVIDIA's nvdiffrast behind the renderer protocol: the CUDA rasteriser, never OpenGL, without antialiasing.

Its picture is OpenGL's: clip space, x and y in [-w, w] across the picture, row 0 at y = -w, larger z farther. Row 0 is
where y begins, so pixel rows counted from the top and y counted down need no flip at all.

Two things differ from the built-in renderer within a pixel: vertices snap to a sixteenth of a pixel before coverage is
decided, and barycentric coordinates are held in [0, 1]. Licence: research only (its section 3.3).

Source: the package's documentation (Laine et al., SIGGRAPH Asia 2020) and its README for installing.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import torch

from chebface import camera
from chebface.errors import InputError, MissingDependencyError
from chebface.render import check_batch

DEVICE = "cuda"  # the only kind of device it draws on
FIX = (
    "pip install setuptools wheel ninja && "
    "pip install --no-build-isolation git+https://github.com/NVlabs/nvdiffrast.git (wants a CUDA toolkit)"
)
_DEPTH = 0.9  # depths fill [-0.9, 0.9] of the clip space's [-1, 1]


class NvdiffrastRenderer:
    """A renderer of one mesh topology on CUDA devices.

    Args:
        faces: (M, 3) integer triangle list.

    Raises:
        MissingDependencyError: nvdiffrast cannot be imported.
    """

    name = "nvdiffrast"

    def __init__(self, faces: np.ndarray | torch.Tensor) -> None:
        self._package = _import()
        self.faces = torch.as_tensor(faces).to(torch.int32).contiguous()
        self._ready: dict[torch.device, tuple[Any, torch.Tensor]] = {}  # context and faces of each device

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
            InputError: shapes that do not fit together, or points that are not on a CUDA device.
        """
        check_batch(points_px, attributes)
        if points_px.device.type != DEVICE:
            raise InputError(f"points_px: nvdiffrast draws on {DEVICE} only, got {points_px.device}; use renderer cpu")
        context, faces = self._on(points_px.device)
        clip = to_clip(points_px.float(), height, width)
        hits, _ = self._package.rasterize(context, clip, faces, (height, width), grad_db=False)
        image, _ = self._package.interpolate(attributes.float().contiguous(), hits, faces)
        return image.permute(0, 3, 1, 2), hits[..., 3] > 0

    def _on(self, device: torch.device) -> tuple[Any, torch.Tensor]:
        if device not in self._ready:
            self._ready[device] = self._package.RasterizeCudaContext(device=device), self.faces.to(device)
        return self._ready[device]


def to_clip(points_px: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Pixels and depth (B, N, 3) to the package's clip coordinates (B, N, 4), for a picture whose row 0 is the top one.

    Every w is half of the longer side, so that areas are counted in about pixels: the package adds 1e-6 to them where
    it divides, which is much for a small triangle when w is 1. Depth is spread over the depth range item by item; it
    decides what is seen and carries no gradient.
    """
    w = max(height, width) / 2
    x, y, depth = camera.px_to_ndc(points_px, height, width).unbind(-1)
    depth = depth.detach()
    near, far = depth.amin(-1, keepdim=True), depth.amax(-1, keepdim=True)
    z = (2 * (depth - near) / (far - near).clamp(min=torch.finfo(depth.dtype).tiny) - 1) * _DEPTH
    return torch.stack([x * w, -y * w, z * w, torch.full_like(x, w)], -1)


def _import() -> ModuleType:
    try:
        import nvdiffrast.torch as package
    except (ImportError, OSError) as error:  # OSError: built for another CUDA
        raise MissingDependencyError(f"renderer nvdiffrast: cannot be imported ({error}); {FIX}") from error
    return package
