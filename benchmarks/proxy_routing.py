"""How often `serve proxy` finds a prompt's prefix cached, by routing strategy: simulated servers, the proxy's own choice.

Four servers of one model; each caches a quarter of the prefixes and drops the one used longest ago. Requests arrive at
random (Poisson) and take longer where the prefix is not cached. Nothing is sent anywhere: `python benchmarks/proxy_routing.py`.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
from collections import OrderedDict
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

from lmdeploy.serve.proxy.node import Node
from lmdeploy.serve.proxy.prefix import prefix_of
from lmdeploy.serve.proxy.routing import STRATEGIES
from lmdeploy.serve.proxy.settings import ProxySettings

HIT_S, MISS_S = 1.0, 1.6  # of one request: with the prefix cached, and with its prefill


@dataclass(frozen=True)
class Load:
    """exponent: of the prefixes' popularity, rank**-exponent; 0 makes all alike. load: mean requests in work per server."""

    num_nodes: int = 4
    num_prefixes: int = 64
    prefix_chars: int = 3000
    question_chars: int = 300
    num_requests: int = 6000
    load: float = 12.0
    exponent: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """hit_rate: share of all requests, the first of each prefix included. p95_s: of the time a request takes.

    mean_gap: requests in work at the busiest server less those at the idlest, on average over arrivals.
    """

    hit_rate: float
    mean_s: float
    p95_s: float
    mean_gap: float


class Server:
    """A node and what it caches."""

    def __init__(self, node: Node, num_cached: int) -> None:
        self.node = node
        self._num_cached = num_cached
        self._cached: OrderedDict[int, None] = OrderedDict()

    def look_up(self, prefix: int) -> bool:
        """Whether the prefix is cached; now it is."""
        is_hit = prefix in self._cached
        self._cached[prefix] = None
        self._cached.move_to_end(prefix)
        if len(self._cached) > self._num_cached:
            self._cached.popitem(last=False)
        return is_hit


def simulate(strategy: str, load: Load) -> Outcome:
    """Route `load.num_requests` requests; the same load and strategy give the same outcome."""
    rng = random.Random(load.seed)
    now = 0.0
    num_cached = load.num_prefixes // load.num_nodes
    servers = {}
    for number in range(load.num_nodes):
        node = Node(f"http://node{number}", ["m"], clock=lambda: now)
        servers[node] = Server(node, num_cached)
    router = STRATEGIES[strategy](ProxySettings(strategy=strategy), random.Random(load.seed + 1))
    texts = [_text(rng, load.prefix_chars) for _ in range(load.num_prefixes)]
    weights = [(rank + 1) ** -load.exponent for rank in range(load.num_prefixes)]
    rate = load.load * load.num_nodes / HIT_S
    running: list[tuple[float, int, Node, float]] = []
    hits, times, gaps = 0, [], []
    for number in range(load.num_requests):
        now += rng.expovariate(rate)
        while running and running[0][0] <= now:
            _, _, done, took_s = heapq.heappop(running)
            done.unfinished -= 1
            done.observe(took_s)
        which = rng.choices(range(load.num_prefixes), weights)[0]
        body = _body(texts[which], _text(rng, load.question_chars))
        node = router.choose(list(servers), prefix_of(body, "m") if router.reads_prefix else ())
        is_hit = servers[node].look_up(which)
        hits += is_hit
        node.unfinished += 1
        times.append((HIT_S if is_hit else MISS_S) * rng.uniform(0.5, 1.5))
        heapq.heappush(running, (now + times[-1], number, node, times[-1]))
        counts = [one.unfinished for one in servers]
        gaps.append(max(counts) - min(counts))
    return Outcome(hits / load.num_requests, mean(times), sorted(times)[int(0.95 * len(times))], mean(gaps))


def _text(rng: random.Random, length: int) -> str:
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz ", k=length))


def _body(system: str, question: str) -> dict[str, Any]:
    return {"messages": [{"role": "system", "content": system}, {"role": "user", "content": question}]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = []
    for exponent in (0.0, 0.6, 1.0):
        load = Load(num_requests=args.requests, exponent=exponent, seed=args.seed)
        for strategy in STRATEGIES:
            rows.append({"exponent": exponent, "strategy": strategy, **asdict(simulate(strategy, load))})
    if args.json:
        print(json.dumps(rows))
        return
    print(f"{'popularity':<12}{'strategy':<22}{'hit rate':>9}{'x random':>10}{'mean s':>8}{'p95 s':>7}{'gap':>6}")
    for row in rows:
        base = next(one for one in rows if one["exponent"] == row["exponent"] and one["strategy"] == "random")
        gain = row["hit_rate"] / base["hit_rate"]
        popularity = "all alike" if not row["exponent"] else f"rank^-{row['exponent']}"
        print(
            f"{popularity:<12}{row['strategy']:<22}{row['hit_rate']:>9.3f}{gain:>10.2f}{row['mean_s']:>8.2f}"
            f"{row['p95_s']:>7.2f}{row['mean_gap']:>6.1f}"
        )


if __name__ == "__main__":
    main()
