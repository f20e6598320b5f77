"""Mixtral: Mistral with routed experts."""

from __future__ import annotations

from lmdeploy.models.llama import LlamaForCausalLM


class MixtralForCausalLM(LlamaForCausalLM):
    """https://arxiv.org/abs/2401.04088"""

    config_defaults = {"norm_topk_prob": True}
