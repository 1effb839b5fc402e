"""ONNX export: what torch gives, in files that carry no trace of this machine, or no files at all."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
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
from PIL import Image

from chebface import params, signature
from chebface.checkpoint import load_encoder
from chebface.errors import AssetError, ConfigError, MissingDependencyError
from chebface.flame import Flame
from chebface.heads import Head
from chebface.regressor import Regressor, normalize_crop
from chebface.signature import LEAVES, MODELS
from export import cli, folder, graphs, parity, to_onnx
from export.calibration import read_calibration
from export.engines import can_build, digest_onnx, load_onnx
from export.graphs import check_graph
from export.to_onnx import MANIFEST, ParityError, export_onnx, read_manifest, write_onnx

ROOT = Path(__file__).resolve().parent.parent
FACTS = {
    "version": "0",
    "head": "scatter",
    "head_sha256": "0",
    "weights_sha256": "1",
    "precision": "fp32",
    "opset": 18,
    "operators": "standard",
    "basis": "fp32",
    "onnxslim": "",
}
COUNT = 4  # crops of a comparison


class Tiny(torch.nn.Module):
    """A regressor in form: the crop's 2 x 2 mean colors, mixed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = torch.nn.Linear(12, params.TOTAL)

    def forward(self, crop: torch.Tensor) -> torch.Tensor:
        return self.mix(crop.unflatten(3, (2, 56)).unflatten(2, (2, 56)).mean((3, 5)).flatten(1))


def draw_crops(count: int, seed: int = 0) -> np.ndarray:
    """Blurred patches of color: not noise, which drives activations to where faces never do."""
    small = np.random.default_rng(seed).integers(0, 256, (count, 7, 7, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(one).resize((112, 112), Image.Resampling.BICUBIC)) for one in small])


def draw_parameters(batch: int) -> np.ndarray:
    return (0.5 * np.random.default_rng(batch).normal(size=(batch, params.TOTAL))).astype(np.float32)


