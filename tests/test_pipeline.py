from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from chebface import crop, detect, params, pipeline, signature
from chebface.errors import AssetError, InputError, NoFaceError, PhotoError

PHOTO = np.random.default_rng(0).integers(0, 256, (300, 420, 3), dtype=np.uint8)
FACES = np.array([(0, 1, 2), (2, 3, 4)], np.int32)
POINTS = crop.ARCFACE_POINTS_PX


class FixedDetector(detect.Detector):
    """Finds the faces it is told, whatever the photo."""

    name, threshold = "fixed", 0.5

    def __init__(self, *points_px):
        self.found = [detect.Detection(np.array([*p.min(0), *p.max(0)]), 0.9, p) for p in points_px]
        self.seen = []

    def detect(self, image_u8):
        self.seen.append(image_u8.shape)
        return list(self.found)

    def _find(self, picture_u8):
        raise NotImplementedError


class FakePipeline(pipeline.Pipeline):
    """Every crop becomes the same head, with the crop's mean grey as its first parameter."""

    def __init__(self, detector, **wrong):
        super().__init__(detector=detector)
        self.wrong, self.batches = wrong, []

    @property
    def topology(self):
        return pipeline.Topology(FACES, {"name": "fake", "version": "1", "licence": "CC0", "sha256": "00"})

    def _infer(self, crops_u8):
        self.batches.append(crops_u8.shape)
        assert crops_u8.dtype == np.uint8
        b = len(crops_u8)
        parameters = np.zeros((b, params.TOTAL), np.float32)
        parameters[:, 0] = crops_u8.mean((1, 2, 3))
        parameters[:, params.SLICES["camera"]] = (7.0, 0.01, -0.02)
        rng = np.random.default_rng(1)
        vertices = rng.normal(0, 0.05, (b, signature.VERTICES, 3)).astype(np.float32)
        outputs = {"parameters": parameters, "vertices": vertices, "landmarks": vertices[:, :68].copy()}
        for name, change in self.wrong.items():
            outputs[name] = change(outputs[name])
        return tuple(outputs.values())


LARGE, SMALL = POINTS * 2 + 20, np.add(POINTS, (250, 100))


def test_the_largest_face_with_everything_filled_in():
    fake = FakePipeline(FixedDetector(LARGE, SMALL))
    face = fake.reconstruct(PHOTO)
    assert fake.batches == [(1, 112, 112, 3)] and fake.detector.seen == [(300, 420, 3)]
    np.testing.assert_allclose(face.crop.photo_to_aligned(LARGE), POINTS, atol=1e-9)
    assert face.parameters[0] == pytest.approx(crop.align(PHOTO, LARGE).aligned_u8.mean(), rel=1e-6)
    np.testing.assert_array_equal(face.faces, FACES)
    assert face.head == fake.topology.head and face.photo_size == (300, 420)
    assert face.vertices.shape == (signature.VERTICES, 3) and face.landmarks.shape == (68, 3)


def test_landmarks_go_from_metres_to_the_photo():
    face = FakePipeline(FixedDetector(LARGE)).reconstruct(PHOTO)
    x, y = 7 * (face.landmarks[:, 0] + 0.01), 7 * (face.landmarks[:, 1] - 0.02)
    wide = np.stack([(x + 1) * 112 - 0.5, (1 - y) * 112 - 0.5], 1)
    # One aligned pixel is 4/3 wide ones; the points of LARGE lie at twice the aligned ones plus 20.
    want = ((wide - 111.5) * 0.75 + (55.5, 60.0)) * 2 + 20
    np.testing.assert_allclose(face.landmarks_px, want, atol=1e-4)
    np.testing.assert_allclose(face.vertices_px()[:68, :2], face.landmarks_px, atol=1e-4)


def test_every_face_in_order_in_one_batch():
    fake = FakePipeline(FixedDetector(LARGE, SMALL))
    large, small = fake.reconstruct_all(PHOTO)
    assert fake.batches == [(2, 112, 112, 3)]
    np.testing.assert_array_equal(large.parameters, FakePipeline(FixedDetector(LARGE)).reconstruct(PHOTO).parameters)
    np.testing.assert_allclose(small.crop.photo_to_aligned(SMALL), POINTS, atol=1e-9)
    assert large.parameters[0] != small.parameters[0]


def test_a_crowd_goes_in_several_batches():
    crowd = [np.add(POINTS / 2, (8 * k, 5 * (k % 40))) for k in range(45)]
    fake = FakePipeline(FixedDetector(*crowd))
    fake.max_batch = 32
    faces = fake.reconstruct_all(PHOTO)
    assert [shape[0] for shape in fake.batches] == [32, 13] and len(faces) == 45
    for face, points in zip(faces, crowd, strict=True):
        assert face.parameters[0] == pytest.approx(crop.align(PHOTO, points).aligned_u8.mean(), rel=1e-6)


def test_every_step_is_timed():
    timings = FakePipeline(FixedDetector(LARGE)).reconstruct(PHOTO).timings_ms
    assert list(timings) == ["read", "detect", "align", "infer", "total"]
    parts = sum(value for name, value in timings.items() if name != "total")
    assert all(value >= 0 for value in timings.values()) and parts <= timings["total"] + 1e-6


