"""The synchronous face: `pipeline()` and `Pipeline`, in every prompt form and with the settings of every era.

It knows nothing of token ids; whatever waits here waits on a queue, so that it works in any thread and in notebooks.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import TracebackType
from typing import Any

from lmdeploy import env
from lmdeploy.async_engine import AsyncEngine, Message, Prompt, check_prompt, open_engine
from lmdeploy.chat_template.named import find_template
from lmdeploy.engine.config import EngineConfig, PublicConfig, merge_old_kwargs
from lmdeploy.errors import ConfigError, EngineDead, InvalidParameter, RequestError
from lmdeploy.logging import get_logger
from lmdeploy.messages import (
    ChatTemplateConfig,
    GenerationConfig,
    PytorchEngineConfig,
    Response,
    SpeculativeConfig,
    TurbomindEngineConfig,
)
from lmdeploy.tokenizer import Tokenizer

GenConfigs = GenerationConfig | Sequence[GenerationConfig] | None

# Arguments of old versions that say what the model's files say themselves, or set up what there is no more.
_WITHOUT_EFFECT = ("group_size", "instance_num", "vision_config")


def pipeline(
    model_path: str | None = None,
    backend_config: PublicConfig | None = None,
    chat_template_config: ChatTemplateConfig | None = None,
    log_level: str = "WARNING",
    max_log_len: int | None = None,
    trust_remote_code: bool = False,
    speculative_config: SpeculativeConfig | None = None,
    allowed_media_domains: list[str] | None = None,
    **kwargs: Any,
) -> Pipeline:
    """Load a model and return what answers prompts with it.

    model_path: a folder, a .gguf file, a hub id, or None for the built-in model. log_level: unless LMDEPLOY_LOG_LEVEL is
    set. max_log_len: characters of each prompt that level INFO shows. trust_remote_code: taken for compatibility; a
    model's own code is never run. allowed_media_domains: where images may come from, of no effect for text. kwargs:
    engine settings as old versions took them here (model_format, tp, session_len, ...), and model_name, which then named
    the chat template. Raises ConfigError, ModelNotSupported, CheckpointError.
    """
    _set_log_level(log_level)
    if speculative_config is not None:
        raise ConfigError("speculative_config is not supported yet: leave it out")
    if not isinstance(backend_config, (TurbomindEngineConfig, PytorchEngineConfig, type(None))):
        kind = type(backend_config).__name__
        raise ConfigError(f"backend_config is a {kind}: give a TurbomindEngineConfig or PytorchEngineConfig")
    for name in _WITHOUT_EFFECT:
        if kwargs.pop(name, None) is not None:
            get_logger().info("argument %s has no effect: the model's own files say it, or nothing needs it", name)
    # Nothing was said about prefix caching then, and sessions gain by it.
    overrides = {"enable_prefix_caching": True} if backend_config is None else {}
    config = merge_old_kwargs(backend_config, kwargs)
    engine = open_engine(
        model_path,
        EngineConfig.from_public(config, **overrides),
        chat_template_config=chat_template_config or _template_of(config.model_name),
        revision=config.revision,
        download_dir=config.download_dir,
        max_log_len=max_log_len,
    )
    return Pipeline(engine)


class Session:
    """A conversation with a pipeline: what was said, and the last Response.

    history: (prompt, answer) of each turn; all of it is rendered anew for the next one. Used as a context manager it
    forgets at the end.
    """

    def __init__(self, pipe: Pipeline, gen_config: GenerationConfig | None = None) -> None:
        self._pipe = pipe
        self._gen_config = gen_config
        self.history: list[tuple[Prompt, str]] = []
        self.response: Response | None = None

    def __call__(
        self, prompt: Prompt, gen_config: GenerationConfig | None = None, stream_response: bool = False
    ) -> Response | Iterator[Response] | None:
        """The next turn: its whole Response, or the increments of it."""
        result = self._pipe.chat(prompt, self, gen_config or self._gen_config, stream_response)
        return self.response if result is self else result  # type: ignore[return-value]

    def messages(self, prompt: Prompt) -> list[Message]:
        """The conversation so far and the next prompt, a str or a list of messages."""
        messages = []
        for said, answer in self.history:
            messages += [*_as_messages(said), {"role": "assistant", "content": answer}]
        return messages + _as_messages(prompt)

    def record(self, prompt: Prompt, response: Response) -> None:
        """Keep a turn; one that failed, or was broken off before its first word, is not part of the history."""
        self.response = response
        if response.finish_reason != "error" and (response.text or response.finish_reason is not None):
            self.history.append((prompt, response.text))

    def close(self) -> None:
        """Forget the conversation."""
        self.history.clear()
        self.response = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Pipeline:
    """Answers prompts in batches, as streams, or as conversations. Thread safe.

    A prompt is a str, a list of OpenAI messages, or a list of token ids; lists of those are a batch. A gen_config is one
    for all prompts or one for each. A request at fault gets a Response with finish_reason 'error', error_code and
    error_message, and the others go on; EngineDead is raised.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine: AsyncEngine | None = engine

    @property
    def async_engine(self) -> AsyncEngine:
        """The engine with its text side; raises EngineDead after close."""
        engine = getattr(self, "_engine", None)
        if engine is None:
            raise EngineDead("this pipeline is closed: make a new one")
        return engine

    @property
    def tokenizer(self) -> Tokenizer:
        return self.async_engine.tokenizer

    def infer(
        self,
        prompts: Any,
        gen_config: GenConfigs = None,
        do_preprocess: bool = True,
        adapter_name: str | None = None,
        use_tqdm: bool = False,
    ) -> Response | list[Response]:
        """Answer one prompt or a batch, in order; a list in gives a list out, n > 1 gives n answers side by side.

        do_preprocess=False leaves the chat template out. use_tqdm shows a progress bar on stderr. Raises InvalidParameter
        for a single prompt of no known form.
        """
        batch, is_single = _batch(prompts)
        pairs = list(zip(batch, self._configs(gen_config, len(batch), adapter_name), strict=True))
        count = sum(self.async_engine.effective_config(config).n for _, config in pairs)
        responses = [Response()] * count
        with _progress(count, use_tqdm) as advance:
            for response in self.async_engine.stream(pairs, do_preprocess=do_preprocess, is_streaming=False):
                responses[response.index] = response
                advance()
        return responses[0] if is_single and count == 1 else responses

    __call__ = infer

    def batch_infer(self, *args: Any, **kwargs: Any) -> Response | list[Response]:
        """Deprecated name of `infer`."""
        _deprecated("batch_infer", "infer")
        return self.infer(*args, **kwargs)

    def stream_infer(
        self,
        prompts: Any,
        sessions: Session | list[Session] | None = None,
        gen_config: GenConfigs = None,
        do_preprocess: bool = True,
        adapter_name: str | None = None,
        stream_response: bool = True,
    ) -> Iterator[Response]:
        """What is new of any answer as it comes; Response.index is the prompt's number.

        sessions: one for each prompt; it continues that conversation, which keeps the answer. stream_response=False gives
        each answer as one Response. Leaving the iterator aborts what still runs.
        """
        batch, _ = _batch(prompts)
        configs = self._configs(gen_config, len(batch), adapter_name)
        if sessions is None:
            pairs = list(zip(batch, configs, strict=True))
            return self.async_engine.stream(pairs, do_preprocess=do_preprocess, is_streaming=stream_response)
        listed = [sessions] if isinstance(sessions, Session) else sessions
        if len(listed) != len(batch):
            raise InvalidParameter(f"{len(listed)} sessions for {len(batch)} prompts: give one for each")
        if any(self.async_engine.effective_config(config).n != 1 for config in configs):
            raise InvalidParameter("a session takes one answer a turn: leave n at 1")
        pairs = [
            (session.messages(prompt), config) for session, prompt, config in zip(listed, batch, configs, strict=True)
        ]
        responses = self.async_engine.stream(pairs, is_streaming=stream_response)
        return _recorded(responses, list(zip(listed, batch, strict=True)))

    def chat(
        self,
        prompt: Prompt,
        session: Session | None = None,
        gen_config: GenerationConfig | None = None,
        stream_response: bool = False,
        adapter_name: str | None = None,
    ) -> Session | Iterator[Response]:
        """The next turn of a conversation, a new one without a session.

        Returns the session, whose .response and .history hold the turn, or with stream_response the increments; an answer
        broken off stays in the history as far as it came.
        """
        session = session or self.session()
        responses = self.stream_infer(prompt, session, gen_config, adapter_name=adapter_name)
        if stream_response:
            return responses
        for _ in responses:
            pass
        return session

    def session(self, gen_config: GenerationConfig | None = None) -> Session:
        """A new conversation."""
        return Session(self, gen_config)

    def get_ppl(self, input_ids: Sequence[int] | Sequence[Sequence[int]]) -> list[float]:
        """Mean cross-entropy in nats (no exponential) of each text, given its token ids, two or more; always a list.

        Raises InvalidParameter, PromptTooLong as an InvalidParameter naming the text's number.
        """
        batch = _id_lists(input_ids)
        short = next((number for number, ids in enumerate(batch) if len(ids) < 2), None)
        if short is not None:
            raise InvalidParameter(f"text {short} has {len(batch[short])} tokens: a perplexity needs at least 2")
        config = GenerationConfig(max_new_tokens=0, return_ppl=True)
        responses = self.infer(batch, config)
        assert isinstance(responses, list)
        return [_ppl(response) for response in responses]

    def get_reward_score(self, input_ids: Sequence[int] | Sequence[Sequence[int]]) -> list[float]:
        """Raises ConfigError: no reward model is supported yet."""
        architecture = self.async_engine.client.info.architecture
        raise ConfigError(f"get_reward_score needs a reward model; {architecture} is none, and none is supported yet")

    def generate(self, *args: Any, **kwargs: Any) -> AsyncIterator[Response]:
        """Deprecated: `async_engine.generate`, the asynchronous iterator over one prompt's answer."""
        _deprecated("generate", "async_engine.generate")
        return self.async_engine.generate(*args, **kwargs)

    def close(self) -> None:
        """Abort what runs and free the model's memory, on the device too. May be called again."""
        engine, self._engine = getattr(self, "_engine", None), None
        if engine is not None:
            engine.close()
            del engine
            gc.collect()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        with suppress(Exception):  # the interpreter may be shutting down
            self.close()

    def _configs(
        self, gen_config: GenConfigs, count: int, adapter_name: str | None
    ) -> list[GenerationConfig] | list[GenerationConfig | None]:
        """One config for each prompt."""
        if adapter_name is not None:
            raise InvalidParameter(f"adapter_name={adapter_name!r}: adapters are not supported yet, leave it out")
        if gen_config is None or isinstance(gen_config, GenerationConfig):
            return [gen_config] * count
        configs = list(gen_config) if isinstance(gen_config, (list, tuple)) else [gen_config]
        wrong = next((config for config in configs if not isinstance(config, (GenerationConfig, type(None)))), None)
        if wrong is not None:
            raise InvalidParameter(
                f"gen_config holds a {type(wrong).__name__}: give a GenerationConfig, or one for each prompt"
            )
        if len(configs) != count:
            raise InvalidParameter(f"{len(configs)} gen_configs for {count} prompts: give one for all, or one for each")
        return configs


