/*
Tests of what prep makes of DICOM files. They are written here, element by element, with the values of a function of the place
in the patient; prep packs them; the shards must hold that function again, however the slices lay in the patient, in what
order, and in what numbers the files wrote them. Needs no Python and no library.

  gcc -std=gnu11 -O2 -I. dev/test/test_dicom.c -o build/test_dicom -lpthread -lm && build/test_dicom PREP

Prints "failed: ..." for each failure, then "N passed, N failed"; exit status 1 where any failed. A PREP that was built without
GDCM refuses DICOM: that is said, and is no failure. Works in a fresh folder under $TMPDIR or /tmp, removed at the end.
*/
#define _GNU_SOURCE
#include <sys/wait.h>

#include "check.h"
#include "dataloader.h"
#include "curia/file.h"

static int run_status;
static const char *prep;
// Of the last run: report.tsv and stderr ("" where there is none), and whose each of the stacks is.
static char folder[512], report[1 << 16], errors[1 << 16];
static uint64_t patients[16];

static const char *in_folder(const char *name) {
    static char path[PATH_SIZE];
    return path_join(path, folder, name);
}

// ----------------------------------------------------------------------------------------------------------- writing DICOM

// A data set is a text here: "GGGGEEEEVR=value;" for each element, a sequence's items in braces. Of a tag given twice the last
// counts, and "GGGGEEEE;" takes an element out, so that a case is the usual text and what it changes.
#define IMAGE_TYPE "00080008CS="
#define SOP_CLASS "00080016UI="
#define MODALITY "00080060CS="
#define NO_GEOMETRY "00200032;00200037;"
#define CT_IMAGE "1.2.840.10008.5.1.4.1.1.2"
#define UID "1.2.826.0.1.3680043.9.7777."

enum { EXPLICIT_LITTLE, IMPLICIT_LITTLE, EXPLICIT_BIG };
enum { WHOLE, NO_PREAMBLE, BARE };              // BARE: the data set alone
enum { ITEM = 0xfffee000, ITEM_END = 0xfffee00d, SEQUENCE_END = 0xfffee0dd };

typedef struct { uint8_t *at; size_t n, room; int syntax, lengths; } Bytes; // lengths: sequences give them, not delimiters

static void put(Bytes *b, const void *data, size_t n) {
    if (b->n + n > b->room) b->at = realloc(b->at, b->room = 2 * (b->n + n));
    if (!b->at) fail(STATUS_FAILED, "out of memory");
    memcpy(b->at + b->n, data, n);
    b->n += n;
}

static void put_number(Bytes *b, uint64_t x, int bytes) {
    for (int i = 0; i < bytes; i++) put(b, &(uint8_t){(uint8_t)(x >> 8 * (b->syntax == EXPLICIT_BIG ? bytes - 1 - i : i))}, 1);
}

// Tag, value representation ("" for items and delimiters) and length. Returns where the value begins.
static size_t put_head(Bytes *b, uint32_t tag, const char *vr, uint32_t length) {
    int wide = !strcmp(vr, "SQ") || !strcmp(vr, "OW"), said = *vr && b->syntax != IMPLICIT_LITTLE;
    put_number(b, tag >> 16, 2);
    put_number(b, tag & 0xffff, 2);
    if (said) put(b, vr, 2);
    if (said && wide) put_number(b, 0, 2);
    put_number(b, length, said && !wide ? 2 : 4);
    return b->n;
}

// Writes the length of what began at `start` and ends here.
static void put_length(Bytes *b, size_t start) {
    size_t end = b->n;
    b->n = start - 4;
    put_number(b, end - start, 4);
    b->n = end;
}

static void put_end(Bytes *b, size_t start, uint32_t delimiter) {
    if (b->lengths) put_length(b, start);
    else put_head(b, delimiter, "", 0);
}

// What follows the first `stop` that is in no braces but those that begin at `at`.
static const char *past(const char *at, char stop) {
    for (int depth = 0;; at++) {
        depth += (*at == '{') - (*at == '}');
        if (*at == stop && depth == 0) return at + 1;
    }
}

static void put_set(Bytes *b, const char *text, const char *end);

static void put_element(Bytes *b, uint32_t tag, const char *at, const char *end) {
    char vr[3] = {at[0], at[1], 0};
    int bytes = strstr("US SS", vr) ? 2 : !strcmp(vr, "UL") ? 4 : !strcmp(vr, "FD") ? 8 : 0;
    const char *value = at + 3;
    size_t n = bytes ? (size_t)bytes : (size_t)(end - value);
    if (!strcmp(vr, "SQ")) {
        size_t sequence = put_head(b, tag, vr, UINT32_MAX);
        for (const char *close; value < end; value = close) {
            size_t item = put_head(b, ITEM, "", UINT32_MAX);
            close = past(value, '}');
            put_set(b, value + 1, close - 1);
            put_end(b, item, ITEM_END);
        }
        put_end(b, sequence, SEQUENCE_END);
        return;
    }
    put_head(b, tag, vr, (uint32_t)(n + n % 2));
    double x = bytes ? strtod(value, NULL) : 0;
    uint64_t bits = (uint64_t)x;
    if (bytes == 8) memcpy(&bits, &x, 8);
    if (bytes) put_number(b, bits, bytes);
    else put(b, value, n);
    if (n % 2) put(b, strcmp(vr, "UI") ? " " : "", 1);
}

