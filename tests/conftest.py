"""What every test shares: one thread a process, no hub, the real built-in model, limits by marker."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before the first import of torch or huggingface_hub: processes share the cores, and no test asks a hub.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

SLOW_TIMEOUT_S = 300


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT_S))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs an NVIDIA GPU")


@pytest.fixture(scope="session")
def builtin_model() -> Path:
    """The built-in model's GGUF file, from the user's cache; fetched once if it is not there."""
    from lmdeploy import hub

    return hub.resolve(None)
