"""Arrays come out of pickles as they went in; nothing else comes out, and nothing runs."""

from __future__ import annotations

import functools
import io
import os
import pickle
import struct
import sys
import types

import numpy as np
import pytest

from chebface.errors import AssetError, UnsafeFileError
from chebface.heads import unpickle

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def read(value, tmp_path, protocol=2):
    path = tmp_path / "file.pkl"
    path.write_bytes(value if isinstance(value, bytes) else pickle.dumps(value, protocol=protocol))
    return unpickle.read_named(path)


def assert_same(got, want):
    assert isinstance(got, np.ndarray)
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got, want)


# oracle


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_arrays_of_every_protocol(tmp_path, protocol):
    rng = np.random.default_rng(0)
    wanted = {
        "floats": rng.normal(size=(3, 5, 2)),
        "by_column": np.asfortranarray(rng.normal(size=(4, 3)).astype(np.float32)),
        "slice": rng.normal(size=(6, 6))[1::2, ::3],
        "big_endian": np.arange(5, dtype=">i2"),
        "indices": np.arange(12, dtype=np.uint32).reshape(3, 4),
        "flags": np.array([True, False]),
        "text": np.array(["nose", "lips"]),
        "empty": np.zeros((0, 3)),
        "zero_dimensional": np.array(3.5),
    }
    got = read(wanted | {"scalar": np.float32(2.5), "name": "lbs", "rows": [np.arange(2)]}, tmp_path, protocol)
    for key, array in wanted.items():
        assert_same(got[key], array)
    assert got["scalar"] == np.float32(2.5)
    assert got["name"] == "lbs"
    assert_same(got["rows"][0], np.arange(2))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("kind", ["csc_matrix", "csr_matrix"])
def test_sparse_matrices_come_out_dense(tmp_path, protocol, kind):
    sparse = pytest.importorskip("scipy.sparse")
    dense = np.random.default_rng(1).normal(size=(5, 9)) * (np.random.default_rng(2).random((5, 9)) < 0.3)
    got = read({"J_regressor": getattr(sparse, kind)(dense)}, tmp_path, protocol)["J_regressor"]
    np.testing.assert_array_equal(got, dense)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_chumpy_arrays_come_out_without_chumpy(tmp_path, monkeypatch, protocol):
    class Ch:
        pass

    Ch.__module__, Ch.__qualname__ = "chumpy.ch", "Ch"
    module = types.ModuleType("chumpy.ch")
    module.Ch = Ch
    wrapped = Ch()
    wrapped.x = np.random.default_rng(0).normal(size=(4, 3))
    wrapped._dirty_vars, wrapped._itr = {"x"}, None
    wrapped._depends_on_deps = {"v": {"deps": ("x",), "value": None, "out_of_date": True}}
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "chumpy", types.ModuleType("chumpy"))
        patch.setitem(sys.modules, "chumpy.ch", module)
        data = pickle.dumps({"v_template": wrapped}, protocol=protocol)
    assert_same(read(data, tmp_path)["v_template"], wrapped.x)
    assert "chumpy" not in sys.modules


def test_python_2_pickles(tmp_path):
    """Byte for byte what Python 2 wrote: names and array bytes are both plain strings, here with a byte over 127."""
    array = np.array([1.5, -2.25e-300])
    raw = array.tobytes()
    assert max(raw) > 127

    def text(value):
        return b"U" + bytes([len(value)]) + value

    data = (
        b"\x80\x02}"
        + text(b"x")
        + b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85"
        + text(b"b")
        + b"\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\n" + text(b"f8") + b"K\x00K\x01\x87R(K\x03" + text(b"<") + b"NNN"
        b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89" + text(raw) + b"tbs."
    )
    assert_same(read(data, tmp_path)["x"], array)
    np.testing.assert_array_equal(pickle.loads(data, encoding="latin1")["x"], array)


def test_npz_and_npy_members_may_be_pickled(tmp_path):
    inner = {"lmk_face_idx": [np.arange(3), np.arange(3) + 1], "lmk_b_coords": np.ones((2, 3))}
    np.save(tmp_path / "contour.npy", np.array(inner, dtype=object), allow_pickle=True)
    got = unpickle.read_named(tmp_path / "contour.npy")
    assert_same(got["lmk_face_idx"][1], np.arange(3) + 1)
    np.savez(tmp_path / "all.npz", plain=np.arange(4), held=np.array(inner, dtype=object), three=np.zeros((2, 0)))
    got = unpickle.read_named(tmp_path / "all.npz")
    assert_same(got["plain"], np.arange(4))
    assert_same(got["held"]["lmk_b_coords"], np.ones((2, 3)))
    assert got["three"].shape == (2, 0)


def test_torch_tensors_of_decas_landmark_file(tmp_path):
    torch = pytest.importorskip("torch")
    wanted = {
        "dynamic_lmk_faces_idx": torch.arange(12).reshape(3, 4)[1:],
        "dynamic_lmk_bary_coords": torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0)),
        "double": torch.ones(2, dtype=torch.float64),
    }
    np.save(tmp_path / "landmarks.npy", np.array(wanted, dtype=object), allow_pickle=True)
    got = unpickle.read_named(tmp_path / "landmarks.npy")
    for key, tensor in wanted.items():
        assert_same(got[key], tensor.numpy())


