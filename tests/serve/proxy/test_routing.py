"""The strategies: whom they choose, how they spread a load, and what the one that knows prefixes is worth."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest

from benchmarks.proxy_routing import Load, simulate
from lmdeploy.serve.proxy.node import LATENCY_AGE_S, LATENCY_WINDOW, Node
from lmdeploy.serve.proxy.routing import STRATEGIES, Strategy, node_of_session, speeds
from lmdeploy.serve.proxy.settings import ProxySettings

LONG = tuple(f"chunk {number}".encode() for number in range(8))


def make(name: str, **settings: float) -> Strategy:
    return STRATEGIES[name](ProxySettings(strategy=name, **settings), random.Random(0))  # type: ignore[arg-type]


def make_nodes(*speeds: float | None) -> list[Node]:
    return [Node(f"http://n{number}", ["m"], speed) for number, speed in enumerate(speeds)]


def counts(strategy: Strategy, nodes: Sequence[Node], times: int = 1000) -> list[int]:
    chosen = Counter(strategy.choose(nodes, ()).url for _ in range(times))
    return [chosen[node.url] for node in nodes]


def test_random_is_weighted_by_speed() -> None:
    slow, fast, unknown = counts(make("random"), make_nodes(1, 3, None), 4000)
    assert slow == pytest.approx(4000 / 6, rel=0.15)
    assert fast == pytest.approx(4000 / 2, rel=0.15)
    assert unknown == pytest.approx(4000 / 3, rel=0.15)


def test_speeds_nobody_has_told() -> None:
    assert speeds(make_nodes(None, None)) == [1.0, 1.0]
    assert speeds(make_nodes(2, None, 4)) == [2, 3.0, 4]


def test_min_expected_latency_counts_requests_for_the_speed() -> None:
    nodes = make_nodes(1, 4)
    strategy = make("min_expected_latency")
    for _ in range(50):
        strategy.choose(nodes, ()).unfinished += 1
    assert [node.unfinished for node in nodes] == [10, 40]
    assert min(counts(strategy, make_nodes(None, None, None))) > 250  # equals share


def test_min_observed_latency_takes_the_mean_of_the_last() -> None:
    now = [0.0]
    quick, slow = (Node(url, ["m"], clock=lambda: now[0]) for url in ("http://quick", "http://slow"))
    strategy = make("min_observed_latency")
    assert min(counts(strategy, [quick, slow])) > 400
    slow.observe(0.1)
    assert strategy.choose([quick, slow], ()) is quick  # nothing is known of it yet
    quick.observe(5.0)
    assert strategy.choose([quick, slow], ()) is slow
    for _ in range(LATENCY_WINDOW):
        quick.observe(0.05)
    assert strategy.choose([quick, slow], ()) is quick
    assert len(quick.latencies()) == LATENCY_WINDOW
    now[0] = LATENCY_AGE_S / 2
    quick.observe(9.0)
    now[0] = LATENCY_AGE_S + 1
    assert slow.latencies() == []  # it is given another chance
    assert strategy.choose([quick, slow], ()) is slow


def test_cache_aware_goes_where_the_beginning_went() -> None:
    nodes, strategy = make_nodes(None, None, None), make("cache_aware")
    home = strategy.choose(nodes, LONG)
    assert {strategy.choose(nodes, (*LONG, b"more", bytes([n]))) for n in range(20)} == {home}
    home.unfinished = 8
    assert strategy.choose(nodes, LONG) is home  # not yet too much
    home.unfinished = 9
    other = strategy.choose(nodes, LONG)
    assert other is not home
    home.unfinished = 0
    assert strategy.choose(nodes, LONG) is home  # having helped out does not move a prefix


def test_the_bound_is_of_a_ratio_and_of_an_excess() -> None:
    nodes, strategy = make_nodes(None, None), make("cache_aware", max_load_ratio=2.0, max_load_excess=3)
    home = strategy.choose(nodes, LONG)
    other = next(node for node in nodes if node is not home)
    for load, elsewhere, expected in ((3, 0, home), (4, 0, other), (8, 4, home), (9, 4, other)):
        home.unfinished, other.unfinished = load, elsewhere
        strategy.choose(nodes, LONG)
        assert strategy.choose(nodes, LONG) is expected, (load, elsewhere)
        for _ in range(20):
            home.unfinished, other.unfinished = 0, 0
            strategy.choose([home], LONG)


def test_a_fast_node_may_have_more_to_do() -> None:
    slow, fast = make_nodes(1, 4)
    strategy = make("cache_aware", max_load_excess=3)
    strategy.choose([fast], LONG)
    fast.unfinished = 4  # as 2.5 are at a node of the mean speed
    assert strategy.choose([slow, fast], LONG) is fast
    fast.unfinished = 5
    assert strategy.choose([slow, fast], LONG) is slow


def test_new_prefixes_divide_among_the_nodes() -> None:
    nodes, strategy = make_nodes(None, None, None, None), make("cache_aware")
    chosen = Counter(
        strategy.choose(nodes, tuple(f"{number} {chunk}".encode() for chunk in range(8))).url for number in range(100)
    )
    assert [chosen[node.url] for node in nodes] == [25] * 4


def test_a_beginning_that_all_share_binds_nobody() -> None:
    """A system text before long questions: each question is new, and they spread."""
    nodes, strategy = make_nodes(None, None, None, None), make("cache_aware")
    shared = LONG[:3]
    chosen = Counter(
        strategy.choose(nodes, (*shared, *(f"{number} {chunk}".encode() for chunk in range(8)))).url
        for number in range(100)
    )
    assert min(chosen.values()) >= 20


def test_what_a_lost_node_cached_is_forgotten() -> None:
    nodes, strategy = make_nodes(None, None), make("cache_aware")
    home = strategy.choose(nodes, LONG)
    strategy.forget(home)
    other = next(node for node in nodes if node is not home)
    strategy.choose([other], LONG)
    assert strategy.choose(nodes, LONG) is other


def test_short_prompts_go_to_the_least_loaded() -> None:
    nodes, strategy = make_nodes(None, None, None), make("cache_aware")
    nodes[0].unfinished = nodes[1].unfinished = 1
    assert counts(strategy, nodes, 50) == [0, 0, 50]


def test_a_session_stays_while_others_come_and_go() -> None:
    nodes = make_nodes(*[None] * 5)
    homes = {f"{number}": node_of_session(nodes, f"{number}") for number in range(500)}
    assert min(Counter(node.url for node in homes.values()).values()) > 60
    fewer = nodes[1:]
    assert all(node_of_session(fewer, name) is node for name, node in homes.items() if node is not nodes[0])


@pytest.mark.parametrize("seed", [0, 1])
def test_four_servers_that_cache_a_quarter_each(seed: int) -> None:
    load = Load(num_requests=2500, seed=seed)
    aware, blind = simulate("cache_aware", load), simulate("random", load)
    assert aware.hit_rate >= 0.75
    assert aware.hit_rate >= 1.7 * blind.hit_rate
    assert 0.2 < blind.hit_rate < 0.3  # a cache of a quarter finds a quarter
    assert aware.mean_gap < blind.mean_gap  # the bound holds
    assert simulate("cache_aware", load) == aware
