// What one call of the attention is about; decode.cpp and prefill.cpp compute it, attention.cpp cuts it into tasks.
#pragma once

#include <algorithm>
#include <limits>

#include "pool.h"
#include "simd.h"

namespace lm {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

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

struct Cache {
  char* data;
  int dtype;
  int64_t block, head, token;  // strides in elements

  int64_t size() const { return dtype == kBF16 ? 2 : 4; }
  char* row(int64_t b, int64_t h, int64_t t) const { return data + (b * block + h * head + t * token) * size(); }
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
  float* partials;  // [decode pieces][heads][2 + dim]: maximum, sum, weighted values

  int64_t q_index(int64_t kv_head, int64_t token) const { return (kv_head * step.tokens + token) * group * spec.dim; }
  const char* q_rows(int64_t kv_head, int64_t token) const {
    return static_cast<const char*>(q) + q_index(kv_head, token) * (bf16 ? 2 : 4);
  }
  float* partial(int64_t piece, int64_t head) const { return partials + (piece * spec.heads + head) * (2 + spec.dim); }
  int64_t context(int64_t request) const { return step.context_lens[request]; }
  int64_t queries(int64_t request) const { return step.starts[request + 1] - step.starts[request]; }
  int64_t first_visible(int64_t position) const {
    return spec.window > 0 ? std::max<int64_t>(0, position - spec.window + 1) : 0;
  }
  // body(block, first offset in it, first position, count) for the blocks that hold positions first .. end - 1
  template <class Body>
  void each_block(int64_t request, int64_t first, int64_t end, const Body& body) const {
    const int32_t* table = step.block_tables + request * step.table_stride;
    int64_t block = first / step.block_size, offset = first - block * step.block_size;
    for (; first < end; block++, offset = 0) {
      const int64_t count = std::min(step.block_size - offset, end - first);
      body(static_cast<int64_t>(table[block]), offset, first, static_cast<int>(count));
      first += count;
    }
  }
};

// The logit that softmax sees, of keys at `position` and on.
inline F shape_scores(F score, const Spec& spec, int head, int64_t position) {
  if (spec.softcap > 0.0f) score = f_mul(f_set(spec.softcap), f_tanh(f_mul(score, f_set(1.0f / spec.softcap))));
  if (spec.slopes) {
    alignas(64) static const float lanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    score = f_fma(f_set(spec.slopes[head]), f_add(f_load(lanes), f_set(static_cast<float>(position))), score);
  }
  return score;
}

// One new token of a request against one piece of its context.
struct DecodeTask {
  int32_t request, pieces;
  int32_t first_head, end_head;  // KV heads
  int64_t first, end;            // keys
  int64_t piece, first_piece;    // numbers of this piece and of the request's first among all
};

// Several new tokens of a request.
struct TileTask {
  int32_t request, kv_head;
  int32_t first, tokens;  // query tokens of the request
};

constexpr int64_t kSplit = 128;
constexpr int kTileRows = 96;  // a multiple of every kMacRows

void attend_piece(const Call& call, const DecodeTask& task);
void join_pieces(const Call& call, const DecodeTask& task);  // any of the request's tasks, over its heads
void attend_tile(const Call& call, const TileTask& task);

}  // namespace lm
