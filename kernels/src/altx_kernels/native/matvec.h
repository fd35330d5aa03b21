/* Matrix-vector products, for ops that compute one token: they read every weight once and compute next to nothing with
 * it, so what matters is to read them in order, on all threads. */
#ifndef MATVEC_H
#define MATVEC_H

#include "altx.h"

/* a . b over n numbers. */
INLINE real dot(const real *a, const real *b, int64_t n) {
    vec s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES) {
        s0 += vload(a + i) * vload(b + i);
        s1 += vload(a + i + LANES) * vload(b + i + LANES);
        s2 += vload(a + i + 2 * LANES) * vload(b + i + 2 * LANES);
        s3 += vload(a + i + 3 * LANES) * vload(b + i + 3 * LANES);
    }
    for (; i < n; i += LANES) s0 += vload_n(a + i, n - i) * vload_n(b + i, n - i);
    return vsum((s0 + s1) + (s2 + s3));
}

/* Where the share of thread `part` of n things begins, and that of the one before it ends; whole units of them. */
INLINE int64_t share(int64_t n, int64_t unit, int64_t part, int64_t parts) {
    const int64_t from = (n + unit - 1) / unit * part / parts * unit;
    return from < n ? from : n;
}

/* y = W x + b for rows from .. to of W, of `width` numbers each, for every row of the batch: x and y advance by their
 * strides. TOGETHER rows of W at a time: x is loaded once for them, and memory is asked for several places at once.
 * They lie far apart, so that each is a stream of its own: neighbours end before the prefetcher has found their pace. */
enum { TOGETHER = 8 };

static inline void product(const real *weight, const real *bias, const real *x, int64_t x_stride, real *y,
                           int64_t y_stride, int64_t rows, int64_t from, int64_t to, int64_t width) {
    const int64_t apart = (to - from) / TOGETHER;
    int64_t i = from;
    for (; i < from + apart; i++) {
        const real *w = weight + i * width;
        for (int64_t row = 0; row < rows; row++) {
            const real *in = x + row * x_stride;
            vec sums[TOGETHER] = {{0}};
            int64_t j = 0;
            for (; j + LANES <= width; j += LANES) {
                vec v = vload(in + j);
                for (int r = 0; r < TOGETHER; r++) sums[r] += vload(w + r * apart * width + j) * v;
            }
            if (j < width) {
                vec v = vload_n(in + j, width - j);
                for (int r = 0; r < TOGETHER; r++) sums[r] += vload_n(w + r * apart * width + j, width - j) * v;
            }
            for (int r = 0; r < TOGETHER; r++)
                y[row * y_stride + i + r * apart] = vsum(sums[r]) + (bias ? bias[i + r * apart] : 0);
        }
    }
    i = from + apart * TOGETHER;
    for (; i < to; i++)
        for (int64_t row = 0; row < rows; row++)
            y[row * y_stride + i] = dot(weight + i * width, x + row * x_stride, width) + (bias ? bias[i] : 0);
}

#endif
