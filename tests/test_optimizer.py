"""The optimisers share out a network's parameters and step them as their papers say."""

from __future__ import annotations

import pytest
import torch

from chebface.config import TrainReconstructor
from chebface.optimizer import HiddenMuon, build_optimizers, set_rate
from chebface.regressor import Regressor


def test_adamw_alone_is_the_default():
    model = Regressor("light")
    (optimizer,) = build_optimizers(model, TrainReconstructor())
    assert isinstance(optimizer, torch.optim.AdamW)
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))


def test_muon_takes_the_hidden_matrices_and_nothing_else():
    torch.manual_seed(0)
    model = Regressor("light", skip=True).train()
    torch.nn.utils.convert_conv2d_weight_memory_format(model, torch.channels_last)
    optimizers = build_optimizers(model, TrainReconstructor(optimizer="muon", learning_rate=0.1))
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    model(torch.randn(3, 3, 112, 112)).square().sum().backward()
    optimizers[1].step()
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert "backbone.layers.0.conv2.weight" in moved
    assert "mapping.0.weight" in moved
    hands_off = ("output", "skip", "bias", "bn", "prelu", "backbone.stem", "backbone.features.layers.0")
    assert not [name for name in moved if name.startswith(hands_off) or any(p in name for p in hands_off[2:5])]
    optimizers[0].step()
    still = {name for name, weight in model.named_parameters() if torch.equal(weight, before[name])}
    assert not still


def test_a_convolution_is_stepped_as_torch_steps_its_matrix():
    torch.manual_seed(1)
    conv = torch.nn.Conv2d(8, 6, 3).to(memory_format=torch.channels_last)
    matrix = torch.nn.Parameter(conv.weight.detach().movedim(1, -1).reshape(6, -1).clone())
    ours = HiddenMuon([conv.weight], lr=0.1, weight_decay=0.01)
    known = torch.optim.Muon([matrix], 0.1, 0.01)
    for _ in range(3):
        gradient = torch.randn(6, 8, 3, 3)
        conv.weight.grad, matrix.grad = gradient, gradient.movedim(1, -1).reshape(6, -1)
        ours.step()
        known.step()
    torch.testing.assert_close(conv.weight.detach().movedim(1, -1).reshape(6, -1), matrix.detach(), rtol=0, atol=0)


def test_rates_move_together():
    optimizers = build_optimizers(
        Regressor("light").to(memory_format=torch.channels_last),
        TrainReconstructor(optimizer="muon", learning_rate=0.4, muon_learning_rate=0.2),
    )
    set_rate(optimizers, 0.5)
    assert [o.param_groups[0]["lr"] for o in optimizers] == pytest.approx([0.2, 0.1])
