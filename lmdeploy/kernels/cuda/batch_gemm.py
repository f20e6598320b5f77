"""Products of 65 to 256 tokens with plain 16-bit weights on Hopper: choice of a variant, launch. See batch_gemm.cu."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lmdeploy.kernels.cuda import nvrtc, skinny_gemm
from lmdeploy.kernels.cuda.driver import Kernel
from lmdeploy.kernels.cuda.epilogue import Epilogue, prepare
from lmdeploy.kernels.cuda.skinny_gemm import num_sms, tiling_table
from lmdeploy.kernels.cuda.tensor_gemm import has_instructions, operands
from lmdeploy.kernels.cuda.tensor_map import rows_map

FIRST_TOKENS, MAX_TOKENS = 65, 256
TOKEN_TILES = (128, 192, 256)  # that tokens are padded to
_ARCH = "sm_90a"
_COLUMNS = 64  # of a box: 128 bytes, a row of the swizzle
_TOKENS = 64  # of a wgmma
_MAX_ROWS = 256  # of a wgmma
_MAX_SHARED_BYTES = 226 << 10  # of the 227 KiB, the barriers are static
_ALIGNMENT = 1024  # of the ring
_MAX_CLUSTER = 8
# Registers of a thread by the warpgroups that multiply, before and after the one that copies has handed over its own; the
# compiler wants a wgmma to fit into the former. Those that a thread has for other things than sums.
_REGISTERS, _OTHER_REGISTERS = {2: (168, 232), 3: (128, 160), 4: (96, 112)}, (26, 36)
# Sizes of clusters, and the SMs of an H100 that they fill at once: as its driver says, or as follows from that.
_CLUSTERS = {1: 132, 2: 132, 3: 129, 4: 120, 6: 120, 8: 120}
_SMS = 132
# A model of the card, by cycles of 1.7 GHz: operations of an SM, bytes that all its memory sends, and for each SM those
# that come from L2, that shared memory moves, that go to other blocks; what starting takes.
_OPERATIONS, _MEMORY_BYTES, _L2_BYTES, _SHARED_BYTES, _EXCHANGE_BYTES, _START = 2048, 1800, 38.8, 128, 16, 3500


@dataclass(frozen=True)
class Tiling:
    """How a product is spread over blocks: the names are those of the macros NW, CL, TC, MC, MT and STAGES."""

    rows: int
    splits: int  # blocks of a cluster along K,
    along_tokens: int  # along the tokens
    along_rows: int  # and along the rows
    token_tiles: int  # of 64, of a block: one for each warpgroup that multiplies
    stages: int

    @property
    def cluster(self) -> int:
        """Blocks of a cluster."""
        return self.splits * self.along_tokens * self.along_rows

    @property
    def threads(self) -> int:
        """Of the warpgroups that multiply and the one that copies."""
        return 128 * (self.token_tiles + 1)

    @property
    def tokens(self) -> int:
        """Of all blocks along them."""
        return _TOKENS * self.token_tiles * self.along_tokens

    @property
    def stage_bytes(self) -> int:
        """Of 64 columns."""
        return (_TOKENS * self.token_tiles + self.rows) * 2 * _COLUMNS

    def shared_bytes(self, is_gated: bool) -> int:
        """The ring, or the sums that take its place."""
        return _ALIGNMENT + max(self.stages * self.stage_bytes, self._exchanged_bytes(is_gated))

    def box_rows(self, is_gated: bool) -> int:
        """Of the weight, that a block copies at once."""
        return -(-self.rows // (16 if is_gated else 8) // self.along_tokens) * 8

    def blocks(self, n: int) -> int:
        """Of a product with n rows: as many as run at once and share the tiles alike; with K split, one for each tile."""
        tiles = -(-n // (self.rows * self.along_rows))
        if self.splits > 1:
            return tiles * self.cluster
        rounds = -(-tiles // clusters_at_once(self.cluster, num_sms()))
        return -(-tiles // rounds) * self.cluster

    def fits(self, k: int, is_gated: bool) -> bool:
        """Whether the kernel can be made, and run on k columns."""
        halves = 2 if is_gated else 1
        before, after = _REGISTERS.get(self.token_tiles, (0, 0))
        beside, beside_all = _OTHER_REGISTERS
        return (
            self.rows % (8 * halves) == 0 and self.along_tokens <= 2 and self.rows <= _MAX_ROWS and self.cluster <= _MAX_CLUSTER
            and self.token_tiles * 8 % self.along_rows == 0
            and self.splits <= self.rows // 8 // halves
            and 2 <= self.stages <= -(-k // _COLUMNS) // self.splits and self.rows // 2 + beside <= before
            and self.rows // 2 + beside_all <= after and self.shared_bytes(is_gated) <= _MAX_SHARED_BYTES
        )  # fmt: skip

    def _exchanged_bytes(self, is_gated: bool) -> int:
        if self.splits == 1:
            return 0
        halves = 2 if is_gated else 1
        part = -(-(self.rows // 8 // halves) // self.splits)
        return self.splits * part * halves * self.token_tiles * 128 * 16


@dataclass(frozen=True)
class Variant:
    """Everything that the compiled kernel depends on."""

    epilogue: Epilogue
    tiling: Tiling

    def macros(self) -> dict[str, object]:
        """What batch_gemm.cu is compiled with."""
        t = self.tiling
        return {
            "NW": t.rows, "MT": t.token_tiles, "STAGES": t.stages, "CL": t.splits, "TC": t.along_tokens,
            "MC": t.along_rows, **self.epilogue.macros(), **operands(t.rows),
        }  # fmt: skip


def tiling_for(x: Tensor, weight: Tensor, is_gated: bool = False) -> Tiling | None:
    """The measured tiling of x [M, K] times the weight [N, K], where it is faster than what else there is; else None."""
    m, (n, k) = len(x), weight.shape
    if not FIRST_TOKENS <= m <= MAX_TOKENS or k % 8 or n % (16 if is_gated else 8):
        return None
    if not (skinny_gemm.takes_plain(x, weight) and has_instructions()):
        return None
    return choose_tiling(n, k, next(tile for tile in TOKEN_TILES if tile >= m), is_gated)


def batch_gemm(
    x: Tensor,
    weight: Tensor,
    tiling: Tiling,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x W^T + bias + residual, or activation(gate) * up of its halves: [M, K] -> [M, N] or [M, N / 2].

    M up to the tiling's tokens. Rows of x and residual may be apart; `out` may be the residual. The weight is read before
    the kernel in front has ended: it must not be that kernel's result.
    """
    m, (n, k), t = x.shape[0], weight.shape, tiling
    epilogue, out, residual = prepare(x, n, bias, residual, activation, out_dtype, out)
    weights = rows_map(weight.data_ptr(), x.dtype, k, n, k * 2, t.box_rows(epilogue.is_gated))
    tokens = rows_map(x.data_ptr(), x.dtype, k, m, x.stride(0) * 2, _TOKENS * t.token_tiles // t.along_rows)
    _kernel(Variant(epilogue, t))(t.blocks(n), (weights, tokens, out, residual, bias, m, n, k, out.stride(0)))
    return out


@functools.cache
def choose_tiling(n: int, k: int, tokens: int, is_gated: bool) -> Tiling | None:
    """The measured best for the shape and the padded number of tokens, where there is one for this GPU."""
    found = tiling_table(f"batch_tilings_sm90_{num_sms()}").get(f"{n}x{k}{':gated' if is_gated else ''}:{tokens}")
    if found is None:
        return None
    tiling = Tiling(*found)
    return tiling if tiling.tokens >= tokens and tiling.fits(k, is_gated) else None


def clusters_at_once(size: int, num_sms: int) -> int:
    """Clusters of so many blocks that a GPU of Hopper's form can run at once, one block an SM."""
    return max(1, _CLUSTERS.get(size, _SMS // 2) * num_sms // _SMS // size)


def cost(tiling: Tiling, n: int, k: int, is_gated: bool, num_sms: int) -> float:
    """About the cycles of a product, by what is busiest: memory, tensor cores, the way from L2, shared memory."""
    t, halves = tiling, 2 if is_gated else 1
    steps = -(-k // _COLUMNS) / t.splits
    tokens, rows = _TOKENS * t.token_tiles, t.rows
    multiplied = tokens * rows * _COLUMNS / _OPERATIONS
    from_l2 = 2 * _COLUMNS * (tokens / t.along_rows + rows / t.along_tokens) / _L2_BYTES
    reads = 4 * t.token_tiles * (2048 + rows * 32)  # of wgmma: 16 columns at a time, the rows for each 64 tokens
    moved = (reads + t.stage_bytes) / _SHARED_BYTES
    tiles = -(-n // (rows * t.along_rows))
    rounds = -(-tiles // clusters_at_once(t.cluster, num_sms))
    sent = tokens * rows * 4 * (t.splits - 1) / t.splits / _EXCHANGE_BYTES
    end = tokens * rows / halves / 16 + sent
    busy = rounds * (steps * max(multiplied, from_l2, moved) + end)
    return max(busy, 2 * n * k / _MEMORY_BYTES) + 0.1 * busy + _START * (rounds if t.splits > 1 else 1)


def tilings(n: int, k: int, tokens: int, is_gated: bool) -> Iterator[Tiling]:
    """All that fit and hold so many tokens, with rings as deep as fit."""
    step = 16 if is_gated else 8
    for along_tokens in (1, 2):
        if tokens % (_TOKENS * along_tokens):
            continue
        token_tiles = tokens // _TOKENS // along_tokens
        choices = itertools.product((1, 2, 3, 4, 6, 8), (1, 2), range(step, _MAX_ROWS + 1, step))
        for splits, along_rows, rows in choices:
            if splits * along_tokens * along_rows in _CLUSTERS and rows <= n:
                shallow = Tiling(rows, splits, along_tokens, along_rows, token_tiles, 2)
                deep = (_MAX_SHARED_BYTES - _ALIGNMENT) // shallow.stage_bytes
                tiling = replace(shallow, stages=min(deep, -(-k // _COLUMNS) // splits))
                if tiling.fits(k, is_gated):
                    yield tiling


@functools.cache
def _kernel(variant: Variant) -> Kernel:
    t = variant.tiling
    return Kernel(
        nvrtc.cubin("batch_gemm.cu", variant.macros(), _ARCH),
        "batch_gemm",
        threads=t.threads,
        shared_bytes=t.shared_bytes(variant.epilogue.is_gated),
        cluster=t.cluster,
        overlaps=True,
    )
