/*
The losses on the GPU (METHOD C), all but the matrix products between them.

  fast_exp              e^x: expf in the fp32 build, the hardware's own in the other
  target_scratch        floats of scratch that the next three need
  sinkhorn              teacher logits to targets by three Sinkhorn-Knopp iterations: six passes over the logits
  softmax_centering     or by a moving mean of the logits: two passes
  target_entropy        entropy of the mean target: one pass
  dino_cross_entropy, ibot_cross_entropy       loss of every row and the gradient of its logits: one pass, and one through L2
  sum_rows              a sum in a fixed order
  koleo                 KoLeo and its gradient
  SigregGrid, sigreg_grid, sigreg              SIGReg between its two products: projections to their gradient
  gram_normalize, gram_difference, gram_backward   Gram anchoring around its three products
  feature_spread        what shows collapse: spread and participation ratio of the class tokens
  unit_forward, unit_backward                  the head's L2 normalisation

A target is never stored: t_bk = exp(l_bk / temp + shift_k - row_lse_b), the log-scaling form of METHOD C.1, is made again from
the teacher's logits wherever it is needed. Logits are [rows, ld]: K columns, then padding up to a multiple of 8, which is never
read as a number; row starts, and every vector of K floats, lie on 16 bytes. A pass over them is all that these kernels cost:
2 bytes moved and some ten operations an element, so that each thread reads 16 bytes at a time and several rows at once.
Temperatures that change from step to step are read from device memory.
*/
#ifndef CURIA_CUDA_LOSSES_H
#define CURIA_CUDA_LOSSES_H

#include "common.cuh"

enum { LOGITS = Pack<logitX>::N };              // logits a thread reads at once
enum { LOGIT_CHUNKS = 32 };                     // rows are split this many ways for sums over them
enum { ROWS_AT_ONCE = 4 };
enum { LSE_BLOCK = 512, COLUMN_BLOCK = 256, ENTROPY_BLOCK = 1024, ROW_WARPS = 4 };

constexpr float ABSENT = -1e30f;                // a logit of padding: e^x is 0, and 0 x is 0 still

#ifdef CURIA_FP32
__device__ static inline float fast_exp(float x) { return expf(x); }
#else
__device__ static inline float fast_exp(float x) { return __expf(x); }
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Targets

// x[LOGITS] from the logits of columns k, k+1, ..
__device__ static inline void unpack_logits(float *x, const Pack<logitX> &v, int k, int K) {
    for (int i = 0; i < LOGITS; i++) x[i] = to_float(v.v[i]);
    if (k + LOGITS > K) for (int i = 0; i < LOGITS; i++) if (k + i >= K) x[i] = ABSENT;
}

// x[LOGITS] = shift[k], shift[k+1], ..; 0 from K on.
__device__ static inline void load_shift(float *x, const float *shift, int k, int K) {
    if (k + LOGITS <= K) {
        for (int i = 0; i < LOGITS; i += 4) {
            Pack<float> v = load_pack(shift + k + i);
            for (int j = 0; j < 4; j++) x[i + j] = v.v[j];
        }
    } else for (int i = 0; i < LOGITS; i++) x[i] = k + i < K ? shift[k + i] : 0;
}

// Takes x[n] into a maximum and a sum of exp(x - maximum), which start at -infinity and 0.
__device__ static inline void add_exponentials(float *most, float *sum, const float *x, int n) {
    float top = *most, total;
    for (int i = 0; i < n; i++) top = fmaxf(top, x[i]);
    total = *sum * fast_exp(*most - top);
    for (int i = 0; i < n; i++) total += fast_exp(x[i] - top);
    *most = top;
    *sum = total;
}

// row_lse[r] = log sum_k exp(l/temp + shift_k). A block takes ROWS_AT_ONCE rows, which share the shifts: those are 4 bytes an
// element, from L2, beside 2 from memory.
static __global__ void __launch_bounds__(LSE_BLOCK) row_lse_kernel(float *row_lse, const logitX *logits, const float *shift,
                                                                   int rows, int K, int ld, const float *temp) {
    int first = blockIdx.x * ROWS_AT_ONCE;
    float inverse = 1 / *temp, most[ROWS_AT_ONCE], sum[ROWS_AT_ONCE];
    for (int i = 0; i < ROWS_AT_ONCE; i++) most[i] = -INFINITY, sum[i] = 0;
    for (int k = threadIdx.x * LOGITS; k < K; k += blockDim.x * LOGITS) {
        Pack<logitX> v[ROWS_AT_ONCE];
        float add[LOGITS], x[LOGITS];
        for (int i = 0; i < ROWS_AT_ONCE; i++) v[i] = load_pack(logits + (size_t)min(first + i, rows - 1) * ld + k);
        load_shift(add, shift, k, K);
        for (int i = 0; i < ROWS_AT_ONCE; i++) {
            unpack_logits(x, v[i], k, K);
            for (int j = 0; j < LOGITS; j++) x[j] = x[j] * inverse + add[j];
            add_exponentials(&most[i], &sum[i], x, LOGITS);
        }
    }
    for (int i = 0; i < ROWS_AT_ONCE; i++) {
        float top = block_max(most[i]), total = block_sum(sum[i] * fast_exp(most[i] - top));
        if (threadIdx.x == 0 && first + i < rows) row_lse[first + i] = top + logf(total);
    }
}

