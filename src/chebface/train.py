"""The training loop of the reconstructor, top to bottom, on one process or, under torchrun, on many."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from chebface import checkpoint, foreign, losses, snapshot
from chebface.arcface import last_blocks
from chebface.config import TrainReconstructor, to_dict
from chebface.data.batches import Batch, Batches
from chebface.data.sample import Shards
from chebface.errors import AssetError, ConfigError, DivergedError, MissingDependencyError
from chebface.files import whole
from chebface.heads import Head, open_head
from chebface.native import keep_freed_memory
from chebface.objective import Objective, weights_of
from chebface.optimizer import build_optimizers, set_rate
from chebface.regressor import Regressor, normalize_crop
from chebface.render import open_renderer

STATE = "state.safetensors"  # everything needed to go on
WEIGHTS = "regressor.safetensors"  # the weights alone, of the last save
LOG = "log.jsonl"


@dataclass(frozen=True)
class Place:
    """Where this process stands among those of torchrun; alone it is the first of one."""

    rank: int
    world: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this process writes log and weights."""
        return self.rank == 0


@contextmanager
def join_group(device: str) -> Iterator[Place]:
    """Join the processes that torchrun started; without it, be alone.

    Args:
        device: cpu, or cuda: then each process takes the GPU of its local rank.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Place(0, 1, torch.device(device))
        return
    where = torch.device(device)
    if where.type == "cuda":
        where = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(where)
    torch.distributed.init_process_group("nccl" if where.type == "cuda" else "gloo")
    try:
        yield Place(torch.distributed.get_rank(), world, where)
    finally:
        torch.distributed.destroy_process_group()


def train_reconstructor(
    config: TrainReconstructor,
    data: str | Path,
    output: str | Path,
    *,
    resume: bool = True,
    device: str = "cpu",
    report: Callable[[int, dict[str, Any]], None] | None = None,
) -> Path:
    """Train on a dataset of shards. Under torchrun every process calls this; the first one writes.

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
        AssetError: data, head, encoder or state do not belong together, or a file is missing.
        ConfigError: a loss lacks what it needs, or one photo goes through the network at a time.
        DivergedError: a loss term is not finite; the last saved state is intact.
    """
    output = Path(output)
    keep_freed_memory()
    with join_group(device) as place, Shards(data) as shards:
        if config.batch // place.world // config.accumulate * config.images_per_actor == 1:
            raise ConfigError(
                "batch: one photo at a time has no statistics for BatchNorm; raise batch or images_per_actor, "
                "or lower accumulate or the number of processes"
            )
        head = open_head(config.head)
        checkpoint.check_head(shards.about, head)
        torch.manual_seed(config.seed)
        model = build_model(config, head).to(place.device)
        objective = build_objective(head, config, place.device.type).to(place.device)
        optimizers = build_optimizers(model, config)
        output.mkdir(parents=True, exist_ok=True)
        start = _restore(output / STATE, model, optimizers, config) if resume else 0
        batches = Batches(
            shards,
            config.batch,
            config.seed,
            start,
            config.steps,
            images_per_actor=config.images_per_actor,
            wide=objective.wants_pictures or config.picture_every > 0,
            rank=place.rank,
            world=place.world,
        )
        steps = _Steps(config, place, model, objective, optimizers)
        card = _card(config, head, shards)
        with _Log(output / LOG, config, place, report) as log:
            for step, loaded in enumerate(batches, start):
                batch = loaded.to(place.device)
                log.note(step, steps.run(step, batch), len(batch) * place.world)
                if config.picture_every and (step + 1) % config.picture_every == 0 and place.leads:
                    log.show(step, steps.snapshot(batch))
                if place.leads and ((step + 1) % config.save_every == 0 or step + 1 == config.steps):
                    _save_state(output / STATE, model, optimizers, step + 1, config)
                    checkpoint.save(output / WEIGHTS, model.state_dict(), card | {"steps_done": step + 1})
        if place.world > 1:
            torch.distributed.barrier()
    return output / WEIGHTS


def build_model(config: TrainReconstructor, head: Head) -> Regressor:
    """The network to train, on the CPU: what is not to be trained has no gradient.

    Raises:
        AssetError: backbone_weights or start cannot be used.
    """
    model = Regressor(config.backbone, config.normalize_embedding, config.skip)
    if config.start:
        begun, card = checkpoint.load_regressor(config.start)
        checkpoint.check_head(card, head)
        for name, wanted in (
            ("backbone", config.backbone),
            ("normalize", config.normalize_embedding),
            ("skip", config.skip),
        ):
            if card[name] != wanted:
                raise AssetError(f"start {config.start}: its {name} is {card[name]!r}, the settings say {wanted!r}")
        model.load_state_dict(begun.state_dict())
    if config.backbone_weights:
        model.backbone = foreign.load_backbone(config.backbone, config.backbone_weights)
    if config.trained == "last":
        trained = last_blocks(config.backbone)
        for name, parameter in model.backbone.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name.startswith(trained))
    torch.nn.utils.convert_conv2d_weight_memory_format(model, torch.channels_last)
    return model


def build_objective(head: Head, config: TrainReconstructor, device: str = "cpu") -> Objective:
    """The losses, with the frozen networks that they need, to be moved to `device`.

    Raises:
        ConfigError: the identity loss has a weight and no network.
        AssetError: the mesh encoder is another head's, or a file is missing.
    """
    weights = weights_of(config)
    encoder = None
    if weights["descriptor"]:
        autoencoder, card = checkpoint.load_encoder(config.encoder or None)
        checkpoint.check_head(card, head)
        encoder = autoencoder.encoder
    recognition = None
    if weights["identity"]:
        if not config.recognition:
            raise ConfigError(
                "identity loss: wants a face recognition network, and none comes with chebface; "
                "set recognition to a checkpoint of arcface_torch, or weight_identity to 0"
            )
        recognition = foreign.load_backbone(config.recognition_backbone, config.recognition)
        torch.nn.utils.convert_conv2d_weight_memory_format(recognition, torch.channels_last)
    draws = weights["photometric"] or weights["identity"]
    renderer = open_renderer(head.faces, config.renderer, device) if draws else None
    return Objective(head, config, renderer=renderer, encoder=encoder, recognition=recognition)


class _Steps:
    """One optimiser step after another."""

    def __init__(
        self,
        config: TrainReconstructor,
        place: Place,
        model: Regressor,
        objective: Objective,
        optimizers: list[torch.optim.Optimizer],
    ) -> None:
        self.config, self.place, self.model = config, place, model
        self.objective, self.optimizers = objective, optimizers
        self.trained = [p for p in model.parameters() if p.requires_grad]
        network: nn.Module = torch.compile(model) if config.compile else model  # type: ignore[assignment]
        if place.world > 1:
            gpus = [place.device] if place.device.type == "cuda" else None
            network = nn.parallel.DistributedDataParallel(network, device_ids=gpus, broadcast_buffers=False)
        self.network = network

    def run(self, step: int, batch: Batch) -> dict[str, Any]:
        """Learn from a batch (this process's share of it); the numbers of the step, as tensors where that is cheaper.

        Raises:
            DivergedError: a loss term is not finite.
        """
        config = self.config
        set_rate(self.optimizers, rate_share(config, step))
        _set_mode(self.model)
        self.model.zero_grad(set_to_none=True)
        logs = (step + 1) % config.log_every == 0 or step + 1 == config.steps
        sums: dict[str, Tensor] = {}
        norms: dict[str, float] = {}
        shares = batch.split(config.accumulate)
        for number, share in enumerate(shares):
            network = self.network
            waits = isinstance(network, nn.parallel.DistributedDataParallel) and number + 1 < len(shares)
            with network.no_sync() if waits else nullcontext():  # type: ignore[operator]
                predicted = self._predict(share)
                loss, parts = self.objective(predicted, share, step)
                weight = len(share) / len(batch)
                for name, part in {"loss": loss, **parts}.items():
                    sums[name] = sums.get(name, 0) + weight * part.detach()
                if logs and number == 0:
                    norms = losses.gradient_norms(parts, self.objective.weights, predicted)
                (loss * weight).backward()
        if not torch.isfinite(sums["loss"]):
            broken = [name for name, part in sums.items() if name != "loss" and not torch.isfinite(part)]
            raise DivergedError(f"step {step}: loss term {', '.join(broken)} is not finite; lower learning_rate")
        norm = torch.nn.utils.clip_grad_norm_(self.trained, config.clip_gradient)
        for optimizer in self.optimizers:
            optimizer.step()
        pull = {f"gradient_{name}": value for name, value in norms.items()}
        return {"loss": sums.pop("loss"), "gradient": norm, **sums, **pull}

    @torch.no_grad()
    def snapshot(self, batch: Batch) -> np.ndarray:
        """A picture of the first faces of a batch; the network is as it was afterwards."""
        self.model.eval()
        predicted = self.model(normalize_crop(batch.crop[: snapshot.ROWS]).to(memory_format=torch.channels_last))
        return snapshot.draw(self.objective.flame, predicted, batch)

    def _predict(self, batch: Batch) -> Tensor:
        half = self.config.precision == "bf16"
        with torch.autocast(self.place.device.type, torch.bfloat16, enabled=half):
            predicted = self.network(normalize_crop(batch.crop).to(memory_format=torch.channels_last))
        return predicted.float()


def _set_mode(model: Regressor) -> None:
    """Training mode, but what is frozen keeps its statistics too."""
    model.train()
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and not any(p.requires_grad for p in own):
            module.eval()


class _Log:
    """log.jsonl, pictures, the caller's report and TensorBoard; written by the first process."""

    def __init__(
        self,
        path: Path,
        config: TrainReconstructor,
        place: Place,
        report: Callable[[int, dict[str, Any]], None] | None,
    ) -> None:
        self.path, self.config, self.place, self.report = path, config, place, report
        self.began, self.seen = time.monotonic(), 0

    def __enter__(self) -> _Log:
        self.board = _open_board(self.path.parent) if self.config.tensorboard and self.place.leads else None
        self.file = open(self.path if self.place.leads else os.devnull, "a")
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        if self.board:
            self.board.close()

    def note(self, step: int, numbers: dict[str, Any], faces: int) -> None:
        """Take in the numbers of a step (0 is the first)."""
        self.seen += faces
        if not ((step + 1) % self.config.log_every == 0 or step + 1 == self.config.steps):
            return
        if self.place.world > 1:
            numbers = _mean_over_ranks(numbers, self.place)
        row = {"step": step + 1} | {name: round(float(value), 6) for name, value in numbers.items()}
        row["faces_per_s"] = round(self.seen / (time.monotonic() - self.began), 2)
        if self.place.leads:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
            if self.board:
                for name, value in row.items():
                    self.board.add_scalar(name, value, step + 1)
            if self.report:
                self.report(step + 1, row)

    def show(self, step: int, picture_u8: np.ndarray) -> None:
        """Keep a picture (H, W, 3) uint8 of a step."""
        from PIL import Image

        folder = self.path.parent / "pictures"
        folder.mkdir(exist_ok=True)
        with whole(folder / f"{step + 1:07d}.png") as partial:
            Image.fromarray(picture_u8).save(partial, "PNG")
        if self.board:
            self.board.add_image("faces", picture_u8, step + 1, dataformats="HWC")


def _open_board(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingDependencyError(
            f"tensorboard: {error}; pip install tensorboard, or set tensorboard to false"
        ) from error
    return SummaryWriter(str(folder / "tensorboard"))


def _mean_over_ranks(numbers: dict[str, Any], place: Place) -> dict[str, Any]:
    packed = torch.tensor([float(value) for value in numbers.values()], dtype=torch.float64, device=place.device)
    torch.distributed.all_reduce(packed)
    return dict(zip(numbers, (packed / place.world).tolist(), strict=True))


def rate_share(config: TrainReconstructor, step: int) -> float:
    """Share of the full learning rate: linear warm-up, then a cosine down to final_learning_rate."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    low = config.final_learning_rate
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))


def _card(config: TrainReconstructor, head: Head, shards: Shards) -> dict[str, Any]:
    return {
        "backbone": config.backbone,
        "normalize": config.normalize_embedding,
        "skip": config.skip,
        "head": head.facts,
        "training": to_dict(config),
        "data": shards.about["settings"] | ({"part": shards.about["part"]} if "part" in shards.about else {}),
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
