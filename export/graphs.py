"""Every ONNX graph that is served, as a ModelProto: modules and heads in, graphs out; no file is read or written.

`regress` is traced from torch. `decode` and `encode` are built by hand, since a runtime of standard operators is fast
where torch's formulation is not: few wide products over constants, no recursion, no arithmetic on indices.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chebface import params
from chebface.errors import AssetError, ConfigError, MissingDependencyError
from chebface.heads.asset import CONTOUR_STEPS
from chebface.signature import DECODE, ENCODE, RECONSTRUCT, REGRESS, TOPOLOGY, VERTICES_HALF, Model, Tensor

if TYPE_CHECKING:
    import onnx
    import torch

    from chebface.encoder import MeshEncoder
    from chebface.flame import Flame
    from chebface.heads import Head
    from chebface.kernels import Graph
    from chebface.regressor import Regressor

OPSET = 18  # above, some of onnxruntime's CUDA kernels are missing
OPSETS = (18, 21)  # the first that the tracer gives (to older ones it converts, or silently does not), IR 10's last
MAX_IR = 10
NEWEST = 22  # of bf16 graphs alone: no older one has their convolutions
ONNX_TYPES = {"FP32": 1, "UINT8": 2, "INT32": 6, "BYTES": 8, "FP16": 10}  # onnx.TensorProto.DataType
_INT64 = 7
_EXAMPLE_BATCH = 2  # a batch of 1 would be taken for a constant
_STEEPEST = 100.0  # a shift of so many scales costs the residual stream two digits: such a norm is left as it is
_TINY = 1e-12  # rad^2: below, sin(t)/t and (1 - cos t)/t^2 are 1 and 1/2 in float32 anyway
_DENSE = 512  # vertices of a level up to which one product over all of them beats patches
_PATCH = 8  # kept vertices a patch, 4 to 16 were alike
_SIZES = 4  # patches are sorted by the size of their halo into so many products, or padding would be a third


def check_opset(opset: int) -> None:
    """Make sure that graphs can be made for an opset.

    Raises:
        ConfigError: too old or too new.
    """
    first, last = OPSETS
    if not first <= opset <= last:
        raise ConfigError(
            f"opset: expected {first} to {last}, got {opset}; {OPSET} is what onnxruntime's CPU and CUDA providers, "
            "TensorRT 10 and later and OpenVINO all read"
        )


def regress_graph(regressor: Regressor, opset: int = OPSET) -> onnx.ModelProto:
    """Crop -> parameters, traced; the crop's normalisation is inside, every BatchNorm that can be is folded away.

    Args:
        regressor: in eval mode; it is not changed.
        opset: of the graph.

    Raises:
        ConfigError: an opset that cannot be had.
        AssetError: the tracer gave nothing.
    """
    import torch

    from chebface.regressor import normalize_crop

    check_opset(opset)
    folded = fold_norms(regressor)

    class Regress(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.regressor = folded

        def forward(self, crop: torch.Tensor) -> torch.Tensor:
            return self.regressor(normalize_crop(crop.float()))  # TensorRT takes bytes into a cast and nothing else

    return trace(Regress().eval(), REGRESS, opset)


def trace(module: torch.nn.Module, model: Model, opset: int = OPSET) -> onnx.ModelProto:
    """A module's graph with the names of signature.py and a free batch.

    Raises:
        AssetError: torch.onnx gave nothing.
    """
    import torch

    kinds = {"FP32": torch.float32, "UINT8": torch.uint8}
    examples = tuple(torch.zeros(_EXAMPLE_BATCH, *t.shape, dtype=kinds[t.dtype]) for t in model.inputs)
    batch = torch.export.Dim("batch", min=1, max=1024)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module,
            examples,
            dynamo=True,
            opset_version=opset,
            input_names=[t.name for t in model.inputs],
            output_names=[t.name for t in model.outputs],
            dynamic_shapes=tuple({0: batch} for _ in model.inputs),
            external_data=False,
            verbose=False,
        )
    if program is None:
        raise AssetError(f"{model.name}: torch.onnx.export gave nothing; try another opset or torch")
    return program.model_proto


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes (torchvision is absent, its own deprecations) off the screen; errors still raise."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def fold_norms(regressor: Regressor) -> Regressor:
    """A copy whose residual blocks have no BatchNorm left: their convolutions compute the same.

    The BatchNorms after a convolution fold into it as usual. The one before, y = s (x + c), cannot: the convolution
    pads y with zeros, and no bias knows the border. But its scale s folds into the weights, and c = shift / s may be
    added a block earlier: the residual stream carries x + c instead of x, and every other reader's bias takes it away
    again. What is padded is then y = 0 exactly where it was.
    """
    import torch
    from torch import nn

    from chebface.arcface import IResNet, _IBasicBlock

    made: Any = copy.deepcopy(regressor).eval()
    if not isinstance(getattr(made, "backbone", None), nn.Module):
        return made
    blocks: list[Any] = [module for module in made.backbone.modules() if isinstance(module, _IBasicBlock)]
    carried = [None if i == 0 else _carry(block.bn1) for i, block in enumerate(blocks)]  # before the first: a PReLU
    with torch.no_grad():
        for block, (here, following) in zip(blocks, pairwise([*carried, None]), strict=True):
            if here is not None:
                scale = _scale(block.bn1)
                block.conv1.weight.copy_(block.conv1.weight * scale[None, :, None, None])
                block.bn1 = nn.Identity()
            block.conv1, block.bn2 = _fuse(block.conv1, block.bn2), nn.Identity()
            block.conv2, block.bn3 = _fuse(block.conv2, block.bn3), nn.Identity()
            downsamples = isinstance(block.downsample, nn.Sequential)
            if downsamples:
                block.downsample = _fuse(block.downsample[0], block.downsample[1])
            if here is not None and downsamples:
                block.downsample.bias.sub_(block.downsample.weight.sum((2, 3)).double() @ here)
            elif here is not None:
                block.conv2.bias.sub_(here)
            if following is not None:
                block.conv2.bias.add_(following)
        if isinstance(made.backbone, IResNet):  # the last one meets no padding: a linear layer follows
            last: Any = made.backbone
            scale = _scale(last.bn2)
            weight = last.fc.weight.double().unflatten(1, (len(scale), -1))
            last.fc.bias.add_(weight.sum(2) @ (last.bn2.bias - last.bn2.running_mean * scale))
            last.fc.weight.copy_((weight * scale[:, None]).flatten(1))
            last.bn2 = nn.Identity()
    return made


def _scale(norm: Any) -> torch.Tensor:
    return norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()


def _carry(norm: Any) -> torch.Tensor | None:
    """c of y = s (x + c), or None where it would drown x."""
    import torch

    with torch.no_grad():
        shift = norm.bias.double() / _scale(norm) - norm.running_mean
        return shift if bool((shift.abs() <= _STEEPEST * norm.running_var.double().sqrt()).all()) else None


def _fuse(conv: Any, norm: Any) -> torch.nn.Conv2d:
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    return fuse_conv_bn_eval(conv, norm)


class _Sheet:
    """A graph being written: every tensor has a name of this sheet, every array is a constant of it."""

    def __init__(self, model: Model, opset: int) -> None:
        check_opset(opset)
        self.model, self.opset = model, opset
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def floats(self, array: Any) -> str:
        return self._keep(np.asarray(array, np.float32))

    def ints(self, array: Any) -> str:
        return self._keep(np.asarray(array, np.int64))

    def _keep(self, array: np.ndarray) -> str:
        from onnx import numpy_helper

        name = f"{self.model.name}.c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def __call__(self, kind: str, *inputs: str, out: str = "", **attributes: Any) -> str:
        """Add a node; its output's name."""
        from onnx import helper

        name = f"{self.model.name}.n{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [out or name], name=name, **attributes))
        return out or name

    def slice(self, x: str, first: int, last: int, axis: int = 1) -> str:
        return self("Slice", x, self.ints([first]), self.ints([last]), self.ints([axis]))

    def reshape(self, x: str, *shape: int) -> str:
        return self("Reshape", x, self.ints(shape))

    def finish(self) -> onnx.ModelProto:
        return _assemble(self.model, self.nodes, self.constants, self.opset)


