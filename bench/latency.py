"""What a face costs on a CPU: exported files in onnxruntime and OpenVINO against the modules people run in torch."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import os
import pickle
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bench.kernels import RIVAL_NAME, _race_in_turns
from bench.record import DisagreesError, check, make_record
from bench.train import _GeometricEncoder, _settle
from chebface import checkpoint, operators, params
from chebface.arcface import BACKBONES, EMBEDDING
from chebface.config import Synthesize
from chebface.data.synthetic import Painter
from chebface.errors import ChebfaceError, ConfigError, MissingDependencyError
from chebface.flame import Flame
from chebface.heads import Head, open_head
from chebface.regressor import HIDDEN, Regressor, normalize_crop
from chebface.signature import (
    CROP,
    DECODE,
    ENCODE,
    NEUTRAL,
    PARAMETERS,
    RECONSTRUCT,
    REGRESS,
    VERTICES_HALF,
    VERTICES_M,
    Model,
    Tensor,
)

CASES = (RECONSTRUCT.name, DECODE.name, ENCODE.name)
SMPLX = "smplx"
DEMO = "light"  # the backbone of the demo weights
DDFA = "3DDFA_V2's networks, random weights, onnxruntime"
QUIET = f"{DDFA}, no spinning between them"  # its sessions' threads else look for work on each other's cores
FITTED = "random, norms settled on 16 made-up faces, residual ones at 0.1, last layers fitted to 256 others"
# Mean and most that a vertex may be off, mm.
FLOAT_MM, INT8_MM = (0.001, 0.01), (0.5, 2.0)  # what the export promises
FIXED_MM = (0.01, 0.05)
SMPLX_MM = (0.001, 0.01)
DESCRIPTOR = 1e-5  # relative to the largest number
DDFA_ERROR = 1e-4  # likewise
_FACES, _FITTED = 16, 256  # that the random network's batch norms see, and that its last layers are fitted to
_GAIN, _SLOPE = 0.1, 0.5  # of a residual block's last norm; the steepest of PReLUs: no two of them are alike
_RIDGE = 16.0  # a face
_DDFA_PX, _DDFA_POINTS, _DDFA_PARTS = 120, 38_365, (40, 10)  # crop; vertices; directions of shape and expression
_CHECKED = 32  # faces, at least: the limits are of the mean over faces
_SEED = 112_486  # of crops that neither calibration nor the parity report has
_ROOT = Path(__file__).resolve().parent.parent

Run = Callable[[np.ndarray], np.ndarray]
Implementation = tuple[str, Run, Callable[[str, np.ndarray], dict[str, Any]]]  # name, what runs, what checks its answer


def measure(
    seconds: float,
    cases: Sequence[str] = CASES,
    backbones: Sequence[str] = ("light", "iresnet50"),
    batches: Sequence[int] = (1, 8),
    threads: int = 2,
    work: str | Path | None = None,
) -> list[dict[str, Any]]:
    """A row for each case, batch and implementation, of the files that `python -m export onnx` writes.

    reconstruct: crop -> vertices and landmarks, against the regressor and then smplx's FLAME, both in torch eager, as
    in MICA's own loop. `light` has the demo weights, and runs against 3DDFA_V2's regressor and dense decode too, as it
    opens them and QUIET. Other backbones' weights are FITTED: their answers turn by `spread_mm` from face to face, less
    than trained ones', and what int8 loses of them is to be read beside that.
    decode: parameters -> vertices and landmarks, against smplx's FLAME.
    encode: vertices -> descriptor, against the same encoder of torch-geometric's ChebConv.
    Implementations: onnxruntime-fp32; onnxruntime-int8 (reconstruct); custom-op (decode and encode) and custom-op-fixed
    (decode, its basis in fixed point); "A + custom-op-fixed" (reconstruct, the regressor in A and then that decode);
    openvino-fp32 and openvino-int8 where openvino is installed. `check` has the mean and largest vertex error in mm
    against our modules in torch, or the descriptor's against torch-geometric.

    Args:
        seconds: of each row.
        cases: of CASES.
        backbones: of reconstruct, some of arcface.BACKBONES.
        batches: faces in a call.
        threads: of torch, of each session, and of the custom operators.
        work: folder that keeps what is exported, for the next time; None takes a temporary one.

    Raises:
        ConfigError: an unknown case or backbone, or a batch or count of threads below 1.
        MissingDependencyError: no smplx, torch-geometric or onnxruntime, or the export lacks something.
        DisagreesError: a file or a rival differs from our modules in torch.
        ChebfaceError: the export failed.
    """
    _check_wishes(cases, backbones, batches, threads)
    for package in ("onnxruntime", SMPLX):
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(f"{package} is not installed: pip install 'chebface[test]'")
    with tempfile.TemporaryDirectory() as name, _use_threads(threads):
        course = _Course(Path(work or name), Path(name), open_head(), batches, threads, seconds)
        rows: list[dict[str, Any]] = []
        for case in cases:
            runs = [functools.partial(_reconstruct, backbone=name) for name in backbones]
            for run in runs if case == CASES[0] else [_RUNS[case]]:
                rows += run(course)
        return rows


def _check_wishes(cases: Sequence[str], backbones: Sequence[str], batches: Sequence[int], threads: int) -> None:
    if unknown := sorted(set(cases) - set(CASES)):
        raise ConfigError(f"case: expected some of {', '.join(CASES)}, got {', '.join(unknown)}")
    if unknown := sorted(set(backbones) - set(BACKBONES)):
        raise ConfigError(f"backbone: expected some of {', '.join(BACKBONES)}, got {', '.join(unknown)}")
    for name, value in (("batch", min(batches, default=0)), ("threads", threads)):
        if value < 1:
            raise ConfigError(f"{name}: expected 1 at least, got {value}")


@contextmanager
def _use_threads(count: int) -> Iterator[None]:
    """So many threads for torch and for our operators, for a while."""
    variable = "CHEBFACE_THREADS"
    before, torch_before = os.environ.get(variable), torch.get_num_threads()
    os.environ[variable] = str(count)
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(torch_before)
        os.environ.pop(variable)
        if before is not None:
            os.environ[variable] = before


@dataclass(frozen=True)
class _Course:
    """Where files lie, and what all rows have in common."""

    work: Path  # of exports
    folder: Path  # of all else
    head: Head
    batches: Sequence[int]
    threads: int
    seconds: float

    def export(self, *options: str) -> Path:
        """The folder that the export makes with these options; it leaves alone what is up to date.

        Raises:
            DisagreesError: its parity gate said no.
            MissingDependencyError: it lacks something.
            ChebfaceError: it failed otherwise.
        """
        words = [Path(option).stem.strip("-") for option in options]
        folder = self.work / "-".join(["export", *words])
        command = [sys.executable, "-m", "export", "onnx", *options, "-o", str(folder), "--json"]
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stdout.splitlines() or [""])[-1]
            reason = json.loads(last)["message"] if last.startswith("{") else done.stderr.strip()[-2000:]
            kinds = {each.exit_code: each for each in (DisagreesError, MissingDependencyError)}
            raise kinds.get(done.returncode, ChebfaceError)(f"export {' '.join(options)}: {reason}")
        return folder

    def race(
        self,
        model: Model,
        batch: int,
        given: np.ndarray,
        rival: Implementation,
        ours: Sequence[Implementation],
        **facts: Any,
    ) -> Iterator[dict[str, Any]]:
        """A row for each of ours; all given is checked, batch by batch, before the first batch is timed."""
        case, parts = model.name, [given[first : first + batch] for first in range(0, len(given), batch)]
        name, theirs, _ = rival
        checks = [
            judge(f"{case}, batch {batch}: {each}", np.concatenate([run(part).copy() for part in parts]))
            for each, run, judge in (rival, *ours)
        ][1:]
        given = parts[0]
        for (own, run, _), checked in zip(ours, checks, strict=True):
            times = _race_in_turns(
                functools.partial(run, given), functools.partial(theirs, given), seconds=self.seconds
            )
            row = {"pass": "forward", "batch": batch, "threads": self.threads, "check": checked} | facts
            yield make_record(bench="latency", case=case, implementation=own, rival=name, times=times, **row)


def _reconstruct(course: _Course, backbone: str) -> Iterator[dict[str, Any]]:
    trained = backbone == DEMO
    path = checkpoint.DEMO if trained else course.work / f"{backbone}.safetensors"
    regressor = checkpoint.load_regressor()[0] if trained else _make_regressor(backbone, course.head, path)
    flame = Flame(course.head)
    limits = {"fp32": FLOAT_MM, "int8": INT8_MM}
    folders = {each: course.export("--checkpoint", str(path), "--precision", each) for each in limits}
    fixed = _export_geometry(course, DECODE)[-1]
    facts = {"backbone": backbone, "weights": "demo" if trained else FITTED}
    for batch in course.batches:
        crops = _paint(course.head, range(_FACES, _FACES + _CHECKED * batch // math.gcd(_CHECKED, batch)))
        smplx = _open_smplx(course, batch)

        def loop(crops: np.ndarray, smplx: Callable[[torch.Tensor], np.ndarray] = smplx) -> np.ndarray:
            with torch.no_grad():
                return smplx(regressor(normalize_crop(torch.from_numpy(crops))))

        with torch.no_grad():
            wanted = flame.decode(regressor(normalize_crop(torch.from_numpy(crops))))[0].numpy()
        spread = 1e3 * np.linalg.norm(wanted - wanted.mean(0), axis=-1).mean()
        ours: list[Implementation] = []
        decode = _open_onnxruntime(fixed, PARAMETERS, VERTICES_M, course.threads, native=True)
        for precision, folder in folders.items():
            judge = functools.partial(_check_mm, wanted=wanted, limits=limits[precision])
            whole = _open_runtimes(folder / f"{RECONSTRUCT.name}.onnx", CROP, VERTICES_M, course.threads, batch)
            ours += [(f"{name}-{precision}", run, judge) for name, run in whole]
            judge = functools.partial(_check_mm, wanted=wanted, limits=max(FIXED_MM, limits[precision]))
            parts = _open_runtimes(folder / f"{REGRESS.name}.onnx", CROP, PARAMETERS, course.threads, batch)
            for name, regress in parts:
                run = functools.partial(_chain, regress, decode)
                ours.append((f"{name}-{precision} + custom-op-fixed", run, judge))
        rivals: list[Implementation] = [
            (f"torch + {SMPLX}", loop, functools.partial(_check_mm, wanted=wanted, limits=SMPLX_MM)),
            *(_open_3ddfa(course) if trained else []),
        ]
        for rival in rivals:
            yield from course.race(RECONSTRUCT, batch, crops, rival, ours, **facts, spread_mm=round(float(spread), 3))


def _chain(first: Run, second: Run, given: np.ndarray) -> np.ndarray:
    return second(first(given))


def _decode(course: _Course) -> Iterator[dict[str, Any]]:
    flame = Flame(course.head)
    standard, *custom = _export_geometry(course, DECODE)
    for batch in course.batches:
        parameters = _draw(batch)
        wanted = flame.decode(torch.from_numpy(parameters))[0].numpy()
        smplx = _open_smplx(course, batch)
        exact = functools.partial(_check_mm, wanted=wanted, limits=FLOAT_MM)
        fixed = functools.partial(_check_mm, wanted=wanted, limits=FIXED_MM)
        ours = [
            (f"{name}-fp32", run, exact)
            for name, run in _open_runtimes(standard, PARAMETERS, VERTICES_M, course.threads, batch)
        ]
        for name, path, judge in zip(("custom-op", "custom-op-fixed"), custom, (exact, fixed), strict=True):
            ours.append((name, _open_onnxruntime(path, PARAMETERS, VERTICES_M, course.threads, native=True), judge))
        rival = (
            SMPLX,
            lambda given, smplx=smplx: smplx(torch.from_numpy(given)),
            functools.partial(exact, limits=SMPLX_MM),
        )
        yield from course.race(DECODE, batch, parameters, rival, ours)


def _encode(course: _Course) -> Iterator[dict[str, Any]]:
    encoder = checkpoint.load_encoder()[0].encoder
    geometric = _GeometricEncoder(encoder)
    flame = Flame(course.head)
    standard, custom, _ = _export_geometry(course, ENCODE)
    output = ENCODE.outputs[0]

    @torch.no_grad()
    def convolve(given: np.ndarray) -> np.ndarray:
        code: np.ndarray = geometric(torch.from_numpy(given)).numpy()
        return code

    for batch in course.batches:
        neutral = flame.neutral(torch.from_numpy(_draw(batch)[:, params.SLICES["shape"]]))
        judge = functools.partial(_check_code, wanted=convolve(neutral.numpy()))  # ours has the operator's own kernel
        with torch.no_grad():
            judge(f"{ENCODE.name}, batch {batch}: torch", encoder(neutral).numpy())
        ours = [
            (f"{name}-fp32", run, judge)
            for name, run in _open_runtimes(standard, NEUTRAL, output, course.threads, batch)
        ]
        ours.append(("custom-op", _open_onnxruntime(custom, NEUTRAL, output, course.threads, native=True), judge))
        yield from course.race(ENCODE, batch, neutral.numpy(), (RIVAL_NAME, convolve, judge), ours)


_RUNS = {CASES[1]: _decode, CASES[2]: _encode}


def _check_mm(name: str, found: np.ndarray, wanted: np.ndarray, limits: tuple[float, float]) -> dict[str, Any]:
    distance = 1e3 * np.linalg.norm(found.astype(np.float64) - wanted, axis=-1)
    mean = check(f"{name}: mean, mm", float(distance.mean()), limits[0])
    most = check(f"{name}: largest, mm", float(distance.max()), limits[1])
    return mean | {"unit": "mm", "largest_error": most["error"], "largest_limit": most["limit"]}


def _check_code(name: str, found: np.ndarray, wanted: np.ndarray) -> dict[str, Any]:
    error = float(np.abs(found.astype(np.float64) - wanted).max() / np.abs(wanted).max())
    return check(f"{name}: descriptor", error, DESCRIPTOR) | {"unit": "relative"}


def _make_regressor(backbone: str, head: Head, path: Path) -> Regressor:
    """A network with FITTED weights, also as a checkpoint; what lies there from an earlier time is taken.

    As drawn, such a network turns int8's rounding into another face. The fit lets through what faces differ by: its
    ridge is of the size of that noise.
    """
    if path.is_file():
        kept, card = checkpoint.load_regressor(path)
        if card["training"] == {"head": "open", "weights": FITTED}:
            return kept
    torch.manual_seed(0)
    regressor = Regressor(backbone, skip=True)
    for name, module in regressor.named_modules():
        if name.endswith("bn3"):
            nn.init.constant_(module.weight, _GAIN)
        if isinstance(module, nn.PReLU):
            nn.init.uniform_(module.weight, 0, _SLOPE)
    samples = Painter(head, Synthesize(seed=_SEED + 1)).paint(range(_FACES + _FITTED))
    crops = normalize_crop(torch.from_numpy(np.stack([sample.aligned_u8 for sample in samples])))
    _settle(regressor, crops[:_FACES])
    regressor.eval()
    with torch.no_grad():
        parts = crops[_FACES:].split(_FACES)
        embedding = torch.cat([regressor.backbone(part) for part in parts])
        given = torch.cat([regressor.mapping(embedding), embedding], 1).double()
        truth = torch.stack([torch.as_tensor(sample.parameters) for sample in samples[_FACES:]])
        wanted = ((truth - regressor.get_buffer("offset")) / regressor.get_buffer("unit")).double()
        x, y = given - given.mean(0), wanted - wanted.mean(0)
        weight = torch.linalg.solve(x.T @ x + _RIDGE * len(x) * torch.eye(x.shape[1]), x.T @ y).T
        regressor.output.bias.copy_(wanted.mean(0) - weight @ given.mean(0))
        for name, part in zip(("output", "skip"), weight.split([HIDDEN, EMBEDDING], 1), strict=True):
            regressor.get_parameter(f"{name}.weight").copy_(part)
    card = {"backbone": backbone, "normalize": False, "skip": True, "head": head.facts}
    checkpoint.save(path, regressor.state_dict(), card | {"training": {"head": "open", "weights": FITTED}})
    return regressor


def _paint(head: Head, which: range) -> np.ndarray:
    """Aligned crops (n, 112, 112, 3) uint8."""
    return np.stack([sample.aligned_u8 for sample in Painter(head, Synthesize(seed=_SEED)).paint(which)])


def _draw(batch: int) -> np.ndarray:
    """Parameters (B, 486) float32; none is zero, as a network's never are: zeros need not be computed."""
    drawn = np.random.default_rng(_SEED).normal(0, 1, (batch, params.TOTAL))
    drawn[:, params.SLICES["expression"]] *= 0.5
    drawn[:, params.SLICES["pose"]] *= 0.3
    return drawn.astype(np.float32)


