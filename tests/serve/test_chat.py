"""/v1/chat/completions over a scripted engine: forms of answers, what reaches the engine, streams against whole answers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.serve.driver import HELLO, echo, error_of, events

PROMPT = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


def test_a_whole_answer(serve: Any) -> None:
    served = serve()
    answer = served.chat(max_tokens=6)
    assert answer.status_code == 200
    body = answer.json()
    assert body["id"].startswith("chatcmpl-")
    assert (body["object"], body["model"]) == ("chat.completion", "tiny")
    ids = served.engine.encode(HELLO)
    assert served.engine.tokenizer.decode(ids, skip_special_tokens=False) == PROMPT
    assert served.client.requests[0].prompt_ids == ids
    (choice,) = body["choices"]
    assert choice["index"] == 0
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == served.engine.tokenizer.decode(ids[:6])
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] is None
    assert body["usage"]["prompt_tokens"] == len(ids)
    assert body["usage"]["completion_tokens"] == 6
    assert body["usage"]["total_tokens"] == len(ids) + 6
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}


def test_a_stream_has_roles_deltas_ends_and_usage(serve: Any) -> None:
    served = serve()
    plain = events(served.chat(stream=True, n=2, max_tokens=6))
    assert {chunk["object"] for chunk in plain} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in plain}) == 1
    assert all("usage" not in chunk for chunk in plain)
    for index in (0, 1):
        choices = [chunk["choices"][0] for chunk in plain if chunk["choices"][0]["index"] == index]
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        assert choices[-1]["delta"] == {"content": ""}
        assert choices[-1]["finish_reason"] == "length"
        assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    counted = events(served.chat(stream=True, n=2, max_tokens=6, stream_options={"include_usage": True}))
    assert counted[-1]["choices"] == []
    assert counted[-1]["usage"]["completion_tokens"] == 12
    assert counted[-1]["usage"]["prompt_tokens"] == len(served.engine.encode(HELLO))
    assert [chunk["usage"] for chunk in counted[:-1]] == [None] * (len(counted) - 1)


def test_every_parameter_reaches_the_engine(serve: Any) -> None:
    served = serve()
    answer = served.chat(
        temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, repetition_penalty=1.1, presence_penalty=0.5,
        frequency_penalty=-0.5, seed=11, logit_bias={"70": 5, "71": -100}, min_new_tokens=2, stop=["zq"],
        stop_token_ids=[9], ignore_eos=True, max_tokens=5, max_completion_tokens=4, n=2,
    )  # fmt: skip
    assert answer.status_code == 200, answer.text
    first, second = (request.sampling for request in served.client.requests)
    assert (first.temperature, first.top_p, first.top_k, first.min_p) == (0.5, 0.9, 7, 0.1)
    assert (first.repetition_penalty, first.presence_penalty, first.frequency_penalty) == (1.1, 0.5, -0.5)
    assert (first.seed, second.seed) == (11, 12)
    assert first.logit_bias == {70: 5.0, 71: -100.0}
    assert (first.min_new_tokens, first.max_new_tokens) == (2, 4)
    assert first.stop_token_ids == (9,)


def test_left_out_parameters_take_the_defaults(serve: Any) -> None:
    served = serve(client={"session_len": 100})
    served.chat()
    sampling = served.client.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.7, 0.95, 50)
    assert sampling.max_new_tokens == 100 - len(served.engine.encode(HELLO))
    assert 3 in sampling.stop_token_ids
    served.chat(temperature=0)
    assert served.client.requests[1].sampling.temperature == 0


def test_logprobs(serve: Any) -> None:
    content = serve().chat(max_tokens=3, logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == ["<|im_start|>", "u", "ser"]
    assert bytes(content[2]["bytes"]) == b"ser"
    for entry in content:
        assert entry["logprob"] == -0.5
        assert [top["token"] for top in entry["top_logprobs"]] == [entry["token"]]
    chunks = events(serve().chat(max_tokens=3, logprobs=True, stream=True))
    streamed = [entry for chunk in chunks for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert [entry["token"] for entry in streamed] == ["<|im_start|>", "u", "ser"]
    assert [entry["top_logprobs"] for entry in streamed] == [[], [], []]


def test_messages_as_text_and_as_ids(serve: Any) -> None:
    served = serve()
    served.chat(messages="hello", max_tokens=1)
    served.chat(messages="hello", do_preprocess=False, max_tokens=1)
    served.chat(input_ids=[70, 71], max_tokens=1)
    served.chat(messages=[{"role": "user", "content": [{"type": "text", "text": "hello"}]}], max_tokens=1)
    tokenizer = served.engine.tokenizer
    prompts = [tokenizer.decode(request.prompt_ids, skip_special_tokens=False) for request in served.client.requests]
    assert prompts == [PROMPT, "hello", tokenizer.decode([70, 71]), PROMPT]


def test_template_options(serve: Any) -> None:
    served = serve()
    turns = [*HELLO, {"role": "assistant", "content": "Hi th"}]
    served.chat(messages=turns, continue_final_message=True, add_generation_prompt=False, max_tokens=1)
    text = served.engine.tokenizer.decode(served.client.requests[0].prompt_ids, skip_special_tokens=False)
    assert text.endswith("<|im_start|>assistant\nHi th")
    assert served.chat(enable_thinking=False, chat_template_kwargs={"x": 1}, max_tokens=1).status_code == 200
    refused = served.chat(chat_template_kwargs={"messages": []})
    assert refused.status_code == 400
    assert "set by the server" in error_of(refused)["message"]


def test_return_token_ids(serve: Any) -> None:
    served = serve()
    ids = served.engine.encode(HELLO)[:4]
    assert served.chat(max_tokens=4, return_token_ids=True).json()["choices"][0]["output_ids"] == ids
    chunks = events(served.chat(max_tokens=4, return_token_ids=True, stream=True))
    assert [token for chunk in chunks for token in chunk["choices"][0].get("output_ids", [])] == ids


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"top_logprobs": 2}, "logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "image_url"),
    ],
)
def test_what_is_not_there_is_refused_by_name(serve: Any, fields: dict[str, Any], name: str) -> None:
    answer = serve().chat(**fields)
    assert answer.status_code == 400
    assert name in error_of(answer)["message"]


def test_harmless_forms_of_the_same_fields_pass(serve: Any) -> None:
    answer = serve().chat(tools=[], tool_choice="none", response_format={"type": "text"}, max_tokens=1, unknown_field=1)
    assert answer.status_code == 200


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ids=st.lists(st.integers(4, 290), min_size=1, max_size=40),
    stop=st.lists(st.sampled_from(["e", "th", "\ufffd", "ri", " "]), max_size=2),
    n=st.integers(1, 3),
)
def test_deltas_joined_are_the_whole_answer(serve: Any, ids: list[int], stop: list[str], n: int) -> None:
    served = serve(echo)
    fields = {"input_ids": ids, "stop": stop, "n": n, "temperature": 0}
    whole = {choice["index"]: choice for choice in served.chat(**fields).json()["choices"]}
    texts, reasons = dict.fromkeys(range(n), ""), {}
    for chunk in events(served.chat(stream=True, **fields)):
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["delta"]["content"]
        reasons[choice["index"]] = choice["finish_reason"]
    assert texts == {index: choice["message"]["content"] for index, choice in whole.items()}
    assert reasons == {index: choice["finish_reason"] for index, choice in whole.items()}
    served.client.close()
