"""The rasteriser and the built-in renderer, against their definitions and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from chebface import native
from chebface.errors import ConfigError, InputError
from chebface.render import open_renderer, raster
from chebface.render.cpu import _interpolate_reference

HEIGHT, WIDTH = 33, 47
needs_compiler = pytest.mark.skipif(native.find_compiler() is None, reason="needs a C++ compiler")


def bumpy_sheet(seed: int = 0, n: int = 9) -> tuple[np.ndarray, np.ndarray]:
    """An n x n sheet of jittered points that overlaps itself in depth, larger than the picture."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:n, 0:n] / (n - 1)
    points = np.stack([x * (WIDTH + 10) - 5, y * (HEIGHT + 10) - 5, np.zeros_like(x)], -1).reshape(-1, 3)
    points += rng.normal(0, [2.5, 2.5, 1.0], points.shape)
    i = (np.arange(n - 1)[:, None] * n + np.arange(n - 1)).ravel()
    faces = np.concatenate([np.stack([i, i + 1, i + n], 1), np.stack([i + 1, i + n + 1, i + n], 1)])
    return points.astype(np.float32), faces.astype(np.int32)


@needs_compiler
@pytest.mark.parametrize("seed", range(5))
def test_native_agrees_with_the_definition(seed):
    points, faces = bumpy_sheet(seed)
    assert raster.implementation() == "native"
    got, want = (f(points, faces, HEIGHT, WIDTH) for f in (raster.rasterize, raster.rasterize_reference))
    same = got[0] == want[0]
    assert same.mean() > 0.998
    assert np.abs(got[1] - want[1])[same].max() < 2e-5
    values = np.random.default_rng(seed).normal(size=(len(points), 4))
    pictures = [f(values, faces, *want) for f in (raster.interpolate, raster.interpolate_reference)]
    np.testing.assert_allclose(*pictures, atol=1e-5)


def test_reference_runs_when_native_is_switched_off(monkeypatch):
    points, faces = bumpy_sheet()
    want = raster.rasterize_reference(points, faces, HEIGHT, WIDTH)
    monkeypatch.setenv("CHEBFACE_NATIVE", "0")
    native.forget()
    try:
        assert raster.implementation() == "reference (CHEBFACE_NATIVE=0)"
        got = raster.rasterize(points, faces, HEIGHT, WIDTH)
        image, _ = open_renderer(faces).render(*(torch.from_numpy(points)[None],) * 2, HEIGHT, WIDTH)
    finally:
        native.forget()
    np.testing.assert_array_equal(got[0], want[0])
    inside = want[0] >= 0
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    np.testing.assert_allclose(image[0, 0].numpy()[inside], x[inside], atol=2e-3)
    np.testing.assert_allclose(image[0, 1].numpy()[inside], y[inside], atol=2e-3)


def test_interpolating_positions_gives_back_pixel_centres():
    points, faces = bumpy_sheet(3)
    image, mask = open_renderer(faces).render(*(torch.from_numpy(points)[None],) * 2, HEIGHT, WIDTH)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    inside = mask[0].numpy()
    assert 0.8 < inside.mean() < 1.01
    np.testing.assert_allclose(image[0, 0].numpy()[inside], x[inside], atol=2e-3)
    np.testing.assert_allclose(image[0, 1].numpy()[inside], y[inside], atol=2e-3)
    assert (image[0].numpy()[:, ~inside] == 0).all()


def test_one_triangle_covers_what_geometry_says():
    points = np.array([[0, 0, 1], [10, 0, 1], [0, 10, 1]], np.float32)
    triangle, barycentric = raster.rasterize(points, np.array([[0, 1, 2]], np.int32), 12, 13)
    y, x = np.mgrid[0:12, 0:13]
    np.testing.assert_array_equal(triangle == 0, x + y <= 10)
    np.testing.assert_allclose(barycentric[2, 3], [0.5, 0.3, 0.2], atol=1e-6)


def test_nearer_triangle_wins_in_either_order_and_winding():
    far, near = [[0, 0, 5], [20, 0, 5], [0, 20, 5]], [[0, 0, 1], [10, 0, 1], [0, 10, 1]]
    points = np.array(far + near, np.float32)
    for faces, expected in (([[0, 1, 2], [3, 4, 5]], 1), ([[3, 5, 4], [0, 1, 2]], 0)):
        triangle, _ = raster.rasterize(points, np.array(faces, np.int32), 21, 22)
        assert triangle[2, 2] == expected
        assert triangle[8, 8] == 1 - expected


