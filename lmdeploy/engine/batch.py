"""From a step's plan to the tensors of one forward pass. It runs no model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lmdeploy.engine.scheduler import Scheduled, StepPlan
from lmdeploy.engine.slots import Slots
from lmdeploy.engine.state import RequestState
from lmdeploy.layers.context import ForwardContext, KVCache

UNKNOWN_TOKEN = -1


@dataclass
class Batch:
    """A step's inputs on the device.

    input_ids: [T] int64. sample_rows: rows of the hidden states whose logits are sampled; sampling_states: their
    requests.
    """

    input_ids: Tensor
    ctx: ForwardContext
    sample_rows: Tensor
    sampling_states: list[RequestState]
    entries: list[Scheduled]


def build_batch(plan: StepPlan, kv_cache: KVCache, slots: Slots, decode_buffers: object | None = None) -> Batch:
    """Lay the scheduled tokens of all requests end to end; a token in flight is taken from its request's slot."""
    entries, device = plan.scheduled, kv_cache.data.device
    block_size = kv_cache.block_size
    query_lens = [entry.num_tokens for entry in entries]
    context_lens = [entry.start + entry.num_tokens for entry in entries]
    starts = np.concatenate(([0], np.cumsum(query_lens)))
    positions = np.concatenate([np.arange(entry.start, end) for entry, end in zip(entries, context_lens, strict=True)])
    ids = np.concatenate([_known_ids(entry) for entry in entries])
    block_tables = _block_tables(entries, max(context_lens), block_size)
    rows = np.repeat(np.arange(len(entries)), query_lens)
    slot_mapping = block_tables[rows, positions // block_size].astype(np.int64) * block_size + positions % block_size

    def to_device(values: object, dtype: type) -> Tensor:
        host = torch.from_numpy(np.asarray(values, dtype))
        # From memory that is not pinned the copy would wait for the steps in flight.
        return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host

    input_ids = to_device(ids, np.int64)
    unknown = np.flatnonzero(ids == UNKNOWN_TOKEN)
    if len(unknown):
        lines = slots.lines([entries[row].state for row in rows[unknown]])
        input_ids[to_device(unknown, np.int64)] = slots.last_tokens[lines]
    ctx = ForwardContext(
        positions=to_device(positions, np.int64),
        cu_seqlens_q=to_device(starts, np.int32),
        context_lens=to_device(context_lens, np.int32),
        block_tables=to_device(block_tables, np.int32),
        slot_mapping=to_device(slot_mapping, np.int64),
        prompt_lens=to_device([len(entry.state.prompt_ids) for entry in entries], np.int32),
        kv_cache=kv_cache,
        query_lens=query_lens,
        context_lens_host=context_lens,
        decode_buffers=decode_buffers,
    )
    sampling = [index for index, entry in enumerate(entries) if entry.samples]
    return Batch(
        input_ids=input_ids,
        ctx=ctx,
        sample_rows=to_device(starts[1:][sampling] - 1, np.int64),
        sampling_states=[entries[index].state for index in sampling],
        entries=entries,
    )


def _known_ids(entry: Scheduled) -> np.ndarray:
    """The entry's token ids, with UNKNOWN_TOKEN for one that is still in flight."""
    known = entry.state.token_ids[entry.start : entry.start + entry.num_tokens]
    return np.array(known + [UNKNOWN_TOKEN] * (entry.num_tokens - len(known)), np.int64)


def _block_tables(entries: list[Scheduled], max_context_len: int, block_size: int) -> np.ndarray:
    """[B, max_blocks] int32, padded with block 0."""
    tables = np.zeros((len(entries), -(-max_context_len // block_size)), np.int32)
    for row, entry in enumerate(entries):
        blocks = entry.state.block_table[: tables.shape[1]]
        tables[row, : len(blocks)] = blocks
    return tables
