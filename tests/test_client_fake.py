"""The client against a server that is none: retries, deadlines, order, batches, and one error type for each failure."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import pytest

import chebface.client
from chebface import params, signature
from chebface.client import AsyncClient, Client, Retry, connection, stream
from chebface.client.stream import Batcher
from chebface.client.testing import FakeDetector, FakeTransport, answer_ball
from chebface.client.wire import Deadline, Failure, Part, Request, classify, parse_url
from chebface.errors import (
    ConfigError,
    InputError,
    NoFaceError,
    PhotoError,
    ServerBusyError,
    ServerError,
    ServerUnavailableError,
)
from chebface.face import Face
from chebface.signature import REGRESS, TOPOLOGY

QUICK = Retry(first_s=1e-3, most_s=2e-3)


@pytest.fixture
def fake() -> FakeTransport:
    return FakeTransport()


@pytest.fixture
def client(fake: FakeTransport) -> Iterator[Client]:
    with Client(transport=fake, detector=FakeDetector(), retry=QUICK) as client:
        yield client


def grey(level: int, faces: int = 1) -> np.ndarray:
    """A photo that the answer can be told by: the fake's first parameter is its level / 255."""
    return np.full((112, 112 * faces + 1, 3), level, np.uint8)


def level_of(face: Face) -> int:
    return round(255 * float(face.parameters[0]))


def asked(fake: FakeTransport, model: str = "reconstruct") -> list[Request]:
    return [request for request in fake.requests if request.model.name == model]


def test_a_photo_becomes_a_face_that_can_be_saved(client: Client, tmp_path: Path) -> None:
    face = client.reconstruct(grey(51))
    assert level_of(face) == 51
    assert face.head["name"] == "fake"
    assert face.vertices.shape == signature.VERTICES_M.shape and face.vertices.flags.writeable
    assert face.vertices.base is None or face.vertices.base.shape[0] == 1  # no batch is kept alive by one face
    assert face.faces.max() < signature.VERTICES
    assert face.save(tmp_path, grey(51))["glb"].stat().st_size > 0
    assert "fake, no shared memory" in client.carrier


def test_every_face_in_requests_of_max_batch(fake: FakeTransport) -> None:
    with Client(transport=fake, detector=FakeDetector(5), max_batch=2) as client:
        assert len(client.reconstruct_all(grey(9, 5))) == 5
    assert [request.batch for request in asked(fake)] == [2, 2, 1]


def test_parameters_alone_ask_for_no_vertices(client: Client, fake: FakeTransport) -> None:
    parameters = client.parameters(grey(102))
    assert parameters.shape == (params.TOTAL,)
    assert parameters[0] == pytest.approx(0.4, abs=1e-3)
    (request,) = fake.requests
    assert (request.model.name, [tensor.name for tensor in request.outputs]) == ("regress", ["parameters"])


@pytest.mark.parametrize("how", ["busy", "dead"])
def test_what_is_safe_is_sent_again(client: Client, fake: FakeTransport, how: str) -> None:
    fake.fail(how, times=2)
    assert level_of(client.reconstruct(grey(7))) == 7
    assert (len(asked(fake)), client.repeats) == (3, 2)


@pytest.mark.parametrize(
    ("how", "kind", "tries"),
    [("busy", ServerBusyError, 3), ("dead", ServerUnavailableError, 3), ("broken", ServerError, 1)],
)
def test_failures_that_stay(client: Client, fake: FakeTransport, how: str, kind: type, tries: int) -> None:
    fake.fail(how)
    with pytest.raises(kind, match="fake:8001: reconstruct") as caught:
        client.reconstruct(grey(7))
    assert type(caught.value) is kind
    assert isinstance(caught.value.__cause__, Failure)
    assert len(fake.requests) == tries
    fake.recover()
    assert level_of(client.reconstruct(grey(8))) == 8


def test_bad_photos_are_never_sent(client: Client, fake: FakeTransport, tmp_path: Path) -> None:
    with pytest.raises(PhotoError, match="not found"):
        client.reconstruct(tmp_path / "none.jpg")
    nobody = Client(transport=fake, detector=FakeDetector(0))
    with pytest.raises(NoFaceError):
        nobody.reconstruct(grey(1))
    assert fake.requests == []


