"""Decode steps that are replayed from graphs, and the way of their tokens to the host. It captures nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from lmdeploy.engine.batch import build_batch
from lmdeploy.engine.graphs import DecodeGraphs
from lmdeploy.engine.reports import Report
from lmdeploy.engine.runner import PendingStep, Runner
from lmdeploy.engine.scheduler import StepPlan

_HOST_COPIES = 8  # more than steps can be in flight


def replay_step(runner: Runner, graphs: DecodeGraphs, plan: StepPlan) -> PendingStep | None:
    """Enqueue a step of one token each from its graph; None for another step, or where there is no graph for it."""
    entries, states = plan.scheduled, [entry.state for entry in plan.scheduled]
    if not all(entry.num_tokens == 1 and entry.samples for entry in entries):
        return None
    if any(state.request.sampling.wants_hidden_states for state in states):
        return None
    is_greedy = all(state.request.sampling.is_plain_greedy for state in states)
    found = graphs.find(len(entries), keeps_logits=not is_greedy)
    if found is None:
        return None
    size, graph = found
    rows = graphs.stage(size)
    if not runner.slots.write_rows(entries, rows):
        batch = build_batch(plan, runner.kv_cache, runner.slots)
        runner.slots.show_tables(entries, batch.ctx.block_tables)
        runner.slots.write_rows(entries, rows)
    tokens = graphs.replay(size, graph)[: len(entries)]
    reports: dict[str, Report] = {}
    if not is_greedy:
        logits = graphs.logits[: len(entries)]
        tokens, reports = runner.sample(entries, states, logits, logits.new_empty(len(entries), 0))
    return PendingStep(plan, *runner.to_host(tokens), reports)


class HostTokens:
    """Pinned copies of the last steps' tokens, which never wait for the device; later steps may queue up behind them."""

    def __init__(self, max_batch_size: int) -> None:
        self._copies = torch.empty(_HOST_COPIES, max_batch_size, dtype=torch.int64, device="cpu", pin_memory=True)
        self._turn = 0

    def copy(self, tokens: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """A copy, and the event after which it holds."""
        self._turn = (self._turn + 1) % _HOST_COPIES
        host = self._copies[self._turn, : len(tokens)]
        host.copy_(tokens, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return host, event
