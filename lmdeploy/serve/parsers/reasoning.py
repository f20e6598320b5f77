"""Where a model's thinking ends and its answer begins, for the formats that mark it with tags. It knows no tools."""

from __future__ import annotations

from lmdeploy.serve.parsers.scanner import Scanner, Steps

OPEN, CLOSE = "<think>", "</think>"


class ThinkParser(Scanner):
    """`<think>` thoughts `</think>` answer; white space around the tags belongs to neither.

    begins_inside: the text begins with thoughts, since the prompt has opened them or the model leaves `<think>` out.
    """

    def __init__(self, begins_inside: bool = False) -> None:
        self._begins_inside = begins_inside
        super().__init__()

    def _run(self) -> Steps:
        self._begin_record("")
        yield from self._space()
        is_open = yield from self._accept(OPEN)
        before = self._end_record()
        if is_open or self._begins_inside:
            yield from self._space()
            yield from self._until((CLOSE,), self._reasoning, drops_space=True)
            yield from self._space()
        else:
            self._content(before)
        while not self._has_ended or self._buffer:
            self._content(self._take(len(self._buffer)))
            yield
