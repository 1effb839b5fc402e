"""torch-geometric's ChebConv behind the signature of `cheb_conv`: a second opinion in tests, the rival in bench."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from chebface.errors import MissingDependencyError
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
    """The same layer by torch-geometric, which computes every vertex and then selects. See `chebface.kernels`.

    Raises:
        MissingDependencyError: torch-geometric is not installed.
    """
    layer = make_layer(weight, bias)
    edges = edge_index(graph, x.device)
    y = layer(x, edges, lambda_max=2.0)
    y = y if keep is None else y.index_select(1, keep)
    return y.relu() if relu else y


def make_layer(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
    """A `torch_geometric.nn.ChebConv` that holds these tensors: weight (K, C, C_out), bias (C_out,).

    Gradients reach the tensors given. Call it as layer(x, edge_index, lambda_max=2.0).

    Raises:
        MissingDependencyError: torch-geometric is not installed.
    """
    terms, inputs, outputs = weight.shape
    layer = _import_layer()(inputs, outputs, terms, normalization="sym", bias=bias is not None)
    for linear, matrix in zip(layer.lins, weight, strict=True):
        del linear.weight  # a parameter: gradients would stop at it
        linear.weight = matrix.T
    if bias is not None:
        del layer.bias
        layer.bias = bias
    return layer


def edge_index(graph: Graph, device: torch.device | str = "cpu") -> torch.Tensor:
    """Every edge in both directions as torch-geometric wants them: (2, E) int64."""
    indptr, indices = graph.tensors(device)
    rows = torch.repeat_interleave(torch.arange(graph.n, device=indptr.device), indptr.diff())
    return torch.stack([indices.long(), rows])


def _import_layer() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # it calls torch.jit.script as it is imported
            from torch_geometric.nn import ChebConv
    except ImportError as error:
        raise MissingDependencyError(
            f"torch_geometric: not installed ({error}); pip install torch-geometric"
        ) from error
    return ChebConv
