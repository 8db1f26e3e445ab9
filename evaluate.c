/*
evaluate: how good are an encoder's frozen features? Slices through the encoder once, then simple probes on the features,
trained on some patients and scored on others. It also writes the features for use elsewhere (--extract).

  ./evaluate --model DIR --data PATH [--data PATH]... [--protocol knn|linear] [--random-init] [--extract PREFIX]  (--help: the rest)

  Options, parse_options    the command line
  Study, study_read         the slices, their classes, and the split by patient
  encode_slices             features [n, F] of slices, in batches
  extract_*                 PREFIX.npy and PREFIX.tsv, both or neither
  score_features            rows of the result table

The result is TSV on stdout, one row per encoder and protocol; progress and remarks go to stderr. Each slice is seen whole,
resized to a square, clipped and z-scored as Curia's published processor does. Slices without a label are left out of the
probes. Half of the patients, by a hash keyed with the seed, train the probe, and no slice of theirs is in the test part.
*/
#include <getopt.h>

#include "curia/checkpoint.h"
#include "curia/device.h"
#include "curia/probe.h"
#include "curia/views.h"

enum { KNN_NEIGHBOURS = 20, ENCODE_BATCH = 16 };
static const double knn_temperature = 0.07;

// ---------------------------------------------------------------------------------------------------------------- command line

enum { PROTOCOL_KNN = 1, PROTOCOL_LINEAR = 2 };     // bits
enum { FEATURE_CLS, FEATURE_MEAN, FEATURE_BOTH };

typedef struct {
    const char *model, *extract;    // extract NULL: nothing is written
    const char **data;
    int n_data;
    int protocols, protocol_given;
    const char *feature_name;
    int feature;                    // FEATURE_*
    int norm;                       // NORMALIZE_VIEW or NORMALIZE_VOLUME
    const char *device;
    int clip_air;                   // 0, 1; -1: as the model's preprocessor_config.json says
    long long size;                 // pixels; 0: as the model says
    uint64_t seed;
    double test_share;
    int random_init;
} Options;

static const char help[] =
    "usage: ./evaluate --model DIR --data PATH [--data PATH]... [options]\n"
    "\n"
    "Scores frozen features of an encoder on the labels stored in shards; a row of TSV on stdout for each protocol.\n"
    "\n"
    "  --model DIR         a Hugging Face Dinov2 folder, a checkpoint step-NNNNNNNN, or a run's folder (its newest checkpoint)\n"
    "  --data PATH         a shard or a folder of shards; may be given again\n"
    "  --task NAME         label (the class stored with each slice) or all, which is the same today     [all]\n"
    "  --protocol NAME     knn: 20 nearest neighbours, cosine, weights exp(similarity / 0.07)\n"
    "                      linear: logistic regression on standardised features, C chosen on held-out\n"
    "                      training patients                                                            [both]\n"
    "  --feature NAME      cls, mean (of the patch tokens) or cls+mean                                  [cls]\n"
    "  --extract PREFIX    write features to PREFIX.npy, and what each row is to PREFIX.tsv\n"
    "  --random-init       also score the same architecture with random weights\n"
    "  --test-share X      share of the patients that are tested on, 0 to 1                             [0.5]\n"
    "  --seed N            of the split and of --random-init                                            [1]\n"
    "  --size PIXELS       side to which a slice is resized                                             [the model's]\n"
    "  --norm NAME         statistics of the z-score: slice (after resizing) or volume                  [slice]\n"
    "  --clip-air 0|1      clip at -1000 before the z-score                                             [the model's]\n"
    "  --device NAME       auto, cpu or cuda                                                            [auto]\n"
    "\n"
    "Exit status: 0 done, 1 failed while running, 2 wrong command line, 3 bad data.\n";

// `text` as a number from least to most, or the program ends with status 2.
static double parse_number(const char *option, const char *text, double least, double most, int whole) {
    char *end;
    double x = strtod(text, &end);
    if (end == text || *end || !(x >= least && x <= most) || (whole && x != floor(x)))
        fail(STATUS_USAGE, "--%s %s: expected %s from %.10g to %.10g", option, text, whole ? "an integer" : "a number",
             least, most);
    return x;
}

// The index of `text` among |-separated names, or the program ends with status 2.
static int parse_choice(const char *option, const char *text, const char *names) {
    int i = choice_index(names, text);
    if (i < 0) fail(STATUS_USAGE, "--%s %s: expected one of %s", option, text, names);
    return i;
}

