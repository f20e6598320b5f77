"""Weights kept as 4 or 8-bit integers with a scale and a minimum per group. It knows the kernels, no checkpoint format."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lmdeploy.kernels import cpu, has_gpu_kernels, routed_mlp_affine
from lmdeploy.kernels.reference import affine as reference
from lmdeploy.quantization.method import LinearMethod
from lmdeploy.quantization.packing import AffineTensor, same_columns
from lmdeploy.quantization.unquantized import UnquantizedMethod, fused_norm

if TYPE_CHECKING:
    from lmdeploy.layers.linear import Linear
    from lmdeploy.layers.mlp import GatedMLP
    from lmdeploy.layers.norm import Norm
    from lmdeploy.quantization.method import Behind, Part, Tail

_KERNEL_GROUP_SIZES = (128, 64, 32, 16)


class AffineMethod(LinearMethod):
    """The weight is packed once, for the kernels that run on its device; parts that differ take the widest bits among them."""

    name = "affine"

    def __init__(self) -> None:
        self.kernels: ModuleType = reference
        self.packed: Any = None
        self.dtype = torch.bfloat16
        self.columns: Tensor | None = None
        self._parts: dict[int, AffineTensor] = {}

    def load(self, linear: Linear, part: int, value: Part, device: torch.device, dtype: torch.dtype) -> None:
        """Keep the part's integers until the others are there."""
        if not isinstance(value, AffineTensor):
            raise TypeError(f"a part of {linear} is dense; UnquantizedMethod takes such linears")
        self._parts[part] = value.to(device)
        self.dtype = dtype

    def finish(self, linear: Linear) -> None:
        parts = [self._parts[part] for part in range(len(linear.parts))]
        self._parts = {}
        if not all(same_columns(part, parts[0]) for part in parts):
            _make_dense(linear, parts, self.dtype)
            return
        weight = kernel_groups(AffineTensor.stack(parts))
        self.columns = weight.columns
        self.kernels = choose_kernels(weight, self.dtype, linear.num_experts)
        self.packed = self.kernels.pack(weight.q, weight.scales, weight.mins, weight.bits)

    def apply(self, linear: Linear, x: Tensor, *, norm: Norm | None = None, residual: Tensor | None = None) -> Tensor:
        if self.columns is not None:
            x, norm = (x if norm is None else norm(x))[:, self.columns], None
        x, fused = fused_norm(x, norm)
        return self.kernels.linear(x, self.packed, bias=linear.bias, residual=residual, **fused)

    def logits(self, linear: Linear, x: Tensor) -> Tensor:
        x = x if self.columns is None else x[:, self.columns]
        return self.kernels.linear(x, self.packed, bias=linear.bias, out_dtype=torch.float32)

    def gated_mlp(
        self, x: Tensor, norm: Norm | None, gate_up: Linear, down: Linear, activation: str, residual: Tensor | None
    ) -> Tensor:
        packed = self._packed_alike((gate_up, down))
        if packed is None or gate_up.bias is not None or down.bias is not None:
            return super().gated_mlp(x, norm, gate_up, down, activation, residual)
        x, fused = fused_norm(x, norm)
        return self.kernels.gated_mlp(x, *packed, activation, residual=residual, **fused)

    def _packed_alike(self, linears: Sequence[Linear]) -> list[Any] | None:
        """What they hold, if it is all for this method's kernels and in the order of x's columns."""
        methods = [linear.method for linear in linears]
        if any(
            not isinstance(m, AffineMethod) or m.kernels is not self.kernels or m.columns is not None for m in methods
        ):
            return None
        return [m.packed for m in methods]  # type: ignore[attr-defined]

    def layer_tail(
        self, x: Tensor, residual: Tensor, o: Linear, norm: Norm, mlp: GatedMLP, behind: Behind | None
    ) -> Tail:
        made = self._tail_at_once(x, residual, o, norm, mlp, behind) if hasattr(self.kernels, "layer_tail") else None
        return super().layer_tail(x, residual, o, norm, mlp, behind) if made is None else made

    def _tail_at_once(
        self, x: Tensor, residual: Tensor, o: Linear, norm: Norm, mlp: GatedMLP, behind: Behind | None
    ) -> Tail | None:
        """None where the kernel does not take all of it, or is not faster."""
        linears, norms = [o, mlp.gate_up_proj, mlp.down_proj], [norm]
        has_bias = any(linear.bias is not None for linear in linears)
        if behind is not None:
            norms, linears = [norm, behind[0]], [*linears, behind[1]]
        if has_bias or any(each.kind != "rms" for each in norms):
            return None
        packed, fused = self._packed_alike(linears), [fused_norm(x, each)[1] for each in norms]
        if packed is None or len({(each["norm_eps"], each["norm_offset"]) for each in fused}) > 1:
            return None
        last = (None, None) if behind is None else (fused[1]["norm_weight"], behind[1].bias)
        made: Tail | None = self.kernels.layer_tail(x, residual, packed, mlp.activation, fused[0], *last)
        return made

    def routed_mlp(
        self,
        x: Tensor,
        weights: Tensor,
        experts: Tensor,
        gate_up: Linear,
        down: Linear,
        activation: str,
        clamp: float | None,
    ) -> Tensor:
        other = down.method
        out = None
        if isinstance(other, AffineMethod) and self._is_routable and other._is_routable:
            both, last = (
                b if b is None else b.unflatten(0, (gate_up.num_experts, -1)) for b in (gate_up.bias, down.bias)
            )
            out = routed_mlp_affine(x, weights, experts, self.packed, other.packed, activation, both, last, clamp)
        return super().routed_mlp(x, weights, experts, gate_up, down, activation, clamp) if out is None else out

    @property
    def _is_routable(self) -> bool:
        """Whether experts can be routed to as they are packed, which the twins' form is not made for."""
        return self.columns is None and self.kernels.__name__.endswith("triton.affine")

    def embed(self, linear: Linear, ids: Tensor) -> Tensor:
        rows: Tensor = self.kernels.embed(ids, self.packed, self.dtype)
        return rows if self.columns is None else torch.empty_like(rows).index_copy_(1, self.columns, rows)

    @property
    def copy_bytes(self) -> int:
        """What `keep_copy` would take; 0 where no kernel uses a copy."""
        return 2 * self.packed.n * self.packed.k if hasattr(self.packed, "keep_copy") else 0

    @property
    def piece_bytes(self) -> int:
        """What such steps take at a time without a copy."""
        return self.packed.piece_bytes if self.copy_bytes else 0

    def keep_copy(self) -> None:
        """Keep the weight in 16 bits, too, for steps of many tokens."""
        self.packed.keep_copy(self.dtype)

    def dense_weight(self, linear: Linear) -> Tensor:
        q, scales, mins = self.kernels.unpack(self.packed)
        return AffineTensor(q, scales, mins, self.packed.bits, self.columns).dequantize(self.dtype)

    def num_bytes(self, linear: Linear) -> int:
        return super().num_bytes(linear) + self.packed.num_bytes


