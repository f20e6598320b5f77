// y[M,N] = norm(x)[M,K] W[N,K]^T (+ bias, + residual | activation(gate) * up) for 1 to 4 tokens; W in 4 bits. sm_90 only.
//
// Compiled by NVRTC, one cubin per set of macros (functions that are not here are in common.cuh):
//   COLS          K, a multiple of 128                     TOK   tokens, padded to 1, 2 or 4
//   GROUP 32..128 columns that share a scale               ZERO  1|0 an integer zero or a minimum per group
//   WK            warps along K, at most K / 128           WN    warps along the block's tiles of 16 rows
//   TILES         tiles of a stage (with gates and ups, pairs)   STAGES depth of each warp's ring
//   PARTS         stages that a warp's k-units of such tiles take; each part has the same number, UP
//   FP16  0|1     activations bf16 or fp16                 OUT32 0|1 y in float32      BIAS 0|1
//   EPI   0 nothing, 1 add residual, 2 activation(gate) * up: rows 0..N/2 are gates, the others ups, y is [M,N/2]
//   ACT   0 silu, 1 gelu, 2 gelu_tanh
//   NORM  0|1     x is multiplied by gamma + NORM_OFFSET, the product by 1/rms(x): an RMS norm in front
//   MINB          blocks per SM that __launch_bounds__ asks for
//   EARLY 0|1     no warp has more than one tile: its fragments are made before x is waited for
//
// Packed weights are those of skinny_gemm.cu: [K/128][NT][UNIT bytes], a unit being 16 rows x 128 columns as A fragments of
// mma.m16n8k16, then scales and zeros. A block owns a run of tiles over all of K; each of its warps owns a run of U k-units,
// whose x stays in registers all the time, and streams them, tile by tile, through a ring of its own: a stage is TILES tiles
// of all its units or of a part of them, one bulk copy per unit. No barrier spans the block until its end.
//
// One token needs one of the mma's 8 token columns. Column c of the B registers therefore holds token c % TOK of unit c / TOK
// of a set of 8 / TOK units, so that 16 registers hold x of a whole set. A unit's product is right in the columns that are its
// own; those are kept, and once a tile's set is complete, each lane has four sums of four different columns or rows, none of
// them idle, and applies scales and zeros to them. Nibbles enter as exact integers BASE + q; with the sum of x over a group,
// which one mma against ones gives once per launch, the float32 sum is
//   scale * (sum (BASE + q) x - (BASE + zero) * sum x).
// Lanes, then warps along K, are added up in a fixed order: equal bits on every run, and for a token whatever the others are.
//
// Weights are requested before griddepcontrol.wait, x and residual after it. With a norm the block's threads multiply x by
// gamma once and pass it through shared memory, the sum of squares is needed only at the end.
#include "common.cuh"

#define WARPS (WK * WN)
#define THREADS (WARPS * 32)
#define UNITS (COLS / 128)
#define U ((UNITS + WK - 1) / WK)              // k-units of a warp; the last one is missing in some if they are not EVEN
#define EVEN (UNITS % WK == 0)
#define UP (U / PARTS)
#define SET (8 / TOK)                          // units that share B registers
#define SETS ((U + SET - 1) / SET)
#define SIDES (EPI == 2 ? 2 : 1)
#define GROUPS (128 / GROUP)
#define UNIT (1024 + 64 * GROUPS)
#define RUN (TILES * UNIT)                     // bytes of a unit's tiles in a stage: [side][unit][tile]
#define STAGE_BYTES (SIDES * UP * RUN)
#define RING_BYTES (WARPS * STAGES * STAGE_BYTES)
#define X_BYTES (NORM ? TOK * COLS * 2 : 0)    // behind the ring; partial sums follow, [WK][PARTS][tile][side][16][TOK]
#define SUMS (16 * TOK)                        // of a tile
#define VECTORS (COLS / 8)
#define XV ((VECTORS + THREADS - 1) / THREADS) // 16-byte vectors of a token that a thread multiplies by gamma
#define CHAINS (GROUPS > 1 || UP > 2 ? 1 : 4 / UP) // of mma that do not wait for each other, per unit and group
#if FP16
#define ONES 0x3c003c00u
#define BASE(h) ((h) ? 64.f : 1024.f)          // rows 8-15 are BASE + q after a division by 16
#else
#define ONES 0x3f803f80u
#define BASE(h) 128.f
#endif

