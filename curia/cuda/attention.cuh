/*
Attention, each sequence and head on its own, head dimension 64 (METHOD A.2, A.6).

  Sequence              where a sequence's queries, keys and values lie
  attention_forward     out = softmax(q k' / 8) v, and the log of each softmax's denominator
  attention_backward    dq, dk, dv; the probabilities are made again from the logs

FlashAttention-2 (Dao 2023) on mma.sync. A warp owns 16 rows: queries in the forward and in dq, keys in dk and dv. The other side
passes in tiles of 64 rows through shared memory, the next one loading meanwhile, and in slices of 16, so 37 = 3 x 16 tokens cost
48. Products of probabilities take them from the registers that they were made in: in the backward of keys the scores are made
transposed for that. dq has its own kernel: scores and dp are made twice, 7 products instead of 5, but no warp waits for
another's ds and no dq goes back and forth to memory, which costs more at these lengths; and nothing is summed in an order
that could change.

16-bit elements in shared memory and in products; sums, softmax and everything about it in fp32.
*/
#ifndef CURIA_CUDA_ATTENTION_H
#define CURIA_CUDA_ATTENTION_H

#include "ptx.cuh"

// Queries are rows [q_row, q_row + q_count) of q, out, lse and their gradients, keys and values rows [kv_row, kv_row + kv_count)
// of k and v. 0 <= q_count, 1 <= kv_count.
typedef struct { int q_row, q_count, kv_row, kv_count; } Sequence;

// Warps in a block at most: more of them share what passes through, until registers or shared memory are short (at 8, the
// backward would spill).
enum { HEAD = 64, TILE = 64, GROUP = 16, SLICES = TILE / GROUP, STEPS = HEAD / 16, ROW_PACKS = HEAD * sizeof(floatX) / 16,
       FORWARD_WARPS = sizeof(floatX) == 2 ? 8 : 4, BACKWARD_WARPS = sizeof(floatX) == 2 ? 6 : 4,
       BLOCKS_PER_SM = sizeof(floatX) == 2 ? 2 : 1 };

static const float LOG2_E = 1.44269504f, LN_2 = 0.69314718f, SOFTMAX_SCALE = 0.125f;

// A tile is rows of 64 elements, where 8 neighbours stand at (column / 8) ^ (row % 8): eight rows of a column then lie in
// different banks.
__device__ static inline floatX *at(floatX *tile, int row, int column) {
    return tile + row * HEAD + ((column / 8 ^ row % 8) * 8 + column % 8);
}

// 16x16 elements as operand a; as two operands b, of rows that are columns of the product; of rows that are summed over.
__device__ static inline void load_a(Pair a[4], floatX *tile, int row, int column) {
    int lane = threadIdx.x % WARP;
    ldmatrix_x4(a, at(tile, row + lane % 16, column + lane / 16 * 8));
}
__device__ static inline void load_b(Pair b[4], floatX *tile, int row, int column) {
    int lane = threadIdx.x % WARP;
    ldmatrix_x4(b, at(tile, row + lane / 16 * 8 + lane % 8, column + lane / 8 % 2 * 8));
}
__device__ static inline void load_b_trans(Pair b[4], floatX *tile, int row, int column) {
    int lane = threadIdx.x % WARP;
    ldmatrix_x4_trans(b, at(tile, row + lane % 16, column + lane / 16 * 8));
}

// Two results c as operand a of the next product.
__device__ static inline void to_operand(Pair a[4], const float c[2][4]) {
    for (int i = 0; i < 4; i++) a[i] = to_pair(c[i / 2][i % 2 * 2], c[i / 2][i % 2 * 2 + 1]);
}

// c[16,16] += a[16,64] tile[row.., 64]'
__device__ static inline void multiply_rows(float c[2][4], const Pair a[STEPS][4], floatX *tile, int row) {
    #pragma unroll
    for (int i = 0; i < STEPS; i++) {
        Pair b[4];
        load_b(b, tile, row, 16 * i);
        mma(c[0], a[i], b);
        mma(c[1], a[i], b + 2);
    }
}

// c[16,64] += a[16,16] tile[row.., 64]
__device__ static inline void multiply_columns(float c[HEAD / 8][4], const Pair a[4], floatX *tile, int row) {
    #pragma unroll
    for (int i = 0; i < HEAD / 16; i++) {
        Pair b[4];
        load_b_trans(b, tile, row, 16 * i);
        mma(c[2 * i], a, b);
        mma(c[2 * i + 1], a, b + 2);
    }
}

