// What follows a layer's attention, for one token, in one launch; W in 4 bits. sm_90 only. With h = x W_o^T + residual:
//   y = h + (activation(gate) * up) W_down^T,  gate | up = norm(h) W_gate_up^T,  and qkv = next_norm(y) W_qkv^T + bias
// of the layer behind.
//
// Compiled by NVRTC, one cubin per set of macros (functions that are not here are in common.cuh):
//   HEADS, HIDDEN, INNER   lengths of x, of h and y, of gate; multiples of 128     QKV   length of qkv, 0: there is none
//   GROUP 32..128 columns that share a scale               ZERO  1|0 an integer zero or a minimum per group
//   O_SLICES, GATE_UP_SLICES, DOWN_SLICES, QKV_SLICES      of K, for the order of sums
//   WARPS, FEEDERS         warps that multiply, 8; warps that fill their rings, as many each
//   FIRST_WORDS            of the exchange, for the count of launches
//   STAGES, UNITS_AT_ONCE  depth of each warp's ring; k-units of a stage: 2, or a multiple of 4
//   IN_FLIGHT              stages of a warp that are asked for and have not come
//   AHEAD, PACE            stages that are brought to L2 before the ring has room for them, and ns between two
//   BLOCKS                 of the launch, no more than run at once: they wait for each other
//   FP16  0|1     activations bf16 or fp16                 ACT   0 silu, 1 gelu, 2 gelu_tanh
//   NORM_OFFSET            added to a norm's weights
//
// Between launches memory is idle: a block has to end before the next one's ring fits, and copies at once delay everything
// that is small. Here the ring goes on through all products, and little is in flight: what is read in between comes fast.
//
// Packed weights are those of skinny_gemm.cu: [K/128][NT][UNIT bytes], a unit being 16 rows x 128 columns as A fragments of
// mma.m16n8k16, then scales and zeros. Each of the WARPS owns a run of k-units of all tiles of its block; FEEDERS more warps
// fill the rings.
//
// Arithmetic is that of DIGITS in common.cuh: a warp has an eighth of K. From its lane a unit's exact sum goes to float32 with
// scale, zero and power.
//
// Between products numbers pass through words of 32 bits whose upper half is the launch's tag: who reads a word with that tag
// has the number, without any barrier. `exchange` is the tag's count [FIRST_WORDS], then h, act(gate) * up, and y.
#define DIGITS
#include "common.cuh"

static_assert(WARPS == EIGHTHS, "a warp has an eighth of K");
#define FED (WARPS / FEEDERS)                  // warps that one of them feeds
#define THREADS (WARPS * 32)                   // of those that multiply
#define SYNC() asm volatile("bar.sync 1, %0;" :: "n"(THREADS) : "memory")
#define ASKING ((FED * UNITS_AT_ONCE == 32 ? 0u : 1u << (FED * UNITS_AT_ONCE % 32)) - 1)      // lanes of a feeding warp
#define UNIT (1024 + 64 * GROUPS)
#define STAGE_BYTES (UNITS_AT_ONCE * UNIT)
#define RING_BYTES (WARPS * STAGES * STAGE_BYTES)
#define PRODUCTS (QKV ? 4 : 3)

template <int COLS, int ROWS, int SIDES_, int SLICES_> struct Product {
  static constexpr int SLICES = SLICES_;
  static constexpr int UNITS = COLS / 128, SIDES = SIDES_, TILES = ROWS / 16;              // of y: with gates and ups, pairs
  static constexpr int U = (UNITS + WARPS - 1) / WARPS, SETS = (U + 3) / 4;                // of a warp; some have one unit less
  static constexpr int PARTS = (U + UNITS_AT_ONCE - 1) / UNITS_AT_ONCE;                    // stages of a tile
  static constexpr bool EVEN = UNITS % WARPS == 0;
  static constexpr int MOST = (TILES + BLOCKS - 1) / BLOCKS;                               // tiles of a block
  static __device__ __forceinline__ int first_tile() { return (int)(blockIdx.x * TILES / BLOCKS); }
  static __device__ __forceinline__ int tiles() { return (int)((blockIdx.x + 1) * TILES / BLOCKS) - first_tile(); }
  static __device__ __forceinline__ int first_unit(int warp) { return warp * UNITS / WARPS; }
  static __device__ __forceinline__ int units(int warp) { return EVEN ? U : first_unit(warp + 1) - first_unit(warp); }
};
using O = Product<HEADS, HIDDEN, 1, O_SLICES>;
using GateUp = Product<HIDDEN, INNER, 2, GATE_UP_SLICES>;
using Down = Product<INNER, HIDDEN, 1, DOWN_SLICES>;
using Qkv = Product<HIDDEN, QKV, 1, QKV_SLICES>;

