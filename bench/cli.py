"""The benchmarks. Exit codes as everywhere; 3 when something disagrees with its reference."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from chebface.errors import ChebfaceError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """How fast, as a ratio against a rival in the same run."""


def _common(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option(
            "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Append the rows to this file."
        ),
        click.option("--json", "as_json", is_flag=True, help="JSON lines on stdout instead of a table."),
        click.option("--seconds", type=float, default=3.0, show_default=True, help="Per row."),
    ):
        command = option(command)
    return command


def _report(measure: Callable[[], list[dict[str, Any]]], as_json: bool, output: Path | None) -> None:
    """Measure, print, keep."""
    try:
        rows = measure()
    except ChebfaceError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    lines = [json.dumps(row) for row in rows]
    for row, line in zip(rows, lines, strict=True):
        case = f"{row['case']} {row['pass']}, batch {row['batch']}, {row['implementation']}"
        click.echo(line if as_json else f"{case:56} {row['ratio']:6.1f}x better than {row['rival']}")
    if output:
        _append(output, rows)


@main.command()
@_common
def rendering(seconds: float, as_json: bool, output: Path | None) -> None:
    """The built-in rasteriser and renderer."""
    from bench.rendering import measure

    _report(lambda: measure(seconds), as_json, output)


@main.command()
@_common
@click.option(
    "--official",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Checkout of the official evaluation, installed as its README says.",
)
@click.option("--official-python", default="python", show_default=True, help="The interpreter that it runs in.")
@click.option(
    "--assets",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of FLAME Open and real scans; else the built-in head.",
)
def now(
    seconds: float, as_json: bool, output: Path | None, official: Path, official_python: str, assets: Path | None
) -> None:
    """The NoW protocol against the benchmark's official code: numbers and time of every pair."""
    from bench.now import measure

    _report(lambda: measure(official, official_python, assets), as_json, output)


@main.command()
@_common
@click.option("--batch", "batches", type=int, multiple=True, default=(1, 8, 64), show_default=True, help="Repeat it.")
def kernels(seconds: float, as_json: bool, output: Path | None, batches: tuple[int, ...]) -> None:
    """The Chebyshev kernels on the CPU against torch-geometric."""
    from bench.kernels import measure

    _report(lambda: measure(seconds, batches=batches), as_json, output)


@main.command()
@_common
@click.option(
    "--case", "cases", multiple=True, help="step, share, synthesis or memory; repeat it. All but the last by default."
)
@click.option("--batch", type=int, default=8, show_default=True, help="Actors.")
@click.option("--steps", type=int, default=10_000, show_default=True, help="Of the case memory.")
@click.option("--threads", type=int, default=2, show_default=True, help="Of torch.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Another setting of the training.")
def train(
    seconds: float,
    as_json: bool,
    output: Path | None,
    cases: tuple[str, ...],
    batch: int,
    steps: int,
    threads: int,
    overrides: tuple[str, ...],
) -> None:
    """A training step against pytorch3d and torch-geometric, its parts, its data, its memory."""
    from bench.train import CASES, measure

    _report(lambda: measure(seconds, cases or CASES[:-1], batch, steps, threads, overrides), as_json, output)


@main.command()
@_common
@click.option("--case", "cases", multiple=True, help="reconstruct, decode or encode; repeat it. All by default.")
@click.option(
    "--backbone", "backbones", multiple=True, default=("light", "iresnet50"), show_default=True, help="Of reconstruct."
)
@click.option("--batch", "batches", type=int, multiple=True, default=(1, 8), show_default=True, help="Repeat it.")
@click.option("--threads", type=int, default=2, show_default=True, help="Of torch, sessions and operators.")
@click.option("--work", type=click.Path(path_type=Path, file_okay=False), help="Keep the exports, for the next time.")
def latency(
    seconds: float,
    as_json: bool,
    output: Path | None,
    cases: tuple[str, ...],
    backbones: tuple[str, ...],
    batches: tuple[int, ...],
    threads: int,
    work: Path | None,
) -> None:
    """Exported files on this CPU against torch eager, smplx and torch-geometric."""
    from bench.latency import CASES, measure

    _report(lambda: measure(seconds, cases or CASES, backbones, batches, threads, work), as_json, output)


@main.command()
@click.option("--fault", "faults", multiple=True, help="Which; repeat it. All by default.")
@click.option(
    "--scale", type=click.Choice(["small", "full"]), default="small", show_default=True, help="Each once, or often."
)
@click.option(
    "--repository",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("triton_models"),
    show_default=True,
    help="What is served; it is copied.",
)
@click.option("--json", "as_json", is_flag=True, help="JSON lines on stdout instead of a table.")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Append the rows to this file.")
def faults(faults: tuple[str, ...], scale: str, repository: Path, as_json: bool, output: Path | None) -> None:
    """Servers killed, drained, renewed, starved and attacked. Exit code 1: a request was lost."""
    from bench.faults import FAULTS, HEADER, measure

    if not as_json:
        click.echo(HEADER)

    def keep(row: dict[str, Any]) -> None:
        if output:
            _append(output, [row])
        if as_json:
            click.echo(json.dumps(row))

    try:
        rows = measure(repository, faults or tuple(FAULTS), scale, lambda line: click.echo(line, err=as_json), keep)
    except ChebfaceError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    if any(row["lost"] or row["failed"] for row in rows):
        sys.exit(1)


