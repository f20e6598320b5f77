"""Quantized weights as the tensors of AWQ, GPTQ, compressed-tensors and SmoothQuant checkpoints. It opens no file.

Layouts as in integer_formats.py. Scales are rounded to the dtype of the file: to lose nothing, round them before quantizing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lmdeploy.errors import ConfigError
from lmdeploy.quantization.packing import AffineTensor
from lmdeploy.quantization.scaled import ScaledTensor
from lmdeploy.quantization.words import AWQ_ORDER, pack_words


def awq_tensors(name: str, weight: AffineTensor, scale_dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """The tensors of linear `name` in AWQ's gemm layout. Raises ConfigError for other than 4 bits or N no multiple of 8."""
    if weight.bits != 4 or weight.columns is not None:
        raise ConfigError(f"{name} cannot be stored as AWQ, which has 4 bits and no order of columns; store it as GPTQ")
    _check_multiple(name, "AWQ", "output", weight.shape[0], 8)
    return {
        f"{name}.qweight": pack_words(weight.q.T.contiguous(), 4, AWQ_ORDER),
        f"{name}.qzeros": pack_words(weight.integer_zeros().T.contiguous(), 4, AWQ_ORDER),
        f"{name}.scales": _rounded(name, weight.scales.T, scale_dtype),
    }


def gptq_tensors(name: str, weight: AffineTensor, scale_dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """The tensors of linear `name` in the first version of GPTQ's layout, 4 or 8 bits.

    Zeros are stored minus one, word by word; most readers take a zero of 0 for 2 ** bits, so keep zeros at 1 or more.
    """
    bits, (rows, columns) = weight.bits, weight.shape
    _check_multiple(name, "GPTQ", "output", rows, 32 // bits)
    _check_multiple(name, "GPTQ", "input", columns, 32 // bits)
    groups, q = torch.arange(columns) // weight.group_size, weight.q
    if weight.columns is not None:
        place = weight.columns.argsort()
        groups, q = groups[place], q[:, place]
    zeros = pack_words(weight.integer_zeros().T.contiguous(), bits)
    return {
        f"{name}.qweight": pack_words(q, bits).T.contiguous(),
        f"{name}.qzeros": zeros - sum(1 << place for place in range(0, 32, bits)),
        f"{name}.scales": _rounded(name, weight.scales.T, scale_dtype),
        f"{name}.g_idx": groups.int(),
    }


def compressed_tensors(name: str, weight: AffineTensor, scale_dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """The tensors of linear `name` in the pack-quantized format; without zero points where all are the symmetric one."""
    if weight.columns is not None:
        raise ConfigError(
            f"{name} has an order of columns, which is not written as compressed-tensors; store it as GPTQ"
        )
    bits, (rows, columns), zeros = weight.bits, weight.shape, weight.integer_zeros()
    tensors = {
        f"{name}.weight_packed": pack_words(_padded(weight.q, 32 // bits), bits),
        f"{name}.weight_scale": _rounded(name, weight.scales, scale_dtype),
        f"{name}.weight_shape": torch.tensor([rows, columns]),
    }
    if not bool((zeros == 1 << (bits - 1)).all()):
        packed = pack_words(_padded(zeros.T.contiguous(), 32 // bits), bits)
        tensors[f"{name}.weight_zero_point"] = packed.T.contiguous()
    return tensors


def smooth_quant_tensors(name: str, weight: ScaledTensor) -> dict[str, Tensor]:
    """int8 or float8 weight [N, K] and its scales [N, 1] float32, under the names of LMDeploy's smooth_quant."""
    if weight.scales.shape[1] != 1:
        raise ConfigError(f"{name} has scales per group; smooth_quant stores one per output channel")
    return {f"{name}.weight": weight.q.contiguous(), f"{name}.scale": weight.scales.float().contiguous()}


def awq_config(group_size: int, has_zeros: bool = True, skipped: Sequence[str] = ()) -> dict[str, Any]:
    """`quantization_config` of an AWQ folder. group_size: -1 for one group. skipped: modules left dense."""
    config = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": group_size, "zero_point": has_zeros}
    return {**config, "modules_to_not_convert": list(skipped) or None}


def gptq_config(bits: int, group_size: int, is_symmetric: bool, is_act_order: bool = False) -> dict[str, Any]:
    """`quantization_config` of a GPTQ folder."""
    config = {"quant_method": "gptq", "checkpoint_format": "gptq", "bits": bits, "group_size": group_size}
    return {**config, "sym": is_symmetric, "desc_act": is_act_order, "true_sequential": True, "lm_head": False}


def compressed_tensors_config(bits: int, group_size: int, is_symmetric: bool, skipped: Sequence[str]) -> dict[str, Any]:
    """`quantization_config` of a folder in the pack-quantized format, activations in 16 bits."""
    strategy = {"strategy": "channel"} if group_size < 0 else {"strategy": "group", "group_size": group_size}
    weights = {"num_bits": bits, "type": "int", "symmetric": is_symmetric, "dynamic": False, **strategy}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": list(skipped),
    }


def smooth_quant_config(quant_dtype: str) -> dict[str, Any]:
    """`quantization_config` of LMDeploy's smooth_quant. quant_dtype: int8, float8_e4m3fn or float8_e5m2."""
    return {"quant_method": "smooth_quant", "quant_dtype": quant_dtype}


def _check_multiple(name: str, form: str, side: str, count: int, multiple: int) -> None:
    if count % multiple:
        raise ConfigError(
            f"{name} has {count} {side} channels, and {form} packs {multiple} at a time: leave this linear in 16 bits"
        )


def _rounded(name: str, scales: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = scales.to(dtype).contiguous()
    if not bool(rounded.isfinite().all()):
        raise ConfigError(f"a scale of {name} is beyond the range of {dtype}: use bfloat16 or float32 scales")
    return rounded


def _padded(values: Tensor, multiple: int) -> Tensor:
    """uint8 [..., M] with zeros up to a multiple."""
    return torch.nn.functional.pad(values, (0, -values.shape[-1] % multiple))
