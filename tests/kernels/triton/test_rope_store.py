"""Rotation, norms and the write into the cache in one kernel, against the plain functions one after the other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lmdeploy.kernels.reference import attention
from lmdeploy.kernels.reference.quantized_cache import CodeFormat, QuantizedBlocks, quantize
from lmdeploy.kernels.spec import AttentionSpec
from lmdeploy.kernels.triton.rope_store import rope_store
from lmdeploy.layers.quantized_cache import FORMATS
from lmdeploy.messages import QuantPolicy
from tests.kernels.triton.steps import clones, make_spec, make_step, normal, poisoned_layer

TOKENS = [3, 1, 5]
LENGTHS = [9, 1, 37]
BLOCK_SIZE, NUM_BLOCKS = 16, 8
NORM = normal(64, seed=5, device=torch.device("cpu"))
PLAIN = make_spec(6, 2, 64)
SPECS = {
    "plain": PLAIN,
    "interleaved": replace(PLAIN, interleaved=True),
    "norms": replace(PLAIN, q_norm=NORM, k_norm=NORM + 0.5, qk_norm_eps=1e-5, qk_norm_offset=1.0),
    "clip": replace(PLAIN, clip=0.7),
    "logn": replace(PLAIN, logn_length=8),
    "all": replace(PLAIN, q_norm=NORM, k_norm=NORM, qk_norm_eps=1e-5, clip=1.5, logn_length=8, interleaved=True),
}


def tables(rotary_dim: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of each token, [T, R / 2]."""
    frequencies = 100.0 ** -torch.linspace(0, 1, rotary_dim // 2, device=positions.device)
    angles = positions[:, None] * frequencies
    return angles.cos(), angles.sin()


def expected(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, positions: Tensor, spec: AttentionSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """q [T, H, D] as it attends to plain blocks; k, v [T, Hkv, D]."""
    q, k, v = attention._split_heads(qkv, spec)
    if cos is not None and sin is not None:
        q, k = (attention.apply_rope(x, cos, sin, spec.interleaved) for x in (q, k))
    if spec.logn_length:
        growth = (torch.log((positions + 1).float()) / torch.log(torch.tensor(float(spec.logn_length)))).clamp(min=1)
        q = (q * growth[:, None, None]).to(q.dtype)
    return q, k, v


def moved(spec: AttentionSpec, device: torch.device) -> AttentionSpec:
    if spec.q_norm is None or spec.k_norm is None:
        return spec
    return replace(spec, q_norm=spec.q_norm.to(device), k_norm=spec.k_norm.to(device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("rotary_dim", [64, 48, 0])
def test_plain_blocks(name: str, rotary_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    spec = moved(SPECS[name], device)
    ctx = make_step(TOKENS, LENGTHS, NUM_BLOCKS, BLOCK_SIZE, device)
    keys, values = poisoned_layer(NUM_BLOCKS, BLOCK_SIZE, spec, device, dtype)
    twin_keys, twin_values = clones(keys), clones(values)
    qkv = normal(sum(TOKENS), 10 * 64, seed=1, device=device, dtype=dtype)
    cos, sin = tables(rotary_dim, ctx.positions) if rotary_dim else (None, None)
    q, k, v = expected(qkv, cos, sin, ctx.positions, spec)
    attention.store_kv(k, v, twin_keys, twin_values, ctx.slot_mapping)
    out = rope_store(qkv, cos, sin, ctx.positions, ctx.slot_mapping, keys, values, spec)
    tolerance = 2e-3 if dtype == torch.float16 else 1e-5
    torch.testing.assert_close(out, q, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(keys, twin_keys, rtol=tolerance, atol=tolerance, equal_nan=True)
    torch.testing.assert_close(values, twin_values, rtol=0, atol=0, equal_nan=True)


def test_padding_writes_nothing(device: torch.device) -> None:
    """Strided input rows, and two tokens of a graph's padding."""
    ctx = make_step(TOKENS, LENGTHS, NUM_BLOCKS, BLOCK_SIZE, device)
    keys, values = poisoned_layer(NUM_BLOCKS, BLOCK_SIZE, PLAIN, device)
    qkv = normal(sum(TOKENS), 11 * 64, seed=1, device=device, dtype=torch.float16)[:, : 10 * 64]
    cos, sin = tables(64, ctx.positions)
    slots = ctx.slot_mapping.clone()
    slots[[1, 6]] = -1
    out = rope_store(qkv, cos, sin, ctx.positions, slots, keys, values, PLAIN)
    q, k, _ = expected(qkv, cos, sin, ctx.positions, PLAIN)
    torch.testing.assert_close(out, q, rtol=2e-3, atol=2e-3)
    written = (~keys.isnan()).all(-1).all(1).flatten().nonzero().flatten()
    assert written.tolist() == sorted(slots[slots >= 0].tolist())
    assert (~keys.isnan()).sum() == 7 * 2 * 64
    stored = keys.transpose(1, 2).flatten(0, 1)[slots[slots >= 0]]
    torch.testing.assert_close(stored, k[slots >= 0], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [64, 80, 96, 128])
@pytest.mark.parametrize("policy", FORMATS)
def test_quantized_blocks(policy: QuantPolicy, dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """The same codes and params, but where a key's last bit falls on the other side of the middle between two codes."""
    spec = make_spec(3, 2, dim)
    ctx = make_step(TOKENS, LENGTHS, NUM_BLOCKS, BLOCK_SIZE, device)
    keys, values = poisoned_layer(NUM_BLOCKS, BLOCK_SIZE, spec, device, policy=policy)
    assert isinstance(keys, QuantizedBlocks)
    assert isinstance(values, QuantizedBlocks)
    twin_keys, twin_values = clones(keys), clones(values)
    qkv = normal(sum(TOKENS), 7 * dim, seed=1, device=device, dtype=dtype)
    qkv[:, 5] *= 20
    qkv[2] = 0
    qkv[3] = 1.5
    cos, sin = tables(dim, ctx.positions)
    q, k, v = expected(qkv, cos, sin, ctx.positions, spec)
    attention.store_kv(k, v, twin_keys, twin_values, ctx.slot_mapping)
    out = rope_store(qkv, cos, sin, ctx.positions, ctx.slot_mapping, keys, values, spec)
    assert out.dtype == dtype
    tolerance = 4e-3 if dtype == torch.float16 else 2e-5
    torch.testing.assert_close(out.float(), keys.rotate(q), rtol=tolerance, atol=tolerance)
    assert torch.equal(values.codes, twin_values.codes)
    assert torch.equal(values.params.view(torch.int16), twin_values.params.view(torch.int16))
    torch.testing.assert_close(keys.params, twin_keys.params, rtol=4e-3, atol=4e-3, equal_nan=True)
    assert (keys.codes != twin_keys.codes).float().mean() < 0.002


@pytest.mark.parametrize("format", [CodeFormat(8, float_type=t) for t in (torch.float8_e4m3fn, torch.float8_e5m2)])
def test_every_rounding_of_8_bit_floats(format: CodeFormat, device: torch.device) -> None:
    """Values that are exact, halfway, just beside it, and subnormal."""
    spec = make_spec(1, 1, 128)
    every = torch.arange(128, dtype=torch.uint8).view(format.float_type).float()
    every = every[every.isfinite() & (every <= 448)].unique()
    middles = (every[1:] + every[:-1]) / 2
    numbers = torch.cat((every, middles, middles.nextafter(torch.tensor(0.0)), middles.nextafter(torch.tensor(9e9))))
    numbers = torch.cat((numbers, -numbers))
    rows = torch.nn.functional.pad(numbers, (0, -len(numbers) % 127)).view(-1, 127)
    rows = torch.nn.functional.pad(rows, (0, 1), value=448.0)
    qkv = rows.repeat(1, 3).to(device)
    blocks = QuantizedBlocks(
        torch.zeros(len(rows), 1, 1, 128, dtype=torch.uint8, device=device),
        torch.zeros(len(rows), 1, 1, 2, device=device).half(),
        format,
    )
    slots = torch.arange(len(rows), device=device)
    rope_store(qkv, None, None, slots, slots, blocks, clones(blocks), spec)
    codes, params = quantize(rows, format)
    assert torch.equal(blocks.codes[:, 0, 0].cpu(), codes)
    assert torch.equal(blocks.params[:, 0, 0].cpu(), params)
