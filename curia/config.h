/*
The configuration: one list of keys that makes the parser, the help, the printed table and the checkpoint's check.

  CONFIG_KEYS            every key with its type, default, range and meaning (DESIGN 6)
  Config                 the values
  config_set             one "key", "value" pair, checked
  config_from_json       a flat JSON object of keys
  config_validate        what one key alone cannot show; fills the values that 0 leaves to a rule
  config_print           the table echoed at the start;  config_write_json the same for machines
*/
#ifndef CURIA_CONFIG_H
#define CURIA_CONFIG_H

#include <math.h>
#include "json.h"
#include "log.h"

enum { FFN_MLP, FFN_SWIGLU };
enum { INTERPOLATE_OFFSET, INTERPOLATE_ANTIALIAS, INTERPOLATE_SIZE };
enum { PRIOR_GAUSSIAN, PRIOR_UNIFORM };
enum { SIGREG_BOTTLENECK, SIGREG_CLS };
enum { CENTERING_SINKHORN, CENTERING_SOFTMAX };
enum { SCALING_SQRT, SCALING_NONE };
enum { NORMALIZE_SLICE, NORMALIZE_VOLUME, NORMALIZE_VIEW };
enum { REDUCTION_FAST, REDUCTION_FIXED };
enum { RECOMPUTE_NONE, RECOMPUTE_ACTIVATIONS, RECOMPUTE_BLOCK };

