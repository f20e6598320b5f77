// Rotation, cache write and attention of one new token per request: from its row of q, k and v to softmax(q k^T) v.
//
// Compiled by NVRTC, one cubin per set of macros (functions that are not here are in common.cuh):
//   D      elements of a head               GROUP  query heads that share a key-value head, at most 16
//   KV_HEADS                                S      tokens of a block, a multiple of 16
//   FP16   the model computes in fp16, else in bf16
//   KF,VF  keys and values: 0 in the model's type, 1 int8, 2 int4 (low nibbles d, high nibbles d + D/2)
//   KPIECE,VPIECE  they are stored as Hadamard transforms of pieces of that length; 1: as they are
//   R      rotated elements of a head       INTERLEAVED  pairs 2j, 2j + 1 in place of j, j + R/2
//   NORM   RMS norm of each head of q and k before the rotation
//   CLIP   bounds of q, k, v before that    LOGN   rotated queries grow with log(position + 1)
//   WARPS, STAGES, MINB                     warps of a block, tiles in flight of a warp, blocks per SM
//   CL     blocks that share an entry and add up through distributed shared memory
//   APART  1: the merge has memory of its own, and the next entry's copies begin before it
//
// The work list has one entry per split of a request's context: request, its number, tokens of a split, tokens of the
// request. A fixed grid of teams of CL blocks walks entries x key-value heads; how a request is split follows from its own
// length, so that with the same macros its result does not depend on the batch. A team's warps take tiles of 16 tokens in
// turn, each through its own ring of cp.async copies. Tokens are the rows of both products: S^T[16 tokens, 8 heads] = K q^T, then
// O^T[D, 8 heads] = V^T P^T, with V^T from ldmatrix.trans and P^T from movmatrix. Codes become fp16 integers: of a key BASE + c,
// where high nibbles are BASE + 16 c against q / 16, with BASE sum(q) taken off the float32 sums; of a value c itself, since
// those sums grow long. Scales and minima touch the scores and the probabilities only:
// k.q = s (c.q) + m sum(q),  sum p v = sum (p s) c + sum p m.
//
// Each block turns its queries itself. The block whose warp has the last tile also turns and encodes the new key and value,
// writes them to the cache, and puts them into that tile, which is copied without them.
// Work list, block tables, older keys and values, cosines and sines must have been written before an earlier launch that was
// an ordinary one: they are read while the kernel before still computes the row of q, k and v.
// The warps of a team meet in shared memory, each head's sums in one of the blocks. Teams of one request meet in `partials`,
// head by head, and the last to arrive adds them up in their order.
#define SHIFTED_HI
#include "common.cuh"
#define INFINITY_ __int_as_float(0x7f800000)

#define NT ((GROUP + 7) / 8)                   // tiles of 8 heads
#define HEADS (KV_HEADS * GROUP)
#define THREADS (WARPS * 32)
#define PARTS (WARPS * CL)                     // warps of a team, at most 32
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
#define BASE 1024.f                            // what is under a code that has become the mantissa of an fp16
#define RPITCH (D + 4)                         // floats of a head in the merge
#define QPITCH (D + 8)                         // elements of a query
#define SHARE ((GROUP + CL - 1) / CL)          // heads whose parts a block of a team adds up
#define RING (WARPS * STAGES * STAGE)
#define SUMS (WARPS * GROUP * RPITCH * 4)
#define JOBS ((GROUP + 2 + WARPS - 1) / WARPS) // vectors of the new token that a warp turns

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
__device__ __forceinline__ u32 two_halves(float a, float b) { u32 r; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a)); return r; }
__device__ __forceinline__ u32 prmt(u32 a, u32 b, u32 how) { u32 r; asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(how)); return r; }
__device__ __forceinline__ u32 minus_1024(u32 a) { u32 r; asm("sub.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(0x64006400u)); return r; }
__device__ __forceinline__ u32 sixteenth_minus_64(u32 a) { u32 r; asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(0x2c002c00u), "r"(0xd400d400u)); return r; }
__device__ __forceinline__ u32 sixteenth(u32 a) { u32 r; asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(0x2c002c00u)); return r; }
template <int MASK> __device__ __forceinline__ u32 and_magic(u32 w) {
  u32 r; asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(w), "n"(MASK), "n"(0x64006400)); return r; }
