/*
Pixels on the GPU (METHOD E): raw int16 slices to normalised views, and views to patches.

  DeviceSlice, DeviceView     curia/backend.h's Slice and View as kernels see them
  slice_statistics            mean and standard deviation of whole slices, in double
  pixels_scratch              bytes of scratch that render_views needs
  render_views                crop, antialiased bicubic resize, clip below air, gamma, blur, z-score, jitter, flip
  gather_patches              pixels to the rows of the patch embedding's product

A view is rendered by one block from start to end, its images in global memory, which stays in L2. All phases work on
differences to the crop's first pixel: a constant crop is constant to the last bit whatever the taps round to, and a faint one
keeps its digits.
*/
#ifndef CURIA_CUDA_PIXELS_H
#define CURIA_CUDA_PIXELS_H

#include "../config.h"
#include "common.cuh"

typedef struct {
    const int16_t *pixels;              // [rows, cols]
    int rows, cols;
    double scale, intercept;            // value = scale * pixel + intercept
    double mean, std;                   // by slice_statistics, or by the host: the volume's
} DeviceSlice;

typedef struct {
    int slice, top, left, height, width, flip;
    float gamma, contrast, brightness, blur_sigma;
} DeviceView;

enum { PIXEL_BLOCK = 1024, PATCH_BLOCK = 256 };

