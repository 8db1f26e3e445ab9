/*
Contact sheets of what is in shards, drawn from the shards alone, so that they show nothing that the shards do not hold.

  preview_write      PNG sheets of tiles: the middle slice of each volume and plane, with what the shard says about it
  PreviewSheet       the sheet being drawn
  preview_dot, preview_text      a pixel, and text in a font of 5x7
  preview_weights, preview_resample   a slice at the size of its tile
  preview_tone       grey of a CT value
  preview_window     two pixel values for black and white, where the unit is the scanner's own
  preview_region     a mask at the size of its tile
  preview_outline    the border of regions
  preview_tile       one slice with its overlays, orientation letters and caption
  preview_path, preview_save     a sheet's name, and the sheet as a PNG without time or text

Overlays: green, the body box; red, the anatomy centre (cross) and one deviation of the spread around it (ellipse); orange,
the borders in the mask. A caption says which volume of the dataset it is, from 1, modality, plane, rows x columns;
mm between rows x columns x slices, and how many slices are stored; above it, label or target where the slice has one.
Built with -DCURIA_PNG, link -lpng; without it preview_write only warns.
*/
#ifndef CURIA_PREVIEW_H
#define CURIA_PREVIEW_H

#include "../curia/file.h"
#include "../dataloader.h"

#ifndef CURIA_PNG

// Draws nothing, says why, and returns 0.
static inline int preview_write(const char *folder, const char *const *paths, int n_paths, int most_sheets) {
    (void)folder, (void)paths, (void)n_paths, (void)most_sheets;
    warn("previews need libpng: install libpng-dev and run make again");
    return 0;
}

#else

#include <png.h>

enum {
    PREVIEW_ACROSS = 6, PREVIEW_TILES = PREVIEW_ACROSS * PREVIEW_ACROSS,    // tiles a sheet
    PREVIEW_SIDE = 256, PREVIEW_MARGIN = 16, PREVIEW_LINE = 18,             // a tile's image, room for letters, for a text line
    PREVIEW_FAR = PREVIEW_MARGIN + PREVIEW_SIDE, PREVIEW_ROOM = PREVIEW_FAR + PREVIEW_MARGIN, // where letters start and end
    PREVIEW_WIDE = PREVIEW_ROOM + 12, PREVIEW_HIGH = PREVIEW_ROOM + 2 * PREVIEW_LINE + 8      // from cell to cell
};

// A pixel is one byte, so that a third is there to compress: a grey from black (0) to white, or a colour.
enum { PREVIEW_WHITE = 250, PREVIEW_ORANGE, PREVIEW_DARK_RED, PREVIEW_GREEN, PREVIEW_RED, PREVIEW_YELLOW, PREVIEW_COLOURS };
static const uint32_t preview_rgb[] = {0xFFFFFF, 0xFF9000, 0xA02020, 0x00C000, 0xFF3030, 0xFFFF60}; // from white on
enum { PREVIEW_GROUND = PREVIEW_WHITE * 2 / 13, PREVIEW_PALE = PREVIEW_WHITE * 7 / 8 };

typedef struct {
    uint8_t *pixels;     // [height][width]
    int width, height;
} PreviewSheet;

// Sets pixel (x, y); outside the sheet nothing happens.
static inline void preview_dot(PreviewSheet *s, int x, int y, int colour) {
    if (x >= 0 && y >= 0 && x < s->width && y < s->height) s->pixels[(size_t)y * s->width + x] = (uint8_t)colour;
}

