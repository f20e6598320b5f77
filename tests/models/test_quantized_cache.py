"""Every family under a quantized cache: close to the original code's answers, and alike however the steps are split."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lmdeploy.engine.config import EngineConfig
from lmdeploy.engine.core import Engine
from lmdeploy.errors import ConfigError
from lmdeploy.messages import QuantPolicy
from lmdeploy.models.base import CausalLM
from lmdeploy.models.loader import load_model
from tests.models.driver import BLOCK_SIZE, Driver
from tests.models.golden_data import ROOT, Golden, make_checkpoint, read_config, read_golden, text_folders

# Of the median position: a router near a tie sends a token to another expert for the smallest difference.
TOLERANCE = {QuantPolicy.INT8: 0.04, QuantPolicy.INT4: 0.6}
NUM_TOKENS = 8
FOLDERS = [name for name in text_folders() if "kv_lora_rank" not in read_config(ROOT / name)]


def run(model: CausalLM, golden: Golden, policy: QuantPolicy, chunk: int) -> tuple[list[torch.Tensor], list[list[int]]]:
    """Logits of all prompts, computed in one batch, and greedy tokens after them."""
    driver = Driver(model, policy=policy)
    sequences = [driver.add(prompt) for prompt in golden.prompts]
    logits = driver.prefill(sequences, chunk)
    return logits, driver.decode(sequences, [rows[-1] for rows in logits], NUM_TOKENS)


@pytest.mark.parametrize("policy", [QuantPolicy.INT8, QuantPolicy.INT4])
@pytest.mark.parametrize("name", FOLDERS)
def test_family(name: str, policy: QuantPolicy, tmp_path: Path) -> None:
    model, golden = load_model(make_checkpoint(name, tmp_path), dtype="float32"), read_golden(name)
    logits, tokens = run(model, golden, policy, 16)
    for index, expected in enumerate(golden.logits):
        error = ((logits[index][golden.positions[index]] - expected).abs().amax(-1) / expected.abs().max()).median()
        assert error <= TOLERANCE[policy], f"p{index}: relative difference {error:.1e}"
    whole, whole_tokens = run(model, golden, policy, 1000)
    for index, (a, b) in enumerate(zip(logits, whole, strict=True)):
        assert (a - b).abs().max() <= 1e-4 * a.abs().max(), f"p{index}: chunks change the logits"
    assert tokens == whole_tokens
    check_alone_and_after_a_prefix_hit(model, golden.prompts[2], logits[2], tokens[2], policy)


def check_alone_and_after_a_prefix_hit(
    model: CausalLM, prompt: list[int], logits: torch.Tensor, tokens: list[int], policy: QuantPolicy
) -> None:
    driver = Driver(model, policy=policy)
    alone = driver.add(prompt)
    (rows,) = driver.prefill([alone], len(prompt))
    assert driver.decode([alone], [rows[-1]], NUM_TOKENS) == [tokens]
    shared = (len(prompt) - 1) // BLOCK_SIZE
    assert shared > 0
    again = driver.add_with_prefix(prompt, alone, shared)
    (rest,) = driver.prefill([again], len(prompt))
    torch.testing.assert_close(rest, logits[shared * BLOCK_SIZE :], rtol=0, atol=1e-4 * float(logits.abs().max()))
    assert driver.decode([again], [rest[-1]], NUM_TOKENS) == [tokens]


@pytest.mark.parametrize("name", sorted(set(text_folders()) - set(FOLDERS)))
def test_compressed_caches_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="multi-head latent attention"):
        Engine(
            make_checkpoint(name, tmp_path),
            EngineConfig(dtype="float32", device="cpu", quant_policy=QuantPolicy.INT8, cache_max_entry_count=8),
        )