// I integer, R real, B boolean, C choice (the default is an index into the names), S string of at most 255 bytes.
//   field, key, default, least, most, meaning
#define CONFIG_KEYS(I, R, B, C, S) \
    I(model_dim, "model.dim", 384, 8, 16384, "width D of the token stream") \
    I(model_depth, "model.depth", 12, 1, 256, "transformer blocks L") \
    I(model_heads, "model.heads", 6, 1, 256, "attention heads; D / heads is 64 in every published model") \
    I(model_patch, "model.patch", 16, 1, 64, "patch side, pixels") \
    I(model_channels, "model.channels", 1, 1, 64, "input channels; slices are repeated over them") \
    C(model_ffn, "model.ffn", FFN_MLP, "mlp|swiglu", "feed-forward network of a block") \
    I(model_ffn_hidden, "model.ffn_hidden", 0, 0, 65536, "hidden width F; 0: 4D for mlp, METHOD A.1's rounding of 8D/3 for swiglu") \
    I(model_registers, "model.registers", 0, 0, 64, "register tokens R") \
    R(model_layerscale, "model.layerscale", 1e-5, 0, 10, "initial LayerScale gamma") \
    R(model_init_std, "model.init_std", 0.02, 0, 1, "standard deviation of initial linear weights, heads too; narrow models want 1/sqrt(D)") \
    R(model_drop_path, "model.drop_path", 0.0, 0, 0.9, "share of sequences that a branch of a block skips") \
    I(model_pos_grid, "model.pos_grid", 0, 0, 512, "side M of the position embedding grid; 0: crops.global_size / model.patch") \
    C(model_interpolate, "model.interpolate", INTERPOLATE_OFFSET, "offset|antialias|size", "how the position embedding is resized (METHOD A.4)") \
    I(crops_global_size, "crops.global_size", 224, 8, 4096, "side of the two global crops, pixels") \
    I(crops_local_size, "crops.local_size", 96, 8, 4096, "side of the local crops, pixels") \
    I(crops_local_count, "crops.local_count", 8, 0, 64, "local crops per slice V") \
    R(crops_global_scale_min, "crops.global_scale_min", 0.32, 0.001, 1, "least area of a global crop, share of the slice") \
    R(crops_global_scale_max, "crops.global_scale_max", 1.0, 0.001, 1, "largest area of a global crop") \
    R(crops_local_scale_min, "crops.local_scale_min", 0.05, 0.001, 1, "least area of a local crop") \
    R(crops_local_scale_max, "crops.local_scale_max", 0.32, 0.001, 1, "largest area of a local crop") \
    R(crops_aspect_max, "crops.aspect_max", 1.3333333333333333, 1, 4, "largest width to height ratio of a crop, and its inverse the least") \
    C(crops_prior, "crops.prior", PRIOR_GAUSSIAN, "gaussian|uniform", "where crops lie: around the anatomy centre, or anywhere") \
    R(crops_prior_sigma, "crops.prior_sigma", 1.0, 0.01, 1000, "standard deviation of the crop centre, in units of the anatomy's spread") \
    R(crops_flip, "crops.flip", 0.5, 0, 1, "probability of a left-right flip") \
    R(crops_jitter, "crops.jitter", 0.8, 0, 1, "probability of the intensity jitter of the three keys below") \
    R(crops_brightness, "crops.brightness", 0.2, 0, 4, "offset drawn from +-this, in standard deviations of the image") \
    R(crops_contrast, "crops.contrast", 0.2, 0, 0.99, "gain drawn from 1 +- this") \
    R(crops_gamma, "crops.gamma", 0.2, 0, 2, "exponent on the view's own range, exp of a draw from +- this") \
    R(crops_blur, "crops.blur", 0.1, 0, 1, "probability of a Gaussian blur") \
    R(crops_blur_sigma_min, "crops.blur_sigma_min", 0.1, 0.01, 16, "least blur, output pixels") \
    R(crops_blur_sigma_max, "crops.blur_sigma_max", 2.0, 0.01, 16, "largest blur, output pixels") \
    R(mask_probability, "mask.probability", 0.5, 0, 1, "share of the global crops that are masked for iBOT") \
    R(mask_ratio_min, "mask.ratio_min", 0.1, 0, 1, "least share of masked patches in a masked crop") \
    R(mask_ratio_max, "mask.ratio_max", 0.5, 0, 1, "largest share") \
    C(mask_prior, "mask.prior", PRIOR_GAUSSIAN, "gaussian|uniform", "where mask blocks lie: around the anatomy centre, or anywhere") \
    R(mask_prior_sigma, "mask.prior_sigma", 1.0, 0.01, 1000, "standard deviation of the block centre, in units of the anatomy's spread") \
    R(dino_weight, "dino.weight", 1.0, 0, 1e6, "weight of the DINO loss on class tokens") \
    I(dino_prototypes, "dino.prototypes", 65536, 2, 1 << 20, "prototypes K of the DINO head") \
    I(dino_bottleneck, "dino.bottleneck", 256, 1, 8192, "width of the head's last hidden vector") \
    I(dino_hidden, "dino.hidden", 2048, 1, 65536, "width of the head's hidden layers") \
    I(dino_layers, "dino.layers", 3, 1, 8, "linear layers before the prototypes") \
    R(ibot_weight, "ibot.weight", 1.0, 0, 1e6, "weight of the iBOT loss on masked patches") \
    B(ibot_separate_head, "ibot.separate_head", 0, "a head of its own for patches; otherwise they share the DINO head") \
    I(ibot_prototypes, "ibot.prototypes", 65536, 2, 1 << 20, "as dino.prototypes, for a separate head") \
    I(ibot_bottleneck, "ibot.bottleneck", 256, 1, 8192, "as dino.bottleneck") \
    I(ibot_hidden, "ibot.hidden", 2048, 1, 65536, "as dino.hidden") \
    I(ibot_layers, "ibot.layers", 3, 1, 8, "as dino.layers") \
    R(koleo_weight, "koleo.weight", 0.0, 0, 1e6, "weight of the KoLeo loss, each global crop") \
    R(sigreg_weight, "sigreg.weight", 0.05, 0, 1e6, "weight of the SIGReg loss, each global crop") \
    C(sigreg_on, "sigreg.on", SIGREG_BOTTLENECK, "bottleneck|cls", "the vectors that SIGReg sees (METHOD C.5)") \
    I(sigreg_slices, "sigreg.slices", 1024, 1, 65536, "random directions M") \
    I(sigreg_knots, "sigreg.knots", 17, 2, 257, "points t of the characteristic function") \
    R(sigreg_t_min, "sigreg.t_min", -5.0, -100, 0, "first knot; 0: one-sided grid, inner weights doubled") \
    R(sigreg_t_max, "sigreg.t_max", 5.0, 0.01, 100, "last knot") \
    B(sigreg_scale_by_n, "sigreg.scale_by_n", 0, "multiply the statistic by the number of samples, as LeJEPA does") \
    R(gram_weight, "gram.weight", 0.0, 0, 1e6, "weight of the Gram loss against the targets given with the batch") \
    C(teacher_centering, "teacher.centering", CENTERING_SINKHORN, "sinkhorn|softmax", "how teacher logits become targets (METHOD C.1)") \
    R(teacher_temp, "teacher.temp", 0.07, 0.001, 10, "teacher temperature after warm-up") \
    R(teacher_warmup_temp, "teacher.warmup_temp", 0.04, 0.001, 10, "teacher temperature at step 0") \
    I(teacher_warmup_steps, "teacher.warmup_steps", 0, 0, 1LL << 40, "steps of the linear rise to teacher.temp") \
    R(teacher_momentum, "teacher.momentum", 0.992, 0, 1, "EMA momentum at step 0") \
    R(teacher_momentum_end, "teacher.momentum_end", 1.0, 0, 1, "EMA momentum at the last step, by a cosine") \
    R(student_temp, "student.temp", 0.1, 0.001, 10, "student temperature") \
    R(optim_lr, "optim.lr", 0.004, 0, 10, "peak learning rate, before optim.scaling") \
    R(optim_lr_min, "optim.lr_min", 1e-6, 0, 10, "learning rate at the last step, by a cosine") \
    I(optim_warmup_steps, "optim.warmup_steps", 0, 0, 1LL << 40, "steps of the linear rise from 0") \
    I(optim_steps, "optim.steps", 125000, 1, 1LL << 40, "length of every schedule, and where the run ends") \
    I(optim_micro_batch, "optim.micro_batch", 0, 0, 1 << 20, "slices per pass; 0: the whole batch, the only way in this version") \
    I(optim_batch_size, "optim.batch_size", 64, 1, 1 << 20, "slices per step B") \
    R(optim_weight_decay, "optim.weight_decay", 0.04, 0, 10, "decoupled weight decay at step 0") \
    R(optim_weight_decay_end, "optim.weight_decay_end", 0.4, 0, 10, "weight decay at the last step, by a cosine") \
    R(optim_beta1, "optim.beta1", 0.9, 0, 0.9999999, "AdamW beta 1") \
    R(optim_beta2, "optim.beta2", 0.999, 0, 0.9999999, "AdamW beta 2") \
    R(optim_eps, "optim.eps", 1e-8, 0, 1, "AdamW epsilon") \
    R(optim_clip, "optim.clip", 3.0, 0, 1e9, "largest gradient norm of backbone, dino_head and ibot_head, each; 0: no clipping") \
    R(optim_layer_decay, "optim.layer_decay", 0.9, 0.01, 1, "learning rate factor per block from the top") \
    R(optim_patch_embed_lr, "optim.patch_embed_lr", 0.2, 0, 10, "further factor for the patch embedding") \
    I(optim_freeze_last_layer_steps, "optim.freeze_last_layer_steps", 0, 0, 1LL << 40, "steps with learning rate 0 for the prototypes") \
    C(optim_scaling, "optim.scaling", SCALING_SQRT, "sqrt|none", "optim.lr times sqrt(batch_size / 1024), or as given") \
    C(data_normalize, "data.normalize", NORMALIZE_SLICE, "slice|volume|view", "statistics of the z-score: the whole slice, its volume, or the resized view itself") \
    B(data_clip_below_air, "data.clip_below_air", 1, "clip at -1000 (HU) after resizing") \
    S(data_weights, "data.weights", "", "sampling weight of each --data PATH, separated by commas; empty: by number of slices") \
    I(run_seed, "run.seed", 1, 0, 1LL << 62, "seed of every random choice") \
    I(run_save_every, "run.save_every", 500, 0, 1LL << 40, "steps between checkpoints; 0: only at the end") \
    I(run_eval_every, "run.eval_every", 0, 0, 0, "steps between evaluations; 0: never, the only way in this version") \
    I(run_keep, "run.keep", 2, 1, 1 << 20, "checkpoints kept") \
    C(run_reduction, "run.reduction", REDUCTION_FAST, "fast|fixed", "order of sums; the CPU backend's is fixed in either case") \
    C(run_recompute, "run.recompute", RECOMPUTE_NONE, "none|activations|block", "what the CUDA backend computes again in the backward to save memory")

