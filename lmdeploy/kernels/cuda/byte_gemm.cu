// y[M,N] = x[M,K] W[N,K]^T (+ bias, + residual | activation(gate) * up)  over packed 4-bit weights, up to 64 tokens, sm_90a:
// with integers, so that a row of y has the same bits whatever M is, and those of layer_tail.cu.
//
// Compiled by NVRTC, one cubin per set of macros (functions that are not here are in common.cuh):
//   GROUP 32..128  columns that share a scale              ZERO  1|0  an integer zero or a minimum per group
//   FP16  0|1      activations bf16 or fp16                OUT32 0|1  y in float32
//   NT    8..64    tokens of a tile, M rounded up          WT     tiles of 64 rows per warpgroup
//   WN,WK          warpgroups along N and K                STAGES depth of the ring, in units of 128 columns
//   CL             cluster size: K split over blocks. WK * CL is the number of slices, for the order of sums
//   EPI   0 nothing, 1 add residual, 2 activation(gate) * up: rows 0..N/2 are gates, the others ups, y is [M,N/2]
//   ACT   0 silu, 1 gelu, 2 gelu_tanh                      BIAS  0|1
//
// x comes as digits.cu leaves it, W packed as skinny_gemm.cu describes; any four packed tiles of 16 rows are wgmma's A operand of 64
// rows x 32 bytes, in registers and without a shift. D has the two digits of a token in neighbouring columns, so in one thread. A
// lane of one more warpgroup streams both by bulk copies, the weights from before griddepcontrol.wait on.
#define DIGITS
#define TOTALS
#define CONSUMERS (WN * WK * 128)              // threads that multiply
#include "common.cuh"

#define THREADS (CONSUMERS + 128)
#define LOADER_REGS 32
#define POOL (65536 / THREADS / 8 * 8 * THREADS)      // registers that a block starts with and shares out anew
#define CONSUMER_REGS ((POOL - 128 * LOADER_REGS) / CONSUMERS / 8 * 8)
#define UNIT (1024 + 64 * GROUPS)
#define XU (NT * 256 + NT * 8 * GROUPS)        // bytes of 128 columns of x
#define XS ((XU + 1023) / 1024 * 1024)         // and of their place: what is swizzled has to be aligned
#define NREG NT                                // integers of a tile of 64 rows
#define NACC (NT / 2)                          // sums of it: 2 rows of NT / 4 tokens
#define SLICES (CL * WK)
static_assert(STAGES % WK == 0, "a stage is one warpgroup's");
#define WGMMA_WAIT() asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory")

// d[64 x 2 NT] = or += A[64 x 32] B[32 x 2 NT]: A in registers, B by its descriptor.
#define C4(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define C16(i) C4(i), C4(i + 4), C4(i + 8), C4(i + 12)
#define P8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define P16 P8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define P32 P16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define P64 P32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define WGMMA(n, d_places, ab_places, more, ...) \
  asm volatile("{.reg .pred p; setp.ne.b32 p, " more ", 0;\nwgmma.mma_async.sync.aligned.m64n" n "k32.s32.u8.s8 {" d_places "}, {" ab_places ", p;}" \
      : __VA_ARGS__ : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds))
__device__ __forceinline__ void wgmma(int (&d)[NREG], const u32 (&a)[4], u64 b, int adds) {
#if NT == 8
  WGMMA("16", P8, "%8,%9,%10,%11}, %12", "%13", C4(0), C4(4));
#elif NT == 16
  WGMMA("32", P16, "%16,%17,%18,%19}, %20", "%21", C16(0));
#elif NT == 32
  WGMMA("64", P32, "%32,%33,%34,%35}, %36", "%37", C16(0), C16(16));
#else
  WGMMA("128", P64, "%64,%65,%66,%67}, %68", "%69", C16(0), C16(16), C16(32), C16(48));
#endif
}

