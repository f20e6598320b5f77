"""One request's tokens on their way back to text: detokenized, cut at stop strings, counted. It knows no engine.

Everything here is synchronous, so that threads and event loops can share it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmdeploy.engine.request import Request, RequestOutput
from lmdeploy.errors import RequestError
from lmdeploy.logging import get_logger
from lmdeploy.messages import FinishReason, GenerationConfig, Response
from lmdeploy.tokenizer import IncrementalDetokenizer, Tokenizer

if TYPE_CHECKING:
    from lmdeploy.answer_reports import AnswerReports
    from lmdeploy.stop_strings import StopChecker


@dataclass
class _Token:
    """A generated token; `start` is the length of the text before it."""

    id: int
    logprobs: dict[int, float] | None
    start: int


class AnswerStream:
    """Turns a request's outputs into Responses, and decides where the text ends.

    A token is reported together with the text it begins, so that text, token_ids and logprobs agree even where a stop
    string cuts the answer. Once `finish_reason` is set nothing more is taken; if the engine has not said so itself, the
    caller aborts the request.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer,
        config: GenerationConfig,
        *,
        index: int = 0,
        stop_words: list[str] | None = None,
        is_streaming: bool = True,
    ) -> None:
        """index: what the Responses bear. is_streaming False gives a single Response, at the end."""
        self.request = request
        self.index = index
        self.finish_reason: FinishReason | None = None
        self._config = config
        self._is_streaming = is_streaming
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, config.skip_special_tokens, config.spaces_between_special_tokens
        )
        self._checker = _stop_checker(stop_words, config) if stop_words else None
        self._held: list[_Token] = []
        self._ready: list[_Token] = []
        self._ready_text = ""
        self._text_length = 0
        self._released_length = 0
        self._num_engine_tokens = 0
        self._num_reported_tokens = 0
        wants_reports = config.output_logits or config.output_last_hidden_state or config.return_ppl
        self._reports = _answer_reports() if wants_reports else None

    def add(self, output: RequestOutput) -> Response | None:
        """The Response for this output, or None while there is nothing to report."""
        if output.error is not None:
            self.finish_reason = "error"
            return error_response(output.error, self.index, len(self.request.prompt_ids))
        self._num_engine_tokens += len(output.token_ids)
        if self._reports is not None:
            self._reports.add(output)
        if self._checker is None:
            self._take(output)
        else:
            self._take_checked(output, self._checker)
        has_news = self._is_streaming and (self._ready or self._ready_text)
        return self._report(output) if has_news or self.finish_reason is not None else None

    def _visible_tokens(self, output: RequestOutput) -> list[tuple[int, dict[int, float] | None]]:
        """New tokens and their logprobs without the stop token, unless that is wanted."""
        ids = output.token_ids
        is_stopped = output.finish_reason == "stop" and ids and ids[-1] in self.request.sampling.stop_token_ids
        if is_stopped and not self._config.include_stop_str_in_output:
            ids = ids[:-1]
        if output.logprobs is None:
            return [(token, None) for token in ids]
        return list(zip(ids, output.logprobs, strict=False))

    def _take(self, output: RequestOutput) -> None:
        self._ready += [_Token(token, logprobs, 0) for token, logprobs in self._visible_tokens(output)]
        self.finish_reason = output.finish_reason
        if self._is_streaming or self.finish_reason is not None:
            self._ready_text = self._detokenizer.add([token.id for token in self._ready])
        if self.finish_reason is not None:
            self._ready_text += self._detokenizer.flush()

    def _take_checked(self, output: RequestOutput, checker: StopChecker) -> None:
        num_taken = self._num_engine_tokens - len(output.token_ids)
        for token, logprobs in self._visible_tokens(output):
            num_taken += 1
            self._held.append(_Token(token, logprobs, self._text_length))
            text = self._detokenizer.add([token])
            if num_taken <= self.request.sampling.min_new_tokens:
                self._text_length += len(text)
                self._release(text)
            elif self._check(text, checker):
                return
        if output.finish_reason is not None and not self._check(self._detokenizer.flush(), checker):
            self._release(checker.flush(), is_all=True)
            self.finish_reason = output.finish_reason

    def _check(self, text: str, checker: StopChecker) -> bool:
        """Take more text; True if a stop string was found in it, which ends the answer."""
        self._text_length += len(text)
        released, is_found = checker.feed(text)
        self._release(released)
        if is_found:
            self.finish_reason = "stop"
        return is_found

    def _release(self, text: str, is_all: bool = False) -> None:
        """Make text ready, and the tokens that begin before its end; with is_all every token."""
        self._ready_text += text
        self._released_length += len(text)
        while self._held and (is_all or self._held[0].start < self._released_length):
            self._ready.append(self._held.pop(0))

    def _report(self, output: RequestOutput) -> Response:
        tokens, self._ready = self._ready, []
        text, self._ready_text = self._ready_text, ""
        self._num_reported_tokens += len(tokens)
        response = Response(
            text=text,
            generate_token_len=self._num_reported_tokens,
            input_token_len=len(self.request.prompt_ids),
            finish_reason=self.finish_reason,
            token_ids=[token.id for token in tokens],
            index=self.index,
            cached_tokens=output.cached_tokens,
        )
        if self._config.logprobs is not None:
            response.logprobs = [token.logprobs or {} for token in tokens]
        if self.finish_reason is not None and self._reports is not None:
            self._reports.complete(response, self._num_engine_tokens - self._num_reported_tokens)
        return response


def error_response(error: Exception, index: int = 0, input_token_len: int = 0) -> Response:
    """The Response of a request that failed alone; 400 is the request's own fault, 500 is not. Logs a warning."""
    get_logger().warning("request %d failed: %s", index, error)
    return Response(
        finish_reason="error",
        input_token_len=input_token_len,
        index=index,
        error_code=400 if isinstance(error, RequestError) else 500,
        error_message=str(error),
    )


def _stop_checker(stop_words: list[str], config: GenerationConfig) -> StopChecker:
    from lmdeploy.stop_strings import StopChecker

    return StopChecker(stop_words, config.include_stop_str_in_output)


def _answer_reports() -> AnswerReports:
    from lmdeploy.answer_reports import AnswerReports

    return AnswerReports()
