"""Lambertian shading by nine spherical harmonics, for numpy arrays and torch tensors alike.

Source: Ramamoorthi and Hanrahan (SIGGRAPH 2001), with DECA's constants: bands 1 and 2 carry the cosine lobe, band 0
does not, so an even light of irradiance E has the coefficient E / 0.2821.
"""

from __future__ import annotations

import sys
from typing import Any

CONSTANTS = (0.2821, 1.0233, 1.0233, 1.0233, 0.8581, 0.8581, 0.8581, 0.4290, 0.2477)


def harmonics(normals: Any) -> Any:
    """The nine basis values of unit normals: 1, x, y, z, xy, xz, yz, x^2 - y^2, 3 z^2 - 1, times CONSTANTS.

    Args:
        normals: (..., 3), towards the camera is +z.

    Returns:
        (..., 9).
    """
    x, y, z = normals[..., 0], normals[..., 1], normals[..., 2]
    polynomials = (x * 0 + 1, x, y, z, x * y, x * z, y * z, x * x - y * y, 3 * z * z - 1)
    stack = sys.modules[type(normals).__module__.partition(".")[0]].stack
    return stack([c * p for c, p in zip(CONSTANTS, polynomials, strict=True)], -1)


def irradiance(normals: Any, light: Any) -> Any:
    """Light arriving at a surface.

    Args:
        normals: (..., N, 3) unit.
        light: (..., 27), or (..., 9, 3).

    Returns:
        (..., N, 3) RGB; times the albedo it is the colour seen.
    """
    return harmonics(normals) @ light.reshape(*light.shape[: normals.ndim - 2], 9, 3)
