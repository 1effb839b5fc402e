"""The mesh autoencoder: its definition in dense float64, its sizes, its descriptor's distance, CoMA's weights."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from heads_for_tests import make_head

from chebface import hierarchy
from chebface.encoder import (
    ChebConv,
    MeshAutoencoder,
    MeshDecoder,
    MeshEncoder,
    Upsample,
    descriptor_distance,
    read_coma,
)
from chebface.errors import AssetError, InputError
from chebface.kernels import Graph

FACTS = {"width": [4, 5], "K": 3, "code": 2}


@pytest.fixture(scope="module")
def small():
    """A hierarchy of two steps over a small head."""
    head = make_head(6)
    return hierarchy.build(head.template, head.faces, (30, 9))


def make(small, seed=0):
    torch.manual_seed(seed)
    return MeshAutoencoder(small, (4, 5), K=3, code=2).eval()


def meshes(small, count=3, seed=0):
    rng = np.random.default_rng(seed)
    still = small.levels[0].vertices
    return torch.from_numpy((still + 0.002 * rng.normal(size=(count, *still.shape))).astype(np.float32))


def dense_conv(x, graph, weight, bias, keep=None, relu=True):
    """T_k(L_hat) as matrices, x (N, C) float64."""
    A = np.zeros((graph.n, graph.n))
    A[np.repeat(np.arange(graph.n), graph.degree), graph.indices] = 1
    scaled = -A / np.sqrt(np.outer(graph.degree, graph.degree))
    terms = [np.eye(graph.n), scaled]
    while len(terms) < len(weight):
        terms.append(2 * scaled @ terms[-1] - terms[-2])
    y = sum(T @ x @ w for T, w in zip(terms, weight, strict=False))
    y = y if bias is None else y + bias
    y = y if keep is None else y[keep]
    return np.maximum(y, 0) if relu else y


def arrays(module):
    return {name: tensor.detach().double().numpy() for name, tensor in module.state_dict().items()}


def test_encoder_is_its_definition(small):
    model, batch = make(small), meshes(small)
    model.encoder.set_statistics(small.levels[0].vertices, np.full_like(small.levels[0].vertices, 2e-3))
    w = arrays(model.encoder)
    for mesh, code in zip(batch.double().numpy(), model.encoder(batch).detach().numpy(), strict=True):
        x = (mesh - w["mean"]) / w["std"]
        for i in range(2):
            level = small.levels[i]
            x = dense_conv(x, level.graph, w[f"conv.{i}.weight"], w[f"conv.{i}.bias"], level.down)
        np.testing.assert_allclose(code, w["fc.weight"] @ x.ravel() + w["fc.bias"], rtol=2e-5, atol=2e-5)


def test_decoder_is_its_definition(small):
    model = make(small)
    w, code = arrays(model.decoder), torch.tensor([[0.7, -1.3]])
    x = np.maximum(w["fc.weight"] @ code[0].double().numpy() + w["fc.bias"], 0).reshape(9, 5)
    for i, level in enumerate(reversed(small.levels[:-1])):
        x = np.einsum("vk,vkc->vc", level.up_weight.astype(np.float64), x[level.up_index])
        x = dense_conv(x, level.graph, w[f"conv.{i}.weight"], w[f"conv.{i}.bias"])
    x = dense_conv(x, small.levels[0].graph, w["out.weight"], None, relu=False)
    np.testing.assert_allclose(model.decoder(code)[0].detach().numpy(), x, rtol=2e-5, atol=2e-5)


def test_gradients_reach_everything(small):
    model, batch = make(small), meshes(small)
    (model(batch) - model.encoder.normalize(batch)).abs().mean().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not without and model.encoder.conv[0].weight.grad.abs().max() > 0


def test_upsampling_has_the_right_gradient_and_keeps_constants(small):
    up = Upsample(small.levels[0], 30)
    x = torch.rand(2, 30, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(up, x)
    torch.testing.assert_close(up(torch.ones(2, 30, 3)), torch.ones(2, small.sizes[0], 3))


def test_sizes_are_comas(head):
    torch.manual_seed(0)
    model = MeshAutoencoder(hierarchy.for_head(head))
    assert model.weights == 30_056
    assert sum(p.numel() for p in model.encoder.parameters()) == 11_640
    assert model.encoder.fc.weight.shape == (8, 640)
    assert torch.stack([p.abs().max() for n, p in model.named_parameters() if "weight" in n]).max() <= 0.2
    assert all(torch.equal(p, torch.full_like(p, 0.1)) for n, p in model.named_parameters() if n.endswith("bias"))


def test_encode_takes_one_mesh_or_many_and_numpy(small):
    model, batch = make(small), meshes(small)
    many = model.encoder.encode(batch)
    torch.testing.assert_close(model.encoder.encode(batch[1].numpy()), many[1])
    torch.testing.assert_close(model.encoder(batch), many)
    assert not many.requires_grad and many.shape == (3, 2)


def by_layers(call):
    """What a call of the encoder gives without the one-call kernel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("chebface.kernels.cpu.available", lambda: False)
        return call()


