/*
safetensors: the file format of Hugging Face checkpoints, of our own, and of golden files. Every check that the official
reader makes (safetensors/src/tensor.rs; INTEROP 4.4) is made here.

  Dtype, dtype_name, dtype_bits   the format's number types
  SafeTensor, SafeTensors         a tensor in a file; a file, mapped
  safetensors_load                a file, or NULL and why
  safetensors_open                a file, or fail;  safetensors_close
  safetensors_check               whether a file is whole, and if not why
  safetensors_find                a tensor by name, or NULL
  safetensors_elements            its number of elements
  safetensors_read_f32/_f64/_i64  its values, converted;  float_from_f16, float_from_bf16  one value
  safetensors_metadata            a string of __metadata__ by key, or NULL
  SafeModel, safetensors_open_model, safetensors_model_find, safetensors_close_model
                                  a folder with model.safetensors, or with shards and an index
  SafeWriter, safetensors_write_begin/_declare/_data/_end
                                  a file written as a stream: no tensor is ever copied

The format: uint64 N, little endian; N bytes of JSON {name: {dtype, shape, data_offsets}}; then the data, without gaps.
*/
#ifndef CURIA_SAFETENSORS_H
#define CURIA_SAFETENSORS_H

#include <sys/mman.h>
#include "json.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "numbers are copied from and to the file as they are: little endian only"
#endif

typedef enum {
    DTYPE_F32, DTYPE_F64, DTYPE_F16, DTYPE_BF16, DTYPE_I64, DTYPE_I32, DTYPE_U8, DTYPE_BOOL,
    DTYPE_I16, DTYPE_I8, DTYPE_U64, DTYPE_U32, DTYPE_U16, DTYPE_C64, DTYPE_F8_E4M3, DTYPE_F8_E5M2, DTYPE_F8_E8M0,
    DTYPE_F8_E4M3FNUZ, DTYPE_F8_E5M2FNUZ, DTYPE_F6_E2M3, DTYPE_F6_E3M2, DTYPE_F4, DTYPE_COUNT
} Dtype;

static const struct { const char *name; int bits; } dtype_table[DTYPE_COUNT] = {
    {"F32", 32}, {"F64", 64}, {"F16", 16}, {"BF16", 16}, {"I64", 64}, {"I32", 32}, {"U8", 8}, {"BOOL", 8},
    {"I16", 16}, {"I8", 8}, {"U64", 64}, {"U32", 32}, {"U16", 16}, {"C64", 64}, {"F8_E4M3", 8}, {"F8_E5M2", 8}, {"F8_E8M0", 8},
    {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}, {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"F4", 4}};

static inline const char *dtype_name(Dtype d) { return dtype_table[d].name; }
static inline int dtype_bits(Dtype d) { return dtype_table[d].bits; }

enum { SAFETENSORS_RANK = 8 };
#define SAFETENSORS_HEADER_MAX 100000000u

typedef struct {
    const char *name;                   // lives as long as its file
    Dtype dtype;
    int rank;                           // 0: a scalar
    int64_t shape[SAFETENSORS_RANK];    // [rank]
    size_t offset, bytes;               // from the start of the file; aligned to nothing: memcpy, never cast
} SafeTensor;

typedef struct {
    char *path;
    const uint8_t *map;                 // [size] the whole file
    size_t size;
    SafeTensor *tensors;                // [count] sorted by name
    int count;
    Json *header;
    const Json *metadata;               // strings by key, or NULL
} SafeTensors;

static inline void safetensors_close(SafeTensors *st) {
    if (!st) return;
    if (st->map) munmap((void *)st->map, st->size);
    json_free(st->header);
    free(st->tensors);
    free(st->path);
    free(st);
}

static inline int safetensors_by_offset(const void *a, const void *b) {
    const SafeTensor *x = (const SafeTensor *)a, *y = (const SafeTensor *)b;
    if (x->offset != y->offset) return x->offset < y->offset ? -1 : 1;
    return x->bytes < y->bytes ? -1 : x->bytes > y->bytes;      // an empty tensor comes before the one that begins there
}

static inline int safetensors_by_name(const void *a, const void *b) {
    return strcmp(((const SafeTensor *)a)->name, ((const SafeTensor *)b)->name);
}

