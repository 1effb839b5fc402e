"""The benchmarks: records, honesty about disagreement, and that each command runs."""

from __future__ import annotations

import json
import sys

import pytest
from click.testing import CliRunner

from bench import cli, record, train
from chebface import native
from chebface.errors import MissingDependencyError

WANTED = {
    *("bench", "case", "what", "pass", "batch", "threads", "implementation", "median_ms", "p99_ms", "rival", "ratio"),
    *("check", "commit", "machine", "date"),
}


def test_a_race_alternates_and_counts():
    order = []
    times = record.race(lambda: order.append("a"), lambda: order.append("b"), seconds=0)
    assert len(times[0]) == len(times[1]) == 5
    assert "".join(order) == "ab" * 6  # one warm-up each


def test_ratio_is_the_rivals_median_over_ours():
    row = record.make_record(
        bench="x", case="y", implementation="a", rival="b", times=([1.0, 2.0, 30.0], [8.0, 6.0, 7.0])
    )
    assert row["ratio"] == 3.5
    assert row["median_ms"] == 2.0


def test_what_disagrees_is_not_timed():
    assert record.check("x", 1e-9, 1e-6)["passed"]
    for error in (1e-3, float("nan")):
        with pytest.raises(record.DisagreesError, match="x: error"):
            record.check("x", error, 1e-6)


@pytest.mark.skipif(native.find_compiler() is None, reason="needs a C++ compiler")
def test_rendering_writes_whole_records(tmp_path, head):
    path = tmp_path / "rows.jsonl"
    done = CliRunner().invoke(cli.main, ["rendering", "--seconds", "0", "--json", "-o", str(path)])
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["case"] for row in rows] == ["rasterize", "render"]
    assert all(row.keys() >= WANTED for row in rows)
    assert [json.loads(line)["case"] for line in done.stdout.splitlines()] == ["rasterize", "render"]
    assert "x better than" in CliRunner().invoke(cli.main, ["rendering", "--seconds", "0"]).output


@pytest.mark.skipif(native.find_compiler() is None, reason="needs a C++ compiler")
def test_no_native_code_is_a_clear_error(monkeypatch):
    monkeypatch.setattr("chebface.render.raster.implementation", lambda: "reference (no compiler)")
    done = CliRunner().invoke(cli.main, ["rendering"])
    assert done.exit_code == 4
    assert "no compiler" in done.output


SMALL = ("backbone=light", "recognition_backbone=light")


def test_training_writes_whole_records(tmp_path, head, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch3d.ops", None)  # seconds an image
    settings = [word for text in SMALL for word in ("--set", text)]
    options = ["--seconds", "0", "--batch", "1", "--threads", "1", "--case", "step", "--case", "share", *settings]
    path = tmp_path / "rows.jsonl"
    done = CliRunner().invoke(cli.main, ["train", *options, "--json", "-o", str(path)])
    assert done.exit_code == 0, done.output
    step, share = [json.loads(line) for line in path.read_text().splitlines()]
    assert (step["case"], share["case"]) == ("step", "share")
    for row in (step, share):
        assert row.keys() >= WANTED
        assert (row["batch"], row["images_per_actor"], row["backbone"]) == (1, 2, "light")
    assert step["rival"] == "torch-geometric"
    assert "cannot be imported" in step["pytorch3d"]
    assert step["check"]["error"] < 1e-5  # two encoders, one loss
    assert 0 < share["share"] < share["share_with_recognition"]
    assert share["share"] < share["share_of_the_rest"]


def test_a_rival_of_another_loss_is_not_timed(head, monkeypatch):
    forward = train._GeometricEncoder.forward
    monkeypatch.setitem(sys.modules, "pytorch3d.ops", None)
    monkeypatch.setattr(train._GeometricEncoder, "forward", lambda self, x: forward(self, x) + 1)
    with pytest.raises(record.DisagreesError, match="step: loss of the rival"):
        train.measure(0, ["step"], 1, threads=1, overrides=SMALL)


def test_data_are_timed_on_all_cores(head, monkeypatch):
    monkeypatch.setattr(train, "_PART", 2)
    (row,) = train.measure(0, ["synthesis"], threads=1)
    assert row.keys() >= WANTED
    assert min(row["loaded_per_s"], row["made_per_s"]) > 0
    assert row["ratio"] == pytest.approx(row["loaded_per_s"] / row["made_per_s"], rel=0.02)


def test_memory_is_that_of_a_tenth_and_of_the_end(head):
    (row,) = train.measure(0, ["memory"], steps=10, threads=1)
    assert row.keys() >= WANTED
    assert (row["steps"], row["batch"], len(row["resident_mb"])) == (10, 2, 10)
    assert row["growth_mb"] == pytest.approx(row["resident_mb"][-1] - row["resident_mb"][0], abs=0.11)
    assert min(row["resident_mb"]) > 50


def test_training_says_what_it_cannot_measure(monkeypatch):
    done = CliRunner().invoke(cli.main, ["train", "--case", "sleep"])
    assert (done.exit_code, "case: expected some of step, share, synthesis, memory, got sleep" in done.output) == (
        2,
        True,
    )
    assert CliRunner().invoke(cli.main, ["train", "--case", "step", "--set", "sleep=1"]).exit_code == 2

    def refuse(path):
        raise OSError("no /proc")

    monkeypatch.setattr(train.Path, "read_text", refuse)
    with pytest.raises(MissingDependencyError, match=r"memory: no /proc/self/status to read \(no /proc\)"):
        train._read_resident_mb()
