/*
The emulator's engine and runtime. Read emu.h first.

  1. stacks       fibers and the switch between them
  2. schedule     order of lanes, warps and blocks; collectives and barriers
  3. a block      shared memory, running a kernel
  4. PTX          ldmatrix, mma, cp.async
  5. memory       device memory is out of the host's reach but while a stream runs
  6. streams      queues, events, graphs
  7. the rest of the API

How the API differs from plain C, all of it as CUDA documents it: nothing runs before a synchronisation; cudaMemset, and
cudaMemcpy from pageable memory or between device arrays, need not be done when they return; the default stream waits for no
cudaStreamNonBlocking stream, nor they for it. Asynchronous copies read pageable host memory at the call, pinned memory when
they run.
*/
#include "emu.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include <algorithm>
#include <deque>
#include <map>
#include <mutex>
#include <numeric>
#include <stdarg.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include <vector>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define ASAN(...) __VA_ARGS__
#define NOT_ASAN(...)
#else
#define ASAN(...)
#define NOT_ASAN(...) __VA_ARGS__
#include <signal.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

static const char *kernel_name;             // NULL: no kernel runs

static void where(char *text, size_t size) {
    snprintf(text, size, "kernel %s, block (%u,%u,%u), thread (%u,%u,%u)", kernel_name, blockIdx.x, blockIdx.y, blockIdx.z,
             threadIdx.x, threadIdx.y, threadIdx.z);
}

void emu::error(const char *format, ...) {
    char text[1024], place[512] = "";
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (kernel_name) where(place, sizeof place);
    fflush(stdout);
    fprintf(stderr, "error: emulated GPU: %s%s%s\n", place, kernel_name ? ": " : "", text);
    _exit(1);       // the stack may be a fiber's: no exit handlers
}

// ---------------------------------------------------------------------------------------------------------------------
// 1. Stacks

// Swaps stack pointers; what a call must preserve is on the stack.
#if defined(__x86_64__)
extern "C" void emu_switch(void **save, void *load);
asm(".text\n.globl emu_switch\n.type emu_switch, @function\nemu_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp, (%rdi)\nmovq %rsi, %rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n.size emu_switch, .-emu_switch\n");
static void *first_frame(char *top, void (*entry)()) {
    void **sp = (void **)top - 8;           // six registers, the entry as return address, and the end of all frames
    memset(sp, 0, 64);
    sp[6] = (void *)entry;
    return sp;
}
#elif defined(__aarch64__)
extern "C" void emu_switch(void **save, void *load);
asm(".text\n.globl emu_switch\n.type emu_switch, %function\nemu_switch:\n"
    "sub sp, sp, #160\nstp x19, x20, [sp]\nstp x21, x22, [sp, #16]\nstp x23, x24, [sp, #32]\nstp x25, x26, [sp, #48]\n"
    "stp x27, x28, [sp, #64]\nstp x29, x30, [sp, #80]\nstp d8, d9, [sp, #96]\nstp d10, d11, [sp, #112]\n"
    "stp d12, d13, [sp, #128]\nstp d14, d15, [sp, #144]\nmov x9, sp\nstr x9, [x0]\nmov sp, x1\n"
    "ldp x19, x20, [sp]\nldp x21, x22, [sp, #16]\nldp x23, x24, [sp, #32]\nldp x25, x26, [sp, #48]\n"
    "ldp x27, x28, [sp, #64]\nldp x29, x30, [sp, #80]\nldp d8, d9, [sp, #96]\nldp d10, d11, [sp, #112]\n"
    "ldp d12, d13, [sp, #128]\nldp d14, d15, [sp, #144]\nadd sp, sp, #160\nret\n.size emu_switch, .-emu_switch\n");
static void *first_frame(char *top, void (*entry)()) {
    void **sp = (void **)top - 20;
    memset(sp, 0, 160);
    sp[11] = (void *)entry;
    return sp;
}
#else
#include <ucontext.h>
static void emu_switch(void **save, void *load) {       // a context lies at its stack's top, or on the stack that it saves
    ucontext_t here;
    *save = &here;
    swapcontext(&here, (ucontext_t *)load);
}
static void *first_frame(char *top, void (*entry)()) {
    ucontext_t *c = (ucontext_t *)(((uintptr_t)top - sizeof *c) & ~(uintptr_t)63);
    getcontext(c);
    c->uc_stack.ss_size = 32768;
    c->uc_stack.ss_sp = (char *)c - c->uc_stack.ss_size;
    makecontext(c, entry, 0);
    return c;
}
#endif

struct Fiber {
    void *sp;
    const void *stack;              // its lowest byte and size, for ASan
    size_t size;
    void *fake;
};

enum { STACK_BYTES = ASAN(4 *) 64 << 10 };

static Fiber main_fiber, *switched_from;
static std::vector<Fiber *> &idle_fibers = *new std::vector<Fiber *>;
static size_t fiber_count;

static void arrived_on_stack(void *fake) {
    ASAN(__sanitizer_finish_switch_fiber(fake, &switched_from->stack, &switched_from->size);)
    (void)fake;
}

static void switch_fiber(Fiber *from, Fiber *to) {
    switched_from = from;
    ASAN(__sanitizer_start_switch_fiber(&from->fake, to->stack, to->size);)
    emu_switch(&from->sp, to->sp);
    arrived_on_stack(from->fake);
}

static void fiber_main();

static Fiber *take_fiber() {
    if (idle_fibers.empty()) {
        size_t page = (size_t)sysconf(_SC_PAGESIZE), bytes = STACK_BYTES + page;
        char *stack = (char *)mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (stack == MAP_FAILED || mprotect(stack, page, PROT_NONE)) emu::error("no memory for the stacks of a block's threads");
        Fiber *f = new Fiber;
        f->stack = stack + page;
        f->size = STACK_BYTES;
        f->fake = NULL;
        f->sp = first_frame(stack + bytes - fiber_count++ * 320 % 8192, fiber_main);   // stacks apart in the caches' sets
        return f;
    }
    Fiber *f = idle_fibers.back();
    idle_fibers.pop_back();
    return f;
}

// ---------------------------------------------------------------------------------------------------------------------
// 2. Schedule

