/*
Shards and what reads them: the file format, its writer and checker, the dataset, the sampler and the prefetch thread.
Shared by train_curia, evaluate, prep and the tests.

  ShardSlice, ShardHeader     the records of a shard file, version 2
  MODALITY_*, PLANE_*         their small numbers
  ShardWriter, shard_writer_* streaming writer: the file appears under its name whole, or not at all
  shard_check                 verifies every byte of one shard
  Dataset, dataset_*          many shards seen as one array of slices
  epoch_index                 the order of an epoch: a keyed bijection, with no memory
  Sampler, sampler_index      which slice the k-th sample of a run is
  Prefetch, prefetch_*        a thread that reads and verifies the next batch

A shard, little endian, every part on a 64-byte boundary:
  ShardHeader                 128 bytes, written last: a file cut short never has a valid one
  per slice                   int16 pixels [rows][cols], then uint8 mask [rows][cols] where there is one, then zeros
  ShardSlice [slices]         the index, followed at once by the class names, one per line
Pixels are uncropped, at native resolution, rows and columns as in Curia: axial rows run to posterior and columns to the
patient's left; coronal rows to inferior, columns to left; sagittal rows to inferior, columns to posterior. A value is
scale * pixel + intercept: HU for CT, the scanner's own unit for MR. Every byte is under a checksum: the header's own, the
index's (with the names), and each slice's. No name, UID, date or path is in a shard.
*/
#ifndef CURIA_DATALOADER_H
#define CURIA_DATALOADER_H

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "curia/hash.h"
#include "curia/log.h"
#include "curia/rng.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "shards are read in place and are little endian");

#define SHARD_MAGIC "CURIASHD"
enum { SHARD_VERSION = 2, SHARD_ALIGN = 64, SHARD_MAX_SIDE = 32768 };
enum { MODALITY_UNKNOWN, MODALITY_CT, MODALITY_MR, MODALITY_COUNT };
enum { PLANE_AXIAL, PLANE_CORONAL, PLANE_SAGITTAL, PLANE_COUNT };

// The most shards mapped at once (the kernel allows 65530 mappings). A pointer that dataset_slice gave stays valid for
// the next DATASET_MAX_OPEN/2 calls of dataset_slice, dataset_verify_slice and slices prefetched, whichever shards
// those touch: keep a batch and its successor below that together.
#ifndef DATASET_MAX_OPEN
#define DATASET_MAX_OPEN 16384
#endif

typedef struct {
    uint64_t pixel_offset, mask_offset;  // bytes from the start of the file; mask_offset 0: no mask
    uint64_t checksum;                   // of the pixels, the mask and the zeros up to the next 64-byte boundary
    uint64_t volume_id, patient_id;      // keyed hashes
    int32_t rows, cols;
    int32_t slice_number, volume_slices; // position along the normal in the volume it comes from, and that volume's count
    float spacing_row, spacing_col, spacing_slice; // mm between rows, columns, slices
    float scale, intercept;              // value = scale * pixel + intercept
    uint8_t modality, plane, zero[2];
    int32_t box_top, box_left, box_bottom, box_right;   // body box in pixels; bottom and right exclusive
    float centre_row, centre_col, spread_row, spread_col; // mean and deviation of the body's pixels; the first is at 0.5
    int32_t label;                       // class, -1 none
    float target;                        // regression target, NaN none
    float volume_mean, volume_std;       // of values, over the volume's stored slices of this plane; N-1
    float volume_mean_clipped, volume_std_clipped;      // the same after max(value, -1000)
} ShardSlice;
_Static_assert(sizeof(ShardSlice) == 136, "the record's size is part of the format");

typedef struct {
    char magic[8];
    uint32_t version, record_bytes;
    uint64_t slices, index_offset, names_offset, names_bytes, file_bytes;
    uint64_t names_checksum;             // of the class names alone, so that two shards' classes can be compared
    uint64_t index_checksum;             // of the index and the names
    uint8_t zero[48];
    uint64_t header_checksum;            // of the 120 bytes before it
} ShardHeader;
_Static_assert(sizeof(ShardHeader) == 128, "the header's size is part of the format");

static inline uint64_t shard_align(uint64_t offset) { return (offset + SHARD_ALIGN - 1) & ~(uint64_t)(SHARD_ALIGN - 1); }

// Bytes of a slice in the file: pixels, mask, zeros.
static inline uint64_t shard_slice_bytes(const ShardSlice *s) {
    return shard_align((uint64_t)s->rows * s->cols * (s->mask_offset ? 3 : 2));
}