// Elements in the order of their tags, as the standard wants them.
static void put_set(Bytes *b, const char *text, const char *end) {
    for (int64_t last = -1, least;; last = least) {
        const char *chosen = NULL;
        least = INT64_MAX;
        for (const char *at = text; at < end; at = past(at, ';')) {
            char digits[9] = "";
            int64_t tag = strtoll(memcpy(digits, at, 8), NULL, 16);
            if (tag > last && tag <= least) least = tag, chosen = at + 8;
        }
        if (!chosen) return;
        if (*chosen != ';') put_element(b, (uint32_t)least, chosen, past(chosen, ';') - 1);
    }
}

// ------------------------------------------------------------------------------------------------------------------ stacks

// Parallel slices in the patient, and how they are written. Slice k is the kth along row x column.
typedef struct {
    int n, rows, cols, modality;
    double iop[6], origin[3], spacing[2], gap; // origin: of the first pixel; mm between rows and columns, and between slices
    const char *runs;                          // where rows, columns and slices run to: of L P S R A I the nearest
    const double *gaps, *along;                // [n - 1] where they differ; the way from slice to slice where not the normal
    double base, slope, intercept, slope_step, intercept_step; // base tells stacks apart; steps: from slice to slice
    int allocated, bits, high, is_signed, garbage, inverted; // garbage: in the bits that are not stored
    int patient, study, series, in_order, folders, cut, syntax, form, lengths; // cut: bits of the slices whose file lacks its end
    const char *set;                           // elements in place of the usual ones
    int planes;                                // how many prep is to cut it in
} Stack;

static const Stack usual = {.n = 8, .rows = 20, .cols = 24, .modality = MODALITY_CT, .iop = {1, 0, 0, 0, 1, 0},
                            .origin = {-7, -11, 5}, .spacing = {0.8, 0.7}, .gap = 3, .runs = "LPS", .base = 600, .slope = 1,
                            .intercept = -1024, .allocated = 16, .bits = 16, .high = 15, .folders = 1, .set = "", .planes = 1};

static Stack mr_stack(double base) {
    Stack s = usual;
    s.modality = MODALITY_MR, s.bits = 12, s.high = 11, s.intercept = 0, s.base = base;
    return s;
}

// The centre of the pixel in column i and row j of slice k, LPS mm.
static void place(const Stack *s, int i, int j, int k, double *p) {
    const double *row = s->iop, *column = s->iop + 3;
    double far = s->gaps ? 0 : k * s->gap;
    for (int g = 0; s->gaps && g < k; g++) far += s->gaps[g];
    for (int b = 0; b < 3; b++) {
        int c = (b + 1) % 3, d = (b + 2) % 3;
        double way = s->along ? s->along[b] : row[c] * column[d] - row[d] * column[c];
        p[b] = s->origin[b] + i * s->spacing[1] * row[b] + j * s->spacing[0] * column[b] + far * way;
    }
}

static double slope_of(const Stack *s, int k) { return s->slope + k * s->slope_step; }
static double intercept_of(const Stack *s, int k) { return s->intercept + k * s->intercept_step; }

// The number that a pixel is stored as. The function is another one along each axis and each way along it; its last digits keep
// it off the halves, where rounding would be up to the compiler.
static double stored(const Stack *s, int i, int j, int k) {
    double p[3];
    place(s, i, j, k, p);
    double value = s->base + 5 * p[0] + 3 * p[1] - 4 * p[2] + 0.08 * p[0] * p[1] - 0.05 * p[1] * p[2] + 0.00003;
    return rint((value - intercept_of(s, k)) / slope_of(s, k));
}

static void put_frame(Bytes *b, const Stack *s, int k) {
    uint64_t mask = ((uint64_t)1 << s->bits) - 1, noise = 12345;
    int shift = s->high + 1 - s->bits;
    for (int pixel = 0; pixel < s->rows * s->cols; pixel++) {
        double x = stored(s, pixel % s->cols, pixel / s->cols, k);
        if (s->inverted) x = (s->is_signed ? -1 : (double)mask) - x;
        noise = noise * 6364136223846793005u + 1442695040888963407u;
        uint64_t others = s->garbage ? noise >> 40 & ~(mask << shift) : 0;
        put_number(b, ((uint64_t)(int64_t)x & mask) << shift | others, s->allocated / 8);
    }
}

