"""AWQ, GPTQ and compressed-tensors weights, as their files hold them, become affine tensors without loss. It opens no file.

Layouts of a linear of K inputs, N outputs and G groups of input channels, numbers packed into int32 words:
AWQ (gemm): qweight [K, N / 8] and qzeros [G, N / 8] packed along N in AWQ's order; scales [G, N].
GPTQ: qweight [K * bits / 32, N] packed along K, qzeros [G, N * bits / 32] along N; scales [G, N]; g_idx [K].
compressed-tensors: weight_packed [N, K * bits / 32] along K, weight_zero_point [N * bits / 32, G] along N, weight_scale [N, G].
Sources: https://github.com/casper-hansen/AutoAWQ, https://github.com/AutoGPTQ/AutoGPTQ,
https://github.com/vllm-project/compressed-tensors
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lmdeploy.errors import CheckpointError
from lmdeploy.quantization.packing import AffineTensor
from lmdeploy.quantization.words import AWQ_ORDER, unpack_rows, unpack_words

_USUAL_GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024)


def read_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int | None = None) -> AffineTensor:
    """The weight [N, K] of AWQ's gemm layout. group_size: what the config says, for groups that do not divide K."""
    q, zeros = (unpack_rows(words.T, 4, AWQ_ORDER) for words in (qweight, qzeros))
    return assemble(q, scales.T, zeros, 4, group_size=group_size)


def read_gptq(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    groups: Tensor | None = None,
    *,
    has_v2_zeros: bool = False,
    group_size: int | None = None,
) -> AffineTensor:
    """The weight [N, K] of GPTQ's layout in 2, 4 or 8 bits. groups: g_idx.

    The first version of the format stores zeros minus one. Whole words are what is added to, as its writers subtract from
    whole words: a zero of 0 borrows from the number beside it.
    """
    bits = gptq_bits(tuple(qzeros.shape), tuple(scales.shape))
    if not has_v2_zeros:
        qzeros = qzeros + sum(1 << place for place in range(0, 32, bits))
    q, zeros = unpack_words(qweight.T, bits), unpack_rows(qzeros.T, bits)
    return assemble(q, scales.T, zeros, bits, group_size=group_size, groups=groups)


def read_compressed(
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    columns: int,
    *,
    groups: Tensor | None = None,
    group_size: int | None = None,
) -> AffineTensor:
    """The weight [N, columns] of compressed-tensors' pack-quantized format in 4 or 8 bits; symmetric without zero_point."""
    rows = packed.shape[0]
    bits = compressed_bits(packed.shape[1], columns)
    scale = scale.reshape(-1, 1).expand(rows, 1) if scale.dim() < 2 else scale
    if zero_point is None:
        zeros = torch.full(scale.shape, 1 << (bits - 1), dtype=torch.uint8)
    elif zero_point.dtype == torch.int8:
        zeros = (zero_point.int() + (1 << (bits - 1))).to(torch.uint8)
    else:
        zeros = unpack_rows(zero_point, bits)[:rows]
    q = unpack_words(packed, bits)[:, :columns].contiguous()
    return assemble(q, scale, zeros, bits, group_size=group_size, groups=groups)


def read_signed(q: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int | None = None) -> AffineTensor:
    """int8 [N, K] with one scale per row and group, w = (q - zero_point) * scale, for activations that stay as they are."""
    scale = scale.reshape(-1, 1).expand(q.shape[0], 1) if scale.dim() < 2 else scale
    zeros = torch.full(scale.shape, 128) if zero_point is None else zero_point.reshape(scale.shape).int() + 128
    return assemble(q.view(torch.uint8) ^ 0x80, scale, zeros, 8, group_size=group_size)


def gptq_bits(qzeros: tuple[int, ...], scales: tuple[int, ...]) -> int:
    """Bits of a GPTQ weight, from the shapes [G, N * bits / 32] and [G, N]."""
    return 32 * qzeros[1] // scales[1]


def compressed_bits(words: int, columns: int) -> int:
    """Bits of numbers of which `columns` take so many words, the last one perhaps not full."""
    return min((4, 8), key=lambda bits: abs(-(-columns * bits // 32) - words))


def find_group_size(columns: int, count: int, claimed: int | None = None) -> int:
    """Input channels of each of `count` groups, the last one perhaps short. Raises CheckpointError if no size fits.

    claimed: by the config, which holds for most linears but not always for all.
    """
    if count == 1:
        return columns
    for size in (claimed or 0, *_USUAL_GROUP_SIZES):
        if size > 0 and -(-columns // size) == count:
            return size
    raise CheckpointError(f"{count} groups of scales do not cover {columns} input channels (group size {claimed})")


def assemble(
    q: Tensor, scales: Tensor, zeros: Tensor, bits: int, *, group_size: int | None, groups: Tensor | None = None
) -> AffineTensor:
    """q uint8 [N, K] with scales and zeros [N, G] as an affine tensor.

    groups: of each input channel, [K]. Channels that are not in the order of their groups are sorted, and the tensor says so;
    a last group that is short is cut, with all others, into groups that divide K.
    """
    columns = q.shape[1]
    size = find_group_size(columns, scales.shape[1], group_size)
    in_order = torch.arange(columns) // size
    order = None
    if groups is not None and not torch.equal(groups.long(), in_order):
        groups = groups.long()
        if groups.min() < 0 or groups.max() >= scales.shape[1]:
            raise CheckpointError(f"g_idx names groups {groups.min()} to {groups.max()} of {scales.shape[1]}")
        order = groups.argsort(stable=True)
        if torch.equal(groups[order], in_order):
            q = q[:, order]
        else:  # groups of any sizes: each channel has a scale of its own
            scales, zeros, size, order = scales[:, groups], zeros[:, groups], 1, None
    fine = math.gcd(columns, size)
    if fine != size:
        repeats = size // fine
        scales, zeros = (t.repeat_interleave(repeats, dim=1)[:, : columns // fine] for t in (scales, zeros))
    return AffineTensor.from_zeros(q, scales, zeros, max(bits, 4), order)