// Over a chunk of rows, for every column: the maximum of l/temp and the sum of exp(l/temp - maximum).
static __global__ void __launch_bounds__(COLUMN_BLOCK) column_lse_kernel(float *part_most, float *part_sum,
                                                                         const logitX *logits, int rows, int ld, int chunk,
                                                                         const float *temp) {
    int k = (blockIdx.x * blockDim.x + threadIdx.x) * LOGITS, from = blockIdx.y * chunk, to = min(from + chunk, rows);
    if (k >= ld) return;
    float inverse = 1 / *temp;
    Pack<float> most[LOGITS / 4], sum[LOGITS / 4];
    for (int j = 0; j < LOGITS; j++) most[j / 4].v[j % 4] = -INFINITY, sum[j / 4].v[j % 4] = 0;
    for (int r = from; r < to; r += ROWS_AT_ONCE) {
        Pack<logitX> v[ROWS_AT_ONCE];
        float x[ROWS_AT_ONCE];
        for (int i = 0; i < ROWS_AT_ONCE; i++) v[i] = load_pack(logits + (size_t)min(r + i, to - 1) * ld + k);
        for (int j = 0; j < LOGITS; j++) {
            for (int i = 0; i < ROWS_AT_ONCE; i++) x[i] = r + i < to ? to_float(v[i].v[j]) * inverse : ABSENT;
            add_exponentials(&most[j / 4].v[j % 4], &sum[j / 4].v[j % 4], x, ROWS_AT_ONCE);
        }
    }
    for (int j = 0; j < LOGITS / 4; j++) {
        store_pack(part_most + (size_t)blockIdx.y * ld + k + 4 * j, most[j]);
        store_pack(part_sum + (size_t)blockIdx.y * ld + k + 4 * j, sum[j]);
    }
}

// shift[k] = -log sum over all rows of exp(l/temp)
static __global__ void column_lse_finish_kernel(float *shift, const float *part_most, const float *part_sum, int chunks, int K,
                                                int ld) {
    int k = blockIdx.x * blockDim.x + threadIdx.x;
    if (k >= K) return;
    float most = -INFINITY, sum = 0;
    for (int c = 0; c < chunks; c++) most = fmaxf(most, part_most[(size_t)c * ld + k]);
    for (int c = 0; c < chunks; c++) sum += part_sum[(size_t)c * ld + k] * expf(part_most[(size_t)c * ld + k] - most);
    shift[k] = -(most + logf(sum));
}

// Over a chunk of rows, for every column: the sum of its targets exp(l/temp + shift_k - row_lse), or of l where row_lse is NULL.
static __global__ void __launch_bounds__(COLUMN_BLOCK) column_sum_kernel(float *part, const logitX *logits, const float *shift,
                                                                         const float *row_lse, int rows, int K, int ld,
                                                                         int chunk, const float *temp) {
    int k = (blockIdx.x * blockDim.x + threadIdx.x) * LOGITS, from = blockIdx.y * chunk, to = min(from + chunk, rows);
    if (k >= ld) return;
    float inverse = 1 / *temp, add[LOGITS];
    Pack<float> sum[LOGITS / 4];
    load_shift(add, shift, k, K);
    for (int j = 0; j < LOGITS; j++) sum[j / 4].v[j % 4] = 0;
    for (int r = from; r < to; r += ROWS_AT_ONCE) {
        Pack<logitX> v[ROWS_AT_ONCE];
        float lse[ROWS_AT_ONCE];
        for (int i = 0; i < ROWS_AT_ONCE; i++) {
            v[i] = load_pack(logits + (size_t)min(r + i, to - 1) * ld + k);
            lse[i] = r + i >= to ? INFINITY : row_lse ? row_lse[r + i] : 0;
        }
        for (int j = 0; j < LOGITS; j++) {
            float rows_sum = 0;
            for (int i = 0; i < ROWS_AT_ONCE; i++) {
                float x = to_float(v[i].v[j]);
                rows_sum += row_lse ? fast_exp(x * inverse + add[j] - lse[i]) : r + i < to ? x : 0;
            }
            sum[j / 4].v[j % 4] += rows_sum;
        }
    }
    for (int j = 0; j < LOGITS / 4; j++) store_pack(part + (size_t)blockIdx.y * ld + k + 4 * j, sum[j]);
}

enum { FINISH_SHIFT, FINISH_ENTROPY, FINISH_CENTER };

// The column sums' use: shift_k -= log sum; out_k = -mean log mean; or center_k <- 0.9 center_k + 0.1 mean.
static __global__ void column_sum_finish_kernel(float *out, const float *part, int chunks, int rows, int K, int ld, int use) {
    int k = blockIdx.x * blockDim.x + threadIdx.x;
    if (k >= K) return;
    float sum = 0;
    for (int c = 0; c < chunks; c++) sum += part[(size_t)c * ld + k];
    float mean = sum / rows;
    if (use == FINISH_SHIFT) out[k] -= logf(sum);
    if (use == FINISH_ENTROPY) out[k] = mean > 0 ? -mean * logf(mean) : 0;
    if (use == FINISH_CENTER) out[k] = 0.9f * out[k] + 0.1f * mean;
}

