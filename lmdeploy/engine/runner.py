"""Runs one step on the device: forward pass, logits, sampling. It schedules nothing and waits for nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lmdeploy.engine.batch import build_batch
from lmdeploy.engine.sampler import Sampler
from lmdeploy.engine.scheduler import Scheduled, StepPlan
from lmdeploy.engine.slots import Slots
from lmdeploy.engine.state import RequestState
from lmdeploy.kernels import make_decode_buffers
from lmdeploy.layers.context import KVCache
from lmdeploy.models.base import CausalLM

if TYPE_CHECKING:
    from lmdeploy.engine.graphs import DecodeGraphs
    from lmdeploy.engine.replay import HostTokens
    from lmdeploy.engine.reports import Report


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
        self._host_tokens: HostTokens | None = None
        if device.type == "cuda":
            from lmdeploy.engine.replay import HostTokens

            self._host_tokens = HostTokens(max_batch_size)

    def forget(self, request_id: str) -> None:
        """The request has ended."""
        self.sampler.forget(request_id)
        self.slots.forget(request_id)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> PendingStep:
        """Enqueue the step; only PendingStep.wait waits for the device."""
        if self.graphs is not None:
            from lmdeploy.engine.replay import replay_step

            if (step := replay_step(self, self.graphs, plan)) is not None:
                return step
        batch = build_batch(plan, self.kv_cache, self.slots, self.decode_buffers)
        hidden_states = self.model(batch.input_ids, batch.ctx)
        logits = None  # where no prompt is complete yet
        if batch.sampling_states:
            logits = self.model.compute_logits(hidden_states[batch.sample_rows])
        tokens, reports = self.sample(batch.entries, batch.sampling_states, logits, hidden_states)
        return PendingStep(plan, *self.to_host(tokens), reports)

    def sample(
        self, entries: list[Scheduled], states: list[RequestState], logits: Tensor | None, hidden_states: Tensor
    ) -> tuple[Tensor, dict[str, Report]]:
        """The tokens [R] of the R requests that sample, kept for the next step, and what any of the entries reports.

        logits: [R, V], may be changed in place; None if R is 0. hidden_states: [T, C].
        """
        wants_report = any(entry.state.request.sampling.wants_report for entry in entries)
        raw_logits = logits.clone() if wants_report and logits is not None else None
        tokens = torch.empty(0, dtype=torch.int64, device=hidden_states.device)
        if logits is not None:
            tokens = self.sampler(logits, states)
            self.slots.last_tokens[self.slots.lines(states)] = tokens.clamp(min=0)
        if not wants_report:
            return tokens, {}
        from lmdeploy.engine.reports import make_reports

        return tokens, make_reports(self.model, entries, hidden_states, raw_logits, tokens)

    def to_host(self, tokens: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        """A copy that does not wait for the device, and the event after which it holds."""
        return (tokens, None) if self._host_tokens is None else self._host_tokens.copy(tokens)
