/*
Where the body is in a slice, and the statistics of a volume: what prep and the phantom write beside the pixels.

  anatomy_threshold   the value above which a pixel is body rather than air or noise
  anatomy_limit       that comparison of values, as one of stored pixels
  Mask, mask_*        an image of bits, 64 pixels a word: growing, shrinking, components, holes
  slice_anatomy       body box, centre and spread of one slice
  sums_deviations     mean and squared deviations from integer sums
  Moments, moments_*  mean and unbiased standard deviation of a stream of pixels
*/
#ifndef CURIA_ANATOMY_H
#define CURIA_ANATOMY_H

#include "../dataloader.h"

// CT: -500 HU. Else, from Otsu's threshold (IEEE Trans. SMC 9, 1979) of the values between the 1st and 99.9th percentiles: a
// quarter of the way to it from the former, because Otsu alone calls muscle and scalp noise where fat or brain is bright;
// raised to 3 times the commonest value below half-way, which is the deviation of the noise where air is not stored as zero
// (1.1 % of Rayleigh noise is above), unless that value is above the quarter: tissue, then, in an image without air. values: n
// of the whole volume, all finite.
static inline float anatomy_threshold(const float *values, size_t n, int modality) {
    if (modality == MODALITY_CT) return -500;
    enum { BINS = 65536 };
    float low = values[0], high = values[0];
    for (size_t i = 1; i < n; i++) {
        if (values[i] < low) low = values[i];
        if (values[i] > high) high = values[i];
    }
    if (!(high > low)) return high;
    uint64_t *count = (uint64_t *)xmalloc(BINS * sizeof *count, "a histogram");
    double per_bin = ((double)high - low) / BINS;
    for (size_t i = 0; i < n; i++) {
        int bin = (int)(((double)values[i] - low) / per_bin);
        count[bin < BINS ? bin : BINS - 1]++;
    }
    int from = 0, to = BINS - 1;
    uint64_t below = count[0], above = count[BINS - 1];
    while (below <= n / 100 && from < BINS - 2) below += count[++from];
    while (above <= n / 1000 && to > from + 1) above += count[--to];
    double all = 0, sum = 0, left = 0, left_sum = 0, best = -1, most = -1, noise = 0;
    int otsu = 0, first = from;
    for (int i = from; i <= to; i++) {
        all += count[i];
        sum += (double)(i - from) * count[i];
    }
    for (int i = from; i < to; i++) {
        left += count[i];
        left_sum += (double)(i - from) * count[i];
        if (left == 0 || left == all) continue;
        double apart = left_sum / left - (sum - left_sum) / (all - left), between = left * (all - left) * apart * apart;
        if (between > best) first = i;
        best = fmax(best, between);
        if (between == best) otsu = (first + i) / 2 - from + 1; // the middle of a gap
    }
    for (int k = 0; k < 32; k++) {
        double some = 0;
        for (int i = from + otsu * k / 64; i < from + otsu * (k + 1) / 64; i++) some += count[i];
        if (some > most) noise = otsu * (k + 0.5) / 64;
        most = fmax(most, some);
    }
    free(count);
    return (float)(low + per_bin * (from + fmax(0.25 * otsu, noise > 0.25 * otsu ? 0 : 3 * noise)));
}

// scale * pixel + intercept > value just where (pixel ^ *flip) >= the result (-32768..32768), so that no pixel need be
// converted. A scale below 0 turns the order round; *flip = -1 turns it back, for ~p = -1 - p.
static inline int anatomy_limit(float scale, float intercept, double value, int16_t *flip) {
    double pixel = (value - intercept) / scale;
    *flip = scale < 0 ? -1 : 0;
    return (int)fmin(fmax(scale < 0 ? -ceil(pixel) : floor(pixel) + 1, -32768), 32768);
}

// ------------------------------------------------------------------------------------------------------------------ masks

typedef struct {
    int rows, cols, words;   // words of a row; column c is bit c % 64 of word c / 64
    uint64_t *bits, *copy;   // [rows][words]; room for as many
} Mask;

typedef struct { int row, from, to, parent, area, edge; } Run; // columns from..to-1; area and edge: a root's component's

