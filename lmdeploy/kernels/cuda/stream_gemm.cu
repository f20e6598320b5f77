// y[M,N] = norm(x)[M,K] W[N,K]^T (+ bias, + residual | activation(gate) * up) for 1 to 4 tokens; W plain rows of 16 bits.
//
// Compiled by NVRTC, one cubin per set of macros (functions that are not here are in common.cuh):
//   COLS          K, a multiple of 8                       TOK   tokens, padded to 1, 2 or 4
//   WK,XV         warps along K; each lane holds XV 16-byte vectors of a row, WK * XV * 256 >= COLS
//   WN            warps along a stage's rows               ROWS  rows of a stage, a multiple of WN (gated: of 2 as well)
//   STAGES        depth of the ring                        OUT32 0|1 y in float32
//   FP16  0|1     activations and weights bf16 or fp16     BIAS  0|1
//   EPI   0 nothing, 1 add residual, 2 activation(gate) * up: rows 0..N/2 are gates, the others ups, y is [M,N/2]
//   ACT   0 silu, 1 gelu, 2 gelu_tanh
//   NORM  0|1     x is multiplied by gamma + NORM_OFFSET, the product by 1/rms(x): an RMS norm in front
//   BULK  0|1     weights by cp.async.bulk (sm_90) or by cp.async (sm_80)
//
// A block owns a run of rows, which is one run of memory (with gates and ups two), and streams it through a ring of stages
// of ROWS whole rows: a copy is as long as a stage. Warp (wn, wk) multiplies columns wk of rows wn of every stage by its
// part of x, which stays in registers in float32 all the time. What a stage gives, one partial sum per row, token and
// warp along K, goes through shared memory to one more warp, which adds them up in the order of K, finishes and writes
// those outputs, and asks for the stage's next rows. No barrier spans the block. Weights are requested before
// griddepcontrol.wait, x and residual after it. Every sum has a fixed order: equal bits on every run.
//
// The ring takes nearly all of an SM's shared memory, so that no SM ever gets two blocks of a grid and another one none; as
// one block ends, that of the next kernel takes its place and fills its ring while other SMs are still at work.
#include "common.cuh"

#define WARPS (WK * WN)                     // and one that copies and finishes
#define THREADS (WARPS * 32 + 32)
#define ROW_BYTES (COLS * 2)
#define STAGE_BYTES (ROWS * ROW_BYTES)
#define VECTORS (COLS / 8)
#define EXACT (WK * XV * 256 == COLS)
#define RPW (ROWS / WN)
#define SUMS (RPW * TOK)                    // of a warp and stage: a power of two up to 32
#define OUTS (EPI == 2 ? ROWS / 2 : ROWS)   // rows of y in a stage
#define ADDENDS (EPI == 1 || BIAS)          // their sum for each of the block's outputs lies behind the ring, in float32

