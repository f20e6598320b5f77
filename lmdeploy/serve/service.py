"""The one way of every endpoint to the engine: names, admission, tenants, metrics, health. It knows no HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from lmdeploy.async_engine import AsyncEngine, Prompt
from lmdeploy.chat_template.base import DEFAULT_OPTIONS, RenderOptions
from lmdeploy.errors import EngineDead, InvalidParameter, RequestError
from lmdeploy.messages import GenerationConfig, Response
from lmdeploy.serve.errors import AnswerFailed, Draining, Overloaded, UnknownModel
from lmdeploy.serve.metrics import Metrics
from lmdeploy.serve.settings import ServerSettings

_QUEUED_BATCHES = 8


@dataclass(frozen=True)
class Job:
    """Prompts and how to answer each. tenant: whose prefix cache they may share.

    Response.index of the answers counts prompt by prompt, `config.n` answers for each.
    """

    prompts: Sequence[Prompt]
    config: GenerationConfig
    do_preprocess: bool = True
    options: RenderOptions = DEFAULT_OPTIONS
    tenant: str = ""
    is_streaming: bool = False


class Service:
    """A served model: the engine, and what all its clients share."""

    def __init__(self, engine: AsyncEngine, settings: ServerSettings) -> None:
        self.engine = engine
        self.settings = settings
        self.metrics = Metrics(settings.model_name, engine.client.stats)
        self.created = int(time.time())
        self.max_active = settings.max_concurrent_requests or _QUEUED_BATCHES * engine.client.info.max_batch_size
        self.num_active = 0
        self.is_draining = False

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

    async def answer(self, job: Job) -> AsyncGenerator[Response, None]:
        """The Responses of all the job's answers, as they come.

        Raises RequestError, Overloaded, Draining and EngineDead, and AnswerFailed where the engine failed on one of them;
        closing the iterator, or cancelling the task that runs it, aborts what is left.
        """
        count = len(job.prompts) * job.config.n
        self._admit(count)
        timer = self.metrics.timer(job.is_streaming)
        num_ended = 0
        streams = [self._generate(job, number) for number in range(len(job.prompts))]
        try:
            async with aclosing(streams[0] if len(streams) == 1 else _merge(streams)) as responses:
                async for response in responses:
                    timer.observe(response)
                    if response.finish_reason is not None:
                        num_ended += 1
                        self.num_active -= 1
                    if response.finish_reason == "error":
                        raise _failure(response)
                    yield response
        except (RequestError, EngineDead):
            self.metrics.failed.inc(count - num_ended)
            raise
        finally:
            self.num_active -= count - num_ended

    async def collect(self, job: Job) -> list[Response]:
        """Every answer whole, in order of index."""
        async with aclosing(self.answer(replace(job, is_streaming=False))) as responses:
            return sorted([response async for response in responses], key=lambda response: response.index)

    def _admit(self, count: int) -> None:
        if self.is_draining:
            raise Draining("the server is shutting down; ask another one, or ask again later")
        if count > self.max_active:
            raise InvalidParameter(f"the request asks for {count} answers; this server takes {self.max_active} at once")
        if self.num_active + count > self.max_active:
            raise Overloaded(
                f"{self.num_active} answers are in work or waiting, at most {self.max_active}; ask again later"
            )
        self.num_active += count

    async def _generate(self, job: Job, number: int) -> AsyncGenerator[Response, None]:
        responses = self.engine.generate(
            job.prompts[number],
            job.config,
            do_preprocess=job.do_preprocess,
            options=job.options,
            cache_salt=job.tenant,
            is_streaming=job.is_streaming,
        )
        async with aclosing(responses):
            async for response in responses:
                yield replace(response, index=number * job.config.n + response.index) if number else response


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