// Draws text with its upper left corner at (x, y), at twice the font's size where that fits in `room` pixels, else at the
// font's size and cut off there. Characters that the font lacks stay blank.
static inline void preview_text(PreviewSheet *s, int x, int y, int room, const char *text, int colour) {
    static const char known[] = "0123456789.-+?ABCEGILMOPRSTX";
    static const uint8_t font[][5] = {      // five columns each, the top row in the lowest bit
        {0x3E, 0x51, 0x49, 0x45, 0x3E}, {0x00, 0x42, 0x7F, 0x40, 0x00}, {0x42, 0x61, 0x51, 0x49, 0x46}, // 0 1 2
        {0x21, 0x41, 0x45, 0x4B, 0x31}, {0x18, 0x14, 0x12, 0x7F, 0x10}, {0x27, 0x45, 0x45, 0x45, 0x39}, // 3 4 5
        {0x3C, 0x4A, 0x49, 0x49, 0x30}, {0x01, 0x71, 0x09, 0x05, 0x03}, {0x36, 0x49, 0x49, 0x49, 0x36}, // 6 7 8
        {0x06, 0x49, 0x49, 0x29, 0x1E}, {0x00, 0x60, 0x60, 0x00, 0x00}, {0x08, 0x08, 0x08, 0x08, 0x08}, // 9 . -
        {0x08, 0x08, 0x3E, 0x08, 0x08}, {0x02, 0x01, 0x51, 0x09, 0x06}, {0x7E, 0x11, 0x11, 0x11, 0x7E}, // + ? A
        {0x7F, 0x49, 0x49, 0x49, 0x36}, {0x3E, 0x41, 0x41, 0x41, 0x22}, {0x7F, 0x49, 0x49, 0x49, 0x41}, // B C E
        {0x3E, 0x41, 0x49, 0x49, 0x7A}, {0x00, 0x41, 0x7F, 0x41, 0x00}, {0x7F, 0x40, 0x40, 0x40, 0x40}, // G I L
        {0x7F, 0x02, 0x0C, 0x02, 0x7F}, {0x3E, 0x41, 0x41, 0x41, 0x3E}, {0x7F, 0x09, 0x09, 0x09, 0x06}, // M O P
        {0x7F, 0x09, 0x19, 0x29, 0x46}, {0x46, 0x49, 0x49, 0x49, 0x31}, {0x01, 0x01, 0x7F, 0x01, 0x01}, // R S T
        {0x63, 0x14, 0x08, 0x14, 0x63},                                                                 // X
    };
    int size = (int)strlen(text) * 12 - 2 <= room ? 2 : 1;
    for (int n = 0; text[n] && (n * 6 + 5) * size <= room; n++) {
        const char *at = strchr(known, text[n]);
        if (!at) continue;
        for (int i = 0; i < 5 * size; i++)
            for (int j = 0; j < 7 * size; j++)
                if (font[at - known][i / size] >> j / size & 1) preview_dot(s, x + n * 6 * size + i, y + j, colour);
    }
}

// Along one axis: of which source pixels, `stride` at most from from[i] on, each of `out` pixels is made, and how much of
// each. Weights fall linearly to 0 at one source pixel's distance, or at one output pixel's where that is more: so this
// interpolates where it enlarges, and leaves no pixel out where it reduces.
static inline float *preview_weights(int source, int out, int *from, int *stride) {
    double step = (double)source / out, reach = fmax(1, step);
    *stride = (int)(2 * reach) + 2;
    float *weights = (float *)xmalloc((size_t)out * *stride * sizeof *weights, "a preview");
    for (int i = 0; i < out; i++) {
        double at = (i + 0.5) * step - 0.5, total = 0;
        from[i] = (int)fmax(0, at - reach + 1);
        for (int pass = 0; pass < 2; pass++)
            for (int k = 0; k < *stride && from[i] + k < source; k++) {
                double weight = fmax(0, 1 - fabs(from[i] + k - at) / reach);
                if (pass) weights[(size_t)i * *stride + k] = (float)(weight / total);
                else total += weight;
            }
    }
    return weights;
}

// out[h][w] from pixels [rows][cols], in pixel values: along rows, then along columns.
static inline void preview_resample(const int16_t *pixels, int rows, int cols, float *out, int h, int w) {
    int across[PREVIEW_SIDE], down[PREVIEW_SIDE], wide, high;
    float *weights_x = preview_weights(cols, w, across, &wide), *weights_y = preview_weights(rows, h, down, &high);
    float *narrow = (float *)xmalloc((size_t)rows * w * sizeof *narrow, "a preview");
    for (int r = 0; r < rows; r++)
        for (int x = 0; x < w; x++)
            for (int k = 0; k < wide && across[x] + k < cols; k++)
                narrow[(size_t)r * w + x] += weights_x[(size_t)x * wide + k] * pixels[(size_t)r * cols + across[x] + k];
    memset(out, 0, (size_t)h * w * sizeof *out);
    for (int y = 0; y < h; y++)
        for (int k = 0; k < high && down[y] + k < rows; k++)
            for (int x = 0; x < w; x++) out[y * w + x] += weights_y[(size_t)y * high + k] * narrow[(size_t)(down[y] + k) * w + x];
    free(weights_x);
    free(weights_y);
    free(narrow);
}

