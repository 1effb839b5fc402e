"""A real server killed, drained, renewed, starved and attacked while faces go through it.

Nothing lost means that every request got an answer or a typed error, and that every answer is the right one. Traffic is
the SDK's, with its own repeats; what is sent by hand is counted too. The server is asked for a known face after each
fault.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.hostile import Send, direct_inputs, http_request, proxied_inputs
from bench.record import where
from chebface.canary import draw_face, run_here
from chebface.client import Client
from chebface.crop import ARCFACE_POINTS_PX
from chebface.detect import Detector
from chebface.errors import AssetError, ChebfaceError, MissingDependencyError, ServerError
from chebface.pipeline import Finder
from chebface.proxy import Proxy
from chebface.repository import check_repository, find_model
from chebface.server import FOLDER, SHM, Server
from chebface.signature import CROP_PX, LEAVES
from chebface.wheel import HOST

HEADER = f"{'fault':24} tried requests answered errors   lost  what else was checked"
SCALES = {"small": 1, "full": 10}
CALLERS = 4
RIGHT_M = 1e-5  # of a vertex: other batches take other sums
DEADLINE_S = 20.0
_START_S = 120.0
_ROOT = Path(__file__).resolve().parent.parent
_PHOTOS = 8  # different ones, so that answers that change places are seen


Say = Callable[[str], None]


@dataclass
class Tally:
    """What became of the requests of one fault."""

    requests: int = 0
    answered: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)  # what was neither answered rightly nor refused by a typed error
    lock: threading.Lock = field(default_factory=threading.Lock)

    def call(self, send: Send) -> bool:
        """Count one request; `send` says what is wrong with its answer."""
        with self.lock:
            self.requests += 1
        wrong: str | None = None
        try:
            wrong = send()
            refused = None
        except ChebfaceError as error:
            refused = type(error).__name__
        except Exception as error:  # an error without a type of ours is what is looked for
            refused, wrong = None, f"{type(error).__name__}: {error}"
        with self.lock:
            if wrong:
                self.lost.append(wrong)
            elif refused:
                self.errors[refused] += 1
            else:
                self.answered += 1
        return refused is None and wrong is None


class _Framed(Detector):
    """Finds the one face of a picture that is an aligned crop."""

    name, threshold = "framed", 0.5

    def _find(self, picture: np.ndarray) -> np.ndarray:
        side = picture.shape[0]
        points = ARCFACE_POINTS_PX * (side / CROP_PX)
        return np.concatenate([[0, 0, side, side, 1], points.ravel()])[None].astype(np.float32)


class Traffic:
    """Callers that send known faces without a pause and compare what comes back, while a `with` block runs."""

    def __init__(self, faces: Faces, tally: Tally, urls: list[str], callers: int = CALLERS) -> None:
        self._faces, self._tally = faces, tally
        self._client = Client(urls, detector=_Framed(), deadline_s=DEADLINE_S)
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._send, args=(k,), daemon=True) for k in range(callers)]

    def _send(self, first: int) -> None:
        number = first
        while not self._over.is_set():
            number += 1
            if not self._tally.call(partial(self._faces.ask, self._client, number % _PHOTOS)):
                self._over.wait(0.05)

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(2 * DEADLINE_S)
            if thread.is_alive():
                self._tally.lost.append(f"a caller still waits {2 * DEADLINE_S:g} s after its deadline")
        self._client.close()

    def flow(self, count: int = 20) -> None:
        """Wait until so many more requests were answered.

        Raises:
            ServerError: they were not, in time.
        """
        end, wanted = time.monotonic() + _START_S, self._tally.answered + count
        while self._tally.answered < wanted:
            if time.monotonic() > end:
                raise ServerError(f"{self._client.url}: answers no more; last errors: {dict(self._tally.errors)}")
            time.sleep(0.02)


class Faces:
    """Photographs whose heads are known, from the same model files run in this process."""

    def __init__(self, repository: Path) -> None:
        face = draw_face().astype(int)
        self.photos = [np.clip(face + 8 * k - 28, 0, 255).astype(np.uint8) for k in range(_PHOTOS)]
        finder = Finder(detector=_Framed())
        crops = np.concatenate([finder._prepare(photo).crops_u8 for photo in self.photos])
        self.vertices = run_here(repository, crops)["vertices"]

    def ask(self, client: Client, which: int) -> str | None:
        """Send one of them; what is wrong with its answer."""
        error = float(np.abs(client.reconstruct(self.photos[which]).vertices - self.vertices[which]).max())
        return None if error < RIGHT_M else f"photo {which}: a vertex is {error:g} m from where it belongs"


@dataclass
class Stage:
    """What a fault works on."""

    repository: Path  # a copy, to be changed
    folder: Path  # to write in
    faces: Faces
    times: int  # how often
    tally: Tally = field(default_factory=Tally)
    notes: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def note(self, text: str, held: bool = True) -> None:
        """Something else that was looked at, and whether it held."""
        (self.notes if held else self.failed).append(text)

    def expect_right(self, url: str, what: str = "right afterwards") -> None:
        """A known face through the server at url."""
        tally = Tally()
        with Client(url, detector=_Framed(), deadline_s=DEADLINE_S) as client:
            tally.call(lambda: self.faces.ask(client, 0))
        self.note(what, tally.answered == 1)
        self.failed += tally.lost


class _Command:
    """`chebface serve` as a user runs it, its events read as they come."""

    def __init__(self, stage: Stage) -> None:
        ports = _free_ports(3)
        self.url, self.http_port = f"{HOST}:{ports[0]}", ports[1]
        flags = [f"--{name}-port={port}" for name, port in zip(("grpc", "http", "metrics"), ports, strict=True)]
        program = [
            sys.executable,
            "-c",
            "from chebface.cli import main; main()",
            "serve",
            f"--repository={stage.repository}",
        ]
        self.process = subprocess.Popen(
            [*program, "--log-format=json", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"TMPDIR": str(stage.folder)},
        )
        self.events: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            with contextlib.suppress(ValueError):
                self.events.append(json.loads(line))

    def await_ready(self, nth: int = 1) -> int:
        """The process id of the server, ready for the nth time.

        Raises:
            ServerError: it is not, in time.
        """
        end = time.monotonic() + _START_S
        while time.monotonic() < end and self.process.poll() is None:
            ready = [event for event in self.events if event["event"] == "ready"]
            if len(ready) >= nth:
                return int(ready[nth - 1]["pid"])
            time.sleep(0.05)
        raise ServerError(f"chebface serve was not ready {nth} times; events: {self.events[-3:]}")

    def end(self, stage: Stage) -> None:
        """SIGTERM; it must end well and leave nothing in memory or temporary folders."""
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = -9
        self._reader.join(5)
        if self.process.stdout:
            self.process.stdout.close()
        stage.note(f"exit code {code}", code == 0)
        regions = [f"chebface_{self.process.pid}_*", f"chebface_client_{os.getpid()}_*"]
        left = [*stage.folder.glob(f"{FOLDER}*"), *(path for name in regions for path in SHM.glob(name))]
        stage.note(f"left {', '.join(map(str, left))}" if left else "nothing left behind", not left)


def kill_server(stage: Stage) -> None:
    """kill -9 of the server's process: `chebface serve` starts it anew."""
    _kill_under_load(stage, lambda pid: os.kill(pid, signal.SIGKILL))


