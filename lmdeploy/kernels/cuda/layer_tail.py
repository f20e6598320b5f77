"""All products between a layer's attention and the next one's, of one token and packed 4-bit weights, in one launch on Hopper.

See the .cu of its name. Its blocks wait for each other, so that two launches must not share a GPU: the first stream that
asks has the kernel to itself until it is given up.
"""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from lmdeploy.kernels import invariant
from lmdeploy.kernels.cuda import nvrtc
from lmdeploy.kernels.cuda.byte_gemm import slices
from lmdeploy.kernels.cuda.driver import Kernel, is_shared
from lmdeploy.kernels.cuda.epilogue import ACTIVATIONS
from lmdeploy.kernels.cuda.skinny_gemm import COLUMNS, Weight, num_sms, tiling_table, unit_bytes

_ARCH = "sm_90a"
_WARPS, _FEEDERS, _STAGES, _UNITS_AT_ONCE = 8, 4, 5, 4
_IN_FLIGHT = 2  # stages of a warp, 70 KB of a multiprocessor: with more, what is small waits for them
_AHEAD, _PACE = 6, 1500  # stages of a warp in L2; ns, in which memory brings one for every warp
_FIRST_WORDS = 32  # of the exchange: the count of launches, alone in its line
_owners: dict[torch.device, tuple[int, dict[tuple[int, int, bool], Tensor]]] = {}
_lock = threading.Lock()


