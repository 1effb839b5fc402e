"""One folder of checked ONNX files from a checkpoint and a head: made by graphs.py, cast by precision.py, proved by
parity.py, recorded in manifest.json.

No file gets its final name before onnx.checker, shape inference, the comparison with signature.py, and a run in
onnxruntime that agrees with float32 torch within the limits of its precision.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import chebface
from chebface import signature
from chebface.errors import AssetError, ConfigError, MissingDependencyError
from chebface.files import write_whole
from chebface.signature import LEAVES, MODELS, Model
from export import custom, graphs
from export.custom import BASES
from export.graphs import OPSET, check_graph, check_opset
from export.parity import HELD_OUT, SEED, ParityError, check, draw, judge, make_crops, measure
from export.precision import PRECISIONS, cast, quantize_within

if TYPE_CHECKING:
    import onnx

    from chebface.encoder import MeshEncoder
    from chebface.heads import Head
    from chebface.regressor import Regressor

__all__ = ["MANIFEST", "ParityError", "export_onnx", "read_crops", "read_manifest", "write_onnx"]

MANIFEST = "manifest.json"
PICTURE = "parity.png"  # where on the head it is how wrong
CALIBRATION, CALIBRATION_CROPS = "calibration.json", "calibration.npy"  # int8: ranges and tries, and the crops
INEXACT = frozenset({"regress", "reconstruct"})  # only these are cast: geometry keeps float32, it costs little
CALIBRATION_COUNT, CALIBRATION_SEED = 64, SEED + 1
JUDGED_COUNT, JUDGED_SEED = 16, SEED + 2  # what int8 chooses its layers by; the report's crops are others
LARGEST = 2**31 - 2**20  # bytes: protobuf ends at 2 GB
NORMALIZATION = "uint8 RGB rows; (x - 127.5) / 127.5 is inside the graph"
_CODE = (
    "arcface",
    "regressor",
    "flame",
    "encoder",
    "operators",
    "params",
    "signature",
)  # what the bytes follow from, in chebface
_PROGRAM = ("graphs", "custom", "precision", "parity", "to_onnx")  # and here

OPERATORS = ("standard", "native")

Say = Callable[[str], None]


def export_onnx(
    output: str | Path,
    *,
    checkpoint: str | Path | None = None,
    head_name: str | None = None,
    encoder: str | Path | None = None,
    precision: str = "fp32",
    opset: int = OPSET,
    operators: str = OPERATORS[0],
    basis: str = BASES[0],
    simplify: bool | None = None,
    crops_for_calibration: np.ndarray | None = None,
    force: bool = False,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Export what is served, in one precision: regress, decode, topology, reconstruct, and encode where there is one.

    Args:
        output: folder for NAME.onnx and manifest.json; for int8 also the calibration's crops and ranges.
        checkpoint: weights file; None takes the shipped demo weights.
        head_name: head name or path; None takes the head that the weights were trained for.
        encoder: mesh encoder's checkpoint; None takes the shipped one if it is the head's, else encode is left out.
        precision: one of PRECISIONS; decode, encode and topology stay fp32 whatever it is.
        opset: of the graphs.
        operators: of decode and encode: "standard", or "native" for our own kernels, which onnxruntime takes from
            `chebface.operators.library()`; regress and reconstruct are standard in either.
        basis: of a native decode, "fp32" or "fp16".
        simplify: run onnxslim over what was traced; None does so where it is installed.
        crops_for_calibration: (n, 112, 112, 3) uint8 for int8; None makes synthetic ones of the head.
        force: export even if the recorded digests say that nothing has changed.
        say: called with one line per step; what the user should know begins with "note:".

    Returns:
        The manifest, with `fresh` telling whether anything was written.

    Raises:
        ConfigError: a precision or opset that cannot be had, or crops of another shape.
        AssetError: weights, encoder and head do not fit each other.
        ParityError: onnxruntime disagrees with torch; nothing was left behind.
        MissingDependencyError: torch, onnx, onnxruntime, or an onnxslim that was asked for is not installed.
    """
    _check_wishes(precision, opset, operators, basis, crops_for_calibration)
    _need("torch", "onnx", "onnxscript", "onnxruntime", *(["onnxslim"] if simplify else []))
    from chebface.checkpoint import check_head, load_regressor
    from chebface.heads import open_head

    began = time.monotonic()
    folder = Path(output)
    regressor, card = load_regressor(Path(checkpoint) if checkpoint else None)
    head = open_head(head_name or card["training"]["head"])
    check_head(card, head)
    mesh_encoder, encoder_card = _find_encoder(encoder, head, say)
    slim = importlib.util.find_spec("onnxslim") is not None if simplify is None else simplify
    facts = _facts(regressor, head, mesh_encoder) | {
        "checkpoint_sha256": card.get("sha256", ""),
        "encoder_sha256": encoder_card.get("sha256", ""),
        "precision": precision,
        "opset": opset,
        "operators": operators,
        "basis": basis,
        "onnxslim": importlib.metadata.version("onnxslim") if slim else "",
        "calibration": _describe_crops(crops_for_calibration) if precision == "int8" else "",
    }
    manifest = read_manifest(folder)
    if not force and manifest and manifest["inputs"] == facts:
        say(f"{folder}: up to date")
        return manifest | {"fresh": False}
    return write_onnx(
        folder, regressor, head, mesh_encoder, facts, crops_for_calibration=crops_for_calibration, say=say, began=began
    )


