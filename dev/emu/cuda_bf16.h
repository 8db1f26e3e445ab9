/*
__nv_bfloat16 as CUDA has it, for the emulator: conversions bit for bit, arithmetic through float.

  __nv_bfloat16, __nv_bfloat162, __float2bfloat16, __bfloat162float, __floats2bfloat162_rn, __bfloat1622float2, ...
*/
#ifndef EMU_CUDA_BF16_H
#define EMU_CUDA_BF16_H

#include "cuda_runtime.h"

struct __nv_bfloat16;
static inline __nv_bfloat16 __float2bfloat16(float x);
static inline float __bfloat162float(__nv_bfloat16 x);

struct __attribute__((may_alias)) __nv_bfloat16 {
    unsigned short bits;
    __nv_bfloat16() = default;
    __nv_bfloat16(float x) { *this = __float2bfloat16(x); }
    operator float() const { return __bfloat162float(*this); }
};
struct __attribute__((aligned(4), may_alias)) __nv_bfloat162 { __nv_bfloat16 x, y; };
typedef __nv_bfloat16 nv_bfloat16;
typedef __nv_bfloat162 nv_bfloat162;

// To nearest, ties to even; every NaN becomes 0x7fff.
static inline __nv_bfloat16 __float2bfloat16(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    __nv_bfloat16 y;
    y.bits = (u & 0x7fffffffu) > 0x7f800000u ? 0x7fff : (unsigned short)((u + 0x7fffu + (u >> 16 & 1)) >> 16);
    return y;
}
static inline float __bfloat162float(__nv_bfloat16 x) {
    uint32_t u = (uint32_t)x.bits << 16;
    float y;
    memcpy(&y, &u, 4);
    return y;
}
static inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __float2bfloat16(x); }
static inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
static inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short x) { __nv_bfloat16 y; y.bits = x; return y; }
static inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
static inline __nv_bfloat162 make_bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
static inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16(x), __float2bfloat16(y)}; }
static inline __nv_bfloat162 __float22bfloat162_rn(float2 x) { return __floats2bfloat162_rn(x.x, x.y); }
static inline __nv_bfloat162 __float2bfloat162_rn(float x) { return __floats2bfloat162_rn(x, x); }
static inline float2 __bfloat1622float2(__nv_bfloat162 x) { return {__bfloat162float(x.x), __bfloat162float(x.y)}; }
static inline float __low2float(__nv_bfloat162 x) { return __bfloat162float(x.x); }
static inline float __high2float(__nv_bfloat162 x) { return __bfloat162float(x.y); }

#endif
