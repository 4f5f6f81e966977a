/* The layers around the products: RMSNorm, rotary positions, SwiGLU, and the cross-entropy of rows of logits.
 *
 * One pass over memory each, float32 inside, and what plain torch rounds on the way (kernels/layers.py) is rounded
 * here too. Loops are plain: the compiler makes vectors of them.
 */
#include "common.h"

/* Each loop once for every dtype, a constant to the compiler. */
#define BY_DTYPE(call)         \
    if (dtype == BF16) {       \
        enum { DTYPE = BF16 }; \
        call;                  \
    } else if (dtype == F16) { \
        enum { DTYPE = F16 };  \
        call;                  \
    } else {                   \
        enum { DTYPE = F32 };  \
        call;                  \
    }

INLINE float get(const void *x, int64_t i, const int dtype) {
    if (dtype == F32) return ((const float *)x)[i];
    return dtype == BF16 ? from_bf16(((const uint16_t *)x)[i]) : from_f16(((const uint16_t *)x)[i]);
}
INLINE void put(void *x, int64_t i, float v, const int dtype) {
    if (dtype == F32) ((float *)x)[i] = v;
    else ((uint16_t *)x)[i] = to_16(v, dtype);
}

/* e^x: 2^n e^r with |r| <= ln 2 / 2, and the series of e^r to its sixth power. */
INLINE float exponential(float x) {
    x = x < -87 ? -87 : x > 88 ? 88 : x;
    float n = rintf(x * 1.44269504f), r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float sum = 1 + r * (1 + r * (0.5f + r * (1.0f / 6 + r * (1.0f / 24 + r * (1.0f / 120 + r * (1.0f / 720))))));
    return sum * float_of((uint32_t)((int32_t)n + 127) << 23);
}

/* ---- RMSNorm ---- */

enum { WIDE = 16 }; /* partial sums, so that a sum can be taken by vectors */

INLINE void norm_row(const void *x, const void *weight, void *y, float *rstd, int64_t row, int64_t D, float eps,
                     const int dtype) {
    float sum[WIDE] = {0}, total = 0;
    int64_t first = row * D, i = 0;
    for (; i + WIDE <= D; i += WIDE)
        for (int j = 0; j < WIDE; j++) {
            float v = get(x, first + i + j, dtype);
            sum[j] += v * v;
        }
    for (; i < D; i++) {
        float v = get(x, first + i, dtype);
        total += v * v;
    }
    for (int j = 0; j < WIDE; j++) total += sum[j];
    float by = rstd[row] = 1 / sqrtf(total / (float)D + eps);
    for (i = 0; i < D; i++)
        put(y, first + i, rounded(get(x, first + i, dtype) * by, dtype) * get(weight, i, dtype), dtype);
}

void rms_norm(const void *x, const void *weight, void *y, float *rstd, int64_t rows, int64_t D, float eps, int dtype,
              int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) BY_DTYPE(norm_row(x, weight, y, rstd, row, D, eps, DTYPE))
}

/* With h = x rstd and g = dy weight: dx = rstd (g - h mean(g h)). */
INLINE void norm_grad_row(const void *dy, const void *x, const void *weight, const float *rstd, void *dx, int64_t row,
                          int64_t D, const int dtype) {
    float sum[WIDE] = {0}, total = 0, by = rstd[row];
    int64_t first = row * D, i = 0;
    for (; i + WIDE <= D; i += WIDE)
        for (int j = 0; j < WIDE; j++)
            sum[j] += get(dy, first + i + j, dtype) * get(weight, i + j, dtype) * get(x, first + i + j, dtype);
    for (; i < D; i++) total += get(dy, first + i, dtype) * get(weight, i, dtype) * get(x, first + i, dtype);
    for (int j = 0; j < WIDE; j++) total += sum[j];
    float share = total * by * by * by / (float)D;
    for (i = 0; i < D; i++)
        put(dx, first + i, get(dy, first + i, dtype) * get(weight, i, dtype) * by - get(x, first + i, dtype) * share,
            dtype);
}

void rms_norm_grad(const void *dy, const void *x, const void *weight, const float *rstd, void *dx, int64_t rows,
                   int64_t D, int dtype, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) BY_DTYPE(norm_grad_row(dy, x, weight, rstd, dx, row, D, DTYPE))
}

/* ---- rotary positions: x and y are (B, H, T, C) with strides of their own, and dense channels ---- */

INLINE void rotate_token(const void *x, void *y, int64_t from, int64_t to, const float *cosine, const float *sine,
                         float sign, int64_t half, const int dtype) {
    for (int64_t c = 0; c < half; c++) {
        float first = get(x, from + c, dtype), second = get(x, from + half + c, dtype), s = sign * sine[c];
        put(y, to + c, first * cosine[c] - second * s, dtype);
        put(y, to + half + c, second * cosine[c] + first * s, dtype);
    }
}

