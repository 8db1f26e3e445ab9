/*
The host's choices of a step, from Philox alone: which slices, crop boxes, flips, intensities, masks, drop-path subsets and
SIGReg directions (DESIGN 2).

  StepInput           a Batch and the memory behind it
  input_create        for a config;  input_free
  input_draw          fills it for one step
  draw_crop           a crop box: RandomResizedCrop's sizes, placed uniformly or around the anatomy (METHOD D, E)
  draw_mask           block masks with an exact number of patches (METHOD D)
  truncated_normal    a normal draw between bounds; a uniform one as sigma grows
*/
#ifndef CURIA_VIEWS_H
#define CURIA_VIEWS_H

#include "../dataloader.h"
#include "backend.h"

static inline double normal_below(double x) { return 0.5 * erfc(-x * 0.70710678118654752); }

// Inverse transform by bisection: one uniform whatever the bounds. Where the bounds lie so far out that no mass is left
// between them, the nearer bound.
static inline double truncated_normal(Rng *r, double mean, double sigma, double low, double high) {
    double u = rng_uniform(r), below = normal_below((low - mean) / sigma), above = normal_below((high - mean) / sigma);
    if (!(above - below > 1e-12)) return mean < low ? low : mean > high ? high : mean;
    double target = below + u * (above - below), from = low, to = high;
    for (int i = 0; i < 50; i++) {
        double middle = 0.5 * (from + to);
        if (normal_below((middle - mean) / sigma) < target) from = middle;
        else to = middle;
    }
    return 0.5 * (from + to);
}

// The first of `size` cells in 0..extent-size: uniform, or with the middle of the box normal around `mean`. The bounds are
// half a cell wider than the box's range, so that rounding gives every position its share.
static inline int draw_position(Rng *r, int size, int extent, int prior, double mean, double sigma) {
    if (prior == PRIOR_UNIFORM) return (int)rng_below(r, (uint64_t)(extent - size) + 1);
    double middle = truncated_normal(r, mean, sigma, 0.5 * size - 0.5, extent - 0.5 * size + 0.5);
    int first = (int)floor(middle - 0.5 * size + 0.5);
    return first < 0 ? 0 : first > extent - size ? extent - size : first;
}

// A crop of area share [scale_min, scale_max] and log-uniform aspect; after ten draws that do not fit, the largest centred
// box of the nearest allowed aspect. Then its place.
static inline View draw_crop(Rng *r, const Config *c, const ShardSlice *s, double scale_min, double scale_max) {
    View v = {0};
    int H = (int)s->rows, W = (int)s->cols;
    double limit = log(c->crops_aspect_max);
    for (int attempt = 0; attempt < 10 && !v.height; attempt++) {
        double area = (double)H * W * rng_range(r, scale_min, scale_max), aspect = exp(rng_range(r, -limit, limit));
        long w = lrint(sqrt(area * aspect)), h = lrint(sqrt(area / aspect));
        if (w > 0 && h > 0 && w <= W && h <= H) v.width = (int)w, v.height = (int)h;
    }
    if (!v.height) {
        v.width = W < H * c->crops_aspect_max ? W : (int)lrint(H * c->crops_aspect_max);
        v.height = H < W * c->crops_aspect_max ? H : (int)lrint(W * c->crops_aspect_max);
    }
    v.top = draw_position(r, v.height, H, (int)c->crops_prior, s->centre_row, c->crops_prior_sigma * s->spread_row);
    v.left = draw_position(r, v.width, W, (int)c->crops_prior, s->centre_col, c->crops_prior_sigma * s->spread_col);
    v.flip = rng_uniform(r) < c->crops_flip;
    return v;
}

static inline void draw_intensity(Rng *r, const Config *c, View *v) {
    int jitter = rng_uniform(r) < c->crops_jitter;
    double brightness = rng_range(r, -c->crops_brightness, c->crops_brightness),
           contrast = rng_range(r, 1 - c->crops_contrast, 1 + c->crops_contrast);
    double gamma = exp(rng_range(r, -c->crops_gamma, c->crops_gamma));
    v->brightness = jitter ? brightness : 0;
    v->contrast = jitter ? contrast : 1;
    v->gamma = jitter ? gamma : 1;
    int blur = rng_uniform(r) < c->crops_blur;
    double sigma = rng_range(r, c->crops_blur_sigma_min, c->crops_blur_sigma_max);
    v->blur_sigma = blur ? sigma : 0;
}

