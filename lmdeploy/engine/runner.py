"""Runs one step on the device: forward pass, logits, sampling. It schedules nothing and waits for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lmdeploy.engine.batch import Batch, build_batch
from lmdeploy.engine.sampler import Sampled, Sampler
from lmdeploy.engine.scheduler import Scheduled, StepPlan
from lmdeploy.layers.context import KVCache
from lmdeploy.models.base import CausalLM

_LOGIT_ROWS = 256  # rows of [V] logits made at a time where every position is asked for


@dataclass
class Report:
    """What one scheduled entry reports beside its token; tensors still on the device."""

    logprobs: tuple[Tensor, Tensor] | None = None
    prompt_logprobs: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: Tensor | None = None


@dataclass
class PendingStep:
    """A step that the device may still be computing."""

    plan: StepPlan
    tokens: Tensor
    tokens_have_arrived: torch.cuda.Event | None
    reports: list[Report]

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
        sampled, sample_logits = self._sample(batch, hidden_states)
        reports = self._report(batch, hidden_states, sampled, sample_logits)
        return PendingStep(plan, *_copy_to_host(sampled.tokens), reports)

    def _sample(self, batch: Batch, hidden_states: Tensor) -> tuple[Sampled, Tensor | None]:
        states = batch.sampling_states
        if not states:
            return Sampled(batch.sample_rows, []), None
        logits = self.model.compute_logits(hidden_states[batch.sample_rows])
        wants_logits = any(state.request.sampling.return_logits for state in states)
        raw = logits.clone() if wants_logits else None
        sampled = self.sampler(logits, states)
        for row, state in enumerate(states):
            self._last_tokens[state.request_id] = sampled.tokens[row].clamp(min=0)
        return sampled, raw

    def _report(self, batch: Batch, hidden_states: Tensor, sampled: Sampled, raw: Tensor | None) -> list[Report]:
        """Logits, hidden states and log-probabilities of the entries that ask for them."""
        reports = []
        start, sample_row = 0, 0
        for entry in batch.entries:
            rows = hidden_states[start : start + entry.num_tokens]
            report = self._report_positions(entry, rows)
            if entry.samples:
                sampling = entry.state.request.sampling
                report.logprobs = sampled.logprobs[sample_row]
                if sampling.return_logits == "generation" and raw is not None:
                    report.logits = raw[sample_row : sample_row + 1]
                if sampling.return_hidden_states == "generation":
                    report.hidden_states = rows[-1:]
                sample_row += 1
            start += entry.num_tokens
            reports.append(report)
        return reports

    def _report_positions(self, entry: Scheduled, rows: Tensor) -> Report:
        """What is asked for every position, each position once even if it is computed again after a preemption."""
        state, report = entry.state, Report()
        if not state.wants_every_position:
            return report
        sampling = state.request.sampling
        rows = rows[max(state.num_reported_tokens - entry.start, 0) :]
        first = entry.start + entry.num_tokens - len(rows)
        state.num_reported_tokens = max(state.num_reported_tokens, entry.start + entry.num_tokens)
        if sampling.return_hidden_states == "all":
            report.hidden_states = rows
        if sampling.return_logits == "all":
            report.logits = torch.cat([rows.new_empty(0, self.model.config.vocab_size).float(), *self._logits(rows)])
        if sampling.prompt_logprobs:
            targets = torch.tensor(state.prompt_ids[first + 1 : first + 1 + len(rows)], device=rows.device)
            report.prompt_logprobs = self._logprobs_of(rows[: len(targets)], targets)
        return report

    def _logits(self, rows: Tensor) -> Iterator[Tensor]:
        for part in rows.split(_LOGIT_ROWS):
            yield self.model.compute_logits(part)

    def _logprobs_of(self, rows: Tensor, targets: Tensor) -> Tensor:
        """log p(target) under each row's logits, [n] float32."""
        parts = [
            torch.log_softmax(logits, dim=-1).gather(1, wanted[:, None])[:, 0]
            for logits, wanted in zip(self._logits(rows), targets.split(_LOGIT_ROWS), strict=True)
        ]
        return torch.cat([torch.empty(0, device=rows.device), *parts])


def _copy_to_host(tokens: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy that does not wait for the device, and the event that ends it; later steps may queue up behind it."""
    if tokens.device.type != "cuda":
        return tokens, None
    host = torch.empty_like(tokens, device="cpu", pin_memory=True)
    host.copy_(tokens, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event
