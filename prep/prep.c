/*
prep: volumes in, shards out. Also makes the phantom, and shows and verifies shards.

  gcc -std=gnu11 -O2 -I. -DCURIA_NIFTI -I/usr/include/nifti prep/prep.c -o prep/prep -lnifti2 -lznz -lz -lpthread -lm
  gcc -std=gnu11 -O2 -I. prep/prep.c -o prep/prep -lpthread -lm        (without NIfTI: phantom, --info, --verify)

  Options, parse_options   the command line
  Input, gather            the files to look at, sorted by name, and what each is by its content
  LabelRow, labels_read    the table of --labels
  patient_of               whose volume a file is
  Output, output_*         rolling shards and the report
  pack_volume, pack        one volume to slices; all inputs
  show_info, verify        --info and --verify
*/
#include <ctype.h>
#include <getopt.h>
#include <regex.h>
#include <signal.h>

#include "phantom.h"
#include "nifti.h"

static const char help[] =
    "usage: ./prep/prep -o DIR [options] INPUT...      volumes to shards; INPUT is a file, or a folder walked to its end\n"
    "       ./prep/prep -o DIR --phantom [--seed N] [--patients N]\n"
    "       ./prep/prep --info SHARD...                what is in shards (files or folders), as TSV on stdout\n"
    "       ./prep/prep --verify SHARD...              every checksum; exit status 3 where one differs\n"
    "\n"
    "Reads NIfTI-1 and -2 (.nii, .nii.gz), told by content and not by name. DICOM, NRRD and MetaImage are named and left out.\n"
    "Slices keep their resolution and values (HU for CT), in Curia's orientation; those without body (fewer than 1 % of the\n"
    "pixels above -500 HU, or above an MR volume's noise) and constant ones are dropped and counted.\n"
    "\n"
    "  -o, --out DIR            where shard-00000.shard ... and report.tsv go; must hold no shards yet\n"
    "      --modality ct|mr|auto  auto (default): CT where the lowest value is -500 or below, else MR\n"
    "      --planes native|axial|coronal|sagittal|all   native (default): across the longest voxel side where voxels are more\n"
    "                           than twice as long as wide, else across an axis of fewer than 16 voxels, else axial\n"
    "      --4d first|mid|all   which volumes of a 4-D file (default first)\n"
    "      --labels FILE        CSV or TSV with a header: file (name below INPUT, or base name), slice (optional, from 0 to\n"
    "                           superior, posterior or left), label (class name, or integer), target (number), patient\n"
    "      --keep-labels        take label images too (integers, none negative, few values, in flat pieces); default: left out\n"
    "      --patient-from folder|file|regex:RE   who a file is of. folder (default): the sub-* folder of a BIDS tree, else the\n"
    "                           folder the file is in (for images*/ and labels*/, and where there is none, the file's name\n"
    "                           without _0000.nii.gz); file: its name; regex: the first group of RE in the name below INPUT\n"
    "      --salt-file FILE     key of the patient and volume ids; without it the key is public, and whoever guesses a file's\n"
    "                           name can find its id\n"
    "      --shard-size MB      start a new shard beyond this (default 512)\n"
    "      --seed N             of the phantom (default 1)\n"
    "      --patients N         of the phantom: N in DIR/train and 2N/3 in DIR/eval (default 150)\n"
    "  -h, --help\n"
    "\n"
    "Exit status: 0 done; 1 failed while running; 2 command line; 3 nothing usable, or an INPUT named as a file was not usable.\n";

enum { MODE_PACK, MODE_PHANTOM, MODE_INFO, MODE_VERIFY };
enum { FOURD_FIRST, FOURD_MID, FOURD_ALL };
enum { PATIENT_FOLDER, PATIENT_FILE, PATIENT_REGEX };
enum { PLANES_NATIVE = PLANE_COUNT, PLANES_ALL };

typedef struct {
    int mode, modality, planes, fourd, keep_labels, patient_from, patients;
    const char *out, *labels, *salt_file;
    regex_t patient_regex;
    uint64_t seed, shard_bytes;
    SipKey salt;
} Options;

static const char *const modality_names[MODALITY_COUNT] = {"?", "CT", "MR"};
static const char *const plane_names[PLANE_COUNT] = {"axial", "coronal", "sagittal"};

// The place of `value` among `n` words, or fails with status 2.
static int parse_word(const char *option, const char *value, const char *const *words, int n) {
    char all[256] = "";
    for (int i = 0; i < n; i++) {
        if (!strcmp(value, words[i])) return i;
        snprintf(all + strlen(all), sizeof all - strlen(all), "%s%s", i ? ", " : "", words[i]);
    }
    fail(STATUS_USAGE, "--%s %s: give one of %s", option, value, all);
}

static uint64_t parse_number(const char *option, const char *value, uint64_t least, uint64_t most) {
    char *end;
    errno = 0;
    unsigned long long n = strtoull(value, &end, 10);
    if (errno || end == value || *end || *value == '-' || n < least || n > most)
        fail(STATUS_USAGE, "--%s %s: give a whole number from %llu to %llu", option, value, (unsigned long long)least,
             (unsigned long long)most);
    return n;
}

