"""The training loop: what is trained, parts of a batch, two processes, and what is refused."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from heads_for_tests import make_head

from chebface import checkpoint, train
from chebface.arcface import build_backbone, last_blocks
from chebface.config import Synthesize, TrainReconstructor, load
from chebface.data.synthetic import synthesize
from chebface.errors import AssetError, ConfigError, MissingDependencyError
from chebface.heads import asset


@pytest.fixture(scope="module")
def head_file(tmp_path_factory):
    return asset.save(make_head(6), tmp_path_factory.mktemp("head") / "small.npz")


@pytest.fixture(scope="module")
def pairs(head_file, tmp_path_factory):
    """16 photographs, two of each person."""
    folder = tmp_path_factory.mktemp("pairs")
    settings = load(Synthesize, None, [f"head={head_file}", "count=16", "images_per_actor=2"])
    synthesize(folder, settings, workers=1)
    return folder


def settings(head_file, **changes):
    """Fine-tuning of the last blocks with frozen statistics: nothing depends on how a batch is cut."""
    values = {"backbone": "light", "head": head_file, "steps": 3, "batch": 4, "learning_rate": 1e-3, "log_every": 1}
    values |= {"lambda_descriptor": 0, "weight_identity": 0, "save_every": 3} | changes
    return load(TrainReconstructor, None, [f"{key}={value}" for key, value in values.items()])


def rows_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def frozen_statistics(monkeypatch):
    monkeypatch.setattr(train, "_set_mode", lambda model: model.eval())


def test_only_the_last_blocks_are_trained(head_file):
    model = train.build_model(settings(head_file), asset.load(head_file))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    backbone = {name.removeprefix("backbone.") for name in trained if name.startswith("backbone.")}
    assert backbone and all(name.startswith(last_blocks("light")) for name in backbone)
    assert {name for name in trained if not name.startswith("backbone.")} == {
        name for name, _ in model.named_parameters() if not name.startswith("backbone.")
    }
    train._set_mode(model)
    assert not model.backbone.stem.layers[1].training and model.backbone.layers[5].bn1.training
    everything = train.build_model(settings(head_file, trained="all"), asset.load(head_file))
    assert all(p.requires_grad for name, p in everything.named_parameters())


@pytest.mark.parametrize("name", ["iresnet18", "mobilefacenet", "light"])
def test_last_blocks_are_parts_of_the_network(name):
    with torch.device("meta"):
        names = [key for key, _ in build_backbone(name).named_parameters()]
    for start in last_blocks(name):
        assert any(key.startswith(start) for key in names)


def test_a_batch_in_parts_is_the_batch(head_file, pairs, tmp_path, frozen_statistics):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.train_reconstructor(settings(head_file), pairs, whole)
    train.train_reconstructor(settings(head_file, accumulate=2), pairs, parts)
    for one, other in zip(rows_of(whole), rows_of(parts), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["gradient"] == pytest.approx(other["gradient"], rel=1e-3)


def test_the_log_shows_every_term_and_its_pull(head_file, pairs, tmp_path):
    train.train_reconstructor(settings(head_file), pairs, tmp_path)
    row = rows_of(tmp_path)[-1]
    for name in ("vertices", "landmarks", "eyes", "lips", "photometric", "regular_light"):
        assert row[name] > 0 and row[f"gradient_{name}"] > 0


def test_pictures_are_drawn_and_change_nothing(head_file, pairs, tmp_path):
    from PIL import Image

    plain, drawing = tmp_path / "plain", tmp_path / "drawing"
    train.train_reconstructor(settings(head_file), pairs, plain)
    train.train_reconstructor(settings(head_file, picture_every=2), pairs, drawing)
    assert (plain / train.WEIGHTS).stat().st_size == (drawing / train.WEIGHTS).stat().st_size
    assert [row["loss"] for row in rows_of(plain)] == [row["loss"] for row in rows_of(drawing)]
    (picture,) = (drawing / "pictures").iterdir()
    sheet = np.asarray(Image.open(picture))
    assert picture.name == "0000002.png" and sheet.shape == (4 * 224, 4 * 224, 3)
    cells = [sheet[:224, 224 * k : 224 * (k + 1)].astype(float) for k in range(4)]
    assert np.abs(cells[0] - cells[1]).mean() > 1 and np.abs(cells[2] - cells[3]).mean() > 1


def test_tensorboard_is_asked_for_by_name(head_file, pairs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingDependencyError, match="pip install tensorboard"):
        train.train_reconstructor(settings(head_file, tensorboard=True), pairs, tmp_path)


def test_two_processes_are_one(head_file, pairs, tmp_path, frozen_statistics):
    alone = tmp_path / "alone"
    train.train_reconstructor(settings(head_file), pairs, alone)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = (
        "import sys, torch; from chebface import config, train; torch.set_num_threads(1)\n"
        "train._set_mode = lambda model: model.eval()\n"
        "c = config.load(config.TrainReconstructor, None, sys.argv[3:])\n"
        "train.train_reconstructor(c, sys.argv[1], sys.argv[2])"
    )
    wanted = settings(head_file)
    overrides = [f"{key}={value}" for key, value in vars(wanted).items()]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", code, str(pairs), str(tmp_path / "two"), *overrides]
    running = [
        subprocess.Popen(
            command,
            env=os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in running:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    for one, other in zip(rows_of(alone), rows_of(tmp_path / "two"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["vertices"] == pytest.approx(other["vertices"], rel=1e-4)
    first, _ = checkpoint.load(alone / train.WEIGHTS)
    second, _ = checkpoint.load(tmp_path / "two" / train.WEIGHTS)
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-3, atol=2e-4)


def test_the_identity_loss_wants_a_network(head_file, pairs, tmp_path):
    with pytest.raises(ConfigError, match="set recognition to a checkpoint of arcface_torch"):
        train.train_reconstructor(settings(head_file, weight_identity=0.2), pairs, tmp_path)
    weights = tmp_path / "backbone.pth"
    torch.save(build_backbone("light").state_dict(), weights)
    with_it = settings(head_file, weight_identity=0.2, recognition=weights, recognition_backbone="light", steps=1)
    train.train_reconstructor(with_it, pairs, tmp_path / "with")
    assert rows_of(tmp_path / "with")[0]["gradient_identity"] > 0


@pytest.mark.parametrize(
    "changes", [{"batch": 1, "images_per_actor": 1}, {"batch": 2, "images_per_actor": 1, "accumulate": 2}]
)
def test_one_photo_at_a_time_is_refused(changes, head_file, pairs, tmp_path):
    with pytest.raises(ConfigError, match="no statistics for BatchNorm"):
        train.train_reconstructor(settings(head_file, **changes), pairs, tmp_path / "run")


def test_the_encoder_of_another_head_is_refused(head_file, pairs, tmp_path):
    with pytest.raises(AssetError, match="trained on head chebface-open"):
        train.train_reconstructor(settings(head_file, lambda_descriptor=0.5), pairs, tmp_path)
    assert not (tmp_path / train.WEIGHTS).exists()


def test_published_backbones_are_taken_over(head_file, tmp_path):
    torch.manual_seed(5)
    backbone = build_backbone("light")
    older = {k: v for k, v in backbone.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(older, tmp_path / "backbone.pth")
    model = train.build_model(settings(head_file, backbone_weights=tmp_path / "backbone.pth"), asset.load(head_file))
    assert torch.equal(model.backbone.conv_sep.layers[0].weight, backbone.conv_sep.layers[0].weight)


def test_a_run_begins_from_the_weights_of_another(head_file, pairs, tmp_path):
    first = train.train_reconstructor(settings(head_file), pairs, tmp_path / "first")
    weights, _ = checkpoint.load(first)
    model = train.build_model(settings(head_file, start=first), asset.load(head_file))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    train.train_reconstructor(settings(head_file, start=first, steps=1), pairs, tmp_path / "second")
    with pytest.raises(AssetError, match="its skip is False, the settings say True"):
        train.build_model(settings(head_file, start=first, skip="true"), asset.load(head_file))
    with pytest.raises(AssetError, match="weights were trained on head"):
        train.build_model(settings(head_file, start=first), make_head(7))
    with pytest.raises(ConfigError, match="start: has a backbone of its own"):
        settings(head_file, start=first, backbone_weights="backbone.pth")