static Options parse_options(int argc, char **argv) {
    static const struct option known[] = {
        {"model", required_argument, 0, 'm'}, {"data", required_argument, 0, 'd'}, {"task", required_argument, 0, 't'},
        {"protocol", required_argument, 0, 'p'}, {"feature", required_argument, 0, 'f'}, {"extract", required_argument, 0, 'e'},
        {"random-init", no_argument, 0, 'r'}, {"test-share", required_argument, 0, 'x'}, {"seed", required_argument, 0, 's'},
        {"size", required_argument, 0, 'z'}, {"norm", required_argument, 0, 'n'}, {"clip-air", required_argument, 0, 'c'},
        {"device", required_argument, 0, 'v'}, {"help", no_argument, 0, 'h'}, {0}};
    Options o = {.protocols = PROTOCOL_KNN | PROTOCOL_LINEAR, .feature_name = "cls", .norm = NORMALIZE_VIEW, .device = "auto", .clip_air = -1,
                 .seed = 1, .test_share = 0.5};
    o.data = xmalloc((size_t)argc * sizeof *o.data, "the command line");
    opterr = 0;
    for (int c; (c = getopt_long(argc, argv, ":", known, NULL)) != -1;) {
        switch (c) {
            case 'm': o.model = optarg; break;
            case 'd': o.data[o.n_data++] = optarg; break;
            case 't':
                if (choice_index("label|all", optarg) < 0)
                    fail(STATUS_USAGE, "--task %s: no such task; the shards hold one, named label (all means the same)", optarg);
                break;
            case 'p':
                if (!strcmp(optarg, "attention")) fail(STATUS_USAGE, "--protocol attention is not there yet; use knn or linear");
                o.protocols = 1 << parse_choice("protocol", optarg, "knn|linear");
                o.protocol_given = 1;
                break;
            case 'f':
                o.feature = parse_choice("feature", optarg, "cls|mean|cls+mean");
                o.feature_name = optarg;
                break;
            case 'e': o.extract = optarg; break;
            case 'r': o.random_init = 1; break;
            case 'x': o.test_share = parse_number("test-share", optarg, 0, 1, 0); break;
            case 's': o.seed = (uint64_t)parse_number("seed", optarg, 0, 0x1p53, 1); break;
            case 'z': o.size = (long long)parse_number("size", optarg, 8, 4096, 1); break;
            case 'n': o.norm = parse_choice("norm", optarg, "slice|volume") ? NORMALIZE_VOLUME : NORMALIZE_VIEW; break;
            case 'c': o.clip_air = parse_choice("clip-air", optarg, "0|1"); break;
            case 'v':
                parse_choice("device", optarg, "auto|cpu|cuda");
                o.device = optarg;
                break;
            case 'h': fputs(help, stdout); exit(STATUS_DONE);
            case ':': fail(STATUS_USAGE, "%s needs a value; --help lists the options", argv[optind - 1]);
            default: fail(STATUS_USAGE, "%s: unknown option; --help lists them", argv[optind - 1]);
        }
    }
    if (optind < argc) fail(STATUS_USAGE, "%s: not an option; shards go after --data, the model after --model", argv[optind]);
    if (!o.model) fail(STATUS_USAGE, "--model DIR is missing; --help shows the command line");
    if (!o.n_data) fail(STATUS_USAGE, "--data PATH is missing; --help shows the command line");
    return o;
}

// ---------------------------------------------------------------------------------------------------------------- data

typedef struct {
    size_t rows;                    // slices to encode: the labelled ones, or all with --extract
    uint64_t *index;                // [rows] in the dataset
    ShardSlice *slice;              // [rows]
    int *label;                     // [rows] class 0..classes-1, -1 without
    size_t *rank;                   // [rows] of the patient (patient_ranks), where labelled
    int classes, *class_label;      // [classes] the label stored in the shards, rising
    size_t labelled, patients_train, patients_test;
    size_t *train, n_train, *test, n_test;      // rows
    const char *unfit;              // why no probe can be scored, or NULL
} Study;

static int int_order(const void *a, const void *b) {
    return (*(const int *)a > *(const int *)b) - (*(const int *)a < *(const int *)b);
}

