"""/v1/messages over a scripted engine: blocks, events, stop sequences, errors in Anthropic's form."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx2
import pytest

from lmdeploy.serve.anthropic.answer import MessageWriter, StopFinder
from lmdeploy.serve.anthropic.protocol import MessagesRequest, to_chat
from lmdeploy.serve.openai.pieces import Piece
from tests.serve.driver import HELLO, Served, endless
from tests.serve.test_responses import USAGE, named_events


def ask(served: Served, **fields: Any) -> httpx2.Response:
    return served.post("/v1/messages", {"model": "tiny", "messages": HELLO, "max_tokens": 200, **fields})


def writer(*stops: str) -> MessageWriter:
    return MessageWriter("tiny", StopFinder(stops), lambda: USAGE)


def streamed(pieces: list[Piece], *stops: str) -> list[dict[str, Any]]:
    async def stream() -> AsyncGenerator[Piece, None]:
        for piece in [Piece("text", ""), *pieces]:
            yield piece

    async def run() -> list[dict[str, Any]]:
        return [event async for event in writer(*stops).events(stream())]

    return asyncio.run(run())


def joined(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a client puts together from a stream's events."""
    message: dict[str, Any] = {}
    for event in events:
        if event["type"] == "message_start":
            message = event["message"]
        elif event["type"] == "content_block_start":
            assert event["index"] == len(message["content"])
            message["content"].append(dict(event["content_block"]))
        elif event["type"] == "content_block_delta":
            block, delta = message["content"][event["index"]], event["delta"]
            name = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json"}[
                delta["type"]
            ]
            block[name] = block.get(name, "") + delta[name]
        elif event["type"] == "message_delta":
            message |= event["delta"] | {"usage": event["usage"]}
    for block in message["content"]:
        if block["type"] == "tool_use":
            block["input"] = json.loads(block.pop("partial_json", "{}"))
    return message


def test_a_text_is_one_block(serve: Any) -> None:
    body = ask(serve()).json()
    assert (body["type"], body["role"], body["model"]) == ("message", "assistant", "tiny")
    assert [block["type"] for block in body["content"]] == ["text"]
    assert body["stop_reason"] == "end_turn"
    assert body["usage"]["output_tokens"] > 0
    assert ask(serve(endless), max_tokens=3).json()["stop_reason"] == "max_tokens"


def test_a_stream_joins_to_the_whole_answer(serve: Any) -> None:
    served = serve()
    whole = ask(served).json()
    events = named_events(ask(served, stream=True))
    assert [event["type"] for event in events[:2]] == ["message_start", "content_block_start"]
    assert [event["type"] for event in events[-3:]] == ["content_block_stop", "message_delta", "message_stop"]
    assert events[0]["message"]["usage"]["input_tokens"] == whole["usage"]["input_tokens"]
    assert joined(events) | {"id": ""} == whole | {"id": ""}


@pytest.mark.parametrize("stream", [False, True])
def test_the_stop_sequence_is_named_and_cut_off(serve: Any, stream: bool) -> None:
    def script(request: Any) -> list[int]:
        return list(served.engine.tokenizer.encode("the river runs past", add_special_tokens=False))

    served = serve(script)
    answer = ask(served, stop_sequences=["zzz", "run"], stream=stream)
    body = joined(named_events(answer)) if stream else answer.json()
    assert body["content"] == [{"type": "text", "text": "the river "}]
    assert (body["stop_reason"], body["stop_sequence"]) == ("stop_sequence", "run")


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_stop_sequence_is_found_however_the_text_is_cut(cut: int) -> None:
    text = "one two END"
    pieces = [Piece("text", text[start : start + cut]) for start in range(0, len(text), cut)]
    body = joined(streamed([*pieces, Piece("end", "stop")], "END", "NEVER"))
    assert body["content"] == [{"type": "text", "text": "one two "}]
    assert body["stop_sequence"] == "END"
    kept = joined(streamed([*pieces, Piece("end", "stop")], "ENDING"))
    assert kept["content"] == [{"type": "text", "text": text}]
    assert (kept["stop_reason"], kept["stop_sequence"]) == ("end_turn", None)


