"""Runs one step on the device: forward pass, logits, sampling. It schedules nothing and waits for nothing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lmdeploy.engine.batch import build_batch
from lmdeploy.engine.sampler import Sampler
from lmdeploy.engine.scheduler import StepPlan
from lmdeploy.engine.state import RequestState
from lmdeploy.kernels import cpu, make_decode_buffers
from lmdeploy.layers.context import KVCache
from lmdeploy.models.base import CausalLM

if TYPE_CHECKING:
    from lmdeploy.engine.graphs import DecodeGraphs
    from lmdeploy.engine.replay import HostTokens
    from lmdeploy.engine.reports import Report
    from lmdeploy.engine.slots import Slots


@dataclass
class PendingStep:
    """A step that the device may still be computing.

    tokens: of the requests that sample, on the host, and of padding behind them. reports: by request id, of those that ask
    for more.
    """

    plan: StepPlan
    tokens: Tensor | np.ndarray
    tokens_have_arrived: torch.cuda.Event | None
    reports: dict[str, Report]

    def wait(self) -> list[int | None]:
        """The sampled token of each request of the plan; None where it samples nothing."""
        if self.tokens_have_arrived is not None:
            self.tokens_have_arrived.synchronize()
        tokens: list[int | None] = self.tokens.tolist()
        if self.plan.is_decode:
            return tokens[: len(self.plan.states)]
        sampled = iter(tokens)
        return [next(sampled) if samples else None for samples in self.plan.samples]


class Runner:
    """One model and its cache on one device. Decode steps are replayed where `graphs` has them, on a CPU from tapes."""

    def __init__(
        self, model: CausalLM, kv_cache: KVCache, max_batch_size: int, session_len: int, max_steps_in_flight: int
    ) -> None:
        device = kv_cache.data.device
        self.model = model
        self.kv_cache = kv_cache
        self.sampler = Sampler(model.config.vocab_size, device)
        self._slots_shape = max_batch_size, (max_blocks := -(-session_len // kv_cache.block_size) + 1)
        self._tapes: cpu.Tapes | None = None
        if device.type == "cpu" and cpu.is_available():
            self._tapes = cpu.Tapes(lambda ids, ctx: model.compute_logits(model(ids, ctx)), max_blocks)
        self._max_steps_in_flight = max_steps_in_flight
        self.decode_buffers = make_decode_buffers(max_batch_size, session_len, device)
        self.graphs: DecodeGraphs | None = None
        self._host_tokens: HostTokens | None = None
        if device.type == "cuda":
            from lmdeploy.engine.replay import HostTokens

            self._host_tokens = HostTokens(max_batch_size)

    @cached_property
    def slots(self) -> Slots:
        """What the device keeps of requests; not made where the host always knows all tokens before the next step."""
        from lmdeploy.engine.slots import Slots

        return Slots(*self._slots_shape, self.kv_cache.data.device)

    @property
    def _keeps_tokens(self) -> bool:
        return self.graphs is not None or self._max_steps_in_flight > 1

    def forget(self, request_id: str) -> None:
        """The request has ended."""
        self.sampler.forget(request_id)
        if self._keeps_tokens:
            self.slots.forget(request_id)

    def execute(self, plan: StepPlan) -> PendingStep:
        """Enqueue the step; only PendingStep.wait waits for the device."""
        if self.graphs is not None:
            from lmdeploy.engine.replay import replay_step

            if (step := replay_step(self, self.graphs, plan)) is not None:
                return step
        return self._execute(plan)

    @torch.inference_mode()
    def _execute(self, plan: StepPlan) -> PendingStep:
        batch = build_batch(plan, self.kv_cache, lambda states: self.slots.last_tokens_of(states), self.decode_buffers)
        logits = None
        if self._tapes is not None and plan.is_decode and not plan.states.wants_hidden_states:
            logits = self._tapes.run(batch.input_ids, batch.ctx)
        if logits is not None:
            hidden_states = logits.new_empty(len(logits), 0)
        else:
            hidden_states = self.model(batch.input_ids, batch.ctx)
            if batch.sampling_states:  # otherwise no prompt is complete yet
                logits = self.model.compute_logits(hidden_states[batch.sample_rows])
        tokens, reports = self.sample(plan, batch.sampling_states, logits, hidden_states)
        return PendingStep(plan, *self.to_host(tokens), reports)

    def sample(
        self, plan: StepPlan, states: list[RequestState], logits: Tensor | None, hidden_states: Tensor
    ) -> tuple[Tensor, dict[str, Report]]:
        """The tokens [R] of the R requests that sample, kept for the next step, and what any of the plan's reports.

        logits: [R, V], may be changed in place; None if R is 0. hidden_states: [T, C].
        """
        wants_report = plan.states.wants_report
        raw_logits = logits.clone() if wants_report and logits is not None else None
        tokens = torch.empty(0, dtype=torch.int64, device=hidden_states.device)
        if logits is not None:
            tokens = self.sampler(logits, states)
            if self._keeps_tokens:
                self.slots.keep(tokens, states)
        if not wants_report:
            return tokens, {}
        from lmdeploy.engine.reports import make_reports

        return tokens, make_reports(self.model, plan, hidden_states, raw_logits, tokens)

    def to_host(self, tokens: Tensor) -> tuple[Tensor | np.ndarray, torch.cuda.Event | None]:
        """A copy that does not wait for the device, and the event after which it holds."""
        return (tokens, None) if self._host_tokens is None else self._host_tokens.copy(tokens)
