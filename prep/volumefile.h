/*
Volume files of every format behind one interface. A file with several volumes is unpacked once.

  VOLUMES_BUILT      0 where this build cannot read them; the functions below then refuse
  volumefile_sniff   what a file is, by its first bytes
  volumefile_open    reads and checks a header
  volumefile_next    reads the next volume, or steps over it
  volumefile_close   reads on to the end, so that checksums are verified, and frees everything
*/
#ifndef CURIA_VOLUMEFILE_H
#define CURIA_VOLUMEFILE_H

#include "nifti.h"
#include "nrrd.h"
#include "metaimage.h"

static inline int volumefile_named(const char *path, const char *end) {
    size_t n = strlen(path), m = strlen(end);
    return n >= m && !strcasecmp(path + n - m, end);
}

// The VOLUME_FILE_* of a file by its first n bytes, of which 1000 are enough; where they tell nothing, its name says what it
// should be, and volumefile_open what is wrong with it. A .img has no content to go by: its .hdr is to be opened.
static inline int volumefile_sniff(const uint8_t *first_bytes, int n, const char *path) {
    static const struct { const char *end; int kind; } names[] = {
        {".nii", VOLUME_FILE_NIFTI}, {".nii.gz", VOLUME_FILE_NIFTI}, {".nrrd", VOLUME_FILE_NRRD}, {".nhdr", VOLUME_FILE_NRRD},
        {".mha", VOLUME_FILE_METAIMAGE}, {".mhd", VOLUME_FILE_METAIMAGE}, {".img", VOLUME_FILE_NIFTI_IMG},
        {".img.gz", VOLUME_FILE_NIFTI_IMG}};
    char b[1024] = {0};
    memcpy(b, first_bytes, n < 1000 ? (size_t)n : 1000);
#ifdef CURIA_VOLUMES
    if (n > 18 && first_bytes[0] == 0x1f && first_bytes[1] == 0x8b) {
        char unused[128];
        Stream *s = stream_new(-1, STREAM_GZIP);
        s->inflate.avail_in = (uint32_t)(n < STREAM_BUFFER ? n : STREAM_BUFFER);
        memcpy(s->inflate.next_in, first_bytes, s->inflate.avail_in);
        n = stream_read(s, b, 348, unused, sizeof unused) ? 0 : 348;
        stream_close(s);
    }
#endif
    int32_t length;
    memcpy(&length, b, sizeof length);
    int32_t other = (int32_t)__builtin_bswap32((uint32_t)length);
    if (n >= 348 && (length == 348 || length == 540 || other == 348 || other == 540)) return VOLUME_FILE_NIFTI;
    if (n >= 8 && !memcmp(b, "NRRD0", 5)) return VOLUME_FILE_NRRD;
    for (int i = 0; i < 2; i++) {
        const char *field = strstr(b, i ? "NDims" : "ObjectType");
        if (field && (field == b || field[-1] == '\n') && field[strcspn(field, " =")] && field[strcspn(field, "=\n")] == '=')
            return VOLUME_FILE_METAIMAGE;
    }
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (volumefile_named(path, names[i].end)) return names[i].kind;
    return VOLUME_FILE_NONE;
}

#ifdef CURIA_VOLUMES

enum { VOLUMES_BUILT = 1 };

// 0 good, else -1 and *reason, and there is nothing to close.
static inline int volumefile_open(const char *path, VolumeFile *f, char *reason, size_t size) {
    uint8_t first[1000];
    memset(f, 0, sizeof *f);
    f->slope = f->volumes = f->n[0] = f->n[1] = f->n[2] = 1;
    Stream *s = stream_open(path, 0, STREAM_PLAIN, reason, size);
    const char *why = NULL;
    int64_t n = s ? stream_some(s, first, sizeof first, &why) : -1;
    if (s && n < 0) snprintf(reason, size, "cannot be read: %s", why);
    stream_close(s);
    if (n < 0) return -1;
    f->kind = volumefile_sniff(first, (int)n, path);
    int bad = f->kind == VOLUME_FILE_NIFTI ? nifti_open(path, f, reason, size)
              : f->kind == VOLUME_FILE_NRRD ? nrrd_open(path, f, reason, size)
              : f->kind == VOLUME_FILE_METAIMAGE ? metaimage_open(path, f, reason, size) : -1;
    if (f->kind == VOLUME_FILE_NIFTI_IMG) snprintf(reason, size, "the voxels of a .hdr/.img pair: give its .hdr");
    if (f->kind == VOLUME_FILE_NONE) snprintf(reason, size, "not NIfTI, NRRD or MetaImage");
    if (!bad && !f->run) f->run = (int64_t)f->n[0] * f->n[1] * f->n[2];
    if (!bad) bad = volumefile_ready(f, reason, size);
    if (bad) volumefile_free(f);
    return bad;
}