// In the type that products compute in; lo, hi and pack16 are in the model's.
__device__ __forceinline__ float low(u32 v) { return INTS_FP16 ? half2f(v) : lo(v); }
__device__ __forceinline__ u32 two_computed(float a, float b) { return INTS_FP16 ? two_halves(a, b) : pack16(a, b); }
__device__ __forceinline__ void unpack(uint2 v, float (&x)[4]) {
  x[0] = lo(v.x); x[1] = hi(v.x); x[2] = lo(v.y); x[3] = hi(v.y); }
__device__ __forceinline__ void round_to_model(float (&x)[4]) {
  unpack(make_uint2(pack16(x[0], x[1]), pack16(x[2], x[3])), x); }
__device__ __forceinline__ float cut_to_half(float x) { return fminf(fmaxf(x, -65504.f), 65504.f); }
__device__ __forceinline__ float max_of_warp(float x) {
#pragma unroll
  for (int i = 16; i; i /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, i));
  return x; }

// A vector of D elements lies in a warp's first D / 4 lanes, four consecutive ones in each.
// The orthonormal Hadamard transform of its pieces, sums of two at a time from neighbours to halves.
template <int PIECE> __device__ __forceinline__ void hadamard(float (&x)[4], int lane, float factor) {
  if (PIECE == 1) return;
  const float a = x[0] + x[1], b = x[0] - x[1], c = x[2] + x[3], d = x[2] - x[3];
  x[0] = a + c; x[1] = b + d; x[2] = a - c; x[3] = b - d;
#pragma unroll
  for (int apart = 1; apart < PIECE / 4; apart *= 2)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float other = __shfl_xor_sync(~0u, x[i], apart);
      x[i] = lane & apart ? other - x[i] : x[i] + other;
    }
#pragma unroll
  for (int i = 0; i < 4; i++) x[i] = __fmul_rn(x[i], factor);
}

// A vector as it is stored: four elements' bytes in each lane, for 4 bits those of d and d + D / 2; and its scale and minimum.
template <int FORM> __device__ __forceinline__ uint2 encode(const float (&x)[4], int lane, u32& params) {
  if (FORM == 0) return make_uint2(pack16(x[0], x[1]), pack16(x[2], x[3]));
  constexpr float levels = FORM == 1 ? 255.f : 15.f;
  const bool is_in = lane < D / 4;
  const float high = max_of_warp(is_in ? fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3])) : -INFINITY_);
  const float lowest = -max_of_warp(is_in ? -fminf(fminf(x[0], x[1]), fminf(x[2], x[3])) : -INFINITY_);
  params = two_halves(cut_to_half(__fdiv_rn(__fsub_rn(high, lowest), levels)), cut_to_half(lowest));
  const float scale = half2f(params), minimum = half2f(params >> 16), divisor = scale == 0.f ? 1.f : scale;
  u32 codes = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float steps = fminf(fmaxf(__fdiv_rn(__fsub_rn(x[i], minimum), divisor), 0.f), levels);
    codes |= (u32)__float2int_rn(steps) << (8 * i);
  }
  if (FORM == 2) codes |= __shfl_down_sync(~0u, codes, D / 8) << 4;
  return make_uint2(codes, 0);
}
template <int FORM> __device__ __forceinline__ void store_vector(char* to, uint2 v, int lane) {
  if (FORM == 0) { if (lane < D / 4) *(uint2*)(to + lane * 8) = v; }
  else if (lane < (FORM == 1 ? D / 4 : D / 8)) *(u32*)(to + lane * 4) = v.x;
}
#if CL > 1
__device__ __forceinline__ u32 in_block(u32 a, u32 rank) {
  u32 r; asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(rank)); return r; }
