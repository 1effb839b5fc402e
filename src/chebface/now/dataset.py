"""Where NoW and Stirling (FG2018) keep things, and the predictions of any method for them.

NoW, as its official tool reads it (github.com/soubhiksanyal/now_evaluation):

    imagepathsvalidation.txt                                     lines <subject>/<challenge>/<image>.jpg
    scans/<subject>/*.obj                                        mm
    scans_lmks_onlypp/<subject>/*.pp                             MeshLab's picked points, mm
    NoW_Dataset/final_release_version/iphone_pictures/<line>
    NoW_Dataset/final_release_version/detected_face/<line>.npy   the face's box, a pickled dictionary

Stirling is published as scans (mm), photographs of high and low quality, and, with the script of the FG2018
competition (github.com/patrikhuber/fg2018-competition), annotations/**/<scan>.lnd: seven rows of number, x, y, z. How
the rest is laid out on disk is nowhere said. Assumed here, so that predictions look like NoW's:

    imagepaths.txt                                               lines <scan>/<HQ or LQ>/<image>.jpg
    scans/**/<scan>.obj, annotations/**/<scan>.lnd               upper and lower case are the same
    images/<line>, detected_face/<line>.npy                      only to predict; a box is optional

Predictions: <subject>/<challenge>/<image>.obj or .ply.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from chebface.errors import AssetError, InputError
from chebface.heads import Head, open_head
from chebface.heads.unpickle import read_named
from chebface.mesh import Mesh, read_obj, read_ply
from chebface.now.metric import LANDMARKS_51, NOW_RADIUS, STIRLING_RADIUS

UNITS_MM = {"m": 1000.0, "dm": 100.0, "cm": 10.0, "mm": 1.0}
EYES_MM = (30.0, 300.0)  # no face has its outer eye corners nearer or farther; a decade, so it tells units apart
BOX_KEYS = ("left", "top", "right", "bottom")
_MESHES = (".obj", ".ply")  # the official tool takes the first that is there
_INNER = 51  # of the 68 landmarks, those after the jaw line
_PP_LINES = slice(8, 15)  # of the file: where the official tool looks, behind MeshLab's header of eight lines


@dataclass(frozen=True)
class Layout:
    """What differs between the benchmarks."""

    images: str  # the list of images
    challenges: tuple[str, ...]
    radius: float  # of the crop, see metric.crop_scan
    pictures: str
    boxes: str


LAYOUTS = {
    "now": Layout(
        "imagepathsvalidation.txt",
        ("multiview_neutral", "multiview_expressions", "multiview_occlusions", "selfie"),
        NOW_RADIUS,
        "NoW_Dataset/final_release_version/iphone_pictures",
        "NoW_Dataset/final_release_version/detected_face",
    ),
    "stirling": Layout("imagepaths.txt", ("HQ", "LQ"), STIRLING_RADIUS, "images", "detected_face"),
}


@dataclass(frozen=True)
class Shot:
    """One image of a benchmark."""

    subject: str
    challenge: str
    file: str

    @property
    def line(self) -> str:
        """How the official list names it."""
        return f"{self.subject}/{self.challenge}/{self.file}"

    @property
    def stem(self) -> str:
        """<subject>/<challenge>/<image without ending>: where predictions and results lie."""
        return self.line[: -len(Path(self.file).suffix)]


@dataclass(frozen=True, eq=False)
class Scan:
    """A scanned face and its seven landmarks, mm."""

    vertices: np.ndarray  # (V, 3) float64
    faces: np.ndarray  # (M, 3) int32
    landmarks: np.ndarray  # (7, 3) float64


@dataclass(frozen=True, eq=False)
class Dataset:
    """A benchmark on disk."""

    folder: Path
    benchmark: str  # "now" or "stirling"
    shots: tuple[Shot, ...]  # all of the list, in its order
    challenges: tuple[str, ...]  # those asked for

    @property
    def layout(self) -> Layout:
        """Where things are."""
        return LAYOUTS[self.benchmark]

    @property
    def asked(self) -> list[Shot]:
        """The images of the challenges asked for."""
        return [shot for shot in self.shots if shot.challenge in self.challenges]

    def scan_files(self, subject: str) -> tuple[Path, Path]:
        """The scan of a subject and its landmarks.

        Raises:
            AssetError: there is not exactly one of either.
        """
        if self.benchmark == "now":
            scans, marks = self.folder / "scans" / subject, self.folder / "scans_lmks_onlypp" / subject
            return _only(scans, scans.glob("*.obj"), "*.obj"), _only(marks, marks.glob("*.pp"), "*.pp")
        return tuple(  # type: ignore[return-value]
            _only(
                self.folder / name,
                (p for p in (self.folder / name).rglob(f"*{end}") if p.stem.casefold() == subject.casefold()),
                f"{subject}{end}",
            )
            for name, end in (("scans", ".obj"), ("annotations", ".lnd"))
        )

    def scan(self, subject: str) -> Scan:
        """Read the scan of a subject and its landmarks.

        Raises:
            AssetError: as `scan_files` and `read_scan`.
        """
        return read_scan(*self.scan_files(subject))

    def picture(self, shot: Shot) -> Path:
        """The photograph."""
        return self.folder / self.layout.pictures / shot.line

    def box(self, shot: Shot) -> np.ndarray | None:
        """Where the benchmark says the face is: (4,) left, top, right, bottom in pixels; None where it says nothing.

        Raises:
            AssetError: the file is missing from NoW, or is not a box.
        """
        path = self.folder / self.layout.boxes / f"{shot.stem}.npy"
        return None if self.benchmark == "stirling" and not path.exists() else read_box(path)


def open_dataset(
    folder: str | Path, benchmark: str = "now", challenges: Iterable[str] = (), images: str | Path | None = None
) -> Dataset:
    """Read the list of images of a benchmark.

    Args:
        folder: the root, see the layouts above.
        benchmark: "now" or "stirling".
        challenges: which to score; none means all.
        images: a list instead of the benchmark's own.

    Raises:
        InputError: no such benchmark or challenge.
        AssetError: the list is missing, empty, or has a line that is no image.
    """
    folder, challenges = Path(folder), tuple(challenges)
    if benchmark not in LAYOUTS:
        raise InputError(f"benchmark: expected one of {', '.join(LAYOUTS)}, got {benchmark!r}")
    layout = LAYOUTS[benchmark]
    if wrong := sorted(set(challenges) - set(layout.challenges)):
        raise InputError(f"challenge: expected some of {', '.join(layout.challenges)}, got {', '.join(wrong)}")
    path = folder / layout.images if images is None else Path(images)
    shots = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        parts = line.strip().split("/")[-3:]
        if len(parts) < 3 or any(part in ("", ".", "..") for part in parts) or not Path(parts[2]).suffix:
            raise AssetError(f"{path}: line {number}: expected <subject>/<challenge>/<image>.jpg, got {line[:80]!r}")
        shots.append(Shot(*parts))
    if twice := sorted({shot.line for shot in shots if shots.count(shot) > 1}):
        raise AssetError(f"{path}: expected each image once, got {twice[0]} again; repair the list")
    dataset = Dataset(folder, benchmark, tuple(shots), challenges or layout.challenges)
    if not dataset.asked:
        raise AssetError(f"{path}: has no image of {', '.join(dataset.challenges)}; check that it is the right list")
    return dataset


def read_scan(path: Path, marks: Path) -> Scan:
    """Read a scan, with or without vertex colours, and its landmarks (.pp or .lnd).

    Raises:
        AssetError: a file is missing, damaged, without faces, or has too few landmarks.
    """
    mesh = read_obj(path)
    if not len(mesh.faces):
        raise AssetError(f"scan {path}: has no faces, it is a cloud of points; export it with its triangles")
    return Scan(mesh.vertices, mesh.faces, read_pp(marks) if marks.suffix == ".pp" else read_lnd(marks))


def read_pp(path: str | Path) -> np.ndarray:
    """The seven landmarks of a MeshLab picked-points file.

    As the official tool has it, they are what stands on lines 9 to 15 of the file, which are the first seven points
    behind MeshLab's header. A file with another header is read when it has seven points and no more.

    Returns:
        (7, 3) float64, mm: right outer eye, right inner, left inner, left outer, nose bottom, right and left mouth.

    Raises:
        AssetError: missing, other points than these, or coordinates that are not finite numbers.
    """
    path = Path(path)
    lines = [re.findall(r"<point\b([^>]*)>", line) for line in _text(path).splitlines()]
    rows, everything = [row[0] for row in lines[_PP_LINES] if len(row) == 1], [point for row in lines for point in row]
    if len(rows) < 7:
        if len(everything) != 7:
            raise AssetError(
                f"landmarks {path}: expected seven points on lines 9 to 15, got {len(rows)} there and "
                f"{len(everything)} in all; pick the seven again"
            )
        rows = everything
    points = []
    for row in rows:
        found = dict(re.findall(r"\b([xyz])\s*=\s*[\"']([^\"']*)[\"']", row))
        try:
            points.append([float(found[axis]) for axis in "xyz"])
        except (KeyError, ValueError) as error:
            raise AssetError(f"landmarks {path}: a point without x, y, z: {row.strip()[:80]!r}") from error
    return _finite(path, np.array(points))


def read_lnd(path: str | Path) -> np.ndarray:
    """The seven landmarks (7, 3) float64, mm, of an FG2018 annotation: rows of number, x, y, z.

    Raises:
        AssetError: missing, other than seven rows, or not finite numbers.
    """
    rows = _numbers(Path(path))
    if rows.shape != (7, 4):
        raise AssetError(f"landmarks {path}: expected seven rows of number, x, y, z, got {rows.shape}")
    return _finite(Path(path), rows[:, 1:])


def read_box(path: str | Path) -> np.ndarray:
    """A NoW face box: (4,) float64 left, top, right, bottom in pixels. The file is a pickle, read without running it.

    Raises:
        AssetError: missing, damaged, or not a box.
        UnsafeFileError: the pickle asks for more than arrays.
    """
    record = read_named(Path(path))
    try:
        box = np.array([float(record[key]) for key in BOX_KEYS])
    except (KeyError, TypeError, ValueError) as error:
        raise AssetError(f"box {path}: expected numbers named {', '.join(BOX_KEYS)}, got {sorted(record)}") from error
    if not np.isfinite(box).all() or (box[2:] <= box[:2]).any():
        raise AssetError(f"box {path}: expected left < right and top < bottom, got {box.tolist()}")
    return box


@dataclass(frozen=True, eq=False)
class LandmarkSource:
    """Where the seven landmarks of a prediction come from."""

    name: str  # for the record; two of one name give the same landmarks
    corners: np.ndarray | None = None  # (7, 3) vertices
    triangles: np.ndarray | None = None  # (7,) faces, instead of corners
    weights: np.ndarray | None = None  # (7, 3) of the corners; None: landmarks come from files
    faces: np.ndarray | None = None  # (M, 3): the topology it is for; None is any

    def read(self, path: Path, mesh: Mesh) -> np.ndarray:
        """The landmarks (7, 3) of the prediction at path.

        Raises:
            AssetError: no landmark file, or the mesh has another topology.
        """
        if self.weights is None:
            return _read_beside(path)
        try:
            return self.locate(mesh.vertices, mesh.faces)
        except AssetError as error:
            raise AssetError(f"prediction {path}: {error}") from error

    def locate(self, vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
        """The landmarks (7, 3) on vertices (N, 3) and faces (M, 3).

        Raises:
            AssetError: the mesh has another topology, or landmarks are read from files.
        """
        if self.faces is not None and not _same_topology(faces, self.faces):
            raise AssetError(
                f"its {len(faces)} triangles are not those of {self.name}; name the head it was made with "
                "(`chebface head import`, then --head), or give landmark files or vertex numbers"
            )
        if self.weights is None:
            raise AssetError("landmarks are read from files here, not found on meshes")
        wanted, limit = (self.triangles, len(faces)) if self.corners is None else (self.corners, len(vertices))
        if wanted is not None and wanted.max() >= limit:
            raise AssetError(f"{self.name} wants number {wanted.max()}, the mesh has {limit}")
        corners = faces[self.triangles] if self.corners is None else self.corners
        return np.einsum("pk,pkc->pc", self.weights, np.asarray(vertices, np.float64)[corners])


def head_landmarks(head: Head) -> LandmarkSource:
    """The seven landmarks on meshes of a head's topology."""
    inner = len(head.landmark_triangles) - _INNER + np.array(LANDMARKS_51)
    return LandmarkSource(
        f"head {head.name} {head.sha256[:12]}",
        corners=head.faces[head.landmark_triangles[inner]],
        weights=head.landmark_barycentric[inner].astype(np.float64),
        faces=head.faces,
    )


