"""Products of up to 64 tokens and packed 4-bit weights on Hopper: choice of a variant, launch. See wide_gemm.cu."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lmdeploy.kernels.cuda import nvrtc
from lmdeploy.kernels.cuda.driver import Kernel
from lmdeploy.kernels.cuda.epilogue import Epilogue, has_quads, prepare
from lmdeploy.kernels.cuda.skinny_gemm import COLUMNS, Weight, has_vectors, num_sms, tiling_table

FIRST_TOKENS, MAX_TOKENS = 33, 64  # where it is faster than skinny_gemm
_ARCH = "sm_90a"
TILES_PER_GROUP = 4  # of 16 rows that a warpgroup multiplies at once
MAX_SHARED_BYTES = 226 << 10  # of the 227 KiB, the barriers are static
_RING_BYTES, _STAGES = 112_000, 4  # more were slower: the activations queue behind the weights
# Registers that a thread has for accumulators and all else, by the warpgroups that multiply.
_REGISTERS = {1: 240, 2: 200, 3: 136, 4: 96}
_OTHER_REGISTERS = 60
# Sizes of clusters, and the part of all SMs that they fill at once: 132, 66, 30 and 15 of them on an H100, as its driver says.
CLUSTERS = {1: 1.0, 2: 1.0, 4: 0.91, 8: 0.91}


@dataclass(frozen=True)
class Tiling:
    """How a product is spread over warpgroups and blocks; the names are the macros' of wide_gemm.cu."""

    row_tiles: int
    groups_n: int
    groups_k: int
    stages: int
    cluster: int
    row_blocks: int

    @property
    def capacity(self) -> int:
        """Tiles of 16 rows that a block's warps have accumulators for."""
        return self.row_tiles * self.groups_n * TILES_PER_GROUP

    @property
    def threads(self) -> int:
        """Of a block: the warpgroups that multiply and the one that loads."""
        return 128 * (self.groups_n * self.groups_k + 1)

    def shared_bytes(self, tokens: int, held: int, stage_bytes: int) -> int:
        """Dynamic shared memory of a block that holds so many tiles: its rings, or what is added up in their place."""
        return max(self.stages * stage_bytes, self.groups_k * tokens * (held * 16 + 4) * 4)


@dataclass(frozen=True)
class Variant:
    """Everything that the compiled kernel depends on."""

    group_size: int
    has_zeros: bool
    epilogue: Epilogue
    tiling: Tiling

    def macros(self) -> dict[str, object]:
        """What wide_gemm.cu is compiled with."""
        t = self.tiling
        return {
            "GROUP": self.group_size, "ZERO": int(self.has_zeros), "WT": t.row_tiles, "WN": t.groups_n,
            "WK": t.groups_k, "STAGES": t.stages, "CL": t.cluster, **self.epilogue.macros(),
        }  # fmt: skip


def supports(x: Tensor, w: Weight) -> bool:
    """Whether the weight can be multiplied here by x [M, K], M up to 64."""
    if not w.data.is_cuda or x.dtype not in (torch.float16, torch.bfloat16) or len(x) > MAX_TOKENS:
        return False
    return has_vectors(x) and torch.cuda.get_device_capability(w.data.device) == (9, 0)


def wide_gemm(
    x: Tensor,
    w: Weight,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    tiling: Tiling | None = None,
) -> Tensor:
    """x W^T + bias + residual, or activation(gate) * up of its halves: [M, K] -> [M, N] or [M, N / 2].

    Rows of x and residual may be apart; `out` may be the residual.
    """
    m = len(x)
    epilogue, out, residual = prepare(x, w.n, bias, residual, activation, out_dtype, out)
    variant = choose_variant(w, epilogue, tiling)
    t = variant.tiling
    held = tiles_per_block(w.n, t, epilogue.is_gated)
    by_quads = int(has_quads(out, residual))
    arguments = (w.data, x, out, residual, bias, m, w.n, w.k, x.stride(0), out.stride(0), held, by_quads)
    _kernel(variant, held, w.unit_bytes)(t.row_blocks * t.cluster, arguments)
    return out


def choose_variant(w: Weight, epilogue: Epilogue, tiling: Tiling | None = None) -> Variant:
    """The compiled form."""
    if tiling is None:
        tiling = choose_tiling(w.n, w.k, w.unit_bytes, epilogue.is_gated)
    return Variant(w.group_size, w.has_zeros, epilogue, tiling)


