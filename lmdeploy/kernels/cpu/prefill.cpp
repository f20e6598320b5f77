// Attention of several new tokens: tiles of up to kTileRows (token, head) rows against packed blocks of kTileKeys keys
// with a running softmax, as in FlashAttention, https://arxiv.org/abs/2205.14135.
#include "attention.h"

namespace lm {
namespace {

constexpr int kTileKeys = 128;

// c [kMacRows][16 V] = (scale ? c * scale[row] : 0) + a [rows][count] b; a is broadcast word by word.
template <class Mac, int V>
void multiply_block(const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t b_step, int64_t b_vector,
                    int64_t count, const float* scale, float* c, int64_t c_stride) {
  F acc[kMacRows][V];
#pragma GCC unroll 8
  for (int r = 0; r < kMacRows; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++)
      acc[r][v] = scale ? f_mul(f_load(c + r * c_stride + 16 * v), f_set(scale[r])) : f_zero();
  for (int64_t k = 0; k < count; k++) {
#pragma GCC unroll 8
    for (int r = 0; r < kMacRows; r++)
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) acc[r][v] = Mac::mac(acc[r][v], b + v * b_vector, a + r * a_stride + k);
    b += b_step;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kMacRows; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) f_store(c + r * c_stride + 16 * v, acc[r][v]);
}

template <class Mac>
void multiply(const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t b_step, int64_t b_vector, int rows,
              int64_t count, int vectors, const float* scale, float* c, int64_t c_stride) {
  for (int v = 0; v < vectors;) {
    const bool wide = v + kMacVectors <= vectors;
    const auto block = wide ? multiply_block<Mac, kMacVectors> : multiply_block<Mac, 1>;
    for (int r = 0; r < rows; r += kMacRows)
      block(a + r * a_stride, a_stride, b + v * b_vector, b_step, b_vector, count, scale ? scale + r : nullptr,
            c + r * c_stride + 16 * v, c_stride);
    v += wide ? kMacVectors : 1;
  }
}

struct Workspace {  // of one tile
  uint32_t *keys, *values, *rows;
  float *scores, *out, *maximum, *sum, *scale;
  uint16_t* weights;

