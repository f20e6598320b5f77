# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Next tokens on the device: the largest logit, a draw from the filtered distribution, uniform numbers, bit masks.

It knows no request and no penalty. A draw follows the definition of the engine's sampler, but finds the thresholds of
top-k and top-p without sorting: distances below the row's largest logit become integers, whose bits are settled four at
a time by summing counts or probabilities in 16 bins. Two levels run over all of the row in parallel; they leave few
candidates, which the last kernel copies to a list and settles there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmdeploy.kernels.triton.arrivals import counters

INVALID_TOKEN = -1

_PROGRAMS = 528  # four for each multiprocessor of the largest devices
_ARGMAX_BLOCK = 2048
_TILE = 4096  # of a row, for one program of the first levels
_BLOCK = 512
_SCAN_BLOCK = 4096
_LIST_CAPACITY = 16384

# Distances below the largest logit are integers of 28 bits, in units of 2 ** -23: seven levels of four bits.
_UNIT = tl.constexpr(2.0**23)
_OUTSIDE = tl.constexpr(1 << 28)
_LOG2_WEIGHT = tl.constexpr(-1.4426950408889634 / 2**23)
_TOP_SHIFT = tl.constexpr(24)


def argmax(logits: Tensor) -> Tensor:
    """The first largest logit of each row, [R] int64; INVALID_TOKEN where the largest is not finite or one is NaN.

    logits: [R, V] of any float dtype, rows at any distance.
    """
    return _find_largest(logits)[0]


def draw(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniforms: Tensor,
) -> Tensor:
    """One token per row by inverting the cumulative distribution at the row's uniform number: [R] int64.

    logits: [R, V] of any float dtype. temperature, top_p, min_p: [R] float32; top_k: [R] int32 or int64; uniforms: [R]
    float32 or float64 in [0, 1). Divide by temperature (at least 1e-4; rows with 0 take the argmax), keep the k largest
    with all that tie (k 0 keeps all), softmax, drop what is below min_p of the largest probability, keep the smallest
    set of the most probable whose share of the rest reaches top_p. Scaled logits whose distances to the largest differ
    by less than 2 ** -23 are ties; at top_p the first of them stay. Nothing is drawn that lies 32 or more below the
    largest. INVALID_TOKEN as in `argmax`. The result is the same in every run and whatever the other rows are.
    """
    num_rows, vocab_size = logits.shape
    tokens, largest = _find_largest(logits)
    if num_rows == 0:
        return tokens
    tiles = triton.cdiv(vocab_size, _TILE)
    bins = torch.empty(2, num_rows, tiles, 16, dtype=torch.float32, device=logits.device)
    temperature, top_k, top_p, min_p, uniforms = (t.contiguous() for t in (temperature, top_k, top_p, min_p, uniforms))
    rows = (logits, logits.stride(0), vocab_size, largest, temperature, top_k, top_p, min_p, bins, num_rows, tiles)
    padded_tiles = triton.next_power_of_2(tiles)
    for level in range(2):
        _bins_kernel[(num_rows, tiles)](
            *rows, LEVEL=level, TILE=_TILE, BLOCK=_BLOCK, PADDED_TILES=padded_tiles, num_warps=8
        )
    capacity = min(vocab_size, _LIST_CAPACITY)
    _draw_kernel[(num_rows,)](
        *rows,
        uniforms,
        torch.empty(num_rows, capacity, dtype=torch.int32, device=logits.device),
        capacity,
        tokens,
        SCAN_BLOCK=_SCAN_BLOCK,
        BLOCK=_BLOCK,
        PADDED_TILES=padded_tiles,
        num_warps=8,
    )
    return tokens


def uniforms(seeds: Tensor, positions: Tensor) -> Tensor:
    """Numbers in [0, 1) fixed by seeds and positions, [R] int64 each, bit for bit the engine's: [R] float64.

    Source: splitmix64, https://doi.org/10.1145/2660193.2660195
    """
    out = torch.empty(len(seeds), dtype=torch.float64, device=seeds.device)
    if len(seeds):
        grid = (triton.cdiv(len(seeds), 128),)
        _uniforms_kernel[grid](seeds.contiguous(), positions.contiguous(), out, len(seeds), BLOCK=128, num_warps=4)
    return out


