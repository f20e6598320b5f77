"""16-bit products of 65 to 256 tokens: variants compile, tilings fit, results on Hopper are right, cuBLAS keeps the rest."""

from __future__ import annotations

import pytest
import torch

from lmdeploy.kernels import invariant
from lmdeploy.kernels.cuda import affine, batch_gemm, dense, nvrtc, skinny_gemm
from lmdeploy.kernels.cuda.batch_gemm import Tiling, Variant
from lmdeploy.kernels.cuda.epilogue import GATED, NOTHING, RESIDUAL, Epilogue
from lmdeploy.kernels.reference import basic

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not IS_HOPPER, reason="there is no Hopper GPU")
SHAPES = [(28672, 4096, True), (4096, 14336, False), (17920, 1536, True), (1536, 1536, False), (151936, 1536, False)]
NUM_CHECKS = 24


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("tiling", "kind"),
    [
        (Tiling(224, 1, 2, 1, 2, 5), GATED),
        (Tiling(104, 1, 1, 2, 4, 4), NOTHING),
        (Tiling(136, 3, 1, 2, 4, 4), RESIDUAL),
        (Tiling(192, 2, 1, 1, 3, 4), GATED),
    ],
)
def test_variants_compile(tiling: Tiling, kind: int) -> None:
    assert tiling.fits(4096, kind == GATED)
    for is_half in (False, True):
        end = Epilogue(is_half, out_float=kind == NOTHING, kind=kind, activation=int(is_half), has_bias=is_half)
        assert nvrtc.cubin("batch_gemm.cu", Variant(end, tiling).macros(), "sm_90a")


@pytest.mark.parametrize("tokens", batch_gemm.TOKEN_TILES)
@pytest.mark.parametrize(("n", "k", "is_gated"), SHAPES)
def test_tilings_to_search_fit_and_cover_every_row(
    n: int, k: int, is_gated: bool, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_gemm, "num_sms", lambda: 132)
    found = list(batch_gemm.tilings(n, k, tokens, is_gated))
    assert len(found) > 50
    assert len(set(found)) == len(found)
    for t in found:
        assert t.tokens == tokens
        assert t.threads <= 640
        assert t.shared_bytes(is_gated) <= 226 << 10
        assert 2 <= t.stages <= k // 64 // t.splits  # the ring is filled before the first part of K ends
        assert t.box_rows(is_gated) * t.along_tokens * (2 if is_gated else 1) >= t.rows
        blocks = t.blocks(n)
        assert blocks % t.cluster == 0
        tiles = -(-n // (t.rows * t.along_rows))
        assert blocks // t.cluster == tiles if t.splits > 1 else blocks <= 132


def test_the_model_prefers_what_spreads_evenly() -> None:
    even, uneven = Tiling(224, 1, 2, 1, 2, 5), Tiling(256, 1, 2, 1, 2, 4)
    assert batch_gemm.cost(even, 28672, 4096, True, 132) < batch_gemm.cost(uneven, 28672, 4096, True, 132)
    alone, shared = Tiling(112, 1, 1, 1, 4, 4), Tiling(112, 1, 1, 2, 4, 4)
    assert batch_gemm.cost(shared, 28672, 4096, True, 132) < batch_gemm.cost(alone, 28672, 4096, True, 132)


def test_the_tables_tilings_fit() -> None:
    for name, values in skinny_gemm.tiling_table("batch_tilings_sm90_132").items():
        shape, _, rest = name.partition(":")
        n, k = map(int, shape.split("x"))
        tiling, tokens = Tiling(*values), int(rest.rpartition(":")[2])
        assert tiling.fits(k, rest.startswith("gated"))
        assert tiling.tokens >= tokens
        assert n % 8 == 0


def test_shapes_that_were_not_measured_keep_cublas(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [64, 2, 1, 1, 2, 4]
    table = {"128x1024:128": values, "256x1024:gated:256": [64, 2, 2, 1, 2, 4], "512x1024:128": [512, *values[1:]]}
    monkeypatch.setattr(batch_gemm, "num_sms", lambda: 132)
    monkeypatch.setattr(batch_gemm, "tiling_table", lambda name: table)
    batch_gemm.choose_tiling.cache_clear()
    assert batch_gemm.choose_tiling(128, 1024, 128, False) == Tiling(*values)
    assert batch_gemm.choose_tiling(128, 1024, 256, False) is None
    assert batch_gemm.choose_tiling(128, 1024, 128, True) is None
    assert batch_gemm.choose_tiling(256, 1024, 256, True) is not None
    assert batch_gemm.choose_tiling(512, 1024, 128, False) is None  # no wgmma has so many rows
    batch_gemm.choose_tiling.cache_clear()


def test_numbers_of_tokens_choose_their_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skinny_gemm, "runs_on", lambda device, dtype: True)
    monkeypatch.setattr(batch_gemm, "has_instructions", lambda: True)
    asked: list[int] = []
    monkeypatch.setattr(batch_gemm, "choose_tiling", lambda n, k, tokens, is_gated: asked.append(tokens))
    x, weight = torch.zeros(300, 64, dtype=torch.bfloat16), torch.zeros(128, 64, dtype=torch.bfloat16)
    for m in (64, 65, 128, 129, 192, 193, 256, 257):
        batch_gemm.tiling_for(x[:m], weight)
    assert asked == [128, 128, 192, 192, 256, 256]
    assert batch_gemm.tiling_for(x[:128].half(), weight) is None


def test_kept_copies_are_multiplied_like_weights_of_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, str | None]] = []

    def product(
        x: torch.Tensor, weight: torch.Tensor, *, activation: str | None = None, **rest: object
    ) -> torch.Tensor:
        calls.append((len(weight), activation))
        y = x @ weight.T
        return y if activation is None else basic.gated_activation(y, activation)

    monkeypatch.setattr(dense, "product", product)
    monkeypatch.setattr(affine, "_is_wide", lambda x, w: False)
    torch.manual_seed(0)
    gate_up, down = (affine.PackedAffine(skinny_gemm.Weight(torch.empty(0), n, k, 4)) for n, k in ((64, 32), (32, 32)))
    gate_up.copy, down.copy = torch.randn(64, 32), torch.randn(32, 32)
    x = torch.randn(100, 32)
    expected = basic.gated_activation(x @ gate_up.copy.T, "silu") @ down.copy.T
    torch.testing.assert_close(affine.gated_mlp(x, gate_up, down, "silu"), expected)
    assert calls == [(64, "silu"), (32, None)]
    monkeypatch.setattr(invariant, "applies", lambda num_rows: True)
    monkeypatch.setattr(dense, "matmul", lambda x, weight, *rest: x @ weight.T)
    affine.linear(x[:64], down)
    assert len(calls) == 2


