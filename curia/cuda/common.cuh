/*
What every CUDA layer shares: number types, error checks, sums over warps and blocks.

  floatX            activations and the weights that matrix multiplies see: bf16, or float with -DCURIA_FP32 (the checker's build)
  logitX            prototype logits and their operands, unit vectors: fp16 for its mantissa, or float with -DCURIA_FP32
  Pack              16 bytes of one type, read and written at once (load_pack, store_pack); load4, store4: four elements as float4
  CUDA_CHECK        an API call that must succeed, or fail() names the step and the call
  launched          after every kernel launch: its error, with its name
  warp_sum, warp_max, block_sum, block_max     the same result in every thread, in an order that never changes

Kernels stand above their launchers. A launcher's arguments are outputs, inputs, sizes, stream; row-major; all on the device.
No float atomics anywhere: a run gives the same bits twice.
*/
#ifndef CURIA_CUDA_COMMON_H
#define CURIA_CUDA_COMMON_H

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include "../log.h"

#ifdef CURIA_FP32
typedef float floatX;
typedef float logitX;
#else
typedef __nv_bfloat16 floatX;
typedef __half logitX;
#endif

enum { WARP = 32 };

// Where the program is, for messages: errors of asynchronous work surface at a later call.
static long long cuda_step;
static const char *cuda_kernel = "none";

static inline void cuda_check(cudaError_t error, const char *call) {
    if (error == cudaSuccess) return;
    if (error == cudaErrorMemoryAllocation)
        fail(STATUS_FAILED, "out of GPU memory in step %lld, at %s; use a smaller optim.batch_size", cuda_step, call);
    fail(STATUS_FAILED, "CUDA error in step %lld, at %s (last kernel launched: %s): %s", cuda_step, call, cuda_kernel,
         cudaGetErrorString(error));
}
#define CUDA_CHECK(call) cuda_check(call, #call)

static inline void launched(const char *kernel) {
    cuda_kernel = kernel;
    cuda_check(cudaGetLastError(), kernel);
}

static inline int divide_up(long long n, int d) { return (int)((n + d - 1) / d); }

__device__ static inline float to_float(float x) { return x; }
__device__ static inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ static inline float to_float(__half x) { return __half2float(x); }
template <class T> __device__ static inline T from_float(float x);
template <> __device__ inline float from_float<float>(float x) { return x; }
template <> __device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16(x); }
template <> __device__ inline __half from_float<__half>(float x) { return __float2half(x); }

template <class T> struct alignas(16) Pack {
    enum { N = 16 / sizeof(T) };
    T v[N];
};
template <class T> __device__ static inline Pack<T> load_pack(const T *p) {
    Pack<T> x;
    *(int4 *)&x = *(const int4 *)p;
    return x;
}
template <class T> __device__ static inline void store_pack(T *p, const Pack<T> &x) { *(int4 *)p = *(const int4 *)&x; }

__device__ static inline float4 load4(const float *p) { return *(const float4 *)p; }
__device__ static inline void store4(float *p, float4 x) { *(float4 *)p = x; }
struct alignas(8) Four { __nv_bfloat16 v[4]; };
__device__ static inline float4 load4(const __nv_bfloat16 *p) {
    Four x;
    *(int2 *)&x = *(const int2 *)p;
    return make_float4(to_float(x.v[0]), to_float(x.v[1]), to_float(x.v[2]), to_float(x.v[3]));
}
__device__ static inline void store4(__nv_bfloat16 *p, float4 x) {
    Four y = {{__float2bfloat16(x.x), __float2bfloat16(x.y), __float2bfloat16(x.z), __float2bfloat16(x.w)}};
    *(int2 *)p = *(const int2 *)&y;
}

__device__ static inline float warp_sum(float x) {
    for (int offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}
__device__ static inline float warp_max(float x) {
    for (int offset = WARP / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
    return x;
}

// Over a block of whole warps, at most 1024 threads. Two barriers: the first protects the last call's results.
__device__ static inline float block_sum(float x) {
    __shared__ float part[WARP];
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    x = warp_sum(x);
    __syncthreads();
    if (lane == 0) part[warp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? part[lane] : 0);
}
__device__ static inline float block_max(float x) {
    __shared__ float part[WARP];
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    x = warp_max(x);
    __syncthreads();
    if (lane == 0) part[warp] = x;
    __syncthreads();
    return warp_max(lane < warps ? part[lane] : -INFINITY);
}

#endif
