"""Running proxies and scripted nodes."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest

from lmdeploy.serve.proxy.proxy import Proxy
from lmdeploy.serve.proxy.server import ProxyServer
from lmdeploy.serve.proxy.settings import ProxySettings
from lmdeploy.serve.server import bind
from tests.serve.proxy.fake_node import FakeNode, Loop, Script, answer

BODY = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


class RunningProxy:
    """A proxy on a port of its own, and a client of it that waits for no pool and follows no redirect."""

    def __init__(self, settings: ProxySettings) -> None:
        self.proxy = Proxy(settings, random.Random(0))
        self.server = ProxyServer(self.proxy, drain_timeout_s=2.0)
        sock = bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        self.client = httpx2.Client(base_url=self.url, timeout=15, trust_env=False)
        self._thread = threading.Thread(target=self.server.run_on, args=(sock,))
        self._thread.start()
        wait_for(lambda: self.server.started)

    def post(self, path: str, body: Any, **options: Any) -> httpx2.Response:
        return self.client.post(path, json=body, **options)

    def chat(self, **fields: Any) -> httpx2.Response:
        return self.post("/v1/chat/completions", {**BODY, **fields})

    def stream(self, path: str = "/v1/chat/completions", **fields: Any) -> Any:
        return self.client.stream("POST", path, json={**BODY, "stream": True, **fields})

    def add(self, *nodes: FakeNode, **status: Any) -> None:
        for node in nodes:
            added = self.post("/nodes/add", {"url": node.url, "status": status})
            assert added.status_code == 200, added.text

    def states(self) -> dict[str, str]:
        return {url: node["state"] for url, node in self.client.get("/nodes/status").json().items()}

    def metric(self, name: str) -> float:
        """The sum over all labels."""
        lines = self.client.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"lmdeploy:proxy_{name}"))

    def close(self) -> None:
        self.client.close()
        self.proxy.is_draining = True
        self._thread.join(10)
        assert not self._thread.is_alive()


@pytest.fixture(scope="module")
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.stop()


@pytest.fixture
def node(loop: Loop) -> Iterator[Callable[..., FakeNode]]:
    """node(script, models) -> FakeNode."""
    made: list[FakeNode] = []

    def make(script: Script = answer, models: tuple[str, ...] = ("m",)) -> FakeNode:
        made.append(FakeNode(loop, script, models))
        return made[-1]

    yield make
    for one in made:
        one.kill()


@pytest.fixture
def proxy() -> Iterator[Callable[..., RunningProxy]]:
    """proxy(**settings) -> RunningProxy."""
    made: list[RunningProxy] = []

    def make(**settings: Any) -> RunningProxy:
        made.append(RunningProxy(ProxySettings(**{"heartbeat_interval_s": 60.0, **settings})))
        return made[-1]

    yield make
    for one in made:
        one.close()


def wait_for(condition: Callable[[], bool], seconds: float = 8.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)
