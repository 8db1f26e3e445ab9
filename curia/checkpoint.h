/*
Checkpoints (DESIGN 7) and Hugging Face folders (INTEROP 4).

  hf_read_config       config.json of a Dinov2 folder, and preprocessor_config.json where there is one
  hf_read_weights      its weights into a model
  hf_ratio             whether transformers can express a config's feed-forward width
  hf_write             such a folder: AutoModel.from_pretrained loads it as it is
  RunState             what a run needs besides tensors to go on bit for bit
  checkpoint_begin     takes a run's folder for this process and clears what a killed one left half-written
  checkpoint_save      DIR/step-00000500: written under a temporary name, synced, renamed; older ones beyond run.keep removed
  checkpoint_newest    the newest whole one in a run's folder, or none
  checkpoint_load      tensors and state back; every file's checksum is verified first
  checkpoint_teacher   the folder to load for --model DIR: a Hugging Face folder, a checkpoint, or a run's newest checkpoint

A checkpoint holds teacher/ (config.json, model.safetensors, preprocessor_config.json), student.safetensors,
optimizer.safetensors (AdamW moments, the teacher's heads, centres) and state.json (step, sampler, config, checksums).
*/
#ifndef CURIA_CHECKPOINT_H
#define CURIA_CHECKPOINT_H

#include <sys/file.h>
#include "backend.h"
#include "hash.h"

// ---- Hugging Face folders

static inline double hf_number(const Json *o, const char *dir, const char *key, double preset) {
    const Json *v = json_get(o, key);
    if (!v || v->type == JSON_NULL) {
        if (isnan(preset)) fail(STATUS_DATA, "%s/config.json: no key '%s': not a Dinov2 model", dir, key);
        return preset;
    }
    if (v->type == JSON_TRUE || v->type == JSON_FALSE) return v->type == JSON_TRUE;
    if (v->type != JSON_NUMBER) fail(STATUS_DATA, "%s/config.json: '%s' is not a number", dir, key);
    return v->number;
}

// Fills the model.* keys, crops.global_size (the size the model was trained at) and data.clip_below_air from the folder.
// Position embeddings are resized as transformers does. What this code cannot compute is refused by name.
static inline void hf_read_config(const char *dir, Config *c) {
    char path[PATH_SIZE], value[64];
    path_join(path, dir, "config.json");
    Json *o = json_read(path);
    const Json *type = json_get(o, "model_type"), *act = json_get(o, "hidden_act");
    int registers = type && type->type == JSON_STRING && !strcmp(type->text, "dinov2_with_registers");
    if (!registers && !(type && type->type == JSON_STRING && !strcmp(type->text, "dinov2")))
        fail(STATUS_DATA, "%s: model_type is not dinov2 or dinov2_with_registers", path);
    int swiglu = hf_number(o, dir, "use_swiglu_ffn", 0) != 0;
    if (!swiglu && act && act->type == JSON_STRING && strcmp(act->text, "gelu"))
        fail(STATUS_DATA, "%s: hidden_act is %s; only gelu is supported", path, act->text);
    if (fabs(hf_number(o, dir, "layer_norm_eps", 1e-6) - 1e-6) > 1e-12)
        fail(STATUS_DATA, "%s: layer_norm_eps is not 1e-6, the only value supported", path);
    if (hf_number(o, dir, "qkv_bias", 1) == 0) fail(STATUS_DATA, "%s: qkv_bias is false; only models with it are supported", path);
    double image = hf_number(o, dir, "image_size", NAN), patch = hf_number(o, dir, "patch_size", NAN);
    if (!(patch >= 1) || !(image >= patch))
        fail(STATUS_DATA, "%s: image_size %g and patch_size %g make no grid", path, image, patch);
    struct { const char *key; double value; } values[] = {
        {"model.dim", hf_number(o, dir, "hidden_size", NAN)}, {"model.depth", hf_number(o, dir, "num_hidden_layers", NAN)},
        {"model.heads", hf_number(o, dir, "num_attention_heads", NAN)}, {"model.patch", patch},
        {"model.channels", hf_number(o, dir, "num_channels", 3)}, {"model.pos_grid", floor(image / patch)},
        {"model.registers", registers ? hf_number(o, dir, "num_register_tokens", 4) : 0},
        {"model.layerscale", hf_number(o, dir, "layerscale_value", 1)}, {"model.drop_path", hf_number(o, dir, "drop_path_rate", 0)},
        {"model.init_std", hf_number(o, dir, "initializer_range", 0.02)}, {"crops.global_size", floor(image / patch) * patch}};
    for (size_t i = 0; i < sizeof values / sizeof *values; i++) {
        snprintf(value, sizeof value, "%.17g", values[i].value);
        config_set(c, values[i].key, value, path);
    }
    config_set(c, "model.ffn", swiglu ? "swiglu" : "mlp", path);
    config_set(c, "model.interpolate", registers ? "antialias" : "size", path);
    double hidden = floor((double)c->model_dim * hf_number(o, dir, "mlp_ratio", 4));
    if (swiglu) hidden = floor((floor(hidden * 2 / 3) + 7) / 8) * 8;
    snprintf(value, sizeof value, "%.17g", hf_number(o, dir, "curia_ffn_hidden", hidden));
    config_set(c, "model.ffn_hidden", value, path);
    json_free(o);
    path_join(path, dir, "preprocessor_config.json");
    if (file_exists(path)) {
        Json *p = json_read(path);
        const Json *clip = json_get(p, "clip_below_air");
        if (clip) c->data_clip_below_air = clip->type == JSON_TRUE;
        json_free(p);
    }
}

