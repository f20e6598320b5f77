"""What one server runs with. It knows neither flags nor the engine's own settings."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServerSettings:
    """api_keys: empty means that nobody needs one. max_concurrent_requests: answers in work or waiting, beyond which a
    request gets 429; None is 8 times the engine's batch. heartbeat_timeout_s: silence of a step loop that has work, after
    which the server is not healthy. allow_*: cross-origin requests from browsers; no origin switches them off.
    """

    model_name: str
    api_keys: tuple[str, ...] = ()
    max_concurrent_requests: int | None = None
    max_body_bytes: int = 16 << 20
    body_timeout_s: float = 60.0
    heartbeat_timeout_s: float = 60.0
    allow_origins: tuple[str, ...] = ("*",)
    allow_methods: tuple[str, ...] = ("*",)
    allow_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False
    has_docs: bool = True
    has_metrics: bool = True
