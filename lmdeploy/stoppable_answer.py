"""An answer that its text may end: stop strings over tokens. It knows no engine."""

from __future__ import annotations

from lmdeploy.answer import AnswerStream, Token
from lmdeploy.engine.request import Request, RequestOutput
from lmdeploy.messages import GenerationConfig
from lmdeploy.stop_strings import StopChecker
from lmdeploy.tokenizer import Tokenizer


class StoppableAnswer(AnswerStream):
    """An AnswerStream that stop strings cut.

    A token is reported together with the text it begins, so that text, token_ids and logprobs agree even where a stop
    string cuts the answer.
    """

    def __init__(
        self,
        stop_words: list[str],
        request: Request,
        tokenizer: Tokenizer,
        config: GenerationConfig,
        index: int = 0,
        is_streaming: bool = True,
    ) -> None:
        """The arguments of AnswerStream, and the strings."""
        super().__init__(request, tokenizer, config, index, is_streaming)
        self._checker = StopChecker(stop_words, config.include_stop_str_in_output)
        self._held: list[tuple[int, Token]] = []  # with the length of the text before each
        self._text_length = 0
        self._released_length = 0

    def _take(self, output: RequestOutput) -> None:
        num_taken = self._num_engine_tokens - len(output.token_ids)
        for token in self._visible_tokens(output):
            num_taken += 1
            self._held.append((self._text_length, token))
            text = self._detokenizer.add([token[0]])
            if num_taken <= self.request.sampling.min_new_tokens:
                self._text_length += len(text)
                self._release(text)
            elif self._check(text):
                return
        if output.finish_reason is not None and not self._check(self._detokenizer.flush()):
            self._release(self._checker.flush(), is_all=True)
            self.finish_reason = output.finish_reason

    def _check(self, text: str) -> bool:
        """Take more text; True if a stop string was found in it, which ends the answer."""
        self._text_length += len(text)
        released, is_found = self._checker.feed(text)
        self._release(released)
        if is_found:
            self.finish_reason = "stop"
        return is_found

    def _release(self, text: str, is_all: bool = False) -> None:
        """Make text ready, and the tokens that begin before its end; with is_all every token."""
        self._ready_text += text
        self._released_length += len(text)
        while self._held and (is_all or self._held[0][0] < self._released_length):
            self._ready.append(self._held.pop(0)[1])
