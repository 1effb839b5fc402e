"""One function per loss term; `total` weighs them and returns every part, `gradient_norms` says how each one pulls.

B batch, N vertices, P landmarks, H W pixels. Mesh losses are in millimetres. A term that not every item has the truth
for takes `known` (B,) bool: the mean is then over those items, and zero where there is none.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Generator, Tensor

from chebface import params
from chebface.encoder import descriptor_distance
from chebface.errors import InputError
from chebface.heads.asset import Head
from chebface.regressor import CAMERA_BIAS

FACE_WEIGHT, REST_WEIGHT, HIDDEN_WEIGHT = 150.0, 1.0, 0.01  # MICA's region weights: face; rest; eyeballs and ears
EYELIDS = ((37, 41), (38, 40), (43, 47), (44, 46))  # upper and lower, among the 68
LIPS = ((61, 67), (62, 66), (63, 65))  # inner rims of the upper and the lower one


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


def vertices(predicted: Tensor, truth: Tensor, weights: Tensor, known: Tensor | None = None) -> Tensor:
    """Weighted mean absolute difference per coordinate, in mm: mean(w |V - V_gt|) * 1000.

    Args:
        predicted, truth: (B, N, 3) metres.
        weights: (N,), mean 1.

    Source: the paper, equation 4.
    """
    return _mean((predicted - truth).abs() * weights[:, None], known) * 1000


def descriptors(predicted: Tensor, truth: Tensor, known: Tensor | None = None) -> Tensor:
    """The 3D identity loss: mean 1 - cos(E(M), E(M_gt)), in [0, 2].

    Args:
        predicted: (B, code) descriptors of the predicted meshes, by a frozen encoder in eval.
        truth: (B, code) descriptors of the true ones, made under no_grad.

    Raises:
        InputError: descriptors of other sizes.

    Source: the paper, equation 6.
    """
    return _mean(descriptor_distance(predicted, truth), known)


def landmarks(predicted: Tensor, truth: Tensor, weights: Tensor, known: Tensor | None = None) -> Tensor:
    """Weighted mean absolute difference in [-1, 1] image coordinates. DECA weighs it 1.

    Args:
        predicted, truth: (B, P, 2) ndc.
        weights: (P,).

    Source: DECA (Feng et al., SIGGRAPH 2021), section 4.1.
    """
    return _mean((predicted - truth).abs() * weights[:, None], known)


def eye_distances(predicted: Tensor, truth: Tensor, known: Tensor | None = None) -> Tensor:
    """How far the eyelids are apart, in [-1, 1] image coordinates: mean | |a - b| - |a_gt - b_gt| | over EYELIDS.

    What shifts both points alike costs nothing, so a closed eye counts even where the head is badly placed.
    DECA weighs it 1.

    Args:
        predicted, truth: (B, 68, 2) ndc.

    Source: DECA, section 4.1, as its code has it: lengths, not vectors.
    """
    return _mean((_lengths(predicted, EYELIDS) - _lengths(truth, EYELIDS)).abs(), known)


def lip_distances(predicted: Tensor, truth: Tensor, known: Tensor | None = None) -> Tensor:
    """How far the lips are apart: as `eye_distances`, over LIPS. DECA weighs it 0.5; only its code has it."""
    return _mean((_lengths(predicted, LIPS) - _lengths(truth, LIPS)).abs(), known)


def photometric(drawn: Tensor, photo: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute difference inside the mask, per pixel and channel; each photo counts alike, without mask as 0.

    DECA weighs it 2. The caller decides what is drawn: `Shader.draw` lights it; DECA's released code compares the unlit
    albedo (`lit=False`), which our `deca_compat` repeats. The mask carries no gradient.

    Args:
        drawn: (B, 3, H, W) RGB.
        photo: (B, 3, H, W) RGB in [0, 1].
        mask: (B, H, W) bool: the face, less what is known to hide it.

    Source: DECA, section 4.1.
    """
    inside = mask[:, None].to(drawn.dtype)
    summed = ((drawn - photo).abs() * inside).sum((1, 2, 3))
    return (summed / (drawn.shape[1] * inside.sum((1, 2, 3)).clamp(min=1))).mean()


def identity(drawn: Tensor, photo: Tensor) -> Tensor:
    """Mean 1 - cos between embeddings of the picture drawn and of the photo, in [0, 2]. DECA weighs it 0.2.

    The network is frozen. The caller draws with light and albedo detached (`render.shade.hold_skin`), so that likeness
    has to come from shape, expression, pose and camera.

    Args:
        drawn: (B, C) embeddings of the drawn face over its photo.
        photo: (B, C) embeddings of the photo, made under no_grad.

    Source: DECA, section 4.1.
    """
    return descriptor_distance(drawn, photo).mean()


def coefficients(
    predicted: Tensor, truth: Tensor, weights: Tensor | None = None, known: Tensor | None = None
) -> Tensor:
    """Mean squared difference of parameters (B, C), each weighed by weights (C,)."""
    squared = (predicted - truth) ** 2
    return _mean(squared if weights is None else squared * weights, known)


