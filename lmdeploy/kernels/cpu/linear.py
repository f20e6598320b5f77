"""Linear layers, gated feed-forward blocks, embeddings and norms on the CPU. They know tensors, no modules.

x, residual and results are bfloat16 or float32, rows may be strided; activations are quantized to 8 bits per token and
32 channels where the weight is, and every sum is float32.
"""

from __future__ import annotations

import torch
from torch import Tensor, get_num_threads

from lmdeploy.kernels.cpu.build import library
from lmdeploy.kernels.cpu.packed import DTYPES, PackedAffine

_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2}
MAX_DENSE_TOKENS = 16


def linear(
    x: Tensor,
    w: PackedAffine,
    *,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 0.0,
    norm_offset: float = 0.0,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """rms_norm(x) W^T + bias + residual: x [M, K], residual [M, N] -> [M, N] in out_dtype (x's).

    The norm runs where norm_weight [K] is given: x / rms(x) * (norm_offset + norm_weight).
    """
    x, stride = _rows(x, w.k)
    tokens = x.shape[0]
    out = torch.empty((tokens, w.n), dtype=out_dtype or x.dtype)
    residual_at, residual_stride = _residual(residual, x, w.n)
    library().lm_linear(
        get_num_threads(), w.address, tokens, x.data_ptr(), DTYPES[x.dtype], stride,
        *_vector(norm_weight, w.k), norm_eps, norm_offset, *_vector(bias, w.n), residual_at, residual_stride,
        out.data_ptr(), DTYPES[out.dtype],
    )  # fmt: skip
    return out


def gated_mlp(
    x: Tensor,
    gate_up: PackedAffine,
    down: PackedAffine,
    activation: str,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float = 0.0,
    norm_offset: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """down(activation(gate) * up) + residual with gate | up = gate_up(rms_norm(x)): [M, C] -> [M, C].

    activation: silu, gelu or gelu_tanh. The first half of gate_up's rows is the gate; down.k must be a multiple of 32
    or of its own group of 16.
    """
    if gate_up.n != 2 * down.k:
        raise ValueError(f"gate_up has {gate_up.n} rows, down {down.k} columns; expected twice as many rows")
    x, stride = _rows(x, gate_up.k)
    tokens = x.shape[0]
    out = torch.empty((tokens, down.n), dtype=x.dtype)
    residual_at, residual_stride = _residual(residual, x, down.n)
    library().lm_gated_mlp(
        get_num_threads(), gate_up.address, down.address, _ACTIVATIONS[activation], tokens,
        x.data_ptr(), DTYPES[x.dtype], stride, *_vector(norm_weight, gate_up.k), norm_eps, norm_offset,
        residual_at, residual_stride, out.data_ptr(),
    )  # fmt: skip
    return out


def embed(ids: Tensor, w: PackedAffine, dtype: torch.dtype) -> Tensor:
    """Rows ids [T] int64 of the weight: [T, K] in dtype. An id out of range gives a row of zeros."""
    ids = ids.contiguous()
    if ids.dtype != torch.int64:
        raise ValueError(f"ids must be int64, not {ids.dtype}")
    out = torch.empty((ids.shape[0], w.k), dtype=dtype)
    library().lm_embed(get_num_threads(), w.address, ids.data_ptr(), len(out), out.data_ptr(), DTYPES[dtype])
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """x / rms(x) * (offset + weight) over the last dimension; any leading shape."""
    size = x.shape[-1]
    rows, stride = _rows(x if x.dim() == 2 else x.reshape(-1, size), size)
    out = torch.empty(x.shape, dtype=x.dtype)
    library().lm_rms_norm(
        get_num_threads(), rows.shape[0], size, rows.data_ptr(), DTYPES[x.dtype], stride, *_vector(weight, size), eps,
        offset, out.data_ptr(), DTYPES[x.dtype],
    )  # fmt: skip
    return out


def gated_activation(gate_up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up: [T, 2 I] -> [T, I], gate in the first half."""
    width = gate_up.shape[-1] // 2
    rows, stride = _rows(gate_up, 2 * width)
    out = torch.empty((rows.shape[0], width), dtype=rows.dtype)
    library().lm_gated_activation(
        get_num_threads(), rows.shape[0], width, rows.data_ptr(), DTYPES[rows.dtype], stride, _ACTIVATIONS[activation],
        out.data_ptr(),
    )  # fmt: skip
    return out


def can_multiply_dense(weight: Tensor, tokens: int) -> bool:
    """Whether `dense_linear` takes this weight [N, K] for so many tokens; beyond, torch's own product is as fast."""
    return tokens <= MAX_DENSE_TOKENS and weight.dtype == torch.bfloat16 and weight.shape[1] % 16 == 0


def dense_linear(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 0.0,
    norm_offset: float = 0.0,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`linear` with a bfloat16 weight [N, K] as the checkpoint has it, for the few tokens of `can_multiply_dense`."""
    n, k = weight.shape
    if not can_multiply_dense(weight, x.shape[0]) or weight.stride(1) != 1:
        raise ValueError(f"no CPU kernel for {x.shape[0]} tokens times {weight.dtype} {n} x {k}")
    x, stride = _rows(x, k)
    out = torch.empty((x.shape[0], n), dtype=out_dtype or x.dtype)
    residual_at, residual_stride = _residual(residual, x, n)
    library().lm_dense_linear(
        get_num_threads(), weight.data_ptr(), weight.stride(0), n, k, x.shape[0], x.data_ptr(), DTYPES[x.dtype], stride,
        *_vector(norm_weight, k), norm_eps, norm_offset, *_vector(bias, n), residual_at, residual_stride,
        out.data_ptr(), DTYPES[out.dtype],
    )  # fmt: skip
    return out


def _rows(x: Tensor, size: int) -> tuple[Tensor, int]:
    """x [M, size] with adjacent elements in a row, and the stride between rows."""
    if x.dim() != 2 or x.shape[1] != size:
        raise ValueError(f"x is {tuple(x.shape)}; expected [tokens, {size}]")
    stride, step = x.stride()
    if step != 1 and size != 1:
        x = x.contiguous()
        stride = size
    return x, stride


def _residual(residual: Tensor | None, x: Tensor, n: int) -> tuple[int | None, int]:
    if residual is None:
        return None, 0
    stride, step = residual.stride()
    if residual.dtype != x.dtype or residual.shape != (x.shape[0], n) or step != 1:
        raise ValueError(f"residual is {residual.dtype} {tuple(residual.shape)}; expected {x.dtype} {(x.shape[0], n)}")
    return residual.data_ptr(), stride


def _vector(v: Tensor | None, size: int) -> tuple[int | None, int]:
    """Address and type of a norm weight or bias."""
    if v is None:
        return None, 0
    if v.numel() != size or v.stride(-1) != 1:
        raise ValueError(f"a vector of {v.numel()} elements where {size} adjacent ones are expected")
    return v.data_ptr(), DTYPES[v.dtype]
