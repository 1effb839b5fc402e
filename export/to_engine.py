"""ONNX to TensorRT engines: one builder over `tensorrt` (10 and 11) and `tensorrt_rtx`.

It only compiles: precision is what the ONNX file says (a strongly typed network, TF32 off, so fp32 is fp32).
`tensorrt_rtx` builds without a GPU; running, and so comparing, needs one.

There is no plugin for the Chebyshev convolutions: `encode` is products over constants, which TensorRT takes as they are
(46 layers of TensorRT-RTX). Whether a sparse plugin would be faster has not been measured: it takes a GPU.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chebface import signature
from chebface.errors import AssetError, ConfigError, MissingDependencyError
from chebface.files import whole, write_whole
from chebface.signature import MODELS, Model, Tensor
from export.engines import (
    PORTABLE,
    REPORT_FORMAT,
    Batch,
    Compiler,
    Log,
    Say,
    check_engine,
    compare,
    digest_onnx,
    find_compiler,
    inspect_engine,
    listen,
    load_onnx,
    logger_of,
    plain,
    run_engine,
    why_not_run,
)
from export.folder import MANIFEST, clear_leftovers, digest, room
from export.precision import PRECISIONS, precision_of

if TYPE_CHECKING:
    import onnx

BATCH: Batch = (1, 8, signature.MAX_BATCH)
TAGS = {"tensorrt": "trt", "tensorrt_rtx": "trt-rtx"}
DTYPES = {"FLOAT": "FP32", "HALF": "FP16", "UINT8": "UINT8", "INT32": "INT32"}  # TensorRT's names to signature.py's


def build_engine(
    onnx_path: str | Path,
    output: str | Path,
    *,
    batch: Batch | Sequence[Batch] = BATCH,
    architecture: str | None = None,
    flavour: str | None = None,
    workspace_mb: int | None = None,
    timing_cache: str | Path | None = None,
    version_compatible: bool = False,
    hardware_compatible: bool = False,
    feeds: Mapping[str, np.ndarray] | None = None,
    force: bool = False,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Compile one exported ONNX file; leaves NAME.ARCHITECTURE.trtVERSION.PRECISION.plan and a .json of that name.

    Args:
        onnx_path: a file of `python -m export onnx`; its `chebface.precision` names the precision.
        output: folder of the engine and its report.
        batch: smallest, preferred and largest batch, or several such, one optimisation profile each. TensorRT-RTX
            stores the weights once per profile.
        architecture: GPU to build for, as 'sm89'. None is this machine's GPU for TensorRT, and 'sm80plus' (any GPU
            from Ampere on) for TensorRT-RTX.
        flavour: 'tensorrt' or 'tensorrt_rtx'; None is the full one where there is a GPU.
        workspace_mb: the most scratch memory that a layer may ask for; None leaves it to TensorRT.
        timing_cache: file of kernel timings, read if it fits and written whole; TensorRT-RTX tunes when it runs and
            has none.
        version_compatible: the engine may be loaded by later releases of the same major version; TensorRT only.
        hardware_compatible: the engine may run on any GPU from Ampere on, at some cost in speed.
        feeds: inputs to compare on, by name, with a batch that fits; None draws some.
        force: build even if a checked engine of the same ONNX file and settings is there.
        say: called with one line per step; lines of TensorRT itself begin with 'note:'.

    Returns:
        The report as written, with `fresh` telling whether anything was built.

    Raises:
        ConfigError: a setting that cannot be had.
        AssetError: the ONNX file is missing, damaged, edited, not for engines, or refused; or no space is left.
        ParityError: on this GPU the engine does not compute what onnxruntime does; nothing was written.
        MissingDependencyError: TensorRT or onnx is not installed, or TensorRT has no GPU to build on.
    """
    began = time.monotonic()
    path, folder = Path(onnx_path), Path(output)
    ranges = _ranges(batch)
    if workspace_mb is not None and workspace_mb < 1:
        raise ConfigError(f"workspace_mb: expected 1 or more, got {workspace_mb}")
    compiler = find_compiler(flavour)
    target = _target(compiler, architecture, hardware_compatible)
    if compiler.is_rtx and version_compatible:
        raise ConfigError("version_compatible: TensorRT-RTX engines belong to one release; build with tensorrt")
    proto, model, precision = _read(path)
    settings = {
        "batch": [list(sizes) for sizes in ranges],
        "workspace_mb": workspace_mb,
        "version_compatible": version_compatible,
        "hardware_compatible": hardware_compatible,
    }
    source = {"file": path.name, "bytes": path.stat().st_size, "sha256": digest_onnx(path, proto)}
    plan_path = folder / f"{model.name}.{target}.{TAGS[compiler.flavour]}{compiler.version}.{precision}.plan"
    if not force and (known := _up_to_date(plan_path, compiler, source, settings)):
        say(f"{plan_path}: up to date")
        return known | {"fresh": False}
    say(f"{model.name}: building for {target} with {compiler.title}, {precision}")
    with listen(compiler.module, say) as log:
        plan = _compile(compiler, path, proto, model, target, ranges, settings, timing_cache, log, say)
        layers, inspected = inspect_engine(compiler, target, plan, log)
        reason = why_not_run(compiler, target)
        if reason:
            say(f"note: {plan_path.name} was not run: {reason}")
            compared: dict[str, Any] = {"skipped": reason}
        else:
            say(f"{model.name}: comparing with onnxruntime")
            run = functools.partial(run_engine, compiler, plan, ranges, log)
            compared = compare(run, path, model, precision_of(proto), feeds or _draw(model, ranges[0][1]))
    report = {
        "format": REPORT_FORMAT,
        "engine": {"file": plan_path.name, "bytes": len(plan), "sha256": hashlib.sha256(plan).hexdigest()},
        "onnx": source,
        "model": model.name,
        "precision": precision,
        "flavour": compiler.flavour,
        "version": compiler.version,
        "architecture": target,
        "system": compiler.system,
        "settings": settings,
        "profiles": [
            {t.name: {kind: [size, *t.shape] for kind, size in zip(("min", "opt", "max"), sizes, strict=True)}}
            for sizes in ranges
            for t in model.inputs
        ],
        "inspected": inspected,
        "formats": dict(Counter(t["format"] for layer in layers for t in layer["inputs"] + layer["outputs"])),
        "layers": layers,
        "compared": compared,
        "warnings": log.warnings,
        "seconds": round(time.monotonic() - began, 2),
    }
    _write(plan_path, plan, report)
    say(f"{plan_path}: {len(plan) / 1e6:.1f} MB, {len(layers)} layers, {report['seconds']:.1f} s")
    return report | {"fresh": True}


