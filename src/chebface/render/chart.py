"""Plain charts for reports, without a plotting library: bars and histograms drawn with Pillow, curves as SVG."""

from __future__ import annotations

import html
import math
from typing import TYPE_CHECKING

import numpy as np

from chebface.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

SIZE_PX = (900, 270)
LEFT, TOP, RIGHT, BOTTOM = 70, 44, 20, 34  # margins, pixels
COLORS = ((44, 98, 160), (226, 138, 48), (92, 160, 88), (150, 92, 160), (190, 60, 62), (110, 110, 110))
INK, GRID = (40, 40, 40), (224, 224, 224)
CURVES_PX = (900, 460)
BINS = 48


def spell(value: float) -> str:
    """Two digits, and all of a large number's before the point."""
    return f"{value:.0f}" if abs(value) >= 10 else f"{value:.2g}"


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
            pen.text((x + wide / 2, y - 3), spell(values[row, column]), fill=INK, anchor="mb")
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


def curves(
    series: dict[str, np.ndarray], limits: tuple[float, float], x_label: str, y_label: str, most: float = 100.0
) -> str:
    """Curves over one axis, as the text of an SVG file.

    Args:
        series: name to (S,) numbers, at S places evenly from limits[0] to limits[1]; two places at least.
        limits: the ends of the axis.
        x_label, y_label: what the axes are, with their units.
        most: the top of the other axis, which begins at 0.

    Raises:
        InputError: no series, or one of fewer than two numbers or not finite.
    """
    if not series:
        raise InputError("series: expected one at least")
    width, height = CURVES_PX
    right, bottom = width - RIGHT, height - BOTTOM - 16
    across, tall = right - LEFT, bottom - TOP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="13" fill="{_hex(INK)}">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for tick in _round_ticks(limits[1] - limits[0]):
        if tick <= limits[1] - limits[0]:
            x = LEFT + tick / (limits[1] - limits[0]) * across
            parts.append(f'<path d="M{x:.1f} {TOP}V{bottom}" stroke="{_hex(GRID)}"/>')
            parts.append(f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{limits[0] + tick:g}</text>')
    for tick in (k * most / 5 for k in range(6)):
        y = bottom - tick / most * tall
        parts.append(f'<path d="M{LEFT} {y:.1f}H{right}" stroke="{_hex(GRID)}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    middle = (TOP + bottom) / 2
    parts.append(f'<text x="{LEFT + across / 2}" y="{bottom + 38}" text-anchor="middle">{html.escape(x_label)}</text>')
    parts.append(
        f'<text transform="translate(22 {middle}) rotate(-90)" text-anchor="middle">{html.escape(y_label)}</text>'
    )
    for row, (name, values) in enumerate(series.items()):
        if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all():
            raise InputError(f"{name}: expected two or more finite numbers, got {values.shape}")
        xs = np.linspace(LEFT, right, len(values))
        ys = bottom - np.clip(values / most, 0, 1) * tall
        color = _hex(COLORS[row % len(COLORS)])
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
        y = bottom - 14 - 19 * (len(series) - 1 - row)  # where curves that rise from the left leave room
        parts.append(f'<path d="M{right - 220} {y}h26" stroke="{color}" stroke-width="2"/>')
        parts.append(f'<text x="{right - 186}" y="{y + 4}">{html.escape(name)}</text>')
    return "\n".join([*parts, "</svg>\n"])


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


def _hex(color: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)


def _round_ticks(most: float) -> list[float]:
    """Four to ten round numbers from 0 to above `most`."""
    step = 10.0 ** math.floor(math.log10(most))
    step = next(step * part for part in (0.1, 0.2, 0.25, 0.5, 1.0, 2.0) if most / (step * part) <= 8)
    return [step * k for k in range(math.ceil(most / step) + 1)]
