/*
Weights: what the matrix products see, their gradients, and the optimiser.

  StepValues            the schedule's values of one step, on the device
  Matrix                a weight matrix and what is folded into it
  Vectors               all other tensors: tokens, positions, biases, norms, LayerScale, prototype scales
  fold_weights          effective matrices from the fp32 masters
  unfold_gradients      gradients of the masters from those of the effective matrices
  gradient_norms        per clip group, and what clipping multiplies by
  update_weights        clip, AdamW, EMA of the teacher, and both effective copies, in one pass over memory

Products see effective weights W' = diag(out) W diag(in), b' = out (b + W shift), in 16 bits: `in` and `shift` are scale and
shift of the norm in front, `out` is LayerScale behind, or g_k / |v_k| of a prototype (METHOD A.2, B). A norm's affine part and
LayerScale so cost nothing per token, and with G and h the gradients of W' and b', those of the masters are sums over weights:

  dW = out (G in + h shift)     db = out h     din_j = sum_i out_i W_ij G_ij     dshift_j = sum_i out_i W_ij h_i
  dout_i = sum_j G_ij W_ij in_j + h_i (b_i + sum_j W_ij shift_j)
  prototypes, u = v / |v|:  dg = u.G     dv = g / |v| (G - u dg)
*/
#ifndef CURIA_CUDA_WEIGHTS_H
#define CURIA_CUDA_WEIGHTS_H

#include "matmul.cuh"

typedef struct {
    double lr, last_layer_lr, weight_decay, momentum, correction1, correction2;     // corrections: 1 - beta^t
    float teacher_temp;
} StepValues;

typedef struct { double lr_factor; int decays, last_layer, group; } Rule;

// Offsets are elements of the arrays that hold the whole tensor table, -1: none. An effective matrix stands in the array of
// effective weights at `effective`, its bias at `effective_bias`.
typedef struct {
    long long weight, bias, in, shift, out;
    int rows, cols, prototypes;             // prototypes: logitX, unit rows scaled by `out`
    long long effective, effective_bias;
    int first_row;                          // rows of the matrices before this one
    Rule rule;
} Matrix;

typedef struct { long long offset, size; Rule rule; } Vectors;

enum { WEIGHT_BLOCK = 128, VECTOR_CHUNK = 4096, NORM_CHUNK = 1 << 16 };

// 16-bit elements in the production build, floats in the checker's: one array holds both types.
typedef logitX Effective;

__device__ static inline int find_matrix(const Matrix *matrices, int count, int row) {
    int low = 0;
    for (int high = count; high - low > 1;) {
        int middle = (low + high) / 2;
        if (matrices[middle].first_row <= row) low = middle;
        else high = middle;
    }
    return low;
}

// Writes row i of an effective matrix and its bias from masters w. Every thread of the block takes part.
__device__ static inline void fold_row(Effective *effective, const float *w, const Matrix &m, int i) {
    const float *row = w + m.weight + (size_t)i * m.cols;
    float scale = m.out < 0 ? 1 : w[m.out + i], dot = 0;
    if (m.prototypes || m.shift >= 0) {
        for (int j = threadIdx.x; j < m.cols; j += blockDim.x) dot += row[j] * (m.prototypes ? row[j] : w[m.shift + j]);
        dot = block_sum(dot);
    }
    if (m.prototypes) scale /= sqrtf(dot);
    for (int j = threadIdx.x; j < m.cols; j += blockDim.x) {
        float value = scale * row[j] * (m.in < 0 ? 1 : w[m.in + j]);
        size_t at = m.effective + (size_t)i * m.cols + j;
        if (m.prototypes) effective[at] = from_float<logitX>(value);
        else ((floatX *)effective)[at] = from_float<floatX>(value);
    }
    if (threadIdx.x == 0 && m.bias >= 0)
        ((floatX *)effective)[m.effective_bias + i] = from_float<floatX>(scale * (w[m.bias + i] + (m.shift < 0 ? 0 : dot)));
}

static __global__ void fold_kernel(Effective *effective, const float *w, const Matrix *matrices, int count) {
    Matrix m = matrices[find_matrix(matrices, count, blockIdx.x)];
    fold_row(effective, w, m, blockIdx.x - m.first_row);
}

// rows: of all matrices together.
static inline void fold_weights(Effective *effective, const float *w, const Matrix *matrices, int count, int rows,
                                cudaStream_t stream) {
    fold_kernel<<<rows, WEIGHT_BLOCK, 0, stream>>>(effective, w, matrices, count);
    launched("fold_kernel");
}

