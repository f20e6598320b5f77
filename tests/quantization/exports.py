"""Writes tiny dense checkpoints as AWQ, GPTQ, compressed-tensors, FP8 and W8A8 ones, from the formats' descriptions.

It knows nothing of the package under test: weights are rounded and packed number by number in NumPy, and beside each
quantized folder stands a dense one with the values that the quantized one means.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from tests.goldens.materialize import materialize
from tests.models.golden_data import ROOT

Array = NDArray[Any]
Tensors = dict[str, torch.Tensor]
# Linears that no quantizer touches: head, embedding, routers, gates of shared experts.
LEFT_DENSE = re.compile(r"embed|lm_head|output\.weight|output_layer|mlp\.gate\.|shared_expert_gate|norm|word_emb")
AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Rounded:
    """A weight [N, K] rounded to (q - zero) * scale; q, dense: [N, K]; scale, zero: [N, G]; group: of each channel, [K]."""

    q: Array
    scale: Array
    zero: Array
    group: Array

    @property
    def dense(self) -> Array:
        """The values."""
        scale, zero = self.scale.astype(np.float32)[:, self.group], self.zero.astype(np.float32)[:, self.group]
        return (self.q.astype(np.float32) - zero) * scale


def round_weight(weight: Array, bits: int, group: Array, symmetric: bool = False) -> Rounded:
    """Round to nearest, group by group. group: of each channel, [K]. Scales are float16; zeros 1 or more."""
    top, count = (1 << bits) - 1, int(group.max()) + 1
    scale, zero = np.zeros((len(weight), count), np.float16), np.zeros((len(weight), count), np.int64)
    q = np.zeros(weight.shape, np.int64)
    for index in range(count):
        part = weight[:, group == index]
        low, high = np.minimum(part.min(axis=1), 0), np.maximum(part.max(axis=1), 0)
        width = 2 * np.maximum(-low, high) if symmetric else high - low
        scale[:, index] = np.maximum(width / top, 1e-4)
        wide = scale[:, index].astype(np.float32)
        zero[:, index] = (top + 1) // 2 if symmetric else np.clip(np.round(-low / wide), 1, top)
        q[:, group == index] = np.clip(np.round(part / wide[:, None]) + zero[:, index, None], 0, top)
    return Rounded(q, scale, zero, group)


def words(numbers: Array, bits: int, places: tuple[int, ...] | None = None) -> torch.Tensor:
    """Numbers [R, M] in int32 words [R, M * bits / 32]: the number in bits i * bits and up of a word is its places[i]-th."""
    per_word = 32 // bits
    packed = np.zeros((len(numbers), -(-numbers.shape[1] // per_word)), np.uint32)
    for row, line in enumerate(numbers):
        for column, number in enumerate(line):
            word, inside = divmod(column, per_word)
            place = inside if places is None else places.index(inside)
            packed[row, word] |= np.uint32(int(number) << (bits * place))
    return torch.from_numpy(packed.view(np.int32))


def awq(module: str, rounded: Rounded, bits: int) -> Tensors:
    return {
        f"{module}.qweight": words(rounded.q.T, 4, AWQ_PLACES),
        f"{module}.qzeros": words(rounded.zero.T, 4, AWQ_PLACES),
        f"{module}.scales": torch.from_numpy(rounded.scale.T.copy()),
    }


def gptq(module: str, rounded: Rounded, bits: int) -> Tensors:
    tensors = gptq_v2(module, rounded, bits)
    return {**tensors, f"{module}.qzeros": words(rounded.zero.T - 1, bits)}


def gptq_v2(module: str, rounded: Rounded, bits: int) -> Tensors:
    return {
        f"{module}.qweight": words(rounded.q, bits).T.contiguous(),
        f"{module}.qzeros": words(rounded.zero.T, bits),
        f"{module}.scales": torch.from_numpy(rounded.scale.T.copy()),
        f"{module}.g_idx": torch.from_numpy(rounded.group.astype(np.int32)),
        f"{module}.bias": torch.zeros(len(rounded.q), dtype=torch.float16),
    }


def compressed(module: str, rounded: Rounded, bits: int) -> Tensors:
    tensors = {
        f"{module}.weight_packed": words(rounded.q, bits),
        f"{module}.weight_scale": torch.from_numpy(rounded.scale),
        f"{module}.weight_shape": torch.tensor(rounded.q.shape),
    }
    if (rounded.zero != 1 << (bits - 1)).any():
        tensors[f"{module}.weight_zero_point"] = words(rounded.zero.T, bits).T.contiguous()
    return tensors


def float8(
    weight: torch.Tensor, dtype: torch.dtype, block: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, Array]:
    """float8 weight, scales per block [N / b, K / c] and the values; a block of (0, 0) is the whole weight."""
    rows, columns = (size or whole for size, whole in zip(block, weight.shape, strict=True))
    scales = torch.zeros(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    q, values = torch.empty(weight.shape, dtype=dtype), torch.empty(weight.shape)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            scales[i, j] = weight[part].abs().max() / torch.finfo(dtype).max
            q[part] = (weight[part] / scales[i, j]).to(dtype)
            values[part] = q[part].float() * scales[i, j]
    return q, scales, values.numpy()


def int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Array]:
    """int8 weight, float32 scales [N, 1] and the values."""
    scales = weight.abs().amax(dim=1, keepdim=True) / 127
    q = torch.round(weight / scales).to(torch.int8)
    return q, scales, (q.float() * scales).numpy()


def is_quantized(name: str, tensor: torch.Tensor) -> bool:
    """Whether a quantizer would take the tensor: the matrices of the decoder layers."""
    return tensor.dim() == 2 and name.endswith(".weight") and not LEFT_DENSE.search(name)


def export(
    golden: str,
    folder: Path,
    quantization: dict[str, Any] | None,
    write: Callable[[str, torch.Tensor], tuple[Tensors, Array]],
) -> tuple[Path, Path]:
    """A quantized folder and the dense one that it means, from a golden checkpoint.

    write: (module, weight float32 [N, K]) -> its tensors and its values. quantization: for config.json; None for none.
    """
    source, dense = materialize(ROOT / golden, folder / "source"), folder / "dense"
    tensors = {n: t.float() for file in sorted(source.glob("*.safetensors")) for n, t in load_file(file).items()}
    quantized: Tensors = {}
    values = dict(tensors)
    for name, tensor in tensors.items():
        if not is_quantized(name, tensor):
            quantized[name] = tensor
            continue
        written, meant = write(name.removesuffix(".weight"), tensor)
        # A bias that the model has goes before the zeros that some writers add.
        quantized |= {n: t for n, t in written.items() if n not in tensors or n == name}
        values[name] = torch.from_numpy(np.ascontiguousarray(meant, np.float32))
    for target, content in ((folder / "quantized", quantized), (dense, values)):
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*", "*.bin*"))
        save_file({n: t.contiguous() for n, t in content.items()}, target / "model.safetensors")
    if quantization is not None:
        config = folder / "quantized" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": quantization}))
    return folder / "quantized", dense


def integers(
    layout: Callable[[str, Rounded, int], Tensors],
    bits: int = 4,
    group_size: int = 16,
    symmetric: bool = False,
    act_order_seed: int | None = None,
) -> Callable[[str, torch.Tensor], tuple[Tensors, Array]]:
    """What `export` writes for a layout. act_order_seed: groups of channels in random order, drawn anew for each linear."""

    def write(module: str, weight: torch.Tensor) -> tuple[Tensors, Array]:
        group = np.arange(weight.shape[1]) // (group_size if group_size > 0 else weight.shape[1])
        if act_order_seed is not None:
            # Linears that read the same input share its order, as they share their statistics.
            owner = re.sub(r"(q|k|v|gate|up)_proj$", "", module)
            seed = [act_order_seed, *owner.encode()]
            group = np.random.default_rng(seed).permutation(group)
        rounded = round_weight(weight.numpy(), bits, group, symmetric)
        return layout(module, rounded, bits), rounded.dense

    return write
