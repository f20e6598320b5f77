// y[M,N] = x[M,K] W[N,K]^T (+ bias, + residual | activation(gate) * up)  over packed 4-bit weights, up to 64 tokens, sm_90a.
//
// Compiled by NVRTC, one cubin per set of macros (functions that are not here are in common.cuh):
//   GROUP 32..128  columns that share a scale              ZERO  1|0  an integer zero or a minimum per group
//   FP16  0|1      activations bf16 or fp16                OUT32 0|1  y in float32
//   WT             tiles of 64 rows per warpgroup          WN,WK  warpgroups along N and K
//   STAGES         depth of the ring, in units of 128 columns
//   CL             cluster size: K split over blocks that add up through distributed shared memory
//   EPI   0 nothing, 1 add residual, 2 activation(gate) * up: rows 0..N/2 are gates, the others ups, y is [M,N/2]
//   ACT   0 silu, 1 gelu, 2 gelu_tanh                      BIAS  0|1
//
// Weights are packed as skinny_gemm.cu describes: a u32 of nibbles is one lane's A fragment of one mma.m16n8k16 step. Warp w
// of a warpgroup holds rows 16w .. 16w+15 of wgmma's A operand in just that form, so any four packed tiles of 16 rows make one
// m64n64k16. Tokens are its N side and x its B operand in shared memory, without swizzle: [step][half of k][token / 8] core
// matrices of 8 tokens x 16 bytes, columns permuted as the weights' are (step s = 2i + h, lane quad t, element j <-> column
// 32i + 8t + 4h + j): 16 bytes of x become four 4-byte pieces of four core matrices.
//
// WN * WK warpgroups multiply. One more loads and permutes x; a lane of it streams the weights by bulk copies, begun before
// griddepcontrol.wait. Nibbles become exact integers minus their zero, times the group's scale, all in 16 bits: in
// fp16 that is the weight's 16-bit copy to the bit, in bf16 the scale is rounded once more. The sums over WK and CL are taken
// in fixed order; a row of y depends on its row of x alone.
#define CONSUMERS (WN * WK * 128)              // threads that multiply
#define TOTALS
#define NT 64
#include "common.cuh"

#define THREADS (CONSUMERS + 128)
#define LOADER_REGS 96
#define POOL (65536 / THREADS / 8 * 8 * THREADS)      // registers that a block starts with and shares out anew
#define CONSUMER_REGS ((POOL - 128 * LOADER_REGS) / CONSUMERS / 8 * 8)
#define MOVES_REGS (CONSUMERS > 128 && CONSUMERS < 512)
#define GROUPS (128 / GROUP)
#define UNIT (1024 + 64 * GROUPS)
#define XU (NT * 256)                          // bytes of 128 columns of x
#define NREG (NT / 2)                          // accumulators of a tile of 64 rows
#define PLANE (NT / 8 * 128)                   // bytes of 8 columns of x: a column of core matrices
#define TASKS (NT / 8)                         // loads of 16 bytes per lane and unit of x

