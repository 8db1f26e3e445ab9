/*
The CPU backend's number type, and how its loops become vector code.

  real                  float, or double with -DCURIA_FP64
  SIMD_SUM, SIMD_MAX    loop pragmas: a sum or maximum in vector lanes, the same order for any number of threads
*/
#ifndef CURIA_REAL_H
#define CURIA_REAL_H

#ifdef CURIA_FP64
typedef double real;
#else
typedef float real;
#endif

#define PRAGMA(text) _Pragma(#text)
#define SIMD_SUM(x) PRAGMA(omp simd reduction(+ : x))
#define SIMD_MAX(x) PRAGMA(omp simd reduction(max : x))

#endif