@functools.cache
def choose_tiling(n: int, k: int, unit_bytes: int, is_gated: bool) -> Tiling:
    """The measured best for "NxK", with ":gated" for gates and ups, else a rule."""
    found = tiling_table(f"wide_tilings_sm90_{num_sms()}").get(f"{n}x{k}{':gated' if is_gated else ''}")
    if found is not None:
        tiling = Tiling(*found)
        if shared_bytes(tiling, tiles_per_block(n, tiling, is_gated), unit_bytes) <= MAX_SHARED_BYTES:
            return tiling
    return rule_tiling(n, k, unit_bytes, is_gated, num_sms())


def rule_tiling(n: int, k: int, unit_bytes: int, is_gated: bool, num_sms: int) -> Tiling:
    """The shortest time by a model that was fitted to 250 tilings of eight shapes, measured on an H100."""
    return min(tilings(n, k, unit_bytes, is_gated, num_sms), key=lambda t: (cost(t, k, num_sms), -t.groups_n))


def cost(tiling: Tiling, k: int, num_sms: int) -> float:
    """About the microseconds of 64 tokens, less what all tilings have in common."""
    t = tiling
    waves = -(-t.row_blocks // (int(num_sms * CLUSTERS[t.cluster]) // t.cluster))
    units = -(-(k // COLUMNS) // t.cluster)
    groups = t.groups_n * t.groups_k  # one's weights are made while another multiplies
    alone = 1.3 if groups == 1 else 1.12 if t.groups_n == 1 or t.groups_k > 1 else 1.05 if groups == 4 else 1.0
    return waves * ((0.22 * t.row_tiles * t.groups_n + 0.27) * units * alone + 0.3 * t.cluster)


def tilings(n: int, k: int, unit_bytes: int, is_gated: bool, num_sms: int) -> Iterator[Tiling]:
    """All that fit into registers and shared memory with 64 tokens."""
    sides, units = 2 if is_gated else 1, k // COLUMNS
    tiles = -(-n // 16) // sides
    for groups_n, groups_k in ((1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (2, 2), (4, 1)):
        for row_tiles in (1, 2, 3, 4):
            if row_tiles * MAX_TOKENS // 2 + _OTHER_REGISTERS > _REGISTERS[groups_n * groups_k]:
                continue
            for cluster, part in CLUSTERS.items():
                if groups_k * cluster > units:
                    continue
                capacity = row_tiles * groups_n * TILES_PER_GROUP // sides
                blocks = max(-(-tiles // capacity), min(tiles, max(1, int(num_sms * part) // cluster)))
                blocks = -(-tiles // -(-tiles // blocks))  # as few as need not hold more
                held = -(-tiles // blocks) * sides
                stage_bytes = MAX_TOKENS * COLUMNS * 2 + held * unit_bytes
                stages = max(groups_k + 1, min(_STAGES, _RING_BYTES // stage_bytes, -(-units // cluster)))
                tiling = Tiling(row_tiles, groups_n, groups_k, stages, cluster, blocks)
                if shared_bytes(tiling, held, unit_bytes) <= MAX_SHARED_BYTES:
                    yield tiling


def tiles_per_block(n: int, tiling: Tiling, is_gated: bool) -> int:
    """Tiles of 16 rows of the block that has most of them."""
    tiles = -(-n // 16)
    return 2 * -(-(tiles // 2) // tiling.row_blocks) if is_gated else -(-tiles // tiling.row_blocks)


def shared_bytes(tiling: Tiling, held: int, unit_bytes: int) -> int:
    """That of a block."""
    return tiling.shared_bytes(MAX_TOKENS, held, MAX_TOKENS * COLUMNS * 2 + held * unit_bytes)


@functools.cache
def _kernel(variant: Variant, held: int, unit_bytes: int) -> Kernel:
    t = variant.tiling
    return Kernel(
        nvrtc.cubin("wide_gemm.cu", variant.macros(), _ARCH),
        "wide_gemm",
        threads=t.threads,
        shared_bytes=shared_bytes(t, held, unit_bytes),
        cluster=t.cluster,
        overlaps=True,
    )
