/*
Does the emulator do what CUDA does, and notice what it is there to notice? Prints "N passed, N failed". emu.h says how to build.
*/
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static int passed, failed;
static void check(bool good, const char *what) {
    good ? passed++ : failed++;
    if (!good) printf("FAILED (order %s): %s\n", getenv("CURIA_EMU_ORDER"), what);
}
#define CHECK(x) check(x, #x)
#define OK(call) check((call) == cudaSuccess, #call)

static unsigned random_state = 1;
static float random_float(void) { return (float)((random_state = random_state * 1664525u + 1013904223u) >> 8) / (1 << 23) - 1; }

// Runs f in a child; it must end with status 1 and a line that contains `message`.
static void must_fail(void (*f)(void), const char *message) {
    int out[2], status = 0;
    char text[4096] = "";
    CHECK(pipe(out) == 0);
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        dup2(out[1], 2);
        f();
        _exit(0);
    }
    close(out[1]);
    for (ssize_t n, at = 0; (n = read(out[0], text + at, sizeof text - 1 - at)) > 0;) at += n;
    close(out[0]);
    waitpid(child, &status, 0);
    bool good = WIFEXITED(status) && WEXITSTATUS(status) == 1 && strstr(text, message);
    if (!good) printf("expected: %s\nstatus %d: %s\n", message, status, text);
    check(good, message);
}

// ---- kernels, launches, shared memory

template <class T> __global__ void fill_kernel(T *out, T value, int n) {     // a comment with kernel<<<1, 1>>>(x)
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = value + (T)i;
}

