// Attention of one new token per request over the blocked cache: softmax(q k^T) v for each request's heads.
//
// Compiled by NVRTC without any header, one cubin per set of macros:
//   D      elements of a head               GROUP  query heads that share a key-value head, at most 16
//   KV_HEADS                                S      tokens of a block, a multiple of 16
//   KF,VF  keys and values: 0 as q is, 1 int8, 2 int4 (low nibbles d, high nibbles d + D/2), 1 and 2 with q in fp16
//   FP16   q in fp16, else bf16             OUT_FP16
//   PIECE  values are stored as Hadamard transforms of pieces of that length; 1: as they are
//   WARPS, STAGES, MINB                     warps of a block, tiles in flight of a warp, blocks per SM
//
// The work list has one entry per split of a request's context: request, its number, tokens of a split, tokens of the
// request. A fixed grid walks entries x heads; how a request is split follows from its own length, so its result does not
// depend on the batch. In a block each warp takes every WARPS-th tile of 16 tokens through its own ring of cp.async copies.
// Tokens are the rows of both products: S^T[16 tokens, 8 heads] = K q^T, then O^T[D, 8 heads] = V^T P^T, with V^T from
// ldmatrix.trans and P^T from movmatrix. Codes become exact fp16 integers; scales and minima touch the scores and the
// probabilities only: k.q = s (c.q) + m sum(q),  sum p v = sum (p s) c + sum p m.
// Blocks of one request meet in `partials`; the last to arrive adds them up in their order.
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;
#define INFINITY_ __int_as_float(0x7f800000)

#define NT ((GROUP + 7) / 8)                   // tiles of 8 heads
#define HEADS (KV_HEADS * GROUP)
#define THREADS (WARPS * 32)
#define ROW(F) ((F) == 0 ? 2 * D : (F) == 1 ? D : D / 2)
#define KROW ROW(KF)
#define VROW ROW(VF)
#define KPITCH (KF == 0 ? KROW + 16 : KF == 1 && D % 128 == 0 ? KROW + 64 : KROW)   // no bank conflicts
#define VPITCH (VROW + 16)
#define KBYTES (16 * KPITCH)
#define VBYTES (16 * VPITCH)
#define QUANTIZED (KF || VF)
#define STAGE (KBYTES + VBYTES + (QUANTIZED ? 128 : 0))
#define STEPS (D / 16)
#define INTS_FP16 (QUANTIZED || FP16)          // the type that both products compute in
#define RPITCH (D + 4)                         // floats of a head in the merge

__device__ __forceinline__ u32 smem_u32(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ u32 lds32(u32 a) { u32 v; asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(a)); return v; }
__device__ __forceinline__ void lds128(u32 a, u32 (&v)[4]) {
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(a)); }
__device__ __forceinline__ void lds64(u32 a, u32& x, u32& y) {
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(x), "=r"(y) : "r"(a)); }
__device__ __forceinline__ void ldmatrix(u32 a, u32 (&v)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(a)); }
__device__ __forceinline__ void ldmatrix_trans(u32 a, u32 (&v)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(a)); }
__device__ __forceinline__ u32 transposed(u32 x) {
  u32 v; asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(v) : "r"(x)); return v; }
__device__ __forceinline__ void copy16(u32 dst, const char* src, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(dst), "l"(src), "r"(bytes) : "memory"); }
__device__ __forceinline__ float half2f(u32 v) { float f; asm("{.reg .b16 a,b; mov.b32 {a,b},%1; cvt.f32.f16 %0,a;}" : "=f"(f) : "r"(v)); return f; }
__device__ __forceinline__ u32 two_halves(float a, float b) { u32 r; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a)); return r; }
__device__ __forceinline__ u32 two_bfloats(float a, float b) { u32 r; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a)); return r; }
__device__ __forceinline__ u32 prmt(u32 a, u32 b, u32 how) { u32 r; asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(how)); return r; }
__device__ __forceinline__ u32 minus_1024(u32 a) { u32 r; asm("sub.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(0x64006400u)); return r; }
__device__ __forceinline__ u32 sixteenth_minus_64(u32 a) { u32 r; asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(0x2c002c00u), "r"(0xd400d400u)); return r; }
template <int MASK> __device__ __forceinline__ u32 and_magic(u32 w) {
  u32 r; asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(w), "n"(MASK), "n"(0x64006400)); return r; }
