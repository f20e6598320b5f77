"""What a served model's answers look like: its formats of tools and reasoning, parsers for an answer, grammars for calls.

It knows no endpoint; the model's formats are told by the server's settings, or by template and vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lmdeploy.async_engine import AsyncEngine
from lmdeploy.chat_template.jinja import JinjaTemplate
from lmdeploy.errors import ConfigError, InvalidGrammar, InvalidParameter, RequestError
from lmdeploy.grammar import MAX_CHARS, part_of, schema_part
from lmdeploy.serve.parsers import (
    AUTO,
    NONE,
    REASONING_PARSERS,
    TOOL_PARSERS,
    guess_reasoning_parser,
    guess_tool_parser,
    pick,
)
from lmdeploy.serve.parsers.events import Chain, Parser
from lmdeploy.serve.parsers.harmony import HarmonyParser
from lmdeploy.serve.parsers.json_formats import HermesParser
from lmdeploy.serve.parsers.prompt import Messages, calls_as_text, speaks_of_tools, tools_as_text
from lmdeploy.serve.parsers.reasoning import CLOSE, OPEN, ThinkParser
from lmdeploy.serve.parsers.special import Cleaned, SpecialTokens
from lmdeploy.serve.parsers.tools import MAX_FORCED_CALLS, Tool, ToolParser, quoted

if TYPE_CHECKING:
    from lmdeploy.serve.service import Job

Thinking = Literal["none", "maybe", "open"]
_TAIL_CHARS = 16
_MAX_PARAMETER_CHARS = MAX_CHARS
_PROBE = [{"role": "user", "content": "?"}]
_PROBE_TOOL = {"type": "function", "function": {"name": "probe", "description": "", "parameters": {"type": "object"}}}


@dataclass(frozen=True)
class Demand:
    """What a request wants of the answer's form. forces: a tool has to be called; many: more than one may be."""

    tools: Sequence[Tool] = ()
    forces: bool = False
    many: bool = True
    response_format: Mapping[str, Any] | None = None


