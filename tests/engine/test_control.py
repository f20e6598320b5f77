"""Sleep, wake and new weights through both clients; what sleep frees, and that nothing waits for ever."""

from __future__ import annotations

import gc
import queue
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmdeploy.engine.client import EngineClient, ThreadClient
from lmdeploy.engine.control import Order, Sleep, UpdateWeights, Wake
from lmdeploy.engine.process import ProcessClient
from lmdeploy.engine.request import RequestOutput
from lmdeploy.errors import CheckpointError, ConfigError, EngineDead, RequestError
from tests.engine.driver import greedy, make_engine
from tests.engine.test_client import CONFIG, ask
from tests.tiny_model import make_tiny_llama

PROMPT = list(range(4, 40))


@pytest.fixture(params=[ThreadClient, ProcessClient])
def client(request: pytest.FixtureRequest, tiny_llama: Path) -> Iterator[EngineClient]:
    client = request.param(tiny_llama, CONFIG)
    yield client
    client.close()


def answer(client: EngineClient) -> list[int]:
    return ask(client, greedy("r", PROMPT, 8))["r"].token_ids


def test_an_engine_sleeps_and_wakes(client: EngineClient) -> None:
    before = answer(client)
    for level in (1, 2):
        client.control(Sleep(level))
        client.control(Sleep(level))  # again changes nothing
        refused = ask(client, greedy("x", PROMPT, 1))["x"]
        assert isinstance(refused.error, RequestError)
        client.control(Wake(["weights"]))
        client.control(Wake())
        client.control(Wake())
        assert answer(client) == before
    for command, kind in ((Sleep(3), ConfigError), (Wake(["x"]), ConfigError), (UpdateWeights("/no"), CheckpointError)):
        with pytest.raises(kind):
            client.control(command)
    assert answer(client) == before


def test_sleep_ends_what_runs(client: EngineClient) -> None:
    news: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
    client.submit(greedy("long", PROMPT, 200), news.put)
    assert news.get(timeout=20).token_ids
    client.control(Sleep())
    last = news.get(timeout=20)
    while not last.is_finished:
        last = news.get(timeout=20)
    assert last.finish_reason == "abort"
    client.control(Wake())
    assert answer(client)


def test_new_weights_also_while_asleep(client: EngineClient, tiny_llama: Path, tmp_path: Path) -> None:
    before = answer(client)
    other = make_tiny_llama(tmp_path / "other", seed=5, max_position_embeddings=256)
    client.control(UpdateWeights(str(other)))
    changed = answer(client)
    assert changed != before
    client.control(Sleep(2))
    client.control(UpdateWeights(str(tiny_llama)))
    client.control(Wake())
    assert answer(client) == before


def test_an_engine_that_is_gone_obeys_nothing(tiny_llama: Path) -> None:
    for kind in (ThreadClient, ProcessClient):
        client = kind(tiny_llama, CONFIG)
        client.control(Sleep(2))
        client.close()
        with pytest.raises(EngineDead):
            client.control(Wake())


def test_a_waiting_order_hears_of_the_engines_death(tiny_llama: Path) -> None:
    client = ProcessClient(tiny_llama, CONFIG)
    errors: list[BaseException] = []

    def order() -> None:
        try:
            while True:
                client.control(Sleep())
        except EngineDead as error:
            errors.append(error)

    thread = threading.Thread(target=order)
    thread.start()
    client.process.kill()
    thread.join(10)
    assert not thread.is_alive()
    assert len(errors) == 1
    client.close()


def test_sleep_frees_cache_and_weights(tiny_llama: Path) -> None:
    engine = make_engine(tiny_llama)
    cache, model = weakref.ref(engine.runner.kv_cache), weakref.ref(engine.runner.model)
    Order(Sleep(1)).run(engine)
    gc.collect()
    assert cache() is None
    assert model() is engine.resting_model  # on a CPU it lies in host memory as it is
    Order(Sleep(2)).run(engine)
    gc.collect()
    assert model() is None
    Order(Wake()).run(engine)
    assert engine.runner.kv_cache is not None
    assert not engine.asleep
    Order(Sleep(1)).run(engine)
    assert engine.close() == []
