/*
What the user says of the files: labels, targets, patients and masks from a table, and who a file is of from its name.

  LabelRow, Labels          the table of --labels
  labels_read               reads it
  labels_find               the row for a slice
  labels_unused             how many rows matched nothing
  PatientRule, patient_of   whose volume a file is, by its name
  mask_beside               the label image that nnU-Net's and the Decathlon's layouts keep for an image
*/
#ifndef CURIA_LABELS_H
#define CURIA_LABELS_H

#include <limits.h>
#include <regex.h>
#include <sys/mman.h>

#include "index.h"

typedef struct { char *file, *label, *patient, *mask; int slice, index; float target; } LabelRow;

typedef struct {
    LabelRow *rows;
    int n;
    char *names, *folder;              // class names, one a line; where the table is
    uint8_t *used;                     // [n], shared with the workers
} Labels;

// Cuts a line of CSV or TSV in place; fields in double quotes may hold the separator. Returns how many fields there are.
static inline int cut_line(char *line, char separator, char **field, int most) {
    int n = 0;
    line[strcspn(line, "\r\n")] = 0;
    for (char *at = line;; at++) {
        char *out = at;
        if (n < most) field[n++] = at;
        if (*at == '"' && separator == ',') {
            for (at++; *at && (*at != '"' || at[1] == '"'); at++) {
                if (*at == '"') at++;
                *out++ = *at;
            }
            if (*at) at++;
        } else {
            while (*at && *at != separator) *out++ = *at++;
        }
        while (*at && *at != separator) at++;
        int last = !*at;
        *out = 0;
        if (last) return n;
    }
}

static inline int labels_order(const void *a, const void *b) {
    const LabelRow *x = (const LabelRow *)a, *y = (const LabelRow *)b;
    int by_file = strcmp(x->file, y->file);
    return by_file ? by_file : (x->slice > y->slice) - (x->slice < y->slice);
}

