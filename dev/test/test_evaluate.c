/*
Tests of evaluate: the probes and metrics of curia/probe.h against brute force and known answers, and the program's command
line, errors and outputs. Each check prints a line where it fails; the end is `N passed, N failed`.

  ./test_evaluate                       the functions
  ./test_evaluate PROGRAM               and the program (./evaluate), on a small model and shards of its own
  ./test_evaluate --case FILE           one problem solved, for dev/oracle/evaluate_oracle.py; prints what that compares
  ./test_evaluate --shard FILE          the shard of the tests, for the same

  gcc -O2 -fopenmp dev/test/test_evaluate.c -o test_evaluate -lm -lpthread
*/
#include "check.h"
#include "../../dataloader.h"
#include "../../curia/checkpoint.h"
#include "../../curia/probe.h"
#ifdef _OPENMP
#include <omp.h>
#else
#define omp_set_num_threads(n) ((void)(n))
#endif
#include <limits.h>
#include <sys/wait.h>

static int near(double a, double b, double tolerance) { return fabs(a - b) <= tolerance * fmax(1, fabs(b)); }

// ---------------------------------------------------------------------------------------------------------------- metrics

static double auroc_by_pairs(const double *score, const int *label, int k, int n) {
    double wins = 0, pairs = 0;
    for (int i = 0; i < n; i++)
        for (int j = 0; j < n; j++)
            if (label[i] == k && label[j] != k) {
                wins += score[i] > score[j] ? 1 : score[i] == score[j] ? 0.5 : 0;
                pairs++;
            }
    return wins / pairs;
}

static void test_auroc(void) {
    enum { N = 97, K = 4 };
    double score[N * K];
    int label[N], used;
    for (int levels = 1; levels <= 1000; levels *= 10) {        // levels 1: constant scores; few levels: many ties
        Rng r = rng_at(7, RNG_TEST, (uint64_t)levels, 0, 0);
        for (int i = 0; i < N; i++) {
            label[i] = (int)rng_below(&r, K - 1);               // class K-1 never occurs
            for (int k = 0; k < K; k++) score[i * K + k] = (double)rng_below(&r, (uint64_t)levels) + (levels > 1 && label[i] == k);
        }
        double mean = 0;
        for (int k = 0; k < K - 1; k++) {
            double area = auroc(score + k, K, label, k, N), expected = auroc_by_pairs((double[N]){0}, label, k, N);
            double column[N];
            for (int i = 0; i < N; i++) column[i] = score[i * K + k];
            if (levels > 1) expected = auroc_by_pairs(column, label, k, N);
            check(near(area, expected, 1e-12), "auroc with %d levels, class %d: %.17g, by pairs %.17g", levels, k, area, expected);
            mean += expected / (K - 1);
        }
        double macro = macro_auroc(score, label, N, K, &used);
        check(used == K - 1 && near(macro, mean, 1e-12), "macro auroc with %d levels: %.17g over %d classes, expected %.17g",
              levels, macro, used, mean);
    }
    int one[3] = {1, 1, 1};
    check(isnan(auroc(score, 1, one, 1, 3)) && isnan(auroc(score, 1, one, 0, 3)),
          "auroc without a negative or a positive is not NaN");
    check(isnan(macro_auroc(score, one, 1, 3, &used)) && used == 0, "macro auroc of one class is not NaN");
    double order[4] = {0.1, 0.4, 0.35, 0.8};
    int truth[4] = {0, 0, 1, 1};
    check(auroc(order, 1, truth, 1, 4) == 0.75, "auroc of the textbook example is not 0.75");
}

static void test_accuracy(void) {
    int label[6] = {0, 0, 0, 0, 1, 3}, predicted[6] = {0, 0, 0, 1, 1, 0};
    check(near(accuracy(predicted, label, 6), 4.0 / 6, 1e-15), "accuracy");
    check(near(balanced_accuracy(predicted, label, 6, 5), (0.75 + 1 + 0) / 3, 1e-15), "balanced accuracy with absent classes");
    check(majority_class(label, 6, 5) == 0 && majority_class((int[]){2, 1, 1, 2}, 4, 3) == 1,
          "majority class, the smaller of equals");
    double scores[8] = {0.5, 0.5, 0.1, 0.9, 0, 0, 0.2, 0.1};
    int best[4];
    argmax_rows(scores, 4, 2, best);
    check(best[0] == 0 && best[1] == 1 && best[2] == 0 && best[3] == 0, "argmax takes the first of equals");
}

