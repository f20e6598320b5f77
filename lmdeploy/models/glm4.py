"""GLM-4-0414: norms around each block, interleaved rotation of half of each head, stored fused gate and up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmdeploy.models.gemma import SandwichDecoderLayer
from lmdeploy.models.llama import LlamaForCausalLM
from lmdeploy.models.weights import Rename, WeightMap


class Glm4ForCausalLM(LlamaForCausalLM):
    """https://arxiv.org/abs/2406.12793"""

    layer_class = SandwichDecoderLayer
    config_defaults = {"partial_rotary_factor": 0.5, "rope_interleaved": True}

    weight_map = WeightMap(
        Rename(r"\.post_attention_layernorm\.", ".pre_feedforward_layernorm."),
        Rename(r"\.post_self_attn_layernorm\.", ".post_attention_layernorm."),
        Rename(r"\.post_mlp_layernorm\.", ".post_feedforward_layernorm."),
        *LlamaForCausalLM.weight_map.rules,
    )

    @classmethod
    def config_fields(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        return {"o_bias": False}
