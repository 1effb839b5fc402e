"""Start, warm, watch and stop a Triton Inference Server: the one inside the nvidia-pytriton wheel, on loopback only."""

from __future__ import annotations

import atexit
import contextlib
import http.client
import importlib.metadata
import importlib.util
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from chebface import signature
from chebface.errors import (
    AssetError,
    ConfigError,
    InputError,
    MissingDependencyError,
    ServerError,
    ServerUnavailableError,
)
from chebface.signature import LEAVES, MODELS, Tensor

HOST = "127.0.0.1"
NGC_IMAGE = "nvcr.io/nvidia/tritonserver:26.07-py3"  # or later
RESTRICTED = ("model-repository", "model-config", "shared-memory", "statistics", "trace", "logging")
PORT_ATTEMPTS = 3  # a free port may be lost between its choice and its use
PORT_TAKEN = "already in use"
LOG_TAIL = 30  # lines shown when the server fails
SHM = Path("/dev/shm")
BROKEN_STOP_S = 2.0  # a server whose Python stub died never ends by itself
ONNX_TYPES = {"FP32": "tensor(float)", "UINT8": "tensor(uint8)", "INT32": "tensor(int32)", "BYTES": "tensor(string)"}


def ngc_command(repository: str | Path = "triton_models") -> str:
    """The shell command that serves the same repository with NVIDIA's container, with its native backends."""
    folder = Path(repository).resolve()
    return (
        f"docker run --rm --shm-size=1g -p {HOST}:8000-8002:8000-8002 -v {folder}:/models:ro {NGC_IMAGE} "
        "tritonserver --model-repository=/models --disable-auto-complete-config --model-control-mode=none "
        "--exit-on-error=true --strict-readiness=true"
    )


def check_repository(repository: str | Path) -> Path:
    """Make sure that a model repository is complete before a server is asked to load it.

    Every model of signature.py must have its config.pbtxt, every leaf a model file whose tensors are those of
    signature.py.

    Returns:
        The repository's resolved path.

    Raises:
        AssetError: a part is missing or a model file is not what signature.py says.
        MissingDependencyError: onnxruntime is not installed.
    """
    folder = Path(repository).resolve()
    fix = "`python -m export all` fills a model repository"
    if not folder.is_dir():
        raise AssetError(f"model repository {folder}: not found; {fix}")
    for name in MODELS:
        if not (folder / name / "config.pbtxt").is_file():
            raise AssetError(f"model repository {folder}: {name}/config.pbtxt is missing; {fix}")
    for name, model in LEAVES.items():
        path = folder / name / "1" / "model.onnx"
        if not path.is_file():
            raise AssetError(f"model repository {folder}: {name}/1/model.onnx is missing; {fix}")
        session = _open_model(path)
        lead = 1 if model.batched else 0
        for kind, want, got in (
            ("input", model.inputs, session.get_inputs()),
            ("output", model.outputs, session.get_outputs()),
        ):
            found = {t.name: (t.type, tuple(t.shape[lead:]), not lead or isinstance(t.shape[0], str)) for t in got}
            wanted = {t.name: (ONNX_TYPES[t.dtype], t.shape, True) for t in want}
            if found != wanted:
                raise AssetError(
                    f"{path}: its {kind}s are not those of signature.py: expected {_spell(wanted)}, "
                    f"got {_spell(found)}; export it again with `python -m export all`"
                )
    return folder


def _spell(tensors: dict[str, tuple[str, tuple[int, ...], bool]]) -> str:
    return ", ".join(
        f"{name} {kind}{'' if free else ' fixed batch'} {list(shape)}" for name, (kind, shape, free) in tensors.items()
    )


def _open_model(path: Path) -> Any:
    try:
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as failures
    except ImportError as error:
        raise MissingDependencyError("onnxruntime is not installed: pip install 'chebface[server]'") from error
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except (failures.Fail, failures.InvalidProtobuf, failures.InvalidGraph, failures.NotImplemented) as error:
        raise AssetError(f"{path}: onnxruntime cannot read it ({error}); run `python -m export all`") from error


@dataclass(frozen=True)
class _Wheel:
    """The parts of the nvidia-pytriton wheel that a server needs."""

    server: Path
    backend: Path
    stub: Path
    caches: Path
    libraries: Path
    libpython: Path | None


