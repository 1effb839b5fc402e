"""The ablation, end to end at the smallest size: rows, what they hold, and that a second run keeps what is there."""

from __future__ import annotations

import math

import pytest

from bench import ablation
from bench.ablation import CHALLENGES, MEAN_HEAD, REMEDIES, measure
from chebface import checkpoint
from chebface.config import PRESETS, load
from chebface.errors import AssetError

SMALL = {"steps": 1, "actors": 2, "subjects": 2, "seeds": (0, 1), "presets": ("ours", "mica")}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("ablation")


@pytest.fixture(scope="module")
def rows(work):
    return measure(work, **SMALL)


def test_every_preset_and_seed_has_a_row(rows):
    errors = [row for row in rows if row["case"] == "errors"]
    runs = [(row["preset"], row["seed"]) for row in errors]
    assert runs == [("ours", 0), ("ours", 1), ("mica", 0), ("mica", 1), (MEAN_HEAD, 0)]
    for row in errors:
        for what in ("median_mm", "mean_mm", "std_mm"):
            assert 0 < row[what] < 10 and 0 < row[f"metrical_{what}"] < 10
        assert all(row[f"{name}_median_mm"] > 0 for name in CHALLENGES)
    mean = errors[-1]
    assert len({mean[f"{name}_median_mm"] for name in CHALLENGES}) == 1  # the same people in every challenge
    numbers = {tuple(value for key, value in row.items() if key.endswith("_mm")) for row in errors}
    assert len(numbers) == len(errors)


def test_the_bootstrap_is_of_the_rows(rows):
    errors = {(row["preset"], row["seed"]): row for row in rows if row["case"] == "errors"}
    found = next(
        row
        for row in rows
        if row["case"] == "bootstrap" and row["what"] == "mean" and row["challenge"] == "all" and not row["metrical"]
    )
    assert (found["a"], found["b"], found["images"]) == ("ours", "mica", 2 * 2 * len(CHALLENGES))
    for side, name in (("a_mm", "ours"), ("b_mm", "mica")):
        seeds = [errors[name, seed]["mean_mm"] for seed in (0, 1)]
        assert math.isclose(found[side], sum(seeds) / 2, abs_tol=2e-4)
    assert found["low_mm"] <= found["difference_mm"] <= found["high_mm"]


def test_a_second_run_keeps_what_is_there(work, rows):
    weights = sorted((work / "runs").glob("*/regressor.safetensors"))
    before = [path.stat().st_mtime_ns for path in weights]
    assert len(weights) == 4 and measure(work, **SMALL) == rows
    assert [path.stat().st_mtime_ns for path in weights] == before
    with pytest.raises(AssetError, match="other settings"):
        measure(work, **SMALL | {"settings": {"lambda_2d": 0.1}})


def test_remedies_are_compared_with_every_preset_and_reasons_given(work, rows, monkeypatch):
    monkeypatch.setattr(ablation, "SHARP_ENCODER", ablation.SHARP_ENCODER | {"epochs": 1, "count": 40})
    monkeypatch.setattr(ablation, "REASONS", 4)
    more = measure(work, **SMALL, remedies=True)
    kept = [row for row in more if row["case"] == "errors" and row["preset"] in (*SMALL["presets"], MEAN_HEAD)]
    assert kept == [row for row in rows if row["case"] == "errors"]
    pairs = {(row["a"], row["b"]) for row in more if row["case"] == "bootstrap"}
    assert pairs == {("ours", "mica")} | {(name, preset) for name in REMEDIES for preset in SMALL["presets"]}
    pulls = {row["term"]: row for row in more if row["case"] == "pull"}
    assert pulls["vertices"]["cosine_with_vertices"] == 1 and pulls["vertices"]["norm"] > 0
    assert pulls["vertices"]["norm"] == pulls["vertices"]["norm_on_shape"]
    assert pulls["landmarks"]["norm"] > pulls["landmarks"]["norm_on_shape"] > 0
    codes = [row for row in more if row["case"] == "code"]
    assert [row["encoder"] for row in codes] == ["shipped", "sharp"]
    assert all(-1 <= row["rank_correlation"] <= 1 for row in codes)
    assert checkpoint.load_encoder(work / "encoder" / "encoder.safetensors")[1]["code"] == 32


def test_presets_are_the_paper_without_a_part():
    from chebface.config import TrainReconstructor

    ours, mica, deca = (load(TrainReconstructor, None, [f"preset={name}"]) for name in PRESETS)
    assert (mica.lambda_2d, mica.lambda_descriptor, mica.lambda_vertices) == (0, 0, ours.lambda_vertices)
    assert (deca.lambda_3d, deca.lambda_2d) == (0, ours.lambda_2d)
