"""The real nginx in front of the real Triton: what it lets through, what it stops, and that the server lives on."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from chebface import proxy as proxy_module
from chebface.canary import draw_face, run_here
from chebface.client import Client, Retry
from chebface.client.connection import open_transport
from chebface.client.wire import NUMPY_TYPES, Deadline, Failure, Request, parse_url
from chebface.errors import (
    ConfigError,
    MissingDependencyError,
    ServerBusyError,
    ServerError,
    ServerUnavailableError,
)
from chebface.proxy import JSON_KB, TOKEN_VARIABLE, Proxy, Upstream, read_tokens, show
from chebface.server import Server
from chebface.signature import RECONSTRUCT

needs_nginx = pytest.mark.skipif(
    not shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin"), reason="nginx is not installed: nginx-light"
)
needs_openssl = pytest.mark.skipif(not shutil.which("openssl"), reason="openssl is not installed")
TOKEN = "Secret.token+0123456789"
INFER = f"/v2/models/{RECONSTRUCT.name}/infer"
LENGTH = "Inference-Header-Content-Length"
GRPC = "/inference.GRPCInferenceService/"


def free_ports() -> dict[str, int]:
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        return {"grpc_port": one.getsockname()[1], "http_port": other.getsockname()[1]}


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[Server]:
    with Server(repository, stop_timeout_s=0.3) as running:
        yield running


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    key, path = folder / "key.pem", folder / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-days", "1"]
    subprocess.run([*command, "-keyout", key, "-out", path], check=True, capture_output=True)
    return path, key


@pytest.fixture(scope="module")
def front(server: Server) -> Iterator[Proxy]:
    made = Proxy("127.0.0.1", **free_ports(), tokens=[TOKEN], rate=10_000, drain_s=0.5)
    made.start(server.ports)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def known(repository: Path) -> dict[str, np.ndarray]:
    return run_here(repository, draw_face()[None])


def ask(
    proxy: Proxy, method: str, path: str, body: object = None, *, token: str | None = TOKEN, **headers: str
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", proxy.ports["http"], timeout=30)
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        connection.request(method, path, body, fields | ({"Authorization": f"Bearer {token}"} if token else {}))
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def send(proxy: Proxy, kind: str = "http", *, token: str | None = TOKEN, batch: int = 1, **options: object) -> dict:
    """The drawn face by the client's own transport: once, without retries."""
    prefix = {"http": "http://", "grpc": ""}[kind]
    way = open_transport(parse_url(f"{prefix}127.0.0.1:{proxy.ports[kind]}"), token=token, **options)
    request = Request.make(RECONSTRUCT, {RECONSTRUCT.inputs[0].name: np.repeat(draw_face()[None], batch, 0)})
    try:
        return request.read(way.send(request, Deadline(30).seconds), way.url)
    finally:
        way.close()


def binary_request() -> tuple[bytes, dict[str, str]]:
    crop = draw_face().tobytes()
    tensor = {"name": "crop", "shape": [1, 112, 112, 3], "datatype": "UINT8"}
    tensor["parameters"] = {"binary_data_size": len(crop)}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return head + crop, {LENGTH.replace("-", "_"): str(len(head))}


@needs_nginx
@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_the_same_answer_as_without_it(front: Proxy, known: dict, kind: str) -> None:
    got = send(front, kind)
    for name, wanted in known.items():
        assert np.abs(got[name] - wanted).max() < 1e-5
    assert len(send(front, kind, batch=32)["vertices"]) == 32


@needs_nginx
@pytest.mark.parametrize("kind", ["http", "grpc"])
@pytest.mark.parametrize("token", [None, TOKEN.lower(), TOKEN + "x", TOKEN[:-1], TOKEN.replace(".", "x")])
def test_without_its_token_nobody_comes_in(front: Proxy, kind: str, token: str | None) -> None:
    with pytest.raises(Failure, match="the token is missing or wrong") as caught:
        send(front, kind, token=token)
    assert caught.value.status in ("HTTP 401", "UNAUTHENTICATED")
    assert ask(front, "GET", "/v2", token=token)[0] == 401


