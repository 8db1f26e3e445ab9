/*
What the parent writes: shards in the order of the series, the report, the summary; and going on after a kill.

  ROW_COLUMNS          the columns of report.tsv
  Output               the folder being written
  output_open          makes the folder, or finds where an earlier run of the same inputs and options was killed
  output_done          whether a series is in finished shards already
  output_take          a worker's result: lines, rows and slices
  output_close         the last shards, report.tsv, private_map.tsv, preview.png, summary.json
  part_of, part_names  which part of --split a patient is in
  Seen, seen_add       a set of hashes
  shard_path           the name of a shard

While it runs the folder also holds resume.tsv: the report's rows so far, each after the number of its series. Rows are on
the disk before the shards that hold their slices are, so a finished shard is never written again: its last record tells
which slice comes next.
*/
#ifndef CURIA_OUTPUT_H
#define CURIA_OUTPUT_H

#include "pack.h"
#include "preview.h"

#define ROW_COLUMNS \
    "volume\tpatient\tpart\tstatus\treason\tdetail\tformat\tmodality\tplanes\tvoxels\tspacing_mm\torientation\tlow\thigh\ttilt_deg\t" \
    "files\tbad_files\tcopies\tslices\tno_body\tconstant\tmasks\tcontent\tnotes"
enum { ROW_VOLUME, ROW_PATIENT, ROW_PART, ROW_STATUS, ROW_REASON, ROW_DETAIL, ROW_FORMAT, ROW_MODALITY, ROW_PLANES, ROW_VOXELS,
       ROW_SPACING, ROW_ORIENTATION, ROW_LOW, ROW_HIGH, ROW_TILT, ROW_FILES, ROW_BAD_FILES, ROW_COPIES, ROW_SLICES, ROW_NO_BODY,
       ROW_CONSTANT, ROW_MASKS, ROW_CONTENT, ROW_NOTES, ROW_COUNT };

static const char *const part_names[MOST_PARTS] = {"train", "val", "test"};

typedef struct {
    ShardWriter writer;
    char folder[PATH_SIZE];
    int shards;
    uint64_t from, volume, slices;      // of an earlier run: the series its finished shards end in, the volume, how many
    int resumed, passed;                // of its slices they hold; passed: that place has been reached in this run
} Part;

typedef struct { uint64_t at; uint32_t bytes; } Rows;

typedef struct { uint64_t *at, room, n; } Seen; // a set of hashes

typedef struct {
    const Prep *prep;
    Part parts[MOST_PARTS];
    FILE *journal;
    Rows *rows;                         // [series] where its rows are in the journal; bytes 0: not yet
    uint64_t run;                       // hash of inputs and options
    Seen seen;                          // contents of the volumes taken
    uint64_t taken_slices, named_bad;
    int complete;                       // an earlier run ended: there is nothing to do
} Output;

static inline int part_count(const Options *o) { return o->parts ? o->parts : 1; }

// By a hash of the patient alone, so that a patient keeps its part whatever else is in the inputs.
static inline int part_of(const Options *o, uint64_t patient) {
    double at = (double)(siphash((SipKey){o->salt.k1, o->salt.k0}, &patient, sizeof patient) >> 11) / 9007199254740992.0;
    int part = 0;
    for (double edge = o->share[0]; part + 1 < o->parts && at >= edge; edge += o->share[++part]);
    return part;
}

// Whether the set holds the hash already; adds it where not. Open addressing; 0 is never stored.
static inline int seen_add(Seen *seen, uint64_t hash) {
    if (2 * seen->n >= seen->room) {
        Seen old = *seen;
        *seen = (Seen){.room = old.room ? 2 * old.room : 1024};
        seen->at = (uint64_t *)xmalloc(seen->room * sizeof *seen->at, "the volumes taken");
        for (uint64_t i = 0; i < old.room; i++)
            if (old.at[i]) seen_add(seen, old.at[i]);
        free(old.at);
    }
    uint64_t at = hash & (seen->room - 1);
    for (; seen->at[at]; at = (at + 1) & (seen->room - 1))
        if (seen->at[at] == hash) return 1;
    seen->at[at] = hash;
    seen->n++;
    return 0;
}

// path[PATH_SIZE]: shard `number` of a folder; returns path.
static inline char *shard_path(char *path, const char *folder, int number) {
    char name[32];
    snprintf(name, sizeof name, "shard-%06d.shard", number);
    return path_join(path, folder, name);
}

