/*
A volume as every reader of prep hands it over: int16 pixels on the file's own grid, and which way its axes run.

  RAW_*, raw_bytes     number types of voxels in files
  Volume               pixels, scale and intercept, spacing, orientation, notes
  volume_note          adds a remark to be shown and kept in the report
  volume_store         raw voxels of any type to int16, exactly where they are integers
  volume_view          rows, columns and slices of a volume in a plane
  volume_slice         one slice in Curia's orientation
*/
#ifndef CURIA_VOLUME_H
#define CURIA_VOLUME_H

#include "anatomy.h"

enum { RAW_U8, RAW_I8, RAW_U16, RAW_I16, RAW_U32, RAW_I32, RAW_U64, RAW_I64, RAW_F32, RAW_F64 };

static inline int raw_bytes(int type) { return (const int[]){1, 1, 2, 2, 4, 4, 8, 8, 4, 8}[type]; }

static inline double raw_at(const void *data, int type, size_t i) {
    switch (type) {
        case RAW_U8: return ((const uint8_t *)data)[i];
        case RAW_I8: return ((const int8_t *)data)[i];
        case RAW_U16: return ((const uint16_t *)data)[i];
        case RAW_I16: return ((const int16_t *)data)[i];
        case RAW_U32: return ((const uint32_t *)data)[i];
        case RAW_I32: return ((const int32_t *)data)[i];
        case RAW_U64: return (double)((const uint64_t *)data)[i];
        case RAW_I64: return (double)((const int64_t *)data)[i];
        case RAW_F32: return ((const float *)data)[i];
        default: return ((const double *)data)[i];
    }
}

typedef struct {
    int n[3];                // voxels along the file's axes, the first running fastest
    int16_t *pixels;         // [n[2]][n[1]][n[0]]
    float scale, intercept;  // value = scale * pixel + intercept
    double spacing[3];       // mm along the file's axes
    int axis[3], flip[3];    // per file axis: 0 left-right, 1 front-back, 2 foot-head; flip: it runs to R, A or I
    double low, high;        // range of the values, of those that are numbers
    int64_t not_numbers, clipped;
    int labels;              // it looks like a label image
    char notes[512];
} Volume;

__attribute__((format(printf, 2, 3))) static inline void volume_note(Volume *v, const char *format, ...) {
    size_t used = strlen(v->notes);
    va_list args;
    va_start(args, format);
    if (used && used + 3 < sizeof v->notes) strcpy(v->notes + used, "; "), used += 2;
    vsnprintf(v->notes + used, sizeof v->notes - used, format, args);
    va_end(args);
}

// Whether integer voxels in [low, high] are labels and not an image: none negative; and at most 8 different values, or at
// most 150 with at least half of the neighbours along the first axis, of those with one above the lowest, equal. A noisy
// 8-bit image has neighbours that differ; a probability map has more values.
static inline int volume_is_labels(const void *data, int type, const int n[3], double low, double high) {
    if (low < 0 || high > 65535) return 0;
    uint8_t *seen = (uint8_t *)xmalloc(65536, "a label check");
    size_t count = (size_t)n[0] * n[1] * n[2], pairs = 0, equal = 0;
    int distinct = 0;
    for (size_t i = 0; i < count; i++) {
        double x = raw_at(data, type, i), next = (i + 1) % n[0] ? raw_at(data, type, i + 1) : x;
        distinct += !seen[(int)x];
        seen[(int)x] = 1;
        if ((i + 1) % n[0] == 0 || (x == low && next == low)) continue;
        pairs++;
        equal += x == next;
    }
    free(seen);
    return distinct <= 8 || (distinct <= 150 && 2 * equal >= pairs);
}

static inline int raw_order(const void *a, const void *b) {
    return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b);
}

// The 99.99th percentile of the numbers among the voxels, from at most about a million of them, evenly spaced.
static inline double raw_top(const void *data, int type, size_t count) {
    size_t step = count / 1000003 + 1, kept = 0;
    double *sample = (double *)xmalloc((count / step + 1) * sizeof *sample, "a percentile");
    for (size_t i = 0; i < count; i += step) {
        double x = raw_at(data, type, i);
        if (isfinite(x)) sample[kept++] = x;
    }
    qsort(sample, kept, sizeof *sample, raw_order);
    double top = kept ? sample[(size_t)(0.9999 * (kept - 1))] : 0;
    free(sample);
    return top;
}

