/*
Errors, warnings, memory and time: what every program here shares.

  STATUS_*        exit statuses (0 done, 1 failed while running, 2 command line or config, 3 bad data)
  fail            one line on stderr, then exit
  warn            one line on stderr
  xmalloc         zeroed, 64-byte aligned memory, or fail
  seconds_now     monotonic wall clock
  peak_memory     bytes of the largest resident set so far
*/
#ifndef CURIA_LOG_H
#define CURIA_LOG_H

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

enum { STATUS_DONE = 0, STATUS_FAILED = 1, STATUS_USAGE = 2, STATUS_DATA = 3 };

// On a terminal the live progress line is wiped first, so that a message never lands in the middle of it.
static inline void log_line(const char *kind, const char *format, va_list args) {
    char text[2048];
    vsnprintf(text, sizeof text, format, args);
    fflush(stdout);
    fprintf(stderr, "%s%s%s\n", isatty(2) ? "\r\033[K" : "", kind, text);
}

// Says what is wrong, in which file or key, and what to do; then exits with the given STATUS_*.
__attribute__((noreturn, format(printf, 2, 3)))
static inline void fail(int status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    log_line("error: ", format, args);
    va_end(args);
    exit(status);
}

__attribute__((format(printf, 1, 2)))
static inline void warn(const char *format, ...) {
    va_list args;
    va_start(args, format);
    log_line("warning: ", format, args);
    va_end(args);
}

// Zeroed memory on a cache line boundary. `what` names the thing in the message when memory runs out.
static inline void *xmalloc(size_t bytes, const char *what) {
    void *p = NULL;
    size_t rounded = (bytes + 63) & ~(size_t)63;
    if (rounded < bytes || posix_memalign(&p, 64, rounded ? rounded : 64) != 0)
        fail(STATUS_FAILED, "out of memory: %s needs %.1f MiB; use a smaller batch or model", what, bytes / 1048576.0);
    memset(p, 0, rounded ? rounded : 64);
    return p;
}

static inline double seconds_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

static inline size_t peak_memory(void) {
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return (size_t)usage.ru_maxrss * 1024;
}

#endif