__device__ __forceinline__ void sts128(u32 a, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" :: "r"(a), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory"); }
__device__ __forceinline__ float squares_of(u32 v) { return lo(v) * lo(v) + hi(v) * hi(v); }

// What an entry of scale and zero makes of a sum of (BASE + q) x, given the sum of x; h: rows 8-15.
__device__ __forceinline__ float scaled(u32 entry, float sum, float of_x, int h) {
  const float scale = half2f(entry);
  if (FP16 && h) sum *= 0.0625f;
#if ZERO
  const float zero = __uint_as_float(__byte_perm(entry, 0x4b00u, 0x5432)) - (8388608.f - BASE(h));   // BASE + zero, exactly
  return scale * (sum - zero * of_x);
#else
  return scale * (sum - BASE(h) * of_x) + half2f(entry >> 16) * of_x;
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, MINB)
packed_stream_gemm(const char* __restrict__ w, const u16* x, void* y, const u16* residual, const u16* __restrict__ gamma,
                   const u16* __restrict__ bias, float eps, int M, int N, int ldx, int ldy) {
  extern __shared__ __align__(128) char smem[];
  __shared__ __align__(8) u64 bars[WARPS * STAGES];
  __shared__ float squares[WARPS][TOK];
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, g = lane >> 2, t = lane & 3;
  const int wk = warp % WK, wn = warp / WK;
  const int NT = (N + 15) >> 4, tiles = NT / SIDES, rows = EPI == 2 ? N / 2 : N;      // of y
  const int t0 = (int)((long long)blockIdx.x * tiles / gridDim.x), count = (int)((long long)(blockIdx.x + 1) * tiles / gridDim.x) - t0;
  const int first = wn * count / WN, mine = (wn + 1) * count / WN - first;           // this warp's tiles of the block's
  const int k0 = wk * UNITS / WK, units = EVEN ? U : (wk + 1) * UNITS / WK - k0;      // U or U - 1
  const int steps = (mine + TILES - 1) / TILES;
  float* const partial = (float*)(smem + RING_BYTES + X_BYTES);

  const u32 ring = smem_u32(smem) + warp * (STAGES * STAGE_BYTES), bar = smem_u32(bars + warp * STAGES);
  const int unit_of = lane % UP, side_of = lane / UP;                                 // of what this lane copies
  const long long row_of_units = (long long)NT * UNIT;                                // bytes
  const char* src = w + (k0 + unit_of) * row_of_units + (long long)(side_of * tiles + t0 + first) * UNIT;
  const u64 policy = evict_first();
  auto fetch = [&](int step, int part, int slot) {
    const u32 bytes = min(TILES, mine - step * TILES) * UNIT;
    const int held = EVEN ? UP : min(UP, units - part * UP);
    if (lane == 0) expect(bar + 8 * slot, SIDES * held * bytes);
    __syncwarp();
    if (lane < SIDES * UP && unit_of < held)
      bulk_copy(ring + slot * STAGE_BYTES + lane * RUN, src + part * UP * row_of_units + (long long)step * RUN, bytes, bar + 8 * slot, policy);
  };
  if (lane == 0) {
    for (int s = 0; s < STAGES; s++) init(bar + 8 * s, 1);
    fence_inits();
  }
  __syncwarp();
  for (int s = 0; s < STAGES && s / PARTS < steps; s++) fetch(s / PARTS, s % PARTS, s);
  NEXT_MAY_START();

  // Outputs of the block: [tile][16 rows][TOK], the first one of each thread is prepared for.
  const int outputs = count * SUMS;
  auto row_of = [&](int e) { return (t0 + e / SUMS) * 16 + e % SUMS / TOK; };
  const int row0 = row_of(tid);
  const bool has_first = tid < outputs && row0 < rows && tid % TOK < M;
  [[maybe_unused]] const u16 bias0 = BIAS && has_first ? bias[row0] : (u16)0;
  [[maybe_unused]] const u16 up_bias0 = BIAS && EPI == 2 && has_first ? bias[rows + row0] : (u16)0;
  [[maybe_unused]] uint4 scales[NORM ? XV : 1];
  if (NORM) {
#pragma unroll
    for (int i = 0; i < XV; i++)
      if (tid + i * THREADS < VECTORS) scales[NORM ? i : 0] = *(const uint4*)(gamma + (tid + i * THREADS) * 8);
  }
  int slot = 0; u32 parity = 0;
#if EARLY
  u32 early[U][8][4];
  if (steps > 0) wait(bar, 0);
#pragma unroll
  for (int unit = 0; unit < U; unit++) {
    const u32 from = ring + min(unit, units - 1) * RUN + lane * 16;
    const uint4 q0 = lds128(from), q1 = lds128(from + 512);
    const u32 q[8] = {q0.x, q0.y, q0.z, q0.w, q1.x, q1.y, q1.z, q1.w};
#pragma unroll
    for (int s = 0; s < 8; s++) integers(q[s], early[unit][s]);
  }
#endif
  WAIT_FOR_PREVIOUS();

  uint4 xs[SETS][4];                              // 32 columns each: this lane's are 8 t .. 8 t + 7
  [[maybe_unused]] float squared[TOK];
#if NORM
  const u32 stage_x = smem_u32(smem) + RING_BYTES;
#pragma unroll
  for (int m = 0; m < TOK; m++) {
    squared[m] = 0.f;
    uint4 v[XV];
#pragma unroll
    for (int i = 0; i < XV; i++)
      v[i] = m < M && tid + i * THREADS < VECTORS ? ldg128(x + (long long)m * ldx + (tid + i * THREADS) * 8) : make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < XV; i++) {
      squared[m] += squares_of(v[i].x) + squares_of(v[i].y) + squares_of(v[i].z) + squares_of(v[i].w);
      if (tid + i * THREADS < VECTORS)
        sts128(stage_x + m * (COLS * 2) + (tid + i * THREADS) * 16,
               make_uint4(times_gamma(v[i].x, scales[i].x), times_gamma(v[i].y, scales[i].y),
                          times_gamma(v[i].z, scales[i].z), times_gamma(v[i].w, scales[i].w)));
    }
  }
  __syncthreads();
