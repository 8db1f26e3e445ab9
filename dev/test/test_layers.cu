/*
Tests of curia/cuda/losses.cuh and pixels.cuh, each function alone against double-precision C written here: awkward sizes,
poisoned outputs and padding, equal bits on two runs. A line for each check, then "N passed, N failed".

  nvcc -std=c++17 -I. dev/test/test_layers.cu -o build/test_layers     with -DCURIA_FP32 for that build; without a GPU by dev/emu
*/
#define CURIA_FP64                      // resize_plan in double: the specification of the resize
#include "../../curia/resize.h"
#include "../../curia/cuda/losses.cuh"
#include "../../curia/cuda/pixels.cuh"
#include <initializer_list>

#ifdef CURIA_FP32
static const double exact = 1e-5, half_close = 1e-5, close16 = 1e-5;
#else
static const double exact = 2e-5, half_close = 6e-4, close16 = 4e-3;     // of fp32, logitX and floatX outputs
#endif

static int passed, failed;

static void report(int good, const char *name, const char *what, double found) {
    passed += good != 0, failed += !good;
    printf("%-6s  %-44s %-16s %.2e\n", good ? "ok" : "failed", name, what, found);
}

// Relative L2 distance of `got` from `want`, plus what `floor` allows where `want` is nothing.
static void near(const char *name, const char *what, const double *got, const double *want, size_t n, double tolerance,
                 double floor = 0) {
    double square = 0, norm = 0;
    for (size_t i = 0; i < n; i++) square += (got[i] - want[i]) * (got[i] - want[i]), norm += want[i] * want[i];
    double error = sqrt(square) / (sqrt(norm) + floor * sqrt((double)n) + 1e-300);
    report(square == 0 || error <= tolerance, name, what, square == 0 ? 0 : error);      // a NaN fails
}

static double uniform(void) {
    static uint64_t state = 88172645463325252u;
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (double)(state >> 11) / 9007199254740992.0;
}
static double normal(void) { return sqrt(-2 * log(1 - uniform())) * cos(6.283185307179586 * uniform()); }

static double *host(size_t n) { return (double *)xmalloc(n * sizeof(double), "test"); }
static double *gaussian(size_t n, double scale) {
    double *x = host(n);
    for (size_t i = 0; i < n; i++) x[i] = (float)(scale * normal());
    return x;
}

static void put(float *to, double x) { *to = (float)x; }
static double get(float x) { return x; }
#ifndef CURIA_FP32
static void put(__half *to, double x) { *to = __float2half((float)x); }
static double get(__half x) { return __half2float(x); }
static void put(__nv_bfloat16 *to, double x) { *to = __float2bfloat16((float)x); }
static double get(__nv_bfloat16 x) { return __bfloat162float(x); }
#endif

