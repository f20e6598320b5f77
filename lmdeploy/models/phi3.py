"""Phi-3, Phi-3.5 and Phi-4-mini: Llama whose checkpoint stores the fused projections."""

from __future__ import annotations

from lmdeploy.models.llama import LlamaForCausalLM


class Phi3ForCausalLM(LlamaForCausalLM):
    """https://arxiv.org/abs/2404.14219"""