static inline void mask_not(Mask *m) {
    for (size_t i = 0; i < (size_t)m->rows * m->words; i++) m->bits[i] = ~m->bits[i];
    if (m->cols % 64)
        for (int r = 1; r <= m->rows; r++) m->bits[(size_t)r * m->words - 1] &= ~0ull >> (64 - m->cols % 64);
}

// Dilation: sets what is at most `down` rows and `across` columns from a bit that is set. A pass adds to the k on each side
// k + 1 more, not 2k + 1, which would come through bits outside the image; across, a shift stays below a word. May set bits
// past the last column; mask_not and mask_next do not count them.
static inline void mask_grow(Mask *m, int down, int across) {
    size_t words = m->words, n = m->rows * words;
    for (int k = 0, step; k < across; k += step) {
        step = across - k < k + 1 ? across - k : k + 1;
        if (step > 63) step = 63;
        for (size_t r = 0; r < n; r += words) {
            uint64_t left = 0;
            for (size_t i = r; i < r + words; i++) {
                uint64_t here = m->bits[i], right = i + 1 < r + words ? m->bits[i + 1] : 0;
                m->bits[i] = here | here << step | left >> (64 - step) | here >> step | right << (64 - step);
                left = here;
            }
        }
    }
    for (int k = 0, step; k < down; k += step) {
        step = down - k < k + 1 ? down - k : k + 1;
        memcpy(m->copy, m->bits, n * sizeof *m->bits);
        for (size_t i = step * words; i < n; i++) m->bits[i] |= m->copy[i - step * words];
        for (size_t i = step * words; i < n; i++) m->bits[i - step * words] |= m->copy[i];
    }
}

// Erosion: the complement grows. Outside the image counts as set: a body that the image cuts keeps its cut edge.
static inline void mask_shrink(Mask *m, int down, int across) {
    mask_not(m);
    mask_grow(m, down, across);
    mask_not(m);
}

// The first column from c on whose bit is set (inverse 0) or not (inverse ~0); cols where there is none. row: [words].
static inline int mask_next(const Mask *m, const uint64_t *row, int c, uint64_t inverse) {
    if (c >= m->cols) return m->cols;
    uint64_t word = (row[c / 64] ^ inverse) & ~0ull << c % 64;
    for (c /= 64; !word; word = row[c] ^ inverse)
        if (++c == m->words) return m->cols;
    c = 64 * c + __builtin_ctzll(word);
    return c < m->cols ? c : m->cols;
}

// Keeps of the 4-connected components those of at least 1/share of the largest's pixels; share 0: those that touch the
// image's edge. Returns the largest's pixels. Runs are joined by union-find (Rosenfeld and Pfaltz, J. ACM 13, 1966).
static inline int mask_keep(Mask *m, int share) {
    size_t words = m->words, count = 0;
    for (size_t i = 0; i < m->rows * words; i++) count += __builtin_popcountll(m->bits[i] & ~(m->bits[i] << 1)); // or a few more
    Run *runs = (Run *)xmalloc(count * sizeof *runs, "a body mask");
    int n = 0, above = 0, largest = 0;
    for (int r = 0; r < m->rows; r++) {
        const uint64_t *row = m->bits + r * words;
        int first = n;                          // above..first-1: the runs of the row before that may touch what follows
        for (int c = mask_next(m, row, 0, 0), to; c < m->cols; c = mask_next(m, row, to, 0), n++) {
            to = mask_next(m, row, c, ~0ull);
            runs[n] = (Run){r, c, to, n, to - c, r == 0 || r == m->rows - 1 || c == 0 || to == m->cols};
            while (above < first && runs[above].to <= c) above++;
            for (int a = above; a < first && runs[a].from < to; a++) {
                int i = n, j = a;
                while (runs[i].parent != i) i = runs[i].parent = runs[runs[i].parent].parent;
                while (runs[j].parent != j) j = runs[j].parent = runs[runs[j].parent].parent;
                if (i == j) continue;
                int root = i < j ? i : j, leaf = i + j - root;  // a parent never comes after its child
                runs[leaf].parent = root;
                runs[root].area += runs[leaf].area;
                runs[root].edge |= runs[leaf].edge;
            }
        }
        above = first;
    }
    for (int i = 0; i < n; i++) {
        runs[i].parent = runs[runs[i].parent].parent;
        if (runs[i].area > largest) largest = runs[i].area;
    }
    for (int i = 0; i < n; i++) {
        const Run *a = runs + i, *root = runs + a->parent;
        if (share ? (int64_t)root->area * share >= largest : root->edge) continue;
        for (int w = a->from / 64; w <= (a->to - 1) / 64; w++) {
            uint64_t from = w == a->from / 64 ? ~0ull << a->from % 64 : ~0ull;
            m->bits[a->row * words + w] &= ~(from & (w == (a->to - 1) / 64 ? ~0ull >> (63 - (a->to - 1) % 64) : ~0ull));
        }
    }
    free(runs);
    return largest;
}

