/*
Tests of curia/cuda/ptx.cuh and attention.cuh against double precision written here: awkward lengths, packed and separate
matrices, fewer queries than keys, scores that overflow where padding is not kept out. All outputs begin as NaN; what lies outside
the sequences must still be that afterwards; two runs give the same bits. A line for each failure, then a hash of all outputs (the
same for every CURIA_EMU_ORDER), then "N passed, N failed".

  nvcc -std=c++17 -I. dev/test/test_attention.cu -o build/test_attention    with -DCURIA_FP32 for that build; without a GPU by
  dev/emu
*/
#include "../../curia/cuda/attention.cuh"
#include "dev/test/check.h"
#include <math.h>

// Beside the error of a plain computation that rounds at the same places, twice which is allowed.
#ifdef CURIA_FP32
static const double tolerance = 5e-6;
#else
static const double tolerance = 3e-5;
#endif

static double uniform(void) {
    static uint64_t state = 88172645463325252u;
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (double)(state >> 11) / 9007199254740992.0;
}
static double normal(void) { return sqrt(-2 * log(1 - uniform())) * cos(6.283185307179586 * uniform()); }

#ifdef CURIA_FP32
static floatX to_x(double x) { return (float)x; }
static double from_x(floatX x) { return x; }
static double rounded(double x) { return x; }       // the plain computation is then the exact one
#else
static floatX to_x(double x) { return __float2bfloat16((float)x); }
static double from_x(floatX x) { return __bfloat162float(x); }
static double rounded(double x) { return from_x(to_x(x)); }
#endif

static void *device(size_t bytes) {
    void *p = NULL;
    CUDA_CHECK(cudaMalloc(&p, bytes));
    CUDA_CHECK(cudaMemset(p, 0xff, bytes));
    return p;
}
static void *upload(const void *x, size_t bytes) {
    void *p = device(bytes);
    CUDA_CHECK(cudaMemcpy(p, x, bytes, cudaMemcpyHostToDevice));
    return p;
}

// ---------------------------------------------------------------------------------------------------------------------
// Products of fragments that are gathered as the manual draws them

static __device__ uint32_t two_halves(float x, float y) {
    __half2 both = __floats2half2_rn(x, y);
    uint32_t bits;
    memcpy(&bits, &both, sizeof bits);
    return bits;
}
static __device__ uint32_t two_bf16(float x, float y) {
    __nv_bfloat162 both = __floats2bfloat162_rn(x, y);
    uint32_t bits;
    memcpy(&bits, &both, sizeof bits);
    return bits;
}

