/*
Worker processes: tasks are done by forked workers and their results taken by the parent in the order of the tasks, so that
nothing depends on how many workers there are. A worker may crash, hang or run out of memory: that costs the one item it was
at, which the parent marks; the task is then done again without it.

  Pool              the workers, and the slots their results lie in
  pool_open         sets limits and slots; workers start with the first task
  pool_run          does tasks 0..n-1
  pool_item         in a worker: which item it is at, for the parent to blame
  PoolResult, result_room, result_write   in a worker: the bytes of its result
  pool_close        ends the workers
*/
#ifndef CURIA_POOL_H
#define CURIA_POOL_H

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <malloc.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "../curia/log.h"

enum { KEPT_BYTES = 64 << 20 };         // of the memory of a result, kept for the next one
#define MOST_BYTES ((off_t)1 << 36)     // of a result: addresses are set aside for as much, memory as it grows

// A worker's result: a memory file, mapped by parent and workers alike. at: bytes so far; room: bytes of the file.
typedef struct { uint8_t *base; int file; off_t at, room; } PoolResult;

// What a worker shows its parent, in shared memory.
typedef struct {
    volatile int64_t item;             // -1: none
    volatile double since;             // seconds_now() when it began the item
    volatile double decoding, working; // seconds so far: in decoders, and in all
    volatile uint64_t peak;            // bytes
} PoolShown;

typedef struct { pid_t pid; int to, from, slot, late, idle_deaths; } PoolWorker;

typedef struct {
    int jobs, slots, own;              // own: in a worker, its number
    double time_limit;                 // seconds an item may take
    uint64_t memory_limit;             // bytes a worker may allocate
    PoolWorker *workers;
    PoolShown *shown;                  // [jobs], shared
    PoolResult *results;               // [slots]
    int *errors;                       // [jobs] what a worker says on stderr
    int64_t *task;                     // [slots] -1: free
    off_t *done;                       // [slots] bytes of the result; -1: not yet
} Pool;

typedef struct {
    void *context;
    void (*work)(void *context, Pool *pool, int64_t task, PoolResult *result);                     // in a worker
    void (*take)(void *context, int64_t task, const uint8_t *result, size_t bytes);                // in the parent, in order
    void (*died)(void *context, int64_t task, int64_t item, int kind, const char *why);            // in the parent
    void (*tick)(void *context, int64_t taken);                                                    // some times a second
} PoolCalls;

enum { POOL_CRASHED, POOL_LATE, POOL_MEMORY };

// Where the next `bytes` of the result go; r->at is moved by whoever writes them.
static inline void *result_room(PoolResult *r, size_t bytes) {
    if (r->at + (off_t)bytes > r->room) {
        r->room = r->at + (off_t)bytes + r->room / 2;
        if (r->room > MOST_BYTES || ftruncate(r->file, r->room))
            fail(STATUS_FAILED, "out of memory: a result of %lld bytes", (long long)r->room);
    }
    return r->base + r->at;
}

static inline void result_write(PoolResult *r, const void *data, size_t bytes) {
    if (bytes) memcpy(result_room(r, bytes), data, bytes);
    r->at += (off_t)bytes;
}

// Called before anything that a bad file could break; item is the caller's number for it.
static inline void pool_item(Pool *p, int64_t item) {
    p->shown[p->own].since = seconds_now();
    p->shown[p->own].item = item;
}