// The usual elements of slice k, with names that no output may hold.
static void slice_text(const Stack *s, int k, char *text, size_t size) {
    double p[3];
    const double *o = s->iop;
    int ct = s->modality == MODALITY_CT;
    place(s, 0, 0, k, p);
    snprintf(text, size,
             IMAGE_TYPE "ORIGINAL\\PRIMARY\\AXIAL;" SOP_CLASS "%s;00080018UI=" UID "4.%d.%g.%d;" MODALITY "%s;"
             "00080020DA=20190317;00080080LO=InstitutionOfScan;00080090PN=FamilyOfReferrer^GivenOfReferrer;"
             "0008103ELO=GivenOfPatient special;"
             "00100010PN=FamilyOfPatient^GivenOfPatient;00100020LO=HOSP-771234%d;00100030DA=19470823;00180050DS=5;"
             "0020000DUI=" UID "2.%d;"
             "0020000EUI=" UID "3.%d;00200012IS=1;00200013IS=%d;00200032DS=%.9g\\%.9g\\%.9g;"
             "00200037DS=%.9g\\%.9g\\%.9g\\%.9g\\%.9g\\%.9g;00280002US=1;00280004CS=MONOCHROME%d;00280010US=%d;00280011US=%d;"
             "00280030DS=%g\\%g;00280100US=%d;00280101US=%d;00280102US=%d;00280103US=%d;00281052DS=%.6g;00281053DS=%.6g;%s",
             ct ? CT_IMAGE : "1.2.840.10008.5.1.4.1.1.4", s->series, s->base, k, ct ? "CT" : "MR", s->patient, s->study,
             s->series, s->in_order ? k + 1 : (5 * k + 3) % s->n, p[0], p[1], p[2], o[0], o[1], o[2], o[3], o[4], o[5],
             s->inverted ? 1 : 2, s->rows, s->cols, s->spacing[0], s->spacing[1], s->allocated, s->bits, s->high, s->is_signed,
             intercept_of(s, k), slope_of(s, k), s->set);
}

// One file in a folder that has the patient's name, called by a number that says nothing of the order. pixels: NULL for none.
static void write_file(const Stack *s, int part, const char *text, const Bytes *pixels, int cut) {
    static const char *const uids[] = {"1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.2"};
    static uint32_t files;
    char meta[512], path[PATH_SIZE];
    Bytes b = {0}, set = {.syntax = s->syntax, .lengths = s->lengths};
    snprintf(meta, sizeof meta, "00020000UL=0;00020002UI=" CT_IMAGE ";00020003UI=" UID "4;00020010UI=%s;", uids[s->syntax]);
    if (s->form == WHOLE) put(&b, (char[128]){0}, 128), put(&b, "DICM", 4);
    size_t start = b.n + 12;
    if (s->form != BARE) put_set(&b, meta, meta + strlen(meta)), put_length(&b, start);
    put_set(&set, text, text + strlen(text));
    if (pixels) put_head(&set, 0x7fe00010, "OW", (uint32_t)pixels->n), put(&set, pixels->at, pixels->n);
    put(&b, set.at, set.n);
    snprintf(path, sizeof path, "%s/GivenOfPatient/%d", folder, part);
    file_make_dirs(path);
    files++;
    snprintf(path + strlen(path), 64, "/%08x%s", files * 2654435761u, files % 3 ? "" : ".dcm");
    FILE *f = file_create(path);
    file_write(f, path, b.at, b.n - (cut ? 300 : 0));
    fclose(f);
    free(b.at);
    free(set.at);
}

static void fresh_input(void) { file_remove_tree(in_folder("GivenOfPatient")); }

static void write_stack(const Stack *s) {
    char text[4096];
    for (int k = 0; k < s->n; k++) {
        Bytes pixels = {.syntax = s->syntax};
        slice_text(s, k, text, sizeof text);
        put_frame(&pixels, s, k);
        write_file(s, k % s->folders, text, &pixels, s->cut >> k & 1);
        free(pixels.at);
    }
}

// These alone.
static void write_stacks(const Stack *s, int n) {
    fresh_input();
    for (int i = 0; i < n; i++) write_stack(&s[i]);
}

// ------------------------------------------------------------------------------------------------------- prep and its output

// No byte of any file in the output may say who the patient is.
static void check_private(const char *name, const char *out) {
    static const char *const words[] = {"FamilyOfPatient", "GivenOfPatient", "HOSP-77", "19470823", "20190317", "InstitutionOfScan",
                                        "FamilyOfReferrer", UID};
    char path[PATH_SIZE], found[128] = "";
    DIR *dir = opendir(out);
    for (struct dirent *e; dir && (e = readdir(dir));) {
        size_t bytes;
        if (e->d_name[0] == '.') continue;
        char *text = file_read(path_join(path, out, e->d_name), &bytes);
        for (size_t i = 0; i < sizeof words / sizeof *words; i++)
            if (memmem(text, bytes, words[i], strlen(words[i])))
                snprintf(found, sizeof found, "'%s' in %.64s", words[i], e->d_name);
        free(text);
    }
    if (dir) closedir(dir);
    check(dir && !*found, "%s: no output folder, or %s", name, found);
}

