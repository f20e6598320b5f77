"""All products behind a layer's attention in one launch: variants compile, shapes fit, one stream has it, results are right."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lmdeploy.kernels import invariant
from lmdeploy.kernels.cuda import affine, layer_tail, nvrtc
from lmdeploy.kernels.cuda.layer_tail import Behind, Shape
from lmdeploy.kernels.cuda.skinny_gemm import Weight, tiling_table
from tests.kernels.cuda.outcomes import Outcomes, error_of, run_checks

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not IS_HOPPER, reason="there is no Hopper GPU")
NUM_CHECKS = 16


class OneToken(torch.Tensor):
    """Looks as if it lay on a GPU."""

    is_cuda = True


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The current stream, whose handle can be changed, on a GPU that there is not; no kernel has an owner yet."""
    current = SimpleNamespace(cuda_stream=1, device=torch.device("cpu"), synchronize=lambda: None, captures=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current.captures)
    monkeypatch.setattr(layer_tail, "_owners", {})
    monkeypatch.setattr(layer_tail, "num_sms", lambda: 132)
    return current


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(("is_half", "has_zeros", "group"), [(False, True, 128), (True, False, 32)])
@pytest.mark.parametrize("shape", [Shape(4096, 4096, 14336, 6144), Shape(1152, 3584, 1024)])
def test_variants_compile(
    shape: Shape, is_half: bool, has_zeros: bool, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_tail, "num_sms", lambda: 132)
    weight = Weight(torch.empty(0), 16, 128, 4, group, has_zeros)
    variant = layer_tail.variant_of(shape, weight, is_half, "gelu", 1.0)
    assert layer_tail.cubin(variant)


def test_shapes_that_fit() -> None:
    assert Shape(4096, 4096, 14336, 6144).fits(132)
    assert not Shape(4096, 4096, 14336, 6140).fits(132)
    assert not Shape(4096, 4096, 14400).fits(132)  # half a k-unit
    assert not Shape(896, 4096, 14336).fits(132)  # a warp without a k-unit
    assert Shape(4096, 4096, 33792).fits(132)
    assert not Shape(4096, 4096, 33920).fits(132)  # more rows of a block than threads
    assert not Shape(4096, 4096, 14336).fits(50)
    assert not Shape(4096, 4096, 2048).fits(132)  # a block without a tile of the MLP


def test_shared_memory_of_a_block() -> None:
    ring = 8 * 5 * 4 * 1088
    assert Shape(4096, 4096, 14336, 6144).shared_bytes(128, 132) == ring + 8 * 2 * 7 * 16 * 4
    assert Shape(4096, 4096, 2048, 12288).shared_bytes(128, 132) == ring + 8 * 6 * 16 * 4
    assert Shape(33792, 33792, 33792, 33792).fits(132)  # the most rows that a block has threads for
    assert Shape(33792, 33792, 33792, 33792).shared_bytes(32, 132) < 224 << 10


def test_only_where_it_was_measured_to_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_tail, "num_sms", lambda: 132)
    is_measured = layer_tail._is_measured.__wrapped__
    assert is_measured(Shape(4096, 4096, 14336))
    assert is_measured(Shape(4096, 4096, 14336, 6144))
    assert not is_measured(Shape(1536, 1536, 8960, 2048))  # slower
    assert not is_measured(Shape(4096, 4096, 12288))  # not in the table
    for name in tiling_table("layer_tail_sm90_132"):
        assert Shape(*map(int, name.split("x"))).fits(132)


