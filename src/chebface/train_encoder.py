"""The training loop of the mesh autoencoder, top to bottom, and what it says about held-out people.

    train_encoder(TrainEncoder(), "runs/encoder")                       # heads sampled from the open head
    train_encoder(TrainEncoder(), "runs/encoder", meshes="registered")  # a folder of registered meshes

As CoMA (Ranjan et al., ECCV 2018): every vertex coordinate standardised over the training meshes, mean absolute error,
batches of 16, the rate 8e-3 times 0.99 an epoch; Adam in place of its SGD, as its later ports.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chebface import checkpoint
from chebface.config import TrainEncoder, to_dict
from chebface.data.meshes import Meshes, read_folder, sample_head
from chebface.encoder import WIDTH, MeshAutoencoder
from chebface.errors import AssetError, ConfigError, DivergedError
from chebface.files import write_whole
from chebface.heads import Head, open_head
from chebface.hierarchy import Hierarchy, build, for_head
from chebface.render import heat

STATE = "state.safetensors"  # everything needed to go on
BEST = "encoder.safetensors"  # the weights with the least held-out error
LAST = "last.safetensors"
MAP = "error_map.png"
MEASURED_BATCH = 64


@dataclass(frozen=True, eq=False)
class Material:
    """What an encoder is trained and measured with."""

    train: Meshes
    held_out: Meshes
    head: Head | None  # where its topology is the meshes'
    hierarchy: Hierarchy
    about: dict[str, Any]


def gather(config: TrainEncoder, meshes: str | Path | None = None) -> Material:
    """Read or sample meshes, split them by people, and find the hierarchy.

    Raises:
        AssetError: a head or meshes that cannot be used.
        InputError: fewer than two people.
        ConfigError: neither a head nor meshes.
    """
    head = open_head(config.head) if config.head else None
    if meshes is not None:
        found = read_folder(meshes, head, unit=config.unit)
        about = found.about | {"sha256": found.sha256}
        head = head if head is not None and np.array_equal(head.faces, found.faces) else None
    elif head is None:
        raise ConfigError("head: expected a head to sample from, or a folder of meshes; got neither")
    else:
        found = sample_head(head, config.count, seed=config.seed, strength=config.expression)
        # Of what they follow from, not of the meshes: their last bits differ from one machine's BLAS to another's.
        about = found.about | {"sha256": hashlib.sha256(json.dumps(found.about, sort_keys=True).encode()).hexdigest()}
    train, held_out = found.split(config.held_out, config.seed)
    hierarchy = build(train.vertices.mean(0), found.faces) if head is None else for_head(head)
    return Material(train, held_out, head, hierarchy, about)


def train_encoder(
    config: TrainEncoder,
    output: str | Path,
    *,
    meshes: str | Path | None = None,
    resume: bool = True,
    device: str = "cpu",
    report: Callable[[int, dict[str, Any]], None] | None = None,
) -> Path:
    """Train on registered meshes, or on heads sampled from a morphable one.

    Args:
        config: settings.
        output: folder for log.jsonl, the resumable state, best and last weights, and error_map.png.
        meshes: a folder of registered meshes (see data/meshes.py); None samples config.head.
        resume: go on from the state in `output` when there is one.
        device: as torch names it.
        report: called every `log_every` steps with the step and its numbers.

    Returns:
        the file of the best weights.

    Raises:
        ConfigError: neither a head nor meshes, or face_weight without a head.
        AssetError: meshes that cannot be used, or a state that is of other settings, other meshes, or damaged.
        DivergedError: the loss is not finite; the last saved state is intact.
    """
    output, where = Path(output), torch.device(device)
    material = gather(config, meshes)
    train = material.train
    if len(train) < config.batch:
        raise AssetError(f"meshes: {len(train)} to train with, fewer than one batch of {config.batch}; lower batch")
    torch.manual_seed(config.seed)
    model = MeshAutoencoder(material.hierarchy, WIDTH, config.terms, config.code)
    model.encoder.set_statistics(*_statistics(train.vertices), floor=config.std_floor)
    model.to(where).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    start, best = _restore(output / STATE, model, optimizer, config, material) if resume else (0, float("inf"))
    output.mkdir(parents=True, exist_ok=True)
    weights = _loss_weights(material, config).to(where)
    per_epoch = len(train) // config.batch
    step, clock = start * per_epoch, time.monotonic()
    with open(output / "log.jsonl", "a") as log:

        def note(row: dict[str, Any]) -> None:
            log.write(json.dumps(row) + "\n")
            log.flush()
            if report:
                report(row["step"], row)

        for epoch in range(start, config.epochs):
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * config.decay**epoch
            order = np.random.default_rng([config.seed, epoch]).permutation(len(train))
            for place in range(per_epoch):
                chosen = order[place * config.batch : (place + 1) * config.batch]
                loss = _loss(model, train.vertices[chosen], weights, config, (epoch, place))
                value = loss.item()
                if not np.isfinite(value):
                    raise DivergedError(f"step {step}: the loss is not finite; lower learning_rate or raise std_floor")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
                if step % config.log_every == 0:
                    rate = (step - start * per_epoch) * config.batch / (time.monotonic() - clock)
                    note({"step": step, "epoch": epoch, "loss": round(value, 5), "meshes_per_s": round(rate, 1)})
            if (epoch + 1) % config.save_every == 0 or epoch + 1 == config.epochs:
                errors = vertex_errors(model, material.held_out)
                now = float(errors.mean())
                note({"step": step, "epoch": epoch, "held_out_mm": by_region(errors, material.head)})
                framed, frame = _framed(model, train, config.frame)
                card = _card(config, material) | {"epoch": epoch + 1, "held_out_mm": round(now, 4), "frame": frame}
                tensors = framed.to_tensors()
                checkpoint.save(output / LAST, tensors, card)
                if now < best:
                    best = now
                    checkpoint.save(output / BEST, tensors, card)
                _save_state(output / STATE, model, optimizer, epoch + 1, best, config, material)
    return _finish(output, material)


def _loss(
    model: MeshAutoencoder, clean: np.ndarray, weights: Tensor, config: TrainEncoder, at: tuple[int, int]
) -> Tensor:
    """Mean absolute error of standardised coordinates, (B, N, 3) m going in with noise that `at` decides."""
    seen = clean
    if config.noise:
        dice = np.random.default_rng([config.seed, *at])
        seen = clean + np.float32(config.noise) * dice.standard_normal(clean.shape, np.float32)
    truth = model.encoder.normalize(torch.from_numpy(clean).to(weights.device))
    return ((model(torch.from_numpy(seen).to(weights.device)) - truth).abs() * weights).mean()


def _finish(output: Path, material: Material) -> Path:
    """Measure the best weights, and write that into their card and a picture."""
    path = output / BEST
    tensors, card = checkpoint.load(path)
    model = MeshAutoencoder.from_tensors(tensors, card)
    found, maps = assess(model, material)
    error_map(output / MAP, material, maps)
    checkpoint.save(path, tensors, card | {"held_out": found})
    return path


def evaluate_encoder(weights: str | Path | None = None, *, meshes: str | Path | None = None) -> dict[str, Any]:
    """Measure an encoder on the people that its training held out, beside principal components of the same meshes.

    Args:
        weights: a checkpoint, or None for the shipped one.
        meshes: the folder that it was trained on; None where it was trained on a sampled head.

    Returns:
        `meshes`, `people`; `mm`: mean vertex error by region; `pca_mm`: the same for as many principal components of
        the training meshes as the code has numbers; `mean_mm`: for the mean mesh; `ratio`: mm over pca_mm for all
        vertices; `descriptor`: its mean, standard deviation and largest correlation over the held-out meshes.

    Raises:
        AssetError: weights that cannot be read, or meshes that they were not trained on.
    """
    model, card = checkpoint.load_encoder(weights)
    return assess(model, recall(card, meshes))[0]


def recall(card: dict[str, Any], meshes: str | Path | None = None) -> Material:
    """The material that the weights of this card were trained with.

    Raises:
        AssetError: another head or other meshes, or a card that is no encoder's.
    """
    try:
        config, trained = TrainEncoder(**card["training"]), card["data"]
    except (KeyError, TypeError) as error:
        raise AssetError(f"card: not a mesh encoder's of this version ({error})") from error
    if meshes is None and "head_sha256" not in trained:
        raise AssetError(f"the weights were trained on {trained['source']}; give that folder of meshes")
    material = gather(config, meshes)
    if material.about["sha256"] != trained["sha256"]:
        raise AssetError(
            f"the weights were trained on other meshes ({trained['source']}), so these would not be held out; "
            "give the same folder or head"
        )
    return material


def vertex_errors(model: MeshAutoencoder, meshes: Meshes) -> np.ndarray:
    """Mean distance in mm, over the meshes, between each vertex and its reconstruction. (N,) float64."""
    device = model.encoder.mean.device
    total = np.zeros(meshes.vertices.shape[1])
    with torch.no_grad():
        for first in range(0, len(meshes), MEASURED_BATCH):
            truth = torch.from_numpy(meshes.vertices[first : first + MEASURED_BATCH]).to(device)
            total += (model.reconstruct(truth) - truth).norm(dim=2).double().sum(0).cpu().numpy()
    return total / len(meshes) * 1000


def by_region(errors: np.ndarray, head: Head | None) -> dict[str, float]:
    """Means of numbers per vertex (N,): over all, and over each region of the head."""
    masks = {} if head is None else head.masks
    rows = {"all": errors.mean()} | {name: errors[mask].mean() for name, mask in masks.items() if mask.any()}
    return {name: round(float(value), 4) for name, value in rows.items()}


def encode_all(model: MeshAutoencoder, vertices: np.ndarray) -> Tensor:
    """Descriptors (S, code) of many meshes (S, N, 3) in metres, on the CPU."""
    device = model.encoder.mean.device
    with torch.no_grad():
        parts = [
            model.encoder(torch.from_numpy(vertices[i : i + MEASURED_BATCH]).to(device)).cpu()
            for i in range(0, len(vertices), MEASURED_BATCH)
        ]
    return torch.cat(parts)


def principal_components(vertices: np.ndarray, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Mean (N, 3) and the first orthonormal components (count, 3N) of meshes (S, N, 3), by subspace iteration."""
    flat = vertices.reshape(len(vertices), -1)
    mean = flat.mean(0, dtype=np.float64).astype(np.float32)
    centered = flat - mean
    wide = min(count + 8, len(flat), flat.shape[1])
    basis = np.random.default_rng(seed).standard_normal((flat.shape[1], wide), np.float32)
    for _ in range(12):
        basis = np.linalg.qr(centered.T @ (centered @ basis))[0]
    turn = np.linalg.svd(centered @ basis, full_matrices=False)[2]
    return mean.reshape(vertices.shape[1:]), (turn @ basis.T)[:count]


