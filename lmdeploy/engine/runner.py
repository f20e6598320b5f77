"""Runs one step on the device: forward pass, logits, sampling. It schedules nothing and waits for nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lmdeploy.engine.batch import build_batch
from lmdeploy.engine.sampler import Sampler
from lmdeploy.engine.scheduler import StepPlan
from lmdeploy.layers.context import KVCache
from lmdeploy.models.base import CausalLM

if TYPE_CHECKING:
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
    """One model and its cache on one device."""

    def __init__(self, model: CausalLM, kv_cache: KVCache) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self.sampler = Sampler(model.config.vocab_size, kv_cache.data.device)
        self._last_tokens: dict[str, Tensor] = {}

    def forget(self, request_id: str) -> None:
        """The request has ended."""
        self.sampler.forget(request_id)
        self._last_tokens.pop(request_id, None)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> PendingStep:
        """Enqueue the step; only PendingStep.wait waits for the device."""
        batch = build_batch(plan, self.kv_cache, self._last_tokens)
        hidden_states = self.model(batch.input_ids, batch.ctx)
        wants_report = any(entry.state.request.sampling.wants_report for entry in batch.entries)
        raw_logits, tokens = None, batch.sample_rows  # none of either where no prompt is complete yet
        if batch.sampling_states:
            logits = self.model.compute_logits(hidden_states[batch.sample_rows])
            raw_logits = logits.clone() if wants_report else None
            tokens = self.sampler(logits, batch.sampling_states)
            for row, state in enumerate(batch.sampling_states):
                self._last_tokens[state.request_id] = tokens[row].clamp(min=0)
        reports: dict[str, Report] = {}
        if wants_report:
            from lmdeploy.engine.reports import make_reports

            reports = make_reports(self.model, batch, hidden_states, raw_logits, tokens)
        return PendingStep(plan, *_copy_to_host(tokens), reports)


def _copy_to_host(tokens: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy that does not wait for the device, and the event that ends it; later steps may queue up behind it."""
    if tokens.device.type != "cuda":
        return tokens, None
    host = torch.empty_like(tokens, device="cpu", pin_memory=True)
    host.copy_(tokens, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event
