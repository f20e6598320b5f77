"""Perplexity of texts that are given as token ids. It scores through a pipeline and computes no logit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lmdeploy.errors import InvalidParameter, RequestError
from lmdeploy.messages import GenerationConfig, Response

if TYPE_CHECKING:
    from lmdeploy.api import Pipeline


def mean_cross_entropies(pipe: Pipeline, input_ids: Sequence[int] | Sequence[Sequence[int]]) -> list[float]:
    """As Pipeline.get_ppl: in nats, one number for each text."""
    batch = _id_lists(input_ids)
    short = next((number for number, ids in enumerate(batch) if len(ids) < 2), None)
    if short is not None:
        raise InvalidParameter(f"text {short} has {len(batch[short])} tokens: a perplexity needs at least 2")
    responses = pipe.infer(batch, GenerationConfig(max_new_tokens=0, return_ppl=True))
    assert isinstance(responses, list)
    return [_ppl(response) for response in responses]


def _id_lists(input_ids: Any) -> list[list[int]]:
    """Token ids as lists, from lists, arrays or tensors of one text or several."""
    if hasattr(input_ids, "tolist"):
        input_ids = input_ids.tolist()
    if not isinstance(input_ids, (list, tuple)) or not input_ids:
        raise InvalidParameter("input_ids: give a list of token ids, or a list of such lists")
    if isinstance(input_ids[0], int):
        return [list(input_ids)]
    return [ids.tolist() if hasattr(ids, "tolist") else list(ids) for ids in input_ids]


def _ppl(response: Response) -> float:
    if response.ppl is None:
        message = f"text {response.index}: {response.error_message or response.finish_reason}"
        raise InvalidParameter(message) if response.error_code == 400 else RequestError(message)
    return response.ppl
