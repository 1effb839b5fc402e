"""The client against one real server: gRPC and HTTP, shared memory and wire, all with the same answers."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from models_for_tests import FACTS, python_backend
from test_server import stub_of

from chebface import signature
from chebface.client import Client, Retry
from chebface.client.memory import PREFIX, SHM
from chebface.client.testing import FakeDetector
from chebface.client.wire import Address, Deadline, Failure
from chebface.errors import ConfigError, InputError, ServerBusyError, ServerError, ServerUnavailableError
from chebface.server import Server
from chebface.signature import DECODE, REGRESS, Model


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[Server]:
    with Server(repository, stop_timeout_s=0.3) as server:
        yield server


@pytest.fixture(params=["grpc", "http"])
def url(request: pytest.FixtureRequest, server: Server) -> str:
    return server.url if request.param == "grpc" else server.http_url


@pytest.fixture(params=["on", "off"])
def client(request: pytest.FixtureRequest, server: Server, url: str) -> Iterator[Client]:
    options = {"shared_memory": request.param, "admin": server.admin_header}
    with Client(url, detector=FakeDetector(), retry=Retry(attempts=1), **options) as client:
        yield client
        wanted = "shared memory" if request.param == "on" else "no shared memory: switched off"
        assert client.carrier == f"{'HTTP' if 'http' in url else 'gRPC'}, {wanted}"


def draw_photo(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (112, 113, 3), dtype=np.uint8)


def run_here(repository: Path, crops: np.ndarray) -> tuple[np.ndarray, ...]:
    """The same model files in this process."""
    (parameters,) = onnxruntime.InferenceSession(repository / "regress/1/model.onnx").run(None, {"crop": crops})
    decoder = onnxruntime.InferenceSession(repository / "decode/1/model.onnx")
    return parameters, *decoder.run(["vertices", "landmarks"], {"parameters": parameters})


def ours() -> set[str]:
    return {path.name for path in SHM.glob(f"{PREFIX}{os.getpid()}_*")}


@pytest.mark.parametrize("batch", [1, 3, signature.MAX_BATCH])
def test_served_is_what_the_files_give_here(client: Client, repository: Path, batch: int) -> None:
    crops = np.stack([draw_photo(k)[:, :112] for k in range(2 * batch)])[::2]  # a slice: not contiguous
    for found, wanted in zip(client._infer(crops), run_here(repository, crops), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    face = client.reconstruct(draw_photo(0))
    parameters, vertices, _ = run_here(repository, face.crop.aligned_u8[None])
    np.testing.assert_allclose(face.vertices, vertices[0], atol=1e-6)
    np.testing.assert_allclose(client.parameters(draw_photo(0)), parameters[0], atol=1e-6)
    assert face.head == FACTS
    assert client.is_ready()


def test_map_is_one_after_the_other(client: Client) -> None:
    photos = [draw_photo(k) for k in range(20)]
    wanted = [client.reconstruct(photo) for photo in photos]
    found = list(client.map(photos, concurrency=6))
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one.vertices, other.vertices, atol=1e-6)


def test_more_threads_than_connections(client: Client) -> None:
    wanted = client._infer(np.zeros((1, 112, 112, 3), np.uint8))[1]
    found: list[bool] = []

    def ask() -> None:
        for _ in range(5):
            found.append(np.array_equal(client._infer(np.zeros((1, 112, 112, 3), np.uint8))[1], wanted))

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 60


def test_a_late_answer_is_busy_and_spoils_nothing(repository: Path) -> None:
    with python_backend(), Server(repository, stop_timeout_s=0.3) as server:
        for url, memory in itertools.product((server.url, server.http_url), ("on", "off")):
            options = {"shared_memory": memory, "admin": server.admin_header}
            with Client(url, detector=FakeDetector(), retry=Retry(attempts=1), **options) as client:
                wanted = client.reconstruct(draw_photo(1))
                stub = stub_of(server, "reconstruct")
                os.kill(stub, signal.SIGSTOP)
                try:
                    with pytest.raises(ServerBusyError, match="the server is alive"):
                        client.reconstruct(draw_photo(2), deadline_s=0.3)
                finally:
                    os.kill(stub, signal.SIGCONT)
                for _ in range(3):
                    np.testing.assert_array_equal(client.reconstruct(draw_photo(1)).vertices, wanted.vertices)


def test_what_the_server_forgot_travels_on_the_wire(client: Client) -> None:
    wanted = client.reconstruct(draw_photo(1)).vertices
    transport, _ = client._connection._lines[0]
    for name in ours():
        transport.unregister(name, 5)
    for _ in range(2):
        np.testing.assert_array_equal(client.reconstruct(draw_photo(1)).vertices, wanted)


def test_refusals_of_a_ready_server(url: str, client: Client) -> None:
    crop = {"crop": np.zeros((1, 112, 112, 3), np.uint8)}
    with pytest.raises(ServerError, match=r"other: .*python -m export all") as caught:
        client._connection.infer(Model("other", REGRESS.inputs, REGRESS.outputs), crop, Deadline(9))
    assert type(caught.value) is ServerError
    with pytest.raises(ServerError, match="decode: ") as caught:
        client._connection.infer(Model("decode", REGRESS.inputs, DECODE.outputs), crop, Deadline(9))
    assert type(caught.value) is ServerError
    client._infer(crop["crop"])


def test_without_the_key_there_is_no_shared_memory(url: str) -> None:
    with Client(url, detector=FakeDetector()) as client:
        client.reconstruct(draw_photo(1))
        assert "no shared memory: the server refuses it (" in client.carrier
        assert "restricted" in client.carrier.lower() or "protocol" in client.carrier.lower()
    with (
        Client(url, detector=FakeDetector(), shared_memory="on") as client,
        pytest.raises(ServerError, match="shared_memory: wanted 'on', but"),
    ):
        client.reconstruct(draw_photo(1))


def test_one_output_of_two(client: Client, repository: Path) -> None:
    """Of a leaf: 2.51 fails an ensemble that is asked for the outputs of its first step alone."""
    parameters = np.random.default_rng(0).normal(size=(2, 486)).astype(np.float32)
    session = onnxruntime.InferenceSession(repository / "decode/1/model.onnx")
    answer = client._connection.infer(DECODE, {"parameters": parameters}, Deadline(9), outputs=DECODE.outputs[1:])
    assert list(answer) == ["landmarks"]
    (wanted,) = session.run(["landmarks"], {"parameters": parameters})
    np.testing.assert_allclose(answer["landmarks"], wanted, atol=1e-6)
    client._infer(np.zeros((1, 112, 112, 3), np.uint8))


def test_nobody_there(url: str) -> None:
    scheme = "http://" if "http" in url else ""
    with Client(f"{scheme}127.0.0.1:9", retry=Retry(attempts=2, first_s=1e-3)) as client:
        assert not client.is_ready()
        with pytest.raises(ServerUnavailableError, match=r"127.0.0.1:9.*try 2.*chebface serve"):
            client._infer(np.zeros((1, 112, 112, 3), np.uint8))
        assert client.repeats == 1


def test_a_closed_client_says_so(url: str) -> None:
    client = Client(url, detector=FakeDetector())
    client.reconstruct(draw_photo(1))
    client.close()
    client.close()
    with pytest.raises(InputError, match="is closed"):
        client.reconstruct(draw_photo(1))


def test_the_next_server_takes_over(url: str, server: Server) -> None:
    scheme = "http://" if "http" in url else ""
    with Client([f"{scheme}127.0.0.1:9", url], detector=FakeDetector()) as client:
        assert client.reconstruct(draw_photo(1)).head == FACTS
        assert client.url.removeprefix(scheme) == url.removeprefix(scheme)


def test_nothing_is_left_in_memory() -> None:
    assert ours() == set()


class Scripted:
    """A server that sends given bytes to each connection in turn, then closes it."""

    def __init__(self, *answers: bytes | None, drip_s: float = 0.0) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.answers, self.drip_s = answers, drip_s
        self.heads: list[str] = []
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._serve)

    def _serve(self) -> None:
        for answer in self.answers:
            connection, _ = self.listener.accept()
            with connection:
                connection.settimeout(5)
                seen, wanted = b"", 1 << 30
                while len(seen) < wanted:  # all of it: else the kernel resets the connection
                    seen += connection.recv(65536)
                    head, mark, _ = seen.partition(b"\r\n\r\n")
                    if mark:
                        self.heads.append(head.decode())
                        wanted = len(head + mark) + int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                for byte in answer or ():
                    try:
                        connection.sendall(bytes([byte]) if self.drip_s else answer)
                    except OSError:
                        break
                    if not self.drip_s or self.over.wait(self.drip_s):
                        break
                if answer is None:
                    self.over.wait(5)

    def __enter__(self) -> Address:
        self.thread.start()
        return Address("http", "127.0.0.1", self.listener.getsockname()[1])

    def __exit__(self, *ignored: object) -> None:
        self.over.set()
        self.thread.join()
        self.listener.close()


def say(body: bytes, status: str = "200 OK", length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return f"HTTP/1.1 {status}\r\nContent-Length: {size}\r\n\r\n".encode() + body


@pytest.mark.parametrize(
    ("answer", "drip_s", "status"),
    [
        (say(b"{}"), 0, "BROKEN"),
        (say(b"no json"), 0, "BROKEN"),
        (say(b"[1]"), 0, "BROKEN"),
        (say(b'{"outputs": [{"name": 1}]}'), 0, "BROKEN"),
        (say(b"{}", length=99), 0, "UNAVAILABLE"),
        (b"no http\r\n\r\n", 0, "UNAVAILABLE"),
        (b"", 0, "UNAVAILABLE"),
        (None, 0, "DEADLINE_EXCEEDED"),
        (say(b"x" * 4000), 0.02, "DEADLINE_EXCEEDED"),
        (say(b'{"error": "too many"}', "429 Too Many Requests"), 0, "HTTP 429"),
        (say(b"<html>", "502 Bad Gateway"), 0, "HTTP 502"),
    ],
)
def test_broken_answers_over_http(answer: bytes | None, drip_s: float, status: str) -> None:
    from chebface.client.over_http import HttpTransport
    from chebface.client.wire import Request

    request = Request.make(REGRESS, {"crop": np.zeros((1, 112, 112, 3), np.uint8)})
    with Scripted(answer, drip_s=drip_s) as address:
        transport = HttpTransport(address, headers={}, admin=None, ca=None)
        with pytest.raises(Failure) as caught:
            transport.send(request, 0.4)
        transport.close()
    assert caught.value.status == status


def test_a_connection_that_ended_while_idle_is_replaced() -> None:
    from chebface.client.over_http import HttpTransport

    with Scripted(say(b""), say(b"")) as address:
        transport = HttpTransport(address, headers={}, admin=None, ca=None)
        assert transport.probe("live", 2)
        assert len(transport._idle) == 1
        assert transport.probe("live", 2)
        transport.close()


def test_tokens_and_headers_travel() -> None:
    script = Scripted(say(b""))
    with script as address, Client(str(address), token="secret", headers={"X-Team": "faces"}) as client:
        assert client.is_ready()
    assert "authorization: Bearer secret" in script.heads[0]
    assert "X-Team: faces" in script.heads[0]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-days", "1"]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    return key, certificate


def test_https_trusts_the_given_certificate_only(certificate: tuple[Path, Path]) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate[1], certificate[0])
    script = Scripted(say(b""))
    script.listener = context.wrap_socket(script.listener, server_side=True)
    with script as address, Client(f"https://localhost:{address.port}", ca_file=certificate[1], token="t") as client:
        assert client.is_ready()
        assert "Bearer t" in script.heads[0]
    plain = socket.create_server(("127.0.0.1", 0))
    with context.wrap_socket(plain, server_side=True) as listener:

        def refuse() -> None:
            with contextlib.suppress(OSError):
                listener.accept()

        refuser = threading.Thread(target=refuse)
        refuser.start()
        url = f"https://localhost:{listener.getsockname()[1]}"
        with (
            Client(url, retry=Retry(attempts=1), shared_memory="off") as client,
            pytest.raises(ServerUnavailableError, match="CERTIFICATE_VERIFY_FAILED"),
        ):
            client._infer(np.zeros((1, 112, 112, 3), np.uint8))
        refuser.join()


def test_grpcs_trusts_the_given_certificate_only(certificate: tuple[Path, Path]) -> None:
    import grpc
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    seen = []

    class Ready(service_pb2_grpc.GRPCInferenceServiceServicer):
        def ServerReady(self, request: object, context: grpc.ServicerContext) -> object:
            seen.append(dict(context.invocation_metadata()))
            return service_pb2.ServerReadyResponse(ready=True)

    server = grpc.server(ThreadPoolExecutor(1))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Ready(), server)
    credentials = grpc.ssl_server_credentials([(certificate[0].read_bytes(), certificate[1].read_bytes())])
    port = server.add_secure_port("localhost:0", credentials)
    server.start()
    try:
        with Client(f"grpcs://localhost:{port}", ca_file=certificate[1], token="t", headers={"X-Team": "f"}) as client:
            assert client.is_ready()
            with pytest.raises(ServerError, match="UNIMPLEMENTED"):
                client._infer(np.zeros((1, 112, 112, 3), np.uint8))
        assert (seen[0]["authorization"], seen[0]["x-team"]) == ("Bearer t", "f")
        with Client(f"grpcs://localhost:{port}") as client:
            assert not client.is_ready()
    finally:
        server.stop(None)


def test_a_file_without_certificates(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    with pytest.raises(ConfigError, match="not a file of PEM certificates"):
        Client("grpcs://localhost:1", ca_file=tmp_path / "ca.pem")
