/* One token of Mamba-1 for each row, from its projection in to its projection out. Letters as in reference.py. */
#include <math.h>

#include "altx.h"
#include "matvec.h"
#include "pre_norm.h"
#include "short_conv.h"

/* Divide n numbers by the root of their mean square. */
static void normalise(real *x, int64_t n, real eps) {
    real scale = 1 / (real)sqrt(dot(x, x, n) / n + eps);
    for (int64_t i = 0; i < n; i++) x[i] *= scale;
}

/* The recurrence and the gate for channels from .. to; s holds [low | B | C]. */
static void recur(const real *s, const real *v, const real *z, const real *dt_weight, const real *dt_bias,
                  const real *A_log, const real *D, real *h, real *y, int64_t from, int64_t to, int64_t N, int64_t R) {
    const real *B = s + R, *C = B + N;
    for (int64_t e = from; e < to; e += LANES) {
        int64_t count = to - e < LANES ? to - e : LANES;
        real raw[LANES], out[LANES];
        memset(raw, 0, sizeof raw);
        for (int64_t i = 0; i < count; i++) raw[i] = dot(dt_weight + (e + i) * R, s, R) + dt_bias[e + i];
        vec dt = vsoftplus(vload(raw));
        for (int64_t i = 0; i < count; i++) {
            const real *a = A_log + (e + i) * N;
            real *state = h + (e + i) * N;
            vec step = vset(dt[i]), input = vset(dt[i] * v[e + i]), sum = {0};
            for (int64_t n = 0; n < N; n += LANES) {
                vec A = -vexp(vload_n(a + n, N - n));
                vec next = vexp(step * A) * vload_n(state + n, N - n) + input * vload_n(B + n, N - n);
                vstore_n(state + n, next, N - n);
                sum += next * vload_n(C + n, N - n);
            }
            out[i] = vsum(sum);
        }
        vec gate = vload_n(z + e, count), x = vload_n(v + e, count);
        vec sum = vload_n(out, count) + vload_n(D + e, count) * x;
        vstore_n(y + e, sum * (gate * vsigmoid(gate)), count);
    }
}

/* x (rows, M); past (rows, K-1, E) and h (rows, E, N), both moved on in place; y (rows, M). work holds, for every row,
 * v (E), s (R + 2N), z (E) and first u, then what leaves the gate (E). eps < 0: no norm on low, B and C. */
EXPORT void FN(step)(const real *x, real *past, real *h, const real *in_weight, const real *in_bias,
                     const real *conv_weight, const real *conv_bias, const real *x_weight, const real *dt_weight,
                     const real *dt_bias, const real *A_log, const real *D, const real *out_weight,
                     const real *out_bias, const real *pre_weight, real *work, real *y, int64_t *seen, int64_t rows,
                     int64_t M, int64_t E, int64_t N, int64_t K, int64_t R, double eps, double pre_eps, int64_t threads) {
    const int64_t S = R + 2 * N, stride = 3 * E + S;
    real *v = work, *s = v + E, *z = s + S, *u = z + E;
    for (int64_t row = 0; seen && row < rows; row++) seen[row]++;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        unsigned before = flush_denormals();
        const int64_t parts = omp_get_num_threads(), part = omp_get_thread_num();
        const real *in = normed(x, pre_weight, (real)pre_eps, work + rows * stride + part * rows * M, rows, M);
        /* A thread keeps its channels throughout. */
        const int64_t from = share(E, LANES, part, parts), to = share(E, LANES, part + 1, parts);
        product(in_weight, in_bias, in, M, u, stride, rows, from, to, M);
        product(in_weight + E * M, in_bias ? in_bias + E : in_bias, in, M, z, stride, rows, from, to, M);
        for (int64_t row = 0; row < rows; row++)
            convolve(u + row * stride, past + row * (K - 1) * E, conv_weight, conv_bias, v + row * stride, from, to, E,
                     K);
#pragma omp barrier
        product(x_weight, NULL, v, stride, s, stride, rows, S * part / parts, S * (part + 1) / parts, E);
#pragma omp barrier
        if (eps >= 0) {
            for (int64_t row = part; row < rows; row += parts) {
                normalise(s + row * stride, R, (real)eps);
                normalise(s + row * stride + R, N, (real)eps);
                normalise(s + row * stride + R + N, N, (real)eps);
            }
#pragma omp barrier
        }
        for (int64_t row = 0; row < rows; row++)
            recur(s + row * stride, v + row * stride, z + row * stride, dt_weight, dt_bias, A_log, D, h + row * E * N,
                  u + row * stride, from, to, N, R);
#pragma omp barrier
        product(out_weight, out_bias, u, stride, y, M, rows, M * part / parts, M * (part + 1) / parts, E);
        if (pre_weight) add(y, x, rows, M, M * part / parts, M * (part + 1) / parts);
        restore_denormals(before);
    }
}
