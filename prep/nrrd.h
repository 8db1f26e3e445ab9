/*
NRRD (teem.sourceforge.net/nrrd/format.html), versions 1 to 5: a text header before the voxels (.nrrd) or beside them (.nhdr).

  nrrd_types, nrrd_spaces   number types and spaces, with their other names
  NrrdHeader    what the fields say
  nrrd_word, nrrd_vectors, nrrd_whole   parts of a field
  nrrd_field    reads one
  nrrd_place    which axis counts volumes, and where the voxels lie
  nrrd_open     reads and checks a header
*/
#ifndef CURIA_NRRD_H
#define CURIA_NRRD_H

#include "stream.h"

#ifdef CURIA_VOLUMES

static const char *const nrrd_types[] = {
    [RAW_U8] = "uchar|unsigned char|uint8|uint8_t", [RAW_I8] = "signed char|char|int8|int8_t",
    [RAW_U16] = "ushort|unsigned short|unsigned short int|uint16|uint16_t",
    [RAW_I16] = "short|short int|signed short|signed short int|int16|int16_t",
    [RAW_U32] = "uint|unsigned int|uint32|uint32_t", [RAW_I32] = "int|signed int|int32|int32_t",
    [RAW_U64] = "ulonglong|unsigned long long|unsigned long long int|uint64|uint64_t",
    [RAW_I64] = "longlong|long long|long long int|signed long long|signed long long int|int64|int64_t",
    [RAW_F32] = "float", [RAW_F64] = "double"};

// Every space but LPS, RAS and LAS is taken as LPS, as ITK does.
static const struct { const char *names; int flip[2], anatomic; } nrrd_spaces[] = {
    {"left-posterior-superior|LPS|left-posterior-superior-time|LPST", {0, 0}, 1},
    {"right-anterior-superior|RAS|right-anterior-superior-time|RAST", {1, 1}, 1},
    {"left-anterior-superior|LAS|left-anterior-superior-time|LAST", {0, 1}, 1},
    {"scanner-xyz|scanner-xyz-time|3D-right-handed|3D-right-handed-time|3D-left-handed|3D-left-handed-time", {0, 0}, 0}};

enum { NRRD_AXES = 4 };

typedef struct {
    int axes, n_sizes, n_directions, n_spacings, n_kinds, space, endian;    // endian: 1 little, 2 big
    double sizes[NRRD_AXES], spacings[NRRD_AXES], origin[NRRD_AXES][NRRD_AXES];
    double direction[NRRD_AXES][NRRD_AXES];  // per axis, mm; NAN first: none
    char kinds[NRRD_AXES][24];
    int detached, per_file;                  // per_file: axes of the voxels in each listed file; -1: all but the last
} NrrdHeader;

// Whether `word` is one of the names in `list`, in small or capital letters.
static inline int nrrd_word(const char *list, const char *word) {
    size_t n = strlen(word);
    for (; n && *list; list += strcspn(list, "|"), list += *list == '|')
        if (strcspn(list, "|") == n && !strncasecmp(list, word, n)) return 1;
    return 0;
}

// Vectors "(x,y,z)" or "none"; returns how many, -1 where there is anything else or more than NRRD_AXES.
static inline int nrrd_vectors(const char *text, double out[NRRD_AXES][NRRD_AXES]) {
    for (int n = 0;; n++) {
        text += strspn(text, " ");
        if (!*text) return n;
        if (n == NRRD_AXES) return -1;
        memset(out[n], 0, sizeof out[n]);
        if (!strncasecmp(text, "none", 4)) {
            out[n][0] = NAN;
            text += 4;
            continue;
        }
        char inside[256];
        size_t length = strcspn(text, ")");
        if (*text != '(' || !text[length] || length > sizeof inside) return -1;
        snprintf(inside, sizeof inside, "%.*s", (int)length - 1, text + 1);
        if (text_numbers(inside, out[n], NRRD_AXES) < 1) return -1;
        text += length + 1;
    }
}

// A whole number from `least` to 1e15.
static inline int nrrd_whole(const char *text, double least, int64_t *out) {
    double x;
    if (text_numbers(text, &x, 1) != 1 || x != floor(x) || x < least || x > 1e15) return 0;
    *out = (int64_t)x;
    return 1;
}

