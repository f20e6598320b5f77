"""Ranges and means of what a layer's linears read and write, and of its keys and values. It changes no weight.

Statistics are those of LMDeploy's `lite calibrate`: max, min, mean, absmax and absmean over all tokens, for each channel.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lmdeploy.layers.linear import Linear
from lmdeploy.layers.norm import Norm
from lmdeploy.lite.moments import run_experts
from lmdeploy.lite.stream import linears_of
from lmdeploy.quantization.unquantized import UnquantizedMethod

STATISTICS = ("max", "min", "mean", "absmax", "absmean")


class Observer:
    """Sums over rows of what it is shown, for each channel."""

    def __init__(self) -> None:
        self.count = 0
        self._largest = self._smallest = self._sum = self._sum_of_magnitudes = torch.empty(0)

    def add(self, x: Tensor) -> None:
        """Rows [T, C]; none are allowed."""
        if not len(x):
            return
        if not self.count:
            self._largest, self._smallest = x.amax(0), x.amin(0)
            self._sum = self._sum_of_magnitudes = x.new_zeros(x.shape[1])
        self._largest, self._smallest = self._largest.maximum(x.amax(0)), self._smallest.minimum(x.amin(0))
        self._sum = self._sum + x.sum(0)
        self._sum_of_magnitudes = self._sum_of_magnitudes + x.abs().sum(0)
        self.count += len(x)

    def statistics(self, channels: Tensor | None = None) -> dict[str, Tensor]:
        """By name, each [C], or of some channels; only of an observer that was shown something."""
        largest, smallest = self._largest, self._smallest
        values = {
            "max": largest,
            "min": smallest,
            "mean": self._sum / self.count,
            "absmax": largest.abs().maximum(smallest.abs()),
            "absmean": self._sum_of_magnitudes / self.count,
        }
        return {name: (v.cpu() if channels is None else v.cpu()[channels]).clone() for name, v in values.items()}


class LayerObservers:
    """inputs, outputs: of each linear by path. Of experts, the inputs and outputs of all together."""

    def __init__(self, layer: nn.Module) -> None:
        linears = linears_of(layer)
        self.inputs = {path: Observer() for path in linears}
        self.outputs = {path: Observer() for path in linears}
        paths = {id(linear): path for path, linear in linears.items()}
        for path, linear in linears.items():
            linear.method = _ObservingMethod(path, self, paths)


class _ObservingMethod(UnquantizedMethod):
    name = "observing"

    def __init__(self, path: str, observers: LayerObservers, paths: dict[int, str]) -> None:
        super().__init__()
        self.path = path
        self._observers = observers
        self._paths = paths

    def apply(self, linear: Linear, x: Tensor, *, norm: Norm | None = None, residual: Tensor | None = None) -> Tensor:
        x = x if norm is None else norm(x)
        out = super().apply(linear, x)
        self._observers.inputs[self.path].add(x)
        self._observers.outputs[self.path].add(out)
        return out if residual is None else out + residual

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
        observers, down_path = self._observers, self._paths[id(down)]

        def see(expert: int, read: Tensor, hidden: Tensor, answer: Tensor) -> None:
            observers.inputs[self.path].add(read)
            observers.inputs[down_path].add(hidden)
            observers.outputs[down_path].add(answer)

        return run_experts(x, (weights, experts), (gate_up, down), (activation, clamp), see)


class CacheObserver:
    """Keys or values as the cache holds them, for each head and channel: statistics are [Hkv, D]."""

    def __init__(self) -> None:
        self._observer = Observer()
        self._shape: tuple[int, int] = (0, 0)

    def add(self, cached: Tensor) -> None:
        """[W, Hkv, S, D]."""
        self._shape = cached.shape[1], cached.shape[3]
        self._observer.add(cached.transpose(1, 2).flatten(2).flatten(0, 1))

    def statistics(self) -> dict[str, Tensor]:
        return {name: value.view(self._shape) for name, value in self._observer.statistics().items()}


Named = dict[str, dict[str, Tensor]]


def gather(named: Named, name: str, values: dict[str, Tensor]) -> None:
    """Add one module's statistics to a file's content: statistic -> module -> tensor."""
    for statistic, value in values.items():
        named[statistic][name] = value


def empty() -> Named:
    """A file's content before any module's."""
    return {statistic: {} for statistic in STATISTICS}
