"""Mixtral: Mistral with routed experts."""

from __future__ import annotations

from lmdeploy.models.llama import LlamaForCausalLM
from lmdeploy.models.weights import Experts, Rename, WeightMap


class MixtralForCausalLM(LlamaForCausalLM):
    """https://arxiv.org/abs/2401.04088"""

    config_defaults = {"norm_topk_prob": True}
    weight_map = WeightMap(
        Rename(r"\.block_sparse_moe\.gate\.", ".mlp.router."),
        Experts(r"block_sparse_moe\.experts", "mlp", gate="w1", up="w3", down="w2"),
        *LlamaForCausalLM.weight_map.rules,
    )
