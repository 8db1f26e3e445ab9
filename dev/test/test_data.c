/*
Tests of dataloader.h, prep/anatomy.h and prep/phantom.h. Prints a line for each failure, then
`N passed, N failed`; exit status 1 if any failed.

  gcc -std=gnu11 -O2 -I. dev/test/test_data.c -o test_data -lpthread -lm && ./test_data

  test_order      epoch_index is a permutation, differs by seed and epoch, and mixes
  test_weights    the proportions of a mixture are exact and each set walks its own epochs
  test_shards     what is written is read; every flipped byte and every shorter length is refused
  test_dataset    many shards in few mappings, lazily; identity; class names; prefetch finds a bad slice
  test_writer     an unfinished or failing write leaves nothing
  test_body       box, centre and spread of drawn CT slices: tables, lungs, limbs, metal, padding, odd sizes
  test_head       a drawn MR slice, and thresholds
  test_masks      the anatomy of random masks and dilations against their definition, pixel by pixel
  test_moments    comparisons of pixels, mean and deviation against doubles
  test_phantom    the same seed gives the same bytes; patients of train and eval are apart
*/
#define DATASET_MAX_OPEN 8
#include <signal.h>
#include <sys/wait.h>

#include "check.h"
#include "prep/phantom.h"

static char folder[64];

static const char *in_folder(const char *name) {
    static char path[8][512];
    static int next;
    next = (next + 1) % 8;
    snprintf(path[next], sizeof path[next], "%s/%s", folder, name);
    return path[next];
}

// Runs `body` in a child; gives its exit status and, in text, what it wrote to stderr.
static char text[4096];
static int status_of(void (*body)(void *), void *argument) {
    int pipe_ends[2], status;
    if (pipe(pipe_ends)) return -1;
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        dup2(pipe_ends[1], 2);
        close(pipe_ends[0]);
        body(argument);
        _exit(0);
    }
    close(pipe_ends[1]);
    ssize_t n = 0, got;
    while ((got = read(pipe_ends[0], text + n, sizeof text - 1 - n)) > 0) n += got;
    text[n] = 0;
    close(pipe_ends[0]);
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

static int one_line(void) { return strlen(text) > 1 && strchr(text, '\n') == text + strlen(text) - 1; }

static void test_order(void) {
    uint64_t sizes[] = {1, 2, 3, 4, 5, 1000, 65536, 65537, (1 << 20) + 1};
    for (int i = 0; i < (int)(sizeof sizes / sizeof *sizes); i++) {
        uint64_t n = sizes[i], bad = 0, same_epoch = 0, same_seed = 0, in_place = 0;
        uint8_t *seen = xmalloc(n, "a test");
        for (uint64_t k = 0; k < n; k++) {
            uint64_t at = epoch_index(7, 3, k, n);
            bad += at >= n || seen[at]++;
            same_epoch += at == epoch_index(7, 4, k, n);
            same_seed += at == epoch_index(8, 3, k, n);
            in_place += at == k;
        }
        check(!bad, "epoch_index over %llu is not a permutation: %llu positions clash", (unsigned long long)n,
              (unsigned long long)bad);
        if (n >= 1000)
            check(same_epoch < 20 && same_seed < 20 && in_place < 20,
                  "epoch_index over %llu repeats: %llu, %llu, %llu fixed points (1 expected)", (unsigned long long)n,
                  (unsigned long long)same_epoch, (unsigned long long)same_seed, (unsigned long long)in_place);
        free(seen);
    }
    // 4e8: the first 2^20 images differ pairwise, lie in range, and fill 64 bins evenly.
    enum { N = 1 << 20 };
    uint64_t count = 400000000, *value = xmalloc(N * sizeof *value, "a test"), bins[64] = {0}, bad = 0;
    uint8_t *seen = xmalloc(count / 8 + 1, "a test");
    for (uint64_t k = 0; k < N; k++) {
        value[k] = epoch_index(1, 0, k, count);
        bad += value[k] >= count || (seen[value[k] / 8] >> value[k] % 8 & 1);
        seen[value[k] / 8] |= (uint8_t)(1 << value[k] % 8);
        bins[value[k] * 64 / count]++;
    }
    double chi = 0, rising = 0;
    for (int i = 0; i < 64; i++) chi += (bins[i] - N / 64.0) * (bins[i] - N / 64.0) / (N / 64.0);
    for (int k = 1; k < N; k++) rising += value[k] > value[k - 1];
    check(!bad, "epoch_index over 4e8: %llu of the first 2^20 clash or are out of range", (unsigned long long)bad);
    check(chi < 120 && chi > 25, "epoch_index over 4e8: chi-square of 64 bins is %.1f, and 63 is expected", chi);
    check(fabs(rising / N - 0.5) < 0.004, "epoch_index over 4e8: %.4f of the steps rise, and half is expected", rising / N);
    free(value);
    free(seen);
    // Small counts must not favour an order: all 6 of 3, over seeds.
    int orders[27] = {0}, least = 1 << 30;
    for (uint64_t seed = 0; seed < 6000; seed++)
        orders[epoch_index(seed, 0, 0, 3) * 9 + epoch_index(seed, 0, 1, 3) * 3 + epoch_index(seed, 0, 2, 3)]++;
    for (int i = 0; i < 27; i++) if (orders[i] && orders[i] < least) least = orders[i];
    check(least > 700, "epoch_index over 3: one of the orders comes %d times in 6000, and 1000 is expected", least);
}

static ShardSlice example(int rows, int cols, int i) {
    return (ShardSlice){.volume_id = 10 + i / 3,
                        .patient_id = 5,
                        .rows = rows,
                        .cols = cols,
                        .slice_number = i % 3,
                        .volume_slices = 3,
                        .spacing_row = 1,
                        .spacing_col = 1.5f,
                        .spacing_slice = 3,
                        .scale = 0.5f,
                        .intercept = -1,
                        .modality = MODALITY_CT,
                        .plane = PLANE_AXIAL,
                        .box_bottom = rows,
                        .box_right = cols,
                        .centre_row = 1,
                        .centre_col = 1,
                        .spread_row = 1,
                        .spread_col = 1,
                        .label = i % 2,
                        .target = NAN,
                        .volume_std = 1,
                        .volume_std_clipped = 1};
}

