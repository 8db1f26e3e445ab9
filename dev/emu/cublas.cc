/*
cuBLASLt for the emulator: column-major products of fp32, bf16 or fp16, fp32 sums (curia/gemm.h), rounded once.

Refuses what the library's tables leave out: other types of C than those of A and B or fp32, a bias that is not of D's type, and
epilogues other than bias and bias gradients. An algorithm may be used only for the types and alignment it was asked for.
*/
#include "cublasLt.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#pragma GCC diagnostic ignored "-Wenum-compare"       // C++ dislikes a choice between constants of two enums
#include "curia/gemm.h"
#include <functional>
#include <vector>

cudaError_t emu_issue(cudaStream_t stream, std::function<void()> run);

struct cublasLtContext { int unused; };
struct cublasLtMatmulDescOpaque_t {
    cublasComputeType_t compute;
    cudaDataType_t scale;
    cublasOperation_t op_a, op_b;
    uint32_t epilogue;
    int32_t pointer_mode, bias_type, sm_count;      // bias_type -1: D's
    void *bias;
    int64_t bias_stride;
};
struct cublasLtMatrixLayoutOpaque_t {
    cudaDataType_t type;
    uint64_t rows, cols;
    int64_t ld, stride;
    int32_t batch, order;
};
struct cublasLtMatmulPreferenceOpaque_t { uint64_t workspace; uint32_t search, reduction, alignment[4]; };

template <class T> static cublasStatus_t set(T *field, const void *value, size_t size) {
    if (!value || size != sizeof *field) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy((void *)field, value, size);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle) {
    int devices;
    if (cudaGetDeviceCount(&devices)) return CUBLAS_STATUS_NOT_INITIALIZED;
    *handle = new cublasLtContext;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) { delete handle; return CUBLAS_STATUS_SUCCESS; }
size_t cublasLtGetVersion(void) { return 130000; }
const char *cublasLtGetStatusName(cublasStatus_t status) {
    if (status == CUBLAS_STATUS_SUCCESS) return "CUBLAS_STATUS_SUCCESS";
    if (status == CUBLAS_STATUS_INVALID_VALUE) return "CUBLAS_STATUS_INVALID_VALUE";
    return status == CUBLAS_STATUS_NOT_SUPPORTED ? "CUBLAS_STATUS_NOT_SUPPORTED" : "CUBLAS_STATUS_INTERNAL_ERROR";
}
const char *cublasLtGetStatusString(cublasStatus_t status) { return cublasLtGetStatusName(status); }

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *d, cublasComputeType_t compute, cudaDataType_t scale) {
    *d = new cublasLtMatmulDescOpaque_t{compute, scale, CUBLAS_OP_N, CUBLAS_OP_N, CUBLASLT_EPILOGUE_DEFAULT, 0, -1, 0, NULL, 0};
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t d) { delete d; return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t d, cublasLtMatmulDescAttributes_t name, const void *value,
                                              size_t size) {
    switch (name) {
    case CUBLASLT_MATMUL_DESC_COMPUTE_TYPE: return set(&d->compute, value, size);
    case CUBLASLT_MATMUL_DESC_SCALE_TYPE: return set(&d->scale, value, size);
    case CUBLASLT_MATMUL_DESC_POINTER_MODE: return set(&d->pointer_mode, value, size);
    case CUBLASLT_MATMUL_DESC_TRANSA: return set(&d->op_a, value, size);
    case CUBLASLT_MATMUL_DESC_TRANSB: return set(&d->op_b, value, size);
    case CUBLASLT_MATMUL_DESC_EPILOGUE: return set(&d->epilogue, value, size);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER: return set(&d->bias, value, size);
    case CUBLASLT_MATMUL_DESC_BIAS_BATCH_STRIDE: return set(&d->bias_stride, value, size);
    case CUBLASLT_MATMUL_DESC_SM_COUNT_TARGET: return set(&d->sm_count, value, size);
    case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE: return set(&d->bias_type, value, size);
    }
    return CUBLAS_STATUS_INVALID_VALUE;
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *l, cudaDataType type, uint64_t rows, uint64_t cols,
                                          int64_t ld) {
    *l = new cublasLtMatrixLayoutOpaque_t{type, rows, cols, ld, 0, 1, CUBLASLT_ORDER_COL};
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t l) { delete l; return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t l, cublasLtMatrixLayoutAttribute_t name, const void *value,
                                                size_t size) {
    switch (name) {
    case CUBLASLT_MATRIX_LAYOUT_TYPE: return set(&l->type, value, size);
    case CUBLASLT_MATRIX_LAYOUT_ORDER: return set(&l->order, value, size);
    case CUBLASLT_MATRIX_LAYOUT_ROWS: return set(&l->rows, value, size);
    case CUBLASLT_MATRIX_LAYOUT_COLS: return set(&l->cols, value, size);
    case CUBLASLT_MATRIX_LAYOUT_LD: return set(&l->ld, value, size);
    case CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT: return set(&l->batch, value, size);
    case CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET: return set(&l->stride, value, size);
    }
    return CUBLAS_STATUS_INVALID_VALUE;
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *p) {
    *p = new cublasLtMatmulPreferenceOpaque_t{0, 0, 0, {256, 256, 256, 256}};
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t p) { delete p; return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t p, cublasLtMatmulPreferenceAttributes_t name,
                                                    const void *value, size_t size) {
    switch (name) {
    case CUBLASLT_MATMUL_PREF_SEARCH_MODE: return set(&p->search, value, size);
    case CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES: return set(&p->workspace, value, size);
    case CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK: return set(&p->reduction, value, size);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES: return set(&p->alignment[0], value, size);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES: return set(&p->alignment[1], value, size);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES: return set(&p->alignment[2], value, size);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES: return set(&p->alignment[3], value, size);
    }
    return CUBLAS_STATUS_INVALID_VALUE;
}

