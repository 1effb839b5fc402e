"""The lit picture: normals, texture, light, camera and mask, against numpy, laws and finite differences."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from heads_for_tests import make_head

from chebface import crop, mesh, params
from chebface.errors import AssetError, InputError
from chebface.flame import Flame
from chebface.render import open_renderer, raster
from chebface.render.shade import Normals, Shader, hold_skin, wide_to_aligned

SIZE = 57


@pytest.fixture(scope="module")
def small_head():
    return make_head()


@pytest.fixture(scope="module")
def scene(small_head):
    """A shader, and vertices (2, N, 3) with the parameters (2, 486) that they belong to."""
    rng = np.random.default_rng(3)
    parameters = torch.zeros(2, params.TOTAL)
    parts = params.split(parameters)
    parts["shape"][:] = torch.from_numpy(rng.normal(size=(2, 300)))
    parts["texture"][:] = torch.from_numpy(rng.normal(size=(2, 50)))
    parts["pose"][:, :3] = torch.tensor([[0.1, 0.4, 0.05], [-0.1, -0.3, 0.0]])
    parts["camera"][:] = torch.tensor([[6.0, 0.01, -0.01], [6.7, 0.0, 0.02]])
    parts["light"][:] = torch.from_numpy(rng.normal(size=(2, 27)) * 0.3)
    parts["light"][:, :3] += 2.5
    shader = Shader(small_head, open_renderer(small_head.faces), SIZE)
    vertices, _ = Flame(small_head).decode(parameters)
    return shader, vertices, parameters


def with_part(parameters, name, value):
    changed = parameters.clone()
    changed[:, params.SLICES[name]] = value
    return changed


def test_normals_are_those_of_the_mesh(small_head, scene):
    normals = Normals(small_head.faces, len(small_head.template))
    vertices = scene[1]
    for each, got in zip(vertices, normals(vertices), strict=True):
        np.testing.assert_allclose(got, mesh.vertex_normals(each.numpy(), small_head.faces), atol=2e-5)
    assert torch.equal(normals(vertices), normals(vertices))


def test_normals_have_true_gradients_and_lonely_vertices_look_ahead():
    faces = np.array([[0, 1, 2], [0, 2, 3], [0, 3, 1], [5, 5, 1]], np.int32)
    normals = Normals(faces, 6)
    rng = np.random.default_rng(0)
    vertices = torch.from_numpy(rng.normal(size=(2, 6, 3))).requires_grad_()
    assert torch.autograd.gradcheck(normals, (vertices,))
    assert torch.autograd.gradgradcheck(normals, (vertices,))
    found = normals(vertices.detach())
    assert (found[:, 4:] == torch.tensor([0.0, 0.0, 1.0])).all()
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(2, 6, dtype=torch.float64))


def test_normals_turn_with_the_head(scene, small_head):
    normals = Normals(small_head.faces, len(small_head.template))
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))[0]
    turn = turn * torch.linalg.det(turn)
    torch.testing.assert_close(normals(scene[1] @ turn.T), normals(scene[1]) @ turn.T, atol=1e-4, rtol=0)


def test_the_picture_is_the_one_that_numpy_draws(small_head, scene):
    shader, vertices, parameters = scene
    image, mask = shader.draw(vertices, parameters)
    assert image.shape == (2, 3, SIZE, SIZE) and mask.shape == (2, SIZE, SIZE) and mask.dtype == torch.bool
    for item in range(2):
        v = vertices[item].double().numpy()
        parts = {name: part[item].double().numpy() for name, part in params.split(parameters).items()}
        x, y, z = mesh.vertex_normals(v, small_head.faces).T
        bands = [np.ones_like(x), x, y, z, x * y, x * z, y * z, x**2 - y**2, 3 * z**2 - 1]
        deca = [0.2821, 1.0233, 1.0233, 1.0233, 0.8581, 0.8581, 0.8581, 0.4290, 0.2477]
        light = sum(
            c * band[:, None] * rgb for c, band, rgb in zip(deca, bands, parts["light"].reshape(9, 3), strict=True)
        )
        color = (small_head.texture_mean + np.einsum("k,knc->nc", parts["texture"], small_head.texture_dirs)) * light
        scale, tx, ty = parts["camera"]
        points = np.stack(
            [
                (scale * (v[:, 0] + tx) + 1) * SIZE / 2 - 0.5,
                (1 - scale * (v[:, 1] + ty)) * SIZE / 2 - 0.5,
                -scale * v[:, 2],
            ],
            1,
        )
        hits = raster.rasterize_reference(points.astype(np.float32), small_head.faces, SIZE, SIZE)
        want = raster.interpolate_reference(color, small_head.faces, *hits)
        near = np.abs(image[item].numpy().transpose(1, 2, 0) - want).max(-1) < 1e-3
        assert near.mean() > 0.998  # an edge may fall to the other side
        assert 0.2 < (hits[0] >= 0).mean() < 0.9
        owner = small_head.masks["face"][small_head.faces[np.maximum(hits[0], 0)]]
        seen = hits[0] >= 0
        assert (mask[item].numpy() >= (seen & owner.all(-1) & near)).all()
        assert (mask[item].numpy() <= (seen & owner.any(-1)) | ~near).all()


def test_light_scales_the_picture_and_white_light_shows_the_albedo(scene):
    shader, vertices, parameters = scene
    image, mask = shader.draw(vertices, parameters)
    light = params.split(parameters)["light"]
    torch.testing.assert_close(shader.draw(vertices, with_part(parameters, "light", 2 * light))[0], 2 * image)
    assert (shader.draw(vertices, with_part(parameters, "light", 0.0))[0] == 0).all()
    even = torch.zeros(27)
    even[:3] = 1 / 0.2821
    bare, bare_mask = shader.draw(vertices, parameters, lit=False)
    torch.testing.assert_close(shader.draw(vertices, with_part(parameters, "light", even))[0], bare)
    assert torch.equal(mask, bare_mask)
    assert torch.equal(shader.draw(vertices, with_part(parameters, "light", 5.0), lit=False)[0], bare)


def test_mask_is_face_inside_the_silhouette_and_not_the_back_of_the_head(scene):
    shader, vertices, parameters = scene
    image, mask = shader.draw(vertices, parameters, lit=False)
    outside = (image == 0).all(1)
    assert not (mask & outside).any()
    assert 0.1 < mask.float().mean() < 0.5
    turned = vertices * torch.tensor([-1.0, 1.0, -1.0])
    assert shader.draw(turned, parameters)[1].sum() < 0.1 * mask.sum()


def test_gradients_agree_with_finite_differences(small_head, scene):
    """Over a window inside of the face, where only interpolation changes, never what is seen."""
    shader, vertices, parameters = scene
    rows, columns = slice(26, 34), slice(26, 35)
    assert shader.draw(vertices, parameters)[1][:, rows, columns].all()
    weights = torch.randn(2, 3, 8, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for _ in range(3):  # smooth, for the picture has kinks along edges
        weights = torch.nn.functional.avg_pool2d(weights, 3, 1, 1)

    def value(v, p):
        return (shader.draw(v, p)[0][..., rows, columns].double() * weights).sum()

    v, p = vertices.clone().requires_grad_(), parameters.clone().requires_grad_()
    grad_v, grad_p = torch.autograd.grad(value(v, p), (v, p))
    assert (grad_p[:, : params.SLICES["texture"].start] == 0).all()  # shape and pose act through the vertices
    rng = torch.Generator().manual_seed(1)
    for name, step, tolerance in (("texture", 1e-1, 1e-3), ("light", 1e-1, 1e-3), ("camera", 2e-3, 0.03)):
        part = params.SLICES[name]
        way = torch.zeros_like(parameters)
        way[:, part] = torch.randn(way[:, part].shape, generator=rng)
        if name == "camera":
            way[:, part] *= torch.tensor([1.0, 0.03, 0.03])
        slope = (value(vertices, parameters + step * way) - value(vertices, parameters - step * way)) / (2 * step)
        assert (grad_p * way).sum().item() == pytest.approx(slope.item(), rel=tolerance), name
        assert abs(slope) > 1e-3
    for index in range(3):
        way, step = torch.from_numpy(small_head.shape_dirs[index]).expand(2, -1, -1), 0.05
        slope = (value(vertices + step * way, parameters) - value(vertices - step * way, parameters)) / (2 * step)
        assert (grad_v * way).sum().item() == pytest.approx(slope.item(), rel=0.03)


def test_hold_skin_keeps_values_and_stops_the_gradient_of_texture_and_light(scene):
    shader, vertices, parameters = scene
    loose = parameters.clone().requires_grad_()
    held = hold_skin(loose)
    assert torch.equal(held, parameters)
    (gradient,) = torch.autograd.grad(shader.draw(vertices, held)[0].square().sum(), loose)
    parts = params.split(gradient)
    assert (parts["texture"] == 0).all() and (parts["light"] == 0).all() and (parts["camera"] != 0).all()


def test_wide_to_aligned_cuts_as_crop_does():
    y, x = np.mgrid[0:224, 0:224]
    wide_u8 = np.stack([x, y, 127 + 120 * np.sin(x / 9) * np.cos(y / 7)], -1).astype(np.uint8)
    want = crop.warp(wide_u8, crop.invert(crop.WIDE_MATRIX), 112)
    image = torch.from_numpy(wide_u8.astype(np.float64)).permute(2, 0, 1)[None].requires_grad_()
    got = wide_to_aligned(image)
    difference = got[0].detach().permute(1, 2, 0).numpy() - want
    assert np.abs(difference - 0.5).max() < 1.0  # Pillow rounds down
    assert torch.autograd.grad(got.sum(), image)[0].sum().item() == pytest.approx(3 * 112 * 112)
    with pytest.raises(InputError, match="image: expected"):
        wide_to_aligned(torch.zeros(1, 3, 112, 112))


def test_shader_is_moved_with_the_model_and_saved_with_nothing(scene):
    shader = scene[0]
    assert not shader.state_dict() and not list(shader.parameters())
    assert all(buffer.device.type == "meta" for buffer in Shader.to(_copy(shader), "meta").buffers())


def _copy(shader: Shader) -> Shader:
    import copy

    return copy.deepcopy(shader)


def test_what_does_not_fit_is_refused_by_name(small_head, scene):
    shader, vertices, parameters = scene
    with pytest.raises(AssetError, match="has no face mask"):
        Shader(dataclasses.replace(small_head, masks={}), shader.renderer)
    with pytest.raises(InputError, match="vertices: expected"):
        shader.draw(vertices[:, 1:], parameters)
    with pytest.raises(InputError, match="parameters: expected"):
        shader.draw(vertices, parameters[:1])
