"""Cut a face out of a photograph, and map points back.

Three frames, all with pixel centres at integers: the photo; the aligned crop (112 px, the five points of arcface's
template); the wide frame (224 px), which shows the whole head around the same face and in which the camera lives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from chebface.errors import InputError
from chebface.signature import CROP_PX

# image-left eye, image-right eye, nose tip, image-left and image-right mouth corner, in the aligned crop
ARCFACE_POINTS_PX = np.array(
    [(38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041)]
)
WIDE_PX = 224
_WIDE_SPAN_PX = 168  # aligned pixels that the wide frame covers
_WIDE_CENTRE_PX = (55.5, 60.0)  # aligned pixel in its middle
_ZOOM = WIDE_PX / _WIDE_SPAN_PX
WIDE_MATRIX = np.array(  # aligned px -> wide px
    [
        [_ZOOM, 0.0, (WIDE_PX - 1) / 2 - _ZOOM * _WIDE_CENTRE_PX[0]],
        [0.0, _ZOOM, (WIDE_PX - 1) / 2 - _ZOOM * _WIDE_CENTRE_PX[1]],
    ]
)


def transform(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Apply a 2D affine matrix to points: x' = matrix[:, :2] x + matrix[:, 2].

    Args:
        points: (..., 2).
        matrix: (2, 3).

    Returns:
        (..., 2) float64.

    Raises:
        InputError: wrong shapes.
    """
    points, matrix = np.asarray(points, np.float64), _affine(matrix)
    if points.ndim < 1 or points.shape[-1] != 2:
        raise InputError(f"points: expected (..., 2), got {points.shape}")
    return points @ matrix[:, :2].T + matrix[:, 2]


def invert(matrix: np.ndarray) -> np.ndarray:
    """The inverse of a 2D affine matrix, (2, 3) to (2, 3).

    Raises:
        InputError: wrong shape, not finite, or not invertible.
    """
    matrix = _affine(matrix)
    (a, b), (c, d) = matrix[:, :2].tolist()
    determinant = a * d - b * c
    if abs(determinant) < 1e-12:
        raise InputError(f"matrix: expected one that can be inverted, got {matrix.tolist()}")
    linear = np.array([[d, -b], [-c, a]]) / determinant
    return np.column_stack([linear, -linear @ matrix[:, 2]])


