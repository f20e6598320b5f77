"""Matrix products of few tokens on the GPU: packing of 4-bit weights, choice of a variant, launch. See skinny_gemm.cu."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lmdeploy.kernels.cuda import nvrtc
from lmdeploy.kernels.cuda.driver import Kernel
from lmdeploy.kernels.cuda.epilogue import Epilogue, prepare

MAX_TOKENS = 64
COLUMNS = 128  # of a unit; K must be a multiple
_ROW_BYTES = 320  # of 128 columns of x in shared memory
_STATIC_SHARED_BYTES = 2 << 10  # at most, of barriers and a norm's sums


@dataclass(frozen=True)
class Weight:
    """A 4-bit weight [n, k] as the kernel reads it: packed units of `group_size` columns a scale.

    has_zeros: groups have an integer zero, not a minimum.
    """

    data: Tensor
    n: int
    k: int
    bits: int = 4
    group_size: int = COLUMNS
    has_zeros: bool = True

    @property
    def unit_bytes(self) -> int:
        """Bytes of 16 rows x 128 columns in a stage of shared memory."""
        return unit_bytes(self.group_size)


@dataclass(frozen=True)
class Tiling:
    """How a product is spread over warps and blocks; the names are the macros' of skinny_gemm.cu."""

    row_tiles: int
    warps_n: int
    warps_k: int
    stages: int
    cluster: int
    row_blocks: int
    blocks_per_sm: int = 1
    x_stages: int = 0
    trigger: int = 0


@dataclass(frozen=True)
class Variant:
    """Everything that the compiled kernel depends on."""

    group_size: int
    has_zeros: bool
    token_tiles: int
    padded_tokens: int
    epilogue: Epilogue
    has_norm: bool
    norm_offset: float
    tiling: Tiling

    def macros(self, is_bulk: bool) -> dict[str, object]:
        t = self.tiling
        return {
            "GROUP": self.group_size, "ZERO": int(self.has_zeros), "MT": self.token_tiles, "MP": self.padded_tokens,
            "TRW": t.row_tiles, "WN": t.warps_n, "WK": t.warps_k, "STAGES": t.stages, "CL": t.cluster,
            "MINB": t.blocks_per_sm, "XS": t.x_stages, "TRIG": t.trigger, "NORM": int(self.has_norm),
            "NORM_OFFSET": f"{self.norm_offset}f", "BULK": int(is_bulk), **self.epilogue.macros(),
        }  # fmt: skip