static __global__ void center_shift_kernel(float *shift, const float *center, int K, const float *temp) {
    int k = blockIdx.x * blockDim.x + threadIdx.x;
    if (k < K) shift[k] = -center[k] / *temp;
}

// out = scale * sum of x[n]; one block.
static __global__ void sum_rows_kernel(float *out, const float *x, int n, float scale) {
    float sum = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += x[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *out = scale * sum;
}

static inline void sum_rows(float *out, const float *x, int n, float scale, cudaStream_t stream) {
    sum_rows_kernel<<<1, 512, 0, stream>>>(out, x, n, scale);
    launched("sum_rows_kernel");
}

static inline size_t target_scratch(int ld) { return (size_t)2 * LOGIT_CHUNKS * ld; }

static inline void row_lse_pass(float *row_lse, const logitX *logits, const float *shift, int rows, int K, int ld,
                                const float *temp, cudaStream_t stream) {
    row_lse_kernel<<<divide_up(rows, ROWS_AT_ONCE), LSE_BLOCK, 0, stream>>>(row_lse, logits, shift, rows, K, ld, temp);
    launched("row_lse_kernel");
}

static inline void column_sum_pass(float *out, const logitX *logits, const float *shift, const float *row_lse, int rows, int K,
                                   int ld, const float *temp, int use, float *scratch, cudaStream_t stream) {
    int chunk = divide_up(rows, LOGIT_CHUNKS), chunks = divide_up(rows, chunk);
    dim3 grid(divide_up(ld / LOGITS, COLUMN_BLOCK), chunks);
    column_sum_kernel<<<grid, COLUMN_BLOCK, 0, stream>>>(scratch, logits, shift, row_lse, rows, K, ld, chunk, temp);
    launched("column_sum_kernel");
    column_sum_finish_kernel<<<divide_up(K, COLUMN_BLOCK), COLUMN_BLOCK, 0, stream>>>(out, scratch, chunks, rows, K, ld, use);
    launched("column_sum_finish_kernel");
}

// shift[K], row_lse[rows] from logits[rows, ld] (METHOD C.1). Passes: columns once, then twice rows and columns, then rows. Every
// sum is of numbers scaled by their largest, so that no logits overflow it.
static inline void sinkhorn(float *shift, float *row_lse, const logitX *logits, int rows, int K, int ld, const float *temp,
                            float *scratch, cudaStream_t stream) {
    if (!rows) return;
    int chunk = divide_up(rows, LOGIT_CHUNKS), chunks = divide_up(rows, chunk);
    float *part_sum = scratch + (size_t)LOGIT_CHUNKS * ld;
    dim3 grid(divide_up(ld / LOGITS, COLUMN_BLOCK), chunks);
    column_lse_kernel<<<grid, COLUMN_BLOCK, 0, stream>>>(scratch, part_sum, logits, rows, ld, chunk, temp);
    launched("column_lse_kernel");
    column_lse_finish_kernel<<<divide_up(K, COLUMN_BLOCK), COLUMN_BLOCK, 0, stream>>>(shift, scratch, part_sum, chunks, K, ld);
    launched("column_lse_finish_kernel");
    for (int iteration = 0; iteration < 2; iteration++) {
        row_lse_pass(row_lse, logits, shift, rows, K, ld, temp, stream);
        column_sum_pass(shift, logits, shift, row_lse, rows, K, ld, temp, FINISH_SHIFT, scratch, stream);
    }
    row_lse_pass(row_lse, logits, shift, rows, K, ld, temp, stream);
}

// shift = -center / temp and its row_lse; then center[K] <- 0.9 center + 0.1 mean logit, for the next step.
static inline void softmax_centering(float *shift, float *row_lse, float *center, const logitX *logits, int rows, int K, int ld,
                                     const float *temp, float *scratch, cudaStream_t stream) {
    if (!rows) return;
    center_shift_kernel<<<divide_up(K, COLUMN_BLOCK), COLUMN_BLOCK, 0, stream>>>(shift, center, K, temp);
    launched("center_shift_kernel");
    row_lse_pass(row_lse, logits, shift, rows, K, ld, temp, stream);
    column_sum_pass(center, logits, shift, NULL, rows, K, ld, temp, FINISH_CENTER, scratch, stream);
}

// entropy[1] of the mean target, nats; 0 without rows.
static inline void target_entropy(float *entropy, const logitX *logits, const float *shift, const float *row_lse, int rows,
                                  int K, int ld, const float *temp, float *scratch, cudaStream_t stream) {
    float *terms = scratch + (size_t)LOGIT_CHUNKS * ld;
    if (rows) column_sum_pass(terms, logits, shift, row_lse, rows, K, ld, temp, FINISH_ENTROPY, scratch, stream);
    sum_rows(entropy, terms, rows ? K : 0, 1, stream);
}

// ---------------------------------------------------------------------------------------------------------------------
// Cross-entropies

// The targets of columns k, k+1, .. of one teacher row, added to t[LOGITS].
__device__ static inline void add_targets(float *t, const logitX *row, const float *add, float lse, float inverse, int k, int K) {
    float x[LOGITS];
    unpack_logits(x, load_pack(row + k), k, K);
    for (int i = 0; i < LOGITS; i++) t[i] += fast_exp(x[i] * inverse + add[i] - lse);
}

// One block, one row of student logits s against the targets of teacher row t0 (and t1, may be NULL): loss = weight times
// -sum_k t_k log p_k, and d = scale (count p - t); d may be s. The second time the row is read from its end, where L2 still has
// it; one block of 1024 threads fills a multiprocessor, so that what is in flight is one row each. Padding of d becomes 0.
__device__ static inline void cross_entropy_row(logitX *d, float *loss, const logitX *s, const logitX *t0, const logitX *t1,
                                                float lse0, float lse1, const float *shift, float weight, float scale, int K,
                                                int ld, float student_temp, float teacher_temp) {
    float inverse = 1 / student_temp, teacher_inverse = 1 / teacher_temp, count = t1 ? 2 : 1, most = -INFINITY, sum = 0, dot = 0;
    float x[LOGITS], t[LOGITS], add[LOGITS];
    for (int k = threadIdx.x * LOGITS; k < K; k += blockDim.x * LOGITS) {
        Pack<logitX> v = load_pack(s + k);
        load_shift(add, shift, k, K);
        for (int i = 0; i < LOGITS; i++) t[i] = 0;
        add_targets(t, t0, add, lse0, teacher_inverse, k, K);
        if (t1) add_targets(t, t1, add, lse1, teacher_inverse, k, K);
        unpack_logits(x, v, k, K);
        for (int i = 0; i < LOGITS; i++) {
            x[i] *= inverse;
            dot += t[i] * x[i];
        }
        add_exponentials(&most, &sum, x, LOGITS);
    }
    float top = block_max(most), total = block_sum(sum * fast_exp(most - top)), share = count / total;
    dot = block_sum(dot);
    if (threadIdx.x == 0) *loss = weight * (count * (top + logf(total)) - dot);
    for (int trip = (ld - 1) / (blockDim.x * LOGITS); trip >= 0; trip--) {
        int k = (trip * blockDim.x + threadIdx.x) * LOGITS;
        if (k >= ld) continue;
        Pack<logitX> v = load_pack(s + k);
        load_shift(add, shift, k, K);
        for (int i = 0; i < LOGITS; i++) t[i] = 0;
        add_targets(t, t0, add, lse0, teacher_inverse, k, K);
        if (t1) add_targets(t, t1, add, lse1, teacher_inverse, k, K);
        unpack_logits(x, v, k, K);
        for (int i = 0; i < LOGITS; i++)
            v.v[i] = from_float<logitX>(scale * (share * fast_exp(x[i] * inverse - top) - t[i]));
        store_pack(d + k, v);
    }
}

static __global__ void __launch_bounds__(ENTROPY_BLOCK) dino_kernel(logitX *dlogits, float *row_loss, const logitX *student,
                                                                    const logitX *teacher, const float *shift,
                                                                    const float *row_lse, int B, int K, int ld,
                                                                    float student_temp, const float *teacher_temp,
                                                                    float gain) {
    int r = blockIdx.x, sample = r % B, crop = r / B, first = crop == 0 ? B + sample : sample, second = B + sample;
    cross_entropy_row(dlogits + (size_t)r * ld, row_loss + r, student + (size_t)r * ld, teacher + (size_t)first * ld,
                      crop >= 2 ? teacher + (size_t)second * ld : NULL, row_lse[first], row_lse[second], shift, 1, gain, K, ld,
                      student_temp, *teacher_temp);
}

static __global__ void __launch_bounds__(ENTROPY_BLOCK) ibot_kernel(logitX *dlogits, float *row_loss, const logitX *student,
                                                                    const logitX *teacher, const float *shift,
                                                                    const float *row_lse, const float *row_weight,
                                                                    float relative, int K, int ld, float student_temp,
                                                                    const float *teacher_temp, float gain) {
    int r = blockIdx.x;
    float weight = row_weight[r];
    cross_entropy_row(dlogits + (size_t)r * ld, row_loss + r, student + (size_t)r * ld, teacher + (size_t)r * ld, NULL,
                      row_lse[r], 0, shift, weight, weight * relative * gain, K, ld, student_temp, *teacher_temp);
}

// DINO (METHOD C.2): student rows [(2+V) B, ld] against teacher rows [2B, ld], crop-major: a local crop against both teacher
// crops, a global one against the other. dlogits = gain (count p - t); the rest of the gradient's scale is the caller's, and
// `gain`, a power of two, keeps small probabilities out of fp16's subnormals. row_loss[(2+V) B] sums over a row's pairs.
static inline void dino_cross_entropy(logitX *dlogits, float *row_loss, const logitX *student, const logitX *teacher,
                                      const float *shift, const float *row_lse, int B, int V, int K, int ld,
                                      float student_temp, const float *teacher_temp, float gain, cudaStream_t stream) {
    if (!B) return;
    dino_kernel<<<(2 + V) * B, ENTROPY_BLOCK, 0, stream>>>(dlogits, row_loss, student, teacher, shift, row_lse, B, K, ld,
                                                           student_temp, teacher_temp, gain);
    launched("dino_kernel");
}

// iBOT (METHOD C.3): row against row. dlogits = row_weight relative gain (p - t), row_loss = row_weight times the cross-entropy.
static inline void ibot_cross_entropy(logitX *dlogits, float *row_loss, const logitX *student, const logitX *teacher,
                                      const float *shift, const float *row_lse, const float *row_weight, float relative,
                                      int rows, int K, int ld, float student_temp, const float *teacher_temp, float gain,
                                      cudaStream_t stream) {
    if (!rows) return;
    ibot_kernel<<<rows, ENTROPY_BLOCK, 0, stream>>>(dlogits, row_loss, student, teacher, shift, row_lse, row_weight, relative,
                                                    K, ld, student_temp, teacher_temp, gain);
    launched("ibot_kernel");
}

// ---------------------------------------------------------------------------------------------------------------------
// KoLeo (METHOD C.4)

// A warp a row: unit = x / max(|x|, 1e-8). The norm in double, as on the CPU: between near duplicates every bit of unit counts.
static __global__ void koleo_unit_kernel(float *unit, float *inverse, const float *x, size_t stride, int B, int D) {
    int r = blockIdx.x * ROW_WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (r >= B) return;
    double square = 0;
    for (int i = lane; i < D; i += WARP) square += (double)x[r * stride + i] * x[r * stride + i];
    for (int offset = WARP / 2; offset > 0; offset /= 2) square += __shfl_xor_sync(0xffffffffu, square, offset);
    float scale = (float)(1 / fmax(sqrt(square), 1e-8));
    for (int i = lane; i < D; i += WARP) unit[(size_t)r * D + i] = x[r * stride + i] * scale;
    if (lane == 0) inverse[r] = scale;
}

// A block a row: its nearest other row (the first of equals), their distance, and its term of the loss.
static __global__ void koleo_nearest_kernel(int *nearest, float *distance, float *terms, const float *unit, int B, int D) {
    __shared__ float dots[ROW_WARPS];
    __shared__ int rows[ROW_WARPS];
    int r = blockIdx.x, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, closest = B;
    const float *a = unit + (size_t)r * D;
    float best = -INFINITY, square = 0;
    for (int j = warp; j < B; j += ROW_WARPS) {
        float dot = 0;
        for (int i = lane; i < D; i += WARP) dot += a[i] * unit[(size_t)j * D + i];
        dot = warp_sum(dot);
        if (j != r && dot > best) best = dot, closest = j;
    }
    if (lane == 0) dots[warp] = best, rows[warp] = closest;
    __syncthreads();
    for (int w = 0; w < ROW_WARPS; w++)
        if (dots[w] > best || (dots[w] == best && rows[w] < closest)) best = dots[w], closest = rows[w];
    if (closest == B) closest = r == 0;             // only where the tokens are not numbers, which the loss then shows
    for (int i = threadIdx.x; i < D; i += blockDim.x) {
        float difference = a[i] - unit[(size_t)closest * D + i] + 1e-8f;
        square += difference * difference;
    }
    float d = sqrtf(block_sum(square));
    if (threadIdx.x == 0) nearest[r] = closest, distance[r] = d, terms[r] = -logf(d + 1e-8f);
}

// A block a row: gathers what the row's own distance pulls and what those pull whose nearest it is, then the adjoint of the norm.
static __global__ void koleo_backward_kernel(float *dx, size_t dx_stride, float *dunit, const float *unit, const float *inverse,
                                             const int *nearest, const float *distance, float weight, int B, int D) {
    int r = blockIdx.x;
    const float *a = unit + (size_t)r * D;
    float *g = dunit + (size_t)r * D, along = 0;
    for (int i = threadIdx.x; i < D; i += blockDim.x) {
        float sum = 0;
        for (int j = 0; j < B; j++) {
            if (j != r && nearest[j] != r) continue;
            float pull = unit[(size_t)j * D + i] - unit[(size_t)nearest[j] * D + i] + 1e-8f;
            pull /= B * distance[j] * (distance[j] + 1e-8f);
            sum += j == r ? -pull : pull;
        }
        g[i] = sum;                                 // read again by this thread alone
        along += a[i] * sum;
    }
    along = block_sum(along);
    for (int i = threadIdx.x; i < D; i += blockDim.x) dx[r * dx_stride + i] += weight * inverse[r] * (g[i] - a[i] * along);
}

static inline size_t koleo_scratch(int B, int D) { return (size_t)2 * B * D + 3 * B; }

// loss[1] of x[B rows, `stride` apart]; adds weight * gradient to dx. nearest[B]; scratch: koleo_scratch() floats.
static inline void koleo(float *loss, float *dx, size_t dx_stride, int *nearest, const float *x, size_t stride, float weight,
                         int B, int D, float *scratch, cudaStream_t stream) {
    float *unit = scratch, *dunit = unit + (size_t)B * D, *inverse = dunit + (size_t)B * D, *distance = inverse + B,
        *terms = distance + B;
    if (B >= 2) {
        koleo_unit_kernel<<<divide_up(B, ROW_WARPS), ROW_WARPS * WARP, 0, stream>>>(unit, inverse, x, stride, B, D);
        launched("koleo_unit_kernel");
        koleo_nearest_kernel<<<B, ROW_WARPS * WARP, 0, stream>>>(nearest, distance, terms, unit, B, D);
        launched("koleo_nearest_kernel");
        koleo_backward_kernel<<<B, ROW_WARPS * WARP, 0, stream>>>(dx, dx_stride, dunit, unit, inverse, nearest, distance,
                                                                  weight, B, D);
        launched("koleo_backward_kernel");
    }
    sum_rows(loss, terms, B >= 2 ? B : 0, 1.0f / B, stream);
}

// ---------------------------------------------------------------------------------------------------------------------
// SIGReg (METHOD C.5)

enum { SIGREG_KNOTS = 256, SIGREG_RUN = 8, SIGREG_BLOCK = 2 * SIGREG_RUN * WARP };

// The knots t = first + i step above 0: the statistic is even in t and nothing at 0, so that they stand for a two-sided grid too.
typedef struct {
    int knots;
    double first, step;
    float t[SIGREG_KNOTS], phi[SIGREG_KNOTS], weight[SIGREG_KNOTS];
} SigregGrid;

// `knots` points from t_min, which is 0 or -t_max, to t_max; trapezoid weights times the Gaussian window, inner ones of a
// one-sided grid doubled.
static inline SigregGrid sigreg_grid(double t_min, double t_max, int knots) {
    SigregGrid g = {};
    g.step = (t_max - t_min) / (knots - 1);
    int skip = t_min < 0 ? (knots + 1) / 2 : 1;
    g.first = t_min + skip * g.step;
    g.knots = knots - skip;
    for (int i = 0; i < g.knots; i++) {
        double t = g.first + i * g.step, phi = exp(-0.5 * t * t);
        g.t[i] = (float)t;
        g.phi[i] = (float)phi;
        g.weight[i] = (float)((i == g.knots - 1 ? 1 : 2) * g.step * phi);
    }
    return g;
}

// cos and sin of a phase that is folded into [-pi, pi] in double, so that large ones keep their digits.
__device__ static inline void turn(float *cosine, float *sine, double phase) {
    phase -= 6.283185307179586 * rint(phase * 0.15915494309189535);
    sincosf((float)phase, sine, cosine);
}

// A block takes 32 directions, a lane each, all samples of s[n, M], and SIGREG_RUN knots at a time: one sincos, then rotations by
// `step`, few enough that their error stays at 1e-6. First the means over samples, C - phi and S, then the slope
// scale sum_j w t (S cos - (C - phi) sin). statistic[M].
static __global__ void __launch_bounds__(SIGREG_BLOCK) sigreg_kernel(float *statistic, float *slope, const float *s, int n,
                                                                     int M, SigregGrid grid, float scale) {
    __shared__ float part[2 * SIGREG_RUN][2 * SIGREG_RUN][WARP];    // [warp][cosines, then sines][direction]
    __shared__ float pull[2 * SIGREG_RUN][WARP];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, m = blockIdx.x * WARP + lane, from = m < M ? warp : n;
    float square = 0;
    for (int first = 0; first < grid.knots; first += SIGREG_RUN) {
        double start = grid.first + first * grid.step;
        float sums[2 * SIGREG_RUN] = {0}, cosine, sine, step_cosine, step_sine;
        for (int r = from; r < n; r += 2 * SIGREG_RUN) {
            float x = s[(size_t)r * M + m];
            turn(&cosine, &sine, start * x);
            turn(&step_cosine, &step_sine, grid.step * x);
            for (int j = 0; j < SIGREG_RUN; j++) {
                sums[j] += cosine;
                sums[SIGREG_RUN + j] += sine;
                float turned = cosine * step_cosine - sine * step_sine;
                sine = sine * step_cosine + cosine * step_sine;
                cosine = turned;
            }
        }
        for (int j = 0; j < 2 * SIGREG_RUN; j++) part[warp][j][lane] = sums[j];
        __syncthreads();
        int knot = first + warp % SIGREG_RUN, is_sine = warp / SIGREG_RUN;      // this warp's share of the sums
        float mean = 0;
        for (int w = 0; w < 2 * SIGREG_RUN; w++) mean += part[w][warp][lane];
        mean = knot < grid.knots ? mean / n - (is_sine ? 0 : grid.phi[knot]) : 0;
        float weight = knot < grid.knots ? grid.weight[knot] : 0, t = knot < grid.knots ? grid.t[knot] : 0;
        square += weight * mean * mean;
        pull[warp][lane] = scale * weight * t * mean;
        __syncthreads();
        float pulls[2 * SIGREG_RUN];
        for (int j = 0; j < 2 * SIGREG_RUN; j++) pulls[j] = pull[j][lane];
        for (int r = from; r < n; r += 2 * SIGREG_RUN) {
            float x = s[(size_t)r * M + m], sum = first ? slope[(size_t)r * M + m] : 0;
            turn(&cosine, &sine, start * x);
            turn(&step_cosine, &step_sine, grid.step * x);
            for (int j = 0; j < SIGREG_RUN; j++) {
                sum += pulls[SIGREG_RUN + j] * cosine - pulls[j] * sine;
                float turned = cosine * step_cosine - sine * step_sine;
                sine = sine * step_cosine + cosine * step_sine;
                cosine = turned;
            }
            slope[(size_t)r * M + m] = sum;
        }
    }
    part[warp][0][lane] = square;
    __syncthreads();
    if (warp == 0 && m < M) {
        float total = 0;
        for (int w = 0; w < 2 * SIGREG_RUN; w++) total += part[w][0][lane];
        statistic[m] = total;
    }
}

// slope[n, M] = weight * gradient by the projections s[n, M], loss[1] = mean over directions of kappa times the statistic.
// scratch: M floats.
static inline void sigreg(float *loss, float *slope, const float *s, int n, int M, const SigregGrid *grid, double kappa,
                          double weight, float *scratch, cudaStream_t stream) {
    if (n) {
        sigreg_kernel<<<divide_up(M, WARP), SIGREG_BLOCK, 0, stream>>>(scratch, slope, s, n, M, *grid,
                                                                       (float)(weight * 2 * kappa / ((double)M * n)));
        launched("sigreg_kernel");
    }
    sum_rows(loss, scratch, n ? M : 0, (float)(kappa / M), stream);
}

// ---------------------------------------------------------------------------------------------------------------------
// Gram anchoring (METHOD C.6). Row i of image m of a token array stands at m * image_stride + i * D.

enum { GRAM_BLOCKS = 1024, GRAM_BLOCK = 256 };

static __global__ void gram_normalize_kernel(float *unit, float *inverse, const float *x, size_t image_stride, int rows, int N,
                                             int D) {
    int r = blockIdx.x * ROW_WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (r >= rows) return;
    const float *from = x + r / N * image_stride + (size_t)(r % N) * D;
    float square = 0;
    for (int i = lane; i < D; i += WARP) square += from[i] * from[i];
    float scale = 1 / fmaxf(sqrtf(warp_sum(square)), 1e-12f);
    for (int i = lane; i < D; i += WARP) unit[(size_t)r * D + i] = from[i] * scale;
    if (lane == 0) inverse[r] = scale;
}

static __global__ void __launch_bounds__(GRAM_BLOCK) gram_difference_kernel(float *part, float *similarity, const float *target,
                                                                            size_t n) {
    float sum = 0;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
        float difference = similarity[i] - target[i];
        similarity[i] = difference;
        sum += difference * difference;
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) part[blockIdx.x] = sum;
}

