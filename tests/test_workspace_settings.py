"""An edit of config.ini takes effect, is outranked by what the caller gives, or is refused in one sentence."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from lmdeploy import ChatTemplateConfig, TurbomindEngineConfig, hub, pipeline
from lmdeploy import turbomind as tm
from lmdeploy.cli.flags import engine_settings
from lmdeploy.engine.config import EngineConfig
from lmdeploy.errors import ConfigError
from lmdeploy.logging import get_logger
from lmdeploy.messages import QuantPolicy
from lmdeploy.models.config import load_config
from lmdeploy.workspace import ConfigIni
from lmdeploy.workspace_settings import with_engine_settings, with_template
from tests.cli.command_line import parse
from tests.lite.checkpoints import make_golden
from tests.tiny_model import make_tiny_llama
from tests.workspaces import edit, greedy, make_workspace

LONG_PROMPT = [i % 90 + 3 for i in range(96)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", max_position_embeddings=64)


@pytest.fixture
def workspace(tiny: Path, tmp_path: Path) -> Path:
    return make_workspace(tiny, tmp_path / "workspace")


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterable[pytest.LogCaptureFixture]:
    get_logger().addHandler(caplog.handler)
    caplog.set_level(logging.WARNING)
    yield caplog
    get_logger().removeHandler(caplog.handler)


def settings(weights: Path, line: str = "lmdeploy chat W") -> EngineConfig:
    """What an engine would run with under the flags of a command line."""
    public, overrides = engine_settings(parse(line))
    return with_engine_settings(weights, EngineConfig.from_public(public, **overrides))


# ---- the model ----


@pytest.mark.parametrize(
    ("values", "same_as"),
    [
        ({"rope_theta": 500.0}, {"hf_overrides": {"rope_theta": 500.0}}),
        ({"norm_eps": "0.1 ; a comment"}, {"hf_overrides": {"rms_norm_eps": 0.1}}),
        ({"rope_scaling_factor": "1.0"}, {"rope_scaling_factor": 1.0}),
        ({"rope_scaling_factor": 2}, {"rope_scaling_factor": 2.0}),
        ({"use_dynamic_ntk": 1}, {"rope_scaling_factor": 1.0}),
        ({"use_logn_attn": 1}, {"use_logn_attn": True}),
        (
            {"use_logn_attn": "True", "max_position_embeddings": 32},
            {"use_logn_attn": True, "hf_overrides": {"max_position_embeddings": 32}},
        ),
    ],
)
def test_an_edit_changes_the_model_as_a_flag_does(
    values: dict[str, Any], same_as: dict[str, Any], workspace: Path, tiny: Path
) -> None:
    plain = greedy(tiny, LONG_PROMPT)[1]
    edited = greedy(edit(workspace, **values), LONG_PROMPT)[1]
    flagged = greedy(tiny, LONG_PROMPT, **same_as)[1]
    assert torch.equal(edited, flagged)
    assert not torch.allclose(edited[-1], plain[-1], atol=1e-3)


def test_what_a_model_brings_can_be_turned_off(tmp_path: Path) -> None:
    workspace = make_workspace(make_golden("qwen/7b-ntk-logn", tmp_path / "model"), tmp_path / "w", "qwen-7b")
    before = load_config(edit(workspace))
    assert before.rope is not None
    assert (before.rope.kind, before.logn_length is None) == ("dynamic_by_prompt", False)
    after = load_config(edit(workspace, use_dynamic_ntk=0, use_logn_attn=0))
    assert after.rope is not None
    assert (after.rope.kind, after.logn_length) == ("default", None)


def test_flags_outrank_edits_of_the_model(workspace: Path) -> None:
    weights = edit(workspace, rope_theta=500.0, max_position_embeddings=32)
    config = load_config(weights, {"rope_theta": 700.0})
    assert config.rope is not None
    assert (config.rope.theta, config.rope.trained_length, config.max_position_embeddings) == (700.0, 32, 32)


def test_the_end_token(workspace: Path) -> None:
    assert load_config(edit(workspace, end_id=1)).eos_token_ids == (1,)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"head_num": 8}, "head_num = 8: the weights were made with 4; put that back"),
        ({"weight_type": "int4"}, "weight_type = int4: the weights were made with fp32"),
        ({"rope_theta": 0}, "rope_theta = 0: give a number above 0"),
        ({"norm_eps": "nan"}, "norm_eps = nan: give a number above 0"),
        ({"rope_scaling_factor": -1}, "rope_scaling_factor = -1: give a number from 0"),
        ({"rope_theta": "large"}, "rope_theta = large: give a number"),
        ({"use_logn_attn": 0.5}, "use_logn_attn = 0.5: give a whole number"),
    ],
)
def test_edits_that_cannot_be(values: dict[str, Any], text: str, workspace: Path) -> None:
    weights = edit(workspace, **values)
    with pytest.raises(ConfigError) as caught:
        load_config(weights)
    assert str(caught.value).startswith(f"{weights / 'config.ini'}: {text}")


def test_a_model_without_rotary_embedding(tmp_path: Path) -> None:
    workspace = make_workspace(make_golden("falcon/rw-1b-alibi", tmp_path / "model"), tmp_path / "w", "falcon")
    assert load_config(edit(workspace)).rope is None
    with pytest.raises(ConfigError, match="this model has no rotary embedding"):
        load_config(edit(workspace, rope_theta=500.0))


# ---- the engine ----


def test_a_new_workspace_changes_nothing_but_the_batch(workspace: Path, warnings: pytest.LogCaptureFixture) -> None:
    assert settings(edit(workspace)) == EngineConfig(session_len=64, max_batch_size=64)
    assert not warnings.records


EDITS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "session_len": ({"session_len": 40}, {"session_len": 40}),
    "max_batch_size": ({"max_batch_size": 3}, {"max_batch_size": 3}),
    "block": ({"cache_block_seq_len": 16}, {"block_size": 16}),
    "prefill": ({"max_context_token_num": 300}, {"max_prefill_token_num": 300}),
    "share": ({"cache_max_entry_count": 0.5}, {"cache_max_entry_count": 0.5}),
    # Version 0.0.x counted sequences of session_len tokens.
    "sequences": (
        {"cache_max_entry_count": 48, "session_len": 130},
        {"cache_max_entry_count": 144, "session_len": 130},
    ),
    "int8": ({"quant_policy": 8}, {"quant_policy": QuantPolicy.INT8}),
    "int4": ({"quant_policy": 4}, {"quant_policy": QuantPolicy.INT4}),
    "by name": ({"quant_policy": "k8v4"}, {"quant_policy": QuantPolicy.K8V4}),
    "dtype": ({"data_type": "float32"}, {"dtype": "float32"}),
}


@pytest.mark.parametrize("edits", EDITS)
def test_an_edit_sets_the_engine(edits: str, workspace: Path, warnings: pytest.LogCaptureFixture) -> None:
    values, expected = EDITS[edits]
    found = settings(edit(workspace, **values))
    assert found == EngineConfig(**{"session_len": 64, "max_batch_size": 64, **expected})
    assert "edited settings are in force unless flags say otherwise: " in warnings.text
    assert all(f"{key} = {value}" in warnings.text for key, value in values.items())
    assert len(warnings.records) == 1


def test_flags_outrank_edits_even_with_their_default(workspace: Path) -> None:
    weights = edit(workspace, quant_policy=8, session_len=40, cache_max_entry_count=0.5, cache_block_seq_len=16)
    found = settings(weights, "lmdeploy chat W --quant-policy 4 --session-len 50 --cache-max-entry-count 0.3")
    assert (found.quant_policy, found.session_len, found.cache_max_entry_count) == (QuantPolicy.INT4, 50, 0.3)
    assert found.block_size == 16
    found = settings(weights, "lmdeploy chat W --quant-policy 0 --cache-block-seq-len 64 --cache-max-entry-count 0.8")
    assert (found.quant_policy, found.block_size, found.cache_max_entry_count) == (QuantPolicy.NONE, 64, None)


def test_scale_files_mark_the_time_when_4_meant_int8(workspace: Path, warnings: pytest.LogCaptureFixture) -> None:
    weights = edit(workspace, quant_policy=4)
    (weights / "layers.0.past_kv_scale.0.weight").write_bytes(b"\0" * 16)
    assert settings(weights).quant_policy == QuantPolicy.INT8
    assert "quant_policy 4 is int8 here, as its time meant" in warnings.text
    assert settings(weights, "lmdeploy chat W --quant-policy 4").quant_policy == QuantPolicy.INT8
    assert settings(weights, "lmdeploy chat W --quant-policy 0").quant_policy == QuantPolicy.NONE


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"quant_policy": 3}, "quant_policy='3': use one of none"),
        ({"session_len": 0}, "session_len=0: give a whole number of at least 1"),
        ({"session_len": "long"}, "session_len = long: give a number"),
        ({"cache_max_entry_count": 1.5}, "cache_max_entry_count=1.5: give a share"),
        ({"tensor_para_size": 2}, "tensor_para_size = 2: more than one GPU is not supported yet"),
        ({"data_type": "int3"}, "dtype='int3': use auto"),
    ],
)
def test_settings_that_cannot_be(values: dict[str, Any], text: str, workspace: Path) -> None:
    weights = edit(workspace, **values)
    with pytest.raises(ConfigError) as caught:
        settings(weights)
    assert str(caught.value).startswith(f"{weights / 'config.ini'}: {text}")


def test_a_misspelt_key_is_named(workspace: Path, warnings: pytest.LogCaptureFixture) -> None:
    settings(edit(workspace, quant_polcy=4))
    assert "the key quant_polcy has no effect; did you mean quant_policy?" in warnings.text


@pytest.mark.parametrize(
    ("text", "reason"),
    [("model_name = x", "cannot be read"), ("[a]\n[b]\n", "it needs one"), ("", "it needs one"), ("\xff", "cannot be")],
)
def test_a_file_that_is_no_ini_file(text: str, reason: str, workspace: Path) -> None:
    weights = edit(workspace)
    (weights / "config.ini").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=reason):
        ConfigIni(weights)


# ---- the chat template ----


def test_model_name_is_the_template(workspace: Path) -> None:
    for name, opening in (
        ("internlm-chat-7b", "<s><|User|>:hi"),
        ("llama2", "<s>[INST] hi"),
        ("hf", "<|im_start|>user"),
    ):
        edit(workspace, model_name=name)
        with pipeline(str(workspace)) as pipe:
            ids = pipe.async_engine.encode("hi")
            assert pipe.tokenizer.decode(ids, skip_special_tokens=False).startswith(opening)


def test_a_template_that_is_asked_for_outranks_it(workspace: Path) -> None:
    weights = edit(workspace)
    assert with_template(weights, None) == ChatTemplateConfig(model_name="internlm2")
    assert with_template(weights, ChatTemplateConfig("llama2")) == ChatTemplateConfig("llama2")
    assert with_template(weights, "own.jinja") == "own.jinja"
    parts = ChatTemplateConfig(capability="completion")
    assert with_template(weights, parts) == ChatTemplateConfig("internlm2", capability="completion")
    assert with_template(edit(workspace, model_name=""), parts) == parts
    with pytest.raises(ConfigError, match=r"config\.ini: model_name = internlm-chat: no chat template|did you mean"):
        with_template(edit(workspace, model_name="internlm_2"), None)


# ---- everything at once ----


def test_edits_reach_a_running_engine(workspace: Path) -> None:
    edit(workspace, session_len=48, quant_policy=8, cache_max_entry_count=3, max_batch_size=2)
    with pipeline(str(workspace)) as pipe:
        info = pipe.async_engine.client.info
        assert (info.session_len, info.num_blocks, info.max_batch_size) == (48, 3, 2)
    with pipeline(str(workspace), backend_config=TurbomindEngineConfig(session_len=20, max_batch_size=5)) as pipe:
        info = pipe.async_engine.client.info
        assert (info.session_len, info.num_blocks, info.max_batch_size) == (20, 3, 5)
    model = tm.TurboMind.from_pretrained(str(workspace), session_len=30, quant_policy=0)
    assert model.engine.client.info.session_len == 30
    model.close()
    assert hub.resolve(str(workspace)).name == "weights"


def test_the_page_explains_every_key(workspace: Path) -> None:
    text = (Path(__file__).parent.parent / "docs" / "workspace.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in text.split("## config.ini")[1].splitlines() if line.startswith("| `")]
    assert {key.strip(" `") for row in rows for key in row.split(",")} == set(ConfigIni(edit(workspace)).keys)
