"""Experts that tokens are routed to. It knows how scores choose and weigh experts, not how an expert's weight is stored."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lmdeploy.kernels import invariant
from lmdeploy.layers.linear import Linear
from lmdeploy.layers.mlp import GatedMLP
from lmdeploy.layers.norm import Norm

if TYPE_CHECKING:
    from lmdeploy.models.moe_config import MoEConfig


class Router(nn.Module):
    """Scores every expert for every token and chooses the best ones; in float32 throughout."""

    float32_parameters = ("weight", "bias", "score_bias")

    def __init__(self, hidden_size: int, moe: MoEConfig) -> None:
        super().__init__()
        self.moe = moe
        self.weight = nn.Parameter(torch.empty(moe.num_experts, hidden_size), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(moe.num_experts), requires_grad=False) if moe.router_bias else None
        self.score_bias = nn.Parameter(torch.empty(moe.num_experts), requires_grad=False) if moe.score_bias else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [T, k] float32 and experts [T, k] of the k choices of each token; x: [T, C]."""
        return choose_experts(invariant.linear(x.float(), self.weight, self.bias), self.score_bias, self.moe)


def choose_experts(logits: Tensor, score_bias: Tensor | None, moe: MoEConfig) -> tuple[Tensor, Tensor]:
    """Weights [T, k] and experts [T, k] from router logits [T, E] float32, as the config's scoring and grouping say."""
    if moe.scoring == "topk_softmax":
        top, experts = logits.topk(moe.experts_per_token, dim=-1)
        return torch.softmax(top, dim=-1), experts
    scores = torch.sigmoid(logits) if moe.scoring == "sigmoid" else torch.softmax(logits, dim=-1)
    rated = scores if score_bias is None else scores + score_bias
    if moe.group_score is not None and moe.top_groups < moe.num_groups:
        rated = _only_best_groups(rated, moe)
    experts = rated.topk(moe.experts_per_token, dim=-1).indices
    weights = scores.gather(1, experts)
    if moe.norm_power is not None and moe.experts_per_token > 1:
        weights = weights / weights.norm(p=moe.norm_power, dim=-1, keepdim=True).clamp(min=1e-20)
    return weights * moe.scaling, experts


def _only_best_groups(rated: Tensor, moe: MoEConfig) -> Tensor:
    """Ratings [T, E] with those outside the best groups at minus infinity. https://arxiv.org/abs/2405.04434"""
    grouped = rated.unflatten(1, (moe.num_groups, -1))
    kept = 1 if moe.group_score == "max" else 2
    group_scores = grouped.topk(kept, dim=-1).values.sum(dim=-1)
    best = group_scores.topk(moe.top_groups, dim=-1).indices
    outside = torch.ones_like(group_scores, dtype=torch.bool).scatter(1, best, False)
    return grouped.masked_fill(outside[..., None], float("-inf")).flatten(1)


class RoutedMLP(nn.Module):
    """Routed experts, and beside them the shared expert that every token visits, in place of a feed-forward block.

    The experts' rows are stacked into two linears: parts (gate, up) of expert 0, of expert 1, ..., and the downs alike.
    """

    def __init__(self, hidden_size: int, moe: MoEConfig, activation: str) -> None:
        super().__init__()
        size, count = moe.intermediate_size, moe.num_experts
        self.moe = moe
        self.activation = activation
        self.router = Router(hidden_size, moe)
        self.gate_up_proj = Linear(hidden_size, (size, size) * count, moe.expert_bias, num_experts=count)
        self.down_proj = Linear(size, (hidden_size,) * count, moe.expert_bias, num_experts=count)
        self.shared_expert = GatedMLP(hidden_size, moe.shared_size, activation) if moe.shared_size else None
        self.shared_gate = Linear(hidden_size, 1) if moe.shared_gate else None

    def forward(self, x: Tensor, norm: Norm | None, residual: Tensor | None) -> Tensor:
        """x, residual, result: [T, C]."""
        x = x if norm is None else norm(x)
        weights, experts = self.router(x)
        gate_up, down = self.gate_up_proj, self.down_proj
        out = gate_up.method.routed_mlp(x, weights, experts, gate_up, down, self.activation, self.moe.clamp)
        if residual is not None:
            out = out + residual
        if self.shared_expert is None:
            return out
        if self.shared_gate is None:
            return self.shared_expert(x, None, residual=out)
        return out + torch.sigmoid(self.shared_gate(x)) * self.shared_expert(x, None, residual=None)
