"""The real Triton server: it starts, answers, notices what dies, and leaves nothing behind."""

from __future__ import annotations

import errno
import http.client
import importlib.machinery
import importlib.metadata
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import onnx
import pytest
from models_for_tests import python_backend, stand_in

from chebface import server as server_module
from chebface.errors import (
    AssetError,
    ConfigError,
    InputError,
    MissingDependencyError,
    ServerBusyError,
    ServerError,
    ServerUnavailableError,
)
from chebface.repository import check_repository
from chebface.server import Server, stop_signals
from chebface.signature import DECODE, LEAVES, MODELS
from chebface.wheel import find_wheel, make_environment, ngc_command


@pytest.fixture(scope="module")
def running(repository: Path):
    with Server(repository, stop_timeout_s=0.3) as server:
        yield server


def processes_of(group: int) -> list[int]:
    """Process ids of a process group that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def shared_memory(parent: int | None = None) -> set[str]:
    """What the servers that a process started hold in shared memory; this process's, unless another is named."""
    return {path.name for path in Path("/dev/shm").glob(f"chebface_{parent or os.getpid()}_*")}


def stub_of(server: Server, model: str) -> int:
    for pid in processes_of(server.pid):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if any(f"/models/{model}/".encode() in word for word in words[1:2]):
            return pid
    raise LookupError(f"no stub of {model}")


def get(server: Server, path: str, headers: dict[str, str] | None = None) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", server.ports["http"], timeout=10)
    try:
        connection.request("GET", path, headers=headers or {})
        return connection.getresponse().status
    finally:
        connection.close()


def test_answers_after_start(running: Server) -> None:
    assert running.is_running()
    assert running.check() > 0
    assert running.started_in_s > 0
    assert set(running.ports) == {"grpc", "http", "metrics"}
    assert running.url == f"127.0.0.1:{running.ports['grpc']}"
    for name in (*LEAVES, "reconstruct_photo"):
        assert get(running, f"/v2/models/{name}/versions/1/ready") == 200


def test_listens_on_loopback_only(running: Server) -> None:
    wanted = {f"{port:04X}" for port in running.ports.values()}
    listening = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            host, port = local.split(":")
            if state == "0A" and port in wanted:
                listening.setdefault(port, set()).add(host)
    assert set(listening) == wanted
    assert set().union(*listening.values()) <= {"0100007F", "0000000000000000FFFF00000100007F"}  # 127.0.0.1, mapped


def test_administration_wants_the_key(running: Server) -> None:
    path = "/v2/models/decode/config"
    assert get(running, path) >= 400
    assert get(running, path, dict([running.admin_header])) == 200