static __global__ void gram_backward_kernel(float *dx, size_t image_stride, const float *dunit, const float *unit,
                                            const float *inverse, float scale, int rows, int N, int D) {
    int r = blockIdx.x * ROW_WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (r >= rows) return;
    const float *a = unit + (size_t)r * D, *g = dunit + (size_t)r * D;
    float *to = dx + r / N * image_stride + (size_t)(r % N) * D, along = 0;
    for (int i = lane; i < D; i += WARP) along += a[i] * g[i];
    along = warp_sum(along);
    for (int i = lane; i < D; i += WARP) to[i] += 4 * scale * inverse[r] * (g[i] - a[i] * along);
}

// unit[images N, D] = x / max(|x|, 1e-12), inverse[images N] = 1 / max(|x|, 1e-12).
static inline void gram_normalize(float *unit, float *inverse, const float *x, size_t image_stride, int images, int N, int D,
                                  cudaStream_t stream) {
    int rows = images * N;
    if (!rows) return;
    gram_normalize_kernel<<<divide_up(rows, ROW_WARPS), ROW_WARPS * WARP, 0, stream>>>(unit, inverse, x, image_stride, rows,
                                                                                       N, D);
    launched("gram_normalize_kernel");
}

// similarity[images, N, N] -= target; loss[1] = scale * the sum of its squares. scratch: GRAM_BLOCKS floats.
static inline void gram_difference(float *loss, float *similarity, const float *target, int images, int N, float scale,
                                   float *scratch, cudaStream_t stream) {
    size_t n = (size_t)images * N * N;
    int blocks = n < (size_t)GRAM_BLOCKS * GRAM_BLOCK ? divide_up((long long)n, GRAM_BLOCK) : GRAM_BLOCKS;
    if (blocks) {
        gram_difference_kernel<<<blocks, GRAM_BLOCK, 0, stream>>>(scratch, similarity, target, n);
        launched("gram_difference_kernel");
    }
    sum_rows(loss, scratch, blocks, scale, stream);
}