def _batch(prompts: Any) -> tuple[list[Prompt], bool]:
    """The prompts as a list, and whether there was only one, outside a list."""
    is_list = isinstance(prompts, list)
    if is_list and not (prompts and isinstance(prompts[0], (dict, int))):
        return prompts, False
    check_prompt(prompts)
    return [prompts], True


def _as_messages(prompt: Prompt) -> list[Message]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    check_prompt(prompt)
    if isinstance(prompt[0], int):
        raise InvalidParameter("a conversation takes text or messages, not token ids")
    return list(prompt)  # type: ignore[arg-type]


def _recorded(responses: Iterator[Response], turns: list[tuple[Session, Prompt]]) -> Iterator[Response]:
    """Pass the responses on, and give each session its turn at the end, or as far as it came."""
    parts: list[list[Response]] = [[] for _ in turns]
    try:
        for response in responses:
            parts[response.index].append(response)
            yield response
    finally:
        responses.close()  # type: ignore[attr-defined]
        for (session, prompt), pieces in zip(turns, parts, strict=True):
            if pieces:
                session.record(prompt, _merge(pieces))


def _merge(pieces: list[Response]) -> Response:
    """The whole answer of its increments."""
    logprobs = [part for piece in pieces for part in piece.logprobs or []]
    return replace(
        pieces[-1],
        text="".join(piece.text for piece in pieces),
        token_ids=[token for piece in pieces for token in piece.token_ids],
        logprobs=logprobs or None,
    )


