"""4-bit products of one to four tokens that stream weights: variants compile, tilings fit, results on Hopper are right."""

from __future__ import annotations

import pytest
import torch

from lmdeploy.kernels.cuda import affine, nvrtc, packed_stream_gemm, skinny_gemm
from lmdeploy.kernels.cuda.epilogue import Epilogue
from lmdeploy.kernels.cuda.packed_stream_gemm import Product, Tiling, Variant
from lmdeploy.kernels.cuda.skinny_gemm import Weight, unit_bytes
from tests.kernels.cuda.outcomes import Outcomes, error_of, run_checks

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not IS_HOPPER, reason="there is no Hopper GPU")
SHAPES = [
    (16, 128),
    (272, 384),
    (1536, 1536),
    (17920, 1536),
    (6144, 4096),
    (28672, 4096),
    (4096, 14336),
    (1536, 8960),
    (92544, 4096),
]
NUM_CHECKS = 32


def product(n: int, k: int, tokens: int = 1, group: int = 128, **more: bool) -> Product:
    return Product(n, k, tokens, unit_bytes(group), **more)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("tokens", [1, 2, 4])
@pytest.mark.parametrize(("is_half", "has_zeros", "group"), [(False, True, 128), (True, False, 32)])
def test_variants_compile(tokens: int, is_half: bool, has_zeros: bool, group: int) -> None:
    tilings = [
        Tiling(8, 1, 1, 3, 132, parts=2),
        Tiling(3, 2, 2, 2, 66),
        Tiling(11, 1, 3, 1, 264, 2),
    ]
    for epilogue, tiling in enumerate(tilings):
        end = Epilogue(is_half, epilogue == 0, epilogue, epilogue, epilogue != 1)
        what = product(
            8192, 1536 if epilogue == 1 else 4096, tokens, group, is_gated=epilogue == 2, has_norm=epilogue != 1
        )
        variant = Variant(what, group, has_zeros, end, 1.0, tiling)
        assert nvrtc.cubin("packed_stream_gemm.cu", variant.macros(), "sm_90a")
    short = product(2048, 1536, tokens, group, has_norm=True)
    early = Variant(short, group, has_zeros, Epilogue(is_half, False), 0.0, Tiling(12, 1, 1, 1, 128, is_early=True))
    assert nvrtc.cubin("packed_stream_gemm.cu", early.macros(), "sm_90a")


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("tokens", [1, 2, 4])
@pytest.mark.parametrize("group", [32, 128])
def test_the_rules_tilings_fit(n: int, k: int, tokens: int, group: int) -> None:
    for is_gated in (False, True) if n % 32 == 0 else (False,):
        for num_sms in (132, 114, 78):
            what = product(n, k, tokens, group, is_gated=is_gated, has_norm=k <= 4096)
            tiling = packed_stream_gemm.rule_tiling(what, num_sms)
            assert tiling is not None
            assert what.fits(tiling)
            assert tiling.row_blocks <= what.tiles
            assert tiling.warps_k <= what.units <= tiling.warps_k * 8


def test_what_fits_no_block_is_left_to_others() -> None:
    assert packed_stream_gemm.rule_tiling(product(8192, 28672), 132) is None
    assert not product(64, 256).fits(Tiling(4, 1, 1, 1, 4))  # more warps along K than units
    assert not product(64, 4096).fits(Tiling(2, 1, 1, 1, 4))  # 16 units of a warp
    assert not product(64, 4096).fits(Tiling(8, 3, 1, 1, 4))
    assert not product(64, 4096).fits(Tiling(8, 1, 1, 1, 4, parts=3))  # 4 units
    assert product(64, 4096).fits(Tiling(8, 1, 1, 1, 4, parts=4))
    assert not product(64, 640).fits(Tiling(3, 1, 1, 1, 4, parts=2))  # some warp's second part would be empty
    assert product(2048, 1536).fits(Tiling(12, 1, 1, 1, 128, is_early=True))
    assert not product(2048, 1536).fits(Tiling(12, 1, 1, 1, 127, is_early=True))  # some block has two tiles
    assert not product(2048, 1536).fits(Tiling(4, 1, 1, 1, 128, is_early=True))  # registers for three units
    assert not product(2048, 1536, is_gated=True).fits(Tiling(12, 1, 1, 1, 128, is_early=True))
    assert product(4096, 4096).fits(Tiling(8, 1, 1, 6, 132))
    assert not product(4096, 4096).fits(Tiling(8, 1, 1, 7, 132))


