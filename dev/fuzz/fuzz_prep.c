/*
Damaged scans into ./prep/prep: whatever they are, it must end by itself with status 0 or 3, and every shard it leaves must
verify. A decoder that crashes may cost the one file it was at; the program never.

  build/fuzz_prep PREP DATA SECONDS [SEED]      files of DATA are the seeds; prints "N passed, N failed"

Each round damages 48 files (flipped, zeroed or repeated bytes, cuts, runs of 0xff, numbers of a header replaced by extreme
ones), packs them all with everything kept, and looks at what came out. A round that fails leaves its inputs, and says where.
*/
#define _GNU_SOURCE
#include <ftw.h>
#include <sys/wait.h>

#include "dataloader.h"
#include "curia/file.h"

enum { FILES = 48, MOST_SEEDS = 4096, MOST_BYTES = 1 << 20 };

static char *seeds[MOST_SEEDS];
static int n_seeds;

static int seed_found(const char *path, const struct stat *st, int type, struct FTW *walk) {
    (void)walk;
    if (type == FTW_F && st->st_size < MOST_BYTES && n_seeds < MOST_SEEDS) seeds[n_seeds++] = strdup(path);
    return 0;
}

static int by_name(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

static uint64_t number(uint64_t seed, uint64_t round, int file, int draw) {
    Rng r = rng_at(seed, RNG_TEST, round, (uint64_t)file, (uint32_t)draw);
    uint64_t high = rng_word(&r);
    return high << 32 | rng_word(&r);
}

// A damaged copy of a seed, at `path`. Headers lie in the first kilobytes: half of the damage is done there.
static void damage(const char *from, const char *path, uint64_t seed, uint64_t round, int file) {
    size_t bytes;
    uint8_t *data = (uint8_t *)file_read(from, &bytes);
    int draw = 0, changes = 1 + (int)(number(seed, round, file, draw++) % 12);
    for (int i = 0; i < changes && bytes > 8; i++) {
        uint64_t what = number(seed, round, file, draw++), where = number(seed, round, file, draw++);
        size_t at = where % (what & 1 && bytes > 4096 ? 4096 : bytes), run = 1 + (where >> 20) % 16;
        if (at + run > bytes) run = bytes - at;
        switch (what >> 1 & 7) {
            case 0: data[at] ^= (uint8_t)(1 << (what >> 8 & 7)); break;
            case 1: data[at] = (uint8_t)(what >> 8); break;
            case 2: memset(data + at, 0, run); break;
            case 3: memset(data + at, 0xff, run); break;
            case 4: memmove(data + at, data + where % (bytes - run + 1), run); break;
            case 5: if (i == 0) bytes = at + 1; break;
            case 6: data[at] = (uint8_t)(what & 0x100 ? 0x7f : 0x80); break;
            default: for (size_t k = 0; k < run; k++) data[at + k] = (uint8_t)(number(seed, round, file, draw++)); break;
        }
    }
    FILE *f = file_create(path);
    file_write(f, path, data, bytes);
    if (fclose(f)) fail(STATUS_FAILED, "%s: %s", path, strerror(errno));
    free(data);
}

// Runs prep; its exit status, or -1 where it was killed or took more than five minutes.
static int run(const char *prep, const char *in, const char *out, const char *err) {
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        alarm(300);
        if (!freopen(err, "w", stderr) || !freopen("/dev/null", "w", stdout)) _exit(99);
        execl(prep, prep, "-o", out, "--keep", "all", "--planes", "all", "--4d", "all", "--track", "3d", "--max-failed", "100",
              "--time-limit", "30", "--memory-limit", "2048", "--jobs", "2", in, (char *)NULL);
        _exit(98);
    }
    int status;
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static int count_lines(const char *path, const char *text) {
    size_t bytes;
    char *all = file_read(path, &bytes);
    int n = 0;
    for (char *at = all; (at = strstr(at, text)); at++) n++;
    free(all);
    return n;
}

int main(int argc, char **argv) {
    if (argc < 4) fail(STATUS_USAGE, "usage: build/fuzz_prep PREP DATA SECONDS [SEED]");
    double end = seconds_now() + atof(argv[3]);
    uint64_t seed = argc > 4 ? strtoull(argv[4], NULL, 10) : (uint64_t)time(NULL);
    char work[] = "/tmp/fuzz-prep-aaaaaaaa", in[PATH_SIZE], out[PATH_SIZE], err[PATH_SIZE], path[PATH_SIZE], reason[256];
    int passed = 0, failed = 0, crashed = 0, taken = 0, left = 0;
    if (nftw(argv[2], seed_found, 16, FTW_PHYS) || n_seeds == 0) fail(STATUS_DATA, "%s holds no files", argv[2]);
    qsort(seeds, n_seeds, sizeof *seeds, by_name);
    snprintf(work + sizeof work - 9, 9, "%08x", (unsigned)(seed ^ (uint64_t)getpid() << 8));
    file_make_dirs(work);
    path_join(in, work, "in"), path_join(out, work, "out"), path_join(err, work, "err");
    for (uint64_t round = 0; seconds_now() < end || round == 0; round++) {
        int bad = 0;
        file_remove_tree(in);
        file_remove_tree(out);
        file_make_dirs(in);
        for (int i = 0; i < FILES; i++) {
            const char *from = seeds[number(seed, round, i, 1000000) % n_seeds], *name = strrchr(from, '/') + 1;
            snprintf(path, sizeof path, "%.2000s/%02d-%.1000s", in, i, name);
            damage(from, path, seed, round, i);
        }
        int status = run(argv[1], in, out, err);
        bad |= status != 0 && status != 3;
        for (int k = 0; snprintf(path, sizeof path, "%.2000s/shard-%06d.shard", out, k), file_exists(path); k++)
            bad |= shard_check(path, reason, sizeof reason) != 0;
        path_join(path, out, "summary.json");
        bad |= !file_exists(path);
        crashed += count_lines(err, "warning: ");
        taken += count_lines(err, "taken  ");
        left += count_lines(err, "left out  ");
        passed += !bad;
        failed += bad;
        if (!bad) continue;
        printf("failed: seed %llu round %llu: status %d; inputs in %s-%llu\n", (unsigned long long)seed, (unsigned long long)round,
               status, in, (unsigned long long)round);
        snprintf(path, sizeof path, "%.2000s-%llu", in, (unsigned long long)round);
        file_rename(in, path);
    }
    fprintf(stderr, "seed %llu: %d volumes taken, %d left out, %d files whose decoder crashed, hung or ran out of memory\n",
            (unsigned long long)seed, taken, left, crashed);
    if (!failed) file_remove_tree(work);
    printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
}
