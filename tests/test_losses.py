"""Each loss by its properties."""

from __future__ import annotations

import math

import pytest
import torch
from heads_for_tests import make_head

from chebface import losses


@pytest.fixture(scope="module")
def small_head():
    return make_head()


def test_region_weights_have_mean_one_and_prefer_the_face(small_head):
    weights = losses.region_weights(small_head)
    assert weights.mean().item() == pytest.approx(1, rel=1e-5)
    masks = small_head.masks
    face = weights[torch.from_numpy(masks["face"] & ~masks["eyeballs"] & ~masks["ears"])]
    rest = weights[torch.from_numpy(~(masks["face"] | masks["eyeballs"] | masks["ears"]))]
    assert (face[0] / rest[0]).item() == pytest.approx(150, rel=1e-4)


def test_vertex_loss_is_in_mm_and_weighed():
    truth = torch.rand(2, 5, 3)
    assert losses.vertices(truth + 0.002, truth, torch.ones(5)).item() == pytest.approx(2.0, rel=1e-3)
    only_last = torch.tensor([0.0, 0, 0, 0, 5])
    moved = truth.clone()
    moved[:, :4] += 1
    assert losses.vertices(moved, truth, only_last).item() == 0


def test_landmark_weights_are_decas():
    weights = losses.landmark_weights()
    assert weights[[5, 6, 10, 11]].tolist() == [2.0] * 4
    assert weights[[30, 31, 35, 48, 54]].tolist() == [3.0] * 5
    assert weights[[27, 33, 34, 49, 67]].tolist() == [1.5] * 5
    assert weights[[0, 8, 16, 17, 36, 47]].tolist() == [1.0] * 6


def test_landmark_loss_is_the_weighed_mean():
    truth = torch.zeros(1, 68, 2)
    got = losses.landmarks(truth + 0.5, truth, losses.landmark_weights())
    assert got.item() == pytest.approx(0.5 * losses.landmark_weights().mean().item(), rel=1e-6)


def test_rotation_loss_knows_rotations_not_numbers():
    """Axis-angle vectors a full turn apart are the same rotation; a right angle is 4/9 per entry."""
    axis = torch.tensor([[0.0, 0.0, 1.0]])
    assert losses.rotations(axis * 0.3, axis * (0.3 - 2 * math.pi)).item() == pytest.approx(0, abs=1e-10)
    assert losses.rotations(axis * math.pi / 2, axis * 0).item() == pytest.approx(4 / 9, rel=1e-5)


def test_coefficients_and_regularizer():
    one = torch.ones(4, 3)
    assert losses.coefficients(one, one * 0).item() == 1
    assert losses.coefficients(one, one * 0, torch.tensor([3.0, 0, 0])).item() == 1
    assert losses.regularizer(one, 2 * one).item() == pytest.approx(3 + 12)


def test_total_weighs_and_returns_every_part():
    parts = {"a": torch.tensor(2.0), "b": torch.tensor(3.0)}
    value, same = losses.total(parts, {"a": 0.5, "b": 2.0})
    assert value.item() == 7
    assert same is parts
    with pytest.raises(KeyError):
        losses.total(parts, {"a": 1.0})
