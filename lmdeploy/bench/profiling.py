"""Where the time of a prefill and of some decode steps goes, by torch.profiler. It knows no flags."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

from lmdeploy.bench.timeline import random_prompt
from lmdeploy.engine.config import EngineConfig
from lmdeploy.engine.core import Engine
from lmdeploy.engine.request import Request, SamplingParams
from lmdeploy.engine.runner import PendingStep

_DECODE_TOKENS = 16
_HOST_STEPS = 64  # so many fill a block of every request
_ROWS = 25


def profile_engine(path: Path, config: EngineConfig, prompt_tokens: int, batch_size: int) -> str:
    """Tables of the operators that took longest in prefill and in decode.

    The engine is stepped in this thread: the profiler records only the thread that started it.
    """
    engine = Engine(path, config)
    try:
        _submit(engine, "warm", prompt_tokens, 1, 2)
        _run(engine)
        # First: what the profiler has hooked into launches may stay there.
        host = _host_time(engine, prompt_tokens, batch_size) if engine.device.type == "cuda" else ""
        _submit(engine, "prefill", prompt_tokens, batch_size, 1)
        prefill = _table(lambda: _run(engine))
        _submit(engine, "decode", prompt_tokens, batch_size, _DECODE_TOKENS + 1)
        _run(engine, num_started=batch_size)
        decode = _table(lambda: _run(engine))
    finally:
        engine.close()
    what = f"{batch_size} x {prompt_tokens} prompt tokens"
    return f"prefill of {what}\n{prefill}\ndecode of {batch_size} x {_DECODE_TOKENS} tokens after that\n{decode}{host}"


def _host_time(engine: Engine, prompt_tokens: int, batch_size: int) -> str:
    """What the host does in a decode step, without waiting for the device."""
    steps = max(min(_HOST_STEPS, engine.info.session_len - prompt_tokens - _DECODE_TOKENS), 1)
    _submit(engine, "host", prompt_tokens, batch_size, steps + _DECODE_TOKENS)
    _run(engine, num_started=batch_size)
    seconds = host_step_s(engine, steps)
    _run(engine)
    return f"\nhost time of a decode step of {batch_size}: {seconds * 1e6:.0f} us"


def host_step_s(engine: Engine, steps: int) -> float:
    """Median seconds of a step, those spent waiting for its tokens left out."""
    waited = 0.0
    wait = PendingStep.wait

    def timed_wait(pending: PendingStep) -> list[int | None]:
        nonlocal waited
        started = time.perf_counter()
        tokens = wait(pending)
        waited += time.perf_counter() - started
        return tokens

    PendingStep.wait = timed_wait  # type: ignore[method-assign, assignment]
    try:
        times = []
        for _ in range(steps):
            waited, started = 0.0, time.perf_counter()
            engine.step()
            times.append(time.perf_counter() - started - waited)
        return median(times)
    finally:
        PendingStep.wait = wait  # type: ignore[method-assign]


def _submit(engine: Engine, name: str, prompt_tokens: int, count: int, output_tokens: int) -> None:
    generator = random.Random(name)
    for number in range(count):
        prompt = random_prompt(prompt_tokens, engine.info.vocab_size, generator)
        engine.add(Request(f"{name}-{number}", prompt, SamplingParams(max_new_tokens=output_tokens)))


def _run(engine: Engine, num_started: int | None = None) -> None:
    """Step until `num_started` requests have their first token, or until all have ended."""
    started: set[str] = set()
    while engine.has_work and (num_started is None or len(started) < num_started):
        started.update(output.request_id for output in engine.step() if output.token_ids)


def _table(work: Callable[[], None]) -> str:
    is_cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if is_cuda else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        work()
        if is_cuda:
            torch.cuda.synchronize()
    key = "self_cuda_time_total" if is_cuda else "self_cpu_time_total"
    return str(profiler.key_averages().table(sort_by=key, row_limit=_ROWS, max_name_column_width=60))