// Starts to load `count` rows, and zeros up to a whole group of 16. By the whole block.
__device__ static inline void load_tile(floatX *tile, const floatX *from, int stride, int count) {
    enum { PACK = HEAD / ROW_PACKS };
    for (int i = threadIdx.x; i < (count + GROUP - 1) / GROUP * GROUP * ROW_PACKS; i += blockDim.x) {
        int row = i / ROW_PACKS, column = i % ROW_PACKS * PACK;
        cp_async_16(at(tile, row, column), from + (size_t)row * stride + column, row < count ? 16 : 0);
    }
}

// The next tile of two matrices, rows from `first` of `count`, into stage first / TILE % 2. Past the end: nothing.
__device__ static inline void load_stage(floatX *stages, const floatX *x, int x_stride, const floatX *y, int y_stride, int first,
                                         int count) {
    floatX *tile = stages + first / TILE % 2 * 2 * TILE * HEAD;
    load_tile(tile, x + (size_t)first * x_stride, x_stride, min(count - first, (int)TILE));
    load_tile(tile + TILE * HEAD, y + (size_t)first * y_stride, y_stride, min(count - first, (int)TILE));
    cp_async_commit();
}

// A warp's c[16,64], rows g and g + 8 scaled by low and high, to the first `count` rows of `to`, by way of its rows of a tile.
__device__ static inline void store_rows(floatX *to, int stride, int count, floatX *tile, const float c[HEAD / 8][4], float low,
                                         float high) {
    enum { PACK = HEAD / ROW_PACKS };
    int lane = threadIdx.x % WARP, row = lane / 4, column = lane % 4 * 2;
    for (int i = 0; i < HEAD / 8; i++) {
        *(Pair *)at(tile, row, 8 * i + column) = to_pair(c[i][0] * low, c[i][1] * low);
        *(Pair *)at(tile, row + 8, 8 * i + column) = to_pair(c[i][2] * high, c[i][3] * high);
    }
    __syncwarp();
    for (int i = lane; i < GROUP * ROW_PACKS; i += WARP) {
        row = i / ROW_PACKS, column = i % ROW_PACKS * PACK;
        if (row < count) store_pack(to + (size_t)row * stride + column, load_pack(at(tile, row, column)));
    }
}

// Over the four lanes that hold a row of c.
__device__ static inline float row_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
__device__ static inline float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// Block (sequence, head, tile of queries), the last fastest. 4 T^2 64 operations a head; reads q once, k and v once a block.
static __global__ void __launch_bounds__(FORWARD_WARPS * WARP, BLOCKS_PER_SM)
attention_forward_kernel(floatX *out, int out_stride, float *lse, const floatX *q, int q_stride, const floatX *k, const floatX *v,
                         int kv_stride, const Sequence *sequences, int tiles, int H) {
    extern __shared__ char shared[];
    int rows = blockDim.x / WARP * GROUP, group = threadIdx.x / WARP * GROUP, lane = threadIdx.x % WARP;
    int h = blockIdx.x / tiles % H, first = blockIdx.x % tiles * rows;
    Sequence s = sequences[blockIdx.x / tiles / H];
    int left = s.q_count - first, mine = left - group;      // queries from the block's first, from the warp's first
    if (left <= 0) return;
    floatX *q_tile = (floatX *)shared, *stages = q_tile + rows * HEAD;
    size_t row = s.q_row + first;
    k += (size_t)s.kv_row * kv_stride + h * HEAD;
    v += (size_t)s.kv_row * kv_stride + h * HEAD;
    load_tile(q_tile, q + row * q_stride + h * HEAD, q_stride, min(left, rows));
    load_stage(stages, k, kv_stride, v, kv_stride, 0, s.kv_count);
    cp_async_wait<0>();
    __syncthreads();

    const float scale = SOFTMAX_SCALE * LOG2_E;             // scores in powers of two
    Pair a[STEPS][4];
    for (int i = 0; i < STEPS; i++) load_a(a[i], q_tile, group, 16 * i);
    float o[HEAD / 8][4] = {}, most[2] = {-INFINITY, -INFINITY}, sum[2] = {};      // sum: this lane's columns
    for (int from = 0; from < s.kv_count; from += TILE) {
        load_stage(stages, k, kv_stride, v, kv_stride, from + TILE, s.kv_count);
        floatX *k_tile = stages + from / TILE % 2 * 2 * TILE * HEAD, *v_tile = k_tile + TILE * HEAD;
        int keys = s.kv_count - from;
        if (mine > 0) {
            float p[2 * SLICES][4] = {}, shrink[2];
            #pragma unroll
            for (int i = 0; i < SLICES; i++)
                if (i * GROUP < keys) multiply_rows(p + 2 * i, a, k_tile, i * GROUP);
            if (keys < TILE)
                for (int i = 0; i < 2 * SLICES; i++)
                    for (int j = 0; j < 4; j++)
                        if (8 * i + lane % 4 * 2 + j % 2 >= keys) p[i][j] = -INFINITY;
            for (int half = 0; half < 2; half++) {          // rows g and g + 8
                float top = -INFINITY;
                for (int i = 0; i < 2 * SLICES; i++) top = fmaxf(top, fmaxf(p[i][2 * half], p[i][2 * half + 1]));
                top = fmaxf(most[half], row_max(top) * scale);
                shrink[half] = exp2_fast(most[half] - top);
                most[half] = top;
                sum[half] *= shrink[half];
            }
            for (int i = 0; i < 2 * SLICES; i++)
                for (int j = 0; j < 4; j++) {
                    p[i][j] = exp2_fast(fmaf(p[i][j], scale, -most[j / 2]));
                    sum[j / 2] += p[i][j];
                }
            for (int i = 0; i < HEAD / 8; i++)
                for (int j = 0; j < 4; j++) o[i][j] *= shrink[j / 2];
            #pragma unroll
            for (int i = 0; i < SLICES; i++)
                if (i * GROUP < keys) {
                    Pair operand[4];
                    to_operand(operand, p + 2 * i);
                    multiply_columns(o, operand, v_tile, i * GROUP);
                }
        }
        cp_async_wait<0>();
        __syncthreads();
    }
    if (mine <= 0) return;
    row += group;
    for (int half = 0; half < 2; half++) {
        int r = lane / 4 + 8 * half;
        sum[half] = row_sum(sum[half]);
        if (lane % 4 == 0 && r < mine) lse[(row + r) * H + h] = most[half] * LN_2 + logf(sum[half]);
    }
    store_rows(out + row * out_stride + h * HEAD, out_stride, mine, q_tile + group * HEAD, o, 1 / sum[0], 1 / sum[1]);
}