def build_engines(
    folder: str | Path, output: str | Path, *, say: Say = lambda line: None, **settings: Any
) -> dict[str, Any]:
    """Build an engine of every exported file in a folder that can be one: all but text and our own operators.

    Args:
        folder: what `python -m export onnx` wrote.
        output: folder of the engines and their reports.
        say: called with one line per step.
        settings: of `build_engine`.

    Returns:
        `engines`, the report of each by model; `skipped`, why a file is none.

    Raises:
        AssetError: there is no such file; and what `build_engine` raises.
    """
    paths = {name: path for name in MODELS if (path := Path(folder) / f"{name}.onnx").is_file()}
    skipped = {name: why for name, path in paths.items() if (why := _no_engine(name, path))}
    if not paths.keys() - skipped.keys():
        raise AssetError(
            f"{folder}: no file to build an engine from; make them with: python -m export onnx -o {folder}"
        )
    for name, why in skipped.items():
        say(f"note: {paths.pop(name)} is not for engines: {why}")
    reports = {name: build_engine(path, output, say=say, **settings) for name, path in paths.items()}
    return {"engines": reports, "skipped": skipped}


def _no_engine(name: str, path: Path) -> str | None:
    if words := _texts(MODELS[name]):
        return f"{', '.join(words)} is text"
    domains = {node.domain for node in load_onnx(path).graph.node} - {"", "ai.onnx"}
    return f"operators of {', '.join(sorted(domains))} run in onnxruntime only" if domains else None


