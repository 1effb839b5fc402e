"""Which faces weights may be measured on: not those of their training, and only such as are wholly known."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from heads_for_tests import make_head

from chebface import checkpoint, held_out
from chebface.config import Pack, Synthesize, to_dict
from chebface.data.sample import write_shard
from chebface.data.synthetic import Painter
from chebface.errors import AssetError
from chebface.heads import asset
from chebface.regressor import Regressor

PACKED = {"held_out": 0.2, "seed": 4}


@pytest.fixture(scope="module")
def head_file(tmp_path_factory):
    return asset.save(make_head(), tmp_path_factory.mktemp("head") / "small.npz")


@pytest.fixture(scope="module")
def samples(head_file):
    return Painter(asset.load(head_file), Synthesize(head=str(head_file))).paint(range(3))


@pytest.fixture(scope="module")
def model():
    return Regressor("light", False, False).state_dict()


@pytest.fixture
def weigh(model, head_file, tmp_path):
    """Weights whose card says what they were trained on."""

    def write(data: dict):
        card = {"backbone": "light", "normalize": False, "skip": False, "head": asset.load(head_file).facts}
        return checkpoint.save(tmp_path / "weights.safetensors", model, card | {"data": data})

    return write


@pytest.fixture
def store(samples, head_file, tmp_path):
    """A dataset of these settings."""

    def write(settings, samples=samples, **facts):
        folder = tmp_path / "data"
        write_shard(folder / "00000.tar", samples, 90)
        about = {"settings": to_dict(settings), "head": asset.load(head_file).facts, "shards": ["00000.tar"]}
        (folder / "shards.json").write_text(json.dumps(about | facts))
        return folder

    return write


def pack(head_file, **changes) -> Pack:
    return Pack(head=str(head_file), **PACKED | changes)


@pytest.mark.parametrize(
    ("trained", "data", "part"),
    [
        ({"part": "train"}, {}, "held-out"),
        ({"part": "held-out"}, {}, "train"),
        ({}, {}, "held-out"),  # cards that name no part are of the training part
        ({"part": "train"}, {"held_out": 0.1}, "held-out"),  # whom a smaller share holds out, a larger one does too
    ],
)
def test_the_other_part_of_a_packing_is_accepted(weigh, store, head_file, tmp_path, trained, data, part):
    folder = store(pack(head_file, **data), layout="mica", part=part)
    weights = weigh(to_dict(pack(head_file)) | trained)
    errors = held_out.publish(weights, folder, tmp_path / "out.safetensors")
    assert checkpoint.load(tmp_path / "out.safetensors")[1]["held_out"]["faces"] == errors["faces"] == 3


@pytest.mark.parametrize(
    ("trained", "data", "part", "says"),
    [
        ({"part": "train"}, {}, "train", "is the part train, as the training's data were"),
        ({}, {}, "train", "is the part train"),
        ({"part": "held-out"}, {}, "held-out", "is the part held-out"),
        ({"part": "train"}, {"seed": 5}, "held-out", "was divided by seed 5 and held_out 0.2, the training's data by"),
        ({"part": "train"}, {"held_out": 0.3}, "held-out", "was divided by seed 4 and held_out 0.3"),
        ({"part": "held-out"}, {"held_out": 0.1}, "train", "was divided by"),
    ],
)
def test_a_packing_that_may_share_faces_is_refused(weigh, store, head_file, tmp_path, trained, data, part, says):
    folder = store(pack(head_file, **data), layout="mica", part=part)
    weights = weigh(to_dict(pack(head_file)) | trained)
    with pytest.raises(AssetError, match=says):
        held_out.publish(weights, folder, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_made_up_faces_and_photographs_are_never_the_same(weigh, store, head_file, tmp_path):
    made_up = Synthesize(head=str(head_file), seed=PACKED["seed"])
    held_out.publish(weigh(to_dict(pack(head_file)) | {"part": "train"}), store(made_up), tmp_path / "a.safetensors")
    photographs = store(pack(head_file), layout="mica", part="train")
    held_out.publish(weigh(to_dict(made_up)), photographs, tmp_path / "b.safetensors")


def test_made_up_faces_of_the_same_seed_are_refused(weigh, store, head_file, tmp_path):
    settings = Synthesize(head=str(head_file), seed=3)
    with pytest.raises(AssetError, match="has the training's seed 3; held-out faces need another"):
        held_out.publish(weigh(to_dict(settings)), store(settings), tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("lost", "says"),
    [
        ({"parameters": None}, "sample 1 has no parameters; only made-up"),
        ({"landmarks_px": None}, "no landmarks; only"),
    ],
)
def test_faces_not_wholly_known_are_refused(weigh, store, samples, head_file, lost, says):
    some = [samples[0], dataclasses.replace(samples[1], **lost), samples[2]]
    folder = store(pack(head_file), some, layout="mica", part="held-out")
    with pytest.raises(AssetError, match=says):
        held_out.evaluate(weigh({}), folder, batch=2)


def test_errors_are_those_of_these_faces(weigh, store, samples, head_file):
    row = held_out.evaluate(weigh({}), store(Synthesize(head=str(head_file))))
    assert row["faces"] == len(samples)
    assert all(np.isfinite(value) for value in row.values())
