"""The command as a user types it: help, exit codes, JSON, one bad photo among good ones."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from click import Command, Group
from click.testing import CliRunner
from heads_for_tests import make_head

from chebface import cli
from chebface.errors import ServerUnavailableError
from chebface.heads import asset


@pytest.fixture
def run():
    def call(*arguments):
        return CliRunner().invoke(cli.main, [str(a) for a in arguments])

    return call


def walk(command: Command, path: tuple[str, ...] = ()):
    yield path, command
    if isinstance(command, Group):
        for name, child in command.commands.items():
            yield from walk(child, (*path, name))


@pytest.mark.parametrize(("path", "command"), [pytest.param(*each, id=" ".join(each[0])) for each in walk(cli.main)])
def test_every_command_and_option_has_help(run, path, command):
    assert run(*path, "--help").exit_code == 0
    assert command.help
    for option in (p for p in command.params if p.param_type_name == "option"):
        assert option.help, f"{path}: {option.name}"


def test_reconstruct_writes_and_names_everything(run, astronaut, tmp_path):
    result = run("reconstruct", astronaut, "-o", tmp_path / "o")
    assert result.exit_code == 0, result.output
    for name in ("head.glb", "head.obj", "head.ply", "overlay.png", "params.json"):
        assert (tmp_path / "o" / name).stat().st_size > 1000
        assert name in result.output
    assert len(json.loads((tmp_path / "o" / "params.json").read_text())["parameters"]["shape"]) == 300


def test_one_bad_photo_does_not_stop_the_rest(run, astronaut, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"<html>not a photo</html>")
    twin = tmp_path / "astronaut.png"
    twin.write_bytes(astronaut.read_bytes())
    result = run("reconstruct", bad, astronaut, twin, "-o", tmp_path / "o", "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert [("error" in row) for row in report["photos"]] == [True, False, False]
    assert "bad.jpg" in report["photos"][0]["message"]
    assert (tmp_path / "o" / "astronaut" / "head.glb").is_file()
    assert (tmp_path / "o" / "astronaut-2" / "head.glb").is_file()


def test_two_faces_are_said_and_both_can_be_had(run, astronaut, tmp_path):
    from PIL import Image

    photo = np.asarray(Image.open(astronaut).convert("RGB"))
    Image.fromarray(np.hstack([photo, photo[::2, ::2].repeat(2, 0)[:, :, :]])).save(tmp_path / "two.png")
    result = run("reconstruct", tmp_path / "two.png", "-o", tmp_path / "one")
    assert "the largest of 2 faces; --all-faces takes every one" in result.output
    result = run("reconstruct", tmp_path / "two.png", "-o", tmp_path / "all", "--all-faces", "--json")
    assert len(json.loads(result.stdout)["photos"][0]["faces"]) == 2
    assert (tmp_path / "all" / "face-2" / "head.glb").is_file()


@pytest.mark.parametrize(
    ("make", "says", "code"),
    [
        (lambda p: None, "not found|no such", 1),
        (lambda p: p.write_bytes(b""), "empty", 1),
        (lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 99), "photo|image", 1),
    ],
)
def test_photos_that_cannot_be_read(run, tmp_path, make, says, code):
    import re

    make(tmp_path / "me.png")
    result = run("reconstruct", tmp_path / "me.png", "-o", tmp_path / "o")
    assert result.exit_code == code
    assert re.search(says, result.output, re.IGNORECASE), result.output
    assert not (tmp_path / "o").exists()


def test_no_face_one_pixel_and_twenty_thousand(run, tmp_path):
    from PIL import Image

    Image.new("RGB", (300, 200), (120, 140, 160)).save(tmp_path / "sky.png")
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    photos = [tmp_path / f"{name}.png" for name in ("sky", "dot", "huge")]
    result = run("reconstruct", *photos, "-o", tmp_path / "o", "--json")
    assert result.exit_code == 1
    rows = json.loads(result.stdout)["photos"]
    assert [row["error"] for row in rows] == ["NoFaceError", "PhotoError", "PhotoError"]
    assert "no face" in rows[0]["message"]
    assert "40 megapixels" in rows[2]["message"]


def test_full_disk_is_named(run, astronaut, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    result = run("reconstruct", astronaut, "-o", tmp_path / "o")
    assert result.exit_code == 1
    assert "No space left" in result.output
    assert not list((tmp_path / "o").glob("*"))


def test_no_server_is_exit_code_6(run, astronaut, tmp_path):
    result = run("reconstruct", astronaut, "--server", "127.0.0.1:9", "-o", tmp_path)
    assert result.exit_code == ServerUnavailableError.exit_code == 6
    assert "127.0.0.1:9" in result.output


@pytest.mark.parametrize(
    "options", [("--server", "a:1", "--serve"), ("--server", "a:1", "--weights", "w"), ("--serve", "--weights", "w")]
)
def test_options_that_contradict_each_other(run, options):
    assert run("reconstruct", "x.jpg", *options).exit_code == 2


def test_our_errors_become_json_and_exit_codes(run, tmp_path):
    result = run("evaluate", "synthetic", tmp_path, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"] == "AssetError"
    assert run("data", "synthesize", "-o", tmp_path / "d", "--set", "hat=1").exit_code == 2


def test_interrupting_is_exit_code_130(run, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("chebface.heads.store.list_heads", interrupt)
    result = run("head", "list")
    assert result.exit_code == 130
    assert "interrupted" in result.output


def test_head_commands(run, tmp_path, monkeypatch):
    path = asset.save(make_head(), tmp_path / "small.npz")
    monkeypatch.setenv("CHEBFACE_CACHE", str(tmp_path / "cache"))
    assert "no heads yet" in run("head", "list").output
    result = run("head", "show", path, "-o", tmp_path / "sheet.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
    result = run("head", "import", path, "--name", "x", "--landmarks", path)
    assert result.exit_code == 1
    assert result.output.startswith("error: ")


def test_data_and_training_commands(run, tmp_path):
    head = asset.save(make_head(), tmp_path / "small.npz")
    data = tmp_path / "data"
    made = run("data", "synthesize", "-o", data, "--workers", 1, "--set", f"head={head}", "--set", "count=8")
    assert made.exit_code == 0, made.output
    settings = {"backbone": '"light"', "preset": '"mica"', "steps": 2, "batch": 4, "images_per_actor": 1}
    settings |= {"log_every": 1, "save_every": 1}
    (tmp_path / "c.toml").write_text("".join(f"{key} = {value}\n" for key, value in settings.items()))
    common = ("--data", data, "-o", tmp_path / "run", "--config", tmp_path / "c.toml", "--set", f"head={head}")
    trained = run("train", "reconstructor", *common)
    assert trained.exit_code == 0, trained.output
    weights = tmp_path / "run" / "regressor.safetensors"
    result = run("evaluate", "synthetic", data, "--weights", weights, "--json")
    assert json.loads(result.stdout)["faces"] == 8


@pytest.mark.parametrize("command", [["reconstruct", "x.jpg"], ["data", "synthesize", "-o", "d"]])
def test_a_missing_package_is_named_with_its_extra(command, tmp_path):
    code = "import sys; sys.modules['torch'] = None; from chebface.cli import main; main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, *command], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 4
    assert done.stderr == "error: torch is not installed: pip install 'chebface[torch]'\n"