def test_where_bits_must_not_depend_on_other_tokens_any_shape_that_fits_has_it(
    stream: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(layer_tail, "is_shared", lambda index: False)
    x = OneToken(torch.zeros(1, 1024, dtype=torch.bfloat16))
    o, gate_up, down = (Weight(torch.empty(0), n, k) for n, k in ((2048, 1024), (8192, 2048), (2048, 4096)))
    assert not layer_tail.is_faster(x, o, gate_up, down, None)  # type: ignore[arg-type]
    monkeypatch.setattr(invariant, "_is_on", True)
    assert layer_tail.is_faster(x, o, gate_up, down, None)  # type: ignore[arg-type]
    assert not layer_tail.is_faster(x, o, gate_up, Weight(torch.empty(0), 2048, 4096, 4, 64), None)  # type: ignore[arg-type]


def test_one_stream_has_the_kernel_until_it_is_given_up(stream: SimpleNamespace) -> None:
    device, shape = torch.device("cpu"), Shape(128, 256, 384)
    mine = layer_tail._exchange(device, shape)
    assert mine is not None
    assert mine.tolist() == [1] + [0] * (31 + 2 * 256 + 384)  # no word has the first launch's tag
    assert layer_tail._exchange(device, Shape(512, 256, 384)) is mine
    for other in (Shape(128, 384, 256), Shape(128, 256, 384, 64)):  # old tags of another shape could be a new one's
        assert layer_tail._exchange(device, other) is not mine
    stream.cuda_stream = 2
    assert layer_tail._exchange(device, shape) is None
    layer_tail.give_up(stream)  # type: ignore[arg-type]
    assert layer_tail._exchange(device, shape) is None
    stream.cuda_stream = 1
    layer_tail.give_up(stream)  # type: ignore[arg-type]
    stream.cuda_stream = 2
    assert layer_tail._exchange(device, shape) is not None


def test_nothing_is_made_anew_in_a_capture(stream: SimpleNamespace) -> None:
    device, shape = torch.device("cpu"), Shape(128, 256, 384)
    stream.captures = True
    assert layer_tail._exchange(device, shape) is None
    stream.captures = False
    mine = layer_tail._exchange(device, shape)
    stream.captures = True
    assert layer_tail._exchange(device, shape) is mine
    assert layer_tail._exchange(device, Shape(128, 256, 512)) is None


def test_a_stream_without_the_kernel_gets_an_error(stream: SimpleNamespace) -> None:
    weight = Weight(torch.empty(0), 256, 256)
    layer_tail._exchange(torch.device("cpu"), Shape(256, 256, 128))
    stream.cuda_stream = 2
    x = torch.zeros(1, 256, dtype=torch.bfloat16)
    with pytest.raises(nvrtc.KernelError, match="another stream"):
        layer_tail.layer_tail(x, x, weight, weight, weight, "silu", norm_weight=x[0], norm_eps=1e-5)


def test_layers_use_it_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    o, gate_up, down, qkv = (affine.PackedAffine(Weight(torch.zeros(1), 64 + i, 256)) for i in range(4))
    x, asked = torch.zeros(1, 256, dtype=torch.bfloat16), []
    monkeypatch.setattr(layer_tail, "is_faster", lambda *arguments: bool(asked.append(arguments)) or len(asked) > 1)
    monkeypatch.setattr(layer_tail, "layer_tail", lambda *arguments, **named: (arguments, named))
    norm, bias, residual = {"norm_weight": x[0]}, torch.ones(67), torch.zeros(1, 64, dtype=torch.bfloat16)
    assert affine.layer_tail(x, residual, [o, gate_up, down], "silu", norm, None, None) is None
    _, named = affine.layer_tail(x, residual, [o, gate_up, down, qkv], "silu", norm, x[0] + 1, bias)  # type: ignore[misc]
    assert isinstance(named, dict)
    assert named["behind"].qkv is qkv.weight
    assert named["behind"].bias is bias
    assert asked[0] == (x, o.weight, gate_up.weight, down.weight, None)
    assert isinstance(asked[1][4], Behind)
    assert affine.layer_tail(x, residual.float(), [o, gate_up, down], "silu", norm, None, None) is None


@pytest.fixture(scope="module")
def outcomes() -> Outcomes:
    from benchmarks.layer_tail import check

    found = run_checks(check, NUM_CHECKS)
    layer_tail.give_up(torch.cuda.current_stream())
    return found


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("number", range(NUM_CHECKS))
def test_against_float64(number: int, outcomes: Outcomes) -> None:
    assert error_of(outcomes[number]) < 1e-2


@pytest.mark.gpu
@on_hopper
def test_an_engine_uses_it_and_answers_as_without(monkeypatch: pytest.MonkeyPatch) -> None:
    from lmdeploy.bench.shapes import shape_folder, shape_overrides
    from lmdeploy.engine.config import EngineConfig
    from lmdeploy.engine.core import Engine
    from lmdeploy.engine.request import Request, SamplingParams

    launches: list[bool] = []
    launch = layer_tail.layer_tail

    def counted(*arguments: object, **named: object) -> object:
        launches.append(named["behind"] is not None)
        return launch(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(layer_tail, "layer_tail", counted)
    logits = []
    for is_on in (True, False):
        monkeypatch.setattr(layer_tail, "_is_measured", lambda shape, is_on=is_on: is_on)
        torch.manual_seed(0)
        config = EngineConfig(
            empty_init=True, session_len=256, cache_max_entry_count=0.02, hf_overrides=shape_overrides("awq")
        )
        engine = Engine(shape_folder("internlm2-1.8b"), config)
        engine.add(Request("a", [1, 5, 9], SamplingParams(max_new_tokens=12, return_logits="generation")))
        outputs = []
        while engine.has_work:
            outputs += [output.logits for output in engine.step() if output.logits is not None]
        logits.append(torch.cat(outputs)[:3].double().cpu())  # then two tokens that are as likely may differ
        engine.close()
        assert any(launches) == is_on  # also of a graph that is captured
        launches.clear()
    assert ((logits[0] - logits[1]).norm() / logits[1].norm()).item() < 3e-2
