/*
The tensor table (DESIGN 2): one list of parameters that drives allocation, initialisation, the optimiser, checkpoints and
the tests' messages. Names are those of Hugging Face Dinov2Model for the backbone.

  Tensor, TensorTable    name, shape, initialisation, decay, learning rate factor, clip group
  tensors_build          the table of a config
  tensors_find           index by name, or -1
  tensor_init            initial values of one tensor (METHOD A.5)
*/
#ifndef CURIA_TENSORS_H
#define CURIA_TENSORS_H

#include "config.h"
#include "rng.h"

enum { GROUP_BACKBONE, GROUP_DINO_HEAD, GROUP_IBOT_HEAD, GROUP_COUNT };    // each is clipped on its own
enum { INIT_ZERO, INIT_ONE, INIT_NORMAL, INIT_UNIFORM, INIT_CONSTANT };

typedef struct {
    char name[96];
    int rank;
    int64_t shape[4];
    size_t offset, size;        // elements, in an array that holds the whole table without gaps
    int init;
    double init_value;          // NORMAL: standard deviation; UNIFORM: bound; CONSTANT: value
    int decays;                 // weight decay applies (METHOD F)
    int last_layer;             // frozen for optim.freeze_last_layer_steps
    double lr_factor;           // layer decay times patch embedding multiplier
    int group;                  // GROUP_*
} Tensor;

typedef struct {
    Tensor *tensors;
    int count, capacity;
    size_t size;                // elements in all
    size_t group_start[GROUP_COUNT + 1];    // a group's tensors are contiguous: elements [start[g], start[g+1])
} TensorTable;

typedef struct { int64_t n[4]; } Shape;    // unused dimensions are 0
#define SHAPE(...) ((Shape){{__VA_ARGS__}})

static inline Tensor *tensor_add(TensorTable *t, int group, double lr_factor, int init, double init_value,
                                 Shape shape, const char *format, ...) {
    if (t->count == t->capacity) {
        t->capacity = t->capacity ? 2 * t->capacity : 64;
        t->tensors = (Tensor *)realloc(t->tensors, (size_t)t->capacity * sizeof *t->tensors);
        if (!t->tensors) fail(STATUS_FAILED, "out of memory: the tensor table");
    }
    Tensor *x = &t->tensors[t->count++];
    memset(x, 0, sizeof *x);
    va_list args;
    va_start(args, format);
    vsnprintf(x->name, sizeof x->name, format, args);
    va_end(args);
    x->size = 1;
    for (int i = 0; i < 4 && shape.n[i]; i++) {
        x->shape[x->rank++] = shape.n[i];
        x->size *= (size_t)shape.n[i];
    }
    x->offset = t->size;
    t->size += x->size;
    for (int g = group + 1; g <= GROUP_COUNT; g++) t->group_start[g] = t->size;
    x->group = group;
    x->init = init;
    x->init_value = init_value;
    x->lr_factor = lr_factor;
    // No decay for biases, norms and LayerScale; tokens and the head's last layer do decay (METHOD F, pitfalls 4 and 5).
    size_t n = strlen(x->name);
    x->decays = !(n > 5 && !strcmp(x->name + n - 5, ".bias")) && !strstr(x->name, "norm") && !strstr(x->name, "layer_scale");
    x->last_layer = strstr(x->name, "last_layer") != NULL;
    return x;
}

// A head: `layers` linear layers, then prototypes with weight norm (METHOD B). One layer is PyTorch's bare Linear.
static inline void tensors_add_head(TensorTable *t, int group, const char *head, long long dim, long long hidden, long long layers,
                                    long long bottleneck, long long prototypes, double init_std) {
    for (int i = 0; i < layers; i++) {
        char index[16] = "";
        if (layers > 1) snprintf(index, sizeof index, ".%d", 2 * i);
        long long in = i ? hidden : dim, out = i + 1 < layers ? hidden : bottleneck;
        tensor_add(t, group, 1, INIT_NORMAL, init_std, SHAPE(out, in), "%s.mlp%s.weight", head, index);
        tensor_add(t, group, 1, INIT_ZERO, 0, SHAPE(out), "%s.mlp%s.bias", head, index);
    }
    tensor_add(t, group, 1, INIT_ONE, 0, SHAPE(prototypes, 1), "%s.last_layer.weight_g", head);
    tensor_add(t, group, 1, INIT_UNIFORM, 1 / sqrt((double)bottleneck), SHAPE(prototypes, bottleneck),
               "%s.last_layer.weight_v", head);
}

