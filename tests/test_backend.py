"""Our onnxruntime backend inside a real Triton server, against the same model files in this process."""

from __future__ import annotations

import json
import shutil
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from models_for_tests import FACTS, python_backend
from onnx import TensorProto, helper

from chebface import backend, native, params, signature
from chebface.client import Client, Retry
from chebface.client.wire import Deadline
from chebface.errors import ServerError, ServerUnavailableError
from chebface.server import Server
from chebface.signature import DECODE, RECONSTRUCT, REGRESS, TOPOLOGY, VERTICES_HALF, Model

pytestmark = pytest.mark.skipif(native.find_compiler() is None, reason="this machine has no C++ compiler")


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[Server]:
    with Server(repository, stop_timeout_s=0.3) as server:
        yield server


@pytest.fixture(params=["grpc", "http"])
def client(request: pytest.FixtureRequest, server: Server) -> Iterator[Client]:
    url = server.url if request.param == "grpc" else server.http_url
    with Client(url, retry=Retry(attempts=1), shared_memory="off") as client:
        yield client


def ask(client: Client, model: Model, array: np.ndarray, **options: object) -> dict[str, np.ndarray]:
    return client._connection.infer(model, {model.inputs[0].name: array}, Deadline(20), **options)


def run_here(repository: Path, model: Model, array: np.ndarray) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(repository / model.name / "1" / "model.onnx")
    names = [tensor.name for tensor in model.every_output]
    return dict(zip(names, session.run(names, {model.inputs[0].name: array}), strict=True))


def read_statistics(server: Server, model: Model) -> tuple[int, int, int]:
    """Faces, runs and requests so far, by Triton."""
    url = f"{server.http_url}/v2/models/{model.name}/stats"
    with urllib.request.urlopen(urllib.request.Request(url, headers=dict([server.admin_header])), timeout=10) as answer:
        stats = json.load(answer)["model_stats"][0]
    times = stats["inference_stats"]
    assert all(times[part]["ns"] > 0 for part in ("queue", "compute_input", "compute_infer", "compute_output"))
    return stats["inference_count"], stats["execution_count"], times["success"]["count"]


def draw(batch: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (batch, 112, 112, 3), dtype=np.uint8)


def test_it_says_which_backend_runs(server: Server, repository: Path) -> None:
    assert server.runtime == "native backend"
    assert "chebface's onnxruntime backend, onnxruntime" in server.log
    with python_backend(), Server(repository, stop_timeout_s=0.3) as other:
        assert other.runtime.startswith("Python backend: ")
        assert len(other.backends) == len(server.backends) + len(signature.LEAVES)


@pytest.mark.parametrize("batch", [1, 5, signature.MAX_BATCH])
def test_every_model_and_output_is_what_the_file_gives(client: Client, repository: Path, batch: int) -> None:
    parameters = np.random.default_rng(batch).normal(size=(batch, params.TOTAL)).astype(np.float32)
    for model, array in ((RECONSTRUCT, draw(batch)), (REGRESS, draw(batch)), (DECODE, parameters)):
        wanted = run_here(repository, model, array)
        found = ask(client, model, array, outputs=model.every_output)
        for name, value in wanted.items():
            assert found[name].dtype == value.dtype
            np.testing.assert_array_equal(found[name], value, err_msg=f"{model.name} {name}")


def test_only_what_is_asked_for_comes_back(client: Client, repository: Path) -> None:
    wanted = run_here(repository, RECONSTRUCT, draw(2))[VERTICES_HALF.name]
    found = ask(client, RECONSTRUCT, draw(2), outputs=(VERTICES_HALF,))
    assert list(found) == [VERTICES_HALF.name]
    np.testing.assert_array_equal(found[VERTICES_HALF.name], wanted)


def test_texts_travel(client: Client) -> None:
    found = ask(client, TOPOLOGY, np.zeros(1, np.int32))
    assert found["faces"].shape == (signature.FACES, 3)
    assert client.topology.head == FACTS


