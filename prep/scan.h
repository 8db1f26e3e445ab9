/*
What each input is, by its content: a worker looks at the beginnings of files and writes the records of the index.

  Options          what the command line decides of files
  Prep             what workers and parent share
  dicom_reason     why a DICOM file is no scan to train on
  dicom_sniff      whether a file's first bytes are DICOM
  scan_batch       the files of one task
  BATCH_FILES      how many they are
*/
#ifndef CURIA_SCAN_H
#define CURIA_SCAN_H

#include <ctype.h>

#include "dicom.h"
#include "labels.h"
#include "pool.h"
#include "volumefile.h"

enum { BATCH_FILES = 64 };
enum { FOURD_FIRST, FOURD_MID, FOURD_ALL };
enum { PLANES_NATIVE = PLANE_COUNT, PLANES_ALL };
enum { MOST_PARTS = 3 };

typedef struct {
    int modality, planes, fourd, whole_volumes; // whole_volumes: --track 3d
    uint8_t keep[REASON_COUNT];                 // reasons that --keep overrules
    PatientRule patient;
    SipKey salt;
    uint64_t shard_bytes;
    int parts;                                  // of --split; 0: none
    double share[MOST_PARTS];
    const char *out, *salt_file, *labels, *list;
    int jobs, dry_run, private_map, preview;
    double time_limit, most_failed;
    uint64_t memory_limit, share_of, shares;
} Options;

typedef struct {
    const Options *options;
    Index index;
    Labels labels;
    void *output;                               // the parent's
} Prep;

static inline int image_type_has(const char *list, const char *word) { return strcasestr(list, word) != NULL; }

// INTEROP 2.3.11: the first reason that holds and that --keep does not overrule.
static inline int dicom_reason(const DicomHeader *h, const DicomFrame *f, const uint8_t keep[REASON_COUNT]) {
    static const char secondary[] = "1.2.840.10008.5.1.4.1.1.7", *const objects[] = {
        "1.2.840.10008.5.1.4.1.1.66", "1.2.840.10008.5.1.4.1.1.88", "1.2.840.10008.5.1.4.1.1.481", "1.2.840.10008.5.1.4.1.1.104",
        "1.2.840.10008.5.1.4.1.1.11", "1.2.840.10008.1.3.10"};
    int object = !h->has_pixels;
    for (size_t i = 0; i < sizeof objects / sizeof *objects; i++) {
        size_t n = strlen(objects[i]);
        object |= !strncmp(h->sop_class, objects[i], n) && (h->sop_class[n] == 0 || h->sop_class[n] == '.');
    }
    if (!h->has_pixels || (object && !keep[REASON_NOT_IMAGE])) return REASON_NOT_IMAGE;
    size_t n = sizeof secondary - 1;
    const struct { int reason, holds; } rules[] = {
        {REASON_SECONDARY, !strncmp(h->sop_class, secondary, n) && (h->sop_class[n] == 0 || h->sop_class[n] == '.')},
        {REASON_NOT_SCALAR, h->samples != 1},
        {REASON_DOSE_REPORT, image_type_has(h->description, "dose report") || image_type_has(h->image_type, "DOSE_INFO")},
        {REASON_BURNED_IN, h->burned_in},
        {REASON_MODALITY, strcmp(h->modality, "CT") && strcmp(h->modality, "MR")},
        {REASON_PERFUSION, image_type_has(h->image_type, "PERFUSION")},
        {REASON_PROJECTION, image_type_has(h->image_type, "PROJECTION IMAGE") || image_type_has(h->image_type, "\\MIP") ||
                                image_type_has(h->image_type, "\\MINIP") || image_type_has(h->image_type, "\\MPR")},
        {REASON_LOCALIZER, image_type_has(h->image_type, "LOCALIZER") || image_type_has(h->image_type, "SCOUT")},
        {REASON_EIGHT_BIT, h->bits_stored <= 8},
        {REASON_NO_GEOMETRY, !f->has_position || !f->has_orientation || !f->has_spacing},
    };
    for (size_t i = 0; i < sizeof rules / sizeof *rules; i++)
        if (rules[i].holds && !keep[rules[i].reason]) return rules[i].reason;
    return REASON_NONE;
}

// The nth (from 0) backslash-separated value of ImageType.
static inline void image_type_value(const char *list, int n, char *value, size_t size) {
    for (; n > 0 && list; n--) list = strchr(list, '\\') ? strchr(list, '\\') + 1 : NULL;
    snprintf(value, size, "%.*s", list ? (int)strcspn(list, "\\") : 0, list ? list : "");
}

static inline uint64_t hash_text(const Options *o, const char *text) { return siphash(o->salt, text, strlen(text)); }

// The record of a file that is judged by its name alone: a volume file, or one that cannot be read.
static inline Record scan_named(const Prep *prep, uint64_t file, int kind, int reason) {
    char key[PATH_SIZE];
    const char *name = index_name(&prep->index, file);
    Record r = {.series = hash_text(prep->options, name), .file = (uint32_t)file, .kind = (uint8_t)kind, .reason = (uint8_t)reason};
    LabelRow *row = labels_find(&prep->labels, name, "", 0);
    if (row && *row->patient) snprintf(key, sizeof key, "%s", row->patient);
    else if (patient_of(&prep->options->patient, name, key, sizeof key)) {
        if (!r.reason) r.reason = REASON_NO_PATIENT;
        return r;
    }
    r.patient = hash_text(prep->options, key);
    return r;
}