static void read_text(const char *name, char *text, size_t size) {
    FILE *f = fopen(in_folder(name), "r");
    text[f ? fread(text, 1, size - 1, f) : 0] = 0;
    if (f) fclose(f);
}

// PREP on the input so far, with flags (words, or "").
static void run(const char *name, const char *flags) {
    char out[PATH_SIZE], input[PATH_SIZE], words[256], *argv[16] = {(char *)prep, "-o", out, "--jobs", "1"};
    int n = 5, status;
    file_remove_tree(path_join(out, folder, "out"));
    snprintf(words, sizeof words, "%s", flags);
    for (char *at = words; (at = strtok(at, " ")); at = NULL) argv[n++] = at;
    argv[n] = path_join(input, folder, "GivenOfPatient");
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        if (freopen("/dev/null", "w", stdout) && freopen(in_folder("err"), "w", stderr)) execv(prep, argv);
        _exit(127);
    }
    if (child < 0 || waitpid(child, &status, 0) != child) fail(STATUS_FAILED, "cannot run %s: %s", prep, strerror(errno));
    run_status = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    read_text("out/report.tsv", report, sizeof report);
    read_text("err", errors, sizeof errors);
    check_private(name, out);
}

// The cell of a row (from 1) of the report by its column's name; "" where there is none.
static const char *cell(int row, const char *column) {
    static char value[1024];
    const char *head = report, *line = report;
    for (int i = 0; i < row && *line; i++) line += strcspn(line, "\n") + (strchr(line, '\n') != NULL);
    size_t n = strlen(column);
    while (*line && (strncmp(head, column, n) || !strchr("\t\n", head[n]))) {
        head += strcspn(head, "\t\n"), line += strcspn(line, "\t\n");
        if (*head++ != '\t' || *line++ != '\t') return "";
    }
    snprintf(value, sizeof value, "%.*s", (int)strcspn(line, "\t\n"), line);
    return value;
}

static int count_rows(const char *column, const char *value) {
    int n = 0;
    for (int row = 1; *cell(row, "volume"); row++) n += !strcmp(cell(row, column), value);
    return n;
}

static void check_cell(const char *name, const char *column, const char *part) {
    const char *got = cell(1, column);
    check(strstr(got, part) != NULL, "%s: %s is '%s', expected '%s'", name, column, got, part);
}

// Whether a stored slice is what the stack has there; else *why says what is not.
static int slice_good(const Stack *s, const ShardSlice *t, const int16_t *pixels, char *why, size_t size) {
    static const int planes[PLANE_COUNT][3] = {{2, 1, 0}, {1, 2, 0}, {0, 2, 1}};  // body axes of slices, rows, columns
    static const char letters[] = "LPSRAI";
    int axis[3], flip[3], n[3] = {s->cols, s->rows, s->n}, wrong = 0;
    double mm[3] = {s->spacing[1], s->spacing[0], s->gap};
    for (int a = 0; a < 3; a++) {
        int letter = (int)(strchr(letters, s->runs[a]) - letters);
        axis[letter % 3] = a, flip[letter % 3] = letter / 3;
    }
    const int *to = planes[t->plane];
    int slices = axis[to[0]], down = axis[to[1]], across = axis[to[2]];
    snprintf(why, size, "%dx%dx%d of %gx%gx%g mm, modality %d, plane %d", t->rows, t->cols, t->volume_slices, t->spacing_row,
             t->spacing_col, t->spacing_slice, t->modality, t->plane);
    double off = fabs(t->spacing_row - mm[down]) + fabs(t->spacing_col - mm[across]) + fabs(t->spacing_slice - mm[slices]);
    if (t->rows != n[down] || t->cols != n[across] || t->volume_slices != n[slices] || t->modality != s->modality || off > 1e-4)
        return 0;
    for (int r = 0; r < t->rows; r++)
        for (int c = 0; c < t->cols; c++) {
            int body[3], at[3];
            body[to[0]] = t->slice_number, body[to[2]] = c;
            body[to[1]] = to[1] == 2 ? t->rows - 1 - r : r;       // foot-head runs downwards to the feet
            for (int b = 0; b < 3; b++) at[axis[b]] = flip[b] ? n[axis[b]] - 1 - body[b] : body[b];
            double expected = slope_of(s, at[2]) * stored(s, at[0], at[1], at[2]) + intercept_of(s, at[2]);
            double value = (double)t->scale * pixels[r * t->cols + c] + t->intercept;
            if (fabs(value - expected) < 2e-3 || wrong++) continue;
            snprintf(why, size, "plane %d, slice %d: row %d, column %d is %g, not %g", t->plane, t->slice_number, r, c, value,
                     expected);
        }
    return !wrong;
}