// NULL where every field of the record makes sense, else what does not. Offsets are checked by shard_map.
static inline const char *shard_slice_reason(const ShardSlice *s) {
    if (s->rows < 1 || s->cols < 1 || s->rows > SHARD_MAX_SIDE || s->cols > SHARD_MAX_SIDE)
        return "its rows or columns are out of 1..32768";
    if (s->slice_number < 0 || s->slice_number >= s->volume_slices) return "its slice number is outside its volume";
    if (!(s->spacing_row > 0 && s->spacing_col > 0 && s->spacing_slice > 0) ||
        !isfinite(s->spacing_row + s->spacing_col + s->spacing_slice)) return "its spacing is not a positive number";
    if (!isfinite(s->scale) || !isfinite(s->intercept) || s->scale == 0) return "its scale or intercept is not usable";
    if (s->modality >= MODALITY_COUNT || s->plane >= PLANE_COUNT || s->zero[0] || s->zero[1])
        return "its modality or plane is unknown";
    if (s->box_top < 0 || s->box_left < 0 || s->box_top >= s->box_bottom || s->box_left >= s->box_right ||
        s->box_bottom > s->rows || s->box_right > s->cols) return "its body box is outside the slice";
    if (!(s->centre_row >= 0 && s->centre_row <= s->rows && s->centre_col >= 0 && s->centre_col <= s->cols) ||
        !(s->spread_row > 0 && s->spread_row <= s->rows && s->spread_col > 0 && s->spread_col <= s->cols))
        return "its anatomy centre or spread is outside the slice";
    if (s->label < -1 || isinf(s->target)) return "its label or target is not usable";
    if (!isfinite(s->volume_mean) || !isfinite(s->volume_mean_clipped) || !(s->volume_std >= 0) || !(s->volume_std_clipped >= 0) ||
        !isfinite(s->volume_std) || !isfinite(s->volume_std_clipped)) return "its volume statistics are not numbers";
    return NULL;
}

// ---------------------------------------------------------------------------------------------------------------- writer

typedef struct {
    char *path, *partial;        // the final name and the name while writing, in the same folder
    FILE *file;
    ShardSlice *index;
    uint64_t slices, capacity, offset;
    uint8_t *buffer;             // one slice as it lies in the file
    uint64_t buffer_bytes;
} ShardWriter;

// Drops what was written: the unfinished file goes, the writer is empty again.
static inline void shard_writer_abort(ShardWriter *w) {
    if (w->file) fclose(w->file);
    if (w->partial) unlink(w->partial);
    free(w->path);
    free(w->partial);
    free(w->index);
    free(w->buffer);
    *w = (ShardWriter){0};
}

__attribute__((noreturn)) static inline void shard_writer_fail(ShardWriter *w, const char *what) {
    char path[1024];
    int error = errno;
    snprintf(path, sizeof path, "%s", w->path);
    shard_writer_abort(w);
    fail(STATUS_FAILED, "%s: %s: %s; nothing was left under that name", path, what, strerror(error));
}

// Starts PATH.partial; shard_writer_close renames it to PATH. Fails with status 1.
static inline void shard_writer_open(ShardWriter *w, const char *path) {
    *w = (ShardWriter){.path = strdup(path), .partial = (char *)xmalloc(strlen(path) + 16, "a file name")};
    sprintf(w->partial, "%s.partial", path);
    w->file = fopen(w->partial, "wb");
    ShardHeader empty = {0};
    if (!w->file || fwrite(&empty, sizeof empty, 1, w->file) != 1) shard_writer_fail(w, "cannot write");
    w->offset = sizeof empty;
}

// Has the kernel begin to write out what it holds, so that the sync at the end finds little left to do.
static inline void shard_writer_start_writing(ShardWriter *w) {
#ifdef SYNC_FILE_RANGE_WRITE
    sync_file_range(fileno(w->file), 0, 0, SYNC_FILE_RANGE_WRITE);
#else
    (void)w;
#endif
}

static inline void shard_writer_check(ShardWriter *w, const ShardSlice *s) {
    const char *reason = shard_slice_reason(s);
    if (!reason) return;
    shard_writer_abort(w);
    fail(STATUS_FAILED, "a slice cannot be stored: %s", reason);
}