// The backbone of a Hugging Face folder (one file or shards) into `prefix` ("teacher." or "student."). A missing tensor, a
// wrong shape or a tensor that the model does not have is one line with its name; a classifier on top is left out.
static inline void hf_read_weights(const Backend *backend, Model *m, const TensorTable *t, const char *dir, const char *prefix) {
    static const char *const wrappers[] = {"", "dinov2.", "dinov2_with_registers.", "dino.", "backbone.", "module.", "model."};
    SafeModel files = safetensors_open_model(dir);
    const char *wrapper = NULL;
    char name[512];
    for (size_t i = 0; i < sizeof wrappers / sizeof *wrappers && !wrapper; i++) {
        const SafeTensors *file;
        snprintf(name, sizeof name, "%sembeddings.cls_token", wrappers[i]);
        if (safetensors_model_find(&files, name, &file)) wrapper = wrappers[i];
    }
    if (!wrapper) fail(STATUS_DATA, "%s: no tensor embeddings.cls_token: not a Dinov2 checkpoint", dir);
    for (int i = 0; i < t->count; i++) {
        const Tensor *x = &t->tensors[i];
        if (x->group != GROUP_BACKBONE) continue;
        const SafeTensors *file;
        snprintf(name, sizeof name, "%s%s", wrapper, x->name);
        const SafeTensor *s = safetensors_model_find(&files, name, &file);
        int optional = !strcmp(x->name, "embeddings.mask_token");       // absent where use_mask_token is false
        if (!s && optional) continue;
        if (!s) fail(STATUS_DATA, "%s: tensor %s is missing", dir, name);
        int same = s->rank == x->rank;
        for (int d = 0; same && d < x->rank; d++) same = s->shape[d] == x->shape[d];
        if (!same)
            fail(STATUS_DATA, "%s: tensor %s has another shape than config.json's model; see model.* keys", file->path, name);
        float *values = xmalloc(x->size * sizeof(float), name);
        safetensors_read_f32(file, s, values);
        snprintf(name, sizeof name, "%s%s", prefix, x->name);
        backend->write(m, name, DTYPE_F32, values);
        free(values);
    }
    for (int f = 0; f < files.count; f++)
        for (int i = 0; i < files.files[f]->count; i++) {
            const char *found = files.files[f]->tensors[i].name;
            if (strncmp(found, wrapper, strlen(wrapper)) || !strncmp(found, "classifier.", 11)) continue;
            if (tensors_find(t, found + strlen(wrapper)) < 0)
                fail(STATUS_DATA, "%s: tensor %s is not part of the model that config.json describes", files.files[f]->path, found);
        }
    safetensors_close_model(&files);
}

