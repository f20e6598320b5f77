// Causal attention of many new tokens per request over the blocked cache: softmax(q k^T) v, for Hopper (sm_90a).
//
// The new tokens are the last of their context. Compiled by NVRTC, one cubin per set of macros (functions that are not here
// are in common.cuh):
//   D          elements of a head: 64 or 128           HEADS, KV_HEADS
//   WGS        warpgroups that compute, 64 queries each
//   S          tokens of a block                       BOX        tokens of one tensor copy: divides S and 128
//   STAGES     tiles of the ring                       FP16  0|1  all of them bf16 or fp16
//
// Structure (FlashAttention-3, https://arxiv.org/abs/2407.08608): a persistent block per SM. The first warpgroup gives its
// registers away and moves data: warp 0 copies tiles of 128 keys or values into one ring in the order in which they are
// used (K0 K1 V0 K2 V1 ...), warp 1 draws the next tile of queries from a counter, warp 2 copies its queries. Each of the other
// warpgroups holds S[64, 128] and O[64, D] in registers: Q K^T from shared memory, P from registers times V. Within a
// warpgroup the product Q K^T of the next tile runs while this one's softmax is computed; named barriers order the
// warpgroups so that one's softmax hides behind the other's products.
// Tiles are 128 bytes wide (64 elements) with the 128-byte swizzle, so a tile of D = 128 has two halves. K is the wgmma's
// K-major operand, V its MN-major one; both lie as the cache has them.
// Keys are walked from the last tile to the first: only the first ones need a mask. A request's tiles are drawn the longest
// first, heads of one key-value head beside each other. Every sum has an order of its own that nothing else changes.
#include "common.cuh"
template <bool B> struct Flag { static constexpr bool value = B; };

#define BN 128                                  // keys of a tile
#define HALVES (D / 64)
#define QUERIES 64                              // of a warpgroup
#define TILE_QUERIES (QUERIES * WGS)
#define Q_BYTES (64 * HALVES * 128)             // of a warpgroup
#define KV_BYTES (BN * HALVES * 128)
#define O_BYTES (64 * HALVES * 128)
#define THREADS (128 * (WGS + 1))
#define GROUP (HEADS / KV_HEADS)
#define COPIES (BN / BOX * HALVES)
#define L2_BYTES (24 << 20)                     // of keys and values that blocks walk at one time
#define MINUS_INFINITY __int_as_float(0xff800000)

// Shared memory, from a multiple of 1024: queries, ring, outputs, barriers, drawn tiles.
#define RING_AT (WGS * Q_BYTES)
#define OUT_AT (RING_AT + STAGES * KV_BYTES)
#define BARS_AT (OUT_AT + WGS * O_BYTES)
#define FULL(s) (bars + 8 * (s))
#define EMPTY(s) (bars + 8 * (STAGES + (s)))
#define Q_FULL(w) (bars + 8 * (2 * STAGES + (w)))
#define Q_EMPTY(w) (bars + 8 * (2 * STAGES + WGS + (w)))
#define TILE_FULL(n) (bars + 8 * (2 * STAGES + 2 * WGS + (n)))
#define TILE_EMPTY(n) (bars + 8 * (2 * STAGES + 2 * WGS + 2 + (n)))
#define NUM_BARS (2 * STAGES + 2 * WGS + 4)
#define DRAWN_AT (BARS_AT + (NUM_BARS * 8 + 31) / 32 * 32)

__device__ __forceinline__ void copy4(u32 dst, const TensorMap* map, u32 bar, int x, int y, int z, int w) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3,%4,%5,%6}], [%2];"
               :: "r"(dst), "l"(map), "r"(bar), "r"(x), "r"(y), "r"(z), "r"(w) : "memory"); }
__device__ __forceinline__ void copy3(u32 dst, const TensorMap* map, u32 bar, int x, int y, int z) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3,%4,%5}], [%2];"
               :: "r"(dst), "l"(map), "r"(bar), "r"(x), "r"(y), "r"(z) : "memory"); }
