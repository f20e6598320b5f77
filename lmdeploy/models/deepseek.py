"""DeepSeek-MoE: Llama whose later layers route to many small experts beside shared ones."""

from __future__ import annotations

from lmdeploy.models.llama import ROUTED_WEIGHT_MAP, LlamaForCausalLM


class DeepseekForCausalLM(LlamaForCausalLM):
    """https://arxiv.org/abs/2401.06066"""

    weight_map = ROUTED_WEIGHT_MAP
