/*
Which backend a program runs on (DESIGN 7: --device auto|cpu|cuda).

  device_choose     the backend of a --device, and why
*/
#ifndef CURIA_DEVICE_H
#define CURIA_DEVICE_H

#include "backend.h"

// "auto" takes the GPU where one answers and can run this model, else the CPU. A device asked for by name that cannot run ends
// the program with status 2. why: for the line that says what was taken.
static inline const Backend *device_choose(const char *name, const Config *c, const char **why) {
    if (strcmp(name, "auto") && strcmp(name, "cpu") && strcmp(name, "cuda"))
        fail(STATUS_USAGE, "--device %s: expected auto, cpu or cuda", name);
    *why = "as asked";
    if (!strcmp(name, "cpu")) return &cpu_backend;
#ifdef CURIA_CUDA
    const char *missing = cuda_backend.missing(c);
    if (!missing && !strcmp(name, "auto")) *why = "the GPU answers";
    if (!missing) return &cuda_backend;
#else
    (void)c;
    const char *missing = "this program was built without the CUDA backend";
#endif
    if (!strcmp(name, "cuda")) fail(STATUS_USAGE, "--device cuda: %s; or use --device cpu", missing);
    *why = missing;
    return &cpu_backend;
}

#endif
