"""The formats that a model is quantized into: what fits, how a weight is rounded, what is written. It runs no layer."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lmdeploy.lite.grids import GridSpec
from lmdeploy.lite.recipe import AffineRecipe, QuantizedWeight, Recipe
from lmdeploy.lite.settings import AWQ, GPTQ, GROUP_SIZES, QUANT_DTYPES, SMOOTH_QUANT, Settings
from lmdeploy.lite.smoothing import SmoothRecipe
from lmdeploy.lite.stream import LayerStream, linears_of
from lmdeploy.quantization import export
from lmdeploy.quantization.packing import AffineTensor
from lmdeploy.quantization.scaled import ScaledTensor

_WORD = 32  # bits that numbers are packed into
_INT8_MULTIPLE = (
    8  # channels that a GPU's integer product wants; it also leaves the gates of shared experts as they are
)


class Scheme(ABC):
    """One format. command: that writes it; title: for people; summary: what the README says; key: what two equal runs share.

    needs: of a linear's sizes, for people.
    """

    command: ClassVar[str]
    title: ClassVar[str]
    needs: ClassVar[str] = f"groups of {', '.join(map(str, sorted(GROUP_SIZES)))} must divide a linear's inputs"

    def __init__(self, recipe: Recipe, summary: str, key: Sequence[Any]) -> None:
        self.recipe = recipe
        self.summary = summary
        self.key = [self.command, str(recipe.dtype), *key]

    @property
    def dtype(self) -> torch.dtype:
        """Of what stays in 16 bits, and of the scales."""
        return self.recipe.dtype

    @abstractmethod
    def fits(self, shape: Sequence[int]) -> bool:
        """Whether the format can hold a weight of this shape."""

    @abstractmethod
    def tensors(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The tensors of linear `name`."""

    @abstractmethod
    def config(self, unconverted: Sequence[str]) -> dict[str, Any]:
        """`quantization_config` of config.json. unconverted: linears of the layers that stay in 16 bits."""

    def files(self, unconverted: Sequence[str]) -> Mapping[str, Mapping[str, Any]]:
        """Further JSON files, by name."""
        return {}


class _GroupedScheme(Scheme):
    """What AWQ and GPTQ share: integers by groups of input channels."""

    def __init__(self, spec: GridSpec, search: str) -> None:
        self.spec = spec
        zeros = "symmetric" if spec.symmetric else "with zero points"
        summary = f"{spec.bits} bits in groups of {spec.group_size}, {zeros}, search `{search}`"
        key = (spec.bits, spec.group_size, spec.symmetric, search)
        super().__init__(AffineRecipe(spec, search), summary, key)

    def fits(self, shape: Sequence[int]) -> bool:
        packed = _WORD // self.spec.bits
        return len(shape) == 2 and shape[0] % packed == 0 and shape[1] % self.spec.group_size == 0


class AwqScheme(_GroupedScheme):
    """AWQ's gemm layout."""

    command, title = AWQ, "AWQ"

    def tensors(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        assert isinstance(weight, AffineTensor)
        return export.awq_tensors(name, weight, self.dtype)

    def config(self, unconverted: Sequence[str]) -> dict[str, Any]:
        return export.awq_config(self.spec.group_size, not self.spec.symmetric, unconverted)


class GptqScheme(_GroupedScheme):
    """The first version of GPTQ's layout, groups in order: columns are never permuted in the file."""

    command, title = GPTQ, "GPTQ"

    def tensors(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        assert isinstance(weight, AffineTensor)
        return export.gptq_tensors(name, weight, self.dtype)

    def config(self, unconverted: Sequence[str]) -> dict[str, Any]:
        config = export.gptq_config(self.spec.bits, self.spec.group_size, self.spec.symmetric)
        # GPTQModel and vLLM leave out what a pattern with a minus names.
        skipped: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in unconverted}
        return {**config, "dynamic": skipped} if skipped else config

    def files(self, unconverted: Sequence[str]) -> Mapping[str, Mapping[str, Any]]:
        """AutoGPTQ's own file, for readers that look for it."""
        return {"quantize_config.json": {**self.config(unconverted), "static_groups": True}}


class SmoothQuantScheme(Scheme):
    """LMDeploy's smooth_quant: 8-bit weights with a scale per output channel."""

    command, title = SMOOTH_QUANT, "SmoothQuant"
    needs = f"a linear's sizes must be multiples of {_INT8_MULTIPLE}"

    def __init__(self, quant_dtype: str, search: str, dtype: torch.dtype) -> None:
        self.quant_dtype = quant_dtype
        exponent = "1/2" if search == "none" else "searched"
        summary = f"{quant_dtype} weights with a scale per output channel, smoothing exponent {exponent}"
        recipe = SmoothRecipe(getattr(torch, quant_dtype), search != "none", dtype)
        super().__init__(recipe, summary, (quant_dtype, search))

    def fits(self, shape: Sequence[int]) -> bool:
        return len(shape) == 2 and shape[0] % _INT8_MULTIPLE == shape[1] % _INT8_MULTIPLE == 0

    def tensors(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        assert isinstance(weight, ScaledTensor)
        return export.smooth_quant_tensors(name, weight)

    def config(self, unconverted: Sequence[str]) -> dict[str, Any]:
        config = export.smooth_quant_config(self.quant_dtype)
        return {**config, "modules_to_not_convert": list(unconverted)} if unconverted else config


def make_scheme(stream: LayerStream, settings: Settings) -> Scheme:
    """The format that the settings ask for, in groups that divide the model's sizes."""
    name = stream.config.dtype if settings.dtype == "auto" else settings.dtype
    dtype = torch.bfloat16 if name == "bfloat16" else torch.float16
    if settings.command == SMOOTH_QUANT:
        return SmoothQuantScheme(QUANT_DTYPES[settings.quant_dtype], settings.search, dtype)
    size = fitting_group_size(input_sizes(stream), settings.w_group_size)
    if settings.command == AWQ:
        return AwqScheme(GridSpec(settings.w_bits, size, settings.w_sym, dtype), settings.search)
    # In GPTQ's first layout a zero of 0 is read as 2 ** bits.
    return GptqScheme(GridSpec(settings.w_bits, size, settings.w_sym, dtype, min_zero=1), settings.search)


def input_sizes(stream: LayerStream) -> list[int]:
    """Input channels of every linear of the layers."""
    return [linear.in_features for layer in stream.model.layers for linear in linears_of(layer).values()]


def fitting_group_size(columns: Sequence[int], wanted: int) -> int:
    """The wanted size, or a smaller one that divides the inputs of more linears; what it does not divide stays in 16 bits."""
    return max(
        (size for size in GROUP_SIZES if size <= wanted),
        key=lambda size: (sum(count for count in columns if count % size == 0), size),
    )