// Sums of a[i] over the warp; lanes L with L >> (5 - log2 N) == i get that of a[i].
template <int N, int O = 16> __device__ __forceinline__ float sum_over_lanes(float (&a)[N], int lane) {
  if constexpr (N > 1) {
    float half[N / 2];
    const bool upper = lane & O;
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
      const float keep = upper ? a[i + N / 2] : a[i], give = upper ? a[i] : a[i + N / 2];
      half[i] = keep + __shfl_xor_sync(~0u, give, O);
    }
    return sum_over_lanes<N / 2, O / 2>(half, lane);
  } else {
    float sum = a[0];
#pragma unroll
    for (int o = O; o > 0; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
    return sum;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
stream_gemm(const char* __restrict__ w, const u16* x, void* y, const u16* residual, const u16* __restrict__ gamma,
            const u16* __restrict__ bias, float eps, int M, int N, int ldx, int ldy) {
  extern __shared__ __align__(128) char smem[];
  __shared__ __align__(8) u64 bars[2 * STAGES];
  __shared__ float partial[STAGES][ROWS * TOK][WK], squares[TOK][WK];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const u32 ring = smem_u32(smem), full = smem_u32(bars), empty = full + 8 * STAGES;
  const int outs = EPI == 2 ? N / 2 : N;      // rows of y; this block's are first .. last
  const int first = (int)((long long)blockIdx.x * outs / gridDim.x), last = (int)((long long)(blockIdx.x + 1) * outs / gridDim.x);
  const int count = (last - first + OUTS - 1) / OUTS;

  if (threadIdx.x == WARPS * 32) {
    for (int s = 0; s < STAGES; s++) { init(full + 8 * s, BULK ? 1 : 32); init(empty + 8 * s, WARPS); }
#if BULK
    fence_inits();
#endif
  }
  if (warp == WARPS) {
    __syncwarp();
#if BULK
    const u64 policy = evict_first();
#endif
    auto fetch = [&](int step, int slot) {
      const int row = first + step * OUTS, rows = min(OUTS, last - row);
      const u32 dst = ring + slot * STAGE_BYTES, bar = full + 8 * slot, bytes = rows * ROW_BYTES;
      const char* src = w + (long long)row * ROW_BYTES;
#if BULK
      if (lane == 0) {
        expect(bar, EPI == 2 ? 2 * bytes : bytes);
#pragma unroll
        for (int part = 0; part < (EPI == 2 ? 2 : 1); part++)
          bulk_copy(dst + part * (OUTS * ROW_BYTES), src + (long long)part * outs * ROW_BYTES, bytes, bar, policy);
      }
#else
      for (u32 e = lane * 16; e < bytes; e += 512)
#pragma unroll
        for (int part = 0; part < (EPI == 2 ? 2 : 1); part++)
          copy16(dst + part * (OUTS * ROW_BYTES) + e, src + (long long)part * outs * ROW_BYTES + e);
      asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" :: "r"(bar) : "memory");
#endif
    };
    for (int s = 0; s < STAGES && s < count; s++) fetch(s, s);
    __syncthreads();
    NEXT_MAY_START();
    WAIT_FOR_PREVIOUS();
    // One lane per output of a stage. What is added to them all is fetched at once: a load per stage would delay its copies.
    const int out = lane / TOK, token = lane % TOK;
    const bool active = lane < OUTS * TOK && token < M;
    float scale = 1.f;
#if ADDENDS
    float *added = (float*)(smem + STAGES * STAGE_BYTES), *up_added = added + (last - first) * TOK;
#pragma unroll 4
    for (int e = lane; e < (last - first) * TOK; e += 32) {
      const int row = first + e / TOK;
      float a = BIAS ? from16(bias[row]) : 0.f;
      if (EPI == 1 && e % TOK < M) a += from16(ldg16(residual + (long long)(e % TOK) * ldy + row));
      added[e] = a;
      if (EPI == 2) up_added[e] = from16(bias[outs + row]);
    }
    __syncwarp();
#endif
    int slot = 0; u32 parity = 0;
#pragma unroll 1
    for (int step = 0; step < count; step++) {
      wait_in_loop(empty + 8 * slot, parity);
      float value = 0.f; [[maybe_unused]] float up = 0.f;
      const float* p = partial[slot][lane < OUTS * TOK ? lane : 0];
#pragma unroll
      for (int k = 0; k < WK; k++) {
        value += ((const volatile float*)p)[k];
        if (EPI == 2) up += ((const volatile float*)p)[OUTS * TOK * WK + k];
      }
      __syncwarp();
      if (step + STAGES < count) fetch(step + STAGES, slot);
      if (NORM && step == 0) {
        float q = 0.f;
        for (int k = 0; k < WK; k++) q += squares[token][k];
        scale = rsqrtf(q / (float)COLS + eps);
      }
      value *= scale;
      const int row = first + step * OUTS + out;
      if (active && row < last) {
#if ADDENDS
        value += added[step * OUTS * TOK + lane];
#endif
        if (EPI == 2) {
          up *= scale;
#if ADDENDS
          up += up_added[step * OUTS * TOK + lane];
#endif
          value = activation(value) * up;
        }
        const long long place = (long long)token * ldy + row;
        if (OUT32) ((float*)y)[place] = value;
        else ((u16*)y)[place] = to16(value);
      }
      if (++slot == STAGES) { slot = 0; parity ^= 1; }
    }
    return;
  }

  const int wk = warp % WK, wn = warp / WK;
  float xs[TOK][XV * 8];
  const int vector = wk * XV * 32 + lane;
  uint4 gv[NORM ? XV : 1];
  if (NORM) {
#pragma unroll
    for (int i = 0; i < XV; i++)
      if (EXACT || vector + i * 32 < VECTORS) gv[NORM ? i : 0] = *(const uint4*)(gamma + (vector + i * 32) * 8);
  }
  __syncthreads();
  NEXT_MAY_START();
  WAIT_FOR_PREVIOUS();
  uint4 xv[TOK][XV];
#pragma unroll
  for (int m = 0; m < TOK; m++)
#pragma unroll
    for (int i = 0; i < XV; i++)
      xv[m][i] = m < M && (EXACT || vector + i * 32 < VECTORS) ? ldg128(x + (long long)m * ldx + (vector + i * 32) * 8)
                                                               : make_uint4(0, 0, 0, 0);
  float ss[TOK];
#pragma unroll
  for (int m = 0; m < TOK; m++) {
    ss[m] = 0.f;
#pragma unroll
    for (int i = 0; i < XV; i++) {
      const u32 q[4] = {xv[m][i].x, xv[m][i].y, xv[m][i].z, xv[m][i].w};
#pragma unroll
      for (int j = 0; j < 4; j++) {
        float a = lo(q[j]), b = hi(q[j]);
        if (NORM) {
          const uint4 gg = gv[NORM ? i : 0];
          const u32 gq = j == 0 ? gg.x : j == 1 ? gg.y : j == 2 ? gg.z : gg.w;
          ss[m] += a * a + b * b;
          a *= lo(gq) + NORM_OFFSET; b *= hi(gq) + NORM_OFFSET;
          if (!EXACT && vector + i * 32 >= VECTORS) a = b = 0.f;
        }
        xs[m][i * 8 + 2 * j] = a; xs[m][i * 8 + 2 * j + 1] = b;
      }
    }
  }
  if (NORM && wn == 0) {
    const float q = sum_over_lanes(ss, lane);
    if (lane % (32 / TOK) == 0) squares[lane / (32 / TOK)][wk] = q;
  }

  const u32 mine = ring + wn * RPW * ROW_BYTES + vector * 16;
  int slot = 0; u32 parity = 0;
#pragma unroll 1
  for (int step = 0; step < count; step++) {
    wait_in_loop(full + 8 * slot, parity);
    float acc[SUMS];
#pragma unroll
    for (int r = 0; r < RPW; r++) {
#pragma unroll
      for (int m = 0; m < TOK; m++) acc[r * TOK + m] = 0.f;
#pragma unroll
      for (int i = 0; i < XV; i++) {
        uint4 v = make_uint4(0, 0, 0, 0);
        if (EXACT || vector + i * 32 < VECTORS) v = lds128(mine + slot * STAGE_BYTES + r * ROW_BYTES + i * 512);
        const u32 q[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
          for (int m = 0; m < TOK; m++) {
            acc[r * TOK + m] = fmaf(lo(q[j]), xs[m][i * 8 + 2 * j], acc[r * TOK + m]);
            acc[r * TOK + m] = fmaf(hi(q[j]), xs[m][i * 8 + 2 * j + 1], acc[r * TOK + m]);
          }
      }
    }
    const float sum = sum_over_lanes(acc, lane);
    if (lane % (32 / SUMS) == 0) partial[slot][wn * SUMS + lane / (32 / SUMS)][wk] = sum;
    __syncwarp();
    if (lane == 0) arrive(empty + 8 * slot);
    if (++slot == STAGES) { slot = 0; parity ^= 1; }
  }
}
