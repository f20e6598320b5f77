"""The several tensors of each quantized linear as one logical tensor, recognized by names and shapes. It knows no file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lmdeploy.errors import CheckpointError
from lmdeploy.models.weight_files import TensorInfo, TensorSource
from lmdeploy.models.weight_formats import not_supported
from lmdeploy.models.weights import Value, dense
from lmdeploy.quantization import integer_formats as formats
from lmdeploy.quantization.scaled import read_scaled

_AWQ_GPTQ = ("qweight", "qzeros", "scales", "g_idx")
_COMPRESSED = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
_SCALED = ("weight", "weight_scale_inv", "weight_scale", "scale", "weight_zero_point")
# Of activations and of the KV cache: both are quantized by what the values are, or not at all.
_UNUSED = {"input_scale", "input_zero_point", "input_scale_ub", "output_scale", "k_scale", "v_scale", "q_scale"}
_BYTES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
_DEFAULT_BLOCK = (128, 128)


@dataclass(frozen=True)
class Scheme:
    """What the config says that shapes do not. block: rows and columns that share a float8 scale."""

    group_size: int | None = None
    block: tuple[int, int] = _DEFAULT_BLOCK
    has_v2_zeros: bool = False
    has_act_order: bool = True
    quantizes_activations: bool = True


@dataclass(frozen=True)
class Joined:
    """A quantized linear: its format, the leaves of its tensors, and how its weight is made."""

    format: str
    leaves: tuple[str, ...]
    info: TensorInfo
    read: Callable[[], Value]


def read_scheme(quantization: Mapping[str, Any]) -> Scheme:
    """The scheme of a `quantization_config`; of several config_groups the first."""
    groups = list((quantization.get("config_groups") or {}).values())
    weights = (groups[0].get("weights") if groups else None) or {}
    size = weights.get("group_size") or quantization.get("group_size")
    block = quantization.get("weight_block_size") or weights.get("block_structure") or _DEFAULT_BLOCK
    return Scheme(
        group_size=size if isinstance(size, int) and size > 0 else None,
        block=(int(block[0]), int(block[1])),
        has_v2_zeros=quantization.get("checkpoint_format") == "gptq_v2",
        has_act_order=bool(quantization.get("desc_act", True)),
        quantizes_activations=not groups or any(group.get("input_activations") for group in groups),
    )


def join_quantized(source: TensorSource, quantization: Mapping[str, Any]) -> tuple[TensorSource, set[str]]:
    """The source with one `X.weight` for each quantized linear X, and the formats that were found; none: the source itself.

    Raises CheckpointError for tensors that do not go together, ModelNotSupported for bits or layouts that nothing here reads.
    """
    scheme = read_scheme(quantization)
    modules: dict[str, Joined] = {}
    for name in source.infos:
        module, _, leaf = name.rpartition(".")
        if leaf == "qweight":
            modules[module] = _awq_or_gptq(source, module, scheme)
        elif leaf == "weight_packed":
            modules[module] = _compressed(source, module, scheme)
        elif leaf in ("weight_scale", "weight_scale_inv", "scale") and _is_scaled(source, module):
            modules[module] = _scaled(source, module, leaf, scheme)
    return (_JoinedSource(source, modules) if modules else source), {joined.format for joined in modules.values()}


class _JoinedSource:
    def __init__(self, source: TensorSource, modules: dict[str, Joined]) -> None:
        self._source = source
        self._modules = modules
        self.infos: dict[str, TensorInfo] = {}
        for name, info in source.infos.items():
            module, _, leaf = name.rpartition(".")
            joined = modules.get(module)
            if joined is not None and leaf in joined.leaves:
                self.infos[f"{module}.weight"] = joined.info
            elif joined is not None and leaf == "bias":
                # Some writers give every quantized linear a bias, of zeros where the model has none.
                self.infos[name] = replace(info, is_optional=not dense(source.read(name)).any())
            elif leaf not in _UNUSED:
                self.infos[name] = info

    def read(self, name: str) -> Value:
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and module in self._modules:
            return self._modules[module].read()
        return self._source.read(name)


class _Tensors:
    """The tensors of one linear by leaf."""

    def __init__(self, source: TensorSource, module: str) -> None:
        self.source = source
        self.module = module

    def shape(self, leaf: str) -> tuple[int, ...]:
        """Raises CheckpointError if there is no such tensor."""
        info = self.source.infos.get(f"{self.module}.{leaf}")
        if info is None:
            raise CheckpointError(f"quantized linear {self.module!r} has no tensor {leaf!r}; complete the download")
        return info.shape

    def read(self, leaf: str) -> Tensor:
        self.shape(leaf)
        return dense(self.source.read(f"{self.module}.{leaf}"))

    def read_if_any(self, leaf: str) -> Tensor | None:
        return self.read(leaf) if f"{self.module}.{leaf}" in self.source.infos else None

    def wrong(self, problem: str) -> CheckpointError:
        return CheckpointError(f"quantized linear {self.module!r}: {problem}")

    def check_groups(self, columns: int, count: int, group_size: int | None) -> None:
        """Raise CheckpointError, with the linear's name, if groups of no size make `count` of `columns`."""
        try:
            formats.find_group_size(columns, count, group_size)
        except CheckpointError as error:
            raise self.wrong(str(error)) from error