// A shard of n slices, the odd ones with a mask; pixel j of slice i is 100 i + j + first.
static void write_shard(const char *path, int n, int first, const char *names) {
    ShardWriter w;
    shard_writer_open(&w, path);
    for (int i = 0; i < n; i++) {
        int rows = 3 + i % 2, cols = 5 + i % 3;
        int16_t pixels[64];
        uint8_t mask[64];
        ShardSlice s = example(rows, cols, i);
        for (int j = 0; j < rows * cols; j++) pixels[j] = (int16_t)(100 * i + j + first), mask[j] = (uint8_t)(j % 2);
        shard_writer_add(&w, &s, pixels, i % 2 ? mask : NULL);
    }
    shard_writer_close(&w, names);
}

static uint8_t *read_all(const char *path, long *bytes) {
    FILE *f = fopen(path, "rb");
    fseek(f, 0, SEEK_END);
    *bytes = ftell(f);
    rewind(f);
    uint8_t *data = malloc(*bytes);
    if (fread(data, 1, *bytes, f) != (size_t)*bytes) exit(STATUS_FAILED);
    fclose(f);
    return data;
}

static void write_all(const char *path, const uint8_t *data, long bytes) {
    FILE *f = fopen(path, "wb");
    if (fwrite(data, 1, bytes, f) != (size_t)bytes || fclose(f)) exit(STATUS_FAILED);
}

static void use_shard(void *path) {
    const char *paths[1] = {path};
    Dataset *d = dataset_open(paths, 1);
    for (uint64_t i = 0; i < dataset_count(d); i++) dataset_verify_slice(d, i);
    dataset_close(d);
}

static void test_shards(void) {
    const char *path = in_folder("one.shard"), *bad = in_folder("bad.shard");
    char reason[256];
    write_shard(path, 7, 0, "lung\nliver\n");
    check(shard_check(path, reason, sizeof reason) == 0, "a fresh shard is refused: %s", reason);
    Dataset *d = dataset_open(&path, 1);
    check(dataset_count(d) == 7, "7 slices written, %llu read", (unsigned long long)dataset_count(d));
    for (int i = 0; i < 7; i++) {
        const int16_t *pixels;
        const uint8_t *mask;
        const ShardSlice *s = dataset_slice(d, i, &pixels, &mask);
        ShardSlice e = example(3 + i % 2, 5 + i % 3, i);
        e.pixel_offset = s->pixel_offset, e.mask_offset = s->mask_offset, e.checksum = s->checksum;
        int same = memcmp(&e, s, sizeof e) == 0 && (uintptr_t)pixels % SHARD_ALIGN == 0 && (mask != NULL) == i % 2;
        for (int j = 0; same && j < s->rows * s->cols; j++) same = pixels[j] == 100 * i + j && (!mask || mask[j] == j % 2);
        check(same, "slice %d is not read as it was written", i);
    }
    char *name = dataset_class_name(d, 1);
    check(name && !strcmp(name, "liver"), "class 1 is called %s", name ? name : "nothing");
    check(!dataset_class_name(d, 2) && !dataset_class_name(d, -1), "a class that is not there has a name");
    free(name);
    dataset_close(d);
    long bytes;
    uint8_t *data = read_all(path, &bytes);
    int missed = 0, misnamed = 0;
    for (long i = 0; i < bytes; i++)
        for (int bit = 1; bit < 256; bit <<= 3) {
            data[i] ^= bit;
            write_all(bad, data, bytes);
            missed += shard_check(bad, reason, sizeof reason) == 0;
            data[i] ^= bit;
        }
    check(missed == 0, "%d flipped bits of %ld bytes were not noticed", missed, bytes);
    missed = 0;
    for (long n = 0; n < bytes; n++) {
        write_all(bad, data, n);
        missed += shard_check(bad, reason, sizeof reason) == 0;
    }
    write_all(bad, data, bytes);
    FILE *longer = fopen(bad, "ab");
    fputc(0, longer);
    fclose(longer);
    check(missed == 0 && shard_check(bad, reason, sizeof reason), "%d of %ld shorter files, or a longer one, were taken",
          missed, bytes);
    // The same through the dataset, in a child: status 3, one line, the file's name, never a crash.
    missed = 0;
    for (long i = 0; i < bytes; i += 5) {
        data[i] ^= 0x41;
        write_all(bad, data, bytes);
        missed += status_of(use_shard, (void *)bad) != STATUS_DATA;
        misnamed += !one_line() || !strstr(text, bad);
        data[i] ^= 0x41;
    }
    check(missed == 0 && misnamed == 0,
          "through the dataset: %d flips not refused with status 3, %d without one line that names the file", missed, misnamed);
    // Records that make no sense under checksums that are right.
    const ShardHeader *h = (const ShardHeader *)data;
    struct { size_t at; uint32_t value; const char *what;
    } wrongs[] = {{offsetof(ShardSlice, rows), 0, "0 rows"},
                  {offsetof(ShardSlice, cols), 1 << 20, "a million columns"},
                  {offsetof(ShardSlice, rows), 0xffffffff, "-1 rows"},
                  {offsetof(ShardSlice, rows), 20000, "more rows than there are pixels"},
                  {offsetof(ShardSlice, scale), 0x7f800000, "an infinite scale"},
                  {offsetof(ShardSlice, scale), 0x7fc00000, "a scale that is NaN"},
                  {offsetof(ShardSlice, scale), 0, "a scale of 0"},
                  {offsetof(ShardSlice, pixel_offset), 1 << 30, "pixels outside"},
                  {offsetof(ShardSlice, mask_offset), 4, "a mask elsewhere"},
                  {offsetof(ShardSlice, box_right), 1000, "a box outside"},
                  {offsetof(ShardSlice, spread_row), 0, "no spread"},
                  {offsetof(ShardSlice, centre_col), 0x7fc00000, "a centre that is NaN"},
                  {offsetof(ShardSlice, spacing_row), 0x80000000, "a spacing of -0"},
                  {offsetof(ShardSlice, slice_number), 9, "slice 9 of 3"},
                  {offsetof(ShardSlice, volume_std), 0xbf800000, "a negative deviation"}};
    for (int i = 0; i < (int)(sizeof wrongs / sizeof *wrongs); i++) {
        uint8_t *copy = malloc(bytes);
        memcpy(copy, data, bytes);
        memcpy(copy + h->index_offset + wrongs[i].at, &wrongs[i].value, 4);
        ShardHeader *g = (ShardHeader *)copy;
        g->index_checksum = checksum(copy + g->index_offset, bytes - g->index_offset);
        g->header_checksum = checksum(g, sizeof *g - 8);
        write_all(bad, copy, bytes);
        check(shard_check(bad, reason, sizeof reason) && strstr(reason, "slice 0"), "a record with %s is taken", wrongs[i].what);
        free(copy);
    }
    struct { size_t at; uint64_t value; const char *what, *says;
    } headers[] = {{offsetof(ShardHeader, version), 1 | (uint64_t)sizeof(ShardSlice) << 32, "version 1", "version 1"},
                   {offsetof(ShardHeader, slices), UINT64_MAX / 100, "too many slices", "outside"},
                   {offsetof(ShardHeader, index_offset), 0, "an index at 0", "outside"},
                   {offsetof(ShardHeader, index_offset), (uint64_t)1 << 62, "an index far away", "outside"},
                   {offsetof(ShardHeader, slices), 6, "a slice too few", "outside"},
                   {offsetof(ShardHeader, names_bytes), 1, "fewer names", "outside"}};
    for (int i = 0; i < (int)(sizeof headers / sizeof *headers); i++) {
        uint8_t *copy = malloc(bytes);
        memcpy(copy, data, bytes);
        memcpy(copy + headers[i].at, &headers[i].value, 8);
        ShardHeader *g = (ShardHeader *)copy;
        g->header_checksum = checksum(g, sizeof *g - 8);
        write_all(bad, copy, bytes);
        check(shard_check(bad, reason, sizeof reason) && strstr(reason, headers[i].says), "a header with %s: %s",
              headers[i].what, reason);
        free(copy);
    }
    unlink(bad);
    free(data);
}

