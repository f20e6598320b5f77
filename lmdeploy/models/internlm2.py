"""InternLM2 and 2.5: Llama's layers under names of their own, with q, k and v rows stored group by group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmdeploy.models.llama import LlamaForCausalLM
from lmdeploy.models.weight_rules import Rows, grouped_qkv
from lmdeploy.models.weights import Rename, WeightMap


class InternLM2ForCausalLM(LlamaForCausalLM):
    """https://arxiv.org/abs/2403.17297"""

    weight_map = WeightMap(
        Rename(r"^model\.tok_embeddings\.", "embed_tokens."),
        Rename(r"^output\.", "lm_head."),
        Rename(r"\.attention_norm\.", ".input_layernorm."),
        Rename(r"\.ffn_norm\.", ".post_attention_layernorm."),
        Rename(r"\.attention\.wqkv\.", ".self_attn.qkv_proj."),
        Rename(r"\.attention\.wo\.", ".self_attn.o_proj."),
        Rename(r"\.feed_forward\.w1\.", ".mlp.gate_proj."),
        Rename(r"\.feed_forward\.w3\.", ".mlp.up_proj."),
        Rename(r"\.feed_forward\.w2\.", ".mlp.down_proj."),
        Rows(r"\.qkv_proj\.", grouped_qkv),
        *LlamaForCausalLM.weight_map.rules,
    )

    @classmethod
    def config_fields(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        return {"qkv_bias": bool(hf.get("bias")), "o_bias": bool(hf.get("bias"))}
