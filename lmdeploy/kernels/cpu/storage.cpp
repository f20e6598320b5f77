// Packing of weights, and rows of a packed embedding.
#include <algorithm>

#include "affine.h"
#include "pool.h"

namespace lm {
namespace {

// q [n, k], one byte per weight -> the tile's packed form; rows behind the last are zero.
void pack_tile(const uint8_t* q, int64_t n, int64_t k, int bits, int64_t tile, uint8_t* out) {
  for (int64_t row = 0; row < 16; row++) {
    const int64_t from = tile * 16 + row;
    if (from >= n) {
      for (int64_t i = 0; i < k * bits / 32; i++) std::memset(out + i * 64 + row * 4, 0, 4);
      continue;
    }
    const uint8_t* source = q + from * k;
    uint8_t* to = out + row * 4;
    if (bits == 8) {
      for (int64_t i = 0; i < k; i += 4, to += 64) std::memcpy(to, source + i, 4);
      continue;
    }
    for (int64_t i = 0; i < k; i += 8, to += 64) {
      uint32_t low, high;
      std::memcpy(&low, source + i, 4);
      std::memcpy(&high, source + i + 4, 4);
      const uint32_t both = low | high << 4;
      std::memcpy(to, &both, 4);
    }
  }
}

float meta_value(const uint8_t* p, bool wide, int64_t index) {
  if (!wide) return f16_to_float(reinterpret_cast<const uint16_t*>(p)[index]);
  return reinterpret_cast<const float*>(p)[index];
}

void embed_row(const Weight& w, int64_t row, void* out, int dtype, int64_t at) {
  const int64_t lane = row % 16;
  const uint8_t* q = w.tile_q(row / 16) + lane * 4;
  const uint8_t* meta = w.tile_meta(row / 16);
  const int per_load = w.bits == 4 ? 8 : 4;
  for (int64_t k = 0; k < w.k; k += per_load, q += 64) {
    const uint8_t* group = meta + k / w.group * w.meta_stride;
    const float scale = meta_value(group, w.scale_is_f32, lane);
    const float zero = w.aux == kZeroByte ? group[16 * (w.scale_is_f32 ? 4 : 2) + lane] : w.zero;
    const float minimum = w.aux == kMinimum ? meta_value(group, w.scale_is_f32, 16 + lane) : -zero * scale;
    for (int i = 0; i < per_load; i++) {
      const int value = w.bits == 8 ? q[i] : i < 4 ? q[i] & 15 : q[i - 4] >> 4;
      store_one(out, dtype, at + k + i, static_cast<float>(value) * scale + minimum);
    }
  }
}

}  // namespace
}  // namespace lm

using namespace lm;

#pragma GCC visibility push(default)
extern "C" {

const char* lm_instruction_set() { return instruction_set_name(); }

struct PackArgs {
  int64_t threads;
  const uint8_t* q;
  int64_t n, k, bits;
  uint8_t* out;
};

void lm_pack(const PackArgs* args) {
  const CallLock lock;
  const PackArgs& a = *args;
  const int64_t tiles = (a.n + 15) / 16, step = std::max<int64_t>(1, tiles / (a.threads * 4));
  parallel(a.threads, {(tiles + step - 1) / step}, [&](int, int64_t chunk) {
    for (int64_t tile = chunk * step; tile < std::min(tiles, (chunk + 1) * step); tile++)
      pack_tile(a.q, a.n, a.k, static_cast<int>(a.bits), tile, a.out + tile * (a.bits * 2 * a.k));
  });
}

struct EmbedArgs {
  int64_t threads;
  const Weight* weight;
  const int64_t* ids;
  int64_t tokens;
  void* out;
  int64_t dtype;
};

// out [tokens, k] = rows `ids` of the weight; an id out of range gives zeros.
void lm_embed(const EmbedArgs* args) {
  const CallLock lock;
  const EmbedArgs& a = *args;
  const Weight& w = *a.weight;
  const int dtype = static_cast<int>(a.dtype);
  constexpr int64_t step = 8;
  parallel(a.threads, {(a.tokens + step - 1) / step}, [&](int, int64_t chunk) {
    for (int64_t token = chunk * step; token < std::min(a.tokens, (chunk + 1) * step); token++) {
      if (a.ids[token] >= 0 && a.ids[token] < w.n) {
        embed_row(w, a.ids[token], a.out, dtype, token * w.k);
      } else {
        for (int64_t i = 0; i < w.k; i++) store_one(a.out, dtype, token * w.k + i, 0.0f);
      }
    }
  });
}

}  // extern "C"
#pragma GCC visibility pop
