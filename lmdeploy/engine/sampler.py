"""From logits to the next token of each request, on the logits' device. It knows no request queue and no cache.

What only some requests ask for lies in modules of its own: penalties, guided, drawing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lmdeploy import kernels
from lmdeploy.engine.state import RequestState

if TYPE_CHECKING:
    from lmdeploy.engine.penalties import LogitChanges


class Sampler:
    """Chooses tokens; keeps what penalties and biases need of the requests that use them."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._changes: LogitChanges | None = None

    def forget(self, request_id: str) -> None:
        """The request has ended."""
        if self._changes is not None:
            self._changes.forget(request_id)

    def __call__(self, logits: Tensor, states: Sequence[RequestState]) -> Tensor:
        """The tokens, [R] int64, INVALID_TOKEN where no logit was finite.

        logits: [R, V] float32, one row per state; may be changed in place.
        """
        params = [state.request.sampling for state in states]
        if any(p.changes_logits for p in params):
            from lmdeploy.engine.penalties import LogitChanges

            self._changes = self._changes or LogitChanges(self._vocab_size, self._device)
            self._changes.apply(logits, states)
        if any(state.matcher is not None for state in states):
            from lmdeploy.engine.guided import apply_grammars

            apply_grammars(logits, states)
        tokens = _choose(logits, states)
        if self._changes is not None:
            self._changes.add(tokens, states)
        return tokens


def _choose(logits: Tensor, states: Sequence[RequestState]) -> Tensor:
    """The largest of each greedy row, a draw from each other: [R, V] -> [R] int64."""
    if all(state.request.sampling.temperature == 0 for state in states):
        return kernels.argmax(logits)
    from lmdeploy.engine.drawing import draw_some

    return draw_some(logits, states)
