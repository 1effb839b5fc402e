"""The objective: every term weighed, reported, and with a gradient; presets; what it lacks is said."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from heads_for_tests import make_head

from chebface import hierarchy, params
from chebface.config import TrainReconstructor, load
from chebface.data.batches import Batch
from chebface.encoder import MeshEncoder
from chebface.errors import ConfigError
from chebface.objective import Objective, weights_of
from chebface.regressor import CAMERA_BIAS
from chebface.render import open_renderer

ALL = {"shape_consistency": False, "weight_reprojection": 1.0, "weight_pose": 1.0, "weight_shape": 1.0}
ALL |= {"weight_texture": 1.0, "weight_camera": 1.0, "weight_light": 1.0}


@pytest.fixture(scope="module")
def head():
    return make_head(6)


class Eyes(torch.nn.Module):
    """A recognition network of one product."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(8, 3 * 112 * 112, generator=torch.Generator().manual_seed(3)))

    def forward(self, x):
        return x.flatten(1) @ self.weight.T


def make(head, **changes):
    config = dataclasses.replace(TrainReconstructor(), **changes)
    torch.manual_seed(0)
    encoder = MeshEncoder(hierarchy.build(head.template, head.faces, (30, 9)), (4, 5), K=3, code=2)
    encoder.set_statistics(head.template, np.full_like(head.template, 2e-3))
    renderer = open_renderer(head.faces)
    return Objective(head, config, renderer=renderer, encoder=encoder, recognition=Eyes())


def make_batch(head, objective, actors=(0, 0, 1, 1), seed=0):
    rng = np.random.default_rng(seed)
    count = len(actors)
    parameters = torch.zeros(count, params.TOTAL)
    parameters[:, :20] = torch.from_numpy(rng.normal(size=(count, 20))).float()
    parameters[:, params.SLICES["camera"]] = torch.tensor(CAMERA_BIAS)
    parameters[:, params.SLICES["light"]][:, :3] = 2.5
    _, points = objective.flame.decode(parameters)
    landmarks = points[..., :2] * CAMERA_BIAS[0]
    wide = torch.from_numpy(rng.integers(0, 256, (count, 224, 224, 3)).astype(np.uint8))
    crop = torch.from_numpy(rng.integers(0, 256, (count, 112, 112, 3)).astype(np.uint8))
    known = torch.ones(count, dtype=torch.bool)
    shape = parameters[:, params.SLICES["shape"]]
    return Batch(crop, wide, shape, parameters, known, landmarks, known, torch.tensor(actors))


def guess_near(batch, seed=1):
    noise = torch.randn(batch.parameters.shape, generator=torch.Generator().manual_seed(seed))
    return (batch.parameters + 0.02 * noise).requires_grad_()


def test_the_defaults_are_the_papers():
    weights = weights_of(TrainReconstructor())
    assert weights["vertices"] == pytest.approx(0.6 * 0.5) and weights["descriptor"] == pytest.approx(0.6 * 0.5)
    assert weights["landmarks"] == pytest.approx(0.4) and weights["photometric"] == pytest.approx(0.8)
    assert weights["identity"] == pytest.approx(0.08) and weights["lips"] == pytest.approx(0.2)
    assert weights["regular_pose"] == pytest.approx(0.4e-4) and weights["regular_light"] == pytest.approx(0.4)
    assert not any(weights[name] for name in ("pose", "shape", "texture", "camera", "light", "reprojection"))


def test_presets_keep_what_their_methods_have():
    kept = {}
    for name in ("ours", "mica", "deca"):
        config = load(TrainReconstructor, None, [f"preset={name}", "seed=3"])
        kept[name] = {term for term, weight in weights_of(config).items() if weight}
        assert config.seed == 3
    assert kept["mica"] == {"vertices"}
    assert kept["deca"] == kept["ours"] - {"vertices", "descriptor"}
    assert load(TrainReconstructor, None, ["preset=mica", "lambda_2d=0.1"]).lambda_2d == 0.1  # said later, so it holds
    with pytest.raises(ConfigError, match="preset: expected ours or mica or deca"):
        load(TrainReconstructor, None, ["preset=flame"])


