"""Runs requests through an Engine in the caller's thread."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from lmdeploy.engine.config import EngineConfig
from lmdeploy.engine.core import Engine
from lmdeploy.engine.graphs import DecodeGraphs, Graph
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


class UncapturedGraphs(DecodeGraphs):
    """Decode steps prepared from the slots as graphs are, and run as they are, which a CPU can."""

    def context_lens_host(self, size: int) -> list[int]:
        return self._inputs.context_lens[:size].tolist()

    def replay(self, size: int, graph: Graph) -> torch.Tensor:
        return super().replay(size, graph).clone()  # a CPU has no stream that keeps copies and replays in order

    def capture(self, size: int, keeps_hidden: bool) -> None:
        result = self._hidden_states[:size] if keeps_hidden else torch.zeros(size, dtype=torch.int64)
        self.graphs[size, keeps_hidden] = Graph(lambda: result.copy_(self.step(size, keeps_hidden)), result)  # type: ignore[arg-type, return-value]


def replay_uncaptured(engine: Engine, max_batch_size: int) -> None:
    """Let decode steps of the engine go the way of graphs; of all batch sizes, since twins take no padding."""
    runner = engine.runner
    runner.graphs = UncapturedGraphs(runner.model, runner.kv_cache, runner.slots, None, max_batch_size)
    runner.graphs.sizes = list(range(1, max_batch_size + 1))
    for size in runner.graphs.sizes:
        for keeps_hidden in (False, True):
            runner.graphs.capture(size, keeps_hidden)
