"""Mixtral: Mistral with routed experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmdeploy.models.llama import LlamaForCausalLM
from lmdeploy.models.moe_config import read_moe
from lmdeploy.models.routed import make_routed_mlp
from lmdeploy.models.weight_rules import Experts
from lmdeploy.models.weights import Rename, WeightMap


class MixtralForCausalLM(LlamaForCausalLM):
    """https://arxiv.org/abs/2401.04088"""

    config_defaults = {"norm_topk_prob": True}
    weight_map = WeightMap(
        Rename(r"\.block_sparse_moe\.gate\.", ".mlp.router."),
        Experts(r"block_sparse_moe\.experts", "mlp", gate="w1", up="w3", down="w2"),
        *LlamaForCausalLM.weight_map.rules,
    )
    make_mlp = make_routed_mlp

    @classmethod
    def config_fields(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        return {"moe": read_moe(hf)}
