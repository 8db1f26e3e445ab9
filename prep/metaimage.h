/*
MetaImage (itk.org/Wiki/MetaIO/Documentation): a text header before the voxels (.mha) or beside them (.mhd). As ITK reads it.

  metaimage_types    number types
  MetaImageHeader    what the fields say
  metaimage_field    reads one
  metaimage_open     reads and checks a header
*/
#ifndef CURIA_METAIMAGE_H
#define CURIA_METAIMAGE_H

#include "stream.h"

#ifdef CURIA_VOLUMES

static const char *const metaimage_types[] = {
    [RAW_U8] = "MET_UCHAR", [RAW_I8] = "MET_CHAR", [RAW_U16] = "MET_USHORT", [RAW_I16] = "MET_SHORT", [RAW_U32] = "MET_UINT",
    [RAW_I32] = "MET_INT", [RAW_U64] = "MET_ULONG_LONG", [RAW_I64] = "MET_LONG_LONG", [RAW_F32] = "MET_FLOAT",
    [RAW_F64] = "MET_DOUBLE"};

enum { METAIMAGE_AXES = 4 };

typedef struct {
    int n_sizes, n_matrix, n_origin, n_spacing, n_extent, text, compressed, big, rescaled, ended;
    double axes, channels, header_bytes, sizes[METAIMAGE_AXES], matrix[METAIMAGE_AXES * METAIMAGE_AXES];
    double origin[METAIMAGE_AXES], spacing[METAIMAGE_AXES], extent[METAIMAGE_AXES];
    int detached, per_file;     // per_file: axes of the block of voxels in each listed file; 0: a single file
} MetaImageHeader;

// Reads the field `name` with what follows its equals sign; cuts value to pieces. Other fields do not matter here, nor do they
// to ITK: AnatomicalOrientation, CenterOfRotation. 1 good, 0 where the value cannot be used, -1 and *reason.
static inline int metaimage_field(MetaImageHeader *x, VolumeFile *f, Stream *s, const char *path, const char *name, char *value,
                                  char *reason, size_t size) {
    int yes = *value && strchr("TtYy1", *value);
    if (!strcmp(name, "ObjectType")) return !strcasecmp(value, "Image");
    if (!strcmp(name, "NDims")) return text_numbers(value, &x->axes, 1) == 1 && x->axes >= 2 && x->axes <= METAIMAGE_AXES;
    if (!strcmp(name, "DimSize")) return (x->n_sizes = text_numbers(value, x->sizes, METAIMAGE_AXES)) > 0;
    if (!strcmp(name, "ElementSpacing")) return (x->n_spacing = text_numbers(value, x->spacing, METAIMAGE_AXES)) > 0;
    if (!strcmp(name, "ElementSize")) return (x->n_extent = text_numbers(value, x->extent, METAIMAGE_AXES)) > 0;
    if (!strcmp(name, "ElementNumberOfChannels")) return text_numbers(value, &x->channels, 1) == 1;
    if (!strcmp(name, "HeaderSize"))
        return text_numbers(value, &x->header_bytes, 1) == 1 && x->header_bytes >= -1 && x->header_bytes < 1e15;
    if (!strcmp(name, "TransformMatrix") || !strcmp(name, "Rotation") || !strcmp(name, "Orientation"))
        return (x->n_matrix = text_numbers(value, x->matrix, METAIMAGE_AXES * METAIMAGE_AXES)) > 0;
    if (!strcmp(name, "Offset") || !strcmp(name, "Position") || !strcmp(name, "Origin"))
        return (x->n_origin = text_numbers(value, x->origin, METAIMAGE_AXES)) > 0;
    if (!strcmp(name, "BinaryData")) x->text = !yes;
    if (!strcmp(name, "CompressedData")) x->compressed = yes;
    if (!strcmp(name, "BinaryDataByteOrderMSB") || !strcmp(name, "ElementByteOrderMSB")) x->big = yes;
    if (!strcmp(name, "ElementToIntensityFunctionSlope")) x->rescaled |= atof(value) != 1;
    if (!strcmp(name, "ElementToIntensityFunctionOffset")) x->rescaled |= atof(value) != 0;
    if (!strcmp(name, "ElementType")) {
        for (int i = 0; i < (int)(sizeof metaimage_types / sizeof *metaimage_types); i++)
            if (!strcmp(metaimage_types[i], value)) f->type = i;
        if (!strcmp(value, "MET_LONG")) f->type = RAW_I32;      // 4 bytes in this format, whatever the machine's long
        if (!strcmp(value, "MET_ULONG")) f->type = RAW_U32;
        return f->type >= 0;
    }
    if (strcmp(name, "ElementDataFile")) return 1;
    double numbers[3];
    char *rest = strchr(value, ' '), line[4096];
    int n = rest ? text_numbers(rest, numbers, 3) : 0, last = (int)x->axes - 1;
    x->ended = 1;
    if (!strcasecmp(value, "LOCAL")) return 1;
    x->detached = 1;
    if (!strncmp(value, "LIST", 4) && (value[4] == 0 || value[4] == ' ')) {
        x->per_file = rest && atoi(rest) > 0 && atoi(rest) <= x->axes ? atoi(rest) : last;      // "LIST 2D" too
        while (stream_line(s, line, sizeof line))
            if (*line && volumefile_part(f, path, line, reason, size)) return -1;
        return 1;
    }
    if (!strchr(value, '%') || (rest && n < 1)) return volumefile_part(f, path, value, reason, size) ? -1 : 1;
    x->per_file = last;
    if (rest) *rest = 0;
    double from = n > 0 ? numbers[0] : 1, to = n > 1 ? numbers[1] : last >= 0 ? x->sizes[last] : 1, step = n > 2 ? numbers[2] : 1;
    return volumefile_pattern(f, path, value, from, to, step, reason, size) ? -1 : 1;
}

