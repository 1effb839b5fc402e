"""Chebyshev convolution on a mesh: one signature over a C++ kernel, a GPU kernel and their definition in torch.

    y = cheb_conv(x, graph, weight, bias, keep=keep, relu=True)

is one fused layer of the mesh encoder, differentiable to x, weight and bias. It is the torch operator
`chebface::cheb_conv`, so torch.compile and torch.export pass through it whole. Second derivatives are refused; the
definition, `chebface.kernels.reference`, has them.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from chebface.errors import InputError
from chebface.kernels import reference
from chebface.kernels.graph import Graph, find

__all__ = ["Graph", "cheb_conv", "implementation"]

_OPERATOR = "chebface::cheb_conv"
_BACKWARD = "chebface::cheb_conv_backward"
_HALVES = (torch.float16, torch.bfloat16)
_MODULES = {"cpu": "chebface.kernels.cpu", "cuda": "chebface.kernels.gpu"}  # each: available, why_missing, forward, ...
_checked_keeps = WeakTensorKeyDictionary()  # keep -> (its version, n): reading it back from a GPU would wait for it


def cheb_conv(
    x: torch.Tensor,
    graph: Graph,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    keep: torch.Tensor | None = None,
    relu: bool = False,
) -> torch.Tensor:
    """Convolve features on a mesh: sum over k of T_k(L_hat) x W_k, plus the bias; then ReLU where asked for.

    Args:
        x: (B, N, C) float32 or float64; float16 and bfloat16 where the GPU kernel runs.
        graph: of N vertices.
        weight: (K, C, C_out), for T_0 to T_{K-1}; K >= 1. One dtype and device for all.
        bias: (C_out,).
        keep: (M,) int32, rising: the vertices to compute; all where None.
        relu: whether to cut at zero.

    Returns:
        (B, M, C_out), or (B, N, C_out) without keep; contiguous.

    Raises:
        InputError: a wrong shape, dtype or device, K = 0, a vertex out of range; or, later, a second derivative.
    """
    if not isinstance(graph, Graph):
        raise InputError(f"graph: expected a Graph (see Graph.from_faces), got {type(graph).__name__}")
    indptr, indices = graph.tensors(x.device)
    return torch.ops.chebface.cheb_conv(x, indptr, indices, weight, bias, keep, relu)


def implementation(device: torch.device | str = "cpu") -> str:
    """Which code runs for float32 on a device: "native", or "reference (why)"; on a GPU, for encoder and layers."""
    if torch.device(device).type == "cuda":
        return str(importlib.import_module(_MODULES["cuda"]).implementation())
    kernel, why = _find_kernel(torch.device(device).type)
    return "native" if kernel is not None else f"reference ({why})"


def _find_kernel(device: str) -> tuple[ModuleType | None, str | None]:
    module = _import_kernel(device)
    if module is None:
        return None, f"no kernel for {device!r}"
    return (module, None) if module.available() else (None, module.why_missing())


@cache
def _import_kernel(device: str) -> ModuleType | None:
    name = _MODULES.get(device)  # imported late: they use Graph of this package
    return None if name is None else importlib.import_module(name)


def _choose(x: torch.Tensor) -> ModuleType | None:
    """The kernel that takes x, or None for the definition."""
    if x.dtype == torch.float64 or not x.numel():
        return None
    kernel, why = _find_kernel(x.device.type)
    if x.dtype in _HALVES and (kernel is None or x.device.type == "cpu"):
        raise InputError(
            f"x: {x.dtype} is for the GPU kernel only, and this runs on {x.device}{f' ({why})' if why else ''}; "
            "use x.float() and float32 weights"
        )
    return kernel


def _check(
    x: torch.Tensor,
    indptr: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    keep: torch.Tensor | None,
) -> None:
    n = indptr.shape[0] - 1
    if x.dim() != 3 or x.shape[1] != n:
        raise InputError(f"x: expected (B, {n}, C), a row for each vertex of the graph, got {tuple(x.shape)}")
    if x.dtype not in (torch.float32, torch.float64, *_HALVES):
        raise InputError(f"x: expected float32 or float64, got {x.dtype}")
    if weight.dim() != 3 or weight.shape[1] != x.shape[2]:
        raise InputError(f"weight: expected (K, {x.shape[2]}, C_out), got {tuple(weight.shape)}")
    if 0 in weight.shape:
        raise InputError(f"weight: expected K, C and C_out of at least 1, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[2:]:
        raise InputError(f"bias: expected ({weight.shape[2]},), got {tuple(bias.shape)}")
    if keep is not None and (keep.dim() != 1 or keep.dtype != torch.int32):
        raise InputError(f"keep: expected (M,) int32, got {tuple(keep.shape)} {keep.dtype}")
    for name, tensor in (("weight", weight), ("bias", bias), ("keep", keep)):
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise InputError(f"{name}: expected on {x.device} as x is, got {tensor.device}")
        if name != "keep" and tensor.dtype != x.dtype:
            raise InputError(f"{name}: expected {x.dtype} as x has, got {tensor.dtype}")


def _check_values(keep: torch.Tensor | None, n: int) -> None:
    """Check what keep holds; once per tensor, since that of a GPU must be waited for."""
    if keep is None or not keep.numel():
        return
    version = (-1 if keep.is_inference() else keep._version, n)
    if _checked_keeps.get(keep) == version:
        return
    if int(keep[0]) < 0 or int(keep[-1]) >= n or bool((keep.diff() <= 0).any()):
        raise InputError(f"keep: expected rising vertices in 0..{n - 1}, each once")
    _checked_keeps[keep] = version


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _forward(
    x: torch.Tensor,
    indptr: torch.Tensor,
    indices: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    keep: torch.Tensor | None,
    relu: bool,
) -> torch.Tensor:
    _check(x, indptr, weight, bias, keep)
    graph = find(indptr, indices)
    _check_values(keep, graph.n)
    kernel = _choose(x)
    if kernel is None:
        return reference.cheb_conv(x, graph, weight, bias, keep=keep, relu=relu)
    y: torch.Tensor = kernel.forward(
        x.contiguous(), graph, weight.contiguous(), _contiguous(bias), _contiguous(keep), relu
    )
    return y


def _backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    indptr: torch.Tensor,
    indices: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    keep: torch.Tensor | None,
    relu: bool,
    y: torch.Tensor | None,
    need_x: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    graph = find(indptr, indices)
    kernel = _choose(x)
    if kernel is None:
        grads = reference.backward(grad_y, x, graph, weight, bias, keep, relu, y, need_x)
    else:
        grads = kernel.backward(
            grad_y.contiguous(),
            x.contiguous(),
            graph,
            weight.contiguous(),
            _contiguous(bias),
            _contiguous(keep),
            relu,
            _contiguous(y),
            need_x,
        )
    grad_x, grad_weight, grad_bias = grads
    nothing = x.new_empty(0)  # an operator cannot return None
    return (
        nothing if grad_x is None else grad_x,
        grad_weight,
        nothing.clone() if grad_bias is None else grad_bias,
    )


def _fake_forward(
    x: torch.Tensor,
    indptr: torch.Tensor,
    indices: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    keep: torch.Tensor | None,
    relu: bool,
) -> torch.Tensor:
    _check(x, indptr, weight, bias, keep)
    return x.new_empty((x.shape[0], x.shape[1] if keep is None else keep.shape[0], weight.shape[2]))


def _fake_backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    indptr: torch.Tensor,
    indices: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    keep: torch.Tensor | None,
    relu: bool,
    y: torch.Tensor | None,
    need_x: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_x = x.new_empty(x.shape if need_x else 0)
    return grad_x, weight.new_empty(weight.shape), weight.new_empty(0 if bias is None else bias.shape)


def _remember(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    x, indptr, indices, weight, bias, keep, relu = inputs
    ctx.relu = relu
    ctx.save_for_backward(x, indptr, indices, weight, bias, keep, output if relu else None)


def _differentiate(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, indptr, indices, weight, bias, keep, y = ctx.saved_tensors
    need = ctx.needs_input_grad
    grad_x, grad_weight, grad_bias = torch.ops.chebface.cheb_conv_backward(
        grad_y,
        x,
        indptr,
        indices,
        weight,
        bias,
        keep,
        ctx.relu,
        y,
        need[0],
    )
    return (
        grad_x if need[0] else None,
        None,
        None,
        grad_weight if need[3] else None,
        grad_bias if need[4] else None,
        None,
        None,
    )


def _refuse(ctx: Any, *grads: torch.Tensor) -> None:
    raise InputError(
        "create_graph: cheb_conv has first derivatives only; for second ones call chebface.kernels.reference.cheb_conv"
    )


def _register() -> None:
    both = "Tensor x, Tensor indptr, Tensor indices, Tensor weight, Tensor? bias, Tensor? keep, bool relu"
    tag = torch.Tag.pt2_compliant_tag
    torch.library.define(_OPERATOR, f"({both}) -> Tensor", tags=tag)
    torch.library.impl(_OPERATOR, ("cpu", "cuda"), _forward)
    torch.library.register_fake(_OPERATOR, _fake_forward)
    torch.library.register_autograd(_OPERATOR, _differentiate, setup_context=_remember)
    more = f"(Tensor grad_y, {both}, Tensor? y, bool need_x) -> (Tensor, Tensor, Tensor)"
    torch.library.define(_BACKWARD, more, tags=tag)
    torch.library.impl(_BACKWARD, ("cpu", "cuda"), _backward)
    torch.library.register_fake(_BACKWARD, _fake_backward)
    torch.library.register_autograd(_BACKWARD, _refuse)


_register()
