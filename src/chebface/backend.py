"""onnxruntime as a backend of the pip server, which has none: backend.cpp, compiled at first use.

Without a compiler the server runs the same model files by its Python backend (leaf.py), which costs each request
more time; `why_missing` tells, and so does a server.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from chebface import native

NAME = "onnxruntime"  # as config.pbtxt and NVIDIA's container call it
_SOURCE = Path(__file__).with_name("backend.cpp")


def find_files() -> dict[str, Path] | None:
    """What Triton's folder for this backend has to hold, by name; None where it cannot be had.

    Nothing is opened: the library wants a Triton server around it.
    """
    runtime, built = _find_runtime(), native.build(_SOURCE)
    return {f"libtriton_{NAME}.so": built, "libonnxruntime.so": runtime} if runtime and built else None


def why_missing() -> str | None:
    """Why `find_files` gives None, or None where it gives files."""
    if _find_runtime() is None:
        return "the installed onnxruntime carries no libonnxruntime.so: pip install -U onnxruntime"
    return native.why_missing(_SOURCE, opened=False)


def _find_runtime() -> Path | None:
    """The library of the installed onnxruntime."""
    spec = importlib.util.find_spec("onnxruntime")
    for place in spec.submodule_search_locations or () if spec else ():
        if found := sorted(Path(place, "capi").glob("libonnxruntime.so.*")):
            return found[-1]
    return None
