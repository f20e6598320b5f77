"""What a model is, in one vocabulary, and the only reader of Hugging Face configs. It knows no tensor and no device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdeploy.errors import CheckpointError, ConfigError
from lmdeploy.local_file import read_json
from lmdeploy.models.rope_config import RopeConfig, positive_number, read_rope

if TYPE_CHECKING:
    from lmdeploy.models.config_dialect import ConfigDialect
    from lmdeploy.models.moe_config import MLAConfig, MoEConfig

__all__ = ["ModelConfig", "RopeConfig", "load_config"]

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
}
LENGTH_KEYS = ("max_position_embeddings", "max_sequence_length", "model_max_length", "seq_length", "max_seq_len")
EPS_KEYS = ("rms_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "layer_norm_eps", "norm_epsilon")


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only language model in numbers. None means that the model has no such thing.

    layer_windows: one entry per layer, the keys a query sees (itself included). local_rope: of the layers with a window, where
    it differs. attention_scale: of q k^T if not head_dim ** -0.5. logn_length: queries beyond it grow by log_length(position).
    variant: the form of its family, where a family has several. alibi: "scaled" if the bias is added to the scaled scores,
    "unscaled" if before the scaling and rounded to bfloat16. clip_qkv: bound of the projected q, k, v. normalize_head: the
    rows of the output head are to be made unit vectors.
    """

    architecture: str
    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    activation: str
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    dtype: str | None = None
    rope: RopeConfig | None = None
    local_rope: RopeConfig | None = None
    layer_windows: tuple[int | None, ...] = ()
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_offset: float = 0.0
    embed_scale: float | None = None
    attention_scale: float | None = None
    attn_softcap: float | None = None
    logit_softcap: float | None = None
    logn_length: int | None = None
    alibi: str | None = None
    attention_sinks: bool = False
    clip_qkv: float | None = None
    normalize_head: bool = False
    variant: str = ""
    moe: MoEConfig | None = None
    mla: MLAConfig | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    quantization: Mapping[str, Any] | None = None

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], dialect: type[ConfigDialect] | None = None) -> ModelConfig:
        """Read the content of a config.json of either generation of Hugging Face configs.

        dialect: the family's model class; looked up by architecture if None. Raises ModelNotSupported for an unknown
        architecture and ConfigError, naming the key and the value, for a value that no code here handles.
        """
        architecture = find_architecture(hf)
        if dialect is None:
            from lmdeploy.models import model_class

            dialect = model_class(architecture)
        hf = usual_names(hf, dialect)
        fields = read_fields(hf)
        try:
            fields.update(architecture=architecture, **dialect.config_fields(hf))
        except KeyError as error:
            raise ConfigError(f"the config of {architecture} has no key {error}") from error
        if fields["num_heads"] % fields["num_kv_heads"]:
            raise ConfigError(
                f"num_attention_heads {fields['num_heads']} is no multiple of num_key_value_heads {fields['num_kv_heads']}"
            )
        return cls(**fields)

    @property
    def session_len(self) -> int:
        """Tokens of a session unless the user says otherwise: what the model was made for, YaRN's stretch included."""
        if self.rope is not None and self.rope.kind == "yarn":
            return max(self.max_position_embeddings, int(self.rope.factor * self.rope.trained_length))
        return self.max_position_embeddings

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        """(planes, heads, dim) of one layer's cache entry of a token: (2, Hkv, D), or (1, 1, latent + rope) for MLA."""
        if self.mla is not None:
            return 1, 1, self.mla.kv_lora_rank + self.mla.rope_dim
        return 2, self.num_kv_heads, self.head_dim

    def with_long_context(self, rope_scaling_factor: float = 0.0, use_logn_attn: bool = False) -> ModelConfig:
        """The config under the engine's own long-context settings; 0 and False leave the model as it is.

        rope_scaling_factor > 0 turns dynamic NTK scaling on; 1 keeps the factor of a model that already scales that way.
        """
        if rope_scaling_factor <= 0 and not use_logn_attn:
            return self
        from lmdeploy.models.long_context import stretch

        return stretch(self, rope_scaling_factor, use_logn_attn)


def load_config(path: str | Path, hf_overrides: Mapping[str, Any] | None = None) -> ModelConfig:
    """The config of a checkpoint folder or a GGUF file; hf_overrides is laid over config.json, key by key where nested.

    In a workspace the edits of its config.ini lie between the two.
    """
    path = Path(path)
    config = ModelConfig.from_hf(merge(read_hf_config(path), hf_overrides or {}))
    if not (path / "config.ini").exists():
        return config
    from lmdeploy.models.workspace_config import edited

    return edited(config, path)


