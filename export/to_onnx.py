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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import chebface
from chebface import signature
from chebface.errors import AssetError, ConfigError, MissingDependencyError
from chebface.files import write_whole
from chebface.signature import MODELS, Model
from export import custom, graphs
from export.calibration import (
    CALIBRATION,
    CALIBRATION_COUNT,
    CALIBRATION_CROPS,
    CALIBRATION_SEED,
    describe_calibration,
    describe_ranges,
)
from export.custom import BASES
from export.folder import MANIFEST, describe, find_changed, read_manifest, read_record, room, staging
from export.graphs import OPSET, check_graph, check_opset
from export.parity import DEVICES, HELD_OUT, SEED, ParityError, check, check_device, draw, judge, make_crops, measure
from export.precision import PRECISIONS, cast, quantize_within

if TYPE_CHECKING:
    import onnx

    from chebface.encoder import MeshEncoder
    from chebface.flame import Flame
    from chebface.heads import Head
    from chebface.regressor import Regressor

__all__ = [
    "MANIFEST",
    "Modules",
    "ParityError",
    "export_onnx",
    "open_modules",
    "read_manifest",
    "write_onnx",
]

PICTURE = "parity.png"  # where on the head it is how wrong
INEXACT = frozenset({"regress", "reconstruct"})  # only these are cast: geometry keeps float32, it costs little
JUDGED_COUNT, JUDGED_SEED = 16, SEED + 2  # what int8 chooses its layers by; the report's crops are others
LARGEST = 2**31 - 2**20  # bytes: protobuf ends at 2 GB; beyond, weights lie in NAME.onnx.data
_SMALLEST = 1024  # bytes of a tensor that goes there
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
_PROGRAM = ("graphs", "custom", "precision", "parity", "calibration", "to_onnx")  # and here

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
    calibration: Mapping[str, Any] | None = None,
    device: str = DEVICES[0],
    force: bool = False,
    dry_run: bool = False,
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
            `chebface.operators.library()`; so has reconstruct, but in fp16, bf16 and other opsets than OPSET.
        basis: of a native decode, "fp32" or "fixed".
        simplify: run onnxslim over what was traced; None does so where it is installed.
        crops_for_calibration: (n, 112, 112, 3) uint8 for int8; None makes synthetic ones of the head.
        calibration: for int8, what an earlier export saved in calibration.json: its ranges are taken as they are.
        device: where the files run to be compared: cpu, or cuda with an onnxruntime for it.
        force: export even if the recorded digests say that nothing has changed, or that a file was edited.
        dry_run: write nothing; the answer has `because`, why an export would be made, or None.
        say: called with one line per step; what the user should know begins with "note:".

    Returns:
        The manifest, with `fresh` telling whether anything was written.

    Raises:
        ConfigError: a precision, opset or device that cannot be had, or crops of another shape.
        AssetError: weights, encoder and head do not fit each other; no space left; or a file in the folder was edited,
            though it still computes the same.
        ParityError: onnxruntime disagrees with torch, and nothing was left behind; or a file in the folder was edited
            and no longer computes what torch does.
        MissingDependencyError: torch, onnx, onnxruntime, or an onnxslim or GPU that was asked for is not there.
    """
    _check_wishes(precision, opset, operators, basis, crops_for_calibration)
    _need("torch", "onnx", "onnxscript", "onnxruntime", *(["onnxslim"] if simplify else []))
    check_device(device)
    began = time.monotonic()
    folder = Path(output)
    modules = open_modules(checkpoint, head_name, encoder, say=say)
    slim = importlib.util.find_spec("onnxslim") is not None if simplify is None else simplify
    facts = _facts(modules.regressor, modules.head, modules.encoder) | {
        "checkpoint_sha256": modules.card.get("sha256", ""),
        "encoder_sha256": modules.encoder_card.get("sha256", ""),
        "precision": precision,
        "opset": opset,
        "operators": operators,
        "basis": basis,
        "onnxslim": importlib.metadata.version("onnxslim") if slim else "",
        "calibration": describe_calibration(crops_for_calibration, calibration) if precision == "int8" else "",
    }
    record = read_record(folder)
    changed = find_changed(folder, record) if record else {}
    because = _why(folder, record, changed, facts, force)
    if dry_run:
        say(f"{folder}: {f'to be exported: {because}' if because else 'up to date'}")
        return {"inputs": facts, "fresh": False, "because": because}
    if record and not because:
        say(f"{folder}: up to date")
        return record | {"fresh": False}
    if record and changed and not force:
        _refuse_edits(folder, record, changed, facts, modules, device)
        say(f"note: {folder}: {because}; exporting again")
    return write_onnx(
        folder,
        modules.regressor,
        modules.head,
        modules.encoder,
        facts,
        crops_for_calibration=crops_for_calibration,
        calibration=calibration,
        device=device,
        say=say,
        began=began,
    )


@dataclass(frozen=True)
class Modules:
    """What is exported: float32 torch in eval mode, the head, and the cards of both checkpoints."""

    regressor: Regressor
    head: Head
    encoder: MeshEncoder | None
    card: dict[str, Any]
    encoder_card: dict[str, Any]

    @property
    def flame(self) -> Flame:
        """The head as a layer."""
        from chebface.flame import Flame

        return Flame(self.head).eval()


def open_modules(
    checkpoint: str | Path | None = None,
    head_name: str | None = None,
    encoder: str | Path | None = None,
    *,
    say: Say = lambda line: None,
) -> Modules:
    """Load regressor, head and mesh encoder and make sure that they belong together. See `export_onnx`."""
    from chebface.checkpoint import check_head, load_regressor
    from chebface.heads import open_head

    regressor, card = load_regressor(Path(checkpoint) if checkpoint else None)
    head = open_head(head_name or card["training"]["head"])
    check_head(card, head)
    mesh_encoder, encoder_card = _find_encoder(encoder, head, say)
    return Modules(regressor, head, mesh_encoder, card, encoder_card)


def _why(
    folder: Path, record: dict[str, Any] | None, changed: dict[str, str], facts: dict[str, Any], force: bool
) -> str | None:
    """Why an export is to be made; None if what is there will do."""
    if force:
        return "it was asked for"
    if record is None:
        return "no whole export there"
    if changed:
        return ", ".join(changed.values())
    known = record["inputs"]
    other = [key for key in dict.fromkeys([*facts, *known]) if facts.get(key) != known.get(key)]
    return f"{', '.join(other)} changed" if other else None


def _refuse_edits(
    folder: Path,
    record: dict[str, Any],
    changed: dict[str, str],
    facts: dict[str, Any],
    modules: Modules,
    device: str,
) -> None:
    """A file that no longer opens may be made again; one that opens is somebody's work, and judged.

    Raises:
        ParityError: it does not compute what torch does.
        AssetError: it does, or belongs to another export.
    """
    edited = [name for name in changed if _opens(folder / record["files"][name]["file"], MODELS[name])]
    if not edited:
        return
    names = ", ".join(changed[name] for name in edited)
    fix = "keep it elsewhere if it is wanted, and export anew with --force"
    if record["inputs"] == facts and edited == list(changed):
        paths = {name: folder / entry["file"] for name, entry in record["files"].items()}
        crops, source = make_crops(modules.head, HELD_OUT, SEED)
        try:
            parity = measure(
                paths, modules.regressor, modules.flame, modules.encoder, crops, source=source, device=device
            )
            check(parity)
        except (ParityError, AssetError) as error:
            raise ParityError(f"{folder}: {names}, and is wrong now ({error}); {fix}") from error
        raise AssetError(f"{folder}: {names} ({MANIFEST} has another sha256), but computes the same still; {fix}")
    raise AssetError(f"{folder}: {names} ({MANIFEST} has another sha256); {fix}")


def _opens(path: Path, model: Model) -> bool:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        check_graph(path, model, path.name)
    except (OSError, DecodeError, AssetError, onnx.checker.ValidationError):
        return False
    return True


def write_onnx(
    folder: Path,
    regressor: Regressor,
    head: Head,
    encoder: MeshEncoder | None,
    facts: dict[str, Any],
    *,
    crops_for_calibration: np.ndarray | None = None,
    calibration: Mapping[str, Any] | None = None,
    device: str = DEVICES[0],
    say: Say = lambda line: None,
    began: float | None = None,
) -> dict[str, Any]:
    """Make, check and compare the files, then give them their names and record them. See `export_onnx`."""
    from chebface.flame import Flame

    began = time.monotonic() if began is None else began
    _check_sizes(head, encoder)
    flame, precision = Flame(head).eval(), facts["precision"]
    with room(folder):
        folder.mkdir(parents=True, exist_ok=True)  # before the work, which takes a while
    made, extra = _make(regressor.eval(), flame, head, encoder, facts, crops_for_calibration, calibration, say)
    metadata = {f"chebface.{key}": str(facts[key]) for key in facts if key not in {"precision", "calibration"}}
    metadata |= {"chebface.commit": _commit(), "chebface.normalization": NORMALIZATION}
    if CALIBRATION in extra:  # the numbers, wherever they came from: the same ones give the same bytes
        metadata["chebface.calibration"] = describe_ranges(json.loads(extra[CALIBRATION]))
    size = sum(proto.ByteSize() for proto in made.values())
    with room(folder, size), staging(folder) as partial:
        paths = {name: partial / f"{name}.onnx" for name in made}
        kept = {name: precision if name in INEXACT else custom.basis_of(proto) for name, proto in made.items()}
        for name, proto in made.items():
            _write(paths[name], proto, MODELS[name], metadata | {"chebface.precision": kept[name]})
        say(f"comparing onnxruntime with torch on {HELD_OUT} crops that training has not seen")
        crops, source = make_crops(head, HELD_OUT, SEED)
        parity = measure(paths, regressor, flame, encoder, crops, source=source, device=device)
        check(parity)
        files = {
            name: describe(path)
            | {"precision": kept[name]}
            | {"operators": OPERATORS[custom.is_custom(made[name])]}
            | ({"external": [describe(_beside(path))]} if _beside(path).is_file() else {})
            for name, path in paths.items()
        }
        manifest = {"inputs": facts, "commit": metadata["chebface.commit"], "parity": parity.report(), "files": files}
        (folder / MANIFEST).unlink(missing_ok=True)  # from here until it is written anew, the folder is no export
        for path in (folder / f"{name}.onnx" for name in MODELS):
            for old in (path, _beside(path)):
                if not (partial / old.name).exists():
                    old.unlink(missing_ok=True)
        for path in sorted(partial.iterdir(), reverse=True):  # NAME.onnx comes after its data
            os.replace(path, folder / path.name)
        for name in {CALIBRATION, CALIBRATION_CROPS} - extra.keys():
            (folder / name).unlink(missing_ok=True)
        for name, content in extra.items():
            write_whole(folder / name, content)
        draw(parity, head, folder / PICTURE)
        write_whole(folder / MANIFEST, json.dumps(manifest, indent=2).encode() + b"\n")
    return manifest | {"fresh": True, "seconds": round(time.monotonic() - began, 2)}


def _make(
    regressor: Regressor,
    flame: Any,
    head: Head,
    encoder: MeshEncoder | None,
    facts: dict[str, Any],
    crops: np.ndarray | None,
    calibration: Mapping[str, Any] | None,
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
        judged = make_crops(head, JUDGED_COUNT, JUDGED_SEED)[0]
        if crops is None:  # ranges that are given need none
            crops = judged if calibration else make_crops(head, CALIBRATION_COUNT, CALIBRATION_SEED)[0]
        error = judge(regressor, flame, judged)
        say(f"regress: int8 {'with given ranges' if calibration else f'calibrating on {len(crops)} crops'}")
        ranges = calibration["ranges"] if calibration else None
        regress, cache = quantize_within(regress, crops, error, ranges=ranges, say=say)
        if calibration:
            cache |= {key: calibration[key] for key in ("method", "crops", "crops_sha256")}
        else:
            buffer = io.BytesIO()
            np.save(buffer, crops, allow_pickle=False)
            extra[CALIBRATION_CROPS] = buffer.getvalue()
        extra[CALIBRATION] = json.dumps(cache, indent=1).encode() + b"\n"
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
        if precision in ("fp32", "int8") and opset == OPSET:  # what a CPU computes as it is written
            made["reconstruct"] = graphs.reconstruct_graph(regress, made["decode"])
        if encoder is not None:
            made["encode"] = custom.encode_custom(encoder)
    return made, extra


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


def _beside(path: Path) -> Path:
    """Where the weights of a file lie that is too large to hold them."""
    return path.with_name(f"{path.name}.data")


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
    """Strip what names this machine, add our facts, write the same bytes for the same graph, and check the file."""
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
    if sum(len(tensor.raw_data) for tensor in proto.graph.initializer) <= LARGEST:
        path.write_bytes(proto.SerializeToString(deterministic=True))
    else:
        import onnx

        onnx.save(proto, path, save_as_external_data=True, location=_beside(path).name, size_threshold=_SMALLEST)
    check_graph(path, model, path.name)