def test_thoughts_and_calls_are_blocks_whole_and_streamed() -> None:
    pieces = [
        Piece("reasoning", "hm"), Piece("text", "I look"), Piece("call", '{"city": "Rome"}', 0, "c1", "weather"),
        Piece("call", "", 1, "c2", "time"), Piece("end", "tool_calls"),
    ]  # fmt: skip
    body = writer().whole(pieces)
    assert [block["type"] for block in body["content"]] == ["thinking", "text", "tool_use", "tool_use"]
    assert body["content"][2] == {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Rome"}}
    assert body["content"][3]["input"] == {}
    assert body["stop_reason"] == "tool_use"
    assert joined(streamed(pieces)) | {"id": ""} == body | {"id": ""}
    broken = writer().whole([Piece("call", '{"a', 0, "c", "f"), Piece("end", "length")])
    assert broken["content"][0]["input"] == {"_raw": '{"a'}
    assert broken["stop_reason"] == "max_tokens"


def test_messages_become_a_chat() -> None:
    body = MessagesRequest.model_validate(
        {
            "model": "m", "max_tokens": 9, "system": [{"type": "text", "text": "rules"}], "temperature": 0.5, "top_k": 4,
            "stop_sequences": ["x"], "thinking": {"type": "disabled"},
            "tools": [{"name": "f", "description": "d", "input_schema": {"type": "object"}}],
            "tool_choice": {"type": "tool", "name": "f", "disable_parallel_tool_use": True},
            "messages": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": [
                    {"type": "thinking", "thinking": "hm", "signature": ""}, {"type": "text", "text": "I look"},
                    {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}},
                ]},
                {"role": "user", "content": [
                    {"type": "text", "text": "and"},
                    {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "7"}]},
                ]},
            ],
        }
    )  # fmt: skip
    chat = to_chat(body).model_dump(exclude_unset=True)
    assert [message["role"] for message in chat["messages"]] == ["system", "user", "assistant", "tool", "user"]
    assert chat["messages"][0]["content"] == "rules"
    assert chat["messages"][2]["content"] == "I look"
    assert chat["messages"][2]["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"a":1}'}
    assert chat["messages"][3] == {"role": "tool", "tool_call_id": "c1", "content": "7"}
    assert chat["messages"][4]["content"] == "and"
    assert chat["tools"][0]["function"] == {"name": "f", "description": "d", "parameters": {"type": "object"}}
    assert chat["tool_choice"] == {"type": "function", "function": {"name": "f"}}
    assert (chat["max_tokens"], chat["temperature"], chat["top_k"], chat["stop"]) == (9, 0.5, 4, ["x"])
    assert (chat["parallel_tool_calls"], chat["enable_thinking"]) == (False, False)
    for kind, name in (("any", "required"), ("auto", "auto"), ("none", "none")):
        assert body.tool_choice is not None
        choice = body.tool_choice.model_copy(update={"type": kind})
        assert to_chat(body.model_copy(update={"tool_choice": choice})).tool_choice == name


def test_count_tokens_counts_the_prompt(serve: Any) -> None:
    served = serve(endless)
    fields = {"model": "tiny", "messages": HELLO, "system": "be brief"}
    count = served.post("/v1/messages/count_tokens", fields).json()
    answer = served.post("/v1/messages", {**fields, "max_tokens": 1}).json()
    assert count == {"input_tokens": answer["usage"]["input_tokens"]}
    assert served.client.requests[-1].prompt_ids
    assert len(served.client.requests) == 1


@pytest.mark.parametrize(
    ("fields", "status", "kind", "word"),
    [
        ({"model": "other"}, 404, "not_found_error", "other"),
        ({"max_tokens": 0}, 400, "invalid_request_error", "max_tokens"),
        ({"messages": []}, 400, "invalid_request_error", "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, 400, "invalid_request_error", "document"),
        ({"messages": [{"role": "user", "content": [{}]}]}, 400, "invalid_request_error", "content.0"),
        ({"system": [{"type": "image"}]}, 400, "invalid_request_error", "system.0"),
        ({"tools": [{"name": "web", "type": "web_search_20250305"}]}, 400, "invalid_request_error", "web"),
        ({"temperature": 1.5}, 400, "invalid_request_error", "temperature"),
        ({"messages": [{"role": "user", "content": "long " * 500}]}, 400, "invalid_request_error", "session_len"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_have_anthropics_form(
    serve: Any, fields: dict[str, Any], status: int, kind: str, word: str, stream: bool
) -> None:
    answer = ask(serve(), **fields, stream=stream)
    assert answer.status_code == status
    body = answer.json()
    assert (body["type"], body["error"]["type"]) == ("error", kind)
    assert word in body["error"]["message"]
    assert answer.headers["request-id"]


def test_refusals_of_the_middleware_have_it_too(serve: Any) -> None:
    served = serve(api_keys=("k",), max_body_bytes=100)
    assert ask(served).json()["error"]["type"] == "authentication_error"
    large = served.post("/v1/messages", {"x": "y" * 200}, headers={"x-api-key": "k"})
    assert (large.status_code, large.json()["error"]["type"]) == (413, "request_too_large")
    assert ask(serve(max_concurrent_requests=1), max_tokens=1).status_code == 200


def test_a_failure_in_a_stream_is_an_event(serve: Any) -> None:
    from lmdeploy.errors import EngineDead

    def script(request: Any) -> Any:
        yield 70
        served.client.die(EngineDead("secret words"))
        yield 71

    served: Served = serve(script)
    last = named_events(ask(served, stream=True))[-1]
    assert last["type"] == "error"
    assert last["error"]["type"] == "overloaded_error"
    assert "secret" not in json.dumps(last)


def test_models_in_anthropics_form(serve: Any) -> None:
    body = serve().get("/anthropic/v1/models").json()
    assert [model["id"] for model in body["data"]] == ["tiny"]
    assert body["has_more"] is False
