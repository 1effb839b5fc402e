"""Small things that stand in for the real network, head and model files where those are not the point."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from chebface import backend, params, signature
from chebface.heads.asset import CONTOUR_STEPS, REGIONS, Head
from chebface.signature import DECODE, LEAVES, RECONSTRUCT, REGRESS, SERVED, TOPOLOGY, Model
from export.repository import config_text

TYPES = {
    "FP32": TensorProto.FLOAT,
    "FP16": TensorProto.FLOAT16,
    "UINT8": TensorProto.UINT8,
    "INT32": TensorProto.INT32,
    "BYTES": TensorProto.STRING,
}
FACTS = {"name": "stand-in", "version": "0", "licence": "CC0-1.0", "sha256": "0" * 64}


def scatter_head(seed: int = 0) -> Head:
    """A head of the served size whose arrays are random: right in form, no face."""
    rng = np.random.default_rng(seed)
    n, m = signature.VERTICES, signature.FACES

    def floats(*shape: int, size: float = 1.0) -> np.ndarray:
        return (size * rng.normal(size=shape)).astype(np.float32)

    def shares(*shape: int) -> np.ndarray:
        array = rng.random(shape)
        return (array / array.sum(-1, keepdims=True)).astype(np.float32)

    def indices(limit: int, *shape: int) -> np.ndarray:
        return rng.integers(0, limit, shape).astype(np.int32)

    return Head(
        name="scatter",
        version="0",
        licence="CC0-1.0",
        source="tests",
        template=floats(n, 3, size=0.1),
        faces=indices(n, m, 3),
        shape_dirs=floats(params.PARTS["shape"], n, 3, size=1e-3),
        expression_dirs=floats(params.PARTS["expression"], n, 3, size=1e-3),
        pose_dirs=floats(36, n, 3, size=1e-3),
        joint_regressor=shares(5, n),
        skin_weights=shares(n, 5),
        landmark_triangles=indices(m, 68),
        landmark_barycentric=shares(68, 3),
        contour_triangles=indices(m, CONTOUR_STEPS, 17),
        contour_barycentric=shares(CONTOUR_STEPS, 17, 3),
        uv=rng.random((n, 2), np.float32),
        uv_faces=indices(n, m, 3),
        texture_mean=rng.random((n, 3), np.float32),
        texture_dirs=floats(params.PARTS["texture"], n, 3, size=0.01),
        masks={region: rng.random(n) < 0.1 for region in REGIONS},
    )


def _constant(name: str, array: np.ndarray) -> onnx.TensorProto:
    return numpy_helper.from_array(array, name)


def stand_in(model: Model) -> onnx.ModelProto:
    """A small graph with the inputs and outputs of a leaf: linear, so that answers can be computed by hand."""
    rng = np.random.default_rng(1)
    if model is RECONSTRUCT:
        first, second = stand_in(REGRESS), stand_in(DECODE)
        for proto, prefix in ((first, "regress."), (second, "decode.")):
            names = {constant.name: prefix + constant.name for constant in proto.graph.initializer}
            for constant in proto.graph.initializer:
                constant.name = names[constant.name]
            for node in proto.graph.node:
                node.input[:] = [names.get(name, name) for name in node.input]
        nodes = [*first.graph.node, *second.graph.node]
        constants = [*first.graph.initializer, *second.graph.initializer]
    elif model is REGRESS:  # the crop's mean colour times a matrix
        nodes = [
            helper.make_node("Cast", ["crop"], ["colours"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["colours", "axes"], ["mean"], keepdims=0),
            helper.make_node("MatMul", ["mean", "weights"], ["parameters"]),
        ]
        weights = (rng.normal(size=(3, params.TOTAL)) / 255).astype(np.float32)
        constants = [_constant("axes", np.array([1, 2])), _constant("weights", weights)]
    elif model is DECODE:
        nodes = [
            helper.make_node("MatMul", ["parameters", "weights"], ["flat"]),
            helper.make_node("Reshape", ["flat", "shape"], ["vertices"]),
            helper.make_node("Slice", ["vertices", "first", "last", "axis"], ["landmarks"]),
            helper.make_node("Cast", ["vertices"], ["vertices_half"], to=TensorProto.FLOAT16),
        ]
        weights = (rng.normal(size=(params.TOTAL, 3 * signature.VERTICES)) * 1e-3).astype(np.float32)
        constants = [
            _constant("weights", weights),
            _constant("shape", np.array([-1, signature.VERTICES, 3])),
            _constant("first", np.array([0])),
            _constant("last", np.array([signature.LANDMARKS])),
            _constant("axis", np.array([1])),
        ]
    else:
        nodes = [helper.make_node("Identity", [f"{t.name}_"], [t.name]) for t in TOPOLOGY.outputs]
        triangles = rng.integers(0, signature.VERTICES, (signature.FACES, 3)).astype(np.int32)
        constants = [_constant("faces_", triangles), _constant("head_", np.array([json.dumps(FACTS)], object))]
    lead = ["batch"] if model.batched else []
    graph = helper.make_graph(
        nodes,
        model.name,
        [helper.make_tensor_value_info(t.name, TYPES[t.dtype], [*lead, *t.shape]) for t in model.inputs],
        [helper.make_tensor_value_info(t.name, TYPES[t.dtype], [*lead, *t.shape]) for t in model.every_output],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def write_repository(folder: Path, instances: int | None = 1) -> Path:
    """A whole model repository of stand-ins, quick to start; without `instances`, as many as an export has."""
    for name, model in SERVED.items():
        version = folder / name / "1"
        version.mkdir(parents=True)
        (folder / name / "config.pbtxt").write_text(
            config_text(model, instances=instances, detector_opened="at the first photo")
        )
        if name in LEAVES:
            onnx.save(stand_in(model), version / "model.onnx")
    return folder


@contextmanager
def python_backend() -> Iterator[None]:
    """Servers that start in it have the network in Triton's Python backend, in processes that can be stopped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "find_files", lambda: None)
        yield
