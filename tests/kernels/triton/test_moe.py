"""Routed experts against the twin: experts without tokens, odd sizes, biases, the clamp, 16-bit and affine weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lmdeploy.kernels.reference import moe as twin
from lmdeploy.kernels.triton import moe
from lmdeploy.kernels.triton.affine import PackedAffine, dequantize, pack
from tests.kernels.triton.numbers import DTYPES, TOLERANCE, check_close, normal

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# T, k, E, I, C
SIZES = [(1, 2, 8, 48, 96), (5, 1, 3, 33, 64), (40, 3, 5, 80, 48), (150, 2, 2, 16, 32)]
SETTINGS = [("silu", None, False), ("gelu", None, True), ("gelu_tanh", None, False), ("silu", 1.5, True)]


def routing(tokens: int, choices: int, experts: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Weights and experts; the last expert gets no token where there are more than each token takes."""
    generator = torch.Generator().manual_seed(tokens)
    pool = max(choices, experts - 1)
    chosen = torch.stack([torch.randperm(pool, generator=generator)[:choices] for _ in range(tokens)])
    return torch.rand(tokens, choices, generator=generator).to(device), chosen.to(device)


def biases(experts: int, size: int, channels: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    up = normal(experts, 2 * size, seed=8, device=device, dtype=dtype)
    return up, normal(experts, channels, seed=9, device=device, dtype=dtype)


def wide(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("activation", "clamp", "has_bias"), SETTINGS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_plain_experts(
    sizes: tuple[int, ...],
    activation: str,
    clamp: float | None,
    has_bias: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    tokens, choices, experts, size, channels = sizes
    x = normal(tokens, channels, seed=0, device=device, dtype=dtype)
    gate_up = 0.1 * normal(experts, 2 * size, channels, seed=1, device=device, dtype=dtype)
    down = 0.1 * normal(experts, channels, size, seed=2, device=device, dtype=dtype)
    bias = biases(experts, size, channels, device, dtype) if has_bias else (None, None)
    weights, chosen = routing(tokens, choices, experts, device)
    out = moe.routed_mlp(x, weights, chosen, gate_up, down, activation, *bias, clamp)
    assert (out.dtype, out.shape) == (dtype, x.shape)
    expected = twin.routed_mlp(
        x.float(), weights, chosen, gate_up.float(), down.float(), activation, wide(bias[0]), wide(bias[1]), clamp
    )
    check_close(out, expected, 2 * TOLERANCE[dtype])


def affine_rows(n: int, k: int, group: int, bits: int, device: torch.device) -> PackedAffine:
    q = torch.randint(0, 2**bits, (n, k), generator=torch.Generator().manual_seed(n), dtype=torch.uint8).to(device)
    scales = 0.1 * 2.0**-bits * normal(n, k // group, seed=1, device=device).abs()
    return pack(q, scales, -scales * (2 ** (bits - 1) - 0.5), bits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group"), [(4, 16), (4, 32), (8, 16)])
@pytest.mark.parametrize(("tokens", "activation", "clamp"), [(1, "silu", None), (70, "silu", 1.5)])
def test_affine_experts(
    tokens: int, activation: str, clamp: float | None, bits: int, group: int, dtype: torch.dtype, device: torch.device
) -> None:
    experts, size, channels = 3, 96, 160
    gate_up = affine_rows(experts * 2 * size, channels, group, bits, device)
    down = affine_rows(experts * channels, size, group, bits, device)
    x = normal(tokens, channels, seed=0, device=device, dtype=dtype)
    bias = biases(experts, size, channels, device, dtype)
    weights, chosen = routing(tokens, 2, experts, device)
    out = moe.routed_mlp_affine(x, weights, chosen, gate_up, down, activation, *bias, clamp)
    expected = twin.routed_mlp(
        x.float(),
        weights,
        chosen,
        dequantize(gate_up, torch.float32).view(experts, 2 * size, channels),
        dequantize(down, torch.float32).view(experts, channels, size),
        activation,
        *(b.float() for b in bias),
        clamp,
    )
    check_close(out, expected, 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("max_ranked", [0, 4096], ids=["sorted", "ranked"])
@pytest.mark.parametrize(("pairs", "experts", "block_m"), [(1, 4, 16), (300, 7, 16), (300, 1, 128), (5, 40, 16)])
def test_the_plan_covers_every_pair_once(
    pairs: int, experts: int, block_m: int, max_ranked: int, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(moe, "_MAX_RANKED_PAIRS", max_ranked)
    chosen = torch.randint(0, experts, (pairs, 1), generator=torch.Generator().manual_seed(pairs)).to(device)
    order, tiles = moe._plan(chosen, experts, block_m)
    assert torch.equal(order.long(), chosen.flatten().argsort(stable=True))
    covered = []
    for expert, first, last in tiles.tolist():
        if expert >= 0:
            assert 0 < last - first <= block_m
            assert (chosen.flatten()[order[first:last].long()] == expert).all()
            covered += range(first, last)
    assert covered == list(range(pairs))


def test_no_tokens(device: torch.device) -> None:
    x = torch.zeros(0, 16, device=device)
    none = torch.zeros(0, 2, device=device)
    weights = torch.zeros(2, 32, 16, device=device), torch.zeros(2, 16, 16, device=device)
    assert moe.routed_mlp(x, none, none.long(), *weights, "silu").shape == (0, 16)
