"""Every fault once, on real servers: nothing is lost, each answer is the right one, the server is well afterwards."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from models_for_tests import write_repository
from test_proxy import needs_nginx

from bench import bed as bed_module
from bench import faults as faults_module
from bench import hostile
from bench.bed import Bed, Load, Outcome, Served, difference
from bench.cli import main
from bench.faults import DAMAGES, FAULTS, HEADER, measure, spell
from bench.record import DisagreesError
from chebface.errors import (
    AssetError,
    ConfigError,
    InputError,
    MissingDependencyError,
    PhotoError,
    ServerBusyError,
    ServerUnavailableError,
)
from chebface.repository import SUMS, model_code
from chebface.signature import ENCODE, RECONSTRUCT_PHOTO

BEHIND_NGINX = [name for name in FAULTS if "nginx" in name or "inputs" in name or "clients" in name]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stand-ins as an export leaves them."""
    folder = write_repository(tmp_path_factory.mktemp("models"), instances=None)
    shutil.rmtree(folder / ENCODE.name)  # optional, and without a model file
    (folder / RECONSTRUCT_PHOTO.name / "1" / "model.py").write_text(model_code(RECONSTRUCT_PHOTO))
    for path in folder.glob("*/1/model.onnx"):
        path.with_name(SUMS).write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n")
    return folder


@pytest.fixture
def bed(repository: Path, tmp_path: Path) -> Bed:
    return Bed(repository, tmp_path, "small")


def run(repository: Path, name: str) -> dict:
    (row,) = measure(repository, [name])
    if "skipped" in row:
        pytest.skip(row["skipped"])
    assert row["lost"] == 0, row["why"]
    assert row["failed"] == []
    assert row["requests"] == row["answered"] + row["typed_errors"] == row["answered"] + sum(row["errors"].values())
    assert row["tried"] > 0 and row["answered"] > 0
    return row


@pytest.mark.parametrize("name", [name for name in FAULTS if name not in BEHIND_NGINX])
def test_nothing_is_lost(repository: Path, name: str) -> None:
    row = run(repository, name)
    if name not in ("model files damaged", "new version under load"):
        assert "correct afterwards" in row["checked"] or name == "SIGTERM"


@needs_nginx
@pytest.mark.parametrize("name", BEHIND_NGINX)
def test_nothing_is_lost_behind_nginx(repository: Path, name: str) -> None:
    run(repository, name)


def test_a_kind_of_hostile_input_at_full_scale_is_ten_thousand_in_all() -> None:
    assert sum(kind.full for kind in hostile.KINDS) >= 10_000
    assert len({kind.name for kind in hostile.KINDS}) == len(hostile.KINDS)


def test_what_is_lost_is_counted() -> None:
    outcome = Outcome("x")

    def fail(error: Exception) -> Callable[[], str | None]:
        def fate() -> str | None:
            raise error

        return fate

    misuse = fail(InputError("closed"))
    for fate in (lambda: None, lambda: "a wrong answer", fail(ServerBusyError("busy")), fail(KeyError("raw")), misuse):
        outcome.count(fate)
    outcome.requests += 1  # no word at all
    outcome.expect(True, "well")
    outcome.expect(False, "unwell", "a reason")
    row = outcome.row()
    assert (row["requests"], row["answered"], row["typed_errors"], row["lost"]) == (6, 1, 1, 4)
    assert row["errors"] == {"ServerBusyError": 1}
    assert row["why"] == ["a wrong answer", "KeyError: 'raw'", "closed"]
    assert (row["checked"], row["failed"]) == (["well"], ["unwell: a reason"])
    assert "NOT unwell: a reason; lost: a wrong answer" in spell(row) and len(HEADER) < len(spell(row))


class Wrong:
    """A way to a server whose answers are as told."""

    def __init__(self, answer: Callable[[], dict]) -> None:
        self.answer = answer

    def infer(self, *ignored: object) -> dict:
        return self.answer()

    def close(self) -> None:
        pass


