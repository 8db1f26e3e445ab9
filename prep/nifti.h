/*
NIfTI-1 and NIfTI-2, .nii and .nii.gz. Byte order, quaternions and orientation are niftilib's; the checks and the reading of
voxels are ours, because niftilib accepts offsets and sizes that cannot be, and turns NaN into 0.

  NiftiHeader      the parts of a header that prep uses, in native byte order
  nifti_open       reads and checks a header: nothing is allocated from a size that the file cannot hold
  nifti_volumes    how many volumes a file holds
  nifti_read       reads one volume of a file to a Volume
  NIFTI_BUILT      0 where this build has no niftilib; the two functions above then refuse
*/
#ifndef CURIA_NIFTI_H
#define CURIA_NIFTI_H

#include "volume.h"  // first: it includes dirent.h, whose DT_UNKNOWN must come before nifti1.h's

#ifdef CURIA_NIFTI
#include <nifti2_io.h>
#include <zlib.h>

enum { NIFTI_BUILT = 1 };

typedef struct {
    nifti_2_header header;   // a NIfTI-1 header is widened to this
    int swapped, type;       // type: RAW_*
    int64_t volumes;         // of dim[4]
    double vox_offset;
} NiftiHeader;

// The RAW_* of a NIfTI datatype, or -1 and what it is.
static inline int nifti_type(int datatype, const char **what) {
    switch (datatype) {
        case DT_UINT8: return RAW_U8;
        case DT_INT8: return RAW_I8;
        case DT_UINT16: return RAW_U16;
        case DT_INT16: return RAW_I16;
        case DT_UINT32: return RAW_U32;
        case DT_INT32: return RAW_I32;
        case DT_UINT64: return RAW_U64;
        case DT_INT64: return RAW_I64;
        case DT_FLOAT32: return RAW_F32;
        case DT_FLOAT64: return RAW_F64;
        case DT_RGB24: case DT_RGBA32: *what = "colour"; return -1;
        case DT_COMPLEX64: case DT_COMPLEX128: case DT_COMPLEX256: *what = "complex numbers"; return -1;
        default: *what = "an unknown or unsupported number type"; return -1;
    }
}

// Reads exactly n bytes of a plain or gzip file. 0 good, else -1 and *reason: a short or damaged stream is never padded.
static inline int nifti_bytes(gzFile file, void *out, uint64_t n, char *reason, size_t size) {
    for (uint64_t done = 0; done < n;) {
        unsigned chunk = n - done > 1 << 24 ? 1 << 24 : (unsigned)(n - done);
        int got = gzread(file, (char *)out + done, chunk), error;
        if (got > 0) {
            done += (unsigned)got;
            continue;
        }
        const char *message = gzerror(file, &error);
        snprintf(reason, size, "cut short or damaged: %llu of %llu bytes could be read%s%s", (unsigned long long)done,
                 (unsigned long long)n, error ? ", " : "", error ? message : "");
        return -1;
    }
    return 0;
}

