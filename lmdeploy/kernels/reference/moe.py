"""Routed experts in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from lmdeploy.kernels import invariant
from lmdeploy.kernels.reference.basic import gated_activation


def clamped_swiglu(gate_up: Tensor, limit: float) -> Tensor:
    """(up + 1) * gate * sigmoid(1.702 gate), gate at most limit, up within it: [T, 2 I] -> [T, I], gate in the first half."""
    gate, up = gate_up.chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def routed_mlp(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: str,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    clamp: float | None = None,
) -> Tensor:
    """Weighted sum of the gated MLPs that each token is routed to, one product per expert that has tokens.

    x: [T, C]; weights: [T, k] float32; experts: [T, k] expert of each choice; gate_up: [E, 2 I, C]; down: [E, C, I];
    biases [E, 2 I] and [E, C]. clamp: clamped_swiglu with this limit in place of the activation. Returns [T, C] in x's
    dtype, summed in float32.
    """
    order = experts.flatten().argsort(stable=True)
    tokens = order // experts.shape[1]
    counts = torch.bincount(experts.flatten(), minlength=gate_up.shape[0]).tolist()
    parts = []
    start = 0
    for expert, count in enumerate(counts):
        if count:
            rows = x[tokens[start : start + count]]
            hidden = invariant.linear(rows, gate_up[expert], None if gate_up_bias is None else gate_up_bias[expert])
            hidden = gated_activation(hidden, activation) if clamp is None else clamped_swiglu(hidden, clamp)
            parts.append(invariant.linear(hidden, down[expert], None if down_bias is None else down_bias[expert]))
            start += count
    weighted = torch.cat(parts).float() * weights.flatten()[order, None]
    return torch.zeros_like(x, dtype=torch.float32).index_add_(0, tokens, weighted).to(x.dtype)
