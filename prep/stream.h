/*
Bytes and voxels of files: plain, gzip or zlib, in one file or in several that follow each other.

  STREAM_AUTO, Stream   a file opened for reading; gzip by its first bytes, or what the caller says
  stream_open, stream_close   only regular files; the offset is in bytes on disk
  stream_read, stream_skip   exactly n bytes; a short or damaged stream is never padded
  stream_finish         reads to the end of what is compressed, so that its checksum is verified
  stream_bytes, stream_compressed, stream_at   size on disk, whether it is compressed, place on disk
  stream_byte, stream_line, stream_number, stream_hex   the same file as text
  text_numbers, text_refused   a list of numbers; what cannot be used
  VOLUME_FILE_NONE, volumefile_names   the formats of volume files
  VolumeFile            a volume file whose header is read: one volume or several
  volumefile_part, volumefile_pattern, volumefile_files   the files that hold its voxels
  volumefile_ready      checks what a header claims against the files
  volumefile_voxels     the next bytes of voxels
  volumefile_free       frees what a VolumeFile holds

The inflater is ISA-L's, about twice as fast as zlib. Headers and trailers of gzip are read here: ISA-L 2.30 loses its
place in a header that is cut by the end of its input.
*/
#ifndef CURIA_STREAM_H
#define CURIA_STREAM_H

#include "volume.h"

enum { VOLUME_FILE_NONE, VOLUME_FILE_NIFTI, VOLUME_FILE_NIFTI_IMG, VOLUME_FILE_NRRD, VOLUME_FILE_METAIMAGE };
static const char *const volumefile_names[] = {"", "NIfTI", "NIfTI", "NRRD", "MetaImage"};
enum { STREAM_AUTO, STREAM_PLAIN, STREAM_GZIP, STREAM_ZLIB };
enum { VOXELS_BINARY, VOXELS_TEXT, VOXELS_HEX };
enum { MOST_VOXEL_FILES = 100000 };

typedef struct Stream Stream;

typedef struct {
    int kind, type, n[3];        // VOLUME_FILE_*; RAW_* as in memory; voxels along the axes, the first running fastest
    int64_t volumes;
    // how the voxels are written
    int format, coding, swapped; // STREAM_*; VOXELS_*: text is read as RAW_F64; swapped: big endian
    int64_t run;                 // voxels of one volume that follow each other before the next volume's: all, as a rule
    double slope, inter;         // value = slope * voxel + inter
    Volume grid;                 // what the volumes share: n, origin, steps, notes
    char **parts;                // files that hold the voxels, one after another, each as many
    int64_t n_parts, offset, lines, skip; // before the voxels: bytes on disk (-1: they are at the end), lines, bytes unpacked
    // where reading is
    Stream *stream;
    int64_t part, next;          // the next file and volume
    uint64_t left;               // bytes of voxels left in the open file
    uint8_t *raw, *all;          // one volume's voxels; every volume's where they are mixed
    int failed;
} VolumeFile;

#ifdef CURIA_VOLUMES
#include <ctype.h>
#include <isa-l.h>

enum { STREAM_BUFFER = 1 << 17, STREAM_BACK = 8, TEXT_MOST = 1 << 24 };

struct Stream {
    int file, format;
    int members, inside, ended;         // gzip members begun; inside: between a header and its trailer
    uint64_t bytes, at;                 // size on disk; place on disk of the end of the buffer
    struct inflate_state inflate;       // its next_in and avail_in are the buffer's, for a plain file too
    uint8_t buffer[STREAM_BACK + STREAM_BUFFER];
};

static inline uint64_t stream_bytes(const Stream *s) { return s->bytes; }
static inline int stream_compressed(const Stream *s) { return s->format != STREAM_PLAIN; }
static inline uint64_t stream_at(const Stream *s) { return s->at - s->inflate.avail_in; }

static inline ssize_t stream_disk(Stream *s, void *out, size_t n) {
    ssize_t got;
    do got = read(s->file, out, n);
    while (got < 0 && errno == EINTR);
    if (got > 0) s->at += (uint64_t)got;
    return got;
}