def landmark_source(how: str | Path = "files", head: str = "open") -> LandmarkSource:
    """Say where landmarks come from.

    Args:
        how: "files": <image>.npy or .txt beside each mesh, (7, 3), or 51 or 68 of which seven are taken.
            "embedding": on the triangles of `head`, for meshes of its topology.
            A path: 7, 51 or 68 vertex numbers from 0 (text or npy), or a FLAME landmark embedding (npy, npz, pkl),
            for meshes whose triangles stand in FLAME's order.
        head: a name for `open_head`.

    Raises:
        AssetError: the head or the file is missing or not as said.
    """
    if str(how) == "files":
        return LandmarkSource("files")
    if str(how) == "embedding":
        return head_landmarks(open_head(head))
    path = Path(how)
    if path.suffix.lower() in (".npz", ".pkl") or (path.suffix.lower() == ".npy" and _holds_objects(path)):
        triangles, weights = _read_embedding(path)
        return LandmarkSource(
            f"embedding {path.name} {_digest(triangles, weights)}", triangles=triangles, weights=weights
        )
    numbers = (_read_npy(path) if path.suffix.lower() == ".npy" else _numbers(path)).ravel()
    if not np.isfinite(numbers).all() or (numbers != np.round(numbers)).any() or (numbers < 0).any():
        raise AssetError(f"landmarks {path}: expected vertex numbers from 0, got {numbers[:7].tolist()}")
    seven = _seven(path, numbers[:, None])[:, 0].astype(np.int64)
    corners, weights = np.repeat(seven[:, None], 3, 1), np.tile([1.0, 0.0, 0.0], (7, 1))
    return LandmarkSource(f"vertices {path.name} {_digest(seven)}", corners=corners, weights=weights)


