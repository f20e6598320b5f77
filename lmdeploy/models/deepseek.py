"""DeepSeek-MoE: Llama whose later layers route to many small experts beside shared ones."""

from __future__ import annotations

from lmdeploy.models.llama import LlamaForCausalLM


class DeepseekForCausalLM(LlamaForCausalLM):
    """https://arxiv.org/abs/2401.06066"""
