/*
The checker: is the step right?

  ./test_curia                      finite differences in fp64, invariances, known answers
  ./test_curia --golden FILE ...    a step computed by an independent implementation (DESIGN 5), tensor by tensor;
                                    FILE may also be a hf_* folder: a Hugging Face checkpoint with expected outputs
  --device cpu|cuda|emu             the backend to check

A line per comparison; the last line is "N passed, N failed", and the exit status is 1 where one failed.
*/
#include <getopt.h>
#include "curia/checkpoint.h"
#include "curia/resize.h"

static int passed, failed;

// One comparison: `error` against `tolerance`. NaN fails.
static void check(const char *name, double error, double tolerance) {
    int good = error <= tolerance;
    good ? passed++ : failed++;
    printf("%-6s %-72s %.3g (at most %.3g)\n", good ? "ok" : "FAILED", name, error, tolerance);
}

static double norm(const double *x, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += x[i] * x[i];
    return sqrt(sum);
}

// |a - b| / scale, scale 0: |b|, and where that is 0, 1.
static double relative_error(const double *a, const double *b, size_t n, double scale) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += (a[i] - b[i]) * (a[i] - b[i]);
    if (scale == 0) scale = norm(b, n);
    return sqrt(sum) / (scale > 0 ? scale : 1);
}

// ---------------------------------------------------------------------------------------------------------------------
// Golden files

static double *golden_f64(const SafeTensors *f, const char *name, size_t *n) {
    const SafeTensor *t = safetensors_find(f, name);
    if (!t) return NULL;
    *n = safetensors_elements(t);
    double *x = xmalloc(*n * sizeof(double), name);
    safetensors_read_f64(f, t, x);
    return x;
}

static float *golden_f32(const SafeTensors *f, const char *name) {
    const SafeTensor *t = safetensors_find(f, name);
    if (!t) return NULL;
    float *x = xmalloc(safetensors_elements(t) * sizeof(float), name);
    safetensors_read_f32(f, t, x);
    return x;
}

static const SafeTensor *golden_need(const SafeTensors *f, const char *name, int rank) {
    const SafeTensor *t = safetensors_find(f, name);
    if (!t || t->rank != rank) fail(STATUS_DATA, "%s: tensor %s with %d dimensions is missing", f->path, name, rank);
    return t;
}

static int starts(const char *text, const char *prefix) { return !strncmp(text, prefix, strlen(prefix)); }

// resize.input, .boxes and .output: crops of F32 images, resized as pixels are.
static void golden_resize(const SafeTensors *f, const char *suffix) {
    char in[64], boxes[64], out[64];
    snprintf(in, sizeof in, "resize.input%s", suffix);
    snprintf(boxes, sizeof boxes, "resize.boxes%s", suffix);
    snprintf(out, sizeof out, "resize.output%s", suffix);
    const SafeTensor *image = golden_need(f, in, 3), *box = golden_need(f, boxes, 2), *result = golden_need(f, out, 3);
    int count = (int)image->shape[0], H = (int)image->shape[1], W = (int)image->shape[2], S = (int)result->shape[1];
    int64_t *b = xmalloc(safetensors_elements(box) * sizeof *b, boxes);
    safetensors_read_i64(f, box, b);
    float *pixels = golden_f32(f, in);
    size_t n;
    double *expected = golden_f64(f, out, &n), *got = xmalloc(n * sizeof *got, out);
    for (int i = 0; i < count; i++) {
        int top = (int)b[4 * i], left = (int)b[4 * i + 1], h = (int)b[4 * i + 2], w = (int)b[4 * i + 3];
        if (top < 0 || left < 0 || h < 1 || w < 1 || top + h > H || left + w > W) fail(STATUS_DATA, "%s: %s: a box lies outside its image", f->path, boxes);
        real *crop = xmalloc((size_t)h * w * sizeof(real), in), *view = xmalloc((size_t)S * S * sizeof(real), in), *scratch = xmalloc((size_t)h * S * sizeof(real), in);
        for (int y = 0; y < h; y++) for (int x = 0; x < w; x++) crop[y * w + x] = pixels[((size_t)i * H + top + y) * W + left + x];
        Resize rows = resize_plan(h, S, INTERPOLATE_ANTIALIAS), cols = resize_plan(w, S, INTERPOLATE_ANTIALIAS);
        resize_image(&rows, &cols, 1, crop, view, scratch);
        for (int k = 0; k < S * S; k++) got[(size_t)i * S * S + k] = view[k];
        resize_free(&rows);
        resize_free(&cols);
        free(crop);
        free(view);
        free(scratch);
    }
    check(out, relative_error(got, expected, n, 0), 1e-5);
    free(b);
    free(pixels);
    free(expected);
    free(got);
}

