"""The engine: add, abort, step. Synchronous and single-threaded; a client drives it from a thread or a process."""

from __future__ import annotations

import gc
import math
import random
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lmdeploy.engine.block_manager import BlockManager, root_hash
from lmdeploy.engine.config import EngineConfig
from lmdeploy.engine.memory import MemoryPlan, plan_memory
from lmdeploy.engine.request import Request, RequestOutput
from lmdeploy.engine.runner import PendingStep, Runner
from lmdeploy.engine.scheduler import Scheduler
from lmdeploy.engine.state import RequestState
from lmdeploy.engine.validation import EngineInfo, check_request
from lmdeploy.errors import ConfigError, InvalidGrammar, InvalidParameter, RequestError
from lmdeploy.kernels import has_gpu_kernels
from lmdeploy.layers.context import KVCache
from lmdeploy.messages import QuantPolicy
from lmdeploy.models.base import CausalLM
from lmdeploy.models.loader import load_model

if TYPE_CHECKING:
    from lmdeploy.engine.guided import Matcher
    from lmdeploy.engine.step_times import StepTimes

_MAX_BATCH_SIZE = {"cpu": 32, "cuda": 256}
_MAX_TOKENS_PER_STEP = {"cpu": 512, "cuda": 8192}
_STEPS_IN_FLIGHT = {"cpu": 1, "cuda": 2}