static void open_nothing(void *path) { dataset_open((const char *const *)&path, 1); }
static void ask_class(void *dataset) { dataset_class_name(dataset, 0); }
static void wait_prefetch(void *dataset) {
    Prefetch *p = prefetch_start(dataset);
    uint64_t good[3] = {0, 1, 2}, bad[3] = {3, 4, 5};
    prefetch_request(p, good, 3);
    prefetch_wait(p);
    prefetch_request(p, bad, 3);
    fprintf(stderr, ".");
    prefetch_wait(p);
}

static void test_dataset(void) {
    char name[64];
    mkdir(in_folder("many"), 0777);
    mkdir(in_folder("empty"), 0777);
    for (int i = 0; i < 40; i++) {
        snprintf(name, sizeof name, "many/%02d.shard", i);
        write_shard(in_folder(name), 3, 1000 + 300 * i, i < 39 ? "a\nb\n" : "a\nc\n");
    }
    const char *many = in_folder("many"), *two[2] = {in_folder("many/39.shard"), in_folder("many/00.shard")},
               *other[2] = {two[1], two[0]};
    Dataset *d = dataset_open(&many, 1);
    check(dataset_count(d) == 120, "40 shards of 3 are %llu slices", (unsigned long long)dataset_count(d));
    int open = 0, bad = 0;
    for (int i = 0; i < 40; i++) open += d->shards[i].mapping != NULL;
    check(open == 0, "%d shards are mapped before any is used", open);
    for (int round = 0; round < 2000; round++) {
        const int16_t *pixels[3];
        uint64_t at[3];
        for (int k = 0; k < 3; k++) dataset_slice(d, at[k] = epoch_index(1, 0, 3 * round + k, 6000) % 120, &pixels[k], NULL);
        for (int k = 0; k < 3; k++) bad += pixels[k][4] != (int16_t)(1000 + 300 * (at[k] / 3) + 100 * (at[k] % 3) + 4);
        for (int i = open = 0; i < 40; i++) open += d->shards[i].mapping != NULL;
        bad += open > DATASET_MAX_OPEN;
    }
    check(bad == 0, "%d slices wrong, or more than %d shards open", bad, DATASET_MAX_OPEN);
    check(status_of(ask_class, d) == STATUS_DATA && one_line(), "shards with different class names: %s", text);
    Dataset *e = dataset_open(two, 2), *f = dataset_open(other, 2);
    check(dataset_identity(e) != dataset_identity(f) && dataset_identity(e) != dataset_identity(d),
          "identity does not see the order of shards");
    rename(two[0], in_folder("moved.shard"));
    two[0] = in_folder("moved.shard");
    Dataset *g = dataset_open(two, 2);
    check(dataset_identity(e) == dataset_identity(g), "identity changes with a path");
    // A flipped pixel in slice 4: the next batch fails, the one before does not.
    long bytes;
    uint8_t *data = read_all(in_folder("many/01.shard"), &bytes);
    data[sizeof(ShardHeader) + 64 + 5] ^= 1;
    write_all(in_folder("many/01.shard"), data, bytes);
    free(data);
    dataset_close(d);
    rename(two[0], in_folder("many/39.shard"));
    d = dataset_open(&many, 1);
    check(status_of(wait_prefetch, d) == STATUS_DATA && text[0] == '.' && one_line() && strstr(text, "many/01.shard is damaged") &&
              strstr(text, "slice 1"),
          "prefetch of a flipped pixel says: %s", text);
    Prefetch *p = prefetch_start(d);
    uint64_t list[100];
    for (int round = 0; round < 50; round++) {
        for (int i = 0; i < 100; i++) list[i] = 6 + (round * 37 + i) % 114;
        prefetch_request(p, list, 100);
        for (int i = 0; i < 3; i++) dataset_slice(d, 6 + i, NULL, NULL);
    }
    prefetch_wait(p);
    prefetch_stop(p);
    check(status_of(open_nothing, (void *)in_folder("empty")) == STATUS_DATA && one_line() && strstr(text, "no *.shard"),
          "an empty folder: %s", text);
    check(status_of(open_nothing, (void *)in_folder("absent")) == STATUS_DATA && one_line(), "an absent folder: %s", text);
    dataset_close(d);
    dataset_close(e);
    dataset_close(f);
    dataset_close(g);
}

