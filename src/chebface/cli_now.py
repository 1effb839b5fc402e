"""The benchmarks among the commands of `chebface evaluate`: now, stirling, compare, grid."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from chebface import __version__
from chebface.command import FILE, FOLDER, guarded, json_option, print_json, progress_bar

_UNITS = ("m", "dm", "cm", "mm")
_NOW = ("multiview_neutral", "multiview_expressions", "multiview_occlusions", "selfie")
_STIRLING = ("HQ", "LQ")


def _options(challenges: tuple[str, ...], output: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """What scoring asks, whatever the benchmark."""
    options: list[Callable[[Any], Any]] = [
        click.argument("predictions", type=FOLDER),
        click.option("--dataset", type=FOLDER, required=True, help="The benchmark, as its authors lay it out."),
        click.option(
            "--challenge",
            "challenges",
            type=click.Choice(challenges),
            multiple=True,
            help="Only this one; may be repeated. Default: all.",
        ),
        click.option("--images", type=FILE, help="A list of images instead of the benchmark's own."),
        click.option("--metrical", is_flag=True, help="Keep the predicted size instead of fitting the scale."),
        click.option(
            "--unit",
            type=click.Choice(_UNITS),
            help="Of the predictions (Deep3DFaceReconstruction: dm). Counts with --metrical; default: by their size.",
        ),
        click.option(
            "--landmarks",
            default="files",
            show_default=True,
            metavar="files|embedding|FILE",
            help="The seven landmarks of a mesh: IMAGE.npy or .txt beside it; or from the topology of --head; or a "
            "file of 7 (or 51, 68) vertex numbers; or a FLAME landmark embedding.",
        ),
        click.option("--head", default="open", show_default=True, help="Whose topology --landmarks embedding means."),
        click.option("--method", help="What to call it. Default: the name of the folder PREDICTIONS."),
        click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Processes."),
        click.option("--allow-missing", is_flag=True, help="Missing, extra or unreadable predictions only count."),
        click.option("--predict", "predicts", is_flag=True, help="First write PREDICTIONS with chebface itself."),
        click.option("--weights", type=FILE, help="With --predict: a checkpoint. Default: the shipped demo weights."),
        click.option(
            "--detector", default="auto", show_default=True, help="With --predict: auto, centerface, or scrfd."
        ),
        click.option(
            "-o", "--output", type=FOLDER, default=Path(output), show_default=True, help="Folder of the report."
        ),
        json_option,
    ]

    def apply(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return apply


@click.command(name="now")
@_options(_NOW, "out/now")
@guarded
def now(**options: Any) -> None:
    """Score PREDICTIONS on the NoW benchmark: median, mean and std of scan-to-mesh distances, in mm.

    PREDICTIONS holds <subject>/<challenge>/<image>.obj or .ply, in any topology and unit, as the official tool wants
    them; DATASET holds imagepathsvalidation.txt, NoW_Dataset, scans and scans_lmks_onlypp. A missing, extra or
    unreadable prediction is listed in summary.json and fails the run, unless --allow-missing.

    The report folder gets report.html, report.md, summary.json and the files that the official tool writes. Stopped,
    the same command goes on where it was.

    \b
      chebface evaluate now deca/ --dataset NoW/ --jobs 4 -o out/deca
      chebface evaluate now deep3d/ --dataset NoW/ --landmarks bfm_68.txt --metrical --unit dm -o out/deep3d
      chebface evaluate now ours/ --dataset NoW/ --predict -o out/ours
    """
    _evaluate("now", **options)


@click.command(name="stirling")
@_options(_STIRLING, "out/stirling")
@guarded
def stirling(**options: Any) -> None:
    """Score PREDICTIONS on the Stirling scans of the FG2018 competition, by NoW's protocol.

    The crop is FG2018's (radius 1.2); unlike its script, the alignment by landmarks is refined, as NoW refines it.
    How the data is laid out on disk was never published; expected are, in DATASET:

    \b
      imagepaths.txt             lines <scan>/<HQ or LQ>/<image>.jpg
      scans/**/<scan>.obj        the scans, mm
      annotations/**/<scan>.lnd  from github.com/patrikhuber/fg2018-competition
      images/<line>              only with --predict

    PREDICTIONS and everything else are as in `chebface evaluate now`.
    """
    _evaluate("stirling", **options)


def _evaluate(
    benchmark: str,
    *,
    predictions: Path,
    dataset: Path,
    challenges: tuple[str, ...],
    images: Path | None,
    metrical: bool,
    unit: str | None,
    landmarks: str,
    head: str,
    method: str | None,
    jobs: int,
    allow_missing: bool,
    predicts: bool,
    weights: Path | None,
    detector: str,
    output: Path,
    as_json: bool,
) -> None:
    from chebface.now import landmark_source, open_dataset, score
    from chebface.now.report import write_report

    if weights and not predicts:
        raise click.UsageError("--weights is for --predict")
    asked = open_dataset(dataset, benchmark, challenges, images)
    source = landmark_source(landmarks, head)
    if predicts:
        _predict(asked, predictions, head, weights, detector)
        unit = unit or "m"
    with progress_bar("scoring") as progress:
        summary = score(
            predictions,
            asked,
            output,
            source,
            method=method or predictions.resolve().name,
            metrical=metrical,
            unit=unit,
            jobs=jobs,
            allow_missing=allow_missing,
            progress=progress,
        )
    report = write_report(output)
    if as_json:
        print_json({"ok": True, "report": str(report)} | summary)
        return
    for warning in summary["warnings"]:
        click.echo(f"warning: {warning}", err=True)
    click.echo(f"{'mm':24}{'median':>8}{'mean':>8}{'std':>8}{'images':>8}")
    for name, row in summary["challenges"].items():
        numbers = "".join(f"{row[key]:8.3f}" for key in ("median_mm", "mean_mm", "std_mm"))
        click.echo(f"{name:24}{numbers}{row['images']:8}")
    for what in ("missing", "extra", "unreadable"):
        if summary[what]:
            click.echo(f"{len(summary[what])} {what}: see {output / 'summary.json'}")
    click.echo(str(report))


def _predict(asked: Any, predictions: Path, head: str, weights: Path | None, detector: str) -> None:
    from chebface.errors import AssetError
    from chebface.heads import open_head
    from chebface.now.predict import predict
    from chebface.reconstruct import Reconstructor

    if weights and not weights.is_file():
        raise AssetError(f"weights {weights}: not found; check the path")
    known = hashlib.sha256(weights.read_bytes()).hexdigest()[:12] if weights else f"shipped with {__version__}"
    asset = open_head(head)
    with progress_bar("predicting") as progress:
        record = predict(
            lambda found: Reconstructor(weights, head=asset, detector=found),
            asset,
            asked,
            predictions,
            about={"weights": known},
            detector=detector,
            progress=progress,
        )
    if record["claimed"]:
        click.echo(f"warning: {len(record['claimed'])} faces were placed by the dataset's box alone", err=True)
    for each in record["failed"]:
        click.echo(f"warning: {each['file']}: {each['error']}", err=True)


@click.command(name="compare")
@click.argument("report_a", metavar="A", type=FOLDER)
@click.argument("report_b", metavar="B", type=FOLDER)
@click.option("--rounds", type=click.IntRange(1), default=10_000, show_default=True, help="Of the bootstrap.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the bootstrap.")
@click.option("-o", "--output", type=FOLDER, default=Path("out/compare"), show_default=True, help="For the report.")
@json_option
@guarded
def compare(report_a: Path, report_b: Path, rounds: int, seed: int, output: Path, as_json: bool) -> None:
    """Whether the methods of two report folders differ: a bootstrap, paired over the images that both scored."""
    from chebface.now import compare as comparing

    result = comparing.compare(report_a, report_b, rounds=rounds, seed=seed)
    path = comparing.write_compare(result, output)
    if as_json:
        print_json({"ok": True, "report": str(path)} | result)
        return
    a, b = result["a"]["method"], result["b"]["method"]
    for name, row in result["challenges"].items():
        for what in ("median", "mean"):
            each = row[what]
            line = f"{name} {what}: {a} {each['a_mm']:.3f}, {b} {each['b_mm']:.3f}"
            if each["p"] is None:
                line += ", too few subjects to say more"
            else:
                line += f", difference {each['difference_mm']:+.3f}"
                line += f" [{each['low_mm']:+.3f}, {each['high_mm']:+.3f}], p {each['p']:.4f}"
            click.echo(line)
    click.echo(str(path))


@click.command(name="grid")
@click.argument("photos", nargs=-1, required=True, metavar="PHOTO...")
@click.option(
    "-o",
    "--output",
    type=FILE,
    default=Path("out/grid.png"),
    show_default=True,
    help="The picture.",
)
@click.option("--all-faces", is_flag=True, help="Every face of a photo, not only the largest.")
@click.option("--server", metavar="HOST:PORT", help="Use a Triton server (its gRPC port) instead of this process.")
@click.option("--weights", type=FILE, help="A checkpoint; default: the shipped demo weights.")
@click.option("--detector", default="auto", show_default=True, help="auto, centerface, or scrfd.")
@json_option
@guarded
def grid(
    photos: tuple[str, ...],
    output: Path,
    all_faces: bool,
    server: str | None,
    weights: Path | None,
    detector: str,
    as_json: bool,
) -> None:
    """Draw a row for each PHOTO, as in the paper's Figure 3: input, overlay, shape from the front and from the side.

    A photo that fails gets its row with the reason; the exit code is then 1.
    """
    from chebface.now.grid import grid as draw

    if server and weights:
        raise click.UsageError("--weights is for this process; a server has its own")
    if server:
        from chebface.client import Client

        with Client(server, detector=detector) as client:
            rows = draw(photos, output, client, most=None if all_faces else 1)
    else:
        from chebface.reconstruct import Reconstructor

        rows = draw(photos, output, Reconstructor(weights, detector=detector), most=None if all_faces else 1)
    failed = [row for row in rows if row["error"]]
    if as_json:
        print_json({"ok": not failed, "file": str(output), "photos": rows})
    else:
        for row in failed:
            click.echo(f"error: {row['error']}", err=True)
        click.echo(str(output))
    if failed:
        sys.exit(1)


COMMANDS = (now, stirling, compare, grid)
