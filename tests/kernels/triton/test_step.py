"""A whole step's attention on the GPU's way, against the twins': prompts and decodes together, and latent attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lmdeploy.kernels.reference import attention
from lmdeploy.kernels.triton import step
from lmdeploy.layers.context import ForwardContext
from tests.kernels.triton.steps import fill, make_spec, make_step, normal, poisoned_layer

QUERY_LENS, CONTEXT_LENS = [1, 1, 7, 40, 1, 33], [70, 16, 60, 40, 50, 34]
BLOCK_SIZE = 16


def prepare(
    dim: int, device: torch.device, kv_heads: int, value_dim: int | None = None
) -> tuple[ForwardContext, Tensor]:
    """A step whose context is stored but for its new tokens, and its keys."""
    num_blocks = sum(-(-n // BLOCK_SIZE) for n in CONTEXT_LENS) + 2
    ctx = make_step(QUERY_LENS, CONTEXT_LENS, num_blocks, BLOCK_SIZE, device)
    spec = make_spec(2, kv_heads, dim, value_dim)
    keys, values = poisoned_layer(num_blocks, BLOCK_SIZE, spec, device)
    assert isinstance(keys, Tensor)
    fill(keys, values, ctx, spec)
    return replace(ctx, decode_buffers=step.DecodeBuffers(len(QUERY_LENS), max(CONTEXT_LENS), device)), keys


@pytest.mark.parametrize("gathered_bytes", [1 << 29, 3 * 60 * 64 * 2, 1])
def test_requests_are_taken_in_runs_that_do_not_gather_too_much(
    gathered_bytes: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "_GATHERED_BYTES", gathered_bytes)
    ctx, keys = prepare(32, device, kv_heads=1)
    spec = replace(make_spec(2, 1, 32), softcap=20.0)  # what only Triton computes
    q = normal(sum(QUERY_LENS), 2, 32, seed=9, device=device, dtype=torch.float16)
    out = step.attend(q, keys, keys, ctx, spec, torch.float16)
    want = attention.paged_attention(q.float(), keys.float(), keys.float(), ctx, spec)
    torch.testing.assert_close(out.float(), want, rtol=2e-3, atol=2e-3)


def test_requests_of_one_token_go_to_the_kernel_that_does_all_and_prompts_follow(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(2, 1, 32)
    ctx, keys = prepare(32, device, kv_heads=1)
    values = torch.roll(keys, 1, dims=-1)
    qkv = normal(sum(QUERY_LENS), 4 * 32, seed=9, device=device, dtype=torch.float16)
    angles = ctx.positions.float()[:, None] * 0.7 ** torch.arange(16, device=device)
    tables = angles.cos(), angles.sin()
    launches = []

    def whole(qkv: Tensor, *arguments: Any, may_overlap: bool) -> Tensor:
        """What the CUDA kernel does, by the twin."""
        launches.append(may_overlap)
        count = len(qkv)
        few = replace(
            ctx, positions=ctx.positions[:count], context_lens=ctx.context_lens[:count], slot_mapping=ctx.slot_mapping[:count],
            block_tables=arguments[4], query_lens=[1] * count, context_lens_host=CONTEXT_LENS[:count],
        )  # fmt: skip
        return attention.rope_store_attend(qkv, *arguments[:4], few, spec)

    monkeypatch.setattr(step.cuda, "supports", lambda *arguments: True)
    monkeypatch.setattr(step.cuda, "choose_shape", lambda *arguments: step.cuda.Shape(1, 1, 1))
    monkeypatch.setattr(step.cuda, "rope_store_attend", whole)
    expected = attention.rope_store_attend(qkv, *tables, keys.clone(), values.clone(), ctx, spec)
    for _ in range(2):
        out = step.rope_store_attend(qkv, *tables, keys, values, ctx, spec)
        torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    assert launches == [False, True]  # the first of a step waits for all before it


def test_runs_hold_every_request_once_and_no_more_than_the_limit() -> None:
    assert step._prefill_runs([9, 4, 4, 4, 100, 1, 2], 1, 8) == [slice(1, 3), slice(3, 4), slice(4, 5), slice(5, 7)]
    assert step._prefill_runs([5, 5], 0, 1000) == [slice(0, 2)]


@pytest.mark.parametrize("interleaved", [False, True])
def test_latent_attention_of_a_whole_step(interleaved: bool, device: torch.device) -> None:
    latent_size, rotated = 32, 16
    spec = replace(make_spec(2, 1, latent_size + rotated, latent_size), interleaved=interleaved)
    ctx, cache = prepare(latent_size + rotated, device, kv_heads=1)
    tokens = sum(QUERY_LENS)
    fused = normal(tokens, 2 * latent_size + rotated, seed=1, device=device, dtype=torch.float16)
    latent, rope_key = (
        fused[:, :latent_size].contiguous(),
        fused[:, 2 * latent_size :],
    )  # the key is a part of wider rows
    q = normal(tokens, 2, latent_size + rotated, seed=2, device=device, dtype=torch.float16)
    angles = ctx.positions[:, None].float() * torch.arange(1, rotated // 2 + 1, device=device) / 10
    arguments = (q, latent, rope_key, angles.cos(), angles.sin())
    twin = cache.clone()
    want = attention.latent_store_attend(*arguments, twin, ctx, spec)
    out = step.latent_store_attend(*arguments, cache, ctx, spec)
    torch.testing.assert_close(out.float(), want.float(), rtol=4e-3, atol=4e-3)
    torch.testing.assert_close(cache, twin, rtol=2e-3, atol=2e-3, equal_nan=True)
