"""Packing of 4-bit weights for the CUDA kernels, which needs no GPU: the inverse, and the layout as the kernel reads it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lmdeploy.kernels.cuda import affine, skinny_gemm
from lmdeploy.kernels.cuda.affine import _integer_zeros
from lmdeploy.kernels.cuda.skinny_gemm import Weight, pack, rule_tiling, unit_bytes, unpack

SHAPES = [(16, 128, 128), (48, 384, 64), (40, 256, 32), (33, 128, 128)]


def random_weight(n: int, k: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n * k + group)
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(n, k // group, generator=generator) + 0.01).half().float()
    zeros = torch.randint(0, 16, (n, k // group), dtype=torch.uint8, generator=generator)
    return q, scales, zeros


@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
def test_unpack_is_the_inverse_of_pack(n: int, k: int, group: int) -> None:
    q, scales, zeros = random_weight(n, k, group)
    packed = pack(q, scales, -zeros.float() * scales, zeros)
    assert packed.data.shape == (k // 128, -(-n // 16), unit_bytes(group))
    for actual, expected in zip(unpack(packed), (q, scales, -zeros.float() * scales), strict=True):
        assert torch.equal(actual, expected)
    mins = (torch.rand(n, k // group) - 2).half().float()
    assert torch.equal(unpack(pack(q, scales, mins, None))[2], mins)


def test_scales_below_zero_are_kept_and_only_zero_is_replaced() -> None:
    q, scales, zeros = random_weight(16, 128, 32)
    scales[::2] *= -1  # as in half of the blocks of GGUF's Q4_0
    scales[3, 1] = 0.0
    actual = unpack(pack(q, scales, -zeros.float() * scales, zeros))
    assert actual[1][3, 1] == 2.0**-24
    actual[1][3, 1] = actual[2][3, 1] = 0.0
    assert torch.equal(actual[1], scales)
    assert torch.equal(actual[2], -zeros.float() * scales)


def test_many_embedded_rows_are_unpacked_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    q, scales, zeros = random_weight(40, 256, 32)
    weight = affine.pack(q, scales, -zeros.float() * scales, 4)
    ids = torch.randint(0, 40, (700,), generator=torch.Generator().manual_seed(0))
    counts: list[int] = []

    def counted(w: Weight) -> tuple[Tensor, Tensor, Tensor]:
        counts.append(w.n)
        return unpack(w)

    monkeypatch.setattr(skinny_gemm, "unpack", counted)
    rows = affine.embed(ids, weight, torch.float32)
    wide = (q.float().unflatten(-1, (-1, 32)) - zeros[..., None]) * scales[..., None]
    torch.testing.assert_close(rows, wide.flatten(-2)[ids])
    assert counts == [256 * 16, 256 * 16, 188 * 16]


@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
def test_nibbles_lie_where_a_lane_of_the_product_expects_them(n: int, k: int, group: int) -> None:
    q, scales, zeros = random_weight(n, k, group)
    packed = pack(q, scales, -zeros.float() * scales, zeros)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        unit, tile = (int(torch.randint(0, size, (), generator=generator)) for size in packed.data.shape[:2])
        lane, step, register, half = (int(torch.randint(0, size, (), generator=generator)) for size in (32, 8, 4, 2))
        row = tile * 16 + lane // 4 + 8 * (register % 2)
        column = unit * 128 + 32 * (step // 2) + 8 * (lane % 4) + 4 * (step % 2) + 2 * (register // 2) + half
        at = step // 4 * 512 + lane * 16 + step % 4 * 4
        word = int.from_bytes(packed.data[unit, tile, at : at + 4].numpy().tobytes(), "little")
        if row < n:
            assert word >> (4 * register + 16 * half) & 15 == q[row, column]


def test_integer_zeros_are_found_where_minima_are_multiples_of_their_scales() -> None:
    _, scales, zeros = random_weight(40, 256, 32)
    assert torch.equal(_integer_zeros(scales, -zeros.float() * scales), zeros)
    assert _integer_zeros(scales, -(zeros.float() + 0.5) * scales) is None
    assert _integer_zeros(scales, scales) is None  # a zero below 0
    assert torch.equal(_integer_zeros(torch.zeros(1, 1), torch.zeros(1, 1)), torch.zeros(1, 1, dtype=torch.uint8))


@pytest.mark.parametrize("m", [1, 8, 16, 32, 64])
@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (1536, 8960), (92544, 4096), (40, 256), (28672, 4096)])
@pytest.mark.parametrize("is_gated", [False, True])
def test_the_rule_gives_every_tile_of_rows_to_a_warp(
    n: int, k: int, m: int, is_gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    tiling = rule_tiling(n, k, m, unit_bytes(128), is_gated, 132)
    tiles = -(-n // 16) // (2 if is_gated else 1)
    rows_of_a_block = tiling.row_tiles // (2 if is_gated else 1) * tiling.warps_n
    assert -(-tiles // tiling.row_blocks) <= rows_of_a_block
    assert tiling.warps_n * tiling.warps_k * tiling.stages * tiling.row_tiles * unit_bytes(128) <= 220_000
    assert tiling.cluster * tiling.warps_k <= max(k // 128, tiling.warps_k)


@pytest.mark.parametrize("shared_bytes", [99 << 10, 163 << 10, 227 << 10])
@pytest.mark.parametrize("m", [1, 16, 32, 64])
@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("unit", [unit_bytes(32), unit_bytes(128)])
def test_the_rule_takes_no_more_shared_memory_than_the_gpu_has(
    shared_bytes: int, m: int, is_gated: bool, unit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    for n, k in ((92544, 4096), (28672, 4096), (4096, 14336), (1536, 8960)):
        tiling = rule_tiling(n, k, m, unit, is_gated, 82, shared_bytes)
        tiles = -(-n // 16) // (2 if is_gated else 1)
        assert -(-tiles // tiling.row_blocks) <= tiling.row_tiles // (2 if is_gated else 1) * tiling.warps_n
        warps = tiling.warps_n * tiling.warps_k
        sums = warps * tiling.row_tiles * {1: 1, 16: 2, 32: 4, 64: 8}[m] * 512
        assert max(warps * tiling.stages * tiling.row_tiles * unit, sums) <= shared_bytes - 1024


def test_a_weight_counts_its_bytes_in_shared_memory() -> None:
    assert Weight(torch.empty(0), 16, 128).unit_bytes == 1024 + 64
    assert Weight(torch.empty(0), 16, 128, 4, 32).unit_bytes == 1024 + 4 * 64
