"""Decode steps of a few requests as the bare kernel calls that they come to, without the modules in between.

The first step of a batch size is run on tensors of its own and every kernel call is written down; from then on only the inputs
change and the same calls are made again. A pass that does anything else than call these kernels, a product in torch for
example, is not taken. It knows the step's context, and neither module nor request.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from lmdeploy.kernels.cpu import build
from lmdeploy.kernels.cpu.attention import STEP

if TYPE_CHECKING:
    from lmdeploy.layers.context import ForwardContext

MAX_REQUESTS = 16

Forward = Callable[[Tensor, "ForwardContext"], Tensor]
Call = tuple[Callable[[bytes], None], bytes]
_EMPTY = {"empty", "empty_like"}
_VIEWING = {"__getitem__", "contiguous", "__get__"}
_DESCRIBING = {"__get__", "__len__", "data_ptr", "dim", "is_contiguous", "numel", "size", "stride"}


class Tapes:
    """One tape per batch size of one forward pass, which takes input_ids and a context and gives logits [B, V]."""

    def __init__(self, forward: Forward, max_blocks: int) -> None:
        """max_blocks: the widest block table of a request."""
        self._forward = forward
        self._max_blocks = max_blocks
        self._of_size: dict[int, _Tape] = {}
        self._is_bare = True

    def run(self, input_ids: Tensor, ctx: ForwardContext) -> Tensor | None:
        """The logits of a step of one token each, valid until the next run; None where it has to be run as it is."""
        size = input_ids.shape[0]
        if size > MAX_REQUESTS or not self._is_bare:
            return None
        tape = self._of_size.get(size) or _record(self._forward, input_ids, ctx, self._max_blocks)
        if tape is None:
            self._is_bare = False
            return None
        self._of_size[size] = tape
        return tape.play(input_ids, ctx)


@dataclass
class _Tape:
    """input_ids, ctx: what the calls read. tables: the rotary tables among it, by who makes them. kept: every tensor whose
    address stands in a call."""

    input_ids: Tensor
    ctx: ForwardContext
    tables: dict[Any, tuple[Tensor, Tensor]]
    calls: list[Call]
    kept: list[Any]
    logits: Tensor

    def play(self, input_ids: Tensor, ctx: ForwardContext) -> Tensor:
        self.input_ids.copy_(input_ids)
        self.ctx.slot_mapping.copy_(ctx.slot_mapping)
        self.ctx.context_lens.copy_(ctx.context_lens)
        self.ctx.block_tables[:, : ctx.block_tables.shape[1]] = ctx.block_tables
        for rotary, tables in self.tables.items():
            for table, now in zip(tables, rotary.tables(ctx), strict=True):
                table.copy_(now)
        for kernel, arguments in self.calls:
            kernel(arguments)
        return self.logits


class _Watch(TorchFunctionMode):
    """Keeps what torch returns; is_bare: it was asked for nothing but memory, views and descriptions of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Any] = []
        self.is_bare = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.__name__
        if not isinstance(result, Tensor):
            self.is_bare &= name in _DESCRIBING
            return result
        self.kept.append(result)
        is_view = name in _VIEWING and result.untyped_storage().data_ptr() == args[0].untyped_storage().data_ptr()
        self.is_bare &= name in _EMPTY or is_view
        return result


class _Recorder:
    """The kernels' library for one thread that notes its calls, as it is for any other."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self._thread = threading.get_ident()
        self.calls: list[Call] = []

    def __getattr__(self, name: str) -> Callable[[bytes], None]:
        kernel: Callable[[bytes], None] = getattr(self._library, name)
        if threading.get_ident() != self._thread:
            return kernel

        def call(arguments: bytes) -> None:
            self.calls.append((kernel, arguments))
            kernel(arguments)

        return call


_recording = threading.Lock()


@contextmanager
def _recorder() -> Iterator[_Recorder]:
    with _recording:
        recorder = _Recorder(build.library())
        with build.use_library(recorder):
            yield recorder


def _record(forward: Forward, input_ids: Tensor, ctx: ForwardContext, max_blocks: int) -> _Tape | None:
    input_ids = input_ids.clone()
    block_tables = ctx.block_tables.new_zeros(input_ids.shape[0], max_blocks)
    block_tables[:, : ctx.block_tables.shape[1]] = ctx.block_tables
    ctx = replace(
        ctx,
        context_lens=ctx.context_lens.clone(),
        slot_mapping=ctx.slot_mapping.clone(),
        block_tables=block_tables,
        cache={},
    )
    forward(input_ids, ctx)  # what is made once per step lies in the context's cache from now on
    tables = {key: value for key, value in ctx.cache.items() if key != STEP}
    if not all(hasattr(key, "tables") for key in tables):
        return None
    with _recorder() as recorder, _Watch() as watch:
        logits = forward(input_ids, ctx)
    return _Tape(input_ids, ctx, tables, recorder.calls, watch.kept, logits) if watch.is_bare else None