// Numbers the labels that occur 0..classes-1, and splits the labelled rows by patient.
static void study_split(Study *s, const Options *o) {
    uint64_t *patient = xmalloc(s->labelled * sizeof *patient, "the split");
    size_t *rank = xmalloc(s->labelled * sizeof *rank, "the split"), n = 0;
    s->class_label = xmalloc(s->labelled * sizeof *s->class_label, "the labels");
    for (size_t i = 0; i < s->rows; i++) {
        if (s->slice[i].label < 0) continue;
        s->class_label[n] = s->slice[i].label;
        patient[n++] = s->slice[i].patient_id;
    }
    qsort(s->class_label, n, sizeof *s->class_label, int_order);
    for (size_t i = 0; i < n; i++)
        if (i == 0 || s->class_label[i] != s->class_label[s->classes - 1]) s->class_label[s->classes++] = s->class_label[i];
    size_t patients = patient_ranks(patient, n, o->seed, rank);
    s->patients_test = (size_t)floor(o->test_share * (double)patients + 0.5);
    if (s->patients_test < 1) s->patients_test = 1;
    if (s->patients_test >= patients) s->patients_test = patients - 1;
    s->patients_train = patients - s->patients_test;
    s->train = xmalloc(n * sizeof *s->train, "the split");
    s->test = xmalloc(n * sizeof *s->test, "the split");
    for (size_t i = 0, j = 0; i < s->rows; i++) {
        if (s->slice[i].label < 0) continue;
        s->label[i] = (int)((int *)bsearch(&s->slice[i].label, s->class_label, (size_t)s->classes, sizeof(int), int_order) -
                            s->class_label);
        s->rank[i] = rank[j++];
        if (s->rank[i] < s->patients_train) s->train[s->n_train++] = i;
        else s->test[s->n_test++] = i;
    }
    free(patient);
    free(rank);
    if (patients < 2) s->unfit = "all labelled slices are of one patient, and a split by patient needs two";
    else if (s->classes < 2) s->unfit = "all labelled slices are of one class, and there is nothing to tell apart";
}

// Says which classes one part of the split lacks, since a score then means less than it seems to.
static void study_warn_missing(const Study *s, Dataset *d, const size_t *rows, size_t n, const char *part, const char *effect) {
    int missing = 0, first = -1;
    for (int k = s->classes - 1; k >= 0; k--) {
        size_t i = 0;
        while (i < n && s->label[rows[i]] != k) i++;
        if (i < n) continue;
        missing++;
        first = k;
    }
    if (!missing) return;
    char *name = dataset_class_name(d, s->class_label[first]);
    warn("%d of %d classes have no slice in the %s part (the first is %d%s%s): %s; more patients or another --seed may help",
         missing, s->classes, part, s->class_label[first], name ? " " : "", name ? name : "", effect);
    free(name);
}

// Reads the records of the slices to encode, and plans the split.
static Study study_read(Dataset *d, const Options *o) {
    Study s = {0};
    uint64_t count = dataset_count(d);
    s.index = xmalloc(count * sizeof *s.index, "the list of slices");
    s.slice = xmalloc(count * sizeof *s.slice, "the list of slices");
    for (uint64_t i = 0; i < count; i++) {
        const ShardSlice *slice = dataset_slice(d, i, NULL, NULL);
        s.labelled += slice->label >= 0;
        if (slice->label < 0 && !o->extract) continue;
        s.index[s.rows] = i;
        s.slice[s.rows++] = *slice;
    }
    fprintf(stderr, "%llu slices, %zu with a label, %llu without%s\n", (unsigned long long)count, s.labelled,
            (unsigned long long)count - s.labelled, s.labelled < count ? " (left out of the probes)" : "");
    s.label = xmalloc(s.rows * sizeof *s.label, "the labels");
    s.rank = xmalloc(s.rows * sizeof *s.rank, "the split");
    for (size_t i = 0; i < s.rows; i++) s.label[i] = -1;
    if (s.labelled) study_split(&s, o);
    else s.unfit = "no slice has a label";
    if (s.unfit) return s;
    study_warn_missing(&s, d, s.train, s.n_train, "training", "they cannot be predicted");
    study_warn_missing(&s, d, s.test, s.n_test, "test", "balanced accuracy and AUROC leave them out");
    return s;
}

// ---------------------------------------------------------------------------------------------------------------- features

