"""Affine weights: packing, dequantization and products against the twin, over bits, group sizes and odd shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lmdeploy.kernels.reference import affine as twin
from lmdeploy.kernels.triton import affine
from tests.kernels.triton.numbers import DTYPES, TOLERANCE, check_close, normal

pytestmark = pytest.mark.usefixtures("poisoned_memory")

GROUPS = [(bits, group) for bits in (4, 8) for group in (16, 32, 64, 128)]


def parts(n: int, k: int, group: int, bits: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, int]:
    """q, scales, mins, bits; the scales do not fit into 16 bits."""
    q = torch.randint(0, 2**bits, (n, k), generator=torch.Generator().manual_seed(n), dtype=torch.uint8).to(device)
    scales = 1e-2 * normal(n, k // group, seed=1, device=device)
    return q, scales, -scales * (2 ** (bits - 1)) + 0.1 * normal(n, k // group, seed=2, device=device), bits


@pytest.mark.parametrize(("bits", "group"), GROUPS)
def test_packing_keeps_all_and_halves_the_scales_if_it_may(bits: int, group: int, device: torch.device) -> None:
    q, scales, mins, _ = parts(5, 2 * group, group, bits, device)
    for exact in (False, True):
        if exact:
            scales, mins = scales.half().float(), mins.half().float()
        packed = affine.pack(q, scales, mins, bits)
        assert (packed.n, packed.k, packed.group_size, packed.bits) == (5, 2 * group, group, bits)
        assert packed.num_bytes == 5 * (2 * group * bits // 8 + 2 * 2 * (2 if exact else 4))
        assert all(torch.equal(a, b) for a, b in zip(affine.unpack(packed), (q, scales, mins), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group"), GROUPS)
def test_dequantized_weights_and_rows(bits: int, group: int, dtype: torch.dtype, device: torch.device) -> None:
    weight = parts(33, 3 * group, group, bits, device)
    packed, expected = affine.pack(*weight), twin.pack(*weight)
    dense = twin._dense(expected.q, expected.scales, expected.mins, bits, torch.float32)
    check_close(affine.dequantize(packed, dtype), dense, TOLERANCE[dtype])
    ids = torch.tensor([32, 0, 7, 7], device=device)
    rows = affine.embed(ids, packed, dtype)
    assert (rows.dtype, rows.shape) == (dtype, (4, 3 * group))
    check_close(rows, dense[ids], TOLERANCE[dtype])
    check_close(affine.dequantize(packed.rows(30, 33), dtype), dense[30:], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group"), [(4, 16), (4, 128), (8, 32)])
@pytest.mark.parametrize("rows", [1, 17, 64, 65])
def test_linear(rows: int, bits: int, group: int, dtype: torch.dtype, device: torch.device) -> None:
    """Odd numbers of outputs; input channels that end within a block and that several programs share."""
    weight = parts(70, 1152 if group == 128 else 80 * group // 16, group, bits, device)
    k = weight[0].shape[1]
    x = normal(rows, k + 8, seed=3, device=device, dtype=dtype)[:, :k]
    bias, norm_weight, residual = (
        normal(*shape, seed=4 + i, device=device, dtype=dtype) for i, shape in enumerate(((70,), (k,), (rows, 70)))
    )
    packed, expected = affine.pack(*weight), twin.pack(*weight)
    check_close(affine.linear(x, packed), twin.linear(x.float(), expected), 2 * TOLERANCE[dtype])
    out = affine.linear(
        x, packed, bias=bias, norm_weight=norm_weight, norm_eps=1e-5, norm_offset=1.0, residual=residual,
        out_dtype=torch.float32,
    )  # fmt: skip
    assert out.dtype == torch.float32
    wide = twin.linear(
        x.float(), expected, bias=bias.float(), norm_weight=norm_weight.float(), norm_eps=1e-5, norm_offset=1.0,
        residual=residual.float(),
    )  # fmt: skip
    check_close(out, wide, 2 * TOLERANCE[dtype])


def test_many_rows_dequantize_piece_by_piece(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setattr(affine, "_COPY_ELEMENTS", 10 * 64)
    weight = parts(33, 64, 32, 4, device)
    x, bias = normal(70, 64, seed=0, device=device), normal(33, seed=1, device=device)
    check_close(affine.linear(x, affine.pack(*weight), bias=bias), twin.linear(x, twin.pack(*weight), bias=bias), 2e-6)


def test_programs_that_share_a_tile_leave_the_counters_at_zero(device: torch.device) -> None:
    weight = parts(40, 2048, 128, 4, device)
    packed, x = affine.pack(*weight), normal(3, 2048, seed=0, device=device)
    first = affine.linear(x, packed)
    assert torch.equal(affine.linear(x, packed), first)
    assert torch.equal(affine.linear(x[1:2], packed), first[1:2])
    assert not affine.counters(x.device).any()


def test_gated_mlp(device: torch.device) -> None:
    gate_up, down = parts(96, 64, 32, 4, device), parts(64, 48, 16, 8, device)
    x, residual = normal(3, 64, seed=0, device=device), normal(3, 64, seed=1, device=device)
    norm_weight = normal(64, seed=2, device=device)
    out = affine.gated_mlp(
        x, affine.pack(*gate_up), affine.pack(*down), "silu", norm_weight=norm_weight, norm_eps=1e-5, residual=residual
    )
    expected = twin.gated_mlp(
        x, twin.pack(*gate_up), twin.pack(*down), "silu", norm_weight=norm_weight, norm_eps=1e-5, residual=residual
    )
    check_close(out, expected, 4e-6)


def test_no_rows(device: torch.device) -> None:
    packed = affine.pack(*parts(8, 32, 32, 4, device))
    assert affine.linear(torch.zeros(0, 32, device=device), packed).shape == (0, 8)
    assert affine.embed(torch.zeros(0, dtype=torch.int64, device=device), packed, torch.float32).shape == (0, 32)