static void bad_weights(void *dataset) { dataset_set_weights(dataset, (const double[]){1, -1, 1}, 3); }

static void test_weights(void) {
    const char *paths[3] = {in_folder("w0.shard"), in_folder("w1.shard"), in_folder("w2.shard")};
    int counts[3] = {5, 7, 2};
    for (int i = 0; i < 3; i++) write_shard(paths[i], counts[i], 0, NULL);
    Dataset *d = dataset_open(paths, 3);
    Sampler s = {.seed = 11};
    int seen[14] = {0}, bad = 0;
    for (uint64_t k = 0; k < 14 * 3; k++) seen[sampler_index(&s, d, k)]++;
    for (int i = 0; i < 14; i++) bad += seen[i] != 3;
    check(bad == 0, "without weights 3 epochs do not take every slice 3 times");
    const double weights[3] = {0.5, 0.3, 0.2};
    dataset_set_weights(d, weights, 3);
    double drawn[3] = {0}, worst = 0;
    int set_seen[14] = {0};
    for (uint64_t k = 0; k < 100000; k++) {
        uint64_t at = sampler_index(&s, d, k);
        int set = at < 5 ? 0 : at < 12 ? 1 : 2;
        drawn[set]++;
        set_seen[at]++;
        for (int i = 0; i < 3; i++) worst = fmax(worst, fabs(drawn[i] - weights[i] * (k + 1)));
        // at each end of an epoch of a set, its slices have come equally often
        if (drawn[set] == floor(drawn[set] / counts[set]) * counts[set])
            for (int i = 0; i < 14; i++) if ((i < 5 ? 0 : i < 12 ? 1 : 2) == set) bad += set_seen[i] != drawn[set] / counts[set];
    }
    check(worst <= 2, "the counts of a mixture stray by %.2f from its weights", worst);
    check(drawn[0] == 50000 && fabs(drawn[1] - 30000) <= 1 && fabs(drawn[2] - 20000) <= 1, "of 100000: %.0f, %.0f, %.0f", drawn[0],
          drawn[1], drawn[2]);
    check(bad == 0, "a set of a mixture does not walk its own epochs");
    const double zero[3] = {0, 2, 0};
    dataset_set_weights(d, zero, 3);
    for (uint64_t k = 0; k < 700; k++) bad += sampler_index(&s, d, k) < 5 || sampler_index(&s, d, k) >= 12;
    check(bad == 0, "a set of weight 0 is drawn");
    check(status_of(bad_weights, d) == STATUS_USAGE && one_line(), "a negative weight: %s", text);
    dataset_close(d);
}

static void writer_fails(void *path) {
    signal(SIGXFSZ, SIG_IGN);
    struct rlimit limit = {20000, 20000};
    setrlimit(RLIMIT_FSIZE, &limit);
    write_shard(path, 500, 0, NULL);
}

static void test_writer(void) {
    const char *path = in_folder("full.shard"), *partial = in_folder("full.shard.partial");
    check(status_of(writer_fails, (void *)path) == STATUS_FAILED && one_line() && strstr(text, path), "a full disk says: %s", text);
    check(access(path, F_OK) && access(partial, F_OK), "a full disk leaves a file");
    ShardWriter w;
    shard_writer_open(&w, path);
    check(access(path, F_OK) && !access(partial, F_OK), "an unfinished shard is there under its own name");
    fflush(w.file);
    char reason[256];
    check(shard_check(partial, reason, sizeof reason), "an unfinished shard is taken");
    shard_writer_abort(&w);
    check(access(path, F_OK) && access(partial, F_OK), "an abandoned shard leaves a file");
}

// ---------------------------------------------------------------------------------------------------------------- anatomy

// A slice to draw on: rows [0, rows) and columns [0, cols) of pixels, in HU.
typedef struct { int rows, cols; float mm; int modality; int16_t *pixels; } Picture;

static Picture picture(int rows, int cols, float mm, int modality, int16_t value) {
    Picture p = {rows, cols, mm, modality, (int16_t *)xmalloc(2 * (size_t)rows * cols, "a picture")};
    for (int i = 0; i < rows * cols; i++) p.pixels[i] = value;
    return p;
}

static void paint_box(Picture *p, int top, int left, int bottom, int right, int16_t value) {
    for (int r = top; r < bottom; r++) for (int c = left; c < right; c++) p->pixels[r * p->cols + c] = value;
}

static void paint_ellipse(Picture *p, double row, double col, double down, double across, int16_t value) {
    for (int r = 0; r < p->rows; r++)
        for (int c = 0; c < p->cols; c++) {
            double y = (r + 0.5 - row) / down, x = (c + 0.5 - col) / across;
            if (x * x + y * y < 1) p->pixels[r * p->cols + c] = value;
        }
}

static ShardSlice anatomy_of(const Picture *p, float threshold) {
    ShardSlice s = {.spacing_row = p->mm, .spacing_col = p->mm, .modality = (uint8_t)p->modality};
    slice_anatomy(p->pixels, p->rows, p->cols, 1, 0, threshold, &s);
    return s;
}

// The box within `slack` pixels of the given one; returns the anatomy.
static ShardSlice check_box(const char *what, const Picture *p, float threshold, int top, int left, int bottom, int right,
                            int slack) {
    ShardSlice s = anatomy_of(p, threshold);
    check(abs(s.box_top - top) <= slack && abs(s.box_left - left) <= slack && abs(s.box_bottom - bottom) <= slack &&
              abs(s.box_right - right) <= slack,
          "%s: box %d %d %d %d, not %d %d %d %d", what, s.box_top, s.box_left, s.box_bottom, s.box_right, top, left, bottom,
          right);
    return s;
}

