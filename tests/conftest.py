"""Devices, assets and tolerances, decided once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real heads, scans and photographs that stands beside some checkouts."""
    folder = Path(os.environ.get("CHEBFACE_TEST_ASSETS", ROOT.parent / "shared" / "assets"))
    if not folder.is_dir():
        pytest.skip(f"no test assets at {folder} (set CHEBFACE_TEST_ASSETS)")
    return folder


@pytest.fixture(scope="session")
def head():
    """The built-in open head (built once, then read from the user's cache)."""
    from chebface.heads import open_head

    return open_head()


@pytest.fixture(scope="session")
def astronaut() -> Path:
    """The demo photograph: scikit-image's astronaut, public domain (NASA)."""
    import skimage

    return Path(skimage.__file__).parent / "data" / "astronaut.png"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository of stand-ins, quick to start; a module may spoil its own."""
    from models_for_tests import write_repository

    return write_repository(tmp_path_factory.mktemp("models"))