def write_onnx(
    folder: Path,
    regressor: Regressor,
    head: Head,
    encoder: MeshEncoder | None,
    facts: dict[str, Any],
    *,
    crops_for_calibration: np.ndarray | None = None,
    say: Say = lambda line: None,
    began: float | None = None,
) -> dict[str, Any]:
    """Make, check and compare the files, then give them their names and record them. See `export_onnx`."""
    from chebface.flame import Flame

    began = time.monotonic() if began is None else began
    _check_sizes(head, encoder)
    folder.mkdir(parents=True, exist_ok=True)
    flame, precision = Flame(head).eval(), facts["precision"]
    made, extra = _make(regressor.eval(), flame, head, encoder, facts, crops_for_calibration, say)
    partial = {name: folder / f"{name}.onnx.{os.getpid()}.partial" for name in made}
    metadata = {f"chebface.{key}": str(value) for key, value in facts.items() if key != "precision"}
    metadata |= {"chebface.commit": _commit(), "chebface.normalization": NORMALIZATION}
    try:
        for name, proto in made.items():
            kept = precision if name in INEXACT else "fp32"
            _write(partial[name], proto, MODELS[name], metadata | {"chebface.precision": kept})
        say(f"comparing onnxruntime with torch on {HELD_OUT} crops that training has not seen")
        crops, source = make_crops(head, HELD_OUT, SEED)
        parity = measure(partial, regressor, flame, encoder, crops, source=source)
        check(parity, "fp16" if (precision, facts["basis"]) == ("fp32", "fp16") else precision)
        manifest = {
            "inputs": facts,
            "commit": metadata["chebface.commit"],
            "parity": parity.report(),
            "files": {
                name: _describe(path, f"{name}.onnx")
                | {"precision": precision if name in INEXACT else "fp32"}
                | {"operators": facts["operators"] if name in custom.OPERATORS else OPERATORS[0]}
                for name, path in partial.items()
            },
        }
        (folder / MANIFEST).unlink(missing_ok=True)  # from here until it is written anew, the folder is no export
        for name in MODELS:
            if name not in partial:
                (folder / f"{name}.onnx").unlink(missing_ok=True)
        for name, path in partial.items():
            os.replace(path, folder / f"{name}.onnx")
        for name, content in extra.items():
            write_whole(folder / name, content)
        draw(parity, head, folder / PICTURE)
        write_whole(folder / MANIFEST, json.dumps(manifest, indent=2).encode() + b"\n")
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
    return manifest | {"fresh": True, "seconds": round(time.monotonic() - began, 2)}