template <class T> static T *device(size_t n) {
    T *p = NULL;
    CUDA_CHECK(cudaMalloc((void **)&p, (n ? n : 1) * sizeof(T)));
    CUDA_CHECK(cudaMemset(p, 0xff, (n ? n : 1) * sizeof(T)));
    return p;
}
// x[n] on the device; x takes the values that T can hold.
template <class T> static T *upload(double *x, size_t n) {
    T *p = device<T>(n), *staged = (T *)xmalloc(n * sizeof(T), "test");
    for (size_t i = 0; i < n; i++) put(staged + i, x[i]), x[i] = get(staged[i]);
    CUDA_CHECK(cudaMemcpy(p, staged, n * sizeof(T), cudaMemcpyHostToDevice));
    free(staged);
    return p;
}
template <class T> static double *download(const T *p, size_t n) {
    T *staged = (T *)xmalloc(n * sizeof(T), "test");
    double *x = host(n);
    CUDA_CHECK(cudaMemcpy(staged, p, n * sizeof(T), cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < n; i++) x[i] = get(staged[i]);
    free(staged);
    return x;
}

typedef struct { void *p; size_t bytes; const void *start; } Output;        // start: what it holds before; NULL: poison
template <class T> static Output output(T *p, size_t n, const T *start = NULL) { return {p, n * sizeof(T), start}; }

// Runs it twice; every output must have the same bits.
template <class F> static void twice(const char *name, std::initializer_list<Output> outputs, F run) {
    unsigned char *first[8] = {0}, *second;
    int same = 1, i;
    for (int again = 0; again < 2; again++) {
        for (const Output &o : outputs) {
            if (o.start) CUDA_CHECK(cudaMemcpy(o.p, o.start, o.bytes, cudaMemcpyDeviceToDevice));
            else CUDA_CHECK(cudaMemset(o.p, 0xff, o.bytes));
        }
        run();
        CUDA_CHECK(cudaDeviceSynchronize());
        i = 0;
        for (const Output &o : outputs) {
            second = (unsigned char *)xmalloc(o.bytes, "test");
            CUDA_CHECK(cudaMemcpy(second, o.p, o.bytes, cudaMemcpyDeviceToHost));
            if (again) same &= !memcmp(first[i], second, o.bytes), free(second), free(first[i]);
            else first[i] = second;
            i++;
        }
    }
    report(same, name, "equal bits", 0);
}

static int padded(int n) { return (n + 7) / 8 * 8; }

// [rows, K] into [rows, ld] with a padding of NaN.
static logitX *upload_logits(double *x, int rows, int K, int ld) {
    double *wide = host((size_t)rows * ld);
    for (int r = 0; r < rows; r++) for (int k = 0; k < ld; k++) wide[(size_t)r * ld + k] = k < K ? x[(size_t)r * K + k] : NAN;
    logitX *p = upload<logitX>(wide, (size_t)rows * ld);
    for (int r = 0; r < rows; r++) for (int k = 0; k < K; k++) x[(size_t)r * K + k] = wide[(size_t)r * ld + k];
    free(wide);
    return p;
}

// ---------------------------------------------------------------------------------------------------------------------
// Targets

// t[rows,K] = softmax(l / temp + shift)
static void softmax_rows(double *t, const double *l, const double *shift, double temp, int rows, int K) {
    for (int r = 0; r < rows; r++) {
        double most = -INFINITY, sum = 0;
        for (int k = 0; k < K; k++) most = fmax(most, l[(size_t)r * K + k] / temp + shift[k]);
        for (int k = 0; k < K; k++) sum += t[(size_t)r * K + k] = exp(l[(size_t)r * K + k] / temp + shift[k] - most);
        for (int k = 0; k < K; k++) t[(size_t)r * K + k] /= sum;
    }
}

static void sinkhorn_reference(double *t, const double *l, double temp, int rows, int K) {
    double *a = host(K);
    for (int k = 0; k < K; k++) {
        double most = -INFINITY, sum = 0;
        for (int r = 0; r < rows; r++) most = fmax(most, l[(size_t)r * K + k] / temp);
        for (int r = 0; r < rows; r++) sum += exp(l[(size_t)r * K + k] / temp - most);
        a[k] = -most - log(sum);
    }
    for (int iteration = 0; iteration < 3; iteration++) {
        softmax_rows(t, l, a, temp, rows, K);
        for (int k = 0; k < K; k++) {
            double sum = 0;
            for (int r = 0; r < rows; r++) sum += t[(size_t)r * K + k];
            a[k] -= log(sum);
        }
    }
    free(a);
}

static void test_targets(int rows, int K, double scale, int huge, int centering) {
    char name[64];
    snprintf(name, sizeof name, "%s rows %d K %d%s", centering ? "centering" : "sinkhorn", rows, K, huge ? " huge" : "");
    int ld = padded(K);
    size_t n = (size_t)rows * K;
    float temp = 0.07f;
    double *l = gaussian(n, scale), *t = host(n), *got = host(n), most = 1, given[1] = {temp};
    for (int k = 0; huge && k < K; k++) l[(size_t)(rows / 2) * K + k] = 40 * normal() + (k % 5 == 0 ? 300 : 0);
    logitX *logits = upload_logits(l, rows, K, ld);
    for (size_t i = 0; i < n; i++) most = fmax(most, fabs(l[i]) / temp);
    float *shift = device<float>(K), *row_lse = device<float>(rows), *scratch = device<float>(target_scratch(ld)),
          *entropy = device<float>(1), *device_temp = upload<float>(given, 1);
    double *center = gaussian(K, 0.3), *new_center = host(K), *minus = host(K);
    float *start = upload<float>(center, K), *device_center = device<float>(K);
    if (centering) {
        for (int k = 0; k < K; k++) {
            double mean = 0;
            for (int r = 0; r < rows; r++) mean += l[(size_t)r * K + k];
            new_center[k] = 0.9 * center[k] + 0.1 * mean / rows;
            minus[k] = -center[k] / temp;
        }
        softmax_rows(t, l, minus, temp, rows, K);
        twice(name, {output(shift, K), output(row_lse, rows), output(device_center, K, start)}, [&] {
            softmax_centering(shift, row_lse, device_center, logits, rows, K, ld, device_temp, scratch, 0); });
        near(name, "center", download(device_center, K), new_center, K, exact);
    } else {
        sinkhorn_reference(t, l, temp, rows, K);
        twice(name, {output(shift, K), output(row_lse, rows)}, [&] {
            sinkhorn(shift, row_lse, logits, rows, K, ld, device_temp, scratch, 0); });
    }
    twice(name, {output(entropy, 1)}, [&] {
        target_entropy(entropy, logits, shift, row_lse, rows, K, ld, device_temp, scratch, 0); });
    double *a = download(shift, K), *lse = download(row_lse, rows), want = 0;
    for (size_t i = 0; i < n; i++) got[i] = exp(l[i] / temp + a[i % K] - lse[i / K]);
    near(name, "targets", got, t, n, exact * fmax(1, most / 50));       // a target's error is that of its exponent
    for (int k = 0; k < K; k++) {
        double mean = 0;
        for (int r = 0; r < rows; r++) mean += t[(size_t)r * K + k] / rows;
        want -= mean > 0 ? mean * log(mean) : 0;
    }
    near(name, "entropy", download(entropy, 1), &want, 1, exact * fmax(1, most / 50), 1e-2);
}

// ---------------------------------------------------------------------------------------------------------------------
// Cross-entropies

// Adds -sum_k t log p of one pair to *loss and p - t to d[K].
static void pair(double *d, double *loss, const double *s, const double *t, double temp, int K) {
    double most = -INFINITY, sum = 0;
    for (int k = 0; k < K; k++) most = fmax(most, s[k] / temp);
    for (int k = 0; k < K; k++) sum += exp(s[k] / temp - most);
    for (int k = 0; k < K; k++) {
        double p = exp(s[k] / temp - most) / sum;
        *loss -= t[k] * (s[k] / temp - most - log(sum));
        d[k] += p - t[k];
    }
}

// ibot: B rows, V unused.
static void test_cross_entropy(int ibot, int B, int V, int K, int huge, int in_place) {
    char name[64];
    snprintf(name, sizeof name, ibot ? "ibot rows %d (%d) K %d%s%s" : "dino B %d V %d K %d%s%s", B, V, K, huge ? " huge" : "",
             in_place ? " in place" : "");
    int rows = ibot ? B : (2 + V) * B, teacher_rows = ibot ? B : 2 * B, ld = padded(K);
    size_t n = (size_t)rows * K, wide = (size_t)rows * ld;
    float temp = 0.1f, teacher_temp = 0.05f, gain = 64, relative = 0.25f;
    double *s = gaussian(n, huge ? 30 : 0.3), *l = gaussian((size_t)teacher_rows * K, 0.3), *t = host((size_t)teacher_rows * K);
    double *d = host(n), *loss = host(rows), *weight = host(rows), given[1] = {teacher_temp};
    for (int r = 0; r < rows; r++) weight[r] = 0.1 + uniform();
    logitX *student = upload_logits(s, rows, K, ld), *teacher = upload_logits(l, teacher_rows, K, ld),
        *dlogits = device<logitX>(wide);
    float *shift = device<float>(K), *row_lse = device<float>(teacher_rows), *scratch = device<float>(target_scratch(ld)),
          *row_loss = device<float>(rows), *device_temp = upload<float>(given, 1), *row_weight = upload<float>(weight, rows);
    sinkhorn_reference(t, l, teacher_temp, teacher_rows, K);
    sinkhorn(shift, row_lse, teacher, teacher_rows, K, ld, device_temp, scratch, 0);
    for (int r = 0; r < rows; r++) {
        double *row = d + (size_t)r * K;
        int sample = r % B, crop = r / B;
        if (ibot) {
            pair(row, loss + r, s + (size_t)r * K, t + (size_t)r * K, temp, K);
            loss[r] *= weight[r];
            for (int k = 0; k < K; k++) row[k] *= weight[r] * relative;
        } else {
            if (crop != 0) pair(row, loss + r, s + (size_t)r * K, t + (size_t)sample * K, temp, K);
            if (crop != 1) pair(row, loss + r, s + (size_t)r * K, t + (size_t)(B + sample) * K, temp, K);
        }
        for (int k = 0; k < K; k++) row[k] *= gain;
    }
    twice(name, {output(dlogits, wide, in_place ? student : NULL), output(row_loss, rows)}, [&] {
        const logitX *from = in_place ? dlogits : student;
        if (ibot)
            ibot_cross_entropy(dlogits, row_loss, from, teacher, shift, row_lse, row_weight, relative, rows, K, ld, temp,
                               device_temp, gain, 0);
        else
            dino_cross_entropy(dlogits, row_loss, from, teacher, shift, row_lse, B, V, K, ld, temp, device_temp, gain, 0);
    });
    double *all = download(dlogits, wide), *got = host(n), padding = 0;
    for (size_t i = 0; i < wide; i++) {
        if ((int)(i % ld) < K) got[i / ld * K + i % ld] = all[i];
        else padding += all[i] == 0 ? 0 : 1;
    }
    near(name, "dlogits", got, d, n, half_close);
    near(name, "row loss", download(row_loss, rows), loss, rows, exact);
    report(padding == 0, name, "padding", padding);
}

static void test_sum(int n) {
    char name[64];
    snprintf(name, sizeof name, "sum_rows %d", n);
    double *x = gaussian(n, 1), want = 0;
    for (int i = 0; i < n; i++) x[i] = fabs(x[i]);
    float *in = upload<float>(x, n), *out = device<float>(1);
    for (int i = 0; i < n; i++) want += 0.125 * x[i];
    twice(name, {output(out, 1)}, [&] { sum_rows(out, in, n, 0.125f, 0); });
    near(name, "sum", download(out, 1), &want, 1, 1e-6);
}

// ---------------------------------------------------------------------------------------------------------------------
// KoLeo, SIGReg, Gram, spread, unit vectors

static void test_koleo(int B, int D, int duplicates) {
    char name[64];
    snprintf(name, sizeof name, "koleo B %d D %d%s", B, D, duplicates ? " duplicates" : "");
    int stride = D + 64, dx_stride = D + 128;
    float weight = 0.1f;
    double *x = gaussian((size_t)B * stride, 1), *dx = gaussian((size_t)B * dx_stride, 0.01), *unit = host((size_t)B * D),
           *g = host((size_t)B * D), *near_row = host(B), loss = 0;
    if (duplicates) for (int i = 0; i < D; i++) x[(size_t)(B - 1) * stride + i] = x[(size_t)2 * stride + i] = x[i];
    float *in = upload<float>(x, (size_t)B * stride), *start = upload<float>(dx, (size_t)B * dx_stride),
          *out = device<float>((size_t)B * dx_stride), *value = device<float>(1), *scratch = device<float>(koleo_scratch(B, D));
    int *nearest = device<int>(B);
    twice(name, {output(out, (size_t)B * dx_stride, start), output(value, 1), output(nearest, B)}, [&] {
        koleo(value, out, dx_stride, nearest, in, stride, weight, B, D, scratch, 0); });
    for (int i = 0; i < B; i++) {
        double square = 0;
        for (int d = 0; d < D; d++) square += x[(size_t)i * stride + d] * x[(size_t)i * stride + d];
        for (int d = 0; d < D; d++) unit[(size_t)i * D + d] = x[(size_t)i * stride + d] / fmax(sqrt(square), 1e-8);
    }
    for (int i = 0; B > 1 && i < B; i++) {
        int best = -1;
        double most = -INFINITY, square = 0;
        for (int j = 0; j < B; j++) {
            double dot = 0;
            for (int d = 0; d < D; d++) dot += unit[(size_t)i * D + d] * unit[(size_t)j * D + d];
            if (j != i && dot > most) most = dot, best = j;
        }
        near_row[i] = best;
        for (int d = 0; d < D; d++) square += pow(unit[(size_t)i * D + d] - unit[(size_t)best * D + d] + 1e-8, 2);
        loss -= log(sqrt(square) + 1e-8) / B;
        for (int d = 0; d < D; d++) {
            double q = (unit[(size_t)i * D + d] - unit[(size_t)best * D + d] + 1e-8) / (B * sqrt(square) * (sqrt(square) + 1e-8));
            g[(size_t)i * D + d] -= q;
            g[(size_t)best * D + d] += q;
        }
    }
    for (int i = 0; i < B; i++) {
        double along = 0, square = 0;
        const double *a = unit + (size_t)i * D, *row = g + (size_t)i * D;
        for (int d = 0; d < D; d++) along += a[d] * row[d], square += pow(x[(size_t)i * stride + d], 2);
        for (int d = 0; d < D; d++) dx[(size_t)i * dx_stride + d] += weight / sqrt(square) * (row[d] - a[d] * along);
    }
    int *rows = (int *)xmalloc(B * sizeof(int), "test"), wrong = 0;
    CUDA_CHECK(cudaMemcpy(rows, nearest, B * sizeof(int), cudaMemcpyDeviceToHost));
    for (int i = 0; B > 1 && i < B; i++) wrong += rows[i] != (int)near_row[i];
    report(wrong == 0, name, "nearest", wrong);
    near(name, "loss", download(value, 1), &loss, 1, 1e-5);
    near(name, "dx", download(out, (size_t)B * dx_stride), dx, (size_t)B * dx_stride, 1e-5);
}

static void test_sigreg(int n, int M, double t_min, double t_max, int knots, double scale, int by_n) {
    char name[64];
    snprintf(name, sizeof name, "sigreg n %d M %d [%g,%g]/%d x%g", n, M, t_min, t_max, knots, scale);
    double *s = gaussian((size_t)n * M, scale), *want = host((size_t)n * M), kappa = by_n ? n : 1, weight = 0.05, loss = 0;
    float *in = upload<float>(s, (size_t)n * M), *slope = device<float>((size_t)n * M), *value = device<float>(1),
        *scratch = device<float>(M);
    double step = (t_max - t_min) / (knots - 1);
    for (int m = 0; m < M; m++)
        for (int j = 0; j < knots; j++) {
            double t = t_min + j * step, phi = exp(-0.5 * t * t), cosine = 0, sine = 0;
            double w = (j == 0 || j == knots - 1 ? 0.5 : 1) * step * phi * (t_min == 0 ? 2 : 1);
            for (int r = 0; r < n; r++) cosine += cos(t * s[(size_t)r * M + m]) / n, sine += sin(t * s[(size_t)r * M + m]) / n;
            cosine -= phi;
            loss += kappa * w * (cosine * cosine + sine * sine) / M;
            for (int r = 0; r < n; r++)
                want[(size_t)r * M + m] += weight * 2 * kappa / ((double)M * n) * w * t *
                                           (sine * cos(t * s[(size_t)r * M + m]) - cosine * sin(t * s[(size_t)r * M + m]));
        }
    SigregGrid grid = sigreg_grid(t_min, t_max, knots);
    twice(name, {output(slope, (size_t)n * M), output(value, 1)}, [&] {
        sigreg(value, slope, in, n, M, &grid, kappa, weight, scratch, 0); });
    near(name, "loss", download(value, 1), &loss, 1, 1e-5);
    near(name, "slope", download(slope, (size_t)n * M), want, (size_t)n * M, 1e-5);
}

static void test_gram(int images, int N, int D) {
    char name[64];
    snprintf(name, sizeof name, "gram images %d N %d D %d", images, N, D);
    size_t stride = (size_t)(N + 2) * D, rows = (size_t)images * N, entries = rows * N;
    double *x = gaussian(images * stride, 2), *a = gaussian(entries, 1), *b = gaussian(entries, 1),
           *dunit = gaussian(rows * D, 1), *dx = gaussian(images * stride, 1), *unit = host(rows * D), *inverse = host(rows),
           loss = 0;
    for (int d = 0; d < D; d++) x[d] = 0;
    float *in = upload<float>(x, images * stride), *similarity = upload<float>(a, entries), *target = upload<float>(b, entries),
          *g = upload<float>(dunit, rows * D), *start = upload<float>(dx, images * stride), *difference = device<float>(entries),
          *out = device<float>(images * stride), *device_unit = device<float>(rows * D), *device_inverse = device<float>(rows),
          *value = device<float>(1), *scratch = device<float>(GRAM_BLOCKS), scale = 0.01f;
    twice(name, {output(device_unit, rows * D), output(device_inverse, rows), output(difference, entries, similarity),
                 output(value, 1), output(out, images * stride, start)}, [&] {
        gram_normalize(device_unit, device_inverse, in, stride, images, N, D, 0);
        gram_difference(value, difference, target, images, N, scale, scratch, 0);
        gram_backward(out, stride, g, device_unit, device_inverse, scale, images, N, D, 0);
    });
    for (size_t r = 0; r < rows; r++) {
        const double *from = x + r / N * stride + r % N * D;
        double square = 0, along = 0;
        for (int d = 0; d < D; d++) square += from[d] * from[d];
        inverse[r] = 1 / fmax(sqrt(square), 1e-12);
        for (int d = 0; d < D; d++) along += dunit[r * D + d] * (unit[r * D + d] = from[d] * inverse[r]);
        for (int d = 0; d < D; d++)
            dx[r / N * stride + r % N * D + d] += 4 * scale * inverse[r] * (dunit[r * D + d] - unit[r * D + d] * along);
    }
    for (size_t i = 0; i < entries; i++) a[i] -= b[i], loss += scale * a[i] * a[i];
    near(name, "unit", download(device_unit, rows * D), unit, rows * D, 1e-6);
    near(name, "difference", download(difference, entries), a, entries, 1e-6);
    near(name, "loss", download(value, 1), &loss, 1, 1e-6);
    double *got = download(out, images * stride);
    near(name, "dx", got + D, dx + D, images * stride - D, 1e-6);
    near(name, "dx of a zero row", got, dx, D, 1e-6);
}

static void test_spread(int n, int D, double scale) {
    char name[64];
    snprintf(name, sizeof name, "spread n %d D %d x%g", n, D, scale);
    size_t stride = D + 64;
    double *x = gaussian(n * stride, scale), *centered = host((size_t)n * D), want[2] = {0}, trace = 0, square = 0;
    for (size_t i = 0; i < n * stride; i++) x[i] += 3;
    float *in = upload<float>(x, n * stride), *out = device<float>(2), *scratch = device<float>(spread_scratch(n, D));
    twice(name, {output(out, 2)}, [&] { feature_spread(out, in, stride, n, D, scratch, 0); });
    for (int d = 0; d < D; d++) {
        double mean = 0, variance = 0;
        for (int i = 0; i < n; i++) mean += x[i * stride + d] / n;
        for (int i = 0; i < n; i++) {
            centered[(size_t)i * D + d] = x[i * stride + d] - mean;
            variance += pow(x[i * stride + d] - mean, 2);
        }
        want[0] += sqrt(variance / n) / D;
        trace += variance;
    }
    for (int i = 0; i < n; i++)
        for (int j = 0; j < n; j++) {
            double dot = 0;
            for (int d = 0; d < D; d++) dot += centered[(size_t)i * D + d] * centered[(size_t)j * D + d];
            square += dot * dot;
        }
    want[1] = square > 0 ? trace * trace / square : 0;
    near(name, "std and rank", download(out, 2), want, 2, 1e-5);
}

static void test_unit(int rows, int b, int crops) {
    char name[64];
    snprintf(name, sizeof name, "unit rows %d b %d", rows, b);
    int ld = padded(b);
    size_t n = (size_t)rows * b, wide = (size_t)rows * ld;
    double *y = gaussian(n, 0.2), *dz = gaussian(wide, 1), *add = gaussian((size_t)crops * b, 0.5), *unit = host(wide),
        *norm = host(rows), *dy = host(n);
    for (int i = 0; rows > 2 && i < b; i++) y[(size_t)(rows - 1) * b + i] = 0, y[b + i] *= 1e-14;
    float *in = upload<float>(y, n), *g = upload<float>(dz, wide), *extra = upload<float>(add, (size_t)crops * b),
        *device_norm = device<float>(rows);
    logitX *device_unit = device<logitX>(wide);
    floatX *out = device<floatX>(n);
    twice(name, {output(device_unit, wide), output(device_norm, rows), output(out, n)}, [&] {
        unit_forward(device_unit, device_norm, in, rows, b, ld, 0);
        unit_backward(out, g, in, device_norm, extra, crops, rows, b, ld, 0);
    });
    for (int r = 0; r < rows; r++) {
        double square = 0, along = 0, divisor;
        for (int i = 0; i < b; i++) square += y[(size_t)r * b + i] * y[(size_t)r * b + i];
        norm[r] = sqrt(square);
        divisor = fmax(norm[r], 1e-12);
        for (int i = 0; i < b; i++) along += (unit[(size_t)r * ld + i] = y[(size_t)r * b + i] / divisor) * dz[(size_t)r * ld + i];
        if (norm[r] <= 1e-12) along = 0;
        for (int i = 0; i < b; i++)
            dy[(size_t)r * b + i] = (dz[(size_t)r * ld + i] - unit[(size_t)r * ld + i] * along) / divisor +
                                    (r < crops ? add[(size_t)r * b + i] : 0);
    }
    near(name, "unit", download(device_unit, wide), unit, wide, half_close);
    near(name, "norm", download(device_norm, rows), norm, rows, 1e-6);
    double *got = download(out, n);
    for (int r = 0; r < rows; r++)          // a row of one number has no gradient but rounding; its scale is that of dz / norm
        if (r < 3 || r == rows - 1)
            near(name, "dy", got + (size_t)r * b, dy + (size_t)r * b, b, close16,
                b == 1 && norm[r] > 1e-12 ? fabs(dz[(size_t)r * ld]) / norm[r] : 0);
    near(name, "dy of all ordinary rows", got, dy, rows > 2 ? b : n, close16, b == 1 ? 100 : 0);
}

// ---------------------------------------------------------------------------------------------------------------------
// Pixels

typedef struct { int rows, cols, constant, misaligned; double scale, intercept; } Scan;

static int16_t *make_pixels(const Scan *s) {
    int16_t *p = (int16_t *)xmalloc(((size_t)s->rows * s->cols + 1) * sizeof(int16_t), "test");
    for (int y = 0; y < s->rows; y++)
        for (int x = 0; x < s->cols; x++) {
            double inside = hypot(y - 0.5 * s->rows, x - 0.4 * s->cols) < 0.35 * s->rows;
            double value = inside ? 1060 + 200 * sin(0.3 * x) + 40 * normal() : -1024 + 20 * uniform();
            p[(size_t)y * s->cols + x] = s->constant ? 37 : (int16_t)value;
        }
    return p;
}

static void statistics_reference(double *mean, double *std, const Scan *s, const int16_t *p, int clip) {
    size_t n = (size_t)s->rows * s->cols;
    double square = 0;
    *mean = 0;
    for (size_t i = 0; i < n; i++) *mean += fmax(s->scale * p[i] + s->intercept, clip ? -1000 : -INFINITY) / n;
    for (size_t i = 0; i < n; i++) square += pow(fmax(s->scale * p[i] + s->intercept, clip ? -1000 : -INFINITY) - *mean, 2);
    *std = n > 1 ? sqrt(square / (n - 1)) : 0;
}

static void view_reference(double *out, const Scan *s, const int16_t *p, const DeviceView *v, int size, int clip,
                           int normalize, double mean, double std) {
    int n = size * size;
    double *crop = host((size_t)v->height * v->width), *scratch = host((size_t)(v->height + size) * size);
    for (int i = 0; i < v->height * v->width; i++)
        crop[i] = s->scale * p[(size_t)(v->top + i / v->width) * s->cols + v->left + i % v->width] + s->intercept;
    Resize rows = resize_plan(v->height, size, INTERPOLATE_ANTIALIAS), cols = resize_plan(v->width, size, INTERPOLATE_ANTIALIAS);
    resize_image(&rows, &cols, 1, crop, out, scratch);
    for (int i = 0; clip && i < n; i++) out[i] = fmax(out[i], -1000);
    double least = INFINITY, most = -INFINITY;
    for (int i = 0; i < n; i++) least = fmin(least, out[i]), most = fmax(most, out[i]);
    if (v->gamma != 1 && most - least > 1e-9 * fabs(most))
        for (int i = 0; i < n; i++) out[i] = least + (most - least) * pow(fmax(0, out[i] - least) / (most - least), v->gamma);
    if (v->blur_sigma > 0) {
        double tap[9], total = 0;
        for (int j = -4; j <= 4; j++) total += tap[j + 4] = exp(-0.5 * j * j / ((double)v->blur_sigma * v->blur_sigma));
        for (int pass = 0; pass < 2; pass++) {
            for (int i = 0; i < n; i++) {
                int at = pass ? i / size : i % size, step = pass ? size : 1;
                scratch[i] = 0;
                for (int j = -4; j <= 4; j++) {
                    int k = abs(at + j);
                    if (k >= size) k = 2 * (size - 1) - k;
                    scratch[i] += tap[j + 4] / total * out[i + (k - at) * step];
                }
            }
            memcpy(out, scratch, n * sizeof(double));
        }
    }
    if (normalize == NORMALIZE_VIEW) {
        double square = 0;
        mean = 0;
        for (int i = 0; i < n; i++) mean += out[i] / n;
        for (int i = 0; i < n; i++) square += (out[i] - mean) * (out[i] - mean);
        std = sqrt(square / (n - 1));
    }
    for (int i = 0; i < n; i++) scratch[i] = (out[i] - mean) * v->contrast / (std < 1e-6 ? 1 : std) + v->brightness;
    for (int i = 0; i < n; i++) out[i] = scratch[v->flip ? i - i % size + size - 1 - i % size : i];
}

static void test_pixels(int size, int clip, int normalize, int count) {
    Scan scans[] = {{97, 123, 0, 1, 1.0, -24.0}, {61, 40, 0, 0, 2.5, 10.0}, {50, 50, 1, 1, 0.1, 0.7}, {1, 1, 0, 0, 1, 0},
                    {3, 5, 0, 1, 1, -1}};
    enum { SCANS = sizeof scans / sizeof *scans };
    int16_t *pixels[SCANS];
    DeviceSlice slices[SCANS], *device_slices = device<DeviceSlice>(SCANS);
    double mean[SCANS], std[SCANS];
    char name[64];
    snprintf(name, sizeof name, "pixels size %d clip %d normalize %d", size, clip, normalize);
    for (int i = 0; i < SCANS; i++) {
        const Scan *s = &scans[i];
        size_t n = (size_t)s->rows * s->cols;
        pixels[i] = make_pixels(s);
        int16_t *to = device<int16_t>(n + 1) + s->misaligned;
        CUDA_CHECK(cudaMemcpy(to, pixels[i], n * sizeof(int16_t), cudaMemcpyHostToDevice));
        slices[i] = (DeviceSlice){to, s->rows, s->cols, s->scale, s->intercept, 0, 0};
        statistics_reference(&mean[i], &std[i], s, pixels[i], clip);
        if (normalize == NORMALIZE_VOLUME) slices[i].mean = mean[i] = 12.5, slices[i].std = std[i] = 321;
    }
    CUDA_CHECK(cudaMemcpy(device_slices, slices, sizeof slices, cudaMemcpyHostToDevice));
    if (normalize != NORMALIZE_VOLUME) {
        slice_statistics(device_slices, SCANS, clip, 0);
        CUDA_CHECK(cudaMemcpy(slices, device_slices, sizeof slices, cudaMemcpyDeviceToHost));
    }
    for (int i = 0; i < SCANS; i++) {
        near(name, "slice mean", &slices[i].mean, &mean[i], 1, 1e-12);
        near(name, "slice std", &slices[i].std, &std[i], 1, 1e-10, 1e-3);
    }
    DeviceView kinds[] = {
        {0, 3, 5, 80, 101, 0, 1, 1, 0, 0}, {0, 30, 40, 20, 9, 1, 1, 1, 0, 0}, {0, 10, 0, 64, 64, 1, 0.8f, 1.2f, 0.1f, 0},
        {0, 0, 0, 97, 123, 0, 1, 0.9f, -0.2f, 1.3f}, {1, 2, 3, 50, 30, 1, 1.3f, 1, 0, 0.1f}, 
        {1, 60, 39, 1, 1, 0, 1.2f, 1, 0.3f, 2}, {2, 4, 4, 37, 33, 1, 1.1f, 1.1f, 0.5f, 0.7f},
        {0, 50, 30, 8, 90, 0, 1.2f, 1, 0, 2}, {0, 0, 0, 5, 4, 0, 0.9f, 1, 0, 0}};
    enum { KINDS = sizeof kinds / sizeof *kinds };
    DeviceView *views = (DeviceView *)xmalloc(count * sizeof *views, "test"), *device_views = device<DeviceView>(count);
    for (int i = 0; i < count; i++) views[i] = kinds[i % KINDS];
    CUDA_CHECK(cudaMemcpy(device_views, views, count * sizeof *views, cudaMemcpyHostToDevice));
    size_t n = (size_t)size * size;
    float *out = device<float>(count * n), *scratch = device<float>(pixels_scratch(count, size, 97, 123) / sizeof(float));
    twice(name, {output(out, count * n)}, [&] {
        render_views(out, scratch, device_slices, device_views, count, size, clip, normalize, 97, 123, 0); });
    double *got = download(out, count * n), *want = host(n);
    for (int i = 0; i < count; i++) {
        if (i < KINDS || i == count - 1) {
            const DeviceView *v = &views[i];
            view_reference(want, &scans[v->slice], pixels[v->slice], v, size, clip, normalize, mean[v->slice], std[v->slice]);
            char what[32];
            snprintf(what, sizeof what, "view %d", i);
            near(name, what, got + i * n, want, n, 1e-5, 1e-3);
        } else if (memcmp(got + i * n, got + i % KINDS * n, n * sizeof(double))) report(0, name, "equal views", i);
    }
}

static void test_patches(int count, int channels_in, int C, int size, int p) {
    char name[64];
    snprintf(name, sizeof name, "patches %d x %d(%d) size %d p %d", count, C, channels_in, size, p);
    int grid = size / p, N = grid * grid;
    size_t in = (size_t)count * channels_in * size * size, n = (size_t)count * N * C * p * p;
    double *x = gaussian(in, 1), error = 0;
    float *pixels = upload<float>(x, in);
    floatX *patches = device<floatX>(n);
    twice(name, {output(patches, n)}, [&] { gather_patches(patches, pixels, count, channels_in, C, size, p, 0); });
    double *got = download(patches, n);
    int side = grid * p;
    for (int at = 0; at < count * C * side * side; at++) {
        int u = at % side, y = at / side % side, c = at / (side * side) % C, i = at / (side * side * C);
        floatX rounded;
        put(&rounded, x[(((size_t)i * channels_in + (channels_in == 1 ? 0 : c)) * size + y) * size + u]);
        size_t to = (((size_t)(i * N + y / p * grid + u / p) * C + c) * p + y % p) * p + u % p;
        error += got[to] == get(rounded) ? 0 : 1;
    }
    report(error == 0, name, "all equal", error);
}

int main(void) {
    const int sizes[][2] = {{1, 2}, {3, 2}, {1, 63}, {3, 63}, {50, 63}, {300, 63}, {1, 8195}, {3, 8195}, {50, 8195}};
    for (const int *s : sizes)
        for (int centering = 0; centering < 2; centering++) {
            test_targets(s[0], s[1], 0.3, 0, centering);
            if (s[0] <= 50) test_targets(s[0], s[1], 0.3, 1, centering);
        }
    for (int K : {2, 63, 8195}) {
        test_cross_entropy(0, 1, 2, K, 0, 0);
        test_cross_entropy(0, 3, 3, K, 0, 1);
        test_cross_entropy(1, 1, 0, K, 0, 0);
        test_cross_entropy(1, 17, 0, K, 0, 1);
    }
    test_cross_entropy(0, 2, 0, 63, 1, 0);
    test_cross_entropy(1, 5, 0, 63, 1, 0);
    test_cross_entropy(1, 3, 0, 16384, 0, 0);
    for (int n : {0, 1, 3, 511, 100000}) test_sum(n);
    test_koleo(1, 64, 0);
    test_koleo(2, 64, 0);
    test_koleo(5, 192, 0);
    test_koleo(33, 384, 0);
    test_koleo(7, 64, 1);
    test_sigreg(1, 1, -5, 5, 17, 1, 0);
    test_sigreg(3, 33, 0, 3, 17, 1, 1);
    test_sigreg(50, 70, -5, 5, 17, 1, 0);
    test_sigreg(50, 70, -5, 5, 16, 0.2, 0);
    test_sigreg(9, 40, -1, 1, 2, 1, 0);
    test_sigreg(9, 40, 0, 1, 2, 1, 0);
    test_sigreg(9, 40, -2, 2, 3, 1, 1);
    test_sigreg(33, 32, -5, 5, 257, 1, 0);
    test_sigreg(20, 32, 0, 5, 257, 60, 0);
    test_sigreg(9, 40, -5, 5, 17, 3000, 0);
    test_gram(1, 1, 64);
    test_gram(3, 17, 192);
    test_spread(1, 64, 1);
    test_spread(2, 64, 1);
    test_spread(50, 192, 1);
    test_spread(9, 64, 1e-4);
    test_unit(1, 1, 0);
    test_unit(3, 10, 2);
    test_unit(50, 63, 50);
    test_unit(50, 256, 7);
    for (int normalize : {NORMALIZE_SLICE, NORMALIZE_VOLUME, NORMALIZE_VIEW}) {
        test_pixels(32, 0, normalize, 9);
        test_pixels(15, 1, normalize, 9);
    }
    test_pixels(8, 1, NORMALIZE_VIEW, 290);
    test_patches(3, 1, 1, 24, 8);
    test_patches(2, 1, 3, 30, 7);
    test_patches(2, 3, 3, 16, 16);

    // No rows: no work, and losses of 0.
    float *value = device<float>(2), *scratch = device<float>(4096);
    double zero[2] = {0};
    sinkhorn(NULL, NULL, NULL, 0, 63, 64, NULL, scratch, 0);
    softmax_centering(NULL, NULL, NULL, NULL, 0, 63, 64, NULL, scratch, 0);
    target_entropy(value, NULL, NULL, NULL, 0, 63, 64, NULL, scratch, 0);
    ibot_cross_entropy(NULL, NULL, NULL, NULL, NULL, NULL, NULL, 1, 0, 63, 64, 0.1f, NULL, 1, 0);
    sum_rows(value + 1, NULL, 0, 1, 0);
    near("no rows", "entropy and loss", download(value, 2), zero, 2, 0);
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