typedef struct {
#define FIELD_I(field, ...) long long field;
#define FIELD_R(field, ...) double field;
#define FIELD_B(field, ...) int field;
#define FIELD_S(field, ...) char field[256];
    CONFIG_KEYS(FIELD_I, FIELD_R, FIELD_B, FIELD_B, FIELD_S)
#undef FIELD_I
#undef FIELD_R
#undef FIELD_B
#undef FIELD_S
} Config;

typedef struct {
    char type;                      // I R B C S as above
    const char *name;
    size_t offset;                  // of the field in Config
    double least, most;
    const char *choices;            // C: names separated by |; S: the default
    const char *meaning;
    double preset;                  // I R B C: the default
} ConfigKey;

#define KEY_I(f, k, d, lo, hi, m) {'I', k, offsetof(Config, f), (double)(lo), (double)(hi), NULL, m, (double)(d)},
#define KEY_R(f, k, d, lo, hi, m) {'R', k, offsetof(Config, f), lo, hi, NULL, m, d},
#define KEY_B(f, k, d, m) {'B', k, offsetof(Config, f), 0, 1, NULL, m, d},
#define KEY_C(f, k, d, names, m) {'C', k, offsetof(Config, f), 0, 0, names, m, d},
#define KEY_S(f, k, d, m) {'S', k, offsetof(Config, f), 0, 0, d, m, 0},
static const ConfigKey config_keys[] = {CONFIG_KEYS(KEY_I, KEY_R, KEY_B, KEY_C, KEY_S)};
#undef KEY_I
#undef KEY_R
#undef KEY_B
#undef KEY_C
#undef KEY_S
enum { CONFIG_KEY_COUNT = sizeof config_keys / sizeof config_keys[0] };

