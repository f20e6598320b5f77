"""POST /v1/messages and /v1/messages/count_tokens, GET /anthropic/v1/models."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import datetime, timezone
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response as HttpResponse

from lmdeploy.serve.anthropic.answer import MessageWriter, StopFinder
from lmdeploy.serve.anthropic.protocol import CountRequest, MessagesRequest, to_chat
from lmdeploy.serve.connection import NamedEventStream, while_connected
from lmdeploy.serve.errors import json_response
from lmdeploy.serve.openai.chat import chat_answer
from lmdeploy.serve.openai.pieces import chunk_pieces, message_pieces
from lmdeploy.serve.openai.scope import service_of, tenant_of

router = APIRouter(tags=["Anthropic"])


@router.post("/v1/messages")
async def messages(body: MessagesRequest, request: Request) -> HttpResponse:
    service = service_of(request)
    answer = chat_answer(service, to_chat(body), tenant_of(request))
    stops = StopFinder(body.stop_sequences or [], service.engine.chat_template.stop_words)
    if body.stream:
        writer = MessageWriter(service.settings.model_name, stops, answer.usage)

        async def events() -> AsyncGenerator[dict[str, Any], None]:
            async with aclosing(answer.chunks()) as chunks:
                async for event in writer.events(chunk_pieces(chunks)):
                    yield event

        return NamedEventStream(events())
    whole = await while_connected(answer.whole(), request.receive)
    writer = MessageWriter(service.settings.model_name, stops, answer.usage)
    return json_response(writer.whole(message_pieces(whole["choices"][0])))


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: CountRequest, request: Request) -> HttpResponse:
    answer = chat_answer(service_of(request), to_chat(body), tenant_of(request))
    return json_response({"input_tokens": await asyncio.to_thread(answer.count_prompt_tokens)})


@router.get("/anthropic/v1/models")
async def models(request: Request) -> HttpResponse:
    service = service_of(request)
    name = service.settings.model_name
    created = datetime.fromtimestamp(service.created, timezone.utc).isoformat().replace("+00:00", "Z")
    model = {"type": "model", "id": name, "display_name": name, "created_at": created}
    return json_response({"data": [model], "has_more": False, "first_id": name, "last_id": name})