// Appends one slice whose bytes are laid out and summed up already (shard_slice_bytes of them): slice->mask_offset says
// whether there is a mask; offsets are filled in here.
static inline void shard_writer_add_block(ShardWriter *w, const ShardSlice *slice, const void *block) {
    ShardSlice s = *slice;
    shard_writer_check(w, &s);
    uint64_t bytes = shard_slice_bytes(&s);
    s.pixel_offset = w->offset;
    s.mask_offset = slice->mask_offset ? w->offset + 2 * (uint64_t)s.rows * s.cols : 0;
    if (fwrite(block, 1, bytes, w->file) != bytes) shard_writer_fail(w, "cannot write");
    if (w->offset >> 24 != (w->offset + bytes) >> 24) shard_writer_start_writing(w);
    w->offset += bytes;
    if (w->slices == w->capacity) {
        w->capacity = w->capacity ? 2 * w->capacity : 256;
        w->index = (ShardSlice *)realloc(w->index, w->capacity * sizeof *w->index);
        if (!w->index) shard_writer_fail(w, "out of memory for the index");
    }
    w->index[w->slices++] = s;
}

// Appends one slice: pixels and mask are [rows][cols], mask may be NULL. Offsets and checksum of *slice are filled in here.
static inline void shard_writer_add(ShardWriter *w, const ShardSlice *slice, const int16_t *pixels, const uint8_t *mask) {
    ShardSlice s = *slice;
    s.mask_offset = mask != NULL;
    shard_writer_check(w, &s);
    uint64_t count = (uint64_t)s.rows * s.cols, used = count * (mask ? 3 : 2), bytes = shard_slice_bytes(&s);
    if (bytes > w->buffer_bytes) {
        free(w->buffer);
        w->buffer = (uint8_t *)xmalloc(bytes, "a slice to write");
        w->buffer_bytes = bytes;
    }
    memcpy(w->buffer, pixels, 2 * count);
    if (mask) memcpy(w->buffer + 2 * count, mask, count);
    memset(w->buffer + used, 0, bytes - used);
    s.checksum = checksum_wide(w->buffer, bytes);
    shard_writer_add_block(w, &s, w->buffer);
}

// Writes index, class names (one per line, or NULL) and header, makes them durable, and gives the file its name.
static inline void shard_writer_close(ShardWriter *w, const char *class_names) {
    ShardHeader h = {.version = SHARD_VERSION, .record_bytes = sizeof(ShardSlice), .slices = w->slices, .index_offset = w->offset};
    memcpy(h.magic, SHARD_MAGIC, 8);
    uint64_t index_bytes = w->slices * sizeof(ShardSlice);
    h.names_bytes = class_names ? strlen(class_names) : 0;
    h.names_offset = h.index_offset + index_bytes;
    h.file_bytes = h.names_offset + h.names_bytes;
    uint8_t *tail = (uint8_t *)xmalloc(index_bytes + h.names_bytes, "the index of a shard");
    if (index_bytes) memcpy(tail, w->index, index_bytes);
    if (h.names_bytes) memcpy(tail + index_bytes, class_names, h.names_bytes);
    h.names_checksum = checksum(tail + index_bytes, h.names_bytes);
    h.index_checksum = checksum(tail, index_bytes + h.names_bytes);
    h.header_checksum = checksum(&h, sizeof h - 8);
    size_t tail_bytes = index_bytes + h.names_bytes, written = fwrite(tail, 1, tail_bytes, w->file);
    free(tail);
    if (written != tail_bytes || fflush(w->file) || fsync(fileno(w->file)) || fseeko(w->file, 0, SEEK_SET) ||
        fwrite(&h, sizeof h, 1, w->file) != 1 || fflush(w->file) || fsync(fileno(w->file))) shard_writer_fail(w, "cannot write");
    int closed = fclose(w->file);
    w->file = NULL;
    if (closed || rename(w->partial, w->path)) shard_writer_fail(w, "cannot write");
    char *slash = strrchr(w->path, '/');
    if (slash) slash[slash == w->path] = 0;
    int folder = open(slash ? w->path : ".", O_RDONLY | O_DIRECTORY);
    if (folder >= 0) {
        fsync(folder);
        close(folder);
    }
    free(w->partial);
    w->partial = NULL;           // it has its name now: nothing to remove
    shard_writer_abort(w);
}

// ---------------------------------------------------------------------------------------------------------------- one file

// A mapped shard. Where mapping is NULL it is not open.
typedef struct {
    char *path;
    const uint8_t *mapping;
    uint64_t bytes, slices, first; // first: dataset index of its slice 0
    uint64_t header_checksum, names_checksum, names_bytes, last_use;
} Shard;

