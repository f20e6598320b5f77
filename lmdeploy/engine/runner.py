"""Runs one step on the device: forward pass, logits, sampling. It schedules nothing and waits for nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lmdeploy.engine.batch import build_batch
from lmdeploy.engine.sampler import Sampler
from lmdeploy.engine.scheduler import StepPlan
from lmdeploy.engine.slots import Slots
from lmdeploy.kernels import make_decode_buffers
from lmdeploy.layers.context import KVCache
from lmdeploy.models.base import CausalLM

if TYPE_CHECKING:
    from lmdeploy.engine.graphs import DecodeGraphs
    from lmdeploy.engine.reports import Report

_HOST_COPIES = 8  # more than steps can be in flight


@dataclass
class PendingStep:
    """A step that the device may still be computing. reports: by request id, of those that ask for more than tokens."""

    plan: StepPlan
    tokens: Tensor
    tokens_have_arrived: torch.cuda.Event | None
    reports: dict[str, Report]

    def wait(self) -> list[int | None]:
        """The sampled token of each scheduled entry; None where an entry samples nothing."""
        if self.tokens_have_arrived is not None:
            self.tokens_have_arrived.synchronize()
        sampled = iter(self.tokens.tolist())
        return [next(sampled) if entry.samples else None for entry in self.plan.scheduled]


class Runner:
    """One model and its cache on one device. Decode steps are replayed where `graphs` has them."""

    def __init__(self, model: CausalLM, kv_cache: KVCache, max_batch_size: int, session_len: int) -> None:
        device = kv_cache.data.device
        self.model = model
        self.kv_cache = kv_cache
        self.sampler = Sampler(model.config.vocab_size, device)
        self.slots = Slots(max_batch_size, -(-session_len // kv_cache.block_size) + 1, device)
        self.decode_buffers = make_decode_buffers(max_batch_size, session_len, device)
        self.graphs: DecodeGraphs | None = None
        self._host_tokens = _HostTokens(max_batch_size) if device.type == "cuda" else None

    def use_graphs(self, max_batch_size: int) -> None:
        """Replay decode steps from now on; `graphs` captures them."""
        from lmdeploy.engine.graphs import DecodeGraphs

        self.graphs = DecodeGraphs(self.model, self.kv_cache, self.slots, self.decode_buffers, max_batch_size)

    def forget(self, request_id: str) -> None:
        """The request has ended."""
        self.sampler.forget(request_id)
        self.slots.forget(request_id)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> PendingStep:
        """Enqueue the step; only PendingStep.wait waits for the device."""
        if self.graphs is not None and all(entry.num_tokens == 1 and entry.samples for entry in plan.scheduled):
            step = self._replay(plan)
            if step is not None:
                return step
        batch = build_batch(plan, self.kv_cache, self.slots, self.decode_buffers)
        hidden_states = self.model(batch.input_ids, batch.ctx)
        wants_report = any(entry.state.request.sampling.wants_report for entry in batch.entries)
        raw_logits, tokens = None, batch.sample_rows  # none of either where no prompt is complete yet
        if batch.sampling_states:
            logits = self.model.compute_logits(hidden_states[batch.sample_rows])
            raw_logits = logits.clone() if wants_report else None
            tokens = self.sampler(logits, batch.sampling_states)
            self.slots.last_tokens[self.slots.lines(batch.sampling_states)] = tokens.clamp(min=0)
        reports: dict[str, Report] = {}
        if wants_report:
            from lmdeploy.engine.reports import make_reports

            reports = make_reports(self.model, batch.entries, hidden_states, raw_logits, tokens)
        return PendingStep(plan, *self._to_host(tokens), reports)

    def _replay(self, plan: StepPlan) -> PendingStep | None:
        """The step from a graph, or None where there is none for it."""
        assert self.graphs is not None
        entries, states = plan.scheduled, [entry.state for entry in plan.scheduled]
        if any(state.request.sampling.wants_hidden_states for state in states):
            return None
        is_greedy = all(state.request.sampling.is_plain_greedy for state in states)
        found = self.graphs.find(len(entries), keeps_logits=not is_greedy)
        if found is None:
            return None
        size, graph = found
        rows = self.graphs.stage(size)
        if not self.slots.write_rows(entries, rows):
            self._show_tables(plan)
            self.slots.write_rows(entries, rows)
        tokens = self.graphs.replay(size, graph)[: len(entries)]
        reports: dict[str, Report] = {}
        if not is_greedy:
            logits = self.graphs.logits[: len(entries)]
            wants_report = any(state.request.sampling.wants_report for state in states)
            raw_logits = logits.clone() if wants_report else None
            tokens = self.sampler(logits, states)
            self.slots.last_tokens[self.slots.lines(states)] = tokens.clamp(min=0)
            if wants_report:
                from lmdeploy.engine.reports import make_reports

                reports = make_reports(self.model, entries, logits.new_empty(len(entries), 0), raw_logits, tokens)
        return PendingStep(plan, *self._to_host(tokens), reports)

    def _show_tables(self, plan: StepPlan) -> None:
        batch = build_batch(plan, self.kv_cache, self.slots)
        self.slots.show_tables(plan.scheduled, batch.ctx.block_tables)

    def _to_host(self, tokens: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        return (tokens, None) if self._host_tokens is None else self._host_tokens.copy(tokens)


class _HostTokens:
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
