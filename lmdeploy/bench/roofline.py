"""How fast decoding could be at best: what a step must read and multiply, over what the machine can. It runs no model.

A step reads the weights once, and the keys and values of every request's context. With many requests the products of the
weights take longer than reading them. Source: the roofline model, https://doi.org/10.1145/1498765.1498785
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

# Well beyond any last-level cache, so that what is read comes from memory.
_BUFFER_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
_REPEATS = 8


@dataclass(frozen=True)
class DecodeFloor:
    """bandwidth in bytes/s. weight_bytes: of a mixture of experts, or where the embedding has a table of its own, a token
    reads fewer than are stored. product_s: seconds that the products of one token take at the machine's best."""

    bandwidth: float
    weight_bytes: int
    kv_bytes_per_token: int
    product_s: float = 0.0

    def tokens_per_s(self, batch_size: int, context_tokens: float) -> float:
        """Upper bound for `batch_size` requests that decode together at a mean context of `context_tokens`."""
        weights_s = max(self.weight_bytes / self.bandwidth, batch_size * self.product_s)
        return batch_size / (weights_s + batch_size * context_tokens * self.kv_bytes_per_token / self.bandwidth)


def measure_read_bandwidth(device: torch.device) -> float:
    """Bytes per second that a sum over a large buffer reads with torch's threads; the best of several passes."""
    size = _BUFFER_BYTES[device.type]
    buffer = torch.ones(size // 4, dtype=torch.float32, device=device)
    best = float("inf")
    for _ in range(_REPEATS):
        started = time.perf_counter()
        buffer.sum().item()
        best = min(best, time.perf_counter() - started)
    return size / best
