"""Rotary position embedding: the cosines and sines of a step, under every scaling. It turns no query and knows no model.

RoPE https://arxiv.org/abs/2104.09864, YaRN https://arxiv.org/abs/2309.00071, LongRoPE https://arxiv.org/abs/2402.13753.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lmdeploy.layers.context import ForwardContext
    from lmdeploy.models.rope_config import RopeConfig


class Rotary:
    """cos and sin of position * frequency for one RopeConfig, shared by all layers that use it.

    Where the frequencies never change they are rows of a table that grows as positions do; where they depend on a length they
    are computed for each token. Frequencies are made in float64 and used in float32. R is the number of rotated dimensions.
    """

    def __init__(self, config: RopeConfig) -> None:
        self.config = config
        self.interleaved = config.interleaved
        self.depends_on_length = config.kind in ("dynamic", "dynamic_by_prompt", "longrope")
        self._exponents = torch.arange(0, config.dim, 2, dtype=torch.float64, device="cpu") / config.dim
        self._tables: tuple[Tensor, Tensor] | None = None
        self._constants: dict[torch.device, tuple[Tensor, ...]] = {}

    def tables(self, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
        """cos and sin of every token of the step, each [T, R / 2] float32; computed once per step."""
        return ctx.once(self, lambda: self._step_tables(ctx))

    def step_frequencies(self, ctx: ForwardContext) -> Tensor:
        """The angular frequencies of every token of the step, [T, R / 2] float32; computed once per step."""

        def compute() -> Tensor:
            return self.frequencies(self.effective_lengths(ctx.positions, ctx.prompt_lens[ctx.token_rows]))

        return ctx.once((self, "frequencies"), compute)

    def cos_sin(self, positions: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, each [T, R / 2] float32, of tokens at positions [T] of requests with prompts of lengths [T] tokens."""
        if not self.depends_on_length:
            (frequencies,) = self._on(positions.device)
            return self._turn(positions.float()[:, None] * frequencies)
        return self._turn(positions.float()[:, None] * self.frequencies(self.effective_lengths(positions, lengths)))

    def effective_lengths(self, positions: Tensor, lengths: Tensor) -> Tensor:
        """The length that sets each token's frequencies, at least the trained length. [T], [T] -> [T]."""
        if self.config.kind == "dynamic":
            lengths = torch.maximum(lengths, positions + 1)
        return lengths.clamp(min=self.config.trained_length)

    def frequencies(self, lengths: Tensor) -> Tensor:
        """Angular frequencies under the given lengths: [T] -> [T, R / 2] float32."""
        constants = self._on(lengths.device)
        if self.config.kind == "longrope":
            short, long = constants
            return torch.where((lengths > self.config.trained_length)[:, None], long, short)
        (exponents,) = constants
        base = self.config.theta * self._stretch(lengths.double()) ** (self.config.dim / (self.config.dim - 2))
        return (base[:, None] ** -exponents).float()

    def rope_length_key(self, prompt_len: int) -> int:
        """What of a prompt's length decides its cached keys: equal tokens under equal keys have equal K and V."""
        if not self.depends_on_length or prompt_len <= self.config.trained_length:
            return 0
        if self.config.kind == "longrope":
            return 1
        if self.config.kind == "dynamic_by_prompt":
            return int(self._stretch(torch.tensor([prompt_len], dtype=torch.float64, device="cpu")))
        return prompt_len

    def reserve(self, num_positions: int, device: torch.device) -> None:
        """Make the table of static frequencies reach num_positions now, so that no later step has to move it."""
        if self.depends_on_length or (self._tables and self._tables[0].shape[0] >= num_positions):
            return
        positions = torch.arange(1 << max(num_positions - 1, 255).bit_length(), device=device)
        self._tables = self.cos_sin(positions, positions)

    def _step_tables(self, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
        if self.depends_on_length:
            return self.cos_sin(ctx.positions, ctx.prompt_lens[ctx.token_rows])
        self.reserve(max(ctx.context_lens_host), ctx.positions.device)
        assert self._tables is not None
        cos, sin = self._tables
        return cos[ctx.positions], sin[ctx.positions]

    def _turn(self, angles: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = angles.cos(), angles.sin()
        factor = self.config.attention_factor
        return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)

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
        """The frequencies [R / 2] float32; short and long ones for longrope; the exponents (float64) for dynamic kinds."""
        config = self.config
        if config.kind.startswith("dynamic"):
            return (self._exponents,)
        plain = config.theta**-self._exponents
        if config.kind == "longrope":
            divisors = (
                torch.tensor(d, dtype=torch.float64, device="cpu") for d in (config.short_factor, config.long_factor)
            )
            return tuple((plain / divisor).float() for divisor in divisors)
        if config.kind == "linear":
            plain = plain / config.factor
        elif config.kind == "llama3":
            plain = _blend(plain, config.factor, self._llama3_share(plain))
        elif config.kind == "yarn":
            plain = _blend(plain, config.factor, self._yarn_share())
        return (plain.float(),)

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


def _blend(frequencies: Tensor, factor: float, kept: Tensor) -> Tensor:
    """Frequencies divided by factor, except for the share that is kept."""
    return frequencies * kept + frequencies / factor * (1 - kept)
