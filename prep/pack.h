/*
From a series to slices, in a worker: decode, put in order, orient, cut, find the body; the result is bytes as a shard holds
them, and a line of the report.

  VolumeResult     what became of a volume
  SeriesResult     the head of a worker's result
  pack_series      a series as a worker's result
*/
#ifndef CURIA_PACK_H
#define CURIA_PACK_H

#include "../curia/json.h"
#include "scan.h"

typedef struct {
    uint64_t volume, patient, content;      // content: hash of the slices as stored
    int32_t reason, modality, n[3], files, bad_files, duplicates, slices, no_body, constant, masks;
    double spacing[3], low, high, tilt;
    char orientation[4], planes[32], format[32];
    char detail[256], notes[512];           // no name, date, UID or path
    uint32_t file;                          // one of its files, for the lines on stderr
    uint64_t blocks, records;               // where its slices' bytes and its ShardSlice records begin in the result
} VolumeResult;

typedef struct { uint64_t volumes, at; } SeriesResult; // at: where the VolumeResults begin

typedef struct {
    const Prep *prep;
    Pool *pool;
    PoolResult *out;
    const Record *records;                  // of the series
    uint64_t count;
    VolumeResult *volumes;
    int n_volumes;
} Packing;

static inline VolumeResult *pack_new(Packing *p, const Record *r, int rank) {
    p->volumes = (VolumeResult *)realloc(p->volumes, (p->n_volumes + 1) * sizeof *p->volumes);
    if (!p->volumes) fail(STATUS_FAILED, "out of memory: %d volumes in one file", p->n_volumes);
    uint64_t key[3] = {r->series, (uint64_t)r->orientation, (uint64_t)rank};
    VolumeResult *v = &p->volumes[p->n_volumes++];
    *v = (VolumeResult){.volume = siphash(p->prep->options->salt, key, sizeof key), .patient = r->patient, .file = r->file};
    return v;
}

__attribute__((format(printf, 3, 4)))
static inline void pack_reject(VolumeResult *v, int reason, const char *detail, ...) {
    va_list args;
    v->reason = reason;
    v->slices = v->masks = 0;
    va_start(args, detail);
    vsnprintf(v->detail, sizeof v->detail, detail, args);
    va_end(args);
    one_line(v->detail);
}

static inline double pack_decoding(Packing *p, double since) {
    double now = seconds_now();
    p->pool->shown[p->pool->own].decoding += now - since;
    return now;
}

// ------------------------------------------------------------------------------------------------------------------ slices

// Where the labels and masks of a volume's slices come from: `record` of each file slice, or one for all.
typedef struct { const char *series; const Record *const *slices; const Record *all; Volume mask; int has_mask; } Marks;

// The table's row for slice `number` of a plane; file_slice: where it lies in the file, -1 where it cuts across the file's
// slices and no one file of a series is its own.
static inline LabelRow *marks_row(Packing *p, const Marks *m, int file_slice, int number) {
    char folder[PATH_SIZE];
    const Record *r = m->slices ? m->slices[file_slice < 0 ? 0 : file_slice] : m->all;
    const char *name = index_name(&p->prep->index, r->file), *slash = strrchr(name, '/');
    if (m->slices && file_slice < 0) {
        snprintf(folder, sizeof folder, "%.*s", slash ? (int)(slash + 1 - name) : 0, name);
        name = folder;
    }
    return labels_find(&p->prep->labels, name, m->series, number);
}

// The plane across the longest voxel side where that is more than twice the shortest; else across an axis of fewer than 16
// voxels, which is a stack of slices; else axial.
static inline int native_plane(const Volume *v) {
    int longest = 0, shortest = 0, thinnest = 0;
    for (int a = 1; a < 3; a++) {
        if (v->spacing[a] > v->spacing[longest]) longest = a;
        if (v->spacing[a] < v->spacing[shortest]) shortest = a;
        if (v->n[a] < v->n[thinnest]) thinnest = a;
    }
    int uneven = v->spacing[longest] > 2 * v->spacing[shortest] && v->n[thinnest] > 1;  // a single slice has no spacing of its own
    int across = uneven ? v->axis[longest] : v->n[thinnest] < 16 ? v->axis[thinnest] : 2;
    return plane_across[across];
}

