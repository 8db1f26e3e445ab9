/*
Recipes: named sets of config values, each value with where it comes from (CURIA2.md).

  Recipe, recipes     the table;  recipe_apply, recipe_list
*/
#ifndef CURIA_RECIPES_H
#define CURIA_RECIPES_H

#include "config.h"

// Where a value comes from: stated by the source, inferred from it, or ours.
typedef struct { const char *key, *value, *source; } RecipeValue;
typedef struct { const char *name, *meaning; RecipeValue values[64]; } Recipe;

#define DINOV2_SHORT "DINOv2 ssl_default_config.yaml"
#define DINOV2_LONG "inferred: DINOv2 train/vitl14.yaml, vitg14.yaml"
#define RELEASED "stated: config.json of the released Curia-2"
#define FINO "DINOv3 FINO branch"

// What every Curia-2 size shares: the release's architecture, and for what is not public DINOv2's long recipe with the one
// official DINO and SIGReg combination.
#define CURIA2_VALUES \
    {"model.patch", "16", RELEASED}, {"model.channels", "1", RELEASED}, {"model.ffn", "swiglu", RELEASED}, \
    {"model.layerscale", "1e-5", RELEASED}, {"model.drop_path", "0.4", RELEASED}, {"model.interpolate", "offset", DINOV2_LONG}, \
    {"crops.global_size", "224", "ours: the low-resolution size is not public"}, \
    {"crops.local_size", "96", "ours: 98 is no multiple of 16"}, {"crops.local_count", "8", DINOV2_LONG}, \
    {"crops.prior", "gaussian", "stated-AI: Gaussian-weighted anatomical cropping"}, \
    {"crops.flip", "0", "ours: a flip contradicts the fixed PL, IL, IP orientation"}, \
    {"mask.prior", "gaussian", "inferred: anatomically guided masking"}, \
    {"dino.prototypes", "131072", DINOV2_LONG}, {"dino.bottleneck", "384", DINOV2_LONG}, \
    {"ibot.separate_head", "true", DINOV2_LONG}, {"ibot.prototypes", "131072", DINOV2_LONG}, \
    {"ibot.bottleneck", "256", DINOV2_LONG}, {"koleo.weight", "0", "inferred: SIGReg replaces KoLeo"}, \
    {"sigreg.weight", "0.05", FINO}, {"sigreg.on", "bottleneck", FINO}, {"teacher.centering", "sinkhorn", DINOV2_LONG}, \
    {"teacher.warmup_steps", "37500", DINOV2_LONG}, {"teacher.momentum", "0.994", DINOV2_LONG}, {"optim.lr", "2e-4", DINOV2_LONG}, \
    {"optim.warmup_steps", "100000", DINOV2_LONG}, {"optim.steps", "625000", DINOV2_LONG}, {"optim.batch_size", "2048", "ours"}, \
    {"optim.weight_decay_end", "0.2", DINOV2_LONG}, {"optim.layer_decay", "1", DINOV2_LONG}, \
    {"optim.freeze_last_layer_steps", "1250", DINOV2_LONG}, \
    {"data.clip_below_air", "true", "stated: preprocessor_config.json of the released Curia-2"}

#define DINOV2_VALUES \
    {"teacher.centering", "softmax", DINOV2_SHORT}, {"koleo.weight", "0.1", DINOV2_SHORT}, {"sigreg.weight", "0", DINOV2_SHORT}, \
    {"model.drop_path", "0.3", DINOV2_SHORT}, {"teacher.warmup_steps", "37500", DINOV2_SHORT}, \
    {"optim.warmup_steps", "12500", DINOV2_SHORT}, {"optim.freeze_last_layer_steps", "1250", DINOV2_SHORT}, \
    {"optim.batch_size", "1024", DINOV2_SHORT}, \
    {"crops.prior", "uniform", DINOV2_SHORT}, {"mask.prior", "uniform", DINOV2_SHORT}

