"""Start, warm, watch and stop a Triton Inference Server: the one inside the nvidia-pytriton wheel, on loopback only."""

from __future__ import annotations

import atexit
import contextlib
import http.client
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType

from chebface import backend, signature
from chebface.errors import (
    ChebfaceError,
    ConfigError,
    InputError,
    ServerBusyError,
    ServerError,
    ServerUnavailableError,
)
from chebface.repository import check_repository, materialise
from chebface.signature import BUSY_TEXTS, DEAD_TEXTS, MODELS, Tensor
from chebface.wheel import HOST, Wheel, find_wheel, make_environment

RESTRICTED = ("model-repository", "model-config", "shared-memory", "statistics", "trace", "logging")
ADMIN_NAME = "chebface-key"  # of the header that opens the restricted interfaces
HARDENED = (  # what any Triton server of ours is started with, here and in a container
    "--model-control-mode=none",
    "--exit-on-error=true",
    "--strict-readiness=true",
    "--disable-auto-complete-config",
    "--allow-sagemaker=false",
    "--allow-vertex-ai=false",
    "--reuse-grpc-port=false",
    "--reuse-http-port=false",
    "--metrics-config=summary_latencies=true",  # quantiles, not only sums
)
PORT_ATTEMPTS = 3  # a free port may be lost between its choice and its use
RESOURCE = "core"  # what a model at work holds one of, by its config.pbtxt
PORT_TAKEN = "already in use"
SILENCES = 3  # checks in a row without an answer before a server that is running counts as lost
LOG_TAIL = 40  # lines shown when the server fails
SHM = Path("/dev/shm")
FOLDER = "chebface-server-"  # begins the name of each running server's folder, in the system's temporary one
_OWNER = "owner"  # a file in it: locked while anything of the server lives; holds its prefix in shared memory
_PREFIX = re.compile(r"(chebface_[0-9]+_[0-9a-f]{8}_)?")
BROKEN_STOP_S = 2.0  # a server whose Python stub died never ends by itself


