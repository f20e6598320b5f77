"""What a request may ask for beside its tokens: log-probabilities, logits, hidden states. It chooses no token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lmdeploy.engine.request import RequestOutput
from lmdeploy.engine.scheduler import StepPlan
from lmdeploy.engine.state import RequestState
from lmdeploy.models.base import CausalLM

_LOGIT_ROWS = 64  # rows of [V] logits made at a time where every position is asked for


@dataclass
class Report:
    """What one request of a step reports; tensors still on the device. logprobs: (ids [n], values [n]),
    prompt_logprobs the same with a row per position. ends_prompt: those of the prompt are complete with this report."""

    logprobs: tuple[Tensor, Tensor] | None = None
    prompt_logprobs: tuple[Tensor, Tensor] | None = None
    ends_prompt: bool = False
    logits: Tensor | None = None
    hidden_states: Tensor | None = None

    def add_to(self, output: RequestOutput, state: RequestState) -> None:
        """Bring the report to the host, into the request's output; log-probabilities of a prompt once all are there."""
        if self.logprobs is not None:
            ids, values = self.logprobs
            output.logprobs = [dict(zip(ids.tolist(), values.tolist(), strict=True))]
        if self.prompt_logprobs is not None:
            rows = zip(*(part.tolist() for part in self.prompt_logprobs), strict=True)
            state.prompt_logprobs.extend(dict(zip(*row, strict=True)) for row in rows)
        if self.ends_prompt:
            output.prompt_logprobs = state.prompt_logprobs
        output.logits = None if self.logits is None else self.logits.cpu()
        output.hidden_states = None if self.hidden_states is None else self.hidden_states.cpu()


def make_reports(
    model: CausalLM, plan: StepPlan, hidden_states: Tensor, raw_logits: Tensor | None, tokens: Tensor
) -> dict[str, Report]:
    """The reports of a step's requests, by request id.

    hidden_states: [T, C]. raw_logits: [R, V] of the R requests that sample, before any change; None if R is 0. tokens: [R].
    """
    reports = {}
    first_row, sample_row = 0, 0
    numbers = zip(plan.starts.tolist(), plan.num_tokens.tolist(), strict=True)
    for state, samples, (start, num_tokens) in zip(plan.states, plan.samples, numbers, strict=True):
        rows = hidden_states[first_row : first_row + num_tokens]
        report = _report_positions(model, state, start, rows)
        if samples and raw_logits is not None:
            sampling, logits = state.request.sampling, raw_logits[sample_row]
            if sampling.logprobs is not None:
                report.logprobs = top_logprobs(logits, tokens[sample_row], sampling.logprobs)
            if sampling.return_logits == "generation":
                report.logits = logits[None].clone()  # a row; the others need not stay
            if sampling.return_hidden_states == "generation":
                report.hidden_states = rows[-1:]
            sample_row += 1
        first_row += num_tokens
        reports[state.request_id] = report
    return reports


def top_logprobs(logits: Tensor, token: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The chosen token's and the `count` top tokens' log-probabilities under the model's own distribution. logits: [V]."""
    logprobs = torch.log_softmax(logits, dim=-1)
    ids = torch.cat((token.clamp(min=0)[None], logprobs.topk(count).indices))
    return ids, logprobs[ids]


def _report_positions(model: CausalLM, state: RequestState, start: int, rows: Tensor) -> Report:
    """What is asked for every position, each position once even if it is computed again after a preemption."""
    report = Report()
    if not state.wants_every_position:
        return report
    sampling = state.request.sampling
    end = start + len(rows)
    rows = rows[max(state.num_reported_tokens - start, 0) :]
    first = end - len(rows)
    state.num_reported_tokens = max(state.num_reported_tokens, end)
    if sampling.return_hidden_states == "all":
        report.hidden_states = rows
    if sampling.return_logits == "all":
        report.logits = torch.cat([rows.new_empty(0, model.config.vocab_size).float(), *_logits(model, rows)])
    if sampling.prompt_logprobs and first < len(state.prompt_ids):
        targets = torch.tensor(state.prompt_ids[first + 1 : first + 1 + len(rows)], device=rows.device)
        count = sampling.logprobs or 0
        report.prompt_logprobs = _prompt_logprobs(model, rows[: len(targets)], targets, count) if len(targets) else None
        report.ends_prompt = first + len(rows) >= len(state.prompt_ids)
    return report


def _logits(model: CausalLM, rows: Tensor) -> Iterator[Tensor]:
    for part in rows.split(_LOGIT_ROWS):
        yield model.compute_logits(part)


def _prompt_logprobs(model: CausalLM, rows: Tensor, targets: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Each target and the `count` top tokens of its row: ids and log-probabilities, both [n, 1 + count]. targets: [n]."""
    ids, values = [], []
    for logits, wanted in zip(_logits(model, rows), targets.split(_LOGIT_ROWS), strict=True):
        logprobs = torch.log_softmax(logits, dim=-1)
        ids.append(torch.cat((wanted[:, None], logprobs.topk(count).indices), dim=1))
        values.append(logprobs.gather(1, ids[-1]))
    return torch.cat(ids), torch.cat(values)