static const Recipe recipes[] = {
    {"tiny", "ours: the default; learns the phantom in two to three minutes on two cores", {
        {"model.dim", "128", "ours"}, {"model.depth", "4", "ours"}, {"model.heads", "2", "ours"}, {"model.patch", "8", "ours"},
        {"model.layerscale", "1", "ours"}, {"model.init_std", "0.08", "ours"}, {"crops.global_size", "48", "ours"},
        {"crops.local_size", "24", "ours"}, {"crops.local_count", "4", "ours"}, {"crops.global_scale_min", "0.4", "ours"},
        {"crops.local_scale_min", "0.1", "ours"}, {"crops.local_scale_max", "0.4", "ours"}, {"crops.blur", "0", "ours"},
        {"mask.probability", "0.3", "ours"}, {"dino.prototypes", "128", "ours"}, {"dino.bottleneck", "64", "ours"},
        {"dino.hidden", "256", "ours"}, {"ibot.weight", "0.5", "ours"}, {"koleo.weight", "0.1", "ours"},
        {"sigreg.weight", "0.3", "ours"}, {"sigreg.slices", "256", "ours"}, {"teacher.temp", "0.025", "ours"},
        {"teacher.warmup_temp", "0.025", "ours"}, {"teacher.momentum", "0.98", "ours"}, {"optim.lr", "7e-4", "ours"},
        {"optim.scaling", "none", "ours"}, {"optim.warmup_steps", "50", "ours"}, {"optim.steps", "1300", "ours"},
        {"optim.batch_size", "32", "ours"}, {"optim.layer_decay", "1", "ours"}, {"optim.patch_embed_lr", "1", "ours"},
        {"optim.weight_decay_end", "0.1", "ours"}, {"run.save_every", "300", "ours"}}},
    {"curia2-b", "Curia-2, ViT-B/16, first stage", {
        {"model.dim", "768", RELEASED}, {"model.depth", "12", RELEASED}, {"model.heads", "12", RELEASED}, CURIA2_VALUES}},
    {"curia2-l", "Curia-2, ViT-L/16, first stage", {
        {"model.dim", "1024", "inferred: 303 M parameters"}, {"model.depth", "24", "inferred: 303 M parameters"},
        {"model.heads", "16", "inferred: 303 M parameters"}, CURIA2_VALUES}},
    {"curia2-g", "Curia-2, ViT-g/16, first stage; the paper's 1.3 B is not explained by DINOv2's ViT-g, 1.135 B", {
        {"model.dim", "1536", "inferred: DINOv2's ViT-g"}, {"model.depth", "40", "inferred: DINOv2's ViT-g"},
        {"model.heads", "24", "inferred: DINOv2's ViT-g"}, CURIA2_VALUES}},
    {"dinov2-s16", "DINOv2's short recipe, ViT-S/16", {
        {"model.dim", "384", DINOV2_SHORT}, {"model.depth", "12", DINOV2_SHORT}, {"model.heads", "6", DINOV2_SHORT},
        DINOV2_VALUES}},
    {"dinov2-l16", "DINOv2's short recipe, ViT-L/16", {
        {"model.dim", "1024", DINOV2_SHORT}, {"model.depth", "24", DINOV2_SHORT}, {"model.heads", "16", DINOV2_SHORT},
        DINOV2_VALUES}},
};
enum { RECIPE_COUNT = sizeof recipes / sizeof recipes[0] };

// Every recipe with its values and their sources.
static inline void recipe_list(FILE *f) {
    for (int i = 0; i < RECIPE_COUNT; i++) {
        fprintf(f, "%s\t%s\n", recipes[i].name, recipes[i].meaning);
        for (const RecipeValue *v = recipes[i].values; v->key; v++) fprintf(f, "\t%s\t%s\t%s\n", v->key, v->value, v->source);
    }
}

static inline void recipe_apply(Config *c, const char *name) {
    char known[512] = "";
    for (int i = 0; i < RECIPE_COUNT; i++) {
        if (!strcmp(recipes[i].name, name)) {
            for (const RecipeValue *v = recipes[i].values; v->key; v++) config_set(c, v->key, v->value, name);
            return;
        }
        snprintf(known + strlen(known), sizeof known - strlen(known), "%s%s", i ? ", " : "", recipes[i].name);
    }
    fail(STATUS_USAGE, "--recipe %s: no such recipe; there are %s", name, known);
}

#endif
