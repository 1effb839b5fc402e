from __future__ import annotations

import numpy as np
import pytest

from chebface.camera import ndc_to_px, project, px_to_ndc
from chebface.errors import InputError

RNG = np.random.default_rng(0)
POINTS = RNG.normal(0, 0.1, (2, 7, 3))
CAMERA = np.array([[6.0, 0.01, -0.02], [8.0, -0.03, 0.04]])


def test_projects_by_the_formula():
    ndc = project(POINTS, CAMERA)
    for b in range(2):
        for n in range(7):
            s, tx, ty = CAMERA[b]
            x, y, z = POINTS[b, n]
            np.testing.assert_allclose(ndc[b, n], [s * (x + tx), s * (y + ty), -s * z], rtol=1e-12)


def test_without_a_batch_it_is_the_same():
    np.testing.assert_array_equal(project(POINTS[0], CAMERA[0]), project(POINTS, CAMERA)[0])


def test_up_in_the_world_is_up_in_the_picture_and_nearer_is_smaller():
    camera = np.array([5.0, 0.0, 0.0])
    centre, up, left, near = ndc_to_px(
        project(np.array([[0, 0, 0], [0, 0.1, 0], [0.1, 0, 0], [0, 0, 0.1]]), camera), 20, 30
    )
    assert up[1] < centre[1] and left[0] > centre[0] and near[2] < centre[2]


def test_pixel_centres_are_integers():
    corners = np.array([[-1.0, 1.0], [1.0, -1.0], [0.0, 0.0]])
    np.testing.assert_allclose(ndc_to_px(corners, 4, 6), [[-0.5, -0.5], [5.5, 3.5], [2.5, 1.5]])


def test_px_to_ndc_is_the_inverse_and_keeps_depth():
    ndc = project(POINTS, CAMERA)
    px = ndc_to_px(ndc, 112, 224)
    np.testing.assert_array_equal(px[..., 2], ndc[..., 2])
    np.testing.assert_allclose(px_to_ndc(px, 112, 224), ndc, atol=1e-12)


def test_torch_gives_the_same_numbers_and_gradients():
    torch = pytest.importorskip("torch")
    points, camera = torch.tensor(POINTS, requires_grad=True), torch.tensor(CAMERA, requires_grad=True)
    px = ndc_to_px(project(points, camera), 24, 36)
    np.testing.assert_allclose(px.detach().numpy(), ndc_to_px(project(POINTS, CAMERA), 24, 36), atol=1e-12)
    np.testing.assert_allclose(px_to_ndc(px, 24, 36).detach().numpy(), project(POINTS, CAMERA), atol=1e-12)
    assert torch.autograd.gradcheck(lambda p, c: ndc_to_px(project(p, c), 24, 36), (points, camera))


def test_float32_stays_float32():
    ndc = project(POINTS.astype(np.float32), CAMERA.astype(np.float32))
    assert ndc.dtype == np.float32 and ndc_to_px(ndc, 3, 5).dtype == np.float32


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: project(np.zeros((4, 2)), np.zeros(3)), r"points: expected \(\.\.\., 3\), got \(4, 2\)"),
        (lambda: project(np.zeros((4, 3)), np.zeros(4)), r"camera: expected \(\.\.\., 3\), got \(4,\)"),
        (lambda: ndc_to_px(np.zeros((4, 1)), 3, 3), "ndc: expected .*at least 2"),
        (lambda: px_to_ndc(np.zeros(()), 3, 3), "points_px: expected"),
    ],
)
def test_wrong_shapes_are_named(call, words):
    with pytest.raises(InputError, match=words):
        call()