def kill_backend(stage: Stage) -> None:
    """kill -9 of a backend's process: Triton stays "ready" and never starts it again; `chebface serve` does."""
    killed: list[int] = []

    def kill(pid: int) -> None:  # another model's each time
        backends = _backends_of(pid)
        killed.append(backends[len(killed) % len(backends)])
        os.kill(killed[-1], signal.SIGKILL)

    _kill_under_load(stage, kill)


def _kill_under_load(stage: Stage, kill: Callable[[int], None]) -> None:
    served = _Command(stage)
    try:
        pid = served.await_ready()
        with Traffic(stage.faces, stage.tally, [served.url]) as traffic:
            for k in range(stage.times):
                traffic.flow()
                kill(pid)
                pid = served.await_ready(k + 2)
                traffic.flow()
        stage.note(f"{stage.times} restarts by itself")
        stage.expect_right(served.url)
    finally:
        served.end(stage)


def drain(stage: Stage) -> None:
    """SIGTERM under load: what is in flight is answered, what comes later is refused, nothing is left."""
    for _ in range(stage.times):
        served = _Command(stage)
        try:
            served.await_ready()
            with Traffic(stage.faces, stage.tally, [served.url]) as traffic:
                traffic.flow()
                served.process.send_signal(signal.SIGTERM)
                served.process.wait(60)
        finally:
            served.end(stage)
        late = [each["event"] for each in served.events][-2:]
        stage.note("drained, then stopped", late == ["draining", "stopped"])


def renew(stage: Stage) -> None:
    """A new model version under load: two servers, each drained and started with the new version in its turn."""
    newer = stage.folder / "newer"
    shutil.copytree(stage.repository, newer)
    for config in newer.glob("*/config.pbtxt"):
        if (config.parent / "1").is_dir():
            (config.parent / "1").rename(config.parent / "2")
        text = config.read_text()
        config.write_text(
            text.replace("versions: [ 1 ]", "versions: [ 2 ]").replace("model_version: 1", "model_version: 2")
        )
    check_repository(newer)
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(Server(stage.repository)) for _ in range(2)]
        ports = [server.ports for server in servers]
        with Traffic(stage.faces, stage.tally, [server.url for server in servers]) as traffic:
            for k in range(2 * stage.times):
                traffic.flow()
                old, at = servers[k % 2], ports[k % 2]
                old.stop()
                given = {f"{name}_port": port for name, port in at.items()}
                repository = newer if k // 2 % 2 == 0 else stage.repository
                servers[k % 2] = stack.enter_context(Server(repository, **given))  # type: ignore[arg-type]
            traffic.flow()
        for server in servers:
            stage.expect_right(server.url)
    errors = sum(stage.tally.errors.values())
    stage.note("not one request failed" if not errors else f"{errors} requests failed", not errors)


