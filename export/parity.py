"""Whether exported files compute the same face: in mm, px and cosine against float32 torch, on crops that no training
and no calibration saw.

Half-precision graphs are judged by what their numbers are on a device that has such arithmetic, not by what
onnxruntime's CPU makes of them (precision.emulate); the report's `computed_in` says what was run. On a GPU (device
cuda) files run as they are. The reference is float32 torch on the CPU either way.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chebface import camera, params
from chebface.config import Synthesize
from chebface.crop import WIDE_PX
from chebface.errors import AssetError, ChebfaceError, ConfigError, MissingDependencyError
from chebface.files import write_whole
from chebface.signature import (
    CROP_PX,
    DECODE,
    ENCODE,
    RECONSTRUCT,
    REGRESS,
    TOPOLOGY,
    VERTICES_HALF,
    VERTICES_M,
    Model,
    Tensor,
)
from export.custom import basis_of
from export.precision import PRECISIONS, check_crops, emulate, open_session, precision_of

if TYPE_CHECKING:
    import onnx

    from chebface.encoder import MeshEncoder
    from chebface.flame import Flame
    from chebface.heads import Head
    from chebface.regressor import Regressor

# Mean and most that a vertex may move, mm. bf16 has three bits fewer than fp16: 0.06 and 0.4 were measured on the demo
# weights, where fp16 had 0.009 and 0.04. `fixed` is a basis of `decode`, the others are precisions.
LIMITS = {"fp32": (0.001, 0.01), "fixed": (0.01, 0.05), "fp16": (0.05, 0.5), "bf16": (0.2, 1.5), "int8": (0.5, 2.0)}
DEVICES = ("cpu", "cuda")
HALF = VERTICES_HALF.name  # judged as fp16 is
LIMIT_COSINE = 1e-5  # from 1, between descriptors of `encode`, which is float32 always
HELD_OUT = 64
SEED = 5023_112  # of held-out crops; no dataset of ours has it
_BATCH = 8
_DRAWN = 16  # parameters beside those of the crops: the regressor's own answers move the head little
_COMPUTED_IN = {
    "fp32": "float32",
    "int8": "int8 convolutions with int32 sums, the rest in float32",
    "fp16": "float32 sums, weights and every tensor rounded to float16: emulated, this CPU has no such kernels",
    "bf16": "float32 sums, weights and every tensor rounded to bfloat16: emulated, this CPU has no such kernels",
}


Ask = Callable[[np.ndarray], Mapping[str, np.ndarray]]  # one input in, outputs by name


class ParityError(ChebfaceError):
    """An exported file does not give what torch gives."""

    exit_code = 3


@dataclass(frozen=True)
class Parity:
    """How far an export is from float32 torch. `report()` is its JSON."""

    precision: str  # of the regressor
    basis: str  # of the head in `decode`; everything else is float32
    computed_in: str
    crops: int
    source: str  # of the crops
    mean_mm: float  # crop -> vertices, over crops and vertices
    max_mm: float
    landmark_mean_px: float  # in the wide frame, each with the camera that came with it
    landmark_max_px: float
    parameters: float  # the most that any of the 486 numbers differs
    descriptor_mean_cosine: float | None  # of the neutral head; None without an encoder
    descriptor_min_cosine: float | None
    artefacts: dict[str, dict[str, float]]  # file by file: mean_mm and max_mm, or descriptor_min_cosine
    per_vertex_mm: np.ndarray = field(repr=False, compare=False)  # (N,) mean over crops, for a picture

    def report(self) -> dict[str, Any]:
        """JSON-able: all but the vertices, with limits and whether they are kept."""
        facts = asdict(self)
        del facts["per_vertex_mm"]
        return facts | {"limit_mm": list(LIMITS[self.limits]), "passed": not _failures(self, self.limits)}

    @property
    def limits(self) -> str:
        """Whose limits the whole has to keep."""
        return self.basis if self.precision == "fp32" else self.precision


@dataclass(frozen=True)
class _Truth:
    parameters: np.ndarray  # (B, 486)
    vertices: np.ndarray  # (B, N, 3) m
    landmarks: np.ndarray  # (B, 68, 3) m


def measure(
    paths: Mapping[str, str | Path],
    regressor: Regressor,
    flame: Flame,
    encoder: MeshEncoder | None,
    crops_u8: np.ndarray,
    *,
    source: str = "given",
    device: str = DEVICES[0],
) -> Parity:
    """Run the files of one export in onnxruntime and the modules in torch on the same crops.

    Args:
        paths: model name to ONNX file: regress and decode; topology, reconstruct and encode where there are any.
        regressor, flame: float32, in eval mode.
        encoder: where the head has one, in eval mode; needed where `encode` is in paths.
        crops_u8: (n, 112, 112, 3) uint8, held out.
        source: where the crops come from, for the report.
        device: where the files run; see `check_device`.

    Raises:
        InputError: no crops, or not such crops.
        AssetError: a file is missing or cannot be read, or is not the model of its name.
        ParityError: an answer of another shape or not finite, or triangles of another head.
    """
    import torch

    check_crops(crops_u8, "held-out crops")
    for name in (REGRESS.name, DECODE.name):
        if name not in paths:
            raise AssetError(f"parity: {name} is not among {', '.join(paths)}; export it too")
    if ENCODE.name in paths and encoder is None:
        raise AssetError(f"parity: {ENCODE.name} has no mesh encoder to be compared with; load the head's")
    precision = precision_of(_read(paths[REGRESS.name]))
    run = {name: _open(path, device) for name, path in paths.items()}
    if TOPOLOGY.name in paths:
        triangles = run[TOPOLOGY.name](np.zeros(1, np.int32)).get(TOPOLOGY.outputs[0].name, np.zeros(0))
        if not np.array_equal(triangles, flame.faces.numpy()):
            raise ParityError(f"{paths[TOPOLOGY.name]}: not the head's triangles; export it again")

    truth = _truth(regressor, flame, crops_u8)
    (found,) = _answers(run[REGRESS.name], REGRESS.outputs, crops_u8, [truth.parameters])
    theirs = _decode(flame, found)
    chained = _answers(run[DECODE.name], DECODE.outputs, found, [truth.vertices, truth.landmarks])
    errors = _distance_mm(chained[0], truth.vertices)
    artefacts = {REGRESS.name: _spread(_distance_mm(theirs[0], truth.vertices))}
    drawn = np.concatenate([truth.parameters, draw_parameters(np.random.default_rng(SEED), _DRAWN)])
    wanted = _decode(flame, drawn)
    answers = _answers(run[DECODE.name], DECODE.outputs, drawn, wanted)
    points = [np.concatenate(pair, axis=1) for pair in (answers, wanted)]
    artefacts[DECODE.name] = _spread(_distance_mm(*points))
    if HALF in run[DECODE.name](drawn[:1]):
        (half,) = _answers(run[DECODE.name], DECODE.on_request, drawn, wanted[:1])
        artefacts[HALF] = _spread(_distance_mm(half, wanted[0]))
    if RECONSTRUCT.name in paths:
        everything = [truth.parameters, truth.vertices, truth.landmarks]
        fused = _answers(run[RECONSTRUCT.name], RECONSTRUCT.outputs, crops_u8, everything)
        artefacts[RECONSTRUCT.name] = _spread(_distance_mm(fused[1], truth.vertices))
        errors = max(errors, _distance_mm(fused[1], truth.vertices), key=lambda each: float(each.max()))

    cosines = None
    if encoder is not None:
        shapes = [torch.from_numpy(each[:, params.SLICES["shape"]].copy()) for each in (truth.parameters, found)]
        with torch.no_grad():
            neutral = [flame.neutral(shape) for shape in shapes]
            codes = [encoder.encode(each).numpy() for each in neutral]
        cosines = _cosine(*codes)
        if ENCODE.name in paths:
            (ours,) = _answers(run[ENCODE.name], ENCODE.outputs, neutral[0].numpy(), [codes[0]])
            artefacts[ENCODE.name] = {"descriptor_min_cosine": float(_cosine(ours, codes[0]).min())}
    px = np.linalg.norm(_landmarks_px(chained[1], found) - _landmarks_px(truth.landmarks, truth.parameters), axis=-1)
    return Parity(
        precision=precision,
        basis=basis_of(_read(paths[DECODE.name])),
        computed_in=_COMPUTED_IN[precision] if device == DEVICES[0] else "as the files say, on this GPU",
        crops=len(crops_u8),
        source=source,
        **_spread(errors),
        landmark_mean_px=float(px.mean()),
        landmark_max_px=float(px.max()),
        parameters=float(np.abs(found - truth.parameters).max()),
        descriptor_mean_cosine=None if cosines is None else float(cosines.mean()),
        descriptor_min_cosine=None if cosines is None else float(cosines.min()),
        artefacts=artefacts,
        per_vertex_mm=errors.mean(0),
    )


def check_device(device: str) -> None:
    """Make sure that files and modules can run there.

    Raises:
        ConfigError: neither cpu nor cuda.
        MissingDependencyError: torch sees no GPU, or onnxruntime has no provider for it.
    """
    import onnxruntime
    import torch

    if device not in DEVICES:
        raise ConfigError(f"device: expected {' or '.join(DEVICES)}, got {device!r}")
    if device == DEVICES[0]:
        return
    if not torch.cuda.is_available():
        raise MissingDependencyError("device: cuda, but torch sees no GPU here; leave --device out, or go where one is")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise MissingDependencyError("device: cuda, but this onnxruntime is without it: pip install onnxruntime-gpu")


def check(parity: Parity, precision: str | None = None) -> None:
    """Make sure that an export keeps the limits of its precision; its other files keep those of float32 or the basis.

    Args:
        parity: what was measured.
        precision: whose limits; None takes the file's own.

    Raises:
        ConfigError: unknown precision.
        ParityError: a limit is not kept; every one is named.
    """
    precision = precision or parity.limits
    if precision not in LIMITS:
        raise ConfigError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    if failures := _failures(parity, precision):
        fix = "leave more layers in float32, or export in fp16" if precision == "int8" else "export in fp32"
        raise ParityError(
            f"{precision} differs from torch on {parity.crops} crops: {'; '.join(failures)}; "
            + ("the export is wrong or a file was changed: export it again" if precision == "fp32" else fix)
        )


@dataclass(frozen=True)
class Exam:
    """What a model is asked, and how far any runtime's answers are from those of float32 torch."""

    model: Model
    given: np.ndarray  # (n, ...) of the model's one input
    output: str  # the one of its outputs that is judged
    _wanted: np.ndarray = field(repr=False)  # vertices (n, N, 3) m, or descriptors (n, 8)
    _flame: Flame = field(repr=False)

    def grade(self, answers: np.ndarray) -> dict[str, float]:
        """`mean_mm` and `max_mm` between vertices (of parameters: after torch's own decoder), or
        `descriptor_min_cosine`.

        Raises:
            ParityError: another shape, or not finite.
        """
        if self.model is REGRESS:
            answers = _decode(self._flame, answers.astype(np.float32))[0]
        if answers.shape != self._wanted.shape or not np.isfinite(answers).all():
            raise ParityError(f"{self.model.name}: expected numbers {self._wanted.shape}, got {answers.shape}")
        if self.model is ENCODE:
            return {"descriptor_min_cosine": float(_cosine(answers, self._wanted).min())}
        return _spread(_distance_mm(answers, self._wanted))


