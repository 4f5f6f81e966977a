/* Causal attention in bfloat16, forward and backward, without ever holding all scores.
 *
 * A thread takes one head of keys and values with the query heads that share it, and 48 queries at a time. Their
 * scores with all keys before them fit a cache; the softmax is float32, and what it gives is rounded to bfloat16
 * for the product with the values. Backward makes the scores again from the logarithm of the softmax's sum.
 *
 * Every product is one routine on pairs: the instruction multiplies two neighbours of the contracted axis at
 * once, so the right-hand side is laid out in pairs beforehand and of the left-hand side a pair is spread to all lanes.
 * B batch, H query heads, K key/value heads, T tokens, C channels per head.
 */
#include "common.h"

typedef struct {
    uint16_t *data;
    int64_t b, h, t;
} View; /* (B, H, T, C) with these strides; C is dense */

#if defined(ROUNDS_TO_BF16)

enum { QUERIES = 48 };

/* out (R, 16 V) = or += a b: `a` has R rows of n pairs, at row r and pair p a[r * row + p * pair]; `b` n rows of pairs. */
INLINE void product_tile(const int R, const int V, int64_t n, const uint32_t *a, int64_t row, int64_t pair,
                         const uint32_t *b, int64_t ldb, float *out, int64_t ldout, int add) {
    __m512 sum[6][4]; /* R by V of them, all in registers: sizes known here and loops unrolled */
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++)
        sum[r][v] = add ? _mm512_loadu_ps(out + r * ldout + 16 * v) : _mm512_setzero_ps();
    for (int64_t p = 0; p < n; p++) {
        __m512bh right[4];
        UNROLL for (int v = 0; v < V; v++) right[v] = (__m512bh)_mm512_loadu_si512(b + p * ldb + 16 * v);
        UNROLL for (int r = 0; r < R; r++) {
            __m512bh left = (__m512bh)_mm512_set1_epi32((int)a[r * row + p * pair]);
            UNROLL for (int v = 0; v < V; v++) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], left, right[v]);
        }
    }
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++)
        _mm512_storeu_ps(out + r * ldout + 16 * v, sum[r][v]);
}

/* The same for any number of rows, and columns in multiples of 16: tiles of 6 by 64 keep their sums in registers. */
static void product(int64_t rows, int64_t columns, int64_t n, const uint32_t *a, int64_t row, int64_t pair,
                    const uint32_t *b, int64_t ldb, float *out, int64_t ldout, int add) {
    for (int64_t c = 0; c < columns; c += 64) {
        int V = (int)MIN(4, (columns - c) / 16);
        for (int64_t r = 0; r < rows; r += 6) {
            int R = (int)MIN(6, rows - r);
            const uint32_t *from = a + r * row;
            float *to = out + r * ldout + c;
#define CASE(i, j)                                                          \
    if (R == i && V == j) {                                                 \
        product_tile(i, j, n, from, row, pair, b + c, ldb, to, ldout, add); \
        continue;                                                           \
    }
#define CASES(i) CASE(i, 4) CASE(i, 1) CASE(i, 2) CASE(i, 3)
            CASES(6) CASES(1) CASES(2) CASES(3) CASES(4) CASES(5)
#undef CASES
#undef CASE
        }
    }
}

/* (rows, C) to pairs of channels, (C / 2, padded): the right-hand side of a product over channels. */
static void pairs_of_channels(uint32_t *to, const uint16_t *from, int64_t stride, int64_t rows, int64_t C,
                              int64_t padded) {
    for (int64_t c = 0; c < C / 2; c++) memset(to + c * padded + rows, 0, 4 * (size_t)(padded - rows));
    for (int64_t t = 0; t < rows; t++)
        for (int64_t c = 0; c < C / 2; c++) memcpy(to + c * padded + t, from + t * stride + 2 * c, 4);
}