__device__ __forceinline__ void named_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" :: "r"(id), "r"(threads) : "memory"); }
__device__ __forceinline__ void named_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" :: "r"(id), "r"(threads) : "memory"); }

// ---- wgmma. Operands of a descriptor: address, bytes between halves (MN-major only), 1024 between groups of 8 rows, swizzle.
__device__ __forceinline__ u64 described(u32 address, u32 halves_apart) {
  return (u64)((address & 0x3ffff) >> 4) | (u64)(halves_apart >> 4) << 16 | (u64)(1024 >> 4) << 32 | 1ull << 62; }
// The registers are operands so that nothing reads them any earlier.
template <int LEFT, int N> __device__ __forceinline__ void wgmma_wait(float (&d)[N]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(LEFT) : "memory");
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i]) :: "memory");
}

#define F8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define F32(d, i) F8(d, i), F8(d, i + 8), F8(d, i + 16), F8(d, i + 24)
#define NAMES_32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define NAMES_64 NAMES_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47" \
                          ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

// S[64, 128] (+)= A[64, 16] B[128, 16]^T, both in shared memory.
__device__ __forceinline__ void wgmma_qk(float (&s)[64], u64 a, u64 b, int add) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32." TY "." TY
               " {" NAMES_64 "}, %64, %65, p, 1, 1, 0, 0;}" : F32(s, 0), F32(s, 32) : "l"(a), "l"(b), "r"(add)); }

// O[64, D] (+)= A[64, 16] B[16, D], A in registers.
__device__ __forceinline__ void wgmma_pv(float (&o)[D / 2], u32 a0, u32 a1, u32 a2, u32 a3, u64 b, int add) {
#if D == 128
  asm volatile("{.reg .pred p; setp.ne.b32 p, %69, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32." TY "." TY
               " {" NAMES_64 "}, {%64,%65,%66,%67}, %68, p, 1, 1, 1;}" : F32(o, 0), F32(o, 32)
#else
  asm volatile("{.reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." TY "." TY
               " {" NAMES_32 "}, {%32,%33,%34,%35}, %36, p, 1, 1, 1;}" : F32(o, 0)
#endif
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(add)); }

// A drawn tile of queries of one head of one request; queries = 0: there is none any more.
struct Drawn {
  int first_row, queries, position, context_len;   // position of the first query
  int head, request, pad[2];
};

__device__ __forceinline__ int last_tile(const Drawn& d) { return (min(d.context_len, d.position + TILE_QUERIES) - 1) / BN; }

__device__ __forceinline__ Drawn read_drawn(u32 at) {
  Drawn d;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(d.first_row), "=r"(d.queries), "=r"(d.position), "=r"(d.context_len) : "r"(at));
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(d.head), "=r"(d.request), "=r"(d.pad[0]), "=r"(d.pad[1]) : "r"(at + 16));
  return d;
}
__device__ __forceinline__ void write_drawn(u32 at, const Drawn& d) {
  asm volatile("st.shared.v4.u32 [%4], {%0,%1,%2,%3};" :: "r"(d.first_row), "r"(d.queries), "r"(d.position), "r"(d.context_len), "r"(at) : "memory");
  asm volatile("st.shared.v4.u32 [%4], {%0,%1,%2,%3};" :: "r"(d.head), "r"(d.request), "r"(0), "r"(0), "r"(at + 16) : "memory");
}
// The number-th drawn tile, by every thread of a warp.
__device__ __forceinline__ Drawn next_drawn(u32 smem, int number) {
  const u32 bars = smem + BARS_AT;
  wait_in_loop(TILE_FULL(number & 1), number >> 1 & 1);
  const Drawn d = read_drawn(smem + DRAWN_AT + 32 * (number & 1));
  __syncwarp();
  if (threadIdx.x % 32 == 0) arrive(TILE_EMPTY(number & 1));
  return d;
}