#endif
#pragma unroll
  for (int b = 0; b < SETS; b++) {
    const int unit = b * SET + g / TOK, token = g % TOK, column = (k0 + unit) * 128 + t * 8;
    const bool has = unit < units && token < M;
#pragma unroll
    for (int i = 0; i < 4; i++)
#if NORM
      xs[b][i] = has ? lds128(stage_x + token * (COLS * 2) + (column + i * 32) * 2) : make_uint4(0, 0, 0, 0);
#else
      xs[b][i] = has ? ldg128(x + (long long)token * ldx + column + i * 32) : make_uint4(0, 0, 0, 0);
#endif
  }
  [[maybe_unused]] const u16 residual0 = EPI == 1 && has_first ? ldg16(residual + (long long)(tid % TOK) * ldy + row0) : (u16)0;

  float sums[SETS][GROUPS][2];                    // of x over a group, in columns 2 t and 2 t + 1
#pragma unroll
  for (int b = 0; b < SETS; b++) {
    const u32 ones[4] = {ONES, ONES, ONES, ONES};
#pragma unroll
    for (int p = 0; p < GROUPS; p++) sums[b][p][0] = sums[b][p][1] = 0.f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float d[4] = {0.f, 0.f, 0.f, 0.f};
      mma(d, ones, xs[b][i].x, xs[b][i].y);
      mma(d, ones, xs[b][i].z, xs[b][i].w);
      sums[b][i * GROUPS / 4][0] += d[0]; sums[b][i * GROUPS / 4][1] += d[1];
    }
  }
  // Where in a stage the scales of this lane's columns lie. Columns of no unit have sums of 0 and take scales that are there,
  // and so do those of another part.
  u32 entries[PARTS][SETS][TOK == 1 ? 2 : 1];
