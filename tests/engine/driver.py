"""Runs requests through an Engine in the caller's thread."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from lmdeploy.engine.config import EngineConfig
from lmdeploy.engine.core import Engine
from lmdeploy.engine.request import Request, RequestOutput, SamplingParams


def make_engine(path: Path, **config: object) -> Engine:
    """An engine in float32 with small blocks, so that a few tokens cross many block borders."""
    defaults: dict[str, object] = {"dtype": "float32", "device": "cpu", "block_size": 16, "cache_max_entry_count": 64}
    return Engine(path, EngineConfig(**{**defaults, **config}))  # type: ignore[arg-type]


def run(engine: Engine, requests: Iterable[Request]) -> dict[str, RequestOutput]:
    """Add all requests, step until idle, and return each request's outputs joined into one."""
    joined: dict[str, RequestOutput] = {}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for output in engine.step():
            join(joined, output)
    return joined


def join(joined: dict[str, RequestOutput], output: RequestOutput) -> None:
    whole = joined.setdefault(output.request_id, RequestOutput(output.request_id))
    whole.token_ids.extend(output.token_ids)
    whole.finish_reason = output.finish_reason
    whole.cached_tokens = output.cached_tokens
    if output.logprobs is not None:
        whole.logprobs = (whole.logprobs or []) + output.logprobs
    if output.prompt_logprobs is not None:
        whole.prompt_logprobs = output.prompt_logprobs
    for name in ("logits", "hidden_states"):
        part = getattr(output, name)
        if part is not None:
            whole_part = getattr(whole, name)
            setattr(whole, name, part if whole_part is None else torch.cat((whole_part, part)))
    whole.error = output.error


def greedy(name: str, prompt_ids: list[int], max_new_tokens: int = 12, **sampling: object) -> Request:
    return Request(name, prompt_ids, SamplingParams(max_new_tokens=max_new_tokens, **sampling))  # type: ignore[arg-type]
