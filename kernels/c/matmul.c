/* The product with a few tokens: y (M, N) = x (M, K) W^T, with W decoded in registers and never stored.
 *
 * A thread takes some rows of W and runs along them once for up to eight tokens; codes and scales are read once,
 * and nothing else of W ever touches memory. A unit is a run of inputs that shares a scale in every row.
 */
#include "common.h"

/* One vector of consecutive weights of a row, by the machine: a look-up in the table of its unit, and a sum. */
#if defined(__AVX512F__)
typedef __m512 Vec;
typedef __m512 Levels;
enum { LANES = 16 };
INLINE Levels levels_for(const float *wide) { return _mm512_loadu_ps(wide); }
INLINE Vec look_up(Levels table, const uint8_t *p) { return _mm512_permutexvar_ps(codes_of_8_bytes(p), table); }
INLINE Vec zero(void) { return _mm512_setzero_ps(); }
INLINE Vec add_product(Vec sum, Vec w, const float *x) { return _mm512_fmadd_ps(w, _mm512_loadu_ps(x), sum); }
INLINE float total(Vec v) { return _mm512_reduce_add_ps(v); }
#elif defined(__AVX2__) && defined(__FMA__)
typedef __m256 Vec;
typedef struct {
    __m256 low, high;
} Levels;
enum { LANES = 8 };
INLINE Levels levels_for(const float *wide) { return (Levels){_mm256_loadu_ps(wide), _mm256_loadu_ps(wide + 8)}; }
INLINE Vec look_up(Levels table, const uint8_t *p) {
    int32_t four;
    memcpy(&four, p, 4);
    __m256i byte = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
    __m256i code = _mm256_or_si256(_mm256_srli_epi64(byte, 4), _mm256_slli_epi64(byte, 32));
    __m256 low = _mm256_permutevar8x32_ps(table.low, code), high = _mm256_permutevar8x32_ps(table.high, code);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(code, 28))); /* by bit 3 */
}
INLINE Vec zero(void) { return _mm256_setzero_ps(); }
INLINE Vec add_product(Vec sum, Vec w, const float *x) { return _mm256_fmadd_ps(w, _mm256_loadu_ps(x), sum); }
INLINE float total(Vec v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
#else
typedef struct {
    float lane[8];
} Vec;
typedef const float *Levels;
enum { LANES = 8 };
INLINE Levels levels_for(const float *wide) { return wide; }
INLINE Vec look_up(Levels table, const uint8_t *p) {
    Vec v;
    for (int i = 0; i < 4; i++) v.lane[2 * i] = table[p[i] >> 4], v.lane[2 * i + 1] = table[p[i] & 15];
    return v;
}
INLINE Vec zero(void) { return (Vec){{0}}; }
INLINE Vec add_product(Vec sum, Vec w, const float *x) {
    for (int i = 0; i < 8; i++) sum.lane[i] += w.lane[i] * x[i];
    return sum;
}
INLINE float total(Vec v) {
    float sum = 0;
    for (int i = 0; i < 8; i++) sum += v.lane[i];
    return sum;
}
#endif

enum { MOST_ROWS = 4, MOST_TOKENS = 8 };

typedef struct {
    const void *x; /* (M, K): bfloat16 where the machine multiplies it, else float32 */
    const uint8_t *packed;
    const float *levels;
    int64_t K, unit;
    int dtype; /* what weights are rounded to */
} Product;

/* R rows of W from `row` on with M tokens; `scale` holds K / unit scales for each row. */
INLINE void product_wide(const Product *a, int64_t row, const float *scale, const int M, const int R, float *sums) {
    int64_t K = a->K, units = K / a->unit;
    Vec sum[MOST_ROWS][MOST_TOKENS]; /* R by M of them, all in registers: sizes known here and loops unrolled */
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int m = 0; m < M; m++) sum[r][m] = zero();
    for (int64_t u = 0; u < units; u++) {
        float wide[MOST_ROWS][16];
        Levels table[MOST_ROWS];
        UNROLL for (int r = 0; r < R; r++) {
            for (int i = 0; i < 16; i++) wide[r][i] = rounded(a->levels[i] * scale[r * units + u], a->dtype);
            table[r] = levels_for(wide[r]);
        }
        for (int64_t k = u * a->unit; k < (u + 1) * a->unit; k += LANES) UNROLL for (int r = 0; r < R; r++) {
                Vec w = look_up(table[r], a->packed + ((row + r) * K + k) / 2);
                UNROLL for (int m = 0; m < M; m++)
                    sum[r][m] = add_product(sum[r][m], w, (const float *)a->x + m * K + k);
            }
    }
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int m = 0; m < M; m++) sums[r * M + m] = total(sum[r][m]);
}

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
enum { MULTIPLIES_BF16 = 1 };
/* The same with 32 bfloat16 weights a vector, multiplied in pairs; the sums are float32. */
INLINE void product_bf16(const Product *a, int64_t row, const float *scale, const int M, const int R, float *sums) {
    int64_t K = a->K, units = K / a->unit;
    __m512 levels = _mm512_loadu_ps(a->levels), sum[MOST_ROWS][MOST_TOKENS];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int m = 0; m < M; m++) sum[r][m] = _mm512_setzero_ps();
    for (int64_t u = 0; u < units; u++) {
        __m512i table[MOST_ROWS];
        UNROLL for (int r = 0; r < R; r++) {
            __m512 wide = _mm512_mul_ps(levels, _mm512_set1_ps(scale[r * units + u]));
            table[r] = _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(wide));
        }
        for (int64_t k = u * a->unit; k < (u + 1) * a->unit; k += 32) {
            __m512i w[MOST_ROWS];
            UNROLL for (int r = 0; r < R; r++)
                w[r] = _mm512_permutexvar_epi16(codes_of_16_bytes(a->packed + ((row + r) * K + k) / 2), table[r]);
            UNROLL for (int m = 0; m < M; m++) {
                __m512i x = _mm512_loadu_si512((const uint16_t *)a->x + m * K + k);
                UNROLL for (int r = 0; r < R; r++) sum[r][m] = _mm512_dpbf16_ps(sum[r][m], (__m512bh)w[r], (__m512bh)x);
            }
        }
    }
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int m = 0; m < M; m++)
        sums[r * M + m] = _mm512_reduce_add_ps(sum[r][m]);
}
#else
enum { MULTIPLIES_BF16 = 0 };
#define product_bf16 product_wide
#endif

