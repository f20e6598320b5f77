"""From a GenerationConfig, which speaks of words, to SamplingParams, which speak of token ids; and whose defaults hold.

It knows the tokenizer but no prompt's text, no chat template and no engine.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lmdeploy.engine.request import SamplingParams
from lmdeploy.errors import CheckpointError, InvalidParameter
from lmdeploy.local_file import read_json
from lmdeploy.logging import get_logger
from lmdeploy.messages import GenerationConfig
from lmdeploy.tokenizer import Tokenizer

PIPELINE_DEFAULTS = GenerationConfig()
CHAT_DEFAULTS = GenerationConfig(max_new_tokens=None, temperature=0.7, top_p=0.95)

# What do_sample=True means for a field that nobody set.
_SAMPLING_DEFAULTS: dict[str, Any] = {"temperature": 0.8, "top_p": 1.0, "top_k": 50, "min_p": 0.0}
_GREEDY: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
_NOT_SUPPORTED = (
    "logits_processors", "with_cache", "preserve_cache", "migration_request", "return_routed_experts",
)  # fmt: skip


def read_defaults(path: Path, fallback: GenerationConfig) -> GenerationConfig:
    """`fallback`, under the sampling settings of the model's generation_config.json if that says do_sample."""
    try:
        values = read_json(path / "generation_config.json")  # which a GGUF file has not
    except CheckpointError:
        return fallback
    if not values.get("do_sample"):
        return fallback
    names = (*_SAMPLING_DEFAULTS, "repetition_penalty")
    found = {name: values[name] for name in names if values.get(name) is not None}
    try:
        return replace(fallback, **{**dict.fromkeys(_SAMPLING_DEFAULTS), **found, "do_sample": True})
    except InvalidParameter as error:
        get_logger().warning("the model's generation_config.json is not used: %s", error)
        return fallback


def effective_config(config: GenerationConfig | None, defaults: GenerationConfig) -> GenerationConfig:
    """`config` with every field of sampling filled in: from itself, else `defaults`, else what do_sample means.

    Greedy comes out as do_sample=False with temperature 0. None for `config` takes `defaults` whole.
    """
    if config is None:
        config = defaults
    explicit = {name: getattr(config, name) for name in _SAMPLING_DEFAULTS if getattr(config, name) is not None}
    is_undecided = config.do_sample is None and not explicit
    if not (defaults if is_undecided else config).is_sampling:
        return replace(config, do_sample=False, **_GREEDY)
    inherited = {name: getattr(defaults, name) for name in _SAMPLING_DEFAULTS} if defaults.is_sampling else {}
    inherited = {name: value for name, value in inherited.items() if value is not None}
    penalty = config.repetition_penalty if config.repetition_penalty != 1.0 else defaults.repetition_penalty
    filled = {**_SAMPLING_DEFAULTS, **inherited, **explicit}
    return replace(config, do_sample=True, repetition_penalty=penalty, **filled)


def sampling_params(
    config: GenerationConfig, tokenizer: Tokenizer, *, end_token_ids: Iterable[int], max_new_tokens: int
) -> SamplingParams:
    """Translate an effective config. Raises InvalidParameter for what is not supported.

    end_token_ids: the model's and the template's end tokens, which ignore_eos leaves out. max_new_tokens: what None in
    the config means, that is the room after the prompt.
    """
    for name in _NOT_SUPPORTED:
        if getattr(config, name):
            raise InvalidParameter(f"{name}={getattr(config, name)!r} is not supported yet: leave it out")
    for name in ("stop_words", "bad_words"):
        words = getattr(config, name) or []
        if isinstance(words, str) or not all(isinstance(word, str) and word for word in words):
            raise InvalidParameter(f"{name}={words!r}: give a list of strings of at least one character")
    for name, kinds in (("stop_token_ids", (list, tuple)), ("bad_token_ids", (list, tuple)), ("logit_bias", (dict,))):
        if not isinstance(getattr(config, name) or kinds[0](), kinds):
            raise InvalidParameter(f"{name}={getattr(config, name)!r}: give a {kinds[0].__name__}")
    grammar = _grammar(config)
    stop_ids = [] if config.ignore_eos and grammar is None else list(end_token_ids)
    stop_ids += config.stop_token_ids or []
    spelled = (single_token(tokenizer, word) for word in config.stop_words or [])
    stop_ids += [token for token in spelled if token is not None]
    bad = _bad_sequences(tokenizer, config.bad_words or [])
    return SamplingParams(
        max_new_tokens=max_new_tokens if config.max_new_tokens is None else config.max_new_tokens,
        min_new_tokens=config.min_new_tokens or 0,
        temperature=config.temperature or 0.0,
        top_k=config.top_k or 0,
        top_p=1.0 if config.top_p is None else config.top_p,
        min_p=config.min_p or 0.0,
        repetition_penalty=config.repetition_penalty,
        presence_penalty=config.presence_penalty,
        frequency_penalty=config.frequency_penalty,
        seed=config.random_seed,
        stop_token_ids=tuple(dict.fromkeys(stop_ids)),
        bad_token_ids=tuple(dict.fromkeys([*(config.bad_token_ids or []), *(ids[0] for ids in bad if len(ids) == 1)])),
        bad_token_sequences=tuple(ids for ids in bad if len(ids) > 1),
        logit_bias=dict(config.logit_bias or {}),
        repetition_ngram_size=config.repetition_ngram_size,
        repetition_ngram_threshold=config.repetition_ngram_threshold,
        logprobs=config.logprobs,
        prompt_logprobs=config.return_ppl,
        grammar=grammar,
        return_logits=config.output_logits,
        return_hidden_states=config.output_last_hidden_state,
    )


def _grammar(config: GenerationConfig) -> str | None:
    if not config.response_format:
        return None
    from lmdeploy.grammar import grammar_of

    grammar = grammar_of(config.response_format)
    if grammar is not None and config.min_new_tokens:
        raise InvalidParameter(
            "min_new_tokens does not go with response_format: the grammar says where an answer may end"
        )
    return grammar


def single_token(tokenizer: Tokenizer, word: str) -> int | None:
    """The token that spells exactly `word`, if the tokenizer makes one of it."""
    ids = tokenizer.encode(word, add_bos=False, add_special_tokens=False)
    return ids[0] if len(ids) == 1 and tokenizer.token_to_bytes(ids[0]) == word.encode() else None


def _bad_sequences(tokenizer: Tokenizer, words: list[str]) -> list[tuple[int, ...]]:
    """Ids of each word at the start of a text and after a space, since these are different tokens."""
    texts = [text for word in words for text in (word, f" {word}")]
    ids = (tuple(tokenizer.encode(text, add_bos=False, add_special_tokens=False)) for text in texts)
    return list(dict.fromkeys(sequence for sequence in ids if sequence))