// Blocks as in the forward. Also leaves delta_i = dout_i . out_i to the kernel below. 6 T^2 64 operations a head.
static __global__ void __launch_bounds__(BACKWARD_WARPS * WARP, BLOCKS_PER_SM)
attention_dq_kernel(floatX *dq, float *delta, const floatX *dout, const floatX *out, int out_stride, const float *lse,
                    const floatX *q, int q_stride, const floatX *k, const floatX *v, int kv_stride, const Sequence *sequences,
                    int tiles, int H) {
    extern __shared__ char shared[];
    int rows = blockDim.x / WARP * GROUP, group = threadIdx.x / WARP * GROUP, lane = threadIdx.x % WARP;
    int h = blockIdx.x / tiles % H, first = blockIdx.x % tiles * rows;
    Sequence s = sequences[blockIdx.x / tiles / H];
    int left = s.q_count - first, mine = left - group;
    if (left <= 0) return;
    floatX *q_tile = (floatX *)shared, *dout_tile = q_tile + rows * HEAD, *stages = dout_tile + rows * HEAD;
    floatX *out_tile = stages + 2 * TILE * HEAD;            // the second stage, before its first use
    size_t row = s.q_row + first;
    k += (size_t)s.kv_row * kv_stride + h * HEAD;
    v += (size_t)s.kv_row * kv_stride + h * HEAD;
    load_tile(q_tile, q + row * q_stride + h * HEAD, q_stride, min(left, rows));
    load_tile(dout_tile, dout + row * out_stride + h * HEAD, out_stride, min(left, rows));
    load_tile(out_tile, out + row * out_stride + h * HEAD, out_stride, min(left, rows));
    load_stage(stages, k, kv_stride, v, kv_stride, 0, s.kv_count);
    cp_async_wait<0>();
    __syncthreads();

    row += group;
    Pair a[STEPS][4], da[STEPS][4];
    float log_sum[2], dot[2] = {};
    for (int i = 0; i < STEPS; i++) {
        Pair b[4];
        load_a(a[i], q_tile, group, 16 * i);
        load_a(da[i], dout_tile, group, 16 * i);
        load_a(b, out_tile, group, 16 * i);
        for (int j = 0; j < 4; j++) {
            float2 x = to_floats(da[i][j]), y = to_floats(b[j]);
            dot[j % 2] += x.x * y.x + x.y * y.y;
        }
    }
    for (int half = 0; half < 2; half++) {
        int r = lane / 4 + 8 * half;
        size_t i = (row + r) * H + h;
        dot[half] = row_sum(dot[half]);
        log_sum[half] = r < mine ? lse[i] * LOG2_E : 0;
        if (lane % 4 == 0 && r < mine) delta[i] = dot[half];
    }
    __syncthreads();                                        // out_tile has been read

    float sum[HEAD / 8][4] = {};
    for (int from = 0; from < s.kv_count; from += TILE) {
        load_stage(stages, k, kv_stride, v, kv_stride, from + TILE, s.kv_count);
        floatX *k_tile = stages + from / TILE % 2 * 2 * TILE * HEAD, *v_tile = k_tile + TILE * HEAD;
        int keys = mine > 0 ? min(s.kv_count - from, (int)TILE) : 0;
        for (int slice = 0; slice < keys; slice += GROUP) {
            float ds[2][4] = {}, dp[2][4] = {};
            multiply_rows(ds, a, k_tile, slice);
            multiply_rows(dp, da, v_tile, slice);
            for (int i = 0; i < 2; i++)
                for (int j = 0; j < 4; j++) {
                    float p = exp2_fast(fmaf(ds[i][j], SOFTMAX_SCALE * LOG2_E, -log_sum[j / 2]));
                    ds[i][j] = slice + 8 * i + lane % 4 * 2 + j % 2 < keys ? p * (dp[i][j] - dot[j / 2]) : 0;
                }
            Pair operand[4];
            to_operand(operand, ds);
            multiply_columns(sum, operand, k_tile, slice);
        }
        cp_async_wait<0>();
        __syncthreads();
    }
    if (mine > 0)
        store_rows(dq + row * q_stride + h * HEAD, q_stride, mine, q_tile + group * HEAD, sum, SOFTMAX_SCALE, SOFTMAX_SCALE);
}