static void test_patients(void) {
    enum { N = 500, PATIENTS = 37 };
    uint64_t patient[N], moved[N];
    size_t rank[N], other[N], moved_rank[N];
    Rng r = rng_at(3, RNG_TEST, 0, 0, 0);
    for (int i = 0; i < N; i++) patient[i] = checksum(&(int){i < PATIENTS ? i : (int)rng_below(&r, PATIENTS)}, sizeof(int));
    for (int i = 0; i < N; i++) moved[i] = patient[(i * 7 + 3) % N];
    check(patient_ranks(patient, N, 1, rank) == PATIENTS, "number of patients");
    patient_ranks(moved, N, 1, moved_rank);
    patient_ranks(patient, N, 2, other);
    int shared = 1, stable = 1, differs = 0, seen[PATIENTS] = {0};
    for (int i = 0; i < N; i++) {
        for (int j = 0; j < N; j++) shared &= (patient[i] == patient[j]) == (rank[i] == rank[j]);
        stable &= moved_rank[i] == rank[(i * 7 + 3) % N];
        differs |= rank[i] != other[i];
        if (rank[i] < PATIENTS) seen[rank[i]] = 1;
    }
    for (int k = 0; k < PATIENTS; k++) shared &= seen[k];
    check(shared, "a rank belongs to one patient alone, and ranks are 0..patients-1");
    check(stable, "the split does not depend on the order of the rows");
    check(differs, "another seed gives another split");
}

// ------------------------------------------------------------------------------------------------------------ k nearest neighbours

// Features [n, dim] with rows repeated, so that similarities tie, and one zero row.
static float *make_features(size_t n, size_t dim, int classes, int *label, uint64_t seed) {
    float *x = xmalloc(n * dim * sizeof *x, "test features");
    Rng r = rng_at(seed, RNG_TEST, 1, 0, 0);
    for (size_t i = 0; i < n; i++) {
        label[i] = (int)rng_below(&r, (uint64_t)classes);
        for (size_t j = 0; j < dim; j++)
            x[i * dim + j] = i % 11 == 10 ? x[(i - 7) * dim + j]
                                          : (float)(rng_normal(&r) + (j % (size_t)classes == (size_t)label[i]));
    }
    for (size_t j = 0; j < dim; j++) x[2 * dim + j] = 0;
    return x;
}

static void knn_by_sorting(const float *x, size_t dim, const size_t *train, size_t n_train, size_t asked, const int *label,
                           int classes, size_t k, double *score) {
    double *similarity = xmalloc(n_train * sizeof *similarity, "test"), norm = 0, sum = 0;
    for (size_t j = 0; j < dim; j++) norm += (double)x[asked * dim + j] * x[asked * dim + j];
    for (size_t i = 0; i < n_train; i++) {
        double s = 0, square = 0;
        for (size_t j = 0; j < dim; j++) {
            s += (double)x[train[i] * dim + j] * x[asked * dim + j];
            square += (double)x[train[i] * dim + j] * x[train[i] * dim + j];
        }
        similarity[i] = norm * square > 0 ? s / sqrt(norm * square) : 0;
    }
    for (int c = 0; c < classes; c++) score[c] = 0;
    for (size_t m = 0; m < k && m < n_train; m++) {
        size_t best = 0;
        for (size_t i = 1; i < n_train; i++) if (similarity[i] > similarity[best]) best = i;
        double w = exp(similarity[best] / 0.07);
        score[label[train[best]]] += w;
        sum += w;
        similarity[best] = -INFINITY;
    }
    for (int c = 0; c < classes; c++) score[c] /= sum;
    free(similarity);
}