def test_wrong_late_and_missing_answers_are_lost(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    def late() -> dict:
        time.sleep(0.3)
        return {name: array[:1] for name, array in bed.right.items()}

    def silent() -> dict:
        time.sleep(3)
        return late()

    answers = [lambda: {name: array[:1] + 1 for name, array in bed.right.items()}]
    answers += [lambda: {name: array[:1] * np.nan for name, array in bed.right.items()}, late, silent]
    ways = iter(answers)
    monkeypatch.setattr(bed_module, "connect", lambda *_: Wrong(next(ways)))
    monkeypatch.setattr(bed_module, "DEADLINE_S", 0.1)
    monkeypatch.setattr(bed_module, "GRACE_S", 0.1)
    outcome = Outcome("x")
    with Load(bed, outcome, [["url"]] * 4, each=1):
        time.sleep(0.5)
    assert (outcome.requests, outcome.answered, outcome.lost) == (4, 0, 4)
    assert sorted(why.partition(",")[0] for why in outcome.why)[:2] == ["a wrong answer", "a wrong answer"]
    assert any("with a deadline of 0.1 s" in why for why in outcome.why) and len(outcome.why) == 3


def test_answers_that_do_not_come_end_the_fault(bed: Bed) -> None:
    load = Load(bed, Outcome("x"), [["127.0.0.1:9"]])
    with pytest.raises(ServerUnavailableError, match=r"no 1 answers within 0.1 s"), load:
        load.more(1, most_s=0.1)
    assert bed.wrong("127.0.0.1:9", bed.right).startswith("127.0.0.1:9")


def test_versions_that_answer_alike_are_refused(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, answers = bed.next_version()
    assert difference(answers, bed.right) > 10 and (folder / "reconstruct" / "2" / "model.onnx").is_file()
    bed.bring_in(folder)
    assert "versions: [ 2 ]" in (bed.live / "reconstruct" / "config.pbtxt").read_text()
    monkeypatch.setattr(bed_module, "run_here", lambda *_: bed.right)
    with pytest.raises(DisagreesError, match="would not be seen"):
        bed.next_version()


def test_a_program_that_ends_or_is_not_there_is_said(bed: Bed) -> None:
    shutil.rmtree(bed.live / "decode")
    with pytest.raises(ServerUnavailableError, match="no 'ready' within"):
        Served(bed)


def test_a_disk_of_its_own_may_be_forbidden(bed: Bed, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_: None)
    with pytest.raises(MissingDependencyError, match="not permitted here"):
        Served(bed, room=("shared", 64))
    (row,) = measure(repository, ["disk full"])
    assert "not permitted" in row["skipped"] and row["requests"] == 0
    assert "skipped: a small disk" in spell(row)
    outcome_made = Outcome.count

    def requested(bed: Bed, outcome: Outcome) -> None:
        outcome_made(outcome, lambda: None)
        raise MissingDependencyError("later")

    monkeypatch.setitem(FAULTS, "disk full", requested)
    with pytest.raises(MissingDependencyError, match="later"):
        measure(repository, ["disk full"])


def test_a_server_that_does_not_come_back_is_a_failure(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(bed: Bed, outcome: Outcome) -> None:
        outcome.count(lambda: None)
        raise ServerUnavailableError("no 'ready' within 180 s")

    monkeypatch.setitem(FAULTS, "disk full", lose)
    (row,) = measure(repository, ["disk full"])
    assert row["failed"] == ["came back: no 'ready' within 180 s"] and row["answered"] == 1


def test_rows_are_kept_as_they_come_whatever_follows(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(bed: Bed, outcome: Outcome) -> None:
        raise ConnectionRefusedError("nobody listens")

    def broken(bed: Bed, outcome: Outcome) -> None:
        raise ZeroDivisionError

    monkeypatch.setitem(FAULTS, "disk full", refused)
    monkeypatch.setitem(FAULTS, "slow clients", broken)
    kept: list[dict] = []
    with pytest.raises(ZeroDivisionError):
        measure(repository, ["disk full", "slow clients"], keep=kept.append)
    assert [row["failed"] for row in kept] == [["came back: nobody listens"]]


def test_a_backend_that_is_not_there_is_said(bed: Bed) -> None:
    served = Served.__new__(Served)
    served.events = [{"event": "ready", "pid": 1}]
    with pytest.raises(ServerUnavailableError, match="no backend process of decode"):
        served.stub("decode")


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_seen_before_a_server_loads_it(repository: Path, tmp_path: Path, damage: str) -> None:
    from export.repository import verify_repository

    folder = Path(shutil.copytree(repository, tmp_path / "copy"))
    verify_repository(folder)
    DAMAGES[damage](folder)
    with pytest.raises(AssetError, match=str(folder)):
        verify_repository(folder)


def test_damaged_files_that_pass_are_lost(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(DAMAGES)[:2]:
        monkeypatch.setitem(faults_module.DAMAGES, name, lambda folder: None)
    (row,) = measure(repository, ["model files damaged"])
    assert row["lost"] == 2 and row["failed"] and "exit code 0" in row["why"][0]


def test_photos_go_to_the_reader_where_no_model_takes_them(bed: Bed) -> None:
    assert hostile.Target({}, "", bed.crops_u8[0], bed.live).takes_photos
    shutil.rmtree(bed.live / RECONSTRUCT_PHOTO.name)
    target = hostile.Target({}, "", bed.crops_u8[0], bed.live)
    assert not target.takes_photos
    hostile._take(target, hostile._image("PNG"))
    for content in (hostile._png(20_000, 20_000), hostile._png(2**31 - 1, 9, False), b""):
        with pytest.raises(PhotoError):
            hostile._take(target, content)


def test_the_command(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(bed: Bed, outcome: Outcome) -> None:
        outcome.count(lambda: "gone")

    monkeypatch.setitem(FAULTS, "disk full", lose)
    common = ["faults", "--repository", str(repository)]
    out = tmp_path / "rows.jsonl"
    done = CliRunner().invoke(main, [*common, "--fault", "disk full", "--json", "-o", str(out)])
    assert done.exit_code == 1 and json.loads(out.read_text())["lost"] == 1
    assert json.loads(done.stdout)["why"] == ["gone"]
    done = CliRunner().invoke(main, [*common, "--fault", "disk full"])
    assert done.exit_code == 1 and "lost: gone" in done.stdout and "typed" not in done.stdout
    monkeypatch.setitem(FAULTS, "disk full", lambda bed, outcome: outcome.count(lambda: None))
    assert CliRunner().invoke(main, [*common, "--fault", "disk full"]).exit_code == 0
    done = CliRunner().invoke(main, [*common, "--fault", "flood"])
    assert done.exit_code == ConfigError.exit_code and "expected some of server killed" in done.output


def test_an_unknown_scale_is_refused(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="scale: expected one of small, full, got 'huge'"):
        Bed(repository, tmp_path, "huge")
