"""APIClient: a server's endpoints as Python calls, synchronous, with the names of LMDeploy. It knows no engine.

`python -m lmdeploy.serve.openai.api_client URL` is `lmdeploy serve api_client URL`.
"""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import httpx2

from lmdeploy.errors import InvalidParameter, LMDeployError, PromptTooLong, RequestError

_CONNECT_TIMEOUT_S = 10.0
_DONE = "[DONE]"


class ServerError(LMDeployError):
    """A server that cannot be reached, or that failed. status: of its HTTP answer, None if there was none."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class APIClient:
    """Talks to one api_server; closing it, or leaving its `with` block, closes its connections.

    The `*_v1` methods are generators whether they stream or not, as they always were: with stream=False they give the one
    answer, with stream=True its chunks. Nothing is sent before the first item is asked for, and closing the generator ends
    the answer on the server. `fields` are the other fields of the endpoint's body, such as temperature or max_tokens; what
    is left out is the server's to choose.

    Raises InvalidParameter and PromptTooLong for a request that the server refuses, ServerError for everything else.
    """

    def __init__(self, api_server_url: str, api_key: str | None = None, *, timeout_s: float | None = 600.0) -> None:
        """timeout_s: the longest silence of the server, which for a whole answer is the time that it takes."""
        self.api_server_url = normalise_url(api_server_url)
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        timeout = httpx2.Timeout(timeout_s, connect=_CONNECT_TIMEOUT_S)
        try:
            self._http = httpx2.Client(base_url=self.api_server_url, headers=headers, timeout=timeout)
        except (httpx2.InvalidURL, ValueError) as error:
            raise InvalidParameter(f"{api_server_url!r} is no address of a server: {error}") from error

    @property
    def available_models(self) -> list[str]:
        """The names under which the server answers."""
        return [card["id"] for card in self.model_cards()]

    def model_cards(self) -> list[dict[str, Any]]:
        """What GET /v1/models tells of each model."""
        cards = self.get("/v1/models").get("data")
        if not isinstance(cards, list) or not all(isinstance(card, dict) and "id" in card for card in cards):
            raise ServerError(f"{self.api_server_url} does not answer as an OpenAI-compatible server")
        return cards

    def chat_completions_v1(
        self, model: str, messages: str | Sequence[dict[str, Any]], *, stream: bool = False, **fields: Any
    ) -> Generator[dict[str, Any], None, None]:
        """POST /v1/chat/completions: completions, or chunks."""
        return self._answers("/v1/chat/completions", {"model": model, "messages": messages, **fields}, stream)

    def completions_v1(
        self, model: str, prompt: str | Sequence[Any], *, stream: bool = False, **fields: Any
    ) -> Generator[dict[str, Any], None, None]:
        """POST /v1/completions: completions, or chunks."""
        return self._answers("/v1/completions", {"model": model, "prompt": prompt, **fields}, stream)

    def chat_interactive_v1(
        self,
        prompt: str | Sequence[dict[str, Any]],
        session_id: int = -1,
        *,
        interactive_mode: bool = False,
        stream: bool = False,
        **fields: Any,
    ) -> Generator[dict[str, Any], None, None]:
        """POST /v1/chat/interactive: objects with text, tokens, input_tokens, history_tokens, finish_reason."""
        body = {"prompt": prompt, "session_id": session_id, "interactive_mode": interactive_mode, **fields}
        return self._answers("/v1/chat/interactive", body, stream)

    def chat(
        self, prompt: str, session_id: int, *, stream: bool = True, **fields: Any
    ) -> Generator[tuple[str, int, str | None], None, None]:
        """The next turn of a session that the server keeps: (text, tokens so far, finish_reason), as it comes."""
        if session_id == -1:
            raise InvalidParameter("session_id=-1 means no session: give another number")
        answers = self.chat_interactive_v1(prompt, session_id, interactive_mode=True, stream=stream, **fields)
        for output in answers:
            yield output["text"], output["tokens"], output["finish_reason"]

    def end_session(self, session_id: int) -> None:
        """Have the server forget a session and free its cache."""
        for _ in self.chat_interactive_v1("", session_id, request_output_len=0):
            pass

    def encode(
        self, input: str | Sequence[str], do_preprocess: bool = False, add_bos: bool = True
    ) -> tuple[list[Any], Any]:
        """The token ids of a text and how many they are; of several texts, a list of each."""
        texts = input if isinstance(input, str) else list(input)
        answer = self.post("/v1/encode", {"input": texts, "do_preprocess": do_preprocess, "add_bos": add_bos})
        return answer["input_ids"], answer["length"]

    def is_ready(self) -> bool:
        """Whether the server takes requests now."""
        try:
            return bool(self.get("/health/ready"))
        except LMDeployError:
            return False

    def get(self, path: str) -> dict[str, Any]:
        """The JSON object that GET gives."""
        with self._ask("GET", path) as response:
            return _object(response)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The JSON object that POST gives."""
        with self._ask("POST", path, body) as response:
            return _object(response)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> APIClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _answers(self, path: str, body: dict[str, Any], stream: bool) -> Generator[dict[str, Any], None, None]:
        if not stream:
            yield self.post(path, {**body, "stream": False})
            return
        with self._ask("POST", path, {**body, "stream": True}) as response:
            yield from _events(response)

    @contextmanager
    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Iterator[httpx2.Response]:
        """A successful response whose body is not read yet; the errors of HTTP become ours, those of reading it too."""
        try:
            with self._http.stream(method, path, json=body) as response:
                if not response.is_success:
                    response.read()
                    raise _error_of(response)
                yield response
        except httpx2.ConnectError as error:
            raise ServerError(
                f"no server answers at {self.api_server_url}: is it running, and the address right?"
            ) from error
        except httpx2.TimeoutException as error:
            raise ServerError(f"{self.api_server_url}{path} was silent for too long") from error
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise ServerError(f"the answer of {self.api_server_url}{path} broke off: {error}") from error
        except (TypeError, UnicodeEncodeError) as error:
            raise InvalidParameter(f"the request cannot be written as JSON: {error}") from error


