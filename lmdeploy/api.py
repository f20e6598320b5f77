"""The synchronous face: `pipeline()` and `Pipeline`, in every prompt form and with the settings of every era.

It knows nothing of token ids; whatever waits here waits on a queue, so that it works in any thread and in notebooks.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import AsyncIterator, Generator, Iterable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

from lmdeploy import env
from lmdeploy.async_engine import AsyncEngine, Prompt, check_prompt, open_engine
from lmdeploy.engine.config import EngineConfig
from lmdeploy.errors import ConfigError, EngineDead, InvalidParameter
from lmdeploy.logging import get_logger
from lmdeploy.messages import GenerationConfig, PublicConfig, Response, TurbomindEngineConfig
from lmdeploy.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lmdeploy.chat_template.config import ChatTemplateConfig
    from lmdeploy.messages import SpeculativeConfig
    from lmdeploy.session import Session

GenConfigs = GenerationConfig | Sequence[GenerationConfig | None] | None


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
    if not isinstance(backend_config, PublicConfig | None):
        kind = type(backend_config).__name__
        raise ConfigError(f"backend_config is a {kind}: give a TurbomindEngineConfig or PytorchEngineConfig")
    # Nothing was said about prefix caching then, and sessions gain by it.
    overrides = {"enable_prefix_caching": True} if backend_config is None else {}
    config = backend_config or TurbomindEngineConfig()
    if kwargs or config.model_name is not None:
        from lmdeploy.old_arguments import merge_old_kwargs, template_of

        config = merge_old_kwargs(config, kwargs)
        chat_template_config = chat_template_config or template_of(config.model_name)
    engine = open_engine(
        model_path,
        EngineConfig.from_public(config, **overrides),
        chat_template_config=chat_template_config,
        revision=config.revision,
        download_dir=config.download_dir,
        max_log_len=max_log_len,
    )
    return Pipeline(engine)


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
        pairs = list(zip(batch, _configs(gen_config, len(batch), adapter_name), strict=True))
        count = sum(self.async_engine.effective_config(config).n for _, config in pairs)
        responses = [Response()] * count
        stream: Iterable[Response] = self.async_engine.stream(pairs, do_preprocess=do_preprocess, is_streaming=False)
        if use_tqdm:
            from lmdeploy.progress import show_progress

            stream = show_progress(stream, count)
        for response in stream:
            responses[response.index] = response
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
    ) -> Generator[Response, None, None]:
        """What is new of any answer as it comes; Response.index is the prompt's number, or the answer's where n > 1.

        sessions: one for each prompt; it continues that conversation, which keeps the answer. stream_response=False gives
        each answer as one Response. Leaving the iterator aborts what still runs.
        """
        batch, _ = _batch(prompts)
        configs = _configs(gen_config, len(batch), adapter_name)
        if sessions is None:
            return self._stream(batch, configs, do_preprocess, stream_response)
        from lmdeploy.session import stream_turns

        return stream_turns(self, sessions, batch, configs, do_preprocess, stream_response)

    def chat(
        self,
        prompt: Prompt,
        session: Session | None = None,
        gen_config: GenerationConfig | None = None,
        stream_response: bool = False,
        adapter_name: str | None = None,
    ) -> Session | Generator[Response, None, None]:
        """The next turn of a conversation, a new one without a session.

        Returns the session, whose .response and .history hold the turn, or with stream_response the increments; an answer
        broken off stays in the history as far as it came.
        """
        session = session or self.session()
        responses = self.stream_infer(prompt, session, gen_config or session.gen_config, adapter_name=adapter_name)
        if stream_response:
            return responses
        for _ in responses:
            pass
        return session

    def session(self, gen_config: GenerationConfig | None = None) -> Session:
        """A new conversation."""
        from lmdeploy.session import Session

        return Session(self, gen_config)

    def get_ppl(self, input_ids: Sequence[int] | Sequence[Sequence[int]]) -> list[float]:
        """Mean cross-entropy in nats (no exponential) of each text, given as two token ids or more; always a list.

        Raises InvalidParameter naming the text that has too few tokens, or more than the engine can hold.
        """
        from lmdeploy.perplexity import mean_cross_entropies

        return mean_cross_entropies(self, input_ids)

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

    def _stream(
        self, prompts: list[Prompt], configs: list[GenerationConfig | None], do_preprocess: bool, is_streaming: bool
    ) -> Generator[Response, None, None]:
        """The engine's stream; as a method it keeps the pipeline alive while it runs."""
        pairs = zip(prompts, configs, strict=True)
        yield from self.async_engine.stream(pairs, do_preprocess=do_preprocess, is_streaming=is_streaming)

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        with suppress(Exception):  # the interpreter may be shutting down
            self.close()


def _configs(gen_config: GenConfigs, count: int, adapter_name: str | None) -> list[GenerationConfig | None]:
    """One config for each prompt."""
    if adapter_name is not None:
        raise InvalidParameter(f"adapter_name={adapter_name!r}: adapters are not supported yet, leave it out")
    if not isinstance(gen_config, (list, tuple)):
        gen_config = [gen_config] * count  # type: ignore[list-item]
    for config in gen_config:
        if not isinstance(config, (GenerationConfig, type(None))):
            kind = type(config).__name__
            raise InvalidParameter(f"gen_config is a {kind}: give a GenerationConfig, or one for each prompt")
    if len(gen_config) != count:
        raise InvalidParameter(f"{len(gen_config)} gen_configs for {count} prompts: give one for all, or one for each")
    return list(gen_config)


def _batch(prompts: Any) -> tuple[list[Prompt], bool]:
    """The prompts as a list, and whether there was only one, outside a list."""
    is_list = isinstance(prompts, list)
    if is_list and not (prompts and isinstance(prompts[0], (dict, int))):
        return prompts, False
    check_prompt(prompts)
    return [prompts], True


def _set_log_level(log_level: str) -> None:
    try:
        get_logger().setLevel(env.log_level() or log_level)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"log_level={log_level!r}: use DEBUG, INFO, WARNING, ERROR or CRITICAL") from error


def _deprecated(name: str, successor: str) -> None:
    warnings.warn(f"Pipeline.{name} is deprecated: use {successor}", DeprecationWarning, stacklevel=3)