__device__ __forceinline__ void sts32(u32 a, u32 v) { asm volatile("st.shared.u32 [%0], %1;" :: "r"(a), "r"(v) : "memory"); }
__device__ __forceinline__ u32 mul2(u32 a, u32 b) { u32 r; asm("mul.rn." TY "x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b)); return r; }


// d[64 x NT] += A[64 x 16] B[16 x NT]: A in registers, B by its descriptor.
#define C4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define C16(i) C4(i), C4(i + 4), C4(i + 8), C4(i + 12)
#define P4 "%0,%1,%2,%3"
#define P8 P4 ",%4,%5,%6,%7"
#define P16 P8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define P32 P16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define WGMMA(n, d_places, ab_places, ...) \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" n "k16.f32." TY "." TY " {" d_places "}, {" ab_places ", 1, 1, 1, 0;" \
      : __VA_ARGS__ : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
__device__ __forceinline__ void wgmma(float (&d)[NREG], const u32 (&a)[4], u64 b) {
  WGMMA("64", P32, "%32,%33,%34,%35}, %36", C16(0), C16(16));
}
#define WGMMA_WAIT(n) asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(n) : "memory")

// What turns the nibbles of one row and group into weights: zero holds -(base + zero) twice, scale and rest twice.
struct Params { u32 zero, scale, rest; };
// high: the row is one of rows 8-15 of its tile. v: scale and zero, or scale and minimum, as they are stored.
__device__ __forceinline__ Params params_of(u32 v, bool high) {
  Params p;
#if FP16
  const u32 step = high ? 0x00100010u : 0x00010001u;
  asm("prmt.b32 %0, %1, 0, 0x1010;" : "=r"(p.scale) : "r"(v));
  asm("prmt.b32 %0, %1, 0, 0x3232;" : "=r"(p.rest) : "r"(v));
  p.zero = (high ? 0xd400d400u : 0xe400e400u) + (ZERO ? (v >> 16) * step : 0u);
#else
  const float s = half2f(v);
  p.scale = pack16(s, s);
#if ZERO
  p.rest = 0u;
  p.zero = 0xc300c300u + (v >> 16) * 0x00010001u;
#else      // the minimum in scales, its integer part as a zero: what is left is small, and so is its rounding
  const float m = half2f(v >> 16), z = fminf(fmaxf(rintf(-m / s), -100.f), 100.f), left = fmaf(z, s, m);
  p.rest = pack16(left, left);
  p.zero = pack16(-128.f - z, -128.f - z);
#endif
#endif
  return p;
}

// 8 nibbles -> A fragment: rows 0-7 of the tile by p0, rows 8-15 by p1.
__device__ __forceinline__ void weights(u32 w, const Params& p0, const Params& p1, u32 (&a)[4]) {
  integers(w, a);
  constexpr u32 one0 = FP16 ? 0x3c003c00u : 0x3f803f80u, one1 = FP16 ? 0x2c002c00u : one0;
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const Params& p = j & 1 ? p1 : p0;
    a[j] = fma2(a[j], j & 1 ? one1 : one0, p.zero);
    a[j] = ZERO ? mul2(a[j], p.scale) : fma2(a[j], p.scale, p.rest);
  }
}

// capacity: tiles of 16 rows that a stage has room for, the most that a block has. vectors: rows of y and residual are
// aligned for four elements at once.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
wide_gemm(const char* __restrict__ w, const u16* x, void* y, const u16* residual, const u16* bias,
          int M, int N, int K, int ldx, int ldy, int capacity, int vectors) {
  extern __shared__ __align__(1024) char smem[];
  __shared__ __align__(8) u64 bars[3 * STAGES];
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, g = lane >> 2, t = lane & 3;
  const Share mine = share_of(N);
  const int KU = K >> 7, k0 = mine.rank * KU / CL, nk = (mine.rank + 1) * KU / CL - k0;      // this block's units of 128 columns
  const u32 xring = smem_u32(smem), wring = xring + STAGES * XU, stage_bytes = capacity * UNIT;
  const u32 wfull = smem_u32(bars), xfull = wfull + 8 * STAGES, empty = xfull + 8 * STAGES;

  const char* src = w + ((long long)k0 * mine.tiles + mine.first) * UNIT;
  const u64 policy = evict_first();
  auto fetch = [&](int s) {
    const u32 dst = wring + s * stage_bytes;
    expect(wfull + 8 * s, mine.flat * UNIT);
    bulk_copy(dst, src, mine.count * UNIT, wfull + 8 * s, policy);
    if (EPI == 2) bulk_copy(dst + mine.count * UNIT, src + (long long)mine.pairs * UNIT, mine.count * UNIT, wfull + 8 * s, policy);
    src += (long long)mine.tiles * UNIT;
  };
  if (tid == CONSUMERS) {
    for (int s = 0; s < STAGES; s++) { init(wfull + 8 * s, 1); init(xfull + 8 * s, 4); init(empty + 8 * s, WN * 4); }
    fence_inits();
    for (int s = 0; s < STAGES && s < nk; s++) fetch(s);
  }
  NEXT_MAY_START();
  __syncthreads();

  if (tid >= CONSUMERS) {      // loads; a task is 8 tokens x 32 columns of x, a warp has 8 of a unit
#if MOVES_REGS
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(LOADER_REGS));
#endif
    WAIT_FOR_PREVIOUS();
    const int p = warp & 3;
    const u16* xp = x + (long long)k0 * 128 + t * 8;
    auto load = [&](int unit, uint4 (&v)[TASKS]) {
#pragma unroll
      for (int b = 0; b < TASKS; b++) {
        const int tok = b * 8 + g;
        v[b] = tok < M ? ldg128(xp + (long long)tok * ldx + unit * 128 + p * 32) : make_uint4(0, 0, 0, 0);
      }
    };
    int s = 0; u32 parity = 1;
    auto store = [&](int unit, const uint4 (&v)[TASKS]) {
      wait(empty + 8 * s, parity);
      if (tid == CONSUMERS && unit >= STAGES) fetch(s);
      const u32 base = xring + s * XU + lane * 4;
#pragma unroll
      for (int b = 0; b < TASKS; b++) {
        const u32 at = base + p * 4 * PLANE + b * 128;
        sts32(at, v[b].x); sts32(at + PLANE, v[b].y); sts32(at + 2 * PLANE, v[b].z); sts32(at + 3 * PLANE, v[b].w);
      }
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      __syncwarp();
      if (lane == 0) arrive(xfull + 8 * s);
      if (++s == STAGES) { s = 0; parity ^= 1; }
    };
    uint4 v0[TASKS], v1[TASKS];
    if (nk > 0) load(0, v0);
    for (int unit = 0; unit < nk; unit += 2) {
      if (unit + 1 < nk) load(unit + 1, v1);
      store(unit, v0);
      if (unit + 2 < nk) load(unit + 2, v0);
      if (unit + 1 < nk) store(unit + 1, v1);
    }
#if CL > 1
    CLUSTER_SYNC();
    CLUSTER_SYNC();
#endif
  } else {      // multiplies
#if MOVES_REGS
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(CONSUMER_REGS));
#endif
    float acc[WT][NREG];
    const int wg = warp >> 2, wk = wg % WK, wn = wg / WK;
#pragma unroll
    for (int r = 0; r < WT; r++)
#pragma unroll
      for (int i = 0; i < NREG; i++) acc[r][i] = 0.f;
    u32 tile[WT];      // beyond the last tile: that one again, for nothing
#pragma unroll
    for (int r = 0; r < WT; r++) tile[r] = min((wn * WT + r) * 4 + (warp & 3), mine.flat - 1) * UNIT;
    // K-major without swizzle: core matrices lie PLANE apart along K, 128 bytes along the tokens. Addresses in a cluster hold
    // the block's rank in their upper bits, where a descriptor has other fields.
    const u64 layout = (u64)(PLANE >> 4) << 16 | (u64)(128 >> 4) << 32;
    int s = wk, last = -1;
    u32 parity = 0;
    uint4 next = make_uint4(0, 0, 0, 0);      // the nibbles of the batch to come
    if (wk < nk) { wait(wfull + 8 * s, 0); next = lds128(wring + s * stage_bytes + tile[0] + lane * 16); }
#pragma unroll 1
    for (int j = wk; j < nk; j += WK) {
      const u32 st = wring + s * stage_bytes;
      const u64 desc = layout | (u64)((xring + s * XU & 0x3ffff) >> 4);
      const int after = s + WK < STAGES ? s + WK : s + WK - STAGES;
      const u32 turned = parity ^ (s + WK >= STAGES);
#pragma unroll
      for (int r = 0; r < WT; r++) {
        Params p0, p1;
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const uint4 q = next;
          u32 a[4][4];
#pragma unroll
          for (int i = 0; i < 2; i++) {
            if ((half * 2 + i) * GROUPS % 4 == 0) {
              const u32 at = st + tile[r] + 1024 + (half * 2 + i) * GROUPS / 4 * 64 + g * 4;
              p0 = params_of(lds32(at), false); p1 = params_of(lds32(at + 32), true);
            }
            weights(i ? q.z : q.x, p0, p1, a[2 * i]);
            weights(i ? q.w : q.y, p0, p1, a[2 * i + 1]);
          }
          if (half == 0 && r == 0) wait(xfull + 8 * s, parity);
          wgmma_fence();
#pragma unroll
          for (int i = 0; i < 4; i++) wgmma(acc[r], a[i], desc + (half * 4 + i) * (PLANE >> 3));
          wgmma_commit();
          if (half == 0) next = lds128(st + tile[r] + 512 + lane * 16);
          else if (r < WT - 1) next = lds128(st + tile[r + 1 < WT ? r + 1 : 0] + lane * 16);
          else if (j + WK < nk) { wait(wfull + 8 * after, turned); next = lds128(wring + after * stage_bytes + tile[0] + lane * 16); }
          WGMMA_WAIT(1);
          if (half == 0 && r == 0 && last >= 0 && lane == 0) arrive(empty + 8 * last);
        }
      }
      last = s; s = after; parity = turned;
    }
    WGMMA_WAIT(0);
