"""Differentiable rendering behind one protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from chebface.errors import ConfigError, InputError, MissingDependencyError

if TYPE_CHECKING:
    import numpy as np
    import torch

NAMES = ("cpu", "nvdiffrast", "pytorch3d")
_ON_CUDA = ("nvdiffrast", "pytorch3d")  # what "auto" tries there, fastest first


class Renderer(Protocol):
    """Draws vertex attributes of one mesh topology, differentiable in points and attributes.

    The members agree: integers are pixel centres, smaller depth is nearer, both windings are drawn, a pixel shows the
    one surface point at its centre, attributes are linear over the triangle in the picture. Gradients flow through the
    barycentric coordinates; visibility itself has none.
    """

    name: str

    def render(
        self, points_px: torch.Tensor, attributes: torch.Tensor, height: int, width: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, N, 3) pixels and depth, (B, N, C) -> image (B, C, H, W), zero outside, and mask (B, H, W) bool."""


def open_renderer(faces: np.ndarray, name: str = "auto", device: str | torch.device = "cpu") -> Renderer:
    """Get a renderer; its `name` tells which.

    Args:
        faces: (M, 3) int triangle list.
        name: one of NAMES, or "auto": on a CUDA device the first of nvdiffrast and pytorch3d that can be imported,
            else the built-in one (pytorch3d's is slow on a CPU, so it is never chosen there).
        device: where the points will be; only "auto" asks.

    Raises:
        ConfigError: unknown name.
        MissingDependencyError: the named package cannot be imported.
    """
    if name == "auto":
        if str(device).startswith("cuda"):
            for member in _ON_CUDA:
                try:
                    return open_renderer(faces, member)
                except MissingDependencyError:
                    continue
        name = "cpu"
    if name == "cpu":
        from chebface.render.cpu import CpuRenderer

        return CpuRenderer(faces)
    if name == "nvdiffrast":
        from chebface.render.nvdiffrast import NvdiffrastRenderer

        return NvdiffrastRenderer(faces)
    if name == "pytorch3d":
        from chebface.render.pytorch3d import Pytorch3dRenderer

        return Pytorch3dRenderer(faces)
    raise ConfigError(f"renderer: expected auto or one of {', '.join(NAMES)}, got {name!r}")


def check_batch(points_px: torch.Tensor, attributes: torch.Tensor) -> None:
    """What every member asks of its input.

    Raises:
        InputError: not (B, N, 3), or attributes that are not (B, N, C).
    """
    if points_px.ndim != 3 or points_px.shape[-1] != 3:
        raise InputError(f"points_px: expected (B, N, 3), got {tuple(points_px.shape)}")
    if attributes.ndim != 3 or attributes.shape[:2] != points_px.shape[:2]:
        want = (*points_px.shape[:2], "C")
        raise InputError(f"attributes: expected {want}, got {tuple(attributes.shape)}")