// ---- Feeding. A stage of a warp is some of its k-units of one tile; stages follow each other through all products.
struct Place {
  int product, tile, part, stage;      // gates and ups are two tiles, one after the other
  template <class P> __device__ __forceinline__ int units(int warp) const { return max(0, min(UNITS_AT_ONCE, P::units(warp) - part * UNITS_AT_ONCE)); }
  template <class P> __device__ __forceinline__ const char* source(const char* w, int warp, int unit) const {
    const long long row = P::first_unit(warp) + part * UNITS_AT_ONCE + unit;
    return w + (row * (P::TILES * P::SIDES) + tile % P::SIDES * P::TILES + P::first_tile() + tile / P::SIDES) * UNIT;
  }
  template <class P> __device__ __forceinline__ void advance() {
    stage++;
    if (++part == P::PARTS) { part = 0; if (++tile == P::tiles() * P::SIDES) { tile = 0; product++; } }
  }
};
struct Weights { const char *o, *gate_up, *down, *qkv; };
struct Copy {      // to a slot of the ring
  int warp, unit; u32 bar, to; u64 policy;
  template <class P> __device__ __forceinline__ void run(Place& at, const char* w) {
    const int units = at.units<P>(warp);
    if (unit == 0) expect(bar, units * UNIT);
    __syncwarp(ASKING);
    if (unit < units) bulk_copy(to, at.source<P>(w, warp, unit), UNIT, bar, policy);
    at.advance<P>();
  }
};
struct Prefetch {      // to L2
  int warp, unit;
  template <class P> __device__ __forceinline__ void run(Place& at, const char* w) {
    if (unit < at.units<P>(warp)) asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" :: "l"(at.source<P>(w, warp, unit)), "n"(UNIT) : "memory");
    at.advance<P>();
  }
};
// Do it with the stage at this place, after passing over products of which the block has no tile; false behind the last.
template <class Work> __device__ __forceinline__ bool visit(Place& at, const Weights& w, Work& work) {
  for (; at.product < PRODUCTS; at.product++) {
    if (at.product == 0) { if (O::tiles()) { work.template run<O>(at, w.o); return true; } }
    else if (at.product == 1) { if (GateUp::tiles()) { work.template run<GateUp>(at, w.gate_up); return true; } }
    else if (at.product == 2) { if (Down::tiles()) { work.template run<Down>(at, w.down); return true; } }
    else if (Qkv::tiles()) { work.template run<Qkv>(at, w.qkv); return true; }
  }
  return false;
}
__device__ __forceinline__ bool is_done(u32 bar, u32 parity) {
  u32 done; asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}" : "=r"(done) : "r"(bar), "r"(parity) : "memory"); return done; }
