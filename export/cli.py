"""The export commands. Exit codes: 0 ok, 1 failed, 2 usage, 3 parity, 4 missing dependency, 130 interrupted."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import click

from chebface.command import INTERRUPTED
from chebface.errors import ChebfaceError
from export.custom import BASES
from export.engines import can_build
from export.graphs import OPSET
from export.precision import PRECISIONS
from export.repository import TARGETS, fill_repository, verify_repository
from export.to_engine import BATCH, build_engine, build_engines
from export.to_onnx import OPERATORS, export_onnx, read_crops

Say = Callable[[str], None]


def _report(run: Callable[..., tuple[dict[str, Any], str]]) -> Callable[..., None]:
    """Give a command its --json and --quiet options, its report (also on failure) and its exit code."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON report on stdout, also on failure.")
    @click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
    @wraps(run)
    def command(as_json: bool, quiet: bool, **options: Any) -> None:
        try:
            with _stages(quiet) as say:
                report, summary = run(say=say, **options)
        except (ChebfaceError, OSError) as error:
            if as_json:
                click.echo(json.dumps({"ok": False, "error": type(error).__name__, "message": str(error)}))
            click.echo(f"error: {error}", err=True)
            sys.exit(error.exit_code if isinstance(error, ChebfaceError) else ChebfaceError.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted; nothing half-written was left", err=True)
            sys.exit(INTERRUPTED)
        if as_json:
            click.echo(json.dumps({"ok": True, **report}))
        elif not quiet:
            click.echo(summary)

    return command


@contextmanager
def _stages(quiet: bool) -> Iterator[Say]:
    """Something to say each step with: a line that works while it lasts, on a terminal; notes stay, everywhere."""
    from rich.console import Console

    console = Console(stderr=True)
    if quiet:
        yield lambda line: None
    elif not console.is_terminal:
        yield lambda line: click.echo(line, err=True) if line.startswith("note:") else None
    else:
        with console.status("starting") as status:

            def say(line: str) -> None:
                if line.startswith("note:"):
                    console.print(line, markup=False, highlight=False)
                status.update(line)

            yield say


_OUTPUT = click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("out/export"),
    show_default=True,
    help="Folder of the exported files and their manifest.json.",
)
_FILE = click.Path(path_type=Path, dir_okay=False)


def _sources(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--force", is_flag=True, help="Export again even if nothing has changed."),
        click.option(
            "--calib",
            type=click.Path(path_type=Path),
            help="Aligned crops to calibrate int8 with: .npy (n, 112, 112, 3) uint8, or a folder of pictures; "
            "default: synthetic ones.",
        ),
        click.option(
            "--simplify/--no-simplify", default=None, help="Run onnxslim over the traced graph; default: if installed."
        ),
        click.option(
            "--operators",
            type=click.Choice(OPERATORS),
            default=OPERATORS[0],
            show_default=True,
            help="Of decode and encode: ONNX's own, or our kernels, for onnxruntime on a CPU (--target pip).",
        ),
        click.option(
            "--basis",
            type=click.Choice(BASES),
            default=BASES[0],
            show_default=True,
            help="How a native decode stores the head's basis.",
        ),
        click.option("--opset", type=int, default=OPSET, show_default=True, help="ONNX operator set of the graphs."),
        click.option("--int8", "precision", flag_value="int8", hidden=True, help="The same as --precision int8."),
        click.option("--half", "precision", flag_value="fp16", hidden=True, help="The same as --precision fp16."),
        click.option(
            "--precision",
            type=click.Choice(PRECISIONS),
            default="fp32",
            show_default=True,
            help="Of the regressor; the geometry stays fp32.",
        ),
        click.option("--encoder", type=_FILE, help="A mesh encoder of the head; default: the shipped one, if it fits."),
        click.option("--head", "head_name", help="Head name or file; default: the one the weights were trained for."),
        click.option("--checkpoint", type=_FILE, help="Weights (safetensors); default: the shipped demo weights."),
    ):
        command = option(command)
    return command