def test_paths_and_bytes_give_what_the_array_gives(astronaut):
    from chebface.photo import read

    fake = FakePipeline(FixedDetector(LARGE))
    faces = [fake.reconstruct(photo) for photo in (astronaut, str(astronaut), astronaut.read_bytes(), read(astronaut))]
    for face in faces[1:]:
        np.testing.assert_array_equal(face.parameters, faces[0].parameters)


def test_the_real_detector_on_the_real_photo(astronaut, tmp_path):
    fake = FakePipeline("centerface")
    face = fake.reconstruct(astronaut)
    assert fake.detector.name == "centerface" and fake.detector is fake.detector
    x0, y0, x1, y1 = face.detection.box_px
    assert 150 < x0 < 200 and 40 < y0 < 90 and 250 < x1 < 300 and 150 < y1 < 200
    assert np.abs(face.crop.photo_to_aligned(face.detection.points_px) - POINTS).mean() < 4


def test_two_people_in_one_photo(astronaut):
    from chebface.photo import read

    one = read(astronaut)
    faces = FakePipeline("centerface").reconstruct_all(np.concatenate([one, one[:, ::-1]], 1))
    assert sorted(int(face.detection.box_px[0] // 512) for face in faces) == [0, 1]


def test_no_face_is_named_with_the_photo_and_the_fix(tmp_path):
    from PIL import Image

    path = tmp_path / "noise.png"
    Image.fromarray(PHOTO).save(path)
    fake = FakePipeline(FixedDetector())
    for method in (fake.reconstruct, fake.reconstruct_all):
        with pytest.raises(NoFaceError, match=r"noise\.png: no face found by fixed; use a photo"):
            method(path)
    with pytest.raises(NoFaceError, match=r"photo \(array\): no face found by centerface"):
        FakePipeline("centerface").reconstruct(PHOTO)
    assert fake.batches == []


@pytest.mark.parametrize("photo", [b"", b"<html>", np.zeros((1, 1, 3), np.uint8), "nowhere.jpg", np.zeros((99, 99))])
def test_a_bad_photo_never_reaches_the_detector(photo):
    fake = FakePipeline(FixedDetector(LARGE))
    with pytest.raises(PhotoError, match="photo"):
        fake.reconstruct(photo)
    assert fake.detector.seen == []


def test_one_bad_photo_does_not_spoil_the_next():
    fake = FakePipeline(FixedDetector(LARGE))
    with pytest.raises(PhotoError):
        fake.reconstruct(b"broken")
    assert fake.reconstruct(PHOTO).photo_size == (300, 420)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"parameters": lambda a: a[:, :485]}, r"output parameters: expected \(1, 486\) float32, got \(1, 485\)"),
        ({"vertices": lambda a: a[:, :5022]}, r"output vertices: expected \(1, 5023, 3\)"),
        ({"landmarks": lambda a: a[..., :2]}, r"output landmarks: expected \(1, 68, 3\)"),
        ({"landmarks": lambda a: np.concatenate([a, a])}, r"output landmarks: expected \(1, 68, 3\)"),
        ({"vertices": lambda a: a.astype(np.float64)}, r"output vertices: .* float64"),
        ({"parameters": lambda a: a * np.nan}, "output parameters: has values that are not finite"),
        ({"vertices": lambda a: a + np.inf}, "output vertices: has values that are not finite"),
    ],
)
def test_what_a_model_gives_is_checked_against_the_signature(wrong, words):
    with pytest.raises(AssetError, match=words):
        FakePipeline(FixedDetector(LARGE), **wrong).reconstruct(PHOTO)


def test_a_missing_output_is_named():
    class Short(FakePipeline):
        def _infer(self, crops_u8):
            return super()._infer(crops_u8)[:2]

    with pytest.raises(AssetError, match="expected 3 outputs, got 2"):
        Short(FixedDetector(LARGE)).reconstruct(PHOTO)


def test_a_wrong_detector_name_is_refused_at_once():
    with pytest.raises(InputError, match="expected one of auto, scrfd, centerface, got 'haar'"):
        FakePipeline("haar")


def test_many_threads_share_one_detector(astronaut):
    fake = FakePipeline("centerface")
    with ThreadPoolExecutor(4) as pool:
        boxes = [face.detection.box_px for face in pool.map(fake.reconstruct, [astronaut] * 4)]
    for box in boxes[1:]:
        np.testing.assert_array_equal(box, boxes[0])


def test_no_torch_and_no_heavy_import():
    code = (
        "import sys, chebface.pipeline;"
        "print(sorted({'torch', 'PIL.Image', 'onnxruntime', 'scipy', 'cv2', 'skimage'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_one_face_still_tells_how_many_there_were():
    fake = FakePipeline(FixedDetector(POINTS, POINTS + 30))
    assert fake.reconstruct(PHOTO).found == 2
    assert [face.found for face in fake.reconstruct_all(PHOTO)] == [2, 2]
