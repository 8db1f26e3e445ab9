/*
The residual stream and its norms, and the activations of the feed-forward.

  Rows                      which packed token rows a branch works on (drop path, last block)
  residual_norm_forward     x += alpha f of one branch, and the normalised rows of the next
  residual_norm_backward    the transpose of both
  final_norm_forward, final_norm_backward      the last norm with its scale and shift, of the rows that a loss sees
  activation_forward, activation_backward      GELU or SwiGLU

x and dx are fp32: at LayerScale 1e-5 a bf16 stream would swallow what a block adds (METHOD F). The norms of the blocks only
normalise: their scale and shift, and LayerScale, are folded into the weights around them (weights.cuh). So no kernel here sums
over tokens, and a branch's own output need not be kept for the backward. One warp a row; D is a multiple of 64.
*/
#ifndef CURIA_CUDA_NORM_H
#define CURIA_CUDA_NORM_H

#include "common.cuh"

// Row r of the packed tokens is row map[r] of the branch, -1: not in it; map NULL: row r. What the branch adds to rows before
// `split` is scaled by alpha[0], after that by alpha[1] (METHOD A.3).
typedef struct { const int *map; float alpha[2]; int split; } Rows;

__device__ static inline int branch_row(const Rows &rows, int r) { return rows.map ? rows.map[r] : r; }
__device__ static inline float branch_alpha(const Rows &rows, int r) { return r < rows.split ? rows.alpha[0] : rows.alpha[1]; }

enum { NORM_WARPS = 4 };

// x[r] += alpha f[from(r)]; hat[to(r)] = (x[r] - mean) rstd. f or hat may be NULL.
static __global__ void residual_norm_kernel(float *x, const floatX *f, Rows from, floatX *hat, float *rstd, Rows to, int rows,
                                            int D) {
    extern __shared__ char shared[];
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, r = blockIdx.x * NORM_WARPS + warp;
    if (r >= rows) return;
    int source = f ? branch_row(from, r) : -1, target = hat ? branch_row(to, r) : -1;
    if (source < 0 && target < 0) return;
    float *row = (float *)shared + warp * D, *stream = x + (size_t)r * D, sum = 0, square = 0;     // a lane reads what it wrote
    float alpha = branch_alpha(from, r);
    for (int i = 4 * lane; i < D; i += 4 * WARP) {
        float4 v = load4(stream + i);
        if (source >= 0) {
            float4 add = load4(f + (size_t)source * D + i);
            v = make_float4(v.x + alpha * add.x, v.y + alpha * add.y, v.z + alpha * add.z, v.w + alpha * add.w);
            store4(stream + i, v);
        }
        store4(row + i, v);
        sum += v.x + v.y + v.z + v.w;
    }
    if (target < 0) return;
    float mean = warp_sum(sum) / D;
    for (int i = 4 * lane; i < D; i += 4 * WARP) {
        float4 v = load4(row + i);
        v = make_float4(v.x - mean, v.y - mean, v.z - mean, v.w - mean);
        store4(row + i, v);
        square += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    }
    float inverse = 1 / sqrtf(warp_sum(square) / D + 1e-6f);
    for (int i = 4 * lane; i < D; i += 4 * WARP) {
        float4 v = load4(row + i);
        store4(hat + (size_t)target * D + i, make_float4(v.x * inverse, v.y * inverse, v.z * inverse, v.w * inverse));
    }
    if (lane == 0) rstd[target] = inverse;
}

static inline void residual_norm_forward(float *x, const floatX *f, Rows from, floatX *hat, float *rstd, Rows to, int rows, int D,
                                         cudaStream_t stream) {
    size_t shared = NORM_WARPS * D * sizeof(float);
    residual_norm_kernel<<<divide_up(rows, NORM_WARPS), NORM_WARPS * WARP, shared, stream>>>(x, f, from, hat, rstd, to, rows, D);
    launched("residual_norm_kernel");
}