@pytest.fixture(scope="module")
def compiled() -> None:
    """Everything that the checks launch, compiled at once."""
    from benchmarks.batch_gemm import Check, compile_variants

    compile_variants(Check.draw(number).variant for number in range(NUM_CHECKS))


@pytest.mark.gpu
@on_hopper
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("number", range(NUM_CHECKS))
def test_against_float64(number: int) -> None:
    from benchmarks.batch_gemm import Check

    assert Check.draw(number).run() < 1e-2


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("m", [65, 128, 200, 256])
def test_layers_take_the_tables_tilings(m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    table = {f"5632x1536:gated:{tokens}": [96, 1, 1, 2, tokens // 64, 3] for tokens in batch_gemm.TOKEN_TILES}
    table |= {f"1536x2816:{tokens}": [64, 2, 1, 2, tokens // 64, 3] for tokens in batch_gemm.TOKEN_TILES}
    monkeypatch.setattr(batch_gemm, "tiling_table", lambda name: table)
    batch_gemm.choose_tiling.cache_clear()
    torch.manual_seed(m)
    gate_up = (torch.randn(5632, 1536, device="cuda") * 1536**-0.5).bfloat16()
    down = (torch.randn(1536, 2816, device="cuda") * 2816**-0.5).bfloat16()
    x, residual = torch.randn(2, m, 1536, device="cuda").bfloat16()
    expected = basic.gated_activation(x.float() @ gate_up.float().T, "silu") @ down.float().T + residual.float()
    assert batch_gemm.tiling_for(x, gate_up, is_gated=True) is not None
    out = dense.gated_mlp(x, gate_up, down, "silu", residual=residual)
    batch_gemm.choose_tiling.cache_clear()
    assert (out.float() - expected).norm() / expected.norm() < 1e-2
