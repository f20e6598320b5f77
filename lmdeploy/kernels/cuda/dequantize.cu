// Packed 4-bit units (see skinny_gemm.cu) -> a plain 16-bit matrix [N,K]: one warp per unit of 16 rows x 128 columns,
// 16-byte loads and stores. Macros: GROUP, ZERO, FP16 as there.
// Functions that are not here are in common.cuh.
#include "common.cuh"

#define GROUPS (128 / GROUP)
#define UNIT (1024 + 64 * GROUPS)

extern "C" __global__ void __launch_bounds__(256)
dequantize(const char* __restrict__ w, u16* __restrict__ y, int N, int K) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, NT = (N + 15) >> 4, KU = K >> 7;
  const long long number = (long long)blockIdx.x * 8 + (threadIdx.x >> 5);
  if (number >= (long long)NT * KU) return;
  const int ku = (int)(number % KU), tile = (int)(number / KU);       // a block writes along rows
  const char* unit = w + ((long long)ku * NT + tile) * UNIT;
  const uint4 first = *(const uint4*)(unit + lane * 16), second = *(const uint4*)(unit + 512 + lane * 16);
  const u32 words[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int h = 0; h < 2; h++) {                                     // rows g and g + 8
      const u32 v = *(const u32*)(unit + 1024 + (i * GROUPS / 4) * 64 + (g + 8 * h) * 4);
      const float s = half2f(v), minimum = ZERO ? -(float)(v >> 16) * s : half2f(v >> 16);
      float f[8];
#pragma unroll
      for (int j = 0; j < 8; j++)                                     // column 32 i + 8 t + j: step 2 i + j / 4
        f[j] = (float)(words[2 * i + j / 4] >> (4 * (2 * (j % 4 / 2) + h) + 16 * (j % 2)) & 15) * s + minimum;
      const int row = tile * 16 + g + 8 * h;
      if (row < N)
        *(uint4*)(y + (long long)row * K + ku * 128 + i * 32 + t * 8) =
            make_uint4(pack16(f[0], f[1]), pack16(f[2], f[3]), pack16(f[4], f[5]), pack16(f[6], f[7]));
    }
}