#pragma unroll
  for (int part = 0; part < PARTS; part++)
#pragma unroll
    for (int b = 0; b < SETS; b++)
#pragma unroll
      for (int j = 0; j < (TOK == 1 ? 2 : 1); j++) {
        const int unit = b * SET + (2 * t + j) / TOK, last = min(part * UP + UP, units) - 1;
        entries[part][b][j] = (max(min(unit, last), part * UP) - part * UP) * RUN + 1024 + g * 4;
      }

#pragma unroll 1
  for (int step = 0; step < steps; step++)
#pragma unroll
  for (int part = 0; part < PARTS; part++) {
    wait(bar + 8 * slot, parity);
    const int held = min(TILES, mine - step * TILES);
#pragma unroll 1
    for (int e = 0; e < held * SIDES; e++) {
      const int tile = e / SIDES, side = e % SIDES;
      const u32 at = ring + slot * STAGE_BYTES + side * (UP * RUN) + tile * UNIT;
      float acc[2][2] = {{0.f, 0.f}, {0.f, 0.f}};  // rows g and g + 8, columns 2 t and 2 t + 1; of one token only the first
#pragma unroll
      for (int b = 0; b < SETS; b++) {
        if (b * SET + SET <= part * UP || b * SET >= part * UP + UP) continue;
        float keep[GROUPS][4];
#pragma unroll
        for (int p = 0; p < GROUPS; p++) keep[p][0] = keep[p][1] = keep[p][2] = keep[p][3] = 0.f;
#pragma unroll
        for (int n = 0; n < SET; n++) {
          const int unit = b * SET + n;
          if (unit < part * UP || unit >= part * UP + UP) continue;
          if (!EVEN && unit == U - 1 && unit >= units) continue;
#if !EARLY
          const u32 from = at + (unit - part * UP) * RUN + lane * 16;
          const uint4 q0 = lds128(from), q1 = lds128(from + 512);
          const u32 q[8] = {q0.x, q0.y, q0.z, q0.w, q1.x, q1.y, q1.z, q1.w};
#endif
          float d[GROUPS * CHAINS][4];
#pragma unroll
          for (int p = 0; p < GROUPS * CHAINS; p++) d[p][0] = d[p][1] = d[p][2] = d[p][3] = 0.f;
#pragma unroll
          for (int s = 0; s < 8; s++) {
#if EARLY
            const u32 (&a)[4] = early[unit][s];
#else
            u32 a[4];
            integers(q[s], a);
#endif
            const uint4 v = xs[b][s / 2];
            mma(d[s * GROUPS / 8 * CHAINS + s % CHAINS], a, s % 2 ? v.z : v.x, s % 2 ? v.w : v.y);
          }
#pragma unroll
          for (int p = 0; p < GROUPS; p++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
              const bool own = TOK == 1 ? t == n / 2 && j % 2 == n % 2 : TOK == 2 ? t == n : t / 2 == n;
              if (TOK == 1 && j % 2 != n % 2) continue;
              float sum = d[p * CHAINS][j];
#pragma unroll
              for (int c = 1; c < CHAINS; c++) sum += d[p * CHAINS + c][j];
              keep[p][j] = own ? sum : keep[p][j];
            }
        }
#pragma unroll
        for (int p = 0; p < GROUPS; p++)
#pragma unroll
          for (int h = 0; h < 2; h++) {
            u32 entry[2];
            entry[0] = lds32(at + entries[part][b][0] + p * 64 + h * 32);
            entry[1] = TOK == 1 ? lds32(at + entries[part][b][TOK == 1 ? 1 : 0] + p * 64 + h * 32) : entry[0];
#pragma unroll
            for (int j = 0; j < 2; j++)
            {
              const int unit = b * SET + (2 * t + j) / TOK;
              const float of_x = PARTS == 1 || (unit >= part * UP && unit < part * UP + UP) ? sums[b][p][j] : 0.f;
              acc[h][TOK == 1 ? 0 : j] += scaled(entry[j], keep[p][2 * h + j], of_x, h);
            }
          }
      }
      // Lanes of a quad split the rows, and the tokens if there are two, and add up what they keep.
      float* const to = partial + (((wk * PARTS + part) * count + first + step * TILES + tile) * SIDES + side) * SUMS;
      const bool odd = t & 1, upper = t & 2;
#if TOK == 1
      float v = (odd ? acc[1][0] : acc[0][0]) + __shfl_xor_sync(~0u, odd ? acc[0][0] : acc[1][0], 1);
      v += __shfl_xor_sync(~0u, v, 2);
      if (!upper) to[g + 8 * odd] = v;
#elif TOK == 2
      float v[2];
#pragma unroll
      for (int j = 0; j < 2; j++) v[j] = (odd ? acc[1][j] : acc[0][j]) + __shfl_xor_sync(~0u, odd ? acc[0][j] : acc[1][j], 1);
      to[(g + 8 * odd) * 2 + upper] = (upper ? v[1] : v[0]) + __shfl_xor_sync(~0u, upper ? v[0] : v[1], 2);
#else
#pragma unroll
      for (int j = 0; j < 2; j++)
        to[(g + 8 * upper) * 4 + 2 * odd + j] = (upper ? acc[1][j] : acc[0][j]) + __shfl_xor_sync(~0u, upper ? acc[0][j] : acc[1][j], 2);
#endif
    }
    __syncwarp();
    if (step + (part + STAGES) / PARTS < steps) fetch(step + (part + STAGES) / PARTS, (part + STAGES) % PARTS, slot);
    if (++slot == STAGES) { slot = 0; parity ^= 1; }
  }