__device__ __forceinline__ float exp2_(float x) { float r; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x)); return r; }
__device__ __forceinline__ float low(u32 v) {
#if FP16 || QUANTIZED
  return half2f(v);
#else
  return __uint_as_float(v << 16);
#endif
}
__device__ __forceinline__ float load_part(const float* p) { float v; asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(v) : "l"(p)); return v; }
__device__ __forceinline__ float2 load_stat(const float2* p) {
  float2 v; asm volatile("ld.relaxed.gpu.global.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(p)); return v; }
__device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if INTS_FP16
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1)); }

// The columns of q that step s takes from lane t: b0 = (first, first + apart), b1 = (second, second + apart).
__device__ __forceinline__ void columns(int s, int t, int& first, int& second, int& apart) {
#if KF == 0
  first = 16 * s + 2 * t; second = first + 8; apart = 1;
#elif KF == 1
  first = 64 * (s / 4) + 16 * t + 4 * (s % 4); second = first + 2; apart = 1;
#else
  first = (D / 8) * t + 4 * (s / 2) + (s % 2) * (D / 2); second = first + 1; apart = 2;
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, MINB)
decode_attention(const u16* q, const char* k, const char* v, const u32* k_params, const u32* v_params, const int* tables,
                 const int4* entries, const int* total, u16* out, float* partials, float2* stats, int* counters,
                 int q_stride, int table_stride, int k_block, int k_head, int v_block, int v_head,
                 int kp_block, int kp_head, int vp_block, int vp_head, float scale_log2) {
  extern __shared__ __align__(128) char smem[];
  __shared__ u16 qs[NT * 8 * D];
  __shared__ float maxima[WARPS][NT * 8], masses[WARPS][NT * 8], offsets[WARPS][NT * 8];
  __shared__ float weights[GROUP][32];
  __shared__ int is_last;
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, g = lane >> 2, t = lane & 3;
  const u32 ring = smem_u32(smem) + warp * STAGES * STAGE;
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  const int num_items = *total * KV_HEADS;     // by the kernel before: not to be read any earlier

  for (int item = blockIdx.x; item < num_items; item += gridDim.x) {
    const int slot = item / KV_HEADS, head = item % KV_HEADS;
    const int4 entry = entries[slot];
    const int row = entry.x, begin = entry.y * entry.z, end = min(begin + entry.z, entry.w);
    const int splits = max(1, (entry.w + entry.z - 1) / entry.z);
    const int tiles = max(0, (end - begin + 15) >> 4), count = tiles > warp ? (tiles - warp + WARPS - 1) / WARPS : 0;
    const int* table = tables + (long long)row * table_stride;

    int ids = 0;   // lane j: the block of this warp's tile 32 n + j
    auto load_ids = [&](int j) {
      const int token = begin + (warp + (j + lane) * WARPS) * 16;
      ids = token < end ? table[token / S] : 0;
    };
    auto fetch = [&](int j) {
      if (j < count) {
        if (j % 32 == 0) load_ids(j);
        const int token = begin + (warp + j * WARPS) * 16, n = min(16, end - token), offset = token % S;
        const long long block = __shfl_sync(~0u, ids, j % 32);
        const u32 dst = ring + (j % STAGES) * STAGE;
        const char* ksrc = k + block * k_block + (long long)head * k_head + offset * KROW;
        const char* vsrc = v + block * v_block + (long long)head * v_head + offset * VROW;
#pragma unroll
        for (int c = lane; c < KROW; c += 32)          // 16 rows of KROW / 16 pieces
          copy16(dst + c / (KROW / 16) * KPITCH + c % (KROW / 16) * 16, ksrc + c * 16, c / (KROW / 16) < n ? 16 : 0);
#pragma unroll
        for (int c = lane; c < VROW; c += 32)
          copy16(dst + KBYTES + c / (VROW / 16) * VPITCH + c % (VROW / 16) * 16, vsrc + c * 16, c / (VROW / 16) < n ? 16 : 0);
#if QUANTIZED
        if (lane < 4) copy16(dst + KBYTES + VBYTES + lane * 16, (const char*)(k_params + block * kp_block + (long long)head * kp_head + offset) + lane * 16, KF ? 16 : 0);
        else if (lane < 8) copy16(dst + KBYTES + VBYTES + lane * 16, (const char*)(v_params + block * vp_block + (long long)head * vp_head + offset) + (lane - 4) * 16, VF ? 16 : 0);
#endif
      }
      asm volatile("cp.async.commit_group;" ::: "memory");
    };
    for (int j = 0; j < STAGES; j++) fetch(j);

    const u16* qrow = q + (long long)row * q_stride + head * GROUP * D;
    for (int e = tid; e < NT * 8 * D / 8; e += THREADS)
      *(uint4*)(qs + e * 8) = e * 8 < GROUP * D ? *(const uint4*)(qrow + e * 8) : make_uint4(0, 0, 0, 0);
    __syncthreads();
    u32 qf[NT][STEPS][2];
    [[maybe_unused]] float qsum[NT][2];
#pragma unroll
    for (int n = 0; n < NT; n++) {
      const u16* mine = qs + (n * 8 + g) * D;
      float sum = 0.f;
#pragma unroll
      for (int s = 0; s < STEPS; s++) {
        int first, second, apart; columns(s, t, first, second, apart);
        qf[n][s][0] = mine[first] | (u32)mine[first + apart] << 16;
        qf[n][s][1] = mine[second] | (u32)mine[second + apart] << 16;
#if KF
        sum += low(qf[n][s][0]) + low(qf[n][s][0] >> 16) + low(qf[n][s][1]) + low(qf[n][s][1] >> 16);
#endif
      }
#if KF
      sum += __shfl_xor_sync(~0u, sum, 1); sum += __shfl_xor_sync(~0u, sum, 2);
      qsum[n][0] = __shfl_sync(~0u, sum, 8 * t); qsum[n][1] = __shfl_sync(~0u, sum, 8 * t + 4);
#endif
    }
    float m[NT][2], mass[NT][2], zero[NT][2], acc[STEPS][NT][4];
#pragma unroll
    for (int n = 0; n < NT; n++) {
      m[n][0] = m[n][1] = -INFINITY_; mass[n][0] = mass[n][1] = zero[n][0] = zero[n][1] = 0.f;
#pragma unroll
      for (int s = 0; s < STEPS; s++) acc[s][n][0] = acc[s][n][1] = acc[s][n][2] = acc[s][n][3] = 0.f;
    }

#pragma unroll 1
    for (int j = 0; j < count; j++) {
      asm volatile("cp.async.wait_group %0;" :: "n"(STAGES - 1) : "memory");
      __syncwarp();
      const u32 at = ring + (j % STAGES) * STAGE, vat = at + KBYTES;
      float s[NT][4], odd[NT][4];                      // two chains of products
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int c = 0; c < 4; c++) s[n][c] = odd[n][c] = 0.f;
#if KF == 0
#pragma unroll
      for (int step = 0; step < STEPS; step++) {
        u32 a[4];
        ldmatrix(at + (lane % 16) * KPITCH + step * 32 + (lane / 16) * 16, a);
#pragma unroll
        for (int n = 0; n < NT; n++) mma(step % 2 ? odd[n] : s[n], a, qf[n][step][0], qf[n][step][1]);
      }
#elif KF == 1
#pragma unroll
      for (int h = 0; h < D / 64; h++) {
        u32 x[4], y[4];
        lds128(at + g * KPITCH + h * 64 + t * 16, x);
        lds128(at + (g + 8) * KPITCH + h * 64 + t * 16, y);
#pragma unroll
        for (int w = 0; w < 4; w++) {
          const u32 a[4] = {minus_1024(prmt(x[w], 0x64646464u, 0x4140)), minus_1024(prmt(y[w], 0x64646464u, 0x4140)),
                            minus_1024(prmt(x[w], 0x64646464u, 0x4342)), minus_1024(prmt(y[w], 0x64646464u, 0x4342))};
#pragma unroll
          for (int n = 0; n < NT; n++) mma(w % 2 ? odd[n] : s[n], a, qf[n][4 * h + w][0], qf[n][4 * h + w][1]);
        }
      }
#else
      u32 x[D / 32], y[D / 32];
#if D == 128
      lds128(at + g * KPITCH + t * 16, x); lds128(at + (g + 8) * KPITCH + t * 16, y);
#else
      lds64(at + g * KPITCH + t * 8, x[0], x[1]); lds64(at + (g + 8) * KPITCH + t * 8, y[0], y[1]);
#endif
#pragma unroll
      for (int w = 0; w < D / 32; w++) {
        const u32 x8 = x[w] >> 8, y8 = y[w] >> 8;
        const u32 a[4] = {minus_1024(and_magic<0x000f000f>(x[w])), minus_1024(and_magic<0x000f000f>(y[w])),
                          minus_1024(and_magic<0x000f000f>(x8)), minus_1024(and_magic<0x000f000f>(y8))};
        const u32 b[4] = {sixteenth_minus_64(and_magic<0x00f000f0>(x[w])), sixteenth_minus_64(and_magic<0x00f000f0>(y[w])),
                          sixteenth_minus_64(and_magic<0x00f000f0>(x8)), sixteenth_minus_64(and_magic<0x00f000f0>(y8))};
#pragma unroll
        for (int n = 0; n < NT; n++) {
          mma(s[n], a, qf[n][2 * w][0], qf[n][2 * w][1]);
          mma(odd[n], b, qf[n][2 * w + 1][0], qf[n][2 * w + 1][1]);
        }
      }
#endif
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int c = 0; c < 4; c++) s[n][c] += odd[n][c];
      const int token = begin + (warp + j * WARPS) * 16 + g;
      const bool sees[2] = {token < end, token + 8 < end};
      [[maybe_unused]] float vs[2], vm[2];
#if QUANTIZED
#pragma unroll
      for (int h = 0; h < 2; h++) {
#if KF
        const u32 kp = lds32(at + KBYTES + VBYTES + (g + 8 * h) * 4);
        const float scale = half2f(kp), minimum = half2f(kp >> 16);
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
          for (int c = 0; c < 2; c++) s[n][2 * h + c] = s[n][2 * h + c] * scale + minimum * qsum[n][c];
#endif
        const u32 vp = lds32(at + KBYTES + VBYTES + 64 + (g + 8 * h) * 4);
        vs[h] = sees[h] ? half2f(vp) : 0.f; vm[h] = sees[h] ? half2f(vp >> 16) : 0.f;
      }
#endif
      u32 p[NT][2];
      bool grew = false;
      float shrink[NT][2];
#pragma unroll
      for (int n = 0; n < NT; n++) {
        float e[4];
#pragma unroll
        for (int c = 0; c < 2; c++) {
          const float upper = sees[0] ? s[n][c] * scale_log2 : -INFINITY_, lower = sees[1] ? s[n][2 + c] * scale_log2 : -INFINITY_;
          float largest = fmaxf(upper, lower);
          largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 4));
          largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 8));
          largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 16));
          largest = fmaxf(largest, m[n][c]);
          grew |= largest > m[n][c];
          shrink[n][c] = exp2_(m[n][c] - largest);
          m[n][c] = largest;
          e[c] = exp2_(upper - largest); e[2 + c] = exp2_(lower - largest);
          mass[n][c] = mass[n][c] * shrink[n][c] + e[c] + e[2 + c];
