"""The Chebyshev kernels on the CPU against torch-geometric's ChebConv: the whole mesh encoder, and its first layer."""

from __future__ import annotations

import ctypes
import functools
import gc
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from bench.record import check, make_record
from chebface import hierarchy, kernels
from chebface.errors import MissingDependencyError
from chebface.heads import open_head
from chebface.kernels import Graph, _pyg, cheb_conv, cpu, reference

CHANNELS, TERMS, CODES = (3, 16, 16, 16, 32), 6, 8
FORWARD, GRADIENT = 2e-6, 1e-5  # of float32 against the definition in float64, relative to the largest entry
RIVAL = 1e-4  # the rival has to compute the same
RIVAL_NAME = "torch-geometric"
TURN_S = 0.05  # each side runs for so long before the other does: neither pays for the other's caches
REST_S = 0.05  # before each turn: onnxruntime's threads look for work for 30 ms after a call, on the other's cores
MEMORY_BATCH = 64


def measure(
    seconds: float,
    batches: Sequence[int] = (1, 8, 64),
    passes: Sequence[str] = ("forward", "both"),
    threads: int = 2,
) -> list[dict[str, Any]]:
    """Rows for a FLAME-sized mesh: case "encoder" (one call) and "layer" (the operator, through autograd).

    Pass "forward" has no gradients; "both" is forward and the gradients to input and every weight. At batch 64 the
    encoder's row of "both" also has the peak of memory of each side, in a process of its own.

    Raises:
        MissingDependencyError: there are no kernels to measure, or no torch-geometric.
        DisagreesError: kernels or rival differ from the definition.
    """
    if kernels.implementation("cpu") != "native":
        raise MissingDependencyError(f"kernels: {kernels.implementation('cpu')}")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return [
            _measure_one(case, batch, which, seconds, threads)
            for case in _CASES
            for batch in batches
            for which in passes
        ]
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class _Network:
    """An encoder of random weights on the open head's hierarchy; leaves: weights, biases, linear weight and bias."""

    graphs: list[Graph]
    keeps: list[torch.Tensor]
    leaves: list[torch.Tensor]

    def double(self) -> _Network:
        leaves = [leaf.detach().double().requires_grad_() for leaf in self.leaves]
        return _Network(self.graphs, self.keeps, leaves)


def _make_network() -> _Network:
    # A level without `down` is the last: nothing is computed there.
    levels = [level for level in hierarchy.for_head(open_head()).levels if level.down is not None]
    graphs, keeps = [level.graph for level in levels], [torch.tensor(level.down) for level in levels]
    dice = torch.Generator().manual_seed(0)
    shapes = [(TERMS, *pair) for pair in pairwise(CHANNELS)]
    features = len(keeps[-1]) * CHANNELS[-1]
    sizes = [*shapes, *((shape[2],) for shape in shapes), (CODES, features), (CODES,)]
    leaves = [torch.randn(size, generator=dice) / math.sqrt(math.prod(size[:-1]) or 1) for size in sizes]
    leaves[-2] = leaves[-2] * math.sqrt(CODES / features)
    return _Network(graphs, keeps, [leaf.requires_grad_() for leaf in leaves])


Convolve = Callable[..., torch.Tensor]


def _encode(network: _Network, x: torch.Tensor, convolve: Convolve) -> torch.Tensor:
    count = len(network.graphs)
    weights, biases = network.leaves[:count], network.leaves[count : 2 * count]
    for graph, keep, weight, bias in zip(network.graphs, network.keeps, weights, biases, strict=True):
        x = convolve(x, graph, weight, bias, keep=keep, relu=True)
    return x.flatten(1) @ network.leaves[-2].T + network.leaves[-1]


def _first_layer(network: _Network, x: torch.Tensor, convolve: Convolve) -> torch.Tensor:
    weight, bias = _first_leaves(network)
    return convolve(x, network.graphs[0], weight, bias, keep=network.keeps[0], relu=True)


def _first_leaves(network: _Network) -> list[torch.Tensor]:
    return [network.leaves[0], network.leaves[len(network.graphs)]]


def _make_rival(network: _Network) -> Convolve:
    """torch-geometric's layers, built once as a user would."""
    layers = {id(weight): _pyg.make_layer(weight, bias) for weight, bias in _pairs(network)}
    edges = {id(graph): _pyg.edge_index(graph) for graph in network.graphs}

    def convolve(
        x: torch.Tensor, graph: Graph, weight: torch.Tensor, bias: torch.Tensor, *, keep: torch.Tensor, relu: bool
    ) -> torch.Tensor:
        y: torch.Tensor = layers[id(weight)](x, edges[id(graph)], lambda_max=2.0)
        y = y.index_select(1, keep)
        return y.relu() if relu else y

    return convolve


def _pairs(network: _Network) -> list[tuple[torch.Tensor, torch.Tensor]]:
    count = len(network.graphs)
    return list(zip(network.leaves[:count], network.leaves[count : 2 * count], strict=True))


def _run(
    case: str, which: str, network: _Network, x: torch.Tensor, grad: torch.Tensor | None, convolve: Convolve
) -> list[torch.Tensor]:
    """[y], or [y, gradients ...], by autograd."""
    whole, leaves = (_encode, network.leaves) if case == "encoder" else (_first_layer, _first_leaves(network))
    if which == "forward":
        with torch.no_grad():
            return [whole(network, x, convolve)]
    x = x.detach().requires_grad_()
    y = whole(network, x, convolve)
    return [y.detach(), *torch.autograd.grad(y, [x, *leaves], grad)]