template <int N> static __global__ void shape_kernel(int *out, const char *text) {
    out[((blockIdx.y * gridDim.x + blockIdx.x) * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x] = N + (text == NULL);
}

// out[i] = in[n-1-i] by way of dynamic shared memory; static and dynamic begin as NaN, in every block.
__global__ void reverse_kernel(float *out, const float *in, int *poisoned, int with_barrier) {
    extern __shared__ char shared[];
    __shared__ float part[32][2], more;
    float *row = (float *)shared;
    int t = threadIdx.x, n = blockDim.x;
    int clean = isnan(part[t % 32][t / 32 % 2]) && isnan(more) && isnan(row[t]);
    if (with_barrier) __syncthreads();
    poisoned[blockIdx.x * n + t] = clean;
    row[t] = in[blockIdx.x * n + t];
    if (with_barrier) __syncthreads();
    out[blockIdx.x * n + t] = row[n - 1 - t];
    part[t % 32][t / 32 % 2] = more = 1;
}

static void test_launches(void) {
    enum { N = 256, BLOCKS = 5 };
    float *in, *out, host[N * BLOCKS];
    int *flags, got[N * BLOCKS];
    OK(cudaMalloc(&in, sizeof host));
    OK(cudaMalloc(&out, sizeof host));
    OK(cudaMalloc(&flags, sizeof got));
    CHECK((uintptr_t)in % 256 == 0 && (uintptr_t)out % 256 == 0);
    OK(cudaMemcpy(host, in, sizeof host, cudaMemcpyDeviceToHost));
    CHECK(isnan(host[0]) && isnan(host[N * BLOCKS - 1]));
    fill_kernel<<<(N * BLOCKS + 99) / 100, 100>>>(in, 0.0f, N * BLOCKS);
    OK(cudaGetLastError());
    for (int with_barrier = 0; with_barrier < 2; with_barrier++) {
        reverse_kernel<<<BLOCKS, N, N * sizeof(float), 0>>>(
            out, in, flags,
            with_barrier);
        OK(cudaMemcpy(host, out, sizeof host, cudaMemcpyDeviceToHost));
        int wrong = 0;
        for (int i = 0; i < N * BLOCKS; i++) wrong += host[i] != (float)(i / N * N + N - 1 - i % N);
        CHECK(with_barrier ? wrong == 0 : wrong > 0);
        OK(cudaMemcpy(got, flags, sizeof got, cudaMemcpyDeviceToHost));
        int clean = 0;
        for (int i = 0; i < N * BLOCKS; i++) clean += got[i];
        if (with_barrier) CHECK(clean == N * BLOCKS);
    }
    shape_kernel<7><<<dim3(2, 2), dim3(4, 4)>>>(flags, NULL);
    OK(cudaMemcpy(got, flags, 64 * sizeof(int), cudaMemcpyDeviceToHost));
    int sum = 0;
    for (int i = 0; i < 64; i++) sum += got[i];
    CHECK(sum == 64 * 8);
    fill_kernel<<<1, 1025>>>(in, 0.0f, 1);
    CHECK(cudaPeekAtLastError() == cudaErrorInvalidConfiguration && cudaGetLastError() == cudaErrorInvalidConfiguration);
    fill_kernel<<<0, 32>>>(in, 0.0f, 1);
    CHECK(cudaGetLastError() == cudaErrorInvalidConfiguration && cudaGetLastError() == cudaSuccess);
    OK(cudaFuncSetAttribute(reverse_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 0));
    reverse_kernel<<<1, 32, 60000>>>(out, in, flags, 1);
    CHECK(cudaGetLastError() == cudaErrorInvalidValue);
    OK(cudaFuncSetAttribute(reverse_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 60000));
    reverse_kernel<<<1, 32, 60000>>>(out, in, flags, 1);
    OK(cudaGetLastError());
    CHECK(cudaFuncSetAttribute(reverse_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 232449) == cudaErrorInvalidValue);
    cudaGetLastError();
    void *huge;
    CHECK(cudaMalloc(&huge, (size_t)9 << 30) == cudaErrorMemoryAllocation && cudaGetLastError() == cudaErrorMemoryAllocation);
    OK(cudaFree(in));
    OK(cudaFree(out));
    OK(cudaFree(flags));
}

// ---- warps

__global__ void warp_kernel(int *out) {
    int lane = threadIdx.x % 32, bad = 0, x = (int)threadIdx.x * 3;
    int warp = (int)threadIdx.x / 32 * 32;
    bad |= __shfl_sync(~0u, x, 5) != (warp + 5) * 3;
    bad |= __shfl_sync(~0u, x, lane + 1) != (warp + (lane + 1) % 32) * 3;
    bad |= __shfl_sync(~0u, x, 2, 8) != (warp + lane / 8 * 8 + 2) * 3;
    bad |= __shfl_xor_sync(~0u, x, 16) != (warp + (lane ^ 16)) * 3;
    bad |= __shfl_up_sync(~0u, x, 3) != (warp + (lane >= 3 ? lane - 3 : lane)) * 3;
    bad |= __shfl_down_sync(~0u, x, 1, 16) != (warp + (lane % 16 < 15 ? lane + 1 : lane)) * 3;
    bad |= __shfl_xor_sync(~0u, (double)x, 1) != (double)((warp + (lane ^ 1)) * 3);
    bad |= __ballot_sync(~0u, lane % 3 == 0) != 0x49249249u;
    bad |= __any_sync(~0u, lane == 31) != 1 || __any_sync(~0u, 0) || !__all_sync(~0u, 1) || __all_sync(~0u, lane != 4);
    if (lane < 16) bad |= __shfl_xor_sync(0xffffu, x, 1) != (warp + (lane ^ 1)) * 3 || __ballot_sync(0xffffu, 1) != 0xffffu;
    else bad |= __any_sync(0xffff0000u, lane < 16);
    __syncwarp();
    out[threadIdx.x] = bad;
}

// Without __syncwarp a lane reads what its neighbour has not yet written, in some order of lanes.
__global__ void neighbour_kernel(int *out, int with_barrier) {
    __shared__ int x[32];
    x[threadIdx.x] = threadIdx.x;
    if (with_barrier) __syncwarp();
    out[threadIdx.x] = x[threadIdx.x ^ 1] == (int)(threadIdx.x ^ 1);
}

static void test_warps(void) {
    int *out, host[96], sum = 0;
    OK(cudaMalloc(&out, sizeof host));
    warp_kernel<<<1, 96>>>(out);
    OK(cudaMemcpy(host, out, sizeof host, cudaMemcpyDeviceToHost));
    for (int i = 0; i < 96; i++) sum += host[i];
    CHECK(sum == 0);
    for (int with_barrier = 0; with_barrier < 2; with_barrier++) {
        neighbour_kernel<<<1, 32>>>(out, with_barrier);
        OK(cudaMemcpy(host, out, 32 * sizeof(int), cudaMemcpyDeviceToHost));
        for (int i = sum = 0; i < 32; i++) sum += host[i];
        CHECK(with_barrier ? sum == 32 : sum < 32);
    }
    OK(cudaFree(out));
}

// ---- what must be noticed

__global__ void early_exit_kernel(void) { if (threadIdx.x != 40) __syncthreads(); }
__global__ void mask_kernel(void) { if (threadIdx.x != 3) __syncwarp(); }
__global__ void other_kernel(void) { threadIdx.x < 5 ? (void)__any_sync(~0u, 1) : __syncwarp(); }
__global__ void outside_kernel(void) { __syncwarp(0xfu); }
__global__ void mixed_kernel(void) { threadIdx.x < 5 ? __syncthreads() : __syncwarp(); }
__global__ void overrun_kernel(int n) {
    __shared__ int x[8];
    int *p = x;
    p[n] = 1;
}
__global__ void wild_kernel(int *p) { *p = 1; }
static float *hidden;
static int *spare;

static void test_errors(void) {
    must_fail([] { early_exit_kernel<<<1, 64>>>(); cudaDeviceSynchronize(); }, "__syncthreads");
    must_fail([] { mask_kernel<<<2, 32>>>(); cudaDeviceSynchronize(); }, "thread (");
    must_fail([] { other_kernel<<<1, 32>>>(); cudaDeviceSynchronize(); }, "kernel other_kernel, block (0,0,0)");
    must_fail([] { outside_kernel<<<1, 32>>>(); cudaDeviceSynchronize(); }, "leaves its own lane");
    OK(cudaMalloc(&spare, 256));
    must_fail([] { warp_kernel<<<1, 48>>>(spare); cudaDeviceSynchronize(); }, "the warp has lanes 0000ffff");
    must_fail([] { mixed_kernel<<<1, 32>>>(); cudaDeviceSynchronize(); }, "5 threads at __syncthreads");
#ifdef __SANITIZE_ADDRESS__
    must_fail([] { overrun_kernel<<<1, 1>>>(8); cudaDeviceSynchronize(); }, "in kernel overrun_kernel");
    must_fail([] { cudaMalloc(&hidden, 4); hidden[0] = 1; }, "AddressSanitizer");
#else
    must_fail([] { overrun_kernel<<<1, 1>>>(8); cudaDeviceSynchronize(); }, "past the end of a shared array");
    must_fail([] { wild_kernel<<<1, 1>>>((int *)64); cudaDeviceSynchronize(); }, "kernel wild_kernel");
    must_fail([] { cudaMalloc(&hidden, 4); hidden[0] = 1; }, "host code touches device memory, byte 0");
    must_fail([] { wild_kernel<<<1, 1>>>(spare + 64); cudaDeviceSynchronize(); }, "has no memory");
#endif
    OK(cudaFree(spare));
}

// ---- PTX

// out[0..3]: values of a tile before the wait, after one group, after both; and the zero fill.
__global__ void copy_kernel(float *out, const float *in) {
    __shared__ __align__(16) float tile[3][4];
    emu_cp_async_16(tile[0], in, 16);
    emu_cp_async_commit();
    emu_cp_async_16(tile[1], in + 4, 8);
    emu_cp_async_commit();
    emu_cp_async_16(tile[2], NULL, 0);
    out[0] = tile[0][0];
    emu_cp_async_wait(1);
    out[1] = tile[0][3], out[2] = tile[1][0];
    emu_cp_async_wait(0);
    out[3] = tile[1][1], out[4] = tile[1][2], out[5] = tile[2][0];
    emu_cp_async_commit();
    emu_cp_async_wait(0);
    out[6] = tile[2][0];
}

static void mma(float c[4], const uint32_t a[4], const uint32_t b[2], __nv_bfloat16) { emu_mma_m16n8k16_bf16(c, a, b); }
static void mma(float c[4], const uint32_t a[4], const uint32_t b[2], __half) { emu_mma_m16n8k16_f16(c, a, b); }

// c[16,8] = a[16,16] b[16,8]; fragments by hand as the PTX manual has them, or by ldmatrix. b is kept transposed as well.
template <class T> __global__ void product_kernel(float *c, const T *a, const T *b, int by_ldmatrix) {
    __shared__ __align__(16) T sa[16][16], sb[16][8], sbt[8][16];
    int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    for (int i = lane; i < 256; i += 32) sa[i / 16][i % 16] = a[i];
    for (int i = lane; i < 128; i += 32) sb[i / 8][i % 8] = sbt[i % 8][i / 8] = b[i];
    __syncwarp();
    uint32_t fa[4], fb[2];
    if (by_ldmatrix) {
        emu_ldmatrix_x4(fa, &sa[lane % 16][lane / 16 * 8]);
        if (by_ldmatrix == 1) emu_ldmatrix_x2_trans(fb, &sb[lane % 16][0]);
        else emu_ldmatrix_x2(fb, &sbt[lane % 8][lane / 8 % 2 * 8]);
    } else {
        T pa[8], pb[4];
        for (int i = 0; i < 8; i++) pa[i] = sa[g + i / 2 % 2 * 8][2 * t + i % 2 + i / 4 * 8];
        for (int i = 0; i < 4; i++) pb[i] = sb[2 * t + i % 2 + i / 2 * 8][g];
        memcpy(fa, (void *)pa, sizeof fa);
        memcpy(fb, (void *)pb, sizeof fb);
    }
    float sum[4] = {0, 0, 0, 0};
    mma(sum, fa, fb, T());
    for (int i = 0; i < 4; i++) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

// x4.trans of four 8x8 blocks side by side is each block's transpose.
__global__ void transpose_kernel(unsigned short *out, const unsigned short *in) {
    uint32_t r[4];
    int lane = threadIdx.x;
    emu_ldmatrix_x4_trans(r, in + lane % 8 * 32 + lane / 8 * 8);
    for (int m = 0; m < 4; m++) memcpy(out + lane / 4 * 32 + m * 8 + lane % 4 * 2, &r[m], 4);
}

template <class T> static void test_product(void) {
    T a[256], b[128], *da, *db;
    float c[128], *dc;
    for (T &x : a) x = T(random_float());
    for (T &x : b) x = T(random_float());
    OK(cudaMalloc(&da, sizeof a));
    OK(cudaMalloc(&db, sizeof b));
    OK(cudaMalloc(&dc, sizeof c));
    OK(cudaMemcpy(da, a, sizeof a, cudaMemcpyHostToDevice));
    OK(cudaMemcpy(db, b, sizeof b, cudaMemcpyHostToDevice));
    for (int by_ldmatrix = 0; by_ldmatrix < 3; by_ldmatrix++) {
        product_kernel<<<1, 32>>>(dc, da, db, by_ldmatrix);
        OK(cudaMemcpy(c, dc, sizeof c, cudaMemcpyDeviceToHost));
        double worst = 0;
        for (int i = 0; i < 16; i++)
            for (int j = 0; j < 8; j++) {
                double sum = 0;
                for (int k = 0; k < 16; k++) sum += (double)(float)a[i * 16 + k] * (double)(float)b[k * 8 + j];
                worst = fmax(worst, fabs(sum - c[i * 8 + j]));
            }
        CHECK(worst < 1e-5);
    }
    OK(cudaFree(da));
    OK(cudaFree(db));
    OK(cudaFree(dc));
}

static void test_ptx(void) {
    float in[8] = {1, 2, 3, 4, 5, 6, 7, 8}, got[7], *dev, *out;
    OK(cudaMalloc(&dev, sizeof in));
    OK(cudaMalloc(&out, sizeof got));
    OK(cudaMemcpy(dev, in, sizeof in, cudaMemcpyHostToDevice));
    copy_kernel<<<1, 1>>>(out, dev);
    OK(cudaMemcpy(got, out, sizeof got, cudaMemcpyDeviceToHost));
    CHECK(isnan(got[0]) && got[1] == 4 && isnan(got[2]) && got[3] == 6 && got[4] == 0 && isnan(got[5]) && got[6] == 0);
    OK(cudaFree(dev));
    OK(cudaFree(out));
    test_product<__nv_bfloat16>();
    test_product<__half>();
    unsigned short host[256], turned[256], *from, *to;
    for (int i = 0; i < 256; i++) host[i] = (unsigned short)i;
    OK(cudaMalloc(&from, sizeof host));
    OK(cudaMalloc(&to, sizeof host));
    OK(cudaMemcpy(from, host, sizeof host, cudaMemcpyHostToDevice));
    transpose_kernel<<<1, 32>>>(to, from);
    OK(cudaMemcpy(turned, to, sizeof host, cudaMemcpyDeviceToHost));
    int wrong = 0;
    for (int i = 0; i < 256; i++) wrong += turned[i] != host[i % 8 * 32 + i / 32 + i / 8 % 4 * 8];
    CHECK(wrong == 0);
    OK(cudaFree(from));
    OK(cudaFree(to));
}

// ---- streams, events, graphs

__global__ void add_kernel(int *x, int add) { *x += add; }

// x = 1 on one stream, y = x on another. Needs the event between them, whichever comes first; without it some order is wrong.
static bool copied(cudaStream_t one, cudaStream_t two, int *x, int *y, int *pinned, bool copy_first, bool with_event) {
    cudaEvent_t event;
    OK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    OK(cudaMemsetAsync(x, 0, sizeof(int), one));
    OK(cudaStreamSynchronize(one));
    if (!copy_first) add_kernel<<<1, 1, 0, one>>>(x, 1);
    OK(cudaEventRecord(event, one));
    if (!copy_first && with_event) OK(cudaStreamWaitEvent(two, event, 0));
    OK(cudaMemcpyAsync(y, x, sizeof(int), cudaMemcpyDeviceToDevice, two));
    OK(cudaEventRecord(event, two));
    if (copy_first && with_event) OK(cudaStreamWaitEvent(one, event, 0));
    if (copy_first) add_kernel<<<1, 1, 0, one>>>(x, 1);
    OK(cudaMemcpyAsync(pinned, y, sizeof(int), cudaMemcpyDeviceToHost, two));
    OK(cudaStreamSynchronize(two));
    int got = *pinned;
    OK(cudaStreamSynchronize(one));
    OK(cudaEventDestroy(event));
    return got == !copy_first;
}

static void test_streams(void) {
    cudaStream_t one, two;
    int *x, *y, *pinned, got, value = 5;
    OK(cudaStreamCreateWithFlags(&one, cudaStreamNonBlocking));
    OK(cudaStreamCreateWithFlags(&two, cudaStreamNonBlocking));
    OK(cudaMalloc(&x, sizeof(int)));
    OK(cudaMalloc(&y, sizeof(int)));
    OK(cudaMallocHost(&pinned, sizeof(int)));
    CHECK(*pinned == -1);
    int right = 0;
    for (int i = 0; i < 20; i++)
        for (int copy_first = 0; copy_first < 2; copy_first++) {
            CHECK(copied(one, two, x, y, pinned, copy_first, true));
            CHECK(copied(two, one, x, y, pinned, copy_first, true));
            right += copied(one, two, x, y, pinned, copy_first, false) + copied(two, one, x, y, pinned, copy_first, false);
        }
    CHECK(right < 80);
    // Pinned memory is read when the copy runs, pageable memory at the call.
    *pinned = 5;
    OK(cudaMemcpyAsync(x, pinned, sizeof(int), cudaMemcpyHostToDevice, one));
    OK(cudaMemcpyAsync(y, &value, sizeof(int), cudaMemcpyHostToDevice, one));
    *pinned = value = 6;
    OK(cudaStreamSynchronize(one));
    OK(cudaMemcpy(&got, x, sizeof got, cudaMemcpyDeviceToHost));
    CHECK(got == 6);
    OK(cudaMemcpy(&got, y, sizeof got, cudaMemcpyDeviceToHost));
    CHECK(got == 5);
    CHECK(cudaMemcpy(&got, y, sizeof got, cudaMemcpyHostToDevice) == cudaErrorInvalidValue);
    CHECK(cudaMemcpy(&got, y, 1000, cudaMemcpyDeviceToHost) == cudaErrorInvalidValue);
    cudaGetLastError();
    // Events: polled, timed.
    cudaEvent_t begin, end;
    float ms;
    OK(cudaEventCreateWithFlags(&begin, cudaEventDefault));
    OK(cudaEventCreateWithFlags(&end, cudaEventDefault));
    OK(cudaEventRecord(begin, one));
    add_kernel<<<1, 1, 0, one>>>(x, 1);
    OK(cudaEventRecord(end, one));
    CHECK(cudaEventElapsedTime(&ms, begin, end) == cudaErrorNotReady);
    int polls = 0;
    while (cudaEventQuery(end) == cudaErrorNotReady && polls < 100) polls++;
    CHECK(polls > 0 && polls < 100);
    OK(cudaEventElapsedTime(&ms, begin, end));
    CHECK(ms >= 0 && ms < 1000);
    // A graph with a fork and a join, replayed: x = 2 (x + 1) by y.
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    OK(cudaMemset(x, 0, sizeof(int)));
    OK(cudaDeviceSynchronize());
    OK(cudaStreamBeginCapture(one, cudaStreamCaptureModeGlobal));
    add_kernel<<<1, 1, 0, one>>>(x, 1);
    OK(cudaEventRecord(begin, one));
    OK(cudaStreamWaitEvent(two, begin, 0));
    add_kernel<<<1, 1, 0, two>>>(x, 10);
    OK(cudaEventRecord(end, two));
    OK(cudaStreamWaitEvent(one, end, 0));
    OK(cudaStreamEndCapture(one, &graph));
    OK(cudaGraphInstantiate(&exec, graph, 0));
    OK(cudaGraphDestroy(graph));
    for (int i = 0; i < 3; i++) OK(cudaGraphLaunch(exec, one));
    OK(cudaStreamSynchronize(one));
    OK(cudaMemcpy(&got, x, sizeof got, cudaMemcpyDeviceToHost));
    CHECK(got == 33);
    OK(cudaGraphExecDestroy(exec));
    OK(cudaStreamBeginCapture(one, cudaStreamCaptureModeGlobal));
    OK(cudaEventRecord(begin, one));
    OK(cudaStreamWaitEvent(two, begin, 0));
    add_kernel<<<1, 1, 0, two>>>(x, 10);
    CHECK(cudaStreamEndCapture(one, &graph) == cudaErrorStreamCaptureUnjoined);
    OK(cudaStreamBeginCapture(one, cudaStreamCaptureModeGlobal));
    CHECK(cudaStreamSynchronize(one) == cudaErrorStreamCaptureUnsupported);
    CHECK(cudaStreamEndCapture(one, &graph) == cudaErrorStreamCaptureInvalidated);
    cudaGetLastError();
    OK(cudaEventDestroy(begin));
    OK(cudaEventDestroy(end));
    OK(cudaStreamDestroy(one));
    OK(cudaStreamDestroy(two));
    CHECK(cudaStreamSynchronize(one) == cudaErrorInvalidResourceHandle);
    cudaGetLastError();
    OK(cudaFree(x));
    OK(cudaFree(y));
    OK(cudaFreeHost(pinned));
}

// ---- numbers

static float bits_to_float(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }

// Every 16-bit value survives the way to float and back; halfway between neighbours goes to the even one, a hair beside it to
// the nearer.
static void test_numbers(void) {
    int bad[6] = {0};
    for (unsigned i = 0; i < 65536; i++) {
        __nv_bfloat16 b = __ushort_as_bfloat16((unsigned short)i);
        __half h = __ushort_as_half((unsigned short)i);
        float x = __bfloat162float(b), y = __half2float(h);
        unsigned exponent = i >> 10 & 31, mantissa = i & 1023;
        float expected = ldexpf((float)(exponent ? mantissa + 1024 : mantissa), (int)(exponent ? exponent : 1) - 25);
        if (i >> 15) expected = -expected;
        if (isnan(x)) bad[0] += __bfloat16_as_ushort(__float2bfloat16(x)) != 0x7fff;
        else bad[0] += __bfloat16_as_ushort(__float2bfloat16(x)) != i;
        if (exponent == 31) bad[1] += mantissa ? !isnan(y) : !isinf(y) || (y < 0) != (i >> 15);
        else bad[1] += y != expected || signbit(y) != (int)(i >> 15 != 0);
        if (isnan(y)) bad[2] += __half_as_ushort(__float2half(y)) != 0x7fff;
        else bad[2] += __half_as_ushort(__float2half(y)) != i;
        if ((i & 0x7f80) != 0x7f80) {
            float tie = bits_to_float(i << 16 | 0x8000);
            bad[3] += __bfloat16_as_ushort(__float2bfloat16(tie)) != ((i + 1) & ~1u);
            bad[3] += __bfloat16_as_ushort(__float2bfloat16(bits_to_float(i << 16 | 0x7fff))) != i;
            bad[3] += __bfloat16_as_ushort(__float2bfloat16(bits_to_float(i << 16 | 0x8001))) != i + 1;
        }
        if (exponent != 31 && (i & 0x7fff) != 0x7bff) {
            float tie = (y + __half2float(__ushort_as_half((unsigned short)(i + 1)))) / 2;
            bad[4] += __half_as_ushort(__float2half(tie)) != ((i + 1) & ~1u);
            bad[4] += __half_as_ushort(__float2half(nextafterf(tie, 0))) != i;
            bad[4] += __half_as_ushort(__float2half(nextafterf(tie, tie < 0 ? -1e9f : 1e9f))) != i + 1;
        }
    }
    bad[5] += __half_as_ushort(__float2half(65519.996f)) != 0x7bff || __half_as_ushort(__float2half(65520.0f)) != 0x7c00 ||
              __half_as_ushort(__float2half(-1e30f)) != 0xfc00 || __half_as_ushort(__float2half(1e-30f)) != 0 ||
              __bfloat16_as_ushort(__float2bfloat16(3.4028235e38f)) != 0x7f80 || __half_as_ushort(__float2half(-0.0f)) != 0x8000;
    for (int i = 0; i < 6; i++) CHECK(bad[i] == 0);
    float2 pair = __bfloat1622float2(__floats2bfloat162_rn(1.5f, -2.0f));
    CHECK(pair.x == 1.5f && pair.y == -2.0f && __low2float(__floats2half2_rn(0.25f, 4)) == 0.25f);
}

// ---- cuBLASLt

static cudaDataType_t type_of(float) { return CUDA_R_32F; }
static cudaDataType_t type_of(__nv_bfloat16) { return CUDA_R_16BF; }
static cudaDataType_t type_of(__half) { return CUDA_R_16F; }

// D[m,n] = alpha op(A) op(B) + beta D (+ an epilogue) of two batches, with padded leading dimensions, against plain loops.
template <class T, class U>
static void test_matmul(int m, int n, int k, int ta, int tb, float beta, cublasLtEpilogue_t epilogue, bool good) {
    enum { MOST = 4096 };
    static T a[MOST], b[MOST];
    static U d[MOST], d_got[MOST], bias[128], bias_got[128];
    T *da, *db;
    U *dd, *dbias;
    int lda = (ta ? k : m) + 3, ldb = (tb ? n : k) + 2, ldd = m + 1;
    int64_t stride_a = lda * (ta ? m : k) + 5, stride_b = ldb * (tb ? k : n), stride_d = ldd * n, bias_stride = 40;
    for (T &x : a) x = T(random_float());
    for (T &x : b) x = T(random_float());
    for (U &x : d) x = U(random_float());
    for (U &x : bias) x = U(random_float());
    OK(cudaMalloc(&da, sizeof a));
    OK(cudaMalloc(&db, sizeof b));
    OK(cudaMalloc(&dd, sizeof d));
    OK(cudaMalloc(&dbias, sizeof bias));
    OK(cudaMemcpy(da, a, sizeof a, cudaMemcpyHostToDevice));
    OK(cudaMemcpy(db, b, sizeof b, cudaMemcpyHostToDevice));
    OK(cudaMemcpy(dd, d, sizeof d, cudaMemcpyHostToDevice));
    OK(cudaMemcpy(dbias, bias, sizeof bias, cudaMemcpyHostToDevice));
    cublasLtHandle_t handle;
    cublasLtMatmulDesc_t product;
    cublasLtMatrixLayout_t la, lb, ld;
    cublasLtMatmulPreference_t preference;
    cublasLtMatmulHeuristicResult_t results[4];
    cublasOperation_t op_a = ta ? CUBLAS_OP_T : CUBLAS_OP_N, op_b = tb ? CUBLAS_OP_T : CUBLAS_OP_N;
    int32_t batch = 2;
    uint32_t alignment = sizeof(T);
    int found = -1;
    CHECK(!cublasLtCreate(&handle));
    CHECK(!cublasLtMatmulDescCreate(&product, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    CHECK(!cublasLtMatmulDescSetAttribute(product, CUBLASLT_MATMUL_DESC_TRANSA, &op_a, sizeof op_a));
    CHECK(!cublasLtMatmulDescSetAttribute(product, CUBLASLT_MATMUL_DESC_TRANSB, &op_b, sizeof op_b));
    CHECK(!cublasLtMatmulDescSetAttribute(product, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue));
    CHECK(!cublasLtMatmulDescSetAttribute(product, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &dbias, sizeof dbias));
    CHECK(!cublasLtMatmulDescSetAttribute(product, CUBLASLT_MATMUL_DESC_BIAS_BATCH_STRIDE, &bias_stride, sizeof bias_stride));
    CHECK(!cublasLtMatrixLayoutCreate(&la, type_of(T()), ta ? k : m, ta ? m : k, lda));
    CHECK(!cublasLtMatrixLayoutCreate(&lb, type_of(T()), tb ? n : k, tb ? k : n, ldb));
    CHECK(!cublasLtMatrixLayoutCreate(&ld, type_of(U()), m, n, ldd));
    cublasLtMatrixLayout_t layouts[] = {la, lb, ld};
    int64_t strides[] = {stride_a, stride_b, stride_d};
    for (int i = 0; i < 3; i++) {
        CHECK(!cublasLtMatrixLayoutSetAttribute(layouts[i], CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &batch, sizeof batch));
        CHECK(!cublasLtMatrixLayoutSetAttribute(layouts[i], CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &strides[i], 8));
    }
    CHECK(!cublasLtMatmulPreferenceCreate(&preference));
    for (int i = CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES; i <= CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES; i++)
        cublasLtMatmulPreferenceSetAttribute(preference, (cublasLtMatmulPreferenceAttributes_t)i, &alignment, sizeof alignment);
    if (sizeof(U) > sizeof(T)) for (int i = 7; i <= 8; i++) {
        uint32_t four = 4;
        cublasLtMatmulPreferenceSetAttribute(preference, (cublasLtMatmulPreferenceAttributes_t)i, &four, sizeof four);
    }
    cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(handle, product, la, lb, ld, ld, preference, 4, results, &found);
    CHECK(good ? !status && found >= 2 : status && found == 0);
    float alpha = 0.5f;
    const cublasLtMatmulAlgo_t *algorithm = good ? &results[1].algo : NULL;
    status = cublasLtMatmul(handle, product, &alpha, da, la, db, lb, &beta, dd, ld, dd, ld, algorithm, NULL, 0, 0);
    CHECK(good ? !status : status == CUBLAS_STATUS_NOT_SUPPORTED);
    OK(cudaMemcpy(d_got, dd, sizeof d, cudaMemcpyDeviceToHost));
    OK(cudaMemcpy(bias_got, dbias, sizeof bias, cudaMemcpyDeviceToHost));
    double worst = 0, round = sizeof(U) == 4 ? 1e-5 : 0.01;
    for (int p = 0; p < batch && good; p++) {
        for (int j = 0; j < n; j++)
            for (int i = 0; i < m; i++) {
                double sum = 0;
                for (int l = 0; l < k; l++) {
                    T x = a[p * stride_a + (ta ? i * lda + l : l * lda + i)];
                    T y = b[p * stride_b + (tb ? l * ldb + j : j * ldb + l)];
                    sum += (double)(float)x * (double)(float)y;
                }
                sum = alpha * sum + beta * (double)(float)d[p * stride_d + j * ldd + i];
                if (epilogue == CUBLASLT_EPILOGUE_BIAS) sum += (double)(float)bias[p * bias_stride + i];
                worst = fmax(worst, fabs(sum - (double)(float)d_got[p * stride_d + j * ldd + i]) / (1 + fabs(sum)));
            }
        if (epilogue == CUBLASLT_EPILOGUE_BGRADA)
            for (int i = 0; i < m; i++) {
                double sum = 0;
                for (int l = 0; l < k; l++) sum += (double)(float)a[p * stride_a + (ta ? i * lda + l : l * lda + i)];
                worst = fmax(worst, fabs(sum - (double)(float)bias_got[p * bias_stride + i]) / (1 + fabs(sum)));
            }
        if (epilogue == CUBLASLT_EPILOGUE_BGRADB)
            for (int j = 0; j < n; j++) {
                double sum = 0;
                for (int l = 0; l < k; l++) sum += (double)(float)b[p * stride_b + (tb ? l * ldb + j : j * ldb + l)];
                worst = fmax(worst, fabs(sum - (double)(float)bias_got[p * bias_stride + j]) / (1 + fabs(sum)));
            }
    }
    CHECK(worst < round);
    CHECK((float)d_got[m] == (float)d[m]);         // between columns nothing is written
    cublasLtMatmulPreferenceDestroy(preference);
    for (cublasLtMatrixLayout_t l : layouts) cublasLtMatrixLayoutDestroy(l);
    cublasLtMatmulDescDestroy(product);
    cublasLtDestroy(handle);
    OK(cudaFree(da));
    OK(cudaFree(db));
    OK(cudaFree(dd));
    OK(cudaFree(dbias));
}

static void test_cublas(void) {
    for (int transposes = 0; transposes < 4; transposes++) {
        int ta = transposes & 1, tb = transposes >> 1;
        test_matmul<float, float>(17, 23, 31, ta, tb, 0, CUBLASLT_EPILOGUE_DEFAULT, true);
        test_matmul<float, float>(17, 23, 31, ta, tb, 1, CUBLASLT_EPILOGUE_BGRADB, true);
        test_matmul<__nv_bfloat16, __nv_bfloat16>(8, 33, 5, ta, tb, 0, CUBLASLT_EPILOGUE_BIAS, true);
        test_matmul<__nv_bfloat16, float>(13, 7, 40, ta, tb, 0.5f, CUBLASLT_EPILOGUE_BGRADA, true);
        test_matmul<__half, __half>(1, 9, 3, ta, tb, 2, CUBLASLT_EPILOGUE_DEFAULT, true);
        test_matmul<__half, float>(20, 1, 64, ta, tb, 0, CUBLASLT_EPILOGUE_BIAS, true);
    }
    test_matmul<__nv_bfloat16, __half>(8, 8, 8, 0, 0, 0, CUBLASLT_EPILOGUE_DEFAULT, false);
    test_matmul<float, __nv_bfloat16>(8, 8, 8, 0, 0, 0, CUBLASLT_EPILOGUE_DEFAULT, false);
}

// ---- device, cost

static void test_device(void) {
    int count;
    cudaDeviceProp p;
    size_t available, total;
    OK(cudaGetDeviceCount(&count));
    OK(cudaGetDeviceProperties(&p, 0));
    OK(cudaMemGetInfo(&available, &total));
    CHECK(count == 1 && p.major == 9 && p.sharedMemPerBlockOptin == 232448 && !strcmp(p.name, "emulated GPU"));
    CHECK(total == p.totalGlobalMem && available == total);
    CHECK(cudaSetDevice(1) == cudaErrorInvalidDevice && !strcmp(cudaGetErrorName(cudaErrorNoDevice), "cudaErrorNoDevice"));
    setenv("CURIA_EMU_DEVICES", "0", 1);
    CHECK(cudaGetDeviceCount(&count) == cudaErrorNoDevice && count == 0);
    unsetenv("CURIA_EMU_DEVICES");
    cudaGetLastError();
}

__global__ void barrier_kernel(int n) { for (int i = 0; i < n; i++) __syncthreads(); }
__global__ void shuffle_kernel(float *out, int n) {
    float x = 1;
    for (int i = 0; i < n; i++) x += __shfl_xor_sync(~0u, x, 1);
    *out = x;
}

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void show_cost(void) {
    float *out;
    OK(cudaMalloc(&out, 4));
    for (int threads = 64; threads <= 1024; threads *= 4) {
        double start = seconds();
        barrier_kernel<<<4, threads>>>(1000);
        OK(cudaDeviceSynchronize());
        double middle = seconds();
        shuffle_kernel<<<4, threads>>>(out, 1000);
        OK(cudaDeviceSynchronize());
        printf("blocks of %4d: %.0f ns a thread and __syncthreads, %.0f ns a thread and shuffle\n", threads,
               (middle - start) / 4e-6 / threads, (seconds() - middle) / 4e-6 / threads);
    }
    OK(cudaFree(out));
}

int main(void) {
    const char *orders[] = {"forward", "reverse", "1", "2", "3"};
    for (const char *order : orders) {
        setenv("CURIA_EMU_ORDER", order, 1);
        test_launches();
        test_warps();
        test_errors();
        test_ptx();
        test_streams();
    }
    test_numbers();
    test_cublas();
    test_device();
    show_cost();
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
