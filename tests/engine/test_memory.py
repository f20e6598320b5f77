"""The memory plan: its arithmetic, its limits, and the published figures of InternLM2-1.8B."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lmdeploy.engine import warm_up
from lmdeploy.engine.config import EngineConfig
from lmdeploy.engine.memory import MIB, MemoryPlan, activation_bytes, device_memory, plan_memory
from lmdeploy.errors import ConfigError
from lmdeploy.kernels.cuda import affine
from lmdeploy.kernels.cuda.affine import PackedAffine
from lmdeploy.kernels.cuda.skinny_gemm import Weight
from lmdeploy.models.config import ModelConfig, load_config
from lmdeploy.models.loader import load_model
from lmdeploy.quantization import affine as quantization
from tests.tiny_model import make_tiny_llama

WEIGHTS = 3603 * MIB  # 1,889,110,016 parameters in 16 bit
WEIGHTS_4BIT = 1481 * MIB  # linears of the layers in 4 bit with a scale and a zero per 128
PACKED_WEIGHTS = 1488 * MIB  # as they are stored here
RUNTIME = 183 * MIB  # of what the plan adds for kernels, graphs and cuBLAS
CONTEXT = 423 * MIB  # of CUDA on an H100, before the first tensor and with little stack
LOADED, LOADED_4BIT = 18 * MIB, 147 * MIB  # kernels that made the weights, and gaps between these
PIECE = PackedAffine(Weight(torch.empty(0), 16384, 2048, 4, 128)).piece_bytes  # of gates and ups, the largest
OVERHEAD = 918 * MIB  # driver and activations together, as the published figures have it


@pytest.fixture(scope="module")
def internlm2(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """The numbers that the plan needs of InternLM2-1.8B."""
    folder = make_tiny_llama(tmp_path_factory.mktemp("m"))
    config = load_config(folder, None)
    return replace(
        config, vocab_size=92544, hidden_size=2048, intermediate_size=8192, num_layers=24, num_heads=16,
        num_kv_heads=8, head_dim=128,
    )  # fmt: skip


def plan(model: ModelConfig, share: float | None, weights: int, **changes: Any) -> MemoryPlan:
    numbers: dict[str, Any] = {"max_batch_size": 1, "max_tokens_per_step": 8192, "session_len": 32768, **changes}
    return plan_memory(
        model,
        EngineConfig(cache_max_entry_count=share),
        device=torch.device("cuda"),
        dtype=torch.bfloat16,
        weight_bytes=weights,
        **numbers,
    )


def see(monkeypatch: pytest.MonkeyPatch, total: int, used: int) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (total - used, total))


@pytest.mark.parametrize(
    ("weights", "share", "published_mib"),
    [(WEIGHTS, 0.8, 34056), (WEIGHTS, 0.5, 22984), (WEIGHTS, 0.01, 4872), (WEIGHTS_4BIT, 0.01, 2788)],
)
def test_the_published_figures(
    internlm2: ModelConfig, monkeypatch: pytest.MonkeyPatch, weights: int, share: float, published_mib: int
) -> None:
    monkeypatch.setenv("LMDEPLOY_DEVICE_MEMORY", "40960MiB")
    activations = activation_bytes(internlm2, torch.bfloat16, 8192, 1)
    see(monkeypatch, 81559 * MIB, OVERHEAD - activations + weights)
    made = plan(internlm2, share, weights)
    used = OVERHEAD + weights + made.cache_bytes
    assert made.block_bytes == 6 * MIB
    assert made.total_bytes == 40960 * MIB
    assert used / MIB == pytest.approx(published_mib, rel=0.02)


def test_a_number_of_blocks_is_taken_as_it_is_and_cut_to_what_is_free(
    internlm2: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    see(monkeypatch, 8192 * MIB, WEIGHTS)
    assert plan(internlm2, 100, WEIGHTS).num_blocks == 100
    cut = plan(internlm2, 10_000, WEIGHTS)
    assert cut.cache_bytes <= 8192 * MIB - WEIGHTS - cut.activation_bytes < cut.cache_bytes + cut.block_bytes
    assert cut.session_len == min(cut.cache_tokens, 32768)


@pytest.mark.parametrize("share", [0.8, 1, 500, None])
def test_what_does_not_fit_is_refused_with_the_numbers(
    internlm2: ModelConfig, monkeypatch: pytest.MonkeyPatch, share: float | None
) -> None:
    see(monkeypatch, 3612 * MIB, WEIGHTS)
    with pytest.raises(ConfigError, match=r"9 MiB are free after 3,603 MiB of weights"):
        plan(internlm2, share, WEIGHTS)


def test_a_small_pool_bounds_steps_and_batches(internlm2: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    see(monkeypatch, 40960 * MIB, WEIGHTS)
    made = plan(internlm2, 0.01, WEIGHTS, max_batch_size=256)
    assert made.num_blocks == int(0.01 * (40960 * MIB - WEIGHTS)) // made.block_bytes
    assert made.max_batch_size == made.num_blocks < 256
    assert made.max_tokens_per_step < made.cache_tokens < 8192
    activations = activation_bytes(internlm2, torch.bfloat16, made.max_tokens_per_step, made.num_blocks)
    assert made.peak_bytes == WEIGHTS + made.cache_bytes + activations + RUNTIME
    assert activation_bytes(internlm2, torch.bfloat16, made.max_tokens_per_step - 64, 0) < made.cache_bytes / 8


@pytest.mark.parametrize("share", [None, 33])
def test_a_pool_for_few_requests_leaves_prompts_whole(
    internlm2: ModelConfig, monkeypatch: pytest.MonkeyPatch, share: float | None
) -> None:
    see(monkeypatch, 40960 * MIB, WEIGHTS)
    made = plan(internlm2, share, WEIGHTS, max_batch_size=1, session_len=2048)
    assert made.cache_tokens in (2048, 2112)
    assert made.max_tokens_per_step == 8192


def test_a_pool_shrinks_where_the_largest_step_would_not_fit(
    internlm2: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    see(monkeypatch, 6000 * MIB, WEIGHTS)
    made = plan(internlm2, 0.9, WEIGHTS, max_batch_size=64)
    assert made.num_blocks < int(0.9 * (6000 * MIB - WEIGHTS)) // made.block_bytes
    assert 6000 * MIB - made.block_bytes < made.peak_bytes <= 6000 * MIB


@pytest.mark.parametrize(("share", "is_kept"), [(0.8, True), (0.5, True), (0.01, False), (100, True), (None, True)])
def test_copies_of_quantized_weights_take_a_part_of_the_pool_or_are_made_for_each_step(
    internlm2: ModelConfig, monkeypatch: pytest.MonkeyPatch, share: float | None, is_kept: bool
) -> None:
    see(monkeypatch, 40960 * MIB, WEIGHTS_4BIT)
    copies, piece = 2880 * MIB, 64 * MIB
    without = plan(internlm2, share, WEIGHTS_4BIT)
    with_copies = plan(
        internlm2, share, WEIGHTS_4BIT, copy_bytes=(copies, piece), buffer_bytes=lambda *sizes: 100 * MIB
    )
    assert with_copies.copy_bytes == (copies if is_kept else 0)
    taken = 100 * MIB + (0 if is_kept else piece)
    assert with_copies.activation_bytes - without.activation_bytes == taken
    if share is not None and share < 1:
        free = 40960 * MIB - WEIGHTS_4BIT - with_copies.copy_bytes
        assert with_copies.num_blocks == int(free * share) // with_copies.block_bytes
    assert ("16-bit copies of weights", "2,880 MiB") in with_copies.rows() or not is_kept


@pytest.mark.parametrize(
    ("weights", "loaded", "limit_mib"), [(WEIGHTS, LOADED, 4872), (PACKED_WEIGHTS, LOADED_4BIT, 2788)]
)
def test_a_small_share_stays_below_the_published_figures_with_the_default_batch(
    internlm2: ModelConfig, monkeypatch: pytest.MonkeyPatch, weights: int, loaded: int, limit_mib: int
) -> None:
    monkeypatch.setenv("LMDEPLOY_DEVICE_MEMORY", "40960MiB")
    monkeypatch.setattr(warm_up, "has_gpu_kernels", lambda: True)
    see(monkeypatch, 81559 * MIB, CONTEXT + weights + loaded)
    model: Any = SimpleNamespace(config=internlm2, dtype=torch.bfloat16)
    buffers = partial(warm_up.buffer_bytes_of, model)
    pieces = (0, 0) if weights == WEIGHTS else (2880 * MIB, PIECE)
    made = plan(internlm2, 0.01, weights, max_batch_size=256, copy_bytes=pieces, buffer_bytes=buffers)
    assert made.max_batch_size >= 60
    assert made.max_tokens_per_step >= 448
    assert 0.93 * limit_mib < made.peak_bytes / MIB < limit_mib


def test_the_piece_that_is_planned_for_is_the_largest_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    awq = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
    folder = make_tiny_llama(tmp_path, hidden_size=128, intermediate_size=256)
    monkeypatch.setattr(quantization, "choose_kernels", lambda *arguments: affine)
    model = load_model(folder, load_format="dummy", dtype="bfloat16", hf_overrides={"quantization_config": awq})
    assert warm_up.piece_bytes(model) == 2 * 512 * 128  # gates and ups
    monkeypatch.setattr(affine, "_ROWS_AT_ONCE", 64)
    assert warm_up.piece_bytes(model) == 2 * 64 * 256  # the projection back has longer rows


@pytest.mark.parametrize(("tokens", "requests", "mib"), [(8192, 0, 480), (8192, 64, 480 + 22.6), (64, 256, 3 * 90.4)])
def test_logits_come_when_the_activations_of_layers_are_gone(
    internlm2: ModelConfig, tokens: int, requests: int, mib: float
) -> None:
    assert activation_bytes(internlm2, torch.bfloat16, tokens, requests) / MIB == pytest.approx(mib, rel=1e-3)
    with_piece = activation_bytes(internlm2, torch.bfloat16, tokens, requests, 64 * MIB) / MIB
    assert with_piece - mib == pytest.approx(64 if tokens == 8192 else 0, abs=0.5)


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="only Linux says so there")
def test_of_main_memory_only_what_is_available_is_free() -> None:
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    total, free = device_memory(torch.device("cpu"))
    assert total == int(lines["MemTotal"].split()[0]) * 1024
    assert abs(free - int(lines["MemAvailable"].split()[0]) * 1024) < 0.2 * total


def test_a_limit_below_what_is_used_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    see(monkeypatch, 1000, 600)
    for text, seen in (("2000", (1000, 400)), ("700B", (700, 100)), ("500", (500, 0)), ("-1", (-1, 0))):
        monkeypatch.setenv("LMDEPLOY_DEVICE_MEMORY", text)
        if text == "-1":
            with pytest.raises(ConfigError, match="LMDEPLOY_DEVICE_MEMORY"):
                device_memory(torch.device("cuda"))
        else:
            assert device_memory(torch.device("cuda")) == seen


@pytest.mark.parametrize("share", [float("inf"), float("nan"), "0.5", True, 0, 0.0, -1, 1.5])
def test_a_share_that_is_none_is_refused(share: object) -> None:
    with pytest.raises(ConfigError, match="cache_max_entry_count"):
        EngineConfig(cache_max_entry_count=share)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["session_len", "max_batch_size", "block_size"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "8", True])
def test_a_size_that_is_none_is_refused(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        EngineConfig(**{name: value})  # type: ignore[arg-type]


def test_the_plan_is_printed(tmp_path: Path, internlm2: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    see(monkeypatch, 81920 * MIB, WEIGHTS)
    rows = dict(plan(internlm2, 1000, WEIGHTS).rows())
    assert rows["weights"] == "3,603 MiB"
    assert rows["KV blocks"] == "6,000 MiB = 1000 x 6.00 MiB"
    assert rows["tokens that fit"] == "64,000"