// Fills the empty buffer: 1, or 0 at the end of the file. The last bytes stay before it: the inflater gives back up to 8.
static inline int stream_fill(Stream *s) {
    memmove(s->buffer, s->inflate.next_in - STREAM_BACK, STREAM_BACK);
    ssize_t got = stream_disk(s, s->buffer + STREAM_BACK, STREAM_BUFFER);
    s->inflate.next_in = s->buffer + STREAM_BACK;
    s->inflate.avail_in = got > 0 ? (uint32_t)got : 0;
    return got > 0;
}

// The next byte on disk, or -1 at the end.
static inline int stream_byte(Stream *s) {
    if (!s->inflate.avail_in && !stream_fill(s)) return -1;
    s->inflate.avail_in--;
    return *s->inflate.next_in++;
}

// A stream over the first bytes of a file; `file` may be -1: there are no others.
static inline Stream *stream_new(int file, int format) {
    Stream *s = (Stream *)xmalloc(sizeof *s, "a file's buffer");
    isal_inflate_init(&s->inflate);
    s->inflate.next_in = s->buffer + STREAM_BACK;
    s->file = file, s->format = format;
    return s;
}

static inline void stream_close(Stream *s) {
    if (s && s->file >= 0) close(s->file);
    free(s);
}

// NULL and *reason where path is not a regular file that can be read. Nothing but that is opened: a device may act on it.
static inline Stream *stream_open(const char *path, uint64_t offset, int format, char *reason, size_t size) {
    struct stat st;
    int file = -1, missing = stat(path, &st);
    if (!missing && !S_ISREG(st.st_mode)) {
        snprintf(reason, size, "cannot be opened: not a regular file");
        return NULL;
    }
    if (!missing) file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (file < 0 || fstat(file, &st) || lseek(file, (off_t)offset, SEEK_SET) < 0) {
        snprintf(reason, size, "cannot be opened: %s", strerror(errno));
        if (file >= 0) close(file);
        return NULL;
    }
    Stream *s = stream_new(file, format);
    s->bytes = (uint64_t)st.st_size;
    s->at = offset;
    if (format == STREAM_PLAIN || format == STREAM_GZIP) return s;
    stream_fill(s);
    int gzip = s->inflate.avail_in > 1 && s->inflate.next_in[0] == 0x1f && s->inflate.next_in[1] == 0x8b;
    s->format = gzip ? STREAM_GZIP : format == STREAM_AUTO ? STREAM_PLAIN : format;
    return s;
}

// Steps over a header: 1, or 0 where no other gzip member follows (what does is no data, as for gzread), -1 where it is bad.
static inline int stream_header(Stream *s) {
    int first = s->members == 0, a = stream_byte(s), b = stream_byte(s), c = 0, flags = 0;
    if (s->format == STREAM_ZLIB) return !first ? 0 : b >= 0 && (a & 15) == 8 && (a << 8 | b) % 31 == 0 && !(b & 32) ? 1 : -1;
    if (a != 0x1f || b != 0x8b) return first ? -1 : 0;
    for (int i = 2; i < 10; i++) {
        c = stream_byte(s);
        if (i == 2 && c != 8) return -1;
        if (i == 3) flags = c;
    }
    if (c < 0 || flags & 0xe0) return -1;
    if (flags & 4) {
        int low = stream_byte(s), extra = low | stream_byte(s) << 8;
        for (; extra > 0; extra--) c = stream_byte(s);
    }
    for (int text = 8; text <= 16; text *= 2)
        if (flags & text) while ((c = stream_byte(s)) > 0) {}
    for (int i = 0; i < 2 && flags & 2; i++) c = stream_byte(s);
    return c < 0 ? -1 : 1;
}

