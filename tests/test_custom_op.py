"""Our kernels inside onnxruntime: what torch gives, at every batch; errors, not crashes; several calls at once."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import itertools
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from heads_for_tests import make_head
from models_for_tests import scatter_head
from onnx import helper, numpy_helper

from chebface import native, operators, params
from chebface.encoder import MeshEncoder
from chebface.errors import ConfigError, MissingDependencyError
from chebface.flame import Flame
from chebface.hierarchy import build
from chebface.signature import DECODE, ENCODE
from export import custom
from export.custom import BASES, decode_custom, encode_custom
from export.graphs import check_graph, decode_graph

pytestmark = pytest.mark.skipif(native.find_compiler() is None, reason="needs a C++ compiler")
BATCHES = (1, 3, 8, 33)
TOLERANCE = {"fp32": 1e-6, "fixed": 5e-5}  # m, of float32 against torch; 0.05 mm is the promise for faces


def open_session(proto):
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(operators.library()))
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def draw(batch, seed=0):
    rng = np.random.default_rng(seed)
    drawn = rng.normal(0, 1, (batch, params.TOTAL)).astype(np.float32)
    drawn[:, params.SLICES["pose"]] *= 0.4
    return drawn


@pytest.fixture(scope="module")
def flame():
    return Flame(make_head(12, seed=3))  # 290 vertices: the last tile is not full


@pytest.fixture(scope="module")
def encoder():
    head = make_head(12, seed=3)
    torch.manual_seed(0)
    made = MeshEncoder(build(head.template, head.faces, (90, 30)), width=(16, 8), K=4, code=5).eval()
    made.set_statistics(head.template, np.full_like(head.template, 2e-3))
    return made


@pytest.fixture(scope="module")
def sessions(flame, encoder):
    return {
        **{basis: open_session(decode_custom(flame, basis)) for basis in BASES},
        "encode": open_session(encode_custom(encoder)),
    }


def draw_meshes(encoder, batch, seed=0):
    rng = np.random.default_rng(seed)
    return (encoder.mean.numpy() + rng.normal(0, 2e-3, (batch, *encoder.mean.shape))).astype(np.float32)


# oracle


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("batch", BATCHES)
def test_decode_is_flame(flame, sessions, basis, batch):
    given = draw(batch, seed=batch)
    found = sessions[basis].run(["vertices", "landmarks"], {"parameters": given})
    for got, want in zip(found, flame.decode(torch.from_numpy(given)), strict=True):
        np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=TOLERANCE[basis])


@pytest.mark.parametrize("batch", BATCHES)
def test_encode_is_the_encoder(encoder, sessions, batch):
    given = draw_meshes(encoder, batch)
    (found,) = sessions["encode"].run(["descriptor"], {"vertices": given})
    wanted = encoder(torch.from_numpy(given)).detach().numpy()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_the_contour_follows_the_head_at_every_degree(flame, sessions):
    given = np.zeros((97, params.TOTAL), np.float32)
    yaw = np.radians(np.arange(-48, 49) + 0.1)  # past the table's ends too; never on the edge between two rows
    given[:, params.SLICES["pose"].start + 1] = yaw
    (found,) = sessions["fp32"].run(["landmarks"], {"parameters": given})
    _, wanted = flame.decode(torch.from_numpy(given))
    np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=TOLERANCE["fp32"])


def test_served_sizes_pass_the_checks_of_every_graph():
    flame = Flame(scatter_head())
    protos = {basis: decode_custom(flame, basis) for basis in BASES}
    for basis, proto in protos.items():
        check_graph(proto, DECODE, basis)
        assert {entry.key: entry.value for entry in proto.metadata_props}["chebface.precision"] == basis
    assert protos["fixed"].ByteSize() < 0.52 * protos["fp32"].ByteSize()
    assert protos["fp32"].SerializeToString() == decode_custom(flame).SerializeToString()
    given = draw(2)
    vertices, _, half = open_session(protos["fp32"]).run(None, {"parameters": given})
    np.testing.assert_allclose(vertices, flame.decode(torch.from_numpy(given))[0].numpy(), rtol=0, atol=1e-6)
    assert np.array_equal(half, vertices.astype(np.float16))


def test_names_are_those_of_the_graphs_of_standard_operators(flame, encoder):
    def names(values):
        return [value.name for value in values]

    ours, theirs = decode_custom(flame).graph, decode_graph(flame).graph
    assert names(ours.input) == names(theirs.input) == [t.name for t in DECODE.inputs]
    assert names(ours.output) == names(theirs.output)
    ours = encode_custom(encoder).graph
    assert (names(ours.input), names(ours.output)) == (
        [t.name for t in ENCODE.inputs],
        [t.name for t in ENCODE.outputs],
    )


@pytest.mark.parametrize("share", [0, 1e-5, 1])
def test_rows_of_a_fixed_basis_fit_their_bits(flame, monkeypatch, share):
    """Whatever has 8 bits: nothing, some rows, all; the error is what rounding costs, not more."""
    monkeypatch.setattr(custom, "ROUNDING_M", share)
    proto = decode_custom(flame, "fixed")
    basis, fine = flame.basis.numpy(), helper.get_node_attr_value(proto.graph.node[0], "fine")[0]
    assert {0: fine == 410, 1: fine == 0}.get(share, 0 < fine < 410)
    assert custom.basis_of(proto) == "fixed" and custom.basis_of(decode_custom(flame)) == "fp32"
    row = {bits: np.abs(basis).max(1) / (2 ** (bits - 1) - 1) / 2 for bits in (16, 8)}
    coarse = np.unique(constant(proto, "factor_of")[fine:])
    lost = np.sqrt(3) * (row[16].sum() + (row[8] - row[16])[coarse].sum())  # of coefficients of one
    given = np.clip(draw(8), -1, 1)
    given[:, params.SLICES["pose"]] = 0
    found, *_ = open_session(proto).run(None, {"parameters": given})
    error = np.linalg.norm(found - flame.decode(torch.from_numpy(given))[0].numpy(), axis=-1).max()
    assert error < 1.1 * lost + 2e-5, (error, lost)


def test_a_head_without_some_rows(flame):
    """Expressions that a head does not have are rows of zeros: not stored, and not missed."""
    head = make_head(12, seed=3)
    dirs = head.expression_dirs.copy()
    dirs[7:] = 0
    bare = Flame(dataclasses.replace(head, expression_dirs=dirs))
    proto, given = decode_custom(bare, "fixed"), draw(3)
    assert len(constant(proto, "factor_of")) < 409 - 90
    found, *_ = open_session(proto).run(None, {"parameters": given})
    np.testing.assert_allclose(found, bare.decode(torch.from_numpy(given))[0].numpy(), rtol=0, atol=TOLERANCE["fixed"])


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86-64 processors")
@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3"])
def test_lesser_processors_decode_the_same(tmp_path, flame, sessions, processor):
    """In a process of its own: onnxruntime keeps the first library that it was given."""
    code = (
        "import sys, numpy as np, onnxruntime as o; from chebface import native, operators;"
        f"native.FLAGS = ('-O1', '-march={processor}', *native.FLAGS[2:]); given = np.load('given.npy')\n"
        "for name in sys.argv[1:]:\n"
        "    s = o.SessionOptions(); s.register_custom_ops_library(str(operators.library()))\n"
        "    np.save(name, o.InferenceSession(name, s).run(None, {'parameters': given})[0])"
    )
    given = draw(5)
    np.save(tmp_path / "given.npy", given)
    for basis in BASES:
        (tmp_path / basis).write_bytes(decode_custom(flame, basis).SerializeToString())
    environment = {**os.environ, "CHEBFACE_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", code, *BASES]
    subprocess.run(command, env=environment, cwd=tmp_path, check=True)
    for basis in BASES:
        wanted, *_ = sessions[basis].run(None, {"parameters": given})
        np.testing.assert_allclose(np.load(tmp_path / f"{basis}.npy"), wanted, rtol=0, atol=1e-6)


# law


def test_faces_of_a_batch_are_independent_and_an_empty_batch_is_empty(flame, sessions):
    given = draw(7)
    given[:, params.SLICES["expression"]] *= np.array([0, 1, 0, 0, 1, 0, 0], np.float32)[:, None]  # rows left unread
    whole, *_ = sessions["fixed"].run(None, {"parameters": given})
    for i, face in enumerate(given):
        alone, *_ = sessions["fixed"].run(None, {"parameters": face[None]})
        np.testing.assert_allclose(alone[0], whole[i], rtol=0, atol=1e-7)
    vertices, landmarks, _ = sessions["fp32"].run(None, {"parameters": given[:0]})
    assert (vertices.shape, landmarks.shape) == ((0, len(flame.jaw_weights), 3), (0, 68, 3))
    (codes,) = sessions["encode"].run(None, {"vertices": np.zeros((0, len(flame.jaw_weights), 3), np.float32)})
    assert codes.shape == (0, 5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_what_is_no_number_stays_with_its_face(flame, encoder, sessions, value):
    given = draw(3)
    given[1] = value
    wanted, _ = flame.decode(torch.from_numpy(given))
    for basis in BASES:
        vertices, landmarks, _ = sessions[basis].run(None, {"parameters": given})
        assert not np.isfinite(vertices[1]).any() and not np.isfinite(landmarks[1]).any()
        np.testing.assert_allclose(vertices[[0, 2]], wanted[[0, 2]].numpy(), rtol=0, atol=TOLERANCE[basis])
    meshes = draw_meshes(encoder, 2)
    (clean,) = sessions["encode"].run(None, {"vertices": meshes})
    meshes[0] = np.nan
    (codes,) = sessions["encode"].run(None, {"vertices": meshes})
    assert np.isnan(codes[0]).all()
    np.testing.assert_array_equal(codes[1], clean[1])


@pytest.mark.parametrize("threads", [1, 3])
def test_runs_at_the_same_time_give_the_same(flame, encoder, threads):
    decode, encode = open_session(decode_custom(flame, threads=threads)), open_session(encode_custom(encoder))
    faces, meshes = [draw(batch, batch) for batch in (1, 5, 40)], [draw_meshes(encoder, batch) for batch in (1, 9)]
    jobs = [*((decode, {"parameters": x}) for x in faces), *((encode, {"vertices": x}) for x in meshes)]
    alone = [session.run(None, feed)[0] for session, feed in jobs]
    order = list(itertools.islice(itertools.cycle(range(len(jobs))), 200))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: jobs[i][0].run(None, jobs[i][1])[0], order))
    for i, got in zip(order, found, strict=True):
        np.testing.assert_array_equal(got, alone[i])


def test_sessions_come_and_go(flame):
    """The library stays when the last session closes: another is made of the same, and threads still sleep in it."""
    proto, given = decode_custom(flame, threads=2), draw(40)
    answers = []
    for _ in range(3):
        session = open_session(proto)
        answers.append(session.run(None, {"parameters": given})[0])
        del session
    np.testing.assert_array_equal(answers[0], answers[2])


# error


def test_bad_arguments():
    with pytest.raises(ConfigError, match="basis: expected one of fp32, fixed, got 'int4'"):
        decode_custom(None, "int4")


def test_threads_below_zero(flame):
    with pytest.raises(ConfigError, match="threads: expected 0 or more, got -1"):
        decode_custom(flame, threads=-1)


def test_no_compiler_says_why(monkeypatch):
    monkeypatch.setenv("CHEBFACE_NATIVE", "0")
    native.forget()
    try:
        with pytest.raises(MissingDependencyError, match="onnxruntime operators: CHEBFACE_NATIVE=0; the graphs of"):
            operators.library()
    finally:
        native.forget()


def test_a_runtime_without_the_library_refuses(flame):
    with pytest.raises(Exception, match="chebface"):
        onnxruntime.InferenceSession(decode_custom(flame).SerializeToString(), providers=["CPUExecutionProvider"])


def loosen(proto):
    """The same graph with inputs of any shape, so that the operator has to look for itself."""
    proto = copy.deepcopy(proto)
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.ClearField("shape")
    return proto


def test_wrong_shapes(flame, encoder, sessions):
    with pytest.raises(Exception, match="invalid dimensions for input: parameters"):
        sessions["fp32"].run(None, {"parameters": np.zeros((2, 5), np.float32)})
    decode, encode = open_session(loosen(decode_custom(flame))), open_session(loosen(encode_custom(encoder)))
    for shape, spelled in (((2, 5), r"\(2, 5\)"), ((486,), r"\(486,\)"), ((1, 486, 1), r"\(1, 486, 1\)")):
        with pytest.raises(Exception, match=rf"chebface::Decode: parameters: expected \(B, 486\), got {spelled}"):
            decode.run(None, {"parameters": np.zeros(shape, np.float32)})
    with pytest.raises(Exception, match=r"chebface::Encode: vertices: expected \(B, 290, 3\), got \(1, 290, 2\)"):
        encode.run(None, {"vertices": np.zeros((1, 290, 2), np.float32)})
    assert decode.run(None, {"parameters": draw(1)})[0].shape == (1, 290, 3)


def change(proto, name, array):
    """The graph with another constant."""
    proto = copy.deepcopy(proto)
    for tensor in proto.graph.initializer:
        if tensor.name.endswith(f".{name}"):
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return proto


def constant(proto, name):
    return next(numpy_helper.to_array(t).copy() for t in proto.graph.initializer if t.name.endswith(f".{name}"))


def set_attribute(proto, name, value):
    proto = copy.deepcopy(proto)
    node = proto.graph.node[0]
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, *([] if value is None else [helper.make_attribute(name, value)])])
    return proto


DECODE_DAMAGE = {
    "template": (lambda a: a[:-1], r"template: expected \(10, 3, 32\), got \(9, 3, 32\)"),
    "basis": (lambda a: a[:, :-1], r"basis: expected \(10, 409, 3, 32\), got \(10, 408, 3, 32\)"),
    "factor_of": (lambda a: a + 1, r"factor_of: expected 0..408, got 409"),
    "scale": (lambda a: a[1:], r"scale: expected \(409,\), got \(408,\)"),
    "joints": (lambda a: a[:3], r"joints: expected \(6,\), got \(3,\)"),
    "joint_dirs": (lambda a: a.T, r"joint_dirs: expected \(6, \?\), got \(400, 6\)"),
    "landmark_vertices": (lambda a: a + 290, r"landmark_vertices: expected 0..289, got"),
    "landmark_weights": (lambda a: a[:5], r"landmark_weights: expected \(79, 68, 3\), got \(5, 68, 3\)"),
}


@pytest.mark.parametrize("name", DECODE_DAMAGE)
def test_damaged_constants_of_decode(flame, name):
    damage, message = DECODE_DAMAGE[name]
    proto = decode_custom(flame)
    with pytest.raises(Exception, match=f"chebface::Decode: {message}"):
        open_session(change(proto, name, damage(constant(proto, name))))


def test_other_damage_of_decode(flame):
    proto = decode_custom(flame)
    with pytest.raises(Exception, match="basis: expected float32"):
        open_session(change(proto, "basis", constant(proto, "basis").astype(np.float64)))
    fixed = decode_custom(flame, "fixed")
    with pytest.raises(Exception, match="basis: expected int8"):
        open_session(change(fixed, "basis", constant(fixed, "basis").astype(np.float32)))
    with pytest.raises(Exception, match=r"basis: expected \(10, \d+\), got \(10, \d+\)"):
        open_session(change(fixed, "basis", constant(fixed, "basis")[:, :-192]))
    for fine in (1, 412):
        with pytest.raises(Exception, match="fine: expected pairs of the 410 rows"):
            open_session(set_attribute(fixed, "fine", [fine]))
    even = change(proto, "landmark_vertices", constant(proto, "landmark_vertices")[:78])
    even = change(even, "landmark_weights", constant(proto, "landmark_weights")[:78])
    with pytest.raises(Exception, match=r"landmark_vertices: expected rows for 0, 1\.\. and -1\.\. degrees"):
        open_session(even)
    with pytest.raises(Exception, match="parts: expected at least 6 sizes"):
        open_session(set_attribute(proto, "parts", [486, 0, 300]))
    with pytest.raises(Exception, match="parts: expected shape, expression, head and jaw within 400"):
        open_session(set_attribute(proto, "parts", [400, 0, 300, 306, 300, 303]))
    with pytest.raises(Exception, match="chebface::Decode: parts: expected at least 6 sizes"):
        open_session(set_attribute(proto, "parts", None))
    given = copy.deepcopy(proto)
    tensor = next(t for t in given.graph.initializer if t.name == "decode.joints")
    given.graph.initializer.remove(tensor)
    given.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    with pytest.raises(Exception, match="joints: expected an initializer of the graph, got a value that may change"):
        open_session(given)


ENCODE_DAMAGE = {
    "mean": (lambda a: a[:-1], "mean: expected"),
    "indptr": (lambda a: a[::-1].copy(), "indptr, indices: expected compressed rows"),
    "indices": (lambda a: a[:-40], "indptr, indices: expected compressed rows"),
    "keep": (lambda a: a[::-1].copy(), "keep: expected rising vertices"),
    "weight": (lambda a: a[:-1], "weight: expected"),
    "bias": (lambda a: a[:-1], "bias: expected"),
    "linear_weight": (lambda a: a[:, :-1].copy(), "linear_weight: expected"),
    "linear_bias": (lambda a: a[:-1], "linear_weight, linear_bias: expected as many rows as numbers"),
}


@pytest.mark.parametrize("name", ENCODE_DAMAGE)
def test_damaged_constants_of_encode(encoder, name):
    damage, message = ENCODE_DAMAGE[name]
    proto = encode_custom(encoder)
    with pytest.raises(Exception, match=f"chebface::Encode: {message}"):
        open_session(change(proto, name, damage(constant(proto, name))))


def test_other_damage_of_encode(encoder):
    proto = encode_custom(encoder)
    with pytest.raises(Exception, match="expected sizes of the same 1 to 15 layers"):
        open_session(set_attribute(proto, "channels", [3, 16]))
    kept = [80, 30]
    with pytest.raises(Exception, match="expected as many vertices as were kept before"):
        open_session(set_attribute(proto, "kept", kept))


def test_threads_of_the_environment(flame, monkeypatch):
    monkeypatch.setenv("CHEBFACE_THREADS", "two")
    with pytest.raises(Exception, match="CHEBFACE_THREADS: expected a number from 1, got 'two'"):
        open_session(decode_custom(flame))
    open_session(decode_custom(flame, threads=1))  # the node says it
    with pytest.raises(Exception, match="threads: expected 0 or more, got -2"):
        open_session(set_attribute(decode_custom(flame), "threads", -2))
    monkeypatch.setenv("CHEBFACE_THREADS", "2")
    given = draw(5)
    found, *_ = open_session(set_attribute(decode_custom(flame), "threads", None)).run(None, {"parameters": given})
    np.testing.assert_allclose(found, flame.decode(torch.from_numpy(given))[0].numpy(), rtol=0, atol=1e-6)


def test_an_old_runtime_is_told_so():
    """A stand-in for onnxruntime 1.15: it has no version 16 of the interface, and keeps the status it is asked for."""
    said = []
    create = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)(
        lambda code, text: said.append((code, text)) or 7
    )
    table = (ctypes.c_void_p * 1)(ctypes.cast(create, ctypes.c_void_p))
    get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(
        lambda version: ctypes.addressof(table) if version <= 15 else 0
    )
    version = ctypes.create_string_buffer(b"1.15.1")
    get_version = ctypes.CFUNCTYPE(ctypes.c_void_p)(lambda: ctypes.addressof(version))
    base = (ctypes.c_void_p * 2)(ctypes.cast(get_api, ctypes.c_void_p), ctypes.cast(get_version, ctypes.c_void_p))
    register = ctypes.CDLL(str(operators.library())).RegisterCustomOps
    register.restype, register.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_void_p]
    assert register(None, ctypes.addressof(base)) == 7
    ((code, text),) = said
    assert code == 9 and b"expected onnxruntime 1.16 or later, got 1.15.1" in text


def test_the_library_needs_no_torch(tmp_path, flame):
    """What a server does: the file and the library, in a process that never sees this package."""
    path = tmp_path / "decode.onnx"
    path.write_bytes(decode_custom(flame).SerializeToString())
    code = (
        "import sys, numpy as np, onnxruntime as o; s = o.SessionOptions(); s.register_custom_ops_library(sys.argv[1]);"
        "found, *_ = o.InferenceSession(sys.argv[2], s).run(None, {'parameters': np.zeros((2, 486), np.float32)});"
        "print(found.shape, 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(operators.library()), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "(2, 290, 3) False"), done.stderr
    assert onnx.load(str(path)).graph.node[0].domain == operators.DOMAIN