// Streams tensors of a model into one file. names[i] is a name of curia/backend.h, stored under names[i] + skip.
static inline void write_tensors(const Backend *backend, Model *m, const char *path, char (*names)[128], const Tensor **shapes,
                                 int count, int skip) {
    SafeWriter w;
    safetensors_write_begin(&w, path, NULL);
    size_t largest = 0;
    for (int i = 0; i < count; i++) {
        size_t n = backend->read(m, names[i], DTYPE_F32, NULL);
        int64_t flat[1] = {(int64_t)n};
        if (n > largest) largest = n;
        safetensors_write_declare(&w, names[i] + skip, DTYPE_F32, shapes[i] ? shapes[i]->rank : 1,
                                  shapes[i] ? shapes[i]->shape : flat);
    }
    float *values = xmalloc(largest * sizeof(float), "a tensor to save");
    for (int i = 0; i < count; i++) {
        size_t n = backend->read(m, names[i], DTYPE_F32, values);
        safetensors_write_data(&w, names[i] + skip, values, n * sizeof(float));
    }
    safetensors_write_end(&w);
    free(values);
}

typedef struct { char (*names)[128]; const Tensor **shapes; int count; } TensorList;

static inline void list_add(TensorList *l, const Tensor *shape, const char *prefix, const char *name) {
    if (!(l->count & (l->count - 1))) {
        size_t room = l->count ? 2 * (size_t)l->count : 1;
        l->names = realloc(l->names, room * sizeof *l->names);
        l->shapes = realloc(l->shapes, room * sizeof *l->shapes);
        if (!l->names || !l->shapes) fail(STATUS_FAILED, "out of memory: the list of tensors to save");
    }
    l->shapes[l->count] = shape;
    snprintf(l->names[l->count++], 128, "%s%s", prefix, name);
}

static inline void list_free(TensorList *l) {
    free(l->names);
    free(l->shapes);
}

// The whole mlp_ratio from which transformers derives model.ffn_hidden, or 0 where there is none.
static inline int hf_ratio(const Config *c) {
    for (int ratio = 1; ratio <= 64; ratio++) {
        long long hidden = c->model_dim * ratio;
        if (c->model_ffn_hidden == (c->model_ffn == FFN_SWIGLU ? (hidden * 2 / 3 + 7) / 8 * 8 : hidden)) return ratio;
    }
    return 0;
}

// "key": x as a floating-point number of JSON, never as an integer: transformers checks the types of its config.
static inline void json_write_real(FILE *f, const char *key, double x) {
    char text[64];
    snprintf(text, sizeof text, "%.15g", x);
    fprintf(f, "  \"%s\": %s%s,\n", key, text, strpbrk(text, ".e") ? "" : ".0");
}

// `prefix` ("teacher." or "student.") as a Hugging Face folder: config.json, model.safetensors, preprocessor_config.json.
static inline void hf_write(const Backend *backend, Model *m, const TensorTable *t, const Config *c, const char *dir,
                            const char *prefix) {
    char path[PATH_SIZE];
    file_make_dirs(dir);
    int registers = c->model_registers > 0, swiglu = c->model_ffn == FFN_SWIGLU, ratio = hf_ratio(c);
    path_join(path, dir, "config.json");
    FILE *f = file_create(path);
    fprintf(f, "{\n  \"apply_layernorm\": true,\n  \"architectures\": [\"%s\"],\n  \"attention_probs_dropout_prob\": 0.0,\n"
               "  \"dtype\": \"float32\",\n  \"hidden_act\": \"gelu\",\n  \"hidden_dropout_prob\": 0.0,\n"
               "  \"hidden_size\": %lld,\n  \"image_size\": %lld,\n  \"layer_norm_eps\": 1e-06,\n  \"model_type\": \"%s\",\n"
               "  \"num_attention_heads\": %lld,\n  \"num_channels\": %lld,\n  \"num_hidden_layers\": %lld,\n",
            registers ? "Dinov2WithRegistersModel" : "Dinov2Model", c->model_dim, c->model_pos_grid * c->model_patch,
            registers ? "dinov2_with_registers" : "dinov2", c->model_heads, c->model_channels, c->model_depth);
    json_write_real(f, "drop_path_rate", c->model_drop_path);
    json_write_real(f, "initializer_range", c->model_init_std);
    json_write_real(f, "layerscale_value", c->model_layerscale);
    // transformers derives F from a whole mlp_ratio; where none gives this F only our own key does
    fprintf(f, "  \"mlp_ratio\": %d,\n  \"curia_ffn_hidden\": %lld,\n", ratio ? ratio : 4, c->model_ffn_hidden);
    if (registers) fprintf(f, "  \"num_register_tokens\": %lld,\n", c->model_registers);
    fprintf(f, "  \"patch_size\": %lld,\n  \"qkv_bias\": true,\n  \"use_mask_token\": true,\n  \"use_swiglu_ffn\": %s\n}\n",
            c->model_patch, swiglu ? "true" : "false");
    file_close(f, path);
    path_join(path, dir, "preprocessor_config.json");
    f = file_create(path);
    fprintf(f, "{\n  \"clip_below_air\": %s,\n  \"crop_size\": %lld,\n  \"do_normalize\": true,\n  \"do_resize\": true,\n"
               "  \"eps\": 1e-06,\n  \"image_processor_type\": \"CuriaImageProcessor\"\n}\n",
            c->data_clip_below_air ? "true" : "false", c->model_pos_grid * c->model_patch);
    file_close(f, path);
    TensorList l = {0};
    for (int i = 0; i < t->count; i++)
        if (t->tensors[i].group == GROUP_BACKBONE) list_add(&l, &t->tensors[i], prefix, t->tensors[i].name);
    path_join(path, dir, "model.safetensors");
    write_tensors(backend, m, path, l.names, l.shapes, l.count, (int)strlen(prefix));
    list_free(&l);
    file_sync_dir(dir);
}

