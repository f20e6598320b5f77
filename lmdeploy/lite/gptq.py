"""Rounds a weight so that later columns make up for the errors of earlier ones. It knows grids and second moments, no layer.

Source: GPTQ, https://arxiv.org/abs/2210.17323, with columns in the order of their importance and static groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmdeploy.errors import CheckpointError
from lmdeploy.lite.grids import Grid

_BLOCK = 64
_DAMPINGS = (0.01, 0.1, 1.0, 10.0, 100.0)


def damped(moment: Tensor, damping: float) -> Tensor:
    """The second moment [K, K] with a share of its mean diagonal added to the diagonal."""
    mean = moment.diagonal().mean().clamp(min=1e-12)
    return moment + torch.eye(len(moment), device=moment.device) * (damping * mean)


def factors(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper Cholesky factors L and U of the moment and its inverse, L L^T = moment, U^T U = moment^-1.

    The moment is damped more until both exist. Raises CheckpointError for one that holds anything but numbers.
    """
    for damping in _DAMPINGS if torch.isfinite(moment).all() else ():
        lower, failed = torch.linalg.cholesky_ex(damped(moment, damping))
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return lower, upper
    raise CheckpointError("its inputs are NaN, infinite or too large: the weights before it are damaged")


def gptq_round(weight: Tensor, moment: Tensor, grid: Grid) -> Tensor:
    """Codes [N, K], float32, of a weight [N, K] whose inputs have the second moment [K, K]."""
    spec = grid.spec
    order = moment.diagonal().argsort(descending=True, stable=True)
    _, upper = factors(moment[order][:, order])
    groups = order // spec.group_size
    rest = weight[:, order].t().contiguous()  # [K, N]: columns of the weight are rows here
    scales = grid.scale.t()[groups].contiguous()
    zeros = grid.zero.t()[groups].contiguous()
    codes = torch.empty_like(rest)
    for start in range(0, len(rest), _BLOCK):
        end = min(start + _BLOCK, len(rest))
        errors = torch.empty_like(rest[start:end])
        for column in range(start, end):
            row, scale, zero = rest[column], scales[column], zeros[column]
            code = (row / scale).round_().add_(zero).clamp_(0, spec.top)
            codes[column] = code
            error = (row - (code - zero) * scale).div_(upper[column, column])
            rest[column + 1 : end].addr_(upper[column, column + 1 : end], error, alpha=-1)
            errors[column - start] = error
        rest[end:].addmm_(upper[start:end, end:].t(), errors, alpha=-1)
    result = torch.empty_like(codes)
    result[order] = codes
    return result.t().contiguous()