static void read_salt(Options *o) {
    char text[4097];
    FILE *file = fopen(o->salt_file, "rb");
    if (!file) fail(STATUS_USAGE, "--salt-file %s: %s", o->salt_file, strerror(errno));
    size_t n = fread(text, 1, sizeof text, file);
    fclose(file);
    if (n < 16 || n > 4096)
        fail(STATUS_USAGE, "--salt-file %s: a key has 16 to 4096 bytes; make one with: head -c 32 /dev/urandom > FILE",
             o->salt_file);
    o->salt = (SipKey){siphash((SipKey){1, 0}, text, n), siphash((SipKey){2, 0}, text, n)};
}

static Options parse_options(int argc, char **argv) {
    enum {
        OPTION_MODALITY = 256, OPTION_PLANES, OPTION_4D, OPTION_LABELS, OPTION_KEEP, OPTION_PATIENT, OPTION_SALT, OPTION_SIZE,
        OPTION_PHANTOM, OPTION_SEED, OPTION_PATIENTS, OPTION_INFO, OPTION_VERIFY
    };
    static const struct option table[] = {
        {"out", 1, 0, 'o'}, {"help", 0, 0, 'h'}, {"modality", 1, 0, OPTION_MODALITY}, {"planes", 1, 0, OPTION_PLANES},
        {"4d", 1, 0, OPTION_4D}, {"labels", 1, 0, OPTION_LABELS}, {"keep-labels", 0, 0, OPTION_KEEP},
        {"patient-from", 1, 0, OPTION_PATIENT}, {"salt-file", 1, 0, OPTION_SALT}, {"shard-size", 1, 0, OPTION_SIZE},
        {"phantom", 0, 0, OPTION_PHANTOM}, {"seed", 1, 0, OPTION_SEED}, {"patients", 1, 0, OPTION_PATIENTS},
        {"info", 0, 0, OPTION_INFO}, {"verify", 0, 0, OPTION_VERIFY}, {0}};
    static const char *const modalities[] = {"auto", "ct", "mr"},
                             *const planes[] = {"axial", "coronal", "sagittal", "native", "all"},
                             *const fourd[] = {"first", "mid", "all"};
    Options o = {.planes = PLANES_NATIVE, .seed = PHANTOM_SEED, .patients = PHANTOM_PATIENTS, .shard_bytes = (uint64_t)512 << 20,
                 .salt = {0x63757269612e6331, 0x7075626c69632073}};
    opterr = 0;
    for (int c; (c = getopt_long(argc, argv, "o:h", table, NULL)) != -1;) {
        switch (c) {
            case 'o': o.out = optarg; break;
            case 'h': fputs(help, stdout); exit(STATUS_DONE);
            case OPTION_MODALITY: o.modality = parse_word("modality", optarg, modalities, 3); break;
            case OPTION_PLANES: o.planes = parse_word("planes", optarg, planes, 5); break;
            case OPTION_4D: o.fourd = parse_word("4d", optarg, fourd, 3); break;
            case OPTION_LABELS: o.labels = optarg; break;
            case OPTION_KEEP: o.keep_labels = 1; break;
            case OPTION_SALT: o.salt_file = optarg; break;
            case OPTION_SIZE: o.shard_bytes = parse_number("shard-size", optarg, 1, 1 << 20) << 20; break;
            case OPTION_PHANTOM: o.mode = MODE_PHANTOM; break;
            case OPTION_SEED: o.seed = parse_number("seed", optarg, 0, UINT64_MAX); break;
            case OPTION_PATIENTS: o.patients = (int)parse_number("patients", optarg, 2, 1000000); break;
            case OPTION_INFO: o.mode = MODE_INFO; break;
            case OPTION_VERIFY: o.mode = MODE_VERIFY; break;
            case OPTION_PATIENT:
                o.patient_from = !strcmp(optarg, "folder") ? PATIENT_FOLDER
                                 : !strcmp(optarg, "file") ? PATIENT_FILE
                                                           : PATIENT_REGEX;
                if (o.patient_from == PATIENT_REGEX &&
                    (strncmp(optarg, "regex:", 6) || regcomp(&o.patient_regex, optarg + 6, REG_EXTENDED)))
                    fail(STATUS_USAGE, "--patient-from %s: give folder, file, or regex: and a POSIX extended regular expression",
                         optarg);
                break;
            default: fail(STATUS_USAGE, "%s: no such option, or its value is missing; see ./prep/prep --help", argv[optind - 1]);
        }
    }
    int inputs = argc - optind;
    if (o.mode == MODE_PHANTOM ? inputs > 0 : inputs == 0)
        fail(STATUS_USAGE, o.mode == MODE_PHANTOM ? "--phantom takes no INPUT" : "no INPUT; see ./prep/prep --help");
    if ((o.mode == MODE_PACK || o.mode == MODE_PHANTOM) && !o.out)
        fail(STATUS_USAGE, "no -o DIR to write to; see ./prep/prep --help");
    if (o.salt_file) read_salt(&o);
    return o;
}

