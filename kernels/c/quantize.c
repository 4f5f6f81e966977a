/* Numbers to stored weights: the largest magnitude of a block, codes, and scales in 8 bits; and the scale search. */
#include "common.h"

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

/* What a code means: `order` gives the code of an ascending rank (NULL: the rank itself). */
typedef struct {
    const float *levels;    /* (16) ascending; unused ones repeat the last */
    const float *midpoints; /* (15) between them; unused ones are infinite */
    const uint8_t *order;
} Codebook;

/* The number of midpoints strictly below each value, which is the rank of the nearest level. */
INLINE void rank_levels(const float *restrict values, int32_t *restrict rank, int count, const float *midpoints) {
    for (int i = 0; i < count; i++) {
        int32_t below = 0;
        for (int j = 0; j < 15; j++) below += values[i] > midpoints[j];
        rank[i] = below;
    }
}

/* 1e-38 keeps a block of zeros zero, and the reciprocal of every other scale finite. */
INLINE float safe(float scale) { return copysignf(fabsf(scale) > 1e-38f ? fabsf(scale) : 1e-38f, scale); }

/* Packed codes of an even block size. A partial last block is divided by its scale, as the stored format does. */
void encode(const void *weight, const float *scales, const Codebook *book, uint8_t *packed, int64_t n,
            int64_t block_size, int dtype, int zero_code, int threads) {
    int64_t blocks = (n + block_size - 1) / block_size;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t b = 0; b < blocks; b++) {
        float scale = safe(scales[b]), reciprocal = 1 / scale;
        int64_t end = MIN((b + 1) * block_size, n);
        int whole = (b + 1) * block_size <= n;
        for (int64_t first = b * block_size; first < end; first += PIECE) {
            float w[PIECE];
            int32_t code[PIECE + 1];
            int count = (int)MIN(PIECE, end - first);
            widen(w, weight, first, count, dtype);
            if (whole)
                for (int i = 0; i < count; i++) w[i] *= reciprocal;
            else
                for (int i = 0; i < count; i++) w[i] /= scale;
            rank_levels(w, code, count, book->midpoints);
            if (book->order)
                for (int i = 0; i < count; i++) code[i] = book->order[code[i]];
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

/* ---- the scale search of nf4/search.py ---- */

enum { CANDIDATES = 128 }; /* ratios of absmax, both signs */

/* The squared error of each block, decoded as a reader does; summed in float64. */
INLINE double error_of(const float *w, int64_t count, float scale, const Codebook *book) {
    double sum = 0;
    float reciprocal = 1 / safe(scale);
    for (int64_t first = 0; first < count; first += PIECE) {
        float value[PIECE];
        int32_t rank[PIECE];
        int size = (int)MIN(PIECE, count - first);
        for (int i = 0; i < size; i++) value[i] = w[first + i] * reciprocal;
        rank_levels(value, rank, size, book->midpoints);
        for (int i = 0; i < size; i++) {
            double lost = (double)(w[first + i] - book->levels[rank[i]] * scale);
            sum += lost * lost;
        }
    }
    return sum;
}

int squared_errors(const void *weight, const float *scales, const Codebook *book, double *errors, int64_t n,
                   int64_t block_size, int dtype, int threads) {
    int64_t blocks = (n + block_size - 1) / block_size;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *w = malloc(4 * (size_t)MIN(block_size, n));
        failed |= !w;
#pragma omp for schedule(static)
        for (int64_t b = 0; b < blocks; b++) {
            int64_t count = MIN(block_size, n - b * block_size);
            if (!w) continue;
            for (int64_t i = 0; i < count; i += PIECE)
                widen(w + i, weight, b * block_size + i, (int)MIN(PIECE, count - i), dtype);
            errors[b] = error_of(w, count, scales[b], book);
        }
        free(w);
    }
    return failed;
}

/* The scale of each block with the least squared error that was found.
 *
 * `table` (grid, 2 * CANDIDATES) holds what a weight adds to a and b of every candidate, by w / absmax on a grid;
 * `ratios` the candidates. A block's sums are taken a piece at a time, as many as fit a cache. */
int search(const void *weight, const float *absmax, const float *table, const float *ratios, const Codebook *book,
           float *scales, int64_t n, int64_t block_size, int grid, int refits, float largest, int dtype, int threads) {
    int64_t blocks = (n + block_size - 1) / block_size;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *w = malloc(8 * (size_t)MIN(block_size, n)), *unit = w + MIN(block_size, n);
        failed |= !w;
#pragma omp for schedule(static)
        for (int64_t b = 0; b < blocks; b++) {
            int64_t count = MIN(block_size, n - b * block_size);
            if (!w) continue;
            for (int64_t i = 0; i < count; i += PIECE)
                widen(w + i, weight, b * block_size + i, (int)MIN(PIECE, count - i), dtype);
            float own = absmax[b], divisor = own > 1e-38f ? own : 1e-38f;
            float sums[2 * CANDIDATES] = {0};
            for (int64_t i = 0; i < count; i++) {
                unit[i] = w[i] / divisor;
                const float *row = table + 2 * CANDIDATES * (int64_t)rintf((unit[i] + 1) * ((float)(grid - 1) / 2));
                for (int c = 0; c < 2 * CANDIDATES; c++) sums[c] += row[c];
            }
            float best = -1, ratio = 1;
            for (int c = 0; c < CANDIDATES; c++) {
                float a = sums[c], square = sums[CANDIDATES + c];
                float gain = a * a / (square > 1e-20f ? square : 1e-20f);
                if (gain > best) best = gain, ratio = ratios[c];
            }
            for (int refit = 0; refit < refits; refit++) {
                float a = 0, square = 0, reciprocal = 1 / safe(ratio);
                for (int64_t first = 0; first < count; first += PIECE) {
                    float value[PIECE];
                    int32_t rank[PIECE];
                    int size = (int)MIN(PIECE, count - first);
                    for (int i = 0; i < size; i++) value[i] = unit[first + i] * reciprocal;
                    rank_levels(value, rank, size, book->midpoints);
                    for (int i = 0; i < size; i++) {
                        float level = book->levels[rank[i]];
                        a += unit[first + i] * level;
                        square += level * level;
                    }
                }
                ratio = a / (square > 1e-20f ? square : 1e-20f);
            }
            float found = ratio * own;
            found = found > largest ? largest : found < -largest ? -largest : found;
            int better = error_of(w, count, found, book) < error_of(w, count, own, book) * (1 - 1e-6);
            scales[b] = better ? found : own;
        }
        free(w);
    }
    return failed;
}
