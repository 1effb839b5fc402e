"""Photograph to Face: the steps that the in-process and the served reconstruction share."""

from __future__ import annotations

import abc
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from chebface import params, signature
from chebface.crop import Crop, align
from chebface.detect import NAMES, Detection, Detector, open_detector
from chebface.errors import AssetError, InputError, NoFaceError
from chebface.face import Face, project_to_photo
from chebface.photo import Photo, name, read
from chebface.signature import BOXES_PX, CROPS, FOUND, PHOTO_SIZE, PHOTO_TO_CROP, POINTS_PX, SCORES, TIMINGS_MS

_STEPS = ("read", "detect", "align")  # as TIMINGS_MS has them


@dataclass(frozen=True, eq=False)
class Topology:
    """What is the same for every face of one model."""

    faces: np.ndarray  # (M, 3) int32
    head: dict[str, str]  # name, version, licence, sha256 of the head model


@dataclass(frozen=True, eq=False)
class Prepared:
    """A photograph up to the point where the network takes over."""

    photo_size: tuple[int, int]
    found: int  # faces in the photo
    detections: list[Detection]  # those that are reconstructed
    crops: list[Crop]
    started: float  # time.perf_counter() when it began
    timings_ms: dict[str, float] = field(default_factory=dict)

    @property
    def crops_u8(self) -> np.ndarray:
        """(B, 112, 112, 3) uint8, one per face."""
        return np.stack([crop.aligned_u8 for crop in self.crops])

    def to_arrays(self) -> dict[str, np.ndarray]:
        """What signature.DETECTED names."""
        return {
            BOXES_PX.name: np.stack([each.box_px for each in self.detections]).astype(np.float32),
            POINTS_PX.name: np.stack([each.points_px for each in self.detections]).astype(np.float32),
            SCORES.name: np.array([each.score for each in self.detections], np.float32),
            CROPS.name: self.crops_u8,
            PHOTO_TO_CROP.name: np.stack([crop.matrix for crop in self.crops]).astype(np.float32),
            PHOTO_SIZE.name: np.array(self.photo_size, np.int32),
            FOUND.name: np.array([self.found], np.int32),
            TIMINGS_MS.name: np.array([self.timings_ms[step] for step in _STEPS], np.float32),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], started: float) -> Prepared:
        """The same again, from where it was sent to; to the precision of float32."""
        boxes, points, matrices = (
            np.asarray(arrays[tensor.name], np.float64) for tensor in (BOXES_PX, POINTS_PX, PHOTO_TO_CROP)
        )
        scores, crops_u8 = arrays[SCORES.name].tolist(), np.array(arrays[CROPS.name])
        height, width = arrays[PHOTO_SIZE.name].tolist()
        return cls(
            (height, width),
            int(arrays[FOUND.name][0]),
            [Detection(*each) for each in zip(boxes, scores, points, strict=True)],
            [Crop(*each) for each in zip(crops_u8, matrices, strict=True)],
            started,
            dict(zip(_STEPS, arrays[TIMINGS_MS.name].tolist(), strict=True)),
        )

    def map_to_photo(self, parameters: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
        """Landmarks (B, 68, 3) m of faces with parameters (B, 486) to pixels of the photo, (B, 68, 2) float64."""
        cameras = parameters[:, params.SLICES["camera"]]
        each = zip(landmarks, cameras, self.crops, strict=True)
        return np.stack([project_to_photo(points, camera, crop)[:, :2] for points, camera, crop in each])


class Finder:
    """Finds the faces of photographs, and cuts them out: all that comes before the network."""

    def __init__(self, *, detector: str | Detector = "auto") -> None:
        """
        Args:
            detector: a name for `open_detector`, opened when the first photo comes, or a detector.

        Raises:
            InputError: an unknown name.
        """
        if isinstance(detector, str) and detector not in NAMES:
            raise InputError(f"detector: expected one of {', '.join(NAMES)}, got {detector!r}")
        self._detector = detector
        self._lock = threading.Lock()

    @property
    def detector(self) -> Detector:
        """The face detector, opened on first use."""
        with self._lock:
            if isinstance(self._detector, str):
                self._detector = open_detector(self._detector)
            return self._detector

    def _prepare(self, photo: Photo, most: int | None = None) -> Prepared:
        """Read, detect and align; `most` faces at most, the largest first.

        Raises:
            PhotoError, NoFaceError, MissingDependencyError: as `reconstruct`.
        """
        began = time.perf_counter()
        image_u8 = read(photo)
        red = time.perf_counter()
        everyone = self.detector.detect(image_u8)
        detections = everyone[:most]
        found = time.perf_counter()
        if not detections:
            raise NoFaceError(
                f"{name(photo)}: no face found by {self.detector.name}; use a photo in which a face is upright, "
                "lit, and at least 40 pixels wide"
            )
        crops = [align(image_u8, detection.points_px) for detection in detections]
        aligned = time.perf_counter()
        timings = {"read": red - began, "detect": found - red, "align": aligned - found}
        size = (image_u8.shape[0], image_u8.shape[1])
        return Prepared(size, len(everyone), detections, crops, began, {step: 1e3 * s for step, s in timings.items()})


class Pipeline(Finder, abc.ABC):
    """Turns photographs into heads. A subclass says how crops become vertices: here, or on a server."""

    max_batch = signature.MAX_BATCH  # faces per call of _infer

    @property
    @abc.abstractmethod
    def topology(self) -> Topology:
        """Triangles and head of the model."""

    @abc.abstractmethod
    def _infer(self, crops_u8: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Crops (B, 112, 112, 3) uint8 to parameters (B, 486), vertices (B, N, 3) m, landmarks (B, 68, 3) m."""

    def reconstruct(self, photo: Photo) -> Face:
        """Reconstruct the largest face of a photograph.

        Args:
            photo: a path, the bytes of an image file, or an array (H, W, 3) uint8 RGB.

        Returns:
            The face.

        Raises:
            PhotoError: the photo cannot be read or is outside the limits.
            NoFaceError: no face was found.
            MissingDependencyError: no detector is installed.
        """
        return self._run(self._prepare(photo, most=1))[0]

    def reconstruct_all(self, photo: Photo) -> list[Face]:
        """Reconstruct every face of a photograph.

        Args, Raises: as `reconstruct`.

        Returns:
            The faces, largest first; at least one.
        """
        return self._run(self._prepare(photo))

    def _run(self, prepared: Prepared) -> list[Face]:
        began = time.perf_counter()
        outputs = infer_in_batches(self._infer, prepared.crops_u8, self.max_batch)
        return self._finish(prepared, outputs, 1e3 * (time.perf_counter() - began))

    def _finish(self, prepared: Prepared, outputs: Sequence[np.ndarray], infer_ms: float) -> list[Face]:
        """Faces from what the network gave, checked: parameters, vertices, landmarks, each (B, ...)."""
        parameters, vertices, landmarks = outputs
        topology = self.topology
        landmarks_px = prepared.map_to_photo(parameters, landmarks)
        total = 1e3 * (time.perf_counter() - prepared.started)
        timings = prepared.timings_ms | {"infer": infer_ms, "total": total}
        return [
            Face(
                parameters=parameters[k],
                vertices=vertices[k],
                landmarks=landmarks[k],
                landmarks_px=landmarks_px[k],
                faces=topology.faces,
                crop=prepared.crops[k],
                detection=prepared.detections[k],
                photo_size=prepared.photo_size,
                found=prepared.found,
                head=dict(topology.head),
                timings_ms=dict(timings),
            )
            for k in range(len(prepared.crops))
        ]


def infer_in_batches(
    infer: Callable[[np.ndarray], Sequence[np.ndarray]], crops_u8: np.ndarray, max_batch: int = signature.MAX_BATCH
) -> list[np.ndarray]:
    """Any number of crops through a network that takes max_batch at once.

    Args:
        infer: crops (B, 112, 112, 3) uint8 to the outputs of signature.RECONSTRUCT, (B, ...) each.
        crops_u8: (n, 112, 112, 3).
        max_batch: the largest B.

    Returns:
        The outputs, (n, ...) each.

    Raises:
        AssetError: an output of another shape or type, or with values that are not finite.
    """
    batches = [crops_u8[k : k + max_batch] for k in range(0, len(crops_u8), max_batch)]
    parts = [_check(infer(batch), len(batch)) for batch in batches]
    return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]


def _check(outputs: Sequence[np.ndarray], batch: int) -> list[np.ndarray]:
    wanted = signature.RECONSTRUCT.outputs
    if len(outputs) != len(wanted):
        raise AssetError(f"model: expected {len(wanted)} outputs, got {len(outputs)}; export the model again")
    for tensor, array in zip(wanted, outputs, strict=True):
        shape = (batch, *tensor.shape)
        if array.shape != shape or array.dtype != np.float32:
            raise AssetError(
                f"model output {tensor.name}: expected {shape} float32, got {array.shape} {array.dtype}; "
                "the model was made for something else, export it again"
            )
        if not np.isfinite(array).all():
            raise AssetError(f"model output {tensor.name}: has values that are not finite; check the weights")
    return list(outputs)