__device__ __forceinline__ void draw_tiles(u32 smem, int* counters, const int* starts_q,
                                           const int* context_lens, int batch) {
  const u32 bars = smem + BARS_AT;
  const int lane = threadIdx.x % 32;
  int first_request = -32, tiles_before = 0, total = 0;   // of the 32 requests that the lanes hold
  int row = 0, q_len = 0, context_len = 0, upto = 0;
  for (int number = 0;; number++) {
    int tile = blockIdx.x;
    if (number) {
      if (lane == 0) tile = gridDim.x + atomicAdd(counters, 1);
      tile = __shfl_sync(~0u, tile, 0);
    }
    while (tile >= tiles_before + total && first_request + 32 < batch) {
      tiles_before += total;
      first_request += 32;
      const int request = first_request + lane;
      row = request < batch ? starts_q[request] : 0;
      q_len = request < batch ? starts_q[request + 1] - row : 0;
      context_len = request < batch ? context_lens[request] : 0;
      upto = (q_len + TILE_QUERIES - 1) / TILE_QUERIES * HEADS;
#pragma unroll
      for (int apart = 1; apart < 32; apart *= 2) {
        const int other = __shfl_up_sync(~0u, upto, apart);
        upto += lane >= apart ? other : 0;
      }
      total = __shfl_sync(~0u, upto, 31);
    }
    Drawn d = {};
    if (tile < tiles_before + total) {
      const int owner = __ffs(__ballot_sync(~0u, tile < tiles_before + upto)) - 1;
      d.request = first_request + owner;
      d.context_len = __shfl_sync(~0u, context_len, owner);
      const int length = __shfl_sync(~0u, q_len, owner), count = (length + TILE_QUERIES - 1) / TILE_QUERIES;
      const int left = tile - tiles_before - __shfl_sync(~0u, upto, owner) + count * HEADS;
      // As many key-value heads at one time as L2 holds; of those, the longest tiles of all heads first.
      const int width = max(1, min(KV_HEADS, L2_BYTES / (d.context_len * D * 4)));
      const int section = left / (width * GROUP * count), inside = left - section * (width * GROUP * count);
      const int heads = min(width, KV_HEADS - section * width) * GROUP;
      const int query = (count - 1 - inside / heads) * TILE_QUERIES;
      d.head = section * width * GROUP + inside % heads;
      d.first_row = __shfl_sync(~0u, row, owner) + query;
      d.queries = min(TILE_QUERIES, length - query);
      d.position = d.context_len - length + query;
    }
    if (number > 1) wait_in_loop(TILE_EMPTY(number & 1), (number >> 1 & 1) ^ 1);
    if (lane == 0) {
      write_drawn(smem + DRAWN_AT + 32 * (number & 1), d);
      arrive(TILE_FULL(number & 1));
    }
    if (!d.queries) break;
  }
  if (lane == 0) {   // the last block leaves the counters as it found them
    __threadfence();
    if (atomicAdd(counters + 1, 1) == (int)gridDim.x - 1) counters[0] = counters[1] = 0;
  }
}

__device__ __forceinline__ void copy_queries(u32 smem, const TensorMap* map) {
  const u32 bars = smem + BARS_AT;
  for (int number = 0;; number++) {
    const Drawn d = next_drawn(smem, number);
    if (!d.queries) break;
#pragma unroll 1
    for (int w = 0; w < WGS; w++) {
      wait_in_loop(Q_EMPTY(w), number & 1 ^ 1);
      if (threadIdx.x % 32 == 0) {
        expect(Q_FULL(w), Q_BYTES);
        for (int half = 0; half < HALVES; half++)
          copy3(smem + w * Q_BYTES + half * 64 * 128, map, Q_FULL(w), half * 64, d.head, d.first_row + w * QUERIES);
      }
      __syncwarp();
    }
  }
}

