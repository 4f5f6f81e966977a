/* The product with more tokens: y (M, N) = x (M, K) W^T in bfloat16, with W decoded once into a panel that the cache keeps.
 *
 * A panel is 32 rows of W by 512 inputs, as pairs of inputs side by side for 32 rows: the instruction that multiplies
 * bfloat16 adds two products to each of its sums, so sums of neighbouring rows lie in one vector and nothing is added
 * across lanes. A thread takes 32 rows, decodes them panel by panel, and runs along each with twelve tokens at a time.
 */
#include "common.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
enum { ROWS = 32, HALF = 16, TOKENS = 12, INPUTS = 512 };
#define UNROLL_16 _Pragma("GCC unroll 16")

/* Sixteen rows of sixteen 32-bit lanes become sixteen columns. */
INLINE void transpose(__m512i v[HALF]) {
    __m512i two[HALF], four[HALF];
    UNROLL_16 for (int i = 0; i < HALF; i += 2) {
        two[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        two[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    UNROLL_16 for (int i = 0; i < HALF; i += 4) { /* lane L of four[i + j]: column 4 L + j of four rows */
        four[i] = _mm512_unpacklo_epi64(two[i], two[i + 2]);
        four[i + 1] = _mm512_unpackhi_epi64(two[i], two[i + 2]);
        four[i + 2] = _mm512_unpacklo_epi64(two[i + 1], two[i + 3]);
        four[i + 3] = _mm512_unpackhi_epi64(two[i + 1], two[i + 3]);
    }
    UNROLL_16 for (int j = 0; j < 4; j++) {
        __m512i even = _mm512_shuffle_i32x4(four[j], four[4 + j], 0x88);
        __m512i odd = _mm512_shuffle_i32x4(four[j], four[4 + j], 0xdd);
        __m512i even_below = _mm512_shuffle_i32x4(four[8 + j], four[12 + j], 0x88);
        __m512i odd_below = _mm512_shuffle_i32x4(four[8 + j], four[12 + j], 0xdd);
        v[j] = _mm512_shuffle_i32x4(even, even_below, 0x88);
        v[4 + j] = _mm512_shuffle_i32x4(odd, odd_below, 0x88);
        v[8 + j] = _mm512_shuffle_i32x4(even, even_below, 0xdd);
        v[12 + j] = _mm512_shuffle_i32x4(odd, odd_below, 0xdd);
    }
}

/* Sixteen rows of W, of which `rows` exist, from input `first` up to `end`, into a half of every pair of a panel. */
static void decode(const uint8_t *packed, __m512 levels, const float *scale, int64_t units, int64_t K, int64_t unit,
                   int64_t rows, int64_t first, int64_t end, __m512i *panel) {
    __m512i table[HALF], v[HALF];
    for (int64_t k = first; k < end; k += 32) {
        if (k == first || k % unit == 0)
            for (int64_t r = 0; r < rows; r++) {
                __m512 wide = _mm512_mul_ps(levels, _mm512_set1_ps(scale[r * units + k / unit]));
                table[r] = _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(wide));
            }
        for (int64_t r = 0; r < rows; r++)
            v[r] = _mm512_permutexvar_epi16(codes_of_16_bytes(packed + (r * K + k) / 2), table[r]);
        for (int64_t r = rows; r < HALF; r++) v[r] = _mm512_setzero_si512();
        transpose(v);
        UNROLL_16 for (int i = 0; i < HALF; i++) panel[(k - first) + 2 * i] = v[i];
    }
}

/* T tokens along a panel: 2 T sums in registers, two loads of W and a broadcast for each token at every pair. */
INLINE void along(const uint16_t *x, int64_t stride, const __m512i *panel, int64_t pairs, const int T, float *sums) {
    __m512 sum[TOKENS][2];
    UNROLL_16 for (int t = 0; t < T; t++) {
        sum[t][0] = _mm512_loadu_ps(sums + t * ROWS);
        sum[t][1] = _mm512_loadu_ps(sums + t * ROWS + HALF);
    }
    for (int64_t p = 0; p < pairs; p++) {
        __m512bh left = (__m512bh)panel[2 * p], right = (__m512bh)panel[2 * p + 1];
        UNROLL_16 for (int t = 0; t < T; t++) {
            int32_t pair;
            memcpy(&pair, x + t * stride + 2 * p, 4);
            __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
            sum[t][0] = _mm512_dpbf16_ps(sum[t][0], left, both);
            sum[t][1] = _mm512_dpbf16_ps(sum[t][1], right, both);
        }
    }
    UNROLL_16 for (int t = 0; t < T; t++) {
        _mm512_storeu_ps(sums + t * ROWS, sum[t][0]);
        _mm512_storeu_ps(sums + t * ROWS + HALF, sum[t][1]);
    }
}

static void tile(const uint16_t *x, int64_t stride, const __m512i *panel, int64_t pairs, int tokens, float *sums) {
#define CASE(t) \
    case t: along(x, stride, panel, pairs, t, sums); return;
    switch (tokens) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
    }
#undef CASE
}

/* Everything but W's scales is of the type that is multiplied; returns 0, or 1 if there was no memory. */
int multiply_panels(const uint16_t *x, int64_t stride, const uint8_t *packed, const Scales *scales, const float *levels,
                    const float *bias, uint16_t *y, int64_t M, int64_t N, int64_t K, int64_t block_size, int64_t unit,
                    int threads) {
    int64_t units = K / unit;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *scale = malloc(sizeof(float) * ROWS * (size_t)units), *sums = malloc(sizeof(float) * ROWS * (size_t)M);
        __m512i *panel = aligned_alloc(64, INPUTS * ROWS * 2);
        int ready = scale && sums && panel;
        failed |= !ready;
#pragma omp for schedule(static)
        for (int64_t first = 0; first < N; first += ROWS) {
            if (!ready) continue;
            int64_t rows = MIN(ROWS, N - first), above = MIN(HALF, rows);
            row_scales(scales, first, rows, K, unit, block_size, scale);
            memset(sums, 0, sizeof(float) * ROWS * (size_t)M);
            for (int64_t k = 0; k < K; k += INPUTS) {
                int64_t end = MIN(k + INPUTS, K);
                const uint8_t *codes = packed + first * K / 2;
                __m512 table = _mm512_loadu_ps(levels);
                decode(codes, table, scale, units, K, unit, above, k, end, panel);
                decode(codes + HALF * K / 2, table, scale + HALF * units, units, K, unit, rows - above, k, end, panel + 1);
                for (int64_t m = 0; m < M; m += TOKENS)
                    tile(x + m * stride + k, stride, panel, (end - k) / 2, (int)MIN(TOKENS, M - m), sums + m * ROWS);
            }
            for (int64_t m = 0; m < M; m++)
                for (int64_t r = 0; r < rows; r++)
                    y[m * N + first + r] = to_bf16(sums[m * ROWS + r] + (bias ? bias[first + r] : 0));
        }
        free(scale), free(sums), free(panel);
    }
    return failed;
}
#else /* nothing that a caller who asks `multiplies_bf16` first would reach */
int multiply_panels(const uint16_t *x, int64_t stride, const uint8_t *packed, const Scales *scales, const float *levels,
                    const float *bias, uint16_t *y, int64_t M, int64_t N, int64_t K, int64_t block_size, int64_t unit,
                    int threads) {
    return 1;
}
#endif
