"""The one sample type, and its shards: plain tar files (webdataset's naming) read at random.

In a shard, sample 000000 is 000000.jpg, the wide frame, and 000000.npy, float32 numbers one after the other. What the
numbers are, and whose face it is, stands in 000000.json: `{"actor": "LYHM/00012", "knows": ["shape", "landmarks"]}`.
Where there is no such file, the numbers are the 486 parameters and 68 landmarks, and the actor is called by the number
of the sample in the dataset.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
import sys
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from chebface import params
from chebface.crop import WIDE_PX
from chebface.data.align import align_wide
from chebface.errors import AssetError, InputError
from chebface.files import whole
from chebface.signature import LANDMARKS

INDEX = "shards.json"
_SIZES = {"parameters": params.TOTAL, "shape": params.PARTS["shape"], "landmarks": 2 * LANDMARKS}
_USUAL: tuple[str, ...] = ("parameters", "landmarks")  # what is known of a synthetic face
_KNOWLEDGE = [(first, *then) for first in ("parameters", "shape") for then in ((), ("landmarks",))]
_AGAIN = "delete it and make it again (`chebface data synthesize` or `chebface data pack`)"
_BLOCK = 512  # bytes; all of a tar stands at multiples of it


@dataclass(frozen=True)
class Sample:
    """One photograph of a face with what is known about it. The mesh follows from the numbers and the head."""

    wide_u8: np.ndarray  # (224, 224, 3) RGB, the wide frame
    actor: str  # who it is
    shape: np.ndarray  # (300,) float32, the identity
    parameters: np.ndarray | None  # (486,) float32, everything; of synthetic faces only
    landmarks_px: np.ndarray | None  # (68, 2) float32 in the wide frame

    @property
    def aligned_u8(self) -> np.ndarray:
        """The aligned crop (112, 112, 3) uint8 that the regressor sees."""
        return align_wide(self.wide_u8)


def is_held_out(actor: str, share: float, seed: int = 0) -> bool:
    """Whether an actor belongs to those kept from training: a matter of name and seed, whoever else is there.

    Args:
        actor: the name.
        share: of all actors, in [0, 1).
        seed: another one holds out others.

    Raises:
        InputError: the share is outside [0, 1).
    """
    if not 0 <= share < 1:
        raise InputError(f"share: expected 0 or above and below 1, got {share}")
    digest = hashlib.sha256(f"{seed}/{actor}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def write_shard(path: Path, samples: Iterable[Sample], jpeg_quality: int, first: int = 0) -> int:
    """Write samples into one tar, whole or not at all.

    Args:
        path: the tar.
        samples: what to write.
        jpeg_quality: of the pictures.
        first: the number of the first sample in its dataset.

    Returns:
        how many were written.
    """
    from PIL import Image

    count = 0
    with whole(path) as partial, tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
        for count, sample in enumerate(samples, 1):
            picture, array = io.BytesIO(), io.BytesIO()
            Image.fromarray(sample.wide_u8).save(picture, "JPEG", quality=jpeg_quality)
            known = _known(sample)
            np.save(array, np.concatenate([n.ravel() for n in known.values()]).astype("<f4"), allow_pickle=False)
            blobs = {"jpg": picture.getvalue(), "npy": array.getvalue()}
            if tuple(known) != _USUAL or sample.actor != str(first + count - 1):
                blobs["json"] = json.dumps({"actor": sample.actor, "knows": list(known)}).encode()
            for suffix, blob in blobs.items():
                entry = tarfile.TarInfo(f"{count - 1:06d}.{suffix}")
                entry.size = len(blob)
                tar.addfile(entry, io.BytesIO(blob))
    return count


def _known(sample: Sample) -> dict[str, np.ndarray]:
    known = {"shape": sample.shape} if sample.parameters is None else {"parameters": sample.parameters}
    return known if sample.landmarks_px is None else known | {"landmarks": sample.landmarks_px}


@dataclass(frozen=True)
class _Place:
    """Where one sample is: the open file, then offset and size of its picture and of its numbers."""

    handle: int
    picture: tuple[int, int]
    numbers: tuple[int, int]
    knows: tuple[str, ...]


class Shards:
    """A folder of shards as one indexable collection of samples. Safe to read from several threads.

    Args:
        folder: holds `*.tar` and shards.json, as `chebface data synthesize` and `chebface data pack` write them.

    Raises:
        AssetError: no such folder, no whole index, or a shard that is missing, truncated or incomplete.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = self.folder / INDEX
        if not index.is_file():
            raise AssetError(
                f"dataset {folder}: no {INDEX}; `chebface data synthesize -o {folder}` makes a dataset, and so does "
                "`chebface data pack` of photographs"
            )
        self.actors: list[str] = []  # whose face each sample is
        self._places: list[_Place] = []
        self._files: list[int] = []
        try:
            self.about: dict[str, Any] = json.loads(index.read_text())
            names = [str(name) for name in self.about["shards"]]
        except (ValueError, KeyError, TypeError) as error:
            raise AssetError(f"dataset {folder}: {INDEX} is not a whole index ({error}); make it again") from error
        try:
            for name in names:
                self._add(self.folder / name)
        except BaseException:
            self.close()
            raise

    def _add(self, path: Path) -> None:
        try:
            handle = os.open(path, os.O_RDONLY)
            self._files.append(handle)
            members = _list_members(handle)
        except (OSError, ValueError) as error:
            raise AssetError(f"shard {path}: {error}; {_AGAIN}") from error
        for name, place in sorted(members.items()):
            stem, _, suffix = name.rpartition(".")
            if suffix != "jpg":
                continue
            partner = members.get(f"{stem}.npy")
            if partner is None:
                raise AssetError(f"shard {path}: {name} has no .npy beside it; {_AGAIN}")
            actor, knows = str(len(self._places)), _USUAL
            if (facts := members.get(f"{stem}.json")) is not None:
                actor, knows = _read_facts(os.pread(handle, facts[1], facts[0]), f"shard {path}: {stem}.json")
            self.actors.append(sys.intern(actor))
            self._places.append(_Place(handle, place, partner, knows))

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Sample:
        """The sample with this number.

        Raises:
            AssetError: its picture or its numbers are not whole.
        """
        from PIL import Image

        place = self._places[index]
        (image_at, image_size), (array_at, array_size) = place.picture, place.numbers
        try:
            with Image.open(io.BytesIO(os.pread(place.handle, image_size, image_at)), formats=["JPEG"]) as picture:
                wide = np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))
            numbers = _parse_npy(os.pread(place.handle, array_size, array_at))
        except (OSError, SyntaxError, ValueError, EOFError) as error:
            raise AssetError(f"dataset {self.folder}: sample {index} is damaged ({error}); make it again") from error
        slices = _slices(place.knows)
        size = slices[place.knows[-1]].stop
        if wide.shape != (WIDE_PX, WIDE_PX, 3) or numbers.shape != (size,) or numbers.dtype != np.float32:
            wanted = f"{(WIDE_PX, WIDE_PX, 3)} and {(size,)} float32 ({', '.join(place.knows)})"
            raise AssetError(
                f"dataset {self.folder}: sample {index} has a picture {wide.shape} and numbers {numbers.shape} "
                f"{numbers.dtype}, expected {wanted}; make it again"
            )
        if not np.isfinite(numbers).all():
            raise AssetError(f"dataset {self.folder}: sample {index} has numbers that are not finite; make it again")
        known = {name: numbers[part] for name, part in slices.items()}
        parameters, landmarks = known.get("parameters"), known.get("landmarks")
        shape = known["shape"] if parameters is None else parameters[params.SLICES["shape"]]
        points = None if landmarks is None else landmarks.reshape(LANDMARKS, 2)
        return Sample(wide, self.actors[index], shape, parameters, points)

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        for handle in self._files:
            os.close(handle)
        self._files.clear()