def _assemble(model: Model, nodes: Any, constants: Any, opset: int) -> onnx.ModelProto:
    from onnx import helper

    def spell(t: Tensor) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(t.name, ONNX_TYPES[t.dtype], [*(["batch"] * model.batched), *t.shape])

    graph = helper.make_graph(
        list(nodes),
        model.name,
        [spell(t) for t in model.inputs],
        [spell(t) for t in model.every_output],
        list(constants),
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=MAX_IR)


def decode_graph(flame: Flame, opset: int = OPSET) -> onnx.ModelProto:
    """Parameters -> vertices and landmarks, as `Flame.decode`; the vertices in half precision, too.

    All arithmetic is float32; the half ones are rounded last, for who wants half the bytes.

    One product over the concatenated basis gives the blended head, a second one of six rows both skinned versions of
    it. The contour's row is found by counting the yaws that the head is turned past: no arc sine, no index to clip.

    Raises:
        ConfigError: an opset that cannot be had.
    """
    s = _Sheet(DECODE, opset)
    parts = params.SLICES
    (whole,) = (t.name for t in DECODE.inputs)
    vertices, landmarks = (t.name for t in DECODE.outputs)
    n = len(flame.jaw_weights)
    linear = [s.slice(whole, parts[name].start, parts[name].stop) for name in ("shape", "expression")]
    blend = s("Concat", *linear, axis=1)  # (B, 400)
    turns = _rotations(s, s.reshape(s.slice(whole, parts["pose"].start, parts["pose"].stop), -1, 2, 3))  # (B, 2, 3, 3)
    identity = s.floats(np.eye(3))
    head = s("Gather", turns, s.ints(0), axis=1)  # (B, 3, 3)
    jaw = s("Sub", s("Gather", turns, s.ints(1), axis=1), identity)
    opened = s("MatMul", head, jaw)
    both = s("Concat", head, opened, axis=1)  # (B, 6, 3)

    coefficients = s("Concat", blend, s.reshape(jaw, -1, 9), axis=1)  # (B, 409)
    basis, template = s.floats(flame.basis), s.floats(flame.template)
    blended = s.reshape(s("Gemm", coefficients, basis, template), -1, 3, n)
    joints = s.reshape(s("Gemm", blend, s.floats(flame.joint_dirs), s.floats(flame.joints)), -1, 2, 3, 1)
    root_at, jaw_at = (s("Gather", joints, s.ints(i), axis=1) for i in (0, 1))  # (B, 3, 1)
    shift = s("Concat", s("Sub", root_at, s("MatMul", head, root_at)), s("Neg", s("MatMul", opened, jaw_at)), axis=1)
    skinned = s("Add", s("MatMul", both, blended), shift)  # (B, 6, N)
    opening = s("Mul", s.slice(skinned, 3, 6), s.floats(flame.jaw_weights))
    s("Transpose", s("Add", s.slice(skinned, 0, 3), opening), perm=[0, 2, 1], out=vertices)
    s("Cast", vertices, to=ONNX_TYPES[VERTICES_HALF.dtype], out=VERTICES_HALF.name)
    _landmarks(s, flame, vertices, head, landmarks)
    return s.finish()


