// y[M,N] = x[M,K] W[N,K]^T (+ bias, + residual | activation(gate) * up) for 65 to 256 tokens; W plain rows of 16 bits; sm_90a.
//
// Compiled by NVRTC, one cubin per set of macros (functions that are not here are in common.cuh):
//   NW     rows of W of a block, a multiple of 8 (gated: of 16, half of them gates), up to 256
//   MT     token tiles of 64 of a block: 2, 3 or 4 warpgroups multiply one each
//   STAGES depth of the ring, no more than a block has stages of 64 columns
//   CL     parts of K     TC  1|2 blocks along the tokens     MC  blocks along the rows: CL * TC * MC blocks are a cluster
//   FP16  0|1      activations and weights bf16 or fp16    OUT32 0|1 y in float32
//   EPI   0 nothing, 1 add residual, 2 activation(gate) * up: rows 0..N/2 are gates, the others ups, y is [M,N/2]
//   ACT   0 silu, 1 gelu, 2 gelu_tanh                      BIAS  0|1
//   ACCUMULATORS, REGISTERS, DESCRIPTORS  the operands of the wgmma of NW columns, which PTX wants written out
//
// wgmma as in tensor_gemm.cu: 64 tokens are the left operand and NW rows of W the right one, so that rows spread evenly over
// the SMs. With so many tokens nothing is free any more: the copies from L2 to the SMs and the reads of shared memory cost
// about what the tensor cores do, so a block wants to be as square as its accumulators allow, and what several blocks need is
// read once. Blocks along the tokens get the same rows of W: each reads half of them for both (multicast; of an odd number
// of eights the one in the middle comes twice); blocks along the rows get the same tokens in that way. Blocks along K each have
// a part of the columns, send each other their sums through distributed shared memory, in the ring's place, and finish a part
// of the rows each.
// One thread copies: boxes of 64 columns in the 128-byte swizzle, W's of the first round before griddepcontrol.wait. With
// CL = 1 a cluster takes tile after tile, and the ring is filled for the next while sums are stored. Every sum has a fixed
// order, the same for every token: equal bits on every run.
#include "common.cuh"

#define TOKENS (64 * MT)                     // of a block
#define CONSUMERS (128 * MT)                 // another warpgroup copies, and hands its registers to them
#define THREADS (CONSUMERS + 128)
#define CONSUMER_REGISTERS (MT == 2 ? 232 : MT == 3 ? 160 : 112)
#define COPIER_REGISTERS (MT == 2 ? 40 : 32)
#define SHARE (TC * MC)                      // blocks that have the same part of K
#define CLUSTER (CL * SHARE)
#define XBYTES (TOKENS * 128)                // of 64 columns
#define STAGE_BYTES (XBYTES + NW * 128)
#define CHUNKS (NW / 8)
#define HALVES (EPI == 2 ? 2 : 1)
#define BOX ((CHUNKS / HALVES + TC - 1) / TC * 8)    // rows of W that a block reads of each half
#define OUTS (CHUNKS / HALVES)               // chunks of 8 columns of y
#define PART ((OUTS + CL - 1) / CL)          // of those, what a block finishes at most
#define FETCHED (CL > 1 ? PART : 4)          // and of how many it fetches the residual at once

__device__ __forceinline__ void arrive(u32 bar, u32 rank) {      // at a block of the cluster; it orders no other memory
#if SHARE == 1
  arrive(bar);
#else
  asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" :: "r"(bar), "r"(rank) : "memory");
#endif
}
// A box to the same place in every block of the mask, whose barriers at that place count its bytes
__device__ __forceinline__ void copy_box(u32 dst, const TensorMap* map, int column, int row, u32 bar, u16 mask, u64 policy) {
#if SHARE == 1
  copy_box(dst, map, column, row, bar, policy);
#else
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint"
      " [%0], [%1, {%2, %3}], [%4], %5, %6;"
      :: "r"(dst), "l"(map), "r"(column), "r"(row), "r"(bar), "h"(mask), "l"(policy) : "memory");
#endif
}
__device__ __forceinline__ void prefetch_map(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" :: "l"(map) : "memory"); }
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_publish() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }     // what was sent
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
template <int COUNT> __device__ __forceinline__ void keep_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(COUNT)); }
template <int COUNT> __device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(COUNT)); }
template <int PENDING> __device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(PENDING) : "memory"); }
__device__ __forceinline__ void settle(float (&d)[NW / 2]) { asm volatile("" : ACCUMULATORS :: "memory"); }   // no use of d moves ahead

