"""A server that joins a proxy: heartbeats, a proxy that comes late or refuses, the farewell."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from lmdeploy.errors import ConfigError
from lmdeploy.logging import get_logger
from lmdeploy.serve.registration import Registration, reachable_url
from tests.serve.proxy.conftest import wait_for
from tests.serve.proxy.fake_node import FakeNode, Loop, Received, Reply

NODE = "http://127.0.0.1:4"


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.stop()


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    get_logger().addHandler(handler)
    yield said
    get_logger().removeHandler(handler)


def test_heartbeats_and_farewell(loop: Loop) -> None:
    proxy = FakeNode(loop)
    is_ready = is_draining = False
    registration = Registration(proxy.url + "/", NODE, ["m"], api_key="k", interval_s=0.2)
    with registration.during(lambda: is_ready, lambda: is_draining):
        assert proxy.received == []
        is_ready = True
        wait_for(lambda: len(proxy.received) >= 2)
        first = proxy.received[0]
        assert (first.path, first.headers["authorization"]) == ("/nodes/add", "Bearer k")
        assert first.json == {"url": NODE, "status": {"models": ["m"], "role": "Hybrid"}}
        assert {received.path for received in proxy.received} == {"/nodes/add"}
        is_draining = True
        wait_for(lambda: proxy.received[-1].path == "/nodes/remove")
    assert proxy.received[-1].json == {"url": NODE}
    assert [received.path for received in proxy.received].count("/nodes/remove") == 1


def test_a_proxy_that_comes_late(loop: Loop, warnings: list[str]) -> None:
    proxy = FakeNode(loop)
    proxy.kill()
    with Registration(proxy.url, NODE, ["m"], interval_s=0.1).during():
        wait_for(lambda: bool(warnings))
        proxy.start()
        wait_for(lambda: bool(proxy.received))
    assert len(warnings) == 1
    assert f"the proxy {proxy.url} does not take {NODE}" in warnings[0]


def test_a_proxy_that_refuses_is_told_once(loop: Loop, warnings: list[str]) -> None:
    async def refuse(received: Received, reply: Reply) -> None:
        await reply.whole({"error": {"message": "give a key"}}, 401)

    proxy = FakeNode(loop, refuse)
    with Registration(proxy.url, NODE, ["m"], interval_s=0.1).during():
        wait_for(lambda: len(proxy.received) >= 3)
    assert len(warnings) == 1
    assert "401" in warnings[0]
    assert "give a key" in warnings[0]
    assert proxy.received[-1].path == "/nodes/add"  # who was never taken in does not leave


def test_a_server_that_never_gets_ready(loop: Loop) -> None:
    proxy = FakeNode(loop)
    with Registration(proxy.url, NODE, ["m"]).during(is_ready=lambda: False):
        pass
    assert proxy.received == []


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://x", "http://", "http://h:x", "http://h:0"])
def test_addresses_that_are_no_proxy(url: str) -> None:
    with pytest.raises(ConfigError, match="--proxy-url"):
        Registration(url, NODE, ["m"])
    with pytest.raises(ConfigError, match="--proxy-url"):
        reachable_url("0.0.0.0", 1, is_tls=False, proxy_url=url)


def test_where_the_proxy_finds_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = "http://127.0.0.1:8000"
    assert reachable_url("10.0.0.5", 23333, is_tls=False, proxy_url=proxy) == "http://10.0.0.5:23333"
    assert reachable_url("::1", 23333, is_tls=True, proxy_url=proxy) == "https://[::1]:23333"
    assert reachable_url("0.0.0.0", 23333, is_tls=False, proxy_url=proxy) == "http://127.0.0.1:23333"

    def unknown(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ConfigError, match="Name or service not known"):
        reachable_url("0.0.0.0", 1, is_tls=False, proxy_url="http://proxy:8000")
