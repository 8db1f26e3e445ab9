/*
Matrix products by cuBLASLt, fp32 accumulation, with biases and bias gradients in their epilogues.

  Matmul            one product: row-major operands, sizes, transposes, number types
  matmul_create, matmul_destroy     the library's handle and its workspace
  matmul            runs one product; the algorithm of each shape is asked for once and kept
  linear_forward    y = x w^T + bias
  linear_backward   dw = dy^T x, dbias = column sums of dy, dx = dy w
  column_sums       sums over rows, for what has no product to ride on

cuBLASLt's GELU epilogues are the tanh approximation and the model's GELU is exact (METHOD pitfall 15), so activations are
kernels of their own (norm.cuh). The library's first choice of algorithm is taken as it is: it depends on the shape, the
device and the library's version alone, so that two runs give the same bits, which a choice by timing does not promise.
*/
#ifndef CURIA_CUDA_MATMUL_H
#define CURIA_CUDA_MATMUL_H

#include <cublasLt.h>
#include "common.cuh"

enum { MATMUL_WORKSPACE = 32 << 20 };
enum { MATMUL_PLAIN, MATMUL_BIAS, MATMUL_BIAS_GRADIENT };

// C[m,n] = alpha A[m,k] B[k,n] (+ bias[n]), or also bias_gradient[m] = row sums of A. A is stored [k,m] where a_transposed,
// B [n,k] where b_transposed. Types are those of A and B, and of C; biases are floatX, bias gradients float.
typedef struct {
    int m, n, k, a_transposed, b_transposed, lda, ldb, ldc;
    cudaDataType_t type_in, type_out;
    int epilogue;               // MATMUL_*
    int alignment;              // bytes that every pointer is a multiple of, up to 16; matmul() sets it
    int batch, zero;            // products, `stride` elements apart; 0 as 1; no padding: shapes are compared as bytes
    long long stride_a, stride_b, stride_c;
} Matmul;

typedef struct { Matmul shape; int fused; cublasLtMatmulAlgo_t algorithm; } MatmulChoice;

typedef struct {
    cublasLtHandle_t handle;
    void *workspace;
    MatmulChoice *choices;
    int count, capacity;
} MatmulState;

static inline cudaDataType_t cuda_type(float) { return CUDA_R_32F; }
static inline cudaDataType_t cuda_type(__nv_bfloat16) { return CUDA_R_16BF; }
static inline cudaDataType_t cuda_type(__half) { return CUDA_R_16F; }

static inline void matmul_check(cublasStatus_t status, const Matmul *p, const char *what) {
    if (status != CUBLAS_STATUS_SUCCESS)
        fail(STATUS_FAILED, "cuBLASLt %s: status %d in step %lld for a product of m=%d n=%d k=%d", what, (int)status, cuda_step,
             p->m, p->n, p->k);
}

// out[cols] = sums over rows of x[rows,cols] (* y[rows,cols]): chunks of rows first, then the chunks.
template <class T, class U>
static __global__ void column_sums_kernel(float *part, const T *x, const U *y, int rows, int cols, int chunk) {
    int col = blockIdx.x * blockDim.x + threadIdx.x;
    if (col >= cols) return;
    int from = blockIdx.y * chunk, to = min(from + chunk, rows);
    float sum = 0;
    for (int r = from; r < to; r++)
        sum += to_float(x[(size_t)r * cols + col]) * (y ? to_float(y[(size_t)r * cols + col]) : 1.0f);
    part[(size_t)blockIdx.y * cols + col] = sum;
}

enum { COLUMN_CHUNKS = 64 };

// scratch: COLUMN_CHUNKS * cols floats. y may be NULL.
template <class T, class U>
static inline void column_products(float *out, const T *x, const U *y, int rows, int cols, float *scratch, cudaStream_t stream) {
    int chunk = divide_up(rows > 0 ? rows : 1, COLUMN_CHUNKS), chunks = divide_up(rows > 0 ? rows : 1, chunk), block = 128;
    column_sums_kernel<<<dim3(divide_up(cols, block), chunks), block, 0, stream>>>(scratch, x, y, rows, cols, chunk);
    launched("column_sums_kernel");
    column_sums_kernel<<<divide_up(cols, block), block, 0, stream>>>(out, scratch, (const float *)NULL, chunks, cols, chunks);
    launched("column_sums_kernel");
}

template <class T>
static inline void column_sums(float *out, const T *x, int rows, int cols, float *scratch, cudaStream_t stream) {
    column_products(out, x, (const float *)NULL, rows, cols, scratch, stream);
}

