"""Synthetic pairs, shards, and the training loop that eats them; on a small made-up head."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import tarfile
from itertools import pairwise

import numpy as np
import pytest
import torch
from heads_for_tests import make_head

from chebface import camera, checkpoint, held_out, params, train
from chebface.config import Synthesize, TrainReconstructor, load
from chebface.crop import ARCFACE_POINTS_PX, WIDE_MATRIX, WIDE_PX, five_points, transform
from chebface.data.sample import Sample, Shards, write_shard
from chebface.data.synthetic import Painter, _axis_angle, _draw_light, _lamp, _matrix, _turn, synthesize
from chebface.errors import AssetError, ConfigError, DivergedError
from chebface.flame import Flame
from chebface.heads import asset
from chebface.render.light import irradiance

COUNT = 36


@pytest.fixture(scope="module")
def head_file(tmp_path_factory):
    return asset.save(make_head(), tmp_path_factory.mktemp("head") / "small.npz")


@pytest.fixture(scope="module")
def settings(head_file):
    return Synthesize(head=str(head_file), count=COUNT, shard=20)


@pytest.fixture(scope="module")
def samples(head_file, settings):
    return Painter(asset.load(head_file), settings).paint(range(COUNT))


@pytest.fixture(scope="module")
def dataset(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    synthesize(folder, settings, workers=1)
    return folder


def tiny(head_file, **changes) -> TrainReconstructor:
    values = {"backbone": "light", "head": head_file, "steps": 6, "batch": 4, "learning_rate": 1e-3}
    values |= {"log_every": 2, "save_every": 3, "warmup_steps": 2, "final_learning_rate": 0.1, "images_per_actor": 1}
    values |= {"trained": "all", "lambda_descriptor": 0, "weight_photometric": 0, "weight_identity": 0}
    values |= {"weight_landmarks": 50, "weight_reprojection": 50, "weight_pose": 10, "weight_shape": 3} | changes
    return load(TrainReconstructor, None, [f"{key}={value}" for key, value in values.items()])


def test_the_same_number_gives_the_same_face(head_file, settings, samples):
    again = Painter(asset.load(head_file), settings).paint(range(3, 5))
    for one, other in zip(samples[3:5], again, strict=True):
        assert np.abs(one.wide_u8.astype(int) - other.wide_u8).mean() < 0.01  # batches differ in rounding
        np.testing.assert_allclose(one.parameters, other.parameters, atol=1e-5)
    assert not np.array_equal(samples[0].parameters, samples[1].parameters)


def test_samples_are_pictures_with_known_parameters(samples):
    for sample in samples:
        assert sample.wide_u8.shape == (WIDE_PX, WIDE_PX, 3)
        assert sample.wide_u8.dtype == np.uint8
        assert sample.aligned_u8.shape == (112, 112, 3)
        assert np.isfinite(sample.parameters).all()
        assert sample.wide_u8.std() > 3


def test_parameters_explain_the_landmarks_seen(head_file, samples):
    """Law: decoding and projecting a sample's parameters lands where its photograph shows the landmarks, up to the
    perspective that an orthographic camera cannot know."""
    flame = Flame(asset.load(head_file))
    parameters = torch.from_numpy(np.stack([s.parameters for s in samples]))
    _, points = flame.decode(parameters)
    ndc = camera.project(points, params.split(parameters)["camera"])
    px = camera.ndc_to_px(ndc, WIDE_PX, WIDE_PX)[..., :2].numpy()
    error = np.linalg.norm(px - np.stack([s.landmarks_px for s in samples]), axis=-1)
    assert np.median(error) < 1.5
    assert error.mean(1).max() < 6


def test_faces_are_aligned_up_to_a_detectors_error(samples):
    target = transform(ARCFACE_POINTS_PX, WIDE_MATRIX)
    off = [np.linalg.norm(five_points(s.landmarks_px) - target, axis=1).mean() for s in samples]
    assert np.median(off) < 12


def test_rotations_go_there_and_back():
    for angles in ((0, 0, 0), (0.7, -0.2, 0.4), (-1.2, 0.7, -0.3)):
        matrix = _turn(*angles)
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-12)
        np.testing.assert_allclose(_matrix(_axis_angle(matrix)), matrix, atol=1e-9)
    np.testing.assert_allclose(_turn(0.5, 0, 0) @ [0, 0, 1], [np.sin(0.5), 0, np.cos(0.5)])


def test_light_is_an_exposure_a_camera_would_choose():
    for seed in range(50):
        light = _draw_light(np.random.default_rng(seed), 0.25, 0.9)
        front = irradiance(np.array([[0.0, 0, 1]]), light).mean()
        assert 0.2 < front < 1.2


def test_a_lamp_lights_what_faces_it():
    towards = np.array([0.6, 0.0, 0.8])
    normals = np.random.default_rng(0).normal(size=(500, 3))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    got = irradiance(normals, np.tile(_lamp(towards)[:, None], 3))[:, 0]
    np.testing.assert_allclose(got, np.clip(normals @ towards, 0, None), atol=0.1)  # nine harmonics, no more


def test_even_light_is_even():
    light = np.zeros((9, 3))
    light[0] = 1 / 0.2821
    normals = np.random.default_rng(0).normal(size=(20, 3))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    np.testing.assert_allclose(irradiance(normals, light), 1, atol=1e-12)
    as_torch = irradiance(torch.from_numpy(normals)[None], torch.from_numpy(light).reshape(1, 27))
    np.testing.assert_allclose(as_torch[0], 1, atol=1e-12)


def test_shards_give_back_what_was_written(dataset, samples, settings):
    shards = Shards(dataset)
    assert len(shards) == COUNT
    assert shards.about["settings"]["count"] == COUNT
    for index in (0, 19, 20, COUNT - 1):
        got, want = shards[index], samples[index]
        np.testing.assert_allclose(got.parameters, want.parameters, atol=1e-5)
        np.testing.assert_allclose(got.landmarks_px, want.landmarks_px, atol=1e-3)
        assert np.abs(got.wide_u8.astype(int) - want.wide_u8).mean() < 6
    shards.close()


def test_one_image_per_actor_is_what_it_always_was(samples, dataset):
    """Against numbers of the version before there could be several; the bytes were the same on one machine, but those
    of a picture also hang on Pillow and the processor."""
    places = [0, 7, 299, 300, 306, 450, 456, 459]  # shape, texture, expression, light, camera
    parameters = [
        [0.1257, 0.9471, 0.8329, -0.2727, 0.0, -0.2479, 6.9038, 2.1145],
        [0.1030, -0.0023, 0.3356, 0.3525, 0.0, -1.2620, 7.2480, 3.5235],
        [-0.5999, -0.0305, 0.4775, 0.6494, 0.0, 0.6426, 6.8271, 3.0605],
        [-0.2803, 1.3855, 0.2564, 0.1476, 0.0, 1.2624, 6.8618, 3.1319],
    ]
    noses = [(118.335, 119.148), (102.262, 129.380), (118.284, 136.145), (117.624, 126.276)]
    brightness = [99.906, 144.364, 103.188, 132.911]
    for index, sample in enumerate(samples[:4]):
        np.testing.assert_allclose(sample.parameters[places], parameters[index], atol=1e-3)
        np.testing.assert_allclose(sample.landmarks_px[30], noses[index], atol=0.05)
        assert sample.wide_u8.mean() == pytest.approx(brightness[index], abs=0.3)
        assert sample.actor == str(index)
    with tarfile.open(dataset / "00001.tar") as tar:
        assert tar.getnames()[:4] == ["000000.jpg", "000000.npy", "000001.jpg", "000001.npy"]  # no other files


def test_images_of_an_actor_share_shape_and_skin_only(head_file, settings, samples, tmp_path):
    several = dataclasses.replace(settings, images_per_actor=3, count=8, shard=5)
    made = Painter(asset.load(head_file), several).paint(range(8))
    for index, sample in enumerate(made):
        first, parts = made[index - index % 3], params.split(sample.parameters)
        assert sample.actor == str(index // 3)
        np.testing.assert_array_equal(sample.shape, parts["shape"])
        for name, values in params.split(first.parameters).items():
            if sample is not first and name != "expression":  # two of one person may be neutral
                assert np.array_equal(parts[name], values) == (name in {"shape", "texture"}), name
        if sample is first:  # as the sample of that number where each actor has one image
            np.testing.assert_allclose(sample.parameters, samples[index].parameters, atol=1e-5)
    assert not np.array_equal(made[0].shape, made[3].shape)
    synthesize(tmp_path, several, workers=1)
    with Shards(tmp_path) as shards:
        assert shards.actors == [sample.actor for sample in made]  # across the border between shards too
        np.testing.assert_allclose(shards[7].parameters, made[7].parameters, atol=1e-5)


def test_a_folder_begun_before_there_were_several_images_goes_on(dataset, settings, tmp_path):
    shutil.copytree(dataset, tmp_path / "d")
    plan = json.loads((tmp_path / "d" / "plan.json").read_text())
    del plan["settings"]["images_per_actor"]
    (tmp_path / "d" / "plan.json").write_text(json.dumps(plan))
    (tmp_path / "d" / "shards.json").unlink()
    synthesize(tmp_path / "d", settings, workers=1)
    with Shards(tmp_path / "d") as shards:
        assert len(shards) == COUNT
        assert shards.actors == [str(index) for index in range(COUNT)]
    with pytest.raises(AssetError, match="begun with other settings"):
        synthesize(tmp_path / "d", dataclasses.replace(settings, images_per_actor=2))


def test_interrupted_synthesis_goes_on(dataset, settings, tmp_path):
    shutil.copytree(dataset, tmp_path / "d")
    whole = (tmp_path / "d" / "00001.tar").read_bytes()
    (tmp_path / "d" / "shards.json").unlink()
    (tmp_path / "d" / "00001.tar").unlink()
    kept = (tmp_path / "d" / "00000.tar").stat().st_mtime_ns
    with pytest.raises(AssetError, match=r"no shards\.json"):
        Shards(tmp_path / "d")
    seen = []
    synthesize(tmp_path / "d", settings, workers=1, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(COUNT, COUNT)]
    assert (tmp_path / "d" / "00001.tar").read_bytes() == whole
    assert (tmp_path / "d" / "00000.tar").stat().st_mtime_ns == kept


def test_a_part_is_what_the_whole_has_there(samples, settings, tmp_path):
    synthesize(tmp_path, dataclasses.replace(settings, first=20, count=3), workers=1)
    with Shards(tmp_path) as part:
        assert [sample.actor for sample in part] == ["20", "21", "22"]
        for got, want in zip(part, samples[20:23], strict=True):
            np.testing.assert_allclose(got.parameters, want.parameters, atol=1e-5)
            assert np.abs(got.wide_u8.astype(int) - want.wide_u8).mean() < 6
    with pytest.raises(ConfigError, match="first: expected 0 or above"):
        load(Synthesize, None, ["first=-1"])


def test_folder_of_another_dataset_is_refused(dataset, settings):
    other = load(Synthesize, None, [f"head={settings.head}", "count=36", "shard=20", "seed=9"])
    with pytest.raises(AssetError, match="begun with other settings"):
        synthesize(dataset, other)


def _truncate(path):
    path.write_bytes(path.read_bytes()[:30_000])


def _drop_partner(path):
    with tarfile.open(path) as old:
        members = [(m, old.extractfile(m)) for m in old.getmembers() if m.name != "000003.npy"]
        with tarfile.open(path.with_suffix(".new"), "w") as new:
            for member, file in members:
                new.addfile(member, file)
    path.with_suffix(".new").rename(path)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_truncate, "delete it"),
        (lambda p: p.unlink(), "delete it"),
        (lambda p: p.write_bytes(b"not a tar" * 99), "delete it"),
        (_drop_partner, "no .npy beside it"),
    ],
)
def test_damaged_shards_are_named(dataset, tmp_path, damage, says):
    shutil.copytree(dataset, tmp_path / "d")
    damage(tmp_path / "d" / "00001.tar")
    with pytest.raises(AssetError, match=rf"00001\.tar.*{says}"):
        Shards(tmp_path / "d")


def test_samples_of_another_size_are_refused(tmp_path, settings):
    numbers = np.zeros(486, np.float32), np.zeros((68, 2), np.float32)
    odd = Sample(np.zeros((10, 10, 3), np.uint8), "0", numbers[0][:300], *numbers)
    write_shard(tmp_path / "00000.tar", [odd], 90)
    (tmp_path / "shards.json").write_text(json.dumps({"shards": ["00000.tar"]}))
    with pytest.raises(AssetError, match="sample 0"):
        Shards(tmp_path)[0]


def test_training_lowers_the_loss(dataset, head_file, tmp_path):
    rows = []
    config = tiny(head_file, steps=40, batch=18, save_every=40, log_every=4)
    train.train_reconstructor(config, dataset, tmp_path, report=lambda step, row: rows.append(row))
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert rows[-1]["landmarks"] < 0.7 * rows[0]["landmarks"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_killed_run_resumes_bit_for_bit(dataset, head_file, tmp_path, optimizer):
    config = tiny(head_file, optimizer=optimizer, skip=optimizer == "muon")
    rows = []
    whole = train.train_reconstructor(config, dataset, tmp_path / "whole", report=lambda s, r: rows.append(r))
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert {"vertices", "landmarks", "pose"} <= rows[0].keys()

    code = (
        "import os, sys; from chebface import config, train\n"
        "c = config.load(config.TrainReconstructor, None, sys.argv[3:])\n"
        "kill = lambda step, row: os.kill(os.getpid(), 9) if step >= 4 else None\n"
        "train.train_reconstructor(c, sys.argv[1], sys.argv[2], report=kill)"
    )
    overrides = [f"{key}={value}" for key, value in vars(config).items()]
    command = [sys.executable, "-c", code, str(dataset), str(tmp_path / "killed"), *overrides]
    assert subprocess.run(command, check=False, capture_output=True).returncode == -9
    resumed = train.train_reconstructor(config, dataset, tmp_path / "killed")
    steps = [json.loads(line)["step"] for line in (tmp_path / "killed" / "log.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 4, 6]  # killed after step 4, gone on from the state of step 3
    assert resumed.read_bytes() == whole.read_bytes()

    with pytest.raises(AssetError, match="other settings \\(seed\\)"):
        train.train_reconstructor(dataclasses.replace(config, seed=5), dataset, tmp_path / "killed")


def test_evaluation_reports_against_the_mean_head(dataset, head_file, tmp_path):
    weights = train.train_reconstructor(tiny(head_file, steps=2), dataset, tmp_path)
    row = held_out.evaluate(weights, dataset)
    assert row["faces"] == COUNT
    for part in ("head", "face", "face_nonmetrical"):
        assert row[f"ratio_{part}"] == pytest.approx(row[f"{part}_mm"] / row[f"mean_head_{part}_mm"], rel=1e-3)
        assert row[f"mean_head_{part}_mm"] > 0.5
    assert row["mean_head_face_nonmetrical_mm"] < row["mean_head_face_mm"]
    assert row["landmarks_px"] > 0


def test_published_weights_are_half_as_large_and_carry_their_errors(dataset, head_file, tmp_path):
    weights = train.train_reconstructor(tiny(head_file, steps=2), dataset, tmp_path)
    small, other = tmp_path / "small.safetensors", tmp_path / "held-out"
    with pytest.raises(AssetError, match="has the training's seed"):
        held_out.publish(weights, dataset, small)
    assert not small.exists()
    synthesize(other, load(Synthesize, None, [f"head={head_file}", "count=8", "seed=1"]), workers=1)
    errors = held_out.publish(weights, other, small)
    assert small.stat().st_size < 0.52 * weights.stat().st_size
    _, card = checkpoint.load(small)
    assert card["held_out"]["head_mm"] == errors["head_mm"]
    assert card["held_out"]["data"]["count"] == 8
    assert held_out.evaluate(small, other) == errors


def test_training_refuses_what_does_not_fit(dataset, head_file, tmp_path):
    other = asset.save(make_head(seed=7), tmp_path / "other.npz")
    with pytest.raises(AssetError, match="trained on head"):
        train.train_reconstructor(tiny(other), dataset, tmp_path / "a")
    with pytest.raises(AssetError, match="fewer than one batch"):
        train.train_reconstructor(tiny(head_file, batch=64), dataset, tmp_path / "b")
    with pytest.raises(DivergedError, match=r"step \d+: loss term"):
        train.train_reconstructor(tiny(head_file, learning_rate=1e30, warmup_steps=0), dataset, tmp_path / "c")


def test_rate_warms_up_and_falls():
    config = TrainReconstructor(steps=100, warmup_steps=10, final_learning_rate=0.25)
    shares = [train.rate_share(config, step) for step in range(100)]
    assert shares[0] == pytest.approx(0.1)
    assert max(shares) == pytest.approx(1.0)
    assert shares[-1] == pytest.approx(0.25, abs=0.01)
    assert all(b <= a for a, b in pairwise(shares[10:]))
    assert train.rate_share(TrainReconstructor(), 159_999) == 1


def test_rotation_angle():
    turn = torch.tensor([[0.0, 0.3, 0.0], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(held_out.angle_deg(turn, torch.zeros(2, 3)), [np.degrees(0.3), 0], atol=0.05)


def test_similarity_alignment_undoes_a_similarity():
    rng = np.random.default_rng(0)
    target = torch.from_numpy(rng.normal(size=(3, 20, 3)))
    turn = torch.from_numpy(_turn(0.4, -0.3, 1.0))
    source = 1.7 * target @ turn.T + torch.tensor([0.1, 2.0, -3.0])
    torch.testing.assert_close(held_out.align_similarity(source, target), target)
    mirrored = target * torch.tensor([-1.0, 1, 1])
    assert (held_out.align_similarity(mirrored, target) - target).abs().max() > 0.1  # a mirror is no similarity
    noisy = target + 0.1 * torch.from_numpy(rng.normal(size=target.shape))
    best = (held_out.align_similarity(noisy, target) - target).square().sum()
    assert best <= (noisy - target).square().sum()