// capacity: tiles of 16 rows that a stage has room for, the most that a block has. vectors: rows of y and residual are
// aligned for four elements at once.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
byte_gemm(const char* __restrict__ w, const char* x, const float* scales, void* y, const u16* residual, const u16* bias,
          int M, int N, int K, int ldy, int capacity, int vectors) {
  extern __shared__ __align__(1024) char smem[];
  __shared__ __align__(8) u64 bars[2 * STAGES];
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, g = lane >> 2, t = lane & 3;
  const Share mine = share_of(N);
  const int KU = K >> 7;
  auto first_unit = [&](int slice) { return slice * KU / SLICES; };
  const u32 xring = smem_u32(smem), wring = xring + STAGES * XS, stage_bytes = capacity * UNIT;
  const u32 full = smem_u32(bars), empty = full + 8 * STAGES;
  if (tid == 0) {
    for (int s = 0; s < STAGES; s++) { init(full + 8 * s, 2); init(empty + 8 * s, WN * 4); }
    fence_inits();
  }
  __syncthreads();

  if (tid >= CONSUMERS) {      // loads; the warpgroups along K take stages in turn
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(LOADER_REGS));
    if (tid == CONSUMERS) {
      const u64 once = evict_first(), again = evict_last();
      auto unit_of = [&](int n) {      // -1: the slice of that turn has no more
        const int slice = mine.rank * WK + n % WK, unit = first_unit(slice) + n / WK;
        return unit < first_unit(slice + 1) ? unit : -1;
      };
      auto fetch = [&](int unit, int s) {
        const char* src = w + ((long long)unit * mine.tiles + mine.first) * UNIT;
        const u32 dst = wring + s * stage_bytes;
        expect(full + 8 * s, mine.flat * UNIT);
        bulk_copy(dst, src, mine.count * UNIT, full + 8 * s, once);
        if (EPI == 2) bulk_copy(dst + mine.count * UNIT, src + (long long)mine.pairs * UNIT, mine.count * UNIT, full + 8 * s, once);
      };
      const int turns = (KU + SLICES - 1) / SLICES * WK;
      for (int n = 0; n < STAGES && n < turns; n++) if (unit_of(n) >= 0) fetch(unit_of(n), n);
      NEXT_MAY_START();
      WAIT_FOR_PREVIOUS();
      int s = 0; u32 parity = 1;
      for (int n = 0; n < turns; n++) {
        const int unit = unit_of(n);
        if (unit >= 0) {
          if (n >= STAGES) { wait(empty + 8 * s, parity); fetch(unit, s); }
          expect(full + 8 * s, XU);
          bulk_copy(xring + s * XS, x + (long long)unit * XU, XU, full + 8 * s, again);
        }
        if (++s == STAGES) { s = 0; parity ^= 1; }
      }
    }
#if CL > 1
    CLUSTER_SYNC();
    CLUSTER_SYNC();
#endif
    return;
  }

  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(CONSUMER_REGS));      // multiplies
  NEXT_MAY_START();
  const int wg = warp >> 2, wk = wg % WK, wn = wg / WK, slice = mine.rank * WK + wk;
  const int k0 = first_unit(slice), nk = first_unit(slice + 1) - k0;
  u32 tile[WT];      // beyond the last tile: that one again, for nothing
#pragma unroll
  for (int r = 0; r < WT; r++) tile[r] = min((wn * WT + r) * 4 + (warp & 3), mine.flat - 1) * UNIT;
  float acc[WT][NACC], sum[WT][NACC];      // of this eighth of K, of those before it
#pragma unroll
  for (int r = 0; r < WT; r++)
