/*
The checker: is the step right?

  ./test_curia                      finite differences in fp64, invariances, known answers; --quick leaves out the first
  ./test_curia --golden FILE ...    a step computed by an independent implementation (DESIGN 5), tensor by tensor;
                                    FILE may also be a hf_* folder: a Hugging Face checkpoint with expected outputs
  --device cuda|emu                 checks the CUDA backend, in fp32 and in 16 bits, on the GPU or under the emulator (`make emu`):
                                    without --golden, against the CPU backend on random cases; --quick leaves out the long ones

A line per comparison; the last line is "N passed, N failed", and the exit status is 1 where one failed.
*/
#include <dlfcn.h>
#include <getopt.h>
#include "curia/checkpoint.h"
#include "curia/cost.h"
#include "curia/gemm.h"
#include "curia/hash.h"
#include "curia/resize.h"
#include "curia/vecmath.h"
#include "curia/views.h"

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
        if (top < 0 || left < 0 || h < 1 || w < 1 || top + h > H || left + w > W)
            fail(STATUS_DATA, "%s: %s: a box lies outside its image", f->path, boxes);
        real *crop = xmalloc((size_t)h * w * sizeof(real), in), *view = xmalloc((size_t)S * S * sizeof(real), in),
             *scratch = xmalloc((size_t)h * S * sizeof(real), in);
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
    real *from = xmalloc(n_in * sizeof(real), in), *to = xmalloc(n * sizeof(real), in),
         *scratch = xmalloc((size_t)M * m * D * sizeof(real), in);
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
            if (index[i] < 0 || index[i] >= sequences)
                fail(STATUS_DATA, "%s: %s: no sequence %lld", f->path, name, (long long)index[i]);
            all[l * n + i] = (int)index[i];
        }
        free(index);
    }
    return all;
}

