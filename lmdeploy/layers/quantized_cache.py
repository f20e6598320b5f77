"""The blocked cache in 8 or 4 bits: which formats a policy means, and where each layer's part lies. It computes nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lmdeploy.errors import ConfigError
from lmdeploy.kernels.reference.quantized_cache import PARAM_BYTES, CodeFormat, QuantizedBlocks
from lmdeploy.layers.context import KVCache
from lmdeploy.messages import QuantPolicy

_INT8 = CodeFormat(8)
_INT4 = CodeFormat(4, is_rotated=True)
_FP8 = CodeFormat(8, float_type=torch.float8_e4m3fn)
_FP8_E5M2 = CodeFormat(8, float_type=torch.float8_e5m2)
# Of keys and of values.
FORMATS: dict[QuantPolicy, tuple[CodeFormat, CodeFormat]] = {
    QuantPolicy.INT8: (_INT8, _INT8),
    QuantPolicy.INT4: (_INT4, _INT4),
    QuantPolicy.K8V4: (_INT8, _INT4),
    QuantPolicy.FP8: (_FP8, _FP8),
    QuantPolicy.FP8_E5M2: (_FP8_E5M2, _FP8_E5M2),
}

Allocate = Callable[[tuple[int, ...], torch.dtype], Tensor]


class QuantizedKVCache(KVCache):
    """A KVCache whose layers are `QuantizedBlocks`; a block is still one contiguous piece of each of its two tensors.

    data: [NB, L, bytes] uint8, all keys' codes of a layer [Hkv, S, bytes of a key], then all values' codes.
    params: [NB, L, 2, Hkv, S, 2] float16, scale and minimum of each vector.
    """

    def __init__(self, shape: tuple[int, ...], formats: tuple[CodeFormat, CodeFormat], zeros: Allocate) -> None:
        """shape: of the plain cache, [NB, L, 2, Hkv, S, D]. formats: of keys, of values. zeros: makes a zeroed tensor."""
        num_blocks, num_layers, _, heads, size, dim = shape
        vector_bytes = [f.code_bytes(dim) for f in formats]
        super().__init__(zeros((num_blocks, num_layers, heads * size * sum(vector_bytes)), torch.uint8))
        self.params = zeros((*shape[:5], 2), torch.float16)
        planes = self.data.split([heads * size * count for count in vector_bytes], dim=-1)
        codes = [p.unflatten(-1, (heads, size, count)) for p, count in zip(planes, vector_bytes, strict=True)]
        self._layers = [
            (
                QuantizedBlocks(codes[0][:, index], self.params[:, index, 0], formats[0]),
                QuantizedBlocks(codes[1][:, index], self.params[:, index, 1], formats[1]),
            )
            for index in range(num_layers)
        ]

    @property
    def block_size(self) -> int:
        return self.params.shape[4]

    def layer(self, index: int) -> tuple[QuantizedBlocks, QuantizedBlocks]:  # type: ignore[override]
        """Keys and values of one layer, for an attention that takes `QuantizedBlocks` as it takes tensors."""
        return self._layers[index]


def token_bytes(kv_shape: tuple[int, int, int], policy: QuantPolicy) -> int:
    """Bytes of one token in one layer, scales and minima included.

    kv_shape: (planes, heads, dim) of a plain cache. Raises ConfigError for a cache that cannot be quantized so.
    """
    planes, heads, dim = kv_shape
    name = f"quant_policy={int(policy)} ({policy.name.lower()})"
    if planes != 2:
        raise ConfigError(
            f"{name}: the KV cache of multi-head latent attention holds one compressed vector a token and is not "
            "quantized further; leave quant_policy at 0"
        )
    if dim % 2:
        raise ConfigError(f"{name}: heads of an odd size ({dim}) cannot be quantized; leave quant_policy at 0")
    return heads * sum(f.code_bytes(dim) + PARAM_BYTES for f in FORMATS[policy])