def find_wheel(repository: str | Path = "triton_models") -> _Wheel:
    """Find the tritonserver of the nvidia-pytriton wheel and what runs its Python backend with this interpreter.

    Raises:
        MissingDependencyError: the wheel, a stub for this Python, its shared library, or a numpy below 2 is missing.
    """
    container = f"or serve with the NGC container (Triton 26.07 or later):\n  {ngc_command(repository)}"
    spec = importlib.util.find_spec("pytriton")
    places = list(spec.submodule_search_locations or ()) if spec else []
    root = Path(places[0]) / "tritonserver" if places else None
    if root is None or not (root / "bin" / "tritonserver").is_file():
        raise MissingDependencyError(
            "no tritonserver: the nvidia-pytriton wheel (Linux, x86-64) is not installed; "
            f"pip install 'chebface[server]', {container}"
        )
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = root / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        have = ", ".join(sorted(p.name for p in (root / "python_backend_stubs").glob("*")))
        raise MissingDependencyError(
            f"nvidia-pytriton has no Python backend stub for Python {version} (it has {have}); "
            f"use one of those in the virtual environment, {container}"
        )
    numpy_version = importlib.metadata.version("numpy")
    if int(numpy_version.split(".")[0]) >= 2:
        raise MissingDependencyError(
            f"the Python backend of nvidia-pytriton needs numpy below 2, got {numpy_version}; "
            f"pip install 'chebface[server]' in an environment of its own, {container}"
        )
    return _Wheel(
        server=root / "bin" / "tritonserver",
        backend=root / "backends" / "python",
        stub=stub,
        caches=root / "caches",
        libraries=root.parent.parent / "nvidia_pytriton.libs",
        libpython=_find_libpython(),
    )


def _find_libpython() -> Path | None:
    """The shared library of this interpreter, or None where the loader must find it by itself."""
    name = str(sysconfig.get_config_var("INSTSONAME") or "")
    folders = [str(sysconfig.get_config_var("LIBDIR") or ""), os.path.join(sys.base_prefix, "lib")]
    if ".so" in name:
        for folder in folders:
            path = Path(folder) / name
            if folder and path.is_file():
                return path
    return None


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
        log_path: str | Path | None = None,
    ) -> None:
        """Nothing is started yet.

        Args:
            repository: the model repository as `python -m export all` leaves it.
            grpc_port, http_port, metrics_port: None takes a free one.
            start_timeout_s: how long loading and warming may take.
            stop_timeout_s: how long requests in flight may take to finish before the server is killed.
            log_path: keep the server's log here; None keeps it only while the server runs.

        Raises:
            ConfigError: a port or time out of range, or a port given twice.
        """
        self.repository = Path(repository).resolve()
        self._wanted = {"grpc": grpc_port, "http": http_port, "metrics": metrics_port}
        given = [port for port in self._wanted.values() if port is not None]
        for name, port in self._wanted.items():
            if port is not None and not 1 <= port <= 65535:
                raise ConfigError(f"{name}_port: expected 1..65535, got {port}")
        if len(set(given)) != len(given):
            raise ConfigError(f"grpc_port, http_port and metrics_port must differ, got {given}")
        if start_timeout_s <= 0 or stop_timeout_s <= 0:
            raise ConfigError(f"timeouts must be above 0 s, got start {start_timeout_s} and stop {stop_timeout_s}")
        self._start_timeout_s, self._stop_timeout_s = start_timeout_s, stop_timeout_s
        self._log_path = Path(log_path).resolve() if log_path else None
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None
        self._lock = threading.RLock()
        self._shm_prefix = ""
        self._broken = False
        self._starter = 0
        self._last_log = ""
        self.ports: dict[str, int] = {}
        self.admin_header = ("chebface-key", secrets.token_hex(16))
        self.started_in_s = 0.0

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
    def log(self) -> str:
        """Everything that the server has said, also after it has stopped."""
        path = self._log_path or (self._folder / "server.log" if self._folder else None)
        return path.read_text(errors="replace") if path and path.is_file() else self._last_log

    def _port(self, name: str) -> int:
        if name not in self.ports:
            raise ServerUnavailableError("the server is not started: call start() or use `with Server(...)`")
        return self.ports[name]

    def start(self) -> Server:
        """Start the server and wait until a face has gone through it.

        Raises:
            AssetError: the repository is not filled, or a model file is not what signature.py says.
            MissingDependencyError: the wheel or what it needs is missing; the message has the container's command.
            ServerUnavailableError: a port is taken, the server died or was not ready in time (with the log's end).
        """
        with self._lock:
            if self._process:
                raise ServerUnavailableError(f"the server is already started (pid {self._process.pid})")
            check_repository(self.repository)
            wheel = find_wheel(self.repository)
            began = time.monotonic()
            for attempt in range(PORT_ATTEMPTS):
                ports = _choose_ports(self._wanted)
                self._starter = os.getpid()
                atexit.register(self.stop)
                try:
                    self._folder = Path(tempfile.mkdtemp(prefix="chebface-server-"))
                    self._shm_prefix = f"chebface_{os.getpid()}_{secrets.token_hex(4)}_"
                    self._launch(wheel, self._folder, ports)
                    self.ports = ports
                    self._await_ready(began + self._start_timeout_s)
                    break
                except BaseException as error:
                    self.stop()
                    lost = isinstance(error, ServerUnavailableError) and PORT_TAKEN in str(error)
                    if not lost or attempt == PORT_ATTEMPTS - 1:
                        raise
            self.started_in_s = time.monotonic() - began
            return self

    def _launch(self, wheel: _Wheel, folder: Path, ports: dict[str, int]) -> None:
        backend = folder / "backends" / "python"
        backend.mkdir(parents=True)
        for path in wheel.backend.iterdir():
            if path.is_file():
                (backend / path.name).symlink_to(path)
        (backend / wheel.stub.name).symlink_to(wheel.stub)
        libraries = folder / "lib"  # libpython alone: its folder may hold other versions of system libraries
        libraries.mkdir()
        if wheel.libpython:
            (libraries / wheel.libpython.name).symlink_to(wheel.libpython)
        models = _materialise(self.repository, folder / "models")
        key, value = self.admin_header
        command = [
            str(wheel.server),
            f"--model-repository={models}",
            f"--backend-directory={folder / 'backends'}",
            f"--cache-directory={wheel.caches}",
            f"--backend-config=python,shm-region-prefix-name={self._shm_prefix}",
            "--backend-config=python,stub-timeout-seconds=120",
            "--model-control-mode=none",
            "--exit-on-error=true",
            "--strict-readiness=true",
            "--disable-auto-complete-config",
            "--allow-sagemaker=false",
            "--allow-vertex-ai=false",
            f"--exit-timeout-secs={max(1, round(self._stop_timeout_s))}",
            f"--http-restricted-api={','.join(RESTRICTED)}:{key}={value}",
            f"--grpc-restricted-protocol={','.join(RESTRICTED)}:{key}={value}",
            "--reuse-grpc-port=false",
            "--reuse-http-port=false",
        ]
        for name, port in ports.items():
            command += [f"--{name}-address={HOST}", f"--{name}-port={port}"]
        setpriv = shutil.which("setpriv")
        if setpriv and threading.current_thread() is threading.main_thread():  # the kernel watches the calling thread
            command = [setpriv, "--pdeathsig", "TERM", "--", *command]  # so that a killed parent leaves no server
        log = self._log_path or folder / "server.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=_environment(wheel, libraries),
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
                "parameters": {"binary_data_output": True},
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
            self._broken = self._broken or "is not healthy" in text
            kind = ServerUnavailableError if self._broken or "unknown model" in text else ServerError
            raise kind(f"the server at {HOST}:{port} failed on a blank crop: HTTP {status} {text}")
        _check_answer(json.loads(body[:length]), model.outputs)
        return (time.monotonic() - began) * 1e3

    def watch(self, every_s: float = 10.0) -> None:
        """Stay until the server fails; a blank crop goes through it from time to time.

        Raises:
            ServerUnavailableError, ServerError: it died or stopped answering (with the log's end).
        """
        while True:
            due = time.monotonic() + every_s
            while time.monotonic() < due:
                if not self.is_running():
                    raise ServerUnavailableError(f"the server died; {self._tail()}")
                time.sleep(0.2)
            try:
                self.check()
            except ServerError as error:
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
            self.ports = {}
            atexit.unregister(self.stop)


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