// Whether the shards hold these n stacks, in order and whole, and nothing else.
static void check_shards(const char *name, const Stack *stacks, int n) {
    char out[PATH_SIZE], why[256], first[256] = "";
    const char *path = path_join(out, folder, "out");
    int good[16] = {0}, extra = 0, made = file_exists(in_folder("out/shard-000000.shard"));
    check(made == (n > 0), "%s: %s", name, made ? "shards" : "no shards");
    if (!made) return;
    Dataset *d = dataset_open(&path, 1);
    for (uint64_t i = 0; i < d->count; i++) {
        const int16_t *pixels;
        const ShardSlice *t = dataset_slice(d, i, &pixels, NULL), *before = dataset_slice(d, i ? i - 1 : 0, NULL, NULL);
        int same = i && before->volume_id == t->volume_id && before->plane == t->plane, match = 0;
        while (match < n && !slice_good(&stacks[match], t, pixels, why, sizeof why)) match++;
        if (match < n && t->slice_number == (same ? before->slice_number + 1 : 0)) good[match]++, patients[match] = t->patient_id;
        else if (!extra++) snprintf(first, sizeof first, "%s", match < n ? "out of order" : why);
    }
    dataset_close(d);
    check(!extra, "%s: %d slices are wrong: %s", name, extra, first);
    for (int k = 0; k < n; k++) {
        int expected = stacks[k].n + (stacks[k].planes == 3 ? stacks[k].rows + stacks[k].cols : 0);
        check(good[k] == expected, "%s: %d of %d slices of volume %d are right", name, good[k], expected, k + 1);
    }
}

// Runs prep: the n stacks are taken, and the report has `rejected` more rows, for this reason.
static void expect(const char *name, const char *flags, const Stack *stacks, int n, const char *reason, int rejected) {
    run(name, flags);
    int taken = count_rows("status", "taken"), left = count_rows("status", "rejected"), so = count_rows("reason", reason);
    char *error = strstr(errors, "error: ");
    if (error) error[strcspn(error, "\n")] = 0;
    check(run_status == (n ? STATUS_DONE : STATUS_DATA), "%s: exit status %d: %s", name, run_status, error ? error : "no error");
    check(taken == n && left == rejected && (!left || so == left),
          "%s: %d taken, %d left out, %d for '%s'; expected %d and %d; %s", name, taken, left, so, reason, n, rejected,
          cell(1, "detail"));
    check_shards(name, stacks, n);
}

// n stacks, which prep takes.
static void take(const char *name, const char *flags, const Stack *stacks, int n) {
    write_stacks(stacks, n);
    expect(name, flags, stacks, n, "", 0);
}

// Left out for the reason; taken where --keep names it.
static void reject(const char *name, const char *reason, const Stack *s, int kept) {
    char flags[64];
    write_stacks(s, 1);
    expect(name, "", NULL, 0, reason, 1);
    snprintf(flags, sizeof flags, "--keep %s", reason);
    if (kept) expect(name, flags, s, 1, "", 0);
}

// ------------------------------------------------------------------------------------------------------------------- cases

static void test_geometry(void) {
    const double c = cos(20 * M_PI / 180), z = sin(20 * M_PI / 180), tilt = 18.5 * M_PI / 180;
    const struct { const char *name, *runs; double iop[6]; } cases[] = {
        {"axial", "LPS", {1, 0, 0, 0, 1, 0}}, {"coronal", "LIP", {1, 0, 0, 0, 0, -1}}, {"sagittal", "PIR", {0, 1, 0, 0, 0, -1}},
        {"sagittal to the head", "ASR", {0, -1, 0, 0, 0, 1}}, {"axial, prone", "RAS", {-1, 0, 0, 0, -1, 0}},
        {"axial, feet first", "RPI", {-1, 0, 0, 0, 1, 0}}, {"axial, rows along y", "PLI", {0, 1, 0, 1, 0, 0}},
        {"oblique", "LPS", {c, z, 0, -z * c, c * c, z}}, {"oblique coronal", "LIP", {c, z, 0, z * z, -c * z, -c}}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Stack s = i % 2 ? mr_stack(600) : usual;
        memcpy(s.iop, cases[i].iop, sizeof s.iop);
        s.runs = cases[i].runs, s.n = 17, s.planes = 3;
        take(cases[i].name, "--planes all", &s, 1);
        check_cell(cases[i].name, "orientation", s.runs);
        s.n = 8, s.planes = 1;
        take(cases[i].name, "", &s, 1);
    }
    const double gaps[16] = {3, 3, 1, 3, 7.5, 3, 1, 3, 3, 3, 3, 3, 3, 3, 3, 3}, head[3] = {0, 0, 1 / cos(tilt)};
    Stack uneven = usual, tilted = usual;
    uneven.n = tilted.n = 17;
    uneven.gaps = gaps;
    take("uneven gaps", "--planes all", &uneven, 1);
    check_cell("uneven gaps", "notes", "uneven gaps of 1 to 7.5 mm");
    check_cell("uneven gaps", "tilt_deg", "0.0");
    tilted.along = head, tilted.gap = 3 * cos(tilt), tilted.iop[4] = cos(tilt), tilted.iop[5] = -sin(tilt); // 3 mm to the head
    take("gantry tilt", "--planes all", &tilted, 1);
    check_cell("gantry tilt", "notes", "tilted gantry");
    check_cell("gantry tilt", "tilt_deg", "18.5");
}

