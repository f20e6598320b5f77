"""Runs a model over a hand-made blocked cache, without an engine: any split of any requests into steps."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lmdeploy.layers.context import ForwardContext, KVCache
from lmdeploy.layers.quantized_cache import FORMATS, QuantizedKVCache
from lmdeploy.messages import QuantPolicy
from lmdeploy.models.base import CausalLM

BLOCK_SIZE = 16


@dataclass
class Sequence:
    """A request: its tokens so far, how many of them are in the cache, and its blocks."""

    ids: list[int]
    prompt_len: int
    blocks: list[int] = field(default_factory=list)
    computed: int = 0


class Driver:
    """A cache of num_blocks blocks and the steps over it."""

    def __init__(self, model: CausalLM, num_blocks: int = 64, policy: QuantPolicy = QuantPolicy.NONE) -> None:
        self.model = model
        planes, heads, dim = model.config.kv_shape
        shape = (num_blocks, model.config.num_layers, planes, heads, BLOCK_SIZE, dim)
        if policy == QuantPolicy.NONE:
            self.cache = KVCache(torch.full(shape, 7.0))
        else:
            self.cache = QuantizedKVCache(shape, FORMATS[policy], lambda part, dtype: torch.full(part, 7, dtype=dtype))
        self.free = list(range(num_blocks))[::-1]  # never contiguous in the order of use

    def add(self, prompt: list[int]) -> Sequence:
        """A new sequence with nothing computed."""
        return Sequence(list(prompt), len(prompt))

    def add_with_prefix(self, prompt: list[int], other: Sequence, num_blocks: int) -> Sequence:
        """A new sequence whose first num_blocks blocks are those that another one has computed."""
        return Sequence(list(prompt), len(prompt), other.blocks[:num_blocks], num_blocks * BLOCK_SIZE)

    @torch.inference_mode()
    def step(self, sequences: list[Sequence], counts: list[int]) -> list[Tensor]:
        """Compute the next counts[i] tokens of each sequence; their logits, [counts[i], V] each."""
        for sequence, count in zip(sequences, counts, strict=True):
            while len(sequence.blocks) * BLOCK_SIZE < sequence.computed + count:
                sequence.blocks.append(self.free.pop())
        ids = [t for s, c in zip(sequences, counts, strict=True) for t in s.ids[s.computed : s.computed + c]]
        hidden = self.model(torch.tensor(ids), self.context(sequences, counts))
        for sequence, count in zip(sequences, counts, strict=True):
            sequence.computed += count
        return list(self.model.compute_logits(hidden).split(counts))

    def context(self, sequences: list[Sequence], counts: list[int]) -> ForwardContext:
        """The step's context, tables padded with 0 as the engine pads them."""
        positions = [p for s, c in zip(sequences, counts, strict=True) for p in range(s.computed, s.computed + c)]
        owners = [s for s, c in zip(sequences, counts, strict=True) for _ in range(c)]
        slots = [
            s.blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for s, p in zip(owners, positions, strict=True)
        ]
        width = max(len(s.blocks) for s in sequences)
        lengths = [s.computed + c for s, c in zip(sequences, counts, strict=True)]
        return ForwardContext(
            positions=torch.tensor(positions),
            cu_seqlens_q=torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32),
            context_lens=torch.tensor(lengths, dtype=torch.int32),
            block_tables=torch.tensor([s.blocks + [0] * (width - len(s.blocks)) for s in sequences], dtype=torch.int32),
            slot_mapping=torch.tensor(slots),
            prompt_lens=torch.tensor([s.prompt_len for s in sequences], dtype=torch.int32),
            kv_cache=self.cache,
            query_lens=list(counts),
            context_lens_host=lengths,
        )

    def prefill(self, sequences: list[Sequence], chunk: int) -> list[Tensor]:
        """Compute all prompts, all sequences side by side, at most `chunk` tokens of each in a step; logits [T_i, V]."""
        parts: list[list[Tensor]] = [[] for _ in sequences]
        while any(s.computed < s.prompt_len for s in sequences):
            active = [i for i, s in enumerate(sequences) if s.computed < s.prompt_len]
            counts = [min(chunk, sequences[i].prompt_len - sequences[i].computed) for i in active]
            for i, logits in zip(active, self.step([sequences[i] for i in active], counts), strict=True):
                parts[i].append(logits)
        return [torch.cat(part) for part in parts]

    def decode(self, sequences: list[Sequence], last_logits: list[Tensor], count: int) -> list[list[int]]:
        """`count` greedy tokens of each sequence, all in one batch, from the logits [V] of each one's last prompt token."""
        outputs: list[list[int]] = [[] for _ in sequences]
        for _ in range(count):
            for sequence, output, logits in zip(sequences, outputs, last_logits, strict=True):
                output.append(int(logits.argmax()))
                sequence.ids.append(output[-1])
            if len(outputs[0]) < count:
                last_logits = [logits[-1] for logits in self.step(sequences, [1] * len(sequences))]
        return outputs
