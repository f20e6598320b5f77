"""Every quantized format against the dense checkpoint that it means: tiny models of several families, loaded and run."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmdeploy.errors import CheckpointError, ModelNotSupported
from lmdeploy.layers.linear import Linear
from lmdeploy.logging import get_logger
from lmdeploy.models.base import CausalLM
from lmdeploy.models.loader import load_model
from tests.engine.driver import greedy, make_engine, run
from tests.models.driver import Driver
from tests.quantization import exports
from tests.quantization.exports import export, integers

LLAMA, INTERNLM2, QWEN2_MOE, CHATGLM2 = "llama/llama3.1", "internlm2/7b", "qwen2_moe/base", "chatglm/chatglm2-6b"
FAMILIES = (LLAMA, INTERNLM2, QWEN2_MOE, CHATGLM2)
PROMPTS = [[5, 9, 2, 77, 31, 8, 8, 120, 3], [1, 250, 40]]
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False, "desc_act": False}
Writer = Callable[[str, torch.Tensor], tuple[exports.Tensors, exports.Array]]


def scheme(bits: int, group_size: int | None, activations: dict[str, Any] | None = None, kind: str = "int") -> Any:
    """A compressed-tensors config."""
    weights = {
        "num_bits": bits,
        "type": kind,
        "group_size": group_size,
        "strategy": "group" if group_size else "channel",
    }
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}}
    return {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": ["lm_head"]}


def float8_writer(dtype: torch.dtype, block: tuple[int, int], leaf: str) -> Writer:
    def write(module: str, weight: torch.Tensor) -> tuple[exports.Tensors, exports.Array]:
        q, scales, values = exports.float8(weight, dtype, block)
        tensors = {f"{module}.weight": q, f"{module}.{leaf}": scales.reshape(()) if block == (0, 0) else scales}
        return {**tensors, f"{module}.input_scale": torch.ones(1)}, values

    return write


def int8_writer(leaf: str) -> Writer:
    def write(module: str, weight: torch.Tensor) -> tuple[exports.Tensors, exports.Array]:
        q, scales, values = exports.int8(weight)
        return {f"{module}.weight": q, f"{module}.{leaf}": scales}, values

    return write


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
STATIC_FP8 = {"quant_method": "fp8", "activation_scheme": "static"}
DYNAMIC = {"dynamic": True, "num_bits": 8, "strategy": "token", "type": "int"}
CASES: dict[str, tuple[dict[str, Any] | None, Writer]] = {
    "awq": (AWQ, integers(exports.awq)),
    "awq-no-config": (None, integers(exports.awq)),
    "gptq": (GPTQ, integers(exports.gptq)),
    "gptq-v2": ({**GPTQ, "checkpoint_format": "gptq_v2"}, integers(exports.gptq_v2)),
    "gptq-8bit-symmetric-no-config": (None, integers(exports.gptq, bits=8, symmetric=True)),
    "gptq-act-order": ({**GPTQ, "desc_act": True}, integers(exports.gptq, act_order_seed=1)),
    "gptq-short-last-group": ({**GPTQ, "group_size": 128}, integers(exports.gptq, group_size=128)),
    "gptq-short-last-group-act-order": (
        {**GPTQ, "group_size": 32, "desc_act": True},
        integers(exports.gptq, group_size=32, act_order_seed=3),
    ),
    "gptq-per-channel": ({**GPTQ, "group_size": -1}, integers(exports.gptq, group_size=-1)),
    "compressed-4bit": (scheme(4, 16), integers(exports.compressed)),
    "compressed-4bit-symmetric": (scheme(4, 16), integers(exports.compressed, symmetric=True)),
    "compressed-8bit-channel": (scheme(8, None), integers(exports.compressed, bits=8, group_size=-1, symmetric=True)),
    "compressed-short-last-group": (scheme(4, 128), integers(exports.compressed, group_size=128)),
    "compressed-w8a8": (scheme(8, None, DYNAMIC), int8_writer("weight_scale")),
    "compressed-int8-weight-only": (scheme(8, None), int8_writer("weight_scale")),
    "compressed-fp8-channel": (
        scheme(8, None, DYNAMIC, "float"),
        float8_writer(torch.float8_e4m3fn, (1, 0), "weight_scale"),
    ),
    "fp8-blocks": (FP8, float8_writer(torch.float8_e4m3fn, (128, 128), "weight_scale_inv")),
    "fp8-small-blocks": (
        {**FP8, "weight_block_size": [32, 64]},
        float8_writer(torch.float8_e4m3fn, (32, 64), "weight_scale_inv"),
    ),
    "fp8-tensor": (STATIC_FP8, float8_writer(torch.float8_e4m3fn, (0, 0), "weight_scale")),
    "fp8-e5m2": (STATIC_FP8, float8_writer(torch.float8_e5m2, (0, 0), "weight_scale")),
    "smooth-quant": ({"quant_method": "smooth_quant", "quant_dtype": "int8"}, int8_writer("scale")),
    "smooth-quant-fp8": (
        {"quant_method": "smooth_quant", "quant_dtype": "float8_e4m3fn"},
        float8_writer(torch.float8_e4m3fn, (1, 0), "scale"),
    ),
}


def logits(model: CausalLM) -> torch.Tensor:
    driver = Driver(model)
    return torch.cat(driver.prefill([driver.add(prompt) for prompt in PROMPTS], chunk=4))


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    get_logger().addHandler(caplog.handler)
    yield caplog
    get_logger().removeHandler(caplog.handler)


def warnings(log: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in log.records if record.levelno >= logging.WARNING]


def check_equal(golden: str, case: str, folder: Path) -> None:
    """In float32 the same logits as the dense checkpoint; the dense reference is far from the unquantized one's logits."""
    config, writer = CASES[case]
    quantized, dense = export(golden, folder, config, writer)
    expected = logits(load_model(dense, dtype="float32"))
    assert relative(logits(load_model(quantized, dtype="float32")), expected) <= 1e-5
    assert relative(logits(load_model(folder / "source", dtype="float32")), expected) > 1e-4


