/*
prep: scans in, shards out. Also makes the phantom, shows, verifies and merges shards.

  make prep/prep        with what it finds: GDCM for DICOM; niftilib, zlib and ISA-L for the other formats; libpng for previews

  Options, parse_options   the command line
  pack                     all inputs to shards: walk, scan, sort, then series by series in workers
  show_info, verify        --info and --verify
  make_phantom             --phantom
*/
#define _GNU_SOURCE
#include <getopt.h>
#include <sys/sysinfo.h>

#include "phantom.h"
#include "merge.h"

static const char help[] =
    "usage: ./prep/prep -o DIR [options] INPUT...      scans to shards; INPUT is a file, or a folder walked to its end\n"
    "       ./prep/prep --dry-run [options] INPUT...   what would become of them, as TSV on stdout; writes nothing\n"
    "       ./prep/prep --merge -o DIR SET...          sets of shards to one; volumes that two sets hold are kept once\n"
    "       ./prep/prep -o DIR --phantom [--seed N] [--patients N]\n"
    "       ./prep/prep --info SHARD...                what is in shards (files or folders), as TSV on stdout\n"
    "       ./prep/prep --verify SHARD...              every checksum; exit status 3 where one differs\n"
    "\n"
    "Reads DICOM, NIfTI (.nii, .nii.gz, .hdr/.img), NRRD and MetaImage, told by content and not by name. Slices keep their\n"
    "resolution and values (HU for CT), in Curia's orientation; those without body (fewer than 1 %% of the pixels above -500 HU,\n"
    "or above an MR volume's noise) and constant ones are dropped and counted. Killed and called again, it goes on where it was.\n"
    "\n"
    "  -o, --out DIR            where the shards, report.tsv, summary.json and preview.png go\n"
    "      --modality ct|mr|auto  auto (default): what the DICOM, the sidecar (dcm2niix), dataset.json (nnU-Net) or the BIDS\n"
    "                           folder says; else CT where the lowest value is -500 or below, and MR\n"
    "      --planes native|axial|coronal|sagittal|all   native (default): across the longest voxel side where voxels are more\n"
    "                           than twice as long as wide, else across an axis of fewer than 16 voxels, else axial\n"
    "      --track 2d|3d        3d keeps every slice, so that volumes are whole (default 2d)\n"
    "      --4d first|mid|all   which volumes of a 4-D file or series (default first)\n"
    "      --keep LIST          take what is left out by default, for these reasons, with commas between; all: every one of\n"
    "                           %s\n"
    "      --labels FILE        CSV or TSV with a header: file (name below INPUT, base name, or folder) or series (UID); slice\n"
    "                           (optional, from 0 to superior, posterior or left), label (class name, or integer), target\n"
    "                           (number), patient, mask (label image, relative to FILE's folder). labels*/ beside images*/\n"
    "                           (nnU-Net, Medical Segmentation Decathlon) are masks without a table\n"
    "      --patient-from auto|folder|file|regex:RE   who a file is of. auto (default): the PatientID of a DICOM, else its\n"
    "                           study, else as folder; folder: the sub-* folder of a BIDS tree, else the folder the file is in\n"
    "                           (for images*/ and labels*/, and where there is none, the file's name without _0000.nii.gz);\n"
    "                           file: its name; regex: the first group of RE in the name below INPUT\n"
    "      --split patient:A/B[/C]   patients to DIR/train, DIR/val and DIR/test by a keyed hash, in these shares\n"
    "      --salt-file FILE     key of the patient and volume ids; without it the key is public, and whoever guesses a name\n"
    "                           or number can find its id\n"
    "      --private-map        also write private_map.tsv (mode 0600): which file each volume came from\n"
    "      --preview            a tile for every volume in preview.png, preview-2.png ...; default: one sheet\n"
    "      --shard-size MB      start a new shard beyond this (default 512)\n"
    "      --shard-of I/N       take the Ith (from 0) of N shares of the inputs, by a hash of their names; merge the N later\n"
    "      --list FILE          INPUTs, one a line; for a tree that many nodes share, listed once\n"
    "      --jobs N             worker processes (default: as many as processors)\n"
    "      --memory-limit MB    what a worker may allocate (default 8192)\n"
    "      --time-limit S       how long a worker may be at one file (default 300)\n"
    "      --max-failed PERCENT end with status 3 where more of the files than this could not be read (default 50)\n"
    "      --seed N             of the phantom (default 1)\n"
    "      --patients N         of the phantom: N in DIR/train and 2N/3 in DIR/eval (default 150)\n"
    "  -h, --help\n"
    "\n"
    "Exit status: 0 done; 1 failed while running; 2 command line; 3 nothing usable, or an INPUT named as a file was not usable.\n";

