"""What the device keeps of each request between steps: its last token and its block table. It runs no model.

A request has a line from its first step to its end. The host writes what it knows first; the device what it sampled.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lmdeploy.engine.scheduler import Scheduled
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

    def lines(self, states: Sequence[RequestState]) -> Tensor:
        """The lines of requests, [R] int64 on the device."""
        host = torch.tensor([self.line(state) for state in states], dtype=torch.int64, device="cpu")
        device = self.last_tokens.device
        # From memory that is not pinned the copy would wait for the steps in flight.
        return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host

    def show_tables(self, entries: Sequence[Scheduled], block_tables: Tensor) -> None:
        """Copy block tables [B, n] on the device, n blocks at most of each entry's request, into their lines."""
        lines = self.lines([entry.state for entry in entries])
        self.tables[lines, : block_tables.shape[1]] = block_tables
        for entry in entries:
            table = entry.state.block_table
            self._shown[self.line(entry.state)] = (table, min(len(table), block_tables.shape[1]))

    def write_rows(self, entries: Sequence[Scheduled], rows: np.ndarray) -> bool:
        """Fill rows [B, ROW_INTS] of a step of one token each; False if a table must be shown as a whole before."""
        values = []
        lines, shown = self._lines, self._shown
        for entry in entries:
            state = entry.state
            line = lines.get(state.request.request_id)
            if line is None:
                return False
            table, count = shown[line]
            blocks = state.block_table
            block = -1
            if table is not blocks or len(blocks) > count:
                if table is not blocks or len(blocks) > count + 1:
                    return False
                block = blocks[-1]
                shown[line] = (table, count + 1)
            start, known = entry.start, state.token_ids
            token = known[start] if start < len(known) else -1
            values.append((line, start + 1, block, token, len(state.prompt_ids)))
        rows[: len(values)] = values
        rows[len(values) :] = (self.padding, 0, -1, 0, 1)
        return True
