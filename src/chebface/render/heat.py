"""A mesh coloured by a number per vertex, from three sides, with its scale: pictures of where an error lies."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from chebface.errors import InputError
from chebface.render.view import draw_view

if TYPE_CHECKING:
    from PIL.Image import Image

CELL_PX = 300
YAWS_DEG = (0.0, -40.0, -90.0)
BAR_PX = 46
FILL = 1.15  # of the picture, by the mesh's diagonal
STOPS = np.array(  # dark blue to yellow, each step lighter than the one before
    [[0.16, 0.11, 0.40], [0.20, 0.32, 0.60], [0.18, 0.53, 0.58], [0.36, 0.74, 0.45], [0.99, 0.91, 0.25]]
)


def colors(values: np.ndarray, most: float) -> np.ndarray:
    """RGB (..., 3) in [0, 1] of values (...) from 0 to `most`; what is beyond takes the end's colour."""
    place = np.clip(np.asarray(values, np.float64) / most, 0, 1) * (len(STOPS) - 1)
    low = np.minimum(place.astype(np.int64), len(STOPS) - 2)
    part = (place - low)[..., None]
    return STOPS[low] * (1 - part) + STOPS[low + 1] * part


def draw(vertices: np.ndarray, faces: np.ndarray, rows: dict[str, np.ndarray], unit: str, most: float = 0.0) -> Image:
    """Draw rows of views (front, three quarters, side), one row for each set of numbers, over one scale.

    Args:
        vertices: (N, 3), x to the subject's left, y up, z forward.
        faces: (M, 3).
        rows: title to (N,) numbers from 0 up.
        unit: what the numbers are in, for the scale.
        most: the top of the scale; 0 takes the 99th percentile of all.

    Raises:
        InputError: nothing to draw, or numbers of another count or not finite.
    """
    from PIL import Image, ImageDraw

    if not rows:
        raise InputError("rows: expected one at least")
    for title, values in rows.items():
        if values.shape != (len(vertices),) or not np.isfinite(values).all():
            raise InputError(f"{title}: expected ({len(vertices)},) finite numbers, got {values.shape}")
    top = most or float(np.percentile(np.concatenate(list(rows.values())), 99)) or 1.0
    width, height = len(YAWS_DEG) * CELL_PX, len(rows) * CELL_PX
    sheet = Image.new("RGB", (width, height + BAR_PX), "white")
    low, high = vertices.min(0).astype(np.float64), vertices.max(0).astype(np.float64)
    pen = ImageDraw.Draw(sheet)
    for row, (title, values) in enumerate(rows.items()):
        for column, yaw in enumerate(YAWS_DEG):
            view = draw_view(
                vertices,
                faces,
                colors(values, top),
                centre=(low + high) / 2,
                span=float(np.linalg.norm(high - low)) / FILL,
                yaw_deg=yaw,
                size=(CELL_PX, CELL_PX),
                shade=0.28,  # shows the form, and keeps the colours
            )
            sheet.paste(Image.fromarray(view), (column * CELL_PX, row * CELL_PX))
        pen.text((8, row * CELL_PX + 6), f"{title}: mean {values.mean():.2f} {unit}", fill=(40, 40, 40))
    bar = colors(np.linspace(0, 1, width - 120)[None].repeat(14, 0), 1.0)
    sheet.paste(Image.fromarray(np.rint(bar * 255).astype(np.uint8)), (60, height + 8))
    for share in (0.0, 0.5, 1.0):
        pen.text((60 + share * (width - 120) - 8, height + 26), f"{share * top:.2g} {unit}", fill=(40, 40, 40))
    return sheet
