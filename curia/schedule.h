/*
Schedules by step (METHOD F).

  cosine_schedule   linear warm-up, then half a cosine
  Schedule, schedule_at   every scheduled value of a step
*/
#ifndef CURIA_SCHEDULE_H
#define CURIA_SCHEDULE_H

#include "config.h"

// Warm-up is an inclusive line from `start` at step 0 to `base` at step warmup-1; then n = total - warmup steps of
// final + (base - final)(1 + cos(pi i / n))/2, i = 0..n-1; `final` after that.
static inline double cosine_schedule(double start, double base, double final, long long warmup, long long total, long long step) {
    if (step < warmup) return warmup > 1 ? start + (base - start) * (double)step / (double)(warmup - 1) : start;
    if (step >= total) return final;
    return final + 0.5 * (base - final) * (1 + cos(3.14159265358979323846 * (double)(step - warmup) / (double)(total - warmup)));
}

typedef struct { double lr, last_layer_lr, weight_decay, momentum, teacher_temp; } Schedule;

static inline Schedule schedule_at(const Config *c, long long step) {
    Schedule s;
    double peak = c->optim_lr * (c->optim_scaling == SCALING_SQRT ? sqrt((double)c->optim_batch_size / 1024) : 1);
    s.lr = cosine_schedule(0, peak, c->optim_lr_min, c->optim_warmup_steps, c->optim_steps, step);
    s.last_layer_lr = step < c->optim_freeze_last_layer_steps ? 0 : s.lr;
    s.weight_decay = cosine_schedule(0, c->optim_weight_decay, c->optim_weight_decay_end, 0, c->optim_steps, step);
    s.momentum = cosine_schedule(0, c->teacher_momentum, c->teacher_momentum_end, 0, c->optim_steps, step);
    s.teacher_temp = cosine_schedule(c->teacher_warmup_temp, c->teacher_temp, c->teacher_temp, c->teacher_warmup_steps,
                                     c->optim_steps, step);
    return s;
}

#endif