static inline float volume_threshold(const Volume *v, int modality) {
    if (modality == MODALITY_CT) return anatomy_threshold(NULL, 0, modality);
    size_t count = (size_t)v->n[0] * v->n[1] * v->n[2], step = count / 250007 + 1, n = 0, slice = (size_t)v->n[0] * v->n[1];
    float *sample = (float *)xmalloc((count / step + 1) * sizeof *sample, "a threshold");
    for (size_t i = 0; i < count; i += step) {
        float scale = v->slice_scale ? v->slice_scale[i / slice] : v->scale;
        sample[n++] = scale * v->pixels[i] + (v->slice_scale ? v->slice_intercept[i / slice] : v->intercept);
    }
    float threshold = anatomy_threshold(sample, n, modality);
    free(sample);
    return threshold;
}

// The hash of a volume's slices so far, with one more: equal for equal slices, whatever the files were called.
static inline uint64_t volume_content(uint64_t content, const ShardSlice *s) {
    uint64_t key[3] = {content, s->checksum, (uint64_t)s->plane << 8 | s->modality};
    return checksum(key, sizeof key);
}

static inline int all_equal(const void *data, size_t bytes, size_t unit) {
    return bytes <= unit || !memcmp(data, (const char *)data + unit, bytes - unit);
}

// Cuts a volume in one plane and writes its slices' blocks to the result; their records, without volume statistics and
// offsets, to *records.
static inline void pack_plane(Packing *p, VolumeResult *result, const Volume *v, const Marks *marks, ShardSlice s, int plane,
                              float threshold, ShardSlice **records) {
    const Options *o = p->prep->options;
    VolumeView w = volume_view(v, plane);
    size_t n = (size_t)w.rows * w.cols;
    int16_t *mask = marks->has_mask ? (int16_t *)xmalloc(n * sizeof *mask, "a mask") : NULL;
    int first = result->slices;
    Moments plain = {0}, clipped = {0};
    s.rows = w.rows, s.cols = w.cols, s.volume_slices = w.slices, s.plane = (uint8_t)plane;
    s.spacing_row = w.spacing_row, s.spacing_col = w.spacing_col, s.spacing_slice = w.spacing_slice;
    *records = (ShardSlice *)realloc(*records, (first + w.slices) * sizeof **records);
    if (!*records) fail(STATUS_FAILED, "out of memory: %d slices", first + w.slices);
    for (int i = 0; i < w.slices; i++) {
        int at = volume_file_slice(v, &w, i), marked = 0;
        uint8_t *block = (uint8_t *)result_room(p->out, shard_align(3 * n)); // made in its place
        int16_t *pixels = (int16_t *)block;
        volume_slice(v, plane, i, pixels);
        if (v->slice_scale) s.scale = v->slice_scale[at], s.intercept = v->slice_intercept[at];
        if (mask) {
            uint8_t *out = block + 2 * n;
            volume_slice(&marks->mask, plane, i, mask);
            for (size_t j = 0; j < n; j++) out[j] = (uint8_t)(marks->mask.scale * mask[j] + marks->mask.intercept);
            marked = !all_equal(out, n, 1) || out[0];
        }
        int constant = all_equal(pixels, 2 * n, 2);
        double body = slice_anatomy(pixels, w.rows, w.cols, s.scale, s.intercept, threshold, &s);
        if (!o->whole_volumes && !marked && (constant || body < 0.01)) {
            result->constant += constant;
            result->no_body += !constant;
            continue;
        }
        moments_add(&plain, pixels, (int)n, s.scale, s.intercept, -INFINITY);
        moments_add(&clipped, pixels, (int)n, s.scale, s.intercept, -1000);
        LabelRow *row = marks_row(p, marks, w.normal == 2 ? at : -1, i);
        s.label = row ? row->index : -1;
        s.target = row ? row->target : NAN;
        s.slice_number = i;
        s.mask_offset = mask ? 1 : 0;           // the parent makes offsets of it
        size_t bytes = shard_slice_bytes(&s), used = n * (mask ? 3 : 2);
        memset(block + used, 0, bytes - used);
        s.checksum = checksum_wide(block, bytes);
        p->out->at += (off_t)bytes;
        (*records)[result->slices++] = s;
        result->masks += marked;
    }
    for (int i = first; i < result->slices; i++) {
        ShardSlice *t = &(*records)[i];
        t->volume_mean = (float)plain.mean, t->volume_std = (float)moments_std(&plain);
        t->volume_mean_clipped = (float)clipped.mean, t->volume_std_clipped = (float)moments_std(&clipped);
        result->content = volume_content(result->content, t);
    }
    free(mask);
}