def test_every_term_is_reported_and_pulls(head):
    objective = make(head, **ALL)
    batch = make_batch(head, objective)
    predicted = guess_near(batch)
    loss, parts = objective(predicted, batch)
    assert parts.keys() == objective.weights.keys() == weights_of(objective.config).keys()
    weighed = sum(objective.weights[name] * float(part.detach()) for name, part in parts.items())
    assert float(loss.detach()) == pytest.approx(weighed, rel=1e-5)
    for name, part in parts.items():
        (pull,) = torch.autograd.grad(part, predicted, retain_graph=True)
        assert torch.isfinite(pull).all() and pull.abs().sum() > 0, name


def test_the_truth_costs_nothing_where_there_is_a_truth(head):
    objective = make(head, **ALL)
    batch = make_batch(head, objective)
    _, parts = objective(batch.parameters.clone(), batch)
    for name in ("vertices", "descriptor", "landmarks", "eyes", "lips", "reprojection", "pose", "shape", "texture"):
        assert float(parts[name]) == pytest.approx(0, abs=2e-6), name


def test_posed_truth_sees_pose_and_neutral_truth_does_not(head):
    for mesh, sees in (("neutral", False), ("posed", True)):
        objective = make(head, shape_consistency=False, truth_mesh=mesh)
        batch = make_batch(head, objective)
        turned = batch.parameters.clone()
        turned[:, params.SLICES["pose"]][:, 1] += 0.3
        _, parts = objective(turned, batch)
        assert (float(parts["vertices"]) > 1e-3) is sees


def test_shapes_are_swapped_among_photos_of_a_person_only(head):
    plain, swapping = make(head, shape_consistency=False), make(head, shape_consistency=True)
    batch = make_batch(head, plain)
    predicted = guess_near(batch).detach()
    _, parts = swapping(predicted, batch)
    swapped = predicted.clone()
    swapped[:, :300] = predicted[[1, 0, 3, 2], :300]
    _, first = plain(predicted, batch)
    _, second = plain(swapped, batch)
    for name, part in parts.items():
        assert float(part) == pytest.approx((float(first[name]) + float(second[name])) / 2, rel=1e-4, abs=2e-6), name
    alone = make_batch(head, plain, actors=(0, 1, 2, 3))
    assert float(swapping(predicted, alone)[0]) == pytest.approx(float(plain(predicted, alone)[0]), rel=1e-6)


def test_what_is_frozen_stays_so(head):
    objective = make(head).train()
    assert not objective.training and not objective.encoder.training
    batch = make_batch(head, objective)
    objective(guess_near(batch), batch)[0].backward()
    assert all(p.grad is None for p in objective.parameters())


def test_pictures_are_asked_for_where_a_term_draws(head):
    assert make(head).wants_pictures
    assert not make(head, weight_photometric=0.0, weight_identity=0.0).wants_pictures


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"weight_identity": 0.0, "weight_photometric": 0.0}, "descriptor: has weight 0.3 and lacks"),
        ({"lambda_descriptor": 0.0, "weight_identity": 0.0}, "photometric: has weight 0.8 and lacks"),
        ({"lambda_2d": 0.0, "lambda_3d": 0.0}, "every loss has weight 0"),
    ],
)
def test_what_is_lacking_is_named(head, changes, says):
    with pytest.raises(ConfigError, match=says):
        Objective(head, dataclasses.replace(TrainReconstructor(), **changes))


def test_identity_wants_a_network(head):
    config = dataclasses.replace(TrainReconstructor(), lambda_descriptor=0.0)
    with pytest.raises(ConfigError, match="identity: has a weight and no network"):
        Objective(head, config, renderer=open_renderer(head.faces))
