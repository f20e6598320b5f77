"""Grammars that decide which tokens may come next: compiled in threads of their own, applied as a bit mask on the device.

It knows no text beyond the tokens' bytes and no schema; a grammar comes in llguidance's own form, as `lmdeploy.grammar`
makes it. https://github.com/guidance-ai/llguidance
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache

import torch
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer
from torch import Tensor

from lmdeploy.engine.request import Request
from lmdeploy.engine.state import RequestState
from lmdeploy.errors import InvalidGrammar
from lmdeploy.kernels import apply_bitmask

# A state of the lexer takes up to 2 kB and a mask of 10,000 items about half a millisecond: what one request may cost.
LIMITS = LLParserLimits(
    initial_lexer_fuel=2_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=40_000,
    max_grammar_size=500_000,
    verbose_errors=False,
)
_CACHED_GRAMMARS = 32
_CACHED_CHARS = 1 << 20
_COMPILING_THREADS = 2
_MAX_MESSAGE_CHARS = 600


@dataclass(frozen=True)
class GuidedVocabulary:
    """What a grammar has to know of the tokenizer. tokens: each id's bytes; those of special_ids are spellings, never text.

    eos_ids: tokens that may come exactly where the grammar lets the answer end.
    """

    tokens: list[bytes]
    special_ids: list[int] = field(default_factory=list)
    eos_ids: list[int] = field(default_factory=list)


class Matcher:
    """One request's place in its grammar. error: why it cannot go on; empty while it can."""

    def __init__(self, matcher: LLMatcher) -> None:
        self.llmatcher = matcher
        self.error = ""

    def take(self, token: int) -> bool:
        """Go on by a sampled token; True if the answer ends here, because it is complete or because of an error."""
        if token < 0 or self.error:
            return True
        if not self.llmatcher.consume_token(token):
            self.error = self.llmatcher.get_error() or f"token {token} does not fit"
        return bool(self.error) or self.llmatcher.is_stopped()

    def check(self) -> None:
        """Note an error of the last mask."""
        if self.llmatcher.is_error():
            self.error = self.llmatcher.get_error()


class GrammarCompiler:
    """Makes matchers over one vocabulary; keeps the last few grammars. Thread safe."""

    def __init__(self, vocabulary: GuidedVocabulary, vocab_size: int) -> None:
        """vocab_size: V of the model; ids beyond the vocabulary are never allowed."""
        self._vocabulary = vocabulary
        self._vocab_size = vocab_size
        self._tokenizer: LLTokenizer | None = None
        self._known: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, grammar: str) -> Matcher:
        """A matcher at the grammar's start. Raises InvalidGrammar."""
        with self._lock:
            self._tokenizer = self._tokenizer or _make_tokenizer(self._vocabulary, self._vocab_size)
            known = self._known.get(grammar)
        if known is None:
            known = LLMatcher(self._tokenizer, _unforced(grammar), limits=LIMITS, log_level=0)
            if known.is_error():
                raise InvalidGrammar(f"the grammar cannot be used: {known.get_error()[:_MAX_MESSAGE_CHARS]}")
        with self._lock:
            self._known[grammar] = known
            self._known.move_to_end(grammar)
            while len(self._known) > _CACHED_GRAMMARS or sum(map(len, self._known)) > _CACHED_CHARS:
                self._known.popitem(last=False)
            return Matcher(known.deep_copy())


class GrammarThreads:
    """Compiles the grammars of requests on their way to the engine, so that no step waits for one."""

    def __init__(
        self,
        compiler: GrammarCompiler,
        add: Callable[[Request, Matcher], None],
        refuse: Callable[[str, Exception | None], None],
    ) -> None:
        """add: takes a request that is ready. refuse: ends one by its id, with an error or because it was aborted."""
        self._compiler = compiler
        self._add = add
        self._refuse = refuse
        self._pending: set[str] = set()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(_COMPILING_THREADS, thread_name_prefix="lmdeploy-grammar")

    def start(self, request: Request) -> None:
        with self._lock:
            self._pending.add(request.request_id)
        self._pool.submit(self._run, request)

    def abort(self, request_id: str) -> bool:
        """Whether the request was still here; then it has ended."""
        with self._lock:
            was_pending = request_id in self._pending
            self._pending.discard(request_id)
        if was_pending:
            self._refuse(request_id, None)
        return was_pending

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _run(self, request: Request) -> None:
        error: Exception | None = None
        try:
            matcher = self._compiler.compile(request.sampling.grammar or "")
        except Exception as raised:  # whatever the library makes of a stranger's grammar ends this request alone
            error = raised if isinstance(raised, InvalidGrammar) else InvalidGrammar("the grammar cannot be compiled")
        with self._lock:
            if request.request_id not in self._pending:
                return
            self._pending.discard(request.request_id)
        if error is None:
            self._add(request, matcher)
        else:
            self._refuse(request.request_id, error)


