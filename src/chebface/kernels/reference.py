"""What the Chebyshev kernels compute, in plain torch: any device, any floating type. The others are measured by it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from chebface.kernels.graph import Graph


def cheb_conv(
    x: torch.Tensor,
    graph: Graph,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    keep: torch.Tensor | None = None,
    relu: bool = False,
) -> torch.Tensor:
    """sum over k of T_k(L_hat) x W_k, plus the bias; then ReLU where asked for. Differentiable by autograd.

    Args:
        x: (B, N, C).
        graph: of N vertices.
        weight: (K, C, C_out), for T_0 to T_{K-1}; K >= 1.
        bias: (C_out,).
        keep: (M,) int32, rising: the vertices to compute; all where None.
        relu: whether to cut at zero.

    Returns:
        (B, M, C_out), or (B, N, C_out) without keep; the dtype of x.
    """
    total = torch.zeros((), dtype=x.dtype, device=x.device)
    for term, matrix in zip(_terms(x, graph, len(weight)), weight, strict=True):
        total = total + (term if keep is None else term[keep]) @ matrix  # (M, B, C_out)
    if bias is not None:
        total = total + bias
    y = total.transpose(0, 1).contiguous()
    return y.relu() if relu else y


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
    """The adjoint of `cheb_conv`, written out: L_hat is symmetric, so the same recursion runs on the gradient.

    Args:
        grad_y: (B, M, C_out); x, graph, weight, bias, keep, relu: as they went into `cheb_conv`.
        y: what came out of it; needed with relu only.
        need_x: whether the gradient to x is wanted.

    Returns:
        Gradients to x (B, N, C) or None where not needed, to weight (K, C, C_out), and to bias (C_out,) or None
        without one.
    """
    if relu and y is not None:
        grad_y = grad_y * (y > 0)
    grad_bias = None if bias is None else grad_y.sum((0, 1))
    if keep is not None:
        spread = grad_y.new_zeros((grad_y.shape[0], graph.n, grad_y.shape[2]))
        grad_y = spread.index_copy(1, keep.long(), grad_y)
    grad_y = grad_y.transpose(0, 1)
    flat = grad_y.reshape(-1, grad_y.shape[2])  # (N B, C_out)
    terms = _terms(x, graph, len(weight))
    grad_weight = torch.stack([term.reshape(len(flat), weight.shape[1]).T @ flat for term in terms])  # (T_k x)^T g
    if not need_x:
        return None, grad_weight, grad_bias
    grad_x = torch.zeros((), dtype=x.dtype, device=x.device)
    for term, matrix in zip(_terms(grad_y.transpose(0, 1), graph, len(weight)), weight, strict=True):
        grad_x = grad_x + term @ matrix.T  # T_k g W_k^T
    return grad_x.transpose(0, 1).contiguous(), grad_weight, grad_bias


def _terms(x: torch.Tensor, graph: Graph, count: int) -> Iterator[torch.Tensor]:
    """T_0(L_hat) x, T_1(L_hat) x, ...: `count` tensors (N, B, C)."""
    indptr, indices = graph.tensors(x.device)
    scale = indptr.diff().to(x.dtype).rsqrt()[:, None, None]

    def hop(value: torch.Tensor) -> torch.Tensor:  # L_hat value
        scaled = (value * scale).flatten(1)
        if not scaled.shape[1]:  # an empty batch, which embedding_bag does not always take
            return value
        sums = torch.nn.functional.embedding_bag(indices, scaled, indptr, mode="sum", include_last_offset=True)
        return -scale * sums.view(value.shape)

    now = x.transpose(0, 1)
    yield now
    before = now
    for k in range(1, count):
        now, before = (hop(now) if k == 1 else 2 * hop(now) - before), now
        yield now
