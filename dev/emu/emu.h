/*
CUDA on the CPU: kernels run as C++ on fibers, so that a machine without a GPU can test the CUDA backend. No measure of speed.

Build and run, from the repository root (convert.cc first, by any C++17 compiler, as build/emu/convert):
  mkdir -p build/emu/curia/cuda; for f in train_curia.cu curia/cuda/\*.cuh; do build/emu/convert $f > build/emu/$f; done
  F="-std=c++17 -O1 -g -fno-strict-aliasing -fopenmp -Wall -Wextra -Wno-sign-compare -Wno-missing-field-initializers
     -DCURIA_EMULATOR -Ibuild/emu -Idev/emu -I. -Icuria/cuda -Idev/test"
  g++ $F -c dev/emu/emu.cc dev/emu/cublas.cc; g++ $F -x c++ -c build/emu/train_curia.cu; then link all three.
A test x.cu is converted to build/emu/x.cu and built the same way. -fsanitize=address,undefined on all of them works.

  CURIA_EMU_ORDER     forward (default), reverse, or a number: order of lanes, warps, blocks and streams; results must not change
  CURIA_EMU_MEMORY    bytes of device memory (8 GiB)
  CURIA_EMU_SMS       multiprocessors (4)
  CURIA_EMU_DEVICES   0: no device (1)

One fiber a CUDA thread, one block at a time on the calling thread. A warp runs until it stands at a block barrier, then the next
warp. Device, pinned and shared memory begin as 0xff bytes (NaN); device memory is out of the host's reach but for the API.
Streams are queues that run at a synchronisation only (emu.cc). What a kernel does wrong ends the program with status 1.

  emu::launch, emu::shared, emu::dynamic_shared     what convert.cc writes
  emu::collective, emu::barrier, emu::error         what intrinsics are made of
  __syncthreads, __syncwarp, __shfl_*sync, __ballot_sync, __any_sync, __all_sync, math and bit intrinsics
  emu_ldmatrix_x4, emu_ldmatrix_x4_trans, emu_ldmatrix_x2, emu_ldmatrix_x2_trans, emu_mma_m16n8k16_bf16, emu_mma_m16n8k16_f16,
  emu_mma_m16n8k16_f32, emu_cp_async_16, emu_cp_async_commit, emu_cp_async_wait       for curia/cuda/ptx.cuh
*/
#ifndef EMU_H
#define EMU_H

#include "cuda_runtime.h"
#include <functional>
#include <tuple>

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
static const int warpSize = 32;

namespace emu {

struct Shape {
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
    Shape(dim3 grid, dim3 block, size_t shared = 0, cudaStream_t stream = 0)
        : grid(grid), block(block), shared(shared), stream(stream) {}
};

[[noreturn]] __attribute__((format(printf, 1, 2))) void error(const char *format, ...);

// Checks the shape, and queues the kernel. address: NULL where the kernel is a template whose arguments are deduced.
void enqueue(const Shape &s, const char *name, const void *address, std::function<void()> thread);

template <class T, class... P> static inline const void *address(T, void (*kernel)(P...)) { return (const void *)kernel; }
template <class F> static inline auto address_of(F f, int) -> decltype(f(0)) { return f(0); }
template <class F> static inline const void *address_of(F, long) { return NULL; }

// Arguments are evaluated and kept now, as a launch does.
template <class F, class Call, class... A>
static inline void launch(const Shape &s, const char *name, F address, Call call, A... args) {
    auto kept = std::make_tuple(args...);
    enqueue(s, name, address_of(address, 0), [call, kept]() { std::apply(call, kept); });
}

// The first of the mask's lanes to come waits; the last runs complete() on the arguments of all and lets them go.
void collective(unsigned mask, const char *what, void *args, void (*complete)(unsigned mask, void **args));
void barrier();
unsigned lane();

// Shared memory: one place a declaration and block. Its alignment is the type's own and no better.
struct Slot { unsigned long long block; void *memory; };
extern unsigned long long block_serial;
void *place_shared(size_t bytes, size_t alignment);
char *dynamic_shared();
template <class T> static inline T &shared(Slot &slot) {
    if (slot.block != block_serial) {
        slot.memory = place_shared(sizeof(T), alignof(T));
        slot.block = block_serial;
    }
    return *(T *)slot.memory;
}

struct Shuffle { unsigned long long value, result; int source; };
void shuffle(unsigned mask, const char *what, Shuffle *s);
struct Vote { bool value; unsigned ballot; };
unsigned vote(unsigned mask, const char *what, bool value);

template <class T> static inline T shuffled(unsigned mask, const char *what, T x, int source) {
    static_assert(sizeof(T) <= 8, "a shuffle moves 4 or 8 bytes");
    Shuffle s = {0, 0, source};
    memcpy(&s.value, &x, sizeof x);
    shuffle(mask, what, &s);
    memcpy(&x, &s.result, sizeof x);
    return x;
}

}

static inline void __syncthreads() { emu::barrier(); }
void __syncwarp(unsigned mask = 0xffffffffu);
static inline unsigned __ballot_sync(unsigned mask, int x) { return emu::vote(mask, "__ballot_sync", x); }
static inline int __any_sync(unsigned mask, int x) { return emu::vote(mask, "__any_sync", x) != 0; }
static inline int __all_sync(unsigned mask, int x) { return emu::vote(mask, "__all_sync", x) == mask; }

