"""`lmdeploy.model`: templates registered by code written for LMDeploy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from lmdeploy.chat_template import CHAT_TEMPLATES
from lmdeploy.chat_template.named import make_template
from lmdeploy.model import MODELS, BaseChatTemplate, ChatTemplateConfig

MESSAGES = [{"role": "user", "content": "q"}]


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    before = dict(CHAT_TEMPLATES)
    yield
    CHAT_TEMPLATES.clear()
    CHAT_TEMPLATES.update(before)


def test_named_templates_are_there() -> None:
    source = MODELS.get("internlm2")
    assert source is not None
    assert source().get_prompt("q") == "<s><|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert MODELS.get("martian") is None
    assert "llama2" in MODELS.module_dict
    assert ChatTemplateConfig(model_name="qwen").model_name == "qwen"


def test_a_registered_class_of_parts() -> None:
    @MODELS.register_module(name=["mine", "mine-too"])
    class Mine(BaseChatTemplate):
        def __init__(self, user: str = "Q: ", **parts: Any) -> None:
            super().__init__(user=user, eoh="\n", assistant="A: ", **parts)

    assert make_template("mine").render(MESSAGES) == "Q: q\nA:"
    template = make_template("mine-too", user="?", stop_words=["!"])
    assert (template.render(MESSAGES), template.stop_words) == ("?q\nA:", ["!"])
    assert Mine().messages2prompt(MESSAGES) == "Q: q\nA:"
    assert Mine().messages2prompt("q") == "Q: q\nA:"


def test_a_registered_class_with_its_own_messages2prompt() -> None:
    @MODELS.register_module(name="shouting")
    class Shouting(BaseChatTemplate):
        def messages2prompt(self, messages: Any, sequence_start: bool = True, tools: Any = None) -> str:
            text = messages if isinstance(messages, str) else messages[-1]["content"]
            return text.upper() + ("" if tools is None else "+tools")

    template = make_template("shouting")
    assert isinstance(template, Shouting)
    assert template.render(MESSAGES) == "Q"
    assert template.render(MESSAGES, tools=[{}]) == "Q+tools"
