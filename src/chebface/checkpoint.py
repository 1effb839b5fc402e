"""Weights on disk: one safetensors file with a JSON card in its header, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chebface.encoder import MeshAutoencoder
from chebface.errors import AssetError, DamagedError
from chebface.files import write_whole
from chebface.regressor import Regressor

FORMAT = 1
DEMO = Path(__file__).with_name("weights") / "demo.safetensors"
ENCODER = Path(__file__).with_name("weights") / "encoder.safetensors"
_CARD = "chebface"  # the header entry that holds the card


def save(path: str | Path, tensors: dict[str, Tensor], card: dict[str, Any]) -> Path:
    """Write tensors and their card to a .safetensors file. The card also gets the tensors' sha256.

    Raises:
        OSError: the disk refuses; what was there before stays.
    """
    from safetensors.torch import save as to_bytes

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    card = card | {"format": FORMAT, "sha256": _digest(tensors)}
    return write_whole(path, to_bytes(tensors, {_CARD: json.dumps(card)}))


def load(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read and check what `save` wrote.

    Returns:
        tensors by name, and the card.

    Raises:
        AssetError: missing, damaged, of another format, or no chebface checkpoint.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise AssetError(f"checkpoint {path}: not found")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
        card = json.loads(header[_CARD])
    except KeyError:
        raise AssetError(f"checkpoint {path}: no chebface card in its header; it is another program's file") from None
    except (ValueError, SafetensorError) as error:
        raise AssetError(f"checkpoint {path}: not readable ({error}); it is damaged or no safetensors file") from error
    if card.get("format") != FORMAT:
        raise AssetError(f"checkpoint {path}: format {card.get('format')}, wanted {FORMAT}")
    if card.get("sha256") != _digest(tensors):
        raise DamagedError(f"checkpoint {path}: its tensors are not those that the card was written for; damaged")
    return tensors, card


def average(paths: Sequence[str | Path], output: str | Path) -> Path:
    """Write the mean of the weights of runs that began from the same ones: often better than each of them.

    Args:
        paths: two checkpoints or more; the card is the last one's.
        output: the .safetensors file to write.

    Raises:
        AssetError: as `load`; fewer than two; other tensors or another head than the first has.

    Source: Wortsman et al., Model soups, ICML 2022.
    """
    if len(paths) < 2:
        raise AssetError(f"average: expected two checkpoints or more, got {len(paths)}")
    loaded = [load(path) for path in paths]
    (first, first_card), (_, card) = loaded[0], loaded[-1]
    for path, (tensors, facts) in zip(paths, loaded, strict=True):
        shapes = [{name: (tensor.shape, tensor.dtype) for name, tensor in each.items()} for each in (first, tensors)]
        if shapes[0] != shapes[1] or facts.get("head") != first_card.get("head"):
            raise AssetError(f"average: {path} is of another network or head than {paths[0]}")
    mean = {
        name: torch.stack([tensors[name] for tensors, _ in loaded]).double().mean(0).to(tensor.dtype)
        if tensor.is_floating_point()
        else loaded[-1][0][name]
        for name, tensor in first.items()
    }
    return save(output, mean, card | {"averaged": [facts["sha256"] for _, facts in loaded]})


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_regressor(path: str | Path | None = None) -> tuple[Regressor, dict[str, Any]]:
    """Read a regressor.

    Args:
        path: a .safetensors file, or None for the demo weights that come with the package.

    Returns:
        The regressor in eval mode, float32, and its card: `backbone`, `normalize`, `head` {name, version, sha256}, ...

    Raises:
        AssetError: as `load`, or tensors that are not this architecture's.
    """
    path = DEMO if path is None else Path(path)
    tensors, card = load(path)
    try:
        model = Regressor(card["backbone"], card["normalize"], card["skip"])
        weights = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
        model.load_state_dict(weights)
    except (KeyError, RuntimeError) as error:
        raise AssetError(f"checkpoint {path}: not a regressor of this version ({error})") from error
    return model.eval(), card


def load_encoder(path: str | Path | None = None) -> tuple[MeshAutoencoder, dict[str, Any]]:
    """Read a mesh autoencoder; its `encoder` makes descriptors.

    Args:
        path: a .safetensors file with its card, or None for the one of the open head that comes with the package.

    Returns:
        The autoencoder in eval mode, float32, and its card.

    Raises:
        AssetError: missing, truncated, damaged, or no mesh autoencoder.
    """
    path = ENCODER if path is None else Path(path)
    tensors, card = load(path)
    try:
        return MeshAutoencoder.from_tensors(tensors, card), card
    except AssetError as error:
        raise AssetError(f"checkpoint {path}: {error}") from error


def check_head(card: dict[str, Any], head: Any) -> None:
    """Refuse to use weights with a head that they were not trained on.

    Raises:
        AssetError: the digests differ.
    """
    trained = card["head"]
    if trained["sha256"] != head.sha256:
        raise AssetError(
            f"weights were trained on head {trained['name']} {trained['version']} (sha256 {trained['sha256'][:12]}), "
            f"got head {head.name} {head.version} (sha256 {head.sha256[:12]}); choose the matching head or weights"
        )


def half(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Floating tensors as float16, for weights that are shipped."""
    return {
        name: tensor.to(torch.float16) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()
    }
