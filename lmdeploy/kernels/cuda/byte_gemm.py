"""Products of up to 64 tokens and packed 4-bit weights on Hopper whose rows have the same bits whatever M is. See byte_gemm.cu.

The rows of x are made integers first, by a launch of its own. One token's bits are those of layer_tail.py, too.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from lmdeploy.kernels.cuda import nvrtc
from lmdeploy.kernels.cuda.driver import Kernel
from lmdeploy.kernels.cuda.epilogue import Epilogue, has_quads, prepare
from lmdeploy.kernels.cuda.skinny_gemm import COLUMNS, Weight, num_sms, unit_bytes
from lmdeploy.kernels.cuda.wide_gemm import CLUSTERS, MAX_SHARED_BYTES, TILES_PER_GROUP, Tiling, tiles_per_block

FASTEST_TOKENS = range(17, 33)  # by 6 % to skinny_gemm; for fewer and for more there are faster kernels
_ARCH = "sm_90a"
_TOKENS = (8, 16, 32, 64)
_WARPGROUPS, _MAX_ROW_TILES, _MAX_STAGES = 2, 2, 8
_EIGHTHS = 8
_UNITS_AT_ONCE = 4  # of a token, that a warp makes integers of


@dataclass(frozen=True)
class Digits:
    """Everything that the kernel that makes integers of x depends on."""

    k: int
    group_size: int
    tokens: int
    is_half: bool
    norm_offset: float | None

    @property
    def unit_bytes(self) -> int:
        """Of 128 columns of all tokens: two digits each, then a power and a sum for each group."""
        return self.tokens * (2 * COLUMNS + 8 * (COLUMNS // self.group_size))

    @property
    def blocks(self) -> int:
        """Of the launch."""
        units = self.k // COLUMNS
        return self.tokens * (-(-units // (_EIGHTHS * _UNITS_AT_ONCE)) if self.norm_offset is None else 1)

    def macros(self) -> dict[str, object]:
        """What digits.cu is compiled with."""
        norm = {"NORM": int(self.norm_offset is not None), "NORM_OFFSET": f"{self.norm_offset or 0.0}f"}
        return {
            "K": self.k, "GROUP": self.group_size, "NT": self.tokens, "FP16": int(self.is_half), "ACT": 0,
            "UNITS_AT_ONCE": _UNITS_AT_ONCE, **norm,
        }  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """Everything that the compiled product depends on."""

    group_size: int
    has_zeros: bool
    tokens: int
    epilogue: Epilogue
    tiling: Tiling

    def macros(self) -> dict[str, object]:
        """What byte_gemm.cu is compiled with."""
        t = self.tiling
        return {
            "GROUP": self.group_size, "ZERO": int(self.has_zeros), "NT": self.tokens, "WT": t.row_tiles,
            "WN": t.groups_n, "WK": t.groups_k, "STAGES": t.stages, "CL": t.cluster, **self.epilogue.macros(),
        }  # fmt: skip


def byte_gemm(
    x: Tensor,
    w: Weight,
    *,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 0.0,
    norm_offset: float = 0.0,
    residual: Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """rms_norm(x) W^T + bias + residual, or activation(gate) * up of its halves: [M, K] -> [M, N] or [M, N / 2].

    M is at most 64. x as wide_gemm.supports; rows of x and residual may be apart; `out` may be the residual.
    """
    m, tokens = len(x), next(size for size in _TOKENS if len(x) <= size)
    epilogue, out, residual = prepare(x, w.n, bias, residual, activation, out_dtype, out)
    made = Digits(w.k, w.group_size, tokens, epilogue.is_half, None if norm_weight is None else float(norm_offset))
    digits = x.new_empty(w.k // COLUMNS * made.unit_bytes, dtype=torch.uint8)
    scales = None if norm_weight is None else x.new_empty(tokens, dtype=torch.float32)
    _digits_kernel(made)(made.blocks, (x, digits, scales, norm_weight, norm_eps, m, x.stride(0)))
    variant = choose_variant(w, tokens, epilogue)
    held, t = tiles_per_block(w.n, variant.tiling, epilogue.is_gated), variant.tiling
    arguments = (
        w.data, digits, scales, out, residual, bias, m, w.n, w.k, out.stride(0), held, int(has_quads(out, residual)),
    )  # fmt: skip
    _kernel(variant, held)(t.row_blocks * t.cluster, arguments)
    return out


def choose_variant(w: Weight, tokens: int, epilogue: Epilogue) -> Variant:
    """The compiled form for tiles of so many tokens."""
    tiling = choose_tiling(w.n, tokens, w.group_size, epilogue.is_gated, num_sms())
    return Variant(w.group_size, w.has_zeros, tokens, epilogue, tiling)


def slices(n: int, num_sms: int) -> int:
    """Parts of K, 1 to 8, that are added up apart for weights of n rows: as many as give each multiprocessor 64 rows of one.

    The order of sums follows from it, and so it must not depend on the number of tokens.
    """
    return next(parts for parts in (1, 2, 4, 8) if parts == _EIGHTHS or parts * -(-n // 64) >= num_sms)


@functools.cache
def choose_tiling(n: int, tokens: int, group_size: int, is_gated: bool, num_sms: int) -> Tiling:
    """By a rule: two warpgroups, along K where it is cut, and as many blocks as run at once, or more if they held too much."""
    parts, sides = slices(n, num_sms), 2 if is_gated else 1
    groups_k = min(parts, _WARPGROUPS)
    groups_n, cluster = _WARPGROUPS // groups_k, parts // groups_k
    tiles, most = -(-n // 16) // sides, _MAX_ROW_TILES * groups_n * TILES_PER_GROUP // sides
    row_blocks = max(-(-tiles // most), min(tiles, int(num_sms * CLUSTERS[cluster]) // cluster))
    held = -(-tiles // row_blocks) * sides
    row_tiles = -(-held // (TILES_PER_GROUP * groups_n))
    for stages in range(_MAX_STAGES, 0, -_WARPGROUPS):
        tiling = Tiling(row_tiles, groups_n, groups_k, stages, cluster, row_blocks)
        if shared_bytes(tokens, tiling, held, group_size) <= MAX_SHARED_BYTES:
            return tiling
    raise nvrtc.KernelError(f"no tiling of {n} rows for {tokens} tokens fits into shared memory")


def shared_bytes(tokens: int, tiling: Tiling, held: int, group_size: int) -> int:
    """That of a block; what is swizzled is aligned to 1,024 bytes."""
    unit = Digits(0, group_size, tokens, False, None).unit_bytes
    return tiling.shared_bytes(tokens, held, -(-unit // 1024) * 1024 + held * unit_bytes(group_size))


@functools.cache
def _digits_kernel(made: Digits) -> Kernel:
    return Kernel(nvrtc.cubin("digits.cu", made.macros(), _ARCH), "digits", threads=_EIGHTHS * 32, overlaps=True)


@functools.cache
def _kernel(variant: Variant, held: int) -> Kernel:
    t = variant.tiling
    return Kernel(
        nvrtc.cubin("byte_gemm.cu", variant.macros(), _ARCH),
        "byte_gemm",
        threads=t.threads,
        shared_bytes=shared_bytes(variant.tokens, t, held, variant.group_size),
        cluster=t.cluster,
        overlaps=True,
    )
