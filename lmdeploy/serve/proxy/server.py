"""The proxy listening on a socket, its heartbeat beside it. It knows no endpoint."""

from __future__ import annotations

import socket

from lmdeploy.serve.proxy.app import create_app
from lmdeploy.serve.proxy.proxy import Proxy
from lmdeploy.serve.server import Server, Tls


class ProxyServer(Server):
    """Signals drain it as they drain a server: what has begun ends, nothing new is taken."""

    def __init__(
        self, proxy: Proxy, *, drain_timeout_s: float = 60.0, log_level: str = "warning", tls: Tls | None = None
    ) -> None:
        super().__init__(create_app(proxy), drain_timeout_s=drain_timeout_s, log_level=log_level, tls=tls)
        self._proxy = proxy

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        async with self._proxy.running():
            await super().serve(sockets)
