"""Every chat command line of the tutorials parses, whatever version it was written for."""

from __future__ import annotations

import dataclasses

import pytest

from lmdeploy.chat_template.config import ChatTemplateConfig
from lmdeploy.cli import chat
from lmdeploy.cli.flags import engine_settings
from lmdeploy.engine.config import EngineConfig
from lmdeploy.errors import ConfigError
from lmdeploy.messages import PytorchEngineConfig, TurbomindEngineConfig
from tests.cli.command_line import parse, parse_with_notices
from tests.cli.fake_engine import FakeEngine

LINES = {
    "lmdeploy chat MODELS/internlm2-chat-1_8b": ("MODELS/internlm2-chat-1_8b", {}, None),
    "lmdeploy chat PATH --cache-max-entry-count 0.5": ("PATH", {"cache_max_entry_count": 0.5}, None),
    "lmdeploy chat PATH --cache-max-entry-count 0.01": ("PATH", {"cache_max_entry_count": 0.01}, None),
    "lmdeploy chat PATH-4bit --model-format awq": ("PATH-4bit", {"model_format": "awq"}, None),
    "lmdeploy chat PATH-4bit --model-format awq --cache-max-entry-count 0.01": (
        "PATH-4bit",
        {"model_format": "awq", "cache_max_entry_count": 0.01},
        None,
    ),
    "lmdeploy chat PATH-4bit \\\n   --model-format awq \\\n   --cache-max-entry-count 0.4": (
        "PATH-4bit",
        {"model_format": "awq", "cache_max_entry_count": 0.4},
        None,
    ),
    "lmdeploy chat turbomind internlm/internlm-chat-20b-4bit --model-name internlm-chat-20b": (
        "internlm/internlm-chat-20b-4bit",
        {},
        "internlm-chat-20b",
    ),
    "lmdeploy chat turbomind Qwen/Qwen-7B-Chat --model-name qwen-7b": ("Qwen/Qwen-7B-Chat", {}, "qwen-7b"),
    "lmdeploy chat turbomind MODELS/internlm-chat-7b/  --model-name internlm-chat-7b": (
        "MODELS/internlm-chat-7b/",
        {},
        "internlm-chat-7b",
    ),
    "lmdeploy chat turbomind ./workspace": ("./workspace", {}, None),
    "lmdeploy chat": (None, {}, None),
    "lmdeploy chat MODELS/internlm2_5-7b-chat": ("MODELS/internlm2_5-7b-chat", {}, None),
}


@pytest.mark.parametrize("line", LINES)
def test_tutorial_lines(line: str) -> None:
    model, settings, template = LINES[line]
    args = parse(line)
    assert (args.command, args.model, args.chat_template) == ("chat", model, template)
    config, overrides = engine_settings(args, chat.ENGINE_DEFAULTS)
    expected = {"max_batch_size": 1, "enable_prefix_caching": True, **settings}
    assert config == TurbomindEngineConfig(**expected)
    assert not overrides
    engine = EngineConfig.from_public(config)
    assert (engine.max_batch_size, engine.enable_prefix_caching) == (1, True)
    found = chat.template_config(args)
    assert (found.model_name if isinstance(found, ChatTemplateConfig) else found) == template


def test_help_shows_every_flag_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse("lmdeploy chat -h")
    text = " ".join(capsys.readouterr().out.split())
    assert exit_info.value.code == 0
    for flag in ("--session-len", "--adapters", "--dtype", "--speculative-algorithm", "--trust-remote-code", "--tp"):
        assert flag in text
    for default in ("(default: 0.8)", "(default: 64)", "(default: True)", "(default: auto)", "(default: turbomind)"):
        assert default in text


def test_every_flag_of_the_newest_version_parses() -> None:
    line = (
        "lmdeploy chat M --backend pytorch --chat-template t --revision r --download-dir d --trust-remote-code --dtype float16 "
        "--session-len 4096 --cache-max-entry-count 128 --enable-prefix-caching --quant-policy int8 --language-model-only "
        "--model-format gptq --adapters a=x b=y --device cpu --eager-mode --dllm-block-length 4 "
        "--prefix-cache-state-budget 2 --prefix-cache-decode-state-interval 3 --speculative-num-draft-tokens 1"
    )
    config, overrides = engine_settings(parse(line))
    assert config == PytorchEngineConfig(
        revision="r",
        download_dir="d",
        dtype="float16",
        session_len=4096,
        cache_max_entry_count=128,
        enable_prefix_caching=True,
        quant_policy="int8",
        language_model_only=True,
        model_format="gptq",
        adapters={"a": "x", "b": "y"},
        dllm_block_length=4,
        prefix_cache_state_budget=2,
        prefix_cache_decode_state_interval=3,
    )
    assert overrides == {"device": "cpu", "eager_mode": True}
    turbomind, _ = engine_settings(
        parse("lmdeploy chat --rope-scaling-factor 2 --communicator native --cp 1 --async 0 --tp 1")
    )
    assert turbomind == TurbomindEngineConfig(rope_scaling_factor=2.0, communicator="native", async_=0)