static int same_anatomy(const ShardSlice *a, const ShardSlice *b) {
    return !memcmp(&a->box_top, &b->box_top, offsetof(ShardSlice, label) - offsetof(ShardSlice, box_top));
}

// The definition of slice_anatomy in bytes, pixel by pixel: [rows][cols] of 0 and 1.
static void naive_grow(uint8_t *mask, int rows, int cols, int down, int across, uint8_t value) {
    uint8_t *from = (uint8_t *)xmalloc((size_t)rows * cols, "a mask");
    for (int pass = 0; pass < 2; pass++) {
        memcpy(from, mask, (size_t)rows * cols);
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < cols; c++)
                for (int k = pass ? -across : -down; k <= (pass ? across : down); k++) {
                    int y = pass ? r : r + k, x = pass ? c + k : c;
                    if (y >= 0 && y < rows && x >= 0 && x < cols && from[y * cols + x] == value) mask[r * cols + c] = value;
                }
    }
    free(from);
}

// Writes `value` over the component of `mask` at pixel `at`; returns its pixels and whether it touches the edge.
static int naive_flood(uint8_t *mask, int rows, int cols, int at, uint8_t value, int *edge) {
    int *stack = (int *)xmalloc(sizeof(int) * rows * cols, "a stack"), depth = 0, size = 0;
    uint8_t old = mask[at];
    *edge = 0;
    mask[at] = value;
    for (stack[depth++] = at; depth; size++) {
        int i = stack[--depth], r = i / cols, c = i % cols;
        *edge |= r == 0 || r == rows - 1 || c == 0 || c == cols - 1;
        if (r > 0 && mask[i - cols] == old) mask[i - cols] = value, stack[depth++] = i - cols;
        if (r < rows - 1 && mask[i + cols] == old) mask[i + cols] = value, stack[depth++] = i + cols;
        if (c > 0 && mask[i - 1] == old) mask[i - 1] = value, stack[depth++] = i - 1;
        if (c < cols - 1 && mask[i + 1] == old) mask[i + 1] = value, stack[depth++] = i + 1;
    }
    free(stack);
    return size;
}

static void naive_fill(uint8_t *mask, int rows, int cols) {
    for (int i = 0, edge; i < rows * cols; i++)
        if (mask[i] == 0 && (naive_flood(mask, rows, cols, i, 2, &edge), !edge)) naive_flood(mask, rows, cols, i, 1, &edge);
    for (int i = 0; i < rows * cols; i++) mask[i] = mask[i] == 1;
}

static ShardSlice naive_anatomy(const uint8_t *mask, int rows, int cols, float mm, int modality) {
    size_t n = (size_t)rows * cols;
    uint8_t *fore = (uint8_t *)xmalloc(n, "a mask"), *m = (uint8_t *)xmalloc(n, "a mask");
    int above = 0, edge;
    for (size_t i = 0; i < n; i++) above += mask[i];
    for (size_t i = 0; i < n; i++) fore[i] = mask[i] || !above;
    if (modality != MODALITY_CT) naive_fill(fore, rows, cols);
    double side = (rows < cols ? rows : cols) * mm / 32.0;
    for (int k = (int)fmax(1, fmin(8, side) / 2 / mm - 0.5);; k /= 2) {
        int largest = 0;
        memcpy(m, fore, n);
        naive_grow(m, rows, cols, k, k, 0);
        for (size_t i = 0; i < n; i++)
            if (m[i] == 1) largest = (int)fmax(largest, naive_flood(m, rows, cols, (int)i, 2, &edge));
        for (size_t i = 0; i < n; i++)
            if (m[i] == 2 && naive_flood(m, rows, cols, (int)i, 3, &edge) * 32 < largest)
                naive_flood(m, rows, cols, (int)i, 0, &edge);
        for (size_t i = 0; i < n; i++) m[i] = m[i] != 0;
        if (largest * 16 < above && k) continue;
        naive_grow(m, rows, cols, 3 * k, 3 * k, 1);
        for (size_t i = 0; i < n; i++) m[i] &= fore[i];
        naive_fill(m, rows, cols);
        naive_grow(m, rows, cols, k, k, 0);
        naive_grow(m, rows, cols, k, k, 1);
        break;
    }
    ShardSlice s = {.box_top = rows, .box_left = cols};
    double size = 0, mean_r = 0, mean_c = 0, spread_r = 0, spread_c = 0;
    for (int pass = 0; pass < 2; pass++)
        for (int i = 0; i < (int)n; i++) {
            int r = i / cols, c = i % cols;
            if (!m[i]) continue;
            if (pass) {
                spread_r += (r - mean_r / size) * (r - mean_r / size);
                spread_c += (c - mean_c / size) * (c - mean_c / size);
                continue;
            }
            size++, mean_r += r, mean_c += c;
            if (r < s.box_top) s.box_top = r;
            if (r >= s.box_bottom) s.box_bottom = r + 1;
            if (c < s.box_left) s.box_left = c;
            if (c >= s.box_right) s.box_right = c + 1;
        }
    s.centre_row = (float)(mean_r / size + 0.5), s.centre_col = (float)(mean_c / size + 0.5);
    s.spread_row = (float)fmax(0.5, sqrt(spread_r / size)), s.spread_col = (float)fmax(0.5, sqrt(spread_c / size));
    free(fore);
    free(m);
    return s;
}

