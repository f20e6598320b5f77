"""How much memory weights, activations and KV blocks take, before anything is allocated. It allocates nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lmdeploy import env
from lmdeploy.engine.config import EngineConfig
from lmdeploy.errors import ConfigError
from lmdeploy.logging import get_logger
from lmdeploy.messages import QuantPolicy
from lmdeploy.models.config import ModelConfig

MIB = 1 << 20
_DEFAULT_SHARE = 0.8
_DEFAULT_CPU_CACHE_BYTES = 4 << 30
_MIN_BLOCKS = 2
_COPY_SHARE = 0.25
_STEP_SHARE = 0.0625
# Of a GPU, beside what the first tensor takes, as measured on an H100: kernels and graphs, cuBLAS's workspace, rounding.
_RUNTIME_BYTES = (141 + 32 + 10) * MIB


@dataclass(frozen=True)
class MemoryPlan:
    """The plan of one engine; sizes in bytes unless named otherwise.

    used_bytes: what is taken already, weights and the driver included. max_batch_size, max_tokens_per_step: as asked for,
    or fewer where the cache is small. copy_bytes: of the 16-bit copies that are kept of quantized weights, 0 if they
    are made anew for each step of many tokens.
    """

    total_bytes: int
    used_bytes: int
    weight_bytes: int
    activation_bytes: int
    block_bytes: int
    num_blocks: int
    block_size: int
    session_len: int
    max_batch_size: int
    max_tokens_per_step: int
    copy_bytes: int = 0

    @property
    def cache_bytes(self) -> int:
        return self.block_bytes * self.num_blocks

    @property
    def cache_tokens(self) -> int:
        return self.block_size * self.num_blocks

    @property
    def peak_bytes(self) -> int:
        """Of the device in the largest step."""
        return self.used_bytes + self.copy_bytes + self.activation_bytes + self.cache_bytes

    def rows(self) -> list[tuple[str, str]]:
        """The plan as a table of names and values."""
        copies = [("16-bit copies of weights", f"{self.copy_bytes / MIB:,.0f} MiB")] if self.copy_bytes else []
        return [
            ("weights", f"{self.weight_bytes / MIB:,.0f} MiB"),
            *copies,
            ("activations (largest step)", f"{self.activation_bytes / MIB:,.0f} MiB"),
            ("KV blocks", f"{self.cache_bytes / MIB:,.0f} MiB = {self.num_blocks} x {self.block_bytes / MIB:.2f} MiB"),
            ("tokens that fit", f"{self.cache_tokens:,}"),
            (f"requests at session_len {self.session_len:,}", f"{self.cache_tokens / self.session_len:.1f}"),
            ("memory seen, taken at most", f"{self.total_bytes / MIB:,.0f} MiB, {self.peak_bytes / MIB:,.0f} MiB"),
        ]


def plan_memory(
    model: ModelConfig,
    config: EngineConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    weight_bytes: int,
    max_batch_size: int,
    max_tokens_per_step: int,
    session_len: int,
    copy_bytes: tuple[int, int] = (0, 0),
    buffer_bytes: Callable[[int, int], int] = lambda max_batch_size, session_len: 0,
) -> MemoryPlan:
    """Size the block pool after the weights have been loaded.

    copy_bytes: what 16-bit copies of all quantized weights would take, and the largest piece that is made at a time where
    they are not kept, as they are if they take at most a quarter of what the pool would have. buffer_bytes: by batch and
    session_len, what is kept beside weights and cache. A pool smaller than session_len cuts session_len, with a notice;
    under two blocks is a ConfigError with the numbers.
    """
    total, free = device_memory(device)
    block_bytes = config.block_size * kv_bytes_per_token(model, dtype, config.quant_policy)
    share = config.cache_max_entry_count
    copies, piece = copy_bytes
    if copies > _COPY_SHARE * free * (share if share is not None and share < 1 else _DEFAULT_SHARE):
        copies = 0
    num_blocks = _num_blocks(share, free - copies, block_bytes, device)
    if share is None:
        num_blocks = min(num_blocks, max(max_batch_size * -(-session_len // config.block_size), _MIN_BLOCKS))
    max_batch_size = min(max_batch_size, max(num_blocks, 1))
    if config.max_prefill_token_num is None and share is not None and share < 1:
        # A small share asks for little memory: prompts in more steps rather than steps that take more than the pool. A pool
        # that is small because the batch is says nothing of the kind.
        of_block = activation_bytes(model, dtype, config.block_size, 0)
        blocks = int(_STEP_SHARE * num_blocks * block_bytes) // of_block
        max_tokens_per_step = min(max_tokens_per_step, (blocks + 1) * config.block_size)
    max_tokens_per_step = max(max_tokens_per_step, max_batch_size)
    activations = activation_bytes(model, dtype, max_tokens_per_step, max_batch_size, 0 if copies else piece)
    activations += buffer_bytes(max_batch_size, min(session_len, num_blocks * config.block_size))
    activations += _RUNTIME_BYTES if device.type == "cuda" else 0
    fitting = max(free - copies - activations, 0) // block_bytes
    if fitting < num_blocks:
        get_logger().warning("the KV cache is cut from %d to %d blocks: more memory is not free", num_blocks, fitting)
        num_blocks = fitting
    if num_blocks < _MIN_BLOCKS:
        raise ConfigError(
            f"no room for the KV cache: {free / MIB:,.0f} MiB are free after {weight_bytes / MIB:,.0f} MiB of weights, "
            f"activations take up to {activations / MIB:,.0f} MiB, a block takes {block_bytes / MIB:.2f} MiB and at "
            f"least {_MIN_BLOCKS} are needed; raise cache_max_entry_count (now {share}) or "
            "lower max_prefill_token_num or max_batch_size"
        )
    tokens = num_blocks * config.block_size
    if tokens < session_len:
        get_logger().warning("session_len is cut from %d to %d: the KV cache holds no more", session_len, tokens)
        session_len = tokens
    sizes = (session_len, max_batch_size, max_tokens_per_step)
    blocks_taken = (block_bytes, num_blocks, config.block_size)
    return MemoryPlan(total, max(total - free, 0), weight_bytes, activations, *blocks_taken, *sizes, copies)


def device_memory(device: torch.device) -> tuple[int, int]:
    """(total, free) bytes of the device, or of what LMDEPLOY_DEVICE_MEMORY lets us see of it."""
    free, total = torch.cuda.mem_get_info(device) if device.type == "cuda" else _host_memory()
    limit = env.device_memory_bytes()
    if limit is not None and limit < total:
        free, total = max(limit - (total - free), 0), limit
    return total, free


def kv_bytes_per_token(model: ModelConfig, dtype: torch.dtype, policy: QuantPolicy = QuantPolicy.NONE) -> int:
    """Bytes that the KV cache holds of one token, over all layers. ConfigError where it cannot be quantized so."""
    if policy != QuantPolicy.NONE:
        from lmdeploy.layers.quantized_cache import token_bytes

        return model.num_layers * token_bytes(model.kv_shape, policy)
    planes, heads, dim = model.kv_shape
    return model.num_layers * planes * heads * dim * dtype.itemsize


def activation_bytes(model: ModelConfig, dtype: torch.dtype, tokens: int, requests: int, piece_bytes: int = 0) -> int:
    """Upper estimate of what one step holds at its peak beside weights and cache, by a GPU's kernels.

    Per token the residual stream, its norm and what a layer makes of it: gate, up and their product, or q, k, v, q turned,
    keys and values in a row and the attention's output; beside them a piece of a weight. When they are gone, per sampled row
    two float32 copies of the logits. A third belongs to the decode graphs.
    """
    qkv_size = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    widest = max(model.hidden_size, 3 * model.intermediate_size, 3 * qkv_size)
    layer = tokens * (3 * model.hidden_size + widest) * dtype.itemsize + piece_bytes
    logits = requests * model.vocab_size * 4
    return max(layer, 2 * logits) + logits


def _num_blocks(share: float | None, free: int, block_bytes: int, device: torch.device) -> int:
    """Blocks that were asked for, as a number or as a share of what is free."""
    if share is not None and share >= 1:
        return int(share)
    cache_bytes = int(max(free, 0) * (share or _DEFAULT_SHARE))
    if share is None and device.type == "cpu":
        cache_bytes = min(cache_bytes, _DEFAULT_CPU_CACHE_BYTES)
    return cache_bytes // block_bytes


def _host_memory() -> tuple[int, int]:
    """(available, total) bytes of main memory."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return tuple(int(fields[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))  # type: ignore[return-value]
    except (OSError, KeyError):
        if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
            return 4 << 30, 8 << 30
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return total // 2, total
