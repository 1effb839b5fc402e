"""The Chebyshev kernels on the CPU: cpu.cpp, compiled at first use. One layer, or the whole encoder in one call.

Tensors are contiguous float32 on the CPU. Nothing but the answers is allocated through torch: what lies between is in
scratch memory of each thread; the backward computes it again, unless `encode_saving` kept it. `threads` is at most so
many (torch.get_num_threads() by default); small work runs on the caller's thread alone. Every function may be called
from several threads at once. The same call with the same number of threads gives the same bits.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from chebface import native
from chebface.errors import InputError, MissingDependencyError
from chebface.kernels.graph import Graph

_SOURCE = Path(__file__).with_name("cpu.cpp")
_MAX_LAYERS = 15  # scratch numbers in cpu.cpp
_MAX_VERTICES = 1 << 28
_SAVE_MESHES = 16  # of larger batches the backward makes the terms anew: that is faster than memory


def available() -> bool:
    """Whether the kernels are there; compiles them the first time."""
    return native.load(_SOURCE) is not None


def why_missing() -> str | None:
    """Why `available()` is False, or None."""
    return native.why_missing(_SOURCE)


def forward(
    x: torch.Tensor,
    graph: Graph,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    keep: torch.Tensor | None,
    relu: bool,
    *,
    threads: int | None = None,
) -> torch.Tensor:
    """One layer, as `reference.cheb_conv` defines it.

    Args:
        x: (B, N, C); graph: of N vertices; weight: (K, C, C_out); bias: (C_out,) or None.
        keep: (M,) int32, rising, or None for all vertices; relu: whether to cut at zero.
        threads: at most so many; torch's setting where None.

    Returns:
        (B, M, C_out).

    Raises:
        InputError: a wrong shape, dtype, device or layout.
        MissingDependencyError: there is no compiler.
        MemoryError: no memory is left.
    """
    library, handle = _library(), _handle(graph, keep)
    batch, terms, channels, out = _check_layer(x, graph, weight, bias)
    y = x.new_empty((batch, handle.kept, out))
    code = library.cheb_forward(
        *(handle.address, batch, terms, channels, out, bool(relu), _threads(threads)),
        *(x.data_ptr(), weight.data_ptr(), _address(bias), y.data_ptr()),
    )
    _check_memory(code)
    return y


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
    *,
    threads: int | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    """The gradients of `forward`.

    Args:
        grad_y: (B, M, C_out); the rest as in `forward`.
        y: what `forward` gave; needed with relu only.
        need_x: whether the gradient to x is wanted.

    Returns:
        Gradients to x (B, N, C) or None, to weight (K, C, C_out), to bias (C_out,) or None.

    Raises:
        As `forward`.
    """
    library, handle = _library(), _handle(graph, keep)
    batch, terms, channels, out = _check_layer(x, graph, weight, bias)
    _check_tensor("grad_y", grad_y, (batch, handle.kept, out))
    if relu:
        if y is None:
            raise InputError("y: with relu=True the backward needs what forward gave, got None")
        _check_tensor("y", y, (batch, handle.kept, out))
    grad_x = torch.empty_like(x) if need_x else None
    grad_weight = torch.empty_like(weight)
    grad_bias = None if bias is None else torch.empty_like(bias)
    code = library.cheb_backward(
        *(handle.address, batch, terms, channels, out, bool(relu), _threads(threads)),
        *(x.data_ptr(), weight.data_ptr(), _address(y if relu else None), grad_y.data_ptr()),
        *(_address(grad_x), grad_weight.data_ptr(), _address(grad_bias)),
    )
    _check_memory(code)
    return grad_x, grad_weight, grad_bias


@dataclass(frozen=True, eq=False)
class Plan:
    """An encoder made ready: layers of cheb_conv + bias + ReLU + keep, then a linear map of all that is left.

    It shares the memory of the tensors it was prepared from, so that an optimizer's step in place is seen.
    """

    graphs: tuple[Graph, ...]
    weights: tuple[torch.Tensor, ...]  # (K, C, C_out) of each layer
    biases: tuple[torch.Tensor, ...]  # (C_out,)
    linear_weight: torch.Tensor  # (codes, features); features: kept vertex by channel, channel fastest
    linear_bias: torch.Tensor  # (codes,)
    _handles: tuple[_Handle, ...] = field(repr=False)
    _call: _EncoderCall = field(init=False, repr=False)
    _sizes: tuple[int, int] = field(init=False, repr=False)  # N and C of what goes in

    def __post_init__(self) -> None:
        object.__setattr__(self, "_sizes", (self.graphs[0].n, self.weights[0].shape[1]))
        channels = [self.weights[0].shape[1], *(weight.shape[2] for weight in self.weights)]
        call = _EncoderCall(
            len(self.weights),
            self.weights[0].shape[0],
            self.linear_weight.shape[0],
            channels=(ctypes.c_int64 * len(channels))(*channels),
            graphs=_addresses([handle.address for handle in self._handles]),
            weights=_addresses([weight.data_ptr() for weight in self.weights]),
            biases=_addresses([bias.data_ptr() for bias in self.biases]),
            linear_weight=self.linear_weight.data_ptr(),
            linear_bias=self.linear_bias.data_ptr(),
        )
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
        parts = _check_parameters(self._handles, weights, biases, linear_weight, linear_bias)
        return Plan(self.graphs, *parts, _handles=self._handles)


def prepare(
    graphs: Sequence[Graph],
    keeps: Sequence[torch.Tensor | np.ndarray | None],
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    linear_weight: torch.Tensor,
    linear_bias: torch.Tensor,
) -> Plan:
    """Make an encoder ready for `encode`.

    Args:
        graphs: of each layer, fine to coarse; each has as many vertices as the layer before keeps.
        keeps: (M,) int32 of each layer, rising; None keeps all.
        weights: (K, C, C_out) of each layer, one K for all; biases: (C_out,) of each.
        linear_weight: (codes, M C_out of the last layer); linear_bias: (codes,).

    Raises:
        InputError: a wrong shape, dtype, device or layout, or layers that do not fit each other.
    """
    if not 1 <= len(graphs) <= _MAX_LAYERS or len(keeps) != len(graphs):
        raise InputError(f"graphs, keeps: expected 1..{_MAX_LAYERS} of each, got {len(graphs)}, {len(keeps)}")
    handles = tuple(_handle(graph, _as_tensor(keep)) for graph, keep in zip(graphs, keeps, strict=True))
    for layer, (graph, before) in enumerate(zip(graphs[1:], handles, strict=False), start=1):
        if graph.n != before.kept:
            raise InputError(f"graphs[{layer}]: expected the {before.kept} vertices kept before it, got {graph.n}")
    return Plan(
        tuple(graphs), *_check_parameters(handles, weights, biases, linear_weight, linear_bias), _handles=handles
    )


def encode(x: torch.Tensor, plan: Plan, *, threads: int | None = None) -> torch.Tensor:
    """The whole encoder in one call.

    Args:
        x: (B, N, C); plan: from `prepare`; threads: at most so many.

    Returns:
        (B, codes).

    Raises:
        As `forward`.
    """
    library, call = _library(), _begin(x, plan, threads)
    z = x.new_empty((call.batch, call.codes))
    _check_memory(library.cheb_encode(ctypes.byref(call), z.data_ptr(), None))
    return z


def encode_saving(
    x: torch.Tensor, plan: Plan, *, threads: int | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`encode`, and what `encode_backward` wants to know: about 0.6 MB a mesh, or None where making it anew is faster.

    Args, Raises: as `encode`. The number of threads has to be the same in both.
    """
    if x.dim() == 3 and x.shape[0] > _SAVE_MESHES:
        return encode(x, plan, threads=threads), None
    library, call = _library(), _begin(x, plan, threads)
    z = x.new_empty((call.batch, call.codes))
    saved = x.new_empty(library.cheb_encode_saved(ctypes.byref(call)))
    _check_memory(library.cheb_encode(ctypes.byref(call), z.data_ptr(), saved.data_ptr()))
    return z, saved


