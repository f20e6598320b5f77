// Attention over the blocked cache: per-head norms, rotation and cache write, then softmax(q k^T) v.
//
// One new token of a request: its keys are cut into pieces of kSplit, whatever the batch, and the pieces are joined, so
// that the result depends on nothing but the request. Several new tokens: tiles of up to kTileRows (token, head) rows
// against packed blocks of kTileKeys keys with a running softmax, as in FlashAttention, https://arxiv.org/abs/2205.14135.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "pool.h"
#include "simd.h"

namespace lm {
namespace {

constexpr int64_t kSplit = 256;
constexpr int kTileRows = 96;  // a multiple of every kMacRows
constexpr int kTileKeys = 128;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

}  // namespace

// The layouts of Spec and Step are mirrored by ctypes in attention.py.
struct Spec {
  int32_t heads, kv_heads, dim, interleaved;
  int64_t window;  // 0: none
  float scale, softcap, norm_eps, norm_offset;
  const void *q_norm, *k_norm;
  const float *slopes, *sinks;
  int32_t q_norm_dtype, k_norm_dtype;
};

struct Step {
  int64_t tokens, requests, table_stride, block_size;
  const int32_t *starts, *context_lens, *block_tables;
  const int64_t* slots;
};

namespace {

struct Cache {
  char* data;
  int dtype;
  int64_t block, head, token;  // strides in elements

  char* row(int64_t b, int64_t h, int64_t t) const {
    return data + (b * block + h * head + t * token) * (dtype == kBF16 ? 2 : 4);
  }
};

struct Call {
  const Spec& spec;
  const Step& step;
  const void* qkv;
  int dtype;
  int64_t qkv_stride;
  const float *cos, *sin;
  int64_t rotary_half;
  Cache keys, values;
  void* out;
  int group;        // query heads per KV head
  bool bf16;        // q and products in bfloat16
  void* q;          // [kv_heads][tokens][group][dim], times scale
  float* partials;  // [decode pieces][group][2 + dim]: maximum, sum, weighted values

