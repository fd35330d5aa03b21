/* One token of a short causal convolution, channel by channel. */
#ifndef SHORT_CONV_H
#define SHORT_CONV_H

#include "altx.h"

/* v = silu(conv(u)) for channels from .. to of E, and the window `past` (K-1, E) moves on; weight (E, K), bias (E) or
 * NULL. */
static inline void convolve(const real *u, real *past, const real *weight, const real *bias, real *v, int64_t from,
                            int64_t to, int64_t E, int64_t K) {
    for (int64_t e = from; e < to; e++) {
        real y = (bias ? bias[e] : 0) + weight[e * K + K - 1] * u[e];
        for (int64_t j = 0; j < K - 1; j++) y += weight[e * K + j] * past[j * E + e];
        v[e] = y;
        for (int64_t j = 0; j + 1 < K - 1; j++) past[j * E + e] = past[(j + 1) * E + e];
        if (K > 1) past[(K - 2) * E + e] = u[e];
    }
    for (int64_t e = from; e < to; e += LANES) {
        vec x = vload_n(v + e, to - e);
        vstore_n(v + e, x * vsigmoid(x), to - e);
    }
}

#endif