// Adds scale times the gradient of the sum of squares to dx; dunit[images N, D] = difference times unit, a quarter of that sum's
// gradient by unit.
static inline void gram_backward(float *dx, size_t image_stride, const float *dunit, const float *unit, const float *inverse,
                                 float scale, int images, int N, int D, cudaStream_t stream) {
    int rows = images * N;
    if (!rows) return;
    gram_backward_kernel<<<divide_up(rows, ROW_WARPS), ROW_WARPS * WARP, 0, stream>>>(dx, image_stride, dunit, unit, inverse,
                                                                                      scale, rows, N, D);
    launched("gram_backward_kernel");
}

// ---------------------------------------------------------------------------------------------------------------------
// Spread of the features

// A thread a channel: centered[n, D] and variance[D], times n.
static __global__ void spread_center_kernel(float *centered, float *variance, const float *x, size_t stride, int n, int D) {
    int d = blockIdx.x * blockDim.x + threadIdx.x;
    if (d >= D) return;
    double mean = 0, sum = 0;
    for (int i = 0; i < n; i++) mean += x[i * stride + d];
    mean /= n;
    for (int i = 0; i < n; i++) {
        double difference = x[i * stride + d] - mean;
        centered[(size_t)i * D + d] = (float)difference;
        sum += difference * difference;
    }
    variance[d] = (float)sum;
}