static inline Pool pool_open(int jobs, double time_limit, uint64_t memory_limit) {
    Pool p = {.jobs = jobs, .slots = 2 * jobs + 1, .time_limit = time_limit, .memory_limit = memory_limit};
    p.workers = (PoolWorker *)xmalloc(jobs * sizeof *p.workers, "workers");
    p.results = (PoolResult *)xmalloc(p.slots * sizeof *p.results, "workers");
    p.errors = (int *)xmalloc(jobs * sizeof *p.errors, "workers");
    p.task = (int64_t *)xmalloc(p.slots * sizeof *p.task, "workers");
    p.done = (off_t *)xmalloc(p.slots * sizeof *p.done, "workers");
    p.shown = (PoolShown *)mmap(NULL, jobs * sizeof *p.shown, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    int bad = p.shown == MAP_FAILED;
    for (int i = 0; i < p.slots; i++) {
        PoolResult *r = &p.results[i];
        p.task[i] = p.done[i] = -1;
        r->file = memfd_create("result", MFD_CLOEXEC);
        r->base = (uint8_t *)mmap(NULL, MOST_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, r->file, 0);
        bad |= r->file < 0 || r->base == MAP_FAILED;
    }
    for (int i = 0; i < jobs; i++) bad |= (p.errors[i] = memfd_create("errors", MFD_CLOEXEC)) < 0;
    if (bad) fail(STATUS_FAILED, "cannot set up %d workers: %s; use fewer --jobs", jobs, strerror(errno));
    return p;
}

__attribute__((noreturn)) static inline void pool_serve(Pool *p, int number, int from, int to, const PoolCalls *calls) {
    p->own = number;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    int nothing = open("/dev/null", O_RDWR);
    dup2(nothing, 0);
    dup2(nothing, 1);
    dup2(p->errors[number], 2);
    mallopt(M_MMAP_MAX, 0);            // memory of one series serves the next, and its pages are not asked for again
    mallopt(M_TRIM_THRESHOLD, INT_MAX);
    struct rlimit file;                // results are no files on a disk
    if (getrlimit(RLIMIT_FSIZE, &file) == 0) file.rlim_cur = file.rlim_max, setrlimit(RLIMIT_FSIZE, &file);
#ifndef __SANITIZE_ADDRESS__
    struct rlimit limit = {p->memory_limit, p->memory_limit}, none = {0, 0};
    setrlimit(RLIMIT_DATA, &limit);
    setrlimit(RLIMIT_CORE, &none);
#endif
    for (struct { int64_t task; int slot; } order; read(from, &order, sizeof order) == sizeof order;) {
        double start = seconds_now();
        PoolResult result = p->results[order.slot];
        struct stat now;
        if (fstat(result.file, &now) == 0) result.room = now.st_size; // another worker may have made it larger
        calls->work(calls->context, p, order.task, &result);
        PoolShown *shown = &p->shown[number];
        shown->item = -1;
        shown->working += seconds_now() - start;
        shown->peak = peak_memory();
        struct { int slot; off_t bytes; } answer = {order.slot, result.at};
        if (write(to, &answer, sizeof answer) != sizeof answer) break;
    }
    _exit(0);
}

static inline void pool_start(Pool *p, int number, const PoolCalls *calls) {
    int order[2], answer[2];
    PoolWorker *w = &p->workers[number];
    if (pipe2(order, O_CLOEXEC) || pipe2(answer, O_CLOEXEC) || ftruncate(p->errors[number], 0))
        fail(STATUS_FAILED, "cannot start a worker: %s", strerror(errno));
    lseek(p->errors[number], 0, SEEK_SET);
    p->shown[number].item = -1;
    fflush(NULL);
    w->pid = fork();
    if (w->pid < 0) fail(STATUS_FAILED, "cannot start a worker: %s; use fewer --jobs", strerror(errno));
    if (w->pid == 0) {
        for (int i = 0; i < p->jobs; i++) // a sibling's end held open here would hide its parent's or its own death
            if (i != number && p->workers[i].pid > 0) close(p->workers[i].to), close(p->workers[i].from);
        close(order[1]);
        close(answer[0]);
        pool_serve(p, number, order[0], answer[1], calls);
    }
    close(order[0]);
    close(answer[1]);
    w->to = order[1];
    w->from = answer[0];
    w->slot = -1;
    w->late = 0;
}

// A worker is gone: blames the item it was at and starts another in its place; its slot's task is to be done again.
static inline void pool_bury(Pool *p, int number, const PoolCalls *calls) {
    PoolWorker *w = &p->workers[number];
    PoolShown *shown = &p->shown[number];
    char why[256] = "", *line = why;
    int status = 0, kind = POOL_CRASHED;
    waitpid(w->pid, &status, 0);
    close(w->to);
    close(w->from);
    ssize_t n = pread(p->errors[number], why, sizeof why - 1, 0);
    why[n > 0 ? n : 0] = 0;
    why[strcspn(why, "\n")] = 0;
    if (w->late) {
        kind = POOL_LATE;
        snprintf(why, sizeof why, "took longer than %g s (--time-limit)", p->time_limit);
    } else if (WIFSIGNALED(status)) snprintf(why, sizeof why, "its decoder crashed (%s)", strsignal(WTERMSIG(status)));
    else {
        kind = strstr(why, "out of memory") ? POOL_MEMORY : POOL_CRASHED;
        if (kind == POOL_MEMORY) snprintf(why, sizeof why, "needs more memory than --memory-limit allows");
        else if (!strncmp(why, "error: ", 7)) line = why + 7;
        else snprintf(why, sizeof why, "its decoder ended with status %d", WEXITSTATUS(status));
    }
    int64_t item = shown->item, task = w->slot >= 0 ? p->task[w->slot] : -1;
    w->pid = 0;
    if (task < 0 || item < 0) {
        if (++w->idle_deaths > 3) fail(STATUS_FAILED, "workers keep dying without a file in hand: %s", line);
    } else calls->died(calls->context, task, item, kind, line);
}

// Does tasks 0..n-1. At most `slots` results that are not yet taken are held at a time: a worker that is far ahead waits.
static inline void pool_run(Pool *p, int64_t n, const PoolCalls *calls) {
    int64_t next = 0, taken = 0;
    struct pollfd *wait = (struct pollfd *)xmalloc(p->jobs * sizeof *wait, "workers");
    int *again = (int *)xmalloc(p->slots * sizeof *again, "workers"), n_again = 0; // slots of tasks whose worker died
    while (taken < n) {
        for (int i = 0; i < p->jobs; i++) {
            PoolWorker *w = &p->workers[i];
            struct { int64_t task; int slot; } order = {0, -1};
            if (w->pid > 0 && w->slot >= 0) continue;
            if (n_again) order.slot = again[--n_again];
            for (int s = 0; s < p->slots && order.slot < 0 && next < n && next < taken + p->slots; s++)
                if (p->task[s] < 0) order.slot = s, p->task[s] = next++;
            if (order.slot < 0) break;
            order.task = p->task[order.slot];
            if (w->pid <= 0) pool_start(p, i, calls);
            p->done[order.slot] = -1;
            w->slot = order.slot;
            if (write(w->to, &order, sizeof order) != sizeof order) kill(w->pid, SIGKILL); // it is dying already: buried below
        }
        for (int i = 0; i < p->jobs; i++) wait[i] = (struct pollfd){p->workers[i].pid > 0 ? p->workers[i].from : -1, POLLIN, 0};
        poll(wait, p->jobs, 200);
        for (int i = 0; i < p->jobs; i++) {
            PoolWorker *w = &p->workers[i];
            struct { int slot; off_t bytes; } answer;
            if (w->pid <= 0) continue;
            if (wait[i].revents && read(w->from, &answer, sizeof answer) == sizeof answer) {
                p->done[answer.slot] = answer.bytes;
                w->slot = -1;
            } else if (wait[i].revents) {
                int slot = w->slot;
                pool_bury(p, i, calls);
                if (slot >= 0) again[n_again++] = slot;
            } else if (p->shown[i].item >= 0 && seconds_now() - p->shown[i].since > p->time_limit && !w->late) {
                w->late = 1;
                kill(w->pid, SIGKILL);
            }
        }
        for (int s = 0; s < p->slots; s++) {
            if (p->done[s] < 0 || p->task[s] != taken) continue;
            off_t bytes = p->done[s];
            calls->take(calls->context, taken, p->results[s].base, (size_t)bytes);
            if (bytes > KEPT_BYTES && ftruncate(p->results[s].file, KEPT_BYTES))
                fail(STATUS_FAILED, "cannot free a result: %s", strerror(errno));
            p->done[s] = -1;
            p->task[s] = -1;
            taken++;
            s = -1;                      // the next one may be there already
        }
        calls->tick(calls->context, taken);
    }
    free(wait);
    free(again);
}

// Ends the workers. *decoding, *working: seconds of all of them together; *peak: bytes of the largest.
static inline void pool_close(Pool *p, double *decoding, double *working, uint64_t *peak) {
    *decoding = *working = 0;
    *peak = 0;
    for (int i = 0; i < p->jobs; i++) {
        if (p->workers[i].pid > 0) {
            close(p->workers[i].to);
            waitpid(p->workers[i].pid, NULL, 0);
            close(p->workers[i].from);
        }
        *decoding += p->shown[i].decoding;
        *working += p->shown[i].working;
        if (p->shown[i].peak > *peak) *peak = p->shown[i].peak;
        close(p->errors[i]);
    }
    for (int i = 0; i < p->slots; i++) {
        munmap(p->results[i].base, MOST_BYTES);
        close(p->results[i].file);
    }
    munmap(p->shown, p->jobs * sizeof *p->shown);
    free(p->workers);
    free(p->results);
    free(p->errors);
    free(p->task);
    free(p->done);
}

#endif
