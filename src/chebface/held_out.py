"""How good a regressor is on faces it was not trained on, and weights made ready to ship with that in their card."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chebface import camera, checkpoint, params
from chebface.crop import WIDE_PX
from chebface.data.batches import Batch, collate
from chebface.data.mica import PARTS
from chebface.data.sample import Shards
from chebface.errors import AssetError
from chebface.flame import Flame
from chebface.heads import open_head
from chebface.regressor import normalize_crop


def evaluate(weights: str | Path | None, data: str | Path, *, batch: int = 32) -> dict[str, Any]:
    """Measure a regressor on synthetic pairs that it was not trained on.

    Vertex errors are mean distances in mm between the neutral heads, predicted and true: of the whole head (`head_mm`)
    and of the face region (`face_mm`), metrical, as they come; and of the face region after the best similarity
    (`face_nonmetrical_mm`), since one photograph does not tell how large a head is. `mean_head_*` is the same with the
    mean head in place of the prediction, and `ratio_*` the first over the second.

    Returns:
        those, with `posed_mm` (posed and with expression), landmark errors in wide-frame pixels and in percent of the
        distance of the outer eye corners, and the head's turn in degrees.

    Raises:
        AssetError: weights and data of different heads, a head without a face mask, or a face of which not everything
            is known.
    """
    model, card = checkpoint.load_regressor(weights)
    rows: dict[str, list[Tensor]] = {}
    with Shards(data) as shards, torch.inference_mode():
        head = open_head(shards.about["settings"]["head"])
        checkpoint.check_head(card, head)
        checkpoint.check_head(shards.about, head)
        if "face" not in head.masks:
            raise AssetError(f"head {head.name}: has no face mask; import it again with --masks")
        flame, face = Flame(head), torch.from_numpy(head.masks["face"])
        for first in range(0, len(shards), batch):
            known = collate([shards[i] for i in range(first, min(first + batch, len(shards)))])
            _check_known(known, data, first)
            predicted = model(normalize_crop(known.crop))
            for name, values in _errors(flame, face, predicted, known.parameters, known.landmarks).items():
                rows.setdefault(name, []).append(values)
        count = len(shards)
    result: dict[str, Any] = {name: round(float(torch.cat(values).mean()), 4) for name, values in rows.items()}
    for part in ("head", "face", "face_nonmetrical"):
        result[f"ratio_{part}"] = round(result[f"{part}_mm"] / result[f"mean_head_{part}_mm"], 4)
    return {"faces": count} | result


def _check_known(batch: Batch, data: str | Path, first: int) -> None:
    for name, known in (("parameters", batch.knows_parameters), ("landmarks", batch.knows_landmarks)):
        if not known.all():
            raise AssetError(
                f"dataset {data}: sample {first + int((~known).int().argmax())} has no {name}; only made-up faces "
                "(`chebface data synthesize`) can be measured so, photographs of known heads by `chebface evaluate`"
            )


def _errors(flame: Flame, face: Tensor, predicted: Tensor, truth: Tensor, landmarks_ndc: Tensor) -> dict[str, Tensor]:
    """Errors by name, one per item: (B,) each."""
    guess, known = params.split(predicted), params.split(truth)
    target = flame.neutral(known["shape"])
    errors = {}
    for prefix, neutral in (
        ("", flame.neutral(guess["shape"])),
        ("mean_head_", flame.neutral(torch.zeros_like(known["shape"]))),
    ):
        errors[f"{prefix}head_mm"] = _distance_mm(neutral, target)
        errors[f"{prefix}face_mm"] = _distance_mm(neutral[:, face], target[:, face])
        aligned = align_similarity(neutral[:, face], target[:, face])
        errors[f"{prefix}face_nonmetrical_mm"] = _distance_mm(aligned, target[:, face])
    (vertices, points), (true_vertices, _) = flame.decode(predicted), flame.decode(truth)
    errors["posed_mm"] = _distance_mm(vertices, true_vertices)
    seen = camera.project(points, guess["camera"])[..., :2]
    error_px = ((seen - landmarks_ndc).norm(dim=-1) * (WIDE_PX / 2)).mean(1)
    eyes_px = (landmarks_ndc[:, 36] - landmarks_ndc[:, 45]).norm(dim=-1) * (WIDE_PX / 2)
    errors["landmarks_px"] = error_px
    errors["landmarks_percent"] = error_px / eyes_px.clamp(min=20) * 100  # a profile's eyes nearly coincide
    errors["head_turn_deg"] = angle_deg(guess["pose"][:, params.HEAD_POSE], known["pose"][:, params.HEAD_POSE])
    return errors


def align_similarity(source: Tensor, target: Tensor) -> Tensor:
    """Move, turn and scale each source (B, N, 3) to its target (B, N, 3) in the sense of least squares (Umeyama)."""
    centre_s, centre_t = source.mean(1, keepdim=True), target.mean(1, keepdim=True)
    p, q = source - centre_s, target - centre_t
    u, s, vh = torch.linalg.svd(q.mT @ p)
    sign = torch.ones_like(s)
    sign[:, 2] = torch.sign(torch.linalg.det(u @ vh))
    rotation = (u * sign[:, None]) @ vh
    scale = (s * sign).sum(1) / (p**2).sum((1, 2))
    return scale[:, None, None] * (p @ rotation.mT) + centre_t


def publish(weights: str | Path, data: str | Path, output: str | Path) -> dict[str, Any]:
    """Write weights for shipping: float16, with the held-out errors of just these numbers in their card.

    Args:
        weights: a checkpoint of `train_reconstructor`.
        data: held-out synthetic pairs.
        output: the .safetensors file to write.

    Returns:
        the errors, as `evaluate` gives them.

    Raises:
        AssetError: as `evaluate`, or faces that may have been trained on; `output` stays as it was.
    """
    tensors, card = checkpoint.load(weights)
    with Shards(data) as shards:
        settings = shards.about["settings"]
        if (why := _why_seen(card["data"], settings | {"part": shards.about.get("part")})) is not None:
            raise AssetError(f"dataset {data}: {why}")
    output = Path(output)
    with tempfile.TemporaryDirectory() as folder:
        trial = checkpoint.save(Path(folder) / output.name, checkpoint.half(tensors), card)
        errors = evaluate(trial, data)
    checkpoint.save(output, checkpoint.half(tensors), card | {"held_out": errors | {"data": settings}})
    return errors


def _why_seen(trained: dict[str, Any], data: dict[str, Any]) -> str | None:
    """Why faces may be those of a training, from the settings of both datasets (and the part of packed ones), or None.

    A made-up face follows from its seed. Of packed photographs, the seed and the share decide who is held out, and a
    larger share holds out those of a smaller one too.
    """
    packed = ["held_out" in settings for settings in (trained, data)]
    if packed == [False, False]:
        same = trained["seed"] == data["seed"]
        return f"has the training's seed {data['seed']}; held-out faces need another" if same else None
    if packed != [True, True]:
        return None
    parts = {trained.get("part") or PARTS[0]: trained, data["part"]: data}
    if parts.keys() != set(PARTS):
        return f"is the part {data['part']}, as the training's data were; take the other one of the same packing"
    seen, unseen = (parts[name] for name in PARTS)
    if seen["seed"] != unseen["seed"] or seen["held_out"] < unseen["held_out"]:
        chosen = [f"seed {each['seed']} and held_out {each['held_out']}" for each in (trained, data)]
        return (
            f"was divided by {chosen[1]}, the training's data by {chosen[0]}; take the other part of the same packing"
        )
    return None


def angle_deg(first: Tensor, second: Tensor) -> Tensor:
    """The angle between two rotations given as axis-angle (B, 3), in degrees. (B,)."""
    from chebface.flame import rotations

    relative = rotations(first) @ rotations(second).mT
    return torch.rad2deg(torch.acos(((relative.diagonal(dim1=1, dim2=2).sum(1) - 1) / 2).clamp(-1, 1)))


def _distance_mm(first: Tensor, second: Tensor) -> Tensor:
    return (first - second).norm(dim=-1).mean(1) * 1000
