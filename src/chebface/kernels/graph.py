"""The graph of a mesh: which vertices are neighbours. All that the Chebyshev kernels know about a shape."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch.utils.weak import WeakTensorKeyDictionary

from chebface.errors import InputError

# indptr tensor -> weak references to its graph and its partner: how an operator, given tensors, finds the graph.
_owners = WeakTensorKeyDictionary()


@dataclass(frozen=True, eq=False)
class Graph:
    """An undirected graph without loops, as compressed rows: the neighbours of v are indices[indptr[v]:indptr[v + 1]].

    The scaled Laplacian of the kernels is L_hat = L - I = -D^-1/2 A D^-1/2, that is, the normalised Laplacian with
    its largest eigenvalue taken as 2. The arrays are made read-only; a graph is compared by identity.

    Raises:
        InputError: not whole rows, an index out of range, a loop, neighbours out of order, an adjacency that is not
            symmetric, or an isolated vertex.
    """

    indptr: np.ndarray  # (N + 1,) int32
    indices: np.ndarray  # (E,) int32, sorted within each row
    degree: np.ndarray = field(init=False)  # (N,) int32
    _tensors: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("indptr", "indices"):
            object.__setattr__(self, name, _as_int32(name, getattr(self, name)))
        _check(self.indptr, self.indices)
        object.__setattr__(self, "degree", np.diff(self.indptr))
        for array in (self.indptr, self.indices, self.degree):
            array.flags.writeable = False
        self._keep("cpu", torch.tensor(self.indptr), torch.tensor(self.indices))

    @classmethod
    def from_edges(cls, edges: np.ndarray, n: int) -> Graph:
        """Build from pairs of neighbours, each in either or both directions; loops and repeats are dropped.

        Args:
            edges: (E, 2) int.
            n: the number of vertices.

        Raises:
            InputError: a wrong shape or type, an index out of range, or a vertex without a neighbour.
        """
        edges = _check_indices("edges", edges, 2, n)
        edges = edges[edges[:, 0] != edges[:, 1]]
        directed = np.unique(np.concatenate([edges, edges[:, ::-1]]) @ np.array([n, 1]))
        counts = np.bincount(directed // n, minlength=n)
        return cls(np.concatenate([[0], np.cumsum(counts)]), directed % n)

    @classmethod
    def from_faces(cls, faces: np.ndarray, n: int) -> Graph:
        """Build from the sides of triangles; a side of no length (a, a) is dropped.

        Args:
            faces: (M, 3) int.
            n: the number of vertices.

        Raises:
            InputError: a wrong shape or type, an index out of range, or a vertex that is in no triangle.
        """
        faces = _check_indices("faces", faces, 3, n)
        return cls.from_edges(faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), n)

    @property
    def n(self) -> int:
        """The number of vertices."""
        return len(self.indptr) - 1

    def tensors(self, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """indptr (N + 1,) and indices (E,) as int32 tensors on a device; the same two tensors every time."""
        key = str(device)
        found = self._tensors.get(key)
        if found is None:
            indptr, indices = self._tensors["cpu"]
            found = indptr.to(device), indices.to(device)
            if not torch.compiler.is_compiling():  # a tracer's stand-ins must not be kept
                self._keep(key, *found)
        return found

    def _keep(self, key: str, indptr: torch.Tensor, indices: torch.Tensor) -> None:
        self._tensors[key] = indptr, indices
        _owners[indptr] = weakref.ref(self), weakref.ref(indices)


def find(indptr: torch.Tensor, indices: torch.Tensor) -> Graph:
    """The graph whose `tensors` these are; for others, such as an exported program's, a graph built from them.

    Raises:
        InputError: they are no graph.
    """
    graph, partner = _owners.get(indptr, (_nothing, _nothing))
    known = graph()
    if known is not None and partner() is indices:
        return known
    for name, tensor in (("indptr", indptr), ("indices", indices)):
        if tensor.dtype != torch.int32:
            raise InputError(f"{name}: expected int32, got {tensor.dtype}")
    built = _build(indptr.cpu().numpy().tobytes(), indices.cpu().numpy().tobytes())
    _owners[indptr] = weakref.ref(built), weakref.ref(indices)
    return built


@lru_cache(maxsize=64)
def _build(indptr: bytes, indices: bytes) -> Graph:
    return Graph(np.frombuffer(indptr, np.int32), np.frombuffer(indices, np.int32))


def _nothing() -> None:
    return None


def _as_int32(name: str, array: np.ndarray) -> np.ndarray:
    array = np.asarray(array)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InputError(f"{name}: expected one row of integers, got {array.shape} {array.dtype}")
    if array.size and (array.min() < 0 or array.max() > np.iinfo(np.int32).max):
        raise InputError(f"{name}: expected numbers in 0..2^31 - 1, got {array.min()}..{array.max()}")
    return array.astype(np.int32)  # a copy, so that the caller's array stays theirs


def _check(indptr: np.ndarray, indices: np.ndarray) -> None:
    n = len(indptr) - 1
    if n < 1 or indptr[0] != 0 or indptr[-1] != len(indices) or (np.diff(indptr) < 0).any():
        raise InputError(f"indptr: expected N + 1 rising numbers from 0 to {len(indices)} (indices), N > 0")
    if indices.size and indices.max() >= n:
        raise InputError(f"indices: expected vertices in 0..{n - 1}, got {indices.max()}")
    alone = np.flatnonzero(np.diff(indptr) == 0)
    if len(alone):
        raise InputError(
            f"vertex {alone[0]} is isolated ({len(alone)} of {n} have no neighbour); drop unused vertices from the mesh"
        )
    rows = np.repeat(np.arange(n, dtype=np.int64), np.diff(indptr))
    if (rows == indices).any():
        raise InputError(f"indices: vertex {rows[rows == indices][0]} is its own neighbour; leave loops out")
    forth = rows * n + indices
    if (np.diff(forth) <= 0).any():
        raise InputError("indices: expected the neighbours of each vertex in rising order, each once")
    back = indices.astype(np.int64) * n + rows
    one_way = np.setdiff1d(forth, back, assume_unique=True)
    if len(one_way):
        a, b = divmod(int(one_way[0]), n)
        raise InputError(
            f"the adjacency is not symmetric: {b} is a neighbour of {a} but {a} is not one of {b}; "
            "give each edge in both directions, or use Graph.from_edges"
        )


def _check_indices(name: str, array: np.ndarray, width: int, n: int) -> np.ndarray:
    array = np.asarray(array)
    if array.ndim != 2 or array.shape[1] != width or array.dtype.kind not in "iu":
        raise InputError(f"{name}: expected (M, {width}) integers, got {array.shape} {array.dtype}")
    if n < 1:
        raise InputError(f"n: expected at least one vertex, got {n}")
    if array.size and (array.min() < 0 or array.max() >= n):
        raise InputError(f"{name}: expected vertices in 0..{n - 1}, got {array.min()}..{array.max()}")
    return array.astype(np.int64)
