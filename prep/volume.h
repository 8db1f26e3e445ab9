/*
A volume as every reader of prep hands it over: int16 pixels on the file's own grid, and where that grid lies in the patient.

  modality_names, plane_names   words for the shards' small numbers
  RAW_*, raw_bytes     number types of voxels in files
  raw_invert           inverts stored values
  Volume               pixels, scale and intercept, geometry, orientation, notes
  volume_note          adds a remark to be shown and kept in the report
  volume_orient        spacing and orientation from the steps between voxels
  volume_store         raw voxels of any type to int16, exactly where they are integers
  volume_free          frees what a volume holds
  volume_same_grid     whether two volumes have their voxels at the same places
  VolumeView, volume_view   rows, columns and slices of a volume in a plane
  volume_file_slice, volume_slice   one slice in Curia's orientation, and where it lies in the file
*/
#ifndef CURIA_VOLUME_H
#define CURIA_VOLUME_H

#include "anatomy.h"

static const char *const modality_names[MODALITY_COUNT] = {"?", "CT", "MR"};
static const char *const plane_names[PLANE_COUNT] = {"axial", "coronal", "sagittal"};

enum { RAW_U8, RAW_I8, RAW_U16, RAW_I16, RAW_U32, RAW_I32, RAW_U64, RAW_I64, RAW_F32, RAW_F64 };

static inline int raw_bytes(int type) { return (const int[]){1, 1, 2, 2, 4, 4, 8, 8, 4, 8}[type]; }

