/*
Matrix multiply on the CPU: blocked, packed, register-tiled with the compiler's vector extension, threads by OpenMP.

  gemm              C (+)= A B (+ bias), any strides, threads inside
  gemm_serial       the same on the calling thread, for attention's many small products

The order of every sum depends on the shapes alone: K is never split between threads, so one thread and many give the same
bits. Blocking follows Goto and van de Geijn, "Anatomy of high-performance matrix multiplication" (2008).
*/
#ifndef CURIA_GEMM_H
#define CURIA_GEMM_H

#include "log.h"
#include "real.h"
#ifdef _OPENMP
#include <omp.h>
#else
#define omp_get_max_threads() 1
#define omp_get_thread_num() 0
#endif

// A register tile is TILE_M rows by two vectors; its accumulators fill the register file but for the operands.
#if defined(__AVX512F__)
enum { VECTOR_BYTES = 64, TILE_M = 14 };
#elif defined(__AVX__)
enum { VECTOR_BYTES = 32, TILE_M = 6 };
#elif defined(__aarch64__)
enum { VECTOR_BYTES = 16, TILE_M = 12 };
#else
enum { VECTOR_BYTES = 16, TILE_M = 6 };
#endif
typedef real vec __attribute__((vector_size(VECTOR_BYTES), aligned(VECTOR_BYTES)));
typedef real vec_unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real))));
enum {
    LANES = VECTOR_BYTES / sizeof(real),
    TILE_N = 2 * LANES,
    BLOCK_K = 256,                          // a panel of B, BLOCK_K x TILE_N, stays in L1
    BLOCK_M = TILE_M * 16,                  // a block of A, BLOCK_M x BLOCK_K, stays in L2
    BLOCK_N = TILE_N * 32                   // a block of B, BLOCK_K x BLOCK_N, stays in L2 or L3
};

// Packs rows [rows] by depth [depth] of a strided matrix into panels of `tile` rows, depth-major within a panel, zero-padded.
static inline void gemm_pack(real *out, const real *x, size_t row_stride, size_t depth_stride, int rows, int depth, int tile) {
    for (int r = 0; r < rows; r += tile) {
        int n = rows - r < tile ? rows - r : tile;
        const real *from = x + (size_t)r * row_stride;
        if (row_stride == 1 && n == tile) {
            for (int d = 0; d < depth; d++)
                memcpy(out + (size_t)d * tile, from + (size_t)d * depth_stride, (size_t)tile * sizeof(real));
        } else {
            for (int i = 0; i < tile; i++)
                for (int d = 0; d < depth; d++)
                    out[(size_t)d * tile + i] = i < n ? from[(size_t)i * row_stride + (size_t)d * depth_stride] : 0;
        }
        out += (size_t)depth * tile;
    }
}

// c[rows, cols] (+)= a panel times a panel over `depth`; a: [depth, TILE_M], b: [depth, TILE_N].
static inline void gemm_tile(const real *__restrict a, const real *__restrict b, int depth, real *__restrict c, size_t ldc, int rows,
                             int cols, int add) {
    vec sum[TILE_M][2];
    for (int i = 0; i < TILE_M; i++) sum[i][0] = sum[i][1] = (vec){0};
    for (int k = 0; k < depth; k++) {
        vec b0 = *(const vec *)(b + (size_t)k * TILE_N), b1 = *(const vec *)(b + (size_t)k * TILE_N + LANES);
        #pragma GCC unroll 16
        for (int i = 0; i < TILE_M; i++) {
            sum[i][0] += a[(size_t)k * TILE_M + i] * b0;
            sum[i][1] += a[(size_t)k * TILE_M + i] * b1;
        }
    }
    if (rows == TILE_M && cols == TILE_N) {
        #pragma GCC unroll 16
        for (int i = 0; i < TILE_M; i++) {
            vec_unaligned *to = (vec_unaligned *)(c + (size_t)i * ldc);
            vec_unaligned *next = (vec_unaligned *)(c + (size_t)i * ldc + LANES);
            *to = add ? *to + sum[i][0] : sum[i][0];
            *next = add ? *next + sum[i][1] : sum[i][1];
        }
    } else {
        real out[TILE_M][TILE_N] __attribute__((aligned(VECTOR_BYTES)));
        memcpy(out, sum, sizeof out);
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < cols; j++) c[(size_t)i * ldc + j] = out[i][j] + (add ? c[(size_t)i * ldc + j] : 0);
    }
}

