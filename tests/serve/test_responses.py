"""/v1/responses over a scripted engine: its items, events, and what is kept."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx2
import pytest

from lmdeploy.errors import InvalidParameter
from lmdeploy.serve.openai.pieces import Piece, chunk_pieces, message_pieces
from lmdeploy.serve.openai.responses_events import Draft, EventWriter, collect_items
from lmdeploy.serve.openai.responses_protocol import ResponsesRequest, input_messages, to_chat
from lmdeploy.serve.response_store import ResponseStore
from tests.serve.driver import Served, endless

USAGE = {
    "prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8,
    "prompt_tokens_details": {"cached_tokens": 2}, "completion_tokens_details": {"reasoning_tokens": 1},
}  # fmt: skip


def ask(served: Served, **fields: Any) -> httpx2.Response:
    return served.post("/v1/responses", {"model": "tiny", "input": "hello", "max_output_tokens": 4, **fields})


def named_events(answer: httpx2.Response) -> list[dict[str, Any]]:
    """The events of a stream; each bears its type as its name, and no frame ends them."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = []
    for frame in answer.text.split("\n\n")[:-1]:
        name, data = frame.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def written(pieces: list[Piece]) -> tuple[list[dict[str, Any]], Draft]:
    """The events of a stream with these pieces."""
    draft = Draft({"id": "resp_1", "object": "response"})

    async def stream() -> AsyncGenerator[Piece, None]:
        for piece in [Piece("text", ""), *pieces]:
            yield piece

    async def run() -> list[dict[str, Any]]:
        return [event async for event in EventWriter(draft).write(stream(), lambda: USAGE)]

    return asyncio.run(run()), draft


def test_a_text_is_one_message(serve: Any) -> None:
    body = ask(serve(endless)).json()
    assert (body["object"], body["status"], body["model"]) == ("response", "incomplete", "tiny")
    assert body["incomplete_details"] == {"reason": "max_output_tokens"}
    (item,) = body["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "incomplete")
    assert item["content"][0]["type"] == "output_text"
    assert body["usage"]["output_tokens"] == 4
    assert body["usage"]["total_tokens"] == body["usage"]["input_tokens"] + 4


def test_a_stream_ends_with_the_whole_answer(serve: Any) -> None:
    served = serve()
    whole = ask(served, max_output_tokens=200).json()
    events = named_events(ask(served, max_output_tokens=200, stream=True))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:4]] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert [event["type"] for event in events[-4:]] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.completed",
    ]  # fmt: skip
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert text == whole["output"][0]["content"][0]["text"] == events[-4]["text"]
    last = events[-1]["response"]
    for changing in ("id", "created_at", "output"):
        last.pop(changing)
        whole.pop(changing)
    assert last == whole


def test_reasoning_text_and_calls_are_items_of_their_own() -> None:
    pieces = [
        Piece("reasoning", "let me "), Piece("reasoning", "see"), Piece("text", "so"),
        Piece("call", '{"a"', 0, "call_1", "f"), Piece("call", ": 1}"), Piece("call", "", 1, "call_2", "g"),
        Piece("end", "tool_calls"),
    ]  # fmt: skip
    events, draft = written(pieces)
    final = events[-1]["response"]
    assert events[-1]["type"] == "response.completed"
    assert [item["type"] for item in final["output"]] == ["reasoning", "message", "function_call", "function_call"]
    assert final["output"][2] | {"id": ""} == {
        "id": "", "type": "function_call", "status": "completed", "call_id": "call_1", "name": "f", "arguments": '{"a": 1}',
    }  # fmt: skip
    opened = {event["item"]["id"] for event in events if event["type"] == "response.output_item.added"}
    closed = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert closed == final["output"]
    assert opened == {item["id"] for item in closed}
    assert {event["item_id"] for event in events if "item_id" in event} == opened
    done = [event for event in events if event["type"] == "response.function_call_arguments.done"]
    assert [(event["name"], event["arguments"]) for event in done] == [("f", '{"a": 1}'), ("g", "")]
    assert [call["id"] for call in draft.said()["tool_calls"]] == ["call_1", "call_2"]
    assert draft.said()["content"] == "so"