Gradients = tuple[torch.Tensor | None, list[torch.Tensor], list[torch.Tensor], torch.Tensor | None, torch.Tensor | None]


def encode_backward(
    grad_z: torch.Tensor,
    x: torch.Tensor,
    plan: Plan,
    need_x: bool,
    *,
    saved: torch.Tensor | None = None,
    need_weights: bool = True,
    threads: int | None = None,
) -> Gradients:
    """The gradients of `encode`.

    Args:
        grad_z: (B, codes); x (B, N, C), plan, threads: as in `encode`.
        need_x, need_weights: which gradients are wanted. A frozen encoder needs no weights', training no x's.
        saved: from `encode_saving` of the same x, plan and threads; made anew where None.

    Returns:
        Gradients to x (B, N, C) or None, to weights, biases, linear_weight and linear_bias, shaped as they are; or
        empty and None where not wanted.

    Raises:
        As `forward`.
    """
    library, call = _library(), _begin(x, plan, threads)
    _check_tensor("grad_z", grad_z, (call.batch, call.codes))
    if saved is not None:
        _check_tensor("saved", saved, (library.cheb_encode_saved(ctypes.byref(call)),))
    grad_x = torch.empty_like(x) if need_x else None
    given = ctypes.byref(call), grad_z.data_ptr(), _address(saved), _address(grad_x)
    if not need_weights:
        _check_memory(library.cheb_encode_backward(*given, None))
        return grad_x, [], [], None, None
    weights, biases = ([torch.empty_like(p) for p in group] for group in (plan.weights, plan.biases))
    linear_weight, linear_bias = torch.empty_like(plan.linear_weight), torch.empty_like(plan.linear_bias)
    grads = [p for pair in zip(weights, biases, strict=True) for p in pair] + [linear_weight, linear_bias]
    _check_memory(library.cheb_encode_backward(*given, _addresses([grad.data_ptr() for grad in grads])))
    return grad_x, weights, biases, linear_weight, linear_bias


