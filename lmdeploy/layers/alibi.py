"""Attention with linear biases: how much each head looks away from distant keys. It knows no model."""

from __future__ import annotations

import torch
from torch import Tensor


def alibi_slopes(num_heads: int) -> Tensor:
    """Slope of each head's bias, [H] float32; a count that is no power of two takes the rest from the next power's slopes.

    Source: https://arxiv.org/abs/2108.12409
    """
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-8 * (i + 1) / (2 * power)) for i in range(0, 2 * (num_heads - power), 2)]
    return torch.tensor(slopes, dtype=torch.float32, device="cpu")
