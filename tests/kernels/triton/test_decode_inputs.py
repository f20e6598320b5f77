"""The inputs of decode steps and the entries of latent attention, against their twins."""

from __future__ import annotations

import pytest
import torch

from lmdeploy.kernels.reference import decode_inputs as reference
from lmdeploy.kernels.reference.decode_inputs import DecodeInputs
from lmdeploy.kernels.triton import decode_inputs
from lmdeploy.kernels.triton.latent import store_entries

BLOCK_SIZE, LINES, BLOCKS = 16, 7, 300


@pytest.mark.parametrize("seed", range(3))
def test_prepare_decode(seed: int, device: torch.device) -> None:
    torch.manual_seed(seed)
    tables = torch.randint(0, 99, (LINES + 1, BLOCKS), dtype=torch.int32, device=device)
    last_tokens = torch.randint(0, 1000, (LINES + 1,), device=device)
    rows = []
    for line in torch.randperm(LINES)[:5].tolist():
        length = int(torch.randint(1, BLOCKS * BLOCK_SIZE, ()))
        rows.append([line, length, 55 if line % 2 else -1, 77 if line % 3 else -1, max(length - 3, 1)])
    rows.append([LINES, 0, -1, 0, 1])  # padding
    on_device = torch.tensor(rows, dtype=torch.int32, device=device)
    expected_tables, actual_tables = tables.clone(), tables.clone()
    expected, actual = (DecodeInputs.empty(len(rows), BLOCKS, device) for _ in range(2))
    reference.prepare_decode(on_device, last_tokens, expected_tables, BLOCK_SIZE, expected)
    decode_inputs.prepare_decode(on_device, last_tokens, actual_tables, BLOCK_SIZE, actual)
    assert torch.equal(actual_tables, expected_tables)
    for row, (_, length, *_) in enumerate(rows):
        used = -(-length // BLOCK_SIZE)
        assert torch.equal(actual.block_tables[row, :used], expected.block_tables[row, :used])
    for name in ("input_ids", "positions", "context_lens", "slot_mapping", "prompt_lens"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    assert actual.slot_mapping[-1] == -1


def test_store_tokens(device: torch.device) -> None:
    rows = torch.tensor([[3, 1, -1, 0, 1], [0, 1, -1, 0, 1], [5, 1, -1, 0, 1]], dtype=torch.int32, device=device)
    expected, actual = (torch.full((6,), 9, device=device) for _ in range(2))
    tokens = torch.tensor([41, -1, 7], device=device)
    reference.store_tokens(rows, tokens, expected)
    decode_inputs.store_tokens(rows, tokens, actual)
    assert torch.equal(actual, expected)
    assert actual.tolist() == [0, 9, 9, 41, 9, 7]


def test_store_entries_skips_padding(device: torch.device) -> None:
    latent, key = torch.randn(4, 48, device=device), torch.randn(4, 16, device=device)
    cache = torch.full((3, 1, 8, 64), float("nan"), device=device)
    slots = torch.tensor([0, 23, -1, 9], device=device)
    store_entries(latent, key, cache, slots)
    entries = cache.view(24, 64)
    written = torch.cat((latent, key), dim=1)
    assert torch.equal(entries[[0, 23, 9]], written[[0, 1, 3]])
    assert int(entries.isnan().any(dim=1).sum()) == 21