def set_exam(
    model: Model, regressor: Regressor, flame: Flame, encoder: MeshEncoder | None, crops_u8: np.ndarray
) -> Exam:
    """Questions for one of regress, decode, encode and reconstruct: the crops, or what torch makes of them.

    Raises:
        ConfigError: a model that no numbers are asked of.
        InputError: no crops, or not such crops.
        AssetError: encode without a mesh encoder.
    """
    import torch

    check_crops(crops_u8, "held-out crops")
    if model is ENCODE and encoder is None:
        raise AssetError(f"{ENCODE.name}: this head has no mesh encoder; give one with --encoder FILE")
    truth = _truth(regressor, flame, crops_u8)
    if model in (REGRESS, RECONSTRUCT):
        output = REGRESS.outputs[0] if model is REGRESS else VERTICES_M
        return Exam(model, crops_u8, output.name, truth.vertices, flame)
    if model is DECODE:
        return Exam(model, truth.parameters, VERTICES_M.name, truth.vertices, flame)
    if model is not ENCODE or encoder is None:
        raise ConfigError(f"model: expected one that answers with numbers, got {model.name}")
    with torch.no_grad():
        neutral = flame.neutral(torch.from_numpy(truth.parameters[:, params.SLICES["shape"]].copy()))
        return Exam(model, neutral.numpy(), ENCODE.outputs[0].name, encoder.encode(neutral).numpy(), flame)