@needs_nginx
def test_the_client_says_that_its_token_is_wrong(front: Proxy, astronaut: Path) -> None:
    for url in (f"127.0.0.1:{front.ports['grpc']}", f"http://127.0.0.1:{front.ports['http']}"):
        with Client(url, token="wrong" * 4) as client:
            assert client.is_ready()  # health needs none
            with pytest.raises(ServerError, match="give token="):
                client.reconstruct(astronaut)


@needs_nginx
@needs_openssl
def test_tls_and_tokens_with_the_client(server: Server, certificate: tuple[Path, Path], astronaut: Path) -> None:
    chain, key = certificate
    made = Proxy("127.0.0.1", **free_ports(), certificate=chain, key=key, tokens=["other" * 4, TOKEN], drain_s=0.5)
    assert "TLS, 2 token(s)" in str(made)
    try:
        made.start(server.ports)
        for url in (f"grpcs://localhost:{made.ports['grpc']}", f"https://localhost:{made.ports['http']}"):
            with Client(url, token=TOKEN, ca_file=chain) as client:
                assert client.reconstruct(astronaut).vertices.shape == (5023, 3)
            with Client(url, token=TOKEN, retry=Retry(attempts=1)) as client:
                assert not client.is_ready()  # a certificate that nobody vouches for
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
        with socket.create_connection(("127.0.0.1", made.ports["http"])) as plain, context.wrap_socket(plain) as tls:
            assert tls.version() == "TLSv1.3"
        assert ask(made, "GET", "/v2")[0] == 400  # plain HTTP where TLS is spoken
    finally:
        made.stop()


@needs_nginx
@pytest.mark.parametrize(
    "path",
    [
        *("/", "/metrics", "/v2/", "/v2/repository/index", "/v2/repository/models/decode/unload", "/v2/logging"),
        *("/v2/trace/setting", "/v2/models/decode/config", "/v2/models/decode/stats", "/v2/models/stats"),
        *("/v2/systemsharedmemory/status", "/v2/cudasharedmemory/status", "/v2/models/other/infer"),
        *("/v2/models/decode%2fconfig", "/v2/models/decode/../../logging", "/v2/models/decode/ready/../config"),
        *("/json", "/refused", "/v2/models/decode/generate", "/v2/models/decode/versions/1/config"),
    ],
)
def test_what_is_no_users_business_is_not_there(front: Proxy, server: Server, path: str) -> None:
    name, value = server.admin_header
    for method in ("GET", "POST"):
        status, body = ask(front, method, path, b"{}" if method == "POST" else None, **{name: value})
        assert status == 404, body


@needs_nginx
def test_metadata_and_health_are_there(front: Proxy) -> None:
    assert json.loads(ask(front, "GET", "/v2")[1])["name"] == "triton"
    assert json.loads(ask(front, "GET", "/v2/models/decode/versions/1")[1])["name"] == "decode"
    for path in ("/v2/models/decode/ready", "/v2/models/reconstruct/versions/1/ready"):
        assert ask(front, "GET", path)[0] == 200
    for path in ("/v2/health/ready", "/v2/health/live"):
        assert ask(front, "GET", path, token=None)[0] == 200
    for method, path in (("POST", "/v2"), ("DELETE", INFER), ("GET", INFER), ("PUT", "/v2/models/decode")):
        assert ask(front, method, path)[0] == 405


@needs_nginx
@pytest.mark.parametrize(
    "method", ["RepositoryIndex", "ModelConfig", "ModelStatistics", "SystemSharedMemoryStatus", "LogSettings", "Other"]
)
def test_grpc_has_inference_metadata_and_health_only(front: Proxy, server: Server, method: str) -> None:
    import grpc

    key, value = server.admin_header
    metadata = [("authorization", f"Bearer {TOKEN}"), (f"triton-grpc-protocol-{key}", value)]
    with grpc.insecure_channel(f"127.0.0.1:{front.ports['grpc']}") as channel:
        call = channel.unary_unary(GRPC + method)
        with pytest.raises(grpc.RpcError) as caught:
            call(b"", timeout=10, metadata=metadata)
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
        assert channel.unary_unary(GRPC + "ServerReady")(b"", timeout=10) == b"\x08\x01"
        assert b"triton" in channel.unary_unary(GRPC + "ServerMetadata")(b"", timeout=10, metadata=metadata[:1])
        with pytest.raises(grpc.RpcError) as caught:  # a small one may unpack to gigabytes
            channel.unary_unary(GRPC + "ModelInfer")(
                bytes(10_000), timeout=10, metadata=metadata[:1], compression=grpc.Compression.Gzip
            )
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
        assert "compressed" in caught.value.details()


