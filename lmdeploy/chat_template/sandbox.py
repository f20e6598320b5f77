"""The Jinja environment in which models' templates run: no access to Python, and bounded work. It knows no messages.

A template comes with the weights and so from a stranger. Besides Jinja's own sandbox, text size, integer size and time are
bounded, at every place where generated code can multiply them: operators, `~`, calls, filters, loops and output buffers.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from datetime import datetime
from functools import wraps
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SOURCE_CHARS = 1 << 20
MAX_TEXT_CHARS = 1 << 24
MAX_SECONDS = 5.0
_MAX_ARGUMENT = 10_000_000
_MAX_INT_BITS = 4096
_WIDE_FORMAT = re.compile(r"\d{6,}")

_deadline: ContextVar[float] = ContextVar("lmdeploy_template_deadline", default=float("inf"))


class TemplateLimit(TemplateError):
    """A template asked for more text, larger numbers or more time than a prompt can need."""


class _CodeGenerator(CodeGenerator):
    """Adds the environment's checks to loops and to `~`."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        self.writeline("environment.check_time()", node)
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.join_operands((")
        for operand in node.nodes:
            self.visit(operand, frame)
            self.write(", ")
        self.write("))")


class _GenerationBlock(Extension):
    """`{% generation %}` marks answers for training; here it is its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Jinja as model templates expect it (`trim_blocks`, `lstrip_blocks`, `raise_exception`, `strftime_now`, plain
    `tojson`), sandboxed and bounded. Use within `limit_time`."""

    code_generator_class = _CodeGenerator
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlock])
        self.globals.pop("lipsum")
        self.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        self.filters["tojson"] = _tojson
        self.filters = {name: _bounded(function) for name, function in self.filters.items()}

    @staticmethod
    def check_time() -> None:
        if time.monotonic() > _deadline.get():
            raise TemplateLimit(f"it ran for more than {MAX_SECONDS:g} s")

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Joins an output buffer: Jinja's hook for the whole prompt, macros and block assignments."""
        kept, size = [], 0
        for part in parts:
            kept.append(part)
            size += len(part)
            _check_size(size)
            TemplateEnvironment.check_time()
        return "".join(kept)

    @staticmethod
    def join_operands(operands: Iterable[Any]) -> str:
        return TemplateEnvironment.concat(str(operand) for operand in operands)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.check_time()
        _check_operands(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 (Jinja's signature)
        __self.check_time()
        _check_arguments((*args, *kwargs.values()))
        if getattr(__obj, "__name__", "") in ("format", "format_map"):
            _check_format(getattr(__obj, "__self__", ""))
        return _check_result(super().call(__context, __obj, *args, **kwargs))


class limit_time:  # noqa: N801 (used as `with limit_time():`)
    """Starts the clock of one rendering."""

    def __enter__(self) -> None:
        self._token = _deadline.set(time.monotonic() + MAX_SECONDS)

    def __exit__(self, *error: object) -> None:
        _deadline.reset(self._token)


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)  # copies the attribute by which Jinja knows what to pass
    def checked(*args: Any, **kwargs: Any) -> Any:
        TemplateEnvironment.check_time()
        _check_arguments((*args, *kwargs.values()))
        if function.__name__ == "do_format":
            _check_format(args[0])
        return _check_result(function(*args, **kwargs))

    return checked


def _check_size(size: int) -> None:
    if size > MAX_TEXT_CHARS:
        raise TemplateLimit(f"it made more than {MAX_TEXT_CHARS} characters")


def _check_result(value: Any) -> Any:
    if isinstance(value, (str, list, tuple)):
        _check_size(len(value))
    return value


def _check_arguments(values: Iterable[Any]) -> None:
    if any(isinstance(value, int) and abs(value) > _MAX_ARGUMENT for value in values):
        raise TemplateLimit(f"it passed a number beyond {_MAX_ARGUMENT}")


def _check_format(text: Any) -> None:
    if isinstance(text, str) and _WIDE_FORMAT.search(text):
        raise TemplateLimit("it formats with a width of six digits")


def _check_operands(operator: str, left: Any, right: Any) -> None:
    sized = (str, list, tuple)
    if operator == "+" and isinstance(left, sized) and isinstance(right, sized):
        _check_size(len(left) + len(right))
    elif operator == "%" and isinstance(left, str):
        _check_format(left)
    elif operator == "*":
        for text, times in ((left, right), (right, left)):
            if isinstance(text, sized) and isinstance(times, int):
                _check_size(len(text) * times)
    if isinstance(left, int) and isinstance(right, int) and operator in ("*", "**"):
        bits = left.bit_length() + right.bit_length() if operator == "*" else left.bit_length() * max(right, 1)
        if bits > _MAX_INT_BITS:
            raise TemplateLimit(f"it computes with numbers of more than {_MAX_INT_BITS} bits")


def _raise_exception(message: str) -> None:
    raise TemplateError(str(message))


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is, where Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
