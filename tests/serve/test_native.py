"""LMDeploy's own endpoints over a scripted engine."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.serve.driver import error_of, events


def test_generate(serve: Any) -> None:
    served = serve()
    ids = served.engine.tokenizer.encode("the river")
    body = served.post("/generate", {"prompt": "the river", "max_tokens": 3, "return_logprob": True}).json()
    assert body["text"] == served.engine.tokenizer.decode(ids[:3])
    assert body["output_ids"] == ids[:3]
    meta = body["meta_info"]
    assert (meta["prompt_tokens"], meta["completion_tokens"]) == (len(ids), 3)
    assert meta["finish_reason"] == {"type": "length"}
    assert meta["output_token_logprobs"] == [[-0.5, token] for token in ids[:3]]
    assert served.client.requests[0].prompt_ids == ids
    assert served.post("/generate", {"input_ids": [70, 71]}).json()["output_ids"] == [70, 71]
    assert served.client.requests[1].sampling.max_new_tokens == 128


def test_generate_streamed(serve: Any) -> None:
    parts = events(serve().post("/generate", {"prompt": "the river", "stream": True}))
    assert "".join(part["text"] for part in parts) == "the river"
    assert parts[-1]["meta_info"]["finish_reason"] == {"type": "length"}
    assert parts[0]["meta_info"]["finish_reason"] is None


def test_generate_as_in_the_first_version(serve: Any) -> None:
    served = serve()
    body = {"prompt": "hello", "instance_id": 1, "request_output_len": 5, "stop": False, "interactive_mode": False}
    answer = served.post("/generate", body).json()
    assert set(answer) == {"text", "tokens", "finish_reason"}
    assert (answer["tokens"], answer["finish_reason"]) == (5, "length")
    request = served.client.requests[0]
    assert served.engine.tokenizer.decode(request.prompt_ids, False).startswith("<|im_start|>user\nhello")
    assert (request.sampling.temperature, request.sampling.top_p, request.sampling.top_k) == (0.8, 0.8, 40)
    streamed = served.post("/generate", {**body, "stream": True})
    lines = [json.loads(line) for line in streamed.text.splitlines()]
    assert "".join(line["text"] for line in lines) == answer["text"]
    assert lines[-1]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({}, "either prompt or input_ids"),
        ({"prompt": "a", "input_ids": [1]}, "either prompt or input_ids"),
        ({"prompt": "a", "image_data": ["x"]}, "image_data"),
        ({"prompt": "a", "n": 2}, "one answer"),
        ({"prompt": "a", "stop": True}, "stop"),
        ({"request_output_len": 5}, "prompt"),
    ],
)
def test_generate_refuses(serve: Any, body: dict[str, Any], text: str) -> None:
    answer = serve().post("/generate", body)
    assert answer.status_code == 400
    assert text in error_of(answer)["message"]


def test_encode(serve: Any) -> None:
    served = serve()
    encode = served.engine.tokenizer.encode
    ids = encode("the river")
    assert served.post("/v1/encode", {"input": "the river"}).json() == {"input_ids": ids, "length": len(ids)}
    both = served.post("/v1/encode", {"input": ["the river", "a"]}).json()
    assert both == {"input_ids": [ids, encode("a")], "length": [len(ids), 1]}
    rendered = served.post("/v1/encode", {"input": "the river", "do_preprocess": True}).json()
    assert rendered["input_ids"] == served.engine.encode("the river") != ids


def test_tokenize_and_back(serve: Any) -> None:
    served = serve()
    body = served.post("/tokenize", {"prompt": "the river", "return_token_strs": True}).json()
    assert (body["count"], body["max_model_len"]) == (len(body["tokens"]), 256)
    assert body["token_strs"] == ["t", "he", "Ġr", "iv", "er"]
    assert served.post("/detokenize", {"tokens": body["tokens"]}).json() == {"prompt": "the river"}
    turns = {"messages": [{"role": "user", "content": "hello"}]}
    assert served.post("/tokenize", turns).json()["tokens"] == served.engine.encode("hello")
    assert served.post("/tokenize", {"prompt": "a", **turns}).status_code == 400
    assert served.post("/tokenize", {"prompt": "a", "model": "other"}).status_code == 404


def test_perplexity_is_the_mean_cross_entropy(serve: Any) -> None:
    served = serve()
    ids = served.engine.tokenizer.encode("the river")
    expected = sum(1 / (1 + token) for token in ids[1:]) / (len(ids) - 1)
    assert served.post("/get_ppl", {"input": "the river"}).json()["ppl"] == pytest.approx(expected)
    assert served.post("/get_ppl", {"input": ids}).json()["ppl"] == pytest.approx(expected)
    assert served.client.requests[0].sampling.max_new_tokens == 0
    assert served.post("/get_ppl", {"input": "t"}).status_code == 400


def test_embeddings_refuse_what_they_cannot(serve: Any) -> None:
    for fields in ({"dimensions": 5}, {"encoding_format": "int8"}, {"pooling": "max"}, {"input": []}):
        answer = serve().post("/v1/embeddings", {"model": "tiny", "input": "a", **fields})
        assert answer.status_code == 400
        assert next(iter(fields)) in error_of(answer)["message"]


def test_ids_beyond_the_vocabulary_are_no_text(serve: Any) -> None:
    served = serve()
    answer = served.post("/detokenize", {"tokens": [87, 384]})
    assert answer.status_code == 400
    assert "384" in error_of(answer)["message"]
    assert served.post("/detokenize", {"tokens": [383]}).status_code == 200
