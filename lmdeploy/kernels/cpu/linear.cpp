// Linear layers and gated feed-forward blocks over packed affine weights: quantize the tokens, multiply, finish rows.
#include <algorithm>

#include "affine.h"
#include "pool.h"
#include "rows.h"

namespace lm {
namespace {

constexpr int64_t kActivationBytes = 384 << 10;  // quantized tokens of one chunk stay in the second-level cache

// Quantize tokens first .. first + rows - 1 of x, which are one block of `act`, beginning at its token `at`.
void quantize_block(const Rows& x, const Norm& norm, const Weight& w, const Activations& act, int64_t first, int64_t at,
                    int rows) {
  const int group = w.act_group();
  for (int row = 0; row < rows; row++) {
    const F factor = f_set(norm.factor(x, first + row, w.k));
    int8_t* q = act.q + at * w.k + row * 4;
    float* scale = act.scale + at * act.groups + row;
    int32_t* offset = act.offset + at * act.groups + row;
    for (int64_t i = 0; i < w.k; i += group) {
      F values[2];
      for (int v = 0; v * 16 < group; v++) {
        values[v] = x.load(first + row, i + 16 * v);
        if (norm.weight) values[v] = f_mul(f_mul(values[v], factor), norm.gain(i + 16 * v));
      }
      quantize_group(values, w, q, scale, offset, rows);
      q += group * rows;
      scale += rows;
      offset += rows;
    }
  }
}

// How `units` columns by `tokens` tokens are cut into chunks: large pieces first, which keep the reads of a thread in one
// place, and ever smaller ones, so that the threads end together.
class Grid {
 public:
  Grid(int64_t units, int64_t tokens, int64_t threads) : tokens_(tokens) {
    const int64_t blocks = (tokens + kMaxRows - 1) / kMaxRows;
    const int64_t rows = std::min(blocks, std::max<int64_t>(1, 4 * threads / units));
    token_step_ = (blocks + rows - 1) / rows * kMaxRows;
    down_ = (tokens + token_step_ - 1) / token_step_;
    const int64_t share = std::max<int64_t>(1, threads / down_);
    int64_t at = 0;
    while (at < units && across_ < kMostPieces - 1) {
      const int64_t size = std::max<int64_t>(1, (units - at) / (2 * share));
      for (int64_t i = 0; i < share && at < units && across_ < kMostPieces - 1; i++) {
        starts_[across_++] = at;
        at = std::min(units, at + size);
      }
    }
    if (at < units) starts_[across_++] = at;
    starts_[across_] = units;
  }
  int64_t chunks() const { return across_ * down_; }
  // body(unit, first token, rows) for every unit and block of tokens of one chunk
  template <class Body>
  void each(int64_t chunk, const Body& body) const {
    const int64_t token0 = chunk % down_ * token_step_, token1 = std::min(tokens_, token0 + token_step_);
    for (int64_t unit = starts_[chunk / down_]; unit < starts_[chunk / down_ + 1]; unit++) {
      for (int64_t token = token0; token < token1;) {
        const int rows = block_rows(token1 - token);
        body(unit, token, rows);
        token += rows;
      }
    }
  }

