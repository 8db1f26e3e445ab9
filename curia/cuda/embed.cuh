/*
From patches to tokens and back (METHOD A.2, A.4).

  Tokens                the sequences of one crop size within the packed rows
  Taps                  a resize plan (curia/resize.h) on the device
  position_forward, position_backward      the position embedding at a group's grid, and the transpose
  embed_forward         packed rows from embedded patches: mask token, positions, class token, registers
  embed_backward        gradients of all of these from dx
*/
#ifndef CURIA_CUDA_EMBED_H
#define CURIA_CUDA_EMBED_H

#include "matmul.cuh"

// `count` sequences of `tokens` = 1 + R + `patches` rows, from packed row `row`; their patches begin at row `patch_row` of the
// matrix of all patches.
typedef struct { int count, size, grid, patches, tokens, row, patch_row; } Tokens;

// in x in to out x out; first[out], weight[out, taps]; in 0: the grids are the same.
typedef struct { int in, out, taps; const int *first; const float *weight; } Taps;

// out[1 + out^2, D] of table[1 + in^2, D].
static __global__ void position_kernel(float *out, const float *table, Taps t, int D) {
    int d = blockIdx.x * blockDim.x + threadIdx.x, cell = blockIdx.y;
    if (d >= D) return;
    float sum = 0;
    if (cell == 0 || !t.in) {
        sum = table[(size_t)cell * D + d];
    } else {
        int y = (cell - 1) / t.out, x = (cell - 1) % t.out;
        for (int i = 0; i < t.taps; i++) {
            float along = 0;
            for (int j = 0; j < t.taps; j++)
                along += t.weight[x * t.taps + j] * table[(size_t)(1 + (t.first[y] + i) * t.in + t.first[x] + j) * D + d];
            sum += t.weight[y * t.taps + i] * along;
        }
    }
    out[(size_t)cell * D + d] = sum;
}

static inline void position_forward(float *out, const float *table, Taps t, int patches, int D, cudaStream_t stream) {
    position_kernel<<<dim3(divide_up(D, 128), 1 + patches), 128, 0, stream>>>(out, table, t, D);
    launched("position_kernel");
}

// dtable[1 + in^2, D] (+)= the transpose of dout[1 + out^2, D].
static __global__ void position_backward_kernel(float *dtable, const float *dout, Taps t, int D, int add) {
    int d = blockIdx.x * blockDim.x + threadIdx.x, cell = blockIdx.y;
    if (d >= D) return;
    float sum = 0;
    if (cell == 0 || !t.in) {
        sum = dout[(size_t)cell * D + d];
    } else {
        int y = (cell - 1) / t.in, x = (cell - 1) % t.in;
        for (int i = 0; i < t.out; i++) {
            if (y < t.first[i] || y >= t.first[i] + t.taps) continue;
            float along = 0;
            for (int j = 0; j < t.out; j++)
                if (x >= t.first[j] && x < t.first[j] + t.taps)
                    along += t.weight[j * t.taps + x - t.first[j]] * dout[(size_t)(1 + i * t.out + j) * D + d];
            sum += t.weight[i * t.taps + y - t.first[i]] * along;
        }
    }
    float *to = dtable + (size_t)cell * D + d;
    *to = sum + (add ? *to : 0);
}

static inline void position_backward(float *dtable, const float *dout, Taps t, int table_patches, int D, int add,
                                     cudaStream_t stream) {
    position_backward_kernel<<<dim3(divide_up(D, 128), 1 + table_patches), 128, 0, stream>>>(dtable, dout, t, D, add);
    launched("position_backward_kernel");
}

// One block a packed row. e[patches of all groups, D] holds W patch + bias; position [1+N,D]; mask [count,N] or NULL.
static __global__ void embed_kernel(float *x, const floatX *e, const float *position, const float *cls, const float *mask_token,
                             const float *registers, const uint8_t *mask, Tokens g, int R, int D) {
    int n = blockIdx.x / g.tokens, t = blockIdx.x % g.tokens, patch = t - 1 - R;
    float *to = x + (size_t)(g.row + blockIdx.x) * D;
    const floatX *embedded = e + (size_t)(g.patch_row + n * g.patches + (patch < 0 ? 0 : patch)) * D;
    int masked = patch >= 0 && mask && mask[(size_t)n * g.patches + patch];
    for (int d = threadIdx.x; d < D; d += blockDim.x) {
        if (t == 0) to[d] = cls[d] + position[d];
        else if (patch < 0) to[d] = registers[(size_t)(t - 1) * D + d];
        else to[d] = (masked ? mask_token[d] : to_float(embedded[d])) + position[(size_t)(1 + patch) * D + d];
    }
}

static inline void embed_forward(float *x, const floatX *e, const float *position, const float *cls, const float *mask_token,
                                 const float *registers, const uint8_t *mask, Tokens g, int R, int D, cudaStream_t stream) {
    if (!g.count) return;
    embed_kernel<<<g.count * g.tokens, 128, 0, stream>>>(x, e, position, cls, mask_token, registers, mask, g, R, D);
    launched("embed_kernel");
}

// One thread a column of one token place, over all sequences. dtoken[tokens, D] (+)= sums of dx for class token and registers,
// dposition[1+N,D] = sums for class token and patches, dmask[N,D] = sums over masked patches; de = dx, 0 where masked.
static __global__ void embed_backward_kernel(float *dtoken, float *dposition, float *dmask, floatX *de, const float *dx,
                                             const uint8_t *mask,
                                      Tokens g, int R, int D, int add) {
    int d = blockIdx.x * blockDim.x + threadIdx.x, t = blockIdx.y, patch = t - 1 - R;
    if (d >= D) return;
    float all = 0, hidden = 0;
    for (int n = 0; n < g.count; n++) {
        float v = dx[(size_t)(g.row + n * g.tokens + t) * D + d];
        all += v;
        if (patch < 0) continue;
        int masked = mask && mask[(size_t)n * g.patches + patch];
        if (masked) hidden += v;
        de[(size_t)(g.patch_row + n * g.patches + patch) * D + d] = from_float<floatX>(masked ? 0 : v);
    }
    if (patch < 0) dtoken[(size_t)t * D + d] = all + (add ? dtoken[(size_t)t * D + d] : 0);
    if (t == 0) dposition[d] = all;
    if (patch < 0) return;
    dposition[(size_t)(1 + patch) * D + d] = all;
    if (mask) dmask[(size_t)patch * D + d] = hidden;
}

// dtoken: [1+R, D], class token first. dmask may be NULL where mask is.
static inline void embed_backward(float *dtoken, float *dposition, float *dmask, floatX *de, const float *dx, const uint8_t *mask,
                                  Tokens g, int R, int D, int add, cudaStream_t stream) {
    embed_backward_kernel<<<dim3(divide_up(D, 128), g.tokens), 128, 0, stream>>>(dtoken, dposition, dmask, de, dx, mask, g, R,
                                                                                 D, add);
    launched("embed_backward_kernel");
}

#endif
