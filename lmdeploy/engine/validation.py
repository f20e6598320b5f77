"""What the engine refuses before admission. It needs no engine, only its numbers, so any process can ask."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import msgspec

from lmdeploy.engine.request import Request, SamplingParams
from lmdeploy.errors import InvalidParameter, PromptTooLong


@dataclass(frozen=True)
class EngineInfo:
    """An engine's numbers, fixed once it has started. max_batch_size: as asked for, if it was, though no more requests run
    than there are blocks. load_s: until it could answer, told by what runs it. memory_plan: rows of (name, value) to print."""

    architecture: str
    dtype: str
    device: str
    vocab_size: int
    session_len: int
    max_batch_size: int
    num_blocks: int
    block_size: int
    weight_bytes: int
    load_s: float = 0.0
    eos_token_ids: list[int] = field(default_factory=list)
    memory_plan: list[tuple[str, str]] = field(default_factory=list)


_BOUNDS: dict[str, tuple[float, float]] = {
    "max_new_tokens": (0, 1 << 31),
    "min_new_tokens": (0, 1 << 31),
    "temperature": (0.0, 100.0),
    "top_k": (0, 1 << 31),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-3, 1e3),
    "presence_penalty": (-100.0, 100.0),
    "frequency_penalty": (-100.0, 100.0),
    "repetition_ngram_size": (0, 1024),
    "repetition_ngram_threshold": (0, 1 << 20),
    "logprobs": (0, 1024),
    "seed": (-(1 << 63), (1 << 63) - 1),
}
_MAX_BIAS = 1e6
_MAX_BAD_SEQUENCES = 1024  # each is looked for at every token


def check_request(request: Request, info: EngineInfo) -> None:
    """Raise InvalidParameter or PromptTooLong if this engine can never run the request."""
    _check_types(request)
    _check_sampling(request.sampling)
    prompt_len = len(request.prompt_ids)
    if not prompt_len:
        raise InvalidParameter("the prompt is empty: give at least one token")
    needed = prompt_len + (request.sampling.max_new_tokens > 0)
    if needed > info.session_len:
        raise PromptTooLong(
            f"the prompt has {prompt_len} tokens; session_len is {info.session_len} and the KV cache holds "
            f"{info.num_blocks * info.block_size}: shorten it, or raise session_len or cache_max_entry_count"
        )
    _check_ids("prompt", request.prompt_ids, info.vocab_size)
    sampling = request.sampling
    for name in ("stop_token_ids", "bad_token_ids", "logit_bias"):
        _check_ids(name, list(getattr(sampling, name)), info.vocab_size)
    if len(sampling.bad_token_sequences) > _MAX_BAD_SEQUENCES:
        raise InvalidParameter(f"{len(sampling.bad_token_sequences)} bad sequences: give at most {_MAX_BAD_SEQUENCES}")
    for sequence in sampling.bad_token_sequences:
        if not sequence:
            raise InvalidParameter("bad_token_sequences holds an empty sequence")
        _check_ids("bad_token_sequences", list(sequence), info.vocab_size)
    if len(set(sampling.bad_token_ids)) >= info.vocab_size:
        raise InvalidParameter("bad_token_ids bans the whole vocabulary")
    if sampling.logprobs is not None and sampling.logprobs > info.vocab_size:
        raise InvalidParameter(f"logprobs={sampling.logprobs} is more than the {info.vocab_size} tokens there are")


def _check_types(request: Request) -> None:
    """Refuse what could not travel to an engine process as it is, and would break a step here."""
    try:
        msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=Request)
    except (msgspec.MsgspecError, TypeError, ValueError, OverflowError) as error:
        raise InvalidParameter(f"the request is malformed: {error}") from None


def _check_sampling(sampling: SamplingParams) -> None:
    for name, (low, high) in _BOUNDS.items():
        value = getattr(sampling, name)
        if value is None and name in ("logprobs", "seed"):
            continue
        if not low <= value <= high:
            raise InvalidParameter(f"{name}={value!r} is out of bounds: give a number from {low:g} to {high:g}")
    for token, bias in sampling.logit_bias.items():
        if math.isnan(bias) or bias > _MAX_BIAS:
            raise InvalidParameter(f"logit_bias of token {token} is {bias!r}: give a number of at most {_MAX_BIAS:g}")


def _check_ids(name: str, ids: list[int], vocab_size: int) -> None:
    bad = next((i for i in ids if not 0 <= i < vocab_size), None)
    if bad is not None:
        raise InvalidParameter(f"{name} holds token id {bad}; this model's ids are 0 to {vocab_size - 1}")
