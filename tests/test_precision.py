"""fp16, bf16 and int8 graphs: typed as they say, near the float32 graph, and refused where they cannot be made."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from models_for_tests import stand_in
from onnx import TensorProto, helper, numpy_helper

from chebface.errors import AssetError, ConfigError, InputError
from chebface.signature import DECODE
from export import precision
from export.precision import (
    calibrate,
    cast,
    emulate,
    integer_layers,
    layer_names,
    open_session,
    precision_of,
    quantize,
    quantize_within,
    unfold_prelu,
)

HALVES = {"fp16": (TensorProto.FLOAT16, 2**-11), "bf16": (TensorProto.BFLOAT16, 2**-8)}


def network(seed: int = 0) -> onnx.ModelProto:
    """A regressor's every kind of node in little: normalised crop, norm, a residual block, embedding, mapping."""
    rng = np.random.default_rng(seed)

    def array(*shape: int, size: float = 1.0) -> np.ndarray:
        return (size * rng.normal(size=shape) / np.sqrt(max(np.prod(shape[1:]), 1))).astype(np.float32)

    constants = {
        "middle": np.float32(127.5),
        "w0": array(8, 3, 3, 3, size=2),
        "b0": array(8, size=0.1),
        "slope": rng.uniform(0, 0.5, (8, 1, 1)).astype(np.float32),
        "scale": np.ones(8, np.float32),
        "shift": array(8, size=0.1),
        "mean": np.zeros(8, np.float32),
        "var": np.ones(8, np.float32),
        "w1": array(8, 8, 3, 3, size=2),
        "b1": array(8, size=0.1),
        "w2": array(8, 8, 1, 1, size=2),
        "b2": array(8, size=0.1),
        "w3": array(16, 8, 7, 7, size=2),
        "b3": array(16, size=0.1),
        "axes": np.array([0, -1]),
        "w4": array(32, 16),
        "w5": array(486, 32),
        "unit": np.full(486, 0.5, np.float32),
    }
    node = helper.make_node
    conv = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    nodes = [
        node("Transpose", ["crop"], ["planes"], perm=[0, 3, 1, 2]),
        node("Cast", ["planes"], ["floats"], to=TensorProto.FLOAT),
        node("Sub", ["floats", "middle"], ["centred"]),
        node("Div", ["centred", "middle"], ["x"]),
        node("Conv", ["x", "w0", "b0"], ["c0"], kernel_shape=[3, 3], strides=[4, 4], name="stem"),
        node("PRelu", ["c0", "slope"], ["p0"]),
        node("BatchNormalization", ["p0", "scale", "shift", "mean", "var"], ["n0"]),
        node("Conv", ["n0", "w1", "b1"], ["c1"], name="inner", **conv),
        node("Conv", ["n0", "w2", "b2"], ["c2"], kernel_shape=[1, 1], name="shortcut"),
        node("Add", ["c1", "c2"], ["sum"]),
        node("Conv", ["sum", "w3", "b3"], ["c3"], kernel_shape=[7, 7], strides=[28, 28], name="last"),
        node("Reshape", ["c3", "axes"], ["flat"]),
        node("Gemm", ["flat", "w4"], ["embedding"], transB=1),
        node("LeakyRelu", ["embedding"], ["hidden"], alpha=0.2),
        node("Gemm", ["hidden", "w5"], ["out"], transB=1),
        node("Mul", ["out", "unit"], ["parameters"]),
    ]
    graph = helper.make_graph(
        nodes,
        "regress",
        [helper.make_tensor_value_info("crop", TensorProto.UINT8, ["batch", 112, 112, 3])],
        [helper.make_tensor_value_info("parameters", TensorProto.FLOAT, ["batch", 486])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.fixture(scope="module")
def net() -> onnx.ModelProto:
    return network()


@pytest.fixture(scope="module")
def crops() -> np.ndarray:
    smooth = np.random.default_rng(1).integers(0, 256, (20, 7, 7, 3))
    return smooth.repeat(16, axis=1).repeat(16, axis=2).astype(np.uint8)


def run(proto: onnx.ModelProto, crops: np.ndarray, **options: bool) -> np.ndarray:
    return open_session(proto, **options).run(None, {"crop": crops})[0]


def kinds(proto: onnx.ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph
    return {v.name: v.type.tensor_type.elem_type for v in [*graph.value_info, *graph.input, *graph.output]}


@pytest.mark.parametrize("name", HALVES)
def test_backbone_is_half_and_the_rest_is_not(net: onnx.ModelProto, name: str) -> None:
    made = cast(net, name)
    onnx.checker.check_model(made, full_check=True)
    kind, _ = HALVES[name]
    found = kinds(made)
    assert {
        each: found[each] == kind for each in ("c0", "p0", "c1", "c2", "sum", "c3", "flat", "embedding")
    } == dict.fromkeys(("c0", "p0", "c1", "c2", "sum", "c3", "flat", "embedding"), True)
    assert {found[each] for each in ("x", "n0", "hidden", "out", "parameters")} == {TensorProto.FLOAT}
    weights = {tensor.name: tensor.data_type for tensor in made.graph.initializer}
    assert {weights[f"w{i}.{name}"] for i in range(5)} == {kind}
    assert weights["w5"] == weights["var"] == weights["middle"] == TensorProto.FLOAT
    assert not {f"w{i}" for i in range(5)} & set(weights), "no float32 copy is left"
    assert precision_of(made) == name
    assert precision_of(net) == "fp32"
    assert len(made.SerializeToString()) < len(net.SerializeToString())


@pytest.mark.parametrize("name", HALVES)
def test_strongly_typed(net: onnx.ModelProto, name: str) -> None:
    made = cast(net, name)
    found = kinds(made) | {tensor.name: tensor.data_type for tensor in made.graph.initializer}
    floats = {TensorProto.FLOAT, *(kind for kind, _ in HALVES.values())}
    for node in made.graph.node:
        if node.op_type != "Cast":
            assert len({found[n] for n in [*node.input, *node.output]} & floats) <= 1, node.name


@pytest.mark.parametrize("name", HALVES)
def test_emulation_rounds_every_half_tensor(net: onnx.ModelProto, crops: np.ndarray, name: str) -> None:
    rounded = emulate(cast(net, name))
    assert precision_of(rounded) == "fp32"
    watched = onnx.ModelProto.FromString(rounded.SerializeToString())
    watched.graph.output.extend(helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("c0", "sum"))
    answers = open_session(watched, as_written=True).run(["c0", "sum", "parameters"], {"crop": crops})
    kind = helper.tensor_dtype_to_np_dtype(HALVES[name][0])
    for values in answers[:2]:
        assert np.array_equal(values, values.astype(kind).astype(np.float32))
    wanted = run(net, crops)
    error = np.abs(answers[2] - wanted).max() / np.abs(wanted).max()
    assert HALVES[name][1] / 20 < error < HALVES[name][1] * 4, "a rounding's worth, neither none nor more"


def test_emulation_leaves_float32_alone(net: onnx.ModelProto) -> None:
    assert emulate(net) is net


def test_float32_is_a_copy_and_graphs_without_convolutions_stay(net: onnx.ModelProto) -> None:
    assert cast(net, "fp32") == net
    assert cast(net, "fp32") is not net
    decode = stand_in(DECODE)
    assert cast(decode, "fp16") == decode


def test_half_output_of_a_graph_is_float32_again(net: onnx.ModelProto, crops: np.ndarray) -> None:
    short = onnx.ModelProto.FromString(net.SerializeToString())
    del short.graph.node[13:]
    short.graph.output[0].CopyFrom(helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", 32]))
    made = cast(short, "fp16")
    assert kinds(made)["embedding"] == TensorProto.FLOAT
    np.testing.assert_allclose(run(made, crops), run(short, crops), atol=2e-2)


def test_weights_beyond_half_are_named(net: onnx.ModelProto) -> None:
    large = with_weight(net, "w1", 1e5)
    with pytest.raises(AssetError, match="weight w1: not finite in fp16; export in bf16"):
        cast(large, "fp16")
    assert precision_of(cast(large, "bf16")) == "bf16"


def with_weight(net: onnx.ModelProto, name: str, value: float) -> onnx.ModelProto:
    made = onnx.ModelProto.FromString(net.SerializeToString())
    tensor = next(t for t in made.graph.initializer if t.name == name)
    array = numpy_helper.to_array(tensor).copy()
    array.flat[0] = value
    tensor.CopyFrom(numpy_helper.from_array(array, name))
    return made


def test_int8_runs_in_integers_and_is_near(net: onnx.ModelProto, crops: np.ndarray) -> None:
    made, report = quantize(net, crops)
    onnx.checker.check_model(made, full_check=True)
    assert precision_of(made) == "int8"
    assert (report["layers"], report["integer"], report["excluded"]) == (4, 4, []), "the shared input too"
    assert report["crops"] == 20
    assert len(report["crops_sha256"]) == 64
    assert json.loads(json.dumps(report)) == report
    constants = {t.name: numpy_helper.to_array(t) for t in made.graph.initializer}
    assert constants["w1.steps"].dtype == np.int8
    assert constants["w1.scale"].shape == (8,)
    assert np.abs(constants["w1.steps"].astype(int)).reshape(8, -1).max(1).tolist() == [127] * 8
    assert all(not value.any() for name, value in constants.items() if name.endswith(".zero"))
    wanted, found = run(net, crops), run(made, crops)
    error = np.abs(found - wanted).mean() / np.abs(wanted).mean()
    assert 1e-4 < error < 0.05
    assert {t.name for t in made.graph.output} == {"parameters"}
    assert integer_layers(net) == 0


def test_prelu_is_a_product_and_a_maximum(net: onnx.ModelProto, crops: np.ndarray) -> None:
    made = unfold_prelu(net)
    assert [n.op_type for n in made.graph.node if n.op_type in ("PRelu", "Max")] == ["Max"]
    assert any(n.op_type == "PRelu" for n in net.graph.node), "the given graph is not changed"
    np.testing.assert_array_equal(run(made, crops), run(net, crops))
    assert unfold_prelu(made) == made


@pytest.mark.parametrize("value", [-0.5, 0.0, 1.0, 1.01])
def test_prelu_of_any_slope_is_itself(net: onnx.ModelProto, crops: np.ndarray, value: float) -> None:
    odd = with_weight(net, "slope", value)
    made = unfold_prelu(odd)
    assert any(n.op_type == "PRelu" for n in made.graph.node) == (value > 1)
    np.testing.assert_array_equal(run(made, crops), run(odd, crops))
    quantized, report = quantize(odd, crops)
    assert report["integer"] == 4, "whichever way the activation is spelled"
    assert any(n.op_type == "PRelu" for n in quantized.graph.node) == (value > 1)


def test_excluded_layers_stay_float(net: onnx.ModelProto, crops: np.ndarray) -> None:
    assert layer_names(net) == ["w0", "w1", "w2", "w3"]
    made, report = quantize(net, crops, exclude=("w3", "w0"))
    assert (report["integer"], report["excluded"]) == (2, ["w0", "w3"])
    assert {"w0", "w3"} <= {t.name for t in made.graph.initializer}
    all_out, report = quantize(net, crops, exclude=layer_names(net))
    assert report["integer"] == 0
    np.testing.assert_array_equal(run(all_out, crops), run(net, crops))


def test_ranges_cover_what_they_say(net: onnx.ModelProto, crops: np.ndarray) -> None:
    watched = onnx.ModelProto.FromString(net.SerializeToString())
    watched.graph.output.append(helper.make_tensor_value_info("c1", TensorProto.FLOAT, None))
    sizes = np.abs(open_session(watched).run(["c1"], {"crop": crops})[0])
    percentile, entropy = (calibrate(net, crops, method)["c1"] for method in precision.METHODS)
    assert percentile == pytest.approx(np.percentile(sizes, precision.PERCENTILE), rel=2e-3)
    assert 0.1 * sizes.max() < entropy <= sizes.max() * 1.001


def test_histogram_doubles_its_range() -> None:
    sizes = precision._Sizes()
    sizes.add(np.zeros((2, 3), np.float32))
    assert sizes.percentile() == 1.0, "all zero: any range will do"
    values = np.random.default_rng(0).exponential(size=100_000).astype(np.float32)
    for part in np.split(np.sort(values), 10):
        sizes.add(part)
    assert sizes.counts.sum() == 100_000
    assert sizes.percentile() == pytest.approx(np.percentile(values, precision.PERCENTILE), rel=5e-3)


def test_ranges_are_used_again(net: onnx.ModelProto, crops: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    made, report = quantize(net, crops, method="entropy")
    monkeypatch.setattr(precision, "calibrate", None)
    again, _ = quantize(net, crops, method="entropy", ranges=json.loads(json.dumps(report["ranges"])))
    assert again.SerializeToString(deterministic=True) == made.SerializeToString(deterministic=True)


def strided(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same, with a residual block that halves the resolution, as a real shortcut does."""
    made = onnx.ModelProto.FromString(proto.SerializeToString())
    for node in made.graph.node:
        if node.name in ("inner", "shortcut"):
            node.attribute.append(helper.make_attribute("strides", [2, 2]))
    return made


def test_layers_are_left_out_until_the_error_allows(net: onnx.ModelProto, crops: np.ndarray) -> None:
    wide = strided(net)
    allowed = {(): 3.0, ("w0", "w3"): 0.9}

    def left(proto: onnx.ModelProto) -> float:
        floats = tuple(
            n.input[1]
            for n in proto.graph.node
            if n.op_type == "Conv" and n.input[1].startswith("w") and "." not in n.input[1]
        )
        return allowed[floats]

    said: list[str] = []
    _, report = quantize_within(wide, crops, left, say=said.append)
    assert report["excluded"] == ["w0", "w3"]
    assert [each["error"] for each in report["tries"]] == [3.0, 0.9]
    assert len(said) == 2
    _, report = quantize_within(wide, crops, lambda proto: 9.0)
    assert [each["excluded"] for each in report["tries"]] == [[], ["w0", "w3"], ["w0", "w2"]], "never more than half"
    allowed |= {("w0", "w3"): 2.0, ("w0", "w2"): 0.5}
    _, report = quantize_within(wide, crops, left)
    assert report["excluded"] == ["w0", "w2"], "the first layer and the shortcut"


def test_most_harmful_layer_goes_next(net: onnx.ModelProto, crops: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_MOST_EXCLUDED", 1.0)

    def error(proto: onnx.ModelProto) -> float:  # w1 does harm, the ends a little
        rounded = {n.input[1] for n in proto.graph.node if n.op_type == "Conv"}
        return 0.5 + 5.0 * ("w1.int8" in rounded) + 0.1 * len({"w0.int8", "w3.int8"} & rounded)

    _, report = quantize_within(strided(net), crops, error)
    assert report["excluded"] == ["w0", "w1", "w3"], "from the best of what came before"
    assert [len(each["excluded"]) for each in report["tries"]] == [0, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("crops_u8", "message"),
    [
        (np.zeros((0, 112, 112, 3), np.uint8), "got none"),
        (np.zeros((4, 3, 112, 112), np.uint8), r"got \(4, 3, 112, 112\)"),
        (np.full((1, 112, 112, 3), np.nan, np.float32), "got float32 with NaN"),
        (np.zeros((1, 112, 112, 3), np.float32), "got float32; RGB from 0 to 255"),
    ],
)
def test_crops_that_are_none(net: onnx.ModelProto, crops_u8: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        quantize(net, crops_u8)


def test_settings_that_cannot_be(net: onnx.ModelProto, crops: np.ndarray) -> None:
    with pytest.raises(ConfigError, match="cast makes fp32, fp16 or bf16, got 'int8'"):
        cast(net, "int8")
    with pytest.raises(ConfigError, match="expected percentile or entropy, got 'minmax'"):
        calibrate(net, crops, "minmax")
    with pytest.raises(ConfigError, match="exclude: no layer w9; there are w0, w1, w2, w3"):
        quantize(net, crops, exclude=["w9"])
    ranges = calibrate(net, crops)
    for wrong in (
        {**ranges, "other": 1.0},
        {n: v for n, v in ranges.items() if n != "x"},
        {**ranges, "x": float("nan")},
    ):
        with pytest.raises(ConfigError, match="ranges: they are of another graph"):
            quantize(net, crops, ranges=wrong)


def test_graphs_that_cannot_be(net: onnx.ModelProto, crops: np.ndarray) -> None:
    for made, name in ((quantize(net, crops)[0], "int8"), (cast(net, "fp16"), "fp16")):
        with pytest.raises(AssetError, match=f"quantize wants float32, it is {name} already"):
            quantize(made, crops, ranges={})
        with pytest.raises(AssetError, match=f"cast wants float32, it is {name} already"):
            cast(made, "fp16")
    with pytest.raises(AssetError, match="expected one input 'crop'"):
        calibrate(stand_in(DECODE), crops)
    edited = onnx.ModelProto.FromString(net.SerializeToString())
    edited.graph.node[5].input[0] = "nobody"
    with pytest.raises(AssetError, match=r"not valid .*nobody"):
        quantize(edited, crops)
    edited = onnx.ModelProto.FromString(net.SerializeToString())
    edited.graph.node[7].input[1] = "x"
    with pytest.raises(AssetError, match="weight x is no constant"):
        quantize(edited, crops)
    edited = onnx.ModelProto.FromString(net.SerializeToString())
    edited.graph.node[9].op_type = "And"
    with pytest.raises(AssetError, match="not valid"):
        cast(edited, "fp16")
    with pytest.raises(AssetError, match="weight w1 is not finite; the checkpoint is damaged"):
        quantize(with_weight(net, "w1", np.nan), crops)
    with pytest.raises(AssetError, match="c1: not finite on the calibration crops"):
        calibrate(with_weight(net, "b1", np.inf), crops)
    with pytest.raises(AssetError, match="onnxruntime cannot read it"):
        open_session(cast(net, "bf16"))
