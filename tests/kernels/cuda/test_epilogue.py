"""What products add to their sums, as every kernel's variant has it."""

from __future__ import annotations

import pytest
import torch

from lmdeploy.kernels.cuda.epilogue import prepare


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gated_product_is_half_as_wide(dtype: torch.dtype) -> None:
    x = torch.zeros(3, 8, dtype=dtype)
    epilogue, out, residual = prepare(x, 10, None, None, "gelu_tanh", None, None)
    assert (out.shape, out.dtype, residual) == ((3, 5), dtype, None)
    assert epilogue.macros() == {"FP16": int(dtype == torch.float16), "OUT32": 0, "EPI": 2, "ACT": 2, "BIAS": 0}


def test_rows_of_the_residual_come_to_lie_as_far_apart_as_the_results() -> None:
    x, wide = torch.zeros(3, 8, dtype=torch.bfloat16), torch.arange(60.0).view(3, 20)
    epilogue, out, residual = prepare(x, 10, torch.zeros(10), wide[:, 4:14], None, torch.float32, None)
    assert residual is not None
    assert out.stride() == residual.stride() == (10, 1)
    assert torch.equal(residual, wide[:, 4:14])
    assert epilogue.macros() == {"FP16": 0, "OUT32": 1, "EPI": 1, "ACT": 0, "BIAS": 1}


def test_the_result_may_take_the_residuals_place() -> None:
    """Then its type is the residual's, whatever x has."""
    residual = torch.zeros(3, 20)[:, :10]
    epilogue, out, same = prepare(torch.zeros(3, 8, dtype=torch.bfloat16), 10, None, residual, None, None, residual)
    assert out is same is residual
    assert epilogue.out_float


def test_the_result_may_be_part_of_something_wider() -> None:
    x, wide = torch.zeros(3, 8, dtype=torch.bfloat16), torch.zeros(3, 20)
    residual = torch.arange(30.0).view(3, 10)
    _, out, apart = prepare(x, 10, None, residual, None, None, wide[:, :10])
    assert apart is not None
    assert out.stride() == apart.stride() == (20, 1)
    assert torch.equal(apart, residual)
