"""What families with routed experts share: the usual names of experts, and the block in place of the feed-forward one."""

from __future__ import annotations

from torch import nn

from lmdeploy.layers.moe import RoutedMLP
from lmdeploy.models.base import CausalLM
from lmdeploy.models.llama import LlamaForCausalLM
from lmdeploy.models.weight_rules import Experts
from lmdeploy.models.weights import Rename, Stack, WeightMap

ROUTED_WEIGHT_MAP = WeightMap(
    Rename(r"\.mlp\.gate\.", ".mlp.router."),
    Rename(r"\.shared_experts\.", ".shared_expert."),
    Rename(r"\.shared_expert_gate\.", ".shared_gate."),
    Experts(r"mlp\.experts", "mlp"),
    Stack("shared_expert.gate_up_proj", ("shared_expert.gate_proj", "shared_expert.up_proj")),
    *LlamaForCausalLM.weight_map.rules,
)
"""Llama's names, and the usual ones of routed and shared experts."""


def make_routed_mlp(model: CausalLM, index: int) -> nn.Module:
    """`make_mlp` of families with routed experts; their config says which layers are routed."""
    config, moe = model.config, model.config.moe
    if moe is None or not moe.layers[index]:
        return CausalLM.make_mlp(model, index)
    return RoutedMLP(config.hidden_size, moe, config.activation)