static size_t bytes_of(cudaDataType_t type) { return type == CUDA_R_32F ? 4 : 2; }
static cudaDataType_t bias_type(cublasLtMatmulDesc_t d, cublasLtMatrixLayout_t out) {
    return d->bias_type < 0 ? out->type : (cudaDataType_t)d->bias_type;
}

static cublasStatus_t supported(cublasLtMatmulDesc_t d, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t out) {
    for (cublasLtMatrixLayout_t l : {a, b, c, out})
        if (!l->rows || !l->cols || l->ld < (int64_t)l->rows || l->batch < 1) return CUBLAS_STATUS_INVALID_VALUE;
    int ta = d->op_a != CUBLAS_OP_N, tb = d->op_b != CUBLAS_OP_N;
    uint64_t m = ta ? a->cols : a->rows, k = ta ? a->rows : a->cols, n = tb ? b->rows : b->cols;
    if ((tb ? b->cols : b->rows) != k || c->rows != m || c->cols != n) return CUBLAS_STATUS_INVALID_VALUE;
    if (out->rows != m || out->cols != n) return CUBLAS_STATUS_INVALID_VALUE;
    if (b->batch != a->batch || c->batch != a->batch || out->batch != a->batch) return CUBLAS_STATUS_INVALID_VALUE;
    for (cublasLtMatrixLayout_t l : {a, b, c, out}) {
        if (l->type != CUDA_R_32F && l->type != CUDA_R_16F && l->type != CUDA_R_16BF) return CUBLAS_STATUS_NOT_SUPPORTED;
        if (l->order != CUBLASLT_ORDER_COL) return CUBLAS_STATUS_NOT_SUPPORTED;
    }
    bool compute = d->compute == CUBLAS_COMPUTE_32F || d->compute == CUBLAS_COMPUTE_32F_PEDANTIC ||
                   (a->type == CUDA_R_32F && d->compute == CUBLAS_COMPUTE_32F_FAST_TF32);
    if (!compute || d->scale != CUDA_R_32F || d->pointer_mode != CUBLASLT_POINTER_MODE_HOST) return CUBLAS_STATUS_NOT_SUPPORTED;
    if (a->type != b->type || c->type != out->type) return CUBLAS_STATUS_NOT_SUPPORTED;
    if (out->type != a->type && out->type != CUDA_R_32F) return CUBLAS_STATUS_NOT_SUPPORTED;
    if (d->epilogue == CUBLASLT_EPILOGUE_DEFAULT) return CUBLAS_STATUS_SUCCESS;
    if (d->epilogue != CUBLASLT_EPILOGUE_BIAS && d->epilogue != CUBLASLT_EPILOGUE_BGRADA &&
        d->epilogue != CUBLASLT_EPILOGUE_BGRADB)
        return CUBLAS_STATUS_NOT_SUPPORTED;
    if (!d->bias) return CUBLAS_STATUS_INVALID_VALUE;
    return bias_type(d, out) == out->type ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
}

