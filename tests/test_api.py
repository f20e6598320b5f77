from __future__ import annotations

import asyncio
import gc
import itertools
import signal
import threading
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

import lmdeploy
from lmdeploy.api import Pipeline, pipeline
from lmdeploy.async_engine import AsyncEngine
from lmdeploy.chat_template import choose_chat_template
from lmdeploy.chat_template.config import ChatTemplateConfig
from lmdeploy.engine.request import Request
from lmdeploy.errors import ConfigError, EngineDead, InvalidParameter
from lmdeploy.messages import (
    GenerationConfig,
    PytorchEngineConfig,
    Response,
    SpeculativeConfig,
    TurbomindEngineConfig,
)
from lmdeploy.session import Session
from lmdeploy.tokenizer import Tokenizer
from tests.fakes import FakeClient, Script
from tests.tiny_model import make_tiny_llama

MakePipe = Callable[..., Pipeline]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def make_pipe(tiny: Path) -> Iterable[MakePipe]:
    """Pipelines over a fake engine."""
    pipes: list[Pipeline] = []

    def make(script: Script | None = None, **client: Any) -> Pipeline:
        tokenizer = Tokenizer.from_path(tiny)
        template = choose_chat_template(tiny, tokenizer, {}, None)
        pipes.append(Pipeline(AsyncEngine(tiny, FakeClient(script or echo, **client), tokenizer, template)))
        return pipes[-1]

    yield make
    for pipe in pipes:
        pipe.close()


def echo(request: Request) -> Iterable[int]:
    return list(request.prompt_ids)


def fake(pipe: Pipeline) -> FakeClient:
    client = pipe.async_engine.client
    assert isinstance(client, FakeClient)
    return client


def spoken(pipe: Pipeline, answer: str) -> Script:
    """A script that says `answer` and ends its turn."""
    ids = [*pipe.tokenizer.encode(answer), 3]
    return lambda request: ids


# ---- prompts and answers, over the fake engine ----


def test_one_prompt_gives_a_response_and_a_list_a_list(make_pipe: MakePipe) -> None:
    pipe = make_pipe()
    single = pipe("the river", do_preprocess=False)
    assert isinstance(single, Response)
    assert single.text == "the river"
    batch = pipe(["the river", "the sea"], do_preprocess=False)
    assert isinstance(batch, list)
    assert [response.text for response in batch] == ["the river", "the sea"]
    assert [response.index for response in batch] == [0, 1]
    (one,) = pipe(["the river"], do_preprocess=False)
    assert one.text == "the river"
    assert pipe([]) == []


def test_every_prompt_form_reaches_the_engine_as_the_same_ids(make_pipe: MakePipe) -> None:
    pipe = make_pipe()
    messages = [{"role": "user", "content": "hi"}]
    ids = pipe.async_engine.encode("hi")
    for prompts in ("hi", messages, ids, ["hi"], [messages], [ids]):
        response = pipe(prompts)
        response = response[0] if isinstance(response, list) else response
        assert response.input_token_len == len(ids)
    assert all(request.prompt_ids == ids for request in fake(pipe).requests)


def test_answers_keep_the_order_of_their_prompts(make_pipe: MakePipe) -> None:
    pipe = make_pipe(max_batch_size=2)
    prompts = ["a" * (20 - index) for index in range(20)]  # the last prompt is answered first
    assert [response.text for response in pipe(prompts, do_preprocess=False)] == prompts


def test_a_config_for_each_prompt(make_pipe: MakePipe) -> None:
    pipe = make_pipe()
    configs = [GenerationConfig(max_new_tokens=count) for count in (1, 2, 3)]
    responses = pipe(["abcdef"] * 3, configs, do_preprocess=False)
    assert [response.generate_token_len for response in responses] == [1, 2, 3]
    with pytest.raises(InvalidParameter, match="3 gen_configs for 2 prompts"):
        pipe(["a", "b"], configs)
    with pytest.raises(InvalidParameter, match="dict"):
        pipe("a", {"temperature": 1})  # type: ignore[arg-type]


def test_n_answers_stand_side_by_side(make_pipe: MakePipe) -> None:
    pipe = make_pipe()
    configs = [GenerationConfig(n=2), GenerationConfig(n=1)]
    assert [response.text for response in pipe(["a", "b"], configs, do_preprocess=False)] == ["a", "a", "b"]
    assert len(pipe("a", GenerationConfig(n=2))) == 2


