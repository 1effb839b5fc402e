"""The one sample type, and its shards: plain tar files (webdataset's naming) read at random."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chebface import params
from chebface.crop import WIDE_MATRIX, WIDE_PX, invert, warp
from chebface.errors import AssetError
from chebface.files import whole
from chebface.signature import CROP_PX, LANDMARKS

INDEX = "shards.json"
_ALIGN = invert(WIDE_MATRIX)


@dataclass(frozen=True)
class Sample:
    """One face with everything that is known about it. The mesh follows from parameters and head."""

    wide_u8: np.ndarray  # (224, 224, 3) RGB, the wide frame
    parameters: np.ndarray  # (486,) float32
    landmarks_px: np.ndarray  # (68, 2) float32 in the wide frame

    @property
    def aligned_u8(self) -> np.ndarray:
        """The aligned crop (112, 112, 3) uint8 that the regressor sees."""
        return warp(self.wide_u8, _ALIGN, CROP_PX)


def write_shard(path: Path, samples: Iterable[Sample], jpeg_quality: int) -> int:
    """Write samples as `000000.jpg` + `000000.npy` pairs into one tar, whole or not at all.

    Returns:
        how many were written.
    """
    from PIL import Image

    count = 0
    with whole(path) as partial, tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
        for count, sample in enumerate(samples, 1):
            picture = io.BytesIO()
            Image.fromarray(sample.wide_u8).save(picture, "JPEG", quality=jpeg_quality)
            numbers = np.concatenate([sample.parameters, sample.landmarks_px.ravel()]).astype("<f4")
            array = io.BytesIO()
            np.save(array, numbers, allow_pickle=False)
            for suffix, blob in (("jpg", picture.getvalue()), ("npy", array.getvalue())):
                entry = tarfile.TarInfo(f"{count - 1:06d}.{suffix}")
                entry.size = len(blob)
                tar.addfile(entry, io.BytesIO(blob))
    return count


class Shards:
    """A folder of shards as one indexable collection of samples. Safe to read from several threads.

    Args:
        folder: holds `*.tar` and shards.json, as `chebface data synthesize` writes them.

    Raises:
        AssetError: no such folder, no index, or a shard that is missing, truncated or incomplete.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = self.folder / INDEX
        if not index.is_file():
            raise AssetError(f"dataset {folder}: no {INDEX}; `chebface data synthesize -o {folder}` makes it")
        self.about: dict[str, Any] = json.loads(index.read_text())
        self._places: list[tuple[int, int, int, int, int]] = []  # file, then offset and size of jpg and npy
        self._files: list[int] = []
        for name in self.about["shards"]:
            self._add(self.folder / name)

    def _add(self, path: Path) -> None:
        try:
            with tarfile.open(path, "r:") as tar:
                members = {entry.name: (entry.offset_data, entry.size) for entry in tar.getmembers()}
            end = max((offset + size for offset, size in members.values()), default=0)
            if path.stat().st_size < end:
                raise AssetError(f"shard {path}: truncated; delete it and run `chebface data synthesize` again")
        except (OSError, tarfile.TarError) as error:
            raise AssetError(f"shard {path}: {error}; delete it and run `chebface data synthesize` again") from error
        handle = os.open(path, os.O_RDONLY)
        self._files.append(handle)
        for name, place in sorted(members.items()):
            if name.endswith(".jpg"):
                partner = members.get(name[:-3] + "npy")
                if partner is None:
                    raise AssetError(f"shard {path}: {name} has no .npy beside it")
                self._places.append((handle, *place, *partner))

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Sample:
        from PIL import Image

        handle, image_at, image_size, array_at, array_size = self._places[index]
        with Image.open(io.BytesIO(os.pread(handle, image_size, image_at))) as picture:
            wide = np.asarray(picture.convert("RGB"))
        numbers = np.load(io.BytesIO(os.pread(handle, array_size, array_at)), allow_pickle=False)
        if wide.shape != (WIDE_PX, WIDE_PX, 3) or numbers.shape != (params.TOTAL + 2 * LANDMARKS,):
            raise AssetError(f"dataset {self.folder}: sample {index} has {wide.shape} and {numbers.shape}")
        return Sample(wide, numbers[: params.TOTAL], numbers[params.TOTAL :].reshape(LANDMARKS, 2))

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        for handle in self._files:
            os.close(handle)
        self._files.clear()
