"""A contact sheet of a head: the template, its main directions both ways, expressions, and a few random people."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from chebface.heads.asset import Head
from chebface.render.view import draw_view

if TYPE_CHECKING:
    from PIL.Image import Image

CELL = (230, 200)  # pixels, height and width
COLUMNS = 6
COMPONENTS = 6
PEOPLE = 12
SPAN = 0.285  # metres from a cell's top to its bottom
SEED = 7
CLAY = np.array([0.74, 0.74, 0.76])
SHADE = 0.7
SHOWN = [
    "jawOpen",
    "mouthSmileLeft",
    "mouthSmileRight",
    "mouthFrownLeft",
    "mouthPucker",
    "mouthFunnel",
    "browInnerUp",
    "browDownLeft",
    "eyeBlinkLeft",
    "eyeBlinkRight",
    "cheekPuff",
    "noseSneerLeft",
]
SHOWN_COUNT = 12


def draw(head: Head) -> Image:
    """Draw the contact sheet.

    Rows of six: the template from the front, three quarters and the side, in clay and in its mean albedo; the first six
    identity directions at -2 and +2 standard deviations; twelve expressions at full strength; twelve random people
    (seeded) with random skin.
    """
    from PIL import Image as pillow
    from PIL import ImageDraw

    cells = _cells(head)
    rows = -(-len(cells) // COLUMNS)
    sheet = pillow.new("RGB", (COLUMNS * CELL[1], rows * CELL[0]), "white")
    pen = ImageDraw.Draw(sheet)
    centre = (head.template.max(0) + head.template.min(0)).astype(np.float64) / 2
    for index, (label, vertices, albedo, yaw) in enumerate(cells):
        left, top = index % COLUMNS * CELL[1], index // COLUMNS * CELL[0]
        picture = draw_view(vertices, head.faces, albedo, centre=centre, span=SPAN, yaw_deg=yaw, size=CELL, shade=SHADE)
        sheet.paste(pillow.fromarray(picture), (left, top))
        pen.text((left + 5, top + 4), label, fill=(60, 60, 60))
    return sheet


def _cells(head: Head) -> list[tuple[str, np.ndarray, np.ndarray, float]]:
    """Everything to draw: label, (N, 3) vertices, (N, 3) albedo, yaw in degrees."""
    template = head.template.astype(np.float64)
    clay = np.broadcast_to(CLAY, template.shape)
    skin = head.texture_mean.astype(np.float64) if head.texture_mean.any() else clay
    cells = [(f"{head.name} {head.version}" if yaw == 0 else "", template, clay, yaw) for yaw in (0.0, -40.0, -90.0)]
    cells += [("albedo" if yaw == 0 else "", template, skin, yaw) for yaw in (0.0, -40.0, -90.0)]
    for index in range(COMPONENTS):
        for side in (-2, 2):
            vertices = template + side * head.shape_dirs[index]
            cells.append((f"shape {index}: {side:+d} sd", vertices, clay, -25.0))
    names = list(head.expression_names)
    shown = [names.index(name) for name in SHOWN if name in names] or list(range(SHOWN_COUNT))
    for index in shown:
        label = names[index] if index < len(names) else f"expression {index}"
        cells.append((label, template + head.expression_dirs[index], skin, 0.0))
    dice = np.random.default_rng(SEED)
    for person in range(PEOPLE):
        vertices = template + np.tensordot(dice.standard_normal(len(head.shape_dirs)), head.shape_dirs, 1)
        albedo = skin + np.tensordot(dice.standard_normal(len(head.texture_dirs)), head.texture_dirs, 1)
        cells.append((f"person {person + 1}", vertices, np.clip(albedo, 0, 1), -35.0 if person % 2 else 0.0))
    return cells
