"""The table of formats: what is in it, what is timed, and what is not because it does not compute the same."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from models_for_tests import scatter_head
from test_export import Tiny, draw_crops

from chebface import operators
from chebface.checkpoint import load_encoder
from chebface.encoder import MeshEncoder
from chebface.errors import AssetError, ConfigError, MissingDependencyError
from chebface.flame import Flame
from chebface.heads import Head
from chebface.signature import DECODE, ENCODE, MODELS, RECONSTRUCT, REGRESS, TOPOLOGY
from export import benchmark, cli, engines, to_onnx
from export.benchmark import CASES, race, time_files
from export.folder import read_manifest
from export.parity import ParityError, set_exam
from export.to_onnx import Modules, write_onnx


@pytest.fixture(scope="module")
def scatter() -> Head:
    return scatter_head()


@pytest.fixture(scope="module")
def modules(scatter: Head) -> Modules:
    return Modules(Tiny().eval(), scatter, load_encoder()[0].encoder, {"training": {"head": "scatter"}}, {})


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, modules: Modules) -> dict[str, Path]:
    """The standard export and the one of our operators, once."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_onnx, "make_crops", lambda head, count, seed: (draw_crops(2, seed), "tests"))
        for kind in ("standard", "native"):
            facts = {
                "precision": "fp32",
                "opset": 18,
                "operators": kind,
                "basis": "fp32",
                "onnxslim": "",
                "version": "",
            }
            made[kind] = tmp_path_factory.mktemp(kind)
            write_onnx(made[kind], modules.regressor, modules.head, modules.encoder, facts)
    return made


@pytest.fixture
def shop(monkeypatch: pytest.MonkeyPatch, modules: Modules, exported: dict[str, Path]) -> dict[str, list]:
    """What the benchmark asks of the export, which gives what is there."""
    asked: dict[str, list] = {"wishes": []}

    def export(folder: Path, *, operators: str = "standard", **wishes: object) -> dict:
        asked["wishes"].append({"folder": folder.name, "operators": operators} | wishes)
        folder.mkdir(parents=True, exist_ok=True)
        for path in exported[operators].iterdir():
            if not (folder / path.name).exists():
                (folder / path.name).write_bytes(path.read_bytes())
        return read_manifest(folder) or {}

    monkeypatch.setattr(engines, "gpu_architecture", lambda: None)
    monkeypatch.setattr(benchmark, "export_onnx", export)
    monkeypatch.setattr(benchmark, "open_modules", lambda *names, say: modules)
    monkeypatch.setattr(benchmark, "make_crops", lambda head, count, seed: (draw_crops(min(count, 5), seed), "tests"))
    return asked


def by_format(report: dict) -> dict[str, dict]:
    return {f"{row['format']} {row['precision']}": row for row in report["rows"]}


def test_whole_way_in_every_format(shop: dict[str, list], tmp_path: Path) -> None:
    report = benchmark.benchmark(tmp_path, precisions=["fp32"], batch=2, seconds=0.02, threads=1, opset=19)
    assert json.loads((tmp_path / "benchmark.json").read_text()) == report
    assert (report["model"], report["batch"], report["threads"], report["failed"]) == ("reconstruct", 2, 1, [])
    rows = by_format(report)
    assert list(rows) == [
        f"{name} fp32" for name in ("torch", "onnxruntime", "native operators", "OpenVINO", "TensorRT")
    ]
    timed = [row for row in rows.values() if "ratio" in row]
    assert rows["torch fp32"]["ratio"] == 1
    for row in timed[1:]:
        assert row["p50_ms"] > 0
        assert row["ratio"] == pytest.approx(rows["torch fp32"]["p50_ms"] / row["p50_ms"], abs=0.02)
        assert 0 <= row["mean_mm"] <= 0.001
        assert row["max_mm"] <= 0.01
    assert "ratio" in rows["onnxruntime fp32"]
    assert rows["onnxruntime fp32"]["mb"] == pytest.approx(
        (tmp_path / "fp32/reconstruct.onnx").stat().st_size / 1e6, abs=0.1
    )
    if importlib.util.find_spec("openvino") is None:
        assert rows["OpenVINO fp32"]["note"] == "not run: not installed: pip install openvino"
    assert re.match(r"built with TensorRT-RTX [\d.]+; not run: no GPU here", rows["TensorRT fp32"]["note"])
    assert len(list((tmp_path / "fp32" / "engines").glob("reconstruct.*.plan"))) == 1
    assert {each["folder"] for each in shop["wishes"]} == {"fp32", "native-fp32"}
    assert {each["opset"] for each in shop["wishes"]} == {19}