// Reads the field `name` with what follows its colon; cuts value to pieces. Other fields do not matter here. A list of files
// runs to the end of the header. 1 good, 0 where the value cannot be used, -1 and *reason.
static inline int nrrd_field(NrrdHeader *x, VolumeFile *f, Stream *s, const char *path, const char *name, char *value,
                             char *reason, size_t size) {
    if (!strcasecmp(name, "type")) {
        for (int i = 0; i < (int)(sizeof nrrd_types / sizeof *nrrd_types); i++)
            if (nrrd_word(nrrd_types[i], value)) f->type = i;
        return f->type >= 0;
    }
    if (!strcasecmp(name, "encoding")) {
        f->coding = nrrd_word("ascii|text|txt", value) ? VOXELS_TEXT : nrrd_word("hex", value) ? VOXELS_HEX : VOXELS_BINARY;
        f->format = nrrd_word("gzip|gz", value) ? STREAM_GZIP : f->coding || nrrd_word("raw", value) ? STREAM_PLAIN : -1;
        return f->format >= 0;
    }
    if (!strcasecmp(name, "endian")) return x->endian = nrrd_word("little", value) + 2 * nrrd_word("big", value);
    if (!strcasecmp(name, "dimension")) return (x->axes = atoi(value)) >= 2 && x->axes <= NRRD_AXES;
    if (!strcasecmp(name, "sizes")) return (x->n_sizes = text_numbers(value, x->sizes, NRRD_AXES)) > 0;
    if (!strcasecmp(name, "spacings")) return (x->n_spacings = text_numbers(value, x->spacings, NRRD_AXES)) > 0;
    if (!strcasecmp(name, "space directions")) return (x->n_directions = nrrd_vectors(value, x->direction)) > 0;
    if (!strcasecmp(name, "space origin")) return nrrd_vectors(value, x->origin) == 1;
    if (nrrd_word("line skip|lineskip", name)) return nrrd_whole(value, 0, &f->lines);
    if (nrrd_word("byte skip|byteskip", name)) return nrrd_whole(value, -1, &f->skip);
    if (!strcasecmp(name, "space")) {
        for (int i = 0; i < (int)(sizeof nrrd_spaces / sizeof *nrrd_spaces); i++)
            if (nrrd_word(nrrd_spaces[i].names, value)) x->space = i;
        return x->space >= 0;
    }
    if (!strcasecmp(name, "kinds")) {
        for (char *word = strtok_r(value, " ", &value); word; word = strtok_r(NULL, " ", &value)) {
            if (x->n_kinds == NRRD_AXES) return 0;
            snprintf(x->kinds[x->n_kinds++], sizeof *x->kinds, "%s", word);
        }
        return 1;
    }
    if (!nrrd_word("data file|datafile", name)) return 1;
    double numbers[4];
    char *rest = strchr(value, ' '), line[4096];
    int n = rest ? text_numbers(rest, numbers, 4) : 0;
    x->detached = 1;
    if (!strncmp(value, "LIST", 4) && (value[4] == 0 || n == 1)) {
        x->per_file = n == 1 ? (int)fmax(0, fmin(9, numbers[0])) : -1;
        while (stream_line(s, line, sizeof line))
            if (*line && volumefile_part(f, path, line, reason, size)) return -1;
        return 1;
    }
    if (n < 3 || !strchr(value, '%')) return volumefile_part(f, path, value, reason, size) ? -1 : 1;
    x->per_file = n == 4 ? (int)fmax(0, fmin(9, numbers[3])) : -1;
    *rest = 0;
    return volumefile_pattern(f, path, value, numbers[0], numbers[1], numbers[2], reason, size) ? -1 : 1;
}

