// Per-head norms, rotation and cache write, then softmax(q k^T) v over the blocked cache: the tasks of one call.
#include "attention.h"

namespace lm {
namespace {

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

// What there is to do after the tokens are prepared. The lists live in a shared buffer; a first pass counts them.
struct WorkList {
  TileTask* tiles;
  DecodeTask *pieces, *joins;
  int64_t tile_count = 0, task_count = 0, join_count = 0, piece_count = 0;

  WorkList(const Call& call, int64_t threads) {
    for (int64_t request = 0; request < call.step.requests; request++)
      if (call.queries(request) == 1) piece_count += pieces_of(call, request);
    const int64_t kv_heads = call.spec.kv_heads;
    const int64_t most = std::max<int64_t>(1, kv_heads * piece_count / (2 * threads));  // KV heads of one task
    const int64_t cuts = (kv_heads + most - 1) / most;
    int64_t tile_room = 0;
    for (int64_t request = 0; request < call.step.requests; request++)
      if (call.queries(request) > 1) tile_room += (call.queries(request) / tokens_of_tile(call) + 1) * kv_heads;
    const size_t tasks = static_cast<size_t>(piece_count * cuts), joins_room = static_cast<size_t>(call.step.requests);
    char* memory = shared_array<char>(0, tile_room * sizeof(TileTask) + (tasks + joins_room) * sizeof(DecodeTask));
    pieces = reinterpret_cast<DecodeTask*>(memory);
    joins = pieces + tasks;
    tiles = reinterpret_cast<TileTask*>(joins + joins_room);
    int64_t piece = 0;
    for (int64_t request = 0; request < call.step.requests; request++) {
      if (call.queries(request) == 1) {
        add_pieces(call, static_cast<int32_t>(request), (kv_heads + cuts - 1) / cuts, piece);
        piece += pieces_of(call, request);
      } else {
        add_tiles(call, static_cast<int32_t>(request));
      }
    }
  }

 private:
  static int64_t tokens_of_tile(const Call& call) { return std::max(1, kTileRows / call.group); }
  static int64_t first_key(const Call& call, int64_t request) { return call.first_visible(call.context(request) - 1); }
  static int64_t pieces_of(const Call& call, int64_t request) {
    return (call.context(request) + kSplit - 1) / kSplit - first_key(call, request) / kSplit;
  }

  void add_pieces(const Call& call, int32_t request, int64_t heads, int64_t first_piece) {
    const int64_t begin = first_key(call, request), context = call.context(request), count = pieces_of(call, request);
    const int32_t kv_heads = call.spec.kv_heads, number = static_cast<int32_t>(count);
    for (int64_t i = 0; i < count; i++) {
      const int64_t first = (begin / kSplit + i) * kSplit;
      for (int32_t head = 0; head < kv_heads; head += static_cast<int32_t>(heads))
        pieces[task_count++] = DecodeTask{
            request, number, head, std::min(kv_heads, head + static_cast<int32_t>(heads)),
            std::max(first, begin), std::min(first + kSplit, context), first_piece + i, first_piece};
    }
    if (count > 1) joins[join_count++] = DecodeTask{request, number, 0, kv_heads, 0, 0, first_piece, first_piece};
  }

  // The tiles with the longest contexts first, so that the threads end together.
  void add_tiles(const Call& call, int32_t request) {
    const int64_t tokens = tokens_of_tile(call);
    for (int64_t last = call.queries(request); last > 0;) {
      const int64_t first = (last - 1) / tokens * tokens;
      for (int32_t kv_head = 0; kv_head < call.spec.kv_heads; kv_head++)
        tiles[tile_count++] =
            TileTask{request, kv_head, static_cast<int32_t>(first), static_cast<int32_t>(last - first)};
      last = first;
    }
  }
};

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
  const WorkList work(call, a.threads);
  call.partials = shared_array<float>(2, work.piece_count * spec.heads * (2 + spec.dim) + 16);

  constexpr int64_t tokens_per_chunk = 4;
  const int64_t prepare = (step.tokens + tokens_per_chunk - 1) / tokens_per_chunk;
  const auto body = [&](int phase, int64_t chunk) {
    if (phase == 0) {
      const int64_t end = std::min(step.tokens, (chunk + 1) * tokens_per_chunk);
      for (int64_t token = chunk * tokens_per_chunk; token < end; token++) prepare_token(call, token);
    } else if (phase == 2) {
      join_pieces(call, work.joins[chunk]);
    } else if (chunk < work.tile_count) {
      attend_tile(call, work.tiles[chunk]);
    } else {
      attend_piece(call, work.pieces[chunk - work.tile_count]);
    }
  };
  const int64_t tasks = work.tile_count + work.task_count;
  if (work.join_count > 0) {
    parallel(a.threads, {prepare, tasks, work.join_count}, body);
  } else {
    parallel(a.threads, {prepare, tasks}, body);
  }
}

}  // extern "C"
#pragma GCC visibility pop
