"""gpt-oss's Harmony format: an answer of several messages, each on a channel. https://github.com/openai/harmony"""

from __future__ import annotations

from collections.abc import Sequence

from lmdeploy.serve.parsers.scanner import Emit, Steps, ignore
from lmdeploy.serve.parsers.tools import Spell, Tool, ToolParser, quoted

_ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")


class HarmonyParser(ToolParser):
    """Channel `analysis` is reasoning, `final` and the preambles on `commentary` are content, and a message
    `to=functions.NAME` is a call. Text outside of any message is content."""

    def _run(self) -> Steps:
        while True:
            header, marker = "", (yield from self._until(("<|channel|>", "<|message|>", *_ENDS), self._content))
            if marker is None:
                return
            if marker in _ENDS and marker != "<|start|>":
                continue
            if marker != "<|message|>":
                header, marker = yield from self._read_until("<|message|>", "<|end|>", "<|call|>", "<|return|>")
            if marker == "<|message|>":
                yield from self._body(header)

    def _body(self, header: str) -> Steps:
        name = _recipient(header)
        if name is not None:
            self._start_call(name)
            yield from self._space()
            yield from self._until(_ENDS[:3], self._arguments, drops_space=True)
            return
        emit: Emit = self._content
        if "analysis" in header.split("<|channel|>")[-1]:
            emit = self._reasoning
        elif "to=" in header:  # built-in tools, which nobody here runs
            emit = ignore
        if (yield from self._until(_ENDS, emit)) == "<|start|>":  # the next message has begun already
            self._buffer = "<|start|>" + self._buffer

    @classmethod
    def call_rule(cls, tools: Sequence[Tool], spell: Spell, count: str) -> str:
        # An answer ends with its first call, so there is never a second one.
        head = f'{spell("<|channel|>")} "commentary to=functions."'
        body = f' " " {spell("<|constrain|>")} "json" {spell("<|message|>")} @args'
        rules = [f"c{index}: {head} {quoted(tool.name)}{body}{index}" for index, tool in enumerate(tools)]
        choice = " | ".join(f"c{index}" for index in range(len(tools)))
        return "\n".join([f"calls: {choice}", *rules])


def _recipient(header: str) -> str | None:
    """NAME of `to=functions.NAME` in a message's header."""
    _, found, rest = header.partition("to=functions.")
    name = rest.replace("<", " ").split()[0] if found and rest.strip() else ""
    return name or None
