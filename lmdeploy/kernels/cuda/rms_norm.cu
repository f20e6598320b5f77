// y = x / rms(x) * (weight + offset): rows of x [rows, C] at any distance -> y [rows, C] dense; C is a multiple of 8.
//
// Compiled by NVRTC, one cubin per set of macros (functions that are not here are in common.cuh):
//   FP16  0|1   rows in bf16 or fp16
//   VECTORS     vectors of 8 elements that a thread keeps of its row
//
// One block a row, in float32; the sum goes from lanes to warps in a fixed order. On sm_90 it starts before the kernel before
// has ended, and waits; the next kernel may start as early.
#define SHIFTED_HI
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(1024)
rms_norm(const u16* x, const u16* weight, u16* out, int C, int stride, float eps, float offset) {
  __shared__ float sums[32];
  NEXT_MAY_START();
  const int tid = threadIdx.x, warps = blockDim.x / 32;
  uint4 w[VECTORS], v[VECTORS];
  WAIT_FOR_PREVIOUS();
  const u16* row = x + (long long)blockIdx.x * stride;
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < VECTORS; i++) {
    const int at = (tid + i * blockDim.x) * 8;
    v[i] = at < C ? ldg128(row + at) : make_uint4(0, 0, 0, 0);
    w[i] = at < C ? ldg128(weight + at) : make_uint4(0, 0, 0, 0);
  }
#pragma unroll
  for (int i = 0; i < VECTORS; i++)
    sum += lo(v[i].x) * lo(v[i].x) + hi(v[i].x) * hi(v[i].x) + lo(v[i].y) * lo(v[i].y) + hi(v[i].y) * hi(v[i].y)
         + lo(v[i].z) * lo(v[i].z) + hi(v[i].z) * hi(v[i].z) + lo(v[i].w) * lo(v[i].w) + hi(v[i].w) * hi(v[i].w);
#pragma unroll
  for (int d = 16; d; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
  if (tid % 32 == 0) sums[tid / 32] = sum;
  __syncthreads();
  sum = tid % 32 < warps ? sums[tid % 32] : 0.f;
#pragma unroll
  for (int d = 16; d; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
  const float scale = rsqrtf(sum / (float)C + eps);
  auto normed = [&](u32 a, u32 b) { return pack16(lo(a) * scale * (lo(b) + offset), hi(a) * scale * (hi(b) + offset)); };
#pragma unroll
  for (int i = 0; i < VECTORS; i++) {
    const int at = (tid + i * blockDim.x) * 8;
    if (at < C)
      *(uint4*)(out + (long long)blockIdx.x * C + at) =
          make_uint4(normed(v[i].x, w[i].x), normed(v[i].y, w[i].y), normed(v[i].z, w[i].z), normed(v[i].w, w[i].w));
  }
}
