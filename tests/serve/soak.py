"""A long run against faults: `python -m tests.serve.soak --seconds 600` prints what was seen, exit 1 where it is no good.

Clients without patience, bodies that are none, a cache too small for its batch, and in the end an engine that is killed.
The server is the command's own, a process beside its engine's; it is only known by what it answers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmdeploy.bench.process_memory import rss_bytes
from lmdeploy.bench.serving_figures import percentile
from lmdeploy.bench.serving_http import ConnectionBroken, HttpClient
from lmdeploy.messages import TurbomindEngineConfig
from lmdeploy.serve.launch import serve
from tests.serve.test_fuzz import EVIL
from tests.tiny_model import make_tiny_llama

NUM_BLOCKS, BLOCK_SIZE, BATCH = 36, 16, 8
SLOWEST_S = 60.0
MAX_RSS_GROWTH = 0.05
CONFIG = TurbomindEngineConfig(
    dtype="float32",
    cache_max_entry_count=NUM_BLOCKS,
    cache_block_seq_len=BLOCK_SIZE,
    max_batch_size=BATCH,
    enable_prefix_caching=True,
)
# The end of what a stream's kind promises.
ENDS = {
    "/v1/chat/completions": b"data: [DONE]\n\n",
    "/v1/completions": b"data: [DONE]\n\n",
    "/generate": b"data: [DONE]\n\n",
    "/v1/messages": b'"type":"message_stop"}\n\n',
}
_TYPED_ERROR = re.compile(rb'"error":\{[^{}]*"type":"(\w+)"|"type":"(\w+)","param"')


@dataclass
class Seen:
    """outcomes: how many requests met what. faults: what must not be. rss_bytes: of the server and its engine, by second."""

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    rss_bytes: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    health: list[tuple[float, int, float]] = field(default_factory=list)
    free_share: float = 0.0
    num_preemptions: float = 0.0
    killed_at: float = 0.0

    @property
    def death_told_s(self) -> float:
        """From the engine's death to the first 503 of /health."""
        told = [when for when, status, _ in self.health if status == 503]
        return told[0] - self.killed_at if told else float("inf")

    def rss_growth(self, settled_s: float) -> dict[str, float]:
        """The largest resident set after the first so many seconds, against the one at that time."""
        growth = {}
        for name, values in self.rss_bytes.items():
            after = [size for when, size in values if when >= settled_s]
            growth[name] = max(after) / after[0] - 1 if after else float("inf")
        return growth


def run_soak(model: Path, seconds: float, settled_s: float, num_clients: int = 32, seed: int = 0) -> Seen:
    """The whole run; `seconds` of load before the engine is killed. settled_s: until memory should stay as it is."""
    seen = Seen()
    with _served(model) as (url, server):
        asyncio.run(_Soak(url, server, seen, random.Random(seed)).run(seconds, num_clients))
    growth = seen.rss_growth(settled_s)
    seen.faults += [f"the {name} grew by {share:.1%}" for name, share in growth.items() if share > MAX_RSS_GROWTH]
    return seen


@contextmanager
def _served(model: Path) -> Iterator[tuple[str, int]]:
    """The address and the process id of a server."""
    with serve(str(model), "tiny", backend_config=CONFIG, server_port=0, log_level="CRITICAL") as served:
        yield served.api_server_url, served.process.pid


