"""Counters by which the last program to finish a piece of work knows that it is the last. It knows no kernel.

A kernel leaves its counters at zero. They belong to one stream at a time: two kernels that use them must not overlap.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

NUM_COUNTERS = 1 << 16


def counters(device: torch.device) -> Tensor:
    """[NUM_COUNTERS] int32 zeros of the current stream, whose first call must not fall into the capture of a graph."""
    return _counters(device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)


@cache
def _counters(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=device)
