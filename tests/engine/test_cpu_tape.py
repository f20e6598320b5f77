"""Recorded decode steps against the same steps run module by module: equal to the bit, whoever joins, leaves or wants what."""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path

import pytest
import torch

from lmdeploy.engine.config import EngineConfig
from lmdeploy.engine.control import Order, Sleep, Wake
from lmdeploy.engine.core import Engine
from lmdeploy.engine.request import Request, RequestOutput, SamplingParams
from lmdeploy.kernels import cpu
from lmdeploy.kernels.cpu import tape
from tests.engine.driver import greedy, join, make_engine, run

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="there is no compiler")


def some_requests() -> list[Request]:
    """Of different lengths, that end one after the other, cross blocks, and want different things."""
    sampled = SamplingParams(
        max_new_tokens=30,
        temperature=0.8,
        top_p=0.9,
        seed=3,
        logprobs=2,
        repetition_penalty=1.2,
        return_logits="generation",
    )
    return [
        greedy("short", [100, 200, 300], 25),
        Request("sampled", list(range(400, 425)), sampled),
        greedy("long", list(range(1000, 1070)), 12),
        greedy("hidden", [7, 8, 9], 6, return_hidden_states="generation"),
    ]


def answers(engine: Engine) -> dict[str, RequestOutput]:
    """The first two requests together, the others joining later."""
    joined: dict[str, RequestOutput] = {}
    waiting = some_requests()
    for step in range(200):
        if step in (0, 1, 6, 9):
            engine.add(waiting.pop(0))
        for output in engine.step():
            join(joined, output)
        if not engine.has_work and not waiting:
            break
    return joined


@pytest.mark.parametrize("steps_in_flight", [1, 2])
def test_recorded_steps_give_the_same_answers(builtin_model: Path, steps_in_flight: int) -> None:
    config = EngineConfig(
        device="cpu", session_len=128, max_batch_size=4, block_size=16, max_steps_in_flight=steps_in_flight
    )
    engine = Engine(builtin_model, config)
    recorded = answers(engine)
    again = answers(engine)
    tapes = engine.runner._tapes
    assert tapes is not None
    assert len(tapes._of_size) >= 3
    engine.runner._tapes = None
    expected = answers(engine)
    assert expected.keys() == {"short", "sampled", "long", "hidden"}
    for name, output in expected.items():
        for other in (recorded[name], again[name]):
            assert other.token_ids == output.token_ids
            assert other.logprobs == output.logprobs
    assert torch.equal(recorded["sampled"].logits, expected["sampled"].logits)
    assert torch.equal(recorded["hidden"].hidden_states, expected["hidden"].hidden_states)
    engine.close()


def test_a_model_that_needs_torch_is_not_recorded(tiny_llama: Path) -> None:
    engine = make_engine(tiny_llama)
    recorded = run(engine, [greedy("a", [5, 9, 13])])["a"].token_ids
    tapes = engine.runner._tapes
    assert tapes is not None
    assert not tapes._is_bare
    assert not tapes._of_size
    engine.runner._tapes = None
    assert run(engine, [greedy("b", [5, 9, 13])])["b"].token_ids == recorded


def test_what_another_thread_computes_is_not_recorded() -> None:
    x, weight = torch.ones(1, 32), torch.ones(32)
    with tape._recorder() as recorder:
        other = threading.Thread(target=cpu.rms_norm, args=(x, weight, 1e-5))
        other.start()
        other.join()
        assert recorder.calls == []
        cpu.rms_norm(x, weight, 1e-5)
    assert len(recorder.calls) == 1
    cpu.rms_norm(x, weight, 1e-5)
    assert len(recorder.calls) == 1


def test_a_recording_goes_with_the_cache_that_it_names(builtin_model: Path) -> None:
    config = EngineConfig(device="cpu", session_len=64, max_batch_size=2, block_size=16)
    engine = Engine(builtin_model, config)
    before = run(engine, [greedy("a", [100, 200, 300], 20)])["a"].token_ids
    recorded = weakref.ref(engine.runner._tapes._of_size[1])  # type: ignore[union-attr]
    for level in (1, 2):
        Order(Sleep(level)).run(engine)
        gc.collect()
        assert recorded() is None
        Order(Wake()).run(engine)
        assert run(engine, [greedy("a", [100, 200, 300], 20)])["a"].token_ids == before
        recorded = weakref.ref(engine.runner._tapes._of_size[1])  # type: ignore[union-attr]
    engine.close()
