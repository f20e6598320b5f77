"""Load on a server with OpenAI's interface, and what each request met: open loop or closed loop, always streamed.

It knows no statistics. In an open loop requests come at random times of a mean rate (Poisson) whatever the server does,
and a request's clock starts when it was due, so that a late client makes no server look good (coordinated omission).
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from lmdeploy.bench.serving_http import ConnectionBroken, HttpClient
from lmdeploy.bench.serving_prompts import Ask
from lmdeploy.errors import ConfigError

Endpoint = Literal["chat", "completions"]
_PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
_KEPT_ERROR_BYTES = 4096


@dataclass(frozen=True)
class Target:
    """What is asked where. more: fields of every request. timeout_s: of a request from its start to its last byte."""

    url: str
    model: str
    endpoint: Endpoint
    api_key: str | None = None
    more: dict[str, Any] = field(default_factory=dict)
    timeout_s: float = 600.0

    def client(self) -> HttpClient:
        return HttpClient(self.url, {"Authorization": f"Bearer {self.api_key}"} if self.api_key else None)

    def body(self, ask: Ask) -> bytes:
        prompt = {"messages": ask.messages()} if self.endpoint == "chat" else {"prompt": ask.text()}
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        fields = {"model": self.model, **prompt, "max_tokens": ask.max_tokens, **stream, **self.more}
        return msgspec.json.encode(fields)


@dataclass
class Trace:
    """One request by time.perf_counter. due: when it was to start; arrivals: of the pieces that bear text.

    error: the kind, None where all went well. Tokens are the server's count, or that of the pieces where it gives none.
    """

    due: float
    sent: float = 0.0
    ended: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Run:
    """All requests of one load. cpu_share: of one core, that this process used meanwhile."""

    traces: list[Trace]
    duration_s: float
    cpu_share: float


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Any] | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None

    def has_text(self) -> bool:
        delta = self.delta
        if delta is None:
            return bool(self.text)
        return bool(delta.content or delta.reasoning_content or delta.reasoning or delta.tool_calls)


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = 0


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


class StreamReader:
    """Server-sent events into a Trace, as their bytes arrive."""

    def __init__(self, trace: Trace) -> None:
        self.is_done = False
        self.start = bytearray()  # of the body: what an error's is told from
        self._trace = trace
        self._pending = bytearray()
        self._decoder = msgspec.json.Decoder(_Chunk)

    def feed(self, data: bytes, when: float) -> None:
        if len(self.start) < _KEPT_ERROR_BYTES:
            self.start += data
        self._pending += data
        *lines, rest = self._pending.split(b"\n")
        self._pending = rest
        for line in lines:
            if line.startswith(b"data:"):
                self._read(bytes(line[5:]).strip(), when)

    def _read(self, data: bytes, when: float) -> None:
        if data == b"[DONE]":
            self.is_done = True
            return
        trace = self._trace
        try:
            chunk = self._decoder.decode(data)
        except msgspec.DecodeError:
            trace.error = trace.error or "malformed event"
            return
        if chunk.error is not None:
            trace.error = trace.error or f"in the stream: {_kind(chunk.error)}"
        if chunk.choices and any(choice.has_text() for choice in chunk.choices):
            trace.arrivals.append(when)
        if chunk.usage is not None:
            trace.prompt_tokens = chunk.usage.prompt_tokens
            trace.output_tokens = chunk.usage.completion_tokens or 0


def _kind(error: Any) -> str:
    """An error object's code, or its type."""
    if isinstance(error, dict):
        return str(error.get("code") or error.get("type") or "error")[:60]
    return str(error)[:60]


def _refusal(status: int, body: bytes) -> str:
    try:
        answer = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return str(status)
    error = answer.get("error") if isinstance(answer, dict) else None
    return f"{status} {_kind(error)}" if error else str(status)


async def ask_server(client: HttpClient, target: Target, ask: Ask, due: float | None = None) -> Trace:
    """Send one request and read its answer; what goes wrong is told by the Trace's error."""
    sent = time.perf_counter()
    trace = Trace(sent if due is None else due, sent)
    reader = StreamReader(trace)
    exchange = client.request("POST", _PATHS[target.endpoint], target.body(ask), reader.feed)
    try:
        status = await asyncio.wait_for(exchange, target.timeout_s)
    except asyncio.TimeoutError:
        trace.error = "timeout"
    except ConnectionBroken:
        trace.error = "disconnected" if reader.start else "disconnected before the answer"
    except OSError as error:
        trace.error = f"no connection: {os.strerror(error.errno) if error.errno else type(error).__name__}"
    else:
        if status != 200:
            trace.error = _refusal(status, bytes(reader.start))
        elif not reader.is_done:
            trace.error = trace.error or "the stream has no end"
    trace.ended = time.perf_counter()
    trace.output_tokens = trace.output_tokens or len(trace.arrivals)
    return trace


async def run_closed(target: Target, asks: Sequence[Ask], concurrency: int) -> Run:
    """`concurrency` clients, each of which sends its next request when its last one has ended."""
    client = target.client()
    waiting = iter(asks)

    async def work() -> list[Trace]:
        return [await ask_server(client, target, ask) for ask in waiting]

    return await _measured(client, [work() for _ in range(min(concurrency, len(asks)))])


async def run_open(target: Target, asks: Sequence[Ask], rate: float, generator: random.Random) -> Run:
    """Requests that come on their own, `rate` of them a second on average."""
    client = target.client()
    start = time.perf_counter()
    due, coroutines = start, []
    for ask in asks:
        coroutines.append(_ask_when_due(client, target, ask, due))
        due += generator.expovariate(rate)
    return await _measured(client, coroutines)


async def _ask_when_due(client: HttpClient, target: Target, ask: Ask, due: float) -> list[Trace]:
    await asyncio.sleep(due - time.perf_counter())
    return [await ask_server(client, target, ask, due)]


async def _measured(client: HttpClient, coroutines: Sequence[Coroutine[Any, Any, list[Trace]]]) -> Run:
    cpu, wall = time.process_time(), time.perf_counter()
    try:
        lists = await asyncio.gather(*coroutines)
    finally:
        await client.close()
    cpu_share = (time.process_time() - cpu) / max(time.perf_counter() - wall, 1e-9)
    traces = [trace for one in lists for trace in one]
    duration = max(trace.ended for trace in traces) - min(trace.due for trace in traces)
    return Run(traces, duration, cpu_share)


async def served_model(url: str, api_key: str | None, timeout_s: float = 30.0) -> str:
    """The first model that a server names. Raises ConfigError where it names none or does not answer."""
    client = Target(url, "", "chat", api_key).client()
    body = bytearray()
    try:
        status = await asyncio.wait_for(
            client.request("GET", "/v1/models", b"", lambda data, _: body.extend(data)), timeout_s
        )
        cards = msgspec.json.decode(bytes(body))["data"] if status == 200 else []
        if cards:
            return str(cards[0]["id"])
    except (OSError, ConnectionBroken, asyncio.TimeoutError) as error:
        raise ConfigError(f"{url} does not answer: {str(error) or type(error).__name__}") from error
    except (msgspec.DecodeError, LookupError, TypeError) as error:
        raise ConfigError(f"{url}/v1/models is no list of models; give --model-name") from error
    finally:
        await client.close()
    hint = "give --api-key" if status in (401, 403) else "give --model-name"
    raise ConfigError(f"{url}/v1/models names no model (status {status}); {hint}")