__device__ __forceinline__ void copy_tiles(u32 smem, const TensorMap* k_map, const TensorMap* v_map, const int* tables,
                                           int table_stride, int num_blocks) {
  const u32 bars = smem + BARS_AT;
  const int lane = threadIdx.x % 32;
  const int box = lane / HALVES * BOX, half = lane % HALVES;   // this lane's copy of a tile
  const u32 target = smem + RING_AT + half * BN * 128 + box * 128;
  int slot = 0;
  u32 parity = 1;
  for (int number = 0;; number++) {
    const Drawn d = next_drawn(smem, number);
    if (!d.queries) break;
    const int kv_head = d.head / GROUP, last = last_tile(d);
    const int* table = tables + (long long)d.request * table_stride;
    auto block_of = [&](int j) {                             // behind the context a block that is not there, read as zeros
      const int token = j * BN + box;
      return lane < COPIES && token < d.context_len ? table[token / S] : num_blocks; };
    auto copy = [&](const TensorMap* map, int j, int block) {
      wait_in_loop(EMPTY(slot), parity);
      if (lane == 0) expect(FULL(slot), KV_BYTES);
      __syncwarp();
      if (lane < COPIES) copy4(target + slot * KV_BYTES, map, FULL(slot), half * 64, (j * BN + box) % S, kv_head, block);
      if (++slot == STAGES) slot = 0, parity ^= 1;
    };
    int block = block_of(last), before = last > 0 ? block_of(last - 1) : 0;
    copy(k_map, last, block);
#pragma unroll 1
    for (int j = last - 1; j >= 0; j--) {
      const int next = j > 0 ? block_of(j - 1) : 0;
      copy(k_map, j, before);
      copy(v_map, j + 1, block);
      block = before, before = next;
    }
    copy(v_map, 0, block);
  }
}

__device__ __forceinline__ void store_output(u32 smem, const float (&o)[D / 2], float scale0, float scale1, const Drawn& d,
                                             int w, u16* out) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const u32 mine = smem + OUT_AT + w * O_BYTES + warp * 16 * HALVES * 128;
  const int put_row = lane % 16;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < D / 8; i += 2) {
    const u32 at = mine + put_row * HALVES * 128 + (((i + lane / 16) ^ (put_row & 7)) << 4);
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};"
                 :: "r"(at), "r"(pack16(o[4 * i] * scale0, o[4 * i + 1] * scale0)),
                    "r"(pack16(o[4 * i + 2] * scale1, o[4 * i + 3] * scale1)),
                    "r"(pack16(o[4 * i + 4] * scale0, o[4 * i + 5] * scale0)),
                    "r"(pack16(o[4 * i + 6] * scale1, o[4 * i + 7] * scale1)) : "memory");
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < D / 16; i++) {
    const int row = (i * 32 + lane) / (D / 8), chunk = (i * 32 + lane) % (D / 8);
    const int query = w * QUERIES + warp * 16 + row;
    u32 v[4];
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(mine + row * HALVES * 128 + ((chunk ^ (row & 7)) << 4)));
    if (query < d.queries) {
      u16* to = out + ((long long)(d.first_row + query) * HEADS + d.head) * D + chunk * 8;
      asm volatile("st.global.v4.u32 [%4], {%0,%1,%2,%3};" :: "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]), "l"(to) : "memory");
    }
  }
}