def test_a_single_prompt_of_no_known_form_raises_in_a_batch_it_fails_alone(make_pipe: MakePipe) -> None:
    pipe = make_pipe()
    image = ("describe this image", object())
    with pytest.raises(InvalidParameter, match="vision models are not supported yet"):
        pipe(image)
    with pytest.raises(InvalidParameter, match="float"):
        pipe(1.5)
    good, bad = pipe(["fine", image], do_preprocess=False)
    assert good.text == "fine"
    assert (bad.finish_reason, bad.error_code) == ("error", 400)


def test_adapters_and_reward_models_are_refused(make_pipe: MakePipe) -> None:
    pipe = make_pipe()
    with pytest.raises(InvalidParameter, match="adapter_name='lora'"):
        pipe("a", adapter_name="lora")
    with pytest.raises(ConfigError, match="FakeForCausalLM"):
        pipe.get_reward_score([1, 2])


def test_stream_infer_gives_increments_of_every_prompt(make_pipe: MakePipe) -> None:
    pipe = make_pipe()
    texts = ["", ""]
    pieces = 0
    for response in pipe.stream_infer(["the river", "the sea"], do_preprocess=False):
        texts[response.index] += response.text
        pieces += 1
    assert texts == ["the river", "the sea"]
    assert pieces > 2
    whole = list(pipe.stream_infer(["the river", "the sea"], do_preprocess=False, stream_response=False))
    assert sorted(response.text for response in whole) == ["the river", "the sea"]


def test_stream_infer_refuses_before_the_first_response(make_pipe: MakePipe) -> None:
    pipe = make_pipe()
    with pytest.raises(InvalidParameter, match="vision"):
        pipe.stream_infer(("text", "image"))
    with pytest.raises(InvalidParameter, match="2 sessions for 1 prompts"):
        pipe.stream_infer("a", [pipe.session(), pipe.session()])


