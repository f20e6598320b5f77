"""The RMS norm in CUDA C++ against its twin; that it compiles needs no GPU, only NVRTC."""

from __future__ import annotations

import pytest
import torch

from lmdeploy.kernels.cuda import nvrtc
from lmdeploy.kernels.reference import basic

CUDA = torch.device("cuda")
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
DTYPES = [torch.float16, torch.bfloat16]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (3, 1536), (64, 4096), (5, 8960), (2, 16384), (300, 2048)])
def test_rms_norm(rows: int, columns: int, dtype: torch.dtype) -> None:
    from lmdeploy.kernels.cuda import rms_norm as cuda

    torch.manual_seed(rows)
    x = torch.randn(rows, columns + 16, device=CUDA).to(dtype)[:, :columns]
    weight = torch.randn(columns, device=CUDA).to(dtype)
    assert cuda.supports(x, weight)
    out = cuda.rms_norm(x, weight, 1e-5, 1.0)
    expected = basic.rms_norm(x.float(), weight.float(), 1e-5, 1.0)
    torch.testing.assert_close(out.float(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert torch.equal(cuda.rms_norm(x[-1:], weight, 1e-5, 1.0), out[-1:])


@pytest.mark.gpu
@needs_gpu
def test_rows_that_cannot_be_read_in_vectors_are_left_to_others() -> None:
    from lmdeploy.kernels.cuda import rms_norm as cuda

    x = torch.zeros(4, 1000, device=CUDA, dtype=torch.float16)
    assert cuda.supports(x, x[0])
    assert not cuda.supports(x[:, 1:993], x[0])
    assert not cuda.supports(x[:, :577], x[0])
    assert not cuda.supports(x, x[0].float())


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a", "sm_100a"])
def test_it_compiles(arch: str) -> None:
    assert nvrtc.cubin("rms_norm.cu", {"FP16": 0, "VECTORS": 2}, arch)