def test_the_server_is_told_what_is_left_of_the_deadline(client: Client, fake: FakeTransport) -> None:
    client.reconstruct(grey(1))
    client.reconstruct(grey(1), deadline_s=5)
    assert 29 < fake.timeouts_s[0] <= 30
    assert 4 < fake.timeouts_s[-1] < 5
    fake.fail("busy", times=1)
    client.reconstruct(grey(1), deadline_s=5)
    assert fake.timeouts_s[-1] < fake.timeouts_s[-2]


def test_a_late_answer_of_a_living_server_is_busy_and_not_asked_for_again(client: Client, fake: FakeTransport) -> None:
    fake.delay_s = 30
    with pytest.raises(ServerBusyError, match=r"deadline_s \(0.05\); the server is alive"):
        client.reconstruct(grey(1), deadline_s=0.05)
    assert len(fake.requests) == 1


def test_a_hung_server_is_unavailable(client: Client, fake: FakeTransport) -> None:
    fake.fail("hung")
    with pytest.raises(ServerUnavailableError, match="not say that it is alive"):
        client.reconstruct(grey(1), deadline_s=0.05)
    assert not client.is_ready()


def test_a_deadline_that_detection_used_up(fake: FakeTransport) -> None:
    class Slow(FakeDetector):
        def detect(self, image_u8: np.ndarray) -> list:
            time.sleep(0.03)
            return super().detect(image_u8)

    client = Client(transport=fake, detector=Slow())
    with pytest.raises(ServerBusyError, match="passed before the request was sent"):
        client.reconstruct(grey(1), deadline_s=0.02)
    assert fake.requests == []


def test_no_wait_outlasts_the_deadline(fake: FakeTransport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection.random, "random", lambda: 0.999)
    fake.fail("busy")
    with Client(transport=fake, detector=FakeDetector(), retry=Retry(first_s=20, most_s=20)) as client:
        began = time.monotonic()
        with pytest.raises(ServerBusyError, match="maximum queue size"):
            client.reconstruct(grey(1), deadline_s=10)
        assert time.monotonic() - began < 5
    assert len(fake.requests) == 1


def test_waits_grow_to_a_limit_and_are_spread() -> None:
    retry = Retry(first_s=0.1, most_s=1)
    assert [retry.wait_s(failed, 1.0) for failed in (1, 2, 3, 4, 5, 99)] == [0.1, 0.2, 0.4, 0.8, 1, 1]
    assert retry.wait_s(3, 0.5) == 0.2


def test_repeats_stop_when_the_server_stays_busy(client: Client, fake: FakeTransport) -> None:
    fake.fail("busy")
    for _ in range(20):
        with pytest.raises(ServerBusyError):
            client.reconstruct(grey(1))
    assert client.repeats < 10  # 40 without the limit
    before = len(fake.requests)
    fake.fail("dead")
    with pytest.raises(ServerUnavailableError):
        client.reconstruct(grey(1))
    assert len(fake.requests) == before + 3  # costs a dead server nothing


def test_the_next_server_takes_over() -> None:
    first, second = FakeTransport(), FakeTransport()
    second.url = "other:8001"
    line = connection.Connection([first, second], retry=QUICK, shared_memory="auto")
    crop = {"crop": np.zeros((1, 112, 112, 3), np.uint8)}
    first.fail("dead")
    for _ in range(3):
        line.infer(REGRESS, crop, Deadline(5))
    assert (len(first.requests), len(second.requests), line.url) == (1, 3, "other:8001")
    second.fail("dead", times=1)
    first.recover()
    line.infer(REGRESS, crop, Deadline(5))
    assert line.url == "fake:8001"
    line.close()
    assert first.is_closed and second.is_closed


def test_a_closed_client_says_so(client: Client) -> None:
    client.close()
    client.close()
    with pytest.raises(InputError, match="is closed"):
        client.reconstruct(grey(1))
    assert not client.is_ready()


def test_answers_that_are_none(client: Client, fake: FakeTransport) -> None:
    good = answer_ball

    def bad(request: Request) -> dict:
        answer = good(request)
        answer["vertices"] = answer["vertices"] * np.float32("nan")
        return answer

    fake._answer = bad
    with pytest.raises(ServerError, match="vertices: has values that are not finite"):
        client.reconstruct(grey(1))
    fake._answer = lambda request: {"parameters": np.zeros((1, 436), np.float32)}
    with pytest.raises(ServerError, match=r"parameters: expected \(1, 486\) FP32, got \(1, 436\) FP32"):
        client.reconstruct(grey(1))
    fake._answer = lambda request: {}
    with pytest.raises(ServerError, match="got nothing"):
        client.reconstruct(grey(1))
    fake._answer = lambda request: good(request) | {"head": np.array([b"[1]"], np.object_)}
    with pytest.raises(ServerError, match="head is not a JSON object"):
        client.reconstruct(grey(1))


