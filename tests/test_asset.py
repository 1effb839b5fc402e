"""The head file: what is written is what is read, and nothing else is read."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import numpy as np
import pytest
from heads_for_tests import make_head

from chebface.errors import AssetError
from chebface.heads import asset


@pytest.fixture(scope="module")
def small():
    return make_head(6)


def rewrite(path, **changes):
    """Change or, with None, remove arrays of a file; the header is a dictionary here."""
    with np.load(path) as archive:
        arrays = dict(archive)
    arrays["header"] = json.loads(arrays["header"].tobytes())
    header = changes.pop("header", {})
    arrays["header"] = {k: v for k, v in (arrays["header"] | header).items() if v is not None}
    arrays |= changes
    arrays["header"] = np.frombuffer(json.dumps(arrays["header"]).encode(), np.uint8)
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


# law


def test_a_head_survives_its_file(small, tmp_path):
    path = asset.save(small, tmp_path / "new" / "folder" / "head.npz")
    read = asset.load(path)
    for field in fields(small):
        mine, theirs = getattr(small, field.name), getattr(read, field.name)
        if isinstance(mine, np.ndarray):
            assert mine.dtype == theirs.dtype
            np.testing.assert_array_equal(mine, theirs)
        elif isinstance(mine, dict):
            assert mine.keys() == theirs.keys()
            assert all(np.array_equal(mine[key], theirs[key]) for key in mine)
        else:
            assert mine == theirs
    assert read.sha256 == small.sha256
    assert [file.name for file in path.parent.iterdir()] == ["head.npz"]


def test_the_header_says_what_the_file_is(small, tmp_path):
    with np.load(asset.save(small, tmp_path / "head.npz")) as archive:
        header = json.loads(archive["header"].tobytes())
    assert header["units"] == {"length": "m", "angle": "rad"}
    assert header["sha256"] == small.sha256
    assert header["regions"] == sorted(asset.REGIONS)
    assert header["licence"] == small.licence


def test_the_digest_is_of_the_arrays(small):
    assert replace(small, name="other", licence="other").sha256 == small.sha256
    moved = small.template.copy()
    moved[0, 0] += 1e-6
    assert replace(small, template=moved).sha256 != small.sha256
    without = {region: mask for region, mask in small.masks.items() if region != "nose"}
    assert replace(small, masks=without).sha256 != small.sha256


def test_a_failed_write_leaves_the_old_file_and_no_other(small, tmp_path, monkeypatch):
    path = asset.save(small, tmp_path / "head.npz")
    before = path.read_bytes()

    def full(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="disk full"):
        asset.save(make_head(6, seed=1), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# error: heads


def changed(head, name):
    """One field made wrong in the way that its name suggests."""
    array = getattr(head, name, None)
    return {
        "template": lambda: {"template": array[:, 0]},
        "faces": lambda: {"faces": array + 1},
        "landmark_triangles": lambda: {"landmark_triangles": array - len(head.faces)},
        "contour_triangles": lambda: {"contour_triangles": array[:78]},
        "uv_faces": lambda: {"uv_faces": array.astype(np.int64)},
        "uv": lambda: {"uv": array.astype(np.float64)},
        "shape_dirs": lambda: {"shape_dirs": array[:299]},
        "expression_dirs": lambda: {"expression_dirs": np.where(np.arange(100)[:, None, None] == 3, np.nan, array)},
        "joint_regressor": lambda: {"joint_regressor": array * np.float32(1.01)},
        "skin_weights": lambda: {"skin_weights": array * np.float32(0.9)},
        "masks": lambda: {"masks": {"nose": np.ones(3, bool)}},
        "texture_mean": lambda: {"texture_mean": array[:-1]},
    }[name]()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("template", "two-dimensional"),
        ("faces", "faces points outside template"),
        ("landmark_triangles", "landmark_triangles points outside faces"),
        ("contour_triangles", r"contour_triangles: expected \(79, 17\) int32, got \(78, 17\)"),
        ("uv_faces", "uv_faces: expected .* int32, got .* int64"),
        ("uv", "uv: expected .* float32"),
        ("shape_dirs", r"shape_dirs: expected \(300, "),
        ("expression_dirs", "expression_dirs has values that are not finite"),
        ("joint_regressor", "rows of joint_regressor must sum to 1"),
        ("skin_weights", "rows of skin_weights must sum to 1"),
        ("masks", "mask nose: expected"),
        ("texture_mean", "texture_mean: expected"),
    ],
)
def test_a_head_that_does_not_fit_together_is_refused(small, name, message):
    with pytest.raises(AssetError, match=message):
        replace(small, **changed(small, name))


# error: files


def test_a_missing_file_names_the_command_that_makes_one(tmp_path):
    with pytest.raises(AssetError, match="chebface head build"):
        asset.load(tmp_path / "no.npz")


@pytest.mark.parametrize("kind", ["empty", "text", "truncated", "no header", "pickled"])
def test_a_file_that_is_not_whole_is_refused(small, tmp_path, kind):
    path = asset.save(small, tmp_path / "head.npz")
    whole = path.read_bytes()
    if kind == "no header":
        np.savez(path, template=small.template)
    elif kind == "pickled":
        np.savez(path, header=np.array({"a": 1}, dtype=object))
    else:
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
        path.write_bytes(
            {"empty": b"", "text": b"v 0 0 0\n" * 50, "truncated": whole[:middle], "flipped": flipped}[kind]
        )
    with pytest.raises(AssetError, match="head file"):
        asset.load(path)


def test_a_damaged_byte_is_an_asset_error_or_harmless(tmp_path):
    head = make_head(4)
    path = asset.save(head, tmp_path / "head.npz")
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for place in rng.integers(len(whole), size=300):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        try:
            assert asset.load(path).sha256 == head.sha256
        except AssetError:
            refused += 1
    assert refused > 250


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"header": {"format": 2}}, "format 2, wanted 1"),
        ({"header": {"licence": None}}, "parts are not those of a head"),
        ({"uv": None}, "parts are not those of a head"),
        ({"extra": np.zeros(3, np.float32)}, "parts are not those of a head"),
        ({"header": {"sha256": "0" * 64}}, "differ from the recorded sha256"),
        ({"mask_nose": None}, "differ from the recorded sha256"),
        ({"faces": np.zeros((3, 3), np.int32)}, "uv_faces: expected"),
    ],
)
def test_a_file_that_was_changed_is_refused(small, tmp_path, changes, message):
    path = asset.save(small, tmp_path / "head.npz")
    rewrite(path, **changes)
    with pytest.raises(AssetError, match=message):
        asset.load(path)
