"""Weights on disk: tensors in safetensors, everything else in a JSON card beside them; both written whole."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chebface.errors import AssetError
from chebface.regressor import Regressor

FORMAT = 1
DEMO = Path(__file__).with_name("weights") / "demo.safetensors"


def save(path: str | Path, tensors: dict[str, Tensor], card: dict[str, Any]) -> Path:
    """Write `path` (safetensors) and its card (same name, .json). The card records the tensors' digest.

    Raises:
        OSError: the disk refuses; what was there before stays.
    """
    from safetensors.torch import save as to_bytes

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    blob = to_bytes({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    card = card | {"format": FORMAT, "sha256": hashlib.sha256(blob).hexdigest()}
    # The card is replaced last: whoever reads between the two sees a digest that does not fit, never a silent mix.
    _replace(path, blob)
    _replace(path.with_suffix(".json"), json.dumps(card, indent=2).encode() + b"\n")
    return path


def load(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read and check what `save` wrote.

    Returns:
        tensors by name, and the card.

    Raises:
        AssetError: a file is missing, damaged, of another format, or the two do not belong together.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    path = Path(path)
    card_path = path.with_suffix(".json")
    for part in (path, card_path):
        if not part.is_file():
            raise AssetError(f"checkpoint {path}: {part.name} is missing")
    try:
        card = json.loads(card_path.read_text())
        blob = path.read_bytes()
        tensors = from_bytes(blob)
    except (ValueError, SafetensorError) as error:
        raise AssetError(
            f"checkpoint {path}: not readable ({error}); it is damaged or no chebface checkpoint"
        ) from error
    if card.get("format") != FORMAT:
        raise AssetError(f"checkpoint {path}: format {card.get('format')}, wanted {FORMAT}")
    if card.get("sha256") != hashlib.sha256(blob).hexdigest():
        raise AssetError(f"checkpoint {path}: the card's sha256 is another file's; restore both from the same save")
    return tensors, card


def load_regressor(path: str | Path | None = None) -> tuple[Regressor, dict[str, Any]]:
    """Read a regressor.

    Args:
        path: a .safetensors file with its card, or None for the demo weights that come with the package.

    Returns:
        The regressor in eval mode, float32, and its card: `backbone`, `normalize`, `head` {name, version, sha256}, ...

    Raises:
        AssetError: as `load`, or tensors that are not this architecture's.
    """
    path = DEMO if path is None else Path(path)
    tensors, card = load(path)
    try:
        model = Regressor(card["backbone"], card["normalize"])
        weights = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
        model.load_state_dict(weights)
    except (KeyError, RuntimeError) as error:
        raise AssetError(f"checkpoint {path}: not a regressor of this version ({error})") from error
    return model.eval(), card


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


def _replace(path: Path, blob: bytes) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def half(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Floating tensors as float16, for weights that are shipped."""
    return {
        name: tensor.to(torch.float16) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()
    }