#if VF
          zero[n][c] = zero[n][c] * shrink[n][c] + e[c] * vm[0] + e[2 + c] * vm[1];
          e[c] *= vs[0]; e[2 + c] *= vs[1];
#endif
        }
#if INTS_FP16
        p[n][0] = transposed(two_halves(e[0], e[1])); p[n][1] = transposed(two_halves(e[2], e[3]));
#else
        p[n][0] = transposed(two_bfloats(e[0], e[1])); p[n][1] = transposed(two_bfloats(e[2], e[3]));
#endif
      }
      if (__any_sync(~0u, grew)) {
#pragma unroll
        for (int step = 0; step < STEPS; step++)
#pragma unroll
          for (int n = 0; n < NT; n++) {
            acc[step][n][0] *= shrink[n][0]; acc[step][n][1] *= shrink[n][1];
            acc[step][n][2] *= shrink[n][0]; acc[step][n][3] *= shrink[n][1];
          }
      }
#if VF == 0
#pragma unroll
      for (int step = 0; step < STEPS; step++) {
        u32 a[4];
        ldmatrix_trans(vat + ((lane / 16) * 8 + lane % 8) * VPITCH + step * 32 + (lane / 8 % 2) * 16, a);
#pragma unroll
        for (int n = 0; n < NT; n++) mma(acc[step][n], a, p[n][0], p[n][1]);
      }
