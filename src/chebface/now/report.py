"""What a benchmark run found, to be read: one self-contained HTML page, and the same as Markdown.

Table 1 of the paper has its one home here.
"""

from __future__ import annotations

import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chebface.errors import AssetError, ChebfaceError, InputError
from chebface.files import write_whole
from chebface.now.dataset import Dataset, Scan
from chebface.now.page import Block, Items, Picture, Table, to_html, to_markdown
from chebface.now.run import ERRORS, PAIRS, SETTINGS, SUMMARY, read_pair
from chebface.render import chart, heat
from chebface.render.view import draw_view

# Median, mean, std in mm, non-metrical and metrical. Source: Xu et al., WWW '24 Companion, Table 1 (NoW test set);
# MICA as its authors retrained it on the part of the data that they had.
Numbers = tuple[float, float, float]
TABLE_1: dict[str, tuple[Numbers | None, Numbers | None]] = {
    "PRNet": ((1.50, 1.98, 1.88), None),
    "Deep3DFaceRecon": ((1.23, 1.54, 1.29), (2.26, 2.90, 2.51)),
    "RingNet": ((1.21, 1.53, 1.31), (1.50, 1.98, 1.77)),
    "DECA": ((1.09, 1.38, 1.18), (1.35, 1.80, 1.64)),
    "FOCUS": ((1.04, 1.30, 1.10), (1.41, 1.85, 1.70)),
    "AlbedoGAN": ((0.98, 1.21, 0.99), None),
    "MICA, same data": ((0.98, 1.21, 1.00), (1.25, 1.51, 1.30)),
    "the paper": ((0.93, 1.15, 0.96), (1.14, 1.45, 1.23)),
}
CURVE_MM, CURVE_STEP_MM = 7.0, 0.01  # the official axis
HEAT_MM = 3.0  # one scale for every report, so that two can be laid side by side
HEAT_PX = 340
HEAT_FILL = 1.12  # of the picture, by the cropped part of the scan
BARE = np.array([0.86, 0.86, 0.86])  # the scan outside the crop


@dataclass(frozen=True, eq=False)
class Report:
    """What `run` left in a folder."""

    folder: Path
    settings: dict[str, Any]
    summary: dict[str, Any]
    pairs: dict[str, Path]  # "<subject>/<challenge>/<image>", without suffix, to its npz