def _texts(model: Model) -> list[str]:
    return [t.name for t in (*model.inputs, *model.outputs) if t.dtype == "BYTES"]


def _ranges(batch: Batch | Sequence[Batch]) -> list[Batch]:
    several: Any = [batch] if batch and isinstance(batch[0], int) else batch
    ranges: list[Batch] = []
    for sizes in several:
        if len(sizes) != 3 or not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
            raise ConfigError(f"batch: expected (smallest, preferred, largest), 1 <= each <= the next, got {sizes}")
        ranges.append(tuple(sizes))
    if not ranges:
        raise ConfigError("batch: expected at least one range, got none")
    return ranges


def _target(compiler: Compiler, wanted: str | None, hardware_compatible: bool) -> str:
    if wanted and hardware_compatible:
        raise ConfigError(f"architecture: expected one GPU or hardware_compatible, got both ({wanted})")
    if compiler.is_rtx:
        known = [n.lower() for n in compiler.module.ComputeCapability.__members__ if n.startswith("SM")]
        if wanted and wanted not in known:
            raise ConfigError(f"architecture: {compiler.title} builds for {', '.join(known)}, got {wanted}")
        return wanted or PORTABLE
    if compiler.gpu is None:
        raise MissingDependencyError(
            "tensorrt builds only beside the GPU that will serve and found none; build there, or with tensorrt_rtx"
        )
    if wanted and wanted != compiler.gpu:
        raise ConfigError(f"architecture: tensorrt builds for this machine's {compiler.gpu}, got {wanted}; build there")
    return PORTABLE if hardware_compatible else compiler.gpu


def _read(path: Path) -> tuple[onnx.ModelProto, Model, str]:
    """An exported ONNX file, the model in signature.py that it is, and its precision."""
    proto = load_onnx(path)
    try:
        files = json.loads((path.parent / MANIFEST).read_text())["files"].values()
        recorded = {entry["file"]: entry["sha256"] for entry in files}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        recorded = {}
    if recorded.get(path.name, digest(path)) != digest(path):
        raise AssetError(f"{path} was changed after its export ({MANIFEST} records another sha256); export it again")
    model = MODELS.get(proto.graph.name) or MODELS.get(path.stem)
    precision = {entry.key: entry.value for entry in proto.metadata_props}.get("chebface.precision")
    if model is None or precision not in PRECISIONS:
        raise AssetError(
            f"{path}: expected a model of signature.py with chebface.precision {' | '.join(PRECISIONS)} in its "
            f"metadata, got graph {proto.graph.name!r}, {precision!r}; export it with: python -m export onnx"
        )
    if words := _texts(model):
        raise AssetError(f"{path}: {model.name} is not for engines: {', '.join(words)} is text; serve it as ONNX")
    for value in proto.graph.input:
        shape = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        if [isinstance(size, str) for size in shape] != [True] + [False] * (len(shape) - 1):
            raise AssetError(f"{path}: {value.name}: expected a free batch and nothing else free, got {shape}")
    return proto, model, precision


def _up_to_date(
    plan_path: Path, compiler: Compiler, source: dict[str, Any], settings: dict[str, Any]
) -> dict[str, Any] | None:
    try:
        report = check_engine(plan_path, compiler=compiler)
    except AssetError:
        return None
    overdue = "skipped" in report.get("compared", ("skipped",)) and not why_not_run(compiler, report["architecture"])
    return report if (report["onnx"], report["settings"]) == (source, settings) and not overdue else None


