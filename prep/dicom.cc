/*
dicom.h's functions. The file is walked here, within its bounds and to a depth: GDCM's own reader aborts on odd headers, runs
out of stack on nested ones and takes truncated pixels for whole. GDCM decodes JPEG, JPEG-LS and JPEG 2000 images, whose
size, bits and end have been checked first; RLE and uncompressed pixels are short enough to be read here.

  g++ -std=gnu++17 -O2 -I. -DCURIA_DICOM -isystem /usr/include/gdcm-3.0 -c prep/dicom.cc
  link with -lgdcmMSFF -lgdcmDSED -lgdcmCommon -lz -lstdc++

  Refusal, refuse      why a file is not taken; caught where C begins
  Syntax, syntax_find  the transfer syntaxes
  Span, Element, next, first_item   the data elements of a data set, one after the other
  text, number, numbers, whole, time_of   their values
  Reading, Field, take, known_tag   what one pass over a file fills, and which elements fill it
  read_elements        that pass: a data set up to its pixels, or a functional group
  csa_numbers          Siemens' own header in the header
  check_pixels         whether the pixels can be there; type and tiles
  frames_read          the frames
  inflate_rest, file_read   a file up to its pixels
  Image, image_open, image_decode, rle_decode   one compressed image
  frame_images         which fragments make which frame
  pixels_tidy, decode  stored values
  guarded              exceptions to reasons
*/
#include <fcntl.h>
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>

#include <memory>

#include <gdcmJPEG2000Codec.h>
#include <gdcmJPEGCodec.h>
#include <gdcmJPEGLSCodec.h>
#include <gdcmSequenceOfFragments.h>
#include <gdcmTrace.h>

#include "dicom.h"

struct Refusal { char text[160]; };

[[noreturn, gnu::format(printf, 1, 2)]] static void refuse(const char *format, ...) {
    Refusal r;
    va_list args;
    va_start(args, format);
    vsnprintf(r.text, sizeof r.text, format, args);
    va_end(args);
    throw r;
}

enum { NATIVE, RLE, JPEG, JPEG_LS, JPEG_2000, UNKNOWN };
static const struct Syntax { const char *uid, *name; int codec, lossy; } syntaxes[] = { // uid: after 1.2.840.10008.1.2
    {"", "implicit LE", NATIVE, 0}, {".1", "explicit LE", NATIVE, 0}, {".2", "explicit BE", NATIVE, 0},
    {".1.99", "deflated", NATIVE, 0}, {".5", "RLE", RLE, 0}, {".4.50", "JPEG baseline", JPEG, 1},
    {".4.51", "JPEG extended", JPEG, 1}, {".4.53", "JPEG spectral", JPEG, 1}, {".4.55", "JPEG progressive", JPEG, 1},
    {".4.57", "JPEG lossless", JPEG, 0}, {".4.70", "JPEG lossless", JPEG, 0}, {".4.80", "JPEG-LS", JPEG_LS, 0},
    {".4.81", "JPEG-LS near", JPEG_LS, 1}, {".4.90", "JPEG 2000", JPEG_2000, 0}, {".4.91", "JPEG 2000", JPEG_2000, 0},
    {".4.201", "HTJ2K", UNKNOWN, 0}, {".4.202", "HTJ2K", UNKNOWN, 0}, {".4.203", "HTJ2K", UNKNOWN, 0},
    {"?", "unknown syntax", UNKNOWN, 0}};
static const char SYNTAX_ROOT[] = "1.2.840.10008.1.2";

static const Syntax *syntax_find(const char *uid) {
    const Syntax *s = syntaxes;
    size_t root = sizeof SYNTAX_ROOT - 1;
    while (s->uid[0] != '?' && (strncmp(uid, SYNTAX_ROOT, root) || strcmp(uid + root, s->uid))) s++;
    return s;
}

// Elements still to be read, and how they are written.
struct Span { const uint8_t *at, *end; bool implicit, big; int depth; };

// vr: two letters, or 0 where the file does not say. value: the bytes, or a sequence's items with what ends them.
struct Element { uint32_t tag; int vr; uint32_t length; Span value; };

enum : uint32_t { ITEM = 0xfffee000, ITEM_END = 0xfffee00d, SEQUENCE_END = 0xfffee0dd, UNDEFINED = 0xffffffff };
enum : uint32_t { PIXELS = 0x7fe00010, FLOAT_PIXELS = 0x7fe00008, DOUBLE_PIXELS = 0x7fe00009 };
enum { DEEPEST = 64 }; // two per nested sequence

#define VR(letters) (letters[0] << 8 | letters[1])

static uint64_t load(const uint8_t *p, int bytes, bool big) {
    uint64_t x = 0;
    for (int i = 0; i < bytes; i++) x |= (uint64_t)p[i] << 8 * (big ? bytes - 1 - i : i);
    return x;
}

static bool capitals(const uint8_t *p) { return p[0] >= 'A' && p[0] <= 'Z' && p[1] >= 'A' && p[1] <= 'Z'; }

