"""The rules that close the published holes of other servers, each as far as this server is concerned.

What the rest of the suite holds in full is named where it is: keys in test_access, the queue in test_load, bounds of
grammars in test_structured, loading in tests/test_style and tests/models.
"""

from __future__ import annotations

import ast
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmdeploy.engine.request import Request
from tests.cli.command_line import parse
from tests.serve.driver import HELLO, Served, endless
from tests.serve.live import running
from tests.test_style import PACKAGE, ROOT, findings, unsafe_code
from tests.tiny_model import CHAT_TEMPLATE, make_tiny_llama

# Every endpoint that makes the engine work.
ASKS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "tiny", "messages": HELLO, "max_tokens": 2},
    "/v1/completions": {"model": "tiny", "prompt": "hello", "max_tokens": 2},
    "/v1/responses": {"model": "tiny", "input": "hello", "max_output_tokens": 2},
    "/v1/messages": {"model": "tiny", "messages": HELLO, "max_tokens": 2},
    "/v1/chat/interactive": {"prompt": "hello", "request_output_len": 2},
    "/v1/embeddings": {"model": "tiny", "input": "hello"},
    "/pooling": {"model": "tiny", "input": "hello"},
    "/generate": {"prompt": "hello", "max_tokens": 2},
    "/get_ppl": {"input": "hello there"},
}
CANARY = "import pathlib; pathlib.Path(__file__).with_name('executed').touch()\n"


# 1. Nothing that is read is run.
def test_no_pickle_no_eval() -> None:
    assert not findings([path for path in PACKAGE if "serve" in path.parts or "engine" in path.parts], unsafe_code)


# 2. No code comes with a model, asked for or not.
def test_a_models_code_is_not_run(tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "m", auto_map={"AutoModelForCausalLM": "modeling_m.M", "AutoConfig": "conf_m.C"})
    for name in ("modeling_m.py", "conf_m.py", "tokenization_m.py", "__init__.py", "setup.py"):
        (model / name).write_text(CANARY)
    with running(model) as (url, service):
        assert url
        assert service.engine.client.info.architecture == "LlamaForCausalLM"
    assert not (model / "executed").exists()


# 3, 4, 5. Images of requests are refused before anything is fetched or decoded.
@pytest.mark.parametrize("address", ["http://169.254.169.254/x", "file:///etc/passwd", "data:image/png;base64,AAAA"])
def test_no_address_of_a_request_is_fetched(serve: Any, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image = [{"type": "image_url", "image_url": {"url": address}}]
    bodies = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": image}]},
        "/v1/responses": {
            "input": [{"role": "user", "content": [{"type": "input_image", "image_url": address}]}],
        },
        "/v1/messages": {
            "messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": address}}]}]
        },
        "/v1/chat/interactive": {"image_url": address},
        "/generate": {"image_data": address},
    }
    served = serve(endless)
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("a connection was made"))
    for path, fields in bodies.items():
        answer = served.post(path, {**ASKS[path], **fields})
        assert answer.status_code == 400, (path, answer.text)
    assert not served.client.requests


# 6. Every number, text and list of every body has its bounds, in the document that clients see.
def unbounded(schema: dict[str, Any], where: str) -> Iterator[str]:
    kind = schema.get("type")
    names = set(schema)
    if kind in ("integer", "number") and not (
        names & {"maximum", "exclusiveMaximum"} and names & {"minimum", "exclusiveMinimum"}
    ):
        yield where
    if kind == "string" and not names & {"maxLength", "enum", "const", "pattern"}:
        yield where
    if kind == "array" and "maxItems" not in names:
        yield where
    for name in ("properties", "$defs"):
        for key, inner in schema.get(name, {}).items():
            yield from unbounded(inner, f"{where}.{key}")
    for inner in schema.get("anyOf", []):
        yield from unbounded(inner, where)
    if isinstance(schema.get("items"), dict):
        yield from unbounded(schema["items"], f"{where}[]")


def test_every_field_has_its_bounds(serve: Any) -> None:
    document = serve(admin_api_key="k").get("/openapi.json").json()
    schemas = {
        name: schema
        for name, schema in document["components"]["schemas"].items()
        if name not in ("HTTPValidationError", "ValidationError")  # answers
    }
    assert len(schemas) > 15
    assert [where for name, schema in schemas.items() for where in unbounded(schema, name)] == []
    parameters = [
        (f"{path}?{parameter['name']}", parameter["schema"])
        for path, methods in document["paths"].items()
        for method in methods.values()
        for parameter in method.get("parameters", [])
    ]
    assert [where for name, schema in parameters for where in unbounded(schema, name)] == []


def test_the_check_of_bounds_finds() -> None:
    schema = {"properties": {"a": {"anyOf": [{"type": "integer", "minimum": 0}]}, "b": {"type": "array", "items": {}}}}
    assert list(unbounded(schema, "x")) == ["x.a", "x.b"]


# 7. What is compiled for a request is refused there, not in the engine.
@pytest.mark.parametrize(
    "form",
    [
        {"type": "regex_schema", "regex_schema": "("},
        {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "no such type"}}},
    ],
)
def test_a_grammar_that_is_none_is_refused(serve: Any, form: dict[str, Any]) -> None:
    answer = serve(endless).chat(response_format=form)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