int multiplies_bf16(void) { return MULTIPLIES_BF16; }

/* A tile of R rows and M tokens, both constants to the compiler: the sums stay in registers. */
static void tile(const Product *a, int64_t row, int rows, const float *scale, int M, float *sums) {
    int narrow = MULTIPLIES_BF16 && a->dtype == BF16;
#define CASE(m, r)                                           \
    if (M == m && rows == r) {                               \
        if (narrow) product_bf16(a, row, scale, m, r, sums); \
        else product_wide(a, row, scale, m, r, sums);        \
        return;                                              \
    }
    CASE(1, 4)
    CASE(2, 4) CASE(3, 4) CASE(4, 4) CASE(5, 3) CASE(6, 3) CASE(7, 3) CASE(8, 3) CASE(1, 1) CASE(2, 1) CASE(3, 1)
        CASE(4, 1) CASE(5, 1) CASE(6, 1) CASE(7, 1) CASE(8, 1)
#undef CASE
}

enum { ROWS = 12 }; /* rows that a thread takes at once: a multiple of 3 and of 4 */

/* y is float32 (dtype F32) or of 16 bits, rounded once; unit divides K and the block size, and is a multiple of 32.
 * Returns 0, or 1 if there was no memory for the scales of a few rows. */
int multiply(const void *x, const uint8_t *packed, const Scales *scales, const float *levels, const float *bias,
             void *y, int64_t M, int64_t N, int64_t K, int64_t block_size, int64_t unit, int dtype, int threads) {
    int64_t units = K / unit, x_width = MULTIPLIES_BF16 && dtype == BF16 ? 2 : 4;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *scale = malloc(sizeof(float) * ROWS * (size_t)units);
        failed |= !scale;
#pragma omp for schedule(static)
        for (int64_t first = 0; first < N; first += ROWS) {
            int64_t end = MIN(first + ROWS, N);
            if (!scale) continue;
            row_scales(scales, first, end - first, K, unit, block_size, scale);
            for (int64_t m = 0; m < M; m += 8) {
                int tokens = (int)MIN(8, M - m), step = tokens <= 4 ? 4 : 3;
                Product a = {(const char *)x + m * K * x_width, packed, levels, K, unit, dtype};
                for (int64_t row = first; row < end; row += step) {
                    float sums[32];
                    if (end - row < step) step = 1;
                    tile(&a, row, step, scale + (row - first) * units, tokens, sums);
                    for (int r = 0; r < step; r++)
                        for (int t = 0; t < tokens; t++) {
                            float v = sums[r * tokens + t] + (bias ? bias[row + r] : 0);
                            int64_t at = (m + t) * N + row + r;
                            if (dtype == F32) ((float *)y)[at] = v;
                            else ((uint16_t *)y)[at] = to_16(v, dtype);
                        }
                }
            }
        }
        free(scale);
    }
    return failed;
}
