// Attention of one new token. Its keys are cut into pieces of kSplit, whatever the batch, and the pieces are joined, so
// that the result depends on nothing but the request. A task reads its blocks in the order of their addresses: all heads'
// keys of a block lie together, and so do their values.
#include <type_traits>

#include "attention.h"

namespace lm {
namespace {

constexpr int64_t kScoreStride = kSplit + 16;  // room for sums of four at the end of a block
constexpr int64_t kAheadBytes = 1024;

// `count` rows, `stride` bytes apart.
struct Run {
  const char* data;
  int64_t stride;
  int count;
  const char* row(int i) const { return data + i * stride; }
};

// Pieces of blocks are shorter than what the hardware needs to notice a stream.
inline void prefetch_ahead(const char* row, int bytes) {
  for (int at = 0; at < bytes; at += 64) prefetch(row + kAheadBytes + at);
}

// scores[h][i] = q[h] . key i for HEADS heads; the last keys are repeated to make four. DIM 0: any multiple of 16 or 32.
template <bool BF16, int CACHE, int HEADS, int DIM>
void score_keys(const Run& keys, const char* q, int any_dim, float* scores) {
  const int dim = DIM > 0 ? DIM : any_dim;
  for (int first = 0; first < keys.count; first += 4) {
    const char* row[4];
    for (int i = 0; i < 4; i++) {
      row[i] = keys.row(std::min(first + i, keys.count - 1));
      prefetch_ahead(row[i], dim * (CACHE == kBF16 ? 2 : 4));
    }
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
    for (int h = 0; h < HEADS; h++)
      f_sum4(scores + h * kScoreStride + first, acc[h][0], acc[h][1], acc[h][2], acc[h][3]);
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
void score_group(const Run& keys, int group, const char* q, int dim, float* scores) {
  each_heads(group, [&](int head, auto heads) {
    const auto score = dim == 64    ? score_keys<BF16, CACHE, heads.value, 64>
                       : dim == 128 ? score_keys<BF16, CACHE, heads.value, 128>
                                    : score_keys<BF16, CACHE, heads.value, 0>;
    score(keys, q + static_cast<int64_t>(head) * dim * (BF16 ? 2 : 4), dim, scores + head * kScoreStride);
  });
}

// In place: scores -> exp(score - maximum). scores has room for a multiple of 16.
void soften(float* scores, int count, const Spec& spec, int head, int64_t position, float* maximum_and_sum) {
  F largest = f_set(kMinusInfinity);
  for (int i = 0; i < count; i += 16) {
    F s = shape_scores(f_load(scores + i), spec, head, position + i);
    s = f_keep(s, 0, count - i, f_set(kMinusInfinity));
    f_store(scores + i, s);
    largest = f_max(largest, s);
  }
  const float maximum = f_largest(largest);
  F total = f_zero();
  for (int i = 0; i < count; i += 16) {
    const F p = f_keep(f_exp(f_sub(f_load(scores + i), f_set(maximum))), 0, count - i, f_zero());
    f_store(scores + i, p);
    total = f_add(total, p);
  }
  maximum_and_sum[0] = maximum;
  maximum_and_sum[1] = f_sum(total);
}

// out[h][0 .. 16 V) += sum over keys of p[h][key] * value[key], for HEADS heads.
template <int HEADS, int V, int CACHE>
void weigh_values(const Run& values, int at, int row_bytes, const float* p, float* out, int64_t out_stride) {
  F acc[HEADS][V];
  for (int h = 0; h < HEADS; h++)
    for (int v = 0; v < V; v++) acc[h][v] = f_load(out + h * out_stride + at + 16 * v);
  for (int key = 0; key < values.count; key++) {
    const char* row = values.row(key);
    if (at == 0) prefetch_ahead(row, row_bytes);
    F value[V];
    for (int v = 0; v < V; v++) value[v] = load_any(row, CACHE, at + 16 * v);
    for (int h = 0; h < HEADS; h++) {
      const F weight = f_set(p[h * kScoreStride + key]);
      for (int v = 0; v < V; v++) acc[h][v] = f_fma(weight, value[v], acc[h][v]);
    }
  }
  for (int h = 0; h < HEADS; h++)
    for (int v = 0; v < V; v++) f_store(out + h * out_stride + at + 16 * v, acc[h][v]);
}

template <int CACHE>
void weigh_group(const Run& values, int dim, int group, const float* p, float* out, int64_t out_stride) {
  const int bytes = dim * (CACHE == kBF16 ? 2 : 4);
  each_heads(group, [&](int head, auto heads) {
    const float* from = p + head * kScoreStride;
    float* to = out + head * out_stride;
    int at = 0;
    for (; at + 64 <= dim; at += 64) weigh_values<heads.value, 4, CACHE>(values, at, bytes, from, to, out_stride);
    for (; at < dim; at += 16) weigh_values<heads.value, 1, CACHE>(values, at, bytes, from, to, out_stride);
  });
}

// body(kv_head, its rows) block by block.
template <class Body>
void each_run(const Call& call, const Cache& cache, const DecodeTask& task, const Body& body) {
  call.each_block(task.request, task.first, task.end, [&](int64_t block, int64_t offset, int64_t position, int count) {
    for (int kv_head = task.first_head; kv_head < task.end_head; kv_head++)
      body(kv_head, position - task.first, Run{cache.row(block, kv_head, offset), cache.token * cache.size(), count});
  });
}

}  // namespace

void join_pieces(const Call& call, const DecodeTask& task) {
  const int dim = call.spec.dim;
  const int64_t token = call.step.starts[task.request];
  float* weights = thread_array<float>(task.pieces);
  for (int64_t head = task.first_head * call.group; head < task.end_head * call.group; head++) {
    float maximum = call.spec.sinks ? call.spec.sinks[head] : kMinusInfinity;
    for (int i = 0; i < task.pieces; i++) maximum = std::max(maximum, call.partial(task.first_piece + i, head)[0]);
    float sum = call.spec.sinks ? std::exp(call.spec.sinks[head] - maximum) : 0.0f;
    for (int i = 0; i < task.pieces; i++) {
      const float* piece = call.partial(task.first_piece + i, head);
      weights[i] = std::exp(piece[0] - maximum);
      sum += weights[i] * piece[1];
    }
    for (int at = 0; at < dim; at += 16) {
      F value = f_zero();
      for (int i = 0; i < task.pieces; i++)
        value = f_fma(f_set(weights[i]), f_load(call.partial(task.first_piece + i, head) + 2 + at), value);
      store_any(call.out, call.dtype, (token * call.spec.heads + head) * dim + at, f_mul(value, f_set(1.0f / sum)));
    }
  }
}

void attend_piece(const Call& call, const DecodeTask& task) {
  const int dim = call.spec.dim, group = call.group, count = static_cast<int>(task.end - task.first);
  const int64_t token = call.step.starts[task.request], out_stride = 2 + dim;
  float* scores = thread_array<float>((task.end_head - task.first_head) * group * kScoreStride);
  const auto scores_of = [&](int kv_head) { return scores + (kv_head - task.first_head) * group * kScoreStride; };

  const auto score = call.bf16                  ? score_group<kHasBF16Dot, kBF16>
                     : call.keys.dtype == kBF16 ? score_group<false, kBF16>
                                                : score_group<false, kF32>;
  each_run(call, call.keys, task, [&](int kv_head, int64_t at, const Run& keys) {
    score(keys, group, call.q_rows(kv_head, token), dim, scores_of(kv_head) + at);
  });
  for (int head = task.first_head * group; head < task.end_head * group; head++) {
    float* partial = call.partial(task.piece, head);
    soften(scores + (head - task.first_head * group) * kScoreStride, count, call.spec, head, task.first, partial);
    std::fill(partial + 2, partial + 2 + dim, 0.0f);
  }
  const auto weigh = call.values.dtype == kBF16 ? weigh_group<kBF16> : weigh_group<kF32>;
  each_run(call, call.values, task, [&](int kv_head, int64_t at, const Run& values) {
    float* out = call.partial(task.piece, kv_head * group) + 2;
    weigh(values, dim, group, scores_of(kv_head) + at, out, out_stride);
  });
  if (task.pieces == 1) join_pieces(call, task);
}

}  // namespace lm