def _export_geometry(course: _Course, model: Model) -> list[Path]:
    """A file of standard operators, and of ours, basis in float and in fixed point. Any regressor does: the demo's."""
    native = ("--operators", "native", "--basis")
    return [course.export(*each) / f"{model.name}.onnx" for each in ((), (*native, "fp32"), (*native, "fixed"))]


def _open_runtimes(path: Path, given: Tensor, wanted: Tensor, threads: int, batch: int) -> list[tuple[str, Run]]:
    """onnxruntime, and OpenVINO where it is installed."""
    runs = [("onnxruntime", _open_onnxruntime(path, given, wanted, threads))]
    if importlib.util.find_spec("openvino") is not None:
        runs.append(("openvino", _open_openvino(path, given, wanted, threads, batch)))
    return runs


def _open_onnxruntime(path: Path, given: Tensor, wanted: Tensor, threads: int, native: bool = False) -> Run:
    session = _open_session(path, threads, native)
    names = [each.name for each in session.get_outputs() if each.name != VERTICES_HALF.name]

    def run(array: np.ndarray) -> np.ndarray:
        answers: list[np.ndarray] = session.run(names, {given.name: array})
        return answers[names.index(wanted.name)]

    return run


def _open_session(path: Path, threads: int, native: bool = False, quiet: bool = False) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if native:
        options.register_custom_ops_library(str(operators.library()))
    if quiet:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _open_openvino(path: Path, given: Tensor, wanted: Tensor, threads: int, batch: int) -> Run:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    core = openvino.Core()
    model = core.read_model(str(path))
    model.reshape({given.name: [batch, *given.shape]})
    request = core.compile_model(model, "CPU", settings).create_infer_request()

    def run(array: np.ndarray) -> np.ndarray:
        answer: np.ndarray = request.infer({given.name: array}, share_inputs=True, share_outputs=True)[wanted.name]
        return answer

    return run


