"""The graphs by themselves: each computes what its torch module computes, in any batch, at every opset on offer."""

from __future__ import annotations

import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from models_for_tests import scatter_head, stand_in

from chebface import params
from chebface.arcface import IResNet
from chebface.checkpoint import load_encoder
from chebface.errors import AssetError, ConfigError, MissingDependencyError
from chebface.flame import Flame
from chebface.kernels import Graph
from chebface.regressor import Regressor, normalize_crop
from chebface.signature import DECODE, ENCODE, RECONSTRUCT, REGRESS, TOPOLOGY
from export import graphs
from export.graphs import OPSETS, check_graph, decode_graph, encode_graph, fold_norms, reconstruct_graph, trace


class Tiny(torch.nn.Module):
    """A regressor in form: the crop's 2 x 2 mean colors, mixed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = torch.nn.Linear(12, params.TOTAL)

    def forward(self, crop: torch.Tensor) -> torch.Tensor:
        return self.mix(crop.unflatten(3, (2, 56)).unflatten(2, (2, 56)).mean((3, 5)).flatten(1))


@pytest.fixture(scope="module")
def flame() -> Flame:
    return Flame(scatter_head()).eval()


@pytest.fixture(scope="module")
def decode(flame: Flame) -> onnx.ModelProto:
    return decode_graph(flame)


@pytest.fixture(scope="module")
def regress() -> onnx.ModelProto:
    return graphs.regress_graph(Tiny().eval())


@pytest.fixture(scope="module")
def encoder():
    return load_encoder()[0].encoder


@pytest.fixture(scope="module")
def encode(encoder) -> onnx.ModelProto:
    return encode_graph(encoder)


def run(proto: onnx.ModelProto, **feeds: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(proto.SerializeToString(), options).run(None, feeds)


def draw(batch: int, seed: int = 0) -> np.ndarray:
    drawn = 0.5 * np.random.default_rng(seed).normal(size=(batch, params.TOTAL)).astype(np.float32)
    return drawn.astype(np.float32)


def crops(batch: int) -> np.ndarray:
    return np.random.default_rng(batch).integers(0, 256, (batch, 112, 112, 3), dtype=np.uint8)


def turned(*poses: tuple[float, ...]) -> np.ndarray:
    parameters = draw(len(poses), seed=1)
    parameters[:, params.SLICES["pose"]] = poses
    return parameters


@pytest.mark.parametrize(
    "parameters",
    [
        draw(1),
        draw(7),
        turned((0, 0, 0, 0, 0, 0), (1e-5, 0, 0, 0, 1e-7, 0), (3, 0, 0.2, 0, 0, 0), (0, 3.1, 0, 0.6, 0, 0)),
        turned(*((0, np.radians(yaw), 0, 0.3, 0, 0) for yaw in (-80, -39.2, -38.8, -1, 0.4, 12, 39.2, 60))),
    ],
    ids=["one", "seven", "from rest to a full turn", "along the contour"],
)
def test_decoder_is_the_layer(decode: onnx.ModelProto, flame: Flame, parameters: np.ndarray) -> None:
    vertices, landmarks, half = run(decode, parameters=parameters)
    wanted = flame.decode(torch.from_numpy(parameters))
    np.testing.assert_allclose(vertices, wanted[0], atol=1e-6)
    np.testing.assert_allclose(landmarks, wanted[1], atol=1e-6)
    assert half.dtype == np.float16 and np.array_equal(half, vertices.astype(np.float16))  # rounded once, at the end


def test_decoder_of_no_number_gives_no_number(decode: onnx.ModelProto) -> None:
    parameters = draw(2)
    parameters[0, params.SLICES["pose"]] = np.nan
    vertices, landmarks, _ = run(decode, parameters=parameters)
    assert np.isnan(vertices[0]).all()
    assert np.isnan(landmarks[0]).all()
    assert np.isfinite(vertices[1]).all()


def test_half_vertices_of_a_real_head_keep_their_promise(head) -> None:
    parameters = np.random.default_rng(3).normal(size=(16, params.TOTAL)).astype(np.float32)
    parameters[:, params.SLICES["pose"]] *= 0.3
    vertices, _, half = run(decode_graph(Flame(head).eval()), parameters=parameters)
    error_mm = 1e3 * np.linalg.norm(vertices - half.astype(np.float32), axis=-1)
    assert error_mm.max() < 0.25 and error_mm.mean() < 0.04, (error_mm.max(), error_mm.mean())


@pytest.mark.parametrize("batch", [1, 3])
def test_encoder_is_the_module(encode: onnx.ModelProto, encoder, batch: int) -> None:
    meshes = encoder.mean + 0.003 * torch.randn(
        (batch, *encoder.mean.shape), generator=torch.Generator().manual_seed(0)
    )
    (found,) = run(encode, vertices=meshes.numpy())
    with torch.no_grad():
        wanted = encoder(meshes).numpy()
    np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())


def test_terms_are_the_polynomials() -> None:
    rng = np.random.default_rng(0)
    graph = Graph.from_edges(np.concatenate([[(i, i + 1) for i in range(29)], rng.integers(0, 30, (20, 2))]), 30)
    adjacency = np.zeros((30, 30))
    adjacency[np.repeat(np.arange(30), graph.degree), graph.indices] = 1
    scaled = -adjacency / np.sqrt(np.outer(graph.degree, graph.degree))
    values, vectors = np.linalg.eigh(scaled)
    keep = np.array([3, 4, 17])
    for k, found in enumerate(np.moveaxis(graphs._terms(graph, keep, 6), 2, 0)):
        wanted = vectors @ np.diag(np.cos(k * np.arccos(values.clip(-1, 1)))) @ vectors.T
        np.testing.assert_allclose(found, wanted[:, keep], atol=1e-12)


def test_patches_hold_every_kept_vertex_once(encoder) -> None:
    conv = encoder.conv[1]
    keep = conv.keep.numpy()
    sizes = graphs._patches(conv.graph, keep, np.random.default_rng(0).normal(size=(len(keep), 3)), 2)
    assert len(sizes) == 4
    members = [kept for patches in sizes for kept, _, _ in patches]
    assert sorted(np.concatenate(members)) == list(range(len(keep)))
    assert max(map(len, members)) <= 8


def wake(regressor: Regressor) -> Regressor:
    """Norms as training leaves them: no scale is 1, no shift 0."""
    generator = torch.Generator().manual_seed(0)
    for module in regressor.modules():
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d):
            for tensor, low, high in (
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.5, 0.5),
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 1.5),
            ):
                tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator))
    return regressor.eval()


@pytest.mark.parametrize("backbone", ["light", "iresnet18"])
@torch.no_grad()
def test_folded_network_is_the_same_up_to_the_border(backbone: str) -> None:
    torch.manual_seed(0)
    regressor = wake(Regressor(backbone))
    crop = normalize_crop(torch.from_numpy(crops(1)))
    wanted = regressor.backbone(crop)
    folded = fold_norms(regressor)
    np.testing.assert_allclose(folded.backbone(crop), wanted, atol=1e-5 * float(wanted.abs().max()))
    blocks = [m for m in folded.backbone.modules() if hasattr(m, "downsample")]
    assert [isinstance(block.bn1, torch.nn.BatchNorm2d) for block in blocks] == [True] + [False] * (len(blocks) - 1)
    assert isinstance(folded.backbone, IResNet) <= isinstance(getattr(folded.backbone, "bn2", None), torch.nn.Identity)
    assert torch.equal(regressor.backbone(crop), wanted), "the given one is as it was"


@torch.no_grad()
def test_norm_without_scale_stays() -> None:
    torch.manual_seed(0)
    regressor = wake(Regressor("light"))
    block = regressor.backbone.layers[1]
    block.bn1.weight[3] = 0
    folded = fold_norms(regressor)
    assert isinstance(folded.backbone.layers[1].bn1, torch.nn.BatchNorm2d)
    crop = normalize_crop(torch.from_numpy(crops(1)))
    wanted = regressor(crop)
    np.testing.assert_allclose(folded(crop), wanted, atol=1e-5 * float(wanted.abs().max()))


def test_one_file_does_what_the_two_do(regress: onnx.ModelProto, decode: onnx.ModelProto) -> None:
    whole = reconstruct_graph(regress, decode)
    check_graph(whole, RECONSTRUCT, "reconstruct")
    given = crops(3)
    (parameters,) = run(regress, crop=given)
    both = [parameters, *run(decode, parameters=parameters)]
    for found, wanted in zip(run(whole, crop=given), both, strict=True):
        assert np.array_equal(found, wanted)


@pytest.mark.parametrize("opset", [20, OPSETS[1]])
def test_other_opsets(opset: int, flame: Flame) -> None:
    tiny, parameters, given = Tiny().eval(), draw(2), crops(2)
    made = [graphs.regress_graph(tiny, opset), decode_graph(flame, opset)]
    for proto, model in zip(made, (REGRESS, DECODE), strict=True):
        check_graph(proto, model, model.name)
        assert [entry.version for entry in proto.opset_import if not entry.domain] == [opset]
    (found,) = run(made[0], crop=given)
    with torch.no_grad():
        np.testing.assert_allclose(found, tiny(normalize_crop(torch.from_numpy(given))), atol=1e-5)
    wanted = flame.decode(torch.from_numpy(parameters))[0]
    np.testing.assert_allclose(run(made[1], parameters=parameters)[0], wanted, atol=1e-6)


@pytest.mark.parametrize("opset", [15, 17, 22])
def test_opset_out_of_reach_is_refused(opset: int, flame: Flame) -> None:
    with pytest.raises(ConfigError, match=rf"opset: expected 18 to 21, got {opset}"):
        decode_graph(flame, opset)
    with pytest.raises(ConfigError, match="opset"):
        graphs.regress_graph(Tiny(), opset)


def test_graphs_of_two_opsets_do_not_join(regress: onnx.ModelProto, flame: Flame) -> None:
    with pytest.raises(ConfigError, match="one in regress and decode, got 18 and 19"):
        reconstruct_graph(regress, decode_graph(flame, 19))


def test_bytes_are_the_same_again(flame: Flame, decode: onnx.ModelProto, encoder, encode: onnx.ModelProto) -> None:
    assert decode_graph(flame).SerializeToString(deterministic=True) == decode.SerializeToString(deterministic=True)
    assert encode_graph(encoder).SerializeToString(deterministic=True) == encode.SerializeToString(deterministic=True)
    check_graph(encode, ENCODE, "encode")


def test_simplified_graph_is_the_same(regress: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> None:
    slim = graphs.simplify_graph(regress)
    check_graph(slim, REGRESS, "slim")
    assert len(slim.graph.node) <= len(regress.graph.node)
    np.testing.assert_allclose(run(slim, crop=crops(2))[0], run(regress, crop=crops(2))[0], atol=1e-6)
    monkeypatch.setitem(sys.modules, "onnxslim", None)
    with pytest.raises(MissingDependencyError, match=r"onnxslim is not installed: pip install"):
        graphs.simplify_graph(regress)


def test_exporter_that_gives_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **options: None)
    with pytest.raises(AssetError, match="gave nothing"):
        trace(Tiny(), REGRESS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda proto: setattr(proto.graph.output[0], "name", "params"), "not a valid ONNX graph"),
        (lambda proto: setattr(proto, "ir_version", 13), "IR 10"),
        (lambda proto: setattr(proto.opset_import[0], "version", 23), "opset 22 at most"),
        (lambda proto: proto.graph.input[0].type.tensor_type.shape.dim[0].ClearField("dim_param"), "signature.py says"),
    ],
)
def test_graphs_that_are_not_ours_are_refused(change, message: str) -> None:
    proto = stand_in(TOPOLOGY if "valid" in message or "at most" in message else DECODE)
    change(proto)
    with pytest.raises(AssetError, match=message):
        check_graph(proto, DECODE if "signature" in message else TOPOLOGY, "file")


def test_graph_of_another_model_is_refused() -> None:
    with pytest.raises(AssetError, match=r"inputs: signature.py says .*'crop'.*, the file .*'parameters'"):
        check_graph(stand_in(DECODE), REGRESS, "regress.onnx")
