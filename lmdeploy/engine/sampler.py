"""From logits to the next token of each request, on the logits' device.

A request draws with one uniform number that depends on (seed, position) only, so its tokens do not depend on what
else is in the batch. It knows no request queue and no cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmdeploy.engine.penalties import PenaltyCounts
from lmdeploy.engine.request import SamplingParams
from lmdeploy.engine.state import RequestState

INVALID_TOKEN = -1
_MASK64 = (1 << 64) - 1


@dataclass
class Sampled:
    """tokens: [R] int64, INVALID_TOKEN where no logit was finite. logprobs: per row (ids [n], values [n]) or None."""

    tokens: Tensor
    logprobs: list[tuple[Tensor, Tensor] | None]


class Sampler:
    """Chooses tokens; keeps the token counts of requests that use penalties."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._counts = PenaltyCounts(vocab_size, device)

    def forget(self, request_id: str) -> None:
        """The request has ended or was preempted."""
        self._counts.forget(request_id)

    def __call__(self, logits: Tensor, states: Sequence[RequestState]) -> Sampled:
        """logits: [R, V] float32, one row per state; may be changed in place."""
        params = [state.request.sampling for state in states]
        raw = logits.clone() if any(p.logprobs is not None for p in params) else logits
        self._counts.apply(logits, states)
        _apply_biases(logits, states)
        greedy = logits.argmax(dim=-1)
        drawn = [row for row, p in enumerate(params) if p.temperature > 0]
        tokens = greedy
        if drawn:
            tokens = greedy.clone()
            tokens[drawn] = _draw(logits[drawn], [states[row] for row in drawn])
        is_valid = logits.gather(1, tokens[:, None])[:, 0].isfinite()
        tokens = tokens.where(is_valid, INVALID_TOKEN)
        self._counts.add(tokens, states)
        return Sampled(tokens, [_top_logprobs(raw[row], tokens[row], p) for row, p in enumerate(params)])


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) fixed by seed and position. splitmix64, https://doi.org/10.1145/2660193.2660195"""
    z = (seed * 0x9E3779B97F4A7C15 + position * 0xD1342543DE82EF95 + 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return float((z ^ (z >> 31)) >> 11) * 2.0**-53


def _apply_biases(logits: Tensor, states: Sequence[RequestState]) -> None:
    """Add logit_bias; remove bad tokens, and the stop tokens before min_new_tokens. In place."""
    rows: list[int] = []
    columns: list[int] = []
    values: list[float] = []
    for row, state in enumerate(states):
        params = state.request.sampling
        banned = [*params.bad_token_ids, *_completed_bad_sequences(state)]
        if state.num_output_tokens - 1 < params.min_new_tokens:  # the token to be sampled is already counted
            banned.extend(params.stop_token_ids)
        for token, value in [*params.logit_bias.items(), *((token, float("-inf")) for token in banned)]:
            rows.append(row)
            columns.append(token)
            values.append(value)
    if rows:
        index = torch.tensor([rows, columns], device=logits.device)
        logits.index_put_((index[0], index[1]), torch.tensor(values, device=logits.device), accumulate=True)


def _completed_bad_sequences(state: RequestState) -> list[int]:
    """Last tokens of the bad sequences that the tokens so far have begun."""
    ids = state.token_ids
    return [
        sequence[-1]
        for sequence in state.request.sampling.bad_token_sequences
        if len(sequence) == 1 or ids[1 - len(sequence) :] == list(sequence[:-1])
    ]


def _draw(logits: Tensor, states: Sequence[RequestState]) -> Tensor:
    """Draw one token per row by inverting the cumulative distribution. logits: [R, V]; returns [R] int64."""
    params = [state.request.sampling for state in states]

    def column(value: Callable[[SamplingParams], float]) -> Tensor:
        return torch.tensor([value(p) for p in params], device=logits.device, dtype=torch.float32)[:, None]

    logits = logits / column(lambda p: max(p.temperature, 1e-4))
    logits = _keep_top_k(logits, [p.top_k for p in params])
    probabilities = torch.softmax(logits, dim=-1)
    if any(p.min_p > 0 for p in params):
        floor = probabilities.amax(dim=-1, keepdim=True) * column(lambda p: p.min_p)
        probabilities = probabilities.where(probabilities >= floor, 0.0)
    if any(p.top_p < 1 for p in params):
        probabilities = _keep_top_p(probabilities, column(lambda p: p.top_p))
    cumulative = probabilities.double().cumsum(dim=-1)
    draws = [uniform(state.seed, state.num_tokens - 1) for state in states]
    target = torch.tensor(draws, device=logits.device, dtype=torch.float64)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_(max=logits.shape[1] - 1)


def _keep_top_k(logits: Tensor, top_k: list[int]) -> Tensor:
    """All but each row's k largest logits to -inf; k 0 keeps all."""
    vocab_size = logits.shape[1]
    wanted = [k if 0 < k < vocab_size else 0 for k in top_k]
    if not any(wanted):
        return logits
    largest = logits.topk(max(wanted), dim=-1).values
    index = torch.tensor([max(k, 1) - 1 for k in wanted], device=logits.device)[:, None]
    is_off = torch.tensor([k == 0 for k in wanted], device=logits.device)[:, None]
    return logits.where((logits >= largest.gather(1, index)) | is_off, float("-inf"))


def _keep_top_p(probabilities: Tensor, top_p: Tensor) -> Tensor:
    """The smallest set of most probable tokens whose share of what is left reaches top_p; the rest to 0."""
    ordered, order = probabilities.sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    kept = ordered.where(before < top_p * ordered.sum(dim=-1, keepdim=True), 0.0)
    kept[:, 0] = ordered[:, 0]
    return torch.zeros_like(probabilities).scatter_(1, order, kept)


def _top_logprobs(logits: Tensor, token: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor] | None:
    """The chosen token's and the top tokens' log-probabilities under the model's own distribution. logits: [V]."""
    if params.logprobs is None:
        return None
    logprobs = torch.log_softmax(logits, dim=-1)
    ids = torch.cat((token.clamp(min=0)[None], logprobs.topk(params.logprobs).indices))
    return ids, logprobs[ids]
