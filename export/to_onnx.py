"""Torch modules to ONNX: opset 18, dynamic batch, names from signature.py, checked against torch before they count.

A file gets its final name only after onnx.checker, shape inference, the comparison with signature.py, and a run in
onnxruntime that agrees with torch at several batch sizes.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import chebface
from chebface import params, signature
from chebface.errors import AssetError, ChebfaceError, ConfigError, MissingDependencyError
from chebface.files import write_whole
from chebface.signature import DECODE, LEAVES, REGRESS, TOPOLOGY, Model, Tensor

if TYPE_CHECKING:
    import onnx
    import torch

    from chebface.flame import Flame
    from chebface.heads import Head
    from chebface.regressor import Regressor

OPSET = 18  # above, some of onnxruntime's CUDA kernels are missing
MAX_IR = 10
EXAMPLE_BATCH = 2  # a batch of 1 would be taken for a constant
CHECK_BATCHES = (1, 2, 5)
LIMIT_MM = 0.01  # the most that a vertex may move between torch and onnxruntime
LIMIT_PARAMETERS = 1e-3  # the most that any of the 486 numbers may
MANIFEST = "manifest.json"
ONNX_TYPES = {"FP32": 1, "UINT8": 2, "INT32": 6, "BYTES": 8}  # onnx.TensorProto.DataType


class ParityError(ChebfaceError):
    """An exported file does not give what torch gives."""

    exit_code = 3


@dataclass(frozen=True)
class Parity:
    """How far onnxruntime is from torch, at most, over the checked batches."""

    vertex_mm: float
    landmark_mm: float
    parameters: float
    batches: tuple[int, ...] = CHECK_BATCHES


Say = Callable[[str], None]


def export_onnx(
    output: str | Path,
    *,
    checkpoint: str | Path | None = None,
    head_name: str | None = None,
    limit_mm: float = LIMIT_MM,
    force: bool = False,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Export regressor, decoder and topology.

    Args:
        output: folder for regress.onnx, decode.onnx, topology.onnx and manifest.json.
        checkpoint: weights file; None takes the shipped demo weights.
        head_name: head name or path; None takes the head that the weights were trained for.
        limit_mm: the most that a vertex may move.
        force: export even if the recorded digests say that nothing has changed.
        say: called with one line per step.

    Returns:
        The manifest, with `fresh` telling whether anything was written.

    Raises:
        AssetError: weights and head do not fit each other.
        ParityError: onnxruntime disagrees with torch; nothing was left behind.
        MissingDependencyError: torch, onnx or onnxruntime is not installed.
    """
    if not limit_mm > 0:
        raise ConfigError(f"limit_mm: expected above 0, got {limit_mm}")
    _need("torch", "onnx", "onnxscript", "onnxruntime")
    from chebface.checkpoint import check_head, load_regressor
    from chebface.flame import Flame
    from chebface.heads import open_head

    began = time.monotonic()
    folder = Path(output)
    regressor, card = load_regressor(Path(checkpoint) if checkpoint else None)
    head = open_head(head_name or card["training"]["head"])
    check_head(card, head)
    facts = _facts(regressor, head)
    manifest = read_manifest(folder)
    if not force and manifest and manifest["inputs"] == facts and manifest["parity"]["vertex_mm"] <= limit_mm:
        say(f"{folder}: up to date")
        return manifest | {"fresh": False}
    return write_onnx(folder, regressor, Flame(head), head, facts, limit_mm=limit_mm, say=say, began=began)