static void show_progress(size_t done, size_t total, double start) {
    static double shown;
    double now = seconds_now();
    if (shown < start) shown = start;
    int terminal = isatty(2);
    if (done < total && now - shown < (terminal ? 0.2 : 5)) return;
    shown = now;
    double rate = (double)done / (now - start);
    fprintf(stderr, "%sencoded %zu/%zu slices, %.1f slices/s, %.0f s left%s", terminal ? "\r\033[K" : "", done, total, rate,
            (double)(total - done) / rate, terminal && done < total ? "" : "\n");
}

// Width F of a feature.
static size_t feature_width(const Config *c, const Options *o) {
    return (size_t)c->model_dim * (o->feature == FEATURE_BOTH ? 2 : 1);
}

// Features [rows, F] of the study's slices: of the final-norm tokens, CLS, the mean of the patches, or CLS then that mean.
// Every slice's checksum is verified (status 3). Freed by the caller.
static float *encode_slices(const Backend *be, Model *m, const Config *c, Dataset *d, const Study *s, const Options *o) {
    size_t D = (size_t)c->model_dim, width = feature_width(c, o), grid = (size_t)(c->crops_global_size / c->model_patch);
    size_t prefix = 1 + (size_t)c->model_registers, tokens = prefix + grid * grid;
    float *features = xmalloc(s->rows * width * sizeof *features, "the features");
    float *token = xmalloc(ENCODE_BATCH * tokens * D * sizeof *token, "the tokens of a batch");
    Slice slices[ENCODE_BATCH];
    View views[ENCODE_BATCH];
    double start = seconds_now();
    for (size_t first = 0; first < s->rows; first += ENCODE_BATCH) {
        int n = s->rows - first < ENCODE_BATCH ? (int)(s->rows - first) : ENCODE_BATCH;
        for (int i = 0; i < n; i++) {
            const ShardSlice *x = &s->slice[first + (size_t)i];
            views[i] = (View){.sample = i, .height = x->rows, .width = x->cols, .gamma = 1, .contrast = 1};
            dataset_verify_slice(d, s->index[first + (size_t)i]);
            const int16_t *pixels;
            dataset_slice(d, s->index[first + (size_t)i], &pixels, NULL);
            slices[i] = slice_of(c, x, pixels);
        }
        Batch batch = {.samples = n, .globals = n, .global_size = (int)c->crops_global_size, .slices = slices, .views = views};
        be->encode(m, &batch, token);
        for (int i = 0; i < n; i++) {
            const float *cls = token + (size_t)i * tokens * D, *patch = cls + prefix * D;
            float *out = features + (first + (size_t)i) * width;
            if (o->feature != FEATURE_MEAN) memcpy(out, cls, D * sizeof *out);
            for (size_t j = 0; j < D && o->feature != FEATURE_CLS; j++) {
                double sum = 0;
                for (size_t t = 0; t < grid * grid; t++) sum += patch[t * D + j];
                out[width - D + j] = (float)(sum / (double)(grid * grid));
            }
            for (size_t j = 0; j < width; j++)
                if (!isfinite(out[j]))
                    fail(STATUS_FAILED, "%s: slice %llu of the data gives a feature that is not a number; the weights are broken",
                         o->model, (unsigned long long)s->index[first + (size_t)i]);
        }
        show_progress(first + (size_t)n, s->rows, start);
    }
    free(token);
    return features;
}

// ---------------------------------------------------------------------------------------------------------------- extract

enum { EXTRACT_NPY, EXTRACT_TSV, EXTRACT_FILES };
static struct { char *path, *partial; FILE *file; } extract[EXTRACT_FILES];

// a then b as a new string.
static char *joined(const char *a, const char *b) {
    char *both = xmalloc(strlen(a) + strlen(b) + 1, "a path");
    strcpy(both, a);
    return strcat(both, b);
}

// However the program ends, what was not finished goes.
static void extract_discard(void) {
    for (int i = 0; i < EXTRACT_FILES; i++) if (extract[i].file) unlink(extract[i].partial);
}

// Opens both files under temporary names, before the encoder runs: a folder that cannot be written is known at once.
static void extract_open(const char *prefix) {
    atexit(extract_discard);
    for (int i = 0; i < EXTRACT_FILES; i++) {
        extract[i].path = joined(prefix, i == EXTRACT_NPY ? ".npy" : ".tsv");
        extract[i].partial = joined(extract[i].path, ".partial");
        extract[i].file = file_create(extract[i].partial);
    }
}

