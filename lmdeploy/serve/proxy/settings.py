"""What one proxy runs with. It knows no flags."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProxySettings:
    """strategy: a key of routing.STRATEGIES. api_keys: empty means that nobody needs one; admin_api_key: what `/nodes/*`
    asks for, None for any of api_keys.

    max_attempts: nodes that one request is tried on. node_timeout_s: silence of a node in the midst of a request, after
    which the request fails; None waits. A node is probed every heartbeat_interval_s, is passed over after
    failure_threshold failures in a row, and is forgotten heartbeat_expiration_s after its last good probe.
    max_load_ratio, max_load_excess: the bounds of routing.CacheAware. state_path: where the nodes outlive the proxy.
    """

    strategy: str = "min_expected_latency"
    api_keys: tuple[str, ...] = ()
    admin_api_key: str | None = None
    max_attempts: int = 3
    node_timeout_s: float | None = None
    heartbeat_interval_s: float = 5.0
    heartbeat_expiration_s: float = 90.0
    failure_threshold: int = 3
    max_concurrent_requests: int = 4096
    max_load_ratio: float = 1.5
    max_load_excess: int = 8
    max_body_bytes: int = 16 << 20
    body_timeout_s: float = 60.0
    allow_origins: tuple[str, ...] = ()
    state_path: Path | None = None
