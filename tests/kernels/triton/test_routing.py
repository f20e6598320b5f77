"""Which way the experts of a quantized mixture go: as they are packed, or dense where no kernel takes them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lmdeploy import kernels
from lmdeploy.kernels.triton import affine, moe
from lmdeploy.layers.linear import Linear
from lmdeploy.quantization.affine import AffineMethod
from tests.kernels.triton.steps import normal

EXPERTS, CHANNELS, SIZE = 3, 32, 48


def experts_of(rows: tuple[int, ...], columns: int, bits: int, device: torch.device) -> Linear:
    linear = Linear(columns, rows, bias=True, num_experts=EXPERTS)
    q = torch.randint(0, 2**bits, (sum(rows), columns), generator=torch.Generator().manual_seed(bits))
    scales = 0.1 * 2.0**-bits * normal(sum(rows), columns // 16, seed=1, device=device).abs()
    linear.bias = nn.Parameter(normal(sum(rows), seed=2, device=device, dtype=torch.float16), requires_grad=False)
    linear.method = method = AffineMethod()
    method.dtype, method.kernels = torch.float16, affine
    method.packed = affine.pack(q.to(torch.uint8).to(device), scales, -scales * 2 ** (bits - 1), bits)
    return linear


def run(gate_up: Linear, down: Linear, device: torch.device) -> Tensor:
    x = normal(5, CHANNELS, seed=3, device=device, dtype=torch.float16)
    weights = torch.softmax(normal(5, 2, seed=4, device=device), dim=-1)
    chosen = torch.tensor([[0, 2], [1, 0], [2, 1], [2, 0], [0, 1]], device=device)
    return gate_up.method.routed_mlp(x, weights, chosen, gate_up, down, "silu", None)


@pytest.mark.parametrize(("first_bits", "second_bits"), [(4, 4), (4, 8), (8, 8)])
def test_packed_experts_are_routed_to_as_they_are(
    first_bits: int, second_bits: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate_up = experts_of((SIZE, SIZE) * EXPERTS, CHANNELS, first_bits, device)
    down = experts_of((CHANNELS,) * EXPERTS, SIZE, second_bits, device)
    monkeypatch.setattr(kernels, "runs_on_gpu", lambda x: False)
    want = run(gate_up, down, device)
    monkeypatch.setattr(kernels, "runs_on_gpu", lambda x: True)
    monkeypatch.setattr(AffineMethod, "dense_weight", None)  # nothing is made dense on this way
    torch.testing.assert_close(run(gate_up, down, device), want, rtol=4e-3, atol=4e-3)


def test_a_kernel_that_cannot_be_built_is_given_up_but_not_for_want_of_memory(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gate_up = experts_of((SIZE, SIZE) * EXPERTS, CHANNELS, 4, device)
    down = experts_of((CHANNELS,) * EXPERTS, SIZE, 4, device)
    monkeypatch.setattr(kernels, "_given_up", set())
    monkeypatch.setattr(kernels, "runs_on_gpu", lambda x: False)
    want = run(gate_up, down, device)
    monkeypatch.setattr(kernels, "runs_on_gpu", lambda x: True)
    for error in (torch.OutOfMemoryError("no memory"), ValueError("no such instruction")):

        def fail(*args: object, error: Exception = error) -> Tensor:
            raise error

        for name in ("routed_mlp", "routed_mlp_affine"):
            monkeypatch.setattr(moe, name, fail)
        if isinstance(error, torch.OutOfMemoryError):
            with pytest.raises(torch.OutOfMemoryError, match="no memory"):
                run(gate_up, down, device)
            assert not kernels._given_up
    torch.testing.assert_close(run(gate_up, down, device), want)
    assert kernels._given_up == {"routed_mlp", "routed_mlp_affine"}
