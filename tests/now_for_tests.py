"""A NoW dataset in the official layout, filled with scans made here, and predictions for it.

The scans are a head's surface in another topology, in mm: dense, noisy, with holes, with strands of hair that stand
off the skin, turned and moved at random. The predictions are the same people, as wrong as one asks for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from chebface.heads import Head
from chebface.mesh import write_obj, write_ply

CHALLENGES = ("multiview_neutral", "multiview_expressions", "multiview_occlusions", "selfie")
SEVEN = (19, 22, 25, 28, 16, 31, 37)  # of the 51 inner landmarks
UNIT_MM = {"m": 1000.0, "dm": 100.0, "cm": 10.0, "mm": 1.0}
PICTURE = (60, 80)  # height, width
BOX = {"left": 21.0, "top": 12.0, "right": 55.0, "bottom": 46.0}


@dataclass(frozen=True, eq=False)
class NowForTests:
    """What was written, and the truth behind it."""

    folder: Path
    head: Head
    lines: tuple[str, ...]  # of imagepathsvalidation.txt: <subject>/<challenge>/<image>.jpg
    people: dict[str, np.ndarray]  # subject -> (N, 3) m: the true head, in the head's frame
    rotations: dict[str, np.ndarray]  # scan = 1000 * rotation @ head + translation
    translations_mm: dict[str, np.ndarray]


def seven_of(head: Head, vertices: np.ndarray) -> np.ndarray:
    """The seven NoW landmarks (7, 3) on vertices (N, 3) of a head."""
    triangles = head.faces[head.landmark_triangles[17:][list(SEVEN)]]
    return np.einsum("pk,pkc->pc", head.landmark_barycentric[17:][list(SEVEN)].astype(np.float64), vertices[triangles])


def make_now_dataset(
    folder: Path,
    head: Head,
    *,
    subjects: int = 2,
    images: int = 1,
    challenges: tuple[str, ...] = CHALLENGES,
    rounds: int = 2,
    noise_mm: float = 0.1,
    holes: int = 3,
    hairs: int = 12,
    seed: int = 0,
    colors: bool = True,
) -> NowForTests:
    """Write `images` pictures per challenge of each subject; a scan has about 3 * 4**rounds triangles per triangle of
    the head. The second subject's scan is a vertex-coloured OBJ."""
    rng = np.random.default_rng(seed)
    release = folder / "NoW_Dataset" / "final_release_version"
    lines, people, rotations, translations = [], {}, {}, {}
    for number in range(subjects):
        subject = f"FaMoS_{number:06}_TA"
        weights = np.clip(rng.normal(size=len(head.shape_dirs)), -2, 2)
        people[subject] = head.template + np.einsum("k,knc->nc", weights, head.shape_dirs.astype(np.float64))
        rotations[subject] = random_rotation(rng)
        translations[subject] = rng.normal(size=3) * 80
        vertices, faces = make_scan(people[subject], head.faces, rounds, noise_mm, holes, hairs, rng)
        turned = vertices @ rotations[subject].T + translations[subject]
        marks = 1000 * seven_of(head, people[subject]) @ rotations[subject].T + translations[subject]
        tints = rng.random((len(turned), 3)) if colors and number == 1 else None
        write_obj(folder / "scans" / subject / "natural_head_rotation.000001.obj", turned, faces, tints)
        write_pp(folder / "scans_lmks_onlypp" / subject / "natural_head_rotation.000001_picked_points.pp", marks)
        for challenge in challenges:
            for _ in range(images):
                line = f"{subject}/{challenge}/IMG_{len(lines):04}.jpg"
                lines.append(line)
                picture = rng.integers(0, 256, (*PICTURE, 3), np.uint8)
                path = release / "iphone_pictures" / line
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(path, "JPEG")
                write_box((release / "detected_face" / line).with_suffix(".npy"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "imagepathsvalidation.txt").write_text("".join(f"{line}\n" for line in lines))
    return NowForTests(folder, head, tuple(lines), people, rotations, translations)


def make_predictions(
    folder: Path,
    dataset: NowForTests,
    *,
    off_mm: float = 0.5,
    unit: str = "m",
    kind: str = "obj",
    landmarks: str | None = "npy",
    similar: bool = False,
    seed: int = 0,
) -> Path:
    """Write a mesh and seven landmarks for every image: the truth, smoothly deformed by off_mm (root mean square).

    Args:
        unit: of the coordinates: m, dm, cm or mm.
        kind: obj or ply.
        landmarks: npy, txt, or None for none beside the mesh.
        similar: under a random similarity, which only the non-metrical error forgives.
    """
    rng = np.random.default_rng(seed)
    head = dataset.head
    for line in dataset.lines:
        vertices = dataset.people[line.split("/", maxsplit=1)[0]]
        bumps = np.einsum("k,knc->nc", rng.normal(size=len(head.shape_dirs)), head.shape_dirs.astype(np.float64))
        vertices = vertices + bumps * off_mm / 1000 / np.sqrt((bumps**2).sum(1).mean())
        if similar:
            vertices = rng.uniform(0.5, 2.0) * vertices @ random_rotation(rng).T + rng.normal(size=3) * 0.1
        write_prediction(folder, line, head, vertices * (UNIT_MM[unit] ** -1 * 1000), kind=kind, landmarks=landmarks)
    return folder


def write_prediction(
    folder: Path, line: str, head: Head, vertices: np.ndarray, *, kind: str = "obj", landmarks: str | None = "npy"
) -> Path:
    """One prediction: the mesh, and beside it the seven landmarks."""
    path = (folder / line).with_suffix(f".{kind}")
    (write_ply if kind == "ply" else write_obj)(path, vertices, head.faces)
    marks = seven_of(head, vertices)
    if landmarks == "npy":
        np.save(path.with_suffix(".npy"), marks)
    elif landmarks == "txt":
        path.with_suffix(".txt").write_text("\n".join(" ".join(f"{v:.8g}" for v in row) for row in marks.tolist()))
    return path


def write_pp(path: Path, points: np.ndarray) -> Path:
    """MeshLab's picked points: eight lines of header, then a point per line, then two points nobody wants."""
    path.parent.mkdir(parents=True, exist_ok=True)
    spare = [points.mean(0) + 40, points.mean(0) - 40]
    rows = [
        "<!DOCTYPE PickedPoints>",
        "<PickedPoints>",
        " <DocumentData>",
        '  <DateTime time="12:00:00" date="2018-04-24"/>',
        '  <User name="nobody"/>',
        '  <DataFileName name="natural_head_rotation.000001.obj"/>',
        '  <templateName name=""/>',
        " </DocumentData>",
        *(f' <point x="{x:.7g}" y="{y:.7g}" z="{z:.7g}" name="{k}" active="1"/>'
          for k, (x, y, z) in enumerate([*points, *spare])),
        "</PickedPoints>",
    ]  # fmt: skip
    path.write_text("\n".join(rows) + "\n")
    return path


def write_box(path: Path, **edges: float) -> Path:
    """A face box as NoW has it: a dictionary in a pickled npy."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.array(BOX | edges, dtype=object), allow_pickle=True)
    return path


def random_rotation(rng: np.random.Generator) -> np.ndarray:
    """(3, 3), uniform."""
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q *= np.sign(np.diag(r))
    return q if np.linalg.det(q) > 0 else q[:, [1, 0, 2]]


def make_scan(
    vertices: np.ndarray,
    faces: np.ndarray,
    rounds: int,
    noise_mm: float,
    holes: int,
    hairs: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """A scan (V, 3) mm, (M, 3) of a head (N, 3) m: its surface with new vertices at random places, the old ones kept,
    in random order, noisy, with holes, and with strands of hair above the brows."""
    points, triangles = np.asarray(vertices, np.float64) * 1000, np.asarray(faces, np.int64)
    for _ in range(rounds):
        points, triangles = _halve_edges(points, triangles)
    points, triangles = _split(points, triangles, rng)
    middle, size = points.mean(0), np.ptp(points, axis=0)
    points = points + rng.normal(size=points.shape) * noise_mm
    front = np.flatnonzero(points[:, 2] > middle[2] + 0.2 * size[2])
    gone = np.zeros(len(points), bool)
    for at in points[rng.choice(front, holes)]:
        gone |= np.linalg.norm(points - at, axis=1) < rng.uniform(2, 5)
    triangles = triangles[~gone[triangles].any(1)]
    brow = front[points[front, 1] > middle[1] + 0.15 * size[1]]
    roots = points[rng.choice(brow, hairs)]
    lift = roots - middle
    lift /= np.linalg.norm(lift, axis=1, keepdims=True)
    ends = roots + lift * rng.uniform(5, 30, (hairs, 1))
    strands = np.stack([roots + lift * 3, ends, ends + rng.normal(size=ends.shape)], 1).reshape(-1, 3)
    triangles = np.concatenate([triangles, len(points) + np.arange(3 * hairs).reshape(-1, 3)])
    points = np.concatenate([points, strands])
    used = rng.permutation(np.unique(triangles))
    place = np.empty(len(points), np.int64)
    place[used] = np.arange(len(used))
    return points[used], place[triangles].astype(np.int32)


def _halve_edges(points: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every triangle in four."""
    sides = np.sort(faces[:, [[0, 1], [1, 2], [2, 0]]], axis=2)
    edges, place = np.unique(sides.reshape(-1, 2), axis=0, return_inverse=True)
    ab, bc, ca = (len(points) + place.reshape(-1, 3)).T
    a, b, c = faces.T
    quarters = [(a, ab, ca), (ab, b, bc), (ca, bc, c), (ab, bc, ca)]
    return np.concatenate([points, points[edges].mean(1)]), np.concatenate([np.stack(q, 1) for q in quarters])


def _split(points: np.ndarray, faces: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Every triangle in three, about a random point in it."""
    weights = rng.dirichlet((2, 2, 2), len(faces))
    a, b, c = faces.T
    m = len(points) + np.arange(len(faces))
    inner = np.einsum("mk,mkc->mc", weights, points[faces])
    return np.concatenate([points, inner]), np.concatenate([np.stack(t, 1) for t in ((a, b, m), (b, c, m), (c, a, m))])
