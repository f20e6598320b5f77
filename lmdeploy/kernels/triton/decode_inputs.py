# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""The inputs of a decode step in one launch; see kernels/reference/decode_inputs.py."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lmdeploy.kernels.reference.decode_inputs import DecodeInputs

_COLUMNS = 256


def prepare_decode(rows: Tensor, last_tokens: Tensor, tables: Tensor, block_size: int, out: DecodeInputs) -> None:
    """As the reference."""
    _prepare[(rows.shape[0],)](
        rows,
        last_tokens,
        tables,
        out.input_ids,
        out.positions,
        out.context_lens,
        out.block_tables,
        out.slot_mapping,
        out.prompt_lens,
        tables.stride(0),
        out.block_tables.stride(0),
        block_size,
        _COLUMNS,
    )


@triton.jit
def _prepare(
    rows,
    last_tokens,
    tables,
    input_ids,
    positions,
    context_lens,
    block_tables,
    slot_mapping,
    prompt_lens,
    table_stride,
    out_stride,
    BLOCK_SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0)
    line = tl.load(rows + row * 5).to(tl.int64)
    length = tl.load(rows + row * 5 + 1)
    block = tl.load(rows + row * 5 + 2)
    token = tl.load(rows + row * 5 + 3).to(tl.int64)
    position = tl.maximum(length - 1, 0)
    last = position // BLOCK_SIZE
    current = tl.load(tables + line * table_stride + last)
    current = tl.where(block >= 0, block, current)
    tl.store(tables + line * table_stride + last, current)
    for start in range(0, last, COLUMNS):  # the last entry is known; what lies behind it is never read
        columns = start + tl.arange(0, COLUMNS)
        entries = tl.load(tables + line * table_stride + columns, mask=columns < last, other=0)
        tl.store(block_tables + row.to(tl.int64) * out_stride + columns, entries, mask=columns < last)
    tl.store(block_tables + row.to(tl.int64) * out_stride + last, current)
    slot = current.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
    tl.store(slot_mapping + row, tl.where(length > 0, slot, -1))
    tl.store(input_ids + row, tl.where(token >= 0, token, tl.load(last_tokens + line)))
    tl.store(positions + row, position.to(tl.int64))
    tl.store(context_lens + row, length)
    tl.store(prompt_lens + row, tl.load(rows + row * 5 + 4))


def store_tokens(rows: Tensor, tokens: Tensor, last_tokens: Tensor) -> None:
    """As the reference."""
    _store_tokens[(rows.shape[0],)](rows, tokens, last_tokens)


@triton.jit
def _store_tokens(rows, tokens, last_tokens):
    row = tl.program_id(0)
    tl.store(last_tokens + tl.load(rows + row * 5), tl.maximum(tl.load(tokens + row), 0))