def _serving(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--engines", type=click.Path(path_type=Path, file_okay=False), help="TensorRT engines to serve."),
        click.option(
            "--instances",
            type=click.IntRange(min=1),
            default=1,
            show_default=True,
            help="How many of each model run side by side.",
        ),
        click.option(
            "--version",
            type=click.IntRange(min=1),
            default=1,
            show_default=True,
            help="The model version to write and serve; others stay.",
        ),
        click.option(
            "--target",
            type=click.Choice(TARGETS),
            default="ngc",
            show_default=True,
            help="NVIDIA's container (`chebface serve` reads that, too), or a server with the Python backend alone.",
        ),
        click.option(
            "--repository",
            type=click.Path(path_type=Path, file_okay=False),
            default=Path("triton_models"),
            show_default=True,
            help="The model repository to fill.",
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
def onnx(say: Say, output: Path, calib: Path | None, **options: Any) -> tuple[dict[str, Any], str]:
    """Export regressor, decoder, mesh encoder and topology to ONNX and compare them with torch."""
    report = export_onnx(output, say=say, crops_for_calibration=read_crops(calib) if calib else None, **options)
    return report, _summary(report, output)


def _batches(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> list[Any]:
    try:
        return [tuple(int(size) for size in value.split(",")) for value in values]
    except ValueError:
        raise click.BadParameter("expected MIN,BEST,MAX as 1,8,32") from None


def _building(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--timing-cache", type=_FILE, help="Kernel timings to reuse."),
        click.option("--workspace", "workspace_mb", type=int, metavar="MB", help="The most scratch memory of a layer."),
        click.option(
            "--hardware-compatible", is_flag=True, help="For any GPU from Ampere on, somewhat slower; not of RTX."
        ),
        click.option(
            "--version-compatible", is_flag=True, help="Loadable by later releases of the major version; not of RTX."
        ),
        click.option("--flavour", type=click.Choice(["tensorrt", "tensorrt_rtx"]), help="Default: tensorrt on a GPU."),
        click.option(
            "--architecture",
            metavar="SM",
            help="GPU to build for, as sm89; default: this machine's, or for TensorRT-RTX any from Ampere on.",
        ),
        click.option(
            "--batch",
            multiple=True,
            default=[",".join(map(str, BATCH))],
            show_default=True,
            callback=_batches,
            help="Smallest, preferred and largest batch; again for a further optimisation profile.",
        ),
    ):
        command = option(command)
    return command


@main.command()
@click.argument("files", nargs=-1, type=_FILE)
@click.option(
    "--onnx",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("out/export"),
    show_default=True,
    help="Folder of the exported ONNX files, when no FILES are named.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("out/engines"),
    show_default=True,
    help="Folder of the engines and their JSON reports.",
)
@_building
@click.option("--force", is_flag=True, help="Build again even if nothing has changed.")
@_report
def engine(
    say: Say, files: tuple[Path, ...], folder: Path, output: Path, **settings: Any
) -> tuple[dict[str, Any], str]:
    """Compile exported ONNX files to TensorRT engines; TensorRT-RTX needs no GPU for that."""
    if files:
        reports = [build_engine(path, output, say=say, **settings) for path in files]
        report: dict[str, Any] = {"engines": {one["model"]: one for one in reports}, "skipped": {}}
    else:
        report = build_engines(folder, output, say=say, **settings)
    return report, _built(report, output)


def _built(report: dict[str, Any], output: Path) -> str:
    return "\n".join(
        f"{output / one['engine']['file']}: {'built' if one['fresh'] else 'up to date'}, "
        f"{one['engine']['bytes'] / 1e6:.1f} MB, {len(one['layers'])} layers"
        + (f", not run: {one['compared']['skipped']}" if "skipped" in one["compared"] else "")
        for one in report["engines"].values()
    )


@main.command()
@click.option("--check", is_flag=True, help="Change nothing: check the repository as a server would find it.")
@_OUTPUT
@_serving
@_report
def repository(say: Say, check: bool, output: Path, repository: Path, **options: Any) -> tuple[dict[str, Any], str]:
    """Check the exported files and fill the model repository with them.

    The same repository serves in the NGC container (native backends) and under `chebface serve`.
    """
    if check:
        report = verify_repository(repository, say=say)
        return report, f"{report['repository']}: as it should be"
    report = fill_repository(output, repository, say=say, **options)
    return report, _filled(report)


@main.command(name="all")
@_sources
@_OUTPUT
@_serving
@click.option(
    "--engine/--no-engine", "builds", default=None, help="Build TensorRT engines; default: where TensorRT is installed."
)
@_report
def run_all(
    say: Say,
    output: Path,
    calib: Path | None,
    repository: Path,
    builds: bool | None,
    force: bool,
    target: str,
    version: int,
    instances: int,
    engines: Path | None,
    **options: Any,
) -> tuple[dict[str, Any], str]:
    """ONNX files, engines of them beside these, and the repository; what is up to date stays."""
    crops = read_crops(calib) if calib else None
    report = export_onnx(output, say=say, crops_for_calibration=crops, force=force, **options)
    summary = [_summary(report, output)]
    if can_build() if builds is None else builds:
        built = build_engines(output, output / "engines", say=say, force=force)
        report |= built
        summary.append(_built(built, output / "engines"))
    filled = fill_repository(
        output, repository, target=target, version=version, instances=instances, engines=engines, say=say
    )
    return {**report, **filled}, "\n".join([*summary, _filled(filled)])


def _summary(report: dict[str, Any], output: Path) -> str:
    """What was written, and a table: file, precision, size, and how far it is from float32 torch."""
    size = sum(entry["bytes"] for entry in report["files"].values()) / 1e6
    state = f"written in {report['seconds']:.1f} s" if report["fresh"] else "up to date"
    parity, opset = report["parity"], report["inputs"]["opset"]
    limits = " and ".join(f"{limit:g}" for limit in parity["limit_mm"])
    row = "  {:<18}{:<10}{:>7}   {}".format
    lines = [
        f"{output}: {state}, {size:.1f} MB, opset {opset}; mean {parity['mean_mm']:.5f} and at most "
        f"{parity['max_mm']:.5f} mm from torch (limits {limits})",
        row("file", "precision", "MB", "mean / max mm from torch"),
    ]
    for name, entry in report["files"].items():
        proof = _proof(parity["artefacts"].get(name, {}))
        lines.append(row(entry["file"], entry["precision"], f"{entry['bytes'] / 1e6:.1f}", proof).rstrip())
    return "\n".join(lines)


def _proof(artefact: dict[str, float]) -> str:
    if "mean_mm" in artefact:
        return f"{artefact['mean_mm']:.5f} / {artefact['max_mm']:.5f}"
    return f"cosine {artefact['descriptor_min_cosine']:.7f}" if "descriptor_min_cosine" in artefact else ""


def _filled(report: dict[str, Any]) -> str:
    changed = report["changed"]
    return f"{report['repository']}: " + (f"{len(changed)} files written" if changed else "up to date")
