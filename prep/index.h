/*
The index of the inputs: every file, every DICOM frame or volume file as a record, and the records of one series side by side.
It lies in nameless files under TMPDIR, mapped: a page of it can leave memory, and nothing of it is left behind.

  REASONS, reason_names   why a series is not taken, and which of these --keep can overrule
  Mapped, mapped_add      an array in a nameless file
  FileEntry               a file found
  Record                  a frame of a DICOM file, or a volume file
  Series                  a run of records that make one series of one patient
  Index, index_open       all of it
  index_path, index_name  the path of a file, and its name below INPUT
  index_walk, index_list  adds a file, or what is below a folder; or what a list names
  index_sort              brings the records of a series together, in order, and lists the series
*/
#ifndef CURIA_INDEX_H
#define CURIA_INDEX_H

#include "../curia/file.h"
#include "volume.h"

// code, name, whether --keep overrules it, what a person is told
#define REASONS(X) \
    X(NONE, "", 0, "") \
    X(UNREADABLE, "unreadable", 0, "cannot be opened; see that it is there and readable") \
    X(UNKNOWN, "unknown-format", 0, "not an image format that prep knows") \
    X(DAMAGED, "damaged", 0, "damaged, cut short, or of a kind that cannot be decoded") \
    X(CRASHED, "crashed", 0, "its decoder crashed") \
    X(LATE, "time-limit", 0, "took longer than --time-limit") \
    X(MEMORY, "memory-limit", 0, "needs more memory than --memory-limit allows") \
    X(NOT_SCALAR, "not-scalar", 0, "colour, complex numbers or vectors, not one value per voxel") \
    X(NO_PATIENT, "no-patient", 0, "the expression of --patient-from is not in its name") \
    X(CONSTANT, "constant", 0, "every voxel is the same") \
    X(SMALL, "too-small", 0, "slices have fewer than 16 rows or columns") \
    X(NO_BODY, "no-body", 0, "no slice with body in it") \
    X(NOT_IMAGE, "not-image", 1, "a report, plan, segmentation or other object that is no scan") \
    X(SECONDARY, "secondary-capture", 1, "a secondary capture: a picture of a screen, not a scan") \
    X(MODALITY, "modality", 1, "neither CT nor MR") \
    X(BURNED_IN, "burned-in", 1, "has text burnt into its pixels, which may name the patient") \
    X(DOSE_REPORT, "dose-report", 1, "a dose report") \
    X(PERFUSION, "perfusion-map", 1, "a map computed from a perfusion scan") \
    X(PROJECTION, "projection", 1, "a projection or reformat computed from a scan (MIP, MPR)") \
    X(LOCALIZER, "localizer", 1, "a localizer (scout)") \
    X(EIGHT_BIT, "eight-bit", 1, "8 bits: windowed for a screen") \
    X(NO_GEOMETRY, "no-geometry", 1, "says nowhere how its slices lie in the patient") \
    X(FEW, "few-slices", 1, "fewer than 4 slices at different places") \
    X(LABEL, "label", 1, "a label image, not a scan") \
    X(DUPLICATE, "duplicate", 1, "has the same slices as an earlier one")

#define REASON_CODE(code, name, kept, text) REASON_##code,
enum { REASONS(REASON_CODE) REASON_COUNT };
#define REASON_NAME(code, name, kept, text) name,
static const char *const reason_names[REASON_COUNT] = {REASONS(REASON_NAME)};
#define REASON_KEPT(code, name, kept, text) kept,
static const uint8_t reason_overruled[REASON_COUNT] = {REASONS(REASON_KEPT)};
#define REASON_TEXT(code, name, kept, text) text,
static const char *const reason_texts[REASON_COUNT] = {REASONS(REASON_TEXT)};

enum { KIND_OTHER, KIND_VOLUME, KIND_DICOM, KIND_MISSING };

typedef struct { uint8_t *at; uint64_t bytes, room; int file; } Mapped;

typedef struct {
    uint64_t path, size;               // path: where it begins among the names
    uint32_t name;                     // bytes of the path before the name below INPUT
    uint8_t named, kind, reason;       // named on the command line; reason: its worker died of it
} FileEntry;