enum { MODE_PACK, MODE_PHANTOM, MODE_INFO, MODE_VERIFY, MODE_MERGE };

typedef struct { int mode, patients; uint64_t seed; Options pack; } Command;

// The names that --keep takes.
static const char *keep_names(void) {
    static char names[512];
    for (int i = 1; i < REASON_COUNT; i++)
        if (reason_overruled[i])
            snprintf(names + strlen(names), sizeof names - strlen(names), "%s%s", *names ? "," : "", reason_names[i]);
    return names;
}

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

static void parse_keep(Options *o, const char *list) {
    char word[64];
    for (const char *at = list; *at; at += strcspn(at, ","), at += *at == ',') {
        snprintf(word, sizeof word, "%.*s", (int)strcspn(at, ","), at);
        int known = 0, all = !strcmp(word, "all");
        for (int i = 1; i < REASON_COUNT; i++)
            if (reason_overruled[i] && (all || !strcmp(word, reason_names[i]))) o->keep[i] = 1, known = 1;
        if (!known) fail(STATUS_USAGE, "--keep %s: give all, or some of %s", list, keep_names());
    }
}

static void parse_split(Options *o, const char *text) {
    const char *at = text;
    double sum = 0;
    if (!strncmp(at, "patient:", 8)) {
        for (at += 8; o->parts < MOST_PARTS; at++) {
            char *end;
            double share = strtod(at, &end);
            if (end == at || !(share >= 0)) break;
            sum += o->share[o->parts++] = share;
            at = end;
            if (*at != '/') break;
        }
    }
    if (o->parts < 2 || *at || !(fabs(sum - 1) < 1e-6))
        fail(STATUS_USAGE, "--split %s: give patient: and two or three shares that sum to 1, as in patient:0.98/0.02", text);
}

