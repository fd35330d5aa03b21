/* The token shift, forward and backward, each one pass: see reference.py. Threads share the tokens out. */
#include "altx.h"

typedef struct {
    const real *x, *mix, *initial; /* (tokens, width), (count, width), (rows, width) or NULL */
    const uint8_t *reset;          /* (tokens) or NULL */
    int64_t tokens, length, width, count;
} Inputs;

/* The row before token i of its sequence, or NULL for zeros. */
INLINE const real *before_of(const Inputs *in, int64_t i) {
    if (in->reset && in->reset[i]) return NULL;
    if (i % in->length) return in->x + (i - 1) * in->width;
    return in->initial ? in->initial + i / in->length * in->width : NULL;
}

INLINE vec optional(const real *row, int64_t at, int64_t lanes) {
    return row ? vload_n(row + at, lanes) : vset(0);
}

#define INPUTS                                                                                                         \
    const real *x, const real *mix, const real *initial, const uint8_t *reset, int64_t tokens, int64_t length,         \
        int64_t width, int64_t count
#define GATHERED {x, mix, initial, reset, tokens, length, width, count}

/* y (count, tokens, width). */
EXPORT void FN(shift)(INPUTS, real *y, int64_t threads) {
    const Inputs in = GATHERED;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t id = omp_get_thread_num(), all = omp_get_num_threads();
        for (int64_t i = tokens * id / all; i < tokens * (id + 1) / all; i++) {
            const real *before = before_of(&in, i);
            for (int64_t d = 0; d < width; d += LANES) {
                int64_t lanes = width - d;
                vec now = vload_n(x + i * width + d, lanes), change = optional(before, d, lanes) - now;
                for (int64_t n = 0; n < count; n++)
                    vstore_n(y + (n * tokens + i) * width + d, now + vload_n(mix + n * width + d, lanes) * change, lanes);
            }
        }
    }
}

/* What token i gives to the gradient of the one before: sum over n of mix_n dy_n. */
INLINE vec passed_on(const Inputs *in, const real *dy, int64_t i, int64_t d, int64_t lanes) {
    vec sum = vset(0);
    for (int64_t n = 0; n < in->count; n++)
        sum += vload_n(dy + (n * in->tokens + i) * in->width + d, lanes) * vload_n(in->mix + n * in->width + d, lanes);
    return sum;
}

/* dx (tokens, width); dmix (threads, count, width), zeros at first; dinitial (rows, width); carried (threads, width). */
EXPORT void FN(shift_backward)(INPUTS, const real *dy, real *dx, real *dmix, real *dinitial, real *carried,
                               int64_t threads) {
    const Inputs in = GATHERED;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t id = omp_get_thread_num(), all = omp_get_num_threads();
        int64_t low = tokens * id / all, high = tokens * (id + 1) / all;
        real *own = dmix + id * count * width, *carry = carried + id * width;
        for (int64_t i = high - 1; i >= low; i--) {
            const real *before = before_of(&in, i);
            int first = i % length == 0, followed = (i + 1) % length && !(reset && reset[i + 1]);
            for (int64_t d = 0; d < width; d += LANES) {
                int64_t lanes = width - d;
                vec now = vload_n(x + i * width + d, lanes), change = optional(before, d, lanes) - now;
                vec total = vset(0), passed = vset(0);
                if (followed)
                    total = i == high - 1 ? passed_on(&in, dy, i + 1, d, lanes) : vload_n(carry + d, lanes);
                for (int64_t n = 0; n < count; n++) {
                    vec g = vload_n(dy + (n * tokens + i) * width + d, lanes);
                    vec share = g * vload_n(mix + n * width + d, lanes);
                    total += g - share;
                    passed += share;
                    real *sum = own + n * width + d;
                    vstore_n(sum, vload_n(sum, lanes) + g * change, lanes);
                }
                vstore_n(dx + i * width + d, total, lanes);
                vstore_n(carry + d, passed, lanes);
                if (first)
                    vstore_n(dinitial + i / length * width + d, reset && reset[i] ? vset(0) : passed, lanes);
            }
        }
    }
}
