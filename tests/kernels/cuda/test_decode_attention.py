"""The kernel of one new token per request on a GPU, against the twin and against the kernel that stores alone."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from lmdeploy.kernels.reference import attention as reference
from lmdeploy.kernels.spec import AttentionSpec
from lmdeploy.kernels.triton.stored import Blocks
from lmdeploy.layers.context import ForwardContext
from lmdeploy.messages import QuantPolicy
from tests.kernels.triton.steps import clones, fill, make_step, normal, poisoned_layer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
CUDA = torch.device("cuda")
POLICIES = [None, None, QuantPolicy.INT8, QuantPolicy.INT4, QuantPolicy.K8V4]
BATCHES, CLUSTERS = (1, 20, 1000), (None, None, None, 2, 4)


@dataclass
class Case:
    """A decode step whose last request is padding; keys and values lack the new tokens, whose places hold poison."""

    qkv: Tensor
    cos: Tensor | None
    sin: Tensor | None
    keys: Blocks
    values: Blocks
    ctx: ForwardContext
    spec: AttentionSpec
    cluster: int | None
    batch: int  # for which the kernel's shape is chosen

    def attend(self, keys: Blocks, values: Blocks, rows: slice = slice(None)) -> Tensor:
        """The kernel's result for some of the requests, which it also stores."""
        from lmdeploy.kernels.cuda import decode_attention as cuda
        from lmdeploy.kernels.triton import decode_attention as plan

        spec, ctx, qkv = self.spec, self.ctx, self.qkv[rows]
        rotary_dim = 0 if self.cos is None else 2 * self.cos.shape[1]
        assert cuda.supports(spec, keys, values, qkv.dtype, rotary_dim)
        usual = cuda.choose_shape(keys, spec, self.batch)
        shape = replace(usual, cluster=self.cluster or usual.cluster)
        sizes = (len(qkv), 16384, spec.num_heads, spec.head_dim, CUDA, shape.min_split, shape.whole)
        scratch = plan.make_scratch(*sizes)
        work = plan.plan(ctx.context_lens[rows].contiguous(), scratch)
        cos, sin = (None, None) if self.cos is None or self.sin is None else (self.cos[rows], self.sin[rows])
        out = cuda.rope_store_attend(
            qkv, cos, sin, keys, values, ctx.block_tables[rows], work, spec, may_overlap=False,
            shape=shape,
        )  # fmt: skip
        assert not scratch.counters.any()
        return out