@pytest.mark.parametrize("case", CASES)
def test_every_format_of_a_llama(tmp_path: Path, log: pytest.LogCaptureFixture, case: str) -> None:
    check_equal(LLAMA, case, tmp_path)
    assert warnings(log) == []


@pytest.mark.parametrize("golden", [INTERNLM2, QWEN2_MOE, CHATGLM2])
@pytest.mark.parametrize(
    "case",
    ["awq", "gptq-act-order", "gptq-short-last-group", "compressed-4bit", "fp8-blocks", "compressed-w8a8"],
)
def test_other_families(tmp_path: Path, golden: str, case: str) -> None:
    check_equal(golden, case, tmp_path)


@pytest.mark.parametrize("golden", FAMILIES)
@pytest.mark.parametrize("case", ["awq", "gptq-act-order", "compressed-w8a8"])
def test_kept_quantized_in_bfloat16(tmp_path: Path, golden: str, case: str) -> None:
    """The decoder's linears run through their own methods, and what comes out is what 16 bits and 8-bit activations give."""
    config, writer = CASES[case]
    quantized, dense = export(golden, tmp_path, config, writer)
    model = load_model(quantized, dtype="bfloat16")
    methods = {module.method.name for name, module in model.layers.named_modules() if isinstance(module, Linear)}
    assert methods - {"unquantized"} == {"w8a8" if case == "compressed-w8a8" else "affine"}
    expected = logits(load_model(dense, dtype="float32"))
    assert relative(logits(model), expected) < 0.1


