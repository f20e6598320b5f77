"""What a GPU engine does once before its first request: weights copied, tables made, decode steps captured, kernels built."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections import defaultdict
from typing import Any

import torch

from lmdeploy.engine.graphs import DecodeGraphs, capture_lock
from lmdeploy.engine.memory import MemoryPlan
from lmdeploy.engine.runner import Runner
from lmdeploy.kernels import decode_buffer_bytes, has_gpu_kernels
from lmdeploy.kernels.cuda import layer_tail
from lmdeploy.kernels.cuda.driver import reserve_less_stack
from lmdeploy.kernels.cuda.nvrtc import KernelError
from lmdeploy.layers.linear import Linear
from lmdeploy.logging import get_logger
from lmdeploy.models.base import CausalLM
from lmdeploy.quantization.affine import AffineMethod

_FIRST_SIZES = (1, 2, 4, 8)
_USUAL_DIM = 128  # of a head, at most, for decode attention in CUDA C++
# Of closed engines: what cuBLAS and torch keep for a stream is there for the next engine.
_free_streams: defaultdict[torch.device, list[torch.cuda.Stream]] = defaultdict(list)


def settle(device: torch.device) -> None:
    """Give back what loading left and stacks reserve; the weights are there for every stream then."""
    torch.cuda.current_stream(device).synchronize()
    free_cached()
    with capture_lock, contextlib.suppress(KernelError):  # it is not worth an engine that does not start
        reserve_less_stack()


def free_cached() -> None:
    """Give back memory that torch keeps. A capture, another engine's too, would fail meanwhile."""
    with capture_lock:
        torch.cuda.empty_cache()


def plan_arguments(model: CausalLM) -> dict[str, Any]:
    """What `plan_memory` asks for that only a GPU has."""
    sizes = copy_bytes(model), piece_bytes(model)
    return {"copy_bytes": sizes, "buffer_bytes": functools.partial(buffer_bytes_of, model)}


def copy_bytes(model: CausalLM) -> int:
    """What 16-bit copies of all quantized weights would take that have a use for one."""
    return sum(method.copy_bytes for method in _copied_methods(model))


def piece_bytes(model: CausalLM) -> int:
    """What is copied of a weight at a time while a step uses it."""
    return max((method.piece_bytes for method in _copied_methods(model)), default=0)


def buffer_bytes_of(model: CausalLM, max_batch_size: int, session_len: int) -> int:
    """What is kept beside the cache: tables of the rotary embedding, partial results of decode attention."""
    config = model.config
    rotary = sum(rope.dim for rope in {config.rope, config.local_rope} if rope is not None)
    tables = 4 * rotary * (1 << max(session_len - 1, 255).bit_length())
    if not has_gpu_kernels() or model.dtype == torch.float32:
        return tables
    value_dim = config.head_dim if config.mla is None else config.mla.kv_lora_rank
    is_special = value_dim > _USUAL_DIM or config.attn_softcap is not None or config.alibi or config.attention_sinks
    forms = {not is_special and window is None for window in config.layer_windows}
    size = (max_batch_size, session_len, config.num_heads, value_dim)
    return tables + sum(decode_buffer_bytes(*size, is_usual=is_usual) for is_usual in forms)


def take_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream that no other engine uses."""
    try:
        return _free_streams[device].pop()
    except IndexError:
        return torch.cuda.Stream(device)


def give_back(stream: torch.cuda.Stream) -> None:
    """Free what an engine leaves, and let the next one have its stream. To be called when its graphs are gone."""
    layer_tail.give_up(stream)
    torch.cuda.set_stream(torch.cuda.default_stream(stream.device))
    free_cached()
    _free_streams[stream.device].append(stream)


def warm_up(runner: Runner, plan: MemoryPlan, uses_graphs: bool) -> None:
    """Make the copies of weights that are planned for, and the graphs."""
    for method in _copied_methods(runner.model) if plan.copy_bytes else ():
        method.keep_copy()
    try:
        if uses_graphs:
            start_graphs(runner, plan.max_batch_size, plan.session_len)
    except BaseException:
        layer_tail.give_up(torch.cuda.current_stream())
        raise


def start_graphs(runner: Runner, max_batch_size: int, session_len: int) -> None:
    """Capture the decode steps of the first sizes and of the largest; a model that cannot be captured runs without."""
    model = runner.model
    for rotary in {model.rotary, model.local_rotary} - {None}:
        rotary.reserve(session_len, runner.kv_cache.data.device)  # type: ignore[union-attr]
    runner.graphs = DecodeGraphs(model, runner.kv_cache, runner.slots, runner.decode_buffers, max_batch_size)
    sizes = sorted({size for size in _FIRST_SIZES if size <= max_batch_size} | {max_batch_size}, reverse=True)
    try:
        for size in sizes:
            runner.graphs.capture(size, keeps_hidden=False)
        runner.graphs.capture(max_batch_size, keeps_hidden=True)
    except Exception as error:  # whatever a model or a kernel cannot do in a capture, it can do without
        runner.graphs = None
        get_logger().warning("decode steps of %s run without CUDA graphs, slower: %s", model.config.architecture, error)
    torch.cuda.current_stream().synchronize()
    free_cached()
    gc.collect()
    gc.freeze()  # a collection that walks all that a model is made of takes longer than a step


def _copied_methods(model: CausalLM) -> list[AffineMethod]:
    methods = (module.method for module in model.modules() if isinstance(module, Linear))
    return [method for method in methods if isinstance(method, AffineMethod) and method.copy_bytes]
