"""nginx in front of a server that is opened to a network: TLS, tokens, limits; and the files for other places to run.

Triton trusts whoever reaches it: its 2.51 dies of one deeply nested JSON, of a JSON tensor with a huge shape or of a
flood of tiny chunks, takes bodies of any size, and has interfaces that are no user's business. None of that passes the
configuration in deploy/nginx.conf.
"""

from __future__ import annotations

import atexit
import contextlib
import grp
import ipaddress
import os
import pwd
import re
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from chebface.errors import ConfigError, MissingDependencyError, ServerUnavailableError
from chebface.files import write_whole
from chebface.server import ADMIN_NAME, FOLDER, HARDENED, RESTRICTED, end_with_us, hold
from chebface.signature import RECONSTRUCT, SERVED, Tensor
from chebface.wheel import HOST, NGC_IMAGE

TOKEN_VARIABLE = "CHEBFACE_TOKEN"
SHOWN = {
    "nginx": "nginx.conf",
    "docker": "Dockerfile",
    "compose": "compose.yaml",
    "kubernetes": "kubernetes.yaml",
    "prometheus": "prometheus-rules.yaml",
    "grafana": "grafana.json",
}
JSON_KB = 10  # Inference-Header-Content-Length of at most four digits, and bodies that are JSON alone
_TEMPLATES = Path(__file__).with_name("deploy")
_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]{16,}")
_NAME = re.compile(r"[A-Za-z0-9._-]+|\[[0-9a-fA-F:.]+\]")
_START_S = 5.0


@dataclass(frozen=True)
class Upstream:
    """A Triton server behind the proxy."""

    host: str
    grpc_port: int
    http_port: int

    @classmethod
    def parse(cls, text: str) -> Upstream:
        """From HOST:GRPC_PORT:HTTP_PORT.

        Raises:
            ConfigError: it is not that.
        """
        parts = text.rsplit(":", 2)
        numbers = [int(part) for part in parts[1:] if part.isascii() and part.isdigit()]
        if len(numbers) != 2 or not all(1 <= n <= 65535 for n in numbers) or not _NAME.fullmatch(parts[0]):
            raise ConfigError(f"upstream: expected HOST:GRPC_PORT:HTTP_PORT, such as gpu-2:8001:8000, got {text!r}")
        return cls(parts[0], *numbers)


def read_tokens(path: str | Path | None = None) -> tuple[str, ...]:
    """The tokens that let a client in: a file's, one on each line (# begins a comment), else the environment's.

    Raises:
        ConfigError: the file cannot be read or has none, or one is short or has characters that headers do not take.
    """
    where = TOKEN_VARIABLE if path is None else str(path)
    try:
        text = os.environ.get(TOKEN_VARIABLE, "") if path is None else Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"token file {path}: cannot be read ({error})") from error
    lines = [line.strip() for line in text.splitlines()]
    tokens = tuple(line for line in lines if line and not line.startswith("#"))
    if path is not None and not tokens:
        raise ConfigError(f"token file {path}: has no token; `openssl rand -hex 32 > {path}` makes one")
    for number, token in enumerate(tokens, 1):
        if not _TOKEN.fullmatch(token):  # which is not shown
            raise ConfigError(
                f"{where}: token {number}: expected 16 or more of letters, digits and ._~+/=-, got {len(token)} "
                "characters; `openssl rand -hex 32` makes one"
            )
    return tokens


