"""The matrix products of few tokens on a GPU, against float64."""

from __future__ import annotations

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


@pytest.mark.parametrize("number", range(60))
def test_skinny_gemm(number: int) -> None:
    from benchmarks.skinny_gemm import check

    assert check(number) < 1e-2