// A hash of all that decides the output's bytes.
static inline uint64_t output_run(const Prep *prep) {
    const Options *o = prep->options;
    uint64_t run[16] = {1, (uint64_t)o->modality, (uint64_t)o->planes, (uint64_t)o->fourd, (uint64_t)o->whole_volumes,
                        o->shard_bytes, (uint64_t)o->parts, o->share_of, o->shares, checksum(o->keep, sizeof o->keep),
                        checksum(o->share, sizeof o->share), prep->index.n_records, 0, 0, 0, SHARD_VERSION};
    const Labels *l = &prep->labels;
    for (int i = 0; i < l->n; i++) {
        const LabelRow *r = &l->rows[i];
        const char *words[4] = {r->file, r->label, r->patient, r->mask};
        for (int k = 0; k < 4; k++) run[12] = siphash((SipKey){run[12], (uint64_t)k}, words[k], strlen(words[k]));
        float numbers[2] = {(float)r->slice, r->target};
        run[12] = siphash((SipKey){run[12], 9}, numbers, sizeof numbers);
    }
    for (uint64_t i = 0; i < prep->index.n_records; i++) {
        const Record *r = index_record(&prep->index, i);
        uint64_t key[6] = {r->patient, r->series, r->instance, (uint64_t)r->orientation, r->reason,
                           index_file(&prep->index, r->file)->size};
        run[13] = siphash((SipKey){run[13], 0}, key, sizeof key);
    }
    return siphash(o->salt, run, sizeof run);
}

// Cuts the row at `line` ("SERIES, tab, columns") in place; returns the next line.
static inline char *row_cut(char *line, char *field[ROW_COUNT]) {
    char *end = line + strcspn(line, "\n"), *next = *end ? end + 1 : end;
    *end = 0;
    line += strcspn(line, "\t");
    for (int i = 0; i < ROW_COUNT; i++) {
        if (*line) *line++ = 0;
        field[i] = line;
        line += strcspn(line, "\t");
    }
    return next;
}

// -------------------------------------------------------------------------------------------------------------- resuming

// Where the finished shards of a part end. Unfinished files go.
static inline void part_open(Part *part, int fresh) {
    char path[PATH_SIZE + 16], reason[256];
    file_make_dirs(part->folder);
    while (file_exists(shard_path(path, part->folder, part->shards))) part->shards++;
    if (part->shards && fresh)
        fail(STATUS_USAGE, "%s holds shards already, of other inputs or options; give another folder, or remove them", part->folder);
    strcat(path, ".partial");
    unlink(path);
    for (int i = part->shards - 1; i >= 0; i--) {
        Shard shard = {.path = shard_path(path, part->folder, i)};
        if (shard_map(&shard, reason, sizeof reason))
            fail(STATUS_DATA, "%s %s; remove it and the shards after it, and run this again", path, reason);
        const ShardSlice *s = shard_index(&shard);
        uint64_t n = shard.slices;
        if (!part->resumed) part->volume = s[n - 1].volume_id, part->resumed = 1;
        while (n > 0 && s[n - 1].volume_id == part->volume) n--, part->slices++;
        shard_unmap(&shard);
        if (n > 0) break;
    }
}

// Reads resume.tsv as far as it is whole. The last series before a kill may lack rows: it is done again, and its new rows
// come after a line "resumed".
static inline void journal_read(Output *out) {
    char *line = NULL, *field[ROW_COUNT];
    size_t room = 0;
    uint64_t last = UINT64_MAX;
    off_t at = ftello(out->journal);
    for (ssize_t n; (n = getline(&line, &room, out->journal)) > 0 && line[n - 1] == '\n'; at += n) {
        int resumed = !strcmp(line, "resumed\n");
        uint64_t series = resumed ? UINT64_MAX : strtoull(line, NULL, 10);
        if (!resumed && series >= out->prep->index.n_series) break;
        if (resumed && last != UINT64_MAX) out->rows[last].bytes = 0;
        if (!resumed && series != last) out->rows[series] = (Rows){(uint64_t)at, 0};
        last = series;
        if (resumed) continue;
        out->rows[series].bytes += (uint32_t)n;
        row_cut(line, field);
        uint64_t volume = strtoull(field[ROW_VOLUME], NULL, 16);
        for (int i = 0; i < part_count(out->prep->options); i++)
            if (out->parts[i].resumed && out->parts[i].volume == volume) out->parts[i].from = series;
    }
    free(line);
    if (last != UINT64_MAX) out->rows[last].bytes = 0;
    if (ftruncate(fileno(out->journal), at) || fseeko(out->journal, at, SEEK_SET) || fputs("resumed\n", out->journal) < 0)
        fail(STATUS_FAILED, "%s/resume.tsv: %s", out->prep->options->out, strerror(errno));
}