struct Copy { void *to; const void *from; int bytes, group; };
struct Thread {
    Fiber *fiber;
    uint3 index;
    std::vector<Copy> copies;       // of cp.async, in order
    int groups;                     // committed
};
// Lanes as bits. A lane is running, ready, parked at a collective, at the block's barrier, or done.
struct Warp {
    unsigned all, ready, started, parked, done;
    void *args[32];
    unsigned masks[32];
    const char *what[32];
};

static Thread threads[1024];
static Warp warps[32];
static int current, greedy;                 // the running thread; the warp that runs on, or -1
static int thread_count, warp_count, arrived, finished;
static int warp_order[32], warp_position[32];
static unsigned ready_warps;                // by position
static int lane_turn, lanes_reversed;
static const std::function<void()> *thread_body;

enum { FORWARD, REVERSE, SEEDED };
static int order_kind;
static unsigned long long order_state;

static unsigned order_random(unsigned n) {
    order_state = order_state * 6364136223846793005ull + 1442695040888963407ull;
    return (unsigned)((order_state >> 33) % n);
}

// The order may be changed between two runs of a stream.
static void read_order() {
    static char last[64];
    const char *text = getenv("CURIA_EMU_ORDER");
    if (!text) text = "forward";
    if (!strcmp(last, text)) return;
    snprintf(last, sizeof last, "%s", text);
    order_kind = !strcmp(text, "forward") ? FORWARD : !strcmp(text, "reverse") ? REVERSE : SEEDED;
    if (order_kind == SEEDED && strspn(text, "0123456789") != strlen(text))
        emu::error("CURIA_EMU_ORDER is %s; expected forward, reverse or a number", text);
    order_state = strtoull(text, NULL, 10) * 2 + 1;
}

static int choose_lane(unsigned ready) {
    if (lanes_reversed) return 31 - __builtin_clz(ready);
    unsigned turned = lane_turn ? ready >> lane_turn | ready << (32 - lane_turn) : ready;
    return (__builtin_ctz(turned) + lane_turn) & 31;
}

// The next thread to run, or -1.
static int take_thread() {
    if (greedy < 0 || !warps[greedy].ready) {
        if (!ready_warps) return -1;
        greedy = warp_order[__builtin_ctz(ready_warps)];
    }
    Warp &w = warps[greedy];
    int lane = choose_lane(w.ready);
    w.ready &= ~(1u << lane);
    if (!w.ready) ready_warps &= ~(1u << warp_position[greedy]);
    return greedy * 32 + lane;
}

static void make_ready(int warp, unsigned lanes) {
    warps[warp].ready |= lanes;
    if (warps[warp].ready) ready_warps |= 1u << warp_position[warp];
}

static void set_current(int t) {
    current = t;
    threadIdx = threads[t].index;
}

// Nobody can run, not all are done.
[[noreturn]] static void stuck() {
    for (int t = 0; t < thread_count; t++) {
        Warp &w = warps[t / 32];
        if (!(w.parked >> t % 32 & 1)) continue;
        set_current(t);
        emu::error("waits in %s(mask %08x) for lanes %08x, which stand elsewhere (%d threads at __syncthreads)", w.what[t % 32],
                   w.masks[t % 32], w.masks[t % 32] & ~w.parked, arrived);
    }
    emu::error("no thread can go on: %d of %d at __syncthreads, %d done", arrived, thread_count, finished);
}

static void leave_to(int t) {
    Fiber *from = threads[current].fiber;
    if (t == current) return;
    Warp &w = warps[t / 32];
    set_current(t);
    if (!(w.started >> t % 32 & 1)) {
        w.started |= 1u << t % 32;
        threads[t].fiber = take_fiber();
    }
    switch_fiber(from, threads[t].fiber);
}

static void wait_for_others() {
    int t = take_thread();
    if (t < 0) stuck();
    leave_to(t);
}

unsigned emu::lane() { return (unsigned)current % 32; }

void emu::barrier() {
    if (++arrived < thread_count) {
        if (arrived + finished == thread_count)
            emu::error("%d threads of the block ended before the __syncthreads that %d reached", finished, arrived);
    } else {
        arrived = 0;
        for (int w = 0; w < warp_count; w++) make_ready(w, warps[w].all);
        greedy = -1;
    }
    wait_for_others();
}

void emu::collective(unsigned mask, const char *what, void *args, void (*complete)(unsigned, void **)) {
    int l = current % 32;
    unsigned bit = 1u << l;
    Warp &w = warps[current / 32];
    if (!(mask & bit)) emu::error("calls %s with mask %08x, which leaves its own lane %d out", what, mask, l);
    if (mask & ~w.all) emu::error("calls %s with mask %08x, but the warp has lanes %08x", what, mask, w.all);
    if (mask & w.done) emu::error("calls %s with mask %08x, but lanes %08x have ended", what, mask, mask & w.done);
    w.args[l] = args;
    w.masks[l] = mask;
    w.what[l] = what;
    if ((mask & ~bit & ~w.parked) == 0) {
        for (unsigned left = mask; left; left &= left - 1) {
            int other = __builtin_ctz(left);
            if (w.masks[other] != mask || w.what[other] != what)
                emu::error("calls %s(mask %08x), lane %d of its warp %s(mask %08x)", what, mask, other, w.what[other],
                           w.masks[other]);
        }
        complete(mask, w.args);
        w.parked &= ~mask;
        if (mask != bit) make_ready(current / 32, mask & ~bit);
        return;
    }
    w.parked |= bit;
    wait_for_others();
}

static void nothing(unsigned, void **) {}
void __syncwarp(unsigned mask) { emu::collective(mask, "__syncwarp", NULL, nothing); }

// A lane that reads one outside of the mask gets NaN.
static void complete_shuffle(unsigned mask, void **args) {
    for (unsigned left = mask; left; left &= left - 1) {
        emu::Shuffle *s = (emu::Shuffle *)args[__builtin_ctz(left)];
        s->result = mask >> (s->source & 31) & 1 ? ((emu::Shuffle *)args[s->source & 31])->value : ~0ull;
    }
}
void emu::shuffle(unsigned mask, const char *what, Shuffle *s) { collective(mask, what, s, complete_shuffle); }