def test_metrics_are_served(running: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", running.ports["metrics"], timeout=10)
    try:
        connection.request("GET", "/metrics")
        assert b'nv_inference_request_success{model="reconstruct"' in connection.getresponse().read()
    finally:
        connection.close()


def test_start_twice_is_refused(running: Server) -> None:
    with pytest.raises(ServerUnavailableError, match="already started"):
        running.start()
    assert running.is_running()


@pytest.mark.parametrize("native", [True, False], ids=["native", "python"])
def test_stop_leaves_nothing_but_the_log(repository: Path, tmp_path: Path, native: bool) -> None:
    before = shared_memory()
    log = tmp_path / "logs" / "server.log"
    server = Server(repository, log_path=log)
    with nullcontext() if native else python_backend():
        server.start()
    group, folder = server.pid, server._folder
    programs = 1 if native else len(LEAVES) + 1  # reconstruct_photo is the one that is no leaf
    assert len(processes_of(group)) == 1 + programs
    assert len(shared_memory() - before) == programs
    server.stop()
    assert processes_of(group) == []
    assert shared_memory() <= before
    assert not folder.exists()
    assert not server.is_running()
    assert "Started GRPCInferenceService" in log.read_text() == server.log
    server.stop()
    with pytest.raises(ServerUnavailableError, match="not started"):
        server.check()
    with pytest.raises(ServerUnavailableError, match="not started"):
        _ = server.url
    with pytest.raises(ServerUnavailableError, match="not started"):
        _ = server.http_url


def test_killed_server_is_noticed_and_can_start_again(repository: Path) -> None:
    before = shared_memory()
    server = Server(repository, stop_timeout_s=0.3).start()
    try:
        group = server.pid
        os.kill(group, signal.SIGKILL)
        with pytest.raises(ServerUnavailableError, match=r"the server died; the end of its log"):
            server.watch(every_s=5)
        with pytest.raises(ServerUnavailableError, match="did not answer"):
            server.check()
        server.stop()
        assert processes_of(group) == []
        assert shared_memory() <= before
        assert server.start().check() > 0
    finally:
        server.stop()


def test_dead_stub_is_noticed_though_the_server_says_ready(repository: Path) -> None:
    with python_backend(), Server(repository) as server:
        os.kill(stub_of(server, "reconstruct"), signal.SIGKILL)
        with pytest.raises(ServerUnavailableError, match="is not healthy"):
            server.check()
        assert get(server, "/v2/health/ready") == 200
        with pytest.raises(ServerUnavailableError, match="end of its log"):
            server.watch(every_s=0.1)


def test_hung_server_is_killed_at_the_time_out(repository: Path) -> None:
    server = Server(repository, stop_timeout_s=0.5).start()
    group = server.pid
    os.kill(group, signal.SIGSTOP)
    with pytest.raises(ServerUnavailableError, match="did not answer"):
        server.check(timeout_s=0.2)
    server.stop()
    assert processes_of(group) == []
    assert "Started GRPCInferenceService" in server.log  # also without a file of its own


def test_taken_port_is_named(repository: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServerUnavailableError, match=f"http port {port} on 127.0.0.1 cannot be used"):
            Server(repository, http_port=port).start()


@pytest.mark.parametrize(
    "options",
    [{"grpc_port": 0}, {"http_port": 65536}, {"grpc_port": 9, "http_port": 9}, {"start_timeout_s": 0}, {"cores": 0}],
)
def test_impossible_settings_are_refused(options: dict) -> None:
    with pytest.raises(ConfigError):
        Server(**options)


@pytest.mark.parametrize("missing", ["", "decode", "reconstruct/config.pbtxt", "regress/1/model.onnx"])
def test_unfilled_repository_is_named(repository: Path, tmp_path: Path, missing: str) -> None:
    copy = tmp_path / "models"
    shutil.copytree(repository, copy)
    target = copy / missing
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    with pytest.raises(AssetError, match="python -m export all"):
        Server(copy).start()


def replace_model(repository: Path, folder: Path, name: str, content: bytes) -> Path:
    copy = folder / "models"
    shutil.copytree(repository, copy)
    (copy / name / "1" / "model.onnx").write_bytes(content)
    return copy


def test_model_of_another_signature_is_refused(repository: Path, tmp_path: Path) -> None:
    copy = replace_model(repository, tmp_path, "regress", stand_in(DECODE).SerializeToString())
    with pytest.raises(AssetError, match=r"regress.*its inputs are not those of signature.py: expected crop"):
        check_repository(copy)


def test_model_of_fixed_batch_is_refused(repository: Path, tmp_path: Path) -> None:
    proto = stand_in(DECODE)
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    copy = replace_model(repository, tmp_path, "decode", proto.SerializeToString())
    with pytest.raises(AssetError, match="fixed batch"):
        check_repository(copy)


def test_damaged_model_is_refused(repository: Path, tmp_path: Path) -> None:
    copy = replace_model(repository, tmp_path, "decode", b"not a graph")
    with pytest.raises(AssetError, match="onnxruntime cannot read it"):
        check_repository(copy)


def test_config_for_another_backend_is_refused(repository: Path, tmp_path: Path) -> None:
    copy = tmp_path / "models"
    shutil.copytree(repository, copy)
    config = copy / "decode" / "config.pbtxt"
    config.write_text(config.read_text().replace('"onnxruntime"', '"tensorrt"'))
    before = shared_memory()
    with pytest.raises(AssetError, match="expected one backend"):
        Server(copy).start()
    assert shared_memory() <= before


def test_server_that_dies_at_start_shows_its_log(repository: Path, tmp_path: Path) -> None:
    copy = tmp_path / "models"
    shutil.copytree(repository, copy)
    config = copy / "decode" / "config.pbtxt"
    config.write_text(config.read_text().replace("max_batch_size: 32", "max_batch_size: thirty-two"))
    with pytest.raises(ServerUnavailableError, match=r"(?s)died while it started; the end of its log.*thirty"):
        Server(copy).start()


def test_failure_on_a_blank_crop_is_refused(running: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "reconstruct", DECODE)
    with pytest.raises(ServerError, match="failed on a blank crop"):
        running.check()


def test_answer_of_another_shape_is_refused() -> None:
    answer = {"outputs": [{"name": "vertices", "datatype": "FP32", "shape": [1, 5, 3]}]}
    with pytest.raises(ServerError, match=r"not what signature.py says"):
        server_module._check_answer(answer, DECODE.outputs)


def test_slow_start_is_given_up(repository: Path) -> None:
    with pytest.raises(ServerUnavailableError, match=r"not ready after 0.01 s \(start_timeout_s\)"):
        Server(repository, start_timeout_s=0.01).start()


def test_missing_wheel_says_what_to_install_or_run(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pytriton" else real(name))
    with pytest.raises(MissingDependencyError, match=r"(?s)pip install 'chebface\[server\]'.*docker run") as caught:
        Server(repository).start()
    assert ngc_command(repository) in str(caught.value)


def test_python_without_a_stub_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "pytriton" / "tritonserver"
    (root / "bin").mkdir(parents=True)
    (root / "bin" / "tritonserver").touch()
    (root / "python_backend_stubs" / "3.8").mkdir(parents=True)
    spec = importlib.machinery.ModuleSpec("pytriton", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path / "pytriton")]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(MissingDependencyError, match=r"no Python backend stub for Python .* \(it has 3.8\)"):
        find_wheel()


def test_numpy_2_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.1.0")
    with pytest.raises(MissingDependencyError, match=r"numpy below 2, got 2.1.0"):
        find_wheel()


def test_missing_onnxruntime_is_named(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=r"onnxruntime is not installed: pip install 'chebface\[server\]'"):
        check_repository(repository)


def test_interpreter_without_the_usual_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = find_wheel()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(MissingDependencyError, match="no python3 there"):
        make_environment(wheel, tmp_path)


def test_lost_port_is_chosen_again(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choose = server_module._choose_ports
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        choices = iter([choose({"grpc": None, "metrics": None}) | {"http": taken.getsockname()[1]}])
        monkeypatch.setattr(server_module, "_choose_ports", lambda wanted: next(choices, None) or choose(wanted))
        with Server(repository, stop_timeout_s=0.3) as server:
            assert server.ports["http"] != taken.getsockname()[1]
            assert server.check() > 0


def test_container_command_serves_the_same_folder(tmp_path: Path) -> None:
    words = ngc_command(tmp_path).split()
    assert words[:2] == ["docker", "run"]
    assert f"{tmp_path.resolve()}:/models:ro" in words
    assert "--disable-auto-complete-config" in words


def test_signals_need_the_main_thread() -> None:
    caught = []

    def enter() -> None:
        try:
            with stop_signals():
                pass
        except InputError as error:
            caught.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert "main thread" in str(caught[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_parent_takes_the_server_along(repository: Path, number: signal.Signals) -> None:
    program = textwrap.dedent(
        """
        import signal, sys
        from chebface.server import Server, stop_signals
        signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background are told to ignore it
        try:
            with stop_signals(), Server(sys.argv[1]) as server:
                print(server.pid, flush=True)
                server.watch()
        except KeyboardInterrupt:
            print("stopped", flush=True)
        """
    )
    command = [sys.executable, "-c", program, str(repository)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        group = int(parent.stdout.readline())
        assert processes_of(group)
        assert shared_memory(parent.pid)
        parent.send_signal(number)
        assert parent.stdout.readline() == "stopped\n"
    assert parent.returncode == 0
    assert processes_of(group) == []
    assert shared_memory(parent.pid) == set()


@pytest.mark.parametrize("nohup", [True, False])
def test_a_hang_up_may_mean_renewal(nohup: bool) -> None:
    asked: list[str] = []
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN) if nohup else signal.getsignal(signal.SIGHUP)
    try:
        with stop_signals(lambda: asked.append("renew")):
            os.kill(os.getpid(), signal.SIGHUP)
            assert asked == ["renew"]
            with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
                os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_models_at_work_can_be_limited(repository: Path) -> None:
    with Server(repository, cores=1, stop_timeout_s=0.3) as server:
        words = Path(f"/proc/{server.pid}/cmdline").read_bytes().split(b"\0")
        assert {b"--rate-limit=execution_count", b"--rate-limit-resource=core:1"} < set(words)
        assert b"CHEBFACE_CORES=1" in Path(f"/proc/{server.pid}/environ").read_bytes().split(b"\0")
        assert server.check() > 0
        assert server.again()._cores == 1


def test_another_of_the_same_has_ports_of_its_own(running: Server) -> None:
    other = running.again()
    assert other.repository == running.repository and other.ports == {} and not other.is_running()


def test_a_full_disk_is_unavailable_and_leaves_nothing(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(server_module, "materialise", refuse)
    with pytest.raises(ServerUnavailableError, match=rf"{tmp_path}: .*No space left on device.*: make room"):
        Server(repository).start()
    assert not list(tmp_path.iterdir())


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) not in {signal.SIG_IGN, signal.SIG_DFL}
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_forgotten_server_ends_with_its_parent(repository: Path) -> None:
    program = "import sys; from chebface.server import Server; print(Server(sys.argv[1]).start().pid)"
    command = [sys.executable, "-c", program, str(repository)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert processes_of(int(done.stdout)) == []


def wait_until_gone(group: int) -> bool:
    deadline = time.monotonic() + 20
    while processes_of(group) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not processes_of(group)


@pytest.mark.skipif(not shutil.which("setpriv"), reason="setpriv (util-linux) is not installed")
def test_killed_parent_takes_the_server_along(repository: Path, tmp_path: Path) -> None:
    program = (
        "import sys, time; from chebface.server import Server; print(Server(sys.argv[1]).start().pid, flush=True); "
        "time.sleep(60)"
    )
    command = [sys.executable, "-c", program, str(repository)]
    environment = os.environ | {"TMPDIR": str(tmp_path)}  # a killed parent cannot remove its folder
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        group = int(parent.stdout.readline())
        parent.kill()
    assert wait_until_gone(group)


def test_fork_does_not_stop_its_parents_server(repository: Path) -> None:
    program = textwrap.dedent(
        """
        import os, sys
        from chebface.server import Server
        with Server(sys.argv[1], stop_timeout_s=0.3) as server:
            child = os.fork()
            if not child:
                server.stop()
                os._exit(0)
            os.waitpid(child, 0)
            print(server.check() > 0)
        """
    )
    command = [sys.executable, "-W", "ignore", "-c", program, str(repository)]
    assert subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout == "True\n"


def test_requests_in_flight_finish_before_the_server_stops(repository: Path) -> None:
    with python_backend():
        server = Server(repository).start()
    stub = stub_of(server, "reconstruct")
    os.kill(stub, signal.SIGSTOP)
    answers: list[object] = []

    def ask() -> None:
        try:
            answers.append(server.check(timeout_s=30))
        except ServerError as error:
            answers.append(error)

    asker = threading.Thread(target=ask)
    asker.start()
    time.sleep(0.3)  # the request is inside the stopped stub now
    stopper = threading.Thread(target=server.stop)
    stopper.start()
    time.sleep(0.3)
    assert server.is_running()
    os.kill(stub, signal.SIGCONT)
    asker.join()
    stopper.join()
    assert isinstance(answers[0], float), answers


def test_stand_ins_are_valid_graphs() -> None:
    for model in LEAVES.values():
        onnx.checker.check_model(stand_in(model), full_check=True)


def test_watching_takes_busy_for_alive_and_silence_for_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    late, busy = ServerUnavailableError("no answer"), ServerBusyError("full queue")
    answers = iter([busy] * 4 + [late, late, None, late, busy, late, late, late])
    asked = []

    def check() -> float:
        asked.append(answer := next(answers))
        if answer:
            raise answer
        return 1.0

    server = Server()
    monkeypatch.setattr(server, "is_running", lambda: True)
    monkeypatch.setattr(server, "check", check)
    with pytest.raises(ServerUnavailableError, match="no answer"):
        server.watch(every_s=0)
    assert len(asked) == 12
    answers = iter([late, ServerError("wrong answer")])
    with pytest.raises(ServerError, match="wrong answer"):
        server.watch(every_s=0)
