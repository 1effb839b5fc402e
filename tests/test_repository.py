"""The model repository: one text, written from signature.py; what does not fit is never copied."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from google.protobuf import text_format
from models_for_tests import stand_in
from tritonclient.grpc import model_config_pb2

from chebface import signature
from chebface.errors import AssetError, ConfigError, MissingDependencyError
from chebface.repository import check_repository, find_model, materialise, model_code
from chebface.signature import LEAVES, MODELS, OPTIONAL, PRIORITIES, RECONSTRUCT_PHOTO, REGRESS, SERVED, Model
from export.folder import MANIFEST, describe
from export.repository import TARGETS, check_config, config_text, fill_repository, verify_repository

ROOT = Path(__file__).resolve().parent.parent
FILLED = [name for name in SERVED if name not in OPTIONAL]  # the stand-in head has no mesh encoder
PROGRAMS = [name for name, model in SERVED.items() if model.program]


def parse(model: Model):
    return text_format.Parse(config_text(model), model_config_pb2.ModelConfig())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An export folder of stand-ins."""
    folder = tmp_path / "export"
    folder.mkdir()
    for name, model in LEAVES.items():
        write(folder, name, stand_in(model))
    record(folder)
    return folder


def write(folder: Path, name: str, proto: onnx.ModelProto, head: str = "0") -> None:
    proto.metadata_props.add(key="chebface.head_sha256", value=head)
    onnx.save(proto, folder / f"{name}.onnx")


def record(folder: Path) -> None:
    standard = {"operators": "standard", "precision": "fp32"}
    files = {name: describe(folder / f"{name}.onnx") | standard for name in LEAVES}
    (folder / MANIFEST).write_text(json.dumps({"inputs": {}, "files": files}))


@pytest.mark.parametrize("name", SERVED)
def test_committed_config_is_what_signature_gives(name: str) -> None:
    committed = (ROOT / "triton_models" / name / "config.pbtxt").read_text()
    assert committed == config_text(SERVED[name]), "run `python -m export repository` and commit triton_models"
    check_config(committed, SERVED[name], name)


@pytest.mark.parametrize("name", LEAVES)
def test_leaf_says_what_the_server_would_guess(name: str) -> None:
    config = parse(LEAVES[name])
    assert (config.backend, config.platform) == ("onnxruntime", "")
    count = 4 if LEAVES[name].batched else 1
    assert [(group.count, group.kind) for group in config.instance_group] == [
        (count, model_config_pb2.ModelInstanceGroup.KIND_CPU)
    ]
    assert config.HasField("dynamic_batching") == LEAVES[name].batched
    assert not config.dynamic_batching.preferred_batch_size  # our backend joins what waits
    assert list(config.version_policy.specific.versions) == [1]
    assert config.parameters["intra_op_thread_count"].string_value == "1"
    assert [warmup.batch_size for warmup in config.model_warmup] == (
        [1, signature.MAX_BATCH] if LEAVES[name].batched else [0]
    )
    for warmup in config.model_warmup:
        assert sorted(warmup.inputs) == sorted(tensor.name for tensor in LEAVES[name].inputs)


@pytest.mark.parametrize("model", [REGRESS, RECONSTRUCT_PHOTO], ids=lambda model: model.name)
def test_queue_refuses_and_honours_the_callers_deadline_and_priority(model: Model) -> None:
    batching = parse(model).dynamic_batching
    policy = batching.default_queue_policy
    assert policy.timeout_action == model_config_pb2.ModelQueuePolicy.REJECT
    assert policy.allow_timeout_override
    assert 0 < policy.max_queue_size <= 1024
    assert policy.default_timeout_microseconds > 0
    assert sorted(PRIORITIES.values()) == list(range(1, batching.priority_levels + 1))
    assert batching.default_priority_level == PRIORITIES["normal"] > PRIORITIES["high"]


@pytest.mark.parametrize("name", SERVED)
def test_no_answer_is_kept(name: str) -> None:
    config = parse(SERVED[name])
    assert config.HasField("response_cache") and not config.response_cache.enable


