/* What the C operators share: 16-bit numbers, stored scales, and the table of a block.
 *
 * A block of weights shares one scale, so there are only sixteen values in it: level times scale, rounded
 * once. That table fits in a vector register, and a permute looks up 16 or 32 weights at a time. The arithmetic
 * is that of nf4/blockwise.py, operation by operation: everything is compiled with -ffp-contract=off.
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
#define UNROLL _Pragma("GCC unroll 8")
#define INLINE static inline __attribute__((always_inline))

/* ---- numbers: everything is computed in float32 and rounded to nearest, ties to even ---- */

INLINE uint32_t bits_of(float v) {
    uint32_t u;
    memcpy(&u, &v, 4);
    return u;
}
INLINE float float_of(uint32_t u) {
    float v;
    memcpy(&v, &u, 4);
    return v;
}

INLINE uint16_t to_bf16(float v) {
    uint32_t u = bits_of(v);
    return v != v ? 0x7fc0 : (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
INLINE float from_bf16(uint16_t half) { return float_of((uint32_t)half << 16); }

#if defined(__F16C__)
INLINE uint16_t to_f16(float v) { return _cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT); }
INLINE float from_f16(uint16_t half) { return _cvtsh_ss(half); }
#else
INLINE uint16_t to_f16(float v) {
    uint32_t u = bits_of(v), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
    if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (magnitude >= 0x47800000) return (uint16_t)(sign | 0x7c00); /* 65536 and more: infinity */
    if (magnitude < 0x38800000) /* below 2^-14: adding 1/2 leaves multiples of 2^-24 in the low bits */
        return (uint16_t)(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)));
    return (uint16_t)(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13));
}
INLINE float from_f16(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, shifted = (uint32_t)(half & 0x7fff) << 13;
    if (shifted >= 0x0f800000) return float_of(sign | (shifted + 0x70000000)); /* infinity and NaN */
    if (shifted >= 0x00800000) return float_of(sign | (shifted + 0x38000000));
    return copysignf(float_of(shifted + 0x38800000) - float_of(0x38800000), float_of(sign)); /* below 2^-14 */
}
#endif

INLINE uint16_t to_16(float v, int dtype) { return dtype == BF16 ? to_bf16(v) : to_f16(v); }
INLINE float rounded(float v, int dtype) {
    return dtype == F32 ? v : dtype == BF16 ? from_bf16(to_bf16(v)) : from_f16(to_f16(v));
}

/* `count` numbers from position `first` on, as float32. */
INLINE void widen(float *restrict out, const void *source, int64_t first, int count, int dtype) {
    if (dtype == F32) {
        memcpy(out, (const float *)source + first, 4 * (size_t)count);
        return;
    }
    const uint16_t *half = (const uint16_t *)source + first;
    if (dtype == BF16)
        for (int i = 0; i < count; i++) out[i] = from_bf16(half[i]);
    else
        for (int i = 0; i < count; i++) out[i] = from_f16(half[i]);
}

/* ---- scales: float32, or indices into the dynamic map with scales of their own ---- */

typedef struct {
    const float *absmax;
    const uint8_t *codes;
    const float *nested, *map, *offset;
    int64_t nested_block;
} Scales;

INLINE float scale_of(const Scales *s, int64_t block) {
    return s->absmax ? s->absmax[block] : s->map[s->codes[block]] * s->nested[block / s->nested_block] + *s->offset;
}

/* Those of `count` blocks from `first` on. */
INLINE void decode_scales(const Scales *s, int64_t first, int64_t count, float *restrict out) {
    if (s->absmax) {
        memcpy(out, s->absmax + first, 4 * (size_t)count);
        return;
    }
    for (int64_t b = first; b < first + count;) {
        int64_t end = MIN((b / s->nested_block + 1) * s->nested_block, first + count);
        float nested = s->nested[b / s->nested_block], offset = *s->offset;
        for (; b < end; b++) out[b - first] = s->map[s->codes[b]] * nested + offset;
    }
}

/* Those of every unit of `rows` rows from `first` on: a unit is a run of inputs that shares a scale in every row. */
INLINE void row_scales(const Scales *s, int64_t first, int64_t rows, int64_t K, int64_t unit, int64_t block_size,
                       float *restrict out) {
    int64_t units = K / unit;
    if (unit == block_size) decode_scales(s, first * units, rows * units, out);
    else /* divisions take longer than all the rest */
        for (int64_t u = 0; u < rows * units; u++) out[u] = scale_of(s, (first * K + u * unit) / block_size);
}

/* ---- codes ---- */

INLINE int code_at(const uint8_t *packed, int64_t i) { return packed[i / 2] >> (i % 2 ? 0 : 4) & 15; }

#if defined(__AVX512BW__)
/* The codes of 16 bytes in 16-bit lanes, in order; bits above the fourth are left of the neighbour. */
INLINE __m512i codes_of_16_bytes(const uint8_t *p) {
    __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm512_or_si512(_mm512_srli_epi32(byte, 4), _mm512_slli_epi32(byte, 16));
}
#endif
#if defined(__AVX512F__)
/* The codes of 8 bytes in 32-bit lanes, likewise. */
INLINE __m512i codes_of_8_bytes(const uint8_t *p) {
    __m512i byte = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)p));
    return _mm512_or_si512(_mm512_srli_epi64(byte, 4), _mm512_slli_epi64(byte, 32));
}
#endif
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#define ROUNDS_TO_BF16 1
/* The conversion instruction flushes subnormal numbers to zero; is there one? */
INLINE int subnormal(__m512 v) { return _mm512_fpclass_ps_mask(v, 0x20); }
#endif
