"""Which template a model gets: the user's word, its own Jinja, its architecture and vocabulary, and never its path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lmdeploy.chat_template import CHAT_TEMPLATES, choose_chat_template
from lmdeploy.chat_template.config import ChatTemplateConfig
from lmdeploy.chat_template.guess import _INTERNVL, _MODELS
from lmdeploy.chat_template.jinja import JinjaTemplate
from lmdeploy.errors import ConfigError
from lmdeploy.tokenizer import Tokenizer
from tests.tokenizer.tiny_vocabularies import train_byte_level, write_json

QUESTION = [{"role": "user", "content": "q"}]


def make_tokenizer(
    folder: Path, special: tuple[str, ...] = (), template: str | None = None, **config: Any
) -> Tokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    train_byte_level(special=special).save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"chat_template": template})
    write_json(folder / "config.json", config)
    return Tokenizer(folder)


@pytest.fixture
def plain(tmp_path: Path) -> Tokenizer:
    return make_tokenizer(tmp_path / "plain")


@pytest.fixture
def own(tmp_path: Path) -> Tokenizer:
    return make_tokenizer(
        tmp_path / "own", template="own:{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}"
    )


def test_the_models_own_template_comes_first(own: Tokenizer) -> None:
    template = choose_chat_template(own.path, own, {"architectures": ["InternLM2ForCausalLM"]})
    assert template.name == "hf"
    assert template.render(QUESTION) == "own:user=q;"


@pytest.mark.parametrize(
    ("config", "special", "name"),
    [
        ({"architectures": ["InternLMForCausalLM"]}, (), "internlm"),
        ({"architectures": ["InternLM2ForCausalLM"]}, (), "internlm2"),
        ({"architectures": ["QWenLMHeadModel"]}, (), "qwen"),
        ({"architectures": ["BaichuanForCausalLM"]}, (), "baichuan2"),
        ({"architectures": ["ChatGLMModel"], "model_type": "chatglm"}, (), "chatglm"),
        ({"architectures": ["ChatGLMModel"], "model_type": "chatglm"}, ("<|assistant|>",), "chatglm3"),
        ({"architectures": ["ChatGLMModel"], "model_type": "chatglm"}, ("<|assistant|>", "<sop>"), "glm4"),
        ({"architectures": ["Glm4ForCausalLM"]}, (), "glm4"),
        ({"architectures": ["InternVLChatModel"], "template": "Hermes-2"}, (), "internvl-zh-hermes2"),
        ({"architectures": ["LlavaLlamaForCausalLM"]}, (), "llava-v1"),
        ({"architectures": ["LlavaLlamaForCausalLM"]}, ("<|im_start|>",), "llava-chatml"),
        ({"architectures": ["LlamaForCausalLM"], "vocab_size": 64000}, ("<|im_start|>",), "yi"),
        ({"architectures": ["LlamaForCausalLM"]}, ("<|im_start|>",), "chatml"),
        ({"architectures": ["LlamaForCausalLM"]}, ("<|start_header_id|>",), "llama3"),
        ({"architectures": ["LlamaForCausalLM"]}, ("▁<PRE>",), "codellama"),
        ({"model_type": "internlm2"}, (), "internlm2"),
        ({"architectures": ["LlamaForCausalLM"]}, (), "unknown"),
        ({"architectures": ["BaiChuanForCausalLM"], "model_type": "baichuan"}, (), "unknown"),
    ],
)
def test_architecture_and_vocabulary_name_a_template(
    config: dict[str, Any], special: tuple[str, ...], name: str, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(tmp_path / "qwen-internlm2-chat-llama3", special)
    assert choose_chat_template(tokenizer.path, tokenizer, config).name == name


def test_tables_name_templates_that_exist() -> None:
    assert {*_MODELS, *_INTERNVL.values()} <= set(CHAT_TEMPLATES)


def test_model_type_of_the_tokenizer_where_there_is_no_config(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path, model_type="gemma3")
    assert choose_chat_template(tmp_path, tokenizer, {}).name == "gemma"


def test_an_unknown_template_is_said_when_a_chat_is_rendered(plain: Tokenizer) -> None:
    template = choose_chat_template(plain.path, plain, {"architectures": ["MartianForCausalLM"]})
    assert template.stop_token_ids(plain) == []
    with pytest.raises(ConfigError, match=r"MartianForCausalLM.*--chat-template"):
        template.render(QUESTION)
    config = ChatTemplateConfig(capability="completion")
    assert choose_chat_template(plain.path, plain, {}, config).render(QUESTION) == "q"
    assert choose_chat_template(plain.path, plain, {}, "base").render_ids(QUESTION, plain) == plain.encode("q")


def test_the_user_names_one(own: Tokenizer, tmp_path: Path) -> None:
    assert choose_chat_template(own.path, own, {}, "internlm-chat-7b").name == "internlm"
    assert choose_chat_template(own.path, own, {}, ChatTemplateConfig("llama2")).name == "llama2"
    assert choose_chat_template(own.path, own, {}, "hf").name == "hf"
    with pytest.raises(ConfigError, match="'martian' is unknown"):
        choose_chat_template(own.path, own, {}, "martian")


def test_hf_without_a_template_is_an_error(plain: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="brings none"):
        choose_chat_template(plain.path, plain, {}, "hf")


def test_files_of_parts_and_of_jinja(plain: Tokenizer, tmp_path: Path) -> None:
    parts = tmp_path / "parts.json"
    ChatTemplateConfig("llama2", meta_instruction="M").to_json(str(parts))
    expected = "<s>[INST] <<SYS>>\nM\n<</SYS>>\n\nq [/INST]"
    assert choose_chat_template(plain.path, plain, {}, str(parts)).render(QUESTION) == expected
    jinja = tmp_path / "mine.jinja"
    jinja.write_text("mine {{ messages[0].content }}", encoding="utf-8")
    assert choose_chat_template(plain.path, plain, {}, str(jinja)).render(QUESTION) == "mine q"
    with pytest.raises(ConfigError, match="cannot be read"):
        choose_chat_template(plain.path, plain, {}, str(tmp_path / "missing.jinja"))
    with pytest.raises(ConfigError, match="cannot be read"):
        choose_chat_template(plain.path, plain, {}, str(tmp_path / "missing.json"))


def test_parts_without_a_name(plain: Tokenizer, own: Tokenizer) -> None:
    config = ChatTemplateConfig(user="U:", assistant="A:", meta_instruction="M")
    assert choose_chat_template(plain.path, plain, {}, config).render(QUESTION) == "MU:qA:"
    assert choose_chat_template(own.path, own, {}, config).render(QUESTION) == "MU:qA:"
    brief = ChatTemplateConfig(meta_instruction="M", stop_words=["x"])
    template = choose_chat_template(own.path, own, {}, brief)
    assert isinstance(template, JinjaTemplate)
    assert template.render(QUESTION) == "own:system=M;user=q;"
    assert template.stop_words == ["x"]
    with pytest.raises(ConfigError, match=r"\['user'\] cannot be changed"):
        choose_chat_template(own.path, own, {}, ChatTemplateConfig("hf", user="U"))


def test_another_models_template(plain: Tokenizer, own: Tokenizer) -> None:
    config = ChatTemplateConfig(model_path=str(own.path))
    assert choose_chat_template(plain.path, plain, {}, config).render(QUESTION) == "own:user=q;"


def test_infilling_asks_for_code_llama(own: Tokenizer) -> None:
    template = choose_chat_template(own.path, own, {}, ChatTemplateConfig(capability="infilling"))
    assert template.render([{"role": "user", "content": "a<FILL>b"}]) == "<s><PRE> a <SUF>b <MID>"


def test_baichuans_own_role_ids(plain: Tokenizer) -> None:
    write_json(plain.path / "generation_config.json", {"user_token_id": 7, "assistant_token_id": 8})
    template = choose_chat_template(plain.path, plain, {"architectures": ["BaichuanForCausalLM"]})
    assert template.render_ids(QUESTION, plain) == [7, *plain.encode("q"), 8]
