"""Every family against the original code's answers, however the requests are split into steps and batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lmdeploy.models import ARCHITECTURES, model_class
from lmdeploy.models.base import CausalLM
from lmdeploy.models.loader import load_model
from tests.models.driver import BLOCK_SIZE, Driver
from tests.models.golden_data import NUM_TOKENS, ROOT, Golden, make_checkpoint, read_config, read_golden, text_folders

TOLERANCE = 1e-3
WHOLE = 1000
# Its reference recomputed the whole context for every token. Beyond the trained length that changes what the layers above
# the first see of older tokens, so that no decoding from a cache, rotated on read or not, gives the same tokens.
RECOMPUTED = ("internlm/7b-dynamic",)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, CausalLM]]:
    """Loaded models by folder, filled as the tests ask for them."""
    loaded: dict[str, CausalLM] = {}
    yield loaded
    loaded.clear()


@pytest.fixture(params=text_folders())
def case(request: pytest.FixtureRequest, models: dict[str, CausalLM], tmp_path: Path) -> tuple[str, CausalLM, Golden]:
    name = request.param
    if name not in models:
        models[name] = load_model(make_checkpoint(name, tmp_path), dtype="float32")
    return name, models[name], read_golden(name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_has_a_golden(architecture: str) -> None:
    shown = {ARCHITECTURES[name] for folder in text_folders() for name in read_config(ROOT / folder)["architectures"]}
    assert ARCHITECTURES[architecture] in shown, f"no folder under tests/goldens is a {architecture} or an alias of it"
    assert issubclass(model_class(architecture), CausalLM)


def check_prompt(golden: Golden, index: int, logits: torch.Tensor, how: str) -> None:
    expected = golden.logits[index]
    error = (logits[golden.positions[index]] - expected).abs().max() / expected.abs().max()
    assert error <= TOLERANCE, f"p{index} {how}: relative difference {error:.1e}"


@pytest.mark.parametrize("chunk", [WHOLE, 16, 1])
def test_batch_of_all_prompts(case: tuple[str, CausalLM, Golden], chunk: int) -> None:
    name, model, golden = case
    driver = Driver(model)
    sequences = [driver.add(prompt) for prompt in golden.prompts]
    logits = driver.prefill(sequences, chunk)
    for index, rows in enumerate(logits):
        check_prompt(golden, index, rows, f"in chunks of {chunk}")
    tokens = driver.decode(sequences, [rows[-1] for rows in logits], NUM_TOKENS)
    compared = 2 if name in RECOMPUTED else 3
    assert tokens[:compared] == golden.greedy[:compared]


@pytest.mark.parametrize("index", [0, 1, 2])
def test_alone_and_after_a_prefix_hit(case: tuple[str, CausalLM, Golden], index: int) -> None:
    name, model, golden = case
    driver = Driver(model)
    prompt = golden.prompts[index]
    first = driver.add(prompt)
    (logits,) = driver.prefill([first], WHOLE)
    check_prompt(golden, index, logits, "alone")
    if (name, index) not in [(folder, 2) for folder in RECOMPUTED]:
        assert driver.decode([first], [logits[-1]], NUM_TOKENS) == [golden.greedy[index]]
    shared = (len(prompt) - 1) // BLOCK_SIZE
    again = driver.add_with_prefix(prompt, first, shared)
    (rest,) = driver.prefill([again], WHOLE)
    torch.testing.assert_close(rest, logits[shared * BLOCK_SIZE :], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", RECOMPUTED)
def test_tokens_of_recomputed_contexts(name: str, tmp_path: Path) -> None:
    model, golden = load_model(make_checkpoint(name, tmp_path), dtype="float32"), read_golden(name)
    ids, tokens = list(golden.prompts[2]), []
    for _ in range(NUM_TOKENS):
        driver = Driver(model)
        (logits,) = driver.prefill([driver.add(ids)], WHOLE)
        tokens.append(int(logits[-1].argmax()))
        ids.append(tokens[-1])
    assert tokens == golden.greedy[2]


@pytest.mark.parametrize("name", RECOMPUTED)
def test_tokens_from_the_cache_do_not_depend_on_the_steps(name: str, tmp_path: Path) -> None:
    model, golden = load_model(make_checkpoint(name, tmp_path), dtype="float32"), read_golden(name)
    prompt = golden.prompts[2]
    driver = Driver(model)
    first = driver.add(prompt)
    (logits,) = driver.prefill([first], WHOLE)
    tokens = driver.decode([first], [logits[-1]], NUM_TOKENS)
    for chunk in (16, 1):
        again = driver.add(prompt)
        (logits,) = driver.prefill([again], chunk)
        assert driver.decode([again], [logits[-1]], NUM_TOKENS) == tokens
    preempted = driver.add(prompt)
    preempted.ids += tokens[0][:-1]
    (rows,) = driver.step([preempted], [len(preempted.ids)])
    assert rows[len(prompt) - 1 :].argmax(-1).tolist() == tokens[0]


def test_input_embeddings_may_stand_in_for_tokens(tmp_path: Path) -> None:
    name = "gemma/2b"
    model, golden = load_model(make_checkpoint(name, tmp_path), dtype="float32"), read_golden(name)
    ids = torch.tensor(golden.prompts[1])
    driver = Driver(model)
    sequence = driver.add(golden.prompts[1])
    (expected,) = driver.step([sequence], [len(ids)])
    sequence.computed = 0
    with torch.inference_mode():
        hidden = model(torch.zeros_like(ids), driver.context([sequence], [len(ids)]), input_embeds=model.embed(ids))
    torch.testing.assert_close(model.compute_logits(hidden), expected, rtol=0, atol=0)


def test_logits_are_capped_where_they_lie() -> None:
    made = torch.tensor([[-90.0, 0.0, 3.0, 60.0]])
    expected = 30.0 * torch.tanh(made / 30.0)
    model = SimpleNamespace(
        lm_head=SimpleNamespace(logits=lambda hidden_states: made), config=SimpleNamespace(logit_softcap=30.0)
    )
    logits = CausalLM.compute_logits(model, torch.zeros(1, 2))  # type: ignore[arg-type]
    assert logits.data_ptr() == made.data_ptr()
    torch.testing.assert_close(logits, expected)
