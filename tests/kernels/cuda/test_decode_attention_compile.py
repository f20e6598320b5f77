"""The kernel of one new token per request compiles for every architecture; that needs NVRTC and no GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lmdeploy.kernels.cuda import decode_attention, nvrtc
from lmdeploy.kernels.cuda.decode_attention import Shape, Variant, shared_parts, variant_of
from lmdeploy.kernels.reference.quantized_cache import CodeFormat, QuantizedBlocks
from lmdeploy.kernels.spec import AttentionSpec
from lmdeploy.kernels.triton.stored import Blocks

PLAIN, INT8, INT4 = range(3)
MAX_SHARED_BYTES = 227 << 10  # of a block on Hopper
# Compute capability, and KiB of shared memory of a block and of a multiprocessor.
GPUS = [
    ((8, 0), 163, 164), ((8, 6), 99, 100), ((8, 9), 99, 100), ((9, 0), 227, 228), ((10, 0), 227, 228), ((12, 0), 99, 100),
]  # fmt: skip
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


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("arch", OLD + HOPPER)
def test_it_compiles(arch: str) -> None:
    for one in VARIANTS + (CLUSTERED if arch in HOPPER else []):
        assert nvrtc.cubin("decode_attention.cu", one.macros(), arch)


@pytest.mark.parametrize("one", VARIANTS + CLUSTERED)
def test_shared_memory_holds_it(one: Variant) -> None:
    parts = shared_parts(one.dim, one.group, one.k_form, one.v_form, one.shape)
    assert max(parts) <= one.shared_bytes <= sum(parts)
    assert one.shape.blocks_per_sm * one.shared_bytes <= MAX_SHARED_BYTES


def layer(form: int, dim: int) -> Blocks:
    """An empty layer of eight key-value heads."""
    if form == PLAIN:
        return torch.empty(0, 8, 64, dim, dtype=torch.bfloat16)
    codes = CodeFormat(8) if form == INT8 else CodeFormat(4, is_rotated=True)
    empty = torch.empty(0, 8, 64, codes.code_bytes(dim), dtype=torch.uint8)
    return QuantizedBlocks(empty, torch.empty(0, 8, 64, 2, dtype=torch.float16), codes)


@pytest.mark.parametrize(("capability", "of_block", "of_sm"), GPUS)
def test_what_is_chosen_fits_into_every_gpu(
    capability: tuple[int, int], of_block: int, of_sm: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(multi_processor_count=84, shared_memory_per_multiprocessor=of_sm << 10)
    monkeypatch.setattr(decode_attention, "_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    for form, dims in ((PLAIN, (64, 80, 96, 112, 128)), (INT8, (64, 128)), (INT4, (64, 128))):
        for dim in dims:
            for group in (1, 7, 16):
                for batch in (1, 4, 200):
                    spec = AttentionSpec(8 * group, 8, dim, dim, 1.0)
                    qkv, keys = torch.empty(batch, 0), layer(form, dim)
                    one = variant_of(qkv, dim, keys, keys, spec, None)
                    static = 2 * group * (dim + 8) + 4 * dim + 12 * group * one.shape.warps
                    assert one.shared_bytes + static <= of_block << 10, one
                    assert one.shape.cluster == 1 or capability >= (9, 0)