// Checks a header in native byte order against the file's size on disk. 0 good, else -1 and *reason.
static inline int nifti_check(NiftiHeader *h, uint64_t file_bytes, int gzip, char *reason, size_t size) {
    const nifti_2_header *n = &h->header;
    const char *what = NULL;
    if (n->dim[0] < 2 || n->dim[0] > 7) {
        snprintf(reason, size, "dim[0] is %lld, and 2 to 4 can be read", (long long)n->dim[0]);
        return -1;
    }
    double voxels = 1;
    for (int i = 1; i <= n->dim[0]; i++) {
        if (n->dim[i] < 1 || (i < 4 && n->dim[i] > SHARD_MAX_SIDE)) {
            snprintf(reason, size, "dim[%d] is %lld, and 1 to %d can be read", i, (long long)n->dim[i], SHARD_MAX_SIDE);
            return -1;
        }
        voxels *= (double)n->dim[i];
        if (i > 4 && n->dim[i] > 1) {
            snprintf(reason, size, "%d-D data (vectors or warps), not an image", (int)n->dim[0]);
            return -1;
        }
    }
    h->volumes = n->dim[0] >= 4 ? n->dim[4] : 1;
    h->type = nifti_type(n->datatype, &what);
    if (h->type < 0) {
        snprintf(reason, size, "datatype %d: %s, not an image of one value per voxel", n->datatype, what);
        return -1;
    }
    if (n->bitpix != 8 * raw_bytes(h->type)) {
        snprintf(reason, size, "datatype %d has %d bits a voxel, and the header says %d", n->datatype, 8 * raw_bytes(h->type),
                 n->bitpix);
        return -1;
    }
    double least = n->sizeof_hdr == 348 ? 352 : 544, need = h->vox_offset + voxels * raw_bytes(h->type);
    if (!(h->vox_offset >= least) || h->vox_offset != floor(h->vox_offset) || h->vox_offset > 1e9) {
        snprintf(reason, size, "vox_offset is %g, and in a single file it is %g or more", h->vox_offset, least);
        return -1;
    }
    if (need > (gzip ? 1032.0 * file_bytes + 1024 : (double)file_bytes)) { // deflate cannot shrink more than 1032 times
        snprintf(reason, size, "its header asks for %.0f bytes, more than the file can hold", need);
        return -1;
    }
    return 0;
}

// Opens a NIfTI file and reads its header. NULL and *reason where it is not usable.
static inline gzFile nifti_open(const char *path, NiftiHeader *h, char *reason, size_t size) {
    struct stat st;
    uint8_t bytes[sizeof(nifti_2_header)];
    int32_t length;
    memset(h, 0, sizeof *h);
    gzFile file = stat(path, &st) ? NULL : gzopen(path, "rb");
    if (!file) {
        snprintf(reason, size, "cannot be opened: %s", strerror(errno));
        return NULL;
    }
    gzbuffer(file, 1 << 18);
    int bad = nifti_bytes(file, bytes, 348, reason, size);
    memcpy(&length, bytes, 4);
    h->swapped = !bad && length != 348 && length != 540;
    int second = length == 540 || length == (int32_t)__builtin_bswap32(540);
    nifti_1_header one;
    memcpy(&one, bytes, sizeof one);
    if (!bad && second) bad = nifti_bytes(file, bytes + 348, sizeof bytes - 348, reason, size);
    if (!bad && second) {
        memcpy(&h->header, bytes, sizeof h->header);
        if (h->swapped) nifti_swap_as_nifti2(&h->header);
        h->vox_offset = (double)h->header.vox_offset;
        if (memcmp(h->header.magic, "n+2\0\r\n\032\n", 8)) bad = 1;
    } else if (!bad) {
        if (h->swapped) nifti_swap_as_nifti1(&one);
        h->header = (nifti_2_header){
            .sizeof_hdr = 348, .datatype = one.datatype, .bitpix = one.bitpix, .scl_slope = one.scl_slope,
            .scl_inter = one.scl_inter, .qform_code = one.qform_code, .sform_code = one.sform_code, .quatern_b = one.quatern_b,
            .quatern_c = one.quatern_c, .quatern_d = one.quatern_d, .qoffset_x = one.qoffset_x, .qoffset_y = one.qoffset_y,
            .qoffset_z = one.qoffset_z, .xyzt_units = one.xyzt_units};
        for (int i = 0; i < 8; i++) h->header.dim[i] = one.dim[i], h->header.pixdim[i] = one.pixdim[i];
        for (int i = 0; i < 4; i++)
            h->header.srow_x[i] = one.srow_x[i], h->header.srow_y[i] = one.srow_y[i], h->header.srow_z[i] = one.srow_z[i];
        h->vox_offset = one.vox_offset;
        if (memcmp(one.magic, "n+1", 4)) bad = 1;
    }
    if (bad == 1) snprintf(reason, size, "an Analyze or .hdr/.img pair: convert it to a single .nii file");
    if (!bad) bad = nifti_check(h, (uint64_t)st.st_size, !gzdirect(file), reason, size);
    if (!bad) return file;
    gzclose(file);
    return NULL;
}