// The same in every thread; as block_sum.
__device__ static inline double block_sum_double(double x) {
    __shared__ double part[WARP];
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    for (int offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    __syncthreads();
    if (lane == 0) part[warp] = x;
    __syncthreads();
    x = lane < warps ? part[lane] : 0;
    for (int offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

// A value against the slice's first, against cancellation in the sums.
__device__ static inline double shifted_value(const DeviceSlice &s, int pixel, int clip, double shift) {
    double v = s.scale * pixel + s.intercept;
    return (clip && v < -1000 ? -1000 : v) - shift;
}

// A block a slice: 8 pixels a thread at a time where they lie on 16 bytes.
static __global__ void __launch_bounds__(PIXEL_BLOCK) slice_statistics_kernel(DeviceSlice *slices, int clip) {
    DeviceSlice s = slices[blockIdx.x];
    size_t n = (size_t)s.rows * s.cols, head = (16 - (size_t)s.pixels % 16) % 16 / 2;
    if (head > n) head = n;
    size_t packs = (n - head) / 8;
    double shift = s.scale * s.pixels[0] + s.intercept, sum = 0, square = 0;
    for (size_t i = threadIdx.x; i < packs; i += blockDim.x) {
        Pack<int16_t> p = load_pack(s.pixels + head + 8 * i);
        for (int j = 0; j < 8; j++) {
            double v = shifted_value(s, p.v[j], clip, shift);
            sum += v;
            square += v * v;
        }
    }
    for (size_t i = threadIdx.x; i < n - 8 * packs; i += blockDim.x) {
        double v = shifted_value(s, s.pixels[i < head ? i : i + 8 * packs], clip, shift);
        sum += v;
        square += v * v;
    }
    sum = block_sum_double(sum);
    square = block_sum_double(square);
    if (threadIdx.x) return;
    slices[blockIdx.x].mean = shift + sum / n;
    slices[blockIdx.x].std = n > 1 ? sqrt(fmax(0.0, (square - sum * sum / n) / (n - 1))) : 0;
}

// mean and std (n-1) of every value of `count` slices, clipped below -1000 if asked.
static inline void slice_statistics(DeviceSlice *slices, int count, int clip, cudaStream_t stream) {
    if (!count) return;
    slice_statistics_kernel<<<count, PIXEL_BLOCK, 0, stream>>>(slices, clip);
    launched("slice_statistics_kernel");
}

// Taps of one axis: as curia/resize.h has them.
__host__ __device__ static inline int resize_taps(int in, int out) {
    int taps = (int)ceil(2 * (in > out ? (double)in / out : 1)) * 2 + 1;
    return taps < in ? taps : in;
}

// Keys' cubic kernel, a = -0.5.
__device__ static inline double cubic_tap(double x) {
    x = fabs(x);
    if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
    if (x < 2) return ((-0.5 * (x - 5)) * x - 4) * x + 2;
    return 0;
}

// first[out] and weight[taps, out] of curia/resize.h's resize_plan, antialiased (METHOD A.4); unused taps are 0.
__device__ static inline void plan_axis(int *first, float *weight, int in, int out) {
    double ratio = (double)in / out, stretch = ratio > 1 ? ratio : 1;
    int taps = resize_taps(in, out);
    for (int i = threadIdx.x; i < out; i += blockDim.x) {
        double center = ratio * (i + 0.5), total = 0;
        int from = max((int)(center - 2 * stretch + 0.5), 0), to = min((int)(center + 2 * stretch + 0.5), in);
        int start = from + taps > in ? in - taps : from;
        for (int j = from; j < to; j++) total += cubic_tap((j + 0.5 - center) / stretch);
        for (int t = 0; t < taps; t++) {
            int j = start + t;
            weight[t * out + i] = j >= from && j < to ? (float)(cubic_tap((j + 0.5 - center) / stretch) / total) : 0;
        }
        first[i] = start;
    }
}

// Nine taps along one axis with reflected borders: to[i] from from[i + j step], where i is the position `at` of `size`.
__device__ static inline float blur_taps(const float *from, const float *tap, int at, int size, int step) {
    float sum = 0;
    for (int j = -4; j <= 4; j++) {
        int k = at + j < 0 ? -(at + j) : at + j >= size ? 2 * (size - 1) - (at + j) : at + j;
        sum += tap[j < 0 ? -j : j] * from[(k - at) * step];
    }
    return sum;
}

// What a block keeps of the view at work; counts in elements. image: [height, size] between the resizes, then [size, size].
typedef struct { size_t image, col_weight, row_weight, total; } ViewScratch;

__host__ __device__ static inline ViewScratch view_scratch(int size, int most_height, int most_width) {
    ViewScratch s;
    s.image = (size_t)(most_height > size ? most_height : size) * size;
    s.col_weight = (size_t)resize_taps(most_width, size) * size;
    s.row_weight = (size_t)resize_taps(most_height, size) * size;
    s.total = s.image + s.col_weight + s.row_weight + (size_t)2 * size;
    return s;
}

// One block a view, as many views at a time as there are blocks. Between barriers a thread keeps to its own pixels
// i = thread, thread + block, ..
static __global__ void __launch_bounds__(PIXEL_BLOCK) render_views_kernel(float *images, float *scratch,
                                                                          const DeviceSlice *slices, const DeviceView *views,
                                                                          int count, int size, int clip, int normalize,
                                                                          ViewScratch plan) {
    float *image = scratch + blockIdx.x * plan.total, *col_weight = image + plan.image,
        *row_weight = col_weight + plan.col_weight;
    int *col_first = (int *)(row_weight + plan.row_weight), *row_first = col_first + size, n = size * size;
    for (int view = blockIdx.x; view < count; view += gridDim.x) {
        DeviceView v = views[view];
        const DeviceSlice *s = slices + v.slice;
        const int16_t *pixels = s->pixels + (size_t)v.top * s->cols + v.left;
        int cols = s->cols, base = pixels[0], col_taps = resize_taps(v.width, size), row_taps = resize_taps(v.height, size);
        double shift = s->scale * base + s->intercept;                      // image + shift are the slice's values
        float scale = (float)s->scale, air = (float)(-1000 - shift), *out = images + (size_t)view * n;
        plan_axis(col_first, col_weight, v.width, size);
        plan_axis(row_first, row_weight, v.height, size);
        __syncthreads();

        for (int i = threadIdx.x; i < v.height * size; i += blockDim.x) {
            int x = i % size;
            const int16_t *from = pixels + (size_t)(i / size) * cols + col_first[x];
            float sum = 0;
            for (int t = 0; t < col_taps; t++) sum += col_weight[t * size + x] * (from[t] - base);
            image[i] = sum;
        }
        __syncthreads();
        float least = INFINITY, most = -INFINITY;
        for (int i = threadIdx.x; i < n; i += blockDim.x) {
            int y = i / size, x = i % size;
            const float *from = image + (size_t)row_first[y] * size + x;
            float sum = 0;
            for (int t = 0; t < row_taps; t++) sum += row_weight[t * size + y] * from[t * size];
            sum *= scale;
            if (clip && sum < air) sum = air;
            least = fminf(least, sum);
            most = fmaxf(most, sum);
            out[i] = sum;
        }

        if (v.gamma != 1) {
            least = -block_max(-least);
            most = block_max(most);
            if (most > least)
                for (int i = threadIdx.x; i < n; i += blockDim.x)
                    out[i] = least + (most - least) * powf((out[i] - least) / (most - least), v.gamma);
        }
        if (v.blur_sigma > 0) {
            float tap[5], total = 0;
            for (int i = 0; i < 5; i++) total += (i ? 2 : 1) * (tap[i] = expf(-0.5f * i * i / (v.blur_sigma * v.blur_sigma)));
            for (int i = 0; i < 5; i++) tap[i] /= total;
            __syncthreads();
            for (int i = threadIdx.x; i < n; i += blockDim.x) image[i] = blur_taps(out + i, tap, i % size, size, 1);
            __syncthreads();
            for (int i = threadIdx.x; i < n; i += blockDim.x) out[i] = blur_taps(image + i, tap, i / size, size, size);
        }

        double mean = s->mean - shift, std = s->std;
        if (normalize == NORMALIZE_VIEW) {
            double sum = 0, square = 0;
            for (int i = threadIdx.x; i < n; i += blockDim.x) sum += out[i];
            mean = block_sum_double(sum) / n;
            for (int i = threadIdx.x; i < n; i += blockDim.x) square += (out[i] - mean) * (out[i] - mean);
            square = block_sum_double(square);
            std = n > 1 ? sqrt(square / (n - 1)) : 0;
        }
        float gain = (float)(v.contrast * (std < 1e-6 ? 1 : 1 / std));      // a constant image is only centred
        float center = (float)mean;
        __syncthreads();
        int half = (size + 1) / 2;
        for (int i = threadIdx.x; i < size * half; i += blockDim.x) {
            float *a = out + (size_t)(i / half) * size + i % half, *b = a + size - 1 - 2 * (i % half);
            float left = (*a - center) * gain + v.brightness, right = (*b - center) * gain + v.brightness;
            *a = v.flip ? right : left;
            *b = v.flip ? left : right;
        }
    }
}

enum { VIEWS_AT_ONCE = 264 };            // twice the multiprocessors of an H100, each of which runs one

// Views at a time: one block each, in at most 256 MiB of scratch.
static inline int views_at_once(int count, size_t floats_each) {
    size_t most = ((size_t)1 << 26) / floats_each;
    if (most > VIEWS_AT_ONCE) most = VIEWS_AT_ONCE;
    if (most < 1) most = 1;
    return (size_t)count < most ? count : (int)most;
}

static inline size_t pixels_scratch(int count, int size, int most_height, int most_width) {
    ViewScratch plan = view_scratch(size, most_height, most_width);
    return views_at_once(count, plan.total) * plan.total * sizeof(float);
}

// out[count, size, size], one channel, of `count` views. most_height, most_width: the largest among them. normalize:
// NORMALIZE_* of curia/config.h; all but the view's own statistics are the slice's mean and std.
static inline void render_views(float *out, float *scratch, const DeviceSlice *slices, const DeviceView *views, int count,
                                int size, int clip, int normalize, int most_height, int most_width, cudaStream_t stream) {
    if (!count) return;
    ViewScratch plan = view_scratch(size, most_height, most_width);
    render_views_kernel<<<views_at_once(count, plan.total), PIXEL_BLOCK, 0, stream>>>(out, scratch, slices, views, count, size,
                                                                                     clip, normalize, plan);
    launched("render_views_kernel");
}

// A block a patch.
static __global__ void gather_patches_kernel(floatX *patches, const float *pixels, int channels_in, int C, int size, int p) {
    int grid = size / p, image = blockIdx.x / (grid * grid), py = blockIdx.x / grid % grid, px = blockIdx.x % grid;
    for (int i = threadIdx.x; i < C * p * p; i += blockDim.x) {
        int channel = channels_in == 1 ? 0 : i / (p * p), y = i / p % p, x = i % p;
        patches[(size_t)blockIdx.x * C * p * p + i] =
            from_float<floatX>(pixels[(((size_t)image * channels_in + channel) * size + py * p + y) * size + px * p + x]);
    }
}

// patches[count N, C p p] of pixels[count, channels_in, size, size], N = (size / p)^2: one row a patch; channel, row, column
// within it. channels_in is C, or 1: all channels are that one.
static inline void gather_patches(floatX *patches, const float *pixels, int count, int channels_in, int C, int size, int p,
                                  cudaStream_t stream) {
    int grid = size / p;
    if (!count) return;
    gather_patches_kernel<<<count * grid * grid, PATCH_BLOCK, 0, stream>>>(patches, pixels, channels_in, C, size, p);
    launched("gather_patches_kernel");
}

#endif