@cache
def _slices(knows: tuple[str, ...]) -> dict[str, slice]:
    """Where each kind of knowledge is among the numbers."""
    ends = np.cumsum([_SIZES[name] for name in knows]).tolist()
    return {name: slice(end - _SIZES[name], end) for name, end in zip(knows, ends, strict=True)}


def _parse_npy(content: bytes) -> np.ndarray:
    """As np.load, which is slow to find out what the first bytes nearly always say."""
    for header in _HEADERS:
        if content.startswith(header):
            return np.frombuffer(content, "<f4", offset=len(header))
    return np.load(io.BytesIO(content), allow_pickle=False)


def _write_npy_header(count: int) -> bytes:
    file = io.BytesIO()
    np.save(file, np.empty(count, "<f4"), allow_pickle=False)
    return file.getvalue()[: -4 * count]


_HEADERS = [_write_npy_header(sum(_SIZES[name] for name in knows)) for knows in reversed(_KNOWLEDGE)]


def _list_members(handle: int) -> dict[str, tuple[int, int]]:
    """Offset and size of every member of a tar of plain files, as `write_shard` makes them. `tarfile` takes far longer.

    Raises:
        OSError: it cannot be read.
        ValueError: it is truncated, damaged or has anything else in it.
    """
    length = os.fstat(handle).st_size
    if not length:
        raise ValueError("empty")
    starts, sizes, at = [], [], 0
    with mmap.mmap(handle, 0, access=mmap.ACCESS_READ) as content:
        while (first := content[at : at + 1]) != b"\0":  # a block of zeros is the end
            if not first:
                raise ValueError(f"truncated: it goes on beyond its {length} bytes")
            try:
                size = int(content[at + 124 : at + 135], 8)
            except ValueError:
                raise ValueError(f"no tar, or damaged at byte {at}") from None
            starts.append(at)
            sizes.append(size)
            at += _BLOCK * (1 - -size // _BLOCK)
        blocks = b"".join(content[start : start + _BLOCK] for start in starts)
    headers = np.frombuffer(blocks, np.uint8).reshape(-1, _BLOCK)
    sums = headers.sum(1, dtype=np.int64) - headers[:, 148:156].sum(1, dtype=np.int64) + 8 * ord(" ")
    said = (headers[:, 148:154].astype(np.int64) - ord("0")) @ 8 ** np.arange(6)[::-1]
    if (said != sums).any():
        raise ValueError(f"damaged at byte {starts[int((said != sums).argmax())]}")
    odd = ~np.isin(headers[:, 156], (0, ord("0"))) | (headers[:, 345] != 0)
    if odd.any():
        raise ValueError(f"not a plain file of a short name at byte {starts[int(odd.argmax())]}")
    names = headers[:, :100].copy().view("S100").ravel().tolist()
    return {n.decode(): (start + _BLOCK, size) for n, start, size in zip(names, starts, sizes, strict=True)}


def _read_facts(content: bytes, what: str) -> tuple[str, tuple[str, ...]]:
    """Whose face it is and what is known of it."""
    try:
        facts = json.loads(content)
        actor, knows = facts["actor"], tuple(facts["knows"])
    except (ValueError, KeyError, TypeError) as error:
        raise AssetError(f"{what} is damaged ({error}); {_AGAIN}") from error
    if not isinstance(actor, str) or knows not in _KNOWLEDGE:
        raise AssetError(
            f"{what}: expected an actor's name and knows [shape or parameters, then landmarks or nothing], got {facts}"
        )
    return actor, knows
