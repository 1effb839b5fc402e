"""The training loop of the reconstructor, top to bottom, and its held-out evaluation."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chebface import camera, checkpoint, losses, params
from chebface.config import TrainReconstructor, to_dict
from chebface.crop import WIDE_PX
from chebface.data.sample import Shards
from chebface.errors import AssetError, ChebfaceError
from chebface.flame import Flame
from chebface.heads import Head, open_head
from chebface.native import keep_freed_memory
from chebface.optimizer import build_optimizers, set_rate
from chebface.regressor import Regressor, normalize_crop

STATE = "state.safetensors"  # everything needed to go on
WEIGHTS = "regressor.safetensors"  # the weights alone, of the last save


class DivergedError(ChebfaceError):
    """A loss term stopped being a number."""


class Batches:
    """Batches of a dataset in an order that depends on seed and step alone, so that a resumed run sees the same.

    Iterating gives (crop (B, 112, 112, 3) uint8, parameters (B, 486), landmarks (B, 68, 2) ndc), prefetched.
    """

    def __init__(self, data: Shards, batch: int, seed: int, start: int, stop: int) -> None:
        if len(data) < batch:
            raise AssetError(f"dataset {data.folder}: {len(data)} samples, fewer than one batch of {batch}")
        self.data, self.batch, self.seed, self.start, self.stop = data, batch, seed, start, stop

    def _indices(self, step: int) -> np.ndarray:
        per_epoch = len(self.data) // self.batch
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.data))
        return order[place * self.batch : (place + 1) * self.batch]

    def _load(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        return collate([self.data[int(i)] for i in self._indices(step)])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        ahead = 3
        with ThreadPoolExecutor(1) as pool:
            waiting = [pool.submit(self._load, s) for s in range(self.start, min(self.start + ahead, self.stop))]
            for step in range(self.start, self.stop):
                ready = waiting.pop(0)
                if step + ahead < self.stop:
                    waiting.append(pool.submit(self._load, step + ahead))
                yield ready.result()


def collate(samples: list) -> tuple[Tensor, Tensor, Tensor]:
    """Stack samples: crops (B, 112, 112, 3) uint8, parameters (B, 486), landmarks (B, 68, 2) ndc."""
    crops = torch.from_numpy(np.stack([s.aligned_u8 for s in samples]))
    parameters = torch.from_numpy(np.stack([s.parameters for s in samples]))
    landmarks = camera.px_to_ndc(torch.from_numpy(np.stack([s.landmarks_px for s in samples])), WIDE_PX, WIDE_PX)
    return crops, parameters, landmarks


class Objective:
    """What the reconstructor is trained for: the loss of a batch, part by part."""

    def __init__(self, head: Head, config: TrainReconstructor, device: torch.device) -> None:
        self.flame = Flame(head).to(device)
        self.config = config
        self.regions = losses.region_weights(head).to(device)
        self.points = losses.landmark_weights().to(device)
        self.seen_weights = losses.region_weights(head, face=4.0).to(device)
        reach = torch.from_numpy((head.shape_dirs.astype(np.float64) ** 2).sum((1, 2)))
        self.shape_weights = (reach / reach.mean()).float().to(device)
        c = config
        self.weights = {
            "landmarks": c.lambda_2d,
            "vertices": c.lambda_3d * c.lambda_vertices,
            "reprojection": c.weight_reprojection,
            "pose": c.weight_pose,
            "shape": c.weight_shape,
            "texture": c.weight_texture,
            "camera": c.weight_camera,
            "light": c.weight_light,
            "regularizer": c.regularize,
        }

    def __call__(self, predicted: Tensor, truth: Tensor, landmarks_ndc: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of predicted parameters (B, 486) against the true ones and the landmarks (B, 68, 2) seen."""
        guess, known = params.split(predicted), params.split(truth)
        vertices, points = self.flame.decode(predicted)
        seen, points_seen = (camera.project(each, guess["camera"])[..., :2] for each in (vertices, points))
        with torch.no_grad():
            true_vertices, _ = self.flame.decode(truth)
            true_seen = camera.project(true_vertices, known["camera"])[..., :2]
            true_neutral = self.flame.neutral(known["shape"])
        percent = 50.0  # of the wide frame, which is 2 wide in ndc
        parts = {
            "landmarks": losses.landmarks(points_seen, landmarks_ndc, self.points) * percent,
            "reprojection": losses.landmarks(seen, true_seen, self.seen_weights) * percent,
            "vertices": losses.vertices(self.flame.neutral(guess["shape"]), true_neutral, self.regions),
            "pose": losses.rotations(guess["pose"], known["pose"]),
            "shape": losses.coefficients(guess["shape"], known["shape"], self.shape_weights),
            "texture": losses.coefficients(guess["texture"], known["texture"]),
            "camera": losses.coefficients(guess["camera"], known["camera"]),
            "light": losses.coefficients(guess["light"], known["light"]),
            "regularizer": losses.regularizer(guess["shape"], guess["expression"]),
        }
        return losses.total(parts, self.weights)


