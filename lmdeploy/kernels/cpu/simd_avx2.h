// AVX2 with FMA and F16C: a sixteen-lane vector is two registers.
#pragma once

#include <immintrin.h>

namespace lm {

constexpr bool kHasBF16Dot = false;
#if defined(__AVXVNNI__)
inline const char* instruction_set_name() { return "avx2-vnni"; }
#else
inline const char* instruction_set_name() { return "avx2"; }
#endif
constexpr int kMaxRows = 4;
constexpr int kMacRows = 3;
constexpr int kMacVectors = 2;

struct F { __m256 a, b; };
struct I { __m256i a, b; };
struct W { __m256i a, b; };

inline F f_zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F f_set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F f_load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void f_store(float* p, F x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
inline __m256 half_from_bf16(const uint16_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline F f_load_bf16(const uint16_t* p) { return {half_from_bf16(p), half_from_bf16(p + 8)}; }
inline F f_load_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline F f_load_u8(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)))};
}
inline __m256i half_to_bf16(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
}
inline void f_store_bf16(uint16_t* p, F x) {
  const __m256i packed = _mm256_packus_epi32(half_to_bf16(x.a), half_to_bf16(x.b));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}
inline F f_add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F f_sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F f_mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F f_div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F f_fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline F f_max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline F f_min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline F f_abs(F x) {
  const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  return {_mm256_and_ps(x.a, mask), _mm256_and_ps(x.b, mask)};
}
inline F f_round(F x) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
}
inline __m256 half_scale2(__m256 x, __m256 n) {
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(x, _mm256_castsi256_ps(power));
}
inline F f_scale2(F x, F n) { return {half_scale2(x.a, n.a), half_scale2(x.b, n.b)}; }
inline float f_sum(F x) {
  const __m256 s = _mm256_add_ps(x.a, x.b);
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
inline float f_largest(F x) {
  const __m256 s = _mm256_max_ps(x.a, x.b);
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_shuffle_ps(q, q, 1)));
}
inline void f_sum4(float* out, F x, F y, F z, F w) {
  const __m256 xy = _mm256_hadd_ps(_mm256_add_ps(x.a, x.b), _mm256_add_ps(y.a, y.b));
  const __m256 zw = _mm256_hadd_ps(_mm256_add_ps(z.a, z.b), _mm256_add_ps(w.a, w.b));
  const __m256 all = _mm256_hadd_ps(xy, zw);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}
inline F f_select_negative(F test, F yes, F no) {
  return {_mm256_blendv_ps(no.a, yes.a, test.a), _mm256_blendv_ps(no.b, yes.b, test.b)};
}
inline __m256 half_keep(__m256 x, int low, int high, __m256 y, int first) {
  const __m256i lane = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(first));
  const __m256i inside = _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(low), lane),
                                             _mm256_cmpgt_epi32(_mm256_set1_epi32(high), lane));
  return _mm256_blendv_ps(y, x, _mm256_castsi256_ps(inside));
}
inline F f_keep(F x, int low, int high, F y) {
  return {half_keep(x.a, low, high, y.a, 0), half_keep(x.b, low, high, y.b, 8)};
}

inline F f_from(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline I i_round(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
inline I i_add(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline I i_zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline I i_set(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline int32_t i_sum(I x) {
  const __m256i s = _mm256_add_epi32(x.a, x.b);
  __m128i q = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
  q = _mm_add_epi32(q, _mm_shuffle_epi32(q, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(q, _mm_shuffle_epi32(q, 0xb1)));
}
inline void i_store_i8(int8_t* p, I x) {
  __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

inline W w_load(const uint8_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
inline W w_low(W x) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
inline W w_high(W x) { return w_low({_mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)}); }

#if defined(__AVXVNNI__)
template <int BITS>
struct Dot {
  __m256i a, b;
  void start(int32_t value) { a = b = _mm256_set1_epi32(value); }
  void add(W w, const int32_t* activation) {
    const __m256i x = _mm256_set1_epi32(*activation);
    a = _mm256_dpbusd_avx_epi32(a, w.a, x);
    b = _mm256_dpbusd_avx_epi32(b, w.b, x);
  }
  I total() const { return {a, b}; }
};
#else
// Sums of pairs stay in 16 bits for the eight steps of a group: 8 * 2 * 15 * 127 = 30480.
template <int BITS>
struct Dot {
  __m256i a, b;
  int32_t first;
  void start(int32_t value) { a = b = _mm256_setzero_si256(), first = value; }
  void add(W w, const int32_t* activation) {
    const __m256i x = _mm256_set1_epi32(*activation);
    a = _mm256_add_epi16(a, _mm256_maddubs_epi16(w.a, x));
    b = _mm256_add_epi16(b, _mm256_maddubs_epi16(w.b, x));
  }
  I total() const {
    const __m256i ones = _mm256_set1_epi16(1), z = _mm256_set1_epi32(first);
    return {_mm256_add_epi32(_mm256_madd_epi16(a, ones), z), _mm256_add_epi32(_mm256_madd_epi16(b, ones), z)};
  }
};
// Eight bits as two nibbles, each of which cannot overflow.
template <>
struct Dot<8> {
  Dot<4> low, high;
  void start(int32_t value) { low.start(value), high.start(0); }
  void add(W w, const int32_t* activation) { low.add(w_low(w), activation), high.add(w_high(w), activation); }
  I total() const {
    const I x = low.total(), y = high.total();
    return {_mm256_add_epi32(x.a, _mm256_slli_epi32(y.a, 4)), _mm256_add_epi32(x.b, _mm256_slli_epi32(y.b, 4))};
  }
};
#endif

struct MacF32 {
  static F mac(F acc, const uint32_t* b, const uint32_t* a) {
    return f_fma(f_load(reinterpret_cast<const float*>(b)), f_set(bits_to_float(*a)), acc);
  }
};

inline void transpose_words(const uint32_t* const* rows, uint32_t* out) {
  for (int column = 0; column < 16; column++)
    for (int row = 0; row < 16; row++) out[column * 16 + row] = rows[row][column];
}

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
inline void pause() { _mm_pause(); }

}  // namespace lm
