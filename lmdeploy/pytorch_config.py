"""Engine settings as LMDeploy's PyTorch engine names them. It knows neither torch nor the engine, which runs them as well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lmdeploy.messages import PublicConfig


@dataclass
class PytorchEngineConfig(PublicConfig):
    """Engine settings under the PyTorch engine's names."""

    dp_rank: int = 0
    moe_tp_size: int | None = None
    distributed_executor_backend: str | None = None
    num_cpu_blocks: int = 0
    num_gpu_blocks: int = 0
    block_size: int = 64
    kernel_block_size: int = -1
    prefix_cache_state_budget: int = 0
    prefix_cache_decode_state_interval: int = 0
    prefill_interval: int = 16
    adapters: dict[str, str] | None = None
    thread_safe: bool = False
    device_type: str = "cuda"
    eager_mode: bool = False
    cudagraph_capture_batch_sizes: list[int] | None = None
    enable_microbatch: bool = False
    enable_eplb: bool = False
    custom_module_map: dict[str, Any] | None = None
    logprobs_mode: str | None = None
    enable_mp_engine: bool = False
    mp_engine_backend: str = "mp"
    dllm_block_length: int | None = None
    dllm_unmasking_strategy: str = "low_confidence_dynamic"
    dllm_denoising_steps: int | None = None
    dllm_confidence_threshold: float = 0.85
    role: str = "Hybrid"
    migration_backend: str = "DLSlime"
    enable_return_routed_experts: bool = False
    enable_transfer_obj_ref: bool = False