static inline Config config_default(void) {
    Config c;
    memset(&c, 0, sizeof c);
    for (int i = 0; i < CONFIG_KEY_COUNT; i++) {
        const ConfigKey *k = &config_keys[i];
        void *field = (char *)&c + k->offset;
        if (k->type == 'I') *(long long *)field = (long long)k->preset;
        if (k->type == 'R') *(double *)field = k->preset;
        if (k->type == 'B' || k->type == 'C') *(int *)field = (int)k->preset;
        if (k->type == 'S') snprintf((char *)field, 256, "%s", k->choices);
    }
    return c;
}

static inline const ConfigKey *config_find(const char *name) {
    for (int i = 0; i < CONFIG_KEY_COUNT; i++) if (!strcmp(config_keys[i].name, name)) return &config_keys[i];
    return NULL;
}

// The index of `value` among the |-separated names, or -1.
static inline int choice_index(const char *names, const char *value) {
    size_t n = strlen(value);
    for (int i = 0; *names; i++) {
        size_t m = strcspn(names, "|");
        if (m == n && !strncmp(names, value, n)) return i;
        names += m + (names[m] == '|');
    }
    return -1;
}

// Sets one key. `source` (a file, "--set") goes into the message; a bad key or value ends the program with status 2.
static inline void config_set(Config *c, const char *name, const char *value, const char *source) {
    const ConfigKey *k = config_find(name);
    if (!k) fail(STATUS_USAGE, "%s: unknown key '%s'; --help lists the keys", source, name);
    void *field = (char *)c + k->offset;
    char *end;
    if (k->type == 'I' || k->type == 'R') {
        double number = strtod(value, &end);
        if (end == value || *end || !(number >= k->least && number <= k->most) || (k->type == 'I' && number != floor(number)))
            fail(STATUS_USAGE, "%s: %s=%s: expected %s from %.10g to %.10g", source, name, value,
                 k->type == 'I' ? "an integer" : "a number", k->least, k->most);
        if (k->type == 'R') *(double *)field = number;
        else *(long long *)field = strpbrk(value, ".eE") ? (long long)number : strtoll(value, NULL, 10);
    } else if (k->type == 'B') {
        int yes = choice_index("true|1|yes|on", value) >= 0, no = choice_index("false|0|no|off", value) >= 0;
        if (!yes && !no) fail(STATUS_USAGE, "%s: %s=%s: expected true or false", source, name, value);
        *(int *)field = yes;
    } else if (k->type == 'C') {
        int i = choice_index(k->choices, value);
        if (i < 0) fail(STATUS_USAGE, "%s: %s=%s: expected one of %s", source, name, value, k->choices);
        *(int *)field = i;
    } else {
        if (strlen(value) > 255) fail(STATUS_USAGE, "%s: %s is longer than 255 bytes", source, name);
        snprintf((char *)field, 256, "%s", value);
    }
}