def error_map(path: str | Path, material: Material, maps: dict[str, np.ndarray]) -> Path:
    """Write a picture of mean errors per vertex: title to (N,) mm."""
    content = io.BytesIO()
    heat.draw(material.train.vertices.mean(0), material.train.faces, maps, "mm").save(content, "PNG")
    return write_whole(path, content.getvalue())


def assess(model: MeshAutoencoder, material: Material) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The numbers of `evaluate_encoder`, and mean errors per vertex in mm by method, for `error_map`."""
    held_out = material.held_out
    mean, components = principal_components(material.train.vertices, model.code)
    away = (held_out.vertices - mean).reshape(len(held_out), -1)
    rest = away - (away @ components.T) @ components
    length = {"mean": away, "pca": rest}
    plain = {
        name: np.linalg.norm(x.reshape(held_out.vertices.shape), axis=2).mean(0) * 1000 for name, x in length.items()
    }
    errors = vertex_errors(model, held_out)
    codes = encode_all(model, held_out.vertices)
    correlation = np.corrcoef(codes.numpy(), rowvar=False).reshape(model.code, model.code) - np.eye(model.code)
    rows: dict[str, Any] = {
        "meshes": len(held_out),
        "people": len(set(held_out.actors)),
        "mm": by_region(errors, material.head),
        "pca_mm": by_region(plain["pca"], material.head),
        "mean_mm": by_region(plain["mean"], material.head),
    }
    rows["ratio"] = round(rows["mm"]["all"] / max(rows["pca_mm"]["all"], 1e-9), 4)
    rows["descriptor"] = {
        "mean": [round(float(x), 4) for x in codes.mean(0)],
        "std": [round(float(x), 4) for x in codes.std(0)],
        "largest_correlation": round(float(np.abs(correlation).max()), 4),
    }
    return rows, {"autoencoder": errors, f"PCA, {model.code} components": plain["pca"]}


def _statistics(vertices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation over the meshes, (N, 3) float32, summed in float64."""
    mean = vertices.mean(0, dtype=np.float64)
    square = np.zeros_like(mean)
    for mesh in vertices:
        square += (mesh - mean) ** 2
    return mean.astype(np.float32), np.sqrt(square / len(vertices)).astype(np.float32)


