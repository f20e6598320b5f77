"""Tools and reasoning over HTTP: what the prompt says, what comes back whole and streamed, what is enforced, the older form."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import jsonschema
import pytest

from lmdeploy.async_engine import AsyncEngine, open_engine
from lmdeploy.chat_template import choose_chat_template
from lmdeploy.cli import main
from lmdeploy.engine.config import EngineConfig
from lmdeploy.engine.request import Request
from lmdeploy.errors import ConfigError
from lmdeploy.generation import CHAT_DEFAULTS
from lmdeploy.serve.openai.app import create_app
from lmdeploy.serve.parsers import REASONING_PARSERS, TOOL_PARSERS
from lmdeploy.serve.parsers.formats import AnswerFormats
from lmdeploy.serve.settings import ServerSettings
from lmdeploy.tokenizer import Tokenizer
from tests.fakes import FakeClient
from tests.serve.driver import HELLO, Served, error_of, events
from tests.tiny_model import make_tiny_llama

PARAMETERS = {
    "type": "object",
    "properties": {"k": {"type": "string", "enum": ["x", "y"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["k", "n"],
    "additionalProperties": False,
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS = [
    {"type": "function", "function": {"name": "get", "description": "Gets.", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "other", "parameters": NOTHING}},
]
CALL = '<tool_call>\n{"name": "get", "arguments": {"k": "x", "n": 1}}\n</tool_call>'
TEMPLATE = (
    "{% if tools %}TOOLS {% for tool in tools %}{{ tool.function.name }} {% endfor %}<tool_call>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    "CALL {{ c.function.name }}{{ c.function.arguments.n }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def with_tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose template shows tools, and thinks."""
    return make_tiny_llama(tmp_path_factory.mktemp("tools"), chat_template=TEMPLATE + "{# </think> #}")


@pytest.fixture
def scripted(tiny: Path, with_tools: Path) -> Iterator[Callable[..., Served]]:
    """scripted(text of every answer, is_plain: a template without tools, settings of the server)"""
    clients: list[FakeClient] = []

    def make(text: str, *, is_plain: bool = False, **settings: Any) -> Served:
        folder = tiny if is_plain else with_tools
        tokenizer = Tokenizer.from_path(folder)

        def script(request: Request) -> list[int]:
            return [*tokenizer.encode(text), 3]

        clients.append(FakeClient(script, session_len=4096))
        engine = AsyncEngine(folder, clients[-1], tokenizer, choose_chat_template(folder, tokenizer, {}), CHAT_DEFAULTS)
        return Served(create_app(engine, ServerSettings("tiny", **settings)), engine, clients[-1])

    yield make
    for client in clients:
        client.close()


def prompt_of(served: Served) -> str:
    return served.engine.tokenizer.decode(served.client.requests[-1].prompt_ids, skip_special_tokens=False)


