"""Self-attention over the blocked cache, with every variant in one place. It knows config fields, no model's name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lmdeploy import kernels
from lmdeploy.kernels.spec import AttentionSpec
from lmdeploy.layers.context import ForwardContext
from lmdeploy.layers.fused import norm_linear
from lmdeploy.layers.linear import Linear
from lmdeploy.layers.norm import Norm, RMSNorm
from lmdeploy.layers.rotary import Rotary

if TYPE_CHECKING:
    from lmdeploy.models.config import ModelConfig


class SelfAttention(nn.Module):
    """o_proj(attention(rope(qkv_proj(norm(x))))) + residual, K and V going through the cache of one layer."""

    def __init__(self, config: ModelConfig, layer_index: int, rotary: Rotary | None) -> None:
        super().__init__()
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.config = config
        self.layer_index = layer_index
        self.rotary = rotary
        self.qkv_proj = Linear(config.hidden_size, (heads * dim, kv_heads * dim, kv_heads * dim), bias=config.qkv_bias)
        self.o_proj = Linear(heads * dim, config.hidden_size, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(dim, config.norm_eps, config.norm_offset)
            self.k_norm = RMSNorm(dim, config.norm_eps, config.norm_offset)
        if config.attention_sinks:
            self.sinks = nn.Parameter(torch.empty(heads), requires_grad=False)
        self.spec: AttentionSpec | None = None

    def forward(self, x: Tensor, norm: Norm | None, ctx: ForwardContext, residual: Tensor | None) -> Tensor:
        """x, residual, result: [T, C]."""
        return self.o_proj(self.attend(x, norm, ctx), residual=residual)

    def attend(self, x: Tensor, norm: Norm | None, ctx: ForwardContext) -> Tensor:
        """What o_proj multiplies, [T, H * D]. x: [T, C]."""
        qkv, ctx.qkv = norm_linear(x, norm, self.qkv_proj) if ctx.qkv is None else ctx.qkv, None
        return self.rope_store_attend(qkv, ctx)

    def rope_store_attend(self, qkv: Tensor, ctx: ForwardContext) -> Tensor:
        """[T, (H + 2 Hkv) * D] -> [T, H * D]; writes this step's K and V into the cache."""
        if self.spec is None:
            self.spec = self.make_spec(qkv.device)
        keys, values = ctx.kv_cache.layer(self.layer_index)
        if self.rotary is not None and self.rotary.config.rotate_on_read:
            return kernels.store_rotate_attend(qkv, self.rotary.step_frequencies(ctx), keys, values, ctx, self.spec)
        cos, sin = self.rotary.tables(ctx) if self.rotary is not None else (None, None)
        return kernels.rope_store_attend(qkv, cos, sin, keys, values, ctx, self.spec)

    def make_spec(self, device: torch.device) -> AttentionSpec:
        """What the kernel must compute; asked for at the first step, when the weights are in place."""
        config = self.config
        return AttentionSpec(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            value_dim=config.head_dim,
            scale=config.attention_scale or config.head_dim**-0.5,
            window=config.layer_windows[self.layer_index],
            softcap=config.attn_softcap,
            interleaved=self.rotary is not None and self.rotary.interleaved,
            alibi_slopes=self._alibi_slopes(device) if config.alibi else None,
            alibi_unscaled=config.alibi == "unscaled",
            sinks=self.sinks if config.attention_sinks else None,
            q_norm=self.q_norm.weight if config.qk_norm else None,
            k_norm=self.k_norm.weight if config.qk_norm else None,
            qk_norm_eps=config.norm_eps,
            qk_norm_offset=config.norm_offset,
            clip=config.clip_qkv,
            logn_length=config.logn_length,
        )

    def _alibi_slopes(self, device: torch.device) -> Tensor:
        from lmdeploy.layers.alibi import alibi_slopes

        return alibi_slopes(self.config.num_heads).to(device)
