"""Products of up to 128 tokens with plain 16-bit weights on Hopper: choice of a variant, launch. See tensor_gemm.cu."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from lmdeploy.kernels.cuda import nvrtc, skinny_gemm
from lmdeploy.kernels.cuda.driver import Kernel
from lmdeploy.kernels.cuda.epilogue import Epilogue, prepare
from lmdeploy.kernels.cuda.skinny_gemm import arch, num_sms
from lmdeploy.kernels.cuda.tensor_map import rows_map

MAX_TOKENS = 128
_TOKEN_ROWS = (16, 32, 64, 128)  # of x that are copied
_FEW_TOKENS, _SOME_TOKENS = (
    16,
    64,
)  # up to which it is faster than cuBLAS for every weight; for those of one block per SM
_LONG_COLUMNS = 8192  # from which on K is split
_COLUMNS = 64  # of a box: 128 bytes, a row of the swizzle
_TOKENS = 64  # of a warpgroup
_MAX_ROWS = 256  # of a block
_STATIC_SHARED_BYTES = 2 << 10  # more than the barriers take
_SHARED_BYTES_OF_ONE = 116 << 10  # of two such blocks, an SM holds one


@dataclass(frozen=True)
class Tiling:
    """How a product is spread over blocks; the names are the macros' of tensor_gemm.cu."""

    rows: int
    pieces: int
    stages: int
    cluster: int = 1
    groups: int = 1


