"""The whole mesh encoder on a CUDA GPU: one launch forward, three backward. encoder.cu has the code, pairs.py tables.

What it is made for: four levels, K = 6, channels 3-16-16-16-32, then a linear map to 8; meshes of FLAME's size (tables
and values of a level must fit in 227 KB of shared memory); float32, or half precision in with float32 inside; compute
capability 9.x (H100, H200) or 10.x. Single layers, and all else, run the definition in torch, on the same device.

There is no version in the Triton language: its T_k would live in cache, not in addressed shared memory, and a mesh
could not be spread over a cluster; where this code cannot run, the definition can.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from chebface.errors import InputError, MissingDependencyError
from chebface.kernels import nvrtc, pairs, reference
from chebface.kernels.graph import Graph

THREADS = 640  # 2513 pairs of FLAME's mesh in 4 rounds, 630 and 1260 rows in 1 and 2
GRADIENT_THREADS = 256
CHUNKS = 64  # parts in which weight gradients are summed
SHAPES = ((6, 3, 16), (6, 16, 16), (6, 16, 16), (6, 16, 32))
CODES = 8
CLUSTER = 4
ALONE = 2.5  # times a mesh takes in one block over its time in a cluster: predicted, see `choose_blocks`
_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_CAPABILITIES = (9, 10)  # with 227 KB of shared memory in a block, and clusters of blocks
_NEEDED = "9.x (H100, H200) or 10.x is needed"
_SOURCE = Path(__file__).with_name("encoder.cu")


def available() -> bool:
    """Whether the encoder's kernels can run here."""
    return why_missing() is None


