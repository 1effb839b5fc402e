"""Shared memory of the client: reused, given up where it is not safe, refused with a reason, and never left behind."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from test_client_fake import grey, level_of

from chebface.client import Client, Retry
from chebface.client.memory import PREFIX, SHM, Memory, Region, bytes_of, sweep
from chebface.client.testing import FakeDetector, FakeTransport
from chebface.client.wire import Deadline, Failure, Part, Request
from chebface.errors import ServerError, ServerUnavailableError
from chebface.signature import RECONSTRUCT, TOPOLOGY


class Memorable(FakeTransport):
    """A fake that takes shared memory, and works in it as a server does."""

    is_local = True

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[str, int] = {}
        self.calls: list[str] = []
        self.says: Failure | None = None

    def register(self, name: str, key: str, size: int, timeout_s: float) -> None:
        self.calls.append("register")
        if self.says:
            raise self.says
        self.known[name] = size

    def unregister(self, name: str, timeout_s: float) -> None:
        self.calls.append("unregister")
        if self.says:
            raise self.says
        del self.known[name]

    def send(self, request: Request, timeout_s: float, region: Region | None = None) -> dict[str, Part]:
        if region and region.name not in self.known:
            raise Failure("INVALID_ARGUMENT", f"Unable to find shared memory region: '{region.name}'")
        parts = super().send(request, timeout_s)
        for name, part in parts.items() if region else ():
            offset, size = region.places[name]
            region._map[offset : offset + size] = bytes(part.content)
            parts[name] = Part(part.dtype, part.shape, None)
        return parts


def ours() -> set[str]:
    return {path.name for path in SHM.glob(f"{PREFIX}*")}


def test_regions_are_reused_and_removed() -> None:
    fake, before = Memorable(), ours()
    with Client(transport=fake, detector=FakeDetector()) as client:
        assert "not tried yet" in client.carrier
        for level in (3, 4):
            assert level_of(client.reconstruct(grey(level))) == level
        assert client.carrier == "fake, shared memory"
        assert fake.calls == ["register"]
        assert len(ours() - before) == 1
    assert fake.calls == ["register", "unregister"]
    assert ours() <= before


def test_a_region_whose_answer_was_lost_is_never_used_again() -> None:
    fake, before = Memorable(), ours()
    with Client(transport=fake, detector=FakeDetector(), retry=Retry(attempts=1)) as client:
        for failure, left in (("busy", 1), ("broken", 1), ("dead", 0)):
            fake.fail(failure, times=1)
            with pytest.raises(ServerError):
                client.reconstruct(grey(1))
            assert len(ours() - before) == left, failure
        assert level_of(client.reconstruct(grey(5))) == 5
        for _ in range(9):
            fake.fail("dead", times=1)
            with pytest.raises(ServerUnavailableError):
                client.reconstruct(grey(1))
        assert "requests were lost" in client.carrier
        assert level_of(client.reconstruct(grey(6))) == 6
    assert ours() <= before


def test_a_server_that_was_started_anew_is_told_again() -> None:
    fake = Memorable()
    with Client(transport=fake, detector=FakeDetector()) as client:
        client.reconstruct(grey(1))
        fake.known.clear()
        assert level_of(client.reconstruct(grey(5))) == 5  # on the wire
        assert level_of(client.reconstruct(grey(6))) == 6
        assert fake.calls == ["register", "register"]
        assert len(fake.known) == 1


def test_a_refusal_is_kept_and_a_silence_is_not() -> None:
    fake = Memorable()
    fake.says = Failure("UNAVAILABLE", "failed to connect")
    with Client(transport=fake, detector=FakeDetector()) as client:
        client.reconstruct(grey(1))
        assert "not tried yet" in client.carrier
        fake.says = Failure("UNAVAILABLE", "This protocol is restricted")
        client.reconstruct(grey(1))
        assert client.carrier == "fake, no shared memory: the server refuses it (This protocol is restricted)"
        client.reconstruct(grey(1))
        assert fake.calls == ["register"] * 2
    with Client(transport=fake, detector=FakeDetector(), shared_memory="on") as client:
        client._ask_topology(Deadline(5))  # strings have no place in it
        with pytest.raises(ServerError, match="shared_memory: wanted 'on', but the server refuses it"):
            client.parameters(grey(1))


def test_a_hung_server_leaves_the_request_most_of_its_time() -> None:
    class Hung(Memorable):
        def register(self, name: str, key: str, size: int, timeout_s: float) -> None:
            time.sleep(timeout_s)
            raise Failure("DEADLINE_EXCEEDED", "Deadline Exceeded")

    fake = Hung()
    fake.fail("hung")
    client = Client(transport=fake, detector=FakeDetector())
    with pytest.raises(ServerUnavailableError, match="not say that it is alive"):
        client.parameters(grey(1), deadline_s=1)
    assert 0.3 < fake.timeouts_s[0] < 0.8


def test_no_room_in_memory_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, start: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    before = ours()
    monkeypatch.setattr("os.posix_fallocate", full)
    with Client(transport=Memorable(), detector=FakeDetector()) as client:
        assert level_of(client.reconstruct(grey(5))) == 5
        assert "No space left" in client.carrier
    assert ours() == before


def test_regions_hold_a_request_and_its_answer() -> None:
    small, large = (Request.make(RECONSTRUCT, {"crop": np.zeros((b, 112, 112, 3), np.uint8)}) for b in (1, 32))
    assert 100_000 < bytes_of(small) < 1 << 17
    assert bytes_of(large) > 31 * bytes_of(small)
    assert bytes_of(Request.make(TOPOLOGY, {"request": np.zeros(1, np.int32)})) == 0
    memory = Memory(Memorable(), "auto")
    region = memory.lease(large, 1.0)
    offsets = sorted(region.places.values())
    assert all(at + size <= after for (at, size), (after, _) in itertools.pairwise(offsets))
    memory.close()
    memory.give_back(region)  # later than the close
    assert region.name not in ours()


def test_leftovers_of_killed_clients_are_swept(tmp_path: Path) -> None:
    region = Region(1 << 17)
    left = SHM / f"{PREFIX}0_left"
    left.write_bytes(b"x")
    assert sweep() >= 1
    assert not left.exists()
    assert region.name in ours()
    region.remove()
    region.remove()


def test_a_sweep_takes_no_region_that_is_being_made() -> None:
    """Clients that start at the same time sweep what the others are only just making."""
    over = threading.Event()

    def sweeps() -> None:
        while not over.is_set():
            sweep()

    def make() -> bool:
        region = Region(4096)
        time.sleep(1e-4)
        stays = (SHM / region.name).exists()
        region.remove()
        return stays

    with ThreadPoolExecutor(12) as pool:
        sweepers = [pool.submit(sweeps) for _ in range(4)]
        try:
            assert all(pool.map(lambda _: make(), range(2000)))
        finally:
            over.set()
    assert not [each.exception() for each in sweepers if each.exception()]


def test_leaving_without_closing_leaves_nothing() -> None:
    program = (
        "from test_client_memory import *\n"
        "client = Client(transport=(fake := Memorable()), detector=FakeDetector())\n"
        "client.reconstruct(grey(1)); print(*fake.known)\n"
        "fake.unregister = lambda *a: print('told')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        cwd=Path(__file__).parent,
    )
    name, told = done.stdout.split()
    assert (told, done.stderr) == ("told", "")
    assert name not in ours()
