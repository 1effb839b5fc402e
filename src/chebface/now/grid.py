"""The qualitative grid of the paper's Figure 3 for any photos: input, overlay, shape from the front and from the side.

A row is a face. A photo that fails has a row too, which says why.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chebface import params
from chebface.errors import InputError, PhotoError
from chebface.face import Face
from chebface.files import whole
from chebface.photo import read
from chebface.render.view import draw_view

if TYPE_CHECKING:
    from PIL.Image import Image

    from chebface.pipeline import Pipeline

COLUMNS = ("input", "overlay", "shape, front", "shape, side")
CELL_PX = 256
LABEL_PX = 20  # under a cell: the photo's name
GAP_PX = 6
AROUND = 1.35  # side of the window in the photo, by the larger side of the projected head
FILL = 1.12  # height of a view, by the head's
YAWS_DEG = (0.0, -90.0)
CLAY, SHADE = np.array([0.74, 0.74, 0.76]), 0.7
INK, WARN = (40, 40, 40), (170, 40, 40)


def grid(
    photos: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    pipeline: Pipeline,
    *,
    most: int | None = 1,
) -> list[dict[str, Any]]:
    """Draw the grid, one row for each face.

    Args:
        photos: paths.
        output: the .png file.
        pipeline: what reconstructs: a Reconstructor or a Client.
        most: faces of each photo at most, largest first; None for every face.

    Returns:
        One row per photo, in order: {"photo", "faces": faces drawn, "error": why there are none, or None}.

    Raises:
        InputError: no photos, `most` below 1, or an output that is no .png.
        OSError: the disk refuses.
        ServerError, MissingDependencyError: no photo can be reconstructed; a single bad photo only gets its row.
    """
    output = Path(output)
    if not photos:
        raise InputError("photos: expected one at least")
    if most is not None and most < 1:
        raise InputError(f"most: expected 1 or above, or None for every face, got {most}")
    if output.suffix.lower() != ".png":
        raise InputError(f"output: expected a .png file, got {output.name}")
    rows: list[Image] = []
    found: list[dict[str, Any]] = []
    for photo in photos:
        label = Path(photo).name
        try:
            faces = (pipeline.reconstruct_all(photo) if most != 1 else [pipeline.reconstruct(photo)])[:most]
        except PhotoError as error:
            rows.append(_failed(photo, label, str(error)))
            found.append({"photo": os.fspath(photo), "faces": 0, "error": str(error)})
            continue
        image_u8 = read(photo)
        for index, face in enumerate(faces):
            rows.append(_row(face, image_u8, label if len(faces) == 1 else f"{label}, face {index + 1}"))
        found.append({"photo": os.fspath(photo), "faces": len(faces), "error": None})
    with whole(output) as partial:
        _sheet(rows).save(partial, "PNG")
    return found


def unposed(face: Face) -> np.ndarray:
    """The vertices (N, 3) m of a face turned back to look into the camera, about their middle; the expression stays."""
    turn = np.asarray(face.parameters[params.SLICES["pose"]][params.HEAD_POSE], np.float64)
    middle = (face.vertices.max(0) + face.vertices.min(0)).astype(np.float64) / 2
    return (face.vertices - middle) @ _rotation(turn)  # a row vector times R is R's inverse times the vector


def _rotation(axis_angle: np.ndarray) -> np.ndarray:
    """Rodrigues' formula: (3,) rad to (3, 3)."""
    angle = float(np.linalg.norm(axis_angle))
    x, y, z = axis_angle / max(angle, 1e-12)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def _row(face: Face, image_u8: np.ndarray, label: str) -> Image:
    points = face.vertices_px()[:, :2]
    low, high = points.min(0), points.max(0)
    side = AROUND * float((high - low).max())
    corner = (low + high) / 2 - side / 2
    vertices = unposed(face)
    tall = float(np.ptp(vertices[:, 1]))
    middle = (vertices.max(0) + vertices.min(0)) / 2
    clay = np.broadcast_to(CLAY, vertices.shape)
    shapes = [
        draw_view(
            vertices,
            face.faces,
            clay,
            centre=middle,
            span=FILL * tall,
            yaw_deg=yaw,
            size=(CELL_PX, CELL_PX),
            shade=SHADE,
        )
        for yaw in YAWS_DEG
    ]
    return _join([_window(image_u8, corner, side), _window(face.overlay(image_u8), corner, side), *shapes], label)


def _window(image_u8: np.ndarray, corner: np.ndarray, side: float) -> np.ndarray:
    """A square of a photo as a cell; white where it reaches beyond the photo."""
    from PIL import Image

    box = np.concatenate([corner, corner + side])
    left, top, right, bottom = (int(v) for v in np.rint(box))
    height, width = image_u8.shape[:2]
    square = Image.new("RGB", (right - left, bottom - top), "white")
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
    if x1 > x0 and y1 > y0:
        square.paste(Image.fromarray(image_u8[y0:y1, x0:x1]), (x0 - left, y0 - top))
    return np.array(square.resize((CELL_PX, CELL_PX), Image.Resampling.LANCZOS))


def _failed(photo: str | os.PathLike[str], label: str, why: str) -> Image:
    """The photo, where it can be read, and what went wrong."""
    from PIL import Image, ImageDraw

    cells = [np.full((CELL_PX, CELL_PX, 3), 240, np.uint8)] + [np.full((CELL_PX, CELL_PX, 3), 255, np.uint8)] * 3
    try:
        picture = Image.fromarray(read(photo))
    except PhotoError:
        pass  # `why` says it
    else:
        picture.thumbnail((CELL_PX, CELL_PX))
        paper = Image.new("RGB", (CELL_PX, CELL_PX), (240, 240, 240))
        paper.paste(picture, ((CELL_PX - picture.width) // 2, (CELL_PX - picture.height) // 2))
        cells[0] = np.array(paper)
    row = _join(cells, label)
    text = "\n".join(textwrap.wrap(why.replace(os.fspath(photo), label), 90, break_long_words=True))
    ImageDraw.Draw(row).multiline_text((CELL_PX + 3 * GAP_PX, CELL_PX // 3), text, fill=WARN, font=_font(), spacing=5)
    return row


def _join(cells: list[np.ndarray], label: str) -> Image:
    from PIL import Image, ImageDraw

    row = Image.new("RGB", (len(COLUMNS) * (CELL_PX + GAP_PX) + GAP_PX, CELL_PX + LABEL_PX), "white")
    for column, cell in enumerate(cells):
        row.paste(Image.fromarray(cell), (GAP_PX + column * (CELL_PX + GAP_PX), 0))
    pen, font = ImageDraw.Draw(row), _font()
    while len(label) > 4 and pen.textlength(label, font=font) > CELL_PX:
        label = label[: len(label) // 2 - 2] + "…" + label[len(label) // 2 + 1 :]
    pen.text((GAP_PX, CELL_PX + 2), label, fill=INK, font=font)
    return row


def _sheet(rows: list[Image]) -> Image:
    from PIL import Image, ImageDraw

    head = LABEL_PX + 2 * GAP_PX
    sheet = Image.new("RGB", (rows[0].width, head + len(rows) * (rows[0].height + GAP_PX)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, name in enumerate(COLUMNS):
        middle = GAP_PX + column * (CELL_PX + GAP_PX) + CELL_PX / 2
        pen.text((middle, head / 2), name, fill=INK, font=_font(), anchor="mm")
    for index, row in enumerate(rows):
        sheet.paste(row, (0, head + index * (row.height + GAP_PX)))
    return sheet


def _font() -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(13)
