"""`lmdeploy chat` at a real terminal: double Enter, Ctrl-C, commands, leaving."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.cli.command_line import ROOT
from tests.tiny_model import SPECIAL_TOKENS, make_tiny_llama

pexpect = pytest.importorskip("pexpect")
pytestmark = pytest.mark.skipif(os.name == "nt", reason="pseudo-terminals are POSIX")

PROMPT = "double enter to end input >>> "


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that goes on until it is stopped: its special tokens, end tokens among them, are never the most probable."""
    folder = make_tiny_llama(tmp_path_factory.mktemp("tiny"), max_position_embeddings=1 << 20)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][: len(SPECIAL_TOKENS)] = 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def terminal(tiny: Path, tmp_path: Path) -> Iterator[pexpect.spawn]:
    """A chat with an endless model, waiting for its first prompt."""
    command = ["-m", "lmdeploy", "chat", str(tiny), "--cache-max-entry-count", "4096", "--temperature", "0"]
    env = {**os.environ, "LMDEPLOY_CACHE": str(tmp_path), "LMDEPLOY_DISABLE_CPU_KERNELS": "1", "TERM": "dumb"}
    child = pexpect.spawn(
        sys.executable, command, cwd=str(ROOT), env=env, encoding="utf-8", timeout=40, codec_errors="replace"
    )
    child.delaybeforesend = None
    child.expect_exact(PROMPT)
    yield child
    child.close(force=True)


def test_prompts_interrupts_and_exit(terminal: pexpect.spawn, tmp_path: Path) -> None:
    assert "sampling: greedy" in terminal.before
    terminal.send("hello\nworld\n\n")
    terminal.expect("world")
    terminal.expect(r"[\s\S]{200}")  # the answer is being written
    terminal.sendintr()
    terminal.expect_exact("(stopped)")
    terminal.expect(r"\[\d+ prompt tokens \(0 cached\), \d+ answered, [\d.]+ tokens/s, first after [\d.]+ s\]")
    terminal.expect_exact(PROMPT)
    terminal.send("/stats\n")
    terminal.expect_exact("session: 2 messages")
    terminal.expect_exact("KV blocks are free")
    terminal.expect_exact(PROMPT)
    terminal.send("end\n")
    terminal.expect_exact("a new one begins")
    terminal.expect_exact(PROMPT)
    terminal.sendintr()
    terminal.expect_exact("Press Ctrl-C once more")
    terminal.expect_exact(PROMPT)
    terminal.send("exit\n")
    terminal.expect(pexpect.EOF)
    terminal.wait()
    assert terminal.exitstatus == 0
    history = (tmp_path / "chat_history").read_text(encoding="utf-8")
    assert "hello" in history
    assert "world" in history


def test_single_line_and_two_interrupts(terminal: pexpect.spawn) -> None:
    terminal.send("/single\n")
    terminal.expect_exact("Enter ends a prompt.")
    terminal.expect_exact("\n>>> ")
    terminal.send("hello\n")
    terminal.expect(r"[\s\S]{200}")
    terminal.sendintr()
    terminal.expect_exact("(stopped)")
    terminal.expect_exact("\n>>> ")
    terminal.sendintr()
    terminal.expect_exact("Press Ctrl-C once more")
    terminal.expect_exact("\n>>> ")
    terminal.sendintr()
    terminal.expect(pexpect.EOF)
    terminal.wait()
    assert terminal.exitstatus == 0
    assert "Traceback" not in terminal.before