@pytest.fixture(autouse=True, scope="module")
def cheap_crops():
    """The scattered head cannot be drawn: it is no face."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_onnx, "make_crops", lambda head, count, seed: (draw_crops(min(count, COUNT), seed), "tests"))
        yield


@pytest.fixture(scope="module")
def scatter() -> Head:
    return scatter_head()


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    return Tiny().eval()


@pytest.fixture(scope="module")
def encoder():
    return load_encoder()[0].encoder


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, scatter: Head, tiny: Tiny, encoder, cheap_crops) -> Path:
    folder = tmp_path_factory.mktemp("onnx")
    write_onnx(folder, tiny, scatter, encoder, FACTS)
    return folder


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch, exported: Path) -> None:
    """Graphs are read back, not made again."""
    monkeypatch.setattr(graphs, "regress_graph", lambda regressor, opset: onnx.load(exported / "regress.onnx"))
    monkeypatch.setattr(graphs, "decode_graph", lambda flame, opset: onnx.load(exported / "decode.onnx"))
    monkeypatch.setattr(graphs, "encode_graph", lambda encoder, opset: onnx.load(exported / "encode.onnx"))


def run(path: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    return onnxruntime.InferenceSession(path).run(None, feeds)


@pytest.mark.parametrize("batch", [1, 3, signature.MAX_BATCH])
def test_regressor_is_torchs(exported: Path, tiny: Tiny, batch: int) -> None:
    crops = draw_crops(batch)
    (found,) = run(exported / "regress.onnx", {"crop": crops})
    with torch.no_grad():
        wanted = tiny(normalize_crop(torch.from_numpy(crops))).numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_crop_goes_in_as_uint8_rgb_rows(exported: Path, tiny: Tiny) -> None:
    crop = np.zeros((1, 112, 112, 3), np.uint8)
    crop[:, :56, 56:, 0] = 255  # red in the upper right quarter
    (found,) = run(exported / "regress.onnx", {"crop": crop})
    colors = torch.full((1, 3, 2, 2), -1.0)  # black is -1, full is +1
    colors[0, 0, 0, 1] = 1.0
    with torch.no_grad():
        wanted = tiny.mix(colors.flatten(1)).numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("batch", [1, signature.MAX_BATCH])
def test_decoder_is_torchs(exported: Path, scatter: Head, batch: int) -> None:
    parameters = draw_parameters(batch)
    vertices, landmarks, half = run(exported / "decode.onnx", {"parameters": parameters})
    wanted = Flame(scatter).decode(torch.from_numpy(parameters))
    np.testing.assert_allclose(vertices, wanted[0], atol=1e-6)
    np.testing.assert_allclose(landmarks, wanted[1], atol=1e-6)
    assert np.array_equal(half, vertices.astype(np.float16))


def test_decoder_at_rest_gives_the_template(exported: Path, scatter: Head) -> None:
    vertices, *_ = run(exported / "decode.onnx", {"parameters": np.zeros((1, params.TOTAL), np.float32)})
    np.testing.assert_allclose(vertices[0], scatter.template, atol=1e-6)


def test_encoder_is_torchs(exported: Path, encoder) -> None:
    meshes = encoder.mean[None].numpy() + 0.003
    with torch.no_grad():
        wanted = encoder(torch.from_numpy(meshes)).numpy()
    np.testing.assert_allclose(run(exported / "encode.onnx", {"vertices": meshes})[0], wanted, rtol=1e-3)


def test_topology_is_the_heads(exported: Path, scatter: Head) -> None:
    faces, facts = run(exported / "topology.onnx", {"request": np.zeros(1, np.int32)})
    assert np.array_equal(faces, scatter.faces)
    assert json.loads(facts[0]) == {
        "name": "scatter",
        "version": "0",
        "licence": "CC0-1.0",
        "sha256": scatter.sha256,
    }


@pytest.mark.parametrize("name", MODELS)
def test_files_are_what_signature_says(exported: Path, name: str) -> None:
    proto = onnx.load(exported / f"{name}.onnx")
    check_graph(proto, MODELS[name], name)
    assert proto.ir_version <= 10
    assert {(entry.domain, entry.version) for entry in proto.opset_import} == {("", 18)}
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    assert metadata.pop("chebface.commit") == to_onnx._commit()
    assert "(x - 127.5) / 127.5" in metadata.pop("chebface.normalization")
    assert metadata == {f"chebface.{key}": str(value) for key, value in FACTS.items()}


def test_files_name_no_path_of_this_machine(exported: Path) -> None:
    for path in exported.glob("*.onnx"):
        content = path.read_bytes()
        for trace in (str(ROOT), sys.prefix, str(Path.home()), "stack_trace", ".py"):
            assert trace.encode() not in content, (path.name, trace)


def test_same_bytes_again(exported: Path, scatter: Head, tiny: Tiny, encoder, tmp_path: Path) -> None:
    write_onnx(tmp_path, tiny, scatter, encoder, FACTS)
    for name in (*(f"{name}.onnx" for name in MODELS), MANIFEST):
        assert (tmp_path / name).read_bytes() == (exported / name).read_bytes(), name


def test_manifest_records_files_and_parity(exported: Path) -> None:
    manifest = read_manifest(exported)
    assert manifest["inputs"] == FACTS
    assert manifest["parity"]["passed"] is True
    assert sorted(manifest["files"]) == sorted(MODELS)
    assert {entry["precision"] for entry in manifest["files"].values()} == {"fp32"}
    assert sorted(path.name for path in exported.iterdir()) == sorted(
        [MANIFEST, "parity.png", *(f"{name}.onnx" for name in MODELS)]
    )


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


def damage(proto: onnx.ModelProto) -> onnx.ModelProto:
    """One weight, by a fifth."""
    tensor = max(proto.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    array = onnx.numpy_helper.to_array(tensor).copy()
    array.flat[np.abs(array).argmax()] *= 1.2
    tensor.raw_data = array.tobytes()
    return proto


@pytest.mark.parametrize("name", ["regress", "decode"])
def test_damaged_weight_leaves_nothing(
    cheap: None, exported: Path, scatter: Head, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    made = damage(onnx.load(exported / f"{name}.onnx"))
    monkeypatch.setattr(graphs, f"{name}_graph", lambda module, opset: made)
    with pytest.raises(ParityError):
        write_onnx(tmp_path, tiny, scatter, None, FACTS)
    assert list(tmp_path.iterdir()) == []


def test_parity_failure_keeps_the_last_good_export(
    exported: Path, scatter: Head, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in exported.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(graphs, "regress_graph", lambda regressor, opset: stand_in(MODELS["regress"]))
    with pytest.raises(ParityError):
        write_onnx(tmp_path, tiny, scatter, None, FACTS)
    assert read_manifest(tmp_path) == read_manifest(exported)


def test_head_without_encoder_has_no_such_file(
    cheap: None, exported: Path, scatter: Head, tiny: Tiny, tmp_path: Path
) -> None:
    (tmp_path / "encode.onnx").write_bytes((exported / "encode.onnx").read_bytes())  # an older export had one
    manifest = write_onnx(tmp_path, tiny, scatter, None, FACTS)
    assert sorted(manifest["files"]) == sorted(LEAVES)
    assert not (tmp_path / "encode.onnx").exists()
    assert read_manifest(tmp_path) is not None


def test_full_disk_leaves_nothing_that_looks_complete(
    cheap: None, exported: Path, scatter: Head, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in exported.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())

    def refuse(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(to_onnx, "write_whole", refuse)
    with pytest.raises(AssetError, match=r"no space left for .* make room or choose another --output"):
        write_onnx(tmp_path, tiny, scatter, None, FACTS)
    assert read_manifest(tmp_path) is None
    assert not list(tmp_path.glob("*.partial"))


@pytest.fixture
def small_disk(tmp_path: Path):
    """Eight megabytes, really."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_really_full_disk(cheap: None, scatter: Head, tiny: Tiny, small_disk: Path) -> None:
    with pytest.raises(AssetError, match=r"no space left for \d+\.\d MB \(.* MB free\); make room or choose another"):
        write_onnx(small_disk / "onnx", tiny, scatter, None, FACTS)
    assert list((small_disk / "onnx").iterdir()) == []


