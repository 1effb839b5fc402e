"""What the faults are tried on: requests whose fate is counted, right answers, load, `chebface serve` as a program.

A request is *answered* when its answer is whole and the right one (that of the model files, run in this process), a
*typed error* when the client raises one of chebface.errors, and *lost* otherwise: a wrong or broken answer, an error of
another kind, no word by its deadline.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.record import DisagreesError, where
from chebface.canary import WORST_MM, draw_face, run_here
from chebface.client.connection import Connection, open_transport
from chebface.client.wire import Deadline, Retry, parse_url
from chebface.errors import ChebfaceError, ConfigError, InputError, MissingDependencyError, ServerUnavailableError
from chebface.files import write_whole
from chebface.proxy import TOKEN_VARIABLE
from chebface.repository import SUMS, check_repository, find_model
from chebface.signature import DECODE, PARAMETERS, RECONSTRUCT

Answers = dict[str, np.ndarray]
SCALES = ("small", "full")
TOKEN = "bench-faults-0123456789"
CROPS = 8  # faces that are sent
DEADLINE_S = 25.0
GRACE_S = 5.0  # beyond a deadline: asking whether the server is alive, and a busy machine
NEXT = 1.2  # what the next version's parameters are times the first's
_SERVE = (sys.executable, "-c", "from chebface.cli import main; main()", "serve")
_MOUNT = 'mount -t tmpfs -o "size=$1" none "$2" && shift 2 && exec "$@"'


class Outcome:
    """One fault: what became of the requests, and what else was looked at."""

    def __init__(self, fault: str) -> None:
        self.fault, self.tried, self.requests, self.answered = fault, 0, 0, 0
        self.errors: Counter[str] = Counter()
        self.why: list[str] = []  # of what was lost, as far as it is known
        self.checked: list[str] = []
        self.failed: list[str] = []
        self._texts: dict[str, str] = {}
        self._lock = threading.Lock()

    @property
    def lost(self) -> int:
        """Requests with neither a right answer nor a typed error."""
        return self.requests - self.answered - self.errors.total()

    def expect(self, is_so: object, what: str, otherwise: str = "") -> None:
        """Note something else that should be so, and what is to be said where it is not."""
        if is_so:
            self.checked.append(what)
        else:
            self.failed.append(f"{what}: {otherwise}" if otherwise else what)

    def count(self, fate: Callable[[], str | None]) -> str | None:
        """One request: None from `fate` is a right answer, a text says why it is lost; ChebfaceError is typed."""
        with self._lock:
            self.requests += 1
        said: str | None = None
        try:
            lost = fate()
        except ChebfaceError as error:
            said = type(error).__name__
            self._texts.setdefault(said, str(error))
            if isinstance(error, InputError):  # of this program, not of a server
                said, lost = None, str(error)
        except Exception as error:  # what no client should ever see
            lost = f"{type(error).__name__}: {error}"
        with self._lock:
            if said:
                self.errors[said] += 1
            elif lost is None:
                self.answered += 1
            else:
                self.why.append(lost[:300])
        return said

    def told(self) -> str:
        """How many errors of each type there were, and the first of each in its words."""
        return "; ".join(f"{count} {name}, the first: {self._texts[name]}" for name, count in self.errors.items())

    def absorb(self, other: Outcome) -> None:
        """Count another's requests as one's own."""
        self.requests += other.requests
        self.answered += other.answered
        self.errors += other.errors
        self._texts = other._texts | self._texts
        self.why += other.why

    def row(self) -> dict[str, Any]:
        """As a record keeps it."""
        facts = {"bench": "faults", "case": self.fault, "what": "cpu", "tried": self.tried, "requests": self.requests}
        facts |= {"answered": self.answered, "typed_errors": self.errors.total(), "lost": self.lost}
        facts |= {
            "errors": dict(self.errors),
            "why": self.why[:5],
            "checked": list(dict.fromkeys(self.checked)),
            "failed": self.failed,
        }
        return facts | where()


class Bed:
    """What every fault needs: the repository in two versions, faces, their right answers, a folder."""

    def __init__(self, repository: Path, folder: Path, scale: str) -> None:
        if scale not in SCALES:
            raise ConfigError(f"scale: expected one of {', '.join(SCALES)}, got {scale!r}")
        self.folder, self.full = folder, scale == "full"
        self.first = Path(shutil.copytree(check_repository(repository), folder / "first"))
        self.live = Path(shutil.copytree(self.first, folder / "live"))  # what is served
        rng = np.random.default_rng(0)
        noise = rng.integers(-40, 40, (CROPS, *RECONSTRUCT.inputs[0].shape))
        self.crops_u8 = np.clip(draw_face() + noise, 0, 255).astype(np.uint8)
        self.right = run_here(self.first, self.crops_u8)

    def times(self, small: int, full: int) -> int:
        """As often as the scale says."""
        return full if self.full else small

    def next_version(self) -> tuple[Path, Answers]:
        """Another version of the models, and its right answers.

        Raises:
            DisagreesError: they could not be told from the first's.
        """
        folder = self.folder / "next"
        if not folder.is_dir():
            _write_next(self.first, folder)
        answers = run_here(folder, self.crops_u8)
        if not difference(answers, self.right) > 10:
            raise DisagreesError("the next version's answers are those of the first: a wrong one would not be seen")
        return folder, answers

    def bring_in(self, version: Path) -> None:
        """Write a version into what is served, as the export does: whole files, configurations last."""
        files = [path for path in version.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: path.suffix == ".pbtxt"):
            place = self.live / path.relative_to(version)
            if not place.is_file() or place.read_bytes() != path.read_bytes():
                write_whole(place, path.read_bytes())

    def wrong(self, url: str, right: Answers) -> str:
        """What is wrong with a server's answers now; empty where each face gets its right one."""
        connection = connect([url], attempts=1)
        try:
            got = connection.infer(RECONSTRUCT, {RECONSTRUCT.inputs[0].name: self.crops_u8}, Deadline(DEADLINE_S))
        except ChebfaceError as error:
            return str(error)
        finally:
            connection.close()
        worst = difference(got, right)
        return "" if worst <= 1 else f"{url}: {worst:.3g} of what an answer may differ"