// A block a row: the sum over all rows of the square of their dot product.
static __global__ void spread_square_kernel(float *square, const float *centered, int n, int D) {
    int r = blockIdx.x, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    float sum = 0;
    for (int j = warp; j < n; j += ROW_WARPS) {
        float dot = 0;
        for (int i = lane; i < D; i += WARP) dot += centered[(size_t)r * D + i] * centered[(size_t)j * D + i];
        dot = warp_sum(dot);
        sum += dot * dot;
    }
    sum = block_sum(lane == 0 ? sum : 0);
    if (threadIdx.x == 0) square[r] = sum;
}

static __global__ void spread_finish_kernel(float *out, const float *variance, const float *square, int n, int D) {
    float deviation = 0, trace = 0, squares = 0;
    for (int i = threadIdx.x; i < D; i += blockDim.x) {
        deviation += sqrtf(variance[i] / n);
        trace += variance[i];
    }
    for (int i = threadIdx.x; i < n; i += blockDim.x) squares += square[i];
    deviation = block_sum(deviation);
    trace = block_sum(trace);
    squares = block_sum(squares);
    if (threadIdx.x == 0) out[0] = deviation / D, out[1] = squares > 0 ? trace * trace / squares : 0;
}

static inline size_t spread_scratch(int n, int D) { return (size_t)n * D + D + n; }