@dataclass(frozen=True)
class Variant:
    """Everything that the compiled kernel depends on."""

    token_rows: int
    epilogue: Epilogue
    tiling: Tiling

    @property
    def threads(self) -> int:
        """Of the warpgroups that multiply."""
        return 128 * -(-self.token_rows // _TOKENS) * self.tiling.groups

    @property
    def shared_bytes(self) -> int:
        """The ring, what is beside it, and no less than makes an SM hold one block."""
        t = self.tiling
        ring = t.stages * _stage_bytes(t.pieces, self.token_rows, t.rows)
        beside = bytes_beside_ring(self.token_rows, t.rows, t.cluster, t.groups, self.epilogue.is_gated)
        return max(ring + beside, _SHARED_BYTES_OF_ONE)

    def macros(self) -> dict[str, object]:
        t = self.tiling
        columns = t.rows // t.groups
        return {
            "NW": columns, "MT": -(-self.token_rows // _TOKENS), "XROWS": self.token_rows, "KS": t.pieces,
            "STAGES": t.stages, "CL": t.cluster, "WGN": t.groups, **self.epilogue.macros(),
            **operands(columns),
        }  # fmt: skip


def operands(rows: int) -> dict[str, object]:
    """Macros for the operands of a wgmma of so many rows of a weight, which PTX wants written out."""
    sums = range(rows // 2)
    return {
        "REGISTERS": '"' + ",".join(f"%{i}" for i in sums) + '"',
        "ACCUMULATORS": ",".join(f'"+f"(d[{i}])' for i in sums),
        "DESCRIPTORS": f'"%{len(sums)}, %{len(sums) + 1}"',
    }


def supports(x: Tensor, weight: Tensor, is_gated: bool = False) -> bool:
    """Whether x [M, K] and the weight [N, K] can be multiplied here."""
    m, (n, k) = len(x), weight.shape
    if not 0 < m <= MAX_TOKENS or k % 8 or k < _COLUMNS or n % (16 if is_gated else 8) or n < 64:
        return False
    return skinny_gemm.takes_plain(x, weight) and has_instructions()


def is_faster(m: int, n: int, k: int, is_gated: bool) -> bool:
    """Than cuBLAS and a kernel behind it, as measured on an H100.

    Beyond 64 tokens cuBLAS loses by the activation's own kernel, and where K is long.
    """
    if m <= _FEW_TOKENS:
        return True
    return n <= num_sms() * _MAX_ROWS and (m <= _SOME_TOKENS or is_gated or k >= _LONG_COLUMNS)


@functools.cache
def has_instructions() -> bool:
    """Whether the GPU is a Hopper: no other has wgmma."""
    return torch.cuda.get_device_capability()[0] == 9


def tensor_gemm(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    tiling: Tiling | None = None,
) -> Tensor:
    """x W^T + bias + residual, or activation(gate) * up of its halves: [M, K] -> [M, N] or [M, N / 2].

    M up to 128. Rows of x and residual may be apart; `out` may be the residual.
    """
    m, (n, k) = x.shape[0], weight.shape
    epilogue, out, residual = prepare(x, n, bias, residual, activation, out_dtype, out)
    token_rows = next(rows for rows in _TOKEN_ROWS if rows >= m)
    t = tiling or choose_tiling(n, k, token_rows, epilogue.is_gated)
    box = t.rows // t.groups // 2 if epilogue.is_gated else t.rows
    weights = rows_map(weight.data_ptr(), x.dtype, k, n, k * 2, box)
    tokens = rows_map(x.data_ptr(), x.dtype, k, m, x.stride(0) * 2, token_rows)
    _kernel(Variant(token_rows, epilogue, t))(
        -(-n // t.rows) * t.cluster, (weights, tokens, out, residual, bias, m, n, k, out.stride(0))
    )
    return out


@functools.cache
def choose_tiling(n: int, k: int, token_rows: int, is_gated: bool) -> Tiling:
    """The rule that measurements led to."""
    return rule_tiling(n, k, token_rows, is_gated, num_sms())


def rule_tiling(n: int, k: int, token_rows: int, is_gated: bool, num_sms: int, shared_bytes: int = 227 << 10) -> Tiling:
    """As few rows a block as give every SM one, or all the same number; a ring that fills an SM's shared memory.

    K is split over two blocks where rows are few and long: x would be copied more often than the weight is large.
    """
    step = 16 if is_gated else 8
    cluster = 2 if n <= 32 * num_sms and k >= _LONG_COLUMNS else 1
    waves = -(-n * cluster // (num_sms * _MAX_ROWS))
    rows = -(-n * cluster // (num_sms * waves * step)) * step
    groups = 2 if is_gated and rows >= 192 and rows % 32 == 0 and token_rows <= _TOKENS else 1
    pieces = 1 if rows >= 96 else 2
    ring = shared_bytes - _STATIC_SHARED_BYTES - bytes_beside_ring(token_rows, rows, cluster, groups, is_gated)
    steps = -(-k // (_COLUMNS * pieces * cluster))
    return Tiling(rows, pieces, min(ring // _stage_bytes(pieces, token_rows, rows), max(2, steps)), cluster, groups)


def _stage_bytes(pieces: int, token_rows: int, rows: int) -> int:
    return pieces * (token_rows + rows) * 2 * _COLUMNS


def bytes_beside_ring(token_rows: int, rows: int, cluster: int, groups: int, is_gated: bool) -> int:
    """Shared memory that aligns the ring, that a token tile reads behind its end, and that a cluster's sums take."""
    slack = _TOKENS * 2 * _COLUMNS if token_rows < _TOKENS else 0
    halves = 2 if is_gated else 1
    chunks = -(-(rows // groups // 8 // halves) // cluster) * halves  # of 8 columns, that a block finishes
    threads = 128 * -(-token_rows // _TOKENS) * groups
    return 1024 + slack + (cluster * chunks * threads * 16 if cluster > 1 else 0)


@functools.cache
def _kernel(variant: Variant) -> Kernel:
    return Kernel(
        nvrtc.cubin("tensor_gemm.cu", variant.macros(), arch()),
        "tensor_gemm",
        threads=variant.threads + 32,
        shared_bytes=variant.shared_bytes,
        cluster=variant.tiling.cluster,
        overlaps=True,
    )