def rotations(predicted: Tensor, truth: Tensor, known: Tensor | None = None) -> Tensor:
    """Mean squared difference of rotation matrices, from axis-angle (B, 3k) in radians."""
    from chebface.flame import rotations as to_matrix

    items = len(predicted)
    difference = to_matrix(predicted.reshape(items, -1, 3)) - to_matrix(truth.reshape(items, -1, 3))
    return _mean(difference**2, known)


def regularizer(*coefficients: Tensor) -> Tensor:
    """Sum of squares over each (B, C), divided by the batch size."""
    return torch.stack([(c**2).sum() / len(c) for c in coefficients]).sum()


def regularizers(predicted: Tensor) -> dict[str, Tensor]:
    """What keeps parameters near the ordinary, by part of the 486; DECA's weights are 1e-4 each, for light 1.

    shape, texture, pose, expression: half the sum of squares, divided by the batch size (DECA does not divide).
    camera: the same of its deviation from CAMERA_BIAS, for no head is ordinary at scale zero.
    light: `color_of_light`.

    Args:
        predicted: (B, 486).

    Raises:
        InputError: the last dimension is not 486.

    Source: DECA, section 4.1, as its code has it.
    """
    parts = params.split(predicted)
    rest = predicted.new_tensor(CAMERA_BIAS)
    return {
        "shape": regularizer(parts["shape"]) / 2,
        "texture": regularizer(parts["texture"]) / 2,
        "pose": regularizer(parts["pose"]) / 2,
        "expression": regularizer(parts["expression"]) / 2,
        "camera": regularizer(parts["camera"] - rest) / 2,
        "light": color_of_light(parts["light"]),
    }


def color_of_light(light: Tensor) -> Tensor:
    """Mean squared deviation of light (B, 27) from its mean over red, green and blue: white light is free.

    Source: DECA, as its code has it.
    """
    bands = light.unflatten(-1, (9, 3))
    return ((bands - bands.mean(-1, keepdim=True)) ** 2).mean()


def swap_shapes(predicted: Tensor, actors: Tensor, generator: Generator | None = None) -> Tensor:
    """Shape consistency: give each image the shape of another image of the same person, and apply every loss again.

    The images of one person stand in a random ring, and each takes the shape of the next: with two images, always the
    other's (DECA's permutation may leave a code where it was, and then says nothing new).

    Args:
        predicted: (B, 486).
        actors: (B,) int, who each image shows.
        generator: on the CPU; None takes torch's own.

    Returns:
        (B, 486), the parameters with shape codes swapped; `predicted` itself where every person has one image.

    Raises:
        InputError: shapes that do not fit together.

    Source: DECA, section 4.2.
    """
    params.split(predicted)
    if predicted.ndim != 2 or actors.shape != predicted.shape[:1]:
        raise InputError(
            f"predicted, actors: expected (B, {params.TOTAL}) and (B,), got {tuple(predicted.shape)} and "
            f"{tuple(actors.shape)}"
        )
    who = actors.cpu()
    ring = torch.rand(len(who), generator=generator).argsort()
    ring = ring[who[ring].argsort(stable=True)]  # person by person, random within
    _, counts = torch.unique_consecutive(who[ring], return_counts=True)
    if (counts == 1).all():
        return predicted
    last = counts.cumsum(0) - 1
    following = torch.arange(1, len(who) + 1)
    following[last] = last - counts + 1
    donor = torch.empty_like(ring)
    donor[ring] = ring[following]
    swapped = predicted.clone()
    part = params.SLICES["shape"]
    swapped[:, part] = predicted[donor.to(predicted.device), part]
    return swapped


def total(parts: dict[str, Tensor], weights: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighed sum, and every part as it entered.

    Args:
        parts: scalar terms by name.
        weights: their weights; every part must have one.
    """
    return torch.stack([weights[name] * part for name, part in parts.items()]).sum(), parts


def gradient_norms(parts: dict[str, Tensor], weights: dict[str, float], predicted: Tensor) -> dict[str, float]:
    """How strongly each weighed term pulls on the prediction: |d(w L) / d predicted|, so that a silent one is seen.

    One backward pass a term, down to `predicted` only; the graph stays.

    Args:
        parts, weights: as `total` takes them.
        predicted: (B, 486) what the terms were made from, with a gradient.

    Returns:
        the norm over the whole batch by name; 0 for a term that does not depend on the prediction.
    """
    norms = {}
    for name, part in parts.items():
        found = None
        if part.requires_grad:
            (found,) = torch.autograd.grad(part, predicted, retain_graph=True, allow_unused=True)
        norms[name] = 0.0 if found is None else abs(weights[name]) * float(torch.linalg.vector_norm(found))
    return norms


def _lengths(points: Tensor, pairs: tuple[tuple[int, int], ...]) -> Tensor:
    """Distances (B, pairs) between points (B, P, 2); where two coincide the gradient is zero."""
    first, second = zip(*pairs, strict=True)
    return torch.linalg.vector_norm(points[:, list(first)] - points[:, list(second)], dim=-1)


def _mean(values: Tensor, known: Tensor | None) -> Tensor:
    """The mean of (B, ...), over the known items alone."""
    if known is None:
        return values.mean()
    each = values.flatten(1).mean(1) if values.ndim > 1 else values
    return torch.where(known, each, 0).sum() / known.sum().clamp(min=1)