def _rotations(s: _Sheet, axis_angle: str) -> str:
    """(B, 2, 3) to (B, 2, 3, 3): I + sin(t)/t K + (1 - cos t)/t^2 K^2 (Rodrigues), K the cross product with r."""
    cross = np.zeros((3, 9))
    cross[0, 5], cross[0, 7] = -1, 1
    cross[1, 2], cross[1, 6] = 1, -1
    cross[2, 1], cross[2, 3] = -1, 1
    square = s("ReduceSum", s("Mul", axis_angle, axis_angle), s.ints([-1]), keepdims=1)  # (B, 2, 1)
    square = s("Max", square, s.floats(_TINY))
    angle = s("Sqrt", square)
    half = s("Sin", s("Mul", angle, s.floats(0.5)))
    sine = s("Unsqueeze", s("Div", s("Sin", angle), angle), s.ints([-1]))
    versine = s("Unsqueeze", s("Div", s("Mul", s("Mul", half, half), s.floats(2.0)), square), s.ints([-1]))
    product = s.reshape(s("MatMul", axis_angle, s.floats(cross)), -1, 2, 3, 3)
    linear = s("Add", s("Mul", sine, product), s.floats(np.eye(3)))
    return s("Add", linear, s("Mul", versine, s("MatMul", product, product)))