@needs_nginx
def test_oversize_is_refused_before_it_is_taken(server: Server) -> None:
    with_limit = Proxy("127.0.0.1", **free_ports(), max_body_mb=1, tokens=[TOKEN], rate=1000, drain_s=0.5)
    try:
        with_limit.start(server.ports)
        assert ask(with_limit, "POST", INFER, bytes((1 << 20) + 1), Inference_Header_Content_Length="99")[0] == 413
        chunks = iter([bytes(1 << 18)] * 8)
        assert ask(with_limit, "POST", INFER, chunks, Inference_Header_Content_Length="99")[0] == 413
        assert len(send(with_limit, "grpc", batch=20)["vertices"]) == 20
        for kind in ("http", "grpc"):  # 32 crops are 1.2 MB
            with pytest.raises(Failure, match="larger than max") as caught:
                send(with_limit, kind, batch=32)
            assert caught.value.status in ("HTTP 413", "RESOURCE_EXHAUSTED")
    finally:
        with_limit.stop()
    assert server.check() > 0


@needs_nginx
def test_long_headers_are_refused(front: Proxy) -> None:
    assert ask(front, "GET", "/v2", X=9000 * "x")[0] == 400
    assert ask(front, "GET", "/v2", **{f"X{k}": 4000 * "x" for k in range(20)})[0] == 400
    assert ask(front, "GET", "/" + 9000 * "x")[0] == 414
    assert ask(front, "POST", INFER, b"x", Content_Encoding="gzip")[0] == 415


@needs_nginx
@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("where", ["all JSON", "JSON in front", "a lie", "chunks"])
def test_deep_json_never_reaches_the_server(
    front: Proxy, server: Server, known: dict, where: str, closed: bool
) -> None:
    deep = b"[" * 1_000_000 + b"]" * (1_000_000 * closed)
    headers = {"JSON in front": str(len(deep)), "a lie": "-1"}
    fields = {LENGTH.replace("-", "_"): headers[where]} if where in headers else {}
    body = iter([deep[:500_000], deep[500_000:]]) if where == "chunks" else deep
    assert ask(front, "POST", INFER, body, **fields)[0] == 413
    assert server.is_running()
    assert np.abs(send(front)["vertices"] - known["vertices"]).max() < 1e-5


