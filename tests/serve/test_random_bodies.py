"""Any JSON in any field of any endpoint: an answer or a refusal, never a failure of the server."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from lmdeploy.serve.openai import protocol

ENDPOINTS: dict[str, tuple[type[BaseModel], dict[str, Any]]] = {
    "/v1/chat/completions": (protocol.ChatRequest, {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}),
    "/v1/completions": (protocol.CompletionRequest, {"model": "tiny", "prompt": "hi"}),
    "/generate": (protocol.GenerateRequest, {"prompt": "hi"}),
    "/v1/encode": (protocol.EncodeRequest, {"input": "hi"}),
    "/tokenize": (protocol.TokenizeRequest, {"prompt": "hi"}),
    "/detokenize": (protocol.DetokenizeRequest, {"tokens": [70]}),
    "/get_ppl": (protocol.PerplexityRequest, {"input": "the river"}),
}
KEYS = st.sampled_from(["role", "content", "type", "text", "5", "tool_calls", "function", "name", "arguments"])
SCALARS = (
    st.none() | st.booleans() | st.integers(-3, 3) | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9)
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8
)
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "other", ""])
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": ROLES, "content": VALUES}, optional={"tool_calls": VALUES}), max_size=3
)


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    path = draw(st.sampled_from(sorted(ENDPOINTS)))
    model, body = ENDPOINTS[path]
    names = draw(st.lists(st.sampled_from(sorted(model.model_fields)), max_size=3))
    return path, {**body, **{name: draw(MESSAGES | VALUES if name == "messages" else VALUES) for name in names}}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=st.lists(requests(), min_size=1, max_size=5))
def test_any_json_in_any_field(serve: Any, batch: list[tuple[str, dict[str, Any]]]) -> None:
    served = serve()

    async def ask() -> list[httpx2.Response]:
        transport = httpx2.ASGITransport(served.app, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://server") as client:
            headers = {"Content-Type": "application/json"}
            asked = [client.post(path, content=json.dumps(body).encode(), headers=headers) for path, body in batch]
            return await asyncio.wait_for(asyncio.gather(*asked), 10)

    answers = asyncio.run(ask())
    assert {answer.status_code for answer in answers} <= {200, 400, 404}
    assert not any("internal_error" in answer.text for answer in answers)
    assert served.service.num_active == 0
    served.client.close()