// The value as config_set takes it. out: at least 256 bytes.
static inline void config_format(const Config *c, const ConfigKey *k, char *out) {
    const void *field = (const char *)c + k->offset;
    if (k->type == 'I') snprintf(out, 256, "%lld", *(const long long *)field);
    if (k->type == 'B') snprintf(out, 256, "%s", *(const int *)field ? "true" : "false");
    if (k->type == 'S') snprintf(out, 256, "%s", (const char *)field);
    if (k->type == 'R') {                                   // the shortest decimal that reads back to the same bits
        for (int digits = 6; digits <= 17; digits++) {
            snprintf(out, 256, "%.*g", digits, *(const double *)field);
            if (strtod(out, NULL) == *(const double *)field) break;
        }
    }
    if (k->type == 'C') {
        const char *name = k->choices;
        for (int i = *(const int *)field; i > 0; i--) name += strcspn(name, "|") + 1;
        snprintf(out, 256, "%.*s", (int)strcspn(name, "|"), name);
    }
}

// Applies a flat object of keys, as in config.json or a golden file. Keys that begin with `skip` (may be NULL) are
// left to the caller.
static inline void config_from_json(Config *c, const Json *object, const char *source, const char *skip) {
    if (!object || object->type != JSON_OBJECT) fail(STATUS_USAGE, "%s: expected a JSON object of config keys", source);
    for (int i = 0; i < object->count; i++) {
        const Json *v = &object->children[i];
        if (skip && !strncmp(object->keys[i], skip, strlen(skip))) continue;
        const char *text = v->type == JSON_STRING || v->type == JSON_NUMBER ? v->text
                         : v->type == JSON_TRUE ? "true" : v->type == JSON_FALSE ? "false" : NULL;
        if (!text) fail(STATUS_USAGE, "%s: %s: expected a string, a number or a boolean", source, object->keys[i]);
        config_set(c, object->keys[i], text, source);
    }
}

static inline void config_write_json(const Config *c, FILE *f) {
    fprintf(f, "{\n");
    for (int i = 0; i < CONFIG_KEY_COUNT; i++) {
        char value[256];
        config_format(c, &config_keys[i], value);
        fprintf(f, "  \"%s\": ", config_keys[i].name);
        if (config_keys[i].type == 'C' || config_keys[i].type == 'S') json_write_string(f, value);
        else fputs(value, f);
        fputs(i + 1 < CONFIG_KEY_COUNT ? ",\n" : "\n}\n", f);
    }
}

// The table echoed at the start of a run: three keys a line, those that differ from the default marked with *.
static inline void config_print(const Config *c, FILE *f) {
    Config preset = config_default();
    for (int i = 0; i < CONFIG_KEY_COUNT; i++) {
        char value[256], usual[256], cell[512];
        config_format(c, &config_keys[i], value);
        config_format(&preset, &config_keys[i], usual);
        snprintf(cell, sizeof cell, "%s%-29s %s", strcmp(value, usual) ? "*" : " ", config_keys[i].name, value);
        fprintf(f, "%-44s%s", cell, i % 3 == 2 || i + 1 == CONFIG_KEY_COUNT ? "\n" : " ");
    }
}