// Reads the header of a file that begins with MetaImage's fields. 0 good, else -1 and *reason; the caller frees *f.
static inline int metaimage_open(const char *path, VolumeFile *f, char *reason, size_t size) {
    MetaImageHeader x = {.channels = 1};
    char line[4096], *value = line;
    const char *missing = NULL;
    int good = 1;
    f->type = -1;
    Stream *s = stream_open(path, 0, STREAM_PLAIN, reason, size);
    if (!s) return -1;
    while (good > 0 && !x.ended && stream_line(s, line, sizeof line)) {
        if (!*line) continue;
        value = strchr(line, '=');
        good = value && value > line;
        if (!good) break;
        char *end = value++;
        while (end > line && end[-1] == ' ') end--;
        *end = 0;
        value += strspn(value, " ");
        good = metaimage_field(&x, f, s, path, line + strspn(line, " "), value, reason, size);
    }
    uint64_t at = stream_at(s);
    stream_close(s);
    if (good < 0) return -1;
    if (!good) return text_refused(line, value, reason, size);
    int axes = (int)x.axes, n_spacing = x.n_spacing ? x.n_spacing : x.n_extent;
    const double *spacings = x.n_spacing ? x.spacing : x.extent;
    if (!axes) missing = "NDims";
    else if (x.n_sizes != axes) missing = "a size for each axis";
    else if (f->type < 0) missing = "ElementType";
    else if (x.detached ? !f->n_parts : !x.ended) missing = "ElementDataFile";
    else if (n_spacing && n_spacing != axes) missing = "a spacing for each axis";
    else if (x.n_matrix && x.n_matrix != axes * axes) missing = "a direction for each axis";
    else if (x.n_origin && x.n_origin != axes) missing = "an offset for each axis";
    if (missing) {
        snprintf(reason, size, "its header lacks %s", missing);
        return -1;
    }
    if (x.channels != 1) {
        snprintf(reason, size, "%g channels: colour or vectors, not an image of one value per voxel", x.channels);
        return -1;
    }
    for (int a = 0; a < axes; a++) {
        if (x.sizes[a] >= 1 && x.sizes[a] == floor(x.sizes[a]) && x.sizes[a] <= (a == 3 ? 1e9 : SHARD_MAX_SIDE)) continue;
        snprintf(reason, size, "its size along axis %d is %g, and 1 to %d can be read", a + 1, x.sizes[a], SHARD_MAX_SIDE);
        return -1;
    }
    for (int a = 0; a < axes && a < 3; a++) {
        f->n[a] = (int)x.sizes[a];
        f->grid.origin[a] = x.origin[a];
        for (int b = 0; b < axes && b < 3; b++)
            f->grid.step[a][b] = (n_spacing ? spacings[a] : 1) * (x.n_matrix ? x.matrix[a * axes + b] : a == b);
    }
    if (axes == 4) f->volumes = (int64_t)x.sizes[3];
    if (!x.n_matrix) volume_note(&f->grid, "no orientation in the header: taken as LPS");
    if (x.rescaled) volume_note(&f->grid, "ElementToIntensityFunction is not applied");
    f->coding = x.text ? VOXELS_TEXT : VOXELS_BINARY;
    f->format = x.compressed && !x.text ? STREAM_ZLIB : STREAM_PLAIN;
    f->swapped = x.big && !x.text;
    f->offset = x.header_bytes != 0 ? (int64_t)x.header_bytes : x.detached ? 0 : (int64_t)at;
    return volumefile_files(f, path, x.detached, x.per_file, x.sizes, axes, reason, size);
}

#endif
#endif
