"""What the tests of the small kernels share: data types that run, how far results may be off, random numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.kernels.triton.conftest import IS_INTERPRETED

# The interpreter's arithmetic in bfloat16 is wrong.
DTYPES = (torch.float32, torch.float16) if IS_INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def normal(*shape: int, seed: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def check_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Within tolerance of the largest expected number; NaN is never close."""
    error = (actual.float() - expected.float()).abs().max().item()
    bound = tolerance * max(1e-3, expected.float().abs().max().item())
    assert error <= bound, f"off by {error}, at most {bound}"