# 8. Templates come with models only, and are kept in a sandbox.
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_a_requests_template_is_not_used(serve: Any, path: str) -> None:
    served = serve(endless)
    before = served.post(path, ASKS[path])
    with_template = served.post(path, {**ASKS[path], "chat_template": "{{ 'EVIL' }}", "template": "{{ 'EVIL' }}"})
    assert (before.status_code, with_template.status_code) == (200, 200)
    first, second = (request.prompt_ids for request in served.client.requests)
    assert first == second


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
@pytest.mark.parametrize("name", ["messages", "add_generation_prompt", "raise_exception", "tokenize", "tools"])
def test_variables_of_a_request_do_not_replace_the_servers(serve: Any, path: str, name: str) -> None:
    served = serve(endless)
    served.post(path, ASKS[path])
    answer = served.post(path, {**ASKS[path], "chat_template_kwargs": {name: [{"role": "user", "content": "EVIL"}]}})
    assert answer.status_code in (200, 400)
    assert len({tuple(request.prompt_ids) for request in served.client.requests}) == 1


def test_a_models_template_is_kept_in_its_sandbox(tmp_path: Path) -> None:
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    model = make_tiny_llama(tmp_path / "m", chat_template=escape + CHAT_TEMPLATE)
    with running(model) as (_, service), pytest.raises(ValueError, match="template"):
        service.engine.encode(HELLO)


# 9. Keys: deny by default. test_access goes through every path; here the endpoints that work.
@pytest.mark.parametrize("path", ASKS)
def test_every_endpoint_that_works_needs_a_key(serve: Any, path: str) -> None:
    served = serve(endless, api_keys=("right",))
    for headers in ({}, {"x-api-key": "wrong"}, {"x-api-key": "right", "Authorization": "Bearer wrong"}):
        assert served.post(path, ASKS[path], headers=headers).status_code == 401
    for headers in ({"x-api-key": "right"}, {"Authorization": "Bearer right"}):
        assert served.post(path, ASKS[path], headers=headers).status_code == 200
    both = {"x-api-key": "right", "Authorization": "Bearer right"}
    assert served.post(path, ASKS[path], headers=both).status_code == 200


# 10. Nobody listens to strangers unless told to.
@pytest.mark.parametrize("kind", ["api_server M", "gradio M", "proxy"])
def test_servers_listen_to_this_machine_only(kind: str) -> None:
    assert parse(f"lmdeploy serve {kind}").server_name == "127.0.0.1"


# 11. The queue is bounded for every endpoint.
@pytest.mark.parametrize("path", ASKS)
def test_a_full_queue_refuses_every_endpoint(serve: Any, path: str) -> None:
    served = serve(endless, max_concurrent_requests=1)
    served.service.num_active = 1
    answer = served.post(path, ASKS[path])
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    assert not served.client.requests


# 12. Health is a heartbeat of the step loop.
def test_health_hears_a_silent_engine(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    served = serve(endless, heartbeat_timeout_s=5.0)
    assert served.get("/health").status_code == 200
    monkeypatch.setattr(served.client, "stats", lambda: {"heartbeat_age_s": 6.0})
    assert served.get("/health").status_code == 503
    assert served.get("/health/live").status_code == 200


# 13. What one key's requests leave in the cache is no other key's.
@pytest.mark.parametrize("path", ASKS)
def test_every_endpoint_keeps_tenants_apart(serve: Any, path: str) -> None:
    served = serve(endless, api_keys=("a", "b"))
    for key in ("a", "b", "a"):
        assert served.post(path, ASKS[path], headers={"x-api-key": key}).status_code == 200
    first, other, again = (request.cache_salt for request in served.client.requests)
    assert first == again != other
    assert "" not in (first, other)


# 14. What went wrong inside is for the log.
@pytest.mark.parametrize("path", ASKS)
@pytest.mark.parametrize("stream", [False, True])
def test_no_word_of_a_failure_reaches_the_client(serve: Any, path: str, stream: bool) -> None:
    served: Served = serve(endless)

    def fail(request: Request, deliver: Any) -> None:
        raise RuntimeError("secret: /home/someone at 0x7f00")

    served.client.submit = fail  # type: ignore[method-assign]
    answer = served.post(path, {**ASKS[path], "stream": stream})
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "0x7f" not in answer.text
    assert answer.headers["x-request-id"]
    assert (served.service.num_active, served.service.num_tokens) == (0, 0)
    assert json.loads(answer.text)["error"]["message"]


# 15. Nothing that a client sends is checked by an assert, which `python -O` leaves out.
def test_asserts_tell_types_only() -> None:
    found = []
    for path in sorted((ROOT / "lmdeploy" / "serve").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Assert):
                text = ast.unparse(node.test)
                if not (text.startswith(("isinstance(", "not isinstance(")) or text.endswith("is not None")):
                    found.append(f"{path.name}:{node.lineno} {text}")
    assert found == []