// Takes the next element of *s; false at its end. An element without a value representation in an explicit data set is read
// as implicit, as pydicom does. The value of encapsulated pixels reaches to the end of the file. PS3.5 section 7.
static bool next(Span *s, Element *e) {
    size_t left = (size_t)(s->end - s->at), head = 8;
    if (left < 8) return false;
    if (s->depth > DEEPEST) refuse("sequences nested more than %d deep", DEEPEST / 2);
    const uint8_t *p = s->at;
    e->tag = (uint32_t)(load(p, 2, s->big) << 16 | load(p + 2, 2, s->big));
    e->vr = s->implicit || e->tag >> 16 == 0xfffe || !capitals(p + 4) ? 0 : p[4] << 8 | p[5];
    if (!e->vr) e->length = (uint32_t)load(p + 4, 4, s->big);
    else if (!memmem("OB OW OF OD OL OV SQ UC UR UT UN SV UV", 38, p + 4, 2)) e->length = (uint32_t)load(p + 6, 2, s->big);
    else if ((head = 12) <= left) e->length = (uint32_t)load(p + 8, 4, s->big);
    else return false;
    e->value = {p + head, s->end, s->implicit, s->big, s->depth + 1};
    left -= head;
    if (e->length == UNDEFINED && (e->tag != PIXELS || s->depth)) {
        if (e->vr == VR("UN")) e->value.implicit = true, e->value.big = false;
        Span inside = e->value;
        Element x;
        do
            if (!next(&inside, &x)) refuse("cut short: a sequence does not end");
        while (x.tag != (e->tag == ITEM ? ITEM_END : SEQUENCE_END));
        e->value.end = inside.at;
    } else if (e->length != UNDEFINED) {
        const char *what = e->tag == PIXELS ? "its pixels" : "an element";
        if (e->length > left) refuse("cut short: %zu of %u bytes of %s", left, e->length, what);
        e->value.end = e->value.at + e->length;
    }
    s->at = e->value.end;
    return true;
}

// What is in the first item of a sequence; nothing if there is none.
static Span first_item(const Element &e) {
    Span s = e.value;
    Element item;
    return next(&s, &item) && item.tag == ITEM ? item.value : Span();
}

// An element's value without the blanks and zeros around it, cut to size - 1 bytes.
static void text(const Element &e, char *out, size_t size) {
    const uint8_t *p = e.value.at, *end = e.value.end;
    while (p < end && (*p == ' ' || *p == 0)) p++;
    while (p < end && (end[-1] == ' ' || end[-1] == 0)) end--;
    for (; p < end && size > 1; p++, size--) *out++ = *p < 32 ? '?' : (char)*p;
    *out = 0;
}

// The i-th of an element's values; NAN where it is absent or no number. kind: the value representation, if the file is mum.
static double number(const Element &e, int i, int kind) {
    const uint8_t *p = e.value.at, *end = e.value.end;
    int as = e.vr == 0 || e.vr == VR("UN") ? kind : e.vr;
    int four = as == VR("UL") || as == VR("SL") || as == VR("FL"), two = as == VR("US") || as == VR("SS");
    int bytes = as == VR("FD") ? 8 : four ? 4 : two ? 2 : 0;
    if (bytes) {
        if (end - p < (i + 1) * bytes) return NAN;
        uint64_t bits = load(p + i * bytes, bytes, e.value.big);
        float single;
        double full;
        memcpy(&single, &bits, 4), memcpy(&full, &bits, 8); // this machine is little endian
        if (as == VR("SS") || as == VR("SL")) return as == VR("SS") ? (int16_t)bits : (int32_t)bits;
        return as == VR("FD") ? full : as == VR("FL") ? single : (double)bits;
    }
    for (; i > 0 && p < end; p++) i -= *p == '\\';
    char digits[64], *rest;
    size_t n = 0;
    for (; p < end && *p != '\\' && n + 1 < sizeof digits; p++) digits[n++] = (char)*p;
    digits[n] = 0;
    double x = strtod(digits, &rest);
    return i || rest == digits || rest[strspn(rest, " ")] || !isfinite(x) ? NAN : x;
}

// Whether an element has n finite values; then they are in out.
static bool numbers(const Element &e, int n, int kind, double *out) {
    double x[6];
    for (int i = 0; i < n; i++)
        if (!isfinite(x[i] = number(e, i, kind))) return false;
    memcpy(out, x, n * sizeof *x);
    return true;
}

static int whole(const Element &e, int kind) {
    double x = number(e, 0, kind);
    return x > -2147483648.0 && x < 2147483648.0 ? (int)x : -1;
}

// Seconds since midnight from HHMMSS.F or HH:MM:SS.F, after `skip` digits of a date; or -1.
static double time_of(const Element &e, int skip) {
    char t[40];
    int h, m;
    double s;
    text(e, t, sizeof t);
    if ((int)strlen(t) < skip) return -1;
    bool good = sscanf(t + skip, "%2d%2d%lf", &h, &m, &s) == 3 || sscanf(t + skip, "%2d:%2d:%lf", &h, &m, &s) == 3;
    return good ? 3600 * h + 60 * m + s : -1;
}

// What one pass over a file finds; then the file.
struct Facts {
    DicomHeader h;
    char name[DICOM_TEXT], id[DICOM_TEXT], issuer[DICOM_TEXT], birth[24], burned[8], lossy[8];
    int tiles;
    double between;                // mm: SpacingBetweenSlices
};

struct Reading {
    int file;
    const uint8_t *data;           // the file, mapped
    size_t size;
    std::vector<uint8_t> inflated; // the data set of a deflated file
    Facts facts;
    DicomFrame frame;              // what holds for every frame
    Span shared, per_frame;        // functional groups
    Element pixels, csa;
    int grid;                      // tiles along a side of a Siemens mosaic
    uint8_t block[4];              // where the private elements of `makers` are in this data set
};