__device__ __forceinline__ u32 now_ns() { u32 t; asm volatile("mov.u32 %0, %globaltimer_lo;" : "=r"(t)); return t; }
// By a warp's first FED * UNITS_AT_ONCE lanes: one for each k-unit of a stage of the warps that it feeds.
__device__ __forceinline__ void feed(const Weights& w, u32 ring, u32 bars, int first_warp, int lane) {
  Copy copy; copy.warp = first_warp + lane / UNITS_AT_ONCE; copy.unit = lane % UNITS_AT_ONCE; copy.policy = evict_first();
  Prefetch prefetch = {copy.warp, copy.unit};
  ring += copy.warp * (STAGES * STAGE_BYTES) + copy.unit * UNIT; bars += copy.warp * (16 * STAGES);
  Place at = {0, 0, 0, 0}, far = at;
  int slot = 0, oldest = 0, in_flight = 0; u32 empty_parity = 1, oldest_parity = 0, last = now_ns();      // all slots are empty
  while (at.product < PRODUCTS) {
    if (in_flight == IN_FLIGHT) {
      wait(bars + 8 * oldest, oldest_parity);
      in_flight--;
      if (++oldest == STAGES) { oldest = 0; oldest_parity ^= 1; }
    }
    while (!__all_sync(ASKING, is_done(bars + 8 * (STAGES + slot), empty_parity))) {
      if (far.stage < at.stage) far = at;
      const u32 now = __shfl_sync(ASKING, now_ns(), 0);
      if (far.stage - at.stage < AHEAD && now - last > PACE) { last = now; visit(far, w, prefetch); }
    }
    copy.bar = bars + 8 * slot; copy.to = ring + slot * STAGE_BYTES;
    if (!visit(at, w, copy)) break;
    in_flight++;
    if (++slot == STAGES) { slot = 0; empty_parity ^= 1; }
  }
}

// ---- Multiplying
struct Warp { int id, lane; u32 ring, bars; int slot; u32 parity; };      // bars: of slots that are full, then of empty ones

__device__ __forceinline__ bool is_old(uint4 v, u32 tag) { return ((v.x ^ tag) | (v.y ^ tag) | (v.z ^ tag) | (v.w ^ tag)) >> 16; }