@main.command()
@click.option(
    "--case", "cases", multiple=True, help="reconstruct, throughput, overload or peer; repeat it. All by default."
)
@click.option(
    "--concurrency",
    "concurrencies",
    type=int,
    multiple=True,
    default=(1, 2, 4, 8, 16, 32),
    show_default=True,
    help="Callers at once, of throughput; repeat it.",
)
@click.option(
    "--repository",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("triton_models"),
    show_default=True,
    help="The model repository to serve.",
)
@click.option("--seconds", type=float, default=6.0, show_default=True, help="Per row.")
@click.option("--overload-seconds", "overload_s", type=float, default=120.0, show_default=True, help="Of overload.")
@click.option("--work", type=click.Path(path_type=Path, file_okay=False), help="Keep peer's export, for the next time.")
@click.option("--plots", type=click.Path(path_type=Path, file_okay=False), help="Folder for plots (PNG).")
@click.option("--json", "as_json", is_flag=True, help="JSON lines on stdout instead of a table.")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Append the rows to this file.")
def serve(cases: tuple[str, ...], plots: Path | None, as_json: bool, output: Path | None, **options: Any) -> None:
    """A real server against the same files in this process, under load and overload, and a peer's own loop."""
    from bench.serve import CASES, draw, make_table, measure

    try:
        rows = measure(cases=cases or CASES, say=lambda line: click.echo(line, err=True), **options)
    except ChebfaceError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    if output:
        _append(output, rows)
    click.echo("\n".join(map(json.dumps, rows)) if as_json else make_table(rows))
    for path in draw(rows, plots) if plots else ():
        click.echo(f"{path}", err=True)


@main.command()
@click.option(
    "--work",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("out/ablation"),
    show_default=True,
    help="Folder for data, runs and reports; a run that was interrupted goes on from it.",
)
@click.option("--steps", type=int, default=400, show_default=True, help="Of each run.")
@click.option("--actors", type=int, default=32, show_default=True, help="In a batch, two photographs each.")
@click.option("--subjects", type=int, default=100, show_default=True, help="Held-out people, four photographs each.")
@click.option("--seed", "seeds", type=int, multiple=True, default=(0, 1, 2), show_default=True, help="Repeat it.")
@click.option("--remedies", is_flag=True, help="Also run `ours` with other weights and codes, and measure the reasons.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="A setting of every run.")
@click.option("--jobs", type=int, default=1, show_default=True, help="Processes for scoring.")
@click.option("--device", default="cpu", show_default=True, help="To train on.")
@click.option("--json", "as_json", is_flag=True, help="JSON lines on stdout instead of a table.")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Append the rows to this file.")
def ablation(overrides: tuple[str, ...], as_json: bool, output: Path | None, **options: Any) -> None:
    """The presets ours, mica and deca on open data, with equal budgets, scored by the NoW engine."""
    from bench.ablation import measure

    settings = dict(text.split("=", 1) for text in overrides if "=" in text)
    if len(settings) != len(overrides):
        raise click.UsageError("--set: expected KEY=VALUE")
    try:
        rows = measure(settings=settings, say=lambda line: click.echo(line, err=True), **options)
    except ChebfaceError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    if output:
        _append(output, rows)
    for row in rows:
        click.echo(json.dumps(row) if as_json else _spell_ablation(row))


def _spell_ablation(row: dict[str, Any]) -> str:
    if row["case"] == "errors":
        seed = f"{row['preset']}, seed {row['seed']}"
        plain, metrical = ([row[f"{p}{w}_mm"] for w in ("median", "mean", "std")] for p in ("", "metrical_"))
        return (
            f"{seed:20} {'  '.join(f'{v:.3f}' for v in plain)} mm   metrical {'  '.join(f'{v:.3f}' for v in metrical)}"
        )
    if row["case"] == "pull":
        return (
            f"pull of {row['term']:20} {row['norm']:.4f}, on the shape {row['norm_on_shape']:.4f}, "
            f"cosine with the vertices' {row['cosine_with_vertices']:+.2f}"
        )
    if row["case"] == "code":
        return f"{row['encoder']} encoder: rank correlation of distance and error {row['rank_correlation']:.2f}"
    kind = f"{'metrical' if row['metrical'] else 'non-metrical'} {row['what']}, {row['challenge']}"
    return (
        f"{row['a']} - {row['b']}, {kind:36} {row['difference_mm']:+.4f} mm "
        f"[{row['low_mm']:+.4f}, {row['high_mm']:+.4f}], p {row['p']:.2g}"
    )


def _append(output: Path, rows: list[dict[str, Any]]) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output, "a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
