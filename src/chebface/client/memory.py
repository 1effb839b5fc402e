"""Shared memory with a server on the same machine: tensors in a file of /dev/shm that both have mapped.

A region serves one request at a time. Where an answer was lost, the server may still write into the region, so that it
is never used again. Triton has this off by default since 2.69, and our own server keeps it for who has its key: it is
asked once, and what it says is kept as the reason.
"""

from __future__ import annotations

import atexit
import contextlib
import mmap
import os
import secrets
import threading
import weakref
from pathlib import Path

from chebface.client.wire import Failure, Part, Request, Transport
from chebface.errors import ServerError

SHM = Path("/dev/shm")
PREFIX = "chebface_client_"
SMALLEST = 1 << 17  # bytes of a region: one crop and its answer
MOST_LOST = 8  # regions that the server may still write to; with more, requests travel on the wire
_ALIGN = 64
_REGISTER_S = 2.0


class Region:
    """One file in /dev/shm, mapped here and known to the server."""

    def __init__(self, size: int) -> None:
        """Make the file: all of its memory now, for a full /dev/shm would end the process later.

        Raises:
            OSError: there is no room, or no /dev/shm.
        """
        path, self._file = _make_file()
        self.name = path.name
        self.key, self.size = f"/{self.name}", size
        self.places: dict[str, tuple[int, int]] = {}  # offset and bytes by tensor, of the request it holds
        try:
            os.posix_fallocate(self._file, 0, size)
            self._map = mmap.mmap(self._file, size)
        except BaseException:
            os.close(self._file)
            path.unlink(missing_ok=True)
            raise
        self._end = weakref.finalize(self, _remove, path, self._file, self._map, os.getpid())  # at exit too

    def write(self, request: Request) -> None:
        """Lay out a request and copy its inputs."""
        at, self.places = 0, {}
        for tensor in (*request.inputs, *request.outputs):
            self.places[tensor.name] = (at, request.size_of(tensor))
            at += -(-request.size_of(tensor) // _ALIGN) * _ALIGN
        for tensor, content in zip(request.inputs, request.contents, strict=True):
            offset, size = self.places[tensor.name]
            self._map[offset : offset + size] = content

    def read(self, parts: dict[str, Part]) -> dict[str, Part]:
        """The outputs with their bytes, copied out."""
        filled = {}
        for name, part in parts.items():
            offset, size = self.places.get(name, (0, 0))
            filled[name] = Part(part.dtype, part.shape, self._map[offset : offset + size])
        return filled

    def remove(self) -> None:
        """Remove the file and this process's mapping. Safe to call twice."""
        self._end()


def _make_file() -> tuple[Path, int]:
    """A new file, locked: that says that its owner lives. Another client's sweep may take it before it is locked."""
    import fcntl

    while True:
        path = SHM / f"{PREFIX}{os.getpid()}_{secrets.token_hex(8)}"
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file).st_nlink:
                return path, file
        except BlockingIOError:  # it is being taken
            pass
        except BaseException:
            os.close(file)
            path.unlink(missing_ok=True)
            raise
        os.close(file)


def _remove(path: Path, file: int, memory: mmap.mmap, owner: int) -> None:
    memory.close()
    os.close(file)
    if os.getpid() == owner:  # not a fork
        path.unlink(missing_ok=True)