def _compile(
    compiler: Compiler,
    path: Path,
    proto: onnx.ModelProto,
    model: Model,
    target: str,
    ranges: Sequence[Batch],
    settings: Mapping[str, Any],
    timing_cache: str | Path | None,
    log: Log,
    say: Say,
) -> bytes:
    trt = compiler.module
    builder = trt.Builder(logger_of(trt))
    # Needed by 10, accepted and ignored by 11.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger_of(trt))
    if not parser.parse_from_file(str(path)):
        refused = [_tell_refusal(parser.get_error(i)) for i in range(parser.num_errors)]
        raise AssetError(f"{path}: {compiler.title} cannot take it:\n  " + "\n  ".join(refused or [log.tell()]))
    _check_tensors(network, model, path)
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # formats in what the inspector says
    if settings["workspace_mb"]:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings["workspace_mb"] << 20)
    for sizes in ranges:
        profile = builder.create_optimization_profile()
        for tensor in model.inputs:
            profile.set_shape(tensor.name, *((size, *tensor.shape) for size in sizes))
        config.add_optimization_profile(profile)
    if settings["version_compatible"]:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if settings["hardware_compatible"] and not compiler.is_rtx:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if compiler.is_rtx and target != PORTABLE:
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.__members__[target.upper()], 0)
    cache = None
    if timing_cache and compiler.is_rtx:
        say("note: TensorRT-RTX tunes when it runs: no timing cache is read or written")
    elif timing_cache:
        cache = Path(timing_cache)
        known = config.create_timing_cache(cache.read_bytes() if cache.is_file() else b"")
        if not known or not config.set_timing_cache(known, False):
            say(f"note: {cache} was made by another TensorRT or GPU; it is started anew")
            config.set_timing_cache(config.create_timing_cache(b""), True)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise AssetError(f"{path}: {compiler.title} cannot build it for {target}: {log.tell()}")
    if cache:
        with room(cache):
            write_whole(cache, bytes(config.get_timing_cache().serialize()))
    return bytes(plan)


def _tell_refusal(error: Any) -> str:
    reason = plain(error.desc())
    return f"{error.node_operator() or 'graph'} {error.node_name() or ''}: ".replace(" :", ":") + (
        f"{error.code().name.lower()}" + ("" if reason in {"", "false"} else f", {reason}")
    )


def _check_tensors(network: Any, model: Model, where: Path) -> None:
    for kind, count, get, tensors in (
        ("input", network.num_inputs, network.get_input, model.inputs),
        ("output", network.num_outputs, network.get_output, model.every_output),
    ):
        found = {t.name: (DTYPES.get(t.dtype.name, t.dtype.name), tuple(t.shape)) for t in map(get, range(count))}
        wanted = {t.name: (t.dtype, (-1, *t.shape)) for t in tensors}
        if found != wanted:
            raise AssetError(f"{where}: {kind}s: signature.py says {wanted}, TensorRT found {found}; export it again")


def _draw(model: Model, batch: int) -> dict[str, np.ndarray]:
    """Inputs to compare on: crops of coloured squares, parameters and points of a plausible size."""
    rng = np.random.default_rng(5023)

    def draw(tensor: Tensor) -> np.ndarray:
        if tensor.dtype == "UINT8":
            high, wide, colours = tensor.shape
            squares = rng.integers(0, 256, (batch, high // 16, wide // 16, colours), np.uint8)
            return squares.repeat(16, 1).repeat(16, 2)
        return rng.normal(0, 0.3 if tensor.name == "parameters" else 0.1, (batch, *tensor.shape)).astype(np.float32)

    return {tensor.name: draw(tensor) for tensor in model.inputs}


def _write(plan_path: Path, plan: bytes, report: dict[str, Any]) -> None:
    """The engine, then its report: one without the other is refused by `check_engine`."""
    clear_leftovers(plan_path.parent)
    with room(plan_path, len(plan)):
        with whole(plan_path) as partial:
            partial.write_bytes(plan)
        try:
            write_whole(plan_path.with_suffix(".json"), json.dumps(report, indent=1).encode() + b"\n")
        except OSError:
            plan_path.unlink()
            raise