def open_report(folder: str | os.PathLike[str]) -> Report:
    """Open the folder of a run.

    Raises:
        AssetError: no such folder, or not one that a finished run left.
    """
    folder = Path(folder)
    documents = []
    for name in (SETTINGS, SUMMARY):
        try:
            document = json.loads((folder / name).read_text(encoding="utf-8"))
        except OSError as error:
            raise AssetError(
                f"report {folder}: {name} cannot be read ({error.strerror}); give the folder (-o) of a finished "
                "`chebface evaluate now` or `stirling`"
            ) from error
        except ValueError as error:
            raise AssetError(f"report {folder}: {name} is damaged ({error}); run the evaluation again") from error
        if not isinstance(document, dict):
            raise AssetError(f"report {folder}: {name} is damaged (no JSON object); run the evaluation again")
        documents.append(document)
    settings, summary = documents
    if not isinstance(summary.get("challenges"), dict):
        raise AssetError(f"report {folder}: summary.json has no challenges; run the evaluation again")
    lines = [*summary.get("missing", []), *(item["file"] for item in summary.get("unreadable", []))]
    absent = {line[: -len(Path(line).suffix)] for line in lines}  # of which an earlier run may have left a pair
    pairs = {}
    for path in sorted((folder / PAIRS).glob("*/*/*.npz")):
        image = "/".join([*path.parts[-3:-1], path.stem])
        if path.parts[-2] in summary["challenges"] and image not in absent:
            pairs[image] = path
    images = summary["challenges"].get("all", {}).get("images", 0)
    if not pairs or len(pairs) != images:
        raise AssetError(
            f"report {folder}: expected one image at least, and the {images} of summary.json in {PAIRS}, got "
            f"{len(pairs)}; delete {PAIRS} and run the evaluation again"
        )
    return Report(folder, settings, summary, pairs)


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Write report.html, report.md, curve.svg and heat/*.png into the folder of a finished run.

    Args:
        folder: what `run` left: settings, summary and pairs. Scans are read again from where the settings say; where
            that fails the report says so in place of the pictures.

    Returns:
        The path of report.html.

    Raises:
        AssetError: not the folder of a finished run, or a damaged pair.
        OSError: the disk refuses.
    """
    report = open_report(folder)
    facts = _gather(report)
    title = f"{_benchmark(report.settings)}: {report.settings['method']}"
    pictures, note = _heat_maps(report, facts)
    curve = Picture("curve.svg", _curve(facts).encode(), "Percent of scan points below an error, by challenge")
    blocks: list[Block] = [
        *_opening(report),
        "## Errors",
        _by_challenge(report.summary),
        f"## Beside the paper's Table 1, {_kind(report).lower()}",
        *_beside_the_paper(report),
        "## Cumulative error",
        [curve],
        "## Where the error lies",
        *note,
        *pictures,
        "## Refinement",
        *_refinement(facts),
        "## Files",
        *_counts(report),
        "## Settings",
        Items("What was asked", [f"{name}: {_value(value)}" for name, value in report.settings.items()]),
    ]
    for block in blocks:
        for picture in block if isinstance(block, list) else []:
            write_whole(report.folder / picture.file, picture.content)
    write_whole(report.folder / "report.md", to_markdown(title, blocks).encode())
    return write_whole(report.folder / "report.html", to_html(title, blocks).encode())


@dataclass(frozen=True, eq=False)
class _Facts:
    """What the pairs of a run add up to."""

    medians_mm: dict[str, float]  # by image
    counts: dict[str, np.ndarray]  # by challenge: points by ceil(error / CURVE_STEP_MM), the last open
    start_mm: np.ndarray  # (images,) root mean square after the landmarks' Procrustes
    end_mm: np.ndarray  # (images,) after refinement
    scales: np.ndarray  # (images,) mm per unit of the prediction
    mirrored: int  # images in which the official start is a reflection


def _gather(report: Report) -> _Facts:
    top = round(CURVE_MM / CURVE_STEP_MM)
    medians: dict[str, float] = {}
    counts: dict[str, np.ndarray] = {}
    rows = []
    for image, path in report.pairs.items():
        pair = read_pair(path, *ERRORS, "cost", "start_cost", "scale", "rotation")
        distances = pair["distances_mm"].astype(np.float64)
        medians[image] = float(np.median(distances))
        places = np.ceil(np.minimum(distances, CURVE_MM + 1) / CURVE_STEP_MM).astype(np.int64)
        found = np.bincount(np.minimum(places, top + 1), minlength=top + 2)
        for challenge in ("all", image.split("/")[1]):
            counts[challenge] = counts.get(challenge, np.zeros(top + 2, np.int64)) + found
        squares = [float(pair[name]) / len(distances) for name in ("start_cost", "cost")]
        rows.append((*np.sqrt(squares), float(pair["scale"]), np.linalg.det(pair["rotation"]) < 0))
    start, end, scales, mirrored = np.array(rows, np.float64).T
    return _Facts(medians, counts, start, end, scales, int(mirrored.sum()))


def _opening(report: Report) -> list[Block]:
    settings, summary = report.settings, report.summary
    subjects = len({image.split("/")[0] for image in report.pairs})
    text = (
        f"{_kind(report)} error of {settings['method']} on {_benchmark(settings)}: {len(report.pairs)} images of "
        f"{subjects} subjects, {summary['challenges']['all']['vertices']:,} scan points. Each scan point inside the "
        "face counts, with its distance in mm to the nearest point of the predicted surface"
    )
    fitted = "rotation and translation" if settings.get("metrical") else "scale, rotation and translation"
    text += f", after {fitted} were fitted. Made by chebface, commit {summary.get('commit') or 'unknown'}."
    lacking = [f"{len(summary.get(name, []))} {name}" for name in ("missing", "unreadable") if summary.get(name)]
    return [text, *([f"Incomplete: of the predictions, {' and '.join(lacking)}; see Files."] if lacking else [])]


def _by_challenge(summary: dict[str, Any]) -> Table:
    rows = [
        (
            challenge,
            *(f"{row[name]:.3f}" for name in ("median_mm", "mean_mm", "std_mm")),
            f"{row['images']:,}",
            f"{row['vertices']:,}",
        )
        for challenge, row in summary["challenges"].items()
    ]
    strong = list(summary["challenges"]).index("all")
    return Table(("challenge", "median, mm", "mean, mm", "std, mm", "images", "points"), rows, strong)


def _beside_the_paper(report: Report) -> list[Block]:
    if report.settings.get("benchmark") != "now":
        return ["The paper's Table 1 is on NoW; no row of it compares with this benchmark."]
    metrical = bool(report.settings.get("metrical"))
    rows = [
        (name, *(f"{number:.2f}" for number in row[metrical] or ()))
        for name, row in TABLE_1.items()
        if row[metrical] is not None
    ]
    numbers = (f"{report.summary['challenges']['all'][name]:.2f}" for name in ("median_mm", "mean_mm", "std_mm"))
    rows.append((f"{report.settings['method']}, this run", *numbers))
    return [
        Table(("method", "median, mm", "mean, mm", "std, mm"), rows, len(rows) - 1),
        "The paper's rows are for the NoW test set, whose scans are not public; this run is on "
        f"{len(report.pairs)} images of the dataset {report.settings.get('dataset')!r} (scans that one can have are "
        "those of the validation set). Numbers compare only within one set, with all of its images scored. MICA is as "
        "the paper's authors retrained it on their part of its data; published with all of its data it has a "
        "non-metrical median of 0.90, and TokenFace 0.76.",
    ]


def _refinement(facts: _Facts) -> list[Block]:
    worse = int((facts.end_mm > facts.start_mm).sum())
    share = facts.end_mm / np.maximum(facts.start_mm, 1e-12)
    rows = [
        (name, *(f"{number:.4g}" for number in (np.median(values), values.min(), values.max())))
        for name, values in (
            ("root mean square from the landmarks' start, mm", facts.start_mm),
            ("root mean square after refinement, mm", facts.end_mm),
            ("after, as a share of the start", share),
            ("scale, mm per unit of the prediction", facts.scales),
        )
    ]
    text = (
        f"Refinement ended above its start in {worse} of {len(share)} images. The start mirrored {facts.mirrored} of "
        "the meshes: the official one may, where the landmarks fit better so."
    )
    return [Table(("over images", "median", "least", "greatest"), rows), text]


def _counts(report: Report) -> list[Block]:
    summary = report.summary
    unreadable = [f"{item['file']}: {item['error']}" for item in summary.get("unreadable", [])]
    lists = {
        "missing": list(summary.get("missing", [])),
        "extra": list(summary.get("extra", [])),
        "unreadable": unreadable,
        "warnings": list(summary.get("warnings", [])),
    }
    heads = ("scored", *lists)
    numbers = (str(len(report.pairs)), *(str(len(lines)) for lines in lists.values()))
    items = [Items(f"{len(lines)} {name}", lines) for name, lines in lists.items() if lines]
    return [Table(("", *heads), [("predictions", *numbers)]), *items]


def _curve(facts: _Facts) -> str:
    series = {name: 100 * counts[:-1].cumsum() / counts.sum() for name, counts in facts.counts.items()}
    return chart.curves(series, (0.0, CURVE_MM), "error, mm", "scan points, %")


def _heat_maps(report: Report, facts: _Facts) -> tuple[list[Block], list[Block]]:
    """Pictures of the best, the median and the worst image of each challenge, and what is to be said before them."""
    settings = report.settings
    dataset = Dataset(Path(settings.get("dataset_folder", "")), settings.get("benchmark", "now"), (), ())
    chosen: dict[str, list[tuple[str, str]]] = {}
    for challenge in facts.counts:
        images = sorted((i for i in facts.medians_mm if i.split("/")[1] == challenge), key=facts.medians_mm.__getitem__)
        last = len(images) - 1
        ranks = {"best": 0, "median": last // 2, "worst": last} if last > 1 else {"best": 0, "worst": 1}
        if challenge != "all":
            chosen[challenge] = [(rank, images[at]) for rank, at in (ranks if last else {"only": 0}).items()]
    blocks: list[Block] = []
    scans: dict[str, Scan] = {}
    try:
        for challenge, rows in chosen.items():
            pictures = []
            for rank, image in rows:
                subject = image.split("/")[0]
                if subject not in scans:
                    scans[subject] = dataset.scan(subject)
                pair = read_pair(report.pairs[image], *ERRORS)
                content = _png(draw_errors(scans[subject], pair["kept"], pair["distances_mm"]))
                caption = f"{rank}: {image}, median {facts.medians_mm[image]:.2f} mm"
                pictures.append(Picture(f"heat/{challenge}_{rank}.png", content, caption))
            blocks += [f"### {challenge}", pictures]
    except ChebfaceError as error:
        return [], [f"No pictures: a scan cannot be read again. {error}"]
    ramp = heat.colors(np.linspace(0, 1, HEAT_PX)[None].repeat(14, 0), 1.0)
    scale = Picture("heat/scale.png", _png(np.rint(ramp * 255).astype(np.uint8)), f"0 to {HEAT_MM:g} mm and above")
    text = "Scans from the front: the images of least, middle and greatest median error. Grey is outside the crop."
    return blocks, [text, [scale]]


def draw_errors(scan: Scan, kept: np.ndarray, distances_mm: np.ndarray, most: float = HEAT_MM) -> np.ndarray:
    """Draw a scan from the front, its kept vertices (S,) in the colours of their errors (S,), the rest grey.

    The landmarks say where the front is, so the scan may be turned in any way, have holes and lack normals.

    Returns:
        (HEAT_PX, HEAT_PX, 3) uint8.

    Raises:
        InputError: `kept` is not of this scan.
    """
    if not len(kept) or kept.shape != distances_mm.shape or kept.max() >= len(scan.vertices):
        raise InputError(f"kept: expected vertices of a scan of {len(scan.vertices)}, got up to {kept.max(initial=-1)}")
    eyes, mouth = scan.landmarks[:4], scan.landmarks[5:]
    across = (eyes[2] + eyes[3]) - (eyes[0] + eyes[1])  # to the subject's left
    forward = np.cross(across, eyes.mean(0) - mouth.mean(0))
    axes = np.stack([across, np.cross(forward, across), forward], 1)
    points = scan.vertices @ (axes / np.linalg.norm(axes, axis=0))
    low, high = points[kept].min(0), points[kept].max(0)
    albedo = np.tile(BARE, (len(points), 1))
    albedo[kept] = heat.colors(distances_mm, most)
    return draw_view(
        points,
        scan.faces,
        albedo,
        centre=(low + high) / 2,
        span=HEAT_FILL * float((high - low)[:2].max()),
        yaw_deg=0.0,
        size=(HEAT_PX, HEAT_PX),
        shade=0.28,  # shows the form, and keeps the colours
    )


def _kind(report: Report) -> str:
    return "Metrical" if report.settings.get("metrical") else "Non-metrical"


def _benchmark(settings: dict[str, Any]) -> str:
    return {"now": "NoW", "stirling": "Stirling (FG2018)"}.get(settings.get("benchmark", ""), "benchmark")


def _value(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else "-" if value is None else str(value)


def _png(image_u8: np.ndarray) -> bytes:
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(image_u8).save(content, "PNG")
    return content.getvalue()
