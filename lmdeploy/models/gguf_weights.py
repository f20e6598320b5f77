"""A GGUF file's tensors, and the rules that give them the names a family's Hugging Face checkpoints use.

It knows no layer. Names and the row order of Llama's q and k: convert_hf_to_gguf.py of https://github.com/ggml-org/llama.cpp
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from lmdeploy.errors import CheckpointError
from lmdeploy.gguf_file import read_tensor_index
from lmdeploy.models.weight_files import TensorInfo
from lmdeploy.models.weight_rules import Rows, Transform, halves_from_pairs
from lmdeploy.models.weights import Rename, Rule, Skip, Value
from lmdeploy.quantization.gguf import read_tensor, tensor_kind

_NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_PHI3_NAMES = {"ffn_up": "mlp.gate_up_proj", "ffn_norm": "post_attention_layernorm"}
_GEMMA_NAMES = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


class GGUFFile:
    """One GGUF file, mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._index = {info.name: info for info in read_tensor_index(path)}
        self.infos = {name: TensorInfo(info.shape, tensor_kind(info.ggml_type)) for name, info in self._index.items()}
        self._data = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)

    def __str__(self) -> str:
        return str(self.path)

    def read(self, name: str) -> Value:
        info = self._index[name]
        data = self._data[info.offset_bytes : info.offset_bytes + info.size_bytes]
        return read_tensor(data, info.ggml_type, info.shape)


def split_files(path: Path) -> list[Path]:
    """The file itself, or all files NAME-00001-of-0000N.gguf of which it is one."""
    match = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", path.name)
    if match is None:
        return [path]
    files = [path.with_name(f"{match[1]}-{number:05}-of-{match[2]}.gguf") for number in range(1, int(match[2]) + 1)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{path} is split, and these parts are missing: {', '.join(missing)}; download them")
    return files


def gguf_rules(model_type: str) -> tuple[Rule, ...]:
    """The rules that go before a family's own where its weights come from a GGUF file."""
    names = {"ffn_norm": "post_attention_layernorm", **_NAMES}
    special: tuple[Rule, ...] = ()
    if model_type in ("llama", "internlm2"):
        special = (Rows(r"\.(q|k)_proj\.", halves_from_pairs),)
    elif model_type == "gemma3_text":
        names |= _GEMMA_NAMES
        special = (Transform(r"norm\.weight$", lambda value, config: value.float() - 1),)  # stored as 1 + weight
    elif model_type == "phi3":
        names |= _PHI3_NAMES
    return (
        Skip(r"^rope_(freqs|factors_long|factors_short)\.weight$"),
        *(Rename(rf"^(blk\.\d+\.)?{own}\.", rf"model.\g<1>{name}.") for own, name in names.items()),
        Rename(r"^output\.", "lm_head."),
        Rename(r"^model\.blk\.", "model.layers."),
        *special,
    )
