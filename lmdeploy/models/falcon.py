"""Falcon: LayerNorm, an ungated MLP beside or after the attention, rotary embedding or ALiBi."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lmdeploy import kernels
from lmdeploy.layers.context import ForwardContext
from lmdeploy.layers.fused import norm_linear
from lmdeploy.layers.layer_norm import LayerNorm
from lmdeploy.layers.linear import Linear
from lmdeploy.layers.norm import Norm
from lmdeploy.models.base import CausalLM, ScaleTable
from lmdeploy.models.llama import LlamaDecoderLayer
from lmdeploy.models.weight_rules import Rows, grouped_qkv
from lmdeploy.models.weights import Rename, WeightMap


class MLP(nn.Module):
    """down(activation(up x)), the ungated form."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str, bias: bool = False) -> None:
        super().__init__()
        self.up_proj = Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor, norm: Norm | None, residual: Tensor | None) -> Tensor:
        hidden = kernels.activate(norm_linear(x, norm, self.up_proj), self.activation)
        return self.down_proj(hidden, residual=residual)


class FalconParallelLayer(nn.Module):
    """x + attention(norm x) + mlp(norm x), both reading one norm or each its own."""

    def __init__(self, model: CausalLM, index: int) -> None:
        super().__init__()
        self.is_last = index == model.config.num_layers - 1
        self.input_layernorm = model.make_norm()
        self.self_attn = model.make_attention(index)
        self.mlp_layernorm = model.make_norm() if model.config.variant == "two norms" else None
        self.mlp = model.make_mlp(index)
        values = ("self_attn.qkv_proj", ("self_attn.o_proj",))
        self.awq_groups: ScaleTable = (("input_layernorm", ("self_attn.qkv_proj", "mlp.up_proj")), values)
        if self.mlp_layernorm is not None:
            one_each = (("input_layernorm", ("self_attn.qkv_proj",)), ("mlp_layernorm", ("mlp.up_proj",)))
            self.awq_groups = (*one_each, values)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        attended = self.self_attn(x, self.input_layernorm, ctx, residual=x.clone())  # the MLP reads x, too
        x, attended = (ctx.still_read(part, self.is_last) for part in (x, attended))
        return self.mlp(x, self.mlp_layernorm or self.input_layernorm, residual=attended)


class FalconForCausalLM(CausalLM):
    """https://arxiv.org/abs/2311.16867"""

    config_keys = {
        "n_head": "num_attention_heads",
        "n_layer": "num_hidden_layers",
        "n_head_kv": "num_kv_heads",
        "ffn_hidden_size": "intermediate_size",
    }
    config_defaults = {
        "tie_word_embeddings": True,
        "layer_norm_epsilon": 1e-5,
        "activation": "gelu",
        "parallel_attn": True,
        "multi_query": True,
    }

    weight_map = WeightMap(
        Rename(r"^transformer\.word_embeddings\.", "embed_tokens."),
        Rename(r"^transformer\.ln_f\.", "norm."),
        Rename(r"^transformer\.h\.", "layers."),
        Rename(r"\.ln_attn\.", ".input_layernorm."),
        Rename(r"\.ln_mlp\.", ".mlp_layernorm."),
        Rename(r"\.self_attention\.query_key_value\.", ".self_attn.qkv_proj."),
        Rename(r"\.self_attention\.dense\.", ".self_attn.o_proj."),
        Rename(r"\.mlp\.dense_h_to_4h\.", ".mlp.up_proj."),
        Rename(r"\.mlp\.dense_4h_to_h\.", ".mlp.down_proj."),
        Rows(r"\.qkv_proj\.", grouped_qkv),
    )

    @classmethod
    def config_fields(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        heads, bias = hf["num_attention_heads"], bool(hf.get("bias"))
        new = hf.get("new_decoder_architecture", "n_head_kv" in hf)  # the first configs have only the second key
        fields: dict[str, Any] = {"qkv_bias": bias, "o_bias": bias, "mlp_bias": bias}
        fields["num_kv_heads"] = hf.get("num_kv_heads") or heads if new else 1 if hf["multi_query"] else heads
        fields["variant"] = "one norm" if new or hf["parallel_attn"] else "sequential"
        if new and hf.get("num_ln_in_parallel_attn") in (None, 2):
            fields["variant"] = "two norms"
        if hf.get("alibi"):
            fields |= {"rope": None, "alibi": "unscaled"}
        return fields

    def make_layer(self, index: int) -> nn.Module:
        return (
            LlamaDecoderLayer(self, index) if self.config.variant == "sequential" else FalconParallelLayer(self, index)
        )

    def make_norm(self) -> Norm:
        return LayerNorm(self.config.hidden_size, self.config.norm_eps)

    def make_mlp(self, index: int) -> MLP:
        config = self.config
        return MLP(config.hidden_size, config.intermediate_size, config.activation, bias=config.mlp_bias)
