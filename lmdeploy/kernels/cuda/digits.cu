// Rows x[M,K] of 16 bits, times an RMS norm's weights if there is one, as the integers that byte_gemm.cu multiplies (DIGITS in
// common.cuh). For every unit of 128 columns: [NT tokens x 2 digits][128 bytes], in pieces of 16 bytes that are swizzled by the
// row's number modulo 8, as wgmma wants its right operand; then a power of two and the sum of the integers, [group][NT tokens].
//
// Compiled by NVRTC, one cubin per set of macros (functions that are not here are in common.cuh):
//   K              columns, a multiple of 128              GROUP 32..128  columns that share a scale of the weight
//   NT    8..64    tokens, those from M on are zeros       NORM  0|1      scales[token] becomes 1 / rms(x)
//   FP16  0|1      activations bf16 or fp16                NORM_OFFSET    added to the norm's weights
//   UNITS_AT_ONCE  of a token, that a warp without a norm has; with one a block has a token, a warp an eighth of its columns
#define DIGITS
#include "common.cuh"

#define UNITS (K / 128)
#define UNIT_BYTES (NT * 256 + NT * 8 * GROUPS)

extern "C" __global__ void __launch_bounds__(EIGHTHS * 32)
digits(const u16* x, char* out, float* scales, const u16* __restrict__ gamma, float eps, int M, int ldx) {
  __shared__ float squares[EIGHTHS];
  const int token = blockIdx.x % NT, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane >> 2, t = lane & 3;
#if NORM
  const int first = warp * UNITS / EIGHTHS, units = (warp + 1) * UNITS / EIGHTHS - first;
#else
  const int first = (blockIdx.x / NT * EIGHTHS + warp) * UNITS_AT_ONCE, units = min(UNITS_AT_ONCE, UNITS - first);
#endif
  NEXT_MAY_START();
  WAIT_FOR_PREVIOUS();
  float squared = 0.f;
  for (int b = 0; b < units; b += 4) {
    const int unit = b + g / 2, column = (first + unit) * 128 + t * 8, row = token * 2 + g % 2;
    float f[4][8];
    u32 words[8];
    int sums[GROUPS];
    load(x + (long long)token * ldx + column, unit < units && token < M, f);
    if (NORM) squared += times_norm(gamma + column, unit < units, f);
    const float power = __shfl_sync(~0u, to_digits(f, g % 2, words), t * 8);
    sum_groups(words, sums);
    char* const to = out + (long long)(first + unit) * UNIT_BYTES + row * 128;
#pragma unroll
    for (int w = 0; w < 8; w++) if (unit < units) *(u32*)(to + (w ^ (row & 7)) * 16 + t * 4) = words[w];
    if (g == 0 && b + t < units) {
      char* const more = out + (long long)(first + b + t) * UNIT_BYTES + NT * 256 + token * 8;
#pragma unroll
      for (int p = 0; p < GROUPS; p++) *(uint2*)(more + p * NT * 8) = make_uint2(__float_as_uint(power), (u32)sums[p]);
    }
  }
#if NORM
  squared = 0.5f * sum_of_warp(squared);      // two lanes have each column
  if (lane == 0) squares[warp] = squared;
  __syncthreads();
  if (threadIdx.x == 0) scales[token] = one_over_rms(squares, K, eps);
#endif
}
