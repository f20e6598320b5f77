// Few tokens times bfloat16 weights as the checkpoint has them: every weight is read once, at the memory's speed.
#include <algorithm>

#include "pool.h"
#include "rows.h"

namespace lm {
namespace {

constexpr int kWeightRows = 4;

// sums[token][row] of 4 weight rows and TOKENS tokens of `k` channels.
template <int TOKENS>
void dot_rows(const uint16_t* const* w, int64_t ahead, const void* x, int64_t k, float* sums) {
  F acc[TOKENS][kWeightRows];
  for (int t = 0; t < TOKENS; t++)
    for (int r = 0; r < kWeightRows; r++) acc[t][r] = f_zero();
  int64_t i = 0;
#if defined(__AVX512BF16__)
  const auto* half = static_cast<const uint16_t*>(x);
  for (; i + 32 <= k; i += 32) {
    for (int r = 0; r < kWeightRows; r++) prefetch(w[r] + i + ahead);
    for (int t = 0; t < TOKENS; t++)
      for (int r = 0; r < kWeightRows; r++) acc[t][r] = f_dot_bf16(acc[t][r], w[r] + i, half + t * k + i);
  }
  constexpr int x_dtype = kBF16;
#else
  constexpr int x_dtype = kF32;
#endif
  for (; i < k; i += 16)
    for (int r = 0; r < kWeightRows; r++) {
      if (i % 32 == 0) prefetch(w[r] + i + ahead);
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

struct NormArgs {
  int64_t threads, tokens, k;
  RowsArg x;
  NormArg norm;
  void* out;
  int64_t out_dtype;
};

void lm_rms_norm(const NormArgs* args) {
  const CallLock lock;
  const NormArgs& a = *args;
  const Rows x(a.x);
  const Norm norm(a.norm);
  const int out_dtype = static_cast<int>(a.out_dtype);
  constexpr int64_t step = 4;
  parallel(a.threads, {(a.tokens + step - 1) / step}, [&](int, int64_t chunk) {
    for (int64_t token = chunk * step; token < std::min(a.tokens, (chunk + 1) * step); token++)
      normalize_row(x, norm, token, a.k, a.out, out_dtype, token * a.k);
  });
}

// The layout is mirrored in linear.py.
struct DenseArgs {
  int64_t threads;
  const uint16_t* w;
  int64_t w_stride, n, k, tokens;
  RowsArg x;
  NormArg norm;
  FinishArg finish;
};

// out [tokens, n] = norm(x) W^T + bias + residual with W [n, k] bfloat16, rows w_stride apart; k a multiple of 16.
void lm_dense_linear(const DenseArgs* args) {
  const CallLock lock;
  const DenseArgs& a = *args;
  const Rows x(a.x);
  const Norm norm(a.norm);
  const Finish finish(a.finish, x.dtype);
  constexpr int dtype = kHasBF16Dot ? kBF16 : kF32;
  constexpr int64_t size = kHasBF16Dot ? 2 : 4;
  char* rows = static_cast<char*>(shared_buffer(0, a.tokens * a.k * size + 64));
  const int64_t groups = (a.n + kWeightRows - 1) / kWeightRows;
  const int64_t step = std::max<int64_t>(1, groups / (a.threads * 6));
  // Rows are too short, and too many at once, for the hardware to run ahead by itself.
  const int64_t ahead = a.k < 1024 ? kWeightRows * a.w_stride : 1024;
  const auto multiply = [&](int64_t first) {
    const uint16_t* weights[kWeightRows];
    for (int r = 0; r < kWeightRows; r++) weights[r] = a.w + std::min(first + r, a.n - 1) * a.w_stride;
    for (int64_t token = 0; token < a.tokens;) {
      const int64_t left = a.tokens - token;
      const int count = left >= 4 ? 4 : left >= 2 ? 2 : 1;
      float sums[4 * kWeightRows];
      const auto kernel = count == 4 ? dot_rows<4> : count == 2 ? dot_rows<2> : dot_rows<1>;
      kernel(weights, ahead, rows + token * a.k * size, a.k, sums);
      for (int t = 0; t < count; t++)
        for (int64_t r = 0; r < kWeightRows && first + r < a.n; r++)
          finish.one(sums[t * kWeightRows + r], token + t, first + r, a.n);
      token += count;
    }
  };
  parallel(a.threads, {a.tokens, (groups + step - 1) / step}, [&](int phase, int64_t chunk) {
    if (phase == 0) return normalize_row(x, norm, chunk, a.k, rows, dtype, chunk * a.k);
    for (int64_t group = chunk * step; group < std::min(groups, (chunk + 1) * step); group++)
      multiply(group * kWeightRows);
  });
}

}  // extern "C"
#pragma GCC visibility pop
