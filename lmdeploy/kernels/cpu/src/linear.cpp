// Linear layers and gated feed-forward blocks over packed affine weights: quantize the tokens, multiply, finish rows.
#include <algorithm>

#include "affine.h"
#include "pool.h"

namespace lm {
namespace {

constexpr int64_t kActivationBytes = 384 << 10;  // quantized tokens of one chunk stay in the second-level cache
constexpr int kChunksPerThread = 6;

struct Norm {  // RMS norm in front; no weight, no norm
  const void* weight;
  int dtype;
  float eps, offset;
};

struct Rows {  // a matrix of tokens, `stride` elements apart
  const void* data;
  int dtype;
  int64_t stride;
};

struct Finish {  // what happens to a result before it is stored
  const void* bias;
  int bias_dtype;
  Rows residual;
  void* out;
  int out_dtype;
};

float inverse_rms(const Rows& x, int64_t token, int64_t k, float eps) {
  F squares = f_zero();
  for (int64_t i = 0; i < k; i += 16) {
    const F v = load_any(x.data, x.dtype, token * x.stride + i);
    squares = f_fma(v, v, squares);
  }
  return 1.0f / std::sqrt(f_sum(squares) / static_cast<float>(k) + eps);
}

// Quantize tokens first .. first + rows - 1 of x, which are one block of `act`, beginning at its token `at`.
void quantize_block(const Rows& x, const Norm& norm, const Weight& w, const Activations& act, int64_t first, int64_t at,
                    int rows) {
  const int group = w.act_group();
  for (int row = 0; row < rows; row++) {
    const int64_t start = (first + row) * x.stride;
    const F factor = f_set(norm.weight ? inverse_rms(x, first + row, w.k, norm.eps) : 1.0f);
    int8_t* q = act.q + at * w.k + row * 4;
    float* scale = act.scale + at * act.groups + row;
    int32_t* offset = act.offset + at * act.groups + row;
    for (int64_t i = 0; i < w.k; i += group) {
      F values[2];
      for (int v = 0; v * 16 < group; v++) {
        values[v] = load_any(x.data, x.dtype, start + i + 16 * v);
        if (norm.weight) {
          const F gain = f_add(load_any(norm.weight, norm.dtype, i + 16 * v), f_set(norm.offset));
          values[v] = f_mul(f_mul(values[v], factor), gain);
        }
      }
      quantize_group(values, w, q, scale, offset, rows);
      q += group * rows;
      scale += rows;
      offset += rows;
    }
  }
}

void finish_row(const float* values, const Finish& finish, int64_t token, int64_t column, int64_t n) {
  const int64_t at = token * n + column;
  const int64_t from = token * finish.residual.stride + column;
  if (column + 16 <= n) {
    F v = f_load(values);
    if (finish.bias) v = f_add(v, load_any(finish.bias, finish.bias_dtype, column));
    if (finish.residual.data) v = f_add(v, load_any(finish.residual.data, finish.residual.dtype, from));
    store_any(finish.out, finish.out_dtype, at, v);
    return;
  }
  for (int64_t i = 0; column + i < n; i++) {
    float v = values[i];
    if (finish.bias) v += load_one(finish.bias, finish.bias_dtype, column + i);
    if (finish.residual.data) v += load_one(finish.residual.data, finish.residual.dtype, from + i);
    store_one(finish.out, finish.out_dtype, at + i, v);
  }
}

// How the work of `units` column units by `tokens` tokens is cut into chunks.
struct Grid {
  int64_t units, tokens, unit_step, token_step;
  int across, down;