class Server:
    """A real Triton server over a model repository, for as long as a `with` block runs.

    Loopback only, ports chosen here unless given, administrative interfaces behind a random key. Ready means that
    the server says so and that a face went through it.

    >>> with Server("triton_models") as server:      # doctest: +SKIP
    ...     Client(server.url).reconstruct("me.jpg")
    """

    def __init__(
        self,
        repository: str | Path = "triton_models",
        *,
        grpc_port: int | None = None,
        http_port: int | None = None,
        metrics_port: int | None = None,
        start_timeout_s: float = 120.0,
        stop_timeout_s: float = 30.0,
        cores: int | None = None,
        log_path: str | Path | None = None,
    ) -> None:
        """Nothing is started yet.

        Args:
            repository: the model repository as `python -m export all` leaves it.
            grpc_port, http_port, metrics_port: None takes a free one, and keeps it over restarts.
            start_timeout_s: how long loading and warming may take.
            stop_timeout_s: how long requests in flight may take to finish before the server is killed.
            cores: models at work at the same time, a thread each; None leaves that to the machine.
            log_path: keep the server's log here; None keeps it only while the server runs.

        Raises:
            ConfigError: a port, time or number out of range, or a port given twice.
        """
        self.repository = Path(repository).resolve()
        self._wanted: dict[str, int | None] = {"grpc": grpc_port, "http": http_port, "metrics": metrics_port}
        given = [port for port in self._wanted.values() if port is not None]
        for name, port in self._wanted.items():
            if port is not None and not 1 <= port <= 65535:
                raise ConfigError(f"{name}_port: expected 1..65535, got {port}")
        if len(set(given)) != len(given):
            raise ConfigError(f"grpc_port, http_port and metrics_port must differ, got {given}")
        if start_timeout_s <= 0 or stop_timeout_s <= 0:
            raise ConfigError(f"timeouts must be above 0 s, got start {start_timeout_s} and stop {stop_timeout_s}")
        if cores is not None and cores < 1:
            raise ConfigError(f"cores: expected at least 1, got {cores}")
        self._cores = cores
        self._start_timeout_s, self._stop_timeout_s = start_timeout_s, stop_timeout_s
        self._log_path = Path(log_path).resolve() if log_path else None
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None
        self._lock = threading.RLock()
        self._shm_prefix = ""
        self._broken = False
        self._starter = 0
        self._owner: int | None = None
        self._last_log = ""
        self.swept: list[str] = []
        self.ports: dict[str, int] = {}
        self.admin_header = (ADMIN_NAME, secrets.token_hex(16))
        self.started_in_s = 0.0
        self.runtime = ""  # what onnxruntime is in, once started: "native backend", or "Python backend: " and why

    def again(self) -> Server:
        """Another server of the same repository and limits, not started, on ports of its own; for a renewal."""
        start_s, stop_s = self._start_timeout_s, self._stop_timeout_s
        return Server(self.repository, start_timeout_s=start_s, stop_timeout_s=stop_s, cores=self._cores)

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """What Client takes: host:port of gRPC.

        Raises:
            ServerUnavailableError: the server is not started.
        """
        return f"{HOST}:{self._port('grpc')}"

    @property
    def http_url(self) -> str:
        """Base of the HTTP interface.

        Raises:
            ServerUnavailableError: the server is not started.
        """
        return f"http://{HOST}:{self._port('http')}"

    @property
    def pid(self) -> int | None:
        """Process id of the running server."""
        return self._process.pid if self._process else None

    @property
    def backends(self) -> list[int]:
        """Process ids of the running server's backends, one of each model's instance; dead ones are not among them."""
        return _children(self._process.pid) if self._process else []

    @property
    def log(self) -> str:
        """Everything that the server has said, also after it has stopped."""
        path = self._log_path or (self._folder / "server.log" if self._folder else None)
        return path.read_text(errors="replace") if path and path.is_file() else self._last_log

    def _port(self, name: str) -> int:
        if name not in self.ports:
            raise ServerUnavailableError("the server is not started: call start() or use `with Server(...)`")
        return self.ports[name]

    def start(self) -> Server:
        """Start the server and wait until a face has gone through it. What killed runs left is removed (`swept`).

        Raises:
            AssetError: the repository is not filled, or a model file is not what signature.py says.
            MissingDependencyError: the wheel or what it needs is missing; the message has the container's command.
            ServerUnavailableError: a port is taken, the disk is full, the server died or was not ready in time (with
                the log's end).
        """
        with self._lock:
            if self._process:
                raise ServerUnavailableError(f"the server is already started (pid {self._process.pid})")
            check_repository(self.repository)
            wheel = find_wheel(self.repository)
            self.swept = sweep()
            began = time.monotonic()
            for attempt in range(PORT_ATTEMPTS):
                ports = _choose_ports(self._wanted)
                self._starter = os.getpid()
                atexit.register(self.stop)
                try:
                    self._folder = Path(tempfile.mkdtemp(prefix=FOLDER))
                    self._shm_prefix = f"chebface_{os.getpid()}_{secrets.token_hex(4)}_"
                    self._owner = hold(self._folder, self._shm_prefix)
                    self._launch(wheel, self._folder, ports)
                    self.ports = ports
                    self._await_ready(began + self._start_timeout_s)
                    break
                except BaseException as error:
                    self.stop()
                    if isinstance(error, OSError) and not isinstance(error, ChebfaceError):
                        raise ServerUnavailableError(
                            f"{tempfile.gettempdir()}: the server's files cannot be written there ({error}): make room"
                        ) from error
                    lost = isinstance(error, ServerUnavailableError) and PORT_TAKEN in str(error)
                    if not lost or attempt == PORT_ATTEMPTS - 1:
                        raise
            self._wanted = dict(ports)  # who talks to it finds it again after a restart
            self.started_in_s = time.monotonic() - began
            return self

    def _launch(self, wheel: Wheel, folder: Path, ports: dict[str, int]) -> None:
        python = {path.name: path for path in wheel.backend.iterdir() if path.is_file()}
        backends = {"python": python | {wheel.stub.name: wheel.stub}}
        if native := backend.find_files():
            backends[backend.NAME] = native
        self.runtime = "native backend" if native else f"Python backend: {backend.why_missing()}"
        for name, files in backends.items():
            (folder / "backends" / name).mkdir(parents=True)
            for file, path in files.items():
                (folder / "backends" / name / file).symlink_to(path)
        libraries = folder / "lib"  # libpython alone: its folder may hold other versions of system libraries
        libraries.mkdir()
        if wheel.libpython:
            (libraries / wheel.libpython.name).symlink_to(wheel.libpython)
        models = materialise(self.repository, folder / "models", backend.NAME if native else "python")
        key, value = self.admin_header
        command = [
            str(wheel.server),
            f"--model-repository={models}",
            f"--backend-directory={folder / 'backends'}",
            f"--cache-directory={wheel.caches}",
            f"--backend-config=python,shm-region-prefix-name={self._shm_prefix}",
            "--backend-config=python,stub-timeout-seconds=120",
            *HARDENED,
            f"--exit-timeout-secs={max(1, round(self._stop_timeout_s))}",
            f"--http-restricted-api={','.join(RESTRICTED)}:{key}={value}",
            f"--grpc-restricted-protocol={','.join(RESTRICTED)}:{key}={value}",
        ]
        environment = make_environment(wheel, libraries)
        if self._cores is not None:
            command += ["--rate-limit=execution_count", f"--rate-limit-resource={RESOURCE}:{self._cores}"]
            environment["CHEBFACE_CORES"] = str(self._cores)  # for our backend, which would share one model's batch out
        for name, port in ports.items():
            command += [f"--{name}-address={HOST}", f"--{name}-port={port}"]
        log = self._log_path or folder / "server.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "wb") as output:
            self._process = subprocess.Popen(
                end_with_us(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=environment,
                pass_fds=() if self._owner is None else (self._owner,),
                start_new_session=True,  # a Ctrl-C in the terminal is ours to handle, so that requests drain
            )

    def _await_ready(self, deadline: float) -> None:
        while time.monotonic() < deadline:
            if not self.is_running():
                raise ServerUnavailableError(f"the server died while it started; {self._tail()}")
            try:
                if _ask(self.ports["http"], "GET", "/v2/health/ready", timeout_s=2.0)[0] == 200:
                    break
            except OSError:
                pass
            time.sleep(0.05)
        else:
            raise ServerUnavailableError(
                f"the server was not ready after {self._start_timeout_s:g} s (start_timeout_s); {self._tail()}"
            )
        try:
            self.check(timeout_s=max(1.0, deadline - time.monotonic()))
        except ServerError as error:
            raise ServerUnavailableError(f"{error}; {self._tail()}") from error

    def _tail(self) -> str:
        lines = [line[:400] for line in self.log.splitlines() if line.strip() and line[0] not in "|+"]  # no tables
        return "the end of its log:\n" + "\n".join(lines[-LOG_TAIL:])

    def is_running(self) -> bool:
        """Whether the server's process exists; `check` asks whether it works."""
        process = self._process
        if process is None:
            return False
        try:  # without reaping: until then nobody else can get the process group's number
            return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        except ChildProcessError:
            return False

    def check(self, timeout_s: float = 10.0) -> float:
        """Send one blank crop through: the only true sign of life (a dead Python stub leaves the server "ready").

        Returns:
            The round trip in ms.

        Raises:
            ServerUnavailableError: not started, dead, or no answer in time.
            ServerBusyError: alive, and its queue is full.
            ServerError: an answer other than the three arrays.
        """
        port = self._port("http")
        model = MODELS["reconstruct"]
        began = time.monotonic()
        crop = bytes(signature.CROP_PX * signature.CROP_PX * 3)
        header = json.dumps(
            {
                "inputs": [
                    {
                        "name": model.inputs[0].name,
                        "shape": [1, *model.inputs[0].shape],
                        "datatype": model.inputs[0].dtype,
                        "parameters": {"binary_data_size": len(crop)},
                    }
                ],
                "outputs": [{"name": t.name, "parameters": {"binary_data": True}} for t in model.outputs],
            }
        ).encode()
        try:
            status, body, length = _ask(
                port,
                "POST",
                f"/v2/models/{model.name}/infer",
                header + crop,
                header_length=len(header),
                timeout_s=timeout_s,
            )
        except OSError as error:
            raise ServerUnavailableError(
                f"the server at {HOST}:{port} did not answer ({error}); restart it with stop() and start()"
            ) from error
        if status != 200:
            text = body.decode(errors="replace")[:300]
            low = text.lower()
            self._broken = self._broken or any(words in low for words in DEAD_TEXTS)
            kind: type[ServerError] = ServerError
            if self._broken or "unknown model" in low:
                kind = ServerUnavailableError
            elif any(words in low for words in BUSY_TEXTS):
                kind = ServerBusyError
            raise kind(f"the server at {HOST}:{port} failed on a blank crop: HTTP {status} {text}")
        _check_answer(json.loads(body[:length]), model.outputs)
        return (time.monotonic() - began) * 1e3

    def watch(self, every_s: float = 10.0, *, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Stay until the server fails; a blank crop goes through it from time to time. Busy is no failure.

        A backend's process that ends is a failure at once: Triton never starts it again, and stays "ready".

        Args:
            every_s: from one crop to the next.
            meanwhile: called several times a second; something true ends the watch.

        Raises:
            ServerUnavailableError, ServerError: it died or stopped answering (with the log's end).
        """
        silences, backends = 0, self.backends
        while True:
            due = time.monotonic() + every_s
            while time.monotonic() < due:
                if not self.is_running():
                    raise ServerUnavailableError(f"the server died; {self._tail()}")
                if missing := set(backends) - set(self.backends):
                    self._broken = True
                    raise ServerUnavailableError(f"a backend died (pid {min(missing)}); {self._tail()}")
                if meanwhile():
                    return
                time.sleep(0.2)
            try:
                self.check()
                silences = 0
            except ServerBusyError:
                silences = 0
            except ServerError as error:
                silences += 1
                silent = isinstance(error, ServerUnavailableError) and not self._broken
                if not silent or silences == SILENCES:
                    raise type(error)(f"{error}; {self._tail()}") from error

    def stop(self) -> None:
        """Let requests in flight finish, end every process of the server, remove what it left behind.

        Safe to call twice, and before start.
        """
        if self._starter not in (0, os.getpid()):
            return  # a fork of the process that started it
        with self._lock:
            process = self._process
            if process is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGTERM)
                most = min(self._stop_timeout_s, BROKEN_STOP_S) if self._broken else self._stop_timeout_s
                deadline = time.monotonic() + most
                while self.is_running() and time.monotonic() < deadline:
                    time.sleep(0.02)
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)  # what did not drain, and Python stubs left alone
                process.wait()
                _await_end(process.pid)
                self._process, self._broken = None, False
            if self._shm_prefix:
                for path in SHM.glob(f"{self._shm_prefix}*"):
                    path.unlink(missing_ok=True)
            if self._folder:
                self._last_log = self.log
                shutil.rmtree(self._folder, ignore_errors=True)
                self._folder = None
            if self._owner is not None:
                os.close(self._owner)
                self._owner = None
            self.ports = {}
            atexit.unregister(self.stop)


def _children(parent: int) -> list[int]:
    """Process ids of what a process has started and what still runs."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, above = path.read_text().rpartition(")")[2].split()[:2]
            if int(above) == parent and state not in "ZX":
                found.append(int(path.parent.name))
    return sorted(found)


def end_with_us(command: list[str]) -> list[str]:
    """The command, such that a killed parent does not leave it running (where util-linux is installed)."""
    setpriv = shutil.which("setpriv")
    if setpriv and threading.current_thread() is threading.main_thread():  # the kernel watches the calling thread
        return [setpriv, "--pdeathsig", "TERM", "--", *command]
    return command


def hold(folder: Path, shm_prefix: str = "") -> int:
    """Mark a FOLDER as in use, by an open file that its processes inherit: when the last has ended, `sweep` takes it.

    Returns:
        The file's number; to be closed.
    """
    import fcntl

    partial = folder / f"{_OWNER}.partial"
    file = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    fcntl.flock(file, fcntl.LOCK_EX)
    os.write(file, shm_prefix.encode())
    partial.rename(folder / _OWNER)  # never seen without its lock
    return file


def sweep() -> list[str]:
    """Remove what killed runs left: folders whose processes have all ended, and their shared memory.

    Returns:
        The paths that were removed.
    """
    import fcntl

    swept: list[str] = []
    for path in Path(tempfile.gettempdir()).glob(f"{FOLDER}*/{_OWNER}"):
        with contextlib.suppress(OSError):  # another user's, or somebody is at work there
            file = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                prefix = os.read(file, 99).decode(errors="replace")
                if os.fstat(file).st_uid != os.getuid() or not _PREFIX.fullmatch(prefix):
                    continue
                for region in SHM.glob(f"{prefix}*") if prefix else ():
                    region.unlink(missing_ok=True)
                    swept.append(str(region))
                shutil.rmtree(path.parent)
                swept.append(str(path.parent))
            finally:
                os.close(file)
    return swept


def _await_end(group: int, most_s: float = 1.0) -> None:
    """Wait until a killed process group is empty: what dies still holds its shared memory."""
    deadline = time.monotonic() + most_s
    with contextlib.suppress(ProcessLookupError, PermissionError):
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.01)


def _check_answer(answer: dict, outputs: tuple[Tensor, ...]) -> None:
    found = {t["name"]: (t["datatype"], tuple(t["shape"])) for t in answer.get("outputs", ())}
    wanted = {t.name: (t.dtype, (1, *t.shape)) for t in outputs}
    if found != wanted:
        raise ServerError(f"the server's answer is not what signature.py says: expected {wanted}, got {found}")


def _ask(
    port: int, method: str, path: str, body: bytes | None = None, *, header_length: int = 0, timeout_s: float = 10.0
) -> tuple[int, bytes, int]:
    """One HTTP exchange on loopback: status, body, length of the body's JSON part."""
    connection = http.client.HTTPConnection(HOST, port, timeout=timeout_s)
    try:
        headers = {"Inference-Header-Content-Length": str(header_length)} if body else {}
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        return answer.status, content, int(answer.getheader("Inference-Header-Content-Length") or len(content))
    except http.client.HTTPException as error:
        raise ConnectionError(f"broken answer: {error!r}") from error
    finally:
        connection.close()


def _choose_ports(wanted: dict[str, int | None]) -> dict[str, int]:
    """The wanted ports where they are free, free ones for the rest."""
    with contextlib.ExitStack() as held:
        ports = {}
        for name, port in sorted(wanted.items(), key=lambda item: item[1] is None):
            probe = held.enter_context(socket.socket())
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port or 0))
                probe.listen()
            except OSError as error:
                raise ServerUnavailableError(
                    f"{name} port {port} on {HOST} cannot be used ({error.strerror}): another program has it; "
                    f"stop that or choose another {name} port"
                ) from error
            ports[name] = probe.getsockname()[1]
        return ports


@contextlib.contextmanager
def stop_signals(renew: Callable[[], None] | None = None) -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into KeyboardInterrupt for a block, so that `with Server(...)` cleans up.

    Args:
        renew: called for SIGHUP instead.

    Raises:
        InputError: called outside the main thread, where Python handles no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        raise InputError("stop_signals: signals can be handled in the main thread only")

    def interrupt(number: int, frame: FrameType | None) -> None:
        if renew is not None and number == signal.SIGHUP:
            renew()
            return
        raise KeyboardInterrupt(signal.Signals(number).name)

    # A signal that is ignored from the start stays so: nohup means it, of hanging up and not of renewing.
    wanted = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    if renew is not None and signal.SIGHUP not in wanted:
        wanted.append(signal.SIGHUP)
    old = {number: signal.signal(number, interrupt) for number in wanted}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
