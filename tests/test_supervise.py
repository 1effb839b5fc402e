"""`chebface serve` as it is run: restarts with their reason, leftovers, draining, the known face."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from models_for_tests import stand_in
from test_proxy import free_ports, needs_nginx

from chebface import canary
from chebface.canary import WrongAnswerError, check_answer, draw_face, run_here
from chebface.cli_serve import serve
from chebface.client import Client
from chebface.client.connection import open_transport
from chebface.client.wire import parse_url
from chebface.errors import AssetError, MissingDependencyError, ServerError, ServerUnavailableError
from chebface.server import FOLDER, Server, hold, sweep
from chebface.signature import RECONSTRUCT
from chebface.supervise import supervise, write_event

TOKEN = "0123456789abcdef"


@contextmanager
def program(repository: Path, folder: Path, *options: object) -> Iterator[subprocess.Popen[str]]:
    ports = {f"--{name.replace('_', '-')}": port for name, port in free_ports().items()}
    words = [str(word) for pair in ports.items() for word in pair] + [str(option) for option in options]
    words += ["--metrics-port", str(free_ports()["http_port"]), "--repository", str(repository), "--log-format", "json"]
    command = [sys.executable, "-c", "from chebface.cli import main; main()", "serve", *words]
    environment = os.environ | {"TMPDIR": str(folder), "CHEBFACE_TOKEN": TOKEN}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as running:
        try:
            yield running
        finally:
            running.kill()


def until(running: subprocess.Popen[str], event: str) -> dict:
    for line in running.stdout:
        row = json.loads(line)
        assert {"time", "level", "event"} <= row.keys()
        if row["event"] == event:
            return row
    raise LookupError(f"ended without {event!r}")


@needs_nginx
def test_served_opened_killed_restarted_and_stopped(repository: Path, tmp_path: Path) -> None:
    with program(repository, tmp_path, "--bind", "127.0.0.1") as running:
        opened = until(running, "opened")["to"]
        address = opened.partition("gRPC on ")[2].partition(",")[0]
        first = until(running, "ready")
        with Client(address, token=TOKEN) as client:
            client._infer(draw_face()[None])
            os.kill(first["pid"], signal.SIGKILL)
            failed = until(running, "failed")
            assert failed["level"] == "warning" and failed["reason"].startswith("the server died")
            assert not client.is_ready()
            assert until(running, "restarting")["restart"] == 1
            second = until(running, "ready")
            assert second["pid"] != first["pid"] and second["grpc"] == first["grpc"]
            client._infer(draw_face()[None])
            (nginx,) = [p for p in tmp_path.glob(f"{FOLDER}*/nginx.pid") if p.read_text()]
            os.kill(int(nginx.read_text()), signal.SIGKILL)
            assert until(running, "proxy restarted")["level"] == "warning"
            client._infer(draw_face()[None])
        running.send_signal(signal.SIGTERM)
        assert until(running, "draining") and until(running, "stopped")
        assert running.wait(20) == 0
    assert not list(tmp_path.glob(f"{FOLDER}*"))
    assert not list(Path("/dev/shm").glob(f"chebface_{running.pid}_*"))


def test_what_a_killed_run_left_is_swept(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with program(repository, tmp_path) as running:
        server = until(running, "ready")["pid"]
        os.killpg(server, signal.SIGSTOP)  # else it ends by itself, tidily
        running.kill()
        running.wait()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    left = list(Path("/dev/shm").glob(f"chebface_{running.pid}_*"))
    assert left and sweep() == []  # it is still there
    os.killpg(server, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while not (swept := sweep()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert {str(path) for path in left} < set(swept)
    assert not any(path.exists() for path in left) and not list(tmp_path.glob(f"{FOLDER}*"))


def test_nothing_else_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    bystander = Path("/dev/shm") / f"chebface_{os.getpid()}_test"
    bystander.touch()
    try:
        for name, prefix in (("a", "chebface_"), ("b", "../x"), ("c", "*"), ("d", "")):
            folder = tmp_path / f"{FOLDER}{name}"
            folder.mkdir()
            os.close(hold(folder, prefix))
        used = tmp_path / f"{FOLDER}used"
        used.mkdir()
        file = hold(used)
        try:
            assert sweep() == [str(tmp_path / f"{FOLDER}d")]
        finally:
            os.close(file)
        assert bystander.exists()
    finally:
        bystander.unlink()


class Failing:
    """A server that starts and fails by a script."""

    url, http_url, pid, started_in_s, ports = "a:1", "http://a:2", 7, 0.1, {"grpc": 1, "http": 2}
    runtime = "native backend"

    def __init__(self, *script: Exception | None) -> None:
        self.script, self.swept, self.said = list(script), [], []

    def _next(self) -> None:
        if error := self.script.pop(0):
            raise error

    def start(self) -> None:
        self.said.append("start")
        self._next()
        self.swept = ["/dev/shm/x"] if self.said == ["start"] else []

    def watch(self, every_s: float, meanwhile) -> None:
        if not meanwhile():
            self._next()

    def stop(self) -> None:
        self.said.append("stop")


def test_restarts_are_counted_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    lost = ServerUnavailableError("the server died; the end of its log:\nthe log")
    server = Failing(None, lost, lost, None, lost, None, lost)
    rows: list[dict] = []
    with pytest.raises(ServerUnavailableError, match="failed 4 times within 600 s, the last time so: the server died"):
        supervise(server, report=write_event(lambda line: rows.append(json.loads(line)), True), limit=3)
    assert server.said == [*["start", "stop"] * 4, "stop"]
    assert waits == [1, 2, 4]
    events = [row["event"] for row in rows]
    assert events[:4] == ["removed leftovers", "ready", "failed", "restarting"]
    assert events.count("failed") == 4 and events[-2:] == ["gave up", "draining"]
    assert rows[2]["reason"] == "the server died; the end of its log:" and rows[2]["detail"] == "the log"
    assert [row["level"] for row in rows[1:4]] == ["info", "warning", "warning"] and rows[-2]["level"] == "error"


@pytest.mark.parametrize("error", [ServerUnavailableError("port taken"), AssetError("no models")])
def test_what_cannot_start_at_all_is_not_tried_again(error: Exception) -> None:
    server = Failing(error)
    with pytest.raises(type(error), match=str(error)):
        supervise(server, report=write_event(lambda line: None, False))
    assert server.said == ["start", "stop"]


def test_failures_long_ago_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 700))
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    wrong = ServerError("wrong answer")
    server = Failing(*[None, wrong] * 5, AssetError("gone"))
    with pytest.raises(AssetError, match="gone"):
        supervise(server, report=write_event(lambda line: None, True), limit=1)
    assert server.said.count("start") == 6


class Front:
    """A proxy of no server."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def is_running(self) -> bool:
        return True

    def __getattr__(self, name: str):
        return lambda *_: self.said.append(name)


