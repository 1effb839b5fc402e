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

BASES = ("fp32", "fixed")
FINE = "fine"  # attribute of a Decode whose basis is in fixed point: how many of its rows have 16 bits
ROUNDING_M = 5e-6  # what the rows of 8 bits may add to a fixed basis: root mean square over vertices, of a common face
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
        basis: how the basis is stored, "fp32" or "fixed": fixed point of 16 bits, and of 8 in the rows that lose least
            by it (together ROUNDING_M). Two fifths of the file and of the time at batch 1, where reading the basis is
            what takes time, for an error of a hundredth of a millimetre.
        threads: that one call may use; 0 leaves it to $CHEBFACE_THREADS where it is served, else 1.

    Raises:
        ConfigError: no such basis, or threads below 0.
    """
    if basis not in BASES:
        raise ConfigError(f"basis: expected one of {', '.join(BASES)}, got {basis!r}")
    rows = flame.basis.numpy()
    stored: dict[str, Any] = {"basis": _tile(rows), "factor_of": np.arange(len(rows)), "scale": np.ones(len(rows))}
    fixed: dict[str, Any] = {}
    if basis == "fixed":
        stored, fixed = _fix(rows)
    start, pose = params.SLICES["shape"].start, params.SLICES["pose"].start
    constants = {
        "template": _tile(flame.template.numpy()[None])[:, 0],
        "basis": stored["basis"],
        "factor_of": stored["factor_of"].astype(np.int32),
        "scale": stored["scale"].astype(np.float32),
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
    return _assemble(DECODE, sizes, constants, {"parts": parts} | fixed, threads, basis)


def basis_of(proto: onnx.ModelProto) -> str:
    """How a graph stores the head's basis; those of standard operators have it in float32."""
    fixed = any(attribute.name == FINE for node in proto.graph.node for attribute in node.attribute)
    return BASES[1] if fixed else BASES[0]


def is_custom(proto: onnx.ModelProto) -> bool:
    """Whether a graph has an operator of ours in it."""
    return any(node.domain == DOMAIN for node in proto.graph.node)


def _join(arrays: Any) -> np.ndarray:
    return np.concatenate([np.asarray(array).reshape(-1) for array in arrays])


def _tile(rows: np.ndarray) -> np.ndarray:
    """Rows (K, 3N), all x, all y, all z, as the operator reads them: (tiles, K, 3, TILE), filled up with zeros."""
    count, vertices = len(rows), rows.shape[1] // 3
    filled = np.pad(rows.reshape(count, 3, vertices), ((0, 0), (0, 0), (0, -vertices % TILE)))
    return filled.reshape(count, 3, filled.shape[2] // TILE, TILE).transpose(2, 0, 1, 3)


def _fix(rows: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A basis (K, 3N) in fixed point: what the operator reads of it, and its attribute.

    A coefficient of an ordinary face is about one, so that a row's loss is its error alone. Rows of similar size lie
    together, for their coefficients are rounded together; rows that are nothing are left out.
    """
    most = np.abs(rows).max(1)
    used = np.flatnonzero(most)
    used = used[np.argsort(-most[used], kind="stable")]
    scale = {bits: most / (2 ** (bits - 1) - 1) for bits in (16, 8)}
    whole = {bits: np.rint(rows[used] / scale[bits][used, None]) for bits in scale}
    lost = 3 * np.square(rows[used] - whole[8] * scale[8][used, None]).mean(1)
    least = np.argsort(lost, kind="stable")
    coarse = np.zeros(len(used), bool)
    coarse[least[np.cumsum(lost[least]) <= ROUNDING_M**2]] = True
    parts, order, scales = [], [], []
    for bits, chosen in ((16, ~coarse), (8, coarse)):
        filler = chosen.sum() % 2
        tiles = _tile(np.pad(whole[bits][chosen].astype(f"<i{bits // 8}"), ((0, filler), (0, 0))))
        pairs = tiles.reshape(len(tiles), tiles.shape[1] // 2, 2, 3, TILE).transpose(0, 1, 3, 4, 2)
        parts.append(np.ascontiguousarray(pairs).view(np.int8).reshape(len(tiles), pairs[0].nbytes))
        order.append(np.pad(used[chosen], (0, filler)))
        scales.append(np.pad(scale[bits][used[chosen]], (0, filler)))
    stored = {"basis": np.hstack(parts), "factor_of": np.hstack(order), "scale": np.hstack(scales)}
    return stored, {FINE: [len(order[0])]}


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