def _write_next(first: Path, folder: Path) -> None:
    import onnx

    shutil.copytree(first, folder)
    old, name = find_model(folder, RECONSTRUCT.name), PARAMETERS.name
    proto = onnx.load(str(old))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(NEXT, np.float32), "times_next"))
    (place,) = (k for k, node in enumerate(proto.graph.node) if name in node.output)
    made = proto.graph.node[place].output
    made[:] = [f"{name}_first" if each == name else each for each in made]
    proto.graph.node.insert(place + 1, onnx.helper.make_node("Mul", [f"{name}_first", "times_next"], [name]))
    version = int(old.parent.name)
    shutil.move(old.parent, old.parent.with_name(str(version + 1)))
    new = old.parent.with_name(str(version + 1))
    onnx.save(proto, str(new / old.name))
    if (new / SUMS).is_file():
        lines = [line.partition("  ")[2] for line in (new / SUMS).read_text().splitlines()]
        sums = [f"{hashlib.sha256((new / file).read_bytes()).hexdigest()}  {file}\n" for file in lines]
        (new / SUMS).write_text("".join(sums))
    config = folder / RECONSTRUCT.name / "config.pbtxt"
    config.write_text(re.sub(r"(versions: \[ )\d+", rf"\g<1>{version + 1}", config.read_text()))


def difference(got: Answers, right: Answers) -> float:
    """The largest of a coordinate, as a share of what is allowed; NaN where there is one."""
    return max(float(1e3 * np.abs(got[t.name] - right[t.name]).max()) for t in DECODE.outputs) / WORST_MM


def connect(urls: Sequence[str], attempts: int = 3) -> Connection:
    """The client's own connection, with its retries, to servers that take over for each other."""
    ways = [open_transport(parse_url(url), token=TOKEN) for url in urls]
    return Connection(ways, retry=Retry(attempts=attempts), shared_memory="off")


