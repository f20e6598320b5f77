// What the kernels of this folder have in common: each includes it, and NVRTC needs nothing else. Of a kernel's macros it reads
//   FP16  0|1      the 16-bit type is bf16 or fp16        ACT   0 silu, 1 gelu, 2 gelu_tanh
//   NORM_OFFSET    where an RMS norm is in front           ACCUMULATORS and others, for a wgmma of operands in shared memory
//   DIGITS, GROUP  for integer arithmetic                 TOTALS and others, where warpgroups and blocks split K
// Where two ways to the same result compile to different instructions, kernels keep the one that they were measured with:
//   SHIFTED_HI     hi by a shift of its own               QUOTIENT(a, b)   the activation's, rounded correctly or not
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;
struct __align__(64) TensorMap { char opaque[128]; };

#if FP16
#define TY "f16"
#else
#define TY "bf16"
#endif
#ifndef QUOTIENT
#define QUOTIENT(a, b) __fdividef(a, b)
#endif

// ---- The kernels before and behind this one. What the one before has written must be read past L1, by ld.relaxed.gpu: it may
// still have run when this one began, and only L2 is sure to be coherent.
#if __CUDA_ARCH__ >= 900
#define NEXT_MAY_START() asm volatile("griddepcontrol.launch_dependents;" ::: "memory")
#define WAIT_FOR_PREVIOUS() asm volatile("griddepcontrol.wait;" ::: "memory")
#else
#define NEXT_MAY_START()
#define WAIT_FOR_PREVIOUS()
#endif
__device__ __forceinline__ uint4 ldg128(const void* p) {
  uint4 v; asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p)); return v; }
__device__ __forceinline__ u16 ldg16(const u16* p) { u16 v; asm volatile("ld.relaxed.gpu.global.u16 %0, [%1];" : "=h"(v) : "l"(p)); return v; }
__device__ __forceinline__ u32 ldg32(const u16* p) { u32 v; asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p)); return v; }

// ---- Shared memory by 32-bit addresses, and copies to it without registers. bytes: of the 16; the others become zero.
__device__ __forceinline__ u32 smem_u32(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ u32 lds32(u32 a) { u32 v; asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(a)); return v; }
__device__ __forceinline__ uint4 lds128(u32 a) {
  uint4 v; asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(a)); return v; }
__device__ __forceinline__ uint2 lds64(u32 a) { uint2 v; asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(a)); return v; }
__device__ __forceinline__ float4 lds_float4(u32 a) {
  float4 v; asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(a)); return v; }
__device__ __forceinline__ void copy16(u32 dst, const void* src) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(dst), "l"(src) : "memory"); }
__device__ __forceinline__ void copy16(u32 dst, const void* src, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(dst), "l"(src), "r"(bytes) : "memory"); }

