/*
NIfTI-1 and NIfTI-2: single files and .hdr/.img pairs, plain or gzip. Byte order and quaternions are niftilib's; the checks and
the reading of voxels are ours, because niftilib accepts offsets and sizes that cannot be, and turns NaN into 0.

  nifti_type      the RAW_* of a NIfTI datatype
  nifti_check     a header against itself
  nifti_img       the path of a header's .img
  nifti_geometry  where the voxels lie, from sform, qform or pixdim
  nifti_open      reads and checks a header
*/
#ifndef CURIA_NIFTI_H
#define CURIA_NIFTI_H

#include "stream.h"  // first: it includes dirent.h, whose DT_UNKNOWN must come before nifti1.h's

#ifdef CURIA_VOLUMES
#include <nifti2_io.h>

// Or -1 and what it is.
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

// Checks a header in native byte order and fills type, n, volumes and skip of *f. pair: the voxels are in another file.
// 0 good, else -1 and *reason.
static inline int nifti_check(const nifti_2_header *h, double vox_offset, int pair, VolumeFile *f, char *reason, size_t size) {
    const char *what = NULL;
    if (h->dim[0] < 2 || h->dim[0] > 7) {
        snprintf(reason, size, "dim[0] is %lld, and 2 to 4 can be read", (long long)h->dim[0]);
        return -1;
    }
    for (int i = 1; i <= h->dim[0]; i++) {
        if (h->dim[i] < 1 || (i < 4 && h->dim[i] > SHARD_MAX_SIDE)) {
            snprintf(reason, size, "dim[%d] is %lld, and 1 to %d can be read", i, (long long)h->dim[i], SHARD_MAX_SIDE);
            return -1;
        }
        if (i < 4) f->n[i - 1] = (int)h->dim[i];
        if (i > 4 && h->dim[i] > 1) {
            snprintf(reason, size, "%d-D data (vectors or warps), not an image", (int)h->dim[0]);
            return -1;
        }
    }
    if (h->dim[0] >= 4) f->volumes = h->dim[4];
    f->type = nifti_type(h->datatype, &what);
    if (f->type < 0) {
        snprintf(reason, size, "datatype %d: %s, not an image of one value per voxel", h->datatype, what);
        return -1;
    }
    if (h->bitpix != 8 * raw_bytes(f->type)) {
        snprintf(reason, size, "datatype %d has %d bits a voxel, and the header says %d", h->datatype, 8 * raw_bytes(f->type),
                 h->bitpix);
        return -1;
    }
    double least = pair ? 0 : h->sizeof_hdr == 348 ? 352 : 544;
    if (!(vox_offset >= least) || vox_offset != floor(vox_offset) || vox_offset > 1e9) {
        snprintf(reason, size, "vox_offset is %g, and in a %s it is %g or more", vox_offset, pair ? "pair" : "single file",
                 least);
        return -1;
    }
    f->skip = (int64_t)vox_offset;
    return 0;
}

// The .img or .img.gz beside the .hdr or .hdr.gz at path, to image[4096]. 0 good, else -1 and *reason.
static inline int nifti_img(const char *path, char *image, char *reason, size_t size) {
    size_t n = strlen(path);
    if (n > 3 && !strcasecmp(path + n - 3, ".gz")) n -= 3;
    if (n < 4 || strncasecmp(path + n - 4, ".hdr", 4) || n > 4000) {
        snprintf(reason, size, "the header of a .hdr/.img pair, and its name does not end in .hdr");
        return -1;
    }
    static const char *const ends[] = {".img", ".img.gz", ".IMG", ".IMG.GZ"};
    for (int i = 0; i < 4; i++) {
        snprintf(image, 4096, "%.*s%s", (int)n - 4, path, ends[i]);
        if (access(image, F_OK) == 0) return 0;
    }
    snprintf(reason, size, "half of a .hdr/.img pair: its .img is not there");
    return -1;
}

static inline int nifti_usable(nifti_dmat44 m) {
    double det = 0, length[3];
    for (int j = 0; j < 3; j++) length[j] = sqrt(m.m[0][j] * m.m[0][j] + m.m[1][j] * m.m[1][j] + m.m[2][j] * m.m[2][j]);
    for (int j = 0; j < 3; j++)
        det += m.m[0][j] * (m.m[1][(j + 1) % 3] * m.m[2][(j + 2) % 3] - m.m[1][(j + 2) % 3] * m.m[2][(j + 1) % 3]);
    return isfinite(det) && fabs(det) > 1e-4 * length[0] * length[1] * length[2] && fabs(det) > 1e-18;
}