def test_progress_is_shown_on_stderr_only(make_pipe: MakePipe, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = make_pipe()
    pipe(["a", "b"], use_tqdm=True)
    captured = capsys.readouterr()
    assert "2/2" in captured.err
    assert captured.out == ""


def test_deprecated_names_still_work(make_pipe: MakePipe) -> None:
    pipe = make_pipe()
    with pytest.warns(DeprecationWarning, match="batch_infer"):
        assert pipe.batch_infer(["a"], do_preprocess=False)[0].text == "a"

    async def run() -> str:
        return "".join([response.text async for response in pipe.generate("a", do_preprocess=False)])

    with pytest.warns(DeprecationWarning, match="generate"):
        assert asyncio.run(run()) == "a"


# ---- conversations ----


def test_chat_renders_the_whole_history_each_turn(make_pipe: MakePipe) -> None:
    pipe = make_pipe(lambda request: [*tokenizer.encode("yes"), 3])
    tokenizer = pipe.tokenizer
    session = pipe.chat("first")
    assert isinstance(session, Session)
    assert session.response is not None
    assert session.response.text == "yes"
    assert pipe.chat("second", session=session) is session
    assert session.history == [("first", "yes"), ("second", "yes")]
    assert tokenizer.decode(fake(pipe).requests[1].prompt_ids, skip_special_tokens=False) == (
        "<|im_start|>user\nfirst<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
        "<|im_start|>user\nsecond<|im_end|>\n<|im_start|>assistant\n"
    )


def test_streamed_chat_keeps_an_answer_that_was_broken_off(make_pipe: MakePipe) -> None:
    pipe = make_pipe(lambda request: itertools.cycle(pipe.tokenizer.encode("word ")))
    session = pipe.session(GenerationConfig(max_new_tokens=100_000))
    stream = session("hi", stream_response=True)
    text = "".join(response.text for response in itertools.islice(stream, 10))  # type: ignore[arg-type]
    stream.close()  # type: ignore[union-attr]
    assert text.startswith("word word")
    assert session.history == [("hi", text)]
    assert fake(pipe).wait_idle()


def test_a_refused_turn_is_not_part_of_the_history(make_pipe: MakePipe) -> None:
    pipe = make_pipe(session_len=32)
    with pipe.session() as session:
        response = session("far too long " * 30)
        assert isinstance(response, Response)
        assert response.finish_reason == "error"
        assert session.history == []
        session("hi")
        assert len(session.history) == 1
    assert session.history == []


def test_a_session_takes_messages_but_neither_ids_nor_n(make_pipe: MakePipe) -> None:
    pipe = make_pipe()
    session = pipe.session()
    pipe.chat([{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}], session)
    assert [message["role"] for message in session.messages("next")] == ["system", "user", "assistant", "user"]
    with pytest.raises(InvalidParameter, match="token ids"):
        pipe.chat([1, 2], session)
    with pytest.raises(InvalidParameter, match="leave n at 1"):
        pipe.chat("hi", session, GenerationConfig(n=2))


# ---- scoring, life cycle ----


def test_get_ppl_is_the_mean_cross_entropy(make_pipe: MakePipe) -> None:
    pipe = make_pipe()
    expected = [(1 / 5 + 1 / 10) / 2, 1 / 2]
    assert pipe.get_ppl([[9, 4, 9], [7, 1]]) == pytest.approx(expected)
    assert pipe.get_ppl([9, 4, 9]) == pytest.approx(expected[:1])
    assert pipe.get_ppl(torch.tensor([9, 4, 9])) == pytest.approx(expected[:1])  # type: ignore[arg-type]
    assert all(request.sampling.max_new_tokens == 0 for request in fake(pipe).requests)
    with pytest.raises(InvalidParameter, match="text 1 has 1 tokens"):
        pipe.get_ppl([[1, 2], [3]])
    with pytest.raises(InvalidParameter, match="text 0: the prompt has"):
        pipe.get_ppl([1] * 300)


def test_close_closes_the_engine_and_later_calls_say_so(make_pipe: MakePipe) -> None:
    with make_pipe() as pipe:
        client = fake(pipe)
    assert client.is_closed
    pipe.close()
    with pytest.raises(EngineDead, match="closed"):
        pipe("a")


def test_a_dropped_pipeline_closes_its_engine(make_pipe: MakePipe, tiny: Path) -> None:
    tokenizer = Tokenizer.from_path(tiny)
    client = FakeClient(echo)
    pipe = Pipeline(AsyncEngine(tiny, client, tokenizer, choose_chat_template(tiny, tokenizer, {})))
    del pipe
    gc.collect()
    assert client.is_closed
    Pipeline.__new__(Pipeline).__del__()  # one whose constructor failed


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs POSIX signals")
def test_ctrl_c_ends_the_call_and_its_requests(make_pipe: MakePipe) -> None:
    pipe = make_pipe(lambda request: itertools.cycle([70]))
    main = threading.get_ident()
    timer = threading.Timer(0.2, lambda: signal.pthread_kill(main, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        pipe(["a", "b"], GenerationConfig(max_new_tokens=1_000_000))
    timer.join()
    assert len(fake(pipe).aborted) == 2
    assert fake(pipe).wait_idle()


def test_a_stream_keeps_its_pipeline_open(make_pipe: MakePipe, tiny: Path) -> None:
    tokenizer = Tokenizer.from_path(tiny)
    client = FakeClient(echo)
    engine = AsyncEngine(tiny, client, tokenizer, choose_chat_template(tiny, tokenizer, {}))
    stream = Pipeline(engine).stream_infer("the river", do_preprocess=False)
    gc.collect()
    assert "".join(response.text for response in stream) == "the river"
    del stream
    gc.collect()
    assert client.is_closed


# ---- pipeline(), over the real engine ----


@pytest.fixture(scope="module")
def real(tiny: Path) -> Iterable[Pipeline]:
    with pipeline(str(tiny), cache_max_entry_count=64) as pipe:
        yield pipe


def test_greedy_answers_are_the_same_alone_and_in_a_batch(real: Pipeline) -> None:
    config = GenerationConfig(max_new_tokens=12, ignore_eos=True)
    prompts = ["the river", "a small engine reads", "你好"]
    batch = real(prompts, config)
    alone = [real(prompt, config) for prompt in prompts]
    assert [response.token_ids for response in batch] == [response.token_ids for response in alone]
    assert all(response.generate_token_len == 12 for response in batch)
    assert [response.finish_reason for response in batch] == ["length"] * 3
    assert batch[0].text == real.tokenizer.decode(batch[0].token_ids)


def test_seeds_logprobs_and_logits_come_through(real: Pipeline) -> None:
    config = GenerationConfig(
        max_new_tokens=6, temperature=1.0, random_seed=5, logprobs=2, ignore_eos=True, output_logits="generation"
    )
    first, again = real(["the river"] * 2, config)
    assert first.token_ids == again.token_ids
    assert first.logprobs is not None
    assert [token in entry for token, entry in zip(first.token_ids, first.logprobs, strict=True)] == [True] * 6
    assert first.logits is not None
    assert first.logits.shape == (6, 384)
    top = torch.log_softmax(first.logits[0].float(), -1)[first.token_ids[0]]
    assert first.logprobs[0][first.token_ids[0]] == pytest.approx(float(top), abs=1e-4)


def test_ppl_of_the_real_model_is_that_of_its_logits(real: Pipeline) -> None:
    ids = real.tokenizer.encode("the river runs past the old mill")
    (ppl,) = real.get_ppl(ids)
    response = real(ids, GenerationConfig(max_new_tokens=1, output_logits="all"))
    assert isinstance(response, Response)
    assert response.logits is not None
    rows = torch.log_softmax(response.logits[: len(ids) - 1].float(), -1)
    expected = -rows.gather(1, torch.tensor(ids[1:])[:, None]).mean()
    assert ppl == pytest.approx(float(expected), rel=1e-4)


def test_a_session_reads_its_history_from_the_prefix_cache(real: Pipeline) -> None:
    config = GenerationConfig(max_new_tokens=8, ignore_eos=True)
    session = real.chat("the river runs past the old mill and under the bridge " * 5, gen_config=config)
    assert isinstance(session, Session)
    real.chat("and then?", session, config)
    assert session.response is not None
    assert session.response.cached_tokens >= 64


def test_pipelines_answer_from_several_threads(real: Pipeline) -> None:
    config = GenerationConfig(max_new_tokens=8, ignore_eos=True)
    expected = real("the river", config).token_ids
    results: list[Any] = []
    threads = [threading.Thread(target=lambda: results.append(real(["the river"] * 3, config))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [response.token_ids for responses in results for response in responses] == [expected] * 12


def test_close_frees_the_models_memory(tiny: Path) -> None:
    pipe = pipeline(str(tiny), cache_max_entry_count=64)
    gc.collect()
    alive = [weakref.ref(o) for o in gc.get_objects() if type(o).__name__ == "LlamaForCausalLM"]
    pipe("a", GenerationConfig(max_new_tokens=2))
    pipe.close()
    before = len(alive)
    assert before >= 1
    assert sum(ref() is not None for ref in alive) == before - 1


@pytest.mark.parametrize(
    "config",
    [
        TurbomindEngineConfig(cache_max_entry_count=64, session_len=128),
        PytorchEngineConfig(num_gpu_blocks=64, session_len=128, device_type="cpu"),
    ],
)
def test_both_backends_configs_are_taken(tiny: Path, config: TurbomindEngineConfig | PytorchEngineConfig) -> None:
    with pipeline(str(tiny), backend_config=config) as pipe:
        assert pipe.async_engine.client.info.session_len == 128


def test_settings_of_old_versions_are_taken_as_arguments(tiny: Path) -> None:
    with pipeline(
        str(tiny), model_name="internlm2-chat-7b", tp=1, session_len=100, group_size=128, cache_max_entry_count=64
    ) as pipe:
        assert pipe.async_engine.client.info.session_len == 100
        assert "<|im_start|>user\nhi<|im_end|>" in pipe.async_engine.chat_template.prompt("hi")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sesion_len": 100}, "session_len"),
        ({"tp": 2}, "tp=2 is not supported yet"),
        ({"speculative_config": SpeculativeConfig("eagle")}, "speculative_config"),
        ({"backend_config": {"tp": 1}}, "backend_config is a dict"),
        ({"log_level": "LOUD"}, "log_level='LOUD'"),
        ({"chat_template_config": ChatTemplateConfig(model_name="no-such-template")}, "no-such-template"),
        ({"model_path": "/no/such/folder"}, "/no/such/folder"),
    ],
)
def test_a_wrong_argument_is_named(tiny: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pipeline(**{"model_path": str(tiny), **arguments})


def test_public_names(tiny: Path) -> None:
    assert lmdeploy.pipeline is pipeline
    assert lmdeploy.Pipeline is Pipeline
