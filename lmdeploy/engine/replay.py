"""Decode steps that are replayed from graphs, and the way of their tokens to the host. It captures nothing."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lmdeploy.engine.graphs import DecodeGraphs
from lmdeploy.engine.runner import PendingStep, Runner
from lmdeploy.engine.scheduler import StepPlan
from lmdeploy.kernels.cuda.driver import copy_async

_HOST_COPIES = 8  # more than steps can be in flight


def replay_step(runner: Runner, graphs: DecodeGraphs, plan: StepPlan) -> PendingStep | None:
    """Enqueue a step of one token each from its graph; None for another step, or where there is no graph for it."""
    batch_size, is_greedy = len(plan.states), plan.states.is_greedy
    if not plan.is_decode or plan.states.wants_hidden_states:
        return None
    found = graphs.find(batch_size, keeps_hidden=not is_greedy)
    if found is None:
        return None
    size, graph = found
    runner.slots.write_rows(plan, graphs.stage(size))
    result = graphs.replay(size, graph)
    if is_greedy:
        return PendingStep(plan, *runner.to_host(result), {})
    with torch.inference_mode():
        logits = runner.model.compute_logits(result)[:batch_size]  # of all rows: their number's kernels are there
        tokens, reports = runner.sample(plan, plan.states, logits, logits.new_empty(batch_size, 0))
    return PendingStep(plan, *runner.to_host(tokens), reports)


class HostTokens:
    """Pinned copies of the last steps' tokens, which never wait for the device; later steps may queue up behind them.

    All on the stream that was current when this was made. A step finds out nothing anew: after the milliseconds of a wait a
    virtual machine's caches are cold, and asking torch for the current stream took 30 to 100 microseconds.
    """

    def __init__(self, max_batch_size: int) -> None:
        self._copies = [
            torch.empty(max_batch_size, dtype=torch.int64, device="cpu", pin_memory=True) for _ in range(_HOST_COPIES)
        ]
        self._views = [copy.numpy() for copy in self._copies]
        self._events = [torch.cuda.Event() for _ in range(_HOST_COPIES)]
        self._stream = torch.cuda.current_stream()
        self._turn = 0

    def copy(self, tokens: Tensor) -> tuple[np.ndarray, torch.cuda.Event]:
        """A copy of tokens, contiguous int64, and the event after which it holds."""
        self._turn = (self._turn + 1) % _HOST_COPIES
        event, place = self._events[self._turn], self._copies[self._turn].data_ptr()
        copy_async(place, tokens.data_ptr(), tokens.nbytes, self._stream.cuda_stream)
        event.record(self._stream)
        return self._views[self._turn][: len(tokens)], event