#if NORM
#pragma unroll
  for (int m = 0; m < TOK; m++) {
    const float q = sum_of_warp(squared[m]);
    if (lane == 0) squares[warp][m] = q;
  }
#endif
  __syncthreads();
#pragma unroll 1
  for (int e = tid; e < outputs; e += THREADS) {
    const int row = row_of(e), token = e % TOK;
    if (row >= rows || token >= M) continue;
    const float* p = partial + (e / SUMS) * (SIDES * SUMS) + e % SUMS;
    const int pitch = count * (SIDES * SUMS);
    float value = 0.f; [[maybe_unused]] float up = 0.f;
#pragma unroll
    for (int k = 0; k < WK * PARTS; k++) {
      value += p[k * pitch];
      if (EPI == 2) up += p[k * pitch + SUMS];
    }
    if (NORM) {
      float q = 0.f;
#pragma unroll
      for (int k = 0; k < WARPS; k++) q += squares[k][token];
      const float scale = rsqrtf(q / (float)COLS + eps);
      value *= scale; up *= scale;
    }
    if (BIAS) value += from16(e == tid ? bias0 : bias[row]);
    if (EPI == 1) value += from16(e == tid ? residual0 : ldg16(residual + (long long)token * ldy + row));
    if (EPI == 2) {
      if (BIAS) up += from16(e == tid ? up_bias0 : bias[rows + row]);
      value = activation(value) * up;
    }
    const long long place = (long long)token * ldy + row;
    if (OUT32) ((float*)y)[place] = value;
    else ((u16*)y)[place] = to16(value);
  }
}
