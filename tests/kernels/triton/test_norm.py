"""Norms and gated activations against the definitions in float32."""

from __future__ import annotations

import pytest
import torch

from lmdeploy.kernels.reference import basic
from lmdeploy.kernels.triton.activation import gated_activation
from lmdeploy.kernels.triton.norm import rms_norm
from tests.kernels.triton.numbers import DTYPES, TOLERANCE, check_close, normal

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 7), (3, 576), (2, 4096), (2, 16384)])
def test_rms_norm(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
    x = normal(rows, columns + 3, seed=0, device=device, dtype=dtype)[:, :columns]
    weight = normal(columns, seed=1, device=device, dtype=dtype)
    out = rms_norm(x, weight, 1e-5, 1.0)
    assert (out.dtype, out.shape) == (dtype, x.shape)
    check_close(out, basic.rms_norm(x.float(), weight.float(), 1e-5, 1.0), TOLERANCE[dtype])


def test_heads_and_no_rows(device: torch.device) -> None:
    weight = normal(64, seed=1, device=device)
    heads = normal(5, 3, 64, seed=0, device=device)
    check_close(rms_norm(heads, weight, 1e-5), basic.rms_norm(heads, weight, 1e-5), 1e-6)
    assert rms_norm(heads[:0, 0], weight, 1e-5).shape == (0, 64)
    assert gated_activation(heads[:0, 0], "silu").shape == (0, 32)


def test_rows_that_are_too_long(device: torch.device) -> None:
    with pytest.raises(ValueError, match="20000 columns"):
        rms_norm(torch.zeros(1, 20000, device=device), torch.zeros(20000, device=device), 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 1500), (2, 4096)])
def test_gated_activation(rows: int, size: int, activation: str, dtype: torch.dtype, device: torch.device) -> None:
    gate_up = 4 * normal(rows, 2 * size + 5, seed=0, device=device, dtype=dtype)[:, : 2 * size]
    out = gated_activation(gate_up, activation)
    assert (out.dtype, out.shape) == (dtype, (rows, size))
    check_close(out, basic.gated_activation(gate_up.float(), activation), TOLERANCE[dtype])