// Where an element's value goes: a text (size > 0), a double or an int.
struct Field { uint32_t tag; int kind, is_double; size_t at, size; };
#define TEXT(tag, member) {tag, 0, 0, offsetof(Facts, member), sizeof(((Facts *)0)->member)}
#define WHOLE(tag, member, vr) {tag, VR(vr), 0, offsetof(Facts, member), 0}
static const Field header_fields[] = {
    TEXT(0x00080008, h.image_type), TEXT(0x00080016, h.sop_class), TEXT(0x00080018, h.instance), TEXT(0x00080060, h.modality),
    TEXT(0x0008103e, h.description), TEXT(0x00100010, name), TEXT(0x00100020, id), TEXT(0x00100021, issuer),
    TEXT(0x00100030, birth), TEXT(0x0020000d, h.study), TEXT(0x0020000e, h.series), TEXT(0x00280004, h.photometric),
    TEXT(0x00280301, burned), TEXT(0x00282110, lossy), WHOLE(0x00280002, h.samples, "US"), WHOLE(0x00280008, h.frames, "IS"),
    WHOLE(0x00280010, h.rows, "US"), WHOLE(0x00280011, h.cols, "US"), WHOLE(0x00280100, h.bits_allocated, "US"),
    WHOLE(0x00280101, h.bits_stored, "US"), WHOLE(0x00280102, h.high_bit, "US"), WHOLE(0x00280103, h.is_signed, "US"),
    WHOLE(0x0019100a, tiles, "US"), {0x00180088, VR("DS"), 1, offsetof(Facts, between), 0}};
#define OF_FRAME(tag, member, vr, is_double) {tag, VR(vr), is_double, offsetof(DicomFrame, member), 0}
static const Field frame_fields[] = {
    OF_FRAME(0x00180050, thickness, "DS", 1), OF_FRAME(0x00180081, echo_time, "DS", 1), OF_FRAME(0x00189082, echo_time, "FD", 1),
    OF_FRAME(0x00189087, b_value, "FD", 1), OF_FRAME(0x0019100c, b_value, "IS", 1), OF_FRAME(0x00431039, b_value, "IS", 1),
    OF_FRAME(0x20011003, b_value, "FL", 1), OF_FRAME(0x00180086, echo, "IS", 0), OF_FRAME(0x00200012, acquisition, "IS", 0),
    OF_FRAME(0x00209156, acquisition, "US", 0), OF_FRAME(0x00200013, instance, "IS", 0), OF_FRAME(0x00209057, instance, "UL", 0),
    OF_FRAME(0x00200100, temporal, "IS", 0), OF_FRAME(0x00209128, temporal, "UL", 0),
    {0x00089007, 0, 0, offsetof(DicomFrame, frame_type), sizeof(((DicomFrame *)0)->frame_type)}};

// Puts an element where the n fields say that its tag goes, in the Facts or DicomFrame at base.
static void take(const Field *fields, size_t n, const Element &e, uint32_t tag, void *base) {
    for (const Field *f = fields; f < fields + n; f++) {
        char *to = (char *)base + f->at;
        if (f->tag != tag) continue;
        if (f->size) text(e, to, f->size);
        else if (f->is_double) numbers(e, 1, f->kind, (double *)to);
        else if (e.length) *(int *)to = whole(e, f->kind);
    }
}

static const struct { uint16_t group; const char *creator; } makers[4] = {
    {0x0019, "SIEMENS MR HEADER"}, {0x0029, "SIEMENS CSA HEADER"}, {0x0043, "GEMS_PARM_01"}, {0x2001, "Philips Imaging DD 001"}};

// An element's tag; a private one as though its maker had block 10, or 0 if nothing is known of it. PS3.5 section 7.8.
static uint32_t known_tag(const Element &e, Reading *r) {
    uint32_t group = e.tag >> 16, number = e.tag & 0xffff;
    char creator[64];
    for (int i = 0; i < 4; i++) {
        if (group != makers[i].group) continue;
        if (r->block[i] && number >> 8 == r->block[i]) return group << 16 | 0x1000 | (number & 0xff);
        text(e, creator, sizeof creator);
        if (number >= 0x10 && number <= 0xff && !strcmp(creator, makers[i].creator)) r->block[i] = (uint8_t)number;
    }
    return group % 2 ? 0 : e.tag;
}

