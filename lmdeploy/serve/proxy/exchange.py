"""One request on its way to a node and back: retries, the first byte, streams without buffering. It chooses no node."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import httpx2
from starlette.types import Send

from lmdeploy.errors import InvalidParameter
from lmdeploy.serve.proxy.ask import Ask, Headers, end_to_end
from lmdeploy.serve.proxy.metrics import ProxyMetrics
from lmdeploy.serve.proxy.node import Node
from lmdeploy.serve.proxy.refusals import Refused, last_event, timed_out, unavailable
from lmdeploy.serve.proxy.registry import Registry

# A node's own word that it cannot answer: draining, a dead engine, a gateway without its server.
_ELSEWHERE = (502, 503)
_WHOLE_BYTES = 8 << 20
_MAX_EVENT_BYTES = 1 << 20


@dataclass(frozen=True)
class Whole:
    """An answer that has arrived to its last byte."""

    status: int
    headers: Headers
    body: bytes


class NodeFailed(Exception):
    """A node gave no answer, or broke one off. answer: what it said, if it said that it cannot.

    may_repeat: the connection, not the node, may be at fault, such as one kept alive for too long.
    """

    def __init__(self, reason: str, *, answer: Whole | None = None, may_repeat: bool = False) -> None:
        super().__init__(reason)
        self.answer = answer
        self.may_repeat = may_repeat


class Exchange:
    """choose(passed over) gives a node, or raises Refused where there is none left. on_first hears how the answer begins."""

    def __init__(
        self,
        ask: Ask,
        model: str,
        send: Send,
        choose: Callable[[set[Node]], Node],
        on_first: Callable[[Node, bytes], None],
        *,
        client: httpx2.AsyncClient,
        registry: Registry,
        metrics: ProxyMetrics,
        max_attempts: int,
    ) -> None:
        self._ask = ask
        self._model = model
        self._send = send
        self._choose = choose
        self._on_first = on_first
        self._client = client
        self._registry = registry
        self._metrics = metrics
        self._max_attempts = max_attempts
        self._arrived = time.monotonic()
        self._media_type: str | None = None  # of the answer, once it has begun

    async def run(self) -> None:
        """Send the client one answer. Raises Refused, before anything is sent, if no node has given one."""
        passed: set[Node] = set()
        repeated: set[Node] = set()
        failure = NodeFailed("no node")
        for attempt in range(self._max_attempts):
            try:
                node = self._choose(passed)
            except Refused:
                if attempt == 0:
                    raise
                break
            try:
                await self._attempt(node)
                return
            except NodeFailed as error:
                failure = error
            if self._media_type is not None:
                await self._end_broken(node)
                return
            self._metrics.retries.labels(node.url).inc()
            if not failure.may_repeat or node in repeated:
                passed.add(node)
            repeated.add(node)
        if failure.answer is None:
            raise unavailable("the servers of this model do not answer; ask again later") from failure
        await self._send_whole(failure.answer)

    async def _attempt(self, node: Node) -> None:
        start = time.monotonic()
        try:
            with node.working() as scope:
                status = await self._relay(node)
        except NodeFailed:
            self._registry.failed(node)
            raise
        if scope.cancelled_caught:
            raise NodeFailed("the node was lost")
        now = time.monotonic()
        if status < 400:
            node.observe(now - start)
            self._metrics.whole.labels(self._model).observe(now - self._arrived)
        self._metrics.requests.labels(self._model, node.url, status).inc()

    async def _relay(self, node: Node) -> int:
        """Ask the node and pass on what it says; the answer's status."""
        request = httpx2.Request(
            self._ask.method,
            node.url + self._ask.path,
            headers=self._ask.headers,
            content=self._ask.body,
            extensions={"timeout": self._client.timeout.as_dict()},
        )
        try:
            response = await self._client.send(request, stream=True)
            try:
                if response.status_code in _ELSEWHERE:
                    raise NodeFailed("unavailable", answer=await _whole(response))
                await self._pass_on(node, response)
                return response.status_code
            finally:
                await response.aclose()
        except httpx2.ConnectError as error:
            self._registry.failed(node, is_fatal=True)
            raise NodeFailed("nobody listens") from error
        except httpx2.ConnectTimeout as error:
            raise NodeFailed("no connection") from error
        except httpx2.TimeoutException as error:
            if self._media_type is None:
                raise timed_out(f"the server of {self._model!r} has not answered in time") from error
            raise NodeFailed("silence") from error
        except httpx2.LocalProtocolError as error:
            raise InvalidParameter("the request's headers cannot be sent on") from error
        except httpx2.HTTPError as error:
            raise NodeFailed("the connection broke", may_repeat=True) from error

    async def _pass_on(self, node: Node, response: httpx2.Response) -> None:
        """The client hears nothing before the node's first byte, of an answer of known length before its last."""
        is_short = int(response.headers.get("content-length", _WHOLE_BYTES + 1)) <= _WHOLE_BYTES
        if is_short:
            whole = await _whole(response)
            self._begins(node, whole.body)
            await self._send_whole(whole)
            return
        chunks = response.aiter_raw()
        first = await anext(chunks, b"")
        self._begins(node, first)
        await self._begin(response.status_code, end_to_end(response.headers.raw))
        is_plain_stream = self._media_type == "text/event-stream" and "content-encoding" not in response.headers
        events = EventEnds() if is_plain_stream else None
        await self._send_body(events.feed(first) if events else first)
        async for chunk in chunks:
            await self._send_body(events.feed(chunk) if events else chunk)
        await self._send_body(events.rest() if events else b"", is_last=True)

    def _begins(self, node: Node, first: bytes) -> None:
        node.breaker.succeed()
        self._on_first(node, first)
        self._metrics.first_byte.labels(self._model).observe(time.monotonic() - self._arrived)

    async def _end_broken(self, node: Node) -> None:
        """The error as the stream's last event. A body that has no such form is left without an end, which closes it."""
        self._metrics.broken.labels(node.url).inc()
        problem = unavailable("the server that gave this answer has failed midway; ask again").problem
        event = last_event(self._ask.path, self._media_type or "", problem)
        if event:
            await self._send_body(event, is_last=True)

    async def _send_whole(self, whole: Whole) -> None:
        await self._begin(whole.status, whole.headers)
        await self._send_body(whole.body, is_last=True)

    async def _begin(self, status: int, headers: Headers) -> None:
        self._media_type = dict(headers).get(b"content-type", b"").partition(b";")[0].strip().lower().decode("latin-1")
        own = [item for item in headers if item[0] != b"date"]  # the proxy's server adds its own
        await self._send({"type": "http.response.start", "status": status, "headers": own})

    async def _send_body(self, data: bytes, *, is_last: bool = False) -> None:
        if data or is_last:
            await self._send({"type": "http.response.body", "body": data, "more_body": not is_last})


class EventEnds:
    """Lets server-sent events through when they are whole, so that an error never follows half of one."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> bytes:
        data = self._rest + chunk
        cut = max(data.rfind(end) + len(end) if end in data else 0 for end in (b"\n\n", b"\r\n\r\n"))
        if len(data) - cut > _MAX_EVENT_BYTES:
            cut = len(data)
        self._rest = data[cut:]
        return data[:cut]

    def rest(self) -> bytes:
        return self._rest


async def _whole(response: httpx2.Response) -> Whole:
    """All of a short answer; of one that is longer than it said, or that says no length, so much as fits."""
    body = bytearray()
    chunks: AsyncIterator[bytes] = response.aiter_raw()
    async for chunk in chunks:
        body += chunk
        if len(body) > _WHOLE_BYTES:
            raise NodeFailed("an endless answer")
    headers = [item for item in end_to_end(response.headers.raw) if item[0] != b"content-length"]
    return Whole(response.status_code, [*headers, (b"content-length", b"%d" % len(body))], bytes(body))
