// Products of 4 and 8-bit affine weights with activations quantized to 8 bits on the way.
//
// Weight (w = q * scale + minimum, or (q - zero) * scale):
//   q     4 bits: [N/16][K/8][16 rows][4 bytes], low nibbles k .. k+3, high nibbles k+4 .. k+7
//         8 bits: [N/16][K/4][16 rows][4 bytes]
//   meta  [N/16][K/group]{ scale[16], then nothing | minimum[16] | zero[16] }, float16 or float32, zeros one byte each
// Activations: int8 with one scale per token and min(group, 32) channels, in blocks of up to kMaxRows tokens:
//   q [K/4][rows][4], scale [K/32][rows], and what the weight's offset needs per token and channel group, [K/32][rows]:
//   -zero * sum(q) as int32 for a constant zero, scale * sum(q) as float32 for the others.
// So the integer part of a dot product is exact and each token's result depends on nothing but that token.
#pragma once

#include "simd.h"

namespace lm {

enum Aux : int32_t { kConstantZero = 0, kMinimum = 1, kZeroByte = 2 };

// The layout is mirrored by ctypes in packed.py.
struct Weight {
  const uint8_t* q;
  const uint8_t* meta;
  int64_t n, k;
  int64_t groups, meta_stride;  // k / group, bytes of meta per group of a tile
  int32_t group, bits, scale_is_f32, aux, zero, reserved;

  int64_t tiles() const { return (n + 15) / 16; }
  int act_group() const { return group < 32 ? group : 32; }
  int acts_per_group() const { return group <= 32 ? 1 : group >> 5; }
  int64_t act_groups() const { return groups * acts_per_group(); }
  const uint8_t* tile_q(int64_t tile) const { return q + tile * (bits * 2 * k); }
  const uint8_t* tile_meta(int64_t tile) const { return meta + tile * groups * meta_stride; }
};

// Quantized activations of up to `capacity` tokens.
struct Activations {
  int8_t* q;
  float* scale;
  int32_t* offset;  // int32 or the bits of a float32
  int64_t k, groups;

  static size_t bytes(int64_t tokens, const Weight& w) {
    return static_cast<size_t>(tokens * (w.k + 8 * w.act_groups()) + 256);
  }
  Activations(void* memory, int64_t tokens, const Weight& w) : k(w.k), groups(w.act_groups()) {
    q = static_cast<int8_t*>(memory);
    scale = reinterpret_cast<float*>(q + (tokens * k + 63) / 64 * 64);
    offset = reinterpret_cast<int32_t*>(scale + (tokens * groups + 15) / 16 * 16);
  }
  const int8_t* block_q(int64_t first) const { return q + first * k; }
  const float* block_scale(int64_t first) const { return scale + first * groups; }
  const int32_t* block_offset(int64_t first) const { return offset + first * groups; }
};

// Tokens of a chunk are cut into blocks of kMaxRows and a rest of at most three blocks of 8, 4, 2 or 1.
inline int block_rows(int64_t left) {
  if (left >= kMaxRows) return kMaxRows;
  return left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

// Quantize one group (16 or 32 channels in values[]) of the token at `row` of a block of `rows` tokens.
template <int VECTORS>
inline void quantize_group(const F* values, const Weight& w, int8_t* q, float* scale, int32_t* offset, int rows) {
  F largest = f_abs(values[0]);
  if (VECTORS == 2) largest = f_max(largest, f_abs(values[1]));
  const float peak = f_largest(largest);
  const F inverse = f_set(peak > 0.0f ? 127.0f / peak : 0.0f);
  const float step = peak / 127.0f;
  alignas(64) int8_t bytes[16 * VECTORS];
  I total = i_zero();
  for (int v = 0; v < VECTORS; v++) {
    const I rounded = i_round(f_mul(values[v], inverse));
    i_store_i8(bytes + 16 * v, rounded);
    total = i_add(total, rounded);
  }
  for (int i = 0; i < 4 * VECTORS; i++) std::memcpy(q + i * rows * 4, bytes + i * 4, 4);
  *scale = step;
  const int32_t sum = i_sum(total);
  if (w.aux == kConstantZero) {
    *offset = -w.zero * sum;
  } else {
    const float part = step * static_cast<float>(sum);
    std::memcpy(offset, &part, 4);
  }
}

inline void quantize_group(const F* values, const Weight& w, int8_t* q, float* scale, int32_t* offset, int rows) {
  if (w.act_group() == 32) {
    quantize_group<2>(values, w, q, scale, offset, rows);
  } else {
    quantize_group<1>(values, w, q, scale, offset, rows);
  }
}

inline void load_meta(const uint8_t* p, const Weight& w, F& scale, F& minimum) {
  if (w.scale_is_f32) {
    const float* f = reinterpret_cast<const float*>(p);
    scale = f_load(f);
    if (w.aux == kMinimum) minimum = f_load(f + 16);
    if (w.aux == kZeroByte) minimum = f_sub(f_zero(), f_mul(scale, f_load_u8(p + 64)));
  } else {
    const uint16_t* h = reinterpret_cast<const uint16_t*>(p);
    scale = f_load_f16(h);
    if (w.aux == kMinimum) minimum = f_load_f16(h + 16);
    if (w.aux == kZeroByte) minimum = f_sub(f_zero(), f_mul(scale, f_load_u8(p + 32)));
  }
}

// out[rows][16] = 16 weight rows of one tile times `rows` tokens of one block.
using TileKernel = void (*)(const Weight& w, int64_t tile, const int8_t* q, const float* scale, const int32_t* offset,
                            float* out);
TileKernel tile_kernel(const Weight& w, int rows);

}  // namespace lm
