"""What follows the logits on the device, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def argmax(logits: Tensor) -> Tensor:
    """The first largest logit of each row, [R, V] -> [R] int64; -1 where the largest is not finite or one is NaN."""
    tokens = logits.argmax(dim=-1)
    is_valid = logits.gather(1, tokens[:, None])[:, 0].isfinite()  # argmax prefers NaN to any number
    return tokens.where(is_valid, -1)


def apply_bitmask(logits: Tensor, mask: Tensor, rows: Tensor) -> None:
    """Set logits [R, V] to -inf in place where a token's bit is 0; rows without a mask stay.

    mask: [M, ceil(V / 32)] int32, token 0 in the lowest bit of the first word. rows: [M] int64, the row of each mask, once.
    """
    shifts = torch.arange(32, dtype=torch.int32, device=mask.device)
    is_allowed = ((mask[:, :, None] >> shifts) & 1).bool().flatten(1)[:, : logits.shape[1]]
    logits[rows] = logits[rows].where(is_allowed, float("-inf"))