enum { ALGORITHM_MARK = 0x656d75 };

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t d, cublasLtMatrixLayout_t a,
                                              cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t out,
                                              cublasLtMatmulPreference_t preference, int requested,
                                              cublasLtMatmulHeuristicResult_t results[], int *found) {
    *found = 0;
    if (!handle || !preference || requested < 1) return CUBLAS_STATUS_INVALID_VALUE;
    cublasStatus_t status = supported(d, a, b, c, out);
    if (status) return status;
    cublasLtMatrixLayout_t layouts[4] = {a, b, c, out};
    for (int i = 0; i < 4; i++) if (preference->alignment[i] % bytes_of(layouts[i]->type)) return CUBLAS_STATUS_NOT_SUPPORTED;
    for (*found = 0; *found < requested && *found < 2; ++*found) {
        cublasLtMatmulHeuristicResult_t *r = &results[*found];
        memset(r, 0, sizeof *r);
        r->algo.data[0] = ALGORITHM_MARK;
        r->algo.data[1] = (uint64_t)a->type | (uint64_t)out->type << 8 | (uint64_t)d->op_a << 16 | (uint64_t)d->op_b << 24 |
                          (uint64_t)d->epilogue << 32;
        for (int i = 0; i < 4; i++) r->algo.data[2 + i] = preference->alignment[i] < 16 ? preference->alignment[i] : 16;
        r->algo.data[6] = (uint64_t)*found;
        r->wavesCount = 1;
    }
    return CUBLAS_STATUS_SUCCESS;
}

static float load(const void *p, cudaDataType_t type, size_t i) {
    if (type == CUDA_R_32F) return ((const float *)p)[i];
    return type == CUDA_R_16F ? __half2float(((const __half *)p)[i]) : __bfloat162float(((const __nv_bfloat16 *)p)[i]);
}
static void store(void *p, cudaDataType_t type, size_t i, float x) {
    if (type == CUDA_R_32F) ((float *)p)[i] = x;
    else if (type == CUDA_R_16F) ((__half *)p)[i] = __float2half(x);
    else ((__nv_bfloat16 *)p)[i] = __float2bfloat16(x);
}

// A matrix of a batch as floats: the matrix itself where it is float, else a copy with ld = rows.
static const float *as_float(std::vector<float> *copy, const void *p, const cublasLtMatrixLayoutOpaque_t &l, int batch,
                             size_t *ld) {
    size_t first = (size_t)batch * (size_t)l.stride;
    *ld = (size_t)l.ld;
    if (l.type == CUDA_R_32F) return (const float *)p + first;
    copy->resize(l.rows * l.cols);
    for (size_t j = 0; j < l.cols; j++)
        for (size_t i = 0; i < l.rows; i++) (*copy)[j * l.rows + i] = load(p, l.type, first + j * *ld + i);
    *ld = l.rows;
    return copy->data();
}

struct Product {
    cublasLtMatmulDescOpaque_t d;
    cublasLtMatrixLayoutOpaque_t a, b, c, out;
    const void *A, *B, *C;
    void *D;
    float alpha, beta;
};