// ---- Numbers of 16 bits; lo and hi are those of a pair, half2f takes fp16 whatever the type.
__device__ __forceinline__ float half2f(u32 v) { float f; asm("{.reg .b16 a,b; mov.b32 {a,b},%1; cvt.f32.f16 %0,a;}" : "=f"(f) : "r"(v)); return f; }
#if !FP16
__device__ __forceinline__ float lo(u32 v) { return __uint_as_float(v << 16); }
__device__ __forceinline__ float hi(u32 v) { return __uint_as_float(v & 0xffff0000u); }
#else
__device__ __forceinline__ float lo(u32 v) { return half2f(v); }
#ifdef SHIFTED_HI
__device__ __forceinline__ float hi(u32 v) { return half2f(v >> 16); }
#else
__device__ __forceinline__ float hi(u32 v) { float f; asm("{.reg .b16 a,b; mov.b32 {a,b},%1; cvt.f32.f16 %0,b;}" : "=f"(f) : "r"(v)); return f; }
#endif
#endif
__device__ __forceinline__ float from16(u16 v) { return lo((u32)v); }
__device__ __forceinline__ u16 to16(float f) { u16 r; asm("cvt.rn." TY ".f32 %0, %1;" : "=h"(r) : "f"(f)); return r; }
__device__ __forceinline__ u32 pack16(float a, float b) { u32 r; asm("cvt.rn." TY "x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a)); return r; }
__device__ __forceinline__ u32 fma2(u32 a, u32 b, u32 c) { u32 r; asm("fma.rn." TY "x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c)); return r; }
template <int MASK, int MAGIC> __device__ __forceinline__ u32 andor(u32 w) {
  u32 r; asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(w), "n"(MASK), "n"(MAGIC)); return r; }
#ifdef NORM_OFFSET
// What is not divided by rms(x) yet may be too large for fp16: its largest number then, NaN stays.
__device__ __forceinline__ u32 times_gamma(u32 x, u32 gamma) {      // compiles to other instructions with pack16
  const float a = lo(x) * (lo(gamma) + NORM_OFFSET), b = hi(x) * (hi(gamma) + NORM_OFFSET);
  u32 v = (u32)to16(a) | (u32)to16(b) << 16;
#if FP16
  asm("min.NaN.f16x2 %0, %0, %1;" : "+r"(v) : "r"(0x7bff7bffu));
  asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(v) : "r"(0xfbfffbffu));
#endif
  return v; }
#endif
__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
  for (int i = 16; i; i /= 2) x += __shfl_xor_sync(~0u, x, i);
  return x; }

// 8 nibbles -> A fragment of mma.m16n8k16. Registers 0 and 2 belong to rows 0-7 of the tile, 1 and 3 to rows 8-15.
// fp16: 1024 + q in the first rows, 1024 + 16 q in the others, one shift in all. bf16: 128 + q, exact in its 8 bits.
__device__ __forceinline__ void integers(u32 w, u32 (&a)[4]) {
#if FP16
  const u32 v = w >> 8;
  a[0] = andor<0x000f000f, 0x64006400>(w); a[1] = andor<0x00f000f0, 0x64006400>(w);
  a[2] = andor<0x000f000f, 0x64006400>(v); a[3] = andor<0x00f000f0, 0x64006400>(v);
#else
  a[0] = andor<0x000f000f, 0x43004300>(w);      a[1] = andor<0x000f000f, 0x43004300>(w >> 4);
  a[2] = andor<0x000f000f, 0x43004300>(w >> 8); a[3] = andor<0x000f000f, 0x43004300>(w >> 12);
#endif
}
__device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32." TY "." TY ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1)); }

__device__ __forceinline__ float exp2_(float x) { float r; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x)); return r; }
__device__ __forceinline__ float activation(float v) {
#if ACT == 0
  return QUOTIENT(v, 1.f + __expf(-v));
#elif ACT == 1
  return 0.5f * v * (1.f + erff(v * 0.70710678f));
#else
  const float u = 0.79788456f * (v + 0.044715f * v * v * v);
  return QUOTIENT(v, 1.f + __expf(-2.f * u));
#endif
}