// Whether the checksum (and for gzip the length) behind compressed data is that of what was unpacked.
static inline int stream_trailer(Stream *s) {
    struct inflate_state *z = &s->inflate;
    int spare = z->read_in_length / 8, zlib = s->format == STREAM_ZLIB, ok = 1;
    z->next_in -= spare, z->avail_in += (uint32_t)spare;
    for (int i = 0; i < 4; i++) ok &= stream_byte(s) == (int)(z->crc >> (zlib ? 24 - 8 * i : 8 * i) & 255);
    for (int i = 0; i < 4 && !zlib; i++) ok &= stream_byte(s) == (int)(z->total_out >> 8 * i & 255);
    return ok;
}

// Up to n bytes: how many, 0 at the end, -1 and *why where it is damaged.
static inline int64_t stream_some(Stream *s, uint8_t *out, uint32_t n, const char **why) {
    struct inflate_state *z = &s->inflate;
    if (s->format == STREAM_PLAIN) {
        if (!z->avail_in) {
            ssize_t got = stream_disk(s, out, n);
            if (got < 0) *why = strerror(errno);
            return got;
        }
        n = n < z->avail_in ? n : z->avail_in;
        memcpy(out, z->next_in, n);
        z->next_in += n, z->avail_in -= n;
        return n;
    }
    while (!s->ended) {
        if (!s->inside) {
            int found = stream_header(s);
            if (found < 0) return *why = "its compressed data have no header", -1;
            s->ended = !found, s->inside = found, s->members++;
            isal_inflate_reset(z);
            z->crc_flag = s->format == STREAM_GZIP ? ISAL_GZIP_NO_HDR : ISAL_ZLIB_NO_HDR;
            continue;
        }
        if (z->block_state == ISAL_BLOCK_FINISH) {
            if (!stream_trailer(s)) return *why = "its compressed data end too early or have another checksum", -1;
            s->inside = 0;
            continue;
        }
        z->next_out = out, z->avail_out = n;
        uint32_t before = z->avail_in;
        if (isal_inflate(z) < 0) return *why = "its compressed data cannot be unpacked", -1;
        if (z->avail_out < n) return n - z->avail_out;
        if (z->block_state == ISAL_BLOCK_FINISH) continue;
        if (z->avail_in ? z->avail_in == before : !stream_fill(s)) return *why = "its compressed data have no end", -1;
    }
    return 0;
}

// 0 good, else -1 and *reason.
static inline int stream_read(Stream *s, void *out, uint64_t n, char *reason, size_t size) {
    const char *why = NULL;
    for (uint64_t done = 0; done < n;) {
        int64_t got = stream_some(s, (uint8_t *)out + done, n - done > 1 << 30 ? 1 << 30 : (uint32_t)(n - done), &why);
        if (got > 0) {
            done += (uint64_t)got;
            continue;
        }
        snprintf(reason, size, "cut short or damaged: %llu of %llu bytes could be read%s%s", (unsigned long long)done,
                 (unsigned long long)n, why ? ", " : "", why ? why : "");
        return -1;
    }
    return 0;
}

static inline int stream_skip(Stream *s, uint64_t n, char *reason, size_t size) {
    uint8_t scrap[STREAM_BUFFER];
    if (s->format == STREAM_PLAIN && n > s->inflate.avail_in) {
        s->at += n - s->inflate.avail_in;
        s->inflate.avail_in = 0;
        if (s->at <= s->bytes && lseek(s->file, (off_t)s->at, SEEK_SET) >= 0) return 0;
        snprintf(reason, size, "cut short or damaged: %llu bytes are too few", (unsigned long long)s->bytes);
        return -1;
    }
    for (uint64_t chunk; n; n -= chunk) {
        chunk = n < sizeof scrap ? n : sizeof scrap;
        if (stream_read(s, scrap, chunk, reason, size)) return -1;
    }
    return 0;
}

static inline int stream_finish(Stream *s, char *reason, size_t size) {
    uint8_t scrap[STREAM_BUFFER];
    const char *why = NULL;
    int64_t got = 1;
    while (s->format != STREAM_PLAIN && got > 0) got = stream_some(s, scrap, sizeof scrap, &why);
    if (got >= 0) return 0;
    snprintf(reason, size, "cut short or damaged: %s", why);
    return -1;
}