// Cuts the volume and adds its slices to the result. `only`: the one plane it can be cut in, or -1.
static inline void pack_volume(Packing *p, VolumeResult *result, Volume *v, const Marks *marks, int modality, int only) {
    const Options *o = p->prep->options;
    if (modality == MODALITY_CT && v->low > -500)
        volume_note(v, "no value at or below -500: a CT without air, or its intercept is missing");
    if (modality == MODALITY_CT && v->high < 100) volume_note(v, "no value above 100 HU: a CT without bone?");
    for (int a = 0; a < 3; a++) {
        result->n[a] = v->n[a];
        result->spacing[a] = v->spacing[a];
        result->orientation[a] = "LPSRAI"[v->axis[a] + 3 * v->flip[a]];
    }
    result->modality = modality, result->low = v->low, result->high = v->high;
    ShardSlice s = {.volume_id = result->volume, .patient_id = result->patient, .scale = v->scale, .intercept = v->intercept,
                    .modality = (uint8_t)modality}, *records = NULL;
    int native = only >= 0 ? only : native_plane(v), small = 1, cut = 0;
    float threshold = volume_threshold(v, modality);
    result->blocks = (uint64_t)p->out->at;
    for (int plane = 0; plane < PLANE_COUNT; plane++) {
        VolumeView w = volume_view(v, plane);
        if (o->planes != PLANES_ALL && plane != (o->planes == PLANES_NATIVE ? native : o->planes)) continue;
        if (only >= 0 && plane != only) {
            volume_note(v, "uneven or tilted slices: not cut in other planes");
            continue;
        }
        cut = 1;
        if (w.rows < 16 || w.cols < 16) continue;
        small = 0;
        pack_plane(p, result, v, marks, s, plane, threshold, &records);
        size_t used = strlen(result->planes);
        snprintf(result->planes + used, sizeof result->planes - used, "%s%s", used ? "," : "", plane_names[plane]);
    }
    result->records = (uint64_t)p->out->at;
    if (result->slices) result_write(p->out, records, result->slices * sizeof *records);
    free(records);
    snprintf(result->notes, sizeof result->notes, "%s", v->notes);
    one_line(result->notes);
    if (!result->slices) pack_reject(result, small ? REASON_SMALL : REASON_NO_BODY, "%s", cut ? "" : result->notes);
}

// ------------------------------------------------------------------------------------------------------------------- masks

// Reads the label image at path as the mask of *v. 0 good, else -1 and *reason.
static inline int mask_read(const char *path, const Volume *v, Volume *mask, char *reason, size_t size) {
    VolumeFile f;
    char unused[256];
    memset(mask, 0, sizeof *mask);
    if (volumefile_open(path, &f, reason, size)) return -1;
    int bad = volumefile_next(&f, 1, mask, reason, size), empty = bad && mask->n[0] && mask->low == 0 && mask->high == 0;
    if (empty) {                                // a case without findings
        mask->pixels = (int16_t *)xmalloc((size_t)mask->n[0] * mask->n[1] * mask->n[2] * sizeof *mask->pixels, "a mask");
        mask->scale = 1;
        bad = 0;
    }
    if (volumefile_close(&f, unused, sizeof unused) && !bad) bad = -1, snprintf(reason, size, "%s", unused);
    if (!bad && mask->low >= 0 && mask->high <= 255 && mask->scale == 1 && mask->not_numbers == 0) {
        if (volume_same_grid(v, mask)) return 0;
        snprintf(reason, size, "its grid is another one (%dx%dx%d voxels, or more than 1e-3 of a voxel apart)", mask->n[0],
                 mask->n[1], mask->n[2]);
    } else if (!bad) snprintf(reason, size, "its values are not integers from 0 to 255");
    volume_free(mask);
    return -1;
}

