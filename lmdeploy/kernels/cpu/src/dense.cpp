// Few tokens times bfloat16 weights as the checkpoint has them: every weight is read once, at the memory's speed.
#include <algorithm>

#include "pool.h"
#include "simd.h"

namespace lm {
namespace {

constexpr int kWeightRows = 4;

// sums[token][row] of 4 weight rows and TOKENS tokens of `k` channels.
template <int TOKENS>
void dot_rows(const uint16_t* const* w, const void* x, int64_t k, float* sums) {
  F acc[TOKENS][kWeightRows];
  for (int t = 0; t < TOKENS; t++)
    for (int r = 0; r < kWeightRows; r++) acc[t][r] = f_zero();
  int64_t i = 0;
#if defined(__AVX512BF16__)
  const auto* half = static_cast<const uint16_t*>(x);
  for (; i + 32 <= k; i += 32)
    for (int t = 0; t < TOKENS; t++)
      for (int r = 0; r < kWeightRows; r++) acc[t][r] = f_dot_bf16(acc[t][r], w[r] + i, half + t * k + i);
  constexpr int x_dtype = kBF16;
#else
  constexpr int x_dtype = kF32;
#endif
  for (; i < k; i += 16)
    for (int r = 0; r < kWeightRows; r++) {
      const F weight = f_load_bf16(w[r] + i);
      for (int t = 0; t < TOKENS; t++) acc[t][r] = f_fma(weight, load_any(x, x_dtype, t * k + i), acc[t][r]);
    }
  for (int t = 0; t < TOKENS; t++) f_sum4(sums + t * kWeightRows, acc[t][0], acc[t][1], acc[t][2], acc[t][3]);
}

}  // namespace
}  // namespace lm

using namespace lm;

#pragma GCC visibility push(default)
extern "C" {

void lm_rms_norm(int threads, int64_t tokens, int64_t k, const void* x, int x_dtype, int64_t x_stride,
                 const void* weight, int weight_dtype, float eps, float offset, void* out, int out_dtype) {
  const CallLock lock;
  constexpr int64_t step = 4;
  parallel(threads, {static_cast<int>((tokens + step - 1) / step)}, [&](int, int chunk) {
    for (int64_t token = chunk * step; token < std::min(tokens, (chunk + 1) * step); token++) {
      float squares = 0.0f;
      F wide = f_zero();
      int64_t i = 0;
      for (; i + 16 <= k; i += 16) {
        const F v = load_any(x, x_dtype, token * x_stride + i);
        wide = f_fma(v, v, wide);
      }
      for (; i < k; i++) {
        const float v = load_one(x, x_dtype, token * x_stride + i);
        squares += v * v;
      }
      const float factor = 1.0f / std::sqrt((f_sum(wide) + squares) / static_cast<float>(k) + eps);
      for (i = 0; i + 16 <= k; i += 16) {
        const F gain = f_add(load_any(weight, weight_dtype, i), f_set(offset));
        const F v = f_mul(load_any(x, x_dtype, token * x_stride + i), f_set(factor));
        store_any(out, out_dtype, token * k + i, f_mul(v, gain));
      }
      for (; i < k; i++) {
        const float v = load_one(x, x_dtype, token * x_stride + i) * factor;
        store_one(out, out_dtype, token * k + i, v * (load_one(weight, weight_dtype, i) + offset));
      }
    }
  });
}

// out [tokens, n] = norm(x) W^T + bias + residual with W [n, k] bfloat16, rows w_stride apart; k a multiple of 16.
void lm_dense_linear(int threads, const uint16_t* w, int64_t w_stride, int64_t n, int64_t k, int64_t tokens,
                     const void* x, int x_dtype, int64_t x_stride, const void* norm_weight, int norm_dtype, float eps,
                     float norm_offset, const void* bias, int bias_dtype, const void* residual, int64_t residual_stride,
                     void* out, int out_dtype) {
  const CallLock lock;
  constexpr int dtype = kHasBF16Dot ? kBF16 : kF32;
  constexpr int64_t size = kHasBF16Dot ? 2 : 4;
  char* rows = static_cast<char*>(shared_buffer(0, tokens * k * size + 64));
  const int64_t groups = (n + kWeightRows - 1) / kWeightRows;
  const int64_t step = std::max<int64_t>(1, groups / (threads * 6));
  const auto prepare = [&](int64_t token) {
    F squares = f_zero();
    for (int64_t i = 0; norm_weight && i < k; i += 16) {
      const F v = load_any(x, x_dtype, token * x_stride + i);
      squares = f_fma(v, v, squares);
    }
    const F factor = f_set(1.0f / std::sqrt(f_sum(squares) / static_cast<float>(k) + eps));
    for (int64_t i = 0; i < k; i += 16) {
      F v = load_any(x, x_dtype, token * x_stride + i);
      if (norm_weight) {
        const F gain = f_add(load_any(norm_weight, norm_dtype, i), f_set(norm_offset));
        v = f_mul(f_mul(v, factor), gain);
      }
      store_any(rows, dtype, token * k + i, v);
    }
  };
  const auto multiply = [&](int64_t first) {
    const uint16_t* weights[kWeightRows];
    for (int r = 0; r < kWeightRows; r++) weights[r] = w + std::min(first + r, n - 1) * w_stride;
    for (int64_t token = 0; token < tokens;) {
      const int64_t left = tokens - token;
      const int count = left >= 4 ? 4 : left >= 2 ? 2 : 1;
      float sums[4 * kWeightRows];
      const auto kernel = count == 4 ? dot_rows<4> : count == 2 ? dot_rows<2> : dot_rows<1>;
      kernel(weights, rows + token * k * size, k, sums);
      for (int t = 0; t < count; t++)
        for (int64_t r = 0; r < kWeightRows && first + r < n; r++) {
          float v = sums[t * kWeightRows + r];
          if (bias) v += load_one(bias, bias_dtype, first + r);
          if (residual) v += load_one(residual, x_dtype, (token + t) * residual_stride + first + r);
          store_one(out, out_dtype, (token + t) * n + first + r, v);
        }
      token += count;
    }
  };
  parallel(threads, {static_cast<int>(tokens), static_cast<int>((groups + step - 1) / step)}, [&](int phase, int chunk) {
    if (phase == 0) return prepare(chunk);
    for (int64_t group = chunk * step; group < std::min(groups, (chunk + 1) * step); group++)
      multiply(group * kWeightRows);
  });
}

}  // extern "C"
#pragma GCC visibility pop
