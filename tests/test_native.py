"""Compiling at first use: cached by content, atomic, and honest about why it cannot."""

from __future__ import annotations

import subprocess
import sys

import pytest

from chebface import native
from chebface.cache import cache_dir

SOURCE = 'extern "C" int answer() { return %d; }\n'
needs_compiler = pytest.mark.skipif(native.find_compiler() is None, reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("CHEBFACE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CHEBFACE_NATIVE", raising=False)
    native.forget()
    yield
    native.forget()


def write(tmp_path, number):
    path = tmp_path / f"answer{number}.cpp"
    path.write_text(SOURCE % number)
    return path


@needs_compiler
def test_compiles_once_per_content(tmp_path, monkeypatch):
    source = write(tmp_path, 42)
    assert native.load(source).answer() == 42
    built = list((tmp_path / "cache" / "native").iterdir())
    assert len(built) == 1
    native.forget()
    real, calls = subprocess.run, []
    monkeypatch.setattr(subprocess, "run", lambda command, **k: calls.append(command) or real(command, **k))
    assert native.load(source).answer() == 42
    assert all("--version" in command for command in calls)
    source.write_text(SOURCE % 43)
    native.forget()
    assert native.load(source).answer() == 43


@needs_compiler
def test_a_change_in_what_is_included_compiles_again(tmp_path):
    source, kernel, header = (tmp_path / name for name in ("sum.cpp", "kernel.cpp", "number.h"))
    source.write_text('#include <cstdint>\n#include "kernel.cpp"\n')
    kernel.write_text('#include "number.h"\nextern "C" int answer() { return NUMBER; }\n')
    for number in (1, 2):
        header.write_text(f"#define NUMBER {number}\n")
        native.forget()
        assert native.load(source).answer() == number


@needs_compiler
def test_a_source_that_does_not_compile_says_so_and_leaves_nothing(tmp_path):
    source = tmp_path / "broken.cpp"
    source.write_text("int x = ;")
    assert native.load(source) is None
    assert "broken.cpp" in native.why_missing(source)
    assert not list((tmp_path / "cache" / "native").iterdir())


@needs_compiler
def test_a_cache_that_cannot_be_written_is_a_reason(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("CHEBFACE_CACHE", str(tmp_path / "file" / "cache"))
    source = write(tmp_path, 2)
    assert native.load(source) is None
    assert "Not a directory" in native.why_missing(source)


def test_no_compiler_and_switched_off_are_reasons(tmp_path, monkeypatch):
    source = write(tmp_path, 1)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert native.load(source) is None
    assert "no C++ compiler" in native.why_missing(source)
    native.forget()
    monkeypatch.setenv("CHEBFACE_NATIVE", "0")
    assert native.why_missing(source) == "CHEBFACE_NATIVE=0"


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"CHEBFACE_CACHE": "/a/b"}, "/a/b"),
        ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/chebface"),
        ("linux", {"HOME": "/h"}, "/h/.cache/chebface"),
        ("darwin", {"HOME": "/h"}, "/h/Library/Caches/chebface"),
        ("win32", {"LOCALAPPDATA": "/l"}, "/l/chebface/Cache"),
    ],
)
def test_cache_folder_follows_the_platform(monkeypatch, platform, variables, expected):
    for name in ("CHEBFACE_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.platform", platform)
    assert cache_dir().as_posix() == expected


def test_freed_memory_can_be_kept():
    """In a process of its own: the setting stays for good."""
    code = "import sys; from chebface.native import keep_freed_memory; print(keep_freed_memory(), sys.platform)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == str(sys.platform == "linux")