def test_a_proxy_that_died_beside_its_server_is_started_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot lead to the new server, which is no fault of that one."""

    class Dead(Front):
        log = "killed"

        def is_running(self) -> bool:
            return "shut" not in self.said or self.said.count("start") == 2

    monkeypatch.setattr(time, "sleep", lambda _: None)
    proxy, events = Dead(), []
    server = Failing(None, ServerError("died"), None, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        supervise(server, proxy, report=lambda event, **_: events.append(event))
    assert proxy.said == ["start", "shut", "stop", "start", "open", "stop"]
    assert events.count("failed") == 1 and events[-3:] == ["proxy restarted", "ready", "draining"]


def renew_once(server: Failing, other: Failing, error: BaseException | None = None) -> tuple[Front, list[str]]:
    wanted, proxy, events = Event(), Front(), []
    server.again = lambda: other
    wanted.set()

    def prove(given: object) -> None:
        assert given is other and not wanted.is_set()
        if error:
            raise error

    def report(event: str, **facts: object) -> None:
        events.append(event)

    with pytest.raises((KeyboardInterrupt, AssetError)):
        supervise(server, proxy, report=report, renew=wanted, prove=prove)
    return proxy, events


def test_a_renewal_ends_the_old_server_last() -> None:
    server, other = Failing(None), Failing(None, KeyboardInterrupt())
    proxy, events = renew_once(server, other)
    assert events == ["removed leftovers", "opened", "ready", "renewing", "renewed", "draining"]
    assert server.said == ["start", "stop"] and other.said == ["start", "stop"]
    assert proxy.said == ["start", "lead", "stop"]


@pytest.mark.parametrize("error", [WrongAnswerError("another head"), OSError("no space left"), AssetError("damaged")])
def test_what_is_not_well_is_not_renewed(error: Exception) -> None:
    server, other = Failing(None, KeyboardInterrupt()), Failing(None)
    proxy, events = renew_once(server, other, error)
    assert events == ["removed leftovers", "opened", "ready", "renewing", "not renewed", "draining"]
    assert other.said == ["start", "stop"] and proxy.said == ["start", "stop"]


def test_an_interrupted_renewal_stops_both() -> None:
    server, other = Failing(None), Failing(KeyboardInterrupt())
    renew_once(server, other)
    assert server.said == other.said == ["start", "stop"]


def test_events_in_text() -> None:
    lines: list[str] = []
    write_event(lines.append, False)("ready", grpc="a:1", pid=3)
    assert lines == ["ready\n  grpc: a:1\n  pid: 3"]


def test_the_known_face_is_always_the_same() -> None:
    face = draw_face()
    assert face.shape == (112, 112, 3) and face.dtype == np.uint8
    assert tuple(face[52, 38]) == (60, 40, 30) and tuple(face[60, 56 + 30]) == (224, 172, 140)
    assert int(face.astype(np.int64).sum()) == 5_722_543


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(serve, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def test_check_compares_the_known_face(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, said = run("--check", "--repository", repository)
    assert code == 0 and "0 mm apart" in said
    other = tmp_path / "other"
    shutil.copytree(repository, other)
    proto = stand_in(RECONSTRUCT)
    weights = next(t for t in proto.graph.initializer if t.name == "regress.weights")
    weights.CopyFrom(onnx.numpy_helper.from_array(1.5 * onnx.numpy_helper.to_array(weights), weights.name))
    onnx.save(proto, other / "reconstruct" / "1" / "model.onnx")
    with Server(repository, stop_timeout_s=0.3) as server:
        for url in (server.url, server.http_url):
            assert run("--check", url, "--repository", repository)[0] == 0
            code, said = run("--check", url, "--repository", other)
            assert code == 3 and "mm from what the models in" in said
        monkeypatch.setattr(canary, "run_here", lambda *_: {n: a * np.nan for n, a in run_here(*_).items()})
        with pytest.raises(WrongAnswerError, match="nan mm"):
            check_answer(open_transport(parse_url(server.url)), repository)
    code, said = run("--check", "127.0.0.1:9", "--repository", repository)
    assert code == 6 and "127.0.0.1:9" in said


def test_check_needs_models_and_onnxruntime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssetError, match=r"reconstruct/config.pbtxt is missing"):
        run_here(tmp_path, draw_face()[None])
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=r"chebface\[server\]"):
        run_here(tmp_path, draw_face()[None])


def test_faces_are_sent_after_a_while_at_least(repository: Path) -> None:
    code, said = run("--canary-s", 0, "--repository", repository)
    assert code == 2 and "expected seconds above 0" in said


@pytest.mark.parametrize("option", [("--certificate", "c"), ("--token-file", "t"), ("--insecure",), ("--key", "k")])
def test_what_goes_with_bind_only(option: tuple[str, ...]) -> None:
    code, said = run(*option)
    assert code == 2 and "with --bind" in said


def test_opening_without_protection_is_refused(repository: Path) -> None:
    code, said = run("--bind", "0.0.0.0", "--repository", repository)
    assert code == 2 and "would open the server to the network without" in said