@pytest.mark.parametrize("content", [b"", b"\x05\0\0\0abc", b"\x01\0\0\0a\x01\0\0\0b", b"\xff\xff\xff\xff"])
def test_strings_that_are_cut_short(content: bytes) -> None:
    request = Request.make(TOPOLOGY, {"request": np.zeros(1, np.int32)}, TOPOLOGY.outputs[1:])
    with pytest.raises(ServerError, match="head: expected"):
        request.read({"head": Part("BYTES", (1,), content)}, "here")


def test_map_keeps_the_order_while_one_is_slow(fake: FakeTransport) -> None:
    others = threading.Event()
    finished: list[int] = []

    def answer(request: Request) -> dict:
        level = int(request.arrays[0].ravel()[0])
        if level == 3:
            assert others.wait(10)
        finished.append(level)
        if len(finished) == 5:  # all that may be begun beside it
            others.set()
        return answer_ball(request)

    with Client(transport=fake, detector=FakeDetector(), max_batch=1) as client:
        client._ask_topology(Deadline(5))
        fake._answer = answer
        found = [level_of(face) for face in client.map((grey(k) for k in range(3, 15)), concurrency=3)]
    assert found == list(range(3, 15))
    assert finished[5] == 3


def test_map_takes_photos_as_results_are_taken(client: Client) -> None:
    taken = 0

    def endless() -> Iterator[np.ndarray]:
        nonlocal taken
        while True:
            taken += 1
            yield grey(taken % 200)

    results = client.map(endless(), concurrency=2)
    assert [level_of(next(results)) for _ in range(3)] == [1, 2, 3]
    results.close()
    assert taken <= 3 + 2 * 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("chebface-map")]


def test_map_groups_what_is_ready_at_the_same_time(fake: FakeTransport) -> None:
    fake.delay_s = 0.05
    with Client(transport=fake, detector=FakeDetector(), max_batch=4) as client:
        client._ask_topology(Deadline(5))
        assert [level_of(face) for face in client.map([grey(k) for k in range(24)], concurrency=12)] == list(range(24))
    sizes = [request.batch for request in asked(fake)]
    assert sum(sizes) == 24
    assert max(sizes) == 4
    assert len(sizes) <= 14  # 24 alone