def _loss_weights(material: Material, config: TrainEncoder) -> Tensor:
    """(N, 1), mean 1."""
    weights = np.ones((material.train.vertices.shape[1], 1), np.float32)
    if config.face_weight != 1:
        if material.head is None or "face" not in material.head.masks:
            raise ConfigError("face_weight: wants a head whose topology the meshes have; set head, or leave it at 1")
        weights[material.head.masks["face"]] = config.face_weight
    return torch.from_numpy(weights / weights.mean())


def frame_of(codes: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """The frame of descriptors (S, code) by name: matrix and origin, the new code being matrix (code - origin)."""
    matrix, origin = torch.eye(codes.shape[1]), codes.mean(0)
    if name == "raw":
        return matrix, torch.zeros_like(origin)
    if name == "whitened":
        values, vectors = torch.linalg.eigh((codes - origin).double().T.cov().reshape(matrix.shape))
        least = max(float(values.max()) * 1e-6, 1e-12)  # what the code does not use must not be blown up
        matrix = (vectors / values.clamp(min=least).sqrt()).T.float()
    return matrix, origin


def _framed(model: MeshAutoencoder, train: Meshes, name: str) -> tuple[MeshAutoencoder, dict[str, list]]:
    """A copy whose codes have the wanted frame over the training meshes, and that frame for the card."""
    copy = MeshAutoencoder(model.hierarchy, model.width, model.K, model.code)
    copy.load_state_dict(model.state_dict())
    matrix, origin = frame_of(encode_all(copy, train.vertices), name)
    copy.change_frame(matrix, origin)
    return copy, {"matrix": matrix.tolist(), "origin": origin.tolist()}


def _card(config: TrainEncoder, material: Material) -> dict[str, Any]:
    return {
        "kind": "encoder",
        "width": list(WIDTH),
        "K": config.terms,
        "code": config.code,
        "head": None if material.head is None else material.head.facts,
        "training": to_dict(config),
        "data": material.about | {"train": len(material.train), "held_out": len(material.held_out)},
    }


def _save_state(
    path: Path,
    model: MeshAutoencoder,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    best: float,
    config: TrainEncoder,
    material: Material,
) -> None:
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
    card = {"epoch": epoch, "best_mm": best, "config": to_dict(config), "data": material.about}
    checkpoint.save(path, tensors, card)


def _restore(
    path: Path, model: MeshAutoencoder, optimizer: torch.optim.Optimizer, config: TrainEncoder, material: Material
) -> tuple[int, float]:
    """The epochs done and the least held-out error so far, in mm."""
    if not path.exists():
        return 0, float("inf")
    tensors, card = checkpoint.load(path)
    begun = card.get("config", {})
    if begun != to_dict(config):
        changed = sorted(k for k, v in to_dict(config).items() if begun.get(k) != v)
        raise AssetError(
            f"{path}: was begun with other settings ({', '.join(changed)}); choose another output or --no-resume"
        )
    if card["data"] != material.about:
        raise AssetError(f"{path}: was begun with other meshes; choose another output or --no-resume")
    model.load_state_dict({name[6:]: tensor for name, tensor in tensors.items() if name.startswith("model.")})
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return int(card["epoch"]), float(card["best_mm"])
