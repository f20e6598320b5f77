"""What the linears of a layer read while it runs: second moments of their inputs. It changes no weight.

Two runs over the same tokens can be paired: a reference run, of the original layer on the original hidden states, and the
run of the layer that is being quantized, on what the quantized layers before it give.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from lmdeploy.kernels import gated_activation
from lmdeploy.kernels.reference.moe import clamped_swiglu
from lmdeploy.layers.linear import Linear
from lmdeploy.layers.norm import Norm
from lmdeploy.lite.stream import linears_of
from lmdeploy.quantization.unquantized import UnquantizedMethod

_SAMPLED = 384  # inputs kept, of which each batch gives so many:
_SAMPLED_AT_ONCE = 48

Key: TypeAlias = tuple[str, int | None]
"""A linear's path in its layer, and of a linear that holds experts which one; None: all that the linear reads."""


@dataclass
class Moments:
    """Sums over tokens of an input x [K], beside the reference run's x0 and residuals r0, r of the linear's output [N].

    square: x x^T. drift: (x0 - x) x^T. residual: (r0 - r) x^T [N, K]. absolute: |x|, largest: the maximum of |x|.
    sample: some of the inputs themselves, [M, K].
    """

    square: Tensor
    absolute: Tensor
    largest: Tensor
    sample: Tensor
    count: int = 0
    drift: Tensor | None = None
    residual: Tensor | None = None

    @staticmethod
    def empty(size: int, device: torch.device) -> Moments:
        zeros = torch.zeros(size, device=device)
        return Moments(torch.zeros(size, size, device=device), zeros, zeros.clone(), zeros.new_empty(0, size))

    @staticmethod
    def uniform(size: int, device: torch.device) -> Moments:
        """Of inputs that nothing is known of: independent, all alike."""
        ones, identity = torch.ones(size, device=device), torch.eye(size, device=device)
        return Moments(identity, ones, ones.clone(), identity[:: max(1, size // _SAMPLED)], 1)

    def add(self, x: Tensor) -> None:
        """Inputs [T, K]."""
        self.square.addmm_(x.t(), x)
        magnitude = x.abs()
        self.absolute += magnitude.sum(0)
        if len(x):
            self.largest = torch.maximum(self.largest, magnitude.amax(0))
            if len(self.sample) < _SAMPLED:
                self.sample = torch.cat([self.sample, x[:: max(1, len(x) // _SAMPLED_AT_ONCE)]])
        self.count += len(x)

    def add_drift(self, x: Tensor, drift: Tensor, residual: Tensor | None) -> None:
        """What the reference run read and added beyond this run: [T, K] and [T, N]."""
        if self.drift is None:
            self.drift = torch.zeros_like(self.square)
        self.drift.addmm_(drift.t(), x)
        if residual is not None:
            if self.residual is None:
                self.residual = torch.zeros(residual.shape[1], x.shape[1], device=x.device)
            self.residual.addmm_(residual.t(), x)

    @property
    def mean_square(self) -> Tensor:
        """Mean of x^2 [K]."""
        return self.square.diagonal() / max(self.count, 1)

    def divided(self, scale: Tensor) -> Moments:
        """The moments of x / scale, x0 / scale."""
        outer = scale[:, None] * scale[None]
        return Moments(
            self.square / outer,
            self.absolute / scale,
            self.largest / scale,
            self.sample / scale,
            self.count,
            None if self.drift is None else self.drift / outer,
            None if self.residual is None else self.residual / scale,
        )


class StopForward(Exception):
    """Everything that was wanted has been recorded."""


class Recorder:
    """Receives the inputs of a layer's linears. wanted: paths that are recorded; the run ends after the path last_wanted."""

    def __init__(self) -> None:
        self.moments: dict[Key, Moments] = {}
        self.wanted: frozenset[str] = frozenset()
        self.last_wanted: str | None = None
        self.seen: list[str] = []
        self.is_reference = False
        self._inputs: dict[str, tuple[Tensor, Tensor | None]] = {}
        self.pair: Recorder | None = None

    def start(self, wanted: frozenset[str]) -> None:
        """Forget everything, and record these from now on, in runs that do not end early."""
        self.moments, self.wanted, self.last_wanted = {}, wanted, None
        self._inputs = {}

    def pair_with(self, reference: Recorder) -> None:
        """Compare what is recorded with what the reference has recorded for the same tokens just before."""
        self.pair = reference

    def record(self, path: str, x: Tensor, residual: Tensor | None) -> None:
        """A linear reads x [T, K] and adds residual [T, N]."""
        if path not in self.seen:
            self.seen.append(path)
        if path in self.wanted:
            if self.is_reference:
                self._inputs[path] = x, residual
            else:
                moments = self._moments((path, None), x)
                moments.add(x)
                if self.pair is not None and path in self.pair._inputs:
                    x0, residual0 = self.pair._inputs.pop(path)
                    added = None if residual0 is None or residual is None else residual0 - residual
                    moments.add_drift(x, x0 - x, added)
        if path == self.last_wanted:
            raise StopForward

    def record_expert(self, path: str, expert: int, x: Tensor) -> None:
        """One expert's part of a linear reads x [T, K]; experts are not paired: the two runs may route differently."""
        if path in self.wanted and not self.is_reference:
            self._moments((path, expert), x).add(x)

    def _moments(self, key: Key, x: Tensor) -> Moments:
        if key not in self.moments:
            self.moments[key] = Moments.empty(x.shape[1], x.device)
        return self.moments[key]


class RecordingMethod(UnquantizedMethod):
    """Plain weights that tell a recorder what they are applied to."""

    name = "recording"

    def __init__(self, path: str, recorder: Recorder, paths: dict[int, str]) -> None:
        super().__init__()
        self.path = path
        self.recorder = recorder
        self._paths = paths

    def apply(self, linear: Linear, x: Tensor, *, norm: Norm | None = None, residual: Tensor | None = None) -> Tensor:
        x = x if norm is None else norm(x)
        self.recorder.record(self.path, x, residual)
        return super().apply(linear, x, residual=None if residual is None else residual.clone())

    def routed_mlp(
        self,
        x: Tensor,
        weights: Tensor,
        experts: Tensor,
        gate_up: Linear,
        down: Linear,
        activation: str,
        clamp: float | None,
    ) -> Tensor:
        """As kernels.routed_mlp, expert by expert."""
        down_path = self._paths[id(down)]
        self.recorder.record(self.path, x, None)
        out = run_experts(
            x,
            (weights, experts),
            (gate_up, down),
            (activation, clamp),
            lambda expert, read, hidden, answer: self.recorder.record_expert(down_path, expert, hidden),
        )
        self.recorder.record(down_path, x.new_empty(0, down.in_features), None)
        return out


def run_experts(
    x: Tensor,
    routing: tuple[Tensor, Tensor],
    linears: tuple[Linear, Linear],
    activation: tuple[str, float | None],
    see: Callable[[int, Tensor, Tensor, Tensor], None],
) -> Tensor:
    """kernels.routed_mlp, expert by expert, with plain weights.

    routing: weights and experts [T, k]; linears: gate_up and down; activation: its name and its clamp. see(expert, input of
    gate_up, input of down, output of down) is called for each expert.
    """
    (weights, experts), (name, clamp) = routing, activation
    count = len(linears[1].parts)
    up_weights, down_weights = (linear.method.dense_weight(linear).unflatten(0, (count, -1)) for linear in linears)
    biases = [None if linear.bias is None else linear.bias.unflatten(0, (count, -1)) for linear in linears]
    out = torch.zeros_like(x)
    for expert in range(count):
        tokens, choice = (experts == expert).nonzero(as_tuple=True)
        up_bias, down_bias = (None if bias is None else bias[expert] for bias in biases)
        hidden = nn.functional.linear(x[tokens], up_weights[expert], up_bias)
        hidden = gated_activation(hidden, name) if clamp is None else clamped_swiglu(hidden, clamp)
        answer = nn.functional.linear(hidden, down_weights[expert], down_bias)
        see(expert, x[tokens], hidden, answer)
        out.index_add_(0, tokens, answer * weights[tokens, choice, None].to(x.dtype))
    return out


def install_recorder(layer: nn.Module) -> Recorder:
    """Let all linears of a loaded layer tell one recorder what they read."""
    recorder = Recorder()
    linears = linears_of(layer)
    paths = {id(linear): path for path, linear in linears.items()}
    for path, linear in linears.items():
        linear.method = RecordingMethod(path, recorder, paths)
    return recorder