def test_map_gives_errors_in_their_place(client: Client, fake: FakeTransport, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")

    def answer(request: Request) -> dict:
        if request.model.batched and (request.arrays[0] == 66).any():
            raise Failure("INTERNAL", "onnx runtime error 1")
        return answer_ball(request)

    fake._answer = answer
    photos = [grey(1), broken, grey(66), grey(2)]
    found = list(client.map(photos, concurrency=1, errors="return"))
    assert [type(result) for result in found] == [Face, PhotoError, ServerError, Face]
    assert "broken.jpg" in str(found[1])
    results = client.map(photos, concurrency=1)
    assert level_of(next(results)) == 1
    with pytest.raises(PhotoError, match=r"broken\.jpg"):
        next(results)


def test_one_failed_request_is_one_error_per_photo(client: Client, fake: FakeTransport) -> None:
    fake.fail("broken")
    fake.delay_s = 0.02
    found = list(client.map([grey(k) for k in range(8)], concurrency=8, errors="return"))
    assert {type(error) for error in found} == {ServerError}
    assert len({id(error) for error in found}) == 8
    assert len(asked(fake)) < 8


def test_map_raises_what_is_no_photos_fault(client: Client) -> None:
    client.close()
    with pytest.raises(InputError, match="is closed"):
        list(client.map([grey(1)], errors="return"))
    with pytest.raises(ZeroDivisionError):
        list(client.map(1 // 0 for _ in range(1)))


@pytest.mark.parametrize("options", [{"concurrency": 0}, {"errors": "ignore"}, {"deadline_s": 0}])
def test_wrong_options_of_map_are_refused_at_once(client: Client, options: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        client.map([], **options)


def test_a_group_has_the_time_of_its_youngest() -> None:
    gate, seen = threading.Event(), []

    def send(crops: np.ndarray, deadline: Deadline) -> tuple[np.ndarray, ...]:
        seen.append((len(crops), deadline.seconds))
        gate.wait(5)
        return (crops,)

    batcher = Batcher(send, 8, callers=6)
    threads = [
        threading.Thread(target=batcher.ask, args=(np.zeros((2, 1)), Deadline(seconds))) for seconds in (1, 2, 3, 9, 4)
    ]
    for thread in threads:
        thread.start()
        k = threads.index(thread)  # the first two leave alone, the others wait for one of them
        while len(seen) <= k if k < 2 else len(batcher._waiting) < k - 1:
            time.sleep(1e-3)
    gate.set()
    for thread in threads:
        thread.join()
    assert seen == [(2, 1), (2, 2), (6, 9)]


def test_a_group_waits_for_its_share_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def send(crops: np.ndarray, deadline: Deadline) -> tuple[np.ndarray, ...]:
        sizes.append(len(crops))
        return (crops,)

    batcher = Batcher(send, 8, callers=6)
    monkeypatch.setattr(stream, "LINGER_S", 30.0)
    threads = [threading.Thread(target=batcher.ask, args=(np.zeros((1, 1)), Deadline(1))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert sizes == [3, 3]
    monkeypatch.setattr(stream, "LINGER_S", 0.01)
    assert batcher.ask(np.ones((1, 1)), Deadline(1))[0].tolist() == [[1.0]]
    assert sizes == [3, 3, 1]


def test_a_group_does_not_wait_for_who_is_out(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, sizes = threading.Event(), []

    def send(crops: np.ndarray, deadline: Deadline) -> tuple[np.ndarray, ...]:
        sizes.append(len(crops))
        gate.wait(5)
        return (crops,)

    monkeypatch.setattr(stream, "LINGER_S", 30.0)
    batcher = Batcher(send, 8, callers=3)
    threads = [threading.Thread(target=batcher.ask, args=(np.zeros((1, 1)), Deadline(1))) for _ in range(3)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 5
    while len(sizes) < 2 and time.monotonic() < deadline:
        time.sleep(1e-3)
    gate.set()
    for thread in threads:
        thread.join(5)
    assert sizes == [2, 1]


def test_async_is_the_same_client(fake: FakeTransport, tmp_path: Path) -> None:
    async def numbers() -> AsyncIterator[np.ndarray]:
        for k in range(12):
            yield grey(k)

    async def run() -> None:
        async with AsyncClient(transport=fake, detector=FakeDetector(2), retry=QUICK, threads=4) as client:
            assert await client.is_ready()
            assert (await client.topology()).head["name"] == "fake"
            faces = await asyncio.gather(*(client.reconstruct(grey(k)) for k in range(9)))
            assert [level_of(face) for face in faces] == list(range(9))
            assert len(await client.reconstruct_all(grey(1, 2))) == 2
            assert (await client.parameters(grey(255), deadline_s=5))[0] == pytest.approx(1)
            assert [level_of(face) async for face in client.map(numbers(), concurrency=3)] == list(range(12))
            found = [result async for result in client.map([grey(1), tmp_path / "no.jpg"], errors="return")]
            assert [type(result) for result in found] == [Face, PhotoError]
            with pytest.raises(PhotoError):
                _ = [face async for face in client.map([tmp_path / "no.jpg", grey(1), grey(2)])]
            with pytest.raises(ConfigError, match="concurrency"):
                client.map([], concurrency=0)
            fake.fail("busy", times=1)
            await client.reconstruct(grey(1))
            assert (client.repeats, client.url) == (1, "fake:8001")
            assert client.carrier.startswith("fake")
        await client.close()
        assert fake.is_closed
        with pytest.raises(InputError, match="is closed"):
            await client.reconstruct(grey(1))

    asyncio.run(run())
    with pytest.raises(ConfigError, match="threads"):
        AsyncClient(transport=fake, threads=0)


def test_a_cancelled_task_stops_at_once(fake: FakeTransport) -> None:
    fake.delay_s = 2

    async def run() -> float:
        async with AsyncClient(transport=fake, detector=FakeDetector()) as client:
            began = time.monotonic()
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(client.reconstruct(grey(1), deadline_s=3), 0.02)
            return time.monotonic() - began

    assert asyncio.run(run()) < 1.5


def test_async_offers_what_the_client_does() -> None:
    public = {name for name, _ in inspect.getmembers(Client) if not name.startswith("_")}
    assert public - {name for name, _ in inspect.getmembers(AsyncClient)} == {"detector", "max_batch"}


@pytest.mark.parametrize(
    ("code", "text", "kind"),
    [
        ("UNAVAILABLE", "Exceeds maximum queue size", ServerBusyError),
        ("HTTP 503", "Exceeds maximum queue size", ServerBusyError),
        ("UNAVAILABLE", "Request timeout expired", ServerBusyError),
        ("UNAVAILABLE", "This protocol is restricted, expecting header 'k'", ServerError),
        ("UNAVAILABLE", "Socket closed", ServerUnavailableError),
        ("UNAVAILABLE", "ConnectionRefusedError: [Errno 111]", ServerUnavailableError),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", ServerUnavailableError),
        ("NOT_FOUND", "Request for unknown model: 'reconstruct' is not found", ServerUnavailableError),
        ("HTTP 404", "not here", ServerUnavailableError),
        ("INTERNAL", "Stub process 'decode_0_0' is not healthy.", ServerUnavailableError),
        ("INTERNAL", "onnx runtime error 1", ServerError),
        ("HTTP 429", "slow down", ServerBusyError),
        ("RESOURCE_EXHAUSTED", "rate limited", ServerBusyError),
        ("RESOURCE_EXHAUSTED", "Received message larger than max (9 vs. 4)", ServerError),
        ("HTTP 401", "who are you", ServerError),
        ("PERMISSION_DENIED", "no", ServerError),
        ("HTTP 502", "", ServerUnavailableError),
        ("HTTP 413", "too large", ServerError),
        ("HTTP 500", "unexpected shape for input 'crop'", ServerError),
        ("BROKEN", "the answer is not Triton's", ServerError),
    ],
)
def test_failures_by_code_and_message(code: str, text: str, kind: type) -> None:
    error = classify(Failure(code, text), "here", "reconstruct", 1.0, lambda what: False)
    assert type(error) is kind
    assert str(error).startswith(f"here: reconstruct: {code}: ")


@pytest.mark.parametrize(
    "url", ["", "localhost", "ftp://localhost:8000", "localhost:99999", "http://host:80/path", "grpc://x", "h:²"]
)
def test_wrong_urls_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="expected host:port"):
        Client(url)


def test_urls() -> None:
    assert parse_url("localhost:8001") == parse_url("grpc://localhost:8001/")
    assert [str(parse_url(url)) for url in ("[::1]:8001", "https://a.b:443")] == ["[::1]:8001", "https://a.b:443"]
    assert parse_url("[::1]:1").is_local and not parse_url("example.org:1").is_local
    assert parse_url("grpcs://a:1").is_encrypted and not parse_url("http://a:1").is_encrypted


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"deadline_s": 0}, "deadline_s"),
        ({"deadline_s": float("nan")}, "deadline_s"),
        ({"deadline_s": float("inf")}, "deadline_s"),
        ({"max_batch": 0}, "max_batch"),
        ({"max_batch": 33}, "max_batch"),
        ({"shared_memory": "yes"}, "shared_memory"),
        ({"url": []}, "at least one server"),
        ({"url": "example.org:8001", "token": "t"}, "grpcs://"),
        ({"url": "http://example.org:8000", "admin": ("k", "v")}, "https://"),
        ({"ca_file": "none.pem"}, "ca_file: none.pem is not a file of PEM"),
    ],
)
def test_wrong_settings_are_refused(options: dict, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Client(**options)


@pytest.mark.parametrize("options", [{"attempts": 0}, {"first_s": 0}, {"first_s": 3, "most_s": 2}])
def test_wrong_retries_are_refused(options: dict) -> None:
    with pytest.raises(ConfigError, match="retry: expected attempts"):
        Retry(**options)


def test_wrong_words_to_the_fake(fake: FakeTransport) -> None:
    with pytest.raises(ConfigError, match="expected one of busy, dead, hung, broken"):
        fake.fail("tired")


def test_only_what_exists_is_offered() -> None:
    assert chebface.client.AsyncClient is AsyncClient
    with pytest.raises(AttributeError, match="no attribute 'Klient'"):
        _ = chebface.client.Klient