static inline void matmul_create(MatmulState *s) {
    memset(s, 0, sizeof *s);
    if (cublasLtCreate(&s->handle) != CUBLAS_STATUS_SUCCESS)
        fail(STATUS_FAILED, "cuBLASLt does not start: is the driver older than the CUDA version this program was built with?");
    CUDA_CHECK(cudaMalloc(&s->workspace, MATMUL_WORKSPACE));
}

static inline void matmul_destroy(MatmulState *s) {
    cublasLtDestroy(s->handle);
    CUDA_CHECK(cudaFree(s->workspace));
    free(s->choices);
}

typedef struct { cublasLtMatmulDesc_t product; cublasLtMatrixLayout_t a, b, c; } MatmulDescription;

// Row-major C = A B is the library's column-major C^T = B^T A^T: its A is our B.
static inline MatmulDescription matmul_describe(const Matmul *p, int fused, const void *bias) {
    MatmulDescription d;
    cublasOperation_t op_a = p->b_transposed ? CUBLAS_OP_T : CUBLAS_OP_N, op_b = p->a_transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
    matmul_check(cublasLtMatmulDescCreate(&d.product, CUBLAS_COMPUTE_32F, CUDA_R_32F), p, "description");
    cublasLtMatmulDescSetAttribute(d.product, CUBLASLT_MATMUL_DESC_TRANSA, &op_a, sizeof op_a);
    cublasLtMatmulDescSetAttribute(d.product, CUBLASLT_MATMUL_DESC_TRANSB, &op_b, sizeof op_b);
    if (fused) {
        cublasLtEpilogue_t epilogue = p->epilogue == MATMUL_BIAS ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_BGRADB;
        cudaDataType_t type = p->epilogue == MATMUL_BIAS ? cuda_type(floatX()) : CUDA_R_32F;
        cublasLtMatmulDescSetAttribute(d.product, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue);
        cublasLtMatmulDescSetAttribute(d.product, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias);
        cublasLtMatmulDescSetAttribute(d.product, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &type, sizeof type);
    }
    int b_rows = p->b_transposed ? p->k : p->n, b_cols = p->b_transposed ? p->n : p->k;
    int a_rows = p->a_transposed ? p->m : p->k, a_cols = p->a_transposed ? p->k : p->m;
    matmul_check(cublasLtMatrixLayoutCreate(&d.a, p->type_in, b_rows, b_cols, p->ldb), p, "layout");
    matmul_check(cublasLtMatrixLayoutCreate(&d.b, p->type_in, a_rows, a_cols, p->lda), p, "layout");
    matmul_check(cublasLtMatrixLayoutCreate(&d.c, p->type_out, p->n, p->m, p->ldc), p, "layout");
    if (p->batch > 1) {
        cublasLtMatrixLayout_t layouts[3] = {d.a, d.b, d.c};
        int64_t strides[3] = {p->stride_b, p->stride_a, p->stride_c};
        int32_t batch = p->batch;
        for (int i = 0; i < 3; i++) {
            cublasLtMatrixLayoutSetAttribute(layouts[i], CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &batch, sizeof batch);
            cublasLtMatrixLayoutSetAttribute(layouts[i], CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &strides[i],
                                             sizeof strides[i]);
        }
    }
    return d;
}

static inline void matmul_forget(MatmulDescription *d) {
    cublasLtMatrixLayoutDestroy(d->a);
    cublasLtMatrixLayoutDestroy(d->b);
    cublasLtMatrixLayoutDestroy(d->c);
    cublasLtMatmulDescDestroy(d->product);
}

// The algorithm of a shape. Where the library has none with this epilogue, fused is 0 and the epilogue is a kernel of ours.
static inline const MatmulChoice *matmul_choose(MatmulState *s, const Matmul *p, const void *bias) {
    for (int i = 0; i < s->count; i++) if (!memcmp(&s->choices[i].shape, p, sizeof *p)) return &s->choices[i];
    if (s->count == s->capacity) {
        s->capacity = s->capacity ? 2 * s->capacity : 64;
        s->choices = (MatmulChoice *)realloc(s->choices, s->capacity * sizeof *s->choices);
        if (!s->choices) fail(STATUS_FAILED, "out of memory: the list of matrix products");
    }
    MatmulChoice *choice = &s->choices[s->count];
    choice->shape = *p;
    for (choice->fused = p->epilogue != MATMUL_PLAIN;; choice->fused = 0) {
        MatmulDescription d = matmul_describe(p, choice->fused, bias);
        cublasLtMatmulPreference_t preference;
        cublasLtMatmulHeuristicResult_t result;
        uint64_t workspace = MATMUL_WORKSPACE;
        uint32_t alignment = p->alignment;
        int found = 0;
        matmul_check(cublasLtMatmulPreferenceCreate(&preference), p, "preference");
        cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace);
        cublasLtMatmulPreferenceAttributes_t aligned[] = {
            CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
        for (int i = 0; i < 4; i++) cublasLtMatmulPreferenceSetAttribute(preference, aligned[i], &alignment, sizeof alignment);
        cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(s->handle, d.product, d.a, d.b, d.c, d.c, preference, 1, &result,
                                                               &found);
        cublasLtMatmulPreferenceDestroy(preference);
        matmul_forget(&d);
        if (status == CUBLAS_STATUS_SUCCESS && found) {
            choice->algorithm = result.algo;
            break;
        }
        if (!choice->fused) matmul_check(status ? status : CUBLAS_STATUS_NOT_SUPPORTED, p, "has no algorithm");
    }
    s->count++;
    return choice;
}