// dx[r] += the norm's adjoint of dhat[to(r)] (+ dhat_more[more(r)]); df[from(r)] = alpha dx[r]. METHOD A.6 without scale.
static __global__ void residual_norm_backward_kernel(float *dx, const floatX *dhat, const floatX *hat, const float *rstd, Rows to,
                                              const floatX *dhat_more, Rows more, floatX *df, Rows from, int rows, int D) {
    int lane = threadIdx.x % WARP, r = blockIdx.x * NORM_WARPS + threadIdx.x / WARP;
    if (r >= rows) return;
    int target = branch_row(to, r), source = df ? branch_row(from, r) : -1, extra = dhat_more ? branch_row(more, r) : -1;
    if (source < 0 && target < 0) return;
    float *stream = dx + (size_t)r * D, alpha = branch_alpha(from, r), mean = 0, along = 0, scale = 0;
    size_t row = (size_t)(target < 0 ? 0 : target) * D;
    const floatX *g = dhat + row, *g_more = extra < 0 ? g : dhat_more + (size_t)extra * D, *h = hat + row;
    if (target >= 0) {
        for (int i = 4 * lane; i < D; i += 4 * WARP) {
            float4 a = load4(g + i), b = load4(h + i);
            if (extra >= 0) {
                float4 c = load4(g_more + i);
                a = make_float4(a.x + c.x, a.y + c.y, a.z + c.z, a.w + c.w);
            }
            mean += a.x + a.y + a.z + a.w;
            along += a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
        }
        mean = warp_sum(mean) / D;
        along = warp_sum(along) / D;
        scale = rstd[target];
    }
    for (int i = 4 * lane; i < D; i += 4 * WARP) {
        float4 v = load4(stream + i);
        if (target >= 0) {
            float4 a = load4(g + i), b = load4(h + i);
            if (extra >= 0) {
                float4 c = load4(g_more + i);
                a = make_float4(a.x + c.x, a.y + c.y, a.z + c.z, a.w + c.w);
            }
            v.x += scale * (a.x - mean - b.x * along);
            v.y += scale * (a.y - mean - b.y * along);
            v.z += scale * (a.z - mean - b.z * along);
            v.w += scale * (a.w - mean - b.w * along);
            store4(stream + i, v);
        }
        if (source >= 0)
            store4(df + (size_t)source * D + i, make_float4(alpha * v.x, alpha * v.y, alpha * v.z, alpha * v.w));
    }
}

static inline void residual_norm_backward(float *dx, const floatX *dhat, const floatX *hat, const float *rstd, Rows to,
                                          const floatX *dhat_more, Rows more, floatX *df, Rows from, int rows, int D,
                                          cudaStream_t stream) {
    residual_norm_backward_kernel<<<divide_up(rows, NORM_WARPS), NORM_WARPS * WARP, 0, stream>>>(dx, dhat, hat, rstd, to,
                                                                                                 dhat_more,
                                                                                                more, df, from, rows, D);
    launched("residual_norm_backward_kernel");
}

// For row row[i] of x: hat, rstd, y = hat gamma + beta, all fp32 as the losses are, and y again as floatX for the heads.
static __global__ void final_norm_kernel(float *y, floatX *y_head, float *hat, float *rstd, const float *x, const int *row,
                                  const float *gamma, const float *beta, int count, int heads, int D) {
    int lane = threadIdx.x % WARP, i = blockIdx.x * NORM_WARPS + threadIdx.x / WARP;
    if (i >= count) return;
    const float *from = x + (size_t)row[i] * D;
    float mean = 0, square = 0;
    for (int d = lane; d < D; d += WARP) mean += from[d];
    mean = warp_sum(mean) / D;
    for (int d = lane; d < D; d += WARP) square += (from[d] - mean) * (from[d] - mean);
    float inverse = 1 / sqrtf(warp_sum(square) / D + 1e-6f);
    for (int d = lane; d < D; d += WARP) {
        float h = (from[d] - mean) * inverse, out = h * gamma[d] + beta[d];
        hat[(size_t)i * D + d] = h;
        y[(size_t)i * D + d] = out;
        if (i < heads) y_head[(size_t)i * D + d] = from_float<floatX>(out);
    }
    if (lane == 0) rstd[i] = inverse;
}

static inline void final_norm_forward(float *y, floatX *y_head, float *hat, float *rstd, const float *x, const int *row,
                                      const float *gamma, const float *beta, int count, int heads, int D, cudaStream_t stream) {
    if (!count) return;
    final_norm_kernel<<<divide_up(count, NORM_WARPS), NORM_WARPS * WARP, 0, stream>>>(y, y_head, hat, rstd, x, row, gamma, beta,
                                                                                     count, heads, D);
    launched("final_norm_kernel");
}

// dx[r], written for every packed row: the adjoint of the one or two rows of dy that it gave, index[0][r] and index[1][r]
// (-1: none), else 0. df[from(r)] = alpha dx[r].
static __global__ void final_norm_backward_kernel(float *dx, const float *dy, const float *hat, const float *rstd,
                                                  const int *index,
                                           const float *gamma, floatX *df, Rows from, int rows, int D) {
    int lane = threadIdx.x % WARP, r = blockIdx.x * NORM_WARPS + threadIdx.x / WARP;
    if (r >= rows) return;
    int first = index[r], second = index[rows + r], source = branch_row(from, r);
    int either = first < 0 ? second : first;
    const float *h = hat + (size_t)(either < 0 ? 0 : either) * D;
    float mean = 0, along = 0, scale = 0, alpha = branch_alpha(from, r);
    if (first >= 0 || second >= 0) {
        for (int d = lane; d < D; d += WARP) {
            float g = ((first < 0 ? 0 : dy[(size_t)first * D + d]) + (second < 0 ? 0 : dy[(size_t)second * D + d])) * gamma[d];
            mean += g;
            along += g * h[d];
        }
        mean = warp_sum(mean) / D;
        along = warp_sum(along) / D;
        scale = rstd[either];
    }
    for (int d = lane; d < D; d += WARP) {
        float out = 0;
        if (first >= 0 || second >= 0) {
            float g = ((first < 0 ? 0 : dy[(size_t)first * D + d]) + (second < 0 ? 0 : dy[(size_t)second * D + d])) * gamma[d];
            out = scale * (g - mean - h[d] * along);
        }
        dx[(size_t)r * D + d] = out;
        if (source >= 0) df[(size_t)source * D + d] = from_float<floatX>(alpha * out);
    }
}

