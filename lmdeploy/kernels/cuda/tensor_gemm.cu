// y[M,N] = x[M,K] W[N,K]^T (+ bias, + residual | activation(gate) * up) for up to 256 tokens; W plain rows of 16 bits; sm_90a.
//
// Compiled by NVRTC, one cubin per set of macros (functions that are not here are in common.cuh):
//   NW     rows of W of a warpgroup, a multiple of 8 (gated: of 16, half of them gates), up to 256
//   MT     token tiles of 64                               XROWS  rows of x that are copied, a multiple of 8 up to 64 MT
//   WGN    warpgroups along W's rows, for each token tile
//   KS     pieces of 64 columns in a stage                 STAGES depth of the ring
//   CL     cluster size: K split over blocks that add up through distributed shared memory
//   FP16  0|1      activations and weights bf16 or fp16    OUT32 0|1 y in float32
//   EPI   0 nothing, 1 add residual, 2 activation(gate) * up: rows 0..N/2 are gates, the others ups, y is [M,N/2]
//   ACT   0 silu, 1 gelu, 2 gelu_tanh                      BIAS  0|1
//   ACCUMULATORS, REGISTERS, DESCRIPTORS  the operands of the wgmma of NW columns, which PTX wants written out
//
// wgmma.m64nNWk16: tokens are the left operand and rows of W the right one, both from shared memory, so that a block can own
// any multiple of 8 rows and N spreads evenly over the SMs; tokens short of 64 are multiplied for nothing, which is free
// as long as reading W takes longer. One warp copies: boxes of 64 columns in the 128-byte swizzle through tensor maps into a
// ring, x before W in each stage; W's boxes of the first round are requested before griddepcontrol.wait. Rows of x that
// are not copied are whatever lies there, and give rows of y that nobody stores. With CL > 1 each block of a
// cluster has a part of K, and finishes a part of the columns. Every sum has a fixed order: equal bits on every run.
#include "common.cuh"

#define NB (NW * WGN)                        // rows of W of a block
#define CONSUMERS (128 * MT * WGN)
#define THREADS (CONSUMERS + 32)
#define XBYTES (XROWS * 128)                 // of 64 columns
#define WBYTES (NB * 128)
#define STAGE_BYTES (KS * (XBYTES + WBYTES))
#define CHUNKS (NW / 8)
#define OUTS (EPI == 2 ? CHUNKS / 2 : CHUNKS)   // chunks of 8 columns of y of a warpgroup
#define OUT_ROWS (WGN * OUTS * 8)
#define SLACK (XROWS < 64 ? 8192 : 0)        // behind the ring, since a token tile is read as a whole
#define PART ((OUTS + CL - 1) / CL)          // of those, what a block of the cluster finishes at most

// The block of a cluster that finishes a chunk
__device__ __forceinline__ constexpr int owner_of(int chunk) { return ((chunk + 1) * CL - 1) / OUTS; }

