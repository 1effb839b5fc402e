"""The latency bench: whole records, honest checks, and errors that say what to do; no real export."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from heads_for_tests import make_head

from bench import latency, record
from chebface import checkpoint, params
from chebface.errors import ChebfaceError, ConfigError, MissingDependencyError
from chebface.flame import Flame
from chebface.signature import DECODE, RECONSTRUCT

WANTED = {
    *("bench", "case", "what", "pass", "batch", "threads", "implementation", "median_ms", "p99_ms", "rival", "ratio"),
    *("check", "commit", "machine", "date"),
}


@pytest.fixture(scope="module")
def small():
    return make_head(8)


@pytest.fixture
def course(small, tmp_path):
    return latency._Course(tmp_path, tmp_path, small, (2,), 1, 0)


def exact(head, name="exact"):
    flame = Flame(head)
    return lambda given: flame.decode(torch.from_numpy(given))[0].numpy()


def judge(wanted, limits=latency.FLOAT_MM):
    return lambda name, found: latency._check_mm(name, found, wanted, limits)


def test_smplx_computes_our_head(course, small):
    given = latency._draw(2)
    found = latency._open_smplx(course, 2)(torch.from_numpy(given))
    checked = latency._check_mm("smplx", found, exact(small)(given), latency.SMPLX_MM)
    assert checked["passed"]
    assert checked["largest_error"] >= checked["error"] > 0


def test_a_race_writes_whole_records(course, small):
    given = latency._draw(2)
    run = exact(small)
    wanted = run(given)
    rows = list(
        course.race(
            DECODE, len(given), given, ("slow", run, judge(wanted)), [("quick", run, judge(wanted))], weights="x"
        )
    )
    assert [row["implementation"] for row in rows] == ["quick"]
    assert rows[0].keys() >= WANTED
    assert (rows[0]["bench"], rows[0]["case"], rows[0]["rival"]) == ("latency", "decode", "slow")
    assert (rows[0]["batch"], rows[0]["threads"], rows[0]["weights"]) == (2, 1, "x")
    assert rows[0]["check"] == {
        **{"error": 0.0, "limit": 0.001, "passed": True, "unit": "mm"},
        **{"largest_error": 0.0, "largest_limit": 0.01},
    }


@pytest.mark.parametrize("wrong", ["ours", "rival"])
def test_what_computes_another_face_is_not_timed(course, small, wrong, monkeypatch):
    monkeypatch.setattr(latency, "_race_in_turns", lambda *_, **__: pytest.fail("it was timed"))
    given = latency._draw(2)
    run = exact(small)
    right = judge(run(given))

    def moved(array):
        return run(array) + 1e-5  # a hundredth of a millimetre

    sides = (run, moved) if wrong == "ours" else (moved, run)
    with pytest.raises(record.DisagreesError, match=r"decode, batch 2: it-\w+: mean, mm: error 0.017"):
        list(course.race(DECODE, len(given), given, ("it-rival", sides[0], right), [("it-ours", sides[1], right)]))


def test_one_vertex_far_away_is_seen():
    wanted = np.zeros((1, 5023, 3), np.float32)
    found = wanted.copy()
    found[0, 7] = 1e-3
    with pytest.raises(record.DisagreesError, match=r"x: largest, mm: error 1\.73"):
        latency._check_mm("x", found, wanted, latency.FLOAT_MM)


def test_descriptors_are_judged_by_their_size():
    wanted = np.full((1, 8), 4, np.float32)
    assert latency._check_code("x", wanted * (1 + 1e-6), wanted)["passed"]
    with pytest.raises(record.DisagreesError, match="x: descriptor"):
        latency._check_code("x", wanted * (1 + 1e-4), wanted)


def test_drawn_parameters_are_dense():
    assert latency._draw(3).shape == (3, params.TOTAL)
    assert latency._draw(3).all()


@pytest.mark.parametrize(
    ("code", "kind"),
    [(3, record.DisagreesError), (4, MissingDependencyError), (1, ChebfaceError), (130, ChebfaceError)],
)
def test_a_failed_export_says_why(course, monkeypatch, code, kind):
    said = json.dumps({"ok": False, "error": "X", "message": "int8 differs from torch"})
    monkeypatch.setattr(latency.subprocess, "run", lambda c, **_: subprocess.CompletedProcess(c, code, said, ""))
    with pytest.raises(kind, match="export --precision int8: int8 differs") as caught:
        course.export("--precision", "int8")
    assert type(caught.value) is kind


def test_an_export_that_breaks_shows_its_last_words(course, monkeypatch):
    monkeypatch.setattr(latency.subprocess, "run", lambda c, **_: subprocess.CompletedProcess(c, 1, "", "Traceback: x"))
    with pytest.raises(ChebfaceError, match="Traceback: x"):
        course.export()


def test_an_export_is_a_folder_by_its_options(course, monkeypatch):
    seen = []
    monkeypatch.setattr(
        latency.subprocess, "run", lambda c, **_: seen.append(c) or subprocess.CompletedProcess(c, 0, "", "")
    )
    folder = course.export("--checkpoint", "/a/light.safetensors", "--precision", "int8")
    assert folder == course.work / "export-checkpoint-light-precision-int8"
    assert seen[0][1:4] == ["-m", "export", "onnx"]
    assert seen[0][-3:] == ["-o", str(folder), "--json"]


def test_a_network_of_random_weights_tells_faces_apart(tmp_path, head):
    model = latency._make_regressor("light", head, tmp_path / "light.safetensors")
    loaded, card = checkpoint.load_regressor(tmp_path / "light.safetensors")
    checkpoint.check_head(card, head)
    crops = latency.normalize_crop(torch.from_numpy(latency._paint(head, range(20, 24))))
    with torch.no_grad():
        found = model(crops)
        torch.testing.assert_close(loaded(crops), found)
    assert 0.05 < found[:, params.SLICES["shape"]].std(0).mean() < 1


def test_threads_are_given_back(monkeypatch):
    monkeypatch.setenv("CHEBFACE_THREADS", "7")
    before = torch.get_num_threads()
    with latency._use_threads(1):
        assert (torch.get_num_threads(), os.environ["CHEBFACE_THREADS"]) == (1, "1")
    assert (torch.get_num_threads(), os.environ["CHEBFACE_THREADS"]) == (before, "7")
    monkeypatch.delenv("CHEBFACE_THREADS")
    with latency._use_threads(1):
        pass
    assert "CHEBFACE_THREADS" not in os.environ


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"cases": ["sleep"]}, "case: expected some of reconstruct, decode, encode, got sleep"),
        ({"backbones": ("vgg",)}, "backbone: expected some of .*, got vgg"),
        ({"batches": [4, 0]}, "batch: expected 1 at least, got 0"),
        ({"batches": []}, "batch: expected 1 at least, got 0"),
        ({"threads": 0}, "threads: expected 1 at least, got 0"),
    ],
)
def test_wishes_that_cannot_be_had(wish, said):
    with pytest.raises(ConfigError, match=said):
        latency.measure(0, **wish)


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(latency.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="onnxruntime is not installed: pip install"):
        latency.measure(0)


def test_cases_are_models_of_the_signature():
    assert latency.CASES[0] == RECONSTRUCT.name
    assert set(latency._RUNS) == set(latency.CASES[1:])
    assert Path(latency._ROOT, "export").is_dir()
