"""Repetition, presence and frequency penalties over the tokens of a request, counted on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmdeploy.engine.request import SamplingParams
from lmdeploy.engine.state import RequestState


def uses_penalties(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


class PenaltyCounts:
    """Per request with a penalty: which tokens its prompt has, and how often its output has each, [V] both."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._of_request: dict[str, tuple[Tensor, Tensor]] = {}

    def apply(self, logits: Tensor, states: Sequence[RequestState]) -> None:
        """Penalize logits [R, V] in place.

        repetition_penalty divides positive and multiplies negative logits of every token seen, prompt included
        (https://arxiv.org/abs/1909.05858); presence and frequency penalties are subtracted for output tokens.
        """
        for row, state in enumerate(states):
            params = state.request.sampling
            if not uses_penalties(params):
                continue
            in_prompt, counts = self._of(state)
            line = logits[row]
            factor = torch.where(line > 0, 1.0 / params.repetition_penalty, params.repetition_penalty)
            line.mul_(torch.where(in_prompt | (counts > 0), factor, 1.0))
            line.sub_(counts * params.frequency_penalty + (counts > 0) * params.presence_penalty)

    def add(self, tokens: Tensor, states: Sequence[RequestState]) -> None:
        """Count the sampled tokens [R] without asking the host what they are."""
        for row, state in enumerate(states):
            if state.request_id in self._of_request:
                counts = self._of_request[state.request_id][1]
                counts.index_add_(0, tokens[row : row + 1].clamp(min=0), torch.ones(1, device=self._device))

    def forget(self, request_id: str) -> None:
        self._of_request.pop(request_id, None)

    def _of(self, state: RequestState) -> tuple[Tensor, Tensor]:
        if state.request_id not in self._of_request:
            in_prompt = torch.zeros(self._vocab_size, dtype=torch.bool, device=self._device)
            in_prompt[torch.tensor(state.prompt_ids, device=self._device)] = True
            output = torch.tensor(state.output_ids, dtype=torch.int64, device=self._device)
            counts = torch.bincount(output, minlength=self._vocab_size).float()
            self._of_request[state.request_id] = (in_prompt, counts)
        return self._of_request[state.request_id]