def test_requests_that_share_a_run_get_their_own_answers(server: Server, repository: Path) -> None:
    """Of several sizes, some of them for half vertices alone."""
    sizes = [1 + k % 5 for k in range(48)]
    wanted = [run_here(repository, RECONSTRUCT, draw(size, k)) for k, size in enumerate(sizes)]
    found: dict[int, dict[str, np.ndarray]] = {}
    faces, runs, requests = read_statistics(server, RECONSTRUCT)
    with Client(server.url, retry=Retry(attempts=1), shared_memory="off") as client:

        def work(k: int) -> None:
            outputs = (VERTICES_HALF,) if k % 3 == 0 else None
            found[k] = ask(client, RECONSTRUCT, draw(sizes[k], k), outputs=outputs)

        threads = [threading.Thread(target=work, args=(k,)) for k in range(len(sizes))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(found) == list(range(len(sizes)))
    for k, arrays in found.items():
        assert len(arrays) == (1 if k % 3 == 0 else len(RECONSTRUCT.outputs))
        for name, value in arrays.items():
            np.testing.assert_allclose(value, wanted[k][name], atol=1e-6)
    deadline = time.monotonic() + 5  # what is counted is counted after the answer has left
    while (now := read_statistics(server, RECONSTRUCT))[2] < requests + len(sizes) and time.monotonic() < deadline:
        time.sleep(0.02)
    faces_now, runs_now, requests_now = now
    assert (faces_now - faces, requests_now - requests) == (sum(sizes), len(sizes))
    assert runs < runs_now <= runs + len(sizes)


def test_tensors_that_lie_askew_are_read_all_the_same(server: Server, repository: Path) -> None:
    """Shared memory at an odd offset, which no client of ours would choose."""
    import tritonclient.grpc as triton
    from tritonclient.utils import shared_memory

    parameters = np.random.default_rng(3).normal(size=(2, params.TOTAL)).astype(np.float32)
    size = 2 * signature.VERTICES * 3 * 4
    handle = shared_memory.create_shared_memory_region("askew", "/chebface_test_askew", size + 8192)
    client = triton.InferenceServerClient(server.url)
    headers = {f"triton-grpc-protocol-{server.admin_header[0]}": server.admin_header[1]}
    try:
        client.register_system_shared_memory("askew", "/chebface_test_askew", size + 8192, headers=headers)
        shared_memory.set_shared_memory_region(handle, [parameters], offset=1)
        given = triton.InferInput("parameters", list(parameters.shape), "FP32")
        given.set_shared_memory("askew", parameters.nbytes, offset=1)
        wanted = triton.InferRequestedOutput("vertices")
        wanted.set_shared_memory("askew", size, offset=4099)
        client.infer("decode", [given], outputs=[wanted])
        found = shared_memory.get_contents_as_numpy(handle, np.uint8, [size], offset=4099).copy().view(np.float32)
    finally:
        client.unregister_system_shared_memory("askew", headers=headers)
        client.close()
        shared_memory.destroy_shared_memory_region(handle)
    vertices = run_here(repository, DECODE, parameters)["vertices"]
    np.testing.assert_array_equal(found.reshape(vertices.shape), vertices)


def test_no_room_for_an_answer_is_one_callers_error(server: Server, repository: Path) -> None:
    """Requests that share runs, of which every third has shared memory that is too small."""
    import tritonclient.grpc as triton
    from tritonclient.utils import InferenceServerException, shared_memory

    size = signature.VERTICES * 3 * 4
    handle = shared_memory.create_shared_memory_region("narrow", "/chebface_test_narrow", 4096)
    headers = {f"triton-grpc-protocol-{server.admin_header[0]}": server.admin_header[1]}
    wanted = run_here(repository, RECONSTRUCT, draw(1))["vertices"]
    found: dict[int, np.ndarray | str] = {}
    with triton.InferenceServerClient(server.url) as client:
        client.register_system_shared_memory("narrow", "/chebface_test_narrow", 4096, headers=headers)

        def work(k: int) -> None:
            given = triton.InferInput("crop", [1, 112, 112, 3], "UINT8")
            output = triton.InferRequestedOutput("vertices")
            given.set_data_from_numpy(draw(1))
            if k % 3 == 0:
                output.set_shared_memory("narrow", 4096)
            try:
                found[k] = client.infer("reconstruct", [given], outputs=[output]).as_numpy("vertices")
            except InferenceServerException as error:
                found[k] = str(error)

        threads = [threading.Thread(target=work, args=(k,)) for k in range(30)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        client.unregister_system_shared_memory("narrow", headers=headers)
    shared_memory.destroy_shared_memory_region(handle)
    for k in range(30):
        if k % 3 == 0:
            assert str(size) in str(found[k]) or "shared memory" in str(found[k])
        else:
            np.testing.assert_allclose(found[k], wanted, atol=1e-6)


def test_no_thread_stays_on_one_core(server: Server) -> None:
    """Networks run on one core each; what they or their answers start may go anywhere."""
    with Client(server.url, retry=Retry(attempts=1), shared_memory="off") as client:
        threads = [threading.Thread(target=ask, args=(client, RECONSTRUCT, draw(2))) for _ in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    where = [path.read_text() for path in Path(f"/proc/{server.pid}/task").glob("*/status")]
    cores = [line.split()[1] for text in where for line in text.splitlines() if line.startswith("Cpus_allowed_list")]
    own = Path("/proc/self/status").read_text()
    assert len(cores) > 8 and set(cores) == {own.partition("Cpus_allowed_list:")[2].split()[0]}


def test_statistics_count_faces_and_runs(server: Server, client: Client) -> None:
    ask(client, DECODE, np.zeros((1, params.TOTAL), np.float32))
    faces, runs, requests = read_statistics(server, DECODE)
    ask(client, DECODE, np.zeros((7, params.TOTAL), np.float32))
    assert read_statistics(server, DECODE) == (faces + 7, runs + 1, requests + 1)


def _spoil(path: Path, message: str) -> None:
    """A file that opens, and whose run fails for some faces: a Gather beyond its table."""
    proto = onnx.load(path)
    proto.graph.initializer.extend(
        [
            helper.make_tensor("table", TensorProto.FLOAT, [1], [1.0]),
            helper.make_tensor("axes_", TensorProto.INT64, [1], [1]),
        ]
    )
    last = proto.graph.node[-1]
    (name,) = last.output
    last.output[0] = "whole"
    proto.graph.node.extend(
        [
            helper.make_node("ReduceMax", ["colours", "every"], ["brightest"], keepdims=0),
            helper.make_node("Cast", ["brightest"], ["place"], to=TensorProto.INT64),
            helper.make_node("Gather", ["table", "place"], ["one"], name=message),
            helper.make_node("Unsqueeze", ["one", "axes_"], ["column"]),
            helper.make_node("Mul", ["whole", "column"], [name]),
        ]
    )
    proto.graph.initializer.append(helper.make_tensor("every", TensorProto.INT64, [3], [1, 2, 3]))
    onnx.save(proto, path)


def test_a_run_that_fails_is_its_callers_error_and_no_death(repository: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(repository, tmp_path / "models"))
    _spoil(copy / "regress" / "1" / "model.onnx", "beyond_the_table")
    with Server(copy, stop_timeout_s=0.3) as server, Client(server.url, retry=Retry(attempts=1)) as client:
        dark = np.zeros((2, 112, 112, 3), np.uint8)
        assert np.isfinite(ask(client, REGRESS, dark)["parameters"]).all()
        for _ in range(3):
            with pytest.raises(ServerError, match=r"regress: .*onnxruntime: .*beyond_the_table") as caught:
                ask(client, REGRESS, dark + 200)
            assert not isinstance(caught.value, ServerUnavailableError)
        failed: list[int] = []

        def work(k: int) -> None:
            try:
                ask(client, REGRESS, dark + 200 * (k % 3 == 0))
            except ServerError:
                failed.append(k)

        threads = [threading.Thread(target=work, args=(k,)) for k in range(30)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(failed) == list(range(0, 30, 3))  # and none that shared a run with them
        assert np.isfinite(ask(client, REGRESS, dark)["parameters"]).all()
        assert server.check() > 0


def test_a_wrong_number_of_threads_is_named(repository: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(repository, tmp_path / "models"))
    config = copy / "decode" / "config.pbtxt"
    key = 'parameters { key: "intra_op_thread_count" value { string_value: '
    assert key in config.read_text()
    config.write_text(config.read_text().replace(key + '"1"', key + '"many"'))
    with pytest.raises(
        ServerUnavailableError, match="intra_op_thread_count: expected a number from 0 to 4096, got 'many'"
    ):
        Server(copy, stop_timeout_s=0.3).start()


def test_without_a_compiler_or_a_library_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("CHEBFACE_NATIVE", "0")
        native.forget()
        assert backend.find_files() is None and backend.why_missing() == "CHEBFACE_NATIVE=0"
    native.forget()
    monkeypatch.setattr(backend, "_find_runtime", lambda: None)
    assert backend.find_files() is None
    assert "pip install -U onnxruntime" in str(backend.why_missing())