@needs_compiler
def test_gradients_agree_with_autograd_through_the_definition():
    points_np, faces = bumpy_sheet(1)
    weights = torch.from_numpy(np.random.default_rng(0).normal(size=(HEIGHT, WIDTH, 5)).astype(np.float32))
    attributes_np = np.random.default_rng(1).normal(size=(len(points_np), 5)).astype(np.float32)
    triangle, barycentric = raster.rasterize(points_np, faces, HEIGHT, WIDTH)
    results = []
    for dtype in (torch.float32, torch.float64):
        points = torch.tensor(points_np, dtype=dtype, requires_grad=True)
        attributes = torch.tensor(attributes_np, dtype=dtype, requires_grad=True)
        if dtype == torch.float32:
            image, _ = open_renderer(faces).render(points[None], attributes[None], HEIGHT, WIDTH)
            image = image[0].permute(1, 2, 0)
        else:
            image = _interpolate_reference(points, attributes, faces, triangle, barycentric)
        (image * weights).sum().backward()
        results.append((points.grad[:, :2].double(), attributes.grad.double()))
    for got, want in zip(*results, strict=True):
        assert (got - want).abs().max() < 1e-3 * want.abs().max()


def test_a_batch_is_its_pictures_one_by_one_on_any_number_of_threads():
    sheets = [bumpy_sheet(seed) for seed in range(5)]
    faces, rng = sheets[0][1], np.random.default_rng(2)
    points = torch.from_numpy(np.stack([sheet for sheet, _ in sheets])).requires_grad_()
    values = torch.from_numpy(rng.normal(size=(*points.shape[:2], 2)).astype(np.float32)).requires_grad_()
    renderer, before, answers = open_renderer(faces, "cpu"), torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            image, mask = renderer.render(points, values, 30, 40)
            answers.append((image, mask, *torch.autograd.grad((image**2).sum(), (points, values))))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for pair in zip(*answers, strict=True))
    for item, picture in enumerate(answers[0][0]):
        alone, _ = renderer.render(points[item][None], values[item][None], 30, 40)
        assert torch.equal(alone[0], picture) and bool(picture.any())


def test_moving_the_mesh_moves_the_picture():
    """Law: the analytic gradient of a smooth picture equals its finite difference under a small shift."""
    points, faces = bumpy_sheet(2)
    base = torch.tensor(points, requires_grad=True)
    attributes = torch.sin(torch.tensor(points[:, :1]) / 7)
    render = open_renderer(faces).render

    def centre_sum(p):
        return render(p[None], attributes[None], HEIGHT, WIDTH)[0][0, 0, 10:20, 15:30].sum()

    centre_sum(base).backward()
    step = 1e-2
    shift = torch.tensor([step, 0, 0])
    difference = (centre_sum(base.detach() + shift) - centre_sum(base.detach() - shift)) / (2 * step)
    assert base.grad[:, 0].sum().item() == pytest.approx(difference.item(), rel=0.05)


@pytest.mark.parametrize(
    ("points", "faces", "size", "names"),
    [
        (np.zeros((4, 2)), [[0, 1, 2]], (5, 6), "points_px"),
        (np.zeros((4, 3)), [[0, 1]], (5, 6), "faces"),
        (np.zeros((4, 3)), [[0, 1, 4]], (5, 6), "faces"),
        (np.zeros((4, 3)), [[0, 1, 2]], (0, 6), "height"),
    ],
)
def test_bad_meshes_are_refused_by_name(points, faces, size, names):
    with pytest.raises(InputError, match=names):
        raster.rasterize(points, np.array(faces), *size)


def test_bad_batches_are_refused_by_name():
    renderer = open_renderer(np.array([[0, 1, 2]]))
    with pytest.raises(InputError, match="points_px"):
        renderer.render(torch.zeros(4, 3), torch.zeros(1, 4, 2), 5, 6)
    with pytest.raises(InputError, match="attributes"):
        renderer.render(torch.zeros(1, 4, 3), torch.zeros(1, 5, 2), 5, 6)


def test_degenerate_and_infinite_triangles_draw_nothing():
    points = np.array([[1, 1, 0], [5, 5, 0], [9, 9, 0], [np.inf, 0, 0], [np.nan, 3, 0]], np.float32)
    faces = np.array([[0, 1, 2], [0, 1, 3], [0, 2, 4]], np.int32)
    for function in (raster.rasterize, raster.rasterize_reference):
        triangle, barycentric = function(points, faces, 12, 13)
        assert (triangle == -1).all()
        assert (barycentric == 0).all()


def test_renderers_by_name():
    faces = np.array([[0, 1, 2]])
    assert open_renderer(faces).name == open_renderer(faces, "cpu").name == "cpu"
    with pytest.raises(ConfigError, match="expected auto or one of cpu, nvdiffrast, pytorch3d, got 'gl'"):
        open_renderer(faces, "gl")


def test_interpolation_checks_what_it_reads():
    points, faces = bumpy_sheet()
    hits = raster.rasterize(points, faces, HEIGHT, WIDTH)
    with pytest.raises(InputError, match="attributes: expected"):
        raster.interpolate(np.zeros((5, 3)), faces, *hits)
    with pytest.raises(InputError, match="triangle: expected"):
        raster.interpolate(np.zeros((len(points), 3)), faces[:4], *hits)
    with pytest.raises(InputError, match="barycentric: expected"):
        raster.interpolate(np.zeros((len(points), 3)), faces, hits[0], hits[1][:-1])
