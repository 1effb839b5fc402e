"""Backbones, regressor and checkpoints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from chebface import checkpoint, params
from chebface.arcface import BACKBONES, build_backbone
from chebface.errors import AssetError, ConfigError, InputError
from chebface.regressor import CAMERA_BIAS, Regressor, normalize_crop


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = Regressor("light").eval()
    head = {"name": "t", "version": "1", "sha256": "0" * 64}
    card = {"backbone": "light", "normalize": False, "skip": False, "head": head}
    return model, checkpoint.save(tmp_path / "r.safetensors", model.state_dict(), card)


def rewrite(path, header):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, path, header)


@pytest.mark.parametrize("name", ["mobilefacenet", "light", "iresnet18"])
def test_backbones_embed(name):
    with torch.inference_mode():
        assert build_backbone(name).eval()(torch.zeros(2, 3, 112, 112)).shape == (2, 512)


def test_names_are_those_of_arcface_torch():
    """Contract: published weights load unchanged."""
    with torch.device("meta"):
        keys = {name: build_backbone(name).state_dict() for name in BACKBONES}
    assert {"conv1.weight", "prelu.weight", "fc.bias", "features.running_mean"} <= keys["iresnet100"].keys()
    assert keys["iresnet100"]["layer3.29.conv2.weight"].shape == (256, 256, 3, 3)
    assert keys["iresnet50"]["layer3.13.bn3.weight"].shape == (256,)
    assert keys["iresnet18"]["layer2.0.downsample.0.weight"].shape == (128, 64, 1, 1)
    assert keys["iresnet34"]["fc.weight"].shape == (512, 25088)
    mobile = keys["mobilefacenet"]
    assert mobile["layers.1.layers.0.weight"].shape == (128, 2, 3, 3)
    assert mobile["layers.3.layers.2.layers.1.layers.0.weight"].shape == (128, 1, 3, 3)
    assert mobile["conv_sep.layers.0.weight"].shape == (512, 256, 1, 1)
    assert mobile["features.layers.0.layers.0.weight"].shape == (512, 1, 7, 7)
    assert mobile["features.layers.3.running_var"].shape == (512,)


def test_unknown_backbone_is_named():
    with pytest.raises(ConfigError, match="resnet7"):
        build_backbone("resnet7")


def test_regressor_starts_at_a_sensible_camera_and_passes_gradient():
    torch.manual_seed(1)
    model = Regressor("light").train()
    out = model(torch.rand(4, 3, 112, 112) * 2 - 1)
    assert out.shape == (4, params.TOTAL)
    camera = params.split(out)["camera"].detach()
    assert (camera - torch.tensor(CAMERA_BIAS)).abs().max() < 4
    out.square().sum().backward()
    assert model.backbone.stem.layers[0].weight.grad.abs().max() > 0


def test_normalized_embedding_ignores_its_length():
    torch.manual_seed(2)
    model = Regressor("light", normalize=True).eval()
    crop = torch.rand(1, 3, 112, 112)
    with torch.inference_mode():
        before = model(crop)
        model.backbone.features.layers[3].weight *= 3
        model.backbone.features.layers[3].bias *= 3
        assert torch.allclose(model(crop), before, atol=1e-4)


def test_regressor_refuses_other_sizes():
    with pytest.raises(InputError, match="112"):
        Regressor("light")(torch.zeros(1, 3, 224, 224))


def test_normalize_crop_is_arcface():
    crop = torch.tensor([0, 127, 255], dtype=torch.uint8).reshape(1, 1, 1, 3)
    got = normalize_crop(crop)
    assert got.shape == (1, 3, 1, 1)
    assert got.flatten().tolist() == pytest.approx([-1.0, -0.5 / 127.5, 1.0])


def test_checkpoint_comes_back(saved):
    model, path = saved
    loaded, card = checkpoint.load_regressor(path)
    crop = torch.rand(1, 3, 112, 112)
    with torch.inference_mode():
        assert torch.equal(loaded(crop), model(crop))
    assert card["head"]["name"] == "t"
    assert not list(path.parent.glob("*.partial"))


def test_half_precision_weights_load(saved, tmp_path):
    model, path = saved
    _, card = checkpoint.load(path)
    small = checkpoint.save(tmp_path / "h.safetensors", checkpoint.half(model.state_dict()), card)
    assert small.stat().st_size < 0.55 * path.stat().st_size
    loaded, _ = checkpoint.load_regressor(small)
    assert next(loaded.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:1000]), "not readable"),
        (lambda p: p.write_bytes(b""), "not readable"),
        (lambda p: p.write_bytes(p.read_bytes()[:-4] + b"\0\0\0\1"), "damaged"),
        (lambda p: p.unlink(), "not found"),
        (lambda p: rewrite(p, {}), "no chebface card"),
        (lambda p: rewrite(p, {"chebface": "{"}), "not readable"),
        (lambda p: rewrite(p, {"chebface": '{"format": 99}'}), "format 99"),
    ],
)
def test_damaged_checkpoints_are_refused(saved, damage, says):
    _, path = saved
    damage(path)
    with pytest.raises(AssetError, match=says):
        checkpoint.load_regressor(path)


def test_a_damaged_weight_ends_the_export_with_3(saved, tmp_path):
    _, path = saved
    content = bytearray(path.read_bytes())
    content[-1000] ^= 64
    path.write_bytes(content)
    command = [sys.executable, "-m", "export", "all", "--checkpoint", str(path)]
    command += ["-o", str(tmp_path / "export"), "--repository", str(tmp_path / "models")]
    result = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
    assert result.returncode == 3 and "damaged" in result.stderr
    assert not (tmp_path / "models").exists() and not list((tmp_path / "export").glob("*.onnx"))


def test_weights_of_another_architecture_are_refused(saved):
    _, path = saved
    tensors, card = checkpoint.load(path)
    checkpoint.save(path, tensors, card | {"backbone": "iresnet18"})
    with pytest.raises(AssetError, match="not a regressor"):
        checkpoint.load_regressor(path)


def test_failed_save_keeps_what_was_there(saved, monkeypatch):
    model, path = saved
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(path, {"x": torch.zeros(1)}, {})
    assert path.read_bytes() == before
    assert not list(path.parent.glob("*.partial"))
    assert checkpoint.load_regressor(path)[0] is not model


def test_weights_and_head_must_belong_together(saved):
    from heads_for_tests import make_head

    _, card = checkpoint.load(saved[1])
    with pytest.raises(AssetError, match="trained on head t 1"):
        checkpoint.check_head(card, make_head())


def test_the_mean_of_runs_is_their_mean(tmp_path):
    paths = []
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        tensors = {"weight": torch.randn(3, 2), "count": torch.tensor(seed)}
        paths.append(checkpoint.save(tmp_path / f"{seed}.safetensors", tensors, {"head": {"sha256": "a"}, "run": seed}))
    mean, card = checkpoint.load(checkpoint.average(paths, tmp_path / "mean.safetensors"))
    members = [checkpoint.load(path) for path in paths]
    wanted = sum(tensors["weight"] for tensors, _ in members) / 3
    assert torch.allclose(mean["weight"], wanted) and mean["count"] == 3
    assert card["run"] == 3 and card["averaged"] == [facts["sha256"] for _, facts in members]


def test_runs_of_other_networks_have_no_mean(tmp_path):
    one = checkpoint.save(tmp_path / "one.safetensors", {"weight": torch.ones(2)}, {"head": {"sha256": "a"}})
    other = checkpoint.save(tmp_path / "other.safetensors", {"weight": torch.ones(3)}, {"head": {"sha256": "a"}})
    head = checkpoint.save(tmp_path / "head.safetensors", {"weight": torch.ones(2)}, {"head": {"sha256": "b"}})
    for paths, says in (([one], "two checkpoints or more"), ([one, other], "other.safetensors is of another"),
                        ([one, head], "another network or head")):  # fmt: skip
        with pytest.raises(AssetError, match=says):
            checkpoint.average(paths, tmp_path / "mean.safetensors")
    assert not (tmp_path / "mean.safetensors").exists()