// Reads and checks the header of shard->path and fills the rest of *shard. 0 good, else -1 and *reason (n bytes) says why.
static inline int shard_read_header(Shard *shard, ShardHeader *h, int *file, char *reason, size_t n) {
    struct stat st;
    *file = open(shard->path, O_RDONLY | O_CLOEXEC);
    if (*file < 0 || fstat(*file, &st)) {
        snprintf(reason, n, "cannot be opened: %s", strerror(errno));
        return -1;
    }
    const char *wrong = NULL;
    if (!S_ISREG(st.st_mode)) wrong = "is not a file";
    else if ((uint64_t)st.st_size < sizeof *h || pread(*file, h, sizeof *h, 0) != sizeof *h)
        wrong = "is cut short: it has no whole header";
    else if (memcmp(h->magic, SHARD_MAGIC, 8)) wrong = "is not a shard, or was never finished (no CURIASHD at its start)";
    else if (h->header_checksum != checksum(h, sizeof *h - 8)) wrong = "is damaged: the header's checksum differs";
    if (wrong) {
        snprintf(reason, n, "%s", wrong);
        return -1;
    }
    if (h->version != SHARD_VERSION || h->record_bytes != sizeof(ShardSlice)) {
        snprintf(reason, n, "has format version %u with records of %u bytes, and this program reads version %d with %zu",
                 h->version, h->record_bytes, SHARD_VERSION, sizeof(ShardSlice));
        return -1;
    }
    if (h->file_bytes != (uint64_t)st.st_size) {
        snprintf(reason, n, "is %s: %llu bytes, and its header says %llu",
                 (uint64_t)st.st_size < h->file_bytes ? "cut short" : "too long", (unsigned long long)st.st_size,
                 (unsigned long long)h->file_bytes);
        return -1;
    }
    uint64_t room = h->file_bytes;
    if (h->index_offset < sizeof *h || h->index_offset > room || h->index_offset % SHARD_ALIGN ||
        h->slices > (room - h->index_offset) / sizeof(ShardSlice) ||
        h->names_offset != h->index_offset + h->slices * sizeof(ShardSlice) || h->names_bytes != room - h->names_offset) {
        snprintf(reason, n, "has an index that lies outside the file");
        return -1;
    }
    shard->bytes = h->file_bytes;
    shard->slices = h->slices;
    shard->header_checksum = h->header_checksum;
    shard->names_checksum = h->names_checksum;
    shard->names_bytes = h->names_bytes;
    return 0;
}

static inline const ShardSlice *shard_index(const Shard *shard) {
    return (const ShardSlice *)(shard->mapping + ((const ShardHeader *)shard->mapping)->index_offset);
}

static inline void shard_unmap(Shard *shard) {
    if (shard->mapping) munmap((void *)shard->mapping, shard->bytes);
    shard->mapping = NULL;
}

// Maps shard->path after checking its header, its index's checksum and every record's bounds: afterwards no pointer into
// the mapping can be out of it. Pixels are verified by shard_verify. 0 good, else -1 and *reason.
static inline int shard_map(Shard *shard, char *reason, size_t n) {
    ShardHeader h;
    int file, good = shard_read_header(shard, &h, &file, reason, n);
    void *mapping = good == 0 ? mmap(NULL, shard->bytes, PROT_READ, MAP_SHARED, file, 0) : MAP_FAILED;
    int error = errno;
    if (file >= 0) close(file);
    if (good) return -1;
    if (mapping == MAP_FAILED) {
        snprintf(reason, n, "cannot be mapped: %s", strerror(error));
        return -1;
    }
    shard->mapping = (const uint8_t *)mapping;
    const ShardSlice *index = shard_index(shard);
    uint64_t offset = sizeof h;
    *reason = 0;
    if (checksum(index, h.file_bytes - h.index_offset) != h.index_checksum)
        snprintf(reason, n, "is damaged: the index's checksum differs");
    for (uint64_t i = 0; i < h.slices && !*reason; i++) {
        const ShardSlice *s = &index[i];
        const char *wrong = shard_slice_reason(s);
        if (!wrong && (s->pixel_offset != offset ||
                       (s->mask_offset && s->mask_offset != offset + 2 * (uint64_t)s->rows * s->cols) ||
                       shard_slice_bytes(s) > h.index_offset - offset)) wrong = "its pixels are not where they should be";
        if (wrong) snprintf(reason, n, "has a bad record: slice %llu: %s", (unsigned long long)i, wrong);
        else offset += shard_slice_bytes(s);
    }
    if (!*reason && offset != h.index_offset) snprintf(reason, n, "has pixels that belong to no slice");
    if (!*reason && checksum(shard->mapping + h.names_offset, h.names_bytes) != h.names_checksum)
        snprintf(reason, n, "is damaged: the class names' checksum differs");
    if (!*reason) return 0;
    shard_unmap(shard);
    return -1;
}

