/*
PTX instructions, one function each: tensor-core products of 16-bit numbers and what feeds them. Nothing else in the CUDA code
is assembly. The emulator (dev/emu) supplies C for each of them; the checker's build has the same fragments of floats.

  Pair                              two neighbours of a fragment: a register of two 16-bit numbers, or two floats
  to_pair, to_floats                between two floats and a Pair of floatX
  ldmatrix_x4, ldmatrix_x4_trans    four 8x8 matrices from shared memory
  mma                               c[16,8] += a[16,16] b[16,8], of floatX
  mma_f16                           the same of fp16
  cp_async_16, cp_async_commit, cp_async_wait      copies of 16 bytes to shared memory that run beside the program
  exp2_fast                         2^x to the precision of the build

Fragments, with g = lane / 4 and t = lane % 4 (PTX manual, "Matrix Fragments for mma.m16n8k16"):
  a[0..3]: rows g, g + 8, g, g + 8; columns 2t, 2t + 1 of the left half (a[0], a[1]) and of the right half
  b[0..1]: rows 2t, 2t + 1 of the upper and of the lower half; column g
  c[0..3]: row g columns 2t, 2t + 1; row g + 8 columns 2t, 2t + 1
*/
#ifndef CURIA_CUDA_PTX_H
#define CURIA_CUDA_PTX_H

#include <stdint.h>
#include <string.h>
#include "common.cuh"

#ifdef CURIA_FP32
typedef float2 Pair;
__device__ static inline Pair to_pair(float x, float y) { return make_float2(x, y); }
__device__ static inline float2 to_floats(Pair pair) { return pair; }
#else
typedef uint32_t Pair;
__device__ static inline Pair to_pair(float x, float y) {
    __nv_bfloat162 both = __floats2bfloat162_rn(x, y);
    Pair pair;
    memcpy(&pair, &both, sizeof pair);
    return pair;
}
__device__ static inline float2 to_floats(Pair pair) {
    __nv_bfloat162 both;
    memcpy(&both, &pair, sizeof pair);
    return __bfloat1622float2(both);
}
#endif

#ifndef CURIA_EMULATOR
__device__ static inline uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }
#endif

// Lane i gives the address of row i % 8 of matrix i / 8. Matrix m leaves columns 2t, 2t + 1 of row g in r[m].
__device__ static inline void ldmatrix_x4(uint32_t r[4], const void *row) {
#ifdef CURIA_EMULATOR
    emu_ldmatrix_x4(r, row);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
#endif
}

// The same, but rows 2t, 2t + 1 of column g.
__device__ static inline void ldmatrix_x4_trans(uint32_t r[4], const void *row) {
#ifdef CURIA_EMULATOR
    emu_ldmatrix_x4_trans(r, row);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
#endif
}

__device__ static inline void mma(float c[4], const uint32_t a[4], const uint32_t b[2]) {
#ifdef CURIA_EMULATOR
    emu_mma_m16n8k16_bf16(c, a, b);
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

__device__ static inline void mma_f16(float c[4], const uint32_t a[4], const uint32_t b[2]) {
#ifdef CURIA_EMULATOR
    emu_mma_m16n8k16_f16(c, a, b);
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// The checker's build: the same lanes hold the same elements, as floats. The emulator has a quicker mma, which a test compares.
__device__ static inline const float *row_of_lane(const float *row, int lane) {
    return (const float *)__shfl_sync(0xffffffffu, (long long)row, lane);
}
__device__ static inline void ldmatrix_x4(float2 r[4], const float *row) {
    int lane = threadIdx.x % WARP;
    for (int m = 0; m < 4; m++) r[m] = *(const float2 *)(row_of_lane(row, 8 * m + lane / 4) + 2 * (lane % 4));
}
__device__ static inline void ldmatrix_x4_trans(float2 r[4], const float *row) {
    int lane = threadIdx.x % WARP, from = 2 * (lane % 4);
    for (int m = 0; m < 4; m++) {
        const float *even = row_of_lane(row, 8 * m + from), *odd = row_of_lane(row, 8 * m + from + 1);
        r[m] = make_float2(even[lane / 4], odd[lane / 4]);
    }
}
__device__ static inline float2 pair_of_lane(float2 pair, int lane) {
    long long bits;
    memcpy(&bits, &pair, sizeof bits);
    bits = __shfl_sync(0xffffffffu, bits, lane);
    memcpy(&pair, &bits, sizeof bits);
    return pair;
}
__device__ static inline void mma_by_shuffles(float c[4], const float2 a[4], const float2 b[2]) {
    int lane = threadIdx.x % WARP, row = lane / 4 * 4, column = lane % 4 * 8;
    #pragma unroll
    for (int half = 0; half < 2; half++)
        #pragma unroll 1                    // else the compiler begins so many shuffles that registers do not suffice
        for (int t = 0; t < 4; t++) {       // the lane of four that holds k = 8 half + 2t, 2t + 1
            float2 upper = pair_of_lane(a[2 * half], row + t), lower = pair_of_lane(a[2 * half + 1], row + t);
            float2 even = pair_of_lane(b[half], column + t), odd = pair_of_lane(b[half], column + 4 + t);
            c[0] = fmaf(upper.y, even.y, fmaf(upper.x, even.x, c[0]));
            c[1] = fmaf(upper.y, odd.y, fmaf(upper.x, odd.x, c[1]));
            c[2] = fmaf(lower.y, even.y, fmaf(lower.x, even.x, c[2]));
            c[3] = fmaf(lower.y, odd.y, fmaf(lower.x, odd.x, c[3]));
        }
}
__device__ static inline void mma(float c[4], const float2 a[4], const float2 b[2]) {
#ifdef CURIA_EMULATOR
    emu_mma_m16n8k16_f32(c, a, b);
#else
    mma_by_shuffles(c, a, b);
#endif
}

// Copies `bytes` (16 or 0) and fills up to 16 with zeros; there once its group has been waited for, for other threads after a
// barrier as well.
__device__ static inline void cp_async_16(void *to, const void *from, int bytes) {
#ifdef CURIA_EMULATOR
    emu_cp_async_16(to, from, bytes);
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
#endif
}

// This thread's copies since the last commit become a group.
__device__ static inline void cp_async_commit(void) {
#ifdef CURIA_EMULATOR
    emu_cp_async_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most N of this thread's groups are under way.
template <int N> __device__ static inline void cp_async_wait(void) {
#ifdef CURIA_EMULATOR
    emu_cp_async_wait(N);
#else
    asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");
#endif
}

__device__ static inline float exp2_fast(float x) {
#if defined(CURIA_EMULATOR) || defined(CURIA_FP32)
    return exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

#endif
