"""What an engine does for a GPU beside its steps, where a CPU can tell: the decode buffers' plan, captures that fail."""

from __future__ import annotations

import atexit
import gc
import signal
import threading
import weakref
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lmdeploy.engine import warm_up
from lmdeploy.engine.client import ThreadClient
from lmdeploy.engine.config import EngineConfig
from lmdeploy.engine.core import Engine
from lmdeploy.errors import ConfigError
from lmdeploy.models.base import CausalLM
from lmdeploy.models.config import load_config
from lmdeploy.models.moe_config import MLAConfig
from tests.engine.driver import UncapturedGraphs, greedy, make_engine, replay_uncaptured, run

PROMPT = [5, 9, 13]


def test_a_capture_that_fails_when_idle_ends_the_captures_and_not_the_engine(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(tiny_llama, max_batch_size=4)
    before = run(engine, [greedy("a", PROMPT)])["a"].token_ids
    replay_uncaptured(engine, 4)
    graphs = engine.runner.graphs
    assert graphs is not None
    del graphs.graphs[2, False]

    def fail(self: UncapturedGraphs, size: int, keeps_hidden: bool) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(UncapturedGraphs, "capture", fail)
    assert engine.stats()["num_pending_graphs"] == 1
    assert engine.prepare_more()
    assert engine.stats()["num_pending_graphs"] == 0
    assert not engine.prepare_more()
    assert run(engine, [greedy("b", PROMPT)])["b"].token_ids == before


class Shape:
    """The part of a model that the plan asks for."""

    def __init__(self, path: Path, **changes: object) -> None:
        config = load_config(path, None)
        changes = {"num_heads": 32, "head_dim": 128, "layer_windows": (None, None), **changes}
        self.config = replace(config, **changes)  # type: ignore[arg-type]
        self.dtype = torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "floats"),
    [
        ({}, 16 * 130),
        ({"layer_windows": (64, 64)}, 32 * 130),
        ({"layer_windows": (64, None)}, (32 + 16) * 130),
        ({"head_dim": 256}, 32 * 258),
        ({"attention_sinks": True}, 32 * 130),
        ({"mla": MLAConfig(None, 512, 128, 64, 128)}, 32 * 514),
    ],
    ids=str,
)
def test_the_plan_counts_rotary_tables_and_the_buffers_of_every_form_of_attention(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], floats: int
) -> None:
    monkeypatch.setattr(warm_up, "has_gpu_kernels", lambda: True)
    model: CausalLM = Shape(tiny_llama, **changes)  # type: ignore[assignment]
    tables = 2 * 8192 * (16 // 2) * 4
    assert warm_up.buffer_bytes_of(model, 8, 8192) == 8 * 32 * floats * 4 + tables
    monkeypatch.setattr(warm_up, "has_gpu_kernels", lambda: False)
    assert warm_up.buffer_bytes_of(model, 8, 8192) == tables


def test_the_thread_that_runs_the_steps_starts_the_runner(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[str, bool]] = []
    start = Engine.start_runner

    def start_runner(engine: Engine) -> None:
        assert engine.resting_model is not None
        started.append((threading.current_thread().name, engine.resting_model.dtype == torch.float32))
        start(engine)

    monkeypatch.setattr(Engine, "start_runner", start_runner)
    client = ThreadClient(tiny_llama, EngineConfig(device="cpu", dtype="float32", cache_max_entry_count=8))
    assert started == [("lmdeploy-engine", True)]
    assert client.stats()["num_free_blocks"] == 8
    assert client.info.load_s > 0
    client.close()
    make_engine(tiny_llama)
    assert started[1:] == [(threading.current_thread().name, True)]


def test_a_start_that_fails_is_the_callers_and_leaves_no_thread_and_no_model(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    models: list[weakref.ref[CausalLM]] = []

    def fail(engine: Engine) -> None:
        assert engine.resting_model is not None
        models.append(weakref.ref(engine.resting_model))
        raise ConfigError("no room")

    monkeypatch.setattr(Engine, "start_runner", fail)
    before = set(threading.enumerate())
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(ConfigError, match="no room"):
            ThreadClient(tiny_llama, EngineConfig(device="cpu", dtype="float32", cache_max_entry_count=8))
        for thread in set(threading.enumerate()) - before:
            thread.join(5)
        assert [model() for model in models] == [None]
    finally:
        gc.enable()
    assert set(threading.enumerate()) <= before
    assert not caplog.records


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="signals go to no thread here")
def test_an_interrupted_start_leaves_no_thread_and_no_model(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models: list[weakref.ref[CausalLM]] = []
    may_go_on = threading.Event()
    start = Engine.start_runner

    def interrupt(engine: Engine) -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        may_go_on.wait(30)
        start(engine)
        models.append(weakref.ref(engine.runner.model))

    monkeypatch.setattr(Engine, "start_runner", interrupt)
    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        ThreadClient(tiny_llama, EngineConfig(device="cpu", dtype="float32", cache_max_entry_count=8))
    threads = set(threading.enumerate()) - before
    assert [thread.name for thread in threads] == ["lmdeploy-engine"]
    may_go_on.set()
    for thread in threads:
        thread.join(30)
    assert set(threading.enumerate()) <= before
    gc.collect()
    assert [model() for model in models] == [None]


def test_an_engine_takes_the_stream_of_one_that_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        cuda_stream = 7

        def __init__(self, device: torch.device) -> None:
            self.device = device

        def synchronize(self) -> None:
            current.append("waited")

    current: list[object] = []
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: ("default", device))
    monkeypatch.setattr(torch.cuda, "set_stream", current.append)
    monkeypatch.setattr(warm_up, "_free_streams", defaultdict(list))
    first, other = torch.device("cuda", 0), torch.device("cuda", 1)
    streams = [warm_up.take_stream(first), warm_up.take_stream(first), warm_up.take_stream(other)]
    assert len(set(streams)) == 3
    warm_up.give_back(streams[1])
    assert current == ["waited", ("default", first)]
    assert warm_up.take_stream(other) not in streams
    assert warm_up.take_stream(first) is streams[1]
    assert warm_up.take_stream(first) not in streams


def test_a_failed_start_leaves_nothing_for_the_end(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(engine: Engine) -> None:
        raise RuntimeError("no graph")

    left: set[object] = set()
    monkeypatch.setattr(atexit, "register", left.add)
    monkeypatch.setattr(atexit, "unregister", left.discard)
    monkeypatch.setattr(Engine, "start_runner", fail)
    with pytest.raises(RuntimeError, match="no graph"):
        ThreadClient(tiny_llama, EngineConfig(device="cpu", dtype="float32", cache_max_entry_count=8))
    for thread in threading.enumerate():
        if thread.name == "lmdeploy-engine":
            thread.join(timeout=10)
    assert left == set()
