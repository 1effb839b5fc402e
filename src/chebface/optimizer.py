"""The reconstructor's optimisers: AdamW, as in the paper; or Muon for the hidden layers and AdamW for the rest.

Sources: Loshchilov and Hutter, Decoupled Weight Decay Regularization (ICLR 2019); Jordan et al., Muon (2024).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from chebface.config import TrainReconstructor


class HiddenMuon(torch.optim.Muon):
    """torch's Muon for convolutions too: each weight (out, in, height, width) is stepped as an (out, rest) matrix.

    Args:
        weights: of linear layers, and of convolutions in channels-last memory format.
    """

    def __init__(self, weights: list[nn.Parameter], *, lr: float, weight_decay: float) -> None:
        self._weights = weights
        super().__init__([nn.Parameter(_to_rows(w.detach()).view(len(w), -1)) for w in weights], lr, weight_decay)

    @torch.no_grad()
    def step(self, closure=None):
        """Step every weight by its gradient."""
        for matrix, weight in zip(self.param_groups[0]["params"], self._weights, strict=True):
            matrix.grad = None if weight.grad is None else _to_rows(weight.grad).reshape(len(weight), -1)
        return super().step(closure)


def build_optimizers(model: nn.Module, config: TrainReconstructor) -> list[torch.optim.Optimizer]:
    """Optimisers that share out the trained parameters of a `Regressor`. Their rates are set by `set_rate`."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    hidden = {}
    if config.optimizer == "muon":
        hidden = {name: p for name, p in trained.items() if _is_hidden(name, p)}
    rest = [p for name, p in trained.items() if name not in hidden]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, config.learning_rate, weight_decay=config.weight_decay)
    ]
    if hidden:
        optimizers.append(HiddenMuon(list(hidden.values()), lr=config.muon_learning_rate, weight_decay=0.01))
    return optimizers


def set_rate(optimizers: list[torch.optim.Optimizer], share: float) -> None:
    """Set every learning rate to this share of its full one."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = optimizer.defaults["lr"] * share


def _is_hidden(name: str, weight: Tensor) -> bool:
    """Muon is for matrices within a network: not its first layer, not its outputs, not depth-wise filters."""
    return weight.ndim in {2, 4} and weight.shape[1] > 3 and not name.startswith(("output.", "skip."))


def _to_rows(weight: Tensor) -> Tensor:
    return weight.movedim(1, -1) if weight.ndim == 4 else weight
