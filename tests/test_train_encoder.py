"""Training the mesh autoencoder on a small head and on folders: what it writes, how it resumes, what it refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from heads_for_tests import make_head

from chebface import checkpoint, config, descriptor_report
from chebface.config import TrainEncoder
from chebface.data.meshes import Meshes, sample_head
from chebface.encoder import descriptor_distance
from chebface.errors import AssetError, ConfigError, DivergedError
from chebface.heads import asset
from chebface.mesh import write_obj
from chebface.train_encoder import (
    BEST,
    LAST,
    MAP,
    STATE,
    encode_all,
    evaluate_encoder,
    frame_of,
    principal_components,
    train_encoder,
    vertex_errors,
)

EPOCHS = 3


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a small head; hierarchies are cached there, too."""
    folder = tmp_path_factory.mktemp("encoder")
    asset.save(make_head(26), folder / "head.npz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("chebface.hierarchy.cache_dir", lambda: folder / "cache")
        yield folder


@pytest.fixture(scope="module")
def settings(place):
    return TrainEncoder(
        head=str(place / "head.npz"),
        count=24,
        held_out=0.25,
        code=3,
        terms=3,
        epochs=EPOCHS,
        batch=4,
        learning_rate=1e-3,
        log_every=2,
        save_every=1,
    )


@pytest.fixture(scope="module")
def trained(place, settings):
    return train_encoder(settings, place / "run")


def tensors_of(path):
    return checkpoint.load(path)[0]


def same(first, second):
    a, b = tensors_of(first), tensors_of(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_learns_and_writes_everything(trained, place, settings):
    assert trained == place / "run" / BEST
    rows = [json.loads(line) for line in (place / "run" / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    held_out = [row["held_out_mm"] for row in rows if "held_out_mm" in row]
    steps = 18 // settings.batch * EPOCHS
    assert rows[-1]["step"] == steps and len(losses) == steps // 2 and len(held_out) == EPOCHS
    assert losses[-1] < losses[0] and {"all", "face", "nose"} <= held_out[0].keys()
    assert (place / "run" / MAP).read_bytes().startswith(b"\x89PNG")
    assert not list((place / "run").glob("*partial*"))


def test_the_card_says_what_it_is(trained, settings):
    _, card = checkpoint.load_encoder(trained)
    best = min(
        row["held_out_mm"]["all"]
        for row in map(json.loads, (trained.parent / "log.jsonl").read_text().splitlines())
        if "held_out_mm" in row
    )
    assert card["kind"] == "encoder" and card["code"] == 3 and card["training"] == config.to_dict(settings)
    assert card["data"]["train"] == 18 and card["data"]["held_out"] == 6
    assert card["held_out"]["mm"]["all"] == pytest.approx(best, abs=1e-3)
    assert card["head"]["licence"] == "Apache-2.0"
    assert {"mean", "std", "largest_correlation"} == card["held_out"]["descriptor"].keys()


def test_evaluating_gives_what_training_noted(trained):
    found = evaluate_encoder(trained)
    noted = checkpoint.load_encoder(trained)[1]["held_out"]
    for name in ("mm", "pca_mm", "mean_mm"):
        assert found[name] == pytest.approx(noted[name], abs=1e-3)
    assert found["pca_mm"]["all"] < found["mean_mm"]["all"]


def test_a_resumed_run_is_the_same_to_the_bit(trained, place, settings):
    folder = place / "halves"

    class Stopped(Exception):
        pass

    def stop(step, row):
        if step > 5 and "loss" in row:  # in the second epoch: its first step is lost
            raise Stopped

    with pytest.raises(Stopped):
        train_encoder(settings, folder, report=stop)
    assert checkpoint.load(folder / STATE)[1]["epoch"] == 1
    train_encoder(settings, folder)
    for name in (BEST, LAST, STATE):
        assert same(folder / name, trained.parent / name), name
    before = (folder / BEST).read_bytes()
    train_encoder(settings, folder)  # nothing left to do
    assert (folder / BEST).read_bytes() == before


def test_noise_is_the_same_after_a_pause(trained, place, settings):
    noisy = dataclasses.replace(settings, noise=1e-3)
    whole = train_encoder(noisy, place / "noisy")

    class Stopped(Exception):
        pass

    def stop(step, row):
        if "held_out_mm" in row and step > 4:
            raise Stopped

    with pytest.raises(Stopped):
        train_encoder(noisy, place / "noisy-halves", report=stop)
    assert same(train_encoder(noisy, place / "noisy-halves"), whole) and not same(whole, trained)


def test_without_resume_it_begins_again(trained, place, settings):
    folder = place / "again"
    shutil.copytree(trained.parent, folder)
    train_encoder(settings, folder, resume=False)
    assert same(folder / BEST, trained)


@pytest.mark.parametrize(
    ("frame", "origin", "axes"), [("raw", False, False), ("centered", True, False), ("whitened", True, True)]
)
def test_frames_change_codes_alone(trained, place, settings, frame, origin, axes):
    path = train_encoder(dataclasses.replace(settings, frame=frame), place / frame)
    model, card = checkpoint.load_encoder(path)
    everyone = sample_head(asset.load(place / "head.npz"), 24).split(0.25)[0]
    codes = encode_all(model, everyone.vertices)
    assert (codes.mean(0).norm() < 1e-3 * codes.std(0).max() + 1e-4) == origin
    assert torch.allclose(codes.T.cov(), torch.eye(3), atol=1e-2) == axes
    reference, _ = checkpoint.load_encoder(trained)
    np.testing.assert_allclose(vertex_errors(model, everyone), vertex_errors(reference, everyone), rtol=1e-3)
    assert np.array(card["frame"]["matrix"]).shape == (3, 3)


def test_a_code_of_one_number_and_flat_codes_have_frames():
    flat = torch.ones(5, 2)
    matrix, origin = frame_of(flat, "whitened")
    assert torch.isfinite(matrix).all() and torch.equal(origin, torch.ones(2))
    matrix, _ = frame_of(torch.tensor([[1.0], [3.0]]), "whitened")
    assert abs(matrix.item()) == pytest.approx(2**-0.5)


def test_principal_components_are_numpys():
    rng = np.random.default_rng(0)
    vertices = (rng.normal(size=(40, 6)) * [5, 4, 3, 0.1, 0.1, 0.1] @ rng.normal(size=(6, 60))).reshape(40, 20, 3)
    mean, components = principal_components(vertices.astype(np.float32), 3)
    away = vertices.reshape(40, -1) - vertices.reshape(40, -1).mean(0)
    wanted = np.linalg.svd(away, full_matrices=False)[2][:3]
    np.testing.assert_allclose(mean, vertices.mean(0), atol=1e-5)
    np.testing.assert_allclose(components.T @ components, wanted.T @ wanted, atol=1e-4)


def write_folder(folder, head, people=6, each=3):
    found = sample_head(head, people, expressions=each, strength=1.0)
    for i, (mesh, actor) in enumerate(zip(found.vertices, found.actors, strict=True)):
        write_obj(folder / "registrations" / f"p{actor}" / f"{i}.obj", mesh, head.faces)
    return folder


def test_a_folder_of_registered_meshes(place, settings):
    head = asset.load(place / "head.npz")
    folder = write_folder(place / "folder", head)
    for name, wanted in (("with", settings), ("without", dataclasses.replace(settings, head=""))):
        path = train_encoder(dataclasses.replace(wanted, epochs=1), place / f"folder-{name}", meshes=folder)
        found = evaluate_encoder(path, meshes=folder)
        card = checkpoint.load_encoder(path)[1]
        assert card["data"]["people"] == 6 and (card["head"] is not None) == (name == "with")
        assert ("nose" in found["mm"]) == (name == "with") and found["people"] == 2
        with pytest.raises(AssetError, match="give that folder"):
            evaluate_encoder(path)
    with pytest.raises(AssetError, match="set head"):
        descriptor_report.report(place / "folder-without" / BEST, place / "none", meshes=folder)
    rows = descriptor_report.report(place / "folder-with" / BEST, place / "some", meshes=folder)
    assert "same person, other mesh" in rows["cosines"]["raw"]
    write_obj(folder / "registrations" / "p0" / "0.obj", head.template, head.faces)
    with pytest.raises(AssetError, match="other meshes"):
        evaluate_encoder(place / "folder-with" / BEST, meshes=folder)
    with pytest.raises(AssetError, match="begun with other meshes"):
        train_encoder(dataclasses.replace(settings, epochs=1), place / "folder-with", meshes=folder)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"head": ""}, ConfigError, "head: expected a head to sample from"),
        ({"batch": 19}, AssetError, "18 to train with, fewer than one batch of 19"),
        ({"head": "nowhere.npz"}, AssetError, "not found"),
    ],
)
def test_settings_that_cannot_be(place, settings, changes, error, message):
    with pytest.raises(error, match=message):
        train_encoder(dataclasses.replace(settings, **changes), place / "refused")
    assert not (place / "refused").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frame": "round"}, "frame: expected one of raw, centered, whitened"),
        ({"epochs": 0}, "epochs: expected at least 1"),
        ({"terms": 0}, "terms: expected at least 1"),
        ({"learning_rate": 0.0}, "learning_rate: expected above 0"),
        ({"noise": -1e-3}, "noise: expected 0 or above"),
        ({"std_floor": float("nan")}, "std_floor: expected above 0"),
    ],
)
def test_values_that_cannot_be(changes, message):
    with pytest.raises(ConfigError, match=message):
        TrainEncoder(**changes)


