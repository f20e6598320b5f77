"""What one server runs with. It knows neither flags nor the engine's own settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ServerSettings:
    """api_keys: empty means that nobody needs one. max_concurrent_requests: answers in work or waiting, beyond which a
    request gets 429; None is 8 times the engine's batch. max_queued_tokens: the same bound for the tokens of their prompts;
    None is 4 times what the KV cache holds. admin_api_key: opens the endpoints of administration, to its bearer only;
    allow_terminate and allow_abort open one of them to every client. weights_dir: the folder below which /update_weights
    takes weights. has_request_log: one line a request, through the package's logger. heartbeat_timeout_s: silence of a step
    loop that has work, after which the server is not healthy. allow_origins, allow_methods, allow_headers,
    allow_credentials: cross-origin requests from browsers; no origin switches them off.
    """

    model_name: str
    api_keys: tuple[str, ...] = ()
    max_concurrent_requests: int | None = None
    max_queued_tokens: int | None = None
    max_body_bytes: int = 16 << 20
    body_timeout_s: float = 60.0
    heartbeat_timeout_s: float = 60.0
    allow_origins: tuple[str, ...] = ("*",)
    allow_methods: tuple[str, ...] = ("*",)
    allow_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False
    has_docs: bool = True
    has_metrics: bool = True
    admin_api_key: str | None = None
    allow_terminate: bool = False
    allow_abort: bool = False
    weights_dir: Path | None = None
    has_request_log: bool = False
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