// One pass: a data set up to its pixels (top), or a functional group. What it says of a frame goes to *f. PS3.3 C.7.6.16.
static void read_elements(Span s, Reading *r, DicomFrame *f, bool top) {
    const int DS = VR("DS"), FD = VR("FD");
    double x[6], a, b;
    for (Element e; next(&s, &e);) {
        uint32_t tag = known_tag(e, r);
        if (top) take(header_fields, sizeof header_fields / sizeof *header_fields, e, tag, &r->facts);
        take(frame_fields, sizeof frame_fields / sizeof *frame_fields, e, tag, f);
        switch (tag) {
            case 0x0008002a: case 0x00189074: f->time = time_of(e, 8); break;
            case 0x00080032: if (time_of(e, 0) >= 0) f->time = time_of(e, 0); break;
            case 0x00080033: if (f->time < 0) f->time = time_of(e, 0); break;
            case 0x00181060: if (numbers(e, 1, DS, x)) f->time = x[0] / 1000; break;
            case 0x00209153: if (numbers(e, 1, FD, x)) f->time = x[0] / 1000; break;
            case 0x00181164: case 0x00182010: case 0x00280030: // the last is the best, and comes last
                if (!numbers(e, 2, DS, x) || !(x[0] > 0 && x[1] > 0)) break;
                f->has_spacing = 1, f->spacing_row = x[0], f->spacing_col = x[1];
                break;
            case 0x00200032: f->has_position = numbers(e, 3, DS, f->position); break;
            case 0x00200037:
                f->has_orientation = numbers(e, 6, DS, x);
                if (!f->has_orientation) break;
                a = sqrt(x[0] * x[0] + x[1] * x[1] + x[2] * x[2]), b = sqrt(x[3] * x[3] + x[4] * x[4] + x[5] * x[5]);
                f->has_orientation = a > 1e-3 && b > 1e-3;
                for (int i = 0; f->has_orientation && i < 3; i++) f->row[i] = x[i] / a, f->column[i] = x[3 + i] / b;
                break;
            case 0x00209056: // a short text; a number in practice, else one that tells stacks apart
                f->stack = whole(e, DS);
                if (f->stack < 0 && e.length) f->stack = (int)(crc32(0, e.value.at, e.length) & 0x7fffffff);
                break;
            case 0x00280120: // as the pixels are signed, whatever the element says of itself
                if (e.length == 2) e.vr = r->facts.h.is_signed ? VR("SS") : VR("US");
                if (top) r->facts.h.has_padding = numbers(e, 1, VR("US"), &r->facts.h.padding);
                break;
            case 0x00281052: case 0x00281053: // a garbled one must not pass for none
                if (!numbers(e, 1, DS, tag == 0x00281052 ? &f->intercept : &f->slope))
                    for (const uint8_t *p = e.value.at; p < e.value.end; p++)
                        if (*p != ' ' && *p) refuse("its rescale is no number");
                break;
            case 0x00291010: r->csa = e; break;
            case 0x00431039: if (f->b_value > 0) f->b_value = fmod(f->b_value, 100000); break; // newer GE: 1000000000 + b
            case 0x00209113: case 0x00209116: case 0x00289110: case 0x00289145: case 0x00209111: case 0x00189114: case 0x00189117:
            case 0x00189118: case 0x00189226: case 0x00189329: // plane position, orientation, measures, rescale, content, echo,
                read_elements(first_item(e), r, f, false);     // diffusion, cardiac trigger, frame types of MR and CT
                break;
            case 0x52009229: if (top) r->shared = first_item(e), r->facts.h.enhanced = 1; break;
            case 0x52009230: if (top) r->per_frame = e.value, r->facts.h.enhanced = 1; break;
            case PIXELS: case FLOAT_PIXELS: case DOUBLE_PIXELS:
                if (!top) break;
                r->pixels = e;
                r->facts.h.has_pixels = e.length > 0;
                return;
        }
    }
}

// The first n numbers that a Siemens CSA header has under a name; false where it has not. Layout: "SV10", 4 bytes, count, 77;
// per name 64 bytes, vm, vr[4], type, items, 77; per item four int32, the second its length, and text padded to four bytes.
static bool csa_numbers(const Element &csa, const char *name, uint32_t n, double *out) {
    const uint8_t *p = csa.value.at, *end = csa.value.end;
    if (end - p < 16 || memcmp(p, "SV10", 4)) return false;
    for (p += 16; end - p >= 84;) {
        bool here = !strncmp((const char *)p, name, 64);
        uint32_t items = (uint32_t)load(p + 76, 4, false);
        p += 84;
        for (uint32_t k = 0; k < items; k++) {
            if (end - p < 16) return false;
            size_t length = load(p + 4, 4, false);
            p += 16;
            if (length > (size_t)(end - p)) return false;
            Element item = {0, VR("DS"), 0, {p, p + strnlen((const char *)p, length), false, false, 0}};
            if (here && !numbers(item, 1, VR("DS"), out + k)) return false;
            if (here && k + 1 == n) return true;
            p += length + 3 < (size_t)(end - p) ? (length + 3) & ~(size_t)3 : (size_t)(end - p);
        }
    }
    return false;
}

