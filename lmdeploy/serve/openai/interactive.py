"""POST /v1/chat/interactive: conversations that the server remembers, as LMDeploy 0.1 to 0.9 had them.

The engine's prefix cache keeps the keys and values of what was said; a turn computes only what is new.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field, StrictBool, StrictInt, StrictStr
from starlette.responses import Response as HttpResponse

from lmdeploy.chat_template.base import RenderOptions
from lmdeploy.errors import InvalidParameter
from lmdeploy.messages import Response
from lmdeploy.serve.connection import EventStream, while_connected
from lmdeploy.serve.errors import json_response
from lmdeploy.serve.openai.chat import message_dicts
from lmdeploy.serve.openai.protocol import Message, Sampling, SessionId, StopWord, Text
from lmdeploy.serve.openai.sampling import generation_config, refuse_unsupported
from lmdeploy.serve.openai.scope import service_of, tenant_of
from lmdeploy.serve.service import Job, Service

DEFAULT_MAX_TOKENS = 512
_DEFAULTS = {"temperature": 0.8, "top_p": 0.8, "top_k": 40}

router = APIRouter(tags=["LMDeploy"])


class InteractiveRequest(Sampling):
    """stop: stop strings; a boolean, as in 0.1, is what `cancel` became. session_id -1: none, nothing is remembered."""

    prompt: Text | Annotated[list[Message], Field(max_length=4096)] = ""
    image_url: Any = None
    adapter_name: Annotated[StrictStr, Field(max_length=4096)] | None = None
    session_id: SessionId = -1
    interactive_mode: StrictBool = False
    stream: StrictBool = False
    cancel: StrictBool = False
    request_output_len: Annotated[StrictInt, Field(ge=0, le=1 << 31)] | None = None
    stop: StrictBool | StopWord | Annotated[list[StopWord], Field(max_length=64)] | None = None  # type: ignore[assignment]


@router.post("/v1/chat/interactive")
async def interactive(body: InteractiveRequest, request: Request) -> HttpResponse:
    service, tenant = service_of(request), tenant_of(request)
    refuse_unsupported(body, "image_url", "adapter_name")
    if body.n not in (None, 1):
        raise InvalidParameter(f"n={body.n}: this endpoint gives one answer")
    if body.cancel or body.stop is True:
        service.cancel(tenant, body.session_id)
        return json_response(_answer("", 0, 0, 0, None))
    is_over = not body.prompt and not body.request_output_len
    if is_over and not body.interactive_mode:
        service.cancel(tenant, body.session_id)
        service.sessions.forget(tenant, body.session_id)
        return json_response(_answer("", 0, 0, 0, None))
    turn = _Turn(service, body, tenant)
    if body.stream:
        return EventStream(turn.parts(), is_sse=False)
    return json_response(await while_connected(turn.whole(), request.receive))


class _Turn:
    """One prompt of a conversation and its answer."""

    def __init__(self, service: Service, body: InteractiveRequest, tenant: str) -> None:
        self._service = service
        self._body = body
        self._tenant = tenant
        self._is_kept = body.interactive_mode and body.session_id != -1
        self._prompt: list[dict[str, Any]] = (
            [{"role": "user", "content": body.prompt}] if isinstance(body.prompt, str) else message_dicts(body.prompt)
        )

    async def whole(self) -> dict[str, Any]:
        parts = [part async for part in self.parts()]
        return {**parts[-1], "text": "".join(part["text"] for part in parts)}

    async def parts(self) -> AsyncGenerator[dict[str, Any], None]:
        """What is new, with the counts so far. The turn is kept as far as it came, a broken one too."""
        sessions, key = self._service.sessions, (self._tenant, self._body.session_id)
        before = sessions.begin(*key) if self._is_kept else None
        said: list[dict[str, Any]] = []
        text, num_tokens = "", 0
        history = before.num_tokens if before else 0
        try:
            async with aclosing(self._service.answer(self._job(before.said if before else []))) as responses:
                async for response in responses:
                    text += response.text
                    num_tokens = response.input_token_len + response.generate_token_len
                    said = [*self._prompt, {"role": "assistant", "content": text}]
                    yield _part(response, history)
        finally:
            if before is not None:
                sessions.end(*key, before, said, num_tokens)

    def _job(self, before: list[dict[str, Any]]) -> Job:
        body = self._body
        plain = body.model_copy(update={"stop": None if isinstance(body.stop, bool) else body.stop})
        defaults = {name: value for name, value in _DEFAULTS.items() if name not in body.model_fields_set}
        config = generation_config(plain, body.request_output_len or DEFAULT_MAX_TOKENS, **defaults)
        session_id = None if body.session_id == -1 else body.session_id
        messages = [*before, *self._prompt]
        return Job([messages], config, True, RenderOptions(), self._tenant, body.stream, session_id)


def _part(response: Response, history: int) -> dict[str, Any]:
    """input_tokens are those of this turn; what the conversation had before are its history_tokens."""
    new = max(response.input_token_len - history, 0)
    return _answer(response.text, response.generate_token_len, new, history, response.finish_reason)


def _answer(text: str, tokens: int, input_tokens: int, history: int, reason: str | None) -> dict[str, Any]:
    return {
        "text": text,
        "tokens": tokens,
        "input_tokens": input_tokens,
        "history_tokens": history,
        "finish_reason": reason,
    }