// The block along K that finishes a chunk
__device__ __forceinline__ constexpr int owner_of(int chunk) { return ((chunk + 1) * CL - 1) / OUTS; }

extern "C" __global__ void __launch_bounds__(THREADS, 1)
batch_gemm(const __grid_constant__ TensorMap wmap, const __grid_constant__ TensorMap xmap, void* y, const u16* residual,
           const u16* __restrict__ bias, int M, int N, int K, int ldy) {
  extern __shared__ __align__(1024) char smem[];
  __shared__ __align__(8) u64 bars[2 * STAGES];
  // Read from one lane the warp's number is known to be the same in it: descriptors then live in uniform registers.
  const int tid = threadIdx.x, warp = __shfl_sync(~0u, tid >> 5, 0), lane = tid & 31;
  const u32 ring = (smem_u32(smem) + 1023) & ~1023u, full = smem_u32(bars), empty = full + 8 * STAGES;
  const int rank = blockIdx.x % CLUSTER, part = rank / SHARE, along_tokens = rank % SHARE / MC, along_rows = rank % MC;
  const int outs = EPI == 2 ? N / 2 : N, first = blockIdx.x / CLUSTER, clusters = gridDim.x / CLUSTER;
  const int tiles = (outs + MC * OUTS * 8 - 1) / (MC * OUTS * 8);        // of a cluster
  const int total = (K + 63) / 64, s0 = part * total / CL, steps = (part + 1) * total / CL - s0;
  auto row_of = [&](int tile) { return (tile * MC + along_rows) * (OUTS * 8); };

  const u64 once = evict_first(), often = evict_last();
  auto copy_w = [&](int tile, int step, int slot) {
    expect(full + 8 * slot, XBYTES + HALVES * TC * BOX * 128);
#pragma unroll
    for (int h = 0; h < HALVES; h++) {       // gates, then ups
      const int row = along_tokens * (NW / HALVES - BOX);
      copy_box(ring + slot * STAGE_BYTES + XBYTES + (h * (NW / HALVES) + row) * 128, &wmap, (s0 + step) * 64,
               row_of(tile) + row + h * outs, full + 8 * slot, ((1 << TC * MC) - 1) / ((1 << MC) - 1) << (part * SHARE + along_rows), once);
    }
  };
  auto copy_x = [&](int step, int slot) {
    const int token = along_rows * (TOKENS / MC);
    copy_box(ring + slot * STAGE_BYTES + token * 128, &xmap, (s0 + step) * 64, along_tokens * TOKENS + token, full + 8 * slot,
             ((1 << MC) - 1) << (part * SHARE + along_tokens * MC), often);
  };
  if (tid == CONSUMERS) {
    prefetch_map(&wmap);
    prefetch_map(&xmap);
    for (int s = 0; s < STAGES; s++) { init(full + 8 * s, 1); init(empty + 8 * s, SHARE * CONSUMERS / 32); }
    fence_inits();
  }
  if (CLUSTER > 1) {           // barriers of the others are there before anything is sent
    __syncwarp();
    cluster_arrive();
    cluster_wait();
  } else __syncthreads();
  if (tid == CONSUMERS)
    for (int s = 0; s < STAGES; s++) copy_w(first, s, s);
  __syncwarp();
  NEXT_MAY_START();
  WAIT_FOR_PREVIOUS();

  // This thread's tokens are token0 and that 8 behind, its columns of y 8 c + 2 (lane & 3) and the next of its
  // tile's; with CL > 1 it finishes chunks c0 .. c1 of them.
  const int token0 = along_tokens * TOKENS + (warp >> 2) * 64 + (warp & 3) * 16 + (lane >> 2);
  const int c0 = part * OUTS / CL, c1 = (part + 1) * OUTS / CL;
  u32 added[EPI == 1 ? FETCHED : 1][2];
  auto fetch_residual = [&](int row0, int chunk) {
#pragma unroll
    for (int i = 0; i < FETCHED; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int n = row0 + (chunk + i) * 8 + 2 * (lane & 3), token = token0 + 8 * h;
        added[EPI == 1 ? i : 0][h] = chunk + i < c1 && n < outs && token < M ? ldg32(residual + (long long)token * ldy + n) : 0;
      }
  };
  auto finish = [&](int row0, int chunk, const float (&v)[4], const float (&up)[4], const u32 (&added)[2]) {
    store_chunk(y, bias, token0, M, row0 + chunk * 8 + 2 * (lane & 3), outs, ldy, v, up, added); };

  if (tid >= CONSUMERS) {
    keep_registers<COPIER_REGISTERS>();
    if (tid == CONSUMERS) {
      for (int s = 0; s < STAGES; s++) copy_x(s, s);
      int slot = 0, step = STAGES; u32 parity = 0;
      auto await_release = [&]() {
        wait(empty + 8 * slot, parity);
        if (++slot == STAGES) { slot = 0; parity ^= 1; }
      };
#pragma unroll 1
      for (int tile = first; tile < tiles; tile += clusters, step = 0)
#pragma unroll 1
        for (; step < steps; step++) {
          const int filled = slot;
          await_release();
          copy_w(tile, step, filled);
          copy_x(step, filled);
        }
      if (SHARE > 1)           // the block does not end while another may still arrive at its barriers
        for (int s = 0; s < STAGES; s++) await_release();
    }
    __syncwarp();
    for (int i = 0; i < (CL > 1 ? 2 : 0); i++) { cluster_arrive(); cluster_wait(); }     // as those do that multiply
    return;
  }
  take_registers<CONSUMER_REGISTERS>();
  float d[NW / 2];           // d[4 c + 2 h + e]: token token0 + 8 h, column 8 c + 2 (lane & 3) + e
  const u32 tokens = ring + (warp >> 2) * 8192, rows = ring + XBYTES;
  int slot = 0; u32 parity = 0;
#pragma unroll 1
  for (int tile = first; tile < tiles; tile += clusters) {
    int before = 0;
    auto release = [&]() { if (lane < SHARE) arrive(empty + 8 * before, part * SHARE + lane); };
#pragma unroll
    for (int i = 0; i < NW / 2; i++) d[i] = 0.f;
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
      wait(full + 8 * slot, parity);
      wgmma_fence();
      const u64 b = descriptor(rows + slot * STAGE_BYTES), a = descriptor(tokens + slot * STAGE_BYTES);
#pragma unroll
      for (int j = 0; j < 4; j++) wgmma(d, a + 2 * j, b + 2 * j);
      wgmma_commit();
      wgmma_wait<1>();
      if (step > 0) release();
      before = slot;
      if (++slot == STAGES) { slot = 0; parity ^= 1; }
    }
    wgmma_wait<0>();
    settle(d);
    release();
    if (CL > 1) break;
    const int row0 = row_of(tile);
#pragma unroll
    for (int c = 0; c < OUTS; c++) {
      if (EPI == 1 && c % FETCHED == 0) fetch_residual(row0, c);
      const int u = EPI == 2 ? c + OUTS : c;
      const float v[4] = {d[4 * c], d[4 * c + 1], d[4 * c + 2], d[4 * c + 3]};
      const float up[4] = {d[4 * u], d[4 * u + 1], d[4 * u + 2], d[4 * u + 3]};
      finish(row0, c, v, up, added[EPI == 1 ? c % FETCHED : 0]);
    }
  }