def apply_bitmask(logits: Tensor, mask: Tensor, rows: Tensor) -> None:
    """Set logits [R, V] to -inf in place where the token's bit in mask [M, ceil(V / 32)] int32 is 0, lowest bits first.

    rows: [M] int64, the row of logits that each row of the mask belongs to.
    """
    vocab_size = logits.shape[1]
    if len(rows):
        grid = (len(rows), triton.cdiv(vocab_size, _BLOCK))
        strides = (logits.stride(0), mask.stride(0))
        _bitmask_kernel[grid](logits, mask, rows, *strides, vocab_size, BLOCK=_BLOCK, num_warps=4)


def _find_largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens as in `argmax` and the largest logits [R] float32, infinite where a row is invalid."""
    num_rows, vocab_size = logits.shape
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    largest = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    if num_rows == 0:
        return tokens, largest
    blocks = triton.cdiv(vocab_size, _ARGMAX_BLOCK)
    blocks_each = triton.cdiv(blocks, max(1, min(blocks, _PROGRAMS // num_rows)))
    splits = triton.cdiv(blocks, blocks_each)
    partial = torch.empty(num_rows, splits, dtype=torch.int64, device=logits.device)
    _argmax_kernel[(num_rows, splits)](
        logits,
        logits.stride(0),
        vocab_size,
        partial,
        counters(logits.device),
        tokens,
        largest,
        blocks_each,
        splits,
        IS_SPLIT=splits > 1,
        PADDED_SPLITS=triton.next_power_of_2(blocks),
        BLOCK=_ARGMAX_BLOCK,
        num_warps=4,
    )
    return tokens, largest


@triton.jit
def _ordered(bits):
    """float32 bits as integers of the same order, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit(do_not_specialize=["blocks_each", "splits"])