/* (rows, C) to pairs of rows, (padded / 2, C): the right-hand side of a product over rows. */
static void pairs_of_rows(uint32_t *to, const uint16_t *from, int64_t stride, int64_t rows, int64_t C, int64_t padded) {
    for (int64_t t = 0; t < padded; t += 2, to += C)
        for (int64_t c = 0; c < C; c += 16) {
            const __m256i *first = (const __m256i *)(from + t * stride + c);
            const __m256i *second = (const __m256i *)(from + (t + 1) * stride + c);
            __m512i low = _mm512_setzero_si512(), high = low;
            if (t < rows) low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(first));
            if (t + 1 < rows) high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(second)), 16);
            _mm512_storeu_si512(to + c, _mm512_or_si512(low, high));
        }
}

/* The sum over C channels of a row's products, in float32. */
static float inner_product(const uint16_t *a, const uint16_t *b, int64_t C) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t c = 0; c < C; c += 16) {
        __m512i wide_a = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(a + c))), 16);
        __m512i wide_b = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(b + c))), 16);
        sum = _mm512_fmadd_ps(_mm512_castsi512_ps(wide_a), _mm512_castsi512_ps(wide_b), sum);
    }
    return _mm512_reduce_add_ps(sum);
}

/* e^x for x <= 0: 2^n e^r with |r| <= ln 2 / 2, and the series of e^r to its sixth power. */
INLINE __m512 exponential(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-100));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x); /* ln 2 in two parts, the first exact */
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 sum = _mm512_set1_ps(1.0f / 720);
    const float series[] = {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1, 1};
    for (int i = 0; i < 6; i++) sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(series[i]));
    return _mm512_scalef_ps(sum, n);
}

/* Which of the 16 keys from `key` on a query may see. */
INLINE __mmask16 seen(int64_t query, int64_t key) {
    int64_t count = query + 1 - key;
    return count >= 16 ? 0xffff : count <= 0 ? 0 : (__mmask16)((1 << count) - 1);
}

static void round_rows(uint16_t *to, int64_t stride, const float *from, int64_t rows, int64_t C, const float *factor) {
    for (int64_t r = 0; r < rows; r++) {
        __m512 by = _mm512_set1_ps(factor ? factor[r] : 1);
        for (int64_t c = 0; c < C; c += 16) {
            __m512 v = _mm512_mul_ps(_mm512_loadu_ps(from + r * C + c), by);
            _mm256_storeu_si256((__m256i *)(to + r * stride + c), (__m256i)_mm512_cvtneps_pbh(v));
        }
    }
}

/* Memory of one thread, cut into pieces that start on a cache line. */
typedef struct {
    char *next;
} Arena;
static void *piece(Arena *arena, int64_t bytes) {
    void *start = arena->next;
    arena->next += (bytes + 63) / 64 * 64;
    return start;
}

