"""Norms and activations in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """x / rms(x) * (offset + weight) over the last dimension; float32 inside, x's dtype outside."""
    wide = x.float()
    normalized = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normalized * (weight.float() + offset)).to(x.dtype)


def activate(x: Tensor, activation: str) -> Tensor:
    """silu, gelu (exact) or gelu_tanh."""
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def gated_activation(gate_up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up: [T, 2 I] -> [T, I], gate in the first half."""
    gate, up = gate_up.chunk(2, dim=-1)
    return activate(gate, activation) * up
