"""Baichuan and Baichuan2: Llama with fused q, k, v; the 13B ones use ALiBi, the second generation a normalized head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmdeploy.models.llama import LlamaForCausalLM


class BaichuanForCausalLM(LlamaForCausalLM):
    """https://arxiv.org/abs/2309.10305

    The sizes share one architecture name: only those with a rotary embedding name max_position_embeddings, and only
    Baichuan2's config names its tokenizer.
    """

    @classmethod
    def config_fields(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        fields: dict[str, Any] = {"normalize_head": "tokenizer_class" in hf or hf["vocab_size"] == 125696}
        if "max_position_embeddings" not in hf:
            fields |= {"rope": None, "alibi": "scaled"}
        return fields