// A source outside of the lane's group of `width` is the lane itself, or wraps in __shfl_sync.
template <class T> static inline T __shfl_sync(unsigned mask, T x, int source, int width = 32) {
    return emu::shuffled(mask, "__shfl_sync", x, (int)(emu::lane() & -width) | (source & (width - 1)));
}
template <class T> static inline T __shfl_xor_sync(unsigned mask, T x, int bits, int width = 32) {
    int lane = (int)emu::lane(), source = lane ^ bits;
    return emu::shuffled(mask, "__shfl_xor_sync", x, source < (lane & -width) + width ? source : lane);
}
template <class T> static inline T __shfl_up_sync(unsigned mask, T x, unsigned delta, int width = 32) {
    int lane = (int)emu::lane(), source = lane - (int)delta;
    return emu::shuffled(mask, "__shfl_up_sync", x, source >= (lane & -width) ? source : lane);
}
template <class T> static inline T __shfl_down_sync(unsigned mask, T x, unsigned delta, int width = 32) {
    int lane = (int)emu::lane(), source = lane + (int)delta;
    return emu::shuffled(mask, "__shfl_down_sync", x, source < (lane & -width) + width ? source : lane);
}

// row: the address of this lane's 16-byte row; lanes 0-7 name matrix 0, 8-15 matrix 1, and so on.
void emu_ldmatrix_x4(uint32_t r[4], const void *row);
void emu_ldmatrix_x4_trans(uint32_t r[4], const void *row);
void emu_ldmatrix_x2(uint32_t r[2], const void *row);
void emu_ldmatrix_x2_trans(uint32_t r[2], const void *row);
// c += a b, fragments as in the PTX manual, fp32 sums.
void emu_mma_m16n8k16_bf16(float c[4], const uint32_t a[4], const uint32_t b[2]);
void emu_mma_m16n8k16_f16(float c[4], const uint32_t a[4], const uint32_t b[2]);
// The same with floats for 16-bit numbers, which no GPU has: quick where the checker's build gathers fragments by shuffles.
void emu_mma_m16n8k16_f32(float c[4], const float2 a[4], const float2 b[2]);
// The copy lands at the wait that covers its group; until then its destination is NaN. Beyond source_bytes: zeros.
void emu_cp_async_16(void *shared, const void *global, int source_bytes);
void emu_cp_async_commit();
void emu_cp_async_wait(int groups_allowed_pending);

// Both operands of one type, as far as they differ the compiler's usual conversions. CUDA has these without std::.
template <class T, class U> static inline auto min(T a, U b) -> decltype(a + b) { return a < b ? a : b; }
template <class T, class U> static inline auto max(T a, U b) -> decltype(a + b) { return a > b ? a : b; }
static inline float min(float a, float b) { return fminf(a, b); }
static inline float max(float a, float b) { return fmaxf(a, b); }
static inline double min(double a, double b) { return fmin(a, b); }
static inline double max(double a, double b) { return fmax(a, b); }
static inline float emu_rsqrtf(float x) { return 1 / sqrtf(x); }
static inline double emu_rsqrt(double x) { return 1 / sqrt(x); }
#define rsqrtf emu_rsqrtf               // newer C libraries declare their own
#define rsqrt emu_rsqrt
#define __expf expf                     // the C library has these names for itself
#define __exp10f exp10f
#define __logf logf
#define __log2f log2f
#define __sinf sinf
#define __cosf cosf
#define __sincosf sincosf
#define __powf powf
static inline float __fdividef(float x, float y) { return x / y; }
static inline float __frcp_rn(float x) { return 1 / x; }
static inline float __fsqrt_rn(float x) { return sqrtf(x); }
static inline float __frsqrt_rn(float x) { return 1 / sqrtf(x); }
static inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
static inline float __fadd_rn(float x, float y) { return x + y; }
static inline float __fmul_rn(float x, float y) { volatile float z = x * y; return z; }     // never fused with an addition
static inline float __saturatef(float x) { return x > 0 ? fminf(x, 1) : 0; }
static inline void sincospif(float x, float *s, float *c) { *s = (float)sin(M_PI * x), *c = (float)cos(M_PI * x); }
static inline int __float_as_int(float x) { int y; memcpy(&y, &x, 4); return y; }
static inline unsigned __float_as_uint(float x) { unsigned y; memcpy(&y, &x, 4); return y; }
static inline float __int_as_float(int x) { float y; memcpy(&y, &x, 4); return y; }
static inline float __uint_as_float(unsigned x) { float y; memcpy(&y, &x, 4); return y; }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
static inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((unsigned long long)a * b >> 32); }
static inline int __mulhi(int a, int b) { return (int)((long long)a * b >> 32); }
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}
template <class T> static inline T __ldg(const T *p) { return *p; }
template <class T> static inline T __ldcs(const T *p) { return *p; }
template <class T> static inline T __ldcg(const T *p) { return *p; }
template <class T> static inline void __stcs(T *p, T x) { *p = x; }
template <class T> static inline void __stcg(T *p, T x) { *p = x; }
static inline void __threadfence() {}
static inline void __threadfence_block() {}

void emu_gap(void *p, size_t bytes);
void emu_clear_gaps(void *from, size_t bytes);

#endif