def _materialise(repository: Path, folder: Path) -> Path:
    """Copy a repository for the pip server, whose only backend is the Python one: same files, leaf.py as model.py."""
    code = Path(__file__).with_name("leaf.py").read_text()
    for name, model in MODELS.items():
        version = folder / name / "1"
        version.mkdir(parents=True)
        config = (repository / name / "config.pbtxt").read_text()
        if not model.steps:
            for old, new in (('backend: "onnxruntime"', 'backend: "python"'), ('"model.onnx"', '"model.py"')):
                if config.count(old) != 1:
                    raise AssetError(
                        f"{repository / name / 'config.pbtxt'}: expected one {old}; "
                        "write it again with `python -m export repository`"
                    )
                config = config.replace(old, new)
            (version / "model.py").write_text(code)
            (version / "model.onnx").symlink_to(repository / name / "1" / "model.onnx")
        (folder / name / "config.pbtxt").write_text(config)
    return folder


def _environment(wheel: _Wheel, libraries: Path) -> dict[str, str]:
    # The stub ignores PYTHONPATH and PYTHONHOME; it finds its packages from the first python3 on PATH, so that this
    # must be our interpreter's (or virtual environment's) folder.
    programs = Path(sys.executable).parent
    if not (programs / "python3").exists():
        raise MissingDependencyError(
            f"{programs}: no python3 there; the server's Python backend finds its packages through that name"
        )
    return {
        **os.environ,
        "PATH": f"{programs}:{os.environ.get('PATH', os.defpath)}",
        "LD_LIBRARY_PATH": f"{wheel.libraries}:{libraries}",
    }


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
def stop_signals() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into KeyboardInterrupt for a block, so that `with Server(...)` cleans up.

    Raises:
        InputError: called outside the main thread, where Python handles no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        raise InputError("stop_signals: signals can be handled in the main thread only")

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    old = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