typedef struct {
    uint64_t patient, series, instance;// keyed hashes; series: of all that makes one volume but the orientation
    double position[3], along;         // mm, LPS: of the first pixel, and along the slices' common normal
    double time;                       // seconds; orders frames at one place, after the numbers below
    float row[3], column[3];           // unit vectors along rows and columns; zero where unknown
    int32_t temporal, acquisition, number, frame, orientation;
    uint32_t file;
    uint8_t kind, reason, modality, lossy;
} Record;

typedef struct { uint64_t first; uint32_t count; } Series;

typedef struct {
    Mapped names, files, records;
    uint64_t n_files, n_records;
    Series *series;
    uint64_t n_series;
    uint64_t share, shares;            // --shard-of
} Index;

static inline FileEntry *index_file(const Index *x, uint64_t i) { return &((FileEntry *)x->files.at)[i]; }
static inline Record *index_record(const Index *x, uint64_t i) { return &((Record *)x->records.at)[i]; }
static inline const char *index_path(const Index *x, uint64_t file) { return (char *)x->names.at + index_file(x, file)->path; }
static inline const char *index_name(const Index *x, uint64_t file) { return index_path(x, file) + index_file(x, file)->name; }

// Appends bytes. Disk is claimed before it is written to, so that a full one is an error here and not a signal later.
static inline void mapped_add(Mapped *m, const void *data, size_t bytes) {
    if (m->bytes + bytes > m->room) {
        uint64_t room = m->room ? m->room + (m->room < ((uint64_t)1 << 30) ? m->room : (uint64_t)1 << 30) : 1 << 20;
        while (room < m->bytes + bytes) room += 1 << 20;
        int error = posix_fallocate(m->file, 0, (off_t)room);
        void *at = error ? MAP_FAILED
                   : m->at ? mremap(m->at, m->room, room, MREMAP_MAYMOVE)
                           : mmap(NULL, room, PROT_READ | PROT_WRITE, MAP_SHARED, m->file, 0);
        if (at == MAP_FAILED)
            fail(STATUS_FAILED, "the index of the inputs needs %.1f MiB under TMPDIR: %s; set TMPDIR to a larger disk",
                 room / 1048576.0, strerror(error ? error : errno));
        m->at = (uint8_t *)at;
        m->room = room;
    }
    memcpy(m->at + m->bytes, data, bytes);
    m->bytes += bytes;
}

static inline Mapped mapped_open(void) {
    const char *folder = getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp";
    Mapped m = {.file = open(folder, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600)};
    if (m.file < 0) m.file = memfd_create("index", MFD_CLOEXEC);  // a file system without nameless files: in memory
    if (m.file < 0) fail(STATUS_FAILED, "%s: cannot hold the index of the inputs: %s; set TMPDIR", folder, strerror(errno));
    return m;
}

static inline Index index_open(uint64_t share, uint64_t shares) {
    return (Index){.names = mapped_open(), .files = mapped_open(), .records = mapped_open(), .share = share, .shares = shares};
}

static inline int ends_with(const char *text, const char *end) {
    size_t a = strlen(text), b = strlen(end);
    return a >= b && !strcasecmp(text + a - b, end);
}

// Whether the file called `name` below INPUT is this node's: by its own name where that says that it holds a whole volume,
// else by its folder, so that the slices of a series stay together and no node opens another's files.
static inline int index_mine(const Index *x, const char *name) {
    static const char *const whole[] = {".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd", ".hdr", ".hdr.gz", ".shard"};
    size_t bytes = strrchr(name, '/') ? (size_t)(strrchr(name, '/') - name) : 0;
    for (size_t i = 0; i < sizeof whole / sizeof *whole; i++)
        if (ends_with(name, whole[i])) bytes = strlen(name);
    return siphash((SipKey){0x7368617265, x->shares}, name, bytes) % x->shares == x->share;
}