def read_hf_config(path: Path) -> dict[str, Any]:
    """config.json of a folder, with the end tokens of generation_config.json, or a GGUF file's metadata in the same words."""
    if path.is_file():
        from lmdeploy.models.gguf_config import gguf_to_hf

        return gguf_to_hf(path)
    hf = read_json(path / "config.json")
    if not hf:
        raise CheckpointError(f"{path} has no config.json; give a model folder in Hugging Face layout or a .gguf file")
    generation = read_json(path / "generation_config.json")
    eos = dict.fromkeys((*token_ids(hf.get("eos_token_id")), *token_ids(generation.get("eos_token_id"))))
    return {**hf, "eos_token_id": list(eos)}


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """base with changes laid over it; mappings on both sides are merged key by key."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def find_architecture(hf: Mapping[str, Any]) -> str:
    """The architecture's name, from `architectures`, or from `model_type` where that is missing."""
    if hf.get("architectures"):
        return str(hf["architectures"][0])
    from lmdeploy.models.model_types import architecture_of

    return architecture_of(hf.get("model_type"))


def usual_names(hf: Mapping[str, Any], dialect: type[ConfigDialect]) -> dict[str, Any]:
    """hf with the family's own keys under their usual names, and the family's defaults for absent ones."""
    usual = dict(hf)
    for own, name in dialect.config_keys.items():
        value: Any = hf
        for key in own.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None and name not in hf:
            usual[name] = value
    return {**dialect.config_defaults, **usual}


def read_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The ModelConfig fields that follow from the usual keys."""
    heads = _integer(hf, "num_attention_heads")
    hidden_size = _integer(hf, "hidden_size")
    num_layers = _integer(hf, "num_hidden_layers")
    head_dim = _integer(hf, "head_dim", hidden_size // heads)
    windows = read_windows(hf, num_layers)
    scalar = hf.get("query_pre_attn_scalar")
    return {
        "model_type": str(hf.get("model_type", "")),
        "vocab_size": _integer(hf, "vocab_size"),
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_heads": heads,
        "num_kv_heads": _integer(hf, "num_key_value_heads", heads),
        "head_dim": head_dim,
        "intermediate_size": _integer(hf, "intermediate_size", 4 * hidden_size),
        "norm_eps": _first(hf, EPS_KEYS, 1e-6),
        "activation": read_activation(hf),
        "max_position_embeddings": int(_first(hf, LENGTH_KEYS, 2048)),
        "tie_word_embeddings": bool(hf.get("tie_word_embeddings", False)),
        "dtype": _dtype(hf),
        "rope": read_rope(hf, head_dim),
        "local_rope": read_local_rope(hf, head_dim, windows),
        "layer_windows": windows,
        "qkv_bias": bool(hf.get("attention_bias", False)),
        "o_bias": bool(hf.get("attention_bias", False)),
        "mlp_bias": bool(hf.get("mlp_bias", False)),
        "attention_scale": None if scalar is None else scalar**-0.5,
        "attn_softcap": hf.get("attn_logit_softcapping"),
        "logit_softcap": hf.get("final_logit_softcapping"),
        "bos_token_id": next(iter(token_ids(hf.get("bos_token_id"))), None),
        "eos_token_ids": token_ids(hf.get("eos_token_id")),
        "quantization": hf.get("quantization_config") or hf.get("compression_config"),
    }


def require(hf: Mapping[str, Any], **values: Any) -> None:
    """Stop with ConfigError unless each of these keys is absent, null or has the only value that is supported."""
    for key, value in values.items():
        if hf.get(key) is not None and hf[key] != value:
            raise ConfigError(f"config key {key!r} is {hf[key]!r}; only {value!r} is supported")


def read_activation(hf: Mapping[str, Any]) -> str:
    """silu, gelu or gelu_tanh."""
    name = hf.get("hidden_activation") or hf.get("hidden_act") or hf.get("activation") or "silu"
    if name not in ACTIVATIONS:
        raise ConfigError(f"hidden_act {name!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def read_windows(hf: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """The sliding window of each layer; None where a query sees all keys before it."""
    if hf.get("sliding_window") is None or not hf.get("use_sliding_window", True):
        return (None,) * num_layers
    from lmdeploy.models.layer_windows import windows_by_layer

    return windows_by_layer(hf, num_layers)


def read_local_rope(hf: Mapping[str, Any], head_dim: int, windows: tuple[int | None, ...]) -> RopeConfig | None:
    """The rope config of the layers with a window, if the config names one of their own."""
    if not any(windows):
        return None
    from lmdeploy.models.layer_windows import local_rope

    return local_rope(hf, head_dim)


def token_ids(value: Any) -> tuple[int, ...]:
    """A token id, a list of them, or null, as a tuple."""
    if value is None:
        return ()
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not all(isinstance(one, int) for one in values):
        raise ConfigError(f"a token id such as eos_token_id must be an integer or a list of them, not {value!r}")
    return values


def _integer(hf: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = hf.get(key) if default is None else hf.get(key) or default
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ConfigError(f"config key {key!r} must be a positive integer, not {value!r}")
    return value


def _first(hf: Mapping[str, Any], keys: tuple[str, ...], default: float) -> float:
    key = next((key for key in keys if hf.get(key) is not None), None)
    return default if key is None else positive_number(hf, key)


def _dtype(hf: Mapping[str, Any]) -> str | None:
    name = hf.get("dtype") or hf.get("torch_dtype")
    return None if name is None else str(name).removeprefix("torch.")