// Grey of a CT value, 0 or less for black, 1 or more for white: one curve for lung, fat, soft tissue and bone, steepest from
// 0 to 100 HU so that brain and liver are not flat.
static inline double preview_tone(double hu) {
    static const double knots[][2] = {{-1000, 0}, {-700, 0.17}, {-160, 0.22}, {0, 0.4}, {100, 0.72}, {240, 0.85}, {1500, 1}};
    int i = 1;
    while (i < 6 && hu > knots[i][0]) i++;
    double along = (hu - knots[i - 1][0]) / (knots[i][0] - knots[i - 1][0]);
    return knots[i - 1][1] + along * (knots[i][1] - knots[i - 1][1]);
}

// The 1st and 99th percentile of the stored pixels in the slice's body box; *high is above *low also where all are equal.
static inline void preview_window(const ShardSlice *s, const int16_t *pixels, int *low, int *high) {
    uint32_t *count = (uint32_t *)xmalloc(65536 * sizeof *count, "a histogram"), below, above;
    uint32_t part = (uint32_t)(s->box_bottom - s->box_top) * (uint32_t)(s->box_right - s->box_left) / 100;
    for (int r = s->box_top; r < s->box_bottom; r++)
        for (int c = s->box_left; c < s->box_right; c++) count[pixels[(size_t)r * s->cols + c] + 32768]++;
    *low = 0, *high = 65535;
    for (below = count[*low]; below <= part; below += count[*low]) ++*low;
    for (above = count[*high]; above <= part; above += count[*high]) --*high;
    free(count);
    *low -= 32768;
    *high -= 32768;
    if (*high <= *low) *high = *low + 1;
}

// region[h][w] from mask [rows][cols]: the highest number under each pixel, so that a small lesion is not lost.
static inline void preview_region(const uint8_t *mask, int rows, int cols, uint8_t *region, int h, int w) {
    for (int y = 0; y < h; y++)
        for (int x = 0; x < w; x++) {
            int top = y * rows / h, bottom = (y + 1) * rows / h, left = x * cols / w, right = (x + 1) * cols / w;
            uint8_t most = 0;
            for (int r = top; r < bottom || r == top; r++)
                for (int c = left; c < right || c == left; c++)
                    if (mask[(size_t)r * cols + c] > most) most = mask[(size_t)r * cols + c];
            region[y * w + x] = most;
        }
}

// Draws the pixels of region[h][w] that are not 0 and lie at its edge or beside another number; (x, y): upper left corner.
static inline void preview_outline(PreviewSheet *s, int x, int y, const uint8_t *region, int h, int w, int colour) {
    for (int r = 0; r < h; r++)
        for (int c = 0; c < w; c++) {
            const uint8_t *at = region + r * w + c;
            int edge = r == 0 || c == 0 || r == h - 1 || c == w - 1;
            if (*at && (edge || at[-1] != *at || at[1] != *at || at[-w] != *at || at[w] != *at))
                preview_dot(s, x + c, y + r, colour);
        }
}

