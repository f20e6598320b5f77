"""The one way of every endpoint to the engine: names, admission, tenants, metrics, health. It knows no HTTP."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from lmdeploy.async_engine import AsyncEngine, Prompt
from lmdeploy.chat_template.base import DEFAULT_OPTIONS, RenderOptions
from lmdeploy.engine.control import TAGS, Sleep, UpdateWeights, Wake
from lmdeploy.errors import EngineDead, InvalidParameter, RequestError
from lmdeploy.messages import GenerationConfig, Response
from lmdeploy.serve.errors import AnswerFailed, Draining, Overloaded, Sleeping, UnknownModel
from lmdeploy.serve.metrics import Metrics
from lmdeploy.serve.parsers.formats import AnswerFormats
from lmdeploy.serve.response_store import ResponseStore
from lmdeploy.serve.sessions import Sessions
from lmdeploy.serve.settings import ServerSettings

_QUEUED_BATCHES = 8
_QUEUED_CACHES = 4


@dataclass(frozen=True)
class Job:
    """Prompts and how to answer each. tenant: whose prefix cache they may share. session_id: by which it may be aborted.

    Response.index of the answers counts prompt by prompt, `config.n` answers for each.
    """

    prompts: Sequence[Prompt]
    config: GenerationConfig
    do_preprocess: bool = True
    options: RenderOptions = DEFAULT_OPTIONS
    tenant: str = ""
    is_streaming: bool = False
    session_id: int | None = None


@dataclass(eq=False)
class _Work:
    """A job in the engine. num_tokens: of its prompts, as far as they are known. num_routed: answers that the engine has been
    asked for. names: of the prompts.
    """

    job: Job
    names: list[str] = field(default_factory=list)
    num_tokens: int = 0
    num_routed: int = 0
    is_aborted: bool = False

    def request_ids(self) -> list[str]:
        """As the engine has them."""
        n = self.job.config.n
        return self.names if n == 1 else [f"{name}-{number}" for name in self.names for number in range(n)]


class Service:
    """A served model: the engine, and what all its clients share."""

    def __init__(self, engine: AsyncEngine, settings: ServerSettings) -> None:
        self.engine = engine
        self.settings = settings
        self.metrics = Metrics(settings.model_name, self._stats, _backend(engine))
        self.created = int(time.time())
        self.max_active = settings.max_concurrent_requests or _QUEUED_BATCHES * engine.client.info.max_batch_size
        info = engine.client.info
        self.max_tokens = settings.max_queued_tokens or _QUEUED_CACHES * info.num_blocks * info.block_size
        self.num_active = 0
        self.num_tokens = 0
        self.num_routed = 0
        self.is_draining = False
        self.asleep: frozenset[str] = frozenset()
        self.formats = AnswerFormats(engine, settings.tool_call_parser, settings.reasoning_parser)
        self.responses = ResponseStore()
        self.sessions = Sessions()
        self._works: set[_Work] = set()

    def check_model(self, name: str | None) -> None:
        """Raise UnknownModel unless the name, if one is given, is that of the served model."""
        if name is not None and name != self.settings.model_name:
            raise UnknownModel(
                f"the model {name[:200]!r} is not served here; there is {self.settings.model_name!r} (GET /v1/models)"
            )

    def problem(self) -> str | None:
        """Why no request can be answered; None if all is well. Draining is no such reason."""
        try:
            stats = self.engine.client.stats()
        except EngineDead:
            return "the engine has stopped"
        age = stats.get("heartbeat_age_s", 0.0)
        if age > self.settings.heartbeat_timeout_s:
            return f"the engine has made no step for {age:.0f} seconds"
        return None

    def abort_all(self, session_id: int | None = None) -> int:
        """End all jobs, or those of a session, whoever's they are; their answers end with 'abort'. Returns how many."""
        works = [work for work in self._works if session_id is None or work.job.session_id == session_id]
        for work in works:
            self._abort(work)
        return len(works)

    def cancel(self, tenant: str, session_id: int) -> None:
        """End a tenant's jobs of this session; -1 is none."""
        for work in self._works:
            if session_id != -1 and (work.job.tenant, work.job.session_id) == (tenant, session_id):
                self._abort(work)

    async def sleep(self, level: int) -> None:
        """Give the engine's memory back; what runs is aborted, and nothing new is taken until it is woken."""
        before, self.asleep = self.asleep, TAGS
        try:
            await asyncio.to_thread(self.engine.client.control, Sleep(level))
        except BaseException:
            self.asleep = before
            raise

    async def wake(self, tags: frozenset[str]) -> None:
        await asyncio.to_thread(self.engine.client.control, Wake(sorted(tags)))
        self.asleep -= tags

    async def update_weights(self, path: Path) -> None:
        """Replace the weights by those of a folder below the one that the settings allow."""
        allowed = self.settings.weights_dir
        if allowed is None:
            raise InvalidParameter("the server was started without --weights-dir, below which new weights have to lie")
        real = await asyncio.to_thread(_folder_below, allowed, path)
        if real is None:
            raise InvalidParameter(f"{str(path)[:300]!r} is no folder below the server's --weights-dir")
        await asyncio.to_thread(self.engine.client.control, UpdateWeights(str(real)))

    async def answer(self, job: Job) -> AsyncGenerator[Response, None]:
        """The Responses of all the job's answers, as they come.

        Raises RequestError, Overloaded, Draining and EngineDead, and AnswerFailed where the engine failed on one of them;
        closing the iterator, or cancelling the task that runs it, aborts what is left.
        """
        count = len(job.prompts) * job.config.n
        self._admit(count)
        timer = self.metrics.timer(job.is_streaming)
        num_ended = 0
        work = _Work(job, [uuid.uuid4().hex for _ in job.prompts])
        self._works.add(work)
        streams = [self._generate(work, number) for number in range(len(job.prompts))]
        try:
            async with aclosing(streams[0] if len(streams) == 1 else _merge(streams)) as responses:
                async for response in responses:
                    timer.observe(response)
                    if work.is_aborted:
                        self._abort(work)
                    if response.finish_reason is not None:
                        num_ended += 1
                        self.num_active -= 1
                        self.num_routed -= 1
                    if response.finish_reason == "error":
                        raise _failure(response)
                    yield response
        except (RequestError, EngineDead):
            self.metrics.failed.inc(count - num_ended)
            raise
        finally:
            self.num_active -= count - num_ended
            self.num_routed -= work.num_routed - num_ended
            self.num_tokens -= work.num_tokens
            self._works.discard(work)

    async def collect(self, job: Job) -> list[Response]:
        """Every answer whole, in order of index."""
        async with aclosing(self.answer(replace(job, is_streaming=False))) as responses:
            return sorted([response async for response in responses], key=lambda response: response.index)

    def _admit(self, count: int) -> None:
        if self.is_draining:
            raise Draining("the server is shutting down; ask another one, or ask again later")
        if self.asleep:
            raise Sleeping("the engine sleeps; ask again later")
        if count > self.max_active:
            raise InvalidParameter(f"the request asks for {count} answers; this server takes {self.max_active} at once")
        if self.num_active + count > self.max_active:
            raise Overloaded(
                f"{self.num_active} answers are in work or waiting, at most {self.max_active}; ask again later"
            )
        self.num_active += count

    def _admit_tokens(self, work: _Work, count: int) -> None:
        """A prompt of `count` tokens joins the work; a lone one always does, whatever the bound."""
        if work.num_tokens and work.num_tokens + count > self.max_tokens:
            raise InvalidParameter(
                f"the request's prompts have more than {self.max_tokens:,} tokens, which this server takes at once; send "
                "fewer of them"
            )
        if self.num_tokens > work.num_tokens and self.num_tokens + count > self.max_tokens:
            raise Overloaded(
                f"prompts of {self.num_tokens:,} tokens are in work or waiting, at most {self.max_tokens:,}; ask again later"
            )
        work.num_tokens += count
        self.num_tokens += count
        work.num_routed += work.job.config.n
        self.num_routed += work.job.config.n

    def _stats(self) -> dict[str, float]:
        waiting = self.num_active - self.num_routed
        return {**self.engine.client.stats(), "num_api_routed": self.num_routed, "num_api_waiting": waiting}

    def _abort(self, work: _Work) -> None:
        """Also of what the engine does not have yet: with its first Response this is asked again."""
        work.is_aborted = True
        for request_id in work.request_ids():
            self.engine.client.abort(request_id)

    async def _generate(self, work: _Work, number: int) -> AsyncGenerator[Response, None]:
        job = work.job
        responses = self.engine.generate(
            job.prompts[number],
            job.config,
            do_preprocess=job.do_preprocess,
            options=job.options,
            cache_salt=job.tenant,
            is_streaming=job.is_streaming,
            request_id=work.names[number],
            admit=partial(self._admit_tokens, work),
        )
        async with aclosing(responses):
            async for response in responses:
                yield replace(response, index=number * job.config.n + response.index) if number else response