class Load:
    """Threads that send faces over and over while a `with` block runs, and compare each answer."""

    def __init__(
        self,
        bed: Bed,
        outcome: Outcome,
        urls: Sequence[Sequence[str]],
        *,
        rights: Sequence[Answers] = (),
        batch: int = 1,
        attempts: int = 3,
        each: int | None = None,
    ) -> None:
        """Nothing is sent yet; a thread for each of `urls`, whose servers take over for each other.

        Args:
            bed, outcome: where faces come from, and where fates go.
            urls: of the servers, for each thread.
            rights: the answers that are right; the first version's where none are given.
            batch: faces of a request.
            attempts: of the client's retries.
            each: requests of a thread; None is until the block ends.
        """
        self._bed, self._outcome, self._batch, self._each = bed, outcome, batch, each
        self._rights = [*(rights or [bed.right])]
        self._connections = [connect(each, attempts) for each in urls]
        self._threads = [threading.Thread(target=self._run, args=(one,), daemon=True) for one in self._connections]
        self._over = threading.Event()

    def _run(self, connection: Connection) -> None:
        for k in itertools.count() if self._each is None else range(self._each):
            if self._each is None and self._over.is_set():
                return
            self._outcome.count(lambda k=k: self._ask(connection, (k + np.arange(self._batch)) % CROPS))  # type: ignore[misc]

    def _ask(self, connection: Connection, picked: np.ndarray) -> str | None:
        began = time.monotonic()
        crops_u8 = self._bed.crops_u8[picked]
        got = connection.infer(RECONSTRUCT, {RECONSTRUCT.inputs[0].name: crops_u8}, Deadline(DEADLINE_S))
        took_s = time.monotonic() - began
        if took_s > DEADLINE_S + GRACE_S:
            return f"an answer after {took_s:.1f} s, with a deadline of {DEADLINE_S:g} s"
        differences = [difference(got, {name: a[picked] for name, a in right.items()}) for right in self._rights]
        return None if any(one <= 1 for one in differences) else f"a wrong answer, {min(differences):.3g} of the limit"

    def more(self, count: int, most_s: float = 120.0) -> None:
        """Wait for so many further right answers.

        Raises:
            ServerUnavailableError: they do not come.
        """
        wanted, deadline = self._outcome.answered + count, time.monotonic() + most_s
        while self._outcome.answered < wanted:
            if time.monotonic() > deadline:
                raise ServerUnavailableError(f"no {count} answers within {most_s:g} s: {self._outcome.told()}")
            time.sleep(0.01)

    def rest(self) -> None:
        """No further requests; those that are on their way go on."""
        self._over.set()

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *ignored: object) -> None:
        self.rest()
        deadline = time.monotonic() + (self._each or 1) * (DEADLINE_S + GRACE_S)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))  # what does not come back is lost: it has no fate
        for connection in self._connections:
            connection.close()