def test_other_trouble_with_the_disk_is_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="broken"), folder.room(tmp_path):
        raise OSError(5, "broken")
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "x"
    words = r"file/x: cannot be written \(Not a directory\); choose another --output"
    with pytest.raises(AssetError, match=words), folder.room(place):
        place.mkdir()


KILLED = """
import os, signal, sys
sys.path[:0] = [{tests!r}, {root!r}]
import onnx
from models_for_tests import scatter_head
from test_export import FACTS, Tiny, draw_crops
from export import graphs, to_onnx
to_onnx.make_crops = lambda head, count, seed: (draw_crops(4, seed), "tests")
made = lambda name: lambda *given: onnx.load({exported!r} + f"/{{name}}.onnx")
graphs.regress_graph, graphs.decode_graph = made("regress"), made("decode")
real, count = os.replace, iter(range(9))
def replace(*paths):
    if next(count) == {after}:
        os.kill(os.getpid(), signal.SIGKILL)
    real(*paths)
os.replace = replace
to_onnx.write_onnx(to_onnx.Path({output!r}), Tiny().eval(), scatter_head(), None, FACTS)
"""


def test_killed_in_the_middle_is_no_export(
    cheap: None, exported: Path, scatter: Head, tiny: Tiny, tmp_path: Path
) -> None:
    shutil.copytree(exported, tmp_path, dirs_exist_ok=True)
    places = {"tests": str(ROOT / "tests"), "root": str(ROOT), "exported": str(exported), "output": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", KILLED.format(after=2, **places)], check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.glob("*.partial")
    assert sorted(path.name for path in left.iterdir()) == ["decode.onnx", "reconstruct.onnx"]
    assert read_manifest(tmp_path) is None
    (tmp_path / f"{os.getpid()}.partial").mkdir()  # of one that still runs
    write_onnx(tmp_path, tiny, scatter, None, FACTS)
    assert not left.exists()
    assert read_manifest(tmp_path) is not None


def test_interrupted_leaves_the_last_export(
    cheap: None, exported: Path, scatter: Head, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*given: object, **options: object) -> None:
        raise KeyboardInterrupt

    shutil.copytree(exported, tmp_path, dirs_exist_ok=True)
    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setattr(to_onnx, "measure", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_onnx(tmp_path, tiny, scatter, None, FACTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert read_manifest(tmp_path) == read_manifest(exported)


def test_too_large_for_one_file_has_its_weights_beside(
    cheap: None, scatter: Head, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(to_onnx, "LARGEST", 1_000_000)
    one, two = tmp_path / "one", tmp_path / "two"
    manifest = write_onnx(one, tiny, scatter, None, FACTS)
    assert manifest["parity"]["passed"] is True
    assert [name for name, entry in manifest["files"].items() if "external" in entry] == ["decode", "reconstruct"]
    (beside,) = manifest["files"]["decode"]["external"]
    assert beside["file"] == "decode.onnx.data"
    assert beside["bytes"] > 20e6
    assert manifest["files"]["decode"]["bytes"] < 1e6
    assert read_manifest(one) is not None
    given = {"parameters": draw_parameters(2)}
    wanted = Flame(scatter).decode(torch.from_numpy(given["parameters"]))[0]
    np.testing.assert_allclose(run(one / "decode.onnx", given)[0], wanted, atol=1e-6)
    assert digest_onnx(one / "decode.onnx", load_onnx(one / "decode.onnx")) != manifest["files"]["decode"]["sha256"]
    write_onnx(two, tiny, scatter, None, FACTS)
    for path in one.iterdir():
        assert (two / path.name).read_bytes() == path.read_bytes(), path.name
    (two / "decode.onnx.data").write_bytes((two / "decode.onnx.data").read_bytes()[:-4] + b"\0\0\0\1")
    assert folder.find_changed(two, manifest) == {"decode": "decode.onnx.data was changed after its export"}
    monkeypatch.undo()
    monkeypatch.setattr(to_onnx, "make_crops", lambda head, count, seed: (draw_crops(COUNT, seed), "tests"))
    write_onnx(one, tiny, scatter, None, FACTS)
    assert not list(one.glob("*.data"))


def test_head_or_encoder_of_another_size_is_refused(tiny: Tiny, scatter: Head, encoder, tmp_path: Path) -> None:
    from heads_for_tests import make_head

    with pytest.raises(AssetError, match="expected 5023 vertices and 9976 faces"):
        write_onnx(tmp_path, tiny, make_head(), None, FACTS)
    other = torch.nn.Module()
    other.mean, other.fc = encoder.mean, torch.nn.Linear(640, 12)
    with pytest.raises(AssetError, match="8 numbers in the descriptor, got 5023 and 12"):
        write_onnx(tmp_path, tiny, scatter, other, FACTS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"precision": "int4"}, "precision: expected one of fp32, fp16, bf16, int8, got 'int4'"),
        ({"opset": 15}, "opset: expected 18 to 21, got 15"),
        ({"precision": "int8", "opset": 21}, "18 at most for int8"),
        ({"crops_for_calibration": np.zeros((2, 112, 112), np.uint8)}, "crops_for_calibration: expected"),
    ],
)
def test_wishes_that_cannot_be(tmp_path: Path, wish: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        export_onnx(tmp_path, **wish)


def test_calibration_is_crops_photographs_or_ranges(tmp_path: Path, astronaut: Path) -> None:
    crops = draw_crops(3)
    np.save(tmp_path / "crops.npy", crops)
    assert np.array_equal(read_calibration(tmp_path / "crops.npy")["crops_for_calibration"], crops)
    (tmp_path / "pictures").mkdir()
    for i, crop in enumerate(crops):
        Image.fromarray(crop).save(tmp_path / "pictures" / f"{i}.png")
    assert np.array_equal(read_calibration(tmp_path / "pictures")["crops_for_calibration"], crops)
    shutil.copy(astronaut, tmp_path / "pictures")
    more = read_calibration(tmp_path / "pictures")["crops_for_calibration"]
    assert len(more) == 4
    face = more[-1][60:100, 30:80].mean((0, 1))
    assert face[0] > face[2] + 15, "skin, not sky"
    known = {"ranges": {"x": 1.5}, "method": "percentile", "crops": 3, "crops_sha256": "0"}
    (tmp_path / "pictures" / "calibration.json").write_text(json.dumps(known | {"layers": 4}))
    for place in (tmp_path / "pictures", tmp_path / "pictures" / "calibration.json"):
        assert read_calibration(place) == {"calibration": known}
    np.save(tmp_path / "flat.npy", crops[0])
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.json").write_text("{}")
    for bad in ("flat.npy", "nothing.npy", "empty", "other.json"):
        with pytest.raises(AssetError, match=rf"calibration .*{bad}: expected calibration.json of an int8 export"):
            read_calibration(tmp_path / bad)


class Convolved(torch.nn.Module):
    """A regressor with layers that int8 is for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Conv2d(3, 8, 16, 16), torch.nn.Conv2d(8, 8, 3)
        self.mix = torch.nn.Linear(200, params.TOTAL)

    def forward(self, crop: torch.Tensor) -> torch.Tensor:
        return 0.1 * self.mix(self.second(self.first(crop).relu()).flatten(1))


def test_same_ranges_give_the_same_bytes(
    shelf: dict, scatter: Head, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    monkeypatch.undo()
    regress = graphs.regress_graph(regressor := Convolved().eval())
    monkeypatch.setattr(to_onnx, "make_crops", lambda head, count, seed: (draw_crops(COUNT, seed), "tests"))
    monkeypatch.setattr("chebface.checkpoint.load_regressor", lambda path=None: (regressor, shelf["card"]))
    monkeypatch.setattr("chebface.heads.open_head", lambda name="open": scatter)
    monkeypatch.setattr(graphs, "regress_graph", lambda regressor, opset: regress)
    wish = {"precision": "int8", "simplify": False}
    first = export_onnx(one, crops_for_calibration=draw_crops(6, seed=9), **wish)
    saved = json.loads((one / "calibration.json").read_text())
    again = export_onnx(two, **read_calibration(one), **wish)
    for name in ("regress", "reconstruct"):
        assert (one / f"{name}.onnx").read_bytes() == (two / f"{name}.onnx").read_bytes()
    kept = json.loads((two / "calibration.json").read_text())
    assert [kept[key] for key in ("ranges", "crops", "crops_sha256")] == [saved["ranges"], 6, saved["crops_sha256"]]
    assert not (two / "calibration.npy").exists()
    assert first["inputs"]["calibration"].startswith("given, 6, sha256 ")
    assert re.match(r"percentile, ranges sha256 \w{64}$", again["inputs"]["calibration"])
    assert not export_onnx(two, **read_calibration(one), **wish)["fresh"]
    export_onnx(three, crops_for_calibration=draw_crops(2, seed=5), **wish)
    assert (one / "regress.onnx").read_bytes() != (three / "regress.onnx").read_bytes()
    saved["ranges"] = {"other": 1.0}
    with pytest.raises(ConfigError, match="ranges: they are of another graph"):
        export_onnx(two, calibration=saved, **wish)
    export_onnx(one, simplify=False)
    assert not list(one.glob("calibration*"))


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(to_onnx.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"torch is not installed: pip install 'chebface\[export\]'"):
        export_onnx(tmp_path)


@pytest.fixture
def shelf(monkeypatch: pytest.MonkeyPatch, cheap: None, scatter: Head, tiny: Tiny, encoder) -> dict:
    """The stand-ins where export_onnx looks for weights, head and encoder."""
    facts = {"name": scatter.name, "version": scatter.version, "sha256": scatter.sha256}
    card = {"head": facts, "training": {"head": scatter.name}, "sha256": "7"}
    model = torch.nn.Module()
    model.encoder = encoder
    asked: dict = {"card": card, "encoder_card": {"head": facts, "sha256": "8"}}
    monkeypatch.setattr("chebface.checkpoint.load_regressor", lambda path=None: (tiny, card))
    monkeypatch.setattr("chebface.checkpoint.load_encoder", lambda path=None: (model, asked["encoder_card"]))
    monkeypatch.setattr("chebface.heads.open_head", lambda name="open": asked.update(head=name) or scatter)
    return asked


def test_up_to_date_export_is_left_alone(shelf: dict, tmp_path: Path) -> None:
    first = export_onnx(tmp_path, simplify=False)
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert first["fresh"] is True
    assert shelf["head"] == "scatter"
    assert {"checkpoint_sha256": "7", "encoder_sha256": "8", "head": "scatter"}.items() <= first["inputs"].items()
    said: list[str] = []
    again = export_onnx(tmp_path, simplify=False, say=said.append)
    assert again == {key: value for key, value in first.items() if key != "seconds"} | {"fresh": False}
    assert said == [f"{tmp_path}: up to date"]
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times
    (tmp_path / "topology.onnx").write_bytes(b"")
    assert export_onnx(tmp_path, simplify=False)["fresh"] is True
    assert export_onnx(tmp_path, simplify=False, force=True)["fresh"] is True


def test_file_edited_by_hand_is_judged_not_overwritten(shelf: dict, exported: Path, tmp_path: Path) -> None:
    words = ("-o", tmp_path, "--no-simplify", "--no-engine", "--repository", tmp_path / "models")
    assert invoke("all", *words).exit_code == 0
    path = tmp_path / "regress.onnx"
    good = path.read_bytes()
    onnx.save(damage(onnx.load(path)), path)
    bad = path.read_bytes()
    for command in (("onnx", *words[:3]), ("all", *words)):
        done = invoke(*command, "--json")
        assert done.exit_code == 3
        message = json.loads(done.stdout)["message"]
        assert "regress.onnx was changed after its export, and is wrong now (fp32 differs from torch on" in message
        assert "export anew with --force" in message
        assert path.read_bytes() == bad
    edited = onnx.load_from_string(good)
    edited.doc_string = "mine"
    onnx.save(edited, path)
    with pytest.raises(AssetError, match=r"has another sha256\), but computes the same still; keep it elsewhere"):
        export_onnx(tmp_path, simplify=False)
    with pytest.raises(AssetError, match=r"regress.onnx was changed after its export \(manifest.json has another"):
        export_onnx(tmp_path, simplify=False, opset=19)
    path.write_bytes(good[:-100])
    said: list[str] = []
    assert export_onnx(tmp_path, simplify=False, say=said.append)["fresh"]
    assert f"note: {tmp_path}: regress.onnx was changed after its export; exporting again" in said
    assert path.read_bytes() == good
    path.unlink()
    assert export_onnx(tmp_path, simplify=False, say=said.append)["fresh"]
    assert f"note: {tmp_path}: regress.onnx is missing; exporting again" in said
    onnx.save(damage(onnx.load(path)), path)
    assert invoke("onnx", *words[:3], "--force").exit_code == 0
    assert path.read_bytes() == good


def test_dry_run_says_why_and_writes_nothing(shelf: dict, tmp_path: Path) -> None:
    words = ("-o", tmp_path / "onnx", "--no-simplify", "--dry-run")
    assert f"{tmp_path / 'onnx'}: would be exported: no whole export there" in invoke("onnx", *words).stdout
    done = invoke("all", *words, "--repository", tmp_path / "models", "--json")
    assert (done.exit_code, json.loads(done.stdout)["because"]) == (0, "no whole export there")
    assert list(tmp_path.iterdir()) == []
    export_onnx(tmp_path / "onnx", simplify=False)
    assert "up to date" in invoke("onnx", *words).stdout
    assert "would be exported: opset changed" in invoke("onnx", *words, "--opset", "19").stdout
    assert "would be exported: it was asked for" in invoke("onnx", *words, "--force").stdout


def test_cuda_where_there_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command in ("onnx", "all", "benchmark"):
        done = invoke(command, "--device", "cuda", "-o", tmp_path)
        assert done.exit_code == 4
        assert "device: cuda, but torch sees no GPU here" in done.stderr
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(MissingDependencyError, match="onnxruntime is without it: pip install onnxruntime-gpu"):
        parity.check_device("cuda")
    with pytest.raises(ConfigError, match="device: expected cpu or cuda, got 'tpu'"):
        parity.check_device("tpu")


def test_weights_or_encoder_of_another_head_are_refused(shelf: dict, tmp_path: Path) -> None:
    other = shelf["card"]["head"] | {"sha256": "f" * 64}
    shelf["encoder_card"]["head"] = other
    with pytest.raises(AssetError, match="trained on head"):
        export_onnx(tmp_path, encoder=tmp_path / "encoder.safetensors")
    shelf["card"]["head"] = other
    with pytest.raises(AssetError, match="trained on head"):
        export_onnx(tmp_path)


def test_shipped_encoder_of_another_head_is_left_out(shelf: dict, tmp_path: Path) -> None:
    shelf["encoder_card"]["head"] = shelf["card"]["head"] | {"sha256": "f" * 64}
    said: list[str] = []
    report = export_onnx(tmp_path, simplify=False, say=said.append)
    assert "encode" not in report["files"]
    assert report["inputs"]["encoder_sha256"] == ""
    assert said[0].startswith("note: no mesh encoder is known for head scatter")


def invoke(*words: str):
    return CliRunner().invoke(cli.main, [str(word) for word in words])


def test_command_writes_reports_and_repeats(shelf: dict, tmp_path: Path) -> None:
    onnx_folder, models = tmp_path / "onnx", tmp_path / "models"
    done = invoke("all", "-o", onnx_folder, "--repository", models, "--json")
    assert done.exit_code == 0, done.output
    engines = len(list((onnx_folder / "engines").glob("*.plan")))
    assert engines == (4 if can_build() else 0)
    report = json.loads(done.stdout)
    assert report["ok"]
    assert report["fresh"]
    assert {f"{name}/config.pbtxt" for name in MODELS} <= set(report["changed"])
    again = invoke("all", "-o", onnx_folder, "--repository", models)
    assert again.exit_code == 0
    assert again.stdout.count("up to date") == 2 + engines
    assert invoke("repository", "-o", onnx_folder, "--repository", models, "-q").output == ""
    checked = invoke("repository", "--check", "--repository", models)
    assert checked.exit_code == 0
    assert "as it should be" in checked.stdout
    (models / "decode" / "1" / "model.onnx").write_bytes(b"")
    assert invoke("repository", "--check", "--repository", models).exit_code == 1
    table = invoke("onnx", "-o", onnx_folder).stdout
    for name in MODELS:
        assert f"{name}.onnx" in table
    assert "p50 ms" not in table
    assert report["latency"]["files"].keys() == MODELS.keys() - {"topology"}
    timed = invoke("onnx", "-o", onnx_folder, "--benchmark", "--batch", "3").stdout
    assert re.search(r"onnxruntime on cpu, batch 3\n +file .* p50 ms +x torch\n +regress.onnx .* \d\.\d{3} +\d", timed)


def test_int8_is_another_name_for_a_precision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[dict] = []
    monkeypatch.setattr(cli, "export_onnx", lambda output, **options: asked.append(options) or {"fresh": False})
    monkeypatch.setattr(cli, "_summary", lambda report, output: "")
    for words in ((), ("--half",), ("--int8",), ("--precision", "bf16", "--no-simplify", "--opset", "20")):
        assert invoke("onnx", "-o", tmp_path, *words).exit_code == 0
    assert [options["precision"] for options in asked] == ["fp32", "fp16", "int8", "bf16"]
    assert (asked[0]["simplify"], asked[3]["simplify"], asked[3]["opset"]) == (None, False, 20)
    wrong = invoke("onnx", "--precision", "fp61")
    assert wrong.exit_code == 2
    assert "'fp32', 'fp16', 'bf16', 'int8'. Did you mean 'fp16'?" in wrong.stderr
    assert "Did you mean" not in invoke("onnx", "--precision", "zzz").stderr


def test_profile_and_batch_reach_the_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict] = []
    nothing = {"engines": {}, "skipped": {}}
    monkeypatch.setattr(cli, "build_engines", lambda folder, output, **options: asked.append(options) or nothing)
    for words in ((), ("--batch", "64"), ("--profile", "1,1,1", "--profile", "2,4,8", "--workspace", "64")):
        assert invoke("engine", *words).exit_code == 0
    assert [each["batch"] for each in asked] == [[(1, 8, 32)], [(1, 64, 64)], [(1, 1, 1), (2, 4, 8)]]
    assert [each["workspace_mb"] for each in asked] == [None, None, 64]
    wrong = invoke("engine", "--profile", "1,many")
    assert (wrong.exit_code, "expected MIN,BEST,MAX as 1,8,32" in wrong.stderr) == (2, True)


def test_stages_are_shown_on_a_terminal_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for quiet, wanted in ((False, "note: stays\n"), (True, "")):
        with cli._stages(quiet) as say:
            say("regress: tracing")
            say("note: stays")
        assert capsys.readouterr() == ("", wanted)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with cli._stages(False) as say:
        say("regress: tracing")
        say("note: stays")
        say("decode: building")
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(r"\d\.\d s  regress: tracing", err)
    assert "note: stays" in err
    assert "\N{BOX DRAWINGS HEAVY HORIZONTAL}" in err, "a bar"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ParityError("p"), 3),
        (MissingDependencyError("m"), 4),
        (ConfigError("c"), 2),
        (AssetError("a"), 1),
        (OSError("o"), 1),
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


@pytest.mark.parametrize("command", [(), ("onnx",), ("engine",), ("repository",), ("all",), ("benchmark",)])
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
        if option.param_type_name == "argument":
            continue
        assert option.help, option.name


def test_real_network_exports_within_the_limit(scatter: Head, tmp_path: Path) -> None:
    torch.manual_seed(0)
    regressor = Regressor()
    for module in regressor.modules():
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d):
            module.momentum = None
    crops = normalize_crop(torch.from_numpy(draw_crops(8, seed=3)))
    with torch.no_grad():  # an untrained network answers all alike; statistics of real-looking crops wake it
        regressor.train()(crops)
        spread = regressor.eval()(crops).std(0).mean()
    manifest = write_onnx(tmp_path, regressor, scatter, None, FACTS)
    assert spread > 1e-2
    assert manifest["parity"]["passed"] is True
    norms = [n for n in onnx.load(tmp_path / "regress.onnx").graph.node if n.op_type == "BatchNormalization"]
    assert len(norms) <= 1