// The next line on disk without its end and the blanks there; what does not fit is dropped, and control characters become
// blanks. 0 at the end of the file, or after 16 MiB: no header is so long.
static inline int stream_line(Stream *s, char *line, size_t size) {
    size_t n = 0;
    int c = stream_at(s) < TEXT_MOST ? stream_byte(s) : -1;
    if (c < 0) return 0;
    for (; c >= 0 && c != '\n'; c = stream_at(s) < TEXT_MOST ? stream_byte(s) : -1)
        if (n + 1 < size) line[n++] = (char)(c < 32 || c == 127 ? ' ' : c);
    while (n && line[n - 1] == ' ') n--;
    line[n] = 0;
    return 1;
}

// The next number on disk, between blanks or commas. 0 good, else -1.
static inline int stream_number(Stream *s, double *x) {
    char word[64], *end;
    size_t n = 0;
    int c = stream_byte(s);
    while (c == ',' || isspace(c)) c = stream_byte(s);
    for (; c > ' ' && c != ',' && n + 1 < sizeof word; c = stream_byte(s)) word[n++] = (char)c;
    word[n] = 0;
    *x = strtod(word, &end);
    return n == 0 || *end ? -1 : 0;
}

// The next byte on disk that is written as two digits. 0 good, else -1.
static inline int stream_hex(Stream *s, uint8_t *x) {
    int value = 0;
    for (int i = 0; i < 2; i++) {
        int c = stream_byte(s);
        while (isspace(c)) c = stream_byte(s);
        if (!isxdigit(c)) return -1;
        value = 16 * value + (isdigit(c) ? c - '0' : tolower(c) - 'a' + 10);
    }
    *x = (uint8_t)value;
    return 0;
}

// Numbers between blanks or commas, to out[most]; returns how many, -1 where there are others or anything else.
static inline int text_numbers(const char *text, double *out, int most) {
    for (int n = 0;; n++) {
        text += strspn(text, " ,");
        if (!*text) return n;
        char *end;
        double x = strtod(text, &end);
        if (end == text || n == most) return -1;
        out[n] = x;
        text = end;
    }
}

// -1, and *reason shows a line of a header that cannot be used: its field and, unless NULL, its value.
static inline int text_refused(const char *field, const char *value, char *reason, size_t size) {
    snprintf(reason, size, "a line of its header cannot be used: %.40s%s%.60s", field, value ? ": " : "", value ? value : "");
    for (char *c = reason; *c; c++) *c = *c < 32 || *c > 126 ? '?' : *c;
    return -1;
}

// A file `name`, as written in the header at `path`, holds the voxels that follow. It must be beside the header or below:
// a header from outside shall not choose among this machine's files. 0 good, else -1 and *reason.
static inline int volumefile_part(VolumeFile *f, const char *path, const char *name, char *reason, size_t size) {
    const char *slash = strrchr(path, '/');
    int folder = slash ? (int)(slash - path) + 1 : 0, up = *name == '/' || !*name;
    for (const char *p = name; (p = strstr(p, "..")); p += 2) up |= (p == name || p[-1] == '/') && (p[2] == '/' || !p[2]);
    if (up || f->n_parts == MOST_VOXEL_FILES) {
        snprintf(reason, size, up ? "its header names a file with voxels that is not in the header's own folder or below"
                                  : "its header names more than 100000 files with voxels");
        return -1;
    }
    size_t room = (size_t)folder + strlen(name) + 1;
    if ((f->n_parts & (f->n_parts - 1)) == 0) {                        // room for 1, 2, 4, 8 ... names
        f->parts = (char **)realloc(f->parts, (size_t)(f->n_parts ? 2 * f->n_parts : 1) * sizeof *f->parts);
        if (!f->parts) fail(STATUS_FAILED, "out of memory for %lld file names", (long long)f->n_parts);
    }
    char *part = f->parts[f->n_parts++] = (char *)xmalloc(room, "a file name");
    snprintf(part, room, "%.*s%s", folder, path, name);
    return 0;
}