def test_a_whole_answer_has_the_same_items_as_its_stream() -> None:
    calls = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    message = {"role": "assistant", "content": "hi", "reasoning_content": "hm", "tool_calls": calls}
    items, reason = collect_items(message_pieces({"message": message, "finish_reason": "tool_calls"}))

    async def chunks() -> AsyncGenerator[dict[str, Any], None]:
        deltas = [{"role": "assistant", "content": ""}, {"reasoning_content": "hm"}, {"content": "hi"}]
        for delta in [*deltas, {"tool_calls": [{**calls[0], "index": 0}]}]:
            yield {"choices": [{"delta": delta, "finish_reason": None}]}
        yield {"choices": [{"delta": {}, "finish_reason": "tool_calls"}]}

    async def run() -> list[Piece]:
        return [piece async for piece in chunk_pieces(chunks())]

    _, draft = written(asyncio.run(run())[1:])
    assert reason == "tool_calls"
    assert [item.body("completed") | {"id": ""} for item in items] == [
        item.body("completed") | {"id": ""} for item in draft.items
    ]


def test_what_was_said_goes_on(serve: Any) -> None:
    served = serve()
    first = ask(served, input="one", instructions="be brief").json()
    second = ask(served, input="two", previous_response_id=first["id"], stream=True)
    third_id = named_events(second)[-1]["response"]["id"]
    ask(served, input="three", previous_response_id=third_id)
    prompt = served.engine.tokenizer.decode(served.client.requests[-1].prompt_ids, False)
    positions = [prompt.index(word) for word in ("one", "two", "three")]
    assert positions == sorted(positions)
    assert prompt.count("<|im_start|>assistant") == 3
    assert "be brief" not in prompt  # instructions hold for their own request


def test_stored_responses_are_found_and_deleted(serve: Any) -> None:
    served = serve(api_keys=("a", "b"))
    key = {"Authorization": "Bearer a"}
    body = served.post("/v1/responses", {"model": "tiny", "input": "x"}, headers=key).json()
    path = f"/v1/responses/{body['id']}"
    assert served.get(path, headers=key).json() == body
    assert served.get(path, headers={"x-api-key": "b"}).status_code == 404
    assert served.ask("DELETE", path, headers={"x-api-key": "b"}).status_code == 404
    assert served.ask("DELETE", path, headers=key).json()["deleted"] is True
    assert served.get(path, headers=key).status_code == 404
    kept = served.post("/v1/responses", {"model": "tiny", "input": "x", "store": False}, headers=key).json()
    assert served.get(f"/v1/responses/{kept['id']}", headers=key).status_code == 404
    fields = {"model": "tiny", "input": "x", "previous_response_id": kept["id"]}
    assert served.post("/v1/responses", fields, headers=key).status_code == 400


def test_the_store_is_bounded() -> None:
    store = ResponseStore(max_responses=3, max_bytes=1000)
    for number in range(5):
        store.put("", {"id": str(number)}, [])
    assert [store.get("", str(number)) is not None for number in range(5)] == [False, False, True, True, True]
    store.put("", {"id": "big"}, [{"content": "x" * 900}])
    assert len(store) <= 3
    assert store.get("", "big") is not None
    store.put("", {"id": "huge"}, [{"content": "x" * 2000}])
    assert len(store) == 0
    assert not store.delete("", "huge")


