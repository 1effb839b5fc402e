"""The result: a head in metres, where it lies in the photograph, and the files made from it."""

from __future__ import annotations

import io
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chebface import camera as cameras
from chebface import crop as crops
from chebface import mesh, params
from chebface.crop import Crop
from chebface.detect import Detection
from chebface.errors import InputError
from chebface.photo import Photo, read
from chebface.render.raster import interpolate, rasterize

if TYPE_CHECKING:
    from PIL import Image

_WORK_PX = 384  # side of the picture in which visibility and colours are looked up
_SHADE_PX = 1024  # the shaded mesh is drawn at most this large, then stretched
_RIM_PX = 9  # so near the outline of the head, the photo may already show what is behind
_OVERLAY_PX = 2048  # longest side of the saved overlay
_HIDDEN_BEHIND_M = 0.004  # a vertex this far behind the surface in front of it is hidden
_FACING = 0.4  # cosine below which a surface is too slanted to take its colour from the photo
_SKIN_TINT = np.array([0.80, 0.86, 0.97])
_OPACITY = 0.62


def project_to_photo(points: np.ndarray, camera: np.ndarray, crop: Crop) -> np.ndarray:
    """Project metres into the photograph.

    Args:
        points: (N, 3) m, head frame.
        camera: (3,) scale (1/m), tx, ty (m).
        crop: the crop that the camera was predicted from.

    Returns:
        (N, 3) float64: x and y in photo pixels; depth in photo pixels too, smaller is nearer.
    """
    ndc = cameras.project(np.asarray(points, np.float64), np.asarray(camera, np.float64))
    wide = cameras.ndc_to_px(ndc, crops.WIDE_PX, crops.WIDE_PX)
    return np.column_stack([crop.wide_to_photo(wide[:, :2]), wide[:, 2] * (crops.WIDE_PX / 2) / crop.wide_scale])


