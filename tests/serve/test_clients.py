"""The packages `openai` and `anthropic` against a real server: the interfaces beyond chat completions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from tests.serve.live import KEY, running

ASK: Any = [{"role": "user", "content": "Where does the river run?"}]
GREEDY: Any = {"extra_body": {"temperature": 0}}


@pytest.fixture(scope="module")
def url(tiny: Path) -> Iterator[str]:
    with running(tiny) as (url, _):
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=20) as client:
        yield client


@pytest.fixture(scope="module")
def claude(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key=KEY, max_retries=0, timeout=20) as client:
        yield client


def test_responses_whole_and_streamed(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "tiny", "input": "Where?", "max_output_tokens": 12, "temperature": 0}
    whole = client.responses.create(**fields)
    assert whole.status == "incomplete"
    assert whole.usage is not None
    assert whole.usage.output_tokens == 12
    events = list(client.responses.create(**fields, stream=True))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == whole.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_responses_accumulate_in_the_package(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "tiny", "input": "Where?", "max_output_tokens": 30, "temperature": 0}
    text = client.responses.create(**fields).output_text
    word = text[len(text) // 2 :][:2]  # the package calls a response final only if it ended by itself
    with client.responses.stream(**fields, extra_body={"stop": word}) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_response()
    assert "response.output_text.delta" in kinds
    assert (final.status, final.output_text) == ("completed", text[: text.index(word)])


def test_a_response_goes_on_and_is_deleted(client: openai.OpenAI) -> None:
    first = client.responses.create(model="tiny", input="one", max_output_tokens=4)
    second = client.responses.create(
        model="tiny", input="two", max_output_tokens=4, previous_response_id=first.id, top_logprobs=2
    )
    assert second.usage is not None
    assert first.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens
    assert client.responses.retrieve(second.id).output_text == second.output_text
    message = second.output[0]
    assert message.type == "message"
    assert message.content[0].type == "output_text"
    logprobs = message.content[0].logprobs
    assert logprobs is not None
    assert {len(entry.top_logprobs) for entry in logprobs} == {2}
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(model="tiny", input="x", previous_response_id=first.id)


def test_messages_whole_and_streamed(claude: anthropic.Anthropic) -> None:
    fields: dict[str, Any] = {"model": "tiny", "messages": ASK, "max_tokens": 12, "system": "Be brief.", **GREEDY}
    whole = claude.messages.create(**fields)
    assert whole.stop_reason == "max_tokens"
    assert whole.usage.output_tokens == 12
    assert whole.content[0].type == "text"
    with claude.messages.stream(**fields) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[0].text
    assert final.content[0].type == "text"
    assert final.content[0].text == text
    assert (final.stop_reason, final.usage.output_tokens) == ("max_tokens", 12)
    count = claude.messages.count_tokens(model="tiny", messages=ASK, system="Be brief.")
    total = whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
    assert count.input_tokens == total
    assert final.usage.input_tokens + (final.usage.cache_read_input_tokens or 0) == total


def test_the_stop_sequence_that_ended_a_message(claude: anthropic.Anthropic) -> None:
    fields: dict[str, Any] = {"model": "tiny", "messages": ASK, "max_tokens": 30, **GREEDY}
    text = claude.messages.create(**fields).content[0].text  # type: ignore[union-attr]
    word = text[len(text) // 2 :][:2]
    message = claude.messages.create(stop_sequences=["never there", word], **fields)
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", word)
    assert message.content[0].text == text[: text.index(word)]  # type: ignore[union-attr]


def test_errors_of_anthropics_package(claude: anthropic.Anthropic, url: str) -> None:
    fields: dict[str, Any] = {"model": "tiny", "messages": ASK, "max_tokens": 1}
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(**{**fields, "model": "claude"})
    with pytest.raises(anthropic.BadRequestError, match="session_len") as long:
        claude.messages.create(**{**fields, "messages": [{"role": "user", "content": "river " * 2000}]})
    assert long.value.request_id
    with pytest.raises(anthropic.AuthenticationError):
        anthropic.Anthropic(base_url=url, api_key="wrong", max_retries=0).messages.create(**fields)
    # A bearer token is as good as the header x-api-key.
    with anthropic.Anthropic(base_url=url, auth_token=KEY, api_key=None, max_retries=0) as bearer:
        assert bearer.messages.create(**fields).usage.output_tokens == 1


def test_a_stream_of_messages_refused(claude: anthropic.Anthropic) -> None:
    with (
        pytest.raises(anthropic.BadRequestError, match="document"),
        claude.messages.stream(
            model="tiny",
            max_tokens=1,
            messages=[{"role": "user", "content": [{"type": "document", "source": {"type": "text", "data": "x"}}]}],  # type: ignore[list-item, typeddict-item]
        ),
    ):
        pass
