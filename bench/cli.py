"""The benchmarks. Exit codes as everywhere; 3 when something disagrees with its reference."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from chebface.errors import ChebfaceError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """How fast, as a ratio against a rival in the same run."""


@main.command()
@click.option("--seconds", type=float, default=3.0, show_default=True, help="Per row.")
@click.option("--json", "as_json", is_flag=True, help="JSON lines on stdout instead of a table.")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Append the rows to this file.")
def rendering(seconds: float, as_json: bool, output: Path | None) -> None:
    """The built-in rasteriser and renderer."""
    from bench.rendering import measure

    try:
        rows = measure(seconds)
    except ChebfaceError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    lines = [json.dumps(row) for row in rows]
    for row, line in zip(rows, lines, strict=True):
        click.echo(
            line if as_json else f"{row['case']:12} {row['pass']:8} {row['ratio']:6.1f}x faster than {row['rival']}"
        )
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        with open(output, "a") as file:
            file.write("\n".join(lines) + "\n")
