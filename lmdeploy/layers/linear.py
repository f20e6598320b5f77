"""Linear layers whose weight is stored and applied by a LinearMethod. They know no checkpoint format and no model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lmdeploy.quantization.method import LinearMethod


class Linear(nn.Module):
    """y = x W^T + b (+ residual). Several out_features make one fused linear whose rows are stacked `parts`.

    The weight does not exist until a LinearMethod has been installed and fed by the loader; the bias is a plain parameter.
    """

    method: LinearMethod

    def __init__(
        self, in_features: int, out_features: int | Sequence[int], bias: bool = False, num_experts: int = 1
    ) -> None:
        """num_experts: the rows are those of so many linears, of which a token is routed to a few."""
        super().__init__()
        self.num_experts = num_experts
        self.in_features = in_features
        self.parts = (out_features,) if isinstance(out_features, int) else tuple(out_features)
        self.out_features = sum(self.parts)
        self.bias = nn.Parameter(torch.empty(self.out_features), requires_grad=False) if bias else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: [T, K]; residual and result: [T, N]. The result may take the residual's place: it is not to be used again."""
        return self.method.apply(self, x, residual=residual)

    def logits(self, x: Tensor) -> Tensor:
        """The result as an output head's logits: [R, C] -> [R, V] float32, without rounding in between where possible."""
        return self.method.logits(self, x)

    def extra_repr(self) -> str:
        method = getattr(self, "method", None)
        return f"{self.in_features} -> {self.parts}, bias={self.bias is not None}, {method.name if method else 'empty'}"


class Embedding(Linear):
    """Rows of tokens. As a Linear it is also the output head of models that tie the two."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__(hidden_size, vocab_size)

    def forward(self, ids: Tensor, residual: Tensor | None = None) -> Tensor:
        """ids: [T] integers; result: [T, C]."""
        return self.method.embed(self, ids)
