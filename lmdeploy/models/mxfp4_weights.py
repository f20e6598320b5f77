"""Pairs of MXFP4 tensors, codes and exponents, as one dense logical tensor. It knows no file.

Format: OCP Microscaling, https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmdeploy.models.weight_files import TensorInfo, TensorSource
from lmdeploy.models.weights import Value, dense

_BLOCKS, _SCALES = "_blocks", "_scales"
_CODES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_POWERS = (*(2.0 ** (exponent - 127) for exponent in range(255)), float("nan"))


def join_mxfp4(source: TensorSource) -> TensorSource:
    """The source with each X_blocks [E, N, K / 32, 16] and X_scales [E, N, K / 32] as X [E, K, N], its unquantized form."""
    names = [name.removesuffix(_BLOCKS) for name in source.infos if name.endswith(_BLOCKS)]
    pairs = {name for name in names if name + _SCALES in source.infos}
    return _JoinedSource(source, pairs) if pairs else source


class _JoinedSource:
    def __init__(self, source: TensorSource, pairs: set[str]) -> None:
        self._source = source
        self._pairs = pairs
        self.infos: dict[str, TensorInfo] = {}
        for name, info in source.infos.items():
            if name.removesuffix(_BLOCKS) in pairs:
                *experts, rows, groups, half = info.shape
                self.infos[name.removesuffix(_BLOCKS)] = TensorInfo((*experts, groups * half * 2, rows))
            elif name.removesuffix(_SCALES) not in pairs:
                self.infos[name] = info

    def read(self, name: str) -> Value:
        if name not in self._pairs:
            return self._source.read(name)
        blocks, scales = (dense(self._source.read(name + suffix)) for suffix in (_BLOCKS, _SCALES))
        return dequantize_mxfp4(blocks, scales).transpose(-1, -2)


def dequantize_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """[..., N, K / 32, 16] codes, even channels in the low nibbles, times 2 ** (scales - 127): bfloat16 [..., N, K], exact."""
    codes, powers = (torch.tensor(table, dtype=torch.bfloat16) for table in (_CODES, _POWERS))
    out = torch.empty(*blocks.shape[:-2], blocks.shape[-2] * 32, dtype=torch.bfloat16)
    for rows, exponents, target in zip(blocks.flatten(0, -4), scales.flatten(0, -3), out.flatten(0, -3), strict=True):
        values = codes[torch.stack((rows & 15, rows >> 4), dim=-1).int()].flatten(-2)
        target[:] = (values * powers[exponents.int()][..., None]).flatten(-2)
    return out