static void complete_vote(unsigned mask, void **args) {
    unsigned ballot = 0;
    for (unsigned left = mask; left; left &= left - 1)
        ballot |= (unsigned)((emu::Vote *)args[__builtin_ctz(left)])->value << __builtin_ctz(left);
    for (unsigned left = mask; left; left &= left - 1) ((emu::Vote *)args[__builtin_ctz(left)])->ballot = ballot;
}
unsigned emu::vote(unsigned mask, const char *what, bool value) {
    Vote v = {value, 0};
    collective(mask, what, &v, complete_vote);
    return v.ballot;
}

static void end_thread() {
    Warp &w = warps[current / 32];
    w.done |= 1u << current % 32;
    finished++;
    threads[current].copies.clear();
    if (arrived && arrived + finished == thread_count)
        emu::error("ends before the __syncthreads that %d threads of the block wait at", arrived);
    for (unsigned left = w.parked; left; left &= left - 1) {
        int l = __builtin_ctz(left);
        if (w.masks[l] >> current % 32 & 1)
            emu::error("ends, but lane %d waits for it in %s(mask %08x)", l, w.what[l], w.masks[l]);
    }
}

// Runs threads, one after the other, as long as they run through: a kernel without barriers needs one fiber.
static void fiber_main() {
    arrived_on_stack(NULL);
    for (;;) {
        (*thread_body)();
        Fiber *self = threads[current].fiber;
        end_thread();
        int t = take_thread();
        if (t < 0 && finished < thread_count) stuck();
        if (t >= 0) set_current(t);
        if (t >= 0 && !(warps[t / 32].started >> t % 32 & 1)) {
            warps[t / 32].started |= 1u << t % 32;
            threads[t].fiber = self;
        } else {
            idle_fibers.push_back(self);
            switch_fiber(self, t < 0 ? &main_fiber : threads[t].fiber);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 3. A block

enum { SHARED_STATIC = 48 << 10, SHARED_MOST = 232448, SHARED_GAP = 64 };       // gaps keep what runs over an array's end
alignas(1024) static char arena[SHARED_MOST + SHARED_STATIC + 128 * SHARED_GAP];
static size_t arena_used = sizeof arena, arena_dynamic, arena_static;
static std::vector<char *> arena_gaps;
unsigned long long emu::block_serial = 1;

static void *arena_place(size_t at, size_t bytes) {
    if (at + bytes + SHARED_GAP > sizeof arena) emu::error("too many __shared__ arrays");
    arena_used = at + bytes + SHARED_GAP;
    arena_gaps.push_back(arena + at + bytes);
    ASAN(__asan_unpoison_memory_region(arena + at, bytes);)
    return arena + at;
}

void *emu::place_shared(size_t bytes, size_t alignment) {
    size_t to = std::max<size_t>(alignment, 16), at = (arena_used + to - 1) / to * to + (alignment < 16 ? alignment : 0);
    arena_static += (bytes + 15) / 16 * 16;
    if (arena_static > SHARED_STATIC) emu::error("more than 48 KiB of static shared memory");
    if (arena_static + arena_dynamic > SHARED_MOST)
        emu::error("%zu bytes of static and %zu of dynamic shared memory; the most is %d", arena_static, arena_dynamic,
                   SHARED_MOST);
    return arena_place(at, bytes);
}

char *emu::dynamic_shared() { return arena; }

static void begin_shared(size_t dynamic) {
    ASAN(__asan_unpoison_memory_region(arena, sizeof arena);)
    memset(arena, 0xff, arena_used);
    ASAN(__asan_poison_memory_region(arena, sizeof arena);)
    emu::block_serial++;
    arena_gaps.clear();
    arena_static = 0;
    arena_dynamic = dynamic;
    arena_place(0, dynamic);
}

static void end_shared() {
    NOT_ASAN(for (char *gap : arena_gaps)
        for (int i = 0; i < SHARED_GAP && gap + i < arena + sizeof arena; i++)
            if ((unsigned char)gap[i] != 0xff)
                emu::error("the block wrote past the end of a shared array (by %d bytes)", i + 1);)
}

// Orders are drawn afresh for each launch.
static void run_kernel(const emu::Shape &s, const char *name, const std::function<void()> &body) {
    kernel_name = name;
    gridDim = s.grid;
    blockDim = s.block;
    thread_body = &body;
    thread_count = (int)(s.block.x * s.block.y * s.block.z);
    warp_count = (thread_count + 31) / 32;
    for (int t = 0; t < thread_count; t++)
        threads[t].index = {t % s.block.x, t / s.block.x % s.block.y, t / s.block.x / s.block.y};
    for (int w = 0; w < warp_count; w++) {
        warps[w].all = w * 32 + 32 <= thread_count ? ~0u : (1u << thread_count % 32) - 1;
        warp_order[w] = order_kind == REVERSE ? warp_count - 1 - w : w;
    }
    if (order_kind == SEEDED) for (int w = warp_count - 1; w > 0; w--) std::swap(warp_order[w], warp_order[order_random(w + 1)]);
    for (int w = 0; w < warp_count; w++) warp_position[warp_order[w]] = w;
    lanes_reversed = order_kind == REVERSE || (order_kind == SEEDED && order_random(2));
    lane_turn = order_kind == SEEDED ? (int)order_random(32) : 0;
    unsigned long long blocks = (unsigned long long)s.grid.x * s.grid.y * s.grid.z, step = 1, first = 0;
    if (order_kind == REVERSE) step = blocks - 1, first = blocks - 1;
    if (order_kind == SEEDED) {
        do step = order_random(1 << 30) % blocks + 1; while (std::gcd(step, blocks) != 1);
        first = order_random(1 << 30) % blocks;
    }
    for (unsigned long long i = 0, b = first; i < blocks; i++, b = (b + step) % blocks) {
        blockIdx = {(unsigned)(b % s.grid.x), (unsigned)(b / s.grid.x % s.grid.y), (unsigned)(b / s.grid.x / s.grid.y)};
        begin_shared(s.shared);
        arrived = finished = 0;
        for (int w = 0; w < warp_count; w++) {
            warps[w].ready = warps[w].started = warps[w].parked = warps[w].done = 0;
            make_ready(w, warps[w].all);
        }
        for (int t = 0; t < thread_count; t++) threads[t].groups = 0;
        greedy = -1;
        int t = take_thread();
        set_current(t);
        warps[t / 32].started |= 1u << t % 32;
        threads[t].fiber = take_fiber();
        switch_fiber(&main_fiber, threads[t].fiber);
        end_shared();
    }
    kernel_name = NULL;
}

// ---------------------------------------------------------------------------------------------------------------------
// 4. PTX

struct MatrixLoad { uint32_t *r; const void *row; };

// PTX ISA, ldmatrix: lane l gets elements 2(l % 4), 2(l % 4) + 1 of row l / 4 of each matrix; transposed: of its column.
static void load_matrices(void **args, int count, bool transposed) {
    for (int i = 0; i < 8 * count; i++)
        if ((uintptr_t)((MatrixLoad *)args[i])->row % 16)
            emu::error("ldmatrix: the row address of lane %d is not a multiple of 16", i);
    uint32_t out[32][4];
    for (int l = 0; l < 32; l++)
        for (int m = 0; m < count; m++) {
            uint16_t pair[2];
            for (int i = 0; i < 2; i++) {
                int row = transposed ? 2 * (l % 4) + i : l / 4, col = transposed ? l / 4 : 2 * (l % 4) + i;
                memcpy(&pair[i], (const char *)((MatrixLoad *)args[8 * m + row])->row + 2 * col, 2);
            }
            memcpy(&out[l][m], pair, 4);
        }
    for (int l = 0; l < 32; l++) memcpy(((MatrixLoad *)args[l])->r, out[l], 4 * count);
}

template <int count, bool transposed> static void ldmatrix(uint32_t *r, const void *row) {
    MatrixLoad load = {r, row};
    emu::collective(~0u, "ldmatrix", &load, [](unsigned, void **args) { load_matrices(args, count, transposed); });
}
void emu_ldmatrix_x4(uint32_t r[4], const void *row) { ldmatrix<4, false>(r, row); }
void emu_ldmatrix_x4_trans(uint32_t r[4], const void *row) { ldmatrix<4, true>(r, row); }
void emu_ldmatrix_x2(uint32_t r[2], const void *row) { ldmatrix<2, false>(r, row); }
void emu_ldmatrix_x2_trans(uint32_t r[2], const void *row) { ldmatrix<2, true>(r, row); }

struct Mma { float *c; const void *a, *b; };

// PTX ISA, mma.m16n8k16: with g = lane / 4 and t = lane % 4, register i of a holds row g + 8 (i % 2), columns 2t + 8 (i / 2)
// and the next; register i of b rows 2t + 8i and the next, column g; c[i] row g + 8 (i / 2), column 2t + i % 2.
template <class T> static void multiply(unsigned, void **args) {
    float a[16][16], b[16][8], c[16][8] = {};
    T pair[2];
    for (int l = 0; l < 32; l++) {
        Mma *m = (Mma *)args[l];
        int g = l / 4, t = l % 4;
        for (int i = 0; i < 4; i++) {
            memcpy((void *)pair, (const T *)m->a + 2 * i, sizeof pair);
            for (int j = 0; j < 2; j++) a[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + j] = pair[j];
        }
        for (int i = 0; i < 2; i++) {
            memcpy((void *)pair, (const T *)m->b + 2 * i, sizeof pair);
            for (int j = 0; j < 2; j++) b[2 * t + 8 * i + j][g] = pair[j];
        }
    }
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 16; k++)
            for (int j = 0; j < 8; j++) c[i][j] += a[i][k] * b[k][j];
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < 4; i++) ((Mma *)args[l])->c[i] += c[l / 4 + 8 * (i / 2)][2 * (l % 4) + i % 2];
}
void emu_mma_m16n8k16_bf16(float c[4], const uint32_t a[4], const uint32_t b[2]) {
    Mma m = {c, a, b};
    emu::collective(~0u, "mma.m16n8k16.bf16", &m, multiply<__nv_bfloat16>);
}
void emu_mma_m16n8k16_f16(float c[4], const uint32_t a[4], const uint32_t b[2]) {
    Mma m = {c, a, b};
    emu::collective(~0u, "mma.m16n8k16.f16", &m, multiply<__half>);
}

void emu_mma_m16n8k16_f32(float c[4], const float2 a[4], const float2 b[2]) {
    Mma m = {c, a, b};
    emu::collective(~0u, "mma.m16n8k16 of floats", &m, multiply<float>);
}

void emu_cp_async_16(void *shared, const void *global, int source_bytes) {
    if (source_bytes < 0 || source_bytes > 16) emu::error("cp.async of %d bytes", source_bytes);
    if ((uintptr_t)shared % 16 || (source_bytes && (uintptr_t)global % 16))
        emu::error("cp.async: an address is not a multiple of 16");
    memset(shared, 0xff, 16);
    threads[current].copies.push_back({shared, global, source_bytes, threads[current].groups});
}
void emu_cp_async_commit() { threads[current].groups++; }
void emu_cp_async_wait(int groups_allowed_pending) {
    Thread &t = threads[current];
    size_t n = 0;
    for (; n < t.copies.size() && t.copies[n].group < t.groups - groups_allowed_pending; n++) {
        Copy &c = t.copies[n];
        if (c.bytes) memcpy(c.to, c.from, (size_t)c.bytes);
        memset((char *)c.to + c.bytes, 0, 16 - (size_t)c.bytes);
    }
    t.copies.erase(t.copies.begin(), t.copies.begin() + (long)n);
}

// ---------------------------------------------------------------------------------------------------------------------
// 5. Memory

static std::recursive_mutex api;
#define LOCK std::lock_guard<std::recursive_mutex> lock(api)

typedef std::map<char *, size_t> Allocations;
static Allocations &device_memory = *new Allocations, &pinned_memory = *new Allocations;
static size_t device_used;
static int exposed;                         // depth of Expose

static unsigned long long setting(const char *name, unsigned long long otherwise) {
    const char *text = getenv(name);
    return text && *text ? strtoull(text, NULL, 10) : otherwise;
}
static size_t memory_limit() { return (size_t)setting("CURIA_EMU_MEMORY", 8ull << 30); }
static int device_count() { return setting("CURIA_EMU_DEVICES", 1) ? 1 : 0; }

// The allocation that holds p, or end().
static Allocations::iterator holder(Allocations &memory, const void *p) {
    auto i = memory.upper_bound((char *)p);
    if (i == memory.begin()) return memory.end();
    --i;
    return (char *)p < i->first + i->second ? i : memory.end();
}
static bool on_device(const void *p) { return holder(device_memory, p) != device_memory.end(); }
static bool range_on_device(const void *p, size_t bytes) {
    auto i = holder(device_memory, p);
    return i != device_memory.end() && (char *)p + bytes <= i->first + i->second;
}

#ifdef __SANITIZE_ADDRESS__
static void protect(char *p, size_t bytes, bool hide) {
    hide ? __asan_poison_memory_region(p, bytes) : __asan_unpoison_memory_region(p, bytes);
}
static char *take_memory(size_t bytes) {
    void *p;
    return posix_memalign(&p, 256, bytes) ? NULL : (char *)p;
}
static void give_memory(char *p, size_t) { free(p); }
static void name_thread(const char *) {
    char place[512];
    if (kernel_name) where(place, sizeof place), fprintf(stderr, "in %s of the emulated GPU\n", place);
}
static void watch() { __asan_set_error_report_callback(name_thread); }
#else
// The last byte, rounded up to 256, lies before a page that cannot be touched.
static size_t page_bytes() { return (size_t)sysconf(_SC_PAGESIZE); }
static size_t mapped_bytes(size_t bytes) { return (bytes + page_bytes() - 1) / page_bytes() * page_bytes(); }
static char *mapping(char *p, size_t bytes) { return p + (bytes + 255) / 256 * 256 - mapped_bytes(bytes); }
static void protect(char *p, size_t bytes, bool hide) {
    mprotect(mapping(p, bytes), mapped_bytes(bytes), hide ? PROT_NONE : PROT_READ | PROT_WRITE);
}
static char *take_memory(size_t bytes) {
    size_t mapped = mapped_bytes(bytes);
    char *p = (char *)mmap(NULL, mapped + page_bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED || mprotect(p + mapped, page_bytes(), PROT_NONE)) return NULL;
    return p + mapped - (bytes + 255) / 256 * 256;
}
static void give_memory(char *p, size_t bytes) { munmap(mapping(p, bytes), mapped_bytes(bytes) + page_bytes()); }
static void segfault(int, siginfo_t *info, void *) {
    char *p = (char *)info->si_addr;
    if (kernel_name) emu::error("reads or writes at %p, where it has no memory", (void *)p);
    auto i = holder(device_memory, p);
    if (i != device_memory.end())
        emu::error("host code touches device memory, byte %zu of an allocation of %zu", (size_t)(p - i->first), i->second);
    signal(SIGSEGV, SIG_DFL);
}
static void watch() {
    static char stack[65536];
    stack_t alternate = {};
    alternate.ss_sp = stack;
    alternate.ss_size = sizeof stack;
    sigaltstack(&alternate, NULL);
    struct sigaction action = {};
    action.sa_sigaction = segfault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, NULL);
    sigaction(SIGBUS, &action, NULL);
}
#endif

