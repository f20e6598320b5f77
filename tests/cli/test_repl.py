"""The loop of a chat over a scripted engine: commands, interrupts, full sessions, prompts from pipes."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from lmdeploy.cli.conversation import AnswerStats, Conversation
from lmdeploy.cli.repl import SESSION_FULL, PipeReader, Repl, TerminalReader, describe
from lmdeploy.errors import InvalidParameter
from lmdeploy.messages import GenerationConfig
from tests.cli.fake_engine import FakeEngine


class ScriptedReader:
    """Prompts of a list; KeyboardInterrupt among them is a Ctrl-C at the prompt."""

    is_single_line = False

    def __init__(self, prompts: Sequence[str | type[BaseException]]) -> None:
        self._prompts = list(prompts)

    def read(self) -> str | None:
        prompt = self._prompts.pop(0) if self._prompts else None
        if isinstance(prompt, type):
            raise prompt
        return prompt


def chat(
    engine: FakeEngine,
    prompts: Sequence[str | type[BaseException]],
    *,
    is_terminal: bool = True,
    config: GenerationConfig | None = None,
    **settings: object,
) -> tuple[str, str, Conversation]:
    """(stdout, stderr, conversation) of a whole chat."""
    conversation = Conversation(engine, config or GenerationConfig(), **settings)  # type: ignore[arg-type]
    out, err = io.StringIO(), io.StringIO()
    Repl(conversation, ScriptedReader(prompts), is_terminal=is_terminal, out=out, err=err).run()
    return out.getvalue(), err.getvalue(), conversation


def test_history_goes_with_each_prompt_and_end_forgets_it() -> None:
    engine = FakeEngine(["one", "two", "three"])
    out, _, _ = chat(engine, ["a", "b", "end", "c", "exit", "never"], system="S")
    assert out == "one\ntwo\nthree\n"
    system = {"role": "system", "content": "S"}
    first = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "one"}]
    assert engine.prompts == [
        [system, first[0]],
        [system, *first, {"role": "user", "content": "b"}],
        [system, {"role": "user", "content": "c"}],
    ]


def test_stats_are_on_stderr() -> None:
    out, err, conversation = chat(FakeEngine(["abcd"]), ["wxyz"])
    assert out == "abcd\n"
    assert "[4 prompt tokens (2 cached), 4 answered, " in err
    assert (conversation.last.prompt_tokens, conversation.last.answer_tokens) == (4, 4)


def test_describe() -> None:
    stats = AnswerStats(31, 20, 43, first_token_s=0.5, total_s=1.5)
    assert describe(stats) == "[31 prompt tokens (20 cached), 43 answered, 42.0 tokens/s, first after 0.50 s]"
    assert describe(AnswerStats()) == "[0 prompt tokens (0 cached), 0 answered]"


def test_ctrl_c_stops_the_answer_only() -> None:
    engine = FakeEngine(["ab\x03cd", "two"])
    out, err, _ = chat(engine, ["a", "b"])
    assert out == "abtwo\n"
    assert "(stopped)" in err
    assert engine.num_closed_early == 1
    assert engine.prompts[1][:2] == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "ab"}]


def test_ctrl_c_before_the_first_token_takes_the_prompt_back() -> None:
    engine = FakeEngine(["\x03", "two"])
    chat(engine, ["a", "b"])
    assert engine.prompts[1] == [{"role": "user", "content": "b"}]


def test_second_ctrl_c_at_the_prompt_quits() -> None:
    engine = FakeEngine(["one", "two"])
    out, err, _ = chat(engine, [KeyboardInterrupt, "a", KeyboardInterrupt, KeyboardInterrupt, "b"])
    assert out == "one\n"
    assert err.count("Press Ctrl-C once more") == 2


def test_full_session() -> None:
    engine = FakeEngine(["x" * 50, "y"], session_len=20)
    out, err, _ = chat(engine, ["hello", "more", "end", "short"])
    assert out == "x" * 15 + "\ny\n"
    assert err.count(SESSION_FULL) == 2
    assert SESSION_FULL == "WARNING: exceed session max length. Please end the session."
    assert len(engine.prompts) == 2  # the second prompt never reached the engine


def test_refused_prompt_leaves_the_conversation() -> None:
    engine = FakeEngine([InvalidParameter("no such role"), "fine"])
    out, err, _ = chat(engine, ["a", "b"])
    assert out == "fine\n"
    assert "error: no such role" in err
    assert engine.prompts[1] == [{"role": "user", "content": "b"}]


def test_commands(tmp_path: Path) -> None:
    engine = FakeEngine(["one", "two"])
    file = tmp_path / "chat.json"
    prompts = [
        "/regen",
        "/system Be brief",
        "a",
        "/regen",
        f"/save {file}",
        "/stats",
        "/help",
        "/single",
        "/save",
        "/system -",
    ]
    out, err, conversation = chat(engine, prompts, config=GenerationConfig(random_seed=5, temperature=1.0))
    assert out == "one\ntwo\n"
    assert engine.prompts[0] == engine.prompts[1]
    assert [config.random_seed for config in engine.configs if config] == [5, 6]
    saved = json.loads(file.read_text(encoding="utf-8"))
    assert [m["content"] for m in saved] == ["Be brief", "a", "two"]
    assert conversation.system is None
    for text in (
        "no answer to make again",
        "system: Be brief",
        "3 messages are in",
        "/regen",
        "Enter ends",
        "/save FILE",
    ):
        assert text in err
    assert "session: 2 messages" in err


def test_save_that_fails_is_told(tmp_path: Path) -> None:
    _, err, _ = chat(FakeEngine(), [f"/save {tmp_path}/no/such/folder"])
    assert "cannot be written: No such file or directory" in err


def test_from_a_pipe_commands_are_text() -> None:
    engine = FakeEngine(["ok"])
    out, _, _ = chat(engine, ["/help"], is_terminal=False)
    assert (out, engine.prompts[0][-1]["content"]) == ("ok\n", "/help")


def test_completion_prompts_stand_alone() -> None:
    engine = FakeEngine(["one", "two"])
    chat(engine, ["a", "b"], is_chat=False)
    assert engine.prompts == ["a", "b"]


PIPES = {
    "a": ["a"],
    "a\nb\n\nc\n": ["a\nb", "c"],
    "\n\n  \na\n\n\n\nb": ["a", "b"],
    "a\r\n\r\nb\r\n": ["a", "b"],
    "  indented\n\n": ["  indented"],
    "exit\nnever": ["exit", "never"],
    "": [],
    "\n": [],
}


@pytest.mark.parametrize("text", PIPES)
def test_pipe(text: str) -> None:
    reader = PipeReader(io.StringIO(text))
    assert list(iter(reader.read, None)) == PIPES[text]


def test_pipe_with_a_prompt_a_line() -> None:
    reader = PipeReader(io.StringIO("a\n\nb\nc"), is_single_line=True)
    assert list(iter(reader.read, None)) == ["a", "b", "c"]


TYPED = {
    ("hello", "world", ""): "hello\nworld",
    ("hello", "", ""): "hello",
    ("",): "",
    ("exit",): "exit",
    ("/system x y",): "/system x y",
    ("/etc/hosts", "is what?", ""): "/etc/hosts\nis what?",
    ("hello", "exit", ""): "hello\nexit",
    ("unfinished",): "unfinished",
}


@pytest.mark.parametrize("lines", TYPED)
def test_terminal(lines: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    assert TerminalReader().read() == TYPED[lines]


def test_terminal_end_of_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert TerminalReader().read() is None


def test_infilling_ends_with_its_mark(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("def f():\n\n  <FILL>\nreturn x !!\nnext"))
    assert TerminalReader(sentinel="!!").read() == "def f():\n\n  <FILL>\nreturn x"
    captured = capsys.readouterr()
    assert captured.out == ""  # stdout is no terminal here: the prompt must not get between answers
    assert "enter !! to end the input >>> " in captured.err


def test_history_is_kept(tmp_path: Path) -> None:
    readline = pytest.importorskip("readline")
    history = tmp_path / "folder" / "history"
    reader = TerminalReader(history=history)
    readline.add_history("something typed")
    reader.save_history()
    assert "something" in history.read_text()
    readline.clear_history()
    TerminalReader(history=history)
    assert readline.get_history_item(readline.get_current_history_length()) is not None
