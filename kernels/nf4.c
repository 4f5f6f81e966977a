/* The operators on stored weights for CPUs: quantize, dequantize, and the product with a few tokens.
 *
 * A block of weights shares one scale, so there are only sixteen values in it: level times scale, rounded once.
 * That table fits in a vector register, and a permute looks up 16 or 32 weights at a time. The arithmetic is
 * that of nf4/blockwise.py, operation by operation: nothing here may be contracted to fused multiply-adds
 * (-ffp-contract=off) except the sums of the product, which no definition orders.
 *
 * M tokens, N outputs, K inputs. The earlier of two codes in a byte has the high nibble.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { F32, BF16, F16 };
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define INLINE static inline __attribute__((always_inline))

/* ---- numbers ---- */

INLINE uint32_t bits_of(float v) { uint32_t u; memcpy(&u, &v, 4); return u; }
INLINE float float_of(uint32_t u) { float v; memcpy(&v, &u, 4); return v; }

INLINE uint16_t to_bf16(float v) { /* to nearest, ties to even */
    uint32_t u = bits_of(v);
    return v != v ? 0x7fc0 : (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
INLINE uint16_t to_f16(float v) { _Float16 h = (_Float16)v; uint16_t u; memcpy(&u, &h, 2); return u; }
INLINE float from_f16(uint16_t u) { _Float16 h; memcpy(&h, &u, 2); return (float)h; }
INLINE uint16_t to_16(float v, int dtype) { return dtype == BF16 ? to_bf16(v) : to_f16(v); }
INLINE float rounded(float v, int dtype) {
    return dtype == F32 ? v : dtype == BF16 ? float_of((uint32_t)to_bf16(v) << 16) : from_f16(to_f16(v));
}

static void widen(float *restrict out, const void *source, int64_t first, int count, int dtype) {
    if (dtype == F32) memcpy(out, (const float *)source + first, 4 * (size_t)count);
    const uint16_t *half = (const uint16_t *)source + first;
    if (dtype == BF16) for (int i = 0; i < count; i++) out[i] = float_of((uint32_t)half[i] << 16);
    if (dtype == F16) for (int i = 0; i < count; i++) out[i] = from_f16(half[i]);
}

/* ---- scales: float32, or indices into the dynamic map with scales of their own ---- */

typedef struct {
    const float *absmax;
    const uint8_t *codes;
    const float *nested, *map, *offset;
    int64_t nested_block;
} Scales;

static void decode_scales(const Scales *s, int64_t first, int64_t count, float *restrict out) {
    if (s->absmax) { memcpy(out, s->absmax + first, 4 * (size_t)count); return; }
    for (int64_t b = first; b < first + count;) {
        int64_t end = MIN((b / s->nested_block + 1) * s->nested_block, first + count);
        float nested = s->nested[b / s->nested_block], offset = *s->offset;
        for (; b < end; b++) out[b - first] = s->map[s->codes[b]] * nested + offset;
    }
}

/* ---- dequantize ---- */

typedef struct { float wide[16]; uint16_t half[32]; } Table; /* half: twice over, so that 5 bits index it */

INLINE void fill(Table *t, const float *levels, float scale, int dtype) {
    for (int i = 0; i < 16; i++) t->wide[i] = levels[i] * scale;
    if (dtype != F32) for (int i = 0; i < 16; i++) t->half[i] = t->half[i + 16] = to_16(t->wide[i], dtype);
}

INLINE int code_at(const uint8_t *packed, int64_t i) { return packed[i / 2] >> (i % 2 ? 0 : 4) & 15; }

#if defined(__AVX512BW__)
/* The codes of 16 bytes in 16-bit lanes, in order; bits above the fourth are left of the neighbour. */
INLINE __m512i codes_of_16_bytes(const uint8_t *p) {
    __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm512_or_si512(_mm512_srli_epi32(byte, 4), _mm512_slli_epi32(byte, 16));
}
#endif

/* `count` weights of one block from an even position on; returns how many whole groups of 32 it did. */
INLINE int64_t decode_groups(const uint8_t *packed, const Table *t, void *out, int64_t count, int dtype) {
    int64_t i = 0;
    if (dtype == F32) {
#if defined(__AVX512F__)
        __m512 table = _mm512_loadu_ps(t->wide);
        for (; i + 32 <= count; i += 32)
            for (int j = 0; j < 32; j += 16) {
                __m512i byte = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)(packed + (i + j) / 2)));
                __m512i code = _mm512_or_si512(_mm512_srli_epi64(byte, 4), _mm512_slli_epi64(byte, 32));
                _mm512_storeu_ps((float *)out + i + j, _mm512_permutexvar_ps(code, table));
            }
#endif
        return i;
    }