def test_program_runs_beside_itself_and_holds_no_core() -> None:
    config = parse(RECONSTRUCT_PHOTO)
    (group,) = config.instance_group
    assert (config.backend, config.default_model_filename, config.max_batch_size) == ("python", "model.py", 0)
    assert (group.count, group.kind) == (2, model_config_pb2.ModelInstanceGroup.KIND_CPU)
    assert not group.HasField("rate_limiter")  # it waits for leaves that hold one
    assert [(tensor.name, tensor.optional) for tensor in config.input] == [("photo", False), ("most", True)]
    (leaf,) = parse(REGRESS).instance_group
    assert [(resource.name, resource.count) for resource in leaf.rate_limiter.resources] == [("core", 1)]


def test_every_config_carries_the_signatures_digest() -> None:
    for model in SERVED.values():
        assert parse(model).parameters["chebface.signature"].string_value == signature.digest()[:16]


def test_digest_follows_the_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signature.digest()
    tensor = dataclasses.replace(REGRESS.outputs[0], shape=(436,))
    monkeypatch.setitem(SERVED, "regress", dataclasses.replace(REGRESS, outputs=(tensor,)))
    assert signature.digest() != before


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name: "regress"', 'name: "regres"', "name: signature.py says regress"),
        ("max_batch_size: 32", "max_batch_size: 8", "max_batch_size: signature.py says 32, the file 8"),
        ("TYPE_UINT8 dims: [ 112", "TYPE_FP32 dims: [ 112", "input: signature.py says"),
        ("dims: [ 486 ]", "dims: [ 436 ]", "output: signature.py says"),
        ("backend:", "back-end:", "python -m export repository"),
    ],
)
def test_edited_config_is_refused(old: str, new: str, message: str) -> None:
    text = config_text(REGRESS)
    assert old in text
    with pytest.raises(AssetError, match=message):
        check_config(text.replace(old, new), REGRESS, "regress/config.pbtxt")


def test_input_that_may_no_longer_be_left_out_is_refused() -> None:
    text = config_text(RECONSTRUCT_PHOTO).replace(" optional: true", "")
    with pytest.raises(AssetError, match=r"optional: signature.py says \['most'\], the file \[\]"):
        check_config(text, RECONSTRUCT_PHOTO, "reconstruct_photo")


