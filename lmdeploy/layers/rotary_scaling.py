"""Rotary embeddings stretched beyond the trained length: static ones, and those that change with a request's length.

YaRN https://arxiv.org/abs/2309.00071, LongRoPE https://arxiv.org/abs/2402.13753. It knows no model.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lmdeploy.layers.rotary import Rotary

if TYPE_CHECKING:
    from lmdeploy.layers.context import ForwardContext
    from lmdeploy.models.rope_config import RopeConfig

STATIC_KINDS = ("linear", "llama3", "yarn")


class ScaledRotary(Rotary):
    """Frequencies that are scaled once and for all: linear, llama3, yarn."""

    def _frequencies(self) -> Tensor:
        plain, factor = super()._frequencies(), self.config.factor
        if self.config.kind == "linear":
            return plain / factor
        return _blend(plain, factor, self._llama3_share(plain) if self.config.kind == "llama3" else self._yarn_share())

    def _llama3_share(self, frequencies: Tensor) -> Tensor:
        """The part of each frequency that is kept: by how many turns it makes within the trained length. [R / 2]."""
        low, high = self.config.low_freq_factor, self.config.high_freq_factor
        turns = self.config.trained_length * frequencies / (2 * math.pi)
        return ((turns - low) / (high - low)).clamp(0, 1)

    def _yarn_share(self) -> Tensor:
        """The part of each frequency that YaRN keeps: 1 for fast ones, 0 for slow ones, a ramp between. [R / 2]."""
        config = self.config
        low, high = (
            config.dim * math.log(config.trained_length / (turns * 2 * math.pi)) / (2 * math.log(config.theta))
            for turns in (config.beta_fast, config.beta_slow)
        )
        if config.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, config.dim - 1)
        ramp = torch.arange(config.dim // 2, dtype=torch.float64, device="cpu") - low
        return 1 - (ramp / (high - low if high != low else 0.001)).clamp(0, 1)


class LengthRotary(Rotary):
    """Frequencies computed for each token, by the length of its request: dynamic, dynamic_by_prompt, longrope."""

    def __init__(self, config: RopeConfig) -> None:
        super().__init__(config)
        self._constants: dict[torch.device, tuple[Tensor, ...]] = {}

    def step_frequencies(self, ctx: ForwardContext) -> Tensor:
        """As Rotary says; computed once per step."""

        def compute() -> Tensor:
            return self.frequencies_at(self.effective_lengths(ctx.positions, ctx.prompt_lens[ctx.token_rows]))

        return ctx.once((self, "frequencies"), compute)

    def cos_sin(self, positions: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        return self._turn(positions.float()[:, None] * self.frequencies_at(self.effective_lengths(positions, lengths)))

    def effective_lengths(self, positions: Tensor, lengths: Tensor) -> Tensor:
        """The length that sets each token's frequencies, at least the trained length. [T], [T] -> [T]."""
        if self.config.kind == "dynamic":
            lengths = torch.maximum(lengths, positions + 1)
        return lengths.clamp(min=self.config.trained_length)

    def frequencies_at(self, lengths: Tensor) -> Tensor:
        """Angular frequencies under the given lengths: [T] -> [T, R / 2] float32."""
        constants = self._on(lengths.device)
        if self.config.kind == "longrope":
            short, long = constants
            return torch.where((lengths > self.config.trained_length)[:, None], long, short)
        (exponents,) = constants
        base = self.config.theta * self._stretch(lengths.double()) ** (self.config.dim / (self.config.dim - 2))
        return (base[:, None] ** -exponents).float()

    def rope_length_key(self, prompt_len: int) -> int:
        if prompt_len <= self.config.trained_length:
            return 0
        if self.config.kind == "longrope":
            return 1
        if self.config.kind == "dynamic_by_prompt":
            return int(self._stretch(torch.tensor([prompt_len], dtype=torch.float64, device="cpu")))
        return prompt_len

    def reserve(self, num_positions: int, device: torch.device) -> None:
        """There is no table."""

    def _step_tables(self, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
        return self.cos_sin(ctx.positions, ctx.prompt_lens[ctx.token_rows])

    def _stretch(self, lengths: Tensor) -> Tensor:
        """How much dynamic NTK stretches the base, before its exponent, for float64 lengths of at least the trained one."""
        ratio = lengths / self.config.trained_length
        if self.config.kind == "dynamic":
            return self.config.factor * ratio - (self.config.factor - 1)
        return torch.exp2(torch.ceil(torch.log2(ratio) + 1)).sub(1).clamp(min=1)

    def _on(self, device: torch.device) -> tuple[Tensor, ...]:
        if device not in self._constants:
            self._constants[device] = tuple(constant.to(device) for constant in self._make_constants())
        return self._constants[device]

    def _make_constants(self) -> tuple[Tensor, ...]:
        """Short and long frequencies [R / 2] float32 for longrope; the exponents (float64) for dynamic kinds."""
        if self.config.kind != "longrope":
            return (self._exponents,)
        plain = self._frequencies()
        factors = (self.config.short_factor, self.config.long_factor)
        divisors = (torch.tensor(factor, dtype=torch.float64, device="cpu") for factor in factors)
        return tuple((plain / divisor).float() for divisor in divisors)


def _blend(frequencies: Tensor, factor: float, kept: Tensor) -> Tensor:
    """Frequencies divided by factor, except for the share that is kept."""
    return frequencies * kept + frequencies / factor * (1 - kept)