@pytest.mark.parametrize(("model", "formats"), [("regress", 4), ("decode", 6), ("encode", 5)])
def test_parts_are_measured_alone(shop: dict[str, list], tmp_path: Path, model: str, formats: int) -> None:
    report = benchmark.benchmark(tmp_path, model=model, precisions=["fp32"], seconds=0.01)
    rows = by_format(report)
    assert len(rows) == formats
    assert report["failed"] == []
    row = rows["onnxruntime fp32"]
    assert row["ratio"] > 0
    assert ("descriptor_min_cosine" in row) == (model == "encode") != ("mean_mm" in row)
    if model != "regress":
        assert "ratio" in rows["native operators fp32"]


def test_what_computes_something_else_is_not_timed(
    shop: dict[str, list], tmp_path: Path, exported: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    proto = onnx.load(exported["standard"] / "regress.onnx")
    weight = max(proto.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    array = 1.1 * onnx.numpy_helper.to_array(weight)
    weight.CopyFrom(onnx.numpy_helper.from_array(array.astype(np.float32), weight.name))
    (tmp_path / "fp32").mkdir()
    onnx.save(proto, tmp_path / "fp32" / "regress.onnx")
    good = read_manifest(exported["standard"])
    real = benchmark.export_onnx
    monkeypatch.setattr(benchmark, "export_onnx", lambda folder, **wishes: real(folder, **wishes) or good)
    words = ["benchmark", "--model", "regress", "--precision", "fp32", "--seconds", "0.01", "-o", str(tmp_path)]
    done = CliRunner().invoke(cli.main, [*words, "--json"])
    assert done.exit_code == 3
    report = json.loads(done.stdout)
    row = by_format(report)["onnxruntime fp32"]
    assert re.match(r"not timed: regress mean [\d.]+ mm \(limit 0.001\)", row["note"])
    assert "ratio" not in row
    assert not report["ok"]
    assert "onnxruntime fp32" in report["failed"]
    table = CliRunner().invoke(cli.main, words)
    assert "not timed" in table.stdout
    assert "error: beyond its limits: onnxruntime fp32" in table.stderr


def test_worse_of_two_proofs_is_told(shop: dict[str, list], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = benchmark.export_onnx

    def export(folder: Path, **wishes: object) -> dict:
        manifest = real(folder, **wishes)
        manifest["parity"]["artefacts"]["regress"] = {"mean_mm": 0.0009, "max_mm": 0.0}
        return manifest

    monkeypatch.setattr(benchmark, "export_onnx", export)
    row = by_format(benchmark.benchmark(tmp_path, model="regress", precisions=["fp32"], seconds=0.01))[
        "onnxruntime fp32"
    ]
    assert row["mean_mm"] == 0.0009
    assert row["max_mm"] > 0


@pytest.mark.parametrize(
    ("error", "note", "failed"),
    [
        (ConfigError("opset: 18 at most"), "cannot be had: opset: 18 at most", []),
        (MissingDependencyError("no compiler"), "not run: no compiler", []),
        (ParityError("int8 differs"), "not timed: int8 differs", ["onnxruntime int8"]),
        (RuntimeError("\n\n[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : no Conv(22)"), "not run: ", []),
        (AssetError("x" * 200), f"not run: {'x' * 97}...", []),
    ],
)
def test_a_format_that_cannot_be_had_leaves_the_others(
    shop: dict[str, list], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, note: str, failed: list
) -> None:
    real = benchmark.export_onnx

    def export(folder: Path, **wishes: object) -> dict:
        if wishes.get("precision") == "int8":
            raise error
        return real(folder, **wishes)

    monkeypatch.setattr(benchmark, "export_onnx", export)
    report = benchmark.benchmark(tmp_path, model="regress", precisions=["int8", "fp32"], seconds=0.01)
    rows = by_format(report)
    assert rows["onnxruntime int8"]["note"].startswith(note)
    assert [each for each in report["failed"] if each.startswith("onnxruntime")] == failed
    assert rows["onnxruntime fp32"]["ratio"] > 0


def test_no_compiler_is_a_row(shop: dict[str, list], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Path:
        raise MissingDependencyError("onnxruntime operators: no compiler")

    monkeypatch.setattr(operators, "library", missing)
    rows = by_format(benchmark.benchmark(tmp_path, model="encode", precisions=["fp32"], seconds=0.01))
    assert rows["native operators fp32"]["note"] == "not run: onnxruntime operators: no compiler"


def test_calibration_is_for_int8_alone(shop: dict[str, list], tmp_path: Path) -> None:
    saved = {"ranges": {}, "method": "percentile"}
    benchmark.benchmark(tmp_path, model="regress", precisions=["fp32", "int8"], seconds=0.01, calibration=saved)
    given = {each["precision"]: each.get("calibration") for each in shop["wishes"]}
    assert given == {"fp32": None, "int8": saved}


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"model": "topology"}, "model: expected one of reconstruct, regress, decode, encode, got 'topology'"),
        ({"precisions": ["fp8"]}, r"precision: expected some of fp32, .*, got \['fp8'\]"),
        ({"precisions": []}, "precision: expected some of"),
        ({"batch": 0}, "batch: expected 1 at least, got 0"),
        ({"threads": 0}, "threads: expected 1 at least, got 0"),
        ({"seconds": 0.0}, "seconds: expected more than 0"),
        ({"seconds": float("nan")}, "seconds: expected more than 0"),
    ],
)
def test_wishes_that_cannot_be(tmp_path: Path, wish: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        benchmark.benchmark(tmp_path / "none", **wish)
    assert not (tmp_path / "none").exists()


def test_closest_name_is_told() -> None:
    done = CliRunner().invoke(cli.main, ["benchmark", "--model", "decoder"])
    assert done.exit_code == 2
    assert "'regress', 'decode', 'encode'. Did you mean 'decode'?" in done.stderr
    assert "Did you mean 'benchmark'?" in CliRunner().invoke(cli.main, ["benchmrk"]).stderr


def test_race_takes_turns_and_measures_each(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def side(name: str, cost: float):
        def run() -> None:
            order.append(name)
            clock[0] += cost

        return run

    times = race([side("a", 0.001), side("b", 0.004)], 0.1, turn_s=0.01)
    assert {round(ms, 6) for ms in times[0]} == {1.0}
    assert {round(ms, 6) for ms in times[1]} == {4.0}
    turns = [name for name, _ in itertools.groupby(order)]
    assert turns[:4] == ["a", "b", "a", "b"]
    assert len(race([side("c", 9.0)], 0.1)[0]) >= 5
    assert race([], 1.0) == []


def test_files_of_an_export_against_torch(
    exported: dict[str, Path], modules: Modules, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(benchmark, "make_crops", lambda head, count, seed: (draw_crops(count, seed), "tests"))
    found = time_files(exported["standard"], MODELS, modules, batch=2, seconds=0.01)
    assert sorted(found) == sorted(CASES)
    assert all(each["p50_ms"] > 0 and each["ratio"] > 0 for each in found.values())
    (tmp_path / "regress.onnx").write_bytes(b"\xff")
    assert "note" in time_files(tmp_path, ["regress"], modules)["regress"]


def test_exam_grades_what_torch_would_say(modules: Modules) -> None:
    flame, crops = modules.flame, draw_crops(3)

    def exam(model):
        return set_exam(model, modules.regressor, flame, modules.encoder, crops)

    assert isinstance(modules.encoder, MeshEncoder)
    with torch.no_grad():
        parameters = exam(DECODE).given
        vertices = Flame(modules.head).decode(torch.from_numpy(parameters))[0].numpy()
        codes = modules.encoder.encode(torch.from_numpy(exam(ENCODE).given)).numpy()
    moved = vertices + np.array([0, 0, 2e-4], np.float32)
    for model in (DECODE, RECONSTRUCT):
        assert exam(model).output == "vertices"
        assert exam(model).grade(moved) == pytest.approx({"mean_mm": 0.2, "max_mm": 0.2}, rel=1e-3)
    assert exam(REGRESS).grade(parameters) == pytest.approx({"mean_mm": 0, "max_mm": 0}, abs=1e-4)
    assert exam(ENCODE).grade(codes * 2)["descriptor_min_cosine"] == pytest.approx(1)
    for wrong in (vertices[:2], vertices * np.nan):
        with pytest.raises(ParityError, match=r"decode: expected numbers \(3, 5023, 3\)"):
            exam(DECODE).grade(wrong)
    with pytest.raises(AssetError, match="encode: this head has no mesh encoder; give one with --encoder FILE"):
        set_exam(ENCODE, modules.regressor, flame, None, crops)
    with pytest.raises(ConfigError, match="answers with numbers, got topology"):
        exam(TOPOLOGY)