def _landmarks(s: _Sheet, flame: Flame, vertices: str, head: str, out: str) -> None:
    most = CONTOUR_STEPS // 2
    degree = np.arange(-most, most + 1)
    order = np.where(degree < 0, most - degree, degree)  # the table's rows from right to left
    past = np.sin(np.radians(degree[:-1] + 0.5))  # to the nearest degree; beyond the ends counts as the end
    sine = s("Neg", s.slice(s.slice(head, 2, 3), 0, 1, axis=2))  # (B, 1, 1)
    turned = s("Cast", s("Greater", s.reshape(sine, -1, 1), s.floats(past)), to=ONNX_TYPES["FP32"])
    row = s("Cast", s("ReduceSum", turned, s.ints([1]), keepdims=0), to=_INT64)  # (B,) in 0..78; a NaN counts as 0
    corners = flame.landmark_vertices.numpy()[order].reshape(len(degree), -1, 1)  # (79, 204, 1)
    weights = flame.landmark_weights.numpy()[order][..., None]  # (79, 68, 3, 1)
    found = s("GatherND", vertices, s("Gather", s.ints(corners), row, axis=0), batch_dims=1)  # (B, 204, 3)
    weighted = s("Mul", s.reshape(found, -1, weights.shape[1], 3, 3), s("Gather", s.floats(weights), row, axis=0))
    s("ReduceSum", weighted, s.ints([2]), keepdims=0, out=out)


def encode_graph(encoder: MeshEncoder, opset: int = OPSET) -> onnx.ModelProto:
    """A neutral head's vertices -> descriptor, as `MeshEncoder`, standardisation and the code's frame included.

    A term of the filter is a product with T_k of the scaled Laplacian, of which only the kept vertices' rows matter;
    k hops away they are zero. So the kept vertices of a fine mesh are cut into patches, and all terms of a patch are
    one dense product with its halo, gathered once; a coarse mesh is one patch and needs no gathering. Rows lie in the
    order of the patches, and the next level's indices know it.

    Raises:
        ConfigError: an opset that cannot be had.
    """
    s = _Sheet(ENCODE, opset)
    mean, std = encoder.mean.double().numpy(), encoder.std.double().numpy()
    x = s("Mul", s("Sub", ENCODE.inputs[0].name, s.floats(mean)), s.floats(1 / std))
    x = s("Transpose", x, perm=[1, 0, 2])  # (N, B, C): a vertex of all meshes is one row
    place, rows, positions = np.arange(len(mean)), len(mean), mean
    layers: list[Any] = list(encoder.conv)
    for conv in layers:
        x, place, rows = _convolve(s, x, conv, place, rows, positions)
        positions = positions[conv.keep.numpy()]
    x = s.reshape(s("Transpose", x, perm=[1, 0, 2]), -1, rows * layers[-1].weight.shape[2])
    weight = encoder.fc.weight.detach().double().numpy().reshape(encoder.fc.out_features, len(place), -1)
    linear = np.zeros((len(weight), rows, weight.shape[2]))
    linear[:, place] = weight
    matrix, bias = s.floats(linear.reshape(len(weight), -1).T), s.floats(encoder.fc.bias.detach())
    s("Gemm", x, matrix, bias, out=ENCODE.outputs[0].name)
    return s.finish()