// Rows whose fold has an `out`: LayerScale or prototypes. One block a row; g holds G and h, and takes dW, db, dout.
static __global__ void unfold_rows_kernel(float *g, const float *w, const Matrix *matrices, int count) {
    Matrix m = matrices[find_matrix(matrices, count, blockIdx.x)];
    if (m.out < 0) return;
    int i = blockIdx.x - m.first_row;
    const float *row = w + m.weight + (size_t)i * m.cols;
    float *grad = g + m.weight + (size_t)i * m.cols, along = 0, square = 0, scale = w[m.out + i];
    for (int j = threadIdx.x; j < m.cols; j += blockDim.x) {
        along += row[j] * grad[j];
        square += row[j] * row[j];
    }
    along = block_sum(along);
    if (m.prototypes) {
        square = block_sum(square);
        float inverse = 1 / sqrtf(square);
        for (int j = threadIdx.x; j < m.cols; j += blockDim.x) grad[j] = scale * inverse * (grad[j] - row[j] * along / square);
        if (threadIdx.x == 0) g[m.out + i] = along * inverse;
        return;
    }
    for (int j = threadIdx.x; j < m.cols; j += blockDim.x) grad[j] *= scale;
    if (threadIdx.x == 0) {
        float h = g[m.bias + i];
        g[m.out + i] = along + h * w[m.bias + i];
        g[m.bias + i] = scale * h;
    }
}

// Matrices behind a norm: dW in place, and per chunk of rows the sums over rows for din and dshift.
static __global__ void unfold_columns_kernel(float *part, float *g, const float *w, Matrix m, int chunk) {
    int j = blockIdx.x * blockDim.x + threadIdx.x;
    if (j >= m.cols) return;
    int from = blockIdx.y * chunk, to = min(from + chunk, m.rows);
    float scale = w[m.in + j], shift = w[m.shift + j], din = 0, dshift = 0;
    for (int i = from; i < to; i++) {
        size_t at = (size_t)i * m.cols + j;
        float weight = w[m.weight + at], grad = g[m.weight + at], h = g[m.bias + i];
        din += weight * grad;
        dshift += weight * h;
        g[m.weight + at] = grad * scale + h * shift;
    }
    part[(size_t)blockIdx.y * m.cols + j] = din;
    part[((size_t)gridDim.y + blockIdx.y) * m.cols + j] = dshift;
}

// g: the gradients of the whole table, in place. host: the matrices again, on the host. scratch: 2 COLUMN_CHUNKS floats for each
// column of the widest matrix behind a norm.
static inline void unfold_gradients(float *g, const float *w, const Matrix *matrices, const Matrix *host, int count, int rows,
                                    float *scratch, cudaStream_t stream) {
    for (int i = 0; i < count; i++) {
        Matrix m = host[i];
        if (m.in < 0) continue;
        int chunk = divide_up(m.rows, COLUMN_CHUNKS), chunks = divide_up(m.rows, chunk), grid = divide_up(m.cols, WEIGHT_BLOCK);
        unfold_columns_kernel<<<dim3(grid, chunks), WEIGHT_BLOCK, 0, stream>>>(scratch, g, w, m, chunk);
        launched("unfold_columns_kernel");
        for (int k = 0; k < 2; k++) {
            column_sums_kernel<<<grid, WEIGHT_BLOCK, 0, stream>>>(g + (k ? m.shift : m.in), scratch + (size_t)k * chunks * m.cols,
                                                                  (const float *)NULL, chunks, m.cols, chunks);
            launched("column_sums_kernel");
        }
    }
    unfold_rows_kernel<<<rows, WEIGHT_BLOCK, 0, stream>>>(g, w, matrices, count);
    launched("unfold_rows_kernel");
}

// One block a chunk of one group: part[chunk] = sum of squares.
static __global__ void square_sums_kernel(double *part, const float *g, size_t size) {
    size_t from = (size_t)blockIdx.x * NORM_CHUNK, to = from + NORM_CHUNK < size ? from + NORM_CHUNK : size;
    float sum = 0;
    for (size_t i = from + threadIdx.x; i < to; i += blockDim.x) sum += g[i] * g[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) part[blockIdx.x] = sum;
}