// Verifies the checksum of slice i of a mapped shard, which also brings its pages in. 0 good, else -1 and *reason.
static inline int shard_verify(const Shard *shard, uint64_t i, char *reason, size_t n) {
    const ShardSlice *s = &shard_index(shard)[i];
    if (checksum_wide(shard->mapping + s->pixel_offset, shard_slice_bytes(s)) == s->checksum) return 0;
    snprintf(reason, n, "is damaged: the checksum of slice %llu differs", (unsigned long long)i);
    return -1;
}

// Verifies every checksum of the file at path. 0 good, else -1 and *reason (n bytes) says what is wrong.
static inline int shard_check(const char *path, char *reason, size_t n) {
    Shard shard = {.path = (char *)path};
    int bad = shard_map(&shard, reason, n);
    for (uint64_t i = 0; !bad && i < shard.slices; i++) bad = shard_verify(&shard, i, reason, n);
    shard_unmap(&shard);
    return bad;
}

// ---------------------------------------------------------------------------------------------------------------- dataset

typedef struct {
    Shard *shards;
    int n_shards;
    uint64_t count;
    int n_sets;                  // one per PATH given
    uint64_t *set_first;         // [n_sets+1] dataset index of each set's first slice
    uint64_t *set_share;         // [n_sets] part of what the earlier sets leave, in units of 2^-63; NULL: plain union
    int clash;                   // a shard whose class names differ from those of shard 0; 0 none
    int *open_ring;              // [DATASET_MAX_OPEN] open shards, in order of opening
    int open_count, open_next;
    uint64_t calls;
    pthread_mutex_t lock;
} Dataset;

__attribute__((noreturn)) static inline void dataset_fail(const char *path, const char *reason) {
    fail(STATUS_DATA, "%s %s; make the shard again with ./prep/prep, or leave it out", path, reason);
}