def _convolve(
    s: _Sheet, x: str, conv: Any, place: np.ndarray, rows: int, positions: np.ndarray
) -> tuple[str, np.ndarray, int]:
    """One ChebConv, (rows, B, C) to (more rows, B, C_out); `place` says in which row a vertex lies, then and now."""
    K, channels, out = conv.weight.shape
    keep = conv.keep.numpy()
    products, new_place, new_rows = [], np.zeros(len(keep), np.int64), 0
    for patches in _patches(conv.graph, keep, positions[keep], K):
        most = max(len(kept) for kept, _, _ in patches)
        halo = max(len(around) for _, around, _ in patches)
        whole = len(patches) == 1
        index = np.zeros((len(patches), rows if whole else halo), np.int64)
        matrix = np.zeros((len(patches), most, K, index.shape[1]))
        for i, (kept, around, values) in enumerate(patches):
            index[i, : len(around)] = place[around]
            columns = place[around] if whole else np.arange(len(around))
            matrix[i, : len(kept), :, columns] = values
            new_place[kept] = new_rows + i * most + np.arange(len(kept))
        new_rows += len(patches) * most
        gathered = x if whole else s("Gather", x, s.ints(index), axis=0)
        product = s(
            "MatMul",
            s.floats(matrix.reshape(len(patches), most * K, -1)),
            s.reshape(gathered, len(patches), index.shape[1], -1),
        )
        products.append(s.reshape(product, len(patches) * most, K, -1, channels))
    terms = s("Concat", *products, axis=0) if len(products) > 1 else products[0]
    terms = s.reshape(s("Transpose", terms, perm=[0, 2, 1, 3]), new_rows, -1, K * channels)
    weight, bias = conv.weight.detach().reshape(K * channels, out), conv.bias
    x = s("MatMul", terms, s.floats(weight))
    x = x if bias is None else s("Add", x, s.floats(bias.detach()))
    return s("Relu", x) if conv.relu else x, new_place, new_rows


_Patch = tuple[np.ndarray, np.ndarray, np.ndarray]  # kept (m,), halo (n,), T_k of one over the other (n, m, K)


