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


@pytest.fixture(autouse=True)
def one_thread():
    with record.one_thread():
        yield


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


def test_a_fitted_network_tells_faces_apart_and_is_kept(tmp_path, head, monkeypatch):
    monkeypatch.setattr(latency, "_FITTED", 16)
    monkeypatch.setattr(latency, "_RIDGE", 1.0)
    path = tmp_path / "light.safetensors"
    model = latency._make_regressor("light", head, path)
    loaded, card = checkpoint.load_regressor(path)
    checkpoint.check_head(card, head)
    samples = latency.Painter(head, latency.Synthesize(seed=latency._SEED + 1)).paint(range(16, 32))  # its own
    crops = latency.normalize_crop(torch.from_numpy(np.stack([sample.aligned_u8 for sample in samples])))
    with torch.no_grad():
        found = model(crops).numpy()
        np.testing.assert_array_equal(loaded(crops).numpy(), found)
    truth = np.stack([sample.parameters for sample in samples])[:, params.SLICES["shape"]]
    error, spread = (np.square(truth - each).sum() for each in (found[:, params.SLICES["shape"]], truth.mean(0)))
    assert error < 0.9 * spread, "it was fitted"
    slopes = [m.weight for m in model.modules() if isinstance(m, torch.nn.PReLU)]
    assert len({slope.unique().numel() for slope in slopes} - {1}) > 1, "no runtime may take them for one number"
    written = path.stat().st_mtime_ns
    latency._make_regressor("light", head, path)
    assert path.stat().st_mtime_ns == written
    monkeypatch.setattr(latency, "FITTED", "otherwise")
    latency._make_regressor("light", head, path)
    assert checkpoint.load(path)[1]["training"]["weights"] == "otherwise", "weights of another recipe are not taken"


def test_the_rival_has_the_networks_of_3ddfa(course, monkeypatch):
    assert sum(each.numel() for each in latency._MobileNet().parameters()) == pytest.approx(3.27e6, rel=2e-3), "its own"
    monkeypatch.setattr(latency, "_DDFA_POINTS", 50)
    rivals = latency._open_3ddfa(course)
    assert [name for name, *_ in rivals] == [latency.DDFA, latency.QUIET]
    for name, run, judge in rivals:
        assert "random weights" in name
        found = run(np.zeros((2, 112, 112, 3), np.uint8))
        assert found.shape == (2, 3, 50)
        assert judge("x", found)["passed"]
        with pytest.raises(record.DisagreesError, match="x: error"):
            judge("x", found * 1.01)


@pytest.mark.parametrize(("backbone", "rivals"), [("light", 2), ("iresnet50", 1)])
def test_reconstruct_pairs_precisions_runtimes_and_rivals(course, small, monkeypatch, backbone, rivals):
    demo = checkpoint.load_regressor()[0]
    flame = Flame(small)

    def regress(crops):
        with torch.no_grad():
            return demo(latency.normalize_crop(torch.from_numpy(crops))).numpy()

    def opened(path, given, wanted, *_, **__):  # as if the files computed what torch does
        decode = [latency.VERTICES_M, latency.PARAMETERS].index(wanted) == 0
        first = regress if given == latency.CROP else np.asarray
        return lambda x: exact(small)(first(x)) if decode else first(x)

    course = latency._Course(course.work, course.folder, small, (1,), 1, 0)
    monkeypatch.setattr(latency, "_race_in_turns", lambda *_, **__: ([1.0], [2.0]))
    monkeypatch.setattr(latency._Course, "export", lambda self, *options: Path("-".join(options)))
    monkeypatch.setattr(latency, "_make_regressor", lambda *_: demo)
    monkeypatch.setattr(latency, "_open_runtimes", lambda *a: [("onnxruntime", opened(*a)), ("openvino", opened(*a))])
    monkeypatch.setattr(latency, "_open_onnxruntime", opened)
    monkeypatch.setattr(latency, "_open_3ddfa", lambda _: [("3ddfa", lambda x: x, lambda *_: {})])
    monkeypatch.setattr(latency, "_paint", lambda *_: np.full((2, 112, 112, 3), [[[[9]]], [[[200]]]], np.uint8))
    rows = list(latency._reconstruct(course, backbone))
    plain = [f"{runtime}-{precision}" for precision in ("fp32", "int8") for runtime in ("onnxruntime", "openvino")]
    assert {row["implementation"] for row in rows} == {*plain, *(f"{each} + custom-op-fixed" for each in plain)}
    assert len(rows) == 8 * rivals
    assert {row["rival"] for row in rows} == {"torch + smplx", "3ddfa"} if rivals == 2 else {"torch + smplx"}
    limits = {row["implementation"]: row["check"]["limit"] for row in rows}
    assert limits["onnxruntime-fp32"] == latency.FLOAT_MM[0]
    assert limits["onnxruntime-fp32 + custom-op-fixed"] == latency.FIXED_MM[0]
    assert limits["openvino-int8 + custom-op-fixed"] == limits["openvino-int8"] == latency.INT8_MM[0]
    assert {row["weights"] for row in rows} == {"demo" if backbone == "light" else latency.FITTED}
    spread = rows[0]["spread_mm"]
    crops = latency._paint()
    answers = flame.decode(torch.from_numpy(regress(crops)))[0].detach().numpy()
    assert spread == pytest.approx(1e3 * np.linalg.norm(answers - answers.mean(0), axis=-1).mean(), abs=1e-3)
    assert spread > 0


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
