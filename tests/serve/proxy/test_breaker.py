"""The circuit breaker's states, with a clock of the test's own, and what a probe makes of them."""

from __future__ import annotations

import asyncio

import httpx2
import pytest

from lmdeploy.serve.proxy.breaker import CircuitBreaker
from lmdeploy.serve.proxy.node import Node
from lmdeploy.serve.proxy.registry import Registry
from lmdeploy.serve.proxy.settings import ProxySettings


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make(threshold: int = 3) -> tuple[CircuitBreaker, Clock]:
    clock = Clock()
    return CircuitBreaker(threshold, backoff_s=1.0, max_backoff_s=4.0, clock=clock), clock


def test_it_opens_after_failures_in_a_row() -> None:
    breaker, _ = make()
    assert [breaker.fail(), breaker.fail()] == [False, False]
    breaker.succeed()
    assert [breaker.fail(), breaker.fail(), breaker.fail(), breaker.fail()] == [False, False, True, False]
    assert breaker.state == "open"
    assert not breaker.admits()


def test_a_fatal_failure_opens_it_at_once() -> None:
    breaker, _ = make()
    assert breaker.fail(is_fatal=True)
    assert breaker.state == "open"


def test_the_backoff_doubles_up_to_its_limit_and_starts_anew_after_a_success() -> None:
    breaker, clock = make()
    for expected in (1.0, 2.0, 4.0, 4.0):
        breaker.fail(is_fatal=True)
        clock.now += expected - 0.01
        assert not breaker.may_retry
        clock.now += 0.01
        assert breaker.may_retry
        breaker.half_open()
        assert breaker.state == "half_open"
    breaker.succeed()
    breaker.fail(is_fatal=True)
    clock.now += 1.0
    assert breaker.may_retry


def test_failed_probes_of_an_open_breaker_delay_the_next_one() -> None:
    breaker, clock = make()
    breaker.fail(is_fatal=True)
    breaker.fail()  # stragglers that had begun before do not
    clock.now += 1.0
    assert breaker.may_retry
    assert not breaker.fail()
    assert not breaker.may_retry
    clock.now += 2.0
    assert breaker.may_retry


def test_one_trial_at_a_time() -> None:
    breaker, _ = make()
    assert not breaker.begin()
    breaker.fail(is_fatal=True)
    breaker.half_open()
    assert breaker.admits()
    assert breaker.begin()
    assert not breaker.admits()
    breaker.end()
    assert breaker.admits()
    assert breaker.begin()
    assert breaker.fail()  # one failure suffices now
    breaker.end()
    assert breaker.state == "open"


def test_an_old_success_closes_nothing() -> None:
    breaker, _ = make()
    breaker.fail(is_fatal=True)
    breaker.succeed()
    assert breaker.state == "open"
    breaker.half_open()
    breaker.succeed()
    assert breaker.state == "closed"
    breaker.half_open()
    assert breaker.state == "closed"


@pytest.mark.parametrize("fails_before", [False, True])
def test_a_probe_ends_the_backoff_only_of_failures_before_it(fails_before: bool) -> None:
    node = Node("http://127.0.0.1:1", ("m",))
    if fails_before:
        node.breaker.fail(is_fatal=True)

    def answer(request: httpx2.Request) -> httpx2.Response:
        if not fails_before:
            node.breaker.fail(is_fatal=True)  # a request fails while the probe is under way
        return httpx2.Response(200)

    async def probe() -> None:
        async with httpx2.AsyncClient(transport=httpx2.MockTransport(answer)) as client:
            await Registry(ProxySettings(), client, lambda lost: None).probe(node)

    asyncio.run(probe())
    assert node.breaker.state == ("half_open" if fails_before else "open")
