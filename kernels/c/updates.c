/* What an optimizer does to all parameters in one step: kernels/updates.py, operation by operation.
 *
 * Every thread takes a run of blocks of 256 elements, which may begin in one tensor and end in another. The loops work on
 * float32, so 16-bit parameters and gradients pass through a buffer of one block, and states of 8 bits do too:
 * a block is decoded, updated and encoded again while it is in the first-level cache.
 */
#include "common.h"

enum { BLOCK = 256 }; /* states that share a scale */

/* One tensor's row of the table in kernels/tensor_lists.py. */
typedef struct {
    int64_t n;
    void *param;
    const void *grad;
    void *exp_avg; /* float32, or codes */
    float *exp_avg_absmax;
    void *exp_avg_sq;
    float *exp_avg_sq_absmax;
    float beta1, rest1, beta2, rest2, step_size, correction, eps, decay; /* rest = 1 - beta */
} Update;

/* The dynamic map as kernels/dynamic_buckets.py makes it. */
typedef struct {
    const float *entries;
    const double *midpoints;
    const uint8_t *below;
    int64_t lowest, buckets;
} Map;

/* ---- the arithmetic ---- */

INLINE void adamw_block(float *restrict p, const float *restrict g, float *restrict m, float *restrict v, int count,
                        const Update *u) {
    const float beta1 = u->beta1, rest1 = u->rest1, beta2 = u->beta2, rest2 = u->rest2;
    const float step_size = u->step_size, correction = u->correction, eps = u->eps, decay = u->decay;
    for (int i = 0; i < count; i++) {
        m[i] = m[i] * beta1 + g[i] * rest1;
        v[i] = v[i] * beta2 + g[i] * g[i] * rest2;
        p[i] = p[i] * decay - m[i] / (sqrtf(v[i]) * correction + eps) * step_size;
    }
}

INLINE void lion_block(float *restrict p, const float *restrict g, float *restrict m, int count, const Update *u) {
    const float beta1 = u->beta1, rest1 = u->rest1, beta2 = u->beta2, rest2 = u->rest2;
    const float lr = u->step_size, decay = u->decay;
    for (int i = 0; i < count; i++) {
        float average = m[i] * beta1 + g[i] * rest1;
        float direction = (float)(average > 0) - (float)(average < 0);
        p[i] = p[i] * decay - direction * lr;
        m[i] = m[i] * beta2 + g[i] * rest2;
    }
}

/* ---- one block of numbers in 16 bits, or in 8 ---- */

/* Where `count` elements from `first` on are float32: in place, or widened into `buffer`. */
INLINE float *floats(void *x, int64_t first, int count, int dtype, float *buffer) {
    if (dtype == F32) return (float *)x + first;
    widen(buffer, x, first, count, dtype);
    return buffer;
}

INLINE void narrow(void *x, int64_t first, int count, int dtype, const float *restrict from) {
    uint16_t *half = (uint16_t *)x + first;
    if (dtype == BF16)
        for (int i = 0; i < count; i++) half[i] = to_bf16(from[i]);
    else if (dtype == F16)
        for (int i = 0; i < count; i++) half[i] = to_f16(from[i]);
}

INLINE void decode(const uint8_t *restrict codes, float absmax, const Map *map, int count, float *restrict out) {
    for (int i = 0; i < count; i++) out[i] = map->entries[codes[i]] * absmax;
}

/* The codes of the nearest entries, and the block's absmax. */
INLINE void encode_block(const float *restrict x, int count, const Map *map, uint8_t *restrict codes, float *absmax) {
    uint32_t largest = 0;
    for (int i = 0; i < count; i++) {
        uint32_t magnitude = bits_of(x[i]) & 0x7fffffff; /* as bits, NaN is the largest */
        largest = magnitude > largest ? magnitude : largest;
    }
    float scale = *absmax = float_of(largest);
    float shift = scale < 0x1p-60f ? 0x1p80f : 1; /* a power of two keeps the reciprocal from overflowing */
    float reciprocal = 1 / (scale == 0 ? 1 : scale * shift);

    const int32_t lowest = (int32_t)map->lowest, buckets = (int32_t)map->buckets;
    int32_t bucket[BLOCK];
    for (int i = 0; i < count; i++) {
        float ratio = x[i] * shift * reciprocal;
        int32_t at = (int32_t)((bits_of(ratio) & 0x7fffffff) >> 16) - lowest;
        at = at < 0 ? 0 : at >= buckets ? buckets - 1 : at;
        bucket[i] = at + (x[i] < 0 ? buckets : 0);
    }
    double wide = scale;
    for (int i = 0; i < count; i++) {
        int below = map->below[bucket[i]];
        codes[i] = (uint8_t)(below + ((double)x[i] > map->midpoints[below] * wide));
    }
    if (largest >= 0x7f800000) /* infinity over itself, and all that NaN divides, take the last code */
        for (int i = 0; i < count; i++)
            if (largest > 0x7f800000 || fabsf(x[i]) == INFINITY) codes[i] = 255;
}

