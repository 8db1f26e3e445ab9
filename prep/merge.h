/*
Sets of shards, made by several nodes or on several days, to one: files are linked (copied where links cannot be made), and
only a shard that holds a volume which an earlier one holds too is written again, without it.

  merge_sets       --merge
*/
#ifndef CURIA_MERGE_H
#define CURIA_MERGE_H

#include "output.h"

typedef struct { int set; char path[PATH_SIZE]; uint64_t header_checksum; } MergeShard;
typedef struct { int set, shard; uint64_t first, count, volume; } MergeCopy;   // slices of a shard that are there already

typedef struct {
    const char *out, *const *sets;
    int n_sets;
    MergeShard *shards;
    int n_shards;
    MergeCopy *copies;
    int n_copies;
    Seen contents, patients;           // so far
} Merge;

// folder[PATH_SIZE]: a part of --split in a set, or the set itself; returns folder.
static inline char *part_folder(char *folder, const char *set, const char *part) {
    if (*part) return path_join(folder, set, part);
    snprintf(folder, PATH_SIZE, "%s", set);
    return folder;
}

static inline void merge_list(Merge *m, const char *part) {
    char folder[PATH_SIZE], path[PATH_SIZE], reason[256];
    uint64_t names_checksum = 0;       // of the first shard
    m->n_shards = m->n_copies = 0;
    for (int i = 0; i < m->n_sets; i++) {
        part_folder(folder, m->sets[i], part);
        for (int k = 0; file_exists(shard_path(path, folder, k)); k++) {
            m->shards = (MergeShard *)realloc(m->shards, (m->n_shards + 1) * sizeof *m->shards);
            if (!m->shards) fail(STATUS_FAILED, "out of memory: %d shards", m->n_shards);
            MergeShard *s = &m->shards[m->n_shards++];
            s->set = i;
            Shard shard = {.path = strcpy(s->path, path)};
            ShardHeader h;
            int file, bad = shard_read_header(&shard, &h, &file, reason, sizeof reason);
            if (file >= 0) close(file);
            if (bad) fail(STATUS_DATA, "%s %s; make it again", path, reason);
            s->header_checksum = shard.header_checksum;
            if (m->n_shards == 1) names_checksum = shard.names_checksum;
            if (shard.names_checksum != names_checksum)
                fail(STATUS_DATA, "%s and %s have different class names; make them with one table of --labels", m->shards[0].path, path);
        }
    }
}

// Finds the volumes that an earlier set holds too: equal in every slice's checksum and plane.
static inline void merge_find_copies(Merge *m) {
    char reason[256];
    uint64_t volume = 0, content = 0;
    int set = -1, from = 0;            // from: the first of m->copies that is of this volume, if it is one
    for (int i = 0; i <= m->n_shards; i++) {
        Shard shard = {.path = i < m->n_shards ? m->shards[i].path : NULL};
        if (shard.path && shard_map(&shard, reason, sizeof reason)) fail(STATUS_DATA, "%s %s; make it again", shard.path, reason);
        const ShardSlice *s = shard.path ? shard_index(&shard) : NULL;
        for (uint64_t k = 0; k < (s ? shard.slices : 1); k++) {
            if (!s || s[k].volume_id != volume || m->shards[i].set != set) {
                if (set >= 0 && !seen_add(&m->contents, content)) m->n_copies = from;  // new: its ranges are no copies
                if (!s) break;
                volume = s[k].volume_id, set = m->shards[i].set, content = 0, from = m->n_copies;
            }
            content = volume_content(content, &s[k]);
            MergeCopy *last = m->n_copies > from ? &m->copies[m->n_copies - 1] : NULL;
            if (last && last->shard == i) last->count++;
            else {
                m->copies = (MergeCopy *)realloc(m->copies, (m->n_copies + 1) * sizeof *m->copies);
                if (!m->copies) fail(STATUS_FAILED, "out of memory: %d volumes are in two sets", m->n_copies);
                m->copies[m->n_copies++] = (MergeCopy){set, i, k, 1, volume};
            }
        }
        shard_unmap(&shard);
    }
}

static inline void merge_copy_file(const char *from, const char *to) {
    char partial[PATH_SIZE];
    if (link(from, to) == 0) return;
    snprintf(partial, sizeof partial, "%.4000s.partial", to);
    int in = open(from, O_RDONLY | O_CLOEXEC);
    if (in < 0) fail(STATUS_DATA, "%s: %s", from, strerror(errno));
    FILE *out = file_create(partial);
    static uint8_t buffer[1 << 20];
    for (ssize_t n; (n = read(in, buffer, sizeof buffer)) != 0;) {
        if (n < 0) fail(STATUS_FAILED, "%s: cannot read it: %s", from, strerror(errno));
        if (fwrite(buffer, 1, (size_t)n, out) != (size_t)n) {
            int error = errno;
            unlink(partial);
            fail(STATUS_FAILED, "%s: cannot write: %s", to, strerror(error));
        }
    }
    close(in);
    file_close(out, partial);
    file_rename(partial, to);
}

