"""Multi-head latent attention over the blocked cache. It knows config fields, no model's name."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lmdeploy import kernels
from lmdeploy.kernels import invariant
from lmdeploy.kernels.spec import AttentionSpec
from lmdeploy.layers.context import ForwardContext
from lmdeploy.layers.fused import norm_linear
from lmdeploy.layers.linear import Linear
from lmdeploy.layers.norm import Norm, RMSNorm
from lmdeploy.layers.rotary import Rotary

if TYPE_CHECKING:
    from lmdeploy.models.config import ModelConfig
    from lmdeploy.models.moe_config import MLAConfig

LATENT_NORM_EPS = 1e-6


class LatentAttention(nn.Module):
    """Multi-head latent attention over a cache of one compressed vector per token. https://arxiv.org/abs/2405.04434

    Queries are projected into the latent space, so that all heads read the cache as it is; kv_b_proj's rows are never
    applied to the cache. The first projections of queries and latents are one linear.
    """

    def __init__(self, config: ModelConfig, mla: MLAConfig, layer_index: int, rotary: Rotary) -> None:
        super().__init__()
        heads, latent = config.num_heads, mla.kv_lora_rank
        query_size = heads * (mla.nope_dim + mla.rope_dim)
        self.mla = mla
        self.layer_index = layer_index
        self.rotary = rotary
        first_sizes = (mla.q_lora_rank or query_size, latent + mla.rope_dim)
        self.qkv_a_proj = Linear(config.hidden_size, first_sizes, bias=config.qkv_bias)
        if mla.q_lora_rank is not None:
            self.q_a_layernorm = RMSNorm(mla.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = Linear(mla.q_lora_rank, query_size)
        self.kv_a_layernorm = RMSNorm(latent, LATENT_NORM_EPS)
        self.kv_b_proj = Linear(latent, heads * (mla.nope_dim + mla.value_dim))
        self.o_proj = Linear(heads * mla.value_dim, config.hidden_size, bias=config.o_bias)
        self.spec = AttentionSpec(
            num_heads=heads,
            num_kv_heads=1,
            head_dim=latent + mla.rope_dim,
            value_dim=latent,
            scale=config.attention_scale or (mla.nope_dim + mla.rope_dim) ** -0.5,
            interleaved=rotary.interleaved,
        )

    @cached_property
    def up_projections(self) -> tuple[Tensor, Tensor]:
        """From the latent to each head's keys [H, nope, latent] and values [H, Dv, latent]."""
        weight = self.kv_b_proj.method.dense_weight(self.kv_b_proj).unflatten(0, (self.spec.num_heads, -1))
        return weight[:, : self.mla.nope_dim], weight[:, self.mla.nope_dim :]

    def forward(self, x: Tensor, norm: Norm | None, ctx: ForwardContext, residual: Tensor | None) -> Tensor:
        """x, residual, result: [T, C]."""
        mla = self.mla
        queries, latent, rope_key = norm_linear(x, norm, self.qkv_a_proj).split(
            (self.qkv_a_proj.parts[0], mla.kv_lora_rank, mla.rope_dim), dim=-1
        )
        if mla.q_lora_rank is not None:
            queries = norm_linear(queries, self.q_a_layernorm, self.q_b_proj)
        nope, rope = queries.unflatten(-1, (self.spec.num_heads, -1)).split((mla.nope_dim, mla.rope_dim), dim=-1)
        to_keys, to_values = self.up_projections
        q = torch.cat((invariant.in_blocks(lambda x: torch.einsum("thn,hnl->thl", x, to_keys), nope), rope), dim=-1)
        cos, sin = self.rotary.tables(ctx)
        cache, _ = ctx.kv_cache.layer(self.layer_index)
        out = kernels.latent_store_attend(q, self.kv_a_layernorm(latent), rope_key, cos, sin, cache, ctx, self.spec)
        out = invariant.in_blocks(lambda x: torch.einsum("thl,hvl->thv", x, to_values), out)
        return self.o_proj(out.flatten(1), residual=residual)