static __global__ void clip_kernel(float *norm, float *clip, const double *part, int chunks, double most) {
    double sum = 0;
    for (int i = 0; i < chunks; i++) sum += part[i];
    double n = sqrt(sum);
    *norm = (float)n;
    *clip = (float)(most > 0 ? fmin(1.0, most / (n + 1e-6)) : 1);
}

// norm[group] and clip[group] of g[group_start[group] .. group_start[group + 1]); most: optim.clip. part: one double for each
// NORM_CHUNK elements, and one more a group.
static inline void gradient_norms(float *norm, float *clip, const float *g, const size_t *group_start, int groups, double most,
                                  double *part, cudaStream_t stream) {
    for (int i = 0; i < groups; i++) {
        size_t size = group_start[i + 1] - group_start[i];
        int chunks = divide_up(size, NORM_CHUNK);
        if (chunks) {
            square_sums_kernel<<<chunks, 256, 0, stream>>>(part, g + group_start[i], size);
            launched("square_sums_kernel");
        }
        clip_kernel<<<1, 1, 0, stream>>>(norm + i, clip + i, part, chunks, most);
        launched("clip_kernel");
    }
}

typedef struct { float *student, *teacher, *exp_avg, *exp_avg_sq; const float *grad, *clip; float beta1, beta2, eps; } Optimiser;
typedef struct { float clip, keep, rate, root, momentum; } UpdateScale;

__device__ static inline UpdateScale update_scale(const Optimiser &o, const StepValues *s, const Rule &rule) {
    double lr = (rule.last_layer ? s->last_layer_lr : s->lr) * rule.lr_factor;
    return {o.clip[rule.group], (float)(1 - lr * (rule.decays ? s->weight_decay : 0)), (float)(lr / s->correction1),
            (float)(1 / sqrt(s->correction2)), (float)s->momentum};
}

// One parameter by AdamW, and the teacher's (METHOD F).
__device__ static inline void update_one(const Optimiser &o, const UpdateScale &u, size_t i) {
    float g = o.grad[i] * u.clip, m = o.beta1 * o.exp_avg[i] + (1 - o.beta1) * g;
    float v = o.beta2 * o.exp_avg_sq[i] + (1 - o.beta2) * g * g;
    float w = o.student[i] * u.keep - u.rate * m / (sqrtf(v) * u.root + o.eps);
    o.exp_avg[i] = m;
    o.exp_avg_sq[i] = v;
    o.student[i] = w;
    o.teacher[i] = u.momentum * o.teacher[i] + (1 - u.momentum) * w;
}

static __global__ void update_vectors_kernel(Optimiser o, const StepValues *s, const Vectors *vectors) {
    Vectors v = vectors[blockIdx.y];
    long long from = (long long)blockIdx.x * VECTOR_CHUNK, to = from + VECTOR_CHUNK < v.size ? from + VECTOR_CHUNK : v.size;
    if (from >= to) return;
    UpdateScale u = update_scale(o, s, v.rule);
    for (long long i = from + threadIdx.x; i < to; i += blockDim.x) update_one(o, u, v.offset + i);
}

// A row of a matrix, and its effective row of student and teacher: what is folded in is a vector, already updated.
static __global__ void update_matrices_kernel(Optimiser o, const StepValues *s, Effective *student, Effective *teacher,
                                              const Matrix *matrices,
                                       int count) {
    Matrix m = matrices[find_matrix(matrices, count, blockIdx.x)];
    int i = blockIdx.x - m.first_row;
    UpdateScale u = update_scale(o, s, m.rule);
    for (int j = threadIdx.x; j < m.cols; j += blockDim.x) update_one(o, u, m.weight + (size_t)i * m.cols + j);
    fold_row(student, o.student, m, i);
    fold_row(teacher, o.teacher, m, i);
}

// most: elements of the longest of the vectors.
static inline void update_weights(Optimiser o, const StepValues *s, Effective *student, Effective *teacher,
                                  const Matrix *matrices,
                                  int count, int rows, const Vectors *vectors, int vector_count, long long most,
                                  cudaStream_t stream) {
    update_vectors_kernel<<<dim3(divide_up(most, VECTOR_CHUNK), vector_count), 256, 0, stream>>>(o, s, vectors);
    launched("update_vectors_kernel");
    update_matrices_kernel<<<rows, WEIGHT_BLOCK, 0, stream>>>(o, s, student, teacher, matrices, count);
    launched("update_matrices_kernel");
}

#endif