// Of a unit's 128 columns this lane's, 4 times 8 in a row: from words with the tag, waiting for them, or from 16-bit numbers.
__device__ __forceinline__ void load(const u32* x, u32 tag, bool has, float (&f)[4][8]) {
  bool is_late;
  while (__any_sync(~0u, has && is_old(ldg128(x), tag)));      // those that come first are as many as need be asked for again and again
  do {
    is_late = false;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const uint4 v = has ? ldg128(x + i / 2 * 32 + i % 2 * 4) : make_uint4(tag, tag, tag, tag);
      is_late |= is_old(v, tag);
      float* to = &f[i / 2][i % 2 * 4];
      to[0] = lo(v.x); to[1] = lo(v.y); to[2] = lo(v.z); to[3] = lo(v.w);
    }
  } while (__any_sync(~0u, is_late));
}
__device__ __forceinline__ void load(const u16* x, u32, bool has, float (&f)[4][8]) { load(x, has, f); }
// Sums over this warp's columns go to partial[warp][tile][side][16]. gamma: a norm's weights, else null. Returns, in all lanes,
// the sum of the squares of this warp's columns of x, if there is a norm.
template <class P, bool NORM, class Number> __device__ __forceinline__ float multiply(Warp& warp, const Number* x, u32 tag, const u16* gamma, float* partial) {
  const int lane = warp.lane, g = lane >> 2, t = lane & 3, units = P::units(warp.id);
  u32 xs[P::SETS][8];
  float power[P::SETS], squared = 0.f;      // power: of unit t of a set, as are these:
  int sums[P::SETS][GROUPS];                // of a group's columns of x
#pragma unroll
  for (int b = 0; b < P::SETS; b++) {
    const int unit = b * 4 + g / 2, column = (P::first_unit(warp.id) + unit) * 128 + t * 8;
    float f[4][8];
    load(x + column, tag, unit < units, f);
    if (NORM) squared += times_norm(gamma + column, unit < units, f);
    power[b] = __shfl_sync(~0u, to_digits(f, g % 2, xs[b]), t * 8);
    sum_groups(xs[b], sums[b]);
  }
  const int count = P::tiles() * P::SIDES;
#pragma unroll 1
  for (int tile = 0; tile < count; tile++) {
    float acc[2] = {0.f, 0.f};      // rows g and g + 8
#pragma unroll
    for (int part = 0; part < P::PARTS; part++) {
      const int begin = part * UNITS_AT_ONCE, end = min(begin + UNITS_AT_ONCE, P::U), last = (P::EVEN ? end : min(end, units)) - 1;
      const u32 at = warp.ring + warp.slot * STAGE_BYTES;
      wait(warp.bars + 8 * warp.slot, warp.parity);
#pragma unroll
      for (int b = begin / 4; b <= (end - 1) / 4; b++) {
        int keep[GROUPS][2];
#pragma unroll
        for (int p = 0; p < GROUPS; p++) keep[p][0] = keep[p][1] = 0;
#pragma unroll
        for (int n = 0; n < 4; n++) {
          const int unit = b * 4 + n;
          if (unit < begin || unit >= end || (!P::EVEN && unit > last)) continue;
          const u32 from = at + (unit - begin) * UNIT + lane * 16;
          const uint4 q0 = lds128(from), q1 = lds128(from + 512);
          const u32 q[8] = {q0.x, q0.y, q0.z, q0.w, q1.x, q1.y, q1.z, q1.w};
          int d[GROUPS][4];
#pragma unroll
          for (int p = 0; p < GROUPS; p++) d[p][0] = d[p][1] = d[p][2] = d[p][3] = 0;
#pragma unroll
          for (int s = 0; s < 4; s++)
            mma_bytes(d[s * GROUPS / 4], q[2 * s] & 0x0f0f0f0fu, q[2 * s] & 0xf0f0f0f0u, q[2 * s + 1] & 0x0f0f0f0fu, q[2 * s + 1] & 0xf0f0f0f0u,
                      xs[b][2 * s], xs[b][2 * s + 1]);
#pragma unroll
          for (int p = 0; p < GROUPS; p++)
#pragma unroll
            for (int h = 0; h < 2; h++) keep[p][h] = t == n ? d[p][2 * h] * 256 + d[p][2 * h + 1] : keep[p][h];
        }
        // Each lane of a quad has a unit, and takes the sum of those before it from the lane that had them.
        const int unit = b * 4 + t;
        const bool is_mine = unit >= begin && unit <= last;
        const u32 entries = at + (is_mine ? unit - begin : 0) * UNIT + 1024 + g * 4;
        float scale[GROUPS][2], minimum[GROUPS][2], number[GROUPS][2];
#pragma unroll
        for (int p = 0; p < GROUPS; p++)
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const u32 entry = lds32(entries + p * 64 + h * 32);
            scale[p][h] = is_mine ? half2f(entry) * (h ? power[b] * 0.0625f : power[b]) : 0.f;
            minimum[p][h] = !ZERO && is_mine ? half2f(entry >> 16) * power[b] : 0.f;
            number[p][h] = (float)(ZERO ? keep[p][h] - (int)(entry >> 16) * (h ? sums[b][p] * 16 : sums[b][p]) : keep[p][h]);
          }
#pragma unroll
        for (int n = 0; n < 4; n++) {
          if (b * 4 + n < begin || b * 4 + n >= end) continue;
#pragma unroll
          for (int h = 0; h < 2; h++) {
            float next = acc[h];
#pragma unroll
            for (int p = 0; p < GROUPS; p++) {
              next = fmaf(scale[p][h], number[p][h], next);
              if (!ZERO) next = fmaf(minimum[p][h], (float)sums[b][p], next);
            }
            acc[h] = __shfl_sync(~0u, next, (lane & 28) | n);
          }
        }
      }
      __syncwarp();
      if (lane == 0) arrive(warp.bars + 8 * (STAGES + warp.slot));
      if (++warp.slot == STAGES) { warp.slot = 0; warp.parity ^= 1; }
    }
    if (t < 2) partial[(warp.id * P::MOST * P::SIDES + tile) * 16 + g + 8 * t] = t ? acc[1] : acc[0];
  }
  return NORM ? 0.5f * sum_of_warp(squared) : 0.f;      // two lanes have each column
}
// Of a row of the block's, a thread each: the sum over all warps.
template <class P> __device__ __forceinline__ float total(const float* partial, int row, int side = 0) {
  float value = 0.f;
#pragma unroll
  for (int slice = 0; slice < P::SLICES; slice++) {
    float sum = 0.f;
#pragma unroll
    for (int k = slice * WARPS / P::SLICES; k < (slice + 1) * WARPS / P::SLICES; k++) sum += partial[((k * P::MOST + row / 16) * P::SIDES + side) * 16 + row % 16];
    value += sum;
  }
  return value;
}
__device__ __forceinline__ void give(u32* to, u16 value, u32 tag) { asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" :: "l"(to), "r"((u32)value | tag) : "memory"); }

extern "C" __global__ void __launch_bounds__(512, 1)      // fewer, but attention's registers must fit beside these
layer_tail(const char* w_o, const char* w_gate_up, const char* w_down, const char* w_qkv, const u16* x, const u16* residual, u16* y, u16* qkv,
           const u16* __restrict__ gamma, const u16* __restrict__ next_gamma, const u16* __restrict__ bias, u32* exchange, float eps) {
  extern __shared__ __align__(128) char smem[];
  __shared__ __align__(8) u64 bars[WARPS * STAGES * 2];
  __shared__ float squares[2][WARPS];
  const int tid = threadIdx.x;
  for (int i = tid; i < WARPS * STAGES * 2; i += THREADS + 32 * FEEDERS) init(smem_u32(bars + i), 1);
  fence_inits();
  __syncthreads();
  NEXT_MAY_START();
  if (tid >= THREADS) {
    if (tid % 32 < FED * UNITS_AT_ONCE) feed({w_o, w_gate_up, w_down, w_qkv}, smem_u32(smem), smem_u32(bars), (tid - THREADS) / 32 * FED, tid % 32);
    return;
  }
  float* const partial = (float*)(smem + RING_BYTES);
  Warp warp;
  warp.id = tid / 32; warp.lane = tid % 32; warp.slot = 0; warp.parity = 0;
  warp.ring = smem_u32(smem) + warp.id * (STAGES * STAGE_BYTES); warp.bars = smem_u32(bars) + warp.id * (16 * STAGES);
  u32 *const h_at = exchange + FIRST_WORDS, *const inner_at = h_at + HIDDEN, *const y_at = inner_at + INNER;
  WAIT_FOR_PREVIOUS();
  const u32 launch = ldg32((const u16*)exchange), tag = launch << 16;

  // A thread has the same row of o and of down.
  const int row = O::first_tile() * 16 + tid;
  const bool has_row = tid < O::tiles() * 16;
  const float before = has_row ? from16(ldg16(residual + row)) : 0.f;
  multiply<O, false>(warp, x, 0, nullptr, partial);
  SYNC();
  u16 h = 0;
  if (has_row) give(h_at + row, h = to16(before + total<O>(partial, tid)), tag);
  SYNC();

  float squared = multiply<GateUp, true>(warp, h_at, tag, gamma, partial);
  if (warp.lane == 0) squares[0][warp.id] = squared;
  SYNC();
  if (tid < GateUp::tiles() * 16) {
    const float scale = one_over_rms(squares[0], HIDDEN, eps);
    give(inner_at + GateUp::first_tile() * 16 + tid, to16(activation(__fmul_rn(scale, total<GateUp>(partial, tid, 0))) * __fmul_rn(scale, total<GateUp>(partial, tid, 1))), tag);
  }
  SYNC();

  multiply<Down, false>(warp, inner_at, tag, nullptr, partial);
  SYNC();
  if (blockIdx.x == 0 && tid == 0) *exchange = launch + 1;      // all blocks have read it: of each there is a part of what came
  if (has_row) {
    const u16 out = to16(from16(h) + total<Down>(partial, tid));
    y[row] = out;
    if (QKV) give(y_at + row, out, tag);
  }
#if QKV
  SYNC();
  squared = multiply<Qkv, true>(warp, y_at, tag, next_gamma, partial);
  if (warp.lane == 0) squares[1][warp.id] = squared;
  SYNC();
  if (tid < Qkv::tiles() * 16) {
    const int column = Qkv::first_tile() * 16 + tid;
    qkv[column] = to16(fmaf(one_over_rms(squares[1], HIDDEN, eps), total<Qkv>(partial, tid), bias ? from16(bias[column]) : 0.f));
  }
#endif
}
