"""The last layer's feed-forward block computes only what is read of a prompt: the rows that are sampled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lmdeploy.engine.request import Request, SamplingParams
from tests.engine.driver import make_engine, run
from tests.goldens.materialize import materialize

GOLDENS = Path(__file__).parents[1] / "goldens"


@pytest.mark.parametrize("family", ["llama/llama3.1", "gemma2/base", "falcon/7b", "deepseek_v2/lite"])
def test_only_rows_that_are_read_are_computed_and_answers_stay(family: str, tmp_path: Path) -> None:
    engine = make_engine(materialize(GOLDENS / family, tmp_path), max_prefill_token_num=24)
    layers = engine.runner.model.layers
    rows: dict[str, list[int]] = {"first": [], "last": []}

    def count(name: str, module: nn.Module) -> None:
        module.register_forward_pre_hook(lambda module, inputs: rows[name].append(len(inputs[0])))

    count("first", layers[0].mlp)  # type: ignore[arg-type]
    count("last", layers[-1].mlp)  # type: ignore[arg-type]
    prompts = [list(range(3, 23)), list(range(40, 70))]

    def answers(tag: str, **more: str) -> dict[str, tuple[list[int], Tensor]]:
        sampling = SamplingParams(max_new_tokens=2, return_logits="generation", **more)  # type: ignore[arg-type]
        requests = [Request(f"{tag}{index}", prompt, sampling) for index, prompt in enumerate(prompts)]
        found = run(engine, requests)
        return {name[1:]: (answer.token_ids, answer.logits) for name, answer in found.items()}

    few = answers("a")
    assert sum(rows["first"]) > 2 * sum(rows["last"])
    assert max(rows["last"]) == 2
    rows["first"].clear()
    rows["last"].clear()
    all_rows = answers("b", return_hidden_states="generation")
    assert rows["first"] == rows["last"]
    for name, (tokens, logits) in few.items():
        assert tokens == all_rows[name][0]
        torch.testing.assert_close(logits, all_rows[name][1], rtol=1e-4, atol=1e-4)
