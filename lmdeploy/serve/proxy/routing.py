"""Which of several nodes gets a request: the strategies. They know loads, speeds and prefixes, and nothing of HTTP."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from typing import Protocol

from lmdeploy.serve.proxy.node import Node
from lmdeploy.serve.proxy.prefix import Prefix, PrefixIndex
from lmdeploy.serve.proxy.settings import ProxySettings


class Strategy(Protocol):
    """reads_prefix: whether `choose` looks at the prefix; if not, it may be empty."""

    reads_prefix: bool

    def choose(self, nodes: Sequence[Node], prefix: Prefix) -> Node:
        """One of the nodes, of which there is at least one; the request is then sent there."""
        ...

    def forget(self, node: Node) -> None:
        """The node has failed or left; its caches are gone."""
        ...


class Random:
    """At random, in proportion to speed."""

    reads_prefix = False

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def choose(self, nodes: Sequence[Node], prefix: Prefix) -> Node:
        return self._rng.choices(nodes, speeds(nodes))[0]

    def forget(self, node: Node) -> None:
        pass


class MinExpectedLatency:
    """The node that would have the fewest requests for its speed, this one included; among equals at random."""

    reads_prefix = False

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def choose(self, nodes: Sequence[Node], prefix: Prefix) -> Node:
        scored = [((node.unfinished + 1) / speed, node) for node, speed in zip(nodes, speeds(nodes), strict=True)]
        least = min(score for score, _ in scored)
        return self._rng.choice([node for score, node in scored if score == least])

    def forget(self, node: Node) -> None:
        pass


class MinObservedLatency:
    """The node whose last requests took the least time; one of which nothing recent is known comes first."""

    reads_prefix = False

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def choose(self, nodes: Sequence[Node], prefix: Prefix) -> Node:
        def score(node: Node) -> tuple[float, int]:
            known = node.latencies()
            # Without observations all would flock to a node until its first answer, were it not for the second item.
            return (sum(known) / len(known) if known else 0.0, node.unfinished)

        least = min(score(node) for node in nodes)
        return self._rng.choice([node for node in nodes if score(node) == least])

    def forget(self, node: Node) -> None:
        pass


class CacheAware:
    """The node that was sent the longest beginning of the prompt, unless it has too much to do.

    Too much is more than `max_ratio` times, and `max_excess` requests beyond, what the least loaded node has for its speed.
    A beginning of less than half of the prompt counts for nothing: it soon is everywhere. Prompts that are new go where the
    fewest chunks have gone, so that the nodes' caches divide the prefixes among them.
    """

    reads_prefix = True

    def __init__(self, rng: random.Random, index: PrefixIndex, max_ratio: float, max_excess: int) -> None:
        self._rng = rng
        self._index = index
        self._max_ratio = max_ratio
        self._max_excess = max_excess

    def choose(self, nodes: Sequence[Node], prefix: Prefix) -> Node:
        node = self._choose(nodes, prefix)
        self._index.record(node.url, prefix)
        return node

    def forget(self, node: Node) -> None:
        self._index.forget([node.url])

    def _choose(self, nodes: Sequence[Node], prefix: Prefix) -> Node:
        known = speeds(nodes)
        mean = sum(known) / len(known)
        loads = {node: node.unfinished * mean / speed for node, speed in zip(nodes, known, strict=True)}
        least = min(loads.values())
        limit = max(least * self._max_ratio, least + self._max_excess)
        free = [node for node in nodes if loads[node] <= limit]
        matches = {node: self._index.match(node.url, prefix) for node in nodes}
        best = max(matches.values())
        if best == 0 or 2 * best < len(prefix):
            if not prefix:
                return self._any(nodes, loads, least)
            fewest = min(self._index.size(node.url) for node in free)
            free = [node for node in free if self._index.size(node.url) == fewest]
            return self._any(free, loads, min(loads[node] for node in free))
        holders = [node for node in free if matches[node] == best]
        if not holders:
            return self._any(nodes, loads, least)
        # The one that has had it most often is its home: were the load to decide, every prefix would soon be everywhere.
        return max(holders, key=lambda node: (self._index.count(node.url, prefix[best - 1]), -loads[node]))

    def _any(self, nodes: Sequence[Node], loads: dict[Node, float], load: float) -> Node:
        return self._rng.choice([node for node in nodes if loads[node] == load])


def speeds(nodes: Sequence[Node]) -> list[float]:
    """Of each node; one that nobody has measured is as fast as the others are on average."""
    known = [node.speed for node in nodes if node.speed is not None]
    average = sum(known) / len(known) if known else 1.0
    return [average if node.speed is None else node.speed for node in nodes]


def node_of_session(nodes: Sequence[Node], session: str) -> Node:
    """The same node for the same session while the node is there (rendezvous hashing, Thaler and Ravishankar 1998)."""
    return max(nodes, key=lambda node: hashlib.blake2b(f"{session}\0{node.url}".encode(), digest_size=8).digest())


STRATEGIES: dict[str, Callable[[ProxySettings, random.Random], Strategy]] = {
    "random": lambda settings, rng: Random(rng),
    "min_expected_latency": lambda settings, rng: MinExpectedLatency(rng),
    "min_observed_latency": lambda settings, rng: MinObservedLatency(rng),
    "cache_aware": lambda settings, rng: CacheAware(
        rng, PrefixIndex(), settings.max_load_ratio, settings.max_load_excess
    ),
}