int attention(const View *q, const View *k, const View *v, const View *y, float *lse, int64_t B, int64_t H, int64_t K,
              int64_t T, int64_t C, float scale, int threads) {
    int64_t padded = (T + 15) / 16 * 16, group = H / K;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        char *memory = malloc((size_t)(4 * padded * C + 6 * QUERIES * padded + 4 * QUERIES * C + 64 * 8));
        failed |= !memory;
        Arena arena = {(char *)(((uintptr_t)memory + 63) / 64 * 64)};
        uint32_t *keys = piece(&arena, 2 * padded * C), *values = piece(&arena, 2 * padded * C);
        float *score = piece(&arena, 4 * QUERIES * padded), *sum = piece(&arena, 4 * QUERIES * C);
        uint16_t *weight = piece(&arena, 2 * QUERIES * padded);
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < B * K; unit++) {
            int64_t b = unit / K, head = unit % K;
            if (!memory) continue;
            pairs_of_channels(keys, k->data + b * k->b + head * k->h, k->t, T, C, padded);
            pairs_of_rows(values, v->data + b * v->b + head * v->h, v->t, T, C, padded);
            for (int64_t h = head * group; h < (head + 1) * group; h++)
                for (int64_t first = 0; first < T; first += QUERIES) {
                    int64_t rows = MIN(QUERIES, T - first), width = MIN(padded, (first + rows + 15) / 16 * 16);
                    const uint16_t *query = q->data + b * q->b + h * q->h + first * q->t;
                    float inverse[QUERIES];
                    product(rows, width, C / 2, (const uint32_t *)query, q->t / 2, 1, keys, padded, score, padded, 0);
                    for (int64_t r = 0; r < rows; r++) {
                        float *s = score + r * padded;
                        __m512 largest = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
                        for (int64_t j = 0; j < width; j += 16)
                            largest = _mm512_mask_max_ps(largest, seen(first + r, j), largest, _mm512_loadu_ps(s + j));
                        float most = _mm512_reduce_max_ps(largest) * scale;
                        for (int64_t j = 0; j < width; j += 16) {
                            __m512 x = _mm512_fmsub_ps(_mm512_loadu_ps(s + j), _mm512_set1_ps(scale),
                                                       _mm512_set1_ps(most));
                            x = _mm512_maskz_mov_ps(seen(first + r, j), exponential(x));
                            total = _mm512_add_ps(total, x);
                            _mm256_storeu_si256((__m256i *)(weight + r * padded + j), (__m256i)_mm512_cvtneps_pbh(x));
                        }
                        float sum_of_row = _mm512_reduce_add_ps(total);
                        inverse[r] = 1 / sum_of_row;
                        lse[(b * H + h) * T + first + r] = most + logf(sum_of_row);
                    }
                    product(rows, C, width / 2, (const uint32_t *)weight, padded / 2, 1, values, C, sum, C, 0);
                    round_rows(y->data + b * y->b + h * y->h + first * y->t, y->t, sum, rows, C, inverse);
                }
        }
        free(memory);
    }
    return failed;
}

