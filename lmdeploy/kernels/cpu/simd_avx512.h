// AVX-512 with VNNI, and BF16 where the machine has it.
#pragma once

#include <immintrin.h>

namespace lm {

#if defined(__AVX512BF16__)
constexpr bool kHasBF16Dot = true;
inline const char* instruction_set_name() { return "avx512-vnni-bf16"; }
#else
constexpr bool kHasBF16Dot = false;
inline const char* instruction_set_name() { return "avx512-vnni"; }
#endif
constexpr int kMaxRows = 12;     // activation rows of one tile kernel: 12 integer and 12 float accumulators of 32 registers
constexpr int kMacRows = 6;      // register tile of the attention products: 6 x 4 vectors
constexpr int kMacVectors = 4;

struct F { __m512 v; };
struct I { __m512i v; };
struct W { __m512i v; };

inline F f_zero() { return {_mm512_setzero_ps()}; }
inline F f_set(float x) { return {_mm512_set1_ps(x)}; }
inline F f_load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void f_store(float* p, F x) { _mm512_storeu_ps(p, x.v); }
inline F f_load_bf16(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline F f_load_f16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline F f_load_u8(const uint8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline void f_store_bf16(uint16_t* p, F x) {
#if defined(__AVX512BF16__)
  const __m256i half = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x.v));
#else
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  const __m256i half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#endif
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
}
inline F f_add(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F f_sub(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F f_mul(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F f_div(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F f_fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F f_max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F f_min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F f_abs(F a) { return {_mm512_abs_ps(a.v)}; }
inline F f_round(F a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline F f_scale2(F a, F n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline float f_sum(F a) { return _mm512_reduce_add_ps(a.v); }
inline float f_largest(F a) { return _mm512_reduce_max_ps(a.v); }
// out[0..3] = the sums of a, b, c, d
inline void f_sum4(float* out, F a, F b, F c, F d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
  const __m512d ab2 = _mm512_castps_pd(ab), cd2 = _mm512_castps_pd(cd);
  const __m512 all = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab2, cd2)),
                                   _mm512_castpd_ps(_mm512_unpackhi_pd(ab2, cd2)));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
inline F f_select_negative(F test, F yes, F no) {
  return {_mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(test.v)), no.v, yes.v)};
}
// Lanes low <= lane < high of a, the others from b.
inline F f_keep(F a, int low, int high, F b) {
  const uint32_t below_high = high >= 16 ? 0xffffu : high <= 0 ? 0u : (1u << high) - 1u;
  const uint32_t below_low = low >= 16 ? 0xffffu : low <= 0 ? 0u : (1u << low) - 1u;
  return {_mm512_mask_blend_ps(static_cast<__mmask16>(below_high & ~below_low), b.v, a.v)};
}

inline F f_from(I a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline I i_round(F a) { return {_mm512_cvtps_epi32(a.v)}; }
inline I i_add(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline I i_zero() { return {_mm512_setzero_si512()}; }
inline I i_set(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline int32_t i_sum(I a) { return _mm512_reduce_add_epi32(a.v); }
inline void i_store_i8(int8_t* p, I a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v)); }

inline W w_load(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline W w_low(W a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
inline W w_high(W a) { return {_mm512_and_si512(_mm512_srli_epi16(a.v, 4), _mm512_set1_epi8(15))}; }

template <int BITS>
struct Dot {
  __m512i sum;
  void start(int32_t value) { sum = _mm512_set1_epi32(value); }
  void add(W w, const int32_t* activation) { sum = _mm512_dpbusd_epi32(sum, w.v, _mm512_set1_epi32(*activation)); }
  I total() const { return {sum}; }
};

// acc + b * (the 32 bits at a in every lane), as one float32 product or as two bfloat16 ones.
struct MacF32 {
  static F mac(F acc, const uint32_t* b, const uint32_t* a) {
    return {_mm512_fmadd_ps(_mm512_loadu_ps(b), _mm512_set1_ps(bits_to_float(*a)), acc.v)};
  }
};
#if defined(__AVX512BF16__)
struct MacBF16 {
  static F mac(F acc, const uint32_t* b, const uint32_t* a) {
    return {_mm512_dpbf16_ps(acc.v, reinterpret_cast<__m512bh>(_mm512_loadu_si512(b)),
                             reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int32_t>(*a))))};
  }
};
// acc + products of 32 pairs of bfloat16, summed by twos.
inline F f_dot_bf16(F acc, const uint16_t* a, const uint16_t* b) {
  return {_mm512_dpbf16_ps(acc.v, reinterpret_cast<__m512bh>(_mm512_loadu_si512(a)),
                           reinterpret_cast<__m512bh>(_mm512_loadu_si512(b)))};
}
#endif

// out[column * 16 + row] = rows[row][column] for 16 rows of 16 words.
inline void transpose_words(const uint32_t* const* rows, uint32_t* out) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(rows[i]);
  for (int i = 0; i < 8; i++) {
    b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {  // a[4 i + j]: column 4 l + j of rows 4 i .. 4 i + 3 in 128-bit lane l
    a[4 * i] = _mm512_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 1] = _mm512_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 2] = _mm512_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
    a[4 * i + 3] = _mm512_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
  }
  for (int j = 0; j < 4; j++) {
    const __m512i even01 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88), odd01 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
    const __m512i even23 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
    const __m512i odd23 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
    _mm512_storeu_si512(out + 16 * j, _mm512_shuffle_i32x4(even01, even23, 0x88));
    _mm512_storeu_si512(out + 16 * (4 + j), _mm512_shuffle_i32x4(odd01, odd23, 0x88));
    _mm512_storeu_si512(out + 16 * (8 + j), _mm512_shuffle_i32x4(even01, even23, 0xdd));
    _mm512_storeu_si512(out + 16 * (12 + j), _mm512_shuffle_i32x4(odd01, odd23, 0xdd));
  }
}

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
inline void pause() { _mm_pause(); }

}  // namespace lm