static inline int dataset_order(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

// Appends PATH (a file, or the *.shard of a folder by name) to the dataset's shards, reading only their headers.
static inline void dataset_add_path(Dataset *d, const char *path) {
    struct stat st;
    if (stat(path, &st)) fail(STATUS_DATA, "%s: %s; give a .shard file or a folder of them", path, strerror(errno));
    char **names = NULL;
    int n = 0;
    if (S_ISDIR(st.st_mode)) {
        DIR *folder = opendir(path);
        if (!folder) fail(STATUS_DATA, "%s: cannot be read: %s", path, strerror(errno));
        for (struct dirent *e; (e = readdir(folder));) {
            size_t length = strlen(e->d_name);
            if (length < 6 || strcmp(e->d_name + length - 6, ".shard")) continue;
            names = (char **)realloc(names, (n + 1) * sizeof *names);
            names[n] = (char *)xmalloc(strlen(path) + length + 2, "a file name");
            sprintf(names[n++], "%s/%s", path, e->d_name);
        }
        closedir(folder);
        if (n) qsort(names, n, sizeof *names, dataset_order);
    } else {
        names = (char **)malloc(sizeof *names);
        names[n++] = strdup(path);
    }
    if (n == 0) fail(STATUS_DATA, "%s holds no *.shard; make some with ./prep/prep -o %s SCANS", path, path);
    d->shards = (Shard *)realloc(d->shards, (d->n_shards + n) * sizeof *d->shards);
    for (int i = 0; i < n; i++) {
        Shard *shard = &d->shards[d->n_shards++];
        *shard = (Shard){.path = names[i], .first = d->count};
        ShardHeader h;
        char reason[256];
        int file, bad = shard_read_header(shard, &h, &file, reason, sizeof reason);
        if (file >= 0) close(file);
        if (bad) dataset_fail(shard->path, reason);
        d->count += shard->slices;
        if (shard->names_bytes != d->shards[0].names_bytes || shard->names_checksum != d->shards[0].names_checksum)
            d->clash = d->n_shards - 1;
    }
    free(names);
}

// Opens n_paths PATHs, each a shard or a folder of *.shard (taken by name). Only headers are read; the rest is mapped when
// first used. Fails with status 3 where a PATH holds no shard, a header is bad, or there is no slice at all.
static inline Dataset *dataset_open(const char *const *paths, int n_paths) {
    Dataset *d = (Dataset *)xmalloc(sizeof *d, "the dataset");
    d->n_sets = n_paths;
    d->set_first = (uint64_t *)xmalloc((n_paths + 1) * sizeof *d->set_first, "the dataset");
    d->open_ring = (int *)xmalloc(DATASET_MAX_OPEN * sizeof *d->open_ring, "the dataset");
    pthread_mutex_init(&d->lock, NULL);
    for (int i = 0; i < n_paths; i++) {
        dataset_add_path(d, paths[i]);
        d->set_first[i + 1] = d->count;
    }
    if (d->count == 0) fail(STATUS_DATA, "%s: the shards hold no slices", n_paths ? paths[0] : "no data");
    return d;
}

static inline uint64_t dataset_count(const Dataset *d) { return d->count; }

// Unmaps everything; pointers from dataset_slice end here.
static inline void dataset_close(Dataset *d) {
    for (int i = 0; i < d->n_shards; i++) {
        shard_unmap(&d->shards[i]);
        free(d->shards[i].path);
    }
    pthread_mutex_destroy(&d->lock);
    free(d->shards);
    free(d->set_first);
    free(d->set_share);
    free(d->open_ring);
    free(d);
}

// The shard that holds dataset index i: the last one whose first slice is not after i.
static inline Shard *dataset_shard(const Dataset *d, uint64_t i) {
    int low = 0, high = d->n_shards - 1;
    while (low < high) {
        int middle = low + (high - low + 1) / 2;
        if (d->shards[middle].first <= i) low = middle;
        else high = middle - 1;
    }
    return &d->shards[low];
}

// Maps the shard of index i if it is not, closing the oldest one that DATASET_MAX_OPEN/2 calls have left alone where there
// are too many. Thread-safe. NULL and *reason where the shard is bad or has changed since dataset_open; *at is its path.
static inline Shard *dataset_map(Dataset *d, uint64_t i, const char **at, char *reason, size_t n) {
    Shard *shard = dataset_shard(d, i);
    *at = shard->path;
    pthread_mutex_lock(&d->lock);
    int bad = 0;
    shard->last_use = ++d->calls;
    if (!shard->mapping) {
        while (d->open_count == DATASET_MAX_OPEN) {
            int oldest = d->open_ring[d->open_next];
            if (d->calls - d->shards[oldest].last_use >= DATASET_MAX_OPEN / 2) {
                shard_unmap(&d->shards[oldest]);
                d->open_count--;
            }
            d->open_next = (d->open_next + 1) % DATASET_MAX_OPEN;   // one in use thereby goes to the end of the full ring
        }
        uint64_t before = shard->header_checksum;
        bad = shard_map(shard, reason, n);
        if (!bad && shard->header_checksum != before) {
            snprintf(reason, n, "has been replaced since this run started");
            shard_unmap(shard);
            bad = 1;
        }
        if (!bad) {
            d->open_ring[(d->open_next + d->open_count) % DATASET_MAX_OPEN] = (int)(shard - d->shards);
            d->open_count++;
        }
    }
    pthread_mutex_unlock(&d->lock);
    return bad ? NULL : shard;
}

// The record of dataset index i (below dataset_count), and pointers to its pixels [rows][cols] and mask (NULL: none), in
// the mapping. pixels and mask may be NULL. Opens the shard where needed; thread-safe; valid as DATASET_MAX_OPEN says.
// Does not verify the pixels' checksum. Fails with status 3 on a bad shard.
static inline const ShardSlice *dataset_slice(Dataset *d, uint64_t i, const int16_t **pixels, const uint8_t **mask) {
    if (i >= d->count)
        fail(STATUS_FAILED, "slice %llu was asked of a dataset of %llu", (unsigned long long)i, (unsigned long long)d->count);
    char reason[256];
    const char *path;
    Shard *shard = dataset_map(d, i, &path, reason, sizeof reason);
    if (!shard) dataset_fail(path, reason);
    const ShardSlice *s = &shard_index(shard)[i - shard->first];
    if (pixels) *pixels = (const int16_t *)(shard->mapping + s->pixel_offset);
    if (mask) *mask = s->mask_offset ? shard->mapping + s->mask_offset : NULL;
    return s;
}

// Verifies the checksum of dataset index i. Fails with status 3, naming the shard and the slice within it.
static inline void dataset_verify_slice(Dataset *d, uint64_t i) {
    char reason[256];
    const char *path;
    Shard *shard = dataset_map(d, i, &path, reason, sizeof reason);
    if (!shard || shard_verify(shard, i - shard->first, reason, sizeof reason)) dataset_fail(path, reason);
}

// The name of class `label`, to be freed by the caller, or NULL where the shards name no such class. Fails with status 3
// where the shards disagree on the names, since their labels then mean different things.
static inline char *dataset_class_name(Dataset *d, int label) {
    if (d->clash)
        fail(STATUS_DATA, "%s and %s have different class names; use them one at a time", d->shards[0].path,
             d->shards[d->clash].path);
    if (label < 0 || d->shards[0].names_bytes == 0) return NULL;
    uint64_t first = 0;
    while (first < d->count && dataset_shard(d, first) != &d->shards[0]) first++;
    char reason[256];
    const char *path;
    Shard *shard = dataset_map(d, first, &path, reason, sizeof reason);
    if (!shard) dataset_fail(path, reason);
    const char *text = (const char *)shard->mapping + (shard->bytes - shard->names_bytes), *end = text + shard->names_bytes;
    for (; text < end; label--) {
        const char *stop = (const char *)memchr(text, '\n', end - text);
        if (!stop) stop = end;
        if (label == 0) return strndup(text, stop - text);
        text = stop + 1;
    }
    return NULL;
}

// A number that changes when any byte of the data, or the shards' order, changes; paths do not matter.
static inline uint64_t dataset_identity(const Dataset *d) {
    uint64_t chain[2] = {0, 0};
    for (int i = 0; i < d->n_shards; i++) {
        chain[1] = d->shards[i].header_checksum;
        chain[0] = checksum(chain, sizeof chain);
    }
    return chain[0];
}

// One weight per PATH of dataset_open, any positive scale; NULL goes back to the plain union. Sample k is then set 0's iff
// floor((k+1)w) > floor(k w) with w = weights[0] / sum, and it is that set's sample number floor(k w); else it is number
// k - floor(k w) of the remaining sets, by the same rule. The counts are within 1 of the weights at every k.
// Fails with status 2 where n or a weight is wrong.
static inline void dataset_set_weights(Dataset *d, const double *weights, int n) {
    free(d->set_share);
    d->set_share = NULL;
    if (!weights) return;
    if (n != d->n_sets) fail(STATUS_USAGE, "data.weights: %d weights for %d --data; give one for each", n, d->n_sets);
    double left = 0;
    for (int i = 0; i < n; i++) {
        if (!(weights[i] >= 0) || !isfinite(weights[i]))
            fail(STATUS_USAGE, "data.weights: weight %d is %g; a weight is 0 or more", i + 1, weights[i]);
        if (weights[i] > 0 && d->set_first[i] == d->set_first[i + 1])
            fail(STATUS_USAGE, "data.weights: --data number %d has a weight and no slices", i + 1);
        left += weights[i];
    }
    if (!(left > 0)) fail(STATUS_USAGE, "data.weights: all weights are 0");
    d->set_share = (uint64_t *)xmalloc(n * sizeof *d->set_share, "the dataset");
    int last = n - 1;
    while (weights[last] == 0) last--;
    for (int i = 0; i <= last; i++) {
        double share = i == last ? 1 : weights[i] / left;
        d->set_share[i] = share >= 1 ? (uint64_t)1 << 63 : (uint64_t)(share * 0x1p63);
        left -= weights[i];
    }
}

// ---------------------------------------------------------------------------------------------------------------- order

// Where position (below count) of an epoch lies in the dataset: a bijection on [0,count) for each (seed, epoch). Six
// rounds of a balanced Feistel network on the next even number of bits, keyed by Philox; values outside are walked on
// from until one is inside (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002), under 4 rounds on average.
static inline uint64_t epoch_index(uint64_t seed, uint64_t epoch, uint64_t position, uint64_t count) {
    int half = 1;
    while (half < 32 && count > (uint64_t)1 << 2 * half) half++;
    uint64_t mask = ((uint64_t)1 << half) - 1, value = position;
    Rng key = rng_at(seed, RNG_EPOCH, 0, 0, 0);
    do {
        uint64_t left = value >> half, right = value & mask;
        for (uint32_t round = 0; round < 6; round++) {
            Philox p = philox(key.key[0], key.key[1], (Philox){{(uint32_t)right, round, (uint32_t)epoch, (uint32_t)(epoch >> 32)}});
            uint64_t mixed = left ^ (p.word[0] & mask);
            left = right;
            right = mixed;
        }
        value = left << half | right;
    } while (value >= count);
    return value;
}

// The whole state of sampling: next is the number of samples drawn so far in the run, over all ranks.
typedef struct { uint64_t seed, next; } Sampler;

// The dataset index of the k-th sample of the run (k may be any number: nothing is remembered). Without weights: epoch
// k / count of the union. With weights: each set goes through its own epochs.
static inline uint64_t sampler_index(const Sampler *s, const Dataset *d, uint64_t k) {
    if (!d->set_share) return epoch_index(s->seed, k / d->count, k % d->count, d->count);
    int set = 0;
    for (;; set++) {
        uint64_t before = (uint64_t)((unsigned __int128)k * d->set_share[set] >> 63);
        uint64_t after = (uint64_t)(((unsigned __int128)k + 1) * d->set_share[set] >> 63);
        k = after > before ? before : k - before;
        if (after > before) break;
    }
    uint64_t first = d->set_first[set], count = d->set_first[set + 1] - first;
    return first + epoch_index(s->seed + (uint64_t)set * 0x9E3779B97F4A7C15u, k / count, k % count, count);
}

// ---------------------------------------------------------------------------------------------------------------- prefetch

typedef struct {
    Dataset *dataset;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    uint64_t *indices;
    int n, capacity, busy, stop;
    const char *bad_path;        // a bad shard met in this batch
    char reason[256];
} Prefetch;

static inline void *prefetch_run(void *argument) {
    Prefetch *p = (Prefetch *)argument;
    pthread_mutex_lock(&p->lock);
    for (;;) {
        while (!p->busy && !p->stop) pthread_cond_wait(&p->changed, &p->lock);
        if (p->stop) break;
        pthread_mutex_unlock(&p->lock);
        for (int i = 0; i < p->n && !p->bad_path; i++) {
            const char *path;
            Shard *shard = dataset_map(p->dataset, p->indices[i], &path, p->reason, sizeof p->reason);
            if (!shard || shard_verify(shard, p->indices[i] - shard->first, p->reason, sizeof p->reason)) p->bad_path = path;
        }
        pthread_mutex_lock(&p->lock);
        p->busy = 0;
        pthread_cond_broadcast(&p->changed);
    }
    pthread_mutex_unlock(&p->lock);
    return NULL;
}

// Starts the thread. Fails with status 1.
static inline Prefetch *prefetch_start(Dataset *d) {
    Prefetch *p = (Prefetch *)xmalloc(sizeof *p, "the prefetch thread");
    p->dataset = d;
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->changed, NULL);
    int error = pthread_create(&p->thread, NULL, prefetch_run, p);
    if (error) fail(STATUS_FAILED, "cannot start the prefetch thread: %s", strerror(error));
    return p;
}