static inline void final_norm_backward(float *dx, const float *dy, const float *hat, const float *rstd, const int *index,
                                       const float *gamma, floatX *df, Rows from, int rows, int D, cudaStream_t stream) {
    final_norm_backward_kernel<<<divide_up(rows, NORM_WARPS), NORM_WARPS * WARP, 0, stream>>>(dx, dy, hat, rstd, index, gamma, df,
                                                                                             from, rows, D);
    launched("final_norm_backward_kernel");
}

__device__ static inline float gelu(float x) { return 0.5f * x * (1 + erff(x * 0.70710678f)); }
__device__ static inline float gelu_slope(float x) {
    return 0.5f * (1 + erff(x * 0.70710678f)) + x * 0.39894228f * expf(-0.5f * x * x);
}
__device__ static inline float sigmoid(float x) { return 1 / (1 + expf(-x)); }

// act[rows,F] of pre[rows,F], or of pre[rows,2F] = [gate | up] with swiglu. `width` elements a thread: a Pack, or one where F
// is no multiple of it.
static __global__ void activation_kernel(floatX *act, const floatX *pre, size_t threads, int F, int swiglu, int width) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= threads) return;
    size_t at = i * width, row = at / F, from = swiglu ? row * 2 * F + at % F : at;
    Pack<floatX> a, b, out;
    if (width > 1) {
        a = load_pack(pre + from);
        if (swiglu) b = load_pack(pre + from + F);
    } else {
        a.v[0] = pre[from];
        if (swiglu) b.v[0] = pre[from + F];
    }
    #pragma unroll
    for (int j = 0; j < Pack<floatX>::N; j++) {
        if (j == width) break;
        float x = to_float(a.v[j]);
        out.v[j] = from_float<floatX>(swiglu ? x * sigmoid(x) * to_float(b.v[j]) : gelu(x));
    }
    if (width > 1) store_pack(act + at, out);
    else act[at] = out.v[0];
}

// pre becomes its gradient.
static __global__ void activation_backward_kernel(floatX *pre, const floatX *dact, size_t threads, int F, int swiglu, int width) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= threads) return;
    size_t at = i * width, row = at / F, from = swiglu ? row * 2 * F + at % F : at;
    Pack<floatX> a, b, g;
    if (width > 1) {
        a = load_pack(pre + from);
        g = load_pack(dact + at);
        if (swiglu) b = load_pack(pre + from + F);
    } else {
        a.v[0] = pre[from];
        g.v[0] = dact[at];
        if (swiglu) b.v[0] = pre[from + F];
    }
    #pragma unroll
    for (int j = 0; j < Pack<floatX>::N; j++) {
        if (j == width) break;
        float x = to_float(a.v[j]), d = to_float(g.v[j]);
        if (swiglu) {
            float s = sigmoid(x), up = to_float(b.v[j]);
            a.v[j] = from_float<floatX>(d * up * s * (1 + x * (1 - s)));
            b.v[j] = from_float<floatX>(d * x * s);
        } else {
            a.v[j] = from_float<floatX>(d * gelu_slope(x));
        }
    }
    if (width > 1) {
        store_pack(pre + from, a);
        if (swiglu) store_pack(pre + from + F, b);
    } else {
        pre[from] = a.v[0];
        if (swiglu) pre[from + F] = b.v[0];
    }
}

static inline void activation_forward(floatX *act, const floatX *pre, int rows, int F, int swiglu, cudaStream_t stream) {
    int width = F % Pack<floatX>::N ? 1 : Pack<floatX>::N;
    size_t threads = (size_t)rows * F / width;
    if (!threads) return;
    activation_kernel<<<divide_up(threads, 256), 256, 0, stream>>>(act, pre, threads, F, swiglu, width);
    launched("activation_kernel");
}

static inline void activation_backward(floatX *pre, const floatX *dact, int rows, int F, int swiglu, cudaStream_t stream) {
    int width = F % Pack<floatX>::N ? 1 : Pack<floatX>::N;
    size_t threads = (size_t)rows * F / width;
    if (!threads) return;
    activation_backward_kernel<<<divide_up(threads, 256), 256, 0, stream>>>(pre, dact, threads, F, swiglu, width);
    launched("activation_backward_kernel");
}

#endif
