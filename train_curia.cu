/*
The CUDA backend of curia.c: the step of train_curia.c, fused, on one GPU.

The same functions in the same order as the CPU backend, which is the specification; what differs:

  number types     bf16 activations and effective weights, fp32 masters, residual stream, losses and optimiser; prototype
                   logits in fp16. With -DCURIA_FP32 everything is float: the checker's build.
  weights          norms' scale and shift, LayerScale and weight norm are folded into the weights (curia/cuda/weights.cuh)
  rows             a branch computes the rows that drop path keeps, and the last block only what a loss sees (METHOD G.3)
  memory           one arena, planned before the first step; a second stream brings the next batch while a step runs

Read in this order: curia/cuda/common.cuh, matmul.cuh, weights.cuh, norm.cuh, embed.cuh, attention.cuh, losses.cuh, pixels.cuh,
this.

  1. the model       parameters, effective weights, activations
  2. a batch         what the host decided, packed and sent
  3. the backbone    forward and backward
  4. heads, losses
  5. the step and the backend's functions
*/
#include "curia/backend.h"
#include "curia/resize.h"
#include "curia/rng.h"
#include "curia/cuda/attention.cuh"
#include "curia/cuda/embed.cuh"
#include "curia/cuda/losses.cuh"
#include "curia/cuda/norm.cuh"
#include "curia/cuda/pixels.cuh"
#include "curia/cuda/weights.cuh"

// ---------------------------------------------------------------------------------------------------------------------
// 1. The model

enum { QKV, PROJECTION, FFN_IN, FFN_OUT, BLOCK_MATRICES };      // the matrices of a block, in this order

// One branch of one block: `rows` are normalised, `queries` of them get an output; fewer in the last block's attention.
typedef struct {
    int rows, queries;
    Rows norm, residual;
    const int *query_row;           // [queries] the normalised row of each, where queries < rows
} Branch;

// One pass through the backbone. Group 0: global crops, 1: local crops.
typedef struct {
    Tokens groups[2];
    int rows, kept[2];              // packed rows; sequences that a branch keeps
    int sequence_rows;              // rows of the kept sequences
    Branch *branches;               // [depth][2]: attention, feed-forward
    const Sequence *sequences, *last_sequences;     // [kept[0] + kept[1]]
    int norm_rows, head_rows;       // rows of the final norm; the first are the heads' input, the rest the Gram loss's
    const int *norm_row;            // [norm_rows] their packed rows
    const int *norm_index;          // [2, rows] the norm rows of each packed row, or -1
} Pass;

// What a block's backward needs.
typedef struct {
    floatX *hat1, *qkv, *attention, *hat2, *pre, *act;      // [rows, D | 3D | D | D | F or 2F | F]
    float *rstd1, *lse, *rstd2;                             // [rows] [rows,H] [rows]
    float *x;                                               // [packed rows, D], where the block is recomputed
} BlockActs;

typedef struct { int dim, hidden, layers, bottleneck, prototypes, ld, first_matrix; } HeadShape;     // ld: logits a row

// What one pass of a head keeps. Layer i maps input[i] to pre[i]; the activation of pre[i] is input[i+1]; the last layer gives y.
typedef struct {
    int rows;
    floatX *input[8], *pre[8];
    float *y, *norm;                // [rows,b] [rows]
    logitX *unit, *logits;          // [rows,b] [rows,ld]; after the losses the logits' gradient
    float *shift, *row_lse;         // teacher: targets are softmax(logits / temp + shift), METHOD C.1
} HeadActs;

typedef struct { char *base; size_t used; } Carver;

// The results of a step as the device writes them.
typedef struct { float dino, ibot, koleo[2], sigreg[2], gram, norm[GROUP_COUNT], entropy[2], spread[2]; } Results;

// What begin() packs and sends: buffers on both sides, and where its parts lie on the device.
typedef struct {
    char *host, *device;
    size_t capacity, used;
    char **overflow;                // what did not fit
    int overflow_count;
    Pass student, teacher;
    const StepValues *values;
    const uint8_t *mask;
    const float *row_weight, *directions, *gram_target, *pixels[2];
    DeviceSlice *slices;
    const DeviceView *views[2];
    int slice_count, most_height[2], most_width[2], masked;
    Taps taps[2];
    cudaEvent_t sent, done;
    Results *results;               // pinned
} Slot;

struct Model {
    Config c;
    TensorTable table;
    int train;
    MatmulState matmul;
    cudaStream_t stream, copy;
    char *parameters, *arena;
    size_t parameter_bytes, arena_bytes;
    float *student, *teacher, *grad, *exp_avg, *exp_avg_sq, *center[2];
    Effective *student_weights, *teacher_weights;
    Matrix *matrices, *host_matrices;       // blocks' in the order of the enum, patch embedding, heads
    Vectors *vectors;
    int matrix_count, matrix_rows, vector_count, stale;         // stale: masters were written, the effective weights not yet
    long long longest_vector;
    Slot slots[2];
    long long begun, ended;                 // steps

    float *pixel_scratch;                   // grows with the largest crop met
    size_t pixel_scratch_size;

    // Carved from the arena for a batch shape.
    float *position[2], *dposition[2], *dtoken, *dmask, *pixels, *x, *dx;
    floatX *patches, *f, *df, *dhat, *dhat_more, *query_hat, *dqkv, *dact, *act;
    BlockActs *blocks;                                          // [depth]
    float *delta;                                               // attention's backward: [rows,H]
    float *norm_out[2], *norm_hat[2], *norm_rstd[2], *dnorm;    // student, teacher
    HeadActs heads[2][2];                                       // [student, teacher][DINO, iBOT]
    floatX *dhead[2];
    float *row_loss[2], *dz, *dbottleneck, *projection, *slope, *gram_unit[2], *gram_similarity[2], *gram_inverse;
    float *scratch, *clip;
    int *nearest;
    double *norm_parts;
    Results *results;
};

static const float *param(const Model *m, const float *base, const char *name) {
    int i = tensors_find(&m->table, name);
    return i < 0 ? NULL : base + m->table.tensors[i].offset;
}

static HeadShape head_shape(const Model *m, int ibot) {
    const Config *c = &m->c;
    int blocks = BLOCK_MATRICES * (int)c->model_depth + 1;
    HeadShape h = {(int)c->model_dim, (int)c->dino_hidden, (int)c->dino_layers, (int)c->dino_bottleneck, (int)c->dino_prototypes, 0,
                   blocks};
    if (ibot)
        h = {(int)c->model_dim, (int)c->ibot_hidden, (int)c->ibot_layers, (int)c->ibot_bottleneck, (int)c->ibot_prototypes, 0,
             blocks + (int)c->dino_layers + 1};
    h.ld = (h.prototypes + 7) / 8 * 8;
    return h;
}

static int head_in(const HeadShape *h, int layer) { return layer ? h->hidden : h->dim; }
static int head_out(const HeadShape *h, int layer) { return layer + 1 < h->layers ? h->hidden : h->bottleneck; }
static int most(int a, int b) { return a > b ? a : b; }

// Adds the matrix whose weight is tensor `name`, of `rows` rows in all; the offsets of what is folded in, or NULL.
static void add_matrix(Model *m, int rows, const char *name, const char *bias, const char *in, const char *shift, const char *out,
                       size_t *effective) {
    Matrix *x = &m->host_matrices[m->matrix_count++];
    const TensorTable *t = &m->table;
    const Tensor *weight = &t->tensors[tensors_find(t, name)];
    const char *names[] = {bias, in, shift, out};
    long long *offsets[] = {&x->bias, &x->in, &x->shift, &x->out};
    for (int i = 0; i < 4; i++) *offsets[i] = names[i] ? (long long)t->tensors[tensors_find(t, names[i])].offset : -1;
    x->weight = (long long)weight->offset;
    x->rows = rows;
    x->cols = (int)(weight->size / (size_t)weight->shape[0]);
    x->prototypes = strstr(name, "weight_v") != NULL;
    x->rule = {weight->lr_factor, weight->decays, weight->last_layer, weight->group};
    x->first_row = m->matrix_rows;
    m->matrix_rows += rows;
    x->effective = (long long)*effective;
    *effective += ((size_t)rows * x->cols + 7) / 8 * 8;
    x->effective_bias = (long long)*effective;
    *effective += bias ? (rows + 7) / 8 * 8 : 0;
}

// The matrices, and as vectors every tensor that is none of them. Returns the number of effective elements.
static size_t list_matrices(Model *m) {
    const Config *c = &m->c;
    int D = (int)c->model_dim, F = (int)c->model_ffn_hidden, swiglu = c->model_ffn == FFN_SWIGLU;
    const char *parts[] = {"attention.attention.query.weight", "attention.attention.query.bias", "norm1.weight", "norm1.bias",
                           "attention.output.dense.weight", "attention.output.dense.bias", "layer_scale1.lambda1",
                           swiglu ? "mlp.weights_in.weight" : "mlp.fc1.weight", swiglu ? "mlp.weights_in.bias" : "mlp.fc1.bias",
                           "norm2.weight", "norm2.bias", swiglu ? "mlp.weights_out.weight" : "mlp.fc2.weight",
                           swiglu ? "mlp.weights_out.bias" : "mlp.fc2.bias", "layer_scale2.lambda1"};
    enum { PARTS = sizeof parts / sizeof *parts };
    int heads = m->train ? 1 + c->ibot_separate_head : 0, capacity = BLOCK_MATRICES * (int)c->model_depth + 1 + heads * 9;
    m->host_matrices = (Matrix *)xmalloc(capacity * sizeof(Matrix), "the model");
    size_t effective = 0;
    for (int l = 0; l < c->model_depth; l++) {
        char name[PARTS][96];
        for (int i = 0; i < PARTS; i++) snprintf(name[i], sizeof name[i], "encoder.layer.%d.%s", l, parts[i]);
        add_matrix(m, 3 * D, name[0], name[1], name[2], name[3], NULL, &effective);
        add_matrix(m, D, name[4], name[5], NULL, NULL, name[6], &effective);
        add_matrix(m, swiglu ? 2 * F : F, name[7], name[8], name[9], name[10], NULL, &effective);
        add_matrix(m, D, name[11], name[12], NULL, NULL, name[13], &effective);
    }
    add_matrix(m, D, "embeddings.patch_embeddings.projection.weight", "embeddings.patch_embeddings.projection.bias", NULL, NULL, NULL,
               &effective);
    for (int i = 0; i < heads; i++) {
        HeadShape h = head_shape(m, i);
        const char *head = i ? "ibot_head" : "dino_head";
        char weight[96], bias[96], index[16] = "";
        for (int l = 0; l < h.layers; l++) {
            if (h.layers > 1) snprintf(index, sizeof index, ".%d", 2 * l);
            snprintf(weight, sizeof weight, "%s.mlp%s.weight", head, index);
            snprintf(bias, sizeof bias, "%s.mlp%s.bias", head, index);
            add_matrix(m, head_out(&h, l), weight, bias, NULL, NULL, NULL, &effective);
        }
        snprintf(weight, sizeof weight, "%s.last_layer.weight_v", head);
        snprintf(bias, sizeof bias, "%s.last_layer.weight_g", head);
        add_matrix(m, h.prototypes, weight, NULL, NULL, NULL, bias, &effective);
    }
    return effective;
}