// The rows of a series as text, "" if it has none yet; the caller frees.
static inline char *output_rows(const Output *out, uint64_t series) {
    Rows r = out->rows[series];
    char *text = (char *)xmalloc(r.bytes + 1, "rows of the report");
    if (pread(fileno(out->journal), text, r.bytes, (off_t)r.at) != (ssize_t)r.bytes)
        fail(STATUS_FAILED, "the rows of the report cannot be read back: %s", strerror(errno));
    return text;
}

// Whether all slices of the series are in finished shards, and its rows in the journal.
static inline int output_done(Output *out, uint64_t series) {
    char *text = output_rows(out, series), *field[ROW_COUNT];
    int done = *text != 0;
    for (int pass = 0; pass < 2 && done; pass++) {
        if (pass) free(text), text = output_rows(out, series);
        for (char *at = text; *at && done;) {
            at = row_cut(at, field);
            if (strcmp(field[ROW_STATUS], "taken")) continue;
            const Part *part = &out->parts[part_of(out->prep->options, strtoull(field[ROW_PATIENT], NULL, 16))];
            if (pass == 0) done = part->resumed && series < part->from;
            else seen_add(&out->seen, strtoull(field[ROW_CONTENT], NULL, 16));
        }
    }
    free(text);
    return done;
}

// What an earlier run wrote as "run" in its summary; 0 where there is none.
static inline uint64_t summary_run(const char *path) {
    char error[256];
    size_t bytes;
    if (!file_exists(path)) return 0;
    char *text = file_read(path, &bytes);
    Json *json = json_parse(text, bytes, error, sizeof error);
    const Json *run = json ? json_get(json, "run") : NULL;
    uint64_t value = run && run->type == JSON_STRING ? strtoull(run->text, NULL, 16) : 0;
    if (json) json_free(json);
    free(text);
    return value;
}

static inline Output *output_open(const Prep *prep) {
    const Options *o = prep->options;
    Output *out = (Output *)xmalloc(sizeof *out, "the output");
    char path[PATH_SIZE], line[64], head[64];
    out->prep = prep;
    out->rows = (Rows *)xmalloc((prep->index.n_series + 1) * sizeof *out->rows, "the series");
    if (o->dry_run) {
        out->journal = tmpfile();
        if (!out->journal) fail(STATUS_FAILED, "cannot make a temporary file: %s; set TMPDIR", strerror(errno));
        return out;
    }
    out->run = output_run(prep);
    file_make_dirs(o->out);
    if (summary_run(path_join(path, o->out, "summary.json")) == out->run) {
        out->complete = 1;
        return out;
    }
    out->journal = fopen(path_join(path, o->out, "resume.tsv"), "a+");
    if (!out->journal) fail(STATUS_FAILED, "%s: cannot create it: %s", path, strerror(errno));
    struct flock whole = {.l_type = F_WRLCK, .l_whence = SEEK_SET}; // unlike flock()'s, not held on by workers
    if (fcntl(fileno(out->journal), F_SETLK, &whole) && (errno == EAGAIN || errno == EACCES))
        fail(STATUS_FAILED, "%s: another prep is writing there", o->out);
    snprintf(head, sizeof head, "run\t%016llx\n", (unsigned long long)out->run);
    rewind(out->journal);
    int fresh = !fgets(line, sizeof line, out->journal) || strcmp(line, head);
    for (int i = 0; i < part_count(o); i++) {
        snprintf(out->parts[i].folder, PATH_SIZE, "%s%s%s", o->out, o->parts ? "/" : "", o->parts ? part_names[i] : "");
        part_open(&out->parts[i], fresh);
    }
    if (fresh) {
        if (ftruncate(fileno(out->journal), 0) || fseeko(out->journal, 0, SEEK_SET) || fputs(head, out->journal) < 0 ||
            fflush(out->journal)) fail(STATUS_FAILED, "%s: cannot write: %s", path, strerror(errno));
    } else journal_read(out);
    return out;
}

// ---------------------------------------------------------------------------------------------------------------- taking