__device__ __forceinline__ void put(u32 a, float v) { asm volatile("st.shared::cluster.f32 [%0], %1;" :: "r"(a), "f"(v) : "memory"); }
__device__ __forceinline__ void put4(u32 a, float4 v) {
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1,%2,%3,%4};" :: "r"(a), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory"); }
#define TEAM_ARRIVE() asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory")
#define TEAM_WAIT() asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory")
#define TEAM_SYNC() do { TEAM_ARRIVE(); TEAM_WAIT(); } while (0)
#else
__device__ __forceinline__ u32 in_block(u32 a, u32) { return a; }
__device__ __forceinline__ void put(u32 a, float v) { asm volatile("st.shared.f32 [%0], %1;" :: "r"(a), "f"(v) : "memory"); }
#define TEAM_SYNC() __syncthreads()
#endif
// What another kernel of this stream wrote while this one may have run already: only L2 is sure to be coherent.
__device__ __forceinline__ int load_int(const int* p) { int v; asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(p)); return v; }
__device__ __forceinline__ int4 load_int4(const int4* p) {
  int4 v; asm volatile("ld.relaxed.gpu.global.v4.s32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p)); return v; }
__device__ __forceinline__ uint2 load_four(const u16* p) {
  uint2 v; asm volatile("ld.relaxed.gpu.global.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p)); return v; }
__device__ __forceinline__ float load_float(const float* p) { float v; asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(v) : "l"(p)); return v; }
__device__ __forceinline__ float4 load_part(const float* p) {
  float4 v; asm volatile("ld.relaxed.gpu.global.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p)); return v; }
__device__ __forceinline__ float2 load_stat(const float2* p) {
  float2 v; asm volatile("ld.relaxed.gpu.global.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(p)); return v; }
__device__ __forceinline__ void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if INTS_FP16
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1)); }

// What step s takes of a query from lane t: the columns of a lane's part of the keys.
__device__ __forceinline__ void fragment(const u16* q, int s, int t, u32 (&b)[2]) {
#if KF == 0
  b[0] = *(const u32*)(q + 16 * s + 2 * t); b[1] = *(const u32*)(q + 16 * s + 2 * t + 8);
#elif KF == 1
  const uint2 v = *(const uint2*)(q + 64 * (s / 4) + 16 * t + 4 * (s % 4));
  b[0] = v.x; b[1] = v.y;
#else                                          // low nibbles in even steps, high ones in odd
  const uint2 v = *(const uint2*)(q + (D / 8) * t + 4 * (s / 2) + (s % 2) * (D / 2));
  b[0] = prmt(v.x, v.y, 0x5410); b[1] = prmt(v.x, v.y, 0x7632);
  if (s % 2) { b[0] = sixteenth(b[0]); b[1] = sixteenth(b[1]); }
#endif
}

struct Item { int slot, row, head, split, splits, begin, end, length, tiles; };

extern "C" __global__ void __launch_bounds__(THREADS, MINB)
decode_attention(const u16* qkv, const float* cosines, const float* sines, const u16* q_norm, const u16* k_norm,
                 char* k, char* v, u32* k_params, u32* v_params, const int* tables, const int4* entries, const int* total,
                 u16* out, float* partials, float2* stats, int* counters, int row_stride, int table_stride,
                 int k_block, int k_head, int v_block, int v_head, int kp_block, int kp_head, int vp_block, int vp_head,
                 float scale_log2, float norm_eps, float norm_offset, float clip, float log_length) {
  extern __shared__ __align__(128) char smem[];
  __shared__ __align__(16) u16 qs[GROUP * QPITCH];
  __shared__ __align__(16) char fresh[KROW + VROW];   // the new token's key and value as they are stored
  __shared__ u32 fresh_params[2];
  __shared__ float marks[SHARE][3][PARTS];            // of each warp's scores: maximum, mass, sum of p times minima
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, g = lane >> 2, t = lane & 3;
  const int rank = CL > 1 ? blockIdx.x % CL : 0, part = rank * WARPS + warp;
  const u32 ring = smem_u32(smem) + warp * STAGES * STAGE;
  float* sums = (float*)(smem + (APART ? RING : 0));  // of this block's warps, [WARPS][GROUP][RPITCH]
  // Of the team's warps, for this block's heads: [PARTS][SHARE][RPITCH]. Other blocks write them at any time.
  float* parts = CL == 1 ? sums : (float*)(smem + (APART ? RING + SUMS : RING > SUMS ? RING : SUMS));
  NEXT_MAY_START();
  const int num_items = load_int(total) * KV_HEADS;
  int item = blockIdx.x / CL;
  if (item >= num_items) return;                      // there are others, which wait for the kernel before
#if CL > 1
  TEAM_ARRIVE();
  bool is_first = true;
#endif

  Item it;
  int count, ids;                                     // tiles of this warp; lane j: the block of its tile 32 n + j
  float cosine[4], sine[4];                           // of this lane's four elements
  uint2 row[JOBS];                                    // four elements of each vector that this warp turns
  int new_block = 0;                                  // where the new token belongs
  auto load_ids = [&](int j) {
    const int token = it.begin + (part + (j + lane) * PARTS) * 16;
    ids = token < it.end ? load_int(tables + (long long)it.row * table_stride + token / S) : 0;
  };
  int k_lane, v_lane;                                 // bytes of a block before the first piece that this lane copies
  [[maybe_unused]] const char* params_lane;           // lanes 0 to 3 copy the parameters of keys, 4 to 7 those of values
  [[maybe_unused]] const long long params_block = 4ll * (lane < 4 ? kp_block : vp_block);
  auto fetch = [&](int j) {
    if (j < count) {
      if (j && j % 32 == 0) load_ids(j);
      // The new token is the last of the request and not in the cache yet.
      const int token = it.begin + (part + j * PARTS) * 16, n = min(16, min(it.end, it.length - 1) - token), offset = token % S;
      const long long block = __shfl_sync(~0u, ids, j % 32);
      const u32 dst = ring + (j % STAGES) * STAGE;
      const char* ksrc = k + block * k_block + (k_lane + offset * KROW);
      const char* vsrc = v + block * v_block + (v_lane + offset * VROW);
#pragma unroll
      for (int i = 0; i < KROW / 32; i++) {           // 16 rows of KROW / 16 pieces
        const int c = lane + 32 * i;
        copy16(dst + c / (KROW / 16) * KPITCH + c % (KROW / 16) * 16, ksrc + i * 512, c / (KROW / 16) < n ? 16 : 0);
      }
#pragma unroll
      for (int i = 0; i < VROW / 32; i++) {
        const int c = lane + 32 * i;
        copy16(dst + KBYTES + c / (VROW / 16) * VPITCH + c % (VROW / 16) * 16, vsrc + i * 512, c / (VROW / 16) < n ? 16 : 0);
      }
#if QUANTIZED
      if (lane < 8) copy16(dst + KBYTES + VBYTES + lane * 16, params_lane + block * params_block + offset * 4, 16);
#endif
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  auto open = [&](int number) {                       // an item: its first tiles are on their way
    const int slot = number / KV_HEADS;
    const int4 entry = load_int4(entries + slot);
    it.slot = slot; it.head = number % KV_HEADS; it.row = entry.x; it.split = entry.y; it.length = entry.w;
    it.begin = entry.y * entry.z; it.end = min(it.begin + entry.z, entry.w);
    it.splits = max(1, (entry.w + entry.z - 1) / entry.z);
    it.tiles = max(0, (it.end - it.begin + 15) >> 4);
    count = it.tiles > part ? (it.tiles - part + PARTS - 1) / PARTS : 0;
    if (it.length > 0) new_block = load_int(tables + (long long)it.row * table_stride + (it.length - 1) / S);
    k_lane = it.head * k_head + lane * 16; v_lane = it.head * v_head + lane * 16;
#if QUANTIZED
    params_lane = lane < 4 ? (const char*)(k_params + it.head * kp_head) + lane * 16 : (const char*)(v_params + it.head * vp_head) + (lane - 4) * 16;
#endif
    load_ids(0);
    for (int j = 0; j < STAGES; j++) fetch(j);
#if R
    if (lane < R / 4) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const long long at = (long long)it.row * (R / 2) + (INTERLEAVED ? (4 * lane + i) / 2 : (4 * lane + i) % (R / 2));
        cosine[i] = load_float(cosines + at); sine[i] = load_float(sines + at);
      }
    }
#endif
  };
  // The team's warp that has the last tile belongs to this block: it has the new token.
  auto has_new = [&] { return it.length > 0 && it.end == it.length && (it.tiles - 1) % PARTS / WARPS == rank; };
  auto load_row = [&] {
    const u16* x = qkv + (long long)it.row * row_stride + 4 * lane;
#pragma unroll
    for (int i = 0; i < JOBS; i++) {
      const int job = warp + i * WARPS;               // query heads, then the key, then the value
      const int vector = job < GROUP ? it.head * GROUP + job : HEADS + (job - GROUP) * KV_HEADS + it.head;
      row[i] = make_uint2(0, 0);
      if (job < GROUP + 2 && lane < D / 4) row[i] = load_four(x + (long long)vector * D);
    }
  };
  auto turn = [&](float (&x)[4], bool is_query) {     // norm and rotation, rounded to the model's type at each step
#if NORM
    const float root = rsqrtf(sum_of_warp(x[0] * x[0] + x[1] * x[1] + x[2] * x[2] + x[3] * x[3]) / (float)D + norm_eps);
    float weight[4];
    unpack(lane < D / 4 ? *(const uint2*)((is_query ? q_norm : k_norm) + 4 * lane) : make_uint2(0, 0), weight);
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = x[i] * root * (weight[i] + norm_offset);
    round_to_model(x);
#endif
#if R
    float y[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
#if INTERLEAVED
      y[i] = i % 2 ? x[i - 1] : -x[i + 1];
#else
      const float other = __shfl_sync(~0u, x[i], lane < R / 8 ? lane + R / 8 : lane - R / 8);
      y[i] = lane < R / 8 ? -other : other;
#endif
    }
    if (lane < R / 4) {
#pragma unroll
      for (int i = 0; i < 4; i++) x[i] = __fmaf_rn(x[i], cosine[i], __fmul_rn(y[i], sine[i]));
      round_to_model(x);
    }
#endif
  };
  auto prepare = [&] {                                // the new token's vectors, from registers to where they are needed
    const bool is_owner = has_new();
    const int offset = (it.length - 1) % S;
    const long long block = new_block;
#pragma unroll
    for (int i = 0; i < JOBS; i++) {
      const int job = warp + i * WARPS;
      if (job >= GROUP + 2 || (job >= GROUP && !is_owner)) break;
      float x[4];
      unpack(row[i], x);
#if CLIP
#pragma unroll
      for (int c = 0; c < 4; c++) x[c] = fminf(fmaxf(x[c], -clip), clip);
#endif
      if (job <= GROUP) {
        turn(x, job < GROUP);
#if LOGN
        if (job < GROUP) {
          const float growth = fmaxf(__logf((float)it.length) / log_length, 1.f);
#pragma unroll
          for (int c = 0; c < 4; c++) x[c] *= growth;
          round_to_model(x);
        }
#endif
        hadamard<KPIECE>(x, lane, KPIECE_SCALE);
      } else hadamard<VPIECE>(x, lane, VPIECE_SCALE);
      u32 params = 0;
      if (job < GROUP) {
        if (lane < D / 4) *(uint2*)(qs + job * QPITCH + 4 * lane) = make_uint2(two_computed(x[0], x[1]), two_computed(x[2], x[3]));
      } else if (job == GROUP) {
        const uint2 bytes = encode<KF>(x, lane, params);
        store_vector<KF>(fresh, bytes, lane);
        store_vector<KF>(k + block * k_block + (long long)it.head * k_head + offset * KROW, bytes, lane);
        if (KF && lane == 0) { fresh_params[0] = params; k_params[block * kp_block + (long long)it.head * kp_head + offset] = params; }
      } else {
        const uint2 bytes = encode<VF>(x, lane, params);
        store_vector<VF>(fresh + KROW, bytes, lane);
        store_vector<VF>(v + block * v_block + (long long)it.head * v_head + offset * VROW, bytes, lane);
        if (VF && lane == 0) { fresh_params[1] = params; v_params[block * vp_block + (long long)it.head * vp_head + offset] = params; }
      }
    }
  };

  open(item);
  WAIT_FOR_PREVIOUS();
  load_row();
  while (item < num_items) {
    prepare();
    __syncthreads();
    u32 qf[NT][STEPS][2];
    [[maybe_unused]] float qsum[NT][2], bias[NT][2];    // of each of this lane's two heads: sum(q), and what BASE adds
#pragma unroll
    for (int n = 0; n < NT; n++) {
      const u16* mine = qs + (n * 8 + g) * QPITCH;
      const bool is_head = n * 8 + g < GROUP;
      [[maybe_unused]] float sums_of[2] = {0.f, 0.f};
#pragma unroll
      for (int s = 0; s < STEPS; s++) {
        qf[n][s][0] = qf[n][s][1] = 0;
        if (is_head) fragment(mine, s, t, qf[n][s]);
#if KF
        sums_of[s % KF] += low(qf[n][s][0]) + low(qf[n][s][0] >> 16) + low(qf[n][s][1]) + low(qf[n][s][1] >> 16);
#endif
      }
#if KF
      float sum = sums_of[0] + 16.f * sums_of[1], based = BASE * (sums_of[0] + sums_of[1]);
      sum += __shfl_xor_sync(~0u, sum, 1); sum += __shfl_xor_sync(~0u, sum, 2);
      based += __shfl_xor_sync(~0u, based, 1); based += __shfl_xor_sync(~0u, based, 2);
      qsum[n][0] = __shfl_sync(~0u, sum, 8 * t); qsum[n][1] = __shfl_sync(~0u, sum, 8 * t + 4);
      bias[n][0] = __shfl_sync(~0u, based, 8 * t); bias[n][1] = __shfl_sync(~0u, based, 8 * t + 4);
#endif
    }
    float m[NT][2], mass[NT][2], zero[NT][2], acc[STEPS][NT][4];
#pragma unroll
    for (int n = 0; n < NT; n++) {
      m[n][0] = m[n][1] = -INFINITY_; mass[n][0] = mass[n][1] = zero[n][0] = zero[n][1] = 0.f;
#pragma unroll
      for (int s = 0; s < STEPS; s++) acc[s][n][0] = acc[s][n][1] = acc[s][n][2] = acc[s][n][3] = 0.f;
    }
    const bool patches = it.length > 0 && it.end == it.length && (it.tiles - 1) % PARTS == part;

#pragma unroll 1
    for (int j = 0; j < count; j++) {
      asm volatile("cp.async.wait_group %0;" :: "n"(STAGES - 1) : "memory");
      __syncwarp();
      const u32 at = ring + (j % STAGES) * STAGE, vat = at + KBYTES;
      if (patches && j == count - 1) {                // the new token's place in the last tile
        char* tile = smem + (warp * STAGES + j % STAGES) * STAGE;
        const int place = (it.length - 1 - it.begin) & 15;
        for (int c = lane; c < (KROW + VROW) / 16; c += 32) {
          const uint4 piece = *(const uint4*)(fresh + c * 16);
          *(uint4*)(c < KROW / 16 ? tile + place * KPITCH + c * 16 : tile + KBYTES + place * VPITCH + (c - KROW / 16) * 16) = piece;
        }
#if QUANTIZED
        if (lane < 2) *(u32*)(tile + KBYTES + VBYTES + lane * 64 + place * 4) = fresh_params[lane];
#endif
        __syncwarp();
      }
      float s[NT][4], odd[NT][4];                      // two chains of products
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int c = 0; c < 4; c++) { s[n][c] = KF ? -bias[n][c % 2] : 0.f; odd[n][c] = 0.f; }
#if KF == 0
#pragma unroll
      for (int step = 0; step < STEPS; step++) {
        u32 a[4];
        ldmatrix(at + (lane % 16) * KPITCH + step * 32 + (lane / 16) * 16, a);
#pragma unroll
        for (int n = 0; n < NT; n++) multiply(step % 2 ? odd[n] : s[n], a, qf[n][step][0], qf[n][step][1]);
      }
#elif KF == 1
#pragma unroll
      for (int h = 0; h < D / 64; h++) {
        u32 x[4], y[4];
        lds128(at + g * KPITCH + h * 64 + t * 16, x);
        lds128(at + (g + 8) * KPITCH + h * 64 + t * 16, y);
#pragma unroll
        for (int w = 0; w < 4; w++) {
          const u32 a[4] = {prmt(x[w], 0x64646464u, 0x4140), prmt(y[w], 0x64646464u, 0x4140),
                            prmt(x[w], 0x64646464u, 0x4342), prmt(y[w], 0x64646464u, 0x4342)};
#pragma unroll
          for (int n = 0; n < NT; n++) multiply(w % 2 ? odd[n] : s[n], a, qf[n][4 * h + w][0], qf[n][4 * h + w][1]);
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
        const u32 a[4] = {and_magic<0x000f000f>(x[w]), and_magic<0x000f000f>(y[w]), and_magic<0x000f000f>(x8), and_magic<0x000f000f>(y8)};
        const u32 b[4] = {and_magic<0x00f000f0>(x[w]), and_magic<0x00f000f0>(y[w]), and_magic<0x00f000f0>(x8), and_magic<0x00f000f0>(y8)};
#pragma unroll
        for (int n = 0; n < NT; n++) {
          multiply(s[n], a, qf[n][2 * w][0], qf[n][2 * w][1]);
          multiply(odd[n], b, qf[n][2 * w + 1][0], qf[n][2 * w + 1][1]);
        }
      }
#endif
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int c = 0; c < 4; c++) s[n][c] += odd[n][c];
      const int token = it.begin + (part + j * PARTS) * 16 + g;
      const bool sees[2] = {token < it.end, token + 8 < it.end};
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
        p[n][0] = transposed(pack16(e[0], e[1])); p[n][1] = transposed(pack16(e[2], e[3]));
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
        for (int n = 0; n < NT; n++) multiply(acc[step][n], a, p[n][0], p[n][1]);
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
          for (int n = 0; n < NT; n++) multiply(acc[2 * b + i][n], a, p[n][0], p[n][1]);
#else
          const u32 y0 = x[i] >> 8, y2 = x[2 + i] >> 8;
          const u32 a[4] = {minus_1024(and_magic<0x000f000f>(x[i])), minus_1024(and_magic<0x000f000f>(y0)),
                            minus_1024(and_magic<0x000f000f>(x[2 + i])), minus_1024(and_magic<0x000f000f>(y2))};
          const u32 c[4] = {sixteenth_minus_64(and_magic<0x00f000f0>(x[i])), sixteenth_minus_64(and_magic<0x00f000f0>(y0)),
                            sixteenth_minus_64(and_magic<0x00f000f0>(x[2 + i])), sixteenth_minus_64(and_magic<0x00f000f0>(y2))};
#pragma unroll
          for (int n = 0; n < NT; n++) {
            multiply(acc[2 * b + i][n], a, p[n][0], p[n][1]);
            multiply(acc[STEPS / 2 + 2 * b + i][n], c, p[n][0], p[n][1]);
          }
#endif
        }
      }
#endif
      __syncwarp();
      fetch(j + STAGES);
    }

    // ---- the next item's copies begin, then the team's warps meet in shared memory
    const Item done = it;
    item += gridDim.x / CL;
#if APART
    if (item < num_items) { open(item); load_row(); }
#else
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncthreads();
#endif
#if CL > 1
    if (is_first) TEAM_WAIT();                         // all blocks of the team have begun
    is_first = false;
#endif
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int c = 0; c < 2; c++) {
        const int h = n * 8 + 2 * t + c;
        float a = mass[n][c], b = zero[n][c];
        a += __shfl_xor_sync(~0u, a, 4); a += __shfl_xor_sync(~0u, a, 8); a += __shfl_xor_sync(~0u, a, 16);
        b += __shfl_xor_sync(~0u, b, 4); b += __shfl_xor_sync(~0u, b, 8); b += __shfl_xor_sync(~0u, b, 16);
        if (h < GROUP) {
          if (g == 0) {
            const u32 mark = in_block(smem_u32(&marks[h / CL][0][part]), h % CL);
            put(mark, m[n][c]); put(mark + 4 * PARTS, a); put(mark + 8 * PARTS, b);
          }
#pragma unroll
          for (int step = 0; step < STEPS; step++)
#pragma unroll
            for (int upper = 0; upper < 2; upper++) {
              const int d = VF ? step * 16 + 2 * g + upper : step * 16 + g + 8 * upper;
              sums[(warp * GROUP + h) * RPITCH + d] = acc[step][n][2 * upper + c];
            }
        }
      }
#if CL > 1                                             // each head's sums go to the block that adds them up
    __syncwarp();
#pragma unroll
    for (int h = 0; h < GROUP; h++)
      if (lane < D / 4)
        put4(in_block(smem_u32(parts + (part * SHARE + h / CL) * RPITCH + 4 * lane), h % CL),
             *(const float4*)(sums + (warp * GROUP + h) * RPITCH + 4 * lane));
#endif
    TEAM_SYNC();
    for (int i = warp; i < SHARE && i * CL + rank < GROUP; i += WARPS) {
      const int h = i * CL + rank;                     // a head for each warp, its elements as in `turn`
      const bool is_part = lane < PARTS;
      const float top = is_part ? marks[i][0][lane] : -INFINITY_;
      const float largest = max_of_warp(top), weight = top == -INFINITY_ ? 0.f : exp2_(top - largest);
      const float whole = sum_of_warp(is_part ? weight * marks[i][1][lane] : 0.f);
      const float offset = VF ? sum_of_warp(is_part ? weight * marks[i][2][lane] : 0.f) : 0.f;
      float x[4] = {offset, offset, offset, offset};
#pragma unroll
      for (int j = 0; j < PARTS; j++) {
        const float w = __shfl_sync(~0u, weight, j);
        if (lane < D / 4) {
          const float4 p = *(const float4*)(parts + (j * SHARE + i) * RPITCH + 4 * lane);
          x[0] += w * p.x; x[1] += w * p.y; x[2] += w * p.z; x[3] += w * p.w;
        }
      }
      const int q_head = done.head * GROUP + h;
      bool is_last = true;
      if (done.splits == 1) {
        const float share = whole > 0.f ? 1.f / whole : 0.f;
        x[0] *= share; x[1] *= share; x[2] *= share; x[3] *= share;
      } else {
        const long long mine = (long long)done.slot * HEADS + q_head;
        if (lane < D / 4) *(float4*)(partials + mine * D + 4 * lane) = make_float4(x[0], x[1], x[2], x[3]);
        if (lane == 0) stats[mine] = make_float2(largest, whole);
        __syncwarp();                                  // orders all lanes' stores before the count
        int before = 0;
        if (lane == 0) {
          int* counter = counters + done.row * HEADS + q_head;
          asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
          if (before == done.splits - 1) *counter = 0;
        }
        is_last = __shfl_sync(~0u, before, 0) == done.splits - 1;
        __syncwarp();
        if (is_last) {                                 // at most 32 splits: a lane each
          const long long first = mine - (long long)done.split * HEADS;
          float2 stat = make_float2(-INFINITY_, 0.f);
          if (lane < done.splits) stat = load_stat(stats + first + (long long)lane * HEADS);
          const float all = max_of_warp(stat.x), of_all = lane < done.splits ? exp2_(stat.x - all) : 0.f;
          const float mass_of_all = sum_of_warp(of_all * stat.y);
          const float share = mass_of_all > 0.f ? of_all / mass_of_all : 0.f;
          x[0] = x[1] = x[2] = x[3] = 0.f;
#pragma unroll 8
          for (int i = 0; i < done.splits; i++) {
            const float w = __shfl_sync(~0u, share, i);
            if (lane < D / 4) {
              const float4 p = load_part(partials + (first + (long long)i * HEADS) * D + 4 * lane);
              x[0] += w * p.x; x[1] += w * p.y; x[2] += w * p.z; x[3] += w * p.w;
            }
          }
        }
      }
      if (is_last) {
        hadamard<VPIECE>(x, lane, VPIECE_SCALE);       // back from the basis in which values are stored
        if (lane < D / 4)
          *(uint2*)(out + ((long long)done.row * HEADS + q_head) * D + 4 * lane) = make_uint2(pack16(x[0], x[1]), pack16(x[2], x[3]));
      }
    }
    if (item < num_items) {                            // the merge's memory is free for the next item
#if CL > 1 || !APART                                   // else the barrier after the next `prepare` says so
      TEAM_SYNC();
#endif
#if !APART
      open(item); load_row();
#endif
    }
  }
}
