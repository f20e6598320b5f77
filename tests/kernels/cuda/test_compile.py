"""The CUDA kernels compile for every architecture that is supported; no GPU is needed for that, only NVRTC."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmdeploy.kernels.cuda import nvrtc
from lmdeploy.kernels.cuda.epilogue import Epilogue
from lmdeploy.kernels.cuda.skinny_gemm import Tiling, Variant

pytestmark = pytest.mark.usefixtures("compiler")
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a")


def variant(token_tiles: int, epilogue: int, tiling: Tiling, *, is_half: bool, has_norm: bool) -> Variant:
    end = Epilogue(is_half, epilogue == 0, epilogue, 0, epilogue != 1)
    tokens = 8 if token_tiles > 1 else 2
    return Variant(32 if is_half else 128, not is_half, token_tiles, tokens, end, has_norm, 1.0, tiling)


VARIANTS = [
    variant(1, 1, Tiling(2, 1, 8, 3, 1, 100), is_half=False, has_norm=True),
    variant(8, 0, Tiling(2, 4, 1, 2, 1, 100, 1, 3), is_half=True, has_norm=False),
    variant(1, 2, Tiling(4, 2, 4, 2, 1, 100), is_half=False, has_norm=True),
]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel_compiles(arch: str) -> None:
    is_bulk = arch not in ("sm_80", "sm_86", "sm_89")
    for one in VARIANTS:
        assert nvrtc.cubin("skinny_gemm.cu", one.macros(is_bulk), arch)


def test_what_was_compiled_is_read_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    macros = {"GROUP": 64, "ZERO": 0, "FP16": 1}
    first = nvrtc.cubin("dequantize.cu", macros, "sm_80")
    monkeypatch.setattr(nvrtc, "_compile", None)
    assert nvrtc.cubin("dequantize.cu", macros, "sm_80") == first
    assert len(list((tmp_path / "cuda").glob("*.cubin"))) == 2
    source = nvrtc._source
    monkeypatch.setattr(nvrtc, "_source", lambda name: source(name) + ("\n" if name == "common.cuh" else ""))
    with pytest.raises(TypeError):  # what kernels include is part of them: it is compiled anew, by nothing here
        nvrtc.cubin("dequantize.cu", macros, "sm_80")


def test_an_error_shows_the_compilers_words() -> None:
    with pytest.raises(nvrtc.KernelError, match="GROUP"):
        nvrtc.cubin("dequantize.cu", {"GROUP": "nonsense", "ZERO": 1, "FP16": 0}, "sm_90a")