#if defined(__AVX512BW__)
    __m512i table = _mm512_loadu_si512(t->half);
    for (; i + 32 <= count; i += 32)
        _mm512_storeu_si512((uint16_t *)out + i, _mm512_permutexvar_epi16(codes_of_16_bytes(packed + i / 2), table));
#elif defined(__AVX2__)
    __m256i half = _mm256_loadu_si256((const __m256i *)t->half), low = _mm256_set1_epi16(255);
    __m256i split = _mm256_permute4x64_epi64( /* the low bytes of the sixteen, then the high bytes */
        _mm256_packus_epi16(_mm256_and_si256(half, low), _mm256_srli_epi16(half, 8)), 0xd8);
    __m128i lows = _mm256_castsi256_si128(split), highs = _mm256_extracti128_si256(split, 1);
    __m128i nibble = _mm_set1_epi8(15);
    for (; i + 32 <= count; i += 32) {
        __m128i byte = _mm_loadu_si128((const __m128i *)(packed + i / 2));
        __m128i first = _mm_and_si128(_mm_srli_epi16(byte, 4), nibble), second = _mm_and_si128(byte, nibble);
        __m128i codes[2] = {_mm_unpacklo_epi8(first, second), _mm_unpackhi_epi8(first, second)};
        for (int j = 0; j < 2; j++) {
            __m128i l = _mm_shuffle_epi8(lows, codes[j]), h = _mm_shuffle_epi8(highs, codes[j]);
            _mm_storeu_si128((__m128i *)((uint16_t *)out + i + 16 * j), _mm_unpacklo_epi8(l, h));
            _mm_storeu_si128((__m128i *)((uint16_t *)out + i + 16 * j + 8), _mm_unpackhi_epi8(l, h));
        }
    }
#endif
    return i;
}

enum { RUN = 512 }; /* blocks that a thread takes at once */

void dequantize(const uint8_t *packed, const Scales *scales, const float *levels, void *out, int64_t n,
                int64_t block_size, int dtype, int threads) {
    int64_t blocks = (n + block_size - 1) / block_size, width = dtype == F32 ? 4 : 2;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t run = 0; run < blocks; run += RUN) {
        float scale[RUN];
        int64_t count = MIN(RUN, blocks - run);
        decode_scales(scales, run, count, scale);
        for (int64_t b = 0; b < count; b++) {
            int64_t i = (run + b) * block_size, end = MIN(i + block_size, n);
            Table t;
            fill(&t, levels, scale[b], dtype);
            if (i % 2 == 0) i += decode_groups(packed + i / 2, &t, (char *)out + i * width, end - i, dtype);
            for (; i < end; i++) {
                int code = code_at(packed, i);
                if (dtype == F32) ((float *)out)[i] = t.wide[code];
                else ((uint16_t *)out)[i] = t.half[code];
            }
        }
    }
}

/* ---- quantize ---- */

enum { PIECE = 256 }; /* weights widened to float32 at once */

/* The largest magnitude of every block; as bits, so that infinity and NaN, which come out largest, are seen. */
void absmax(const void *weight, float *out, int64_t n, int64_t block_size, int dtype, int threads) {
    int64_t blocks = (n + block_size - 1) / block_size;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t b = 0; b < blocks; b++) {
        uint32_t largest = 0;
        int64_t end = MIN((b + 1) * block_size, n);
        for (int64_t first = b * block_size; first < end; first += PIECE) {
            float w[PIECE];
            int count = (int)MIN(PIECE, end - first);
            widen(w, weight, first, count, dtype);
            for (int i = 0; i < count; i++) {
                uint32_t magnitude = bits_of(w[i]) & 0x7fffffff;
                largest = magnitude > largest ? magnitude : largest;
            }
        }
        out[b] = float_of(largest);
    }
}