def kernel_groups(weight: AffineTensor) -> AffineTensor:
    """The same values, with groups of the largest size that kernels take and that fits, if one does."""
    sizes = (size for size in _KERNEL_GROUP_SIZES if weight.group_size % size == 0)
    return weight.to_group(next(sizes, weight.group_size))


def choose_kernels(weight: AffineTensor, dtype: torch.dtype, num_experts: int = 1) -> ModuleType:
    """The fastest module with pack, unpack, linear, gated_mlp and embed for this weight [N, K] where it lies."""
    if weight.q.is_cuda:
        return _choose_gpu_kernels(weight, dtype, num_experts)
    if weight.q.device.type == "cpu" and dtype == torch.bfloat16 and weight.group_size in _KERNEL_GROUP_SIZES:
        if cpu.is_available():
            return cpu
        from lmdeploy.kernels import aten_affine

        if aten_affine.supports(weight.shape[0], weight.group_size, weight.bits):
            return aten_affine
    return reference


def _choose_gpu_kernels(weight: AffineTensor, dtype: torch.dtype, num_experts: int) -> ModuleType:
    """CUDA C++ for what it takes; Triton for other shapes and for experts, which only it routes to."""
    from lmdeploy.kernels.cuda import affine as cuda_affine

    n, k = weight.shape
    if num_experts == 1 and cuda_affine.supports(n, k, weight.group_size, weight.bits, dtype, weight.q.device):
        return cuda_affine
    if has_gpu_kernels() and dtype != torch.float32 and weight.group_size in _KERNEL_GROUP_SIZES:
        from lmdeploy.kernels.triton import affine as triton_affine

        return triton_affine
    return reference


def _make_dense(linear: Linear, parts: list[AffineTensor], dtype: torch.dtype) -> None:
    """Give the linear its dequantized weight: no one order of x fits all of its parts."""
    linear.method = UnquantizedMethod()
    for part, value in enumerate(parts):
        linear.method.load(linear, part, value, value.q.device, dtype)
    linear.method.finish(linear)
