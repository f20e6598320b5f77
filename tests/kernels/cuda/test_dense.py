"""Products with plain 16-bit weights: their kernels compile everywhere, their rules fit, and on a GPU they are right."""

from __future__ import annotations

import pytest
import torch

from lmdeploy.kernels.cuda import nvrtc, skinny_gemm, stream_gemm, tensor_gemm
from lmdeploy.kernels.cuda.epilogue import Epilogue
from lmdeploy.kernels.cuda.stream_gemm import rule_tiling as stream_rule
from lmdeploy.kernels.cuda.tensor_gemm import rule_tiling as tensor_rule

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
SHAPES = [
    (6144, 4096),
    (4096, 4096),
    (28672, 4096),
    (4096, 14336),
    (1536, 8960),
    (92544, 4096),
    (64, 264),
    (57344, 8192),
]
SHARED_BYTES = 227 << 10


def stream_variant(
    n: int, k: int, tokens: int, epilogue: int, shared: int = SHARED_BYTES, *, is_half: bool = False
) -> stream_gemm.Variant:
    outs = n // 2 if epilogue == 2 else n
    tiling = stream_rule(outs, k, tokens, epilogue == 2, 132, shared)
    end = Epilogue(is_half, epilogue == 0, epilogue, 1, not is_half)
    return stream_gemm.Variant(k, tokens, end, epilogue != 1, 1.0, tiling)


def tensor_variant(n: int, k: int, token_rows: int, epilogue: int, *, is_half: bool = False) -> tensor_gemm.Variant:
    tiling = tensor_rule(n, k, token_rows, epilogue == 2, 132)
    return tensor_gemm.Variant(token_rows, Epilogue(is_half, epilogue == 0, epilogue, 2, not is_half), tiling)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120a"])
def test_the_kernel_for_one_token_compiles(arch: str) -> None:
    is_bulk = arch not in ("sm_80", "sm_89")
    for n, k, tokens, epilogue, is_half in (
        (4096, 4096, 1, 0, False),
        (5120, 1536, 4, 2, True),
        (1536, 8960, 2, 1, False),
    ):
        macros = stream_variant(n, k, tokens, epilogue, 99 << 10, is_half=is_half).macros(is_bulk)
        assert nvrtc.cubin("stream_gemm.cu", macros, arch)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(("epilogue", "is_half"), [(0, False), (1, True), (2, False)])
@pytest.mark.parametrize("token_rows", [16, 64, 128])
def test_the_kernel_of_hopper_compiles(token_rows: int, epilogue: int, is_half: bool) -> None:
    for n, k in ((28672, 4096), (4096, 14336)):
        assert nvrtc.cubin(
            "tensor_gemm.cu", tensor_variant(n, k, token_rows, epilogue, is_half=is_half).macros(), "sm_90a"
        )