static inline void output_sync(Output *out) {
    if (ferror(out->journal) || fflush(out->journal) || fsync(fileno(out->journal)))
        fail(STATUS_FAILED, "%s/resume.tsv: cannot write: %s", out->prep->options->out, strerror(errno));
}

static inline void part_close_shard(Output *out, Part *part) {
    if (!part->writer.file) return;
    output_sync(out);
    shard_writer_close(&part->writer, out->prep->labels.names);
    part->shards++;
}

static inline void part_add(Output *out, Part *part, const ShardSlice *slice, const void *block) {
    if (part->writer.file && part->writer.offset >= out->prep->options->shard_bytes) part_close_shard(out, part);
    if (!part->writer.file) {
        char path[PATH_SIZE];
        shard_writer_open(&part->writer, shard_path(path, part->folder, part->shards));
    }
    shard_writer_add_block(&part->writer, slice, block);
}

// For people, with names; and wiped before it, the progress line of a terminal.
static inline void output_line(const Output *out, const VolumeResult *v) {
    const Index *x = &out->prep->index;
    const char *path = index_path(x, v->file), *kind = index_file(x, v->file)->kind == KIND_DICOM ? "series of " : "";
    const char *clear = isatty(2) ? "\r\033[K" : "";
    char files[48] = "";
    if (v->files + v->bad_files > 1) snprintf(files, sizeof files, " and %d more", v->files + v->bad_files - 1);
    if (v->reason) {
        fprintf(stderr, "%sleft out  %s%s: %s: %s%s%s\n", clear, path, files, reason_names[v->reason],
                *v->detail ? v->detail : reason_texts[v->reason], reason_overruled[v->reason] ? "; to take it: --keep " : "",
                reason_overruled[v->reason] ? reason_names[v->reason] : "");
        return;
    }
    fprintf(stderr,
            "%staken     %s%s: %s%s %dx%dx%d, %.3gx%.3gx%.3g mm, %s, %g to %g; %s: %d slices, dropped %d without body, "
            "%d constant%s%s\n",
            clear, path, files, kind, modality_names[v->modality], v->n[0], v->n[1], v->n[2], v->spacing[0], v->spacing[1],
            v->spacing[2], v->orientation, v->low, v->high, v->planes, v->slices, v->no_body, v->constant,
            *v->notes ? "; note: " : "", v->notes);
}

static inline void row_print(FILE *f, const Options *o, const VolumeResult *v) {
    fprintf(f, "%016llx\t%016llx\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t", (unsigned long long)v->volume, (unsigned long long)v->patient,
            o->parts ? part_names[part_of(o, v->patient)] : "", v->reason ? "rejected" : "taken", reason_names[v->reason],
            *v->detail ? v->detail : reason_texts[v->reason], v->format, v->modality ? modality_names[v->modality] : "", v->planes);
    if (v->n[0]) {
        fprintf(f, "%dx%dx%d\t%.5gx%.5gx%.5g\t%s\t%.9g\t%.9g\t%.1f\t", v->n[0], v->n[1], v->n[2], v->spacing[0], v->spacing[1],
                v->spacing[2], v->orientation, v->low, v->high, v->tilt);
    } else fprintf(f, "\t\t\t\t\t\t");
    fprintf(f, "%d\t%d\t%d\t%d\t%d\t%d\t%d\t%016llx\t%s", v->files, v->bad_files, v->duplicates, v->slices, v->no_body,
            v->constant, v->masks, (unsigned long long)v->content, v->notes);
}