def judge(
    regressor: Regressor, flame: Flame, crops_u8: np.ndarray, *, precision: str = "int8", margin: float = 0.7
) -> Callable[[onnx.ModelProto], float]:
    """The error of a regress graph as a share of what is allowed, for `precision.quantize_within`.

    Args:
        crops_u8: to search with: not those that the report is made of, or it would be of its own choosing.
        margin: share of the limits that may be used up, since the largest error of other crops will be another.

    Raises:
        InputError: no crops, or not such crops.
    """
    check_crops(crops_u8, "judging crops")
    truth = _truth(regressor, flame, crops_u8)

    def share(proto: onnx.ModelProto) -> float:
        (parameters,) = _answers(_ask(_open_graph(proto), REGRESS.name), REGRESS.outputs, crops_u8, [truth.parameters])
        spread = _spread(_distance_mm(_decode(flame, parameters)[0], truth.vertices))
        return max(value / (margin * limit) for value, limit in zip(spread.values(), LIMITS[precision], strict=True))

    return share


def draw(parity: Parity, head: Head, path: str | Path) -> Path:
    """Write a PNG of the head, coloured by how far each vertex is from torch's on average.

    Raises:
        InputError: the head has another count of vertices.
        OSError: the disk refuses.
    """
    from chebface.render import heat

    title = f"{parity.precision}, {parity.crops} crops"
    picture = heat.draw(head.template, head.faces, {title: parity.per_vertex_mm}, "mm")
    file = io.BytesIO()
    picture.save(file, "PNG")
    return write_whole(path, file.getvalue())


