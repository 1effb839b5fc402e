"""Where things made on this machine are kept."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_dir() -> Path:
    """The folder for built heads and compiled kernels: $CHEBFACE_CACHE, else the user's cache folder."""
    if chosen := os.environ.get("CHEBFACE_CACHE"):
        return Path(chosen)
    home = Path.home()
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "chebface"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local")) / "chebface" / "Cache"
    return Path(os.environ.get("XDG_CACHE_HOME", home / ".cache")) / "chebface"
