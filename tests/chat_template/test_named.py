"""Named templates: golden prompts of each family, and the layout, ids and stop words they share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from lmdeploy.chat_template import CHAT_TEMPLATES, ChatTemplate, register_chat_template
from lmdeploy.chat_template.base import RenderOptions
from lmdeploy.chat_template.named import TEMPLATE_ALIASES, find_template, make_template
from lmdeploy.chat_template.turns import TurnTemplate
from lmdeploy.errors import ConfigError, InvalidParameter
from lmdeploy.tokenizer import Tokenizer
from tests.tokenizer.tiny_vocabularies import train_byte_level, train_sentencepiece, write_json

QUESTION = [{"role": "user", "content": "q1"}]
DIALOGUE = [*QUESTION, {"role": "assistant", "content": "a1"}, {"role": "user", "content": "q2"}]
WITH_SYSTEM = [{"role": "system", "content": "s"}, *DIALOGUE]

INTERNVL_SYSTEM = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
)

# Name, messages, prompt. The prompts are those of the models' own code.
GOLDEN: list[tuple[str, list[dict[str, str]], str]] = [
    ("base", QUESTION, "q1"),
    ("falcon", QUESTION, "q1"),
    ("internlm", QUESTION, "<s><|User|>:q1<eoh>\n<|Bot|>:"),
    ("internlm", DIALOGUE, "<s><|User|>:q1<eoh>\n<|Bot|>:a1<eoa>\n<|User|>:q2<eoh>\n<|Bot|>:"),
    (
        "internlm",
        [*DIALOGUE, {"role": "assistant", "content": "a2"}, {"role": "user", "content": "q3"}],
        "<s><|User|>:q1<eoh>\n<|Bot|>:a1<eoa>\n<s><|User|>:q2<eoh>\n<|Bot|>:a2<eoa>\n<|User|>:q3<eoh>\n<|Bot|>:",
    ),
    ("internlm2", QUESTION, "<s><|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n"),
    (
        "internlm2",
        WITH_SYSTEM,
        "<s><|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n"
        "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n",
    ),
    (
        "qwen",
        WITH_SYSTEM[:2],
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n",
    ),
    ("yi", QUESTION, "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n"),
    ("chatglm", QUESTION, "[Round 1]\n\n问：q1\n\n答："),
    ("chatglm", DIALOGUE, "[Round 1]\n\n问：q1\n\n答：a1\n\n[Round 2]\n\n问：q2\n\n答："),
    ("deepseek", QUESTION, "User: q1\n\nAssistant:"),
    (
        "deepseek",
        WITH_SYSTEM,
        "s\n\nUser: q1\n\nAssistant: a1<｜end▁of▁sentence｜>User: q2\n\nAssistant:",
    ),
    ("deepseek-vl", WITH_SYSTEM[:2], "s\n\nUser: q1\n\nAssistant:"),
    (
        "internlm-xcomposer2",
        QUESTION,
        "[UNUSED_TOKEN_146]user\nq1[UNUSED_TOKEN_145]\n[UNUSED_TOKEN_146]assistant\n",
    ),
    (
        "internvl-internlm2",
        DIALOGUE,
        f"<|im_start|>system\n{INTERNVL_SYSTEM}<|im_end|><|im_start|>user\nq1<|im_end|><|im_start|>assistant\na1<|im_end|>"
        "<|im_start|>user\nq2<|im_end|><|im_start|>assistant\n",
    ),
    (
        "internvl-phi3",
        QUESTION,
        f"<|system|>\n{INTERNVL_SYSTEM}<|end|><|user|>\nq1<|end|><|assistant|>\n",
    ),
    (
        "internvl2_5",
        WITH_SYSTEM[:2],
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n",
    ),
    ("llama2", QUESTION, "<s>[INST] q1 [/INST]"),
    (
        "llama2",
        WITH_SYSTEM,
        "<s>[INST] <<SYS>>\ns\n<</SYS>>\n\nq1 [/INST] a1 </s><s>[INST] q2 [/INST]",
    ),
    ("mistral", DIALOGUE, "<s>[INST] q1 [/INST] a1</s>[INST] q2 [/INST]"),
    (
        "gemma",
        WITH_SYSTEM,
        "<bos><start_of_turn>user\ns\n\nq1<end_of_turn>\n<start_of_turn>model\na1<end_of_turn>\n"
        "<start_of_turn>user\nq2<end_of_turn>\n<start_of_turn>model\n",
    ),
    (
        "llama3",
        WITH_SYSTEM[:2],
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\ns<|eot_id|><|start_header_id|>user<|end_header_id|>"
        "\n\nq1<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    (
        "phi-3",
        DIALOGUE,
        "<|user|>\nq1<|end|>\n<|assistant|>\na1<|end|>\n<|user|>\nq2<|end|>\n<|assistant|>\n",
    ),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_byte_level(special=["<s>", "<|im_start|>", "<|im_end|>"]).save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"bos_token": "<s>", "add_bos_token": True})
    return Tokenizer(folder)


@pytest.mark.parametrize(("name", "messages", "prompt"), GOLDEN)
def test_golden_prompts(name: str, messages: list[dict[str, str]], prompt: str) -> None:
    assert make_template(name).render(messages) == prompt


@pytest.mark.parametrize("name", sorted(CHAT_TEMPLATES))
def test_every_template_holds_its_conversation_in_order(name: str) -> None:
    template = make_template(name)
    text = template.render(WITH_SYSTEM)
    assert template.name == name
    positions = [text.index(part) for part in ("s", "q1", "a1", "q2")]
    assert positions[1:] == sorted(positions[1:])
    assert text.startswith(template.render(WITH_SYSTEM[:3], add_generation_prompt=False))
    assert not text.endswith(" ")


def test_aliases_of_old_versions() -> None:
    assert set(TEMPLATE_ALIASES.values()) <= set(CHAT_TEMPLATES)
    assert not set(TEMPLATE_ALIASES) & set(CHAT_TEMPLATES)
    for alias, name in (
        ("internlm-chat-7b", "internlm"),
        ("internlm-chat-20b", "internlm"),
        ("qwen-7b", "qwen"),
        ("llama-2-chat", "llama2"),
        ("baichuan2-7b", "baichuan2"),
        ("llama", "base"),
    ):
        assert make_template(alias).name == name


def test_get_prompt_continues_a_conversation() -> None:
    template = make_template("internlm2")
    assert template.get_prompt("q1") == template.prompt("q1") == template.render(QUESTION)
    assert (
        template.get_prompt("q2", sequence_start=False)
        == "<|im_end|>\n<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n"
    )
    assert make_template("base").get_prompt("q", sequence_start=False) == "q"


def test_parts_replace_the_templates_own() -> None:
    template = make_template("qwen", meta_instruction="M", user="U:", stop_words=["!"])
    assert template.prompt("q") == "<|im_start|>system\nM<|im_end|>\nU:q<|im_end|>\n<|im_start|>assistant\n"
    assert template.stop_words == ["!"]
    assert make_template("qwen").stop_words == ["<|im_end|>"]
    with pytest.raises(ConfigError, match="does not take these parts"):
        make_template("qwen", colour="red")
    with pytest.raises(ConfigError, match=r"known are .*qwen"):
        make_template("martian")


def test_continue_final_message() -> None:
    started = [*QUESTION, {"role": "assistant", "content": "It is "}]
    template = make_template("internlm2")
    expected = "<s><|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\nIt is "
    assert template.render(started, continue_final_message=True) == expected
    with pytest.raises(InvalidParameter, match="no answer to go on from"):
        template.render(QUESTION, continue_final_message=True)


def test_capability_completion_leaves_text_alone(tokenizer: Tokenizer) -> None:
    template = make_template("qwen", capability="completion")
    assert template.prompt("Once upon") == "Once upon"
    assert template.render_ids([{"role": "user", "content": "Once"}], tokenizer) == tokenizer.encode("Once")


def test_tools_and_their_answers() -> None:
    tools = [{"type": "function", "function": {"name": "f", "description": "é"}}]
    template = make_template("internlm2")
    listed = '<|im_start|>system name=<|plugin|>\n[{"name": "f", "description": "é"}]<|im_end|>\n'
    assert template.render(QUESTION, tools=tools).startswith("<s>" + listed)
    answer = [*QUESTION, {"role": "tool", "content": "42"}]
    assert "<|im_start|>environment\n42<|im_end|>\n" in template.render(answer)
    with pytest.raises(InvalidParameter, match="no form for tools"):
        make_template("llama2").render(QUESTION, tools=tools)
    with pytest.raises(InvalidParameter, match="no form for messages of a tool"):
        make_template("llama2").render(answer)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one"),
        ("text", "give a list"),
        ([{"content": "q"}], r"messages\[0\]"),
        ([*QUESTION, {"role": "user", "content": 3}], r"messages\[1\]"),
        ([{"role": "king", "content": "q"}], "role='king'"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "image_url"),
    ],
)
def test_wrong_messages_are_named(messages: Any, message: str) -> None:
    with pytest.raises(InvalidParameter, match=message):
        make_template("qwen").render(messages)


def test_text_parts_are_joined_and_none_is_empty() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": None}]
    assert make_template("llama2").render(messages, add_generation_prompt=False) == "<s>[INST] a\nb [/INST]  </s>"


def test_begin_token_comes_once_and_from_the_vocabulary(tokenizer: Tokenizer) -> None:
    ids = make_template("internlm2").render_ids(QUESTION, tokenizer)
    assert ids.count(tokenizer.bos_token_id or 0) == 1
    assert ids[:2] == [tokenizer.bos_token_id, tokenizer.special_tokens["<|im_start|>"]]
    foreign = make_template("gemma").render_ids(QUESTION, tokenizer)
    assert foreign[0] == tokenizer.bos_token_id
    assert "<bos>" not in tokenizer.decode(foreign, skip_special_tokens=False)


def test_stop_words_that_are_single_tokens(tokenizer: Tokenizer) -> None:
    template = make_template("internlm2")
    assert template.stop_words == ["<|im_end|>", "<|action_end|>"]
    assert template.stop_token_ids(tokenizer) == [tokenizer.special_tokens["<|im_end|>"]]


def test_baichuan_prompts_are_ids(tokenizer: Tokenizer) -> None:
    template = make_template("baichuan2")

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    expected = [*ids("s"), 195, *ids("q1"), 196, *ids("a1"), 195, *ids("q2"), 196]
    assert template.render_ids(WITH_SYSTEM, tokenizer) == expected
    started = [*QUESTION, {"role": "assistant", "content": "It is"}]
    assert template.render_ids(started, tokenizer, RenderOptions(continue_final_message=True)) == [
        195,
        *ids("q1"),
        196,
        *ids("It is"),
    ]
    assert make_template("baichuan2", user_token_id=5).render_ids(QUESTION, tokenizer)[0] == 5


def test_chatglm2_prompts_begin_with_their_ids(tmp_path: Path) -> None:
    model = train_sentencepiece()
    size = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()
    (tmp_path / "tokenizer.model").write_bytes(model)
    write_json(tmp_path / "config.json", {"model_type": "chatglm"})
    tokenizer = Tokenizer(tmp_path)
    ids = make_template("chatglm").render_ids(QUESTION, tokenizer)
    assert ids[:2] == [size + 1, size + 3]
    assert tokenizer.decode(ids) == "[Round 1]\n\n问：q1\n\n答："


def test_code_llama_infilling(tmp_path: Path) -> None:
    model = train_sentencepiece(user_defined_symbols=["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"])
    (tmp_path / "tokenizer.model").write_bytes(model)
    tokenizer = Tokenizer(tmp_path)
    template = make_template("codellama", capability="infilling")
    pre, suffix, middle, end = (tokenizer.token_to_id(f"▁<{name}>") for name in ("PRE", "SUF", "MID", "EOT"))
    ids = template.render_ids([{"role": "user", "content": "def add(<FILL>):\n    pass"}], tokenizer)
    head = tokenizer.encode("def add(", add_special_tokens=False)
    assert ids[: len(head) + 3] == [1, pre, *head, suffix]
    assert ids[-1] == middle
    assert tokenizer.decode(ids[len(head) + 3 : -1]) == "):\n    pass"
    assert template.stop_token_ids(tokenizer) == [end]
    assert template.prompt("a<FILL>b") == "<s><PRE> a <SUF>b <MID>"
    with pytest.raises(InvalidParameter, match="<FILL>"):
        template.prompt("no mark")
    assert make_template("codellama").render(QUESTION) == make_template("llama2").render(QUESTION)


def test_infilling_needs_the_models_tokens(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="vocabulary lacks"):
        make_template("codellama", capability="infilling").render_ids(
            [{"role": "user", "content": "a<FILL>b"}], tokenizer
        )


def test_users_can_register_templates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmdeploy.chat_template.named.CHAT_TEMPLATES", names := dict(CHAT_TEMPLATES))

    @register_chat_template("mine", "qwen-7b")
    def mine(**parts: Any) -> ChatTemplate:
        return TurnTemplate(**{"name": "mine", "user": "Q: ", "assistant": "A: ", **parts})

    assert names["mine"] is find_template("qwen-7b") is mine
    assert make_template("mine", eoh="\n").prompt("q") == "Q: q\nA:"
