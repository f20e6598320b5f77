"""Small unsigned integers packed into int32 words. It knows no checkpoint format but the order in which AWQ fills a word."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of a word's eight numbers lies in its bits 0-3, 4-7, ... https://github.com/mit-han-lab/llm-awq"""


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """int32 [..., W] -> uint8 [..., W * 32 / bits]; bits i * bits and up of a word hold its number i."""
    data = words.contiguous().view(torch.uint8)  # the first byte of a word holds its lowest bits
    if bits == 8:
        return data
    out = torch.empty(*data.shape, 8 // bits, dtype=torch.uint8, device=words.device)
    for place in range(8 // bits):
        out[..., place] = data >> place * bits & (1 << bits) - 1
    return out.flatten(-2)


def unpack_rows(words: Tensor, bits: int, order: Sequence[int] | None = None) -> Tensor:
    """int32 [W, M] -> uint8 [W * 32 / bits, M]; bits i * bits and up of a word hold its number order[i] (i)."""
    per_word, words = 32 // bits, words.contiguous()
    out = torch.empty(words.shape[0], per_word, words.shape[1], dtype=torch.uint8, device=words.device)
    for place, number in enumerate(order or range(per_word)):
        out[:, number] = words >> place * bits & (1 << bits) - 1
    return out.flatten(0, 1)


def pack_words(values: Tensor, bits: int, order: Sequence[int] | None = None) -> Tensor:
    """The inverse, along the last dimension: uint8 [..., M] below 2 ** bits -> int32 [..., M * bits / 32], M filling words."""
    per_word = 32 // bits
    numbers = values.unflatten(-1, (-1, per_word))
    words = torch.zeros(numbers.shape[:-1], dtype=torch.int32, device=values.device)
    for place, number in enumerate(order or range(per_word)):
        words |= numbers[..., number].int() << place * bits
    return words