#else
#pragma unroll
      for (int b = 0; b < VROW / 32; b++) {
        u32 x[4];
        ldmatrix_trans(vat + ((lane / 16) * 8 + lane % 8) * VPITCH + b * 32 + (lane / 8 % 2) * 16, x);
#pragma unroll
        for (int i = 0; i < 2; i++) {                  // 16 bytes of each token: x[i] of tokens 0-7, x[2 + i] of 8-15
#if VF == 1
          const u32 a[4] = {minus_1024(prmt(x[i], 0x64646464u, 0x4240)), minus_1024(prmt(x[i], 0x64646464u, 0x4341)),
                            minus_1024(prmt(x[2 + i], 0x64646464u, 0x4240)), minus_1024(prmt(x[2 + i], 0x64646464u, 0x4341))};
#pragma unroll
          for (int n = 0; n < NT; n++) mma(acc[2 * b + i][n], a, p[n][0], p[n][1]);
#else
          const u32 y0 = x[i] >> 8, y2 = x[2 + i] >> 8;
          const u32 a[4] = {minus_1024(and_magic<0x000f000f>(x[i])), minus_1024(and_magic<0x000f000f>(y0)),
                            minus_1024(and_magic<0x000f000f>(x[2 + i])), minus_1024(and_magic<0x000f000f>(y2))};
          const u32 c[4] = {sixteenth_minus_64(and_magic<0x00f000f0>(x[i])), sixteenth_minus_64(and_magic<0x00f000f0>(y0)),
                            sixteenth_minus_64(and_magic<0x00f000f0>(x[2 + i])), sixteenth_minus_64(and_magic<0x00f000f0>(y2))};
#pragma unroll
          for (int n = 0; n < NT; n++) {
            mma(acc[2 * b + i][n], a, p[n][0], p[n][1]);
            mma(acc[STEPS / 2 + 2 * b + i][n], c, p[n][0], p[n][1]);
          }
#endif
        }
      }