// Whether the pixels that the header promises can be in the file: callers make room for them. Sets the type; for a Siemens
// mosaic, a square of tiles, also the grid.
static void check_pixels(Reading *r) {
    enum { MOST_RATIO = 2000, MOST_FRAMES = 1 << 20 }; // decoded to compressed bytes: more than any scan has
    DicomHeader *h = &r->facts.h;
    uint32_t there = r->pixels.length;
    if (h->rows < 1 || h->cols < 1) refuse("pixels without Rows and Columns");
    if (h->frames < 1) h->frames = 1;
    if (!h->bits_stored) h->bits_stored = h->bits_allocated;
    if (h->bits_stored < 1 || h->bits_stored > h->bits_allocated || h->bits_allocated > 64)
        refuse("%d bits stored of %d", h->bits_stored, h->bits_allocated);
    if (h->high_bit + 1 < h->bits_stored || h->high_bit >= h->bits_allocated) h->high_bit = h->bits_stored - 1; // none, or wrong
    h->type = r->pixels.tag == FLOAT_PIXELS ? RAW_F32 : r->pixels.tag == DOUBLE_PIXELS ? RAW_F64 :
              (h->bits_allocated <= 8 ? RAW_U8 : h->bits_allocated <= 16 ? RAW_U16 : RAW_U32) + h->is_signed;
    double bytes = (double)h->rows * h->cols * h->frames * h->samples * h->bits_allocated / 8;
    bool compressed = there == UNDEFINED, too_much = compressed && bytes > (double)MOST_RATIO * r->size;
    if (h->frames > MOST_FRAMES || (size_t)h->frames > r->size / 8 || too_much)
        refuse("%d frames of %dx%d in a file of %zu bytes", h->frames, h->cols, h->rows, r->size);
    if (h->samples == 1 && !compressed && bytes > there) refuse("cut short: %u of %.0f bytes of its pixels", there, bytes);
    if (!strstr(h->image_type, "MOSAIC") || h->enhanced) return;
    double tiles;
    if (r->facts.tiles < 1 && csa_numbers(r->csa, "NumberOfImagesInMosaic", 1, &tiles) && tiles >= 1 && tiles < 65536)
        r->facts.tiles = (int)tiles;
    r->grid = (int)ceil(sqrt(r->facts.tiles));
    if (r->grid < 1 || h->frames != 1 || h->rows % r->grid || h->cols % r->grid)
        refuse("a Siemens mosaic of %dx%d pixels with %d tiles", h->cols, h->rows, r->facts.tiles);
    h->mosaic = 1;
    h->rows /= r->grid, h->cols /= r->grid, h->frames = r->facts.tiles;
}

// The frames of a file with pixels. A mosaic's position is that of a slice as large as the whole mosaic, so the first tile's
// is half the difference further in; the stack goes along CSA's normal (nibabel, dicom_mosaic).
static void frames_read(Reading *r, DicomFrame *frames) {
    const DicomHeader *h = &r->facts.h;
    DicomFrame *f = &r->frame;
    double csa[3], normal[3] = {0}, between = r->facts.between > 0 ? r->facts.between : f->thickness, along = between;
    int groups = 0, strict = !strcmp(h->modality, "CT") || !strcmp(h->modality, "MR"); // other objects count as they like
    for (int i = 0; h->mosaic && i < 3; i++) {
        int j = (i + 1) % 3, k = (i + 2) % 3;
        normal[i] = f->row[j] * f->column[k] - f->row[k] * f->column[j];
        f->position[i] += (r->grid - 1) * 0.5 * (h->cols * f->spacing_col * f->row[i] + h->rows * f->spacing_row * f->column[i]);
    }
    if (h->mosaic && csa_numbers(r->csa, "SliceNormalVector", 3, csa) &&
        csa[0] * normal[0] + csa[1] * normal[1] + csa[2] * normal[2] < 0) along = -between;
    // One position for all of several frames is where none of them is known to be; a shared group may say otherwise.
    if (h->frames > 1) f->has_position &= h->mosaic && f->has_orientation && f->has_spacing && between > 0;
    read_elements(r->shared, r, f, false);
    Element item;
    for (int k = 0; k < h->frames; k++) {
        frames[k] = *f;
        for (int i = 0; i < 3; i++) frames[k].position[i] += k * along * normal[i];
        if (h->frames > 1) frames[k].instance = k + 1;
        if (!next(&r->per_frame, &item) || item.tag != ITEM) continue;
        groups++;
        read_elements(item.value, r, &frames[k], false);
    }
    int more = next(&r->per_frame, &item) && item.tag == ITEM;
    if (strict && (more || (groups && groups != h->frames)))
        refuse("functional groups for %s%d of its %d frames", more ? "more than " : "", groups, h->frames);
}

// Goes on in the inflated data set of a deflated file; a stream that does not end has been cut.
static void inflate_rest(Reading *r, Span *s) {
    enum { CHUNK = 1 << 20 };
    std::vector<uint8_t> &v = r->inflated;
    z_stream z = {};
    z.next_in = (Bytef *)s->at, z.avail_in = (uInt)(s->end - s->at);
    if (inflateInit2(&z, -MAX_WBITS) != Z_OK) throw std::bad_alloc();
    int status;
    do {
        v.resize(v.size() + CHUNK);
        z.next_out = &v[v.size() - CHUNK], z.avail_out = CHUNK;
        status = inflate(&z, Z_NO_FLUSH);
    } while (status == Z_OK);
    inflateEnd(&z);
    if (status != Z_STREAM_END) refuse("cut short: its deflated part does not end");
    s->at = v.data(), s->end = s->at + v.size() - z.avail_out;
}

