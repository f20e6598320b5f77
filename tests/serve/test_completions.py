"""/v1/completions over a scripted engine: forms of prompts, echo with log-probabilities, streams."""

from __future__ import annotations

from typing import Any

import pytest

from lmdeploy.serve.openai.logprobs import chat_logprobs, completion_logprobs
from tests.serve.driver import error_of, events


def test_the_four_forms_of_a_prompt(serve: Any) -> None:
    served = serve()
    encode = served.engine.tokenizer.encode
    forms = {"a mill": 1, ("a mill", "the sea"): 2, (70, 71, 72): 1, ((70, 71), (72,)): 2}
    for prompt, count in forms.items():
        choices = served.complete(prompt=prompt, max_tokens=2).json()["choices"]
        assert [choice["index"] for choice in choices] == list(range(count))
    asked = sorted(tuple(request.prompt_ids) for request in served.client.requests)
    mill, sea = tuple(encode("a mill")), tuple(encode("the sea"))
    assert asked == sorted([mill, mill, sea, (70, 71, 72), (70, 71), (72,)])


def test_a_whole_answer_has_sixteen_tokens_unless_told_otherwise(serve: Any) -> None:
    served = serve()
    body = served.complete(prompt=list(range(70, 110))).json()
    assert body["id"].startswith("cmpl-")
    assert (body["object"], body["model"]) == ("text_completion", "tiny")
    assert body["choices"] == [
        {"index": 0, "text": served.engine.tokenizer.decode(range(70, 86)), "logprobs": None, "finish_reason": "length"}
    ]
    assert body["usage"]["completion_tokens"] == 16
    assert 3 in served.client.requests[0].sampling.stop_token_ids


def test_n_and_list_are_numbered_prompt_by_prompt(serve: Any) -> None:
    body = serve().complete(prompt=["a", "b"], n=2, max_tokens=1).json()
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [(0, "a"), (1, "a"), (2, "b"), (3, "b")]
    assert body["usage"]["prompt_tokens"] == 2
    assert body["usage"]["completion_tokens"] == 4


def test_streams_of_a_list(serve: Any) -> None:
    chunks = events(
        serve().complete(prompt=["the river", "a mill"], stream=True, stream_options={"include_usage": True})
    )
    texts = {0: "", 1: ""}
    for chunk in chunks[:-1]:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == {0: "the river", 1: "a mill"}
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] > 0


def test_echo(serve: Any) -> None:
    served = serve()
    assert served.complete(echo=True, max_tokens=0).json()["choices"][0]["text"] == "the river"
    assert served.complete(echo=True, max_tokens=1).json()["choices"][0]["text"] == "the rivert"
    ids = served.engine.tokenizer.encode("the sea")
    assert served.complete(prompt=ids, echo=True, max_tokens=0).json()["choices"][0]["text"] == "the sea"
    chunks = events(served.complete(echo=True, max_tokens=2, stream=True))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "the riverthe"


def test_echo_with_logprobs_scores_the_prompt(serve: Any) -> None:
    served = serve()
    ids = served.engine.tokenizer.encode("the river")
    logprobs = served.complete(echo=True, logprobs=1, max_tokens=1).json()["choices"][0]["logprobs"]
    expected = [None, *(-1.0 / (1 + token) for token in ids[1:]), -0.5]
    assert logprobs["token_logprobs"] == [None if value is None else pytest.approx(value) for value in expected]
    assert "".join(logprobs["tokens"]) == "the rivert"
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["top_logprobs"][-1] == {"t": -0.5}
    assert logprobs["text_offset"] == [0, 1, 3, 5, 7, 9]


def test_offsets_go_on_through_a_stream(serve: Any) -> None:
    chunks = events(serve().complete(logprobs=0, max_tokens=5, stream=True))
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk["choices"][0]["logprobs"]]
    assert [offset for part in parts for offset in part["text_offset"]] == [0, 1, 3, 5, 7]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"suffix": "end"}, "no tokens for filling in"),
        ({"suffix": "end", "echo": True}, "echo"),
        ({"best_of": 3}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"echo": True, "logprobs": 1, "stream": True}, "echo"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [999999]}, "999999"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": ""}, "empty"),
        ({"prompt": None}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
    ],
)
def test_refusals(serve: Any, fields: dict[str, Any], text: str) -> None:
    answer = serve().complete(**fields)
    assert answer.status_code == 400, answer.text
    assert text in error_of(answer)["message"]


@pytest.mark.parametrize("form", ["<|fim_{}|>", "<fim_{}>"])
@pytest.mark.parametrize("as_ids", [False, True])
def test_a_suffix_stands_after_what_is_asked_for(serve: Any, form: str, as_ids: bool) -> None:
    served = serve()
    tokenizer = served.engine.tokenizer
    places = {form.format(name): number for number, name in enumerate(("prefix", "suffix", "middle"), 300)}
    tokenizer.token_to_id = places.get
    river, sea = tokenizer.encode("the river"), tokenizer.encode("the sea")
    answer = served.complete(prompt=[river] if as_ids else "the river", suffix="the sea", max_tokens=1)
    assert answer.status_code == 200, answer.text
    assert served.client.requests[0].prompt_ids == [300, *river, 301, *sea, 302]
    assert answer.json()["usage"]["prompt_tokens"] == len(river) + len(sea) + 3


def test_spelling_of_logprobs(serve: Any) -> None:
    """The chosen token may be none of the top ones; halves of a character read alike; JSON has no infinity."""
    tokenizer = serve().engine.tokenizer
    th, halves = tokenizer.encode("t")[0], tokenizer.encode("🙂")
    values = {th: -5.0, halves[0]: -1.0, halves[1]: -2.0}
    (entry,) = chat_logprobs(tokenizer, [th], [values], 1)["content"]
    assert (entry["logprob"], entry["token"]) == (-5.0, "t")
    assert [top["logprob"] for top in entry["top_logprobs"]] == [-1.0]
    spelled = completion_logprobs(tokenizer, [th], [values], 2, offset=7)
    assert spelled["top_logprobs"] == [{"\ufffd": -1.0, "t": -5.0}]
    assert spelled["text_offset"] == [7]
    assert completion_logprobs(tokenizer, [th], [{th: -float("inf")}], 0)["token_logprobs"] == [-9999.0]
