"""Files are written whole or not at all: under a temporary name, then renamed."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path to write to, in the same folder; it becomes `path` when the block ends without error.

    Raises:
        OSError: the disk refuses; what was at `path` stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write bytes to a file: readers see the old file or the new one, never half.

    Raises:
        OSError: the disk refuses; what was at `path` stays.
    """
    with whole(path) as partial:
        partial.write_bytes(content)
    return Path(path)