static void test_encodings(void) {
    static const char *const syntaxes[] = {"explicit LE", "implicit LE", "explicit BE"};
    static const char *const forms[] = {"whole", "no preamble", "bare"};
    for (int i = 0; i < 9; i++) {
        char name[64];
        Stack s = usual;
        s.syntax = i / 3, s.form = i % 3, s.lengths = s.form == WHOLE;
        // What a sequence says is of another image.
        s.set = "00880200SQ={00200032DS=9\\9\\9;00280010US=7;00281052DS=3;7FE00010OW=icon;}{00081155UI=1.2;};";
        snprintf(name, sizeof name, "%s, %s", syntaxes[s.syntax], forms[s.form]);
        take(name, "", &s, 1);
        check_cell(name, "format", syntaxes[s.syntax]);
    }
}

static void test_values(void) {
    Stack s = usual;
    s.slope_step = 1, s.intercept_step = -10;
    take("rescale per slice", "", &s, 1);
    s = mr_stack(600), s.slope = 0.37, s.slope_step = 0.013, s.intercept_step = 0.5;
    take("fractional rescale per slice", "", &s, 1);
    s = usual, s.set = "00281052;00281053;", s.intercept = 0;
    take("no rescale", "", &s, 1);
    s = usual, s.bits = 12, s.high = 11, s.is_signed = s.garbage = 1, s.intercept = s.base = 0;
    take("signed 12 bits", "", &s, 1);
    s.high = 15;
    take("signed 12 bits up to bit 15", "", &s, 1);
    s = usual, s.bits = 12, s.high = 11, s.garbage = 1;
    take("12 bits under an overlay", "", &s, 1);
    s.high = 13, s.syntax = EXPLICIT_BIG;
    take("12 bits between others, big endian", "", &s, 1);
    s = mr_stack(600), s.inverted = 1;
    take("MR in MONOCHROME1", "", &s, 1);
    check_cell("MR in MONOCHROME1", "notes", "8 slices inverted");
    s.bits = 14, s.high = 13, s.is_signed = 1, s.slope = 0.5;
    take("signed MR in MONOCHROME1", "", &s, 1);
    s = usual, s.set = "00280004CS=MONOCHROME1;";
    take("CT in MONOCHROME1", "", &s, 1);
}

static void test_grouping(void) {
    Stack s[3] = {usual, usual, usual};
    take("copies", "--4d all", s, 1);
    write_stack(s);                             // once more, under other names
    expect("copies", "--4d all", s, 1, "", 0);
    check_cell("copies", "copies", "8");
    s[0].folders = 2;
    take("a series in two folders", "", s, 1);
    s[1].base = 650, s[1].series = 2, s[0].folders = 1;
    take("two series in a folder", "", s, 2);
    s[1].series = s[0].series, memcpy(s[1].iop, (double[6]){0.6, 0.8, 0, -0.8, 0.6, 0}, sizeof s[1].iop), s[1].runs = "PRS";
    take("two orientations in a series", "", s, 2);
    for (int i = 0; i < 3; i++) s[i] = mr_stack(600 + 50 * i);
    static const char *const pairs[][3] = {
        {"two echoes", "00180081DS=10;00180086IS=1;", "00180081DS=90;00180086IS=2;"},
        {"two b-values", "00189087FD=0;", "00189087FD=1000;"},
        {"water and fat", IMAGE_TYPE "ORIGINAL\\PRIMARY\\W;", IMAGE_TYPE "ORIGINAL\\PRIMARY\\F;"},
        {"DERIVED\\SECONDARY alone", IMAGE_TYPE "DERIVED\\SECONDARY;", IMAGE_TYPE "DERIVED\\SECONDARY\\OTHER;"}};
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++) {
        s[0].set = pairs[i][1], s[1].set = pairs[i][2];
        take(pairs[i][0], "", s, 2);
    }
    for (int i = 0; i < 3; i++) s[i].set = (const char *[]){"00200100IS=1;", "00200100IS=2;", "00200100IS=3;"}[i];
    take("4-D, all", "--4d all", s, 3);
    expect("4-D, the first", "", s, 1, "", 0);
    check_cell("4-D, the first", "notes", "4-D: volume 1 of 3");
    expect("4-D, the middle", "--4d mid", s + 1, 1, "", 0);
    check_cell("4-D, the middle", "notes", "4-D: volume 2 of 3");
    const double g = s[0].gap, without_fifth[6] = {g, g, g, g, 2 * g, g};
    Stack rest = s[0];                          // a slice cut short is missed in its own volume, not made up from the next
    s[0].cut = 1 << 5, rest.n = 7, rest.gaps = without_fifth;
    write_stacks(s, 3);
    expect("4-D, a slice of the first cut short", "", &rest, 1, "damaged", 1);
    expect("4-D, the middle, a slice of the first cut short", "--4d mid", s + 1, 1, "damaged", 1);
    for (int i = 0; i < 3; i++) {               // 0 and 1 are of one patient in two studies; 2 of another, in the study of 0
        s[i] = usual;
        s[i].base = 600 + 50 * i, s[i].series = i, s[i].study = i % 2, s[i].patient = i / 2;
    }
    take("three series of two patients", "", s, 3);
    check(patients[0] == patients[1] && patients[0] != patients[2], "PatientID does not decide the patient");
}

