/* Floating point and vector rows. Results are exact: the order of operations is fixed and nothing is left to the compiler's choice. */
#include "rows.h"
#include <immintrin.h>
#include <string.h>

enum { SIDE = 96, LANES = 4096 };

static uint64_t run_dmatmul(long operations) {
    static double left[SIDE][SIDE], right[SIDE][SIDE], product[SIDE][SIDE];
    for (int i = 0; i < SIDE; i++)
        for (int j = 0; j < SIDE; j++) {
            left[i][j] = (i * 7 + j * 3) % 31 - 15.0;
            right[i][j] = (i * 5 - j * 11) % 29 / 8.0;
        }
    for (long n = 0; n < operations; n++) {
        for (int i = 0; i < SIDE; i++)
            for (int j = 0; j < SIDE; j++) {
                double cell = 0;
                for (int k = 0; k < SIDE; k++) cell += left[i][k] * right[k][j];
                product[i][j] = cell;
            }
        left[n % SIDE][0] = product[1][n % SIDE] * 0.0009765625;
    }
    return fold_bytes(0, product, sizeof product);
}

static void fill(float *x, float *y) {
    for (int i = 0; i < LANES; i++) {
        x[i] = (float)(i % 127) * 0.03125f;
        y[i] = (float)(i % 89) - 44.0f;
    }
}

static uint64_t run_sse_saxpy(long operations) {
    static float x[LANES] __attribute__((aligned(16))), y[LANES] __attribute__((aligned(16)));
    fill(x, y);
    for (long n = 0; n < operations; n++) {
        __m128 a = _mm_set1_ps(n & 1 ? -0.75f : 0.75f);
        for (int i = 0; i < LANES; i += 4) {
            __m128 scaled = _mm_mul_ps(a, _mm_load_ps(x + i));
            _mm_store_ps(y + i, _mm_add_ps(scaled, _mm_load_ps(y + i)));
        }
        __asm__ volatile("" ::: "memory");
    }
    return fold_bytes(0, y, sizeof y);
}

__attribute__((target("avx2,fma"))) static uint64_t run_avx2_saxpy(long operations) {
    static float x[LANES] __attribute__((aligned(32))), y[LANES] __attribute__((aligned(32)));
    fill(x, y);
    for (long n = 0; n < operations; n++) {
        __m256 a = _mm256_set1_ps(n & 1 ? -0.75f : 0.75f);
        for (int i = 0; i < LANES; i += 8)
            _mm256_store_ps(y + i, _mm256_fmadd_ps(a, _mm256_load_ps(x + i), _mm256_load_ps(y + i)));
        __asm__ volatile("" ::: "memory");
    }
    return fold_bytes(0, y, sizeof y);
}

static int has_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

static uint64_t run_sse_int(long operations) {
    static uint8_t left[LANES] __attribute__((aligned(16))), right[LANES] __attribute__((aligned(16)));
    uint64_t seed = 5;
    for (int i = 0; i < LANES; i++) {
        left[i] = (uint8_t)(next_number(&seed) >> 56);
        right[i] = i % 3 ? left[i] : (uint8_t)i;
    }
    __m128i sum = _mm_setzero_si128();
    for (long n = 0; n < operations; n++) {
        for (int i = 0; i < LANES; i += 16) {
            __m128i x = _mm_load_si128((const __m128i *)(left + i)), y = _mm_load_si128((const __m128i *)(right + i));
            sum = _mm_add_epi64(sum, _mm_sad_epu8(x, y));
            sum = _mm_xor_si128(sum, _mm_unpackhi_epi8(_mm_cmpeq_epi8(x, y), x));
        }
        __asm__ volatile("" ::: "memory");
    }
    return fold_bytes(0, &sum, sizeof sum);
}

static uint64_t run_x87(long operations) {
    volatile long double result = 0;
    uint64_t sum = 0;
    for (long n = 0; n < operations; n++) {
        long double value = 1.25L + (long double)(n % 16);
        for (int i = 0; i < 200; i++) value = value * 0.9990234375L + 0.375L;
        result = value;
        uint8_t bytes[10];
        memcpy(bytes, (const void *)&result, sizeof bytes);
        sum = fold_bytes(sum, bytes, sizeof bytes);
    }
    return sum;
}

const struct row vector_rows[] = {
    {"dmatmul", "96x96 doubles multiplied", run_dmatmul, 2, NULL},
    {"sse_saxpy", "a*x+y over 4096 floats, SSE", run_sse_saxpy, 20, NULL},
    {"sse_int", "byte differences over 4 KiB, SSE2", run_sse_int, 20, NULL},
    {"avx2_saxpy", "a*x+y over 4096 floats, AVX2 and FMA", run_avx2_saxpy, 20, has_avx2},
    {"x87", "200 multiply-adds of 80-bit floats", run_x87, 20, NULL},
    {0},
};