static void test_body(void) {
    Picture p = picture(256, 256, 1.5f, MODALITY_CT, -1000);        // a trunk of 270 x 150 mm and what lies around it
    paint_ellipse(&p, 120, 128, 50, 90, 40);
    ShardSlice bare = check_box("a body", &p, -500, 70, 38, 170, 218, 0), s;
    check(fabs(bare.centre_row - 120) < 0.01 && fabs(bare.centre_col - 128) < 0.01 && fabs(bare.spread_row - 25) < 0.2 &&
              fabs(bare.spread_col - 45) < 0.2,
          "a body: centre %g %g, spread %g %g", bare.centre_row, bare.centre_col, bare.spread_row, bare.spread_col);
    paint_box(&p, 180, 20, 182, 236, 200);                          // a hollow table, 4 cm thick
    paint_box(&p, 206, 20, 208, 236, 200);
    paint_box(&p, 180, 20, 208, 22, 200);
    paint_box(&p, 180, 234, 208, 236, 200);
    s = anatomy_of(&p, -500);
    check(same_anatomy(&s, &bare), "a table apart changes the anatomy");
    paint_box(&p, 165, 120, 180, 124, -100);                        // a cushion's seam, 6 mm
    check_box("a table that a thin bridge joins", &p, -500, 70, 38, 170, 218, 3);
    paint_box(&p, 150, 60, 180, 62, 3000);                          // wires and a blanket
    paint_box(&p, 60, 10, 61, 246, -400);
    check_box("wires and a blanket", &p, -500, 70, 38, 170, 218, 3);
    for (int i = 0; i < 256 * 256; i++) p.pixels[i] = -1000;
    paint_ellipse(&p, 120, 128, 50, 90, 40);
    paint_ellipse(&p, 120, 128, 41, 81, -850);                      // lungs, their wall thin at one place, and a windpipe
    paint_ellipse(&p, 120, 128, 47, 20, 40);
    paint_box(&p, 118, 40, 122, 60, -850);
    paint_ellipse(&p, 125, 124, 5, 5, -1000);
    s = anatomy_of(&p, -500);
    check(same_anatomy(&s, &bare), "lungs are not body: spread %g %g, left %d", s.spread_row, s.spread_col, s.box_left);
    paint_ellipse(&p, 120, 128, 50, 90, 40);
    for (int i = 0; i < 4; i++) {                                   // a metal hip: bright and dark rays into the air
        for (int c = 0; c < 256; c++) {
            int r = (int)(130 + (c - 90) * 0.2 * (i - 1.5));
            paint_box(&p, r, c, r + 2, c + 1, i % 2 ? 3000 : -1024);
        }
    }
    check_box("metal", &p, -500, 70, 38, 170, 218, 3);
    for (int i = 0; i < 256 * 256; i++) p.pixels[i] = -3024;        // padding around the circle of the reconstruction
    paint_ellipse(&p, 128, 128, 128, 128, -1000);
    paint_ellipse(&p, 120, 128, 50, 90, 40);
    s = anatomy_of(&p, -500);
    check(same_anatomy(&s, &bare), "padding changes the anatomy");
    paint_ellipse(&p, 110, 22, 16, 15, 40);                         // an arm
    check_box("an arm beside the trunk", &p, -500, 70, 7, 170, 218, 0);
    paint_ellipse(&p, 110, 240, 3, 3, 40);                          // a drip's bag is not: 1/150 of the body
    check_box("a small thing beside the trunk", &p, -500, 70, 7, 170, 218, 0);
    for (int i = 0; i < 256 * 256; i++) p.pixels[i] = -1000;
    paint_ellipse(&p, 128, 70, 45, 40, 40);                         // two legs
    paint_ellipse(&p, 128, 180, 42, 38, 40);
    s = check_box("two legs", &p, -500, 83, 30, 173, 218, 0);
    check(fabs(s.centre_col - 122) < 4 && s.spread_col > 50, "two legs: centre %g, spread %g", s.centre_col, s.spread_col);
    Picture turned = picture(256, 256, 1.5f, MODALITY_CT, 0);       // the same values, stored upside down
    for (int i = 0; i < 256 * 256; i++) turned.pixels[i] = (int16_t)(24 - p.pixels[i]);
    ShardSlice t = {.spacing_row = 1.5f, .spacing_col = 1.5f, .modality = MODALITY_CT};
    double part = slice_anatomy(turned.pixels, 256, 256, -1, 24, -500, &t), pi = acos(-1);
    check(same_anatomy(&s, &t), "a negative scale changes the anatomy");
    check(fabs(part - pi * (45 * 40 + 42 * 38) / 65536) < 1e-3, "the foreground is %g", part);
    free(turned.pixels);
    free(p.pixels);
    p = picture(40, 40, 0.84f, MODALITY_CT, -1000);                 // few, coarse pixels, and a line of one
    paint_ellipse(&p, 20, 20, 8, 11, 0);
    paint_box(&p, 34, 0, 35, 40, 0);
    check_box("40 x 40", &p, -500, 12, 9, 28, 31, 0);
    free(p.pixels);
    p = picture(30, 64, 3, MODALITY_CT, -1000);
    paint_ellipse(&p, 32, 32, 20, 20, 0);
    check_box("a body that the image cuts", &p, -500, 12, 12, 30, 52, 0);
    paint_box(&p, 0, 0, 30, 64, -1000);
    paint_box(&p, 10, 5, 12, 60, 0);                                // nothing is left by an opening with 3 pixels
    check_box("a thin thing alone", &p, -500, 10, 5, 12, 60, 0);
    s = check_box("an empty slice", &p, 500, 0, 0, 30, 64, 0);
    check(s.centre_row == 15 && s.centre_col == 32 && fabs(s.spread_col - sqrt((64 * 64 - 1) / 12.0)) < 1e-5, "an empty slice");
    check_box("a full slice", &p, -2000, 0, 0, 30, 64, 0);
    p.rows = 30, p.cols = 1;
    check_box("a column", &p, -2000, 0, 0, 30, 1, 0);
    p.rows = 1, p.cols = 30;
    check_box("a row", &p, -2000, 0, 0, 1, 30, 0);
    p.cols = 1;
    s = check_box("a pixel", &p, -2000, 0, 0, 1, 1, 0);
    check(s.centre_row == 0.5f && s.spread_row == 0.5f, "a pixel: centre %g, spread %g", s.centre_row, s.spread_row);
    free(p.pixels);
}

