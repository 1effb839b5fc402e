"""TensorRT engines that are there: which TensorRT and GPU this machine has, whether an engine fits, what is in it,
and whether it computes what its ONNX file does.

An engine is executable code for one TensorRT and one kind of GPU. The JSON report beside it says which, and
`check_engine` reads that before anything is loaded. Building is `to_engine`.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import importlib.util
import json
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from chebface.errors import AssetError, ConfigError, MissingDependencyError
from chebface.signature import Model
from export.folder import digest
from export.parity import LIMITS, ParityError
from export.precision import emulate, open_session

if TYPE_CHECKING:
    import onnx

Batch = tuple[int, int, int]  # the smallest, the one to be fastest at, the largest
Say = Callable[[str], None]
Run = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]

PORTABLE = "sm80plus"  # one engine for Ampere and everything after it
MODULES = {"tensorrt": ("tensorrt",), "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
TITLES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
OLDEST = {"tensorrt": 10, "tensorrt_rtx": 1}  # major versions
INSTALL = (
    "pip install 'chebface[engine]' (TensorRT-RTX, builds without a GPU), or NVIDIA's tensorrt 10 or 11 beside the GPU "
    "that will serve"
)
DEVICE = "cuda"
LIMIT_SHARE = 1e-3  # of the largest answer: the most that other fp32 outputs may differ
REPORT_FORMAT = 1
_WHERE = re.compile(rf"(sm\d+|{PORTABLE}) \w+ \w+")


@dataclass(frozen=True)
class Compiler:
    """An installed TensorRT and the machine around it.

    `gpu` is the architecture of the first GPU as 'sm89', None without one; `system` is like 'Linux x86_64'.
    """

    flavour: str
    version: str
    gpu: str | None
    system: str
    module: ModuleType = field(repr=False, compare=False)

    @property
    def title(self) -> str:
        """Name and version, as people say it."""
        return f"{TITLES[self.flavour]} {self.version}"

    @property
    def is_rtx(self) -> bool:
        """Whether it is TensorRT-RTX: no GPU to build, no timing cache, no compatibility flags."""
        return self.flavour == "tensorrt_rtx"


def can_build() -> bool:
    """Whether a TensorRT is installed that builds engines here."""
    try:
        find_compiler()
    except MissingDependencyError:
        return False
    return True


def find_compiler(flavour: str | None = None) -> Compiler:
    """Import TensorRT: `flavour`, or the full one where there is a GPU, else TensorRT-RTX.

    Raises:
        ConfigError: no such flavour.
        MissingDependencyError: it is not installed, cannot be loaded, or is too old.
    """
    if flavour is not None and flavour not in MODULES:
        raise ConfigError(f"flavour: expected one of {', '.join(MODULES)}, got {flavour!r}")
    gpu = gpu_architecture()
    order = (flavour,) if flavour else (tuple(MODULES) if gpu else tuple(MODULES)[::-1])
    for candidate in order:
        for name in MODULES[candidate]:
            if importlib.util.find_spec(name) is None:
                continue
            try:
                module = importlib.import_module(name)
            except (ImportError, OSError) as error:
                raise MissingDependencyError(f"{name} is installed but does not load ({error}): {INSTALL}") from error
            if int(module.__version__.split(".")[0]) < OLDEST[candidate]:
                raise MissingDependencyError(
                    f"{candidate}: expected version {OLDEST[candidate]} or later, got {module.__version__}: {INSTALL}"
                )
            return Compiler(candidate, module.__version__, gpu, _system(), module)
    raise MissingDependencyError(f"no {' or '.join(order)}: {INSTALL}")


def gpu_architecture() -> str | None:
    """The architecture of the first visible NVIDIA GPU as 'sm89', asked of the driver; None without one."""
    library = "nvcuda.dll" if platform.system() == "Windows" else "libcuda.so.1"
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    failed = (
        cuda.cuInit(0)
        or cuda.cuDeviceGet(ctypes.byref(device), 0)
        or cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device)  # compute capability, major
        or cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)  # and minor
    )
    return None if failed else f"sm{major.value}{minor.value}"


def _system() -> str:
    machine = platform.machine()
    return f"{platform.system()} {'x86_64' if machine == 'AMD64' else machine}"


def check_engine(
    path: str | Path, *, onnx_path: str | Path | None = None, compiler: Compiler | None = None
) -> dict[str, Any]:
    """Read the report beside an engine and compare it with the file and this machine, before anything is loaded.

    Without a GPU here the architecture is not judged: no engine runs there at all.

    Args:
        path: the .plan file.
        onnx_path: the ONNX file that it should have been built from; None does not ask.
        compiler: the TensorRT that would load it; None finds the one of the flavour that built it.

    Returns:
        The report.

    Raises:
        AssetError: engine or report is missing, damaged, or made for something else; it says how to rebuild.
        MissingDependencyError: that TensorRT is not installed.
    """
    path = Path(path)
    report_path = path.with_suffix(".json")
    again = f"rebuild with: python -m export engine -o {path.parent}"
    try:
        content, report = path.read_bytes(), json.loads(report_path.read_text())
        engine, source, settings = report["engine"], report["onnx"], report["settings"]
        again += f" {onnx_path or source['file']}"
        flavour, version, target, system = (report[k] for k in ("flavour", "version", "architecture", "system"))
        if report["format"] != REPORT_FORMAT or flavour not in MODULES or not _WHERE.fullmatch(f"{target} {system}"):
            raise ValueError(f"format {report['format']}, for {flavour} {version} on {target}, {system}")
        if not isinstance(version, str):
            raise TypeError(f"version {version}")
        wanted_digest, compatible = engine["sha256"], bool(settings["version_compatible"])
    except FileNotFoundError as error:
        raise AssetError(f"{error.filename} is missing, the engine is not complete; {again}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise AssetError(f"{report_path} is not the report of an engine ({error!r}); {again}") from error
    reasons = []
    if hashlib.sha256(content).hexdigest() != wanted_digest:
        raise AssetError(f"{path} is not the file that was built (sha256 differs): do not load it; {again}")
    if onnx_path is not None and digest_onnx(Path(onnx_path), load_onnx(Path(onnx_path))) != source["sha256"]:
        reasons.append(f"it was built from another {source['file']}")
    compiler = compiler or find_compiler(flavour)
    if compiler.flavour != flavour:
        reasons.append(f"it is for {TITLES[flavour]} {version}, here is {compiler.title}")
    elif not _same_version(version, compiler.version, compatible):
        reasons.append(f"it is for {TITLES[flavour]} {version}, here is {compiler.version}")
    # An engine of TensorRT-RTX goes from Linux to Windows and back; one of TensorRT does not.
    here = compiler.system
    if system != here and not (flavour == "tensorrt_rtx" and system.split()[1] == here.split()[1]):
        reasons.append(f"it is for {system}, here is {here}")
    if compiler.gpu and not fits(compiler.flavour, target, compiler.gpu):
        reasons.append(f"it is for {target}, the GPU here is {compiler.gpu}")
        known = flavour == "tensorrt" or compiler.gpu == "sm75" or fits(flavour, PORTABLE, compiler.gpu)
        again += f" --architecture {compiler.gpu}" if known else " --flavour tensorrt"
    if reasons:
        raise AssetError(f"{path} does not fit: {'; '.join(reasons)}; {again}")
    return report


def _same_version(built: str, here: str, compatible: bool) -> bool:
    if not compatible:
        return built == here
    was, now = ([int(part) for part in re.findall(r"\d+", version)] for version in (built, here))
    return was[:1] == now[:1] and was <= now


def fits(flavour: str, target: str, gpu: str) -> bool:
    """Whether an engine for `target` may run on `gpu`; TensorRT-RTX leaves out the data centre's sm90 to sm103."""
    if target != PORTABLE:
        return gpu == target
    number = int(gpu[2:])
    return number >= 80 and (flavour == "tensorrt" or number < 90 or number >= 120)


