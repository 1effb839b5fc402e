"""Differentiable rendering behind one protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from chebface.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    import torch

NAMES = ("cpu",)


class Renderer(Protocol):
    """Draws vertex attributes of one mesh topology, differentiable in points and attributes."""

    name: str

    def render(
        self, points_px: torch.Tensor, attributes: torch.Tensor, height: int, width: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, N, 3) pixels and depth, (B, N, C) -> image (B, C, H, W), zero outside, and mask (B, H, W) bool."""


def open_renderer(faces: np.ndarray, name: str = "auto") -> Renderer:
    """Get a renderer; its `name` tells which.

    Args:
        faces: (M, 3) int triangle list.
        name: one of NAMES, or "auto" for the fastest that is installed.

    Raises:
        ConfigError: unknown name.
    """
    if name in {"auto", "cpu"}:
        from chebface.render.cpu import CpuRenderer

        return CpuRenderer(faces)
    raise ConfigError(f"renderer: expected auto or one of {', '.join(NAMES)}, got {name!r}")