 private:
  static constexpr int64_t kMostPieces = 1024;
  int64_t tokens_, token_step_, down_, across_ = 0;
  int64_t starts_[kMostPieces + 1];
};

int64_t chunk_tokens(int64_t k, int64_t tokens) {
  const int64_t fit = std::max<int64_t>(4, kActivationBytes / (k * kMaxRows)) * kMaxRows;
  return std::min(tokens, fit);
}

int64_t quantize_chunks(int64_t tokens) { return (tokens + kMaxRows - 1) / kMaxRows; }

// The tokens of quantization chunk `chunk`: one full block, or the blocks of the rest.
template <class Body>
void each_block(int64_t chunk, int64_t tokens, const Body& body) {
  const int64_t end = std::min(tokens, (chunk + 1) * kMaxRows);
  for (int64_t token = chunk * kMaxRows; token < end;) {
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

void multiply_chunk(const Weight& w, const Kernels& kernels, const Activations& act, const Grid& grid, int64_t chunk,
                    const Finish& finish, int64_t first) {
  grid.each(chunk, [&](int64_t tile, int64_t token, int rows) {
    alignas(64) float result[kMaxRows * 16];
    kernels.run(w, tile, act, token, rows, result);
    for (int row = 0; row < rows; row++) finish.row(result + row * 16, first + token + row, tile * 16, w.n);
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

// The layouts of the arguments are mirrored in linear.py.
struct LinearArgs {
  int64_t threads, tokens;
  const Weight* weight;
  RowsArg x;
  NormArg norm;
  FinishArg finish;
};

// out [tokens, n] = norm(x) W^T + bias + residual
void lm_linear(const LinearArgs* args) {
  const CallLock lock;
  const LinearArgs& a = *args;
  const Weight& w = *a.weight;
  const Rows x(a.x);
  const Norm norm(a.norm);
  const Finish finish(a.finish, x.dtype);
  const Kernels kernels(w);
  const int64_t step = chunk_tokens(w.k, a.tokens);
  const Activations act(shared_buffer(0, Activations::bytes(step, w)), step, w);
  for (int64_t first = 0; first < a.tokens; first += step) {
    const int64_t count = std::min(step, a.tokens - first);
    const Grid grid(w.tiles(), count, a.threads);
    parallel(a.threads, {quantize_chunks(count), grid.chunks()}, [&](int phase, int64_t chunk) {
      if (phase == 0) {
        each_block(chunk, count, [&](int64_t token, int rows) {
          quantize_block(x, norm, w, act, first + token, token, rows);
        });
      } else {
        multiply_chunk(w, kernels, act, grid, chunk, finish, first);
      }
    });
  }
}

struct GatedMlpArgs {
  int64_t threads, tokens;
  const Weight *gate_up, *down;
  int64_t activation;
  RowsArg x;
  NormArg norm;
  FinishArg finish;
};

// out [tokens, down.n] = (activation(gate) * up) Wd^T + residual, with gate | up = norm(x) Wgu^T
void lm_gated_mlp(const GatedMlpArgs* args) {
  const CallLock lock;
  const GatedMlpArgs& a = *args;
  const Weight &gate_up = *a.gate_up, &down = *a.down;
  const int activation = static_cast<int>(a.activation);
  const Rows x(a.x);
  const Norm norm(a.norm);
  const Finish finish(a.finish, x.dtype);
  const Kernels first_kernels(gate_up), second_kernels(down);
  const int64_t step = chunk_tokens(std::max(gate_up.k, down.k), a.tokens);
  const Activations act(shared_buffer(0, Activations::bytes(step, gate_up)), step, gate_up);
  const Activations hidden(shared_buffer(1, Activations::bytes(step, down)), step, down);
  for (int64_t first = 0; first < a.tokens; first += step) {
    const int64_t count = std::min(step, a.tokens - first);
    const Grid wide(hidden.groups, count, a.threads), narrow(down.tiles(), count, a.threads);
    parallel(a.threads, {quantize_chunks(count), wide.chunks(), narrow.chunks()}, [&](int phase, int64_t chunk) {
      if (phase == 0) {
        each_block(chunk, count, [&](int64_t token, int rows) {
          quantize_block(x, norm, gate_up, act, first + token, token, rows);
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

struct ActivationArgs {
  int64_t threads, tokens, width, activation;
  RowsArg x;
  void* out;
};

// out [tokens, width] = activation(gate) * up of x [tokens, gate | up]
void lm_gated_activation(const ActivationArgs* args) {
  const CallLock lock;
  const ActivationArgs& a = *args;
  const Rows x(a.x);
  const int activation = static_cast<int>(a.activation);
  parallel(a.threads, {a.tokens}, [&](int, int64_t token) {
    int64_t i = 0;
    for (; i + 16 <= a.width; i += 16) {
      const F value = activate(x.load(token, i), activation);
      store_any(a.out, x.dtype, token * a.width + i, f_mul(value, x.load(token, a.width + i)));
    }
    for (; i < a.width; i++) {
      const int64_t gate = token * x.stride + i;
      alignas(64) float value[16];
      f_store(value, activate(f_set(load_one(x.data, x.dtype, gate)), activation));
      store_one(a.out, x.dtype, token * a.width + i, value[0] * load_one(x.data, x.dtype, gate + a.width));
    }
  });
}

}  // extern "C"
#pragma GCC visibility pop
