/*
curia.c: self-distillation (DINOv2 with SIGReg) of vision transformers on CT and MR slices, in plain C.

This file is the whole training system on the CPU, and the specification that the CUDA backend is compared with. Read it
from top to bottom:

  1. layers          linear, layer norm, attention, feed-forward: forward and backward
  2. the model       parameters, activations (one arena), forward and backward of the backbone
  3. heads           MLP, weight-normed prototypes
  4. losses          Sinkhorn or softmax centering, DINO, iBOT, KoLeo, SIGReg, Gram
  5. pixels          from raw int16 slices to normalised views
  6. the step        all of the above in execution order; clipping, AdamW, EMA teacher
  7. the backend     the functions of curia/backend.h
  8. main            the loop: draw a batch, step, log, checkpoint

Letters: B slices, V local crops each, C channels, G pixels, p patch, N patches, T = 1+R+N tokens, D width, H heads,
F hidden, K prototypes, b bottleneck, M directions. A `d` in front of a name is the gradient of the loss with respect to it.
METHOD is the method sheet that the sections follow: arXiv 2304.07193 (DINOv2), 2511.08544 (LeJEPA), 2604.01987 (Curia-2).

  gcc -O3 -march=native -fopenmp train_curia.c -o train_curia -lm -lpthread      (or: make)
*/
#include "curia/backend.h"
#include "curia/gemm.h"
#include "curia/resize.h"
#include "curia/vecmath.h"

// ---------------------------------------------------------------------------------------------------------------------
// 1. Layers. Outputs first, inputs next, sizes last. `rows` runs over packed tokens of all crops.

// y[rows,out] = x[rows,in] w[out,in]^T + bias[out]
static void linear_forward(real *y, const real *x, const real *w, const real *bias, int rows, int in, int out) {
    gemm(rows, out, in, x, in, 1, w, 1, in, y, out, 0);
    #pragma omp parallel for
    for (int r = 0; r < rows; r++) for (int i = 0; i < out; i++) y[(size_t)r * out + i] += bias[i];
}

// dbias[cols] += column sums of dy[rows,cols]. A column belongs to one thread, so the order of its sum is fixed.
static void column_sums(real *dbias, const real *dy, int rows, int cols) {
    #pragma omp parallel for
    for (int block = 0; block < (cols + 63) / 64; block++) {
        int from = block * 64, n = min_int(cols - from, 64);
        real sum[64] = {0};
        for (int r = 0; r < rows; r++) for (int i = 0; i < n; i++) sum[i] += dy[(size_t)r * cols + from + i];
        for (int i = 0; i < n; i++) dbias[from + i] += sum[i];
    }
}

// dx[rows,in] = dy w; dw[out,in] += dy^T x; dbias[out] += column sums of dy. dx NULL: not wanted; dx may be x.
static void linear_backward(real *dx, real *dw, real *dbias, const real *dy, const real *x, const real *w, int rows, int in, int out) {
    gemm(out, in, rows, dy, 1, out, x, in, 1, dw, in, 1);
    column_sums(dbias, dy, rows, out);
    if (dx) gemm(rows, in, out, dy, out, 1, w, in, 1, dx, in, 0);
}

// y = xhat gamma + beta, xhat = (x - mean) rstd over D, of rows map[0..rows) of x (map NULL: all). Keeps xhat[rows,D] and rstd[rows].
static void layernorm_forward(real *y, real *xhat, real *rstd, const real *x, const int *map, const real *gamma, const real *beta,
                              int rows, int D) {
    #pragma omp parallel for
    for (int r = 0; r < rows; r++) {
        const real *from = x + (size_t)(map ? map[r] : r) * D;
        real *hat = xhat + (size_t)r * D, *to = y + (size_t)r * D, mean = 0, variance = 0;
        SIMD_SUM(mean) for (int i = 0; i < D; i++) mean += from[i];
        mean /= D;
        SIMD_SUM(variance) for (int i = 0; i < D; i++) variance += (from[i] - mean) * (from[i] - mean);
        rstd[r] = 1 / (real)sqrt(variance / D + (real)1e-6);
        for (int i = 0; i < D; i++) {
            hat[i] = (from[i] - mean) * rstd[r];
            to[i] = hat[i] * gamma[i] + beta[i];
        }
    }
}

// y = xhat gamma + beta again: cheaper to make twice than to keep.
static void layernorm_output(real *y, const real *xhat, const real *gamma, const real *beta, int rows, int D) {
    #pragma omp parallel for
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < D; i++) y[(size_t)r * D + i] = xhat[(size_t)r * D + i] * gamma[i] + beta[i];
}

// Adds the gradient to rows map[r] of dx; dgamma, dbeta += over rows. METHOD A.6.
static void layernorm_backward(real *dx, real *dgamma, real *dbeta, const real *dy, const real *xhat, const real *rstd, const int *map,
                               const real *gamma, int rows, int D) {
    #pragma omp parallel for
    for (int r = 0; r < rows; r++) {
        const real *g = dy + (size_t)r * D, *hat = xhat + (size_t)r * D;
        real *to = dx + (size_t)(map ? map[r] : r) * D, mean = 0, along = 0;
        SIMD_SUM(mean) for (int i = 0; i < D; i++) mean += g[i] * gamma[i];
        SIMD_SUM(along) for (int i = 0; i < D; i++) along += g[i] * gamma[i] * hat[i];
        mean /= D;
        along /= D;
        for (int i = 0; i < D; i++) to[i] += rstd[r] * (g[i] * gamma[i] - mean - hat[i] * along);
    }
    column_sums(dbeta, dy, rows, D);
    #pragma omp parallel for
    for (int block = 0; block < (D + 63) / 64; block++) {
        int from = block * 64, n = min_int(D - from, 64);
        real sum[64] = {0};
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < n; i++) sum[i] += dy[(size_t)r * D + from + i] * xhat[(size_t)r * D + from + i];
        for (int i = 0; i < n; i++) dgamma[from + i] += sum[i];
    }
}

// The kept sequences of one branch of one block, packed: `kept[g]` sequences of `tokens[g]` rows for the global (0) and
// local (1) group. Without drop path all are kept. METHOD A.3.
typedef struct {
    int rows, sequences;
    int kept[2], tokens[2];
    real alpha[2];          // sequences / kept: what survives is scaled up by
    int *map;               // [rows] packed token rows; NULL: all rows in order
} Branch;

static int branch_sequence(const Branch *s, int sequence, int *tokens) {
    int first = sequence < s->kept[0];
    *tokens = s->tokens[!first];
    return first ? sequence * s->tokens[0] : s->kept[0] * s->tokens[0] + (sequence - s->kept[0]) * s->tokens[1];
}

// x[map[r]] += alpha gamma y[r]
static void residual_forward(real *x, const real *y, const real *gamma, const Branch *s, int D) {
    #pragma omp parallel for
    for (int r = 0; r < s->rows; r++) {
        real alpha = s->alpha[r >= s->kept[0] * s->tokens[0]], *to = x + (size_t)(s->map ? s->map[r] : r) * D;
        for (int i = 0; i < D; i++) to[i] += alpha * gamma[i] * y[(size_t)r * D + i];
    }
}

// dy[r] = alpha gamma dx[map[r]]; dgamma += sum over rows of alpha dx[map[r]] y[r]
static void residual_backward(real *dy, real *dgamma, const real *dx, const real *y, const real *gamma, const Branch *s, int D) {
    int global_rows = s->kept[0] * s->tokens[0];
    #pragma omp parallel for
    for (int block = 0; block < (D + 63) / 64; block++) {
        int from = block * 64, n = min_int(D - from, 64);
        real sum[64] = {0};
        for (int r = 0; r < s->rows; r++) {
            real alpha = s->alpha[r >= global_rows];
            const real *g = dx + (size_t)(s->map ? s->map[r] : r) * D + from, *out = y + (size_t)r * D + from;
            real *to = dy + (size_t)r * D + from;
            for (int i = 0; i < n; i++) {
                sum[i] += alpha * g[i] * out[i];
                to[i] = alpha * gamma[from + i] * g[i];
            }
        }
        for (int i = 0; i < n; i++) dgamma[from + i] += sum[i];
    }
}

// out[rows,D] from qkv[rows,3D], each sequence and head on its own; keeps the log of the softmax denominators, lse[rows,H].
// scratch: T^2 per thread, `stride` apart.
static void attention_forward(real *out, real *lse, const real *qkv, const Branch *s, real *scratch, size_t stride, int D, int H) {
    int d = D / H;
    const real scale = 1 / (real)sqrt((real)d);
    #pragma omp parallel for schedule(dynamic)
    for (int job = 0; job < s->sequences * H; job++) {
        int T, row = branch_sequence(s, job / H, &T), h = job % H;
        const real *q = qkv + (size_t)row * 3 * D + h * d, *k = q + D, *v = k + D;
        real *p = scratch + omp_get_thread_num() * stride;
        gemm_serial(T, T, d, q, 3 * D, 1, k, 1, 3 * D, p, T, 0);
        for (int i = 0; i < T; i++) {
            real *score = p + (size_t)i * T, most = score[0], sum = 0;
            SIMD_MAX(most) for (int j = 0; j < T; j++) most = score[j] > most ? score[j] : most;
            SIMD_SUM(sum) for (int j = 0; j < T; j++) {
                score[j] = real_exp((score[j] - most) * scale);
                sum += score[j];
            }
            lse[(size_t)(row + i) * H + h] = most * scale + (real)log(sum);
            real inverse = 1 / sum;
            for (int j = 0; j < T; j++) score[j] *= inverse;
        }
        gemm_serial(T, d, T, p, T, 1, v, 3 * D, 1, out + (size_t)row * D + h * d, D, 0);
    }
}

// dqkv[rows,3D] from dout[rows,D]; the probabilities are made again from lse. scratch: 2 T^2 per thread. METHOD A.6.
static void attention_backward(real *dqkv, const real *dout, const real *out, const real *lse, const real *qkv, const Branch *s,
                               real *scratch, size_t stride, int D, int H) {
    int d = D / H;
    const real scale = 1 / (real)sqrt((real)d);
    #pragma omp parallel for schedule(dynamic)
    for (int job = 0; job < s->sequences * H; job++) {
        int T, row = branch_sequence(s, job / H, &T), h = job % H;
        const real *q = qkv + (size_t)row * 3 * D + h * d, *k = q + D, *v = k + D;
        const real *o = out + (size_t)row * D + h * d, *g = dout + (size_t)row * D + h * d;
        real *dq = dqkv + (size_t)row * 3 * D + h * d, *dk = dq + D, *dv = dk + D;
        real *p = scratch + omp_get_thread_num() * stride, *ds = p + (size_t)T * T;
        gemm_serial(T, T, d, q, 3 * D, 1, k, 1, 3 * D, p, T, 0);
        gemm_serial(T, T, d, g, D, 1, v, 1, 3 * D, ds, T, 0);
        for (int i = 0; i < T; i++) {
            real delta = 0, log_sum = lse[(size_t)(row + i) * H + h];
            SIMD_SUM(delta) for (int c = 0; c < d; c++) delta += g[(size_t)i * D + c] * o[(size_t)i * D + c];
            for (int j = 0; j < T; j++) {
                real *probability = p + (size_t)i * T + j;
                *probability = real_exp(*probability * scale - log_sum);
                ds[(size_t)i * T + j] = *probability * (ds[(size_t)i * T + j] - delta) * scale;
            }
        }
        gemm_serial(T, d, T, p, 1, T, g, D, 1, dv, 3 * D, 0);
        gemm_serial(T, d, T, ds, T, 1, k, 3 * D, 1, dq, 3 * D, 0);
        gemm_serial(T, d, T, ds, 1, T, q, 3 * D, 1, dk, 3 * D, 0);
    }
}

// act[rows,F] of pre[rows,F] (mlp: GELU) or pre[rows,2F] (swiglu: silu of the first half times the second).
static void activation_forward(real *act, const real *pre, int rows, int F, int swiglu) {
    #pragma omp parallel for
    for (int r = 0; r < rows; r++) {
        const real *in = pre + (size_t)r * F * (swiglu ? 2 : 1);
        real *to = act + (size_t)r * F;
        if (swiglu) for (int i = 0; i < F; i++) to[i] = silu(in[i]) * in[F + i];
        else for (int i = 0; i < F; i++) to[i] = gelu(in[i]);
    }
}