@pytest.mark.parametrize("flags", ["--tp 2", "--cp 2", "--adapters x", "--dllm-block-length 4"])
def test_what_is_not_supported_yet_is_refused(flags: str) -> None:
    config, _ = engine_settings(parse(f"lmdeploy chat M {flags}"))
    with pytest.raises(ConfigError, match="not supported yet"):
        EngineConfig.from_public(config)


@pytest.mark.parametrize("flags", ["--speculative-algorithm eagle3", "--speculative-draft-model D"])
def test_speculative_decoding_is_refused(flags: str) -> None:
    with pytest.raises(ConfigError, match="not supported yet"):
        chat.refuse_speculative(parse(f"lmdeploy chat M {flags}"))


def test_the_first_backend_that_has_the_flags_is_taken() -> None:
    assert isinstance(engine_settings(parse("lmdeploy chat"))[0], TurbomindEngineConfig)
    assert isinstance(engine_settings(parse("lmdeploy chat --adapters x"))[0], PytorchEngineConfig)
    pytorch, _ = engine_settings(parse("lmdeploy chat --backend pytorch --cache-block-seq-len 32"))
    assert pytorch == PytorchEngineConfig(block_size=32)
    with pytest.raises(ConfigError, match="--adapters is no setting of the turbomind backend"):
        engine_settings(parse("lmdeploy chat --backend turbomind --adapters x"))
    with pytest.raises(ConfigError, match="--rope-scaling-factor"):
        engine_settings(parse("lmdeploy chat --adapters x --rope-scaling-factor 2"))


def test_python_fire_line() -> None:
    line = (
        "lmdeploy chat turbomind --model_path ./workspace --session_id 1 --cap chat --tp=1 --stream_output True "
        "--request_output_len 64 --enable_prefix_caching False --meta_instruction 'Be brief.'"
    )
    args, notices = parse_with_notices(line)
    shown = {name: getattr(args, name) for name in ("model", "backend", "capability", "system", "max_new_tokens", "tp")}
    assert shown == {
        "model": "./workspace",
        "backend": "turbomind",
        "capability": "chat",
        "system": "Be brief.",
        "max_new_tokens": 64,
        "tp": 1,
    }
    assert args.enable_prefix_caching is False
    assert any("--session_id" in notice and "ignored" in notice for notice in notices)


def test_chat_template_forms(tmp_path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "template.json"
    file.write_text('{"model_name": "qwen", "system": "S"}')
    config = chat.template_config(parse(f"lmdeploy chat --chat-template {file} --capability completion"))
    assert isinstance(config, ChatTemplateConfig)
    set_fields = {name: value for name, value in dataclasses.asdict(config).items() if value is not None}
    assert set_fields == {"model_name": "qwen", "system": "S", "capability": "completion"}
    with pytest.raises(ConfigError, match=r"missing\.json"):
        chat.template_config(parse("lmdeploy chat --chat-template missing.json"))
    assert chat.template_config(parse("lmdeploy chat --chat-template a.jinja")) == "a.jinja"
    with pytest.raises(ConfigError, match="Jinja"):
        chat.template_config(parse("lmdeploy chat --chat-template a.jinja --capability infilling"))


def test_sampling() -> None:
    def config(line: str, is_terminal: bool):  # type: ignore[no-untyped-def]
        return chat.generation_config(parse(line), is_terminal)

    assert not config("lmdeploy chat", is_terminal=False).is_sampling
    assert config("lmdeploy chat", is_terminal=False).max_new_tokens is None
    assert config("lmdeploy chat", is_terminal=True).do_sample is None
    assert config("lmdeploy chat --temperature 0.5 --seed 3", is_terminal=False).is_sampling
    assert not config("lmdeploy chat --temperature 0", is_terminal=True).is_sampling
    given = config("lmdeploy chat --top-p 0.5 --top-k 3 --max-new-tokens 9 --seed 4", is_terminal=True)
    assert (given.top_p, given.top_k, given.max_new_tokens, given.random_seed) == (0.5, 3, 9, 4)


def test_sampling_in_force_is_named() -> None:
    def shown(line: str, is_terminal: bool) -> str:
        return chat.describe_sampling(FakeEngine().effective_config(chat.generation_config(parse(line), is_terminal)))

    assert shown("lmdeploy chat", is_terminal=False) == "greedy"
    assert shown("lmdeploy chat", is_terminal=True).startswith("temperature 0.7, top_p 0.95")
    assert shown("lmdeploy chat --temperature 0", is_terminal=True) == "greedy"
    line = "lmdeploy chat --temperature 0.2 --top-k 5 --seed 1"
    assert shown(line, is_terminal=False) == "temperature 0.2, top_p 0.95, top_k 5, seed 1"