#pragma unroll
    for (int i = 0; i < NACC; i++) acc[r][i] = sum[r][i] = 0.f;
  auto end_eighth = [&]() {
#pragma unroll
    for (int r = 0; r < WT; r++)
#pragma unroll
      for (int i = 0; i < NACC; i++) { sum[r][i] += acc[r][i]; acc[r][i] = 0.f; }
  };
  const u64 layout = (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;      // K-major, 128 bytes of swizzle
  int s = wk, eighth = slice * (EIGHTHS / SLICES) + 1; u32 parity = 0;
#pragma unroll 1
  for (int j = 0; j < nk; j++) {
    for (; SLICES < EIGHTHS && k0 + j == eighth * KU / EIGHTHS; eighth++) end_eighth();
    const u32 st = wring + s * stage_bytes, xs = xring + s * XS;
    const u64 desc = layout | (u64)((xs & 0x3ffff) >> 4);
    wait(full + 8 * s, parity);
#pragma unroll
    for (int r = 0; r < WT; r++) {
      const uint4 q0 = lds128(st + tile[r] + lane * 16), q1 = lds128(st + tile[r] + 512 + lane * 16);
      const u32 q[8] = {q0.x, q0.y, q0.z, q0.w, q1.x, q1.y, q1.z, q1.w};
#pragma unroll
      for (int p = 0; p < GROUPS; p++) {
        int d[NREG];
        wgmma_fence();
#pragma unroll
        for (int i = p * 4 / GROUPS; i < (p + 1) * 4 / GROUPS; i++) {
          const u32 a[4] = {q[2 * i] & 0x0f0f0f0fu, q[2 * i] & 0xf0f0f0f0u, q[2 * i + 1] & 0x0f0f0f0fu, q[2 * i + 1] & 0xf0f0f0f0u};
          wgmma(d, a, desc + i * 2, i != p * 4 / GROUPS);
        }
        wgmma_commit();
        const u32 e0 = lds32(st + tile[r] + 1024 + p * 64 + g * 4), e1 = lds32(st + tile[r] + 1024 + p * 64 + g * 4 + 32);
        const float s0 = half2f(e0), s1 = half2f(e1) * 0.0625f;
        WGMMA_WAIT();
#pragma unroll
        for (int i = 0; i < NREG; i++) asm volatile("" : "+r"(d[i]) :: "memory");
#pragma unroll
        for (int b = 0; b < NT / 4; b++) {      // token 4 b + t
          const uint2 more = lds64(xs + NT * 256 + (p * NT + 4 * b + t) * 8);
          const float power = __uint_as_float(more.x);
          const int of_x = (int)more.y, n0 = d[4 * b] * 256 + d[4 * b + 1], n1 = d[4 * b + 2] * 256 + d[4 * b + 3];
          float &v0 = acc[r][2 * b], &v1 = acc[r][2 * b + 1];
#if ZERO
          v0 = fmaf(s0 * power, (float)(n0 - (int)(e0 >> 16) * of_x), v0);
          v1 = fmaf(s1 * power, (float)(n1 - (int)(e1 >> 16) * (of_x * 16)), v1);
#else
          v0 = fmaf(half2f(e0 >> 16) * power, (float)of_x, fmaf(s0 * power, (float)n0, v0));
          v1 = fmaf(half2f(e1 >> 16) * power, (float)of_x, fmaf(s1 * power, (float)n1, v1));
#endif
        }
      }
    }
    __syncwarp();
    if (lane == 0) arrive(empty + 8 * s);
    s += WK;
    if (s >= STAGES) { s -= STAGES; parity ^= 1; }
  }
  end_eighth();
  WAIT_FOR_PREVIOUS();      // for the residual

  // red[WK][token][row] takes the rings' place.
  const int pitch = capacity * 16 + 4, rows = EPI == 2 ? N / 2 : N;
  float* red = (float*)smem;
  CONSUMERS_SYNC();
#pragma unroll
  for (int r = 0; r < WT; r++) {
    const int f = (wn * WT + r) * 4 + (warp & 3);
    if (f >= mine.flat) continue;
#pragma unroll
    for (int b = 0; b < NT / 4; b++) {
      float* to = red + (wk * NT + 4 * b + t) * pitch + f * 16 + g;
      to[0] = sum[r][2 * b]; to[8] = sum[r][2 * b + 1];
    }
  }
  store_totals(red, pitch, mine, rows, M, ldy, vectors, scales, residual, bias, y);
}