// Block (sequence, head, tile of keys). Scores here are [key, query]. 8 T^2 64 operations a head.
static __global__ void __launch_bounds__(BACKWARD_WARPS * WARP, BLOCKS_PER_SM)
attention_dkdv_kernel(floatX *dk, floatX *dv, const floatX *dout, int out_stride, const float *lse, const float *delta,
                      const floatX *q, int q_stride, const floatX *k, const floatX *v, int kv_stride, const Sequence *sequences,
                      int tiles, int H) {
    extern __shared__ char shared[];
    int rows = blockDim.x / WARP * GROUP, group = threadIdx.x / WARP * GROUP, lane = threadIdx.x % WARP;
    int h = blockIdx.x / tiles % H, first = blockIdx.x % tiles * rows;
    Sequence s = sequences[blockIdx.x / tiles / H];
    int left = s.kv_count - first, mine = left - group;
    if (left <= 0) return;
    floatX *k_tile = (floatX *)shared, *v_tile = k_tile + rows * HEAD, *stages = v_tile + rows * HEAD;
    float2 *stats = (float2 *)(stages + 4 * TILE * HEAD);   // of every query: log of the sum, delta
    size_t row = s.kv_row + first;
    q += (size_t)s.q_row * q_stride + h * HEAD;
    dout += (size_t)s.q_row * out_stride + h * HEAD;
    load_tile(k_tile, k + row * kv_stride + h * HEAD, kv_stride, min(left, rows));
    load_tile(v_tile, v + row * kv_stride + h * HEAD, kv_stride, min(left, rows));
    load_stage(stages, q, q_stride, dout, out_stride, 0, s.q_count);
    for (int i = threadIdx.x; i < (s.q_count + GROUP - 1) / GROUP * GROUP; i += blockDim.x) {
        size_t query = (size_t)(s.q_row + i) * H + h;       // padding: any number, as q and dout are 0 there
        stats[i] = i < s.q_count ? make_float2(lse[query] * LOG2_E, delta[query]) : make_float2(0, 0);
    }
    cp_async_wait<0>();
    __syncthreads();

    Pair a[STEPS][4], da[STEPS][4];
    for (int i = 0; i < STEPS; i++) {
        load_a(a[i], k_tile, group, 16 * i);
        load_a(da[i], v_tile, group, 16 * i);
    }
    float k_sum[HEAD / 8][4] = {}, v_sum[HEAD / 8][4] = {};
    for (int from = 0; from < s.q_count; from += TILE) {
        load_stage(stages, q, q_stride, dout, out_stride, from + TILE, s.q_count);
        floatX *q_tile = stages + from / TILE % 2 * 2 * TILE * HEAD, *dout_tile = q_tile + TILE * HEAD;
        int queries = mine > 0 ? min(s.q_count - from, (int)TILE) : 0;
        for (int slice = 0; slice < queries; slice += GROUP) {
            float p[2][4] = {}, ds[2][4] = {};
            multiply_rows(p, a, q_tile, slice);
            multiply_rows(ds, da, dout_tile, slice);
            for (int i = 0; i < 2; i++) {
                const float2 *stat = stats + from + slice + 8 * i + lane % 4 * 2;
                for (int j = 0; j < 4; j++) {
                    p[i][j] = exp2_fast(fmaf(p[i][j], SOFTMAX_SCALE * LOG2_E, -stat[j % 2].x));
                    ds[i][j] = p[i][j] * (ds[i][j] - stat[j % 2].y);
                }
            }
            Pair operand[4];
            to_operand(operand, p);
            multiply_columns(v_sum, operand, dout_tile, slice);
            to_operand(operand, ds);
            multiply_columns(k_sum, operand, q_tile, slice);
        }
        cp_async_wait<0>();
        __syncthreads();
    }
    if (mine <= 0) return;
    row += group;
    store_rows(dk + row * kv_stride + h * HEAD, kv_stride, mine, k_tile + group * HEAD, k_sum, SOFTMAX_SCALE, SOFTMAX_SCALE);
    store_rows(dv + row * kv_stride + h * HEAD, kv_stride, mine, v_tile + group * HEAD, v_sum, 1, 1);
}

