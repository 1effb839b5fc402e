"""ONNX export: what torch gives, in files that carry no trace of this machine, or no files at all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from models_for_tests import scatter_head, stand_in

from chebface import params, signature
from chebface.errors import AssetError, ConfigError, MissingDependencyError
from chebface.flame import Flame
from chebface.heads import Head
from chebface.regressor import Regressor, normalize_crop
from chebface.signature import DECODE, LEAVES, REGRESS, TOPOLOGY
from export import cli, to_onnx
from export.to_onnx import (
    MANIFEST,
    ParityError,
    check_graph,
    draw_crops,
    draw_parameters,
    export_onnx,
    read_manifest,
    write_onnx,
)

ROOT = Path(__file__).resolve().parent.parent
FACTS = {"version": "0", "head": "scatter", "head_sha256": "0", "weights_sha256": "1"}


class Tiny(torch.nn.Module):
    """A regressor in form: the crop's 2 x 2 mean colours, mixed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = torch.nn.Linear(12, params.TOTAL)

    def forward(self, crop: torch.Tensor) -> torch.Tensor:
        return self.mix(crop.unflatten(3, (2, 56)).unflatten(2, (2, 56)).mean((3, 5)).flatten(1))


@pytest.fixture(scope="module")
def scatter() -> Head:
    return scatter_head()


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    return Tiny().eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, scatter: Head, tiny: Tiny) -> Path:
    folder = tmp_path_factory.mktemp("onnx")
    write_onnx(folder, tiny, Flame(scatter), scatter, FACTS)
    return folder


def run(path: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    return onnxruntime.InferenceSession(path).run(None, feeds)


@pytest.mark.parametrize("batch", [1, 3, signature.MAX_BATCH])
def test_regressor_is_torchs(exported: Path, tiny: Tiny, batch: int) -> None:
    crops = draw_crops(np.random.default_rng(batch), batch)
    (found,) = run(exported / "regress.onnx", {"crop": crops})
    with torch.no_grad():
        wanted = tiny(normalize_crop(torch.from_numpy(crops))).numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_crop_goes_in_as_uint8_rgb_rows(exported: Path, tiny: Tiny) -> None:
    crop = np.zeros((1, 112, 112, 3), np.uint8)
    crop[:, :56, 56:, 0] = 255  # red in the upper right quarter
    (found,) = run(exported / "regress.onnx", {"crop": crop})
    colours = torch.full((1, 3, 2, 2), -1.0)  # black is -1, full is +1
    colours[0, 0, 0, 1] = 1.0
    with torch.no_grad():
        wanted = tiny.mix(colours.flatten(1)).numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 3, signature.MAX_BATCH])
def test_decoder_is_torchs(exported: Path, scatter: Head, batch: int) -> None:
    parameters = draw_parameters(np.random.default_rng(batch), batch)
    vertices, landmarks = run(exported / "decode.onnx", {"parameters": parameters})
    wanted = Flame(scatter).decode(torch.from_numpy(parameters))
    np.testing.assert_allclose(vertices, wanted[0], atol=1e-6)
    np.testing.assert_allclose(landmarks, wanted[1], atol=1e-6)


def test_decoder_at_rest_gives_the_template(exported: Path, scatter: Head) -> None:
    vertices, _ = run(exported / "decode.onnx", {"parameters": np.zeros((1, params.TOTAL), np.float32)})
    np.testing.assert_allclose(vertices[0], scatter.template, atol=1e-6)


def test_topology_is_the_heads(exported: Path, scatter: Head) -> None:
    faces, facts = run(exported / "topology.onnx", {"request": np.zeros(1, np.int32)})
    assert np.array_equal(faces, scatter.faces)
    assert json.loads(facts[0]) == {
        "name": "scatter",
        "version": "0",
        "licence": "CC0-1.0",
        "sha256": scatter.sha256,
    }


@pytest.mark.parametrize("name", LEAVES)
def test_files_are_what_signature_says(exported: Path, name: str) -> None:
    proto = onnx.load(exported / f"{name}.onnx")
    check_graph(proto, LEAVES[name], name)
    assert proto.ir_version <= 10
    assert {(entry.domain, entry.version) for entry in proto.opset_import} == {("", 18)}
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    assert metadata == {f"chebface.{key}": value for key, value in FACTS.items()} | {"chebface.precision": "fp32"}


def test_files_name_no_path_of_this_machine(exported: Path) -> None:
    for path in exported.glob("*.onnx"):
        content = path.read_bytes()
        for trace in (str(ROOT), sys.prefix, str(Path.home()), "stack_trace", ".py"):
            assert trace.encode() not in content, (path.name, trace)


