"""Where text meets token ids: prompts in, Responses out, over one engine client.

Two faces share the same per-request code: `stream` blocks and works in any thread, inside a running event loop too;
`generate` is asynchronous. It knows neither HTTP nor command lines, and nothing of how the engine computes.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import uuid
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdeploy import hub
from lmdeploy.answer import AnswerStream, error_response
from lmdeploy.chat_template import ChatTemplate, choose_chat_template
from lmdeploy.chat_template.base import DEFAULT_OPTIONS, RenderOptions
from lmdeploy.chat_template.choose import UnknownTemplate
from lmdeploy.engine.client import EngineClient, ThreadClient
from lmdeploy.engine.config import EngineConfig
from lmdeploy.engine.request import Request, RequestOutput
from lmdeploy.errors import ConfigError, EngineDead, InvalidParameter, RequestError
from lmdeploy.generation import PIPELINE_DEFAULTS, effective_config, read_defaults, sampling_params, single_token
from lmdeploy.local_file import read_json
from lmdeploy.logging import get_logger
from lmdeploy.messages import GenerationConfig, Response
from lmdeploy.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lmdeploy.chat_template.config import ChatTemplateConfig
    from lmdeploy.engine.loop_mail import LoopMail

Message = Mapping[str, Any]
Prompt = str | Sequence[Message] | Sequence[int]

# Requests handed to the engine at once, as a multiple of its batch: enough never to starve it, and a list of 100,000
# prompts is not tokenized into memory.
_SUBMITTED_BATCHES = 4


class AsyncEngine:
    """A model with its tokenizer, chat template and defaults, and an engine that runs it."""

    def __init__(
        self,
        model_path: Path,
        client: EngineClient,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate,
        generation_defaults: GenerationConfig = PIPELINE_DEFAULTS,
        max_log_len: int | None = None,
    ) -> None:
        """generation_defaults: for requests without a config, and for sampling fields that theirs leaves open.
        max_log_len: characters of a prompt that the log shows at level INFO; None is all. The attribute end_token_ids holds
        what ends an answer to a rendered prompt."""
        self.model_path = model_path
        self.client = client
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.generation_defaults = generation_defaults
        self._max_log_len = max_log_len
        self._has_vocabulary = False
        self._vocabulary_lock = threading.Lock()
        self._mail: LoopMail | None = None
        self._end_ids = [*client.info.eos_token_ids, *tokenizer.eos_token_ids]
        template_ids = chat_template.stop_token_ids(tokenizer)
        self.end_token_ids: list[int] = list(dict.fromkeys([*self._end_ids, *template_ids]))
        self._template_stop_words = [word for word in chat_template.stop_words if single_token(tokenizer, word) is None]

    def effective_config(self, config: GenerationConfig | None = None) -> GenerationConfig:
        """What a request with this config is sampled with, every default filled in."""
        return effective_config(config, self.generation_defaults)

    def encode(
        self, prompt: Prompt, *, do_preprocess: bool = True, options: RenderOptions = DEFAULT_OPTIONS
    ) -> list[int]:
        """The token ids of a prompt.

        A str becomes a user's message, and a list of OpenAI messages is rendered, by the chat template with `options`; where
        the model has none, or with do_preprocess=False, a str is encoded as it is. A list of ids is taken as it is. Raises
        InvalidParameter.
        """
        check_prompt(prompt)
        if _is_token_ids(prompt):
            return list(prompt)  # type: ignore[arg-type]
        if isinstance(prompt, str):
            if not self._is_rendered(prompt, do_preprocess):
                return self.tokenizer.encode(prompt)
            prompt = [{"role": "user", "content": prompt}]
        elif not do_preprocess:
            raise InvalidParameter("do_preprocess=False takes text or token ids, not a list of messages")
        try:
            return self.chat_template.render_ids(prompt, self.tokenizer, options)  # type: ignore[arg-type]
        except ConfigError as error:  # the model has no template: a fault of this request, text would do
            raise InvalidParameter(str(error)) from error

    def stream(
        self,
        prompts: Iterable[tuple[Prompt, GenerationConfig | None]],
        *,
        do_preprocess: bool = True,
        is_streaming: bool = True,
    ) -> Generator[Response, None, None]:
        """Answer all prompts together; yields what is new of any of them as it comes.

        Response.index counts the answers prompt by prompt: a prompt whose config says n has n of them. With
        is_streaming=False each answer is one Response. A request at fault gives a Response with finish_reason 'error'
        and the others go on; EngineDead is raised. Closing the iterator aborts what still runs.
        """
        inbox: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
        active: dict[str, AnswerStream] = {}
        waiting = self._answers(prompts, do_preprocess, is_streaming)
        try:
            while True:
                yield from self._start(waiting, active, inbox.put)
                if not active:
                    return
                if response := self._receive(inbox.get(), active):
                    yield response
        finally:
            self._abort(active)

    async def generate(
        self,
        prompt: Prompt | None = None,
        gen_config: GenerationConfig | None = None,
        *,
        input_ids: Sequence[int] | None = None,
        do_preprocess: bool = True,
        options: RenderOptions = DEFAULT_OPTIONS,
        request_id: str | None = None,
        cache_salt: str = "",
        is_streaming: bool = True,
        admit: Callable[[int], None] | None = None,
    ) -> AsyncGenerator[Response, None]:
        """Answer one prompt, or its input_ids; Response.index is the answer's number, 0 to n - 1.

        admit: called with the number of prompt tokens before the engine gets them; what it raises refuses the request.

        Raises RequestError before the first Response if the request is refused, and EngineDead. Closing the iterator, or
        cancelling the task that runs it, aborts the request.
        """
        given = input_ids if input_ids is not None else prompt
        if given is None:
            raise InvalidParameter("the request has neither a prompt nor input_ids")
        from lmdeploy.engine.loop_mail import loop_mail

        self._mail = mail = loop_mail(self._mail)
        inbox: asyncio.Queue[RequestOutput] = asyncio.Queue()
        active: dict[str, AnswerStream] = {}

        def deliver(output: RequestOutput) -> None:
            try:
                mail.put(inbox, output)
            except RuntimeError:  # the loop was closed with the request still running
                self.client.abort(output.request_id)

        try:
            answers = await asyncio.to_thread(  # a long prompt must not hold up the event loop
                self._prepare, given, gen_config, 0, do_preprocess, is_streaming, options, request_id, cache_salt
            )
            if admit is not None:
                admit(len(answers[0].request.prompt_ids))
            for answer in answers:
                self._submit(answer, active, deliver)
            while active:
                if response := self._receive(await inbox.get(), active):
                    yield response
        finally:
            self._abort(active)

    def close(self) -> None:
        """End what runs and free the engine's memory. May be called again."""
        self.client.close()

    def _is_rendered(self, prompt: Prompt, do_preprocess: bool) -> bool:
        """Whether the chat template has a part in this prompt."""
        return do_preprocess and not _is_token_ids(prompt) and not isinstance(self.chat_template, UnknownTemplate)

    def _answers(
        self, prompts: Iterable[tuple[Prompt, GenerationConfig | None]], do_preprocess: bool, is_streaming: bool
    ) -> Iterator[AnswerStream | Response]:
        """The prompts' answers, ready to submit, encoded no earlier than they are asked for; errors as Responses."""
        index = 0
        for prompt, gen_config in prompts:
            n = self.effective_config(gen_config).n
            try:
                yield from self._prepare(prompt, gen_config, index, do_preprocess, is_streaming)
            except RequestError as error:
                yield from (error_response(error, index + number) for number in range(n))
            index += n

    def _prepare(
        self,
        prompt: Prompt,
        gen_config: GenerationConfig | None,
        index: int,
        do_preprocess: bool,
        is_streaming: bool,
        options: RenderOptions = DEFAULT_OPTIONS,
        request_id: str | None = None,
        cache_salt: str = "",
    ) -> list[AnswerStream]:
        """The n answers to one prompt, numbered from `index`; a seed is counted up, so that they differ."""
        ids = self.encode(prompt, do_preprocess=do_preprocess, options=options)
        config = self.effective_config(gen_config)
        is_rendered = self._is_rendered(prompt, do_preprocess)
        stop_words = list(config.stop_words or [])
        if is_rendered and not config.ignore_eos:
            stop_words += self._template_stop_words
        sampling = sampling_params(
            config,
            self.tokenizer,
            end_token_ids=self.end_token_ids if is_rendered or config.response_format else self._end_ids,
            max_new_tokens=max(self.client.info.session_len - len(ids), 1),
        )
        if sampling.grammar is not None:
            self._load_vocabulary()
        make_answer = _with_stop_words(stop_words) if stop_words else AnswerStream
        answers = []
        for number in range(config.n):
            seed = None if sampling.seed is None else sampling.seed + number
            name = request_id or uuid.uuid4().hex
            name = name if config.n == 1 else f"{name}-{number}"
            request = Request(name, ids, replace(sampling, seed=seed), cache_salt)
            _log_prompt(request, prompt, self._max_log_len)
            answers.append(make_answer(request, self.tokenizer, config, index + number, is_streaming))
        return answers

    def _load_vocabulary(self) -> None:
        """Tell the engine the tokens' bytes, once; most engines never need them."""
        with self._vocabulary_lock:
            if not self._has_vocabulary:
                from lmdeploy.grammar import guided_vocabulary

                self.client.load_vocabulary(guided_vocabulary(self.tokenizer, self.end_token_ids))
                self._has_vocabulary = True

    def _start(
        self,
        waiting: Iterator[AnswerStream | Response],
        active: dict[str, AnswerStream],
        deliver: Callable[[RequestOutput], None],
    ) -> Iterator[Response]:
        """Submit what waits until enough is active; yields the Responses of what is refused."""
        limit = _SUBMITTED_BATCHES * self.client.info.max_batch_size
        while len(active) < limit and (answer := next(waiting, None)) is not None:
            if isinstance(answer, Response):
                yield answer
                continue
            try:
                self._submit(answer, active, deliver)
            except RequestError as error:
                yield error_response(error, answer.index, len(answer.request.prompt_ids))

    def _submit(
        self, answer: AnswerStream, active: dict[str, AnswerStream], deliver: Callable[[RequestOutput], None]
    ) -> None:
        """Hand a request to the engine; `active` holds it once the engine has taken it."""
        self.client.submit(answer.request, deliver)
        active[answer.request.request_id] = answer

    def _receive(self, output: RequestOutput, active: dict[str, AnswerStream]) -> Response | None:
        """The Response that an output brings; ends the request where its text ends."""
        if isinstance(output.error, EngineDead):
            raise output.error
        answer = active.get(output.request_id)
        if answer is None:  # surplus tokens of an answer that a stop string has ended
            return None
        response = answer.add(output)
        if answer.finish_reason is not None:
            del active[output.request_id]
            if not output.is_finished:
                self.client.abort(output.request_id)
        return response

    def _abort(self, active: dict[str, AnswerStream]) -> None:
        for request_id in active:
            self.client.abort(request_id)


