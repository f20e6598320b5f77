"""When an answer ends, as far as token ids tell; stop strings are found where there is text."""

from __future__ import annotations

from lmdeploy.engine.state import RequestState
from lmdeploy.messages import FinishReason


def finish_reason(state: RequestState, session_len: int) -> FinishReason | None:
    """Why the request ends with its newest token, or None if it goes on."""
    sampling = state.request.sampling
    num_output = len(state.token_ids) - len(state.prompt_ids)
    if state.token_ids[-1] in state.stop_ids and num_output > sampling.min_new_tokens:
        return "stop"
    if state.matcher is not None and state.matcher.take(state.token_ids[-1]):
        return "stop"
    if num_output >= sampling.max_new_tokens or len(state.token_ids) >= session_len:
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