class _EncoderCall(ctypes.Structure):  # EncoderCall in cpu.cpp
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("count", "terms", "codes", "batch", "threads")),
        ("channels", ctypes.POINTER(ctypes.c_int64)),
        *((name, ctypes.POINTER(ctypes.c_void_p)) for name in ("graphs", "weights", "biases")),
        *((name, ctypes.c_void_p) for name in ("linear_weight", "linear_bias", "x")),
    ]


class _Handle:
    """A graph and what is kept of it, in the order that the C++ code walks it."""

    def __init__(self, graph: Graph, keep: np.ndarray | None) -> None:
        if keep is not None and len(keep) and (keep[0] < 0 or keep[-1] >= graph.n or (np.diff(keep) <= 0).any()):
            raise InputError(f"keep: expected rising vertices in 0..{graph.n - 1}, each once")
        if graph.n > _MAX_VERTICES:
            raise InputError(f"graph: expected at most {_MAX_VERTICES} vertices, got {graph.n}")
        library = _library()
        self.kept = graph.n if keep is None else len(keep)
        arrays = [graph.indptr.ctypes.data, graph.indices.ctypes.data]
        # An empty array has no address of its own, and none means all.
        kept = None if keep is None else np.append(keep, np.int32(0)).ctypes
        self.address = library.cheb_graph_new(graph.n, *arrays, self.kept, None if kept is None else kept.data)
        _check_memory(not self.address)
        weakref.finalize(self, library.cheb_graph_free, self.address)


_handles: weakref.WeakKeyDictionary[Graph, dict[bytes | None, _Handle]] = weakref.WeakKeyDictionary()


def _handle(graph: Graph, keep: torch.Tensor | None) -> _Handle:
    if keep is not None and (keep.dim() != 1 or keep.dtype != torch.int32 or keep.device.type != "cpu"):
        raise InputError(f"keep: expected (M,) int32 on the CPU, got {tuple(keep.shape)} {keep.dtype} on {keep.device}")
    known = _handles.setdefault(graph, {})
    array = None if keep is None else keep.numpy()
    key = None if array is None else array.tobytes()
    found = known.get(key)
    if found is None:
        found = known[key] = _Handle(graph, array)
    return found