@pytest.mark.parametrize(
    "name",
    ["FLAME_masks.pkl", "flame_static_embedding_68.pkl", "flame_dynamic_embedding.npy", "landmark_embedding.npy"],
)
def test_the_published_files(assets, name):
    path = assets / "flame_topology" / name
    got = unpickle.read_named(path)
    with np.load(path.with_suffix(".npz")) as copy:
        assert set(copy.files) == set(got)
        for key in copy.files:
            np.testing.assert_array_equal(np.array(got[key]), copy[key])


# error


class Asks:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("asks", "name"),
    [
        (Asks(os.system, "touch hurt"), "system"),
        (Asks(eval, "open('hurt', 'w')"), "eval"),
        (Asks(getattr, "x", "upper"), "getattr"),
        (Asks(functools.partial, print), "functools.partial"),
        (Asks(np.load, "hurt.npy"), "numpy.load"),
        (Asks(np.memmap, "hurt", "u1", "w+", 0, (3,)), "memmap"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_other_names_are_refused_and_do_not_run(tmp_path, monkeypatch, asks, name, protocol):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnsafeFileError, match=name):
        read({"x": asks}, tmp_path, protocol)
    assert not (tmp_path / "hurt").exists()


def test_other_names_are_refused_inside_npy_npz_and_torch_bytes(tmp_path):
    bad = pickle.dumps(Asks(os.system, "touch hurt"))
    np.save(tmp_path / "a.npy", np.array({"x": Asks(os.system, "touch hurt")}, dtype=object), allow_pickle=True)
    np.savez(tmp_path / "a.npz", x=np.array([Asks(os.system, "touch hurt")], dtype=object))
    for name in ("a.npy", "a.npz"):
        with pytest.raises(UnsafeFileError, match=rf"{name}: .*system"):
            unpickle.read_named(tmp_path / name)
    with pytest.raises(UnsafeFileError, match="system"):
        read(b"\x80\x03ctorch.storage\n_load_from_bytes\nB" + struct.pack("<I", len(bad)) + bad + b"\x85R.", tmp_path)


def test_a_pickle_cannot_change_what_reads_it(tmp_path):
    """BUILD on an allowed name itself, not on a thing made by it."""
    assert set(unpickle._ALLOWED.values()) - {set} == {
        kind for kind in unpickle._ALLOWED.values() if "__setstate__" in dir(kind)
    }
    for full in unpickle._ALLOWED:
        module, name = full.rsplit(".", 1)
        for state in (b"}X\x01\x00\x00\x00aK\x01s", b"N}X\x01\x00\x00\x00aK\x01s\x86"):
            before = {key: dict(vars(kind)) for key, kind in unpickle._ALLOWED.items()}
            with pytest.raises(AssetError):
                read(b"\x80\x02c" + module.encode() + b"\n" + name.encode() + b"\n" + state + b"b.", tmp_path)
            assert {key: dict(vars(kind)) for key, kind in unpickle._ALLOWED.items()} == before


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x06\x00\x00\x00latin1\x86R}b.", "bytes with a state"),
        (b"ctorch.storage\n_load_from_bytes\n(tR}b.", "damaged"),
        (b"cnumpy\ndtype\nX\x02\x00\x00\x00M8\x85R.", "dtype 'M8'"),
        (b"cnumpy.core.multiarray\nscalar\nNN\x86R}b.", "number with a state"),
        (b"ccopy_reg\n_reconstructor\ncnumpy\ndtype\nc__builtin__\nobject\nN\x87R.", "not made this way"),
        (b"Pname\n.", "damaged"),
        (b"X\x01\x00\x00\x00a.", "expected named arrays, got str"),
        (b"", "damaged"),
        (b"v 0 0 0\n", "damaged"),
        (b"PK\x03\x04 and no more", "damaged"),
        (b"\x93NUMPY\x01\x00 and no more", "damaged"),
    ],
)
def test_odd_bytes_are_asset_errors(tmp_path, data, message):
    with pytest.raises(AssetError, match=message):
        read(data, tmp_path)


def test_states_that_do_not_fit_are_asset_errors(tmp_path):
    storage = io.BytesIO()
    for part in ("magic", 1001, {}, None, []):
        storage.write(pickle.dumps(part, protocol=2))
    torch_bytes = storage.getvalue()
    for data in (
        b"\x80\x03ctorch.storage\n_load_from_bytes\nB" + struct.pack("<I", len(torch_bytes)) + torch_bytes + b"\x85R.",
        pickle.dumps({"x": np.arange(9.0)}, protocol=2).replace(b"K\t\x85", b"K\x0a\x85"),  # ten from nine
    ):
        with pytest.raises(AssetError, match="damaged"):
            read(data, tmp_path)


def test_a_transposed_tensor_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    np.save(tmp_path / "t.npy", np.array({"x": torch.zeros(3, 2).T}, dtype=object), allow_pickle=True)
    with pytest.raises(AssetError, match="not contiguous"):
        unpickle.read_named(tmp_path / "t.npy")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(AssetError, match=r"no\.pkl: cannot be read"):
        unpickle.read_named(tmp_path / "no.pkl")


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_damaged_bytes_are_asset_errors_or_harmless(tmp_path, protocol):
    rng = np.random.default_rng(protocol)
    value = {"a": np.arange(4.0), "b": [np.float32(1), "lbs", {1, 2}], "c": np.array({"d": 1}, dtype=object)}
    whole = pickle.dumps(value, protocol=protocol)
    refused = 0
    for place in rng.integers(len(whole), size=400):
        try:
            read(whole[:place] + bytes([whole[place] ^ (1 << rng.integers(8))]) + whole[place + 1 :], tmp_path)
        except AssetError:
            refused += 1
    assert refused > 100
