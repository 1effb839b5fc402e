"""Precision is a property of the ONNX file: a float32 graph in, one in fp16, bf16 or int8 out, strongly typed.

Inputs and outputs stay those of signature.py. Only what lies from the first convolution to the embedding changes; in
float32 remain the crop's normalisation (its steps of 1/127.5 are as fine as bf16's own), the mapping network and
whatever follows it (small, and every error there is an error of the face), batch norms (variances leave fp16's range),
and so `decode`, in which half precision costs a quarter of a millimetre.

int8 is explicit QDQ around the convolutions: weights by channel, activations symmetric, as TensorRT wants them. The
sum of a residual block stays float32: in int8 it made the error seven times as large. PRelu stays float32 too, in words
that onnxruntime has fast kernels for: its own took a third of an int8 IResNet-50's time.
"""

from __future__ import annotations

import copy
import hashlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chebface import operators
from chebface.errors import AssetError, ConfigError, InputError
from chebface.signature import CROP, CROP_PX

if TYPE_CHECKING:
    import onnx

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
METHODS = ("percentile", "entropy")
PERCENTILE = 99.99  # of an activation's sizes lie within its range; a rare outlier costs less than a coarse step
_HALVES = {"fp16": 10, "bf16": 16}  # onnx.TensorProto.DataType
_FLOAT = 1
_BF16_OPSET, _BF16_IR = 22, 10  # the first whose convolutions may be bf16
_STAY = ("BatchNormalization", "Constant", "Cast")  # in float32, or of the type they say
_PRODUCTS = ("Gemm", "MatMul")
_LEVELS = 127  # of symmetric int8; -128 is not used
_BINS, _COARSE = 4096, 128  # of a histogram, and what entropy compares it with
_BATCH = 8
_MOST_EXCLUDED = 0.5  # of the layers: beyond, it is no int8 graph


def precision_of(proto: onnx.ModelProto) -> str:
    """The precision that a graph is in, by what is in it."""
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in proto.graph.node):
        return "int8"
    kinds = {tensor.data_type for tensor in proto.graph.initializer}
    return next((name for name, kind in _HALVES.items() if kind in kinds), "fp32")


def cast(proto: onnx.ModelProto, precision: str) -> onnx.ModelProto:
    """The graph in another floating-point precision. One without convolutions stays as it is.

    ONNX knows bf16 convolutions from opset 22 on: such a graph is of that opset, whatever it came from.

    Args:
        proto: float32.
        precision: fp32, fp16 or bf16.

    Raises:
        ConfigError: another precision.
        AssetError: the graph is not float32, not valid, or a weight is not finite in the new precision.
    """
    from onnx import version_converter

    if precision not in ("fp32", *_HALVES):
        raise ConfigError(f"precision: cast makes fp32, {' or '.join(_HALVES)}, got {precision!r}; see quantize")
    made = _fresh(proto, "cast")
    graph, layers = made.graph, _layers(made)
    if precision == "fp32" or not layers:
        return made
    if precision == "bf16" and _opset(made) < _BF16_OPSET:
        made = version_converter.convert_version(made, _BF16_OPSET)
        made.ir_version = max(proto.ir_version, _BF16_IR)
        graph, layers = made.graph, _layers(made)
    kind, floats = _HALVES[precision], _tensors_of(made, _FLOAT)
    weights = {tensor.name: tensor for tensor in graph.initializer}
    outputs = {output.name for output in graph.output}
    order = list(graph.node)
    last = _embedding(order, layers)
    nodes: list[onnx.NodeProto] = []
    names: dict[tuple[str, int], str] = {}
    halves: set[str] = set()

    def turn(name: str, to: int) -> str:
        if (name, to) not in names:
            names[name, to] = f"{name}.{precision if to == kind else 'fp32'}"
            if name in weights:
                graph.initializer.append(_round(weights[name], names[name, to], precision))
            else:
                nodes.append(_cast_node(name, names[name, to], to))
        return names[name, to]

    for place, node in enumerate(order):
        inside = order.index(layers[0]) <= place <= last and node.op_type not in _STAY
        halved = inside and any(name in floats for name in node.output)
        for k, name in enumerate(node.input):
            if name in floats and halved != (name in halves):
                node.input[k] = turn(name, kind if halved else _FLOAT)
        nodes.append(node)
        for k, name in enumerate(node.output):
            if halved and name in outputs:
                node.output[k] = f"{name}.{precision}"
                nodes.append(_cast_node(node.output[k], name, _FLOAT))
            elif halved and name in floats:
                halves.add(name)
    return _rewrite(made, nodes)