def joined(chunks: list[dict[str, Any]]) -> tuple[dict[str, Any], str | None]:
    """The message that a stream's deltas make, as clients make it, and its finish_reason."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    reason = None
    for chunk in chunks:
        (choice,) = chunk["choices"]
        for name in ("content", "reasoning_content"):
            message[name] += choice["delta"].get(name) or ""
        for part in choice["delta"].get("tool_calls") or []:
            if part["index"] == len(message["tool_calls"]):
                assert part["type"] == "function"
                message["tool_calls"].append({**part["function"], "id": part["id"]})
            else:
                message["tool_calls"][part["index"]]["arguments"] += part["function"]["arguments"]
        reason = choice["finish_reason"] or reason
    return message, reason


def test_calls_whole_and_streamed(scripted: Callable[..., Served]) -> None:
    served = scripted(f"<think>\nhm\n</think>\n\nLet me see.\n{CALL}\n{CALL}")
    choice = served.chat(tools=TOOLS).json()["choices"][0]
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert (message["content"], message["reasoning_content"]) == ("Let me see.", "hm")
    assert [call["function"] for call in message["tool_calls"]] == [
        {"name": "get", "arguments": '{"k": "x", "n": 1}'}
    ] * 2
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    chunks = events(served.chat(tools=TOOLS, stream=True))
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    streamed, reason = joined(chunks)
    assert reason == "tool_calls"
    assert (streamed["content"], streamed["reasoning_content"]) == ("Let me see.", "hm")
    assert [(call["name"], call["arguments"]) for call in streamed["tool_calls"]] == [("get", '{"k": "x", "n": 1}')] * 2
    assert sum("arguments" in str(chunk) for chunk in chunks) > 4  # arguments come as they are made


def test_one_call_where_no_more_are_wanted(scripted: Callable[..., Served]) -> None:
    served = scripted(f"{CALL}\n{CALL}")
    assert len(served.chat(tools=TOOLS, parallel_tool_calls=False).json()["choices"][0]["message"]["tool_calls"]) == 1
    message, _ = joined(events(served.chat(tools=TOOLS, parallel_tool_calls=False, stream=True)))
    assert len(message["tool_calls"]) == 1


def test_without_tools_a_call_is_text(scripted: Callable[..., Served]) -> None:
    served = scripted(CALL)
    for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        choice = served.chat(**fields).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (CALL, "stop")
        assert "TOOLS" not in prompt_of(served)


def test_special_tokens_are_seen_by_parsers_and_by_nobody_else(scripted: Callable[..., Served]) -> None:
    served = scripted(f"<think>a<s>b</think>c<|im_start|>d {CALL}")
    fields: dict[str, Any] = {"tools": TOOLS, "logprobs": True, "return_token_ids": True}
    choice = served.chat(**fields).json()["choices"][0]
    assert (choice["message"]["content"], choice["message"]["reasoning_content"]) == ("cd", "ab")
    chunks = events(served.chat(stream=True, **fields))
    ids = [token for chunk in chunks for token in chunk["choices"][0].get("output_ids", [])]
    assert ids == choice["output_ids"]
    logprobs = [entry for chunk in chunks for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert logprobs == choice["logprobs"]["content"]
    kept = served.chat(tools=TOOLS, skip_special_tokens=False).json()["choices"][0]["message"]
    assert kept["content"] == "c<|im_start|>d"


def test_the_template_gets_tools_and_past_calls(scripted: Callable[..., Served]) -> None:
    served = scripted("ok")
    said = [
        *HELLO,
        {"role": "assistant", "tool_calls": [{"id": "1", "type": "function",
                                              "function": {"name": "get", "arguments": '{"n": 7}'}}]},
        {"role": "tool", "tool_call_id": "1", "content": "42"},
    ]  # fmt: skip
    assert served.chat(messages=said, tools=TOOLS).status_code == 200
    assert prompt_of(served).startswith("TOOLS get other <tool_call><|im_start|>user\nhello<|im_end|>")
    assert "CALL get7" in prompt_of(served)
    assert "<|im_start|>tool\n42" in prompt_of(served)


def test_a_template_without_tools_is_told_in_the_system_text(scripted: Callable[..., Served]) -> None:
    served = scripted(CALL, is_plain=True)
    said = [
        {"role": "system", "content": "Be brief."},
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function",
                                                              "function": {"name": "get", "arguments": '{"n": 7}'}}]},
        {"role": "tool", "content": "42"},
    ]  # fmt: skip
    choice = served.chat(messages=said, tools=TOOLS).json()["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "get"
    prompt = prompt_of(served)
    assert prompt.startswith("<|im_start|>system\nBe brief.\n\n# Tools")
    assert '"description": "Gets."' in prompt
    assert '<tool_call>\n{"name": "get", "arguments": {"n": 7}}\n</tool_call>' in prompt
    assert "<|im_start|>user\n<tool_response>\n42\n</tool_response>" in prompt
    refused = served.chat(messages=[*HELLO, {"role": "assistant", "tool_calls": [{"function": 3}]}], tools=TOOLS)
    assert refused.status_code == 400
    assert "tool_calls" in error_of(refused)["message"]


def test_the_older_form(scripted: Callable[..., Served]) -> None:
    served = scripted(CALL)
    functions = [tool["function"] for tool in TOOLS]
    said = [*HELLO, {"role": "assistant", "content": None, "function_call": {"name": "get", "arguments": '{"n": 3}'}},
            {"role": "function", "name": "get", "content": "4"}]  # fmt: skip
    choice = served.chat(messages=said, functions=functions).json()["choices"][0]
    assert choice["finish_reason"] == "function_call"
    assert choice["message"]["function_call"] == {"name": "get", "arguments": '{"k": "x", "n": 1}'}
    assert "CALL get3" in prompt_of(served)
    deltas = [chunk["choices"][0]["delta"] for chunk in events(served.chat(functions=functions, stream=True))]
    calls = [delta["function_call"] for delta in deltas if "function_call" in delta]
    assert calls[0]["name"] == "get"
    assert "".join(call["arguments"] for call in calls) == '{"k": "x", "n": 1}'
    assert served.chat(functions=functions, function_call={"name": "get"}).status_code == 200
    assert served.client.requests[-1].sampling.grammar is not None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "no"}}}, "'no'"),
        ({"tools": TOOLS, "tool_choice": "perhaps"}, "tool_choice"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "two tools"),
        ({"tools": TOOLS, "functions": [TOOLS[0]["function"]]}, "functions"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "retrieval"}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"not": {}}}}}}],
          "tool_choice": "required"}, "'not'"),
    ],
)  # fmt: skip
def test_refusals(scripted: Callable[..., Served], fields: dict[str, Any], message: str) -> None:
    refused = scripted("ok").chat(**fields)
    assert refused.status_code == 400
    assert message in error_of(refused)["message"]


def test_no_format_means_no_tools(scripted: Callable[..., Served]) -> None:
    refused = scripted("ok", tool_call_parser="none").chat(tools=TOOLS)
    assert refused.status_code == 400
    assert "--tool-call-parser" in error_of(refused)["message"]


def test_unknown_names_of_parsers_stop_the_start(scripted: Callable[..., Served]) -> None:
    with pytest.raises(ConfigError, match="internlm2"):
        scripted("ok", tool_call_parser="zebra")
    with pytest.raises(ConfigError, match="deepseek-r1"):
        scripted("ok", reasoning_parser="zebra")


@pytest.mark.parametrize("flag", ["--tool-call-parser", "--reasoning-parser"])
def test_the_command_knows_the_names_before_it_loads(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["serve", "api_server", "./no/such/model", flag, "zebra"]) == 1
    assert f"{flag} 'zebra' is not known" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "fields", "text", "expected"),
    [
        ({}, {}, "<think>hm</think>yes", ("yes", "hm")),
        ({}, {}, "yes", ("yes", None)),
        ({}, {"enable_thinking": False}, "yes </think>", ("yes </think>", None)),
        ({"reasoning_parser": "none"}, {}, "<think>hm</think>yes", ("<think>hm</think>yes", None)),
        ({"reasoning_parser": "deepseek-r1"}, {}, "hm</think>yes", ("yes", "hm")),
        ({"reasoning_parser": "deepseek-r1"}, {"enable_thinking": False}, "yes", ("yes", None)),
        ({"reasoning_parser": "gpt-oss"}, {}, "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final"
         "<|message|>yes", ("yes", "hm")),
        ({}, {"continue_final_message": True, "add_generation_prompt": False, "messages":
              [*HELLO, {"role": "assistant", "content": "<think>so"}]}, " hm</think>yes", ("yes", "hm")),
    ],
)  # fmt: skip
def test_reasoning(
    scripted: Callable[..., Served],
    settings: dict[str, Any],
    fields: dict[str, Any],
    text: str,
    expected: tuple[str, str | None],
) -> None:
    served = scripted(text, **settings)
    body = served.chat(**fields).json()
    message = body["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == expected
    count = len(served.engine.tokenizer.encode(expected[1] or ""))
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": count}
    streamed, _ = joined(events(served.chat(stream=True, **fields)))
    assert (streamed["content"], streamed["reasoning_content"] or None) == expected


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AsyncEngine]:
    folder = make_tiny_llama(tmp_path_factory.mktemp("forced"), max_position_embeddings=2048)
    engine = open_engine(str(folder), EngineConfig(dtype="float32", device="cpu", cache_max_entry_count=200))
    yield engine
    engine.close()


def ask(engine: AsyncEngine, fields: dict[str, Any], **settings: Any) -> dict[str, Any]:
    app = create_app(engine, ServerSettings("tiny", **settings))

    async def post() -> httpx2.Response:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://s", timeout=50) as client:
            body = {"model": "tiny", "messages": HELLO, "tools": TOOLS, "max_tokens": 600, **fields}
            return await client.post("/v1/chat/completions", json=body)

    answer = asyncio.run(post())
    assert answer.status_code == 200, answer.text
    return dict(answer.json()["choices"][0])


@pytest.mark.parametrize(
    "name", sorted(set(TOOL_PARSERS) - {"qwen2d5", "qwen3", "hermes", "internlm", "glm45", "glm47"})
)
@pytest.mark.parametrize("temperature", [0, 1.2])
def test_calls_are_enforced_in_every_format(engine: AsyncEngine, name: str, temperature: float) -> None:
    """A model of random weights calls what it must, with arguments that fit the schema."""
    settings = {"tool_call_parser": name, "reasoning_parser": name if name == "gpt-oss" else "none"}
    named = {"type": "function", "function": {"name": "get"}}
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named]}}
    choices = (named, {**allowed}, "required")
    for choice in choices:
        fields = {"tool_choice": choice, "parallel_tool_calls": False, "temperature": temperature, "seed": 2}
        answer = ask(engine, fields, **settings)
        assert answer["finish_reason"] == "tool_calls", answer
        (call,) = answer["message"]["tool_calls"]
        arguments = json.loads(call["function"]["arguments"])
        if choice == "required":
            jsonschema.validate(arguments, PARAMETERS if call["function"]["name"] == "get" else NOTHING)
        else:
            assert call["function"]["name"] == "get"
            jsonschema.validate(arguments, PARAMETERS)


def test_a_schema_beside_tools_binds_the_text(engine: AsyncEngine) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": PARAMETERS}}
    answer = ask(engine, {"response_format": form, "temperature": 1, "seed": 1, "parallel_tool_calls": False})
    calls = answer["message"]["tool_calls"] or []
    texts = [call["function"]["arguments"] for call in calls if call["function"]["name"] == "get"]
    texts += [answer["message"]["content"]] if answer["message"]["content"] else []
    assert texts or calls
    for text in texts:
        jsonschema.validate(json.loads(text), PARAMETERS)


def test_a_marker_that_ends_answers_is_left_to_the_end(engine: AsyncEngine) -> None:
    formats = AnswerFormats(engine)
    assert (formats._spell("<|im_start|>"), formats._spell("<x>")) == ("<[2]>", '"<x>"')
    assert formats._spell("<|im_end|>") == ""


def test_every_name_makes_formats(engine: AsyncEngine) -> None:
    for name, parser in TOOL_PARSERS.items():
        assert AnswerFormats(engine, name).tool_parser is parser
    for name in REASONING_PARSERS:
        assert AnswerFormats(engine, None, name).reasoning == name


@pytest.mark.parametrize("num_properties", [1, 60])
def test_too_many_tools_are_told_so(scripted: Callable[..., Served], num_properties: int) -> None:
    """And not of a grammar, which the client has never sent."""
    properties = {f"p{number}": {"type": "string", "description": "x" * 100} for number in range(num_properties)}
    tools = [
        {
            "type": "function",
            "function": {"name": f"f{number}", "parameters": {"type": "object", "properties": properties}},
        }
        for number in range(256)
    ]
    served = scripted(CALL)
    answer = served.chat(tools=tools, tool_choice="required", max_tokens=4)
    if num_properties == 1:
        assert answer.status_code == 200, answer.text
    else:
        assert answer.status_code == 400
        assert "give fewer" in error_of(answer)["message"]
        assert "tools" in error_of(answer)["message"]
