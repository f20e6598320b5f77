"""From a step's plan to the tensors of one forward pass. It runs no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lmdeploy.engine.scheduler import StepPlan
from lmdeploy.engine.state import RequestState
from lmdeploy.layers.context import ForwardContext, KVCache

UNKNOWN_TOKEN = -1


@dataclass
class Batch:
    """A step's inputs on the device.

    input_ids: [T] int64. sample_rows: those whose logits are sampled, of the hidden states that the model gives;
    sampling_states: their requests.
    """

    input_ids: Tensor
    ctx: ForwardContext
    sample_rows: Tensor | slice
    sampling_states: list[RequestState]


def build_batch(
    plan: StepPlan,
    kv_cache: KVCache,
    tokens_in_flight: Callable[[Sequence[RequestState]], Tensor],
    decode_buffers: object | None = None,
) -> Batch:
    """Lay the scheduled tokens of all requests end to end. tokens_in_flight: gives requests' last tokens on the device."""
    states, device, block_size = plan.states, kv_cache.data.device, kv_cache.block_size
    context_lens = plan.starts + plan.num_tokens
    last_rows = np.cumsum(plan.num_tokens) - 1
    rows = np.repeat(np.arange(len(states)), plan.num_tokens)
    positions = np.arange(len(rows)) + (context_lens - 1 - last_rows)[rows]
    ids = _known_ids(plan)
    block_tables = block_table_rows(states, -(-int(context_lens.max()) // block_size))
    slot_mapping = block_tables[rows, positions // block_size].astype(np.int64) * block_size + positions % block_size

    def to_device(values: object, dtype: type) -> Tensor:
        return send(np.asarray(values, dtype), device)

    input_ids = to_device(ids, np.int64)
    unknown = np.flatnonzero(ids == UNKNOWN_TOKEN)
    if len(unknown):
        input_ids[to_device(unknown, np.int64)] = tokens_in_flight([states[row] for row in rows[unknown]])
    sampling = np.flatnonzero(plan.samples)
    sample_rows = to_device(last_rows[sampling] if len(sampling) else [0], np.int64)  # kernels want at least a row
    ctx = ForwardContext(
        positions=to_device(positions, np.int64),
        cu_seqlens_q=to_device(np.append(0, last_rows + 1), np.int32),
        context_lens=to_device(context_lens, np.int32),
        block_tables=to_device(block_tables, np.int32),
        slot_mapping=to_device(slot_mapping, np.int64),
        prompt_lens=to_device([len(state.prompt_ids) for state in states], np.int32),
        kv_cache=kv_cache,
        query_lens=plan.num_tokens.tolist(),
        context_lens_host=context_lens.tolist(),
        decode_buffers=decode_buffers,
        wanted_rows=None if plan.is_decode or plan.states.wants_hidden_states else sample_rows,
    )
    return Batch(
        input_ids=input_ids,
        ctx=ctx,
        sample_rows=sample_rows if plan.states.wants_hidden_states else slice(None),
        sampling_states=[states[row] for row in sampling],
    )


def _known_ids(plan: StepPlan) -> np.ndarray:
    """The plan's token ids [T] int64, with UNKNOWN_TOKEN for one that is still in flight."""
    ids: list[int] = []
    for state, start, num_tokens in zip(plan.states, plan.starts.tolist(), plan.num_tokens.tolist(), strict=True):
        known = state.token_ids[start : start + num_tokens]
        ids += known if len(known) == num_tokens else [*known, UNKNOWN_TOKEN]
    return np.array(ids, np.int64)


def block_table_rows(states: Sequence[RequestState], num_blocks: int) -> np.ndarray:
    """The requests' first blocks, [B, num_blocks] int32, padded with block 0."""
    tables = np.zeros((len(states), num_blocks), np.int32)
    for row, state in zip(tables, states, strict=True):
        blocks = state.block_table[:num_blocks]
        row[: len(blocks)] = blocks
    return tables


def send(values: np.ndarray, device: torch.device) -> Tensor:
    """A copy on the device; on the CPU, the same memory."""
    host = torch.from_numpy(values)
    # From memory that is not pinned the copy would wait for the steps in flight.
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
