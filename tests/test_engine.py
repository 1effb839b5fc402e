"""TensorRT engines: really built (TensorRT-RTX needs no GPU), named, recorded, refused where they do not fit."""

from __future__ import annotations

import builtins
import ctypes
import errno
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import tensorrt_rtx_bindings as rtx
import torch
from models_for_tests import scatter_head, stand_in
from onnx import TensorProto, helper, numpy_helper

from chebface import params
from chebface.checkpoint import load_encoder
from chebface.errors import AssetError, ConfigError, MissingDependencyError
from chebface.flame import Flame
from chebface.signature import DECODE, MODELS, REGRESS, TOPOLOGY, Model
from export import engines, to_engine
from export.engines import (
    Compiler,
    Log,
    check_engine,
    compare,
    find_compiler,
    gpu_architecture,
    open_engine,
    run_engine,
)
from export.graphs import decode_graph, encode_graph, reconstruct_graph, regress_graph
from export.parity import ParityError
from export.precision import cast
from export.to_engine import BATCH, build_engine, build_engines


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tests on every machine; what needs a GPU is imitated."""
    monkeypatch.setattr(engines, "gpu_architecture", lambda: None)


def save(path: Path, proto: onnx.ModelProto, precision: str | None = "fp32") -> Path:
    if precision:
        proto.metadata_props.add(key="chebface.precision", value=precision)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(proto, path)
    return path


@pytest.fixture(scope="module")
def regress(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("onnx") / "regress.onnx", stand_in(REGRESS))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, regress: Path) -> Path:
    """A finished engine; copy its folder before harming it."""
    folder = tmp_path_factory.mktemp("engines")
    return folder / build_engine(regress, folder)["engine"]["file"]


@pytest.fixture
def engine(tmp_path: Path, built: Path) -> Path:
    shutil.copytree(built.parent, tmp_path / "engines")
    return tmp_path / "engines" / built.name


@pytest.mark.parametrize("model", [REGRESS, DECODE], ids=lambda m: m.name)
def test_engine_is_built_recorded_and_silent(tmp_path: Path, model: Model, capfd: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    path = save(tmp_path / f"{model.name}.onnx", stand_in(model))
    report = build_engine(path, tmp_path / "engines", say=lines.append)
    assert capfd.readouterr() == ("", "")
    plan = tmp_path / "engines" / report["engine"]["file"]
    assert plan.name == f"{model.name}.sm80plus.trt-rtx{rtx.__version__}.fp32.plan"
    assert sorted(p.name for p in plan.parent.iterdir()) == [plan.with_suffix(".json").name, plan.name]
    assert report.pop("fresh")
    assert json.loads(plan.with_suffix(".json").read_text()) == report == check_engine(plan, onnx_path=path)
    assert report["engine"]["sha256"] == hashlib.sha256(plan.read_bytes()).hexdigest()
    assert report["onnx"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (report["flavour"], report["version"], report["architecture"]) == (
        "tensorrt_rtx",
        rtx.__version__,
        "sm80plus",
    )
    (tensor,) = model.inputs
    (profile,) = report["profiles"]
    assert profile[tensor.name] == {"min": [1, *tensor.shape], "opt": [8, *tensor.shape], "max": [32, *tensor.shape]}
    assert report["inspected"] == "build log"
    reads = {t["name"]: t["shape"] for layer in report["layers"] for t in layer["inputs"]}
    writes = {t["name"]: t["shape"] for layer in report["layers"] for t in layer["outputs"]}
    assert reads[tensor.name] == [-1, *tensor.shape]
    assert {t.name: [-1, *t.shape] for t in model.outputs}.items() <= writes.items()
    assert any(form.startswith("Float, ") for form in report["formats"])
    assert report["compared"] == {"skipped": "no GPU here"}
    assert f"note: {plan.name} was not run: no GPU here" in lines


class Tiny(torch.nn.Module):
    """A regressor in form, quickly traced."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = torch.nn.Linear(3, params.TOTAL)

    def forward(self, crop: torch.Tensor) -> torch.Tensor:
        return self.mix(crop.mean((2, 3)))


@pytest.fixture(scope="module")
def exported() -> dict[str, onnx.ModelProto]:
    """The graphs that `python -m export onnx` writes, of a small regressor and the mesh encoder of the package."""
    with torch.no_grad():
        regress, decode = regress_graph(Tiny()), decode_graph(Flame(scatter_head()).eval())
        encode = encode_graph(load_encoder()[0].encoder)
    graphs = {"regress": regress, "decode": decode, "encode": encode, "reconstruct": reconstruct_graph(regress, decode)}
    for name, proto in graphs.items():
        proto.graph.name = name
    return graphs


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {TOPOLOGY.name}))
def test_every_graph_becomes_an_engine(tmp_path: Path, exported: dict[str, onnx.ModelProto], name: str) -> None:
    report = build_engine(save(tmp_path / f"{name}.onnx", exported[name]), tmp_path / "engines")
    check_engine(tmp_path / "engines" / report["engine"]["file"], onnx_path=tmp_path / f"{name}.onnx")
    assert (report["model"], report["warnings"]) == (name, [])
    assert len(report["layers"]) > 1


