// What the kernels of this folder have in common: each includes it, and NVRTC needs nothing else. Of a kernel's macros it reads
//   FP16  0|1      the 16-bit type is bf16 or fp16        ACT   0 silu, 1 gelu, 2 gelu_tanh
//   NORM_OFFSET    where an RMS norm is in front           ACCUMULATORS and others, for a wgmma of operands in shared memory
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