extern "C" __global__ void __launch_bounds__(THREADS, 1)
tensor_gemm(const __grid_constant__ TensorMap wmap, const __grid_constant__ TensorMap xmap, void* y, const u16* residual,
            const u16* __restrict__ bias, int M, int N, int K, int ldy) {
  extern __shared__ __align__(1024) char smem[];
  __shared__ __align__(8) u64 bars[2 * STAGES];
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31;
  const u32 ring = (smem_u32(smem) + 1023) & ~1023u, full = smem_u32(bars), empty = full + 8 * STAGES;
  const int rank = CL > 1 ? blockIdx.x % CL : 0, row0 = blockIdx.x / CL * OUT_ROWS, outs = EPI == 2 ? N / 2 : N;
  const int total = (K + 64 * KS - 1) / (64 * KS), s0 = rank * total / CL, steps = (rank + 1) * total / CL - s0;

  const u64 stream = evict_first(), keep = evict_last();      // W is read once, x by every block
  auto copy_w = [&](int step, int slot) {
    const u32 bar = full + 8 * slot;
    expect(bar, STAGE_BYTES);
#pragma unroll
    for (int i = 0; i < KS; i++) {
      const u32 dst = ring + slot * STAGE_BYTES + KS * XBYTES + i * WBYTES;
      const int column = ((s0 + step) * KS + i) * 64;
      if (EPI != 2) copy_box(dst, &wmap, column, row0, bar, stream);
      else
#pragma unroll
        for (int g = 0; g < WGN; g++) {      // each warpgroup's gates, then its ups
          copy_box(dst + g * (NW * 128), &wmap, column, row0 + g * (NW / 2), bar, stream);
          copy_box(dst + g * (NW * 128) + NW * 64, &wmap, column, outs + row0 + g * (NW / 2), bar, stream);
        }
    }
  };
  auto copy_x = [&](int step, int slot) {
#pragma unroll
    for (int i = 0; i < KS; i++)
      copy_box(ring + slot * STAGE_BYTES + i * XBYTES, &xmap, ((s0 + step) * KS + i) * 64, 0, full + 8 * slot, keep);
  };
  if (tid == CONSUMERS) {
    for (int s = 0; s < STAGES; s++) { init(full + 8 * s, 1); init(empty + 8 * s, CONSUMERS / 32); }
    fence_inits();
    for (int s = 0; s < STAGES && s < steps; s++) copy_w(s, s);
    asm volatile("prefetch.tensormap [%0];" :: "l"(&xmap) : "memory");
  }
#if CL > 1
  __syncwarp();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");      // it runs: its shared memory may be written
#endif
  __syncthreads();
  NEXT_MAY_START();
  WAIT_FOR_PREVIOUS();

  // This thread's tokens are token0 and token0 + 8, its columns of y column0, column0 + 1 and those 8, 16, ... behind; it
  // finishes chunks c0 .. c1 of 8 columns. The residual is fetched now.
  const int token0 = (warp >> 2) % MT * 64 + (warp & 3) * 16 + (lane >> 2), column0 = row0 + (warp >> 2) / MT * (OUTS * 8) + 2 * (lane & 3);
  const int c0 = rank * OUTS / CL, c1 = (rank + 1) * OUTS / CL;
  u32 added[EPI == 1 ? PART : 1][2];
  if (EPI == 1 && tid < CONSUMERS) {
#pragma unroll
    for (int i = 0; i < PART; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int n = column0 + (c0 + i) * 8, token = token0 + 8 * h;
        added[EPI == 1 ? i : 0][h] = c0 + i < c1 && n < outs && token < M ? ldg32(residual + (long long)token * ldy + n) : 0;
      }
  }

  float d[NW / 2];
#pragma unroll
  for (int i = 0; i < NW / 2; i++) d[i] = 0.f;
  if (tid == CONSUMERS) {
    for (int s = 0; s < STAGES && s < steps; s++) copy_x(s, s);
    int slot = 0; u32 parity = 0;
#pragma unroll 1
    for (int step = STAGES; step < steps; step++) {
      wait(empty + 8 * slot, parity);
      copy_w(step, slot);
      copy_x(step, slot);
      if (++slot == STAGES) { slot = 0; parity ^= 1; }
    }
  }
  if (tid < CONSUMERS) {
    const u32 tokens = ring + (warp >> 2) % MT * 8192, rows = ring + KS * XBYTES + (warp >> 2) / MT * (NW * 128);
    int slot = 0, before = 0; u32 parity = 0;
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
      wait(full + 8 * slot, parity);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < KS; i++) {
        const u64 a = descriptor(tokens + slot * STAGE_BYTES + i * XBYTES);
        const u64 b = descriptor(rows + slot * STAGE_BYTES + i * WBYTES);
#pragma unroll
        for (int j = 0; j < 4; j++) wgmma(d, a + 2 * j, b + 2 * j);
      }
      wgmma_commit();
      asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
      if (step > 0 && lane == 0) arrive(empty + 8 * before);
      before = slot;
      if (++slot == STAGES) { slot = 0; parity ^= 1; }
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" : ACCUMULATORS :: "memory");
  }

  // A thread holds d[4 c + 2 h + e]: token token0 + 8 h, column 8 c + column0 + e of its warpgroup's.
  auto finish = [&](int chunk, const float (&v)[4], const float (&up)[4], const u32 (&added)[2]) {
    store_chunk(y, bias, token0, M, column0 + chunk * 8, outs, ldy, v, up, added); };
#if CL == 1
  if (tid < CONSUMERS) {
#pragma unroll
    for (int c = 0; c < OUTS; c++) {
      const int u = EPI == 2 ? c + OUTS : c;
      const float v[4] = {d[4 * c], d[4 * c + 1], d[4 * c + 2], d[4 * c + 3]}, up[4] = {d[4 * u], d[4 * u + 1], d[4 * u + 2], d[4 * u + 3]};
      finish(c, v, up, added[EPI == 1 ? c : 0]);
    }
  }
#else
  // Each block of the cluster finishes chunks c0 .. c1. The others send it theirs: parts[source][chunk - c0][thread].
  constexpr int HALVES = EPI == 2 ? 2 : 1;
  const u32 parts = ring + STAGES * STAGE_BYTES + SLACK;
  __syncwarp();
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  if (tid < CONSUMERS) {
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
      const int owner = owner_of(c % OUTS), at = (c % OUTS - owner * OUTS / CL) * HALVES + c / OUTS;
      stcluster(parts + ((rank * PART * HALVES + at) * CONSUMERS + tid) * 16, owner, d[4 * c], d[4 * c + 1], d[4 * c + 2], d[4 * c + 3]);
    }
  }
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
  if (tid < CONSUMERS) {
#pragma unroll
    for (int i = 0; i < PART; i++) {
      if (c0 + i >= c1) break;
      float v[2][4] = {};
#pragma unroll
      for (int r = 0; r < CL; r++)
#pragma unroll
        for (int h = 0; h < HALVES; h++) {
          const float4 q = lds_float4(parts + (((r * PART + i) * HALVES + h) * CONSUMERS + tid) * 16);
          v[h][0] += q.x; v[h][1] += q.y; v[h][2] += q.z; v[h][3] += q.w;
        }
      finish(c0 + i, v[0], v[HALVES - 1], added[EPI == 1 ? i : 0]);
    }
  }
#endif
}
