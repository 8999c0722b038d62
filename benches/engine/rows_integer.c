/* Integer rows: straight loops, branches, calls, indirect calls, a hash. */
#include "rows.h"
#include <string.h>

static uint64_t run_intloop(long operations) {
    uint64_t a = 0x0123456789abcdefull, b = 0xfedcba9876543210ull;
    for (long n = 0; n < operations; n++)
        for (unsigned i = 0; i < 1000; i++) {
            a = a * 0xd1342543de82ef95ull + b;
            b = (b ^ (a >> 31)) + i;
        }
    return fold(a, b);
}

/* coremix: a list is sorted, a small matrix multiplied, a text scanned by a state machine, and all of it summed bit by bit. */

enum { LIST_LENGTH = 64, MATRIX_SIDE = 12 };

struct item {
    struct item *next;
    int32_t key;
};

static struct item *merge(struct item *left, struct item *right) {
    struct item *head = NULL, **tail = &head;
    while (left && right) {
        struct item **smaller = left->key <= right->key ? &left : &right;
        *tail = *smaller;
        tail = &(*smaller)->next;
        *smaller = (*smaller)->next;
    }
    *tail = left ? left : right;
    return head;
}

/* Merge sort from below: runs of 1, 2, 4, ... are kept in bins. */
static struct item *sort_list(struct item *list) {
    struct item *bins[8] = {0};
    while (list) {
        struct item *run = list;
        list = list->next;
        run->next = NULL;
        unsigned bin = 0;
        for (; bin < 7 && bins[bin]; bin++) {
            run = merge(bins[bin], run);
            bins[bin] = NULL;
        }
        bins[bin] = merge(bins[bin], run);
    }
    struct item *all = NULL;
    for (unsigned bin = 0; bin < 8; bin++) all = merge(bins[bin], all);
    return all;
}

static uint16_t crc_of_byte(uint16_t crc, uint8_t byte) {
    for (int bit = 0; bit < 8; bit++) {
        int carry = (crc ^ byte) & 1;
        crc >>= 1;
        byte >>= 1;
        if (carry) crc ^= 0x8408;
    }
    return crc;
}

enum state { START, SIGN, WHOLE, FRACTION, EXPONENT, WRONG, STATES };

static enum state step(enum state state, char c) {
    int digit = c >= '0' && c <= '9';
    if (c == ';') return START;
    switch (state) {
    case START: return digit ? WHOLE : c == '+' || c == '-' ? SIGN : c == '.' ? FRACTION : WRONG;
    case SIGN: return digit ? WHOLE : WRONG;
    case WHOLE: return digit ? WHOLE : c == '.' ? FRACTION : c == 'e' ? EXPONENT : WRONG;
    case FRACTION: return digit ? FRACTION : c == 'e' ? EXPONENT : WRONG;
    case EXPONENT: return digit || c == '-' ? EXPONENT : WRONG;
    default: return WRONG;
    }
}

static uint64_t run_coremix(long operations) {
    static struct item items[LIST_LENGTH];
    static int16_t left[MATRIX_SIDE][MATRIX_SIDE], right[MATRIX_SIDE][MATRIX_SIDE];
    static const char text[] = "17;-4.25e3;+99;word;.5;3.14159;1e-9;--1;0x1f;8.;";
    uint64_t seed = 20261122;
    uint16_t crc = 0xffff;
    for (long n = 0; n < operations; n++) {
        for (unsigned i = 0; i < LIST_LENGTH; i++) {
            items[i].key = (int32_t)(next_number(&seed) >> 48);
            items[i].next = i + 1 < LIST_LENGTH ? &items[i + 1] : NULL;
        }
        for (struct item *item = sort_list(items); item; item = item->next) crc = crc_of_byte(crc, (uint8_t)item->key);
        for (int i = 0; i < MATRIX_SIDE; i++)
            for (int j = 0; j < MATRIX_SIDE; j++) {
                left[i][j] = (int16_t)(crc + i * 3 - j);
                right[i][j] = (int16_t)((crc >> 4) - i + j * 5);
            }
        for (int i = 0; i < MATRIX_SIDE; i++) {
            int32_t diagonal = 0;
            for (int j = 0; j < MATRIX_SIDE; j++) {
                int32_t cell = 0;
                for (int k = 0; k < MATRIX_SIDE; k++) cell += left[i][k] * right[k][j];
                diagonal ^= cell;
            }
            crc = crc_of_byte(crc, (uint8_t)(diagonal >> 3));
        }
        unsigned seen[STATES] = {0};
        enum state state = START;
        for (const char *c = text; *c; c++) seen[state = step(state, *c)]++;
        for (int i = 0; i < STATES; i++) crc = crc_of_byte(crc, (uint8_t)seen[i]);
    }
    return crc;
}