def load_onnx(path: Path) -> onnx.ModelProto:
    """Read an ONNX file without its external data."""
    if importlib.util.find_spec("onnx") is None:
        raise MissingDependencyError("onnx is not installed: pip install 'chebface[export]'")
    import onnx
    from google.protobuf.message import DecodeError

    try:
        proto = onnx.load(str(path), load_external_data=False)
        onnx.checker.check_model(str(path))
    except FileNotFoundError as error:
        raise AssetError(f"{path}: no such file; make it with: python -m export onnx") from error
    except (DecodeError, onnx.checker.ValidationError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise AssetError(f"{path} is not a valid ONNX file ({reason}); export it again") from error
    return proto


def digest_onnx(path: Path, proto: onnx.ModelProto) -> str:
    """sha256 of an ONNX file; with external data, of the digests of all its files."""
    beside = {e.value for t in proto.graph.initializer for e in t.external_data if e.key == "location"}
    digests = [digest(path), *(digest(path.parent / name) for name in sorted(beside))]
    return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()


def run_engine(
    compiler: Compiler, plan: bytes, ranges: Sequence[Batch], log: Log, feeds: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Load an engine and run it once on the GPU. See `open_engine`."""
    return open_engine(compiler, plan, ranges, log)(feeds)


def open_engine(compiler: Compiler, plan: bytes, ranges: Sequence[Batch], log: Log) -> Run:
    """Load an engine that was just built, or passed `check_engine`.

    Args:
        compiler: the TensorRT that built it.
        plan: the engine.
        ranges: the batch range of each of its profiles.
        log: where TensorRT's complaints are kept.

    Returns:
        What runs it: inputs by name, (B, ...) each, to outputs by name. It raises ConfigError where no profile takes
        that batch, and AssetError where TensorRT refuses.

    Raises:
        AssetError: TensorRT refuses to load it.
    """
    import torch

    trt = compiler.module
    engine = trt.Runtime(logger_of(trt)).deserialize_cuda_engine(plan)
    if engine is None:
        raise AssetError(f"{compiler.title} does not load its engine: {log.tell()}")
    context = engine.create_execution_context()
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    chosen: list[int] = []

    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        size = len(next(iter(feeds.values())))
        profile = next((i for i, (least, _, most) in enumerate(ranges) if least <= size <= most), None)
        if profile is None:
            raise ConfigError(f"feeds: expected a batch within {list(ranges)}, got {size}")
        stream = torch.cuda.current_stream()
        if chosen != [profile]:
            context.set_optimization_profile_async(profile, stream.cuda_stream)
            chosen[:] = [profile]
        for name in inputs:
            context.set_input_shape(name, feeds[name].shape)
        buffers = {name: torch.tensor(feeds[name], device=DEVICE) for name in inputs}
        outputs = [name for name in names if name not in buffers]
        for name in outputs:  # FP32 or FP16, see _check_tensors
            kind = torch.float16 if engine.get_tensor_dtype(name).name == "HALF" else torch.float32
            buffers[name] = torch.full(tuple(context.get_tensor_shape(name)), float("nan"), dtype=kind, device=DEVICE)
        for name, buffer in buffers.items():
            context.set_tensor_address(name, buffer.data_ptr())
        if not context.execute_async_v3(stream.cuda_stream):
            raise AssetError(f"{compiler.title} does not run its engine: {log.tell()}")
        stream.synchronize()
        return {name: buffers[name].cpu().numpy() for name in outputs}

    return run


def why_not_run(compiler: Compiler, target: str) -> str | None:
    """Why an engine cannot be run here; None if it can."""
    if compiler.gpu is None:
        return "no GPU here"
    if not fits(compiler.flavour, target, compiler.gpu):
        return f"it is for {target}, the GPU here is {compiler.gpu}"
    import torch

    return None if torch.cuda.is_available() else "this torch has no CUDA"


def compare(
    run: Run, onnx_path: str | Path, model: Model, precision: str, feeds: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Run an engine and, in onnxruntime on the CPU, the ONNX file that it was built from, on the same inputs.

    Half precision is emulated there, since that CPU rounds nothing, or refuses.

    Outputs in metres are judged by the distance of points, in mm; others, in fp32, by their share of the largest
    value. In lower precisions the others are only reported: what they do to the face is judged in the fused graph.

    Args:
        run: gives the engine's outputs by name.
        onnx_path: the ONNX file.
        model: its entry in signature.py.
        precision: of the graph itself, see `precision_of`; its limits are those of parity.py.
        feeds: inputs by name, (B, ...) each.

    Returns:
        For each output `mean_mm` and `max_mm`, or `max_share`.

    Raises:
        ParityError: shapes differ, an answer is not a number, or a limit is passed.
    """
    import onnx

    session = open_session(emulate(onnx.load(str(onnx_path))))
    there = {each.name for each in session.get_outputs()}
    names = [t.name for t in model.every_output if t.name in there]
    wanted = dict(zip(names, session.run(names, dict(feeds)), strict=True))
    found = run(feeds)
    result: dict[str, Any] = {"batch": len(next(iter(feeds.values())))}
    for name in names:
        ours, theirs = found[name].astype(np.float64), wanted[name].astype(np.float64)
        if ours.shape != theirs.shape or not np.isfinite(ours).all():
            raise ParityError(f"{model.name}: engine: {name}: expected numbers {theirs.shape}, got {_tell(ours)}")
        if ours.ndim == 3:  # points, (B, N, 3) metres
            error = 1e3 * np.linalg.norm(ours - theirs, axis=-1)
            errors = {"mean_mm": float(error.mean()), "max_mm": float(error.max())}
            kept = "fp16" if found[name].dtype == np.float16 else precision
            limits: dict[str, float] = dict(zip(errors, LIMITS[kept], strict=True))
        else:
            errors = {"max_share": float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-12))}
            limits = {"max_share": LIMIT_SHARE} if precision == "fp32" else {}
        result[name] = errors
        over = [f"{key} {errors[key]:.2e} (limit {limit:g})" for key, limit in limits.items() if errors[key] > limit]
        if over:
            raise ParityError(
                f"{model.name}: engine and onnxruntime differ in {name}: {', '.join(over)}; nothing was written"
            )
    return result