static inline void config_print_help(FILE *f) {
    Config preset = config_default();
    for (int i = 0; i < CONFIG_KEY_COUNT; i++) {
        char value[256];
        config_format(&preset, &config_keys[i], value);
        fprintf(f, "  %-30s %-10s %s%s%s%s\n", config_keys[i].name, *value ? value : "\"\"", config_keys[i].meaning,
                config_keys[i].type == 'C' ? " (" : "", config_keys[i].type == 'C' ? config_keys[i].choices : "",
                config_keys[i].type == 'C' ? ")" : "");
    }
}

// METHOD A.1: D*4 for mlp; for swiglu 8*floor((floor(4D*2/3)+7)/8), truncated first and rounded up after.
static inline long long ffn_hidden_rule(long long dim, int ffn) {
    return ffn == FFN_MLP ? 4 * dim : (4 * dim * 2 / 3 + 7) / 8 * 8;
}

// Sequences that a branch keeps of `sequences` (METHOD A.3): truncated in double, as the reference does; at least one where there are any.
static inline int kept_sequences(const Config *c, int sequences) {
    int kept = (int)(sequences * (1 - c->model_drop_path));
    return kept < 1 && sequences ? 1 : kept;
}

// Crops that get a mask, of all global crops; and patches that the crop of `rank` among them masks, of N (METHOD D, version 3's
// rule): ratios evenly spread over their range, so that the sum is the same in every step.
static inline int masked_crops(const Config *c, int crops) { return (int)(crops * c->mask_probability); }
static inline int masked_patches(const Config *c, int crops, int rank, int N) {
    return (int)(N * (c->mask_ratio_min + (c->mask_ratio_max - c->mask_ratio_min) * (rank + 1) / masked_crops(c, crops)));
}

// Checks that need two keys, and fills model.ffn_hidden and model.pos_grid where they are 0.
static inline void config_validate(Config *c, const char *source) {
    if (c->model_dim % c->model_heads)
        fail(STATUS_USAGE, "%s: model.dim=%lld is not a multiple of model.heads=%lld", source, c->model_dim, c->model_heads);
    if (c->crops_global_size % c->model_patch || c->crops_local_size % c->model_patch)
        fail(STATUS_USAGE, "%s: crops.global_size=%lld and crops.local_size=%lld must be multiples of model.patch=%lld", source,
             c->crops_global_size, c->crops_local_size, c->model_patch);
    if (c->crops_global_scale_min > c->crops_global_scale_max || c->crops_local_scale_min > c->crops_local_scale_max)
        fail(STATUS_USAGE, "%s: crops.*_scale_min is above crops.*_scale_max", source);
    if (c->crops_blur_sigma_min > c->crops_blur_sigma_max)
        fail(STATUS_USAGE, "%s: crops.blur_sigma_min is above crops.blur_sigma_max", source);
    if (c->mask_ratio_min > c->mask_ratio_max) fail(STATUS_USAGE, "%s: mask.ratio_min is above mask.ratio_max", source);
    if (c->sigreg_t_min != 0 && c->sigreg_t_min != -c->sigreg_t_max)
        fail(STATUS_USAGE, "%s: sigreg.t_min=%g: expected 0 or -sigreg.t_max", source, c->sigreg_t_min);
    if (c->optim_micro_batch && c->optim_micro_batch != c->optim_batch_size)
        fail(STATUS_USAGE, "%s: optim.micro_batch=%lld: this version takes the batch in one pass; use 0", source,
             c->optim_micro_batch);
    if (!c->model_ffn_hidden) c->model_ffn_hidden = ffn_hidden_rule(c->model_dim, c->model_ffn);
    if (!c->model_pos_grid) c->model_pos_grid = c->crops_global_size / c->model_patch;
}

#endif