class Proxy:
    """nginx on an address, in front of one or several Triton servers."""

    def __init__(
        self,
        bind: str,
        *,
        grpc_port: int = 8001,
        http_port: int = 8000,
        upstreams: Sequence[Upstream] = (),
        certificate: str | Path | None = None,
        key: str | Path | None = None,
        tokens: Sequence[str] = (),
        insecure: bool = False,
        rate: int = 100,
        metrics_port: int | None = None,
        connections: int = 128,
        max_body_mb: int = 16,
        drain_s: float = 30.0,
        access_log: str | Path | None = None,
    ) -> None:
        """Nothing is started yet.

        Args:
            bind: the IP address to listen on; 0.0.0.0 is every network of this machine.
            grpc_port, http_port: there.
            upstreams: further servers that share the load; what goes between is not encrypted.
            certificate, key: PEM files for TLS.
            tokens: clients must send one of them as bearer token; health needs none.
            insecure: beyond loopback without TLS or tokens, since something else sees to them.
            metrics_port: where Prometheus finds the local server, whichever that is now; on 127.0.0.1 always.
            rate: requests per second of one client address; twice as many may come at once.
            connections: requests of one client address at the same time.
            max_body_mb: of a request.
            drain_s: how long requests in flight may take when it stops.
            access_log: a file for a line of JSON per request; None writes none.

        Raises:
            ConfigError: a value that cannot be, unreadable certificates, or an opening that nothing protects.
        """
        try:
            address = ipaddress.ip_address(bind)
        except ValueError as error:
            raise ConfigError(f"bind: expected an IP address such as 0.0.0.0, got {bind!r}") from error
        self.ports = {"grpc": grpc_port, "http": http_port}
        self.ports |= {} if metrics_port is None else {"metrics": metrics_port}
        for name, port in self.ports.items():
            if not 1 <= port <= 65535:
                raise ConfigError(f"{name}_port: expected 1..65535, got {port}")
        if len(set(self.ports.values())) != len(self.ports):
            raise ConfigError(f"grpc_port, http_port and metrics_port must differ, got {list(self.ports.values())}")
        for name, number in (("rate", rate), ("connections", connections), ("max_body_mb", max_body_mb)):
            if number < 1:
                raise ConfigError(f"{name}: expected at least 1, got {number}")
        if (certificate is None) != (key is None):
            raise ConfigError("certificate and key go together: give both or neither")
        lacking = ["TLS (certificate and key)"] * (certificate is None) + ["tokens"] * (not tokens)
        if lacking and not address.is_loopback and not insecure:
            raise ConfigError(
                f"bind: {bind} would open the server to the network without {' and '.join(lacking)}: give them, or "
                "insecure where something else in front sees to them"
            )
        for token in tokens:
            if not _TOKEN.fullmatch(token):
                raise ConfigError("tokens: expected 16 or more of letters, digits and ._~+/=- each")
        files = {"certificate": certificate, "key": key, "access_log": access_log}
        self._files = {name: path and Path(path).absolute() for name, path in files.items()}
        for name, path in self._files.items():
            if path is not None and re.search(r'["$\\\n]', str(path)):
                raise ConfigError(f'{name}: {path!r} has a ", $, \\ or line end, which nginx cannot take')
        self.bind = f"[{bind}]" if address.version == 6 else bind
        self._upstreams, self._tokens = list(upstreams), tuple(tokens)
        self._rate, self._connections, self._max_body_mb, self._drain_s = rate, connections, max_body_mb, drain_s
        self._local: Upstream | None = None
        self._local_metrics: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None
        self._owner: int | None = None
        self._lock = threading.RLock()

    def __str__(self) -> str:
        """What is open to whom, in one sentence."""
        tls = self._files["certificate"] is not None
        where = "this machine only" if ipaddress.ip_address(self.bind.strip("[]")).is_loopback else "the network"
        everywhere = " on every address" if self.bind in ("0.0.0.0", "[::]") else ""
        return (
            f"open to {where}{everywhere}: gRPC on {self.bind}:{self.ports['grpc']}, HTTP on "
            f"{self.bind}:{self.ports['http']}; {'TLS' if tls else 'NOT encrypted'}, "
            f"{f'{len(self._tokens)} token(s)' if self._tokens else 'NO token: everyone may come in'}; inference, "
            f"metadata and health of {', '.join(SERVED)} only"
        )

    def config(self, user: str = "") -> str:
        """The nginx.conf; it holds no secret.

        Args:
            user: a directive that names whose rights the workers have; "" leaves it to nginx.

        Raises:
            ConfigError: there is no server to lead to.
        """
        servers = [*([self._local] if self._local else ()), *self._upstreams]
        if not servers:
            raise ConfigError("upstream: expected at least one server behind the proxy, got none")
        tls = ""
        if self._files["certificate"] is not None:
            tls = (
                f'    ssl_certificate "{self._files["certificate"]}";\n'
                f'    ssl_certificate_key "{self._files["key"]}";\n'
                "    ssl_protocols TLSv1.2 TLSv1.3;\n    ssl_session_cache shared:tls:4m;\n"
            )
        log, metrics = self._files["access_log"], ""
        if "metrics" in self.ports and self._local_metrics:
            metrics = (
                f"    server {{\n        listen {HOST}:{self.ports['metrics']};\n        location = /metrics {{ "
                f"proxy_pass http://{HOST}:{self._local_metrics}; }}\n        location / {{ return 404; }}\n    }}\n"
            )
        # A server is left alone for 2 s after three failures in a row, not for the usual 10 after one.
        lines = {
            kind: "\n".join(f"        server {s.host}:{port(s)} max_fails=3 fail_timeout=2s;" for s in servers)
            for kind, port in (("GRPC", lambda s: s.grpc_port), ("HTTP", lambda s: s.http_port))
        }
        return _fill(
            "nginx.conf",
            DRAIN=str(max(1, round(self._drain_s))),
            READ=str(120),
            USER=user,
            ACCESS_LOG=f'"{log}" requests' if log else "off",
            TLS=tls,
            SSL=" ssl" if tls else "",
            MAX_BODY=str(self._max_body_mb),
            JSON_KB=str(JSON_KB),
            RATE=str(self._rate),
            BURST=str(2 * self._rate),
            CONNECTIONS=str(self._connections),
            GRPC_SERVERS=lines["GRPC"],
            HTTP_SERVERS=lines["HTTP"],
            ADMIN=ADMIN_NAME,
            BIND=self.bind,
            GRPC_PORT=str(self.ports["grpc"]),
            HTTP_PORT=str(self.ports["http"]),
            MODELS="|".join(SERVED),
            METRICS=metrics,
            SHAPES="|".join(sorted({r"\s*,\s*".join(map(str, tensor.shape)) for tensor in _inputs()})),
        )

    def start(self, ports: Mapping[str, int] | None = None) -> Proxy:
        """Start nginx and wait until it listens.

        Args:
            ports: of a Server on this machine, which is then asked along with the upstreams; None as before.

        Raises:
            MissingDependencyError: nginx is not installed.
            ConfigError: the certificate or key is not one, or there is no server to lead to.
            ServerUnavailableError: a port is taken, it is started already, or it died (with the log's end).
        """
        with self._lock:
            if self._process is not None:
                raise ServerUnavailableError(f"the proxy is already started (pid {self._process.pid})")
            if ports is not None:
                self._set_local(ports)
            nginx = shutil.which("nginx", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
            if nginx is None:
                raise MissingDependencyError(
                    "nginx is not installed, and without it the server is not opened: apt-get install nginx-light"
                )
            text = self.config(_worker_user())
            self._check_files()
            self._probe_ports()
            atexit.register(self.stop)
            try:
                self._launch(nginx, text)
            except BaseException:
                self.stop()
                raise
            return self

    def lead(self, ports: Mapping[str, int]) -> None:
        """Ask another Server of this machine from now on; returns when the one before has answered what it was asked.

        Args:
            ports: of the other server, which is ready.

        Raises:
            ServerUnavailableError: nginx is not running, or does not take the change; it asks the one before.
        """
        with self._lock:
            if self._process is None or self._folder is None or not self.is_running():
                raise ServerUnavailableError("the proxy is not running: start() it")
            before, old = (self._local, self._local_metrics), _children(self._process.pid)
            self._set_local(ports)
            write_whole(self._folder / "nginx.conf", self.config(_worker_user()).encode()).chmod(0o600)
            self._process.send_signal(signal.SIGHUP)  # new workers; the old finish what they have and end
            if not _await(lambda: bool(_children(self._process.pid if self._process else 0) - old), _START_S):
                self._local, self._local_metrics = before
                raise ServerUnavailableError(f"nginx does not take the new server:\n{self.log[-2000:]}")
            _await(lambda: not any(Path(f"/proc/{pid}").exists() for pid in old), self._drain_s + 2)

    def _set_local(self, ports: Mapping[str, int]) -> None:
        self._local, self._local_metrics = Upstream(HOST, ports["grpc"], ports["http"]), ports.get("metrics")

    def _check_files(self) -> None:
        certificate, key = self._files["certificate"], self._files["key"]
        if certificate is not None and key is not None:
            try:
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: b"")
            except OSError as error:
                raise ConfigError(
                    f"certificate {certificate}, key {key}: expected a PEM chain and its key without password ({error})"
                ) from error

    def _probe_ports(self) -> None:
        for name, port in self.ports.items():
            bind = HOST if name == "metrics" else self.bind
            with socket.socket(socket.AF_INET6 if bind.startswith("[") else socket.AF_INET) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((bind.strip("[]"), port))
                except OSError as error:
                    raise ServerUnavailableError(
                        f"{name} port {port} on {bind} cannot be used ({error.strerror}): stop the program that "
                        f"has it or choose another {name} port"
                    ) from error

    def _launch(self, nginx: str, text: str) -> None:
        folder = self._folder = Path(tempfile.mkdtemp(prefix=FOLDER))
        self._owner = hold(folder)
        folder.chmod(0o711)  # nginx's workers have other rights than we may have
        (folder / "health").mkdir()
        (folder / "health").chmod(0o711)
        files = {"tokens.conf": _spell_tokens(self._tokens), "nginx.conf": text}
        for name, content in files.items():
            with open(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(content)
        command = [nginx, "-p", f"{folder}/", "-c", str(folder / "nginx.conf"), "-e", "stderr", "-g", "daemon off;"]
        with open(folder / "error.log", "wb") as log:
            self._process = subprocess.Popen(
                end_with_us(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=folder,
                pass_fds=(self._owner,),
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_S
        host = {"0.0.0.0": HOST, "[::]": "::1"}.get(self.bind, self.bind.strip("[]"))
        for port in (self.ports["grpc"], self.ports["http"]):
            while True:
                if not self.is_running():
                    raise ServerUnavailableError(
                        f"nginx died while it started; the end of its log:\n{self.log[-2000:]}"
                    )
                with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
                    break
                if time.monotonic() > deadline:
                    raise ServerUnavailableError(f"nginx does not listen on {self.bind}:{port}:\n{self.log[-2000:]}")
                time.sleep(0.02)

    def is_running(self) -> bool:
        """Whether nginx is there."""
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        """What nginx complained of since it was started; empty when it is not."""
        path = self._folder and self._folder / "error.log"
        return path.read_text(errors="replace") if path and path.is_file() else ""

    def open(self) -> None:
        """Say that the server is ready."""
        if self._folder is not None:
            (self._folder / "health" / "failed").unlink(missing_ok=True)

    def shut(self) -> None:
        """Say that the server is not ready, whatever it says itself: balancers in front then ask another."""
        if self._folder is not None:
            (self._folder / "health" / "failed").touch()

    def stop(self) -> None:
        """Take no more, let requests in flight finish, remove what it left behind. Safe to call twice."""
        with self._lock:
            if self._process is not None:
                self._process.send_signal(signal.SIGQUIT)  # nginx's word for "when you are done"
                try:
                    self._process.wait(self._drain_s + 2)
                except subprocess.TimeoutExpired:
                    pass
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
                self._process = None
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)
                self._folder = None
            if self._owner is not None:
                os.close(self._owner)
                self._owner = None
            atexit.unregister(self.stop)


def _inputs() -> Iterator[Tensor]:
    for model in SERVED.values():
        yield from (*model.inputs, *model.optional)


def _worker_user() -> str:
    """The directive that takes rights from nginx's workers, where we have them to give."""
    nobody = pwd.getpwnam("nobody")
    return f"user {nobody.pw_name} {grp.getgrgid(nobody.pw_gid).gr_name};" if os.geteuid() == 0 else ""


def _children(pid: int) -> set[int]:
    with contextlib.suppress(OSError):
        return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    return set()


def _await(is_so: Callable[[], bool], most_s: float) -> bool:
    deadline = time.monotonic() + most_s
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _spell_tokens(tokens: Sequence[str]) -> str:
    """What nginx.conf includes. A regular expression, since nginx compares plain strings without regard to case."""
    literal = [re.sub(r"([.+])", r"[\1]", token) for token in tokens]
    return "".join(f'"~^[Bb]earer {token}$" 1;\n' for token in literal) or "default 1;\n"


def show(what: str, proxy: Proxy | None = None) -> str:
    """One of the files for running elsewhere, see SHOWN, filled in with this version's names and limits.

    Args:
        what: its name in SHOWN.
        proxy: what "nginx" is filled in from.

    Raises:
        ConfigError: another name, or nginx without a proxy.
    """
    if what not in SHOWN or (what == "nginx" and proxy is None):
        raise ConfigError(f"show: expected one of {', '.join(SHOWN)} (nginx with its proxy), got {what!r}")
    if proxy is not None and what == "nginx":
        return proxy.config()
    crop = RECONSTRUCT.inputs[0]
    return _fill(
        SHOWN[what],
        IMAGE=NGC_IMAGE,
        ADMIN=ADMIN_NAME,
        ARGUMENTS=" \\\n    ".join(HARDENED),
        RESTRICTED=",".join(RESTRICTED),
        MODEL=RECONSTRUCT.name,
        INPUT=crop.name,
        SHAPE=", ".join(map(str, (1, *crop.shape))),
    )


def _fill(name: str, **values: str) -> str:
    return re.sub("@([A-Z_]+)@", lambda found: values[found[1]], (_TEMPLATES / name).read_text())
