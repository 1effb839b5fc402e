"""The morphable heads behind one asset file."""

from __future__ import annotations

from chebface.heads.asset import Head, load, save

__all__ = ["Head", "load", "open_head", "save"]


def open_head(name: str = "open") -> Head:
    """Get a head by name or path.

    Args:
        name: "open" for the built-in open head (made on first use, then read from the user's cache), the name a
            head was imported under, or the path of a head file.

    Raises:
        AssetError: no such head.
        MissingDependencyError: the open head is wanted, not yet built, and `anny` is not installed.
    """
    from chebface.heads import store

    return store.find(name)