def _folder_below(allowed: Path, path: Path) -> Path | None:
    """The folder that the path leads to, links followed; None unless it lies below the allowed one."""
    try:
        real = (allowed / path).resolve()
        is_below = real.is_relative_to(allowed.resolve()) and real.is_dir()
    except (OSError, ValueError, RuntimeError):  # a null byte, a loop of links
        return None
    return real if is_below else None


def _backend(engine: AsyncEngine) -> dict[str, object]:
    info = engine.client.info
    names = ("architecture", "dtype", "device", "session_len", "max_batch_size", "num_blocks", "block_size")
    return {name: getattr(info, name) for name in names}


def _failure(response: Response) -> Exception:
    kind = RequestError if response.error_code == 400 else AnswerFailed
    return kind(response.error_message or "the answer failed")


async def _merge(streams: Sequence[AsyncGenerator[Response, None]]) -> AsyncGenerator[Response, None]:
    """What all the streams give, as it comes; the first error ends them all."""
    inbox: asyncio.Queue[Response | Exception | None] = asyncio.Queue()

    async def pump(stream: AsyncGenerator[Response, None]) -> None:
        try:
            async with aclosing(stream):
                async for response in stream:
                    inbox.put_nowait(response)
            inbox.put_nowait(None)
        except Exception as error:
            inbox.put_nowait(error)

    tasks = [asyncio.ensure_future(pump(stream)) for stream in streams]
    try:
        num_open = len(tasks)
        while num_open:
            item = await inbox.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