def _make(
    regressor: Regressor,
    flame: Any,
    head: Head,
    encoder: MeshEncoder | None,
    facts: dict[str, Any],
    crops: np.ndarray | None,
    say: Say,
) -> tuple[dict[str, onnx.ModelProto], dict[str, bytes]]:
    """The graphs by name, and by name what else belongs into the folder."""
    opset, precision = facts["opset"], facts["precision"]
    extra: dict[str, bytes] = {}
    say("regress: tracing")
    regress = graphs.regress_graph(regressor, opset)
    if facts["onnxslim"]:
        regress = graphs.simplify_graph(regress)
    if precision == "int8":
        crops = make_crops(head, CALIBRATION_COUNT, CALIBRATION_SEED)[0] if crops is None else crops
        error = judge(regressor, flame, make_crops(head, JUDGED_COUNT, JUDGED_SEED)[0])
        say(f"regress: calibrating int8 on {len(crops)} crops")
        regress, cache = quantize_within(regress, crops, error, say=say)
        buffer = io.BytesIO()
        np.save(buffer, crops, allow_pickle=False)
        extra = {CALIBRATION: json.dumps(cache, indent=1).encode() + b"\n", CALIBRATION_CROPS: buffer.getvalue()}
    say("decode, encode, topology: building" if encoder else "decode, topology: building")
    decode = graphs.decode_graph(flame, opset)
    made = {"regress": regress, "decode": decode, "topology": graphs.topology_graph(head, opset)}
    made["reconstruct"] = graphs.reconstruct_graph(regress, decode)
    if precision in ("fp16", "bf16"):
        say(f"regress, reconstruct: casting to {precision}")
        made |= {name: cast(made[name], precision) for name in sorted(INEXACT)}
    if encoder is not None:
        made["encode"] = graphs.encode_graph(encoder, opset)
    if facts["operators"] == "native":
        made["decode"] = custom.decode_custom(flame, facts["basis"])
        if encoder is not None:
            made["encode"] = custom.encode_custom(encoder)
    return made, extra


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """The record of an export, or None where there is none, or its files are not those recorded."""
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for entry in manifest["files"].values():
            if hashlib.sha256((folder / entry["file"]).read_bytes()).hexdigest() != entry["sha256"]:
                return None
        complete = set(LEAVES) <= set(manifest["files"]) <= set(MODELS) and "inputs" in manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if complete else None


def read_crops(path: str | Path) -> np.ndarray:
    """Aligned crops (n, 112, 112, 3) uint8 RGB to calibrate with: an .npy file, or a folder of 112 x 112 pictures.

    Raises:
        AssetError: nothing there, or not such crops.
    """
    path, side = Path(path), signature.CROP_PX
    wanted = f"expected an .npy file of (n, {side}, {side}, 3) uint8 or a folder of {side} x {side} pictures"
    try:
        if path.is_dir():
            from PIL import Image

            files = sorted(p for p in path.iterdir() if p.suffix.lower() in {".png", ".jpg", ".jpeg"})
            crops = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
        else:
            crops = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise AssetError(f"calibration crops {path}: {wanted} ({error})") from error
    if crops.ndim != 4 or crops.shape[1:] != (side, side, 3) or crops.dtype != np.uint8 or not len(crops):
        raise AssetError(f"calibration crops {path}: {wanted}, got {crops.shape} {crops.dtype}")
    return crops


def _check_wishes(precision: str, opset: int, operators: str, basis: str, crops: np.ndarray | None) -> None:
    check_opset(opset)
    if operators not in OPERATORS:
        raise ConfigError(f"operators: expected {' or '.join(OPERATORS)}, got {operators!r}")
    if basis not in BASES:
        raise ConfigError(f"basis: expected {' or '.join(BASES)}, got {basis!r}")
    if basis != BASES[0] and operators != "native":
        raise ConfigError(f"basis: {basis} is for native operators only; add operators=native")
    if precision not in PRECISIONS:
        raise ConfigError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision == "int8" and opset > OPSET:
        raise ConfigError(f"opset: expected {OPSET} at most for int8, got {opset}; onnxruntime quantises no newer one")
    side = signature.CROP_PX
    if crops is not None and (crops.ndim != 4 or crops.shape[1:] != (side, side, 3) or crops.dtype != np.uint8):
        raise ConfigError(
            f"crops_for_calibration: expected (n, {side}, {side}, 3) uint8, got {crops.shape} {crops.dtype}"
        )