#ifdef DIGITS      // x as integers: GROUP columns share a scale of W
// ---- 128 columns of x, a unit, are 16-bit integers times a power of two, so chosen that the largest has 15 bits and a sign: a bf16
// of at least 1/128 of the largest is exact, the error of any is below 2^-16 of it. Two digits of 8 bits each take two columns of
// mma.m16n8k32: B registers hold 4 units, column c being digit c % 2 (the upper one first) of unit c / 2. A word of packed weights is,
// by its low nibbles, 4 columns of row g, by its high ones 16 times those of row g + 8, without a shift. So a unit's sum is exact,
// whichever kernel takes it. In float32, units of an eighth of K are added one after the other, by fma; eighths of a slice in a
// row, slices in a row: kernels that cut a product into the same slices get the same bits.
#define GROUPS (128 / GROUP)
#define EIGHTHS 8
__device__ __forceinline__ void mma_bytes(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1)); }
__device__ __forceinline__ float larger(float a, float b) { float r; asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(fabsf(b))); return r; }
// Of a unit this lane's columns, 4 times 8 in a row.
__device__ __forceinline__ void load(const u16* x, bool has, float (&f)[4][8]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint4 v = has ? ldg128(x + i * 32) : make_uint4(0, 0, 0, 0);
    const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int j = 0; j < 4; j++) { f[i][2 * j] = lo(words[j]); f[i][2 * j + 1] = hi(words[j]); }
  }
}
#ifdef NORM_OFFSET
// Those times a norm's weights; the sum of their squares before that.
__device__ __forceinline__ float times_norm(const u16* gamma, bool has, float (&f)[4][8]) {
  float squared = 0.f;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint4 v = has ? *(const uint4*)(gamma + i * 32) : make_uint4(0, 0, 0, 0);
    const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int j = 0; j < 8; j++) {
      squared += f[i][j] * f[i][j];
      f[i][j] *= (j % 2 ? hi(words[j / 2]) : lo(words[j / 2])) + NORM_OFFSET;
    }
  }
  return squared;
}
#endif
// Of four units that 8 lanes each have: one digit of this lane's columns, the upper one in even rows g of lanes. Returns the power
// of two that the unit's are multiples of, NaN if some number of it is not finite.
__device__ __forceinline__ float to_digits(const float (&f)[4][8], bool is_lower, u32 (&out)[8]) {
  float most = 0.f;
#pragma unroll
  for (int i = 0; i < 32; i++) most = larger(most, f[i / 8][i % 8]);
  most = larger(most, __shfl_xor_sync(~0u, most, 1));
  most = larger(most, __shfl_xor_sync(~0u, most, 2));
  const u32 exponent = max(__float_as_uint(most * 1.004f) & 0x7f800000u, 20u << 23);      // so no integer is above 32,637
  const float inverse = __uint_as_float((268u << 23) - exponent);
  const float magic = is_lower ? 12582912.f : 12582912.f + 128.f;      // has the integer in its lowest bits; the upper digit is rounded
  const u32 choice = is_lower ? 0x40 : 0x51;
#pragma unroll
  for (int w = 0; w < 8; w++) {
    u32 n[4];
#pragma unroll
    for (int j = 0; j < 4; j++) n[j] = __float_as_uint(fmaf(f[w / 2][w % 2 * 4 + j], inverse, magic));
    out[w] = __byte_perm(__byte_perm(n[0], n[2], choice), __byte_perm(n[1], n[3], choice), 0x5410);
  }
  return most < 3e38f ? __uint_as_float(exponent - (14u << 23)) : __uint_as_float(0x7fffffffu);
}

// Sums of the columns of each group, of unit t of these four.
__device__ __forceinline__ void sum_groups(const u32 (&digits)[8], int (&sums)[GROUPS]) {
#pragma unroll
  for (int p = 0; p < GROUPS; p++) {
    int d[4] = {0, 0, 0, 0};
#pragma unroll
    for (int s = p * 4 / GROUPS; s < (p + 1) * 4 / GROUPS; s++) mma_bytes(d, 0x01010101u, 0, 0x01010101u, 0, digits[2 * s], digits[2 * s + 1]);
    sums[p] = d[0] * 256 + d[1];
  }
}
__device__ __forceinline__ float one_over_rms(const float* squares, int columns, float eps) {      // by their sums of eighths
  float q = 0.f;
#pragma unroll
  for (int k = 0; k < EIGHTHS; k++) q += squares[k];
  return rsqrtf(q / (float)columns + eps);
}
#endif

// ---- Barriers in shared memory; from sm_90 on they count the bytes of bulk copies. Two ways to wait, of which the second
// is for every architecture: a loop in assembler and one in C++.
__device__ __forceinline__ void init(u32 bar, u32 count) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(bar), "r"(count) : "memory"); }
__device__ __forceinline__ void fence_inits() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void arrive(u32 bar) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(bar) : "memory"); }
__device__ __forceinline__ void expect(u32 bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(bar), "r"(bytes) : "memory"); }
__device__ __forceinline__ void wait(u32 bar, u32 parity) {
  asm volatile("{\n.reg .pred p;\nW_%=: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra W_%=;\n}" :: "r"(bar), "r"(parity) : "memory"); }
