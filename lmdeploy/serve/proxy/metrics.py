"""Counters of one proxy for Prometheus. It knows nodes by their address and sends nothing."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from lmdeploy.serve.proxy.node import Node

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_STATES = ("closed", "half_open", "open")


class ProxyMetrics:
    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = self._counter("requests", "requests that a node has answered", "model_name", "node", "status")
        self.refused = self._counter("requests_refused", "requests that the proxy answered itself", "status")
        self.retries = self._counter("retries", "requests sent to another node because this one failed", "node")
        self.broken = self._counter("streams_broken", "answers that ended with an error midway", "node")
        self.disconnects = self._counter("client_disconnects", "clients that went away before their answer's end")
        self.first_byte = self._histogram("time_to_first_byte_seconds", "from arrival to the answer's first byte")
        self.whole = self._histogram("e2e_request_latency_seconds", "from arrival to the answer's last byte")
        self._active = Gauge(
            "lmdeploy:proxy_requests_active", "requests in work or waiting for a node", registry=self._registry
        )
        self._nodes = self._gauge("nodes", "nodes by the state of their circuit breaker", "state")
        self._unfinished = self._gauge("node_requests", "requests that are with the node", "node")

    def render(self, nodes: Iterable[Node], num_active: int) -> bytes:
        """The text format, with the nodes as they are now."""
        self._active.set(num_active)
        self._nodes.clear()
        self._unfinished.clear()
        for state in _STATES:
            self._nodes.labels(state).set(0)
        for node in nodes:
            self._nodes.labels(node.breaker.state).inc()
            self._unfinished.labels(node.url).set(node.unfinished)
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"lmdeploy:proxy_{name}", text, labels, registry=self._registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"lmdeploy:proxy_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"lmdeploy:proxy_{name}", text, ("model_name",), registry=self._registry, buckets=_SECONDS)
