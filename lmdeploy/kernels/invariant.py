"""Products whose rows do not depend, to the bit, on how many other rows there are. It chooses no kernel.

Libraries pick a kernel, and so an order of summation, by the number of rows. Once an engine asks for it, decode steps are
multiplied in pieces of a size for which the order is known to be fixed. Steps of more rows than MAX_ROWS are left alone:
they are a prompt's, and such an engine computes prompts one at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F

Product = TypeVar("Product", bound=Callable[..., Tensor])

MAX_ROWS = 256
_BLOCK = 16
_EXACT_ROWS = 32
_COMPILED_DTYPES = (torch.bfloat16, torch.float16)
_is_on = False


def enable() -> None:
    """From now on, for every engine of this process."""
    global _is_on
    _is_on = True


def applies(num_rows: int) -> bool:
    """Whether a product of so many rows has to be made in pieces or by a kernel of fixed order."""
    return _is_on and num_rows <= MAX_ROWS


def at_most(num_rows: int) -> Callable[[Product], Product]:
    """For functions of rows x [M, K] and a keyword `residual` [M, N]: more rows, where need be, are taken in pieces."""

    def in_pieces(product: Product) -> Product:
        @functools.wraps(product)
        def run(x: Tensor, *rest: Any, residual: Tensor | None = None, **named: Any) -> Tensor:
            if len(x) <= num_rows or not applies(len(x)):
                return product(x, *rest, residual=residual, **named)
            pieces = x.split(num_rows)
            residuals = [None] * len(pieces) if residual is None else residual.split(num_rows)
            pairs = zip(pieces, residuals, strict=True)
            return torch.cat([product(rows, *rest, residual=addend, **named) for rows, addend in pairs])

        return cast(Product, run)

    return in_pieces


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias, [M, K] -> [M, N], as `in_blocks`."""
    if x.device.type != "cpu" or x.dtype not in _COMPILED_DTYPES or applies(len(x)):
        return in_blocks(lambda rows: F.linear(rows, weight, bias), x)
    padding = padded_rows(len(x)) - len(x)
    return F.linear(F.pad(x, (0, 0, 0, padding)) if padding else x, weight, bias)[: len(x)]


def padded_rows(num_rows: int) -> int:
    """The next of few sizes: all up to 32, as many as a decode step has, then 8 for each power of two.

    oneDNN compiles each shape of a product in 16 bits and keeps 1,024 of them, half a megabyte each; prompts have any length.
    """
    step = 1 if num_rows <= _EXACT_ROWS else 1 << (num_rows - 1).bit_length() >> 4
    return -(-num_rows // step) * step


def in_blocks(product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """product(x) [M, ..] of rows x [M, ..], where need be in blocks padded to one size."""
    if not applies(len(x)) or len(x) == 0:
        return product(x)
    padded = F.pad(x, (0, 0) * (x.dim() - 1) + (0, -len(x) % _BLOCK))
    return torch.cat([product(block) for block in padded.split(_BLOCK)])[: len(x)]