def train_reconstructor(
    config: TrainReconstructor,
    data: str | Path,
    output: str | Path,
    *,
    resume: bool = True,
    device: str = "cpu",
    report: Callable[[int, dict[str, Any]], None] | None = None,
) -> Path:
    """Train on a dataset of synthetic pairs.

    Args:
        config: settings; `config.head` must be the head that the data was made with.
        data: folder of shards.
        output: folder for log.jsonl, the resumable state and the weights.
        resume: go on from the state in `output` when there is one.
        device: as torch names it.
        report: called every `log_every` steps with the step and its numbers.

    Returns:
        the weights' file.

    Raises:
        AssetError: data, head or state do not belong together.
        DivergedError: a loss term is not finite; the last saved state is intact.
    """
    output, where = Path(output), torch.device(device)
    output.mkdir(parents=True, exist_ok=True)
    head, shards = open_head(config.head), Shards(data)
    checkpoint.check_head(shards.about, head)
    keep_freed_memory()
    torch.manual_seed(config.seed)
    model = Regressor(config.backbone, config.normalize_embedding, config.skip).to(where)
    torch.nn.utils.convert_conv2d_weight_memory_format(model, torch.channels_last)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizers = build_optimizers(model, config)
    objective = Objective(head, config, where)
    start = _restore(output / STATE, model, optimizers, config) if resume else 0
    card = _card(config, head, shards)
    half = config.precision == "bf16"
    model.train()
    clock, seen = time.monotonic(), 0
    with open(output / "log.jsonl", "a") as log:
        for step, batch in enumerate(Batches(shards, config.batch, config.seed, start, config.steps), start):
            set_rate(optimizers, rate_share(config, step))
            crops, truth, landmarks_ndc = (tensor.to(where) for tensor in batch)
            with torch.autocast(where.type, torch.bfloat16, enabled=half):
                predicted = model(normalize_crop(crops).to(memory_format=torch.channels_last))
            loss, parts = objective(predicted.float(), truth, landmarks_ndc)
            if not torch.isfinite(loss):
                broken = [name for name, part in parts.items() if not torch.isfinite(part)]
                raise DivergedError(f"step {step}: loss term {', '.join(broken)} is not finite; lower learning_rate")
            model.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(trained, config.clip_gradient)
            for optimizer in optimizers:
                optimizer.step()
            seen += len(crops)
            if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
                numbers = {name: round(part.item(), 5) for name, part in parts.items()}
                rate = seen / (time.monotonic() - clock)
                row = {
                    "step": step + 1,
                    "loss": loss.item(),
                    "gradient": norm.item(),
                    "faces_per_s": rate,
                } | numbers
                log.write(json.dumps(row) + "\n")
                log.flush()
                if report:
                    report(step + 1, row)
            if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
                _save_state(output / STATE, model, optimizers, step + 1, config)
                checkpoint.save(output / WEIGHTS, model.state_dict(), card | {"steps_done": step + 1})
    return output / WEIGHTS


def rate_share(config: TrainReconstructor, step: int) -> float:
    """Share of the full learning rate: linear warm-up, then a cosine down to final_learning_rate."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    low = config.final_learning_rate
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))


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
        AssetError: weights and data of different heads, or a head without a face mask.
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
            crops, truth, landmarks_ndc = collate([shards[i] for i in range(first, min(first + batch, len(shards)))])
            predicted = model(normalize_crop(crops))
            for name, values in _errors(flame, face, predicted, truth, landmarks_ndc).items():
                rows.setdefault(name, []).append(values)
        count = len(shards)
    result: dict[str, Any] = {name: round(float(torch.cat(values).mean()), 4) for name, values in rows.items()}
    for part in ("head", "face", "face_nonmetrical"):
        result[f"ratio_{part}"] = round(result[f"{part}_mm"] / result[f"mean_head_{part}_mm"], 4)
    return {"faces": count} | result


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
        AssetError: as `evaluate`, or faces of the training's seed; `output` stays as it was.
    """
    tensors, card = checkpoint.load(weights)
    with Shards(data) as shards:
        settings = shards.about["settings"]
    if settings["seed"] == card["data"]["seed"]:
        raise AssetError(f"dataset {data}: has the training's seed {settings['seed']}; held-out faces need another")
    output = Path(output)
    with tempfile.TemporaryDirectory() as folder:
        trial = checkpoint.save(Path(folder) / output.name, checkpoint.half(tensors), card)
        errors = evaluate(trial, data)
    checkpoint.save(output, checkpoint.half(tensors), card | {"held_out": errors | {"data": settings}})
    return errors


def angle_deg(first: Tensor, second: Tensor) -> Tensor:
    """The angle between two rotations given as axis-angle (B, 3), in degrees. (B,)."""
    from chebface.flame import rotations

    relative = rotations(first) @ rotations(second).mT
    return torch.rad2deg(torch.acos(((relative.diagonal(dim1=1, dim2=2).sum(1) - 1) / 2).clamp(-1, 1)))


def _distance_mm(first: Tensor, second: Tensor) -> Tensor:
    return (first - second).norm(dim=-1).mean(1) * 1000


def _card(config: TrainReconstructor, head: Head, shards: Shards) -> dict[str, Any]:
    return {
        "backbone": config.backbone,
        "normalize": config.normalize_embedding,
        "skip": config.skip,
        "head": head.facts,
        "training": to_dict(config),
        "data": shards.about["settings"],
    }


def _save_state(
    path: Path, model: Regressor, optimizers: list[torch.optim.Optimizer], step: int, config: TrainReconstructor
) -> None:
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for place, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{place}.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
    tensors["rng"] = torch.get_rng_state()
    checkpoint.save(path, tensors, {"step": step, "config": to_dict(config)})


def _restore(path: Path, model: Regressor, optimizers: list[torch.optim.Optimizer], config: TrainReconstructor) -> int:
    if not path.exists():
        return 0
    tensors, card = checkpoint.load(path)
    if card["config"] != to_dict(config):
        changed = sorted(k for k, v in to_dict(config).items() if card["config"].get(k) != v)
        raise AssetError(
            f"{path}: was begun with other settings ({', '.join(changed)}); choose another output or --no-resume"
        )
    model.load_state_dict({name[6:]: tensor for name, tensor in tensors.items() if name.startswith("model.")})
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, place, index, key = name.split(".")
            states[int(place)].setdefault(int(index), {})[key] = tensor
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    torch.set_rng_state(tensors["rng"])
    return int(card["step"])