@dataclass(frozen=True, eq=False)
class Prediction:
    """A predicted mesh, in the units of its file."""

    path: Path
    vertices: np.ndarray  # (N, 3) float64
    faces: np.ndarray  # (M, 3) int32
    landmarks: np.ndarray  # (7, 3) float64


def find_prediction(folder: Path, shot: Shot) -> Path | None:
    """The mesh predicted for an image, .obj before .ply; None when there is none."""
    paths = (folder / f"{shot.stem}{end}" for end in _MESHES)
    return next((path for path in paths if path.is_file()), None)


def find_extra(folder: Path, dataset: Dataset) -> list[str]:
    """The meshes in a folder of predictions, relative to it, that belong to no image, or to one that has another."""
    used = {find_prediction(folder, shot) for shot in dataset.shots}
    meshes = (path for path in folder.rglob("*") if path.suffix.lower() in _MESHES and path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in meshes if path not in used)


def read_prediction(path: Path, source: LandmarkSource) -> Prediction:
    """Read a predicted mesh and its landmarks.

    Raises:
        AssetError: missing, empty, damaged, without faces, or without landmarks.
    """
    mesh = read_obj(path) if path.suffix == ".obj" else read_ply(path)
    if not len(mesh.faces):
        raise AssetError(f"prediction {path}: has no faces; export it with its triangles")
    return Prediction(path, mesh.vertices, mesh.faces, source.read(path, mesh))


