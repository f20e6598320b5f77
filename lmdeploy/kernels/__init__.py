"""The operations, each one function; what runs is picked by the tensors' device. No config and no module below this line."""

from __future__ import annotations

import functools
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lmdeploy.kernels import cpu, invariant
from lmdeploy.kernels.reference import attention, basic
from lmdeploy.kernels.reference.attention import (
    apply_rope,
    paged_attention,
    store_kv,
    store_rotate_attend,
)
from lmdeploy.kernels.reference.basic import activate
from lmdeploy.kernels.spec import AttentionSpec

if TYPE_CHECKING:
    from lmdeploy.kernels.reference.attention import Blocks
    from lmdeploy.kernels.reference.decode_inputs import DecodeInputs
    from lmdeploy.kernels.triton.affine import PackedAffine
    from lmdeploy.layers.context import ForwardContext

__all__ = [
    "activate",
    "apply_bitmask",
    "apply_rope",
    "argmax",
    "dense_linear",
    "gated_activation",
    "has_gpu_kernels",
    "latent_store_attend",
    "make_decode_buffers",
    "paged_attention",
    "prepare_decode",
    "rms_norm",
    "rope_store_attend",
    "routed_mlp",
    "routed_mlp_affine",
    "runs_on_gpu",
    "store_kv",
    "store_rotate_attend",
    "store_tokens",
]


_MAX_SPLITS, _MIN_SPLIT = 32, 128  # of a request and tokens of one, by kernels/triton/decode_attention.py
_GPU_DTYPES = (torch.float16, torch.bfloat16)


def runs_on_gpu(x: Tensor) -> bool:
    """Whether the GPU's own kernels take activations like x. In float32 the twins run: they are exact."""
    return x.is_cuda and x.dtype in _GPU_DTYPES and has_gpu_kernels()


@functools.cache
def has_gpu_kernels() -> bool:
    """Whether the Triton kernels run here: Triton is there, and the GPU has its matrix instructions (Ampere or newer)."""
    has_triton = find_spec("triton") is not None
    return has_triton and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """x / rms(x) * (offset + weight) over the last dimension."""
    if cpu.can_run(x):
        return cpu.rms_norm(x, weight, eps, offset)
    if runs_on_gpu(x):
        from lmdeploy.kernels.cuda import rms_norm as cuda
        from lmdeploy.kernels.triton import norm

        return (cuda if cuda.supports(x, weight) else norm).rms_norm(x, weight, eps, offset)
    return basic.rms_norm(x, weight, eps, offset)