def lose_one_of_two(stage: Stage) -> None:
    """Two servers behind one client, and the one that it uses killed."""
    for _ in range(stage.times):
        with Server(stage.repository) as first, Server(stage.repository) as second:
            with Traffic(stage.faces, stage.tally, [first.url, second.url]) as traffic:
                traffic.flow()
                os.kill(first.pid or 0, signal.SIGKILL)
                traffic.flow()
            stage.expect_right(second.url)
    errors = sum(stage.tally.errors.values())
    stage.note("the other took over without an error" if not errors else f"{errors} requests failed", not errors)


def damage_files(stage: Stage) -> None:
    """Corrupt, truncated, empty, missing and swapped model files, before a server loads them."""
    verify(stage.repository)
    names = list(LEAVES)
    damages: dict[str, Callable[[Path, bytes], Any]] = {
        "a bit in the middle": lambda path, whole: path.write_bytes(_flip(whole, len(whole) // 2)),
        "a bit near the end": lambda path, whole: path.write_bytes(_flip(whole, len(whole) - 40)),
        "half of it": lambda path, whole: path.write_bytes(whole[: len(whole) // 2]),
        "empty": lambda path, whole: path.write_bytes(b""),
        "missing": lambda path, whole: path.unlink(),
    }
    for name in names:
        path = find_model(stage.repository, name).resolve()
        whole, other = path.read_bytes(), find_model(stage.repository, names[names.index(name) - 1]).read_bytes()
        for what, damage in (
            damages | {"another model's": lambda path, whole, new=other: path.write_bytes(new)}
        ).items():
            damage(path, whole)
            stage.tally.call(lambda what=what, name=name: _must_refuse(stage.repository, f"{name}: {what}"))  # type: ignore[misc]
            path.write_bytes(whole)
    verify(stage.repository)
    stage.note("found by `python -m export repository --check`; whole files pass")


def _must_refuse(repository: Path, what: str) -> str:
    verify(repository)
    return f"{what} was not noticed"


def verify(repository: Path) -> None:
    """`python -m export repository --check`.

    Raises:
        AssetError: it says that something is wrong.
    """
    command = [sys.executable, "-m", "export", "repository", "--check", "--repository", str(repository)]
    found = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    if found.returncode:
        raise AssetError(found.stderr.strip())


def _flip(whole: bytes, place: int) -> bytes:
    return whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :]


def fill_disk(stage: Stage) -> None:
    """A full disk under the server's log and under a client that saves its results."""
    small = stage.folder / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "chebface", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        stage.note("skipped: a small disk could not be mounted (that wants root)")
        return
    try:
        with Server(stage.repository, log_path=small / "server.log") as server:
            with contextlib.suppress(OSError), open(small / "rest", "wb", buffering=0) as rest:
                while True:
                    rest.write(bytes(512))
            with Traffic(stage.faces, stage.tally, [server.url]) as traffic:
                traffic.flow(20 * stage.times)
                with Client(server.url, detector=_Framed()) as client:
                    face = client.reconstruct(stage.faces.photos[0])
                    try:
                        face.save(small / "out", stage.faces.photos[0])
                        stage.note("a full disk was not noticed", False)
                    except OSError as error:
                        stage.note(f"saving says: {error.strerror}")
            stage.expect_right(server.url)
        left = [str(path) for path in small.rglob("*") if path.is_file() and path.name not in ("server.log", "rest")]
        stage.note("nothing half-written" if not left else f"left {left}", not left)
    finally:
        subprocess.run(["umount", str(small)], check=False)


def vanish(stage: Stage) -> None:
    """Clients that trickle, stop in the middle of a request, or leave before the answer."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Server(stage.repository))
        traffic = stack.enter_context(Traffic(stage.faces, stage.tally, [server.url]))
        traffic.flow()
        port, request = server.ports["http"], http_request(draw_face()[None])
        slow = [stack.enter_context(socket.create_connection((HOST, port))) for _ in range(20)]
        for k in range(40 * stage.times):
            with contextlib.suppress(OSError), socket.create_connection((HOST, port)) as gone:
                gone.sendall(request[: len(request) * (k % 4 + 1) // 4])  # one in four is whole, and not waited for
            for line in slow:
                with contextlib.suppress(OSError):  # the server may have had enough
                    line.sendall(request[k : k + 1])
        stage.note(f"{40 * stage.times} left in the middle, {len(slow)} trickled")
        traffic.flow()
        stage.expect_right(server.url)


def attack(stage: Stage) -> None:
    """Hostile inputs: to the server itself what it survives, through nginx what it does not (DoS of Triton 2.51)."""
    rng = np.random.default_rng(0)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Server(stage.repository))
        kinds = dict(direct_inputs(server, rng))
        counts = Counter(dict.fromkeys(kinds, 1000 if stage.times > 1 else 20))
        for name in ("a decompression bomb", "a header of gigabytes"):
            counts[name] = 50 if stage.times > 1 else 4
        _attack_with(stage, server, kinds, counts)
        try:
            ports = _free_ports(2)
            proxy = Proxy(HOST, grpc_port=ports[0], http_port=ports[1], rate=100_000, connections=1000, drain_s=1)
            proxy.start(server.ports)
        except MissingDependencyError as error:
            stage.note(f"without the inputs that nginx must stop ({error})")
            return
        stack.callback(proxy.stop)
        kinds = dict(proxied_inputs(proxy.ports["http"]))
        _attack_with(stage, server, kinds, Counter(dict.fromkeys(kinds, 5 if stage.times > 1 else 1)))
    stage.note("right after each hundred, and after each kind")


def _attack_with(stage: Stage, server: Server, kinds: dict[str, Send], counts: Counter[str]) -> None:
    for name, send in kinds.items():
        for k in range(counts[name]):
            stage.tally.call(send)
            if k % 100 == 99:
                stage.expect_right(server.url, "")
        stage.expect_right(server.url, f"{counts[name]} x {name}")


def _backends_of(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task").glob("*/children")
    return sorted(int(each) for path in found for each in path.read_text().split())


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        probes = [held.enter_context(socket.create_server((HOST, 0))) for _ in range(count)]
        return [int(probe.getsockname()[1]) for probe in probes]


FAULTS: dict[str, Callable[[Stage], None]] = {
    "server killed": kill_server,
    "backend killed": kill_backend,
    "SIGTERM under load": drain,
    "new version under load": renew,
    "one of two servers dies": lose_one_of_two,
    "damaged model files": damage_files,
    "disk full": fill_disk,
    "clients that vanish": vanish,
    "hostile inputs": attack,
}
# Minutes are the limit: five restarts in ten of them is what `chebface serve` allows itself.
_TIMES = {"small": dict.fromkeys(FAULTS, 1), "full": dict.fromkeys(FAULTS, 4)}


def measure(
    repository: Path, faults: tuple[str, ...] = tuple(FAULTS), scale: str = "small", say: Say = lambda line: None
) -> list[dict[str, Any]]:
    """One row for each fault.

    Args:
        repository: a filled model repository; it is copied.
        faults: of FAULTS.
        scale: "small" does each once, "full" four times, with ten thousand hostile inputs.
        say: called with each row as text.

    Returns:
        rows of fault, tried, requests, answered, errors (by type), lost (with reasons), checked (what else held),
        failed (what did not).

    Raises:
        ServerError: an unknown fault, or a server that does not start at all.
        AssetError: the repository is not filled.
    """
    unknown = sorted(set(faults) - set(FAULTS))
    if unknown:
        raise AssetError(f"fault: expected some of {', '.join(FAULTS)}, got {', '.join(unknown)}")
    check_repository(repository)
    faces = Faces(repository)
    rows = []
    for name in faults:
        with tempfile.TemporaryDirectory(prefix="chebface-faults-") as folder:
            copy = Path(folder) / "models"
            shutil.copytree(repository, copy)
            stage = Stage(copy, Path(folder), faces, _TIMES[scale][name])
            FAULTS[name](stage)
        tally = stage.tally
        row = {
            "bench": "faults",
            "fault": name,
            "tried": stage.times,
            "requests": tally.requests,
            "answered": tally.answered,
            "errors": dict(tally.errors),
            "lost": len(tally.lost),
            "lost_reasons": tally.lost[:5],
            "checked": [note for note in dict.fromkeys(stage.notes) if note],
            "failed": list(dict.fromkeys(stage.failed)),
        } | where()
        rows.append(row)
        say(_spell(row))
    return rows


def _spell(row: dict[str, Any]) -> str:
    errors = sum(row["errors"].values())
    bad = "".join(f"; NOT: {each}" for each in (*row["failed"], *row["lost_reasons"]))
    counts = f"{row['tried']:5} {row['requests']:8} {row['answered']:8} {errors:6} {row['lost']:6}"
    return f"{row['fault']:24}{counts}  {'; '.join(row['checked'])}{bad}"