/* Gradients of q, k and v from that of y. */
int attention_grad(const View *q, const View *k, const View *v, const View *y, const float *lse, const View *dy,
                   const View *dq, const View *dk, const View *dv, int64_t B, int64_t H, int64_t K, int64_t T,
                   int64_t C, float scale, int threads) {
    int64_t padded = (T + 15) / 16 * 16, group = H / K;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        char *memory = malloc((size_t)(14 * padded * C + 14 * QUERIES * padded + 8 * QUERIES * C + 64 * 16));
        failed |= !memory;
        Arena arena = {(char *)(((uintptr_t)memory + 63) / 64 * 64)};
        uint32_t *keys = piece(&arena, 2 * padded * C), *values = piece(&arena, 2 * padded * C);
        uint32_t *key_rows = piece(&arena, 2 * padded * C);
        float *key_sum = piece(&arena, 4 * padded * C), *value_sum = piece(&arena, 4 * padded * C);
        float *score = piece(&arena, 4 * QUERIES * padded), *back = piece(&arena, 4 * QUERIES * padded);
        uint16_t *change = piece(&arena, 2 * QUERIES * padded);
        uint32_t *weight_pairs = piece(&arena, 2 * QUERIES * padded),
                 *change_pairs = piece(&arena, 2 * QUERIES * padded);
        uint32_t *query_rows = piece(&arena, 2 * QUERIES * C), *dy_rows = piece(&arena, 2 * QUERIES * C);
        float *sum = piece(&arena, 4 * QUERIES * C);
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < B * K; unit++) {
            int64_t b = unit / K, head = unit % K;
            if (!memory) continue;
            pairs_of_channels(keys, k->data + b * k->b + head * k->h, k->t, T, C, padded);
            pairs_of_channels(values, v->data + b * v->b + head * v->h, v->t, T, C, padded);
            pairs_of_rows(key_rows, k->data + b * k->b + head * k->h, k->t, T, C, padded);
            memset(key_sum, 0, 4 * (size_t)(padded * C));
            memset(value_sum, 0, 4 * (size_t)(padded * C));
            for (int64_t h = head * group; h < (head + 1) * group; h++)
                for (int64_t first = 0; first < T; first += QUERIES) {
                    int64_t rows = MIN(QUERIES, T - first), width = MIN(padded, (first + rows + 15) / 16 * 16);
                    const uint16_t *query = q->data + b * q->b + h * q->h + first * q->t;
                    const uint16_t *from = dy->data + b * dy->b + h * dy->h + first * dy->t;
                    const uint16_t *result = y->data + b * y->b + h * y->h + first * y->t;
                    product(rows, width, C / 2, (const uint32_t *)query, q->t / 2, 1, keys, padded, score, padded, 0);
                    product(rows, width, C / 2, (const uint32_t *)from, dy->t / 2, 1, values, padded, back, padded, 0);
                    pairs_of_rows(query_rows, query, q->t, rows, C, rows + rows % 2);
                    pairs_of_rows(dy_rows, from, dy->t, rows, C, rows + rows % 2);
                    for (int64_t r = 0; r < rows + rows % 2; r++) {
                        float logarithm = 0, inner = 0; /* the mean change of a row's scores, sum over c of dy y */
                        if (r < rows) {
                            logarithm = lse[(b * H + h) * T + first + r];
                            inner = inner_product(from + r * dy->t, result + r * y->t, C);
                        }
                        for (int64_t j = 0; j < width; j += 16) {
                            __mmask16 mask = r < rows ? seen(first + r, j) : 0;
                            __m512 x = _mm512_loadu_ps(score + r * padded + j),
                                   g = _mm512_loadu_ps(back + r * padded + j);
                            x = _mm512_fmsub_ps(x, _mm512_set1_ps(scale), _mm512_set1_ps(logarithm));
                            x = _mm512_maskz_mov_ps(mask, exponential(x));
                            g = _mm512_mul_ps(_mm512_mul_ps(x, _mm512_sub_ps(g, _mm512_set1_ps(inner))),
                                              _mm512_set1_ps(scale));
                            g = _mm512_maskz_mov_ps(mask, g);
                            __m256i p = (__m256i)_mm512_cvtneps_pbh(x), d = (__m256i)_mm512_cvtneps_pbh(g);
                            __m512i wide_p = _mm512_cvtepu16_epi32(p), wide_d = _mm512_cvtepu16_epi32(d);
                            uint32_t *to_p = weight_pairs + r / 2 * padded + j,
                                     *to_d = change_pairs + r / 2 * padded + j;
                            if (r % 2) { /* the second of a pair goes above the first */
                                wide_p = _mm512_or_si512(_mm512_loadu_si512(to_p), _mm512_slli_epi32(wide_p, 16));
                                wide_d = _mm512_or_si512(_mm512_loadu_si512(to_d), _mm512_slli_epi32(wide_d, 16));
                            }
                            _mm512_storeu_si512(to_p, wide_p);
                            _mm512_storeu_si512(to_d, wide_d);
                            _mm256_storeu_si256((__m256i *)(change + r * padded + j), d);
                        }
                    }
                    int64_t pairs = (rows + 1) / 2;
                    product(rows, C, width / 2, (const uint32_t *)change, padded / 2, 1, key_rows, C, sum, C, 0);
                    round_rows(dq->data + b * dq->b + h * dq->h + first * dq->t, dq->t, sum, rows, C, NULL);
                    product(width, C, pairs, change_pairs, 1, padded, query_rows, C, key_sum, C, 1);
                    product(width, C, pairs, weight_pairs, 1, padded, dy_rows, C, value_sum, C, 1);
                }
            round_rows(dk->data + b * dk->b + head * dk->h, dk->t, key_sum, T, C, NULL);
            round_rows(dv->data + b * dv->b + head * dv->h, dv->t, value_sum, T, C, NULL);
        }
        free(memory);
    }
    return failed;
}

int attends_in_bf16(void) { return 1; }
#else
int attention(void) { return 1; } /* never called: */
int attention_grad(void) { return 1; }
int attends_in_bf16(void) { return 0; }
#endif