class AnswerFormats:
    """The formats of one served model."""

    def __init__(
        self, engine: AsyncEngine, tool_parser: str | None = AUTO, reasoning_parser: str | None = AUTO
    ) -> None:
        """The names are those of the tables, 'auto' or 'none'; None is 'auto'. Raises ConfigError for any other."""
        self._engine = engine
        tokenizer = engine.tokenizer
        signs = "\n".join([*tokenizer.chat_templates.values(), *tokenizer.special_tokens])
        named = pick("--tool-call-parser", tool_parser, TOOL_PARSERS, guess_tool_parser(signs))
        self.template_has_tools = self._template_has_tools()
        # Without a format of its own a model is told Hermes' in the system text.
        fallback = None if tool_parser == NONE or self.template_has_tools else HermesParser
        self.tool_parser: type[ToolParser] | None = TOOL_PARSERS[named] if named else fallback
        self.reasoning = pick("--reasoning-parser", reasoning_parser, REASONING_PARSERS, guess_reasoning_parser(signs))
        self._special = SpecialTokens(tokenizer.special_tokens)

    @property
    def id_length(self) -> int | None:
        """Characters of a call's id, where the model insists on a number."""
        return None if self.tool_parser is None else self.tool_parser.id_length

    def prompt(
        self, messages: Messages, tools: list[dict[str, Any]] | None
    ) -> tuple[list[Mapping[str, Any]], list[dict[str, Any]] | None]:
        """Messages and tools as the chat template takes them. Raises InvalidParameter if there is no form for tools."""
        if not tools and not speaks_of_tools(messages):
            return list(messages), None
        if self.tool_parser is None:
            raise InvalidParameter(
                "no format of tool calls is known for this model: start the server with --tool-call-parser"
            )
        if isinstance(self._engine.chat_template, JinjaTemplate) and self.template_has_tools:
            return list(messages), tools
        told = calls_as_text(messages, self.tool_parser)
        return (told, tools) if self.template_has_tools else (list(tools_as_text(told, tools)), None)

    def has_parser(self, thinking: Thinking) -> bool:
        """Whether an answer is parsed even without tools."""
        return thinking != "none" or self._is_harmony

    def thinking(self, job: Job) -> Thinking:
        """Whether the answers to a job's prompt begin with thoughts."""
        if self.reasoning is None or self._is_harmony:
            return "none"
        tail = self._end_of_prompt(job).rstrip()
        if tail.endswith(OPEN):
            return "open"
        if tail.endswith(CLOSE):
            return "none"
        return "open" if REASONING_PARSERS[self.reasoning] else "maybe"

    def parser(self, demand: Demand, thinking: Thinking, *, keeps_special_tokens: bool = False) -> Parser | None:
        """For the text of one answer, special tokens spelled out in it; None if there is nothing to find."""
        tool_parser = self.tool_parser if demand.tools else None
        if self._is_harmony:
            tool_parser = HarmonyParser
        stages: list[Parser] = [] if thinking == "none" else [ThinkParser(thinking == "open")]
        if tool_parser is not None:
            stages.append(tool_parser(demand.tools))
        if not stages:
            return None
        chain = Chain(stages)
        return chain if keeps_special_tokens else Cleaned(chain, self._special)

    def grammar(self, demand: Demand, thinking: Thinking) -> dict[str, Any] | None:
        """The response_format for GenerationConfig that enforces the demand; None if any text will do.

        Thoughts stay free; the grammar holds from their end on. Raises InvalidGrammar.
        """
        part = None if demand.response_format is None else part_of(demand.response_format, "answer")
        if not demand.forces and part is None:
            return None
        is_harmony = self._is_harmony
        if not demand.tools and thinking == "none" and not is_harmony:
            return dict(demand.response_format or {})
        choices, rules, parts = [], [], []
        if part is not None and not demand.forces:
            choices.append(self._harmony_final() if is_harmony else "@answer")
            parts.append(part)
        if demand.tools and self.tool_parser is not None:
            choices.append("calls")
            count = f"{{0,{MAX_FORCED_CALLS - 1}}}" if demand.many else ""
            rules.append(self.tool_parser.call_rule(demand.tools, self._spell, count))
            parts += _argument_parts(self.tool_parser, demand.tools)
        body = f"({' | '.join(choices)})"
        start = self._after_thoughts(thinking, is_harmony)
        lark = "\n".join([f"start: {start[0]} {body}", *start[1:], *rules]) + "\n"
        text = json.dumps({"grammars": [{"name": "main", "lark_grammar": lark}, *parts]})
        if len(text) > MAX_CHARS:
            raise InvalidGrammar(
                f"the tools make a grammar of {len(text):,} characters, at most {MAX_CHARS:,} are taken: give fewer of them"
            )
        return {"type": "llguidance", "grammar": text}

    def _after_thoughts(self, thinking: Thinking, is_harmony: bool) -> list[str]:
        """What stands before the answer in `start`, and the rules it needs."""
        if is_harmony:
            channel, message, end = (self._spell(f"<|{name}|>") for name in ("channel", "message", "end"))
            analysis = f'thoughts: {channel} "analysis" {message} thought {end} {self._spell("<|start|>")} "assistant"'
            return ["thoughts?", analysis, "thought: /(?s:.*)/"]
        if thinking == "none":
            return [""]
        is_special = CLOSE in self._engine.tokenizer.special_tokens
        closing = f"thought {self._spell(CLOSE)}" if is_special else "thought"
        text = "thought: /(?s:.*)/" if is_special else f"thought[lazy]: /(?s:.*){CLOSE.replace('/', chr(92) + '/')}/"
        opening = "" if thinking == "open" else self._spell(OPEN)
        first = "thoughts space" if thinking == "open" else "(thoughts space)?"
        return [first, f"thoughts: {opening} {closing}", text, "space: /[ \\n]{0,8}/"]

    def _harmony_final(self) -> str:
        return f'{self._spell("<|channel|>")} "final" {self._spell("<|message|>")} @answer'

    def _spell(self, marker: str) -> str:
        """A marker in Lark; nothing for a token that ends answers, which comes where the grammar lets them end."""
        token = self._engine.tokenizer.special_tokens.get(marker)
        if token in self._engine.end_token_ids:
            return ""
        return quoted(marker) if token is None else f"<[{token}]>"

    @property
    def _is_harmony(self) -> bool:
        return self.reasoning is not None and REASONING_PARSERS[self.reasoning] is None

    def _end_of_prompt(self, job: Job) -> str:
        """How a prompt ends, told by a short one: but for unfinished answers it does not depend on what is asked."""
        prompt, options = job.prompts[0], job.options
        if isinstance(prompt, str) and not job.do_preprocess:
            return prompt[-_TAIL_CHARS:]
        if not isinstance(prompt, str) and isinstance(prompt[0], int):
            return self._engine.tokenizer.decode(prompt[-_TAIL_CHARS:], skip_special_tokens=False)  # type: ignore[arg-type]
        if options.continue_final_message:
            said = str(prompt[-1].get("content"))  # type: ignore[union-attr]
            return OPEN if OPEN in said and CLOSE not in said else CLOSE
        variables = {name: value for name, value in options.variables.items() if name not in ("messages", "tools")}
        try:
            return self._engine.chat_template.render(
                _PROBE, add_generation_prompt=options.add_generation_prompt, **variables
            )
        except (RequestError, ConfigError):  # whoever renders the request itself says what is wrong
            return ""

    def _template_has_tools(self) -> bool:
        """Whether the chat template shows tools to the model."""
        render = self._engine.chat_template.render
        try:
            return render(_PROBE, tools=[_PROBE_TOOL]) != render(_PROBE)
        except (RequestError, ConfigError):
            return False


def _argument_parts(parser: type[ToolParser], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    num_chars = 0
    for index, tool in enumerate(tools):
        for name, schema in parser.schemas(index, tool).items():
            parts.append(schema_part(schema, name, f"the parameters of tool {tool.name!r}"))
            num_chars += len(json.dumps(parts[-1]))
            if num_chars > _MAX_PARAMETER_CHARS:
                raise InvalidGrammar("the parameters of the tools are too long to be enforced: give fewer tools")
    return parts
