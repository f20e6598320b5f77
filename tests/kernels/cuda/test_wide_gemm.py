"""4-bit products of up to 64 tokens by wgmma: variants compile, the rule's tilings fit, results on Hopper are right."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lmdeploy.kernels.cuda import affine, nvrtc, skinny_gemm, wide_gemm
from lmdeploy.kernels.cuda.epilogue import ACTIVATIONS, GATED, Epilogue
from lmdeploy.kernels.cuda.skinny_gemm import Weight
from lmdeploy.kernels.cuda.wide_gemm import Tiling, Variant
from lmdeploy.kernels.reference.basic import gated_activation

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not IS_HOPPER, reason="there is no Hopper GPU")
SHAPES = [(64, 256), (272, 384), (1536, 1536), (17920, 1536), (6144, 4096), (28672, 4096), (4096, 14336)]
LARGEST = (16384, 53248)
UNIT_BYTES = skinny_gemm.unit_bytes(128)
NUM_CASES = 16


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(("is_half", "has_zeros", "group_size"), [(False, True, 128), (True, False, 32)])
def test_variants_compile(is_half: bool, has_zeros: bool, group_size: int) -> None:
    tilings = [Tiling(1, 2, 1, 4, 4, 32), Tiling(1, 1, 2, 3, 1, 128), Tiling(4, 2, 1, 2, 2, 64)]
    for epilogue, tiling in enumerate(tilings):
        end = Epilogue(is_half, epilogue == 0, epilogue, epilogue, epilogue != 1)
        one = Variant(group_size, has_zeros, end, tiling)
        assert nvrtc.cubin("wide_gemm.cu", one.macros(), "sm_90a")


def check_tiling(tiling: Tiling, n: int, k: int, unit_bytes: int, is_gated: bool) -> None:
    """Every tile of rows has its place, nothing waits for itself, and a block fits into an SM."""
    held = wide_gemm.tiles_per_block(n, tiling, is_gated)
    tiles = -(-n // 16) // (2 if is_gated else 1)
    assert 1 <= tiling.row_blocks <= tiles
    assert held <= tiling.capacity
    assert held * tiling.row_blocks >= tiles * (2 if is_gated else 1)
    assert tiling.cluster * tiling.groups_k <= k // 128
    assert tiling.stages > tiling.groups_k
    assert tiling.threads <= 640
    assert wide_gemm.shared_bytes(tiling, held, unit_bytes) <= 226 << 10


@pytest.mark.parametrize(("n", "k"), [*SHAPES, LARGEST])
@pytest.mark.parametrize("is_gated", [False, True])
def test_the_rules_tilings_fit(n: int, k: int, is_gated: bool) -> None:
    for unit_bytes in (UNIT_BYTES, skinny_gemm.unit_bytes(32)):
        for num_sms in (132, 114, 78):
            tiling = wide_gemm.rule_tiling(n, k, unit_bytes, is_gated, num_sms)
            check_tiling(tiling, n, k, unit_bytes, is_gated)


def test_the_tables_tilings_fit() -> None:
    table = skinny_gemm.tiling_table("wide_tilings_sm90_132")
    assert len(table) == 8
    for name, values in table.items():
        shape, _, gated = name.partition(":")
        n, k = map(int, shape.split("x"))
        check_tiling(Tiling(*values), n, k, UNIT_BYTES, bool(gated))


def test_weights_and_tokens_elsewhere_are_declined() -> None:
    assert not wide_gemm.supports(torch.zeros(40, 256, dtype=torch.bfloat16), Weight(torch.zeros(1), 64, 256))


@dataclass(frozen=True)
class Case:
    """What one number draws."""

    n: int
    k: int
    m: int
    group_size: int
    has_zeros: bool
    dtype: torch.dtype
    activation: str | None
    has_bias: bool
    has_residual: bool
    tiling: Tiling

    def variants(self) -> list[Variant]:
        """All that its test launches."""
        w = Weight(torch.empty(0), self.n, self.k, 4, self.group_size, self.has_zeros)
        kind = GATED if self.activation else int(self.has_residual)
        rest = (kind, ACTIVATIONS.index(self.activation or "silu"), self.has_bias)
        return [
            wide_gemm.choose_variant(w, Epilogue(self.dtype == torch.float16, is_wide, *rest), self.tiling)
            for is_wide in (False, True)
        ]


def case_of(number: int) -> Case:
    draw = random.Random(number)
    n, k = 16 * draw.choice((2, 3, 12, 40, 130, 384)), 128 * draw.choice((2, 3, 5, 8, 16, 39))
    is_gated = draw.random() < 0.3
    n = n * 2 if is_gated else n - draw.choice((0, 0, 8, 3))
    group_size = draw.choice((128, 128, 64, 32))
    tilings = list(wide_gemm.tilings(n, k, skinny_gemm.unit_bytes(group_size), is_gated, 132))
    return Case(
        n,
        k,
        draw.choice((1, 9, 17, 31, 33, 40, 63, 64)),
        group_size,
        draw.random() < 0.6,
        draw.choice((torch.bfloat16, torch.float16)),
        draw.choice(ACTIVATIONS) if is_gated else None,
        draw.random() < 0.4,
        not is_gated and draw.random() < 0.4,
        draw.choice(tilings),
    )


@pytest.fixture(scope="module")
def compiled() -> None:
    """Everything that the tests launch, compiled at once."""
    variants = [variant for number in range(NUM_CASES) for variant in case_of(number).variants()]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda one: nvrtc.cubin("wide_gemm.cu", one.macros(), "sm_90a"), variants))


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("number", range(NUM_CASES))
@pytest.mark.usefixtures("compiled")
def test_against_float64(number: int) -> None:
    from benchmarks.gpu import guarded
    from benchmarks.skinny_gemm import make_weight

    case = case_of(number)
    m, dtype = case.m, case.dtype
    torch.manual_seed(number)
    w, dense = make_weight(case.n, case.k, group=case.group_size, zeros=case.has_zeros)
    x = torch.randn(m, case.k, device="cuda").to(dtype)
    bias = torch.randn(case.n, device="cuda").to(dtype) if case.has_bias else None
    residual = torch.randn(m, case.n, device="cuda").to(dtype) if case.has_residual else None

    def finish(product: Tensor) -> Tensor:
        product = product if bias is None else product + bias.double()
        product = product if case.activation is None else gated_activation(product, case.activation)
        return product if residual is None else product + residual.double()

    expected = finish(x.double() @ dense.double().T)
    more = {"bias": bias, "residual": residual, "activation": case.activation, "tiling": case.tiling}
    outs = [
        guarded(expected.shape, torch.float32, lambda out: wide_gemm.wide_gemm(x, w, out=out, **more)) for _ in range(2)
    ]
    assert torch.equal(*outs)
    alone = dict(more, residual=None if residual is None else residual[:1])
    assert torch.equal(wide_gemm.wide_gemm(x[:1], w, out_dtype=torch.float32, **alone), outs[0][:1])
    copy = finish(x.double() @ skinny_gemm.dequantize(w, dtype).double().T)
    assert relative(outs[0], expected) <= 2 * relative(copy, expected) + 1e-5  # and some for sums in float32
    assert torch.equal(wide_gemm.wide_gemm(x, w, **more), outs[0].to(dtype))


@pytest.mark.gpu
@on_hopper
def test_layers_of_many_tokens_use_it() -> None:
    torch.manual_seed(0)
    q = torch.randint(0, 16, (512, 256), dtype=torch.uint8, device="cuda")
    scales = torch.rand(512, 2, device="cuda").half().float() * 0.01
    packed = affine.pack(q, scales, -8 * scales, 4)
    x = torch.randn(64, 256, device="cuda").bfloat16()
    out = affine.linear(x, packed)
    assert torch.equal(out, wide_gemm.wide_gemm(x, packed.weight))
