"""Batches of samples for training: by actor, in an order that depends on seed and step alone."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chebface import camera, params
from chebface.crop import WIDE_PX
from chebface.data.sample import Sample, Shards
from chebface.errors import AssetError, InputError
from chebface.signature import LANDMARKS


@dataclass(frozen=True, eq=False)
class Batch:
    """B samples as tensors; the photos of one actor are neighbours. What is not known is zero."""

    crop: Tensor  # (B, 112, 112, 3) uint8 RGB, aligned
    wide: Tensor | None  # (B, 224, 224, 3) uint8 RGB, where it was asked for
    shape: Tensor  # (B, 300)
    parameters: Tensor  # (B, 486)
    knows_parameters: Tensor  # (B,) bool
    landmarks: Tensor  # (B, 68, 2) ndc of the wide frame
    knows_landmarks: Tensor  # (B,) bool
    actors: Tensor  # (B,) int64, equal where the person is

    def __len__(self) -> int:
        return len(self.crop)

    def to(self, device: torch.device | str) -> Batch:
        """The same on another device."""
        return self._each(lambda tensor: tensor.to(device))

    def repeat(self, times: int) -> Batch:
        """The samples over again."""
        return self._each(lambda tensor: torch.cat([tensor] * times))

    def split(self, parts: int) -> list[Batch]:
        """Parts as even as can be; the photos of an actor stay together.

        Raises:
            InputError: more parts than actors.
        """
        images = int((self.actors == self.actors[0]).sum())
        actors = len(self) // images
        if not 1 <= parts <= actors:
            raise InputError(f"parts: expected 1 to {actors}, one actor each at least, got {parts}")
        edges = [images * (actors * i // parts) for i in range(parts + 1)]
        return [self._each(lambda tensor, at=slice(*ends): tensor[at]) for ends in pairwise(edges)]  # type: ignore[misc]

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        tensors: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        changed: dict[str, Any] = {name: each if each is None else change(each) for name, each in tensors.items()}
        return Batch(**changed)


def collate(samples: Sequence[Sample], actors: Sequence[int] | None = None, *, wide: bool = False) -> Batch:
    """Stack samples.

    Args:
        samples: B of them.
        actors: a number for each sample's actor; None counts the actors as they come.
        wide: whether to keep the wide frames.

    Raises:
        InputError: no samples.
    """
    if not samples:
        raise InputError("samples: expected at least one, got none")
    if actors is None:
        seen = {name: number for number, name in enumerate(dict.fromkeys(s.actor for s in samples))}
        actors = [seen[s.actor] for s in samples]
    no_parameters = np.zeros(params.TOTAL, np.float32)
    no_landmarks = np.zeros((LANDMARKS, 2), np.float32)
    parameters = [no_parameters if s.parameters is None else s.parameters for s in samples]
    landmarks_px = [no_landmarks if s.landmarks_px is None else s.landmarks_px for s in samples]
    knows_landmarks = torch.tensor([s.landmarks_px is not None for s in samples])
    landmarks = camera.px_to_ndc(torch.from_numpy(np.stack(landmarks_px)), WIDE_PX, WIDE_PX)
    return Batch(
        crop=torch.from_numpy(np.stack([s.aligned_u8 for s in samples])),
        wide=torch.from_numpy(np.stack([s.wide_u8 for s in samples])) if wide else None,
        shape=torch.from_numpy(np.stack([s.shape for s in samples])),
        parameters=torch.from_numpy(np.stack(parameters)),
        knows_parameters=torch.tensor([s.parameters is not None for s in samples]),
        landmarks=landmarks * knows_landmarks[:, None, None],
        knows_landmarks=knows_landmarks,
        actors=torch.tensor(actors, dtype=torch.int64),
    )


class Batches:
    """The batches of steps start to stop, prefetched by threads.

    An epoch shows every actor once, in an order of its own; the last actors that fill no batch wait for the next one.
    Which photos of an actor are shown is drawn anew in each epoch, without repetition as far as there are enough.
    A batch depends on data, seed and step alone, so a resumed run sees what an uninterrupted one would. With several
    ranks each loads its share of the batch; the shares one after the other are the batch of a single process.

    Args:
        data: the samples.
        batch: actors in a batch, over all ranks.
        seed: of every order.
        start: the first step.
        stop: the step after the last.
        images_per_actor: photos of each; a batch has batch * images_per_actor samples over all ranks.
        wide: whether to give the wide frames.
        rank: which share of each batch to load.
        world: how many shares there are.
        threads: that load ahead.

    Raises:
        InputError: a number out of its range, or a batch that the ranks cannot share evenly.
        AssetError: fewer actors than one batch, or several photos of each wanted where nobody has two.
    """

    def __init__(
        self,
        data: Shards,
        batch: int,
        seed: int,
        start: int,
        stop: int,
        *,
        images_per_actor: int = 1,
        wide: bool = False,
        rank: int = 0,
        world: int = 1,
        threads: int = 2,
    ) -> None:
        for name, value in (("batch", batch), ("images_per_actor", images_per_actor), ("threads", threads)):
            if value < 1:
                raise InputError(f"{name}: expected at least 1, got {value}")
        if not 0 <= rank < world:
            raise InputError(f"rank: expected 0 to {world - 1} for a world of {world}, got {rank}")
        if batch % world:
            raise InputError(f"batch: {batch} actors cannot be shared evenly by {world} ranks; take a multiple of it")
        self.data, self.batch, self.seed, self.start, self.stop = data, batch, seed, start, stop
        self.images_per_actor, self.wide, self.threads = images_per_actor, wide, threads
        self.rank, self.world = rank, world
        photos: dict[str, list[int]] = {}
        for index, actor in enumerate(data.actors):
            photos.setdefault(actor, []).append(index)
        self.people = tuple(photos)  # their places are the numbers in Batch.actors
        self._photos = [np.array(indices) for indices in photos.values()]
        self.repeating = sum(len(indices) < images_per_actor for indices in self._photos)  # actors with too few photos
        if len(self.people) < batch:
            raise AssetError(f"dataset {data.folder}: {len(self.people)} actors, fewer than one batch of {batch}")
        if images_per_actor > 1 and max(map(len, self._photos)) == 1:
            raise AssetError(
                f"dataset {data.folder}: {images_per_actor} photos of each actor are wanted and all have one; set "
                "images_per_actor to 1, there or when the data are made"
            )
        self._orders: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[Batch]:
        steps, ahead = range(self.start, self.stop), self.threads + 2
        with ThreadPoolExecutor(self.threads) as pool:
            waiting = deque(pool.submit(self.load, step) for step in steps[:ahead])
            try:
                for step in steps:
                    ready = waiting.popleft()
                    if step + ahead < self.stop:
                        waiting.append(pool.submit(self.load, step + ahead))
                    yield ready.result()
            finally:
                for job in waiting:
                    job.cancel()

    def load(self, step: int) -> Batch:
        """This rank's share of the batch of a step.

        Raises:
            AssetError: a sample that cannot be read.
        """
        epoch, place = divmod(step, len(self.people) // self.batch)
        share = self.batch // self.world
        first = place * self.batch + self.rank * share
        chosen = [int(actor) for actor in self._order(epoch)[first : first + share]]
        samples = [self.data[int(index)] for actor in chosen for index in self._choose(epoch, actor)]
        return collate(samples, np.repeat(chosen, self.images_per_actor).tolist(), wide=self.wide)

    def _order(self, epoch: int) -> np.ndarray:
        orders = self._orders  # of the last two epochs: threads load ahead across the end of one
        if epoch not in orders:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.people))
            orders = self._orders = {e: orders[e] for e in orders if e == epoch - 1} | {epoch: order}
        return orders[epoch]

    def _choose(self, epoch: int, actor: int) -> np.ndarray:
        photos = self._photos[actor]
        if len(photos) == 1:
            return np.repeat(photos, self.images_per_actor)
        return np.resize(np.random.default_rng([self.seed, epoch, actor]).permutation(photos), self.images_per_actor)
