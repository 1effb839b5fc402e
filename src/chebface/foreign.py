"""Weights from elsewhere: face recognition checkpoints of `arcface_torch` and insightface, MICA's and DECA's files.

What lies in them, by the code that writes them:

arcface_torch, `backbone.pth` or `model.pt`: a state dict with the names of `arcface.py`.
arcface_torch, `checkpoint_gpu_{rank}.pt`: the same under `state_dict_backbone`; `state_dict_softmax_fc` (the centers
    of partial FC), `state_optimizer`, `state_lr_scheduler`, `epoch`, ... What stands before the names, such as
    `module.`, does not matter.
insightface, `w600k_r50.onnx`, `glintr100.onnx`, `w600k_mbf.onnx`: the same networks, exported; see foreign_onnx.py.
MICA, `mica.tar`: `arcface` (IResNet-100, the same names); `flameModel` with `regressor.network.{0..3}` (512 -> 300 ->
    300 -> 300 -> 300, LeakyReLU 0.2), `regressor.output` (300 FLAME shape coefficients) and `generator.*` (FLAME
    itself); of a training run also `opt`, `scheduler`, `validator`, `epoch`, `global_step`, `batch_size`.
DECA, `deca_model.tar`: `E_flame` and `E_detail` (`encoder.*`: torchvision's ResNet-50; `layers.{0,2}`), `D_detail`.

A .tar of these is what torch.save wrote, no tar archive. All take RGB as (x - 127.5) / 127.5, as chebface does.

Sources: deepinsight/insightface recognition/arcface_torch (backbones, train_v2.py); Zielon/MICA
micalib/models/mica.py, models/generator.py, models/flame.py, micalib/trainer.py; yfeng95/DECA decalib/deca.py,
decalib/models/encoders.py.
"""

from __future__ import annotations

import hashlib
import mmap
import pickle
import re
import struct
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chebface import checkpoint, foreign_onnx, params
from chebface.arcface import BACKBONES, EMBEDDING, build_backbone
from chebface.errors import AssetError, InputError, UnsafeFileError
from chebface.heads import Head, open_head
from chebface.regressor import HIDDEN, Regressor

