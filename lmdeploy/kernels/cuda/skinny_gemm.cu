// y[M,N] = norm(x)[M,K] W[N,K]^T (+ bias, + residual | activation(gate) * up)  for few tokens (M <= 64).
//
// Compiled by NVRTC, one cubin per set of macros (functions that are not here are in common.cuh):
//   GROUP 32..128  columns that share a scale (4 bits)     ZERO 1|0  an integer zero or a minimum per group (4 bits)
//   FP16  0|1      activations bf16 or fp16                OUT32 0|1 y in float32
//   MT    1..8     token tiles of 8                        TRW   tiles of 16 rows per warp
//   WN,WK          warps along N and K                     STAGES depth of each warp's ring
//   CL             cluster size: K split over blocks that add up through distributed shared memory
//   EPI   0 nothing, 1 add residual, 2 activation(gate) * up: rows 0..N/2 are gates, the others ups, y is [M,N/2]
//   ACT   0 silu, 1 gelu, 2 gelu_tanh                      BIAS  0|1
//   NORM  0|1      x is multiplied by gamma + NORM_OFFSET, the product by 1/rms(x): an RMS norm in front
//   MINB           blocks per SM that __launch_bounds__ asks for
//   XS    0|n      n > 0: x passes through n stages of shared memory, loaded once per block; excludes NORM
//   TRIG  0|2      when the next kernel may start: at once, or with the last copies
//   MP    1,2,4,8  for MT = 1: tokens padded to MP; the mma's 8 token columns then hold 8/MP different k-units of x,
//                  so that no lane multiplies zeros; the columns are added up after the loop
//   BULK  0|1      weights by cp.async.bulk and mbarriers (sm_90) or by cp.async (sm_80)
//
// Packed weights: [K/128][NT][UNIT bytes], NT = ceil(N/16). A unit is 16 rows x 128 columns: 1024 B of nibbles, then
// for each group 16 x u32 (low half the scale in fp16, high half the zero as an integer or the minimum in fp16).
// mma.m16n8k16, A = weights, B = tokens. Columns are permuted inside a unit so that a lane's B registers are 16-byte runs
// of x: step s = 2i + h, lane quad t, element j  <->  column 32i + 8t + 4h + j. A u32 of nibbles is one lane's A fragment
// of one step: bits 4p + 16e are register p, half e.
//
// The nibbles become exact integers BASE + q; what they stand for, scale * q + offset, is applied to the float32
// accumulators once per group, with the sum of x over the group coming from one more mma against ones. Weights are
// never rounded. Each warp owns a private ring, filled before griddepcontrol.wait, and runs free of all other warps
// until the final reduction, whose order is fixed: equal bits on every run.
#define QUOTIENT(a, b) ((a) / (b))
#define SHIFTED_HI
#include "common.cuh"

#define WARPS (WN * WK)
#define THREADS (WARPS * 32)
#define GROUPS (128 / GROUP)
#define UNIT (1024 + 64 * GROUPS)              // bytes in memory and in a stage
#define STEPS_PER_GROUP (4 / GROUPS)           // pieces of 32 columns
#define STAGE_BYTES (TRW * UNIT)
#define XROW 320
#define XSTAGE (WK * MT * 8 * XROW)
#define XBYTES (XS * XSTAGE)
#define MG (MT < 4 ? MT : 4)
#define PD (MT <= 2 ? 4 : (MT <= 4 ? 2 : 1))   // prefetch distance of x, in pieces of 32 columns
#define P (MT == 1 && !XS ? 8 / MP : 1)        // k-units per block of x loads
#define RESCALE (MT > 2)                       // accumulators are kept in units of the current scale: fewer registers
#define SUBTRACT (RESCALE && ZERO)             // zeros are subtracted from the weights: cheaper than sums for many tokens
#define SUMS (!SUBTRACT)
#define USE_TMP (!RESCALE)
#if FP16
#define ONES 0x3c003c00u
#else
#define ONES 0x3f803f80u
#endif

