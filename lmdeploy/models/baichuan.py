"""Baichuan and Baichuan2: Llama with fused q, k, v; the 13B ones use ALiBi, the second generation a normalized head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from lmdeploy.models.config import ModelConfig
from lmdeploy.models.llama import LlamaForCausalLM
from lmdeploy.models.weight_rules import Transform
from lmdeploy.models.weights import Rename, WeightMap


def unit_rows(weight: Tensor, config: ModelConfig) -> Tensor:
    """The output head of Baichuan2 is stored as it was trained and used with rows of length one."""
    return F.normalize(weight.float(), dim=-1) if config.normalize_head else weight


class BaichuanForCausalLM(LlamaForCausalLM):
    """https://arxiv.org/abs/2309.10305

    The sizes share one architecture name: only those with a rotary embedding name max_position_embeddings, and only
    Baichuan2's config names its tokenizer.
    """

    weight_map = WeightMap(
        Rename(r"\.W_pack\.", ".qkv_proj."),
        Transform(r"^lm_head\.", unit_rows),
        *LlamaForCausalLM.weight_map.rules,
    )

    @classmethod
    def config_fields(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        fields: dict[str, Any] = {"normalize_head": "tokenizer_class" in hf or hf["vocab_size"] == 125696}
        if "max_position_embeddings" not in hf:
            fields |= {"rope": None, "alibi": "scaled"}
        return fields
