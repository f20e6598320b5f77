"""Linear layers, gated feed-forward blocks, embeddings and norms on the CPU. They know tensors, no modules.

x, residual and results are bfloat16 or float32, rows may be strided; activations are quantized to 8 bits per token and
32 channels where the weight is, and every sum is float32.
"""

from __future__ import annotations

from struct import Struct

import torch
from torch import Tensor, get_num_threads

from lmdeploy.kernels import invariant
from lmdeploy.kernels.cpu.build import library
from lmdeploy.kernels.cpu.packed import DTYPES, PackedAffine

MAX_DENSE_TOKENS = 16
_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2}
# The arguments as the C++ structures have them: RowsArg "3q" (data, dtype, stride), NormArg "2q2d", FinishArg "6q".
_LINEAR = Struct("3q 3q 2q2d 6q")
_GATED_MLP = Struct("5q 3q 2q2d 6q")
_DENSE = Struct("6q 3q 2q2d 6q")
_NORM = Struct("3q 3q 2q2d 2q")
_ACTIVATION = Struct("4q 3q q")
_EMBED = Struct("6q")


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
    x, rows, tokens = _rows(x, w.k)
    out, finish = _finish(x, tokens, w.n, bias, residual, out_dtype)
    norm = _vector(norm_weight, w.k)
    library().lm_linear(
        _LINEAR.pack(get_num_threads(), tokens, w.address, *rows, *norm, norm_eps, norm_offset, *finish)
    )
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
    x, rows, tokens = _rows(x, gate_up.k)
    out, finish = _finish(x, tokens, down.n, None, residual, None)
    norm = (*_vector(norm_weight, gate_up.k), norm_eps, norm_offset)
    head = (get_num_threads(), tokens, gate_up.address, down.address, _ACTIVATIONS[activation])
    library().lm_gated_mlp(_GATED_MLP.pack(*head, *rows, *norm, *finish))
    return out


def embed(ids: Tensor, w: PackedAffine, dtype: torch.dtype) -> Tensor:
    """Rows ids [T] int64 of the weight: [T, K] in dtype. An id out of range gives a row of zeros."""
    ids = ids.contiguous()
    if ids.dtype != torch.int64:
        raise ValueError(f"ids must be int64, not {ids.dtype}")
    out = torch.empty((ids.shape[0], w.k), dtype=dtype)
    if len(ids):
        arguments = (w.address, ids.data_ptr(), len(ids), out.data_ptr(), DTYPES[dtype])
        library().lm_embed(_EMBED.pack(get_num_threads(), *arguments))
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """x / rms(x) * (offset + weight) over the last dimension; any leading shape."""
    shape, size = x.shape, x.shape[-1]
    x, rows, tokens = _rows(x if x.dim() == 2 else x.reshape(-1, size), size)
    out = torch.empty(shape, dtype=x.dtype)
    if tokens:
        norm = (*_vector(weight, size), eps, offset)
        arguments = (get_num_threads(), tokens, size, *rows, *norm, out.data_ptr(), DTYPES[x.dtype])
        library().lm_rms_norm(_NORM.pack(*arguments))
    return out


def gated_activation(gate_up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up: [T, 2 I] -> [T, I], gate in the first half."""
    width = gate_up.shape[1] // 2
    gate_up, rows, tokens = _rows(gate_up, 2 * width)
    out = torch.empty((tokens, width), dtype=gate_up.dtype)
    if tokens:
        arguments = (get_num_threads(), tokens, width, _ACTIVATIONS[activation], *rows, out.data_ptr())
        library().lm_gated_activation(_ACTIVATION.pack(*arguments))
    return out


def can_multiply_dense(weight: Tensor, tokens: int) -> bool:
    """Whether `dense_linear` takes this weight [N, K] for so many tokens; beyond, torch's own product is as fast."""
    is_few = tokens <= MAX_DENSE_TOKENS or invariant.applies(tokens)
    return is_few and weight.dtype == torch.bfloat16 and weight.shape[1] % 16 == 0


@invariant.at_most(MAX_DENSE_TOKENS)
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
    x, rows, tokens = _rows(x, k)
    out, finish = _finish(x, tokens, n, bias, residual, out_dtype)
    if tokens:
        norm = (*_vector(norm_weight, k), norm_eps, norm_offset)
        head = (get_num_threads(), weight.data_ptr(), weight.stride(0), n, k, tokens)
        library().lm_dense_linear(_DENSE.pack(*head, *rows, *norm, *finish))
    return out


def _rows(x: Tensor, size: int) -> tuple[Tensor, tuple[int, int, int], int]:
    """x [M, size] with the elements of a row side by side, its RowsArg, and M."""
    tokens, width = x.shape
    stride, step = x.stride()
    if width != size:
        raise ValueError(f"x is {tuple(x.shape)}; expected [tokens, {size}]")
    if step != 1:
        x, stride = x.contiguous(), size
    return x, (x.data_ptr(), DTYPES[x.dtype], stride), tokens


def _finish(
    x: Tensor, tokens: int, n: int, bias: Tensor | None, residual: Tensor | None, out_dtype: torch.dtype | None
) -> tuple[Tensor, tuple[int, ...]]:
    """The result [tokens, n], not yet filled, and FinishArg."""
    dtype = out_dtype or x.dtype
    if residual is None:
        out = torch.empty((tokens, n), dtype=dtype)
        return out, (*_vector(bias, n), 0, 0, out.data_ptr(), DTYPES[dtype])
    stride, step = residual.stride()
    if residual.dtype != x.dtype or residual.shape != (tokens, n) or step != 1:
        raise ValueError(f"residual is {residual.dtype} {tuple(residual.shape)}; expected {x.dtype} {(tokens, n)}")
    out = torch.empty_like(residual, dtype=dtype) if stride == n else torch.empty((tokens, n), dtype=dtype)
    return out, (*_vector(bias, n), residual.data_ptr(), stride, out.data_ptr(), DTYPES[dtype])


def _vector(v: Tensor | None, size: int) -> tuple[int, int]:
    """Address and type of a norm weight or bias; zeros for none."""
    if v is None:
        return 0, 0
    if v.numel() != size or not v.is_contiguous():
        raise ValueError(f"a vector of {v.numel()} elements where {size} adjacent ones are expected")
    return v.data_ptr(), DTYPES[v.dtype]
