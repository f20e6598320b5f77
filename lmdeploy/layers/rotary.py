"""Rotary position embedding: the cosines and sines of a step. It turns no query and knows no model.

RoPE https://arxiv.org/abs/2104.09864. Scaled forms are in rotary_scaling.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lmdeploy.layers.context import ForwardContext
    from lmdeploy.models.rope_config import RopeConfig


def make_rotary(config: RopeConfig) -> Rotary:
    """The embedding of a config's kind."""
    if config.kind == "default":
        return Rotary(config)
    from lmdeploy.layers import rotary_scaling

    is_static = config.kind in rotary_scaling.STATIC_KINDS
    return rotary_scaling.ScaledRotary(config) if is_static else rotary_scaling.LengthRotary(config)


class Rotary:
    """cos and sin of position * frequency for one RopeConfig, shared by all layers that use it.

    They are rows of a table that grows as positions do. Frequencies are made in float64 and used in float32. R is the
    number of rotated dimensions.
    """

    def __init__(self, config: RopeConfig) -> None:
        self.config = config
        self.interleaved = config.interleaved
        self._exponents = torch.arange(0, config.dim, 2, dtype=torch.float64, device="cpu") / config.dim
        self._tables: Tensor | None = None  # cos and sin, [2, positions, R / 2]

    def tables(self, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
        """cos and sin of every token of the step, each [T, R / 2] float32; computed once per step."""
        return ctx.once(self, lambda: self._step_tables(ctx))

    def step_frequencies(self, ctx: ForwardContext) -> Tensor:
        """The angular frequencies of every token of the step, [T, R / 2] float32, where they depend on a length."""
        raise NotImplementedError

    def cos_sin(self, positions: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, each [T, R / 2] float32, of tokens at positions [T] of requests with prompts of lengths [T] tokens."""
        return self._turn(positions.float()[:, None] * self._frequencies().float().to(positions.device))

    def rope_length_key(self, prompt_len: int) -> int:
        """What of a prompt's length decides its cached keys: equal tokens under equal keys have equal K and V."""
        return 0

    def reserve(self, num_positions: int, device: torch.device) -> None:
        """Make the table reach num_positions now, so that no later step has to move it."""
        if self._tables is not None and self._tables.shape[1] >= num_positions:
            return
        positions = torch.arange(1 << max(num_positions - 1, 255).bit_length(), device=device)
        self._tables = torch.stack(self.cos_sin(positions, positions))

    def _step_tables(self, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
        self.reserve(max(ctx.context_lens_host, default=0), ctx.positions.device)
        assert self._tables is not None
        cos, sin = self._tables[:, ctx.positions]
        return cos, sin

    def _frequencies(self) -> Tensor:
        """Angular frequencies, [R / 2] float64."""
        return self.config.theta**-self._exponents

    def _turn(self, angles: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = angles.cos(), angles.sin()
        factor = self.config.attention_factor
        return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)