static Vectors *list_vectors(Model *m) {
    Vectors *v = (Vectors *)xmalloc(m->table.count * sizeof *v, "the model");
    for (int i = 0; i < m->table.count; i++) {
        const Tensor *t = &m->table.tensors[i];
        int inside = 0;
        for (int k = 0; k < m->matrix_count; k++) {
            const Matrix *x = &m->host_matrices[k];
            inside |= (long long)t->offset >= x->weight && (long long)t->offset < x->weight + (long long)x->rows * x->cols;
        }
        if (inside) continue;
        v[m->vector_count++] = {(long long)t->offset, (long long)t->size, {t->lr_factor, t->decays, t->last_layer, t->group}};
        if ((long long)t->size > m->longest_vector) m->longest_vector = (long long)t->size;
    }
    return v;
}

static const Matrix *block_matrix(const Model *m, int block, int which) {
    return &m->host_matrices[BLOCK_MATRICES * block + which];
}
static const Matrix *patch_matrix(const Model *m) { return &m->host_matrices[BLOCK_MATRICES * m->c.model_depth]; }
static const floatX *weight_of(const Effective *w, const Matrix *x) { return (const floatX *)w + x->effective; }
static const floatX *bias_of(const Effective *w, const Matrix *x) { return (const floatX *)w + x->effective_bias; }

// Under the emulator a gap follows each array, for the address sanitizer to watch.
template <class T> static void take(Carver *a, T *&pointer, size_t count) {
    size_t bytes = count * sizeof(T), next = a->used + ((bytes + 255) & ~(size_t)255);
    pointer = (T *)(a->base ? a->base + a->used : NULL);
#ifdef CURIA_EMULATOR
    next += 256;
    if (a->base) emu_gap(a->base + a->used + bytes, next - a->used - bytes);
#endif
    a->used = next;
}
#define TAKE(pointer, count) take(a, pointer, (size_t)(count))

// Bytes of the arena by use, for the table that create() prints.
typedef struct { size_t activations, blocks, logits, workspace; } Memory;

static void carve_head(HeadActs *a_head, const HeadShape *s, int rows, int teacher, Carver *a) {
    a_head->rows = rows;
    for (int i = 0; i < s->layers; i++) {
        TAKE(a_head->input[i], (size_t)rows * head_in(s, i));
        TAKE(a_head->pre[i], i + 1 < s->layers ? (size_t)rows * s->hidden : 0);
    }
    TAKE(a_head->y, (size_t)rows * s->bottleneck);
    TAKE(a_head->norm, rows);
    TAKE(a_head->unit, (size_t)rows * s->bottleneck);
    TAKE(a_head->row_lse, teacher ? rows : 0);
    TAKE(a_head->shift, teacher ? 2 * s->ld : 0);               // class tokens, patches
    TAKE(a_head->logits, (size_t)rows * s->ld);
}

// Gives every activation its place, for passes of these sizes. With a->base NULL it only adds up the bytes. The last block has
// the room of the others, so that the places depend on the batch's shape alone and not on where its masks lie.
static Memory carve(Model *m, Carver *a, const Pass *student, const Pass *teacher, int masked) {
    const Config *c = &m->c;
    Memory memory = {};
    size_t D = c->model_dim, H = c->model_heads, F = c->model_ffn_hidden, in = c->model_ffn == FFN_SWIGLU ? 2 * F : F;
    const Pass *passes[2] = {student, teacher}, *widest = m->train ? student : teacher;
    size_t rows = widest->rows, kept = m->train ? student->sequence_rows : 0, patch_rows = 0, pixels = 0;
    size_t everything = kept > (size_t)teacher->rows ? kept : teacher->rows;
    for (int g = 0; g < 2; g++) {
        const Tokens *t = &widest->groups[g];
        size_t images = (size_t)t->count * t->size * t->size * c->model_channels;
        patch_rows += (size_t)t->count * t->patches;
        if (images > pixels) pixels = images;
        TAKE(m->position[g], (1 + (size_t)t->patches) * D);
    }
    TAKE(m->pixels, pixels);
    TAKE(m->patches, patch_rows * c->model_channels * c->model_patch * c->model_patch);
    TAKE(m->x, rows * D);
    TAKE(m->f, (everything > patch_rows ? everything : patch_rows) * D);        // also the embedded patches
    TAKE(m->query_hat, everything * D);
    TAKE(m->act, m->train && c->run_recompute == RECOMPUTE_NONE ? 0 : everything * F);
    for (int i = 0; i < 2; i++) {
        if (i == 0 && !m->train) continue;
        TAKE(m->norm_out[i], (size_t)passes[i]->norm_rows * D);
        TAKE(m->norm_hat[i], (size_t)passes[i]->norm_rows * D);
        TAKE(m->norm_rstd[i], passes[i]->norm_rows);
    }
    memory.activations = a->used;
    int blocks = m->train && c->run_recompute != RECOMPUTE_BLOCK ? (int)c->model_depth : 1;
    for (int l = 0; l < c->model_depth; l++) {
        BlockActs *k = &m->blocks[l];
        if (l >= blocks) {
            *k = m->blocks[0];
        } else {
            size_t n = l == 0 ? everything : kept;      // the teacher's pass uses block 0
            TAKE(k->hat1, n * D);
            TAKE(k->rstd1, n);
            TAKE(k->qkv, n * 3 * D);
            TAKE(k->attention, n * D);
            TAKE(k->lse, n * H);
            TAKE(k->hat2, n * D);
            TAKE(k->rstd2, n);
            TAKE(k->pre, n * in);
            k->act = m->act;
            if (m->train && c->run_recompute == RECOMPUTE_NONE) TAKE(k->act, n * F);
        }
        k->x = NULL;
        if (m->train && c->run_recompute == RECOMPUTE_BLOCK) TAKE(k->x, rows * D);
    }
    memory.blocks = a->used - memory.activations;
    if (!m->train) return memory;

    size_t before = a->used, patches = student->groups[0].patches, B = student->groups[0].count / 2;
    TAKE(m->dx, rows * D);
    TAKE(m->df, everything * D);
    TAKE(m->dhat, (everything > patch_rows ? everything : patch_rows) * D);     // also the embedded patches' gradient
    TAKE(m->dhat_more, everything * D);
    TAKE(m->dqkv, everything * 3 * D);
    TAKE(m->dact, everything * F);
    TAKE(m->delta, kept * H);
    TAKE(m->dnorm, (size_t)student->norm_rows * D);
    for (int g = 0; g < 2; g++) TAKE(m->dposition[g], (1 + (size_t)student->groups[g].patches) * D);
    TAKE(m->dtoken, (size_t)(1 + c->model_registers) * D);
    TAKE(m->dmask, patches * D);
    memory.activations += a->used - before;

    before = a->used;
    size_t widest_layer = 3 * D > in ? 3 * D : in, scratch = GRAM_BLOCKS, head_size = 0, dz_size = 0;
    for (int i = 0; i <= c->ibot_separate_head; i++) {
        HeadShape s = head_shape(m, i);
        int classes = student->groups[0].count + student->groups[1].count, targets = student->groups[0].count;
        int extra = i == 1 || !c->ibot_separate_head ? masked : 0, own = i == 0;
        carve_head(&m->heads[0][i], &s, own * classes + extra, 0, a);
        carve_head(&m->heads[1][i], &s, own * targets + extra, 1, a);
        for (int l = 0; l < s.layers; l++) if ((size_t)head_out(&s, l) > widest_layer) widest_layer = head_out(&s, l);
        if (target_scratch(s.ld) > scratch) scratch = target_scratch(s.ld);
        size_t rows = own * classes + extra, width = s.hidden > (int)D ? s.hidden : D;
        if (rows * width > head_size) head_size = rows * width;
        if (rows * s.bottleneck > dz_size) dz_size = rows * s.bottleneck;
        TAKE(m->row_loss[i], rows);
    }
    for (int i = 0; i < 2; i++) TAKE(m->dhead[i], head_size);
    TAKE(m->dz, dz_size);
    memory.logits = a->used - before;

    before = a->used;
    TAKE(m->dbottleneck, 2 * B * c->dino_bottleneck);
    TAKE(m->projection, c->sigreg_weight > 0 ? B * c->sigreg_slices : 0);
    TAKE(m->slope, c->sigreg_weight > 0 ? B * c->sigreg_slices : 0);
    TAKE(m->nearest, c->koleo_weight > 0 ? B : 0);
    size_t gram = c->gram_weight > 0 ? 2 * B * patches : 0;
    for (int i = 0; i < 2; i++) TAKE(m->gram_unit[i], gram * D);
    for (int i = 0; i < 2; i++) TAKE(m->gram_similarity[i], gram * patches);
    TAKE(m->gram_inverse, gram);
    size_t needs[] = {2 * COLUMN_CHUNKS * widest_layer, koleo_scratch((int)B, (int)D), spread_scratch((int)(2 * B), (int)D),
                      (size_t)c->sigreg_slices};
    for (int i = 0; i < 4; i++) if (needs[i] > scratch) scratch = needs[i];
    TAKE(m->scratch, scratch);
    TAKE(m->norm_parts, m->table.size / NORM_CHUNK + GROUP_COUNT + 1);
    TAKE(m->clip, GROUP_COUNT);
    TAKE(m->results, 1);
    memory.workspace = a->used - before;
    return memory;
}

