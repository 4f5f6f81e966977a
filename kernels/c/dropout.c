/* Dropout by counting: entry e of x is kept or not by a hash of e and the seed, so nothing keeps the mask.
 *
 * The hash is Philox4x32-10 (Salmon et al., SC 2011): the seed is its key, e / 8 its counter, and each of its
 * four 32-bit words serves two entries, 16 bits each. Entries stay whose number is at least `threshold`.
 */
#include "common.h"

enum { LANES = 8, ROUNDS = 10, GROUP = 8 * LANES }; /* counters that are hashed side by side; their entries */
#define MULTIPLIER_0 0xD2511F53u
#define MULTIPLIER_1 0xCD9E8D57u
#define STEP_0 0x9E3779B9u
#define STEP_1 0xBB67AE85u

/* Bit i says whether entry i of a group stays. */
#if defined(__AVX512BW__)
INLINE uint64_t kept(int64_t group, uint64_t seed, uint32_t threshold) {
    __m512i counter = _mm512_add_epi64(_mm512_set1_epi64(group * LANES), _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
    __m512i w0 = counter, w1 = _mm512_srli_epi64(counter, 32), w2 = _mm512_setzero_si512(), w3 = w2;
    __m512i by0 = _mm512_set1_epi64(MULTIPLIER_0), by1 = _mm512_set1_epi64(MULTIPLIER_1);
    uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < ROUNDS; round++, key0 += STEP_0, key1 += STEP_1) { /* high halves are left over */
        __m512i p = _mm512_mul_epu32(w0, by0), q = _mm512_mul_epu32(w2, by1);
        w0 = _mm512_xor_si512(_mm512_xor_si512(_mm512_srli_epi64(q, 32), w1), _mm512_set1_epi64(key0));
        w2 = _mm512_xor_si512(_mm512_xor_si512(_mm512_srli_epi64(p, 32), w3), _mm512_set1_epi64(key1));
        w1 = q, w3 = p;
    }
    /* Words 0 and 1 of a counter are four entries in order, words 2 and 3 the next four. */
    __m512i first = _mm512_mask_blend_epi32(0xaaaa, w0, _mm512_slli_epi64(w1, 32));
    __m512i second = _mm512_mask_blend_epi32(0xaaaa, w2, _mm512_slli_epi64(w3, 32));
    __m512i low = _mm512_permutex2var_epi64(first, _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0), second);
    __m512i high = _mm512_permutex2var_epi64(first, _mm512_set_epi64(15, 7, 14, 6, 13, 5, 12, 4), second);
    if (threshold > 0xffff) return 0;
    __m512i least = _mm512_set1_epi16((short)threshold);
    return (uint64_t)_mm512_cmpge_epu16_mask(high, least) << 32 | _mm512_cmpge_epu16_mask(low, least);
}
#else
INLINE uint64_t kept(int64_t group, uint64_t seed, uint32_t threshold) {
    uint32_t word[4][LANES], key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
    for (int i = 0; i < LANES; i++) {
        uint64_t counter = (uint64_t)(group * LANES + i);
        word[0][i] = (uint32_t)counter, word[1][i] = (uint32_t)(counter >> 32), word[2][i] = word[3][i] = 0;
    }
    for (int round = 0; round < ROUNDS; round++, key0 += STEP_0, key1 += STEP_1)
        for (int i = 0; i < LANES; i++) {
            uint64_t p = (uint64_t)MULTIPLIER_0 * word[0][i], q = (uint64_t)MULTIPLIER_1 * word[2][i];
            word[0][i] = (uint32_t)(q >> 32) ^ word[1][i] ^ key0;
            word[2][i] = (uint32_t)(p >> 32) ^ word[3][i] ^ key1;
            word[1][i] = (uint32_t)q, word[3][i] = (uint32_t)p;
        }
    uint64_t bits = 0;
    for (int e = 0; e < GROUP; e++) {
        uint32_t pair = word[e % 8 / 2][e / 8];
        bits |= (uint64_t)((e % 2 ? pair >> 16 : pair & 0xffff) >= threshold) << e;
    }
    return bits;
}
#endif

void dropout_mask(uint8_t *out, int64_t n, int64_t seed, int threshold, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t first = 0; first < n; first += GROUP) {
        uint64_t keep = kept(first / GROUP, (uint64_t)seed, (uint32_t)threshold);
        for (int64_t i = first; i < MIN(first + GROUP, n); i++) out[i] = (uint8_t)(keep >> (i - first) & 1);
    }
}

/* x times `factor` where the mask keeps it, else 0; rounded once to x's dtype. `out` may be x. */
void thin(const void *x, void *out, int64_t n, int64_t seed, int threshold, float factor, int dtype, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t first = 0; first < n; first += GROUP) {
        uint64_t keep = kept(first / GROUP, (uint64_t)seed, (uint32_t)threshold);
        int count = (int)MIN(GROUP, n - first);
#if defined(ROUNDS_TO_BF16)
        if (dtype == BF16 && count == GROUP) {
            __m512 wide[GROUP / 16], by = _mm512_set1_ps(factor);
            int flushed = 0;
            for (int j = 0; j < GROUP / 16; j++) {
                const __m256i *half = (const __m256i *)((const uint16_t *)x + first + 16 * j);
                __m512i bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(half)), 16);
                wide[j] = _mm512_mul_ps(_mm512_castsi512_ps(bits), by);
                flushed |= subnormal(wide[j]);
            }
            for (int j = 0; j < GROUP / 16 && !flushed; j += 2) {
                __m512i both = (__m512i)_mm512_cvtne2ps_pbh(wide[j + 1], wide[j]);
                __mmask32 mask = (__mmask32)(keep >> (16 * j));
                _mm512_storeu_si512((uint16_t *)out + first + 16 * j, _mm512_maskz_mov_epi16(mask, both));
            }
            if (!flushed) continue;
        }
#endif
        float v[GROUP];
        widen(v, x, first, count, dtype);
        for (int i = 0; i < count; i++) v[i] = keep >> i & 1 ? v[i] * factor : 0;
        if (dtype == F32) memcpy((float *)out + first, v, 4 * (size_t)count);
        else if (dtype == BF16)
            for (int i = 0; i < count; i++) ((uint16_t *)out)[first + i] = to_bf16(v[i]);
        else
            for (int i = 0; i < count; i++) ((uint16_t *)out)[first + i] = to_f16(v[i]);
    }
}
