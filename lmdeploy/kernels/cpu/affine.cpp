// The inner loop: integer dot products of a weight tile and a block of tokens, scaled group by group.
#include "affine.h"

namespace lm {
namespace {

// One token moves through the weights at the memory's speed and the hardware runs ahead by itself; with more tokens
// the reads are too far apart for it.
constexpr int kPrefetchBytes = 1024;

// One activation group: STEPS times four channels.
template <int BITS, int STEPS, int ROWS>
inline void dot_group(const uint8_t*& wq, const int32_t*& aq, Dot<BITS>* dot) {
  if constexpr (BITS == 4) {
#pragma GCC unroll 4
    for (int step = 0; step < STEPS; step += 2) {
      const W both = w_load(wq);
      if constexpr (ROWS >= 4) prefetch(wq + kPrefetchBytes);
      const W low = w_low(both), high = w_high(both);
      wq += 64;
#pragma GCC unroll 16
      for (int row = 0; row < ROWS; row++) dot[row].add(low, aq + row);
#pragma GCC unroll 16
      for (int row = 0; row < ROWS; row++) dot[row].add(high, aq + ROWS + row);
      aq += 2 * ROWS;
    }
  } else {
#pragma GCC unroll 8
    for (int step = 0; step < STEPS; step++) {
      const W w = w_load(wq);
      if constexpr (ROWS >= 4) prefetch(wq + kPrefetchBytes);
      wq += 64;
#pragma GCC unroll 16
      for (int row = 0; row < ROWS; row++) dot[row].add(w, aq + row);
      aq += ROWS;
    }
  }
}

template <int BITS, int STEPS, bool CONSTANT_ZERO, int ROWS>
void multiply_tile(const Weight& weight, int64_t tile, const int8_t* q, const float* scale, const int32_t* offset,
                   float* out) {
  const Weight w = weight;
  const uint8_t* wq = w.tile_q(tile);
  const uint8_t* meta = w.tile_meta(tile);
  const int64_t meta_stride = w.meta_stride;
  const int32_t* aq = reinterpret_cast<const int32_t*>(q);
  const int acts_per_group = w.acts_per_group();
  F acc[ROWS];
  for (int row = 0; row < ROWS; row++) acc[row] = f_zero();
  for (int64_t group = w.groups; group > 0; group--) {
    F weight_scale, minimum = f_zero();
    load_meta(meta, w, weight_scale, minimum);
    if constexpr (ROWS >= 4) prefetch(meta + 4 * meta_stride);
    meta += meta_stride;
    for (int part = 0; part < acts_per_group; part++) {
      Dot<BITS> dot[ROWS];
#pragma GCC unroll 16
      for (int row = 0; row < ROWS; row++) dot[row].start(CONSTANT_ZERO ? offset[row] : 0);
      dot_group<BITS, STEPS, ROWS>(wq, aq, dot);
#pragma GCC unroll 16
      for (int row = 0; row < ROWS; row++) {
        const F scaled = f_mul(f_from(dot[row].total()), f_set(scale[row]));
        acc[row] = f_fma(scaled, weight_scale, acc[row]);
        if constexpr (!CONSTANT_ZERO) acc[row] = f_fma(minimum, f_set(bits_to_float(offset[row])), acc[row]);
      }
      scale += ROWS;
      offset += ROWS;
    }
  }
  for (int row = 0; row < ROWS; row++) f_store(out + row * 16, acc[row]);
}

template <int BITS, int STEPS, bool CONSTANT_ZERO>
TileKernel pick_rows(int rows) {
  switch (rows) {
    case 1: return multiply_tile<BITS, STEPS, CONSTANT_ZERO, 1>;
    case 2: return multiply_tile<BITS, STEPS, CONSTANT_ZERO, 2>;
    case 4: return multiply_tile<BITS, STEPS, CONSTANT_ZERO, 4>;
    case 8: return multiply_tile<BITS, STEPS, CONSTANT_ZERO, kMaxRows < 8 ? 1 : 8>;
    default: return multiply_tile<BITS, STEPS, CONSTANT_ZERO, kMaxRows>;
  }
}

template <int BITS, int STEPS>
TileKernel pick_zero(const Weight& w, int rows) {
  return w.aux == kConstantZero ? pick_rows<BITS, STEPS, true>(rows) : pick_rows<BITS, STEPS, false>(rows);
}

}  // namespace

TileKernel tile_kernel(const Weight& w, int rows) {
  if (w.bits == 4) return w.group < 32 ? pick_zero<4, 4>(w, rows) : pick_zero<4, 8>(w, rows);
  return w.group < 32 ? pick_zero<8, 4>(w, rows) : pick_zero<8, 8>(w, rows);
}

}  // namespace lm