typedef struct {
    int n[3];                // voxels along the file's axes, the first running fastest
    int16_t *pixels;         // [n[2]][n[1]][n[0]]
    float scale, intercept;  // value = scale * pixel + intercept
    float *slice_scale, *slice_intercept; // [n[2]] where the slices along axis 2 have their own, else NULL
    double origin[3];        // mm, LPS: the centre of voxel (0, 0, 0)
    double step[3][3];       // step[a]: mm, LPS, from a voxel to the next along file axis a
    double spacing[3];       // mm along the file's axes: the lengths of the steps
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

static inline void volume_free(Volume *v) {
    free(v->pixels);
    free(v->slice_scale);
    free(v->slice_intercept);
    v->pixels = NULL;
    v->slice_scale = v->slice_intercept = NULL;
}

// Fills spacing, axis and flip of *v from its steps: each file axis goes with the body axis that makes the sum of the
// cosines largest. Notes an oblique grid. 0 good, else -1 and *reason (size bytes).
static inline int volume_orient(Volume *v, char *reason, size_t size) {
    static const int orders[6][3] = {{0, 1, 2}, {0, 2, 1}, {1, 0, 2}, {1, 2, 0}, {2, 0, 1}, {2, 1, 0}};
    double cosine[3][3], det = 0, best = -1, least = 1;
    for (int a = 0; a < 3; a++) {
        const double *s = v->step[a];
        v->spacing[a] = sqrt(s[0] * s[0] + s[1] * s[1] + s[2] * s[2]);
        if (!(v->spacing[a] > 1e-3 && v->spacing[a] < 1e3)) {
            snprintf(reason, size, "a spacing of %g mm is not one of a body", v->spacing[a]);
            return -1;
        }
        for (int b = 0; b < 3; b++) cosine[a][b] = s[b] / v->spacing[a];
    }
    for (int b = 0; b < 3; b++)
        det += cosine[0][b] * (cosine[1][(b + 1) % 3] * cosine[2][(b + 2) % 3] - cosine[1][(b + 2) % 3] * cosine[2][(b + 1) % 3]);
    if (!(fabs(det) > 1e-4)) {
        snprintf(reason, size, "its axes do not span a volume: the orientation in the header is singular");
        return -1;
    }
    for (int i = 0; i < 6; i++) {
        double sum = 0;
        for (int a = 0; a < 3; a++) sum += fabs(cosine[a][orders[i][a]]);
        if (sum <= best + 1e-9) continue;
        best = sum;
        memcpy(v->axis, orders[i], sizeof v->axis);
    }
    for (int a = 0; a < 3; a++) {
        v->flip[a] = cosine[a][v->axis[a]] < 0;
        least = fmin(least, fabs(cosine[a][v->axis[a]]));
    }
    if (least < 0.94) volume_note(v, "oblique: axes %.0f degrees off the body's", acos(least) * 57.29578);
    return 0;
}

// Whether two volumes of one shape, seen in the body's axes, have all eight corner voxels within 1e-3 of the smallest
// spacing of each other.
static inline int volume_same_grid(const Volume *a, const Volume *b) {
    int at_a[3], at_b[3];
    double least = INFINITY;
    for (int i = 0; i < 3; i++) at_a[a->axis[i]] = i, at_b[b->axis[i]] = i;
    for (int i = 0; i < 3; i++) {
        if (a->n[at_a[i]] != b->n[at_b[i]]) return 0;
        least = fmin(least, a->spacing[i]);
    }
    for (int corner = 0; corner < 8; corner++)
        for (int k = 0; k < 3; k++) {
            double x = a->origin[k], y = b->origin[k];
            for (int i = 0; i < 3; i++) {
                int far = corner >> i & 1;
                x += (far ^ a->flip[at_a[i]]) * (a->n[at_a[i]] - 1) * a->step[at_a[i]][k];
                y += (far ^ b->flip[at_b[i]]) * (b->n[at_b[i]] - 1) * b->step[at_b[i]][k];
            }
            if (!(fabs(x - y) <= 1e-3 * least)) return 0;
        }
    return 1;
}

typedef struct { double low, high; int64_t not_numbers; int whole; } RawRange; // of the voxels that are numbers

// The loops over voxels, once per number type: range, label check's distinct values, and storing.
#define RAW_LOOPS(name, type, is_float) \
    static inline RawRange range_##name(const type *x, size_t n) { \
        RawRange r = {INFINITY, -INFINITY, 0, 1}; \
        type low = x[0], high = x[0]; \
        if (!is_float) { \
            for (size_t i = 0; i < n; i++) { \
                low = x[i] < low ? x[i] : low; \
                high = x[i] > high ? x[i] : high; \
            } \
            r.low = (double)low, r.high = (double)high; \
            return r; \
        } \
        for (size_t i = 0; i < n; i++) { \
            double v = (double)x[i]; \
            if (!isfinite(v)) { \
                r.not_numbers++; \
                continue; \
            } \
            r.low = v < r.low ? v : r.low; \
            r.high = v > r.high ? v : r.high; \
            r.whole &= v == rint(v); \
        } \
        return r; \
    } \
    static inline int labels_##name(const type *x, const int n[3], double low, uint8_t *seen) { \
        size_t pairs = 0, equal = 0; \
        int distinct = 0; \
        for (size_t row = 0; row < (size_t)n[1] * n[2]; row++, x += n[0]) \
            for (int i = 0; i < n[0]; i++) { \
                int v = (int)x[i]; \
                distinct += !seen[v]; \
                seen[v] = 1; \
                if (distinct > 150) return 0; \
                if (i + 1 == n[0] || (v == (int)low && x[i + 1] == x[i])) continue; \
                pairs++; \
                equal += x[i] == x[i + 1]; \
            } \
        return distinct <= 8 || 2 * equal >= pairs; \
    } \
    static inline int64_t store_##name(const type *x, size_t n, double fill, double offset, double step, int16_t *out) { \
        int64_t clipped = 0; \
        if (!is_float && step == 1) { \
            _Pragma("GCC ivdep")                /* out may be x */ \
            for (size_t i = 0; i < n; i++) out[i] = (int16_t)((int64_t)x[i] - (int64_t)offset); \
            return 0; \
        } \
        for (size_t i = 0; i < n; i++) { \
            double v = (double)x[i], p = rint(((isfinite(v) ? v : fill) - offset) / step); \
            clipped += p > 32767; \
            out[i] = (int16_t)(p < -32768 ? -32768 : p > 32767 ? 32767 : p); \
        } \
        return clipped; \
    }
#define RAW_TYPES(X) \
    X(u8, uint8_t, 0) X(i8, int8_t, 0) X(u16, uint16_t, 0) X(i16, int16_t, 0) X(u32, uint32_t, 0) X(i32, int32_t, 0) \
    X(u64, uint64_t, 0) X(i64, int64_t, 0) X(f32, float, 1) X(f64, double, 1)
