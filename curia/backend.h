/*
What the loop and a backend say to each other. The host decides every random choice of a step and writes it into a Batch;
the backend does all pixel and tensor work (DESIGN 2).

  Slice, View, Batch   a step's input
  StepResult           a step's losses and what shows collapse
  Place, place_of      where what read() and write() name lies
  Backend              a backend's functions
*/
#ifndef CURIA_BACKEND_H
#define CURIA_BACKEND_H

#include "schedule.h"
#include "safetensors.h"
#include "tensors.h"

// A raw slice: value = scale * pixel + intercept, HU for CT and scanner units for MR.
typedef struct {
    const int16_t *pixels;              // [rows, cols]
    int rows, cols;
    double scale, intercept;
    double volume_mean, volume_std;     // of the volume's values, clipped or not as data.clip_below_air says
} Slice;

// One crop of one slice, and what happens to its intensities.
typedef struct {
    int sample;                         // index into Batch.slices
    int top, left, height, width;       // box in slice pixels
    int flip;
    double gamma, contrast, brightness; // 1, 1, 0 leave the view as it is
    double blur_sigma;                  // output pixels; 0: none
} View;

// One step. Rows are crop-major: row = crop * B + sample. N is the number of patches of a global crop.
typedef struct {
    int samples;                        // B
    int globals, locals;                // views: 2B and V*B; for encode() any number, and 0
    int global_size, local_size;        // pixels
    const Slice *slices;                // [samples], with views; or NULL:
    const View *views;                  // [globals + locals]
    const float *global_pixels;         // [globals, C, G, G] normalised, where slices is NULL
    const float *local_pixels;          // [locals, C, l, l]
    const uint8_t *mask;                // [globals, N], 1 masked; NULL: none
    const int *drop[2][2];              // kept sequences [depth, kept] of {global, local} group and {attention, ffn}; NULL: all
    int kept[2];                        // sequences kept in each group
    const float *directions;            // SIGReg: [M, Dz], unit rows
    const float *gram_target;           // [globals, N, D], where gram.weight is set
    int all_tokens;                     // 1: out.patch is wanted; a backend may else leave out what no loss sees
    long long step;                     // 0-based; AdamW has taken this many steps before
    Schedule schedule;
} Batch;

typedef struct {
    double loss, dino, ibot, koleo, sigreg, gram;   // weighted total, and the parts unweighted
    double gradient_norm[GROUP_COUNT];              // before clipping
    double prototype_entropy[2];                    // of the mean target, DINO and iBOT, in nats: ln K where all are used alike
    double feature_std, feature_rank;               // teacher class tokens: mean over channels of the std over the batch, and
                                                    // the participation ratio (sum l)^2 / sum l^2 of their covariance
} StepResult;

// The arrays that read() and write() name, and where one of a model's names lies: array -1 where there is none of that name.
enum { ARRAY_STUDENT, ARRAY_TEACHER, ARRAY_GRAD, ARRAY_EXP_AVG, ARRAY_EXP_AVG_SQ, ARRAY_CENTER_DINO, ARRAY_CENTER_IBOT, ARRAY_COUNT };
typedef struct { int array; size_t offset, size; } Place;

static inline Place place_of(const Config *c, const TensorTable *t, const char *name) {
    static const char *const prefixes[] = {"student.", "teacher.", "grad.", "optim.exp_avg.", "optim.exp_avg_sq."};
    Place p = {-1, 0, 0};
    if (!strcmp(name, "center.dino")) p = (Place){ARRAY_CENTER_DINO, 0, (size_t)c->dino_prototypes};
    if (!strcmp(name, "center.ibot"))
        p = (Place){ARRAY_CENTER_IBOT, 0, (size_t)(c->ibot_separate_head ? c->ibot_prototypes : c->dino_prototypes)};
    for (int i = 0; i <= ARRAY_EXP_AVG_SQ; i++) {
        size_t skip = strlen(prefixes[i]);
        int tensor = strncmp(name, prefixes[i], skip) ? -1 : tensors_find(t, name + skip);
        if (tensor >= 0) p = (Place){i, t->tensors[tensor].offset, t->tensors[tensor].size};
    }
    return p;
}

typedef struct Model Model;

typedef struct {
    const char *name;
    int ahead;                          // steps that may be under way at once
    const char *(*missing)(const Config *c);    // why it cannot run here, or not this model; NULL: it can
    // Memory for a model; weights and moments are zero. train 0: teacher only, for encode().
    Model *(*create)(const Config *c, const TensorTable *t, int train);
    void (*destroy)(Model *m);
    // Copies a tensor in or out as F32 or F64 and returns its number of elements; with NULL only the number; 0 where there
    // is none of that name. Names: student.X, teacher.X, optim.exp_avg.X, optim.exp_avg_sq.X, grad.X for every X of the table,
    // center.dino, center.ibot, and of the last step out.cls [2B,D], out.patch [2B,N,D], out.teacher_cls [2B,D].
    size_t (*write)(Model *m, const char *name, Dtype dtype, const void *data);
    size_t (*read)(Model *m, const char *name, Dtype dtype, void *data);
    // One whole step: pixels, both forwards, losses, backward, clip, AdamW, EMA. begin() may return while it runs, and with
    // `ahead` 2 the next step may begin before the last one's end(); what is read in between is that of the later one. The batch
    // and all it points to may change once begin() has returned.
    void (*begin)(Model *m, const Batch *b);
    void (*end)(Model *m, StepResult *result);
    // Final-norm tokens [globals, 1+R+N, D] of the teacher for a batch's global views, unmasked.
    void (*encode)(Model *m, const Batch *b, float *tokens);
    // What the device reaches at best, measured in a second or two: operations per second of a large product, bytes per second of
    // a copy, read and written. NULL where nothing is held against it.
    void (*peaks)(Model *m, double *operations, double *bytes);
    // Normalised pixels of every view: [globals,C,G,G] and [locals,C,l,l].
    void (*pixels)(Model *m, const Batch *b, float *global_pixels, float *local_pixels);
} Backend;

#ifdef __cplusplus
extern "C" {
#endif
extern const Backend cpu_backend;           // train_curia.c, real = float
extern const Backend cpu_backend_fp64;      // the same source, real = double, for gradient checks
extern const Backend cuda_backend;          // train_curia.cu, bf16
extern const Backend cuda_backend_fp32;     // the same source, float, for the checker
#ifdef __cplusplus
}
#endif

#endif