// ---- Checkpoints

typedef struct {
    long long step;                 // steps done
    uint64_t sampler_next;          // samples drawn
    uint64_t data_identity;         // of the shards: a run goes on with the same data only
} RunState;

static const char *const checkpoint_files[] = {"teacher/config.json", "teacher/preprocessor_config.json",
                                               "teacher/model.safetensors", "student.safetensors", "optimizer.safetensors"};

static inline uint64_t file_checksum(const char *path) {
    int fd = open(path, O_RDONLY);
    struct stat st;
    if (fd < 0 || fstat(fd, &st)) fail(STATUS_DATA, "%s: cannot open it: %s", path, strerror(errno));
    const void *map = st.st_size ? mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0) : NULL;
    if (map == MAP_FAILED) fail(STATUS_DATA, "%s: cannot map it: %s", path, strerror(errno));
    uint64_t sum = checksum(map, (size_t)st.st_size);
    if (st.st_size) munmap((void *)map, (size_t)st.st_size);
    close(fd);
    return sum;
}

// The tensors of optimizer.safetensors: moments, the teacher's heads (its backbone is in teacher/), centres.
static inline TensorList optimizer_tensors(const Backend *backend, Model *m, const TensorTable *t) {
    TensorList l = {0};
    for (int i = 0; i < t->count; i++) list_add(&l, &t->tensors[i], "optim.exp_avg.", t->tensors[i].name);
    for (int i = 0; i < t->count; i++) list_add(&l, &t->tensors[i], "optim.exp_avg_sq.", t->tensors[i].name);
    for (int i = 0; i < t->count; i++)
        if (t->tensors[i].group != GROUP_BACKBONE) list_add(&l, &t->tensors[i], "teacher.", t->tensors[i].name);
    static const char *const centers[] = {"center.dino", "center.ibot"};
    for (int i = 0; i < 2; i++) if (backend->read(m, centers[i], DTYPE_F32, NULL)) list_add(&l, NULL, centers[i], "");
    return l;
}

static inline TensorList student_tensors(const TensorTable *t) {
    TensorList l = {0};
    for (int i = 0; i < t->count; i++) list_add(&l, &t->tensors[i], "student.", t->tensors[i].name);
    return l;
}