HEAD_LIMIT_M = 1e-6  # the most that MICA's own FLAME may differ from the head
_COUNTER = "num_batches_tracked"  # older files lack it; nothing depends on it in eval mode
_LAYERS = 4  # of MICA's mapping network and of ours
_GENERATOR = "flameModel.generator"
_LEFT = {
    "state_dict_softmax_fc": "the centers of the people it was trained on (partial FC)",
    "weight": "the centers of the people it was trained on (partial FC)",
    _GENERATOR: "FLAME itself: the head has it",
}
_DECA = (
    "DECA: nothing of it fits. Its encoder is torchvision's ResNet-50 (bottleneck blocks, 2048 features) on a 224 x "
    "224 photograph, then 2048 -> 1024 -> 236 (100 shape, 50 texture, 50 expression, 6 pose, 3 camera, 27 light); "
    "ours is ArcFace's network on its 112 x 112 crop, then 512 -> 300 -> 486. Its losses are here: --set preset=deca"
)
_BROKEN = (  # whatever damaged bytes can lead to
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Foreign:
    """What a file holds, in our terms."""

    kind: str  # "arcface", "onnx" (the same, exported), "mica" or "deca"
    backbone: str | None  # of BACKBONES; None: none of ours
    tensors: dict[str, Tensor]  # float32: backbone.*; of MICA also mapping.*, shape.{weight, bias}, head.*
    left: dict[str, str]  # what else is in the file: why it is of no use
    notes: tuple[str, ...] = ()


def read(path: str | Path) -> Foreign:
    """Read a file of weights from elsewhere, without running anything in it.

    Args:
        path: .onnx, .safetensors, or what torch.save wrote under any name.

    Returns:
        Its kind and what is in it under our names. `shape` is MICA's output layer: (300, 300) to FLAME coefficients;
        `head.template` (N, 3) m and `head.shape_dirs` (300, N, 3) m are the FLAME it was trained with, where the file
        has it.

    Raises:
        AssetError: missing, damaged, no weights, or the weights of no network that is known here.
        UnsafeFileError: it asks for code to be run in order to be read.
        MissingDependencyError: .onnx without onnx or onnxruntime.
    """
    path = Path(path)
    try:
        _sniff(path)
        if path.suffix == ".onnx":
            name, weights, notes = foreign_onnx.read_backbone(path)
            found = Foreign("onnx", name, {f"backbone.{key}": tensor for key, tensor in weights.items()}, {}, notes)
        else:
            record = _load_safetensors(path) if path.suffix == ".safetensors" else _load_torch(path)
            found = _read_record(record)
    except OSError as error:
        raise AssetError(f"{path}: cannot be read ({error.strerror or error})") from error
    except AssetError as error:
        raise type(error)(f"{path}: {error}") from error
    broken = [name for name, tensor in found.tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise AssetError(f"{path}: damaged: not finite: {broken[0]} ({len(broken)} of {len(found.tensors)} tensors)")
    return found


def load_backbone(name: str, path: str | Path) -> nn.Module:
    """A backbone with weights from elsewhere.

    Args:
        name: one of BACKBONES.
        path: any file that `read` reads and that holds this backbone.

    Returns:
        As `build_backbone`.

    Raises:
        ConfigError: unknown name.
        AssetError, UnsafeFileError, MissingDependencyError: as `read`; or it is another network's.
    """
    backbone = build_backbone(name)
    found = read(path)
    _check_backbone(found, name, path)
    weights = {key.removeprefix("backbone."): t for key, t in found.tensors.items() if key.startswith("backbone.")}
    backbone.load_state_dict(backbone.state_dict() | weights)
    return backbone


def adopt(path: str | Path, output: str | Path, *, head: str, backbone: str | None = None) -> dict[str, Any]:
    """Make a checkpoint of ours from a file from elsewhere: what the file has is taken, exactly, the rest is untrained.

    MICA's file predicts shape as MICA does; its other outputs are the constants that training starts from: no
    expression, the usual camera, even light. A recognition network alone gets a fresh mapping, so its faces mean
    nothing before training (`chebface train reconstructor --set start=OUTPUT`).

    Args:
        path: as `read`.
        output: the .safetensors file to write.
        head: name or file of the head, as `open_head` takes it. MICA wants the FLAME 2020 that it was trained with.
        backbone: the one that is expected; None takes what the file has.

    Returns:
        A report for JSON: `file`, `sha256`, `kind`, `backbone`, `head`, `taken` {part: tensors}, `left` {part: why},
        `untrained` [parts], `notes`, `output`. The card keeps it under "adopted".

    Raises:
        InputError: the output is the file itself.
        AssetError, UnsafeFileError, MissingDependencyError: as `read` and `open_head`; another backbone; nothing
            fits; another head than MICA's.
        OSError: the disk refuses; what was there before stays.
    """
    path, output = Path(path), Path(output)
    if output.exists() and path.exists() and output.samefile(path):
        raise InputError(f"output: expected another file than the one that is read, got {output}")
    found = read(path)
    _check_backbone(found, backbone, path)
    tensors, notes = found.tensors, list(found.notes)
    asset = open_head(head)
    with torch.random.fork_rng(devices=[]):  # what is untrained is the same every time
        torch.manual_seed(0)
        model = Regressor(str(found.backbone), normalize=True)
    weights = {name: tensor for name, tensor in tensors.items() if name.startswith(("backbone.", "mapping."))}
    if found.kind == "mica":
        notes.append(_compare_head(tensors, asset, path))
        weights |= _output(model, tensors["shape.weight"], tensors["shape.bias"])
        untrained = [f"output: {part}" for part in params.PARTS if part != "shape"]
    else:
        untrained = ["mapping", "output"]
    model.load_state_dict(model.state_dict() | weights)
    taken = Counter(name.partition(".")[0] for name in tensors if not name.startswith("head."))
    report = {
        "file": path.name,
        "sha256": _digest(path),
        "kind": found.kind,
        "backbone": found.backbone,
        "taken": dict(taken),
        "left": found.left,
        "untrained": untrained,
        "notes": notes,
    }
    card = {"backbone": found.backbone, "normalize": True, "skip": False, "head": asset.facts}
    checkpoint.save(output, model.state_dict(), card | {"training": {"head": head}, "adopted": report})
    return report | {"head": asset.facts, "output": str(output)}


def _check_backbone(found: Foreign, wanted: str | None, path: str | Path) -> None:
    if found.backbone is None:
        raise AssetError(f"{path}: {' '.join(found.notes)}")
    if wanted not in (None, found.backbone):
        raise AssetError(f"backbone weights {path}: not those of {wanted}, but of {found.backbone}")


def _compare_head(tensors: dict[str, Tensor], head: Head, path: Path) -> str:
    """Coefficients mean something on the FLAME they were learned with only."""
    if "head.template" not in tensors:
        return f"the file holds no FLAME to compare with; that {head.name} {head.version} is its head is your word"
    for name, ours in (("template", head.template), ("shape_dirs", head.shape_dirs)):
        theirs = tensors[f"head.{name}"]
        same = tuple(theirs.shape) == ours.shape
        apart = (theirs - torch.from_numpy(ours)).abs().max().item() if same else float("inf")
        if not apart <= HEAD_LIMIT_M:
            raise AssetError(
                f"{path}: was trained with another head than {head.name} {head.version}: {name}: wanted "
                f"{tuple(theirs.shape)}, got {ours.shape}, {1000 * apart:.3g} mm apart; `chebface head import` the "
                "generic_model.pkl of FLAME 2020 and name that head"
            )
    return f"its own FLAME is {head.name} {head.version}, compared vertex by vertex"


def _output(model: Regressor, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """The output layer that gives MICA's coefficients after Regressor's units and offsets, and constants elsewhere."""
    rows = params.SLICES["shape"]
    unit, offset = model.get_buffer("unit")[rows], model.get_buffer("offset")[rows]
    weights = torch.zeros_like(model.output.weight)
    biases = torch.zeros_like(model.output.bias)
    weights[rows], biases[rows] = weight / unit[:, None], (bias - offset) / unit
    return {"output.weight": weights, "output.bias": biases}


def _digest(path: Path) -> str:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return hashlib.sha256(content).hexdigest()


# Files to tensors by name.


def _sniff(path: Path) -> None:
    """Name the usual mishaps of downloading."""
    if path.is_dir():
        raise AssetError("is a folder; a .tar of these weights is no archive, give the file as it was downloaded")
    with open(path, "rb") as file:
        start = file.read(512).lstrip().lower()
    if not start:
        raise AssetError("is empty; download it again")
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise AssetError(
            "is a web page, no weights: what the link led to asked for something; download it in a browser"
        )
    if start.startswith(b"version https://git-lfs"):
        raise AssetError("is a pointer of Git LFS, no weights; run `git lfs pull`")
    if start.startswith(b"pk\x03\x04") and zipfile.is_zipfile(path):
        names = zipfile.ZipFile(path).namelist()
        if not any(name.endswith("data.pkl") for name in names):
            raise AssetError(f"is an archive of {', '.join(names[:5])}; unpack it and give one of its files")


class _Opaque:
    """Stands in for a value that is no weight: what made it is not run, and its state is dropped."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class _Settings:
    """Stands in for a dictionary of another class: a plain one is made, the only kind that may be filled."""

    def __new__(cls, *_: Any) -> Any:
        """An empty dictionary."""
        return OrderedDict()


# What checkpoints of training runs hold beside tensors. None of it is imported or called.
_STAND_INS: list[Any] = [
    *((_Opaque, f"numpy.{core}.multiarray.{f}") for core in ("core", "_core") for f in ("scalar", "_reconstruct")),
    *((_Opaque, name) for name in ("numpy.dtype", "numpy.ndarray", "argparse.Namespace")),
    (_Settings, "yacs.config.CfgNode"),
]


def _load_torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_STAND_INS):
            warnings.simplefilter("ignore")  # about other programs' pickles, which end in an error of ours
            return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, *_BROKEN) as error:  # the file could be opened before, so that these are its content's
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        if asked:
            raise UnsafeFileError(
                f"asks for {asked[1]} in order to be read, which may run code; refused. Where you trust it, write its "
                "weights alone with the program that it is from: torch.save(model.state_dict(), FILE)"
            ) from error
        raise AssetError(f"damaged, or nothing that torch.save wrote ({_first_line(error)})") from error


def _load_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (ValueError, SafetensorError) as error:
        raise AssetError(f"damaged, or no safetensors file ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


# Tensors by their names to tensors by ours.


def _read_record(record: Any) -> Foreign:
    if not isinstance(record, dict):
        raise AssetError(f"expected named tensors, got {type(record).__name__}")
    if "E_flame" in record:
        return Foreign("deca", None, {}, {str(name): "see the note" for name in record}, (_DECA,))
    flat = dict(_flatten(record))
    tensors = {name: value for name, value in flat.items() if isinstance(value, Tensor)}
    backbone, prefix = _find_backbone(tensors)
    taken = {f"{prefix}{key}": f"backbone.{key}" for key in _layout(backbone)}
    kind = "arcface"
    head: dict[str, Tensor] = {}
    if any(name.startswith("flameModel.regressor.") for name in tensors):
        kind = "mica"
        taken |= _mica(tensors)
        template, dirs = (tensors.get(f"{_GENERATOR}.{name}") for name in ("v_template", "shapedirs"))
        if template is not None and dirs is not None:
            head = {"head.template": template, "head.shape_dirs": dirs.movedim(-1, 0)[: params.PARTS["shape"]]}
    left = {}
    for name in flat:
        if name not in taken and not name.endswith(_COUNTER):
            part = _GENERATOR if name.startswith(_GENERATOR) else name.removeprefix(prefix).partition(".")[0]
            left[part] = _LEFT.get(part, "no weight of the network")
    found = {ours: tensors[name] for name, ours in taken.items()} | head
    return Foreign(kind, backbone, {name: tensor.detach().float() for name, tensor in found.items()}, left)


def _flatten(record: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in record.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@cache
def _layout(name: str) -> dict[str, tuple[int, ...]]:
    """The shapes of a backbone's tensors by name."""
    with torch.device("meta"):
        tensors = build_backbone(name).state_dict()
    return {key: tuple(tensor.shape) for key, tensor in tensors.items() if not key.endswith(_COUNTER)}


def _find_backbone(tensors: dict[str, Tensor]) -> tuple[str, str]:
    """Which network these weights are of, and what stands before its names. Whole and nothing more, or an error."""
    nearest: tuple[str, list[str]] | None = None
    for name in BACKBONES:
        layout = _layout(name)
        last = next(reversed(layout))  # names the network's kind, and is there once
        for prefix in [key[: -len(last)] for key in tensors if f".{key}".endswith(f".{last}")]:
            wrong = list(_differences(tensors, prefix, layout))
            if not wrong:
                return name, prefix
            if nearest is None or len(wrong) < len(nearest[1]):
                nearest = name, wrong
    if nearest is None:
        raise AssetError(
            f"no face recognition network of arcface_torch ({', '.join(BACKBONES)}); "
            f"its entries are named {', '.join(list(tensors)[:3]) or 'nothing'}, ..."
        )
    name, wrong = nearest
    raise AssetError(
        f"none of {', '.join(BACKBONES)}; the nearest is {name}, with {len(wrong)} differences, the first: {wrong[0]}"
    )


def _differences(tensors: dict[str, Tensor], prefix: str, layout: dict[str, tuple[int, ...]]) -> Iterator[str]:
    for key, shape in layout.items():
        if f"{prefix}{key}" not in tensors:
            yield f"{key} is missing"
        elif tuple(tensors[f"{prefix}{key}"].shape) != shape:
            yield f"{key} is {tuple(tensors[f'{prefix}{key}'].shape)}, wanted {shape}"
    own = {key.partition(".")[0] for key in layout}
    for name in tensors:
        key = name.removeprefix(prefix)
        of_network = name.startswith(prefix) and "." in key and key.partition(".")[0] in own
        if of_network and key not in layout and not key.endswith(_COUNTER):
            yield f"{key} is one too many"


def _mica(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Names of MICA's mapping network -> ours. Its layers alternate with LeakyReLU in our Sequential."""
    regressor = "flameModel.regressor"
    sizes = {f"network.{layer}": (HIDDEN, HIDDEN if layer else EMBEDDING) for layer in range(_LAYERS)}
    sizes["output"] = params.PARTS["shape"], HIDDEN
    wanted: dict[str, tuple[int, ...]] = {}
    for name, size in sizes.items():
        wanted |= {f"{regressor}.{name}.weight": size, f"{regressor}.{name}.bias": size[:1]}
    got = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name.startswith(f"{regressor}.")}
    for name in sorted(got.keys() | wanted.keys()):
        if got.get(name) != wanted.get(name):
            raise AssetError(
                f"MICA's mapping network: {name}: wanted {wanted.get(name, 'none')}, got {got.get(name, 'none')}; only "
                f"{_LAYERS} layers of {HIDDEN} and {params.PARTS['shape']} outputs, as in the published file, fit ours"
            )
    ours = {f"network.{layer}": f"mapping.{2 * layer}" for layer in range(_LAYERS)} | {"output": "shape"}
    return {f"{regressor}.{name}.{kind}": f"{ours[name]}.{kind}" for name in sizes for kind in ("weight", "bias")}