// Sets the holes: what is not set and not connected with the image's edge.
static inline void mask_fill(Mask *m) {
    mask_not(m);
    mask_keep(m, 0);
    mask_not(m);
}

// Sets the bits of the pixels [rows][cols] with (pixel ^ flip) >= least and returns how many they are.
static inline int64_t mask_above(Mask *m, const int16_t *pixels, int least, int16_t flip) {
    int64_t above = 0;
    for (int r = 0; r < m->rows; r++, pixels += m->cols)
        for (int w = 0; w < m->words; w++) {
            uint8_t bytes[64] = {0};
            uint64_t word = 0, eight;
            int n = m->cols - 64 * w < 64 ? m->cols - 64 * w : 64;
            for (int c = 0; c < n; c++) bytes[c] = (pixels[64 * w + c] ^ flip) >= least;
            for (int b = 0; b < 8; b++) {       // the product brings the low bits of eight bytes into the highest
                memcpy(&eight, bytes + 8 * b, 8);
                word |= (eight * 0x0102040810204080 >> 56) << 8 * b;
            }
            m->bits[(size_t)r * m->words + w] = word;
            above += __builtin_popcountll(word);
        }
    return above;
}

// -------------------------------------------------------------------------------------------------------------- statistics

// From n > 0, the sum and the sum of squares of integers: the mean, and returns the sum of squared deviations from it. Nearly
// all of it in integers, so that nothing cancels.
static inline double sums_deviations(int64_t n, int64_t sum, int64_t squares, double *mean) {
    int64_t whole = sum / n, rest = sum - whole * n;
    *mean = whole + (double)rest / n;
    return squares - whole * (2 * sum - whole * n) - (double)rest * rest / n;
}

