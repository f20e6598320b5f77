"""What products do with their sums before they store them; the same macros for every kernel of this folder that multiplies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
NOTHING, RESIDUAL, GATED = range(3)


@dataclass(frozen=True)
class Epilogue:
    """is_half: activations in fp16, else bf16. kind: one of the three above. activation: its index, of a gated one."""

    is_half: bool
    out_float: bool
    kind: int = NOTHING
    activation: int = 0
    has_bias: bool = False

    @property
    def is_gated(self) -> bool:
        """Whether y is activation(gate) * up, half as wide as the weight."""
        return self.kind == GATED

    @property
    def has_residual(self) -> bool:
        """Whether a residual is added."""
        return self.kind == RESIDUAL

    def macros(self) -> dict[str, object]:
        """FP16, OUT32, EPI, ACT and BIAS."""
        return {
            "FP16": int(self.is_half), "OUT32": int(self.out_float), "EPI": self.kind, "ACT": self.activation,
            "BIAS": int(self.has_bias),
        }  # fmt: skip


def prepare(
    x: Tensor,
    n: int,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype | None,
    out: Tensor | None,
) -> tuple[Epilogue, Tensor, Tensor | None]:
    """The epilogue of x [M, K] times a weight of n rows, y [M, n] or [M, n / 2], and the residual, its rows as far apart."""
    if out is None:
        width = n if activation is None else n // 2
        out = torch.empty(len(x), width, dtype=out_dtype or x.dtype, device=x.device)
    if residual is not None and residual.stride(0) != out.stride(0):
        apart = torch.empty_strided(out.shape, out.stride(), dtype=residual.dtype, device=residual.device)
        residual = apart.copy_(residual)
    kind = GATED if activation is not None else NOTHING if residual is None else RESIDUAL
    index = 0 if activation is None else ACTIVATIONS.index(activation)
    is_half, out_float = x.dtype == torch.float16, out.dtype == torch.float32
    return Epilogue(is_half, out_float, kind, index, bias is not None), out, residual


def has_quads(out: Tensor, residual: Tensor | None) -> bool:
    """Whether all rows of both can be taken four elements at a time."""
    return out.shape[1] % 4 == 0 and all(
        part.stride(0) % 4 == 0 and part.data_ptr() % (4 * part.element_size()) == 0
        for part in (out, residual)
        if part is not None
    )
