"""When an answer ends, as far as token ids tell; stop strings are found where there is text."""

from __future__ import annotations

from lmdeploy.engine.state import INVALID_TOKEN, RequestState
from lmdeploy.messages import FinishReason


def finish_reason(state: RequestState) -> FinishReason | None:
    """Why the request ends with its newest token, or None if it goes on."""
    sampling, matcher, token = state.request.sampling, state.matcher, state.token_ids[-1]
    if token == INVALID_TOKEN or (matcher is not None and matcher.error):
        return "error"
    if token in state.end_ids and len(state.token_ids) - len(state.prompt_ids) > sampling.min_new_tokens:
        return "stop"
    if matcher is not None and matcher.take(token):
        return "error" if matcher.error else "stop"
    if len(state.token_ids) >= state.max_tokens:
        return "length"
    if sampling.repetition_ngram_size and _repeats(
        state.output_ids, sampling.repetition_ngram_size, sampling.repetition_ngram_threshold
    ):
        return "stop"
    return None


def _repeats(output_ids: list[int], size: int, threshold: int) -> bool:
    """Whether the last `size` tokens stand `threshold` times in a row at the end."""
    length = size * threshold
    if threshold < 2 or len(output_ids) < length:
        return False
    tail = output_ids[-length:]
    return tail == tail[-size:] * threshold
