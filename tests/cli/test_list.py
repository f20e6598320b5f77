"""`lmdeploy list`: what the tables hold, as text, as JSON, on a terminal."""

from __future__ import annotations

import json

import pytest

from lmdeploy.chat_template import CHAT_TEMPLATES
from lmdeploy.cli import list as list_command
from lmdeploy.cli import main
from lmdeploy.models import ARCHITECTURES
from lmdeploy.quantization import QUANTIZATION


def test_json_holds_every_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: set(values) for name, values in found.items()} == {
        "architectures": set(ARCHITECTURES),
        "chat_templates": set(CHAT_TEMPLATES),
        "quantization": set(QUANTIZATION),
    }


def test_plain_text_has_a_row_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["list", "--engine", "turbomind"]) == 0
    text = capsys.readouterr().out
    names = [*ARCHITECTURES, *CHAT_TEMPLATES, *QUANTIZATION]
    assert sorted(line.split()[0] for line in text.splitlines() if line.startswith("  ")) == sorted(names)
    assert "InternLM2ForCausalLM" in text
    assert "internlm-chat-7b" in text  # an alias of older versions


def test_a_terminal_gets_tables(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    assert main.main(["list"]) == 0
    text = capsys.readouterr().out
    assert "LlamaForCausalLM" in text
    assert "─" in text or "━" in text
    assert len(list_command.collect()) == 3