__device__ __forceinline__ void compute(u32 smem, int w, u16* out, float scale) {
  const u32 bars = smem + BARS_AT;
  const int lane = threadIdx.x % 32, thread = threadIdx.x % 128;
  const int row = thread / 32 * 16 + lane / 4;               // and row + 8
  const int query0 = w * QUERIES + row, query1 = query0 + 8;
  const u64 q_desc = described(smem + w * Q_BYTES, 0);
  const u64 k_desc = described(smem + RING_AT, 0), v_desc = described(smem + RING_AT, BN * 128);
  int slot = 0;
  u32 parity = 0;
  if (w == WGS - 1) named_arrive(1, 256);                    // warpgroup 0 may begin
  float s[BN / 2], o[D / 2];
  u32 p[BN / 4];

  for (int number = 0;; number++) {
    const Drawn d = next_drawn(smem, number);
    if (!d.queries) break;
    const int last = last_tile(d);
    const int position = d.position + w * QUERIES;           // of the warpgroup's first query
    const int limit0 = min(d.position + query0, d.context_len - 1), limit1 = min(d.position + query1, d.context_len - 1);
    float max0 = MINUS_INFINITY, max1 = MINUS_INFINITY, mass0 = 0.0f, mass1 = 0.0f, shrink0 = 1.0f, shrink1 = 1.0f;

    auto advance = [&] { if (++slot == STAGES) slot = 0, parity ^= 1; };
    auto release = [&](int which) { if (lane == 0) arrive(EMPTY(which)); };
    auto multiply_qk = [&] {
      const u64 at = k_desc + slot * (KV_BYTES >> 4);
#pragma unroll
      for (int i = 0; i < D / 16; i++)
        wgmma_qk(s, q_desc + (i / 4 * (64 * 128) + i % 4 * 32 >> 4), at + (i / 4 * (BN * 128) + i % 4 * 32 >> 4), i != 0);
      wgmma_commit();
    };
    auto multiply_pv = [&](int add) {
      const u64 at = v_desc + slot * (KV_BYTES >> 4);
#pragma unroll
      for (int i = 0; i < BN / 16; i++)
        wgmma_pv(o, p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3], at + i * (16 * 128 >> 4), i != 0 || add);
      wgmma_commit();
    };
    auto mask = [&](int j) {
#pragma unroll
      for (int i = 0; i < BN / 2; i++) {
        const int key = j * BN + i / 4 * 8 + lane % 4 * 2 + i % 2, limit = i & 2 ? limit1 : limit0;
        s[i] = key > limit ? MINUS_INFINITY : s[i];
      }
    };
    // s becomes 2^(scale (s - max)); how much what was summed before shrinks.
    auto softmax = [&](auto masked) {
      float top0 = max0, top1 = max1;
#pragma unroll
      for (int i = 0; i < BN / 2; i += 4) {
        top0 = fmaxf(top0, fmaxf(s[i], s[i + 1]));
        top1 = fmaxf(top1, fmaxf(s[i + 2], s[i + 3]));
      }
      top0 = fmaxf(top0, __shfl_xor_sync(~0u, top0, 1));
      top1 = fmaxf(top1, __shfl_xor_sync(~0u, top1, 1));
      top0 = fmaxf(top0, __shfl_xor_sync(~0u, top0, 2));
      top1 = fmaxf(top1, __shfl_xor_sync(~0u, top1, 2));
      // A row of which nothing is visible yet keeps -inf, and -inf minus itself is NaN.
      const float base0 = decltype(masked)::value && top0 == MINUS_INFINITY ? 0.0f : top0 * scale;
      const float base1 = decltype(masked)::value && top1 == MINUS_INFINITY ? 0.0f : top1 * scale;
      shrink0 = exp2_(max0 * scale - base0);
      shrink1 = exp2_(max1 * scale - base1);
      max0 = top0, max1 = top1;
      mass0 *= shrink0, mass1 *= shrink1;
#pragma unroll
      for (int i = 0; i < BN / 2; i += 4) {
        s[i] = exp2_(s[i] * scale - base0), s[i + 1] = exp2_(s[i + 1] * scale - base0);
        s[i + 2] = exp2_(s[i + 2] * scale - base1), s[i + 3] = exp2_(s[i + 3] * scale - base1);
        mass0 += s[i] + s[i + 1];
        mass1 += s[i + 2] + s[i + 3];
      }
    };
    auto pack = [&] {
#pragma unroll
      for (int i = 0; i < BN / 4; i++) p[i] = pack16(s[2 * i], s[2 * i + 1]);
    };

    wait_in_loop(Q_FULL(w), number & 1);
    wait_in_loop(FULL(slot), parity);
    wgmma_fence();
    multiply_qk();
    wgmma_wait<0>(s);
    release(slot);
    if (lane == 0 && !last) arrive(Q_EMPTY(w));
    advance();
    mask(last);
    softmax(Flag<true>());
    pack();
    if ((last + 1) * BN > d.context_len) {
      // What lies behind the context was never written: it must not meet a probability of 0 as NaN.
      const int values = (slot + (last > 0)) % STAGES;
      wait_in_loop(FULL(values), parity ^ (slot + (last > 0) >= STAGES));
      for (int i = (d.context_len - last * BN) * 8 + thread; i < BN * 8; i += 128)
        for (int half = 0; half < HALVES; half++)
          asm volatile("st.shared.v4.u32 [%0], {%1,%1,%1,%1};"
                       :: "r"(smem + RING_AT + values * KV_BYTES + half * BN * 128 + i * 16), "r"(0) : "memory");
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      named_sync(8 + w, 128);
    }

    auto step = [&](int j, auto masked) {
      const int keys = slot;
      wait_in_loop(FULL(slot), parity);
      named_sync(1 + w, 256);
      wgmma_fence();
      multiply_qk();
      advance();
      const int values = slot;
      wait_in_loop(FULL(slot), parity);
      wgmma_fence();
      multiply_pv(j + 1 != last);
      named_arrive(1 + (w + 1) % WGS, 256);
      advance();
      wgmma_wait<1>(s);
      release(keys);
      if (j == 0 && lane == 0) arrive(Q_EMPTY(w));
      if (decltype(masked)::value) mask(j);
      softmax(masked);
      wgmma_wait<0>(o);
      release(values);
      pack();
#pragma unroll
      for (int i = 0; i < D / 2; i += 4) o[i] *= shrink0, o[i + 1] *= shrink0, o[i + 2] *= shrink1, o[i + 3] *= shrink1;
    };
    int j = last - 1;
#pragma unroll 1
    for (; j >= 0 && j * BN + BN - 1 > position; j--) step(j, Flag<true>());
#pragma unroll 1
    for (; j >= 0; j--) step(j, Flag<false>());
    wait_in_loop(FULL(slot), parity);
    wgmma_fence();
    multiply_pv(last != 0);
    mass0 += __shfl_xor_sync(~0u, mass0, 1);
    mass1 += __shfl_xor_sync(~0u, mass1, 1);
    mass0 += __shfl_xor_sync(~0u, mass0, 2);
    mass1 += __shfl_xor_sync(~0u, mass1, 2);
    wgmma_wait<0>(o);
    release(slot);
    advance();
    store_output(smem, o, 1.0f / mass0, 1.0f / mass1, d, w, out);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
prefill_attention(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                  const __grid_constant__ TensorMap v_map, u16* out, const int* starts_q,
                  const int* context_lens, const int* tables, int* counters, int batch, int table_stride, int num_blocks,
                  float scale_log2) {
  extern __shared__ char raw[];
  const u32 smem = (smem_u32(raw) + 1023) & ~1023u, bars = smem + BARS_AT;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) init(FULL(i), 1), init(EMPTY(i), 4 * WGS);
    for (int i = 0; i < WGS; i++) init(Q_FULL(i), 1), init(Q_EMPTY(i), 4);
    for (int i = 0; i < 2; i++) init(TILE_FULL(i), 1), init(TILE_EMPTY(i), 4 * WGS + 2);
    fence_inits();
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncthreads();
  if (threadIdx.x < 128) {
#if WGS == 2
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
#else
    asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
#endif
    const int warp = threadIdx.x / 32;
    if (warp == 0) copy_tiles(smem, &k_map, &v_map, tables, table_stride, num_blocks);
    else if (warp == 1) draw_tiles(smem, counters, starts_q, context_lens, batch);
    else if (warp == 2) copy_queries(smem, &q_map);
  } else {
#if WGS == 2
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
#else
    asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
#endif
    // Read from one lane it is known to be the same in a warp: descriptors then live in uniform registers.
    compute(smem, __shfl_sync(~0u, threadIdx.x / 128 - 1, 0), out, scale_log2);
  }
}
