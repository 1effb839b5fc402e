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
        case = f"{row['case']} {row['pass']}, batch {row['batch']}"
        click.echo(line if as_json else f"{case:32} {row['ratio']:6.1f}x better than {row['rival']}")
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        with open(output, "a") as file:
            file.write("\n".join(lines) + "\n")


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
