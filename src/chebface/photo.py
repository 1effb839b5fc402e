"""Read one photograph, upright, as RGB bytes; refuse by name what cannot be read or is outside the limits."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from chebface.errors import PhotoError

if TYPE_CHECKING:
    from PIL import Image

Photo: TypeAlias = "str | os.PathLike[str] | bytes | np.ndarray"

MAX_FILE_MIB = 32
MAX_MEGAPIXELS = 40
MIN_SIDE_PX = 16

# Only what decodes in this process: PostScript, for one, would start an interpreter.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "AVIF", "HEIF")
_BROKEN = (  # what Pillow lets through when a file lies
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, MemoryError),
    *(struct.error, zlib.error, UserWarning),  # the last where warnings are made errors
)
_ORIENTATION = 0x0112  # the EXIF tag
_AGAIN = "save it again as JPEG or PNG"


def read(photo: Photo) -> np.ndarray:
    """Read a photograph, turned upright as its EXIF orientation says; transparent pixels become white.

    Args:
        photo: a path, the bytes of an image file, or an array: (H, W, 3) uint8 RGB, (H, W) grey or (H, W, 4) RGBA.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        PhotoError: missing, not an image, damaged, or outside the limits (MAX_FILE_MIB, MAX_MEGAPIXELS,
            MIN_SIDE_PX), which are read from the header before anything is decoded.
    """
    if isinstance(photo, np.ndarray):
        return _from_array(photo)
    if isinstance(photo, (bytes, bytearray, memoryview)):
        return _decode(bytes(photo), name(photo))
    if isinstance(photo, (str, os.PathLike)):
        return _decode(load(photo), name(photo))
    raise PhotoError(f"photo: expected a path, bytes or a numpy array, got {type(photo).__name__}")


def name(photo: Photo) -> str:
    """What to call a photograph in a message."""
    if isinstance(photo, (str, os.PathLike)):
        return f"photo {os.fspath(photo)}"
    return "photo (array)" if isinstance(photo, np.ndarray) else "photo (bytes)"


def load(photo: str | os.PathLike[str]) -> bytes:
    """The bytes of a photo's file.

    Raises:
        PhotoError: no file there, empty, or too large.
    """
    what, path = name(photo), Path(photo)
    try:
        if path.is_dir():
            raise PhotoError(f"{what}: is a folder; give the image files in it")
        if not path.exists():
            raise PhotoError(f"{what}: not found; check the path")
        if not path.is_file():
            raise PhotoError(f"{what}: is not a regular file; give an image file")
        _check_bytes(path.stat().st_size, what)
        return path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, PhotoError):
            raise
        raise PhotoError(f"{what}: cannot be read ({error}); check the path and its permissions") from error


def _check_bytes(size: int, what: str) -> None:
    if size == 0:
        raise PhotoError(f"{what}: is empty; copy or download it again")
    if size > MAX_FILE_MIB * 2**20:
        raise PhotoError(
            f"{what}: {size / 2**20:.0f} MiB is above the limit of {MAX_FILE_MIB} MiB; make it smaller first"
        )


def _check_size(width: int, height: int, what: str) -> None:
    if width * height > MAX_MEGAPIXELS * 1_000_000:
        raise PhotoError(
            f"{what}: {width} x {height} is {width * height / 1e6:.0f} megapixels, above the limit of "
            f"{MAX_MEGAPIXELS}; make it smaller first"
        )
    if min(width, height) < MIN_SIDE_PX:
        raise PhotoError(
            f"{what}: {width} x {height} pixels is too small for a face, wanted at least {MIN_SIDE_PX} on each side; "
            "use a larger photo"
        )


def _decode(content: bytes, what: str) -> np.ndarray:
    from PIL import Image

    _check_bytes(len(content), what)
    Image.init()
    try:
        with Image.open(io.BytesIO(content), formats=[known for known in _FORMATS if known in Image.OPEN]) as image:
            _check_size(image.width, image.height, what)
            image.load()
            return _to_rgb(_turn_upright(image), what)
    except PhotoError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PhotoError(
            f"{what}: far above the limit of {MAX_MEGAPIXELS} megapixels ({error}); make it smaller first"
        ) from error
    except Image.UnidentifiedImageError as error:
        raise PhotoError(f"{what}: is not an image that can be read here; {_AGAIN}") from error
    except _BROKEN as error:
        raise PhotoError(f"{what}: is damaged or cut short ({error}); copy it again, or {_AGAIN}") from error


def _turn_upright(image: Image.Image) -> Image.Image:
    from PIL import Image

    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    try:
        turn = turns.get(image.getexif().get(_ORIENTATION, 1))
    except _BROKEN:  # pixels are whole, only the tags are not: take the picture as it lies
        return image
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image, what: str) -> np.ndarray:
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
        deep = np.asarray(image, dtype=np.int64)
        return _from_array((np.clip(deep, 0, 65535) // 257).astype(np.uint8))
    if image.mode == "F":
        raise PhotoError(f"{what}: has floating point pixels, whose range is not known; {_AGAIN}")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        return _over_white(np.asarray(image.convert("RGBA")))
    return np.array(image.convert("RGB"))


def _over_white(rgba_u8: np.ndarray) -> np.ndarray:
    alpha = rgba_u8[..., 3:].astype(np.uint16)
    return ((rgba_u8[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _from_array(array: np.ndarray) -> np.ndarray:
    if array.dtype != np.uint8:
        fix = "; for RGB in [0, 1] pass (255 * image).round().astype(np.uint8)" if array.dtype.kind == "f" else ""
        raise PhotoError(f"photo (array): expected uint8, got {array.dtype}{fix}")
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise PhotoError(f"photo (array): expected (H, W, 3) RGB, (H, W) grey or (H, W, 4) RGBA, got {array.shape}")
    _check_size(array.shape[1], array.shape[0], "photo (array)")
    if array.ndim == 2:
        return np.repeat(array[..., None], 3, -1)
    return _over_white(array) if array.shape[2] == 4 else np.ascontiguousarray(array)