/* The angles of batch b and token t start at b * angles + t * C / 2; `angles` is 0 where all batches share them. */
void rotate(const void *x, const int64_t *x_strides, void *y, const int64_t *y_strides, const float *cosine,
            const float *sine, int64_t angles, float sign, int64_t B, int64_t H, int64_t T, int64_t C, int dtype,
            int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t token = 0; token < B * T; token++) {
        int64_t b = token / T, t = token % T, at = b * angles + t * (C / 2);
        for (int64_t h = 0; h < H; h++) {
            int64_t from = b * x_strides[0] + h * x_strides[1] + t * x_strides[2];
            int64_t to = b * y_strides[0] + h * y_strides[1] + t * y_strides[2];
            BY_DTYPE(rotate_token(x, y, from, to, cosine + at, sine + at, sign, C / 2, DTYPE))
        }
    }
}

/* ---- SwiGLU ---- */

enum { RUN = 4096 }; /* entries that a thread takes at once */

INLINE void swiglu_run(const void *restrict gate, const void *restrict up, void *restrict y, int64_t first,
                       int64_t last, const int dtype) {
    for (int64_t i = first; i < last; i++) {
        float g = get(gate, i, dtype), silu = rounded(g / (1 + exponential(-g)), dtype);
        put(y, i, silu * get(up, i, dtype), dtype);
    }
}

void swiglu(const void *gate, const void *up, void *y, int64_t n, int dtype, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t first = 0; first < n; first += RUN)
        BY_DTYPE(swiglu_run(gate, up, y, first, MIN(first + RUN, n), DTYPE))
}

INLINE void swiglu_grad_run(const void *restrict dy, const void *restrict gate, const void *restrict up,
                            void *restrict dgate, void *restrict dup, int64_t first, int64_t last, const int dtype) {
    for (int64_t i = first; i < last; i++) {
        float g = get(gate, i, dtype), d = get(dy, i, dtype), share = 1 / (1 + exponential(-g));
        put(dup, i, rounded(g * share, dtype) * d, dtype);
        put(dgate, i, rounded(d * get(up, i, dtype), dtype) * share * (1 + g * (1 - share)), dtype);
    }
}

void swiglu_grad(const void *dy, const void *gate, const void *up, void *dgate, void *dup, int64_t n, int dtype,
                 int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t first = 0; first < n; first += RUN)
        BY_DTYPE(swiglu_grad_run(dy, gate, up, dgate, dup, first, MIN(first + RUN, n), DTYPE))
}

/* ---- cross-entropy of a row of V logits ---- */

INLINE float cross_entropy_row(void *row, int64_t V, int64_t target, int gradient, const int dtype) {
    float most[WIDE], sum[WIDE] = {0}, largest = -INFINITY, total = 0;
    int64_t i = 0;
    for (int j = 0; j < WIDE; j++) most[j] = -INFINITY;
    for (; i + WIDE <= V; i += WIDE)
        for (int j = 0; j < WIDE; j++) {
            float v = get(row, i + j, dtype);
            most[j] = v > most[j] ? v : most[j];
        }
    for (; i < V; i++) {
        float v = get(row, i, dtype);
        largest = v > largest ? v : largest;
    }
    for (int j = 0; j < WIDE; j++) largest = most[j] > largest ? most[j] : largest;
    for (i = 0; i + WIDE <= V; i += WIDE)
        for (int j = 0; j < WIDE; j++) sum[j] += exponential(get(row, i + j, dtype) - largest);
    for (; i < V; i++) total += exponential(get(row, i, dtype) - largest);
    for (int j = 0; j < WIDE; j++) total += sum[j];
    float logarithm = logf(total), at_target = get(row, target, dtype) - largest;
    if (gradient) {
        float scale = 1 / total, p = exponential(at_target) * scale;
        for (i = 0; i < V; i++) put(row, i, exponential(get(row, i, dtype) - largest) * scale, dtype);
        put(row, target, p - 1, dtype);
    }
    return logarithm - at_target;
}

/* The loss of each row, 0 where its target is negative; with `gradient` the logits become that of their loss. */
void cross_entropy(void *logits, const int64_t *targets, float *losses, int64_t rows, int64_t V, int gradient,
                   int dtype, int threads) {
    int64_t bytes = dtype == F32 ? 4 : 2;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        void *row = (char *)logits + r * V * bytes;
        losses[r] = 0;
        if (targets[r] >= 0) BY_DTYPE(losses[r] = cross_entropy_row(row, V, targets[r], gradient, DTYPE))
        else if (gradient) memset(row, 0, (size_t)(V * bytes));
    }
}
