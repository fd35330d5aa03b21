/* What stands before and behind the linear recurrence of Mamba-2, one pass over memory each.
 *
 *     v = dt x,   y += D x;   backward: dx = dt dv + D dy,   ddt = sum_p x dv,   dD = sum x dy
 *
 * x, v, y (R, H, P), R tokens of all rows; those of x lie x_row apart. dt (R, H), D (H).
 */
#include "altx.h"

/* Tokens whose part of D's gradient is summed up by itself, whatever the number of threads. */
#define BLOCK 32

EXPORT void FN(scale)(
    const real *x, int64_t x_row, const real *dt, real *v, int64_t R, int64_t H, int64_t P, int64_t threads
) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < R; i++)
        for (int64_t h = 0; h < H; h++) {
            const real *from = x + i * x_row + h * P, factor = dt[i * H + h];
            real *restrict to = v + (i * H + h) * P;
            for (int64_t p = 0; p < P; p++) to[p] = factor * from[p];
        }
}

EXPORT void FN(skip)(
    real *y, const real *x, int64_t x_row, const real *D, int64_t R, int64_t H, int64_t P, int64_t threads
) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < R; i++)
        for (int64_t h = 0; h < H; h++) {
            const real *from = x + i * x_row + h * P, factor = D[h];
            real *restrict to = y + (i * H + h) * P;
            for (int64_t p = 0; p < P; p++) to[p] += factor * from[p];
        }
}

/* A token's gradients; dD: its block's part of the sum. */
INLINE void backward_token(
    const real *dv, const real *dy, const real *x, const real *dt, const real *D, real *restrict dx, real *restrict ddt,
    real *restrict dD, int64_t H, int64_t P, int skip
) {
    for (int64_t h = 0; h < H; h++) {
        vec own = vset(0), skipped = vset(0);
        for (int64_t p = h * P; p < (h + 1) * P; p += LANES) {
            const int64_t n = (h + 1) * P - p;
            vec a = vload_n(dv + p, n), b = vload_n(x + p, n), d = a * dt[h];
            own += a * b;
            if (skip) {
                vec c = vload_n(dy + p, n);
                skipped += c * b;
                d += c * D[h];
            }
            vstore_n(dx + p, d, n);
        }
        ddt[h] = vsum(own);
        if (skip) dD[h] += vsum(skipped);
    }
}

/* dv, dy, dx (R, H, P); ddt (R, H); dD (H); parts (ceil(R / BLOCK), H): scratch. Without D, D and dy are not looked
 * at. */
EXPORT void FN(ssd_backward)(
    const real *dv, const real *dy, const real *x, int64_t x_row, const real *dt, const real *D, real *dx, real *ddt,
    real *parts, real *dD, int64_t R, int64_t H, int64_t P, int64_t threads
) {
    const int64_t blocks = (R + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t b = 0; b < blocks; b++) {
        real *part = parts + b * H;
        memset(part, 0, (size_t)H * sizeof(real));
        for (int64_t i = b * BLOCK; i < R && i < (b + 1) * BLOCK; i++) {
            const int64_t at = i * H * P;
            if (D)
                backward_token(dv + at, dy + at, x + i * x_row, dt + i * H, D, dx + at, ddt + i * H, part, H, P, 1);
            else
                backward_token(dv + at, dv + at, x + i * x_row, dt + i * H, dt, dx + at, ddt + i * H, part, H, P, 0);
        }
    }
    for (int64_t h = 0; D && h < H; h++) {
        dD[h] = 0;
        for (int64_t b = 0; b < blocks; b++) dD[h] += parts[b * H + h];
    }
}
