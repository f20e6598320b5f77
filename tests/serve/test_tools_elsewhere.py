"""Tool calls and thoughts through /v1/responses and /v1/messages: the chat's own parsers, in the other interfaces' forms."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lmdeploy.engine.request import Request
from tests.serve.driver import Served
from tests.serve.test_messages import joined
from tests.serve.test_responses import named_events

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
ANSWER = '<think>where?</think>I look.<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
QUESTION = [{"role": "user", "content": "How is the weather in Rome?"}]


@pytest.fixture
def served(serve: Any) -> Served:
    def script(request: Request) -> list[int]:
        return [*made.engine.tokenizer.encode(ANSWER, add_special_tokens=False), 3]

    made: Served = serve(script, tool_call_parser="qwen", reasoning_parser="default", client={"session_len": 4096})
    return made


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_calls_a_function(served: Served, stream: bool) -> None:
    tools = [{"type": "function", "name": "weather", "parameters": SCHEMA}]
    answer = served.post("/v1/responses", {"model": "tiny", "input": "Rome?", "tools": tools, "stream": stream})
    assert answer.status_code == 200, answer.text
    body = named_events(answer)[-1]["response"] if stream else answer.json()
    thought, text, call = body["output"]
    assert (thought["type"], thought["content"][0]["text"]) == ("reasoning", "where?")
    assert (text["type"], text["content"][0]["text"]) == ("message", "I look.")
    assert (call["type"], call["name"], json.loads(call["arguments"])) == ("function_call", "weather", {"city": "Rome"})
    assert body["status"] == "completed"
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "sunny"}
    fields = {"model": "tiny", "input": [output], "tools": tools, "previous_response_id": body["id"]}
    assert served.post("/v1/responses", fields).status_code == 200
    prompt = served.engine.tokenizer.decode(served.client.requests[-1].prompt_ids, False)
    assert prompt.rindex("weather") < prompt.rindex("sunny")


@pytest.mark.parametrize("stream", [False, True])
def test_a_message_uses_a_tool(served: Served, stream: bool) -> None:
    tools = [{"name": "weather", "input_schema": SCHEMA}]
    fields = {"model": "tiny", "max_tokens": 400, "messages": QUESTION, "tools": tools}
    answer = served.post("/v1/messages", {**fields, "stream": stream})
    assert answer.status_code == 200, answer.text
    body = joined(named_events(answer)) if stream else answer.json()
    thought, text, call = body["content"]
    assert (thought["type"], thought["thinking"]) == ("thinking", "where?")
    assert (text["type"], text["text"]) == ("text", "I look.")
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "weather", {"city": "Rome"})
    assert body["stop_reason"] == "tool_use"
    result = [{"type": "tool_result", "tool_use_id": call["id"], "content": "sunny"}]
    said = [*QUESTION, {"role": "assistant", "content": body["content"]}, {"role": "user", "content": result}]
    assert served.post("/v1/messages", {**fields, "messages": said}).status_code == 200
    prompt = served.engine.tokenizer.decode(served.client.requests[-1].prompt_ids, False)
    assert prompt.rindex("weather") < prompt.rindex("sunny")
    count = served.post("/v1/messages/count_tokens", {"model": "tiny", "messages": said, "tools": tools})
    assert count.json()["input_tokens"] == len(served.client.requests[-1].prompt_ids)
