/* One token of Mamba-2 for each row, from its projection in to its projection out. Letters as in reference.py.
 *
 * A head's state is large. It is read and written once, row by row, with what goes in and what comes out in registers.
 */
#include "altx.h"
#include "matvec.h"
#include "pre_norm.h"
#include "short_conv.h"

/* Vectors of a state's row at a time. */
enum { WIDE = 4 };

/* `vectors` columns of vectors of a head: h (N, P) moves on, and y = (C h + D v) silu(z) takes the place of z. `count`
 * numbers are in them, fewer than would fit where it is one vector. */
INLINE void columns(real *h, const real *B, const real *C, const real *v, real *z, real dt, real decay, real D,
                    int64_t N, int64_t P, int vectors, int64_t count) {
    vec in[WIDE], sum[WIDE];
    for (int i = 0; i < vectors; i++) {
        in[i] = dt * vload_n(v + i * LANES, count - i * LANES);
        sum[i] = vset(0);
    }
    for (int64_t n = 0; n < N; n++) {
        real *row = h + n * P;
        for (int i = 0; i < vectors; i++) {
            vec next = decay * vload_n(row + i * LANES, count - i * LANES) + B[n] * in[i];
            vstore_n(row + i * LANES, next, count - i * LANES);
            sum[i] += C[n] * next;
        }
    }
    for (int i = 0; i < vectors; i++) {
        vec gate = vload_n(z + i * LANES, count - i * LANES);
        sum[i] += D * vload_n(v + i * LANES, count - i * LANES);
        vstore_n(z + i * LANES, sum[i] * (gate * vsigmoid(gate)), count - i * LANES);
    }
}

static void head(real *h, const real *B, const real *C, const real *v, real *z, real dt, real decay, real D, int64_t N,
                 int64_t P) {
    int64_t p = 0;
    for (; p + WIDE * LANES <= P; p += WIDE * LANES)
        columns(h + p, B, C, v + p, z + p, dt, decay, D, N, P, WIDE, WIDE * LANES);
    for (; p < P; p += LANES) columns(h + p, B, C, v + p, z + p, dt, decay, D, N, P, 1, P - p);
}

/* x (rows, M); past (rows, K-1, S) and h (rows, H, N, P), both moved on in place; y (rows, M). work holds, for every
 * row, [z | u | dt] (E + S + H), then [v | B | C] (S), and of every head the sum of y's squares (H). y is where z was.
 */
EXPORT void FN(step)(const real *x, real *past, real *h, const real *in_weight, const real *in_bias,
                     const real *conv_weight, const real *conv_bias, const real *dt_bias, const real *A_log,
                     const real *D, const real *norm_weight, const real *out_weight, const real *out_bias,
                     const real *pre_weight, real *work, real *y, int64_t *seen, int64_t rows,
                     int64_t M, int64_t H, int64_t P, int64_t G, int64_t N, int64_t K, double least, double most, double eps, double pre_eps, int64_t threads) {
    const int64_t E = H * P, S = E + 2 * G * N, stride = E + 2 * S + 2 * H, shared = H / G;
    real *z = work, *u = z + E, *steps = u + S, *v = steps + H, *squares = v + S;
    for (int64_t row = 0; seen && row < rows; row++) seen[row]++;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        unsigned before = flush_denormals();
        const int64_t parts = omp_get_num_threads(), part = omp_get_thread_num();
        const real *in = normed(x, pre_weight, (real)pre_eps, work + rows * stride + part * rows * M, rows, M);
        const int64_t from = share(S, LANES, part, parts), to = share(S, LANES, part + 1, parts);
        product(in_weight, in_bias, in, M, work, stride, rows, E + from, E + to, M);
        product(in_weight, in_bias, in, M, work, stride, rows, share(E, LANES, part, parts),
                share(E, LANES, part + 1, parts), M);
        product(in_weight, in_bias, in, M, work, stride, rows, E + S + share(H, TOGETHER, part, parts),
                E + S + share(H, TOGETHER, part + 1, parts), M);
        for (int64_t row = 0; row < rows; row++)
            convolve(u + row * stride, past + row * (K - 1) * S, conv_weight, conv_bias, v + row * stride, from, to, S,
                     K);
#pragma omp barrier
        const int64_t first = rows * H * part / parts, last = rows * H * (part + 1) / parts;
        for (int64_t i = first; i < last; i++) {
            const int64_t row = i / H, n = i % H, at = row * stride;
            const real *B = v + at + E + n / shared * N;
            real dt = vsoftplus(vset(steps[at + n] + dt_bias[n]))[0];
            dt = dt < (real)least ? (real)least : dt > (real)most ? (real)most : dt;
            const real decay = vexp(-dt * vexp(vset(A_log[n])))[0];
            head(h + i * N * P, B, B + G * N, v + at + n * P, z + at + n * P, dt, decay, D[n], N, P);
            squares[at + n] = dot(z + at + n * P, z + at + n * P, P);
        }
#pragma omp barrier
        for (int64_t i = first; i < last; i++) {
            const int64_t row = i / H, n = i % H;
            const real *of_group = squares + row * stride + n / shared * shared, *weight = norm_weight + n * P;
            real *out = z + row * stride + n * P, sum = 0;
            for (int64_t j = 0; j < shared; j++) sum += of_group[j];
            const real scale = 1 / (real)__builtin_sqrt(sum / (real)(shared * P) + (real)eps);
            for (int64_t p = 0; p < P; p++) out[p] *= scale * weight[p];
        }
#pragma omp barrier
        product(out_weight, out_bias, z, stride, y, M, rows, share(M, TOGETHER, part, parts),
                share(M, TOGETHER, part + 1, parts), E);
        if (pre_weight) add(y, x, rows, M, share(M, TOGETHER, part, parts), share(M, TOGETHER, part + 1, parts));
        restore_denormals(before);
    }
}