def test_shared_memory_of_a_block() -> None:
    tiling = Tiling(3, 2, 2, 2, 2)
    held = -(-product(96, 768).tiles // 2)
    assert held == 3
    ring = 3 * 2 * 2 * 2 * 2 * 1088  # warps, stages, units, tiles
    assert product(96, 768).shared_bytes(tiling) == ring + 3 * 3 * 16 * 4
    parts = product(96, 768).shared_bytes(Tiling(3, 2, 2, 2, 2, parts=2))
    assert parts == ring // 2 + 2 * 3 * 3 * 16 * 4
    both = product(192, 768, 2, is_gated=True, has_norm=True)
    assert both.shared_bytes(tiling) == 2 * ring + 3 * 3 * 2 * 16 * 2 * 4 + 2 * 768 * 2


def test_only_what_was_measured_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    table: dict[str, list[int]] = {}
    monkeypatch.setattr(packed_stream_gemm, "tiling_table", lambda name: table)
    monkeypatch.setattr(packed_stream_gemm, "num_sms", lambda: 132)
    choose = packed_stream_gemm.choose_tiling.__wrapped__
    assert choose(product(1536, 1536)) is None
    table["4096x4096:1"], table["6144x4096:1"], table["256x256:1"] = [4, 2, 1, 1, 132], [], [2, 2, 9, 9, 8]
    assert choose(product(4096, 4096)) == Tiling(4, 2, 1, 1, 132)
    assert choose(product(6144, 4096)) is None  # another kernel is faster
    for name, k in ((256, 256), (1536, 1536)):  # does not fit, is not in the table
        assert choose(product(name, k)) == packed_stream_gemm.rule_tiling(product(name, k), 132)
    assert choose(product(4096, 4096, tokens=2)) is None
    assert choose(product(4096, 4096, is_gated=True)) != Tiling(4, 2, 1, 1, 132)


def test_the_shipped_tables_tilings_fit() -> None:
    for name, values in skinny_gemm.tiling_table("packed_stream_tilings_sm90_132").items():
        shape, tokens, *rest = name.split(":")
        n, k = map(int, shape.split("x"))
        for has_norm in (False, True):
            what = product(n, k, int(tokens), is_gated=bool(rest), has_norm=has_norm and k <= 4096)
            assert what.name == name
            assert not values or what.fits(Tiling(*values))


def test_layers_of_few_tokens_use_it_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    w = affine.PackedAffine(Weight(torch.zeros(1), 64, 256))
    x = torch.zeros(1, 256, dtype=torch.bfloat16)
    assert affine._few_tokens(x, w, is_gated=False, has_norm=False) is skinny_gemm.skinny_gemm
    asked: list[dict[str, bool]] = []

    def is_faster(x: torch.Tensor, weight: Weight, **more: bool) -> bool:
        asked.append(more)
        return len(x) < 3 and weight is w.weight

    monkeypatch.setattr(packed_stream_gemm, "is_faster", is_faster)
    assert affine._few_tokens(x, w, is_gated=True, has_norm=False) is packed_stream_gemm.packed_stream_gemm
    assert affine._few_tokens(x.repeat(3, 1), w, is_gated=False, has_norm=True) is skinny_gemm.skinny_gemm
    assert asked == [{"is_gated": True, "has_norm": False}, {"is_gated": False, "has_norm": True}]


@pytest.fixture(scope="module")
def outcomes() -> Outcomes:
    from benchmarks.packed_stream_gemm import check

    return run_checks(check, NUM_CHECKS)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("number", range(NUM_CHECKS))
def test_against_float64(number: int, outcomes: Outcomes) -> None:
    assert error_of(outcomes[number]) < 1e-2


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("has_norm", [False, True])
def test_like_the_kernel_for_more_tokens(has_norm: bool) -> None:
    from benchmarks.skinny_gemm import make_weight

    torch.manual_seed(0)
    w, _ = make_weight(2 * 1536, 1536)
    x = torch.randn(2, 1536, device="cuda").bfloat16()
    more: dict[str, object] = {"activation": "gelu_tanh", "out_dtype": torch.float32}
    if has_norm:
        more |= {"norm_weight": torch.rand(1536, device="cuda").bfloat16(), "norm_eps": 1e-6, "norm_offset": 1.0}
    actual = packed_stream_gemm.packed_stream_gemm(x, w, **more)
    torch.testing.assert_close(actual, skinny_gemm.skinny_gemm(x, w, **more), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@on_hopper
def test_a_layer_of_two_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    q = torch.randint(0, 16, (512, 256), dtype=torch.uint8, device="cuda")
    scales = torch.rand(512, 2, device="cuda").half().float() * 0.01
    packed = affine.pack(q, scales, -8 * scales, 4)
    monkeypatch.setattr(packed_stream_gemm, "is_faster", lambda *_, **__: True)
    x = torch.randn(2, 256, device="cuda").bfloat16()
    assert torch.equal(affine.linear(x, packed), packed_stream_gemm.packed_stream_gemm(x, packed.weight))