// Overwrites pre by its gradient.
static void activation_backward(real *pre, const real *dact, int rows, int F, int swiglu) {
    #pragma omp parallel for
    for (int r = 0; r < rows; r++) {
        real *in = pre + (size_t)r * F * (swiglu ? 2 : 1);
        const real *g = dact + (size_t)r * F;
        if (swiglu) for (int i = 0; i < F; i++) {
            real gate = in[i], up = in[F + i];
            in[i] = g[i] * up * silu_slope(gate);
            in[F + i] = g[i] * silu(gate);
        } else for (int i = 0; i < F; i++) in[i] = g[i] * gelu_slope(in[i]);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 2. The model

typedef struct {
    const real *norm1_w, *norm1_b, *qkv_w, *qkv_b, *proj_w, *proj_b, *gamma1;
    const real *norm2_w, *norm2_b, *in_w, *in_b, *out_w, *out_b, *gamma2;
} Block;
typedef struct { const real *cls, *mask, *registers, *position, *patch_w, *patch_b, *norm_w, *norm_b; } Embedding;

// What a block's backward needs, compact over the kept rows: 12 D per token for an MLP of 4D.
typedef struct {
    real *xhat1, *rstd1, *qkv, *attention, *lse, *proj;     // [rows,D] [rows] [rows,3D] [rows,D] [rows,H] [rows,D]
    real *xhat2, *rstd2, *pre, *ffn;                        // [rows,D] [rows] [rows,F or 2F] [rows,D]
} BlockActs;

// One crop size: `count` sequences of `tokens`, packed from row `row` on.
typedef struct { int count, size, grid, patches, tokens, row; } Group;

// A head's sizes and where its tensors begin in the table.
typedef struct { int dim, hidden, layers, bottleneck, prototypes; size_t offset; } HeadShape;

// What one pass of a head keeps. Layer i maps input[i] to pre[i]; the activation of pre[i] is input[i+1].
typedef struct {
    int rows;
    real *input[9], *pre[8];        // input[0]: [rows,D], then [rows,hidden]; the last pre is y[rows,b], before the L2 norm
    real *unit, *norm;              // y / |y| [rows,b], |y| [rows]
    real *logits;                   // [rows,K]; after the losses: their gradient
    real *weight;                   // w_k = g_k v_k / |v_k|  [K,b]
} HeadActs;

struct Model {
    Config c;
    TensorTable table;
    int train, threads;
    real *student, *teacher, *grad, *exp_avg, *exp_avg_sq;      // [table.size] each
    real *center[2];                                            // DINO, iBOT [K]: softmax centering's running mean
    char *arena;
    size_t arena_bytes;

    // All below is carved from the arena anew for each batch shape.
    Group groups[2];
    int rows;                       // packed student tokens, global then local
    Branch *branches;               // [depth][2]: attention, ffn
    real *pixels[2];                // [count,C,size,size] of each group
    real *patches[2];               // [count*N, C p^2]
    real *position[2];              // [1+N,D] resized to each group's grid
    Resize resize[2];               // position embedding grid -> group grid; in = 0 where the sizes agree
    BlockActs *blocks;
    real *x, *norm_hat, *norm_rstd, *norm_out;      // [rows,D]: residual stream; final norm
    real *teacher_out;                              // [2B T,D]
    real *hidden, *act;                             // [rows,D] [rows,F]: within a block
    real *dx, *dnorm, *dbranch, *dhidden, *dqkv, *dact;
    real *attention_scratch;
    size_t attention_stride;
    int masked;                     // masked patches in the batch
    int *masked_row;                // packed row of each
    real *masked_weight;            // 1 / number of masked patches in its crop
    HeadActs student_head[2], teacher_head[2];      // [1]: iBOT's own head, where it has one
    double *row_loss;
    StepResult result;
    real *dbottleneck, *directions, *sigreg_projection, *sigreg_slope, *gram[2], *head_scratch[2], *position_scratch;
};

static Block block_params(const Model *m, const real *base, int layer) {
    const Config *c = &m->c;
    size_t D = c->model_dim, F = c->model_ffn_hidden, in = c->model_ffn == FFN_SWIGLU ? 2 * F : F;
    char name[96];
    snprintf(name, sizeof name, "encoder.layer.%d.norm1.weight", layer);
    const real *w = base + m->table.tensors[tensors_find(&m->table, name)].offset;
    Block k;
    k.norm1_w = w; w += D;
    k.norm1_b = w; w += D;
    k.qkv_w = w; w += 3 * D * D;
    k.qkv_b = w; w += 3 * D;
    k.proj_w = w; w += D * D;
    k.proj_b = w; w += D;
    k.gamma1 = w; w += D;
    k.norm2_w = w; w += D;
    k.norm2_b = w; w += D;
    k.in_w = w; w += in * D;
    k.in_b = w; w += in;
    k.out_w = w; w += D * F;
    k.out_b = w; w += D;
    k.gamma2 = w;
    return k;
}

static const real *param(const Model *m, const real *base, const char *name) {
    int i = tensors_find(&m->table, name);
    return i < 0 ? NULL : base + m->table.tensors[i].offset;
}

static Embedding embedding_params(const Model *m, const real *base) {
    return (Embedding){param(m, base, "embeddings.cls_token"), param(m, base, "embeddings.mask_token"),
                       param(m, base, "embeddings.register_tokens"), param(m, base, "embeddings.position_embeddings"),
                       param(m, base, "embeddings.patch_embeddings.projection.weight"),
                       param(m, base, "embeddings.patch_embeddings.projection.bias"),
                       param(m, base, "layernorm.weight"), param(m, base, "layernorm.bias")};
}

// The gradient's address for a parameter found by the functions above.
static real *grad_of(const Model *m, const real *w) { return m->grad + (w - m->student); }

// position[g] = [cls row | patch grid], the grid resized to the group's (METHOD A.4).
static void position_forward(Model *m, const real *position) {
    size_t D = m->c.model_dim;
    for (int g = 0; g < 2; g++) {
        if (!m->groups[g].count) continue;
        memcpy(m->position[g], position, D * sizeof(real));
        if (m->resize[g].in) resize_image(&m->resize[g], &m->resize[g], (int)D, position + D, m->position[g] + D, m->position_scratch);
        else memcpy(m->position[g] + D, position + D, m->groups[g].patches * D * sizeof(real));
    }
}

// [count,C,size,size] pixels to [count*N, C p^2]: one row a patch, channel, then row, then column within it.
static void gather_patches(real *patches, const real *pixels, const Group *g, int C, int p) {
    #pragma omp parallel for
    for (int n = 0; n < g->count * g->patches; n++) {
        int image = n / g->patches, py = n % g->patches / g->grid, px = n % g->grid;
        for (int ch = 0; ch < C; ch++)
            for (int y = 0; y < p; y++)
                memcpy(patches + (((size_t)n * C + ch) * p + y) * p,
                       pixels + (((size_t)image * C + ch) * g->size + py * p + y) * g->size + px * p, (size_t)p * sizeof(real));
    }
}

// x[rows of the group, D]: patch embedding (masked patches take the mask token), class token, positions, registers.
// METHOD A.2; mask [count,N] or NULL.
static void embed_forward(Model *m, real *x, const Group *g, const real *patches, const real *position, const uint8_t *mask,
                          const Embedding *e) {
    int D = (int)m->c.model_dim, R = (int)m->c.model_registers;
    int depth = (int)(m->c.model_channels * m->c.model_patch * m->c.model_patch);
    #pragma omp parallel for
    for (int n = 0; n < g->count; n++) {
        real *to = x + (size_t)(g->row + n * g->tokens) * D, *patch = to + (size_t)(1 + R) * D;
        gemm_serial(g->patches, D, depth, patches + (size_t)n * g->patches * depth, depth, 1, e->patch_w, 1, depth, patch, D, 0);
        for (int i = 0; i < g->patches; i++) {
            int masked = mask && mask[(size_t)n * g->patches + i];
            for (int d = 0; d < D; d++)
                patch[(size_t)i * D + d] = (masked ? e->mask[d] : patch[(size_t)i * D + d] + e->patch_b[d]) +
                                           position[(size_t)(1 + i) * D + d];
        }
        for (int d = 0; d < D; d++) to[d] = e->cls[d] + position[d];
        for (int i = 0; i < R * D; i++) to[D + i] = e->registers[i];
    }
}

// Gradients of the embedding's parameters from dx. dpatch: [count*N,D] scratch.
static void embed_backward(Model *m, const real *dx, real *dpatch, const Group *g, const real *patches, const uint8_t *mask,
                           const Embedding *e, const Resize *resize) {
    int D = (int)m->c.model_dim, R = (int)m->c.model_registers;
    int depth = (int)(m->c.model_channels * m->c.model_patch * m->c.model_patch);
    real *dposition = m->position[g - m->groups];       // the forward is over: its buffer takes the gradient
    memset(dposition, 0, (size_t)(1 + g->patches) * D * sizeof(real));
    real *dcls = grad_of(m, e->cls), *dmask = grad_of(m, e->mask), *dregisters = R ? grad_of(m, e->registers) : NULL;
    #pragma omp parallel for
    for (int block = 0; block < (D + 63) / 64; block++) {
        int from = block * 64, to = min_int(from + 64, D);
        for (int n = 0; n < g->count; n++) {
            const real *token = dx + (size_t)(g->row + n * g->tokens) * D;
            for (int d = from; d < to; d++) dcls[d] += token[d], dposition[d] += token[d];
            for (int r = 0; r < R; r++) for (int d = from; d < to; d++) dregisters[r * D + d] += token[(1 + r) * D + d];
            for (int i = 0; i < g->patches; i++) {
                const real *patch = token + (size_t)(1 + R + i) * D;
                real *out = dpatch + (size_t)(n * g->patches + i) * D;
                int masked = mask && mask[(size_t)n * g->patches + i];
                for (int d = from; d < to; d++) {
                    dposition[(size_t)(1 + i) * D + d] += patch[d];
                    if (masked) dmask[d] += patch[d];
                    out[d] = masked ? 0 : patch[d];
                }
            }
        }
    }
    linear_backward(NULL, grad_of(m, e->patch_w), grad_of(m, e->patch_b), dpatch, patches, e->patch_w, g->count * g->patches, depth, D);
    real *dtable = grad_of(m, e->position);
    for (int d = 0; d < D; d++) dtable[d] += dposition[d];
    if (resize->in) resize_image_adjoint(resize, resize, D, dposition + D, dtable + D, m->position_scratch);
    else for (size_t i = 0; i < (size_t)g->patches * D; i++) dtable[D + i] += dposition[D + i];
}

// x through one block, in place.
static void block_forward(Model *m, real *x, const Block *k, const BlockActs *a, const Branch *attention, const Branch *ffn) {
    int D = (int)m->c.model_dim, H = (int)m->c.model_heads, F = (int)m->c.model_ffn_hidden, swiglu = m->c.model_ffn == FFN_SWIGLU;
    layernorm_forward(m->hidden, a->xhat1, a->rstd1, x, attention->map, k->norm1_w, k->norm1_b, attention->rows, D);
    linear_forward(a->qkv, m->hidden, k->qkv_w, k->qkv_b, attention->rows, D, 3 * D);
    attention_forward(a->attention, a->lse, a->qkv, attention, m->attention_scratch, m->attention_stride, D, H);
    linear_forward(a->proj, a->attention, k->proj_w, k->proj_b, attention->rows, D, D);
    residual_forward(x, a->proj, k->gamma1, attention, D);

    layernorm_forward(m->hidden, a->xhat2, a->rstd2, x, ffn->map, k->norm2_w, k->norm2_b, ffn->rows, D);
    linear_forward(a->pre, m->hidden, k->in_w, k->in_b, ffn->rows, D, swiglu ? 2 * F : F);
    activation_forward(m->act, a->pre, ffn->rows, F, swiglu);
    linear_forward(a->ffn, m->act, k->out_w, k->out_b, ffn->rows, F, D);
    residual_forward(x, a->ffn, k->gamma2, ffn, D);
}

// dx through one block, in place; the parameters' gradients are added to m->grad.
static void block_backward(Model *m, real *dx, const Block *k, const BlockActs *a, const Branch *attention, const Branch *ffn) {
    int D = (int)m->c.model_dim, H = (int)m->c.model_heads, F = (int)m->c.model_ffn_hidden, swiglu = m->c.model_ffn == FFN_SWIGLU;
    residual_backward(m->dbranch, grad_of(m, k->gamma2), dx, a->ffn, k->gamma2, ffn, D);
    activation_forward(m->act, a->pre, ffn->rows, F, swiglu);
    linear_backward(m->dact, grad_of(m, k->out_w), grad_of(m, k->out_b), m->dbranch, m->act, k->out_w, ffn->rows, F, D);
    activation_backward(a->pre, m->dact, ffn->rows, F, swiglu);
    layernorm_output(m->hidden, a->xhat2, k->norm2_w, k->norm2_b, ffn->rows, D);
    linear_backward(m->dhidden, grad_of(m, k->in_w), grad_of(m, k->in_b), a->pre, m->hidden, k->in_w, ffn->rows, D, swiglu ? 2 * F : F);
    layernorm_backward(dx, grad_of(m, k->norm2_w), grad_of(m, k->norm2_b), m->dhidden, a->xhat2, a->rstd2, ffn->map,
                       k->norm2_w, ffn->rows, D);

    residual_backward(m->dbranch, grad_of(m, k->gamma1), dx, a->proj, k->gamma1, attention, D);
    linear_backward(m->dhidden, grad_of(m, k->proj_w), grad_of(m, k->proj_b), m->dbranch, a->attention, k->proj_w,
                    attention->rows, D, D);
    attention_backward(m->dqkv, m->dhidden, a->attention, a->lse, a->qkv, attention, m->attention_scratch, m->attention_stride, D, H);
    layernorm_output(m->hidden, a->xhat1, k->norm1_w, k->norm1_b, attention->rows, D);
    linear_backward(m->dhidden, grad_of(m, k->qkv_w), grad_of(m, k->qkv_b), m->dqkv, m->hidden, k->qkv_w, attention->rows, D, 3 * D);
    layernorm_backward(dx, grad_of(m, k->norm1_w), grad_of(m, k->norm1_b), m->dhidden, a->xhat1, a->rstd1, attention->map,
                       k->norm1_w, attention->rows, D);
}

// Final-norm tokens of the teacher for the global group, unmasked, no drop path: out[count T, D].
static void teacher_forward(Model *m, real *out) {
    Group *g = &m->groups[0];
    Branch every = {g->count * g->tokens, g->count, {g->count, 0}, {g->tokens, g->tokens}, {1, 1}, NULL};
    Embedding e = embedding_params(m, m->teacher);
    position_forward(m, e.position);
    embed_forward(m, m->x, g, m->patches[0], m->position[0], NULL, &e);
    for (int l = 0; l < m->c.model_depth; l++) {
        Block k = block_params(m, m->teacher, l);
        block_forward(m, m->x, &k, &m->blocks[0], &every, &every);
    }
    layernorm_forward(out, m->norm_hat, m->norm_rstd, m->x, NULL, e.norm_w, e.norm_b, every.rows, (int)m->c.model_dim);
}

// Final-norm tokens of the student for all views, masked: norm_out[rows,D].
static void student_forward(Model *m, const uint8_t *mask) {
    Embedding e = embedding_params(m, m->student);
    position_forward(m, e.position);
    for (int g = 0; g < 2; g++) embed_forward(m, m->x, &m->groups[g], m->patches[g], m->position[g], g ? NULL : mask, &e);
    for (int l = 0; l < m->c.model_depth; l++) {
        Block k = block_params(m, m->student, l);
        block_forward(m, m->x, &k, &m->blocks[l], &m->branches[2 * l], &m->branches[2 * l + 1]);
    }
    layernorm_forward(m->norm_out, m->norm_hat, m->norm_rstd, m->x, NULL, e.norm_w, e.norm_b, m->rows, (int)m->c.model_dim);
}

// From dnorm[rows,D], the gradient of the final-norm tokens, to every backbone parameter.
static void student_backward(Model *m, const uint8_t *mask) {
    int D = (int)m->c.model_dim;
    Embedding e = embedding_params(m, m->student);
    memset(m->dx, 0, (size_t)m->rows * D * sizeof(real));
    layernorm_backward(m->dx, grad_of(m, e.norm_w), grad_of(m, e.norm_b), m->dnorm, m->norm_hat, m->norm_rstd, NULL, e.norm_w, m->rows, D);
    for (int l = (int)m->c.model_depth - 1; l >= 0; l--) {
        Block k = block_params(m, m->student, l);
        block_backward(m, m->dx, &k, &m->blocks[l], &m->branches[2 * l], &m->branches[2 * l + 1]);
    }
    for (int g = 0; g < 2; g++)
        if (m->groups[g].count) embed_backward(m, m->dx, m->dnorm, &m->groups[g], m->patches[g], g ? NULL : mask, &e, &m->resize[g]);
}

// ---------------------------------------------------------------------------------------------------------------------
// 3. Heads (METHOD B)

static HeadShape head_shape(const Model *m, int ibot) {
    const Config *c = &m->c;
    if (ibot) return (HeadShape){(int)c->model_dim, (int)c->ibot_hidden, (int)c->ibot_layers, (int)c->ibot_bottleneck,
                                 (int)c->ibot_prototypes, m->table.group_start[GROUP_IBOT_HEAD]};
    return (HeadShape){(int)c->model_dim, (int)c->dino_hidden, (int)c->dino_layers, (int)c->dino_bottleneck,
                       (int)c->dino_prototypes, m->table.group_start[GROUP_DINO_HEAD]};
}

static int head_in(const HeadShape *h, int layer) { return layer ? h->hidden : h->dim; }
static int head_out(const HeadShape *h, int layer) { return layer + 1 < h->layers ? h->hidden : h->bottleneck; }

// logits[rows,K] from input[0][rows,D].
static void head_forward(HeadActs *a, const real *w, const HeadShape *h) {
    int K = h->prototypes, b = h->bottleneck, last = h->layers - 1;
    for (int i = 0; i < h->layers; i++) {
        int in = head_in(h, i), out = head_out(h, i);
        linear_forward(a->pre[i], a->input[i], w, w + (size_t)in * out, a->rows, in, out);
        if (i < last) activation_forward(a->input[i + 1], a->pre[i], a->rows, out, 0);
        w += (size_t)in * out + out;
    }
    #pragma omp parallel for
    for (int r = 0; r < a->rows; r++) {
        const real *y = a->pre[last] + (size_t)r * b;
        real square = 0;
        SIMD_SUM(square) for (int i = 0; i < b; i++) square += y[i] * y[i];
        a->norm[r] = (real)sqrt(square);
        real divisor = a->norm[r] > (real)1e-12 ? a->norm[r] : (real)1e-12;
        for (int i = 0; i < b; i++) a->unit[(size_t)r * b + i] = y[i] / divisor;
    }
    const real *g = w, *v = w + K;
    #pragma omp parallel for
    for (int k = 0; k < K; k++) {
        real square = 0;
        SIMD_SUM(square) for (int i = 0; i < b; i++) square += v[(size_t)k * b + i] * v[(size_t)k * b + i];
        real scale = g[k] / (real)sqrt(square);
        for (int i = 0; i < b; i++) a->weight[(size_t)k * b + i] = scale * v[(size_t)k * b + i];
    }
    gemm(a->rows, K, b, a->unit, b, 1, a->weight, 1, b, a->logits, K, 0);
}

// From dlogits (in a->logits) and dbottleneck[crops,b], which joins the first rows before the L2 norm, to the head's
// parameters; input[0] is overwritten by its gradient. scratch: two of [rows, widest layer].
static void head_backward(HeadActs *a, const real *w, real *dw, const HeadShape *h, const real *dbottleneck, int crops,
                          real *const scratch[2]) {
    int K = h->prototypes, b = h->bottleneck, rows = a->rows, last = h->layers - 1;
    size_t skip = 0;
    for (int i = 0; i < h->layers; i++) skip += (size_t)(head_in(h, i) + 1) * head_out(h, i);
    const real *g = w + skip, *v = g + K;
    real *dg = dw + skip, *dv = dg + K, *dy = scratch[0], *next = scratch[1];
    gemm(rows, b, K, a->logits, K, 1, a->weight, b, 1, dy, b, 0);
    gemm(K, b, rows, a->logits, 1, K, a->unit, b, 1, a->weight, b, 0);      // dweight takes the weight's place
    #pragma omp parallel for
    for (int k = 0; k < K; k++) {
        const real *dweight = a->weight + (size_t)k * b, *direction = v + (size_t)k * b;
        real square = 0, along = 0;
        SIMD_SUM(square) for (int i = 0; i < b; i++) square += direction[i] * direction[i];
        SIMD_SUM(along) for (int i = 0; i < b; i++) along += direction[i] * dweight[i];
        real inverse = 1 / (real)sqrt(square);
        dg[k] += along * inverse;
        for (int i = 0; i < b; i++) dv[(size_t)k * b + i] += g[k] * inverse * (dweight[i] - direction[i] * along / square);
    }
    #pragma omp parallel for
    for (int r = 0; r < rows; r++) {
        real *d = dy + (size_t)r * b, along = 0, clamped = a->norm[r] > (real)1e-12 ? a->norm[r] : (real)1e-12;
        const real *z = a->unit + (size_t)r * b;
        if (a->norm[r] > (real)1e-12) SIMD_SUM(along) for (int i = 0; i < b; i++) along += z[i] * d[i];
        for (int i = 0; i < b; i++) d[i] = (d[i] - z[i] * along) / clamped;
        if (r < crops) for (int i = 0; i < b; i++) d[i] += dbottleneck[(size_t)r * b + i];
    }
    for (int i = last; i >= 0; i--) {
        int in = head_in(h, i), out = head_out(h, i);
        skip = 0;
        for (int j = 0; j < i; j++) skip += (size_t)(head_in(h, j) + 1) * head_out(h, j);
        linear_backward(i ? next : a->input[0], dw + skip, dw + skip + (size_t)in * out, dy, a->input[i], w + skip, rows, in, out);
        if (i == 0) break;
        activation_backward(a->pre[i - 1], next, rows, in, 0);
        dy = a->pre[i - 1];
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 4. Losses (METHOD C)

// x[n] <- softmax(x scale + shift[n]) (shift NULL: none), in place.
static void softmax_row(real *x, const real *shift, real scale, int n) {
    real most = -INFINITY, sum = 0;
    for (int i = 0; i < n; i++) x[i] = x[i] * scale + (shift ? shift[i] : 0);
    SIMD_MAX(most) for (int i = 0; i < n; i++) most = x[i] > most ? x[i] : most;
    SIMD_SUM(sum) for (int i = 0; i < n; i++) {
        x[i] = real_exp(x[i] - most);
        sum += x[i];
    }
    real inverse = 1 / sum;
    for (int i = 0; i < n; i++) x[i] *= inverse;
}

// Teacher logits[rows,K] to targets, in place: three Sinkhorn-Knopp iterations in log-scaling form, where only a vector a[K]
// is kept (METHOD C.1). a, p: K and rows*K scratch.
static void sinkhorn(real *logits, real *a, real *p, real temp, int rows, int K) {
    if (!rows) return;
    #pragma omp parallel for
    for (int block = 0; block < (K + 63) / 64; block++)
        for (int k = block * 64; k < min_int(block * 64 + 64, K); k++) {
            real most = -INFINITY;
            double sum = 0;
            for (int r = 0; r < rows; r++) most = fmax(most, logits[(size_t)r * K + k] / temp);
            for (int r = 0; r < rows; r++) sum += real_exp(logits[(size_t)r * K + k] / temp - most);
            a[k] = -(most + (real)log(sum));
        }
    for (int iteration = 0; iteration < 2; iteration++) {
        #pragma omp parallel for
        for (int r = 0; r < rows; r++) {
            memcpy(p + (size_t)r * K, logits + (size_t)r * K, (size_t)K * sizeof(real));
            softmax_row(p + (size_t)r * K, a, 1 / temp, K);
        }
        #pragma omp parallel for
        for (int k = 0; k < K; k++) {
            double sum = 0;
            for (int r = 0; r < rows; r++) sum += p[(size_t)r * K + k];
            a[k] -= (real)log(sum);
        }
    }
    #pragma omp parallel for
    for (int r = 0; r < rows; r++) softmax_row(logits + (size_t)r * K, a, 1 / temp, K);
}

// Teacher logits[rows,K] to softmax((logits - center) / temp), in place; then center <- 0.9 center + 0.1 mean logit.
static void softmax_centering(real *logits, real *center, real *shift, real *mean, real temp, int rows, int K) {
    if (!rows) return;
    #pragma omp parallel for
    for (int k = 0; k < K; k++) {
        double sum = 0;
        for (int r = 0; r < rows; r++) sum += logits[(size_t)r * K + k];
        mean[k] = (real)(sum / rows);
        shift[k] = -center[k] / temp;
        center[k] = (real)0.9 * center[k] + (real)0.1 * mean[k];
    }
    #pragma omp parallel for
    for (int r = 0; r < rows; r++) softmax_row(logits + (size_t)r * K, shift, 1 / temp, K);
}

// Teacher logits to targets, by the configured rule. `ibot`: which centre.
static void teacher_targets(Model *m, HeadActs *t, int first, int rows, int K, int ibot, double temp) {
    real *scratch = m->head_scratch[0], *logits = t->logits + (size_t)first * K;
    if (m->c.teacher_centering == CENTERING_SINKHORN) sinkhorn(logits, scratch, scratch + K, (real)temp, rows, K);
    else softmax_centering(logits, m->center[ibot], scratch, scratch + K, (real)temp, rows, K);
}

// Entropy of the mean target, nats.
static double target_entropy(const real *targets, double *partial, int rows, int K) {
    #pragma omp parallel for
    for (int k = 0; k < K; k++) {
        double mean = 0;
        for (int r = 0; r < rows; r++) mean += targets[(size_t)r * K + k];
        mean /= rows;
        partial[k] = mean > 0 ? -mean * log(mean) : 0;
    }
    double entropy = 0;
    for (int k = 0; k < K; k++) entropy += partial[k];
    return entropy;
}

// Cross-entropy of one row of student logits s[K] against t0 (+ t1, may be NULL); s <- scale (m p - t), its gradient times
// `scale` temp. Returns sum over targets of -sum_k t_k log p_k.
static double cross_entropy_row(real *s, const real *t0, const real *t1, real temp, real scale, int K) {
    real most = -INFINITY, count = t1 ? 2 : 1;
    double sum = 0, dot = 0;
    SIMD_MAX(most) for (int k = 0; k < K; k++) most = s[k] > most ? s[k] : most;
    for (int from = 0; from < K; from += 4096) {            // blocks: fp32 lanes within, double across
        int to = min_int(from + 4096, K);
        real part = 0, part_dot = 0;
        SIMD_SUM(part) for (int k = from; k < to; k++) part += real_exp((s[k] - most) / temp);
        if (t1) SIMD_SUM(part_dot) for (int k = from; k < to; k++) part_dot += (t0[k] + t1[k]) * (s[k] - most);
        else SIMD_SUM(part_dot) for (int k = from; k < to; k++) part_dot += t0[k] * (s[k] - most);
        sum += part;
        dot += part_dot;
    }
    double log_sum = log(sum);
    real inverse = (real)(1 / sum);
    for (int k = 0; k < K; k++)
        s[k] = scale * (count * real_exp((s[k] - most) / temp) * inverse - t0[k] - (t1 ? t1[k] : 0));
    return count * log_sum - dot / temp;
}

// DINO (METHOD C.2): every local crop against both teacher crops, each global crop against the other one.
// logits[2B+VB,K] <- gradient; targets[2B,K].
static double dino_loss(Model *m, real *logits, const real *targets, int B, int V, int K) {
    double pairs = 2 * V + 2;
    real temp = (real)m->c.student_temp, scale = (real)(m->c.dino_weight / (pairs * B * m->c.student_temp));
    #pragma omp parallel for
    for (int r = 0; r < (2 + V) * B; r++) {
        int sample = r % B, crop = r / B;
        const real *first = targets + (size_t)sample * K, *second = targets + (size_t)(B + sample) * K;
        m->row_loss[r] = crop >= 2 ? cross_entropy_row(logits + (size_t)r * K, first, second, temp, scale, K)
                                   : cross_entropy_row(logits + (size_t)r * K, crop == 0 ? second : first, NULL, temp, scale, K);
    }
    double loss = 0;
    for (int r = 0; r < (2 + V) * B; r++) loss += m->row_loss[r];
    return loss / (pairs * B);
}

// iBOT (METHOD C.3): masked student patches against the teacher's view of the same patch; each crop's patches weigh 1
// together, and the mean is over all `crops`, masked or not. logits[masked,K] <- gradient; targets[masked,K].
static double ibot_loss(Model *m, real *logits, const real *targets, int crops, int K) {
    real temp = (real)m->c.student_temp;
    #pragma omp parallel for
    for (int j = 0; j < m->masked; j++) {
        real scale = (real)(m->c.ibot_weight / (crops * m->c.student_temp)) * m->masked_weight[j];
        m->row_loss[j] = m->masked_weight[j] * cross_entropy_row(logits + (size_t)j * K, targets + (size_t)j * K, NULL, temp, scale, K);
    }
    double loss = 0;
    for (int j = 0; j < m->masked; j++) loss += m->row_loss[j];
    return loss / crops;
}

// KoLeo (METHOD C.4) of x[B rows, `stride` apart]; adds weight * gradient to dx. unit, dunit: [B,D] scratch.
static double koleo_loss(real *dx, const real *x, size_t stride, real weight, real *unit, real *dunit, int B, int D) {
    double loss = 0;
    if (B < 2) return 0;
    memset(dunit, 0, (size_t)B * D * sizeof(real));
    for (int i = 0; i < B; i++) {
        double square = 0;
        for (int d = 0; d < D; d++) square += (double)x[i * stride + d] * x[i * stride + d];
        real inverse = (real)(1 / fmax(sqrt(square), 1e-8));
        for (int d = 0; d < D; d++) unit[(size_t)i * D + d] = x[i * stride + d] * inverse;
    }
    for (int i = 0; i < B; i++) {
        const real *a = unit + (size_t)i * D;
        int nearest = i == 0;           // where every product is NaN too
        real best = -INFINITY;
        for (int j = 0; j < B; j++) {
            real dot = 0;
            SIMD_SUM(dot) for (int d = 0; d < D; d++) dot += a[d] * unit[(size_t)j * D + d];
            if (j != i && dot > best) best = dot, nearest = j;
        }
        const real *b = unit + (size_t)nearest * D;
        double square = 0;
        for (int d = 0; d < D; d++) square += ((double)a[d] - b[d] + 1e-8) * ((double)a[d] - b[d] + 1e-8);
        double distance = sqrt(square);
        loss -= log(distance + 1e-8) / B;
        for (int d = 0; d < D; d++) {
            real q = (real)(((double)a[d] - b[d] + 1e-8) / (B * distance * (distance + 1e-8)));
            dunit[(size_t)i * D + d] -= q;
            dunit[(size_t)nearest * D + d] += q;
        }
    }
    for (int i = 0; i < B; i++) {
        const real *a = unit + (size_t)i * D, *g = dunit + (size_t)i * D;
        double along = 0, square = 0;
        for (int d = 0; d < D; d++) along += (double)a[d] * g[d], square += (double)x[i * stride + d] * x[i * stride + d];
        real inverse = (real)(weight / fmax(sqrt(square), 1e-8));
        for (int d = 0; d < D; d++) dx[i * stride + d] += inverse * (g[d] - a[d] * (real)along);
    }
    return loss;
}

// SIGReg (METHOD C.5) of z[n rows, `stride` apart] on the batch's directions[M,Dz]; adds sigreg.weight * gradient to dz.
static double sigreg_loss(Model *m, real *dz, const real *z, size_t stride, int n, int Dz) {
    const Config *c = &m->c;
    real *s = m->sigreg_projection, *slope = m->sigreg_slope;
    int M = (int)c->sigreg_slices, J = (int)c->sigreg_knots;
    double step = (c->sigreg_t_max - c->sigreg_t_min) / (J - 1), kappa = c->sigreg_scale_by_n ? n : 1;
    gemm(n, M, Dz, z, stride, 1, m->directions, 1, Dz, s, M, 0);
    memset(slope, 0, (size_t)n * M * sizeof(real));
    #pragma omp parallel for
    for (int i = 0; i < M; i++) {
        double statistic = 0;
        for (int j = 0; j < J; j++) {
            double t = c->sigreg_t_min + j * step, phi = exp(-0.5 * t * t), cosine = 0, sine = 0;
            double w = (j == 0 || j == J - 1 ? 0.5 : 1) * step * phi * (c->sigreg_t_min == 0 ? 2 : 1);
            for (int r = 0; r < n; r++) {
                cosine += cos(t * s[(size_t)r * M + i]);
                sine += sin(t * s[(size_t)r * M + i]);
            }
            cosine = cosine / n - phi;
            sine /= n;
            statistic += w * (cosine * cosine + sine * sine);
            for (int r = 0; r < n; r++)
                slope[(size_t)r * M + i] += (real)(c->sigreg_weight * 2 * kappa / ((double)M * n) * w * t *
                    (sine * cos(t * s[(size_t)r * M + i]) - cosine * sin(t * s[(size_t)r * M + i])));
        }
        m->row_loss[i] = kappa * statistic;
    }
    gemm(n, Dz, M, slope, M, 1, m->directions, Dz, 1, dz, stride, 1);
    double loss = 0;
    for (int i = 0; i < M; i++) loss += m->row_loss[i];
    return loss / M;
}

// Gram anchoring (METHOD C.6) of final-norm patches x[N,D] of one image against target[N,D]; adds scale * gradient to dx.
// Returns the sum of squared differences of the N x N similarity matrices. unit: [2N,D], difference: [N,N] scratch.
static double gram_loss_image(real *dx, const real *x, const float *target, real scale, real *unit, real *difference, int N, int D) {
    for (int i = 0; i < 2 * N; i++) {
        real square = 0;
        for (int d = 0; d < D; d++) unit[(size_t)i * D + d] = i < N ? x[(size_t)i * D + d] : (real)target[(size_t)(i - N) * D + d];
        SIMD_SUM(square) for (int d = 0; d < D; d++) square += unit[(size_t)i * D + d] * unit[(size_t)i * D + d];
        real inverse = 1 / (real)fmax(sqrt(square), 1e-12);
        for (int d = 0; d < D; d++) unit[(size_t)i * D + d] *= inverse;
    }
    real *other = unit + (size_t)N * D;
    gemm_serial(N, N, D, other, D, 1, other, 1, D, difference, N, 0);
    for (int i = 0; i < N * N; i++) difference[i] = -difference[i];
    gemm_serial(N, N, D, unit, D, 1, unit, 1, D, difference, N, 1);
    double loss = 0;
    for (int i = 0; i < N * N; i++) loss += (double)difference[i] * difference[i];
    gemm_serial(N, D, N, difference, N, 1, unit, D, 1, other, D, 0);        // a quarter of d(sum)/d(unit)
    for (int i = 0; i < N; i++) {
        const real *a = unit + (size_t)i * D, *g = other + (size_t)i * D;
        real along = 0, square = 0;
        SIMD_SUM(along) for (int d = 0; d < D; d++) along += a[d] * g[d];
        SIMD_SUM(square) for (int d = 0; d < D; d++) square += x[(size_t)i * D + d] * x[(size_t)i * D + d];
        real inverse = 4 * scale / (real)fmax(sqrt(square), 1e-12);
        for (int d = 0; d < D; d++) dx[(size_t)i * D + d] += inverse * (g[d] - a[d] * along);
    }
    return loss;
}

// ---------------------------------------------------------------------------------------------------------------------
// 5. Pixels (METHOD E, CURIA2 1.3): crop, antialiased bicubic resize, clip below air, gamma, blur, z-score, jitter, flip

// Mean and standard deviation (n-1) of a slice's values, clipped below -1000 if asked.
static void slice_statistics(const Slice *s, int clip, double *mean, double *std) {
    double sum = 0, square = 0, shift = s->scale * s->pixels[0] + s->intercept;     // shifted, against cancellation
    size_t n = (size_t)s->rows * s->cols;
    for (size_t i = 0; i < n; i++) {
        double v = s->scale * s->pixels[i] + s->intercept;
        v = (clip && v < -1000 ? -1000 : v) - shift;
        sum += v;
        square += v * v;
    }
    *mean = shift + sum / n;
    *std = n > 1 ? sqrt(fmax(0, (square - sum * sum / n) / (n - 1))) : 0;
}

// Gaussian blur with nine taps and reflected borders, in place. scratch: [size,size].
static void blur_image(real *x, int size, double sigma, real *scratch) {
    real tap[5], total = 0;
    for (int i = 0; i < 5; i++) total += (i ? 2 : 1) * (tap[i] = (real)exp(-0.5 * i * i / (sigma * sigma)));
    for (int i = 0; i < 5; i++) tap[i] /= total;
    for (int pass = 0; pass < 2; pass++) {
        real *from = pass ? scratch : x, *to = pass ? x : scratch;
        int along = pass ? size : 1, across = pass ? 1 : size;      // columns of a row first, then rows of a column
        for (int a = 0; a < size; a++)
            for (int i = 0; i < size; i++) {
                real sum = 0;
                for (int j = -4; j <= 4; j++) {
                    int k = i + j < 0 ? -(i + j) : i + j >= size ? 2 * (size - 1) - (i + j) : i + j;
                    sum += tap[j < 0 ? -j : j] * from[a * across + k * along];
                }
                to[a * across + i * along] = sum;
            }
    }
}

// out[C,size,size]: one view. mean, std: the statistics for the z-score, ignored for data.normalize=view.
static void render_view(real *out, const Config *c, const Slice *s, const View *v, int size, double mean, double std) {
    int h = v->height, w = v->width, n = size * size;
    real *crop = xmalloc(((size_t)h * w + (size_t)(h > size ? h : size) * size) * sizeof(real), "a view"), *scratch = crop + (size_t)h * w;
    // Relative to one of its values: what is constant stays so to the bit, and is not scaled up as if its rounding were a picture.
    real base = (real)(s->scale * s->pixels[(size_t)v->top * s->cols + v->left] + s->intercept);
    for (int y = 0; y < h; y++) {
        const int16_t *from = s->pixels + (size_t)(v->top + y) * s->cols + v->left;
        for (int x = 0; x < w; x++) crop[(size_t)y * w + x] = (real)(s->scale * from[x] + s->intercept) - base;
    }
    Resize rows = resize_plan(h, size, INTERPOLATE_ANTIALIAS), cols = resize_plan(w, size, INTERPOLATE_ANTIALIAS);
    resize_image(&rows, &cols, 1, crop, out, scratch);
    resize_free(&rows);
    resize_free(&cols);
    for (int i = 0; i < n; i++) out[i] += base;
    if (c->data_clip_below_air) for (int i = 0; i < n; i++) out[i] = out[i] < -1000 ? -1000 : out[i];
    if (v->gamma != 1) {
        real least = out[0], most = out[0];
        for (int i = 1; i < n; i++) least = out[i] < least ? out[i] : least, most = out[i] > most ? out[i] : most;
        if (most > least)
            for (int i = 0; i < n; i++) out[i] = least + (most - least) * (real)pow((double)(out[i] - least) / (most - least), v->gamma);
    }
    if (v->blur_sigma > 0) blur_image(out, size, v->blur_sigma, scratch);
    if (c->data_normalize == NORMALIZE_VIEW) {
        double square = 0;
        mean = 0;
        for (int i = 0; i < n; i++) mean += out[i];
        mean /= n;
        for (int i = 0; i < n; i++) square += (out[i] - mean) * (out[i] - mean);
        std = n > 1 ? sqrt(square / (n - 1)) : 0;
    }
    double inverse = std < 1e-6 ? 1 : 1 / std;          // a constant image is only centred
    real gain = (real)(v->contrast * inverse);
    for (int i = 0; i < n; i++) out[i] = (real)(out[i] - mean) * gain + (real)v->brightness;
    if (v->flip)
        for (int y = 0; y < size; y++)
            for (int x = 0; x < size / 2; x++) {
                real *a = out + (size_t)y * size + x, *b = out + (size_t)y * size + size - 1 - x, t = *a;
                *a = *b;
                *b = t;
            }
    for (int ch = 1; ch < c->model_channels; ch++) memcpy(out + (size_t)ch * n, out, (size_t)n * sizeof(real));
    free(crop);
}

// pixels[g] of both groups, from the batch's slices or as given.
static void load_pixels(Model *m, const Batch *b) {
    const Config *c = &m->c;
    const float *given[2] = {b->global_pixels, b->local_pixels};
    if (!b->slices) {
        for (int g = 0; g < 2; g++)
            for (size_t i = 0, n = (size_t)m->groups[g].count * c->model_channels * m->groups[g].size * m->groups[g].size; i < n; i++)
                m->pixels[g][i] = given[g][i];
        return;
    }
    double *statistics = xmalloc((size_t)b->samples * 2 * sizeof(double), "slice statistics");
    #pragma omp parallel for schedule(dynamic)
    for (int i = 0; i < b->samples; i++) {
        const Slice *s = &b->slices[i];
        if (c->data_normalize == NORMALIZE_SLICE) slice_statistics(s, c->data_clip_below_air, &statistics[2 * i], &statistics[2 * i + 1]);
        if (c->data_normalize == NORMALIZE_VOLUME) statistics[2 * i] = s->volume_mean, statistics[2 * i + 1] = s->volume_std;
    }
    #pragma omp parallel for schedule(dynamic)
    for (int i = 0; i < b->globals + b->locals; i++) {
        const View *v = &b->views[i];
        int g = i >= b->globals, size = m->groups[g].size;
        real *out = m->pixels[g] + (size_t)(i - (g ? b->globals : 0)) * c->model_channels * size * size;
        render_view(out, c, &b->slices[v->sample], v, size, statistics[2 * v->sample], statistics[2 * v->sample + 1]);
    }
    free(statistics);
}

// ---------------------------------------------------------------------------------------------------------------------
// 6. The step

typedef struct { char *base; size_t used; } Carver;

static void *take(Carver *a, size_t count, size_t size) {
    void *p = a->base ? a->base + a->used : NULL;
    a->used += (count * size + 63) & ~(size_t)63;
    return p;
}

#define TAKE(pointer, count) ((pointer) = take(a, (size_t)(count), sizeof *(pointer)))

static void carve_head(HeadActs *h, const HeadShape *s, int rows, Carver *a) {
    h->rows = rows;
    for (int i = 0; i < s->layers; i++) {
        TAKE(h->input[i], (size_t)rows * head_in(s, i));
        TAKE(h->pre[i], (size_t)rows * head_out(s, i));
    }
    TAKE(h->unit, (size_t)rows * s->bottleneck);
    TAKE(h->norm, rows);
    TAKE(h->logits, (size_t)rows * s->prototypes);
    TAKE(h->weight, (size_t)s->prototypes * s->bottleneck);
}

// Gives every activation its place for the batch's shape. With a->base NULL it only adds up the bytes.
static void carve(Model *m, Carver *a) {
    const Config *c = &m->c;
    size_t D = c->model_dim, H = c->model_heads, F = c->model_ffn_hidden, in = c->model_ffn == FFN_SWIGLU ? 2 * F : F;
    size_t depth = c->model_channels * c->model_patch * c->model_patch, teacher_rows = (size_t)m->groups[0].count * m->groups[0].tokens;
    size_t most_tokens = 0, most_rows = 0;
    for (int g = 0; g < 2; g++) {
        const Group *p = &m->groups[g];
        TAKE(m->pixels[g], (size_t)p->count * c->model_channels * p->size * p->size);
        TAKE(m->patches[g], (size_t)p->count * p->patches * depth);
        TAKE(m->position[g], (1 + (size_t)p->patches) * D);
        if (p->count && (size_t)p->tokens > most_tokens) most_tokens = p->tokens;
    }
    size_t grid = m->groups[0].grid > m->groups[1].grid ? m->groups[0].grid : m->groups[1].grid;
    TAKE(m->position_scratch, (size_t)c->model_pos_grid * grid * D);
    int blocks = m->train ? (int)c->model_depth : 1;
    for (int l = 0; l < blocks; l++) {
        for (int branch = 0; branch < 2; branch++) {
            Branch *s = &m->branches[2 * l + branch];
            s->map = NULL;
            if (s->rows < m->rows) TAKE(s->map, s->rows);
        }
        // the teacher's pass uses block 0, with all of the global group's rows
        size_t rows = m->branches[2 * l].rows;
        if (l == 0 && rows < teacher_rows) rows = teacher_rows;
        if (rows > most_rows) most_rows = rows;
        BlockActs *k = &m->blocks[l];
        TAKE(k->xhat1, rows * D);
        TAKE(k->rstd1, rows);
        TAKE(k->qkv, rows * 3 * D);
        TAKE(k->attention, rows * D);
        TAKE(k->lse, rows * H);
        TAKE(k->proj, rows * D);
        TAKE(k->xhat2, rows * D);
        TAKE(k->rstd2, rows);
        TAKE(k->pre, rows * in);
        TAKE(k->ffn, rows * D);
    }
    TAKE(m->x, m->rows * D);
    TAKE(m->norm_hat, m->rows * D);
    TAKE(m->norm_rstd, m->rows);
    TAKE(m->teacher_out, teacher_rows * D);
    TAKE(m->hidden, most_rows * D);
    TAKE(m->act, most_rows * F);
    m->attention_stride = 2 * most_tokens * most_tokens;
    TAKE(m->attention_scratch, m->threads * m->attention_stride);
    if (!m->train) return;

    TAKE(m->norm_out, m->rows * D);
    TAKE(m->dx, m->rows * D);
    TAKE(m->dnorm, m->rows * D);
    TAKE(m->dbranch, most_rows * D);
    TAKE(m->dhidden, most_rows * D);
    TAKE(m->dqkv, most_rows * 3 * D);
    TAKE(m->dact, most_rows * F);
    TAKE(m->masked_row, m->masked);
    TAKE(m->masked_weight, m->masked);
    size_t scratch = 0, losses = c->sigreg_slices;
    size_t crops = m->groups[0].count, class_rows = crops + m->groups[1].count;
    for (int i = 0; i < 2; i++) {
        if (i == 1 && !c->ibot_separate_head) break;
        HeadShape s = head_shape(m, i);
        size_t extra = i == 1 || !c->ibot_separate_head ? m->masked : 0;
        size_t rows = (i == 0 ? class_rows : 0) + extra, targets = (i == 0 ? crops : 0) + extra, widest = D;
        carve_head(&m->student_head[i], &s, (int)rows, a);
        carve_head(&m->teacher_head[i], &s, (int)targets, a);
        for (int l = 0; l < s.layers; l++) if ((size_t)head_out(&s, l) > widest) widest = head_out(&s, l);
        if (rows * widest > scratch) scratch = rows * widest;
        if ((targets + 2) * s.prototypes > scratch) scratch = (targets + 2) * s.prototypes;
        if (rows > losses) losses = rows;
        if ((size_t)s.prototypes > losses) losses = s.prototypes;
    }
    TAKE(m->head_scratch[0], scratch);
    TAKE(m->head_scratch[1], scratch);
    TAKE(m->row_loss, losses);
    size_t B = crops / 2, sigreg_width = c->sigreg_on == SIGREG_CLS ? D : (size_t)c->dino_bottleneck;
    TAKE(m->dbottleneck, crops * c->dino_bottleneck);
    if (c->sigreg_weight > 0) {
        TAKE(m->directions, c->sigreg_slices * sigreg_width);
        TAKE(m->sigreg_projection, B * c->sigreg_slices);
        TAKE(m->sigreg_slope, B * c->sigreg_slices);
    }
    size_t N = m->groups[0].patches;
    TAKE(m->gram[0], c->gram_weight > 0 ? m->threads * 2 * N * D : 0);
    TAKE(m->gram[1], c->gram_weight > 0 ? m->threads * N * N : 0);
}

// Sizes of the batch, the arena, and the maps of kept and masked rows.
static void plan_batch(Model *m, const Batch *b) {
    const Config *c = &m->c;
    int counts[2] = {b->globals, m->train ? b->locals : 0}, sizes[2] = {b->global_size, b->local_size}, row = 0;
    Branch s = {0};
    for (int g = 0; g < 2; g++) {
        int grid = counts[g] ? sizes[g] / (int)c->model_patch : 0;
        m->groups[g] = (Group){counts[g], counts[g] ? sizes[g] : 0, grid, grid * grid, 1 + (int)c->model_registers + grid * grid, row};
        row += counts[g] * m->groups[g].tokens;
        if (m->resize[g].in) resize_free(&m->resize[g]);
        m->resize[g] = (Resize){0};
        if (counts[g] && grid != c->model_pos_grid) m->resize[g] = resize_plan((int)c->model_pos_grid, grid, (int)c->model_interpolate);
        s.kept[g] = b->drop[g][0] ? b->kept[g] : counts[g];
        s.tokens[g] = m->groups[g].tokens;
        s.alpha[g] = s.kept[g] ? (real)counts[g] / s.kept[g] : 1;
        s.sequences += s.kept[g];
        s.rows += s.kept[g] * s.tokens[g];
    }
    for (int i = 0; i < 2 * c->model_depth; i++) m->branches[i] = s;
    m->rows = row;
    m->masked = 0;
    int N = m->groups[0].patches, R = (int)c->model_registers;
    if (m->train && b->mask && c->ibot_weight > 0) for (int i = 0; i < b->globals * N; i++) m->masked += b->mask[i];

    Carver a = {NULL, 0};
    carve(m, &a);
    if (a.used > m->arena_bytes) {
        free(m->arena);
        m->arena = xmalloc(a.used, "activations");
        m->arena_bytes = a.used;
    }
    a = (Carver){m->arena, 0};
    carve(m, &a);

    for (int l = 0; m->train && l < c->model_depth; l++)
        for (int branch = 0; branch < 2; branch++) {
            Branch *k = &m->branches[2 * l + branch];
            for (int g = 0, r = 0; k->map && g < 2; g++)
                for (int i = 0; i < k->kept[g]; i++) {
                    int sequence = b->drop[g][branch] ? b->drop[g][branch][l * k->kept[g] + i] : i;
                    for (int t = 0; t < k->tokens[g]; t++) k->map[r++] = m->groups[g].row + sequence * k->tokens[g] + t;
                }
        }
    for (int crop = 0, j = 0; m->masked && crop < b->globals; crop++) {
        int n = 0;
        for (int i = 0; i < N; i++) n += b->mask[(size_t)crop * N + i];
        for (int i = 0; i < N; i++)
            if (b->mask[(size_t)crop * N + i]) {
                m->masked_row[j] = crop * m->groups[0].tokens + 1 + R + i;
                m->masked_weight[j++] = (real)1 / n;
            }
    }
}

static void copy_row(real *to, const real *from, size_t D) { memcpy(to, from, D * sizeof(real)); }

// Teacher logits and targets. Class tokens of both crops, then masked patches, in one head or two.
static void teacher_step(Model *m, const Batch *b, StepResult *r) {
    size_t D = m->c.model_dim, T = m->groups[0].tokens;
    int crops = b->globals, separate = m->c.ibot_separate_head;
    HeadActs *h = m->teacher_head, *patch_head = separate ? &h[1] : &h[0];
    int patch_row = separate ? 0 : crops;
    teacher_forward(m, m->teacher_out);
    for (int i = 0; i < crops; i++) copy_row(h[0].input[0] + i * D, m->teacher_out + i * T * D, D);
    for (int j = 0; j < m->masked; j++) copy_row(patch_head->input[0] + (patch_row + j) * D, m->teacher_out + m->masked_row[j] * D, D);
    for (int i = 0; i <= separate; i++) {
        HeadShape s = head_shape(m, i);
        head_forward(&h[i], m->teacher + s.offset, &s);
    }
    int K = (int)m->c.dino_prototypes, patch_K = separate ? (int)m->c.ibot_prototypes : K;
    teacher_targets(m, &h[0], 0, crops, K, 0, b->schedule.teacher_temp);
    teacher_targets(m, patch_head, patch_row, m->masked, patch_K, 1, b->schedule.teacher_temp);
    r->prototype_entropy[0] = target_entropy(h[0].logits, m->row_loss, crops, K);
    const real *patch_targets = patch_head->logits + (size_t)patch_row * patch_K;
    r->prototype_entropy[1] = m->masked ? target_entropy(patch_targets, m->row_loss, m->masked, patch_K) : 0;
}

// Spread of the teacher's class tokens over the batch: what collapse would show first.
static void feature_spread(const real *out, size_t stride, int n, int D, double *std, double *rank) {
    double *centered = xmalloc((size_t)n * D * sizeof(double), "feature spread"), sum_std = 0, trace = 0, square = 0;
    for (int d = 0; d < D; d++) {
        double mean = 0, variance = 0;
        for (int i = 0; i < n; i++) mean += out[i * stride + d];
        mean /= n;
        for (int i = 0; i < n; i++) {
            centered[(size_t)i * D + d] = out[i * stride + d] - mean;
            variance += centered[(size_t)i * D + d] * centered[(size_t)i * D + d];
        }
        sum_std += sqrt(variance / n);
        trace += variance;
    }
    for (int i = 0; i < n; i++)
        for (int j = 0; j <= i; j++) {
            double dot = 0;
            for (int d = 0; d < D; d++) dot += centered[(size_t)i * D + d] * centered[(size_t)j * D + d];
            square += (i == j ? 1 : 2) * dot * dot;
        }
    *std = sum_std / D;
    *rank = square > 0 ? trace * trace / square : 0;
    free(centered);
}

// Student heads, every loss and its gradient, down to dnorm, the gradient of the student's final-norm tokens.
static void loss_step(Model *m, const Batch *b, StepResult *r) {
    const Config *c = &m->c;
    size_t D = c->model_dim, T = m->groups[0].tokens, T_local = m->groups[1].tokens, N = m->groups[0].patches;
    int B = b->globals / 2, V = b->locals / B, crops = b->globals, classes = crops + b->locals, separate = c->ibot_separate_head;
    HeadActs *h = m->student_head, *patch_head = separate ? &h[1] : &h[0];
    size_t patch_row = separate ? 0 : classes;
    for (int i = 0; i < crops; i++) copy_row(h[0].input[0] + i * D, m->norm_out + i * T * D, D);
    for (int i = 0; i < b->locals; i++) copy_row(h[0].input[0] + (crops + i) * D, m->norm_out + (m->groups[1].row + i * T_local) * D, D);
    for (int j = 0; j < m->masked; j++) copy_row(patch_head->input[0] + (patch_row + j) * D, m->norm_out + m->masked_row[j] * D, D);
    for (int i = 0; i <= separate; i++) {
        HeadShape s = head_shape(m, i);
        head_forward(&h[i], m->student + s.offset, &s);
    }

    int K = (int)c->dino_prototypes, patch_K = separate ? (int)c->ibot_prototypes : K;
    const real *patch_targets = (separate ? m->teacher_head[1].logits : m->teacher_head[0].logits + (size_t)crops * K);
    r->dino = dino_loss(m, h[0].logits, m->teacher_head[0].logits, B, V, K);
    r->ibot = ibot_loss(m, patch_head->logits + patch_row * patch_K, patch_targets, crops, patch_K);

    memset(m->dnorm, 0, m->rows * D * sizeof(real));
    memset(m->dbottleneck, 0, (size_t)crops * c->dino_bottleneck * sizeof(real));
    for (int crop = 0; crop < 2; crop++) {
        size_t row = (size_t)crop * B * T * D;
        if (c->koleo_weight > 0)
            r->koleo += koleo_loss(m->dnorm + row, m->norm_out + row, T * D, (real)c->koleo_weight, m->head_scratch[0],
                                   m->head_scratch[1], B, (int)D);
        if (c->sigreg_weight > 0) {
            int bottleneck = c->sigreg_on == SIGREG_BOTTLENECK, width = bottleneck ? (int)c->dino_bottleneck : (int)D;
            for (size_t i = 0; i < (size_t)c->sigreg_slices * width; i++) m->directions[i] = b->directions[i];
            size_t stride = bottleneck ? (size_t)width : T * D, from = crop * B * stride;
            r->sigreg += sigreg_loss(m, (bottleneck ? m->dbottleneck : m->dnorm) + from,
                                     (bottleneck ? h[0].pre[c->dino_layers - 1] : m->norm_out) + from, stride, B, width);
        }
    }
    if (c->gram_weight > 0) {
        real scale = (real)(c->gram_weight / ((double)crops * N * N));
        #pragma omp parallel for
        for (int i = 0; i < crops; i++) {
            size_t row = (i * T + 1 + c->model_registers) * D, thread = omp_get_thread_num();
            m->row_loss[i] = gram_loss_image(m->dnorm + row, m->norm_out + row, b->gram_target + i * N * D, scale,
                                             m->gram[0] + thread * 2 * N * D, m->gram[1] + thread * N * N, (int)N, (int)D);
        }
        for (int i = 0; i < crops; i++) r->gram += m->row_loss[i] / ((double)crops * N * N);
    }
    r->loss = c->dino_weight * r->dino + c->ibot_weight * r->ibot + c->koleo_weight * r->koleo + c->sigreg_weight * r->sigreg +
              c->gram_weight * r->gram;

    for (int i = 0; i <= separate; i++) {
        HeadShape s = head_shape(m, i);
        head_backward(&h[i], m->student + s.offset, m->grad + s.offset, &s, m->dbottleneck, i == 0 ? crops : 0, m->head_scratch);
    }
    for (int i = 0; i < classes; i++) {
        real *to = m->dnorm + (i < crops ? i * T : m->groups[1].row + (i - crops) * T_local) * D;
        for (size_t d = 0; d < D; d++) to[d] += h[0].input[0][i * D + d];
    }
    for (int j = 0; j < m->masked; j++)
        for (size_t d = 0; d < D; d++) m->dnorm[m->masked_row[j] * D + d] += patch_head->input[0][(patch_row + j) * D + d];
}

enum { CHUNK = 1 << 16 };   // elements that one thread handles at a time, whatever the number of threads

static double sum_of_squares(const real *x, size_t n) {
    size_t chunks = (n + CHUNK - 1) / CHUNK;
    double *partial = xmalloc(chunks * sizeof(double), "norms"), total = 0;
    #pragma omp parallel for
    for (size_t k = 0; k < chunks; k++) {
        double sum = 0;
        for (size_t i = k * CHUNK; i < n && i < (k + 1) * CHUNK; i++) sum += (double)x[i] * x[i];
        partial[k] = sum;
    }
    for (size_t k = 0; k < chunks; k++) total += partial[k];
    free(partial);
    return total;
}

// Clip per module, AdamW, EMA of the teacher: one pass over the parameters (METHOD F).
static void update_step(Model *m, const Batch *b, StepResult *r) {
    const Config *c = &m->c;
    const Schedule *s = &b->schedule;
    double correction1 = 1 - pow(c->optim_beta1, (double)b->step + 1), correction2 = 1 - pow(c->optim_beta2, (double)b->step + 1);
    real clip[GROUP_COUNT], beta1 = (real)c->optim_beta1, beta2 = (real)c->optim_beta2, momentum = (real)s->momentum;
    for (int g = 0; g < GROUP_COUNT; g++) {
        size_t from = m->table.group_start[g];
        r->gradient_norm[g] = sqrt(sum_of_squares(m->grad + from, m->table.group_start[g + 1] - from));
        clip[g] = (real)(c->optim_clip > 0 ? fmin(1, c->optim_clip / (r->gradient_norm[g] + 1e-6)) : 1);
    }
    for (int t = 0; t < m->table.count; t++) {
        const Tensor *x = &m->table.tensors[t];
        double lr = (x->last_layer ? s->last_layer_lr : s->lr) * x->lr_factor;
        real keep = (real)(1 - lr * (x->decays ? s->weight_decay : 0)), rate = (real)(lr / correction1);
        real root = (real)(1 / sqrt(correction2)), eps = (real)c->optim_eps, scale = clip[x->group];
        #pragma omp parallel for
        for (size_t chunk = 0; chunk < (x->size + CHUNK - 1) / CHUNK; chunk++) {
            size_t from = x->offset + chunk * CHUNK, end = x->offset + x->size, to = from + CHUNK < end ? from + CHUNK : end;
            for (size_t i = from; i < to; i++) {
                real g = m->grad[i] * scale;
                m->exp_avg[i] = beta1 * m->exp_avg[i] + (1 - beta1) * g;
                m->exp_avg_sq[i] = beta2 * m->exp_avg_sq[i] + (1 - beta2) * g * g;
                m->student[i] = m->student[i] * keep - rate * m->exp_avg[i] / ((real)sqrt(m->exp_avg_sq[i]) * root + eps);
                m->teacher[i] = momentum * m->teacher[i] + (1 - momentum) * m->student[i];
            }
        }
    }
}

static void model_begin(Model *m, const Batch *b) {
    StepResult *r = &m->result;
    memset(r, 0, sizeof *r);
    plan_batch(m, b);
    load_pixels(m, b);
    for (int g = 0; g < 2; g++)
        gather_patches(m->patches[g], m->pixels[g], &m->groups[g], (int)m->c.model_channels, (int)m->c.model_patch);
    memset(m->grad, 0, m->table.size * sizeof(real));
    teacher_step(m, b, r);
    student_forward(m, b->mask);
    loss_step(m, b, r);
    student_backward(m, b->mask);
    update_step(m, b, r);
    feature_spread(m->teacher_out, (size_t)m->groups[0].tokens * m->c.model_dim, b->globals, (int)m->c.model_dim,
                   &r->feature_std, &r->feature_rank);
}

static void model_end(Model *m, StepResult *r) { *r = m->result; }

// ---------------------------------------------------------------------------------------------------------------------
// 7. The backend

static const char *model_missing(const Config *c) {
    (void)c;
    return NULL;
}

static Model *model_create(const Config *c, const TensorTable *t, int train) {
    Model *m = xmalloc(sizeof *m, "the model");
    m->c = *c;
    m->table = *t;
    m->train = train;
    m->threads = omp_get_max_threads();
    m->branches = xmalloc((size_t)c->model_depth * 2 * sizeof *m->branches, "the model");
    m->blocks = xmalloc((size_t)c->model_depth * sizeof *m->blocks, "the model");
    real **arrays[] = {&m->teacher, &m->student, &m->grad, &m->exp_avg, &m->exp_avg_sq};
    for (int i = 0; i < (train ? 5 : 1); i++) *arrays[i] = xmalloc(t->size * sizeof(real), "parameters and optimiser state");
    if (train) {
        m->center[0] = xmalloc((size_t)c->dino_prototypes * sizeof(real), "centres");
        m->center[1] = xmalloc((size_t)(c->ibot_separate_head ? c->ibot_prototypes : c->dino_prototypes) * sizeof(real), "centres");
    }
    return m;
}

static void model_destroy(Model *m) {
    real *arrays[] = {m->teacher, m->student, m->grad, m->exp_avg, m->exp_avg_sq, m->center[0], m->center[1]};
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) free(arrays[i]);
    for (int g = 0; g < 2; g++) if (m->resize[g].in) resize_free(&m->resize[g]);
    free(m->branches);
    free(m->blocks);
    free(m->arena);
    free(m);
}

// The array behind a name of curia/backend.h, and its number of elements; NULL where there is none.
static real *model_array(Model *m, const char *name, size_t *n) {
    real *arrays[ARRAY_COUNT] = {m->student, m->teacher, m->grad, m->exp_avg, m->exp_avg_sq, m->center[0], m->center[1]};
    Place p = place_of(&m->c, &m->table, name);
    if (p.array < 0 || !arrays[p.array]) return NULL;
    *n = p.size;
    return arrays[p.array] + p.offset;
}

static void copy_out(const real *from, size_t n, Dtype dtype, void *data, size_t at) {
    for (size_t i = 0; i < n; i++) {
        if (dtype == DTYPE_F64) ((double *)data)[at + i] = from[i];
        else ((float *)data)[at + i] = (float)from[i];
    }
}

static size_t model_read(Model *m, const char *name, Dtype dtype, void *data) {
    size_t n = 0, D = m->c.model_dim, T = m->groups[0].tokens, crops = m->groups[0].count, N = m->groups[0].patches;
    real *array = model_array(m, name, &n);
    if (array && data) copy_out(array, n, dtype, data, 0);
    int patch = !strcmp(name, "out.patch"), teacher = !strcmp(name, "out.teacher_cls");
    if (!patch && !teacher && strcmp(name, "out.cls")) return n;
    size_t each = patch ? N * D : D, skip = patch ? (1 + m->c.model_registers) * D : 0;
    const real *tokens = teacher ? m->teacher_out : m->norm_out;
    for (size_t i = 0; data && i < crops; i++) copy_out(tokens + i * T * D + skip, each, dtype, data, i * each);
    return crops * each;
}

static size_t model_write(Model *m, const char *name, Dtype dtype, const void *data) {
    size_t n = 0;
    real *array = model_array(m, name, &n);
    for (size_t i = 0; data && i < n; i++) array[i] = (real)(dtype == DTYPE_F64 ? ((const double *)data)[i] : ((const float *)data)[i]);
    return n;
}

static void model_encode(Model *m, const Batch *b, float *tokens) {
    plan_batch(m, b);
    load_pixels(m, b);
    gather_patches(m->patches[0], m->pixels[0], &m->groups[0], (int)m->c.model_channels, (int)m->c.model_patch);
    teacher_forward(m, m->teacher_out);
    copy_out(m->teacher_out, (size_t)b->globals * m->groups[0].tokens * m->c.model_dim, DTYPE_F32, tokens, 0);
}

static void model_pixels(Model *m, const Batch *b, float *global_pixels, float *local_pixels) {
    float *out[2] = {global_pixels, local_pixels};
    plan_batch(m, b);
    load_pixels(m, b);
    for (int g = 0; g < 2; g++) {
        const Group *p = &m->groups[g];
        copy_out(m->pixels[g], (size_t)p->count * m->c.model_channels * p->size * p->size, DTYPE_F32, out[g], 0);
    }
}

#ifdef CURIA_FP64
const Backend cpu_backend_fp64 = {
#else
const Backend cpu_backend = {
#endif
    "cpu", 1, model_missing, model_create, model_destroy, model_write, model_read, model_begin, model_end, model_encode, NULL, model_pixels};

// ---------------------------------------------------------------------------------------------------------------------
// 8. main: draw a batch, step, log, checkpoint
#ifndef CURIA_LIBRARY

#include <getopt.h>
#include <signal.h>
#include "curia/checkpoint.h"
#include "curia/cost.h"
#include "curia/device.h"
#include "curia/recipes.h"
#include "curia/views.h"
#include "prep/phantom.h"

#define PHANTOM_DIR "data/phantom"

static const char usage[] =
    "usage: train_curia [options]\n"
    "  --recipe NAME|list     a named set of values (default tiny); list prints them all with their sources\n"
    "  --set KEY=VALUE        one value; may be given many times, the last one counts\n"
    "  --data PATH            a shard, or a folder of shards; may be given many times (default: the phantom, made on first use)\n"
    "  --out DIR              the run's folder (default: the first free of runs/RECIPE, runs/RECIPE-2, ...)\n"
    "  --steps N              stop after step N; the schedules' length is optim.steps\n"
    "  --batch-size N         the same as --set optim.batch_size=N\n"
    "  --seed N               the same as --set run.seed=N\n"
    "  --device auto|cpu|cuda where to run (default auto)\n"
    "  --init DIR             start student and teacher from a Hugging Face Dinov2 folder, a checkpoint or a run\n"
    "  --resume               go on from the newest checkpoint in --out, from the start where there is none\n"
    "  --print-config         print the configuration as JSON and end\n"
    "  --help                 this text and every key\n"
    "keys:\n";

typedef struct {
    const char *recipe, *out, *init, *device, *steps;
    const char *data[256], *sets[256];      // sets: "key=value"
    int data_count, set_count, resume, print_config;
} Options;

static Options parse_options(int argc, char **argv) {
    static const struct option options[] = {
        {"recipe", 1, 0, 'r'}, {"set", 1, 0, 's'}, {"data", 1, 0, 'd'}, {"out", 1, 0, 'o'}, {"steps", 1, 0, 'n'},
        {"batch-size", 1, 0, 'b'}, {"seed", 1, 0, 'e'}, {"device", 1, 0, 'v'}, {"init", 1, 0, 'i'}, {"resume", 0, 0, 'c'},
        {"print-config", 0, 0, 'p'}, {"help", 0, 0, 'h'}, {0}};
    Options o = {.recipe = "tiny", .device = "auto"};
    opterr = 0;
    for (int k; (k = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        if (k == '?') fail(STATUS_USAGE, "%s: unknown option, or its value is missing; --help lists them", argv[optind - 1]);
        if ((k == 'd' && o.data_count == 256) || ((k == 's' || k == 'b' || k == 'e') && o.set_count == 256))
            fail(STATUS_USAGE, "more than 256 --data or --set options");
        if (k == 'r') o.recipe = optarg;
        if (k == 's') o.sets[o.set_count++] = optarg;
        if (k == 'd') o.data[o.data_count++] = optarg;
        if (k == 'o') o.out = optarg;
        if (k == 'n') o.steps = optarg;
        if (k == 'b' || k == 'e') {
            size_t size = strlen(optarg) + 32;
            char *set = xmalloc(size, "options");
            snprintf(set, size, "%s=%s", k == 'b' ? "optim.batch_size" : "run.seed", optarg);
            o.sets[o.set_count++] = set;
        }
        if (k == 'v') o.device = optarg;
        if (k == 'i') o.init = optarg;
        if (k == 'c') o.resume = 1;
        if (k == 'p') o.print_config = 1;
        if (k == 'h') {
            fputs(usage, stdout);
            config_print_help(stdout);
            exit(STATUS_DONE);
        }
    }
    if (optind < argc) fail(STATUS_USAGE, "unexpected argument '%s'; --help lists the options", argv[optind]);
    if (!strcmp(o.recipe, "list")) {
        recipe_list(stdout);
        exit(STATUS_DONE);
    }
    if (o.resume && !o.out) fail(STATUS_USAGE, "--resume needs --out DIR, the folder of the run to go on with");
    return o;
}

// Recipe, then the model of --init, then --set in order. With a checkpoint to go on from, its config is the base, and what
// the command line changes may only be run.* keys: anything else would not be the same run.
static Config make_config(const Options *o, const char *init_dir, const char *checkpoint) {
    Config c = config_default(), saved;
    if (checkpoint) {
        c = saved = checkpoint_config(checkpoint);
    } else {
        recipe_apply(&c, o->recipe);
        if (init_dir) {
            Config folder = config_default();
            hf_read_config(init_dir, &folder);
            for (int i = 0; i < CONFIG_KEY_COUNT; i++) {
                const char *key = config_keys[i].name;
                char value[256];
                config_format(&folder, &config_keys[i], value);
                // how the model is trained on, unlike what it is, stays the recipe's
                if (!strncmp(key, "model.", 6) && strcmp(key, "model.drop_path") && strcmp(key, "model.interpolate") &&
                    strcmp(key, "model.init_std"))
                    config_set(&c, key, value, init_dir);
            }
        }
    }
    for (int i = 0; i < o->set_count; i++) {
        char key[256];
        const char *equals = strchr(o->sets[i], '=');
        if (!equals || equals == o->sets[i] || equals - o->sets[i] > 255) fail(STATUS_USAGE, "--set %s: expected key=value", o->sets[i]);
        snprintf(key, sizeof key, "%.*s", (int)(equals - o->sets[i]), o->sets[i]);
        config_set(&c, key, equals + 1, "--set");
    }
    config_validate(&c, checkpoint ? checkpoint : o->recipe);
    for (int i = 0; checkpoint && i < CONFIG_KEY_COUNT; i++) {
        char now[256], before[256];
        config_format(&c, &config_keys[i], now);
        config_format(&saved, &config_keys[i], before);
        const char *key = config_keys[i].name;
        if (strcmp(now, before) && (strncmp(key, "run.", 4) || !strcmp(key, "run.seed")))
            fail(STATUS_USAGE, "--set %s=%s: the run in %s was made with %s; start a new one with --init %s --out DIR", key, now,
                 checkpoint, before, checkpoint);
    }
    return c;
}

// The phantom, made once into PHANTOM_DIR: under a temporary name first, so that an interrupted run leaves no half of it.
static const char *phantom_data(void) {
    static const char made[] = PHANTOM_DIR "/train", temporary[] = PHANTOM_DIR ".writing";
    if (!file_exists(made)) {
        fprintf(stderr, "no --data given: making the phantom's shards in %s\n", PHANTOM_DIR);
        file_make_dirs("data");
        file_remove_tree(temporary);
        phantom_make_sets(temporary, PHANTOM_SEED, PHANTOM_PATIENTS);
        file_rename(temporary, PHANTOM_DIR);
    }
    return made;
}

static void set_weights(Dataset *data, const Config *c, int paths) {
    double weights[256];
    int n = 0;
    const char *text = c->data_weights;
    if (!*text) return;
    while (n < 256) {
        char *end;
        weights[n] = strtod(text, &end);
        if (end == text || !(weights[n] > 0) || (*end && *end != ','))
            fail(STATUS_USAGE, "data.weights=%s: expected positive numbers separated by commas", c->data_weights);
        n++;
        text = end + 1;
        if (!*end) break;
    }
    if (n != paths) fail(STATUS_USAGE, "data.weights=%s: %d weights for %d --data paths", c->data_weights, n, paths);
    dataset_set_weights(data, weights, n);
}

// Student from the initial values or from --init; the teacher is its copy. Heads are always new.
static void init_weights(const Backend *backend, Model *m, const TensorTable *t, const Config *c, const char *init_dir) {
    if (init_dir) hf_read_weights(backend, m, t, init_dir, "student.");
    for (int i = 0; i < t->count; i++) {
        char student[128], teacher[128];
        snprintf(student, sizeof student, "student.%s", t->tensors[i].name);
        snprintf(teacher, sizeof teacher, "teacher.%s", t->tensors[i].name);
        float *values = xmalloc(t->tensors[i].size * sizeof(float), student);
        if (init_dir && t->tensors[i].group == GROUP_BACKBONE) backend->read(m, student, DTYPE_F32, values);
        else tensor_init(t, i, (uint64_t)c->run_seed, values);
        backend->write(m, student, DTYPE_F32, values);
        backend->write(m, teacher, DTYPE_F32, values);
        free(values);
    }
}

static const char log_header[] =
    "step\tloss\tdino\tibot\tkoleo\tsigreg\tgram\tlr\tweight_decay\tmomentum\tteacher_temp\tgrad_backbone\tgrad_dino_head\t"
    "grad_ibot_head\tentropy_dino\tentropy_ibot\tfeature_std\tfeature_rank\tseconds\n";

// Opens log.tsv for a run that has done `step` steps: rows of later steps, which a stopped run may have written after its
// last checkpoint, are cut off.
static FILE *open_log(const char *out, long long step) {
    char path[PATH_SIZE], temporary[PATH_SIZE];
    path_join(path, out, "log.tsv");
    path_join(temporary, out, "log.tsv.writing");
    FILE *f = file_create(temporary);
    fputs(log_header, f);
    if (step > 0 && file_exists(path)) {
        size_t bytes;
        char *text = file_read(path, &bytes), *save = NULL;
        for (char *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save))
            if (line[0] >= '0' && line[0] <= '9' && atoll(line) <= step) fprintf(f, "%s\n", line);
        free(text);
    }
    file_close(f, temporary);
    file_rename(temporary, path);
    f = fopen(path, "ab");
    if (!f) fail(STATUS_FAILED, "%s: cannot open it: %s", path, strerror(errno));
    return f;
}

// A row of log.tsv.
static void log_step(FILE *log, const Schedule *s, const StepResult *r, long long step, double seconds) {
    double values[] = {r->loss, r->dino, r->ibot, r->koleo, r->sigreg, r->gram, s->lr, s->weight_decay, s->momentum, s->teacher_temp,
                       r->gradient_norm[GROUP_BACKBONE], r->gradient_norm[GROUP_DINO_HEAD], r->gradient_norm[GROUP_IBOT_HEAD],
                       r->prototype_entropy[0], r->prototype_entropy[1], r->feature_std, r->feature_rank};
    fprintf(log, "%lld", step);
    for (size_t i = 0; i < sizeof values / sizeof *values; i++) fprintf(log, "\t%.8g", values[i]);
    fprintf(log, "\t%.4g\n", seconds);
    if (fflush(log)) fail(STATUS_FAILED, "log.tsv: cannot write it: %s", strerror(errno));
}

// One line a step for people: over the last one on a terminal, every five seconds elsewhere.
// peak: operations per second, 0: not known; least: seconds that an image takes at the least (METHOD G.3).
static void show_step(const Config *c, const Schedule *s, const StepResult *r, long long step, long long last, double seconds_per_step,
                      double peak, double least) {
    static double shown;
    int live = isatty(2);
    double left = seconds_per_step * (last - step), now = seconds_now();
    if (!live && now - shown < 5 && step < last) return;
    shown = now;
    fprintf(stderr, "%sstep %lld/%lld | loss %.4f dino %.3f ibot %.3f", live ? "\r\033[K" : "", step, last, r->loss, r->dino, r->ibot);
    if (c->koleo_weight > 0) fprintf(stderr, " koleo %.3f", r->koleo);
    if (c->sigreg_weight > 0) fprintf(stderr, " sigreg %.4f", r->sigreg);
    double images = c->optim_batch_size / seconds_per_step;
    fprintf(stderr, " | lr %.2e | grad %.2f | entropy %.2f | std %.3f rank %.1f | %.1f img/s", s->lr, r->gradient_norm[GROUP_BACKBONE],
            r->prototype_entropy[0], r->feature_std, r->feature_rank, images);
    if (peak > 0) {
        Cost cost = step_cost(c);
        fprintf(stderr, ", MFU %.1f %%, floor %.1f %%", 100 * images * (cost.products + cost.attention) / peak, 100 * images * least);
    }
    fprintf(stderr, " | %d:%02d left%s", (int)left / 60, (int)left % 60, live && step < last ? "" : "\n");
}

static int saves_after(const Config *c, long long step) { return c->run_save_every && step % c->run_save_every == 0; }

static volatile sig_atomic_t stop_requested;
static void request_stop(int signal) { stop_requested = signal; }

int main(int argc, char **argv) {
    Options o = parse_options(argc, argv);
    char out_buffer[512], checkpoint_path[PATH_SIZE], init_path[PATH_SIZE], config_path[PATH_SIZE];
    const char *checkpoint = NULL, *init_dir = NULL;
    if (!o.out) {
        snprintf(out_buffer, sizeof out_buffer, "runs/%s", o.recipe);
        for (int i = 2; file_exists(out_buffer); i++) snprintf(out_buffer, sizeof out_buffer, "runs/%s-%d", o.recipe, i);
        o.out = out_buffer;
    }
    if (checkpoint_newest(o.out, checkpoint_path)) checkpoint = checkpoint_path;
    path_join(config_path, o.out, "config.json");
    if (!o.resume && !o.print_config && (checkpoint || file_exists(config_path)))
        fail(STATUS_USAGE, "--out %s holds a run already; go on with it by --resume, or give another folder", o.out);
    if (!o.resume) checkpoint = NULL;
    if (o.init && !checkpoint) {
        checkpoint_teacher(o.init, init_path);
        init_dir = init_path;
    }
    Config c = make_config(&o, init_dir, checkpoint);
    if (o.print_config) {
        config_write_json(&c, stdout);
        return STATUS_DONE;
    }
    long long last = c.optim_steps;
    if (o.steps) {
        char *end;
        last = strtoll(o.steps, &end, 10);
        if (*end || end == o.steps || last < 1) fail(STATUS_USAGE, "--steps %s: expected a number of steps from 1", o.steps);
        if (last > c.optim_steps) last = c.optim_steps;
    }
    if (c.gram_weight > 0)
        fail(STATUS_USAGE, "gram.weight=%g: training has no Gram teacher yet; the loss takes targets from golden files only", c.gram_weight);

    const char *why;
    const Backend *backend = device_choose(o.device, &c, &why);
    if (!hf_ratio(&c))
        warn("model.ffn_hidden=%lld is no whole mlp_ratio of transformers: it will not load the checkpoints' teacher/", c.model_ffn_hidden);
    if (!o.data_count) o.data[o.data_count++] = phantom_data();
    Dataset *data = dataset_open(o.data, o.data_count);
    set_weights(data, &c, o.data_count);
    TensorTable table = tensors_build(&c, 1);
    Model *model = backend->create(&c, &table, 1);
    RunState state = {0, 0, dataset_identity(data)};
    if (checkpoint) {
        uint64_t identity = state.data_identity;
        state = checkpoint_load(backend, model, &table, checkpoint);
        if (state.data_identity != identity) fail(STATUS_DATA, "--data: these are not the shards that the run in %s was made with", o.out);
    } else {
        init_weights(backend, model, &table, &c, init_dir);
    }
    file_make_dirs(o.out);
    checkpoint_begin(o.out);
    char temporary[PATH_SIZE];
    FILE *f = file_create(path_join(temporary, o.out, "config.json.writing"));
    config_write_json(&c, f);
    file_close(f, temporary);
    file_rename(temporary, config_path);
    FILE *log = open_log(o.out, state.step);

    config_print(&c, stderr);
    fprintf(stderr, "device %s (%s), %d thread%s; %.2f M parameters; %llu slices; run in %s\n", backend->name, why,
            omp_get_max_threads(), omp_get_max_threads() == 1 ? "" : "s", table.size / 1e6, (unsigned long long)dataset_count(data), o.out);
    if (checkpoint) fprintf(stderr, "resumed after step %lld\n", state.step);

    double peak = 0, bandwidth = 0, least = 0;
    if (backend->peaks) {
        Cost cost = step_cost(&c);
        backend->peaks(model, &peak, &bandwidth);
        least = serial_floor(&cost, peak, bandwidth, (double)c.optim_batch_size);
        fprintf(stderr, "this device: %.1f TFLOP/s in a large product, %.2f TB/s in a copy; a step takes %.1f GFLOP an image, so at most "
                "%.0f img/s\n", peak / 1e12, bandwidth / 1e12, (cost.products + cost.attention) / 1e9, 1 / least);
    }

    struct sigaction action = {.sa_handler = request_stop};
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    Sampler sampler = {(uint64_t)c.run_seed, state.sampler_next};
    StepInput input = input_create(&c);
    Prefetch *prefetch = prefetch_start(data);
    input_indices(&input, data, &sampler);
    prefetch_request(prefetch, input.indices, input.batch.samples);
    Schedule schedules[2];
    double begin = seconds_now(), ended = begin, waited = 0;
    long long first = state.step, begun = first;
    while (state.step < begun || (begun < last && !stop_requested)) {
        // A step begins before the last one ends where the backend can, so that a device never waits for its host; not so after a
        // step that a checkpoint follows.
        while (begun < last && !stop_requested && begun - state.step < backend->ahead && (begun == state.step || !saves_after(&c, begun))) {
            // This step's slices are on their way; the next step's follow while it computes.
            double asked = seconds_now();
            prefetch_wait(prefetch);
            if (begun == state.step) waited += seconds_now() - asked;
            input_draw(&input, &c, data, begun);
            sampler.next += (uint64_t)c.optim_batch_size;
            input_indices(&input, data, &sampler);
            prefetch_request(prefetch, input.indices, input.batch.samples);
            schedules[begun % 2] = input.batch.schedule;
            backend->begin(model, &input.batch);
            begun++;
        }
        StepResult r;
        const Schedule *schedule = &schedules[state.step % 2];
        backend->end(model, &r);
        double now = seconds_now(), taken = now - ended;
        ended = now;
        state.step++;
        state.sampler_next = sampler.next;
        if (!isfinite(r.loss))
            fail(STATUS_FAILED, "step %lld: the loss is %g; lower optim.lr (%g) or optim.clip (%g) and start again with --init %s",
                 state.step, r.loss, c.optim_lr, c.optim_clip, o.out);
        log_step(log, schedule, &r, state.step, taken);
        show_step(&c, schedule, &r, state.step, last, (now - begin) / (state.step - first), peak, least);
        if (state.step == begun && (stop_requested || state.step == last || saves_after(&c, state.step)))
            checkpoint_save(backend, model, &table, &c, o.out, &state);
    }
    prefetch_wait(prefetch);
    prefetch_stop(prefetch);
    if (fclose(log)) fail(STATUS_FAILED, "%s/log.tsv: cannot write it: %s", o.out, strerror(errno));
    fprintf(stderr, "%s after step %lld; peak memory %.0f MiB; waited for data %.1f %% of the time; run in %s\n",
            stop_requested ? "stopped" : "done", state.step, peak_memory() / 1048576.0, 100 * waited / (ended - begin + 1e-9), o.out);
    input_free(&input);
    backend->destroy(model);
    dataset_close(data);
    free(table.tensors);
    return STATUS_DONE;
}
#endif