#if __CUDA_ARCH__ >= 900
#define POLL "mbarrier.try_wait.parity.shared::cta.b64"
#else
#define POLL "mbarrier.test_wait.parity.shared.b64"
#endif
__device__ __forceinline__ void wait_in_loop(u32 bar, u32 parity) {
  u32 done;
  do asm volatile("{.reg .pred p; " POLL " p, [%1], %2; selp.u32 %0, 1, 0, p;}" : "=r"(done) : "r"(bar), "r"(parity) : "memory");
  while (!done);
}
__device__ __forceinline__ u64 evict_first() {      // a policy of L2
  u64 policy; asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy)); return policy; }
__device__ __forceinline__ u64 evict_last() { u64 p; asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(p)); return p; }
__device__ __forceinline__ void bulk_copy(u32 dst, const char* src, u32 bytes, u32 bar, u64 policy) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
      :: "r"(dst), "l"(src), "r"(bytes), "r"(bar), "l"(policy) : "memory"); }
__device__ __forceinline__ void copy_box(u32 dst, const TensorMap* map, int column, int row, u32 bar, u64 policy) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;"
      :: "r"(dst), "l"(map), "r"(column), "r"(row), "r"(bar), "l"(policy) : "memory"); }

// ---- Clusters and warpgroups (sm_90)
__device__ __forceinline__ float4 ldcluster(u32 a, u32 rank) {
  float4 v; u32 r;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(rank));
  asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(r)); return v; }
__device__ __forceinline__ void stcluster(u32 a, u32 rank, float x, float y, float z, float w) {
  u32 r;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(rank));
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1,%2,%3,%4};" :: "r"(r), "f"(x), "f"(y), "f"(z), "f"(w) : "memory"); }
#define CLUSTER_SYNC() asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory")
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
#ifdef ACCUMULATORS      // 64 tokens are the left operand, NW rows of a weight the right one
#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
// A tile in shared memory: rows of 128 bytes whose 16-byte pieces are swizzled by the row's number modulo 8
__device__ __forceinline__ u64 descriptor(u32 address) {
  return (u64)((address & 0x3ffff) >> 4) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62; }
__device__ __forceinline__ void wgmma(float (&d)[NW / 2], u64 a, u64 b) {
  asm volatile("{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n" TEXT(NW) "k16.f32." TY "." TY " {" REGISTERS "}, " DESCRIPTORS ", p, 1, 1, 0, 0;\n}"
      : ACCUMULATORS : "l"(a), "l"(b)); }
// Of one of these threads' chunks of 8 columns, those of y from n on for a token and the one 8 behind: v, up and added are theirs.
__device__ __forceinline__ void store_chunk(void* y, const u16* __restrict__ bias, int token0, int M, int n, int outs, int ldy,
                                            const float (&v)[4], const float (&up)[4], const u32 (&added)[2]) {
  if (n >= outs) return;
  const u32 offset = BIAS ? *(const u32*)(bias + n) : 0, up_offset = BIAS && EPI == 2 ? *(const u32*)(bias + outs + n) : 0;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int token = token0 + 8 * h;
    if (token >= M) continue;
    float first = v[2 * h], second = v[2 * h + 1];
    if (BIAS) { first += lo(offset); second += hi(offset); }
    if (EPI == 1) { first += lo(added[h]); second += hi(added[h]); }
    if (EPI == 2) {
      first = activation(first) * (up[2 * h] + (BIAS ? lo(up_offset) : 0.f));
      second = activation(second) * (up[2 * h + 1] + (BIAS ? hi(up_offset) : 0.f));
    }
    const long long place = (long long)token * ldy + n;
    if (OUT32) *(float2*)((float*)y + place) = make_float2(first, second);
    else *(u32*)((u16*)y + place) = pack16(first, second);
  }
}
#endif
#ifdef TOTALS      // CL blocks of CONSUMERS threads that multiply have some rows of W, each for a part of K; y is the sum of theirs
#define CONSUMERS_SYNC() asm volatile("bar.sync 1, %0;" :: "n"(CONSUMERS) : "memory")
// tiles: of 16 rows, of W. pairs: of them, with gates and ups (EPI 2). This block's: count from first on, in a stage so many as
// flat, the ups behind the gates.
struct Share { int rank, tiles, pairs, first, count, flat; };
__device__ __forceinline__ Share share_of(int N) {
  Share s;
  s.rank = CL > 1 ? blockIdx.x % CL : 0;
  const int block = blockIdx.x / CL, blocks = gridDim.x / CL;
  s.tiles = (N + 15) >> 4; s.pairs = EPI == 2 ? s.tiles / 2 : s.tiles;
  s.first = (int)((long long)block * s.pairs / blocks); s.count = (int)((long long)(block + 1) * s.pairs / blocks) - s.first;
  s.flat = EPI == 2 ? 2 * s.count : s.count;
  return s; }