def _open_smplx(course: _Course, batch: int) -> Callable[[torch.Tensor], np.ndarray]:
    """smplx's FLAME of the same head: parameters (B, 486) -> vertices (B, N, 3); it makes landmarks too."""
    import smplx

    folder = course.folder / "flame"
    if not folder.exists():
        _write_flame(course.head, folder)
    layer = smplx.FLAME(
        str(folder),
        num_betas=params.PARTS["shape"],
        num_expression_coeffs=params.PARTS["expression"],
        use_face_contour=True,
        create_transl=False,
        batch_size=batch,
    )

    @torch.no_grad()
    def run(parameters: torch.Tensor) -> np.ndarray:
        parts = params.split(parameters)
        head, jaw = parts["pose"][:, params.HEAD_POSE], parts["pose"][:, params.JAW_POSE]
        made = layer(betas=parts["shape"], expression=parts["expression"], global_orient=head, jaw_pose=jaw)
        vertices: np.ndarray = made.vertices.numpy()
        return vertices

    return run


class _MobileNet(nn.Sequential):
    """MobileNet V1 as 3DDFA_V2 has it: (1, 3, 120, 120) -> (1, 62).

    Source: Howard et al., MobileNets, 2017; Guo et al., Towards Fast, Accurate and Stable 3D Dense Face Alignment, ECCV
    2020.
    """

    def __init__(self) -> None:
        widths = (32, 64, *(128,) * 2, *(256,) * 2, *(512,) * 6, *(1024,) * 2)
        halved = (2, 4, 6, 12)  # the blocks, from 1, with stride 2

        def layer(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
            conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
            return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]

        layers = layer(3, widths[0], 3, 2)
        for i, (inputs, outputs) in enumerate(pairwise(widths), 1):
            layers += layer(inputs, inputs, 3, 1 + (i in halved), inputs) + layer(inputs, outputs, 1)
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 12 + sum(_DDFA_PARTS)))