// ---------------------------------------------------------------------------------------------------------------- inputs

enum { KIND_OTHER, KIND_NIFTI, KIND_DICOM, KIND_NRRD, KIND_METAIMAGE, KIND_MISSING };

typedef struct {
    char *path, *name;       // name: below the INPUT folder, or the path as given
    int named, same_name;    // named on the command line; its neighbour in the list has the same name
    int kind;
} Input;

typedef struct { Input *at; int n, capacity; } Inputs;

static void inputs_add(Inputs *list, const char *path, const char *name, int named) {
    if (list->n == list->capacity) {
        list->capacity = list->capacity ? 2 * list->capacity : 256;
        list->at = (Input *)realloc(list->at, list->capacity * sizeof *list->at);
        if (!list->at) fail(STATUS_FAILED, "out of memory: %d files are too many", list->n);
    }
    list->at[list->n++] = (Input){strdup(path), strdup(name), named, 0, KIND_OTHER};
}

// Adds what is below the folder; hidden names are left out, links are followed to a depth of 40.
static void walk(Inputs *list, const char *folder, const char *prefix, int depth) {
    DIR *open_folder = opendir(folder);
    if (!open_folder) {
        warn("%s: cannot be read: %s", folder, strerror(errno));
        return;
    }
    for (struct dirent *e; (e = readdir(open_folder));) {
        char path[4096], name[4096];
        struct stat st;
        if (e->d_name[0] == '.') continue;
        if (snprintf(path, sizeof path, "%s/%s", folder, e->d_name) >= (int)sizeof path ||
            snprintf(name, sizeof name, "%s%s", prefix, e->d_name) >= (int)sizeof name - 1) {
            warn("%s: a path in it is too long: left out", folder);
            continue;
        }
        if (stat(path, &st)) warn("%s: %s", path, strerror(errno));
        else if (S_ISREG(st.st_mode)) inputs_add(list, path, name, 0);
        else if (S_ISDIR(st.st_mode) && depth < 40) {
            strcat(name, "/");
            walk(list, path, name, depth + 1);
        }
    }
    closedir(open_folder);
}

static int inputs_order(const void *a, const void *b) {
    const Input *x = (const Input *)a, *y = (const Input *)b;
    int by_name = strcmp(x->name, y->name);
    return by_name ? by_name : strcmp(x->path, y->path);
}

// All files of the arguments, in an order that does not depend on the order of a folder's entries or of the arguments.
static Inputs gather(char **arguments, int n) {
    Inputs list = {0};
    for (int i = 0; i < n; i++) {
        struct stat st;
        const char *path = arguments[i], *name = path;
        while (!strncmp(name, "./", 2)) name += 2;
        if (!stat(path, &st) && S_ISDIR(st.st_mode)) walk(&list, path, "", 0);
        else inputs_add(&list, path, name, 1);
    }
    if (list.n) qsort(list.at, list.n, sizeof *list.at, inputs_order);
    for (int i = 1; i < list.n; i++)
        if (!strcmp(list.at[i].name, list.at[i - 1].name)) list.at[i].same_name = list.at[i - 1].same_name = 1;
    return list;
}

static int ends_with(const char *text, const char *end) {
    size_t a = strlen(text), b = strlen(end);
    return a >= b && !strcasecmp(text + a - b, end);
}

// What a file is, by its first bytes (those within gzip where zlib is there); a name helps only where a NIfTI is damaged
// or a DICOM has no preamble.
static int sniff(const char *path) {
    uint8_t b[1024] = {0};
    int n;
#ifdef CURIA_NIFTI
    gzFile file = gzopen(path, "rb");
    if (!file) return KIND_MISSING;
    n = gzread(file, b, sizeof b - 1);
    gzclose(file);
#else
    FILE *file = fopen(path, "rb");
    if (!file) return KIND_MISSING;
    n = (int)fread(b, 1, sizeof b - 1, file);
    fclose(file);
#endif
    int32_t length;
    memcpy(&length, b, 4);
    int32_t swapped = (int32_t)__builtin_bswap32((uint32_t)length);
    if (n >= 348 && (length == 348 || length == 540 || swapped == 348 || swapped == 540)) return KIND_NIFTI;
    if (n >= 132 && !memcmp(b + 128, "DICM", 4)) return KIND_DICOM;
    if (n >= 4 && !memcmp(b, "NRRD", 4)) return KIND_NRRD;
    if (n > 0 && (strstr((char *)b, "NDims =") || strstr((char *)b, "ObjectType ="))) return KIND_METAIMAGE;
    if (ends_with(path, ".nii") || ends_with(path, ".nii.gz")) return KIND_NIFTI;
    int element = n >= 8 && (b[0] == 8 || b[0] == 2) && b[1] == 0 && b[3] == 0;
    if (ends_with(path, ".dcm") || (element && isupper(b[4]) && isupper(b[5]))) return KIND_DICOM;
    return KIND_OTHER;
}

// ---------------------------------------------------------------------------------------------------------------- labels

typedef struct { char *file, *label, *patient; int slice, index, used; float target; } LabelRow;

