"""Clients at the edges of their lives: closing, dying, forked, flooded. Every waiter hears the end of its request, once."""

from __future__ import annotations

import os
import queue
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from lmdeploy.engine import process, wire
from lmdeploy.engine.client import EngineClient, ThreadClient
from lmdeploy.engine.config import EngineConfig
from lmdeploy.engine.core import Engine
from lmdeploy.engine.loop import EngineLoop
from lmdeploy.engine.process import ProcessClient
from lmdeploy.engine.request import RequestOutput
from lmdeploy.errors import EngineDead, LMDeployError, RequestError
from tests.engine.driver import greedy

CONFIG = EngineConfig(dtype="float32", device="cpu", cache_max_entry_count=64, block_size=16)
CLIENTS = pytest.mark.parametrize("kind", [ThreadClient, ProcessClient])


def last_output(news: queue.SimpleQueue[RequestOutput]) -> RequestOutput:
    while not (output := news.get(timeout=20)).is_finished:
        pass
    return output


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_threads_that_submit_abort_and_close(tiny_llama: Path, seed: int, in_flight: int) -> None:
    """Each accepted request ends exactly once, whoever closes the client and when."""
    config = EngineConfig(
        dtype="float32", device="cpu", cache_max_entry_count=20, block_size=16, max_batch_size=4,
        max_prefill_token_num=16, enable_prefix_caching=True, max_steps_in_flight=in_flight,
    )  # fmt: skip
    client = ThreadClient(tiny_llama, config)
    accepted: list[str] = []
    ends: Counter[str] = Counter()

    def deliver(output: RequestOutput) -> None:
        if output.is_finished:
            ends[output.request_id] += 1
        elif output.request_id.endswith("7"):
            client.abort(output.request_id)
        elif output.request_id.endswith("9"):
            raise ValueError("a broken receiver")

    def work(number: int) -> None:
        rng = random.Random(seed * 100 + number)
        for turn in range(30):
            name = f"{number}-{turn}"
            try:
                client.submit(greedy(name, [rng.randrange(4)] * rng.randrange(1, 60), rng.randrange(20)), deliver)
            except EngineDead:
                return
            accepted.append(name)
            if rng.random() < 0.3:
                client.abort(f"{number}-{rng.randrange(turn + 1)}")
            if rng.random() < 0.02:
                client.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    client.close()
    assert len(accepted) > 8
    assert ends == Counter(accepted)
    assert client.stats()["num_running"] == 0


@CLIENTS
def test_a_receiver_may_close_the_client(tiny_llama: Path, kind: type) -> None:
    client = kind(tiny_llama, CONFIG)
    news: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
    client.submit(greedy("other", [1], 200), news.put)
    client.submit(greedy("closing", [2], 200), lambda output: client.close())
    assert last_output(news).request_id == "other"
    client.close()


def test_a_request_that_comes_while_the_engine_closes_is_answered(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    news: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
    loop = EngineLoop(tiny_llama, CONFIG, lambda outputs: [news.put(output) for output in outputs])
    close = Engine.close

    def close_late(engine: Engine) -> list[RequestOutput]:
        loop.add(greedy("late", [1]))
        return close(engine)

    monkeypatch.setattr(Engine, "close", close_late)
    loop.close()
    assert isinstance(last_output(news).error, EngineDead)


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("place", ["add", "step"])
def test_whatever_ends_the_thread_is_told(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], place: str
) -> None:
    client = ThreadClient(tiny_llama, CONFIG)

    def fail(*args: object) -> None:
        raise error("the end")

    monkeypatch.setattr(Engine, place, fail)
    news: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
    client.submit(greedy("r", [1]), news.put)
    assert isinstance(last_output(news).error, EngineDead)
    client.close()


@CLIENTS
def test_counters_are_there_at_once_and_an_idle_engine_is_alive(tiny_llama: Path, kind: type) -> None:
    client = kind(tiny_llama, CONFIG)
    assert client.stats()["num_free_blocks"] == 64
    time.sleep(1.2)
    assert client.stats()["heartbeat_age_s"] < 1.0
    client.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_is_told_that_it_has_no_engine(tiny_llama: Path) -> None:
    client = ThreadClient(tiny_llama, CONFIG)
    child = os.fork()
    if child == 0:
        try:
            client.submit(greedy("r", [1]), print)
        except EngineDead:
            os._exit(7)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    client.close()


def test_an_answer_too_large_to_send_fails_alone(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    server = threading.Thread(target=process.serve, args=(theirs,))
    server.start()
    connection = wire.Connection(ours, wire.FromEngine)
    connection.send(wire.Start(str(tiny_llama), CONFIG))
    assert isinstance(connection.receive(), wire.Ready)
    monkeypatch.setattr(wire, "_MAX_FRAME_BYTES", 20_000)  # 13 rows of logits
    connection.send(wire.Submit(greedy("large", [1] * 30, 5, return_logits="all")))
    connection.send(wire.Submit(greedy("small", [1] * 3, 40)))
    ends: dict[str, RequestOutput] = {}
    while "small" not in ends:
        message = connection.receive()
        for output in message.outputs if isinstance(message, wire.Outputs) else ():
            if output.finish_reason is not None:
                ends.setdefault(output.request_id, output)
    assert ends["small"].finish_reason == "length"
    assert type(ends["large"].error) is RequestError
    connection.send(wire.Close())
    server.join(20)
    assert not server.is_alive()
    connection.close()


def test_a_reader_that_fails_tells_every_waiter(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = ProcessClient(tiny_llama, CONFIG)
    monkeypatch.setattr(client._connection, "receive", lambda: 1 / 0)
    monkeypatch.setattr(threading, "excepthook", lambda details: None)
    news: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
    client.submit(greedy("r", [1], 5), news.put)
    assert isinstance(last_output(news).error, EngineDead)
    client.close()


def test_a_process_killed_at_any_time_tells_every_waiter(tiny_llama: Path) -> None:
    for delay_s in (0.0, 0.005, 0.05):
        client: EngineClient = ProcessClient(tiny_llama, CONFIG)
        ends: Counter[str] = Counter()
        accepted: list[str] = []

        def work(
            number: int, client: EngineClient = client, ends: Counter[str] = ends, names: list[str] = accepted
        ) -> None:
            def count(output: RequestOutput) -> None:
                ends[output.request_id] += output.is_finished

            for turn in range(1000):
                try:
                    client.submit(greedy(f"{number}-{turn}", [1, 2], 200), count)
                except LMDeployError:
                    return
                names.append(f"{number}-{turn}")

        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(delay_s)
        client.process.kill()  # type: ignore[attr-defined]
        for thread in threads:
            thread.join(30)
        client.close()
        assert ends == Counter(accepted)


def test_a_script_may_end_while_the_engine_works(tiny_llama: Path) -> None:
    """The engine's thread ends before the interpreter does: one that came back from a kernel later would abort it."""
    script = (
        "import atexit, sys, threading\nfrom pathlib import Path\nfrom lmdeploy.engine.client import ThreadClient\n"
        "from tests.engine.driver import greedy\nfrom tests.engine.test_client_races import CONFIG\n"
        "atexit.register(lambda: print(threading.active_count()))\n"
        "client = ThreadClient(Path(sys.argv[1]), CONFIG)\n"
        "for number in range(8):\n    client.submit(greedy(str(number), [number] * 100, 100), lambda output: None)\n"
    )
    command = [sys.executable, "-c", script, str(tiny_llama)]
    assert subprocess.run(command, check=True, timeout=60, capture_output=True, text=True).stdout == "1\n"
