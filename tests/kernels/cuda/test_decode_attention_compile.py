"""The kernel of one new token per request compiles for every architecture; that needs NVRTC and no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmdeploy.kernels.cuda import nvrtc
from lmdeploy.kernels.cuda.decode_attention import Shape, Variant, shared_parts

PLAIN, INT8, INT4 = range(3)
MAX_SHARED_BYTES = 227 << 10  # of a block on Hopper
OLD, HOPPER = ("sm_80", "sm_86", "sm_89"), ("sm_90a", "sm_100a", "sm_120a")


def variant(dim: int, k_form: int, v_form: int, shape: Shape, *, has_more: bool = False, group: int = 4) -> Variant:
    """has_more: norm, clip, growth and the other pairing of rotated elements, of which some are left alone."""
    return Variant(
        dim, group, 8, 64, has_more, k_form, v_form,
        dim if k_form == INT4 else 1, dim if v_form == INT4 else 1,
        dim // 2 if has_more else dim, has_more, has_more, has_more, has_more, True, shape,
    )  # fmt: skip


VARIANTS = [
    variant(128, PLAIN, PLAIN, Shape(4, 2, 2)),
    variant(80, PLAIN, PLAIN, Shape(8, 2, 1), group=16),
    variant(64, PLAIN, PLAIN, Shape(4, 2, 2), has_more=True),
    variant(128, INT8, INT8, Shape(4, 2, 4)),
    variant(128, INT4, INT4, Shape(4, 4, 4)),
    variant(64, INT8, INT4, Shape(4, 2, 4), has_more=True, group=7),
]
CLUSTERED = [variant(128, form, form, Shape(2, 4, 2, 8), group=6) for form in (PLAIN, INT8, INT4)]


@pytest.mark.parametrize("arch", OLD + HOPPER)
def test_it_compiles(arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMDEPLOY_CACHE", str(tmp_path))
    for one in VARIANTS + (CLUSTERED if arch in HOPPER else []):
        try:
            assert nvrtc.cubin("decode_attention.cu", one.macros(), arch)
        except nvrtc.KernelError as error:
            if "cannot be loaded" not in str(error):
                raise
            pytest.skip(f"no NVRTC: {error}")


@pytest.mark.parametrize("one", VARIANTS + CLUSTERED)
def test_shared_memory_holds_it(one: Variant) -> None:
    parts = shared_parts(one.dim, one.group, one.k_form, one.v_form, one.shape)
    assert max(parts) <= one.shared_bytes <= sum(parts)
    assert one.shape.blocks_per_sm * one.shared_bytes <= MAX_SHARED_BYTES
