"""What a network makes of a few faces while it learns: input, overlay, shape, and where the shape is wrong."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from chebface import camera, params
from chebface.crop import WIDE_PX
from chebface.data.batches import Batch
from chebface.errors import InputError
from chebface.flame import Flame
from chebface.mesh import vertex_normals
from chebface.render import heat, raster
from chebface.render.view import SUN, draw_view

ROWS = 4
SPAN_M = 0.32  # a head and some air
ERROR_MM = 6.0  # the end of the colour scale
CLAY = 0.8


@torch.no_grad()
def draw(flame: Flame, predicted: Tensor, batch: Batch, rows: int = ROWS) -> np.ndarray:
    """Draw the first faces of a batch, a row each.

    Args:
        flame: the head layer.
        predicted: (B, 486).
        batch: with wide frames.
        rows: at most so many.

    Returns:
        (rows * 224, 4 * 224, 3) uint8: the photo; the predicted head over it; its neutral shape from the front; the
        distance to the true neutral shape, 0 to ERROR_MM.

    Raises:
        InputError: the batch has no wide frames.
    """
    if batch.wide is None:
        raise InputError("batch: has no wide frames to draw on; make Batches(..., wide=True)")
    count = min(rows, len(batch))
    predicted = predicted[:count].float()
    parts = params.split(predicted)
    posed, _ = flame.decode(predicted)
    placed = camera.ndc_to_px(camera.project(posed, parts["camera"]), WIDE_PX, WIDE_PX).cpu().numpy()
    neutral = flame.neutral(parts["shape"])
    error_mm = (neutral - flame.neutral(batch.shape[:count])).norm(dim=-1).cpu().numpy() * 1000
    faces = flame.faces.cpu().numpy().astype(np.int32)
    sheet = []
    for i in range(count):
        photo = batch.wide[i].cpu().numpy()
        shape = neutral[i].cpu().numpy()
        views = [
            _view(shape, faces, colour) for colour in (np.full_like(shape, CLAY), heat.colors(error_mm[i], ERROR_MM))
        ]
        sheet.append(np.hstack([photo, _over(photo, placed[i], posed[i].cpu().numpy(), faces), *views]))
    return np.vstack(sheet)


def _view(vertices: np.ndarray, faces: np.ndarray, colour: np.ndarray) -> np.ndarray:
    middle = (vertices.max(0) + vertices.min(0)) / 2
    size = (WIDE_PX, WIDE_PX)
    return draw_view(vertices, faces, colour, centre=middle, span=SPAN_M, yaw_deg=0, size=size, shade=0.5)


def _over(photo: np.ndarray, placed: np.ndarray, vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    triangle, barycentric = raster.rasterize(placed.astype(np.float32), faces, WIDE_PX, WIDE_PX)
    light = 0.4 + 0.6 * np.clip(vertex_normals(vertices, faces) @ SUN, 0, 1)
    clay = raster.interpolate(np.repeat(light[:, None], 3, 1).astype(np.float32), faces, triangle, barycentric)
    mixed = np.where((triangle >= 0)[..., None], 0.35 * photo / 255 + 0.65 * CLAY * clay, photo / 255)
    return np.rint(np.clip(mixed, 0, 1) * 255).astype(np.uint8)