// As few blocks of at most `most` warps as `rows` need, and as few warps as these need. Returns the blocks.
static inline int attention_blocks(int rows, int most, int *warps) {
    int groups = max(divide_up(rows, GROUP), 1), blocks = divide_up(groups, most);
    *warps = divide_up(groups, blocks);
    return blocks;
}

static inline void allow_shared(const void *kernel, size_t bytes) {
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
}

// out[q rows, out_stride], lse[q rows, H] of q[.., q_stride], k and v[.., kv_stride]; head h is columns 64 h.. of each. Strides
// are multiples of 8, pointers of 16 bytes. sequences[count] lie on the device; max_q and max_kv are the greatest counts in it or
// more.
static inline void attention_forward(floatX *out, int out_stride, float *lse, const floatX *q, int q_stride, const floatX *k,
                                     const floatX *v, int kv_stride, const Sequence *sequences, int count, int max_q, int max_kv,
                                     int H, cudaStream_t stream) {
    int warps, tiles = attention_blocks(max_q, FORWARD_WARPS, &warps);
    size_t shared = (warps * GROUP + (max_kv > TILE ? 4 : 2) * TILE) * HEAD * sizeof(floatX);
    allow_shared((const void *)attention_forward_kernel, shared);
    attention_forward_kernel<<<count * H * tiles, warps * WARP, shared, stream>>>(out, out_stride, lse, q, q_stride, k, v,
                                                                                 kv_stride, sequences, tiles, H);
    launched("attention_forward_kernel");
}

// dq has the layout of q, dk and dv that of k and v; all rows of the sequences are written. delta[q rows, H]: scratch.
static inline void attention_backward(floatX *dq, floatX *dk, floatX *dv, const floatX *dout, const floatX *out, int out_stride,
                                      const float *lse, const floatX *q, int q_stride, const floatX *k, const floatX *v,
                                      int kv_stride, float *delta, const Sequence *sequences, int count, int max_q, int max_kv,
                                      int H, cudaStream_t stream) {
    int warps, tiles = attention_blocks(max_q, BACKWARD_WARPS, &warps);
    size_t shared = (2 * warps * GROUP + 4 * TILE) * HEAD * sizeof(floatX);
    allow_shared((const void *)attention_dq_kernel, shared);
    attention_dq_kernel<<<count * H * tiles, warps * WARP, shared, stream>>>(dq, delta, dout, out, out_stride, lse, q, q_stride,
                                                                            k, v, kv_stride, sequences, tiles, H);
    launched("attention_dq_kernel");
    tiles = attention_blocks(max_kv, BACKWARD_WARPS, &warps);
    shared = (2 * warps * GROUP + 4 * TILE) * HEAD * sizeof(floatX) + divide_up(max_q, GROUP) * GROUP * sizeof(float2);
    allow_shared((const void *)attention_dkdv_kernel, shared);
    attention_dkdv_kernel<<<count * H * tiles, warps * WARP, shared, stream>>>(dk, dv, dout, out_stride, lse, delta, q, q_stride,
                                                                              k, v, kv_stride, sequences, tiles, H);
    launched("attention_dkdv_kernel");
}

#endif