static inline int json_size(const Json *node, int64_t *out) { return json_integer(node, out) && node->text[0] != '-'; }

// bytes = product(shape) * bits / 8. 0 where that overflows or is no whole number of bytes.
static inline int safetensors_bytes(SafeTensor *t) {
    size_t bits = (size_t)dtype_bits(t->dtype), elements = 1;
    for (int i = 0; i < t->rank; i++) if (__builtin_mul_overflow(elements, (size_t)t->shape[i], &elements)) return 0;
    if (__builtin_mul_overflow(elements, bits, &bits) || bits % 8) return 0;
    t->bytes = bits / 8;
    return 1;
}

// One entry of the header into t, offset from the start of the data. On an error 0 and why.
static inline int safetensors_entry(const Json *entry, SafeTensor *t, char *why, size_t n) {
    const Json *dtype = json_get(entry, "dtype"), *shape = json_get(entry, "shape"), *offsets = json_get(entry, "data_offsets");
    if (!dtype || dtype->type != JSON_STRING || !shape || shape->type != JSON_ARRAY || !offsets || offsets->type != JSON_ARRAY) {
        snprintf(why, n, "expected an object with dtype, shape and data_offsets");
        return 0;
    }
    int d = 0;
    while (d < DTYPE_COUNT && strcmp(dtype->text, dtype_table[d].name)) d++;
    if (d == DTYPE_COUNT) {
        snprintf(why, n, "unknown dtype '%.40s'", dtype->text);
        return 0;
    }
    t->dtype = (Dtype)d;
    t->rank = shape->count;
    if (t->rank > SAFETENSORS_RANK) {
        snprintf(why, n, "%d dimensions; at most %d are supported", t->rank, SAFETENSORS_RANK);
        return 0;
    }
    for (int i = 0; i < t->rank; i++) {
        if (json_size(&shape->children[i], &t->shape[i])) continue;
        snprintf(why, n, "dimension %d of its shape is not an integer from 0 to 2^63-1", i);
        return 0;
    }
    int64_t begin, end;
    if (offsets->count != 2 || !json_size(&offsets->children[0], &begin) || !json_size(&offsets->children[1], &end) ||
        end < begin) {
        snprintf(why, n, "data_offsets are not two integers, begin <= end");
        return 0;
    }
    if (!safetensors_bytes(t)) {
        snprintf(why, n, "its shape overflows, or is no whole number of bytes");
        return 0;
    }
    t->offset = (size_t)begin;
    if ((size_t)(end - begin) == t->bytes) return 1;
    snprintf(why, n, "its shape and dtype need %zu bytes, and its data_offsets give %lld", t->bytes, (long long)(end - begin));
    return 0;
}

