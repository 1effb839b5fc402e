"""The proof that an export computes the same face: what it measures, what it lets pass, what it stops."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from heads_for_tests import make_head
from models_for_tests import scatter_head, stand_in
from onnx import TensorProto, helper, numpy_helper

from chebface import params, signature
from chebface.errors import AssetError, ConfigError, InputError
from chebface.flame import Flame
from chebface.heads import Head
from chebface.signature import REGRESS
from export import parity
from export.graphs import decode_graph, topology_graph
from export.parity import (
    LIMITS,
    Parity,
    ParityError,
    check,
    draw,
    draw_crops,
    draw_parameters,
    held_out_crops,
    judge,
    make_crops,
    measure,
)
from export.precision import PRECISIONS


def mix() -> np.ndarray:
    """The weights of the stand-in regressor, (3, 486)."""
    return numpy_helper.to_array(next(t for t in stand_in(REGRESS).graph.initializer if t.name == "weights")).copy()


class MeanColour(torch.nn.Module):
    """What the stand-in graph computes, from the normalised crop."""

    def forward(self, crop: torch.Tensor) -> torch.Tensor:
        return (crop.mean((2, 3)) * 127.5 + 127.5) @ torch.from_numpy(mix())


class Linear(torch.nn.Module):
    """A mesh encoder in form."""

    matrix = torch.from_numpy(np.random.default_rng(2).normal(size=(3 * signature.VERTICES, 8)).astype(np.float32))

    def encode(self, vertices: torch.Tensor) -> torch.Tensor:
        return vertices.flatten(1) @ self.matrix


def regress_with(change: np.ndarray | float = 0.0) -> onnx.ModelProto:
    proto = stand_in(REGRESS)
    tensor = next(t for t in proto.graph.initializer if t.name == "weights")
    tensor.CopyFrom(numpy_helper.from_array((mix() + change).astype(np.float32), "weights"))
    return proto


def encode_with(sign: float = 1.0) -> onnx.ModelProto:
    constants = {"axes": np.array([0, -1]), "matrix": Linear.matrix.numpy() * [1.0, *[sign] * 7]}
    graph = helper.make_graph(
        [
            helper.make_node("Reshape", ["vertices", "axes"], ["flat"]),
            helper.make_node("MatMul", ["flat", "matrix"], ["descriptor"]),
        ],
        "encode",
        [helper.make_tensor_value_info("vertices", TensorProto.FLOAT, ["batch", signature.VERTICES, 3])],
        [helper.make_tensor_value_info("descriptor", TensorProto.FLOAT, ["batch", 8])],
        [numpy_helper.from_array(a.astype(np.int64 if n == "axes" else np.float32), n) for n, a in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.fixture(scope="module")
def head() -> Head:
    return scatter_head()


@pytest.fixture(scope="module")
def flame(head: Head) -> Flame:
    return Flame(head)


@pytest.fixture(scope="module")
def crops() -> np.ndarray:
    return draw_crops(np.random.default_rng(0), 5)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory, head: Head, flame: Flame) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("parity")
    graphs = {
        "regress": regress_with(),
        "decode": decode_graph(flame),
        "topology": topology_graph(head),
        "encode": encode_with(),
    }
    for name, proto in graphs.items():
        onnx.save(proto, folder / f"{name}.onnx")
    return {name: folder / f"{name}.onnx" for name in graphs}


@pytest.fixture(scope="module")
def exact(paths: dict[str, Path], flame: Flame, crops: np.ndarray) -> Parity:
    return measure(paths, MeanColour(), flame, Linear(), crops, source="drawn")


def written(tmp_path: Path, proto: onnx.ModelProto) -> Path:
    path = tmp_path / f"{proto.graph.name}.onnx"
    onnx.save(proto, path)
    return path


def test_a_true_export_keeps_the_limits_of_float32(exact: Parity) -> None:
    check(exact)
    assert (exact.precision, exact.computed_in, exact.crops, exact.source) == ("fp32", "float32", 5, "drawn")
    assert 0 <= exact.mean_mm < exact.max_mm < 0.005
    assert sorted(exact.artefacts) == ["decode", "encode", "regress", "vertices_half"]
    assert 1e-3 < exact.artefacts["vertices_half"]["mean_mm"] < 0.05, "rounded, and within fp16's limits"
    assert exact.descriptor_min_cosine == pytest.approx(1, abs=1e-6)
    assert exact.per_vertex_mm.shape == (signature.VERTICES,)
    report = json.loads(json.dumps(exact.report()))
    assert report["passed"] is True
    assert report["limit_mm"] == [0.001, 0.01]
    assert "per_vertex_mm" not in report


def test_errors_are_those_computed_by_hand(
    paths: dict[str, Path], head: Head, flame: Flame, crops: np.ndarray, tmp_path: Path
) -> None:
    change = np.zeros((3, params.TOTAL), np.float32)
    change[:, params.SLICES["shape"].start] = 1e-4  # the first shape number, by the sum of the mean colours
    change[:, params.SLICES["camera"].start + 1] = 1e-5
    found = measure({**paths, "regress": written(tmp_path, regress_with(change))}, MeanColour(), flame, Linear(), crops)
    colours = crops.astype(np.float64).mean((1, 2)).sum(1)
    parameters = crops.astype(np.float64).mean((1, 2)) @ mix()
    moved = parameters + colours[:, None] * change[0]
    ours, theirs = (flame.decode(torch.from_numpy(p.astype(np.float32))) for p in (moved, parameters))
    error = 1e3 * (ours[0] - theirs[0]).norm(dim=-1).numpy()
    assert found.mean_mm == pytest.approx(error.mean(), rel=1e-3)
    assert found.max_mm == pytest.approx(error.max(), rel=1e-3)
    np.testing.assert_allclose(found.per_vertex_mm, error.mean(0), rtol=1e-2)

    def px(points: torch.Tensor, p: np.ndarray) -> np.ndarray:
        scale, *shift = np.split(p[:, params.SLICES["camera"]], 3, axis=1)
        return scale[..., None] * (points[..., :2].numpy() + np.stack(shift, -1)) * 112

    distance = np.linalg.norm(px(ours[1], moved) - px(theirs[1], parameters), axis=-1)
    assert found.landmark_mean_px == pytest.approx(distance.mean(), rel=1e-2)
    assert found.landmark_max_px == pytest.approx(distance.max(), rel=1e-2)
    assert found.parameters == pytest.approx((colours * 1e-4).max(), rel=1e-3)
    assert found.descriptor_min_cosine is not None
    assert found.descriptor_min_cosine < 1 - 1e-9
    with pytest.raises(
        ParityError, match=r"fp32 differs from torch on 5 crops: crop to vertices mean .* \(limit 0.001\)"
    ):
        check(found)
    assert found.report()["passed"] is False


def test_limits_are_those_of_the_precision(exact: Parity) -> None:
    assert set(LIMITS) == {*PRECISIONS, "fixed"}
    near = dataclasses.replace(exact, mean_mm=0.4, max_mm=1.9)
    check(near, "int8")
    for precision, fix in (("fp32", "export it again"), ("fp16", "export in fp32"), ("bf16", "export in fp32")):
        with pytest.raises(ParityError, match=fix):
            check(near, precision)
    with pytest.raises(ParityError, match=r"crop to vertices max 2.1 mm \(limit 2\); leave more layers in float32"):
        check(dataclasses.replace(near, max_mm=2.1), "int8")
    with pytest.raises(ParityError, match="nan"):
        check(dataclasses.replace(near, mean_mm=float("nan")), "int8")
    with pytest.raises(ConfigError, match="expected one of fp32, fp16, bf16, int8, got 'fp8'"):
        check(near, "fp8")
    decode = {**exact.artefacts, "decode": {"mean_mm": 0.002, "max_mm": 0.002}}
    with pytest.raises(ParityError, match=r"decode mean 0.002 mm \(limit 0.001\)"):
        check(dataclasses.replace(exact, artefacts=decode), "int8")
    assert ParityError.exit_code == 3


def test_encode_that_differs_is_stopped(
    paths: dict[str, Path], flame: Flame, crops: np.ndarray, tmp_path: Path
) -> None:
    found = measure({**paths, "encode": written(tmp_path, encode_with(-1))}, MeanColour(), flame, Linear(), crops)
    assert found.mean_mm < 0.001
    with pytest.raises(ParityError, match="encode descriptor cosine"):
        check(found)


def test_without_encoder_there_is_no_cosine(paths: dict[str, Path], flame: Flame, crops: np.ndarray) -> None:
    some = {name: paths[name] for name in ("regress", "decode")}
    found = measure(some, MeanColour(), flame, None, crops)
    assert found.descriptor_min_cosine is None
    check(found)
    with pytest.raises(AssetError, match="encode has no mesh encoder"):
        measure(paths, MeanColour(), flame, None, crops)


def test_the_worse_of_chain_and_fused_graph_counts(
    paths: dict[str, Path], flame: Flame, crops: np.ndarray, tmp_path: Path
) -> None:
    from export.graphs import reconstruct_graph

    fused = reconstruct_graph(regress_with(1e-5), onnx.load(paths["decode"]))
    some = {name: paths[name] for name in ("regress", "decode")}
    found = measure({**some, "reconstruct": written(tmp_path, fused)}, MeanColour(), flame, None, crops)
    assert found.artefacts["regress"]["max_mm"] < 0.005 < found.artefacts["reconstruct"]["max_mm"] == found.max_mm


def test_files_that_are_no_export(paths: dict[str, Path], flame: Flame, crops: np.ndarray, tmp_path: Path) -> None:
    other = written(tmp_path, topology_graph(scatter_head(seed=1)))
    with pytest.raises(ParityError, match="not the head's triangles"):
        measure({**paths, "topology": other}, MeanColour(), flame, Linear(), crops)
    with pytest.raises(AssetError, match="decode is not among regress"):
        measure({"regress": paths["regress"]}, MeanColour(), flame, None, crops)
    with pytest.raises(AssetError, match="not a readable ONNX file"):
        measure({**paths, "decode": tmp_path / "none.onnx"}, MeanColour(), flame, Linear(), crops)
    (tmp_path / "broken.onnx").write_bytes(b"\xff" * 64)
    with pytest.raises(AssetError, match=r"broken.onnx: not a readable ONNX file"):
        measure({**paths, "decode": tmp_path / "broken.onnx"}, MeanColour(), flame, Linear(), crops)
    with pytest.raises(AssetError, match="onnxruntime cannot run it"):
        measure({**paths, "regress": paths["decode"]}, MeanColour(), flame, Linear(), crops)
    with pytest.raises(ParityError, match=r"onnxruntime gives \[\(5, 486\), \(5, 486\)\], torch \[\(5, 5023, 3\)"):
        measure({**paths, "decode": written(tmp_path, same())}, MeanColour(), flame, Linear(), crops)
    with pytest.raises(ParityError, match="no landmarks among the answers; export it again"):
        measure(
            {**paths, "decode": written(tmp_path, same(outputs=["vertices"]))}, MeanColour(), flame, Linear(), crops
        )
    with pytest.raises(AssetError, match="expected one input, got"):
        measure({**paths, "decode": written(tmp_path, same("spare"))}, MeanColour(), flame, Linear(), crops)
    with pytest.raises(ParityError, match="not finite"):
        measure({**paths, "regress": written(tmp_path, regress_with(np.inf))}, MeanColour(), flame, Linear(), crops)
    with pytest.raises(InputError, match="held-out crops: expected"):
        measure(paths, MeanColour(), flame, Linear(), crops[0])


def same(*more: str, outputs: Sequence[str] = ("vertices", "landmarks")) -> onnx.ModelProto:
    """A graph that gives back the parameters."""
    spell = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Identity", ["parameters"], [name]) for name in outputs],
        "decode",
        [spell(name, TensorProto.FLOAT, ["batch", params.TOTAL]) for name in ("parameters", *more)],
        [spell(name, TensorProto.FLOAT, ["batch", params.TOTAL]) for name in outputs],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def test_further_outputs_and_their_order_do_not_matter(
    paths: dict[str, Path], flame: Flame, crops: np.ndarray, exact: Parity, tmp_path: Path
) -> None:
    proto = onnx.load(paths["decode"])
    proto.graph.node.append(helper.make_node("Identity", ["vertices"], ["again"]))
    again = copy.deepcopy(proto.graph.output[0])
    again.name = "again"
    changed = [again, *map(copy.deepcopy, reversed(proto.graph.output))]
    del proto.graph.output[:]
    proto.graph.output.extend(changed)
    found = measure({**paths, "decode": written(tmp_path, proto)}, MeanColour(), flame, Linear(), crops, source="drawn")
    assert found.report() == exact.report()


def test_half_vertices_keep_the_limits_of_half(exact: Parity) -> None:
    worse = {**exact.artefacts, "vertices_half": {"mean_mm": 0.04, "max_mm": 0.6}}
    with pytest.raises(ParityError, match=r"crops: vertices_half max 0.6 mm \(limit 0.5\); the export is wrong"):
        check(dataclasses.replace(exact, artefacts=worse))


def test_on_a_gpu_files_run_as_they_are(
    paths: dict[str, Path], flame: Flame, crops: np.ndarray, exact: Parity, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    real = onnxruntime.InferenceSession

    def session(path: str, providers: list[str]):
        asked.append(providers)
        return real(path, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    found = measure(paths, MeanColour(), flame, Linear(), crops, device="cuda")
    assert found.computed_in == "as the files say, on this GPU"
    assert found.max_mm == pytest.approx(exact.max_mm, abs=1e-4)
    assert asked == [["CUDAExecutionProvider"]] * 4
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda path, providers: 1 / 0)
    with pytest.raises(AssetError, match=r"regress.onnx: onnxruntime cannot read it \(division by zero\)"):
        parity.open_file(paths["regress"], device="cuda")


def test_half_is_computed_as_half(flame: Flame, paths: dict[str, Path], crops: np.ndarray, tmp_path: Path) -> None:
    half = regress_with()
    weights = next(t for t in half.graph.initializer if t.name == "weights")
    weights.CopyFrom(numpy_helper.from_array(mix().astype(np.float16), "weights"))
    half.graph.node[2].input[0], half.graph.node[2].output[0] = "mean.fp16", "out.fp16"
    half.graph.node.insert(2, helper.make_node("Cast", ["mean"], ["mean.fp16"], to=TensorProto.FLOAT16))
    half.graph.node.append(helper.make_node("Cast", ["out.fp16"], ["parameters"], to=TensorProto.FLOAT))
    some = {"regress": written(tmp_path, half), "decode": paths["decode"]}
    found = measure(some, MeanColour(), flame, None, crops)
    assert found.precision == "fp16"
    assert "emulated" in found.computed_in
    exact = crops.mean((1, 2)).astype(np.float16).astype(np.float32) @ mix().astype(np.float16).astype(np.float32)
    truth = MeanColour()((torch.from_numpy(crops).permute(0, 3, 1, 2) - 127.5) / 127.5).numpy()
    assert found.parameters == pytest.approx(np.abs(exact.astype(np.float16) - truth).max(), rel=0.05)


def test_judge_gives_the_share_of_the_limit(flame: Flame, crops: np.ndarray) -> None:
    error = judge(MeanColour(), flame, crops, margin=0.5)
    assert error(regress_with()) < 0.01
    one, two = error(regress_with(1e-5)), error(regress_with(2e-5))
    assert two == pytest.approx(2 * one, rel=0.05)
    assert judge(MeanColour(), flame, crops, margin=1.0)(regress_with(1e-5)) == pytest.approx(one / 2)
    with pytest.raises(InputError, match="judging crops"):
        judge(MeanColour(), flame, crops[:0])


def test_picture_shows_where(exact: Parity, tmp_path: Path) -> None:
    from PIL import Image

    head = make_head()
    rising = dataclasses.replace(exact, per_vertex_mm=head.template[:, 1] - head.template[:, 1].min())
    picture = np.asarray(Image.open(draw(rising, head, tmp_path / "error.png")).convert("RGB")).astype(int)
    crown, chin = picture[50:90, 120:180], picture[225:255, 120:180]
    assert crown.mean((0, 1))[0] > chin.mean((0, 1))[0] + 30, "yellow above, blue below"
    with pytest.raises(InputError, match=r"expected \(514,\)"):
        draw(exact, head, tmp_path / "other.png")
    assert [path.name for path in tmp_path.iterdir()] == ["error.png"]


def test_held_out_crops_are_photographs_of_the_head() -> None:
    crops, source = make_crops(make_head(), 3, 7)
    assert source == "synthetic photographs of test16, seed 7"
    assert (crops.shape, crops.dtype) == ((3, 112, 112, 3), np.uint8)
    np.testing.assert_array_equal(held_out_crops(make_head(), 3, 7), crops)
    assert not np.array_equal(held_out_crops(make_head(), 3, 8), crops)
    with pytest.raises(ConfigError, match="expected 1 crop at least, got 0"):
        held_out_crops(make_head(), 0)


def test_head_that_gives_no_photographs_gets_drawings(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object, indices: range) -> None:
        raise np.linalg.LinAlgError("singular")

    monkeypatch.setattr("chebface.data.synthetic.Painter.paint", fail)
    crops, source = make_crops(make_head(), 3, 7)
    assert source == "drawn, seed 7 (no photographs of it: LinAlgError: singular)"
    np.testing.assert_array_equal(crops, draw_crops(np.random.default_rng(7), 3))


def test_drawn_crops_and_parameters_are_seeded_and_varied() -> None:
    one, two = (draw_crops(np.random.default_rng(3), 4) for _ in range(2))
    assert np.array_equal(one, two)
    assert (one.shape, one.dtype) == ((4, 112, 112, 3), np.uint8)
    assert len({crop.tobytes() for crop in one}) == 4
    drawn = draw_parameters(np.random.default_rng(3), 4)
    assert (drawn.shape, drawn.dtype) == ((4, params.TOTAL), np.float32)
    assert parity.SEED != 0, "the seed of `data synthesize`"
