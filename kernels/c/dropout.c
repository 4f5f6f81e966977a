/* Dropout by counting: entry e of x is kept or not by a hash of e and the seed, so nothing keeps the mask.
 *
 * The hash is Philox4x32-10 (Salmon et al., SC 2011): the seed is its key, e / 8 its counter, and each of its
 * four 32-bit words serves two entries, 16 bits each. Entries stay whose number is at least `threshold`.
 */
#include "common.h"

enum { LANES = 16, ROUNDS = 10 }; /* counters that are hashed side by side */

INLINE void philox(uint32_t word[4][LANES], int64_t counter, uint64_t seed) {
    uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
    for (int i = 0; i < LANES; i++) {
        word[0][i] = (uint32_t)(counter + i), word[1][i] = (uint32_t)((uint64_t)(counter + i) >> 32);
        word[2][i] = word[3][i] = 0;
    }
    for (int round = 0; round < ROUNDS; round++, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u)
        for (int i = 0; i < LANES; i++) {
            uint64_t p = (uint64_t)0xD2511F53u * word[0][i], q = (uint64_t)0xCD9E8D57u * word[2][i];
            word[0][i] = (uint32_t)(q >> 32) ^ word[1][i] ^ key0;
            word[2][i] = (uint32_t)(p >> 32) ^ word[3][i] ^ key1;
            word[1][i] = (uint32_t)q, word[3][i] = (uint32_t)p;
        }
}

enum { GROUP = 8 * LANES };

/* One (keep) for each of the 128 entries of 16 counters, in order. */
INLINE void kept(uint16_t *restrict keep, int64_t group, uint64_t seed, uint32_t threshold) {
    uint32_t word[4][LANES];
    philox(word, group * LANES, seed);
    for (int i = 0; i < LANES; i++)
        for (int w = 0; w < 4; w++) {
            keep[8 * i + 2 * w] = (word[w][i] & 0xffff) >= threshold;
            keep[8 * i + 2 * w + 1] = (word[w][i] >> 16) >= threshold;
        }
}

void dropout_mask(uint8_t *out, int64_t n, int64_t seed, int threshold, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t first = 0; first < n; first += GROUP) {
        uint16_t keep[GROUP];
        kept(keep, first / GROUP, (uint64_t)seed, (uint32_t)threshold);
        for (int64_t i = first; i < MIN(first + GROUP, n); i++) out[i] = (uint8_t)keep[i - first];
    }
}

/* x times `factor` where the mask keeps it, else 0; rounded once to x's dtype. `out` may be x. */
void thin(const void *x, void *out, int64_t n, int64_t seed, int threshold, float factor, int dtype, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t first = 0; first < n; first += GROUP) {
        uint16_t keep[GROUP];
        float v[GROUP];
        int count = (int)MIN(GROUP, n - first);
        kept(keep, first / GROUP, (uint64_t)seed, (uint32_t)threshold);
        widen(v, x, first, count, dtype);
        for (int i = 0; i < count; i++) v[i] = keep[i] ? v[i] * factor : 0;
        if (dtype == F32) memcpy((float *)out + first, v, 4 * (size_t)count);
        else if (dtype == BF16) for (int i = 0; i < count; i++) ((uint16_t *)out)[first + i] = to_bf16(v[i]);
        else for (int i = 0; i < count; i++) ((uint16_t *)out)[first + i] = to_f16(v[i]);
    }
}