// Draws dataset index i, the middle one of the `slices` of the number-th volume, in the cell whose upper left corner is
// (x, y). Fails with status 3 where the slice's checksum differs.
static inline void preview_tile(PreviewSheet *sheet, int x, int y, Dataset *d, uint64_t i, uint64_t number, uint64_t slices) {
    static const char *const modality[MODALITY_COUNT] = {"?", "CT", "MR"}, *const plane[PLANE_COUNT] = {"AX", "COR", "SAG"};
    static const char edges[PLANE_COUNT][4][2] = {{"R", "L", "A", "P"}, {"R", "L", "S", "I"}, {"A", "P", "S", "I"}};
    const int16_t *pixels;
    const uint8_t *mask;
    dataset_verify_slice(d, i);
    const ShardSlice *s = dataset_slice(d, i, &pixels, &mask);
    double mm_high = (double)s->rows * s->spacing_row, mm_wide = (double)s->cols * s->spacing_col;
    double per_mm = PREVIEW_SIDE / fmax(mm_high, mm_wide);
    int h = (int)fmax(1, rint(mm_high * per_mm)), w = (int)fmax(1, rint(mm_wide * per_mm)), low, high;
    float *picture = (float *)xmalloc((size_t)h * w * sizeof *picture, "a preview");
    uint8_t *region = (uint8_t *)xmalloc((size_t)h * w, "a preview");

    for (int r = 0; r < PREVIEW_SIDE; r++)
        for (int c = 0; c < PREVIEW_SIDE; c++) preview_dot(sheet, x + PREVIEW_MARGIN + c, y + PREVIEW_MARGIN + r, 0);
    int left = x + PREVIEW_MARGIN + (PREVIEW_SIDE - w) / 2, top = y + PREVIEW_MARGIN + (PREVIEW_SIDE - h) / 2;
    preview_resample(pixels, s->rows, s->cols, picture, h, w);
    preview_window(s, pixels, &low, &high);
    for (int r = 0; r < h; r++)
        for (int c = 0; c < w; c++) {
            float pixel = picture[r * w + c];
            double grey = (pixel - low) / (high - low), hu = (double)s->scale * pixel + s->intercept;
            if (s->scale < 0) grey = 1 - grey;
            if (s->modality == MODALITY_CT) grey = preview_tone(hu);
            preview_dot(sheet, left + c, top + r, (int)(PREVIEW_WHITE * fmin(1, fmax(0, grey)) + 0.5));
        }

    double down = (double)h / s->rows, across = (double)w / s->cols;    // sheet pixels per slice pixel
    double middle_y = s->centre_row * down, middle_x = s->centre_col * across;
    if (mask) {
        preview_region(mask, s->rows, s->cols, region, h, w);
        preview_outline(sheet, left, top, region, h, w, PREVIEW_ORANGE);
    }
    for (int r = 0; r < h; r++)
        for (int c = 0; c < w; c++) {
            double y_off = (r + 0.5 - middle_y) / down / s->spread_row, x_off = (c + 0.5 - middle_x) / across / s->spread_col;
            region[r * w + c] = y_off * y_off + x_off * x_off <= 1;
        }
    preview_outline(sheet, left, top, region, h, w, PREVIEW_DARK_RED);
    for (int i = 0; i < h; i++)             // a pixel is in the box where the box covers any of it
        for (int j = 0; j < w; j++) {
            double r = i / down, c = j / across;
            region[i * w + j] = r + 1 / down > s->box_top && r < s->box_bottom && c + 1 / across > s->box_left &&
                                c < s->box_right;
        }
    preview_outline(sheet, left, top, region, h, w, PREVIEW_GREEN);
    for (int k = -4; k <= 4; k++) {
        preview_dot(sheet, left + (int)middle_x, top + (int)middle_y + k, PREVIEW_RED);
        preview_dot(sheet, left + (int)middle_x + k, top + (int)middle_y, PREVIEW_RED);
    }
    free(picture);
    free(region);

    char text[128];
    int middle = PREVIEW_ROOM / 2, side = middle - 12;      // side: room in the bottom margin beside its letter
    preview_text(sheet, x + 3, y + middle - 7, PREVIEW_MARGIN, edges[s->plane][0], PREVIEW_YELLOW);
    preview_text(sheet, x + PREVIEW_FAR + 3, y + middle - 7, PREVIEW_MARGIN, edges[s->plane][1], PREVIEW_YELLOW);
    preview_text(sheet, x + middle - 5, y + 1, PREVIEW_MARGIN, edges[s->plane][2], PREVIEW_YELLOW);
    preview_text(sheet, x + middle - 5, y + PREVIEW_FAR + 1, PREVIEW_MARGIN, edges[s->plane][3], PREVIEW_YELLOW);
    snprintf(text, sizeof text, "LABEL %d", s->label);
    if (s->label >= 0) preview_text(sheet, x, y + PREVIEW_FAR + 1, side, text, PREVIEW_PALE);
    snprintf(text, sizeof text, "TARGET %.3G", s->target);
    if (!isnan(s->target)) preview_text(sheet, x + middle + 12, y + PREVIEW_FAR + 1, side, text, PREVIEW_PALE);
    snprintf(text, sizeof text, "%llu %s %s %dX%d", (unsigned long long)number, modality[s->modality], plane[s->plane], s->rows,
             s->cols);
    preview_text(sheet, x, y + PREVIEW_ROOM, PREVIEW_ROOM, text, PREVIEW_PALE);
    const float mm[3] = {s->spacing_row, s->spacing_col, s->spacing_slice};
    int n = 0;
    for (int a = 0; a < 3; a++) n += snprintf(text + n, sizeof text - n, "%s%.*G", a ? "X" : "", mm[a] < 10 ? 2 : 3, mm[a]);
    snprintf(text + n, sizeof text - n, "MM %llu SL", (unsigned long long)slices);
    preview_text(sheet, x, y + PREVIEW_ROOM + PREVIEW_LINE, PREVIEW_ROOM, text, PREVIEW_PALE);
}

// path[PATH_SIZE] = the name of sheet number `sheet`, from 1, in the folder; returns path.
static inline char *preview_path(char *path, const char *folder, int sheet) {
    char name[32];
    snprintf(name, sizeof name, "preview-%d.png", sheet);
    return path_join(path, folder, sheet == 1 ? "preview.png" : name);
}