def _id_lists(input_ids: Any) -> list[list[int]]:
    """Token ids as lists, from lists, arrays or tensors of one text or several."""
    if hasattr(input_ids, "tolist"):
        input_ids = input_ids.tolist()
    if not isinstance(input_ids, (list, tuple)) or not input_ids:
        raise InvalidParameter("input_ids: give a list of token ids, or a list of such lists")
    if isinstance(input_ids[0], int):
        return [list(input_ids)]
    return [ids.tolist() if hasattr(ids, "tolist") else list(ids) for ids in input_ids]


def _ppl(response: Response) -> float:
    if response.ppl is None:
        message = f"text {response.index}: {response.error_message or response.finish_reason}"
        raise InvalidParameter(message) if response.error_code == 400 else RequestError(message)
    return response.ppl


def _template_of(model_name: str | None) -> ChatTemplateConfig | None:
    """The template that `model_name` named up to version 0.5, where it could also be the model's path."""
    if model_name is None or find_template(model_name) is None:
        if model_name is not None:
            get_logger().warning("model_name=%r names no chat template: the model's own is used", model_name)
        return None
    return ChatTemplateConfig(model_name=model_name)


def _set_log_level(log_level: str) -> None:
    try:
        get_logger().setLevel(env.log_level() or log_level)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"log_level={log_level!r}: use DEBUG, INFO, WARNING, ERROR or CRITICAL") from error


def _deprecated(name: str, successor: str) -> None:
    warnings.warn(f"Pipeline.{name} is deprecated: use {successor}", DeprecationWarning, stacklevel=3)


@contextmanager
def _progress(count: int, is_shown: bool) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr, advanced by what this yields."""
    if not is_shown:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("prompts", total=count)
        yield lambda: bar.advance(task)
