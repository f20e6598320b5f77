"""Products of one to four tokens with plain 16-bit weights: choice of a variant, launch. See stream_gemm.cu."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from lmdeploy.kernels.cuda import nvrtc, skinny_gemm
from lmdeploy.kernels.cuda.driver import Kernel
from lmdeploy.kernels.cuda.epilogue import Epilogue, prepare
from lmdeploy.kernels.cuda.skinny_gemm import arch, block_shared_bytes, num_sms

MAX_TOKENS = 4
_WARP_COLUMNS = 256  # of one 16-byte vector per lane
_MAX_VECTORS = 16  # per lane, of all tokens: 128 registers of x
_MAX_WARPS_K, _USUAL_WARPS_K = 14, 9
_STAGE_BYTES, _STAGE_ROWS, _MAX_STAGES = 36 << 10, 8, 16
_STATIC_SHARED_BYTES = 4 << 10  # more than barriers and the block's own take
_SHARED_BYTES_OF_ONE = 116 << 10  # of two such blocks, an SM holds one


@dataclass(frozen=True)
class Tiling:
    """How a product is spread over warps and blocks; the names are the macros' of stream_gemm.cu."""

    warps_k: int
    vectors: int
    warps_n: int
    rows: int
    stages: int


@dataclass(frozen=True)
class Variant:
    """Everything that the compiled kernel depends on."""

    columns: int
    padded_tokens: int
    epilogue: Epilogue
    has_norm: bool
    norm_offset: float
    tiling: Tiling

    def macros(self, is_bulk: bool) -> dict[str, object]:
        t = self.tiling
        return {
            "COLS": self.columns, "TOK": self.padded_tokens, "WK": t.warps_k, "XV": t.vectors, "WN": t.warps_n,
            "ROWS": t.rows, "STAGES": t.stages, "NORM": int(self.has_norm), "NORM_OFFSET": f"{self.norm_offset}f",
            "BULK": int(is_bulk), **self.epilogue.macros(),
        }  # fmt: skip

    def shared_bytes(self, outputs: int) -> int:
        """The ring and what is added to a block's `outputs` rows of y; if much, then so much that an SM takes one block."""
        ring = self.tiling.stages * self.tiling.rows * self.columns * 2
        has_addends = self.epilogue.has_bias or self.epilogue.has_residual
        halves = 2 if self.epilogue.is_gated else 1
        both = ring + (outputs * self.padded_tokens * halves * 4 if has_addends else 0)
        is_small = (
            both < _SHARED_BYTES_OF_ONE // 2 or block_shared_bytes() < _SHARED_BYTES_OF_ONE + _STATIC_SHARED_BYTES
        )
        return both if is_small else max(both, _SHARED_BYTES_OF_ONE)


def supports(x: Tensor, weight: Tensor) -> bool:
    """Whether x [M, K] and the weight [N, K] can be multiplied here."""
    m, k = len(x), weight.shape[1]
    if not 0 < m <= MAX_TOKENS or k % 8 or not skinny_gemm.takes_plain(x, weight):
        return False
    fits = 2 * 2 * k * 2 <= block_shared_bytes()  # two stages of a gate and an up
    return fits and k <= _MAX_WARPS_K * _WARP_COLUMNS * (_MAX_VECTORS // _padded(m))


def stream_gemm(
    x: Tensor,
    weight: Tensor,
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

    M up to 4. Rows of x and residual may be apart; `out` may be the residual.
    """
    m, (n, k) = x.shape[0], weight.shape
    epilogue, out, residual = prepare(x, n, bias, residual, activation, out_dtype, out)
    outs, tokens = out.shape[1], _padded(m)
    tiling = tiling or choose_tiling(outs, k, tokens, epilogue.is_gated)
    variant = Variant(k, tokens, epilogue, norm_weight is not None, float(norm_offset), tiling)
    blocks = num_sms()
    arguments = (weight, x, out, residual, norm_weight, bias, norm_eps, m, n, x.stride(0), out.stride(0))
    _kernel(variant, -(-outs // blocks))(blocks, arguments)
    return out


@functools.cache
def choose_tiling(outs: int, k: int, tokens: int, is_gated: bool) -> Tiling:
    """The rule that measurements led to. outs: rows of y."""
    return rule_tiling(outs, k, tokens, is_gated, num_sms(), block_shared_bytes())


def rule_tiling(outs: int, k: int, tokens: int, is_gated: bool, num_sms: int, shared_bytes: int) -> Tiling:
    """Stages of 24 to 36 KiB of whole rows, as many as fit or as the block has; about nine warps along K.

    shared_bytes: of shared memory that a block may take.
    """
    pieces = -(-k // _WARP_COLUMNS)
    most = _MAX_VECTORS // tokens
    vectors = next((count for count in range(1, most + 1) if -(-pieces // count) <= _USUAL_WARPS_K), most)
    warps_k = -(-pieces // vectors)
    halves = 2 if is_gated else 1
    rows = _STAGE_ROWS
    while rows > halves and rows * k * 2 > _STAGE_BYTES:
        rows //= 2
    outputs = -(-outs // num_sms)  # of a block, and below what it needs for them beside the ring
    beside = _STATIC_SHARED_BYTES + outputs * tokens * halves * 4
    fitting = (shared_bytes - beside) // (rows * k * 2 + rows * tokens * warps_k * 4)
    stages = max(1, min(fitting, -(-outputs * halves // rows), _MAX_STAGES))
    return Tiling(warps_k, vectors, 2 if rows > 1 and warps_k <= _USUAL_WARPS_K else 1, rows, stages)


def _padded(m: int) -> int:
    return 4 if m > 2 else m


@functools.cache
def _kernel(variant: Variant, outputs: int) -> Kernel:
    is_bulk = torch.cuda.get_device_capability() >= (9, 0)
    return Kernel(
        nvrtc.cubin("stream_gemm.cu", variant.macros(is_bulk), arch()),
        "stream_gemm",
        threads=(variant.tiling.warps_k * variant.tiling.warps_n + 1) * 32,
        shared_bytes=variant.shared_bytes(outputs),
        overlaps=is_bulk,
    )
