"""Products of one to four tokens with packed 4-bit weights on Hopper: choice of a variant, launch. See the .cu of its name."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmdeploy.kernels.cuda import nvrtc
from lmdeploy.kernels.cuda.driver import Kernel
from lmdeploy.kernels.cuda.epilogue import Epilogue, prepare
from lmdeploy.kernels.cuda.skinny_gemm import COLUMNS, Weight, has_vectors, num_sms, tiling_table

MAX_TOKENS = 4
MAX_WARPS = 16
_ARCH = "sm_90a"
_MAX_UNITS = 8  # of 128 columns, of a warp
_MAX_UNITS_AND_TOKENS = 32  # the same times tokens: 64 registers of x
_STATIC_SHARED_BYTES = 4 << 10  # more than barriers, a norm's sums and the system's own take
_MAX_SHARED_BYTES = (227 << 10) - _STATIC_SHARED_BYTES
_RING_BYTES, _MAX_STAGES, _USUAL_WARPS, _USUAL_UNITS = 160 << 10, 8, 12, 4


@dataclass(frozen=True)
class Tiling:
    """How a product is spread over warps and blocks; the names are the macros' of packed_stream_gemm.cu."""

    warps_k: int
    warps_n: int
    tiles: int
    stages: int
    row_blocks: int
    blocks_per_sm: int = 1
    parts: int = 1
    is_early: bool = False

    @property
    def threads(self) -> int:
        """Of a block."""
        return self.warps_k * self.warps_n * 32


