// y = x / rms(x) * (weight + offset): rows of x [rows, C] at any distance -> y [rows, C] dense; C is a multiple of 8.
//
// Compiled by NVRTC without any header, one cubin per set of macros:
//   FP16  0|1   rows in bf16 or fp16
//   VECTORS     vectors of 8 elements that a thread keeps of its row
//
// One block a row, in float32; the sum goes from lanes to warps in a fixed order. On sm_90 it starts before the kernel before
// has ended, and waits; the next kernel may start as early.
typedef unsigned int u32;
typedef unsigned short u16;

__device__ __forceinline__ float half2f(u32 v) { float f; asm("{.reg .b16 a,b; mov.b32 {a,b},%1; cvt.f32.f16 %0,a;}" : "=f"(f) : "r"(v)); return f; }
#if FP16
__device__ __forceinline__ float low(u32 v) { return half2f(v); }
__device__ __forceinline__ float high(u32 v) { return half2f(v >> 16); }
__device__ __forceinline__ u32 two(float a, float b) { u32 r; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a)); return r; }
#else
__device__ __forceinline__ float low(u32 v) { return __uint_as_float(v << 16); }
__device__ __forceinline__ float high(u32 v) { return __uint_as_float(v & 0xffff0000u); }
__device__ __forceinline__ u32 two(float a, float b) { u32 r; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a)); return r; }
#endif
// What a kernel before wrote that may still have run when this one began: only L2 is sure to be coherent.
__device__ __forceinline__ uint4 load(const u16* p) {
  uint4 v; asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p)); return v; }

extern "C" __global__ void __launch_bounds__(1024)
rms_norm(const u16* x, const u16* weight, u16* out, int C, int stride, float eps, float offset) {
  __shared__ float sums[32];
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
  const int tid = threadIdx.x, warps = blockDim.x / 32;
  uint4 w[VECTORS], v[VECTORS];
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  const u16* row = x + (long long)blockIdx.x * stride;
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < VECTORS; i++) {
    const int at = (tid + i * blockDim.x) * 8;
    v[i] = at < C ? load(row + at) : make_uint4(0, 0, 0, 0);
    w[i] = at < C ? load(weight + at) : make_uint4(0, 0, 0, 0);
  }
#pragma unroll
  for (int i = 0; i < VECTORS; i++)
    sum += low(v[i].x) * low(v[i].x) + high(v[i].x) * high(v[i].x) + low(v[i].y) * low(v[i].y) + high(v[i].y) * high(v[i].y)
         + low(v[i].z) * low(v[i].z) + high(v[i].z) * high(v[i].z) + low(v[i].w) * low(v[i].w) + high(v[i].w) * high(v[i].w);
#pragma unroll
  for (int d = 16; d; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
  if (tid % 32 == 0) sums[tid / 32] = sum;
  __syncthreads();
  sum = tid % 32 < warps ? sums[tid % 32] : 0.f;
#pragma unroll
  for (int d = 16; d; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
  const float scale = rsqrtf(sum / (float)C + eps);
  auto normed = [&](u32 a, u32 b) { return two(low(a) * scale * (low(b) + offset), high(a) * scale * (high(b) + offset)); };
#pragma unroll
  for (int i = 0; i < VECTORS; i++) {
    const int at = (tid + i * blockDim.x) * 8;
    if (at < C)
      *(uint4*)(out + (long long)blockIdx.x * C + at) =
          make_uint4(normed(v[i].x, w[i].x), normed(v[i].y, w[i].y), normed(v[i].z, w[i].z), normed(v[i].w, w[i].w));
  }
}