// One packed block of A (rows x depth) against one packed block of B (depth x cols).
static inline void gemm_block(const real *a, const real *b, int rows, int cols, int depth, real *c, size_t ldc, int add) {
    for (int j = 0; j < cols; j += TILE_N)
        for (int i = 0; i < rows; i += TILE_M)
            gemm_tile(a + (size_t)i * depth, b + (size_t)j * depth, depth, c + (size_t)i * ldc + j, ldc,
                      rows - i < TILE_M ? rows - i : TILE_M, cols - j < TILE_N ? cols - j : TILE_N, add);
}

static inline real *gemm_thread_buffer(void) {
    static __thread real *buffer;
    if (!buffer) buffer = (real *)xmalloc((BLOCK_M + BLOCK_N) * BLOCK_K * sizeof(real), "matrix multiply buffers");
    return buffer;
}

static inline int min_int(int a, int b) { return a < b ? a : b; }

// C[m,n] = A[m,k] B[k,n], or += with `add`. A(i,p) = a[i*a_row + p*a_col], B(p,j) = b[p*b_row + j*b_col], C(i,j) = c[i*ldc + j].
static inline void gemm_serial(int m, int n, int k, const real *a, size_t a_row, size_t a_col, const real *b, size_t b_row,
                               size_t b_col, real *c, size_t ldc, int add) {
    real *packed_a = gemm_thread_buffer(), *packed_b = packed_a + BLOCK_M * BLOCK_K;
    if (k == 0 && !add) for (int i = 0; i < m; i++) memset(c + (size_t)i * ldc, 0, (size_t)n * sizeof(real));
    for (int j = 0; j < n; j += BLOCK_N)
        for (int p = 0; p < k; p += BLOCK_K) {
            int cols = min_int(n - j, BLOCK_N), depth = min_int(k - p, BLOCK_K);
            gemm_pack(packed_b, b + (size_t)p * b_row + (size_t)j * b_col, b_col, b_row, cols, depth, TILE_N);
            for (int i = 0; i < m; i += BLOCK_M) {
                int rows = min_int(m - i, BLOCK_M);
                gemm_pack(packed_a, a + (size_t)i * a_row + (size_t)p * a_col, a_row, a_col, rows, depth, TILE_M);
                gemm_block(packed_a, packed_b, rows, cols, depth, c + (size_t)i * ldc + j, ldc, add || p > 0);
            }
        }
}

// As gemm_serial, shared among threads. Threads take columns of C in panels of B where C is wide, so that each panel of B is
// packed by the thread that uses it, and rows otherwise; either way a C tile belongs to one thread.
static inline void gemm(int m, int n, int k, const real *a, size_t a_row, size_t a_col, const real *b, size_t b_row, size_t b_col,
                        real *c, size_t ldc, int add) {
    int threads = omp_get_max_threads();
    if (threads == 1 || (double)m * n * k < 32768) {
        gemm_serial(m, n, k, a, a_row, a_col, b, b_row, b_col, c, ldc, add);
        return;
    }
    int by_rows = m >= n;
    int tile = by_rows ? TILE_M : TILE_N, tiles = ((by_rows ? m : n) + tile - 1) / tile;
    int parts = threads < tiles ? threads : tiles;
    #pragma omp parallel for schedule(static, 1)
    for (int t = 0; t < parts; t++) {
        int from = (int)((long long)tiles * t / parts) * tile,
            to = min_int((int)((long long)tiles * (t + 1) / parts) * tile, by_rows ? m : n);
        if (by_rows)
            gemm_serial(to - from, n, k, a + (size_t)from * a_row, a_row, a_col, b, b_row, b_col, c + (size_t)from * ldc, ldc, add);
        else gemm_serial(m, to - from, k, a, a_row, a_col, b + (size_t)from * b_col, b_row, b_col, c + from, ldc, add);
    }
}

#endif