def compose(outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """The affine matrix (2, 3) that applies `inner` first, then `outer`.

    Raises:
        InputError: wrong shapes or values that are not finite.
    """
    outer, inner = _affine(outer), _affine(inner)
    return np.column_stack([outer[:, :2] @ inner[:, :2], outer[:, :2] @ inner[:, 2] + outer[:, 2]])


def _affine(matrix: np.ndarray) -> np.ndarray:
    matrix = np.asarray(matrix, np.float64)
    if matrix.shape != (2, 3) or not np.isfinite(matrix).all():
        raise InputError(f"matrix: expected (2, 3) of finite numbers, got {matrix.shape}")
    return matrix


def estimate_similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The similarity without reflection that maps source to target best in the sense of least squares.

    In the plane Umeyama's solution is one complex division: with centred points p and q,
    scale * rotation = sum(conj(p) q) / sum(|p|^2).

    Args:
        source: (P, 2), P at least 2.
        target: (P, 2).

    Returns:
        (2, 3) float64, source -> target.

    Raises:
        InputError: wrong shapes, values that are not finite, or points that coincide.
    """
    source, target = np.asarray(source, np.float64), np.asarray(target, np.float64)
    for name, points in (("source", source), ("target", target)):
        if points.ndim != 2 or points.shape[1] != 2 or len(points) < 2:
            raise InputError(f"{name}: expected (P, 2) with P at least 2, got {points.shape}")
        if not np.isfinite(points).all():
            raise InputError(f"{name}: expected finite points, got {points.tolist()}")
    if source.shape != target.shape:
        raise InputError(f"source and target: expected as many points in each, got {len(source)} and {len(target)}")
    centre_s, centre_t = source.mean(0), target.mean(0)
    p, q = (points[:, 0] + 1j * points[:, 1] for points in (source - centre_s, target - centre_t))
    spread, cross = float((np.abs(p) ** 2).sum()), complex((p.conj() * q).sum())
    size_p, size_q = math.sqrt(spread), float(np.linalg.norm(q))
    floor = 1e-9 * (1 + float(np.abs(centre_s).max()) + float(np.abs(centre_t).max()))
    if size_p < floor or size_q < floor or abs(cross) < 1e-9 * size_p * size_q:
        raise InputError("source and target: the points coincide or have no similarity between them")
    turn = cross / spread
    linear = np.array([[turn.real, -turn.imag], [turn.imag, turn.real]])
    return np.column_stack([linear, centre_t - linear @ centre_s])


def warp(image_u8: np.ndarray, matrix: np.ndarray, size: int) -> np.ndarray:
    """Resample a photograph: output pixel x shows what the photo has at matrix^-1 x.

    Bilinear; a strong reduction averages whole blocks of pixels first, so that nothing aliases. Outside the photo
    it is black. Pillow rounds down: half a grey level darker on average.

    Args:
        image_u8: (H, W, 3) uint8.
        matrix: (2, 3), photo px -> output px.
        size: side of the output.

    Returns:
        (size, size, 3) uint8.

    Raises:
        InputError: wrong shapes or dtype, or a matrix that cannot be inverted.
    """
    from PIL import Image

    _check_image(image_u8)
    back = invert(matrix)
    height, width = image_u8.shape[:2]
    corners = transform(np.array([(-1, -1), (size, -1), (-1, size), (size, size)]), back)
    block = max(1, round(math.sqrt(abs(float(np.linalg.det(back[:, :2]))))))
    low = np.floor(corners.min(0)) - 2 * block
    high = np.ceil(corners.max(0)) + 2 * block + 1
    x0, y0 = (int(v) for v in np.clip(low, 0, (width, height)))
    x1, y1 = (int(v) for v in np.clip(high, 0, (width, height)))
    if x0 >= x1 or y0 >= y1:
        return np.zeros((size, size, 3), np.uint8)
    picture = Image.fromarray(np.ascontiguousarray(image_u8[y0:y1, x0:x1]))
    if block > 1:
        picture = picture.reduce(block)
    # Pillow counts from the corner of the first pixel, we count from its centre: half a pixel on either side.
    linear, shift = back[:, :2], back[:, 2] - (x0, y0) + 0.5 - back[:, :2].sum(1) * 0.5
    rows = np.column_stack([linear, shift]) / block
    coefficients = tuple(float(v) for v in rows.ravel())
    out = picture.transform((size, size), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
    return np.array(out)


def _check_image(image_u8: np.ndarray) -> None:
    if image_u8.ndim != 3 or image_u8.shape[2] != 3 or image_u8.dtype != np.uint8 or 0 in image_u8.shape:
        raise InputError(f"image_u8: expected (H, W, 3) uint8, got {image_u8.shape} {image_u8.dtype}")


@dataclass(frozen=True, eq=False)
class Crop:
    """A face cut out of a photograph: the aligned picture and the way back."""

    aligned_u8: np.ndarray  # (112, 112, 3) RGB
    matrix: np.ndarray  # (2, 3), photo px -> aligned px

    @property
    def wide_matrix(self) -> np.ndarray:
        """(2, 3), photo px -> wide px."""
        return compose(WIDE_MATRIX, self.matrix)

    @property
    def wide_scale(self) -> float:
        """Wide pixels per photo pixel."""
        return math.sqrt(abs(float(np.linalg.det(self.wide_matrix[:, :2]))))

    def photo_to_aligned(self, points_px: np.ndarray) -> np.ndarray:
        """Points (..., 2) from the photo to the aligned crop."""
        return transform(points_px, self.matrix)

    def aligned_to_photo(self, points_px: np.ndarray) -> np.ndarray:
        """Points (..., 2) from the aligned crop to the photo."""
        return transform(points_px, invert(self.matrix))

    def photo_to_wide(self, points_px: np.ndarray) -> np.ndarray:
        """Points (..., 2) from the photo to the wide frame."""
        return transform(points_px, self.wide_matrix)

    def wide_to_photo(self, points_px: np.ndarray) -> np.ndarray:
        """Points (..., 2) from the wide frame to the photo."""
        return transform(points_px, invert(self.wide_matrix))

    def wide_u8(self, image_u8: np.ndarray) -> np.ndarray:
        """The wide frame (224, 224, 3) uint8 of the photograph (H, W, 3) that the crop was made from."""
        return warp(image_u8, self.wide_matrix, WIDE_PX)


def align(image_u8: np.ndarray, points_px: np.ndarray) -> Crop:
    """Cut the face with these five points out of a photograph.

    Args:
        image_u8: (H, W, 3) uint8 RGB.
        points_px: (5, 2): image-left eye, image-right eye, nose tip, image-left and image-right mouth corner.

    Returns:
        The aligned crop with its matrix.

    Raises:
        InputError: wrong shapes, values that are not finite, or points that coincide.
    """
    points_px = np.asarray(points_px, np.float64)
    if points_px.shape != ARCFACE_POINTS_PX.shape:
        raise InputError(f"points_px: expected (5, 2), got {points_px.shape}")
    matrix = estimate_similarity(points_px, ARCFACE_POINTS_PX)
    return Crop(warp(image_u8, matrix, CROP_PX), matrix)


def five_points(landmarks: np.ndarray) -> np.ndarray:
    """The five points that `align` wants, out of the 68 iBUG landmarks.

    Args:
        landmarks: (68, 2) in any frame.

    Returns:
        (5, 2) float64: eye centres, nose tip, mouth corners.

    Raises:
        InputError: not (68, 2).
    """
    landmarks = np.asarray(landmarks, np.float64)
    if landmarks.shape != (68, 2):
        raise InputError(f"landmarks: expected (68, 2), got {landmarks.shape}")
    eyes = [landmarks[36:42].mean(0), landmarks[42:48].mean(0)]
    return np.stack([*eyes, landmarks[30], landmarks[48], landmarks[54]])