@pytest.mark.parametrize("shared_bytes", [99 << 10, 163 << 10, SHARED_BYTES])
@pytest.mark.parametrize("tokens", [1, 2, 4])
@pytest.mark.parametrize("is_gated", [False, True])
def test_the_rule_for_one_token_covers_every_column_and_fits(
    shared_bytes: int, tokens: int, is_gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_gemm, "block_shared_bytes", lambda: shared_bytes)
    for n, k in SHAPES:
        if 8 * k > shared_bytes:
            continue
        variant = stream_variant(n, k, tokens, 2 if is_gated else 1, shared_bytes)
        t = variant.tiling
        assert t.warps_k * t.vectors * 256 >= k
        assert t.vectors * tokens <= 16
        assert (t.warps_k * t.warps_n + 1) * 32 <= 640
        assert t.rows % (2 * t.warps_n if is_gated else t.warps_n) == 0 or t.rows == t.warps_n == 2
        assert (t.rows // t.warps_n * tokens) in (1, 2, 4, 8, 16, 32)
        static = t.stages * (16 + t.rows * tokens * t.warps_k * 4) + 1024
        outs = n // 2 if is_gated else n
        assert variant.shared_bytes(-(-outs // 132)) + static <= shared_bytes


@pytest.mark.parametrize("token_rows", [16, 32, 64, 128])
@pytest.mark.parametrize("is_gated", [False, True])
def test_the_rule_of_hopper_spreads_the_rows_and_fits(token_rows: int, is_gated: bool) -> None:
    for n, k in SHAPES:
        variant = tensor_variant(n, k, token_rows, 2 if is_gated else 1)
        t = variant.tiling
        assert t.rows <= 256
        assert t.rows % ((16 if is_gated else 8) * t.groups) == 0
        assert t.stages >= 2
        assert variant.shared_bytes + 2048 <= SHARED_BYTES
        blocks = -(-n // t.rows) * t.cluster
        waves = -(-blocks // 132)
        assert n * t.cluster > 0.8 * (waves - 1) * 132 * t.rows
        bytes_of_sums = tensor_gemm.bytes_beside_ring(token_rows, t.rows, t.cluster, t.groups, is_gated)
        assert bytes_of_sums <= 48 << 10


def test_many_tokens_and_wide_heads_are_left_to_cublas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_gemm, "num_sms", lambda: 132)
    faster = tensor_gemm.is_faster
    assert faster(16, 151936, 1536, False)
    assert not faster(17, 151936, 1536, False)
    assert faster(64, 6144, 4096, False)
    assert not faster(65, 6144, 4096, False)
    assert faster(128, 28672, 4096, True)
    assert faster(128, 4096, 14336, False)


def test_rows_that_no_copy_can_read_are_left_to_cublas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skinny_gemm, "runs_on", lambda device, dtype: True)
    monkeypatch.setattr(stream_gemm, "block_shared_bytes", lambda: SHARED_BYTES)
    monkeypatch.setattr(tensor_gemm, "has_instructions", lambda: True)
    rows = torch.zeros(65 * 64, dtype=torch.bfloat16)
    x, weight = torch.zeros(2, 64, dtype=torch.bfloat16), rows[: 64 * 64].view(64, 64)
    for kernel in (stream_gemm, tensor_gemm):
        assert kernel.supports(x, weight)
        assert not kernel.supports(x, rows[1 : 1 + 64 * 64].view(64, 64))
        assert not kernel.supports(rows[1:129].view(2, 64), weight)
        assert not kernel.supports(x[:0], weight)
        assert not kernel.supports(x, weight.half())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("number", range(80))
def test_against_float64(number: int) -> None:
    from benchmarks.dense_gemm import check

    assert check(number) < 1e-2


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("m", [1, 2, 4, 8, 16, 48, 64, 128, 200])
@pytest.mark.parametrize(("n", "k"), [(2048, 1536), (4096, 4096), (1536, 8960)])
def test_the_linear_layer_takes_any_number_of_tokens(m: int, n: int, k: int) -> None:
    from lmdeploy.kernels.cuda import dense
    from lmdeploy.kernels.reference.basic import rms_norm

    torch.manual_seed(m + n)
    weight = (torch.randn(n, k, device="cuda") * k**-0.5).bfloat16()
    x, bias, gamma = (torch.randn(*shape, device="cuda").bfloat16() for shape in ((m, k), (n,), (k,)))
    residual = torch.randn(m, n, device="cuda").bfloat16()
    expected = rms_norm(x.float(), gamma.float(), 1e-6) @ weight.float().T + bias.float() + residual.float()
    out = dense.linear(x, weight, bias=bias, norm_weight=gamma, norm_eps=1e-6, residual=residual)
    assert (out.float() - expected).norm() / expected.norm() < 1e-2
    if m > 2:  # whatever else is in the batch
        rows = slice(m // 2, m // 2 + 1)
        alone = dense.linear(x.roll(1, 0), weight, bias=bias, norm_weight=gamma, norm_eps=1e-6)
        together = dense.linear(x, weight, bias=bias, norm_weight=gamma, norm_eps=1e-6)
        assert torch.equal(alone.roll(-1, 0)[rows], together[rows])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("m", [1, 3, 16, 64, 100, 200])
def test_the_gated_mlp_takes_any_number_of_tokens(m: int) -> None:
    from lmdeploy.kernels.cuda import dense
    from lmdeploy.kernels.reference.basic import gated_activation

    torch.manual_seed(m)
    gate_up = (torch.randn(2 * 2816, 1536, device="cuda") * 1536**-0.5).bfloat16()
    down = (torch.randn(1536, 2816, device="cuda") * 2816**-0.5).bfloat16()
    x, residual = torch.randn(2, m, 1536, device="cuda").bfloat16()
    hidden = gated_activation(x.float() @ gate_up.float().T, "silu")
    expected = hidden @ down.float().T + residual.float()
    out = dense.gated_mlp(x, gate_up, down, "silu", residual=residual)
    assert (out.float() - expected).norm() / expected.norm() < 1e-2


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="there is no Hopper"
)
@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (4096, 14336), (1536, 8960)])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_bits_do_not_depend_on_the_tile_of_tokens(n: int, k: int, activation: str | None) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(n, k, device="cuda") * k**-0.5).bfloat16()
    x = torch.randn(128, k, device="cuda").bfloat16()
    whole = tensor_gemm.tensor_gemm(x, weight, activation=activation)
    for m in (1, 7, 16, 30, 64):
        assert torch.equal(tensor_gemm.tensor_gemm(x[:m], weight, activation=activation), whole[:m])