def _tell(array: np.ndarray) -> str:
    return (
        f"{array.shape}" if np.isfinite(array).all() else f"{array.shape} with {(~np.isfinite(array)).sum()} not finite"
    )


@dataclass
class Log:
    """What TensorRT said during one build: complaints, warnings, and the layers it ended up with."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    layers: str = ""

    def tell(self) -> str:
        """All complaints in one line."""
        return "; ".join(self.errors) or "it gave no reason"


@functools.cache
def logger_of(trt: ModuleType) -> Any:
    """The process's one logger of a TensorRT: the library keeps the first that it is given, for ever."""

    class Logger(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.hear: Callable[[str, str], None] = lambda severity, message: None

        def log(self, severity: Any, message: str) -> None:
            self.hear(severity.name, message)

    return Logger()


@contextmanager
def listen(trt: ModuleType, say: Say) -> Iterator[Log]:
    """Keep what TensorRT says inside the block; warnings also go to `say`, the rest nowhere."""
    log = Log()

    def hear(severity: str, message: str) -> None:
        if severity == "VERBOSE" and message.startswith("Layers:"):
            log.layers = message
        elif severity == "WARNING":
            log.warnings.append(message.strip())
            say(f"note: TensorRT: {message.strip()}")
        elif severity.endswith("ERROR") and (words := plain(message)):
            log.errors.append(words)

    logger = logger_of(trt)
    logger.hear = hear
    try:
        yield log
    finally:
        logger.hear = lambda severity, message: None


def plain(message: str) -> str:
    """A complaint of TensorRT without the lines that say nothing but that there is no GPU."""
    lines = [line.strip() for line in message.splitlines() if not line.startswith("[checkMacros.cpp::catchCudaError")]
    return " ".join(line for line in lines if line)


def inspect_engine(compiler: Compiler, target: str, plan: bytes, log: Log) -> tuple[list[dict[str, Any]], str]:
    """What an engine is made of, asked of the engine inspector where it loads, else read from what the builder said.

    Args:
        compiler: the TensorRT that built it.
        target: its architecture.
        plan: the engine.
        log: what was said while it was built.

    Returns:
        Layers as name, type, tactic, inputs and outputs, these as name, shape (-1 is the batch) and format; and
        'inspector', 'build log' or 'nothing', which says where that is from.

    Raises:
        AssetError: TensorRT does not load what it built.
    """
    trt = compiler.module
    if compiler.gpu and fits(compiler.flavour, target, compiler.gpu):
        engine = trt.Runtime(logger_of(trt)).deserialize_cuda_engine(plan)
        if engine is None:
            raise AssetError(f"{compiler.title} does not load what it built: {log.tell()}")
        text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
        return [_layer(entry) for entry in json.loads(text)["Layers"]], "inspector"
    return [_layer_said(match) for match in _LAYER.finditer(log.layers)], "build log" if log.layers else "nothing"


_LAYER = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<type>.*?), Inputs: \[(?P<inputs>.*?)\], (?:Constants: .*?, )?"
    r"Outputs: \[(?P<outputs>.*?)\], TacticName: (?P<tactic>.*?), StreamId",
    re.MULTILINE,
)


