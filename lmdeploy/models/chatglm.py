"""ChatGLM2, ChatGLM3 and GLM-4-9B in their original format: interleaved rotation of half of each head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmdeploy.models.config import require
from lmdeploy.models.llama import LlamaForCausalLM
from lmdeploy.models.rope_config import read_rope
from lmdeploy.models.weights import Rename, Skip, WeightMap


class ChatGLMForConditionalGeneration(LlamaForCausalLM):
    """https://arxiv.org/abs/2406.12793"""

    config_keys = {
        "padded_vocab_size": "vocab_size",
        "num_layers": "num_hidden_layers",
        "kv_channels": "head_dim",
        "ffn_hidden_size": "intermediate_size",
        "seq_length": "max_position_embeddings",
    }
    config_defaults = {"partial_rotary_factor": 0.5, "rope_interleaved": True}

    weight_map = WeightMap(
        Skip(r"\.rotary_pos_emb\."),
        Rename(r"^transformer\.embedding\.word_embeddings\.", "embed_tokens."),
        Rename(r"^transformer\.output_layer\.", "lm_head."),
        Rename(r"^transformer\.encoder\.final_layernorm\.", "norm."),
        Rename(r"^transformer\.encoder\.", ""),
        Rename(r"\.self_attention\.query_key_value\.", ".self_attn.qkv_proj."),
        Rename(r"\.self_attention\.dense\.", ".self_attn.o_proj."),
        Rename(r"\.mlp\.dense_h_to_4h\.", ".mlp.gate_up_proj."),
        Rename(r"\.mlp\.dense_4h_to_h\.", ".mlp.down_proj."),
    )

    @classmethod
    def config_fields(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        require(hf, rmsnorm=True, post_layer_norm=True, apply_residual_connection_post_layernorm=False)
        require(hf, multi_query_attention=True)
        bias = bool(hf.get("add_bias_linear", False))
        theta = 10000.0 * (hf.get("rope_ratio") or 1)
        return {
            "num_kv_heads": hf["multi_query_group_num"],
            "rope": read_rope({**hf, "rope_theta": theta}, hf["head_dim"]),
            "qkv_bias": bias or bool(hf.get("add_qkv_bias", False)),
            "o_bias": bias,
            "mlp_bias": bias,
        }