// C[r,:] += bias: where the library cannot.
template <class T>
static __global__ void add_bias_kernel(T *c, const floatX *bias, int rows, int cols, int ldc) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (size_t)rows * cols) return;
    size_t at = i / cols * ldc + i % cols;
    c[at] = from_float<T>(to_float(c[at]) + to_float(bias[i % cols]));
}

// bias: floatX[n] to add, or float[m] that takes the gradient, or NULL, as the epilogue says. scratch: COLUMN_CHUNKS * m floats,
// for a bias gradient. An empty product writes nothing but, with k = 0, zeros.
template <class In, class Out>
static inline void matmul(MatmulState *s, Matmul p, Out *c, const In *a, const In *b, float alpha, const void *bias,
                          float *scratch,
                          cudaStream_t stream) {
    p.type_in = cuda_type(In());
    p.type_out = cuda_type(Out());
    p.alignment = 16;
    while (((uintptr_t)a | (uintptr_t)b | (uintptr_t)c | (uintptr_t)bias) % p.alignment) p.alignment /= 2;
    if (p.m == 0 || p.n == 0) return;
    if (p.k == 0) {
        for (int i = 0; i < (p.batch > 1 ? p.batch : 1); i++)
            CUDA_CHECK(cudaMemsetAsync(c + i * p.stride_c, 0, (size_t)p.m * p.ldc * sizeof(Out), stream));
        if (p.epilogue == MATMUL_BIAS_GRADIENT) CUDA_CHECK(cudaMemsetAsync((void *)bias, 0, p.m * sizeof(float), stream));
        return;
    }
    const MatmulChoice *choice = matmul_choose(s, &p, bias);
    MatmulDescription d = matmul_describe(&p, choice->fused, bias);
    float beta = 0;
    cuda_kernel = "cublasLtMatmul";
    matmul_check(cublasLtMatmul(s->handle, d.product, &alpha, b, d.a, a, d.b, &beta, c, d.c, c, d.c, &choice->algorithm,
                                s->workspace,
                                MATMUL_WORKSPACE, stream), &p, "product");
    matmul_forget(&d);
    if (p.epilogue == MATMUL_PLAIN || choice->fused) return;
    if (p.epilogue == MATMUL_BIAS_GRADIENT) {
        column_sums((float *)bias, a, p.k, p.m, scratch, stream);
    } else {
        add_bias_kernel<<<divide_up((long long)p.m * p.n, 256), 256, 0, stream>>>(c, (const floatX *)bias, p.m, p.n, p.ldc);
        launched("add_bias_kernel");
    }
}

// y[rows,out] = x[rows,in] w[out,in]^T + bias[out]
template <class Out>
static inline void linear_forward(MatmulState *s, Out *y, const floatX *x, const floatX *w, const floatX *bias, int rows, int in,
                                  int out, cudaStream_t stream) {
    Matmul p = {};
    p.m = rows, p.n = out, p.k = in, p.lda = in, p.ldb = in, p.ldc = out, p.b_transposed = 1, p.epilogue = MATMUL_BIAS;
    matmul(s, p, y, x, w, 1, bias, NULL, stream);
}

// dw[out,in] = dy^T x, dbias[out] = column sums of dy[rows,out]; dx[rows,in] = dy w, unless dx is NULL.
// scratch: COLUMN_CHUNKS * out floats.
static inline void linear_backward(MatmulState *s, floatX *dx, float *dw, float *dbias, const floatX *dy, const floatX *x,
                                   const floatX *w, int rows, int in, int out, float *scratch, cudaStream_t stream) {
    Matmul p = {};
    p.m = out, p.n = in, p.k = rows, p.lda = out, p.ldb = in, p.ldc = in, p.a_transposed = 1, p.epilogue = MATMUL_BIAS_GRADIENT;
    matmul(s, p, dw, dy, x, 1, dbias, scratch, stream);
    if (!dx) return;
    p = {};
    p.m = rows, p.n = in, p.k = out, p.lda = out, p.ldb = in, p.ldc = in;
    matmul(s, p, dx, dy, w, 1, NULL, NULL, stream);
}

#endif