@dataclass(frozen=True)
class Product:
    """What a tiling depends on. tokens: 1, 2 or 4. unit_bytes: of 16 rows x 128 columns of the packed weight."""

    n: int
    k: int
    tokens: int
    unit_bytes: int
    is_gated: bool = False
    has_norm: bool = False

    @property
    def name(self) -> str:
        """Its name in the table."""
        return f"{self.n}x{self.k}:{self.tokens}" + (":gated" if self.is_gated else "")

    @property
    def units(self) -> int:
        """Of 128 columns."""
        return self.k // COLUMNS

    @property
    def sides(self) -> int:
        """Of a pair of tiles, or of a single one."""
        return 2 if self.is_gated else 1

    @property
    def tiles(self) -> int:
        """Of 16 rows of the result."""
        return -(-self.n // 16) // self.sides

    def shared_bytes(self, t: Tiling) -> int:
        """Dynamic shared memory of a block: rings, what passes of x through it, partial sums."""
        stage = self.sides * (self.units_of_warp(t) // t.parts) * t.tiles * self.unit_bytes
        ring = t.warps_k * t.warps_n * t.stages * stage
        sums = t.warps_k * t.parts * -(-self.tiles // t.row_blocks) * self.sides * 16 * self.tokens * 4
        return ring + sums + (self.tokens * self.k * 2 if self.has_norm else 0)

    def units_of_warp(self, t: Tiling) -> int:
        """k-units of the warps that have most."""
        return -(-self.units // t.warps_k)

    def fits(self, t: Tiling) -> bool:
        """Whether a block has registers, threads and shared memory enough, and every part of every warp a k-unit."""
        units = self.units_of_warp(t)
        has_registers = units <= _MAX_UNITS and units * self.tokens <= _MAX_UNITS_AND_TOKENS
        has_threads = t.warps_k <= self.units and t.warps_k * t.warps_n <= MAX_WARPS
        has_units = units % t.parts == 0 and (t.parts == 1 or units > t.parts or self.units % t.warps_k == 0)
        has_one_tile = self.sides == t.parts == 1 and self.tiles <= t.row_blocks * t.warps_n and units <= 2
        if t.is_early and not has_one_tile:
            return False
        return has_registers and has_threads and has_units and self.shared_bytes(t) <= _MAX_SHARED_BYTES


@dataclass(frozen=True)
class Variant:
    """Everything that the compiled kernel depends on."""

    product: Product
    group_size: int
    has_zeros: bool
    epilogue: Epilogue
    norm_offset: float
    tiling: Tiling

    def macros(self) -> dict[str, object]:
        """What packed_stream_gemm.cu is compiled with."""
        t, product = self.tiling, self.product
        return {
            "COLS": product.k, "GROUP": self.group_size, "ZERO": int(self.has_zeros), "TOK": product.tokens,
            "WK": t.warps_k, "WN": t.warps_n, "TILES": t.tiles, "STAGES": t.stages, "MINB": t.blocks_per_sm,
            "PARTS": t.parts, "EARLY": int(t.is_early),
            "NORM": int(product.has_norm), "NORM_OFFSET": f"{self.norm_offset}f", **self.epilogue.macros(),
        }  # fmt: skip


def is_faster(x: Tensor, w: Weight, *, has_norm: bool = False, is_gated: bool = False) -> bool:
    """Whether this kernel can multiply x [M, K] by the weight here, and by measurements of this GPU should."""
    if not w.data.is_cuda or x.dtype not in (torch.float16, torch.bfloat16) or not 0 < len(x) <= MAX_TOKENS:
        return False
    if not has_vectors(x) or torch.cuda.get_device_capability(w.data.device) != (9, 0):
        return False
    return choose_tiling(product_of(w, len(x), is_gated, has_norm)) is not None


def packed_stream_gemm(
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
    tiling: Tiling | None = None,
) -> Tensor:
    """rms_norm(x) W^T + bias + residual, or activation(gate) * up of its halves: [M, K] -> [M, N] or [M, N / 2].

    M up to 4. Rows of x and residual may be apart; `out` may be the residual. Raises KernelError where no tiling fits.
    """
    m = len(x)
    epilogue, out, residual = prepare(x, w.n, bias, residual, activation, out_dtype, out)
    product = product_of(w, m, epilogue.is_gated, norm_weight is not None)
    tiling = tiling or choose_tiling(product) or rule_tiling(product, num_sms())
    if tiling is None:
        raise nvrtc.KernelError(f"a block cannot hold {product}")
    variant = Variant(product, w.group_size, w.has_zeros, epilogue, float(norm_offset), tiling)
    arguments = (w.data, x, out, residual, norm_weight, bias, norm_eps, m, w.n, x.stride(0), out.stride(0))
    _kernel(variant)(tiling.row_blocks, arguments)
    return out


def product_of(w: Weight, m: int, is_gated: bool, has_norm: bool) -> Product:
    """That of m tokens and the weight."""
    return Product(w.n, w.k, 4 if m > 2 else m, w.unit_bytes, is_gated, has_norm)


@functools.cache
def choose_tiling(product: Product) -> Tiling | None:
    """The measured best for "NxK:tokens", with ":gated" behind it for gates and ups, else a rule.

    None where another kernel is faster, which an empty list says, or nothing was measured for so many tokens.
    """
    table = tiling_table(f"packed_stream_tilings_sm90_{num_sms()}")
    if not any(found and name.split(":")[1] == str(product.tokens) for name, found in table.items()):
        return None
    found: list[Any] | None = table.get(product.name)
    if found == []:
        return None
    if found and product.fits(Tiling(*found)):
        return Tiling(*found)
    return rule_tiling(product, num_sms())


def rule_tiling(product: Product, num_sms: int) -> Tiling | None:
    """A block per SM, about twelve warps with a few k-units each, and a deep enough ring; None if nothing fits."""
    for blocks in (num_sms, 4 * num_sms, 16 * num_sms):  # more blocks have fewer partial sums each
        for most_bytes in (_RING_BYTES, _MAX_SHARED_BYTES):
            for tiling in _usual_tilings(product, blocks):
                if product.fits(tiling) and product.shared_bytes(tiling) <= most_bytes:
                    return tiling
    return None


def _usual_tilings(product: Product, blocks: int) -> Iterator[Tiling]:
    """The preferred ones first: many warps, large stages, at least three of them or all that a warp has."""
    units, held = product.units, -(-product.tiles // blocks)
    least = -(-units // min(_MAX_UNITS, _MAX_UNITS_AND_TOKENS // product.tokens))
    warps_k = max(least, min(units, _USUAL_WARPS, -(-units // (_USUAL_UNITS if held > 1 else 1))))
    warps_k = -(-units // -(-units // warps_k))  # as few as need not have more units
    of_warp = -(-units // warps_k)
    for warps_n in range(max(1, min(held, _USUAL_WARPS // warps_k)), 0, -1):
        for parts in (part for part in range(1, of_warp + 1) if of_warp % part == 0):
            depth = -(-held // warps_n) * parts
            for stages in range(min(_MAX_STAGES, depth), min(3, depth) - 1, -1):
                yield Tiling(warps_k, warps_n, 1, stages, min(blocks, product.tiles), parts=parts)


@functools.cache
def _kernel(variant: Variant) -> Kernel:
    return Kernel(
        nvrtc.cubin("packed_stream_gemm.cu", variant.macros(), _ARCH),
        "packed_stream_gemm",
        threads=variant.tiling.threads,
        shared_bytes=variant.product.shared_bytes(variant.tiling),
        overlaps=True,
    )
