/*
Where the body is in a slice, and the statistics of a volume: what prep and the phantom write beside the pixels.

  anatomy_threshold   the value above which a pixel is body rather than air or noise
  slice_anatomy       body box, centre and spread of one slice
  Moments, moments_*  mean and unbiased standard deviation of a stream of values
*/
#ifndef CURIA_ANATOMY_H
#define CURIA_ANATOMY_H

#include "../dataloader.h"

// CT: -500 HU. Else: half-way from the 1st percentile (the noise) to Otsu's threshold (IEEE Trans. SMC 9, 1979) of the
// values between the 1st and 99.9th percentiles, 1024 bins; Otsu alone would call dark tissue noise. values: n of the
// whole volume, all finite.
static inline float anatomy_threshold(const float *values, size_t n, int modality) {
    if (modality == MODALITY_CT) return -500;
    enum { FINE = 65536, BINS = 1024 };
    float low = values[0], high = values[0];
    for (size_t i = 1; i < n; i++) {
        if (values[i] < low) low = values[i];
        if (values[i] > high) high = values[i];
    }
    if (!(high > low)) return high;
    uint64_t *fine = (uint64_t *)xmalloc(FINE * sizeof *fine, "a histogram");
    double per_bin = ((double)high - low) / FINE;
    for (size_t i = 0; i < n; i++) {
        int bin = (int)((values[i] - low) / per_bin);
        fine[bin < FINE ? bin : FINE - 1]++;
    }
    int from = 0, to = FINE - 1;
    uint64_t below = fine[0], above = fine[FINE - 1];
    while (below <= n / 100 && from < FINE - 2) below += fine[++from];
    while (above <= n / 1000 && to > from + 1) above += fine[--to];
    double count[BINS] = {0}, total = 0, sum = 0;
    for (int i = from; i <= to; i++) {
        int bin = (int)((int64_t)(i - from) * BINS / (to - from + 1));
        count[bin] += fine[i];
        total += fine[i];
        sum += (double)bin * fine[i];
    }
    free(fine);
    double left = 0, left_sum = 0, best = -1;
    int otsu = 0;
    for (int i = 0; i < BINS - 1; i++) {
        left += count[i];
        left_sum += i * count[i];
        if (left == 0 || left == total) continue;
        double apart = left_sum / left - (sum - left_sum) / (total - left), between = left * (total - left) * apart * apart;
        if (between > best) {
            best = between;
            otsu = i;
        }
    }
    return (float)(low + per_bin * (from + 0.5 * (otsu + 1) / BINS * (to - from + 1)));
}

// Fills box, centre and spread (pixels) of *s from values [rows][cols]: those of the largest 4-connected region of pixels
// above the threshold, after one erosion that cuts table and wires off; the whole slice where there is none.
// Returns the fraction of all pixels above the threshold.
static inline double slice_anatomy(const float *values, int rows, int cols, float threshold, ShardSlice *s) {
    int n = rows * cols, above = 0;
    uint8_t *state = (uint8_t *)xmalloc(n, "a body mask");  // 1: eroded foreground, not yet seen
    int *stack = (int *)xmalloc(n * sizeof *stack, "a body mask");
    for (int r = 0; r < rows; r++)
        for (int c = 0, i = r * cols; c < cols; c++, i++) {
            if (!(values[i] > threshold)) continue;
            above++;
            state[i] = (r == 0 || values[i - cols] > threshold) && (r == rows - 1 || values[i + cols] > threshold) &&
                       (c == 0 || values[i - 1] > threshold) && (c == cols - 1 || values[i + 1] > threshold);
        }
    s->box_top = s->box_left = 0;
    s->box_bottom = rows;
    s->box_right = cols;
    s->centre_row = 0.5f * rows;
    s->centre_col = 0.5f * cols;
    s->spread_row = rows / sqrtf(12);
    s->spread_col = cols / sqrtf(12);
    int largest = 0;
    for (int seed = 0; seed < n; seed++) {
        if (!state[seed]) continue;
        int top = rows, left = cols, bottom = 0, right = 0, size = 0, depth = 0;
        double sum_r = 0, sum_c = 0, sum_rr = 0, sum_cc = 0;
        stack[depth++] = seed;
        state[seed] = 0;
        while (depth) {
            int i = stack[--depth], r = i / cols, c = i % cols;
            size++;
            sum_r += r;
            sum_c += c;
            sum_rr += (double)r * r;
            sum_cc += (double)c * c;
            if (r < top) top = r;
            if (r >= bottom) bottom = r + 1;
            if (c < left) left = c;
            if (c >= right) right = c + 1;
            if (r > 0 && state[i - cols]) state[i - cols] = 0, stack[depth++] = i - cols;
            if (r < rows - 1 && state[i + cols]) state[i + cols] = 0, stack[depth++] = i + cols;
            if (c > 0 && state[i - 1]) state[i - 1] = 0, stack[depth++] = i - 1;
            if (c < cols - 1 && state[i + 1]) state[i + 1] = 0, stack[depth++] = i + 1;
        }
        if (size <= largest) continue;
        largest = size;
        double mean_r = sum_r / size, mean_c = sum_c / size;
        s->box_top = top > 0 ? top - 1 : 0;                 // the pixel that the erosion took
        s->box_left = left > 0 ? left - 1 : 0;
        s->box_bottom = bottom < rows ? bottom + 1 : rows;
        s->box_right = right < cols ? right + 1 : cols;
        s->centre_row = (float)(mean_r + 0.5);              // of pixel centres: pixel 0 spans 0..1
        s->centre_col = (float)(mean_c + 0.5);
        s->spread_row = fmaxf(0.5f, (float)sqrt(fmax(0, sum_rr / size - mean_r * mean_r)));
        s->spread_col = fmaxf(0.5f, (float)sqrt(fmax(0, sum_cc / size - mean_c * mean_c)));
    }
    free(state);
    free(stack);
    return (double)above / n;
}

typedef struct { double count, mean, squares; } Moments; // squares: sum of squared differences from the mean

// Adds n values, each no lower than `floor` (-INFINITY: as they are). Chan, Golub and LeVeque's pairwise update.
static inline void moments_add(Moments *m, const float *values, int n, double floor) {
    double sum = 0, squares = 0;
    for (int i = 0; i < n; i++) sum += fmax(values[i], floor);
    double mean = sum / n, total = m->count + n, apart = mean - m->mean;
    for (int i = 0; i < n; i++) squares += (fmax(values[i], floor) - mean) * (fmax(values[i], floor) - mean);
    m->squares += squares + apart * apart * m->count * n / total;
    m->mean += apart * n / total;
    m->count = total;
}

static inline double moments_std(const Moments *m) { return m->count > 1 ? sqrt(m->squares / (m->count - 1)) : 0; }

#endif