def normalise_url(url: str) -> str:
    """With a scheme, without `/v1` and slashes at the end: what the tutorials' addresses have in common."""
    url = url.strip()
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", url):
        url = f"http://{url}"
    if not re.match(r"https?://[^/?#]+", url, re.IGNORECASE):
        raise InvalidParameter(f"{url!r} is no address of a server: write for example http://127.0.0.1:23333")
    return re.sub(r"(/v1)?/*$", "", url)


def _object(response: httpx2.Response) -> dict[str, Any]:
    response.read()
    if not response.content:
        return {}
    return _parse(response.text)


def _events(response: httpx2.Response) -> Generator[dict[str, Any], None, None]:
    """The objects of server-sent events, or of lines of JSON. Raises ServerError where events end without their mark."""
    is_sse = response.headers.get("content-type", "").startswith("text/event-stream")
    for line in response.iter_lines():
        if is_sse and not line.startswith("data:"):
            continue
        text = line.removeprefix("data:").strip() if is_sse else line.strip()
        if text == _DONE:
            return
        if text:
            event = _parse(text)
            if event.get("error"):
                raise _problem(event, 500)
            yield event
    if is_sse:
        raise ServerError("the answer broke off before its end")


def _parse(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ServerError(f"the server's answer is no JSON: {text[:200]!r}") from error
    if not isinstance(value, dict):
        raise ServerError(f"the server's answer is no JSON object: {text[:200]!r}")
    return value


def _error_of(response: httpx2.Response) -> LMDeployError:
    try:
        body = json.loads(response.text)
    except ValueError:
        body = {"message": response.text.strip()[:200] or response.reason_phrase}
    return _problem(body if isinstance(body, dict) else {"message": str(body)[:200]}, response.status_code)


def _problem(body: dict[str, Any], status: int) -> LMDeployError:
    """From OpenAI's error object, or the flat form of LMDeploy."""
    error = body.get("error")
    found = error if isinstance(error, dict) else body
    message = str(found.get("message") or found.get("detail") or error or body)[:2000]
    if found.get("code") == "context_length_exceeded":
        return PromptTooLong(message)
    is_refused = status in (400, 422) or (status == 500 and found.get("type") == "invalid_request_error")
    return RequestError(message) if is_refused else ServerError(f"{message} (HTTP {status})", status)


if __name__ == "__main__":
    sys.argv[1:1] = ["serve", "api_client"]
    runpy.run_module("lmdeploy", run_name="__main__", alter_sys=True)