class _DenseDecode(nn.Module):
    """3DDFA_V2's dense decode as its ONNX file has it: one product with the basis, then a pose -> (3, 38365)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.randn(3, _DDFA_POINTS))
        self.register_buffer("basis", torch.randn(3, _DDFA_POINTS, sum(_DDFA_PARTS)))

    def forward(self, rotation: torch.Tensor, offset: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
        """(3, 3), (3, 1), (40, 1), (10, 1) -> (3, 38365)."""
        mean, basis = self.get_buffer("mean"), self.get_buffer("basis")
        return rotation @ (mean + basis.matmul(torch.cat(parts)).squeeze()) + offset


def _open_3ddfa(course: _Course) -> list[Implementation]:
    """The regressor and dense decode of 3DDFA_V2, face by face as in its loop, of a crop that is float already: as it
    runs them, and QUIET. Its published weights are its own; how long they take does not hang on them.
    """
    torch.manual_seed(0)
    networks = _MobileNet(), _DenseDecode()
    _settle(networks[0], torch.randn(8, 3, _DDFA_PX, _DDFA_PX))
    picture = torch.randn(1, 3, _DDFA_PX, _DDFA_PX)
    pose = torch.randn(3, 3), torch.randn(3, 1)
    examples = (picture,), (*pose, *(torch.randn(size, 1) for size in _DDFA_PARTS))
    paths = []
    for network, example in zip(networks, examples, strict=True):
        paths.append(course.folder / f"{type(network).__name__}.onnx")
        network.eval()
        with warnings.catch_warnings():  # of torch about itself
            warnings.simplefilter("ignore")
            torch.onnx.export(network, example, paths[-1], dynamo=False)
    opened = {
        name: [_open_session(path, course.threads, quiet=name == QUIET) for path in paths] for name in (DDFA, QUIET)
    }
    names = [[each.name for each in session.get_inputs()] for session in opened[DDFA]]

    def split(parameters: np.ndarray) -> list[np.ndarray]:
        pose = parameters[:12].reshape(3, 4)
        return [pose[:, :3], pose[:, 3:], *np.split(parameters[12:, None], _DDFA_PARTS[:1])]

    def run(sessions: Sequence[Any], given: np.ndarray) -> np.ndarray:
        found = []
        for _ in given:
            parameters = sessions[0].run(None, {names[0][0]: picture.numpy()})[0][0]
            found.append(sessions[1].run(None, dict(zip(names[1], split(parameters), strict=True)))[0])
        return np.stack(found)

    with torch.no_grad():
        parts = split(networks[0](picture)[0].numpy())
        wanted = networks[1](*map(torch.from_numpy, parts)).numpy()

    def judge(name: str, found: np.ndarray) -> dict[str, Any]:
        return check(name, float(np.abs(found - wanted).max() / np.abs(wanted).max()), DDFA_ERROR)

    return [(name, functools.partial(run, sessions), judge) for name, sessions in opened.items()]


def _write_flame(head: Head, folder: Path) -> None:
    """A head as FLAME's own files, under the names that smplx looks for."""
    dirs = np.concatenate([head.shape_dirs, head.expression_dirs])
    contour = head.contour_triangles.shape[1]
    files = {
        "FLAME_NEUTRAL": {
            "v_template": head.template.astype(np.float64),
            "f": head.faces.astype(np.uint32),
            "shapedirs": np.moveaxis(dirs, 0, 2).astype(np.float64),
            "posedirs": np.moveaxis(head.pose_dirs, 0, 2).astype(np.float64),
            "J_regressor": head.joint_regressor.astype(np.float64),
            "weights": head.skin_weights.astype(np.float64),
            "kintree_table": np.array([[2**32 - 1, 0, 1, 1, 1], range(5)], np.int64),
        },
        "flame_static_embedding": {
            "lmk_face_idx": head.landmark_triangles[contour:].astype(np.uint32),
            "lmk_b_coords": head.landmark_barycentric[contour:].astype(np.float64),
        },
    }
    moving = {
        "lmk_face_idx": head.contour_triangles.astype(np.uint32),
        "lmk_b_coords": head.contour_barycentric.astype(np.float64),
    }
    folder.mkdir()
    for name, content in files.items():
        (folder / f"{name}.pkl").write_bytes(pickle.dumps(content, protocol=2))
    np.save(folder / "flame_dynamic_embedding.npy", np.array(moving, dtype=object), allow_pickle=True)
