"""The photo pipeline inside a server: a photograph's file in, arrays of every face out, by the names of signature.py.

Reading, detecting, aligning and mapping back are pipeline.py's, as everywhere. How crops become heads is given to it:
`photo_leaf` asks Triton's other models.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Collection, Mapping

import numpy as np

from chebface.detect import Detector
from chebface.errors import InputError, PhotoError
from chebface.photo import Photo, load, name, read
from chebface.pipeline import Finder, infer_in_batches
from chebface.signature import (
    LANDMARKS_M,
    LANDMARKS_PX,
    MAX_BATCH,
    MAX_FACES,
    MAX_PHOTO_MIB,
    PARAMETERS,
    RECONSTRUCT,
    REGRESS,
    VERTICES_HALF,
    VERTICES_M,
    Model,
)

Ask = Callable[[Model, np.ndarray], Mapping[str, np.ndarray]]

_MESH = {tensor.name for tensor in (VERTICES_M, VERTICES_HALF, LANDMARKS_M, LANDMARKS_PX)}


def check_file(content: bytes, what: str) -> None:
    """Make sure that a server would open a photo's file.

    Raises:
        PhotoError: it is larger than MAX_PHOTO_MIB, or neither JPEG, PNG nor WebP.
    """
    if len(content) > MAX_PHOTO_MIB * 2**20:
        raise PhotoError(
            f"{what}: {len(content) / 2**20:.1f} MiB is above the {MAX_PHOTO_MIB} MiB that a server takes; make it "
            "smaller, or find its faces on this side (detector='auto')"
        )
    webp = content[:4] == b"RIFF" and content[8:12] == b"WEBP"
    if not webp and not content.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")):
        raise PhotoError(f"{what}: is not a file that a server takes; save it again as JPEG, PNG or WebP")


def to_file(photo: Photo) -> bytes:
    """A photograph as a server takes it: files as they are, arrays as PNG, which loses nothing.

    Raises:
        PhotoError: it cannot be read, or is outside the limits of `photo.read` (an array) or `check_file`.
    """
    if isinstance(photo, (str, os.PathLike)):
        content = load(photo)
    elif isinstance(photo, (bytes, bytearray, memoryview)):
        content = bytes(photo)
    else:
        from PIL import Image

        file = io.BytesIO()
        Image.fromarray(read(photo)).save(file, "PNG", compress_level=1)
        content = file.getvalue()
    check_file(content, name(photo))
    return content


class Served(Finder):
    """Photographs to arrays, inside a server."""

    def __init__(self, ask: Ask, *, detector: str | Detector = "auto") -> None:
        """
        Args:
            ask: runs `regress` or `reconstruct` on crops (B, 112, 112, 3) uint8, B up to MAX_BATCH.
            detector: as for Pipeline.

        Raises:
            InputError: an unknown detector.
        """
        super().__init__(detector=detector)
        self._ask = ask

    def answer(self, content: bytes, wanted: Collection[str], most: int = MAX_FACES) -> dict[str, np.ndarray]:
        """What signature.RECONSTRUCT_PHOTO answers; of the network runs only what is wanted.

        Args:
            content: the file.
            wanted: names of outputs.
            most: faces, the largest first; never more than MAX_FACES.

        Returns:
            The wanted outputs by name.

        Raises:
            PhotoError: the file cannot be read or is outside the limits.
            NoFaceError: no face was found.
            InputError: most is below 1.
            AssetError: a model's answer is not what signature.py says.
            MissingDependencyError: no detector is installed.
        """
        if most < 1:
            raise InputError(f"most: expected at least 1 face, got {most}")
        check_file(content, name(content))
        prepared = self._prepare(content, min(most, MAX_FACES))
        arrays = prepared.to_arrays()
        if not _MESH.isdisjoint(wanted):
            parameters, vertices, landmarks = infer_in_batches(self._infer, prepared.crops_u8)
            arrays |= {PARAMETERS.name: parameters, VERTICES_M.name: vertices, LANDMARKS_M.name: landmarks}
            arrays[LANDMARKS_PX.name] = prepared.map_to_photo(parameters, landmarks).astype(np.float32)
            if VERTICES_HALF.name in wanted:
                arrays[VERTICES_HALF.name] = vertices.astype(np.float16)
        elif PARAMETERS.name in wanted:
            crops_u8 = prepared.crops_u8
            batches = [crops_u8[k : k + MAX_BATCH] for k in range(0, len(crops_u8), MAX_BATCH)]
            parts = [self._ask(REGRESS, batch)[PARAMETERS.name] for batch in batches]
            arrays[PARAMETERS.name] = np.concatenate(parts)
        return {each: arrays[each] for each in wanted}

    def _infer(self, crops_u8: np.ndarray) -> list[np.ndarray]:
        answer = self._ask(RECONSTRUCT, crops_u8)
        return [answer[tensor.name] for tensor in RECONSTRUCT.outputs]