// Masks exactly `count` patches of mask[g,g] (zero on entry): blocks of random area and aspect as DINOv2 draws them, then
// single patches for what the blocks left short, as DINOv3 does, so that the number of masked patches is fixed. The middles
// of blocks are normal around (row, col) with the given spread, all in patches, or uniform.
static inline void draw_mask(Rng *r, uint8_t *mask, int g, int count, int prior, double row, double col, double spread_row,
                             double spread_col) {
    int done = 0, largest = g * g / 2 > 0 ? g * g / 2 : 1;
    for (int stuck = 0; done < count && !stuck;) {
        int most = count - done < largest ? count - done : largest;
        stuck = 1;
        for (int attempt = 0; attempt < 10 && stuck; attempt++) {
            double area = rng_range(r, 4, most), aspect = exp(rng_range(r, log(0.3), -log(0.3)));
            int h = (int)lrint(sqrt(area * aspect)), w = (int)lrint(sqrt(area / aspect)), fresh = 0;
            if (h < 1 || w < 1 || h >= g || w >= g) continue;
            int top = draw_position(r, h, g, prior, row, spread_row), left = draw_position(r, w, g, prior, col, spread_col);
            for (int y = top; y < top + h; y++) for (int x = left; x < left + w; x++) fresh += !mask[y * g + x];
            if (fresh == 0 || fresh > most) continue;
            for (int y = top; y < top + h; y++) for (int x = left; x < left + w; x++) mask[y * g + x] = 1;
            done += fresh;
            stuck = 0;
        }
    }
    for (; done < count; done++) {
        int pick = (int)rng_below(r, (uint64_t)(g * g - done)), i = 0;
        while (mask[i] || pick-- > 0) i++;
        mask[i] = 1;
    }
}

typedef struct {
    Batch batch;
    uint64_t *indices;      // [B] the slices' places in the data set
    Slice *slices;          // [B]
    View *views;            // [2B + VB]
    uint8_t *mask;          // [2B, N]
    int *drop[2][2];        // [depth, kept]
    int *scratch;           // [2B + VB]
    float *directions;      // [M, Dz]
} StepInput;

static inline StepInput input_create(const Config *c) {
    StepInput in = {0};
    Batch *b = &in.batch;
    size_t B = c->optim_batch_size, N = (size_t)(c->crops_global_size / c->model_patch) * (c->crops_global_size / c->model_patch);
    b->samples = (int)B;
    b->globals = 2 * b->samples;
    b->locals = (int)c->crops_local_count * b->samples;
    b->global_size = (int)c->crops_global_size;
    b->local_size = (int)c->crops_local_size;
    in.indices = xmalloc(B * sizeof *in.indices, "a batch");
    b->slices = in.slices = xmalloc(B * sizeof *in.slices, "a batch");
    b->views = in.views = xmalloc((size_t)(b->globals + b->locals) * sizeof *in.views, "a batch");
    b->mask = in.mask = xmalloc(b->globals * N, "a batch");
    in.scratch = xmalloc((size_t)(b->globals + b->locals) * sizeof(int), "a batch");
    for (int g = 0; g < 2; g++) {
        int sequences = g ? b->locals : b->globals;
        b->kept[g] = kept_sequences(c, sequences);
        for (int branch = 0; branch < 2 && c->model_drop_path > 0; branch++)
            b->drop[g][branch] = in.drop[g][branch] = xmalloc((size_t)c->model_depth * b->kept[g] * sizeof(int), "a batch");
    }
    if (c->sigreg_weight > 0) {
        size_t width = c->sigreg_on == SIGREG_CLS ? c->model_dim : c->dino_bottleneck;
        b->directions = in.directions = xmalloc(c->sigreg_slices * width * sizeof(float), "a batch");
    }
    return in;
}