// integers() - BASE - z: z0, z1 hold -(BASE + z) of rows 0-7 and 8-15 twice
__device__ __forceinline__ void subtract(u32 (&a)[4], u32 z0, u32 z1) {
#if FP16
  a[0] = fma2(a[0], 0x3c003c00u, z0); a[1] = fma2(a[1], 0x2c002c00u, z1);
  a[2] = fma2(a[2], 0x3c003c00u, z0); a[3] = fma2(a[3], 0x2c002c00u, z1);
#else
  a[0] = fma2(a[0], ONES, z0); a[1] = fma2(a[1], ONES, z1); a[2] = fma2(a[2], ONES, z0); a[3] = fma2(a[3], ONES, z1);
#endif
}

__device__ __forceinline__ float ldcluster1(u32 a, u32 rank) {
  float v; u32 r;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(r)); return v; }

extern "C" __global__ void __launch_bounds__(THREADS, MINB)
skinny_gemm(const char* __restrict__ w, const u16* x, void* y, const u16* residual, const u16* gamma, const u16* bias,
            float eps, int M, int N, int K, int ldx, int ldy) {
  extern __shared__ __align__(128) char smem[];
  __shared__ float ssq[NORM ? WK * MT * 8 : 1];
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, g = lane >> 2, t = lane & 3;
  const int wk = warp % WK, wn = warp / WK;
  const int crank = CL > 1 ? blockIdx.x % CL : 0, rb = blockIdx.x / CL, RB = gridDim.x / CL;
  const int NT = (N + 15) >> 4;
  // A warp's tiles: wt0 .. wt0 + nt. With gates and ups (EPI 2) they are counted in pairs of tiles, one of each.
  constexpr int TPW = EPI == 2 ? TRW / 2 : TRW;
  const int TILES = EPI == 2 ? NT / 2 : NT;
  const int t0 = (int)((long long)rb * TILES / RB), cnt = (int)((long long)(rb + 1) * TILES / RB) - t0;
  const int wt0 = t0 + wn * cnt / WN, nt = t0 + (wn + 1) * cnt / WN - wt0;
  const int KU = K >> 7, k0 = crank * KU / CL, k1 = (crank + 1) * KU / CL;   // this block's k-units
  const int nit = nt > 0 && k1 - k0 > wk ? (k1 - k0 - wk + WK - 1) / WK : 0;
  const u32 xring = smem_u32(smem), ring = xring + XBYTES + warp * (STAGES * STAGE_BYTES);
  const char* src = w + ((long long)(k0 + wk) * NT + wt0) * UNIT;
  const long long kstep = (long long)WK * NT * UNIT, upstep = (long long)TILES * UNIT;
  // In a stage the tiles lie one after the other, gates before ups; SLOT is the place of register tile r.
#define SLOT(r) (EPI == 2 && (r) >= TPW ? nt + (r) - TPW : (r))
#if BULK
  __shared__ __align__(8) u64 bars[WARPS * STAGES];
  const u32 bar = smem_u32(bars + warp * STAGES);
  const u64 policy = evict_first();
  if (lane == 0) {
    for (int s = 0; s < STAGES; s++) init(bar + 8 * s, 1);
    fence_inits();
  }
  __syncwarp();
#endif
  auto fetch = [&](int s) {
    const u32 dst = ring + s * STAGE_BYTES;
#if BULK
    if (lane == 0) {
      expect(bar + 8 * s, (EPI == 2 ? 2 : 1) * nt * UNIT);
      bulk_copy(dst, src, nt * UNIT, bar + 8 * s, policy);
      if (EPI == 2) bulk_copy(dst + nt * UNIT, src + upstep, nt * UNIT, bar + 8 * s, policy);
    }
#else
    for (int e = lane * 16; e < nt * UNIT; e += 512) {
      copy16(dst + e, src + e);
      if (EPI == 2) copy16(dst + nt * UNIT + e, src + upstep + e);
    }
#endif
    src += kstep;
  };
  for (int s = 0; s < STAGES; s++) {
    if (s < nit) fetch(s);
#if !BULK
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
  }
#if TRIG == 0
  NEXT_MAY_START();
#endif
  WAIT_FOR_PREVIOUS();

  const int tk = MT == 1 ? g % MP : g, uo = MT == 1 ? g / MP : 0;      // this lane's token, and its unit within the block
  const u16* xp = x + (long long)(k0 + wk + uo * WK) * 128 + t * 8 + (long long)tk * ldx;
  const u16* gp = gamma + (long long)(k0 + wk + uo * WK) * 128 + t * 8;
  const uint4 zero4 = make_uint4(0, 0, 0, 0);
#if XS
  // Stage j of x: WK k-units, one row of XROW bytes per unit and token; tokens from M on are zero.
  const int kits = (k1 - k0 + WK - 1) / WK;
  auto stage_x = [&](int j) {
    if (j < kits) {
      const u32 base = xring + (j % (XS ? XS : 1)) * XSTAGE;
      for (int e = tid; e < WK * MT * 8 * 16; e += THREADS) {
        const int p = e & 15, row = e >> 4, un = row / (MT * 8), tok = row % (MT * 8), ku = k0 + j * WK + un;
        const u32 n = tok < M && ku < k1 ? 16 : 0;
        const u16* sp = n ? x + (long long)tok * ldx + ku * 128 + p * 8 : x;
        copy16(base + row * XROW + p * 16, sp, n);
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  for (int j = 0; j < XS - 1; j++) stage_x(j);
#else
  // xb[slot][token tile] = 8 columns of one token
  uint4 xb[PD][MT], gb[NORM ? PD : 1];
#define LOADX(slot, off, unit)                                                                   \
  { const bool in = P == 1 || (unit) + uo < nit;                                                 \
    _Pragma("unroll") for (int m = 0; m < MT; m++)                                               \
      xb[slot][m] = in && m * 8 + tk < M ? ldg128(xp + (long long)m * 8 * ldx + (off)) : zero4;  \
    if (NORM) gb[NORM ? slot : 0] = in ? ldg128(gp + (off)) : zero4; }
  if (nit > 0) {
#pragma unroll
    for (int i = 0; i < PD; i++) LOADX(i, i * 32, 0);
  }
#endif
  float acc[TRW][MT][4], ss[MT], prev[TRW][2];
#pragma unroll
  for (int r = 0; r < TRW; r++) {
    prev[r][0] = prev[r][1] = 1.f;
#pragma unroll
    for (int m = 0; m < MT; m++) acc[r][m][0] = acc[r][m][1] = acc[r][m][2] = acc[r][m][3] = 0.f;
  }
#pragma unroll
  for (int m = 0; m < MT; m++) ss[m] = 0.f;
  const u32 ones[4] = {ONES, ONES, ONES, ONES};

  int stage = 0; [[maybe_unused]] u32 parity = 0;
#pragma unroll 1
#if XS
  for (int it = 0; it < kits; it++) {
    asm volatile("cp.async.wait_group %0;" :: "n"(XS > 1 ? XS - 2 : 0) : "memory");
    __syncthreads();
    stage_x(it + XS - 1);
    if (it >= nit) continue;
    const u32 xs = xring + (it % XS) * XSTAGE + (wk * MT * 8 + g) * XROW + t * 16;
#else
  for (int it = 0; it < nit; it++) {
#endif
    const int u = it & (P - 1);
    [[maybe_unused]] const bool more = it + 1 < nit && u == P - 1;      // fetch x of the next block of units
    const u32 st = ring + stage * STAGE_BYTES;
#if TRIG == 2
    if (it + STAGES == nit || (it == 0 && nit < STAGES)) NEXT_MAY_START();
#endif
#if BULK
    wait(bar + 8 * stage, parity);
#else
    asm volatile("cp.async.wait_group %0;" :: "n"(STAGES - 1) : "memory");
    __syncwarp();
#endif
    [[maybe_unused]] const bool col[2] = {P == 1 || 2 * t / (P > 1 ? MP : 8) == u, P == 1 || (2 * t + 1) / (P > 1 ? MP : 8) == u};
    [[maybe_unused]] float sc[TRW][2], off[TRW][2];
    [[maybe_unused]] u32 z[TRW][2];
    [[maybe_unused]] uint4 wv[TRW];
#if USE_TMP
    float tmp[TRW][MT][4];
#define DST tmp
#else
#define DST acc
#endif
    [[maybe_unused]] float sum[MT][4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (i % STEPS_PER_GROUP == 0) {
        constexpr float BASE0 = FP16 ? 1024.f : 128.f, BASE1 = FP16 ? 64.f : 128.f;
#pragma unroll
        for (int r = 0; r < TRW; r++)
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const u32 v = lds32(st + SLOT(r) * UNIT + 1024 + (i / STEPS_PER_GROUP) * 64 + (g + 8 * h) * 4);
            const float s = half2f(v), base = h ? BASE1 : BASE0;
#if SUBTRACT
#if FP16
            z[r][h] = h ? 0xd400d400u + (v >> 16) * 0x00100010u : 0xe400e400u + (v >> 16) * 0x00010001u;
#else
            z[r][h] = 0xc300c300u + (v >> 16) * 0x00010001u;
#endif
            off[r][h] = 0.f;
#elif ZERO
            off[r][h] = -(base + (float)(v >> 16)) * s;
#else
            off[r][h] = half2f(v >> 16) - base * s;
#endif
#if RESCALE
            float q; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(q) : "f"(s));
            off[r][h] *= q;
            q *= prev[r][h]; prev[r][h] = s;
#pragma unroll
            for (int m = 0; m < MT; m++) { acc[r][m][2 * h] *= q; acc[r][m][2 * h + 1] *= q; }
#endif
            sc[r][h] = FP16 && h && !RESCALE ? s * 0.0625f : s;
          }
#if USE_TMP
#pragma unroll
        for (int r = 0; r < TRW; r++)
#pragma unroll
          for (int m = 0; m < MT; m++) tmp[r][m][0] = tmp[r][m][1] = tmp[r][m][2] = tmp[r][m][3] = 0.f;
#endif
#if SUMS
#pragma unroll
        for (int m = 0; m < MT; m++) sum[m][0] = sum[m][1] = sum[m][2] = sum[m][3] = 0.f;
#endif
      }
      u32 a[2][TRW][4];
      if (i % 2 == 0) {
#pragma unroll
        for (int r = 0; r < TRW; r++) wv[r] = lds128(st + SLOT(r) * UNIT + (i / 2) * 512 + lane * 16);
      }
#pragma unroll
      for (int h = 0; h < 2; h++)
#pragma unroll
        for (int r = 0; r < TRW; r++) {
          integers(i % 2 == 0 ? (h ? wv[r].y : wv[r].x) : (h ? wv[r].w : wv[r].z), a[h][r]);
#if SUBTRACT
          subtract(a[h][r], z[r][0], z[r][1]);
#elif RESCALE && FP16
          a[h][r][1] = fma2(a[h][r][1], 0x2c002c00u, 0u); a[h][r][3] = fma2(a[h][r][3], 0x2c002c00u, 0u);
#endif
        }
#if XS
#pragma unroll
      for (int m0 = 0; m0 < MT; m0 += MG) {      // MG token tiles at a time: MG * TRW independent mma in a row
        uint4 b[MG];
#pragma unroll
        for (int m = 0; m < MG; m++) b[m] = lds128(xs + (m0 + m) * 8 * XROW + i * 64);
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
          for (int m = 0; m < MG; m++) {
#if SUMS
            mma(sum[m0 + m], ones, h ? b[m].z : b[m].x, h ? b[m].w : b[m].y);
#endif
#pragma unroll
            for (int r = 0; r < TRW; r++) mma(DST[r][m0 + m], a[h][r], h ? b[m].z : b[m].x, h ? b[m].w : b[m].y);
          }
      }
#else
      uint4 b[MT];
#pragma unroll
      for (int m = 0; m < MT; m++) {
        b[m] = xb[i % PD][m];
        if (NORM && u == 0) {
          ss[m] += lo(b[m].x) * lo(b[m].x) + hi(b[m].x) * hi(b[m].x) + lo(b[m].y) * lo(b[m].y) + hi(b[m].y) * hi(b[m].y)
                 + lo(b[m].z) * lo(b[m].z) + hi(b[m].z) * hi(b[m].z) + lo(b[m].w) * lo(b[m].w) + hi(b[m].w) * hi(b[m].w);
          const uint4 gg = gb[NORM ? i % PD : 0];
          b[m].x = times_gamma(b[m].x, gg.x); b[m].y = times_gamma(b[m].y, gg.y);
          b[m].z = times_gamma(b[m].z, gg.z); b[m].w = times_gamma(b[m].w, gg.w);
          if (P > 1) xb[i % PD][m] = b[m];
        }
      }
      if (i + PD < 4) LOADX(i % PD, (i + PD) * 32, it)
      else if (more) LOADX(i % PD, P * WK * 128 + (i + PD - 4) * 32, it + 1)
#pragma unroll
      for (int h = 0; h < 2; h++) {
#if SUMS
#pragma unroll
        for (int m = 0; m < MT; m++) mma(sum[m], ones, h ? b[m].z : b[m].x, h ? b[m].w : b[m].y);
#endif
#pragma unroll
        for (int r = 0; r < TRW; r++)
#pragma unroll
          for (int m = 0; m < MT; m++) mma(DST[r][m], a[h][r], h ? b[m].z : b[m].x, h ? b[m].w : b[m].y);
      }
#endif
      if (i % STEPS_PER_GROUP == STEPS_PER_GROUP - 1) {
#if USE_TMP
#pragma unroll
        for (int r = 0; r < TRW; r++)
#pragma unroll
          for (int m = 0; m < MT; m++)
#pragma unroll
            for (int j = 0; j < 4; j++)
              if (col[j & 1])
                acc[r][m][j] += sc[r][j >> 1] * tmp[r][m][j] + off[r][j >> 1] * sum[m][j & 1];
#elif SUMS
#pragma unroll
        for (int r = 0; r < TRW; r++)
#pragma unroll
          for (int m = 0; m < MT; m++)
#pragma unroll
            for (int j = 0; j < 4; j++) acc[r][m][j] += off[r][j >> 1] * sum[m][j & 1];
#endif
      }
    }
    __syncwarp();
    if (it + STAGES < nit) fetch(stage);
#if !BULK
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
#if !XS
    if (u == P - 1) { xp += P * WK * 128; gp += P * WK * 128; }
#endif
    if (++stage == STAGES) { stage = 0; parity ^= 1; }
  }
#if RESCALE
#pragma unroll
  for (int r = 0; r < TRW; r++)
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int j = 0; j < 4; j++) acc[r][m][j] *= prev[r][j >> 1];
#endif
#if P > 1     // add up the columns of one token
#pragma unroll
  for (int r = 0; r < TRW; r++) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      acc[r][0][j] += __shfl_xor_sync(~0u, acc[r][0][j], 2);
      if (MP <= 2) acc[r][0][j] += __shfl_xor_sync(~0u, acc[r][0][j], 1);
    }
    if (MP == 1) { acc[r][0][0] += acc[r][0][1]; acc[r][0][2] += acc[r][0][3]; }
  }