// out[2] of x[n rows, `stride` apart]: mean over channels of the std over rows, and the participation ratio (sum l)^2 / sum l^2
// of the covariance's eigenvalues, by the n x n products. scratch: spread_scratch() floats.
static inline void feature_spread(float *out, const float *x, size_t stride, int n, int D, float *scratch, cudaStream_t stream) {
    float *centered = scratch, *variance = centered + (size_t)n * D, *square = variance + D;
    if (!n) {
        CUDA_CHECK(cudaMemsetAsync(out, 0, 2 * sizeof(float), stream));
        return;
    }
    spread_center_kernel<<<divide_up(D, 64), 64, 0, stream>>>(centered, variance, x, stride, n, D);
    launched("spread_center_kernel");
    spread_square_kernel<<<n, ROW_WARPS * WARP, 0, stream>>>(square, centered, n, D);
    launched("spread_square_kernel");
    spread_finish_kernel<<<1, 256, 0, stream>>>(out, variance, square, n, D);
    launched("spread_finish_kernel");
}

// ---------------------------------------------------------------------------------------------------------------------
// The head's L2 normalisation (METHOD B), a warp a row

static __global__ void unit_forward_kernel(logitX *unit, float *norm, const float *y, int rows, int b, int ld) {
    int r = blockIdx.x * ROW_WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (r >= rows) return;
    const float *from = y + (size_t)r * b;
    float square = 0;
    for (int i = lane; i < b; i += WARP) square += from[i] * from[i];
    float length = sqrtf(warp_sum(square)), divisor = fmaxf(length, 1e-12f);
    for (int i = lane; i < ld; i += WARP) unit[(size_t)r * ld + i] = from_float<logitX>(i < b ? from[i] / divisor : 0);
    if (lane == 0) norm[r] = length;
}

