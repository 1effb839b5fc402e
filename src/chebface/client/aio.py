"""Client for programs that run on asyncio: the same calls, awaited; the work is done in threads.

Reading and detecting a photo keep the processor busy, which would stop the event loop: they need threads in any case.
The request stays in the same thread; the way there and back costs far less than the detection, and there is one
implementation, not two.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Literal, TypeVar

import numpy as np

from chebface.client import Client
from chebface.client.stream import AHEAD
from chebface.errors import ConfigError, InputError
from chebface.face import Face
from chebface.photo import Photo
from chebface.pipeline import Topology

R = TypeVar("R")


class AsyncClient:
    """Client, awaited. A task that is cancelled stops waiting at once; its request ends by its deadline.

    >>> async with AsyncClient("localhost:8001") as client:      # doctest: +SKIP
    ...     face = await client.reconstruct("me.jpg")
    """

    def __init__(self, *url: Any, threads: int = 16, **options: Any) -> None:
        """Nothing is sent yet.

        Args:
            url, options: as for Client.
            threads: calls that are worked on at once; further ones wait.

        Raises:
            ConfigError, MissingDependencyError: as Client, and threads below 1.
        """
        if threads < 1:
            raise ConfigError(f"threads: expected at least 1, got {threads}")
        self._closed = False
        self._client = Client(*url, **options)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="chebface-client")

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def url(self) -> str:
        """See Client."""
        return self._client.url

    @property
    def carrier(self) -> str:
        """See Client."""
        return self._client.carrier

    @property
    def repeats(self) -> int:
        """See Client."""
        return self._client.repeats

    async def close(self) -> None:
        """End the connections. Safe to call twice."""
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._client.close)

    async def is_ready(self) -> bool:
        """See Client."""
        return await self._run(self._client.is_ready)

    async def topology(self) -> Topology:
        """See Client."""
        return await self._run(lambda: self._client.topology)

    async def reconstruct(self, photo: Photo, *, deadline_s: float | None = None) -> Face:
        """See Client."""
        return await self._run(lambda: self._client.reconstruct(photo, deadline_s=deadline_s))

    async def reconstruct_all(self, photo: Photo, *, deadline_s: float | None = None) -> list[Face]:
        """See Client."""
        return await self._run(lambda: self._client.reconstruct_all(photo, deadline_s=deadline_s))

    async def parameters(self, photo: Photo, *, deadline_s: float | None = None) -> np.ndarray:
        """See Client."""
        return await self._run(lambda: self._client.parameters(photo, deadline_s=deadline_s))

    def map(
        self,
        photos: Iterable[Photo] | AsyncIterable[Photo],
        *,
        concurrency: int = 8,
        errors: Literal["raise", "return"] = "raise",
        deadline_s: float | None = None,
    ) -> AsyncIterator[Any]:
        """See Client; the photos may come from an asynchronous iterator, and the results do."""
        return self._stream(photos, self._client._plan(concurrency, errors, deadline_s), concurrency)

    async def _stream(
        self, photos: Iterable[Photo] | AsyncIterable[Photo], work: Callable[[Photo], Any], concurrency: int
    ) -> AsyncIterator[Any]:
        loop = asyncio.get_running_loop()
        pool = ThreadPoolExecutor(concurrency, thread_name_prefix="chebface-map")
        begun: deque[asyncio.Future[Any]] = deque()
        try:
            async for photo in _each(photos):
                begun.append(loop.run_in_executor(pool, work, photo))
                while begun and (len(begun) >= AHEAD * concurrency or begun[0].done()):
                    yield await begun.popleft()
            while begun:
                yield await begun.popleft()
        finally:
            for future in begun:
                future.add_done_callback(_look)
                future.cancel()
            pool.shutdown(wait=False, cancel_futures=True)

    async def _run(self, call: Callable[[], R]) -> R:
        if self._closed:
            raise InputError(f"the client of {self.url} is closed: make a new one")
        return await asyncio.get_running_loop().run_in_executor(self._pool, call)


async def _each(photos: Iterable[Photo] | AsyncIterable[Photo]) -> AsyncIterator[Photo]:
    if isinstance(photos, AsyncIterable):
        async for photo in photos:
            yield photo
    else:
        for photo in photos:
            yield photo


def _look(future: asyncio.Future[Any]) -> None:
    """Nobody reads this result any more; asyncio would complain about its error."""
    if not future.cancelled():
        future.exception()