static inline void input_free(StepInput *in) {
    void *all[] = {in->indices, in->slices, in->views, in->mask, in->scratch, in->directions, in->drop[0][0], in->drop[0][1],
                   in->drop[1][0], in->drop[1][1]};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

// A raw slice of a data set as a backend takes it.
static inline Slice slice_of(const Config *c, const ShardSlice *s, const int16_t *pixels) {
    int clip = c->data_clip_below_air;
    return (Slice){pixels, (int)s->rows, (int)s->cols, s->scale, s->intercept, clip ? s->volume_mean_clipped : s->volume_mean,
                   clip ? s->volume_std_clipped : s->volume_std};
}

// The slices that step `step` takes, given the number of samples drawn before it.
static inline void input_indices(StepInput *in, const Dataset *data, const Sampler *sampler) {
    for (int i = 0; i < in->batch.samples; i++) in->indices[i] = sampler_index(sampler, data, sampler->next + (uint64_t)i);
}

// Everything of step `step`, a function of (seed, step, sample) and the slices in in->indices alone.
static inline void input_draw(StepInput *in, const Config *c, Dataset *data, long long step) {
    Batch *b = &in->batch;
    uint64_t seed = (uint64_t)c->run_seed, at = (uint64_t)step;
    int B = b->samples, g = (int)(c->crops_global_size / c->model_patch), N = g * g, views = b->globals + b->locals;
    b->step = step;
    b->schedule = schedule_at(c, step);
    memset(in->mask, 0, (size_t)b->globals * N);

    // Which global crops are masked, and how much: a permutation of the crops; those ranked below n are masked, with ratios
    // evenly spread over the range by rank.
    int masked = masked_crops(c, b->globals), *rank = in->scratch;
    Rng shuffle = rng_at(seed, RNG_MASK, at, 0, UINT32_MAX);
    for (int i = 0; i < b->globals; i++) {
        int j = (int)rng_below(&shuffle, (uint64_t)i + 1);
        rank[i] = rank[j];
        rank[j] = i;
    }
    for (int i = 0; i < views; i++) {
        int sample = i % B, crop = i / B, global = i < b->globals;
        const int16_t *pixels;
        const uint8_t *label_mask;
        const ShardSlice *s = dataset_slice(data, in->indices[sample], &pixels, &label_mask);
        if (crop == 0) in->slices[sample] = slice_of(c, s, pixels);
        Rng r = rng_at(seed, RNG_CROP, at, (uint64_t)sample, (uint32_t)crop);
        View *v = &in->views[i];
        *v = draw_crop(&r, c, s, global ? c->crops_global_scale_min : c->crops_local_scale_min,
                       global ? c->crops_global_scale_max : c->crops_local_scale_max);
        v->sample = sample;
        r = rng_at(seed, RNG_INTENSITY, at, (uint64_t)sample, (uint32_t)crop);
        draw_intensity(&r, c, v);
        if (!global || rank[i] >= masked) continue;
        // The anatomy's centre and spread on this crop's patch grid, mirrored with it.
        double row = (s->centre_row - v->top) * g / v->height, col = (s->centre_col - v->left) * g / v->width;
        r = rng_at(seed, RNG_MASK, at, (uint64_t)sample, (uint32_t)crop);
        draw_mask(&r, in->mask + (size_t)i * N, g, masked_patches(c, b->globals, rank[i], N), (int)c->mask_prior, row,
                  v->flip ? g - col : col, c->mask_prior_sigma * s->spread_row * g / v->height, c->mask_prior_sigma * s->spread_col * g / v->width);
    }

    for (int l = 0; l < c->model_depth && c->model_drop_path > 0; l++)
        for (int group = 0; group < 2; group++)
            for (int branch = 0; branch < 2; branch++) {
                Rng r = rng_at(seed, RNG_DROP_PATH, at, (uint64_t)l, (uint32_t)(2 * group + branch));
                rng_subset(&r, group ? b->locals : b->globals, b->kept[group], in->drop[group][branch] + (size_t)l * b->kept[group],
                           in->scratch);
            }

    int width = (int)(c->sigreg_on == SIGREG_CLS ? c->model_dim : c->dino_bottleneck);
    #pragma omp parallel for
    for (int m = 0; m < (in->directions ? c->sigreg_slices : 0); m++) {
        float *direction = in->directions + (size_t)m * width;
        double square = 0;
        Rng r = rng_at(seed, RNG_DIRECTIONS, at, (uint64_t)m, 0);
        for (int i = 0; i < width; i++) {
            direction[i] = (float)rng_normal(&r);
            square += (double)direction[i] * direction[i];
        }
        for (int i = 0; i < width; i++) direction[i] = (float)(direction[i] / sqrt(square));
    }
}

#endif