#endif
      __syncwarp();
      fetch(j + STAGES);
    }

    // ---- the block's warps meet in shared memory
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncthreads();
    float* sums = (float*)smem;                        // [WARPS][NT * 8][RPITCH]
#pragma unroll
    for (int n = 0; n < NT; n++) {
#pragma unroll
      for (int c = 0; c < 2; c++) {
        float a = mass[n][c], b = zero[n][c];
        a += __shfl_xor_sync(~0u, a, 4); a += __shfl_xor_sync(~0u, a, 8); a += __shfl_xor_sync(~0u, a, 16);
        b += __shfl_xor_sync(~0u, b, 4); b += __shfl_xor_sync(~0u, b, 8); b += __shfl_xor_sync(~0u, b, 16);
        if (g == 0) { maxima[warp][n * 8 + 2 * t + c] = m[n][c]; masses[warp][n * 8 + 2 * t + c] = a; offsets[warp][n * 8 + 2 * t + c] = b; }
      }
#pragma unroll
      for (int step = 0; step < STEPS; step++)
#pragma unroll
        for (int c = 0; c < 4; c++) {
          const int d = VF ? step * 16 + 2 * g + c / 2 : step * 16 + g + 8 * (c / 2);
          sums[(warp * NT * 8 + n * 8 + 2 * t + c % 2) * RPITCH + d] = acc[step][n][c];
        }
    }
    __syncthreads();
    auto finish = [&](int h, int d, float value) {      // a whole output element, still in the stored basis
#if PIECE > 1
      sums[h * RPITCH + d] = value;
#else
      u32 two;
#if OUT_FP16
      two = two_halves(value, 0.f);
#else
      two = two_bfloats(value, 0.f);
#endif
      out[((long long)row * HEADS + head * GROUP + h) * D + d] = (u16)two;
#endif
    };
    for (int e = tid; e < GROUP * D; e += THREADS) {
      const int h = e / D, d = e % D;
      float largest = -INFINITY_, whole = 0.f, value = 0.f;
#pragma unroll
      for (int w = 0; w < WARPS; w++) largest = fmaxf(largest, maxima[w][h]);
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        const float weight = maxima[w][h] == -INFINITY_ ? 0.f : exp2_(maxima[w][h] - largest);
        whole += weight * masses[w][h];
        value += weight * (sums[(w * NT * 8 + h) * RPITCH + d] + offsets[w][h]);
      }
      if (splits == 1) {
        finish(h, d, whole > 0.f ? value / whole : 0.f);
      } else {
        const long long part = (long long)slot * HEADS + head * GROUP + h;
        partials[part * D + d] = value;
        if (d == 0) stats[part] = make_float2(largest, whole);
      }
    }
    if (splits > 1) {
      __syncthreads();                                 // orders all threads' stores before the count
      if (tid == 0) {
        int* counter = counters + row * HEADS + head * GROUP;
        int before;
        asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
        is_last = before == splits - 1;
        if (is_last) *counter = 0;
      }
      __syncthreads();
      if (is_last) {
        const long long first = (long long)(slot - entry.y) * HEADS + head * GROUP;
        for (int h = warp; h < GROUP; h += WARPS) {     // at most 32 splits: a lane each
          float2 stat = make_float2(-INFINITY_, 0.f);
          if (lane < splits) stat = load_stat(stats + first + (long long)lane * HEADS + h);
          float largest = stat.x;
#pragma unroll
          for (int x = 16; x; x /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, x));
          const float weight = lane < splits ? exp2_(stat.x - largest) : 0.f;
          float whole = weight * stat.y;
#pragma unroll
          for (int x = 16; x; x /= 2) whole += __shfl_xor_sync(~0u, whole, x);
          weights[h][lane] = whole > 0.f ? weight / whole : 0.f;
        }
        __syncthreads();
        for (int e = tid; e < GROUP * D; e += THREADS) {
          const float* mine = partials + first * D + e;
          float value = 0.f;
#pragma unroll 8
          for (int i = 0; i < splits; i++) value += weights[e / D][i] * load_part(mine + (long long)i * HEADS * D);
          finish(e / D, e % D, value);
        }
      }
    }
#if PIECE > 1
    if (splits == 1 || is_last) {
      // Each thread reads what it wrote last before it writes again: rows of other warps' sums are dead by now.
      for (int half = 1; half < PIECE; half *= 2) {
        __syncthreads();
        for (int e = tid; e < GROUP * D / 2; e += THREADS) {
          const int h = e / (D / 2), i = e % (D / 2), d = i / half * 2 * half + i % half;
          const float a = sums[h * RPITCH + d], b = sums[h * RPITCH + d + half];
          sums[h * RPITCH + d] = a + b; sums[h * RPITCH + d + half] = a - b;
        }
      }
      __syncthreads();
      for (int e = tid; e < GROUP * D; e += THREADS) {
        const float value = sums[e / D * RPITCH + e % D] * PIECE_SCALE;
        out[((long long)row * HEADS + head * GROUP) * D + e] = (u16)(OUT_FP16 ? two_halves(value, 0.f) : two_bfloats(value, 0.f));
      }
    }
#endif
    __syncthreads();                                   // the ring, q and the merge are free for the next item
  }
}