// The next volume to *v, for the caller to volume_free; where it is not wanted *v becomes 0. 0 good; else -1 and *reason: if
// v->n is set its voxels were read and cannot be stored, and the next volumes may be good. Volumes whose voxels are mixed
// (the axis that counts them is not the last) are all read at once.
static inline int volumefile_next(VolumeFile *f, int wanted, Volume *v, char *reason, size_t size) {
    uint64_t bytes = volumefile_volume_bytes(f), run = (uint64_t)f->run * raw_bytes(f->type);
    int mixed = run < bytes && f->volumes > 1;
    memset(v, 0, sizeof *v);
    if (f->failed || f->next == f->volumes) {
        snprintf(reason, size, f->failed ? "cut short or damaged: an earlier volume could not be read" : "no further volume");
        return -1;
    }
    uint64_t number = (uint64_t)f->next++;
    if (!wanted) return mixed ? 0 : volumefile_voxels(f, NULL, bytes, reason, size);
    int load = mixed && !f->all;
    if (!f->raw) f->raw = (uint8_t *)malloc(bytes);
    if (load) f->all = (uint8_t *)malloc(bytes * (uint64_t)f->volumes);
    if (!f->raw || (mixed && !f->all)) {
        double gib = (double)bytes * (load ? (double)f->volumes : 1) / 1073741824;
        snprintf(reason, size, "%.1f GiB of voxels do not fit in memory", gib);
        f->failed = 1;
        return -1;
    }
    if (load && volumefile_voxels(f, f->all, bytes * (uint64_t)f->volumes, reason, size)) return -1;
    if (!mixed && volumefile_voxels(f, f->raw, bytes, reason, size)) return -1;
    for (uint64_t i = 0; mixed && i < bytes / run; i++)
        memcpy(f->raw + i * run, f->all + (i * (uint64_t)f->volumes + number) * run, run);
    int each = raw_bytes(f->type);
    if (f->swapped && each > 1) nifti_swap_Nbytes((int64_t)bytes / each, each, f->raw);
    *v = f->grid;
    void *raw = f->raw;
    int bad = volume_store(v, &raw, f->type, f->slope, f->inter, reason, size);
    f->raw = (uint8_t *)raw;
    return bad;
}

// 0, or -1 and *reason where what is left of the file is damaged: its volumes are then not to be used.
static inline int volumefile_close(VolumeFile *f, char *reason, size_t size) {
    uint64_t left = f->all ? 0 : (uint64_t)(f->volumes - f->next) * volumefile_volume_bytes(f);
    int bad = f->failed;
    if (bad) snprintf(reason, size, "cut short or damaged: a volume could not be read");
    else bad = volumefile_voxels(f, NULL, left, reason, size) || (f->stream && stream_finish(f->stream, reason, size));
    volumefile_free(f);
    return bad ? -1 : 0;
}

#else

enum { VOLUMES_BUILT = 0 };

static inline int volumefile_open(const char *path, VolumeFile *f, char *reason, size_t size) {
    (void)path;
    memset(f, 0, sizeof *f);
    snprintf(reason, size, "this prep was built without niftilib, zlib and ISA-L: install libnifti2-dev, zlib1g-dev and "
             "libisal-dev, and run make again");
    return -1;
}

static inline int volumefile_next(VolumeFile *f, int wanted, Volume *v, char *reason, size_t size) {
    (void)wanted;
    memset(v, 0, sizeof *v);
    return volumefile_open("", f, reason, size);
}

static inline int volumefile_close(VolumeFile *f, char *reason, size_t size) { return volumefile_open("", f, reason, size); }

#endif
#endif
