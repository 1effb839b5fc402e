"""The tritonserver inside the nvidia-pytriton wheel: where its parts are, and what runs it with this interpreter."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shlex
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from chebface.errors import MissingDependencyError

HOST = "127.0.0.1"
NGC_IMAGE = "nvcr.io/nvidia/tritonserver:26.07-py3"  # or later


def ngc_command(repository: str | Path = "triton_models") -> str:
    """The shell command that serves the same repository with NVIDIA's container, with its native backends."""
    folder = shlex.quote(str(Path(repository).resolve()))
    return (
        f"docker run --rm --shm-size=1g -p {HOST}:8000-8002:8000-8002 -v {folder}:/models:ro {NGC_IMAGE} "
        "tritonserver --model-repository=/models --disable-auto-complete-config --model-control-mode=none "
        "--exit-on-error=true --strict-readiness=true"
    )


@dataclass(frozen=True)
class Wheel:
    """The parts of the nvidia-pytriton wheel that a server needs."""

    server: Path
    backend: Path
    stub: Path
    caches: Path
    libraries: Path
    libpython: Path | None


def find_wheel(repository: str | Path = "triton_models") -> Wheel:
    """Find the tritonserver of the nvidia-pytriton wheel and what runs its Python backend with this interpreter.

    Raises:
        MissingDependencyError: the wheel, a stub for this Python, its shared library, or a numpy below 2 is missing.
    """
    container = f"or serve with the NGC container (Triton 26.07 or later):\n  {ngc_command(repository)}"
    spec = importlib.util.find_spec("pytriton")
    places = list(spec.submodule_search_locations or ()) if spec else []
    root = Path(places[0]) / "tritonserver" if places else None
    if root is None or not (root / "bin" / "tritonserver").is_file():
        raise MissingDependencyError(
            "no tritonserver: the nvidia-pytriton wheel (Linux, x86-64) is not installed; "
            f"pip install 'chebface[server]', {container}"
        )
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = root / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        have = ", ".join(sorted(p.name for p in (root / "python_backend_stubs").glob("*")))
        raise MissingDependencyError(
            f"nvidia-pytriton has no Python backend stub for Python {version} (it has {have}); "
            f"use one of those in the virtual environment, {container}"
        )
    numpy_version = importlib.metadata.version("numpy")
    if int(numpy_version.split(".")[0]) >= 2:
        raise MissingDependencyError(
            f"the Python backend of nvidia-pytriton needs numpy below 2, got {numpy_version}; "
            f"pip install 'chebface[server]' in an environment of its own, {container}"
        )
    return Wheel(
        server=root / "bin" / "tritonserver",
        backend=root / "backends" / "python",
        stub=stub,
        caches=root / "caches",
        libraries=root.parent.parent / "nvidia_pytriton.libs",
        libpython=_find_libpython(),
    )


def _find_libpython() -> Path | None:
    """The shared library of this interpreter, or None where the loader must find it by itself."""
    name = str(sysconfig.get_config_var("INSTSONAME") or "")
    folders = [str(sysconfig.get_config_var("LIBDIR") or ""), os.path.join(sys.base_prefix, "lib")]
    if ".so" in name:
        for folder in folders:
            path = Path(folder) / name
            if folder and path.is_file():
                return path
    return None


def make_environment(wheel: Wheel, libraries: Path) -> dict[str, str]:
    """The environment variables that the server and its Python stubs need; `libraries` holds libpython.

    Raises:
        MissingDependencyError: this interpreter's folder has no python3.
    """
    # The stub ignores PYTHONPATH and PYTHONHOME; it finds its packages from the first python3 on PATH, so that this
    # must be our interpreter's (or virtual environment's) folder.
    programs = Path(sys.executable).parent
    if not (programs / "python3").exists():
        raise MissingDependencyError(
            f"{programs}: no python3 there; the server's Python backend finds its packages through that name"
        )
    return {
        **os.environ,
        "PATH": f"{programs}:{os.environ.get('PATH', os.defpath)}",
        "LD_LIBRARY_PATH": f"{wheel.libraries}:{libraries}",
        # glibc would give nearly each of a hundred threads a heap of its own: memory that grows for minutes, and is
        # cold for whichever thread takes the next request.
        "MALLOC_ARENA_MAX": os.environ.get("MALLOC_ARENA_MAX", str(max(1, (os.cpu_count() or 1) // 2))),
    }