def test_same_bytes_again(exported: Path, scatter: Head, tiny: Tiny, tmp_path: Path) -> None:
    write_onnx(tmp_path, tiny, Flame(scatter), scatter, FACTS)
    for name in (*(f"{name}.onnx" for name in LEAVES), MANIFEST):
        assert (tmp_path / name).read_bytes() == (exported / name).read_bytes(), name


def test_manifest_records_files_and_parity(exported: Path) -> None:
    manifest = read_manifest(exported)
    assert manifest["inputs"] == FACTS
    assert manifest["parity"]["passed"] is True
    assert 0 < manifest["parity"]["vertex_mm"] < 0.01
    assert sorted(manifest["files"]) == sorted(LEAVES)
    assert sorted(path.name for path in exported.iterdir()) == sorted([MANIFEST, *(f"{name}.onnx" for name in LEAVES)])


def test_manifest_of_changed_files_does_not_count(exported: Path, tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    for path in exported.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert read_manifest(tmp_path) is not None
    with open(tmp_path / "topology.onnx", "ab") as file:
        file.write(b"\0")
    assert read_manifest(tmp_path) is None
    (tmp_path / MANIFEST).write_text("[]")
    assert read_manifest(tmp_path) is None


def wrong_colours(regressor: torch.nn.Module) -> torch.nn.Module:
    """The classic mistake: blue where red should be."""

    class Wrong(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.regressor = regressor

        def forward(self, crop: torch.Tensor) -> torch.Tensor:
            return self.regressor(normalize_crop(crop).flip(1))

    return Wrong().eval()


def test_parity_failure_leaves_nothing(
    exported: Path, scatter: Head, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = to_onnx._trace
    decoder = onnx.load(exported / "decode.onnx")
    monkeypatch.setattr(to_onnx, "_trace", lambda module, model: decoder if model is DECODE else trace(module, model))
    monkeypatch.setattr(to_onnx, "_regress_module", wrong_colours)
    with pytest.raises(ParityError, match=r"vertices by .* mm \(limit 0.01\)"):
        write_onnx(tmp_path, tiny, Flame(scatter), scatter, FACTS)
    assert list(tmp_path.iterdir()) == []


def test_parity_failure_keeps_the_last_good_export(
    exported: Path, scatter: Head, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in exported.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(to_onnx, "_trace", lambda module, model: stand_in(model))
    with pytest.raises(ParityError):
        write_onnx(tmp_path, tiny, Flame(scatter), scatter, FACTS)
    assert read_manifest(tmp_path) == read_manifest(exported)


def test_exporter_that_gives_nothing(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **options: None)
    with pytest.raises(ParityError, match="gave nothing"):
        to_onnx._trace(tiny, REGRESS)


def test_topology_of_another_head_is_no_parity(exported: Path, tiny: Tiny) -> None:
    other = scatter_head(seed=1)
    paths = {name: exported / f"{name}.onnx" for name in LEAVES}
    with pytest.raises(ParityError, match="triangles and facts"):
        to_onnx.compare(paths, tiny, Flame(other), other)


def test_not_finite_or_not_the_shape_is_no_parity() -> None:
    assert to_onnx._worse(1.0, np.full((1, 2), np.nan), np.zeros((1, 2))) == float("inf")
    assert to_onnx._worse(0.0, np.full((1, 2, 3), 1.0), np.zeros((1, 2, 3))) == pytest.approx(3**0.5)
    with pytest.raises(ParityError, match="gives"):
        to_onnx._worse(0.0, np.zeros((1, 2)), np.zeros((2, 2)))


def test_head_of_another_size_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    from heads_for_tests import make_head

    head = make_head()
    with pytest.raises(AssetError, match="expected 5023 vertices and 9976 faces"):
        write_onnx(tmp_path, tiny, Flame(head), head, FACTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda proto: setattr(proto.graph.output[0], "name", "params"), "not a valid ONNX graph"),
        (lambda proto: setattr(proto, "ir_version", 13), "IR 10"),
        (lambda proto: setattr(proto.opset_import[0], "version", 21), "opset 18 at most"),
        (lambda proto: proto.graph.input[0].type.tensor_type.shape.dim[0].ClearField("dim_param"), "signature.py says"),
    ],
)
def test_graphs_that_are_not_ours_are_refused(change, message: str) -> None:
    proto = stand_in(TOPOLOGY if "valid" in message or "at most" in message else DECODE)
    change(proto)
    with pytest.raises(AssetError, match=message):
        check_graph(proto, DECODE if "signature" in message else TOPOLOGY, "file")


def test_graph_of_another_model_is_refused() -> None:
    with pytest.raises(AssetError, match=r"inputs: signature.py says .*'crop'.*, the file .*'parameters'"):
        check_graph(stand_in(DECODE), REGRESS, "regress.onnx")


def test_drawn_crops_and_parameters_are_seeded_and_varied() -> None:
    one, two = (draw_crops(np.random.default_rng(3), 4) for _ in range(2))
    assert np.array_equal(one, two)
    assert one.shape == (4, 112, 112, 3)
    assert one.dtype == np.uint8
    assert len({crop.tobytes() for crop in one}) == 4
    assert draw_parameters(np.random.default_rng(3), 4).dtype == np.float32


def test_limit_must_be_above_zero(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="limit_mm"):
        export_onnx(tmp_path, limit_mm=0.0)


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(to_onnx.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"torch is not installed: pip install 'chebface\[export\]'"):
        export_onnx(tmp_path)


@pytest.fixture
def shelf(monkeypatch: pytest.MonkeyPatch, exported: Path, scatter: Head, tiny: Tiny) -> dict:
    """The stand-ins where export_onnx looks for weights and head; tracing is made cheap."""
    facts = {"name": scatter.name, "version": scatter.version, "sha256": scatter.sha256}
    card = {"head": facts, "training": {"head": scatter.name}}
    asked: dict = {"card": card}
    monkeypatch.setattr(to_onnx, "_trace", lambda module, model: onnx.load(exported / f"{model.name}.onnx"))
    monkeypatch.setattr("chebface.checkpoint.load_regressor", lambda path=None: (tiny, card))
    monkeypatch.setattr("chebface.heads.open_head", lambda name="open": asked.update(head=name) or scatter)
    return asked


def test_up_to_date_export_is_left_alone(shelf: dict, tmp_path: Path) -> None:
    first = export_onnx(tmp_path)
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert first["fresh"] is True
    assert shelf["head"] == "scatter"
    said: list[str] = []
    again = export_onnx(tmp_path, say=said.append)
    assert again == {key: value for key, value in first.items() if key != "seconds"} | {"fresh": False}
    assert said == [f"{tmp_path}: up to date"]
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times
    (tmp_path / "topology.onnx").write_bytes(b"")
    assert export_onnx(tmp_path)["fresh"] is True
    assert export_onnx(tmp_path, force=True)["fresh"] is True


def test_weights_of_another_head_are_refused(shelf: dict, tmp_path: Path) -> None:
    shelf["card"]["head"] = shelf["card"]["head"] | {"sha256": "f" * 64}
    with pytest.raises(AssetError, match="trained on head"):
        export_onnx(tmp_path)


def invoke(*words: str):
    return CliRunner().invoke(cli.main, [str(word) for word in words])


def test_command_writes_reports_and_repeats(shelf: dict, tmp_path: Path) -> None:
    onnx_folder, models = tmp_path / "onnx", tmp_path / "models"
    done = invoke("all", "-o", onnx_folder, "--repository", models, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["ok"]
    assert report["fresh"]
    assert len(report["changed"]) == 7
    again = invoke("all", "-o", onnx_folder, "--repository", models)
    assert again.exit_code == 0
    assert again.stdout.count("up to date") == 2
    assert invoke("repository", "-o", onnx_folder, "--repository", models, "-q").output == ""
    assert "at most" in invoke("onnx", "-o", onnx_folder).stdout


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ParityError("p"), 3),
        (MissingDependencyError("m"), 4),
        (ConfigError("c"), 2),
        (AssetError("a"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: BaseException, code: int) -> None:
    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(cli, "export_onnx", fail)
    done = invoke("onnx", "-o", tmp_path, "--json")
    assert done.exit_code == code
    if code != 130:
        assert json.loads(done.stdout) == {"ok": False, "error": type(error).__name__, "message": str(error)}
        assert "error:" in done.stderr


def test_unknown_option_is_a_usage_error() -> None:
    assert invoke("onnx", "--speed", "9").exit_code == 2


@pytest.mark.parametrize("command", [(), ("onnx",), ("repository",), ("all",)])
def test_every_option_has_help(command: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "export", *command, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "Options:" in done.stdout
    for option in [p for c in (cli.main.commands[name] for name in command) for p in c.params]:
        assert option.help, option.name


def test_real_network_exports_within_the_limit(scatter: Head, tmp_path: Path) -> None:
    torch.manual_seed(0)
    regressor = Regressor()
    for module in regressor.modules():
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d):
            module.momentum = None
    crops = normalize_crop(torch.from_numpy(draw_crops(np.random.default_rng(0), 8)))
    with torch.no_grad():  # an untrained network answers all alike; statistics of real-looking crops wake it
        regressor.train()(crops)
        spread = regressor.eval()(crops).std(0).mean()
    manifest = write_onnx(tmp_path, regressor, Flame(scatter), scatter, FACTS)
    assert spread > 1e-2
    assert manifest["parity"]["vertex_mm"] < 0.01
