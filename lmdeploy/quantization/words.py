"""Small unsigned integers packed into int32 words. It knows no checkpoint format but the order in which AWQ fills a word."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of a word's eight numbers lies in its bits 0-3, 4-7, ... https://github.com/mit-han-lab/llm-awq"""


def unpack_words(words: Tensor, bits: int, order: Sequence[int] | None = None) -> Tensor:
    """int32 [..., W] -> uint8 [..., W * 32 / bits]; bits i * bits and up of a word hold its number order[i] (i)."""
    per_word = 32 // bits
    out = torch.empty(*words.shape, per_word, dtype=torch.uint8, device=words.device)
    for place, number in enumerate(order or range(per_word)):
        out[..., number] = words >> place * bits & (1 << bits) - 1
    return out.flatten(-2)


def pack_words(values: Tensor, bits: int, order: Sequence[int] | None = None) -> Tensor:
    """The inverse: uint8 [..., M] below 2 ** bits, M a multiple of 32 / bits -> int32 [..., M * bits / 32]."""
    per_word = 32 // bits
    numbers = values.unflatten(-1, (-1, per_word))
    words = torch.zeros(numbers.shape[:-1], dtype=torch.int32, device=values.device)
    for place, number in enumerate(order or range(per_word)):
        words |= numbers[..., number].int() << place * bits
    return words
