"""The export commands. Exit codes: 0 ok, 1 failed, 2 usage, 3 parity, 4 missing dependency, 130 interrupted."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from chebface.errors import ChebfaceError
from export.repository import fill_repository
from export.to_onnx import LIMIT_MM, export_onnx

INTERRUPTED = 130


def _report(run: Callable[..., tuple[dict[str, Any], str]]) -> Callable[..., None]:
    """Give a command its --json and --quiet options, its report (also on failure) and its exit code."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON report on stdout, also on failure.")
    @click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
    @wraps(run)
    def command(as_json: bool, quiet: bool, **options: Any) -> None:
        def say(line: str) -> None:
            if not quiet and (sys.stderr.isatty() or line.startswith("note:")):
                click.echo(line, err=True)

        try:
            report, summary = run(say=say, **options)
        except ChebfaceError as error:
            if as_json:
                click.echo(json.dumps({"ok": False, "error": type(error).__name__, "message": str(error)}))
            click.echo(f"error: {error}", err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted; nothing half-written was left", err=True)
            sys.exit(INTERRUPTED)
        if as_json:
            click.echo(json.dumps({"ok": True, **report}))
        elif not quiet:
            click.echo(summary)

    return command


_OUTPUT = click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("out/export"),
    show_default=True,
    help="Folder of the exported files and their manifest.json.",
)
_REPOSITORY = click.option(
    "--repository",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("triton_models"),
    show_default=True,
    help="The model repository to fill.",
)


def _sources(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--force", is_flag=True, help="Export again even if nothing has changed."),
        click.option(
            "--limit-mm",
            type=float,
            default=LIMIT_MM,
            show_default=True,
            help="The most that a vertex may move between torch and onnxruntime.",
        ),
        click.option("--head", "head_name", help="Head name or file; default: the one the weights were trained for."),
        click.option(
            "--checkpoint",
            type=click.Path(path_type=Path, dir_okay=False),
            help="Weights (safetensors); default: the shipped demo weights.",
        ),
    ):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def main() -> None:
    """Build what is served: ONNX files from torch, and the Triton model repository from those."""


@main.command()
@_sources
@_OUTPUT
@_report
def onnx(say: Callable[[str], None], output: Path, **options: Any) -> tuple[dict[str, Any], str]:
    """Export regressor, decoder and topology to ONNX and compare them with torch."""
    report = export_onnx(output, say=say, **options)
    return report, _summary(report, output)


@main.command()
@_OUTPUT
@_REPOSITORY
@_report
def repository(say: Callable[[str], None], output: Path, repository: Path) -> tuple[dict[str, Any], str]:
    """Check the exported files and fill the model repository with them.

    The same repository serves in the NGC container (native onnxruntime backend) and under `chebface serve`.
    """
    report = fill_repository(output, repository, say=say)
    return report, _filled(report)


@main.command(name="all")
@_sources
@_OUTPUT
@_REPOSITORY
@_report
def run_all(say: Callable[[str], None], output: Path, repository: Path, **options: Any) -> tuple[dict[str, Any], str]:
    """Both; what is up to date stays."""
    exported = export_onnx(output, say=say, **options)
    filled = fill_repository(output, repository, say=say)
    return {**exported, **filled}, f"{_summary(exported, output)}\n{_filled(filled)}"


def _summary(report: dict[str, Any], output: Path) -> str:
    size = sum(entry["bytes"] for entry in report["files"].values()) / 1e6
    state = f"written in {report['seconds']:.1f} s" if report["fresh"] else "up to date"
    error, limit = report["parity"]["vertex_mm"], report["parity"]["limit_mm"]
    return f"{output}: {state}, {size:.1f} MB, at most {error:.5f} mm from torch (limit {limit:g})"


def _filled(report: dict[str, Any]) -> str:
    changed = report["changed"]
    return f"{report['repository']}: " + (f"{len(changed)} files written" if changed else "up to date")