  int64_t q_index(int64_t kv_head, int64_t token) const { return (kv_head * step.tokens + token) * group * spec.dim; }
  int64_t partial_size() const { return static_cast<int64_t>(group) * (2 + spec.dim); }
  int64_t context(int64_t request) const { return step.context_lens[request]; }
  int64_t queries(int64_t request) const { return step.starts[request + 1] - step.starts[request]; }
  // rows[i] = the cached row of position first + i
  void cache_rows(const Cache& cache, int64_t request, int64_t kv_head, int64_t first, int count,
                  const char** rows) const {
    const int32_t* table = step.block_tables + request * step.table_stride;
    const int64_t size = cache.token * (cache.dtype == kBF16 ? 2 : 4);
    int64_t block = first / step.block_size, offset = first - block * step.block_size;
    for (int i = 0; i < count; block++, offset = 0) {
      const char* row = cache.row(table[block], kv_head, offset);
      for (; i < count && offset < step.block_size; i++, offset++, row += size) rows[i] = row;
    }
  }
  int64_t first_visible(int64_t position) const {
    return spec.window > 0 ? std::max<int64_t>(0, position - spec.window + 1) : 0;
  }
};

// ---- norms, rotation, cache write -------------------------------------------------------------------------------

void normalize(float* x, int dim, const void* weight, int dtype, const Spec& spec) {
  F squares = f_zero();
  for (int i = 0; i < dim; i += 16) squares = f_fma(f_load(x + i), f_load(x + i), squares);
  const F factor = f_set(1.0f / std::sqrt(f_sum(squares) / static_cast<float>(dim) + spec.norm_eps));
  for (int i = 0; i < dim; i += 16) {
    const F gain = f_add(load_any(weight, dtype, i), f_set(spec.norm_offset));
    f_store(x + i, f_mul(f_mul(f_load(x + i), factor), gain));
  }
}

void rotate(float* x, const float* cos, const float* sin, int64_t half, bool interleaved) {
  if (interleaved) {
    for (int64_t i = 0; i < half; i++) {
      const float a = x[2 * i], b = x[2 * i + 1];
      x[2 * i] = a * cos[i] - b * sin[i];
      x[2 * i + 1] = b * cos[i] + a * sin[i];
    }
    return;
  }
  int64_t i = 0;
  for (; i + 16 <= half; i += 16) {
    const F a = f_load(x + i), b = f_load(x + half + i), c = f_load(cos + i), s = f_load(sin + i);
    f_store(x + i, f_sub(f_mul(a, c), f_mul(b, s)));
    f_store(x + half + i, f_fma(a, s, f_mul(b, c)));
  }
  for (; i < half; i++) {
    const float a = x[i], b = x[half + i];
    x[i] = a * cos[i] - b * sin[i];
    x[half + i] = b * cos[i] + a * sin[i];
  }
}

// Head `head` of a token's q | k | v, as float32, normalized and rotated unless it is a value.
void prepare_head(const Call& call, int64_t token, int head, float* x) {
  const Spec& spec = call.spec;
  for (int i = 0; i < spec.dim; i += 16)
    f_store(x + i, load_any(call.qkv, call.dtype, token * call.qkv_stride + head * spec.dim + i));
  if (head >= spec.heads + spec.kv_heads) return;
  const bool is_query = head < spec.heads;
  const void* weight = is_query ? spec.q_norm : spec.k_norm;
  if (weight) normalize(x, spec.dim, weight, is_query ? spec.q_norm_dtype : spec.k_norm_dtype, spec);
  if (call.cos) {
    const int64_t at = token * call.rotary_half;
    rotate(x, call.cos + at, call.sin + at, call.rotary_half, spec.interleaved != 0);
  }
}

void prepare_token(const Call& call, int64_t token) {
  const Spec& spec = call.spec;
  alignas(64) float x[512];
  for (int head = 0; head < spec.heads; head++) {
    prepare_head(call, token, head, x);
    const int64_t at = call.q_index(head / call.group, token) + head % call.group * spec.dim;
    for (int i = 0; i < spec.dim; i += 16)
      store_any(call.q, call.bf16 ? kBF16 : kF32, at + i, f_mul(f_load(x + i), f_set(spec.scale)));
  }
  const int64_t slot = call.step.slots[token];
  if (slot < 0) return;
  for (int head = 0; head < 2 * spec.kv_heads; head++) {
    prepare_head(call, token, spec.heads + head, x);
    const Cache& cache = head < spec.kv_heads ? call.keys : call.values;
    char* row = cache.row(slot / call.step.block_size, head % spec.kv_heads, slot % call.step.block_size);
    for (int i = 0; i < spec.dim; i += 16) store_any(row, cache.dtype, i, f_load(x + i));
  }
}

// ---- one new token ----------------------------------------------------------------------------------------------

// scores[h][i] = q[h] . key i for HEADS heads; the last keys are repeated to make four. DIM 0: any multiple of 16 or 32.
template <bool BF16, int CACHE, int HEADS, int DIM>
void score_keys(const char* const* keys, int count, const char* q, int any_dim, float* scores) {
  const int dim = DIM > 0 ? DIM : any_dim;
  for (int first = 0; first < count; first += 4) {
    const char* row[4];
    for (int i = 0; i < 4; i++) row[i] = keys[std::min(first + i, count - 1)];
    F acc[HEADS][4];
    for (int h = 0; h < HEADS; h++)
      for (int i = 0; i < 4; i++) acc[h][i] = f_zero();
    for (int at = 0; at < dim; at += BF16 ? 32 : 16)
      for (int i = 0; i < 4; i++) {
#if defined(__AVX512BF16__)
        if constexpr (BF16) {
          for (int h = 0; h < HEADS; h++)
            acc[h][i] = f_dot_bf16(acc[h][i], reinterpret_cast<const uint16_t*>(row[i]) + at,
                                   reinterpret_cast<const uint16_t*>(q) + h * dim + at);
          continue;
        }
#endif
        const F key = load_any(row[i], CACHE, at);
        for (int h = 0; h < HEADS; h++)
          acc[h][i] = f_fma(key, f_load(reinterpret_cast<const float*>(q) + h * dim + at), acc[h][i]);
      }
    for (int h = 0; h < HEADS; h++) f_sum4(scores + h * kSplit + first, acc[h][0], acc[h][1], acc[h][2], acc[h][3]);
  }
}

// Calls body(first head, number of heads as a constant) for up to four heads at a time.
template <class Body>
void each_heads(int group, const Body& body) {
  for (int head = 0; head < group; head += 4) {
    switch (group - head) {
      case 1: body(head, std::integral_constant<int, 1>()); break;
      case 2: body(head, std::integral_constant<int, 2>()); break;
      case 3: body(head, std::integral_constant<int, 3>()); break;
      default: body(head, std::integral_constant<int, 4>());
    }
  }
}

template <bool BF16, int CACHE>
void score_group(const char* const* keys, int count, int group, const char* q, int dim, float* scores) {
  each_heads(group, [&](int head, auto heads) {
    const auto score = dim == 64    ? score_keys<BF16, CACHE, heads.value, 64>
                       : dim == 128 ? score_keys<BF16, CACHE, heads.value, 128>
                                    : score_keys<BF16, CACHE, heads.value, 0>;
    score(keys, count, q + static_cast<int64_t>(head) * dim * (BF16 ? 2 : 4), dim, scores + head * kSplit);
  });
}

// The logit that softmax sees, of keys at `position` and on.
F shape_scores(F score, const Spec& spec, int head, int64_t position) {
  if (spec.softcap > 0.0f) score = f_mul(f_set(spec.softcap), f_tanh(f_mul(score, f_set(1.0f / spec.softcap))));
  if (spec.slopes) {
    alignas(64) static const float lanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    score = f_fma(f_set(spec.slopes[head]), f_add(f_load(lanes), f_set(static_cast<float>(position))), score);
  }
  return score;
}

// In place: scores -> exp(score - maximum). scores has room for a multiple of 16.
void soften(float* scores, int count, const Spec& spec, int head, int64_t position, float& maximum, float& sum) {
  F largest = f_set(kMinusInfinity);
  for (int i = 0; i < count; i += 16) {
    F s = shape_scores(f_load(scores + i), spec, head, position + i);
    s = f_keep(s, 0, count - i, f_set(kMinusInfinity));
    f_store(scores + i, s);
    largest = f_max(largest, s);
  }
  maximum = f_largest(largest);
  F total = f_zero();
  for (int i = 0; i < count; i += 16) {
    const F p = f_keep(f_exp(f_sub(f_load(scores + i), f_set(maximum))), 0, count - i, f_zero());
    f_store(scores + i, p);
    total = f_add(total, p);
  }
  sum = f_sum(total);
}

// out[h][0 .. 16 V) = sum over keys of p[h][key] * value[key], for HEADS heads `p_stride` and `out_stride` apart.
template <int HEADS, int V, int CACHE>
void weigh_values(const char* const* values, int count, int at, const float* p, int64_t p_stride, float* out,
                  int64_t out_stride) {
  F acc[HEADS][V];
  for (int h = 0; h < HEADS; h++)
    for (int v = 0; v < V; v++) acc[h][v] = f_zero();
  for (int key = 0; key < count; key++) {
    F value[V];
    for (int v = 0; v < V; v++) value[v] = load_any(values[key], CACHE, at + 16 * v);
    for (int h = 0; h < HEADS; h++) {
      const F weight = f_set(p[h * p_stride + key]);
      for (int v = 0; v < V; v++) acc[h][v] = f_fma(weight, value[v], acc[h][v]);
    }
  }
  for (int h = 0; h < HEADS; h++)
    for (int v = 0; v < V; v++) f_store(out + h * out_stride + at + 16 * v, acc[h][v]);
}

template <int HEADS, int CACHE>
void weigh_heads(const char* const* values, int count, int dim, const float* p, float* out, int64_t out_stride) {
  int at = 0;
  for (; at + 64 <= dim; at += 64) weigh_values<HEADS, 4, CACHE>(values, count, at, p, kSplit, out, out_stride);
  for (; at < dim; at += 16) weigh_values<HEADS, 1, CACHE>(values, count, at, p, kSplit, out, out_stride);
}

template <int CACHE>
void weigh_group(const char* const* values, int count, int dim, int group, const float* p, float* out,
                 int64_t out_stride) {
  each_heads(group, [&](int head, auto heads) {
    weigh_heads<heads.value, CACHE>(values, count, dim, p + head * kSplit, out + head * out_stride, out_stride);
  });
}

struct DecodeTask {
  int32_t request, kv_head, pieces, piece;
  int64_t first, end;     // keys
  int64_t first_partial;  // of the request and head
};

// Join the pieces of one (request, KV head) and write its rows of the result.
void join_pieces(const Call& call, const DecodeTask& task) {
  const int dim = call.spec.dim;
  const float* partials = call.partials + task.first_partial * call.partial_size();
  const int64_t token = call.step.starts[task.request];
  for (int g = 0; g < call.group; g++) {
    const int head = task.kv_head * call.group + g;
    const float* piece = partials + g * (2 + dim);
    float maximum = call.spec.sinks ? call.spec.sinks[head] : kMinusInfinity;
    for (int i = 0; i < task.pieces; i++) maximum = std::max(maximum, piece[i * call.partial_size()]);
    float sum = call.spec.sinks ? std::exp(call.spec.sinks[head] - maximum) : 0.0f;
    for (int i = 0; i < task.pieces; i++)
      sum += piece[i * call.partial_size() + 1] * std::exp(piece[i * call.partial_size()] - maximum);
    for (int at = 0; at < dim; at += 16) {
      F value = f_zero();
      for (int i = 0; i < task.pieces; i++) {
        const float* from = piece + i * call.partial_size();
        value = f_fma(f_set(std::exp(from[0] - maximum)), f_load(from + 2 + at), value);
      }
      const int64_t to = (token * call.spec.heads + head) * dim + at;
      store_any(call.out, call.dtype, to, f_mul(value, f_set(1.0f / sum)));
    }
  }
}

void attend_piece(const Call& call, const DecodeTask& task) {
  const int dim = call.spec.dim, count = static_cast<int>(task.end - task.first);
  const char *keys[kSplit], *values[kSplit];
  call.cache_rows(call.keys, task.request, task.kv_head, task.first, count, keys);
  call.cache_rows(call.values, task.request, task.kv_head, task.first, count, values);
  float* scores = thread_array<float>(call.group * kSplit + 16);
  float* partial = call.partials + (task.first_partial + task.piece) * call.partial_size();
  const int64_t q_at = call.q_index(task.kv_head, call.step.starts[task.request]);
  const char* q = static_cast<const char*>(call.q) + q_at * (call.bf16 ? 2 : 4);
  const auto score = call.bf16                     ? score_group<kHasBF16Dot, kBF16>
                     : call.keys.dtype == kBF16 ? score_group<false, kBF16>
                                                : score_group<false, kF32>;
  score(keys, count, call.group, q, dim, scores);
  for (int g = 0; g < call.group; g++) {
    float* head = partial + g * (2 + dim);
    soften(scores + g * kSplit, count, call.spec, task.kv_head * call.group + g, task.first, head[0], head[1]);
  }
  const auto weigh = call.values.dtype == kBF16 ? weigh_group<kBF16> : weigh_group<kF32>;
  weigh(values, count, dim, call.group, scores, partial + 2, 2 + dim);
  if (task.pieces == 1) join_pieces(call, task);
}

// ---- several new tokens -----------------------------------------------------------------------------------------

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

struct TileTask {
  int32_t request, kv_head;
  int32_t first, tokens;  // query tokens of the request
};

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
  call.cache_rows(call.keys, task.request, task.kv_head, first, count, cached);
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
  call.cache_rows(call.values, task.request, task.kv_head, first, count, cached);
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
void attend_tile(const Call& call, const TileTask& task) {
  const int dim = call.spec.dim, words = call.bf16 ? dim / 2 : dim, group = call.group;
  const int rows = task.tokens * group, padded = (rows + kMacRows - 1) / kMacRows * kMacRows;
  Workspace space(dim, padded);
  for (int r = 0; r < padded; r++) space.maximum[r] = kMinusInfinity, space.sum[r] = 0.0f, space.scale[r] = 1.0f;
  std::memset(space.weights, 0, static_cast<size_t>(padded) * kTileKeys * 2);
  const int64_t past = call.context(task.request) - call.queries(task.request);
  const int64_t position = past + task.first, end = position + task.tokens;
  const int64_t token = call.step.starts[task.request] + task.first;
  const auto* q = reinterpret_cast<const uint32_t*>(static_cast<const char*>(call.q) +
                                                    call.q_index(task.kv_head, token) * (call.bf16 ? 2 : 4));
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

// ---- the work of one call ---------------------------------------------------------------------------------------

struct WorkList {
  TileTask* tiles;
  DecodeTask* pieces;
  int64_t tile_count = 0, piece_count = 0;
  bool must_join = false;

  // Counts first, so that one buffer holds both lists.
  explicit WorkList(const Call& call) {
    visit(call, [&](const TileTask&) { tile_count++; }, [&](const DecodeTask&) { piece_count++; });
    char* memory = shared_array<char>(0, tile_count * sizeof(TileTask) + piece_count * sizeof(DecodeTask) + 64);
    pieces = reinterpret_cast<DecodeTask*>(memory);
    tiles = reinterpret_cast<TileTask*>(pieces + piece_count);
    tile_count = piece_count = 0;
    visit(call, [&](const TileTask& task) { tiles[tile_count++] = task; },
          [&](const DecodeTask& task) { pieces[piece_count++] = task, must_join |= task.pieces > 1; });
  }

  template <class OnTile, class OnPiece>
  static void visit(const Call& call, const OnTile& on_tile, const OnPiece& on_piece) {
    const int tokens = std::max(1, kTileRows / call.group);
    int64_t partial = 0;
    for (int64_t request = 0; request < call.step.requests; request++) {
      const int64_t queries = call.queries(request), context = call.context(request);
      const int32_t row = static_cast<int32_t>(request);
      if (queries == 1) {
        const int64_t from = call.first_visible(context - 1) / kSplit * kSplit;
        const int32_t pieces = static_cast<int32_t>((context - from + kSplit - 1) / kSplit);
        for (int32_t kv_head = 0; kv_head < call.spec.kv_heads; kv_head++, partial += pieces)
          for (int32_t piece = 0; piece < pieces; piece++) {
            const int64_t first = from + piece * kSplit;
            on_piece(DecodeTask{row, kv_head, pieces, piece, std::max(first, call.first_visible(context - 1)),
                                std::min(first + kSplit, context), partial});
          }
        continue;
      }
      // The tiles with the longest contexts first, so that the threads end together.
      for (int64_t last = queries; last > 0;) {
        const int64_t first = (last - 1) / tokens * tokens;
        for (int32_t kv_head = 0; kv_head < call.spec.kv_heads; kv_head++)
          on_tile(TileTask{row, kv_head, static_cast<int32_t>(first), static_cast<int32_t>(last - first)});
        last = first;
      }
    }
  }
};

void run_task(const Call& call, const WorkList& work, int64_t index) {
  if (index >= work.tile_count) return attend_piece(call, work.pieces[index - work.tile_count]);
#if defined(__AVX512BF16__)
  if (call.bf16) return attend_tile<MacBF16>(call, work.tiles[index]);
#endif
  attend_tile<MacF32>(call, work.tiles[index]);
}

}  // namespace
}  // namespace lm

using namespace lm;

#pragma GCC visibility push(default)
extern "C" {

// The layout is mirrored in attention.py.
struct AttendArgs {
  int64_t threads;
  const Spec* spec;
  const Step* step;
  const void* qkv;
  int64_t dtype, qkv_stride;
  const float *cos, *sin;
  int64_t rotary_half;
  void *keys, *values;
  int64_t cache_dtype, block_stride, head_stride, token_stride;
  void* out;
};

void lm_attend(const AttendArgs* args) {
  const CallLock lock;
  const AttendArgs& a = *args;
  const Spec& spec = *a.spec;
  const Step& step = *a.step;
  const int cache_dtype = static_cast<int>(a.cache_dtype);
  const Cache keys{static_cast<char*>(a.keys), cache_dtype, a.block_stride, a.head_stride, a.token_stride};
  const Cache values{static_cast<char*>(a.values), cache_dtype, a.block_stride, a.head_stride, a.token_stride};
  const bool bf16 = kHasBF16Dot && cache_dtype == kBF16 && spec.dim % 32 == 0;
  Call call{spec, step, a.qkv, static_cast<int>(a.dtype), a.qkv_stride, a.cos, a.sin, a.rotary_half, keys, values, a.out,
            spec.heads / spec.kv_heads, bf16, nullptr, nullptr};
  const size_t q_count = static_cast<size_t>(step.tokens + kMacRows) * spec.heads * spec.dim;
  call.q = shared_buffer(1, q_count * (bf16 ? 2 : 4));
  const WorkList work(call);
  call.partials = shared_array<float>(2, work.piece_count * call.partial_size() + 16);

  constexpr int64_t tokens_per_chunk = 4;
  const int64_t prepare = (step.tokens + tokens_per_chunk - 1) / tokens_per_chunk;
  const auto body = [&](int phase, int64_t chunk) {
    if (phase == 0) {
      const int64_t end = std::min(step.tokens, (chunk + 1) * tokens_per_chunk);
      for (int64_t token = chunk * tokens_per_chunk; token < end; token++) prepare_token(call, token);
    } else if (phase == 1) {
      run_task(call, work, chunk);
    } else if (work.pieces[chunk].piece == 0 && work.pieces[chunk].pieces > 1) {
      join_pieces(call, work.pieces[chunk]);
    }
  };
  const int64_t tasks = work.tile_count + work.piece_count;
  if (work.must_join) {
    parallel(a.threads, {prepare, tasks, work.piece_count}, body);
  } else {
    parallel(a.threads, {prepare, tasks}, body);
  }
}

}  // extern "C"
#pragma GCC visibility pop
