"""POST /v1/completions: text, lists of texts, ids; echo and log-probabilities as evaluation harnesses need them."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response as HttpResponse

from lmdeploy.async_engine import Prompt
from lmdeploy.errors import InvalidParameter
from lmdeploy.messages import Response
from lmdeploy.serve.connection import EventStream, while_connected
from lmdeploy.serve.errors import json_response
from lmdeploy.serve.openai.infill import infill_prompts
from lmdeploy.serve.openai.logprobs import completion_logprobs
from lmdeploy.serve.openai.protocol import CompletionRequest
from lmdeploy.serve.openai.sampling import check_stream_options, generation_config
from lmdeploy.serve.openai.scope import service_of, tenant_of
from lmdeploy.serve.openai.usage import Usage
from lmdeploy.serve.service import Job, Service

DEFAULT_MAX_TOKENS = 16

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/completions")
async def completions(body: CompletionRequest, request: Request) -> HttpResponse:
    service = service_of(request)
    service.check_model(body.model)
    _check(body)
    answer = _Answer(service, body, await _prompts(service, body), tenant_of(request))
    if body.stream:
        return EventStream(answer.chunks())
    return json_response(await while_connected(answer.whole(), request.receive))


def prompt_list(prompt: Sequence[Any] | str) -> list[Prompt]:
    """The single prompts of a text, a list of texts, ids, or a list of ids."""
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


async def _prompts(service: Service, body: CompletionRequest) -> list[Prompt]:
    prompts = prompt_list(body.prompt)
    if not body.suffix:
        return prompts
    return await asyncio.to_thread(infill_prompts, service.engine.tokenizer, prompts, body.suffix)


def _check(body: CompletionRequest) -> None:
    if body.suffix and body.echo:
        raise InvalidParameter("echo does not go with suffix: leave out one of them")
    check_stream_options(body)
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise InvalidParameter(f"best_of={body.best_of} is not supported: leave it out, and take n answers")
    if body.max_tokens == 0 and not body.echo:
        raise InvalidParameter("max_tokens=0 goes with echo=true only")
    if body.stream and body.echo and body.logprobs is not None:
        raise InvalidParameter("echo with logprobs cannot be streamed: leave out stream")


class _Answer:
    """One request's choices, as one object or as chunks."""

    def __init__(self, service: Service, body: CompletionRequest, prompts: list[Prompt], tenant: str) -> None:
        max_tokens = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        config = generation_config(
            body,
            DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens,
            logprobs=body.logprobs,
            return_ppl=body.echo and body.logprobs is not None,
            response_format=None if body.response_format is None else body.response_format.form(),
        )
        if config.return_ppl and config.max_new_tokens == 1:
            # Harnesses take the last of the scores for the answer's; an end token, which is not shown, has to have one too.
            config = replace(config, ignore_eos=True)
        self._service = service
        self._tokenizer = service.engine.tokenizer
        self._body = body
        self._job = Job(
            prompts,
            config,
            do_preprocess=False,
            tenant=tenant,
            is_streaming=body.stream,
            session_id=body.session_id,
        )
        self._usage = Usage(config.n)
        self._has_usage = body.stream_options is not None and body.stream_options.include_usage
        self._offsets: dict[int, int] = {}
        self._prompt_ids: list[list[int]] = []
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())

    async def whole(self) -> dict[str, Any]:
        choices = []
        if self._job.config.return_ppl:
            self._prompt_ids = await asyncio.to_thread(self._encode_prompts)
        for response in await self._service.collect(self._job):
            self._usage.add(response)
            text = self._echo(response.index) + response.text
            choices.append(_choice(response.index, text, self._logprobs(response), response.finish_reason))
        return {**self._head(choices), "usage": self._usage.body()}

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        begun: set[int] = set()
        async with aclosing(self._service.answer(self._job)) as responses:
            async for response in responses:
                self._usage.add(response)
                text = response.text
                if response.index not in begun:
                    begun.add(response.index)
                    text = self._echo(response.index) + text
                if text or response.token_ids:
                    yield self._chunk(_choice(response.index, text, self._logprobs(response)))
                if response.finish_reason is not None:
                    yield self._chunk(_choice(response.index, "", finish_reason=response.finish_reason))
        if self._has_usage:
            yield {**self._head([]), "usage": self._usage.body()}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        head = self._head([choice])
        return {**head, "usage": None} if self._has_usage else head

    def _head(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._service.settings.model_name,
            "choices": choices,
        }

    def _encode_prompts(self) -> list[list[int]]:
        return [self._service.engine.encode(prompt, do_preprocess=False) for prompt in self._job.prompts]

    def _echo(self, index: int) -> str:
        """The prompt's text, where it is to stand before the answer."""
        if not self._body.echo:
            return ""
        prompt = self._job.prompts[index // self._job.config.n]
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt, self._body.skip_special_tokens)  # type: ignore[arg-type]

    def _logprobs(self, response: Response) -> dict[str, Any] | None:
        if self._body.logprobs is None:
            return None
        ids, logprobs = list(response.token_ids), list[dict[int, float] | None](response.logprobs or [])
        if self._prompt_ids:
            ids = [*self._prompt_ids[response.index // self._job.config.n], *ids]
            logprobs = [None, *(response.prompt_logprobs or []), *logprobs]
        offset = self._offsets.get(response.index, 0)
        self._offsets[response.index] = offset + len(response.text)
        return completion_logprobs(self._tokenizer, ids, logprobs, self._body.logprobs, offset)


def _choice(
    index: int, text: str, logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