static inline int words_order(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

// Numbers the classes: an integer is its own number where all labels are integers, else by the names' alphabetical order.
static inline void labels_number(Labels *l, const char *path) {
    int whole = 1, n = 0;
    char **words = (char **)xmalloc((l->n + 1) * sizeof *words, "class names");
    for (int i = 0; i < l->n; i++) {
        if (!*l->rows[i].label) continue;
        whole &= strspn(l->rows[i].label, "0123456789") == strlen(l->rows[i].label) && strlen(l->rows[i].label) < 7;
        words[n++] = l->rows[i].label;
    }
    qsort(words, n, sizeof *words, words_order);
    int classes = 0;
    size_t bytes = 1;
    for (int i = 0; i < n; i++) {
        if (classes && !strcmp(words[i], words[classes - 1])) continue;
        words[classes++] = words[i];
        bytes += strlen(words[i]) + 1;
    }
    if (!whole) l->names = (char *)xmalloc(bytes, "class names");
    for (int i = 0; i < classes && !whole; i++) sprintf(l->names + strlen(l->names), "%s\n", words[i]);
    for (int i = 0; i < l->n; i++) {
        char *label = l->rows[i].label, **at = (char **)bsearch(&label, words, classes, sizeof *words, words_order);
        l->rows[i].index = !*label ? -1 : whole ? atoi(label) : (int)(at - words);
    }
    free(words);
    if (l->n == 0) fail(STATUS_DATA, "%s has a header and no rows", path);
}

// The table at path, with a header: file or series, and label, target, patient or mask; slice where a row is for one slice.
static inline Labels labels_read(const char *path) {
    enum { FILE_COLUMN, SERIES_COLUMN, SLICE_COLUMN, LABEL_COLUMN, TARGET_COLUMN, PATIENT_COLUMN, MASK_COLUMN, COLUMNS };
    static const char *const names[COLUMNS] = {"file", "series", "slice", "label", "target", "patient", "mask"};
    Labels l = {.folder = strdup(path)};
    FILE *file = fopen(path, "r");
    if (!file) fail(STATUS_USAGE, "--labels %s: %s", path, strerror(errno));
    char *line = NULL, *field[64], *slash = strrchr(l.folder, '/');
    size_t room = 0;
    int columns[COLUMNS] = {-1, -1, -1, -1, -1, -1, -1}, number = 1, capacity = 0;
    if (slash) slash[1] = 0;
    else *l.folder = 0;
    if (getline(&line, &room, file) < 0) fail(STATUS_DATA, "%s is empty; it needs a header with file and label", path);
    char separator = strchr(line, '\t') ? '\t' : ',', *start = !strncmp(line, "\xEF\xBB\xBF", 3) ? line + 3 : line;
    int n = cut_line(start, separator, field, 64);
    for (int i = 0; i < n; i++)
        for (int k = 0; k < COLUMNS; k++)
            if (!strcasecmp(field[i], names[k])) columns[k] = i;
    int values = columns[LABEL_COLUMN] >= 0 || columns[TARGET_COLUMN] >= 0 || columns[PATIENT_COLUMN] >= 0 || columns[MASK_COLUMN] >= 0;
    if ((columns[FILE_COLUMN] < 0 && columns[SERIES_COLUMN] < 0) || !values)
        fail(STATUS_DATA, "%s: its header needs file or series, and label, target, patient or mask", path);
    while (getline(&line, &room, file) >= 0) {
        number++;
        n = cut_line(line, separator, field, 64);
        if (n == 1 && !*field[0]) continue;
        const char *value[COLUMNS];
        for (int k = 0; k < COLUMNS; k++) value[k] = columns[k] >= 0 && columns[k] < n ? field[columns[k]] : "";
        const char *of = *value[FILE_COLUMN] ? value[FILE_COLUMN] : value[SERIES_COLUMN];
        char *slice_end, *target_end;
        long slice = strtol(value[SLICE_COLUMN], &slice_end, 10);
        float target = strtof(value[TARGET_COLUMN], &target_end);
        if (!*of || *slice_end || *target_end || slice < 0 || slice > INT_MAX)
            fail(STATUS_DATA, "%s, line %d: file is empty, or slice or target is not a number", path, number);
        if (l.n == capacity) {
            capacity = capacity ? 2 * capacity : 256;
            l.rows = (LabelRow *)realloc(l.rows, capacity * sizeof *l.rows);
            if (!l.rows) fail(STATUS_FAILED, "out of memory: %s has too many rows", path);
        }
        l.rows[l.n++] = (LabelRow){
            .file = strdup(of), .label = strdup(value[LABEL_COLUMN]), .patient = strdup(value[PATIENT_COLUMN]),
            .mask = strdup(value[MASK_COLUMN]), .index = -1, .slice = *value[SLICE_COLUMN] ? (int)slice : -1,
            .target = *value[TARGET_COLUMN] && isfinite(target) ? target : NAN};
    }
    free(line);
    fclose(file);
    if (l.n) qsort(l.rows, l.n, sizeof *l.rows, labels_order);
    for (int i = 1; i < l.n; i++)
        if (!labels_order(&l.rows[i], &l.rows[i - 1]))
            fail(STATUS_DATA, "%s has two rows for %s%s; keep one", path, l.rows[i].file,
                 l.rows[i].slice < 0 ? "" : " and the same slice");
    labels_number(&l, path);
    l.used = (uint8_t *)mmap(NULL, l.n, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (l.used == MAP_FAILED) fail(STATUS_FAILED, "out of memory: %s has too many rows", path);
    return l;
}

// The row for slice `slice` of a file called `name` below INPUT, of the DICOM series `series` ("" if none): by the file's
// name, its base name, the series' UID, then the folder; of each the slice's own row before the one for all slices. Or NULL.
static inline LabelRow *labels_find(const Labels *l, const char *name, const char *series, int slice) {
    char folder[PATH_SIZE];
    const char *base = strrchr(name, '/') ? strrchr(name, '/') + 1 : name;
    snprintf(folder, sizeof folder, "%.*s", base > name ? (int)(base - name - 1) : 0, name);
    const char *keys[4] = {name, base, series, folder};
    for (int k = 0; k < 4 && l->n; k++)
        for (int whole = 0; whole < 2 && *keys[k]; whole++) {
            LabelRow key = {.file = (char *)keys[k], .slice = whole ? -1 : slice};
            LabelRow *row = (LabelRow *)bsearch(&key, l->rows, l->n, sizeof key, labels_order);
            if (!row) continue;
            l->used[row - l->rows] = 1;
            return row;
        }
    return NULL;
}

static inline int labels_unused(const Labels *l) {
    int unused = 0;
    for (int i = 0; i < l->n; i++) unused += !l->used[i];
    return unused;
}

enum { PATIENT_AUTO, PATIENT_FOLDER, PATIENT_FILE, PATIENT_REGEX };
typedef struct { int from; regex_t regex; } PatientRule;

// Cuts .nii, .nii.gz, .nrrd ... and the channel number of nnU-Net (_0000) off a name.
static inline void name_stem(char *name) {
    static const char *const ends[] = {".gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".hdr"};
    for (size_t i = 0; i < sizeof ends / sizeof *ends; i++)
        if (ends_with(name, ends[i])) name[strlen(name) - strlen(ends[i])] = 0;
    size_t length = strlen(name);
    if (length > 5 && name[length - 5] == '_' && strspn(name + length - 4, "0123456789") == 4) name[length - 5] = 0;
}

// Writes to key (n bytes) what stands for the patient of the file called `name` below INPUT. -1 where the expression is not
// in it.
static inline int patient_of(const PatientRule *rule, const char *name, char *key, size_t n) {
    regmatch_t match[2];
    if (rule->from == PATIENT_REGEX) {
        if (regexec(&rule->regex, name, 2, match, 0)) return -1;
        int group = match[1].rm_so >= 0;
        snprintf(key, n, "%.*s", (int)(match[group].rm_eo - match[group].rm_so), name + match[group].rm_so);
        return 0;
    }
    snprintf(key, n, "%s", name);
    int by_folder = rule->from != PATIENT_FILE;
    for (char *at = key; by_folder && at; at = strchr(at, '/') ? strchr(at, '/') + 1 : NULL) {
        char *end = strchr(at, '/');
        if (strncmp(at, "sub-", 4) || !end) continue;
        *end = 0;
        return 0;
    }
    char *base = strrchr(key, '/');
    if (base && by_folder) {
        *base = 0;
        const char *folder = strrchr(key, '/') ? strrchr(key, '/') + 1 : key;
        if (strncmp(folder, "images", 6) && strncmp(folder, "labels", 6)) return 0;
        *base = '/';
    }
    name_stem(key);
    return 0;
}

// mask[PATH_SIZE]: the file labelsX/CASE beside the folder of imagesX/CASE_0000. Returns whether it is there.
static inline int mask_beside(const char *path, char *mask) {
    static const char *const ends[] = {".nii.gz", ".nii", ".nrrd", ".mha"};
    char stem[PATH_SIZE];
    snprintf(stem, sizeof stem, "%s", path);
    name_stem(stem);
    char *base = strrchr(stem, '/'), *folder = base;
    while (folder > stem && folder[-1] != '/') folder--;
    if (!base || strncmp(folder, "images", 6)) return 0;
    for (size_t i = 0; i < sizeof ends / sizeof *ends; i++) {
        int n = snprintf(mask, PATH_SIZE, "%.*slabels%s%s", (int)(folder - stem), stem, folder + 6, ends[i]);
        if (n < PATH_SIZE && file_exists(mask)) return 1;
    }
    return 0;
}

#endif