// Parses and checks the mapped file. On an error 0 and why.
static inline int safetensors_parse(SafeTensors *st, char *reason, size_t n) {
    uint64_t header;
    memcpy(&header, st->map, 8);
    if (header > SAFETENSORS_HEADER_MAX || header > st->size - 8) {
        int pickle = st->map[0] == 0x80 || !memcmp(st->map, "PK\3\4", 4);
        if (pickle)
            snprintf(reason, n, "is a PyTorch pickle; convert it to .safetensors with safetensors.torch.save_file in Python");
        else snprintf(reason, n, "is cut short or no safetensors file: its header should have %llu bytes, and the file has %zu",
                      (unsigned long long)header, st->size);
        return 0;
    }
    char why[512];
    const char *text = (const char *)st->map + 8;
    snprintf(why, sizeof why, "byte 0: expected '{'");
    st->header = header && text[0] == '{' ? json_parse(text, (size_t)header, why, sizeof why) : NULL;
    if (!st->header) {
        snprintf(reason, n, "the header is not JSON: %s", why);
        return 0;
    }
    st->metadata = json_get(st->header, "__metadata__");
    if (st->metadata && st->metadata->type == JSON_NULL) st->metadata = NULL;
    if (st->metadata && st->metadata->type != JSON_OBJECT) {
        snprintf(reason, n, "__metadata__ is not an object");
        return 0;
    }
    for (int i = 0; st->metadata && i < st->metadata->count; i++) {
        if (st->metadata->children[i].type == JSON_STRING) continue;
        snprintf(reason, n, "__metadata__: '%.200s' is not a string", st->metadata->keys[i]);
        return 0;
    }
    st->tensors = (SafeTensor *)calloc((size_t)st->header->count + 1, sizeof *st->tensors);
    if (!st->tensors) {
        snprintf(reason, n, "out of memory for %d tensors", st->header->count);
        return 0;
    }
    for (int i = 0; i < st->header->count; i++) {
        SafeTensor *t = &st->tensors[st->count];
        t->name = st->header->keys[i];
        if (!strcmp(t->name, "__metadata__")) continue;
        if (!safetensors_entry(&st->header->children[i], t, why, sizeof why)) {
            snprintf(reason, n, "tensor '%.200s': %s", t->name, why);
            return 0;
        }
        st->count++;
    }
    qsort(st->tensors, (size_t)st->count, sizeof *st->tensors, safetensors_by_offset);
    size_t end = 0;
    for (int i = 0; i < st->count; i++) {
        SafeTensor *t = &st->tensors[i];
        if (t->offset != end) {
            snprintf(reason, n, "tensor '%.200s': begins at byte %zu of the data, %s", t->name, t->offset,
                     t->offset > end ? "after a hole" : "within another tensor");
            return 0;
        }
        end += t->bytes;
        t->offset += 8 + (size_t)header;
    }
    if (end != st->size - 8 - (size_t)header) {
        snprintf(reason, n, "%s: the header describes %zu bytes of data, and the file has %zu",
                 end > st->size - 8 - (size_t)header ? "is cut short" : "has bytes at its end that belong to no tensor", end,
                 st->size - 8 - (size_t)header);
        return 0;
    }
    qsort(st->tensors, (size_t)st->count, sizeof *st->tensors, safetensors_by_name);
    return 1;
}

// The file checked and mapped, or NULL and in reason one line that goes behind "PATH: ".
static inline SafeTensors *safetensors_load(const char *path, char *reason, size_t n) {
    int fd = open(path, O_RDONLY);
    struct stat info;
    if (fd < 0 || fstat(fd, &info)) {
        snprintf(reason, n, "cannot open it: %s", strerror(errno));
        if (fd >= 0) close(fd);
        return NULL;
    }
    if (!S_ISREG(info.st_mode) || info.st_size < 8) {
        snprintf(reason, n, S_ISREG(info.st_mode) ? "is cut short: fewer than 8 bytes" : "is not a file");
        close(fd);
        return NULL;
    }
    void *map = mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    close(fd);
    if (map == MAP_FAILED) {
        snprintf(reason, n, "cannot map it: %s", strerror(errno));
        return NULL;
    }
    SafeTensors *st = (SafeTensors *)xmalloc(sizeof *st, path);
    st->path = (char *)xmalloc(strlen(path) + 1, path);
    strcpy(st->path, path);
    st->map = (const uint8_t *)map;
    st->size = (size_t)info.st_size;
    if (safetensors_parse(st, reason, n)) return st;
    one_line(reason);
    safetensors_close(st);
    return NULL;
}

// Ends the program with STATUS_DATA where the file is missing or anything in it is wrong.
static inline SafeTensors *safetensors_open(const char *path) {
    char reason[1024];
    SafeTensors *st = safetensors_load(path, reason, sizeof reason);
    if (!st) fail(STATUS_DATA, "%s: %s", path, reason);
    return st;
}

// 0: the file is whole. -1: it is not, and reason says why in one line that goes behind "PATH: ". Values are not looked at.
static inline int safetensors_check(const char *path, char *reason, size_t n) {
    SafeTensors *st = safetensors_load(path, reason, n);
    safetensors_close(st);
    return st ? 0 : -1;
}

static inline const SafeTensor *safetensors_find(const SafeTensors *st, const char *name) {
    SafeTensor key;
    key.name = name;
    return (const SafeTensor *)bsearch(&key, st->tensors, (size_t)st->count, sizeof key, safetensors_by_name);
}

static inline size_t safetensors_elements(const SafeTensor *t) {
    size_t n = 1;
    for (int i = 0; i < t->rank; i++) n *= (size_t)t->shape[i];
    return n;
}