RAW_TYPES(RAW_LOOPS)
#define RAW_CALL(loop, type, data, ...) \
    ((type) == RAW_U8 ? loop##_u8((const uint8_t *)(data), __VA_ARGS__) : (type) == RAW_I8 ? loop##_i8((const int8_t *)(data), __VA_ARGS__) \
     : (type) == RAW_U16 ? loop##_u16((const uint16_t *)(data), __VA_ARGS__) : (type) == RAW_I16 ? loop##_i16((const int16_t *)(data), __VA_ARGS__) \
     : (type) == RAW_U32 ? loop##_u32((const uint32_t *)(data), __VA_ARGS__) : (type) == RAW_I32 ? loop##_i32((const int32_t *)(data), __VA_ARGS__) \
     : (type) == RAW_U64 ? loop##_u64((const uint64_t *)(data), __VA_ARGS__) : (type) == RAW_I64 ? loop##_i64((const int64_t *)(data), __VA_ARGS__) \
     : (type) == RAW_F32 ? loop##_f32((const float *)(data), __VA_ARGS__) : loop##_f64((const double *)(data), __VA_ARGS__))

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

// Stored values x become sum - x: MONOCHROME1 about its stored range. Integer types.
static inline void raw_invert(void *data, int type, size_t n, int64_t sum) {
    for (size_t i = 0; i < n; i++) {
        int64_t x = sum - (int64_t)raw_at(data, type, i);
        if (raw_bytes(type) == 1) ((uint8_t *)data)[i] = (uint8_t)x;
        else if (raw_bytes(type) == 2) ((uint16_t *)data)[i] = (uint16_t)x;
        else if (raw_bytes(type) == 4 && type != RAW_F32) ((uint32_t *)data)[i] = (uint32_t)x;
    }
}

static inline int raw_order(const void *a, const void *b) {
    return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b);
}