/* ---- all elements from `first` to `last` of one tensor ---- */

typedef struct {
    int param_dtype, grad_dtype;
    const Map *maps; /* for numbers of either sign, and for those that are never negative */
} How;

static void adamw_run(const Update *u, int64_t first, int64_t last, const How *how) {
    float p_buffer[BLOCK], g_buffer[BLOCK];
    for (; first < last; first += BLOCK) {
        int count = (int)MIN(BLOCK, last - first);
        float *p = floats(u->param, first, count, how->param_dtype, p_buffer);
        const float *g = floats((void *)u->grad, first, count, how->grad_dtype, g_buffer);
        adamw_block(p, g, (float *)u->exp_avg + first, (float *)u->exp_avg_sq + first, count, u);
        narrow(u->param, first, count, how->param_dtype, p);
    }
}

static void adamw_8bit_run(const Update *u, int64_t first, int64_t last, const How *how) {
    float p_buffer[BLOCK], g_buffer[BLOCK], m[BLOCK], v[BLOCK];
    for (; first < last; first += BLOCK) {
        int count = (int)MIN(BLOCK, last - first);
        uint8_t *m_codes = (uint8_t *)u->exp_avg + first, *v_codes = (uint8_t *)u->exp_avg_sq + first;
        float *m_absmax = u->exp_avg_absmax + first / BLOCK, *v_absmax = u->exp_avg_sq_absmax + first / BLOCK;
        float *p = floats(u->param, first, count, how->param_dtype, p_buffer);
        const float *g = floats((void *)u->grad, first, count, how->grad_dtype, g_buffer);
        decode(m_codes, *m_absmax, &how->maps[0], count, m);
        decode(v_codes, *v_absmax, &how->maps[1], count, v);
        adamw_block(p, g, m, v, count, u);
        narrow(u->param, first, count, how->param_dtype, p);
        encode_block(m, count, &how->maps[0], m_codes, m_absmax);
        encode_block(v, count, &how->maps[1], v_codes, v_absmax);
    }
}

static void lion_run(const Update *u, int64_t first, int64_t last, const How *how) {
    float p_buffer[BLOCK], g_buffer[BLOCK];
    for (; first < last; first += BLOCK) {
        int count = (int)MIN(BLOCK, last - first);
        float *p = floats(u->param, first, count, how->param_dtype, p_buffer);
        const float *g = floats((void *)u->grad, first, count, how->grad_dtype, g_buffer);
        lion_block(p, g, (float *)u->exp_avg + first, count, u);
        narrow(u->param, first, count, how->param_dtype, p);
    }
}

/* ---- all tensors of a table ---- */

typedef void Run(const Update *u, int64_t first, int64_t last, const How *how);

INLINE int64_t blocks_of(const Update *u) { return (u->n + BLOCK - 1) / BLOCK; }

INLINE void over_tensors(Run run, const Update *table, int64_t tensors, int param_dtype, int grad_dtype,
                         const Map *maps, int threads) {
    How how = {param_dtype, grad_dtype, maps};
    int64_t total = 0;
    for (int64_t t = 0; t < tensors; t++) total += blocks_of(table + t);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int thread = 0; thread < threads; thread++) {
        int64_t first = total * thread / threads, last = total * (thread + 1) / threads;
        for (const Update *u = table; first < last; u++) { /* counted from the beginning of this tensor */
            int64_t blocks = blocks_of(u);
            if (first < blocks) run(u, first * BLOCK, MIN(last * BLOCK, u->n), &how);
            first = first < blocks ? 0 : first - blocks;
            last -= blocks;
        }
    }
}

void adamw(const Update *table, int64_t tensors, int param_dtype, int grad_dtype, int threads) {
    over_tensors(adamw_run, table, tensors, param_dtype, grad_dtype, NULL, threads);
}

void adamw_8bit(const Update *table, int64_t tensors, int param_dtype, int grad_dtype, const Map *maps, int threads) {
    over_tensors(adamw_8bit_run, table, tensors, param_dtype, grad_dtype, maps, threads);
}

void lion(const Update *table, int64_t tensors, int param_dtype, int grad_dtype, int threads) {
    over_tensors(lion_run, table, tensors, param_dtype, grad_dtype, NULL, threads);
}