@dataclass(frozen=True)
class Shape:
    """Lengths of attention's result, of the residual, of the MLP's inner vector, and of the next layer's q, k and v or 0."""

    heads: int
    hidden: int
    inner: int
    qkv: int = 0

    @property
    def name(self) -> str:
        """Its name in the table, the same with and without a layer behind."""
        return f"{self.heads}x{self.hidden}x{self.inner}"

    def shared_bytes(self, group_size: int, blocks: int) -> int:
        """Dynamic shared memory of a block: rings and partial sums."""
        most = max(-(-self.hidden // 16 // blocks), 2 * -(-self.inner // 16 // blocks), -(-self.qkv // 16 // blocks))
        return _WARPS * (_STAGES * _UNITS_AT_ONCE * unit_bytes(group_size) + most * 16 * 4)

    def fits(self, blocks: int) -> bool:
        """Whether tiles are whole, warps have a k-unit, blocks a tile of the MLP and a thread for each of their rows."""
        has_units = all(k % COLUMNS == 0 and k >= _WARPS * COLUMNS for k in (self.heads, self.hidden, self.inner))
        has_threads = all(-(-n // 16 // blocks) * 16 <= _WARPS * 32 for n in (self.hidden, self.inner, self.qkv))
        return has_units and self.qkv % 16 == 0 and self.inner // 16 >= blocks and has_threads


@dataclass(frozen=True)
class Variant:
    """Everything that the compiled kernel depends on."""

    shape: Shape
    group_size: int
    has_zeros: bool
    is_half: bool
    activation: str
    norm_offset: float
    blocks: int

    def macros(self) -> dict[str, object]:
        """What layer_tail.cu is compiled with."""
        shape = self.shape
        return {
            "HEADS": shape.heads, "HIDDEN": shape.hidden, "INNER": shape.inner, "QKV": shape.qkv,
            "GROUP": self.group_size, "ZERO": int(self.has_zeros), "FP16": int(self.is_half),
            "ACT": ACTIVATIONS.index(self.activation), "NORM_OFFSET": f"{self.norm_offset}f",
            "O_SLICES": slices(shape.hidden, self.blocks), "GATE_UP_SLICES": slices(2 * shape.inner, self.blocks),
            "DOWN_SLICES": slices(shape.hidden, self.blocks), "QKV_SLICES": slices(shape.qkv, self.blocks),
            "WARPS": _WARPS, "FEEDERS": _FEEDERS, "FIRST_WORDS": _FIRST_WORDS, "STAGES": _STAGES,
            "UNITS_AT_ONCE": _UNITS_AT_ONCE, "IN_FLIGHT": _IN_FLIGHT, "AHEAD": _AHEAD, "PACE": _PACE, "BLOCKS": self.blocks,
        }  # fmt: skip


@dataclass(frozen=True)
class Behind:
    """What the next layer begins with: an RMS norm's weights [C], and its weight and bias [N] for q, k and v."""

    norm_weight: Tensor
    qkv: Weight
    bias: Tensor | None


def is_faster(x: Tensor, o: Weight, gate_up: Weight, down: Weight, behind: Behind | None) -> bool:
    """Whether the kernel can take x [M, H] and these weights here, by measurements should, and is this stream's.

    Where bits must not depend on other tokens, it is: its products one by one would be byte_gemm's.
    """
    if len(x) != 1 or not x.is_cuda or x.dtype not in (torch.float16, torch.bfloat16):
        return False
    if torch.cuda.get_device_capability(x.device) != (9, 0) or not x.is_contiguous():
        return False
    weights = [o, gate_up, down] if behind is None else [o, gate_up, down, behind.qkv]
    shape = shape_of(o, gate_up, behind)
    is_one = all((w.group_size, w.has_zeros) == (o.group_size, o.has_zeros) for w in weights)
    chains = x.shape[1] == o.k and down.k == gate_up.n // 2 and down.n == o.n == gate_up.k and gate_up.n % 32 == 0
    chains = chains and (behind is None or behind.qkv.k == down.n)
    is_wanted = shape.fits(num_sms()) if invariant.applies(1) else _is_measured(shape)
    if not (is_one and chains and is_wanted) or is_shared(x.device.index):
        return False
    return _exchange(x.device, shape) is not None


def layer_tail(
    x: Tensor,
    residual: Tensor,
    o: Weight,
    gate_up: Weight,
    down: Weight,
    activation: str,
    *,
    norm_weight: Tensor,
    norm_eps: float,
    norm_offset: float = 0.0,
    behind: Behind | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y = h + mlp(norm(h)) with h = x W_o^T + residual, and q, k and v of norm(y) for the layer behind.

    x: [1, H] of 16 bits; residual, y: [1, C]; q, k, v: [1, N] or None. Raises KernelError where another stream has the kernel.
    """
    shape = shape_of(o, gate_up, behind)
    exchange = _exchange(x.device, shape)
    if exchange is None:
        raise nvrtc.KernelError("the kernel belongs to another stream: two at once would wait for each other")
    y = torch.empty_like(residual)
    qkv = None if behind is None else x.new_empty(1, shape.qkv)
    variant = variant_of(shape, o, x.dtype == torch.float16, activation, norm_offset)
    last = (None, None, None) if behind is None else (behind.qkv.data, behind.norm_weight, behind.bias)
    arguments = (
        o.data, gate_up.data, down.data, last[0], x, residual, y, qkv, norm_weight, last[1], last[2], exchange, norm_eps,
    )  # fmt: skip
    _kernel(variant)(variant.blocks, arguments)
    return y, qkv


def shape_of(o: Weight, gate_up: Weight, behind: Behind | None) -> Shape:
    """That of the weights."""
    return Shape(o.k, o.n, gate_up.n // 2, 0 if behind is None else behind.qkv.n)


def variant_of(shape: Shape, weight: Weight, is_half: bool, activation: str, norm_offset: float) -> Variant:
    """The compiled form for a shape, of this GPU and weights like this one."""
    return Variant(shape, weight.group_size, weight.has_zeros, is_half, activation, float(norm_offset), num_sms())


def give_up(stream: torch.cuda.Stream) -> None:
    """This stream needs the kernel no more: another one may have it, once its launches have ended."""
    stream.synchronize()
    with _lock:
        if _owners.get(stream.device, (None,))[0] == stream.cuda_stream:
            del _owners[stream.device]


def _exchange(device: torch.device, shape: Shape) -> Tensor | None:
    """Where blocks meet, int32, all of it written by every launch, or words would keep tags of long ago.

    None for all streams but one, and in a capture where there is none yet, which would be made anew by every replay.
    """
    stream = torch.cuda.current_stream(device).cuda_stream
    key = shape.hidden, shape.inner, shape.qkv > 0
    with _lock:
        owner, found = _owners.get(device, (stream, {}))
        if owner != stream or (key not in found and torch.cuda.is_current_stream_capturing()):
            return None
        _owners[device] = owner, found
        if key not in found:
            found[key] = torch.zeros(_FIRST_WORDS + 2 * shape.hidden + shape.inner, dtype=torch.int32, device=device)
            found[key][0] = 1
        return found[key]


@functools.cache
def _is_measured(shape: Shape) -> bool:
    """Whether it was faster than its products one by one: the table of this GPU has ns of both, for a layer with attention."""
    ns, products_ns = tiling_table(f"layer_tail_sm90_{num_sms()}").get(shape.name, (1, 0))
    return ns < products_ns and shape.fits(num_sms())


def cubin(variant: Variant) -> bytes:
    """Compiled. Raises KernelError."""
    return nvrtc.cubin("layer_tail.cu", variant.macros(), _ARCH)


@functools.cache
def _kernel(variant: Variant) -> Kernel:
    return Kernel(
        cubin(variant),
        "layer_tail",
        threads=(_WARPS + _FEEDERS) * 32,
        shared_bytes=variant.shape.shared_bytes(variant.group_size, variant.blocks),
        overlaps=True,
    )