static inline int nifti_usable(nifti_dmat44 m) {
    double det = 0, length[3];
    for (int j = 0; j < 3; j++) length[j] = sqrt(m.m[0][j] * m.m[0][j] + m.m[1][j] * m.m[1][j] + m.m[2][j] * m.m[2][j]);
    for (int j = 0; j < 3; j++)
        det += m.m[0][j] * (m.m[1][(j + 1) % 3] * m.m[2][(j + 2) % 3] - m.m[1][(j + 2) % 3] * m.m[2][(j + 1) % 3]);
    return isfinite(det) && fabs(det) > 1e-4 * length[0] * length[1] * length[2] && fabs(det) > 1e-18;
}

// Spacing (mm) and orientation of *v: the sform where its code is above 0, else the qform, else pixdim along RAS with a
// note. Notes where both are set and differ by more than 1e-3 of a voxel per voxel. 0 good, else -1 and *reason.
static inline int nifti_geometry(const NiftiHeader *h, Volume *v, char *reason, size_t size) {
    const nifti_2_header *n = &h->header;
    double pixdim[4], unit = (n->xyzt_units & 7) == NIFTI_UNITS_METER    ? 1000
                             : (n->xyzt_units & 7) == NIFTI_UNITS_MICRON ? 0.001
                                                                         : 1;
    for (int i = 1; i < 4; i++) {
        pixdim[i] = fabs(n->pixdim[i]);
        if (pixdim[i] > 0 && isfinite(pixdim[i])) continue;
        if (n->sform_code <= 0) volume_note(v, "pixdim[%d] is %g: taken as 1", i, n->pixdim[i]);
        pixdim[i] = 1;
    }
    nifti_dmat44 s = {{{0}}}, q, *m = NULL,
                 plain = {{{pixdim[1], 0, 0, 0}, {0, pixdim[2], 0, 0}, {0, 0, pixdim[3], 0}, {0, 0, 0, 1}}};
    for (int j = 0; j < 4; j++) s.m[0][j] = n->srow_x[j], s.m[1][j] = n->srow_y[j], s.m[2][j] = n->srow_z[j];
    q = nifti_quatern_to_dmat44(n->quatern_b, n->quatern_c, n->quatern_d, n->qoffset_x, n->qoffset_y, n->qoffset_z, pixdim[1],
                                pixdim[2], pixdim[3], n->pixdim[0] < 0 ? -1 : 1);
    int has_s = n->sform_code > 0 && nifti_usable(s), has_q = n->qform_code > 0 && nifti_usable(q);
    if (n->sform_code > 0 && !has_s) volume_note(v, "the sform is singular: not used");
    m = has_s ? &s : has_q ? &q : &plain;
    if (!has_s && !has_q) volume_note(v, "no orientation in the header: taken as RAS");
    if (has_s && has_q) {
        double apart = 0;
        for (int i = 0; i < 3; i++)
            for (int j = 0; j < 3; j++) apart = fmax(apart, fabs(s.m[i][j] - q.m[i][j]) / pixdim[j + 1]);
        if (apart > 1e-3) volume_note(v, "sform and qform differ (%.3g of a voxel per voxel): the sform is used", apart);
    }
    int code[3];
    nifti_dmat44_to_orientation(*m, &code[0], &code[1], &code[2]);
    double oblique = 1;
    for (int a = 0; a < 3; a++) {
        if (code[a] == 0) {
            snprintf(reason, size, "its orientation cannot be told from the header");
            return -1;
        }
        v->axis[a] = code[a] == NIFTI_L2R || code[a] == NIFTI_R2L ? 0 : code[a] == NIFTI_P2A || code[a] == NIFTI_A2P ? 1 : 2;
        v->flip[a] = code[a] == NIFTI_L2R || code[a] == NIFTI_P2A || code[a] == NIFTI_S2I;
        double length = sqrt(m->m[0][a] * m->m[0][a] + m->m[1][a] * m->m[1][a] + m->m[2][a] * m->m[2][a]);
        v->spacing[a] = unit * length;
        oblique = fmin(oblique, fabs(m->m[v->axis[a]][a]) / length);
        if (v->spacing[a] > 1e-3 && v->spacing[a] < 1e3) continue;
        snprintf(reason, size, "a spacing of %g mm is not one of a body", v->spacing[a]);
        return -1;
    }
    if (oblique < 0.94) volume_note(v, "oblique: axes %.0f degrees off the body's", acos(oblique) * 57.29578);
    return 0;
}