// ---------------------------------------------------------------------------------------------------------------------
// 2. A batch: sizes of the two passes, and what the host decided, packed into one buffer and sent at once

// The sizes of a pass; where its rows lie is for pack_pass.
static void size_pass(const Model *m, Pass *p, const Batch *b, int student, int masked) {
    const Config *c = &m->c;
    int counts[2] = {b->globals, student ? b->locals : 0}, sizes[2] = {b->global_size, b->local_size}, patch_row = 0;
    p->rows = p->sequence_rows = 0;
    for (int g = 0; g < 2; g++) {
        int grid = counts[g] ? sizes[g] / (int)c->model_patch : 0;
        p->groups[g] = {counts[g], counts[g] ? sizes[g] : 0, grid, grid * grid, 1 + (int)c->model_registers + grid * grid,
                        p->rows, patch_row};
        p->rows += counts[g] * p->groups[g].tokens;
        patch_row += counts[g] * p->groups[g].patches;
        p->kept[g] = student && b->drop[g][0] ? b->kept[g] : counts[g];
        p->sequence_rows += p->kept[g] * p->groups[g].tokens;
    }
    int patches = b->globals * p->groups[0].patches, tokens = b->globals * p->groups[0].tokens;
    p->head_rows = m->train ? counts[0] + counts[1] + masked : 0;
    p->norm_rows = p->head_rows + (!m->train ? tokens : student && (b->all_tokens || c->gram_weight > 0) ? patches : 0);
}

// Room for `count` elements in the slot: where the host writes them, and through `device` where the kernels find them. Once the
// buffers are too small the rest goes into memory of its own, and the caller packs again into larger ones.
template <class T> static T *put(Slot *s, size_t count, const T **device) {
    size_t bytes = (count * sizeof(T) + 255) & ~(size_t)255, at = s->used;
    s->used += bytes;
    *device = (const T *)(s->device + at);
    if (s->used <= s->capacity) return (T *)(s->host + at);
    s->overflow = (char **)realloc(s->overflow, (s->overflow_count + 1) * sizeof *s->overflow);
    if (!s->overflow) fail(STATUS_FAILED, "out of memory: a batch");
    return (T *)(s->overflow[s->overflow_count++] = (char *)xmalloc(bytes, "a batch"));
}

// The branch's rows: those of the kept sequences, in their order. keep NULL: all. `used` (NULL: all) marks the packed rows whose
// output is wanted: of the feed-forward only these are computed, of the attention these are the queries.
static void pack_branch(Slot *s, const Pass *p, Branch *branch, const int *const keep[2], const uint8_t *used, int attention) {
    int every = !keep[0] && !keep[1], *map = NULL, *queries = NULL, *query_row = NULL;
    const int *map_at = NULL, *queries_at = NULL, *query_row_at = NULL;
    if (!every || used) map = put(s, p->rows, &map_at);
    if (used && attention) {
        queries = put(s, p->rows, &queries_at);
        query_row = put(s, p->sequence_rows, &query_row_at);
    }
    *branch = {0, 0, {map_at, {1, 1}, p->groups[1].row}, {attention && used ? queries_at : map_at, {1, 1}, p->groups[1].row},
               query_row_at};
    for (int r = 0; map && r < p->rows; r++) map[r] = -1;
    for (int r = 0; queries && r < p->rows; r++) queries[r] = -1;
    for (int g = 0; g < 2; g++) {
        const Tokens *t = &p->groups[g];
        int kept = keep[g] ? p->kept[g] : t->count;
        if (kept) branch->residual.alpha[g] = (float)t->count / kept;
        for (int i = 0; i < kept; i++)
            for (int k = 0; k < t->tokens; k++) {
                int r = t->row + (keep[g] ? keep[g][i] : i) * t->tokens + k, wanted = !used || used[r];
                if (!attention && !wanted) continue;
                if (map) map[r] = branch->rows;
                if (queries && wanted) {
                    query_row[branch->queries] = branch->rows;
                    queries[r] = branch->queries;
                }
                branch->queries += wanted;
                branch->rows++;
            }
    }
}

// Sequences of the kept rows of attention; used as in pack_branch.
static const Sequence *pack_sequences(Slot *s, const Pass *p, const int *const keep[2], const uint8_t *used) {
    const Sequence *at;
    Sequence *to = put(s, p->kept[0] + p->kept[1], &at);
    int q = 0, kv = 0;
    for (int g = 0; g < 2; g++)
        for (int i = 0; i < p->kept[g]; i++) {
            const Tokens *t = &p->groups[g];
            int row = t->row + (keep[g] ? keep[g][i] : i) * t->tokens, queries = 0;
            for (int k = 0; k < t->tokens; k++) queries += !used || used[row + k];
            *to++ = {q, queries, kv, t->tokens};
            q += queries;
            kv += t->tokens;
        }
    return at;
}

// Every map of one pass. Norm rows: class tokens, masked patches, and where asked for all global patches, or, for encode(), all
// tokens.
static void pack_pass(Model *m, Slot *s, Pass *p, const Batch *b, int student) {
    const Config *c = &m->c;
    const Tokens *global = &p->groups[0];
    int depth = (int)c->model_depth, R = (int)c->model_registers, n = 0, all = !m->train || p->norm_rows > p->head_rows;
    int *row = put(s, p->norm_rows, &p->norm_row), *index = put(s, 2 * (size_t)p->rows, &p->norm_index);
    uint8_t *used = (uint8_t *)xmalloc(p->rows, "a batch");
    for (int g = 0; m->train && g < 2; g++)
        for (int i = 0; i < p->groups[g].count; i++) row[n++] = p->groups[g].row + i * p->groups[g].tokens;
    for (int i = 0; m->train && b->mask && c->ibot_weight > 0 && i < b->globals * global->patches; i++)
        if (b->mask[i]) row[n++] = i / global->patches * global->tokens + 1 + R + i % global->patches;
    for (int i = 0; all && i < global->count * global->tokens; i++)
        if (!m->train || i % global->tokens > R) row[n++] = i;
    for (int i = 0; i < 2 * p->rows; i++) index[i] = -1;
    int gradient_rows = c->gram_weight > 0 ? p->norm_rows : p->head_rows;
    for (int i = 0; i < gradient_rows; i++) index[(i >= p->head_rows) * p->rows + row[i]] = i;
    for (int i = 0; i < p->norm_rows; i++) used[row[i]] = 1;
    for (int l = 0; l < depth; l++) {
        int last = l == depth - 1;
        const int *keep[2][2] = {};
        for (int branch = 0; branch < 2; branch++) {
            for (int g = 0; student && g < 2; g++)
                if (b->drop[g][branch]) keep[branch][g] = b->drop[g][branch] + l * b->kept[g];
            pack_branch(s, p, &p->branches[2 * l + branch], keep[branch], last && !all ? used : NULL, branch == 0);
        }
        if (l == 0) p->sequences = pack_sequences(s, p, keep[0], NULL);
        if (last) p->last_sequences = pack_sequences(s, p, keep[0], all ? NULL : used);
    }
    free(used);
}

static Taps pack_taps(Slot *s, int in, int out, int mode) {
    if (in == out) return {};
    Resize r = resize_plan(in, out, mode);
    Taps t = {in, out, r.taps, NULL, NULL};
    memcpy(put(s, out, &t.first), r.first, out * sizeof(int));
    memcpy(put(s, (size_t)out * r.taps, &t.weight), r.weight, (size_t)out * r.taps * sizeof(float));
    resize_free(&r);
    return t;
}

static void pack_slices(Model *m, Slot *s, const Batch *b) {
    const DeviceSlice *at;
    DeviceSlice *slices = put(s, b->samples, &at);
    s->slices = (DeviceSlice *)at;
    s->slice_count = b->samples;
    for (int i = 0; i < b->samples; i++) {
        const Slice *x = &b->slices[i];
        const int16_t *pixels;
        memcpy(put(s, (size_t)x->rows * x->cols, &pixels), x->pixels, (size_t)x->rows * x->cols * sizeof(int16_t));
        slices[i] = {pixels, x->rows, x->cols, x->scale, x->intercept, x->volume_mean, x->volume_std};
    }
    for (int g = 0, i = 0; g < 2; g++) {
        int count = g ? m->train ? b->locals : 0 : b->globals;
        DeviceView *views = put(s, count, &s->views[g]);
        s->most_height[g] = s->most_width[g] = 0;
        for (int k = 0; k < count; k++, i++) {
            const View *v = &b->views[i];
            views[k] = {v->sample, v->top, v->left, v->height, v->width, v->flip, (float)v->gamma, (float)v->contrast,
                        (float)v->brightness, (float)v->blur_sigma};
            s->most_height[g] = most(s->most_height[g], v->height);
            s->most_width[g] = most(s->most_width[g], v->width);
        }
    }
}

static void pack_floats(Slot *s, const float **device, const float *values, size_t n) {
    float *to = put(s, n, device);
    if (n) memcpy(to, values, n * sizeof(float));
}