def why_missing() -> str | None:
    """Why `available()` is False, or None."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    major, minor = torch.cuda.get_device_capability()
    if major not in _CAPABILITIES:
        return f"the GPU is of compute capability {major}.{minor}, {_NEEDED}"
    return nvrtc.why_missing()


def implementation() -> str:
    """What runs on a GPU: the encoder whole, and single layers."""
    why = why_missing()
    return f"encoder: {'native' if why is None else f'reference ({why})'}; single layers: reference (no kernel)"


def forward(
    x: torch.Tensor,
    graph: Graph,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    keep: torch.Tensor | None,
    relu: bool,
) -> torch.Tensor:
    """One layer by its definition, in float32 inside. As `chebface.kernels.cheb_conv`."""
    y = reference.cheb_conv(x.float(), graph, weight.float(), _float(bias), keep=keep, relu=relu)
    return y.to(x.dtype)


def backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    graph: Graph,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    keep: torch.Tensor | None,
    relu: bool,
    y: torch.Tensor | None,
    need_x: bool,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    """The gradients of `forward`, likewise. As `chebface.kernels.reference.backward`."""
    grad_x, grad_weight, grad_bias = reference.backward(
        grad_y.float(), x.float(), graph, weight.float(), _float(bias), keep, relu, y, need_x
    )
    return (
        None if grad_x is None else grad_x.to(x.dtype),
        grad_weight.to(weight.dtype),
        None if grad_bias is None else grad_bias.to(weight.dtype),
    )


def _float(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.float()


class Program(Protocol):
    """The kernels of encoder.cu for meshes of certain sizes and a number of blocks for each mesh."""

    figures: list[int]  # as in encoder.cu: shared bytes of three kernels; floats of saved, grads, partial

    def launch(self, name: str, grid: tuple[int, int], call: Call) -> None:
        """Start a kernel on the current stream."""


class _Level(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("pairs", "kept", "tails", "weight", "bias")]


class Call(ctypes.Structure):
    """Struct Call in encoder.cu."""

    _fields_ = [
        ("level", _Level * 4),
        *((name, ctypes.c_void_p) for name in ("slot", "scale", "linear_weight", "linear_bias", "x", "code", "saved")),
        *((name, ctypes.c_void_p) for name in ("grad_code", "grads", "grad_x", "partial")),
        ("kind", ctypes.c_int),
        ("batch", ctypes.c_int),
    ]


@dataclass(frozen=True, eq=False)
class Plan:
    """An encoder made ready.

    It shares the memory of the tensors it was prepared from, so that an optimizer's step in place is seen.
    """

    graphs: tuple[Graph, ...]
    weights: tuple[torch.Tensor, ...]  # (6, C, C_out) of each layer
    biases: tuple[torch.Tensor, ...]  # (C_out,)
    linear_weight: torch.Tensor  # (8, features); features: kept vertex by channel, channel fastest
    linear_bias: torch.Tensor  # (8,)
    sizes: tuple[tuple[str, int], ...] = field(repr=False)  # macros of encoder.cu
    conflicts: tuple[float, ...] = field(repr=False)  # of each level, as pairs.Table has it
    blocks: int | None = None  # for each mesh, 1 or 4; None: by batch
    chunks: int = CHUNKS
    _tables: tuple[torch.Tensor, ...] = field(repr=False, default=())
    _call: Call = field(init=False, repr=False)

    def __post_init__(self) -> None:
        call = Call()
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            tables = (table.data_ptr() for table in self._tables[3 * index : 3 * index + 3])
            call.level[index] = _Level(*tables, weight.data_ptr(), bias.data_ptr())
        call.slot, call.scale = (table.data_ptr() for table in self._tables[12:])
        call.linear_weight, call.linear_bias = self.linear_weight.data_ptr(), self.linear_bias.data_ptr()
        object.__setattr__(self, "_call", call)

    def with_weights(
        self,
        weights: Sequence[torch.Tensor],
        biases: Sequence[torch.Tensor],
        linear_weight: torch.Tensor,
        linear_bias: torch.Tensor,
    ) -> Plan:
        """The same meshes with other weights (or the same, moved to other memory).

        Raises:
            InputError: as `prepare`.
        """
        features, device = self.linear_weight.shape[1], self.linear_weight.device
        _check_parameters(features, weights, biases, linear_weight, linear_bias, device)
        return replace(
            self, weights=tuple(weights), biases=tuple(biases), linear_weight=linear_weight, linear_bias=linear_bias
        )


def prepare(
    graphs: Sequence[Graph],
    keeps: Sequence[torch.Tensor | np.ndarray],
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    linear_weight: torch.Tensor,
    linear_bias: torch.Tensor,
    *,
    blocks: int | None = None,
) -> Plan:
    """Make an encoder ready for `encode`, on the device of its weights. Takes a second or two.

    Args:
        graphs: of the four layers, fine to coarse; each has as many vertices as the layer before keeps.
        keeps: (M,) int of each layer, rising.
        weights: (6, 3, 16), (6, 16, 16), (6, 16, 16), (6, 16, 32) float32; biases: (C_out,) of each.
        linear_weight: (8, 32 M of the last layer); linear_bias: (8,).
        blocks: thread blocks for each mesh: 1, 4 (a cluster), or None for what suits the batch.

    Raises:
        InputError: a wrong shape, dtype, device or layout, or layers that do not fit each other.
    """
    if len(graphs) != len(SHAPES) or len(keeps) != len(SHAPES):
        raise InputError(f"graphs, keeps: the GPU kernel takes {len(SHAPES)} of each, got {len(graphs)}, {len(keeps)}")
    if blocks not in (None, 1, CLUSTER):
        raise InputError(f"blocks: expected 1, {CLUSTER} or None, got {blocks}")
    downs = tuple(np.asarray(keep.cpu() if isinstance(keep, torch.Tensor) else keep, np.int64) for keep in keeps)
    layout = pairs.lay_out(tuple(graphs), downs)
    device = linear_weight.device
    parts = tuple(weights), tuple(biases), linear_weight, linear_bias
    _check_parameters(32 * len(downs[-1]), *parts, device)
    arrays = [array for table in layout for array in (table.pairs, table.kept, table.tails)]
    root = np.sqrt(graphs[0].degree.astype(np.float64))
    slots = np.concatenate([layout[0].slots, layout[0].free, [2 * len(layout[0].pairs)]])
    arrays += [slots.astype(np.uint16), np.stack([1 / root, root], 1).astype(np.float32)]
    sizes = [("CHEB_N0", graphs[0].n), ("CHEB_N4", len(downs[-1]))]
    sizes += [(f"CHEB_P{index}", len(table.pairs)) for index, table in enumerate(layout)]
    return Plan(
        tuple(graphs),
        *parts,
        sizes=tuple(sizes),
        conflicts=tuple(table.conflicts for table in layout),
        blocks=blocks,
        _tables=tuple(torch.from_numpy(array.view(np.uint8).reshape(-1)).to(device) for array in arrays),
    )


def encode(x: torch.Tensor, plan: Plan) -> torch.Tensor:
    """The whole encoder in one launch; a CUDA graph may record it.

    Args:
        x: (B, N, 3) float32, float16 or bfloat16, on the device of the plan; plan: from `prepare`.

    Returns:
        (B, 8) float32.

    Raises:
        InputError: a wrong shape, dtype or device. MissingDependencyError: the kernels cannot run here.
    """
    return _encode(x, plan, None)


def encode_saving(x: torch.Tensor, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
    """`encode`, and what `encode_backward` wants to know: about 0.36 MB a mesh."""
    program = _program(plan, len(x))
    saved = torch.empty((len(x), program.figures[3]), dtype=torch.float32, device=x.device)
    return _encode(x, plan, saved), saved


def encode_backward(
    grad_z: torch.Tensor,
    x: torch.Tensor,
    plan: Plan,
    need_x: bool,
    *,
    saved: torch.Tensor | None = None,
    need_weights: bool = True,
) -> tuple[torch.Tensor | None, list[torch.Tensor], list[torch.Tensor], torch.Tensor | None, torch.Tensor | None]:
    """The gradients of `encode`.

    Args:
        grad_z: (B, 8) float32; x (B, N, 3), plan: as in `encode`.
        need_x, need_weights: which gradients are wanted. A frozen encoder needs no weights', training no x's.
        saved: from `encode_saving`; made anew where None.

    Returns:
        Gradients to x (B, N, 3) or None, to weights, biases, linear_weight and linear_bias, shaped as they are; empty
        and None where not wanted.

    Raises:
        As `encode`.
    """
    _check_x(x, plan)
    if grad_z.shape != (len(x), CODES) or grad_z.dtype != torch.float32 or grad_z.device != x.device:
        raise InputError(
            f"grad_z: expected ({len(x)}, {CODES}) float32 on {x.device}, got {tuple(grad_z.shape)} {grad_z.dtype} "
            f"on {grad_z.device}"
        )
    saved = encode_saving(x, plan)[1] if saved is None else saved
    program, batch, grad_z = _program(plan, len(x)), len(x), grad_z.contiguous()
    grads = saved.new_empty((batch, program.figures[4]))
    grad_x = torch.empty(x.shape, dtype=torch.float32, device=x.device) if need_x else None
    call = _begin(x, plan)
    call.saved, call.grad_code, call.grads = saved.data_ptr(), grad_z.data_ptr(), grads.data_ptr()
    call.grad_x = None if grad_x is None else grad_x.data_ptr()
    if batch:
        program.launch("backward", (batch * _blocks(plan, batch), 1), call)
    if grad_x is not None:
        grad_x = grad_x.to(x.dtype)
    if not need_weights:
        return grad_x, [], [], None, None
    partial = saved.new_empty((plan.chunks, program.figures[5]))
    call.partial = partial.data_ptr()
    program.launch("weight_gradient", (plan.chunks, len(SHAPES) + 1), call)
    flat = partial.sum(0)
    weights, biases, at = [], [], 0
    for terms, inputs, out in SHAPES:
        weights.append(flat[at : at + terms * inputs * out].view(terms, inputs, out))
        at += terms * inputs * out
        biases.append(flat[at : at + out])
        at += out
    linear = flat[at:].view(-1, CODES)
    return grad_x, weights, biases, linear[:-1].T.contiguous(), linear[-1]


def choose_blocks(batch: int, processors: int) -> int:
    """Blocks for each mesh: a cluster of 4 finishes a mesh sooner, one block wastes less; whichever ends first."""
    alone = ALONE * -(-batch // processors)
    return CLUSTER if -(-batch * CLUSTER // processors) <= alone else 1


def _encode(x: torch.Tensor, plan: Plan, saved: torch.Tensor | None) -> torch.Tensor:
    call = _begin(x, plan)
    code = torch.empty((len(x), CODES), dtype=torch.float32, device=x.device)
    call.code = code.data_ptr()
    call.saved = None if saved is None else saved.data_ptr()
    if len(x):
        x = x.contiguous()
        call.x = x.data_ptr()
        _program(plan, len(x)).launch("encode", (len(x) * _blocks(plan, len(x)), 1), call)
    return code


def _begin(x: torch.Tensor, plan: Plan) -> Call:
    _check_x(x, plan)
    call = Call.from_buffer_copy(plan._call)
    call.kind, call.batch = _KINDS[x.dtype], len(x)
    return call


def _blocks(plan: Plan, batch: int) -> int:
    if plan.blocks is not None:
        return plan.blocks
    return choose_blocks(batch, _count_processors(plan.linear_weight.device))


@cache
def _count_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _program(plan: Plan, batch: int) -> Program:
    return load_program(plan.linear_weight.device, plan.sizes, _blocks(plan, batch))


@lru_cache(maxsize=32)
def load_program(device: torch.device, sizes: tuple[tuple[str, int], ...], blocks: int) -> Program:
    """Compile (or find compiled) and load encoder.cu.

    Raises:
        MissingDependencyError: there is no GPU, driver or compiler, or they refuse.
    """
    why = why_missing()
    if why is not None or device.type != "cuda":
        raise MissingDependencyError(f"the GPU kernels: {why or f'the weights are on {device}, not on a GPU'}")
    major, minor = torch.cuda.get_device_capability(device)
    options = [f"--gpu-architecture=sm_{major}{minor}", "--std=c++17", *make_macros(sizes, blocks)]
    with torch.cuda.device(device):
        torch.cuda.current_stream()  # the context exists from here on
        return _GpuProgram(nvrtc.Module(nvrtc.compile_cubin(_SOURCE, options)), device)


def make_macros(
    sizes: tuple[tuple[str, int], ...], blocks: int, threads: int = THREADS, gradient_threads: int = GRADIENT_THREADS
) -> list[str]:
    """The -D options that encoder.cu is compiled with."""
    ours = (("CHEB_BLOCKS", blocks), ("CHEB_THREADS", threads), ("CHEB_GRADIENT_THREADS", gradient_threads))
    return [f"-D{name}={value}" for name, value in (*sizes, *ours)]


class _GpuProgram:
    def __init__(self, module: nvrtc.Module, device: torch.device) -> None:
        self._module, self._device = module, device
        figures, call = torch.empty(6, dtype=torch.int32, device=device), Call()
        call.partial = figures.data_ptr()
        stream = torch.cuda.current_stream(device).cuda_stream
        module.launch(module.find("tell", 0), (1, 1), 1, 0, stream, call)
        self.figures = figures.tolist()
        self._kernels = {
            name: (module.find(name, shared), threads, shared)
            for name, threads, shared in zip(
                ("encode", "backward", "weight_gradient"),
                (THREADS, THREADS, GRADIENT_THREADS),
                self.figures[:3],
                strict=True,
            )
        }

    def launch(self, name: str, grid: tuple[int, int], call: Call) -> None:
        function, threads, shared = self._kernels[name]
        stream = torch.cuda.current_stream(self._device).cuda_stream
        self._module.launch(function, grid, threads, shared, stream, call)


def _check_x(x: torch.Tensor, plan: Plan) -> None:
    if x.dim() != 3 or x.shape[1:] != (plan.graphs[0].n, 3):
        raise InputError(f"x: expected (B, {plan.graphs[0].n}, 3), got {tuple(x.shape)}")
    if x.dtype not in _KINDS or x.device != plan.linear_weight.device:
        raise InputError(
            f"x: expected float32, float16 or bfloat16 on {plan.linear_weight.device}, got {x.dtype} on {x.device}"
        )


def _check_parameters(
    features: int,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    linear_weight: torch.Tensor,
    linear_bias: torch.Tensor,
    device: torch.device,
) -> None:
    if len(weights) != len(SHAPES) or len(biases) != len(SHAPES):
        raise InputError(f"weights, biases: expected {len(SHAPES)} of each, got {len(weights)}, {len(biases)}")
    wanted: list[tuple[str, torch.Tensor, tuple[int, ...]]]
    wanted = [(f"weights[{i}]", weight, shape) for i, (weight, shape) in enumerate(zip(weights, SHAPES, strict=True))]
    wanted += [(f"biases[{i}]", bias, shape[2:]) for i, (bias, shape) in enumerate(zip(biases, SHAPES, strict=True))]
    wanted += [("linear_weight", linear_weight, (CODES, features)), ("linear_bias", linear_bias, (CODES,))]
    for name, tensor, shape in wanted:
        if tensor.shape != shape:
            raise InputError(f"{name}: the GPU kernel takes {shape}, got {tuple(tensor.shape)}")
        if tensor.dtype != torch.float32 or tensor.device != device or not tensor.is_contiguous():
            raise InputError(f"{name}: expected contiguous float32 on {device}, got {tensor.dtype} on {tensor.device}")
        if tensor.data_ptr() % 16:
            raise InputError(f"{name}: expected memory aligned to 16 bytes; clone() the tensor")