def write_onnx(
    folder: Path,
    regressor: Regressor,
    flame: Flame,
    head: Head,
    facts: dict[str, Any],
    *,
    limit_mm: float = LIMIT_MM,
    say: Say = lambda line: None,
    began: float | None = None,
) -> dict[str, Any]:
    """Write, check and compare the three files, then give them their names and record them. See `export_onnx`."""
    import torch

    began = time.monotonic() if began is None else began
    if (len(head.template), len(head.faces)) != (signature.VERTICES, signature.FACES):
        raise AssetError(
            f"head {head.name}: expected {signature.VERTICES} vertices and {signature.FACES} faces, "
            f"got {len(head.template)} and {len(head.faces)}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    regressor, flame = regressor.eval(), flame.eval()
    partial = {name: folder / f"{name}.onnx.{os.getpid()}.partial" for name in LEAVES}
    metadata = {f"chebface.{key}": str(value) for key, value in facts.items()} | {"chebface.precision": "fp32"}
    try:
        with torch.no_grad():
            for model, module in ((REGRESS, _regress_module(regressor)), (DECODE, _decode_module(flame))):
                say(f"{model.name}: tracing")
                _write(partial[model.name], _trace(module, model), model, metadata)
            _write(partial[TOPOLOGY.name], _topology(head), TOPOLOGY, metadata)
            say(f"comparing onnxruntime with torch at batches {', '.join(map(str, CHECK_BATCHES))}")
            parity = compare(partial, regressor, flame, head)
        if not (parity.vertex_mm <= limit_mm and parity.parameters <= LIMIT_PARAMETERS):
            raise ParityError(
                f"onnxruntime differs from torch: vertices by {parity.vertex_mm:.6f} mm (limit {limit_mm:g}), "
                f"parameters by {parity.parameters:.2e} (limit {LIMIT_PARAMETERS:g}); nothing was written"
            )
        manifest = {
            "inputs": facts,
            "parity": {**vars(parity), "batches": list(parity.batches), "limit_mm": limit_mm, "passed": True},
            "files": {name: _describe(path, f"{name}.onnx") for name, path in partial.items()},
        }
        for name, path in partial.items():
            os.replace(path, folder / f"{name}.onnx")
        write_whole(folder / MANIFEST, json.dumps(manifest, indent=2).encode() + b"\n")
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
    say(f"{folder}: vertices agree within {parity.vertex_mm:.6f} mm (limit {limit_mm:g})")
    return manifest | {"fresh": True, "seconds": round(time.monotonic() - began, 2)}


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """The record of an export, or None where there is none, or its files are not those recorded."""
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for entry in manifest["files"].values():
            if hashlib.sha256((folder / entry["file"]).read_bytes()).hexdigest() != entry["sha256"]:
                return None
        complete = set(manifest["files"]) == set(LEAVES) and "inputs" in manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if complete else None


def _need(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(f"{package} is not installed: pip install 'chebface[export]'")


def _describe(path: Path, name: str) -> dict[str, Any]:
    content = path.read_bytes()
    return {"file": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _facts(regressor: Regressor, head: Head) -> dict[str, Any]:
    """Everything that the exported bytes follow from."""
    import onnx
    import torch

    weights = hashlib.sha256()
    for name, tensor in sorted(regressor.state_dict().items()):
        array = tensor.detach().cpu().contiguous().numpy()
        weights.update(f"{name} {array.dtype.str} {array.shape}".encode())
        weights.update(array.tobytes())
    code = hashlib.sha256(Path(__file__).read_bytes())
    for module in ("arcface", "regressor", "flame", "params", "signature"):
        code.update(Path(chebface.__file__).with_name(f"{module}.py").read_bytes())
    return {
        "version": chebface.__version__,
        "head": head.name,
        "head_version": head.version,
        "head_licence": head.licence,
        "head_sha256": head.sha256,
        "weights_sha256": weights.hexdigest(),
        "code_sha256": code.hexdigest(),
        "torch": torch.__version__,
        "onnx": onnx.__version__,
    }


def _regress_module(regressor: Regressor) -> torch.nn.Module:
    import torch

    from chebface.regressor import normalize_crop

    class Regress(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.regressor = regressor

        def forward(self, crop: torch.Tensor) -> torch.Tensor:
            return self.regressor(normalize_crop(crop))

    return Regress().eval()


def _decode_module(flame: Flame) -> torch.nn.Module:
    import torch

    class Decode(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flame = flame

        def forward(self, parameters: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.flame.decode(parameters)

    return Decode().eval()


def _trace(module: torch.nn.Module, model: Model) -> onnx.ModelProto:
    import torch

    kinds = {"FP32": torch.float32, "UINT8": torch.uint8}
    examples = tuple(torch.zeros(EXAMPLE_BATCH, *t.shape, dtype=kinds[t.dtype]) for t in model.inputs)
    batch = torch.export.Dim("batch", min=1, max=1024)
    with _quiet():
        program = torch.onnx.export(
            module,
            examples,
            dynamo=True,
            opset_version=OPSET,
            input_names=[t.name for t in model.inputs],
            output_names=[t.name for t in model.outputs],
            dynamic_shapes=tuple({0: batch} for _ in model.inputs),
            external_data=False,
            verbose=False,
        )
    if program is None:
        raise ParityError(f"{model.name}: torch.onnx.export gave nothing")
    return program.model_proto


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes (torchvision is absent, its own deprecations) off the screen; errors still raise."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _topology(head: Head) -> onnx.ModelProto:
    """A graph that answers any request with the head's triangles and facts."""
    from onnx import helper, numpy_helper

    facts = head.facts
    triangles, text = TOPOLOGY.outputs
    constants = [
        numpy_helper.from_array(np.ascontiguousarray(head.faces, np.int32), "triangles"),
        numpy_helper.from_array(np.array([json.dumps(facts)], object), "facts"),
    ]
    graph = helper.make_graph(
        [
            helper.make_node("Identity", ["triangles"], [triangles.name]),
            helper.make_node("Identity", ["facts"], [text.name]),
        ],
        TOPOLOGY.name,
        [helper.make_tensor_value_info(t.name, ONNX_TYPES[t.dtype], t.shape) for t in TOPOLOGY.inputs],
        [helper.make_tensor_value_info(t.name, ONNX_TYPES[t.dtype], t.shape) for t in TOPOLOGY.outputs],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=MAX_IR)


def _write(path: Path, proto: onnx.ModelProto, model: Model, metadata: dict[str, str]) -> None:
    """Strip what names this machine, add our facts, check, and write the same bytes for the same graph."""
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


def check_graph(proto: onnx.ModelProto, model: Model, where: str) -> None:
    """Check a graph by itself and against signature.py.

    Raises:
        AssetError: it is broken, too new, or its inputs and outputs are not those of the model.
    """
    import onnx

    try:
        onnx.checker.check_model(proto, full_check=True)
        onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise AssetError(f"{where}: not a valid ONNX graph ({error}); export it again") from error
    opsets = {entry.domain: entry.version for entry in proto.opset_import}
    if proto.ir_version > MAX_IR or opsets.get("", 0) > OPSET:
        raise AssetError(
            f"{where}: expected IR {MAX_IR} and opset {OPSET} at most, got IR {proto.ir_version} and {opsets}"
        )
    for kind, tensors, values in (
        ("input", model.inputs, proto.graph.input),
        ("output", model.outputs, proto.graph.output),
    ):
        wanted = {t.name: _spell(t, model.batched) for t in tensors}
        found = {value.name: _read_value(value) for value in values}
        if wanted != found:
            raise AssetError(f"{where}: {kind}s: signature.py says {wanted}, the file {found}; export it again")


def _spell(tensor: Tensor, batched: bool) -> tuple[str, tuple[int | str, ...]]:
    return tensor.dtype, (("B",) if batched else ()) + tensor.shape


def _read_value(value: onnx.ValueInfoProto) -> tuple[str, tuple[int | str, ...]]:
    names = {number: name for name, number in ONNX_TYPES.items()}
    kind = value.type.tensor_type
    shape = tuple("B" if dim.dim_param else dim.dim_value for dim in kind.shape.dim)
    return names.get(kind.elem_type, f"type {kind.elem_type}"), shape


def compare(paths: dict[str, Path], regressor: Regressor, flame: Flame, head: Head) -> Parity:
    """Run the files in onnxruntime and the modules in torch on the same faces.

    Two ways in: crops through regressor and decoder, and drawn parameters (identity, expression, both poses) through
    the decoder, since the regressor's own answers move the head little.

    Raises:
        ParityError: the topology differs.
    """
    import onnxruntime
    import torch

    from chebface.regressor import normalize_crop

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    sessions = {
        name: onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for name, path in paths.items()
    }
    triangles, facts = sessions["topology"].run(None, {"request": np.zeros(1, np.int32)})
    if not np.array_equal(triangles, head.faces) or json.loads(facts[0])["sha256"] != head.sha256:
        raise ParityError("topology.onnx does not answer with the head's triangles and facts")
    vertex_mm = landmark_mm = worst = 0.0
    rng = np.random.default_rng(5023)
    for batch in CHECK_BATCHES:
        crops = draw_crops(rng, batch)
        (found,) = sessions["regress"].run(None, {"crop": crops})
        wanted = regressor(normalize_crop(torch.from_numpy(crops))).numpy()
        worst = _worse(worst, found, wanted)
        for given, ours in ((wanted, found), (drawn := draw_parameters(rng, batch), drawn)):
            vertices, landmarks = (t.numpy() for t in flame.decode(torch.from_numpy(given)))
            answers = sessions["decode"].run(None, {"parameters": ours})
            vertex_mm = _worse(vertex_mm, 1e3 * answers[0], 1e3 * vertices)
            landmark_mm = _worse(landmark_mm, 1e3 * answers[1], 1e3 * landmarks)
    return Parity(vertex_mm, landmark_mm, worst)


def _worse(worst: float, found: np.ndarray, wanted: np.ndarray) -> float:
    """The larger of `worst` and the largest distance between two arrays; (B, N, 3) are points, the rest numbers."""
    if found.shape != wanted.shape:
        raise ParityError(f"onnxruntime gives {found.shape}, torch {wanted.shape}")
    difference = found.astype(np.float64) - wanted
    error = np.linalg.norm(difference, axis=-1) if difference.ndim == 3 else np.abs(difference)
    return float("inf") if not np.isfinite(error).all() else max(worst, float(error.max()))


def draw_parameters(rng: np.random.Generator, batch: int) -> np.ndarray:
    """Plausible parameters (B, 486) float32 with turned heads and open jaws."""
    drawn = rng.normal(0, 1, (batch, params.TOTAL))
    drawn[:, params.SLICES["expression"]] *= 0.5
    drawn[:, params.SLICES["pose"]] *= 0.3
    return drawn.astype(np.float32)


def draw_crops(rng: np.random.Generator, batch: int) -> np.ndarray:
    """Face-like crops (B, 112, 112, 3) uint8: a lit oval with eyes, brows and mouth where the alignment puts them.

    Noise would say little: it drives activations to where faces never do.
    """
    y, x = np.mgrid[: signature.CROP_PX, : signature.CROP_PX].astype(np.float64)
    crops = []
    for _ in range(batch):

        def blob(at_x: float, at_y: float, width: float, height: float) -> np.ndarray:
            return np.exp(-(((x - at_x) / width) ** 4) - ((y - at_y) / height) ** 4)[..., None]

        shift, light = rng.normal(0, 1.5, 2), rng.normal(0, 0.25, 2)
        image = np.broadcast_to(rng.uniform(0, 1, 3), (*x.shape, 3)) * (0.5 + y[..., None] / 224)
        skin = rng.uniform((0.4, 0.25, 0.2), (0.95, 0.75, 0.65))
        shade = 1 + light[0] * (x[..., None] - 56) / 56 + light[1] * (y[..., None] - 56) / 56
        face = blob(56 + shift[0], 62 + shift[1], 42, 58)
        image = (1 - face) * image + face * skin * shade
        for at_x, at_y, width, height, tone in (
            (38.3, 51.7, 7, 3.5, 0.2),
            (73.5, 51.5, 7, 3.5, 0.2),
            (38.3, 43, 10, 2, 0.45),
            (73.5, 43, 10, 2, 0.45),
            (56, 71.7, 6, 3, 0.75),
            (56, 92.3, 14, 3, 0.55),
        ):
            part = blob(at_x + shift[0], at_y + shift[1], width, height)
            image = image * (1 - part * (1 - tone))
        image = image + rng.normal(0, 0.01, image.shape)
        crops.append((image.clip(0, 1) * 255).round().astype(np.uint8))
    return np.stack(crops)
