"""Qwen, the first generation: Llama's layers under GPT names, stretched beyond its trained length by NTK steps and logn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmdeploy.models.config import require
from lmdeploy.models.llama import LlamaForCausalLM
from lmdeploy.models.rope_config import read_rope


class QWenLMHeadModel(LlamaForCausalLM):
    """https://arxiv.org/abs/2309.16609. The config's intermediate size counts gate and up together."""

    config_keys = {
        "n_embd": "hidden_size",
        "n_head": "num_attention_heads",
        "n_layer": "num_hidden_layers",
        "ffn_hidden_size": "intermediate_size",
        "kv_channels": "head_dim",
        "rotary_emb_base": "rope_theta",
        "rotary_pct": "partial_rotary_factor",
        "padded_vocab_size": "vocab_size",
    }
    config_defaults = {"intermediate_size": 22016}

    @classmethod
    def config_fields(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        require(hf, no_bias=True)
        trained = int(hf.get("seq_length") or 8192)
        kind = "dynamic_by_prompt" if hf.get("use_dynamic_ntk") else "default"
        head_dim = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
        usual = {**hf, "max_position_embeddings": trained, "rope_scaling": {"type": kind, "factor": 1.0}}
        return {
            "intermediate_size": hf["intermediate_size"] // 2,
            "qkv_bias": True,
            "rope": read_rope(usual, head_dim),
            "logn_length": trained if hf.get("use_logn_attn") else None,
        }