def supports(n: int, k: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether weights [n, k] can be multiplied here by activations of the dtype."""
    return k % COLUMNS == 0 and n >= 16 and runs_on(device, dtype)


def has_vectors(x: Tensor) -> bool:
    """Whether all rows of 16-bit numbers x [M, K] begin where 16 bytes can be copied at once."""
    return x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0


def takes_plain(x: Tensor, weight: Tensor) -> bool:
    """Whether kernels that copy plain rows can multiply x [M, K] by the weight [N, K] here."""
    is_like_x = weight.is_contiguous() and weight.dtype == x.dtype
    return is_like_x and has_vectors(weight) and has_vectors(x) and runs_on(x.device, x.dtype)


def runs_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether kernels of this folder take activations of the dtype on the device."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0) and is_available()


@functools.cache
def is_available() -> bool:
    """Whether kernels can be compiled and loaded here; if not, says so once."""
    from lmdeploy.logging import get_logger

    try:
        _dequantize_kernel(COLUMNS, has_zeros=True, is_half=False)
    except nvrtc.KernelError as error:
        get_logger().warning("the CUDA kernels are not used: %s", error)
        return False
    return True


def unit_bytes(group_size: int) -> int:
    """Bytes of a packed unit: 16 rows x 128 columns of 4 bits, and their scales."""
    return 1024 + 64 * (COLUMNS // group_size)


def pack(q: Tensor, scales: Tensor, mins: Tensor, zeros: Tensor | None) -> Weight:
    """q: uint8 [N, K] below 16; scales, mins: [N, G] float32; zeros: uint8 [N, G] where min = -zero * scale, else None."""
    (n, k), num_groups = q.shape, scales.shape[1]
    tiles, pad = -(-n // 16), -n % 16
    if pad:
        q, scales, mins = (torch.cat([t, t.new_zeros(pad, t.shape[1])]) for t in (q, scales, mins))
        zeros = None if zeros is None else torch.cat([zeros, zeros.new_zeros(pad, num_groups)])
    # row = 8 rh + g, column = 32 i + 8 t + 4 h + 2 jh + jl; word: (i / 2, lane = (g, t), i % 2, h); nibble 4 jl + 2 jh + rh
    units = q.view(tiles, 2, 8, k // COLUMNS, 2, 2, 4, 2, 2, 2).permute(3, 0, 4, 2, 6, 5, 7, 9, 8, 1)
    pairs = units.reshape(k // COLUMNS, tiles, 1024, 2)
    nibbles = pairs[..., 0] | pairs[..., 1] << 4
    scale = scales.half()
    scale = torch.where(scale == 0, 2.0**-24, scale)  # the kernel divides by it; those of GGUF's Q4_0 may be negative
    second = mins.half().view(torch.int16) if zeros is None else zeros.to(torch.int16)
    both = torch.stack([scale.view(torch.int16), second], dim=-1)
    params = both.view(tiles, 16, k // COLUMNS, -1, 2).permute(2, 0, 3, 1, 4).contiguous().view(torch.uint8)
    data = torch.cat([nibbles, params.reshape(k // COLUMNS, tiles, -1)], dim=-1).contiguous()
    return Weight(data, n, k, 4, k // num_groups, zeros is not None)


def unpack(w: Weight) -> tuple[Tensor, Tensor, Tensor]:
    """What `pack` was given, scales and minima rounded as they are stored: q [N, K], scales, mins [N, G] float32."""
    units, tiles = w.data.shape[:2]
    nibbles = w.data[..., :1024]
    pairs = torch.stack([nibbles & 15, nibbles >> 4], dim=-1).view(units, tiles, 2, 8, 4, 2, 2, 2, 2, 2)
    q = pairs.permute(1, 9, 3, 0, 2, 5, 4, 6, 8, 7).reshape(tiles * 16, w.k)[: w.n]
    params = w.data[..., 1024:].contiguous().view(torch.int16).view(units, tiles, -1, 16, 2)
    both = params.permute(1, 3, 0, 2, 4).reshape(tiles * 16, -1, 2)[: w.n]
    scales = both[..., 0].contiguous().view(torch.float16).float()
    second = both[..., 1].contiguous()
    mins = -second.float() * scales if w.has_zeros else second.view(torch.float16).float()
    return q.contiguous(), scales, mins


def skinny_gemm(
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

    M up to 64, with a norm up to 8. Rows of x and residual may be apart; `out` may be the residual.
    """
    m = x.shape[0]
    epilogue, out, residual = prepare(x, w.n, bias, residual, activation, out_dtype, out)
    variant = choose_variant(w, m, epilogue, norm_weight is not None, norm_offset, tiling)
    kernel = _kernel(variant, w.unit_bytes)
    arguments = (w.data, x, out, residual, norm_weight, bias, norm_eps, m, w.n, w.k, x.stride(0), out.stride(0))
    kernel(variant.tiling.row_blocks * variant.tiling.cluster, arguments)
    return out


def choose_variant(
    w: Weight, m: int, epilogue: Epilogue, has_norm: bool, norm_offset: float, tiling: Tiling | None = None
) -> Variant:
    """The compiled form that multiplies m tokens."""
    token_tiles = 1 if m <= 8 else 2 if m <= 16 else 4 if m <= 32 else 8
    return Variant(
        group_size=w.group_size,
        has_zeros=w.has_zeros,
        token_tiles=token_tiles,
        padded_tokens=1 if m == 1 else 2 if m == 2 else 4 if m <= 4 else 8,
        epilogue=epilogue,
        has_norm=has_norm,
        norm_offset=float(norm_offset),
        tiling=tiling or choose_tiling(w.n, w.k, m, w.bits, w.unit_bytes, epilogue.is_gated, has_norm),
    )


def dequantize(w: Weight, dtype: torch.dtype) -> Tensor:
    """The packed weight as a plain matrix [N, K] in fp16 or bf16."""
    out = torch.empty(w.n, w.k, dtype=dtype, device=w.data.device)
    kernel = _dequantize_kernel(w.group_size, w.has_zeros, dtype == torch.float16)
    kernel(-(-(w.data.shape[0] * w.data.shape[1]) // 8), (w.data, out, w.n, w.k))
    return out


@functools.cache
def choose_tiling(n: int, k: int, m: int, bits: int, unit_bytes: int, is_gated: bool, has_norm: bool) -> Tiling:
    """The measured best for "bits:NxK:M", the next larger M, where there is one for this GPU, else a rule."""
    major, minor = torch.cuda.get_device_capability()
    table = tiling_table(f"tilings_sm{major}{minor}_{num_sms()}")
    for size in (1, 2, 4, 8, 16, 32, 64):
        found = table.get(f"{bits}:{n}x{k}:{size}")
        if size >= m and (size > 16) == (m > 16) and found is not None:
            tiling = Tiling(*found)
            if not (has_norm and tiling.x_stages) and not (is_gated and tiling.row_tiles % 2):
                return tiling
    return rule_tiling(n, k, m, unit_bytes, is_gated, num_sms(), block_shared_bytes())


def rule_tiling(
    n: int, k: int, m: int, unit_bytes: int, is_gated: bool, num_sms: int, shared_bytes: int = 227 << 10
) -> Tiling:
    """Every SM gets whole tiles of rows; K is split over the block's warps, and over clusters where rows are too few.

    shared_bytes: of shared memory that a block may take.
    """
    tiles = -(-n // 16) // (2 if is_gated else 1)
    units, unit = k // COLUMNS, unit_bytes * (2 if is_gated else 1)
    cluster = 1
    has_clusters = torch.cuda.get_device_capability()[0] >= 9
    while m > 16 and has_clusters and cluster < 8 and tiles * cluster < 8 * num_sms and units >= cluster * 8:
        cluster *= 2
    per_block = -(-tiles * cluster // max(num_sms - num_sms % cluster, cluster))
    row_tiles = 1 if per_block == 1 else 2 if per_block <= 4 or m > 32 or is_gated else 4
    sums = 512 * (1 if m <= 8 else 2 if m <= 16 else 4 if m <= 32 else 8) * (2 if is_gated else 1)
    while row_tiles > 1 and 8 * row_tiles * max(unit, sums) > shared_bytes - _STATIC_SHARED_BYTES:
        row_tiles //= 2
    warps_n = next(count for count in (1, 2, 4) if count == 4 or count * row_tiles >= per_block)
    warps_k = 8 // warps_n
    row_blocks = max(-(-tiles // (row_tiles * warps_n)), min(tiles, num_sms // cluster))
    stages = max(1, min(4, 100_000 // (8 * row_tiles * unit), -(-units // (cluster * warps_k))))
    return Tiling(row_tiles * (2 if is_gated else 1), warps_n, warps_k, stages, cluster, row_blocks)


@functools.cache
def num_sms() -> int:
    """Multiprocessors of the device."""
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count)


@functools.cache
def block_shared_bytes() -> int:
    """Of a block at most: 227 KiB from Hopper on, 99 to 163 KiB on older GPUs and those for workstations."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return int(getattr(properties, "shared_memory_per_block_optin", 99 << 10))


@functools.cache
def tiling_table(name: str) -> dict[str, list[int]]:
    """The measured tilings of the JSON file of that name, which exists for some GPUs."""
    path = Path(__file__).with_name(f"{name}.json")
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


@functools.cache
def _kernel(variant: Variant, unit: int) -> Kernel:
    t = variant.tiling
    warps = t.warps_n * t.warps_k
    ring = warps * t.stages * t.row_tiles * unit
    x_ring = t.x_stages * t.warps_k * variant.token_tiles * 8 * _ROW_BYTES
    sums = warps * t.row_tiles * variant.token_tiles * 512
    is_bulk = torch.cuda.get_device_capability() >= (9, 0)
    return Kernel(
        nvrtc.cubin("skinny_gemm.cu", variant.macros(is_bulk), arch()),
        "skinny_gemm",
        threads=warps * 32,
        shared_bytes=max(ring + x_ring, sums),
        cluster=t.cluster,
        overlaps=is_bulk,
    )


@functools.cache
def _dequantize_kernel(group_size: int, has_zeros: bool, is_half: bool) -> Kernel:
    macros = {"GROUP": group_size, "ZERO": int(has_zeros), "FP16": int(is_half)}
    return Kernel(nvrtc.cubin("dequantize.cu", macros, arch()), "dequantize", threads=256)


@functools.cache
def arch() -> str:
    """The device's own architecture; from Hopper on with its own instructions."""
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")
