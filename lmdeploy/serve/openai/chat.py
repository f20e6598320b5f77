"""POST /v1/chat/completions, whole or streamed."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response as HttpResponse

from lmdeploy.async_engine import Prompt
from lmdeploy.chat_template.base import RenderOptions
from lmdeploy.errors import InvalidParameter
from lmdeploy.messages import Response
from lmdeploy.serve.connection import EventStream, while_connected
from lmdeploy.serve.errors import json_response
from lmdeploy.serve.openai.logprobs import chat_logprobs
from lmdeploy.serve.openai.protocol import ChatRequest, Message
from lmdeploy.serve.openai.sampling import check_stream_options, generation_config, refuse_unsupported
from lmdeploy.serve.openai.scope import service_of, tenant_of
from lmdeploy.serve.openai.usage import Usage
from lmdeploy.serve.service import Job, Service

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatRequest, request: Request) -> HttpResponse:
    service = service_of(request)
    service.check_model(body.model)
    job = _job(body, tenant_of(request))
    answer = _Answer(service, body, job)
    if body.stream:
        return EventStream(answer.chunks())
    return json_response(await while_connected(answer.whole(), request.receive))


def message_dicts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as the chat template takes them, without the fields that nobody gave."""
    return [message.model_dump(exclude_unset=True) for message in messages]


def _job(body: ChatRequest, tenant: str) -> Job:
    refuse_unsupported(body, "tools", "tool_choice", "functions", "response_format")
    check_stream_options(body)
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidParameter("top_logprobs goes with logprobs=true only")
    prompt: Prompt = body.messages if isinstance(body.messages, str) else message_dicts(body.messages)
    config = generation_config(
        body,
        body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    variables = dict(body.chat_template_kwargs or {})
    for name in ("enable_thinking", "reasoning_effort"):
        if (value := getattr(body, name)) is not None:
            variables[name] = value
    options = RenderOptions(
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        variables=variables,
    )
    prompts = [prompt if body.input_ids is None else body.input_ids]
    return Job(prompts, config, body.do_preprocess, options, tenant, body.stream)


class _Answer:
    """One request's choices, as one object or as chunks."""

    def __init__(self, service: Service, body: ChatRequest, job: Job) -> None:
        self._service = service
        self._body = body
        self._job = job
        self._usage = Usage(job.config.n)
        self._has_usage = body.stream_options is not None and body.stream_options.include_usage
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())

    async def whole(self) -> dict[str, Any]:
        choices = []
        for response in await self._service.collect(self._job):
            self._usage.add(response)
            message = {"role": "assistant", "content": response.text, "reasoning_content": None, "tool_calls": None}
            choice = {
                "index": response.index,
                "message": message,
                "logprobs": self._logprobs(response),
                "finish_reason": response.finish_reason,
            }
            choices.append(choice | self._token_ids(response))
        return {**self._head("chat.completion", choices), "usage": self._usage.body()}

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """For each choice its role, then its text as it comes, then its finish_reason; in the end the usage if asked for."""
        begun: set[int] = set()
        async with aclosing(self._service.answer(self._job)) as responses:
            async for response in responses:
                self._usage.add(response)
                if response.index not in begun:
                    begun.add(response.index)
                    yield self._chunk(response.index, {"role": "assistant", "content": ""})
                if response.text or response.token_ids:
                    delta = {"content": response.text}
                    yield self._chunk(response.index, delta, self._logprobs(response), **self._token_ids(response))
                if response.finish_reason is not None:
                    yield self._chunk(response.index, {"content": ""}, finish_reason=response.finish_reason)
        if self._has_usage:
            yield {**self._head("chat.completion.chunk", []), "usage": self._usage.body()}

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