def test_an_empty_folder_is_refused(place, settings):
    (place / "empty").mkdir()
    with pytest.raises(AssetError, match=r"no \.obj"):
        train_encoder(settings, place / "refused", meshes=place / "empty")
    assert not (place / "refused").exists()


def test_face_weight_wants_a_face_and_weighs_it(trained, place, settings):
    folder = place / "folder-weight"
    write_folder(folder, asset.load(place / "head.npz"), people=4)
    with pytest.raises(ConfigError, match="face_weight"):
        train_encoder(dataclasses.replace(settings, head="", face_weight=5.0), place / "refused", meshes=folder)
    path = train_encoder(dataclasses.replace(settings, face_weight=5.0), place / "weighed")
    assert not same(path, trained)


def test_a_state_of_other_settings_is_kept(trained, place, settings):
    folder = place / "kept"
    shutil.copytree(trained.parent, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(AssetError, match=r"other settings \(seed\)"):
        train_encoder(dataclasses.replace(settings, seed=1), folder)
    (folder / STATE).write_bytes(before[STATE][:-100])
    with pytest.raises(AssetError, match=STATE):
        train_encoder(settings, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.name != STATE} == {
        name: content for name, content in before.items() if name != STATE
    }


def test_a_damaged_checkpoint_is_refused(trained, tmp_path):
    (tmp_path / BEST).write_bytes(trained.read_bytes()[:5000])
    for use in (
        checkpoint.load_encoder,
        evaluate_encoder,
        lambda path: descriptor_report.report(path, tmp_path / "out"),
    ):
        with pytest.raises(AssetError, match=BEST):
            use(tmp_path / BEST)
    checkpoint.save(tmp_path / BEST, {"w": torch.zeros(2)}, {"kind": "other"})
    with pytest.raises(AssetError, match=r"encoder\.safetensors: not a mesh encoder"):
        checkpoint.load_encoder(tmp_path / BEST)
    tensors, card = checkpoint.load(trained)
    checkpoint.save(tmp_path / BEST, tensors, card | {"training": {"pace": 3}})
    with pytest.raises(AssetError, match="card"):
        evaluate_encoder(tmp_path / BEST)
    assert not (tmp_path / "out").exists()


def test_divergence_leaves_the_last_state(place, settings):
    wild = dataclasses.replace(settings, learning_rate=1e30)
    with pytest.raises(DivergedError, match="not finite"):
        train_encoder(wild, place / "wild")
    assert not (place / "wild" / BEST).exists()


def test_the_report_says_what_the_code_knows(trained, place):
    found = descriptor_report.report(trained, place / "report")
    assert json.loads((place / "report" / "descriptor.json").read_text()) == found
    for name in ("descriptor.png", "error_map.png"):
        assert (place / "report" / name).read_bytes().startswith(b"\x89PNG")
    for frame in ("raw", "centered", "whitened"):
        rows = found["cosines"][frame]
        assert rows["other person"]["mean"] < 1
        for spot in descriptor_report.PLACES:
            assert 0 < found["sensitivity"][frame][spot]["local"] < found["sensitivity"][frame]["other_person"]
    assert any("1 mm at the nose" in line for line in found["findings"])


def test_raw_cosines_do_not_depend_on_the_frame_that_was_saved(trained, place, settings):
    path = train_encoder(dataclasses.replace(settings, frame="whitened"), place / "whitened")
    one, other = (descriptor_report.report(p, place / "frames")["cosines"] for p in (trained, path))
    for frame in ("raw", "centered", "whitened"):
        assert one[frame]["other person"] == pytest.approx(other[frame]["other person"], abs=2e-2), frame


def test_the_bell_is_a_millimetre_high_and_local():
    head = make_head(16)
    change = descriptor_report.bell(head, head.template, 30)
    height = np.linalg.norm(change, axis=1)
    assert 0.0005 < height.max() <= 0.001
    corners = head.faces[head.landmark_triangles[30]]
    middle = head.landmark_barycentric[30] @ head.template[corners]
    far = np.linalg.norm(head.template - middle, axis=1) > 0.05
    assert height[far].max() < 1e-6


def test_the_shipped_encoder_knows_people(head):
    model, card = checkpoint.load_encoder()
    assert card["head"]["sha256"] == head.sha256 and model.weights == 30_056
    people = Meshes(sample_head(head, 12, seed=77).vertices, head.faces, ())
    assert vertex_errors(model, people).mean() < 1.1 * card["held_out"]["mm"]["all"]
    assert vertex_errors(model, people).mean() < 0.75 * card["held_out"]["mean_mm"]["all"]
    codes = encode_all(model, people.vertices)
    near = encode_all(model, people.vertices + np.float32(1e-4))
    assert descriptor_distance(codes, near).max() < 0.1 * descriptor_distance(codes, codes.roll(1, 0)).mean()