@needs_nginx
def test_the_deepest_json_that_is_let_through_does_no_harm(front: Proxy, server: Server, known: dict) -> None:
    most = JSON_KB * 1024
    for deep in (b"[" * most, b"[" * (most // 2) + b"]" * (most // 2), b'{"a":' * (most // 5)):
        assert ask(front, "POST", INFER, deep)[0] in (400, 500)
        assert ask(front, "POST", INFER, deep[:9999], Inference_Header_Content_Length="9999")[0] in (400, 500)
        assert server.is_running()
    assert np.abs(send(front)["vertices"] - known["vertices"]).max() < 1e-5
    request = {"inputs": [{"name": "request", "shape": [1], "datatype": "INT32", "data": [0]}]}
    status, body = ask(
        front, "POST", "/v2/models/topology/infer", json.dumps(request | {"outputs": [{"name": "head"}]})
    )
    assert status == 200 and "stand-in" in str(json.loads(body))


@needs_nginx
@pytest.mark.parametrize("where", ["all JSON", "JSON in front", "chunks"])
@pytest.mark.parametrize("shape", ["[2147483647, 33]", "[9999,9999,9999]", "[1, 112 ,112, 3, 99999999]", " [1e9]", "7"])
def test_a_huge_shape_never_reaches_the_server(
    front: Proxy, server: Server, known: dict, where: str, shape: str
) -> None:
    for key in ("shape", "sh\\u0061pe"):
        fair = '{"name": "other", "datatype": "INT32", "shape": [1], "data": [0]}'
        huge = f'{{"name": "crop", "datatype": "UINT8", "{key}" : {shape}, "data": [0]}}'
        text = f'{{"inputs": [{fair}, {huge}]}}'.encode()
        body = {"all JSON": text, "JSON in front": text + bytes(2_000_000), "chunks": iter([text[:150], text[150:]])}
        fields = {} if where == "all JSON" else {LENGTH.replace("-", "_"): str(len(text))}
        status, said = ask(front, "POST", INFER, body[where], **fields)
        assert status == 400 and b"-1" in said, said
    assert server.is_running()
    assert np.abs(send(front)["vertices"] - known["vertices"]).max() < 1e-5


@needs_nginx
def test_a_million_tiny_chunks_are_one_body(front: Proxy, server: Server, known: dict) -> None:
    begin = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nTransfer-Encoding: chunked\r\n"

    def flood(chunks: bytes, length: str) -> bytes:
        with socket.create_connection(("127.0.0.1", front.ports["http"]), timeout=60) as raw:
            raw.sendall(f"{begin}{LENGTH}: {length}\r\nConnection: close\r\n\r\n".encode() + chunks + b"0\r\n\r\n")
            return b"".join(iter(lambda: raw.recv(1 << 16), b""))

    refused = flood(b"1\r\nx\r\n" * 1_000_000, "100")
    assert b"failed to parse the request JSON" in refused  # Triton's own word, on the body as a whole
    assert server.is_running()
    body, headers = binary_request()
    answer = flood(b"".join(b"1\r\n%c\r\n" % byte for byte in body), headers[LENGTH.replace("-", "_")])
    head, _, content = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    length = int(head.lower().partition(b"inference-header-content-length: ")[2].split(b"\r\n")[0])
    at = length
    for output in json.loads(content[:length])["outputs"]:
        size, kind = output["parameters"]["binary_data_size"], NUMPY_TYPES[output["datatype"]]
        got, at = np.frombuffer(content[at : at + size], kind), at + size
        if kind is np.float32:
            assert np.abs(got - known[output["name"]].ravel()).max() < 1e-5
    assert at == len(content)
    assert np.abs(send(front)["vertices"] - known["vertices"]).max() < 1e-5


@needs_nginx
def test_too_many_requests_are_busy(server: Server) -> None:
    slow = Proxy("127.0.0.1", **free_ports(), rate=1, drain_s=0.5)
    assert "NO token" in str(slow)
    try:
        slow.start(server.ports)
        statuses = [ask(slow, "GET", "/v2", token=None)[0] for _ in range(6)]
        assert statuses[0] == 200 and statuses[-1] == 429
        for url in (f"127.0.0.1:{slow.ports['grpc']}", f"http://127.0.0.1:{slow.ports['http']}"):
            with (
                Client(url, retry=Retry(attempts=1)) as client,
                pytest.raises(ServerBusyError, match="too many requests from this address"),
            ):
                for _ in range(30):
                    client._infer(draw_face()[None])
    finally:
        slow.stop()


def wait_until_refused(port: int) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except ConnectionRefusedError:
            return
        time.sleep(0.01)
    raise AssertionError(f"port {port} still answers")


@needs_nginx
def test_two_servers_share_the_load_and_one_may_die(
    server: Server, repository: Path, tmp_path: Path, known: dict
) -> None:
    log = tmp_path / "access.jsonl"
    with Server(repository, stop_timeout_s=0.3) as second:
        other = Upstream("127.0.0.1", second.ports["grpc"], second.ports["http"])
        both = Proxy("127.0.0.1", **free_ports(), upstreams=[other], rate=1000, drain_s=0.5, access_log=log)
        try:
            both.start(server.ports)
            for kind in ("grpc", "http"):
                way = open_transport(parse_url(f"{'http://' * (kind == 'http')}127.0.0.1:{both.ports[kind]}"))
                request = Request.make(RECONSTRUCT, {"crop": draw_face()[None]})
                for _ in range(8):  # over one connection
                    assert way.send(request, 20)
                way.close()
            os.kill(second.pid, signal.SIGKILL)
            # What a dying server took by gRPC is lost: nginx does not keep it, the client repeats it (bench faults).
            wait_until_refused(second.ports["grpc"])
            for kind in ("grpc", "http") * 4:
                assert np.abs(send(both, kind, token=None)["vertices"] - known["vertices"]).max() < 1e-5
        finally:
            both.stop()
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert {row["status"] for row in rows} == {200}
    for kind in ("grpc", "http"):
        asked = {row["server"] for row in rows[:16]} & {f"127.0.0.1:{s.ports[kind]}" for s in (server,)}
        asked |= {row["server"] for row in rows[:16]} & {f"127.0.0.1:{getattr(other, f'{kind}_port')}"}
        assert len(asked) == 2


@needs_nginx
def test_another_server_takes_over_and_metrics_follow(server: Server, repository: Path) -> None:
    metrics = free_ports()["http_port"]
    made = Proxy("127.0.0.1", **free_ports(), metrics_port=metrics, tokens=[TOKEN], rate=1000, drain_s=0.5)
    with pytest.raises(ServerUnavailableError, match="the proxy is not running"):
        made.lead(server.ports)

    def scrape() -> str:
        connection = http.client.HTTPConnection("127.0.0.1", metrics, timeout=10)
        try:
            connection.request("GET", "/metrics")
            return connection.getresponse().read().decode()
        finally:
            connection.close()

    count = 'nv_inference_request_success{model="reconstruct",version="1"}'
    try:
        with Server(repository, stop_timeout_s=0.3) as second:
            made.start(server.ports)
            send(made)
            before = scrape().partition(count)[2].split()[0]
            made.lead(second.ports)
            fresh = int(scrape().partition(count)[2].split()[0])  # its own warm-up and canary
            assert fresh < int(before)
            send(made, "grpc")
            assert int(scrape().partition(count)[2].split()[0]) == fresh + 1
            made.lead(server.ports)
        send(made, "grpc")
    finally:
        made.stop()


@needs_nginx
def test_what_nginx_does_not_take_changes_nothing(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Proxy("127.0.0.1", **free_ports(), tokens=[TOKEN], drain_s=0.5)
    try:
        made.start(server.ports)
        monkeypatch.setattr(proxy_module, "_START_S", 0.5)
        monkeypatch.setattr(made, "config", lambda *_: "nonsense;")
        with pytest.raises(ServerUnavailableError, match=r"(?s)does not take the new server.*unknown directive"):
            made.lead({"grpc": 1, "http": 2})
        send(made)
    finally:
        made.stop()


@needs_nginx
def test_it_says_when_no_server_is_there() -> None:
    nowhere = free_ports()
    alone = Proxy("127.0.0.1", **free_ports(), drain_s=0.5)
    try:
        alone.start({"grpc": nowhere["grpc_port"], "http": nowhere["http_port"]})
        for kind in ("http", "grpc"):
            with pytest.raises(Failure, match="no server behind the proxy answers") as caught:
                send(alone, kind, token=None)
            assert caught.value.status in ("HTTP 502", "UNAVAILABLE")
        assert "connect() failed" in alone.log
        with pytest.raises(ServerUnavailableError, match="already started"):
            alone.start()
    finally:
        alone.stop()
    assert not alone.is_running() and alone.log == ""


@needs_nginx
def test_shut_is_not_ready(front: Proxy) -> None:
    with Client(f"127.0.0.1:{front.ports['grpc']}") as client:
        front.shut()
        assert ask(front, "GET", "/v2/health/ready", token=None)[0] == 503
        assert not client.is_ready()
        assert ask(front, "GET", "/v2/health/live", token=None)[0] == 200
        front.open()
        assert ask(front, "GET", "/v2/health/ready", token=None)[0] == 200
        assert client.is_ready()


@needs_nginx
def test_nothing_secret_can_be_read_and_nothing_is_left(server: Server) -> None:
    made = Proxy("127.0.0.1", **free_ports(), tokens=[TOKEN], drain_s=0.5)
    assert TOKEN not in str(made) + repr(made)
    made.start(server.ports)
    folder, pid = made._folder, made._process.pid
    assert folder is not None and TOKEN not in (folder / "nginx.conf").read_text()
    assert (folder / "tokens.conf").stat().st_mode & 0o077 == 0
    assert TOKEN.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    made.stop()
    made.stop()
    assert not folder.exists() and not Path(f"/proc/{pid}").exists()


@needs_nginx
def test_taken_port_and_broken_certificate_are_named(server: Server, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = free_ports() | {"http_port": taken.getsockname()[1]}
        with pytest.raises(ServerUnavailableError, match=f"http port {ports['http_port']} on 127.0.0.1 cannot be used"):
            Proxy("127.0.0.1", **ports).start(server.ports)
    broken = tmp_path / "certificate.pem"
    broken.write_text("none")
    with pytest.raises(ConfigError, match="expected a PEM chain and its key"):
        Proxy("127.0.0.1", **free_ports(), certificate=broken, key=broken).start(server.ports)


@needs_nginx
def test_nginx_that_dies_shows_its_log(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Proxy, "config", lambda *_: "nonsense;")
    with pytest.raises(ServerUnavailableError, match=r"(?s)nginx died while it started.*unknown directive"):
        Proxy("127.0.0.1", **free_ports()).start(server.ports)


@needs_nginx
def test_nginx_that_does_not_listen_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy_module, "_START_S", 0.2)
    monkeypatch.setattr(Proxy, "config", lambda *_: "pid nginx.pid; error_log stderr; events {} http {}")
    with pytest.raises(ServerUnavailableError, match="nginx does not listen"):
        Proxy("127.0.0.1", **free_ports()).start(server.ports)


def test_missing_nginx_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(MissingDependencyError, match="apt-get install nginx-light"):
        Proxy("127.0.0.1").start({"grpc": 1, "http": 2})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"bind": "example.org"}, "expected an IP address"),
        ({"grpc_port": 0}, "grpc_port: expected 1..65535"),
        ({"grpc_port": 9, "http_port": 9}, "must differ"),
        ({"metrics_port": 0}, "metrics_port: expected 1..65535"),
        ({"metrics_port": 8000}, "must differ"),
        ({"rate": 0}, "rate: expected at least 1"),
        ({"certificate": "c.pem"}, "go together"),
        ({"tokens": ["short"]}, "expected 16 or more"),
        ({"access_log": 'a"b'}, "nginx cannot take"),
        ({"bind": "0.0.0.0"}, r"without TLS .* and tokens: give them"),
        ({"bind": "0.0.0.0", "tokens": [TOKEN]}, r"without TLS \(certificate and key\): give them"),
        ({"bind": "::", "certificate": "c", "key": "k"}, "without tokens: give them"),
    ],
)
def test_impossible_or_unprotected_is_refused(options: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        Proxy(**({"bind": "127.0.0.1"} | options))
    assert TOKEN not in str(caught.value)


def test_what_is_opened_is_said() -> None:
    opened = Proxy("0.0.0.0", insecure=True)
    assert "open to the network on every address: gRPC on 0.0.0.0:8001" in str(opened)
    assert "NOT encrypted, NO token: everyone may come in" in str(opened)
    assert "open to this machine only" in str(Proxy("::1"))
    assert "[::1]:8001" in str(Proxy("::1"))


def test_upstreams_are_read_and_needed() -> None:
    assert Upstream.parse("[fd00::1]:8001:8000") == Upstream("[fd00::1]", 8001, 8000)
    for text in ("gpu:8001", "gpu:x:8000", "gpu:0:8000", "a b:1:2", "a;b:1:2", "gpu:8001:99999"):
        with pytest.raises(ConfigError, match="HOST:GRPC_PORT:HTTP_PORT"):
            Upstream.parse(text)
    with pytest.raises(ConfigError, match="at least one server"):
        Proxy("127.0.0.1").config()


def test_tokens_come_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"# the faces team\n{TOKEN}\n\n{'b' * 16}\n")
    assert read_tokens(path) == (TOKEN, "b" * 16)
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert read_tokens() == ()
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    assert read_tokens() == (TOKEN,)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_tokens(tmp_path / "none")
    for content, says in (("# none", "has no token"), ("short", "got 5"), ('a" 1; default 1; #0000', "token 1")):
        path.write_text(content)
        with pytest.raises(ConfigError, match=says) as caught:
            read_tokens(path)
        assert "default 1" not in str(caught.value)


def test_unknown_thing_to_show_is_refused() -> None:
    for what in ("helm", "nginx"):
        with pytest.raises(ConfigError, match="expected one of nginx, docker"):
            show(what)
