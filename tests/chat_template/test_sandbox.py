"""The sandbox: templates reach no Python, and each way to ask for unbounded text, numbers or time ends in an error."""

from __future__ import annotations

import time
import tracemalloc

import jinja2
import pytest

from lmdeploy.chat_template import sandbox
from lmdeploy.chat_template.sandbox import TemplateEnvironment, TemplateLimit, limit_time

GROWTH = "{%% set ns = namespace(s=%s) %%}{%% for i in range(60) %%}%s{%% endfor %%}"
TOO_MUCH = {
    "repetition": "{{ 'a' * 10**9 }}",
    "list repetition": "{{ [1] * 10**9 }}",
    "doubling with ~": GROWTH % ("'aaaaaaaa'", "{% set ns.s = ns.s ~ ns.s %}"),
    "doubling with +": GROWTH % ("'aaaaaaaa'", "{% set ns.s = ns.s + ns.s %}"),
    "doubling a block": GROWTH % ("'aaaaaaaa'", "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}"),
    "many fields": "{% set s = 'a' * 100000 %}{{ ('{0}' * 100000).format(s) }}",
    "many percent fields": "{% set s = 'a' * 100000 %}{{ '%(s)s' * 100000 % {'s': s} }}",
    "doubling with format": GROWTH % ("'aaaaaaaa'", "{% set ns.s = '%s%s' % (ns.s, ns.s) %}"),
    "replace": "{% set s = 'a' * 1000000 %}{{ s.replace('a', s) }}",
    "replace filter": "{% set s = 'a' * 1000000 %}{{ s|replace('a', s) }}",
    "join": "{% set s = 'a' * 1000000 %}{{ s.join(s) }}",
    "join filter": "{% set s = 'a' * 1000000 %}{{ range(9999)|join(s) }}",
    "center": "{{ 'a'|center(1000000000) }}",
    "ljust": "{{ 'a'.ljust(1000000000) }}",
    "indent": "{{ 'a'|indent(1000000000, true) }}",
    "format width": "{{ '%1000000000d' % 1 }}",
    "format filter": "{{ '%1000000000d'|format(1) }}",
    "format method": "{{ '{:>1000000000}'.format(1) }}",
    "json indent": "{{ messages|tojson(indent=1000000000) }}",
    "batch": "{{ [1]|batch(1000000000, 'x')|list }}",
    "large power": "{{ 10 ** 10000 }}",
    "squaring": GROWTH % ("10", "{% set ns.s = ns.s * ns.s %}"),
    "output": "{% for i in range(99999) %}{% for j in range(99999) %}{{ j }}aaaaaaaaaaaaaaaaaaaaaaaa{% endfor %}{% endfor %}",
    "shared structure": GROWTH % ("['a']", "{% set ns.s = [ns.s, ns.s] %}") + "{{ ns.s }}",
    "shared structure as json": GROWTH % ("['a']", "{% set ns.s = [ns.s, ns.s] %}") + "{{ ns.s|tojson }}",
}
TOO_LONG = {
    "loops": "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}{% endfor %}{% endfor %}",
    "recursion": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
}
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ messages.append(1) }}",
    "{{ raise_exception.__globals__ }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{% include '/etc/passwd' %}",
]


def render(source: str) -> str:
    with limit_time():
        return TemplateEnvironment().from_string(source).render(messages=[{"role": "user", "content": "x"}])


@pytest.mark.parametrize("name", TOO_MUCH)
def test_growth_ends_early(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_TEXT_CHARS", 1 << 20)
    monkeypatch.setattr(sandbox, "_MAX_ELEMENTS", 1 << 14)
    tracemalloc.start()
    try:
        with pytest.raises(TemplateLimit):
            render(TOO_MUCH[name])
        assert tracemalloc.get_traced_memory()[1] < 1 << 26
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", TOO_LONG)
def test_time_ends_loops(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.2)
    start = time.monotonic()
    with pytest.raises(TemplateLimit, match="ran for more than"):
        render(TOO_LONG[name])
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("source", ESCAPES)
def test_python_is_out_of_reach(source: str) -> None:
    try:
        text = render(source)
    except (jinja2.TemplateError, TypeError):
        text = ""
    assert text == "", "Jinja renders a forbidden attribute as it renders an undefined one"


def test_ordinary_work_passes() -> None:
    assert render(
        "{{ 'ab' * 3 }}{{ [1] * 2 }}{{ 2 ** 10 }}{{ 'a'.ljust(3) }}{{ '%5d' % 3 }}{{ 'a-b'.split('-')|join('+') }}"
    ) == ("ababab[1, 1]1024a      3a+b")
    assert render("{{ messages|join(', ', attribute='role') }}") == "user"
    long = "x" * 1_000_000
    with limit_time():
        text = TemplateEnvironment().from_string("{{ messages[0] ~ '!' }}").render(messages=[long])
    assert text == long + "!"
