"""Which run gets which core, and what it takes along: the driver says what must hold."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import chebface
from chebface import native

pytestmark = pytest.mark.skipif(native.find_compiler() is None, reason="this machine has no C++ compiler")


def build(source: Path, program: Path, sanitizer: str | None) -> subprocess.CompletedProcess[str]:
    """Compile and run."""
    flags = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread"]
    flags += [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"] if sanitizer else []
    command = [native.find_compiler(), *flags, f"-I{Path(chebface.__file__).parent}", str(source), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return done
    return subprocess.run([program], capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.parametrize("sanitizer", [None, "address,undefined", "thread"])
def test_many_callers_share_the_cores(tmp_path: Path, sanitizer: str | None) -> None:
    empty = tmp_path / "empty.cpp"
    empty.write_text("int main() { return 0; }\n")
    if sanitizer and build(empty, tmp_path / "empty", sanitizer).returncode:
        pytest.skip(f"on this machine not even an empty program runs with -fsanitize={sanitizer}")
    done = build(Path(__file__).with_name("desk_for_tests.cpp"), tmp_path / "driver", sanitizer)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
