from __future__ import annotations

import numpy as np
import pytest

from chebface import crop
from chebface.errors import InputError

RNG = np.random.default_rng(0)


def _similarity(scale, degrees, tx, ty):
    a = np.deg2rad(degrees)
    return np.array([[np.cos(a) * scale, -np.sin(a) * scale, tx], [np.sin(a) * scale, np.cos(a) * scale, ty]])


def _smooth(height, width):
    y, x = np.mgrid[:height, :width].astype(np.float64)
    channels = [np.sin(x / 19) * np.cos(y / 23), np.cos(x / 31 + y / 17), np.sin((x - y) / 29)]
    return np.round(127.5 + 100 * np.stack(channels, -1)).astype(np.uint8)


@pytest.mark.parametrize("noise", [0.0, 4.0])
def test_similarity_agrees_with_skimage(noise):
    skimage = pytest.importorskip("skimage.transform")
    source = RNG.normal((900, 400), 40, (5, 2))
    target = crop.transform(source, _similarity(0.13, 37, 20, -5)) + noise * RNG.normal(0, 1, (5, 2))
    oracle = skimage.estimate_transform("similarity", source, target)
    np.testing.assert_allclose(crop.estimate_similarity(source, target), oracle.params[:2], atol=1e-9)


def test_similarity_never_reflects():
    source = RNG.normal(0, 10, (5, 2))
    matrix = crop.estimate_similarity(source, source * (-1, 1) + RNG.normal(0, 1, (5, 2)))
    assert np.linalg.det(matrix[:, :2]) > 0


def test_inverse_and_composition():
    a, b = _similarity(0.3, 20, 5, 6), _similarity(2.0, -70, 1, -9)
    points = RNG.normal(0, 50, (3, 4, 2))
    np.testing.assert_allclose(crop.transform(crop.transform(points, a), crop.invert(a)), points, atol=1e-9)
    np.testing.assert_allclose(
        crop.transform(points, crop.compose(b, a)), crop.transform(crop.transform(points, a), b), atol=1e-9
    )


def test_the_identity_warp_copies_every_pixel():
    image = RNG.integers(0, 256, (41, 53, 3), dtype=np.uint8)
    np.testing.assert_array_equal(crop.warp(image, np.eye(2, 3), 41), image[:, :41])


def test_a_whole_pixel_shift_is_exact_and_black_outside():
    image = RNG.integers(1, 256, (20, 30, 3), dtype=np.uint8)
    out = crop.warp(image, np.array([[1.0, 0, 3], [0, 1, -2]]), 32)
    want = np.zeros((32, 32, 3), np.uint8)
    want[:18, 3:] = image[2:, :29]
    np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize("scale", [2.3, 0.9, 0.45, 0.21])
def test_a_smooth_picture_is_resampled_like_skimage(scale):
    skimage = pytest.importorskip("skimage.transform")
    image, matrix = _smooth(460, 520), _similarity(scale, 17, 60 - 230 * scale, 20 - 230 * scale)
    inverse = skimage.AffineTransform(matrix=np.vstack([crop.invert(matrix), [0, 0, 1]]))
    oracle = skimage.warp(image, inverse, output_shape=(64, 64), order=1, preserve_range=True, mode="constant")
    y, x = np.mgrid[:64, :64]
    where = crop.transform(np.stack([x, y], -1), crop.invert(matrix))
    inside = ((where > 2 / scale) & (where < (520 - 2 / scale, 460 - 2 / scale))).all(-1)
    error = np.abs(crop.warp(image, matrix, 64) - oracle)[inside]
    assert inside.sum() > 1500 and error.mean() < 1.0 and error.max() < 4.0


@pytest.mark.parametrize("scale", [0.1, 0.13, 0.3])
def test_a_fine_checkerboard_averages_instead_of_aliasing(scale):
    y, x = np.mgrid[:400, :400]
    board = np.repeat((((x + y) % 2) * 255).astype(np.uint8)[..., None], 3, -1)
    inner = crop.warp(board, _similarity(scale, 30, 20, -5), 40)[12:22, 20:30]
    assert np.abs(inner.astype(int) - 127).max() < 20


def test_a_big_photo_costs_only_what_the_crop_shows():
    image = np.zeros((2000, 3000, 3), np.uint8)
    image[1500:1600, 2500:2600] = 200
    out = crop.warp(image, np.array([[1.0, 0, -2500], [0, 1, -1500]]), 100)
    assert (out == 200).all()
    assert not crop.warp(image, np.array([[1.0, 0, 5000], [0, 1, 5000]]), 100).any()


