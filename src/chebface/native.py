"""Compile one C++ file with a plain C interface at first use, and keep the result.

The library is cached under a key of source, compiler, flags and processor, so a changed source or another machine
compiles again. No compiler, or CHEBFACE_NATIVE=0, is no error: callers run their definition instead and say so.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from chebface.cache import cache_dir

FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=fast", "-fno-math-errno")


def keep_freed_memory() -> bool:
    """Tell glibc to keep large freed blocks for the next allocation of their size.

    By default it gives them back to the system and gets them again page by page, over and over in a loop that
    allocates the same megabytes every step.

    Returns:
        whether there was a glibc to tell.
    """
    trim_threshold, mmap_max = -1, -4  # mallopt(3)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return bool(mallopt and mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1))


def find_compiler() -> str | None:
    """The C++ compiler that would be used: $CXX, else the first of c++, g++, clang++ on the PATH."""
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((path for name in wanted if (path := shutil.which(name))), None)


def _processor() -> str:
    # -march=native binds the library to this model of processor, so a shared home folder must not mix them.
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    except OSError:
        return platform.processor()


def build(source: Path) -> Path | None:
    """Compile (or find compiled) a library.

    Args:
        source: a C++ file that exports C functions; it may include files beside it.

    Returns:
        The library, or None when there is no compiler, compiling fails, or CHEBFACE_NATIVE=0. `why_missing` tells.
    """
    return _build(source)[0]


def load(source: Path) -> ctypes.CDLL | None:
    """Build a library and open it in this process.

    Args:
        source: as for `build`.

    Returns:
        The library, or None where it cannot be built or opened. `why_missing` tells.
    """
    return _open(source)[0]


def why_missing(source: Path, *, opened: bool = True) -> str | None:
    """Why `load(source)` gives None (of `build(source)`, where it need not be opened), or None where neither does."""
    return _open(source)[1] if opened else _build(source)[1]


def forget() -> None:
    """Look again for what was built or could not be."""
    _build.cache_clear()
    _open.cache_clear()


@cache
def _open(source: Path) -> tuple[ctypes.CDLL | None, str | None]:
    library, why = _build(source)
    if library is None:
        return None, why
    try:
        return ctypes.CDLL(str(library)), None
    except OSError as error:  # a folder from which nothing may be run
        return None, f"{library}: {error}"


@cache
def _build(source: Path) -> tuple[Path | None, str | None]:
    if os.environ.get("CHEBFACE_NATIVE") == "0":
        return None, "CHEBFACE_NATIVE=0"
    compiler = find_compiler()
    if compiler is None:
        return None, "no C++ compiler found (install g++ or set CXX)"
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    code = [path.read_text() for path in _files(source)]
    parts = (*code, compiler, version, " ".join(FLAGS), platform.machine(), _processor())
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    library = cache_dir() / "native" / f"{source.stem}-{key}.so"
    try:
        if not library.exists():
            library.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=library.parent) as folder:
                built = Path(folder) / library.name
                command = [compiler, *FLAGS, str(source), "-o", str(built)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    return None, f"{compiler} failed on {source.name}: {done.stderr.strip()[-500:]}"
                os.replace(built, library)
        return library, None
    except OSError as error:  # a cache that cannot be written to
        return None, f"{library}: {error}"


def _files(source: Path) -> list[Path]:
    """A source and everything beside it that it includes, however deep."""
    found = [source]
    for path in found:  # grows as it goes
        for name in re.findall(r'^\s*#include "(.+?)"', path.read_text(), re.M):
            near = path.parent / name
            if near.is_file() and near not in found:
                found.append(near)
    return found