static void test_head(void) {
    Rng r = rng_at(3, RNG_TEST, 0, 0, 0);
    enum { N = 192 };
    Picture p = picture(N, N, 1.25f, MODALITY_MR, 0);               // a head in MR: scalp, black bone with a gap, brain, noise
    paint_ellipse(&p, 100, 96, 80, 66, 900);
    paint_ellipse(&p, 100, 96, 76, 62, 0);
    paint_ellipse(&p, 100, 96, 70, 56, 250);
    paint_ellipse(&p, 90, 96, 10, 14, 60);
    float *values = (float *)xmalloc(sizeof(float) * N * N, "values");
    for (int i = 0; i < N * N; i++) {
        double x = p.pixels[i] + 12 * rng_normal(&r), y = 12 * rng_normal(&r);
        values[i] = p.pixels[i] = (int16_t)sqrt(x * x + y * y);
    }
    float t = anatomy_threshold(values, N * N, MODALITY_MR);
    check(t > 36 && t < 200, "the threshold between noise of 12 and tissue of 250 is %g", t);
    ShardSlice s = check_box("a head", &p, t, 20, 30, 180, 162, 1);
    check(fabs(s.centre_row - 100) < 0.5 && fabs(s.centre_col - 96) < 0.5 && fabs(s.spread_row - 40) < 0.5 &&
              fabs(s.spread_col - 33) < 0.5,
          "a head: centre %g %g, spread %g %g", s.centre_row, s.centre_col, s.spread_row, s.spread_col);
    for (int i = 0; i < N * N; i++) values[i] = i % 8 == 0 ? 900 : i % 8 < 3 ? 150 : 0;     // bright fat, dark brain, no noise
    t = anatomy_threshold(values, N * N, MODALITY_MR);
    check(t >= 0 && t < 150, "the threshold of tissue of 150 beside fat of 900 is %g", t);
    double noise = 0;
    for (int i = 0; i < N * N; i++) {                               // a third is tissue at 12 times the noise's deviation
        double x = (i % 3 ? 0 : 240) + 20 * rng_normal(&r), y = 20 * rng_normal(&r);
        values[i] = (float)sqrt(x * x + y * y);
    }
    t = anatomy_threshold(values, N * N, MODALITY_MR);
    for (int i = 0; i < N * N; i++) noise += i % 3 && values[i] > t;
    check(noise / (N * N) < 0.05 && t < 100, "the threshold %g takes %g of noise for body", t, noise / (N * N));
    for (int i = 0; i < N * N; i++) values[i] = (float)(i % 3 ? 100 + 400 * sqrt(rng_uniform(&r)) : rng_range(&r, 900, 1000));
    t = anatomy_threshold(values, N * N, MODALITY_MR);
    check(t > 200 && t < 350, "the threshold of dark and bright tissue without air is %g", t);
    for (int i = 0; i < N * N; i++) values[i] = (float)fabs(20 + 5 * rng_normal(&r) + (i % 3 ? 0 : 150));
    t = anatomy_threshold(values, N * N, MODALITY_MR);
    check(t > 40 && t < 75, "the threshold between noise at 20 and tissue at 170 is %g", t);
    for (int i = 0; i < N * N; i++) values[i] = 7;
    check(anatomy_threshold(values, N * N, MODALITY_MR) == 7, "a constant volume's threshold");
    check(anatomy_threshold(NULL, 0, MODALITY_CT) == -500, "a CT's threshold");
    free(values);
    free(p.pixels);
}

static void test_masks(void) {
    Rng r = rng_at(2, RNG_TEST, 0, 0, 0);
    int bad = 0;
    for (int trial = 0; trial < 300; trial++) {
        uint64_t most = trial % 8 ? 150 : 400;
        int rows = 1 + (int)rng_below(&r, most), cols = 1 + (int)rng_below(&r, most);
        Picture p = picture(rows, cols, (float)exp(rng_range(&r, log(0.3), log(4))), trial % 2 ? MODALITY_MR : MODALITY_CT, 0);
        for (int i = (int)rng_below(&r, 12), on = 1; i > 0; i--, on = rng_uniform(&r) < 0.6) {
            double size = rng_range(&r, 1, 0.5 * (rows + cols)), row = rng_range(&r, 0, rows), col = rng_range(&r, 0, cols);
            paint_ellipse(&p, row, col, size * rng_uniform(&r), size * rng_uniform(&r), (int16_t)on);
        }
        double salt = trial % 3 == 0 ? rng_uniform(&r) * rng_uniform(&r) : 0;
        uint8_t *mask = (uint8_t *)xmalloc((size_t)rows * cols, "a mask");
        for (int i = 0; i < rows * cols; i++) mask[i] = (uint8_t)(p.pixels[i] ^= rng_uniform(&r) < salt);
        ShardSlice a = anatomy_of(&p, 0.5f), b = naive_anatomy(mask, rows, cols, p.mm, p.modality);
        int same = !memcmp(&a.box_top, &b.box_top, 16) && fabs(a.centre_row - b.centre_row) < 1e-4 &&
                   fabs(a.centre_col - b.centre_col) < 1e-4 && fabs(a.spread_row - b.spread_row) < 1e-4 &&
                   fabs(a.spread_col - b.spread_col) < 1e-4;
        if (!same && !bad++) printf("a mask of %d x %d, trial %d\n", rows, cols, trial);
        free(mask);
        free(p.pixels);
    }
    check(bad == 0, "%d of 300 random masks have another anatomy than by definition", bad);
    for (int trial = bad = 0; trial < 60; trial++) {
        int rows = 1 + (int)rng_below(&r, 90), cols = 1 + (int)rng_below(&r, 300), down = (int)rng_below(&r, 100),
            across = (int)rng_below(&r, 250), words = (cols + 63) / 64;
        uint64_t bits[90 * 5] = {0}, copy[90 * 5];
        Mask m = {rows, cols, words, bits, copy};
        uint8_t *mask = (uint8_t *)xmalloc((size_t)rows * cols, "a mask");
        for (int i = 0; i < rows * cols; i++) {
            mask[i] = rng_uniform(&r) < 2.0 / (rows * cols);
            bits[i / cols * words + i % cols / 64] |= (uint64_t)mask[i] << i % cols % 64;
        }
        mask_grow(&m, down, across);
        naive_grow(mask, rows, cols, down, across, 1);
        for (int i = 0; i < rows * cols; i++) bad += mask[i] != (bits[i / cols * words + i % cols / 64] >> i % cols % 64 & 1);
        free(mask);
    }
    check(bad == 0, "%d pixels of grown masks are wrong", bad);
}

