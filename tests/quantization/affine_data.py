"""Random affine tensors, and random GGUF blocks whose scales are finite."""

from __future__ import annotations

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from lmdeploy.quantization.packing import AffineTensor

# Byte offsets of the float16 fields in a block of each type that has an affine form.
HALF_FIELDS = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}


def random_blocks(name: str, rows: int, columns: int, seed: int = 0) -> NDArray[np.uint8]:
    """Bytes [rows, bytes per row] of a weight [rows, columns]: every bit pattern, float16 fields of all finite values."""
    generator = np.random.default_rng(seed)
    channels, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    blocks = generator.integers(0, 256, (rows * columns // channels, size), dtype=np.uint8)
    for offset in HALF_FIELDS.get(name, ()):
        bits = generator.integers(0, 0x7C00, len(blocks), dtype=np.uint16)  # below the exponent of inf and nan
        bits |= generator.integers(0, 2, len(blocks), dtype=np.uint16) << 15
        blocks[:, offset : offset + 2] = bits.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


def random_affine(rows: int, columns: int, group_size: int, bits: int, seed: int = 0) -> AffineTensor:
    """A weight of about unit variance times columns ** -0.5."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    shape = (rows, columns // group_size)
    scales = (0.5 + torch.rand(shape, generator=generator)) * columns**-0.5 / (1 << (bits - 2))
    mins = -scales * (1 << (bits - 1)) + 0.1 * columns**-0.5 * torch.randn(shape, generator=generator)
    return AffineTensor(q, scales.half().float(), mins.half().float(), bits)