static inline void index_add(Index *x, const char *path, size_t skip, uint64_t size, int named) {
    if (x->shares > 1 && !index_mine(x, path + skip)) return;
    FileEntry f = {.path = x->names.bytes, .size = size, .name = (uint32_t)skip, .named = (uint8_t)named};
    mapped_add(&x->names, path, strlen(path) + 1);
    mapped_add(&x->files, &f, sizeof f);
    if (++x->n_files == UINT32_MAX) fail(STATUS_USAGE, "more than 4 thousand million files: share them out with --shard-of I/N");
}

typedef struct Above { dev_t device; ino_t inode; const struct Above *next; } Above; // the folders that a walk is in

// Adds the file at path, or all below the folder. Hidden names are left out; links are followed, but not to a folder that
// the walk is in already. named: an argument, whose name is its path, and of a folder's files what comes after it; else the
// name begins after `skip` bytes.
static inline void index_walk(Index *x, const char *path, size_t skip, int named, const Above *above) {
    struct stat st;
    size_t length = strlen(path);
    if (named && !strncmp(path, "./", 2)) skip = 2;
    int absent = stat(path, &st);
    if (absent && !named) warn("%s: %s", path, strerror(errno));
    if (absent || !S_ISDIR(st.st_mode)) {
        if (named || (!absent && S_ISREG(st.st_mode))) index_add(x, path, skip, absent ? 0 : (uint64_t)st.st_size, named);
        return;
    }
    for (const Above *a = above; a; a = a->next)
        if (a->device == st.st_dev && a->inode == st.st_ino) return;
    DIR *folder = opendir(path);
    if (!folder) {
        warn("%s: cannot be read: %s", path, strerror(errno));
        return;
    }
    if (named) skip = length + (path[length - 1] != '/');
    Above here = {st.st_dev, st.st_ino, above};
    for (struct dirent *e; (e = readdir(folder));) {
        char inside[PATH_SIZE];
        if (e->d_name[0] == '.') continue;
        if (snprintf(inside, sizeof inside, "%s%s%s", path, path[length - 1] == '/' ? "" : "/", e->d_name) >= (int)sizeof inside)
            warn("%s: a path in it is too long: left out", path);
        else index_walk(x, inside, skip, 0, &here);
    }
    closedir(folder);
}

// What the lines of a file name, as if each were found below one INPUT.
static inline void index_list(Index *x, const char *path) {
    FILE *file = fopen(path, "r");
    if (!file) fail(STATUS_USAGE, "--list %s: %s", path, strerror(errno));
    char *line = NULL;
    size_t room = 0;
    while (getline(&line, &room, file) >= 0) {
        line[strcspn(line, "\r\n")] = 0;
        if (strlen(line) >= PATH_SIZE) warn("%s: a path of %zu bytes is too long: left out", path, strlen(line));
        else if (*line) index_walk(x, line, 0, 0, NULL);
    }
    free(line);
    fclose(file);
}

static inline int compare_u64(uint64_t a, uint64_t b) { return (a > b) - (a < b); }

// By patient, series and orientation; then along the normal; then in the order in which frames at one place were taken;
// a lossless copy before a lossy one; at last by name, so that the order never depends on a folder's.
static inline int record_order(const Index *x, const Record *a, const Record *b) {
    int by = compare_u64(a->patient, b->patient);
    if (!by) by = compare_u64(a->series, b->series);
    if (!by) by = (a->orientation > b->orientation) - (a->orientation < b->orientation);
    if (!by) by = (a->along > b->along) - (a->along < b->along);
    if (!by) by = (a->temporal > b->temporal) - (a->temporal < b->temporal);
    if (!by) by = (a->acquisition > b->acquisition) - (a->acquisition < b->acquisition);
    if (!by) by = (a->time > b->time) - (a->time < b->time);
    if (!by) by = (a->number > b->number) - (a->number < b->number);
    if (!by) by = compare_u64(a->instance, b->instance);
    if (!by) by = a->lossy - b->lossy;
    if (!by) by = strcmp(index_name(x, a->file), index_name(x, b->file));
    if (!by) by = strcmp(index_path(x, a->file), index_path(x, b->file));
    return by ? by : (a->frame > b->frame) - (a->frame < b->frame);
}