// A worker's result for a series: rows to the journal, then slices to the part of its patient.
static inline void output_take(Output *out, uint64_t series, const uint8_t *result) {
    const Options *o = out->prep->options;
    const SeriesResult *head = (const SeriesResult *)result;
    VolumeResult *volumes = (VolumeResult *)xmalloc(head->volumes * sizeof *volumes, "a series");
    memcpy(volumes, result + head->at, head->volumes * sizeof *volumes);
    out->rows[series].at = (uint64_t)ftello(out->journal);
    for (uint64_t i = 0; i < head->volumes; i++) {
        VolumeResult *v = &volumes[i];
        if (!v->reason && !o->keep[REASON_DUPLICATE] && seen_add(&out->seen, v->content)) pack_reject(v, REASON_DUPLICATE, "%s", "");
        if (v->reason) v->content = 0;
        if (v->reason && index_file(&out->prep->index, v->file)->named) out->named_bad++;
        fprintf(out->journal, "%llu\t", (unsigned long long)series);
        row_print(out->journal, o, v);
        fputc('\n', out->journal);
        if (!o->dry_run) output_line(out, v);
        else {                          // on the user's own terminal a name may stand
            row_print(stdout, o, v);
            printf("\t%s\n", index_path(&out->prep->index, v->file));
        }
        out->taken_slices += (uint64_t)v->slices;
    }
    out->rows[series].bytes = (uint32_t)((uint64_t)ftello(out->journal) - out->rows[series].at);
    for (uint64_t i = 0; i < head->volumes && !o->dry_run; i++) {
        const VolumeResult *v = &volumes[i];
        Part *part = &out->parts[part_of(o, v->patient)];
        const ShardSlice *s = (const ShardSlice *)(result + v->records);
        const uint8_t *block = result + v->blocks;
        int again = part->resumed && series == part->from && !part->passed;
        uint64_t skip = !again ? 0 : v->volume == part->volume ? part->slices : (uint64_t)v->slices;
        for (uint64_t k = 0; k < (uint64_t)v->slices; block += shard_slice_bytes(&s[k]), k++)
            if (k >= skip) part_add(out, part, &s[k], block);
        if (again && v->volume == part->volume) part->passed = 1;
    }
    free(volumes);
}

// ---------------------------------------------------------------------------------------------------------------- closing

typedef struct {
    unsigned long long volumes[MODALITY_COUNT], slices[MODALITY_COUNT], planes[PLANE_COUNT], reasons[REASON_COUNT],
        parts[MOST_PARTS], taken, patients, no_body, constant, masks, files, bad_files, copies, tilted;
} Totals;

static inline int word_at(const char *word, const char *const *words, int n) {
    for (int i = 0; i < n; i++)
        if (!strcmp(word, words[i])) return i;
    return 0;
}

static inline void totals_add(Totals *t, char *field[ROW_COUNT]) {
    int modality = word_at(field[ROW_MODALITY], modality_names, MODALITY_COUNT);
    int reason = word_at(field[ROW_REASON], reason_names, REASON_COUNT);
    uint64_t slices = strtoull(field[ROW_SLICES], NULL, 10);
    uint64_t files = strtoull(field[ROW_FILES], NULL, 10), bad = strtoull(field[ROW_BAD_FILES], NULL, 10);
    t->files += files + bad;
    t->bad_files += bad ? bad : reason && reason <= REASON_MEMORY && reason != REASON_UNKNOWN ? files : 0;
    t->copies += strtoull(field[ROW_COPIES], NULL, 10);
    t->reasons[reason] += reason != 0;
    if (reason) return;
    t->taken++;
    t->volumes[modality]++;
    t->slices[modality] += slices;
    for (int i = 0; i < PLANE_COUNT; i++) t->planes[i] += strstr(field[ROW_PLANES], plane_names[i]) != NULL;
    t->parts[word_at(field[ROW_PART], part_names, MOST_PARTS)] += slices;
    t->no_body += strtoull(field[ROW_NO_BODY], NULL, 10);
    t->constant += strtoull(field[ROW_CONSTANT], NULL, 10);
    t->masks += strtoull(field[ROW_MASKS], NULL, 10);
    t->tilted += atof(field[ROW_TILT]) > 0.5;
}

// report.tsv, and the totals; where `map` is not NULL, which file each volume came from.
static inline Totals output_report(Output *out, FILE *report, FILE *map) {
    const Index *x = &out->prep->index;
    Totals t = {0};
    uint64_t number = 0, last_patient = 0;
    if (report) fprintf(report, "number\t" ROW_COLUMNS "\n");
    if (map) fprintf(map, "volumes\tpatient\tfile\n");
    for (uint64_t i = 0; i < x->n_series; i++) {
        char *text = output_rows(out, i), *field[ROW_COUNT], ids[4096] = "";
        const Record *r = index_record(x, x->series[i].first);
        for (char *at = text, *next; *at; at = next) {
            char *columns = strchr(at, '\t');
            if (report) fprintf(report, "%llu%.*s\n", (unsigned long long)++number, (int)strcspn(columns, "\n"), columns);
            next = row_cut(at, field);
            totals_add(&t, field);
            if (*field[ROW_REASON] == 0 && (t.patients == 0 || r->patient != last_patient)) t.patients++, last_patient = r->patient;
            size_t used = strlen(ids);
            snprintf(ids + used, sizeof ids - used, "%s%s", used ? "," : "", field[ROW_VOLUME]);
        }
        for (uint32_t k = 0; map && k < x->series[i].count; k++)
            fprintf(map, "%s\t%016llx\t%s\n", ids, (unsigned long long)r[k].patient, index_path(x, r[k].file));
        free(text);
    }
    return t;
}