// Fills pixels, scale, intercept, range and counts of *v from voxels of v->n, whose value is slope * voxel + inter.
// Integers that span less than 65536 are kept exactly, and as the values themselves (scale 1, intercept 0) where slope is 1
// and they fit; anything else gets 65535 steps over its range, or up to the 99.99th percentile where a few voxels lie more
// than 16 times further out. What is not a number becomes the lowest value. 0 good, else -1 and *reason.
static inline int volume_store(Volume *v, const void *data, int type, double slope, double inter, char *reason, size_t size) {
    size_t count = (size_t)v->n[0] * v->n[1] * v->n[2];
    double low = INFINITY, high = -INFINITY;
    int whole = 1;
    for (size_t i = 0; i < count; i++) {
        double x = raw_at(data, type, i);
        if (!isfinite(x)) {
            v->not_numbers++;
            continue;
        }
        if (x < low) low = x;
        if (x > high) high = x;
        whole &= x == rint(x);
    }
    v->low = fmin(slope * low + inter, slope * high + inter);
    v->high = fmax(slope * low + inter, slope * high + inter);
    if (!(high > low) || !(v->high > v->low)) {
        snprintf(reason, size, isfinite(low) ? "constant: every voxel is %g" : "no voxel is a number", v->low);
        return -1;
    }
    if (!(v->high - v->low < 1e30) || !(fabs(v->low) < 1e30) || (float)((v->high - v->low) / 65534) == 0) {
        snprintf(reason, size, "values from %g to %g cannot be stored; rescale them", v->low, v->high);
        return -1;
    }
    v->labels = whole && v->not_numbers == 0 && volume_is_labels(data, type, v->n, low, high);
    double offset = 0, step = 1, fill = slope > 0 ? low : high;
    if (whole && high - low <= 65535) {
        if (slope == 1 && inter == rint(inter) && low + inter >= -32768 && high + inter <= 32767) offset = -inter;
        else if (low < -32768 || high > 32767) offset = low + 32768;
    } else {
        double top = raw_top(data, type, count);
        if (high - low > 16 * (top - low) && top > low) high = top;
        offset = 0.5 * (low + high);
        step = (high - low) / 65534;
    }
    v->scale = (float)(slope * step);
    v->intercept = (float)(slope * offset + inter);
    v->pixels = (int16_t *)xmalloc(count * sizeof *v->pixels, "a volume");
    for (size_t i = 0; i < count; i++) {
        double x = raw_at(data, type, i), p = rint(((isfinite(x) ? x : fill) - offset) / step);
        v->clipped += p > 32767;
        v->pixels[i] = (int16_t)fmax(-32768, fmin(32767, p));
    }
    if (v->not_numbers) volume_note(v, "%lld voxels are NaN or infinite: set to the lowest value", (long long)v->not_numbers);
    if (v->clipped) volume_note(v, "%lld outlying voxels clipped to %g", (long long)v->clipped, slope * high + inter);
    return 0;
}

// The axes of a plane, in the body: what is constant in a slice, what its rows and its columns run along, and which of
// them run against left, posterior, superior.
static const struct { int normal, down, across, down_inferior; } volume_planes[PLANE_COUNT] = {
    {2, 1, 0, 0}, {1, 2, 0, 1}, {0, 2, 1, 1}};

typedef struct { int rows, cols, slices, normal, down, across; float spacing_row, spacing_col, spacing_slice; } VolumeView;

// Sizes and spacings (mm) of a volume cut in `plane`; normal, down and across are the file's axes.
static inline VolumeView volume_view(const Volume *v, int plane) {
    int at[3] = {0};
    for (int a = 0; a < 3; a++) at[v->axis[a]] = a;
    int normal = at[volume_planes[plane].normal], down = at[volume_planes[plane].down], across = at[volume_planes[plane].across];
    return (VolumeView){v->n[down], v->n[across], v->n[normal], normal, down, across, (float)v->spacing[down],
                        (float)v->spacing[across], (float)v->spacing[normal]};
}

// Copies slice `number` (counted to superior, posterior or left) of `plane` to out [rows][cols]: axial rows to posterior
// and columns to left; coronal rows to inferior, columns to left; sagittal rows to inferior, columns to posterior.
static inline void volume_slice(const Volume *v, int plane, int number, int16_t *out) {
    VolumeView w = volume_view(v, plane);
    int64_t stride[3] = {1, v->n[0], (int64_t)v->n[0] * v->n[1]};
    int down_flip = v->flip[w.down] ^ volume_planes[plane].down_inferior, across_flip = v->flip[w.across];
    int64_t base = (v->flip[w.normal] ? w.slices - 1 - number : number) * stride[w.normal];
    for (int r = 0; r < w.rows; r++) {
        int64_t row = base + (down_flip ? w.rows - 1 - r : r) * stride[w.down];
        for (int c = 0; c < w.cols; c++)
            out[(int64_t)r * w.cols + c] = v->pixels[row + (across_flip ? w.cols - 1 - c : c) * stride[w.across]];
    }
}

#endif