#endif

  // Reduction over WK warps and CL blocks in fixed order; red[WK][WN * TRW][MT][lane] of float4 takes the ring's place.
  constexpr int SLOTS = WN * TPW * MT * 32, PLANE = WN * TRW * MT * 32;
  auto where = [&](int e, int& tile, int& tok, bool& ok) {
    const int ln = e & 31, m = (e >> 5) % MT, ts = (e >> 5) / MT, n_ = ts / TPW, r = ts % TPW;
    const int a = n_ * cnt / WN, b = (n_ + 1) * cnt / WN;
    tile = t0 + a + r; tok = m * 8 + 2 * (ln & 3); ok = e < SLOTS && r < b - a && tok < M;
  };
  const int rows = EPI == 2 ? N / 2 : N;
  u16 res[4] = {0, 0, 0, 0};
  auto load_res = [&](int e) {
    int tile, tok; bool ok; where(e, tile, tok, ok);
    if (EPI == 1 && ok) {
      const int n = tile * 16 + ((e & 31) >> 2);
#pragma unroll
      for (int j = 0; j < 4; j++) if (tok + (j & 1) < M && n + 8 * (j >> 1) < rows) res[j] = residual[(long long)(tok + (j & 1)) * ldy + n + 8 * (j >> 1)];
    }
  };
  load_res(crank * THREADS + tid);
