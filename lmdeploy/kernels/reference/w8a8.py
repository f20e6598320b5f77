"""Linear layers over int8 weights and int8 activations in plain PyTorch, on any device.

y = (round(x / s_x) W_int8^T) * s_x * s_w with s_x = max |x| / 127 of each token: https://arxiv.org/abs/2211.10438
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmdeploy.kernels import invariant

_LEVELS = 127
_MIN_CUDA_ROWS = 32  # torch's product on a GPU wants more than 16


def linear(
    x: Tensor,
    q: Tensor,
    scales: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x W^T + bias + residual, x quantized per token: x [M, K], residual [M, N] -> [M, N] in out_dtype (x's).

    q: int8 [N, K]; scales: float32 [N, 1].
    """
    integers, token_scales = quantize_tokens(x)
    out = integer_product(integers, q).float() * token_scales * scales.T
    for addend in (bias, residual):
        out = out if addend is None else out + addend
    return out.to(out_dtype or x.dtype)


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] as int8 [M, K] and float32 scales [M, 1], symmetric; a row of zeros has scale 0."""
    wide = x.float()
    scales = wide.abs().amax(dim=1, keepdim=True) / _LEVELS
    return (wide / scales.clamp(min=torch.finfo(torch.float32).tiny)).round_().to(torch.int8), scales


def integer_product(x: Tensor, w: Tensor) -> Tensor:
    """x w^T of int8 matrices [M, K] and [N, K]: [M, N] int32, or float32 where torch has no integer product for the shapes."""
    tokens = len(x)
    if x.device.type == "cpu":
        return torch._int_mm(x, w.T)
    if x.device.type != "cuda" or x.shape[1] % 8 or len(w) % 8:
        return invariant.linear(x.float(), w.float())
    if tokens < _MIN_CUDA_ROWS:
        x = torch.nn.functional.pad(x, (0, 0, 0, _MIN_CUDA_ROWS - tokens))
    return torch._int_mm(x, w.T)[:tokens]
