"""/nodes/*: who joins and leaves, who may say so, what outlives the proxy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.serve.driver import error_of
from tests.serve.proxy.conftest import BODY, wait_for

ROUTES = (("GET", "/nodes/status"), ("POST", "/nodes/add"), ("POST", "/nodes/remove"), ("POST", "/nodes/terminate"))


def test_a_node_joins_and_leaves(proxy: Any, node: Any) -> None:
    running, target = proxy(), node(models=("a", "b"))
    added = running.post("/nodes/add", {"url": target.url + "/"})
    assert added.status_code == 200
    status = running.client.get("/nodes/status").json()
    assert list(status) == [target.url]
    shown = status[target.url]
    assert (shown["models"], shown["role"], shown["speed"], shown["unfinished"]) == (["a", "b"], "Hybrid", None, 0)
    assert running.chat(model="a").status_code == 200
    assert len(running.client.get("/nodes/status").json()[target.url]["latency"]) == 1
    assert running.post("/nodes/remove", {"url": target.url}).status_code == 200
    assert running.client.get("/nodes/status").json() == {}
    missing = running.post("/nodes/remove", {"url": target.url})
    assert missing.status_code == 400
    assert "no node" in error_of(missing)["message"]


def test_the_form_of_older_versions(proxy: Any, node: Any) -> None:
    running, target = proxy(), node()
    status = {"models": ["x"], "role": 1, "speed": 3, "unfinished": 7, "latency": [0.5]}
    assert running.post("/nodes/add", {"url": target.url, "status": status}).status_code == 200
    shown = running.client.get("/nodes/status").json()[target.url]
    assert (shown["models"], shown["speed"], shown["unfinished"]) == (["x"], 3.0, 0)
    assert running.client.post("/nodes/remove", params={"node_url": target.url}).status_code == 200


def test_a_heartbeat_brings_a_node_up_to_date(proxy: Any, node: Any) -> None:
    running, target = proxy(), node()
    running.add(target, models=["x"])
    running.chat(model="x")
    running.add(target, models=["x", "y"], speed=2)
    shown = running.client.get("/nodes/status").json()[target.url]
    assert (shown["models"], shown["speed"], len(shown["latency"])) == (["x", "y"], 2.0, 1)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://169.254.169.254", "169.254.169.254, where no server may be"),
        ("http://metadata.google.internal", "metadata service"),
        ("http://[fd00:ec2::254]:80", "fd00:ec2::254, where no server may be"),
        ("http://2852039166/", "169.254.169.254, where no server may be"),
        ("http://127.0.0.1:1", "does not answer GET /health"),
        ("file:///etc/passwd", "no address of a server"),
        ("http://u:p@127.0.0.1:80", "no address of a server"),
        ("http://127.0.0.1:80/path?x", "no address of a server"),
        ("http://no-such-host.invalid", "is not known here"),
        ("x" * 301, "url"),
        ("", "no address of a server"),
    ],
)
def test_addresses_that_are_refused(proxy: Any, url: str, message: str) -> None:
    running = proxy()
    answer = running.post("/nodes/add", {"url": url, "status": {"models": ["m"]}})
    assert answer.status_code == 400
    assert message in error_of(answer)["message"]
    assert running.client.get("/nodes/status").json() == {}


@pytest.mark.parametrize(
    "status",
    [{"role": "Prefill"}, {"speed": 0}, {"speed": -1}, {"models": [""]}, {"models": ["x" * 600]}, {"models": "x"}],
)
def test_a_status_out_of_bounds(proxy: Any, node: Any, status: Any) -> None:
    running, target = proxy(), node()
    answer = running.post("/nodes/add", {"url": target.url, "status": status})
    assert answer.status_code == 400
    assert running.client.get("/nodes/status").json() == {}


def test_keys(proxy: Any, node: Any) -> None:
    running, target = proxy(api_keys=("k1", "k2")), node()
    for method, path in (*ROUTES, ("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("GET", "/metrics")):
        for headers in ({}, {"Authorization": "Bearer k3"}):
            assert running.client.request(method, path, headers=headers, json=BODY).status_code == 401
    running.client.headers["Authorization"] = "Bearer k2"
    running.add(target)
    assert running.chat().status_code == 200
    assert target.received[0].headers["authorization"] == "Bearer k2"
    assert running.client.get("/health", headers={"Authorization": ""}).status_code == 200


def test_the_administrators_key(proxy: Any, node: Any) -> None:
    running, target = proxy(api_keys=("k",), admin_api_key="root"), node()
    for method, path in ROUTES:
        for key in ("", "Bearer k", "Bearer roo"):
            answer = running.client.request(method, path, headers={"Authorization": key}, json={"url": target.url})
            assert answer.status_code == 401
    admin = {"Authorization": "Bearer root"}
    assert running.post("/nodes/add", {"url": target.url}, headers=admin).status_code == 200
    assert running.post("/v1/completions", BODY, headers=admin).status_code == 401
    assert running.post("/v1/completions", BODY, headers={"Authorization": "Bearer k"}).status_code == 200


def test_terminate(proxy: Any, node: Any) -> None:
    running, nodes = proxy(api_keys=("k",)), [node(), node(), node()]
    running.client.headers["Authorization"] = "Bearer k"
    running.add(*nodes)
    assert running.post("/nodes/terminate", {"url": nodes[0].url}).json() == {nodes[0].url: "ends"}
    nodes[1].kill()
    told = running.client.get("/nodes/terminate_all").json()
    assert told == {nodes[1].url: "does not answer", nodes[2].url: "ends"}
    assert [one.all_paths.count("GET /terminate") for one in nodes] == [1, 0, 1]
    assert running.client.get("/nodes/status").json() == {}


def test_nobody_terminates_without_any_key(proxy: Any, node: Any) -> None:
    running, target = proxy(), node()
    running.add(target)
    assert running.post("/nodes/terminate", {"url": target.url}).status_code == 404
    assert running.client.get("/nodes/terminate_all").status_code == 404
    assert list(running.states()) == [target.url]


def test_web_pages_cannot_add_nodes(proxy: Any, node: Any) -> None:
    """A page may post text without asking first; JSON it may not, and is not told that it might."""
    running, target = proxy(), node()
    plain = {"Content-Type": "text/plain", "Origin": "http://page"}
    assert running.client.post("/nodes/add", content=json.dumps({"url": target.url}), headers=plain).status_code == 400
    asks = {"Origin": "http://page", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in running.client.options("/nodes/add", headers=asks).headers
    allowed = proxy(allow_origins=("http://page",)).client.options("/v1/completions", headers=asks)
    assert allowed.headers["access-control-allow-origin"] == "http://page"


def test_nodes_outlive_the_proxy(proxy: Any, node: Any, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "proxy_config.json"
    first, target, gone = proxy(state_path=path), node(), node()
    first.add(target, speed=4)
    first.add(gone)
    assert path.stat().st_mode & 0o077 == 0
    gone.kill()
    saved = json.loads(path.read_text())
    saved["http://169.254.169.254"] = saved["ftp://x"] = {"models": ["m"]}
    path.write_text(json.dumps(saved))
    second = proxy(state_path=path)
    assert second.client.get("/nodes/status").json()[target.url]["speed"] == 4.0
    wait_for(lambda: second.states()[target.url] == "half_open")
    assert {second.chat().status_code for _ in range(5)} == {200}
    assert second.states() == {target.url: "closed", gone.url: "open", "http://169.254.169.254": "open"}
    second.post("/nodes/remove", {"url": target.url})
    assert target.url not in json.loads(path.read_text())


@pytest.mark.parametrize("content", ["", "[]", "{", '{"x": 1}', '{"http://127.0.0.1:1": {"models": 5}}'])
def test_a_state_file_that_is_not_ours(proxy: Any, node: Any, tmp_path: Path, content: str) -> None:
    path = tmp_path / "proxy_config.json"
    path.write_text(content)
    running = proxy(state_path=path)
    assert running.client.get("/nodes/status").json() == {}
    running.add(node())
    assert len(json.loads(path.read_text())) == 1


def test_metrics(proxy: Any, node: Any) -> None:
    running, target = proxy(), node()
    running.add(target)
    for _ in range(3):
        running.chat()
    running.chat(model="other")
    text = running.client.get("/metrics").text
    assert f'lmdeploy:proxy_requests_total{{model_name="m",node="{target.url}",status="200"}} 3.0' in text
    assert 'lmdeploy:proxy_requests_refused_total{status="404"} 1.0' in text
    assert 'lmdeploy:proxy_nodes{state="closed"} 1.0' in text
    assert 'lmdeploy:proxy_time_to_first_byte_seconds_count{model_name="m"} 3.0' in text
    assert f'lmdeploy:proxy_node_requests{{node="{target.url}"}} 0.0' in text