// All of a batch.
static void pack_batch(Model *m, Slot *s, const Batch *b) {
    const Config *c = &m->c;
    int N = s->teacher.groups[0].patches;
    s->used = 0;
    if (m->train) {
        StepValues *v = put(s, 1, &s->values);
        const Schedule *now = &b->schedule;
        *v = {now->lr, now->last_layer_lr, now->weight_decay, now->momentum, 1 - pow(c->optim_beta1, (double)b->step + 1),
              1 - pow(c->optim_beta2, (double)b->step + 1), (float)now->teacher_temp};
        pack_pass(m, s, &s->student, b, 1);
        float *weight = put(s, s->masked, &s->row_weight);
        for (int crop = 0, j = 0; s->masked && crop < b->globals; crop++) {
            int count = 0;
            for (int i = 0; i < N; i++) count += b->mask[(size_t)crop * N + i] != 0;
            for (int i = 0; i < count; i++) weight[j++] = 1.0f / count;
        }
        if (c->sigreg_weight > 0)
            pack_floats(s, &s->directions, b->directions,
                        c->sigreg_slices * (c->sigreg_on == SIGREG_CLS ? c->model_dim : c->dino_bottleneck));
        if (c->gram_weight > 0) pack_floats(s, &s->gram_target, b->gram_target, (size_t)b->globals * N * c->model_dim);
        s->mask = NULL;
        if (b->mask) memcpy(put(s, (size_t)b->globals * N, &s->mask), b->mask, (size_t)b->globals * N);
    }
    pack_pass(m, s, &s->teacher, b, 0);
    const Pass *widest = m->train ? &s->student : &s->teacher;
    for (int g = 0; g < 2; g++)
        if (widest->groups[g].count)
            s->taps[g] = pack_taps(s, (int)c->model_pos_grid, widest->groups[g].grid, (int)c->model_interpolate);
    s->slices = NULL;
    if (b->slices) {
        pack_slices(m, s, b);
        return;
    }
    const float *given[2] = {b->global_pixels, b->local_pixels};
    for (int g = 0; g < 2; g++) {
        const Tokens *t = &widest->groups[g];
        pack_floats(s, &s->pixels[g], given[g], (size_t)t->count * c->model_channels * t->size * t->size);
    }
}

static void slot_free(Slot *s) {
    if (s->host) CUDA_CHECK(cudaFreeHost(s->host));
    if (s->device) CUDA_CHECK(cudaFree(s->device));
    s->host = s->device = NULL;
}

// Masked patches of a batch, 0 where no loss sees them.
static int count_masked(const Model *m, const Batch *b) {
    int masked = 0, N = b->global_size / (int)m->c.model_patch;
    for (int i = 0; m->train && b->mask && m->c.ibot_weight > 0 && i < b->globals * N * N; i++) masked += b->mask[i] != 0;
    return masked;
}

// Sizes, arena and the slot's contents, on their way to the device.
static void load_batch(Model *m, Slot *s, const Batch *b) {
    s->masked = count_masked(m, b);
    size_pass(m, &s->teacher, b, 0, s->masked);
    if (m->train) size_pass(m, &s->student, b, 1, s->masked);
    Carver a = {NULL, 0};
    carve(m, &a, &s->student, &s->teacher, s->masked);
    if (a.used > m->arena_bytes) {
        CUDA_CHECK(cudaDeviceSynchronize());
        if (m->arena) CUDA_CHECK(cudaFree(m->arena));
        CUDA_CHECK(cudaMalloc(&m->arena, a.used));
        m->arena_bytes = a.used;
    }
#ifdef CURIA_EMULATOR
    emu_clear_gaps(m->arena, m->arena_bytes);
#endif
    a = {m->arena, 0};
    carve(m, &a, &s->student, &s->teacher, s->masked);
    pack_batch(m, s, b);
    if (s->used > s->capacity) {
        for (int i = 0; i < s->overflow_count; i++) free(s->overflow[i]);
        s->overflow_count = 0;
        slot_free(s);
        s->capacity = s->used + s->used / 4;
        CUDA_CHECK(cudaMallocHost(&s->host, s->capacity));
        CUDA_CHECK(cudaMalloc(&s->device, s->capacity));
        pack_batch(m, s, b);
    }
    CUDA_CHECK(cudaMemcpyAsync(s->device, s->host, s->used, cudaMemcpyHostToDevice, m->copy));
    CUDA_CHECK(cudaEventRecord(s->sent, m->copy));
    CUDA_CHECK(cudaStreamWaitEvent(m->stream, s->sent, 0));
}

// ---------------------------------------------------------------------------------------------------------------------
// 3. The backbone

// Normalised pixels of a group: [count, channels, size, size]; returns them and whether channels is 1 (views) or C (given).
static const float *group_pixels(Model *m, Slot *s, const Tokens *t, int g, int *channels) {
    const Config *c = &m->c;
    *channels = s->slices ? 1 : (int)c->model_channels;
    if (!s->slices) return s->pixels[g];
    size_t need = pixels_scratch(t->count, t->size, s->most_height[g], s->most_width[g]);
    if (need > m->pixel_scratch_size) {
        CUDA_CHECK(cudaDeviceSynchronize());
        if (m->pixel_scratch) CUDA_CHECK(cudaFree(m->pixel_scratch));
        CUDA_CHECK(cudaMalloc(&m->pixel_scratch, need));
        m->pixel_scratch_size = need;
    }
    if (g == 0 && c->data_normalize == NORMALIZE_SLICE)
        slice_statistics(s->slices, s->slice_count, c->data_clip_below_air, m->stream);
    render_views(m->pixels, m->pixel_scratch, s->slices, s->views[g], t->count, t->size, c->data_clip_below_air,
                 (int)c->data_normalize, s->most_height[g], s->most_width[g], m->stream);
    return m->pixels;
}

static void load_patches(Model *m, Slot *s, const Pass *p) {
    const Config *c = &m->c;
    size_t depth = c->model_channels * c->model_patch * c->model_patch;
    for (int g = 0; g < 2; g++) {
        const Tokens *t = &p->groups[g];
        if (!t->count) continue;
        int channels;
        const float *pixels = group_pixels(m, s, t, g, &channels);
        gather_patches(m->patches + t->patch_row * depth, pixels, t->count, channels, (int)c->model_channels, t->size,
                       (int)c->model_patch, m->stream);
    }
}

// The packed rows x of a pass: patch embedding, tokens, positions.
static void embed(Model *m, const Slot *s, const Pass *p, const float *master, const Effective *w, const uint8_t *mask) {
    const Config *c = &m->c;
    const Matrix *patch = patch_matrix(m);
    int D = (int)c->model_dim, patches = p->groups[0].count * p->groups[0].patches + p->groups[1].count * p->groups[1].patches;
    linear_forward(&m->matmul, m->f, m->patches, weight_of(w, patch), bias_of(w, patch), patches, patch->cols, D, m->stream);
    for (int g = 0; g < 2; g++) {
        if (!p->groups[g].count) continue;
        position_forward(m->position[g], param(m, master, "embeddings.position_embeddings"), s->taps[g], p->groups[g].patches, D,
                         m->stream);
        embed_forward(m->x, m->f, m->position[g], param(m, master, "embeddings.cls_token"), param(m, master, "embeddings.mask_token"),
                      param(m, master, "embeddings.register_tokens"), g ? NULL : mask, p->groups[g], (int)c->model_registers, D, m->stream);
    }
}

// to[i] = from[row[i]], D elements each
static __global__ void gather_rows_kernel(floatX *to, const floatX *from, const int *row, int D) {
    for (int d = 4 * threadIdx.x; d < D; d += 4 * blockDim.x)
        store4(to + (size_t)blockIdx.x * D + d, load4(from + (size_t)row[blockIdx.x] * D + d));
}

// Queries, keys and values of a branch within the packed qkv buffer: [rows,3D], or where the queries are fewer than the rows
// keys and values [rows,2D] first and then queries [queries,D].
typedef struct { floatX *q, *k, *v; int q_stride, kv_stride; } Qkv;
static Qkv qkv_of(floatX *qkv, const Branch *b, size_t D) {
    if (b->queries == b->rows) return {qkv, qkv + D, qkv + 2 * D, (int)(3 * D), (int)(3 * D)};
    return {qkv + b->rows * 2 * D, qkv, qkv + D, (int)D, (int)(2 * D)};
}

static const Sequence *sequences_of(const Pass *p, const Branch *b) {
    return b->queries == b->rows ? p->sequences : p->last_sequences;
}

// A block: x holds its input but for the residual `f` of the branch `before` (NULL: none). Leaves the residual of its
// feed-forward in m->f.
static void block_forward(Model *m, const Pass *p, int l, const Effective *w, const BlockActs *a, const Branch *before) {
    const Config *c = &m->c;
    int D = (int)c->model_dim, H = (int)c->model_heads, F = (int)c->model_ffn_hidden, swiglu = c->model_ffn == FFN_SWIGLU;
    const Branch *attention = &p->branches[2 * l], *ffn = attention + 1;
    const Matrix *qkv = block_matrix(m, l, QKV), *proj = qkv + PROJECTION, *in = qkv + FFN_IN, *out = qkv + FFN_OUT;
    MatmulState *mm = &m->matmul;
    cudaStream_t stream = m->stream;
    residual_norm_forward(m->x, before ? m->f : NULL, before ? before->residual : Rows{}, a->hat1, a->rstd1, attention->norm,
                          p->rows, D, stream);
    if (a->x) CUDA_CHECK(cudaMemcpyAsync(a->x, m->x, (size_t)p->rows * D * sizeof(float), cudaMemcpyDeviceToDevice, stream));
    const floatX *qkv_w = weight_of(w, qkv), *qkv_b = bias_of(w, qkv);
    Qkv x = qkv_of(a->qkv, attention, D);
    if (attention->queries == attention->rows) {
        linear_forward(mm, a->qkv, a->hat1, qkv_w, qkv_b, attention->rows, D, 3 * D, stream);
    } else {
        gather_rows_kernel<<<attention->queries, 128, 0, stream>>>(m->query_hat, a->hat1, attention->query_row, D);
        launched("gather_rows_kernel");
        linear_forward(mm, x.q, m->query_hat, qkv_w, qkv_b, attention->queries, D, D, stream);
        linear_forward(mm, x.k, a->hat1, qkv_w + (size_t)D * D, qkv_b + D, attention->rows, D, 2 * D, stream);
    }
    const Sequence *sequences = sequences_of(p, attention);
    for (int g = 0; g < 2; g++)
        if (p->kept[g])
            attention_forward(a->attention, D, a->lse, x.q, x.q_stride, x.k, x.v, x.kv_stride, sequences + (g ? p->kept[0] : 0),
                              p->kept[g], p->groups[g].tokens, p->groups[g].tokens, H, stream);
    linear_forward(mm, m->f, a->attention, weight_of(w, proj), bias_of(w, proj), attention->queries, D, D, stream);
    residual_norm_forward(m->x, m->f, attention->residual, a->hat2, a->rstd2, ffn->norm, p->rows, D, stream);
    linear_forward(mm, a->pre, a->hat2, weight_of(w, in), bias_of(w, in), ffn->rows, D, in->rows, stream);
    activation_forward(a->act, a->pre, ffn->rows, F, swiglu, stream);
    linear_forward(mm, m->f, a->act, weight_of(w, out), bias_of(w, out), ffn->rows, F, D, stream);
}