static void golden_load(const Backend *backend, Model *m, const SafeTensors *f, const char *file_prefix, const char *model_prefix,
                        const TensorTable *t, int needed) {
    char from[160], to[160];
    for (int i = 0; i < t->count; i++) {
        snprintf(from, sizeof from, "%s%s", file_prefix, t->tensors[i].name);
        snprintf(to, sizeof to, "%s%s", model_prefix, t->tensors[i].name);
        size_t n;
        double *x = golden_f64(f, from, &n);
        if (!x && needed) fail(STATUS_DATA, "%s: tensor %s is missing", f->path, from);
        if (!x) continue;
        if (n != t->tensors[i].size)
            fail(STATUS_DATA, "%s: tensor %s has %zu elements, the config makes %zu", f->path, from, n, t->tensors[i].size);
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

// Tolerance of one tensor: 1e-5, and for 16-bit arithmetic twice PyTorch's own error, which the file tells for some; NAN: not told.
// A loss is one number, whose error may be next to nothing by chance: losses are held to the largest error of the file's losses.
static double golden_tolerance(const Json *errors, const char *name, int half) {
    if (!half) return 1e-5;
    const Json *told = json_get(errors, "bfloat16");
    double most = NAN;
    for (int i = 0; told && i < told->count; i++) {
        const Json *error = &told->children[i];
        int same = !strcmp(told->keys[i], name) || (starts(told->keys[i], "loss.") && starts(name, "loss."));
        if (same && error->type == JSON_NUMBER && !(2 * strtod(error->text, NULL) <= most)) most = 2 * strtod(error->text, NULL);
    }
    return json_get(told, name) ? most : NAN;
}

// half: the backend computes in 16 bits.
static void golden_step(const Backend *backend, const SafeTensors *f, int half) {
    const char *text = safetensors_metadata(f, "curia.config");
    char reason[256];
    Json *object = text ? json_parse(text, strlen(text), reason, sizeof reason) : NULL;
    if (!object) fail(STATUS_DATA, "%s: curia.config: %s", f->path, text ? reason : "missing");
    const char *error_text = half ? safetensors_metadata(f, "curia.pytorch_error") : NULL;
    Json *errors = error_text ? json_parse(error_text, strlen(error_text), reason, sizeof reason) : NULL;
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

    const SafeTensor *global = golden_need(f, "batch.global", 4), *local = safetensors_find(f, "batch.local"),
                     *mask = safetensors_find(f, "batch.mask");
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
    if ((mask && safetensors_elements(mask) != b.globals * N) ||
        (gram && safetensors_elements(gram) != b.globals * N * c.model_dim) ||
        (directions && safetensors_elements(directions) != c.sigreg_slices * width) ||
        (c.sigreg_weight > 0 && !directions) || (c.gram_weight > 0 && !gram))
        fail(STATUS_DATA,
             "%s: batch.mask, batch.directions or batch.gram_target is missing or does not have the sizes of its config", f->path);
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
        for (int i = 0; i < 2; i++)
            b.drop[g][i] = golden_drop(f, groups[g], branches[i], (int)c.model_depth, g ? b.locals : b.globals, &b.kept[g]);
    int64_t taken = 0;
    if (step) json_integer(step, &taken);
    b.step = taken;
    b.all_tokens = 1;
    b.schedule = schedule_at(&c, b.step);
    StepResult r;
    backend->begin(m, &b);
    backend->end(m, &r);

    struct { const char *name; double value; } losses[] = {{"loss.dino", r.dino}, {"loss.ibot", r.ibot}, {"loss.sigreg", r.sigreg},
                                                           {"loss.koleo", r.koleo}, {"loss.gram", r.gram}, {"loss.total", r.loss}};
    for (int i = 0; i < f->count; i++) {
        const char *name = f->tensors[i].name;
        if (starts(name, "student.") || starts(name, "teacher.") || starts(name, "batch.") || starts(name, "optim.") ||
            starts(name, "resize.") || starts(name, "posembed.")) continue;
        size_t n;
        double tolerance = golden_tolerance(errors, name, half);
        if (isnan(tolerance)) continue;
        double *expected = golden_f64(f, name, &n), *got = NULL, loss = 0;
        for (size_t k = 0; k < sizeof losses / sizeof *losses; k++)
            if (!strcmp(name, losses[k].name)) loss = losses[k].value, got = &loss;
        const char *source = starts(name, "after.") ? name + 6 : name;
        if (!got && backend->read(m, source, DTYPE_F64, NULL) == n) {
            got = xmalloc(n * sizeof *got, name);
            backend->read(m, source, DTYPE_F64, got);
        }
        check(name, got ? relative_error(got, expected, n, golden_scale(f, name)) : NAN, tolerance);
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
    json_free(errors);
}

// A Hugging Face folder with expected.safetensors: pixels.<size> in, last_hidden_state.<size> out.
static void golden_folder(const Backend *backend, const char *dir, int half) {
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
        if (n != b.globals * (1 + c.model_registers + patches) * c.model_dim)
            fail(STATUS_DATA, "%s: %s has %zu elements", path, f->tensors[i].name, n);
        backend->encode(m, &b, tokens);
        for (size_t k = 0; k < n; k++) got[k] = tokens[k];
        // in 16 bits PyTorch's own final tokens are 3.5e-3 to 8.8e-3 off on the golden steps
        check(f->tensors[i].name, relative_error(got, expected, n, 0), half ? 1e-2 : 1e-5);
        free((void *)b.global_pixels);
        free(expected);
        free(got);
        free(tokens);
    }
    safetensors_close(f);
    backend->destroy(m);
    free(t.tensors);
}

static void golden(const Backend *backend, const char *path, int half) {
    struct stat st;
    printf("%s\n", path);
    if (!stat(path, &st) && S_ISDIR(st.st_mode)) {
        golden_folder(backend, path, half);
        return;
    }
    SafeTensors *f = safetensors_open(path);
    int before = passed + failed;
    for (int i = 0; !half && i < f->count; i++) {       // these are the host's
        if (starts(f->tensors[i].name, "resize.output")) golden_resize(f, f->tensors[i].name + strlen("resize.output"));
        if (starts(f->tensors[i].name, "posembed.") && strstr(f->tensors[i].name, ".output.")) golden_posembed(f, &f->tensors[i]);
    }
    if (safetensors_find(f, "batch.global")) golden_step(backend, f, half);
    if (passed + failed == before && !half) fail(STATUS_DATA, "%s: holds nothing to compare; expected the tensors of DESIGN 5", path);
    safetensors_close(f);
}

// ---------------------------------------------------------------------------------------------------------------------
// Finite differences: every tensor's gradient in fp64

enum { SAMPLED = 10 };      // elements of each tensor that are moved alone; one more difference moves all of it

typedef struct { const char *name; const char *sets[20]; } Case;

// Small shapes with no two sizes alike. lr 0 and momentum 1: a step leaves the parameters as they are.
static const char *const small_model[] = {
    "model.dim=16", "model.heads=2", "model.depth=2", "model.patch=4", "model.ffn_hidden=24", "model.layerscale=0.7",
    "model.pos_grid=5", "crops.global_size=16", "crops.local_size=8", "crops.local_count=3", "dino.prototypes=11",
    "dino.bottleneck=7", "dino.hidden=9", "ibot.prototypes=13", "ibot.bottleneck=5", "ibot.hidden=10", "sigreg.slices=6",
    "sigreg.weight=0", "optim.batch_size=3", "optim.lr=0", "optim.lr_min=0", "teacher.momentum=1", "optim.scaling=none",
    "student.temp=0.3", "teacher.temp=0.2", "teacher.warmup_temp=0.2"};

static const Case gradient_cases[] = {
    {"dino", {"ibot.weight=0"}},
    {"ibot", {"dino.weight=0"}},
    {"ibot, separate head of two layers", {"dino.weight=0", "ibot.separate_head=1", "ibot.layers=2"}},
    {"koleo", {"dino.weight=0", "ibot.weight=0", "koleo.weight=0.8"}},
    {"sigreg, bottleneck", {"dino.weight=0", "ibot.weight=0", "sigreg.weight=0.9"}},
    {"sigreg, class tokens, one-sided grid, times n",
     {"dino.weight=0", "ibot.weight=0", "sigreg.weight=0.9", "sigreg.on=cls", "sigreg.t_min=0", "sigreg.t_max=3",
      "sigreg.scale_by_n=1"}},
    {"gram", {"dino.weight=0", "ibot.weight=0", "gram.weight=1.3"}},
    {"swiglu, drop path", {"model.ffn=swiglu", "model.drop_path=0.4", "sigreg.weight=0.1"}},
    {"registers, antialiased positions, head of one layer",
     {"model.registers=3", "model.interpolate=antialias", "dino.layers=1", "koleo.weight=0.1"}},
    {"two channels, softmax centering, positions at the crop's grid",
     {"model.channels=2", "teacher.centering=softmax", "model.pos_grid=4", "model.interpolate=size"}},
    {"no masked patch, separate head", {"ibot.separate_head=1", "mask.probability=0"}},
    {"no local crops", {"crops.local_count=0", "sigreg.weight=0.2", "model.drop_path=0.3"}},
    {"everything",
     {"model.ffn=swiglu", "model.registers=2", "model.drop_path=0.3", "ibot.separate_head=1", "koleo.weight=0.2",
      "sigreg.weight=0.3", "gram.weight=0.5"}},
};

static Config case_config(const Case *k) {
    Config c = config_default();
    char key[128];
    for (size_t i = 0; i < sizeof small_model / sizeof *small_model + sizeof k->sets / sizeof *k->sets; i++) {
        const char *set = i < sizeof small_model / sizeof *small_model
                              ? small_model[i]
                              : k->sets[i - sizeof small_model / sizeof *small_model];
        if (!set) break;
        snprintf(key, sizeof key, "%.*s", (int)strcspn(set, "="), set);
        config_set(&c, key, strchr(set, '=') + 1, k->name);
    }
    config_validate(&c, k->name);
    return c;
}

// A batch of random pixels, masks, directions, Gram targets and drop-path subsets.
typedef struct { Batch b; float *global, *local, *directions, *gram; uint8_t *mask; int *drop[2][2]; } RandomBatch;

static float *random_floats(Rng *r, size_t n) {
    float *x = xmalloc(n * sizeof *x, "a test");
    for (size_t i = 0; i < n; i++) x[i] = (float)rng_normal(r);
    return x;
}

static RandomBatch random_batch(const Config *c, uint64_t seed) {
    RandomBatch x = {0};
    Rng r = rng_at(seed, RNG_TEST, 0, 0, 0);
    int B = (int)c->optim_batch_size, G = (int)c->crops_global_size, l = (int)c->crops_local_size,
        N = G / (int)c->model_patch * (G / (int)c->model_patch);
    x.b.samples = B;
    x.b.globals = 2 * B;
    x.b.locals = (int)c->crops_local_count * B;
    x.b.global_size = G;
    x.b.local_size = l;
    x.b.global_pixels = x.global = random_floats(&r, (size_t)x.b.globals * c->model_channels * G * G);
    x.b.local_pixels = x.local = random_floats(&r, (size_t)x.b.locals * c->model_channels * l * l);
    x.b.gram_target = x.gram = random_floats(&r, (size_t)x.b.globals * N * c->model_dim);
    size_t width = c->sigreg_on == SIGREG_CLS ? c->model_dim : c->dino_bottleneck;
    x.b.directions = x.directions = random_floats(&r, c->sigreg_slices * width);
    x.b.mask = x.mask = xmalloc((size_t)x.b.globals * N, "a test");
    for (int i = 0; i < x.b.globals * N; i++) x.mask[i] = c->mask_probability > 0 && i / N % 2 == 0 && rng_uniform(&r) < 0.4;
    int *scratch = xmalloc((size_t)(x.b.globals + x.b.locals) * sizeof(int), "a test");
    for (int g = 0; g < 2 && c->model_drop_path > 0; g++)
        for (int branch = 0; branch < 2; branch++) {
            int n = g ? x.b.locals : x.b.globals;
            x.b.kept[g] = kept_sequences(c, n);
            x.b.drop[g][branch] = x.drop[g][branch] = xmalloc((size_t)c->model_depth * x.b.kept[g] * sizeof(int), "a test");
            for (int i = 0; i < c->model_depth; i++) rng_subset(&r, n, x.b.kept[g], x.drop[g][branch] + i * x.b.kept[g], scratch);
        }
    free(scratch);
    x.b.schedule = schedule_at(c, 0);
    return x;
}

static void random_batch_free(RandomBatch *x) {
    void *all[] = {x->global, x->local, x->directions, x->gram, x->mask, x->drop[0][0], x->drop[0][1], x->drop[1][0],
                   x->drop[1][1]};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

// Student and teacher weights large enough that every gradient is far above rounding. even: matrices that keep the size of what
// they multiply, for shapes of any width.
static void random_weights(const Backend *backend, Model *m, const TensorTable *t, uint64_t seed, int even) {
    static const char *const prefixes[] = {"student.", "teacher."};
    char name[128];
    for (int p = 0; p < 2; p++)
        for (int i = 0; i < t->count; i++) {
            Rng r = rng_at(seed, RNG_TEST, 1, (uint64_t)p, (uint32_t)i);
            const Tensor *tensor = &t->tensors[i];
            double *x = xmalloc(tensor->size * sizeof *x, "a test"), scale = 0.3;
            if (even && strstr(tensor->name, "weight") && tensor->size > (size_t)tensor->shape[0])
                scale = 1 / sqrt((double)(tensor->size / (size_t)tensor->shape[0]));
            for (size_t k = 0; k < tensor->size; k++)
                x[k] = (tensor->init == INIT_ONE || tensor->init == INIT_CONSTANT ? 1 : 0) + scale * rng_normal(&r);
            snprintf(name, sizeof name, "%s%s", prefixes[p], t->tensors[i].name);
            backend->write(m, name, DTYPE_F64, x);
            free(x);
        }
}

static double loss_at(const Backend *backend, Model *m, const char *name, const double *x, const Batch *b,
                      const double *centers[2]) {
    StepResult r;
    backend->write(m, name, DTYPE_F64, x);
    backend->write(m, "center.dino", DTYPE_F64, centers[0]);
    backend->write(m, "center.ibot", DTYPE_F64, centers[1]);
    backend->begin(m, b);
    backend->end(m, &r);
    return r.loss;
}

// Derivative along `direction` by the five-point rule: error h^4.
static double difference(const Backend *backend, Model *m, const char *name, const double *x, double *moved,
                         const double *direction, size_t n, const Batch *b, const double *centers[2]) {
    static const double h = 5e-4, steps[4] = {1, -1, 2, -2}, weights[4] = {8, -8, -1, 1};
    double sum = 0;
    for (int s = 0; s < 4; s++) {
        for (size_t k = 0; k < n; k++) moved[k] = x[k] + steps[s] * h * direction[k];
        sum += weights[s] * loss_at(backend, m, name, moved, b, centers);
    }
    return sum / (12 * h);
}

static void test_gradients(const Backend *backend, const Case *k) {
    Config c = case_config(k);
    TensorTable t = tensors_build(&c, 1);
    Model *m = backend->create(&c, &t, 1);
    random_weights(backend, m, &t, 11, 0);
    RandomBatch batch = random_batch(&c, 12);
    double *centers[2];
    Rng r = rng_at(13, RNG_TEST, 0, 0, 0);
    for (int i = 0; i < 2; i++) {
        size_t n = backend->read(m, i ? "center.ibot" : "center.dino", DTYPE_F64, NULL);
        centers[i] = xmalloc(n * sizeof(double), "a test");
        for (size_t j = 0; j < n; j++) centers[i][j] = rng_normal(&r);
    }
    const double *const_centers[2] = {centers[0], centers[1]};
    double query_norm = 0;
    for (int i = 0; i < t.count; i++) {
        size_t n = t.tensors[i].size;
        char name[128], grad[128], label[256];
        snprintf(name, sizeof name, "student.%s", t.tensors[i].name);
        snprintf(grad, sizeof grad, "grad.%s", t.tensors[i].name);
        double *x = xmalloc(n * sizeof *x, name), *g = xmalloc(n * sizeof *g, name),
               *direction = xmalloc(n * sizeof *direction, name), *moved = xmalloc(n * sizeof *moved, name);
        double by_difference[SAMPLED + 1], by_backward[SAMPLED + 1];
        backend->read(m, name, DTYPE_F64, x);
        loss_at(backend, m, name, x, &batch.b, const_centers);
        backend->read(m, grad, DTYPE_F64, g);
        int samples = n < SAMPLED ? (int)n : SAMPLED;
        for (int s = 0; s <= samples; s++) {
            // one element alone; last, all of them at once along a random unit vector
            memset(direction, 0, n * sizeof *direction);
            double square = 0;
            if (s < samples) direction[n <= SAMPLED ? (size_t)s : rng_below(&r, n)] = 1;
            else for (size_t j = 0; j < n; j++) direction[j] = rng_normal(&r), square += direction[j] * direction[j];
            for (size_t j = 0; s == samples && j < n; j++) direction[j] /= sqrt(square);
            by_backward[s] = 0;
            for (size_t j = 0; j < n; j++) by_backward[s] += g[j] * direction[j];
            by_difference[s] = difference(backend, m, name, x, moved, direction, n, &batch.b, const_centers);
        }
        backend->write(m, name, DTYPE_F64, x);
        // A gradient that is zero in exact arithmetic is held against its neighbour's: key biases against query biases.
        if (strstr(name, "query.bias")) query_norm = norm(by_difference, (size_t)samples + 1);
        double scale = norm(by_difference, (size_t)samples + 1);
        if (strstr(name, "key.bias")) scale = query_norm;
        if (scale < 1e-7) scale = 1;        // not reached by this case's losses
        snprintf(label, sizeof label, "%s: %s", k->name, grad);
        check(label, relative_error(by_backward, by_difference, (size_t)samples + 1, scale), 1e-6);
        free(x);
        free(g);
        free(direction);
        free(moved);
    }
    for (int i = 0; i < 2; i++) free(centers[i]);
    random_batch_free(&batch);
    backend->destroy(m);
    free(t.tensors);
}

// ---------------------------------------------------------------------------------------------------------------------
// Invariances and known answers

// Two steps with one thread and with three: every tensor equal to the bit.
static void test_threads(const Backend *backend) {
#ifdef _OPENMP
    static const Case k = {"threads", {"model.dim=128", "model.ffn=swiglu", "model.ffn_hidden=344", "model.drop_path=0.3",
                                       "dino.prototypes=300", "ibot.separate_head=1", "koleo.weight=0.1", "sigreg.weight=0.1",
                                       "gram.weight=0.2", "optim.lr=0.01", "optim.clip=0.01", "teacher.momentum=0.9",
                                       "optim.batch_size=5"}};
    Config c = case_config(&k);
    TensorTable t = tensors_build(&c, 1);
    RandomBatch batch = random_batch(&c, 3);
    float *result[2];
    int most = omp_get_max_threads();
    for (int run = 0; run < 2; run++) {
        omp_set_num_threads(run ? 3 : 1);
        Model *m = backend->create(&c, &t, 1);
        random_weights(backend, m, &t, 4, 0);
        StepResult r;
        for (int step = 0; step < 2; step++) {
            batch.b.step = step;
            backend->begin(m, &batch.b);
            backend->end(m, &r);
        }
        result[run] = xmalloc(3 * t.size * sizeof(float), "a test");
        static const char *const prefixes[] = {"student.", "teacher.", "grad."};
        for (int p = 0; p < 3; p++)
            for (int i = 0; i < t.count; i++) {
                char name[128];
                snprintf(name, sizeof name, "%s%s", prefixes[p], t.tensors[i].name);
                backend->read(m, name, DTYPE_F32, result[run] + p * t.size + t.tensors[i].offset);
            }
        backend->destroy(m);
    }
    omp_set_num_threads(most);
    size_t different = 0;
    for (size_t i = 0; i < 3 * t.size; i++) different += memcmp(&result[0][i], &result[1][i], sizeof(float)) != 0;
    check("one thread and three: values that differ", (double)different, 0);
    free(result[0]);
    free(result[1]);
    random_batch_free(&batch);
    free(t.tensors);
#else
    (void)backend;
#endif
}

// Products of shapes that leave tails in every blocking dimension, against the definition.
static void test_gemm(void) {
    static const int shapes[][3] = {{1, 1, 1}, {3, 5, 7}, {14, 32, 256}, {15, 33, 257}, {197, 64, 197}, {230, 1100, 300},
                                    {1, 2000, 513}, {5, 7, 0}};
    double worst = 0;
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
        int m = shapes[s][0], n = shapes[s][1], k = shapes[s][2];
        Rng r = rng_at(s, RNG_TEST, 2, 0, 0);
        float *a = random_floats(&r, (size_t)m * k), *b = random_floats(&r, (size_t)k * n),
              *start = random_floats(&r, (size_t)m * n);
        for (int variant = 0; variant < 8; variant++) {
            int at = variant & 1, bt = variant >> 1 & 1, add = variant >> 2;
            real *x = xmalloc((size_t)m * k * sizeof(real), "a"), *y = xmalloc((size_t)k * n * sizeof(real), "b"),
                 *c = xmalloc((size_t)m * n * sizeof(real), "c");
            for (int i = 0; i < m * k; i++) x[i] = a[i];
            for (int i = 0; i < k * n; i++) y[i] = b[i];
            for (int i = 0; i < m * n; i++) c[i] = start[i];
            gemm(m, n, k, x, at ? 1 : k, at ? m : 1, y, bt ? 1 : n, bt ? k : 1, c, n, add);
            double error = 0, size = 0;
            for (int i = 0; i < m; i++)
                for (int j = 0; j < n; j++) {
                    double sum = add ? start[i * n + j] : 0;
                    for (int p = 0; p < k; p++)
                        sum += (double)(at ? a[p * m + i] : a[i * k + p]) * (bt ? b[j * k + p] : b[p * n + j]);
                    error += (sum - c[i * n + j]) * (sum - c[i * n + j]);
                    size += sum * sum;
                }
            worst = fmax(worst, sqrt(error / (size > 0 ? size : 1)));
            free(x);
            free(y);
            free(c);
        }
        free(a);
        free(b);
        free(start);
    }
    check("matrix multiply: odd shapes, transposes, accumulation", worst, 1e-6);
}

// exp, erf and GELU's slope over their ranges against the C library in double.
static void test_vecmath(void) {
    double worst_exp = 0, worst_erf = 0, worst_slope = 0;
    for (int i = -860000; i <= 860000; i++) {
        float x = (float)(i * 1e-4), e = real_exp(x), z = (float)(i * 1e-5);
        worst_exp = fmax(worst_exp, fabs(e / exp((double)x) - 1));
        worst_erf = fmax(worst_erf, fabs(real_erf(z) - erf((double)z)));
        double slope = 0.5 * erfc(-(double)z * sqrt(0.5)) + z * exp(-0.5 * z * z) / sqrt(2 * acos(-1));
        worst_slope = fmax(worst_slope, fabs(gelu_slope(z) - slope));
    }
    check("exp: relative error on [-86, 86]", worst_exp, 3e-7);
    check("erf: absolute error", worst_erf, 3e-7);
    check("gelu's slope: absolute error", worst_slope, 6e-7);
}

// <R x, y> = <x, R^T y> for every mode, up and down.
static void test_resize_adjoint(void) {
    double worst = 0;
    for (int mode = 0; mode < 3; mode++)
        for (int out = 2; out <= 21; out++) {
            enum { IN = 9, D = 3 };
            Resize r = resize_plan(IN, out, mode);
            real x[IN * IN * D], dx[IN * IN * D] = {0}, y[21 * 21 * D], dy[21 * 21 * D], scratch[IN * 21 * D];
            Rng rng = rng_at((uint64_t)out, RNG_TEST, 3, (uint64_t)mode, 0);
            for (int i = 0; i < IN * IN * D; i++) x[i] = (real)rng_normal(&rng);
            for (int i = 0; i < out * out * D; i++) dy[i] = (real)rng_normal(&rng);
            resize_image(&r, &r, D, x, y, scratch);
            resize_image_adjoint(&r, &r, D, dy, dx, scratch);
            double left = 0, right = 0, size = 0;
            for (int i = 0; i < out * out * D; i++) left += (double)y[i] * dy[i], size += fabs((double)y[i] * dy[i]);
            for (int i = 0; i < IN * IN * D; i++) right += (double)x[i] * dx[i];
            worst = fmax(worst, fabs(left - right) / size);
            resize_free(&r);
        }
    check("resize: the adjoint is the transpose", worst, 1e-6);
}

static void test_tables(void) {
    Config c = config_default();
    static const char *const sets[][2] = {{"model.dim", "768"}, {"model.heads", "12"}, {"model.ffn", "swiglu"},
                                          {"crops.global_size", "512"}};
    for (int i = 0; i < 4; i++) config_set(&c, sets[i][0], sets[i][1], "a test");
    config_validate(&c, "a test");
    TensorTable t = tensors_build(&c, 0);
    check("ViT-B/16, one channel, SwiGLU, 512 px: parameters beyond 86,072,832", fabs((double)t.size - 86072832), 0);
    free(t.tensors);
    c = config_default();
    config_set(&c, "optim.batch_size", "1024", "a test");
    config_set(&c, "optim.warmup_steps", "12500", "a test");
    double base = 4e-3;
    struct { long long step; double lr; } known[] = {{0, 0}, {1, 3.20026e-7}, {12499, base}, {12500, base}, {124999, 1.0000008e-6}};
    double worst = 0;
    for (int i = 0; i < 5; i++) worst = fmax(worst, fabs(schedule_at(&c, known[i].step).lr - known[i].lr) / base);
    check("learning rate at known steps", worst, 1e-9);
    static const struct { const char *dim, *depth, *heads, *size; double gflop; } costs[] = {
        {"768", "12", "12", "224", 445.9}, {"1024", "24", "16", "224", 1539.8}, {"1024", "24", "16", "512", 6485.3}};
    for (int i = 0; i < 3; i++) {
        Config k = config_default();
        const char *set[][2] = {{"model.dim", costs[i].dim}, {"model.depth", costs[i].depth}, {"model.heads", costs[i].heads},
                                {"crops.global_size", costs[i].size}, {"crops.local_size", "96"}, {"model.patch", "16"}};
        for (int j = 0; j < 6; j++) config_set(&k, set[j][0], set[j][1], "a test");
        config_validate(&k, "a test");
        Cost cost = step_cost(&k);
        check("operations of a step, GFLOP an image beyond METHOD G.2's", fabs((cost.products + cost.attention) / 1e9 - costs[i].gflop), 0.06);
    }
    check("momentum half way", fabs(schedule_at(&c, 62500).momentum - 0.996), 1e-12);
    check("weight decay half way", fabs(schedule_at(&c, 62500).weight_decay - 0.22), 1e-12);
}

// Crops lie inside their slice, near the anatomy for a narrow prior and anywhere for a wide one; masks have the exact number
// of patches, and keep to the anatomy too.
static void test_views(void) {
    enum { DRAWS = 20000, CELLS = 61 };
    Config c = config_default();
    ShardSlice s = {.rows = 100, .cols = 80, .centre_row = 30, .centre_col = 55, .spread_row = 20, .spread_col = 10};
    int outside = 0, wrong_count = 0;
    double centre_row = 0, centre_col = 0, wide[CELLS] = {0}, far = 0, mask_row = 0;
    for (int i = 0; i < DRAWS; i++) {
        Rng r = rng_at(1, RNG_TEST, 5, (uint64_t)i, 0);
        c.crops_prior_sigma = 1;
        View v = draw_crop(&r, &c, &s, c.crops_local_scale_min, c.crops_local_scale_max);
        outside += v.top < 0 || v.left < 0 || v.height < 1 || v.width < 1 || v.top + v.height > s.rows || v.left + v.width > s.cols;
        c.crops_prior_sigma = 0.05;
        v = draw_crop(&r, &c, &s, 0.05, 0.1);
        centre_row += (v.top + 0.5 * v.height) / DRAWS;
        centre_col += (v.left + 0.5 * v.width) / DRAWS;
        wide[draw_position(&r, 40, 100, PRIOR_GAUSSIAN, 10, 1e6)]++;
        int g = 2 + i % 14, count = (int)rng_below(&r, (uint64_t)(g * g) + 1), found = 0;
        uint8_t mask[15 * 15] = {0};
        draw_mask(&r, mask, g, count, i & 1, 0.3 * g, 0.6 * g, 0.1 * g, 0.1 * g);
        for (int k = 0; k < g * g; k++) found += mask[k];
        wrong_count += found != count;
        uint8_t near[14 * 14] = {0};
        draw_mask(&r, near, 14, 20, PRIOR_GAUSSIAN, 10, 3, 1, 1);
        for (int k = 0; k < 14 * 14; k++) if (near[k]) mask_row += (k / 14 + 0.5) / (20.0 * DRAWS);
    }
    for (int i = 0; i < CELLS; i++) far += pow(wide[i] - DRAWS / (double)CELLS, 2) / (DRAWS / (double)CELLS);
    check("crops outside their slice", outside, 0);
    check("narrow prior: distance of the mean crop centre from the anatomy's, pixels", hypot(centre_row - 30, centre_col - 55), 0.2);
    check("wide prior is uniform: chi-square with 60 degrees of freedom", far, 107);      // its 0.9998 quantile
    check("masks with another number of patches than asked for", wrong_count, 0);
    check("masks lie where the prior is: mean row beyond 9 of 14", fmax(0, 9 - mask_row), 0);
}

// Raw slices to views: a crop at its own size is the slice, z-scored; a flip mirrors it; statistics are the slice's.
static void test_pixels(const Backend *backend) {
    enum { ROWS = 20, COLS = 24, SIZE = 8, TOP = 5, LEFT = 9 };
    static const Case k = {"pixels", {"crops.global_size=8", "model.channels=2", "model.dim=64", "model.heads=1"}};
    Config c = case_config(&k);
    TensorTable t = tensors_build(&c, 0);
    Model *m = backend->create(&c, &t, 0);
    int16_t pixels[ROWS * COLS];
    Rng r = rng_at(1, RNG_TEST, 4, 0, 0);
    double mean = 0, square = 0, value[ROWS * COLS];
    for (int i = 0; i < ROWS * COLS; i++) {
        pixels[i] = (int16_t)(rng_below(&r, 3000) - 1500);
        value[i] = fmax(0.5 * pixels[i] - 300, -1000);
        mean += value[i] / (ROWS * COLS);
    }
    for (int i = 0; i < ROWS * COLS; i++) square += (value[i] - mean) * (value[i] - mean);
    double std = sqrt(square / (ROWS * COLS - 1)), worst = 0;
    Slice s = {pixels, ROWS, COLS, 0.5, -300, 0, 1};
    View views[2] = {{0, TOP, LEFT, SIZE, SIZE, 0, 1, 1, 0, 0}, {0, TOP, LEFT, SIZE, SIZE, 1, 1, 1.5, 0.25, 0}};
    Batch b = {.samples = 1, .globals = 2, .global_size = SIZE, .slices = &s, .views = views};
    float out[2][2][SIZE][SIZE];
    backend->pixels(m, &b, &out[0][0][0][0], NULL);
    for (int y = 0; y < SIZE; y++)
        for (int x = 0; x < SIZE; x++)
            for (int ch = 0; ch < 2; ch++) {
                double z = (value[(TOP + y) * COLS + LEFT + x] - mean) / std;
                worst = fmax(worst, fabs(out[0][ch][y][x] - z));
                worst = fmax(worst, fabs(out[1][ch][y][SIZE - 1 - x] - (1.5 * z + 0.25)));
            }
    check("pixels: crop, clip below air, z-score, contrast, brightness, flip, channels", worst, 2e-6);
    for (int i = 0; i < ROWS * COLS; i++) pixels[i] = 1234;     // one value alone: centred, and nothing made of it
    c.data_normalize = NORMALIZE_VIEW;
    backend->destroy(m);
    m = backend->create(&c, &t, 0);
    views[1] = (View){0, 1, 2, SIZE + 5, SIZE + 9, 1, 0.8, 1.5, 0.25, 1.2};
    backend->pixels(m, &b, &out[0][0][0][0], NULL);
    worst = 0;
    for (int v = 0; v < 2; v++)
        for (int i = 0; i < SIZE * SIZE; i++) worst = fmax(worst, fabs(out[v][0][i / SIZE][i % SIZE] - (v ? 0.25 : 0)));
    check("pixels: a constant view", worst, 1e-4);
    backend->destroy(m);
    free(t.tensors);
}

// ---------------------------------------------------------------------------------------------------------------------
// The CUDA backend against the CPU backend

// The two builds of the CUDA backend: float, and 16-bit.
typedef struct { const Backend *fp32, *half; } Device;

// "cuda": as linked in; "emu": build/emu/backend.so beside this program.
static Device device_open(const char *name, const char *program) {
    Device d = {NULL, NULL};
    if (!strcmp(name, "emu")) {
        char path[PATH_SIZE];
        const char *slash = strrchr(program, '/');
        for (int i = 0; i < 2; i++) {           // beside the program, or where the program itself stands in the build folder
            snprintf(path, sizeof path, "%.*s/%semu/backend.so", slash ? (int)(slash - program) : 1, slash ? program : ".",
                     i ? "" : "build/");
            if (file_exists(path)) break;
        }
        void *library = dlopen(path, RTLD_NOW);
        if (!library) fail(STATUS_USAGE, "--device emu: %s; build it with 'make emu'", dlerror());
        d.fp32 = dlsym(library, "cuda_backend_fp32");
        d.half = dlsym(library, "cuda_backend");
    } else if (!strcmp(name, "cuda")) {
#ifdef CURIA_CUDA
        d = (Device){&cuda_backend_fp32, &cuda_backend};
#endif
        if (!d.fp32) fail(STATUS_USAGE, "--device cuda: this program was built without the CUDA backend");
    } else {
        fail(STATUS_USAGE, "--device %s: expected cpu, cuda or emu", name);
    }
    Config c = config_default();
    const char *missing = d.fp32->missing(&c);
    if (missing) fail(STATUS_USAGE, "--device %s: %s", name, missing);
    return d;
}

// Heads of 64 and otherwise odd shapes; every option of the step in some case.
// AdamW's eps is large: else the sign of every gradient that is only rounding would make a whole step.
#define DEVICE_SHAPE "optim.lr=1e-3", "teacher.momentum=0.9", "optim.eps=1e-3"
static const Case device_cases[] = {
    {"1 slice, 17 and 5 tokens, width 64", {DEVICE_SHAPE, "model.dim=64", "model.heads=1", "optim.batch_size=1"}},
    {"3 slices, 37 tokens, width 192, SwiGLU, drop path, two heads, 8195 prototypes",
     {DEVICE_SHAPE, "model.dim=192", "model.heads=3", "crops.global_size=24", "crops.local_size=16", "model.ffn=swiglu",
      "model.ffn_hidden=88", "model.drop_path=0.4", "ibot.separate_head=1", "dino.prototypes=8195", "dino.bottleneck=48",
      "sigreg.weight=0.3"}},
    {"50 and 2 tokens, registers, KoLeo, one-sided SIGReg on class tokens",
     {DEVICE_SHAPE, "model.dim=64", "model.heads=1", "model.patch=8", "crops.global_size=56", "crops.local_size=8", "model.registers=3",
      "koleo.weight=0.2", "sigreg.weight=0.3", "sigreg.on=cls", "sigreg.t_min=0", "sigreg.t_max=3", "sigreg.scale_by_n=1"}},
    {"Gram, two channels, softmax centering, positions as they are",
     {DEVICE_SHAPE, "model.dim=128", "model.heads=2", "gram.weight=0.7", "model.channels=2", "teacher.centering=softmax",
      "model.pos_grid=4", "model.interpolate=size", "optim.clip=0.01"}},
    {"no local crops, no masks, head of one layer, no iBOT",
     {DEVICE_SHAPE, "model.dim=64", "model.heads=1", "crops.local_count=0", "mask.probability=0", "dino.layers=1", "ibot.weight=0",
      "model.interpolate=antialias"}},
    {"no masked patch, separate head", {DEVICE_SHAPE, "model.dim=64", "model.heads=1", "mask.probability=0", "ibot.separate_head=1",
                                        "model.depth=1"}},
    {"197 tokens", {DEVICE_SHAPE, "model.dim=64", "model.heads=1", "crops.global_size=56", "crops.local_size=24", "optim.batch_size=1"}},
    {"width 384, 8 local crops", {DEVICE_SHAPE, "model.dim=384", "model.heads=6", "crops.local_count=8", "model.depth=1"}},
    {"257 tokens, width 768", {DEVICE_SHAPE, "model.dim=768", "model.heads=12", "crops.global_size=64", "optim.batch_size=1",
                               "model.depth=1", "crops.local_count=1", "model.ffn_hidden=100"}},
    {"1025 tokens", {DEVICE_SHAPE, "model.dim=64", "model.heads=1", "crops.global_size=128", "optim.batch_size=1", "model.depth=1",
                     "crops.local_count=1", "crops.local_size=24"}},
};
enum { DEVICE_QUICK = 7 };

// Everything a step leaves behind, by name: outputs, gradients, new parameters, moments, centres; the losses also of a second one.
typedef struct { StepResult result[2]; char (*names)[160]; double **values; size_t *sizes; int count; } StepRecord;

static void record_tensor(StepRecord *x, const Backend *backend, Model *m, const char *prefix, const char *name) {
    char *label = x->names[x->count];
    snprintf(label, sizeof x->names[0], "%s%s", prefix, name);
    size_t n = backend->read(m, label, DTYPE_F64, NULL);
    if (!n) return;
    x->values[x->count] = xmalloc(n * sizeof(double), label);
    backend->read(m, label, DTYPE_F64, x->values[x->count]);
    if (starts(label, "optim.exp_avg_sq."))             // in the gradient's unit: a square has twice its relative error
        for (size_t i = 0; i < n; i++) x->values[x->count][i] = sqrt(x->values[x->count][i]);
    x->sizes[x->count++] = n;
}

// From random weights.
static StepRecord record_steps(const Backend *backend, const Config *c, RandomBatch *batch) {
    TensorTable t = tensors_build(c, 1);
    Model *m = backend->create(c, &t, 1);
    StepRecord x = {.names = xmalloc((size_t)(6 * t.count + 8) * sizeof *x.names, "a test"),
                    .values = xmalloc((size_t)(6 * t.count + 8) * sizeof *x.values, "a test"),
                    .sizes = xmalloc((size_t)(6 * t.count + 8) * sizeof *x.sizes, "a test")};
    random_weights(backend, m, &t, 21, 1);
    for (int step = 0; step < 2; step++) {
        batch->b.step = step;
        batch->b.schedule = schedule_at(c, step);
        backend->begin(m, &batch->b);
        backend->end(m, &x.result[step]);
        if (step) break;
        static const char *const prefixes[] = {"grad.", "student.", "teacher.", "optim.exp_avg.", "optim.exp_avg_sq."};
        static const char *const others[] = {"out.cls", "out.patch", "out.teacher_cls", "center.dino", "center.ibot"};
        for (int p = 0; p < 5; p++) for (int i = 0; i < t.count; i++) record_tensor(&x, backend, m, prefixes[p], t.tensors[i].name);
        int count = c->teacher_centering != CENTERING_SOFTMAX ? 3 : c->ibot_weight > 0 ? 5 : 4;
        for (int i = 0; i < count; i++) record_tensor(&x, backend, m, "", others[i]);
    }
    backend->destroy(m);
    free(t.tensors);
    return x;
}

static void record_free(StepRecord *x) {
    for (int i = 0; i < x->count; i++) free(x->values[i]);
    free(x->names);
    free(x->values);
    free(x->sizes);
}

static const double *recorded(const StepRecord *x, const char *name, size_t *n) {
    for (int i = 0; i < x->count; i++) if (!strcmp(x->names[i], name)) return *n = x->sizes[i], x->values[i];
    return NULL;
}

// Values of a, by name, that are not to the bit those of b. Names that only one side has do not count.
static double record_difference(const StepRecord *a, const StepRecord *b) {
    size_t different = 0, n;
    for (int i = 0; i < a->count; i++) {
        const double *other = recorded(b, a->names[i], &n);
        for (size_t k = 0; other && k < n; k++) different += memcmp(&a->values[i][k], &other[k], sizeof(double)) != 0;
    }
    return (double)(different + (memcmp(a->result, b->result, sizeof a->result) != 0));
}

// Every tensor of b against a's: the worst one is named.
static void record_compare(const char *label, const StepRecord *a, const StepRecord *b, double tolerance) {
    double worst = 0;
    const char *name = "";
    char line[512];
    const double *x = (const double *)a->result, *y = (const double *)b->result;
    for (size_t i = 0; i < 2 * sizeof(StepResult) / sizeof(double); i++) {
        double error = fabs(x[i] - y[i]) / (x[i] != 0 ? fabs(x[i]) : 1);
        if (!(error <= worst)) worst = error, name = "a loss or a measure";
    }
    for (int i = 0; i < a->count; i++) {
        size_t n = 0, m;
        const double *other = recorded(b, a->names[i], &n);
        if (!other && !strcmp(a->names[i], "out.patch")) continue;      // left out
        double scale = 0;
        // A key bias's gradient is zero in exact arithmetic, and AdamW makes whole steps of what rounding leaves of it.
        const char *key = strstr(a->names[i], ".key.bias");
        if (key && !starts(a->names[i], "grad.")) continue;
        if (key) {
            char query[160];
            snprintf(query, sizeof query, "%.*s.query.bias", (int)(key - a->names[i]), a->names[i]);
            const double *q = recorded(a, query, &m);
            scale = q ? norm(q, m) : 0;
        }
        double error = other && n == a->sizes[i] ? relative_error(other, a->values[i], n, scale) : NAN;
        if (!(error <= worst)) worst = error, name = a->names[i];
        if (isnan(error)) break;
    }
    snprintf(line, sizeof line, "%s: worst of %d tensors: %s", label, a->count, name);
    check(line, worst, tolerance);
}

static void test_device_case(const Device *d, const Case *k) {
    Config c = case_config(k);
    RandomBatch batch = random_batch(&c, 22);
    batch.b.all_tokens = 1;
    char label[256];
    StepRecord cpu = record_steps(&cpu_backend, &c, &batch), fp32 = record_steps(d->fp32, &c, &batch);
    record_compare(k->name, &cpu, &fp32, 1e-5);
    record_free(&cpu);
    uint64_t bits = 0;
    for (int i = 0; i < fp32.count; i++) bits ^= checksum(fp32.values[i], fp32.sizes[i] * sizeof(double)) + (uint64_t)i;
    printf("       %s: bits %016llx\n", k->name, (unsigned long long)bits);
    for (int way = 0; way < 3; way++) {         // again, and with each kind of recompute: the same bits
        static const char *const names[] = {"a second run", "activations computed again", "blocks computed again"};
        c.run_recompute = way;
        StepRecord again = record_steps(d->fp32, &c, &batch);
        snprintf(label, sizeof label, "%s: values that differ with %s", k->name, names[way]);
        check(label, record_difference(&fp32, &again), 0);
        record_free(&again);
    }
    c.run_recompute = RECOMPUTE_NONE;
    batch.b.all_tokens = 0;                     // only what a loss sees: sums have fewer terms
    StepRecord less = record_steps(d->fp32, &c, &batch);
    snprintf(label, sizeof label, "%s, unused tokens left out", k->name);
    record_compare(label, &fp32, &less, 1e-5);
    record_free(&less);
    StepRecord half[2] = {record_steps(d->half, &c, &batch), record_steps(d->half, &c, &batch)};
    snprintf(label, sizeof label, "%s: 16-bit values that differ in a second run", k->name);
    check(label, record_difference(&half[0], &half[1]), 0);
    snprintf(label, sizeof label, "%s: 16-bit loss", k->name);
    check(label, fabs(half[0].result[1].loss - fp32.result[1].loss) / fabs(fp32.result[1].loss), 0.02);
    for (int i = 0; i < 2; i++) record_free(&half[i]);
    record_free(&fp32);
    random_batch_free(&batch);
}

int main(int argc, char **argv) {
    static const struct option options[] = {{"golden", 1, 0, 'g'}, {"device", 1, 0, 'd'}, {"quick", 0, 0, 'q'},
                                            {"help", 0, 0, 'h'}, {0}};
    const char *files[1024];
    const char *device = "cpu";
    int count = 0, quick = 0;
    opterr = 0;
    for (int k; (k = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        if (k == '?') fail(STATUS_USAGE, "%s: unknown option, or its value is missing; --help lists them", argv[optind - 1]);
        if (k == 'h') {
            printf("usage: test_curia [--golden FILE]... [--device cpu|cuda|emu] [--quick]\n"
                   "  --golden FILE   a golden file, or a hf_* folder with expected.safetensors; without it, the built-in tests\n"
                   "  --quick         the built-in tests without finite differences\n");
            return STATUS_DONE;
        }
        if (k == 'g' && count == 1024) fail(STATUS_USAGE, "more than 1024 --golden files");
        if (k == 'g') files[count++] = optarg;
        if (k == 'q') quick = 1;
        if (k == 'd') device = optarg;
    }
    if (optind < argc) fail(STATUS_USAGE, "unexpected argument '%s'; golden files are named by --golden FILE", argv[optind]);
    if (strcmp(device, "cpu")) {
        Device d = device_open(device, argv[0]);
        for (int i = 0; i < count; i++) {
            golden(d.fp32, files[i], 0);
            golden(d.half, files[i], 1);
        }
        for (size_t i = 0; !count && i < (quick ? (size_t)DEVICE_QUICK : sizeof device_cases / sizeof *device_cases); i++)
            test_device_case(&d, &device_cases[i]);
        if (!count) test_pixels(d.fp32);
        printf("%d passed, %d failed\n", passed, failed);
        return failed ? STATUS_FAILED : STATUS_DONE;
    }
    for (int i = 0; i < count; i++) golden(&cpu_backend, files[i], 0);
    if (!count) {
        test_gemm();
        test_vecmath();
        test_resize_adjoint();
        test_tables();
        test_views();
        test_pixels(&cpu_backend);
        test_threads(&cpu_backend);
#ifdef _OPENMP
        omp_set_num_threads(1);         // the cases are too small to share
#endif
        for (size_t i = 0; !quick && i < sizeof gradient_cases / sizeof *gradient_cases; i++)
            test_gradients(&cpu_backend_fp64, &gradient_cases[i]);
    }
    printf("%d passed, %d failed\n", passed, failed);
    return failed ? STATUS_FAILED : STATUS_DONE;
}
