// Vector extensions of GCC and Clang: correct on any machine, as fast as the compiler makes them.
#pragma once

namespace lm {

constexpr bool kHasBF16Dot = false;
inline const char* instruction_set_name() { return "portable"; }
constexpr int kMaxRows = 4;
constexpr int kMacRows = 2;
constexpr int kMacVectors = 2;

typedef float F __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef uint32_t W __attribute__((vector_size(64)));
typedef uint16_t H __attribute__((vector_size(32)));
typedef uint8_t B __attribute__((vector_size(16)));

template <class V>
inline V v_load(const void* p) {
  V value;
  std::memcpy(&value, p, sizeof(V));
  return value;
}
inline I i_bits(F x) { return reinterpret_cast<I>(x); }
inline F f_bits(I x) { return reinterpret_cast<F>(x); }
inline F f_pick(I mask, F yes, F no) { return f_bits((mask & i_bits(yes)) | (~mask & i_bits(no))); }

inline F f_zero() { return F{}; }
inline F f_set(float x) { return x - F{}; }
inline F f_load(const float* p) { return v_load<F>(p); }
inline void f_store(float* p, F x) { std::memcpy(p, &x, 64); }
inline F f_load_bf16(const uint16_t* p) { return f_bits(__builtin_convertvector(v_load<H>(p), I) << 16); }
inline F f_load_f16(const uint16_t* p) {
  F value;
  for (int i = 0; i < 16; i++) value[i] = f16_to_float(p[i]);
  return value;
}
inline F f_load_u8(const uint8_t* p) { return __builtin_convertvector(v_load<B>(p), F); }
inline void f_store_bf16(uint16_t* p, F x) {
  const W bits = reinterpret_cast<W>(x);
  const I nan = x != x;
  const W rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const W kept = (reinterpret_cast<W>(nan) & (bits | 0x400000u)) | (~reinterpret_cast<W>(nan) & rounded);
  const H half = __builtin_convertvector(kept >> 16, H);
  std::memcpy(p, &half, 32);
}
inline F f_add(F a, F b) { return a + b; }
inline F f_sub(F a, F b) { return a - b; }
inline F f_mul(F a, F b) { return a * b; }
inline F f_div(F a, F b) { return a / b; }
inline F f_fma(F a, F b, F c) { return a * b + c; }
inline F f_max(F a, F b) { return f_pick(a > b, a, b); }
inline F f_min(F a, F b) { return f_pick(a < b, a, b); }
inline F f_abs(F a) { return f_bits(i_bits(a) & 0x7fffffff); }
// Adding 1.5 * 2^23 rounds to nearest even for |a| < 2^22; all callers stay far below.
inline F f_round(F a) {
  const float magic = 12582912.0f;
  return (a + magic) - magic;
}
inline I i_round(F a) { return __builtin_convertvector(f_round(a), I); }
inline F f_scale2(F a, F n) { return a * f_bits((__builtin_convertvector(n, I) + 127) << 23); }
inline float f_sum(F a) {
  float total = 0.0f;
  for (int i = 0; i < 16; i++) total += a[i];
  return total;
}
inline float f_largest(F a) {
  float largest = a[0];
  for (int i = 1; i < 16; i++) largest = a[i] > largest ? a[i] : largest;
  return largest;
}
inline void f_sum4(float* out, F a, F b, F c, F d) {
  out[0] = f_sum(a), out[1] = f_sum(b), out[2] = f_sum(c), out[3] = f_sum(d);
}
inline F f_select_negative(F test, F yes, F no) { return f_pick(test < 0.0f, yes, no); }
inline F f_keep(F a, int low, int high, F b) {
  const I lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return f_pick((lane >= low) & (lane < high), a, b);
}

inline F f_from(I a) { return __builtin_convertvector(a, F); }
inline I i_add(I a, I b) { return a + b; }
inline I i_zero() { return I{}; }
inline I i_set(int32_t x) { return x - I{}; }
inline int32_t i_sum(I a) {
  int32_t total = 0;
  for (int i = 0; i < 16; i++) total += a[i];
  return total;
}
inline void i_store_i8(int8_t* p, I a) {
  for (int i = 0; i < 16; i++) p[i] = static_cast<int8_t>(a[i]);
}

inline W w_load(const uint8_t* p) { return v_load<W>(p); }
inline W w_low(W a) { return a & 0x0f0f0f0fu; }
inline W w_high(W a) { return (a >> 4) & 0x0f0f0f0fu; }

template <int BITS>
struct Dot {
  I sum;
  void start(int32_t value) { sum = i_set(value); }
  void add(W w, const int32_t* activation) {
    const int8_t* x = reinterpret_cast<const int8_t*>(activation);
    sum += reinterpret_cast<I>(w & 255u) * static_cast<int32_t>(x[0]);
    sum += reinterpret_cast<I>((w >> 8) & 255u) * static_cast<int32_t>(x[1]);
    sum += reinterpret_cast<I>((w >> 16) & 255u) * static_cast<int32_t>(x[2]);
    sum += reinterpret_cast<I>(w >> 24) * static_cast<int32_t>(x[3]);
  }
  I total() const { return sum; }
};

struct MacF32 {
  static F mac(F acc, const uint32_t* b, const uint32_t* a) { return v_load<F>(b) * bits_to_float(*a) + acc; }
};

inline void transpose_words(const uint32_t* const* rows, uint32_t* out) {
  for (int column = 0; column < 16; column++)
    for (int row = 0; row < 16; row++) out[column * 16 + row] = rows[row][column];
}

inline void prefetch(const void* p) { __builtin_prefetch(p); }
inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace lm
