"""The tables that the GPU encoder walks: vertices in adjacent pairs, their neighbours as shared-memory addresses.

A pair is owned by one thread, so a partner and a common neighbour cost one read for two vertices. Where an address
lies decides which memory bank serves it; the order of a thread's reads is free, so it is chosen for each group of
threads that read at once such that few of them meet in a bank. `encoder.cu` says how the tables are used.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np

from chebface.errors import InputError
from chebface.kernels.graph import Graph

WIDTH = 12  # neighbour addresses within a record; more go to a list
NONE = 0xFFFF
SWEEPS = 3


@dataclass(frozen=True, eq=False)
class Table:
    """One level. A record is 48 bytes, as structs Pair and Kept in encoder.cu."""

    pairs: np.ndarray  # (P, 12) uint32
    kept: np.ndarray  # (rows, 12) uint32, in the slot order of the next level; the last level's in plain order
    tails: np.ndarray  # uint32
    slots: np.ndarray  # (N,) int64: where each vertex lies, of 2 P + 1 places, the last for zero
    free: np.ndarray  # (2 P - N,) int64: places without a vertex
    conflicts: float  # passes over shared memory a gather takes, over the passes it would take without bank conflicts


def lay_out(graphs: tuple[Graph, ...], downs: tuple[np.ndarray, ...]) -> tuple[Table, ...]:
    """Make the tables of an encoder.

    Args:
        graphs: one per convolution, the finest first.
        downs: for each, the vertices it keeps, rising; those of all but the last are the next graph's vertices.

    Raises:
        InputError: levels that do not fit together, or a mesh too large for 16-bit addresses.
    """
    if len(graphs) != len(downs):
        raise InputError(f"downs: expected {len(graphs)}, one for each graph, got {len(downs)}")
    for index, (graph, down) in enumerate(zip(graphs, downs, strict=True)):
        if down.ndim != 1 or not len(down) or down[0] < 0 or down[-1] >= graph.n or (np.diff(down) <= 0).any():
            raise InputError(f"downs[{index}]: expected rising vertices in 0..{graph.n - 1}, each once")
        if index + 1 < len(graphs) and graphs[index + 1].n != len(down):
            raise InputError(f"graphs[{index + 1}]: expected {len(down)} vertices, got {graphs[index + 1].n}")
    places = [_place(graph, 4 if index == 0 else 16) for index, graph in enumerate(graphs)]
    tables = []
    for index, (graph, down) in enumerate(zip(graphs, downs, strict=True)):
        following = places[index + 1] if index + 1 < len(graphs) else None
        tables.append(_fill(graph, down, places[index], following, graphs[index + 1] if following else None))
    return tuple(tables)


@dataclass(frozen=True)
class _Place:
    pairs: list[tuple[int, int]]  # -1: no partner
    slots: np.ndarray  # (N,)
    size: int  # bytes of a value

    @property
    def zero(self) -> int:
        return 2 * len(self.pairs)

    @property
    def free(self) -> np.ndarray:
        return np.setdiff1d(np.arange(self.zero), self.slots)


def _place(graph: Graph, size: int) -> _Place:
    around = [graph.indices[a:b].tolist() for a, b in zip(graph.indptr[:-1], graph.indptr[1:], strict=True)]
    pairs = _match(around)
    rank = np.empty(graph.n, np.int64)
    rank[_walk(around)] = np.arange(graph.n)
    # Long lists first, so that few warps take the longer way; else along the surface, so that neighbours lie near.
    reads = [len({*around[u], *(around[v] if v >= 0 else ())} - {u, v}) for u, v in pairs]
    order = sorted(range(len(pairs)), key=lambda p: (-max(0, (reads[p] - 7) // 2), rank[pairs[p][0]]))
    pairs = _spread([pairs[p] for p in order], around, 32 if size == 4 else 8)
    slots = np.empty(graph.n, np.int64)
    for p, (u, v) in enumerate(pairs):
        slots[u] = p
        if v >= 0:
            slots[v] = len(pairs) + p
    if (2 * len(pairs) + 1) * size > NONE:
        raise InputError(
            f"graph: {graph.n} vertices of {size} bytes are beyond 16-bit addresses; the GPU kernel takes at most "
            f"{NONE // size - 1} there"
        )
    return _Place(pairs, slots, size)


def _match(around: list[list[int]]) -> list[tuple[int, int]]:
    """Adjacent pairs that leave few vertices alone: always the vertex with the fewest free neighbours first."""
    free = [len(a) for a in around]
    taken = [False] * len(around)
    heap = [(count, v) for v, count in enumerate(free)]
    heapq.heapify(heap)
    pairs = []
    while heap:
        count, u = heapq.heappop(heap)
        if taken[u] or count != free[u]:
            continue
        v = min((w for w in around[u] if not taken[w]), key=lambda w: (free[w], w), default=-1)
        pairs.append((u, v))
        for gone in (u, v) if v >= 0 else (u,):
            taken[gone] = True
            for w in around[gone]:
                free[w] -= 1
                if not taken[w]:
                    heapq.heappush(heap, (free[w], w))
    return pairs


def _spread(pairs: list[tuple[int, int]], around: list[list[int]], group: int) -> list[tuple[int, int]]:
    """Reorder within groups of threads, that is choose banks, so that no group of readers wants one bank too often."""
    owner = {v: p for p, pair in enumerate(pairs) for v in pair if v >= 0}
    readers = {v: [*{owner[w] // group for w in around[v]}] for v in owner}
    load = np.zeros((len(pairs) // group + 1, group), np.int64)
    spread = list(pairs)
    for start in range(0, len(pairs), group):
        free = np.arange(group) < len(pairs) - start
        for u, v in pairs[start : start + group]:
            cost = load[readers[u]].sum(0)
            if v >= 0:  # its bank is that of place len(pairs) + lane
                cost = cost + np.roll(load[readers[v]].sum(0), -len(pairs) % group)
            lane = int(np.where(free, cost, np.iinfo(np.int64).max).argmin())
            free[lane] = False
            spread[start + lane] = u, v
            load[readers[u], lane] += 1
            if v >= 0:
                load[readers[v], (lane + len(pairs)) % group] += 1
    return spread


def _walk(around: list[list[int]]) -> list[int]:
    """All vertices, breadth first."""
    seen = [False] * len(around)
    order: list[int] = []
    for start in range(len(around)):
        if seen[start]:
            continue
        seen[start] = True
        order.append(start)
        head = len(order) - 1
        while head < len(order):
            for w in around[order[head]]:
                if not seen[w]:
                    seen[w] = True
                    order.append(w)
            head += 1
    return order


def _fill(graph: Graph, down: np.ndarray, place: _Place, following: _Place | None, coarser: Graph | None) -> Table:
    size, zero, count = place.size, place.zero, len(place.pairs)
    address = place.slots * size
    inverse = (1 / graph.degree.astype(np.float64)).astype(np.float32)
    tails: list[int] = []
    kept_at = down if following is None else np.full(following.zero, -1)
    if following is not None:
        kept_at[following.slots] = down
    row_of = np.full(graph.n, NONE)
    row_of[kept_at[kept_at >= 0]] = np.flatnonzero(kept_at >= 0)

    def partner(v: int) -> list[int]:
        return [address[v]] if v >= 0 else []

    def neighbours(v: int) -> list[int]:
        return address[graph.indices[graph.indptr[v] : graph.indptr[v + 1]]].tolist() if v >= 0 else []

    reads = []
    for u, v in place.pairs:
        first, second = ({a for a in neighbours(w) if a not in own} for w, own in ((u, partner(v)), (v, partner(u))))
        both = dict.fromkeys(sorted(first), 1)
        for a in sorted(second):
            both[a] = both.get(a, 0) | 2
        reads.append(sorted(both.items(), key=lambda read: (-read[1], read[0])))
    group = 32 if size == 4 else 8
    entries, words = _schedule(reads, group, size, zero * size, tails)
    pairs = np.zeros((count, 12), np.uint32)
    pairs[:, :8] = words
    pairs.view(np.float32)[:, 8:10] = [[inverse[u], inverse[v] if v >= 0 else 0] for u, v in place.pairs]
    pairs[:, 10] = [row_of[u] | (row_of[v] if v >= 0 else NONE) << 16 for u, v in place.pairs]

    kept = np.zeros((len(kept_at), 12), np.uint32)
    kept[:, :8] = _schedule([[(a, 1) for a in neighbours(v)] for v in kept_at], group, size, zero * size, tails)[1]
    real = kept_at >= 0
    kept[:, 8] = np.where(real, address[kept_at], zero * size)
    floats = kept.view(np.float32)
    floats[:, 9] = np.where(real, inverse[kept_at], 0)
    floats[:, 10] = np.where(real, np.sqrt(graph.degree[kept_at]), 0)
    floats[:, 11] = np.where(real, 1, 0)
    if following is not None and coarser is not None:
        floats[following.slots, 11] = 1 / np.sqrt(coarser.degree)
    passes, least = _passes(entries, words, group, size)
    return Table(pairs, kept, np.array(tails or [0], np.uint32), place.slots, place.free, passes / least)


def _schedule(
    reads: list[list[tuple[int, int]]], group: int, size: int, zero: int, tails: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Order each thread's reads, so that threads that read at once meet in few banks.

    Args:
        reads: for each thread, (address, 1 to add to the first of the pair | 2 to the second).
        group: how many threads read at once, and how many banks of this size there are.
        tails: takes what does not fit.

    Returns:
        (threads, 8) uint32: addresses two a word, then the words `shape` and `tail` of struct Near.
    """
    entries = np.full((len(reads), WIDTH), zero)
    words = np.zeros((len(reads), 8), np.uint32)
    most = max(map(len, reads))
    if most > WIDTH + 255:
        raise InputError(
            f"graph: the GPU kernel takes at most {WIDTH + 255} neighbours of a pair of vertices, got {most}"
        )
    for start in range(0, len(reads), group):
        threads = range(start, min(start + group, len(reads)))
        longest = max(len(reads[i]) for i in threads)
        width = min(max(8, longest + longest % 2), WIDTH)
        load: list[defaultdict[int, Counter[int]]] = [defaultdict(Counter) for _ in range(WIDTH)]  # bank -> address
        for _ in range(SWEEPS):
            for i in threads:
                for step in range(width):  # take this thread's reads away, to place them among all others'
                    address = int(entries[i, step])
                    here = load[step][address // size % group]
                    if here[address] <= 1:
                        del here[address]
                    else:
                        here[address] -= 1
                entries[i] = zero
                words[i, 6] = width << 24 | (len(reads[i]) > WIDTH) << 28
                worst = [max(map(len, step.values()), default=0) for step in load]
                steps = list(range(width))
                for address, side in reads[i][:WIDTH]:
                    bank = address // size % group
                    found = [(len(load[e][bank]) + (address not in load[e][bank]), e) for e in steps]
                    met, step = min(found, key=lambda f: (max(f[0] - worst[f[1]], 0), f[0]))
                    steps.remove(step)
                    worst[step] = max(worst[step], met)
                    entries[i, step] = address
                    load[step][bank][address] += 1
                    words[i, 6] |= (side & 1) << step | (side >> 1) << (step + 12)
        for i in threads:
            words[i, 7] = len(tails) << 8 | len(reads[i][WIDTH:])
            tails.extend(address | side << 16 for address, side in reads[i][WIDTH:])
    words[:, :6] = np.ascontiguousarray(entries.astype("<u2")).view("<u4")
    return entries, words


def _passes(entries: np.ndarray, words: np.ndarray, group: int, size: int) -> tuple[int, int]:
    """Passes over shared memory that these reads take, and would take if no two addresses met in a bank."""
    passes = least = 0
    for start in range(0, len(entries), group):
        width = int(words[start, 6]) >> 24 & 15
        for step in entries[start : start + group, :width].T:
            passes += np.bincount(np.unique(step) // size % group).max()
            least += 1
    return int(passes), least
