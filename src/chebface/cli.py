"""The `chebface` command. Exit codes: 0 ok, 1 failed, 2 usage or input, 4 missing dependency, 6 server, 130 stopped."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from chebface import __version__, cli_now, cli_serve
from chebface.command import FILE, FOLDER, guarded, json_option, print_json, progress_bar
from chebface.errors import ChebfaceError

if TYPE_CHECKING:
    from chebface.face import Face
    from chebface.pipeline import Pipeline

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(context_settings=_CONTEXT)
@click.version_option(__version__)
def main() -> None:
    """A photograph of a face in, a metric 3D head out."""


@main.command()
@click.argument("photos", nargs=-1, required=True, metavar="PHOTO...")
@click.option("--server", metavar="HOST:PORT", help="Use a Triton server (its gRPC port) instead of this process.")
@click.option("--serve", "serve_here", is_flag=True, help="Start a Triton server for this command, and stop it after.")
@click.option("--repository", type=FOLDER, default=Path("triton_models"), help="What --serve serves.")
@click.option("-o", "--output", type=FOLDER, default=Path("out"), show_default=True, help="Where results go.")
@click.option("--all-faces", is_flag=True, help="Every face of a photo, not only the largest.")
@click.option("--detector", default="auto", show_default=True, help="auto, centerface, or scrfd.")
@click.option("--weights", type=FILE, help="A checkpoint; default: the shipped demo weights.")
@json_option
@guarded
def reconstruct(
    photos: tuple[str, ...],
    server: str | None,
    serve_here: bool,
    repository: Path,
    output: Path,
    all_faces: bool,
    detector: str,
    weights: Path | None,
    as_json: bool,
) -> None:
    """Reconstruct the head in each PHOTO: head.glb, head.obj, head.ply, overlay.png and params.json.

    One photo writes straight into the output folder, several into a folder each. A photo that fails is named and
    does not stop the rest; the exit code is then 1.
    """
    if serve_here and server:
        raise click.UsageError("--serve starts a server of its own; give either that or --server")
    if weights and (server or serve_here):
        raise click.UsageError("--weights is for this process; a server has its own")
    folders = _name_folders(photos, output)
    rows: list[dict[str, Any]] = []
    with (
        _open_pipeline(server, repository if serve_here else None, detector, weights) as pipeline,
        progress_bar("reconstructing") as progress,
    ):
        for done, (photo, folder) in enumerate(zip(photos, folders, strict=True), 1):
            rows.append(_reconstruct_one(pipeline, photo, folder, all_faces))
            progress(done, len(photos))
            if not as_json:
                _say(rows[-1])
    failed = [row for row in rows if "error" in row]
    if as_json:
        print_json({"ok": not failed, "photos": rows})
    elif len(photos) > 1:
        click.echo(f"{len(photos) - len(failed)} of {len(photos)} photos reconstructed")
    if failed:
        sys.exit(failed[0]["exit_code"] if len(photos) == 1 else 1)


def _name_folders(photos: tuple[str, ...], output: Path) -> list[Path]:
    if len(photos) == 1:
        return [output]
    names: list[str] = []
    for photo in photos:
        stem = name = Path(photo).stem
        number = 1
        while name in names:
            number += 1
            name = f"{stem}-{number}"
        names.append(name)
    return [output / name for name in names]


@contextmanager
def _open_pipeline(
    server: str | None, repository: Path | None, detector: str, weights: Path | None
) -> Iterator[Pipeline]:
    if repository:
        from chebface.server import Server, stop_signals

        with stop_signals(), Server(repository) as started:
            click.echo(f"Triton server on {started.url}, ready in {started.started_in_s:.1f} s", err=True)
            with _open_pipeline(started.url, None, detector, weights) as pipeline:
                yield pipeline
    elif server:
        from chebface.client import Client

        with Client(server, detector=detector) as client:
            yield client
    else:
        from chebface.reconstruct import Reconstructor

        yield Reconstructor(weights, detector=detector)


def _reconstruct_one(pipeline: Pipeline, photo: str, folder: Path, all_faces: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"photo": photo}
    try:
        faces = pipeline.reconstruct_all(photo) if all_faces else [pipeline.reconstruct(photo)]
        row["faces"] = []
        for number, face in enumerate(faces):
            files = face.save(folder if number == 0 else folder / f"face-{number + 1}", photo)
            row["faces"].append({"files": {name: str(path) for name, path in files.items()}} | _summarize(face))
    except ChebfaceError as error:
        row |= {"error": type(error).__name__, "message": str(error), "exit_code": error.exit_code}
    except OSError as error:
        row |= {"error": "OSError", "message": f"{folder}: cannot write ({error})", "exit_code": 1}
    return row


def _summarize(face: Face) -> dict[str, Any]:
    size_mm = (face.vertices.max(0) - face.vertices.min(0)) * 1000
    return {
        "found": face.found,
        "detector_score": round(float(face.detection.score), 3),
        "size_mm": [round(float(v)) for v in size_mm],
        "head": face.head["name"],
        "timings_ms": {step: round(ms, 1) for step, ms in face.timings_ms.items()},
    }


def _say(row: dict[str, Any]) -> None:
    if "error" in row:
        click.echo(f"error: {row['message']}", err=True)
        return
    for face in row["faces"]:
        width, height, depth = face["size_mm"]
        steps = ", ".join(f"{step} {ms:g} ms" for step, ms in face["timings_ms"].items())
        click.echo(f"{row['photo']}: head {width} x {height} x {depth} mm on {face['head']} ({steps})")
        for path in face["files"].values():
            click.echo(f"  {path}")
    if len(row["faces"]) < row["faces"][0]["found"]:
        click.echo(f"  the largest of {row['faces'][0]['found']} faces; --all-faces takes every one")


main.add_command(cli_serve.serve)


@main.group()
def head() -> None:
    """The morphable heads: build, import, list, show."""


@head.command()
@json_option
@guarded
def build(as_json: bool) -> None:
    """Make the built-in open head (once; later calls read it from the cache)."""
    from chebface.heads import open_head

    began = time.monotonic()
    made = open_head()
    if as_json:
        print_json({"ok": True, "name": made.name, "version": made.version, "sha256": made.sha256})
    else:
        seconds = time.monotonic() - began
        click.echo(f"{made.name} {made.version} ready in {seconds:.1f} s (sha256 {made.sha256[:12]}, {made.licence})")


@head.command(name="import")
@click.argument("model", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--name", required=True, help="What to call it here, for example flame2020.")
@click.option("--landmarks", type=FILE, required=True, help="landmark_embedding.npy or .npz, or the static one.")
@click.option("--contour", type=FILE, help="flame_dynamic_embedding, when --landmarks is the static one.")
@click.option("--masks", type=FILE, help="FLAME_masks.pkl or .npz.")
@click.option("--texture", type=FILE, help="FLAME_texture.npz.")
@click.option("--uv", type=FILE, help="head_template.obj with texture coordinates.")
@click.option("--licence", help="The terms you have it under; default: FLAME's, research only unless 2023 Open.")
@click.option("--force", is_flag=True, help="Replace a head of this name.")
@guarded
def import_head(
    model: Path,
    name: str,
    landmarks: Path,
    contour: Path | None,
    masks: Path | None,
    texture: Path | None,
    uv: Path | None,
    licence: str | None,
    force: bool,
) -> None:
    """Import an official FLAME file (pickle or npz; read without chumpy and without running any code in it)."""
    from chebface.heads import flame_files, store

    made = flame_files.read_flame(
        model,
        landmarks=landmarks,
        contour=contour,
        masks=masks,
        texture=texture,
        uv=uv,
        name=name,
        licence=licence or flame_files.LICENCE,
    )
    path = store.add(made, name, force=force)
    click.echo(f"{name}: imported to {path}")


@head.command(name="list")
@json_option
@guarded
def list_heads(as_json: bool) -> None:
    """The heads on this machine."""
    from chebface.heads import store

    entries = store.list_heads()
    if as_json:
        print_json([{"name": e.name, "path": str(e.path)} | e.header for e in entries])
        return
    if not entries:
        click.echo("no heads yet; `chebface head build` makes the open one")
    for entry in entries:
        about = (
            entry.header.get("problem")
            or f"{entry.header['name']} {entry.header['version']}, {entry.header['licence']}"
        )
        click.echo(f"{entry.name}: {about}\n  {entry.path}")


@head.command()
@click.argument("name", default="open")
@click.option("-o", "--output", type=FILE, default=Path("out/head.png"), show_default=True, help="The picture.")
@guarded
def show(name: str, output: Path) -> None:
    """Draw a contact sheet of a head: views, components, people, expressions."""
    from chebface.files import whole
    from chebface.heads import open_head, sheet

    with whole(output) as partial:
        sheet.draw(open_head(name)).save(partial, "PNG")
    click.echo(str(output))


@main.group()
def data() -> None:
    """Training data."""


_CONFIG = click.option("--config", type=FILE, help="A TOML file of settings.")
_SET = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="One setting; may be repeated.")


@data.command()
@click.option("-o", "--output", type=FOLDER, required=True, help="Folder of the dataset.")
@_CONFIG
@_SET
@click.option("--workers", type=int, help="Processes; default: one per core.")
@guarded
def synthesize(output: Path, config: Path | None, overrides: tuple[str, ...], workers: int | None) -> None:
    """Make photographs of made-up people whose 486 parameters are known. Interrupted, it goes on where it was."""
    from chebface import config as settings
    from chebface.data import synthetic

    wanted = settings.load(settings.Synthesize, config, overrides)
    with progress_bar("synthesizing") as progress:
        synthetic.synthesize(output, wanted, workers=workers, progress=progress)
    click.echo(f"{output}: {wanted.count} faces")


@data.command()
@click.argument("root", type=FOLDER)
@click.option("--layout", type=click.Choice(["mica"]), default="mica", show_default=True, help="How ROOT is laid out.")
@click.option("--name", "names", multiple=True, help="A dataset, as its folder is called; repeatable. Default: all.")
@click.option("-o", "--output", type=FOLDER, required=True, help="Folder for train/, held-out/ and report.json.")
@_CONFIG
@_SET
@click.option("--workers", type=int, help="Threads; default: one per core.")
@json_option
@guarded
def pack(
    root: Path,
    layout: str,
    names: tuple[str, ...],
    output: Path,
    config: Path | None,
    overrides: tuple[str, ...],
    workers: int | None,
    as_json: bool,
) -> None:
    """Pack folders of photographs whose heads are known (ROOT/NAME/...) into shards for training.

    No actor is in both parts. Interrupted, it goes on where it was. What cannot be used is counted here, and named in
    report.json.
    """
    from chebface import config as settings
    from chebface.data import mica

    wanted = settings.load(settings.Pack, config, overrides)
    with progress_bar("packing") as progress:
        chosen = list(names) or mica.find_names(root)
        report = mica.pack(root, chosen, output, wanted, workers=workers, progress=progress)
    if as_json:
        print_json({"ok": True} | report.to_dict())
        return
    for part, photos in report.photos.items():
        click.echo(f"{output / part}: {photos} photos of {report.actors[part]} actors")
    for kind, count in report.left_out.items():
        first = next(problem for problem in report.problems if problem.kind == kind)
        click.echo(f"left out, {kind}: {count} photos; the first: {first.path}: {first.detail}", err=True)
    if report.problems:
        click.echo(f"all are named in {output / mica.REPORT}", err=True)


@main.group()
def train() -> None:
    """Train networks."""


def _show(progress: Callable[[int, int], None], what: str, total: int) -> Callable[[int, dict[str, Any]], None]:
    """Report training rows: on a terminal the bar moves, elsewhere each row is a line of JSON on stderr."""

    def report(step: int, row: dict[str, Any]) -> None:
        progress(row[what], total)
        if not sys.stderr.isatty():
            click.echo(json.dumps(row), err=True)

    return report


@train.command()
@click.option("--data", "dataset", type=FOLDER, required=True, help="What `chebface data synthesize` wrote.")
@click.option("-o", "--output", type=FOLDER, required=True, help="Folder for log, state and weights.")
@_CONFIG
@_SET
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option(
    "--resume/--no-resume", default=True, show_default=True, help="Go on from the state in the output folder."
)
@guarded
def reconstructor(
    dataset: Path, output: Path, config: Path | None, overrides: tuple[str, ...], device: str, resume: bool
) -> None:
    """Train the network that turns a face into 486 parameters."""
    from chebface import config as settings
    from chebface import train as training

    wanted = settings.load(settings.TrainReconstructor, config, overrides)

    with progress_bar("training") as progress:
        report = _show(progress, "step", wanted.steps)
        path = training.train_reconstructor(wanted, dataset, output, resume=resume, device=device, report=report)
    click.echo(f"{path}: {wanted.steps} steps")


@train.command(name="encoder")
@click.option("--meshes", type=FOLDER, help="Registered meshes to learn from; default: people sampled from the head.")
@click.option("-o", "--output", type=FOLDER, required=True, help="Folder for log, state, weights and error maps.")
@_CONFIG
@_SET
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option("--resume/--no-resume", default=True, show_default=True, help="Go on from the state in the folder.")
@guarded
def train_mesh_encoder(
    meshes: Path | None, output: Path, config: Path | None, overrides: tuple[str, ...], device: str, resume: bool
) -> None:
    """Train the spectral mesh autoencoder, whose encoder is what the 3D-ID loss compares heads by."""
    from chebface import config as settings
    from chebface.checkpoint import load_encoder
    from chebface.train_encoder import train_encoder

    wanted = settings.load(settings.TrainEncoder, config, overrides)
    with progress_bar("training") as progress:
        report = _show(progress, "epoch", wanted.epochs)
        path = train_encoder(wanted, output, meshes=meshes, resume=resume, device=device, report=report)
    model, card = load_encoder(path)
    held_out = card["held_out"]
    click.echo(
        f"{path}: {model.weights} weights; held-out people {held_out['mm']['all']:.2f} mm, "
        f"with as many principal components {held_out['pca_mm']['all']:.2f} mm"
    )


@train.command()
@click.argument("weights", type=FILE, nargs=-1, required=True)
@click.option("-o", "--output", type=FILE, required=True, help="The .safetensors file to write.")
@guarded
def average(weights: tuple[Path, ...], output: Path) -> None:
    """Write the mean of the WEIGHTS of runs that began from the same ones."""
    from chebface import checkpoint

    click.echo(f"{checkpoint.average(weights, output)}: the mean of {len(weights)}")


@train.command()
@click.argument("weights", type=FILE)
@click.option("--held-out", type=FOLDER, required=True, help="Synthetic faces of another seed than the training's.")
@click.option("-o", "--output", type=FILE, required=True, help="The .safetensors file to write.")
@json_option
@guarded
def publish(weights: Path, held_out: Path, output: Path, as_json: bool) -> None:
    """Write WEIGHTS in float16 for shipping, with their held-out errors in the card."""
    from chebface import held_out as holding

    errors = holding.publish(weights, held_out, output)
    if as_json:
        print_json(errors)
    else:
        size = output.stat().st_size / 1e6
        click.echo(f"{output}: {size:.1f} MB, {errors['ratio_face_nonmetrical']:.3f} of the mean head's error")


@main.group()
def weights() -> None:
    """Weights from elsewhere."""


@weights.command(name="import")
@click.argument("file", type=FILE)
@click.option("-o", "--output", type=FILE, required=True, help="The .safetensors file to write.")
@click.option("--head", required=True, help="The head it is for; for MICA's file the FLAME 2020 that you imported.")
@click.option("--backbone", help="Refuse any other than this one.")
@json_option
@guarded
def import_weights(file: Path, output: Path, head: str, backbone: str | None, as_json: bool) -> None:
    """Make a checkpoint of FILE: MICA's mica.tar, or a face recognition network (.pth, .onnx) of arcface_torch or
    insightface. Nothing in it is run; what was taken and what not is said.
    """
    from chebface import foreign

    report = foreign.adopt(file, output, head=head, backbone=backbone)
    if as_json:
        print_json({"ok": True} | report)
        return
    taken = ", ".join(f"{part} ({count} tensors)" for part, count in report["taken"].items())
    click.echo(f"{output}: {report['kind']}, {report['backbone']}; taken: {taken}")
    click.echo(f"untrained: {', '.join(report['untrained'])}")
    for part, why in report["left"].items():
        click.echo(f"left out, {part}: {why}", err=True)
    for note in report["notes"]:
        click.echo(f"note: {note}", err=True)


@main.group()
def evaluate() -> None:
    """Measure."""


@evaluate.command()
@click.option("--weights", type=FILE, help="An encoder checkpoint; default: the shipped one.")
@click.option("--meshes", type=FOLDER, help="Registered meshes; default: people sampled from the encoder's head.")
@click.option("-o", "--output", type=FOLDER, default=Path("out/encoder"), show_default=True, help="For the report.")
@json_option
@guarded
def encoder(weights: Path | None, meshes: Path | None, output: Path, as_json: bool) -> None:
    """What the mesh encoder's code knows: reconstruction, identity, sensitivity; a JSON report with pictures."""
    from chebface.descriptor_report import report

    found = report(weights, output, meshes=meshes)
    if as_json:
        print_json(found)
        return
    for line in found["findings"]:
        click.echo(line)
    click.echo(str(output))


@evaluate.command()
@click.argument("dataset", type=FOLDER)
@click.option("--weights", type=FILE, help="A checkpoint; default: the shipped demo weights.")
@json_option
@guarded
def synthetic(dataset: Path, weights: Path | None, as_json: bool) -> None:
    """Errors on synthetic faces (DATASET of another seed than the training's), against the mean head's."""
    from chebface import held_out

    row = held_out.evaluate(weights, dataset)
    if as_json:
        print_json(row)
    else:
        for name, value in row.items():
            click.echo(f"{name:28} {value}")


for _command in cli_now.COMMANDS:
    evaluate.add_command(_command)