// Returns once the batch requested last has been read and verified (at once where none was). Fails with status 3 where a
// shard or slice of it is bad, naming them.
static inline void prefetch_wait(Prefetch *p) {
    pthread_mutex_lock(&p->lock);
    while (p->busy) pthread_cond_wait(&p->changed, &p->lock);
    pthread_mutex_unlock(&p->lock);
    if (p->bad_path) dataset_fail(p->bad_path, p->reason);
}

// Asks for the slices indices[n] of the next batch; returns at once, unless the last request is not finished.
static inline void prefetch_request(Prefetch *p, const uint64_t *indices, int n) {
    prefetch_wait(p);
    if (n > p->capacity) {
        free(p->indices);
        p->indices = (uint64_t *)xmalloc(n * sizeof *indices, "the prefetch list");
        p->capacity = n;
    }
    memcpy(p->indices, indices, n * sizeof *indices);
    pthread_mutex_lock(&p->lock);
    p->n = n;
    p->busy = 1;
    pthread_cond_broadcast(&p->changed);
    pthread_mutex_unlock(&p->lock);
}

// Ends the thread, after the batch it is at.
static inline void prefetch_stop(Prefetch *p) {
    pthread_mutex_lock(&p->lock);
    while (p->busy) pthread_cond_wait(&p->changed, &p->lock);
    p->stop = 1;
    pthread_cond_broadcast(&p->changed);
    pthread_mutex_unlock(&p->lock);
    pthread_join(p->thread, NULL);
    pthread_mutex_destroy(&p->lock);
    pthread_cond_destroy(&p->changed);
    free(p->indices);
    free(p);
}

#endif