class _Soak:
    def __init__(self, url: str, server: int, seen: Seen, generator: random.Random) -> None:
        self._url = url
        self._processes = {"server": server, "engine": _engine_of(server)}
        self._seen = seen
        self._random = generator
        self._started = time.monotonic()
        self._is_killed = False

    async def run(self, seconds: float, num_clients: int) -> None:
        watchers = [asyncio.create_task(watch()) for watch in (self._watch_health, self._watch_memory)]
        await self._load(seconds, num_clients)
        await self._check_all_free()
        watchers.pop().cancel()
        await asyncio.gather(self._load(4.0, num_clients), self._kill_engine(1.0))
        watchers.pop().cancel()
        await self._check_dead()

    async def _load(self, seconds: float, num_clients: int) -> None:
        end = time.monotonic() + seconds
        generators = [random.Random(self._random.random()) for _ in range(num_clients)]
        await asyncio.gather(*(self._behave(generator, end) for generator in generators))

    async def _behave(self, generator: random.Random, end: float) -> None:
        client = HttpClient(self._url)
        while time.monotonic() < end:
            kind = generator.choices((self._ask, self._leave, self._send_nonsense, self._break_off), (70, 15, 12, 3))[0]
            await kind(client, generator)
            # Not all of them come at once, and a dead server is not asked in a busy loop.
            await asyncio.sleep(generator.expovariate(20.0))
        await client.close()

    async def _ask(self, client: HttpClient, generator: random.Random) -> None:
        """A request that waits for its end."""
        path, body = _request(generator)
        await self._judge(client, path, json.dumps(body).encode(), bool(body["stream"]))

    async def _leave(self, client: HttpClient, generator: random.Random) -> None:
        """A client that goes away at some time, mostly amid its answer."""
        path, body = _request(generator)
        waiting = self._judge(client, path, json.dumps(body).encode(), bool(body["stream"]))
        try:
            await asyncio.wait_for(waiting, generator.uniform(0.0, 0.6))
        except asyncio.TimeoutError:
            self._seen.outcomes["left by the client"] += 1

    async def _send_nonsense(self, client: HttpClient, generator: random.Random) -> None:
        path, body = _request(generator)
        evil = generator.choice([*EVIL.values(), b', "temperature": -3', b', "max_tokens": -1', b', "model": "other"'])
        await self._judge(client, path, json.dumps(body).encode()[:-1] + evil + b"}", bool(body["stream"]))

    async def _break_off(self, client: HttpClient, generator: random.Random) -> None:
        """Half a request, or what is no HTTP, and then nothing more."""
        half = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 999\r\n\r\n{"
        host, port = client.address.host, client.address.port
        _, writer = await asyncio.open_connection(host, port)
        writer.write(generator.choice([half, half[:30], b"\x16\x03\x01\x02\x00", b"GET /\r\n"]))
        await asyncio.sleep(generator.uniform(0.0, 0.3))
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
        self._seen.outcomes["broken off by the client"] += 1

    async def _judge(self, client: HttpClient, path: str, body: bytes, is_stream: bool) -> None:
        """Send, and note what came: an answer, an error with a type, or a fault."""
        got = bytearray()
        try:
            exchange = client.request("POST", path, body, lambda data, _: got.extend(data))
            status = await asyncio.wait_for(exchange, SLOWEST_S)
        except asyncio.CancelledError:
            raise
        except asyncio.TimeoutError:
            self._fault(f"no answer within {SLOWEST_S:g} s: {path} {body[:200]!r}")
        except (OSError, ConnectionBroken) as error:
            self._fault(f"{type(error).__name__} {error}: {path} {body[:200]!r}")
        else:
            self._note(path, status, bytes(got), is_stream)

    def _note(self, path: str, status: int, got: bytes, is_stream: bool) -> None:
        found = _TYPED_ERROR.search(got[-2000:])
        error = (found[1] or found[2]).decode() if found else ""
        if status == 200 and not error:
            is_whole = got.endswith(ENDS[path]) if is_stream else got.endswith(b"}")
            if is_whole:
                self._seen.outcomes["answered"] += 1
            else:
                self._fault(f"{path}: no end: {got[-200:]!r}")
        elif (
            not error or status not in (200, 400, 404, 422, 429, 503) or (status in (200, 503) and not self._is_killed)
        ):
            self._fault(f"{path}: status {status}: {got[-300:]!r}")
        else:
            self._seen.outcomes[f"{status} {error}"] += 1

    def _fault(self, text: str) -> None:
        self._seen.faults.append(f"at {time.monotonic() - self._started:.1f} s: {text}")

    async def _watch_health(self) -> None:
        """Every tenth of a second; what it says is right until the kill, and 2 s after it."""
        client = HttpClient(self._url)
        while True:
            asked = time.monotonic()
            try:
                exchange = client.request("GET", "/health", b"", lambda data, when: None)
                status = await asyncio.wait_for(exchange, 10.0)
            except (OSError, ConnectionBroken, asyncio.TimeoutError) as error:
                self._fault(f"/health: {type(error).__name__} {error}")
                continue
            now = time.monotonic()
            self._seen.health.append((now, status, now - asked))
            if status != 200 and not self._is_killed:
                self._fault(f"/health says {status} though all is well")
            if status == 200 and self._is_killed and asked > self._seen.killed_at + 2.0:
                self._fault("/health says 200 though the engine is dead")
            await asyncio.sleep(0.1)

    async def _watch_memory(self) -> None:
        while True:
            for name, number in self._processes.items():
                size = rss_bytes(number)
                self._seen.rss_bytes.setdefault(name, []).append((time.monotonic() - self._started, size))
            await asyncio.sleep(1.0)

    async def _check_all_free(self) -> None:
        """With nobody there, every block is free within 5 s; the engine's news come twice a second."""
        client = HttpClient(self._url)
        for _ in range(50):
            metrics = await _metrics(client)
            self._seen.free_share = 1 - metrics["gpu_cache_usage_perc"]
            self._seen.num_preemptions = metrics["num_preemptions"]
            if self._seen.free_share == 1.0 and not metrics["num_requests_running"] + metrics["num_requests_waiting"]:
                break
            await asyncio.sleep(0.1)
        else:
            self._fault(f"with nobody there: {metrics}")
        await client.close()

    async def _kill_engine(self, after_s: float) -> None:
        await asyncio.sleep(after_s)
        self._is_killed, self._seen.killed_at = True, time.monotonic()
        os.kill(self._processes["engine"], signal.SIGKILL)

    async def _check_dead(self) -> None:
        """The process lives on and says what it knows."""
        client = HttpClient(self._url)
        for path, expected in (("/health/live", 200), ("/health/ready", 503), ("/health", 503)):
            status = await client.request("GET", path, b"", lambda data, when: None)
            if status != expected:
                self._fault(f"{path} says {status} of a dead engine")
        await client.close()
        if self._seen.death_told_s > 2.0:
            self._fault(f"/health told of the engine's death after {self._seen.death_told_s:.1f} s")


def _request(generator: random.Random) -> tuple[str, dict[str, Any]]:
    """A sound request of a random kind; some ask for more than there is."""
    path = generator.choice([*ENDS])
    text = " ".join(
        generator.choices(("the river", "a mill", "runs", "past", "under", "the bridge"), k=generator.randint(1, 30))
    )
    body: dict[str, Any] = {
        "model": "tiny",
        "stream": generator.random() < 0.6,
        "max_tokens": generator.choice((1, 8, 40, 150)),
        "temperature": generator.choice((0.0, 1.0)),
    }
    if path == "/v1/messages" or path.startswith("/v1/chat"):
        body["messages"] = [{"role": "user", "content": text}]
    else:
        body["prompt"] = text
    if path != "/v1/messages":
        body["ignore_eos"] = generator.random() < 0.7
        body["stop"] = generator.choice(("z", "ver", "q"))
    if path.startswith("/v1/c"):
        body["n"] = generator.choice((1, 1, 1, 2, 4))
        body["seed"] = generator.randint(0, 9)
    if path == "/v1/completions" and generator.random() < 0.2:
        body |= {"echo": True, "logprobs": 2, "stream": False}
    if path == "/v1/chat/completions" and generator.random() < 0.1:
        body["response_format"] = {"type": "json_object"}
    return path, body


async def _metrics(client: HttpClient) -> dict[str, float]:
    """Values of /metrics by name, without what is before the colon."""
    got = bytearray()
    await client.request("GET", "/metrics", b"", lambda data, when: got.extend(data))
    lines = [line.rsplit(" ", 1) for line in got.decode().splitlines() if line.startswith("lmdeploy:")]
    return {name.partition(":")[2].partition("{")[0]: float(value) for name, value in lines}


def _engine_of(server: int) -> int:
    """The process id of a server's engine."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == server and b"lmdeploy.engine.process" in (folder / "cmdline").read_bytes():
                return int(folder.name)
    raise RuntimeError(f"process {server} has no engine")


def report(seen: Seen, settled_s: float) -> dict[str, Any]:
    """What a run has seen, in numbers."""
    waits = [seconds for _, _, seconds in seen.health]
    return {
        "outcomes": dict(seen.outcomes.most_common()),
        "faults": seen.faults,
        "free_share": seen.free_share,
        "num_preemptions": seen.num_preemptions,
        "rss_growth": {name: round(share, 4) for name, share in seen.rss_growth(settled_s).items()},
        "rss_mib": {name: [round(size / 2**20, 1) for _, size in values[:: max(len(values) // 12, 1)]]
                    for name, values in seen.rss_bytes.items()},
        "health_asked": len(waits),
        "health_p50_s": round(percentile(waits, 50), 4),
        "health_p99_s": round(percentile(waits, 99), 4),
        "death_told_s": round(seen.death_told_s, 3),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    settled_s = min(60.0, args.seconds / 2)
    with tempfile.TemporaryDirectory() as folder:
        seen = run_soak(make_tiny_llama(Path(folder)), args.seconds, settled_s, args.clients, args.seed)
    print(json.dumps(report(seen, settled_s), indent=2))
    return 1 if seen.faults else 0


if __name__ == "__main__":
    sys.exit(main())