// Fills box, centre and spread of *s (pixels) from pixels [rows][cols]; reads its spacings and modality. The body is what is
// above the threshold and stays after an opening with a square of 8 mm (1/32 of the slice's shorter side where that is less,
// but 3 pixels), of every piece whose core has at least 1/32 of the largest core's pixels, with its holes. Where the largest is
// less than 1/16 of the foreground, the square's side is halved. Returns the fraction of all pixels above the threshold;
// where that is 0 the whole slice is the body.
static inline double slice_anatomy(const int16_t *pixels, int rows, int cols, float scale, float intercept, float threshold,
                                   ShardSlice *s) {
    int16_t flip;
    int least = anatomy_limit(scale, intercept, threshold, &flip);
    Mask m = {.rows = rows, .cols = cols, .words = (cols + 63) / 64};
    size_t n = (size_t)rows * m.words;
    m.bits = (uint64_t *)xmalloc(3 * n * sizeof *m.bits, "a body mask");
    m.copy = m.bits + n;
    uint64_t *foreground = m.bits + 2 * n;
    int64_t above = mask_above(&m, pixels, least, flip);
    if (!above) mask_not(&m);
    // In MR black bone parts the scalp from the brain. In CT a hollow table must not be filled here: it would be thick as a body.
    if (s->modality != MODALITY_CT) mask_fill(&m);
    memcpy(foreground, m.bits, n * sizeof *foreground);
    double reach = fmin(4, fmin((double)rows * s->spacing_row, (double)cols * s->spacing_col) / 64);
    int down = (int)fmax(1, reach / s->spacing_row - 0.5), across = (int)fmax(1, reach / s->spacing_col - 0.5);
    for (;; down /= 2, across /= 2) {           // table, blanket, wires and thin contacts go; fingers stay at a smaller radius
        mask_shrink(&m, down, across);
        if ((int64_t)mask_keep(&m, 32) * 16 >= above || !(down | across)) break;
        memcpy(m.bits, foreground, n * sizeof *foreground);
    }
    mask_grow(&m, 3 * down, 3 * across);        // brings thin walls of the chest back, so that the lungs are holes;
    for (size_t i = 0; i < n; i++) m.bits[i] &= foreground[i];
    mask_fill(&m);
    mask_shrink(&m, down, across);              // and what came back of table and wires goes again
    mask_grow(&m, down, across);
    int64_t size = 0, sum_r = 0, sum_c = 0, squares_r = 0, squares_c = 0;
    int top = rows, bottom = 0, left = cols, right = 0;
    for (int r = 0; r < rows; r++) {
        const uint64_t *row = m.bits + (size_t)r * m.words;
        for (int c = mask_next(&m, row, 0, 0), to; c < cols; c = mask_next(&m, row, to, 0)) {
            to = mask_next(&m, row, c, ~0ull);
            int64_t k = to - c, a = c, b = to;
            size += k;
            sum_r += k * r;
            squares_r += k * r * r;
            sum_c += k * (a + b - 1) / 2;
            squares_c += (b * (b - 1) * (2 * b - 1) - a * (a - 1) * (2 * a - 1)) / 6;
            top = r < top ? r : top;
            bottom = r + 1;
            left = c < left ? c : left;
            right = to > right ? to : right;
        }
    }
    free(m.bits);
    double mean_r, mean_c, deviations_r = sums_deviations(size, sum_r, squares_r, &mean_r),
                           deviations_c = sums_deviations(size, sum_c, squares_c, &mean_c);
    s->box_top = top, s->box_bottom = bottom, s->box_left = left, s->box_right = right;
    s->centre_row = (float)(mean_r + 0.5);      // of pixel centres: pixel 0 spans 0..1
    s->centre_col = (float)(mean_c + 0.5);
    s->spread_row = (float)fmax(0.5, sqrt(deviations_r / size));
    s->spread_col = (float)fmax(0.5, sqrt(deviations_c / size));
    return (double)above / ((double)rows * cols);
}

typedef struct { double count, mean, squares; } Moments; // squares: sum of squared differences from the mean

// Joins `count` more values of that mean and sum of squared differences (Chan, Golub and LeVeque, 1979).
static inline void moments_join(Moments *m, double count, double mean, double squares) {
    double total = m->count + count, apart = mean - m->mean;
    if (count == 0) return;
    m->squares += squares + apart * apart * m->count * count / total;
    m->mean += apart * count / total;
    m->count = total;
}

// Adds n pixels' values, each no lower than `floor` (-INFINITY: as they are): those above it by integer sums, then the rest.
static inline void moments_add(Moments *m, const int16_t *pixels, int n, float scale, float intercept, double floor) {
    int16_t flip;
    int least = anatomy_limit(scale, intercept, floor, &flip);
    int64_t count = 0, sum = 0, squares = 0;
    for (int i = 0; i < n;) {
        int end = n - i < 32768 ? n : i + 32768, some = 0, part = 0;    // 32 bits are enough for these, and twice as fast
        for (; i < end; i++) {
            int above = (pixels[i] ^ flip) >= least, pixel = above ? pixels[i] : 0;
            some += above;
            part += pixel;
            squares += (int64_t)pixel * pixel;
        }
        count += some;
        sum += part;
    }
    double mean = 0, deviations = count ? sums_deviations(count, sum, squares, &mean) : 0;
    moments_join(m, (double)count, scale * mean + intercept, (double)scale * scale * deviations);
    moments_join(m, (double)(n - count), floor, 0);
}

static inline double moments_std(const Moments *m) { return m->count > 1 ? sqrt(m->squares / (m->count - 1)) : 0; }

#endif
