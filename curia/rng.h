/*
Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

  philox          four random words from a key and a counter
  Rng, rng_at     a stream at (seed, purpose; step, sample, crop): any draw of any step can be made again on its own
  rng_uniform     [0,1)        rng_range  [a,b)        rng_below  {0..n-1}        rng_normal  N(0,1)
  rng_subset      the first k of a random permutation of n, ascending

Nothing depends on the number of ranks, threads or workers, nor on resuming: the counter holds the step and the
sample's index in the global batch (DESIGN 2).
*/
#ifndef CURIA_RNG_H
#define CURIA_RNG_H

#include <math.h>
#include <stdint.h>

// What a stream is for. The numbers are part of every run's reproducibility: append, never reorder.
enum {
    RNG_EPOCH = 1, RNG_CROP, RNG_INTENSITY, RNG_MASK, RNG_DROP_PATH, RNG_DIRECTIONS, RNG_INIT, RNG_PHANTOM, RNG_TEST = 10
};

typedef struct { uint32_t word[4]; } Philox;

static inline Philox philox(uint32_t key0, uint32_t key1, Philox c) {
    for (int round = 0; round < 10; round++) {
        uint64_t a = (uint64_t)0xD2511F53u * c.word[0], b = (uint64_t)0xCD9E8D57u * c.word[2];
        c = (Philox){{(uint32_t)(b >> 32) ^ c.word[1] ^ key0, (uint32_t)b,
                      (uint32_t)(a >> 32) ^ c.word[3] ^ key1, (uint32_t)a}};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return c;
}

typedef struct { uint32_t key[2]; Philox counter, block; int left; } Rng;

// A stream of draws. `crop` (below 2^32) may be any small index within the sample: a crop, a block, a tensor.
static inline Rng rng_at(uint64_t seed, int purpose, uint64_t step, uint64_t sample, uint32_t crop) {
    Rng r = {{(uint32_t)seed, (uint32_t)(seed >> 32) ^ (uint32_t)purpose * 0x9E3779B9u},
             {{0, crop, (uint32_t)sample, (uint32_t)step}}, {{0}}, 0};
    return r;
}

static inline uint32_t rng_word(Rng *r) {
    if (r->left == 0) {
        r->block = philox(r->key[0], r->key[1], r->counter);
        r->counter.word[0]++;
        r->left = 4;
    }
    return r->block.word[4 - r->left--];
}

// [0,1) with 53 random bits.
static inline double rng_uniform(Rng *r) {
    uint64_t high = rng_word(r), low = rng_word(r);
    return (double)((high << 32 | low) >> 11) * 0x1p-53;
}

static inline double rng_range(Rng *r, double from, double to) { return from + (to - from) * rng_uniform(r); }

// {0..n-1}; the bias of the multiply is below n / 2^64.
static inline uint64_t rng_below(Rng *r, uint64_t n) {
    uint64_t high = rng_word(r), low = rng_word(r);
    return (uint64_t)((unsigned __int128)(high << 32 | low) * n >> 64);
}

// Standard normal, Box and Muller's cosine half: one draw costs the same words whatever came before.
static inline double rng_normal(Rng *r) {
    double u = 1.0 - rng_uniform(r), v = rng_uniform(r);
    return sqrt(-2.0 * log(u)) * cos(6.283185307179586 * v);
}

// Writes the k smallest-ranked of a random permutation of 0..n-1 to out[k], ascending. scratch: n ints.
static inline void rng_subset(Rng *r, int n, int k, int *out, int *scratch) {
    for (int i = 0; i < n; i++) scratch[i] = 0;
    // Floyd's sampling: each j either takes a fresh uniform index or, if that is taken, itself.
    for (int j = n - k; j < n; j++) {
        int pick = (int)rng_below(r, (uint64_t)j + 1);
        scratch[scratch[pick] ? j : pick] = 1;
    }
    for (int i = 0, m = 0; i < n; i++) if (scratch[i]) out[m++] = i;
}

#endif
