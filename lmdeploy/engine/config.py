"""The engine's own settings, and the one place where LMDeploy's public names are translated into them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lmdeploy.errors import ConfigError
from lmdeploy.logging import get_logger
from lmdeploy.messages import PublicConfig, QuantPolicy, TurbomindEngineConfig, non_default_fields

# Public fields whose meaning the engine takes over, under its own name.
TRANSLATED = {
    "dtype": "dtype",
    "model_format": "model_format",
    "session_len": "session_len",
    "max_batch_size": "max_batch_size",
    "cache_max_entry_count": "cache_max_entry_count",
    "num_gpu_blocks": "cache_max_entry_count",
    "cache_block_seq_len": "block_size",
    "block_size": "block_size",
    "enable_prefix_caching": "enable_prefix_caching",
    "quant_policy": "quant_policy",
    "rope_scaling_factor": "rope_scaling_factor",
    "use_logn_attn": "use_logn_attn",
    "max_prefill_token_num": "max_prefill_token_num",
    "device_type": "device",
    "hf_overrides": "hf_overrides",
    "empty_init": "empty_init",
    "eager_mode": "eager_mode",
    "deterministic": "deterministic",
}
# Handled before the engine starts, or without effect on a result: accepted in silence.
_ELSEWHERE = {"download_dir", "revision", "model_name", "enable_metrics", "thread_safe", "language_model_only"}
# A different value would change what the user gets: refused until it is there.
_NOT_YET = {
    "tp", "dp", "cp", "ep", "dp_rank", "device_num", "attn_tp_size", "attn_cp_size", "attn_dp_size", "mlp_tp_size",
    "mlp_dp_size", "moe_tp_size", "outer_dp_size", "nnodes", "node_rank", "dist_init_addr", "devices", "adapters",
    "role", "distributed_executor_backend", "dllm_block_length", "dllm_denoising_steps", "enable_return_routed_experts",
    "custom_module_map", "enable_mp_engine", "logprobs_mode",
}  # fmt: skip


@dataclass(frozen=True)
class EngineConfig:
    """What one engine runs with. Sizes in tokens or blocks as their names say.

    device: 'auto', 'cpu' or 'cuda'. cache_max_entry_count: a float in (0, 1) is a share of the memory free after the
    weights, an int a number of blocks, None a default for the device. max_prefill_token_num: tokens per step.
    deterministic: an answer does not depend, to the bit, on what else is computed at the same time. max_steps_in_flight:
    None is 2 on a GPU and 1 on a CPU. given: the fields that the user set, which outrank what a workspace says.
    """

    dtype: str = "auto"
    device: str = "auto"
    model_format: str | None = None
    session_len: int | None = None
    max_batch_size: int | None = None
    cache_max_entry_count: float | None = None
    block_size: int = 64
    enable_prefix_caching: bool = False
    quant_policy: QuantPolicy = QuantPolicy.NONE
    rope_scaling_factor: float = 0.0
    use_logn_attn: bool = False
    max_prefill_token_num: int | None = None
    hf_overrides: dict[str, Any] | None = None
    empty_init: bool = False
    eager_mode: bool = False
    deterministic: bool = False
    max_steps_in_flight: int | None = None
    given: frozenset[str] = field(default=frozenset(), compare=False)

    def __post_init__(self) -> None:
        for name in ("session_len", "max_batch_size", "block_size", "max_prefill_token_num", "max_steps_in_flight"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigError(f"{name}={value!r}: give a whole number of at least 1")
        share = self.cache_max_entry_count
        is_number = type(share) in (int, float)
        if share is not None and not (is_number and (0 < share < 1 or (share >= 1 and share % 1 == 0))):
            raise ConfigError(
                f"cache_max_entry_count={share!r}: give a share of the free memory between 0 and 1, "
                "or a whole number of blocks"
            )
        if self.dtype not in ("auto", "float16", "bfloat16", "float32"):
            raise ConfigError(f"dtype={self.dtype!r}: use auto, float16, bfloat16 or float32")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"device={self.device!r}: this engine runs on cpu and cuda")
        if self.quant_policy == QuantPolicy.TURBO_QUANT:
            raise ConfigError(
                "quant_policy=42 (turbo_quant) is not supported; use 4 (int4), which is rotated here, or k8v4"
            )

    @classmethod
    def from_public(cls, config: PublicConfig | None = None, **overrides: Any) -> EngineConfig:
        """Translate a public config; overrides are fields of this class. ConfigError for what is not supported yet.

        Fields that are not at their default, and overrides, count as given, beside those that an override `given` names.
        """
        if config is None:
            config = TurbomindEngineConfig()
        values: dict[str, Any] = {}
        for name, value in non_default_fields(config).items():
            if name in TRANSLATED:
                values[TRANSLATED[name]] = value
            elif name in _NOT_YET:
                raise ConfigError(f"{name}={value!r} is not supported yet; leave it at its default")
            elif name not in _ELSEWHERE:
                get_logger().warning("%s=%r has no effect in this engine", name, value)
        values.update(overrides, given=frozenset([*values, *overrides, *overrides.get("given", ())]))
        values["quant_policy"] = read_quant_policy(values.get("quant_policy", 0))
        return cls(**values)


def read_quant_policy(value: int | str) -> QuantPolicy:
    """A policy by its name or number. Raises ConfigError."""
    names = {policy.name.lower(): policy.value for policy in QuantPolicy} | {"fp8_e4m3": QuantPolicy.FP8.value}
    number = names.get(value.lower(), value) if isinstance(value, str) else value
    try:
        return QuantPolicy(int(number))
    except ValueError:
        raise ConfigError(f"quant_policy={value!r}: use one of {', '.join(names)}, or 0, 4, 8, 16, 17") from None
