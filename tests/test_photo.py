from __future__ import annotations

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from chebface import photo
from chebface.errors import PhotoError

RNG = np.random.default_rng(0)
PICTURE = np.kron(RNG.integers(0, 256, (5, 7, 3)), np.ones((8, 8, 1))).astype(np.uint8)  # 40 x 56, flat blocks


def _encode(image, form="PNG", **options):
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, form, **options)
    return buffer.getvalue()


def _png_header(width, height):
    """A PNG that is nothing but a promise."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_come_back_exactly(form):
    np.testing.assert_array_equal(photo.read(_encode(PICTURE, form)), PICTURE)


@pytest.mark.parametrize(("form", "options"), [("JPEG", {"quality": 95}), ("WEBP", {"quality": 95}), ("GIF", {})])
def test_lossy_formats_come_back_nearly(form, options):
    smooth = np.array(Image.fromarray(PICTURE).resize((56, 40), Image.Resampling.BOX).convert("L").convert("RGB"))
    out = photo.read(_encode(smooth, form, **options))
    assert out.shape == smooth.shape and np.abs(out.astype(int) - smooth).mean() < 6


def test_paths_strings_bytes_and_arrays_agree(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(_encode(PICTURE))
    for given in (path, str(path), path.read_bytes(), bytearray(path.read_bytes()), PICTURE):
        np.testing.assert_array_equal(photo.read(given), PICTURE)


def test_the_exif_orientation_is_applied():
    turns = {
        1: PICTURE,
        2: PICTURE[:, ::-1],
        3: PICTURE[::-1, ::-1],
        4: PICTURE[::-1],
        5: PICTURE.transpose(1, 0, 2),
        6: np.rot90(PICTURE, -1),
        7: PICTURE[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(PICTURE),
        9: PICTURE,
    }
    for orientation, want in turns.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        np.testing.assert_array_equal(photo.read(_encode(PICTURE, exif=exif)), want)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about the tags
def test_damaged_exif_does_not_cost_the_picture():
    exif = b"Exif\0\0II*\0\xff\xff\xff\x7fgarbage"
    assert photo.read(_encode(PICTURE, "JPEG", exif=exif)).shape == PICTURE.shape


def test_grey_palette_cmyk_and_one_bit():
    grey = Image.fromarray(PICTURE).convert("L")
    want = np.repeat(np.array(grey)[..., None], 3, -1)
    np.testing.assert_array_equal(photo.read(_encode(grey)), want)
    np.testing.assert_array_equal(photo.read(np.array(grey)), want)
    palette = Image.fromarray(PICTURE).quantize(255)
    np.testing.assert_array_equal(photo.read(_encode(palette)), np.array(palette.convert("RGB")))
    cmyk = photo.read(_encode(Image.fromarray(np.full((32, 32, 3), (200, 30, 60), np.uint8)).convert("CMYK"), "JPEG"))
    assert np.abs(cmyk.mean((0, 1)) - (200, 30, 60)).max() < 8
    assert set(np.unique(photo.read(_encode(grey.convert("1"))))) == {0, 255}


def test_sixteen_bit_grey_keeps_its_range():
    deep = np.linspace(0, 65535, 32 * 40).astype(np.uint16).reshape(32, 40)
    out = photo.read(_encode(Image.fromarray(deep)))
    np.testing.assert_array_equal(out[..., 1], deep // 257)


def test_transparency_becomes_white():
    rgba = np.dstack([PICTURE, np.zeros((40, 56), np.uint8)])
    rgba[:, 28:, 3] = 255
    for given in (rgba, _encode(rgba)):
        out = photo.read(given)
        assert (out[:, :28] == 255).all()
        np.testing.assert_array_equal(out[:, 28:], PICTURE[:, 28:])
    half = photo.read(np.full((16, 16, 4), (0, 100, 255, 128), np.uint8))
    np.testing.assert_array_equal(half[0, 0], [127, 177, 255])
    keyed = Image.fromarray(np.zeros((20, 20), np.uint8)).convert("P")
    assert (photo.read(_encode(keyed, transparency=0)) == 255).all()


def test_a_view_comes_back_contiguous():
    out = photo.read(PICTURE[:, ::-1])
    assert out.flags.c_contiguous
    np.testing.assert_array_equal(out, PICTURE[:, ::-1])


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((32, 32, 3), np.float32), r"expected uint8, got float32; for RGB in \[0, 1\] pass"),
        (np.zeros((32, 32, 3), np.int64), "expected uint8, got int64"),
        (np.zeros((32, 32, 2), np.uint8), r"expected \(H, W, 3\) RGB.*got \(32, 32, 2\)"),
        (np.zeros((2, 32, 32, 3), np.uint8), "expected"),
        (np.zeros((1, 1, 3), np.uint8), "1 x 1 pixels is too small"),
        (np.zeros((0, 5, 3), np.uint8), "too small"),
        (np.broadcast_to(np.uint8(0), (20000, 20000, 3)), "400 megapixels, above the limit of 40"),
    ],
)
def test_wrong_arrays_are_named(array, words):
    with pytest.raises(PhotoError, match=words):
        photo.read(array)


def test_other_types_are_refused():
    with pytest.raises(PhotoError, match="expected a path, bytes or a numpy array, got list"):
        photo.read([[1, 2], [3, 4]])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html><body>not found</body></html>" * 9, "is not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n", "is not an image"),
        (_encode(np.zeros((1, 1, 3), np.uint8)), "1 x 1 pixels is too small for a face, wanted at least 16"),
        (_encode(PICTURE)[:-60], "damaged or cut short"),
        (_encode(PICTURE, "JPEG")[:-200], "damaged or cut short"),
        (_encode(Image.fromarray(np.zeros((20, 20), np.float32)), "TIFF"), "floating point pixels"),
        (_png_header(20000, 20000), "above the limit of 40 megapixels"),
        (_png_header(8000, 6000), "8000 x 6000 is 48 megapixels, above the limit of 40"),
        (_png_header(64, 64), "damaged or cut short"),
    ],
)
def test_what_is_no_photograph_is_named_with_its_fix(content, words, tmp_path):
    path = tmp_path / "renamed.jpg"
    path.write_bytes(content)
    with pytest.raises(PhotoError, match=words) as from_file:
        photo.read(path)
    assert str(path) in str(from_file.value) and "; " in str(from_file.value)
    with pytest.raises(PhotoError, match=words) as from_bytes:
        photo.read(content)
    assert str(from_bytes.value).startswith("photo (bytes): ")


def test_a_decompression_bomb_between_the_limits_is_refused():
    with pytest.raises(PhotoError, match="above the limit"):
        photo.read(_png_header(10000, 10000))


def test_missing_folder_and_special_files(tmp_path):
    with pytest.raises(PhotoError, match=r"nowhere\.jpg: not found; check the path"):
        photo.read(tmp_path / "nowhere.jpg")
    with pytest.raises(PhotoError, match="is a folder"):
        photo.read(tmp_path)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(PhotoError, match="not a regular file"):
        photo.read(pipe)
    with pytest.raises(PhotoError, match="photo"):
        photo.read("nul\0byte.jpg")
    with pytest.raises(PhotoError, match="cannot be read"):
        photo.read("x" * 5000)


def test_a_huge_file_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "huge.png"
    with open(path, "wb") as file:
        file.truncate((photo.MAX_FILE_MIB + 1) * 2**20)
    with pytest.raises(PhotoError, match="33 MiB is above the limit of 32 MiB"):
        photo.read(path)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
def test_flipped_bytes_give_a_picture_or_a_photo_error(form):
    whole = bytearray(_encode(PICTURE, form))
    for _ in range(150):
        content = bytearray(whole)
        for at in RNG.integers(0, len(content), 3):
            content[at] = RNG.integers(256)
        try:
            out = photo.read(bytes(content))
        except PhotoError as error:
            assert str(error).startswith("photo (bytes): ")
        else:
            assert out.ndim == 3 and out.dtype == np.uint8