def _check_sizes(head: Head, encoder: MeshEncoder | None) -> None:
    if (len(head.template), len(head.faces)) != (signature.VERTICES, signature.FACES):
        raise AssetError(
            f"head {head.name}: expected {signature.VERTICES} vertices and {signature.FACES} faces, "
            f"got {len(head.template)} and {len(head.faces)}"
        )
    if encoder is not None and (len(encoder.mean), encoder.fc.out_features) != (
        signature.VERTICES,
        signature.DESCRIPTOR_SIZE,
    ):
        raise AssetError(
            f"mesh encoder: expected {signature.VERTICES} vertices and {signature.DESCRIPTOR_SIZE} numbers in the "
            f"descriptor, got {len(encoder.mean)} and {encoder.fc.out_features}"
        )


def _find_encoder(path: str | Path | None, head: Head, say: Say) -> tuple[MeshEncoder | None, dict[str, Any]]:
    """The mesh encoder that was asked for, or the shipped one where it is this head's."""
    from chebface.checkpoint import check_head, load_encoder

    model, card = load_encoder(Path(path) if path else None)
    trained = card.get("head")
    if path and trained:  # one that was trained on meshes alone names no head
        check_head(card, head)
    if not path and (not trained or trained["sha256"] != head.sha256):
        say(f"note: no mesh encoder is known for head {head.name}: encode is left out (--encoder FILE gives one)")
        return None, {}
    return model.encoder, card


def _need(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(f"{package} is not installed: pip install 'chebface[export]'")


def _describe(path: Path, name: str) -> dict[str, Any]:
    content = path.read_bytes()
    return {"file": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _describe_crops(crops: np.ndarray | None) -> str:
    if crops is None:
        return f"synthetic, {CALIBRATION_COUNT}, seed {CALIBRATION_SEED}"
    return f"given, {len(crops)}, sha256 {hashlib.sha256(np.ascontiguousarray(crops).tobytes()).hexdigest()}"


def _facts(regressor: Regressor, head: Head, encoder: MeshEncoder | None) -> dict[str, Any]:
    """Everything that the exported bytes follow from, but for what was wished."""
    import onnx
    import torch

    code = hashlib.sha256()
    for module in (*_CODE, *_PROGRAM):
        folder = Path(chebface.__file__ if module in _CODE else __file__).parent
        code.update((folder / f"{module}.py").read_bytes())
    return {
        "version": chebface.__version__,
        **{f"head{'_' * (key != 'name')}{key.replace('name', '')}": value for key, value in head.facts.items()},
        "weights_sha256": _digest(regressor),
        "encoder_weights_sha256": _digest(encoder) if encoder is not None else "",
        "code_sha256": code.hexdigest(),
        "torch": torch.__version__,
        "onnx": onnx.__version__,
    }


def _digest(module: Any) -> str:
    weights = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        array = tensor.detach().cpu().contiguous().numpy()
        weights.update(f"{name} {array.dtype.str} {array.shape}".encode())
        weights.update(array.tobytes())
    return weights.hexdigest()


def _commit() -> str:
    """The commit that this program lies in, or nothing: then the digest of the code has to do."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def _write(path: Path, proto: onnx.ModelProto, model: Model, metadata: dict[str, str]) -> None:
    """Strip what names this machine, add our facts, check, and write the same bytes for the same graph."""
    size = sum(len(tensor.raw_data) for tensor in proto.graph.initializer)
    if size > LARGEST:
        raise AssetError(
            f"{path.name}: its {size / 1e9:.1f} GB do not fit one ONNX file (2 GB), and files beside it are not "
            "written: export a smaller backbone (iresnet100 has 0.26 GB)"
        )
    for item in (proto.graph, *proto.graph.node, *proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        item.ClearField("doc_string")
        item.ClearField("metadata_props")
    for tensor in proto.graph.initializer:
        tensor.ClearField("doc_string")
        tensor.ClearField("metadata_props")
    proto.graph.name = model.name
    proto.producer_name, proto.producer_version = "chebface", chebface.__version__
    proto.ClearField("doc_string")
    proto.ClearField("metadata_props")
    for key, value in sorted(metadata.items()):
        proto.metadata_props.add(key=key, value=value)
    check_graph(proto, model, path.name)
    path.write_bytes(proto.SerializeToString(deterministic=True))
