"""What `convert` writes and what reads it: the same model, in the layout of old, whole or not at all."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lmdeploy import GenerationConfig, hub, pipeline
from lmdeploy import turbomind as tm
from lmdeploy.engine.process import ProcessClient
from lmdeploy.errors import CheckpointError, ConfigError, LMDeployError
from lmdeploy.lite import convert as module
from lmdeploy.models.config import load_config
from lmdeploy.tokenizer import Tokenizer
from lmdeploy.workspace import TOKENIZER, WEIGHTS, ConfigIni
from tests.lite.checkpoints import make_golden
from tests.models.gguf_export import export_gguf
from tests.quantization.exports import awq, export, integers
from tests.tiny_model import make_tiny_llama, train_tokenizer
from tests.workspaces import PROMPT, greedy, make_workspace

FAMILIES = (
    "llama/llama1-bin", "llama/llama3.1", "internlm/7b-dynamic", "internlm2/7b", "qwen/7b-ntk-logn", "qwen2_moe/base",
    "chatglm/chatglm2-6b", "baichuan2/13b-alibi", "deepseek_v2/lite", "gpt_oss/mxfp4", "falcon/7b", "gemma2/base",
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def workspace(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tiny, tmp_path_factory.mktemp("converted") / "workspace")


def test_layout(workspace: Path, tiny: Path) -> None:
    files = {str(path.relative_to(workspace)) for path in workspace.rglob("*") if path.is_file()}
    weights, tokenizer = str(WEIGHTS), str(TOKENIZER)
    assert files == {
        *(f"{weights}/{name}" for name in ("config.ini", "config.json", "generation_config.json", "model.safetensors")),
        *(f"{tokenizer}/{name}" for name in ("tokenizer.json", "tokenizer_config.json", "config.json")),
        f"{tokenizer}/generation_config.json",
    }
    keys = dict(ConfigIni(workspace / WEIGHTS).keys)
    expected = {
        "model_name": "internlm2", "tensor_para_size": "1", "head_num": "4", "kv_head_num": "2", "size_per_head": "16",
        "vocab_size": "384", "num_layer": "2", "inter_size": "128", "attn_bias": "0", "weight_type": "fp32",
        "group_size": "0", "rotary_embedding": "16", "start_id": "0", "end_id": "3", "norm_eps": "1e-05",
        "rope_theta": "10000.0", "session_len": "512", "max_batch_size": "64", "max_context_token_num": "1",
        "cache_max_entry_count": "0.8", "cache_block_seq_len": "64", "quant_policy": "0", "step_length": "1",
        "max_position_embeddings": "512", "rope_scaling_factor": "0.0", "use_dynamic_ntk": "0", "use_logn_attn": "0",
    }  # fmt: skip
    assert expected.items() <= keys.items()
    assert (workspace / WEIGHTS / "config.ini").read_text().startswith("[llama]\nmodel_name = internlm2\n")


@pytest.mark.parametrize("part", ["", "triton_models", "triton_models/weights"])
def test_it_is_found_by_each_of_its_folders(workspace: Path, part: str) -> None:
    weights = hub.resolve(str(workspace / part) + "/")
    assert weights == workspace / WEIGHTS
    assert Tokenizer(weights).encode("the river") == Tokenizer(workspace / TOKENIZER).encode("the river")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_answers_as_from_its_own_folder(name: str, tmp_path: Path) -> None:
    source = make_golden(name, tmp_path / "model")
    weights = make_workspace(source, tmp_path / "workspace") / WEIGHTS
    assert load_config(weights) == load_config(source)
    prompt = [i % 90 + 3 for i in range(80)]  # beyond the trained length of those that then change
    ids, logits = greedy(weights, prompt)
    expected_ids, expected = greedy(source, prompt)
    assert ids == expected_ids
    assert torch.equal(logits, expected)


def test_a_quantized_folder(tmp_path: Path) -> None:
    settings = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
    source, _ = export("internlm2/7b", tmp_path, settings, integers(awq))
    train_tokenizer(300).save(str(source / "tokenizer.json"))
    told: list[str] = []
    asked = module.ConvertSettings("internlm-chat-7b", tmp_path / "w", model_format="awq", group_size=128)
    weights = module.convert(source, asked, told.append) / WEIGHTS
    assert told == ["--group-size 128: the weights have groups of 16; they are converted as what they are"]
    ini = ConfigIni(weights)
    assert (ini.text("weight_type"), ini.text("group_size"), ini.text("model_name")) == (
        "int4",
        "16",
        "internlm-chat-7b",
    )
    assert greedy(weights)[0] == greedy(source)[0]


def test_shards_keep_their_index(tiny: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny, tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, source / file)
    save_file({"other.weight": torch.ones(1)}, source / "other.safetensors")
    index = {"metadata": {}, "weight_map": {name: file for file, held in shards.items() for name in held}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    weights = make_workspace(source, tmp_path / "w") / WEIGHTS
    assert sorted(path.name for path in weights.glob("*.safetensors")) == sorted(shards)
    assert torch.equal(greedy(weights)[1], greedy(tiny)[1])


def test_it_takes_no_space_and_outlives_the_model(tiny: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny, tmp_path / "model")
    expected = greedy(source)[0]
    weights = make_workspace(source, tmp_path / "w") / WEIGHTS
    assert (weights / "model.safetensors").samefile(source / "model.safetensors")
    shutil.rmtree(source)
    assert greedy(weights)[0] == expected


def test_it_is_copied_where_files_cannot_have_two_names(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(module.os, "link", refuse)
    weights = make_workspace(tiny, tmp_path / "w") / WEIGHTS
    assert not (weights / "model.safetensors").samefile(tiny / "model.safetensors")
    assert (weights / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()


def test_a_gguf_file_is_written_in_16_bits(tmp_path: Path) -> None:
    source = make_golden("llama/llama2-mha", tmp_path / "model")
    file = tmp_path / "model.gguf"
    export_gguf(source, file)
    shutil.copytree(source, tmp_path / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    settings = {"tokenizer_path": tmp_path / "tokenizer", "dtype": "bfloat16"}
    weights = make_workspace(file, tmp_path / "w", **settings) / WEIGHTS
    with safe_open(weights / "model.safetensors", framework="pt") as stored:
        names = set(stored.keys())
        assert stored.get_tensor("model.norm.weight").dtype == torch.bfloat16
    assert "model.layers.0.self_attn.q_proj.weight" in names
    _, expected = greedy(source)
    _, logits = greedy(weights)
    rows = slice(0, len(PROMPT))
    assert (logits[rows] - expected[rows]).abs().max() < 0.05 * expected.abs().max()
    assert ConfigIni(weights).text("data_type") == "bfloat16"


def test_tokenizer_of_another_place(tiny: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny, tmp_path / "model")
    other = (source / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        make_workspace(source, tmp_path / "w")
    workspace = make_workspace(source, tmp_path / "w", tokenizer_path=other)
    assert Tokenizer(workspace / WEIGHTS).encode("the river") == Tokenizer(tiny).encode("the river")


# ---- who loads it ----


def test_pipeline(workspace: Path, tiny: Path) -> None:
    config = GenerationConfig(max_new_tokens=8, do_sample=False)
    with pipeline(str(workspace)) as pipe, pipeline(str(tiny), model_name="internlm2") as plain:
        assert pipe("the river", config).token_ids == plain("the river", config).token_ids


def test_turbomind_class(workspace: Path, tiny: Path) -> None:
    settings: dict[str, Any] = {"top_k": 1, "request_output_len": 6}
    outputs = []
    for model in (tm.TurboMind.from_pretrained(str(workspace)), tm.TurboMind(workspace), tm.TurboMind(str(tiny))):
        (batch,) = model.create_instance().stream_infer(session_id=0, input_ids=[PROMPT], **settings)
        outputs.append(batch[0][0].tolist())
        assert batch[0][1] == len(outputs[-1]) <= 6
        model.close()
    assert outputs[0] == outputs[1] == outputs[2]
    model = tm.TurboMind.from_pretrained(str(workspace))
    assert model.model.get_prompt("hi") == "<s><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    model.close()


def test_engine_process(workspace: Path) -> None:
    from lmdeploy.async_engine import open_engine
    from lmdeploy.engine.config import EngineConfig

    engine = open_engine(str(workspace), EngineConfig.from_public(device="cpu"), start=ProcessClient)
    try:
        assert (engine.client.info.session_len, engine.client.info.max_batch_size) == (512, 64)
    finally:
        engine.close()


def test_a_quantizer_finds_its_tokenizer(workspace: Path, tmp_path: Path) -> None:
    module.copy_companions(workspace / WEIGHTS, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"tokenizer.json", "tokenizer_config.json"}


# ---- what cannot be converted, and what cannot be loaded ----


def check_nothing_is_left(folder: Path, names: set[str]) -> None:
    assert {path.name for path in folder.iterdir()} == names


@pytest.mark.parametrize(
    ("name", "model", "text"),
    [
        ("internlm-chat-7", "tiny", "no chat template is named 'internlm-chat-7'; did you mean internlm-chat-7b"),
        ("nothing-like-it", "tiny", "`lmdeploy list` shows all"),
        ("llama2", "empty", "has no config.json"),
        ("llama2", "broken", "truncated or damaged"),
        ("llama2", "meta", "Meta's original files"),
    ],
)
def test_bad_input_leaves_nothing(name: str, model: str, text: str, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "consolidated.00.pth").write_bytes(b"")
    shutil.copytree(tiny, tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(LMDeployError, match=text):
        make_workspace(tiny if model == "tiny" else tmp_path / model, tmp_path / "w", name)
    check_nothing_is_left(tmp_path, {"empty", "broken", "meta"})


def test_what_is_there_is_not_overwritten(tiny: Path, tmp_path: Path, workspace: Path) -> None:
    output = tmp_path / "w"
    output.mkdir()
    make_workspace(tiny, output)  # empty: nothing is lost
    before = sorted(output.rglob("*"))
    with pytest.raises(ConfigError, match="exists already; remove it, or choose another folder"):
        make_workspace(tiny, output)
    assert sorted(output.rglob("*")) == before
    with pytest.raises(ConfigError, match="belongs to a workspace already"):
        make_workspace(hub.resolve(str(workspace)), tmp_path / "w2")
    check_nothing_is_left(tmp_path, {"w"})


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing(
    failure: BaseException, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise failure

    monkeypatch.setattr(module, "copy_companions", fail)
    with pytest.raises(ConfigError if isinstance(failure, OSError) else KeyboardInterrupt) as caught:
        make_workspace(tiny, tmp_path / "w")
    if isinstance(failure, OSError):
        assert "cannot be written (No space left on device); make room" in str(caught.value)
    check_nothing_is_left(tmp_path, set())


def test_what_a_killed_run_left_is_replaced(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "w.partial" / "rest").mkdir(parents=True)
    make_workspace(tiny, tmp_path / "w")
    check_nothing_is_left(tmp_path, {"w"})
    assert not (tmp_path / "w" / "rest").exists()


def test_a_workspace_of_an_old_version_is_refused(tmp_path: Path) -> None:
    weights = tmp_path / "old" / WEIGHTS
    weights.mkdir(parents=True)
    (weights / "layers.0.attention.w_qkv.0.qweight").write_bytes(b"")
    ini = "[llama]\nmodel_name = internlm-chat-7b\nweight_type = int4\ngroup_size = 128\n"
    (weights / "config.ini").write_text(ini)
    command = "lmdeploy convert internlm-chat-7b MODEL_FOLDER --model-format awq --group-size 128 --dst-path"
    for path in (tmp_path / "old", weights):
        with pytest.raises(CheckpointError) as caught:
            hub.resolve(str(path))
        assert str(caught.value).endswith(f"{command} {tmp_path / 'old'}-new")
    (weights / "config.ini").write_text("no ini at all")
    with pytest.raises(CheckpointError, match="lmdeploy convert MODEL_NAME MODEL_FOLDER --dst-path"):
        hub.resolve(str(tmp_path / "old"))
    (weights / "layers.0.attention.w_qkv.0.qweight").unlink()
    with pytest.raises(CheckpointError, match=r"not config\.json"):
        hub.resolve(str(tmp_path / "old"))