// dx through a block; m->df holds the gradient of its feed-forward's residual, and on return that of the branch `before`'s.
static void block_backward(Model *m, const Pass *p, int l, const BlockActs *a, const Branch *before) {
    const Config *c = &m->c;
    int D = (int)c->model_dim, H = (int)c->model_heads, F = (int)c->model_ffn_hidden, swiglu = c->model_ffn == FFN_SWIGLU;
    const Branch *attention = &p->branches[2 * l], *ffn = attention + 1;
    const Matrix *qkv = block_matrix(m, l, QKV), *proj = qkv + PROJECTION, *in = qkv + FFN_IN, *out = qkv + FFN_OUT;
    const Effective *w = m->student_weights;
    MatmulState *mm = &m->matmul;
    cudaStream_t stream = m->stream;
    float *g = m->grad;
    if (c->run_recompute == RECOMPUTE_ACTIVATIONS) activation_forward(a->act, a->pre, ffn->rows, F, swiglu, stream);
    linear_backward(mm, m->dact, g + out->weight, g + out->bias, m->df, a->act, weight_of(w, out), ffn->rows, F, D, m->scratch,
                    stream);
    activation_backward(a->pre, m->dact, ffn->rows, F, swiglu, stream);
    linear_backward(mm, m->dhat, g + in->weight, g + in->bias, a->pre, a->hat2, weight_of(w, in), ffn->rows, D, in->rows,
                    m->scratch, stream);
    residual_norm_backward(m->dx, m->dhat, a->hat2, a->rstd2, ffn->norm, NULL, Rows{}, m->df, attention->residual, p->rows, D,
                           stream);

    linear_backward(mm, m->dhat, g + proj->weight, g + proj->bias, m->df, a->attention, weight_of(w, proj), attention->queries,
                    D, D, m->scratch, stream);
    const Sequence *sequences = sequences_of(p, attention);
    Qkv x = qkv_of(a->qkv, attention, D), d = qkv_of(m->dqkv, attention, D);
    for (int i = 0; i < 2; i++)
        if (p->kept[i])
            attention_backward(d.q, d.k, d.v, m->dhat, a->attention, D, a->lse, x.q, x.q_stride, x.k, x.v, x.kv_stride, m->delta,
                               sequences + (i ? p->kept[0] : 0), p->kept[i], p->groups[i].tokens, p->groups[i].tokens, H, stream);
    float *dw = g + qkv->weight, *db = g + qkv->bias;
    const floatX *qkv_w = weight_of(w, qkv);
    int split = attention->queries != attention->rows;
    if (!split) {
        linear_backward(mm, m->dhat, dw, db, m->dqkv, a->hat1, qkv_w, attention->rows, D, 3 * D, m->scratch, stream);
    } else {
        gather_rows_kernel<<<attention->queries, 128, 0, stream>>>(m->query_hat, a->hat1, attention->query_row, D);
        launched("gather_rows_kernel");
        linear_backward(mm, m->dhat_more, dw, db, d.q, m->query_hat, qkv_w, attention->queries, D, D, m->scratch, stream);
        linear_backward(mm, m->dhat, dw + (size_t)D * D, db + D, d.k, a->hat1, qkv_w + (size_t)D * D, attention->rows, D, 2 * D,
                        m->scratch, stream);
    }
    residual_norm_backward(m->dx, m->dhat, a->hat1, a->rstd1, attention->norm, split ? m->dhat_more : NULL, attention->residual,
                           before ? m->df : NULL, before ? before->residual : Rows{}, p->rows, D, stream);
}

// A whole pass: packed rows to the final norm's rows. which: 0 student, 1 teacher.
static void backbone_forward(Model *m, const Slot *s, int which) {
    const Pass *p = which ? &s->teacher : &s->student;
    const float *master = which ? m->teacher : m->student;
    const Effective *w = which ? m->teacher_weights : m->student_weights;
    int D = (int)m->c.model_dim, depth = (int)m->c.model_depth;
    embed(m, s, p, master, w, which ? NULL : s->mask);
    for (int l = 0; l < depth; l++) {
        BlockActs a = m->blocks[which ? 0 : l];
        if (which) a.x = NULL;
        block_forward(m, p, l, w, &a, l ? &p->branches[2 * l - 1] : NULL);
    }
    residual_norm_forward(m->x, m->f, p->branches[2 * depth - 1].residual, NULL, NULL, Rows{}, p->rows, D, m->stream);
    const float *gamma = param(m, master, "layernorm.weight"), *beta = param(m, master, "layernorm.bias");
    const HeadActs *head = m->heads[which];
    int classes = p->groups[0].count + p->groups[1].count, separate = m->train && m->c.ibot_separate_head;
    int parts[4] = {0, separate ? classes : p->head_rows, p->head_rows, p->norm_rows};
    for (int i = 0; i < 3; i++) {           // the heads' rows also go to the heads
        size_t from = parts[i], count = parts[i + 1] - from;
        final_norm_forward(m->norm_out[which] + from * D, i < 2 && m->train ? head[i].input[0] : NULL,
                           m->norm_hat[which] + from * D,
                           m->norm_rstd[which] + from, m->x, p->norm_row + from, gamma, beta, (int)count,
                           i < 2 && m->train ? (int)count : 0, D, m->stream);
    }
}

// From dnorm to every backbone parameter's gradient, in effective form.
static void backbone_backward(Model *m, const Slot *s) {
    const Config *c = &m->c;
    const Pass *p = &s->student;
    int D = (int)c->model_dim, R = (int)c->model_registers, depth = (int)c->model_depth;
    int rows = c->gram_weight > 0 ? p->norm_rows : p->head_rows;
    float *dgamma = m->grad + (param(m, m->student, "layernorm.weight") - m->student), *dbeta = dgamma + D;
    column_products(dgamma, m->dnorm, m->norm_hat[0], rows, D, m->scratch, m->stream);
    column_sums(dbeta, m->dnorm, rows, D, m->scratch, m->stream);
    final_norm_backward(m->dx, m->dnorm, m->norm_hat[0], m->norm_rstd[0], p->norm_index, param(m, m->student, "layernorm.weight"), m->df,
                        p->branches[2 * depth - 1].residual, p->rows, D, m->stream);
    for (int l = depth - 1; l >= 0; l--) {
        const BlockActs *a = &m->blocks[l];
        if (a->x && l < depth - 1) {        // the last block's activations are still there
            BlockActs again = *a;
            CUDA_CHECK(cudaMemcpyAsync(m->x, a->x, (size_t)p->rows * D * sizeof(float), cudaMemcpyDeviceToDevice, m->stream));
            again.x = NULL;
            block_forward(m, p, l, m->student_weights, &again, NULL);
        }
        block_backward(m, p, l, a, l ? &p->branches[2 * l - 1] : NULL);
    }
    float *dtable = m->grad + (param(m, m->student, "embeddings.position_embeddings") - m->student);
    for (int g = 0; g < 2; g++) {
        if (!p->groups[g].count) continue;
        embed_backward(m->dtoken, m->dposition[g], m->dmask, m->dhat, m->dx, g ? NULL : s->mask, p->groups[g], R, D, g,
                       m->stream);
        position_backward(dtable, m->dposition[g], s->taps[g], (int)(c->model_pos_grid * c->model_pos_grid), D, g, m->stream);
    }
    float *dcls = m->grad + (param(m, m->student, "embeddings.cls_token") - m->student);
    float *dmask = m->grad + (param(m, m->student, "embeddings.mask_token") - m->student);
    CUDA_CHECK(cudaMemcpyAsync(dcls, m->dtoken, D * sizeof(float), cudaMemcpyDeviceToDevice, m->stream));
    if (R)
        CUDA_CHECK(cudaMemcpyAsync(m->grad + (param(m, m->student, "embeddings.register_tokens") - m->student), m->dtoken + D,
                                   (size_t)R * D * sizeof(float), cudaMemcpyDeviceToDevice, m->stream));
    if (s->mask) column_sums(dmask, m->dmask, p->groups[0].patches, D, m->scratch, m->stream);
    else CUDA_CHECK(cudaMemsetAsync(dmask, 0, D * sizeof(float), m->stream));
    const Matrix *patch = patch_matrix(m);
    int patches = p->groups[0].count * p->groups[0].patches + p->groups[1].count * p->groups[1].patches;
    linear_backward(&m->matmul, NULL, m->grad + patch->weight, m->grad + patch->bias, m->dhat, m->patches, NULL, patches,
                    patch->cols, D, m->scratch, m->stream);
}

// ---------------------------------------------------------------------------------------------------------------------
// 4. Heads and losses (METHOD B, C)

static const logitX *prototypes_of(const Model *m, const Effective *w, const HeadShape *h) {
    return w + m->host_matrices[h->first_matrix + h->layers].effective;
}

// logits[rows,ld] from input[0].
static void head_forward(Model *m, HeadActs *a, const Effective *w, const HeadShape *h) {
    MatmulState *mm = &m->matmul;
    for (int i = 0; i < h->layers; i++) {
        const Matrix *x = &m->host_matrices[h->first_matrix + i];
        int in = head_in(h, i), out = head_out(h, i);
        if (i + 1 == h->layers) {
            linear_forward(mm, a->y, a->input[i], weight_of(w, x), bias_of(w, x), a->rows, in, out, m->stream);
        } else {
            linear_forward(mm, a->pre[i], a->input[i], weight_of(w, x), bias_of(w, x), a->rows, in, out, m->stream);
            activation_forward(a->input[i + 1], a->pre[i], a->rows, out, 0, m->stream);
        }
    }
    unit_forward(a->unit, a->norm, a->y, a->rows, h->bottleneck, h->bottleneck, m->stream);
    Matmul p = {};
    p.m = a->rows, p.n = h->prototypes, p.k = h->bottleneck, p.lda = p.ldb = h->bottleneck, p.ldc = h->ld, p.b_transposed = 1;
    matmul(mm, p, a->logits, a->unit, prototypes_of(m, w, h), 1, NULL, NULL, m->stream);
}

