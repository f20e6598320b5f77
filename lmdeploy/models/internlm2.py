"""InternLM2 and 2.5: Llama's layers under names of their own, with q, k and v rows stored group by group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmdeploy.models.llama import LlamaForCausalLM


class InternLM2ForCausalLM(LlamaForCausalLM):
    """https://arxiv.org/abs/2403.17297"""

    @classmethod
    def config_fields(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        return {"qkv_bias": bool(hf.get("bias")), "o_bias": bool(hf.get("bias"))}
