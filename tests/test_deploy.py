"""The files for running elsewhere: they parse, agree with each other and the code, and name metrics that exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from models_for_tests import write_repository
from test_proxy import needs_nginx

from chebface import wheel
from chebface.cli_serve import serve
from chebface.proxy import SHOWN, Proxy, Upstream, _spell_tokens, show
from chebface.server import HARDENED, RESTRICTED, Server
from chebface.signature import MODELS, RECONSTRUCT

METRIC = re.compile(r"\bnv_[a-z0-9_]+")


def read(what: str) -> list[Any]:
    return list(yaml.safe_load_all(show(what)))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(write_repository(tmp_path_factory.mktemp("models")), stop_timeout_s=0.3) as running:
        yield running


@pytest.fixture(scope="module")
def metrics(server: Server) -> dict[str, set[str]]:
    """What the real server counts: label names by metric."""
    address = f"http://127.0.0.1:{server.ports['metrics']}/metrics"
    found: dict[str, set[str]] = {}
    with urllib.request.urlopen(address, timeout=10) as answer:
        for line in answer.read().decode().splitlines():
            if matched := re.match(r"([a-z_0-9]+)(\{.*\})? ", line):
                found.setdefault(matched[1], set()).update(re.findall(r'(\w+)="', matched[2] or ""))
    return found


@pytest.mark.parametrize("what", ["prometheus", "grafana", "kubernetes"])
def test_every_metric_that_is_named_is_served(metrics: dict[str, set[str]], what: str) -> None:
    text = show(what)
    named = set(METRIC.findall(text))
    assert len(named) >= 2 and named <= metrics.keys()
    for name, selectors in re.findall(r"(nv_\w+)\{([^}]*)\}", text.replace('\\"', '"')):
        used = set(re.findall(r'(\w+)(?:=~|!=|=)"', selectors))
        assert used <= metrics[name] | {"instance", "namespace", "pod"}  # which Prometheus adds


def test_models_and_quantiles_that_are_named_exist(server: Server) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.ports['metrics']}/metrics", timeout=10) as answer:
        served = answer.read().decode()
    assert 'nv_inference_request_summary_us{model="reconstruct",version="1",quantile="0.99"}' in served
    for what in ("prometheus", "grafana", "kubernetes"):
        text = show(what).replace('\\"', '"')
        for names in re.findall(r'model=~?"([a-z|]+)"', text):
            assert set(names.split("|")) <= MODELS.keys()


@pytest.mark.parametrize("what", ["prometheus", "grafana", "kubernetes"])
def test_queues_are_looked_at_where_faces_wait(what: str) -> None:
    text = show(what).replace('\\"', '"')
    found = re.findall(r'(?:queue_duration_us|pending_request_count|queue_us:mean1m)\{model=~?"([a-z|]+)"', text)
    assert found and all(RECONSTRUCT.name in names.split("|") for names in found)


def test_prometheus_rules_have_their_parts() -> None:
    ((document),) = read("prometheus")
    (group,) = document["groups"]
    records = {rule["record"] for rule in group["rules"] if "record" in rule}
    alerts = [rule for rule in group["rules"] if "alert" in rule]
    assert len(records) == 5 and len(alerts) == 5
    for rule in group["rules"]:
        assert rule["expr"].count("(") == rule["expr"].count(")")
        assert set(re.findall(r"chebface:\w+:\w+", rule["expr"])) <= records
    for rule in alerts:
        assert rule["labels"]["severity"] in {"critical", "warning"} and rule["for"] and rule["annotations"]["summary"]


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool (prometheus) is not installed")
def test_promtool_accepts_the_rules(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(show("prometheus"))
    subprocess.run(["promtool", "check", "rules", tmp_path / "rules.yaml"], check=True, capture_output=True)


def test_grafana_dashboard_shows_what_was_asked_for() -> None:
    board = json.loads(show("grafana"))
    assert board["schemaVersion"] >= 36 and board["uid"] == "chebface"
    panels = board["panels"]
    assert [panel["id"] for panel in panels] == list(range(1, len(panels) + 1))
    titles = " ".join(panel["title"] for panel in panels)
    for wanted in ("Latency", "Waiting", "Batch size", "Failures"):
        assert wanted in titles
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len(panels)
    for panel in panels:
        assert panel["description"] and panel["datasource"]["uid"] == "${source}"
        for target in panel["targets"]:
            assert target["expr"].count("(") == target["expr"].count(")")
            assert target["expr"].count("{") == target["expr"].count("}")


def test_the_image_is_hardened_like_the_pip_server() -> None:
    text = show("docker")
    assert f"FROM {wheel.NGC_IMAGE}" in text
    command = text.partition("\nCMD ")[2]
    for flag in HARDENED:
        assert f" {flag} \\" in command
    for option in ("http-restricted-api", "grpc-restricted-protocol"):
        assert f"--{option}={','.join(RESTRICTED)}:chebface-key=$key" in command
    key = subprocess.run(
        ["sh", "-c", command.partition(";")[0] + "; echo $key"], capture_output=True, text=True, check=True
    )
    assert re.fullmatch("[0-9a-f]{32}\n", key.stdout)
    assert "@" not in text.replace("@sha256", "")


def test_the_images_canary_works_on_the_real_server(server: Server) -> None:
    lines = re.findall(r"^    '(.*)' \\$", show("docker"), re.MULTILINE)
    script = "\n".join(lines).replace(":8000/", f":{server.ports['http']}/")
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == 0
    broken = script.replace("/reconstruct/", "/nothing/")
    assert broken != script
    assert subprocess.run([sys.executable, "-c", broken], capture_output=True, check=False).returncode != 0


def test_compose_publishes_the_proxy_alone() -> None:
    services = read("compose")[0]["services"]
    assert set(services) == {"triton", "proxy"}
    assert all(port.startswith("127.0.0.1:") for port in services["triton"]["ports"])
    assert services["proxy"]["ports"] == ["8000:8000", "8001:8001"]
    assert services["proxy"]["depends_on"] == {"triton": {"condition": "service_healthy"}}
    mounted = {volume.split(":")[0] for volume in services["proxy"]["volumes"]}
    assert mounted == {"./nginx.conf", "./tokens.conf", "./tls"}


def test_kubernetes_parts_fit_each_other() -> None:
    service, scaler, budget, rules = read("kubernetes")
    kinds = [(part["apiVersion"], part["kind"]) for part in (service, scaler, budget, rules)]
    assert kinds == [
        ("serving.kserve.io/v1beta1", "InferenceService"),
        ("autoscaling/v2", "HorizontalPodAutoscaler"),
        ("policy/v1", "PodDisruptionBudget"),
        ("v1", "ConfigMap"),
    ]
    notes = service["metadata"]["annotations"]
    assert notes["serving.kserve.io/autoscalerClass"] == "external"  # else KServe makes a second one
    predictor = service["spec"]["predictor"]
    (container,) = predictor["containers"]
    assert container["name"] == "kserve-container"
    assert container["livenessProbe"]["exec"] == {"command": ["python3", "/canary.py"]}
    assert {port["containerPort"] for port in container["ports"]} == {8000, 8001, 8002}
    drain = int(container["lifecycle"]["preStop"]["exec"]["command"][1]) + 30
    assert "--exit-timeout-secs=30" in show("docker") and predictor["terminationGracePeriodSeconds"] > drain
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in predictor["volumes"]}
    name = service["metadata"]["name"]
    assert scaler["spec"]["scaleTargetRef"] == {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "name": f"{name}-predictor",
    }
    assert scaler["spec"]["minReplicas"] == predictor["minReplicas"] <= scaler["spec"]["maxReplicas"]
    assert budget["spec"]["selector"]["matchLabels"] == {"serving.kserve.io/inferenceservice": name}
    (rule,) = yaml.safe_load(rules["data"]["config.yaml"])["rules"]
    (metric,) = scaler["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    assert "<<.LabelMatchers>>" in rule["metricsQuery"] and "/ (1 + sum(increase(" in rule["metricsQuery"]


@needs_nginx
def test_nginx_accepts_what_is_shown(tmp_path: Path) -> None:
    servers = [Upstream("127.0.0.1", 8101, 8100), Upstream("[::1]", 8201, 8200)]
    for proxy in (Proxy("0.0.0.0", upstreams=servers, insecure=True), Proxy("::1", upstreams=servers)):
        (tmp_path / "nginx.conf").write_text(show("nginx", proxy).replace("\npid ", "\nuser root;\npid "))
        (tmp_path / "tokens.conf").write_text(_spell_tokens(["a.b+c/d=e_f~g-h0123"]))
        nginx = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/bin") or "nginx"
        command = [nginx, "-t", "-p", f"{tmp_path}/", "-c", str(tmp_path / "nginx.conf"), "-e", "stderr"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "syntax is ok" in done.stderr, done.stderr


@pytest.mark.parametrize("what", SHOWN)
def test_the_command_prints_each(what: str) -> None:
    result = CliRunner().invoke(
        serve, ["--show", what, "--upstream", "triton:8001:8000"] if what == "nginx" else ["--show", what]
    )
    assert result.exit_code == 0, result.output
    assert not re.search("@[A-Z_]+@", result.output)
    assert len(result.output.splitlines()) > 20


def test_the_shown_proxy_leads_where_it_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHEBFACE_TOKEN", "secret-0123456789")
    words = "--show nginx --bind 0.0.0.0 --upstream a:8001:8000 --upstream b:9001:9000 --certificate /t/c --key /t/k"
    text = CliRunner().invoke(serve, words.split()).output
    for line in ("server a:8001 ", "server b:9001 ", "server a:8000 ", "server b:9000 ", 'ssl_certificate "/t/c"'):
        assert line in text
    assert "secret" not in text
    result = CliRunner().invoke(serve, ["--show", "nginx", "--bind", "0.0.0.0"])
    assert result.exit_code == 2 and "at least one server" in result.output
