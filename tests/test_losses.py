"""Each loss by its properties."""

from __future__ import annotations

import math

import pytest
import torch
from heads_for_tests import make_head

from chebface import losses, params
from chebface.errors import InputError


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


def moving(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, requires_grad=True)


def test_distances_know_openings_not_places():
    """Shifting or turning all points costs nothing; opening one of four eyelid pairs by d costs d / 4."""
    truth = torch.rand(3, 68, 2)
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    for term in (losses.eye_distances, losses.lip_distances):
        assert term(truth @ turn.T + 0.3, truth).item() == pytest.approx(0, abs=1e-6)
    closed = torch.zeros(1, 68, 2)
    eye, lip = closed.clone(), closed.clone()
    eye[0, 43, 1] = 0.4
    lip[0, 66, 0] = -0.3
    assert losses.eye_distances(eye, closed).item() == pytest.approx(0.1)
    assert losses.lip_distances(lip, closed).item() == pytest.approx(0.1)
    assert losses.lip_distances(eye, closed).item() == losses.eye_distances(lip, closed).item() == 0


def test_distances_look_at_decas_pairs():
    points = moving(1, 68, 2)
    for term, pairs in (
        (losses.eye_distances, [(37, 41), (38, 40), (43, 47), (44, 46)]),
        (losses.lip_distances, [(61, 67), (62, 66), (63, 65)]),
    ):
        (gradient,) = torch.autograd.grad(term(points, points.detach() * 0), points)
        assert sorted(gradient[0].abs().sum(1).nonzero().flatten().tolist()) == sorted(sum(pairs, ()))
        for a, b in pairs:  # each pair pulls against itself, along the line between
            torch.testing.assert_close(gradient[0, a], -gradient[0, b])


def test_a_closed_eye_has_a_gradient_without_nan():
    points = torch.zeros(2, 68, 2, requires_grad=True)
    losses.eye_distances(points, torch.rand(2, 68, 2)).backward()
    assert (points.grad == 0).all()


def test_descriptors_compare_directions():
    first = torch.tensor([[1.0, 0, 0], [0, 2.0, 0], [0, 0, 1.0]])
    assert losses.descriptors(first, 3 * first).item() == pytest.approx(0, abs=1e-6)
    assert losses.descriptors(first, -first).item() == pytest.approx(2)
    assert losses.descriptors(first, first.roll(1, 1)).item() == pytest.approx(1)
    assert losses.identity(first, 3 * first).item() == pytest.approx(0, abs=1e-6)
    assert losses.identity(torch.zeros(1, 3), first[:1]).item() == pytest.approx(1)


def test_photometric_sees_the_mask_alone_and_each_photo_alike():
    drawn, photo = torch.rand(2, 3, 5, 7), torch.rand(2, 3, 5, 7)
    mask = torch.zeros(2, 5, 7, dtype=torch.bool)
    mask[0, 2, 3] = True
    mask[1, 1:4] = True
    want = torch.stack([(drawn - photo)[i].abs()[:, mask[i]].mean() for i in range(2)]).mean()
    torch.testing.assert_close(losses.photometric(drawn, photo, mask), want)
    drawn.requires_grad_()
    losses.photometric(drawn, photo, mask).backward()
    assert ((drawn.grad != 0) == mask[:, None].expand_as(drawn)).all()
    assert losses.photometric(drawn, photo, mask & False).item() == 0


def test_light_is_free_while_it_is_white():
    light = torch.arange(36.0).reshape(4, 9, 1).expand(-1, -1, 3).reshape(4, 27)
    assert losses.color_of_light(light).item() == 0
    red = torch.zeros(1, 27)
    red[0, ::3] = 3.0  # deviations 2, -1, -1
    assert losses.color_of_light(red).item() == pytest.approx(2.0)


def test_regularizers_name_each_part_and_do_not_depend_on_the_batch_size():
    predicted = torch.randn(1, params.TOTAL)
    parts = params.split(predicted)
    once = losses.regularizers(predicted)
    assert set(once) == set(params.PARTS)
    for name in ("shape", "texture", "pose", "expression"):
        assert once[name].item() == pytest.approx((parts[name] ** 2).sum().item() / 2, rel=1e-5)
    for name, value in losses.regularizers(predicted.expand(5, -1)).items():
        torch.testing.assert_close(value, once[name])
    ordinary = torch.zeros(2, params.TOTAL)
    ordinary[:, params.SLICES["camera"]] = torch.tensor(losses.CAMERA_BIAS)
    assert all(value == 0 for value in losses.regularizers(ordinary).values())
    with pytest.raises(InputError, match="parameters: expected"):
        losses.regularizers(torch.zeros(2, 5))