def _awq_or_gptq(source: TensorSource, module: str, scheme: Scheme) -> Joined:
    tensors = _Tensors(source, module)
    words, zeros, scales = (tensors.shape(leaf) for leaf in _AWQ_GPTQ[:3])
    if not len(words) == len(zeros) == len(scales) == 2:
        raise tensors.wrong(f"qweight {list(words)}, qzeros {list(zeros)} and scales {list(scales)} are no matrices")
    groups, rows = scales
    if words[1] * 8 == rows and zeros == (groups, words[1]):
        tensors.check_groups(words[0], groups, scheme.group_size)
        info = TensorInfo((rows, words[0]), "affine4")
        return Joined("awq", _AWQ_GPTQ, info, lambda: _read_awq(tensors, scheme))
    bits = formats.gptq_bits(zeros, scales)
    if words[1] != rows or zeros[0] != groups:
        raise not_supported(
            f"qweight {list(words)} with qzeros {list(zeros)} and scales {list(scales)} ({module}: neither AWQ's gemm layout "
            "nor GPTQ's)"
        )
    if bits not in (2, 4, 8):
        raise not_supported(f"GPTQ weights of {bits} bits ({module})")
    columns = words[0] * 32 // bits
    tensors.check_groups(columns, groups, scheme.group_size)
    info = TensorInfo((rows, columns), "affine8" if bits == 8 else "affine4")
    return Joined("gptq", _AWQ_GPTQ, info, lambda: _read_gptq(tensors, scheme))


def _read_awq(tensors: _Tensors, scheme: Scheme) -> Value:
    qweight, qzeros, scales = (tensors.read(leaf) for leaf in _AWQ_GPTQ[:3])
    return formats.read_awq(qweight, qzeros, scales, scheme.group_size)


def _read_gptq(tensors: _Tensors, scheme: Scheme) -> Value:
    qweight, qzeros, scales = (tensors.read(leaf) for leaf in _AWQ_GPTQ[:3])
    groups = tensors.read_if_any("g_idx") if scheme.has_act_order else None
    zeros = {"has_v2_zeros": scheme.has_v2_zeros}
    return formats.read_gptq(qweight, qzeros, scales, groups, group_size=scheme.group_size, **zeros)


def _compressed(source: TensorSource, module: str, scheme: Scheme) -> Joined:
    tensors = _Tensors(source, module)
    shape = tuple(tensors.read("weight_shape").tolist())
    words, scales = tensors.shape("weight_packed"), tensors.shape("weight_scale")
    if len(shape) != 2 or len(words) != 2 or words[0] != shape[0]:
        raise tensors.wrong(f"weight_shape is {list(shape)} and weight_packed {list(words)}")
    bits = formats.compressed_bits(words[1], shape[1])
    if words[1] != -(-shape[1] * bits // 32):
        raise not_supported(f"{words[1]} words for {shape[1]} numbers ({module}: neither 4 nor 8 bits)")
    tensors.check_groups(shape[1], scales[1] if len(scales) > 1 else 1, scheme.group_size)

    def read() -> Value:
        groups = tensors.read_if_any("weight_g_idx")
        return formats.read_compressed(
            tensors.read("weight_packed"),
            tensors.read("weight_scale"),
            tensors.read_if_any("weight_zero_point"),
            shape[1],
            groups=None if groups is None or int(groups.min()) < 0 else groups,  # -1: not in use
            group_size=scheme.group_size,
        )

    return Joined("compressed-tensors", _COMPRESSED, TensorInfo(shape, f"affine{bits}"), read)


def _is_scaled(source: TensorSource, module: str) -> bool:
    name = f"{module}.weight"
    return name in source.infos and dense(source.read(name)).dtype in _BYTES


def _scaled(source: TensorSource, module: str, scale_leaf: str, scheme: Scheme) -> Joined:
    tensors = _Tensors(source, module)
    shape, scale_shape, dtype = tensors.shape("weight"), tensors.shape(scale_leaf), tensors.read("weight").dtype
    if len(shape) != 2:
        raise not_supported(f"8-bit weights of shape {list(shape)} ({module})")
    zero_point = tensors.read_if_any("weight_zero_point")
    is_affine = dtype == torch.int8 and (
        not scheme.quantizes_activations
        or (len(scale_shape) == 2 and scale_shape[1] > 1)
        or (zero_point is not None and bool(zero_point.any()))
    )
    if is_affine:
        tensors.check_groups(shape[1], scale_shape[1] if len(scale_shape) > 1 else 1, scheme.group_size)

    def read() -> Value:
        weight, scale = tensors.read("weight"), tensors.read(scale_leaf)
        if is_affine:
            return formats.read_signed(weight, scale, zero_point, scheme.group_size)
        try:
            return read_scaled(weight, scale, scheme.block)
        except CheckpointError as error:
            raise tensors.wrong(str(error)) from error

    form = "int8" if dtype == torch.int8 else "fp8"
    kind = "affine8" if is_affine else str(dtype).removeprefix("torch.")
    return Joined(form, _SCALED, TensorInfo(shape, kind), read)
