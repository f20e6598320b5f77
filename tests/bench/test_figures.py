"""The figures are what the times of the tokens say, and runs that went wrong give none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lmdeploy.bench.latency import measure_latency
from lmdeploy.bench.process_memory import peak_rss_bytes
from lmdeploy.bench.roofline import DecodeFloor, measure_read_bandwidth
from lmdeploy.bench.throughput import measure_throughput, steady_rate
from lmdeploy.bench.timeline import Timeline, run_requests
from lmdeploy.engine.memory import kv_bytes_per_token
from lmdeploy.errors import ConfigError, EngineDead, RequestError
from lmdeploy.messages import QuantPolicy
from lmdeploy.models.config import ModelConfig
from tests.bench.fake_client import FakeClient

ROOT = Path(__file__).parent.parent.parent


def silent(text: str) -> None:
    assert text


def test_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    client = FakeClient(prefill_s=0.5, token_s=0.1)
    client.install(monkeypatch)
    figures = measure_latency(client, prompt_tokens=100, output_tokens=11, repeats=2, tell=silent)  # type: ignore[arg-type]
    assert figures.prefill_tok_s == pytest.approx(200)
    assert figures.ttft_s == pytest.approx(0.5)
    assert figures.decode_tok_s == pytest.approx(10)
    assert figures.token_p50_s == pytest.approx(0.1)
    assert figures.token_p99_s == pytest.approx(0.1)
    assert len(client.requests) == 3  # the first one warms up
    prompts = [request.prompt_ids for request in client.requests]
    assert len({tuple(prompt) for prompt in prompts}) == 3
    assert {len(prompt) for prompt in prompts} == {100}
    assert all(0 <= token < 50 for prompt in prompts for token in prompt)
    assert {request.sampling.stop_token_ids for request in client.requests} == {()}  # end tokens do not end an answer


def test_throughput(monkeypatch: pytest.MonkeyPatch) -> None:
    client = FakeClient(prefill_s=0.5, token_s=0.1)
    client.install(monkeypatch)
    figures = measure_throughput(
        client,  # type: ignore[arg-type]
        prompt_tokens=100,
        output_tokens=11,
        repeats=1,
        tell=silent,
        batch_size=4,
    )
    assert figures.batch_tok_s == pytest.approx(40)
    assert figures.output_tok_s == pytest.approx(44 / 1.5)
    assert figures.total_tok_s == pytest.approx(444 / 1.5)
    assert figures.batch_ttft_s == pytest.approx(0.5)


def test_steady_rate_counts_only_while_all_decode() -> None:
    early = Timeline(1, 0.0, [(1.0, 1), (2.0, 1), (3.0, 1), (4.0, 1)])
    late = Timeline(1, 0.0, [(2.5, 1), (3.0, 1), (4.0, 1), (9.0, 1)])
    assert steady_rate([early, late]) == pytest.approx(4 / 1.5)
    one_by_one = [Timeline(1, 0.0, [(1.0, 1), (2.0, 1)]), Timeline(1, 0.0, [(3.0, 1), (4.0, 1)])]
    assert steady_rate(one_by_one) == pytest.approx(1)


def test_what_went_wrong_gives_no_figure() -> None:
    client = FakeClient()
    with pytest.raises(ConfigError, match="990 prompt and 11 output tokens do not fit session_len 1000"):
        run_requests(client, [[0] * 990], 11)  # type: ignore[arg-type]
    client.num_missing = 1
    with pytest.raises(EngineDead, match="ended before"):
        run_requests(client, [[0]], 4)  # type: ignore[arg-type]
    client.error = RequestError("no finite logit")
    with pytest.raises(RequestError, match="no finite logit"):
        run_requests(client, [[0]], 4)  # type: ignore[arg-type]


def test_floor() -> None:
    floor = DecodeFloor(bandwidth=1000.0, weight_bytes=80, kv_bytes_per_token=2)
    assert floor.tokens_per_s(1, 10) == pytest.approx(10)
    assert floor.tokens_per_s(4, 10) == pytest.approx(4 * 1000 / 160)


def test_kv_bytes() -> None:
    config = ModelConfig.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 10,
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
    )
    assert kv_bytes_per_token(config, torch.bfloat16) == 3 * 2 * 2 * 16 * 2
    assert kv_bytes_per_token(config, torch.bfloat16, QuantPolicy.INT4) == 3 * 2 * 2 * (8 + 4)


def test_the_machine_itself() -> None:
    assert 1e8 < measure_read_bandwidth(torch.device("cpu")) < 1e13
    code = (
        "from lmdeploy.bench.process_memory import peak_rss_bytes\n"
        "before = peak_rss_bytes(); ballast = b'x' * (64 << 20); del ballast\n"
        "print(before, peak_rss_bytes())"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    before, after = map(int, answer.stdout.split())
    assert (60 << 20) < after - before < (80 << 20)
    assert before < peak_rss_bytes()  # of that process alone, though its parent is larger