// The mask that the table or the folder's layout gives the file at path, if it fits. What is wrong becomes a note.
static inline void marks_mask(Packing *p, Marks *m, Volume *v, const char *path, LabelRow *row) {
    char mask[PATH_SIZE], reason[256];
    const char *folder = p->prep->labels.folder;
    if (row && *row->mask) {
        snprintf(mask, sizeof mask, "%s%s", *row->mask == '/' || !folder ? "" : folder, row->mask);
    } else if (!mask_beside(path, mask)) return;
    double start = seconds_now();
    m->has_mask = !mask_read(mask, v, &m->mask, reason, sizeof reason);
    pack_decoding(p, start);
    if (!m->has_mask) volume_note(v, "its mask is not used: %s", reason);
}

// ------------------------------------------------------------------------------------------------------------------- DICOM

static inline int ints_order(const void *a, const void *b) {
    return (*(const int *)a > *(const int *)b) - (*(const int *)a < *(const int *)b);
}

// Which of `ranks` volumes of a 4-D series each record is of, if TemporalPosition (or else AcquisitionNumber) tells: then a
// slice that is missing is missed in its own volume. rank: -1 stays; else overwritten. Returns whether it tells.
static inline int series_ranks_by(const Record *r, int n, int by_acquisition, int ranks, int *rank) {
    int *values = (int *)xmalloc((n + 1) * sizeof *values, "a series"), kinds = 0, tells = 1;
    for (int i = 0; i < n; i++) values[i] = by_acquisition ? r[i].acquisition : r[i].temporal;
    qsort(values, n, sizeof *values, ints_order);
    for (int i = 0; i < n; i++)
        if (kinds == 0 || values[i] != values[kinds - 1]) values[kinds++] = values[i];
    tells = kinds == ranks && values[0] >= 0;
    for (int pass = 0; pass < 2 && tells; pass++)
        for (int i = 0; i < n; i++) {
            int value = by_acquisition ? r[i].acquisition : r[i].temporal;
            if (rank[i] < 0) continue;
            if (pass) rank[i] = (int)((int *)bsearch(&value, values, kinds, sizeof *values, ints_order) - values);
            else if (rank[i] > 0 && value == (by_acquisition ? r[i - 1].acquisition : r[i - 1].temporal)) tells = 0;
        }
    free(values);
    return tells;
}

// The slices at each place along the normal, without copies: fills rank of each of n records, the volume of a 4-D series it
// is of, -1: a copy of the one before. Returns how many places; *ranks is how many slices the fullest place has.
static inline int series_places(const Record *r, int n, int *rank, int *ranks) {
    int places = 0, first = 0, used = 0;
    *ranks = 0;
    for (int i = 0; i < n; i++) {
        if (i == 0 || r[i].along - r[first].along > 0.01) {
            places++;
            first = i;
            used = 0;
        }
        rank[i] = i > first && r[i].instance == r[i - 1].instance ? -1 : used++;
        if (used > *ranks) *ranks = used;
    }
    if (*ranks > 1 && !series_ranks_by(r, n, 0, *ranks, rank)) series_ranks_by(r, n, 1, *ranks, rank);
    return places;
}

// Geometry of a stack whose slices lie at `along` (ascending): steps, tilt of the gantry and gaps. Returns whether it is a
// regular grid.
static inline int series_geometry(Volume *v, VolumeResult *result, const Record *const *slices, const DicomFrame *f, int n) {
    double normal[3], shift[3] = {0}, median = f->thickness > 0 ? f->thickness : 1, across = 0;
    double *gaps = (double *)xmalloc((n + 1) * sizeof *gaps, "a series");
    const Record *first = slices[0], *last = slices[n - 1];
    int regular = 1;
    for (int k = 0; k < 3; k++)
        normal[k] = f->row[(k + 1) % 3] * f->column[(k + 2) % 3] - f->row[(k + 2) % 3] * f->column[(k + 1) % 3];
    for (int i = 0; i + 1 < n; i++) gaps[i] = slices[i + 1]->along - slices[i]->along;
    if (n > 1) {
        qsort(gaps, n - 1, sizeof *gaps, raw_order);
        median = gaps[(n - 1) / 2];
        if (gaps[n - 2] - gaps[0] > fmax(0.05 * median, 0.1)) {
            volume_note(v, "uneven gaps of %.4g to %.4g mm", gaps[0], gaps[n - 2]);
            regular = 0;
        }
        for (int k = 0; k < 3; k++) shift[k] = last->position[k] - first->position[k];
        for (int k = 0; k < 3; k++) {
            double off = shift[k] - normal[k] * (last->along - first->along);
            across += off * off;
        }
        result->tilt = atan2(sqrt(across), last->along - first->along) * 57.29578;
        if (result->tilt > 0.5) {
            volume_note(v, "tilted gantry: %.1f degrees", result->tilt);
            regular = 0;
        }
    }
    for (int k = 0; k < 3; k++) {
        v->origin[k] = first->position[k];
        v->step[0][k] = f->row[k] * f->spacing_col;
        v->step[1][k] = f->column[k] * f->spacing_row;
        v->step[2][k] = normal[k] * median;
    }
    free(gaps);
    return regular;
}

