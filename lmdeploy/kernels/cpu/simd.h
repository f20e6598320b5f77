// Sixteen-lane vectors under one set of names; the instruction set is fixed when this is compiled.
//
//   F  16 float32          I  16 int32          W  64 bytes: 16 rows x 4 weights, unsigned
//   Dot<BITS>  sixteen sums of products of unsigned BITS-bit weights and signed 8-bit activations, exact in 32 bits
//
// AVX-512 VNNI, AVX2 with FMA, else vector extensions that GCC and Clang lower to whatever the machine has.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace lm {

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float bf16_to_float(uint16_t half) { return bits_to_float(static_cast<uint32_t>(half) << 16); }

// Round to nearest even; a NaN stays one.
inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float f16_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // 2^112 moves the exponent from bias 15 to bias 127, for subnormal numbers as well.
  const float value = bits_to_float(magnitude << 13) * 5.192296858534828e33f;
  return bits_to_float(sign | float_to_bits(value));
}

inline int32_t load_i32(const void* p) {
  int32_t value;
  std::memcpy(&value, p, 4);
  return value;
}

}  // namespace lm

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && \
    defined(__AVX512VNNI__)
#include "simd_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif

namespace lm {

// e^x, clamped to |x| < 88: relative error 2e-7 plus 6e-8 |x|; -inf gives 1e-38.
inline F f_exp(F x) {
  const F t = f_mul(f_max(f_min(x, f_set(88.0f)), f_set(-87.33f)), f_set(1.44269504f));
  const F n = f_round(t);
  const F r = f_sub(t, n);
  F p = f_set(1.3267e-3f);  // 2^r for |r| <= 1/2, fitted at Chebyshev points
  p = f_fma(p, r, f_set(9.67546e-3f));
  p = f_fma(p, r, f_set(5.550743e-2f));
  p = f_fma(p, r, f_set(2.4022122e-1f));
  p = f_fma(p, r, f_set(6.9314695e-1f));
  p = f_fma(p, r, f_set(1.00000007f));
  return f_scale2(p, n);
}

inline F f_tanh(F x) {
  const F e = f_exp(f_add(x, x));
  return f_sub(f_set(1.0f), f_div(f_set(2.0f), f_add(e, f_set(1.0f))));
}

inline F f_silu(F x) { return f_div(x, f_add(f_set(1.0f), f_exp(f_sub(f_zero(), x)))); }

inline F f_gelu_tanh(F x) {
  const F cube = f_mul(f_mul(x, x), x);
  const F inner = f_mul(f_fma(cube, f_set(0.044715f), x), f_set(0.7978845608f));
  return f_mul(f_mul(x, f_set(0.5f)), f_add(f_set(1.0f), f_tanh(inner)));
}

// x/2 (1 + erf(x / sqrt 2)); erf by Abramowitz and Stegun 7.1.26, absolute error 1.5e-7.
inline F f_gelu(F x) {
  const F z = f_mul(f_abs(x), f_set(0.70710678f));
  const F t = f_div(f_set(1.0f), f_fma(z, f_set(0.3275911f), f_set(1.0f)));
  F p = f_set(1.061405429f);
  p = f_fma(p, t, f_set(-1.453152027f));
  p = f_fma(p, t, f_set(1.421413741f));
  p = f_fma(p, t, f_set(-0.284496736f));
  p = f_fma(p, t, f_set(0.254829592f));
  const F tail = f_mul(f_mul(p, t), f_exp(f_sub(f_zero(), f_mul(z, z))));  // 1 - erf(|z|)
  const F half = f_mul(f_set(0.5f), tail);
  const F phi = f_select_negative(x, half, f_sub(f_set(1.0f), half));
  return f_mul(x, phi);
}

enum DType : int { kF32 = 0, kBF16 = 1 };

inline F load_any(const void* p, int dtype, int64_t index) {
  return dtype == kBF16 ? f_load_bf16(static_cast<const uint16_t*>(p) + index)
                        : f_load(static_cast<const float*>(p) + index);
}

inline void store_any(void* p, int dtype, int64_t index, F value) {
  if (dtype == kBF16) {
    f_store_bf16(static_cast<uint16_t*>(p) + index, value);
  } else {
    f_store(static_cast<float*>(p) + index, value);
  }
}

inline float load_one(const void* p, int dtype, int64_t index) {
  return dtype == kBF16 ? bf16_to_float(static_cast<const uint16_t*>(p)[index]) : static_cast<const float*>(p)[index];
}

inline void store_one(void* p, int dtype, int64_t index, float value) {
  if (dtype == kBF16) {
    static_cast<uint16_t*>(p)[index] = float_to_bf16(value);
  } else {
    static_cast<float*>(p)[index] = value;
  }
}

}  // namespace lm
