"""What the device keeps of each request between steps: its last token and its block table. It runs no model.

A request has a line from its first step to its end. The host writes what it knows first; the device what it sampled.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lmdeploy.engine.batch import block_table_rows, send
from lmdeploy.engine.scheduler import Cohort, StepPlan
from lmdeploy.engine.state import RequestState

ROW_INTS = 5  # of prepare_decode


class Slots:
    """Lines of `last_tokens` [R + 1] int64 and `tables` [R + 1, max_blocks] int32; the last line is for padding."""

    def __init__(self, max_requests: int, max_blocks: int, device: torch.device) -> None:
        self.padding = max_requests
        self.last_tokens = torch.zeros(max_requests + 1, dtype=torch.int64, device=device)
        self.tables = torch.zeros(max_requests + 1, max_blocks, dtype=torch.int32, device=device)
        self._free = list(range(max_requests - 1, -1, -1))
        self._lines: dict[str, int] = {}
        # The table that each line shows and how many of its blocks are there already.
        self._shown: list[tuple[list[int], int]] = [([], 0)] * (max_requests + 1)
        # The rows [B, ROW_INTS] that were written last, for whom, and in which step.
        self._values = np.empty((0, ROW_INTS), np.int32)
        self._cohort: Cohort | None = None
        self._number = 0

    def line(self, state: RequestState) -> int:
        """The request's line."""
        line = self._lines.get(state.request_id)
        if line is None:
            line = self._lines[state.request_id] = self._free.pop()
        return line

    def forget(self, request_id: str) -> None:
        """The request has ended. Steps in flight may still write to its line; whoever has it next writes after them."""
        line = self._lines.pop(request_id, None)
        if line is not None:
            self._shown[line] = ([], 0)
            self._free.append(line)

    def last_tokens_of(self, states: Sequence[RequestState]) -> Tensor:
        """[R] int64, in flight or not."""
        return self.last_tokens[self._lines_of(states)]

    def keep(self, tokens: Tensor, states: Sequence[RequestState]) -> None:
        """Tokens [R] that a step samples are the requests' last ones; what was no token becomes token 0."""
        self.last_tokens[self._lines_of(states)] = tokens.clamp(min=0)

    def _lines_of(self, states: Sequence[RequestState]) -> Tensor:
        """The requests' lines, [R] int64 on the device."""
        return send(np.array([self.line(state) for state in states], np.int64), self.last_tokens.device)

    def write_rows(self, plan: StepPlan, rows: np.ndarray) -> None:
        """Fill rows [size, ROW_INTS] of a step of one token each, B of them and padding, and show the tables they need."""
        follows = plan.states is self._cohort and plan.number == self._number + 1 and plan.grown is not None
        values = self._values if follows else self._first_rows(plan)
        if follows:  # the device has sampled every token; blocks come one by one
            values[:, 2:4] = -1
            for row in plan.grown or ():
                blocks = plan.states[row].block_table
                values[row, 2] = blocks[-1]
                self._shown[values[row, 0]] = (blocks, len(blocks))
        values[:, 1] = plan.starts + 1
        self._cohort, self._number, self._values = plan.states, plan.number, values
        rows[: len(values)] = values
        if len(values) < len(rows):
            rows[len(values) :] = (self.padding, 0, -1, 0, 1)

    def _first_rows(self, plan: StepPlan) -> np.ndarray:
        """The rows [B, ROW_INTS] but for their lengths, of a step whose requests may be anywhere."""
        values, unshown = [], []
        for state, start in zip(plan.states, plan.starts.tolist(), strict=True):
            line, blocks, block, known = self.line(state), state.block_table, -1, state.token_ids
            table, count = self._shown[line]
            if table is not blocks or len(blocks) > count + 1:
                unshown.append(state)
            elif len(blocks) > count:
                block = blocks[-1]
            self._shown[line] = (blocks, len(blocks))
            values.append((line, 0, block, known[start] if start < len(known) else -1, len(state.prompt_ids)))
        if unshown:
            tables = block_table_rows(unshown, max(len(state.block_table) for state in unshown))
            self.tables[self._lines_of(unshown), : tables.shape[1]] = send(tables, self.tables.device)
        return np.array(values, np.int32)
