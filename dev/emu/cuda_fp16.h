/*
__half as CUDA has it, for the emulator: conversions bit for bit, arithmetic through float.

  __half, __half2, __float2half, __half2float, __floats2half2_rn, __half22float2, ...
*/
#ifndef EMU_CUDA_FP16_H
#define EMU_CUDA_FP16_H

#include "cuda_runtime.h"

struct __half;
static inline __half __float2half(float x);
static inline float __half2float(__half x);

struct __attribute__((may_alias)) __half {
    unsigned short bits;
    __half() = default;
    __half(float x) { *this = __float2half(x); }
    operator float() const { return __half2float(*this); }
};
struct __attribute__((aligned(4), may_alias)) __half2 { __half x, y; };
typedef __half half;
typedef __half2 half2;

// To nearest, ties to even; 65520 and more become infinity, every NaN 0x7fff.
static inline __half __float2half(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    uint32_t sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffffu;
    __half y;
    if (magnitude > 0x7f800000u) {
        y.bits = 0x7fff;
    } else if (magnitude >= 0x477ff000u) {
        y.bits = (unsigned short)(sign | 0x7c00);
    } else if (magnitude >= 0x38800000u) {
        y.bits = (unsigned short)(sign | (magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13);
    } else {        // a subnormal: 24 bits of mantissa, to be counted in units of 2^-24
        uint32_t shift = 126 - (magnitude >> 23), mantissa = (magnitude & 0x7fffffu) | 0x800000u;
        uint32_t kept = shift < 32 ? mantissa >> shift : 0, rest = shift < 32 ? mantissa << (32 - shift) : 0;
        if (shift > 24) kept = 0, rest = shift == 25 && magnitude > 0x33000000u ? 0xffffffffu : 0;
        y.bits = (unsigned short)(sign | (kept + (rest > 0x80000000u || (rest == 0x80000000u && kept & 1))));
    }
    return y;
}
static inline float __half2float(__half x) {
    uint32_t sign = (uint32_t)(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31, mantissa = x.bits & 0x3ff, u;
    float y;
    if (exponent == 0) {
        y = mantissa * 0x1p-24f;
        return sign ? -y : y;
    }
    if (exponent == 31) u = mantissa ? 0x7fffffffu : sign | 0x7f800000u;
    else u = sign | (exponent + 112) << 23 | mantissa << 13;
    memcpy(&y, &u, 4);
    return y;
}
static inline __half __float2half_rn(float x) { return __float2half(x); }
static inline unsigned short __half_as_ushort(__half x) { return x.bits; }
static inline __half __ushort_as_half(unsigned short x) { __half y; y.bits = x; return y; }
static inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
static inline __half2 make_half2(__half x, __half y) { return {x, y}; }
static inline __half2 __floats2half2_rn(float x, float y) { return {__float2half(x), __float2half(y)}; }
static inline __half2 __float22half2_rn(float2 x) { return __floats2half2_rn(x.x, x.y); }
static inline __half2 __float2half2_rn(float x) { return __floats2half2_rn(x, x); }
static inline float2 __half22float2(__half2 x) { return {__half2float(x.x), __half2float(x.y)}; }
static inline float __low2float(__half2 x) { return __half2float(x.x); }
static inline float __high2float(__half2 x) { return __half2float(x.y); }

#endif