class Engine:
    """One model, its cache and its requests.

    `step` schedules the next step, enqueues it, and hands out the results of the oldest step in flight.
    """

    def __init__(self, path: Path, config: EngineConfig, *, starts_runner: bool = True) -> None:
        """Load the model at `path` (a folder or GGUF file). Raises CheckpointError, ConfigError, ModelNotSupported.

        starts_runner: this thread runs the steps; else `start_runner` is still to be called by the one that does.
        """
        self.path, self.config = path, config
        self.device = device = _device(config.device)
        if config.deterministic:
            from lmdeploy.engine.apart import make_deterministic

            make_deterministic(config)
        self.asleep: set[str] = set()
        self._stream: torch.cuda.Stream | None = None
        model = self.load_model()
        self.resting_model: CausalLM | None = model
        self.model_config = model.config
        self._has_gpu_kernels = device.type == "cuda" and has_gpu_kernels() and model.dtype != torch.float32
        self.plan = plan = self._plan_memory(model)
        self._max_steps_in_flight = config.max_steps_in_flight or _STEPS_IN_FLIGHT[device.type]
        scheduler_class = Scheduler
        if config.deterministic:
            from lmdeploy.engine.apart import ApartScheduler as scheduler_class
        elif self._max_steps_in_flight > 1:
            from lmdeploy.engine.repeat import RepeatingScheduler as scheduler_class
        self.scheduler = scheduler_class(
            BlockManager(plan.num_blocks, config.block_size),
            max_batch_size=plan.max_batch_size,
            max_tokens_per_step=plan.max_tokens_per_step,
            session_len=plan.session_len,
            enable_prefix_caching=config.enable_prefix_caching,
        )
        self.info = EngineInfo(
            architecture=model.config.architecture,
            dtype=str(model.dtype).removeprefix("torch."),
            device=str(device),
            vocab_size=model.config.vocab_size,
            session_len=plan.session_len,
            max_batch_size=config.max_batch_size or plan.max_batch_size,
            num_blocks=plan.num_blocks,
            block_size=config.block_size,
            weight_bytes=plan.weight_bytes,
            eos_token_ids=list(model.config.eos_token_ids),
            memory_plan=plan.rows(),
        )
        self._in_flight: deque[PendingStep] = deque()
        self._states: dict[str, RequestState] = {}
        self.times: StepTimes | None = None
        if starts_runner:
            self.start_runner()

    def load_model(self) -> CausalLM:
        """The model at `path`, with the engine's settings."""
        config = self.config
        model = load_model(
            self.path,
            dtype=config.dtype,
            device=self.device,
            load_format="dummy" if config.empty_init else "auto",
            hf_overrides=config.hf_overrides,
            rope_scaling_factor=config.rope_scaling_factor,
            use_logn_attn=config.use_logn_attn,
            model_format=config.model_format,
        )
        if self.device.type == "cuda":
            from lmdeploy.engine.warm_up import settle

            settle(self.device)
        return model

    def start_runner(self) -> None:
        """Make the cache that is planned for, and the runner of the resting model; called by the thread that runs the steps.

        cuBLAS keeps 32 MiB for every thread and stream that use it: all steps and captures are made by one, on one.
        """
        plan, device, model = self.plan, self.device, self.resting_model
        assert model is not None
        if device.type == "cuda":
            from lmdeploy.engine.warm_up import take_stream, warm_up

            self._stream = self._stream or take_stream(device)
            torch.cuda.set_stream(self._stream)
        cache = _make_cache(model, plan, self.config.quant_policy, device)
        self.runner = Runner(model, cache, plan.max_batch_size, plan.session_len, self._max_steps_in_flight)
        if device.type == "cuda":
            warm_up(self.runner, plan, uses_graphs=self._has_gpu_kernels and not self.config.eager_mode)
        self.resting_model = None

    def drop_runner(self) -> None:
        """Let go of the runner and its cache; its model rests."""
        self.resting_model = self.runner.model
        del self.runner

    def _plan_memory(self, model: CausalLM) -> MemoryPlan:
        config, device = self.config, self.device
        # Twins hold the scores of all new tokens and their context at once, on a GPU as well.
        max_tokens = config.max_prefill_token_num or _MAX_TOKENS_PER_STEP["cuda" if self._has_gpu_kernels else "cpu"]
        on_gpu: dict[str, Any] = {}
        if device.type == "cuda":
            from lmdeploy.engine.warm_up import plan_arguments

            on_gpu = plan_arguments(model)
        return plan_memory(
            model.config,
            config,
            device=device,
            dtype=model.dtype,
            weight_bytes=model.num_bytes(),
            **on_gpu,
            max_batch_size=config.max_batch_size or _MAX_BATCH_SIZE[device.type],
            max_tokens_per_step=max_tokens,
            session_len=config.session_len or model.config.session_len,
        )

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._in_flight)

    def add(self, request: Request, matcher: Matcher | None = None) -> None:
        """Queue a request, with the matcher of its grammar if it has one.

        Raises InvalidParameter or PromptTooLong; then nothing has changed.
        """
        check_request(request, self.info)
        if request.sampling.grammar is not None and matcher is None:
            raise InvalidParameter("the request has a grammar that nothing has compiled: ask through a client")
        if self.asleep:
            raise RequestError("the engine sleeps: wake it first")
        if request.request_id in self._states:
            raise InvalidParameter(f"request id {request.request_id!r} is in use: give each request its own")
        seed = random.getrandbits(63) if request.sampling.seed is None else request.sampling.seed
        rotary = self.runner.model.rotary
        rope_key = rotary.rope_length_key(len(request.prompt_ids)) if rotary is not None else 0
        state = RequestState(request, seed=seed, root=root_hash(request.cache_salt, rope_key), matcher=matcher)
        self._states[request.request_id] = state
        self.scheduler.add(state)

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now; None if it is not there (any more)."""
        if (state := self._states.get(request_id)) is None:
            return None
        self.scheduler.finish(state)
        self._forget(state)
        return state.output([], "abort")

    def step(self) -> list[RequestOutput]:
        """Advance by one step; returns the news of the oldest step once enough are in flight."""
        if self._stream is not None:  # another engine may have used this thread
            torch.cuda.set_stream(self._stream)
        if len(self._in_flight) < self._max_steps_in_flight and (plan := self.scheduler.schedule()) is not None:
            if self.times is not None and not self._in_flight:
                self.times.begin()
            self._in_flight.append(self.runner.execute(plan))
            if len(self._in_flight) < self._max_steps_in_flight:
                return []
        return self._finish_step(self._in_flight.popleft()) if self._in_flight else []

    def prepare_more(self) -> bool:
        """With nothing in flight, prepare one more batch size of decode steps; False if all are there."""
        if self._stream is not None:
            torch.cuda.set_stream(self._stream)
        graphs = None if self.asleep or self._in_flight else self.runner.graphs
        return graphs is not None and graphs.capture_next()

    def stats(self) -> dict[str, float]:
        """Counters for monitoring."""
        return {
            "num_running": len(self.scheduler.running),
            "num_waiting": len(self.scheduler.waiting),
            "num_blocks": self.plan.num_blocks,
            "num_free_blocks": self.scheduler.blocks.num_free,
            "num_preemptions": self.scheduler.num_preemptions,
            "num_pending_graphs": 0 if self.asleep or self.runner.graphs is None else len(self.runner.graphs.missing()),
        }

    def abort_all(self) -> list[RequestOutput]:
        """End every request, and wait for the steps in flight."""
        outputs = self.scheduler.abort_all()
        while self._in_flight:
            self._finish_step(self._in_flight.popleft())
        for state in list(self._states.values()):
            self._forget(state)
        return outputs

    def close(self) -> list[RequestOutput]:
        """End every request and free the memory; the engine cannot be used again."""
        outputs = self.abort_all()
        gc.unfreeze()  # what the start on a GPU froze
        if "kv_cache" not in self.asleep:
            del self.runner
        self.resting_model = None
        gc.collect()
        if self._stream is not None:
            from lmdeploy.engine.warm_up import give_back

            give_back(self._stream)
            self._stream = None
        return outputs

    def _finish_step(self, pending: PendingStep) -> list[RequestOutput]:
        plan = pending.plan
        outputs = self.scheduler.update(plan, pending.wait())
        for output in outputs if pending.reports else ():
            if output.finish_reason != "error":
                pending.reports[output.request_id].add_to(output, self._states[output.request_id])
        if len(self._states) > len(self.scheduler.running) + len(self.scheduler.waiting):  # some have ended
            for output in [output for output in outputs if output.finish_reason is not None]:
                state = self._states[output.request_id]
                if output.finish_reason == "error":
                    output.token_ids, output.error = [], _failure(state)
                self._forget(state)
        if self.times is not None:
            self.times.end_step(plan)
        # In a decode step each has a token, or an error in its place.
        return outputs if plan.is_decode else [output for output in outputs if output.has_news]

    def _forget(self, state: RequestState) -> None:
        self._states.pop(state.request_id, None)
        self.runner.forget(state.request_id)


def _failure(state: RequestState) -> RequestError:
    """Why a request that ended with an error cannot go on."""
    if state.matcher is not None and state.matcher.error:
        return InvalidGrammar(f"the grammar failed during generation: {state.matcher.error[:300]}")
    cause = "" if state.matcher is None else ", or its bans and biases forbid every token that its grammar allows"
    return RequestError(f"the model computed no finite logit for this request{cause}")


def _make_cache(model: CausalLM, plan: MemoryPlan, policy: QuantPolicy, device: torch.device) -> KVCache:
    planes, heads, dim = model.config.kv_shape
    shape = (plan.num_blocks, model.config.num_layers, planes, heads, plan.block_size, dim)
    if policy == QuantPolicy.NONE:
        return KVCache(_zeros(shape, model.dtype, device))
    from lmdeploy.layers.quantized_cache import FORMATS, QuantizedKVCache

    return QuantizedKVCache(shape, FORMATS[policy], lambda part, dtype: _zeros(part, dtype, device))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A zeroed tensor; on the CPU its pages take memory only once they are written, which torch.zeros would do at once."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def _device(name: str) -> torch.device:
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise ConfigError("device='cuda': torch sees no CUDA device; use 'cpu', or 'auto' to take what is there")
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda and name != "cpu" else torch.device("cpu")