// Reads the file at path up to its pixels. Byte order and explicit or implicit elements are taken from the first element of
// the data set, because files lie about them; the rest of the transfer syntax from the file's meta information.
static void file_read(const char *path, Reading *r) {
    DicomHeader *h = &r->facts.h;
    DicomFrame *f = &r->frame;
    h->samples = h->frames = 1, h->high_bit = -1;
    f->slope = 1, f->echo_time = f->b_value = f->time = -1;
    f->echo = f->temporal = f->acquisition = f->instance = f->stack = -1;
    struct stat s;
    r->file = open(path, O_RDONLY | O_CLOEXEC);
    if (r->file < 0) refuse("unreadable: %s", strerror(errno));
    int usual = !fstat(r->file, &s) && S_ISREG(s.st_mode) && s.st_size > 140;
    void *data = usual ? mmap(NULL, (size_t)s.st_size, PROT_READ, MAP_PRIVATE, r->file, 0) : MAP_FAILED;
    if (!usual) refuse("not DICOM");
    if (data == MAP_FAILED) refuse("unreadable: %s", strerror(errno));
    r->data = (const uint8_t *)data, r->size = (size_t)s.st_size;
    bool preamble = !memcmp(r->data + 128, "DICM", 4);
    Span set = {r->data + (preamble ? 132 : 0), r->data + r->size, false, false, 0};
    Element e;
    while (set.end - set.at >= 12 && load(set.at, 2, false) == 2 && next(&set, &e))
        if (e.tag == 0x00020010) text(e, h->syntax, sizeof h->syntax);
    if (!strcmp(syntax_find(h->syntax)->name, "deflated")) inflate_rest(r, &set);
    if (set.end - set.at < 12) refuse("cut short: nothing after its meta information");
    set.big = load(set.at, 2, true) < load(set.at, 2, false);
    set.implicit = !capitals(set.at + 4);
    if (!preamble && !*h->syntax && load(set.at, 2, set.big) != 8) refuse("not DICOM");
    if (!*h->syntax) snprintf(h->syntax, sizeof h->syntax, "%s%s", SYNTAX_ROOT, set.implicit ? "" : set.big ? ".2" : ".1");
    const Syntax *syntax = syntax_find(h->syntax);
    read_elements(set, r, f, true);
    if (!*h->sop_class && !h->has_pixels) refuse("not DICOM");
    const char *id = *r->facts.id ? r->facts.id : r->facts.name, *more = *r->facts.id ? r->facts.issuer : r->facts.birth;
    snprintf(h->patient, sizeof h->patient, "%s%s%s", id, *id && *more ? "^" : "", *id ? more : "");
    h->syntax_name = syntax->name;
    h->burned_in = !strcmp(r->facts.burned, "YES");
    h->lossy = syntax->lossy || !strcmp(r->facts.lossy, "01");
    h->is_signed = h->is_signed == 1;
    if (h->has_pixels) check_pixels(r);
    else h->frames = 0;
}

// A compressed image, and what its own header says of it. bits: of a sample.
struct Image { const uint8_t *data; size_t size; int bits, is_signed, rows, cols; };

// Reads an image's own header: SOF of JPEG and JPEG-LS (T.81 B.2.2), SIZ of JPEG 2000 (T.800 A.5.1); and finds its end.
// GDCM's JPEG 2000 writes as many pixels as this header says to a buffer of as many as DICOM's does, and all its decoders
// fill up what is missing.
static void image_open(Image *s, int codec) {
    const uint8_t *p = s->data, *q = (const uint8_t *)memmem(p, s->size < 512 ? s->size : 512, "\xff\x4f\xff\x51", 4);
    int samples = 0;
    if (codec == JPEG_2000 && q && p + s->size - q > 64) { // after JP2 boxes, perhaps; q[8]: width, height, left, top, tiles ...
        s->data = q, s->size -= (size_t)(q - p);
        s->cols = (int)(load(q + 8, 4, true) - load(q + 16, 4, true));
        s->rows = (int)(load(q + 12, 4, true) - load(q + 20, 4, true));
        samples = q[43] == 1 && q[44] == 1 ? (int)load(q + 40, 2, true) : 0;
        s->bits = (q[42] & 127) + 1, s->is_signed = q[42] >> 7;
    }
    for (size_t at = 2; codec != JPEG_2000 && !samples && at + 10 <= s->size && p[0] == 0xff && p[1] == 0xd8 && p[at] == 0xff;) {
        int marker = p[at + 1];
        if (marker == 0xf7 || (marker >= 0xc0 && marker <= 0xcf && marker != 0xc4 && marker != 0xc8 && marker != 0xcc))
            s->bits = p[at + 4], samples = p[at + 9], s->rows = p[at + 5] << 8 | p[at + 6], s->cols = p[at + 7] << 8 | p[at + 8];
        at += marker == 0xff ? 1 : 2 + load(p + at + 2, 2, true);
    }
    if (samples != 1 || s->bits > 16 || s->bits < 2) refuse("a compressed image of %d samples of %d bits", samples, s->bits);
    size_t end = s->size, least = end > 64 ? end - 64 : 2; // padding may follow
    while (s->data[end - 2] != 0xff || s->data[end - 1] != 0xd9)
        if (--end < least) refuse("cut short: a compressed image without its end");
    s->size = end;
}

