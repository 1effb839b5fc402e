"""A picture of a coloured mesh from any side, for sheets and reports. numpy only."""

from __future__ import annotations

import numpy as np

from chebface import camera
from chebface.mesh import vertex_normals
from chebface.render.raster import interpolate, rasterize

SUN = np.array([0.35, 0.40, 0.85]) / np.linalg.norm([0.35, 0.40, 0.85])


def draw_view(
    vertices: np.ndarray,
    faces: np.ndarray,
    albedo: np.ndarray,
    *,
    centre: np.ndarray,
    span: float,
    yaw_deg: float,
    size: tuple[int, int],
    shade: float,
) -> np.ndarray:
    """Draw a mesh on white with a soft light, smoothed by drawing at twice the size.

    Args:
        vertices: (N, 3) m; faces: (M, 3); albedo: (N, 3) RGB in [0, 1].
        centre: (3,) m, what is in the middle of the picture.
        span: metres from the picture's top to its bottom.
        yaw_deg: the mesh is turned by this about y.
        size: height and width in pixels.
        shade: how much of the colour depends on the light, 0 to 1.

    Returns:
        (H, W, 3) uint8.
    """
    height, width = 2 * size[0], 2 * size[1]
    turn = np.radians(yaw_deg)
    rotation = np.array([[np.cos(turn), 0, np.sin(turn)], [0, 1, 0], [-np.sin(turn), 0, np.cos(turn)]])
    points = (np.asarray(vertices, np.float64) - centre) @ rotation.T
    ndc = camera.project(points, np.array([2 / span, 0.0, 0.0])) * (height / width, 1, 1)
    triangle, barycentric = rasterize(camera.ndc_to_px(ndc, height, width).astype(np.float32), faces, height, width)
    light = 1 - shade + shade * np.clip(vertex_normals(points, faces) @ SUN, 0, 1)
    picture = interpolate(albedo * light[:, None], faces, triangle, barycentric)
    picture = np.where((triangle >= 0)[..., None], np.clip(picture, 0, 1), 1)
    small = picture.reshape(size[0], 2, size[1], 2, 3).mean((1, 3))
    return np.rint(small * 255).astype(np.uint8)
