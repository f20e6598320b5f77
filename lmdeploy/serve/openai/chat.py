"""POST /v1/chat/completions, whole or streamed."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response as HttpResponse

from lmdeploy.async_engine import Prompt
from lmdeploy.chat_template.base import RenderOptions
from lmdeploy.errors import InvalidParameter
from lmdeploy.messages import Response
from lmdeploy.serve.connection import EventStream, while_connected
from lmdeploy.serve.errors import json_response
from lmdeploy.serve.openai.demands import demand_of, modern_messages, tool_dicts
from lmdeploy.serve.openai.logprobs import chat_logprobs
from lmdeploy.serve.openai.protocol import ChatRequest, Message
from lmdeploy.serve.openai.reader import ChoiceReader
from lmdeploy.serve.openai.sampling import check_stream_options, generation_config
from lmdeploy.serve.openai.scope import service_of, tenant_of
from lmdeploy.serve.openai.usage import Usage
from lmdeploy.serve.parsers.formats import AnswerFormats, Thinking
from lmdeploy.serve.service import Job, Service

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatRequest, request: Request) -> HttpResponse:
    answer = chat_answer(service_of(request), body, tenant_of(request))
    if body.stream:
        return EventStream(answer.chunks())
    return json_response(await while_connected(answer.whole(), request.receive))


def chat_answer(service: Service, body: ChatRequest, tenant: str) -> _Answer:
    """The answer to a chat, not yet begun: the way of every endpoint that speaks of messages. Raises RequestError."""
    service.check_model(body.model)
    return _Answer(service, body, _job(body, tenant, service.formats))


def message_dicts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as the chat template takes them, without the fields that nobody gave."""
    return [message.model_dump(exclude_unset=True) for message in messages]


def _job(body: ChatRequest, tenant: str, formats: AnswerFormats) -> Job:
    """The job as far as it needs no grammar."""
    check_stream_options(body)
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidParameter("top_logprobs goes with logprobs=true only")
    config = generation_config(
        body,
        body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    variables = dict(body.chat_template_kwargs or {})
    for name in ("enable_thinking", "reasoning_effort"):
        if (value := getattr(body, name)) is not None:
            variables[name] = value
    tools = tool_dicts(body)
    prompt: Prompt = body.messages if isinstance(body.messages, str) else message_dicts(body.messages)
    if not isinstance(prompt, str) or tools:
        said = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else modern_messages(prompt)  # type: ignore[arg-type]
        prompt, tools = formats.prompt(said, tools)
    options = RenderOptions(
        add_generation_prompt=body.add_generation_prompt,
        tools=tools,
        continue_final_message=body.continue_final_message,
        variables=variables,
    )
    prompts = [prompt if body.input_ids is None else body.input_ids]
    return Job(prompts, config, body.do_preprocess, options, tenant, body.stream, body.session_id)


class _Answer:
    """One request's choices, as one object or as chunks."""

    def __init__(self, service: Service, body: ChatRequest, job: Job) -> None:
        self._service = service
        self._body = body
        self._job = job
        self._demand = demand_of(body)
        self._thinking: Thinking = "none"
        self._usage = Usage(job.config.n)
        self._has_usage = body.stream_options is not None and body.stream_options.include_usage
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def count_prompt_tokens(self) -> int:
        """How many tokens the prompt has as the model gets it."""
        job = self._job
        return len(self._service.engine.encode(job.prompts[0], do_preprocess=job.do_preprocess, options=job.options))

    def usage(self) -> dict[str, Any]:
        """The counts so far; the prompt's are known with the first chunk."""
        return self._usage.body()

    async def whole(self) -> dict[str, Any]:
        choices = []
        for response in await self._service.collect(await self._guided_job()):
            self._usage.add(response)
            reader = self._reader()
            reader.read(response.text, is_end=True)
            await self._count_reasoning(reader)
            choice = {
                "index": response.index,
                "message": reader.message(),
                "logprobs": self._logprobs(response),
                "finish_reason": reader.finish_reason(response.finish_reason),
            }
            choices.append(choice | self._token_ids(response))
        return {**self._head("chat.completion", choices), "usage": self._usage.body()}

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """For each choice its role, then its deltas as they come, then its finish_reason; in the end the usage if asked for."""
        readers: dict[int, ChoiceReader] = {}
        async with aclosing(self._service.answer(await self._guided_job())) as responses:
            async for response in responses:
                self._usage.add(response)
                if response.index not in readers:
                    readers[response.index] = self._reader()
                    yield self._chunk(response.index, {"role": "assistant", "content": ""})
                for chunk in self._deltas(response, readers[response.index]):
                    yield chunk
                if response.finish_reason is not None:
                    reason = readers[response.index].finish_reason(response.finish_reason)
                    if self._has_usage:
                        await self._count_reasoning(readers[response.index])
                    yield self._chunk(response.index, {"content": ""}, finish_reason=reason)
        if self._has_usage:
            yield {**self._head("chat.completion.chunk", []), "usage": self._usage.body()}

    def _deltas(self, response: Response, reader: ChoiceReader) -> Iterator[dict[str, Any]]:
        """A response's chunks; what is reported of its tokens goes with the first of them."""
        deltas = reader.read(response.text, is_end=response.finish_reason is not None)
        has_reports = bool(response.token_ids) and bool(self._body.logprobs or self._body.return_token_ids)
        for number, delta in enumerate(deltas or ([{"content": ""}] if has_reports else [])):
            if number == 0 and response.token_ids:
                yield self._chunk(response.index, delta, self._logprobs(response), **self._token_ids(response))
            else:
                yield self._chunk(response.index, delta)

    def _reader(self) -> ChoiceReader:
        formats, body = self._service.formats, self._body
        parser = formats.parser(self._demand, self._thinking, keeps_special_tokens=not body.skip_special_tokens)
        return ChoiceReader(
            parser,
            keeps_one_call=not self._demand.many,
            id_length=formats.id_length,
            is_function_call=bool(body.functions),
        )

    async def _count_reasoning(self, reader: ChoiceReader) -> None:
        """Add a finished answer's thoughts to the usage, as the tokenizer cuts them."""
        if reader.reasoning:
            encode = self._service.engine.tokenizer.encode
            self._usage.add_reasoning(len(await asyncio.to_thread(encode, reader.reasoning, add_special_tokens=False)))

    async def _guided_job(self) -> Job:
        """The job with its grammar, which can take a while to make, and with the special tokens that the parser needs."""
        formats, demand = self._service.formats, self._demand
        if demand.response_format is None and not demand.tools and formats.reasoning is None:
            return self._job
        return await asyncio.to_thread(self._make_guided_job)

    def _make_guided_job(self) -> Job:
        formats, demand, job = self._service.formats, self._demand, self._job
        self._thinking = formats.thinking(job)
        needs_special_tokens = bool(demand.tools) or formats.has_parser(self._thinking)
        config = replace(
            job.config,
            response_format=formats.grammar(demand, self._thinking),
            skip_special_tokens=self._body.skip_special_tokens and not needs_special_tokens,
        )
        return replace(job, config=config)

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason, **more}
        head = self._head("chat.completion.chunk", [choice])
        return {**head, "usage": None} if self._has_usage else head

    def _head(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._service.settings.model_name,
            "choices": choices,
        }

    def _logprobs(self, response: Response) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        tokenizer = self._service.engine.tokenizer
        return chat_logprobs(tokenizer, response.token_ids, response.logprobs or [], self._body.top_logprobs or 0)

    def _token_ids(self, response: Response) -> dict[str, Any]:
        return {"output_ids": response.token_ids} if self._body.return_token_ids else {}
