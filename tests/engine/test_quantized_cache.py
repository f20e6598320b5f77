"""The engine with a quantized cache: its size and names; batching, chunks, prefix hits and preemption change nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lmdeploy import GenerationConfig, PytorchEngineConfig, TurbomindEngineConfig, pipeline
from lmdeploy.engine import memory
from lmdeploy.engine.config import EngineConfig
from lmdeploy.engine.memory import MemoryPlan, plan_memory
from lmdeploy.engine.request import Request, SamplingParams
from lmdeploy.errors import ConfigError
from lmdeploy.layers.quantized_cache import FORMATS
from lmdeploy.messages import QuantPolicy
from lmdeploy.models.config import ModelConfig
from tests.engine.driver import greedy, make_engine, run
from tests.engine.test_engine import assert_same_until_a_tie

ROOT = Path(__file__).parent.parent.parent
NUM_BLOCKS = 24
GIB = 1 << 30


@pytest.mark.parametrize("policy", FORMATS)
def test_a_crowded_engine_answers_as_one_by_one(tiny_llama: Path, policy: QuantPolicy) -> None:
    plain = make_engine(tiny_llama, quant_policy=policy)
    crowded = make_engine(
        tiny_llama,
        quant_policy=policy,
        cache_max_entry_count=NUM_BLOCKS,
        block_size=8,
        max_prefill_token_num=24,
        max_batch_size=6,
        enable_prefix_caching=True,
        session_len=NUM_BLOCKS * 8,
    )
    run(crowded, [greedy("warm", [5] * 40)])
    prompts = [[5] * 40 + [i] * (1 + 3 * i) for i in range(6)]
    outputs = run(crowded, [greedy(str(i), ids, 60) for i, ids in enumerate(prompts)])
    assert crowded.stats()["num_preemptions"] > 0
    assert crowded.stats()["num_free_blocks"] == NUM_BLOCKS
    for i, ids in enumerate(prompts):
        request = Request("r", ids, SamplingParams(max_new_tokens=60, return_logits="generation"))
        expected = run(plain, [request])["r"]
        assert outputs[str(i)].cached_tokens == 40
        assert expected.logits is not None
        assert_same_until_a_tie(request, expected.logits, expected.token_ids, outputs[str(i)].token_ids)


@pytest.mark.parametrize(("policy", "within"), [(8, 0.03), (84, 0.3), (4, 0.6), (16, 0.2), (17, 0.4)])
def test_logits_are_near_those_of_a_plain_cache(tiny_llama: Path, policy: int, within: float) -> None:
    prompt = list(range(100, 200))
    logits = []
    for quant_policy in (QuantPolicy.NONE, QuantPolicy(policy)):
        engine = make_engine(tiny_llama, quant_policy=quant_policy, max_prefill_token_num=32)
        sampling = SamplingParams(max_new_tokens=1, return_logits="all")
        output = run(engine, [Request("r", prompt, sampling)])["r"]
        assert output.logits is not None
        logits.append(output.logits)
    difference = (logits[0] - logits[1]).abs().max() / logits[0].abs().max()
    assert 0 < difference < within


def plan(policy: QuantPolicy, **config: object) -> MemoryPlan:
    """Of an 8-billion-parameter shape on a device of 80 GiB."""
    model = ModelConfig.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
            **config,
        }
    )
    return plan_memory(
        model,
        EngineConfig(quant_policy=policy, cache_max_entry_count=0.8),
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        weight_bytes=15 * GIB,
        max_batch_size=256,
        max_tokens_per_step=8192,
        session_len=8192,
    )


@pytest.mark.parametrize(
    ("policy", "at_least", "at_most"),
    [
        (QuantPolicy.INT8, 1.9, 2.0),
        (QuantPolicy.INT4, 3.5, 4.0),
        (QuantPolicy.K8V4, 2.5, 8 / 3),
        (QuantPolicy.FP8, 1.9, 2.0),
        (QuantPolicy.FP8_E5M2, 1.9, 2.0),
    ],
)
def test_capacity(monkeypatch: pytest.MonkeyPatch, policy: QuantPolicy, at_least: float, at_most: float) -> None:
    monkeypatch.setattr(memory, "device_memory", lambda device: (80 * GIB, 64 * GIB))
    ratio = plan(policy).cache_tokens / plan(QuantPolicy.NONE).cache_tokens
    assert at_least <= ratio < at_most


@pytest.mark.parametrize("policy", FORMATS)
def test_the_plan_counts_the_bytes_that_are_allocated(tiny_llama: Path, policy: QuantPolicy) -> None:
    engine = make_engine(tiny_llama, quant_policy=policy)
    cache = engine.runner.kv_cache
    tensors = (cache.data, cache.params)  # type: ignore[attr-defined]
    assert sum(t.numel() * t.itemsize for t in tensors) == engine.plan.cache_bytes


def test_heads_of_an_odd_size_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "device_memory", lambda device: (80 * GIB, 64 * GIB))
    with pytest.raises(ConfigError, match=r"quant_policy=4 \(int4\): heads of an odd size \(33\)"):
        plan(QuantPolicy.INT4, head_dim=33)


@pytest.mark.parametrize(
    ("value", "policy"),
    [
        (0, QuantPolicy.NONE),
        ("none", QuantPolicy.NONE),
        (4, QuantPolicy.INT4),
        ("int4", QuantPolicy.INT4),
        (8, QuantPolicy.INT8),
        ("INT8", QuantPolicy.INT8),
        ("8", QuantPolicy.INT8),
        (16, QuantPolicy.FP8),
        ("fp8", QuantPolicy.FP8),
        ("fp8_e4m3", QuantPolicy.FP8),
        ("fp8_e5m2", QuantPolicy.FP8_E5M2),
        ("k8v4", QuantPolicy.K8V4),
    ],
)
def test_public_names(value: int | str, policy: QuantPolicy) -> None:
    for config in (TurbomindEngineConfig(quant_policy=value), PytorchEngineConfig(quant_policy=value)):
        assert EngineConfig.from_public(config).quant_policy is policy


@pytest.mark.parametrize("value", [42, "turbo_quant", 5, "int3", ""])
def test_other_values_are_refused(value: int | str) -> None:
    with pytest.raises(ConfigError, match="quant_policy="):
        EngineConfig.from_public(PytorchEngineConfig(quant_policy=value))


def test_a_pipeline_answers(tiny_llama: Path) -> None:
    config = GenerationConfig(max_new_tokens=8, ignore_eos=True)
    answers = []
    for value in (8, "int8"):
        with pipeline(
            str(tiny_llama), backend_config=TurbomindEngineConfig(quant_policy=value, session_len=128)
        ) as pipe:
            responses = pipe(["the river", "the bridge"], gen_config=config)
            assert isinstance(responses, list)
            answers.append([r.token_ids for r in responses])
    assert [len(ids) for ids in answers[0]] == [8, 8]
    assert answers[0] == answers[1]


def test_a_plain_cache_loads_nothing_of_this(tiny_llama: Path) -> None:
    code = (
        "import sys; from tests.engine.driver import greedy, make_engine, run; from pathlib import Path\n"
        f"assert len(run(make_engine(Path({str(tiny_llama)!r})), [greedy('r', [1, 2], 2)])['r'].token_ids) == 2\n"
        "print([name for name in sys.modules if name.endswith('quantized_cache')])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, cwd=ROOT)
    assert (answer.returncode, answer.stdout.strip()) == (0, "[]"), answer.stderr