def test_one_call_is_the_layers_after_each_other(small):
    model, batch = make(small), meshes(small)
    first = model.encoder.encode(batch)
    with torch.no_grad():  # in place, and to other memory: both must be seen
        model.encoder.conv[0].weight.mul_(0.5)
        second = model.encoder.encode(batch)
        torch.testing.assert_close(second, by_layers(lambda: model.encoder(batch)), rtol=1e-5, atol=1e-5)
        model.encoder.conv[1].weight = torch.nn.Parameter(model.encoder.conv[1].weight * 3)
        third = model.encoder.encode(batch)
        torch.testing.assert_close(third, by_layers(lambda: model.encoder(batch)), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(first, second) and not torch.allclose(second, third)
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied.encoder.encode(batch), model.encoder.encode(batch))
    assert model.double().encoder.encode(batch).dtype == torch.float64


@pytest.mark.parametrize("frozen", [False, True])
def test_one_call_has_the_gradients_of_the_layers(small, frozen):
    encoder, batch = make(small).encoder.requires_grad_(not frozen), meshes(small).requires_grad_()
    wanted = [batch, *(p for p in encoder.parameters() if p.requires_grad)]

    def gradients():
        return torch.autograd.grad(encoder(batch).square().sum(), wanted)

    for found, right in zip(gradients(), by_layers(gradients), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5 * float(right.abs().max()))
    weights_only = torch.autograd.grad(encoder(batch.detach()).sum(), wanted[1:]) if not frozen else ()
    assert len(weights_only) == len(wanted) - 1
    code = encoder(batch)
    with torch.no_grad():
        encoder.fc.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        code.sum().backward()


def test_another_frame_changes_codes_and_no_reconstruction(small):
    model, batch = make(small), meshes(small)
    code, back = model.encoder.encode(batch), model.reconstruct(batch)
    matrix, origin = torch.tensor([[2.0, 0.5], [-1.0, 1.0]]), torch.tensor([0.3, -0.2])
    model.change_frame(matrix, origin)
    torch.testing.assert_close(model.encoder.encode(batch), (code - origin) @ matrix.T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.reconstruct(batch), back, rtol=1e-4, atol=1e-5)


def test_statistics_are_floored_and_travel_with_the_weights(small):
    model = make(small)
    mean = small.levels[0].vertices + 1
    model.encoder.set_statistics(mean, np.zeros_like(mean), floor=1e-5)
    again = MeshAutoencoder.from_tensors(model.to_tensors(), FACTS)
    torch.testing.assert_close(again.encoder.std, torch.full(mean.shape, 1e-5))
    assert torch.equal(again.encoder.mean, torch.from_numpy(mean))


def test_tensors_hold_everything(small):
    model, batch = make(small), meshes(small)
    tensors = {name: tensor.clone() for name, tensor in model.to_tensors().items()}
    again = MeshAutoencoder.from_tensors(tensors, FACTS)
    assert torch.equal(again.reconstruct(batch), model.reconstruct(batch))
    assert again.hierarchy.sha256 == small.sha256


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        (lambda t: t.pop("encoder.fc.weight"), FACTS),
        (lambda t: t.pop("hierarchy.1.faces"), FACTS),
        (lambda t: t.update({"encoder.mean": torch.zeros(3, 3)}), FACTS),
        (lambda t: None, {"width": [4, 5], "K": 3}),
        (lambda t: None, FACTS | {"code": 3}),
        (lambda t: t.update({"hierarchy.zero.faces": torch.zeros(1)}), FACTS),
    ],
)
def test_foreign_tensors_are_refused(small, change, facts):
    tensors = make(small).to_tensors()
    change(tensors)
    with pytest.raises(AssetError, match="not a mesh encoder"):
        MeshAutoencoder.from_tensors(tensors, facts)


