"""Llama 1, 2, 3.x and the families that share its tree: pre-norm attention and gated MLP, both residual."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar

from torch import Tensor, nn

from lmdeploy.layers.attention import SelfAttention
from lmdeploy.layers.context import ForwardContext
from lmdeploy.layers.fused import layer_tail
from lmdeploy.layers.mlp import GatedMLP
from lmdeploy.models.base import FEED_FORWARD_INNER, FEED_FORWARD_INPUTS, CausalLM, ScaleTable
from lmdeploy.models.config import ModelConfig
from lmdeploy.models.weights import Rename, Skip, Stack, WeightMap


class LlamaDecoderLayer(nn.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    awq_groups: ClassVar[ScaleTable] = (
        ("input_layernorm", ("self_attn.qkv_proj", "self_attn.qkv_a_proj")),
        ("self_attn.q_a_layernorm", ("self_attn.q_b_proj",)),
        ("self_attn.qkv_proj", ("self_attn.o_proj",)),
        ("post_attention_layernorm", FEED_FORWARD_INPUTS),
        *FEED_FORWARD_INNER,
    )

    def __init__(self, model: CausalLM, index: int) -> None:
        super().__init__()
        self.is_last = index == model.config.num_layers - 1
        self.input_layernorm = model.make_norm()
        self.self_attn = model.make_attention(index)
        self.post_attention_layernorm = model.make_norm()
        self.mlp = model.make_mlp(index)
        self.behind: Any = None  # norm and qkv_proj of the next layer

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        attention, norm, mlp = self.self_attn, self.post_attention_layernorm, self.mlp
        # Of one token all up to the next layer's attention may be one kernel, as reading weights is then all there is to do.
        if len(x) == 1 and isinstance(attention, SelfAttention) and isinstance(mlp, GatedMLP):
            attended = attention.attend(x, self.input_layernorm, ctx)
            x, ctx.qkv = layer_tail(attended, x, attention.o_proj, norm, mlp, self.behind)
            return ctx.still_read(x, self.is_last)
        x = ctx.still_read(self.self_attn(x, self.input_layernorm, ctx, residual=x), self.is_last)
        return self.mlp(x, self.post_attention_layernorm, residual=x)


class LlamaForCausalLM(CausalLM):
    """https://arxiv.org/abs/2302.13971"""

    weight_map = WeightMap(
        Rename(r"^model\.", ""),
        Stack("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Stack("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
        Skip(r"rotary_emb\.inv_freq$"),
    )

    layer_class: ClassVar[type[nn.Module]] = LlamaDecoderLayer

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        for layer, behind in pairwise(self.layers):
            if isinstance(layer, LlamaDecoderLayer) and isinstance(behind.self_attn, SelfAttention):
                layer.behind = (behind.input_layernorm, behind.self_attn.qkv_proj)

    def make_layer(self, index: int) -> nn.Module:
        return self.layer_class(self, index)