// Adds files numbered from `first` to `last` in steps of `step`; one %d of the pattern, as %04d or %d, is the number.
static inline int volumefile_pattern(VolumeFile *f, const char *path, const char *pattern, double first, double last,
                                     double step, char *reason, size_t size) {
    const char *percent = strchr(pattern, '%'), *digits = percent + 1, *end = digits + strspn(digits, "0123456789");
    int width = atoi(digits), bad = end > digits + 2 || !strchr("diu", *end) || !*end || strchr(end, '%');
    if (bad || !(fabs(first) < 1e9) || !(fabs(last) < 1e9) || !(fabs(step) >= 1) || !((last - first) / step >= 0)) {
        snprintf(reason, size, "its header names the files with voxels by a pattern that is not NAME%%d FIRST LAST STEP");
        return -1;
    }
    for (double i = first; step > 0 ? i <= last : i >= last; i += step) {
        char name[4096];
        snprintf(name, sizeof name, *digits == '0' ? "%.*s%0*d%s" : "%.*s%*d%s", (int)(percent - pattern), pattern, width, (int)i,
                 end + 1);
        if (volumefile_part(f, path, name, reason, size)) return -1;
    }
    return 0;
}

// The files of a text header that says: the voxels follow it, or are `detached`; where per_file is not 0, each of the files
// holds that many axes of them (all axes: a share of the last). 0 good, else -1 and *reason.
static inline int volumefile_files(VolumeFile *f, const char *path, int detached, int per_file, const double *sizes, int axes,
                                   char *reason, size_t size) {
    const char *slash = strrchr(path, '/');
    double files = per_file == axes ? (double)f->n_parts : 1;
    if (!detached) return volumefile_part(f, path, slash ? slash + 1 : path, reason, size);
    for (int a = per_file > 0 ? per_file : axes; a < axes; a++) files *= sizes[a];
    if (files == (double)f->n_parts && per_file <= axes && fmod(sizes[axes - 1], per_file == axes ? files : 1) == 0) return 0;
    snprintf(reason, size, "its header names %lld files with voxels, which its sizes do not ask for", (long long)f->n_parts);
    return -1;
}

static inline uint64_t volumefile_volume_bytes(const VolumeFile *f) {
    return (uint64_t)f->n[0] * f->n[1] * f->n[2] * raw_bytes(f->type);
}

static inline uint64_t volumefile_part_bytes(const VolumeFile *f) {
    return volumefile_volume_bytes(f) * (uint64_t)f->volumes / (uint64_t)f->n_parts;
}

static inline void volumefile_free(VolumeFile *f) {
    stream_close(f->stream);
    for (int64_t i = 0; i < f->n_parts; i++) free(f->parts[i]);
    free(f->parts), free(f->raw), free(f->all);
    memset(f, 0, sizeof *f);
}

// File i with voxels. NULL and *reason.
static inline Stream *volumefile_stream(const VolumeFile *f, int64_t i, uint64_t offset, char *reason, size_t size) {
    char why[128];
    Stream *s = stream_open(f->parts[i], offset, f->format, why, sizeof why);
    if (!s) snprintf(reason, size, "file %lld of %lld with its voxels %s", (long long)i + 1, (long long)f->n_parts, why);
    return s;
}

// The same, where its voxels begin.
static inline Stream *volumefile_open_part(const VolumeFile *f, int64_t i, char *reason, size_t size) {
    Stream *s = volumefile_stream(f, i, f->offset > 0 ? (uint64_t)f->offset : 0, reason, size);
    if (!s) return NULL;
    for (int64_t line = 0; line < f->lines; line++) {
        int c;
        do c = stream_byte(s);
        while (c >= 0 && c != '\n');
        if (c < 0) break;
    }
    if (!stream_skip(s, f->offset < 0 ? stream_bytes(s) - volumefile_part_bytes(f) : (uint64_t)f->skip, reason, size)) return s;
    stream_close(s);
    return NULL;
}

