"""Settings: defaults, file, overrides, and what is refused."""

from __future__ import annotations

import pytest

from chebface.config import Synthesize, TrainReconstructor, load, to_dict
from chebface.errors import ConfigError


def test_defaults_are_the_papers():
    c = TrainReconstructor()
    assert (c.learning_rate, c.weight_decay, c.batch, c.steps) == (1e-5, 2e-4, 8, 160_000)
    assert (c.lambda_2d, c.lambda_3d, c.lambda_vertices) == (0.4, 0.6, 0.5)


def test_overrides_come_after_the_file_and_after_defaults(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('backbone = "light"\nsteps = 7\nlearning_rate = 1\nnormalize_embedding = true\n')
    c = load(TrainReconstructor, path, ["steps=9", "seed = 4", "normalize_embedding=false"])
    assert (c.backbone, c.steps, c.learning_rate, c.seed, c.batch) == ("light", 9, 1.0, 4, 8)
    assert c.normalize_embedding is False
    assert to_dict(c)["steps"] == 9


@pytest.mark.parametrize(
    ("text", "overrides", "says"),
    [
        ("stepz = 1", [], "unknown setting stepz"),
        ("", ["yaw=3"], "unknown setting yaw"),
        ("count = 'many'", [], "count: expected int"),
        ("count = 1.5", [], "count: expected int"),
        ("", ["count=1.5"], "count: expected int"),
        ("", ["count"], "expected key=value"),
        ("", ["count=0"], "count: expected above 0"),
        ("", ["shard=-1"], "shard: expected above 0"),
        ("", ["jpeg_quality=100"], "jpeg_quality: expected 1..95"),
        ("count = [", [], "settings file"),
    ],
)
def test_bad_settings_are_named(tmp_path, text, overrides, says):
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        load(Synthesize, path, overrides)


def test_bad_boolean_and_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="precision: expected fp32 or bf16"):
        load(TrainReconstructor, None, ["precision=fp16"])
    with pytest.raises(ConfigError, match="batch: expected above 0"):
        load(TrainReconstructor, None, ["batch=0"])
    with pytest.raises(ConfigError, match="normalize_embedding: expected bool"):
        load(TrainReconstructor, None, ["normalize_embedding=perhaps"])
    with pytest.raises(ConfigError, match=r"nowhere\.toml"):
        load(Synthesize, tmp_path / "nowhere.toml")