@dataclass(frozen=True, eq=False)
class Face:
    """One reconstructed head. N vertices, M triangles."""

    parameters: np.ndarray  # (486,) float32, see params.py
    vertices: np.ndarray  # (N, 3) float32 m, posed and with expression; x the subject's left, y up, z to the camera
    landmarks: np.ndarray  # (68, 3) float32 m, on the mesh
    landmarks_px: np.ndarray  # (68, 2) in the photo
    faces: np.ndarray  # (M, 3) int32
    crop: Crop
    detection: Detection
    photo_size: tuple[int, int]  # height, width of the photo in pixels
    found: int = 1  # faces that the detector found in the photo
    head: dict[str, str] = field(default_factory=dict)  # name, version, licence, sha256 of the head model
    timings_ms: dict[str, float] = field(default_factory=dict)  # read, detect, align, infer, total

    @property
    def camera(self) -> np.ndarray:
        """(3,) scale (1/m), tx, ty (m)."""
        return self.parameters[params.SLICES["camera"]]

    def vertices_px(self) -> np.ndarray:
        """The vertices in the photograph: (N, 3), x, y and depth in pixels, smaller depth is nearer."""
        return project_to_photo(self.vertices, self.camera, self.crop)

    def colors(self, image_u8: np.ndarray) -> np.ndarray:
        """Colours of the vertices, from the photograph where they can be seen in it, carried on over the mesh
        elsewhere.

        Args:
            image_u8: (H, W, 3) uint8, the photo.

        Returns:
            (N, 3) float32 sRGB in [0, 1].

        Raises:
            InputError: not the photo's size or dtype.
        """
        from PIL import Image, ImageFilter

        self._check_image(image_u8)
        points = self.vertices_px()
        low, high = points[:, :2].min(0), points[:, :2].max(0)
        zoom = (_WORK_PX - 8) / max(float((high - low).max()), 1e-6)
        matrix = np.array([[zoom, 0, 4 - zoom * low[0]], [0, zoom, 4 - zoom * low[1]]])
        work = np.column_stack([crops.transform(points[:, :2], matrix), points[:, 2] * zoom]).astype(np.float32)
        triangle, barycentric = rasterize(work, self.faces, _WORK_PX, _WORK_PX)
        surface = interpolate(work[:, 2:], self.faces, triangle, barycentric)[..., 0]
        covered = Image.fromarray((triangle >= 0).astype(np.uint8)).filter(ImageFilter.MinFilter(2 * _RIM_PX + 1))
        x, y = np.rint(work[:, :2]).astype(int).T
        photo_px_per_m = abs(float(self.camera[0])) * crops.WIDE_PX / 2 / self.crop.wide_scale
        slack = _HIDDEN_BEHIND_M * photo_px_per_m * zoom
        height, width = self.photo_size
        inside = (points[:, :2] >= 0).all(1) & (points[:, :2] <= (width - 1, height - 1)).all(1)
        facing = mesh.vertex_normals(self.vertices, self.faces)[:, 2] > _FACING
        seen = inside & facing & (np.asarray(covered)[y, x] > 0) & (work[:, 2] < surface[y, x] + slack)
        picture = crops.warp(image_u8, matrix, _WORK_PX).astype(np.float32) / 255
        colors = _sample(picture, work[:, :2])
        return _fill(np.where(seen[:, None], colors, 0), seen, self.faces)

    def overlay(self, image_u8: np.ndarray) -> np.ndarray:
        """The mesh, lit from the camera, and the landmarks over the photograph.

        Args:
            image_u8: (H, W, 3) uint8, the photo.

        Returns:
            (H, W, 3) uint8.

        Raises:
            InputError: not the photo's size or dtype.
        """
        from PIL import Image, ImageDraw

        self._check_image(image_u8)
        height, width = self.photo_size
        points = self.vertices_px()
        x0, y0 = (int(v) for v in np.clip(np.floor(points[:, :2].min(0)), 0, (width, height)))
        x1, y1 = (int(v) for v in np.clip(np.ceil(points[:, :2].max(0)) + 1, 0, (width, height)))
        out = Image.fromarray(image_u8)
        if x1 > x0 and y1 > y0:
            shade, alpha = self._shade(points, (x0, y0, x1, y1))
            out.paste(shade.resize((x1 - x0, y1 - y0)), (x0, y0), alpha.resize((x1 - x0, y1 - y0)))
        span = float(np.linalg.norm(np.ptp(self.landmarks_px, axis=0)))
        radius = max(1.0, span / 110)
        draw = ImageDraw.Draw(out)
        for x, y in self.landmarks_px.tolist():
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(40, 230, 90), outline=(0, 60, 20))
        return np.array(out)

    def _shade(self, points: np.ndarray, box: tuple[int, int, int, int]) -> tuple[Image.Image, Image.Image]:
        """The lit mesh and its opacity inside a box of the photo, at no more than _SHADE_PX."""
        from PIL import Image

        x0, y0, x1, y1 = box
        zoom = min(1.0, _SHADE_PX / max(x1 - x0, y1 - y0))
        w, h = max(1, round((x1 - x0) * zoom)), max(1, round((y1 - y0) * zoom))
        small = points * zoom
        small[:, :2] += (0.5 - np.array([x0, y0])) * zoom - 0.5
        triangle, barycentric = rasterize(small.astype(np.float32), self.faces, h, w)
        normals = interpolate(mesh.vertex_normals(self.vertices, self.faces), self.faces, triangle, barycentric)
        length = np.maximum(np.linalg.norm(normals, axis=-1), 1e-6)
        light = np.clip(normals @ np.array([0.15, 0.35, 0.92]) / length, 0, 1)
        color = _SKIN_TINT * (0.22 + 0.78 * light)[..., None]
        alpha = np.where(triangle >= 0, _OPACITY, 0.0)
        color_u8, alpha_u8 = (np.rint(layer * 255).astype(np.uint8) for layer in (color, alpha))
        return Image.fromarray(color_u8), Image.fromarray(alpha_u8)

    def to_json(self) -> dict[str, Any]:
        """Everything but the mesh and the pictures, as plain numbers with their units named."""
        height, width = self.photo_size
        return {
            "format": 1,
            "units": {"length": "m", "angle": "rad", "_px": "photo pixels, centres at integers"},
            "head": dict(self.head),
            "photo": {"height": height, "width": width, "faces": self.found},
            "detection": {
                "box_px": _numbers(self.detection.box_px),
                "score": float(self.detection.score),
                "points_px": _numbers(self.detection.points_px),
            },
            "crop": {"photo_to_aligned": _numbers(self.crop.matrix)},
            "parameters": {name: _numbers(part) for name, part in params.split(self.parameters).items()},
            "landmarks_m": _numbers(self.landmarks),
            "landmarks_px": _numbers(self.landmarks_px),
            "timings_ms": {name: round(value, 3) for name, value in self.timings_ms.items()},
        }

    def save(self, folder: str | os.PathLike[str], photo: Photo) -> dict[str, Path]:
        """Write head.obj, head.ply, head.glb (coloured from the photo), overlay.png and params.json.

        Args:
            folder: made when missing; files in it are replaced whole.
            photo: the photograph that was reconstructed, as `read` takes it.

        Returns:
            The paths by the names obj, ply, glb, overlay, params.

        Raises:
            PhotoError: the photo cannot be read.
            InputError: another photo: its size is not that of the reconstructed one.
            OSError: the disk refuses.
        """
        from PIL import Image

        image_u8 = read(photo)
        colors = self.colors(image_u8)
        picture = Image.fromarray(self.overlay(image_u8))
        picture.thumbnail((_OVERLAY_PX, _OVERLAY_PX))
        png = io.BytesIO()
        picture.save(png, "PNG", compress_level=3)
        folder = Path(folder)
        comment = " ".join(f"{key}={self.head[key]}" for key in ("name", "version", "licence") if key in self.head)
        comment = f"chebface; metres; head {comment}" if comment else "chebface; metres"
        text = json.dumps(self.to_json(), indent=1) + "\n"
        return {
            "obj": mesh.write_obj(folder / "head.obj", self.vertices, self.faces, colors, comment=comment),
            "ply": mesh.write_ply(folder / "head.ply", self.vertices, self.faces, colors, comment=comment),
            "glb": mesh.write_glb(folder / "head.glb", self.vertices, self.faces, colors, comment=comment),
            "overlay": mesh.write_whole(folder / "overlay.png", png.getvalue()),
            "params": mesh.write_whole(folder / "params.json", text.encode()),
        }

    def _check_image(self, image_u8: np.ndarray) -> None:
        if image_u8.shape != (*self.photo_size, 3) or image_u8.dtype != np.uint8:
            raise InputError(
                f"image_u8: expected the photo that was reconstructed, {(*self.photo_size, 3)} uint8, "
                f"got {image_u8.shape} {image_u8.dtype}"
            )


