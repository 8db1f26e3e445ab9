/*
exp, erf and their uses, written so that the compiler turns loops over them into vector code.

  real_exp, real_erf    within 2 ulp in fp32; the C library's in fp64
  gelu, gelu_slope      x Phi(x) and its derivative, exact (erf) form: METHOD A.6
  silu, silu_slope      x sigma(x) and its derivative
*/
#ifndef CURIA_VECMATH_H
#define CURIA_VECMATH_H

#include <math.h>
#include "real.h"

#ifdef CURIA_FP64
static inline real real_exp(real x) { return exp(x); }
static inline real real_erf(real x) { return erf(x); }
#else
// 2^n e^r with |r| <= ln2 / 2; e^r by a minimax polynomial of degree 6 (error 2e-9 of 1). Below -87: 0. Above 88: 88.
static inline real real_exp(real x) {
    float clamped = x > 88.0f ? 88.0f : x < -87.0f ? -87.0f : x;
    float n = rintf(clamped * 1.44269504f);
    float r = fmaf(n, -0.693145752f, clamped);
    r = fmaf(n, -1.42860677e-6f, r);
    float p = 0.00139560539f;
    p = fmaf(p, r, 0.00837513525f);
    p = fmaf(p, r, 0.0416660830f);
    p = fmaf(p, r, 0.166664153f);
    p = fmaf(p, r, 0.5f);
    p = fmaf(p, r, 1.0f);
    p = fmaf(p, r, 1.0f);
    union { int32_t i; float f; } power = {.i = ((int32_t)n + 127) << 23};
    return x < -87.0f ? 0.0f : p * power.f;
}

// |x| <= 1: x P(x^2); beyond: 1 - exp(Q(|x|)), Q fitted to log erfc on [1,4], past which erf is 1 in fp32.
static inline real real_erf(real x) {
    float t = fabsf(x), s = x * x;
    float p = 7.88911202e-5f;
    p = fmaf(p, s, -0.000802083930f);
    p = fmaf(p, s, 0.00518953521f);
    p = fmaf(p, s, -0.0268544443f);
    p = fmaf(p, s, 0.112836003f);
    p = fmaf(p, s, -0.376126260f);
    p = fmaf(p, s, 1.12837911f);
    float u = t > 4.0f ? 4.0f : t;
    float q = -2.16978060e-5f;
    q = fmaf(q, u, 0.000441474955f);
    q = fmaf(q, u, -0.00420529628f);
    q = fmaf(q, u, 0.0252103712f);
    q = fmaf(q, u, -0.108422153f);
    q = fmaf(q, u, -0.633216321f);
    q = fmaf(q, u, -1.12958038f);
    q = fmaf(q, u, 0.000188473510f);
    float large = copysignf(1.0f - real_exp(q), x);
    return t <= 1.0f ? p * x : large;
}
#endif

static inline real normal_cdf(real x) { return (real)0.5 * (1 + real_erf(x * (real)0.70710678118654752)); }
static inline real gelu(real x) { return x * normal_cdf(x); }
static inline real gelu_slope(real x) { return normal_cdf(x) + x * (real)0.39894228040143268 * real_exp((real)-0.5 * x * x); }
static inline real sigmoid(real x) { return 1 / (1 + real_exp(-x)); }
static inline real silu(real x) { return x * sigmoid(x); }
static inline real silu_slope(real x) { real s = sigmoid(x); return s * (1 + x * (1 - s)); }

#endif