/* sha256 (FIPS 180-4) over 4096 bytes. The constants are the fractions of cube roots of the first 64 primes. */

static uint32_t round_constants[64];

static uint32_t cube_root_fraction(unsigned prime) {
    unsigned __int128 low = 0, high = (unsigned __int128)1 << 36, scaled = (unsigned __int128)prime << 96;
    while (high - low > 1) {
        unsigned __int128 middle = (low + high) / 2;
        if (middle * middle * middle <= scaled) low = middle;
        else high = middle;
    }
    return (uint32_t)low;
}

static void make_round_constants(void) {
    int count = 0;
    for (unsigned candidate = 2; count < 64; candidate++) {
        int prime = 1;
        for (unsigned divisor = 2; divisor * divisor <= candidate; divisor++)
            if (candidate % divisor == 0) prime = 0;
        if (prime) round_constants[count++] = cube_root_fraction(candidate);
    }
}

static inline uint32_t rotate_right(uint32_t value, int by) { return value >> by | value << (32 - by); }

static void hash_block(uint32_t hash[8], const uint8_t *block) {
    uint32_t schedule[64];
    for (int i = 0; i < 16; i++) {
        uint32_t word;
        memcpy(&word, block + 4 * i, 4);
        schedule[i] = __builtin_bswap32(word);
    }
    for (int i = 16; i < 64; i++) {
        uint32_t x = schedule[i - 15], y = schedule[i - 2];
        uint32_t small_0 = rotate_right(x, 7) ^ rotate_right(x, 18) ^ x >> 3;
        uint32_t small_1 = rotate_right(y, 17) ^ rotate_right(y, 19) ^ y >> 10;
        schedule[i] = schedule[i - 16] + small_0 + schedule[i - 7] + small_1;
    }
    uint32_t a = hash[0], b = hash[1], c = hash[2], d = hash[3], e = hash[4], f = hash[5], g = hash[6], h = hash[7];
    for (int i = 0; i < 64; i++) {
        uint32_t big_1 = rotate_right(e, 6) ^ rotate_right(e, 11) ^ rotate_right(e, 25);
        uint32_t first = h + big_1 + ((e & f) ^ (~e & g)) + round_constants[i] + schedule[i];
        uint32_t big_0 = rotate_right(a, 2) ^ rotate_right(a, 13) ^ rotate_right(a, 22);
        uint32_t second = big_0 + ((a & b) ^ (a & c) ^ (b & c));
        h = g, g = f, f = e, e = d + first;
        d = c, c = b, b = a, a = first + second;
    }
    const uint32_t work[8] = {a, b, c, d, e, f, g, h};
    for (int i = 0; i < 8; i++) hash[i] += work[i];
}

static uint64_t run_sha256(long operations) {
    static uint8_t data[4096];
    uint32_t hash[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    if (!round_constants[0]) make_round_constants();
    for (long n = 0; n < operations; n++)
        for (size_t at = 0; at < sizeof data; at += 64) hash_block(hash, data + at);
    return fold_bytes(0, hash, sizeof hash);
}

static __attribute__((noinline)) unsigned fibonacci(unsigned n) { return n < 2 ? n : fibonacci(n - 1) + fibonacci(n - 2); }

static uint64_t run_fib(long operations) {
    uint64_t sum = 0;
    for (long n = 0; n < operations; n++) {
        unsigned depth = 16;
        __asm__ volatile("" : "+r"(depth));
        sum += fibonacci(depth);
    }
    return sum;
}

typedef uint64_t (*change)(uint64_t);
static uint64_t change_add(uint64_t x) { return x + 0x1234567; }
static uint64_t change_multiply(uint64_t x) { return x * 5; }
static uint64_t change_shift(uint64_t x) { return x ^ x >> 9; }
static uint64_t change_invert(uint64_t x) { return ~x; }

static uint64_t run_indirect(long operations) {
    static change volatile changes[4] = {change_add, change_multiply, change_shift, change_invert};
    uint64_t value = 1, seed = 99;
    for (long n = 0; n < operations; n++)
        for (int i = 0; i < 1000; i++) value = changes[next_number(&seed) >> 62](value);
    return value;
}

const struct row integer_rows[] = {
    {"intloop", "1000 rounds of multiply, add, shift", run_intloop, 100, NULL},
    {"coremix", "sort 64 items, multiply 12x12, scan, CRC", run_coremix, 50, NULL},
    {"sha256", "SHA-256 of 4 KiB", run_sha256, 20, NULL},
    {"fib", "fib(16) by recursion", run_fib, 10, NULL},
    {"indirect", "1000 calls through a table", run_indirect, 20, NULL},
    {0},
};