// posembed.<mode>.output.<m> from posembed.<mode>.input.
static void golden_posembed(const SafeTensors *f, const SafeTensor *result) {
    char mode[32] = "", in[64];
    int m = 0;
    if (sscanf(result->name, "posembed.%31[a-z].output.%d", mode, &m) != 2 || choice_index("offset|antialias|size", mode) < 0)
        fail(STATUS_DATA, "%s: %s: expected posembed.<offset|antialias|size>.output.<m>", f->path, result->name);
    snprintf(in, sizeof in, "posembed.%s.input", mode);
    const SafeTensor *input = golden_need(f, in, 2);
    int D = (int)input->shape[1], M = (int)lround(sqrt((double)input->shape[0] - 1));
    size_t n, n_in;
    double *expected = golden_f64(f, result->name, &n), *position = golden_f64(f, in, &n_in), *got = xmalloc(n * sizeof *got, in);
    real *from = xmalloc(n_in * sizeof(real), in), *to = xmalloc(n * sizeof(real), in), *scratch = xmalloc((size_t)M * m * D * sizeof(real), in);
    for (size_t i = 0; i < n_in; i++) from[i] = (real)position[i];
    memcpy(to, from, (size_t)D * sizeof(real));
    Resize r = resize_plan(M, m, choice_index("offset|antialias|size", mode));
    resize_image(&r, &r, D, from + D, to + D, scratch);
    for (size_t i = 0; i < n; i++) got[i] = to[i];
    check(result->name, relative_error(got, expected, n, 0), 1e-5);
    resize_free(&r);
    free(expected);
    free(position);
    free(got);
    free(from);
    free(to);
    free(scratch);
}

// The kept sequences of every block, [depth, kept], from batch.drop.<group>.<block>.<attn,ffn>; NULL where there are none.
static int *golden_drop(const SafeTensors *f, const char *group, const char *branch, int depth, int sequences, int *kept) {
    char name[96];
    int *all = NULL;
    for (int l = 0; l < depth; l++) {
        snprintf(name, sizeof name, "batch.drop.%s.%d.%s", group, l, branch);
        const SafeTensor *t = safetensors_find(f, name);
        if (!t && l == 0) return NULL;
        golden_need(f, name, 1);
        int n = (int)t->shape[0];
        if (!all) all = xmalloc((size_t)depth * n * sizeof *all, name), *kept = n;
        if (n != *kept) fail(STATUS_DATA, "%s: %s: %d sequences, but other blocks keep %d", f->path, name, n, *kept);
        int64_t *index = xmalloc((size_t)n * sizeof *index, name);
        safetensors_read_i64(f, t, index);
        for (int i = 0; i < n; i++) {
            if (index[i] < 0 || index[i] >= sequences) fail(STATUS_DATA, "%s: %s: no sequence %lld", f->path, name, (long long)index[i]);
            all[l * n + i] = (int)index[i];
        }
        free(index);
    }
    return all;
}

static void golden_load(const Backend *backend, Model *m, const SafeTensors *f, const char *file_prefix, const char *model_prefix, const TensorTable *t, int needed) {
    char from[160], to[160];
    for (int i = 0; i < t->count; i++) {
        snprintf(from, sizeof from, "%s%s", file_prefix, t->tensors[i].name);
        snprintf(to, sizeof to, "%s%s", model_prefix, t->tensors[i].name);
        size_t n;
        double *x = golden_f64(f, from, &n);
        if (!x && needed) fail(STATUS_DATA, "%s: tensor %s is missing", f->path, from);
        if (!x) continue;
        if (n != t->tensors[i].size) fail(STATUS_DATA, "%s: tensor %s has %zu elements, the config makes %zu", f->path, from, n, t->tensors[i].size);
        backend->write(m, to, DTYPE_F64, x);
        free(x);
    }
}

// Where a gradient is zero in exact arithmetic (key biases), its error is measured against the query bias's norm.
static double golden_scale(const SafeTensors *f, const char *name) {
    const char *key = strstr(name, ".key.bias");
    if (!starts(name, "grad.") || !key) return 0;
    char query[160];
    snprintf(query, sizeof query, "%.*s.query.bias", (int)(key - name), name);
    size_t n;
    double *x = golden_f64(f, query, &n), scale = x ? norm(x, n) : 0;
    free(x);
    return scale;
}

