"""The nodes that there are: joining, leaving, and the heartbeat that finds out which are alive. It routes nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Literal

import httpx2
import msgspec

from lmdeploy.errors import InvalidParameter
from lmdeploy.logging import get_logger
from lmdeploy.serve.proxy import state_file
from lmdeploy.serve.proxy.addresses import check_host, node_url
from lmdeploy.serve.proxy.breaker import CircuitBreaker
from lmdeploy.serve.proxy.node import Node
from lmdeploy.serve.proxy.settings import ProxySettings

MAX_NODES = 1024
MAX_MODELS = 256
_PROBE_TIMEOUT_S = 5.0
_TICK_S = 0.5


class _Card(msgspec.Struct):
    id: str


class _Cards(msgspec.Struct):
    data: list[_Card]


class Registry:
    """client, headers: for the proxy's own questions. on_lost: called with a node that has failed or left."""

    def __init__(
        self,
        settings: ProxySettings,
        client: httpx2.AsyncClient,
        on_lost: Callable[[Node], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.nodes: dict[str, Node] = {}
        self._settings = settings
        self._client = client
        self._on_lost = on_lost
        self._clock = clock
        self.headers = {"Authorization": f"Bearer {settings.api_keys[0]}"} if settings.api_keys else {}

    def models(self) -> list[str]:
        """The names of all models that some node serves."""
        return sorted({name for node in self.nodes.values() for name in node.models})

    def serving(self, model: str) -> list[Node]:
        return [node for node in self.nodes.values() if model in node.models]

    async def add(self, url: str, models: Sequence[str] = (), speed: float | None = None) -> Node:
        """Take a node in, or up to date; one that is there already keeps its history.

        models: empty asks the node. Raises InvalidParameter for an address that may not be, or where nobody answers.
        """
        url = node_url(url)
        if url not in self.nodes and len(self.nodes) >= MAX_NODES:
            raise InvalidParameter(f"there are {MAX_NODES} nodes already, no more are taken")
        await check_host(url)
        if await self._health(url) != "healthy":
            raise InvalidParameter(f"{url} does not answer GET /health; start the server before it is added")
        names = tuple(models) or await self._ask_models(url)
        node = self.nodes.get(url)
        has_changed = node is None or (node.models, node.speed) != (names, speed)
        if node is None:
            node = self.nodes[url] = self._new_node(url, names, speed)
            get_logger().info("%s serves %s", url, ", ".join(names))
        node.models, node.speed = names, speed
        self._seen(node)
        if has_changed:
            self._save()
        return node

    def remove(self, url: str) -> Node:
        """Forget a node. What it has begun to answer goes on. Raises InvalidParameter if it is not there."""
        node = self.nodes.pop(node_url(url), None)
        if node is None:
            raise InvalidParameter(f"there is no node {url!r}; GET /nodes/status lists them")
        self._on_lost(node)
        self._save()
        return node

    def restore(self) -> None:
        """The nodes of the state file; each has to answer a probe before it is asked."""
        if self._settings.state_path is None:
            return
        for url, saved in state_file.load(self._settings.state_path)[:MAX_NODES]:
            node = self.nodes[url] = self._new_node(url, saved.models[:MAX_MODELS], saved.speed)
            node.breaker.fail(is_fatal=True)

    def failed(self, node: Node, *, is_fatal: bool = False) -> None:
        """A request or a probe got no answer from the node."""
        if node.breaker.fail(is_fatal=is_fatal):
            get_logger().warning("%s does not answer; its requests go elsewhere", node.url)
            self._on_lost(node)
            node.lose()

    async def watch(self) -> None:
        """The heartbeat, until cancelled: probes the nodes that are due and drops those that stay silent."""
        while True:
            await asyncio.gather(*(self.probe(node) for node in self._due()))
            await asyncio.sleep(min(_TICK_S, self._settings.heartbeat_interval_s))

    async def probe(self, node: Node) -> None:
        """GET /health of one node, and what follows from it."""
        node.probe_at = self._clock() + self._settings.heartbeat_interval_s
        was_open = node.breaker.state == "open"
        try:
            await check_host(node.url)
            health = await self._health(node.url)
        except InvalidParameter as error:
            get_logger().warning("%s", error)
            health = "unreachable"
        if health == "healthy":
            if was_open or node.breaker.state != "open":  # else it has failed since it was asked
                self._seen(node)
            return
        self.failed(node, is_fatal=health == "unreachable")
        silence_s = self._clock() - node.seen_at
        if silence_s >= self._settings.heartbeat_expiration_s and self.nodes.get(node.url) is node:
            get_logger().warning("%s has been silent for %.0f s and is forgotten", node.url, silence_s)
            del self.nodes[node.url]
            node.lose()
            self._on_lost(node)
            self._save()

    def _due(self) -> list[Node]:
        now = self._clock()

        def is_due(node: Node) -> bool:
            return node.breaker.may_retry or (node.breaker.state != "open" and now >= node.probe_at)

        return [node for node in self.nodes.values() if is_due(node)]

    def _new_node(self, url: str, models: Sequence[str], speed: float | None) -> Node:
        breaker = CircuitBreaker(self._settings.failure_threshold, clock=self._clock)
        return Node(url, models, speed, breaker=breaker, clock=self._clock)

    def _seen(self, node: Node) -> None:
        node.seen_at = self._clock()
        node.probe_at = node.seen_at + self._settings.heartbeat_interval_s
        node.breaker.half_open()

    async def _health(self, url: str) -> Literal["healthy", "unhealthy", "unreachable"]:
        """unreachable: nobody listens. Any answer but a server's error is healthy: a server without /health is alive, too."""
        try:
            answer = await self._client.get(f"{url}/health", headers=self.headers, timeout=_PROBE_TIMEOUT_S)
        except httpx2.ConnectError:
            return "unreachable"
        except httpx2.HTTPError:
            return "unhealthy"
        return "healthy" if answer.status_code < 500 else "unhealthy"

    async def _ask_models(self, url: str) -> tuple[str, ...]:
        try:
            answer = await self._client.get(f"{url}/v1/models", headers=self.headers, timeout=_PROBE_TIMEOUT_S)
            names = [card.id for card in msgspec.json.decode(answer.content, type=_Cards).data]
        except (httpx2.HTTPError, msgspec.MsgspecError) as error:
            raise InvalidParameter(f"{url} does not tell its models at GET /v1/models; give status.models") from error
        if not names:
            raise InvalidParameter(f"{url} serves no model")
        return tuple(names[:MAX_MODELS])

    def _save(self) -> None:
        if self._settings.state_path is not None:
            state_file.save(self._settings.state_path, self.nodes.values())
