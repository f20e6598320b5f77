"""Decode steps as captured CUDA graphs, one per batch size in a ladder. It schedules nothing and samples only greedily.

A graph holds everything from the host's few integers per request to the tokens; where other sampling follows, a second
graph of the same size ends with the hidden states. https://developer.nvidia.com/blog/cuda-graphs/
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmdeploy import kernels
from lmdeploy.engine.slots import ROW_INTS, Slots
from lmdeploy.kernels.cuda.driver import copy_async
from lmdeploy.kernels.reference.decode_inputs import DecodeInputs
from lmdeploy.layers.context import ForwardContext, KVCache
from lmdeploy.logging import get_logger
from lmdeploy.models.base import CausalLM

_STEP = 8  # between sizes of the ladder above 8
_STAGES = 4  # rows that may still be on their way to the device
capture_lock = threading.Lock()  # a capture begins by waiting for the whole device, which breaks another thread's


@dataclass(frozen=True)
class Graph:
    """A captured step. result: what a replay leaves, the tokens [size] int64, INVALID_TOKEN where no logit was finite, or the
    hidden states [size, C]."""

    replay: Callable[[], None]
    result: Tensor


class DecodeGraphs:
    """The graphs of one model and cache, and the static tensors that they read and write."""

    def __init__(
        self, model: CausalLM, kv_cache: KVCache, slots: Slots, decode_buffers: object | None, max_batch_size: int
    ) -> None:
        device = slots.last_tokens.device
        self._model, self._kv_cache, self._slots = model, kv_cache, slots
        self._decode_buffers = decode_buffers
        self._max_blocks = slots.tables.shape[1]
        self._inputs = DecodeInputs.empty(max_batch_size, self._max_blocks, device)
        self._rows = torch.zeros(max_batch_size, ROW_INTS, dtype=torch.int32, device=device)
        self._cu_seqlens = torch.arange(max_batch_size + 1, dtype=torch.int32, device=device)
        is_pinned = device.type == "cuda"
        self._staging = [
            torch.zeros(max_batch_size, ROW_INTS, dtype=torch.int32, device="cpu", pin_memory=is_pinned)
            for _ in range(_STAGES)
        ]
        self._views = [staging.numpy() for staging in self._staging]
        self._turn = 0
        self._stream = torch.cuda.current_stream() if is_pinned else None  # of the steps
        # Not the logits, which would take a hundred times as much beside those that graphs make and give back.
        self._hidden_states = torch.empty(max_batch_size, model.config.hidden_size, dtype=model.dtype, device=device)
        self._pool: Any = None
        # Those whose capture failed as well: when one goes, torch frees what cuBLAS has on the stream of its capture, which all
        # the others use. https://github.com/pytorch/pytorch/issues/193402
        self._captured: list[Any] = []
        self.graphs: dict[tuple[int, bool], Graph] = {}
        self._takes_no_more = False
        sizes = [1, 2, 4, *range(_STEP, max_batch_size + 1, _STEP)]
        self.sizes = sorted({size for size in sizes if size <= max_batch_size} | {max_batch_size})

    def missing(self) -> list[tuple[int, bool]]:
        """Graphs that are not captured yet, the small ones first: they lose most where a larger one takes their place."""
        if self._takes_no_more or len(self.graphs) == 2 * len(self.sizes):
            return []
        wanted = [(size, keeps_hidden) for size in self.sizes for keeps_hidden in (False, True)]
        return [key for key in wanted if key not in self.graphs]

    def capture_next(self) -> bool:
        """Capture one that is missing; False if none is. After one that fails, for want of memory, none is missing."""
        missing = self.missing()
        if missing:
            try:
                self.capture(*missing[0])
            except Exception as error:
                self._takes_no_more = True
                get_logger().warning("no more decode steps are captured; larger ones take their place: %s", error)
        return bool(missing)

    def find(self, batch_size: int, keeps_hidden: bool) -> tuple[int, Graph] | None:
        """The smallest captured graph that holds the batch, and its size."""
        for size in self.sizes[bisect_left(self.sizes, batch_size) :]:
            if (graph := self.graphs.get((size, keeps_hidden))) is not None:
                return size, graph
        return None

    def stage(self, size: int) -> np.ndarray:
        """Where the host writes the rows [size, ROW_INTS] of the next step."""
        self._turn = (self._turn + 1) % _STAGES
        return self._views[self._turn][:size]

    def replay(self, size: int, graph: Graph) -> Tensor:
        """Enqueue the step whose rows were staged last; its result, valid until the next replay."""
        staging = self._staging[self._turn]  # all of it: a view takes longer than the rest
        if self._stream is None:
            self._rows.copy_(staging)
        else:
            copy_async(self._rows.data_ptr(), staging.data_ptr(), staging.nbytes, self._stream.cuda_stream)
        graph.replay()
        return graph.result

    @torch.inference_mode()
    def capture(self, size: int, keeps_hidden: bool) -> None:
        """Capture one graph; nothing may be in flight. Its first run, on padding, compiles what is not compiled yet."""
        self._views[self._turn][:size] = (self._slots.padding, 0, -1, 0, 1)
        self._rows[:size].copy_(self._staging[self._turn][:size])
        self.step(size, keeps_hidden)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()  # of the steps, for what is kept by stream
        self._captured.append(graph)
        captured = torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local")
        with capture_lock, captured:
            result = self.step(size, keeps_hidden)
        self.graphs[size, keeps_hidden] = Graph(graph.replay, result)

    def context_lens_host(self, size: int) -> list[int]:
        """Nothing: a kernel that asks the host for lengths cannot be captured."""
        return []

    def step(self, size: int, keeps_hidden: bool) -> Tensor:
        """What is captured, run as it is: the result for the rows that were sent last."""
        rows, inputs = self._rows[:size], self._inputs.first(size)
        kernels.prepare_decode(rows, self._slots.last_tokens, self._slots.tables, self._kv_cache.block_size, inputs)
        ctx = ForwardContext(
            positions=inputs.positions,
            cu_seqlens_q=self._cu_seqlens[: size + 1],
            context_lens=inputs.context_lens,
            block_tables=inputs.block_tables,
            slot_mapping=inputs.slot_mapping,
            prompt_lens=inputs.prompt_lens,
            kv_cache=self._kv_cache,
            query_lens=[1] * size,
            context_lens_host=self.context_lens_host(size),
            decode_buffers=self._decode_buffers,
        )
        hidden_states = self._model(inputs.input_ids, ctx)
        if keeps_hidden:
            return self._hidden_states[:size].copy_(hidden_states)
        tokens = kernels.argmax(self._model.compute_logits(hidden_states))
        kernels.store_tokens(rows, tokens, self._slots.last_tokens)
        return tokens