  Workspace(int dim, int rows_padded) {
    const size_t keys_words = static_cast<size_t>(kTileKeys) * dim, block = static_cast<size_t>(rows_padded);
    const size_t words = 2 * keys_words + 16 * dim + block * (kTileKeys + kTileKeys / 2 + dim + 3) + 64;
    keys = thread_array<uint32_t>(words);
    values = keys + keys_words;
    rows = values + keys_words;
    scores = reinterpret_cast<float*>(rows + 16 * dim);
    out = scores + block * kTileKeys;
    weights = reinterpret_cast<uint16_t*>(out + block * dim);
    maximum = reinterpret_cast<float*>(weights + block * kTileKeys);
    sum = maximum + block;
    scale = sum + block;
  }
};

// rows[i] = the cached row of position first + i
void cache_rows(const Call& call, const Cache& cache, const TileTask& task, int64_t first, int count, const char** rows) {
  call.each_block(task.request, first, first + count, [&](int64_t block, int64_t offset, int64_t, int size) {
    for (int i = 0; i < size; i++) *rows++ = cache.row(block, task.kv_head, offset + i);
  });
}

// One cached row as words: pairs of bfloat16 where products are in bfloat16, else float32.
const uint32_t* row_words(const char* row, int dtype, bool bf16, int dim, uint32_t* space) {
  if (bf16 || dtype == kF32) return reinterpret_cast<const uint32_t*>(row);
  for (int i = 0; i < dim; i += 16)
    f_store(reinterpret_cast<float*>(space) + i, f_load_bf16(reinterpret_cast<const uint16_t*>(row) + i));
  return space;
}

// Keys first .. first + count as [16 keys][words][16], with zeros behind the last.
void pack_keys(const Call& call, const TileTask& task, int64_t first, int count, Workspace& space) {
  const int dim = call.spec.dim, words = call.bf16 ? dim / 2 : dim;
  alignas(64) static const uint32_t zeros[512] = {};
  const char* cached[kTileKeys];
  cache_rows(call, call.keys, task, first, count, cached);
  for (int at = 0; at < count; at += 16) {
    const uint32_t* rows[16];
    for (int i = 0; i < 16; i++)
      rows[i] = at + i < count ? row_words(cached[at + i], call.keys.dtype, call.bf16, dim, space.rows + i * dim) : zeros;
    for (int word = 0; word < words; word += 16) {
      transpose_words(rows, space.keys + (static_cast<int64_t>(at) * words + word * 16));
      for (auto& row : rows) row += 16;
    }
  }
}

// Values as [key][dim] float32, or [key pairs][dim][2] bfloat16.
void pack_values(const Call& call, const TileTask& task, int64_t first, int count, Workspace& space) {
  const int dim = call.spec.dim;
  alignas(64) static const uint16_t zeros[512] = {};
  const char* cached[kTileKeys];
  cache_rows(call, call.values, task, first, count, cached);
  if (!call.bf16) {
    for (int i = 0; i < count; i++) {
      const uint32_t* from = row_words(cached[i], call.values.dtype, false, dim, space.rows);
      std::memcpy(space.values + static_cast<int64_t>(i) * dim, from, dim * 4);
    }
    return;
  }
  for (int i = 0; i < count; i += 2) {
    const auto* low = reinterpret_cast<const uint16_t*>(cached[i]);
    const auto* high = i + 1 < count ? reinterpret_cast<const uint16_t*>(cached[i + 1]) : zeros;
    uint32_t* to = space.values + static_cast<int64_t>(i / 2) * dim;
    for (int d = 0; d < dim; d++) to[d] = low[d] | static_cast<uint32_t>(high[d]) << 16;
  }
}

// Softmax of one row of scores over keys `first` and on; updates the row's running maximum and sum.
void soften_row(const Call& call, Workspace& space, int row, int head, int64_t position, int64_t first, int count) {
  float* scores = space.scores + static_cast<int64_t>(row) * kTileKeys;
  const int low = static_cast<int>(std::max<int64_t>(call.first_visible(position) - first, 0));
  const int high = static_cast<int>(std::min<int64_t>(position + 1 - first, count));
  F largest = f_set(space.maximum[row]);
  for (int i = 0; i < count; i += 16) {
    F s = shape_scores(f_load(scores + i), call.spec, head, first + i);
    if (low > i || high < i + 16) s = f_keep(s, low - i, high - i, f_set(kMinusInfinity));
    f_store(scores + i, s);
    largest = f_max(largest, s);
  }
  const float maximum = f_largest(largest);
  const bool seen = maximum > kMinusInfinity;  // else every key so far is hidden from this row
  space.scale[row] = seen ? std::exp(space.maximum[row] - maximum) : 1.0f;
  space.maximum[row] = maximum;
  F total = f_zero();
  uint16_t* weights = space.weights + static_cast<int64_t>(row) * kTileKeys;
  for (int i = 0; i < count; i += 16) {
    const F p = seen ? f_exp(f_sub(f_load(scores + i), f_set(maximum))) : f_zero();
    total = f_add(total, p);
    if (call.bf16) {
      f_store_bf16(weights + i, p);
    } else {
      f_store(scores + i, p);
    }
  }
  space.sum[row] = space.sum[row] * space.scale[row] + f_sum(total);
}

template <class Mac>
void attend_tile_with(const Call& call, const TileTask& task) {
  const int dim = call.spec.dim, words = call.bf16 ? dim / 2 : dim, group = call.group;
  const int rows = task.tokens * group, padded = (rows + kMacRows - 1) / kMacRows * kMacRows;
  Workspace space(dim, padded);
  for (int r = 0; r < padded; r++) space.maximum[r] = kMinusInfinity, space.sum[r] = 0.0f, space.scale[r] = 1.0f;
  std::memset(space.weights, 0, static_cast<size_t>(padded) * kTileKeys * 2);
  const int64_t past = call.context(task.request) - call.queries(task.request);
  const int64_t position = past + task.first, end = position + task.tokens;
  const int64_t token = call.step.starts[task.request] + task.first;
  const auto* q = reinterpret_cast<const uint32_t*>(call.q_rows(task.kv_head, token));
  bool first_block = true;
  for (int64_t first = call.first_visible(position); first < end; first += kTileKeys) {
    const int count = static_cast<int>(std::min<int64_t>(kTileKeys, end - first));
    pack_keys(call, task, first, count, space);
    pack_values(call, task, first, count, space);
    multiply<Mac>(q, words, space.keys, 16, static_cast<int64_t>(words) * 16, padded, words, (count + 15) / 16, nullptr,
                  space.scores, kTileKeys);
    for (int r = 0; r < rows; r++)
      soften_row(call, space, r, task.kv_head * group + r % group, position + r / group, first, count);
    const auto* p = call.bf16 ? reinterpret_cast<const uint32_t*>(space.weights)
                              : reinterpret_cast<const uint32_t*>(space.scores);
    multiply<Mac>(p, call.bf16 ? kTileKeys / 2 : kTileKeys, space.values, dim, 16, padded,
                  call.bf16 ? (count + 1) / 2 : count, dim / 16, first_block ? nullptr : space.scale, space.out, dim);
    first_block = false;
  }
  for (int r = 0; r < rows; r++) {
    const int head = task.kv_head * group + r % group;
    float sum = space.sum[r];
    F factor = f_set(1.0f);
    if (call.spec.sinks) {
      const float maximum = std::max(space.maximum[r], call.spec.sinks[head]);
      factor = f_set(std::exp(space.maximum[r] - maximum));
      sum = sum * std::exp(space.maximum[r] - maximum) + std::exp(call.spec.sinks[head] - maximum);
    }
    factor = f_mul(factor, f_set(1.0f / sum));
    const int64_t to = ((token + r / group) * call.spec.heads + head) * dim;
    for (int i = 0; i < dim; i += 16)
      store_any(call.out, call.dtype, to + i, f_mul(f_load(space.out + static_cast<int64_t>(r) * dim + i), factor));
  }
}

}  // namespace

void attend_tile(const Call& call, const TileTask& task) {
#if defined(__AVX512BF16__)
  if (call.bf16) return attend_tile_with<MacBF16>(call, task);
#endif
  attend_tile_with<MacF32>(call, task);
}

}  // namespace lm