  Grid(int64_t units, int64_t tokens, int threads) : units(units), tokens(tokens) {
    const int64_t wanted = static_cast<int64_t>(threads) * kChunksPerThread;
    unit_step = std::max<int64_t>(1, units / wanted);
    across = static_cast<int>((units + unit_step - 1) / unit_step);
    const int64_t blocks = (tokens + kMaxRows - 1) / kMaxRows;
    const int64_t cuts = std::min(blocks, std::max<int64_t>(1, wanted / across / 2));
    token_step = (blocks + cuts - 1) / cuts * kMaxRows;
    down = static_cast<int>((tokens + token_step - 1) / token_step);
  }
  int chunks() const { return across * down; }
  // body(unit, first token, rows) for every unit and block of tokens of one chunk
  template <class Body>
  void each(int chunk, const Body& body) const {
    const int64_t unit0 = chunk / down * unit_step, unit1 = std::min(units, unit0 + unit_step);
    const int64_t token0 = chunk % down * token_step, token1 = std::min(tokens, token0 + token_step);
    for (int64_t unit = unit0; unit < unit1; unit++) {
      for (int64_t token = token0; token < token1;) {
        const int rows = block_rows(token1 - token);
        body(unit, token, rows);
        token += rows;
      }
    }
  }
};

int64_t chunk_tokens(int64_t k, int64_t tokens) {
  const int64_t fit = std::max<int64_t>(4, kActivationBytes / (k * kMaxRows)) * kMaxRows;
  return std::min(tokens, fit);
}

int quantize_chunks(int64_t tokens) { return static_cast<int>((tokens + kMaxRows - 1) / kMaxRows); }

// The tokens of quantization chunk `chunk`: one full block, or the blocks of the rest.
template <class Body>
void each_block(int chunk, int64_t tokens, const Body& body) {
  const int64_t end = std::min<int64_t>(tokens, (chunk + 1) * static_cast<int64_t>(kMaxRows));
  for (int64_t token = chunk * static_cast<int64_t>(kMaxRows); token < end;) {
    const int rows = block_rows(end - token);
    body(token, rows);
    token += rows;
  }
}

struct Kernels {  // by number of rows
  TileKernel by_rows[kMaxRows + 1] = {};
  explicit Kernels(const Weight& w) {
    for (int rows : {1, 2, 4, 8, kMaxRows})
      if (rows <= kMaxRows) by_rows[rows] = tile_kernel(w, rows);
  }
  void run(const Weight& w, int64_t tile, const Activations& act, int64_t token, int rows, float* out) const {
    by_rows[rows](w, tile, act.block_q(token), act.block_scale(token), act.block_offset(token), out);
  }
};

void multiply_chunk(const Weight& w, const Kernels& kernels, const Activations& act, const Grid& grid, int chunk,
                    const Finish& finish, int64_t first) {
  grid.each(chunk, [&](int64_t tile, int64_t token, int rows) {
    alignas(64) float result[kMaxRows * 16];
    kernels.run(w, tile, act, token, rows, result);
    for (int row = 0; row < rows; row++) finish_row(result + row * 16, finish, first + token + row, tile * 16, w.n);
  });
}

template <int ACTIVATION>
F activate(F x) {
  if constexpr (ACTIVATION == 0) return f_silu(x);
  if constexpr (ACTIVATION == 1) return f_gelu_tanh(x);
  return f_gelu(x);
}

F activate(F x, int activation) {
  return activation == 0 ? activate<0>(x) : activation == 1 ? activate<1>(x) : activate<2>(x);
}

// activation(gate) * up of one hidden group, quantized for the down product at once.
void gate_group(const Weight& gate_up, const Weight& down, const Kernels& kernels, const Activations& in,
                const Activations& hidden, int activation, int64_t unit, int64_t token, int rows) {
  const int tiles = down.act_group() / 16;
  const int64_t up_tile = gate_up.n / 32;
  alignas(64) float gate[2][kMaxRows * 16], up[2][kMaxRows * 16];
  for (int t = 0; t < tiles; t++) {
    kernels.run(gate_up, unit * tiles + t, in, token, rows, gate[t]);
    kernels.run(gate_up, up_tile + unit * tiles + t, in, token, rows, up[t]);
  }
  for (int row = 0; row < rows; row++) {
    F values[2];
    for (int t = 0; t < tiles; t++)
      values[t] = f_mul(activate(f_load(gate[t] + row * 16), activation), f_load(up[t] + row * 16));
    const int64_t at = token * hidden.groups + unit * rows + row;
    quantize_group(values, down, hidden.q + token * down.k + unit * down.act_group() * rows + row * 4,
                   hidden.scale + at, hidden.offset + at, rows);
  }
}

}  // namespace
}  // namespace lm

using namespace lm;

