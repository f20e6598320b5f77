"""The proxy itself: nodes, strategy, counters, and the way of a request between them. It knows no endpoint."""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import httpx2
from starlette.types import Send

from lmdeploy.serve.errors import Draining, Overloaded
from lmdeploy.serve.proxy.ask import RESPONSES, Ask
from lmdeploy.serve.proxy.exchange import Exchange
from lmdeploy.serve.proxy.homes import ResponseHomes
from lmdeploy.serve.proxy.metrics import ProxyMetrics
from lmdeploy.serve.proxy.node import Node
from lmdeploy.serve.proxy.prefix import prefix_of
from lmdeploy.serve.proxy.refusals import Refused, no_such_model, unavailable
from lmdeploy.serve.proxy.registry import Registry
from lmdeploy.serve.proxy.routing import STRATEGIES, node_of_session
from lmdeploy.serve.proxy.settings import ProxySettings

_CONNECT_TIMEOUT_S = 5.0
# Less than the 5 seconds after which most servers close a connection that is idle.
_KEEP_ALIVE_S = 2.0


class Proxy:
    """num_active, is_draining: what the server that runs it asks for and sets."""

    def __init__(self, settings: ProxySettings, rng: random.Random | None = None) -> None:
        self.settings = settings
        self.metrics = ProxyMetrics()
        self.homes = ResponseHomes()
        self.created = int(time.time())
        self.num_active = 0
        self.is_draining = False
        self._strategy = STRATEGIES[settings.strategy](settings, rng or random.Random())
        self.client = httpx2.AsyncClient(
            timeout=httpx2.Timeout(settings.node_timeout_s, connect=_CONNECT_TIMEOUT_S),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=256, keepalive_expiry=_KEEP_ALIVE_S),
            verify=ssl.create_default_context(),
            trust_env=False,  # nodes are asked directly, whatever proxy the environment names
        )
        self.registry = Registry(settings, self.client, self._strategy.forget)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The heartbeat runs and connections are open while the context is."""
        self.registry.restore()
        heartbeat = asyncio.ensure_future(self.registry.watch())
        try:
            yield
        finally:
            heartbeat.cancel()
            with suppress(asyncio.CancelledError):
                await heartbeat
            await self.client.aclose()

    def problem(self) -> str | None:
        """Why no request can be answered now; None if some node is there."""
        if self.is_draining:
            return "shutting down"
        return (
            None if any(node.breaker.state != "open" for node in self.registry.nodes.values()) else "no server is there"
        )

    async def forward(self, ask: Ask, send: Send) -> None:
        """Answer the request from a node. Raises Refused, Overloaded or Draining before anything is sent."""
        if self.is_draining:
            raise Draining("the proxy is shutting down; ask again later")
        if self.num_active >= self.settings.max_concurrent_requests:
            raise Overloaded(f"{self.num_active} requests are in work, the most there may be; ask again later")
        self.num_active += 1
        try:
            await self._exchange(ask, send).run()
        except Refused as error:
            self.metrics.refused.labels(error.problem.status).inc()
            raise
        finally:
            self.num_active -= 1

    def _exchange(self, ask: Ask, send: Send) -> Exchange:
        model = self._model(ask)
        prefix = prefix_of(ask.fields, f"{model}\0{ask.tenant}") if self._strategy.reads_prefix else ()

        def choose(passed: set[Node]) -> Node:
            nodes = self._ready(model, passed)
            if ask.session is not None:
                return node_of_session(nodes, ask.session)
            return self.homes.find(ask.response_id, nodes) or self._strategy.choose(nodes, prefix)

        def on_first(node: Node, head: bytes) -> None:
            if ask.path == RESPONSES:
                self.homes.learn(node, head)

        return Exchange(
            ask,
            model,
            send,
            choose,
            on_first,
            client=self.client,
            registry=self.registry,
            metrics=self.metrics,
            max_attempts=self.settings.max_attempts,
        )

    def _model(self, ask: Ask) -> str:
        """The model that the request means; on an endpoint without names, the only one."""
        known = self.registry.models()
        if not known:
            raise unavailable("no server is there; ask again later")
        if ask.model is None and len(known) == 1:
            return known[0]
        if ask.model is None or ask.model not in known:
            raise no_such_model(ask.model, known)
        return ask.model

    def _ready(self, model: str, passed: set[Node]) -> list[Node]:
        """Nodes of the model that may be asked. One on trial gets a second request only where there is no other."""
        nodes = [node for node in self.registry.serving(model) if node not in passed]
        ready = [node for node in nodes if node.breaker.admits()]
        ready = ready or [node for node in nodes if node.breaker.state == "half_open"]
        if not ready:
            raise unavailable(f"no server of {model!r} answers now; ask again later")
        return ready