// IEEE 754 binary16: exponent bias 15 against 127; a subnormal is a multiple of 2^-24. Exact.
static inline float float_from_f16(uint16_t half) {
    uint32_t rest = half & 0x7fffu, bits;
    float value = (float)rest * 0x1p-24f;
    memcpy(&bits, &value, 4);
    if (rest >= 0x7c00) bits = 0x7f800000u | (rest & 0x3ff) << 13;
    else if (rest >= 0x400) bits = (rest << 13) + (112u << 23);
    bits |= (uint32_t)(half & 0x8000u) << 16;
    memcpy(&value, &bits, 4);
    return value;
}

static inline float float_from_bf16(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

__attribute__((noreturn))
static inline void safetensors_refuse(const SafeTensors *st, const SafeTensor *t, const char *accepted) {
    char name[256];
    snprintf(name, sizeof name, "%s", t->name);
    one_line(name);
    fail(STATUS_DATA, "%s: tensor '%s': is %s, expected %s", st->path, name, dtype_name(t->dtype), accepted);
}

// Element i of a tensor of a floating-point type; exact.
static inline double safetensors_real(const SafeTensors *st, const SafeTensor *t, size_t i) {
    const uint8_t *from = st->map + t->offset + i * ((size_t)dtype_bits(t->dtype) / 8);
    double wide;
    float single;
    uint16_t half;
    switch (t->dtype) {
        case DTYPE_F64: memcpy(&wide, from, 8); return wide;
        case DTYPE_F32: memcpy(&single, from, 4); return single;
        case DTYPE_F16: memcpy(&half, from, 2); return float_from_f16(half);
        case DTYPE_BF16: memcpy(&half, from, 2); return float_from_bf16(half);
        default: safetensors_refuse(st, t, "F32, F64, F16 or BF16");
    }
}

// out: [elements], row-major as in the file. From F32, F64 (rounded), F16, BF16; any other ends the program with STATUS_DATA.
static inline void safetensors_read_f32(const SafeTensors *st, const SafeTensor *t, float *out) {
    size_t n = safetensors_elements(t);
    if (t->dtype == DTYPE_F32) memcpy(out, st->map + t->offset, t->bytes);
    else for (size_t i = 0; i < n; i++) out[i] = (float)safetensors_real(st, t, i);
}

// out: [elements]. As safetensors_read_f32, and exact for F64.
static inline void safetensors_read_f64(const SafeTensors *st, const SafeTensor *t, double *out) {
    size_t n = safetensors_elements(t);
    for (size_t i = 0; i < n; i++) out[i] = safetensors_real(st, t, i);
}

// out: [elements]. From every integer type but U64, and BOOL; any other ends the program with STATUS_DATA.
static inline void safetensors_read_i64(const SafeTensors *st, const SafeTensor *t, int64_t *out) {
    size_t n = safetensors_elements(t), width = (size_t)dtype_bits(t->dtype) / 8;
    for (size_t i = 0; i < n; i++) {
        uint64_t raw = 0;
        memcpy(&raw, st->map + t->offset + width * i, width);
        switch (t->dtype) {
            case DTYPE_I64: out[i] = (int64_t)raw; break;
            case DTYPE_I32: out[i] = (int32_t)raw; break;
            case DTYPE_I16: out[i] = (int16_t)raw; break;
            case DTYPE_I8: out[i] = (int8_t)raw; break;
            case DTYPE_U32: case DTYPE_U16: case DTYPE_U8: case DTYPE_BOOL: out[i] = (int64_t)raw; break;
            default: safetensors_refuse(st, t, "an integer type up to I64, or BOOL");
        }
    }
}

static inline const char *safetensors_metadata(const SafeTensors *st, const char *key) {
    const Json *value = json_get(st->metadata, key);
    return value ? value->text : NULL;
}

typedef struct { SafeTensors **files; int count; } SafeModel;

static inline const SafeTensor *safetensors_model_find(const SafeModel *m, const char *name, const SafeTensors **file) {
    for (int i = 0; i < m->count; i++) {
        const SafeTensor *t = safetensors_find(m->files[i], name);
        *file = m->files[i];
        if (t) return t;
    }
    return NULL;
}

// path: a .safetensors file; or a folder with model.safetensors, or with model.safetensors.index.json and the shards that it
// names. The index and the shards must hold the same tensors. Else ends the program with STATUS_DATA.
static inline SafeModel safetensors_open_model(const char *path) {
    SafeModel m = {(SafeTensors **)xmalloc(sizeof *m.files, path), 0};
    struct stat info;
    char name[4096];
    if (stat(path, &info)) fail(STATUS_DATA, "%s: cannot open it: %s", path, strerror(errno));
    snprintf(name, sizeof name, S_ISDIR(info.st_mode) ? "%s/model.safetensors" : "%s", path);
    if (file_exists(name)) {
        m.files[m.count++] = safetensors_open(name);
        return m;
    }
    snprintf(name, sizeof name, "%s/model.safetensors.index.json", path);
    if (!file_exists(name))
        fail(STATUS_DATA, "%s: has neither model.safetensors nor model.safetensors.index.json; convert a pickle (.bin, .pth) "
             "with safetensors.torch.save_file in Python", path);
    Json *index = json_read(name);
    const Json *weights = json_get(index, "weight_map");
    if (!weights || weights->type != JSON_OBJECT) fail(STATUS_DATA, "%s: expected an object weight_map", name);
    free(m.files);
    m.files = (SafeTensors **)xmalloc(((size_t)weights->count + 1) * sizeof *m.files, path);
    int tensors = 0;
    for (int i = 0; i < weights->count; i++) {
        const Json *shard = &weights->children[i];
        if (shard->type != JSON_STRING || strchr(shard->text, '/'))
            fail(STATUS_DATA, "%s: weight_map: entry %d is not the name of a file in this folder", name, i);
        char file[4096];
        snprintf(file, sizeof file, "%.2000s/%.2000s", path, shard->text);
        int j = 0;
        while (j < m.count && strcmp(m.files[j]->path, file)) j++;
        if (j == m.count) {
            m.files[m.count++] = safetensors_open(file);
            tensors += m.files[j]->count;
        }
        if (!safetensors_find(m.files[j], weights->keys[i]))
            fail(STATUS_DATA, "%s: the index says that it holds tensor '%s', and it does not", file, weights->keys[i]);
    }
    if (tensors != weights->count)
        fail(STATUS_DATA, "%s: names %d tensors, and its %d shards hold %d", name, weights->count, m.count, tensors);
    json_free(index);
    return m;
}

static inline void safetensors_close_model(SafeModel *m) {
    for (int i = 0; i < m->count; i++) safetensors_close(m->files[i]);
    free(m->files);
    m->files = NULL;
    m->count = 0;
}

// Every tensor is declared, then the data of every tensor follows in the same order, in one piece or more.
typedef struct {
    char *path;
    FILE *file;
    char *metadata;             // JSON
    SafeTensor *tensors;        // [count] as declared
    int count;
    int laid_out;               // the header is written
    int current;                // the tensor whose data is next
    size_t written;             // its bytes so far
} SafeWriter;

// metadata: key, value, ..., NULL, or NULL for none; "format" is written always and must not be among the keys.
static inline void safetensors_write_begin(SafeWriter *w, const char *path, const char *const *metadata) {
    memset(w, 0, sizeof *w);
    w->path = (char *)xmalloc(strlen(path) + 1, path);
    strcpy(w->path, path);
    w->file = file_create(path);
    size_t bytes;
    FILE *f = open_memstream(&w->metadata, &bytes);
    if (!f) fail(STATUS_FAILED, "out of memory: the header of %s", path);
    fputs("{\"format\":\"pt\"", f);
    for (; metadata && *metadata; metadata += 2) {
        fputc(',', f);
        json_write_string(f, metadata[0]);
        fputc(':', f);
        json_write_string(f, metadata[1]);
    }
    fputc('}', f);
    if (fclose(f)) fail(STATUS_FAILED, "out of memory: the header of %s", path);
}

// shape: [rank], rank 0 is a scalar. name is copied.
static inline void safetensors_write_declare(SafeWriter *w, const char *name, Dtype dtype, int rank, const int64_t *shape) {
    for (int i = 0; i < w->count; i++)
        if (!strcmp(w->tensors[i].name, name)) fail(STATUS_FAILED, "%s: tensor '%s' is declared twice", w->path, name);
    if (!(w->count & (w->count - 1))) {
        w->tensors = (SafeTensor *)realloc(w->tensors, (w->count ? 2 * (size_t)w->count : 1) * sizeof *w->tensors);
        if (!w->tensors) fail(STATUS_FAILED, "out of memory: the header of %s", w->path);
    }
    SafeTensor *t = &w->tensors[w->count++];
    memset(t, 0, sizeof *t);
    char *copy = (char *)xmalloc(strlen(name) + 1, w->path);
    strcpy(copy, name);
    t->name = copy;
    t->dtype = dtype;
    t->rank = rank;
    for (int i = 0; i < rank && i < SAFETENSORS_RANK; i++) t->shape[i] = shape[i];
    if (w->laid_out || rank > SAFETENSORS_RANK || !safetensors_bytes(t))
        fail(STATUS_FAILED, "%s: tensor '%s' is declared after data, has more than %d dimensions, or overflows", w->path, name,
             SAFETENSORS_RANK);
}

// Widest types first, so that every tensor is aligned to its own type: PyTorch refuses others. Bytes depend on the
// declarations alone.
static inline void safetensors_write_header(SafeWriter *w) {
    static const int widths[] = {64, 32, 16, 8, 6, 4};
    size_t offset = 0, bytes = 0;
    char *text = NULL;
    FILE *f = open_memstream(&text, &bytes);
    if (!f) fail(STATUS_FAILED, "out of memory: the header of %s", w->path);
    fprintf(f, "{\"__metadata__\":%s", w->metadata);
    for (size_t k = 0; k < sizeof widths / sizeof *widths; k++) {
        for (int i = 0; i < w->count; i++) {
            SafeTensor *t = &w->tensors[i];
            if (dtype_bits(t->dtype) != widths[k]) continue;
            fputc(',', f);
            json_write_string(f, t->name);
            fprintf(f, ":{\"dtype\":\"%s\",\"shape\":[", dtype_name(t->dtype));
            for (int d = 0; d < t->rank; d++) fprintf(f, "%s%lld", d ? "," : "", (long long)t->shape[d]);
            fprintf(f, "],\"data_offsets\":[%zu,%zu]}", offset, offset + t->bytes);
            t->offset = offset;
            offset += t->bytes;
        }
    }
    fputc('}', f);
    for (long length = ftell(f); length % 8; length++) fputc(' ', f);
    if (fclose(f)) fail(STATUS_FAILED, "out of memory: the header of %s", w->path);
    uint64_t header = bytes;
    file_write(w->file, w->path, &header, 8);
    file_write(w->file, w->path, text, bytes);
    for (int i = 0; i < w->count; i++) w->tensors[i].offset += 8 + bytes;
    w->laid_out = 1;
    free(text);
}

// The next `bytes` of a tensor, little endian. Another tensor than the next, or more than was declared, ends the program.
static inline void safetensors_write_data(SafeWriter *w, const char *name, const void *data, size_t bytes) {
    if (!w->laid_out) safetensors_write_header(w);
    if (!bytes) return;
    for (; w->current < w->count && w->written == w->tensors[w->current].bytes; w->current++) w->written = 0;
    const SafeTensor *t = w->current < w->count ? &w->tensors[w->current] : NULL;
    if (!t || strcmp(t->name, name) || bytes > t->bytes - w->written)
        fail(STATUS_FAILED, "%s: %zu bytes of tensor '%s', where '%s' needs %zu", w->path, bytes, name, t ? t->name : "(the end)",
             t ? t->bytes - w->written : 0);
    if (!w->written && fseeko(w->file, (off_t)t->offset, SEEK_SET))
        fail(STATUS_FAILED, "%s: cannot write it: %s", w->path, strerror(errno));
    file_write(w->file, w->path, data, bytes);
    w->written += bytes;
}

// The file is on the disk after this; its name is once file_sync_dir has run on its folder.
static inline void safetensors_write_end(SafeWriter *w) {
    if (!w->laid_out) safetensors_write_header(w);
    for (; w->current < w->count && w->written == w->tensors[w->current].bytes; w->current++) w->written = 0;
    if (w->current < w->count)
        fail(STATUS_FAILED, "%s: tensor '%s' was not written to its end", w->path, w->tensors[w->current].name);
    file_close(w->file, w->path);
    for (int i = 0; i < w->count; i++) free((void *)w->tensors[i].name);
    free(w->tensors);
    free(w->metadata);
    free(w->path);
    memset(w, 0, sizeof *w);
}

#endif
