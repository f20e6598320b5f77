from __future__ import annotations

import json
from pathlib import Path

import pytest

from lmdeploy.engine.request import SamplingParams
from lmdeploy.errors import InvalidGrammar, InvalidParameter
from lmdeploy.generation import CHAT_DEFAULTS, PIPELINE_DEFAULTS, effective_config, read_defaults, sampling_params
from lmdeploy.messages import GenerationConfig
from lmdeploy.tokenizer import Tokenizer
from tests.tiny_model import make_tiny_llama


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_path(make_tiny_llama(tmp_path_factory.mktemp("tiny")))


def params(tokenizer: Tokenizer, config: GenerationConfig, end_token_ids: tuple[int, ...] = (3,)) -> SamplingParams:
    effective = effective_config(config, PIPELINE_DEFAULTS)
    return sampling_params(effective, tokenizer, end_token_ids=end_token_ids, max_new_tokens=100)


def shown(config: GenerationConfig) -> tuple[object, ...]:
    return config.do_sample, config.temperature, config.top_p, config.top_k, config.min_p


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, (False, 0.0, 1.0, 0, 0.0)),
        (GenerationConfig(), (False, 0.0, 1.0, 0, 0.0)),
        (GenerationConfig(do_sample=True), (True, 0.8, 1.0, 50, 0.0)),
        (GenerationConfig(temperature=0.3), (True, 0.3, 1.0, 50, 0.0)),
        (GenerationConfig(top_k=0, min_p=0.1), (True, 0.8, 1.0, 0, 0.1)),
        (GenerationConfig(do_sample=False, temperature=0.3), (False, 0.0, 1.0, 0, 0.0)),
        (GenerationConfig(temperature=0, top_p=0.5), (False, 0.0, 1.0, 0, 0.0)),
    ],
)
def test_pipeline_is_greedy_until_a_sampling_field_is_set(
    config: GenerationConfig | None, expected: tuple[object, ...]
) -> None:
    assert shown(effective_config(config, PIPELINE_DEFAULTS)) == expected


def test_chat_defaults_hold_where_the_config_is_silent() -> None:
    assert shown(effective_config(None, CHAT_DEFAULTS)) == (True, 0.7, 0.95, 50, 0.0)
    assert effective_config(None, CHAT_DEFAULTS).max_new_tokens is None
    assert shown(effective_config(GenerationConfig(temperature=0.2), CHAT_DEFAULTS)) == (True, 0.2, 0.95, 50, 0.0)
    assert shown(effective_config(GenerationConfig(temperature=0), CHAT_DEFAULTS)) == (False, 0.0, 1.0, 0, 0.0)


def test_the_models_generation_config_stands_between_config_and_fallback(tmp_path: Path) -> None:
    written = {"do_sample": True, "temperature": 0.6, "top_k": 20, "repetition_penalty": 1.05, "eos_token_id": 2}
    (tmp_path / "generation_config.json").write_text(json.dumps(written), encoding="utf-8")
    defaults = read_defaults(tmp_path, CHAT_DEFAULTS)
    assert shown(effective_config(None, defaults)) == (True, 0.6, 1.0, 20, 0.0)
    assert defaults.max_new_tokens is None
    explicit = effective_config(GenerationConfig(top_k=5), defaults)
    assert shown(explicit) == (True, 0.6, 1.0, 5, 0.0)
    assert explicit.repetition_penalty == 1.05
    assert effective_config(GenerationConfig(temperature=0), defaults).repetition_penalty == 1.0


@pytest.mark.parametrize("text", [None, "{", "[]", '{"temperature": 0.6}', '{"do_sample": true, "temperature": -1}'])
def test_a_generation_config_that_is_absent_silent_or_broken_leaves_the_fallback(
    tmp_path: Path, text: str | None
) -> None:
    if text is not None:
        (tmp_path / "generation_config.json").write_text(text, encoding="utf-8")
    assert read_defaults(tmp_path, PIPELINE_DEFAULTS) is PIPELINE_DEFAULTS