// The file that a worker has decoded last: frames of one file are asked for one after the other.
typedef struct { uint32_t file; int open; DicomHeader header; DicomFrame *frames; uint8_t *pixels; } DicomOpen;

static inline void dicom_open_close(DicomOpen *d) {
    free(d->frames);
    free(d->pixels);
    *d = (DicomOpen){0};
}

// Makes frame r->frame of r->file ready in *d; its stored values go to out. 0 good, else -1 and *reason.
static inline int dicom_frame(Packing *p, DicomOpen *d, const Record *r, void *out, size_t bytes, char *reason, size_t size) {
    const char *path = index_path(&p->prep->index, r->file);
    double start = seconds_now();
    int bad = 0, decoded = 0;
    if (!d->open || d->file != r->file) {
        dicom_open_close(d);
        pool_item(p->pool, r->file);
        bad = dicom_scan(path, &d->header, &d->frames, out, bytes, reason, size);
        decoded = !bad && d->header.decoded;
        d->file = r->file;
        d->open = !bad;
    }
    size_t frame = bad ? 0 : (size_t)d->header.rows * d->header.cols * raw_bytes(d->header.type);
    if (!bad && out && (frame != bytes || r->frame >= d->header.frames)) {
        snprintf(reason, size, "it has changed while it was read");
        bad = -1;
    }
    int wanted = !bad && out && !decoded;
    if (wanted && d->header.frames == 1) bad = dicom_decode(path, &d->header, out, reason, size);
    else if (wanted) {
        if (!d->pixels) {
            d->pixels = (uint8_t *)xmalloc(frame * d->header.frames, "a multi-frame file");
            bad = dicom_decode(path, &d->header, d->pixels, reason, size);
        }
        if (!bad) memcpy(out, d->pixels + frame * r->frame, frame);
    }
    pack_decoding(p, start);
    if (bad) dicom_open_close(d);
    return bad;
}