static void parse_share(Options *o, const char *text) {
    unsigned long long i, n;
    char more;
    if (sscanf(text, "%llu/%llu%c", &i, &n, &more) != 2 || strchr(text, '-') || n < 1 || n > 1000000 || i >= n)
        fail(STATUS_USAGE, "--shard-of %s: give I/N with I from 0 to N-1", text);
    o->share_of = i, o->shares = n;
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

static Command parse_options(int argc, char **argv) {
    enum {
        OPTION_MODALITY = 256, OPTION_PLANES, OPTION_TRACK, OPTION_4D, OPTION_KEEP, OPTION_LABELS, OPTION_PATIENT, OPTION_SPLIT,
        OPTION_SALT, OPTION_MAP, OPTION_PREVIEW, OPTION_SIZE, OPTION_SHARE, OPTION_LIST, OPTION_JOBS, OPTION_MEMORY, OPTION_TIME,
        OPTION_FAILED, OPTION_DRY, OPTION_PHANTOM, OPTION_SEED, OPTION_PATIENTS, OPTION_INFO, OPTION_VERIFY, OPTION_MERGE
    };
    static const struct option table[] = {
        {"out", 1, 0, 'o'}, {"help", 0, 0, 'h'}, {"modality", 1, 0, OPTION_MODALITY}, {"planes", 1, 0, OPTION_PLANES},
        {"track", 1, 0, OPTION_TRACK}, {"4d", 1, 0, OPTION_4D}, {"keep", 1, 0, OPTION_KEEP}, {"labels", 1, 0, OPTION_LABELS},
        {"patient-from", 1, 0, OPTION_PATIENT}, {"split", 1, 0, OPTION_SPLIT}, {"salt-file", 1, 0, OPTION_SALT},
        {"private-map", 0, 0, OPTION_MAP}, {"preview", 0, 0, OPTION_PREVIEW}, {"shard-size", 1, 0, OPTION_SIZE},
        {"shard-of", 1, 0, OPTION_SHARE}, {"list", 1, 0, OPTION_LIST}, {"jobs", 1, 0, OPTION_JOBS},
        {"memory-limit", 1, 0, OPTION_MEMORY},
        {"time-limit", 1, 0, OPTION_TIME}, {"max-failed", 1, 0, OPTION_FAILED}, {"dry-run", 0, 0, OPTION_DRY},
        {"phantom", 0, 0, OPTION_PHANTOM}, {"seed", 1, 0, OPTION_SEED}, {"patients", 1, 0, OPTION_PATIENTS},
        {"info", 0, 0, OPTION_INFO}, {"verify", 0, 0, OPTION_VERIFY}, {"merge", 0, 0, OPTION_MERGE}, {0}};
    static const char *const modalities[] = {"auto", "ct", "mr"}, *const tracks[] = {"2d", "3d"},
                             *const planes[] = {"axial", "coronal", "sagittal", "native", "all"},
                             *const fourd[] = {"first", "mid", "all"};
    Command c = {.seed = PHANTOM_SEED, .patients = PHANTOM_PATIENTS,
                 .pack = {.planes = PLANES_NATIVE, .shard_bytes = (uint64_t)512 << 20, .jobs = get_nprocs(), .time_limit = 300,
                          .memory_limit = (uint64_t)8192 << 20, .most_failed = 50, .preview = 1, .shares = 1,
                          .salt = {0x63757269612e6331, 0x7075626c69632073}}};
    Options *o = &c.pack;
    opterr = 0;
    for (int k; (k = getopt_long(argc, argv, "o:h", table, NULL)) != -1;) {
        switch (k) {
            case 'o': o->out = optarg; break;
            case 'h': printf(help, keep_names()); exit(STATUS_DONE);
            case OPTION_MODALITY: o->modality = parse_word("modality", optarg, modalities, 3); break;
            case OPTION_PLANES: o->planes = parse_word("planes", optarg, planes, 5); break;
            case OPTION_TRACK: o->whole_volumes = parse_word("track", optarg, tracks, 2); break;
            case OPTION_4D: o->fourd = parse_word("4d", optarg, fourd, 3); break;
            case OPTION_KEEP: parse_keep(o, optarg); break;
            case OPTION_LABELS: o->labels = optarg; break;
            case OPTION_SPLIT: parse_split(o, optarg); break;
            case OPTION_SALT: o->salt_file = optarg; break;
            case OPTION_MAP: o->private_map = 1; break;
            case OPTION_PREVIEW: o->preview = INT_MAX; break;
            case OPTION_SIZE: o->shard_bytes = parse_number("shard-size", optarg, 1, 1 << 20) << 20; break;
            case OPTION_SHARE: parse_share(o, optarg); break;
            case OPTION_LIST: o->list = optarg; break;
            case OPTION_JOBS: o->jobs = (int)parse_number("jobs", optarg, 1, 1024); break;
            case OPTION_MEMORY: o->memory_limit = parse_number("memory-limit", optarg, 64, 1 << 24) << 20; break;
            case OPTION_TIME: o->time_limit = (double)parse_number("time-limit", optarg, 1, 1000000); break;
            case OPTION_FAILED: o->most_failed = (double)parse_number("max-failed", optarg, 0, 100); break;
            case OPTION_DRY: o->dry_run = 1; break;
            case OPTION_PHANTOM: c.mode = MODE_PHANTOM; break;
            case OPTION_SEED: c.seed = parse_number("seed", optarg, 0, UINT64_MAX); break;
            case OPTION_PATIENTS: c.patients = (int)parse_number("patients", optarg, 2, 1000000); break;
            case OPTION_INFO: c.mode = MODE_INFO; break;
            case OPTION_VERIFY: c.mode = MODE_VERIFY; break;
            case OPTION_MERGE: c.mode = MODE_MERGE; break;
            case OPTION_PATIENT:
                o->patient.from = !strcmp(optarg, "auto")     ? PATIENT_AUTO
                                  : !strcmp(optarg, "folder") ? PATIENT_FOLDER
                                  : !strcmp(optarg, "file")   ? PATIENT_FILE
                                                              : PATIENT_REGEX;
                if (o->patient.from == PATIENT_REGEX &&
                    (strncmp(optarg, "regex:", 6) || regcomp(&o->patient.regex, optarg + 6, REG_EXTENDED)))
                    fail(STATUS_USAGE, "--patient-from %s: give auto, folder, file, or regex: and a POSIX extended regular "
                                       "expression", optarg);
                break;
            default: fail(STATUS_USAGE, "%s: no such option, or its value is missing; see ./prep/prep --help", argv[optind - 1]);
        }
    }
    int inputs = argc - optind, writes = c.mode == MODE_MERGE || c.mode == MODE_PHANTOM || (c.mode == MODE_PACK && !o->dry_run);
    if (c.mode == MODE_PHANTOM ? inputs > 0 : inputs == 0 && !(c.mode == MODE_PACK && o->list))
        fail(STATUS_USAGE, c.mode == MODE_PHANTOM ? "--phantom takes no INPUT" : "no INPUT; see ./prep/prep --help");
    if (writes && !o->out) fail(STATUS_USAGE, "no -o DIR to write to; see ./prep/prep --help");
    if (o->salt_file) read_salt(o);
    return c;
}

// ------------------------------------------------------------------------------------------------------------------- pack

// What the calls of the pool work on: `todo` lists the series that are not done yet.
typedef struct { Prep *prep; Output *output; uint64_t *todo, tasks; double start, shown; const char *doing; } Job;

static void scan_work(void *context, Pool *pool, int64_t task, PoolResult *result) {
    scan_batch(((Job *)context)->prep, pool, task, result);
}

static void scan_take(void *context, int64_t task, const uint8_t *result, size_t bytes) {
    Index *x = &((Job *)context)->prep->index;
    (void)task;
    if (bytes) mapped_add(&x->records, result, bytes);
    x->n_records += bytes / sizeof(Record);
}

static void pack_work(void *context, Pool *pool, int64_t task, PoolResult *result) {
    Job *job = (Job *)context;
    pack_series(job->prep, pool, (int64_t)job->todo[task], result);
}

static void pack_take(void *context, int64_t task, const uint8_t *result, size_t bytes) {
    Job *job = (Job *)context;
    (void)bytes;
    output_take(job->output, job->todo[task], result);
}

// A file's worker died: the file is marked, so that the task goes on without it.
static void pack_died(void *context, int64_t task, int64_t item, int kind, const char *why) {
    static const uint8_t reasons[] = {[POOL_CRASHED] = REASON_CRASHED, [POOL_LATE] = REASON_LATE, [POOL_MEMORY] = REASON_MEMORY};
    Index *x = &((Job *)context)->prep->index;
    (void)task;
    index_file(x, (uint64_t)item)->reason = reasons[kind];
    warn("%s: %s", index_path(x, (uint64_t)item), why);
}

// A live line on a terminal, a plain one every ten seconds elsewhere.
static void pack_tick(void *context, int64_t taken) {
    Job *job = (Job *)context;
    double now = seconds_now();
    int live = isatty(2);
    if (now - job->shown < (live ? 0.2 : 10)) return;
    job->shown = now;
    fprintf(stderr, "%s%s %lld of %llu, %.0f s", live ? "\r\033[K" : "", job->doing, (long long)taken, (unsigned long long)job->tasks,
            now - job->start);
    if (job->output) fprintf(stderr, ", %llu slices", (unsigned long long)job->output->taken_slices);
    fputs(live ? "" : "\n", stderr);
}

static void pack(const Options *o, char **arguments, int n) {
    Prep prep = {.options = o, .index = index_open(o->share_of, o->shares)};
    Job job = {.prep = &prep, .start = seconds_now(), .shown = seconds_now(), .doing = "batches of files looked at:"};
    double decoding[2], working[2];
    uint64_t peak[2];
    if (o->labels) prep.labels = labels_read(o->labels);
    for (int i = 0; i < n; i++) index_walk(&prep.index, arguments[i], 0, 1, NULL);
    if (o->list) index_list(&prep.index, o->list);
    Pool pool = pool_open(o->jobs, o->time_limit, o->memory_limit);
    job.tasks = (prep.index.n_files + BATCH_FILES - 1) / BATCH_FILES;
    pool_run(&pool, (int64_t)job.tasks, &(PoolCalls){&job, scan_work, scan_take, pack_died, pack_tick});
    pool_close(&pool, &decoding[0], &working[0], &peak[0]);
    index_sort(&prep.index, o->keep);
    Output *output = job.output = output_open(&prep);
    if (output->complete) {
        fprintf(stderr, "%s is complete: these inputs and options made it; nothing to do\n", o->out);
        return;
    }
    if (!o->salt_file && !o->dry_run)
        fprintf(stderr, "ids are keyed with the public salt: give --salt-file before sharing these shards outside\n");
    if (o->dry_run) printf(ROW_COLUMNS "\tfile\n");
    job.todo = (uint64_t *)xmalloc((prep.index.n_series + 1) * sizeof *job.todo, "the series");
    job.tasks = 0;
    job.doing = "series done:";
    for (uint64_t i = 0; i < prep.index.n_series; i++)
        if (!output_done(output, i)) job.todo[job.tasks++] = i;
    pool = pool_open(o->jobs, o->time_limit, o->memory_limit);
    pool_run(&pool, (int64_t)job.tasks, &(PoolCalls){&job, pack_work, pack_take, pack_died, pack_tick});
    pool_close(&pool, &decoding[1], &working[1], &peak[1]);
    double ending = seconds_now();
    Totals t = output_close(output);
    unsigned long long rejected = 0, slices = t.slices[0] + t.slices[1] + t.slices[2], other = 0;
    int shards = 0, unused = o->labels ? labels_unused(&prep.labels) : 0, first = 1;
    for (int i = 1; i < REASON_COUNT; i++) rejected += t.reasons[i];
    for (uint64_t i = 0; i < prep.index.n_files; i++) other += index_file(&prep.index, i)->kind == KIND_OTHER;
    for (int i = 0; i < part_count(o); i++) shards += output->parts[i].shards;
    if (unused)
        warn("%d of %d rows of %s match no stored slice (file or series, and slice, as --help says)", unused, prep.labels.n, o->labels);
    fprintf(stderr, "%s%llu files, %llu of them not images: %llu volumes taken, %llu left out", isatty(2) ? "\r\033[K" : "",
            (unsigned long long)prep.index.n_files, other, t.taken, rejected);
    for (int i = 1; i < REASON_COUNT; i++)
        if (t.reasons[i]) fprintf(stderr, "%s%llu %s", first ? " (" : ", ", t.reasons[i], reason_names[i]), first = 0;
    fprintf(stderr, "%s\n%llu CT and %llu MR volumes of %llu patients: %llu slices in %d shards; dropped %llu slices without body and "
                    "%llu constant\n", rejected ? ")" : "", t.volumes[MODALITY_CT], t.volumes[MODALITY_MR], t.patients, slices, shards,
            t.no_body, t.constant);
    double decoded = decoding[0] + decoding[1], worked = working[0] + working[1];
    fprintf(stderr, "%.1f s in all with %d workers: they spent %.3f s decoding and %.3f s otherwise; %.1f s at the end; "
                    "largest worker %.0f MiB\n",
            seconds_now() - job.start, o->jobs, decoded, worked - decoded, seconds_now() - ending,
            (peak[0] > peak[1] ? peak[0] : peak[1]) / 1048576.0);
    if (t.patients == 1 && t.taken > 20)
        warn("all %llu volumes are of one patient by --patient-from; see --help if that is wrong", t.taken);
    if (slices && !o->dry_run)
        fprintf(stderr, "scans of heads hold faces, which can be made out again: deface them before sharing these shards outside\n");
    if (slices == 0)
        fail(STATUS_DATA, "no usable volume in %s%s; the lines above say why", n ? arguments[0] : o->list, n > 1 ? " ..." : "");
    if (output->named_bad) fail(STATUS_DATA, "a file named on the command line was left out, as said above");
    if (100.0 * t.bad_files > o->most_failed * t.files)
        fail(STATUS_DATA, "%llu of %llu files could not be read, more than --max-failed %g %%", t.bad_files, t.files, o->most_failed);
}

// ---------------------------------------------------------------------------------------------------------------- shards

// Paths of the shards among the arguments: files as they are, folders' *.shard, by name.
static Index gather_shards(char **arguments, int n) {
    Index x = index_open(0, 1);
    for (int i = 0; i < n; i++) index_walk(&x, arguments[i], 0, 1, NULL);
    for (uint64_t i = 0; i < x.n_files; i++) {
        if (!index_file(&x, i)->named && !ends_with(index_path(&x, i), ".shard")) continue;
        Record r = {.file = (uint32_t)i};
        mapped_add(&x.records, &r, sizeof r);
        x.n_records++;
    }
    if (x.n_records == 0) fail(STATUS_DATA, "%s holds no *.shard", arguments[0]);
    static const uint8_t nothing[REASON_COUNT];
    index_sort(&x, nothing);
    return x;
}

static void verify(char **arguments, int n) {
    Index x = gather_shards(arguments, n);
    int bad = 0;
    for (uint64_t i = 0; i < x.n_records; i++) {
        const char *path = index_path(&x, index_record(&x, i)->file);
        char reason[256];
        int wrong = shard_check(path, reason, sizeof reason);
        bad += wrong != 0;
        if (wrong) fprintf(stderr, "%s %s\n", path, reason);
        else printf("%s\tgood\n", path);
    }
    if (bad) fail(STATUS_DATA, "%d of %d shards are bad; make them again with ./prep/prep", bad, (int)x.n_records);
}

static void show_info(char **arguments, int n) {
    Index x = gather_shards(arguments, n);
    for (uint64_t f = 0; f < x.n_records; f++) {
        const char *path = index_path(&x, index_record(&x, f)->file);
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

static void make_phantom(const Command *c) {
    double start = seconds_now();
    phantom_make_sets(c->pack.out, c->seed, c->patients);
    fprintf(stderr, "%d phantom patients in %s/train and %d others in %s/eval, %.1f s\n", c->patients, c->pack.out,
            c->patients * 2 / 3, c->pack.out, seconds_now() - start);
}

int main(int argc, char **argv) {
    signal(SIGXFSZ, SIG_IGN);    // a limit on file size is then an error of write, like a full disk
    signal(SIGPIPE, SIG_IGN);    // and so is a worker that is gone
    Command c = parse_options(argc, argv);
    char **inputs = argv + optind;
    int n = argc - optind;
    if (c.mode == MODE_PHANTOM) make_phantom(&c);
    else if (c.mode == MODE_INFO) show_info(inputs, n);
    else if (c.mode == MODE_VERIFY) verify(inputs, n);
    else if (c.mode == MODE_MERGE) merge_sets(c.pack.out, (const char *const *)inputs, n);
    else pack(&c.pack, inputs, n);
    if (fflush(stdout)) fail(STATUS_FAILED, "cannot write to standard output: %s", strerror(errno));
    return STATUS_DONE;
}