def bytes_of(request: Request) -> int:
    """Room that a request and its answer need in a region; 0 where only the answer tells."""
    sizes = [request.size_of(tensor) for tensor in (*request.inputs, *request.outputs)]
    return sum(-(-size // _ALIGN) * _ALIGN for size in sizes) if all(sizes) else 0


def sweep() -> int:
    """Remove what killed clients left in /dev/shm: files that nobody holds a lock on. Returns how many."""
    import fcntl

    swept = 0
    for path in SHM.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            file = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                swept += 1
            finally:
                os.close(file)
    return swept


class Memory:
    """The regions that one transport uses, and whether it can use any."""

    def __init__(self, transport: Transport, mode: str) -> None:
        """Nothing is tried yet.

        Args:
            transport: to register them with.
            mode: "auto", "on" (an error where it does not work) or "off".
        """
        self._transport, self._mode = transport, mode
        self._lock = threading.Lock()
        self._free: dict[int, list[Region]] = {}
        self._used: set[Region] = set()
        self._lost: list[str] = []
        self._works = False
        self.refusal = ""  # why there is none; empty while there may be
        if mode == "off":
            self.refusal = "switched off"
        elif not transport.is_local:
            self.refusal = "the server is not on this machine's loopback"

    def __str__(self) -> str:
        if self._works and not self.refusal:
            return "shared memory"
        return f"no shared memory: {self.refusal or 'not tried yet'}"

    def lease(self, request: Request, timeout_s: float) -> Region | None:
        """A region that holds the request; None sends it on the wire.

        Raises:
            ServerError: the mode is "on" and the server, or this machine, has no shared memory.
        """
        needed = bytes_of(request)
        if needed and not self.refusal:
            size = max(SMALLEST, 1 << (needed - 1).bit_length())
            with self._lock:
                spare = self._free.get(size)
                region = spare.pop() if spare else None
            region = region or self._make(size, timeout_s)
            if region is not None:
                region.write(request)
                with self._lock:
                    self._used.add(region)
                return region
        if needed and self.refusal and self._mode == "on":
            raise ServerError(
                f"{self._transport.url}: shared_memory: wanted 'on', but {self.refusal}; take 'auto', or give admin= "
                "with the server's key"
            )
        return None

    def _make(self, size: int, timeout_s: float) -> Region | None:
        try:
            if not self._works:
                sweep()
            region = Region(size)
        except (OSError, AttributeError, ImportError) as error:  # the last two: not a Linux
            self.refusal = f"this machine has none to give ({error})"
            return None
        try:
            self._transport.register(region.name, region.key, size, min(_REGISTER_S, timeout_s / 4))
        except Failure as failure:
            region.remove()
            if not failure.is_lost:  # its word, not its silence
                self.refusal = f"the server refuses it ({failure.text})"
            return None
        if not self._works:
            self._works = True
            atexit.register(_close_at_exit, weakref.ref(self))
        return region

    def give_back(self, region: Region) -> None:
        """The server is done with it."""
        with self._lock:
            known = region in self._used
            self._used.discard(region)
            if known:
                self._free.setdefault(region.size, []).append(region)
        if not known:  # forgotten, or the client was closed meanwhile
            region.remove()

    def abandon(self, region: Region) -> None:
        """The server may still be at work on it: it keeps its mapping, nobody else does."""
        region.remove()
        with self._lock:
            self._used.discard(region)
            self._lost.append(region.name)
            if len(self._lost) > MOST_LOST and not self.refusal:
                self.refusal = f"{len(self._lost)} requests were lost while the server could still answer into it"

    def forget(self) -> None:
        """The server knows none of the regions: it was started anew."""
        with self._lock:
            free, self._free = self._free, {}
            self._used.clear()
            self._lost.clear()
        for region in (region for regions in free.values() for region in regions):
            region.remove()

    def close(self) -> None:
        """Unregister what the server is done with, remove every file. Safe to call twice."""
        with self._lock:
            free, self._free = self._free, {}
            self._used.clear()
            self.refusal = self.refusal or "the client is closed"
        silent = False
        for region in (region for regions in free.values() for region in regions):
            if not silent:
                try:
                    self._transport.unregister(region.name, _REGISTER_S)
                except Failure as failure:
                    silent = failure.is_lost  # a dead server is asked once, not once for each
            region.remove()


def _close_at_exit(memory: weakref.ref[Memory]) -> None:
    found = memory()
    if found is not None:
        found.close()