def _numbers(array: np.ndarray) -> Any:
    return np.round(np.asarray(array, np.float64), 7).tolist()


def _sample(picture: np.ndarray, points_px: np.ndarray) -> np.ndarray:
    """Bilinear samples (N, C) of a picture (H, W, C) at points (N, 2)."""
    limit = np.array([picture.shape[1], picture.shape[0]]) - 1
    at = np.clip(points_px, 0, limit - 1e-3)
    x, y = np.floor(at).astype(int).T
    fx, fy = (at - np.floor(at)).T[..., None]
    top = picture[y, x] * (1 - fx) + picture[y, x + 1] * fx
    return top * (1 - fy) + (picture[y + 1, x] * (1 - fx) + picture[y + 1, x + 1] * fx) * fy


def _fill(colors: np.ndarray, known: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Carry known colours (N, 3) over the edges of the mesh, ring by ring, then smooth what was carried."""
    count = len(colors)
    a = np.concatenate([faces, faces[:, [1, 2, 0]]]).ravel()
    b = np.concatenate([faces[:, [1, 2, 0]], faces]).ravel()

    def average(values: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        total = np.bincount(a, weight[b], minlength=count)
        sums = [np.bincount(a, weight[b] * values[b, k], minlength=count) for k in range(3)]
        return np.stack(sums, 1) / np.maximum(total, 1e-9)[:, None], total > 0

    out, done = colors.astype(np.float64), known.copy()
    while True:
        mean, reached = average(out, done.astype(np.float64))
        new = reached & ~done
        if not new.any():
            break
        out[new] = mean[new]
        done |= new
    rest = out[known].mean(0) if known.any() else np.full(3, 0.6)
    out[~done] = rest  # parts of the mesh of which nothing is seen
    blur = ~known & done
    for _ in range(30):
        mean, _ = average(out, np.ones(count))
        out[blur] = mean[blur]
    return np.clip(out, 0, 1).astype(np.float32)
