"""Client against the real server: right answers, split batches, and one error type for each way to fail."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from models_for_tests import FACTS, python_backend
from test_server import processes_of, stub_of

from chebface import signature
from chebface.client import Client
from chebface.client.testing import FakeDetector
from chebface.client.wire import Deadline
from chebface.errors import (
    InputError,
    MissingDependencyError,
    ServerBusyError,
    ServerError,
    ServerUnavailableError,
)
from chebface.server import Server
from chebface.signature import DECODE, MODELS, RECONSTRUCT, RECONSTRUCT_PHOTO, REGRESS, SERVED, Model, Tensor


@pytest.fixture(scope="module")
def server(repository: Path):
    with Server(repository, stop_timeout_s=0.3) as server:
        yield server


@pytest.fixture
def client(server: Server):
    with Client(server.url) as client:
        yield client


def draw_crops(batch: int, seed: int = 0) -> np.ndarray:
    side = signature.CROP_PX
    return np.random.default_rng(seed).integers(0, 256, (batch, side, side, 3), dtype=np.uint8)


def run_here(repository: Path, crops: np.ndarray) -> tuple[np.ndarray, ...]:
    """The same model files in this process."""
    (parameters,) = onnxruntime.InferenceSession(repository / "regress/1/model.onnx").run(None, {"crop": crops})
    decoder = onnxruntime.InferenceSession(repository / "decode/1/model.onnx")
    return parameters, *decoder.run(["vertices", "landmarks"], {"parameters": parameters})


@pytest.mark.parametrize("batch", [1, 2, 5, signature.MAX_BATCH])
def test_served_is_what_the_files_give_here(client: Client, repository: Path, batch: int) -> None:
    crops = draw_crops(2 * batch)[::2]  # a slice: not contiguous
    for found, wanted, tensor in zip(
        client._infer(crops), run_here(repository, crops), RECONSTRUCT.outputs, strict=True
    ):
        assert found.shape == (batch, *tensor.shape)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_every_model_answers_alone(client: Client, repository: Path) -> None:
    crops = draw_crops(3)
    parameters, vertices, _ = run_here(repository, crops)
    served = client._connection.infer(REGRESS, {"crop": crops}, Deadline(9))
    np.testing.assert_allclose(served["parameters"], parameters, atol=1e-6)
    np.testing.assert_allclose(client._connection.infer(DECODE, served, Deadline(9))["vertices"], vertices, atol=1e-6)


def test_topology_is_the_files(client: Client, repository: Path) -> None:
    session = onnxruntime.InferenceSession(repository / "topology/1/model.onnx")
    faces = session.run(["faces"], {"request": np.zeros(1, np.int32)})[0]
    assert client.topology is client.topology
    assert np.array_equal(client.topology.faces, faces)
    assert client.topology.faces.dtype == np.int32
    assert client.topology.head == FACTS


def test_a_photo_with_more_faces_than_a_request_holds(server: Server, repository: Path) -> None:
    count = 5
    photo = np.concatenate(list(draw_crops(count)), axis=1)
    with Client(server.url, detector=FakeDetector(count), max_batch=2) as client:
        faces = client.reconstruct_all(photo)
    parameters, vertices, landmarks = run_here(repository, np.stack([face.crop.aligned_u8 for face in faces]))
    assert len(faces) == count
    for k, face in enumerate(faces):
        np.testing.assert_allclose(face.parameters, parameters[k], atol=1e-6)
        np.testing.assert_allclose(face.vertices, vertices[k], atol=1e-6)
        np.testing.assert_allclose(face.landmarks, landmarks[k], atol=1e-6)
        assert face.head == FACTS


def test_threads_share_a_client(client: Client, repository: Path) -> None:
    crops = [draw_crops(1 + seed % 3, seed) for seed in range(24)]
    found: dict[int, np.ndarray] = {}

    def ask(first: int) -> None:
        for k in range(first, len(crops), 4):
            found[k] = client._infer(crops[k])[1]

    threads = [threading.Thread(target=ask, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(len(crops)))
    for k, vertices in found.items():
        np.testing.assert_allclose(vertices, run_here(repository, crops[k])[1], atol=1e-6)


@pytest.mark.parametrize(
    ("crops", "got"),
    [
        (draw_crops(1).astype(np.float32), "(1, 112, 112, 3) float32"),
        (draw_crops(1).astype(np.int64) + 256, "int64"),
        (draw_crops(1)[0], "(112, 112, 3)"),
        (draw_crops(1)[:, :64], "(1, 64, 112, 3)"),
        (draw_crops(0), "(0, 112, 112, 3)"),
    ],
)
def test_wrong_crops_are_refused_before_they_are_sent(client: Client, crops: np.ndarray, got: str) -> None:
    with pytest.raises(InputError, match=r"crop: expected \(B, 112, 112, 3\) UINT8, got .*" + re.escape(got)):
        client._infer(crops)


def test_passed_deadline_of_a_hung_server_is_unavailable(repository: Path) -> None:
    with Server(repository, stop_timeout_s=0.3) as server, Client(server.url, deadline_s=0.3) as client:
        client._infer(draw_crops(1))
        os.kill(server.pid, signal.SIGSTOP)
        try:
            with pytest.raises(ServerUnavailableError, match="is it running"):
                client._infer(draw_crops(1))
        finally:
            os.kill(server.pid, signal.SIGCONT)


def test_full_queue_is_busy(repository: Path, tmp_path: Path) -> None:
    copy = tmp_path / "models"
    shutil.copytree(repository, copy)
    config = copy / "reconstruct" / "config.pbtxt"
    config.write_text(re.sub(r"max_queue_size: \d+", "max_queue_size: 1", config.read_text()))
    with python_backend(), Server(copy, stop_timeout_s=0.3) as server, Client(server.url) as client:
        stub = stub_of(server, "reconstruct")
        os.kill(stub, signal.SIGSTOP)
        ends: list[object] = []

        def ask() -> None:
            try:
                ends.append(client._infer(draw_crops(1))[0].shape)
            except ServerError as error:
                ends.append(error)

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        while not any(isinstance(end, ServerError) for end in ends) and any(t.is_alive() for t in threads):
            threads[0].join(0.05)
        os.kill(stub, signal.SIGCONT)
        for thread in threads:
            thread.join()
        refused = [end for end in ends if isinstance(end, ServerError)]
        assert refused
        assert all(type(error) is ServerBusyError and "send less at a time" in str(error) for error in refused)
        assert (1, signature.PARAMETERS.shape[0]) in ends


def test_killed_server_is_unavailable_and_its_successor_is_found(repository: Path) -> None:
    with Server(repository, stop_timeout_s=0.3) as server:
        ports = {f"{name}_port": port for name, port in server.ports.items()}
        with Client(server.url) as client:
            client._infer(draw_crops(1))
            os.kill(server.pid, signal.SIGKILL)
            with pytest.raises(ServerUnavailableError):
                client._infer(draw_crops(1))
            assert not client.is_ready()
            group = server.pid
            server.stop()
            assert processes_of(group) == []
            with Server(repository, stop_timeout_s=0.3, **ports):
                while not client.is_ready():
                    time.sleep(0.05)
                assert client._infer(draw_crops(2))[1].shape == (2, *signature.VERTICES_M.shape)


def test_dead_model_process_is_unavailable(repository: Path) -> None:
    with python_backend(), Server(repository, stop_timeout_s=0.3) as server, Client(server.url) as client:
        os.kill(stub_of(server, "reconstruct"), signal.SIGKILL)
        with pytest.raises(ServerUnavailableError, match="a part of the server died: restart it"):
            client._infer(draw_crops(1))


def test_answer_of_another_version_is_refused(client: Client) -> None:
    smaller = Model("regress", REGRESS.inputs, (Tensor("parameters", "FP32", (436,)),))
    with pytest.raises(ServerError, match=r"parameters: expected \(1, 436\) FP32, got \(1, 486\)"):
        client._connection.infer(smaller, {"crop": draw_crops(1)}, Deadline(9))


def test_missing_tritonclient_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tritonclient.grpc", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'chebface\[client\]'"):
        Client("localhost:8001")


def test_import_is_light() -> None:
    program = (
        "import sys, chebface.client; "
        "print([m for m in ('torch', 'tritonclient', 'grpc', 'onnxruntime', 'cv2', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"


def test_wire_types_are_those_that_every_front_carries() -> None:
    tensors = [tensor for model in MODELS.values() for tensor in (*model.inputs, *model.outputs)]
    tensors += [*RECONSTRUCT_PHOTO.inputs, *RECONSTRUCT_PHOTO.optional, *RECONSTRUCT_PHOTO.outputs]
    assert {tensor.dtype for tensor in tensors} <= {"UINT8", "FP32", "INT32", "BYTES"}
    assert {tensor.dtype for model in SERVED.values() for tensor in model.on_request} == {"FP16"}  # by choice only