def make_case(number: int) -> Case:
    draw = random.Random(number)
    policy = draw.choice(POLICIES)
    dim = draw.choice([64, 80, 96, 128] if policy is None else [64, 128])
    kv_heads, group = draw.choice([1, 2, 8]), draw.choice([1, 4, 6, 7, 8, 16])
    dtype, size = draw.choice([torch.bfloat16, torch.float16]), draw.choice([16, 64, 128])
    longest = draw.choice([70, 1500, 3000])
    lengths = [1, size, size + 1, *(draw.randrange(1, longest) for _ in range(draw.choice([1, 3, 9]))), 0]
    rotary_dim = draw.choice([0, dim // 2 // 8 * 8, dim, dim])
    num_blocks = sum(-(-length // size) for length in lengths) + 1
    ctx = make_step([1] * len(lengths), lengths, num_blocks, size, CUDA)
    spec = AttentionSpec(
        kv_heads * group, kv_heads, dim, dim, dim**-0.5,
        interleaved=draw.random() < 0.4,
        clip=1.5 if draw.random() < 0.3 else None,
        logn_length=100 if draw.random() < 0.3 else None,
        qk_norm_eps=1e-5,
        qk_norm_offset=draw.choice([0.0, 1.0]),
    )  # fmt: skip
    if draw.random() < 0.4:
        weights = [1 + 0.1 * normal(dim, seed=i, device=CUDA, dtype=dtype) for i in (1, 2)]
        spec = replace(spec, q_norm=weights[0], k_norm=weights[1])
    keys, values = poisoned_layer(num_blocks, size, spec, CUDA, dtype, policy)
    before = replace(ctx, context_lens_host=[max(length - 1, 0) for length in lengths])
    fill(keys, values, before, spec)
    qkv = normal(len(lengths), (group + 2) * kv_heads * dim, seed=number, device=CUDA, dtype=dtype)
    cos = sin = None
    if rotary_dim:
        angles = 7 * normal(len(lengths), rotary_dim // 2, seed=3, device=CUDA)
        cos, sin = angles.cos(), angles.sin()
    return Case(qkv, cos, sin, keys, values, ctx, spec, draw.choice(CLUSTERS), draw.choice(BATCHES))


def bits(blocks: Blocks) -> tuple[Tensor, ...]:
    """What lies in the cache, poison and all."""
    parts = (blocks,) if isinstance(blocks, Tensor) else blocks.parts
    return tuple(part if part.dtype == torch.uint8 else part.view(torch.int16) for part in parts)


@pytest.mark.parametrize("number", range(36))
def test_result_is_the_twins(number: int) -> None:
    case = make_case(number)
    ctx, spec = case.ctx, case.spec
    twins = clones(case.keys), clones(case.values)
    out = case.attend(case.keys, case.values)
    live = [row for row, length in enumerate(ctx.context_lens_host) if length]
    assert not out[len(live) :].any()  # padding
    few = replace(
        ctx, positions=ctx.positions[live], context_lens=ctx.context_lens[live], block_tables=ctx.block_tables[live],
        slot_mapping=ctx.slot_mapping[live], query_lens=[1] * len(live), context_lens_host=ctx.context_lens_host[:-1],
    )  # fmt: skip
    q, k, v = reference._split_heads(case.qkv[live], spec)
    if case.cos is not None and case.sin is not None:
        q, k = (reference.apply_rope(x, case.cos[live], case.sin[live], spec.interleaved) for x in (q, k))
    reference.store_kv(k, v, *twins, few.slot_mapping)
    wide = [twin.float() if isinstance(twin, Tensor) else twin for twin in twins]
    expected = reference.paged_attention(reference._grow(q, few, spec).float(), wide[0], wide[1], few, spec).flatten(1)
    for row in live:
        error = (out[row].float() - expected[row]).norm() / expected[row].norm()
        is_exact = case.qkv.dtype == torch.float16 and isinstance(case.keys, Tensor)
        assert error < (4e-3 if is_exact else 1.2e-2), (row, spec, case.cluster)


@pytest.mark.parametrize("number", range(36))
def test_what_is_stored_is_what_rope_store_stores(number: int) -> None:
    """But for numbers so near to the middle of two that another order of rounding tips them over."""
    from lmdeploy.kernels.triton.rope_store import rope_store

    case = make_case(number)
    ctx = case.ctx
    keys, values = clones(case.keys), clones(case.values)
    rope_store(case.qkv, case.cos, case.sin, ctx.positions, ctx.slot_mapping, keys, values, case.spec)
    case.attend(case.keys, case.values)
    num_new = sum(length > 0 for length in ctx.context_lens_host) * case.spec.num_kv_heads * case.spec.head_dim
    for part, (mine, theirs) in enumerate(
        zip(bits(case.keys) + bits(case.values), bits(keys) + bits(values), strict=True)
    ):
        differing = mine != theirs
        count = int(differing.sum())
        if count:
            print(number, part, count, num_new, case.spec.q_norm is not None, case.spec.interleaved)
        assert count <= num_new // 100
        assert ((mine.int() - theirs.int())[differing].abs() <= (17 if mine.dtype == torch.uint8 else 1)).all()


@pytest.mark.parametrize("number", range(0, 36, 3))
def test_bits_are_the_same_in_every_run_and_whatever_else_is_in_the_batch(number: int) -> None:
    case = make_case(number)
    stored = [clones(case.keys), clones(case.values)]
    out = case.attend(case.keys, case.values)
    assert torch.equal(out, case.attend(*stored))
    assert all(torch.equal(a, b) for a, b in zip(bits(case.keys), bits(stored[0]), strict=True))
    for row in (0, 2, len(out) - 2):
        assert torch.equal(case.attend(*stored, slice(row, row + 1))[0], out[row])


@pytest.mark.parametrize("policy", [None, QuantPolicy.INT8, QuantPolicy.INT4])
def test_a_step_of_decodes_and_prompts_is_the_twins(policy: QuantPolicy | None) -> None:
    from lmdeploy.kernels.triton import step

    query_lens, context_lens = [1, 1, 7, 40, 1, 33], [70, 1, 60, 40, 50, 34]
    spec = AttentionSpec(8, 2, 64, 64, 0.125)
    ctx = make_step(query_lens, context_lens, 24, 16, CUDA)
    keys, values = poisoned_layer(24, 16, spec, CUDA, torch.float16, policy)
    before = [total - count for total, count in zip(context_lens, query_lens, strict=True)]
    fill(keys, values, replace(ctx, context_lens_host=before), spec)
    ctx = replace(ctx, decode_buffers=step.DecodeBuffers(len(query_lens), max(context_lens), CUDA))
    qkv = normal(sum(query_lens), 12 * 64, seed=5, device=CUDA, dtype=torch.float16)
    angles = ctx.positions.float()[:, None] * 0.7 ** torch.arange(32, device=CUDA)
    cos, sin = angles.cos(), angles.sin()
    twins = clones(keys), clones(values)
    expected = reference.rope_store_attend(qkv, cos, sin, *twins, ctx, spec)
    for _ in range(2):  # the second launch may begin before what is before it has ended
        out = step.rope_store_attend(qkv, cos, sin, keys, values, ctx, spec)
        torch.testing.assert_close(out.float(), expected.float(), rtol=1e-2, atol=1e-2)