/* Packed codes of an even block size: the number of midpoints below w / scale, through `order`. */
void encode(const void *weight, const float *scales, const float *midpoints, const uint8_t *order, uint8_t *packed,
            int64_t n, int64_t block_size, int dtype, int zero_code, int threads) {
    int64_t blocks = (n + block_size - 1) / block_size;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t b = 0; b < blocks; b++) {
        float magnitude = fabsf(scales[b]) > 1e-38f ? fabsf(scales[b]) : 1e-38f;
        float scale = copysignf(magnitude, scales[b]), reciprocal = 1 / scale;
        int64_t end = MIN((b + 1) * block_size, n);
        int whole = (b + 1) * block_size <= n; /* a partial last block is divided, as the stored format does */
        for (int64_t first = b * block_size; first < end; first += PIECE) {
            float w[PIECE + 1];
            int32_t code[PIECE + 1];
            int count = (int)MIN(PIECE, end - first);
            widen(w, weight, first, count, dtype);
            if (whole) for (int i = 0; i < count; i++) w[i] *= reciprocal;
            else for (int i = 0; i < count; i++) w[i] /= scale;
            for (int i = 0; i < count; i++) {
                int32_t below = 0;
                for (int j = 0; j < 15; j++) below += w[i] > midpoints[j];
                code[i] = below;
            }
            if (order) for (int i = 0; i < count; i++) code[i] = order[code[i]];
            code[count] = zero_code; /* fills the last byte of an odd weight */
            uint8_t *to = packed + first / 2;
            for (int i = 0; i < (count + 1) / 2; i++) to[i] = (uint8_t)(code[2 * i] << 4 | code[2 * i + 1]);
        }
    }
}

/* Scales in 8 bits: the nearest of 256 ascending entries, by their midpoints, in float64. */
void encode_scales(const float *centred, const double *midpoints, float *nested, uint8_t *codes, int64_t n,
                   int64_t block_size, int threads) {
    int64_t blocks = (n + block_size - 1) / block_size;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t b = 0; b < blocks; b++) {
        int64_t first = b * block_size, end = MIN(first + block_size, n);
        float largest = 0;
        for (int64_t i = first; i < end; i++) {
            float magnitude = fabsf(centred[i]);
            if (!(magnitude <= largest)) largest = magnitude; /* NaN too */
        }
        nested[b] = largest;
        double divisor = largest > 1e-300 ? (double)largest : 1e-300;
        for (int64_t i = first; i < end; i++) {
            double ratio = (double)centred[i] / divisor;
            int below = 0;
            for (int step = 128; step; step /= 2) below += ratio > midpoints[below + step - 1] ? step : 0;
            codes[i] = (uint8_t)below;
        }
    }
}

/* ---- the product with a few tokens: y (M, N) = x (M, K) W^T, W decoded in registers and never stored ---- */

/* One vector of consecutive weights of a row, by the machine: a table of levels times scale, a look-up, a sum. */
#if defined(__AVX512F__)
typedef __m512 Vec;
typedef __m512 Levels;
enum { LANES = 16 };
INLINE Levels levels_for(const float *wide) { return _mm512_loadu_ps(wide); }
INLINE Vec look_up(Levels table, const uint8_t *p) {
    __m512i byte = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)p));
    return _mm512_permutexvar_ps(_mm512_or_si512(_mm512_srli_epi64(byte, 4), _mm512_slli_epi64(byte, 32)), table);
}
INLINE Vec zero(void) { return _mm512_setzero_ps(); }
INLINE Vec add_product(Vec sum, Vec w, const float *x) { return _mm512_fmadd_ps(w, _mm512_loadu_ps(x), sum); }
INLINE float total(Vec v) { return _mm512_reduce_add_ps(v); }
#elif defined(__AVX2__) && defined(__FMA__)
typedef __m256 Vec;
typedef struct { __m256 low, high; } Levels;
enum { LANES = 8 };
INLINE Levels levels_for(const float *wide) {
    return (Levels){_mm256_loadu_ps(wide), _mm256_loadu_ps(wide + 8)};
}
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
enum { LANES = 8 };
typedef struct { float lane[8]; } Vec;
typedef const float *Levels;
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

typedef struct {
    const void *x; /* (M, K): bfloat16 where the machine multiplies it, else float32 */
    const uint8_t *packed;
    const float *levels;
    int64_t K, block_size;
    int dtype; /* what weights are rounded to */
} Product;