def test_generation_in_the_engine(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    """The same tokens as the dense checkpoint, in spite of a model_format that is wrong, of which a notice tells."""
    quantized, dense = export(INTERNLM2, tmp_path, *CASES["awq"])
    tokens = []
    for folder, model_format in ((dense, None), (quantized, "gptq"), (quantized, "awq")):
        engine = make_engine(folder, model_format=model_format, session_len=256)
        tokens.append(run(engine, [greedy("a", PROMPTS[0])])["a"].token_ids)
        engine.close()
    assert tokens[0] == tokens[1] == tokens[2]
    assert len(tokens[0]) > 0
    assert warnings(log) == [
        "model_format is 'gptq', but the weights are in the format awq; they are loaded as what they are"
    ]


def test_a_config_that_the_weights_contradict(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    quantized, dense = export(LLAMA, tmp_path, CASES["awq"][0], CASES["gptq"][1])
    assert torch.equal(
        logits(load_model(quantized, dtype="float32")), logits(load_model(dense, dtype="float32", model_format="hf"))
    )
    assert warnings(log) == [
        "config.json's quant_method is 'awq', but the weights are in the format gptq; they are loaded as what they are"
    ]


def test_dense_weights_under_the_name_of_a_format(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    _, dense = export(LLAMA, tmp_path, *CASES["awq"])
    load_model(dense, dtype="float32", model_format="awq")
    assert warnings(log) == [
        "model_format is 'awq', but the weights are not quantized; they are loaded as what they are"
    ]


def test_modules_that_were_not_converted(tmp_path: Path) -> None:
    """Dense and quantized parts of one fused linear, and a layer that is dense altogether."""

    def write(module: str, weight: torch.Tensor) -> tuple[exports.Tensors, exports.Array]:
        if module.endswith("k_proj") or ".layers.1." in module:
            return {f"{module}.weight": weight}, weight.numpy()
        return CASES["awq"][1](module, weight)

    quantized, dense = export(LLAMA, tmp_path, {**AWQ, "modules_to_not_convert": ["k_proj", "layers.1"]}, write)
    expected = logits(load_model(dense, dtype="float32"))
    assert relative(logits(load_model(quantized, dtype="float32")), expected) <= 1e-5
    model = load_model(quantized, dtype="bfloat16")
    assert model.get_submodule("layers.0.mlp.down_proj").method.name == "affine"
    assert model.get_submodule("layers.0.self_attn.qkv_proj").method.name == "unquantized"
    assert relative(logits(model), expected) < 0.05


def test_act_orders_that_differ_within_a_fused_linear(tmp_path: Path) -> None:
    def write(module: str, weight: torch.Tensor) -> tuple[exports.Tensors, exports.Array]:
        return integers(exports.gptq, act_order_seed=len(module) + ord(module[-6]))(module, weight)

    quantized, dense = export(LLAMA, tmp_path, {**GPTQ, "desc_act": True}, write)
    model = load_model(quantized, dtype="bfloat16")
    assert model.get_submodule("layers.0.self_attn.qkv_proj").method.name == "unquantized"
    assert model.get_submodule("layers.0.mlp.down_proj").method.name == "affine"
    assert relative(logits(model), logits(load_model(dense, dtype="float32"))) < 0.05


def change(folder: Path, edit: Callable[[exports.Tensors], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def configure(folder: Path, quantization: dict[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": quantization}))


DOWN = "model.layers.0.mlp.down_proj"
BROKEN: dict[str, tuple[str, Callable[[exports.Tensors], Any], type[Exception], str]] = {
    "missing zeros": ("awq", lambda t: t.pop(f"{DOWN}.qzeros"), CheckpointError, f"'{DOWN}' has no tensor 'qzeros'"),
    "too many groups": (
        "gptq",
        lambda t: t.update({f"{DOWN}.scales": torch.zeros(5, 128), f"{DOWN}.qzeros": torch.zeros(5, 16).int()}),
        CheckpointError,
        f"'{DOWN}': 5 groups of scales do not cover",
    ),
    "gemv layout": (
        "awq",
        lambda t: t.update({f"{DOWN}.qweight": t[f"{DOWN}.qweight"].T.contiguous()}),
        ModelNotSupported,
        "neither AWQ's gemm layout nor GPTQ's",
    ),
    "three bits": (
        "gptq",
        lambda t: t.update({f"{DOWN}.qzeros": t[f"{DOWN}.qzeros"][:, :12].contiguous()}),
        ModelNotSupported,
        "GPTQ weights of 3 bits",
    ),
    "wrong blocks": (
        "fp8-blocks",
        lambda t: t.update({f"{DOWN}.weight_scale_inv": torch.ones(3, 3)}),
        CheckpointError,
        f"'{DOWN}': scales .3, 3. do not cover a weight",
    ),
    "bias that the model has not": (
        "gptq",
        lambda t: t.update({f"{DOWN}.bias": torch.ones(128)}),
        CheckpointError,
        f"tensors without a parameter .{DOWN}.bias.",
    ),
    "bitsandbytes": (
        "awq",
        lambda t: t.update({f"{DOWN}.weight.absmax": torch.ones(4)}),
        ModelNotSupported,
        "bitsandbytes weights .* supported: awq, compressed-tensors",
    ),
    "exl2": ("awq", lambda t: t.update({f"{DOWN}.q_weight": torch.ones(4)}), ModelNotSupported, "EXL2 weights"),
}


@pytest.mark.parametrize("defect", BROKEN)
def test_a_defect_is_one_clear_error(tmp_path: Path, defect: str) -> None:
    case, edit, error, expected = BROKEN[defect]
    quantized, _ = export(LLAMA, tmp_path, *CASES[case])
    change(quantized, edit)
    with pytest.raises(error, match=expected):
        load_model(quantized, dtype="float32")


@pytest.mark.parametrize("method", ["bitsandbytes", "exl2", "hqq", "aqlm"])
def test_formats_that_nothing_reads(tmp_path: Path, method: str) -> None:
    _, dense = export(LLAMA, tmp_path, *CASES["awq"])
    configure(dense, {"quant_method": method})
    with pytest.raises(
        ModelNotSupported, match=f"'{method}'.* supported: awq, compressed-tensors, fbgemm_fp8, fp8, gguf"
    ):
        load_model(dense, dtype="float32")