def test_items_become_messages() -> None:
    messages = input_messages(
        [
            {"role": "developer", "content": "rules"},
            {"role": "user", "content": [{"type": "input_text", "text": "weather?"}]},
            {"type": "reasoning", "id": "rs_1", "summary": []},
            {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
            {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
            {
                "role": "assistant",
                "content": [{"type": "output_text", "text": "a"}, {"type": "refusal", "refusal": "b"}],
            },
        ]
    )
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert messages[1]["content"] == "weather?"
    assert [call["id"] for call in messages[2]["tool_calls"]] == ["c1", "c2"]
    assert messages[3] == {"role": "tool", "tool_call_id": "c1", "content": "sunny"}
    assert messages[4]["content"] == [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]


def test_fields_reach_the_chat() -> None:
    body = ResponsesRequest.model_validate(
        {
            "model": "m", "input": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
            "instructions": "i", "max_output_tokens": 7, "temperature": 0.5, "top_k": 3, "top_logprobs": 2,
            "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}],
            "tool_choice": {"type": "function", "name": "f"}, "parallel_tool_calls": False,
            "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}},
            "reasoning": {"effort": "low"},
        }
    )  # fmt: skip
    chat = to_chat(body, input_messages(body.input)).model_dump(exclude_unset=True)
    assert chat["messages"] == [{"role": "system", "content": "i\n\ns"}, {"role": "user", "content": "u"}]
    assert (chat["max_completion_tokens"], chat["temperature"], chat["top_k"]) == (7, 0.5, 3)
    assert (chat["logprobs"], chat["top_logprobs"]) == (True, 2)
    assert chat["tools"][0]["function"] == {"name": "f", "parameters": {"type": "object"}, "strict": True}
    assert chat["tool_choice"] == {"type": "function", "function": {"name": "f"}}
    assert chat["parallel_tool_calls"] is False
    assert chat["response_format"]["json_schema"] == {"name": "n", "schema": {"type": "object"}}
    assert chat["reasoning_effort"] == "low"
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "f"}]}
    choice = to_chat(body.model_copy(update={"tool_choice": allowed}), input_messages(body.input)).tool_choice
    assert choice is not None
    assert not isinstance(choice, str)
    assert choice.type == "allowed_tools"


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"n": 2}, "n=2"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "web_search"),
        ({"tools": [{"type": "function", "name": "f"}], "tool_choice": {"type": "file_search"}}, "tool_choice"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "item_reference"),
        ({"input": [{"type": ["x"]}]}, "input.0"),
        ({"input": [{"role": "tool", "content": "x"}]}, "role"),
        ({"input": [{"role": ["user"], "content": "x"}]}, "role"),
        ({"input": [{"role": "user", "content": 7}]}, "content"),
        ({"input": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "input_audio"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "image_url"),
        ({"input": [{"type": "function_call", "call_id": 1, "name": "f", "arguments": ""}]}, "call_id"),
        ({"input": "x", "previous_response_id": "resp_none"}, "previous_response_id"),
        ({"text": {"format": {"type": "xml"}}}, "response_format"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals_name_the_field(serve: Any, fields: dict[str, Any], word: str, stream: bool) -> None:
    answer = ask(serve(), **fields, stream=stream)
    assert answer.status_code == 400, answer.text
    assert word in answer.json()["error"]["message"]


def test_refusals_of_the_engine_keep_their_status_in_a_stream(serve: Any) -> None:
    answer = ask(serve(), input="long " * 500, stream=True)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert ask(serve(), model="other", stream=True).status_code == 404


def test_an_engine_that_dies_ends_the_stream_with_its_own_event(serve: Any) -> None:
    from lmdeploy.errors import EngineDead

    served: Served

    def script(request: Any) -> Any:
        yield 70
        served.client.die(EngineDead("secret words"))
        yield 71

    served = serve(script)
    last = named_events(ask(served, stream=True))[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["error"]["code"] == "server_error"
    assert "secret" not in json.dumps(last)


def test_bounds_of_chat_hold_here() -> None:
    body = ResponsesRequest.model_validate({"model": "m", "input": "x", "tools": [{"type": "function", "name": "a b"}]})
    with pytest.raises(InvalidParameter, match="name"):
        to_chat(body, input_messages(body.input))