// Fills n, volumes, run and the grid of *f. An axis without a direction in space, or whose kind is a list or time,
// counts volumes; else the fourth does. 0 good, else -1 and *reason.
static inline int nrrd_place(const NrrdHeader *x, VolumeFile *f, char *reason, size_t size) {
    int counts = -1, others = 0, b = 0;
    double before = 1;
    for (int a = 0; a < x->axes; a++) {
        const char *kind = x->n_kinds ? x->kinds[a] : "none";
        const double *d = x->direction[a];
        int series = nrrd_word("list|time", kind), space = nrrd_word("domain|space|none|???|unknown|stub|scalar", kind);
        if (!series && !space && x->sizes[a] > 1) {
            snprintf(reason, size, "axis %d is colour or vectors, not an image of one value per voxel", a + 1);
            return -1;
        }
        int outside = x->n_directions && (!isfinite(d[0] + d[1] + d[2]) || (d[0] == 0 && d[1] == 0 && d[2] == 0));
        if (series || !space || outside) counts = a, others++;
    }
    if (x->axes == NRRD_AXES && others == 0) counts = 3, others = 1;
    if (others > 1 || x->axes - others < 2 || x->axes - others > 3) {
        snprintf(reason, size, "%d of its %d axes lie in space, and 2 or 3 can be read", x->axes - others, x->axes);
        return -1;
    }
    for (int a = 0; a < x->axes; a++) {
        if (!(x->sizes[a] >= 1) || x->sizes[a] != floor(x->sizes[a]) || x->sizes[a] > (a == counts ? 1e9 : SHARD_MAX_SIDE)) {
            snprintf(reason, size, "its size along axis %d is %g, and 1 to %d can be read", a + 1, x->sizes[a], SHARD_MAX_SIDE);
            return -1;
        }
        if (a == counts) {
            f->volumes = (int64_t)x->sizes[a];
            f->run = (int64_t)before;
            continue;
        }
        before *= x->sizes[a];
        double *step = f->grid.step[b];
        f->n[b] = (int)x->sizes[a];
        if (x->n_directions) memcpy(step, x->direction[a], 3 * sizeof *step);
        else step[b] = x->n_spacings && isfinite(x->spacings[a]) ? x->spacings[a] : 1;
        b++;
    }
    int anatomic = x->space >= 0 && nrrd_spaces[x->space].anatomic;
    if (!x->n_directions) volume_note(&f->grid, "no orientation in the header: taken as LPS");
    else if (!anatomic) volume_note(&f->grid, "its space has no anatomical axes: taken as LPS");
    for (int i = 0; i < 3; i++) f->grid.origin[i] = isfinite(x->origin[0][i]) ? x->origin[0][i] : 0;
    for (int i = 0; i < 2 && x->n_directions && anatomic; i++) {
        double to_lps = nrrd_spaces[x->space].flip[i] ? -1 : 1;
        f->grid.origin[i] *= to_lps;
        for (int a = 0; a < 3; a++) f->grid.step[a][i] *= to_lps;
    }
    return 0;
}

// Reads the header of a file that begins with NRRD. 0 good, else -1 and *reason; the caller frees *f in either case.
static inline int nrrd_open(const char *path, VolumeFile *f, char *reason, size_t size) {
    NrrdHeader x = {.space = -1};
    char line[4096], *value = line;
    const char *missing = NULL;
    int good = 1, ended = 0;
    f->type = f->format = -1;
    Stream *s = stream_open(path, 0, STREAM_PLAIN, reason, size);
    if (!s) return -1;
    if (!stream_line(s, line, sizeof line) || strncmp(line, "NRRD000", 7) || line[7] < '1' || line[7] > '5' || line[8]) good = 0;
    while (good > 0 && !ended && stream_line(s, line, sizeof line)) {
        value = strchr(line, ':');
        if (!*line) ended = 1;
        else if (!value) good = *line == '#';
        else if (*line != '#' && value[1] != '=') {                      // "key:=value" is for other programs
            *value++ = 0;
            value += strspn(value, " ");
            good = nrrd_field(&x, f, s, path, line, value, reason, size);
        }
    }
    uint64_t at = stream_at(s);
    stream_close(s);
    if (good < 0) return -1;
    if (!good) return text_refused(line, value, reason, size);
    if (!x.axes) missing = "dimension";
    else if (x.n_sizes != x.axes) missing = "a size for each axis";
    else if (f->type < 0) missing = "type";
    else if (f->format < 0) missing = "encoding";
    else if (x.n_directions && x.n_directions != x.axes) missing = "a space direction for each axis";
    else if (!x.n_directions && x.n_spacings && x.n_spacings != x.axes) missing = "a spacing for each axis";
    else if (x.n_kinds && x.n_kinds != x.axes) missing = "a kind for each axis";
    else if (x.detached ? !f->n_parts : !ended) missing = "voxels";
    else if (!x.endian && raw_bytes(f->type) > 1 && f->coding != VOXELS_TEXT) missing = "endian";
    if (missing) {
        snprintf(reason, size, "its header lacks %s", missing);
        return -1;
    }
    if (nrrd_place(&x, f, reason, size)) return -1;
    if (!x.detached) f->offset = (int64_t)at;
    if (x.per_file < 0) x.per_file = x.axes - 1;
    if (f->skip < 0 && f->format == STREAM_PLAIN && !f->coding) f->offset = -1, f->lines = 0;
    if (f->skip < 0) f->skip = 0;
    f->swapped = x.endian == 2 && f->coding != VOXELS_TEXT;
    return volumefile_files(f, path, x.detached, x.per_file, x.sizes, x.axes, reason, size);
}

#endif
#endif