// Parts of allocations that belong to nothing.
static Allocations gaps;
void emu_gap(void *p, size_t bytes) { gaps[(char *)p] = bytes; }
void emu_clear_gaps(void *from, size_t bytes) { gaps.erase(gaps.lower_bound((char *)from), gaps.lower_bound((char *)from + bytes)); }

// Device memory can be touched within the life of one of these.
struct Expose {
    Expose() {
        if (exposed++) return;
        for (auto &m : device_memory) protect(m.first, m.second, false);
        ASAN(for (auto &m : gaps) protect(m.first, m.second, true);)
    }
    ~Expose() { if (!--exposed) for (auto &m : device_memory) protect(m.first, m.second, true); }
};

static cudaError_t last_error;
static cudaError_t result(cudaError_t e) {
    if (e != cudaSuccess && e != cudaErrorNotReady) last_error = e;
    return e;
}

cudaError_t cudaMalloc(void **p, size_t bytes) {
    LOCK;
    static int watched;
    if (!watched++) watch();
    if (!device_count()) return result(cudaErrorNoDevice);
    if (!p) return result(cudaErrorInvalidValue);
    *p = NULL;
    if (!bytes) return cudaSuccess;
    char *memory = bytes <= memory_limit() && device_used <= memory_limit() - bytes ? take_memory(bytes) : NULL;
    if (!memory) return result(cudaErrorMemoryAllocation);
    memset(memory, 0xff, bytes);
    device_memory[memory] = bytes;
    device_used += bytes;
    if (!exposed) protect(memory, bytes, true);
    *p = memory;
    return cudaSuccess;
}