typedef struct { LabelRow *rows; int n; char *names; } Labels;

// Cuts a line of CSV or TSV in place; fields in double quotes may hold the separator. Returns how many fields there are.
static int cut_line(char *line, char separator, char **field, int most) {
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

static int labels_order(const void *a, const void *b) {
    const LabelRow *x = (const LabelRow *)a, *y = (const LabelRow *)b;
    int by_file = strcmp(x->file, y->file);
    return by_file ? by_file : (x->slice > y->slice) - (x->slice < y->slice);
}

static int words_order(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

// Numbers the classes: an integer is its own number where all labels are integers, else by the names' alphabetical order.
static void labels_number(Labels *l, const char *path) {
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

static Labels labels_read(const char *path) {
    Labels l = {0};
    FILE *file = fopen(path, "r");
    if (!file) fail(STATUS_USAGE, "--labels %s: %s", path, strerror(errno));
    char *line = NULL, *field[64];
    size_t room = 0;
    int columns[5] = {-1, -1, -1, -1, -1}, number = 1, capacity = 0;
    static const char *const names[5] = {"file", "slice", "label", "target", "patient"};
    if (getline(&line, &room, file) < 0) fail(STATUS_DATA, "%s is empty; it needs a header with file and label", path);
    char separator = strchr(line, '\t') ? '\t' : ',', *start = !strncmp(line, "\xEF\xBB\xBF", 3) ? line + 3 : line;
    int n = cut_line(start, separator, field, 64);
    for (int i = 0; i < n; i++)
        for (int k = 0; k < 5; k++)
            if (!strcasecmp(field[i], names[k])) columns[k] = i;
    if (columns[0] < 0 || (columns[2] < 0 && columns[3] < 0 && columns[4] < 0))
        fail(STATUS_DATA, "%s: its header needs file, and label, target or patient", path);
    while (getline(&line, &room, file) >= 0) {
        number++;
        n = cut_line(line, separator, field, 64);
        if (n == 1 && !*field[0]) continue;
        const char *value[5];
        for (int k = 0; k < 5; k++) value[k] = columns[k] >= 0 && columns[k] < n ? field[columns[k]] : "";
        char *slice_end, *target_end;
        long slice = strtol(value[1], &slice_end, 10);
        float target = strtof(value[3], &target_end);
        if (!*value[0] || *slice_end || *target_end || slice < 0)
            fail(STATUS_DATA, "%s, line %d: file is empty, or slice or target is not a number", path, number);
        if (l.n == capacity) {
            capacity = capacity ? 2 * capacity : 256;
            l.rows = (LabelRow *)realloc(l.rows, capacity * sizeof *l.rows);
            if (!l.rows) fail(STATUS_FAILED, "out of memory: %s has too many rows", path);
        }
        l.rows[l.n++] = (LabelRow){.file = strdup(value[0]), .label = strdup(value[2]), .patient = strdup(value[4]), .index = -1,
                                   .slice = *value[1] ? (int)slice : -1, .target = *value[3] && isfinite(target) ? target : NAN};
    }
    free(line);
    fclose(file);
    if (l.n) qsort(l.rows, l.n, sizeof *l.rows, labels_order);
    for (int i = 1; i < l.n; i++)
        if (!labels_order(&l.rows[i], &l.rows[i - 1]))
            fail(STATUS_DATA, "%s has two rows for %s%s; keep one", path, l.rows[i].file,
                 l.rows[i].slice < 0 ? "" : " and the same slice");
    labels_number(&l, path);
    return l;
}

// The row for a file and slice: its own, else the whole file's; by the name below INPUT, else by the base name. Or NULL.
static LabelRow *labels_find(Labels *l, const char *name, int slice) {
    const char *base = strrchr(name, '/');
    for (int by_base = 0; by_base <= (base != NULL); by_base++)
        for (int whole = 0; whole < 2; whole++) {
            LabelRow key = {.file = (char *)(by_base ? base + 1 : name), .slice = whole ? -1 : slice};
            LabelRow *row = l->n ? (LabelRow *)bsearch(&key, l->rows, l->n, sizeof key, labels_order) : NULL;
            if (row) return row;
        }
    return NULL;
}

// ---------------------------------------------------------------------------------------------------------------- patients

// Writes to key (n bytes) what stands for the patient of the file `name`. -1 where --patient-from's expression is not in it.
static int patient_of(Options *o, Labels *l, const char *name, char *key, size_t n) {
    LabelRow *row = labels_find(l, name, 0);
    regmatch_t match[2];
    if (row && *row->patient) {
        snprintf(key, n, "%s", row->patient);
        return 0;
    }
    if (o->patient_from == PATIENT_REGEX) {
        if (regexec(&o->patient_regex, name, 2, match, 0)) return -1;
        int group = match[1].rm_so >= 0;
        snprintf(key, n, "%.*s", (int)(match[group].rm_eo - match[group].rm_so), name + match[group].rm_so);
        return 0;
    }
    snprintf(key, n, "%s", name);
    for (char *at = key; o->patient_from == PATIENT_FOLDER && at; at = strchr(at, '/') ? strchr(at, '/') + 1 : NULL) {
        char *end = strchr(at, '/');
        if (strncmp(at, "sub-", 4) || !end) continue;
        *end = 0;
        return 0;
    }
    char *base = strrchr(key, '/'), *folder = key;
    if (base && o->patient_from == PATIENT_FOLDER) {
        *base = 0;
        folder = strrchr(key, '/') ? strrchr(key, '/') + 1 : key;
        if (strncmp(folder, "images", 6) && strncmp(folder, "labels", 6)) return 0;
        *base = '/';
    }
    if (ends_with(key, ".gz")) key[strlen(key) - 3] = 0;
    if (ends_with(key, ".nii")) key[strlen(key) - 4] = 0;
    size_t length = strlen(key);
    if (length > 5 && key[length - 5] == '_' && strspn(key + length - 4, "0123456789") == 4) key[length - 5] = 0;
    return 0;
}

// ---------------------------------------------------------------------------------------------------------------- output

typedef struct {
    const Options *options;
    const char *class_names;
    ShardWriter writer;
    FILE *report;            // kept in memory until the shards are whole
    char *report_text;
    size_t report_bytes;
    int shards, files, accepted, rejected, later, other, label_images, named_bad;
    int64_t slices, no_body, constant, volumes[MODALITY_COUNT];
    uint64_t *patients;
    int n_patients;
} Output;

static void output_open(Output *out) {
    const char *dir = out->options->out;
    if (mkdir(dir, 0777) && errno != EEXIST) fail(STATUS_FAILED, "%s: cannot be made: %s", dir, strerror(errno));
    DIR *folder = opendir(dir);
    if (!folder) fail(STATUS_FAILED, "%s: %s", dir, strerror(errno));
    for (struct dirent *e; (e = readdir(folder));)
        if (ends_with(e->d_name, ".shard")) fail(STATUS_USAGE, "%s holds shards already; give another folder, or remove them", dir);
    closedir(folder);
    out->report = open_memstream(&out->report_text, &out->report_bytes);
    if (!out->report) fail(STATUS_FAILED, "out of memory for the report");
    fprintf(out->report, "number\tvolume\tpatient\tstatus\treason\tmodality\tplanes\tvoxels\t"
                         "spacing_mm\torientation\tlow\thigh\tslices\tno_body\tconstant\tnotes\n");
}

static void output_close_shard(Output *out) {
    if (!out->writer.file) return;
    shard_writer_close(&out->writer, out->class_names);
    out->shards++;
}

static void output_add(Output *out, const ShardSlice *slice, const int16_t *pixels) {
    if (out->writer.file && out->writer.offset >= out->options->shard_bytes) output_close_shard(out);
    if (!out->writer.file) {
        char path[4096];
        snprintf(path, sizeof path, "%s/shard-%05d.shard", out->options->out, out->shards);
        shard_writer_open(&out->writer, path);
    }
    shard_writer_add(&out->writer, slice, pixels, NULL);
    out->slices++;
}

static void output_close(Output *out) {
    output_close_shard(out);
    fclose(out->report);
    char path[4096], partial[4096];
    snprintf(path, sizeof path, "%s/report.tsv", out->options->out);
    snprintf(partial, sizeof partial, "%s/report.tsv.partial", out->options->out);
    FILE *file = fopen(partial, "w");
    int bad = !file || fwrite(out->report_text, 1, out->report_bytes, file) != out->report_bytes;
    if (file) bad |= fflush(file) | fsync(fileno(file)) | fclose(file);
    free(out->report_text);
    if (!bad && rename(partial, path) == 0) return;
    int error = errno;
    unlink(partial);
    fail(STATUS_FAILED, "%s: cannot write: %s; the shards beside it are whole", path, strerror(error));
}

static void output_patient(Output *out, uint64_t id) {
    for (int i = 0; i < out->n_patients; i++)
        if (out->patients[i] == id) return;
    out->patients = (uint64_t *)realloc(out->patients, (out->n_patients + 1) * sizeof id);
    if (!out->patients) fail(STATUS_FAILED, "out of memory for the patients");
    out->patients[out->n_patients++] = id;
}

// ---------------------------------------------------------------------------------------------------------------- volumes

// Cuts a volume in one plane and adds its slices. Returns how many were kept; counts the dropped ones in *s's place.
static int pack_plane(Output *out, Labels *labels, const Volume *v, const Input *in, ShardSlice s, int plane, float threshold,
                      int *no_body, int *constant) {
    VolumeView w = volume_view(v, plane);
    int n = w.rows * w.cols, kept = 0;
    int16_t *pixels = (int16_t *)xmalloc(n * sizeof *pixels, "a slice");
    float *values = (float *)xmalloc(n * sizeof *values, "a slice");
    uint8_t *keep = (uint8_t *)xmalloc(w.slices, "a volume");
    Moments plain = {0}, clipped = {0};
    for (int pass = 0; pass < 2; pass++) {
        for (int i = 0; i < w.slices; i++) {
            if (pass && !keep[i]) continue;
            volume_slice(v, plane, i, pixels);
            int same = 1, body = 0;
            for (int j = 0; j < n; j++) {
                values[j] = v->scale * pixels[j] + v->intercept;
                same &= pixels[j] == pixels[0];
                body += values[j] > threshold;
            }
            if (pass == 0) {
                *constant += same;
                *no_body += !same && body < 0.01 * n;
                keep[i] = !same && body >= 0.01 * n;
                kept += keep[i];
                if (!keep[i]) continue;
                moments_add(&plain, values, n, -INFINITY);
                moments_add(&clipped, values, n, -1000);
                continue;
            }
            LabelRow *row = labels_find(labels, in->name, i);
            if (row) row->used = 1;
            s.label = row ? row->index : -1;
            s.target = row ? row->target : NAN;
            s.slice_number = i;
            slice_anatomy(values, w.rows, w.cols, threshold, &s);
            output_add(out, &s, pixels);
        }
        s.rows = w.rows, s.cols = w.cols, s.volume_slices = w.slices, s.plane = (uint8_t)plane;
        s.spacing_row = w.spacing_row, s.spacing_col = w.spacing_col, s.spacing_slice = w.spacing_slice;
        s.volume_mean = (float)plain.mean, s.volume_std = (float)moments_std(&plain);
        s.volume_mean_clipped = (float)clipped.mean, s.volume_std_clipped = (float)moments_std(&clipped);
    }
    free(pixels);
    free(values);
    free(keep);
    return kept;
}

static float volume_threshold(const Volume *v, int modality) {
    size_t count = (size_t)v->n[0] * v->n[1] * v->n[2], step = count / 4000003 + 1, n = 0;
    float *sample = (float *)xmalloc((count / step + 1) * sizeof *sample, "a threshold");
    for (size_t i = 0; i < count; i += step) sample[n++] = v->scale * v->pixels[i] + v->intercept;
    float threshold = anatomy_threshold(sample, n, modality);
    free(sample);
    return threshold;
}

// The plane across the longest voxel side where that is more than twice the shortest; else across an axis of fewer than 16
// voxels, which is a stack of slices; else axial.
static int native_plane(const Volume *v) {
    int longest = 0, shortest = 0, thinnest = 0;
    for (int a = 1; a < 3; a++) {
        if (v->spacing[a] > v->spacing[longest]) longest = a;
        if (v->spacing[a] < v->spacing[shortest]) shortest = a;
        if (v->n[a] < v->n[thinnest]) thinnest = a;
    }
    int uneven = v->spacing[longest] > 2 * v->spacing[shortest] && v->n[thinnest] > 1;  // a single slice has no spacing of its own
    int across = uneven ? v->axis[longest] : v->n[thinnest] < 16 ? v->axis[thinnest] : 2;
    return across == 2 ? PLANE_AXIAL : across == 1 ? PLANE_CORONAL : PLANE_SAGITTAL;
}

// A line on stderr for people, with the file's name; a row of the report, without it.
static void rejected(Output *out, const Input *in, uint64_t volume, uint64_t patient, const char *reason) {
    fprintf(stderr, "left out  %s: %s\n", in->path, reason);
    fprintf(out->report, "%d\t%016llx\t%016llx\trejected\t%s\t\t\t\t\t\t\t\t0\t0\t0\t\n", out->files, (unsigned long long)volume,
            (unsigned long long)patient, reason);
    out->named_bad |= in->named;
}

// Adds one volume. *v's pixels are freed. Returns whether it gave any slice.
static int pack_volume(Output *out, Labels *labels, Volume *v, const Input *in, uint64_t volume, uint64_t patient) {
    const Options *o = out->options;
    int modality = o->modality ? o->modality : v->low <= -500 ? MODALITY_CT : MODALITY_MR, no_body = 0, constant = 0, kept = 0;
    char planes[64] = "", orientation[4] = "";
    if (modality == MODALITY_CT && v->low > -500)
        volume_note(v, "no value at or below -500: a CT without air, or its intercept is missing");
    if (modality == MODALITY_CT && v->high < 100) volume_note(v, "no value above 100 HU: a CT without bone?");
    float threshold = volume_threshold(v, modality);
    ShardSlice s = {
        .volume_id = volume, .patient_id = patient, .scale = v->scale, .intercept = v->intercept, .modality = (uint8_t)modality};
    int native = native_plane(v), small = 1;
    for (int plane = 0; plane < PLANE_COUNT; plane++) {
        VolumeView w = volume_view(v, plane);
        if (o->planes != PLANES_ALL && plane != (o->planes == PLANES_NATIVE ? native : o->planes)) continue;
        if (w.rows < 16 || w.cols < 16) continue;
        small = 0;
        kept += pack_plane(out, labels, v, in, s, plane, threshold, &no_body, &constant);
        snprintf(planes + strlen(planes), sizeof planes - strlen(planes), "%s%s", *planes ? "," : "", plane_names[plane]);
    }
    for (int a = 0; a < 3; a++) orientation[a] = "LPSRAI"[v->axis[a] + 3 * v->flip[a]];
    free(v->pixels);
    if (!kept) {
        rejected(out, in, volume, patient, small ? "slices have fewer than 16 rows or columns" : "no slice with body in it");
        return 0;
    }
    fprintf(stderr,
            "taken     %s: %s %dx%dx%d, %.3gx%.3gx%.3g mm, %s, %g to %g; %s: %d slices, dropped %d without body, %d constant%s%s\n",
            in->path, modality_names[modality], v->n[0], v->n[1], v->n[2], v->spacing[0], v->spacing[1], v->spacing[2],
            orientation, v->low, v->high, planes, kept, no_body, constant, *v->notes ? "; note: " : "", v->notes);
    fprintf(out->report, "%d\t%016llx\t%016llx\ttaken\t\t%s\t%s\t%dx%dx%d\t%.4gx%.4gx%.4g\t%s\t%g\t%g\t%d\t%d\t%d\t%s\n",
            out->files, (unsigned long long)volume, (unsigned long long)patient, modality_names[modality], planes, v->n[0], v->n[1],
            v->n[2], v->spacing[0], v->spacing[1], v->spacing[2], orientation, v->low, v->high, kept, no_body, constant, v->notes);
    out->no_body += no_body;
    out->constant += constant;
    out->volumes[modality]++;
    output_patient(out, patient);
    return 1;
}

// Takes one NIfTI file: one volume of it, or with --4d all every one.
static void pack_nifti(Output *out, Labels *labels, Options *o, const Input *in) {
    char reason[512], key[4096];
    int64_t volumes = nifti_volumes(in->path, reason, sizeof reason);
    int known = patient_of(o, labels, in->name, key, sizeof key) == 0, taken = 0, images = 0;
    uint64_t patient = known ? siphash(o->salt, key, strlen(key)) : 0;
    int64_t first = o->fourd == FOURD_MID && volumes > 0 ? volumes / 2 : 0,
            last = o->fourd == FOURD_ALL && volumes > 0 ? volumes - 1 : first;
    for (int64_t i = first; i <= last; i++) {
        snprintf(key, sizeof key, "%s#%lld", in->same_name ? in->path : in->name, (long long)i);
        uint64_t volume = siphash(o->salt, key, strlen(key));
        Volume v = {0};
        int bad = volumes < 0 || nifti_read(in->path, i, &v, reason, sizeof reason);
        if (!bad && !known) snprintf(reason, sizeof reason, "the expression of --patient-from is not in its name");
        if (!bad && known && v.labels && !o->keep_labels) {
            snprintf(reason, sizeof reason, "label image, not a scan (--keep-labels takes it)");
            images++;
        }
        if (bad || !known || (v.labels && !o->keep_labels)) {
            free(v.pixels);
            rejected(out, in, volume, patient, reason);
            continue;
        }
        if (volumes > 1) volume_note(&v, "4-D: volume %lld of %lld", (long long)i + 1, (long long)volumes);
        taken += pack_volume(out, labels, &v, in, volume, patient);
    }
    out->accepted += taken > 0;
    out->rejected += taken == 0;
    out->label_images += taken == 0 && images > 0;
}

static void pack(Options *o, char **arguments, int n) {
    static const char *const later[] = {"", "", "DICOM", "NRRD", "MetaImage"};
    Inputs list = gather(arguments, n);
    Labels labels = o->labels ? labels_read(o->labels) : (Labels){0};
    for (int i = 0; i < list.n; i++) {
        list.at[i].kind = sniff(list.at[i].path);
        if (list.at[i].kind == KIND_NIFTI && !NIFTI_BUILT)
            fail(STATUS_FAILED,
                 "%s is NIfTI, and this prep was built without niftilib; "
                 "install it (apt-get install libnifti2-dev) and run make again",
                 list.at[i].path);
    }
    Output out = {.options = o, .class_names = labels.names};
    output_open(&out);
    if (!o->salt_file)
        fprintf(stderr, "ids are keyed with the public salt: give --salt-file before sharing these shards outside\n");
    for (int i = 0; i < list.n; i++) {
        const Input *in = &list.at[i];
        char reason[256];
        int kind = in->kind;
        out.files++;
        if (kind == KIND_NIFTI) pack_nifti(&out, &labels, o, in);
        else if (kind == KIND_OTHER && !in->named) out.other++;
        else {
            if (kind == KIND_MISSING) snprintf(reason, sizeof reason, "cannot be opened; see that it is there and readable");
            else if (kind == KIND_OTHER) snprintf(reason, sizeof reason, "not an image format that prep knows");
            else
                snprintf(reason, sizeof reason, "%s, which this prep cannot read yet; convert it to NIfTI (dcm2niix, or SimpleITK)",
                         later[kind]);
            out.later += kind > KIND_NIFTI && kind < KIND_MISSING;
            out.rejected += kind == KIND_OTHER || kind == KIND_MISSING;
            rejected(&out, in, 0, 0, reason);
        }
        free(in->path);
        free(in->name);
    }
    free(list.at);
    output_close(&out);
    int unused = 0;
    for (int i = 0; i < labels.n; i++) unused += !labels.rows[i].used;
    if (unused)
        warn("%d of %d rows of %s match no stored slice (first columns: file and slice, as --help says)", unused, labels.n,
             o->labels);
    fprintf(stderr, "%d files: %d taken, %d left out (%d label images), %d in a format that comes later, %d not images\n",
            out.files, out.accepted, out.rejected, out.label_images, out.later, out.other);
    fprintf(stderr,
            "%lld CT and %lld MR volumes of %d patients: %lld slices in %d shards; "
            "dropped %lld slices without body and %lld constant\n",
            (long long)out.volumes[MODALITY_CT], (long long)out.volumes[MODALITY_MR], out.n_patients, (long long)out.slices,
            out.shards, (long long)out.no_body, (long long)out.constant);
    if (out.n_patients == 1 && out.accepted > 20)
        warn("all %d files are of one patient by --patient-from; see --help if that is wrong", out.accepted);
    if (out.slices == 0) fail(STATUS_DATA, "no usable volume in %s%s; the lines above say why", arguments[0], n > 1 ? " ..." : "");
    if (out.named_bad)
        fail(STATUS_DATA, "a file named on the command line was left out, as said above; the others are in %s", o->out);
}

// ---------------------------------------------------------------------------------------------------------------- shards

// Paths of the shards among the arguments: files as they are, folders' *.shard.
static Inputs gather_shards(char **arguments, int n) {
    Inputs all = gather(arguments, n), list = {0};
    for (int i = 0; i < all.n; i++)
        if (all.at[i].named || ends_with(all.at[i].path, ".shard")) inputs_add(&list, all.at[i].path, all.at[i].name, 1);
    if (list.n == 0) fail(STATUS_DATA, "%s holds no *.shard", arguments[0]);
    return list;
}

static void verify(char **arguments, int n) {
    Inputs list = gather_shards(arguments, n);
    int bad = 0;
    for (int i = 0; i < list.n; i++) {
        char reason[256];
        int wrong = shard_check(list.at[i].path, reason, sizeof reason);
        bad += wrong != 0;
        if (wrong) fprintf(stderr, "%s %s\n", list.at[i].path, reason);
        else printf("%s\tgood\n", list.at[i].path);
    }
    if (bad) fail(STATUS_DATA, "%d of %d shards are bad; make them again with ./prep/prep", bad, list.n);
}

static void show_info(char **arguments, int n) {
    Inputs list = gather_shards(arguments, n);
    for (int f = 0; f < list.n; f++) {
        const char *path = list.at[f].path;
        Dataset *d = dataset_open(&path, 1);
        printf("# %s: version %d, %llu slices, %.1f MB, identity %016llx\n", path, SHARD_VERSION, (unsigned long long)d->count,
               d->shards[0].bytes / 1e6, (unsigned long long)dataset_identity(d));
        char *name;
        for (int c = 0; (name = dataset_class_name(d, c)); c++) {
            printf("# class %d: %s\n", c, name);
            free(name);
        }
        printf("volume\tpatient\tmodality\tplane\tslices\trows\tcols\t"
               "spacing_row\tspacing_col\tspacing_slice\tscale\tintercept\tmean\tstd\tlabel_first\tlabel_last\n");
        for (uint64_t i = 0, next; i < d->count; i = next) {
            const ShardSlice *s = dataset_slice(d, i, NULL, NULL), *last = s;
            for (next = i + 1; next < d->count; next++) {
                const ShardSlice *t = dataset_slice(d, next, NULL, NULL);
                if (t->volume_id != s->volume_id || t->plane != s->plane) break;
                last = t;
            }
            printf("%016llx\t%016llx\t%s\t%s\t%llu\t%d\t%d\t%.4g\t%.4g\t%.4g\t%g\t%g\t%.6g\t%.6g\t%d\t%d\n",
                   (unsigned long long)s->volume_id, (unsigned long long)s->patient_id, modality_names[s->modality],
                   plane_names[s->plane], (unsigned long long)(next - i), s->rows, s->cols, s->spacing_row, s->spacing_col,
                   s->spacing_slice, s->scale, s->intercept, s->volume_mean, s->volume_std, s->label, last->label);
        }
        dataset_close(d);
    }
}

static void make_phantom(const Options *o) {
    double start = seconds_now();
    phantom_make_sets(o->out, o->seed, o->patients);
    fprintf(stderr, "%d phantom patients in %s/train and %d others in %s/eval, %.1f s\n", o->patients, o->out, o->patients * 2 / 3,
            o->out, seconds_now() - start);
}

int main(int argc, char **argv) {
    signal(SIGXFSZ, SIG_IGN);    // a limit on file size is then an error of write, like a full disk
    Options o = parse_options(argc, argv);
    char **inputs = argv + optind;
    int n = argc - optind;
    if (o.mode == MODE_PHANTOM) make_phantom(&o);
    else if (o.mode == MODE_INFO) show_info(inputs, n);
    else if (o.mode == MODE_VERIFY) verify(inputs, n);
    else pack(&o, inputs, n);
    if (fflush(stdout)) fail(STATUS_FAILED, "cannot write to standard output: %s", strerror(errno));
    return STATUS_DONE;
}