static inline void scan_dicom(const Prep *prep, uint64_t file, PoolResult *out) {
    const Options *o = prep->options;
    DicomHeader h;
    DicomFrame *frames = NULL;
    char reason[256], key[1024], type[64];
    const char *name = index_name(&prep->index, file), *slash = strrchr(name, '/');
    Record named = scan_named(prep, file, KIND_DICOM, REASON_NONE);
    if (dicom_scan(index_path(&prep->index, file), &h, &frames, NULL, 0, reason, sizeof reason)) {
        named.reason = REASON_DAMAGED;
        result_write(out, &named, sizeof named);
        return;
    }
    LabelRow *row = labels_find(&prep->labels, name, h.series, 0);
    if (row && *row->patient) named.patient = hash_text(o, row->patient);
    else if (o->patient.from == PATIENT_AUTO && *h.patient) named.patient = hash_text(o, h.patient);
    else if ((o->patient.from == PATIENT_AUTO && *h.study) || (o->patient.from <= PATIENT_FOLDER && !slash))
        named.patient = hash_text(o, h.study);   // files right below INPUT are of one study, even where it has no UID
    int modality = !strcmp(h.modality, "CT") ? MODALITY_CT : !strcmp(h.modality, "MR") ? MODALITY_MR : MODALITY_UNKNOWN;
    image_type_value(h.image_type, 2, type, sizeof type);
    for (int i = 0; i < (h.frames > 0 ? h.frames : 1); i++) {
        static const DicomFrame none;
        const DicomFrame *f = h.frames > 0 ? &frames[i] : &none;
        Record r = named;
        int reason = r.reason ? r.reason : dicom_reason(&h, f, o->keep);
        snprintf(key, sizeof key, "%s|%.*s|%s|%d|%d|%d|%d|%.4g|%.4g|%d|%.4g|%.4g|%s|%s|%d|%s", h.series,
                 *h.series || !slash ? 0 : (int)(slash - name), name, h.study, h.rows, h.cols, h.type, f->stack, f->spacing_row,
                 f->spacing_col, f->echo_time >= 0 ? -1 : f->echo, f->echo_time, f->b_value, type, f->frame_type, reason, h.modality);
        r.series = hash_text(o, key);
        snprintf(key, sizeof key, "%s|%d|%s", h.instance, i, *h.instance ? "" : name);
        r.instance = hash_text(o, key);
        r.reason = (uint8_t)reason;
        r.modality = (uint8_t)modality;
        r.lossy = (uint8_t)h.lossy;
        r.frame = i;
        r.temporal = f->temporal, r.acquisition = f->acquisition, r.number = f->instance, r.time = f->time;
        int placed = f->has_position && f->has_orientation;
        for (int k = 0; k < 3; k++) {
            r.position[k] = placed ? f->position[k] : k == 2 ? f->instance : 0;
            r.row[k] = placed ? (float)f->row[k] : k == 0;
            r.column[k] = placed ? (float)f->column[k] : k == 1;
        }
        result_write(out, &r, sizeof r);
        if (reason == REASON_NOT_IMAGE) break;   // one line is enough for an object without frames
    }
    free(frames);
}

// DICM after the preamble; or, without one, a first element of group 2 or 8 with a value representation or a short length.
static inline int dicom_sniff(const uint8_t *b, int n, const char *path) {
    if (n >= 132 && !memcmp(b + 128, "DICM", 4)) return 1;
    int little = n >= 8 && (b[0] == 2 || b[0] == 8) && b[1] == 0 && b[3] == 0, big = n >= 8 && b[0] == 0 && b[1] == 8 && b[2] == 0;
    int explicit_vr = isupper(b[4]) && isupper(b[5]), short_value = b[4] < 128 && b[4] % 2 == 0 && !b[5] && !b[6] && !b[7];
    return ((little || big) && explicit_vr) || (little && short_value) || ends_with(path, ".dcm");
}

// Looks at the files of batch `task`; appends their records to *out. Files that have killed a worker are not opened again.
static inline void scan_batch(const Prep *prep, Pool *pool, int64_t task, PoolResult *out) {
    const Index *x = &prep->index;
    uint64_t first = (uint64_t)task * BATCH_FILES, last = first + BATCH_FILES < x->n_files ? first + BATCH_FILES : x->n_files;
    for (uint64_t i = first; i < last; i++) {
        FileEntry *f = index_file(x, i);
        uint8_t head[1024] = {0};
        int file = -1, kind = KIND_MISSING;
        if (!f->reason) {
            pool_item(pool, (int64_t)i);
            file = open(index_path(x, i), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
        }
        struct stat st;
        int usable = file >= 0 && fstat(file, &st) == 0 && S_ISREG(st.st_mode);
        ssize_t n = usable ? read(file, head, sizeof head) : -1;
        if (file >= 0) close(file);
        if (n >= 0) kind = dicom_sniff(head, (int)n, index_path(x, i)) ? KIND_DICOM : KIND_OTHER;
        if (n >= 0 && kind == KIND_OTHER) {
            int format = volumefile_sniff(head, (int)n, index_path(x, i));
            if (format && (format != VOLUME_FILE_NIFTI_IMG || f->named)) kind = KIND_VOLUME;
        }
        f->kind = (uint8_t)kind;
        if (kind == KIND_DICOM) scan_dicom(prep, i, out);
        else if (kind != KIND_OTHER || f->named) {
            int reason = f->reason ? f->reason : kind == KIND_MISSING ? REASON_UNREADABLE : kind == KIND_OTHER ? REASON_UNKNOWN : 0;
            Record r = scan_named(prep, i, kind, reason);
            result_write(out, &r, sizeof r);
        }
    }
    pool_item(pool, -1);
}

#endif
