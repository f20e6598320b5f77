"""Loading: every parameter once, every tensor used, one tensor at a time, dtypes, dummy weights, GGUF files, clear errors."""

from __future__ import annotations

import json
import logging
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file
from torch import nn

from lmdeploy.errors import CheckpointError, ConfigError, ModelNotSupported
from lmdeploy.gguf_file import read_tensor_index
from lmdeploy.kernels import cpu
from lmdeploy.layers.linear import Linear
from lmdeploy.layers.norm import RMSNorm
from lmdeploy.logging import get_logger
from lmdeploy.models import loader
from lmdeploy.models.base import CausalLM
from lmdeploy.models.checkpoint import open_checkpoint
from lmdeploy.models.config import ModelConfig
from lmdeploy.models.filling import fill
from lmdeploy.models.loader import load_model
from lmdeploy.models.weight_files import TensorInfo
from lmdeploy.models.weights import Rename, Skip, Stack, Value, WeightMap
from tests.goldens.materialize import materialize
from tests.models.gguf_export import export_gguf, pair_rows
from tests.models.golden_data import ROOT as GOLDENS
from tests.tiny_model import make_tiny_llama

CPU = torch.device("cpu")


class Tree(nn.Module):
    """A model of one fused linear, one linear with bias, a norm, a plain parameter, and one that stays in float32."""

    float32_parameters = ("score_bias",)

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(tie_word_embeddings=True)
        self.qkv = Linear(4, (4, 2, 2), bias=True)
        self.norm = RMSNorm(4, 1e-5)
        self.sinks = nn.Parameter(torch.empty(3))
        self.score_bias = nn.Parameter(torch.empty(2))


TREE_MAP = WeightMap(Rename("^model\\.", ""), Stack("qkv", ("q", "k", "v")), Skip("inv_freq$"))


