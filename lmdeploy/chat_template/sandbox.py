"""The Jinja environment in which models' templates run: no access to Python, and bounded work. It knows no messages.

A template comes with the weights and so from a stranger. Besides Jinja's own sandbox, text size, integer size and time are
bounded, at every place where generated code can multiply them: operators, `~`, calls, filters, loops and output buffers.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from functools import wraps
from typing import Any

from jinja2 import Environment, TemplateError, nodes, pass_environment
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import MAX_RANGE, ImmutableSandboxedEnvironment

MAX_SOURCE_CHARS = 1 << 20
MAX_TEXT_CHARS = 1 << 24
MAX_SECONDS = 5.0
_MAX_ARGUMENT = 10_000_000
_MAX_INT_BITS = 4096
_MAX_ELEMENTS = 1_000_000
# Filters that pass their argument's elements on without writing them out.
_STRUCTURAL_FILTERS = frozenset(
    re.findall(
        r"\w+",
        "attr batch count d default dictsort first groupby items join last length list map max min random reject "
        "rejectattr reverse select selectattr slice sort sum unique",
    )
)
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

    tags = {"generation"}  # noqa: RUF012 (declared so by Jinja)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Jinja as model templates expect it (`trim_blocks`, `lstrip_blocks`, `raise_exception`, `strftime_now`, plain
    `tojson`), sandboxed and bounded. Use within `limit_time`."""

    code_generator_class = _CodeGenerator
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        extensions = ["jinja2.ext.loopcontrols", _GenerationBlock]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=_check_structure)
        self.globals.pop("lipsum")
        self.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        self.filters.update(tojson=_tojson, join=_join)
        self.filters = {name: _bounded(name, function) for name, function in self.filters.items()}

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
        return TemplateEnvironment.concat(str(_check_structure(operand)) for operand in operands)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.check_time()
        _check_operands(operator, left, right)
        return _check_result(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # Jinja's signature
        __self.check_time()
        _check_arguments((*args, *kwargs.values()))
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        _check_growth(getattr(method, "__name__", ""), getattr(method, "__self__", None), (*args, *kwargs.values()))
        return _check_result(super().call(__context, __obj, *args, **kwargs))


@contextmanager
def limit_time() -> Iterator[None]:
    """Starts the clock of one rendering."""
    token = _deadline.set(time.monotonic() + MAX_SECONDS)
    try:
        yield
    finally:
        _deadline.reset(token)


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)  # copies the attribute by which Jinja knows what to pass
    def checked(*args: Any, **kwargs: Any) -> Any:
        TemplateEnvironment.check_time()
        values = [
            value for value in (*args, *kwargs.values()) if not isinstance(value, (Context, EvalContext, Environment))
        ]
        _check_arguments(values)
        if name not in _STRUCTURAL_FILTERS:
            for value in values:
                _check_structure(value)
        _check_growth(name, values[0], values[1:])
        return _check_result(function(*args, **kwargs))

    return checked


def _check_size(size: int) -> None:
    if size > MAX_TEXT_CHARS:
        raise TemplateLimit(f"it made more than {MAX_TEXT_CHARS} characters")


def _check_result(value: Any) -> Any:
    if isinstance(value, (str, list, tuple)):
        _check_size(len(value))
    return value


def _check_structure(value: Any) -> Any:
    _check_size(_written_size(value))
    return value


def _written_size(value: Any) -> int:
    """Characters, about, of a value as text. A list that holds itself twice, nested, is exponential: hence the count."""
    if isinstance(value, str):
        return len(value)
    count = size = 0
    stack = [value] if isinstance(value, (list, tuple, dict)) else []
    while stack:
        inner = stack.pop()
        count += len(inner)
        if count > _MAX_ELEMENTS:
            raise TemplateLimit(f"it writes out a structure of more than {_MAX_ELEMENTS} elements")
        for child in inner.values() if isinstance(inner, dict) else inner:
            if isinstance(child, str):
                size += len(child)
            elif isinstance(child, (list, tuple, dict)):
                stack.append(child)
    return size


def _check_arguments(values: Iterable[Any]) -> None:
    if any(isinstance(value, int) and abs(value) > _MAX_ARGUMENT for value in values):
        raise TemplateLimit(f"it passed a number beyond {_MAX_ARGUMENT}")


def _check_growth(name: str, text: Any, values: Sequence[Any]) -> None:
    """For the string methods, and filters of the same names, whose result can be far longer than what goes in."""
    if not isinstance(text, str):
        return
    if name in ("format", "format_map"):
        if _WIDE_FORMAT.search(text):
            raise TemplateLimit("it formats with a width of six digits")
        longest = max(map(_written_size, values), default=0)
        _check_size(longest * (text.count("{") + text.count("%")))
    if name == "replace" and len(values) >= 2 and all(isinstance(value, str) for value in values[:2]):
        _check_size(len(text) + text.count(values[0]) * len(values[1]))
    if name == "join" and values:
        _check_size(len(text) * (len(values[0]) if isinstance(values[0], Sized) else MAX_RANGE))


def _check_operands(operator: str, left: Any, right: Any) -> None:
    sized = (str, list, tuple)
    if operator == "+" and isinstance(left, sized) and isinstance(right, sized):
        _check_size(len(left) + len(right))
    elif operator == "%" and isinstance(left, str):
        _check_structure(right)
        _check_growth("format", left, right if isinstance(right, tuple) else (right,))
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


@pass_environment
def _join(environment: Environment, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    """Jinja's own, but counting while it joins."""
    items = value if attribute is None else (environment.getitem(item, attribute) for item in value)
    return TemplateEnvironment.join_operands(
        part for i, item in enumerate(items) for part in ((d, item) if i else (item,))
    )


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is, where Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
