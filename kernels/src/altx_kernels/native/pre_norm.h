/* The norm before a layer and the residual around it, for ops that compute one token of a few rows. */
#ifndef PRE_NORM_H
#define PRE_NORM_H

#include "matvec.h"

/* x (rows, n) over the root of its mean square, times weight (n), put into `room` (rows, n); x itself without weight. */
static inline const real *normed(const real *x, const real *weight, real eps, real *room, int64_t rows, int64_t n) {
    if (!weight) return x;
    for (int64_t row = 0; row < rows; row++) {
        const real *in = x + row * n;
        const vec scale = vset(1 / (real)__builtin_sqrt(dot(in, in, n) / (real)n + eps));
        for (int64_t i = 0; i < n; i += LANES)
            vstore_n(room + row * n + i, vload_n(in + i, n - i) * scale * vload_n(weight + i, n - i), n - i);
    }
    return room;
}

/* y += x in columns from .. to of both (rows, n). */
static inline void add(real *y, const real *x, int64_t rows, int64_t n, int64_t from, int64_t to) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = from; i < to; i++) y[row * n + i] += x[row * n + i];
}

#endif
