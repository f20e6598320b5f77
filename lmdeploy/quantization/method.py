"""How a linear layer holds and applies its weight: one LinearMethod per storage. It knows no model and no checkpoint file."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lmdeploy.layers.linear import Linear
    from lmdeploy.layers.mlp import GatedMLP
    from lmdeploy.layers.norm import Norm
    from lmdeploy.quantization.packing import AffineTensor
    from lmdeploy.quantization.scaled import ScaledTensor

    Part: TypeAlias = Tensor | AffineTensor | ScaledTensor  # of a linear, as a checkpoint has it
    Behind = tuple[Norm, Linear]  # what the next layer begins with
    Tail = tuple[Tensor, Tensor | None]


class LinearMethod:
    """Base of all methods; `load` is called once per part of the linear, then `finish` once."""

    name = ""

    def load(self, linear: Linear, part: int, value: Part, device: torch.device, dtype: torch.dtype) -> None:
        """Take the rows of one part, [parts[part], K], in whatever form the checkpoint has them."""
        raise NotImplementedError

    def finish(self, linear: Linear) -> None:
        """All parts are there: lay the weight out for its kernel and free what that does not need."""

    def apply(self, linear: Linear, x: Tensor, *, norm: Norm | None = None, residual: Tensor | None = None) -> Tensor:
        """linear(norm(x)) + residual. x: [T, K], residual and result: [T, N]."""
        raise NotImplementedError

    def logits(self, linear: Linear, x: Tensor) -> Tensor:
        """linear(x) in float32."""
        return self.apply(linear, x).float()

    def gated_mlp(
        self, x: Tensor, norm: Norm | None, gate_up: Linear, down: Linear, activation: str, residual: Tensor | None
    ) -> Tensor:
        """down(activation(gate) * up) + residual with gate | up = gate_up(norm(x)); a method may fuse it further."""
        from lmdeploy.kernels import gated_activation

        hidden = gated_activation(gate_up.method.apply(gate_up, x, norm=norm), activation)
        return down.method.apply(down, hidden, residual=residual)

    def layer_tail(
        self, x: Tensor, residual: Tensor, o: Linear, norm: Norm, mlp: GatedMLP, behind: Behind | None
    ) -> Tail:
        """As layers.fused.layer_tail; a method may make it at once."""
        h = o(x, residual=residual)
        return mlp(h, norm, residual=h), None

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
        """Sum of weights [T, k] times the gated MLPs of experts [T, k]; parts of gate_up: gate and up, expert by expert."""
        from lmdeploy import kernels

        by_expert = (len(down.parts), -1)
        first, second = [linear.method.dense_weight(linear).unflatten(0, by_expert) for linear in (gate_up, down)]
        first_bias, second_bias = (b if b is None else b.unflatten(0, by_expert) for b in (gate_up.bias, down.bias))
        return kernels.routed_mlp(x, weights, experts, first, second, activation, first_bias, second_bias, clamp)

    def embed(self, linear: Linear, ids: Tensor) -> Tensor:
        """Rows `ids` [T] of the weight in the compute dtype, [T, K]."""
        raise NotImplementedError

    def dense_weight(self, linear: Linear) -> Tensor:
        """The weight [N, K] in the compute dtype, made anew if it is stored otherwise."""
        raise NotImplementedError

    def num_bytes(self, linear: Linear) -> int:
        """Bytes that the weight takes as stored."""
        return sum(t.numel() * t.element_size() for t in (*linear.parameters(), *linear.buffers()))
