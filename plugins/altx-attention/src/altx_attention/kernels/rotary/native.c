/* Rotary position embedding, one pass over memory: planes of two features of every head are turned.
 *
 * A plane is features i and i + E, or 2 i and 2 i + 1. The gradient is the turn back.
 */
#include "altx.h"

INLINE void halves(const real *x, const real *cosine, const real *sine, real sign, real *restrict y, int64_t E) {
    for (int64_t i = 0; i < E; i += LANES) {
        const int64_t n = E - i;
        const vec a = vload_n(x + i, n), b = vload_n(x + E + i, n);
        const vec c = vload_n(cosine + i, n), s = sign * vload_n(sine + i, n);
        vstore_n(y + i, a * c - b * s, n);
        vstore_n(y + E + i, b * c + a * s, n);
    }
}

INLINE void neighbours(const real *x, const real *cosine, const real *sine, real sign, real *restrict y, int64_t E) {
    for (int64_t i = 0; i < E; i++) {
        const real a = x[2 * i], b = x[2 * i + 1], c = cosine[i], s = sign * sine[i];
        y[2 * i] = a * c - b * s;
        y[2 * i + 1] = b * c + a * s;
    }
}

/* x (B, T, H, D), sb, st and sh apart; cosine and sine (B, T, E) or, with shared, (T, E). y (B, T, H, D). */
EXPORT void FN(rotary)(
    const real *x, int64_t sb, int64_t st, int64_t sh, const real *cosine, const real *sine, real *y, int64_t B,
    int64_t T, int64_t H, int64_t D, int64_t E, int64_t first, int64_t interleave, int64_t shared, double sign,
    int64_t threads
) {
    const int64_t last = first + 2 * E;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t row = 0; row < B * T; row++) {
        const int64_t b = row / T, t = row % T, angle = (shared ? t : row) * E;
        for (int64_t h = 0; h < H; h++) {
            const real *from = x + b * sb + t * st + h * sh;
            real *to = y + (row * H + h) * D;
            if (first) memcpy(to, from, (size_t)first * sizeof(real));
            if (interleave)
                neighbours(from + first, cosine + angle, sine + angle, (real)sign, to + first, E);
            else
                halves(from + first, cosine + angle, sine + angle, (real)sign, to + first, E);
            if (last < D) memcpy(to + last, from + last, (size_t)(D - last) * sizeof(real));
        }
    }
}