// Writes the sheet to path by way of path.partial, without time or text. Fails with status 1.
static inline void preview_save(const PreviewSheet *s, const char *path) {
    char partial[PATH_SIZE + 16];
    snprintf(partial, sizeof partial, "%s.partial", path);
    png_image image = {.version = PNG_IMAGE_VERSION, .width = s->width, .height = s->height, .format = PNG_FORMAT_RGB_COLORMAP,
                       .flags = PNG_IMAGE_FLAG_FAST, .colormap_entries = PREVIEW_COLOURS};
    uint8_t palette[PREVIEW_COLOURS][3];
    for (int i = 0; i < PREVIEW_COLOURS; i++) {
        uint32_t rgb = i < PREVIEW_WHITE ? 0x010101 * (uint32_t)(i * 255 / PREVIEW_WHITE) : preview_rgb[i - PREVIEW_WHITE];
        for (int k = 0; k < 3; k++) palette[i][k] = (uint8_t)(rgb >> (16 - 8 * k));
    }
    FILE *file = file_create(partial);
    if (!png_image_write_to_stdio(&image, file, 0, s->pixels, 0, palette)) {
        unlink(partial);     // where the disk is full, its room is wanted
        fail(STATUS_FAILED, "%s: cannot write it: %s; is the disk full?", partial, image.message);
    }
    file_close(file, partial);
    file_rename(partial, path);
}

// Draws at most most_sheets sheets, folder/preview.png, preview-2.png ..., of the shards at n_paths paths (as dataset_open
// takes them): one tile for each volume and plane in the dataset's order, or where there are too many for that, evenly
// spaced ones. Sheets of an earlier call beyond those are removed. Returns the number of sheets. The same shards give the same
// bytes. Fails with status 1 where it cannot write, 3 where a shard is bad.
static inline int preview_write(const char *folder, const char *const *paths, int n_paths, int most_sheets) {
    Dataset *d = dataset_open(paths, n_paths);
    uint64_t *first = NULL, n = 0, volume_id = 0;    // first: [n] dataset index where each volume and plane starts
    for (uint64_t i = 0, plane = PLANE_COUNT, capacity = 0; i < dataset_count(d); i++) {
        const ShardSlice *s = dataset_slice(d, i, NULL, NULL);
        if (s->volume_id == volume_id && s->plane == plane) continue;
        volume_id = s->volume_id;
        plane = s->plane;
        if (n == capacity) {
            capacity = capacity ? 2 * capacity : 256;
            first = (uint64_t *)realloc(first, capacity * sizeof *first);
            if (!first) fail(STATUS_FAILED, "out of memory: %llu volumes are too many", (unsigned long long)n);
        }
        first[n++] = i;
    }
    uint64_t room = most_sheets > 0 ? (uint64_t)most_sheets * PREVIEW_TILES : 0, tiles = n < room ? n : room;
    int sheets = (int)((tiles + PREVIEW_TILES - 1) / PREVIEW_TILES);
    char path[PATH_SIZE];
    for (int sheet = 0; sheet < sheets; sheet++) {
        int from = sheet * PREVIEW_TILES, here = tiles - from < PREVIEW_TILES ? (int)(tiles - from) : PREVIEW_TILES;
        int across = here < PREVIEW_ACROSS ? here : PREVIEW_ACROSS, down = (here + across - 1) / across;
        PreviewSheet s = {NULL, across * PREVIEW_WIDE, down * PREVIEW_HIGH};
        s.pixels = (uint8_t *)xmalloc((size_t)s.width * s.height, "a preview sheet");
        memset(s.pixels, PREVIEW_GROUND, (size_t)s.width * s.height);
        for (int t = 0; t < here; t++) {
            // Of every n/tiles volumes another one: a fixed step would meet the same plane of each scan.
            uint64_t k = from + t, low = k * n / tiles, high = (k + 1) * n / tiles, pick = low + k % (high - low);
            uint64_t slices = (pick + 1 < n ? first[pick + 1] : dataset_count(d)) - first[pick];
            int x = t % across * PREVIEW_WIDE, y = t / across * PREVIEW_HIGH;
            preview_tile(&s, x, y, d, first[pick] + slices / 2, pick + 1, slices);
        }
        preview_save(&s, preview_path(path, folder, sheet + 1));
        free(s.pixels);
    }
    for (int old = sheets + 1; unlink(preview_path(path, folder, old)) == 0;) old++;
    free(first);
    dataset_close(d);
    return sheets;
}

#endif
#endif