def test_a_folder_becomes_engines(tmp_path: Path) -> None:
    folder, lines = tmp_path / "onnx", []
    with pytest.raises(AssetError, match="no file to build an engine from; make them with: python -m export onnx"):
        build_engines(folder, tmp_path / "engines")
    for name, proto in {
        "regress": stand_in(REGRESS),
        "topology": stand_in(TOPOLOGY),
        "encode": custom(("chebface", "Encode")),
    }.items():
        save(folder / f"{name}.onnx", proto)
    done = build_engines(folder, tmp_path / "engines", batch=(1, 2, 4), say=lines.append)
    assert done["engines"].keys() == {"regress"} and done["engines"]["regress"]["fresh"]
    assert done["skipped"] == {
        "topology": "head is text",
        "encode": "operators of chebface run in onnxruntime only",
    }
    assert f"note: {folder / 'topology.onnx'} is not for engines: head is text" in lines
    (folder / "regress.onnx").unlink()
    with pytest.raises(AssetError, match="no file to build an engine from"):
        build_engines(folder, tmp_path / "engines")


def test_precision_is_the_files_own(tmp_path: Path) -> None:
    """A strongly typed network: half where the file says so, and nowhere else."""
    proto = stand_in(REGRESS)
    mean, product = proto.graph.node[1:]
    weights = next(t for t in proto.graph.initializer if t.name == "weights")
    weights.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weights).astype(np.float16), "weights"))
    product.input[0], product.output[0] = "half", "answer"
    proto.graph.node.insert(2, helper.make_node("Cast", list(mean.output), ["half"], to=TensorProto.FLOAT16))
    proto.graph.node.append(helper.make_node("Cast", ["answer"], ["parameters"], to=TensorProto.FLOAT))
    report = build_engine(save(tmp_path / "regress.onnx", proto, "fp16"), tmp_path / "engines")
    assert report["engine"]["file"].endswith(".fp16.plan")
    assert any(form.startswith("Half, ") for form in report["formats"])


def test_engine_for_one_gpu_with_two_profiles(tmp_path: Path, regress: Path) -> None:
    report = build_engine(regress, tmp_path, architecture="sm89", batch=[(1, 1, 1), (2, 16, 64)], workspace_mb=64)
    assert ".sm89." in report["engine"]["file"]
    assert [p["crop"]["max"][0] for p in report["profiles"]] == [1, 64]


def test_what_is_up_to_date_stays(tmp_path: Path, regress: Path) -> None:
    first = build_engine(regress, tmp_path)
    plan = tmp_path / first["engine"]["file"]
    made = plan.stat().st_mtime_ns
    again = build_engine(regress, tmp_path)
    assert (again["fresh"], again["seconds"], plan.stat().st_mtime_ns) == (False, first["seconds"], made)
    assert build_engine(regress, tmp_path, batch=(1, 4, 8))["fresh"]
    assert build_engine(regress, tmp_path, batch=(1, 4, 8), force=True)["fresh"]
    plan.write_bytes(b"half")
    assert build_engine(regress, tmp_path, batch=(1, 4, 8))["fresh"]
    check_engine(plan)