class Served:
    """`chebface serve` as a program of its own, and what it says."""

    def __init__(
        self, bed: Bed, *options: str, bind: bool = False, room: tuple[str, int] | None = None, python: bool = False
    ) -> None:
        """Start it and wait until it is ready.

        Args:
            bed: whose repository.
            options: further ones.
            bind: behind nginx.
            room: "temporary" or "shared": that folder is a disk of so many kB, of its own.
            python: the network in Triton's Python backend, as where there is no compiler.

        Raises:
            ServerUnavailableError: it ended, or was not ready in time.
            MissingDependencyError: a disk of its own cannot be made here.
        """
        self.folder = Path(tempfile.mkdtemp(prefix="serve-", dir=bed.folder))
        self.ports = dict(zip(("grpc", "http", "metrics"), free_ports(3), strict=True))
        words = [word for name, port in self.ports.items() for word in (f"--{name}-port", str(port))]
        words += ["--repository", str(bed.live), "--log-format", "json", "--canary-s", "0.5", *options]
        words += ["--bind", "127.0.0.1", "--rate", "100000"] if bind else []
        self.disk = {"temporary": self.folder, "shared": Path("/dev/shm")}[room[0]] if room else self.folder
        prefix = ("unshare", "-rm", "sh", "-c", _MOUNT, "sh", f"{room[1]}k", str(self.disk)) if room else ()
        if prefix and (not shutil.which("unshare") or subprocess.run([*prefix, "true"], check=False).returncode):
            raise MissingDependencyError("a small disk of its own: unshare and tmpfs are not permitted here")
        self._process = subprocess.Popen(
            [*prefix, *_SERVE, *words],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ
            | {"TMPDIR": str(self.folder), TOKEN_VARIABLE: TOKEN}
            | ({"CHEBFACE_NATIVE": "0"} if python else {}),
        )
        self.pid = self._process.pid
        self.events: list[dict[str, Any]] = []
        self._seen = 0
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self.until("ready")
        except BaseException:
            self._process.kill()
            self._close()
            raise
        self.grpc, self.http = f"127.0.0.1:{self.ports['grpc']}", f"http://127.0.0.1:{self.ports['http']}"

    def _read(self) -> None:
        for line in self._process.stdout or ():
            with self._news:
                self.events.append(json.loads(line))
                self._news.notify_all()
        with self._news:
            self.events.append({"event": "ended"})
            self._news.notify_all()

    def until(self, name: str, most_s: float = 180.0) -> dict[str, Any]:
        """The next event of this name.

        Raises:
            ServerUnavailableError: it does not come.
        """
        deadline = time.monotonic() + most_s
        with self._news:
            while True:
                for event in self.events[self._seen :]:
                    self._seen += 1
                    if event["event"] == name:
                        return event
                left_s, ended = deadline - time.monotonic(), bool(self.events) and self.events[-1]["event"] == "ended"
                if ended or not self._news.wait(max(0.0, left_s)):
                    told = [event["event"] for event in self.events[-6:]]
                    raise ServerUnavailableError(f"chebface serve: no {name!r} within {most_s:g} s, but {told}")

    def said(self, name: str) -> int:
        """How many events of this name there were."""
        return sum(event["event"] == name for event in self.events)

    @property
    def inner(self) -> dict[str, Any]:
        """The facts of the Triton server that is there now: grpc, http, pid."""
        return [event for event in self.events if event["event"] in ("ready", "renewed")][-1]

    def stub(self, model: str) -> int:
        """The process of a backend.

        Raises:
            ServerUnavailableError: there is none.
        """
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError, IndexError):
                group = int(stat.read_text().rpartition(")")[2].split()[2])
                word = stat.with_name("cmdline").read_bytes().split(b"\0")[1]
                if group == self.inner["pid"] and f"/models/{model}/".encode() in word:
                    return int(stat.parent.name)
        raise ServerUnavailableError(f"no backend process of {model}")

    def metric(self, name: str, model: str) -> int:
        """A counter of Triton's."""
        connection = http.client.HTTPConnection("127.0.0.1", self.ports["metrics"], timeout=10)
        try:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        finally:
            connection.close()
        return sum(int(float(value)) for value in re.findall(rf'^{name}{{model="{model}".*?}} (\S+)', text, re.M))

    def fill(self) -> Path:
        """Write to its own disk until there is no room left. Returns the file."""
        path = Path(f"/proc/{self.pid}/root{self.disk}/filler")
        with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        return path

    def _close(self) -> None:
        self._process.wait()
        self._reader.join(10)
        if self._process.stdout is not None:
            self._process.stdout.close()

    def end(self, outcome: Outcome) -> None:
        """SIGTERM; what it should leave is nothing."""
        if self._process.poll() is None:
            self._process.terminate()
        try:
            code = self._process.wait(60)
            outcome.expect(code == 0, "exit code 0", f"got {code}")
        except subprocess.TimeoutExpired:
            outcome.expect(False, "ended within 60 s of SIGTERM")
            self._process.kill()
        self._close()
        left = [*self.folder.glob("chebface*"), *Path("/dev/shm").glob(f"chebface_{self.pid}_*")]
        outcome.expect(not left, "nothing left behind", ", ".join(map(str, left)))


@contextlib.contextmanager
def serve(bed: Bed, outcome: Outcome, *options: str, **settings: Any) -> Iterator[Served]:
    """A Served for a `with` block; that it ends as it should is noted."""
    served = Served(bed, *options, **settings)
    try:
        yield served
    finally:
        served.end(outcome)


def free_ports(count: int) -> list[int]:
    """So many ports of the loopback that nobody has now."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
