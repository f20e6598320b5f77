# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Routed experts as two grouped products, planned on the device: no step asks the host how many tokens an expert has.

Pairs of a token and one of its choices are sorted by expert and cut into tiles of one expert each. The grid has as many
tiles as there can be; programs beyond the last tile return at once, so that a graph captures one launch for all
routings. It knows no router and no checkpoint format.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmdeploy.kernels import invariant
from lmdeploy.kernels.triton.activation import activate
from lmdeploy.kernels.triton.affine import PackedAffine, add_product, channels_of

_MAX_RANKED_PAIRS = 4096  # beyond, sorting costs less than comparing every pair with every other
_RANK_BLOCK = 128
_SUM_BLOCK = 1024
_MAX_STAGES = 4
_FIXED_PAIRS = 16  # of a tile, where results must not depend on how many there are


@dataclass(frozen=True, eq=False)
class _Experts:
    """The weights of all experts, stacked by rows: plain, or integers with scales and minima."""

    values: Tensor
    scales: Tensor
    mins: Tensor
    bits: int
    group_size: int
    k: int
    element_bytes: float

    @staticmethod
    def plain(weight: Tensor) -> _Experts:
        weight = weight.contiguous()
        return _Experts(weight, weight, weight, 16, 128, weight.shape[-1], weight.element_size())

    @staticmethod
    def packed(w: PackedAffine) -> _Experts:
        return _Experts(w.q, w.scales, w.mins, w.bits, w.group_size, w.k, w.bits / 8)


@dataclass(frozen=True)
class _Tiling:
    """Sizes of tiles: pairs, output features, input features; and how a program runs."""

    pairs: int
    rows: int
    columns: int
    num_warps: int
    num_stages: int


def routed_mlp(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: str,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    clamp: float | None = None,
) -> Tensor:
    """Weighted sum of the gated MLPs that each token is routed to: [T, C] in x's dtype, summed in float32.

    x: [T, C]; weights: [T, k] float32; experts: [T, k] expert of each choice; gate_up: [E, 2 I, C]; down: [E, C, I];
    biases [E, 2 I] and [E, C]. clamp: the clamped SwiGLU with this limit in place of the activation. No sum depends on
    the order in which programs run.
    """
    both, last = _Experts.plain(gate_up), _Experts.plain(down)
    return _run(x, weights, experts, both, last, len(gate_up), activation, gate_up_bias, down_bias, clamp)