def test_an_engine_that_was_never_run_is_built_again_where_it_can_be(
    engine: Path, regress: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(to_engine, "why_not_run", lambda compiler, target: None)
    monkeypatch.setattr(to_engine, "run_engine", lambda compiler, plan, ranges, log, feeds: seen.append("run") or feeds)
    monkeypatch.setattr(
        to_engine, "compare", lambda run, path, model, precision, feeds: {"crop": run(feeds)["crop"].shape}
    )
    report = build_engine(regress, engine.parent)
    assert (report["fresh"], report["compared"], seen) == (True, {"crop": (BATCH[1], 112, 112, 3)}, ["run"])
    assert not build_engine(regress, engine.parent)["fresh"]


@pytest.mark.parametrize("batch", [(), (1, 2), (0, 1, 2), (4, 2, 8), (1, 8, 4), [(1, 1, 1), (2, 1, 2)]])
def test_batch_range_in_the_wrong_order(tmp_path: Path, regress: Path, batch: object) -> None:
    with pytest.raises(ConfigError, match="batch: expected"):
        build_engine(regress, tmp_path, batch=batch)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"workspace_mb": 0}, "workspace_mb: expected 1 or more, got 0"),
        ({"flavour": "tensorflow"}, "flavour: expected one of tensorrt, tensorrt_rtx"),
        ({"architecture": "sm90"}, "builds for sm75, .*, got sm90"),
        ({"architecture": "sm89", "hardware_compatible": True}, "got both"),
        ({"version_compatible": True}, "belong to one release"),
    ],
)
def test_settings_that_cannot_be_had(tmp_path: Path, regress: Path, settings: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_engine(regress, tmp_path, **settings)


def custom(*ops: tuple[str, str]) -> onnx.ModelProto:
    """The regressor in form, with a chain of operators in between."""
    names = ["parameters_", *(f"x{i}" for i in range(len(ops) - 1)), "parameters"]
    proto = stand_in(REGRESS)
    proto.graph.node[-1].output[0] = names[0]
    for (domain, op), source, target in zip(ops, names, names[1:], strict=False):
        proto.graph.node.append(helper.make_node(op, [source], [target], domain=domain, name=f"node_{op}"))
        if domain:
            proto.opset_import.append(helper.make_opsetid(domain, 1))
    return proto


def uint8_moved_before_the_cast() -> onnx.ModelProto:
    proto = stand_in(REGRESS)
    cast, mean = proto.graph.node[:2]
    proto.graph.node.insert(0, helper.make_node("Transpose", ["crop"], ["planes"], perm=[0, 3, 1, 2], name="swap"))
    cast.input[0] = "planes"
    axes = next(t for t in proto.graph.initializer if t.name == mean.input[1])
    axes.CopyFrom(numpy_helper.from_array(np.array([2, 3]), axes.name))
    return proto


def test_all_that_the_parser_refuses_is_listed(tmp_path: Path) -> None:
    path = save(tmp_path / "regress.onnx", custom(("chebface", "Encode"), ("", "Unique"), ("", "Det")))
    with pytest.raises(AssetError, match="cannot take it") as caught:
        build_engine(path, tmp_path / "engines")
    refusals = str(caught.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in refusals] == [
        "Encode node_Encode",
        "Unique node_Unique",
        "Det node_Det",
    ]
    assert "Plugin not found" in refusals[0]
    assert not (tmp_path / "engines").exists()


def test_bytes_may_only_be_cast(tmp_path: Path) -> None:
    path = save(tmp_path / "regress.onnx", uint8_moved_before_the_cast())
    with pytest.raises(AssetError, match=r"Transpose swap: .* has type UInt8") as caught:
        build_engine(path, tmp_path / "engines")
    assert "cudaError" not in str(caught.value)


def test_a_gpu_that_lacks_what_the_precision_needs(tmp_path: Path, regress: Path) -> None:
    with pytest.raises(AssetError, match=r"cannot build it for sm75: .*FP32 GEMM is not supported"):
        build_engine(regress, tmp_path, architecture="sm75")
    assert not list(tmp_path.iterdir())


def fixed(proto: onnx.ModelProto) -> onnx.ModelProto:
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    return proto


def unnamed(proto: onnx.ModelProto) -> onnx.ModelProto:
    proto.graph.name = "face"
    return proto


def renamed(proto: onnx.ModelProto) -> onnx.ModelProto:
    proto.graph.output[0].name = proto.graph.node[-1].output[0] = "numbers"
    return proto


@pytest.mark.parametrize(
    ("name", "proto", "precision", "words"),
    [
        ("topology", stand_in(TOPOLOGY), "fp32", "not for engines: head is text"),
        ("regress", fixed(stand_in(REGRESS)), "fp32", r"expected a free batch .*, got \[4, 112, 112, 3\]"),
        ("regress", stand_in(REGRESS), None, "got graph 'regress', None"),
        ("regress", stand_in(REGRESS), "fp8", "got graph 'regress', 'fp8'"),
        ("face", unnamed(stand_in(REGRESS)), "fp32", "got graph 'face', 'fp32'"),
        ("regress", renamed(stand_in(REGRESS)), "fp32", "outputs: signature.py says .*numbers"),
    ],
)
def test_files_that_are_not_for_engines(
    tmp_path: Path, name: str, proto: onnx.ModelProto, precision: str | None, words: str
) -> None:
    path = save(tmp_path / f"{name}.onnx", proto, precision)
    with pytest.raises(AssetError, match=words):
        build_engine(path, tmp_path / "engines")
    assert not (tmp_path / "engines").exists()


def test_missing_and_damaged_onnx_files(tmp_path: Path, regress: Path) -> None:
    path = tmp_path / "regress.onnx"
    with pytest.raises(AssetError, match="no such file; make it with: python -m export onnx"):
        build_engine(path, tmp_path)
    for content in (b"garbage", regress.read_bytes()[:-3000]):
        path.write_bytes(content)
        with pytest.raises(AssetError, match=r"not a valid ONNX file .*; export it again"):
            build_engine(path, tmp_path)


def test_onnx_file_edited_by_hand(tmp_path: Path) -> None:
    path = save(tmp_path / "regress.onnx", stand_in(REGRESS))
    record = {"file": path.name, "sha256": "0" * 64}
    (tmp_path / "manifest.json").write_text(json.dumps({"files": {"regress": record}}))
    with pytest.raises(AssetError, match="changed after its export"):
        build_engine(path, tmp_path / "engines")


def test_external_data_counts(tmp_path: Path) -> None:
    proto = stand_in(REGRESS)
    proto.metadata_props.add(key="chebface.precision", value="fp32")
    path = tmp_path / "regress.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="regress.bin", size_threshold=0)
    report = build_engine(path, tmp_path / "engines")
    plan = tmp_path / "engines" / report["engine"]["file"]
    check_engine(plan, onnx_path=path)
    data = bytearray((tmp_path / "regress.bin").read_bytes())
    data[-1] ^= 1
    (tmp_path / "regress.bin").write_bytes(data)
    with pytest.raises(AssetError, match=r"built from another regress.onnx"):
        check_engine(plan, onnx_path=path)


def rtx_here(**changes: object) -> Compiler:
    facts = {"flavour": "tensorrt_rtx", "version": rtx.__version__, "gpu": None, "system": engines._system()}
    return Compiler(**{**facts, "module": rtx, **changes})


@pytest.mark.parametrize(
    ("here", "words"),
    [
        (rtx_here(version="1.8.0.2"), f"for TensorRT-RTX {rtx.__version__}, here is 1.8.0.2"),
        (rtx_here(flavour="tensorrt", version="11.4.0.1"), "for TensorRT-RTX .*, here is TensorRT 11.4.0.1"),
        (rtx_here(gpu="sm75"), "for sm80plus, the GPU here is sm75; rebuild with: .*--architecture sm75"),
        (rtx_here(gpu="sm90"), "for sm80plus, the GPU here is sm90; rebuild with: .*--flavour tensorrt"),
        (rtx_here(system="Linux aarch64"), "here is Linux aarch64"),
    ],
)
def test_engine_for_another_place(built: Path, here: Compiler, words: str) -> None:
    with pytest.raises(AssetError, match=words) as caught:
        check_engine(built, compiler=here)
    assert f"rebuild with: python -m export engine -o {built.parent} regress.onnx" in str(caught.value)


def rewrite(engine: Path, **changes: object) -> Path:
    report_path = engine.with_suffix(".json")
    report_path.write_text(json.dumps(json.loads(report_path.read_text()) | changes))
    return engine


def test_where_an_engine_fits(engine: Path) -> None:
    for gpu in ("sm80", "sm89", "sm120"):
        check_engine(engine, compiler=rtx_here(gpu=gpu))
    machine = engines._system().split()[1]
    check_engine(engine, compiler=rtx_here(system=f"Windows {machine}"))
    rewrite(engine, architecture="sm89")
    check_engine(engine, compiler=rtx_here(gpu="sm89"))
    with pytest.raises(AssetError, match="for sm89, the GPU here is sm80"):
        check_engine(engine, compiler=rtx_here(gpu="sm80"))


def test_tensorrt_engines_are_tied_to_system_and_version(engine: Path) -> None:
    full = {"flavour": "tensorrt", "version": "10.9.0.34", "system": "Linux x86_64"}
    rewrite(engine, **full)
    for gpu in (None, "sm86", "sm90"):
        check_engine(engine, compiler=rtx_here(**full, gpu=gpu))
    with pytest.raises(AssetError, match="for Linux x86_64, here is Windows x86_64"):
        check_engine(engine, compiler=rtx_here(**full | {"system": "Windows x86_64"}))
    with pytest.raises(AssetError, match=r"for TensorRT 10\.9\.0\.34, here is 10\.13"):
        check_engine(engine, compiler=rtx_here(**full | {"version": "10.13.0.35"}))
    rewrite(engine, settings={"version_compatible": True})
    check_engine(engine, compiler=rtx_here(**full | {"version": "10.13.0.35"}))
    for other in ("10.8.0.1", "11.0.0.1"):
        with pytest.raises(AssetError, match=f"here is {other}"):
            check_engine(engine, compiler=rtx_here(**full | {"version": other}))


def test_half_an_engine_is_none(engine: Path) -> None:
    whole = engine.read_bytes()
    engine.write_bytes(whole[:-1])
    with pytest.raises(AssetError, match=r"sha256 differs\): do not load it; rebuild with"):
        check_engine(engine)
    engine.unlink()
    with pytest.raises(AssetError, match=r"\.plan is missing, the engine is not complete; rebuild with"):
        check_engine(engine)
    engine.write_bytes(whole)
    engine.with_suffix(".json").unlink()
    with pytest.raises(AssetError, match=r"\.json is missing, the engine is not complete"):
        check_engine(engine)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"engine": {}}', "null"])
