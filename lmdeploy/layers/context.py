"""One step of the engine as the layers see it: which tokens, where their K and V go, what they attend to.

It owns no weights and knows no request; the runner builds one per step and passes it as an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass
class KVCache:
    """The blocked cache of all layers as one tensor, [NB, L, 2, Hkv, S, D]; MLA keeps [NB, L, 1, 1, S, D]."""

    data: Tensor

    @property
    def block_size(self) -> int:
        """Tokens per block (S)."""
        return self.data.shape[4]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Strided views (keys, values) of one layer, each [NB, Hkv, S, D]; the same view twice for MLA."""
        layer = self.data[:, index]
        return layer[:, 0], layer[:, -1]


@dataclass
class ForwardContext:
    """What a step's T tokens of B requests need beside their ids. Tensors lie on the model's device.

    positions: [T] int64. cu_seqlens_q: [B + 1] int32. context_lens: [B] int32, tokens in the cache after this step.
    block_tables: [B, max_blocks] int32, padded with 0. slot_mapping: [T] int64, block * S + offset.
    prompt_lens: [B] int32, the length that fixes dynamic rotary scaling. query_lens, context_lens_host: the same numbers
    as Python ints, so that no kernel must ask the device. Requests of one token come first. decode_buffers: what the GPU's
    decode attention keeps from step to step. wanted_rows: [R] int64, the tokens whose hidden states are wanted at the end;
    None for all. qkv: [T, (H + 2 Hkv) * D] of the next layer, if the one before has made it.
    """

    positions: Tensor
    cu_seqlens_q: Tensor
    context_lens: Tensor
    block_tables: Tensor
    slot_mapping: Tensor
    prompt_lens: Tensor
    kv_cache: KVCache
    query_lens: list[int]
    context_lens_host: list[int]
    decode_buffers: object | None = None
    wanted_rows: Tensor | None = None
    qkv: Tensor | None = None
    cache: dict[Hashable, Any] = field(default_factory=dict)

    @property
    def is_decode(self) -> bool:
        """Whether every request has exactly one token in this step."""
        return len(self.query_lens) == self.positions.shape[0]

    @cached_property
    def num_decodes(self) -> int:
        """How many requests at the front have exactly one token."""
        return next((row for row, count in enumerate(self.query_lens) if count != 1), len(self.query_lens))

    @cached_property
    def token_rows(self) -> Tensor:
        """Row of the request that owns each token, [T] int64."""
        rows = torch.arange(len(self.query_lens), device=self.positions.device)
        counts = (self.cu_seqlens_q[1:] - self.cu_seqlens_q[:-1]).long()
        return rows.repeat_interleave(counts, output_size=self.positions.shape[0])

    def still_read(self, x: Tensor, is_last: bool) -> Tensor:
        """Of x [T, C] behind a layer's attention what anything reads: of the last layer's only the rows that are wanted."""
        return x[self.wanted_rows] if is_last and self.wanted_rows is not None else x

    def once(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """Compute something once per step and share it between the layers (rotary tables, work lists)."""
        if key not in self.cache:
            self.cache[key] = compute()
        return self.cache[key]