// Text as one TSV field: control characters become spaces.
static void print_field(FILE *f, const char *text) {
    for (; *text; text++) fputc((unsigned char)*text < ' ' ? ' ' : *text, f);
}

// Writes features [rows, width] and what each row is, makes both durable, and gives them their names.
static void extract_write(Dataset *d, const Study *s, const float *features, size_t width) {
    static const char *const modality[MODALITY_COUNT] = {"unknown", "CT", "MR"},
                             *const plane[PLANE_COUNT] = {"axial", "coronal", "sagittal"};
    npy_write(extract[EXTRACT_NPY].file, extract[EXTRACT_NPY].partial, features, s->rows, width);
    char **name = xmalloc(((size_t)s->classes + 1) * sizeof *name, "the class names");
    for (int k = 0; k < s->classes; k++) name[k] = dataset_class_name(d, s->class_label[k]);
    FILE *f = extract[EXTRACT_TSV].file;
    fputs("row\tvolume\tpatient\tslice\tmodality\tplane\tlabel\tclass\n", f);
    for (size_t i = 0; i < s->rows; i++) {
        const ShardSlice *x = &s->slice[i];
        fprintf(f, "%zu\t%016llx\t%016llx\t%d\t%s\t%s\t%d\t", i, (unsigned long long)x->volume_id,
                (unsigned long long)x->patient_id, x->slice_number, modality[x->modality], plane[x->plane], x->label);
        if (s->label[i] >= 0 && name[s->label[i]]) print_field(f, name[s->label[i]]);
        fputc('\n', f);
    }
    for (int k = 0; k < s->classes; k++) free(name[k]);
    free(name);
    for (int i = 0; i < EXTRACT_FILES; i++) file_close(extract[i].file, extract[i].partial);
    for (int i = 0; i < EXTRACT_FILES; i++) {
        if (rename(extract[i].partial, extract[i].path))
            fail(STATUS_FAILED, "%s: cannot be given its name: %s", extract[i].path, strerror(errno));
        extract[i].file = NULL;
    }
    fprintf(stderr, "wrote %s [%zu, %zu] and %s\n", extract[EXTRACT_NPY].path, s->rows, width, extract[EXTRACT_TSV].path);
}

// ---------------------------------------------------------------------------------------------------------------- results

static const char *const columns =
    "model\tdata\ttask\tprotocol\tfeature\tnorm\tclip_air\tn_train\tn_test\tpatients_train\tpatients_test\tclasses\tmajority\t"
    "accuracy\tbalanced_accuracy\tmacro_auroc\tauroc_classes\tsize\tseed\tsetting\n";

