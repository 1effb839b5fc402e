"""The export commands. Exit codes: 0 ok, 1 failed, 2 usage, 3 parity, 4 missing dependency, 130 interrupted."""

from __future__ import annotations

import difflib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import click

from chebface.command import INTERRUPTED
from chebface.detect import NAMES as DETECTORS
from chebface.errors import ChebfaceError
from export.benchmark import CASES, benchmark, time_files
from export.calibration import read_calibration
from export.custom import BASES
from export.engines import can_build
from export.graphs import OPSET
from export.parity import DEVICES, ParityError
from export.precision import PRECISIONS
from export.repository import INSTANCES, PHOTO_INSTANCES, TARGETS, fill_repository, verify_repository
from export.to_engine import BATCH, build_engine, build_engines
from export.to_onnx import OPERATORS, export_onnx, open_modules

Say = Callable[[str], None]


class _Names(click.Choice[str]):
    """A choice that also names the closest one to what was typed."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        """The list, and the closest."""
        close = difflib.get_close_matches(str(value), [str(each) for each in self.choices], 1, 0.4)
        return super().get_invalid_choice_message(value, ctx) + (f" Did you mean {close[0]!r}?" if close else "")


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
        failed = report.get("failed", [])
        if as_json:
            click.echo(json.dumps({"ok": not failed, **report}))
        elif not quiet:
            click.echo(summary)
        if failed:
            click.echo(f"error: beyond its limits: {', '.join(failed)}", err=True)
            sys.exit(ParityError.exit_code)

    return command


@contextmanager
def _stages(quiet: bool) -> Iterator[Say]:
    """Something to say each step with: a bar that works while it lasts, then a line of how long it took, on a terminal;
    notes stay, everywhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if quiet:
        yield lambda line: None
        return
    if not console.is_terminal:
        yield lambda line: click.echo(line, err=True) if line.startswith("note:") else None
        return
    columns = BarColumn(24), TimeElapsedColumn(), TextColumn("{task.description}", markup=False)
    with Progress(*columns, console=console, transient=True) as bar:
        stage = bar.add_task("starting", total=None)
        stages = [("starting", time.monotonic())]

        def say(line: str) -> None:
            if line.startswith("note:"):
                console.print(line, markup=False, highlight=False)
                return
            last, began = stages[-1]
            console.print(f"{time.monotonic() - began:7.1f} s  {last}", markup=False, highlight=False)
            stages.append((line, time.monotonic()))
            bar.reset(stage, description=line)

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
        click.option(
            "--device",
            type=_Names(DEVICES),
            default=DEVICES[0],
            show_default=True,
            help="Where files run, and torch when it is timed.",
        ),
        click.option("--force", is_flag=True, help="Make it again even if nothing has changed, or a file was edited."),
        click.option(
            "--calib",
            type=click.Path(path_type=Path),
            help="For int8: calibration.json (or the folder) of an earlier export, for the same ranges; aligned crops, "
            ".npy (n, 112, 112, 3) uint8; or a folder of crops or photographs. Default: synthetic ones.",
        ),
        click.option(
            "--simplify/--no-simplify", default=None, help="Run onnxslim over the traced graph; default: if installed."
        ),
        click.option("--opset", type=int, default=OPSET, show_default=True, help="ONNX operator set of the graphs."),
        click.option("--encoder", type=_FILE, help="A mesh encoder of the head; default: the shipped one, if it fits."),
        click.option("--head", "head_name", help="Head name or file; default: the one the weights were trained for."),
        click.option("--checkpoint", type=_FILE, help="Weights (safetensors); default: the shipped demo weights."),
    ):
        command = option(command)
    return command


def _wishes(command: Callable[..., Any]) -> Callable[..., Any]:
    """Of one export, and its closing table."""
    for option in (
        click.option("--dry-run", is_flag=True, help="Only say whether, and why, files would be exported."),
        click.option(
            "--benchmark/--no-benchmark",
            "timed",
            default=None,
            help="Time each file against torch for the closing table; default: when it was just exported.",
        ),
        click.option(
            "--operators",
            type=_Names(OPERATORS),
            default=OPERATORS[0],
            show_default=True,
            help="Of decode and encode: ONNX's own, or our kernels, for onnxruntime on a CPU (--target pip).",
        ),
        click.option(
            "--basis",
            type=_Names(BASES),
            default=BASES[0],
            show_default=True,
            help="How a native decode stores the head's basis.",
        ),
        click.option("--int8", "precision", flag_value="int8", hidden=True, help="The same as --precision int8."),
        click.option("--half", "precision", flag_value="fp16", hidden=True, help="The same as --precision fp16."),
        click.option(
            "--precision",
            type=_Names(PRECISIONS),
            default="fp32",
            show_default=True,
            help="Of the regressor; the geometry stays fp32.",
        ),
    ):
        command = option(command)
    return command