def test_distance_of_descriptors():
    a = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0], [0.0, 0.0]])
    b = torch.tensor([[5.0, 0.0], [-2.0, -2.0], [3.0, 0.0], [1.0, 1.0]])
    torch.testing.assert_close(descriptor_distance(a, b), torch.tensor([0.0, 2.0, 1.0, 1.0]))
    zero = torch.zeros(1, 8, requires_grad=True)
    descriptor_distance(zero, torch.ones(1, 8)).sum().backward()
    assert torch.isfinite(zero.grad).all()
    c = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(descriptor_distance, (c, torch.randn(4, 8, dtype=torch.float64)))


def test_distance_refuses_other_sizes():
    with pytest.raises(InputError, match="one size"):
        descriptor_distance(torch.zeros(2, 8), torch.zeros(2, 7))
    with pytest.raises(InputError, match="one size"):
        descriptor_distance(torch.tensor(1.0), torch.tensor(1.0))


def test_bad_meshes_are_refused(small):
    model, batch = make(small), meshes(small)
    with pytest.raises(InputError, match=r"vertices: expected \(B, 74, 3\), got \(3, 73, 3\)"):
        model.encoder(batch[:, :-1])
    with pytest.raises(InputError, match="vertices: expected"):
        model.encoder.encode(batch[0, :, 0])
    for bad in (np.nan, np.inf):
        batch[1, 2, 0] = bad
        with pytest.raises(InputError, match="finite"):
            model.encoder.encode(batch)
    with pytest.raises(InputError, match=r"descriptor: expected \(B, 2\)"):
        model.decode(torch.zeros(1, 3))
    with pytest.raises(InputError, match="std"):
        model.encoder.set_statistics(small.levels[0].vertices, np.full((74, 3), np.nan))
    with pytest.raises(InputError, match="mean"):
        model.encoder.set_statistics(np.zeros((7, 3)), np.zeros((7, 3)))


@pytest.mark.parametrize("kind", [MeshEncoder, MeshDecoder])
def test_bad_sizes_are_refused(small, kind):
    with pytest.raises(InputError, match="one per step"):
        kind(small, (4, 5, 6))
    for sizes in ({"K": 0}, {"code": 0}, {"width": (4, 0)}):
        with pytest.raises(InputError, match="at least 1"):
            kind(small, **{"width": (4, 5)} | sizes)
    with pytest.raises(InputError, match="last level"):
        Upsample(small.levels[-1], 1)


def test_comas_weights_fit_and_mean_the_same(assets, head):
    path = assets / "coma_checkpoints" / "coma_trained_weights.npz"
    state = read_coma(path, "bareteeth")
    torch.manual_seed(0)
    model = MeshAutoencoder(hierarchy.for_head(head))
    found = model.load_state_dict(state, strict=False)
    assert set(found.missing_keys) == {"encoder.mean", "encoder.std"} and not found.unexpected_keys
    # CoMA's own order of a convolution: terms innermost, (N, C K) times (C K, C_out).
    with np.load(path) as file:
        rows = file["bareteeth/encoder/conv2/weights"].astype(np.float64)
    graph = Graph.from_edges(np.array([[0, 1], [1, 2], [2, 3], [0, 2]]), 4)
    x = np.random.default_rng(0).normal(size=(4, 16))
    eye = [dense_conv(x, graph, np.eye(6)[k][:, None, None] * np.eye(16), None, relu=False) for k in range(6)]
    wanted = np.stack(eye, 2).reshape(4, 96) @ rows
    layer = ChebConv(graph, (16, 16), 6, bias=False, relu=False)
    layer.weight.data = state["encoder.conv.1.weight"]
    got = layer(torch.from_numpy(x).float()[None])[0].detach().numpy()
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_coma_files_that_are_none(tmp_path):
    with pytest.raises(AssetError, match="CoMA"):
        read_coma(tmp_path / "missing.npz", "bareteeth")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(AssetError, match="bareteeth"):
        read_coma(tmp_path / "other.npz", "bareteeth")
    np.savez(tmp_path / "odd.npz", **{"m/encoder/conv1/weights": np.zeros((17, 16), np.float32)})
    with pytest.raises(AssetError, match="'m'"):
        read_coma(tmp_path / "odd.npz", "m")