// Writes shard i without the copies in it, which are n, in the order of its slices. Returns whether any slice was left.
static inline int merge_rewrite(const Merge *m, int i, const MergeCopy *copies, int n, const char *to) {
    char reason[256];
    Shard shard = {.path = (char *)m->shards[i].path};
    ShardWriter writer = {0};
    if (shard_map(&shard, reason, sizeof reason)) fail(STATUS_DATA, "%s %s; make it again", shard.path, reason);
    const ShardSlice *s = shard_index(&shard);
    const ShardHeader *h = (const ShardHeader *)shard.mapping;
    for (uint64_t k = 0, c = 0; k < shard.slices; k++) {
        while (c < (uint64_t)n && k >= copies[c].first + copies[c].count) c++;
        if (c < (uint64_t)n && k >= copies[c].first) continue;
        if (!writer.file) shard_writer_open(&writer, to);
        shard_writer_add_block(&writer, &s[k], shard.mapping + s[k].pixel_offset);
    }
    int any = writer.file != NULL;
    char *names = (char *)xmalloc(h->names_bytes + 1, "class names");
    memcpy(names, shard.mapping + h->names_offset, h->names_bytes);
    if (any) shard_writer_close(&writer, names);
    free(names);
    shard_unmap(&shard);
    return any;
}

static inline int merge_part(Merge *m, const char *part) {
    char folder[PATH_SIZE], to[PATH_SIZE], reason[256];
    int made = 0;
    merge_list(m, part);
    if (m->n_shards == 0) return 0;
    merge_find_copies(m);
    file_make_dirs(part_folder(folder, m->out, part));
    for (int i = 0, c = 0, copies; i < m->n_shards; i++, c += copies) {
        shard_path(to, folder, made);
        for (copies = 0; c + copies < m->n_copies && m->copies[c + copies].shard == i;) copies++;
        Shard there = {.path = to};
        ShardHeader h;
        int file = -1, same = 0;
        if (file_exists(to)) {
            same = !shard_read_header(&there, &h, &file, reason, sizeof reason) && there.header_checksum == m->shards[i].header_checksum;
            if (file >= 0) close(file);
            if (!same && !copies) fail(STATUS_USAGE, "%s holds other shards already; give another folder, or remove them", folder);
        }
        if (copies) made += merge_rewrite(m, i, m->copies + c, copies, to);
        else {
            if (!same) merge_copy_file(m->shards[i].path, to);
            made++;
        }
    }
    if (file_exists(shard_path(to, folder, made)))
        fail(STATUS_USAGE, "%s holds other shards already; give another folder, or remove them", folder);
    file_sync_dir(folder);
    return made;
}

// The sets' rows in the order of the sets; those of a copy say so.
static inline Totals merge_report(Merge *m, FILE *report) {
    Totals t = {0};
    char path[PATH_SIZE], *line = NULL, *field[ROW_COUNT];
    size_t room = 0;
    uint64_t number = 0;
    fprintf(report, "number\t" ROW_COLUMNS "\n");
    for (int i = 0; i < m->n_sets; i++) {
        FILE *f = fopen(path_join(path, m->sets[i], "report.tsv"), "r");
        if (!f) {
            warn("%s: %s: the merged report will lack its rows", path, strerror(errno));
            continue;
        }
        for (int first = 1; getline(&line, &room, f) > 0; first = 0) {
            if (first && strcmp(line, "number\t" ROW_COLUMNS "\n"))
                fail(STATUS_DATA, "%s has other columns than this prep writes", path);
            if (first) continue;
            row_cut(line, field);
            uint64_t volume = strtoull(field[ROW_VOLUME], NULL, 16);
            for (int c = 0; c < m->n_copies; c++)
                if (m->copies[c].set == i && m->copies[c].volume == volume) {
                    field[ROW_STATUS] = "rejected";
                    field[ROW_REASON] = (char *)reason_names[REASON_DUPLICATE];
                    field[ROW_DETAIL] = (char *)reason_texts[REASON_DUPLICATE];
                    field[ROW_SLICES] = field[ROW_MASKS] = "0";
                }
            totals_add(&t, field);
            if (!*field[ROW_REASON]) t.patients += !seen_add(&m->patients, strtoull(field[ROW_PATIENT], NULL, 16));
            fprintf(report, "%llu", (unsigned long long)++number);
            for (int k = 0; k < ROW_COUNT; k++) fprintf(report, "\t%s", field[k]);
            fputc('\n', report);
        }
        fclose(f);
    }
    free(line);
    return t;
}

// Merges the shards of n sets into out; parts of --split stay apart.
static inline void merge_sets(const char *out, const char *const *sets, int n) {
    Merge m = {.out = out, .sets = sets, .n_sets = n};
    Options o = {.out = out};
    Prep prep = {.options = &o};
    Output output = {.prep = &prep};
    int shards = 0, copies = 0;
    MergeCopy *all = NULL;
    file_make_dirs(out);
    for (int i = -1; i < MOST_PARTS; i++) {
        int made = merge_part(&m, i < 0 ? "" : part_names[i]);
        shards += made;
        output.parts[i < 0 ? 0 : i].shards += made;
        if (made && i >= 0) o.parts = i + 1;
        all = (MergeCopy *)realloc(all, (copies + m.n_copies + 1) * sizeof *all);
        if (m.n_copies) memcpy(all + copies, m.copies, m.n_copies * sizeof *all);
        copies += m.n_copies;
    }
    if (shards == 0) fail(STATUS_DATA, "%s holds no shard-000000.shard", sets[0]);
    free(m.copies);
    m.copies = all, m.n_copies = copies;
    char path[PATH_SIZE];
    FILE *report = aside_open(&output, "report.tsv", 0666, path);
    Totals t = merge_report(&m, report);
    aside_close(report, path);
    FILE *summary = aside_open(&output, "summary.json", 0666, path);
    summary_write(summary, &output, &t);
    aside_close(summary, path);
    fprintf(stderr, "%d shards of %d sets in %s: %llu volumes taken; %d copies of volumes left out\n", shards, n, out,
            t.taken, copies);
    free(m.shards);
    free(m.copies);
    free(m.contents.at);
    free(m.patients.at);
}

#endif
