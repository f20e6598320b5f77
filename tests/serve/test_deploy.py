"""The files under deploy/, held to the code: they parse, and name only metrics, paths and flags that there are."""

from __future__ import annotations

import configparser
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from lmdeploy.messages import Response
from lmdeploy.serve.metrics import Metrics
from lmdeploy.serve.middleware import OPEN_PATHS
from tests.cli.command_line import ROOT, parse

DEPLOY = ROOT / "deploy"
DOCKERFILES = sorted(DEPLOY.glob("Dockerfile.*"))
MODEL = "owner/name"


def exported_metrics() -> set[str]:
    """The names of the series that /metrics shows once an answer has ended."""
    metrics = Metrics("m", lambda: {"num_running": 1.0})
    metrics.timer(True).observe(Response("a", 2, 3, "stop", [1, 2]))
    return set(re.findall(r"^(lmdeploy:\w+)", metrics.render().decode(), re.MULTILINE))


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, arguments) of a Dockerfile, continued lines joined."""
    text = re.sub(r"\\\n\s*", " ", path.read_text(encoding="utf-8"))
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines]


def last(path: Path, name: str) -> str:
    return [arguments for instruction, arguments in instructions(path) if instruction == name][-1]


def command(words: list[str]) -> Any:
    """The parsed arguments; words that would exit the parser fail the test."""
    return parse(shlex.join(words))


def load(name: str) -> Any:
    return list(yaml.safe_load_all((DEPLOY / name).read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", sorted([*DEPLOY.rglob("*.y*ml"), *DEPLOY.rglob("*.json")]), ids=lambda path: path.name)
def test_files_parse(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    documents = [json.loads(text)] if path.suffix == ".json" else list(yaml.safe_load_all(text))
    assert documents
    assert all(isinstance(document, dict) and document for document in documents)


def test_the_dashboard_shows_metrics_that_there_are() -> None:
    board = json.loads((DEPLOY / "grafana/dashboards/lmdeploy.json").read_text(encoding="utf-8"))
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked += [variable["query"]["query"] for variable in board["templating"]["list"]]
    names = {name for text in asked for name in re.findall(r"lmdeploy:\w+", text)}
    assert len(names) > 10
    assert names <= exported_metrics()
    # A rate of something that is no counter, or a quantile of something that is no histogram, shows nonsense.
    for text in asked:
        assert all(name.endswith(("_total", "_bucket")) for name in re.findall(r"rate\((lmdeploy:\w+)", text))
    source = load("grafana/provisioning/datasources/prometheus.yaml")[0]["datasources"][0]
    assert {panel["datasource"]["uid"] for panel in board["panels"]} == {source["uid"]}
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
    assert len(set(places)) == len(places)


def test_prometheus_asks_the_server() -> None:
    (job,) = load("prometheus.yml")[0]["scrape_configs"]
    services = load("compose.yaml")[0]["services"]
    host, port = job["static_configs"][0]["targets"][0].split(":")
    assert host in services
    assert f":{port}:{port}" in services[host]["ports"][0]
    assert job["metrics_path"] == "/metrics"


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_images(path: Path) -> None:
    entry = json.loads(last(path, "ENTRYPOINT"))
    args = command([*entry, MODEL, "--tp", "1"])
    assert (args.kind, args.model, args.server_name) == ("api_server", MODEL, "0.0.0.0")
    assert command(entry).model is None
    assert last(path, "EXPOSE") == str(args.server_port)
    assert last(path, "USER").split(":")[0] not in ("root", "0")
    health = last(path, "HEALTHCHECK")
    assert re.search(r"127\.0\.0\.1:(\d+)(/[\w/]+)", health).groups() == (str(args.server_port), "/health")  # type: ignore[union-attr]
    for name, arguments in instructions(path):
        for source in shlex.split(arguments)[:-1] if name == "COPY" else []:
            assert (ROOT / source).exists(), source
    comment = path.read_text(encoding="utf-8").splitlines()[0]
    assert f"-f deploy/{path.name} " in comment


def test_compose() -> None:
    services = load("compose.yaml")[0]["services"]
    server = services["server"]
    entry = json.loads(last(DEPLOY.parent / server["build"]["dockerfile"], "ENTRYPOINT"))
    assert command([*entry, *server["command"]]).session_len == 4096
    assert all(port.startswith("127.0.0.1:") for service in services.values() for port in service.get("ports", []))
    assert all(service["cap_drop"] == ["ALL"] for service in services.values())
    files = [mount.split(":")[0] for service in services.values() for mount in service.get("volumes", [])]
    assert all((DEPLOY / name).exists() for name in files if name.startswith("."))
    over = load("compose.cuda.yaml")[0]["services"]["server"]
    assert (DEPLOY.parent / over["build"]["dockerfile"]) in DOCKERFILES
    assert int(server["stop_grace_period"].removesuffix("s")) > command([*entry]).drain_timeout


def test_kubernetes() -> None:
    kinds = {document["kind"]: document for document in load("kubernetes.yaml")}
    assert set(kinds) == {"Deployment", "PersistentVolumeClaim", "Service"}
    pod = kinds["Deployment"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    probes = {name: container[name]["httpGet"]["path"] for name in container if name.endswith("Probe")}
    assert probes == {
        "startupProbe": "/health/live",
        "livenessProbe": "/health",
        "readinessProbe": "/health/ready",
    }
    assert set(probes.values()) <= OPEN_PATHS  # a probe has no key
    entry = json.loads(last(DEPLOY / "Dockerfile.cuda", "ENTRYPOINT"))
    args = command([*entry, *container["args"]])
    assert args.api_keys == ["$(API_KEY)"]
    assert container["ports"] == [{"name": "http", "containerPort": args.server_port}]
    assert pod["spec"]["securityContext"]["runAsNonRoot"]
    assert str(pod["spec"]["securityContext"]["runAsUser"]) == last(DEPLOY / "Dockerfile.cuda", "USER").split(":")[0]
    assert pod["spec"]["terminationGracePeriodSeconds"] > args.drain_timeout
    assert kinds["Service"]["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert kinds["Service"]["spec"]["ports"][0]["targetPort"] == "http"
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    claim = volumes["cache"]["persistentVolumeClaim"]["claimName"]
    assert [claim] == [kinds["PersistentVolumeClaim"]["metadata"]["name"]]


def test_the_probed_paths_are_served(serve: Any) -> None:
    schema = serve().get("/openapi.json").json()
    assert {"/health", "/health/live", "/health/ready", "/metrics"} <= set(schema["paths"])


def test_systemd() -> None:
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string((DEPLOY / "lmdeploy.service").read_text(encoding="utf-8"))
    service = unit["Service"]
    words = shlex.split(service["ExecStart"].replace("$LMDEPLOY_ARGS", f"{MODEL} --api-keys KEY"))
    args = command(["lmdeploy", *words[1:]])
    assert Path(words[0]).name == "lmdeploy"
    assert (args.model, args.api_keys) == (MODEL, ["KEY"])
    assert service["User"] == "lmdeploy"
    assert int(service["TimeoutStopSec"]) > args.drain_timeout
    assert service["KillMode"] == "mixed"
