// Rows of activations, the norm in front of a product, and what happens to its result before it is stored.
#pragma once

#include "simd.h"

namespace lm {

// As Python packs them: every integer 64 bits, every number a double. linear.py has the same order.
struct RowsArg {
  const void* data;
  int64_t dtype, stride;  // stride in elements
};
struct NormArg {
  const void* weight;  // null: no norm
  int64_t dtype;
  double eps, offset;
};
struct FinishArg {
  const void* bias;
  int64_t bias_dtype;
  const void* residual;
  int64_t residual_stride;
  void* out;
  int64_t out_dtype;
};

struct Rows {
  const void* data;
  int dtype;
  int64_t stride;
  explicit Rows(const RowsArg& a) : data(a.data), dtype(static_cast<int>(a.dtype)), stride(a.stride) {}
  F load(int64_t token, int64_t column) const { return load_any(data, dtype, token * stride + column); }
};

struct Norm {  // RMS norm
  const void* weight;
  int dtype;
  float eps, offset;
  explicit Norm(const NormArg& a)
      : weight(a.weight), dtype(static_cast<int>(a.dtype)), eps(static_cast<float>(a.eps)),
        offset(static_cast<float>(a.offset)) {}
  F gain(int64_t column) const { return f_add(load_any(weight, dtype, column), f_set(offset)); }

  // 1 / rms of a token's k channels; 1 without a norm.
  float factor(const Rows& x, int64_t token, int64_t k) const {
    if (!weight) return 1.0f;
    F wide = f_zero();
    int64_t i = 0;
    for (; i + 16 <= k; i += 16) wide = f_fma(x.load(token, i), x.load(token, i), wide);
    float squares = f_sum(wide);
    for (; i < k; i++) {
      const float v = load_one(x.data, x.dtype, token * x.stride + i);
      squares += v * v;
    }
    return 1.0f / std::sqrt(squares / static_cast<float>(k) + eps);
  }
};

inline void normalize_row(const Rows& x, const Norm& norm, int64_t token, int64_t k, void* out, int dtype, int64_t at) {
  const float factor = norm.factor(x, token, k);
  int64_t i = 0;
  for (; i + 16 <= k; i += 16) {
    const F v = f_mul(x.load(token, i), f_set(factor));
    store_any(out, dtype, at + i, norm.weight ? f_mul(v, norm.gain(i)) : v);
  }
  for (; i < k; i++) {
    const float gain = norm.weight ? load_one(norm.weight, norm.dtype, i) + norm.offset : 1.0f;
    store_one(out, dtype, at + i, load_one(x.data, x.dtype, token * x.stride + i) * factor * gain);
  }
}

struct Finish {
  const void *bias, *residual;
  int bias_dtype, residual_dtype, out_dtype;
  int64_t residual_stride;
  void* out;
  Finish(const FinishArg& a, int x_dtype)
      : bias(a.bias), residual(a.residual), bias_dtype(static_cast<int>(a.bias_dtype)), residual_dtype(x_dtype),
        out_dtype(static_cast<int>(a.out_dtype)), residual_stride(a.residual_stride), out(a.out) {}

  void one(float v, int64_t token, int64_t column, int64_t n) const {
    if (bias) v += load_one(bias, bias_dtype, column);
    if (residual) v += load_one(residual, residual_dtype, token * residual_stride + column);
    store_one(out, out_dtype, token * n + column, v);
  }
  // sixteen columns, or those of them that exist
  void row(const float* values, int64_t token, int64_t column, int64_t n) const {
    if (column + 16 > n) {
      for (int64_t i = 0; column + i < n; i++) one(values[i], token, column + i, n);
      return;
    }
    F v = f_load(values);
    if (bias) v = f_add(v, load_any(bias, bias_dtype, column));
    if (residual) v = f_add(v, load_any(residual, residual_dtype, token * residual_stride + column));
    store_any(out, out_dtype, token * n + column, v);
  }
};

}  // namespace lm