// Stacks in one multi-frame file, frames shuffled. shared: one orientation for all, in the shared functional group.
static void take_enhanced(const char *name, const Stack *s, int n, int shared) {
    static char text[65536];
    Bytes pixels = {0};
    int frames = n * s->n;
    slice_text(s, 0, text, sizeof text);
    size_t used = strlen(text);
#define ADD(...) (used += (size_t)snprintf(text + used, sizeof text - used, __VA_ARGS__))
#define ORIENTATION(o) "00209116SQ={00200037DS=%.9g\\%.9g\\%.9g\\%.9g\\%.9g\\%.9g;};", o[0], o[1], o[2], o[3], o[4], o[5]
    ADD(NO_GEOMETRY "00280030;00281052;00281053;" SOP_CLASS CT_IMAGE ".1;00280008IS=%d;", frames);
    ADD("52009229SQ={00289110SQ={00180050DS=5;00180088DS=3;00280030DS=%g\\%g;};", s->spacing[0], s->spacing[1]);
    if (shared) ADD(ORIENTATION(s->iop));
    ADD("};52009230SQ=");
    for (int i = 0; i < frames; i++) {
        int frame = (i * 5 + 2) % frames, k = frame % s->n;
        const Stack *t = s + frame / s->n;
        double p[3];
        place(t, 0, 0, k, p);
        ADD("{00209111SQ={00209056SH=%d;00209057UL=%d;};", (int)(t - s) + 1, k + 1);
        ADD("00209113SQ={00200032DS=%.9g\\%.9g\\%.9g;};", p[0], p[1], p[2]);
        if (!shared) ADD(ORIENTATION(t->iop));
        ADD("00289145SQ={00281052DS=%.6g;00281053DS=%.6g;};}", intercept_of(t, k), slope_of(t, k));
        put_frame(&pixels, t, k);
    }
    ADD(";");
    fresh_input();
    write_file(s, 0, text, &pixels, 0);
    free(pixels.at);
    expect(name, "", s, n, "", 0);
}

static void test_multiframe(void) {
    Stack s[2] = {usual, usual}, m = mr_stack(600);
    s[0].slope_step = 1, s[0].intercept_step = -5;
    take_enhanced("enhanced CT", s, 1, 1);
    s[0].n = s[1].n = 6, s[0].lengths = 1, s[1].base = 650, s[1].origin[2] = 80; // above the other
    take_enhanced("enhanced CT, two stacks", s, 2, 1);
    memcpy(s[1].iop, (double[6]){cos(0.3), sin(0.3), 0, -sin(0.3), cos(0.3), 0}, sizeof s[1].iop);
    take_enhanced("enhanced CT, two stacks turned", s, 2, 0);

    // Siemens: a sheet of 3x3 tiles, of which 7 are slices; its position is that of one slice as large as the sheet.
    enum { GRID = 3 };
    char text[4096];
    Bytes pixels = {0};
    double p[3];
    m.n = 7;
    place(&m, -(GRID - 1) * m.cols / 2, -(GRID - 1) * m.rows / 2, 0, p);
    slice_text(&m, 0, text, sizeof text);
    size_t used = strlen(text);
    ADD(IMAGE_TYPE "ORIGINAL\\PRIMARY\\M\\ND\\MOSAIC;00180088DS=3;00190010LO=SIEMENS MR HEADER;0019100AUS=%d;", m.n);
    ADD("00200032DS=%.9g\\%.9g\\%.9g;00280010US=%d;00280011US=%d;", p[0], p[1], p[2], GRID * m.rows, GRID * m.cols);
    for (int i = 0; i < GRID * m.rows * GRID * m.cols; i++) {
        int r = i / (GRID * m.cols), c = i % (GRID * m.cols), tile = r / m.rows * GRID + c / m.cols;
        put_number(&pixels, tile < m.n ? (uint64_t)stored(&m, c % m.cols, r % m.rows, tile) : 0, 2);
    }
    fresh_input();
    write_file(&m, 0, text, &pixels, 0);
    free(pixels.at);
    expect("mosaic", "", &m, 1, "", 0);
}

