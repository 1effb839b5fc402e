"""What lies in a folder of exported files: its record, what was changed since, what an interruption left, whether
there is room.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chebface.errors import AssetError
from chebface.signature import LEAVES, MODELS

MANIFEST = "manifest.json"
_PARTIAL = re.compile(r"(?:^|\.)(\d+)(?:-\d+)?\.partial$")  # process, and thread where chebface.files wrote


def read_record(folder: str | Path) -> dict[str, Any] | None:
    """The manifest of an export, or None where there is none that names every file; the files are not looked at."""
    try:
        record = json.loads((Path(folder) / MANIFEST).read_text())
        for entry in record["files"].values():
            _ = [(each["file"], each["sha256"]) for each in _entries(entry)]
        complete = set(LEAVES) <= set(record["files"]) <= set(MODELS) and "inputs" in record
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return record if complete else None


def find_changed(folder: str | Path, record: dict[str, Any]) -> dict[str, str]:
    """Files that are not as recorded: model name to 'is missing' or 'was changed'."""
    found = {}
    for name, entry in record["files"].items():
        for each in _entries(entry):
            path = Path(folder) / each["file"]
            if not path.is_file():
                found[name] = f"{each['file']} is missing"
            elif digest(path) != each["sha256"]:
                found[name] = f"{each['file']} was changed after its export"
    return found


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """The record of an export, or None where there is none, or its files are not those recorded."""
    record = read_record(folder)
    return record if record and not find_changed(folder, record) else None


def _entries(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """A file and what lies beside it."""
    return [entry, *entry.get("external", ())]


def describe(path: Path) -> dict[str, Any]:
    """Name, size and sha256 of a file."""
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest(path)}


def digest(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        found = hashlib.sha256()
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A folder inside the folder for what is not finished; it is gone at the end, and by the next time if killed."""
    folder.mkdir(parents=True, exist_ok=True)
    clear_leftovers(folder)
    partial = folder / f"{os.getpid()}.partial"
    partial.mkdir(exist_ok=True)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def clear_leftovers(folder: Path) -> None:
    """Remove what processes that are no more have left unfinished."""
    for path in folder.glob("*.partial"):
        match = _PARTIAL.search(path.name)
        if match and not _is_running(int(match.group(1))):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


@contextmanager
def room(path: Path, size: int = 0) -> Iterator[None]:
    """Say what to do where the disk is full, or lets nobody write.

    Args:
        path: what is written, or its folder.
        size: bytes wanted; 0 is not told.

    Raises:
        AssetError: no space left, or no leave to write.
    """
    try:
        yield
    except OSError as error:
        if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT}:
            raise AssetError(f"{path}: cannot be written ({error.strerror}); choose another --output") from error
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        there = next(each for each in (path, *path.parents) if each.exists())
        free = shutil.disk_usage(there).free
        wanted = f" for {size / 1e6:.1f} MB" if size else ""
        raise AssetError(
            f"{path}: no space left{wanted} ({free / 1e6:.1f} MB free); make room or choose another "
            "--output; nothing half-written was left"
        ) from error