// Heapsort in place: the C library's sort would want as much memory again.
static inline void records_sort(const Index *x, Record *r, uint64_t n) {
    for (uint64_t start = n / 2, end = n; end > 1;) {
        if (start > 0) start--;
        else {
            Record last = r[--end];
            r[end] = r[0];
            r[0] = last;
        }
        Record sinking = r[start];
        uint64_t at = start;
        for (uint64_t child; (child = 2 * at + 1) < end; at = child) {
            if (child + 1 < end && record_order(x, &r[child], &r[child + 1]) < 0) child++;
            if (record_order(x, &sinking, &r[child]) >= 0) break;
            r[at] = r[child];
        }
        r[at] = sinking;
    }
}

static inline int plane_of(const float row[3], const float column[3]) {
    float normal[3];
    for (int k = 0; k < 3; k++) normal[k] = fabsf(row[(k + 1) % 3] * column[(k + 2) % 3] - row[(k + 2) % 3] * column[(k + 1) % 3]);
    return normal[2] >= normal[1] && normal[2] >= normal[0] ? PLANE_AXIAL : normal[1] >= normal[0] ? PLANE_CORONAL : PLANE_SAGITTAL;
}

// Tells the orientations in a series apart (to 1e-3 in every cosine) and fills `along`. Slices in more than one plane are a
// localizer, unless it is kept; slices in several orientations of one plane (discs of a spine, say) are several volumes.
static inline void series_orientations(Record *r, uint64_t n, const uint8_t keep[REASON_COUNT]) {
    enum { MOST = 64 };
    const Record *first[MOST];
    int orientations = 0, planes = 0;
    for (uint64_t i = 0; i < n; i++) {
        int o = 0;
        for (; o < orientations; o++) {
            float apart = 0;
            for (int k = 0; k < 3; k++)
                apart = fmaxf(apart, fmaxf(fabsf(r[i].row[k] - first[o]->row[k]), fabsf(r[i].column[k] - first[o]->column[k])));
            if (apart < 1e-3f) break;
        }
        if (o == orientations && o < MOST) first[orientations++] = &r[i];
        r[i].orientation = o;
        const Record *f = first[o < MOST ? o : MOST - 1];
        r[i].along = 0;
        for (int k = 0; k < 3; k++)
            r[i].along += r[i].position[k] * ((double)f->row[(k + 1) % 3] * f->column[(k + 2) % 3] -
                                              (double)f->row[(k + 2) % 3] * f->column[(k + 1) % 3]);
        planes |= r[i].kind == KIND_DICOM ? 1 << plane_of(r[i].row, r[i].column) : 0;
    }
    for (uint64_t i = 0; (planes & (planes - 1)) && !keep[REASON_LOCALIZER] && i < n; i++)
        if (!r[i].reason) r[i].reason = REASON_LOCALIZER;
}

// Sorts the records and lists the series.
static inline void index_sort(Index *x, const uint8_t keep[REASON_COUNT]) {
    Record *r = index_record(x, 0);
    records_sort(x, r, x->n_records);
    for (int pass = 0; pass < 2; pass++) {
        uint64_t capacity = 0;
        x->n_series = 0;
        for (uint64_t i = 0, next; i < x->n_records; i = next) {
            for (next = i + 1; next < x->n_records && r[next].patient == r[i].patient && r[next].series == r[i].series; next++)
                if (pass && r[next].orientation != r[i].orientation) break;
            if (pass == 0) {
                series_orientations(r + i, next - i, keep);
                records_sort(x, r + i, next - i);
                continue;
            }
            if (x->n_series == capacity) {
                capacity = capacity ? 2 * capacity : 1024;
                x->series = (Series *)realloc(x->series, capacity * sizeof *x->series);
                if (!x->series) fail(STATUS_FAILED, "out of memory for %llu series", (unsigned long long)capacity);
            }
            x->series[x->n_series++] = (Series){i, (uint32_t)(next - i)};
        }
    }
}

#endif