// One volume of a series: those of its slices that have `rank` among the ones at their place.
static inline void pack_rank(Packing *p, DicomOpen *d, const int *rank, int wanted, int ranks, int duplicates) {
    const Options *o = p->prep->options;
    const Record *r = p->records;
    VolumeResult *result = pack_new(p, r, wanted);
    Volume v = {0};
    const Record **slices = (const Record **)xmalloc((p->count + 1) * sizeof *slices, "a series");
    double *slope = (double *)xmalloc(2 * (p->count + 1) * sizeof *slope, "a series"), *intercept = slope + p->count + 1;
    void *raw = NULL;
    size_t bytes = 0;
    char reason[256] = "", first_bad[256] = "", series[DICOM_TEXT] = "";
    int n = 0, most = 0, type = 0, same = 1, inverted = 0;
    DicomFrame frame = {0};
    for (uint64_t i = 0; i < p->count; i++) most += rank[i] == wanted;
    for (uint64_t i = 0; i < p->count; i++) {
        if (rank[i] != wanted) continue;
        const FileEntry *file = index_file(&p->prep->index, r[i].file);
        int bad = file->reason != 0;
        if (bad) snprintf(reason, sizeof reason, "%s", reason_texts[file->reason]);
        else if (!raw) {                        // the first good header says how large slices are
            bad = dicom_frame(p, d, &r[i], NULL, 0, reason, sizeof reason);
            if (!bad) {
                type = d->header.type;
                bytes = (size_t)d->header.rows * d->header.cols * raw_bytes(type);
                v.n[0] = d->header.cols, v.n[1] = d->header.rows;
                snprintf(series, sizeof series, "%s", d->header.series);
                snprintf(result->format, sizeof result->format, "DICOM %s", d->header.syntax_name);
                raw = malloc(bytes * most);
                if (!raw) fail(STATUS_FAILED, "out of memory: a series of %.1f GiB", bytes * most / 1073741824.0);
            }
        }
        if (!bad) bad = dicom_frame(p, d, &r[i], (uint8_t *)raw + bytes * n, bytes, reason, sizeof reason);
        if (bad) {
            if (!result->bad_files++) snprintf(first_bad, sizeof first_bad, "%s", reason);
            continue;
        }
        const DicomFrame *f = &d->frames[r[i].frame];
        if (n == 0) frame = *f;
        slices[n] = &r[i];
        slope[n] = f->slope, intercept[n] = f->intercept;
        same &= slope[n] == slope[0] && intercept[n] == intercept[0];
        if (!strncmp(d->header.photometric, "MONOCHROME1", 11) && r->modality != MODALITY_CT) {
            int64_t low = d->header.is_signed ? -((int64_t)1 << (d->header.bits_stored - 1)) : 0;
            int64_t sum = 2 * low + ((int64_t)1 << d->header.bits_stored) - 1;
            raw_invert((uint8_t *)raw + bytes * n, type, (size_t)v.n[0] * v.n[1], sum);
            inverted++;
        }
        n++;
    }
    result->files = n;
    result->duplicates = duplicates;
    v.n[2] = n;
    int regular = 1, modality = o->modality ? o->modality : r->modality, only = -1;
    if (n == 0 || (n < 4 && result->bad_files && !o->keep[REASON_FEW])) pack_reject(result, REASON_DAMAGED, "%s", first_bad);
    else {
        if (!frame.has_position || !frame.has_orientation)
            for (int k = 0; k < 3; k++) frame.row[k] = k == 0, frame.column[k] = k == 1;
        if (!frame.has_spacing) frame.spacing_row = frame.spacing_col = 1;
        regular = series_geometry(&v, result, slices, &frame, n);
        int bad = volume_orient(&v, reason, sizeof reason);
        if (bad) pack_reject(result, REASON_NO_GEOMETRY, "%s", reason);
        else if ((bad = volume_store(&v, &raw, type, same ? slope[0] : 1, same ? intercept[0] : 0, reason, sizeof reason)))
            pack_reject(result, v.low == v.high ? REASON_CONSTANT : REASON_DAMAGED, "%s", reason);
    }
    free(raw);
    if (!result->reason && !same) {
        v.slice_scale = (float *)xmalloc(n * sizeof(float), "a series");
        v.slice_intercept = (float *)xmalloc(n * sizeof(float), "a series");
        double low = INFINITY, high = -INFINITY;
        for (int i = 0; i < n; i++) {
            v.slice_scale[i] = (float)(slope[i] * v.scale);
            v.slice_intercept[i] = (float)(slope[i] * v.intercept + intercept[i]);
            double ends[2] = {slope[i] * v.low + intercept[i], slope[i] * v.high + intercept[i]};
            low = fmin(low, fmin(ends[0], ends[1])), high = fmax(high, fmax(ends[0], ends[1]));
        }
        v.low = low, v.high = high;
        volume_note(&v, "slices have their own rescale");
    }
    if (!result->reason) {
        if (!regular || !same) only = plane_across[v.axis[2]];
        if (ranks > 1) volume_note(&v, "4-D: volume %d of %d", wanted + 1, ranks);
        if (duplicates) volume_note(&v, "%d copies of slices left out", duplicates);
        if (result->bad_files) volume_note(&v, "%d slices left out: %s", result->bad_files, first_bad);
        if (inverted) volume_note(&v, "MONOCHROME1: %d slices inverted", inverted);
        if (slices[0]->lossy) volume_note(&v, "compressed with loss");
        const Index *x = &p->prep->index;
        Marks marks = {.series = series, .slices = slices};
        marks_mask(p, &marks, &v, index_path(x, slices[0]->file),
                   labels_find(&p->prep->labels, index_name(x, slices[0]->file), series, 0));
        pack_volume(p, result, &v, &marks, modality, only);
        if (marks.has_mask) volume_free(&marks.mask);
    }
    volume_free(&v);
    free(slices);
    free(slope);
}