def test_align_puts_the_points_on_the_template():
    away = crop.invert(_similarity(0.4, 12, -30, 10))
    image, points = _smooth(500, 640), crop.transform(crop.ARCFACE_POINTS_PX, away)
    cut = crop.align(image, points)
    assert cut.aligned_u8.shape == (112, 112, 3) and cut.aligned_u8.dtype == np.uint8
    np.testing.assert_allclose(cut.photo_to_aligned(points), crop.ARCFACE_POINTS_PX, atol=1e-9)
    assert cut.wide_scale == pytest.approx(0.4 * 4 / 3)


def test_points_go_round_through_every_frame():
    cut = crop.Crop(np.zeros((112, 112, 3), np.uint8), _similarity(0.4, 12, -30, 10))
    points = RNG.uniform(0, 500, (68, 2))
    np.testing.assert_allclose(cut.aligned_to_photo(cut.photo_to_aligned(points)), points, atol=1e-9)
    np.testing.assert_allclose(cut.wide_to_photo(cut.photo_to_wide(points)), points, atol=1e-9)
    wide = crop.transform(cut.photo_to_aligned(points), crop.WIDE_MATRIX)
    np.testing.assert_allclose(wide, cut.photo_to_wide(points), atol=1e-9)


def test_the_wide_frame_is_where_it_is_said_to_be():
    np.testing.assert_allclose(crop.transform(np.array([55.5, 60.0]), crop.WIDE_MATRIX), [111.5, 111.5])
    edges = crop.transform(np.array([[55.5 - 84, 60 - 84], [55.5 + 84, 60 + 84]]), crop.WIDE_MATRIX)
    np.testing.assert_allclose(edges, [[-0.5, -0.5], [223.5, 223.5]])


def test_the_wide_picture_shows_the_aligned_one():
    image = _smooth(500, 640)
    cut = crop.align(image, crop.transform(crop.ARCFACE_POINTS_PX, crop.invert(_similarity(0.5, -8, -40, -60))))
    wide = cut.wide_u8(image)
    assert wide.shape == (224, 224, 3)
    again = crop.warp(wide, crop.invert(crop.WIDE_MATRIX), 112)
    assert np.abs(again.astype(int) - cut.aligned_u8)[2:-2, 2:-2].mean() < 1.5


def test_five_points_of_the_68():
    landmarks = RNG.normal(0, 1, (68, 2))
    points = crop.five_points(landmarks)
    np.testing.assert_allclose(points[0], landmarks[[36, 37, 38, 39, 40, 41]].mean(0))
    np.testing.assert_allclose(points[1], landmarks[[42, 43, 44, 45, 46, 47]].mean(0))
    np.testing.assert_array_equal(points[2:], landmarks[[30, 48, 54]])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: crop.transform(np.zeros((4, 3)), np.eye(2, 3)), "points: expected"),
        (lambda: crop.transform(np.zeros((4, 2)), np.eye(3)), "matrix: expected"),
        (lambda: crop.compose(np.eye(2, 3), np.full((2, 3), np.nan)), "matrix: expected"),
        (lambda: crop.invert(np.zeros((2, 3))), "inverted"),
        (lambda: crop.estimate_similarity(np.zeros((5, 3)), np.zeros((5, 3))), "source: expected"),
        (lambda: crop.estimate_similarity(np.eye(2), np.full((2, 2), np.inf)), "target: expected finite"),
        (lambda: crop.estimate_similarity(np.eye(2), RNG.normal(0, 1, (3, 2))), "as many points"),
        (lambda: crop.estimate_similarity(np.full((5, 2), 7.0), crop.ARCFACE_POINTS_PX), "coincide"),
        (lambda: crop.estimate_similarity(crop.ARCFACE_POINTS_PX, np.full((5, 2), 7.0)), "coincide"),
        (lambda: crop.warp(np.zeros((4, 4, 3)), np.eye(2, 3), 4), "image_u8: expected"),
        (lambda: crop.align(np.zeros((9, 9, 3), np.uint8), np.zeros((4, 2))), r"points_px: expected \(5, 2\)"),
        (lambda: crop.five_points(np.zeros((68, 3))), "landmarks: expected"),
    ],
)
def test_wrong_input_is_named(call, words):
    with pytest.raises(InputError, match=words):
        call()