def apply_grammars(logits: Tensor, states: Sequence[RequestState]) -> None:
    """Set logits [R, V] of tokens that a state's grammar does not allow to -inf, in place; rows without one stay."""
    guided = [(row, state.matcher) for row, state in enumerate(states) if state.matcher is not None]
    if not guided:
        return
    words = -(-logits.shape[1] // 32)
    masks = torch.zeros(len(guided), words, dtype=torch.int32, pin_memory=logits.is_cuda)
    _fill(masks, [matcher for _, matcher in guided])
    rows = torch.tensor([row for row, _ in guided], pin_memory=logits.is_cuda)
    apply_bitmask(logits, *(part.to(logits.device, non_blocking=True) for part in (masks, rows)))


def _fill(masks: Tensor, matchers: Sequence[Matcher]) -> None:
    """The masks [R, words] of the matchers' next tokens. One that fails allows everything; its request ends thereafter."""
    pointer, num_bytes = masks.data_ptr(), masks.shape[1] * masks.element_size()
    if len(matchers) == 1:
        matchers[0].llmatcher.unsafe_compute_mask_ptr(pointer, num_bytes)
    else:
        pairs = [(matcher.llmatcher, index) for index, matcher in enumerate(matchers)]
        _executor().unsafe_compute_mask_ptr(pairs, pointer, num_bytes, len(matchers))
    for index, matcher in enumerate(matchers):
        matcher.check()
        if matcher.error:
            masks[index] = -1


@cache
def _executor() -> LLExecutor:
    return LLExecutor()


def _unforced(grammar: str) -> str:
    """The grammar in one that leaves it to the model how text that has to come is cut into tokens.

    Otherwise llguidance would ask an encoder, and allow nothing but its tokens; here there is none.
    """
    try:
        document = json.loads(grammar)
        first = document["grammars"][0]
        name = first.setdefault("name", "first")
        lark = f'%llguidance {{"no_forcing": true}}\nstart: @{name}\n'
        document["grammars"].insert(0, {"name": "unforced", "lark_grammar": lark})
    except (ValueError, RecursionError, KeyError, IndexError, TypeError, AttributeError):
        raise InvalidGrammar("the grammar is none that llguidance can read: {'grammars': [...]} as JSON") from None
    return json.dumps(document)


class _TokenizerParts:
    """A vocabulary in the form that LLTokenizer reads. It wants an encoder, which `_unforced` keeps it from using."""

    is_tokenizer_wrapper = True

    def __init__(self, vocabulary: GuidedVocabulary, vocab_size: int) -> None:
        tokens = vocabulary.tokens[:vocab_size]
        self.tokens = tokens + [b""] * (vocab_size - len(tokens))
        self.special_token_ids = [token for token in vocabulary.special_ids if token < len(tokens)]
        self.eos_token_ids = [token for token in vocabulary.eos_ids if token < len(tokens)]
        self.eos_token_id = self.eos_token_ids[0] if self.eos_token_ids else 0
        self.bos_token_id = None
        special = set(self.special_token_ids)
        self._of_byte = {data: i for i, data in enumerate(tokens) if len(data) == 1 and i not in special}

    def __call__(self, text: bytes | str) -> list[int]:
        data = text.encode() if isinstance(text, str) else text
        return [self._of_byte[piece] for byte in data if (piece := bytes([byte])) in self._of_byte]


def _make_tokenizer(vocabulary: GuidedVocabulary, vocab_size: int) -> LLTokenizer:
    parts = _TokenizerParts(vocabulary, vocab_size)
    if not parts.eos_token_ids:
        raise InvalidGrammar("this model names no token that ends an answer, so no grammar can end one")
    return LLTokenizer(parts, eos_token=parts.eos_token_ids)  # type: ignore[arg-type]