static inline void pack_dicom(Packing *p) {
    const Options *o = p->prep->options;
    const Record *r = p->records;
    int n = (int)p->count, ranks, duplicates = 0;
    int *rank = (int *)xmalloc((n + 1) * sizeof *rank, "a series");
    int places = series_places(r, n, rank, &ranks);
    for (int i = 0; i < n; i++) duplicates += rank[i] < 0;
    if (places < 4 && !o->keep[REASON_FEW]) {
        VolumeResult *v = pack_new(p, r, 0);
        v->files = n;
        v->modality = r->modality;
        pack_reject(v, REASON_FEW, "%s", "");
    } else {
        DicomOpen d = {0};
        int first = o->fourd == FOURD_MID ? ranks / 2 : 0, last = o->fourd == FOURD_ALL ? ranks - 1 : first;
        for (int k = first; k <= last; k++) pack_rank(p, &d, rank, k, ranks, k == first ? duplicates : 0);
        dicom_open_close(&d);
    }
    free(rank);
}

// ------------------------------------------------------------------------------------------------------------ volume files

// CT or MR as what lies beside the file says, in the order: dcm2niix's sidecar, nnU-Net's dataset.json, BIDS' folders. Or
// MODALITY_UNKNOWN.
static inline int modality_beside(const char *path) {
    char stem[PATH_SIZE], beside[PATH_SIZE + 32], error[256];
    snprintf(stem, sizeof stem, "%s", path);
    name_stem(stem);
    char *folder_end = strrchr(stem, '/'), *above = NULL;
    if (folder_end) {
        for (above = folder_end - 1; above > stem && above[-1] != '/';) above--;
    }
    for (int i = 0; i < 2; i++) {
        if (i == 0) snprintf(beside, sizeof beside, "%s.json", stem);
        else if (!above || strncmp(above, "images", 6)) break;
        else snprintf(beside, sizeof beside, "%.*sdataset.json", (int)(above - stem), stem);
        struct stat st;
        if (stat(beside, &st) || !S_ISREG(st.st_mode) || st.st_size > 1 << 24) continue;
        size_t bytes;
        char *text = file_read(beside, &bytes);
        Json *json = json_parse(text, bytes, error, sizeof error);
        const Json *said = json ? json_get(json, i == 0 ? "Modality" : "channel_names") : NULL;
        if (json && !said && i == 1) said = json_get(json, "modality");
        if (said && said->type == JSON_OBJECT && said->count) said = &said->children[0];
        int modality = said && said->type == JSON_STRING ? (!strncmp(said->text, "CT", 2)                                   ? MODALITY_CT
                                                            : !strncmp(said->text, "MR", 2) || !strncmp(said->text, "T1", 2) ||
                                                                    !strncmp(said->text, "T2", 2) || !strncmp(said->text, "FLAIR", 5)
                                                                ? MODALITY_MR
                                                                : MODALITY_UNKNOWN)
                                                         : MODALITY_UNKNOWN;
        if (json) json_free(json);
        free(text);
        if (modality) return modality;
    }
    if (strstr(path, "/sub-"))
        for (int i = 0; i < 4; i++)
            if (strstr(path, (const char *[]){"/anat/", "/func/", "/dwi/", "/perf/"}[i])) return MODALITY_MR;
    return MODALITY_UNKNOWN;
}

