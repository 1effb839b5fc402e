"""ONNX graphs around our own operators, for onnxruntime on CPUs: chebface.operators has the library they need.

One node each, with the names of signature.py; every constant is an initializer, so a file is whole. A runtime without
the library refuses them: the graphs of standard operators in graphs.py are for everything else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from chebface import params
from chebface.errors import ConfigError
from chebface.operators import DOMAIN, TILE, VERSION
from chebface.signature import DECODE, ENCODE, VERTICES_HALF, VERTICES_M, Model
from export.graphs import MAX_IR, ONNX_TYPES, OPSET

if TYPE_CHECKING:
    import onnx

    from chebface.encoder import MeshEncoder
    from chebface.flame import Flame

BASES = ("fp32", "fp16")
_FINE = 32  # rows of a half basis that lose most are sums of two halves: a third of the error for 8 % more to read
OPERATORS = {ENCODE.name: "Encode", DECODE.name: "Decode"}


def encode_custom(encoder: MeshEncoder, *, threads: int = 0) -> onnx.ModelProto:
    """Vertices -> descriptor, as `MeshEncoder`, by chebface::Encode.

    Args:
        encoder: any hierarchy; it is not changed.
        threads: that one call may use; 0 leaves it to $CHEBFACE_THREADS where it is served, else 1.

    Raises:
        ConfigError: threads below 0.
    """
    layers: list[Any] = list(encoder.conv)
    graphs = [layer.graph for layer in layers]
    constants = {
        "mean": encoder.mean,
        "std": encoder.std,
        "indptr": _join(graph.indptr for graph in graphs),
        "indices": _join(graph.indices for graph in graphs),
        "keep": _join(layer.keep for layer in layers),
        "weight": _join(layer.weight.detach() for layer in layers),
        "bias": _join(layer.bias.detach() for layer in layers),
        "linear_weight": encoder.fc.weight.detach(),
        "linear_bias": encoder.fc.bias.detach(),
    }
    attributes = {
        "vertices": [graph.n for graph in graphs],
        "kept": [len(layer.keep) for layer in layers],
        "channels": [layers[0].weight.shape[1], *(layer.weight.shape[2] for layer in layers)],
        "terms": [layers[0].weight.shape[0]],
    }
    sizes = {"vertices": graphs[0].n, "descriptor": encoder.fc.out_features}
    return _assemble(ENCODE, sizes, constants, attributes, threads, "fp32")


def decode_custom(flame: Flame, basis: str = "fp32", *, threads: int = 0) -> onnx.ModelProto:
    """Parameters -> vertices and landmarks, as `Flame.decode`, by chebface::Decode.

    Args:
        flame: float32; its buffers become constants.
        basis: how the basis is stored, "fp32" or "fp16": half the file, two to three times the speed at batch 1, where
            reading it is what takes time, for an error of a hundredth of a millimetre. Sums are float32 in both.
        threads: that one call may use; 0 leaves it to $CHEBFACE_THREADS where it is served, else 1.

    Raises:
        ConfigError: no such basis, or threads below 0.
    """
    if basis not in BASES:
        raise ConfigError(f"basis: expected one of {', '.join(BASES)}, got {basis!r}")
    rows = flame.basis.numpy()
    factor_of = np.arange(len(rows))
    if basis == "fp16":
        coarse = rows.astype(np.float16)
        lost = rows - coarse
        fine = np.sort(np.argsort(-np.square(lost).sum(1))[:_FINE])
        rows, factor_of = np.concatenate([coarse, lost[fine].astype(np.float16)]), np.concatenate([factor_of, fine])
    start, pose = params.SLICES["shape"].start, params.SLICES["pose"].start
    constants = {
        "template": _tile(flame.template.numpy()[None])[:, 0],
        "basis": _tile(rows),
        "factor_of": factor_of.astype(np.int32),
        "joints": flame.joints,
        "joint_dirs": flame.joint_dirs.T,
        "jaw_weights": flame.jaw_weights,
        "landmark_vertices": flame.landmark_vertices.numpy().astype(np.int32),
        "landmark_weights": flame.landmark_weights,
    }
    poses = (pose + part.start for part in (params.HEAD_POSE, params.JAW_POSE))
    parts = [params.TOTAL, start, params.PARTS["shape"], params.SLICES["expression"].start, *poses]
    n = len(flame.jaw_weights)
    sizes = {VERTICES_M.name: n, VERTICES_HALF.name: n, "landmarks": flame.landmark_vertices.shape[1]}
    return _assemble(DECODE, sizes, constants, {"parts": parts}, threads, basis)


def is_custom(proto: onnx.ModelProto) -> bool:
    """Whether a graph has an operator of ours in it."""
    return any(node.domain == DOMAIN for node in proto.graph.node)


def _join(arrays: Any) -> np.ndarray:
    return np.concatenate([np.asarray(array).reshape(-1) for array in arrays])


def _tile(rows: np.ndarray) -> np.ndarray:
    """Rows (K, 3N), all x, all y, all z, as the operator reads them: (tiles, K, 3, TILE), filled up with zeros."""
    planes = rows.reshape(len(rows), 3, -1)
    filled = np.zeros((*planes.shape[:2], -(-planes.shape[2] // TILE) * TILE), rows.dtype)
    filled[..., : planes.shape[2]] = planes
    return filled.reshape(*planes.shape[:2], -1, TILE).transpose(2, 0, 1, 3)


def _assemble(
    model: Model,
    sizes: dict[str, int],
    constants: dict[str, Any],
    attributes: dict[str, Any],
    threads: int,
    precision: str,
) -> onnx.ModelProto:
    """One node, and what is on request; `sizes`: first dimensions of tensors, in which another head may differ."""
    from onnx import helper, numpy_helper

    if threads < 0:
        raise ConfigError(f"threads: expected 0 or more, got {threads}")

    def spell(tensor: Any) -> onnx.ValueInfoProto:
        shape = ["batch", sizes.get(tensor.name, tensor.shape[0]), *tensor.shape[1:]]
        return helper.make_tensor_value_info(tensor.name, ONNX_TYPES[tensor.dtype], shape)

    rounded = [
        helper.make_node("Cast", [VERTICES_M.name], [tensor.name], to=ONNX_TYPES[tensor.dtype])
        for tensor in model.on_request
    ]
    kept = [numpy_helper.from_array(np.ascontiguousarray(array), f"{model.name}.{k}") for k, array in constants.items()]
    node = helper.make_node(
        OPERATORS[model.name],
        [*(t.name for t in model.inputs), *(constant.name for constant in kept)],
        [t.name for t in model.outputs],
        name=f"{model.name}.0",
        domain=DOMAIN,
        threads=threads,
        **attributes,
    )
    inputs, outputs = map(spell, model.inputs), map(spell, model.every_output)
    graph = helper.make_graph([node, *rounded], model.name, [*inputs], [*outputs], kept)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=MAX_IR)
    helper.set_model_props(proto, {"chebface.operators": f"{DOMAIN} {VERSION}", "chebface.precision": precision})
    return proto
