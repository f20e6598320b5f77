"""What the tests of the CUDA kernels share."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmdeploy.kernels.cuda import nvrtc


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile each time, into an empty cache; skip where NVRTC is not installed."""
    monkeypatch.setenv("LMDEPLOY_CACHE", str(tmp_path))
    try:
        nvrtc.cubin("dequantize.cu", {"GROUP": 128, "ZERO": 1, "FP16": 0}, "sm_90a")
    except nvrtc.KernelError as error:
        pytest.skip(f"no NVRTC: {error}")