#if CL > 1
  // Each block along K finishes chunks c0 .. c1. The others send it theirs: parts[source][chunk - c0][half][thread].
  const int row0 = row_of(first);
  __syncwarp();
  cluster_arrive();          // nothing is read from the ring any more
  cluster_wait();
  auto place = [&](int source, int i, int half) { return ring + (((source * PART + i) * HALVES + half) * CONSUMERS + tid) * 16; };
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    const int owner = owner_of(c % OUTS), i = c % OUTS - owner * OUTS / CL;
    stcluster(place(part, i, c / OUTS), owner * SHARE + rank % SHARE, d[4 * c], d[4 * c + 1], d[4 * c + 2], d[4 * c + 3]);
  }
  cluster_publish();
  if (EPI == 1) fetch_residual(row0, c0);
  __syncwarp();
  cluster_wait();
#pragma unroll
  for (int i = 0; i < PART; i++) {
    if (c0 + i >= c1) break;
    float v[2][4] = {};
#pragma unroll
    for (int source = 0; source < CL; source++)
#pragma unroll
      for (int h = 0; h < HALVES; h++) {
        const float4 q = lds_float4(place(source, i, h));
        v[h][0] += q.x; v[h][1] += q.y; v[h][2] += q.z; v[h][3] += q.w;
      }
    finish(row0, c0 + i, v[0], v[HALVES - 1], added[EPI == 1 ? i : 0]);
  }
#endif
}