def held_out_crops(head: Head, count: int = HELD_OUT, seed: int = SEED) -> np.ndarray:
    """Aligned crops (count, 112, 112, 3) uint8 of made-up photographs of a head. See `make_crops`."""
    return make_crops(head, count, seed)[0]


def make_crops(head: Head, count: int, seed: int) -> tuple[np.ndarray, str]:
    """Crops (count, 112, 112, 3) uint8, and what they are.

    They are photographs that chebface.data.synthetic makes of the head, or, where it cannot, drawings of faces: noise
    would drive activations to where faces never do.

    Raises:
        ConfigError: count is below 1.
    """
    from chebface.data.synthetic import Painter

    if count < 1:
        raise ConfigError(f"count: expected 1 crop at least, got {count}")
    try:
        painter = Painter(head, Synthesize(seed=seed))
        starts = range(0, count, _BATCH)
        samples = [s for start in starts for s in painter.paint(range(start, min(start + _BATCH, count)))]
    except (ChebfaceError, ArithmeticError, LookupError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        return draw_crops(np.random.default_rng(seed), count), f"drawn, seed {seed} (no photographs of it: {reason})"
    return np.stack([sample.aligned_u8 for sample in samples]), f"synthetic photographs of {head.name}, seed {seed}"


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
    y, x = np.mgrid[:CROP_PX, :CROP_PX].astype(np.float64)
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


def _read(path: str | Path, data: bool = True) -> onnx.ModelProto:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(path, load_external_data=data)
    except (OSError, DecodeError, onnx.checker.ValidationError) as error:
        raise AssetError(f"{path}: not a readable ONNX file ({error}); export it again") from error


def open_file(path: str | Path, *, device: str = DEVICES[0], threads: int = 1) -> Any:
    """An onnxruntime session of a file as it is, our operators registered, data beside it read.

    Raises:
        AssetError: onnxruntime cannot read it.
    """
    import onnxruntime

    proto = _read(path, data=False)
    if device == DEVICES[0]:
        beside = any(tensor.external_data for tensor in proto.graph.initializer)
        return open_session(path if beside else proto, threads=threads)
    try:
        return onnxruntime.InferenceSession(str(path), providers=["CUDAExecutionProvider"])
    except Exception as error:  # its classes share no root
        raise AssetError(f"{path}: onnxruntime cannot read it ({error}); export it again") from error


def _open(path: str | Path, device: str) -> Ask:
    halved = device == DEVICES[0] and precision_of(_read(path)) in ("fp16", "bf16")
    return _ask(_open_graph(_read(path)) if halved else open_file(path, device=device), str(path))


def _open_graph(proto: onnx.ModelProto) -> Any:
    halved = precision_of(proto) in ("fp16", "bf16")
    return open_session(emulate(proto), as_written=halved)  # an optimiser might undo the rounding


def _ask(session: Any, name: str) -> Ask:
    inputs, outputs = ([each.name for each in get()] for get in (session.get_inputs, session.get_outputs))
    if len(inputs) != 1:
        raise AssetError(f"{name}: expected one input, got {inputs}; export it again")

    def run(given: np.ndarray) -> dict[str, np.ndarray]:
        try:
            return dict(zip(outputs, session.run(None, {inputs[0]: given}), strict=True))
        except Exception as error:  # its classes share no root
            raise AssetError(f"{name}: onnxruntime cannot run it ({error}); export it again") from error

    return run


def _answers(run: Ask, outputs: Sequence[Tensor], given: np.ndarray, wanted: list[np.ndarray]) -> list[np.ndarray]:
    """All batches, one after the other and of more than one size, checked for what no distance tells."""
    names = [tensor.name for tensor in outputs]
    starts = [0, 1, *range(3, len(given), _BATCH)]  # batches of 1 and 2, then the rest
    batches = [run(part) for part in np.split(given, starts[1:]) if len(part)]
    if missing := set(names) - set(batches[0]):
        raise ParityError(f"no {', '.join(sorted(missing))} among the answers; export it again")
    answers = [np.concatenate([each[name] for each in batches]) for name in names]
    if [each.shape for each in answers] != [each.shape for each in wanted]:
        raise ParityError(f"onnxruntime gives {[a.shape for a in answers]}, torch {[w.shape for w in wanted]}")
    if not all(np.isfinite(each).all() for each in answers):
        raise ParityError("onnxruntime gives numbers that are not finite where torch's are; export in bf16 or fp32")
    return answers


def _truth(regressor: Regressor, flame: Flame, crops_u8: np.ndarray) -> _Truth:
    import torch

    from chebface.regressor import normalize_crop

    with torch.no_grad():
        parts = torch.from_numpy(crops_u8).split(_BATCH)
        parameters = torch.cat([regressor(normalize_crop(part)) for part in parts]).numpy()
    return _Truth(parameters, *_decode(flame, parameters))


def _decode(flame: Flame, parameters: np.ndarray) -> list[np.ndarray]:
    import torch

    with torch.no_grad():
        parts = [flame.decode(part) for part in torch.from_numpy(parameters).split(_BATCH)]
        return [torch.cat(each).numpy() for each in zip(*parts, strict=True)]


def _distance_mm(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """(B, N) of points (B, N, 3) in metres."""
    distance: np.ndarray = 1e3 * np.linalg.norm(ours.astype(np.float64) - theirs, axis=-1)
    return distance


def _spread(error_mm: np.ndarray) -> dict[str, float]:
    return {"mean_mm": float(error_mm.mean()), "max_mm": float(error_mm.max())}


def _cosine(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """(B,) of descriptors (B, 8)."""
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    sizes = np.linalg.norm(ours, axis=-1) * np.linalg.norm(theirs, axis=-1)
    cosine: np.ndarray = (ours * theirs).sum(-1) / np.maximum(sizes, 1e-12)
    return cosine


def _landmarks_px(landmarks: np.ndarray, parameters: np.ndarray) -> np.ndarray:
    """(B, 68, 2) in the wide frame."""
    ndc = camera.project(landmarks, parameters[:, params.SLICES["camera"]])
    pixels: np.ndarray = camera.ndc_to_px(ndc[..., :2], WIDE_PX, WIDE_PX)
    return pixels


def _failures(parity: Parity, precision: str) -> list[str]:
    whole = {"mean_mm": parity.mean_mm, "max_mm": parity.max_mm}
    return [
        failure
        for name, found in {"crop to vertices": whole, **parity.artefacts}.items()
        for failure in find_failures(name, found, {DECODE.name: parity.basis, HALF: "fp16"}.get(name, precision))
    ]


def find_failures(name: str, found: Mapping[str, float], precision: str) -> list[str]:
    """What of mean_mm, max_mm and descriptor_min_cosine is beyond the limits of a precision, in words."""
    failures = []
    for kind, limit in zip(("mean_mm", "max_mm"), LIMITS[precision], strict=True):
        if kind in found and not found[kind] <= limit:
            failures.append(f"{name} {kind[:-3]} {found[kind]:.4g} mm (limit {limit:g})")
    cosine = found.get("descriptor_min_cosine", 1.0)
    if not 1 - cosine <= LIMIT_COSINE:
        failures.append(f"{name} descriptor cosine {cosine:.7f} (limit 1 - {LIMIT_COSINE:g})")
    return failures
