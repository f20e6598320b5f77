from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmdeploy.answer import AnswerStream
from lmdeploy.engine.request import Request, RequestOutput, SamplingParams
from lmdeploy.errors import InvalidParameter
from lmdeploy.messages import GenerationConfig, Response
from lmdeploy.stoppable_answer import StoppableAnswer
from lmdeploy.tokenizer import Tokenizer
from tests.tiny_model import make_tiny_llama

PIECES = ["the ", "river", "你好", "🙂", "STOP", "ST", "OP", "\n\n", "é", " and"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_path(make_tiny_llama(tmp_path_factory.mktemp("tiny")))


def answer(
    tokenizer: Tokenizer,
    ids: list[int],
    config: GenerationConfig | None = None,
    *,
    sampling: SamplingParams | None = None,
    finish: str = "length",
    is_streaming: bool = True,
) -> list[Response]:
    """Feed the ids one by one, the last with the finish reason; returns the Responses up to the end of the answer."""
    config = config or GenerationConfig()
    sampling = sampling or SamplingParams(min_new_tokens=config.min_new_tokens or 0)
    request = Request("r", [5, 6, 7], sampling)
    make_stream = partial(StoppableAnswer, config.stop_words) if config.stop_words else AnswerStream
    stream = make_stream(request, tokenizer, config, is_streaming=is_streaming)
    responses = []
    for number, token in enumerate(ids):
        reason = finish if number == len(ids) - 1 else None
        response = stream.add(RequestOutput("r", [token], reason, 3, logprobs=[{token: -float(number)}]))
        responses += [] if response is None else [response]
        if stream.finish_reason is not None:
            break
    assert stream.finish_reason is not None
    return responses


def text_of(responses: list[Response]) -> str:
    return "".join(response.text for response in responses)


def ids_of(responses: list[Response]) -> list[int]:
    return [token for response in responses for token in response.token_ids]


def test_increments_join_to_the_text_and_count_their_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the river 你好🙂")
    responses = answer(tokenizer, ids)
    assert text_of(responses) == "the river 你好🙂"
    assert ids_of(responses) == ids
    assert [response.generate_token_len for response in responses] == list(range(1, len(ids) + 1))
    assert [response.finish_reason for response in responses] == [None] * (len(ids) - 1) + ["length"]
    assert {response.input_token_len for response in responses} == {3}


def test_a_character_appears_when_it_is_whole_and_never_broken(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🙂")
    assert len(ids) == 4
    assert [response.text for response in answer(tokenizer, ids)] == ["", "", "", "🙂"]
    assert text_of(answer(tokenizer, ids[:3])) == "\ufffd"


def test_the_stop_token_is_in_neither_text_nor_ids(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the river")
    sampling = SamplingParams(stop_token_ids=(3,))
    responses = answer(tokenizer, [*ids, 3], sampling=sampling, finish="stop")
    assert (text_of(responses), ids_of(responses)) == ("the river", ids)
    assert responses[-1].finish_reason == "stop"
    kept = GenerationConfig(include_stop_str_in_output=True, skip_special_tokens=False)
    responses = answer(tokenizer, [*ids, 3], kept, sampling=sampling, finish="stop")
    assert (text_of(responses), ids_of(responses)) == ("the river<|im_end|>", [*ids, 3])


def test_a_stop_string_across_tokens_cuts_text_tokens_and_logprobs_alike(tokenizer: Tokenizer) -> None:
    before = tokenizer.encode("the river ")
    ids = before + [token for char in "STOP" for token in tokenizer.encode(char)] + tokenizer.encode(" and more")
    config = GenerationConfig(stop_words=["STOP"], logprobs=1)
    responses = answer(tokenizer, ids, config)
    assert text_of(responses) == "the river "
    assert ids_of(responses) == before
    assert [entry for response in responses for entry in response.logprobs or []] == [
        {token: -float(number)} for number, token in enumerate(before)
    ]
    assert responses[-1].finish_reason == "stop"
    assert responses[-1].generate_token_len == len(before)


def test_include_stop_str_in_output_keeps_the_string_and_its_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the STOP and")
    config = GenerationConfig(stop_words=["STOP"], include_stop_str_in_output=True)
    responses = answer(tokenizer, ids, config)
    assert text_of(responses) == "the STOP"
    assert tokenizer.decode(ids_of(responses)) == "the STOP"


def test_what_only_begins_like_a_stop_string_comes_out_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the STO")
    responses = answer(tokenizer, ids, GenerationConfig(stop_words=["STOP"]))
    assert (text_of(responses), ids_of(responses)) == ("the STO", ids)
    assert responses[-1].finish_reason == "length"


def test_no_stop_string_counts_before_min_new_tokens(tokenizer: Tokenizer) -> None:
    ids = [token for char in "a.b.c." for token in tokenizer.encode(char)]
    responses = answer(tokenizer, ids, GenerationConfig(stop_words=["."], min_new_tokens=3))
    assert text_of(responses) == "a.b"


@given(
    pieces=st.lists(st.sampled_from(PIECES), min_size=1, max_size=8), words=st.sets(st.sampled_from(PIECES), max_size=3)
)
def test_any_stop_words_cut_like_a_search_in_the_whole_text(
    tokenizer: Tokenizer, pieces: list[str], words: set[str]
) -> None:
    whole = "".join(pieces)
    ids = tokenizer.encode(whole)
    config = GenerationConfig(stop_words=sorted(words))
    found = [(whole.index(word) + len(word), whole.index(word)) for word in words if word in whole]
    expected = whole[: min(found)[1]] if found else whole
    streamed = answer(tokenizer, ids, config)
    (at_once,) = answer(tokenizer, ids, config, is_streaming=False)
    assert text_of(streamed) == at_once.text == expected
    assert ids_of(streamed) == at_once.token_ids
    assert streamed[-1].finish_reason == at_once.finish_reason == ("stop" if found else "length")
    assert streamed[-1].generate_token_len == len(at_once.token_ids)
    reported = tokenizer.decode(at_once.token_ids)
    assert reported.startswith(expected)
    assert not expected or not tokenizer.decode(at_once.token_ids[:-1]).startswith(expected)


def test_logits_and_ppl_come_with_the_last_response(tokenizer: Tokenizer) -> None:
    config = GenerationConfig(output_logits="generation", return_ppl=True)
    stream = AnswerStream(Request("r", [5, 6, 7], SamplingParams(stop_token_ids=(3,))), tokenizer, config)
    first = stream.add(
        RequestOutput("r", [70], prompt_logprobs=[{5: -1.0}, {6: -3.0, 7: -2.0}], logits=torch.ones(1, 8))
    )
    last = stream.add(RequestOutput("r", [3], "stop", logits=torch.zeros(1, 8)))
    assert first is not None
    assert first.logits is None
    assert first.ppl is None
    assert last is not None
    assert last.logits is not None
    assert torch.equal(last.logits, torch.ones(1, 8))  # one row for each reported token
    assert last.ppl == 2.0
    assert last.prompt_logprobs == [{5: -1.0}, {6: -3.0, 7: -2.0}]


def test_an_error_ends_the_answer_with_code_and_message(tokenizer: Tokenizer) -> None:
    for error, code in ((InvalidParameter("bad"), 400), (RuntimeError("broken"), 500)):
        stream = AnswerStream(Request("r", [5], SamplingParams()), tokenizer, GenerationConfig(), index=7)
        response = stream.add(RequestOutput("r", finish_reason="error", error=error))
        assert response is not None
        assert (response.finish_reason, response.error_code, response.error_message, response.index) == (
            "error",
            code,
            str(error),
            7,
        )
