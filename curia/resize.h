/*
Separable image resizing: each axis is a small matrix, out x in, applied as taps.

  Resize, resize_plan    the taps of one axis: PyTorch's antialiased bicubic, or plain bicubic with a given ratio (METHOD A.4)
  resize_image           an image by a vertical and a horizontal plan
  resize_image_adjoint   its transpose, for the position embedding's gradient
*/
#ifndef CURIA_RESIZE_H
#define CURIA_RESIZE_H

#include "config.h"
#include "real.h"

typedef struct {
    int in, out, taps;
    int *first;         // [out] first input index of each output's taps
    real *weight;       // [out, taps]
} Resize;

// Keys' cubic convolution kernel (IEEE Trans. ASSP 1981) with parameter a.
static inline double cubic_kernel(double x, double a) {
    x = fabs(x);
    if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
    if (x < 2) return ((a * (x - 5)) * x + 8 * a) * x - 4 * a;
    return 0;
}

// The taps from `in` to `out` samples. mode INTERPOLATE_ANTIALIAS: a = -0.5, support widened by in/out where that is above 1,
// taps outside the image dropped and the rest renormalised (PyTorch's antialias=True). INTERPOLATE_SIZE: a = -0.75, four taps
// at ratio in/out, indices clamped to the border, not renormalised. INTERPOLATE_OFFSET: the same at ratio in / (out + 0.1),
// DINOv2's way.
static inline Resize resize_plan(int in, int out, int mode) {
    Resize r = {in, out, 0, NULL, NULL};
    int antialias = mode == INTERPOLATE_ANTIALIAS;
    double ratio = mode == INTERPOLATE_OFFSET ? in / (out + 0.1) : (double)in / out;
    double stretch = antialias && ratio > 1 ? ratio : 1;
    r.taps = antialias ? (int)ceil(2 * stretch) * 2 + 1 : 4;
    if (r.taps > in) r.taps = in;
    r.first = (int *)xmalloc((size_t)out * sizeof(int), "resize taps");
    r.weight = (real *)xmalloc((size_t)out * (size_t)r.taps * sizeof(real), "resize taps");
    for (int i = 0; i < out; i++) {
        real *w = r.weight + (size_t)i * r.taps;
        double center = ratio * (i + 0.5);
        if (antialias) {
            int from = (int)(center - 2 * stretch + 0.5), to = (int)(center + 2 * stretch + 0.5);
            if (center - 2 * stretch + 0.5 < 0) from = 0;
            if (to > in) to = in;
            double total = 0;
            for (int j = from; j < to; j++) total += cubic_kernel((j + 0.5 - center) / stretch, -0.5);
            // the window is moved inside the image; taps it does not use stay zero
            r.first[i] = from + r.taps > in ? in - r.taps : from;
            for (int j = from; j < to; j++) w[j - r.first[i]] = (real)(cubic_kernel((j + 0.5 - center) / stretch, -0.5) / total);
        } else {
            double source = center - 0.5, left = floor(source);
            r.first[i] = (int)left - 1 < 0 ? 0 : (int)left - 1 + r.taps > in ? in - r.taps : (int)left - 1;
            for (int j = -1; j <= 2; j++) {
                int index = (int)left + j < 0 ? 0 : (int)left + j > in - 1 ? in - 1 : (int)left + j;
                w[index - r.first[i]] += (real)cubic_kernel(source - (left + j), -0.75);
            }
        }
    }
    return r;
}

static inline void resize_free(Resize *r) {
    free(r->first);
    free(r->weight);
}

// out[rows->out, cols->out, depth] from in[rows->in, cols->in, depth]; scratch: rows->in * cols->out * depth.
static inline void resize_image(const Resize *rows, const Resize *cols, int depth, const real *in, real *out, real *scratch) {
    for (int y = 0; y < rows->in; y++)
        for (int x = 0; x < cols->out; x++) {
            const real *w = cols->weight + (size_t)x * cols->taps, *from = in + ((size_t)y * cols->in + cols->first[x]) * depth;
            real *to = scratch + ((size_t)y * cols->out + x) * depth;
            if (depth == 1) {
                real sum = 0;
                SIMD_SUM(sum) for (int t = 0; t < cols->taps; t++) sum += w[t] * from[t];
                *to = sum;
            } else {
                for (int d = 0; d < depth; d++) to[d] = 0;
                for (int t = 0; t < cols->taps; t++) for (int d = 0; d < depth; d++) to[d] += w[t] * from[(size_t)t * depth + d];
            }
        }
    size_t stride = (size_t)cols->out * depth;
    for (int y = 0; y < rows->out; y++) {
        real *to = out + y * stride;
        for (size_t x = 0; x < stride; x++) to[x] = 0;
        for (int t = 0; t < rows->taps; t++) {
            const real w = rows->weight[(size_t)y * rows->taps + t], *from = scratch + (rows->first[y] + t) * stride;
            for (size_t x = 0; x < stride; x++) to[x] += w * from[x];
        }
    }
}

// Adds the transpose of resize_image: din[rows->in, cols->in, depth] += R^T dout. scratch: rows->in * cols->out * depth.
static inline void resize_image_adjoint(const Resize *rows, const Resize *cols, int depth, const real *dout, real *din,
                                        real *scratch) {
    size_t stride = (size_t)cols->out * depth;
    for (size_t i = 0; i < rows->in * stride; i++) scratch[i] = 0;
    for (int y = 0; y < rows->out; y++)
        for (int t = 0; t < rows->taps; t++) {
            const real w = rows->weight[(size_t)y * rows->taps + t], *from = dout + y * stride;
            real *to = scratch + (rows->first[y] + t) * stride;
            for (size_t x = 0; x < stride; x++) to[x] += w * from[x];
        }
    for (int y = 0; y < rows->in; y++)
        for (int x = 0; x < cols->out; x++) {
            const real *w = cols->weight + (size_t)x * cols->taps, *from = scratch + ((size_t)y * cols->out + x) * depth;
            real *to = din + ((size_t)y * cols->in + cols->first[x]) * depth;
            for (int t = 0; t < cols->taps; t++) for (int d = 0; d < depth; d++) to[(size_t)t * depth + d] += w[t] * from[d];
        }
}

#endif