// Prints a row for each protocol asked for: features [rows, F] of the encoder called `model`. majority is the accuracy of always
// saying the training part's most frequent class; auroc_classes the number of classes that macro_auroc is the mean of.
static void score_features(const char *model, const Study *s, const Config *c, const Options *o, const float *features) {
    size_t width = feature_width(c, o), n = s->n_test;
    double *scores = xmalloc(n * (size_t)s->classes * sizeof *scores, "the scores");
    int *truth = xmalloc(n * sizeof *truth, "the labels"), *predicted = xmalloc(n * sizeof *predicted, "the predictions");
    int *seen = xmalloc(s->n_train * sizeof *seen, "the labels");
    for (size_t i = 0; i < s->n_train; i++) seen[i] = s->label[s->train[i]];
    for (size_t i = 0; i < n; i++) truth[i] = s->label[s->test[i]];
    int usual = majority_class(seen, s->n_train, s->classes);
    for (size_t i = 0; i < n; i++) predicted[i] = usual;
    double majority = accuracy(predicted, truth, n);
    for (int protocol = PROTOCOL_KNN; protocol <= PROTOCOL_LINEAR; protocol <<= 1) {
        if (!(o->protocols & protocol)) continue;
        char setting[128];
        if (protocol == PROTOCOL_KNN) {
            knn_scores(features, width, s->train, s->n_train, s->test, n, s->label, s->classes, KNN_NEIGHBOURS,
                       knn_temperature, scores);
            snprintf(setting, sizeof setting, "k=%d temperature=%g", KNN_NEIGHBOURS, knn_temperature);
        } else {
            LinearProbe probe = linear_probe(features, width, s->train, s->n_train, s->test, n, s->label, s->rank,
                                             s->patients_train, s->classes, scores);
            snprintf(setting, sizeof setting, "C=%g validation=%.4f iterations=%d", probe.C, probe.validation,
                     probe.fit.iterations);
            if (!probe.fit.converged)
                warn("the linear probe stopped at %.2g above its least loss (aim: 1e-9) after %d iterations", probe.fit.gap,
                     probe.fit.iterations);
        }
        argmax_rows(scores, n, s->classes, predicted);
        int used;
        double area = macro_auroc(scores, truth, n, s->classes, &used);
        print_field(stdout, model);
        fputc('\t', stdout);
        for (int i = 0; i < o->n_data; i++) {
            if (i) fputc(',', stdout);
            print_field(stdout, o->data[i]);
        }
        printf("\tlabel\t%s\t%s\t%s\t%d\t%zu\t%zu\t%zu\t%zu\t%d\t%.6f\t%.6f\t%.6f\t%.6f\t%d\t%lld\t%llu\t%s\n",
               protocol == PROTOCOL_KNN ? "knn" : "linear", o->feature_name, o->norm == NORMALIZE_VOLUME ? "volume" : "slice",
               c->data_clip_below_air, s->n_train, n, s->patients_train, s->patients_test, s->classes, majority,
               accuracy(predicted, truth, n), balanced_accuracy(predicted, truth, n, s->classes), area, used, c->crops_global_size,
               (unsigned long long)o->seed, setting);
        fflush(stdout);
    }
    free(scores);
    free(truth);
    free(predicted);
    free(seen);
}

int main(int argc, char **argv) {
    Options o = parse_options(argc, argv);
    char folder[PATH_SIZE];
    checkpoint_teacher(o.model, folder);
    Config c = config_default();
    hf_read_config(folder, &c);
    if (o.size) c.crops_global_size = o.size;
    if (c.crops_global_size % c.model_patch)
        fail(STATUS_USAGE, "--size %lld: expected a multiple of the model's patch, %lld pixels", c.crops_global_size,
             c.model_patch);
    c.data_normalize = o.norm;
    if (o.clip_air >= 0) c.data_clip_below_air = o.clip_air;
    c.crops_local_size = c.model_patch;             // there are no local crops: any size that config_validate takes
    c.crops_local_count = 0;
    config_validate(&c, folder);
    const char *why;
    const Backend *be = device_choose(o.device, &c, &why);

    Dataset *d = dataset_open(o.data, o.n_data);
    Study s = study_read(d, &o);
    if (s.unfit && (!o.extract || o.protocol_given))
        fail(STATUS_DATA, "%s: %s; give shards with labels of more patients", o.data[0], s.unfit);
    if (s.unfit) fprintf(stderr, "no scores, features alone: %s\n", s.unfit);
    if (o.extract) extract_open(o.extract);

    TensorTable t = tensors_build(&c, 0);
    Model *m = be->create(&c, &t, 0);
    hf_read_weights(be, m, &t, folder, "teacher.");
    fprintf(stderr, "%s on %s (%s): %lld pixels, %lld blocks of width %lld\n", folder, be->name, why, c.crops_global_size,
            c.model_depth, c.model_dim);
    float *features = encode_slices(be, m, &c, d, &s, &o);
    if (o.extract) extract_write(d, &s, features, feature_width(&c, &o));
    if (!s.unfit) {
        fputs(columns, stdout);
        score_features(o.model, &s, &c, &o, features);
    }
    free(features);
    if (o.random_init && !s.unfit) {
        for (int i = 0; i < t.count; i++) {
            char name[128];
            snprintf(name, sizeof name, "teacher.%s", t.tensors[i].name);
            float *value = xmalloc(t.tensors[i].size * sizeof *value, "random weights");
            tensor_init(&t, i, o.seed, value);
            be->write(m, name, DTYPE_F32, value);
            free(value);
        }
        features = encode_slices(be, m, &c, d, &s, &o);
        score_features("random-init", &s, &c, &o, features);
        free(features);
    }
    be->destroy(m);
    dataset_close(d);
    if (ferror(stdout) || fflush(stdout)) fail(STATUS_FAILED, "the results cannot be written to stdout: %s", strerror(errno));
    return STATUS_DONE;
}
