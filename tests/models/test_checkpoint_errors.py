"""A folder as a user may have it, through load_model: loaded, or one error that names the tensor or key and says what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmdeploy.errors import CheckpointError, ConfigError, LMDeployError, ModelNotSupported
from lmdeploy.models.loader import load_model
from tests.tiny_model import make_tiny_llama

DTYPES = ("float16", "bfloat16")
QKV = "model.layers.1.self_attn"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny_llama(tmp_path / "tiny")


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def write_safetensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors")


def write_bin(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], suffix: str = "safetensors") -> None:
    """Two shards that cut a layer's fused linears apart: q and k in one file, v in the other."""
    (folder / "model.safetensors").unlink()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    files = [f"{stem}-{number:05}-of-00002.{suffix}" for number in (1, 2)]
    places = {name: files["v_proj" in name or "up_proj" in name] for name in tensors}
    for file in files:
        part = {name: tensor for name, tensor in tensors.items() if places[name] == file}
        save_file(part, folder / file) if suffix == "safetensors" else torch.save(part, folder / file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": places}))


def write_bin_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    write_shards(folder, tensors, "bin")


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("write", [write_safetensors, write_bin, write_shards, write_bin_shards])
def test_every_layout_dtype_and_tying_loads_the_same_values(
    tmp_path: Path, write: Callable[[Path, dict[str, torch.Tensor]], None], dtype: str, tied: bool
) -> None:
    folder = make_tiny_llama(tmp_path, torch_dtype=dtype, tie_word_embeddings=tied)
    stored = read_weights(folder)
    write(folder, stored)
    model = load_model(folder, dtype="float32")
    weights = {
        name: module.method.dense_weight(module) for name, module in model.named_modules() if hasattr(module, "method")
    }
    assert (model.lm_head is None, "lm_head.weight" in stored) == (tied, not tied)
    qkv = torch.cat([stored[f"{QKV}.{x}_proj.weight"] for x in "qkv"])
    assert {str(t.dtype) for t in stored.values()} == {f"torch.{dtype}"}
    assert torch.equal(weights["layers.1.self_attn.qkv_proj"], qkv.float())
    assert torch.equal(weights["embed_tokens"], stored["model.embed_tokens.weight"].float())
    if not tied:
        assert torch.equal(weights["lm_head"], stored["lm_head.weight"].float())


def remove(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        write_safetensors(folder, {n: t for n, t in read_weights(folder).items() if n != name})

    return change


def put(name: str, *shape: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        write_safetensors(folder, {**read_weights(folder), name: torch.zeros(shape)})

    return change


def configure(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: change_config(folder, **changes)


def unlink(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            remove("model.norm.weight"),
            CheckpointError,
            r"1 parameters without a tensor \(norm.weight\); 0 tensors without",
        ),
        (remove(f"{QKV}.k_proj.weight"), CheckpointError, r"\(layers.1.self_attn.qkv_proj.weight \(parts 1 of 3\)\)"),
        (remove("lm_head.weight"), CheckpointError, r"\(lm_head.weight\).*tie_word_embeddings"),
        (
            put("model.layers.7.mlp.x.weight", 2),
            CheckpointError,
            r"1 tensors without .*\(model.layers.7.mlp.x.weight\)",
        ),
        (
            put(f"{QKV}.q_proj.bias", 64),
            CheckpointError,
            r"0 parameters .* 1 tensors without .*1.self_attn.q_proj.bias",
        ),
        (
            put(f"{QKV}.k_proj.weight", 32, 63),
            CheckpointError,
            r"k_proj.weight' .*part 1\).* \[32, 64\] and has \[32, 63\]",
        ),
        (
            put("model.norm.weight", 63),
            CheckpointError,
            r"'model.norm.weight' .* \[64\] and has \[63\].*different models",
        ),
        (configure(intermediate_size=96), CheckpointError, r"should have shape .*96.* and has .*128"),
        (configure(num_hidden_layers=3), CheckpointError, r"9 parameters|parameters without a tensor \(layers.2"),
        (configure(num_hidden_layers=1), CheckpointError, r"tensors without a parameter \(model.layers.1"),
        (
            unlink("model.safetensors"),
            CheckpointError,
            r"no model\*\.safetensors and no pytorch_model.*it has: config.json",
        ),
        (unlink("config.json"), CheckpointError, r"has no config.json"),
        (
            configure(rope_scaling={"type": "spiral", "factor": 2.0}),
            ConfigError,
            r"'spiral' is not supported; supported: def",
        ),
        (
            configure(rope_scaling={"rope_type": "yarn"}),
            ConfigError,
            r"'yarn' needs a positive number 'factor', not None",
        ),
        (configure(rope_scaling=[1]), ConfigError, r"rope_scaling must be a mapping or null, not \[1\]"),
        (configure(rope_theta="big"), ConfigError, r"'rope_theta' .*'big'"),
        (configure(rms_norm_eps="small"), ConfigError, r"'rms_norm_eps' .*'small'"),
        (configure(hidden_act="mish"), ConfigError, r"hidden_act 'mish' is not supported; supported: silu"),
        (configure(vocab_size="many"), ConfigError, r"'vocab_size' must be a positive integer, not 'many'"),
        (configure(num_attention_heads=0), ConfigError, r"'num_attention_heads' must be a positive integer, not 0"),
        (configure(num_key_value_heads="two"), ConfigError, r"'num_key_value_heads' .*'two'"),
        (configure(eos_token_id="</s>"), ConfigError, r"eos_token_id must be .*, not '</s>'"),
        (
            configure(architectures=["LlamaForMath"]),
            ModelNotSupported,
            r"'LlamaForMath' is not supported.*`lmdeploy list`",
        ),
        (
            configure(architectures=[], model_type="llama5"),
            ModelNotSupported,
            r"'llama5' is not .*llama.*`lmdeploy list`",
        ),
        (configure(quantization_config={"quant_method": "aqlm"}), ModelNotSupported, r"'aqlm'.* not supported yet"),
    ],
)
def test_a_defect_is_one_error_that_names_it(
    folder: Path, change: Callable[[Path], None], error: type[LMDeployError], message: str
) -> None:
    change(folder)
    with pytest.raises(error, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
