"""The inputs of a decode step from what lies on the device, in plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class DecodeInputs:
    """Inputs of one token for each of B requests. Names, shapes and types as in ForwardContext; input_ids: [B] int64.

    A padding row has context length 0 and slot -1: nothing is stored for it.
    """

    input_ids: Tensor
    positions: Tensor
    context_lens: Tensor
    block_tables: Tensor
    slot_mapping: Tensor
    prompt_lens: Tensor

    @classmethod
    def empty(cls, batch_size: int, max_blocks: int, device: torch.device) -> DecodeInputs:
        def zeros(dtype: torch.dtype, *more: int) -> Tensor:
            return torch.zeros(batch_size, *more, dtype=dtype, device=device)

        return cls(
            input_ids=zeros(torch.int64),
            positions=zeros(torch.int64),
            context_lens=zeros(torch.int32),
            block_tables=zeros(torch.int32, max_blocks),
            slot_mapping=zeros(torch.int64),
            prompt_lens=zeros(torch.int32),
        )

    def first(self, batch_size: int) -> DecodeInputs:
        """Views of the first rows."""
        return DecodeInputs(*(tensor[:batch_size] for tensor in vars(self).values()))


def prepare_decode(rows: Tensor, last_tokens: Tensor, tables: Tensor, block_size: int, out: DecodeInputs) -> None:
    """Fill `out` for the requests that `rows` name, adding their new blocks to `tables` first.

    rows: [B, 5] int32, for each request its line in `last_tokens` and `tables`, its context length with this token, a block
    that it got for it or -1, the token's id or -1 for the last one sampled, and its prompt's length.
    last_tokens: [R] int64. tables: [R, max_blocks] int32, the blocks of each line.
    """
    line, length, block, token, prompt_len = rows.long().unbind(1)
    position = (length - 1).clamp(min=0)
    column = position // block_size
    tables[line, column] = torch.where(block >= 0, block, tables[line, column]).int()
    out.block_tables.copy_(tables[line])
    slot = out.block_tables.gather(1, column[:, None])[:, 0] * block_size + position % block_size
    out.slot_mapping.copy_(torch.where(length > 0, slot, -1))
    out.input_ids.copy_(torch.where(token >= 0, token, last_tokens[line]))
    out.positions.copy_(position)
    out.context_lens.copy_(length)
    out.prompt_lens.copy_(prompt_len)


def store_tokens(rows: Tensor, tokens: Tensor, last_tokens: Tensor) -> None:
    """The tokens [B] sampled for `rows` become their lines' last ones; what was no token becomes token 0."""
    last_tokens.index_copy_(0, rows[:, 0].long(), tokens.clamp(min=0))