// Origin and steps of *v (mm, LPS): the sform where its code is above 0, else the qform, else pixdim along RAS with a note.
// Notes where both are set and differ by more than 1e-3 of a voxel per voxel.
static inline void nifti_geometry(const nifti_2_header *h, Volume *v) {
    double pixdim[4], unit = (h->xyzt_units & 7) == NIFTI_UNITS_METER    ? 1000
                             : (h->xyzt_units & 7) == NIFTI_UNITS_MICRON ? 0.001
                                                                         : 1;
    for (int i = 1; i < 4; i++) {
        pixdim[i] = fabs(h->pixdim[i]);
        if (pixdim[i] > 0 && isfinite(pixdim[i])) continue;
        if (h->sform_code <= 0) volume_note(v, "pixdim[%d] is %g: taken as 1", i, h->pixdim[i]);
        pixdim[i] = 1;
    }
    nifti_dmat44 s = {{{0}}}, q, *m = NULL,
                 plain = {{{pixdim[1], 0, 0, 0}, {0, pixdim[2], 0, 0}, {0, 0, pixdim[3], 0}, {0, 0, 0, 1}}};
    for (int j = 0; j < 4; j++) s.m[0][j] = h->srow_x[j], s.m[1][j] = h->srow_y[j], s.m[2][j] = h->srow_z[j];
    q = nifti_quatern_to_dmat44(h->quatern_b, h->quatern_c, h->quatern_d, h->qoffset_x, h->qoffset_y, h->qoffset_z, pixdim[1],
                                pixdim[2], pixdim[3], h->pixdim[0] < 0 ? -1 : 1);
    int has_s = h->sform_code > 0 && nifti_usable(s), has_q = h->qform_code > 0 && nifti_usable(q);
    if (h->sform_code > 0 && !has_s) volume_note(v, "the sform is singular: not used");
    m = has_s ? &s : has_q ? &q : &plain;
    if (!has_s && !has_q) volume_note(v, "no orientation in the header: taken as RAS");
    if (has_s && has_q) {
        double apart = 0;
        for (int i = 0; i < 3; i++)
            for (int j = 0; j < 3; j++) apart = fmax(apart, fabs(s.m[i][j] - q.m[i][j]) / pixdim[j + 1]);
        if (apart > 1e-3) volume_note(v, "sform and qform differ (%.3g of a voxel per voxel): the sform is used", apart);
    }
    for (int b = 0; b < 3; b++) {
        double to_lps = b < 2 ? -unit : unit;
        v->origin[b] = to_lps * m->m[b][3];
        for (int a = 0; a < 3; a++) v->step[a][b] = to_lps * m->m[b][a];
    }
}

// Reads the header of a file that begins as one. 0 good, else -1 and *reason; the caller frees *f in either case.
static inline int nifti_open(const char *path, VolumeFile *f, char *reason, size_t size) {
    uint8_t bytes[sizeof(nifti_2_header)];
    nifti_1_header one;
    nifti_2_header h = {0};
    int32_t length;
    char image[4096];
    Stream *s = stream_open(path, 0, STREAM_AUTO, reason, size);
    int bad = !s || stream_read(s, bytes, sizeof one, reason, size);
    if (!bad) memcpy(&length, bytes, sizeof length);
    int second = !bad && (length == 540 || length == (int32_t)__builtin_bswap32(540));
    if (second) bad = stream_read(s, bytes + sizeof one, sizeof bytes - sizeof one, reason, size);
    stream_close(s);
    if (bad) return -1;
    const char *magic = (const char *)bytes + (second ? 4 : 344);
    f->swapped = length != 348 && length != 540;
    double vox_offset;
    if (second) {
        memcpy(&h, bytes, sizeof h);
        if (f->swapped) nifti_swap_as_nifti2(&h);
        vox_offset = (double)h.vox_offset;
    } else {
        memcpy(&one, bytes, sizeof one);
        if (f->swapped) nifti_swap_as_nifti1(&one);
        h = (nifti_2_header){
            .sizeof_hdr = 348, .datatype = one.datatype, .bitpix = one.bitpix, .scl_slope = one.scl_slope,
            .scl_inter = one.scl_inter, .qform_code = one.qform_code, .sform_code = one.sform_code, .quatern_b = one.quatern_b,
            .quatern_c = one.quatern_c, .quatern_d = one.quatern_d, .qoffset_x = one.qoffset_x, .qoffset_y = one.qoffset_y,
            .qoffset_z = one.qoffset_z, .xyzt_units = one.xyzt_units};
        for (int i = 0; i < 8; i++) h.dim[i] = one.dim[i], h.pixdim[i] = one.pixdim[i];
        for (int i = 0; i < 4; i++)
            h.srow_x[i] = one.srow_x[i], h.srow_y[i] = one.srow_y[i], h.srow_z[i] = one.srow_z[i];
        vox_offset = one.vox_offset;
    }
    int single = second ? !memcmp(magic, "n+2\0\r\n\032\n", 8) : !memcmp(magic, "n+1", 4);
    int pair = second ? !memcmp(magic, "ni2\0\r\n\032\n", 8) : !memcmp(magic, "ni1", 4);
    if (!single && !pair) {
        snprintf(reason, size, "an Analyze 7.5 pair, or not marked as NIfTI: it does not tell left from right; convert it");
        return -1;
    }
    if (pair ? nifti_img(path, image, reason, size) : snprintf(image, sizeof image, "%s", path) >= (int)sizeof image) return -1;
    if (nifti_check(&h, vox_offset, pair, f, reason, size)) return -1;
    const char *slash = strrchr(image, '/');
    if (volumefile_part(f, path, slash ? slash + 1 : image, reason, size)) return -1;
    f->slope = h.scl_slope, f->inter = h.scl_inter;
    if (f->slope == 0 || !isfinite(f->slope)) f->slope = 1, f->inter = 0;
    if (!isfinite(f->inter)) f->inter = 0;
    nifti_geometry(&h, &f->grid);
    return 0;
}

#endif
#endif