static __global__ void unit_backward_kernel(floatX *dy, const float *dz, const float *y, const float *norm,
                                            const float *dbottleneck, int crops, int rows, int b, int ld) {
    int r = blockIdx.x * ROW_WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (r >= rows) return;
    const float *from = y + (size_t)r * b, *g = dz + (size_t)r * ld;
    float along = 0, divisor = fmaxf(norm[r], 1e-12f);
    for (int i = lane; i < b; i += WARP) along += from[i] / divisor * g[i];
    along = norm[r] > 1e-12f ? warp_sum(along) : 0;         // a row below the threshold is scaled by a constant
    for (int i = lane; i < b; i += WARP) {
        float d = (g[i] - from[i] / divisor * along) / divisor;
        dy[(size_t)r * b + i] = from_float<floatX>(r < crops ? d + dbottleneck[(size_t)r * b + i] : d);
    }
}

// unit[rows, ld] = y / max(|y|, 1e-12), columns from b on 0; norm[rows] = |y|, of y[rows, b].
static inline void unit_forward(logitX *unit, float *norm, const float *y, int rows, int b, int ld, cudaStream_t stream) {
    if (!rows) return;
    unit_forward_kernel<<<divide_up(rows, ROW_WARPS), ROW_WARPS * WARP, 0, stream>>>(unit, norm, y, rows, b, ld);
    launched("unit_forward_kernel");
}

// dy[rows, b] from dz[rows, ld], the gradient by unit; dbottleneck[crops, b] joins the first rows. The unit vectors are made
// again from y: fp16 ones would leave a part of dz along y.
static inline void unit_backward(floatX *dy, const float *dz, const float *y, const float *norm, const float *dbottleneck,
                                 int crops, int rows, int b, int ld, cudaStream_t stream) {
    if (!rows) return;
    unit_backward_kernel<<<divide_up(rows, ROW_WARPS), ROW_WARPS * WARP, 0, stream>>>(dy, dz, y, norm, dbottleneck, crops,
                                                                                      rows, b, ld);
    launched("unit_backward_kernel");
}

#endif
