/* RMSNorm over groups of channels with a gate silu(z) before or after it, one pass over memory each way.
 *
 * A group is read twice, the second time from the first cache. With u = y silu(z) where the gate comes first, else y:
 *     r = 1 / sqrt(mean u^2 + eps),   out = weight u r (silu(z) where the gate comes last)
 * and, with q what is multiplied with u r in the sum of out's gradients, g weight (silu(z)),
 *     du = r q - r^3 u mean(u q).
 */
#include "altx.h"

/* Rows whose part of the weight's gradient is summed up by itself, whatever the number of threads. */
#define BLOCK 32

enum { PLAIN, GATE_FIRST, GATE_LAST };

INLINE real inverse_root(real x) {
    return 1 / (sizeof(real) == 8 ? (real)__builtin_sqrt(x) : (real)__builtin_sqrtf((float)x));
}

INLINE void forward_group(
    const real *y, const real *z, const real *weight, real *restrict out, int64_t size, real eps, int gate
) {
    vec squares = vset(0);
    for (int64_t d = 0; d < size; d += LANES) {
        const int64_t n = size - d;
        vec u = vload_n(y + d, n);
        if (gate == GATE_FIRST) {
            vec x = vload_n(z + d, n);
            u *= x * vsigmoid(x);
            vstore_n(out + d, u, n);
        }
        squares += u * u;
    }
    const real r = inverse_root(vsum(squares) / (real)size + eps);
    for (int64_t d = 0; d < size; d += LANES) {
        const int64_t n = size - d;
        vec u = vload_n((gate == GATE_FIRST ? out : y) + d, n) * r * vload_n(weight + d, n);
        if (gate == GATE_LAST) {
            vec x = vload_n(z + d, n);
            u *= x * vsigmoid(x);
        }
        vstore_n(out + d, u, n);
    }
}

INLINE void forward_row(
    const real *y, const real *z, const real *weight, real *out, int64_t E, int64_t size, real eps, int gate
) {
    for (int64_t d = 0; d < E; d += size) forward_group(y + d, z + d, weight + d, out + d, size, eps, gate);
}

/* y, z (R, E), rows y_row and z_row apart; z may be NULL; weight (E). out (R, E). */
EXPORT void FN(norm)(
    const real *y, int64_t y_row, const real *z, int64_t z_row, const real *weight, real *out, int64_t R, int64_t E,
    int64_t size, int64_t gate_first, double eps, int64_t threads
) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        unsigned denormals = flush_denormals();
#pragma omp for schedule(static)
        for (int64_t i = 0; i < R; i++) {
            const real *row = y + i * y_row;
            if (!z)
                forward_row(row, row, weight, out + i * E, E, size, (real)eps, PLAIN);
            else if (gate_first)
                forward_row(row, z + i * z_row, weight, out + i * E, E, size, (real)eps, GATE_FIRST);
            else
                forward_row(row, z + i * z_row, weight, out + i * E, E, size, (real)eps, GATE_LAST);
        }
        restore_denormals(denormals);
    }
}

INLINE void backward_group(
    const real *g, const real *y, const real *z, const real *weight, real *restrict dy, real *restrict dz,
    real *restrict dweight, int64_t size, real eps, int gate
) {
    vec squares = vset(0), products = vset(0);
    for (int64_t d = 0; d < size; d += LANES) {
        const int64_t n = size - d;
        vec u = vload_n(y + d, n), q = vload_n(g + d, n) * vload_n(weight + d, n);
        if (gate != PLAIN) {
            vec x = vload_n(z + d, n), s = vsigmoid(x);
            if (gate == GATE_FIRST)
                u *= x * s;
            else
                q *= x * s;
            vstore_n(dz + d, s, n); /* for the second time */
        }
        squares += u * u;
        products += u * q;
    }
    const real r = inverse_root(vsum(squares) / (real)size + eps);
    const real pull = r * (r * (r * (vsum(products) / (real)size)));
    for (int64_t d = 0; d < size; d += LANES) {
        const int64_t n = size - d;
        vec own = vload_n(y + d, n), dout = vload_n(g + d, n), w = vload_n(weight + d, n), u = own, q = dout * w;
        vec silu = vset(1), slope = vset(0);
        if (gate != PLAIN) {
            vec x = vload_n(z + d, n), s = vload_n(dz + d, n);
            silu = x * s;
            slope = s + silu * (1 - s);
        }
        if (gate == GATE_FIRST) u *= silu;
        if (gate == GATE_LAST) q *= silu, dout *= silu;
        vec du = q * r - u * pull;
        if (gate == GATE_FIRST) vstore_n(dz + d, du * own * slope, n);
        if (gate == GATE_LAST) vstore_n(dz + d, vload_n(g + d, n) * w * own * r * slope, n);
        vstore_n(dy + d, gate == GATE_FIRST ? du * silu : du, n);
        vstore_n(dweight + d, vload_n(dweight + d, n) + dout * u * r, n);
    }
}

INLINE void backward_row(
    const real *g, const real *y, const real *z, const real *weight, real *dy, real *dz, real *dweight, int64_t E,
    int64_t size, real eps, int gate
) {
    for (int64_t d = 0; d < E; d += size)
        backward_group(g + d, y + d, z + d, weight + d, dy + d, dz + d, dweight + d, size, eps, gate);
}

/* As above, and g (R, E), the gradient of out, rows g_row apart. dy, dz (R, E), dz unused without z; dweight (E).
 * parts (ceil(R / BLOCK), E): scratch. */
EXPORT void FN(norm_backward)(
    const real *g, int64_t g_row, const real *y, int64_t y_row, const real *z, int64_t z_row, const real *weight,
    real *dy, real *dz, real *parts, real *dweight, int64_t R, int64_t E, int64_t size, int64_t gate_first, double eps,
    int64_t threads
) {
    const int64_t blocks = (R + BLOCK - 1) / BLOCK;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        unsigned denormals = flush_denormals();
#pragma omp for schedule(static)
        for (int64_t b = 0; b < blocks; b++) {
            real *part = parts + b * E;
            memset(part, 0, (size_t)E * sizeof(real));
            for (int64_t i = b * BLOCK; i < R && i < (b + 1) * BLOCK; i++) {
                const real *gi = g + i * g_row, *yi = y + i * y_row, *zi = z + i * z_row;
                if (!z)
                    backward_row(gi, yi, yi, weight, dy + i * E, dy + i * E, part, E, size, (real)eps, PLAIN);
                else if (gate_first)
                    backward_row(gi, yi, zi, weight, dy + i * E, dz + i * E, part, E, size, (real)eps, GATE_FIRST);
                else
                    backward_row(gi, yi, zi, weight, dy + i * E, dz + i * E, part, E, size, (real)eps, GATE_LAST);
            }
        }
#pragma omp for schedule(static)
        for (int64_t d = 0; d < E; d += LANES) {
            vec sum = vset(0);
            for (int64_t b = 0; b < blocks; b++) sum += vload_n(parts + b * E + d, E - d);
            vstore_n(dweight + d, sum, E - d);
        }
        restore_denormals(denormals);
    }
}