# The built-in model's own template adds a system text, under which so small a model gets simple facts wrong: asked for
# the capital of France it answers Paris without that text only, in float32 as in bfloat16.
_BUILTIN_CHAT_TEMPLATE = "chatml"


def open_engine(
    model_path: str | None,
    config: EngineConfig,
    *,
    chat_template_config: ChatTemplateConfig | str | None = None,
    defaults: GenerationConfig = PIPELINE_DEFAULTS,
    revision: str | None = None,
    download_dir: str | None = None,
    max_log_len: int | None = None,
    start: Callable[[Path, EngineConfig], EngineClient] = ThreadClient,
) -> AsyncEngine:
    """Fetch the model if need be, load it and start its engine.

    start: ThreadClient for an engine in this process, ProcessClient for one of its own. Raises ConfigError,
    ModelNotSupported, CheckpointError.
    """
    path = hub.resolve(model_path, revision=revision, download_dir=download_dir)
    tokenizer = Tokenizer.from_path(path)
    if chat_template_config is None and hub.is_builtin(model_path):
        chat_template_config = _BUILTIN_CHAT_TEMPLATE
    if (path / "config.ini").exists():
        from lmdeploy.workspace_settings import with_workspace

        config, chat_template_config = with_workspace(path, config, chat_template_config)
    template = choose_chat_template(path, tokenizer, read_json(path / "config.json"), chat_template_config)
    return AsyncEngine(path, start(path, config), tokenizer, template, read_defaults(path, defaults), max_log_len)


def check_prompt(prompt: object) -> None:
    """Raise InvalidParameter unless the prompt is text, messages of text, or token ids."""
    if not isinstance(prompt, str) and not _is_token_ids(prompt):
        from lmdeploy.chat_template.messages import check_form

        check_form(prompt)


def _is_token_ids(prompt: object) -> bool:
    if isinstance(prompt, (str, Mapping)) or not isinstance(prompt, Sequence) or not prompt:
        return False
    return isinstance(prompt[0], int) and not isinstance(prompt[0], bool)


def _with_stop_words(stop_words: list[str]) -> Callable[..., AnswerStream]:
    from lmdeploy.stoppable_answer import StoppableAnswer

    return partial(StoppableAnswer, stop_words)


def _log_prompt(request: Request, prompt: Prompt, max_log_len: int | None) -> None:
    logger = get_logger()
    if logger.isEnabledFor(logging.INFO):
        count, sampling = len(request.prompt_ids), request.sampling
        shown = str(prompt)[:max_log_len]
        logger.info("request %s: %d prompt tokens, %s, %r", request.request_id, count, sampling, shown)