// How many volumes (dim[4]) the file at path holds, or -1 and *reason.
static inline int64_t nifti_volumes(const char *path, char *reason, size_t size) {
    NiftiHeader h;
    gzFile file = nifti_open(path, &h, reason, size);
    if (file) gzclose(file);
    return file ? h.volumes : -1;
}

// Reads volume `number` (of dim[4]) of the file at path. Reads on to the file's end, so that gzip's checksum is checked.
// 0 good, else -1 and *reason; *v is then to be dropped.
static inline int nifti_read(const char *path, int64_t number, Volume *v, char *reason, size_t size) {
    NiftiHeader h;
    memset(v, 0, sizeof *v);
    *reason = 0;
    gzFile file = nifti_open(path, &h, reason, size);
    if (!file) return -1;
    for (int i = 0; i < 3; i++) v->n[i] = i < h.header.dim[0] ? (int)h.header.dim[i + 1] : 1;
    uint64_t count = (uint64_t)v->n[0] * v->n[1] * v->n[2], bytes = count * raw_bytes(h.type);
    uint64_t skip = (uint64_t)h.vox_offset - h.header.sizeof_hdr + number * bytes, rest = (h.volumes - 1 - number) * bytes;
    uint8_t *data = (uint8_t *)malloc(bytes ? bytes : 1), scrap[65536];
    int bad = data ? 0 : -1;
    if (bad) snprintf(reason, size, "%.1f GiB of voxels do not fit in memory", bytes / 1073741824.0);
    for (uint64_t n; !bad && skip; skip -= n)
        bad = nifti_bytes(file, scrap, n = skip < sizeof scrap ? skip : sizeof scrap, reason, size);
    if (!bad) bad = nifti_bytes(file, data, bytes, reason, size);
    for (uint64_t n; !bad && rest; rest -= n)
        bad = nifti_bytes(file, scrap, n = rest < sizeof scrap ? rest : sizeof scrap, reason, size);
    int got, error = 0;
    while (!bad && (got = gzread(file, scrap, sizeof scrap)) != 0)
        if (got < 0) bad = -1;
    if (!bad) gzerror(file, &error);
    if (bad && !*reason) snprintf(reason, size, "cut short or damaged: %s", gzerror(file, &error));
    else if (!bad && error == Z_BUF_ERROR) bad = -1, snprintf(reason, size, "cut short: its gzip stream has no end");
    gzclose(file);
    if (!bad && h.swapped && raw_bytes(h.type) > 1) nifti_swap_Nbytes((int64_t)count, raw_bytes(h.type), data);
    double slope = h.header.scl_slope, inter = h.header.scl_inter;
    if (slope == 0 || !isfinite(slope)) slope = 1, inter = 0;
    if (!isfinite(inter)) inter = 0;
    if (!bad) bad = nifti_geometry(&h, v, reason, size);
    if (!bad) bad = volume_store(v, data, h.type, slope, inter, reason, size);
    free(data);
    return bad;
}

#else

enum { NIFTI_BUILT = 0 };

static inline int64_t nifti_volumes(const char *path, char *reason, size_t size) {
    snprintf(reason, size, "%s is NIfTI, and this prep was built without niftilib", path);
    return -1;
}

static inline int nifti_read(const char *path, int64_t number, Volume *v, char *reason, size_t size) {
    (void)number, (void)v;
    return (int)nifti_volumes(path, reason, size);
}

#endif
#endif