def detect_unit(landmarks: np.ndarray) -> str:
    """The unit in which a face of these landmarks (7, 3) has a human size.

    Raises:
        InputError: none of UNITS_MM.
    """
    eyes = _between_eyes(landmarks)
    for unit, factor in UNITS_MM.items():
        if EYES_MM[0] <= eyes * factor < EYES_MM[1]:
            return unit
    raise InputError(f"unit: outer eye corners {eyes:.3g} apart are no face in {', '.join(UNITS_MM)}; declare the unit")


def check_unit(path: Path, landmarks: np.ndarray, unit: str) -> None:
    """Refuse a unit that makes no face of a prediction's landmarks (7, 3).

    Raises:
        InputError: the outer eye corners would be outside EYES_MM.
    """
    eyes_mm = _between_eyes(landmarks) * UNITS_MM[unit]
    if not EYES_MM[0] <= eyes_mm < EYES_MM[1]:
        raise InputError(
            f"prediction {path}: outer eye corners {eyes_mm:.3g} mm apart when read in {unit}; expected "
            f"{EYES_MM[0]:g} to {EYES_MM[1]:g}; give the unit of the meshes"
        )


def _between_eyes(landmarks: np.ndarray) -> float:
    return math.dist(landmarks[0], landmarks[3])


def _read_beside(path: Path) -> np.ndarray:
    for marks in (path.with_suffix(".npy"), path.with_suffix(".txt")):
        if marks.is_file():
            rows = _read_npy(marks) if marks.suffix == ".npy" else _numbers(marks)
            rows = rows[0] if rows.ndim == 3 and len(rows) == 1 else rows
            if rows.ndim != 2 or rows.shape[1] != 3:
                raise AssetError(f"landmarks {marks}: expected (7, 3) numbers, got {rows.shape}")
            return _finite(marks, _seven(marks, rows))
    raise AssetError(
        f"prediction {path}: no landmarks {path.stem}.npy or .txt beside it; write them, or take them from a head's "
        "topology (--landmarks embedding) or from a list of seven vertex numbers (--landmarks FILE)"
    )