def emulate(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A float32 graph with the numbers of an fp16 or bf16 one: every tensor that is half there is rounded to it here.

    onnxruntime's CPU has hardly any half kernels: it computes fp16 graphs in float32 without rounding in between, and
    refuses bf16 ones. Sums are float32 here, as on tensor cores. Other graphs come back as they are.

    Raises:
        AssetError: not a valid graph.
    """
    from onnx import helper, numpy_helper

    precision = precision_of(proto)
    if precision not in _HALVES:
        return proto
    made = copy.deepcopy(proto)
    kind = _HALVES[precision]
    halves = _tensors_of(made, kind) - {output.name for output in made.graph.output}  # those are rounded as they are
    for tensor in made.graph.initializer:
        if tensor.data_type == kind:
            array = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    nodes: list[onnx.NodeProto] = []
    for node in made.graph.node:
        rounded = [(k, name) for k, name in enumerate(node.output) if name in halves]
        if node.op_type == "Cast" and not rounded and node.input[0] in halves:
            node.CopyFrom(helper.make_node("Identity", node.input, node.output, name=node.name))
        if node.op_type == "Cast" and rounded:
            node.output[0] = f"{rounded[0][1]}.rounded"
            nodes += [node, _cast_node(node.output[0], rounded[0][1], _FLOAT)]
            continue
        nodes.append(node)
        for k, name in rounded:
            node.output[k] = f"{name}.exact"
            nodes += [_cast_node(f"{name}.exact", f"{name}.rounded", kind), _cast_node(f"{name}.rounded", name, _FLOAT)]
    return _rewrite(made, nodes)


def calibrate(proto: onnx.ModelProto, crops_u8: np.ndarray, method: str = "percentile") -> dict[str, float]:
    """How far the inputs and outputs of every convolution reach on some faces: what `quantize` takes as `ranges`.

    percentile leaves out the largest 0.01 % of an activation; entropy cuts where the histogram in 128 steps tells least
    from the whole one (Kullback-Leibler, as TensorRT's calibrator did). Both see sizes only: the range is symmetric.

    Args:
        proto: float32, with an input `crop`.
        crops_u8: (n, 112, 112, 3) uint8 RGB, aligned; a hundred are enough.

    Returns:
        tensor name to the largest size, JSON-able.

    Raises:
        ConfigError: unknown method.
        InputError: no crops, or not such crops.
        AssetError: not a float32 graph of crops, or an activation is not finite.
    """
    from onnx import helper

    if method not in METHODS:
        raise ConfigError(f"method: expected {' or '.join(METHODS)}, got {method!r}")
    check_crops(crops_u8, "calibration crops")
    made = _fresh(proto, "calibrate")
    wanted = list(dict.fromkeys(name for node in _layers(made) for name in (node.input[0], node.output[0])))
    known = {output.name for output in made.graph.output}
    made.graph.output.extend(helper.make_tensor_value_info(t, _FLOAT, None) for t in wanted if t not in known)
    session = open_session(made)
    if [each.name for each in session.get_inputs()] != [CROP.name]:
        raise AssetError(f"graph {made.graph.name!r}: expected one input {CROP.name!r}; only graphs of crops are int8")
    sizes = {name: _Sizes() for name in wanted}
    for start in range(0, len(crops_u8), _BATCH):
        answers = session.run(wanted, {CROP.name: crops_u8[start : start + _BATCH]})
        for name, values in zip(wanted, answers, strict=True):
            if not np.isfinite(values).all():
                raise AssetError(f"{name}: not finite on the calibration crops; the weights are damaged")
            sizes[name].add(np.abs(values))
    return {name: each.percentile() if method == "percentile" else each.entropy() for name, each in sizes.items()}


def quantize(
    proto: onnx.ModelProto,
    crops_u8: np.ndarray,
    *,
    method: str = "percentile",
    exclude: Iterable[str] = (),
    ranges: Mapping[str, float] | None = None,
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """The graph with its convolutions in int8.

    Args:
        proto: float32, with an input `crop`.
        crops_u8: (n, 112, 112, 3) uint8 RGB, what to calibrate on; its digest is reported also where ranges are given.
        method: see `calibrate`.
        exclude: layers, by the name of their weight, that stay float32. See `layer_names`.
        ranges: from an earlier `calibrate`, instead of doing it again.

    Returns:
        The graph, and a JSON-able report: method, crops, crops_sha256, ranges, layers, excluded, and `integer`, the
        layers that this machine's onnxruntime really computes in integers.

    Raises:
        ConfigError: unknown method, a layer that is not there, or ranges that are not those of this graph.
        InputError: no crops, or not such crops.
        AssetError: as `calibrate`; or weights that are not constants, or not finite.
    """
    from onnx import helper, numpy_helper

    if ranges is None:
        ranges = calibrate(proto, crops_u8, method)
    check_crops(crops_u8, "calibration crops")
    made = unfold_prelu(_fresh(proto, "quantize"))
    graph, layers, excluded = made.graph, layer_names(made), sorted(set(exclude))
    if unknown := set(excluded) - set(layers):
        raise ConfigError(f"exclude: no layer {', '.join(sorted(unknown))}; there are {', '.join(layers)}")
    wanted = {name for node in _layers(made) for name in (node.input[0], node.output[0])}
    if set(ranges) != wanted or not all(np.isfinite(value) and value > 0 for value in ranges.values()):
        odd = sorted(set(ranges) ^ wanted)[:4] or "a range that is not above zero"
        raise ConfigError(f"ranges: they are of another graph ({odd}); calibrate again")
    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    read = Counter(name for node in graph.node for name in node.input)
    readers: Counter[str] = Counter()
    renamed: dict[str, str] = {}

    def constant(name: str, array: np.ndarray) -> str:
        graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    def pair(name: str) -> str:
        """Quantise and back. Each reader has a pair of its own, whose scales differ in their last bit: of a shared one
        (or of equal ones, which it merges) onnxruntime makes a uint8 and an int8 half, and the layer stays float."""
        scale = np.asarray(ranges[name] / _LEVELS * (1 + readers[name] * 2**-23), np.float32)
        own = f"{name}.int8.{readers[name]}"
        readers[name] += 1
        facts = [constant(f"{own}.scale", scale), constant(f"{own}.zero", np.zeros((), np.int8))]
        nodes.append(helper.make_node("QuantizeLinear", [name, *facts], [f"{own}.steps"], name=f"{own}.quantize"))
        nodes.append(helper.make_node("DequantizeLinear", [f"{own}.steps", *facts], [own], name=f"{own}.dequantize"))
        return own

    def share(name: str, channels: int) -> str:
        """One reader where there are several, or onnxruntime gives each its own half of the pair (see `pair`). It drops
        an Identity and a product with a single 1, not one by channel."""
        ones = constant(f"{name}.ones", np.ones((channels, 1, 1), np.float32))
        nodes.append(helper.make_node("Mul", [name, ones], [f"{name}.shared"], name=f"{name}.share"))
        return f"{name}.shared"

    for node in graph.node:
        raw = list(node.input)
        for k, name in enumerate(raw):
            node.input[k] = renamed.get(name, name)
        if node.op_type != "Conv" or node.input[1] in excluded:
            nodes.append(node)
            continue
        if raw[0] not in renamed:
            node.input[0] = pair(raw[0])
        name = node.input[1]
        steps, scale = _by_channel(numpy_helper.to_array(weights[name]))
        facts = [constant(f"{name}.scale", scale), constant(f"{name}.zero", np.zeros(len(scale), np.int8))]
        inputs = [constant(f"{name}.steps", steps), *facts]
        nodes.append(helper.make_node("DequantizeLinear", inputs, [f"{name}.int8"], name=f"{name}.dequantize", axis=0))
        node.input[1] = f"{name}.int8"
        nodes.append(node)
        rounded = pair(node.output[0])
        renamed[node.output[0]] = share(rounded, len(scale)) if read[node.output[0]] > 1 else rounded
    made = _rewrite(made, nodes)
    report = {
        "method": method,
        "crops": len(crops_u8),
        "crops_sha256": hashlib.sha256(np.ascontiguousarray(crops_u8).tobytes()).hexdigest(),
        "ranges": dict(ranges),
        "layers": len(layers),
        "excluded": excluded,
        "integer": integer_layers(made),
    }
    return made, report


def quantize_within(
    proto: onnx.ModelProto,
    crops_u8: np.ndarray,
    error: Callable[[onnx.ModelProto], float],
    *,
    method: str = "percentile",
    ranges: Mapping[str, float] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """As `quantize`, with as few layers left out as the error allows: none; the first and last; the first and the
    shortcuts; all of these; then, from the best of them, one at a time those that alone do most harm, until half of
    all layers are out.

    Shortcuts are the 1 x 1 convolutions past a residual block. They and the first layer are the residual stream itself:
    little work, and no later block mends what they lose (without them an IResNet-50's error was 0.3 times as large).

    Args:
        error: of a graph, as a share of what is allowed: up to 1 is good. See `parity.judge`.
        say: called with one line per try.

    Returns:
        The first graph that is good, or else the last tried; the report has `tries`, each with its error.
    """
    ranges = calibrate(proto, crops_u8, method) if ranges is None else ranges
    layers = layer_names(proto)
    most = max(int(_MOST_EXCLUDED * len(layers)), 2)
    tries: list[dict[str, Any]] = []

    def attempt(exclude: Iterable[str]) -> tuple[onnx.ModelProto, dict[str, Any]]:
        made, report = quantize(proto, crops_u8, method=method, exclude=exclude, ranges=ranges)
        tries.append({"excluded": report["excluded"], "error": error(made)})
        say(f"int8 without {len(report['excluded'])} of {len(layers)} layers: {tries[-1]['error']:.2f} of the limit")
        return made, report | {"tries": tries}

    ends, shortcuts = {layers[0], layers[-1]}, _shortcuts(proto)
    groups: list[set[str]] = [set(), ends, *([{layers[0], *shortcuts}, ends | shortcuts] if shortcuts else [])]
    for exclude in groups:
        if len(exclude) <= most:
            found = attempt(exclude)
            if tries[-1]["error"] <= 1:
                return found
    best = list(min(tries[1:], key=lambda each: float(each["error"]))["excluded"])
    harm: dict[str, float] = {}
    for layer in [each for each in layers if each not in best] if len(best) < most else []:
        alone = set(layers) - {layer}
        harm[layer] = error(quantize(proto, crops_u8, method=method, exclude=alone, ranges=ranges)[0])
    for layer in sorted(harm, key=harm.__getitem__, reverse=True)[: most - len(best)]:
        best.append(layer)
        found = attempt(best)
        if tries[-1]["error"] <= 1:
            break
    return found


def unfold_prelu(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with every PRelu as max(x, slope x): where no slope is above 1 it is that, bit for bit.

    onnxruntime's PRelu takes one number after the other on one thread, its Mul and Max do not. One with a steeper
    slope, or with slopes that are computed, stays.

    Raises:
        AssetError: not a valid graph.
    """
    from onnx import helper, numpy_helper

    made = copy.deepcopy(proto)
    slopes = {node.input[1] for node in made.graph.node if node.op_type == "PRelu"}
    constants = [tensor for tensor in made.graph.initializer if tensor.name in slopes]
    gentle = {tensor.name for tensor in constants if (numpy_helper.to_array(tensor) <= 1).all()}
    nodes: list[onnx.NodeProto] = []
    for node in made.graph.node:
        if node.op_type != "PRelu" or node.input[1] not in gentle:
            nodes.append(node)
            continue
        (x, slope), y = node.input, node.output[0]
        nodes.append(helper.make_node("Mul", [x, slope], [f"{y}.below"], name=f"{y}.mul"))
        nodes.append(helper.make_node("Max", [x, f"{y}.below"], [y], name=f"{y}.max"))
    return _rewrite(made, nodes)


def layer_names(proto: onnx.ModelProto) -> list[str]:
    """The convolutions, first to last, by the names of their weights."""
    return [node.input[1] for node in _layers(proto)]


def integer_layers(proto: onnx.ModelProto) -> int:
    """How many convolutions this machine's onnxruntime computes in integers, counted in the graph it optimises.

    Raises:
        AssetError: onnxruntime cannot read the graph.
    """
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        open_session(proto, optimized=path)
        found = onnx.load(path, load_external_data=False)
    return sum(node.op_type in ("QLinearConv", "ConvInteger") for node in found.graph.node)


def open_session(
    graph: onnx.ModelProto | str | Path, *, threads: int = 1, as_written: bool = False, optimized: Path | None = None
) -> Any:
    """An onnxruntime session on the CPU.

    Args:
        graph: in memory or a file.
        threads: of an operator.
        as_written: run every node, optimise nothing.
        optimized: where to leave the graph as onnxruntime runs it.

    Raises:
        AssetError: onnxruntime cannot read it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if as_written:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimized:
        options.optimized_model_filepath = str(optimized)
    if not isinstance(graph, str | Path) and any(node.domain == operators.DOMAIN for node in graph.graph.node):
        options.register_custom_ops_library(str(operators.library()))
    content = str(graph) if isinstance(graph, str | Path) else graph.SerializeToString()
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its classes share no root
        name = graph if isinstance(graph, str | Path) else graph.graph.name
        raise AssetError(f"{name}: onnxruntime cannot read it ({error}); export it again") from error


def check_crops(crops_u8: np.ndarray, name: str = "crops") -> None:
    """Make sure that crops are (n, 112, 112, 3) uint8 and at least one.

    Raises:
        InputError: they are not.
    """
    wanted = f"{name}: expected (n, {CROP_PX}, {CROP_PX}, 3) uint8 with n of 1 at least"
    if crops_u8.ndim != 4 or crops_u8.shape[1:] != CROP.shape:
        raise InputError(f"{wanted}, got {crops_u8.shape}; align faces with chebface.crop")
    if not len(crops_u8):
        raise InputError(f"{wanted}, got none; give photographs, or let the head make some (parity.held_out_crops)")
    if crops_u8.dtype != np.uint8:
        nan = " with NaN" if crops_u8.dtype.kind == "f" and not np.isfinite(crops_u8).all() else ""
        raise InputError(f"{wanted}, got {crops_u8.dtype}{nan}; RGB from 0 to 255")


class _Sizes:
    """A histogram whose range doubles, two bins becoming one, whenever a larger value comes."""

    def __init__(self) -> None:
        self.top = 0.0
        self.counts = np.zeros(_BINS, np.int64)

    def add(self, values: np.ndarray) -> None:
        """Count values (any shape, from 0 up)."""
        most = float(values.max())
        self.top = self.top or most * (1 + 1e-6)
        while most >= self.top > 0:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(1), np.zeros(_BINS // 2, np.int64)])
            self.top *= 2
        if self.top:
            place = (values.ravel() * np.float32(_BINS / self.top)).astype(np.int32)
            self.counts += np.bincount(np.minimum(place, _BINS - 1), minlength=_BINS)

    def percentile(self) -> float:
        place = np.searchsorted(self.counts.cumsum(), PERCENTILE / 100 * self.counts.sum())
        return self._size(int(place) + 1)

    def entropy(self) -> float:
        counts = self.counts.astype(np.float64)
        used = int(np.flatnonzero(counts).max(initial=0)) + 1
        ends = range(_COARSE, max(used, _COARSE) + _COARSE // 4, _COARSE // 4)
        return self._size(min(ends, key=lambda end: _divergence(counts, min(end, _BINS))))

    def _size(self, end: int) -> float:
        return self.top * min(end, _BINS) / _BINS or 1.0  # where all was zero, any range will do


def _divergence(counts: np.ndarray, end: int) -> float:
    """Kullback-Leibler of a histogram clipped at `end` bins from the same in 128 steps, spread over its used bins."""
    clipped = counts[:end].copy()
    filled = clipped > 0
    starts = np.arange(_COARSE) * end // _COARSE
    groups = np.repeat(np.arange(_COARSE), np.diff([*starts, end]))
    share = np.bincount(groups, clipped) / np.maximum(np.bincount(groups, filled), 1)
    coarse = share[groups] * filled
    clipped[-1] += counts[end:].sum()
    p, q = clipped / clipped.sum(), coarse / max(coarse.sum(), 1)
    both = (p > 0) & (q > 0)
    return float((p[both] * np.log(p[both] / q[both])).sum() + (1e3 * p[(p > 0) & ~both]).sum())


def _by_channel(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Steps (O, ...) int8 and their size (O,) float32."""
    size = np.abs(weight).reshape(len(weight), -1).max(1) / _LEVELS
    size = np.where(size > 0, size, 1).astype(np.float32)
    steps = np.rint(weight / size.reshape(-1, *[1] * (weight.ndim - 1)))
    return np.clip(steps, -_LEVELS, _LEVELS).astype(np.int8), size


def _fresh(proto: onnx.ModelProto, verb: str) -> onnx.ModelProto:
    """A copy to change, of a graph that is float32 and sound."""
    import onnx
    from onnx import numpy_helper

    if (found := precision_of(proto)) != "fp32":
        raise AssetError(f"graph {proto.graph.name!r}: {verb} wants float32, it is {found} already; export it again")
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        raise AssetError(f"graph {proto.graph.name!r}: not valid ({error}); export it again") from error
    made = copy.deepcopy(proto)
    constants = {tensor.name: tensor for tensor in made.graph.initializer}
    for name in layer_names(made):
        if name not in constants:
            raise AssetError(f"graph {made.graph.name!r}: weight {name} is no constant; export it again")
        if not np.isfinite(numpy_helper.to_array(constants[name])).all():
            raise AssetError(f"graph {made.graph.name!r}: weight {name} is not finite; the checkpoint is damaged")
    return made


def _opset(proto: onnx.ModelProto) -> int:
    return next(entry.version for entry in proto.opset_import if not entry.domain)


def _layers(proto: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in proto.graph.node if node.op_type == "Conv"]


def _shortcuts(proto: onnx.ModelProto) -> set[str]:
    """The 1 x 1 convolutions that step over pixels: nothing but a shortcut does."""
    points = {tensor.name for tensor in proto.graph.initializer if tuple(tensor.dims[2:]) == (1, 1)}
    return {
        node.input[1]
        for node in _layers(proto)
        if node.input[1] in points and any(max(a.ints) > 1 for a in node.attribute if a.name == "strides")
    }


def _embedding(order: list[onnx.NodeProto], layers: list[onnx.NodeProto]) -> int:
    """Where the backbone ends: at the first product after the last convolution."""
    last = order.index(layers[-1])
    return next((i for i in range(last, len(order)) if order[i].op_type in _PRODUCTS), last)


def _tensors_of(proto: onnx.ModelProto, kind: int) -> set[str]:
    """The names of all tensors of an element type."""
    import onnx

    try:
        graph = onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph
    except onnx.shape_inference.InferenceError as error:
        raise AssetError(f"graph {proto.graph.name!r}: not valid ({error}); export it again") from error
    values = [*graph.value_info, *graph.input, *graph.output]
    found = {value.name for value in values if value.type.tensor_type.elem_type == kind}
    return found | {tensor.name for tensor in graph.initializer if tensor.data_type == kind}


def _round(tensor: onnx.TensorProto, name: str, precision: str) -> onnx.TensorProto:
    from onnx import helper, numpy_helper

    kind = helper.tensor_dtype_to_np_dtype(_HALVES[precision])
    with np.errstate(over="ignore"):
        array = numpy_helper.to_array(tensor).astype(kind)
    if not np.isfinite(array.astype(np.float32)).all():
        raise AssetError(f"weight {tensor.name}: not finite in {precision}; export in bf16 or fp32")
    return numpy_helper.from_array(array, name)


def _cast_node(name: str, made: str, to: int) -> onnx.NodeProto:
    from onnx import helper

    return helper.make_node("Cast", [name], [made], name=f"{name}.to.{made}", to=to)


def _rewrite(proto: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> onnx.ModelProto:
    """Put nodes in place of the graph's own, drop constants that none reads and types that no longer hold, check."""
    import onnx

    nodes = [copy.deepcopy(node) for node in nodes]
    del proto.graph.node[:], proto.graph.value_info[:]
    proto.graph.node.extend(nodes)
    read = {name for node in nodes for name in node.input} | {output.name for output in proto.graph.output}
    kept = [tensor for tensor in proto.graph.initializer if tensor.name in read]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    made: onnx.ModelProto = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    return made
