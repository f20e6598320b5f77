"""Yi as first released: Llama with its own names for the norms. Later checkpoints are called LlamaForCausalLM."""

from __future__ import annotations

from lmdeploy.models.llama import LlamaForCausalLM
from lmdeploy.models.weights import Rename, WeightMap


class YiForCausalLM(LlamaForCausalLM):
    """https://arxiv.org/abs/2403.04652"""

    weight_map = WeightMap(
        Rename(r"\.ln1\.", ".input_layernorm."),
        Rename(r"\.ln2\.", ".post_attention_layernorm."),
        *LlamaForCausalLM.weight_map.rules,
    )