/* R rows of W from `row` on with M tokens; `scale` holds K / block_size scales for each row. */
INLINE void product_wide(const Product *a, int64_t row, const float *scale, const int M, const int R, float *sums) {
    int64_t K = a->K, blocks = K / a->block_size;
    Vec sum[R][M];
    for (int r = 0; r < R; r++) for (int m = 0; m < M; m++) sum[r][m] = zero();
    for (int64_t b = 0; b < blocks; b++) {
        float wide[16];
        Levels table[R];
        float tables[R][16];
        for (int r = 0; r < R; r++) {
            for (int i = 0; i < 16; i++) wide[i] = rounded(a->levels[i] * scale[r * blocks + b], a->dtype);
            memcpy(tables[r], wide, sizeof wide);
            table[r] = levels_for(tables[r]);
        }
        for (int64_t k = b * a->block_size; k < (b + 1) * a->block_size; k += LANES)
            for (int r = 0; r < R; r++) {
                Vec w = look_up(table[r], a->packed + ((row + r) * K + k) / 2);
                for (int m = 0; m < M; m++) sum[r][m] = add_product(sum[r][m], w, (const float *)a->x + m * K + k);
            }
    }
    for (int r = 0; r < R; r++) for (int m = 0; m < M; m++) sums[r * M + m] = total(sum[r][m]);
}

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
enum { MULTIPLIES_BF16 = 1 };
/* The same with 32 bfloat16 weights a vector, multiplied in pairs; the sums are float32. */
INLINE void product_bf16(const Product *a, int64_t row, const float *scale, const int M, const int R, float *sums) {
    int64_t K = a->K, blocks = K / a->block_size;
    __m512 levels = _mm512_loadu_ps(a->levels), sum[R][M];
    for (int r = 0; r < R; r++) for (int m = 0; m < M; m++) sum[r][m] = _mm512_setzero_ps();
    for (int64_t b = 0; b < blocks; b++) {
        __m512i table[R];
        for (int r = 0; r < R; r++) {
            __m512 wide = _mm512_mul_ps(levels, _mm512_set1_ps(scale[r * blocks + b]));
            table[r] = _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(wide));
        }
        for (int64_t k = b * a->block_size; k < (b + 1) * a->block_size; k += 32) {
            __m512i w[R];
            for (int r = 0; r < R; r++)
                w[r] = _mm512_permutexvar_epi16(codes_of_16_bytes(a->packed + ((row + r) * K + k) / 2), table[r]);
            for (int m = 0; m < M; m++) {
                __m512i x = _mm512_loadu_si512((const uint16_t *)a->x + m * K + k);
                for (int r = 0; r < R; r++) sum[r][m] = _mm512_dpbf16_ps(sum[r][m], (__m512bh)w[r], (__m512bh)x);
            }
        }
    }
    for (int r = 0; r < R; r++) for (int m = 0; m < M; m++) sums[r * M + m] = _mm512_reduce_add_ps(sum[r][m]);
}
#else
enum { MULTIPLIES_BF16 = 0 };
#define product_bf16 product_wide
#endif

int multiplies_bf16(void) { return MULTIPLIES_BF16; }

/* A tile of R rows and M tokens, both constants to the compiler: the sums stay in registers. */
static void tile(const Product *a, int64_t row, int rows, const float *scale, int M, float *sums) {
    int narrow = MULTIPLIES_BF16 && a->dtype == BF16;
#define CASE(m, r) \
    if (M == m && rows == r) { if (narrow) product_bf16(a, row, scale, m, r, sums); else product_wide(a, row, scale, m, r, sums); return; }
    CASE(1, 4) CASE(2, 4) CASE(3, 4) CASE(4, 4) CASE(5, 3) CASE(6, 3) CASE(7, 3) CASE(8, 3)
    CASE(1, 1) CASE(2, 1) CASE(3, 1) CASE(4, 1) CASE(5, 1) CASE(6, 1) CASE(7, 1) CASE(8, 1)
#undef CASE
}

/* y is float32 (dtype F32) or of 16 bits, rounded once; block_size divides K and is a multiple of 32.
 * Returns 0, or 1 if there was no memory for the scales of a few rows. */
int multiply(const void *x, const uint8_t *packed, const Scales *scales, const float *levels, const float *bias,
             void *y, int64_t M, int64_t N, int64_t K, int64_t block_size, int dtype, int threads) {
    int64_t blocks = K / block_size, out_of_memory = 0;
    int64_t x_width = MULTIPLIES_BF16 && dtype == BF16 ? 2 : 4;
#pragma omp parallel num_threads(threads) reduction(| : out_of_memory)
    {
        float *scale = malloc(sizeof(float) * 4 * (size_t)blocks);
        out_of_memory |= !scale;
#pragma omp for schedule(static)
        for (int64_t first = 0; first < N; first += 12) { /* a multiple of 3 and of 4 rows */
            int64_t end = MIN(first + 12, N);
            for (int64_t m = 0; scale && m < M; m += 8) {
                int tokens = (int)MIN(8, M - m), step = tokens <= 4 ? 4 : 3;
                Product a = {(const char *)x + m * K * x_width, packed, levels, K, block_size, dtype};
                for (int64_t row = first; row < end; row += step) {
                    if (end - row < step) step = 1;
                    float sums[32];
                    decode_scales(scales, row * blocks, step * blocks, scale);
                    tile(&a, row, step, scale, tokens, sums);
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
    return (int)out_of_memory;
}