def _patches(graph: Graph, keep: np.ndarray, positions: np.ndarray, K: int) -> list[list[_Patch]]:
    """The kept vertices in patches near each other in space, patches of like halo together."""
    count = 1 if graph.n <= _DENSE else math.ceil(len(keep) / _PATCH)
    parts = _halve(positions, np.arange(len(keep)), count)
    patches: list[_Patch] = []
    for start in range(0, count, _PATCH):  # several at once, not all: the terms of all are half a gigabyte
        some = parts[start : start + _PATCH]
        terms = _terms(graph, keep[np.concatenate(some)], K)
        ends = np.cumsum([len(part) for part in some])[:-1]
        for part, values in zip(some, np.split(terms, ends, axis=1), strict=True):
            halo = np.flatnonzero((values != 0).any((1, 2)))
            patches.append((part, halo, values[halo]))
    patches.sort(key=lambda patch: len(patch[1]))
    sizes = min(_SIZES, count)
    return [patches[i * count // sizes : (i + 1) * count // sizes] for i in range(sizes)]


def _halve(positions: np.ndarray, members: np.ndarray, count: int) -> list[np.ndarray]:
    """Cut points into `count` groups of like number, each time across the longest side."""
    if count == 1:
        return [np.sort(members)]
    place = positions[members]
    order = members[np.argsort(place[:, np.ptp(place, axis=0).argmax()], kind="stable")]
    cut = round(len(members) * (count // 2) / count)
    return _halve(positions, order[:cut], count // 2) + _halve(positions, order[cut:], count - count // 2)


def _terms(graph: Graph, keep: np.ndarray, K: int) -> np.ndarray:
    """Columns `keep` of T_0 .. T_{K-1} of the scaled Laplacian, float64 (N, M, K); they are symmetric, so rows too."""
    root = 1 / np.sqrt(graph.degree.astype(np.float64))[:, None]

    def apply(x: np.ndarray) -> np.ndarray:
        return -root * np.add.reduceat((root * x)[graph.indices], graph.indptr[:-1], axis=0)

    first = np.zeros((graph.n, len(keep)))
    first[keep, np.arange(len(keep))] = 1
    terms = [first, apply(first)]
    while len(terms) < K:
        terms.append(2 * apply(terms[-1]) - terms[-2])
    return np.stack(terms[:K], axis=2)


def topology_graph(head: Head, opset: int = OPSET) -> onnx.ModelProto:
    """A graph that answers any request with the head's triangles and facts.

    Raises:
        ConfigError: an opset that cannot be had.
    """
    s = _Sheet(TOPOLOGY, opset)
    triangles, facts = TOPOLOGY.outputs
    s("Identity", s._keep(head.faces), out=triangles.name)
    s("Identity", s._keep(np.array([json.dumps(head.facts)], object)), out=facts.name)
    return s.finish()


def reconstruct_graph(regress: onnx.ModelProto, decode: onnx.ModelProto) -> onnx.ModelProto:
    """Crop -> parameters, vertices and landmarks: both graphs in one, whatever the precision of the first is.

    Raises:
        ConfigError: their opsets differ.
    """
    first, second = (_opset(proto) for proto in (regress, decode))
    if first != second:
        raise ConfigError(f"opset: expected one in regress and decode, got {first} and {second}")
    nodes, constants = (
        [*getattr(regress.graph, field), *getattr(decode.graph, field)] for field in ("node", "initializer")
    )
    made = _assemble(RECONSTRUCT, nodes, constants, first)
    made.graph.value_info.extend([*regress.graph.value_info, *decode.graph.value_info])
    made.opset_import.extend(entry for entry in decode.opset_import if entry.domain)
    return made


def _opset(proto: onnx.ModelProto) -> int:
    return next(entry.version for entry in proto.opset_import if not entry.domain)


def simplify_graph(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph after onnxslim: constants folded, what is dead or said twice gone.

    Raises:
        MissingDependencyError: onnxslim is not installed.
    """
    try:
        import onnxslim
    except ImportError as error:
        raise MissingDependencyError("onnxslim is not installed: pip install 'chebface[export]'") from error
    made: onnx.ModelProto = onnxslim.slim(proto)
    return made


def check_graph(graph: onnx.ModelProto | Path, model: Model, where: str) -> None:
    """Check a graph by itself and against signature.py.

    Args:
        graph: in memory, or its file: beyond 2 GB there is no other way.
        model: that it should be.
        where: begins the text of an error.

    Raises:
        AssetError: it is broken, too new, or its inputs and outputs are not those of the model.
    """
    import onnx

    try:
        onnx.checker.check_model(graph, full_check=True)  # shapes too, strictly
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise AssetError(f"{where}: not a valid ONNX graph ({error}); export it again") from error
    proto = onnx.load(graph, load_external_data=False) if isinstance(graph, Path) else graph
    opsets = {entry.domain: entry.version for entry in proto.opset_import}
    if proto.ir_version > MAX_IR or opsets.get("", 0) > NEWEST:
        raise AssetError(
            f"{where}: expected IR {MAX_IR} and opset {NEWEST} at most, got IR {proto.ir_version} and {opsets}"
        )
    for kind, tensors, values in (
        ("input", model.inputs, proto.graph.input),
        ("output", model.every_output, proto.graph.output),
    ):
        wanted = {t.name: (t.dtype, (*(["B"] * model.batched), *t.shape)) for t in tensors}
        found = {value.name: _read_value(value) for value in values}
        if wanted != found:
            raise AssetError(f"{where}: {kind}s: signature.py says {wanted}, the file {found}; export it again")


def _read_value(value: onnx.ValueInfoProto) -> tuple[str, tuple[int | str, ...]]:
    names = {number: name for name, number in ONNX_TYPES.items()}
    kind = value.type.tensor_type
    shape = tuple("B" if dim.dim_param else dim.dim_value for dim in kind.shape.dim)
    return names.get(kind.elem_type, f"type {kind.elem_type}"), shape