// dx[i] += dhead[i]: the heads' gradient joins that of the losses on the final norm's rows.
static __global__ void add_rows_kernel(float *dx, const floatX *dhead, size_t n) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (i >= n) return;
    float4 a = load4(dx + i), b = load4(dhead + i);
    store4(dx + i, make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w));
}

// From the logits' gradient (over `scale`) and dbottleneck of the first `crops` rows to the head's parameters and, added, to
// dnorm[rows,D].
static void head_backward(Model *m, HeadActs *a, const HeadShape *h, float *dnorm, float scale, int crops, floatX *dhead[2]) {
    MatmulState *mm = &m->matmul;
    const Effective *w = m->student_weights;
    const Matrix *last = &m->host_matrices[h->first_matrix + h->layers];
    int rows = a->rows, K = h->prototypes, b = h->bottleneck;
    Matmul p = {};
    p.m = rows, p.n = b, p.k = K, p.lda = h->ld, p.ldb = b, p.ldc = b;
    matmul(mm, p, m->dz, a->logits, prototypes_of(m, w, h), scale, NULL, NULL, m->stream);
    p = {};
    p.m = K, p.n = b, p.k = rows, p.lda = h->ld, p.ldb = b, p.ldc = b, p.a_transposed = 1;
    matmul(mm, p, m->grad + last->weight, a->logits, a->unit, scale, NULL, NULL, m->stream);
    floatX *dy = dhead[0], *next = dhead[1];
    unit_backward(dy, m->dz, a->y, a->norm, m->dbottleneck, crops, rows, b, b, m->stream);
    for (int i = h->layers - 1; i >= 0; i--) {
        const Matrix *x = &m->host_matrices[h->first_matrix + i];
        linear_backward(mm, next, m->grad + x->weight, m->grad + x->bias, dy, a->input[i], weight_of(w, x), rows, head_in(h, i),
                        head_out(h, i), m->scratch, m->stream);
        if (i == 0) break;
        activation_backward(a->pre[i - 1], next, rows, head_in(h, i), 0, m->stream);
        dy = a->pre[i - 1];
    }
    size_t n = (size_t)rows * h->dim;
    if (!n) return;
    add_rows_kernel<<<divide_up(n, 4 * 256), 256, 0, m->stream>>>(dnorm, next, n);
    launched("add_rows_kernel");
}

// Where the patches' logits stand: a head of their own, or the rows after the class tokens.
typedef struct { HeadActs *head; HeadShape shape; int row, ibot; } PatchHead;
static PatchHead patch_head(Model *m, int which, int classes) {
    int separate = m->c.ibot_separate_head;
    return {&m->heads[which][separate], head_shape(m, separate), separate ? 0 : classes, separate};
}

// Teacher logits to targets in log-scaling form: shift[K] and row_lse[rows].
static void targets(Model *m, const Slot *s, HeadActs *t, const HeadShape *h, int ibot, int row, int rows, float *shift) {
    logitX *logits = t->logits + (size_t)row * h->ld;
    const float *temp = &s->values->teacher_temp;
    if (m->c.teacher_centering == CENTERING_SINKHORN)
        sinkhorn(shift, t->row_lse + row, logits, rows, h->prototypes, h->ld, temp, m->scratch, m->stream);
    else
        softmax_centering(shift, t->row_lse + row, m->center[ibot], logits, rows, h->prototypes, h->ld, temp, m->scratch,
                          m->stream);
    target_entropy(&m->results->entropy[ibot], logits, shift, t->row_lse + row, rows, h->prototypes, h->ld, temp, m->scratch,
                   m->stream);
}

static void teacher_step(Model *m, const Slot *s) {
    int crops = s->teacher.groups[0].count;
    backbone_forward(m, s, 1);
    for (int i = 0; i <= m->c.ibot_separate_head; i++) {
        HeadShape h = head_shape(m, i);
        head_forward(m, &m->heads[1][i], m->teacher_weights, &h);
    }
    HeadShape dino = head_shape(m, 0);
    PatchHead patch = patch_head(m, 1, crops);
    targets(m, s, &m->heads[1][0], &dino, 0, 0, crops, m->heads[1][0].shift);
    targets(m, s, patch.head, &patch.shape, 1, patch.row, s->masked, patch.head->shift + patch.shape.ld);
    feature_spread(m->results->spread, m->norm_out[1], m->c.model_dim, crops, (int)m->c.model_dim, m->scratch, m->stream);
}

// SIGReg of n rows z[n, Dz], and the gradient into dz. METHOD C.5
static void sigreg_step(Model *m, const Slot *s, float *loss, float *dz, const float *z, int n, int Dz) {
    const Config *c = &m->c;
    int M = (int)c->sigreg_slices;
    Matmul p = {};
    p.m = n, p.n = M, p.k = Dz, p.lda = p.ldb = Dz, p.ldc = M, p.b_transposed = 1;
    matmul(&m->matmul, p, m->projection, z, s->directions, 1, NULL, NULL, m->stream);
    SigregGrid grid = sigreg_grid(c->sigreg_t_min, c->sigreg_t_max, (int)c->sigreg_knots);
    sigreg(loss, m->slope, m->projection, n, M, &grid, c->sigreg_scale_by_n ? n : 1, c->sigreg_weight, m->scratch, m->stream);
    p = {};
    p.m = n, p.n = Dz, p.k = M, p.lda = M, p.ldb = p.ldc = Dz;
    matmul(&m->matmul, p, dz, m->slope, s->directions, 1, NULL, NULL, m->stream);
}

// Gram anchoring of the global patches against the batch's targets: [0] theirs, [1] ours. METHOD C.6
static void gram_step(Model *m, const Slot *s) {
    const Config *c = &m->c;
    const Tokens *t = &s->student.groups[0];
    int N = t->patches, D = (int)c->model_dim, images = t->count;
    const float *x = m->norm_out[0] + (size_t)s->student.head_rows * D;
    float *dx = m->dnorm + (size_t)s->student.head_rows * D;
    for (int i = 0; i < 2; i++) {
        gram_normalize(m->gram_unit[i], m->gram_inverse, i ? x : s->gram_target, (size_t)N * D, images, N, D, m->stream);
        Matmul p = {};
        p.m = p.n = N, p.k = D, p.lda = p.ldb = D, p.ldc = N, p.b_transposed = 1, p.batch = images;
        p.stride_a = p.stride_b = (long long)N * D, p.stride_c = (long long)N * N;
        matmul(&m->matmul, p, m->gram_similarity[i], m->gram_unit[i], m->gram_unit[i], 1, NULL, NULL, m->stream);
    }
    double entries = (double)images * N * N;
    gram_difference(&m->results->gram, m->gram_similarity[1], m->gram_similarity[0], images, N, (float)(1 / entries), m->scratch,
                    m->stream);
    Matmul p = {};
    p.m = N, p.n = D, p.k = N, p.lda = N, p.ldb = p.ldc = D, p.batch = images;
    p.stride_a = (long long)N * N, p.stride_b = p.stride_c = (long long)N * D;
    matmul(&m->matmul, p, m->gram_unit[0], m->gram_similarity[1], m->gram_unit[1], 1, NULL, NULL, m->stream);
    gram_backward(dx, (size_t)N * D, m->gram_unit[0], m->gram_unit[1], m->gram_inverse, (float)(c->gram_weight / entries),
                  images, N, D, m->stream);
}

