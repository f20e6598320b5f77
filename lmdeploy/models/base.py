"""The shape that every decoder-only model shares: embedding, layers, norm, head. Families fill in the layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lmdeploy.layers.attention import SelfAttention
from lmdeploy.layers.context import ForwardContext
from lmdeploy.layers.linear import Embedding, Linear
from lmdeploy.layers.mlp import GatedMLP
from lmdeploy.layers.norm import Norm, RMSNorm
from lmdeploy.layers.rotary import make_rotary
from lmdeploy.models.config import ModelConfig
from lmdeploy.models.weights import WeightMap

ScaleTable = tuple[tuple[str, tuple[str, ...]], ...]
"""For the search of quantization scales: what writes an input (a norm, or a linear by its last part), and all that read it.

Paths in a decoder layer; those that a layer lacks are ignored.
"""
FEED_FORWARD_INPUTS = ("mlp.gate_up_proj", "mlp.router", "mlp.shared_expert.gate_up_proj", "mlp.shared_gate")
FEED_FORWARD_INNER: ScaleTable = (
    ("mlp.gate_up_proj", ("mlp.down_proj",)),
    ("mlp.shared_expert.gate_up_proj", ("mlp.shared_expert.down_proj",)),
)


class CausalLM(nn.Module):
    """A decoder-only language model over T concatenated tokens of several requests.

    A family sets `weight_map` (its checkpoint's names) and overrides the `make_*` hooks it needs.
    """

    weight_map: ClassVar[WeightMap]
    config_keys: ClassVar[Mapping[str, str]] = {}
    config_defaults: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def config_fields(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        """ModelConfig fields that the family derives itself from its config."""
        return {}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.rotary = make_rotary(config.rope) if config.rope is not None else None
        self.local_rotary = make_rotary(config.local_rope) if config.local_rope is not None else self.rotary
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(self.make_layer(index) for index in range(config.num_layers))
        self.norm = self.make_norm()
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)

    def make_layer(self, index: int) -> nn.Module:
        """Decoder layer `index`: forward(x [T, C], ctx) -> [T, C], the last one's of the wanted rows."""
        raise NotImplementedError

    def make_attention(self, index: int) -> nn.Module:
        """Attention of layer `index`; layers with a window may rotate differently."""
        rotary = self.rotary if self.config.layer_windows[index] is None else self.local_rotary
        return SelfAttention(self.config, index, rotary)

    def make_mlp(self, index: int) -> nn.Module:
        """Feed-forward block of layer `index`."""
        config = self.config
        return GatedMLP(config.hidden_size, config.intermediate_size, config.activation, bias=config.mlp_bias)

    def make_norm(self) -> Norm:
        """A norm over the hidden size, of the family's kind."""
        return RMSNorm(self.config.hidden_size, self.config.norm_eps, self.config.norm_offset)

    def forward(self, input_ids: Tensor, ctx: ForwardContext, input_embeds: Tensor | None = None) -> Tensor:
        """Hidden states after the final norm, [T, C] or of the wanted rows. input_embeds [T, C]: in place of input_ids'."""
        x = self.embed(input_ids) if input_embeds is None else input_embeds
        for layer in self.layers:
            x = layer(x, ctx)
        return self.norm(x)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token embeddings as they enter the first layer, [T, C]."""
        x = self.embed_tokens(input_ids)
        scale = self.config.embed_scale
        return x if scale is None else x * torch.tensor(scale, dtype=x.dtype, device="cpu").item()

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return next(p for p in self.norm.parameters()).dtype

    def num_bytes(self) -> int:
        """Bytes of all weights as stored."""
        total = 0
        for module in self.modules():
            if isinstance(module, Linear):
                total += module.method.num_bytes(module)
            else:
                total += sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))
        return total

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """[R, C] -> [R, V] float32."""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        logits = head.logits(hidden_states)
        cap = self.config.logit_softcap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)