// An image to out [rows][cols], `bytes` each. GDCM gives one byte up to 8 bits, else two.
static void image_decode(Image s, int codec, int rows, int cols, int bytes, uint8_t *out) {
    image_open(&s, codec);
    size_t n = (size_t)rows * cols, wide = s.bits <= 8 ? 1 : 2;
    if (s.rows != rows || s.cols != cols || wide > (size_t)bytes)
        refuse("a compressed image of %dx%d and %d bits for one of %dx%d and %d", s.cols, s.rows, s.bits, cols, rows, 8 * bytes);
    gdcm::Fragment fragment;
    fragment.SetByteValue((const char *)s.data, (uint32_t)s.size);
    gdcm::SmartPointer<gdcm::SequenceOfFragments> fragments = new gdcm::SequenceOfFragments;
    fragments->AddFragment(fragment);
    gdcm::DataElement in(gdcm::Tag(0x7fe0, 0x0010)), decoded;
    in.SetValue(*fragments);
    std::unique_ptr<gdcm::ImageCodec> c;
    if (codec == JPEG_2000) c.reset(new gdcm::JPEG2000Codec);
    else if (codec == JPEG_LS) c.reset(new gdcm::JPEGLSCodec);
    else c.reset(new gdcm::JPEGCodec);
    const unsigned int size[3] = {(unsigned int)cols, (unsigned int)rows, 1};
    const uint16_t bits = (uint16_t)(wide == 1 ? 8 : s.bits), room = bits <= 8 ? 8 : bits <= 12 && codec == JPEG ? 12 : 16;
    c->SetNumberOfDimensions(2);
    c->SetDimensions(size);
    c->SetPlanarConfiguration(0);
    c->SetPhotometricInterpretation(gdcm::PhotometricInterpretation::MONOCHROME2);
    c->SetPixelFormat(gdcm::PixelFormat(1, room, bits, (uint16_t)(bits - 1), (uint16_t)s.is_signed));
    const gdcm::ByteValue *values = c->Decode(in, decoded) ? decoded.GetByteValue() : NULL;
    if (!values || values->GetLength() < n * wide) refuse("its compressed pixels cannot be decoded");
    const uint8_t *from = (const uint8_t *)values->GetPointer();
    if (wide == (size_t)bytes) memcpy(out, from, n * wide);
    else
        for (size_t i = 0; i < n * bytes; i++) {
            size_t pixel = i / bytes * wide, k = i % bytes;
            out[i] = k < wide ? from[pixel + k] : s.is_signed && from[pixel + wide - 1] >> 7 ? 255 : 0;
        }
}

// An image of n pixels to out, `bytes` each. PS3.5 annex G: a segment per byte of a pixel, the highest first.
static void rle_decode(const uint8_t *p, size_t size, size_t n, int bytes, uint8_t *out) {
    if (size < 64 || load(p, 4, false) != (uint64_t)bytes) refuse("no RLE image of %d bytes a pixel", bytes);
    for (int segment = 0; segment < bytes; segment++) {
        size_t at = load(p + 4 + 4 * segment, 4, false);
        uint8_t *to = out + (bytes - 1 - segment), *last = to + n * bytes;
        while (to < last) {
            int code = at < size ? (int8_t)p[at] : 0, run = code < 0 ? 1 - code : code + 1, step = code < 0 ? 0 : 1;
            if (code == -128) at++;
            else {
                if (at + 1 + (step ? run : 1) > size) refuse("cut short: an RLE segment ends early");
                for (int i = 0; i < run && to < last; i++, to += bytes) *to = p[at + 1 + i * step];
                at += 1 + (step ? run : 1);
            }
        }
    }
}

// The compressed images of a file. Each is one fragment; or, where there are more fragments, a frame begins where the offset
// table says, or without a table where a JPEG or JPEG 2000 stream begins: *joined then keeps the parts together.
static void frame_images(const Reading *r, size_t frames, std::vector<Image> *images, std::vector<uint8_t> *joined) {
    Span s = r->pixels.value, table = first_item(r->pixels);
    Element e;
    std::vector<Element> parts;
    size_t total = 0;
    s.depth = 1;                       // its items; an item of undefined length, which is damage, is one part
    for (; next(&s, &e) && e.tag == ITEM; parts.push_back(e)) total += (size_t)(e.value.end - e.value.at);
    if (parts.empty() || e.tag != SEQUENCE_END) refuse("cut short: its pixels do not end");
    const uint8_t *first = table.end;
    bool single = parts.size() == frames + 1, listed = table.end - table.at >= 4 * (ptrdiff_t)frames;
    if (!single) joined->reserve(total);
    for (size_t i = 1; i < parts.size(); i++) {
        const uint8_t *p = parts[i].value.at;
        size_t k = images->size(), bytes = (size_t)(parts[i].value.end - p);
        bool starts = single || k == 0 || (k < frames && (listed ? load(table.at + 4 * k, 4, s.big) == (size_t)(p - 8 - first) :
                      frames > 1 && bytes > 3 && p[0] == 0xff && (p[1] == 0xd8 || (p[1] == 0x4f && p[3] == 0x51))));
        if (starts) images->push_back({single ? p : joined->data() + joined->size(), 0, 0, 0, 0, 0});
        if (!single) joined->insert(joined->end(), p, p + bytes);
        images->back().size += bytes;
    }
    if (images->size() != frames) refuse("%zu fragments for %zu frames", parts.size() - 1, frames);
}

// Keeps the `stored` bits up to `high` of n values, sign-extended where T is signed.
template <typename T> static void pixels_tidy(void *out, size_t n, int stored, int high) {
    T *x = (T *)out;
    int left = 8 * (int)sizeof(T) - 1 - high, right = 8 * (int)sizeof(T) - stored;
    for (size_t i = 0; right && i < n; i++) x[i] = (T)((T)((uint32_t)x[i] << left) >> right);
}

// Copies n bytes of the file, from `at` in its mapping on: read, they need no page of the mapping.
static void read_at(const Reading *r, const uint8_t *at, uint8_t *out, size_t n) {
    for (ssize_t got; n; at += got, out += got, n -= (size_t)got)
        if ((got = pread(r->file, out, n, at - r->data)) <= 0) refuse("unreadable: %s", got ? strerror(errno) : "it has shrunk");
}