// c[4][16,8] of a[16,16] b[16,8]: as floats, as floats by shuffles, fp16, bf16.
static __global__ void products_kernel(float *c, const float *a, const float *b) {
    int g = threadIdx.x / 4, t = threadIdx.x % 4;
    float2 fa[4], fb[2];
    uint32_t ha[4], hb[2], ba[4], bb[2];
    for (int i = 0; i < 4; i++) {
        const float *from = a + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8;
        fa[i] = make_float2(from[0], from[1]), ha[i] = two_halves(from[0], from[1]), ba[i] = two_bf16(from[0], from[1]);
    }
    for (int i = 0; i < 2; i++) {
        const float *from = b + (2 * t + i * 8) * 8 + g;
        fb[i] = make_float2(from[0], from[8]), hb[i] = two_halves(from[0], from[8]), bb[i] = two_bf16(from[0], from[8]);
    }
    float sums[4][4] = {};
    mma(sums[0], fa, fb);
    mma_by_shuffles(sums[1], fa, fb);
    mma_f16(sums[2], ha, hb);
    mma(sums[3], ba, bb);
    for (int kind = 0; kind < 4; kind++)
        for (int i = 0; i < 4; i++) c[kind * 128 + (g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[kind][i];
}

static void test_products(void) {
    float a[256], b[128], c[4][128];
    for (int i = 0; i < 256; i++) a[i] = (float)((int)(uniform() * 64) - 32) / 8;        // exact in every type
    for (int i = 0; i < 128; i++) b[i] = (float)((int)(uniform() * 64) - 32) / 8;
    float *out = (float *)device(sizeof c);
    products_kernel<<<1, WARP>>>(out, (float *)upload(a, sizeof a), (float *)upload(b, sizeof b));
    launched("products_kernel");
    CUDA_CHECK(cudaMemcpy(c, out, sizeof c, cudaMemcpyDeviceToHost));
    for (int kind = 0; kind < 4; kind++) {
        int wrong = 0;
        for (int i = 0; i < 16; i++)
            for (int j = 0; j < 8; j++) {
                float sum = 0;
                for (int k = 0; k < 16; k++) sum += a[i * 16 + k] * b[k * 8 + j];
                wrong += !(c[kind][i * 8 + j] == sum);
            }
        check(!wrong, "mma, kind %d: %d of 128 elements", kind, wrong);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Attention

// rows x stride elements; a head's columns begin at `column`, and it has the device's copy.
typedef struct { floatX *at, *host; size_t elements; int stride; } Matrix;
static Matrix matrix(int rows, int stride) {
    Matrix m = {NULL, NULL, (size_t)rows * stride, stride};
    m.at = (floatX *)device(m.elements * sizeof(floatX));
    m.host = (floatX *)xmalloc(m.elements * sizeof(floatX), "test");
    return m;
}
static void fill(Matrix m, double scale) {
    for (size_t i = 0; i < m.elements; i++) m.host[i] = to_x(scale * normal());
    CUDA_CHECK(cudaMemcpy(m.at, m.host, m.elements * sizeof(floatX), cudaMemcpyHostToDevice));
}
static void release(Matrix m) {
    CUDA_CHECK(cudaFree(m.at));
    free(m.host);
}

enum { OUT, LSE, DQ, DK, DV, RESULTS };
static const char *result_names[] = {"out", "lse", "dq", "dk", "dv"};

// One head of one sequence in double; `round`: with P, out, dS and results rounded as the kernels round them.
// q, dout [n, 64], k, v [T, 64]; results[OUT, DQ][n, 64], [LSE][n], [DK, DV][T, 64].
static void reference(double *const results[RESULTS], const double *q, const double *k, const double *v, const double *dout,
                      int n, int T, int round) {
    double *p = (double *)xmalloc(2 * T * sizeof(double), "test"), *dp = p + T;
    memset(results[DK], 0, T * 64 * sizeof(double));
    memset(results[DV], 0, T * 64 * sizeof(double));
    for (int i = 0; i < n; i++) {
        const double *g = dout + i * 64;
        double most = -INFINITY, sum = 0, delta = 0, *out = results[OUT] + i * 64, *dq = results[DQ] + i * 64;
        for (int j = 0; j < T; j++) {
            double score = 0, dot = 0;
            for (int c = 0; c < 64; c++) score += q[i * 64 + c] * k[j * 64 + c], dot += g[c] * v[j * 64 + c];
            p[j] = score / 8, dp[j] = dot;
            most = fmax(most, p[j]);
        }
        for (int j = 0; j < T; j++) sum += p[j] = exp(p[j] - most);
        results[LSE][i] = most + log(sum);
        for (int c = 0; c < 64; c++) {
            double total = 0;
            for (int j = 0; j < T; j++) total += (round ? rounded(p[j]) : p[j]) * v[j * 64 + c];
            out[c] = round ? rounded(total / sum) : total / sum;
            delta += out[c] * g[c];
            dq[c] = 0;
        }
        for (int j = 0; j < T; j++) {
            double probability = p[j] / sum, ds = probability * (dp[j] - delta) / 8;
            if (round) probability = rounded(probability), ds = rounded(ds);
            for (int c = 0; c < 64; c++) {
                dq[c] += ds * k[j * 64 + c];
                results[DK][j * 64 + c] += ds * q[i * 64 + c];
                results[DV][j * 64 + c] += probability * g[c];
            }
        }
        if (round) for (int c = 0; c < 64; c++) dq[c] = rounded(dq[c]);
    }
    for (int r = DK; round && r <= DV; r++)
        for (int i = 0; i < T * 64; i++) results[r][i] = rounded(results[r][i]);
    free(p);
}

static double *head(const floatX *m, int stride, int row, int rows, int h) {
    double *x = (double *)xmalloc((rows * 64 + 1) * sizeof(double), "test");
    for (int i = 0; i < rows * 64; i++) x[i] = from_x(m[(size_t)(row + i / 64) * stride + h * 64 + i % 64]);
    return x;
}

static uint64_t all_bits = 14695981039346656037u;
static void hash_bits(const void *p, size_t bytes) {
    for (size_t i = 0; i < bytes; i++) all_bits = (all_bits ^ ((const unsigned char *)p)[i]) * 1099511628211u;
}

// Elements outside `touched` are still 0xff bytes.
static int untouched(const void *p, const unsigned char *touched, size_t elements, size_t size) {
    const unsigned char *byte = (const unsigned char *)p;
    for (size_t i = 0; i < elements * size; i++) if (!touched[i / size] && byte[i] != 0xff) return 0;
    return 1;
}
static void touch(unsigned char *touched, int stride, int row, int rows, int columns) {
    for (int i = 0; i < rows; i++) memset(touched + (size_t)(row + i) * stride, 1, columns);
}

// Sequences of kv_counts[count] keys and q_counts[count] queries (NULL: as many). packed: q, k, v are thirds of one matrix.
// shift: one column of q has this value and that of k its opposite, so that scores lie far below zero.
static void test(const char *name, int H, const int *q_counts, const int *kv_counts, int count, int packed, double scale,
                 double shift) {
    Sequence *s = (Sequence *)xmalloc(count * sizeof *s, "test");
    int q_rows = 1, kv_rows = packed ? 1 : 3, max_q = 0, max_kv = 0, D = 64 * H;        // rows between sequences belong to none
    for (int i = 0; i < count; i++) {
        s[i] = {q_rows, q_counts ? q_counts[i] : kv_counts[i], kv_rows, kv_counts[i]};
        q_rows += s[i].q_count + (packed || i % 2), kv_rows += s[i].kv_count + (packed || i % 3 == 0);
        max_q = max(max_q, s[i].q_count), max_kv = max(max_kv, s[i].kv_count);
    }
    Matrix q = matrix(q_rows, packed ? 3 * D : D + 8), kv = packed ? q : matrix(kv_rows, 2 * D), dout = matrix(q_rows, D + 16);
    Matrix dq = matrix(q_rows, q.stride), dkv = packed ? dq : matrix(kv_rows, kv.stride), out = matrix(q_rows, D + 16);
    int k_at = packed ? D : 0, v_at = k_at + D;
    fill(q, scale), fill(dout, 1);
    if (!packed) fill(kv, scale);
    if (shift != 0) {
        for (int h = 0; h < H; h++) {
            for (int r = 0; r < q_rows; r++) q.host[(size_t)r * q.stride + h * 64 + 5] = to_x(shift);
            for (int r = 0; r < kv_rows; r++) kv.host[(size_t)r * kv.stride + k_at + h * 64 + 5] = to_x(-shift);
        }
        CUDA_CHECK(cudaMemcpy(q.at, q.host, q.elements * sizeof(floatX), cudaMemcpyHostToDevice));
        CUDA_CHECK(cudaMemcpy(kv.at, kv.host, kv.elements * sizeof(floatX), cudaMemcpyHostToDevice));
    }
    const Sequence *sequences = (Sequence *)upload(s, count * sizeof *s);
    size_t stats = (size_t)q_rows * H;
    float *lse = (float *)device(stats * sizeof(float)), *delta = (float *)device(stats * sizeof(float));
    float *host_lse = (float *)xmalloc(stats * sizeof(float), "test");

    uint64_t before = all_bits, first = 0;
    for (int run = 0; run < 2; run++) {
        for (Matrix m : {out, dq, dkv}) CUDA_CHECK(cudaMemset(m.at, 0xff, m.elements * sizeof(floatX)));
        CUDA_CHECK(cudaMemset(lse, 0xff, stats * sizeof(float)));
        attention_forward(out.at, out.stride, lse, q.at, q.stride, kv.at + k_at, kv.at + v_at, kv.stride, sequences, count, max_q,
                          max_kv, H, 0);
        attention_backward(dq.at, dkv.at + k_at, dkv.at + v_at, dout.at, out.at, out.stride, lse, q.at, q.stride, kv.at + k_at,
                           kv.at + v_at, kv.stride, delta, sequences, count, max_q, max_kv, H, 0);
        CUDA_CHECK(cudaDeviceSynchronize());
        all_bits = before;
        for (Matrix m : {out, dq, dkv}) {
            CUDA_CHECK(cudaMemcpy(m.host, m.at, m.elements * sizeof(floatX), cudaMemcpyDeviceToHost));
            hash_bits(m.host, m.elements * sizeof(floatX));
        }
        CUDA_CHECK(cudaMemcpy(host_lse, lse, stats * sizeof(float), cudaMemcpyDeviceToHost));
        hash_bits(host_lse, stats * sizeof(float));
        if (run == 0) first = all_bits;
    }
    check(all_bits == first, "%s: two runs differ", name);

    double most_error[RESULTS] = {};
    for (int i = 0; i < count; i++)
        for (int h = 0; h < H; h++) {
            int n = s[i].q_count, T = s[i].kv_count;
            double *x[4] = {head(q.host, q.stride, s[i].q_row, n, h), head(kv.host + k_at, kv.stride, s[i].kv_row, T, h),
                            head(kv.host + v_at, kv.stride, s[i].kv_row, T, h), head(dout.host, dout.stride, s[i].q_row, n, h)};
            double *got[RESULTS] = {head(out.host, out.stride, s[i].q_row, n, h), NULL,
                                    head(dq.host, dq.stride, s[i].q_row, n, h),
                                    head(dkv.host + k_at, dkv.stride, s[i].kv_row, T, h),
                                    head(dkv.host + v_at, dkv.stride, s[i].kv_row, T, h)};
            double *want[RESULTS], *plain[RESULTS];
            int sizes[RESULTS] = {64 * n, n, 64 * n, 64 * T, 64 * T};
            got[LSE] = (double *)xmalloc((n + 1) * sizeof(double), "test");
            for (int j = 0; j < n; j++) got[LSE][j] = host_lse[(size_t)(s[i].q_row + j) * H + h];
            for (int r = 0; r < RESULTS; r++) {
                want[r] = (double *)xmalloc((sizes[r] + 1) * sizeof(double), "test");
                plain[r] = (double *)xmalloc((sizes[r] + 1) * sizeof(double), "test");
            }
            reference(want, x[0], x[1], x[2], x[3], n, T, 0);
            reference(plain, x[0], x[1], x[2], x[3], n, T, 1);
            for (int r = 0; r < RESULTS; r++) {
                double error = 0, allowed = 0, norm = 0;
                for (int j = 0; j < sizes[r]; j++) {
                    error += (got[r][j] - want[r][j]) * (got[r][j] - want[r][j]);
                    allowed += (plain[r][j] - want[r][j]) * (plain[r][j] - want[r][j]);
                    norm += want[r][j] * want[r][j];
                }
                norm = sqrt(norm) + 0.1 * scale * sqrt(sizes[r]);       // a lone token's dq and dk are nothing
                error = sqrt(error), allowed = 2 * sqrt(allowed) + tolerance * fmax(1, shift) * norm;
                check(error <= allowed, "%s: sequence %d (%d of %d), head %d, %s: error %.2e of %.2e allowed", name, i, n, T, h,
                      result_names[r], error, allowed);
                if (sizes[r]) most_error[r] = fmax(most_error[r], error / norm);
            }
            for (int r = 0; r < RESULTS; r++) free(got[r]), free(want[r]), free(plain[r]);
            for (int r = 0; r < 4; r++) free(x[r]);
        }
    unsigned char *touched[4] = {};
    size_t elements[4] = {out.elements, dq.elements, dkv.elements, stats};
    for (int m = 0; m < 4; m++) touched[m] = (unsigned char *)xmalloc(elements[m], "test");
    for (int i = 0; i < count; i++) {
        touch(touched[0], out.stride, s[i].q_row, s[i].q_count, D);
        touch(touched[1], dq.stride, s[i].q_row, s[i].q_count, packed ? 3 * D : D);
        touch(touched[2] + k_at, dkv.stride, s[i].kv_row, s[i].kv_count, 2 * D);
        touch(touched[3], H, s[i].q_row, s[i].q_count, H);
    }
    check(untouched(out.host, touched[0], out.elements, sizeof(floatX)), "%s: out was written where no query is", name);
    check(untouched(dq.host, touched[1], dq.elements, sizeof(floatX)), "%s: dq was written where no query is", name);
    if (!packed)
        check(untouched(dkv.host, touched[2], dkv.elements, sizeof(floatX)), "%s: dk or dv was written where no key is", name);
    check(untouched(host_lse, touched[3], stats, sizeof(float)), "%s: lse was written where no query is", name);
    printf("%-32s H %d  errors", name, H);
    for (int r = 0; r < RESULTS; r++) printf("  %s %.1e", result_names[r], most_error[r]);
    printf("\n");
    for (int m = 0; m < 4; m++) free(touched[m]);
    if (!packed) release(kv), release(dkv);
    release(q), release(dq), release(out), release(dout);
    CUDA_CHECK(cudaFree(lse));
    CUDA_CHECK(cudaFree(delta));
    CUDA_CHECK(cudaFree((void *)sequences));
    free(host_lse), free(s);
}

int main(void) {
    const int mixed[] = {1, 16, 37, 50, 64, 65, 128, 197}, local[] = {37, 37, 36, 37}, one[] = {1, 1},
              edge[] = {1, 15, 16, 17, 48, 64}, large[] = {257, 197}, view[] = {257}, largest[] = {1025};
    const int fewer[] = {1, 0, 36, 3, 64, 17, 0, 130}, more[] = {20, 3, 70, 129}, few[] = {5, 0, 66, 1}, none[] = {0, 0, 0, 0};
    const int view_few[] = {70};
    test_products();
    test("lengths 1 to 197, packed", 2, NULL, mixed, 8, 1, 1, 0);
    test("lengths 1 to 197, separate", 1, NULL, mixed, 8, 0, 1, 0);
    test("fewer queries", 1, fewer, mixed, 8, 0, 1, 0);
    test("local crops", 3, NULL, local, 4, 1, 1, 0);
    test("one token", 2, NULL, one, 2, 1, 1, 0);
    test("up to one tile", 1, NULL, edge, 6, 1, 1, 0);
    test("global crops", 1, NULL, large, 2, 1, 1, 0);
    test("global crop, some queries", 2, view_few, view, 1, 0, 1, 0);
    test("more keys than queries", 3, few, more, 4, 0, 1, 0);
    test("no queries", 1, none, more, 4, 0, 1, 0);
    test("sharp", 1, NULL, mixed, 8, 1, 4, 0);
    test("scores far below zero", 1, NULL, more, 4, 0, 1, 40);
    test("1025 tokens", 1, NULL, largest, 1, 1, 1, 0);
    printf("bits %016llx\n", (unsigned long long)all_bits);
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