cudaError_t cudaFree(void *p) {
    LOCK;
    if (!p) return cudaSuccess;
    auto i = device_memory.find((char *)p);
    if (i == device_memory.end()) return result(cudaErrorInvalidValue);
    cudaDeviceSynchronize();
    protect(i->first, i->second, false);
    emu_clear_gaps(i->first, i->second);
    give_memory(i->first, i->second);
    device_used -= i->second;
    device_memory.erase(i);
    return cudaSuccess;
}

cudaError_t cudaMallocHost(void **p, size_t bytes) {
    LOCK;
    if (!device_count()) return result(cudaErrorNoDevice);
    if (!p) return result(cudaErrorInvalidValue);
    *p = NULL;
    if (!bytes) return cudaSuccess;
    if (posix_memalign(p, 256, bytes)) return result(cudaErrorMemoryAllocation);
    memset(*p, 0xff, bytes);
    pinned_memory[(char *)*p] = bytes;
    return cudaSuccess;
}

cudaError_t cudaFreeHost(void *p) {
    LOCK;
    if (!p) return cudaSuccess;
    if (!pinned_memory.count((char *)p)) return result(cudaErrorInvalidValue);
    cudaDeviceSynchronize();
    pinned_memory.erase((char *)p);
    free(p);
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    LOCK;
    if (!device_count()) return result(cudaErrorNoDevice);
    *total = memory_limit();
    *available = *total - std::min(*total, device_used);
    return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------------------------------
// 6. Streams

typedef CUstream_st Stream;
typedef std::vector<std::pair<Stream *, unsigned long long>> Needs;      // so many operations of a stream
typedef std::map<Stream *, size_t> Clock;                   // operations of a capture that a stream or event comes after
struct Op { std::function<void()> run; Needs needs; };

struct CUgraph_st {
    Stream *origin;
    bool invalid;
    std::vector<std::function<void()>> ops;
    Clock issued;
    std::map<Stream *, Clock> seen;
};
struct CUgraphExec_st { std::vector<std::function<void()>> ops; };
struct CUstream_st {
    bool blocking, dead;
    unsigned long long issued, done;
    std::deque<Op> queue;
    CUgraph_st *capture;
};
struct CUevent_st {
    bool timing, dead;
    Stream *stream;                     // NULL: never recorded
    unsigned long long count;           // done when the stream has done so many
    double time;
    CUgraph_st *capture;
    Clock clock;
};

// References, so that they outlive everything. The first stream is the default stream.
static std::vector<Stream *> &streams = *new std::vector<Stream *>{new Stream{true, false, 0, 0, {}, NULL}};
static std::vector<cudaEvent_t> &events = *new std::vector<cudaEvent_t>;
static int captures;

static Stream *find_stream(cudaStream_t stream) {
    if (!stream) return streams[0];
    for (Stream *s : streams) if (s == stream && !s->dead && s != streams[0]) return s;
    return NULL;
}
static bool valid(cudaEvent_t e) {
    for (cudaEvent_t x : events) if (x == e && !e->dead) return true;
    return false;
}

static void issue(Stream *s, std::function<void()> run, Needs needs = {}) {
    if (s->capture) {
        s->capture->ops.push_back(run);
        s->capture->seen[s][s] = ++s->capture->issued[s];
        return;
    }
    if (s == streams[0]) {
        for (Stream *other : streams) if (other != s && other->blocking) needs.push_back({other, other->issued});
    } else if (s->blocking) needs.push_back({streams[0], streams[0]->issued});
    s->queue.push_back({run, needs});
    s->issued++;
}

static Stream *unmet(Stream *s) {
    for (auto &need : s->queue.front().needs) if (need.first->done < need.second) return need.first;
    return NULL;
}
static Stream *next_for(Stream *s) {
    while (Stream *other = unmet(s)) s = other;
    return s;
}

// Forward: the others run only as far as the target needs; reverse: as far as they can, before it. target NULL: all.
static Stream *choose_stream(Stream *target) {
    std::vector<Stream *> able;
    for (Stream *s : streams) if (!s->queue.empty() && !unmet(s)) able.push_back(s);
    if (able.empty()) return NULL;
    if (order_kind == SEEDED) return able[order_random((unsigned)able.size())];
    if (order_kind == REVERSE && able.back() != target) return able.back();
    if (order_kind == REVERSE && able.size() > 1) return able[able.size() - 2];
    return target && !target->queue.empty() ? next_for(target) : able[0];
}

static void run_one(Stream *s) {
    Op op = std::move(s->queue.front());
    s->queue.pop_front();
    if (op.run) op.run();
    s->done++;
}

// Until the target has done `count` operations; NULL: all of all.
static void run_streams(Stream *target, unsigned long long count) {
    read_order();
    if (target && target->done >= count) return;
    Expose expose;
    while (!target || target->done < count) {
        Stream *s = choose_stream(target);
        if (!s) break;
        run_one(s);
    }
}

// A synchronisation within a capture spoils it.
static cudaError_t synchronize(Stream *s) {
    if (!s) return result(cudaErrorInvalidResourceHandle);
    if (s->capture) {
        s->capture->invalid = true;
        return result(cudaErrorStreamCaptureUnsupported);
    }
    run_streams(s, s->issued);
    return cudaSuccess;
}
static cudaError_t may_issue(Stream *s) {
    if (!device_count()) return cudaErrorNoDevice;
    if (!s) return cudaErrorInvalidResourceHandle;
    if (s == streams[0] && captures) return cudaErrorStreamCaptureImplicit;
    return s->capture && s->capture->invalid ? cudaErrorStreamCaptureInvalidated : cudaSuccess;
}

static std::map<const void *, int> dynamic_limit;           // of kernels that asked for more than 48 KiB

void emu::enqueue(const Shape &s, const char *name, const void *address, std::function<void()> thread) {
    LOCK;
    Stream *stream = find_stream(s.stream);
    cudaError_t error = may_issue(stream);
    unsigned long long block = (unsigned long long)s.block.x * s.block.y * s.block.z;
    int limit = 48 << 10;
    for (auto &f : dynamic_limit) if (!address || f.first == address) limit = std::max(limit, f.second);
    if (error) result(error);
    else if (!block || block > 1024 || s.block.x > 1024 || s.block.y > 1024 || s.block.z > 64 || !s.grid.x || !s.grid.y ||
             !s.grid.z || s.grid.x > 0x7fffffffu || s.grid.y > 65535 || s.grid.z > 65535)
        result(cudaErrorInvalidConfiguration);
    else if (s.shared > (size_t)limit) result(cudaErrorInvalidValue);
    else issue(stream, [=]() { run_kernel(s, name, thread); });
}

// cublas.cc's way in.
cudaError_t emu_issue(cudaStream_t stream, std::function<void()> run) {
    LOCK;
    Stream *s = find_stream(stream);
    cudaError_t error = may_issue(s);
    if (!error) issue(s, run);
    return result(error);
}

static cudaError_t check_copy(const void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
    if (!to || !from) return cudaErrorInvalidValue;
    bool to_device = on_device(to), from_device = on_device(from);
    if (to_device && !range_on_device(to, bytes)) return cudaErrorInvalidValue;
    if (from_device && !range_on_device(from, bytes)) return cudaErrorInvalidValue;
    if (kind < cudaMemcpyHostToHost || kind > cudaMemcpyDefault) return cudaErrorInvalidMemcpyDirection;
    bool want_to = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    bool want_from = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    if (kind != cudaMemcpyDefault && (want_to != to_device || want_from != from_device)) return cudaErrorInvalidValue;
    return cudaSuccess;
}
static bool pageable(const void *p) { return !on_device(p) && holder(pinned_memory, p) == pinned_memory.end(); }

static void issue_copy(Stream *s, void *to, const void *from, size_t bytes) {
    if (pageable(from) && !s->capture) {
        std::vector<char> staged((const char *)from, (const char *)from + bytes);
        issue(s, [=]() { memcpy(to, staged.data(), bytes); });
    } else issue(s, [=]() { memmove(to, from, bytes); });
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
    LOCK;
    Stream *s = find_stream(stream);
    cudaError_t error = may_issue(s);
    if (!error && bytes) error = check_copy(to, from, bytes, kind);
    if (error || !bytes) return result(error);
    issue_copy(s, to, from, bytes);
    return pageable(to) && !s->capture ? synchronize(s) : cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
    LOCK;
    cudaError_t error = may_issue(streams[0]);
    if (!error && bytes) error = check_copy(to, from, bytes, kind);
    if (error || !bytes) return result(error);
    bool both_device = on_device(to) && on_device(from);
    if (!both_device) synchronize(streams[0]);
    issue_copy(streams[0], to, from, bytes);
    return both_device || pageable(from) ? cudaSuccess : synchronize(streams[0]);
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream) {
    LOCK;
    Stream *s = find_stream(stream);
    cudaError_t error = may_issue(s);
    bool pinned = holder(pinned_memory, to) != pinned_memory.end();
    if (!error && bytes && !range_on_device(to, bytes) && !pinned) error = cudaErrorInvalidValue;
    if (error || !bytes) return result(error);
    issue(s, [=]() { memset(to, value, bytes); });
    return cudaSuccess;
}
cudaError_t cudaMemset(void *to, int value, size_t bytes) { return cudaMemsetAsync(to, value, bytes, NULL); }

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
    LOCK;
    if (!device_count()) return result(cudaErrorNoDevice);
    if (!stream || flags > cudaStreamNonBlocking) return result(cudaErrorInvalidValue);
    streams.push_back(*stream = new Stream{flags != cudaStreamNonBlocking, false, 0, 0, {}, NULL});
    return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithFlags(stream, cudaStreamDefault); }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    LOCK;
    return synchronize(find_stream(stream));
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    LOCK;
    Stream *s = find_stream(stream);
    if (!s || s == streams[0]) return result(cudaErrorInvalidResourceHandle);
    cudaError_t error = synchronize(s);
    s->dead = true;                 // kept: events may name it
    return error;
}
cudaError_t cudaDeviceSynchronize(void) {
    LOCK;
    if (!device_count()) return result(cudaErrorNoDevice);
    if (captures) return result(cudaErrorStreamCaptureUnsupported);
    run_streams(NULL, 0);
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    LOCK;
    if (!device_count()) return result(cudaErrorNoDevice);
    if (!event) return result(cudaErrorInvalidValue);
    events.push_back(*event = new CUevent_st{!(flags & cudaEventDisableTiming), false, NULL, 0, 0, NULL, {}});
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, cudaEventDefault); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    LOCK;
    if (!valid(event)) return result(cudaErrorInvalidResourceHandle);
    event->dead = true;
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    LOCK;
    Stream *s = find_stream(stream);
    cudaError_t error = may_issue(s);
    if (error || !valid(event)) return result(error ? error : cudaErrorInvalidResourceHandle);
    event->capture = s->capture;
    if (s->capture) {
        event->clock = s->capture->seen[s];
        return cudaSuccess;
    }
    issue(s, [=]() {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        event->time = 1e3 * (double)t.tv_sec + 1e-6 * (double)t.tv_nsec;
    });
    event->stream = s;
    event->count = s->issued;
    return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    LOCK;
    Stream *s = find_stream(stream);
    if (!s || !valid(event)) return result(cudaErrorInvalidResourceHandle);
    if (event->capture) {           // the stream joins the capture
        s->capture = event->capture;
        for (auto &seen : event->clock) {
            size_t &mine = s->capture->seen[s][seen.first];
            mine = std::max(mine, seen.second);
        }
        return cudaSuccess;
    }
    cudaError_t error = may_issue(s);
    if (error) return result(error);
    if (event->stream && !s->capture) issue(s, nullptr, {{event->stream, event->count}});
    return cudaSuccess;
}
static bool completed(cudaEvent_t e) { return !e->stream || e->stream->done >= e->count; }
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    LOCK;
    if (!valid(event)) return result(cudaErrorInvalidResourceHandle);
    if (event->capture) return result(cudaErrorCapturedEvent);
    if (event->stream) run_streams(event->stream, event->count);
    return cudaSuccess;
}
// Polling gets there: each query runs one operation.
cudaError_t cudaEventQuery(cudaEvent_t event) {
    LOCK;
    if (!valid(event)) return result(cudaErrorInvalidResourceHandle);
    if (event->capture) return result(cudaErrorCapturedEvent);
    if (completed(event)) return cudaSuccess;
    read_order();
    Expose expose;
    run_one(next_for(event->stream));
    return cudaErrorNotReady;
}
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) {
    LOCK;
    if (!valid(from) || !valid(to) || !from->timing || !to->timing || !from->stream || !to->stream)
        return result(cudaErrorInvalidResourceHandle);
    if (!completed(from) || !completed(to)) return cudaErrorNotReady;
    *ms = (float)(to->time - from->time);
    return cudaSuccess;
}