@cache
def _library() -> ctypes.CDLL:
    library = native.load(_SOURCE)
    if library is None:
        raise MissingDependencyError(f"the CPU kernels: {why_missing()}; chebface.kernels.cheb_conv needs none")
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    shape: list[Any] = [pointer, *[number] * 4, ctypes.c_int32, number]
    library.cheb_forward.argtypes = [*shape, *[pointer] * 4]
    library.cheb_backward.argtypes = [*shape, *[pointer] * 7]
    library.cheb_encode.argtypes = [pointer] * 3
    library.cheb_encode_saved.argtypes = [pointer]
    library.cheb_encode_saved.restype = number
    library.cheb_encode_backward.argtypes = [pointer] * 5
    library.cheb_graph_new.argtypes = [number, pointer, pointer, number, pointer]
    library.cheb_graph_new.restype = pointer
    library.cheb_graph_free.argtypes = [pointer]
    library.cheb_graph_free.restype = None
    return library


def _threads(threads: int | None) -> int:
    if threads is None:
        return torch.get_num_threads()
    if threads < 1:
        raise InputError(f"threads: expected at least 1, got {threads}")
    return threads


def _check_tensor(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise InputError(f"{name}: expected {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise InputError(
            f"{name}: expected contiguous float32 on the CPU, got {tensor.dtype} on {tensor.device} "
            f"with strides {tensor.stride()}; use .float().cpu().contiguous()"
        )


def _check_layer(
    x: torch.Tensor, graph: Graph, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[int, int, int, int]:
    """B, K, C, C_out."""
    if weight.dim() != 3 or 0 in weight.shape:
        raise InputError(f"weight: expected (K, C, C_out), each at least 1, got {tuple(weight.shape)}")
    terms, channels, out = weight.shape
    _check_tensor("weight", weight, (terms, channels, out))
    if x.dim() != 3:
        raise InputError(f"x: expected (B, {graph.n}, {channels}), got {tuple(x.shape)}")
    _check_tensor("x", x, (x.shape[0], graph.n, channels))
    if bias is not None:
        _check_tensor("bias", bias, (out,))
    return x.shape[0], terms, channels, out


def _check_parameters(
    handles: Sequence[_Handle],
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    linear_weight: torch.Tensor,
    linear_bias: torch.Tensor,
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor]:
    if len(weights) != len(handles) or len(biases) != len(handles):
        raise InputError(
            f"weights, biases: expected one of each for {len(handles)} layers, got {len(weights)}, {len(biases)}"
        )
    if weights[0].dim() != 3 or 0 in weights[0].shape:
        raise InputError(f"weights[0]: expected (K, C, C_out), each at least 1, got {tuple(weights[0].shape)}")
    terms, channels = weights[0].shape[:2]
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        out = weight.shape[-1] if weight.dim() else 0
        if out < 1:
            raise InputError(f"weights[{layer}]: expected (K, C, C_out), each at least 1, got {tuple(weight.shape)}")
        _check_tensor(f"weights[{layer}]", weight, (terms, channels, out))
        _check_tensor(f"biases[{layer}]", bias, (out,))
        channels = out
    if linear_weight.dim() != 2:
        raise InputError(f"linear_weight: expected (codes, features), got {tuple(linear_weight.shape)}")
    codes = linear_weight.shape[0]
    _check_tensor("linear_weight", linear_weight, (codes, handles[-1].kept * channels))
    _check_tensor("linear_bias", linear_bias, (codes,))
    layers = tuple(weight.detach() for weight in weights), tuple(bias.detach() for bias in biases)
    return *layers, linear_weight.detach(), linear_bias.detach()


def _begin(x: torch.Tensor, plan: Plan, threads: int | None) -> _EncoderCall:
    shape = x.shape
    if len(shape) != 3:
        raise InputError(f"x: expected (B, {plan._sizes[0]}, {plan._sizes[1]}), got {tuple(shape)}")
    _check_tensor("x", x, (shape[0], *plan._sizes))
    call = _EncoderCall.from_buffer_copy(plan._call)
    call.batch, call.threads, call.x = shape[0], _threads(threads), x.data_ptr()
    return call


def _check_memory(code: int) -> None:
    if code:
        raise MemoryError("the Chebyshev kernels ran out of memory; use a smaller batch")


def _as_tensor(keep: torch.Tensor | np.ndarray | None) -> torch.Tensor | None:
    return torch.from_numpy(np.array(keep)) if isinstance(keep, np.ndarray) else keep


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _addresses(pointers: Sequence[int]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(pointers))(*pointers)