// Student heads, every loss and its gradient, down to dnorm.
static void loss_step(Model *m, const Slot *s) {
    const Config *c = &m->c;
    const Pass *p = &s->student;
    int crops = p->groups[0].count, classes = crops + p->groups[1].count, B = crops / 2, V = p->groups[1].count / B,
    D = (int)c->model_dim;
    HeadActs *dino = &m->heads[0][0], *teacher = &m->heads[1][0];
    PatchHead patch = patch_head(m, 0, classes), patch_teacher = patch_head(m, 1, crops);
    for (int i = 0; i <= c->ibot_separate_head; i++) {
        HeadShape h = head_shape(m, i);
        head_forward(m, &m->heads[0][i], m->student_weights, &h);
    }

    // Both losses' logit gradients are kept as fp16 in units of 1 / gain: what 1 / K is times that is no subnormal.
    HeadShape h = head_shape(m, 0);
    const float *temp = &s->values->teacher_temp;
    float student_temp = (float)c->student_temp, gain = 4096 / (float)fmax(1, fmax(c->dino_weight, c->ibot_weight));
    float scale = 1 / (B * student_temp * gain);
    dino_cross_entropy(dino->logits, m->row_loss[0], dino->logits, teacher->logits, teacher->shift, teacher->row_lse, B, V,
                       h.prototypes, h.ld, student_temp, temp, (float)(c->dino_weight / (2 * V + 2)) * gain, m->stream);
    sum_rows(&m->results->dino, m->row_loss[0], classes, 1.0f / ((2 * V + 2) * B), m->stream);
    h = patch.shape;
    logitX *logits = patch.head->logits + (size_t)patch.row * h.ld;
    const logitX *target = patch_teacher.head->logits + (size_t)patch_teacher.row * h.ld;
    float *row_loss = m->row_loss[patch.ibot] + patch.row;
    ibot_cross_entropy(logits, row_loss, logits, target, patch_teacher.head->shift + h.ld,
                       patch_teacher.head->row_lse + patch_teacher.row, s->row_weight, (float)(0.5 * c->ibot_weight), s->masked,
                       h.prototypes, h.ld, student_temp, temp, gain, m->stream);
    sum_rows(&m->results->ibot, row_loss, s->masked, 1.0f / crops, m->stream);

    CUDA_CHECK(cudaMemsetAsync(m->dnorm, 0, (size_t)p->norm_rows * D * sizeof(float), m->stream));
    int bottleneck = c->sigreg_on == SIGREG_BOTTLENECK;
    if (c->sigreg_weight == 0 || !bottleneck)
        CUDA_CHECK(cudaMemsetAsync(m->dbottleneck, 0, (size_t)crops * c->dino_bottleneck * sizeof(float), m->stream));
    for (int crop = 0; crop < 2; crop++) {
        size_t width = bottleneck ? c->dino_bottleneck : D, from = (size_t)crop * B * width, row = (size_t)crop * B * D;
        if (c->sigreg_weight > 0)
            sigreg_step(m, s, &m->results->sigreg[crop], (bottleneck ? m->dbottleneck : m->dnorm) + from,
                        (bottleneck ? dino->y : m->norm_out[0]) + from, B, (int)width);
        if (c->koleo_weight > 0)
            koleo(&m->results->koleo[crop], m->dnorm + row, D, m->nearest, m->norm_out[0] + row, D, (float)c->koleo_weight, B,
                  D, m->scratch, m->stream);
    }
    if (c->gram_weight > 0) gram_step(m, s);
    for (int i = 0, from = 0; i <= c->ibot_separate_head; i++) {
        HeadShape shape = head_shape(m, i);
        head_backward(m, &m->heads[0][i], &shape, m->dnorm + (size_t)from * D, scale, i ? 0 : crops, m->dhead);
        from += m->heads[0][i].rows;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 5. The step, and the functions of curia/backend.h

static void update_step(Model *m, const Slot *s) {
    const Config *c = &m->c;
    unfold_gradients(m->grad, m->student, m->matrices, m->host_matrices, m->matrix_count, m->matrix_rows, m->scratch, m->stream);
    gradient_norms(m->results->norm, m->clip, m->grad, m->table.group_start, GROUP_COUNT, c->optim_clip, m->norm_parts,
                   m->stream);
    Optimiser o = {m->student, m->teacher, m->exp_avg, m->exp_avg_sq, m->grad, m->clip, (float)c->optim_beta1,
                   (float)c->optim_beta2, (float)c->optim_eps};
    update_weights(o, s->values, m->student_weights, m->teacher_weights, m->matrices, m->matrix_count, m->matrix_rows, m->vectors,
                   m->vector_count, m->longest_vector, m->stream);
}

static void refresh_weights(Model *m) {
    if (m->stale && m->train)
        fold_weights(m->student_weights, m->student, m->matrices, m->matrix_count, m->matrix_rows, m->stream);
    if (m->stale) fold_weights(m->teacher_weights, m->teacher, m->matrices, m->matrix_count, m->matrix_rows, m->stream);
    m->stale = 0;
}

static void model_begin(Model *m, const Batch *b) {
    Slot *s = &m->slots[m->begun % 2];
    if (m->begun - m->ended == 2) fail(STATUS_FAILED, "step %lld: two steps are under way already", b->step);
    cuda_step = b->step + 1;
    load_batch(m, s, b);
    m->begun++;
    refresh_weights(m);
    CUDA_CHECK(cudaMemsetAsync(m->results, 0, sizeof *m->results, m->stream));
    load_patches(m, s, &s->student);
    teacher_step(m, s);
    backbone_forward(m, s, 0);
    loss_step(m, s);
    backbone_backward(m, s);
    update_step(m, s);
    CUDA_CHECK(cudaMemcpyAsync(s->results, m->results, sizeof *m->results, cudaMemcpyDeviceToHost, m->stream));
    CUDA_CHECK(cudaEventRecord(s->done, m->stream));
}

static void model_end(Model *m, StepResult *r) {
    const Config *c = &m->c;
    if (m->ended == m->begun) fail(STATUS_FAILED, "no step is under way");
    const Slot *s = &m->slots[m->ended++ % 2];
    CUDA_CHECK(cudaEventSynchronize(s->done));
    const Results *x = s->results;
    memset(r, 0, sizeof *r);
    r->dino = x->dino;
    r->ibot = x->ibot;
    r->koleo = (double)x->koleo[0] + x->koleo[1];
    r->sigreg = (double)x->sigreg[0] + x->sigreg[1];
    r->gram = x->gram;
    r->loss = c->dino_weight * r->dino + c->ibot_weight * r->ibot + c->koleo_weight * r->koleo + c->sigreg_weight * r->sigreg +
              c->gram_weight * r->gram;
    for (int g = 0; g < GROUP_COUNT; g++) r->gradient_norm[g] = x->norm[g];
    for (int i = 0; i < 2; i++) r->prototype_entropy[i] = x->entropy[i];
    r->feature_std = x->spread[0];
    r->feature_rank = x->spread[1];
}

static void model_encode(Model *m, const Batch *b, float *tokens) {
    Slot *s = &m->slots[0];
    int train = m->train;
    CUDA_CHECK(cudaDeviceSynchronize());
    m->train = 0;
    load_batch(m, s, b);
    refresh_weights(m);
    load_patches(m, s, &s->teacher);
    backbone_forward(m, s, 1);
    m->train = train;
    CUDA_CHECK(cudaMemcpyAsync(tokens, m->norm_out[1], (size_t)s->teacher.norm_rows * m->c.model_dim * sizeof(float),
                               cudaMemcpyDeviceToHost, m->stream));
    CUDA_CHECK(cudaStreamSynchronize(m->stream));
}

// Median of five timings, each of several calls: a large product of random numbers (zeros would flatter), a copy of much more
// than the caches hold.
static void model_peaks(Model *m, double *operations, double *bytes) {
    cudaDeviceProp device;
    CUDA_CHECK(cudaGetDeviceProperties(&device, 0));
    int n = device.multiProcessorCount >= 16 ? 8192 : 256, calls = device.multiProcessorCount >= 16 ? 8 : 1;
    size_t size = (size_t)n * n * sizeof(floatX);
    floatX *host = (floatX *)xmalloc(size, "the device's peaks"), *buffer;
    Rng r = rng_at(1, RNG_TEST, 0, 0, 0);
    enum { DRAWN = 1 << 16 };               // and then again: to draw them all would take longer than to multiply them
    for (size_t i = 0; i < (size_t)n * n; i++) host[i] = i < DRAWN ? (floatX)(float)rng_uniform(&r) : host[i - DRAWN];
    CUDA_CHECK(cudaMalloc(&buffer, 3 * size));
    for (int i = 0; i < 2; i++) CUDA_CHECK(cudaMemcpy(buffer + (size_t)i * n * n, host, size, cudaMemcpyHostToDevice));
    free(host);
    cudaEvent_t events[2];
    for (int i = 0; i < 2; i++) CUDA_CHECK(cudaEventCreateWithFlags(&events[i], cudaEventDefault));
    Matmul p = {};
    p.m = p.n = p.k = p.lda = p.ldb = p.ldc = n;
    for (int what = 0; what < 2; what++) {
        float ms[6];
        for (int repeat = 0; repeat < 6; repeat++) {        // the first warms up
            CUDA_CHECK(cudaEventRecord(events[0], m->stream));
            for (int i = 0; i < calls; i++) {
                floatX *a = buffer, *b = a + (size_t)n * n, *c = b + (size_t)n * n;
                if (what) CUDA_CHECK(cudaMemcpyAsync(c, a, size, cudaMemcpyDeviceToDevice, m->stream));
                else matmul(&m->matmul, p, c, a, b, 1, NULL, NULL, m->stream);
            }
            CUDA_CHECK(cudaEventRecord(events[1], m->stream));
            CUDA_CHECK(cudaEventSynchronize(events[1]));
            CUDA_CHECK(cudaEventElapsedTime(&ms[repeat], events[0], events[1]));
            for (int i = repeat; i > 1 && ms[i] < ms[i - 1]; i--) {
                float t = ms[i];
                ms[i] = ms[i - 1];
                ms[i - 1] = t;
            }
        }
        double seconds = ms[3] * 1e-3 / calls;
        if (what) *bytes = 2.0 * size / seconds;
        else *operations = 2.0 * n * n * n / seconds;
    }
    for (int i = 0; i < 2; i++) CUDA_CHECK(cudaEventDestroy(events[i]));
    CUDA_CHECK(cudaFree(buffer));
}

// Each group's pixels as the patches see them, every channel.
static void model_pixels(Model *m, const Batch *b, float *global_pixels, float *local_pixels) {
    Slot *s = &m->slots[0];
    float *out[2] = {global_pixels, local_pixels};
    load_batch(m, s, b);
    const Pass *p = m->train ? &s->student : &s->teacher;
    for (int g = 0; g < 2; g++) {
        const Tokens *t = &p->groups[g];
        if (!t->count) continue;
        int channels, C = (int)m->c.model_channels;
        const float *pixels = group_pixels(m, s, t, g, &channels);
        size_t image = (size_t)t->size * t->size;
        CUDA_CHECK(cudaStreamSynchronize(m->stream));
        for (size_t i = 0; i < (size_t)t->count * C; i++)
            CUDA_CHECK(cudaMemcpy(out[g] + i * image, pixels + (channels == C ? i : i / C) * image, image * sizeof(float),
                                  cudaMemcpyDeviceToHost));
    }
}

// Why the backend cannot run here, or not this model; NULL: it can. GPUs from compute capability 8.0 on have bf16 products and
// cp.async.
static const char *cuda_missing(const Config *c) {
    static char reason[512];
    if (c->model_dim != 64 * c->model_heads) {
        snprintf(reason, sizeof reason, "model.dim=%lld, model.heads=%lld: the CUDA backend takes heads of 64", c->model_dim,
                 c->model_heads);
        return reason;
    }
    int devices = 0, driver = 0, runtime = 0;
    cudaDeviceProp device;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    cudaError_t error = cudaGetDeviceCount(&devices);
    if (error == cudaErrorInsufficientDriver) {
        if (driver)
            snprintf(reason, sizeof reason, "the driver is for CUDA %d.%d, this program for %d.%d: update the driver", driver / 1000,
                     driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
        else snprintf(reason, sizeof reason, "no GPU answers (there is no NVIDIA driver)");
        return reason;
    }
    if (error != cudaSuccess || !devices) {
        snprintf(reason, sizeof reason, "no GPU answers (%s)", error == cudaSuccess ? "none found" : cudaGetErrorString(error));
        return reason;
    }
    CUDA_CHECK(cudaGetDeviceProperties(&device, 0));
    if (device.major >= 8) return NULL;
    snprintf(reason, sizeof reason, "%s has compute capability %d.%d; 8.0 (A100, RTX 30) is the least", device.name, device.major,
             device.minor);
    return reason;
}

// A batch of B samples as the config makes them, without contents: what planning needs.
static Batch planned_batch(const Config *c, int B) {
    static const int some = 0;
    Batch b = {};
    b.samples = B;
    b.globals = 2 * B;
    b.locals = (int)c->crops_local_count * B;
    b.global_size = (int)c->crops_global_size;
    b.local_size = (int)c->crops_local_size;
    for (int g = 0; g < 2; g++) {
        int sequences = g ? b.locals : b.globals;
        b.kept[g] = kept_sequences(c, sequences);
        for (int i = 0; i < 2 && c->model_drop_path > 0; i++) b.drop[g][i] = &some;
    }
    return b;
}

// Bytes that a step of B samples takes beside the parameters; the masked patches are METHOD D's number.
static size_t planned_bytes(Model *m, int B, Memory *memory) {
    const Config *c = &m->c;
    Batch b = planned_batch(c, B);
    Pass student = {}, teacher = {};
    int N = (int)(c->crops_global_size / c->model_patch * (c->crops_global_size / c->model_patch)), masked = 0;
    for (int i = 0; c->ibot_weight > 0 && i < masked_crops(c, b.globals); i++) masked += masked_patches(c, b.globals, i, N);
    size_pass(m, &student, &b, 1, masked);
    size_pass(m, &teacher, &b, 0, masked);
    Carver a = {NULL, 0};
    *memory = carve(m, &a, &student, &teacher, masked);
    return a.used;
}

// The memory table, and the refusal of a batch that does not fit.
static void print_memory(Model *m) {
    Memory memory, other;
    size_t unused, total, n = m->table.size;
    int B = (int)m->c.optim_batch_size, low = 0;
    size_t arena = planned_bytes(m, B, &memory);
    CUDA_CHECK(cudaMemGetInfo(&unused, &total));
    const double mib = 1048576;
    size_t optimiser = n * 2 * sizeof(float), parameters = m->parameter_bytes - optimiser;
    fprintf(stderr, "GPU memory, MiB: parameters and gradients %.0f, optimiser %.0f, activations %.0f (blocks %.0f), heads and logits "
            "%.0f, workspace %.0f; %.0f of %.0f free before the step\n", parameters / mib, optimiser / mib,
            (memory.activations + memory.blocks) / mib, memory.blocks / mib, memory.logits / mib,
            (memory.workspace + MATMUL_WORKSPACE) / mib, unused / mib, total / mib);
    if (arena <= unused) return;
    for (int high = B; high - low > 1;) {
        int middle = (low + high) / 2;
        if (planned_bytes(m, middle, &other) <= unused) low = middle;
        else high = middle;
    }
    fail(STATUS_USAGE, "optim.batch_size=%d needs %.0f MiB of GPU memory, %.0f are free; %s%d%s", B, arena / mib, unused / mib,
         low ? "the largest that fits is " : "not even ", low ? low : 1, low ? ", or try run.recompute=block" : " fits: use a smaller model");
}

static Model *model_create(const Config *c, const TensorTable *t, int train) {
    const char *missing = cuda_missing(c);
    if (missing) fail(STATUS_USAGE, "%s", missing);
    Model *m = (Model *)xmalloc(sizeof *m, "the model");
    m->c = *c;
    m->table = *t;
    m->train = train;
    m->stale = 1;
    m->blocks = (BlockActs *)xmalloc(c->model_depth * sizeof *m->blocks, "the model");
    CUDA_CHECK(cudaStreamCreateWithFlags(&m->stream, cudaStreamNonBlocking));
    CUDA_CHECK(cudaStreamCreateWithFlags(&m->copy, cudaStreamNonBlocking));
    matmul_create(&m->matmul);
    size_t effective = list_matrices(m), n = t->size, K[2] = {(size_t)c->dino_prototypes, (size_t)c->dino_prototypes};
    if (c->ibot_separate_head) K[1] = c->ibot_prototypes;
    Vectors *vectors = list_vectors(m);
    for (char *base = NULL;; base = m->parameters) {
        Carver carver = {base, 0}, *a = &carver;
        TAKE(m->teacher, n);
        TAKE(m->teacher_weights, effective);
        TAKE(m->matrices, m->matrix_count);
        TAKE(m->vectors, m->vector_count);
        float **arrays[] = {&m->student, &m->grad, &m->exp_avg, &m->exp_avg_sq};
        for (int i = 0; i < 4 && train; i++) TAKE(*arrays[i], n);
        if (train) TAKE(m->student_weights, effective);
        for (int i = 0; i < 2 && train; i++) TAKE(m->center[i], K[i]);
        m->parameter_bytes = a->used;
        if (base) break;
        CUDA_CHECK(cudaMalloc(&m->parameters, m->parameter_bytes));
        CUDA_CHECK(cudaMemset(m->parameters, 0, m->parameter_bytes));
        CUDA_CHECK(cudaDeviceSynchronize());
    }
    CUDA_CHECK(cudaMemcpy(m->matrices, m->host_matrices, m->matrix_count * sizeof(Matrix), cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaMemcpy(m->vectors, vectors, m->vector_count * sizeof(Vectors), cudaMemcpyHostToDevice));
    free(vectors);
    for (int i = 0; i < 2; i++) {
        Slot *s = &m->slots[i];
        s->student.branches = (Branch *)xmalloc(2 * c->model_depth * sizeof(Branch), "the model");
        s->teacher.branches = (Branch *)xmalloc(2 * c->model_depth * sizeof(Branch), "the model");
        CUDA_CHECK(cudaMallocHost(&s->results, sizeof *s->results));
        CUDA_CHECK(cudaEventCreateWithFlags(&s->sent, cudaEventDisableTiming));
        CUDA_CHECK(cudaEventCreateWithFlags(&s->done, cudaEventDisableTiming));
    }
    if (train) print_memory(m);
    return m;
}

static void model_destroy(Model *m) {
    CUDA_CHECK(cudaDeviceSynchronize());
    for (int i = 0; i < 2; i++) {
        Slot *s = &m->slots[i];
        slot_free(s);
        free(s->overflow);
        free(s->student.branches);
        free(s->teacher.branches);
        CUDA_CHECK(cudaFreeHost(s->results));
        CUDA_CHECK(cudaEventDestroy(s->sent));
        CUDA_CHECK(cudaEventDestroy(s->done));
    }
    if (m->arena) CUDA_CHECK(cudaFree(m->arena));
    if (m->pixel_scratch) CUDA_CHECK(cudaFree(m->pixel_scratch));
    CUDA_CHECK(cudaFree(m->parameters));
    matmul_destroy(&m->matmul);
    CUDA_CHECK(cudaStreamDestroy(m->stream));
    CUDA_CHECK(cudaStreamDestroy(m->copy));
    free(m->host_matrices);
    free(m->blocks);
    free(m);
}

// The device array behind a name of curia/backend.h, and its number of elements; NULL where there is none.
static float *model_array(Model *m, const char *name, size_t *n) {
    float *arrays[ARRAY_COUNT] = {m->student, m->teacher, m->grad, m->exp_avg, m->exp_avg_sq, m->center[0], m->center[1]};
    Place p = place_of(&m->c, &m->table, name);
    if (p.array >= 0 && arrays[p.array]) {
        *n = p.size;
        return arrays[p.array] + p.offset;
    }
    const Slot *s = &m->slots[(m->ended + 1) % 2];          // of the step that ended last
    size_t D = m->c.model_dim, crops = s->student.groups[0].count, patches = crops * s->student.groups[0].patches;
    if (!m->ended) return NULL;
    *n = crops * D;
    if (!strcmp(name, "out.cls")) return m->norm_out[0];
    if (!strcmp(name, "out.teacher_cls")) return m->norm_out[1];
    if (strcmp(name, "out.patch") || s->student.norm_rows == s->student.head_rows) return NULL;
    *n = patches * D;
    return m->norm_out[0] + (size_t)s->student.head_rows * D;
}

static size_t model_read(Model *m, const char *name, Dtype dtype, void *data) {
    size_t n = 0;
    const float *array = model_array(m, name, &n);
    if (!array) return 0;
    if (!data) return n;
    float *values = dtype == DTYPE_F64 ? (float *)xmalloc(n * sizeof(float), name) : (float *)data;
    CUDA_CHECK(cudaStreamSynchronize(m->stream));
    CUDA_CHECK(cudaMemcpy(values, array, n * sizeof(float), cudaMemcpyDeviceToHost));
    if (values == data) return n;
    for (size_t i = 0; i < n; i++) ((double *)data)[i] = values[i];
    free(values);
    return n;
}

static size_t model_write(Model *m, const char *name, Dtype dtype, const void *data) {
    size_t n = 0;
    float *array = model_array(m, name, &n);
    if (!array || !data) return array ? n : 0;
    float *values = (float *)xmalloc(n * sizeof(float), name);
    for (size_t i = 0; i < n; i++) values[i] = dtype == DTYPE_F64 ? (float)((const double *)data)[i] : ((const float *)data)[i];
    CUDA_CHECK(cudaStreamSynchronize(m->stream));
    CUDA_CHECK(cudaMemcpy(array, values, n * sizeof(float), cudaMemcpyHostToDevice));
    free(values);
    m->stale |= !strncmp(name, "student.", 8) || !strncmp(name, "teacher.", 8);
    return n;
}

#ifdef CURIA_FP32
const Backend cuda_backend_fp32 = {
    "cuda fp32", 2,
#else
const Backend cuda_backend = {
    "cuda", 2,
#endif
    cuda_missing, model_create, model_destroy, model_write, model_read, model_begin, model_end, model_encode, model_peaks,
    model_pixels};
