"""Each fault once, with a real server of small models: nothing is lost, and the server is right again afterwards."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from models_for_tests import write_repository

from bench.cli import main
from bench.faults import FAULTS, measure
from chebface.errors import AssetError
from chebface.repository import model_code
from chebface.signature import LEAVES, RECONSTRUCT_PHOTO


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_repository(tmp_path_factory.mktemp("models"))
    shutil.rmtree(folder / "encode")  # without a model file it would be refused
    for name in LEAVES:
        digest = hashlib.sha256((folder / name / "1" / "model.onnx").read_bytes()).hexdigest()
        (folder / name / "1" / "SHA256SUMS").write_text(f"{digest}  model.onnx\n")
    (folder / RECONSTRUCT_PHOTO.name / "1" / "model.py").write_text(model_code(RECONSTRUCT_PHOTO))
    return folder


@pytest.mark.parametrize("name", FAULTS)
def test_nothing_is_lost(name: str, repository: Path) -> None:
    (row,) = measure(repository, (name,))
    assert (row["lost"], row["lost_reasons"], row["failed"]) == (0, [], [])
    assert row["requests"] == row["answered"] + sum(row["errors"].values()) > 0
    assert row["answered"] > 0 or name == "damaged model files"  # which answers by refusing
    assert set(row["errors"]) <= {"AssetError", "ServerUnavailableError", "ServerBusyError", "ServerError"}
    assert row["checked"]


def test_what_is_lost_is_said(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import faults

    monkeypatch.setattr(faults, "verify", lambda folder: None)  # notices nothing
    command = ["faults", "--fault", "damaged model files", "--repository", str(repository)]
    result = CliRunner().invoke(main, [*command, "-o", str(tmp_path / "rows.jsonl")])
    assert result.exit_code == 1
    assert "NOT: regress: a bit in the middle was not noticed" in result.output
    assert '"lost": 18' in (tmp_path / "rows.jsonl").read_text()


def test_unknown_faults_and_empty_repositories_are_named(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"fault: expected some of server killed, .* got earthquake"):
        measure(repository, ("earthquake",))
    shutil.copytree(repository, tmp_path / "models")
    (tmp_path / "models" / "decode" / "1" / "model.onnx").unlink()
    with pytest.raises(AssetError, match=r"decode.1.model\.onnx is missing"):
        measure(tmp_path / "models")