static void test_moments(void) {
    enum { N = 100003 };
    static int16_t pixels[N];
    Rng r = rng_at(4, RNG_TEST, 0, 0, 0);
    int bad = 0;
    for (int trial = 0; trial < 200; trial++) {                     // scales and limits that doubles hold exactly
        float scale = (float)ldexp(1 + (double)rng_below(&r, 200), (int)rng_below(&r, 12) - 8) * (trial % 2 ? -1 : 1);
        float intercept = (float)rng_below(&r, 4000) - 2000;
        double limit = trial % 5 == 0 ? -INFINITY : scale * (rng_range(&r, -40000, 40000)) + intercept;
        if (trial % 3 == 0) limit = (double)scale * (int)rng_range(&r, -32770, 32770) + intercept;
        int16_t flip;
        int least = anatomy_limit(scale, intercept, limit, &flip);
        for (int p = -32768; p < 32768; p++) bad += ((p ^ flip) >= least) != ((double)scale * p + intercept > limit);
    }
    check(bad == 0, "%d pixels are on the wrong side of a limit", bad);
    static const struct { float scale, intercept; double centre, spread, floor; } cases[] = {
        {1, -1024, 1000, 500, -INFINITY}, {1, -1024, 400, 600, -1000}, {1, 0, -1000, 3000, -1000},
        {0.0123f, 17, 9000, 9000, -INFINITY}, {-2.5f, 100, 300, 500, -1000}, {1, 0, 32760, 4, -1000},
        {1, 0, -32760, 4, -INFINITY}, {1, 0, -5000, 100, -1000}};
    for (int k = 0; k < 8; k++) {
        float scale = cases[k].scale, intercept = cases[k].intercept;
        double sum = 0, squares = 0;
        for (int i = 0; i < N; i++)
            pixels[i] = (int16_t)fmin(fmax(cases[k].centre + cases[k].spread * rng_normal(&r), -32768), 32767);
        for (int i = 0; i < N; i++) sum += fmax((double)scale * pixels[i] + intercept, cases[k].floor);
        for (int i = 0; i < N; i++) {
            double x = fmax((double)scale * pixels[i] + intercept, cases[k].floor) - sum / N;
            squares += x * x;
        }
        Moments m = {0};
        for (int i = 0, some; i < N; i += some) {                   // parts of one pixel up to all
            some = i < 3 ? 1 : i < 1000 ? 333 : k % 2 ? 70000 : N;
            if (some > N - i) some = N - i;
            moments_add(&m, pixels + i, some, scale, intercept, cases[k].floor);
        }
        double std = sqrt(squares / (N - 1));
        check(m.count == N && fabs(m.mean - sum / N) <= 1e-11 * fabs(sum / N) && fabs(moments_std(&m) - std) <= 1e-11 * std,
              "case %d: mean %.15g not %.15g, deviation %.15g not %.15g", k, m.mean, sum / N, moments_std(&m), std);
    }
    Moments m = {0};
    check(moments_std(&m) == 0, "the deviation of nothing");
    moments_add(&m, pixels, 1, 1, 0, -INFINITY);
    check(moments_std(&m) == 0 && m.mean == pixels[0], "the moments of one pixel");
}

static void test_phantom(void) {
    phantom_make(in_folder("pa"), 5, 2, 0);
    phantom_make(in_folder("pb"), 5, 2, 0);
    phantom_make(in_folder("pc"), 6, 2, 0);
    phantom_make(in_folder("pd"), 5, 2, 2);
    const char *paths[4] = {in_folder("pa"), in_folder("pb"), in_folder("pc"), in_folder("pd")};
    Dataset *d[4];
    for (int i = 0; i < 4; i++) d[i] = dataset_open(&paths[i], 1);
    check(dataset_identity(d[0]) == dataset_identity(d[1]), "a phantom's bytes differ from run to run");
    check(dataset_identity(d[0]) != dataset_identity(d[2]), "another seed gives the same phantom");
    int shared = 0, bad = 0, classes[PHANTOM_REGIONS] = {0}, planes[PLANE_COUNT] = {0};
    for (uint64_t i = 0; i < dataset_count(d[0]); i++) {
        const ShardSlice *s = dataset_slice(d[0], i, NULL, NULL);
        dataset_verify_slice(d[0], i);
        classes[s->label]++;
        planes[s->plane]++;
        bad += s->box_bottom - s->box_top < 8 || s->volume_std < 1;
        for (uint64_t j = 0; j < dataset_count(d[3]); j++)
            shared += dataset_slice(d[3], j, NULL, NULL)->patient_id == s->patient_id;
    }
    for (int c = 0; c < PHANTOM_REGIONS; c++) bad += classes[c] < 8;
    check(!shared && !bad && planes[PLANE_AXIAL] && planes[PLANE_CORONAL] + planes[PLANE_SAGITTAL],
          "phantom: %d shared patients, %d odd slices or classes", shared, bad);
    char *name = dataset_class_name(d[0], REGION_PELVIS);
    check(name && !strcmp(name, "pelvis"), "class 4 is called %s", name ? name : "nothing");
    free(name);
    for (int i = 0; i < 4; i++) dataset_close(d[i]);
}

int main(void) {
    // in memory where there is such a folder: thousands of syncs
    snprintf(folder, sizeof folder, "%s/test_data.%d", access("/dev/shm", W_OK) ? "/tmp" : "/dev/shm", (int)getpid());
    if (mkdir(folder, 0700)) fail(STATUS_FAILED, "cannot make %s: %s", folder, strerror(errno));
    test_order();
    test_shards();
    test_dataset();
    test_weights();
    test_writer();
    test_body();
    test_head();
    test_masks();
    test_moments();
    test_phantom();
    char command[600];
    snprintf(command, sizeof command, "rm -rf '%s'", folder);
    if (system(command)) printf("%s could not be removed\n", folder);
    printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
}
