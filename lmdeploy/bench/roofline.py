"""How fast decoding and prefill could be at best: what they read and multiply, over what the machine can. It runs no model.

A decode step reads the weights once, and the keys and values of every request's context. With many requests the products of
the weights take longer than reading them. Source: the roofline model, https://doi.org/10.1145/1498765.1498785
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lmdeploy.engine.memory import kv_bytes_per_token

if TYPE_CHECKING:
    from lmdeploy.engine.validation import EngineInfo
    from lmdeploy.messages import QuantPolicy
    from lmdeploy.models.config import ModelConfig

# Well beyond any last-level cache, so that what is read comes from memory.
_BUFFER_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
_REPEATS = 8
_WAKING_S = {"cpu": 0.0, "cuda": 0.4}  # an idle GPU raises its clocks only then


@dataclass(frozen=True)
class DecodeFloor:
    """bandwidth in bytes/s. weight_bytes: those that a step reads; of a mixture of experts, which reads fewer, all of them.
    product_s: seconds that the products of one token take at the machine's best, 0 if that is not known."""

    bandwidth: float
    weight_bytes: int
    kv_bytes_per_token: int
    product_s: float = 0.0

    def tokens_per_s(self, batch_size: int, context_tokens: float) -> float:
        """Upper bound for `batch_size` requests that decode together at a mean context of `context_tokens`."""
        weights_s = max(self.weight_bytes / self.bandwidth, batch_size * self.product_s)
        return batch_size / (weights_s + batch_size * context_tokens * self.kv_bytes_per_token / self.bandwidth)


def decode_floor(
    model: ModelConfig,
    info: EngineInfo,
    kv: QuantPolicy,
    bandwidth: float,
    flops: float | None = None,
    *,
    is_gguf: bool = False,
) -> DecodeFloor:
    """The floor of a running engine. flops: of products in 16 bits, per second, where they are to count.

    An embedding with a table of its own is left out: a step reads a few rows of it. In a GGUF file it may be stored in any
    format, and is counted.
    """
    dtype, table = getattr(torch, info.dtype), model.vocab_size * model.hidden_size
    has_own_table = not model.tie_word_embeddings and not is_gguf
    is_read = info.weight_bytes - (dtype.itemsize * table if has_own_table else 0)
    product_s = 0.0 if flops is None else (model.num_layers * _layer_flops(model) + 2 * table) / flops
    return DecodeFloor(bandwidth, is_read, kv_bytes_per_token(model, dtype, kv), product_s)


def prefill_floor(model: ModelConfig, tokens: int, flops: float) -> float:
    """Prompt tokens per second if all products ran at so many operations per second: weights once, causal attention on top."""
    attention = 2 * model.num_heads * model.head_dim * tokens
    return flops / (model.num_layers * (_layer_flops(model) + attention))


def _layer_flops(model: ModelConfig) -> int:
    """Of one token through the weights of one layer."""
    heads = 2 * (model.num_heads + model.num_kv_heads) * model.head_dim
    return 2 * model.hidden_size * (heads + 3 * model.intermediate_size)


def measure_read_bandwidth(device: torch.device) -> float:
    """Bytes per second that a sum over a large buffer reads with torch's threads; the best of several passes."""
    size = _BUFFER_BYTES[device.type]
    buffer = torch.ones(size // 4, dtype=torch.float32, device=device)
    return size / least_seconds(lambda: buffer.sum().item(), _REPEATS, _WAKING_S[device.type])


def least_seconds(work: Callable[[], object], repeats: int, budget_s: float = 0.0) -> float:
    """The shortest of so many runs, or of as many more as fit the budget."""
    best, end = float("inf"), time.perf_counter() + budget_s
    while repeats > 0 or time.perf_counter() < end:
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
        repeats -= 1
    return best
