"""Statistics of activations, keys and values against the layer run by hand, and the 0.1 scales made of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lmdeploy.errors import CheckpointError, ConfigError
from lmdeploy.lite.calibrate import calibrate, read_statistics
from lmdeploy.lite.kv_qparams import KvSettings, write_kv_scales
from lmdeploy.lite.observers import STATISTICS, Observer
from lmdeploy.lite.settings import CalibrationSettings
from tests.lite.checkpoints import make_golden, make_llama, write_text


def run_calibrate(model: Path, folder: Path) -> Path:
    work = folder / "stats"
    calibrate(model, CalibrationSettings(work, str(write_text(folder)), 6, 48), lambda text: None)
    return work


def test_observer_adds_up() -> None:
    rows = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    observer = Observer()
    for part in (rows[:7], rows[7:7], rows[7:]):
        observer.add(part)
    expected = (rows.amax(0), rows.amin(0), rows.mean(0), rows.abs().amax(0), rows.abs().mean(0))
    found = observer.statistics()
    for name, value in zip(STATISTICS, expected, strict=True):
        torch.testing.assert_close(found[name], value)
    torch.testing.assert_close(observer.statistics(torch.tensor([3, 1]))["mean"], rows.mean(0)[[3, 1]])


def test_files_of_every_linear_and_layer(tmp_path: Path) -> None:
    work = run_calibrate(make_llama(tmp_path / "model"), tmp_path)
    assert sorted(path.name for path in work.iterdir()) == [
        "inputs_stats.pth",
        "key_stats.pth",
        "outputs_stats.pth",
        "value_stats.pth",
    ]
    inputs, outputs = (read_statistics(work / f"{name}_stats.pth") for name in ("inputs", "outputs"))
    assert tuple(inputs) == STATISTICS
    linears = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    names = {f"model.layers.{layer}.{linear}" for layer in range(3) for linear in linears}
    assert set(inputs["absmax"]) == set(outputs["mean"]) == names
    first = "model.layers.0.self_attn"
    assert torch.equal(inputs["max"][f"{first}.q_proj"], inputs["max"][f"{first}.v_proj"])
    assert inputs["max"][f"{first}.q_proj"].shape == (128,)
    assert outputs["max"][f"{first}.k_proj"].shape == (64,)
    # Values enter the cache as the linear gives them: the same numbers, by head.
    values = read_statistics(work / "value_stats.pth")
    for statistic in STATISTICS:
        torch.testing.assert_close(
            values[statistic]["model.layers.0"].flatten(), outputs[statistic][f"{first}.v_proj"], rtol=1e-4, atol=1e-5
        )


def test_outputs_follow_the_checkpoint_where_its_rows_are_interleaved(tmp_path: Path) -> None:
    """InternLM2 stores queries, keys and values of each head together: zeroed rows must show up where they are stored."""
    model = make_golden("internlm2/7b", tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    name = "model.layers.0.attention.wqkv.weight"
    weights[name][[1, 5, 17]] = 0
    save_file(weights, model / "model.safetensors")
    work = run_calibrate(model, tmp_path)
    largest = read_statistics(work / "outputs_stats.pth")["absmax"][name.removesuffix(".weight")]
    assert len(largest) == len(weights[name])
    assert (largest == 0).nonzero().flatten().tolist() == [1, 5, 17]


def test_experts_and_latent_attention(tmp_path: Path) -> None:
    moe = read_statistics(run_calibrate(make_golden("qwen2_moe/base", tmp_path / "moe"), tmp_path) / "inputs_stats.pth")
    assert any(".experts.0.down_proj" in name for name in moe["absmax"])
    told: list[str] = []
    model = make_golden("deepseek_v2/full", tmp_path / "mla")
    calibrate(model, CalibrationSettings(tmp_path / "mla_stats", str(write_text(tmp_path)), 4, 32), told.append)
    assert not (tmp_path / "mla_stats" / "key_stats.pth").exists()
    assert any("latent" in line for line in told)


def read_numbers(file: Path) -> list[float]:
    return np.fromfile(file, dtype=np.float32).tolist()


@pytest.mark.parametrize("num_tp", [1, 2])
def test_kv_scales_are_those_of_the_formula(num_tp: int, tmp_path: Path) -> None:
    work = run_calibrate(make_llama(tmp_path / "model"), tmp_path)
    weights = tmp_path / "workspace" / "triton_models" / "weights"
    weights.mkdir(parents=True)
    files = write_kv_scales(KvSettings(work, weights, num_tp=num_tp))
    assert len(files) == 3 * num_tp
    keys, values = (read_statistics(work / f"{name}_stats.pth") for name in ("key", "value"))
    for rank in range(num_tp):
        expected = []
        for statistics in (keys, values):
            heads = slice(2 // num_tp * rank, 2 // num_tp * (rank + 1))
            high = statistics["max"]["model.layers.1"][heads].max().item()
            low = statistics["min"]["model.layers.1"][heads].min().item()
            expected += [(high - low) / 255, (high + low) / 2]
        found = read_numbers(weights / f"layers.1.past_kv_scale.{rank}.weight")
        assert found == pytest.approx(expected, rel=1e-6)
    write_kv_scales(KvSettings(work, weights, kv_sym=True))
    largest = [statistics["absmax"]["model.layers.2"].max().item() / 127 for statistics in (keys, values)]
    assert read_numbers(weights / "layers.2.past_kv_scale.0.weight") == pytest.approx(largest, rel=1e-6)


def test_kv_scales_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no folder"):
        write_kv_scales(KvSettings(tmp_path, tmp_path / "none"))
    with pytest.raises(CheckpointError, match="lmdeploy lite calibrate"):
        write_kv_scales(KvSettings(tmp_path, tmp_path))
    (tmp_path / "key_stats.pth").write_bytes(b"not a tensor file")
    with pytest.raises(CheckpointError, match=r"key_stats.pth cannot be read"):
        write_kv_scales(KvSettings(tmp_path, tmp_path))
    with pytest.raises(ConfigError, match="--kv-bits 4"):
        KvSettings(tmp_path, tmp_path, kv_bits=4)


def test_heads_that_the_ranks_do_not_divide(tmp_path: Path) -> None:
    work = run_calibrate(make_llama(tmp_path / "model"), tmp_path)
    with pytest.raises(ConfigError, match="--num-tp 3"):
        write_kv_scales(KvSettings(work, tmp_path, num_tp=3))
    assert not list(tmp_path.glob("layers.*"))