static void test_rejected(void) {
    static const struct { const char *name, *reason, *set; } cases[] = {
        {"localizer", "localizer", IMAGE_TYPE "ORIGINAL\\PRIMARY\\LOCALIZER;"},
        {"scout", "localizer", IMAGE_TYPE "ORIGINAL\\PRIMARY\\SCOUT;"},
        {"secondary capture", "secondary-capture", SOP_CLASS "1.2.840.10008.5.1.4.1.1.7;"},
        {"secondary capture of many frames", "secondary-capture", SOP_CLASS "1.2.840.10008.5.1.4.1.1.7.3;"},
        {"segmentation", "not-image", SOP_CLASS "1.2.840.10008.5.1.4.1.1.66.4;"},
        {"burnt-in text", "burned-in", "00280301CS=YES;"},
        {"MIP", "projection", IMAGE_TYPE "DERIVED\\SECONDARY\\PROJECTION IMAGE;"},
        {"MPR", "projection", IMAGE_TYPE "DERIVED\\SECONDARY\\MPR;"}, {"dose report", "dose-report", "0008103ELO=Dose Report;"},
        {"perfusion map", "perfusion-map", IMAGE_TYPE "DERIVED\\PRIMARY\\PERFUSION;"}};
    Stack s = usual;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) s.set = cases[i].set, reject(cases[i].name, cases[i].reason, &s, 1);
    s.modality = MODALITY_UNKNOWN, s.set = MODALITY "PT;" SOP_CLASS "1.2.840.10008.5.1.4.1.1.128;";
    reject("PET", "modality", &s, 1);
    s = mr_stack(600), s.bits = s.allocated = 8, s.high = 7, s.slope = 5;
    reject("8 bits", "eight-bit", &s, 1);
    s = usual, s.n = 3;
    reject("three slices", "few-slices", &s, 1);
    s = usual, s.in_order = 1, s.gap = 1, s.set = NO_GEOMETRY;    // taken, its slices lie as they are numbered
    reject("no geometry", "no-geometry", &s, 1);
    s = usual, s.spacing[0] = s.spacing[1] = 1, s.set = "00280030;";
    reject("no pixel spacing", "no-geometry", &s, 1);
    s.allocated = 24, s.set = "00280002US=3;00280004CS=RGB;00280006US=0;00280100US=8;00280101US=8;00280102US=7;";
    reject("RGB", "not-scalar", &s, 0);

    Stack planes[3] = {mr_stack(600), mr_stack(650), mr_stack(700)};
    memcpy(planes[1].iop, (double[6]){1, 0, 0, 0, 0, -1}, sizeof s.iop);
    memcpy(planes[2].iop, (double[6]){0, 1, 0, 0, 0, -1}, sizeof s.iop);
    planes[1].runs = "LIP", planes[2].runs = "PIR";
    write_stacks(planes, 3);
    expect("three planes in one series", "", NULL, 0, "localizer", 3);
    expect("three planes in one series, kept", "--keep localizer", planes, 3, "", 0);

    char text[4096];
    s = usual, s.set = NO_GEOMETRY SOP_CLASS "1.2.840.10008.5.1.4.1.1.88.11;" MODALITY "SR;00280010;00280011;00280100;00280101;";
    fresh_input();
    slice_text(&s, 0, text, sizeof text);
    write_file(&s, 0, text, NULL, 0);
    expect("structured report", "--keep all", NULL, 0, "not-image", 1);

    const double gaps[6] = {3, 3, 3, 3, 6, 3};
    Stack cut = usual, rest = usual;
    cut.cut = 1 << 5, rest.n = 7, rest.gaps = gaps;
    write_stacks(&cut, 1);
    expect("one of eight cut short", "", &rest, 1, "damaged", 1);
    cut.cut = 255;
    write_stacks(&cut, 1);
    expect("eight of eight cut short", "", NULL, 0, "damaged", 8);
}

int main(int argc, char **argv) {
    if (argc != 2) fail(STATUS_USAGE, "usage: test_dicom PREP");
    prep = argv[1];
    const char *tmp = getenv("TMPDIR");
    snprintf(folder, sizeof folder, "%s/test_dicom.%d.%lld", tmp ? tmp : "/tmp", (int)getpid(), (long long)time(NULL));
    if (mkdir(folder, 0700)) fail(STATUS_FAILED, "%s: cannot make the folder: %s", folder, strerror(errno));
    write_stack(&usual);
    run("the first run", "");
    if (strstr(report, "built without GDCM")) printf("skipped: %s was built without GDCM\n", prep);
    else test_geometry(), test_encodings(), test_values(), test_grouping(), test_multiframe(), test_rejected();
    file_remove_tree(folder);
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