def test_filled_repository_is_complete_and_filled_once(source: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    first = fill_repository(source, models)
    assert sorted(first["changed"]) == sorted(
        [
            *(f"{name}/config.pbtxt" for name in FILLED),
            *(f"{name}/1/{file}" for name in LEAVES for file in ("model.onnx", "SHA256SUMS")),
            *(f"{name}/1/model.py" for name in PROGRAMS),
        ]
    )
    assert check_repository(models) == models.resolve()
    assert (models / "reconstruct" / "1").is_dir()
    said: list[str] = []
    assert fill_repository(source, models, say=said.append)["changed"] == []
    assert said == [f"{models}: up to date"]
    (models / "decode" / "1" / "model.onnx").write_bytes(b"")
    assert fill_repository(source, models)["changed"] == ["decode/1/model.onnx"]
    assert not list(models.rglob("*.partial"))


def test_missing_or_changed_export_is_refused(source: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    with pytest.raises(AssetError, match="run `python -m export onnx`"):
        fill_repository(tmp_path / "nothing", models)
    (source / "decode.onnx").write_bytes(b"changed")
    with pytest.raises(
        AssetError, match=r"decode\.onnx was changed after its export; export anew with `python -m export onnx --force`"
    ):
        fill_repository(source, models)
    assert not models.exists()


def test_export_of_another_signature_is_refused_whole(source: Path, tmp_path: Path) -> None:
    write(source, "decode", stand_in(REGRESS))
    record(source)
    models = tmp_path / "models"
    with pytest.raises(AssetError, match=r"decode.onnx: inputs: signature.py says"):
        fill_repository(source, models)
    assert not models.exists()


def test_files_of_two_heads_are_refused(source: Path, tmp_path: Path) -> None:
    write(source, "topology", stand_in(LEAVES["topology"]), head="1")
    record(source)
    with pytest.raises(AssetError, match="exported for different heads"):
        fill_repository(source, tmp_path / "models")


def test_missing_packages_are_named(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tritonclient.grpc", None)
        with pytest.raises(MissingDependencyError, match=r"pip install 'chebface\[client\]'"):
            check_config(config_text(REGRESS), REGRESS, "regress")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'chebface\[export\]'"):
        fill_repository(source, tmp_path / "models")


def test_older_version_stays_beside_the_one_that_is_served(source: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    fill_repository(source, models)
    report = fill_repository(source, models, version=2, instances=3, photo_instances=5, detector="centerface")
    assert "decode/2/model.onnx" in report["changed"]
    assert (models / "decode" / "1" / "model.onnx").is_file()
    assert find_model(models, "decode") == models / "decode" / "2" / "model.onnx"
    for name, count in (("reconstruct", 3), ("decode", 3), ("topology", 1)):
        text = (models / name / "config.pbtxt").read_text()
        assert "versions: [ 2 ]" in text and f"count: {count} kind" in text
    photo = (models / "reconstruct_photo" / "config.pbtxt").read_text()
    assert "count: 5" in photo and '"chebface.detector" value { string_value: "centerface" }' in photo
    assert (models / "reconstruct_photo" / "2" / "model.py").is_file()
    check_repository(models)
    run_time = materialise(models, tmp_path / "run")
    assert (run_time / "decode" / "2" / "model.py").read_text() == model_code(SERVED["decode"])


def test_pip_target_is_what_serving_makes(source: Path, tmp_path: Path) -> None:
    pip, ngc = tmp_path / "pip", tmp_path / "ngc"
    fill_repository(source, pip, target="pip")
    fill_repository(source, ngc)
    made = materialise(ngc, tmp_path / "run")
    again = materialise(pip, tmp_path / "again")
    for path in (p for p in made.rglob("*") if p.is_file()):
        relative = path.relative_to(made)
        assert (pip / relative).read_bytes() == path.read_bytes() == (again / relative).read_bytes(), relative
    assert sorted(verify_repository(pip)["models"]) == sorted(LEAVES)
    (pip / "decode" / "1" / "model.py").unlink()
    with pytest.raises(AssetError, match=r"model.py is missing"):
        verify_repository(pip)


def test_either_target_serves_by_either_backend(source: Path, tmp_path: Path) -> None:
    for target in TARGETS:
        fill_repository(source, tmp_path / target, target=target)
        made = materialise(tmp_path / target, tmp_path / f"{target}-native", "onnxruntime")
        for name, model in MODELS.items():
            if name not in OPTIONAL:
                assert (made / name / "config.pbtxt").read_text() == config_text(model)
                assert sorted(path.name for path in (made / name / "1").iterdir()) == ["SHA256SUMS", "model.onnx"]
        program = made / RECONSTRUCT_PHOTO.name
        assert (program / "1" / "model.py").is_file() and 'backend: "python"' in (program / "config.pbtxt").read_text()
    config = tmp_path / "ngc" / "decode" / "config.pbtxt"
    config.write_text(config.read_text().replace('backend: "onnxruntime"', 'backend: "pytorch"'))
    with pytest.raises(AssetError, match=r"decode.config.pbtxt: expected one backend, onnxruntime or python"):
        materialise(tmp_path / "ngc", tmp_path / "never", "onnxruntime")


def test_data_beside_a_model_goes_with_it(source: Path, tmp_path: Path) -> None:
    path, data = source / "decode.onnx", source / "decode.onnx.data"
    onnx.save(onnx.load(path), path, save_as_external_data=True, location=data.name)
    manifest = json.loads((source / MANIFEST).read_text())
    manifest["files"]["decode"] |= describe(path) | {"external": [describe(data)]}
    (source / MANIFEST).write_text(json.dumps(manifest))
    assert "decode/1/decode.onnx.data" in fill_repository(source, tmp_path / "models")["changed"]
    verify_repository(tmp_path / "models")
    made = materialise(tmp_path / "models", tmp_path / "run") / "decode" / "1"
    (vertices,) = onnxruntime.InferenceSession(made / "model.onnx").run(
        ["vertices"], {"parameters": np.zeros((1, 486), np.float32)}
    )
    assert vertices.shape == (1, 5023, 3)


def test_program_of_another_version_is_named(source: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    fill_repository(source, models)
    verify_repository(models)
    program = models / "reconstruct_photo" / "1" / "model.py"
    program.write_text("# an older one\n" + program.read_text())
    with pytest.raises(AssetError, match=r"reconstruct_photo.1.model.py is missing, or of another version"):
        verify_repository(models)
    program.unlink()
    with pytest.raises(AssetError, match=r"python -m export all"):
        verify_repository(models)


def test_decode_without_half_vertices_is_an_old_one(source: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    fill_repository(source, models)
    path = models / "decode" / "1" / "model.onnx"
    old = onnx.load(path)
    del old.graph.output[2], old.graph.node[-1]
    onnx.save(old, path)
    with pytest.raises(AssetError, match=r"decode.*expected .*vertices_half tensor\(float16\).*python -m export all"):
        check_repository(models)


@pytest.mark.parametrize(
    "wish",
    [
        {"target": "ngx"},
        {"version": 0},
        {"instances": 0},
        {"photo_instances": 0},
        {"detector": "server"},
        {"target": "pip", "engines": "x"},
    ],
)
def test_repository_that_cannot_be(source: Path, tmp_path: Path, wish: dict) -> None:
    with pytest.raises(ConfigError):
        fill_repository(source, tmp_path / "models", **wish)
    assert not (tmp_path / "models").exists()


def test_encoder_goes_with_the_export_that_had_it(source: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    fill_repository(source, models)
    (models / "encode").mkdir()
    (models / "encode" / "config.pbtxt").write_text(config_text(SERVED["encode"]))
    with pytest.raises(AssetError, match="has no model file, and Triton refuses that"):
        verify_repository(models)
    said: list[str] = []
    assert fill_repository(source, models, say=said.append)["changed"] == ["encode"]
    assert said[0].startswith("note:")
    assert not (models / "encode").exists()


def _signed(content: bytes) -> bytes:
    proto = onnx.load_model_from_string(content)
    proto.producer_name = "somebody else"
    return proto.SerializeToString()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[: len(content) // 2], "onnxruntime cannot read it"),
        (lambda content: b"", "onnxruntime cannot read it"),
        (lambda content: stand_in(REGRESS).SerializeToString(), "are not those of signature.py"),
        (_signed, "is not the file that was exported"),
    ],
)
def test_damaged_model_file_is_named(source: Path, tmp_path: Path, damage, message: str) -> None:
    models = tmp_path / "models"
    fill_repository(source, models)
    path = models / "decode" / "1" / "model.onnx"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(AssetError, match=rf"decode.1.model.onnx.*{message}"):
        verify_repository(models)


def test_checked_files_have_their_sums(source: Path, tmp_path: Path) -> None:
    fill_repository(source, tmp_path)
    rows = (tmp_path / "decode" / "1" / "SHA256SUMS").read_text().splitlines()
    assert rows == [
        f"{hashlib.sha256((tmp_path / 'decode' / '1' / 'model.onnx').read_bytes()).hexdigest()}  model.onnx"
    ]
    (tmp_path / "decode" / "1" / "SHA256SUMS").unlink()
    with pytest.raises(AssetError, match="SHA256SUMS is missing"):
        verify_repository(tmp_path)


def test_config_of_no_one_version_is_refused(source: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    fill_repository(source, models)
    config = models / "decode" / "config.pbtxt"
    config.write_text(config.read_text().replace("versions: [ 1 ]", "versions: [ 1, 2 ]"))
    with pytest.raises(AssetError, match="expected one version_policy of one specific version"):
        check_repository(models)


@pytest.fixture
def engines(source: Path, tmp_path: Path) -> Path:
    """What `python -m export engine` would leave for decode, in form."""
    folder = tmp_path / "engines"
    folder.mkdir()
    write_engine(folder, source)
    return folder


def write_engine(folder: Path, source: Path, **changes: object) -> None:
    report = {
        "model": "decode",
        "flavour": "tensorrt",
        "architecture": "sm89",
        "engine": {"sha256": hashlib.sha256(b"engine").hexdigest()},
        "onnx": {"sha256": hashlib.sha256((source / "decode.onnx").read_bytes()).hexdigest()},
    }
    (folder / "decode.sm89.trt10.fp32.plan").write_bytes(b"engine")
    (folder / "decode.sm89.trt10.fp32.json").write_text(json.dumps(report | changes))


def test_engines_are_served_by_capability(source: Path, engines: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    fill_repository(source, models, engines=engines)
    text = (models / "decode" / "config.pbtxt").read_text()
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    assert config.backend == "tensorrt"
    assert dict(config.cc_model_filenames) == {"8.9": "model.sm89.plan"}
    assert not config.dynamic_batching.preferred_batch_size  # whole queues are what a GPU wants
    assert (models / "decode" / "1" / "model.sm89.plan").read_bytes() == b"engine"
    assert 'backend: "onnxruntime"' in (models / "regress" / "config.pbtxt").read_text()
    verify_repository(models)
    (models / "decode" / "1" / "model.sm89.plan").write_bytes(b"")
    with pytest.raises(AssetError, match=r"model\.sm89\.plan: is not the file that was exported"):
        verify_repository(models)
    (models / "decode" / "1" / "model.sm89.plan").unlink()
    with pytest.raises(AssetError, match=r"model\.sm89\.plan: SHA256SUMS names it, and it is not there"):
        verify_repository(models)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flavour": "tensorrt_rtx"}, "no TensorRT engine of this export"),
        ({"engine": {"sha256": "0"}}, "not the file that its report describes"),
        ({"onnx": {"sha256": "0"}}, "built from another decode.onnx"),
        ({"architecture": "sm80plus"}, "built for sm80plus"),
        ({"engine": None}, "no report of an engine"),
    ],
)
def test_engine_that_does_not_fit_is_refused(
    source: Path, engines: Path, tmp_path: Path, changes: dict, message: str
) -> None:
    write_engine(engines, source, **changes)
    with pytest.raises(AssetError, match=message):
        fill_repository(source, tmp_path / "models", engines=engines)
    assert not (tmp_path / "models").exists()


def test_native_operators_bring_their_library_and_go_with_them(source, tmp_path, monkeypatch):
    library = tmp_path / "ort.so"
    library.write_bytes(b"compiled")
    monkeypatch.setattr("chebface.operators.library", lambda: library)
    manifest = json.loads((source / MANIFEST).read_text())

    def say(kind):
        manifest["files"]["decode"]["operators"] = kind
        (source / MANIFEST).write_text(json.dumps(manifest))

    say("native")
    with pytest.raises(ConfigError, match=r"decode\.onnx wants native operators.*--target pip"):
        fill_repository(source, tmp_path / "models")
    fill_repository(source, tmp_path / "models", target="pip")
    assert (tmp_path / "models/decode/1/operators.so").read_bytes() == b"compiled"
    assert not (tmp_path / "models/regress/1/operators.so").exists()
    say("standard")
    changed = fill_repository(source, tmp_path / "models", target="pip")["changed"]
    assert (
        changed == ["decode/1/SHA256SUMS", "decode/1/operators.so"]
        and not (tmp_path / "models/decode/1/operators.so").exists()
    )