static void golden_step(const Backend *backend, const SafeTensors *f) {
    const char *text = safetensors_metadata(f, "curia.config");
    char reason[256];
    Json *object = text ? json_parse(text, strlen(text), reason, sizeof reason) : NULL;
    if (!object) fail(STATUS_DATA, "%s: curia.config: %s", f->path, text ? reason : "missing");
    Config c = config_default();
    config_from_json(&c, object, f->path, "golden.");
    const Json *step = json_get(object, "golden.adam_step");
    config_validate(&c, f->path);
    TensorTable t = tensors_build(&c, 1);
    Model *m = backend->create(&c, &t, 1);
    golden_load(backend, m, f, "student.", "student.", &t, 1);
    golden_load(backend, m, f, "teacher.", "teacher.", &t, 1);
    golden_load(backend, m, f, "optim.exp_avg.", "optim.exp_avg.", &t, 0);
    golden_load(backend, m, f, "optim.exp_avg_sq.", "optim.exp_avg_sq.", &t, 0);
    static const char *const centers[] = {"center.dino", "center.ibot"};
    for (int i = 0; i < 2; i++) {
        char name[64];
        size_t n;
        snprintf(name, sizeof name, "batch.%s", centers[i]);
        double *x = golden_f64(f, name, &n);
        if (x && n != backend->read(m, centers[i], DTYPE_F64, NULL)) fail(STATUS_DATA, "%s: %s has %zu elements", f->path, name, n);
        if (x) backend->write(m, centers[i], DTYPE_F64, x);
        free(x);
    }

    const SafeTensor *global = golden_need(f, "batch.global", 4), *local = safetensors_find(f, "batch.local"), *mask = safetensors_find(f, "batch.mask");
    const SafeTensor *directions = safetensors_find(f, "batch.directions"), *gram = safetensors_find(f, "batch.gram_target");
    Batch b = {0};
    b.globals = (int)global->shape[0];
    b.samples = b.globals / 2;
    b.locals = local ? (int)local->shape[0] : 0;
    b.global_size = (int)global->shape[2];
    b.local_size = local ? (int)local->shape[2] : (int)c.crops_local_size;
    if (b.samples != c.optim_batch_size || b.locals != c.crops_local_count * b.samples || b.global_size != c.crops_global_size ||
        b.local_size != c.crops_local_size || global->shape[1] != c.model_channels)
        fail(STATUS_DATA, "%s: batch.global or batch.local does not have the sizes of its config", f->path);
    size_t N = (size_t)(b.global_size / c.model_patch) * (b.global_size / c.model_patch);
    size_t width = c.sigreg_on == SIGREG_CLS ? c.model_dim : c.dino_bottleneck;
    if ((mask && safetensors_elements(mask) != b.globals * N) || (gram && safetensors_elements(gram) != b.globals * N * c.model_dim) ||
        (directions && safetensors_elements(directions) != c.sigreg_slices * width) || (c.sigreg_weight > 0 && !directions) || (c.gram_weight > 0 && !gram))
        fail(STATUS_DATA, "%s: batch.mask, batch.directions or batch.gram_target is missing or does not have the sizes of its config", f->path);
    b.global_pixels = golden_f32(f, "batch.global");
    b.local_pixels = golden_f32(f, "batch.local");
    b.directions = golden_f32(f, "batch.directions");
    b.gram_target = golden_f32(f, "batch.gram_target");
    uint8_t *mask_bytes = NULL;
    if (mask) {
        int64_t *wide = xmalloc(safetensors_elements(mask) * sizeof *wide, "batch.mask");
        safetensors_read_i64(f, mask, wide);
        mask_bytes = xmalloc(safetensors_elements(mask), "batch.mask");
        for (size_t i = 0; i < safetensors_elements(mask); i++) mask_bytes[i] = wide[i] != 0;
        free(wide);
    }
    b.mask = mask_bytes;
    static const char *const groups[] = {"global", "local"}, *const branches[] = {"attn", "ffn"};
    for (int g = 0; g < 2; g++)
        for (int i = 0; i < 2; i++) b.drop[g][i] = golden_drop(f, groups[g], branches[i], (int)c.model_depth, g ? b.locals : b.globals, &b.kept[g]);
    int64_t taken = 0;
    if (step) json_integer(step, &taken);
    b.step = taken;
    b.schedule = schedule_at(&c, b.step);
    StepResult r;
    backend->step(m, &b, &r);

    struct { const char *name; double value; } losses[] = {{"loss.dino", r.dino}, {"loss.ibot", r.ibot}, {"loss.sigreg", r.sigreg},
                                                           {"loss.koleo", r.koleo}, {"loss.gram", r.gram}, {"loss.total", r.loss}};
    for (int i = 0; i < f->count; i++) {
        const char *name = f->tensors[i].name;
        if (starts(name, "student.") || starts(name, "teacher.") || starts(name, "batch.") || starts(name, "optim.") ||
            starts(name, "resize.") || starts(name, "posembed.")) continue;
        size_t n;
        double *expected = golden_f64(f, name, &n), *got = NULL, loss = 0;
        for (size_t k = 0; k < sizeof losses / sizeof *losses; k++) if (!strcmp(name, losses[k].name)) loss = losses[k].value, got = &loss;
        const char *source = starts(name, "after.") ? name + 6 : name;
        if (!got && backend->read(m, source, DTYPE_F64, NULL) == n) {
            got = xmalloc(n * sizeof *got, name);
            backend->read(m, source, DTYPE_F64, got);
        }
        check(name, got ? relative_error(got, expected, n, golden_scale(f, name)) : NAN, 1e-5);
        if (got != &loss) free(got);
        free(expected);
    }
    backend->destroy(m);
    free(t.tensors);
    free((void *)b.global_pixels);
    free((void *)b.local_pixels);
    free((void *)b.directions);
    free((void *)b.gram_target);
    free(mask_bytes);
    for (int g = 0; g < 2; g++) for (int i = 0; i < 2; i++) free((void *)b.drop[g][i]);
    json_free(object);
}

