/* Memory rows: latency by pointer chasing, byte loads, copies within and beyond the caches. */
#define _GNU_SOURCE
#include "rows.h"
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { LINE = 64, HOPS = 100 };

/* A ring of pointers through `bytes` of memory, one a cache line, in an order that no prefetcher guesses (Sattolo's shuffle). */
static void **make_ring(size_t bytes) {
    size_t lines = bytes / LINE;
    char *base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) must("mmap", -1);
    uint32_t *order = malloc(lines * sizeof *order);
    if (!order) must("malloc", -1);
    for (size_t i = 0; i < lines; i++) order[i] = (uint32_t)i;
    uint64_t seed = bytes;
    for (size_t i = lines - 1; i > 0; i--) {
        size_t other = next_number(&seed) % i;
        uint32_t kept = order[i];
        order[i] = order[other];
        order[other] = kept;
    }
    for (size_t i = 0; i < lines; i++) *(void **)(base + (size_t)order[i] * LINE) = base + (size_t)order[(i + 1) % lines] * LINE;
    void **start = (void **)(base + (size_t)order[0] * LINE);
    free(order);
    return start;
}

static uint64_t chase(void ***ring, size_t bytes, long operations) {
    if (!*ring) *ring = make_ring(bytes);
    void **start = *ring, **at = start;
    for (long n = 0; n < operations; n++)
        for (int hop = 0; hop < HOPS; hop++) at = *at;
    return (uint64_t)((char *)at - (char *)start); /* a distance: the same wherever the memory lies */
}

static uint64_t run_chase16k(long operations) {
    static void **ring;
    return chase(&ring, 16 << 10, operations);
}
static uint64_t run_chase1m(long operations) {
    static void **ring;
    return chase(&ring, 1 << 20, operations);
}
static uint64_t run_chase64m(long operations) {
    static void **ring;
    return chase(&ring, 64 << 20, operations);
}

static uint64_t run_bytesum(long operations) {
    static volatile uint8_t bytes[65536];
    for (size_t i = 0; i < sizeof bytes; i++) bytes[i] = (uint8_t)(i * 37 + (i >> 8));
    uint64_t sum = 0;
    for (long n = 0; n < operations; n++)
        for (size_t i = 0; i < sizeof bytes; i++) sum += bytes[i];
    return sum;
}

static uint64_t copy(char *to, char *from, size_t bytes, long operations) {
    for (long n = 0; n < operations; n++) {
        from[(size_t)n * 4099 % bytes] = (char)n;
        memcpy(to, from, bytes);
        __asm__ volatile("" : : "r"(to) : "memory");
    }
    uint64_t sum = 0;
    for (size_t at = 0; at < bytes; at += 4099) sum = fold(sum, (uint8_t)to[at]);
    return sum;
}

static uint64_t run_memcpy64k(long operations) {
    static char from[65536], to[65536];
    memset(from, 7, sizeof from);
    return copy(to, from, sizeof from, operations);
}

static uint64_t run_memcpy32m(long operations) {
    enum { BYTES = 32 << 20 };
    static char *from, *to;
    if (!from) {
        from = malloc(BYTES);
        to = malloc(BYTES);
        if (!from || !to) must("malloc", -1);
        memset(to, 1, BYTES);
    }
    memset(from, 9, BYTES);
    return copy(to, from, BYTES, operations);
}

const struct row memory_rows[] = {
    {"chase16k", "100 dependent loads in 16 KiB", run_chase16k, 10, NULL},
    {"chase1m", "100 dependent loads in 1 MiB", run_chase1m, 10, NULL},
    {"chase64m", "100 dependent loads in 64 MiB", run_chase64m, 10, NULL},
    {"bytesum", "64 KiB read byte by byte", run_bytesum, 2, NULL},
    {"memcpy64k", "64 KiB copied", run_memcpy64k, 10, NULL},
    {"memcpy32m", "32 MiB copied", run_memcpy32m, 1, NULL},
    {0},
};