class Source:
    """Tensors in memory that notices when a tensor is asked for while another one is still alive."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.infos = {name: TensorInfo(tuple(tensor.shape)) for name, tensor in tensors.items()}
        self.reads: list[str] = []
        self.overlaps: list[str] = []
        self._last: weakref.ref[torch.Tensor] | None = None

    def read(self, name: str) -> Value:
        if self._last is not None and self._last() is not None:
            self.overlaps.append(name)
        self.reads.append(name)
        tensor = self.tensors[name].clone()
        self._last = weakref.ref(tensor)
        return tensor


def tree_tensors() -> dict[str, torch.Tensor]:
    shapes = {
        "model.v.bias": (2,),
        "model.q.weight": (4, 4),
        "model.norm.weight": (4,),
        "model.k.bias": (2,),
        "model.v.weight": (2, 4),
        "model.sinks": (3,),
        "model.k.weight": (2, 4),
        "model.q.bias": (4,),
        "model.score_bias": (2,),
        "model.rotary.inv_freq": (2,),
    }
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def fill_tree(tensors: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> tuple[Tree, Source]:
    with torch.device("meta"):
        tree = Tree()
    source = Source(tensors)
    fill(cast(CausalLM, tree), source, TREE_MAP, CPU, dtype)
    return tree, source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny_llama(tmp_path / "tiny")


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    get_logger().addHandler(caplog.handler)
    yield caplog
    get_logger().removeHandler(caplog.handler)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, remove: str = "", **add: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if name != remove}
    save_file({**tensors, **add}, path)


def linears(model: nn.Module) -> dict[str, torch.Tensor]:
    """The dense weight of every linear, whatever its method."""
    return {n: m.method.dense_weight(m) for n, m in model.named_modules() if isinstance(m, Linear)}


def test_every_part_goes_to_its_rows() -> None:
    tensors = tree_tensors()
    tree, source = fill_tree(tensors)
    expected = {leaf: torch.cat([tensors[f"model.{x}.{leaf}"] for x in "qkv"]) for leaf in ("weight", "bias")}
    assert torch.equal(tree.qkv.method.dense_weight(tree.qkv), expected["weight"])
    assert tree.qkv.bias is not None
    assert torch.equal(tree.qkv.bias, expected["bias"])
    assert torch.equal(tree.norm.weight, tensors["model.norm.weight"])
    assert torch.equal(tree.sinks, tensors["model.sinks"])
    assert source.reads == [name for name in tensors if not name.endswith("inv_freq")]
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in tree.parameters())


def test_one_tensor_is_in_memory_at_a_time() -> None:
    assert fill_tree(tree_tensors())[1].overlaps == []


def test_parameters_take_the_compute_dtype_unless_they_are_kept_in_float32() -> None:
    tree, _ = fill_tree(tree_tensors(), torch.bfloat16)
    assert {tree.sinks.dtype, tree.norm.weight.dtype, tree.qkv.method.dense_weight(tree.qkv).dtype} == {torch.bfloat16}
    assert tree.score_bias.dtype == torch.float32


def test_whole_tensor_of_a_fused_linear() -> None:
    tensors = tree_tensors()
    for leaf in ("weight", "bias"):
        tensors[f"model.qkv.{leaf}"] = torch.cat([tensors.pop(f"model.{x}.{leaf}") for x in "qkv"])
    tree, _ = fill_tree(tensors)
    assert torch.equal(tree.qkv.method.dense_weight(tree.qkv), tensors["model.qkv.weight"])
    assert tree.qkv.bias is not None
    assert torch.equal(tree.qkv.bias, tensors["model.qkv.bias"])


def test_both_lists_of_what_does_not_fit() -> None:
    tensors = tree_tensors()
    del tensors["model.k.weight"], tensors["model.norm.weight"]
    tensors |= {f"extra.{i}": torch.zeros(1) for i in range(11)}
    with pytest.raises(CheckpointError) as error:
        fill_tree(tensors)
    text = str(error.value)
    assert "2 parameters without a tensor (qkv.weight (parts 1 of 3), norm.weight)" in text
    assert "11 tensors without a parameter (extra.0, extra.1" in text
    assert "extra.7, ...)" in text


def test_a_part_that_the_model_does_not_have() -> None:
    tensors = tree_tensors()
    stack = Stack("qkv", ("q", "k", "v", "w"))
    with torch.device("meta"):
        tree = Tree()
    source = Source({**tensors, "model.w.weight": torch.zeros(2, 4)})
    with pytest.raises(CheckpointError, match=r"1 tensors without a parameter \(model.w.weight\)"):
        fill(
            cast(CausalLM, tree),
            source,
            WeightMap(Rename("^model\\.", ""), stack, Skip("inv_freq$")),
            CPU,
            torch.float32,
        )


def test_two_tensors_for_one_parameter() -> None:
    tensors = {**tree_tensors(), "k.weight": torch.zeros(2, 4)}
    with pytest.raises(CheckpointError, match=r"'model.k.weight' and 'k.weight' both fill 'qkv.weight'"):
        fill_tree(tensors)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.k.weight", (3, 4), r"'model.k.weight' \(parameter qkv.weight, part 1\) .* \[2, 4\] and has \[3, 4\]"),
        ("model.k.bias", (4,), r"\[2\] and has \[4\]"),
        ("model.norm.weight", (4, 1), r"'model.norm.weight' \(parameter norm.weight\) .* \[4\] and has \[4, 1\]"),
    ],
)
def test_wrong_shape(name: str, shape: tuple[int, ...], expected: str) -> None:
    with pytest.raises(CheckpointError, match=expected):
        fill_tree({**tree_tensors(), name: torch.zeros(shape)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_folder_of_each_stored_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = make_tiny_llama(tmp_path, torch_dtype=str(dtype).removeprefix("torch."))
    stored = load_file(folder / "model.safetensors")
    model = load_model(folder, dtype="float32")
    weights = linears(model)
    layer = "model.layers.1.self_attn"
    qkv = torch.cat([stored[f"{layer}.{x}_proj.weight"] for x in "qkv"]).float()
    assert stored[f"{layer}.q_proj.weight"].dtype == dtype
    assert torch.equal(weights["layers.1.self_attn.qkv_proj"], qkv)
    assert torch.equal(weights["lm_head"], stored["lm_head.weight"].float())
    assert model.dtype == torch.float32


def test_tied_head(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path, tie_word_embeddings=True)
    model = load_model(folder, dtype="float32")
    assert model.lm_head is None
    edit_weights(folder, **{"lm_head.weight": torch.zeros(384, 64)})
    again = load_model(folder, dtype="float32")
    assert torch.equal(linears(again)["embed_tokens"], linears(model)["embed_tokens"])


def test_missing_and_surplus_tensors_in_a_folder(folder: Path) -> None:
    edit_weights(folder, remove="lm_head.weight", **{"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)})
    with pytest.raises(
        CheckpointError, match=r"1 parameters without .*lm_head.weight.* 1 tensors .*0.self_attn.q_proj.bias"
    ):
        load_model(folder)


def test_hf_overrides_replace_config_keys(folder: Path) -> None:
    assert load_model(folder, hf_overrides={"rms_norm_eps": 0.25}).config.norm_eps == 0.25
    with pytest.raises(CheckpointError, match=r"tensors without a parameter \(model.layers.1"):
        load_model(folder, hf_overrides={"num_hidden_layers": 1})


def test_long_context_settings_reach_the_config(folder: Path) -> None:
    config = load_model(folder, rope_scaling_factor=2.0, use_logn_attn=True).config
    assert config.rope is not None
    assert (config.rope.kind, config.rope.factor, config.logn_length) == ("dynamic", 2.0, 512)


def test_a_quantization_that_nothing_reads(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "no_such_method"})
    with pytest.raises(ModelNotSupported, match="'no_such_method'"):
        load_model(folder)


def test_unknown_load_format(folder: Path) -> None:
    with pytest.raises(ConfigError, match="load_format='fast'"):
        load_model(folder, load_format="fast")


def test_dummy_needs_no_weights_and_repeats_itself(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    first, second = (load_model(folder, load_format="dummy", dtype="float32") for _ in range(2))
    states = first.state_dict(), second.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not any(parameter.is_meta for parameter in first.parameters())
    assert torch.equal(first.norm.weight, torch.ones(64))
    for weight in linears(first).values():
        assert 0.8 < float(weight.norm(dim=1).mean()) < 1.2
    assert first.num_bytes() == sum(parameter.numel() * 4 for parameter in first.parameters())


@pytest.mark.parametrize(
    "name", ["gemma/2b", "falcon/rw-1b-alibi", "qwen2_moe/base", "gpt_oss/bf16", "deepseek_v2/lite"]
)
def test_dummy_of_other_families(tmp_path: Path, name: str) -> None:
    """Shapes as in the checkpoint; norms scale by one, whatever their offset."""
    folder = materialize(GOLDENS / name, tmp_path)
    real, dummy = load_model(folder, dtype="float32"), load_model(folder, dtype="float32", load_format="dummy")
    shapes = [{n: p.shape for n, p in model.named_parameters()} for model in (real, dummy)]
    assert shapes[0] == shapes[1]
    x = torch.randn(5, real.config.hidden_size)
    rms = dummy.norm(x).square().mean(dim=-1).sqrt()
    assert torch.allclose(rms, torch.ones(5), atol=1e-3)


@pytest.mark.parametrize(
    ("dtype", "is_native", "expected"),
    [
        ("auto", True, torch.bfloat16),
        ("auto", False, torch.float32),
        ("bfloat16", False, torch.bfloat16),
        ("float32", True, torch.float32),
    ],
)
def test_dtype_on_a_cpu(
    folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, is_native: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(loader, "has_native_bfloat16", lambda: is_native)
    model = load_model(folder, dtype=dtype)
    assert model.dtype == expected
    assert {weight.dtype for weight in linears(model).values()} == {expected}


@pytest.mark.parametrize("is_native", [True, False])
def test_float16_on_a_cpu_is_promoted_with_a_notice(
    folder: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture, is_native: bool
) -> None:
    monkeypatch.setattr(loader, "has_native_bfloat16", lambda: is_native)
    expected = "bfloat16" if is_native else "float32"
    assert load_model(folder, dtype="float16").dtype == getattr(torch, expected)
    assert [record.getMessage() for record in log.records if record.levelno == logging.WARNING] == [
        f"dtype=float16 is not for CPUs; computing in {expected}"
    ]


@pytest.mark.parametrize(
    ("dtype", "stored", "expected"),
    [
        ("auto", "float16", torch.float16),
        ("auto", "bfloat16", torch.bfloat16),
        ("auto", "float32", torch.bfloat16),
        ("auto", None, torch.bfloat16),
        ("float32", "float16", torch.float32),
        ("float16", "bfloat16", torch.float16),
    ],
)
def test_dtype_on_a_gpu(dtype: str, stored: str | None, expected: torch.dtype) -> None:
    config = cast(ModelConfig, SimpleNamespace(dtype=stored))
    assert loader.choose_dtype(dtype, config, torch.device("cuda")) == expected


def test_unknown_dtype(folder: Path) -> None:
    with pytest.raises(ConfigError, match="dtype='int3'"):
        load_model(folder, dtype="int3")


@pytest.mark.parametrize(
    "name",
    [
        "gemma3_text/1b",
        "internlm2/2.5-dynamic",
        "internlm2/7b",
        "llama/llama2-mha",
        "phi3/mini-4k",
        "qwen2/qwen1.5-mha",
        "qwen2/qwen2-gqa-tied",
        "qwen3/base",
    ],
)
def test_gguf_equals_the_checkpoint_it_was_made_from(tmp_path: Path, name: str) -> None:
    folder = materialize(GOLDENS / name, tmp_path / "hf")
    export_gguf(folder, tmp_path / "model.gguf")
    expected = load_model(folder, dtype="float32").state_dict()
    actual = load_model(tmp_path / "model.gguf", dtype="float32").state_dict()
    assert actual.keys() == expected.keys()
    tolerance = 1e-6 if name.startswith("gemma") else 0.0  # its norms are stored as 1 + weight
    for key, value in expected.items():
        assert torch.allclose(actual[key], value, rtol=0, atol=tolerance), key


def test_gguf_of_mixed_types(tmp_path: Path) -> None:
    """q and k in 4 bits with rows to reorder, v in 8 bits, one linear half quantized: all values survive."""
    folder = materialize(GOLDENS / "llama" / "llama2-mha", tmp_path / "hf")
    kinds = {"attn_q.weight": "Q4_0", "attn_k.weight": "Q4_1", "attn_v.weight": "Q8_0", "ffn_gate.weight": "Q5_1"}
    stored = export_gguf(folder, tmp_path / "model.gguf", kinds)
    model = load_model(tmp_path / "model.gguf", dtype="bfloat16")
    weights, heads = linears(model), model.config.num_heads
    q, k, v = (torch.from_numpy(stored[f"blk.1.attn_{x}.weight"]) for x in "qkv")
    dim = model.config.head_dim
    q, k = (x.view(heads, dim // 2, 2, -1).transpose(1, 2).reshape(x.shape) for x in (q, k))
    assert torch.equal(weights["layers.1.self_attn.qkv_proj"], torch.cat((q, k, v)).bfloat16())
    gate_up = torch.cat([torch.from_numpy(stored[f"blk.0.ffn_{x}.weight"]) for x in ("gate", "up")])
    assert torch.equal(weights["layers.0.mlp.gate_up_proj"], gate_up.bfloat16())
    methods = {n: m.method.name for n, m in model.named_modules() if isinstance(m, Linear)}
    assert methods["layers.1.self_attn.qkv_proj"] == ("affine" if cpu.is_available() else "unquantized")
    assert methods["layers.0.mlp.gate_up_proj"] == methods["embed_tokens"] == "unquantized"


def test_gguf_pointer(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        load_model(tmp_path / "model.gguf")


def test_builtin_model_is_exact_in_float32(builtin_model: Path) -> None:
    """Every tenth layer and the embedding, against the gguf package's own dequantization."""
    weights = linears(load_model(builtin_model, dtype="float32"))
    stored = {info.name: info for info in read_tensor_index(builtin_model)}

    def values(name: str) -> torch.Tensor:
        info = stored[name]
        data = np.fromfile(builtin_model, np.uint8, info.size_bytes, offset=info.offset_bytes)
        return torch.from_numpy(dequantize(data.reshape(info.shape[0], -1), GGMLQuantizationType(info.ggml_type)))

    assert torch.equal(weights["embed_tokens"], values("token_embd.weight"))
    for index in range(0, 30, 10):
        q, k, v = weights[f"layers.{index}.self_attn.qkv_proj"].split((576, 192, 192))
        assert torch.equal(torch.from_numpy(pair_rows(q.numpy(), 9)), values(f"blk.{index}.attn_q.weight"))
        assert torch.equal(torch.from_numpy(pair_rows(k.numpy(), 3)), values(f"blk.{index}.attn_k.weight"))
        assert torch.equal(v, values(f"blk.{index}.attn_v.weight"))
        gate_up = torch.cat((values(f"blk.{index}.ffn_gate.weight"), values(f"blk.{index}.ffn_up.weight")))
        assert torch.equal(weights[f"layers.{index}.mlp.gate_up_proj"], gate_up)
        assert torch.equal(weights[f"layers.{index}.mlp.down_proj"], values(f"blk.{index}.ffn_down.weight"))
        assert torch.equal(weights[f"layers.{index}.self_attn.o_proj"], values(f"blk.{index}.attn_output.weight"))


def test_builtin_model_stays_quantized_in_bfloat16(builtin_model: Path) -> None:
    model = load_model(builtin_model, dtype="bfloat16")
    assert {m.method.name for m in model.modules() if isinstance(m, Linear)} <= {"affine", "unquantized"}
    size = builtin_model.stat().st_size
    assert model.num_bytes() < 2.2 * size
    name = "layers.3.mlp.down_proj"
    checkpoint = open_checkpoint(builtin_model)
    value = checkpoint.read("blk.3.ffn_down.weight")
    assert not isinstance(value, torch.Tensor)
    assert torch.equal(linears(model)[name], value.dequantize(torch.bfloat16))