static void test_knn(void) {
    enum { N = 230, CLASSES = 3 };
    int label[N];
    size_t train[N], test[N], n_train = 0, n_test = 0;
    for (size_t i = 0; i < N; i++) {
        if (i % 3) train[n_train++] = i;
        else test[n_test++] = i;
    }
    size_t dims[] = {1, 7, 8, 37}, ks[] = {1, 20, 1000};
    for (int d = 0; d < 4; d++)
        for (int q = 0; q < 3; q++) {
            float *x = make_features(N, dims[d], CLASSES, label, 5);
            double scores[N * CLASSES], again[N * CLASSES], expected[CLASSES], worst = 0;
            omp_set_num_threads(1);
            knn_scores(x, dims[d], train, n_train, test, n_test, label, CLASSES, ks[q], 0.07, scores);
            omp_set_num_threads(3);
            knn_scores(x, dims[d], train, n_train, test, n_test, label, CLASSES, ks[q], 0.07, again);
            check(!memcmp(scores, again, n_test * CLASSES * sizeof *scores), "knn with 1 and 3 threads differ, dim %zu", dims[d]);
            if (dims[d] == 1 && ks[q] < n_train) {      // every similarity is 1, -1 or 0 up to rounding: ties decide, not compared
                free(x);
                continue;
            }
            for (size_t i = 0; i < n_test; i++) {
                knn_by_sorting(x, dims[d], train, n_train, test[i], label, CLASSES, ks[q], expected);
                for (int c = 0; c < CLASSES; c++) worst = fmax(worst, fabs(scores[i * CLASSES + (size_t)c] - expected[c]));
            }
            check(worst < 1e-11, "knn dim %zu k %zu: scores differ from brute force by %.3g", dims[d], ks[q], worst);
            free(x);
        }
    float tie[] = {1, 0, 2, 0, 3, 0, 0, 1};                     // rows 0, 1, 2 have the same direction: the earlier wins
    double score[2];
    knn_scores(tie, 2, (size_t[]){0, 1, 3}, 3, (size_t[]){2}, 1, (int[]){1, 0, 0, 0}, 2, 1, 0.07, score);
    check(score[0] == 0 && score[1] == 1, "of equally near neighbours the earlier counts");
}

// ------------------------------------------------------------------------------------------------------------- logistic regression

static void test_logistic(void) {
    enum { N = 203, K = 4, DIM = 75 };
    int label[N];
    float *features = make_features(N, DIM, K, label, 9);
    double *x = xmalloc(N * DIM * sizeof *x, "test"), *p = xmalloc(N * K * sizeof *p, "test");
    for (int i = 0; i < N * DIM; i++) x[i] = features[i];
    enum { SIZE = K * (DIM + 1) };
    double w[SIZE], gradient[SIZE], moved[SIZE], scratch[SIZE], worst = 0, largest = 0;
    Rng r = rng_at(1, RNG_TEST, 2, 0, 0);
    for (int j = 0; j < SIZE; j++) w[j] = 0.3 * rng_normal(&r);
    logistic_loss(x, label, N, DIM, K, 0.5, w, p, gradient);
    for (int j = 0; j < SIZE; j++) {
        double h = 1e-5, loss[2];
        for (int side = 0; side < 2; side++) {
            memcpy(moved, w, sizeof w);
            moved[j] += side ? h : -h;
            loss[side] = logistic_loss(x, label, N, DIM, K, 0.5, moved, p, scratch);
        }
        worst = fmax(worst, fabs((loss[1] - loss[0]) / (2 * h) - gradient[j]));
        largest = fmax(largest, fabs(gradient[j]));
    }
    check(worst < 1e-8 * largest + 1e-9, "logistic gradient differs from finite differences by %.3g of %.3g", worst, largest);

    for (double C = 1e-4; C < 20; C *= 100) {
        double a[SIZE] = {0}, b[SIZE];
        for (int j = 0; j < SIZE; j++) b[j] = rng_normal(&r);
        omp_set_num_threads(1);
        LogisticFit one = logistic_fit(x, label, N, DIM, K, C, 1e-10, a), two = logistic_fit(x, label, N, DIM, K, C, 1e-10, b);
        check(one.converged && two.converged && near(one.loss, two.loss, 1e-8),
              "logistic C=%g: loss %.12g and %.12g from two starts, gap %.2g", C, one.loss, two.loss, one.gap);
        memset(b, 0, sizeof b);
        omp_set_num_threads(3);
        logistic_fit(x, label, N, DIM, K, C, 1e-10, b);
        check(!memcmp(a, b, sizeof a), "logistic C=%g: 1 and 3 threads differ", C);
    }

    // Without features the probabilities are the class frequencies, exactly the biases' optimum.
    double zero[8] = {0}, bias[6] = {0}, probability[24];
    int uneven[8] = {0, 0, 0, 0, 0, 2, 2, 0};
    LogisticFit fit = logistic_fit(zero, uneven, 8, 1, 3, 1, 1e-14, bias);
    logistic_scores(zero, 8, 1, 3, bias, probability);
    check(fit.converged && near(probability[0], 0.75, 1e-6) && near(probability[2], 0.25, 1e-6),
          "frequencies %.9g %.9g, expected 0.75 0.25", probability[0], probability[2]);
    check(probability[1] == 0 && isinf(bias[4]), "a class without a row has probability %.3g, expected 0", probability[1]);

    // The fit with a class missing is the fit without that class.
    int three[N], packed[N];
    for (int i = 0; i < N; i++) {
        three[i] = label[i] == 1 ? 0 : label[i];
        packed[i] = three[i] > 1 ? three[i] - 1 : three[i];
    }
    double gap[SIZE] = {0}, dense[SIZE] = {0};
    LogisticFit g = logistic_fit(x, three, N, DIM, K, 0.1, 1e-10, gap),
                d = logistic_fit(x, packed, N, DIM, K - 1, 0.1, 1e-10, dense);
    check(near(g.loss, d.loss, 1e-10), "a missing class changes the loss: %.12g, without it %.12g", g.loss, d.loss);
    free(features);
    free(x);
    free(p);
}