static void multiply(const Product &p, int batch) {
    std::vector<float> copy_a, copy_b;
    size_t lda, ldb, m = p.out.rows, n = p.out.cols, k = p.d.op_a == CUBLAS_OP_N ? p.a.cols : p.a.rows;
    const float *a = as_float(&copy_a, p.A, p.a, batch, &lda), *b = as_float(&copy_b, p.B, p.b, batch, &ldb);
    size_t a_row = 1, a_col = lda, b_row = 1, b_col = ldb;              // of op(A)[m,k], op(B)[k,n]
    if (p.d.op_a != CUBLAS_OP_N) a_row = lda, a_col = 1;
    if (p.d.op_b != CUBLAS_OP_N) b_row = ldb, b_col = 1;
    std::vector<float> product(m * n);
    gemm((int)n, (int)m, (int)k, b, b_col, b_row, a, a_col, a_row, product.data(), m, 0);      // row-major: the transpose
    size_t first_c = (size_t)batch * (size_t)p.c.stride, first = (size_t)batch * (size_t)p.out.stride;
    cudaDataType_t type = p.out.type;
    size_t first_bias = (size_t)batch * (size_t)p.d.bias_stride;
    for (size_t j = 0; j < n; j++)
        for (size_t i = 0; i < m; i++) {
            float x = p.alpha * product[j * m + i];
            if (p.beta != 0) x += p.beta * load(p.C, p.c.type, first_c + j * (size_t)p.c.ld + i);
            if (p.d.epilogue == CUBLASLT_EPILOGUE_BIAS) x += load(p.d.bias, type, first_bias + i);
            store(p.D, type, first + j * (size_t)p.out.ld + i, x);
        }
    bool sum_a = p.d.epilogue == CUBLASLT_EPILOGUE_BGRADA;
    if (!sum_a && p.d.epilogue != CUBLASLT_EPILOGUE_BGRADB) return;
    for (size_t i = 0; i < (sum_a ? m : n); i++) {
        float sum = 0;
        for (size_t l = 0; l < k; l++) sum += sum_a ? a[i * a_row + l * a_col] : b[l * b_row + i * b_col];
        store(p.d.bias, type, first_bias + i, sum);
    }
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t d, const void *alpha, const void *A,
                              cublasLtMatrixLayout_t a, const void *B, cublasLtMatrixLayout_t b, const void *beta, const void *C,
                              cublasLtMatrixLayout_t c, void *D, cublasLtMatrixLayout_t out,
                              const cublasLtMatmulAlgo_t *algorithm, void *, size_t, cudaStream_t stream) {
    if (!handle || !d || !alpha || !beta || !A || !B || !D) return CUBLAS_STATUS_INVALID_VALUE;
    cublasStatus_t status = supported(d, a, b, c, out);
    if (status) return status;
    Product p = {*d, *a, *b, *c, *out, A, B, C, D, *(const float *)alpha, *(const float *)beta};
    if ((p.beta != 0 && !C) || (C == D && c->ld != out->ld)) return CUBLAS_STATUS_INVALID_VALUE;
    if (algorithm) {
        uint64_t use = (uint64_t)a->type | (uint64_t)out->type << 8 | (uint64_t)d->op_a << 16 | (uint64_t)d->op_b << 24 |
                       (uint64_t)d->epilogue << 32;
        if (algorithm->data[0] != ALGORITHM_MARK || algorithm->data[1] != use) return CUBLAS_STATUS_INVALID_VALUE;
        const void *pointers[4] = {A, B, C, D};
        for (int i = 0; i < 4; i++)
            if (algorithm->data[2 + i] && (uintptr_t)pointers[i] % algorithm->data[2 + i]) return CUBLAS_STATUS_INVALID_VALUE;
    }
    cudaError_t error = emu_issue(stream, [p]() { for (int i = 0; i < p.out.batch; i++) multiply(p, i); });
    return error ? CUBLAS_STATUS_EXECUTION_FAILED : CUBLAS_STATUS_SUCCESS;
}