def test_report_that_is_none(engine: Path, text: str) -> None:
    engine.with_suffix(".json").write_text(text)
    with pytest.raises(AssetError, match="not the report of an engine"):
        check_engine(engine)


@pytest.mark.parametrize(
    "change",
    [{"format": 99}, {"flavour": "../x"}, {"settings": None}, {"version": 7}, {"system": "x"}, {"architecture": "x"}],
)
def test_report_of_another_kind(engine: Path, change: dict[str, object]) -> None:
    with pytest.raises(AssetError, match="not the report of an engine"):
        check_engine(rewrite(engine, **change))


def full_disk(monkeypatch: pytest.MonkeyPatch, suffix: str, code: int = errno.ENOSPC) -> None:
    def write(path: Path, data: object) -> int:
        if suffix in path.name:
            with builtins.open(path, "wb") as file:
                file.write(bytes(data)[:10])
            raise OSError(code, "refused")
        return real(path, data)

    real = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", write)


@pytest.mark.parametrize("suffix", [".plan.", ".json."])
def test_no_space_left(tmp_path: Path, regress: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    full_disk(monkeypatch, suffix)
    with pytest.raises(AssetError, match=r"no space left for \d+\.\d MB .* make room or choose another --output"):
        build_engine(regress, tmp_path)
    assert not list(tmp_path.iterdir())


def test_other_trouble_with_the_disk_is_not_hidden(
    tmp_path: Path, regress: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_disk(monkeypatch, ".plan.", errno.EIO)
    with pytest.raises(OSError, match="refused"):
        build_engine(regress, tmp_path)
    assert not list(tmp_path.iterdir())


def answers(path: Path) -> engines.Run:
    session = onnxruntime.InferenceSession(path)
    names = [t.name for t in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(names, dict(feeds)), strict=True))


def test_comparison_judges_points_in_mm_and_numbers_by_their_share(tmp_path: Path, regress: Path) -> None:
    crops, numbers = to_engine._draw(REGRESS, 3), to_engine._draw(DECODE, 3)
    same = compare(answers(regress), regress, REGRESS, "fp32", crops)
    assert same == {"batch": 3, "parameters": {"max_share": 0.0}}

    def worse(feeds: dict) -> dict:
        return {"parameters": 1.01 * answers(regress)(feeds)["parameters"]}

    with pytest.raises(ParityError, match=r"parameters: max_share 1\.00e-02 \(limit 0\.001\)"):
        compare(worse, regress, REGRESS, "fp32", crops)
    assert compare(worse, regress, REGRESS, "fp16", crops)["parameters"]["max_share"] == pytest.approx(0.01, rel=1e-4)

    path = save(tmp_path / "decode.onnx", stand_in(DECODE))
    true = answers(path)(numbers)

    def moved(feeds: dict) -> dict:
        return true | {"vertices": true["vertices"] + np.array([0, 0, 1e-4], np.float32)}

    with pytest.raises(ParityError, match=r"vertices: mean_mm 1\.00e-01 \(limit 0\.001\), max_mm"):
        compare(moved, path, DECODE, "fp32", numbers)
    found = compare(moved, path, DECODE, "int8", numbers)
    assert found["vertices"]["mean_mm"] == pytest.approx(0.1, rel=1e-3)
    assert found["landmarks"] == {"mean_mm": 0.0, "max_mm": 0.0}
    halved = compare(lambda feeds: {k: v.astype(np.float16) for k, v in true.items()}, path, DECODE, "fp32", numbers)
    assert 1e-4 < halved["vertices"]["mean_mm"] < 0.5
    with pytest.raises(ParityError, match=r"expected numbers \(3, 5023, 3\), got \(3, 5023, 3\) with 45207 not finite"):
        compare(lambda feeds: true | {"vertices": true["vertices"] * np.nan}, path, DECODE, "int8", numbers)
    with pytest.raises(ParityError, match=r"expected numbers \(3, 5023, 3\), got \(2, 5023, 3\)"):
        compare(lambda feeds: true | {"vertices": true["vertices"][:2]}, path, DECODE, "int8", numbers)


def test_bf16_is_compared_with_what_it_should_be(tmp_path: Path) -> None:
    """onnxruntime's CPU refuses bf16 convolutions: they are emulated."""
    kernel = np.random.default_rng(0).normal(size=(8, 3, 16, 16)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["crop"], ["colours"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["colours"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["planes", "kernel"], ["convolved"], strides=[16, 16]),
        helper.make_node("Flatten", ["convolved"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["parameters"]),
    ]
    proto = stand_in(REGRESS)
    weights = numpy_helper.from_array(np.ones((392, params.TOTAL), np.float32), "weights")
    del proto.graph.node[:], proto.graph.initializer[:]
    proto.graph.node.extend(nodes)
    proto.graph.initializer.extend([numpy_helper.from_array(kernel, "kernel"), weights])
    crops = to_engine._draw(REGRESS, 2)
    exact = answers(save(tmp_path / "exact.onnx", proto, None))
    path = save(tmp_path / "regress.onnx", cast(proto, "bf16"), "bf16")
    share = compare(exact, path, REGRESS, "bf16", crops)["parameters"]["max_share"]
    assert 0 < share < 0.05
    report = build_engine(path, tmp_path / "engines")
    assert report["engine"]["file"].endswith(".bf16.plan")
    assert any(form.startswith("BFloat16, ") for form in report["formats"])


def test_drawn_crops_are_full_size() -> None:
    (crops,) = to_engine._draw(REGRESS, 2).values()
    assert (crops.shape, crops.dtype) == ((2, 112, 112, 3), np.uint8)
    assert crops.std() > 50


class FakeEngine:
    """An engine that answers through onnxruntime, reading and writing at the addresses it is given."""

    def __init__(self, path: Path, works: bool = True) -> None:
        self.session, self.works = onnxruntime.InferenceSession(path), works
        self.names = [t.name for t in (*self.session.get_outputs(), *self.session.get_inputs())]
        self.num_io_tensors = len(self.names)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.profile = -1

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> object:
        inputs = {t.name for t in self.session.get_inputs()}
        return rtx.TensorIOMode.INPUT if name in inputs else rtx.TensorIOMode.OUTPUT

    def create_execution_context(self) -> FakeEngine:
        return self

    def set_optimization_profile_async(self, index: int, stream: int) -> None:
        self.profile = index

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self.shapes[name] = shape

    def get_tensor_dtype(self, name: str) -> object:
        return rtx.DataType.FLOAT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        (output,) = self.session.get_outputs()
        (shape,) = self.shapes.values()
        return (shape[0], *output.shape[1:])

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        (source,), (target,) = self.session.get_inputs(), self.session.get_outputs()
        shape = self.shapes[source.name]
        held = (ctypes.c_uint8 * int(np.prod(shape))).from_address(self.addresses[source.name])
        (answer,) = self.session.run(None, {source.name: np.frombuffer(held, np.uint8).reshape(shape)})
        ctypes.memmove(self.addresses[target.name], answer.tobytes(), answer.nbytes)
        return self.works


def fake_tensorrt(version: str = "10.13.0.35", **changes: object) -> ModuleType:
    """The full TensorRT in form: TensorRT-RTX's own API under its name."""
    module = ModuleType("tensorrt")
    vars(module).update({name: value for name, value in vars(rtx).items() if not name.startswith("__")})
    vars(module).update({"__version__": version, **changes})
    return module


def on_cpu(monkeypatch: pytest.MonkeyPatch, engine: object) -> Compiler:
    monkeypatch.setattr(engines, "DEVICE", "cpu")
    stream = SimpleNamespace(cuda_stream=0, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda plan: engine)  # noqa: E731
    return rtx_here(module=fake_tensorrt(Runtime=runtime))


def test_engine_gets_the_right_buffers(regress: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine(regress)
    compiler = on_cpu(monkeypatch, engine)
    feeds = {"crop": to_engine._draw(REGRESS, 6)["crop"][::2]}  # three, not contiguous
    found = run_engine(compiler, b"", [(1, 1, 1), (2, 4, 8)], Log(), feeds)
    assert engine.profile == 1
    np.testing.assert_array_equal(found["parameters"], answers(regress)(feeds)["parameters"])
    with pytest.raises(ConfigError, match=r"feeds: expected a batch within \[\(1, 1, 1\)\], got 3"):
        run_engine(compiler, b"", [(1, 1, 1)], Log(), feeds)
    compiler = on_cpu(monkeypatch, FakeEngine(regress, works=False))
    with pytest.raises(AssetError, match="does not run its engine: out of memory"):
        run_engine(compiler, b"", [BATCH], Log(errors=["out of memory"]), feeds)
    compiler = on_cpu(monkeypatch, None)
    with pytest.raises(AssetError, match="does not load its engine: it gave no reason"):
        run_engine(compiler, b"", [BATCH], Log(), feeds)


def test_engine_that_is_open_takes_one_batch_after_the_other(regress: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine(regress)
    profiles: list[int] = []
    engine.set_optimization_profile_async = lambda index, stream: profiles.append(index)
    run = open_engine(on_cpu(monkeypatch, engine), b"", [(1, 1, 1), (2, 4, 8)], Log())
    crops = to_engine._draw(REGRESS, 4)["crop"]
    wanted = answers(regress)({"crop": crops})["parameters"]
    for first, last in ((0, 1), (1, 2), (0, 3), (1, 4), (3, 4)):
        np.testing.assert_allclose(run({"crop": crops[first:last]})["parameters"], wanted[first:last], rtol=1e-5)
    assert profiles == [0, 1, 0], "switched only where it must be"


def test_half_outputs_of_an_engine_are_half(regress: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine(regress)
    engine.get_tensor_dtype = lambda name: rtx.DataType.HALF
    engine.execute_async_v3 = lambda stream: True
    found = run_engine(on_cpu(monkeypatch, engine), b"", [(1, 2, 3)], Log(), to_engine._draw(REGRESS, 2))
    assert found["parameters"].dtype == np.float16


def test_leftovers_of_the_dead_are_cleared(tmp_path: Path, regress: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    left = tmp_path / f"regress.sm80plus.plan.{int(dead.stdout)}-7.partial"
    left.write_bytes(b"half")
    build_engine(regress, tmp_path)
    assert not left.exists()


def with_gpu(monkeypatch: pytest.MonkeyPatch, module: ModuleType, gpu: str | None = "sm89") -> None:
    compiler = rtx_here(flavour="tensorrt", version=module.__version__, gpu=gpu, module=module)
    monkeypatch.setattr(to_engine, "find_compiler", lambda flavour: compiler)


def inspector(*layers: object) -> object:
    """A Runtime whose engine tells this of itself."""
    text = json.dumps({"Layers": layers})
    engine = SimpleNamespace(create_engine_inspector=lambda: SimpleNamespace(get_engine_information=lambda form: text))
    return lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda plan: engine)


TEN = {"Name": "product", "Dimensions": [-1, 486], "Format/Datatype": "Row major linear FP32"}
ELEVEN = {"Name": "product", "Dimensions": [-1, 486], "Format": "(Linear) Row major linear format", "Datatype": "Float"}


@pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX:DeprecationWarning")
@pytest.mark.parametrize(
    ("version", "tensor", "form"),
    [
        ("10.13.0.35", TEN, "Row major linear FP32"),
        ("11.4.0.1", ELEVEN, "Float, (Linear) Row major linear format"),
    ],
)
def test_full_tensorrt_beside_a_gpu(
    tmp_path: Path, regress: Path, monkeypatch: pytest.MonkeyPatch, version: str, tensor: dict, form: str
) -> None:
    lines: list[str] = []
    layer = {"Name": "gemm", "LayerType": "kgen", "TacticName": "t", "Inputs": [], "Outputs": [tensor]}
    with_gpu(monkeypatch, fake_tensorrt(version, Runtime=inspector(layer, "bare")))
    cache = tmp_path / "timings" / "cache"
    report = build_engine(regress, tmp_path, hardware_compatible=True, timing_cache=cache, say=lines.append)
    assert report["engine"]["file"] == f"regress.sm80plus.trt{version}.fp32.plan"
    assert (report["inspected"], report["formats"]) == ("inspector", {form: 1})
    assert [entry["name"] for entry in report["layers"]] == ["gemm", "bare"]
    assert report["compared"] == {"skipped": "this torch has no CUDA"}
    assert report["warnings"] == ["setHardwareCompatibilityLevel() is unsupported in TensorRT-RTX."]
    assert f"note: TensorRT: {report['warnings'][0]}" in lines
    assert cache.stat().st_size > 0 and list(cache.parent.iterdir()) == [cache]
    assert ".sm89." in build_engine(regress, tmp_path, timing_cache=cache)["engine"]["file"]


@pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX:DeprecationWarning")
def test_timing_cache_of_another_gpu_is_started_anew(
    tmp_path: Path, regress: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def set_timing_cache(config: object, cache: object, ignore_mismatch: bool) -> bool:
        return ignore_mismatch or not real(config, cache, ignore_mismatch)

    real = rtx.IBuilderConfig.set_timing_cache
    monkeypatch.setattr(rtx.IBuilderConfig, "set_timing_cache", set_timing_cache)
    with_gpu(monkeypatch, fake_tensorrt(Runtime=inspector()))
    lines: list[str] = []
    cache = tmp_path / "cache"
    cache.write_bytes(b"older")
    build_engine(regress, tmp_path, timing_cache=cache, say=lines.append)
    assert f"note: {cache} was made by another TensorRT or GPU; it is started anew" in lines
    assert cache.read_bytes() != b"older"


def test_rtx_has_no_timing_cache(tmp_path: Path, regress: Path) -> None:
    lines: list[str] = []
    build_engine(regress, tmp_path / "engines", timing_cache=tmp_path / "cache", say=lines.append)
    assert "note: TensorRT-RTX tunes when it runs: no timing cache is read or written" in lines
    assert not (tmp_path / "cache").exists()


@pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX:DeprecationWarning")
def test_no_space_left_for_the_timing_cache(tmp_path: Path, regress: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpu(monkeypatch, fake_tensorrt(Runtime=inspector()))
    full_disk(monkeypatch, "cache.")
    with pytest.raises(AssetError, match="cache: no space left"):
        build_engine(regress, tmp_path, timing_cache=tmp_path / "cache")
    assert not list(tmp_path.iterdir())


def test_what_full_tensorrt_cannot_do(tmp_path: Path, regress: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpu(monkeypatch, fake_tensorrt())
    with pytest.raises(ConfigError, match="builds for this machine's sm89, got sm75; build there"):
        build_engine(regress, tmp_path, architecture="sm75")
    with pytest.raises(AssetError, match=r"cannot build it for sm89: .*libnvinfer_lean"):  # the flag gets there
        build_engine(regress, tmp_path, version_compatible=True)
    with pytest.raises(AssetError, match=r"does not load what it built: .*CUDA driver"):
        build_engine(regress, tmp_path)
    with_gpu(monkeypatch, fake_tensorrt(), gpu=None)
    with pytest.raises(MissingDependencyError, match="builds only beside the GPU"):
        build_engine(regress, tmp_path)
    assert not list(tmp_path.iterdir())


def test_engine_for_another_gpu_is_not_run(regress: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "gpu_architecture", lambda: "sm86")
    report = build_engine(regress, tmp_path, flavour="tensorrt_rtx", architecture="sm120")
    assert report["compared"] == {"skipped": "it is for sm120, the GPU here is sm86"}
    assert report["inspected"] == "build log"


def find_spec(*names: str) -> object:
    return lambda name: object() if name in names else None


def test_which_tensorrt_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_compiler().flavour == "tensorrt_rtx"
    full = fake_tensorrt()
    monkeypatch.setattr(engines.importlib.util, "find_spec", find_spec("tensorrt", "tensorrt_rtx_bindings"))
    modules = {"tensorrt": full, "tensorrt_rtx_bindings": rtx}
    monkeypatch.setattr(engines.importlib, "import_module", modules.__getitem__)
    assert find_compiler().flavour == "tensorrt_rtx"
    monkeypatch.setattr(engines, "gpu_architecture", lambda: "sm89")
    found = find_compiler()
    assert (found.flavour, found.title, found.gpu) == ("tensorrt", "TensorRT 10.13.0.35", "sm89")
    assert find_compiler("tensorrt_rtx").module is rtx
    full.__version__ = "8.6.1"
    with pytest.raises(MissingDependencyError, match=r"tensorrt: expected version 10 or later, got 8\.6\.1"):
        find_compiler()


def test_tensorrt_that_is_not_there(tmp_path: Path, regress: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines.importlib.util, "find_spec", find_spec())
    with pytest.raises(MissingDependencyError, match=r"no tensorrt_rtx or tensorrt: pip install 'chebface\[engine\]'"):
        build_engine(regress, tmp_path)
    with pytest.raises(MissingDependencyError, match="onnx is not installed"):
        engines.load_onnx(regress)

    def refuse(name: str) -> None:
        raise OSError("libcudart.so.13 not found")

    monkeypatch.setattr(engines.importlib.util, "find_spec", find_spec("tensorrt_rtx"))
    monkeypatch.setattr(engines.importlib, "import_module", refuse)
    with pytest.raises(MissingDependencyError, match=r"does not load .libcudart"):
        find_compiler()


def test_architecture_is_the_drivers_word(monkeypatch: pytest.MonkeyPatch) -> None:
    def attribute(target: object, which: int, device: object) -> int:
        target._obj.value = {75: 12, 76: 1}[which]
        return 0

    driver = SimpleNamespace(cuInit=lambda flags: 0, cuDeviceGet=lambda *a: 0, cuDeviceGetAttribute=attribute)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    assert gpu_architecture() == "sm121"
    driver.cuInit = lambda flags: 100  # no device
    assert gpu_architecture() is None

    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert gpu_architecture() is None