// `"name": {"word": count, ...},` of the counts that are not 0, or of all of them.
static inline void summary_counts(FILE *f, const char *name, const char *const *words, const unsigned long long *counts, int n, int all) {
    int first = 1;
    fprintf(f, "  \"%s\": {", name);
    for (int i = 0; i < n; i++)
        if (all || counts[i]) fprintf(f, "%s\"%s\": %llu", first ? "" : ", ", words[i], counts[i]), first = 0;
    fprintf(f, "},\n");
}

static inline void summary_write(FILE *f, const Output *out, const Totals *t) {
    const Index *x = &out->prep->index;
    const Options *o = out->prep->options;
    int shards = 0;
    for (int i = 0; i < part_count(o); i++) shards += out->parts[i].shards;
    fprintf(f, "{\n");
    if (x->n_files)                     // a merge has seen none
        fprintf(f, "  \"run\": \"%016llx\",\n  \"files\": %llu,\n  \"series\": %llu,\n", (unsigned long long)out->run,
                (unsigned long long)x->n_files, (unsigned long long)x->n_series);
    fprintf(f, "  \"volumes_taken\": %llu,\n  \"patients\": %llu,\n  \"shards\": %d,\n  \"slices\": %llu,\n", t->taken, t->patients,
            shards, t->slices[MODALITY_UNKNOWN] + t->slices[MODALITY_CT] + t->slices[MODALITY_MR]);
    summary_counts(f, "slices_by_modality", modality_names, t->slices, MODALITY_COUNT, 1);
    summary_counts(f, "volumes_by_plane", plane_names, t->planes, PLANE_COUNT, 1);
    summary_counts(f, "slices_by_part", part_names, t->parts, o->parts, 1);
    summary_counts(f, "rejected", reason_names, t->reasons, REASON_COUNT, 0);
    fprintf(f, "  \"dropped_without_body\": %llu,\n  \"dropped_constant\": %llu,\n  \"slices_with_mask\": %llu,\n"
               "  \"files_not_decoded\": %llu,\n  \"copies_left_out\": %llu,\n  \"volumes_tilted\": %llu\n}\n",
            t->no_body, t->constant, t->masks, t->bad_files, t->copies, t->tilted);
}

// NAME in the folder, written aside; mode: its permissions.
static inline FILE *aside_open(const Output *out, const char *name, int mode, char *path) {
    snprintf(path, PATH_SIZE, "%.4000s/%s.partial", out->prep->options->out, name);
    unlink(path);
    int file = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode);
    FILE *f = file < 0 ? NULL : fdopen(file, "w");
    if (!f) fail(STATUS_FAILED, "%s: cannot create it: %s", path, strerror(errno));
    return f;
}

static inline void aside_close(FILE *f, const char *path) {
    char name[PATH_SIZE];
    snprintf(name, sizeof name, "%.*s", (int)(strlen(path) - strlen(".partial")), path);
    file_close(f, path);
    file_rename(path, name);
}

// Ends the output; everything but the shards is written again if a kill comes between.
static inline Totals output_close(Output *out) {
    const Options *o = out->prep->options;
    char path[PATH_SIZE], map_path[PATH_SIZE];
    const char *folders[MOST_PARTS];
    int n = 0;
    if (o->dry_run) {
        fflush(out->journal);
        return output_report(out, NULL, NULL);
    }
    for (int i = 0; i < part_count(o); i++) part_close_shard(out, &out->parts[i]);
    output_sync(out);
    FILE *report = aside_open(out, "report.tsv", 0666, path);
    FILE *map = o->private_map ? aside_open(out, "private_map.tsv", 0600, map_path) : NULL;
    Totals t = output_report(out, report, map);
    aside_close(report, path);
    if (map) aside_close(map, map_path);
    for (int i = 0; i < part_count(o); i++)
        if (out->parts[i].shards) folders[n++] = out->parts[i].folder;
    if (n) preview_write(o->out, folders, n, o->preview);
    FILE *summary = aside_open(out, "summary.json", 0666, path);
    summary_write(summary, out, &t);
    aside_close(summary, path);
    unlink(path_join(path, o->out, "resume.tsv"));
    fclose(out->journal);
    return t;
}

#endif
