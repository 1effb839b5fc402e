"""One suite for both ways to a Face: in this process, and over a real server. Exported from the shipped weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from chebface import checkpoint
from chebface.client import Client
from chebface.errors import AssetError, NoFaceError, PhotoError
from chebface.face import Face
from chebface.reconstruct import Reconstructor
from chebface.server import Server
from export.repository import fill_repository
from export.to_onnx import export_onnx


@pytest.fixture(scope="module")
def in_process():
    return Reconstructor()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("served")
    export_onnx(folder / "export")
    fill_repository(folder / "export", folder / "models")
    with Server(folder / "models", stop_timeout_s=1) as server, Client(server.url) as client:
        yield client


@pytest.fixture(params=["in_process", "served"])
def pipeline(request: pytest.FixtureRequest):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def two_people(astronaut: Path) -> np.ndarray:
    from PIL import Image

    photo = Image.open(astronaut).convert("RGB")
    small = photo.resize((384, 384))
    both = Image.new("RGB", (896, 512))
    both.paste(photo, (384, 0))
    both.paste(small, (0, 64))
    return np.asarray(both)


def test_a_photo_becomes_a_face(pipeline, astronaut):
    face = pipeline.reconstruct(astronaut)
    assert isinstance(face, Face)
    assert face.vertices.shape == (5023, 3)
    assert face.faces.shape == (9976, 3)
    width_mm = np.ptp(face.vertices[:, 0]) * 1000
    assert 130 < width_mm < 240  # a human head, ears included
    assert face.head["name"] == "chebface-open"
    assert {"read", "detect", "align", "infer", "total"} <= face.timings_ms.keys()


def test_landmarks_lie_where_the_detector_saw_the_face(pipeline, astronaut):
    face = pipeline.reconstruct(astronaut)
    points, landmarks = face.detection.points_px, face.landmarks_px
    between_eyes = np.linalg.norm(points[1] - points[0])
    ours = np.stack([landmarks[36:42].mean(0), landmarks[42:48].mean(0), landmarks[30], landmarks[48], landmarks[54]])
    assert np.linalg.norm(ours - points, axis=1).mean() < 0.2 * between_eyes


def test_every_face_largest_first(pipeline, two_people):
    faces = pipeline.reconstruct_all(two_people)
    assert [face.found for face in faces] == [2, 2]
    assert faces[0].detection.area_px > faces[1].detection.area_px
    only = pipeline.reconstruct(two_people)
    np.testing.assert_allclose(only.vertices, faces[0].vertices, atol=1e-5)
    assert faces[0].landmarks_px[30, 0] > 384 > faces[1].landmarks_px[30, 0]


def test_photos_without_a_face_or_that_cannot_be_read(pipeline, tmp_path):
    with pytest.raises(NoFaceError, match="no face"):
        pipeline.reconstruct(np.full((200, 300, 3), 128, np.uint8))
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0" + b"\0" * 64)
    with pytest.raises(PhotoError, match=r"broken\.jpg"):
        pipeline.reconstruct(tmp_path / "broken.jpg")


def test_both_ways_give_the_same_face(in_process, served, astronaut, two_people):
    for photo in (astronaut, two_people):
        for here, there in zip(in_process.reconstruct_all(photo), served.reconstruct_all(photo), strict=True):
            assert np.abs(here.vertices - there.vertices).max() < 1e-5
            assert np.abs(here.landmarks_px - there.landmarks_px).max() < 0.05
            np.testing.assert_array_equal(here.faces, there.faces)
            assert here.head == there.head


def test_weights_for_another_head_are_refused():
    from heads_for_tests import make_head

    with pytest.raises(AssetError, match="trained on head chebface-open"):
        Reconstructor(head=make_head())


def test_shipped_weights_are_small_and_beat_the_mean_head():
    _, card = checkpoint.load_regressor()
    assert checkpoint.DEMO.stat().st_size < 8_000_000
    held_out = card["held_out"]
    assert held_out["ratio_face_nonmetrical"] < 0.6
    assert held_out["ratio_head"] < 0.72
    assert held_out["data"]["seed"] != card["data"]["seed"]
