"""Gemma 1, 2 and 3: norms that scale by 1 + weight, scaled embeddings; since Gemma 2 norms around each block and windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from lmdeploy.layers.context import ForwardContext
from lmdeploy.models.base import FEED_FORWARD_INNER, FEED_FORWARD_INPUTS, CausalLM, ScaleTable
from lmdeploy.models.config import read_activation
from lmdeploy.models.llama import LlamaForCausalLM


class SandwichDecoderLayer(nn.Module):
    """x + norm(attention(norm x)), then x + norm(mlp(norm x))."""

    awq_groups: ClassVar[ScaleTable] = (
        ("input_layernorm", ("self_attn.qkv_proj",)),
        ("self_attn.qkv_proj", ("self_attn.o_proj",)),
        ("pre_feedforward_layernorm", FEED_FORWARD_INPUTS),
        *FEED_FORWARD_INNER,
    )

    def __init__(self, model: CausalLM, index: int) -> None:
        super().__init__()
        self.is_last = index == model.config.num_layers - 1
        self.input_layernorm = model.make_norm()
        self.self_attn = model.make_attention(index)
        self.post_attention_layernorm = model.make_norm()
        self.pre_feedforward_layernorm = model.make_norm()
        self.mlp = model.make_mlp(index)
        self.post_feedforward_layernorm = model.make_norm()

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(x, self.input_layernorm, ctx, residual=None))
        x = ctx.still_read(x, self.is_last)
        return x + self.post_feedforward_layernorm(self.mlp(x, self.pre_feedforward_layernorm, residual=None))


def gemma_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """What all generations share. The first configs say "gelu" where the tanh form is meant."""
    activation = read_activation(hf) if hf.get("hidden_activation") else "gelu_tanh"
    return {"norm_offset": 1.0, "embed_scale": hf["hidden_size"] ** 0.5, "activation": activation}


class GemmaForCausalLM(LlamaForCausalLM):
    """https://arxiv.org/abs/2403.08295"""

    config_defaults = {"tie_word_embeddings": True, "head_dim": 256}

    @classmethod
    def config_fields(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        return gemma_fields(hf)


class Gemma2ForCausalLM(LlamaForCausalLM):
    """https://arxiv.org/abs/2408.00118"""

    layer_class = SandwichDecoderLayer
    config_defaults = {
        **GemmaForCausalLM.config_defaults,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 2,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }

    @classmethod
    def config_fields(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        return gemma_fields(hf)


class Gemma3ForCausalLM(LlamaForCausalLM):
    """https://arxiv.org/abs/2503.19786"""

    layer_class = SandwichDecoderLayer
    config_defaults = {
        **GemmaForCausalLM.config_defaults,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
    }

    @classmethod
    def config_fields(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        return {**gemma_fields(hf), "qk_norm": True}