#pragma GCC visibility push(default)
extern "C" {

// out [tokens, n] = norm(x) W^T + bias + residual
void lm_linear(int threads, const Weight* weight, int64_t tokens, const void* x, int x_dtype, int64_t x_stride,
               const void* norm_weight, int norm_dtype, float eps, float norm_offset, const void* bias, int bias_dtype,
               const void* residual, int64_t residual_stride, void* out, int out_dtype) {
  const CallLock lock;
  const Weight& w = *weight;
  const Rows in{x, x_dtype, x_stride};
  const Norm norm{norm_weight, norm_dtype, eps, norm_offset};
  const Finish finish{bias, bias_dtype, {residual, x_dtype, residual_stride}, out, out_dtype};
  const Kernels kernels(w);
  const int64_t step = chunk_tokens(w.k, tokens);
  const Activations act(shared_buffer(0, Activations::bytes(step, w)), step, w);
  for (int64_t first = 0; first < tokens; first += step) {
    const int64_t count = std::min(step, tokens - first);
    const Grid grid(w.tiles(), count, threads);
    parallel(threads, {quantize_chunks(count), grid.chunks()}, [&](int phase, int chunk) {
      if (phase == 0) {
        each_block(chunk, count, [&](int64_t token, int rows) {
          quantize_block(in, norm, w, act, first + token, token, rows);
        });
      } else {
        multiply_chunk(w, kernels, act, grid, chunk, finish, first);
      }
    });
  }
}

// out [tokens, down.n] = (activation(gate) * up) Wd^T + residual, with gate | up = norm(x) Wgu^T
void lm_gated_mlp(int threads, const Weight* gate_up_weight, const Weight* down_weight, int activation, int64_t tokens,
                  const void* x, int x_dtype, int64_t x_stride, const void* norm_weight, int norm_dtype, float eps,
                  float norm_offset, const void* residual, int64_t residual_stride, void* out) {
  const CallLock lock;
  const Weight &gate_up = *gate_up_weight, &down = *down_weight;
  const Rows in{x, x_dtype, x_stride};
  const Norm norm{norm_weight, norm_dtype, eps, norm_offset};
  const Finish finish{nullptr, 0, {residual, x_dtype, residual_stride}, out, x_dtype};
  const Kernels first_kernels(gate_up), second_kernels(down);
  const int64_t step = chunk_tokens(std::max(gate_up.k, down.k), tokens);
  const Activations act(shared_buffer(0, Activations::bytes(step, gate_up)), step, gate_up);
  const Activations hidden(shared_buffer(1, Activations::bytes(step, down)), step, down);
  for (int64_t first = 0; first < tokens; first += step) {
    const int64_t count = std::min(step, tokens - first);
    const Grid wide(hidden.groups, count, threads), narrow(down.tiles(), count, threads);
    parallel(threads, {quantize_chunks(count), wide.chunks(), narrow.chunks()}, [&](int phase, int chunk) {
      if (phase == 0) {
        each_block(chunk, count, [&](int64_t token, int rows) {
          quantize_block(in, norm, gate_up, act, first + token, token, rows);
        });
      } else if (phase == 1) {
        wide.each(chunk, [&](int64_t unit, int64_t token, int rows) {
          gate_group(gate_up, down, first_kernels, act, hidden, activation, unit, token, rows);
        });
      } else {
        multiply_chunk(down, second_kernels, hidden, narrow, chunk, finish, first);
      }
    });
  }
}

// out [tokens, width] = activation(gate) * up of x [tokens, gate | up]
void lm_gated_activation(int threads, int64_t tokens, int64_t width, const void* x, int x_dtype, int64_t x_stride,
                         int activation, void* out) {
  const CallLock lock;
  parallel(threads, {static_cast<int>(tokens)}, [&](int, int token) {
    const int64_t gate = token * x_stride, up = gate + width;
    int64_t i = 0;
    for (; i + 16 <= width; i += 16) {
      const F value = activate(load_any(x, x_dtype, gate + i), activation);
      store_any(out, x_dtype, token * width + i, f_mul(value, load_any(x, x_dtype, up + i)));
    }
    for (; i < width; i++) {
      alignas(64) float value[16];
      f_store(value, activate(f_set(load_one(x, x_dtype, gate + i)), activation));
      store_one(out, x_dtype, token * width + i, value[0] * load_one(x, x_dtype, up + i));
    }
  });
}

}  // extern "C"
#pragma GCC visibility pop