static void test_linear_probe(void) {
    enum { N = 240, K = 3, DIM = 20 };
    int label[N], predicted[N], truth[N];
    size_t train[N], test[N], n_train = 0, n_test = 0, rank[N];
    float *x = make_features(N, DIM, K, label, 4);
    for (size_t i = 0; i < N; i++) {
        rank[i] = i % 12;
        x[i * DIM] = 1e6f;                                      // a constant column, far from 0
        for (int k = 0; k < K; k++)
            x[i * DIM + 1 + (size_t)k] = 1000 + 10 * (float)(label[i] == k);    // and some that tell the classes apart
        if (rank[i] < 6) train[n_train++] = i;
        else truth[n_test] = label[i], test[n_test++] = i;
    }
    double scores[N * K];
    LinearProbe probe = linear_probe(x, DIM, train, n_train, test, n_test, label, rank, 6, K, scores);
    argmax_rows(scores, n_test, K, predicted);
    check(probe.fit.converged && probe.validation == 1 && accuracy(predicted, truth, n_test) == 1,
          "a separable problem: validation %g, accuracy %g", probe.validation, accuracy(predicted, truth, n_test));
    for (size_t i = 0; i < N; i++) x[i * DIM] = rank[i] < 6 ? -5 : (float)i;
    double other[N * K];
    linear_probe(x, DIM, train, n_train, test, n_test, label, rank, 6, K, other);
    check(!memcmp(scores, other, n_test * K * sizeof *scores), "a column that is constant over the training rows is left out");
    for (size_t i = 0; i < n_train; i++) rank[train[i]] = 0;
    probe = linear_probe(x, DIM, train, n_train, test, n_test, label, rank, 1, K, scores);
    check(probe.C == 1 && isnan(probe.validation), "one training patient: C=%g, expected 1", probe.C);
    free(x);
}

// ---------------------------------------------------------------------------------------------------------------- the program

static char folder[64];

