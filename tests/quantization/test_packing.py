"""AffineTensor against its definition."""

from __future__ import annotations

import pytest
import torch

from lmdeploy.quantization import packing
from lmdeploy.quantization.packing import AffineTensor
from tests.quantization.affine_data import random_affine


def definition(weight: AffineTensor) -> torch.Tensor:
    """w[n, k] = q * scale + minimum, element by element."""
    group = torch.arange(weight.shape[-1]) // weight.group_size
    return weight.q.float() * weight.scales[..., group] + weight.mins[..., group]


@pytest.mark.parametrize("group_size", [16, 32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_dequantize_is_the_definition(group_size: int, bits: int) -> None:
    weight = random_affine(5, 256, group_size, bits)
    assert weight.shape == (5, 256)
    assert weight.group_size == group_size
    assert torch.equal(weight.dequantize(torch.float32), definition(weight))
    assert torch.equal(weight.dequantize(torch.bfloat16), definition(weight).bfloat16())


def test_dequantize_in_several_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_affine(7, 64, 32, 4)
    monkeypatch.setattr(packing, "_ELEMENTS_AT_A_TIME", 128)
    assert torch.equal(weight.dequantize(torch.float32), definition(weight))


def test_dequantize_into_rows_of_a_larger_tensor() -> None:
    weight = random_affine(3, 64, 32, 4)
    out = torch.full((6, 64), 7.0)
    weight.dequantize_into(out[2:5])
    assert torch.equal(out[2:5], definition(weight))
    assert bool((out[:2] == 7).all() and (out[5:] == 7).all())


def test_rows_by_slice_and_by_index() -> None:
    weight = random_affine(8, 64, 32, 4)
    order = torch.tensor([7, 0, 3])
    assert torch.equal(weight.rows(slice(2, 5)).dequantize(torch.float32), definition(weight)[2:5])
    assert torch.equal(weight.rows(order).dequantize(torch.float32), definition(weight)[order])


def test_stacked_experts_are_rows() -> None:
    parts = [random_affine(4, 32, 16, 4, seed) for seed in range(3)]
    stacked = AffineTensor(*(torch.stack(ts) for ts in zip(*((p.q, p.scales, p.mins) for p in parts), strict=True)), 4)
    assert stacked.shape == (3, 4, 32)
    assert torch.equal(stacked.dequantize(torch.float32)[1], definition(parts[1]))
    assert torch.equal(stacked.flatten_rows().rows(slice(8, 12)).dequantize(torch.float32), definition(parts[2]))


def test_stack_takes_the_widest_bits_and_the_finest_group_and_changes_no_value() -> None:
    parts = [random_affine(4, 64, 32, 4, 0), random_affine(6, 64, 16, 8, 1), random_affine(2, 64, 64, 4, 2)]
    stacked = AffineTensor.stack(parts)
    assert (stacked.bits, stacked.group_size, stacked.shape) == (8, 16, (12, 64))
    assert torch.equal(stacked.dequantize(torch.float32), torch.cat([definition(part) for part in parts]))


def test_conversions_that_would_lose_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit into 4 bits"):
        random_affine(2, 64, 32, 8).to_bits(4)
    with pytest.raises(ValueError, match="cannot be cut into groups of 64"):
        random_affine(2, 64, 32, 4).to_group(64)
