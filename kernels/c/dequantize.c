/* Stored weights back to numbers: each is its level times its block's scale in float32, rounded once. */
#include "common.h"

#if defined(__linux__)
#include <sys/mman.h>
/* Fresh memory costs a fault for every 4 KB, several times what decoding takes: ask for pages of 2 MB instead. */
void prefer_huge_pages(void *start, int64_t bytes) {
    uintptr_t page = 4096, first = ((uintptr_t)start + page - 1) / page * page,
              end = (uintptr_t)start + (uintptr_t)bytes;
    if (bytes >= 4 << 20) madvise((void *)first, end - first, MADV_HUGEPAGE); /* advice: a refusal changes nothing */
}
#else
void prefer_huge_pages(void *start, int64_t bytes) { (void)start, (void)bytes; }
#endif

typedef struct {
    float wide[16];
    uint16_t half[16];
} Table;

INLINE void fill(Table *t, const float *levels, float scale, int dtype) {
    for (int i = 0; i < 16; i++) t->wide[i] = levels[i] * scale;
    if (dtype != F32)
        for (int i = 0; i < 16; i++) t->half[i] = to_16(t->wide[i], dtype);
}

#if defined(__AVX512BW__)
/* The 16-bit table of a block, twice over, so that 5 bits index it; made in registers. */
INLINE __m512i half_table(const float *levels, float scale, int dtype) {
    __m512 wide = _mm512_mul_ps(_mm512_loadu_ps(levels), _mm512_set1_ps(scale));
    if (dtype == F16) return _mm512_broadcast_i64x4(_mm512_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT));
#if defined(ROUNDS_TO_BF16)
    if (!subnormal(wide)) return _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(wide));
#endif
    uint16_t half[16];
    float value[16];
    _mm512_storeu_ps(value, wide);
    for (int i = 0; i < 16; i++) half[i] = to_bf16(value[i]);
    return _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)half));
}
#endif

/* `count` weights of one block from an even position on; returns how many whole groups of 32 it did. */
INLINE int64_t decode_groups(const uint8_t *packed, const float *levels, float scale, void *out, int64_t count,
                             const int dtype) {
    int64_t i = 0;
    if (dtype == F32) {
#if defined(__AVX512F__)
        __m512 table = _mm512_mul_ps(_mm512_loadu_ps(levels), _mm512_set1_ps(scale));
        for (; i + 32 <= count; i += 32)
            for (int j = i; j < i + 32; j += 16)
                _mm512_storeu_ps((float *)out + j, _mm512_permutexvar_ps(codes_of_8_bytes(packed + j / 2), table));
#endif
        return i;
    }
#if defined(__AVX512BW__)
    __m512i table = half_table(levels, scale, dtype);
    for (; i + 32 <= count; i += 32)
        _mm512_storeu_si512((uint16_t *)out + i, _mm512_permutexvar_epi16(codes_of_16_bytes(packed + i / 2), table));
#elif defined(__AVX2__)
    Table t;
    fill(&t, levels, scale, dtype);
    __m256i half = _mm256_loadu_si256((const __m256i *)t.half), low = _mm256_set1_epi16(255);
    __m256i split = _mm256_permute4x64_epi64(/* the low bytes of the sixteen, then the high bytes */
                                             _mm256_packus_epi16(_mm256_and_si256(half, low),
                                                                 _mm256_srli_epi16(half, 8)),
                                             0xd8);
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

INLINE void decode_blocks(const uint8_t *packed, const Scales *scales, const float *levels, void *out, int64_t n,
                          int64_t block_size, int64_t first, int64_t last, const int dtype) {
    int64_t width = dtype == F32 ? 4 : 2;
    float scale[RUN];
    decode_scales(scales, first, last - first, scale);
    for (int64_t b = first; b < last; b++) {
        int64_t i = b * block_size, end = MIN(i + block_size, n);
        float s = scale[b - first];
        if (i % 2 == 0) i += decode_groups(packed + i / 2, levels, s, (char *)out + i * width, end - i, dtype);
        if (i == end) continue;
        Table t;
        fill(&t, levels, s, dtype);
        for (; i < end; i++) {
            int code = code_at(packed, i);
            if (dtype == F32) ((float *)out)[i] = t.wide[code];
            else ((uint16_t *)out)[i] = t.half[code];
        }
    }
}

void dequantize(const uint8_t *packed, const Scales *scales, const float *levels, void *out, int64_t n,
                int64_t block_size, int dtype, int threads) {
    int64_t blocks = (n + block_size - 1) / block_size;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t run = 0; run < blocks; run += RUN) {
        int64_t end = MIN(run + RUN, blocks);
        if (dtype == BF16) decode_blocks(packed, scales, levels, out, n, block_size, run, end, BF16);
        else if (dtype == F16) decode_blocks(packed, scales, levels, out, n, block_size, run, end, F16);
        else decode_blocks(packed, scales, levels, out, n, block_size, run, end, F32);
    }
}
