"""One request's tokens on their way back to text: detokenized and counted. It knows no engine.

Stop strings are `stoppable_answer`'s. Everything here is synchronous, so that threads and event loops can share it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmdeploy.engine.request import Request, RequestOutput
from lmdeploy.errors import RequestError
from lmdeploy.logging import get_logger
from lmdeploy.messages import FinishReason, GenerationConfig, Response
from lmdeploy.tokenizer import IncrementalDetokenizer, Tokenizer

if TYPE_CHECKING:
    from lmdeploy.answer_reports import AnswerReports


Token = tuple[int, dict[int, float] | None]  # a generated token and its logprobs


class AnswerStream:
    """Turns a request's outputs into Responses, and decides where the text ends.

    Once `finish_reason` is set nothing more is taken; if the engine has not said so itself, the caller aborts the request.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer,
        config: GenerationConfig,
        index: int = 0,
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
        self._ready: list[Token] = []
        self._ready_text = ""
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
        self._take(output)
        has_news = self._is_streaming and (self._ready or self._ready_text)
        return self._report(output) if has_news or self.finish_reason is not None else None

    def _visible_tokens(self, output: RequestOutput) -> list[Token]:
        """New tokens and their logprobs without the stop token, unless that is wanted."""
        ids = output.token_ids
        is_stopped = output.finish_reason == "stop" and ids and ids[-1] in self.request.sampling.stop_token_ids
        if is_stopped and not self._config.include_stop_str_in_output:
            ids = ids[:-1]
        if output.logprobs is None:
            return [(token, None) for token in ids]
        return list(zip(ids, output.logprobs, strict=False))

    def _take(self, output: RequestOutput) -> None:
        """Make the text and the tokens of an output ready, and note whether they are the last."""
        self._ready += self._visible_tokens(output)
        self.finish_reason = output.finish_reason
        if self._is_streaming or self.finish_reason is not None:
            self._ready_text = self._detokenizer.add([token for token, _ in self._ready])
        if self.finish_reason is not None:
            self._ready_text += self._detokenizer.flush()

    def _report(self, output: RequestOutput) -> Response:
        tokens, self._ready = self._ready, []
        text, self._ready_text = self._ready_text, ""
        self._num_reported_tokens += len(tokens)
        response = Response(
            text=text,
            generate_token_len=self._num_reported_tokens,
            input_token_len=len(self.request.prompt_ids),
            finish_reason=self.finish_reason,
            token_ids=[token for token, _ in tokens],
            index=self.index,
            cached_tokens=output.cached_tokens,
        )
        if self._config.logprobs is not None:
            response.logprobs = [logprobs or {} for _, logprobs in tokens]
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


def _answer_reports() -> AnswerReports:
    from lmdeploy.answer_reports import AnswerReports

    return AnswerReports()
