"""The public configuration and result types, with LMDeploy's field names. It knows neither torch nor the engine."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Literal

from lmdeploy.errors import InvalidParameter

if TYPE_CHECKING:
    import torch

FinishReason = Literal["stop", "length", "abort", "error"]


class QuantPolicy(IntEnum):
    """How K and V are stored in the cache; the numbers are those of `--quant-policy`. K8V4: keys int8, values int4."""

    NONE = 0
    INT4 = 4
    INT8 = 8
    FP8 = 16
    FP8_E5M2 = 17
    TURBO_QUANT = 42
    K8V4 = 84


@dataclass
class GenerationConfig:
    """How one answer is sampled.

    Greedy unless `do_sample` is set or one of temperature, top_p, top_k, min_p was given explicitly; temperature 0 is
    greedy. `max_new_tokens=None` means as many as fit session_len. `bad_words` and `stop_words` may be any text; stop
    words are found across token boundaries. response_format: what the answer has to be, as `lmdeploy.grammar` reads it:
    json_object, json_schema, regex_schema or grammar.
    """

    n: int = 1
    max_new_tokens: int | None = 512
    do_sample: bool | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    temperature: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    ignore_eos: bool = False
    random_seed: int | None = None
    stop_words: list[str] | None = None
    bad_words: list[str] | None = None
    stop_token_ids: list[int] | None = None
    bad_token_ids: list[int] | None = None
    min_new_tokens: int | None = None
    logit_bias: dict[int, float] | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logprobs: int | None = None
    response_format: dict[str, Any] | None = None
    logits_processors: list[Any] | None = None
    output_logits: Literal["all", "generation"] | None = None
    output_last_hidden_state: Literal["all", "generation"] | None = None
    include_stop_str_in_output: bool = False
    return_ppl: bool = False
    repetition_ngram_size: int = 0
    repetition_ngram_threshold: int = 0
    with_cache: bool = False
    preserve_cache: bool = False
    migration_request: Any = None
    return_routed_experts: bool = False

    def __post_init__(self) -> None:
        _check_range("n", self.n, 1, 128)
        _check_range("max_new_tokens", self.max_new_tokens, 0, 1 << 31)
        _check_range("min_new_tokens", self.min_new_tokens, 0, 1 << 31)
        _check_range("top_p", self.top_p, 0.0, 1.0)
        _check_range("top_k", self.top_k, 0, 1 << 31)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("temperature", self.temperature, 0.0, 2.0)
        _check_range("repetition_penalty", self.repetition_penalty, 1e-3, 1e3)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_range("logprobs", self.logprobs, 0, 1024)
        for name in ("output_logits", "output_last_hidden_state"):
            if getattr(self, name) not in (None, "all", "generation"):
                raise InvalidParameter(f"{name}={getattr(self, name)!r}: use None, 'all' or 'generation'")

    @property
    def is_sampling(self) -> bool:
        """Whether tokens are drawn at random rather than by argmax."""
        if self.temperature == 0 or self.do_sample is False:
            return False
        explicit = (self.temperature, self.top_p, self.top_k, self.min_p)
        return bool(self.do_sample) or any(value is not None for value in explicit)


def _check_range(name: str, value: float | None, low: float, high: float) -> None:
    """Bounds that are ints ask for a whole number."""
    if value is None:
        return
    kinds, kind = ((int,), "whole number") if isinstance(low, int) else ((int, float), "number")
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        raise InvalidParameter(f"{name}={value!r} is out of bounds: give a {kind} from {low} to {high}")


@dataclass
class PublicConfig:
    """The settings that LMDeploy's two engines name alike. One engine serves both; `engine/config.py` says what applies.

    cache_max_entry_count: a float in (0, 1) is the share of the memory left free by the weights that the KV blocks take;
    an int is a number of blocks. quant_policy: the KV cache in 16 bits (0 or "none"),
    8 ("int8"), 4 ("int4"), keys in 8 and values in 4 ("k8v4"), or 8-bit floats (16 or "fp8", 17 or "fp8_e5m2").
    deterministic: an answer does not depend, to the bit, on what else is computed at the same time.
    """

    dtype: str = "auto"
    model_format: str | None = None
    tp: int = 1
    dp: int = 1
    ep: int = 1
    attn_tp_size: int | None = None
    mlp_tp_size: int | None = None
    session_len: int | None = None
    max_batch_size: int | None = None
    cache_max_entry_count: float = 0.8
    enable_prefix_caching: bool = False
    quant_policy: int | str = 0
    download_dir: str | None = None
    revision: str | None = None
    max_prefill_token_num: int = 8192
    empty_init: bool = False
    language_model_only: bool = False
    hf_overrides: dict[str, Any] | None = None
    enable_metrics: bool = True
    model_name: str | None = None
    deterministic: bool = False


@dataclass
class TurbomindEngineConfig(PublicConfig):
    """Engine settings under TurboMind's names."""

    cp: int = 1
    device_num: int | None = None
    attn_cp_size: int | None = None
    attn_dp_size: int | None = None
    mlp_dp_size: int | None = None
    outer_dp_size: int | None = None
    nnodes: int = 1
    node_rank: int = 0
    dist_init_addr: str | None = None
    devices: list[int] | None = None
    cache_chunk_size: int = -1
    cache_block_seq_len: int = 64
    cache_checkpoint_interval: int = 4096
    cache_prompt: str = "auto"
    cache_prompt_boundary_skip: int = 1
    cache_generation: str = "auto"
    rope_scaling_factor: float = 0.0
    use_logn_attn: bool = False
    num_tokens_per_iter: int = 0
    max_prefill_iters: int = 1
    async_: int = 1
    communicator: str = "nccl"


@dataclass
class VisionConfig:
    """Settings of the vision tower."""

    max_batch_size: int = 1
    thread_safe: bool = False


@dataclass
class SpeculativeConfig:
    """Which draft proposes tokens, and how many."""

    method: str
    model: str = ""
    num_speculative_tokens: int = 1


@dataclass
class Response:
    """One answer, or one increment of a streamed answer.

    token_ids and generate_token_len leave the stop token out. logprobs: per generated token, the top tokens' and its own
    log-probability by token id; its own comes first. prompt_logprobs: the same per prompt token but the first, with
    return_ppl. logits: [tokens, V] float32; last_hidden_state: [tokens, C].
    """

    text: str = ""
    generate_token_len: int = 0
    input_token_len: int = 0
    finish_reason: FinishReason | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] | None = None
    prompt_logprobs: list[dict[int, float]] | None = None
    logits: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    index: int = 0
    routed_experts: Any = None
    cached_tokens: int = 0
    ppl: float | None = None
    error_code: int | None = None
    error_message: str | None = None
    session_id: int | None = None

    def __repr__(self) -> str:
        shown = ((f.name, getattr(self, f.name)) for f in fields(self))
        set_fields = (f"{n}={v!r}" for n, v in shown if n in ("text", "token_ids") or v is not None)
        return f"Response({', '.join(set_fields)})"


def non_default_fields(config: Any) -> dict[str, Any]:
    """The fields of a dataclass instance that differ from their defaults, by name."""
    values = {}
    for f in fields(config):
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        if getattr(config, f.name) != default:
            values[f.name] = getattr(config, f.name)
    return values


def __getattr__(name: str) -> Any:
    if name == "PytorchEngineConfig":  # LMDeploy's import path
        from lmdeploy.pytorch_config import PytorchEngineConfig

        return PytorchEngineConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
