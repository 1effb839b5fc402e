"""The kernels as onnxruntime custom operators, for serving on CPUs: kernels/ort.cpp, compiled at first use.

    chebface::Encode   vertices (B, N, 3) m -> descriptor (B, codes)                      cpu.cpp
    chebface::Decode   parameters (B, 486) -> vertices (B, N, 3), landmarks (B, 68, 3) m  decode.cpp

`export/custom.py` writes ONNX files around them, constants included. In Python:

    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library()))

In Triton's onnxruntime backend, in config.pbtxt, with the path as the server sees it:

    model_operations { op_library_filename: "/models/chebface_ops.so" }

The library needs onnxruntime 1.16 or later and nothing else; it is made for the processor that compiled it, so compile
it where it will run. It uses the node's attribute `threads`; where that is 0, $CHEBFACE_THREADS; else the caller's
thread alone, which suits Triton: instances run beside each other. Further threads sleep between calls. A session may
be run from several threads at once.
"""

from __future__ import annotations

from pathlib import Path

from chebface import native
from chebface.errors import MissingDependencyError

DOMAIN, VERSION = "chebface", 1
TILE = 32  # vertices of a tile of Decode's basis: kTile in decode.cpp
_SOURCE = Path(__file__).with_name("kernels") / "ort.cpp"


def library() -> Path:
    """The compiled library; compiles it the first time.

    Raises:
        MissingDependencyError: it cannot be had; the message says why.
    """
    built = native.build(_SOURCE)
    if built is None:
        raise MissingDependencyError(
            f"onnxruntime operators: {native.why_missing(_SOURCE, opened=False)}; the graphs of standard operators "
            "need none (python -m export onnx)"
        )
    return built