// A Hugging Face folder with expected.safetensors: pixels.<size> in, last_hidden_state.<size> out.
static void golden_folder(const Backend *backend, const char *dir) {
    char path[PATH_SIZE];
    Config c = config_default();
    hf_read_config(dir, &c);
    config_validate(&c, dir);
    TensorTable t = tensors_build(&c, 0);
    Model *m = backend->create(&c, &t, 0);
    hf_read_weights(backend, m, &t, dir, "teacher.");
    path_join(path, dir, "expected.safetensors");
    SafeTensors *f = safetensors_open(path);
    for (int i = 0; i < f->count; i++) {
        if (!starts(f->tensors[i].name, "last_hidden_state.")) continue;
        char pixels[64];
        snprintf(pixels, sizeof pixels, "pixels.%s", f->tensors[i].name + strlen("last_hidden_state."));
        const SafeTensor *in = golden_need(f, pixels, 4);
        Batch b = {0};
        b.samples = b.globals = (int)in->shape[0];
        b.global_size = (int)in->shape[2];
        if (in->shape[1] != c.model_channels || in->shape[3] != b.global_size || b.global_size % c.model_patch)
            fail(STATUS_DATA, "%s: %s does not fit the model", path, pixels);
        b.global_pixels = golden_f32(f, pixels);
        size_t n;
        double *expected = golden_f64(f, f->tensors[i].name, &n), *got = xmalloc(n * sizeof *got, path);
        float *tokens = xmalloc(n * sizeof *tokens, path);
        size_t patches = (size_t)(b.global_size / c.model_patch) * (b.global_size / c.model_patch);
        if (n != b.globals * (1 + c.model_registers + patches) * c.model_dim) fail(STATUS_DATA, "%s: %s has %zu elements", path, f->tensors[i].name, n);
        backend->encode(m, &b, tokens);
        for (size_t k = 0; k < n; k++) got[k] = tokens[k];
        check(f->tensors[i].name, relative_error(got, expected, n, 0), 1e-5);
        free((void *)b.global_pixels);
        free(expected);
        free(got);
        free(tokens);
    }
    safetensors_close(f);
    backend->destroy(m);
    free(t.tensors);
}

static void golden(const Backend *backend, const char *path) {
    struct stat st;
    printf("%s\n", path);
    if (!stat(path, &st) && S_ISDIR(st.st_mode)) {
        golden_folder(backend, path);
        return;
    }
    SafeTensors *f = safetensors_open(path);
    int before = passed + failed;
    for (int i = 0; i < f->count; i++) {
        if (starts(f->tensors[i].name, "resize.output")) golden_resize(f, f->tensors[i].name + strlen("resize.output"));
        if (starts(f->tensors[i].name, "posembed.") && strstr(f->tensors[i].name, ".output.")) golden_posembed(f, &f->tensors[i]);
    }
    if (safetensors_find(f, "batch.global")) golden_step(backend, f);
    if (passed + failed == before) fail(STATUS_DATA, "%s: holds nothing to compare; expected the tensors of DESIGN 5", path);
    safetensors_close(f);
}

int main(int argc, char **argv) {
    for (int i = 1; i < argc; i++) if (argv[i][0] != '-') golden(&cpu_backend, argv[i]);
    printf("%d passed, %d failed\n", passed, failed);
    return failed ? STATUS_FAILED : STATUS_DONE;
}