// A graph replays in the order of its recording, as one operation of the stream.
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    LOCK;
    Stream *s = find_stream(stream);
    if (!s) return result(cudaErrorInvalidResourceHandle);
    if (s == streams[0] || s->capture) return result(cudaErrorStreamCaptureUnsupported);
    s->capture = new CUgraph_st{s, false, {}, {}, {}};
    captures++;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    LOCK;
    Stream *s = find_stream(stream);
    if (!s) return result(cudaErrorInvalidResourceHandle);
    if (!s->capture || s->capture->origin != s) return result(cudaErrorStreamCaptureUnmatched);
    CUgraph_st *g = s->capture;
    captures--;
    for (Stream *other : streams) if (other->capture == g) other->capture = NULL;
    cudaError_t error = g->invalid ? cudaErrorStreamCaptureInvalidated : cudaSuccess;
    for (auto &issued : g->issued) if (!error && g->seen[s][issued.first] < issued.second) error = cudaErrorStreamCaptureUnjoined;
    *graph = NULL;
    if (error) delete g;
    else *graph = g;
    return result(error);
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long) {
    if (!exec || !graph) return result(cudaErrorInvalidValue);
    *exec = new CUgraphExec_st{graph->ops};
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
    if (!exec) return result(cudaErrorInvalidValue);
    auto ops = exec->ops;
    return emu_issue(stream, [ops]() { for (auto &op : ops) op(); });
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { delete graph; return cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) { delete exec; return cudaSuccess; }

// ---------------------------------------------------------------------------------------------------------------------
// 7. The rest of the API

cudaError_t cudaGetLastError(void) {
    LOCK;
    cudaError_t e = last_error;
    last_error = cudaSuccess;
    return e;
}
cudaError_t cudaPeekAtLastError(void) { return last_error; }

#define ERRORS \
    E(cudaSuccess, "no error") E(cudaErrorInvalidValue, "invalid argument") E(cudaErrorMemoryAllocation, "out of memory") \
    E(cudaErrorInitializationError, "initialization error") E(cudaErrorInvalidConfiguration, "invalid configuration argument") \
    E(cudaErrorInvalidMemcpyDirection, "invalid copy direction for memcpy") \
    E(cudaErrorInsufficientDriver, "CUDA driver version is insufficient for CUDA runtime version") \
    E(cudaErrorInvalidDeviceFunction, "invalid device function") E(cudaErrorNoDevice, "no CUDA-capable device is detected") \
    E(cudaErrorInvalidDevice, "invalid device ordinal") \
    E(cudaErrorNoKernelImageForDevice, "no kernel image is available for execution on the device") \
    E(cudaErrorInvalidResourceHandle, "invalid resource handle") E(cudaErrorNotReady, "device not ready") \
    E(cudaErrorIllegalAddress, "an illegal memory access was encountered") \
    E(cudaErrorLaunchOutOfResources, "too many resources requested for launch") \
    E(cudaErrorLaunchFailure, "unspecified launch failure") \
    E(cudaErrorNotSupported, "operation not supported") \
    E(cudaErrorStreamCaptureUnsupported, "operation not permitted when stream is capturing") \
    E(cudaErrorStreamCaptureInvalidated, "operation failed due to a previous error during capture") \
    E(cudaErrorStreamCaptureUnmatched, "capture was not initiated in this stream") \
    E(cudaErrorStreamCaptureUnjoined, "capturing stream has unjoined work") \
    E(cudaErrorStreamCaptureImplicit, "operation would make the legacy stream depend on a capturing blocking stream") \
    E(cudaErrorCapturedEvent, "operation not permitted on an event last recorded in a capturing stream")
const char *cudaGetErrorName(cudaError_t error) {
#define E(name, text) if (error == name) return #name;
    ERRORS
#undef E
    return "cudaErrorUnknown";
}
const char *cudaGetErrorString(cudaError_t error) {
#define E(name, text) if (error == name) return text;
    ERRORS
#undef E
    return "unknown error";
}

cudaError_t cudaGetDeviceCount(int *count) {
    *count = device_count();
    return result(*count ? cudaSuccess : cudaErrorNoDevice);
}
static cudaError_t check_device(int device) {
    return result(!device_count() ? cudaErrorNoDevice : device != 0 ? cudaErrorInvalidDevice : cudaSuccess);
}
cudaError_t cudaSetDevice(int device) { return check_device(device); }
cudaError_t cudaGetDevice(int *device) { *device = 0; return check_device(0); }
cudaError_t cudaDriverGetVersion(int *version) { *version = device_count() ? CUDART_VERSION : 0; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int device) {
    if (cudaError_t error = check_device(device)) return error;
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "emulated GPU");
    p->totalGlobalMem = memory_limit();
    p->sharedMemPerBlock = 48 << 10, p->sharedMemPerBlockOptin = SHARED_MOST, p->sharedMemPerMultiprocessor = 233472;
    p->reservedSharedMemPerBlock = 1024;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->warpSize = 32, p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048, p->maxBlocksPerMultiProcessor = 32;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 0x7fffffff, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->major = 9;
    p->multiProcessorCount = (int)setting("CURIA_EMU_SMS", 4);
    p->memoryBusWidth = 5120, p->l2CacheSize = 50 << 20, p->asyncEngineCount = 3;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device) {
    cudaDeviceProp p;
    if (cudaError_t error = cudaGetDeviceProperties(&p, device)) return error;
    switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = (int)p.sharedMemPerBlock; break;
    case cudaDevAttrWarpSize: *value = p.warpSize; break;
    case cudaDevAttrClockRate: *value = 1980000; break;
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrMemoryClockRate: *value = 2619000; break;
    case cudaDevAttrGlobalMemoryBusWidth: *value = p.memoryBusWidth; break;
    case cudaDevAttrL2CacheSize: *value = p.l2CacheSize; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = (int)p.sharedMemPerMultiprocessor; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = (int)p.sharedMemPerBlockOptin; break;
    default: return result(cudaErrorInvalidValue);
    }
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void *kernel, cudaFuncAttribute attribute, int value) {
    LOCK;
    if (!kernel) return result(cudaErrorInvalidDeviceFunction);
    if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || value > SHARED_MOST)
        return result(cudaErrorInvalidValue);
    dynamic_limit[kernel] = value;
    return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *a, const void *kernel) {
    LOCK;
    if (!kernel) return result(cudaErrorInvalidDeviceFunction);
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024, a->numRegs = 32, a->ptxVersion = a->binaryVersion = 90;
    a->maxDynamicSharedSizeBytes = dynamic_limit.count(kernel) ? dynamic_limit[kernel] : 48 << 10;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *kernel, int block, size_t shared) {
    if (!kernel) return result(cudaErrorInvalidDeviceFunction);
    if (block <= 0 || block > 1024) return result(cudaErrorInvalidValue);
    *blocks = std::min({32, 2048 / ((block + 31) / 32 * 32), (int)(233472 / (shared + 1024))});
    return cudaSuccess;
}
