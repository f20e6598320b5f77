"""A token of each request that samples, drawn from its logits as temperature, top-k, top-p and min-p leave them.

A request draws with one uniform number that depends on (seed, position) only, so its tokens do not depend on what
else is in the batch. It knows no penalty, no bias and no grammar.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lmdeploy import kernels
from lmdeploy.engine.request import SamplingParams
from lmdeploy.engine.state import RequestState

_MASK64 = (1 << 64) - 1


def draw_some(logits: Tensor, states: Sequence[RequestState]) -> Tensor:
    """A draw from each row with a temperature, the largest of each other: [R, V] -> [R] int64; -1 as `kernels.argmax`."""
    if logits.is_cuda and kernels.has_gpu_kernels():
        return _draw_on_gpu(logits, states)
    drawn = [row for row, state in enumerate(states) if state.request.sampling.temperature > 0]
    tokens = kernels.argmax(logits)
    draws = _draw(logits[drawn], [states[row] for row in drawn])
    tokens[drawn] = draws.where(tokens[drawn] >= 0, tokens[drawn])
    return tokens


def _draw_on_gpu(logits: Tensor, states: Sequence[RequestState]) -> Tensor:
    from lmdeploy.kernels.triton import sampling

    params = [state.request.sampling for state in states]
    numbers = torch.tensor([[p.temperature, p.top_p, p.min_p] for p in params], device="cpu").T.contiguous()
    integers = torch.tensor(
        [[p.top_k, state.seed, state.num_tokens - 1] for p, state in zip(params, states, strict=True)],
        dtype=torch.int64,
        device="cpu",
    ).T.contiguous()
    # From memory that is not pinned the copies would wait for the steps in flight.
    temperature, top_p, min_p = numbers.pin_memory().to(logits.device, non_blocking=True)
    top_k, seeds, positions = integers.pin_memory().to(logits.device, non_blocking=True)
    return sampling.draw(logits, temperature, top_k, top_p, min_p, sampling.uniforms(seeds, positions))


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) fixed by seed and position. splitmix64, https://doi.org/10.1145/2660193.2660195"""
    z = (seed * 0x9E3779B97F4A7C15 + position * 0xD1342543DE82EF95 + 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return float((z ^ (z >> 31)) >> 11) * 2.0**-53


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
    is_kept = (before < top_p * ordered.sum(dim=-1, keepdim=True)) | (top_p >= 1)
    kept = ordered.where(is_kept, 0.0)
    kept[:, 0] = ordered[:, 0]
    return torch.zeros_like(probabilities).scatter_(1, order, kept)
