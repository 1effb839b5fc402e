"""The mesh encoder's CUDA kernels on the GPU at hand: checked, then timed against torch-geometric and the floor.

    bench/gpu_session.sh                 everything, on a machine with a GPU
    python -m bench.gpu --check          the checks alone

Nothing is timed that disagrees with the float64 definition on fresh random meshes. The floor is the larger of two
times: the bytes that must move (meshes in, codes out, weights and tables once) over the memory's bandwidth, and the
operations of the pooled encoder over the float32 rate; forward and backward count three times forward's operations.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from bench.record import DisagreesError, check, make_record, race
from chebface import hierarchy
from chebface.errors import ChebfaceError, MissingDependencyError
from chebface.heads import open_head
from chebface.kernels import _pyg, gpu, reference
from chebface.kernels.graph import Graph

BATCHES = (1, 8, 64, 512)
BANDWIDTH, RATE = 4.3e12, 60e12  # bytes/s and float32 operations/s of an H200, as measured
MESH_BYTES, MESH_OPERATIONS, ONCE_BYTES = 60_308, 3.45e6, 126_000
LIMITS = {"forward": 2e-6, "gradient": 1e-5}
INPUTS = 6  # sets to rotate among, so that a run does not find its input in a cache


class Encoder:
    """One encoder three ways: our kernels, torch-geometric, and the definition in float64; random weights."""

    def __init__(self, levels: Sequence[hierarchy.Level], seed: int = 0) -> None:
        make = torch.Generator("cuda").manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=make, device="cuda")

        self.graphs: list[Graph] = [level.graph for level in levels[:-1]]
        self.keeps = [np.asarray(level.down) for level in levels[:-1]]
        self.weights = [draw(*shape) * (shape[0] * shape[1]) ** -0.5 for shape in gpu.SHAPES]
        self.biases = [draw(shape[2]) * 0.1 for shape in gpu.SHAPES]
        self.linear = draw(gpu.CODES, 32 * len(self.keeps[-1])) * 0.05, draw(gpu.CODES)
        self.plan = gpu.prepare(self.graphs, self.keeps, self.weights, self.biases, *self.linear)
        self._kept = [torch.as_tensor(keep, device="cuda").long() for keep in self.keeps]
        self._edges = [_pyg.edge_index(graph, "cuda") for graph in self.graphs]
        self.parameters = [*self.weights, *self.biases, *self.linear]

    def define(self, x: torch.Tensor, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
        """The code by the definition of the layers, in the precision of what it is given."""
        for index, (graph, keep) in enumerate(zip(self.graphs, self._kept, strict=True)):
            weight, bias = parameters[index], parameters[index + 4]
            x = reference.cheb_conv(x, graph, weight, bias, keep=keep, relu=True)
        return x.flatten(1) @ parameters[8].T + parameters[9]

    def rival(self, x: torch.Tensor) -> torch.Tensor:
        """The code by torch-geometric's layers."""
        for index, keep in enumerate(self._kept):
            layer = _pyg.make_layer(self.parameters[index], self.parameters[index + 4])
            x = layer(x, self._edges[index], lambda_max=2.0).index_select(1, keep).relu()
        return x.flatten(1) @ self.parameters[8].T + self.parameters[9]

    def draw(self, batch: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Fresh meshes."""
        return torch.randn((batch, self.graphs[0].n, 3), device="cuda").to(dtype)


def check_kernels(encoder: Encoder, plan: gpu.Plan, batch: int, dtype: torch.dtype) -> dict[str, Any]:
    """Compare code and every gradient with the definition in float64, on outputs that begin as NaN, twice.

    Raises:
        DisagreesError: an error above the limit, or two runs that differ in a bit.
    """
    name, x = f"batch {batch} {dtype}", encoder.draw(batch, dtype)
    grad = torch.randn((batch, gpu.CODES), device="cuda")
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty is NaN from here on
    try:
        runs = []
        for _ in range(3):
            code, saved = gpu.encode_saving(x, plan)
            grad_x, weights, biases, linear, bias = gpu.encode_backward(grad, x, plan, True, saved=saved)
            runs.append([gpu.encode(x, plan), code, *_present(grad_x, *weights, *biases, linear, bias)])
    finally:
        torch.use_deterministic_algorithms(False)
    if not all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True)):
        raise DisagreesError(f"{name}: two runs on the same meshes differ: a race")
    exact = [p.double().requires_grad_() for p in encoder.parameters]
    wide = x.double().requires_grad_()
    want = encoder.define(wide, exact)
    wanted = torch.autograd.grad((want * grad.double()).sum(), [wide, *exact])
    forward = max(_relative(code, want) for code in runs[0][:2])
    half = 0.0 if dtype == torch.float32 else 5e-3  # grad_x comes in x's precision
    gradient = max(
        _relative(got, w) - half * (i == 0) for i, (got, w) in enumerate(zip(runs[0][2:], wanted, strict=True))
    )
    result = check(f"{name} code", forward, LIMITS["forward"])
    return result | {"gradient": check(f"{name} gradients", gradient, LIMITS["gradient"])["error"]}


def check_graph(encoder: Encoder, plan: gpu.Plan, batch: int) -> None:
    """A CUDA graph records forward and backward, and its replays on other meshes give the same bits as plain calls.

    Raises:
        DisagreesError: they do not.
    """
    x, grad = encoder.draw(batch), torch.randn((batch, gpu.CODES), device="cuda")
    run, results = record_graph(lambda: _both(plan, x, grad))
    for _ in range(3):
        x.copy_(encoder.draw(batch))
        run()
        torch.cuda.synchronize()
        if not all(torch.equal(a, b) for a, b in zip(results, _both(plan, x, grad), strict=True)):
            raise DisagreesError(f"batch {batch}: a CUDA graph's replay differs from a plain call")


def record_graph(function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """What replays a function's launches, and what the function returned (rewritten by each replay)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph.replay, results


def measure(
    levels: Sequence[hierarchy.Level], mesh: str, batches: Sequence[int], seconds: float
) -> list[dict[str, Any]]:
    """Rows: forward and both passes, for each batch; called plainly, and replayed from a CUDA graph.

    Raises:
        DisagreesError: kernels and definition differ.
    """
    encoder, rows = Encoder(levels), []
    for batch in batches:
        checked = check_kernels(encoder, encoder.plan, batch, torch.float32)
        meshes = [encoder.draw(batch) for _ in range(INPUTS)]
        wide = [mesh.clone().requires_grad_() for mesh in meshes]
        for parameter in encoder.parameters:
            parameter.requires_grad_()
        grad = torch.randn((batch, gpu.CODES), device="cuda")
        theirs = cycle(wide)

        def rival_both(theirs: Any = theirs, grad: torch.Tensor = grad) -> Any:
            x = next(theirs)
            return torch.autograd.grad((encoder.rival(x) * grad).sum(), [x, *encoder.parameters])

        def rival_forward(theirs: Any = theirs) -> torch.Tensor:
            with torch.no_grad():
                return encoder.rival(next(theirs))

        check("torch-geometric", _relative(rival_forward(), encoder.define(wide[0].double(), _double(encoder))), 1e-4)
        passes: dict[str, tuple[Callable[[torch.Tensor], Any], Callable[[], Any]]] = {
            "forward": (partial(gpu.encode, plan=encoder.plan), rival_forward),
            "both": (partial(_both, encoder.plan, grad=grad), rival_both),
        }
        for name, (function, rival) in passes.items():
            ways = {
                "cuda": _take_turns([partial(function, x) for x in meshes]),
                "cuda, graph replay": _take_turns([record_graph(partial(function, x))[0] for x in meshes]),
            }
            floor_us = _floor_us(batch, name)
            for way, run in ways.items():
                device_us = _device_us(run)
                row = make_record(
                    bench="kernels",
                    case="encoder",
                    implementation=way,
                    rival="torch-geometric",
                    times=race(_synced(run), _synced(rival), seconds=seconds),
                    **{"what": torch.cuda.get_device_name(), "pass": name, "batch": batch, "threads": 1},
                    check=checked,
                    mesh=mesh,
                    blocks=gpu._blocks(encoder.plan, batch),
                    device_us=round(device_us, 2),
                    floor_us=round(floor_us, 3),
                    share_of_floor=round(floor_us / device_us, 4),
                )
                rows.append(row)
        del wide, meshes
        torch.cuda.empty_cache()
    return rows


def compare_blocks(levels: Sequence[hierarchy.Level], batches: Sequence[int]) -> list[dict[str, Any]]:
    """Microseconds of a forward launch with one block and with a cluster for each mesh: what `choose_blocks` weighs."""
    encoder, rows = Encoder(levels), []
    for batch in batches:
        for blocks in (1, gpu.CLUSTER):
            plan = replace(encoder.plan, blocks=blocks)
            check_kernels(encoder, plan, batch, torch.float32)
            meshes = [encoder.draw(batch) for _ in range(INPUTS)]
            device_us = _device_us(_take_turns([record_graph(partial(gpu.encode, x, plan))[0] for x in meshes]))
            rows.append({"batch": batch, "blocks": blocks, "device_us": round(device_us, 2)})
    return rows


def find_levels(path: Path | None) -> tuple[Sequence[hierarchy.Level], str]:
    """The meshes to measure on: of a saved hierarchy, else of the open head, else of a bumpy ball of the same size."""
    if path is not None:
        return hierarchy.load(path).levels, path.name
    try:
        return hierarchy.for_head(open_head()).levels, "open head"
    except MissingDependencyError:
        return _ball(5023).levels, "ball"


def _ball(n: int) -> hierarchy.Hierarchy:
    from scipy.spatial import ConvexHull

    turn = np.arange(n) * np.pi * (3 - 5**0.5)
    height = 1 - 2 * (np.arange(n) + 0.5) / n
    ring = np.sqrt(1 - height**2)
    points = np.stack([ring * np.cos(turn), ring * np.sin(turn), height], 1)
    faces = ConvexHull(points).simplices
    bumps = 1 + 0.1 * np.random.default_rng(0).random((n, 1))
    return hierarchy.build((points * bumps).astype(np.float32), faces.astype(np.int32))


def _both(plan: gpu.Plan, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    code, saved = gpu.encode_saving(x, plan)
    grad_x, weights, biases, linear, bias = gpu.encode_backward(grad, x, plan, True, saved=saved)
    return _present(code, grad_x, *weights, *biases, linear, bias)


def _present(*parts: torch.Tensor | None) -> list[torch.Tensor]:
    return [part for part in parts if part is not None]


def _double(encoder: Encoder) -> list[torch.Tensor]:
    return [parameter.detach().double() for parameter in encoder.parameters]


def _relative(got: torch.Tensor, want: torch.Tensor) -> float:
    want = want.detach().double()
    error = float((got.detach().double() - want).norm() / want.norm())
    return error if np.isfinite(error) else float("inf")


def _take_turns(functions: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    turn = cycle(functions)

    def run() -> Any:
        return next(turn)()

    return run


def _synced(function: Callable[[], Any]) -> Callable[[], None]:
    def run() -> None:
        function()
        torch.cuda.synchronize()

    return run


def _device_us(function: Callable[[], Any], launches: int = 50, rounds: int = 15) -> float:
    """Median over rounds of the time from event to event, for one of many calls queued back to back."""
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(launches):
            function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / launches * 1e3)
    return float(np.median(times))


def _floor_us(batch: int, name: str) -> float:
    operations = batch * MESH_OPERATIONS * (1 if name == "forward" else 3)
    moved = (batch * MESH_BYTES + ONCE_BYTES) * (1 if name == "forward" else 2)
    return max(operations / RATE, moved / BANDWIDTH) * 1e6


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--check", "only_check", is_flag=True, help="Check and time nothing.")
@click.option("--batch", "batches", type=int, multiple=True, default=BATCHES, show_default=True)
@click.option("--seconds", type=float, default=2.0, show_default=True, help="Per row.")
@click.option("--hierarchy", "path", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="A saved one.")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Append the rows to this file.")
def main(only_check: bool, batches: tuple[int, ...], seconds: float, path: Path | None, output: Path | None) -> None:
    """Check the GPU encoder against its definition, then time it. Exit code 3 where something disagrees."""
    try:
        if not gpu.available():
            raise MissingDependencyError(f"bench.gpu: {gpu.why_missing()}")
        levels, mesh = find_levels(path)
        encoder = Encoder(levels)
        for batch in batches:
            for blocks in (1, gpu.CLUSTER):
                plan = replace(encoder.plan, blocks=blocks)
                for dtype in (torch.float32, torch.float16, torch.bfloat16):
                    result = check_kernels(encoder, plan, batch, dtype)
                    click.echo(f"checked batch {batch} blocks {blocks} {dtype}: {json.dumps(result)}")
                check_graph(encoder, plan, batch)
        if only_check:
            return
        rows = measure(levels, mesh, batches, seconds)
        for row in compare_blocks(levels, batches):
            click.echo(json.dumps(row))
    except ChebfaceError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    for row in rows:
        click.echo(
            f"{row['implementation']:20} {row['pass']:8} batch {row['batch']:4} {row['device_us']:9.1f} us on the GPU, "
            f"{row['share_of_floor']:7.1%} of the floor, {row['ratio']:6.1f}x faster than {row['rival']}"
        )
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        with open(output, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