#pragma unroll
    for (int r = 0; r < WT; r++)
#pragma unroll
      for (int i = 0; i < NREG; i++) asm volatile("" : "+f"(acc[r][i]) :: "memory");
    WAIT_FOR_PREVIOUS();      // for the residual

    // Reduction over WK warpgroups and CL blocks in fixed order; red[WK][token][row] takes the rings' place.
    const int pitch = capacity * 16 + 4, rows = EPI == 2 ? N / 2 : N;
    float* red = (float*)smem;
    CONSUMERS_SYNC();
#pragma unroll
    for (int r = 0; r < WT; r++) {
      const int f = (wn * WT + r) * 4 + (warp & 3);
      if (f >= mine.flat) continue;
      float* to = red + (wk * NT + 2 * t) * pitch + f * 16 + g;
#pragma unroll
      for (int b = 0; b < NT / 8; b++) {
        if (8 * b >= M) break;
        to[8 * b * pitch] = acc[r][4 * b]; to[(8 * b + 1) * pitch] = acc[r][4 * b + 1];
        to[8 * b * pitch + 8] = acc[r][4 * b + 2]; to[(8 * b + 1) * pitch + 8] = acc[r][4 * b + 3];
      }
    }
    store_totals(red, pitch, mine, rows, M, ldy, vectors, nullptr, residual, bias, y);
  }
}