def test_stop_words_of_one_token_become_stop_ids(tokenizer: Tokenizer) -> None:
    config = GenerationConfig(stop_words=["<s>", "a", "river flows"], stop_token_ids=[9])
    (letter,) = tokenizer.encode("a")
    assert params(tokenizer, config).stop_token_ids == (3, 9, 0, letter)


def test_ignore_eos_leaves_only_what_the_user_asked_for(tokenizer: Tokenizer) -> None:
    assert params(tokenizer, GenerationConfig(ignore_eos=True, stop_words=["a"])).stop_token_ids == tuple(
        tokenizer.encode("a")
    )


def test_bad_words_are_banned_with_and_without_a_space(tokenizer: Tokenizer) -> None:
    sampling = params(tokenizer, GenerationConfig(bad_words=["a", "river flows"], bad_token_ids=[8]))
    banned = {8, *tokenizer.encode("a")}
    sequences = {tuple(tokenizer.encode(text)) for text in ("river flows", " river flows", " a")}
    assert set(sampling.bad_token_ids) == banned | {ids[0] for ids in sequences if len(ids) == 1}
    assert set(sampling.bad_token_sequences) == {ids for ids in sequences if len(ids) > 1}


def test_no_limit_on_new_tokens_means_the_room_that_is_left(tokenizer: Tokenizer) -> None:
    assert params(tokenizer, GenerationConfig(max_new_tokens=None)).max_new_tokens == 100
    assert params(tokenizer, GenerationConfig(max_new_tokens=7)).max_new_tokens == 7


@pytest.mark.parametrize("name", ["logits_processors", "with_cache", "migration_request"])
def test_what_is_not_there_yet_is_refused_by_name(tokenizer: Tokenizer, name: str) -> None:
    with pytest.raises(InvalidParameter, match=name):
        params(tokenizer, GenerationConfig(**{name: {"type": "json_object"}}))


def test_a_response_format_becomes_a_grammar_that_ends_the_answer(tokenizer: Tokenizer) -> None:
    form = {"type": "regex_schema", "regex_schema": "a+"}
    sampling = params(tokenizer, GenerationConfig(response_format=form, ignore_eos=True))
    assert "a+" in (sampling.grammar or "")
    assert sampling.stop_token_ids == params(tokenizer, GenerationConfig()).stop_token_ids != ()
    assert params(tokenizer, GenerationConfig(response_format={"type": "text"})).grammar is None
    with pytest.raises(InvalidParameter, match="min_new_tokens"):
        params(tokenizer, GenerationConfig(response_format=form, min_new_tokens=1))
    with pytest.raises(InvalidGrammar, match="yaml"):
        params(tokenizer, GenerationConfig(response_format={"type": "yaml"}))


@pytest.mark.parametrize("words", ["stop", [""], [3]])
@pytest.mark.parametrize("name", ["stop_words", "bad_words"])
def test_words_have_to_be_a_list_of_strings(tokenizer: Tokenizer, name: str, words: object) -> None:
    with pytest.raises(InvalidParameter, match=name):
        params(tokenizer, GenerationConfig(**{name: words}))


@pytest.mark.parametrize("value", [7, "7", {7: 1}])
@pytest.mark.parametrize("name", ["stop_token_ids", "bad_token_ids"])
def test_token_ids_have_to_be_a_list(tokenizer: Tokenizer, name: str, value: object) -> None:
    with pytest.raises(InvalidParameter, match=name):
        params(tokenizer, GenerationConfig(**{name: value}))


def test_a_bias_has_to_be_a_dict(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidParameter, match="logit_bias"):
        params(tokenizer, GenerationConfig(logit_bias=[1.0, 2.0]))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["n", "max_new_tokens", "min_new_tokens", "top_k", "logprobs"])
@pytest.mark.parametrize("value", [1.5, "1", True, -1, float("nan")])
def test_a_count_has_to_be_a_whole_number(name: str, value: object) -> None:
    with pytest.raises(InvalidParameter, match=name):
        GenerationConfig(**{name: value})  # type: ignore[arg-type]
