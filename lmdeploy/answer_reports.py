"""What one request reports beside its text: logits, hidden states, perplexity. It knows no engine and no tokenizer."""

from __future__ import annotations

from statistics import fmean

import torch
from torch import Tensor

from lmdeploy.engine.request import RequestOutput
from lmdeploy.messages import Response


class AnswerReports:
    """Gathers the pieces that come with a request's outputs."""

    def __init__(self) -> None:
        self._prompt_logprobs: list[dict[int, float]] = []
        self._logits: list[Tensor] = []
        self._hidden_states: list[Tensor] = []

    def add(self, output: RequestOutput) -> None:
        """Keep what an output brings."""
        self._prompt_logprobs = output.prompt_logprobs or self._prompt_logprobs
        if output.logits is not None:
            self._logits.append(output.logits)
        if output.hidden_states is not None:
            self._hidden_states.append(output.hidden_states)

    def complete(self, response: Response, num_dropped: int) -> None:
        """Put all of it into the last response. num_dropped: the last tokens that are no part of the answer."""
        response.logits = _join(self._logits, num_dropped)
        response.last_hidden_state = _join(self._hidden_states, num_dropped)
        if self._prompt_logprobs:
            response.prompt_logprobs = self._prompt_logprobs
            response.ppl = -fmean(next(iter(values.values())) for values in self._prompt_logprobs)


def _join(pieces: list[Tensor], num_dropped: int) -> Tensor | None:
    """Pieces along the positions, less the last num_dropped rows; None of nothing."""
    if not pieces:
        return None
    rows = torch.cat(pieces)
    return rows[: max(len(rows) - num_dropped, 0)]