_TENSOR = re.compile(r"\{ Name: (.*?), Dimensions: \[(.*?)\],.*?Datatype: (\w+), Format: (.*?) \}")


def _layer_said(match: re.Match[str]) -> dict[str, Any]:
    def tensors(text: str) -> list[dict[str, Any]]:
        return [
            {"name": name, "shape": [int(n) for n in shape.split(",") if n], "format": f"{kind}, {form}"}
            for name, shape, kind, form in _TENSOR.findall(text)
        ]

    words = match.groupdict()
    return {key: words[key] for key in ("name", "type", "tactic")} | {
        key: tensors(words[key]) for key in ("inputs", "outputs")
    }


def _layer(entry: dict[str, Any] | str) -> dict[str, Any]:
    """A layer of the inspector's JSON; 11 splits what 10 calls Format/Datatype."""
    if isinstance(entry, str):
        entry = {"Name": entry}

    def tensors(key: str) -> list[dict[str, Any]]:
        return [
            {
                "name": t["Name"],
                "shape": t["Dimensions"],
                "format": t.get("Format/Datatype") or f"{t.get('Datatype', t.get('DataType'))}, {t.get('Format')}",
            }
            for t in entry.get(key, ())
        ]

    return {
        "name": entry["Name"],
        "type": entry.get("LayerType", ""),
        "tactic": entry.get("TacticName", ""),
        "inputs": tensors("Inputs"),
        "outputs": tensors("Outputs"),
    }