#if !BULK
  asm volatile("cp.async.wait_group 0;" ::: "memory");
#endif
  __syncthreads();
  float4* red = (float4*)smem;
#pragma unroll
  for (int r = 0; r < TRW; r++)
#pragma unroll
    for (int m = 0; m < MT; m++)
      red[((wk * WN * TRW + wn * TRW + r) * MT + m) * 32 + lane] = make_float4(acc[r][m][0], acc[r][m][1], acc[r][m][2], acc[r][m][3]);
  if (NORM && wn == WN - 1) {      // the last group always has a tile
#pragma unroll
    for (int m = 0; m < MT; m++) {
      float v = ss[m];
      v += __shfl_xor_sync(~0u, v, 1); v += __shfl_xor_sync(~0u, v, 2);
      if (P > 1) v += __shfl_xor_sync(~0u, v, 16);
      if (P > 2) v += __shfl_xor_sync(~0u, v, 8);
      if (P > 4) v += __shfl_xor_sync(~0u, v, 4);
      if (t == 0) ssq[(NORM ? 1 : 0) * ((wk * MT + m) * 8 + g)] = v;
    }
  }
#if CL > 1
  CLUSTER_SYNC();
#else
  __syncthreads();
#endif
  auto total = [&](int at, float (&v)[4]) {
    v[0] = v[1] = v[2] = v[3] = 0.f;
    for (int c = 0; c < CL; c++)
#pragma unroll
      for (int k = 0; k < WK; k++) {
#if CL > 1
        const float4 p = ldcluster(smem_u32(red + k * PLANE + at), c);
#else
        const float4 p = red[k * PLANE + at];
#endif
        v[0] += p.x; v[1] += p.y; v[2] += p.z; v[3] += p.w;
      }
  };
  for (int e = crank * THREADS + tid; e < SLOTS; e += CL * THREADS) {
    int tile, tok; bool ok; where(e, tile, tok, ok);
    if (!ok) continue;
    if (EPI == 1 && e != crank * THREADS + tid) load_res(e);
    const int ts = (e >> 5) / MT, at = ((ts / TPW * TRW + ts % TPW) * MT + (e >> 5) % MT) * 32 + (e & 31);
    float v[4]; [[maybe_unused]] float up[4];
    total(at, v);
    if (EPI == 2) total(at + TPW * MT * 32, up);
    const int n = tile * 16 + ((e & 31) >> 2);
#pragma unroll
    for (int d = 0; d < 2; d++) {
      if (tok + d >= M) continue;
      float q = 1.f;
      if (NORM) {
        q = 0.f;
        for (int c = 0; c < CL; c++)
          for (int k = 0; k < WK; k++) {
            const int id = (NORM ? 1 : 0) * ((k * MT + tok / 8) * 8 + tok % 8 + d);
#if CL > 1
            q += ldcluster1(smem_u32(ssq + id), c);
#else
            q += ssq[id];
#endif
          }
        q = rsqrtf(q / (float)K + eps);
      }
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int row = n + 8 * h;
        if (row >= rows) continue;
        float value = v[d + 2 * h] * q;
        if (BIAS) value += from16(bias[row]);
        if (EPI == 1) value += from16(res[d + 2 * h]);
        if (EPI == 2) {
          float other = up[d + 2 * h] * q;
          if (BIAS) other += from16(bias[rows + row]);
          value = activation(value) * other;
        }
        const long long place = (long long)(tok + d) * ldy + row;
        if (OUT32) ((float*)y)[place] = value;
        else ((u16*)y)[place] = to16(value);
      }
    }
  }
#if CL > 1
  CLUSTER_SYNC();
#endif
}