def _serving(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--engines", type=click.Path(path_type=Path, file_okay=False), help="TensorRT engines to serve."),
        click.option(
            "--detector",
            type=_Names(DETECTORS),
            default="auto",
            show_default=True,
            help="What the server finds faces with, in photos that are sent whole.",
        ),
        click.option(
            "--photo-instances",
            type=click.IntRange(min=1),
            default=PHOTO_INSTANCES,
            show_default=True,
            help="How many such photos are worked on side by side.",
        ),
        click.option(
            "--instances",
            type=click.IntRange(min=1),
            default=INSTANCES,
            show_default=True,
            help="How many of each network run side by side, a thread each: two or more than the server has cores.",
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
            type=_Names(TARGETS),
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


_FACES = click.option(
    "--batch",
    type=click.IntRange(min=1),
    help="Faces in a call: what is timed (default 1), and what engines are to be fastest at, without --profile. "
    "The files take any number.",
)


def _ranges(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> list[Any] | None:
    try:
        return [tuple(int(size) for size in value.split(",")) for value in values] or None
    except ValueError:
        raise click.BadParameter("expected MIN,BEST,MAX as 1,8,32") from None


_PROFILE = click.option(
    "--profile",
    multiple=True,
    metavar="MIN,BEST,MAX",
    callback=_ranges,
    help=f"Smallest, preferred and largest batch of an engine; again for a further optimisation profile.  "
    f"[default: {','.join(map(str, BATCH))}]",
)
_WORKSPACE = click.option(
    "--workspace",
    "workspace_mb",
    type=click.IntRange(min=1),
    metavar="MB",
    help="The most scratch memory of an engine's layer.",
)


def _batches(profile: list[Any] | None, batch: int | None) -> list[Any]:
    return profile or [(1, batch, max(batch, BATCH[2])) if batch else BATCH]


@main.command()
@_sources
@_wishes
@_FACES
@_OUTPUT
@_report
def onnx(say: Say, output: Path, batch: int | None, timed: bool | None, **options: Any) -> tuple[dict[str, Any], str]:
    """Export regressor, decoder, mesh encoder and topology to ONNX and compare them with torch."""
    return _export(say, output, batch, timed, **options)


def _export(
    say: Say, output: Path, batch: int | None, timed: bool | None, calib: Path | None, **options: Any
) -> tuple[dict[str, Any], str]:
    report = export_onnx(output, say=say, **(read_calibration(calib) if calib else {}), **options)
    if options["dry_run"]:
        because = report["because"]
        return report, f"{output}: {f'would be exported: {because}' if because else 'up to date'}"
    if report["fresh"] if timed is None else timed:
        say("timing each file and torch in turns")
        modules = open_modules(*(options[key] for key in ("checkpoint", "head_name", "encoder")))
        speed = time_files(output, report["files"], modules, batch=batch or 1, device=options["device"])
        report |= {"latency": {"batch": batch or 1, "device": options["device"], "files": speed}}
    return report, _summary(report, output)


def _building(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--timing-cache", type=_FILE, help="Kernel timings to reuse."),
        click.option(
            "--hardware-compatible", is_flag=True, help="For any GPU from Ampere on, somewhat slower; not of RTX."
        ),
        click.option(
            "--version-compatible", is_flag=True, help="Loadable by later releases of the major version; not of RTX."
        ),
        click.option("--flavour", type=_Names(["tensorrt", "tensorrt_rtx"]), help="Default: tensorrt on a GPU."),
        click.option(
            "--architecture",
            metavar="SM",
            help="GPU to build for, as sm89; default: this machine's, or for TensorRT-RTX any from Ampere on.",
        ),
        _WORKSPACE,
        _PROFILE,
        _FACES,
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
    say: Say,
    files: tuple[Path, ...],
    folder: Path,
    output: Path,
    batch: int | None,
    profile: list[Any] | None,
    **settings: Any,
) -> tuple[dict[str, Any], str]:
    """Compile exported ONNX files to TensorRT engines; TensorRT-RTX needs no GPU for that."""
    settings["batch"] = _batches(profile, batch)
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
@_wishes
@_FACES
@_PROFILE
@_WORKSPACE
@_OUTPUT
@_serving
@click.option(
    "--engine/--no-engine", "builds", default=None, help="Build TensorRT engines; default: where TensorRT is installed."
)
@_report
def run_all(
    say: Say,
    output: Path,
    batch: int | None,
    timed: bool | None,
    profile: list[Any] | None,
    workspace_mb: int | None,
    repository: Path,
    builds: bool | None,
    target: str,
    version: int,
    instances: int,
    photo_instances: int,
    detector: str,
    engines: Path | None,
    **options: Any,
) -> tuple[dict[str, Any], str]:
    """ONNX files, engines of them beside these, and the repository; what is up to date stays."""
    report, told = _export(say, output, batch, timed, **options)
    if options["dry_run"]:
        return report, told
    summary = [told]
    if can_build() if builds is None else builds:
        settings = {"batch": _batches(profile, batch), "workspace_mb": workspace_mb, "force": options["force"]}
        built = build_engines(output, output / "engines", say=say, **settings)
        report |= built
        summary.append(_built(built, output / "engines"))
    filled = fill_repository(
        output,
        repository,
        target=target,
        version=version,
        instances=instances,
        photo_instances=photo_instances,
        detector=detector,
        engines=engines,
        say=say,
    )
    return {**report, **filled}, "\n".join([*summary, _filled(filled)])


@main.command(name="benchmark")
@_sources
@click.option(
    "--model", type=_Names(CASES), default=CASES[0], show_default=True, help="What to measure; reconstruct is all."
)
@click.option(
    "--precision",
    "precisions",
    type=_Names(PRECISIONS),
    multiple=True,
    help="Only this one; again for another. Default: all.",
)
@_FACES
@_PROFILE
@_WORKSPACE
@click.option("--threads", type=click.IntRange(min=1), help="Of torch, onnxruntime, OpenVINO; default: as torch's.")
@click.option("--seconds", type=float, default=0.5, show_default=True, help="Of each row.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("out/benchmark"),
    show_default=True,
    help="Folder of the exports, one folder each, and benchmark.json.",
)
@_report
def run_benchmark(
    say: Say,
    output: Path,
    batch: int | None,
    profile: list[Any] | None,
    precisions: tuple[str, ...],
    calib: Path | None,
    **options: Any,
) -> tuple[dict[str, Any], str]:
    """Every installed format of a model: size, error against torch in mm, median time here, times faster than torch."""
    report = benchmark(
        output,
        precisions=precisions or PRECISIONS,
        batch=batch or 1,
        profile=_batches(profile, batch),
        say=say,
        **(read_calibration(calib) if calib else {}),
        **options,
    )
    return report, _compared(report)


def _compared(report: dict[str, Any]) -> str:
    size, rows = report["crops"]["count"], report["rows"]
    lines = [
        f"{report['model']}, batch {report['batch']}, {report['device']}, {report['threads']} threads; error against "
        f"float32 torch on {size} held-out crops; ratio: torch's time over this one's"
    ]
    heads = ("format", "precision", "MB", "mean / max mm", "p50 ms", "ratio", "")
    cells = [heads] + [
        (
            row["format"],
            row["precision"],
            f"{row['mb']:.1f}" if "mb" in row else "",
            "reference" if row["format"] == "torch" else _proof(row),
            f"{row['p50_ms']:.3f}" if "p50_ms" in row else "",
            f"{row['ratio']:.2f}" if "ratio" in row else "",
            row.get("note", ""),
        )
        for row in rows
    ]
    return "\n".join([*lines, *_table(cells)])


def _table(cells: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as they must be; the last one runs free."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]) - 1)]
    return [
        "  " + "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in cells
    ]


def _summary(report: dict[str, Any], output: Path) -> str:
    """What was written, and a table: file, precision, size, how far from float32 torch, how fast."""
    size = sum(entry["bytes"] for entry in report["files"].values()) / 1e6
    state = f"written in {report['seconds']:.1f} s" if report["fresh"] else "up to date"
    parity, opset = report["parity"], report["inputs"]["opset"]
    limits = " and ".join(f"{limit:g}" for limit in parity["limit_mm"])
    lines = [
        f"{output}: {state}, {size:.1f} MB, opset {opset}; mean {parity['mean_mm']:.5f} and at most "
        f"{parity['max_mm']:.5f} mm from torch (limits {limits})",
    ]
    speed = report.get("latency", {}).get("files")
    heads = ("file", "precision", "MB", "mean / max mm from torch", *(("p50 ms", "x torch") if speed else ()), "")
    cells = [heads]
    for name, entry in report["files"].items():
        row = (
            entry["file"],
            entry["precision"],
            f"{entry['bytes'] / 1e6:.1f}",
            _proof(parity["artefacts"].get(name, {})),
        )
        time_ms = (speed or {}).get(name, {})
        figures = (f"{time_ms['p50_ms']:.3f}", f"{time_ms['ratio']:.2f}") if "ratio" in time_ms else ("", "")
        cells.append((*row, *(figures if speed else ()), time_ms.get("note", "")))
    if speed:
        lines[0] += f"; onnxruntime on {report['latency']['device']}, batch {report['latency']['batch']}"
    return "\n".join([*lines, *_table(cells)])


def _proof(artefact: dict[str, float]) -> str:
    if "mean_mm" in artefact:
        return f"{artefact['mean_mm']:.5f} / {artefact['max_mm']:.5f}"
    return f"cosine {artefact['descriptor_min_cosine']:.7f}" if "descriptor_min_cosine" in artefact else ""


def _filled(report: dict[str, Any]) -> str:
    changed = report["changed"]
    return f"{report['repository']}: " + (f"{len(changed)} files written" if changed else "up to date")