// Runs `PROGRAM arguments` in the folder with stdout in out, stderr in err; its exit status, or -1.
static int run(const char *before, const char *program, const char *arguments) {
    char command[4096];
    snprintf(command, sizeof command, "cd %s && %s %s %s >out 2>err </dev/null", folder, before, program, arguments);
    int status = system(command);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static char *slurp(const char *name) {
    char path[256];
    size_t bytes;
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return file_read(path, &bytes);
}

static int file_there(const char *name) {
    char path[256];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return file_exists(path);
}

// Checks the status, that there is one line of error, and that it holds `part`.
static void expect_error(const char *before, const char *program, const char *arguments, int status, const char *part) {
    int got = run(before, program, arguments);
    char *err = slurp("err"), *out = slurp("out"), *error = strstr(err, "error: ");
    int lines = 0;
    for (char *at = error; at && *at; at++) lines += *at == '\n';
    check(got == status && error && lines == 1 && strstr(error, part) && !*out, "%s: status %d, expected %d; stderr: %s", arguments,
          got, status, err);
    free(err);
    free(out);
}

// A Hugging Face folder: width 32, one block, patch 8, 32 pixels, random weights with LayerScale 1.
static void write_model(const char *path) {
    char name[256];
    file_make_dirs(path);
    snprintf(name, sizeof name, "%s/config.json", path);
    FILE *f = file_create(name);
    fprintf(f, "{\"architectures\": [\"Dinov2Model\"], \"model_type\": \"dinov2\", \"hidden_size\": 32, \"num_hidden_layers\": 1,\n"
               " \"num_attention_heads\": 2, \"mlp_ratio\": 4, \"hidden_act\": \"gelu\", \"layer_norm_eps\": 1e-06,"
               " \"image_size\": 32,\n"
               " \"patch_size\": 8, \"num_channels\": 1, \"qkv_bias\": true, \"layerscale_value\": 1.0,"
               " \"use_swiglu_ffn\": false}\n");
    file_close(f, name);
    Config c = config_default();
    c.model_dim = 32, c.model_depth = 1, c.model_heads = 2, c.model_patch = 8, c.crops_global_size = 32, c.model_layerscale = 1;
    config_validate(&c, "test");
    TensorTable t = tensors_build(&c, 0);
    snprintf(name, sizeof name, "%s/model.safetensors", path);
    SafeWriter w;
    safetensors_write_begin(&w, name, NULL);
    for (int i = 0; i < t.count; i++)
        safetensors_write_declare(&w, t.tensors[i].name, DTYPE_F32, t.tensors[i].rank, t.tensors[i].shape);
    for (int i = 0; i < t.count; i++) {
        float *value = xmalloc(t.tensors[i].size * sizeof *value, "test weights");
        tensor_init(&t, i, 1, value);
        safetensors_write_data(&w, t.tensors[i].name, value, t.tensors[i].size * sizeof *value);
        free(value);
    }
    safetensors_write_end(&w);
}

// A checkpoint folder around write_model's, with the checksums that a reader verifies.
static void write_checkpoint(const char *path) {
    char name[256];
    snprintf(name, sizeof name, "%s/teacher", path);
    write_model(name);
    for (int i = 0; i < 5; i++) {
        snprintf(name, sizeof name, "%s/%s", path, checkpoint_files[i]);
        if (file_exists(name)) continue;
        FILE *stand_in = file_create(name);         // evaluate reads the teacher alone, and verifies all
        fputc('x', stand_in);
        file_close(stand_in, name);
    }
    snprintf(name, sizeof name, "%s/teacher/preprocessor_config.json", path);
    FILE *f = file_create(name);
    fprintf(f, "{\"clip_below_air\": true, \"crop_size\": 32}\n");
    file_close(f, name);
    char state[1024] = "{\"checksums\": {";
    for (int i = 0; i < 5; i++) {
        snprintf(name, sizeof name, "%s/%s", path, checkpoint_files[i]);
        snprintf(state + strlen(state), sizeof state - strlen(state), "\"%s\": \"%016llx\"%s", checkpoint_files[i],
                 (unsigned long long)file_checksum(name), i < 4 ? ", " : "}}\n");
    }
    snprintf(name, sizeof name, "%s/state.json", path);
    f = file_create(name);
    file_write(f, name, state, strlen(state));
    file_close(f, name);
}

// patients x 6 slices of 24 x 20 pixels, value 2 p - 1100; class k is a bright stripe at its own height. labelled 0: no labels;
// classes 1: one class.
static void write_shard(const char *path, int patients, int labelled, int classes) {
    ShardWriter w;
    shard_writer_open(&w, path);
    for (int i = 0; i < patients * 6; i++) {
        Rng r = rng_at(11, RNG_TEST, 3, (uint64_t)i, 0);
        int k = i % classes;
        int16_t pixels[24 * 20];
        for (int y = 0; y < 24; y++)
            for (int x = 0; x < 20; x++) pixels[y * 20 + x] = (int16_t)(20 * rng_normal(&r) + (y / 8 == k ? 200 : 0));
        ShardSlice s = {.volume_id = 100 + (uint64_t)i / 3, .patient_id = 7 + (uint64_t)i / 6, .rows = 24, .cols = 20,
                        .slice_number = i % 3, .volume_slices = 3, .spacing_row = 1, .spacing_col = 1, .spacing_slice = 1,
                        .scale = 2, .intercept = -1100, .modality = MODALITY_MR,
                        .box_bottom = 24, .box_right = 20, .centre_row = 12, .centre_col = 10, .spread_row = 6, .spread_col = 5,
                        .label = labelled && i % 6 != 5 ? 3 + k : -1, .target = NAN, .volume_mean = -960, .volume_std = 200,
                        .volume_mean_clipped = -890, .volume_std_clipped = 150};
        shard_writer_add(&w, &s, pixels, NULL);
    }
    shard_writer_close(&w, labelled ? "a\nb\nc\nupper\nmiddle\tpart\nlower\n" : NULL);
}

// Field `column` of row `row` (0: the header) of the TSV in out; "" where there is none.
static const char *field(const char *text, int row, const char *column) {
    static char value[256];
    int at = 0, found = -1;
    *value = 0;
    for (const char *p = text; *p && *p != '\n'; p += strcspn(p, "\t\n"), p += *p == '\t', at++)
        if (strcspn(p, "\t\n") == strlen(column) && !strncmp(p, column, strlen(column))) found = at;
    for (; row > 0 && text; row--) text = strchr(text, '\n') ? strchr(text, '\n') + 1 : NULL;
    for (; found > 0 && text; found--) text = text + strcspn(text, "\t\n") + 1;
    if (found == 0 && text) snprintf(value, sizeof value, "%.*s", (int)strcspn(text, "\t\n"), text);
    return value;
}

static void test_program(const char *program) {
    snprintf(folder, sizeof folder, "/tmp/test_evaluate.%d", (int)getpid());
    if (mkdir(folder, 0700)) fail(STATUS_FAILED, "%s: %s", folder, strerror(errno));
    char path[PATH_SIZE];
    snprintf(path, sizeof path, "%s/hf", folder);
    write_model(path);
    snprintf(path, sizeof path, "%s/run/step-00000020", folder);
    write_checkpoint(path);
    snprintf(path, sizeof path, "%s/run/step-00000100", folder);
    write_checkpoint(path);
    write_shard(path_join(path, folder, "good.shard"), 10, 1, 3);
    write_shard(path_join(path, folder, "alone.shard"), 1, 1, 3);
    write_shard(path_join(path, folder, "same.shard"), 4, 1, 1);
    write_shard(path_join(path, folder, "plain.shard"), 2, 0, 3);

    check(run("", program, "--help") == 0, "--help");
    check(run("", program, "--model hf --data good.shard --random-init --feature mean") == 0, "a whole run: %s", slurp("err"));
    char *out = slurp("out");
    check(!strcmp(field(out, 1, "protocol"), "knn") && !strcmp(field(out, 2, "protocol"), "linear") &&
          !strcmp(field(out, 3, "model"), "random-init"), "rows: %s", out);
    check(!strcmp(field(out, 1, "n_train"), "25") && !strcmp(field(out, 1, "n_test"), "25") &&
          !strcmp(field(out, 1, "patients_test"), "5"), "50 labelled slices of 10 patients: %s", out);
    check(atof(field(out, 1, "accuracy")) == 1 && atof(field(out, 2, "macro_auroc")) == 1 && atof(field(out, 2, "majority")) < 0.6,
          "stripes are told apart: %s", out);
    check(!strcmp(field(out, 1, "norm"), "slice") && !strcmp(field(out, 1, "size"), "32") && !strcmp(field(out, 1, "classes"), "3"),
          "settings: %s", out);
    check(run("OMP_NUM_THREADS=1", program, "--model hf --data good.shard --random-init --feature mean") == 0, "one thread");
    char *again = slurp("out");
    check(!strcmp(out, again), "one thread and many print the same");
    check(run("", program, "--model run --data good.shard --protocol linear --feature cls+mean --norm volume --clip-air 0 "
                           "--size 16 --test-share 0.2 --seed 3") == 0, "a run's folder: %s", slurp("err"));
    free(out);
    out = slurp("out");
    char *err = slurp("err");
    check(strstr(err, "run/step-00000100/teacher") != NULL, "the newest checkpoint with weights: %s", err);
    check(!strcmp(field(out, 1, "patients_test"), "2") && !strcmp(field(out, 1, "n_test"), "10") &&
          !strcmp(field(out, 1, "size"), "16") && !strcmp(field(out, 1, "norm"), "volume") &&
          !strcmp(field(out, 1, "clip_air"), "0") && !strcmp(field(out, 1, "feature"), "cls+mean"), "options: %s", out);
    check(run("", program, "--model run/step-00000020 --data good.shard --protocol knn") == 0, "a checkpoint's folder");

    check(run("", program, "--model hf --data good.shard --data good.shard --extract both --feature cls+mean") == 0, "extract: %s",
          slurp("err"));
    char *npy = slurp("both.npy"), *tsv = slurp("both.tsv");
    check(!memcmp(npy, "\x93NUMPY\x01\x00\x76\x00", 10) && strstr(npy + 10, "'<f4', 'fortran_order': False, 'shape': (120, 64)"),
          "the .npy header");
    float twin[2][64];
    memcpy(twin[0], npy + 128, 256);
    memcpy(twin[1], npy + 128 + 60 * 256, 256);
    check(!memcmp(twin[0], twin[1], 256) && isfinite(twin[0][0]), "the same slice gives the same features");
    check(!strcmp(field(tsv, 2, "class"), "middle part") && !strcmp(field(tsv, 2, "label"), "4") &&
          !strcmp(field(tsv, 6, "label"), "-1") && !strcmp(field(tsv, 120, "row"), "119") &&
          !strcmp(field(tsv, 1, "modality"), "MR") && !strcmp(field(tsv, 1, "patient"), "0000000000000007"), "the .tsv");
    check(!file_there("both.npy.partial"), "a temporary file was left");
    const char *parts[2] = {"cls", "mean"};
    for (int i = 0; i < 2; i++) {
        char arguments[128];
        snprintf(arguments, sizeof arguments, "--model hf --data good.shard --extract part --feature %s", parts[i]);
        check(run("", program, arguments) == 0, "extract of %s", parts[i]);
        char *part = slurp("part.npy");
        check(strstr(part + 10, "(60, 32)") && !memcmp(part + 128 + 7 * 128, npy + 128 + 7 * 256 + i * 128, 128),
              "cls+mean is not cls, then mean: %s", parts[i]);
        free(part);
    }
    check(run("", program, "--model hf --data plain.shard --extract plain") == 0 && file_there("plain.npy"),
          "extract without labels: %s", slurp("err"));
    check(run("", program, "--model hf --data alone.shard --extract alone") == 0 && file_there("alone.npy"),
          "extract of one patient");

    expect_error("", program, "--model hf", STATUS_USAGE, "--data PATH is missing");
    expect_error("", program, "--data good.shard", STATUS_USAGE, "--model DIR is missing");
    expect_error("", program, "--model hf --data good.shard --wrong", STATUS_USAGE, "--wrong");
    expect_error("", program, "--model hf --data good.shard --seed", STATUS_USAGE, "--seed needs a value");
    expect_error("", program, "--model hf --data good.shard --seed x", STATUS_USAGE, "--seed x");
    expect_error("", program, "--model hf --data good.shard more", STATUS_USAGE, "more");
    expect_error("", program, "--model hf --data good.shard --protocol attention", STATUS_USAGE, "attention");
    expect_error("", program, "--model hf --data good.shard --protocol svm", STATUS_USAGE, "knn|linear");
    expect_error("", program, "--model hf --data good.shard --task age", STATUS_USAGE, "age");
    expect_error("", program, "--model hf --data good.shard --device cuda", STATUS_USAGE, "cuda");
    expect_error("", program, "--model hf --data good.shard --size 20", STATUS_USAGE, "multiple");
    expect_error("", program, "--model nowhere --data good.shard", STATUS_DATA, "nowhere");
    expect_error("", program, "--model . --data good.shard", STATUS_DATA, "config.json");
    expect_error("", program, "--model hf --data nowhere", STATUS_DATA, "nowhere");
    expect_error("", program, "--model hf --data plain.shard", STATUS_DATA, "no slice has a label");
    expect_error("", program, "--model hf --data alone.shard", STATUS_DATA, "one patient");
    expect_error("", program, "--model hf --data same.shard", STATUS_DATA, "one class");
    expect_error("", program, "--model hf --data plain.shard --extract x --protocol knn", STATUS_DATA, "no slice has a label");
    expect_error("", program, "--model hf --data good.shard --extract nowhere/x", STATUS_FAILED, "nowhere/x.npy");
    expect_error("trap '' XFSZ; ulimit -f 4;", program, "--model hf --data good.shard --extract big", STATUS_FAILED, "big.npy");
    check(!file_there("big.npy") && !file_there("big.npy.partial") && !file_there("big.tsv.partial"),
          "a failed extract left a file");
    char full[PATH_MAX + 64];
    snprintf(full, sizeof full, "'%s --model hf --data good.shard >/dev/full'", program);
    expect_error("", "sh -c", full, STATUS_FAILED, "stdout");

    snprintf(path, sizeof path, "%s/good.shard", folder);
    FILE *f = fopen(path, "r+b");
    fseek(f, 128 + 960 * 3 + 5, SEEK_SET);                      // a byte in the pixels of slice 3
    fputc(77, f);
    fclose(f);
    expect_error("", program, "--model hf --data good.shard --extract bad", STATUS_DATA, "slice 3");
    check(!file_there("bad.npy") && !file_there("bad.npy.partial"), "a bad slice left a file");
    free(out);
    free(again);
    free(err);
    free(npy);
    free(tsv);
    file_remove_tree(folder);
}

// ---------------------------------------------------------------------------------------------------------------- oracle

// FILE: int64 n, dim, classes, n_train, k; double C; float32 features [n, dim]; int32 label [n]; int32 rank [n]; the first n_train
// rows are the train part. Prints what scikit-learn computes too.
static void solve_case(const char *path) {
    size_t bytes;
    char *data = file_read(path, &bytes);
    int64_t head[5];
    double C;
    memcpy(head, data, sizeof head);
    memcpy(&C, data + sizeof head, sizeof C);
    size_t n = (size_t)head[0], dim = (size_t)head[1], n_train = (size_t)head[3], n_test = n - n_train, patients = 0;
    int classes = (int)head[2];
    const float *features = (const float *)(data + 48);
    const int *label = (const int *)(features + n * dim), *place = label + n;
    size_t *rows = xmalloc(n * sizeof *rows, "a case"), *rank = xmalloc(n * sizeof *rank, "a case");
    for (size_t i = 0; i < n; i++) {
        rows[i] = i;
        rank[i] = (size_t)place[i];
        if (i < n_train && rank[i] + 1 > patients) patients = rank[i] + 1;
    }
    double *scores = xmalloc(n * (size_t)classes * sizeof *scores, "a case"),
           *w = xmalloc((size_t)classes * (dim + 1) * sizeof *w, "a case");
    double *centre = xmalloc(dim * sizeof *centre, "a case"), *scale = xmalloc(dim * sizeof *scale, "a case");
    int *predicted = xmalloc(n * sizeof *predicted, "a case"), used;
    for (int linear = 0; linear < 2; linear++) {
        double start = seconds_now(), seconds;
        if (linear) {
            LinearProbe probe = linear_probe(features, dim, rows, n_train, rows + n_train, n_test, label, rank, patients,
                                             classes, scores);
            seconds = seconds_now() - start;
            printf("linear.C %.17g\nlinear.validation %.17g\n", probe.C, probe.validation);
        } else {
            knn_scores(features, dim, rows, n_train, rows + n_train, n_test, label, classes, (size_t)head[4], 0.07, scores);
            seconds = seconds_now() - start;
        }
        const char *name = linear ? "linear" : "knn";
        argmax_rows(scores, n_test, classes, predicted);
        printf("%s.seconds %.4f\n%s.balanced_accuracy %.17g\n", name, seconds, name,
               balanced_accuracy(predicted, label + n_train, n_test, classes));
        double area = macro_auroc(scores, label + n_train, n_test, classes, &used);
        printf("%s.macro_auroc %.17g\n%s.used %d\n%s.predicted", name, area, name, used, name);
        for (size_t i = 0; i < n_test; i++) printf(" %d", predicted[i]);
        printf("\n%s.scores", name);
        for (size_t i = 0; i < n_test * (size_t)classes; i++) printf(" %.17g", scores[i]);
        printf("\n");
    }
    standard_statistics(features, dim, rows, n_train, centre, scale);
    double *x = standard_rows(features, dim, rows, n_train, centre, scale), start = seconds_now();
    LogisticFit fit = logistic_fit(x, label, n_train, dim, classes, C, 1e-9, w);
    printf("logistic.seconds %.4f\nlogistic.loss %.17g\nlogistic.gap %.3g\nlogistic.iterations %d\nlogistic.converged %d\n",
           seconds_now() - start, fit.loss, fit.gap, fit.iterations, fit.converged);
    free(data); free(rows); free(rank); free(scores); free(w); free(centre); free(scale); free(predicted); free(x);
}

int main(int argc, char **argv) {
    if (argc == 3 && !strcmp(argv[1], "--case")) {
        solve_case(argv[2]);
        return 0;
    }
    if (argc == 3 && !strcmp(argv[1], "--shard")) {
        write_shard(argv[2], 10, 1, 3);
        return 0;
    }
    test_auroc();
    test_accuracy();
    test_patients();
    test_knn();
    test_logistic();
    test_linear_probe();
    if (argc == 2) {
        char *program = realpath(argv[1], NULL);
        if (!program) fail(STATUS_USAGE, "%s: %s; build it first", argv[1], strerror(errno));
        test_program(program);
        free(program);
    }
    printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
}