def dense_linear(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 0.0,
    norm_offset: float = 0.0,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """rms_norm(x) W^T + bias + residual, weight [N, K]: [T, K] -> [T, N]; the result may take the residual's place."""
    rest: dict[str, Any] = {"bias": bias, "residual": residual, "out_dtype": out_dtype}
    rest.update(norm_weight=norm_weight, norm_eps=norm_eps, norm_offset=norm_offset)
    if cpu.can_run(x) and cpu.can_multiply_dense(weight, len(x)):
        return cpu.dense_linear(x, weight, **rest)
    if runs_on_gpu(x):
        from lmdeploy.kernels.cuda import dense

        return dense.linear(x, weight, **rest)
    x = x if norm_weight is None else rms_norm(x, norm_weight, norm_eps, norm_offset)
    out = invariant.linear(x, weight, bias)
    out = out if residual is None else out.add_(residual)
    return out if out_dtype is None else out.to(out_dtype)


def gated_activation(gate_up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up: [T, 2 I] -> [T, I], gate in the first half."""
    if cpu.can_run(gate_up):
        return cpu.gated_activation(gate_up, activation)
    if runs_on_gpu(gate_up):
        from lmdeploy.kernels.triton import activation as gpu

        return gpu.gated_activation(gate_up, activation)
    return basic.gated_activation(gate_up, activation)


def rope_store_attend(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    keys: Blocks,
    values: Blocks,
    ctx: ForwardContext,
    spec: AttentionSpec,
) -> Tensor:
    """Per-head norms, rotation, cache write and attention of one layer: [T, (H + 2 Hkv) * D] -> [T, H * D].

    cos, sin: [T, R/2] float32. keys, values: [NB, Hkv, S, D], plain or quantized. Arguments and result as in the reference.
    """
    if isinstance(keys, Tensor) and isinstance(values, Tensor) and cpu.can_run(qkv) and cpu.supports(spec, qkv.dtype):
        return cpu.rope_store_attend(qkv, cos, sin, keys, values, ctx, spec)
    if runs_on_gpu(qkv) and ctx.decode_buffers is not None:
        from lmdeploy.kernels.triton import step

        return step.rope_store_attend(qkv, cos, sin, keys, values, ctx, spec)
    return attention.rope_store_attend(qkv, cos, sin, keys, values, ctx, spec)


def make_decode_buffers(max_batch: int, max_context_len: int, device: torch.device) -> object | None:
    """What decode attention keeps from step to step on this device, if anything."""
    if device.type != "cuda" or not has_gpu_kernels():
        return None
    from lmdeploy.kernels.triton.step import DecodeBuffers

    return DecodeBuffers(max_batch, max_context_len, device)


def decode_buffer_bytes(max_batch: int, max_context_len: int, num_heads: int, value_dim: int, is_usual: bool) -> int:
    """What `make_decode_buffers` comes to take for heads of that form: a partial result of every split, in float32.

    is_usual: whether the CUDA kernel computes it, which takes no window, cap, bias or sink.
    """
    from lmdeploy.kernels.cuda.decode_attention import MIN_SPLIT

    splits = min(_MAX_SPLITS, -(-max_context_len // (MIN_SPLIT if is_usual else _MIN_SPLIT)))
    return max_batch * splits * num_heads * (value_dim + 2) * 4


def argmax(logits: Tensor) -> Tensor:
    """The first largest logit of each row, [R, V] -> [R] int64; -1 where the largest is not finite or one is NaN."""
    if logits.is_cuda and has_gpu_kernels():
        from lmdeploy.kernels.triton import sampling
    else:
        from lmdeploy.kernels.reference import sampling  # type: ignore[no-redef]
    return sampling.argmax(logits)


def apply_bitmask(logits: Tensor, mask: Tensor, rows: Tensor) -> None:
    """Set logits [R, V] to -inf where a token's bit is 0, in place. Arguments as in the reference."""
    if logits.is_cuda and has_gpu_kernels():
        from lmdeploy.kernels.triton import sampling
    else:
        from lmdeploy.kernels.reference import sampling  # type: ignore[no-redef]
    sampling.apply_bitmask(logits, mask, rows)


def prepare_decode(rows: Tensor, last_tokens: Tensor, tables: Tensor, block_size: int, out: DecodeInputs) -> None:
    """Fill the inputs of a decode step. Arguments as in the reference."""
    if rows.is_cuda and has_gpu_kernels():
        from lmdeploy.kernels.triton import decode_inputs
    else:
        from lmdeploy.kernels.reference import decode_inputs  # type: ignore[no-redef]
    decode_inputs.prepare_decode(rows, last_tokens, tables, block_size, out)


def store_tokens(rows: Tensor, tokens: Tensor, last_tokens: Tensor) -> None:
    """Keep the sampled tokens for the next step. Arguments as in the reference."""
    if rows.is_cuda and has_gpu_kernels():
        from lmdeploy.kernels.triton import decode_inputs
    else:
        from lmdeploy.kernels.reference import decode_inputs  # type: ignore[no-redef]
    decode_inputs.store_tokens(rows, tokens, last_tokens)


def latent_store_attend(
    q: Tensor,
    latent: Tensor,
    rope_key: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    ctx: ForwardContext,
    spec: AttentionSpec,
) -> Tensor:
    """Multi-head latent attention over its compressed cache. Arguments and result as in the reference."""
    if ctx.decode_buffers is not None and _may_try("latent_store_attend", q):
        from lmdeploy.kernels.triton import step

        try:
            return step.latent_store_attend(q, latent, rope_key, cos, sin, cache, ctx, spec)
        except Exception as error:
            _give_up("latent_store_attend", error)
    return attention.latent_store_attend(q, latent, rope_key, cos, sin, cache, ctx, spec)


def routed_mlp(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: str,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    clamp: float | None = None,
) -> Tensor:
    """Weighted sum of the gated MLPs that each token is routed to. Arguments and result as in the reference."""
    from lmdeploy.kernels.reference import moe as reference

    arguments = (x, weights, experts, gate_up, down, activation, gate_up_bias, down_bias, clamp)
    if _may_try("routed_mlp", x):
        from lmdeploy.kernels.triton import moe

        try:
            return moe.routed_mlp(*arguments)
        except Exception as error:
            _give_up("routed_mlp", error)
    return reference.routed_mlp(*arguments)


def routed_mlp_affine(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: PackedAffine,
    down: PackedAffine,
    activation: str,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    clamp: float | None,
) -> Tensor | None:
    """`routed_mlp` over weights as kernels/triton/affine.py packs them; None where no kernel can, then they are made dense."""
    if not _may_try("routed_mlp_affine", x):
        return None
    from lmdeploy.kernels.triton import moe

    try:
        return moe.routed_mlp_affine(x, weights, experts, gate_up, down, activation, gate_up_bias, down_bias, clamp)
    except Exception as error:
        _give_up("routed_mlp_affine", error)
        return None


_given_up: set[str] = set()


def _may_try(name: str, x: Tensor) -> bool:
    return name not in _given_up and runs_on_gpu(x)


def _give_up(name: str, error: Exception) -> None:
    """A kernel that this GPU or this Triton cannot build: its twin runs from now on. What lacks memory is no such kernel."""
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    from lmdeploy.logging import get_logger

    _given_up.add(name)
    get_logger().warning("%s runs in plain PyTorch: %s: %s", name, type(error).__name__, str(error)[:300])