def _run_plan(which: str, plan: cpu.Plan, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    """The same for the encoder in one call."""
    if which == "forward":
        return [cpu.encode(x, plan)]
    z, saved = cpu.encode_saving(x, plan)
    grad_x, weights, biases, *linear = cpu.encode_backward(grad, x, plan, True, saved=saved)
    return [each for each in (z, grad_x, *weights, *biases, *linear) if each is not None]


_CASES = ("encoder", "layer")


def _make_sides(case: str, which: str, batch: int) -> dict[str, Callable[[], list[torch.Tensor]]]:
    """What is compared: "ours", "rival", and "wanted", the definition in float64."""
    network = _make_network()
    dice = torch.Generator().manual_seed(1)
    x = torch.randn((batch, network.graphs[0].n, CHANNELS[0]), generator=dice)
    shape = (batch, CODES) if case == "encoder" else (batch, len(network.keeps[0]), CHANNELS[1])
    grad = torch.randn(shape, generator=dice)
    count = len(network.graphs)
    ours: Callable[[], list[torch.Tensor]]
    if case == "encoder":
        leaves = network.leaves
        plan = cpu.prepare(network.graphs, network.keeps, leaves[:count], leaves[count : 2 * count], *leaves[-2:])
        ours = functools.partial(_run_plan, which, plan, x, grad)
    else:
        ours = functools.partial(_run, case, which, network, x, grad, cheb_conv)
    exact = functools.partial(_run, case, which, network.double(), x.double(), grad.double(), reference.cheb_conv)
    rival = functools.partial(_run, case, which, network, x, grad, _make_rival(network))
    return {"ours": ours, "rival": rival, "wanted": exact}


def _measure_one(case: str, batch: int, which: str, seconds: float, threads: int) -> dict[str, Any]:
    sides = _make_sides(case, which, batch)
    wanted = sides["wanted"]()
    name = f"{case}, batch {batch}"
    checked = _check_all(name, sides["ours"](), wanted)
    for found, right in zip(sides["rival"](), wanted, strict=True):
        check(f"{name}: {RIVAL_NAME}", _relative(found, right), RIVAL)
    del wanted
    facts: dict[str, Any] = {"pass": which, "batch": batch, "threads": threads, "check": checked}
    if (case, which, batch) == ("encoder", "both", MEMORY_BATCH):
        facts |= _measure_memory(batch, threads)
    return make_record(
        bench="kernels",
        case=case,
        implementation="native",
        rival=RIVAL_NAME,
        times=_race_in_turns(sides["ours"], sides["rival"], seconds=seconds),
        **facts,
    )


def _check_all(name: str, found: list[torch.Tensor], wanted: list[torch.Tensor]) -> dict[str, Any]:
    """The answer's error as the record's, with the largest of the gradients' beside it."""
    kept = check(name, _relative(found[0], wanted[0]), FORWARD)
    errors = [_relative(got, right) for got, right in zip(found[1:], wanted[1:], strict=True)]
    if errors:
        gradient = check(f"{name}: gradient", max(errors), GRADIENT)
        kept |= {"gradient_error": gradient["error"], "gradient_limit": gradient["limit"]}
    return kept


def _relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.detach().double() - wanted).abs().max() / wanted.abs().max())


def _race_in_turns(
    ours: Callable[[], Any], rival: Callable[[], Any], *, seconds: float
) -> tuple[list[float], list[float]]:
    """Milliseconds of every call; the two sides take turns until the time is over, at least five calls each."""
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[1]) < 5:
        for function, into in zip((ours, rival), times, strict=True):
            time.sleep(REST_S)
            function()  # the other side's caches
            turn = time.perf_counter() + TURN_S
            while True:
                began = time.perf_counter()
                function()
                ended = time.perf_counter()
                into.append((ended - began) * 1e3)
                if ended > turn:
                    break
    return times


def _measure_memory(batch: int, threads: int) -> dict[str, float]:
    """Peak of resident memory over what was there before the call, each side in a fresh process."""
    peaks = {}
    for side in ("ours", "rival"):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            peaks[side] = process.submit(_find_peak_mb, side, batch, threads).result()
    if not all(peaks.values()):
        return {}
    return {
        "peak_mb": round(peaks["ours"], 1),
        "rival_peak_mb": round(peaks["rival"], 1),
        "memory_ratio": round(peaks["rival"] / peaks["ours"], 1),
    }


def _find_peak_mb(side: str, batch: int, threads: int) -> float:
    """Megabytes; 0 where the system does not tell."""
    torch.set_num_threads(threads)
    _make_sides("encoder", "both", 1)[side]()  # what is loaded and compiled once
    function = _make_sides("encoder", "both", batch)[side]
    gc.collect()
    _give_back_freed()  # or the call would be served from what its own making left
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
        before = _read_status_mb("VmRSS")
        function()
        return _read_status_mb("VmHWM") - before
    except OSError:
        return 0.0


def _give_back_freed() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)


def _read_status_mb(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024