def _argmax_kernel(
    logits_ptr,
    stride,
    V,
    partial_ptr,
    counter_ptr,
    token_ptr,
    largest_ptr,
    blocks_each,
    splits,
    IS_SPLIT: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    begin = split * blocks_each * BLOCK
    columns = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    where = tl.full([BLOCK], 0x7FFFFFFF, tl.int32)
    for start in range(begin, tl.minimum(begin + blocks_each * BLOCK, V), BLOCK):
        at = start + columns
        x = tl.load(logits_ptr + row * stride + at, mask=at < V, other=float("-inf")).to(tl.float32)
        x = tl.where(x == x, x, float("inf"))  # a NaN makes the row invalid, as infinity does
        where = tl.where(x > best, at, where)
        best = tl.maximum(best, x)
    largest = tl.max(best)
    token = tl.min(tl.where(best == largest, where, 0x7FFFFFFF))
    largest = tl.where(largest == 0.0, 0.0, largest)  # no negative zero: ties go by place
    key = (_ordered(largest.to(tl.int32, bitcast=True)).to(tl.int64) << 32) | (0x7FFFFFFF - token).to(tl.int64)
    is_last = True
    if IS_SPLIT:
        tl.store(partial_ptr + row * splits + split, key)
        tl.debug_barrier()
        is_last = tl.atomic_add(counter_ptr + row, 1, sem="acq_rel") == splits - 1
    if is_last:
        if IS_SPLIT:
            others = tl.arange(0, PADDED_SPLITS)
            keys = tl.load(
                partial_ptr + row * splits + others, mask=others < splits, other=-(2**63), cache_modifier=".cg"
            )
            key = tl.max(keys)
            tl.store(counter_ptr + row, 0)
        value = _ordered((key >> 32).to(tl.int32)).to(tl.float32, bitcast=True)
        first = 0x7FFFFFFF - (key & 0x7FFFFFFF)
        tl.store(token_ptr + row, tl.where(tl.abs(value) < float("inf"), first, -1))
        tl.store(largest_ptr + row, value)


@triton.jit
def _distances(logits, largest, scale, limit):
    """How far logits lie below the largest, in integers; _OUTSIDE beyond limit."""
    distance = (largest - logits.to(tl.float32)) * scale
    inside = distance < _OUTSIDE
    integers = tl.where(inside, distance, 0.0).to(tl.int32)
    return tl.where(inside & (integers <= limit), integers, _OUTSIDE)


@triton.jit
def _weights(distances):
    """exp of the scaled logits, 1 for the largest."""
    return tl.exp2(distances.to(tl.float32) * _LOG2_WEIGHT)


@triton.jit
def _in_bins(distances, by_count, prefix, shift):
    """[16, BLOCK]: each element's count or weight in the bin of its four bits at shift, if the bits above are prefix."""
    bins = tl.where((distances >> (shift + 4)) == prefix, (distances >> shift) & 15, 16)
    values = tl.where(by_count, 1.0, _weights(distances))
    return tl.where(bins[None, :] == tl.arange(0, 16)[:, None], values[None, :], 0.0)


@triton.jit
def _first_to_reach(sums, below, target):
    """The first of 16 bins where below plus the running sum reaches target, else the last that holds anything."""
    index = tl.arange(0, 16)
    reached = below + tl.cumsum(sums, 0) >= target
    first = tl.min(tl.where(reached, index, 16))
    return tl.where(first < 16, first, tl.max(tl.where(sums > 0, index, 0)))


@triton.jit
def _sum_tiles(bins_ptr, row, tiles, PADDED_TILES: tl.constexpr):
    tile = tl.arange(0, PADDED_TILES)[:, None]
    at = (row * tiles + tile) * 16 + tl.arange(0, 16)[None, :]
    return tl.sum(tl.load(bins_ptr + at, mask=tile < tiles, other=0.0).to(tl.float64), axis=0)


@triton.jit
def _lower(sums, below, chosen):
    return below + tl.sum(tl.where(tl.arange(0, 16) < chosen, sums, 0.0))


@triton.jit
def _row_settings(row, V, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr):
    """Scale of distances, largest distance that min_p keeps, k (0: all), share."""
    scale = _UNIT / tl.maximum(tl.load(temperature_ptr + row).to(tl.float32), 1e-4)
    min_p = tl.load(min_p_ptr + row).to(tl.float32)
    farthest = tl.where(min_p > 0.0, -tl.log(tl.maximum(min_p, 1e-30)) * _UNIT, _OUTSIDE - 1.0)
    limit = tl.minimum(tl.maximum(farthest, 0.0), _OUTSIDE - 256.0).to(tl.int32)
    limit = tl.where(min_p > 0.0, limit, _OUTSIDE - 1)
    top_k = tl.load(top_k_ptr + row).to(tl.int32)
    top_k = tl.where((top_k > 0) & (top_k < V), top_k, 0)
    return scale, limit, top_k, tl.load(top_p_ptr + row).to(tl.float32)


@triton.jit(do_not_specialize=["R", "tiles"])
def _bins_kernel(
    logits_ptr,
    stride,
    V,
    largest_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    bins_ptr,
    R,
    tiles,
    LEVEL: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDED_TILES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    largest = tl.load(largest_ptr + row)
    if (tl.load(temperature_ptr + row) <= 0.0) | (tl.abs(largest) == float("inf")):
        return
    scale, limit, top_k, top_p = _row_settings(row, V, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr)
    by_count = top_k > 0
    prefix = 0
    if LEVEL == 1:
        if (top_k == 0) & (top_p >= 1.0):
            return
        sums = _sum_tiles(bins_ptr, row, tiles, PADDED_TILES)
        target = tl.where(by_count, top_k.to(tl.float64), top_p.to(tl.float64) * tl.sum(sums))
        prefix = _first_to_reach(sums, 0.0, target)
    shift: tl.constexpr = _TOP_SHIFT - 4 * LEVEL
    row_ptr = logits_ptr + row * stride
    to_ptr = bins_ptr + ((LEVEL * R + row) * tiles + tile) * 16 + tl.arange(0, 16)
    if (top_k == 0) & (top_p >= 1.0):  # nothing to find: all weights go into the first bin
        total = tl.zeros([BLOCK], tl.float32)
        for block in range(TILE // BLOCK):
            at = tile * TILE + block * BLOCK + tl.arange(0, BLOCK)
            logits = tl.load(row_ptr + at, mask=at < V, other=float("-inf"))
            distances = _distances(logits, largest, scale, limit)
            total += tl.where(distances < _OUTSIDE, _weights(distances), 0.0)
        tl.store(to_ptr, tl.where(tl.arange(0, 16) == 0, tl.sum(total), 0.0))
    else:
        found = tl.zeros([16, BLOCK], tl.float32)
        for block in range(TILE // BLOCK):
            at = tile * TILE + block * BLOCK + tl.arange(0, BLOCK)
            logits = tl.load(row_ptr + at, mask=at < V, other=float("-inf"))
            found += _in_bins(_distances(logits, largest, scale, limit), by_count, prefix, shift)
        tl.store(to_ptr, tl.sum(found, axis=1))


@triton.jit
def _settle(
    row_ptr,
    V,
    largest,
    scale,
    limit,
    list_ptr,
    length,
    is_listed,
    by_count,
    goal,
    share,
    level,
    prefix,
    below,
    BLOCK: tl.constexpr,
):
    """The distance where the count or weight of what is as near or nearer reaches goal, settled from `level` down.

    At level 0 the goal is `share` of all weights. Returns the distance, what is nearer, what is at it, and all weights.
    """
    total = tl.zeros([], tl.float64)
    at_it = tl.zeros([], tl.float64)
    prefix += tl.zeros([], tl.int32)  # a literal would be a constant that the loop may not change
    shift = tl.zeros([], tl.int32) + (_TOP_SHIFT - 4 * level)
    while shift >= 0:
        found = tl.zeros([16, BLOCK], tl.float32)
        for start in range(0, tl.where(is_listed, length, V), BLOCK):
            at = start + tl.arange(0, BLOCK)
            if is_listed:
                distances = tl.load(list_ptr + at, mask=at < length, other=_OUTSIDE)
                distances = tl.where(distances <= limit, distances, _OUTSIDE)
            else:
                logits = tl.load(row_ptr + at, mask=at < V, other=float("-inf"))
                distances = _distances(logits, largest, scale, limit)
            found += _in_bins(distances, by_count, prefix, shift)
        sums = tl.sum(found, axis=1).to(tl.float64)
        if shift == _TOP_SHIFT:
            total = tl.sum(sums)
            goal = share * total
        chosen = _first_to_reach(sums, below, goal)
        below = _lower(sums, below, chosen)
        at_it = tl.sum(tl.where(tl.arange(0, 16) == chosen, sums, 0.0))
        prefix = prefix * 16 + chosen
        shift -= 4
    return prefix, below, at_it, total, goal


@triton.jit
def _make_list(row_ptr, V, largest, scale, limit, prefix, with_nearer, list_ptr, capacity, BLOCK: tl.constexpr):
    """Copy the distances whose upper eight bits are prefix (or less, with_nearer); returns how many there are."""
    length = 0
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        logits = tl.load(row_ptr + at, mask=at < V, other=float("-inf"))
        distances = _distances(logits, largest, scale, limit)
        upper = distances >> (_TOP_SHIFT - 4)
        is_taken = (upper == prefix) | (with_nearer & (upper < prefix))
        place = length + tl.cumsum(is_taken.to(tl.int32), 0) - 1
        tl.store(list_ptr + place, distances, mask=is_taken & (place < capacity))
        length += tl.sum(is_taken.to(tl.int32))
    tl.debug_barrier()  # what the program wrote is visible to all of its threads
    return length


@triton.jit
def _kept_ties(goal, below, at_it, threshold):
    """How many of the elements at the threshold it takes to reach the goal, and their weight."""
    weight = _weights(threshold).to(tl.float64)
    present = tl.floor(at_it / weight + 0.5)
    needed = tl.minimum(tl.maximum(tl.ceil((goal - below) / weight), 1.0), present)
    return needed.to(tl.int32), below + needed * weight


@triton.jit
def _kept_weights(row_ptr, V, start, largest, scale, limit, threshold, BLOCK: tl.constexpr):
    """Weights of what is nearer than the threshold, and which elements are at it."""
    at = start + tl.arange(0, BLOCK)
    logits = tl.load(row_ptr + at, mask=at < V, other=float("-inf"))
    distances = _distances(logits, largest, scale, limit)
    return tl.where(distances < threshold, _weights(distances), 0.0), distances == threshold


@triton.jit
def _token_at(row_ptr, V, largest, scale, limit, threshold, ties, goal, BLOCK: tl.constexpr):
    """The first token whose running sum of kept weights exceeds goal, else the last kept one."""
    tie_weight = _weights(threshold)
    start = 0
    before = tl.zeros([], tl.float64)
    ties_before = 0
    found_start = 0
    found_before = tl.zeros([], tl.float64)
    found_ties = 0
    while (start < V) & (before <= goal):
        weights, is_tie = _kept_weights(row_ptr, V, start, largest, scale, limit, threshold, BLOCK)
        here = tl.sum(is_tie.to(tl.int32))
        kept = tl.minimum(tl.maximum(ties - ties_before, 0), here)
        mass = tl.sum(weights) + kept.to(tl.float32) * tie_weight
        if mass > 0.0:
            found_start, found_before, found_ties = start, before, ties_before
        before += mass
        ties_before += here
        start += BLOCK
    weights, is_tie = _kept_weights(row_ptr, V, found_start, largest, scale, limit, threshold, BLOCK)
    is_tie_kept = is_tie & (found_ties + tl.cumsum(is_tie.to(tl.int32), 0) <= ties)
    weights = tl.where(is_tie_kept, tie_weight, weights)
    is_kept = weights > 0.0
    index = found_start + tl.arange(0, BLOCK)
    is_past = is_kept & (found_before + tl.cumsum(weights, 0) > goal)
    first = tl.min(tl.where(is_past, index, 0x7FFFFFFF))
    return tl.where(first < 0x7FFFFFFF, first, tl.max(tl.where(is_kept, index, 0)))


@triton.jit(do_not_specialize=["R", "tiles", "capacity"])
def _draw_kernel(
    logits_ptr,
    stride,
    V,
    largest_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    bins_ptr,
    R,
    tiles,
    uniforms_ptr,
    list_ptr,
    capacity,
    token_ptr,
    SCAN_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDED_TILES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    largest = tl.load(largest_ptr + row)
    if (tl.load(temperature_ptr + row) <= 0.0) | (tl.abs(largest) == float("inf")):
        return
    scale, limit, top_k, top_p = _row_settings(row, V, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr)
    row_ptr = logits_ptr + row * stride
    by_count = top_k > 0
    share = top_p.to(tl.float64)
    sums = _sum_tiles(bins_ptr, row, tiles, PADDED_TILES)
    kept = tl.sum(sums)
    threshold = limit
    ties = tl.zeros([], tl.int32) + V
    if by_count | (top_p < 1.0):
        goal = tl.where(by_count, top_k.to(tl.float64), share * kept)
        chosen = _first_to_reach(sums, 0.0, goal)
        below = _lower(sums, 0.0, chosen)
        sums = _sum_tiles(bins_ptr + R * tiles * 16, row, tiles, PADDED_TILES)
        second = _first_to_reach(sums, below, goal)
        below = _lower(sums, below, second)
        prefix = chosen * 16 + second
        row_list_ptr = list_ptr + row * capacity
        length = _make_list(row_ptr, V, largest, scale, limit, prefix, by_count, row_list_ptr, capacity, SCAN_BLOCK)
        is_listed = length <= capacity
        threshold, below, at_it, _, _ = _settle(
            row_ptr,
            V,
            largest,
            scale,
            limit,
            row_list_ptr,
            length,
            is_listed,
            by_count,
            goal,
            share,
            2,
            prefix,
            below,
            BLOCK,
        )
        if by_count:
            limit = threshold
            threshold, below, at_it, kept, goal = _settle(
                row_ptr,
                V,
                largest,
                scale,
                limit,
                row_list_ptr,
                length,
                is_listed,
                top_k < 0,
                goal,
                share,
                0,
                0,
                below * 0,
                BLOCK,
            )
        if top_p < 1.0:
            ties, kept = _kept_ties(goal, below, at_it, threshold)
        else:
            threshold = limit
    goal = tl.load(uniforms_ptr + row).to(tl.float64) * kept
    token = _token_at(row_ptr, V, largest, scale, limit, threshold, ties, goal, SCAN_BLOCK)
    tl.store(token_ptr + row, token.to(tl.int64))


@triton.jit(do_not_specialize=["R"])
def _uniforms_kernel(seed_ptr, position_ptr, out_ptr, R, BLOCK: tl.constexpr):
    # Constants of 64 bits as the signed numbers with the same bits; masks make the shifts logical.
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(seed_ptr + at, mask=at < R, other=0)
    position = tl.load(position_ptr + at, mask=at < R, other=0)
    z = seed * -0x61C8864680B583EB + position * -0x2ECBDABC217D106B - 0x61C8864680B583EB
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    z = z ^ ((z >> 31) & 0x1FFFFFFFF)
    tl.store(out_ptr + at, ((z >> 11) & 0x1FFFFFFFFFFFFF).to(tl.float64) * 1.1102230246251565e-16, mask=at < R)


@triton.jit
def _bitmask_kernel(logits_ptr, mask_ptr, rows_ptr, stride, mask_stride, V, BLOCK: tl.constexpr):
    mask_row = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + mask_row)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    words = tl.load(mask_ptr + mask_row * mask_stride + at // 32, mask=at < V, other=-1)
    is_banned = ((words >> (at % 32)) & 1) == 0
    banned = tl.full([BLOCK], float("-inf"), logits_ptr.dtype.element_ty)
    tl.store(logits_ptr + row * stride + at, banned, mask=is_banned & (at < V))