__device__ __forceinline__ float4 total(const float* red, int pitch, int token, int row) {
  float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
  for (int c = 0; c < CL; c++)
#pragma unroll
    for (int k = 0; k < WK; k++) {
      const float* from = red + (k * NT + token) * pitch + row;
#if CL > 1
      const float4 p = ldcluster(smem_u32(from), c);
#else
      const float4 p = *(const float4*)from;
#endif
      v.x += p.x; v.y += p.y; v.z += p.z; v.w += p.w;
    }
  return v;
}
// By all who multiply, when they have written red[WK][NT tokens][pitch]. rows: of y. scales: of each token, or null. vectors: rows of
// y and residual are aligned for four elements at once.
__device__ __forceinline__ void store_totals(const float* red, int pitch, const Share& mine, int rows, int M, int ldy, int vectors,
                                             const float* scales, const u16* residual, const u16* bias, void* y) {
#if CL > 1
  CLUSTER_SYNC();
#else
  CONSUMERS_SYNC();
#endif
  const int quads = mine.count * 4;
  for (int e = mine.rank * CONSUMERS + threadIdx.x; e < quads * M; e += CL * CONSUMERS) {
    const int tok = e / quads, local = (e - tok * quads) * 4, row = mine.first * 16 + local;
    if (row >= rows) continue;
    const long long place = (long long)tok * ldy + row;
    const float scale = scales ? __uint_as_float(ldg32((const u16*)(scales + tok))) : 1.f;
    u32 res[2] = {0, 0};
    if (EPI == 1 && vectors) asm volatile("ld.relaxed.gpu.global.v2.u32 {%0,%1}, [%2];" : "=r"(res[0]), "=r"(res[1]) : "l"(residual + place) : "memory");
    const float4 sum = total(red, pitch, tok, local);
    float v[4] = {sum.x, sum.y, sum.z, sum.w};
    if (BIAS || scales) {
#pragma unroll
      for (int i = 0; i < 4; i++) v[i] = fmaf(scale, v[i], BIAS && row + i < rows ? from16(bias[row + i]) : 0.f);
    }
    if (EPI == 1) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        if (vectors) v[i] += from16((u16)(res[i >> 1] >> 16 * (i & 1)));
        else if (row + i < rows) v[i] += from16(((const volatile u16*)residual)[place + i]);
      }
    }
    if (EPI == 2) {
      const float4 more = total(red, pitch, tok, mine.count * 16 + local);
      float up[4] = {more.x, more.y, more.z, more.w};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        if (BIAS && row + i < rows) up[i] = fmaf(scale, up[i], from16(bias[rows + row + i]));
        else up[i] *= scale;
        v[i] = activation(v[i]) * up[i];
      }
    }
    if (vectors) {
      if (OUT32) *(float4*)((float*)y + place) = make_float4(v[0], v[1], v[2], v[3]);
      else *(uint2*)((u16*)y + place) = make_uint2(pack16(v[0], v[1]), pack16(v[2], v[3]));
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        if (row + i >= rows) break;
        if (OUT32) ((float*)y)[place + i] = v[i];
        else ((u16*)y)[place + i] = (u16)pack16(v[i], 0.f);
      }
    }
  }
#if CL > 1
  CLUSTER_SYNC();
#endif
}
#endif
