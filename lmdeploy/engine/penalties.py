"""What changes logits before a token is chosen: biases, banned tokens, and penalties counted on the device.

It chooses no token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmdeploy.engine.request import SamplingParams
from lmdeploy.engine.state import RequestState


def uses_penalties(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


class LogitChanges:
    """The penalties and the biases of all requests that have any."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._counts = PenaltyCounts(vocab_size, device)
        self._biases = TokenBiases(device)

    def apply(self, logits: Tensor, states: Sequence[RequestState]) -> None:
        """Change logits [R, V] in place: penalties first."""
        self._counts.apply(logits, states)
        self._biases.apply(logits, states)

    def add(self, tokens: Tensor, states: Sequence[RequestState]) -> None:
        """The tokens [R] that were sampled then."""
        self._counts.add(tokens, states)

    def forget(self, request_id: str) -> None:
        """The request has ended."""
        self._counts.forget(request_id)
        self._biases.forget(request_id)


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


class TokenBiases:
    """Per request with a list of tokens to favour or to ban: the list on the device, where the whole vocabulary fits."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._of_request: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def apply(self, logits: Tensor, states: Sequence[RequestState]) -> None:
        """Add logit_bias; remove bad tokens, and the stop tokens before min_new_tokens. logits: [R, V], in place."""
        for row, state in enumerate(states):
            params = state.request.sampling
            num_output_tokens = state.num_tokens - 1 - len(state.prompt_ids)  # without the one that is sampled now
            must_go_on = num_output_tokens < params.min_new_tokens
            if params.logit_bias or params.bad_token_ids or must_go_on:
                tokens, biases, stops = self._of(state)
                logits[row].index_add_(0, tokens, biases)
                if must_go_on:
                    logits[row].index_fill_(0, stops, float("-inf"))
            for token in _completed_bad_sequences(state):
                logits[row, token] = float("-inf")

    def forget(self, request_id: str) -> None:
        self._of_request.pop(request_id, None)

    def _of(self, state: RequestState) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens with a bias, the biases, stop tokens."""
        if state.request_id not in self._of_request:
            params = state.request.sampling
            biases = {**params.logit_bias, **dict.fromkeys(params.bad_token_ids, float("-inf"))}
            self._of_request[state.request_id] = (
                torch.tensor(list(biases), dtype=torch.int64, device=self._device),
                torch.tensor(list(biases.values()), dtype=torch.float32, device=self._device),
                torch.tensor(params.stop_token_ids, dtype=torch.int64, device=self._device),
            )
        return self._of_request[state.request_id]


def _completed_bad_sequences(state: RequestState) -> list[int]:
    """Last tokens of the bad sequences that the tokens so far have begun."""
    ids = state.token_ids
    return [
        sequence[-1]
        for sequence in state.request.sampling.bad_token_sequences
        if len(sequence) == 1 or ids[1 - len(sequence) :] == list(sequence[:-1])
    ]