static inline void pack_file(Packing *p, const Record *r, int copy) {
    const Options *o = p->prep->options;
    const char *path = index_path(&p->prep->index, r->file);
    char reason[256] = "";
    VolumeFile f;
    double start = seconds_now();
    pool_item(p->pool, r->file);
    int first_result = p->n_volumes, bad = volumefile_open(path, &f, reason, sizeof reason);
    start = pack_decoding(p, start);
    if (bad) {
        VolumeResult *v = pack_new(p, r, copy << 16);
        v->files = 1;
        int scalar = !strstr(reason, "colour") && !strstr(reason, "complex") && !strstr(reason, "vectors");
        pack_reject(v, scalar ? REASON_DAMAGED : REASON_NOT_SCALAR, "%s", reason);
        return;
    }
    LabelRow *row = labels_find(&p->prep->labels, index_name(&p->prep->index, r->file), "", 0);
    int beside = modality_beside(path);
    int64_t first = o->fourd == FOURD_MID ? f.volumes / 2 : 0, last = o->fourd == FOURD_ALL ? f.volumes - 1 : first;
    for (int64_t i = 0; i <= last && !bad; i++) {
        Volume v = {0};
        start = seconds_now();
        bad = volumefile_next(&f, i >= first, &v, reason, sizeof reason);
        pack_decoding(p, start);
        if (i < first && !bad) continue;
        VolumeResult *result = pack_new(p, r, (copy << 16) + (int)i);
        result->files = 1;
        snprintf(result->format, sizeof result->format, "%s", volumefile_names[f.kind]);
        if (bad && v.n[0]) {
            pack_reject(result, v.low == v.high ? REASON_CONSTANT : REASON_DAMAGED, "%s", reason);
            bad = 0;                            // the file's other volumes may be good
        } else if (bad) pack_reject(result, strstr(reason, "in memory") ? REASON_MEMORY : REASON_DAMAGED, "%s", reason);
        else if (v.labels && !o->keep[REASON_LABEL]) pack_reject(result, REASON_LABEL, "%s", "");
        else {
            int modality = o->modality ? o->modality : beside ? beside : v.low <= -500 ? MODALITY_CT : MODALITY_MR;
            if (f.volumes > 1) volume_note(&v, "4-D: volume %lld of %lld", (long long)i + 1, (long long)f.volumes);
            Marks marks = {.series = "", .all = r};
            marks_mask(p, &marks, &v, path, row);
            pack_volume(p, result, &v, &marks, modality, -1);
            if (marks.has_mask) volume_free(&marks.mask);
        }
        volume_free(&v);
    }
    start = seconds_now();
    if (volumefile_close(&f, reason, sizeof reason) && !bad) // the end of the file belies its beginning: nothing of it is taken
        for (int i = first_result; i < p->n_volumes; i++) pack_reject(&p->volumes[i], REASON_DAMAGED, "%s", reason);
    pack_decoding(p, start);
}

// ------------------------------------------------------------------------------------------------------------------ series

// Does series `task` of the index and writes its result.
static inline void pack_series(const Prep *prep, Pool *pool, int64_t task, PoolResult *out) {
    const Series *s = &prep->index.series[task];
    Packing p = {.prep = prep, .pool = pool, .out = out, .records = index_record(&prep->index, s->first), .count = s->count};
    SeriesResult head = {0};
    result_write(out, &head, sizeof head);
    result_write(out, (uint8_t[SHARD_ALIGN]){0}, SHARD_ALIGN - sizeof head);
    const Record *r = p.records;
    pool_item(pool, r->file);
    int copies = 0, dicom = r->reason == 0 && r->kind == KIND_DICOM;
    if (dicom) pack_dicom(&p);
    for (uint64_t i = 0; i < s->count && !dicom; i++) {
        const FileEntry *file = index_file(&prep->index, r[i].file);
        if (r[i].kind == KIND_VOLUME && !r[i].reason && !file->reason) pack_file(&p, &r[i], copies++);
        else if (i == 0 || r[i].kind != KIND_DICOM) {
            VolumeResult *v = pack_new(&p, &r[i], copies++ << 16);
            char detail[256] = "";
            v->reason = file->reason ? file->reason : r[i].reason;
            v->modality = r[i].modality;
            v->files = r[i].kind == KIND_DICOM ? (int)s->count : 1;
            if (v->reason == REASON_DAMAGED) {  // asked again what is wrong with it
                DicomHeader h;
                DicomFrame *frames = NULL;
                if (!dicom_scan(index_path(&prep->index, r[i].file), &h, &frames, NULL, 0, detail, sizeof detail)) *detail = 0;
                free(frames);
            }
            pack_reject(v, v->reason, "%s", detail);
        }
    }
    pool_item(pool, -1);
    head = (SeriesResult){(uint64_t)p.n_volumes, (uint64_t)out->at};
    result_write(out, p.volumes, p.n_volumes * sizeof *p.volumes);
    memcpy(out->base, &head, sizeof head);
    free(p.volumes);
}

#endif
