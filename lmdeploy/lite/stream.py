"""Runs a model one decoder layer at a time over whole windows of tokens. It owns loading by layer, and quantizes nothing.

Beside the embedding and the head, which are read when they are needed, one layer is in memory; the hidden states of all
windows are carried from layer to layer by the caller.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lmdeploy.kernels.reference.w8a8 import quantize_tokens
from lmdeploy.layers.context import ForwardContext, KVCache
from lmdeploy.layers.linear import Linear
from lmdeploy.layers.norm import Norm
from lmdeploy.local_file import refuse_pointer
from lmdeploy.models.base import CausalLM
from lmdeploy.models.checkpoint import open_checkpoint
from lmdeploy.models.config import ModelConfig, load_config
from lmdeploy.models.filling import Slot, find_slots, make_plan, place
from lmdeploy.models.loader import build_model
from lmdeploy.models.weight_files import TensorInfo, TensorSource
from lmdeploy.models.weights import Piece, Value, WeightMap
from lmdeploy.quantization.unquantized import UnquantizedMethod

DTYPE = torch.float32


class RenamedSource:
    """A GGUF file's tensors under the names, and with the values, of the family's Hugging Face checkpoints."""

    def __init__(self, source: TensorSource, rules: WeightMap, config: ModelConfig) -> None:
        self._source = source
        self._pieces: dict[str, tuple[str, Piece]] = {}
        self.infos: dict[str, TensorInfo] = {}
        for name, info in source.infos.items():
            for piece in rules.pieces(name, config):
                self._pieces[piece.name] = name, piece
                self.infos[piece.name] = TensorInfo(info.shape, "dense" if piece.is_dense else info.kind)

    def read(self, name: str) -> Value:
        source, piece = self._pieces[name]
        return piece.value(self._source.read(source))


class OneLayerCache(KVCache):
    """A cache of one layer that every layer uses in turn, [NB, 1, planes, Hkv, S, D]."""

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        return super().layer(0)


class RoundedInputs(UnquantizedMethod):
    """The product of int8 weights with activations that are rounded to int8 per token, in float32."""

    name = "rounded_inputs"

    def apply(self, linear: Linear, x: Tensor, *, norm: Norm | None = None, residual: Tensor | None = None) -> Tensor:
        integers, scales = quantize_tokens(x if norm is None else norm(x))
        return super().apply(linear, integers.float() * scales, residual=residual)


class LayerStream:
    """A model whose layers are loaded when they run, dense and in float32.

    source: the checkpoint under Hugging Face names. model: the whole tree, on the meta device but for what has been loaded.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        """Reads headers only. Raises CheckpointError, ConfigError or ModelNotSupported."""
        if path.is_file():
            refuse_pointer(path)
        self.path = path
        self.device = device
        self.config = load_config(path)
        self.model: CausalLM = build_model(self.config)
        self.source = named_source(path, self.config)
        self._slots: dict[str, Slot] = find_slots(self.model)
        self.plan = make_plan(self.model, self.source, self.model.weight_map, self._slots)

    @property
    def num_layers(self) -> int:
        return self.config.num_layers

    def load_layer(self, index: int) -> nn.Module:
        """Decoder layer `index` with its weights; the caller drops it with drop_layer."""
        self._fill(f"layers.{index}.")
        return self.model.layers[index]

    def fill_layer(self, layer: nn.Module, index: int, source: TensorSource) -> None:
        """Give a loaded layer other values, from a source with the same names."""
        prefix = f"layers.{index}."
        slots = {prefix + name: slot for name, slot in find_slots(layer).items()}
        for name in source.infos:
            value = source.read(name)
            for piece in self.plan[name]:
                place(piece.value(value), name, piece, slots[piece.name], self.device, DTYPE)

    def num_parameters(self) -> int:
        """Numbers in all tensors of the checkpoint that the model uses."""
        return sum(math.prod(self.source.infos[name].shape) for name in self.plan)

    def drop_layer(self, index: int) -> None:
        """Free the layer's weights."""
        self.model.layers[index] = nn.Identity()

    def embed(self, windows: Tensor) -> Tensor:
        """Token ids [W, S] as they enter the first layer, [W, S, C], on the CPU."""
        self._fill("embed_tokens.")
        embedded = torch.stack([self.model.embed(window.to(self.device)).cpu() for window in windows])
        if not self.config.tie_word_embeddings:
            del self.model.embed_tokens.weight
        return embedded

    def load_head(self) -> Callable[[Tensor], Tensor]:
        """The final norm and the output head as one function, [T, C] -> logits [T, V] float32."""
        self._fill("norm.")
        if self.model.lm_head is not None:
            self._fill("lm_head.")
        elif not hasattr(self.model.embed_tokens, "weight"):
            self._fill("embed_tokens.")
        return lambda hidden: self.model.compute_logits(self.model.norm(hidden.to(self.device)))

    def run_layer(self, layer: nn.Module, hidden: Tensor, context: ForwardContext) -> Tensor:
        """One layer over some windows: [W, S, C] -> [W, S, C], both on the CPU."""
        flat = hidden.flatten(0, 1).to(self.device, copy=True)
        return layer(flat, context).view(hidden.shape).to(hidden.device)

    def context(self, num_windows: int, length: int) -> ForwardContext:
        """The step in which `num_windows` requests of `length` tokens are computed at once, each in a block of its own."""
        planes, heads, dim = self.config.kv_shape
        cache = torch.zeros(num_windows, 1, planes, heads, length, dim, dtype=DTYPE, device=self.device)
        lengths = torch.full((num_windows,), length, dtype=torch.int32, device=self.device)
        starts = torch.arange(num_windows + 1, dtype=torch.int32, device=self.device) * length
        return ForwardContext(
            positions=torch.arange(length, device=self.device).repeat(num_windows),
            cu_seqlens_q=starts,
            context_lens=lengths,
            block_tables=torch.arange(num_windows, dtype=torch.int32, device=self.device)[:, None],
            slot_mapping=torch.arange(num_windows * length, device=self.device),
            prompt_lens=lengths,
            kv_cache=OneLayerCache(cache),
            query_lens=[length] * num_windows,
            context_lens_host=[length] * num_windows,
        )

    def _fill(self, prefix: str) -> None:
        for name, pieces in self.plan.items():
            wanted = [piece for piece in pieces if piece.name.startswith(prefix)]
            if not wanted:
                continue
            value = self.source.read(name)
            for piece in wanted:
                slot = self._slots[piece.name]
                if isinstance(slot.module, Linear) and not hasattr(slot.module, "method"):
                    slot.module.method = RoundedInputs() if slot.kinds == {"int8"} else UnquantizedMethod()
                if slot.num_filled == len(slot.parts):  # read before, and dropped since
                    slot.num_filled = 0
                place(piece.value(value), name, piece, slot, self.device, DTYPE)


def named_source(path: Path, config: ModelConfig) -> TensorSource:
    """The tensors of a checkpoint under their Hugging Face names."""
    source = open_checkpoint(path, config.quantization)
    if not path.is_file():
        return source
    from lmdeploy.models.gguf_weights import gguf_rules

    return RenamedSource(source, WeightMap(*gguf_rules(config.model_type)), config)


def linears_of(layer: nn.Module) -> dict[str, Linear]:
    """The linears of a layer by path, in the order of the tree."""
    return {path: module for path, module in layer.named_modules() if isinstance(module, Linear)}


def layer_of(name: str) -> int | None:
    """The layer that a parameter such as layers.3.mlp.down_proj.weight belongs to."""
    match = re.match(r"layers\.(\d+)\.", name)
    return int(match[1]) if match else None