def routed_mlp_affine(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: PackedAffine,
    down: PackedAffine,
    activation: str,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    clamp: float | None = None,
) -> Tensor:
    """`routed_mlp` over affine weights, dequantized tile by tile: the experts' rows stacked, [E * 2 I, C] and [E * C, I]."""
    both, last = _Experts.packed(gate_up), _Experts.packed(down)
    return _run(x, weights, experts, both, last, down.n // gate_up.k, activation, gate_up_bias, down_bias, clamp)


def _run(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: _Experts,
    down: _Experts,
    num_experts: int,
    activation: str,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    clamp: float | None,
) -> Tensor:
    x = x.contiguous()
    top_k = experts.shape[1]
    num_pairs = experts.numel()
    out = torch.empty_like(x)
    if num_pairs == 0:
        return out
    block_m = _FIXED_PAIRS if invariant.applies(len(x)) else _pairs_of_a_tile(num_pairs, num_experts, x.dtype)
    order, tiles = _plan(experts.contiguous(), num_experts, block_m)
    hidden = torch.empty(num_pairs, down.k, dtype=x.dtype, device=x.device)
    mode = activation if clamp is None else "clamped"
    _multiply(x, gate_up, gate_up_bias, order, tiles, hidden, block_m, top_k, mode, clamp or 0.0)
    parts = torch.empty(num_pairs, x.shape[1], dtype=x.dtype, device=x.device)
    _multiply(hidden, down, down_bias, order, tiles, parts, block_m, top_k, "", 0.0)
    grid = (len(x), triton.cdiv(x.shape[1], _SUM_BLOCK))
    _sum_kernel[grid](parts, weights.contiguous(), out, x.shape[1], TOP_K=top_k, BLOCK=_SUM_BLOCK, num_warps=4)
    return out


def _pairs_of_a_tile(num_pairs: int, num_experts: int, dtype: torch.dtype) -> int:
    """A power of two from 16 about as large as what one expert gets on average."""
    largest = 32 if dtype == torch.float32 else 128
    return min(largest, max(16, triton.next_power_of_2(triton.cdiv(num_pairs, num_experts))))


def _plan(experts: Tensor, num_experts: int, block_m: int) -> tuple[Tensor, Tensor]:
    """Pairs [T * k] int32 sorted by expert, and for each tile its expert (-1: none), first and last + 1 place [., 3]."""
    num_pairs = experts.numel()
    device = experts.device
    num_tiles = num_pairs // block_m + min(num_pairs, num_experts)
    tiles = torch.empty(num_tiles, 3, dtype=torch.int32, device=device)
    is_ranked = num_pairs <= _MAX_RANKED_PAIRS
    if is_ranked:
        order = torch.empty(num_pairs, dtype=torch.int32, device=device)
    else:
        order = experts.flatten().sort(stable=True).indices.to(torch.int32)
    _plan_kernel[(1 + (triton.cdiv(num_pairs, _RANK_BLOCK) if is_ranked else 0),)](
        experts,
        order,
        tiles,
        num_pairs,
        num_tiles,
        E=num_experts,
        PADDED_E=triton.next_power_of_2(num_experts),
        BLOCK_M=block_m,
        BLOCK=_RANK_BLOCK,
        num_warps=8,
    )
    return order, tiles


def _multiply(
    x: Tensor,
    weight: _Experts,
    bias: Tensor | None,
    order: Tensor,
    tiles: Tensor,
    out: Tensor,
    block_m: int,
    top_k: int,
    mode: str,
    limit: float,
) -> None:
    """x of each pair times its expert's weight. mode: the activation of gate and up from tokens; "": plain, to pairs."""
    features = out.shape[1]
    tiling = _tiling(weight, block_m, x, bool(mode))
    _grouped_kernel[(len(tiles) * triton.cdiv(features, tiling.rows),)](
        x,
        weight.values,
        weight.scales,
        weight.mins,
        x if bias is None else bias.contiguous(),
        out,
        order,
        tiles,
        len(tiles),
        features,
        weight.k,
        limit,
        HAS_BIAS=bias is not None,
        MODE=mode,
        TOP_K=top_k,
        BITS=weight.bits,
        GROUP=weight.group_size,
        BLOCK_M=tiling.pairs,
        BLOCK_N=tiling.rows,
        BLOCK_K=tiling.columns,
        GROUP_TILES=8,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )


def _tiling(weight: _Experts, block_m: int, x: Tensor, is_gated: bool) -> _Tiling:
    """Tiles and as many stages as fit into half of a multiprocessor's shared memory, or into all of it when tiles are large."""
    is_large = block_m >= 128
    rows, columns = (128, 64) if is_large else (64, 128)
    stage_bytes = columns * (rows * (2 if is_gated else 1) * weight.element_bytes + block_m * x.element_size())
    shared_bytes = 100 * 1024
    if x.device.type == "cuda":
        properties = torch.cuda.get_device_properties(x.device)
        shared_bytes = getattr(properties, "shared_memory_per_block_optin", shared_bytes) - 4096
    fitting = int(shared_bytes / (1 if is_large else 2) // stage_bytes)
    return _Tiling(block_m, rows, columns, 8 if is_large else 4, min(_MAX_STAGES, max(2, fitting)))


@triton.jit(do_not_specialize=["P", "num_tiles"])
def _plan_kernel(
    experts_ptr,
    order_ptr,
    tiles_ptr,
    P,
    num_tiles,
    E: tl.constexpr,
    PADDED_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program 0 counts each expert's pairs and writes the tiles; the others find the sorted places of BLOCK pairs each."""
    program = tl.program_id(0)
    if program == 0:
        expert = tl.arange(0, PADDED_E)
        count = tl.zeros([PADDED_E], tl.int32)
        for start in range(0, P, BLOCK):
            other = start + tl.arange(0, BLOCK)
            chosen = tl.load(experts_ptr + other, mask=other < P, other=-1).to(tl.int32)
            count += tl.sum((chosen[None, :] == expert[:, None]).to(tl.int32), axis=1)
        tiles = (count + BLOCK_M - 1) // BLOCK_M
        first_place = tl.cumsum(count, 0) - count
        last_tile = tl.cumsum(tiles, 0)
        for start in range(0, num_tiles, 16):
            tile = start + tl.arange(0, 16)
            owner = tl.sum((last_tile[None, :] <= tile[:, None]).to(tl.int32), axis=1)
            is_owner = expert[None, :] == owner[:, None]
            tile_of_owner = tile - tl.sum(tl.where(is_owner, (last_tile - tiles)[None, :], 0), axis=1)
            first = tl.sum(tl.where(is_owner, first_place[None, :], 0), axis=1) + tile_of_owner * BLOCK_M
            last = tl.sum(tl.where(is_owner, (first_place + count)[None, :], 0), axis=1)
            inside = tile < num_tiles
            tl.store(tiles_ptr + tile * 3, tl.where(owner < E, owner, -1), mask=inside)
            tl.store(tiles_ptr + tile * 3 + 1, first, mask=inside)
            tl.store(tiles_ptr + tile * 3 + 2, tl.minimum(last, first + BLOCK_M), mask=inside)
    else:
        pair = (program - 1) * BLOCK + tl.arange(0, BLOCK)
        mine = tl.load(experts_ptr + pair, mask=pair < P, other=0).to(tl.int32)
        place = tl.zeros([BLOCK], tl.int32)
        for start in range(0, P, BLOCK):
            other = start + tl.arange(0, BLOCK)
            theirs = tl.load(experts_ptr + other, mask=other < P, other=PADDED_E).to(tl.int32)
            is_earlier = (theirs[None, :] == mine[:, None]) & (other[None, :] < pair[:, None])
            place += tl.sum((is_earlier | (theirs[None, :] < mine[:, None])).to(tl.int32), axis=1)
        tl.store(order_ptr + place, pair, mask=pair < P)


@triton.jit
def _with_bias(total, bias_ptr, rows, is_row, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        total += tl.load(bias_ptr + rows, mask=is_row, other=0.0).to(tl.float32)[:, None]
    return total


@triton.jit(do_not_specialize=["num_tiles"])
def _grouped_kernel(
    x_ptr,
    w_ptr,
    scale_ptr,
    min_ptr,
    bias_ptr,
    out_ptr,
    order_ptr,
    tiles_ptr,
    num_tiles,
    N,
    K,
    limit,
    HAS_BIAS: tl.constexpr,
    MODE: tl.constexpr,
    TOP_K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_TILES: tl.constexpr,
):
    """One tile of pairs times BLOCK_N rows of its expert, transposed: [BLOCK_N, BLOCK_M].

    With a MODE rows are read by token and written in sorted order, and each output takes a gate's and an up's row;
    without, rows are read in sorted order and written by pair. Programs of GROUP_TILES tiles share weights in the cache.
    """
    blocks = tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (GROUP_TILES * blocks)
    within = tl.program_id(0) % (GROUP_TILES * blocks)
    tiles = tl.minimum(num_tiles - group * GROUP_TILES, GROUP_TILES)
    tile = group * GROUP_TILES + within % tiles
    expert = tl.load(tiles_ptr + tile * 3)
    if expert < 0:
        return
    place = tl.load(tiles_ptr + tile * 3 + 1) + tl.arange(0, BLOCK_M)
    is_m = place < tl.load(tiles_ptr + tile * 3 + 2)
    pair = tl.load(order_ptr + place, mask=is_m, other=0)
    n = within // tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    is_n = n < N
    if MODE == "":
        source, target = place, pair
        rows = expert.to(tl.int64) * N + n
    else:
        source, target = pair // TOP_K, place
        rows = expert.to(tl.int64) * (2 * N) + n
    x_rows = x_ptr + source.to(tl.int64)[None, :] * K
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for k in range(0, K, BLOCK_K):
        channel = channels_of(k, BITS, BLOCK_K)
        inside = is_m[None, :] & (channel < K)[:, None]
        x = tl.load(x_rows + channel[:, None], mask=inside, other=0.0)
        x_high = x
        if BITS == 4:
            x_high = tl.load(x_rows + channel[:, None] + 4, mask=inside, other=0.0)
        total = add_product(total, x, x_high, w_ptr, scale_ptr, min_ptr, rows, is_n, k, K, BITS, GROUP, BLOCK_K)
        if MODE != "":
            up = add_product(up, x, x_high, w_ptr, scale_ptr, min_ptr, rows + N, is_n, k, K, BITS, GROUP, BLOCK_K)
    total = _with_bias(total, bias_ptr, rows, is_n, HAS_BIAS)
    if MODE != "":
        up = _with_bias(up, bias_ptr, rows + N, is_n, HAS_BIAS)
        if MODE == "clamped":
            total = tl.minimum(total, limit)
            up = tl.minimum(tl.maximum(up, -limit), limit)
            total = (up + 1.0) * total * tl.sigmoid(1.702 * total)
        else:
            total = activate(total, MODE) * up
    out = target.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(out_ptr + out, total.to(out_ptr.dtype.element_ty), mask=is_n[:, None] & is_m[None, :])


@triton.jit
def _sum_kernel(parts_ptr, weights_ptr, out_ptr, C, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < C
    total = tl.zeros([BLOCK], tl.float32)
    for choice in range(TOP_K):
        weight = tl.load(weights_ptr + token * TOP_K + choice).to(tl.float32)
        part = tl.load(parts_ptr + (token * TOP_K + choice) * C + columns, mask=inside, other=0.0)
        total += weight * part.to(tl.float32)
    tl.store(out_ptr + token * C + columns, total.to(out_ptr.dtype.element_ty), mask=inside)
