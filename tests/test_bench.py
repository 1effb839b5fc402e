"""The benchmarks: records, honesty about disagreement, and that each command runs."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from bench import cli, record
from chebface import native

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
