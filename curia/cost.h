/*
What a step costs and how fast it could be (METHOD G): the progress line's percentages, and the planning of runs.

  Cost              operations and bytes of one image, by part
  step_cost         of a config
  serial_floor      seconds an image takes at a device's peaks, nothing overlapped, everything fused
*/
#ifndef CURIA_COST_H
#define CURIA_COST_H

#include "config.h"

// Of one image: multiply-adds count as two operations. Bytes are those that must move through device memory, each operand once.
typedef struct {
    double products, attention;                 // operations
    double attention_bytes, element_bytes, logit_bytes;
    double step_bytes;                          // of a whole step, whatever the batch: optimiser and weights
} Cost;

// METHOD G.1, G.4, G.5. Drop path leaves out its share of the student's blocks; 0.3 of the masked crops' patches see a loss.
static inline Cost step_cost(const Config *c) {
    Cost x = {0};
    double D = c->model_dim, F = c->model_ffn_hidden, L = c->model_depth, p = c->model_patch, keep = 1 - c->model_drop_path;
    double per_token = 8 * D * D + (c->model_ffn == FFN_SWIGLU ? 6 : 4) * D * F;
    double crops[2] = {2, (double)c->crops_local_count}, sizes[2] = {(double)c->crops_global_size, (double)c->crops_local_size};
    double trained = 0, taught = 0;             // tokens of student and teacher
    for (int g = 0; g < 2; g++) {
        double N = (sizes[g] / p) * (sizes[g] / p), T = N + 1 + c->model_registers;
        trained += crops[g] * T;
        x.products += crops[g] * (keep * L * 3 * T * per_token + 4 * N * c->model_channels * p * p * D);
        x.attention += crops[g] * keep * L * 14 * T * T * D;
        if (g) continue;
        taught = crops[g] * T;
        x.products += crops[g] * (L * T * per_token + 2 * N * c->model_channels * p * p * D);
        x.attention += crops[g] * L * 4 * T * T * D;
        double ratio = 0.5 * (c->mask_ratio_min + c->mask_ratio_max), masked = c->ibot_weight > 0 ? crops[g] * c->mask_probability * ratio * N : 0;
        for (int ibot = 0; ibot < 2; ibot++) {
            int own = ibot && c->ibot_separate_head;
            double K = own ? c->ibot_prototypes : c->dino_prototypes, b = own ? c->ibot_bottleneck : c->dino_bottleneck;
            double h = own ? c->ibot_hidden : c->dino_hidden, layers = own ? c->ibot_layers : c->dino_layers;
            double mlp = layers > 1 ? 2 * (h * D + (layers - 2) * h * h + h * b) : 2 * b * D;
            double student = ibot ? masked : crops[0] + crops[1], teacher = ibot ? masked : crops[0];
            x.products += (3 * student + teacher) * (mlp + 2 * b * K);
            x.logit_bytes += 2 * K * (6 * student + 5 * teacher);       // written once, and read by Sinkhorn, loss and gradients
            if (own || !ibot) x.step_bytes += 54 * (h * D + (layers > 2 ? (layers - 2) * h * h : 0) + h * b + K * b);
        }
    }
    x.attention_bytes = 2 * L * D * (keep * trained * 12 + taught * 4);
    x.element_bytes = 2 * L * D * (keep * trained * 14 + taught * 4);
    x.step_bytes += 54 * L * (4 * D * D + (c->model_ffn == FFN_SWIGLU ? 3 : 2) * D * F);
    return x;
}

// flops, bytes: a device's measured peaks per second.
static inline double serial_floor(const Cost *x, double flops, double bytes, double batch) {
    return x->products / flops + fmax(x->attention / flops, x->attention_bytes / bytes) +
           (x->element_bytes + x->logit_bytes + x->step_bytes / batch) / bytes;
}

#endif
