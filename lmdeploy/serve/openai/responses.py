"""/v1/responses: OpenAI's newer interface over the same chat, with answers that can be continued by their id."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from starlette.responses import Response as HttpResponse

from lmdeploy.errors import InvalidParameter
from lmdeploy.serve.connection import NamedEventStream, while_connected
from lmdeploy.serve.errors import UnknownItem, json_response
from lmdeploy.serve.openai.chat import chat_answer
from lmdeploy.serve.openai.pieces import chunk_pieces, message_pieces
from lmdeploy.serve.openai.responses_events import Draft, EventWriter, collect_items
from lmdeploy.serve.openai.responses_protocol import Message, ResponsesRequest, input_messages, to_chat
from lmdeploy.serve.openai.scope import service_of, tenant_of
from lmdeploy.serve.service import Service

router = APIRouter(tags=["OpenAI"])
ResponseId = Annotated[str, Path(max_length=128)]


@router.post("/v1/responses")
async def responses(body: ResponsesRequest, request: Request) -> HttpResponse:
    turn = _Turn(service_of(request), body, tenant_of(request))
    if body.stream:
        return NamedEventStream(turn.events())
    return json_response(await while_connected(turn.whole(), request.receive))


@router.get("/v1/responses/{response_id}")
async def retrieve(response_id: ResponseId, request: Request) -> HttpResponse:
    stored = service_of(request).responses.get(tenant_of(request), response_id)
    if stored is None:
        raise UnknownItem(f"there is no response {response_id!r} (any more)")
    return json_response(stored.body)


@router.delete("/v1/responses/{response_id}")
async def delete(response_id: ResponseId, request: Request) -> HttpResponse:
    if not service_of(request).responses.delete(tenant_of(request), response_id):
        raise UnknownItem(f"there is no response {response_id!r} (any more)")
    return json_response({"id": response_id, "object": "response", "deleted": True})


class _Turn:
    """One request's way to its answer."""

    def __init__(self, service: Service, body: ResponsesRequest, tenant: str) -> None:
        self._service = service
        self._tenant = tenant
        self._is_stored = body.store is not False
        self._said = [*_before(service, body, tenant), *input_messages(body.input)]
        if not self._said:
            raise InvalidParameter("input: give at least one message")
        self._answer = chat_answer(service, to_chat(body, self._said), tenant)
        self._draft = Draft(_head(service, body))

    async def whole(self) -> dict[str, Any]:
        answer = await self._answer.whole()
        self._draft.items, reason = collect_items(message_pieces(answer["choices"][0]))
        return self._kept(self._draft.body(reason, answer["usage"]))

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        async with aclosing(self._answer.chunks()) as chunks:
            pieces = chunk_pieces(chunks)
            async for event in EventWriter(self._draft).write(pieces, self._answer.usage):
                if event["type"] in ("response.completed", "response.incomplete"):
                    self._kept(event["response"])
                yield event

    def _kept(self, response: dict[str, Any]) -> dict[str, Any]:
        if self._is_stored:
            self._service.responses.put(self._tenant, response, [*self._said, self._draft.said()])
        return response


def _before(service: Service, body: ResponsesRequest, tenant: str) -> list[Message]:
    """What was said before this request."""
    if body.previous_response_id is None:
        return []
    stored = service.responses.get(tenant, body.previous_response_id)
    if stored is None:
        raise InvalidParameter(
            f"previous_response_id: there is no response {body.previous_response_id!r} (any more); responses are kept in "
            "memory within bounds, unless store=false: send the whole conversation as input"
        )
    return stored.said


def _head(service: Service, body: ResponsesRequest) -> dict[str, Any]:
    """What is the same in every event of a response."""
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "model": service.settings.model_name,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        "store": body.store is not False,
        "temperature": body.temperature,
        "text": {"format": (body.text.format if body.text else None) or {"type": "text"}},
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "top_logprobs": body.top_logprobs,
        "top_p": body.top_p,
        "truncation": "disabled",
        "user": body.user,
    }