static inline int compare_names(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

// Names of the checkpoints in a run's folder, oldest first. The caller frees the names and the list.
static inline int checkpoint_list(const char *out, char ***names) {
    int count = 0;
    *names = NULL;
    DIR *d = opendir(out);
    if (!d) return 0;
    for (struct dirent *e; (e = readdir(d));) {
        if (strncmp(e->d_name, "step-", 5) || strspn(e->d_name + 5, "0123456789") != strlen(e->d_name + 5) || !e->d_name[5])
            continue;
        *names = realloc(*names, (size_t)(count + 1) * sizeof **names);
        if (!*names || !((*names)[count++] = strdup(e->d_name))) fail(STATUS_FAILED, "out of memory: the list of checkpoints");
    }
    closedir(d);
    if (count) qsort(*names, (size_t)count, sizeof **names, compare_names);
    return count;
}

// The checkpoint that is being written: removed if the program ends before it is whole, so that a full disk is not kept full.
static char checkpoint_unfinished[PATH_SIZE];

static inline void checkpoint_discard(void) { if (*checkpoint_unfinished) file_remove_tree(checkpoint_unfinished); }

// To be called once before the first checkpoint_save of a run: takes the folder for this process, until it ends, and removes
// what a killed one left half-written. Two processes in one folder would undo each other's work: the second ends with status 1.
static inline void checkpoint_begin(const char *out) {
    char path[PATH_SIZE];
    int lock = open(path_join(path, out, ".lock"), O_WRONLY | O_CREAT | O_CLOEXEC, 0666);
    if (lock < 0) fail(STATUS_FAILED, "%s: cannot create it: %s", path, strerror(errno));
    if (flock(lock, LOCK_EX | LOCK_NB) && errno == EWOULDBLOCK) fail(STATUS_FAILED, "%s: another process is training in this folder", out);
    atexit(checkpoint_discard);
    DIR *d = opendir(out);
    for (struct dirent *e; d && (e = readdir(d));)
        if (!strncmp(e->d_name, ".writing-", 9)) file_remove_tree(path_join(path, out, e->d_name));
    if (d) closedir(d);
}

// Writes DIR/step-NNNNNNNN. An earlier checkpoint is never touched before the new one is in place under its name.
static inline void checkpoint_save(const Backend *backend, Model *m, const TensorTable *t, const Config *c, const char *out,
                                   const RunState *state) {
    char temporary[PATH_SIZE], path[PATH_SIZE], final[PATH_SIZE], name[64];
    snprintf(name, sizeof name, ".writing-%08lld", state->step);
    path_join(temporary, out, name);
    snprintf(name, sizeof name, "step-%08lld", state->step);
    path_join(final, out, name);
    file_make_dirs(temporary);
    snprintf(checkpoint_unfinished, PATH_SIZE, "%s", temporary);
    path_join(path, temporary, "teacher");
    hf_write(backend, m, t, c, path, "teacher.");
    TensorList l = student_tensors(t);
    path_join(path, temporary, "student.safetensors");
    write_tensors(backend, m, path, l.names, l.shapes, l.count, 0);
    list_free(&l);
    l = optimizer_tensors(backend, m, t);
    path_join(path, temporary, "optimizer.safetensors");
    write_tensors(backend, m, path, l.names, l.shapes, l.count, 0);
    list_free(&l);

    char state_path[PATH_SIZE];
    path_join(state_path, temporary, "state.json");
    FILE *f = file_create(state_path);
    fprintf(f, "{\n\"step\": %lld,\n\"sampler_next\": %llu,\n\"data_identity\": \"%016llx\",\n\"checksums\": {", state->step,
            (unsigned long long)state->sampler_next, (unsigned long long)state->data_identity);
    for (size_t i = 0; i < sizeof checkpoint_files / sizeof *checkpoint_files; i++) {
        path_join(path, temporary, checkpoint_files[i]);
        fprintf(f, "%s\n  \"%s\": \"%016llx\"", i ? "," : "", checkpoint_files[i], (unsigned long long)file_checksum(path));
    }
    fprintf(f, "\n},\n\"config\": ");
    config_write_json(c, f);
    fprintf(f, "}\n");
    file_close(f, state_path);
    file_sync_dir(temporary);
    file_remove_tree(final);
    file_rename(temporary, final);
    file_sync_dir(out);
    *checkpoint_unfinished = 0;

    char **names;
    int count = checkpoint_list(out, &names);
    for (int i = 0; i < count; i++) {
        path_join(path, out, names[i]);
        if (i < count - c->run_keep) file_remove_tree(path);
        free(names[i]);
    }
    free(names);
}

// state.json of a checkpoint, after every file has been held against its checksum. The caller frees the tree.
static inline Json *checkpoint_verify(const char *dir) {
    char path[PATH_SIZE];
    path_join(path, dir, "state.json");
    Json *state = json_read(path);
    const Json *sums = json_get(state, "checksums");
    for (size_t i = 0; i < sizeof checkpoint_files / sizeof *checkpoint_files; i++) {
        const Json *sum = sums ? json_get(sums, checkpoint_files[i]) : NULL;
        if (!sum || sum->type != JSON_STRING)
            fail(STATUS_DATA, "%s: no checksum of %s: the file is damaged", path, checkpoint_files[i]);
        char file[PATH_SIZE], found[32];
        path_join(file, dir, checkpoint_files[i]);
        snprintf(found, sizeof found, "%016llx", (unsigned long long)file_checksum(file));
        if (strcmp(found, sum->text))
            fail(STATUS_DATA, "%s: checksum %s, but state.json has %s: the file is damaged; use an earlier checkpoint", file, found,
                 sum->text);
    }
    return state;
}

// The newest checkpoint in a run's folder into path[PATH_SIZE]; 0 where there is none.
static inline int checkpoint_newest(const char *out, char *path) {
    char **names;
    int count = checkpoint_list(out, &names);
    if (count) path_join(path, out, names[count - 1]);
    for (int i = 0; i < count; i++) free(names[i]);
    free(names);
    return count > 0;
}

static inline void read_tensors(const Backend *backend, Model *m, const char *path, const TensorList *l) {
    SafeTensors *file = safetensors_open(path);
    for (int i = 0; i < l->count; i++) {
        const SafeTensor *s = safetensors_find(file, l->names[i]);
        size_t n = backend->read(m, l->names[i], DTYPE_F32, NULL);
        if (!s) fail(STATUS_DATA, "%s: tensor %s is missing: a checkpoint of another model", path, l->names[i]);
        if (safetensors_elements(s) != n)
            fail(STATUS_DATA, "%s: tensor %s has %zu elements, expected %zu: a checkpoint of another model", path, l->names[i],
                 safetensors_elements(s), n);
        float *values = xmalloc(n * sizeof(float), l->names[i]);
        safetensors_read_f32(file, s, values);
        backend->write(m, l->names[i], DTYPE_F32, values);
        free(values);
    }
    safetensors_close(file);
}

// A checkpoint's config, without its tensors. Ends the program where the folder is damaged.
static inline Config checkpoint_config(const char *dir) {
    char path[PATH_SIZE];
    Json *state = checkpoint_verify(dir);
    path_join(path, dir, "state.json");
    Config c = config_default();
    config_from_json(&c, json_get(state, "config"), path, NULL);
    json_free(state);
    return c;
}

// Student, teacher, moments, centres and the run's state.
static inline RunState checkpoint_load(const Backend *backend, Model *m, const TensorTable *t, const char *dir) {
    char path[PATH_SIZE];
    RunState run = {0};
    path_join(path, dir, "state.json");
    Json *state = json_read(path);
    int64_t step = -1, next = -1;
    const Json *v = json_get(state, "step"), *n = json_get(state, "sampler_next"), *id = json_get(state, "data_identity");
    if (!v || !n || !id || id->type != JSON_STRING || !json_integer(v, &step) || !json_integer(n, &next) || step < 0 || next < 0)
        fail(STATUS_DATA, "%s: no step, sampler_next or data_identity: the file is damaged", path);
    run.step = step;
    run.sampler_next = (uint64_t)next;
    run.data_identity = strtoull(id->text, NULL, 16);
    json_free(state);
    path_join(path, dir, "teacher");
    hf_read_weights(backend, m, t, path, "teacher.");
    TensorList l = student_tensors(t);
    path_join(path, dir, "student.safetensors");
    read_tensors(backend, m, path, &l);
    list_free(&l);
    l = optimizer_tensors(backend, m, t);
    path_join(path, dir, "optimizer.safetensors");
    read_tensors(backend, m, path, &l);
    list_free(&l);
    return run;
}

// The Hugging Face folder meant by DIR, into path[PATH_SIZE]: DIR itself, DIR/teacher of a checkpoint, or that of the newest
// checkpoint of a run. A checkpoint's checksums are verified.
static inline void checkpoint_teacher(const char *dir, char *path) {
    char probe[PATH_SIZE], checkpoint[PATH_SIZE];
    snprintf(checkpoint, PATH_SIZE, "%s", dir);
    path_join(probe, dir, "state.json");
    if (!file_exists(probe) && !checkpoint_newest(dir, checkpoint)) {
        snprintf(path, PATH_SIZE, "%s", dir);
        path_join(probe, dir, "config.json");
        if (!file_exists(probe))
            fail(STATUS_DATA, "%s: neither a model folder (config.json), a checkpoint (state.json) nor a run (step-*)", dir);
        return;
    }
    json_free(checkpoint_verify(checkpoint));
    path_join(path, checkpoint, "teacher");
}

#endif