def _seven(path: Path, rows: np.ndarray) -> np.ndarray:
    """NoW's seven out of 7, 51 or 68 rows."""
    if len(rows) not in (7, _INNER, 68):
        raise AssetError(f"landmarks {path}: expected 7, or {_INNER} or 68 as iBUG numbers them, got {len(rows)}")
    return rows if len(rows) == 7 else rows[len(rows) - _INNER + np.array(LANDMARKS_51)]


def _read_embedding(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Triangles (7,) and weights (7, 3) of a FLAME embedding of the 51 or 68 landmarks."""
    record = read_named(path)
    static = "static_lmk_faces_idx" in record
    names = ("static_lmk_faces_idx", "static_lmk_bary_coords") if static else ("lmk_face_idx", "lmk_b_coords")
    try:
        triangles = _seven(path, np.asarray(record[names[0]]).reshape(-1, 1))[:, 0].astype(np.int64)
        weights = _seven(path, np.asarray(record[names[1]], np.float64).reshape(-1, 3))
    except (KeyError, TypeError, ValueError) as error:
        raise AssetError(f"landmarks {path}: expected {' and '.join(names)}, got {sorted(record)}") from error
    if triangles.min() < 0 or np.abs(weights.sum(1) - 1).max() > 1e-3:
        raise AssetError(f"landmarks {path}: expected barycentric coordinates on triangles from 0")
    return triangles, weights


def _same_topology(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two meshes have the same triangles, in whatever order and from whichever corner."""
    return a.shape == b.shape and (np.array_equal(a, b) or np.array_equal(_ordered(a), _ordered(b)))


def _ordered(faces: np.ndarray) -> np.ndarray:
    first = faces.argmin(1)[:, None]
    turned = np.take_along_axis(faces, (first + np.arange(3)) % 3, 1)
    return turned[np.lexsort(turned.T[::-1])]


def _only(folder: Path, found: Iterable[Path], what: str) -> Path:
    paths = sorted(found)
    if len(paths) != 1:
        raise AssetError(f"{folder}: expected one {what}, found {len(paths)}; check that the dataset is whole")
    return paths[0]


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("latin-1")
    except OSError as error:
        raise AssetError(f"{path}: cannot be read ({error.strerror}); check the path") from error


def _numbers(path: Path) -> np.ndarray:
    """The rows of a text file of numbers, separated by blanks, commas or semicolons."""
    rows = [row.split() for row in re.sub("[,;]", " ", _text(path)).splitlines() if row.strip()]
    try:
        return np.array([[float(word) for word in row] for row in rows], np.float64).reshape(len(rows), -1)
    except ValueError as error:
        raise AssetError(f"landmarks {path}: expected rows of as many numbers each ({error})") from error


def _read_npy(path: Path) -> np.ndarray:
    try:
        with open(path, "rb") as file:
            return np.asarray(np.lib.format.read_array(file, allow_pickle=False), np.float64)
    except OSError as error:
        raise AssetError(f"landmarks {path}: cannot be read ({error.strerror}); check the path") from error
    except (ValueError, TypeError, EOFError) as error:
        raise AssetError(f"landmarks {path}: not an array of numbers ({error}); save it with numpy.save") from error


def _holds_objects(path: Path) -> bool:
    """Whether an npy is a pickle: its header says so, without reading on."""
    try:
        return b"'|O'" in path.read_bytes()[:256]
    except OSError as error:
        raise AssetError(f"landmarks {path}: cannot be read ({error.strerror}); check the path") from error


def _finite(path: Path, points: np.ndarray) -> np.ndarray:
    if not np.isfinite(points).all():
        raise AssetError(f"landmarks {path}: has coordinates that are not finite; pick or export them again")
    return points


def _digest(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()[:12]