// query, key and value stand one after the other, so that the three weights are also one [3D,D] matrix and the three
// biases one [3D] vector. The backbone comes first and keeps its offsets whatever heads follow; with_heads 0 leaves them out.
static inline TensorTable tensors_build(const Config *c, int with_heads) {
    TensorTable t;
    memset(&t, 0, sizeof t);
    long long D = c->model_dim, L = c->model_depth, C = c->model_channels, p = c->model_patch, F = c->model_ffn_hidden;
    long long M = c->model_pos_grid;
    double embed = pow(c->optim_layer_decay, (double)L + 1), bound = 1 / sqrt((double)(C * p * p)), std = c->model_init_std;
    int g = GROUP_BACKBONE;
    tensor_add(&t, g, embed, INIT_NORMAL, 1e-6, SHAPE(1, 1, D), "embeddings.cls_token");
    tensor_add(&t, g, embed, INIT_ZERO, 0, SHAPE(1, D), "embeddings.mask_token");
    if (c->model_registers)
        tensor_add(&t, g, embed, INIT_NORMAL, 1e-6, SHAPE(1, c->model_registers, D), "embeddings.register_tokens");
    tensor_add(&t, g, embed, INIT_NORMAL, 0.02, SHAPE(1, 1 + M * M, D), "embeddings.position_embeddings");
    double patch = embed * c->optim_patch_embed_lr;
    tensor_add(&t, g, patch, INIT_UNIFORM, bound, SHAPE(D, C, p, p), "embeddings.patch_embeddings.projection.weight");
    tensor_add(&t, g, patch, INIT_UNIFORM, bound, SHAPE(D), "embeddings.patch_embeddings.projection.bias");
    for (int i = 0; i < L; i++) {
        double lr = pow(c->optim_layer_decay, (double)(L - i));
        static const char *const qkv[3] = {"query", "key", "value"};
        tensor_add(&t, g, lr, INIT_ONE, 0, SHAPE(D), "encoder.layer.%d.norm1.weight", i);
        tensor_add(&t, g, lr, INIT_ZERO, 0, SHAPE(D), "encoder.layer.%d.norm1.bias", i);
        for (int j = 0; j < 3; j++)
            tensor_add(&t, g, lr, INIT_NORMAL, std, SHAPE(D, D), "encoder.layer.%d.attention.attention.%s.weight", i, qkv[j]);
        for (int j = 0; j < 3; j++)
            tensor_add(&t, g, lr, INIT_ZERO, 0, SHAPE(D), "encoder.layer.%d.attention.attention.%s.bias", i, qkv[j]);
        tensor_add(&t, g, lr, INIT_NORMAL, std, SHAPE(D, D), "encoder.layer.%d.attention.output.dense.weight", i);
        tensor_add(&t, g, lr, INIT_ZERO, 0, SHAPE(D), "encoder.layer.%d.attention.output.dense.bias", i);
        tensor_add(&t, g, lr, INIT_CONSTANT, c->model_layerscale, SHAPE(D), "encoder.layer.%d.layer_scale1.lambda1", i);
        tensor_add(&t, g, lr, INIT_ONE, 0, SHAPE(D), "encoder.layer.%d.norm2.weight", i);
        tensor_add(&t, g, lr, INIT_ZERO, 0, SHAPE(D), "encoder.layer.%d.norm2.bias", i);
        int swiglu = c->model_ffn == FFN_SWIGLU;
        const char *in = swiglu ? "weights_in" : "fc1", *out = swiglu ? "weights_out" : "fc2";
        tensor_add(&t, g, lr, INIT_NORMAL, std, SHAPE(swiglu ? 2 * F : F, D), "encoder.layer.%d.mlp.%s.weight", i, in);
        tensor_add(&t, g, lr, INIT_ZERO, 0, SHAPE(swiglu ? 2 * F : F), "encoder.layer.%d.mlp.%s.bias", i, in);
        tensor_add(&t, g, lr, INIT_NORMAL, std, SHAPE(D, F), "encoder.layer.%d.mlp.%s.weight", i, out);
        tensor_add(&t, g, lr, INIT_ZERO, 0, SHAPE(D), "encoder.layer.%d.mlp.%s.bias", i, out);
        tensor_add(&t, g, lr, INIT_CONSTANT, c->model_layerscale, SHAPE(D), "encoder.layer.%d.layer_scale2.lambda1", i);
    }
    tensor_add(&t, g, 1, INIT_ONE, 0, SHAPE(D), "layernorm.weight");
    tensor_add(&t, g, 1, INIT_ZERO, 0, SHAPE(D), "layernorm.bias");
    if (with_heads) {
        tensors_add_head(&t, GROUP_DINO_HEAD, "dino_head", D, c->dino_hidden, c->dino_layers, c->dino_bottleneck,
                         c->dino_prototypes, std);
        if (c->ibot_separate_head)
            tensors_add_head(&t, GROUP_IBOT_HEAD, "ibot_head", D, c->ibot_hidden, c->ibot_layers, c->ibot_bottleneck,
                             c->ibot_prototypes, std);
    }
    return t;
}

static inline int tensors_find(const TensorTable *t, const char *name) {
    for (int i = 0; i < t->count; i++) if (!strcmp(t->tensors[i].name, name)) return i;
    return -1;
}

// Initial values of tensor `index`: a function of (seed, index) alone. METHOD A.5; the truncation of trunc_normal at +-2
// is a hundred standard deviations away and left out (pitfall 13).
static inline void tensor_init(const TensorTable *t, int index, uint64_t seed, float *out) {
    const Tensor *x = &t->tensors[index];
    Rng r = rng_at(seed, RNG_INIT, 0, 0, (uint32_t)index);
    for (size_t i = 0; i < x->size; i++) {
        switch (x->init) {
            case INIT_ZERO: out[i] = 0; break;
            case INIT_ONE: out[i] = 1; break;
            case INIT_CONSTANT: out[i] = (float)x->init_value; break;
            case INIT_NORMAL: out[i] = (float)(x->init_value * rng_normal(&r)); break;
            case INIT_UNIFORM: out[i] = (float)rng_range(&r, -x->init_value, x->init_value); break;
        }
    }
}

#endif
