"""Training the reconstructor on the CPU: a step against its rival, the share of its losses, its data, its memory."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.record import check, make_record, race
from chebface import checkpoint
from chebface.arcface import build_backbone
from chebface.config import Synthesize, TrainReconstructor, load
from chebface.data.batches import Batch, Batches, collate
from chebface.data.sample import Shards
from chebface.data.synthetic import Painter, be_single_threaded, synthesize
from chebface.encoder import ChebConv, MeshEncoder
from chebface.errors import ConfigError, MissingDependencyError
from chebface.heads import Head, open_head
from chebface.kernels import _pyg
from chebface.native import keep_freed_memory
from chebface.objective import Objective
from chebface.optimizer import build_optimizers
from chebface.regressor import normalize_crop
from chebface.render import Renderer, open_renderer
from chebface.train import Place, _Steps, build_model, train_reconstructor

CASES = ("step", "share", "synthesis", "memory")
SAME = 1e-3  # relative, of the loss: two renderers differ along edges
_ROUNDS = 5
_PART = 16  # photographs that a process paints at a time


def measure(
    seconds: float,
    cases: Sequence[str] = CASES[:-1],
    batch: int = 8,
    steps: int = 10_000,
    threads: int = 2,
    overrides: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """One row for each case.

    step: a whole training step (IResNet-50, two photographs of each actor, every loss of the paper, the identity loss
    through a frozen IResNet-50 of random weights) against the same step drawn by pytorch3d and with the mesh encoder of
    torch-geometric. Where pytorch3d cannot be imported the rival draws as we do, and the row says so.
    share: rendering and losses, forward and backward, against the whole step. The recognition network is a part of the
    step and not of them; `share_with_recognition` counts it among them, `share_of_the_rest` takes it from the step too.
    synthesis: loading photographs from shards against making them (unwritten), both on all cores.
    memory: resident memory after a tenth of many small steps against that at their end.

    Args:
        seconds: of each case but the last.
        cases: of CASES.
        batch: actors.
        steps: of the last case.
        threads: torch's.
        overrides: other settings of the training, "key=value" each.

    Raises:
        ConfigError: an unknown case or setting.
        MissingDependencyError: no torch-geometric.
        DisagreesError: the rival's loss is another.
    """
    unknown = sorted(set(cases) - set(CASES))
    if unknown:
        raise ConfigError(f"case: expected some of {', '.join(CASES)}, got {', '.join(unknown)}")
    keep_freed_memory()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    rows: dict[str, Callable[[], dict[str, Any]]] = {
        "step": lambda: _measure_step(seconds, batch, overrides),
        "share": lambda: _measure_share(seconds, batch, overrides),
        "synthesis": lambda: _measure_synthesis(seconds),
        "memory": lambda: _measure_memory(steps, overrides),
    }
    try:
        return [rows[case]() for case in cases]
    finally:
        torch.set_num_threads(before)


@dataclasses.dataclass(frozen=True)
class _Trained:
    """A network in training, and what it is trained for."""

    steps: _Steps
    objective: Objective

    def step(self, batch: Batch) -> Tensor:
        """One optimiser step; the loss before it."""
        torch.manual_seed(0)  # of dropout
        loss: Tensor = self.steps.run(0, batch)["loss"]
        return loss


def _settings(batch: int, overrides: Sequence[str]) -> TrainReconstructor:
    never = 10**9  # what is written and logged now and then is not part of a step
    ours = ("backbone=iresnet50", f"batch={batch}", f"log_every={never}", f"steps={never}")
    return load(TrainReconstructor, None, (*ours, *overrides))


def _make_batch(head: Head, config: TrainReconstructor) -> Batch:
    each = config.images_per_actor
    made = Painter(head, Synthesize(images_per_actor=each)).paint(range(config.batch * each))
    return collate(made, wide=True)


def _train(
    head: Head,
    config: TrainReconstructor,
    batch: Batch,
    renderer: Renderer,
    encode: Callable[[MeshEncoder], Any] = lambda encoder: encoder,
) -> _Trained:
    torch.manual_seed(0)
    recognition, model = build_backbone(config.recognition_backbone), build_model(config, head)
    for network in (recognition, model):
        _settle(network, normalize_crop(batch.crop))
    autoencoder, _ = checkpoint.load_encoder()
    encoder = encode(autoencoder.encoder.requires_grad_(False))
    torch.nn.utils.convert_conv2d_weight_memory_format(recognition, torch.channels_last)
    objective = Objective(head, config, renderer=renderer, encoder=encoder, recognition=recognition)
    place = Place(0, 1, torch.device("cpu"))
    return _Trained(_Steps(config, place, model, objective, build_optimizers(model, config)), objective)


@torch.no_grad()
def _settle(network: nn.Module, crop: Tensor) -> None:
    """Give random weights the statistics of these pictures; frozen without any, they would run to infinity."""
    norms = [module for module in network.modules() if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))]
    for norm in norms:
        norm.momentum = 1.0
    network.train()(crop)
    for norm in norms:
        norm.momentum = 0.1


class _GeometricEncoder(nn.Module):
    """A mesh encoder whose convolutions are torch-geometric's."""

    def __init__(self, encoder: MeshEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.layers = [
            (_pyg.make_layer(layer.weight, layer.bias), _pyg.edge_index(layer.graph), layer.keep)
            for layer in encoder.conv
            if isinstance(layer, ChebConv)
        ]

    def forward(self, vertices: Tensor) -> Tensor:
        x = self.encoder.normalize(vertices)
        for layer, edges, keep in self.layers:
            x = layer(x, edges, lambda_max=2.0).index_select(1, keep).relu()
        code: Tensor = self.encoder.fc(x.flatten(1))
        return code


def _measure_step(seconds: float, batch: int, overrides: Sequence[str]) -> dict[str, Any]:
    head, config = open_head(), _settings(batch, overrides)
    known = _make_batch(head, config)
    ours = _train(head, config, known, open_renderer(head.faces, "cpu"))
    names, note = ["pytorch3d", "torch-geometric"], {}
    try:
        drawing = open_renderer(head.faces, "pytorch3d")
    except MissingDependencyError:
        drawing = open_renderer(head.faces, "cpu")
        names, note = names[1:], {"pytorch3d": "cannot be imported: its rasteriser is not in the ratio"}
    rival = _train(head, config, known, drawing, _GeometricEncoder)
    wanted = float(ours.step(known))
    began = time.perf_counter()
    error = abs(float(rival.step(known)) / wanted - 1)
    once_ms = (time.perf_counter() - began) * 1e3
    checked = check("step: loss of the rival, relative", error, SAME)
    if once_ms * _ROUNDS > seconds * 1e3:  # minutes: once is enough
        times = [_time(ours.step, known) for _ in range(_ROUNDS)], [once_ms]
    else:
        times = race(lambda: ours.step(known), lambda: rival.step(known), seconds=seconds)
    facts = _facts(config, checked) | {"rival_rounds": len(times[1])} | note
    return make_record(
        bench="train", case="step", implementation="native", rival=" + ".join(names), times=times, **facts
    )


def _measure_share(seconds: float, batch: int, overrides: Sequence[str]) -> dict[str, Any]:
    head, config = open_head(), _settings(batch, overrides)
    known = _make_batch(head, config)
    ours = _train(head, config, known, open_renderer(head.faces, "cpu"))
    objective, network = ours.objective, ours.objective.recognition
    predicted = ours.steps.model.eval()(normalize_crop(known.crop)).detach()

    def judge(recognition: nn.Module | None) -> Tensor:
        objective.recognition = recognition
        guess = predicted.clone().requires_grad_()
        objective(guess, known)[0].backward()
        objective.recognition = network
        return torch.as_tensor(guess.grad)

    error = float(not torch.isfinite(judge(network)).all())
    checked = check("share: gradients that are not finite", error, 0)
    alone, step = race(lambda: judge(_Coarse()), lambda: ours.step(known), seconds=seconds)
    both = [_time(judge, network) for _ in range(_ROUNDS)]
    losses_ms, step_ms, both_ms = (statistics.median(each) for each in (alone, step, both))
    return make_record(
        bench="train",
        case="share",
        implementation="rendering and losses",
        rival="the whole step",
        times=(alone, step),
        share=round(losses_ms / step_ms, 4),
        share_with_recognition=round(both_ms / step_ms, 4),
        share_of_the_rest=round(losses_ms / (step_ms - both_ms + losses_ms), 4),
        **_facts(config, checked),
    )


class _Coarse(nn.Module):
    """Stands in for a recognition network at no cost: the picture at 13 x 13 pixels."""

    def forward(self, crop: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(crop, 8).flatten(1)


def _measure_synthesis(seconds: float) -> dict[str, Any]:
    cores = os.cpu_count() or 1
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as name, _paint_in_processes(cores) as pool:
            folder = Path(name)
            synthesize(folder, Synthesize(count=20 * _PART, shard=10 * _PART), workers=cores)
            with Shards(folder) as shards:
                paint = functools.partial(_paint_all, pool, cores)
                read = functools.partial(_load_all, shards, cores)
                found = shards[3].parameters
                made = Painter(open_head(), Synthesize()).paint(range(3, 4))[0].parameters
                error = float("inf") if found is None or made is None else float(abs(found - made).max())
                checked = check("synthesis: parameters read back", error, 1e-4)
                times = race(read, paint, seconds=seconds)
    finally:
        torch.set_num_threads(threads)
    loaded, painted = 20 * _PART, 2 * cores * _PART
    each = [ms / loaded for ms in times[0]], [ms / painted for ms in times[1]]
    return make_record(
        bench="train",
        case="synthesis",
        implementation=f"loading, {cores} threads",
        rival=f"making, {cores} processes",
        times=each,
        loaded_per_s=round(1e3 / statistics.median(each[0]), 1),
        made_per_s=round(1e3 / statistics.median(each[1]), 1),
        **{"pass": "forward", "batch": 1, "threads": cores, "check": checked},
    )


def _paint_in_processes(count: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_begin_painting)


def _begin_painting() -> None:
    be_single_threaded()
    _painter()


@functools.cache
def _painter() -> Painter:
    return Painter(open_head(), Synthesize())


def _paint(first: int) -> int:
    return len(_painter().paint(range(first, first + _PART)))


def _paint_all(pool: ProcessPoolExecutor, cores: int) -> int:
    jobs = [pool.submit(_paint, place * _PART) for place in range(2 * cores)]
    return sum(job.result() for job in jobs)


def _load_all(shards: Shards, threads: int) -> int:
    return sum(map(len, Batches(shards, _PART, 0, 0, len(shards) // _PART, threads=threads)))


def _measure_memory(steps: int, overrides: Sequence[str]) -> dict[str, Any]:
    small = ("backbone=light", "trained=all", "batch=2", "images_per_actor=1", "weight_identity=0")
    rhythm = (f"steps={steps}", f"log_every={max(1, steps // 10)}", f"save_every={steps}")
    config = load(TrainReconstructor, None, (*small, *rhythm, *overrides))
    seen: list[float] = []

    def note(step: int, row: dict[str, Any]) -> None:
        check(f"memory: step {step}, loss not finite", float(not math.isfinite(row["loss"])), 0)
        seen.append(_read_resident_mb())

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        synthesize(folder / "data", Synthesize(count=16, shard=16), workers=1)
        began = time.perf_counter()
        train_reconstructor(config, folder / "data", folder / "run", report=note)
        step_ms = (time.perf_counter() - began) * 1e3 / steps
    row = make_record(
        bench="train",
        case="memory",
        implementation="at the last step",
        rival="after a tenth",
        times=([step_ms], [step_ms]),
        steps=steps,
        resident_mb=[round(each, 1) for each in seen],
        growth_mb=round(seen[-1] - seen[0], 1),
        **_facts(config, {"error": 0.0, "limit": 0.0, "passed": True}),
    )
    return row | {"ratio": round(seen[0] / seen[-1], 4)}


def _read_resident_mb() -> float:
    """Megabytes of this process.

    Raises:
        MissingDependencyError: the system does not tell.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError as error:
        raise MissingDependencyError(f"memory: no /proc/self/status to read ({error}); run it on Linux") from error
    return next(float(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024


def _facts(config: TrainReconstructor, checked: dict[str, Any]) -> dict[str, Any]:
    names = ("backbone", "images_per_actor", "trained", "precision")
    own = {name: getattr(config, name) for name in names}
    return {"pass": "both", "batch": config.batch, "threads": torch.get_num_threads(), "check": checked} | own


def _time(function: Callable[[Any], Any], argument: Any) -> float:
    """Milliseconds of one call."""
    began = time.perf_counter()
    function(argument)
    return (time.perf_counter() - began) * 1e3
