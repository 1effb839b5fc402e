"""Which run gets which core, and what it takes along: the driver says what must hold."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

import chebface
from chebface import native

pytestmark = pytest.mark.skipif(native.find_compiler() is None, reason="this machine has no C++ compiler")


@pytest.mark.parametrize("sanitizer", [None, "address,undefined", "thread"])
def test_many_callers_share_the_cores(tmp_path: Path, sanitizer: str | None) -> None:
    if sanitizer and not os.environ.get("CHEBFACE_SANITIZE"):
        pytest.skip("not every compiler has sanitizers; set CHEBFACE_SANITIZE=1")
    driver, program = Path(__file__).with_name("desk_for_tests.cpp"), tmp_path / "driver"
    flags = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread"]
    flags += [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"] if sanitizer else []
    include = f"-I{Path(chebface.__file__).parent}"
    subprocess.run([native.find_compiler(), *flags, include, str(driver), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False, timeout=100)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