@pytest.mark.parametrize(
    ("term", "size"),
    [
        (lambda a, b: losses.vertices(a, b, torch.linspace(0.5, 1.5, 4)), (2, 4, 3)),
        (lambda a, b: losses.landmarks(a, b, losses.landmark_weights()), (2, 68, 2)),
        (losses.eye_distances, (2, 68, 2)),
        (losses.lip_distances, (2, 68, 2)),
        (losses.descriptors, (2, 8)),
        (losses.coefficients, (2, 5)),
        (losses.rotations, (2, 6)),
        (lambda a, b: losses.photometric(a, b, torch.ones(2, 3, 2, dtype=torch.bool)), (2, 3, 3, 2)),
        (lambda a, b: losses.color_of_light(a), (2, 27)),
    ],
)
def test_gradients(term, size):
    assert torch.autograd.gradcheck(term, (moving(*size), moving(*size, seed=1).detach()))


def test_what_is_not_known_neither_counts_nor_pulls():
    known = torch.tensor([True, False, True])
    terms = [
        (lambda a, b, k=None: losses.vertices(a, b, torch.ones(68), k), (68, 3)),
        (lambda a, b, k=None: losses.landmarks(a, b, losses.landmark_weights(), k), (68, 2)),
        (lambda a, b, k=None: losses.eye_distances(a, b, k), (68, 2)),
        (lambda a, b, k=None: losses.lip_distances(a, b, k), (68, 2)),
        (lambda a, b, k=None: losses.descriptors(a, b, k), (8,)),
        (lambda a, b, k=None: losses.coefficients(a, b, known=k), (5,)),
        (lambda a, b, k=None: losses.rotations(a, b, k), (6,)),
    ]
    for term, size in terms:
        predicted, truth = moving(3, *size), moving(3, *size, seed=1).detach()
        got = term(predicted, truth, known)
        torch.testing.assert_close(got, term(predicted[known], truth[known]))
        torch.testing.assert_close(term(predicted, truth, known | True), term(predicted, truth))
        (gradient,) = torch.autograd.grad(got, predicted)
        assert (gradient[1] == 0).all() and (gradient[0] != 0).any()
        assert term(predicted, truth, known & False).item() == 0


def test_swapping_shapes_stays_with_the_person():
    actors = torch.tensor([7, 7, 3, 3, 3, 9, 7])
    predicted = torch.arange(7.0)[:, None].expand(7, params.TOTAL).clone().requires_grad_()
    seen = set()
    for seed in range(20):
        swapped = losses.swap_shapes(predicted, actors, torch.Generator().manual_seed(seed))
        donor = swapped[:, 0].long()
        seen.add(tuple(donor.tolist()))
        shape, rest = params.SLICES["shape"], params.SLICES["shape"].stop
        assert (swapped[:, shape] == donor[:, None]).all()
        assert (swapped[:, rest:] == predicted[:, rest:]).all()
        assert sorted(donor.tolist()) == list(range(7))
        assert (actors[donor] == actors).all()
        assert ((donor == torch.arange(7)) == (actors == 9)).all()  # nobody keeps his own who could have another's
    assert len(seen) > 1
    again = losses.swap_shapes(predicted, actors, torch.Generator().manual_seed(19))
    assert tuple(again[:, 0].long().tolist()) == tuple(donor.tolist())
    swapped[0].sum().backward()  # the shape's gradient goes to the image that it came from
    assert predicted.grad[donor[0], 0] == 1 and predicted.grad[0, rest] == 1 and predicted.grad[0, 0] == 0


def test_swapping_shapes_without_partners_changes_nothing():
    predicted = torch.randn(4, params.TOTAL)
    assert losses.swap_shapes(predicted, torch.tensor([4, 2, 9, 1])) is predicted
    two = losses.swap_shapes(predicted, torch.tensor([1, 2, 2, 3]))
    assert (two[[0, 3]] == predicted[[0, 3]]).all() and (two[[1, 2], :300] == predicted[[2, 1], :300]).all()
    with pytest.raises(InputError, match="predicted, actors"):
        losses.swap_shapes(predicted, torch.tensor([1, 2]))


def test_gradient_norms_show_a_silent_term():
    predicted = torch.randn(2, 3, requires_grad=True)
    parts = {
        "linear": (2 * predicted).sum(),
        "silent": (predicted * 0).sum(),
        "other": torch.zeros((), requires_grad=True) * 1,
        "constant": torch.tensor(3.0),
    }
    norms = losses.gradient_norms(parts, {"linear": 0.5, "silent": 9.0, "other": 1.0, "constant": 1.0}, predicted)
    assert norms == {"linear": pytest.approx(math.sqrt(6)), "silent": 0.0, "other": 0.0, "constant": 0.0}
    parts["linear"].backward()  # the graph is still there, and nothing was left in .grad before
    assert (predicted.grad == 2).all()


def test_total_weighs_and_returns_every_part():
    parts = {"a": torch.tensor(2.0), "b": torch.tensor(3.0)}
    value, same = losses.total(parts, {"a": 0.5, "b": 2.0})
    assert value.item() == 7
    assert same is parts
    with pytest.raises(KeyError):
        losses.total(parts, {"a": 1.0})
