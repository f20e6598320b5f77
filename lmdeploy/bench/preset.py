"""A fixed set of measurements of one shape on one GPU, beside what other engines reached on the same work.

Random weights, 512 tokens in and 256 out per request, greedy, end tokens ignored, no prefix caching, session length 8192.
steady: tokens per second while the whole batch decodes; out: output tokens over the whole run, prefill included.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lmdeploy.bench.latency import Tell, decode_rate
from lmdeploy.bench.roofline import decode_floor, measure_read_bandwidth, prefill_floor
from lmdeploy.bench.shapes import shape_folder, shape_overrides
from lmdeploy.bench.throughput import duration, steady_rate
from lmdeploy.bench.timeline import Timeline, random_prompt, run_requests
from lmdeploy.engine.client import ThreadClient
from lmdeploy.engine.config import EngineConfig
from lmdeploy.messages import QuantPolicy
from lmdeploy.models.config import load_config

PROMPT_TOKENS, OUTPUT_TOKENS, SESSION_LEN, MAX_BATCH = 512, 256, 8192, 256
_PREFILL = (8, 4096)  # requests, tokens of each
_MATMUL_FLOPS = 798e12  # of an H100 in 16 bits, measured with large products


@dataclass(frozen=True)
class Setting:
    """Weights and KV cache of one engine, and what is measured with it: batch sizes, and prefill or not."""

    quant: str | None
    kv: QuantPolicy
    batch_sizes: tuple[int, ...]
    has_prefill: bool

    @property
    def name(self) -> str:
        kv = "" if self.kv == QuantPolicy.NONE else f" + KV {self.kv.name.lower()}"
        return ("AWQ" if self.quant else "bf16") + kv


Peers = dict[str, tuple[float, float | None, float]]

# Tokens per second of (LMDeploy 0.18.0 TurboMind, vLLM 0.26.0, this project's target) on one H100 80GB.
_INTERNLM2_7B: Peers = {
    "bf16 B=1 steady": (151.1, 157.8, 185),
    "bf16 B=64 steady": (7634, 7477, 8700),
    "bf16 B=256 steady": (16528, 16089, 17300),
    "bf16 B=256 out": (9340, 9142, 11000),
    "bf16 prefill": (37654, 41573, 46000),
    "AWQ B=1 steady": (132.0, 252.7, 460),
    "AWQ B=64 steady": (6335, 8999, 10500),
    "AWQ B=256 steady": (14802, 16702, 17500),
    "AWQ prefill": (37715, 42358, 45000),
    "AWQ + KV int8 B=256 steady": (17974, None, 24500),
    "AWQ + KV int4 B=256 steady": (20186, None, 28000),
}
_QWEN_1_5B: Peers = {
    "bf16 B=1 steady": (418.9, 439.0, 780),
    "bf16 B=64 steady": (20808, 23029, 36000),
    "bf16 B=256 steady": (53394, 55097, 78000),
    "bf16 B=256 out": (34548, 33358, 45000),
    "bf16 prefill": (162138, 182044, 205000),
    "AWQ B=1 steady": (256.7, 403.0, 1400),
    "AWQ B=64 steady": (12094, 18799, 30000),
}
PEERS: dict[str, Peers] = {
    "internlm2-7b": _INTERNLM2_7B,
    "qwen2.5-1.5b": _QWEN_1_5B,
}
_SETTINGS = {
    "internlm2-7b": (
        Setting(None, QuantPolicy.NONE, (1, 64, 256), True),
        Setting("awq", QuantPolicy.NONE, (1, 64, 256), True),
        Setting("awq", QuantPolicy.INT8, (256,), False),
        Setting("awq", QuantPolicy.INT4, (256,), False),
    ),
    "qwen2.5-1.5b": (
        Setting(None, QuantPolicy.NONE, (1, 64, 256), True),
        Setting("awq", QuantPolicy.NONE, (1, 64), False),
    ),
}


def h100_table(name: str, tell: Tell, only: str | None = None) -> dict[str, Any]:
    """Measure a shape of PEERS; `rows` of the result have the figure, its floor and the peers'. only: one setting's name."""
    folder, bandwidth = shape_folder(name), measure_read_bandwidth(torch.device("cuda"))
    rows: list[dict[str, Any]] = []
    starts: dict[str, float] = {}
    for setting in _SETTINGS[name]:
        if only is not None and setting.name != only:
            continue
        for row in _measure(folder, setting, bandwidth, starts):
            lmdeploy, vllm, target = PEERS[name].get(row["row"], (None, None, None))
            row |= {"lmdeploy": lmdeploy, "vllm": vllm, "target": target}
            rows.append(row)
            tell(format_row(row))
    return {
        "shape": name,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "read_bandwidth_bytes_s": bandwidth,
        "start_s": starts,
        "rows": rows,
    }


def _measure(folder: Path, setting: Setting, bandwidth: float, starts: dict[str, float]) -> Iterator[dict[str, Any]]:
    config = EngineConfig(
        empty_init=True,
        session_len=SESSION_LEN,
        max_batch_size=MAX_BATCH,
        quant_policy=setting.kv,
        hf_overrides=shape_overrides(setting.quant),
    )
    started = time.perf_counter()
    client = ThreadClient(folder, config)
    starts[setting.name] = time.perf_counter() - started
    try:
        model = load_config(folder, config.hf_overrides)
        floor = decode_floor(model, client.info, setting.kv, bandwidth, _MATMUL_FLOPS)
        generator = random.Random(0)

        def run(count: int, prompt_tokens: int, output_tokens: int) -> list[Timeline]:
            prompts = [random_prompt(prompt_tokens, client.info.vocab_size, generator) for _ in range(count)]
            return run_requests(client, prompts, output_tokens)

        for size in setting.batch_sizes:
            _wait_until_idle(client)
            run(size, PROMPT_TOKENS, 16)
            batch = run(size, PROMPT_TOKENS, OUTPUT_TOKENS)
            rate = decode_rate(batch[0]) if size == 1 else steady_rate(batch)
            limit = floor.tokens_per_s(size, PROMPT_TOKENS + OUTPUT_TOKENS / 2)
            yield {"row": f"{setting.name} B={size} steady", "tok_s": rate, "floor": limit}
            if size == MAX_BATCH:
                yield {
                    "row": f"{setting.name} B={size} out",
                    "tok_s": OUTPUT_TOKENS * size / duration(batch),
                    "floor": None,
                }
        if setting.has_prefill:
            count, tokens = _PREFILL
            run(count, tokens, 1)
            rate = max(count * tokens / duration(run(count, tokens, 1)) for _ in range(2))
            yield {
                "row": f"{setting.name} prefill",
                "tok_s": rate,
                "floor": prefill_floor(model, tokens, _MATMUL_FLOPS),
            }
    finally:
        client.close()


def _wait_until_idle(client: ThreadClient) -> None:
    """Let the engine capture what it captures when idle."""
    deadline = time.monotonic() + 30
    while client.stats().get("num_pending_graphs", 0) and time.monotonic() < deadline:
        time.sleep(0.05)


def format_row(row: dict[str, Any]) -> str:
    """A row as text."""
    numbers = [f"{row['tok_s']:>10,.1f}"]
    for key in ("floor", "target", "lmdeploy", "vllm"):
        value = row[key]
        numbers.append(f"{key} {value:,.0f} ({row['tok_s'] / value:.2f}x)" if value else f"{key} -")
    return f"{row['row']:<28} " + "  ".join(numbers)


def format_table(table: dict[str, Any]) -> str:
    """All rows as text."""
    head = f"{table['shape']} on {table['device']}, tokens per second"
    starts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in table["start_s"].items())
    return "\n".join([head, *(format_row(row) for row in table["rows"]), f"start to ready: {starts}"])
