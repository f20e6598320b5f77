"""From a request's fields to a GenerationConfig and a Job; what is not there yet is refused by its name."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from lmdeploy.errors import InvalidParameter
from lmdeploy.messages import GenerationConfig
from lmdeploy.serve.openai.protocol import Sampling, Streamed

# Fields of the same name and meaning on both sides.
_SHARED = (
    "n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "repetition_ngram_size", "repetition_ngram_threshold", "stop_token_ids", "logit_bias", "min_new_tokens", "ignore_eos",
    "skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output",
)  # fmt: skip


def generation_config(request: Sampling, max_new_tokens: int | None, **more: Any) -> GenerationConfig:
    """max_new_tokens None: as many as fit. more: fields of GenerationConfig, such as logprobs."""
    given = {name: value for name in _SHARED if (value := getattr(request, name)) is not None}
    stop = [request.stop] if isinstance(request.stop, str) else request.stop
    values = {"stop_words": stop or None, "random_seed": request.seed, **given, **more}
    return GenerationConfig(max_new_tokens=max_new_tokens, **values)


def check_stream_options(request: Streamed) -> None:
    if request.stream_options is not None and not request.stream:
        raise InvalidParameter("stream_options goes with stream=true only: leave it out")


def refuse_unsupported(request: BaseModel, *names: str) -> None:
    """Raise InvalidParameter naming the first of these fields that asks for something."""
    for name in names:
        if getattr(request, name):
            raise InvalidParameter(f"{name} is not supported yet: leave it out")
