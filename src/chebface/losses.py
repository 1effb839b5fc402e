"""One function per loss term; `total` weighs them and returns every part.

B batch, N vertices, P landmarks. Mesh losses are in millimetres.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from chebface.heads.asset import Head

FACE_WEIGHT, REST_WEIGHT, HIDDEN_WEIGHT = 150.0, 1.0, 0.01  # MICA's region weights: face; rest; eyeballs and ears


def region_weights(head: Head, face: float = FACE_WEIGHT) -> Tensor:
    """Per-vertex weights of the vertex loss, MICA's by region, scaled to mean 1. (N,) float32."""
    weights = np.full(len(head.template), REST_WEIGHT)
    for region, weight in (("face", face), ("eyeballs", HIDDEN_WEIGHT), ("ears", HIDDEN_WEIGHT)):
        if region in head.masks:
            weights[head.masks[region]] = weight
    return torch.from_numpy(weights / weights.mean()).float()


def landmark_weights() -> Tensor:
    """Per-point weights of the landmark loss, DECA's. (68,) float32."""
    weights = torch.ones(68)
    weights[[5, 6, 10, 11]] = 2.0
    weights[27:36] = 1.5
    weights[[30, 31, 35]] = 3.0
    weights[48:68] = 1.5
    weights[[48, 54]] = 3.0
    return weights


def vertices(predicted: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean absolute difference per coordinate, in mm: mean(w |V - V_gt|) * 1000.

    Args:
        predicted, truth: (B, N, 3) metres.
        weights: (N,), mean 1.

    Source: the paper, equation 4.
    """
    return ((predicted - truth).abs() * weights[:, None]).mean() * 1000


def landmarks(predicted: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean absolute difference in [-1, 1] image coordinates.

    Args:
        predicted, truth: (B, P, 2) ndc.
        weights: (P,).

    Source: DECA (Feng et al., SIGGRAPH 2021), section 4.1.
    """
    return ((predicted - truth).abs() * weights[:, None]).mean()


def coefficients(predicted: Tensor, truth: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean squared difference of parameters (B, C), each weighed by weights (C,)."""
    squared = (predicted - truth) ** 2
    return squared.mean() if weights is None else (squared * weights).mean()


def rotations(predicted: Tensor, truth: Tensor) -> Tensor:
    """Mean squared difference of rotation matrices, from axis-angle (B, 3k)."""
    from chebface.flame import rotations as to_matrix

    return ((to_matrix(predicted.reshape(-1, 3)) - to_matrix(truth.reshape(-1, 3))) ** 2).mean()


def regularizer(*coefficients: Tensor) -> Tensor:
    """Sum of squares over each (B, C), divided by the batch size."""
    return torch.stack([(c**2).sum() / len(c) for c in coefficients]).sum()


def total(parts: dict[str, Tensor], weights: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighed sum, and every part as it entered.

    Args:
        parts: scalar terms by name.
        weights: their weights; every part must have one.
    """
    return torch.stack([weights[name] * part for name, part in parts.items()]).sum(), parts