// The last step of reading a header: its claims against the sizes of the files, and the orientation. 0 good, else -1 and
// *reason. Nothing is allocated from a size that the files cannot hold: deflate cannot shrink more than 1032 times.
static inline int volumefile_ready(VolumeFile *f, char *reason, size_t size) {
    double voxels = (double)f->volumes, *normal = f->grid.step[2], length = 0;
    for (int a = 0; a < 3; a++) {
        voxels *= f->n[a];
        if (f->n[a] >= 1 && f->n[a] <= SHARD_MAX_SIDE && f->volumes >= 1) continue;
        snprintf(reason, size, "its size along axis %d is %d, and 1 to %d can be read", a + 1, f->n[a], SHARD_MAX_SIDE);
        return -1;
    }
    if (f->coding == VOXELS_TEXT) f->type = RAW_F64;
    double part = voxels * raw_bytes(f->type) / (double)f->n_parts;
    if (part != floor(part) || fmod(voxels, (double)f->n_parts) || part * (double)f->n_parts > 9e18) {
        snprintf(reason, size, "its %.0f voxels are not spread evenly over %lld files", voxels, (long long)f->n_parts);
        return -1;
    }
    for (int64_t i = 0; i < f->n_parts; i++) {
        Stream *s = volumefile_stream(f, i, f->offset > 0 ? (uint64_t)f->offset : 0, reason, size);
        if (!s) return -1;
        double held = (double)stream_bytes(s) - (f->offset > 0 ? (double)f->offset : 0), need = part + (double)f->skip;
        if (stream_compressed(s)) held = 1032 * held + 1024;
        if (f->coding) need = f->coding == VOXELS_HEX ? 2 * need : part / 4 - 1;    // a digit and a blank for 8 bytes
        stream_close(s);
        if (need <= held) continue;
        snprintf(reason, size, "its header asks for %.0f bytes, more than the file can hold", need);
        return -1;
    }
    for (int b = 0; b < 3; b++) length += fabs(normal[b]);
    if (f->n[2] == 1 && length == 0) {                                    // a single slice: 1 mm thick
        const double *x = f->grid.step[0], *y = f->grid.step[1];
        for (int b = 0; b < 3; b++) normal[b] = x[(b + 1) % 3] * y[(b + 2) % 3] - x[(b + 2) % 3] * y[(b + 1) % 3];
        length = sqrt(normal[0] * normal[0] + normal[1] * normal[1] + normal[2] * normal[2]);
        for (int b = 0; b < 3; b++) normal[b] /= length;
    }
    memcpy(f->grid.n, f->n, sizeof f->n);
    return volume_orient(&f->grid, reason, size);
}

// The next n bytes of voxels, from file to file, to out (NULL: steps over them). 0 good, else -1 and *reason.
static inline int volumefile_voxels(VolumeFile *f, uint8_t *out, uint64_t n, char *reason, size_t size) {
    while (n && !f->failed) {
        if (!f->left) {
            f->failed = f->stream && stream_finish(f->stream, reason, size);
            stream_close(f->stream);
            f->stream = f->failed ? NULL : volumefile_open_part(f, f->part++, reason, size);
            f->failed = !f->stream;
            f->left = volumefile_part_bytes(f);
            continue;
        }
        uint64_t chunk = n < f->left ? n : f->left;
        if (f->coding == VOXELS_BINARY)
            f->failed = out ? stream_read(f->stream, out, chunk, reason, size) : stream_skip(f->stream, chunk, reason, size);
        uint64_t unit = f->coding == VOXELS_TEXT ? sizeof(double) : 1;
        for (uint64_t i = 0; f->coding && !f->failed && i < chunk; i += unit) {
            double x;
            uint8_t byte;
            f->failed = f->coding == VOXELS_TEXT ? stream_number(f->stream, &x) : stream_hex(f->stream, &byte);
            if (f->failed) snprintf(reason, size, "cut short or damaged: a voxel is not a number");
            else if (out) memcpy(out + i, f->coding == VOXELS_TEXT ? (void *)&x : &byte, unit);
        }
        n -= chunk, f->left -= chunk;
        if (out) out += chunk;
    }
    return f->failed ? -1 : 0;
}

#endif
#endif