// The stored values of a file that has been read, to out [frames][rows][cols].
static void decode(const Reading *r, void *out) {
    const DicomHeader *h = &r->facts.h;
    const Syntax *syntax = syntax_find(h->syntax);
    int grid = h->mosaic ? r->grid : 1, frames = h->mosaic ? 1 : h->frames, rows = h->rows * grid, cols = h->cols * grid;
    int bytes = h->bits_allocated / 8, native = r->pixels.length != UNDEFINED;
    bool big = r->pixels.value.big;
    size_t image = (size_t)rows * cols, n = (size_t)h->frames * h->rows * h->cols;
    if (h->samples != 1) refuse("%d samples a pixel", h->samples);
    bool known = h->type == RAW_F64 ? bytes == 8 : h->type == RAW_F32 ? bytes == 4 : bytes == 1 || bytes == 2 || bytes == 4;
    if (!known || h->bits_allocated % 8) refuse("%d bits a pixel", h->bits_allocated);
    if (syntax->codec == UNKNOWN) refuse("%s (%s) cannot be decoded", syntax->name, h->syntax);
    if (native != (syntax->codec == NATIVE)) refuse("%s, yet its pixels are %scompressed", syntax->name, native ? "not " : "");
    std::vector<uint8_t> mosaic(h->mosaic ? image * bytes : 0), joined;
    std::vector<Image> images;
    uint8_t *pixels = h->mosaic ? mosaic.data() : (uint8_t *)out;
    const uint8_t *p = r->pixels.value.at;
    if (!native) frame_images(r, (size_t)frames, &images, &joined);
    else if (!big && r->inflated.empty()) read_at(r, p, pixels, image * frames * bytes);
    else if (!big) memcpy(pixels, p, image * frames * bytes);
    else // 8 bits as words: bytes in pairs
        for (size_t i = 0, turn = bytes == 1 && r->pixels.vr == VR("OW") ? 1 : bytes - 1; i < image * frames * bytes; i++)
            pixels[i] = p[(i ^ turn) < r->pixels.length ? i ^ turn : i];
    for (size_t k = 0; k < images.size(); k++, pixels += image * bytes)
        if (syntax->codec == RLE) rle_decode(images[k].data, images[k].size, image, bytes, pixels);
        else image_decode(images[k], syntax->codec, rows, cols, bytes, pixels);
    for (int k = 0; h->mosaic && k < h->frames; k++)
        for (int y = 0; y < h->rows; y++)
            memcpy((uint8_t *)out + ((size_t)k * h->rows + y) * h->cols * bytes,
                   &mosaic[((size_t)(k / grid * h->rows + y) * cols + k % grid * h->cols) * bytes], (size_t)h->cols * bytes);
    switch (h->type) {
        case RAW_U8: pixels_tidy<uint8_t>(out, n, h->bits_stored, h->high_bit); break;
        case RAW_I8: pixels_tidy<int8_t>(out, n, h->bits_stored, h->high_bit); break;
        case RAW_U16: pixels_tidy<uint16_t>(out, n, h->bits_stored, h->high_bit); break;
        case RAW_I16: pixels_tidy<int16_t>(out, n, h->bits_stored, h->high_bit); break;
        case RAW_U32: pixels_tidy<uint32_t>(out, n, h->bits_stored, h->high_bit); break;
        case RAW_I32: pixels_tidy<int32_t>(out, n, h->bits_stored, h->high_bit); break;
    }
}

// Reads the file and does `body` with it. 0 good, else -1 and the reason: C sees no exceptions.
template <typename Body> static int guarded(const char *path, char *reason, size_t size, Body body) {
    Reading r = {};
    int status = -1;
    r.file = -1;
    gdcm::Trace::DebugOff(), gdcm::Trace::WarningOff(), gdcm::Trace::ErrorOff();
    try {
        file_read(path, &r);
        body(&r);
        status = 0;
    } catch (const Refusal &e) {
        snprintf(reason, size, "%s", e.text);
    } catch (const std::bad_alloc &) {
        snprintf(reason, size, "out of memory");
    } catch (...) {
        snprintf(reason, size, "its decoder gave up");
    }
    if (r.data) munmap((void *)r.data, r.size);
    if (r.file >= 0) close(r.file);
    return status;
}

extern "C" int dicom_scan(const char *path, DicomHeader *header, DicomFrame **frames, void *out, size_t bytes, char *reason,
                          size_t size) {
    *frames = NULL;
    int bad = guarded(path, reason, size, [&](Reading *r) {
        *header = r->facts.h;
        if (!header->frames) return;
        *frames = (DicomFrame *)calloc(header->frames, sizeof **frames);
        if (!*frames) throw std::bad_alloc();
        frames_read(r, *frames);
        header->decoded = out && header->frames == 1 && 8 * bytes == (size_t)header->rows * header->cols * header->bits_allocated;
        if (header->decoded) decode(r, out);
    });
    if (bad) free(*frames), *frames = NULL;
    return bad;
}

extern "C" int dicom_decode(const char *path, const DicomHeader *header, void *out, char *reason, size_t size) {
    return guarded(path, reason, size, [&](Reading *r) {
        const DicomHeader *now = &r->facts.h;
        if (now->rows != header->rows || now->cols != header->cols || now->frames != header->frames || now->type != header->type)
            refuse("it has changed while it was read");
        decode(r, out);
    });
}