// The 99.99th percentile of the numbers among the voxels, from about a hundred thousand of them, evenly spaced.
static inline double raw_top(const void *data, int type, size_t count) {
    size_t step = count / 100003 + 1, kept = 0;
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

// Whether integer voxels in [low, high] are labels and not an image: none negative; and at most 8 different values, or at
// most 150 with at least half of the neighbours along the first axis, of those with one above the lowest, equal. A noisy
// 8-bit image has neighbours that differ; a probability map has more values.
static inline int volume_is_labels(const void *data, int type, const int n[3], double low, double high) {
    if (low < 0 || high > 65535) return 0;
    uint8_t *seen = (uint8_t *)xmalloc(65536, "a label check");
    int labels = RAW_CALL(labels, type, data, n, low, seen);
    free(seen);
    return labels;
}

// Fills pixels, scale, intercept, range and counts of *v from voxels of v->n, whose value is slope * voxel + inter.
// Integers that span less than 65536 are kept exactly, and as the values themselves (scale 1, intercept 0) where slope is 1
// and they fit; anything else gets 65535 steps over its range, or up to the 99.99th percentile where a few voxels lie more
// than 16 times further out. What is not a number becomes the lowest value. Voxels of two bytes are stored where they are:
// *from, which came from malloc, becomes v->pixels and is then NULL. 0 good, else -1 and *reason.
static inline int volume_store(Volume *v, void **from, int type, double slope, double inter, char *reason, size_t size) {
    const void *data = *from;
    size_t count = (size_t)v->n[0] * v->n[1] * v->n[2];
    RawRange r = RAW_CALL(range, type, data, count);
    v->not_numbers = r.not_numbers;
    v->low = fmin(slope * r.low + inter, slope * r.high + inter);
    v->high = fmax(slope * r.low + inter, slope * r.high + inter);
    if (!(r.high > r.low) || !(v->high > v->low)) {
        snprintf(reason, size, isfinite(r.low) ? "constant: every voxel is %g" : "no voxel is a number", v->low);
        return -1;
    }
    if (!(v->high - v->low < 1e30) || !(fabs(v->low) < 1e30) || (float)((v->high - v->low) / 65534) == 0) {
        snprintf(reason, size, "values from %g to %g cannot be stored; rescale them", v->low, v->high);
        return -1;
    }
    v->labels = r.whole && v->not_numbers == 0 && volume_is_labels(data, type, v->n, r.low, r.high);
    double offset = 0, step = 1, fill = slope > 0 ? r.low : r.high;
    if (r.whole && r.high - r.low <= 65535) {
        if (slope == 1 && inter == rint(inter) && r.low + inter >= -32768 && r.high + inter <= 32767) offset = -inter;
        else if (r.low < -32768 || r.high > 32767) offset = r.low + 32768;
    } else {
        double top = raw_top(data, type, count);
        if (r.high - r.low > 16 * (top - r.low) && top > r.low) r.high = top;
        offset = 0.5 * (r.low + r.high);
        step = (r.high - r.low) / 65534;
    }
    v->scale = (float)(slope * step);
    v->intercept = (float)(slope * offset + inter);
    int in_place = type == RAW_U16 || type == RAW_I16;
    v->pixels = (int16_t *)(in_place ? *from : malloc(count * sizeof *v->pixels)); // all of it is written below
    if (in_place) *from = NULL;
    if (!v->pixels) {
        snprintf(reason, size, "%.1f GiB of voxels do not fit in memory", count * sizeof *v->pixels / 1073741824.0);
        return -1;
    }
    int there = in_place && offset == 0;        // two bytes always have step 1
    v->clipped = there ? 0 : RAW_CALL(store, type, data, count, fill, offset, step, v->pixels);
    if (v->not_numbers) volume_note(v, "%lld voxels are NaN or infinite: set to the lowest value", (long long)v->not_numbers);
    if (v->clipped) volume_note(v, "%lld outlying voxels clipped to %g", (long long)v->clipped, slope * r.high + inter);
    return 0;
}

// The axes of a plane, in the body: what is constant in a slice, what its rows and its columns run along, and which of
// them run against left, posterior, superior.
static const struct { int normal, down, across, down_inferior; } volume_planes[PLANE_COUNT] = {
    {2, 1, 0, 0}, {1, 2, 0, 1}, {0, 2, 1, 1}};
static const int plane_across[3] = {PLANE_SAGITTAL, PLANE_CORONAL, PLANE_AXIAL};    // the plane whose normal is a body axis

typedef struct { int rows, cols, slices, normal, down, across; float spacing_row, spacing_col, spacing_slice; } VolumeView;

// Sizes and spacings (mm) of a volume cut in `plane`; normal, down and across are the file's axes.
static inline VolumeView volume_view(const Volume *v, int plane) {
    int at[3] = {0};
    for (int a = 0; a < 3; a++) at[v->axis[a]] = a;
    int normal = at[volume_planes[plane].normal], down = at[volume_planes[plane].down], across = at[volume_planes[plane].across];
    return (VolumeView){v->n[down], v->n[across], v->n[normal], normal, down, across, (float)v->spacing[down],
                        (float)v->spacing[across], (float)v->spacing[normal]};
}

// The place along the file's own axis of slice `number`, which counts to superior, posterior or left.
static inline int volume_file_slice(const Volume *v, const VolumeView *w, int number) {
    return v->flip[w->normal] ? w->slices - 1 - number : number;
}

// Copies slice `number` of `plane` to out [rows][cols]: axial rows to posterior and columns to left; coronal rows to
// inferior, columns to left; sagittal rows to inferior, columns to posterior.
static inline void volume_slice(const Volume *v, int plane, int number, int16_t *out) {
    VolumeView w = volume_view(v, plane);
    int64_t stride[3] = {1, v->n[0], (int64_t)v->n[0] * v->n[1]};
    int down_flip = v->flip[w.down] ^ volume_planes[plane].down_inferior, across_flip = v->flip[w.across];
    const int16_t *base = v->pixels + volume_file_slice(v, &w, number) * stride[w.normal];
    int64_t across = across_flip ? -stride[w.across] : stride[w.across];
    for (int r = 0; r < w.rows; r++, out += w.cols) {
        const int16_t *row = base + (down_flip ? w.rows - 1 - r : r) * stride[w.down];
        if (across_flip) row += (w.cols - 1) * stride[w.across];
        if (across == 1) memcpy(out, row, w.cols * sizeof *out);
        else
            for (int c = 0; c < w.cols; c++) out[c] = row[c * across];
    }
}

#endif
