"""Plain charts drawn with Pillow, for reports: grouped bars and histograms. No plotting library is needed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from chebface.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

SIZE_PX = (900, 270)
LEFT, TOP, RIGHT, BOTTOM = 70, 44, 20, 34  # margins, pixels
COLORS = ((44, 98, 160), (226, 138, 48), (92, 160, 88), (150, 92, 160))
INK, GRID = (40, 40, 40), (224, 224, 224)
BINS = 48


def bars(title: str, groups: list[str], series: dict[str, list[float]], *, log: bool = False) -> Image:
    """Bars side by side in groups, one colour a series.

    Args:
        series: name to one number a group, none below 0.
        log: whether the scale is logarithmic, for numbers above 0.

    Raises:
        InputError: numbers of another count, not finite, or negative.
    """
    values = np.array(list(series.values()), np.float64).reshape(len(series), -1)
    if (
        values.shape != (len(series), len(groups))
        or not values.size
        or not (values >= 0).all()
        or np.isinf(values).any()
    ):
        raise InputError(f"{title}: expected {len(groups)} finite numbers from 0 up in each series")
    if log:
        low = 10.0 ** math.floor(math.log10(max(values[values > 0].min(initial=1.0), 1e-300)))
        high = 10.0 ** math.ceil(math.log10(max(values.max(), low * 10)))
        ticks = [low * 10.0**k for k in range(round(math.log10(high / low)) + 1)]
    else:
        ticks = _round_ticks(float(values.max()) or 1.0)
        low, high = 0.0, ticks[-1]

    def place(value: float) -> float:
        share = math.log(max(value, low) / low) / math.log(high / low) if log else value / high
        return SIZE_PX[1] - BOTTOM - share * (SIZE_PX[1] - TOP - BOTTOM)

    picture, pen = _frame(title, list(series))
    for tick in ticks:
        pen.line((LEFT, place(tick), SIZE_PX[0] - RIGHT, place(tick)), fill=GRID)
        pen.text((LEFT - 8, place(tick)), f"{tick:g}", fill=INK, anchor="rm")
    step = (SIZE_PX[0] - LEFT - RIGHT) / len(groups)
    wide = 0.8 * step / len(series)
    for column, group in enumerate(groups):
        for row in range(len(series)):
            x = LEFT + (column + 0.1) * step + row * wide
            y = place(values[row, column])
            pen.rectangle((x, y, x + wide - 1, SIZE_PX[1] - BOTTOM), fill=COLORS[row % len(COLORS)])
            pen.text((x + wide / 2, y - 3), f"{values[row, column]:.2g}", fill=INK, anchor="mb")
        pen.text((LEFT + (column + 0.5) * step, SIZE_PX[1] - BOTTOM + 6), group, fill=INK, anchor="mt")
    return picture


def histograms(title: str, series: dict[str, np.ndarray], limits: tuple[float, float]) -> Image:
    """Outlines of histograms over one axis, each scaled to its own peak.

    Raises:
        InputError: an empty series.
    """
    picture, pen = _frame(title, list(series))
    low, high = limits
    bottom, tall = SIZE_PX[1] - BOTTOM, SIZE_PX[1] - TOP - BOTTOM
    wide = (SIZE_PX[0] - LEFT - RIGHT) / BINS
    for row, (name, values) in enumerate(series.items()):
        if not len(values):
            raise InputError(f"{name}: expected values, got none")
        count = np.histogram(np.clip(values, low, high), BINS, limits)[0]
        points = [(float(LEFT), float(bottom))]
        for k, y in enumerate(bottom - count / count.max() * tall):
            points += [(LEFT + k * wide, float(y)), (LEFT + (k + 1) * wide, float(y))]
        points.append((float(SIZE_PX[0] - RIGHT), float(bottom)))
        pen.line(points, fill=COLORS[row % len(COLORS)], width=2)
    pen.line((LEFT, bottom, SIZE_PX[0] - RIGHT, bottom), fill=INK)
    for share in np.linspace(0, 1, 9):
        x = LEFT + share * (SIZE_PX[0] - LEFT - RIGHT)
        pen.text((x, bottom + 6), f"{low + share * (high - low):g}", fill=INK, anchor="mt")
    return picture


def stack(pictures: list[Image]) -> Image:
    """One picture, these below each other."""
    from PIL import Image as pillow

    whole = pillow.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), "white")
    top = 0
    for picture in pictures:
        whole.paste(picture, (0, top))
        top += picture.height
    return whole


def _frame(title: str, names: list[str]) -> tuple[Image, ImageDraw]:
    from PIL import Image as pillow
    from PIL import ImageDraw

    picture = pillow.new("RGB", SIZE_PX, "white")
    pen = ImageDraw.Draw(picture)
    pen.text((LEFT, 8), title, fill=INK)
    at = float(LEFT)
    for row, name in enumerate(names):
        pen.rectangle((at, 25, at + 9, 34), fill=COLORS[row % len(COLORS)])
        pen.text((at + 14, 24), name, fill=INK)
        at += 34 + pen.textlength(name)
    return picture, pen


def _round_ticks(most: float) -> list[float]:
    """Four to ten round numbers from 0 to above `most`."""
    step = 10.0 ** math.floor(math.log10(most))
    step = next(step * part for part in (0.1, 0.2, 0.25, 0.5, 1.0) if most / (step * part) <= 8)
    return [step * k for k in range(math.ceil(most / step) + 1)]
