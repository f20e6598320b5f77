"""The loop of a chat: reads prompts from a terminal or a pipe, obeys commands, prints answers. It knows no model.

Answers go to stdout, everything else to stderr.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Protocol, TextIO

from lmdeploy.cli.conversation import AnswerStats, Conversation
from lmdeploy.errors import PromptTooLong, RequestError

SESSION_FULL = "WARNING: exceed session max length. Please end the session."
_HISTORY_LINES = 1000
_HOW_TO = "exit quits, end forgets the conversation, Ctrl-C stops an answer, /help lists the commands."


class Reader(Protocol):
    """Where prompts come from."""

    is_single_line: bool

    def read(self) -> str | None:
        """The next prompt, without surrounding blank lines; None at the end. May raise KeyboardInterrupt."""


class PipeReader:
    """Prompts from a file or pipe: a blank line or the end of file ends one; with is_single_line every line is one."""

    def __init__(self, stream: TextIO, is_single_line: bool = False) -> None:
        self.is_single_line = is_single_line
        self._stream = stream

    def read(self) -> str | None:
        lines: list[str] = []
        for line in self._stream:
            line = line.rstrip("\r\n")
            if line.strip():
                lines.append(line)
            if lines and (self.is_single_line or not line.strip() or lines == ["exit"] or lines == ["end"]):
                break
        return "\n".join(lines) if lines else None


class TerminalReader:
    """Prompts typed at a terminal: an empty line, or `sentinel` at the end of one, ends a prompt.

    A first line that is a command is taken at once. Lines are edited and remembered by readline where Python has it.
    """

    def __init__(self, is_single_line: bool = False, sentinel: str = "", history: Path | None = None) -> None:
        self.is_single_line = is_single_line
        self._sentinel = sentinel
        self._history = history
        self._readline = _load_readline(history)

    def read(self) -> str | None:
        lines: list[str] = []
        while True:
            try:
                line = self._input("" if lines else self._prompt())
            except EOFError:
                return "\n".join(lines) if lines else None
            if not lines and (self.is_single_line or not line.strip() or is_command(line)):
                return line.strip()
            if self._sentinel and line.rstrip().endswith(self._sentinel):
                return "\n".join([*lines, line.rstrip().removesuffix(self._sentinel)]).strip()
            if not self._sentinel and not line:
                return "\n".join(lines)
            lines.append(line)

    def save_history(self) -> None:
        """Write the lines typed so far to the history file; a file that cannot be written is no reason to fail."""
        if self._readline is None or self._history is None:
            return
        try:
            self._history.parent.mkdir(parents=True, exist_ok=True)
            self._readline.write_history_file(str(self._history))
        except OSError:
            return

    def _prompt(self) -> str:
        if self.is_single_line:
            return "\n>>> "
        return (
            f"\nenter {self._sentinel} to end the input >>> " if self._sentinel else "\ndouble enter to end input >>> "
        )

    @staticmethod
    def _input(prompt: str) -> str:
        if sys.stdout.isatty():
            return input(prompt)
        print(prompt, end="", file=sys.stderr, flush=True)  # stdout is a file: answers only
        return input()


class _Readline(Protocol):
    def read_history_file(self, name: str) -> None: ...
    def write_history_file(self, name: str) -> None: ...
    def set_history_length(self, length: int) -> None: ...


def _load_readline(history: Path | None) -> _Readline | None:
    """Importing readline is what switches line editing on; Windows has none."""
    try:
        import readline
    except ImportError:
        return None
    readline.set_history_length(_HISTORY_LINES)
    if history is not None and history.is_file():
        try:
            readline.read_history_file(str(history))
        except OSError:
            return readline
    return readline


class Repl:
    """Asks the conversation what the reader brings, until `exit`, the end of input, or a second Ctrl-C in a row."""

    def __init__(
        self,
        conversation: Conversation,
        reader: Reader,
        *,
        is_terminal: bool,
        status: Callable[[], str] = lambda: "",
        out: TextIO | None = None,
        err: TextIO | None = None,
    ) -> None:
        """is_terminal: whether lines that begin with `/` may be commands. status: what `/stats` adds about the engine."""
        self._conversation = conversation
        self._reader = reader
        self._is_terminal = is_terminal
        self._status = status
        self._out = out or sys.stdout
        self._err = err or sys.stderr

    def run(self) -> None:
        is_interrupted = False
        while True:
            try:
                text = self._reader.read()
            except KeyboardInterrupt:
                if is_interrupted:
                    self.tell("")
                    return
                is_interrupted = True
                self.tell("\nPress Ctrl-C once more, or type exit, to quit.")
                continue
            is_interrupted = False
            if text is None or text.strip() == "exit":
                return
            if text.strip():
                self.handle(text)

    def handle(self, text: str) -> None:
        """Obey a command or answer a prompt."""
        word, _, rest = text.strip().partition(" ")
        if text.strip() == "end":
            self._conversation.reset()
            self.tell("The session has ended; a new one begins.")
        elif self._is_terminal and word in COMMANDS:
            COMMANDS[word][0](self, rest.strip())
        else:
            self.answer(text)

    def answer(self, text: str) -> None:
        """Print the answer as it comes, then what it cost. Ctrl-C ends the answer only."""
        conversation = self._conversation
        try:
            with closing(conversation.answer(text)) as pieces:
                self._print(pieces)
        except KeyboardInterrupt:
            self.tell("\n(stopped)")
        except PromptTooLong:
            self.tell(SESSION_FULL)
            return
        except RequestError as error:
            self.tell(f"error: {error}")
            return
        self.tell(describe(conversation.last))
        if conversation.is_full:
            self.tell(SESSION_FULL)

    def tell(self, text: str) -> None:
        """A line for the user that is no answer."""
        print(text, file=self._err, flush=True)

    def _print(self, pieces: Iterator[str]) -> None:
        for piece in pieces:
            self._out.write(piece)
            self._out.flush()
        self._out.write("\n")
        self._out.flush()

    # ---- commands ----

    def _help(self, rest: str) -> None:
        rows = [
            ("exit", "quit"),
            ("end", "forget the conversation"),
            ("Ctrl-C", "stop the answer; twice at the prompt: quit"),
        ]
        rows += [(name, help_text) for name, (_, help_text) in COMMANDS.items()]
        for name, help_text in rows:
            self.tell(f"  {name:<10} {help_text}")

    def _stats(self, rest: str) -> None:
        total = self._conversation.total
        self.tell(f"session: {len(self._conversation.turns)} messages; {describe(total)}")
        if status := self._status():
            self.tell(status)

    def _system(self, rest: str) -> None:
        if rest:
            self._conversation.system = None if rest == "-" else rest
        self.tell(f"system: {self._conversation.system or '(none)'}")

    def _regen(self, rest: str) -> None:
        text = self._conversation.drop_answer()
        if text is None:
            self.tell("There is no answer to make again.")
        else:
            self.answer(text)

    def _save(self, rest: str) -> None:
        messages = self._conversation.messages
        if not rest:
            self.tell("Name the file: /save FILE")
            return
        try:
            text = json.dumps(messages, indent=2, ensure_ascii=False)
            Path(rest).expanduser().write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            self.tell(f"error: {rest} cannot be written: {error.strerror or error}")
            return
        self.tell(f"{len(messages)} messages are in {rest}.")

    def _single(self, rest: str) -> None:
        self._reader.is_single_line = not self._reader.is_single_line
        self.tell("Enter ends a prompt." if self._reader.is_single_line else "An empty line ends a prompt.")


COMMANDS: dict[str, tuple[Callable[[Repl, str], None], str]] = {
    "/help": (Repl._help, "this list"),
    "/stats": (Repl._stats, "what the session has cost, and the engine's blocks"),
    "/system": (Repl._system, "/system TEXT sets the system text, /system - removes it, /system shows it"),
    "/regen": (Repl._regen, "answer the last prompt again"),
    "/save": (Repl._save, "/save FILE writes the messages as JSON"),
    "/single": (Repl._single, "switch between one line and several lines a prompt"),
}


def talk(
    conversation: Conversation,
    *,
    is_terminal: bool,
    is_single_line: bool,
    history: Path,
    sentinel: str = "",
    status: Callable[[], str] = lambda: "",
) -> None:
    """A whole chat over stdin and stdout. history: where the lines typed at a terminal are kept."""
    for stream in (sys.stdout, sys.stdin):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if not is_terminal:
        prompts = sys.stdin or io.StringIO()  # None where the process was started with a closed stdin
        Repl(conversation, PipeReader(prompts, is_single_line), is_terminal=False, status=status).run()
        return
    print(_HOW_TO, file=sys.stderr, flush=True)
    reader = TerminalReader(is_single_line, sentinel, history)
    try:
        Repl(conversation, reader, is_terminal=True, status=status).run()
    finally:
        reader.save_history()


def is_command(line: str) -> bool:
    """Whether a typed line is `exit`, `end` or one of COMMANDS."""
    words = line.split()
    return bool(words) and (line.strip() in ("exit", "end") or words[0] in COMMANDS)


def describe(stats: AnswerStats) -> str:
    """One line: `[31 prompt tokens (20 cached), 42 answered, 45.3 tokens/s, first after 0.21 s]`."""
    parts = [f"{stats.prompt_tokens} prompt tokens ({stats.cached_tokens} cached)", f"{stats.answer_tokens} answered"]
    if stats.tokens_per_s:
        parts.append(f"{stats.tokens_per_s:.1f} tokens/s")
    if stats.first_token_s:
        parts.append(f"first after {stats.first_token_s:.2f} s")
    return f"[{', '.join(parts)}]"
