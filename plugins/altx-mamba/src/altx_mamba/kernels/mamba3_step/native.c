/* One token of Mamba-3 for each row, from its projection in to its projection out. Letters as in reference.py.
 *
 * A head's state is large. It is read and written once, row by row, with what goes in and what comes out in registers.
 */
#include "altx.h"
#include "matvec.h"
#include "pre_norm.h"

#define PI 3.141592653589793

/* Vectors of a state's row at a time. */
enum { WIDE = 4 };

/* What a head's state is moved on by: decay, old k^T of the token before and new k^T of this one, and read with: q. */
typedef struct {
    real decay, *old, *new, *q, *cos, *sin;
} Move;

/* `vectors` columns of vectors of a head: h (N, P) moves on, u takes the place of the v before, and y = h^T q + D u.
 * `count` numbers are in them, fewer than would fit where it is one vector. */
INLINE void columns(const Move *m, real *h, real *v, const real *u, real *y, real D, int64_t N, int64_t P, int vectors,
                    int64_t count) {
    vec before[WIDE], now[WIDE], sum[WIDE];
    for (int i = 0; i < vectors; i++) {
        before[i] = vload_n(v + i * LANES, count - i * LANES);
        now[i] = vload_n(u + i * LANES, count - i * LANES);
        sum[i] = D * now[i];
        vstore_n(v + i * LANES, now[i], count - i * LANES);
    }
    for (int64_t n = 0; n < N; n++) {
        real *row = h + n * P;
        for (int i = 0; i < vectors; i++) {
            vec next = m->decay * vload_n(row + i * LANES, count - i * LANES) + m->old[n] * before[i];
            next += m->new[n] * now[i];
            vstore_n(row + i * LANES, next, count - i * LANES);
            sum[i] += m->q[n] * next;
        }
    }
    for (int i = 0; i < vectors; i++) vstore_n(y + i * LANES, sum[i], count - i * LANES);
}

/* y = norm(x) weight + bias, turned. */
static void turned(const Move *m, const real *x, const real *weight, const real *bias, real *restrict y, int64_t N,
                   int64_t R, real eps) {
    const real scale = 1 / (real)__builtin_sqrt(dot(x, x, N) / (real)N + eps);
    for (int64_t n = 0; n < N; n++) y[n] = x[n] * scale * weight[n] + bias[n];
    for (int64_t r = 0; r < R; r++) {
        const real even = y[2 * r], odd = y[2 * r + 1];
        y[2 * r] = even * m->cos[r] - odd * m->sin[r];
        y[2 * r + 1] = even * m->sin[r] + odd * m->cos[r];
    }
}

/* The angle moves on by dt pi tanh(theta), in float64, since float32 numbers may not add up over many tokens; its
 * cosine and sine. What tanh loses for small theta to the 1 that it is computed beside, an angle could not hold. */
static void turn(Move *m, const real *theta, real *angle, real dt, int64_t R) {
    for (int64_t r = 0; r < R; r += LANES) vstore_n(m->sin + r, 2 * vsigmoid(2 * vload_n(theta + r, R - r)) - 1, R - r);
    for (int64_t r = 0; r < R; r++) {
        const double x = angle[r] + PI * (double)dt * (double)m->sin[r];
        angle[r] = (real)(x - 2 * PI * __builtin_floor(x * (1 / (2 * PI))));
    }
    for (int64_t r = 0; r < R; r += LANES) {
        vec sine, cosine;
        vsincos(vload_n(angle + r, R - r), &sine, &cosine);
        vstore_n(m->sin + r, sine, R - r);
        vstore_n(m->cos + r, cosine, R - r);
    }
}

/* y = y silu(z), of P numbers, after y = y / rms(y) weight where there is a weight. */
static void leave(const real *y, real *z, const real *weight, int64_t P, real eps) {
    const real scale = weight ? 1 / (real)__builtin_sqrt(dot(y, y, P) / (real)P + eps) : 1;
    for (int64_t p = 0; p < P; p += LANES) {
        vec gate = vload_n(z + p, P - p), out = vload_n(y + p, P - p);
        if (weight) out *= scale * vload_n(weight + p, P - p);
        vstore_n(z + p, out * (gate * vsigmoid(gate)), P - p);
    }
}

/* x (rows, M); h (rows, H, N, P), angle (rows, H, R), k (rows, H, N) and v (rows, H, P), all moved on in place; y
 * (rows, M); norm_weight may be NULL. work holds, for every row, [z | u | B | C | dt | a | l | theta], where y takes
 * the place of u and leaves in that of z; then, for every thread, what Move points to. */
EXPORT void FN(step)(const real *x, real *h, real *angle, real *k, real *v, const real *in_weight, const real *dt_bias,
                     const real *B_weight, const real *C_weight, const real *B_bias, const real *C_bias, const real *D,
                     const real *norm_weight, const real *out_weight, const real *pre_weight, real *work, real *y,
                     int64_t *seen, int64_t rows, int64_t M, int64_t H, int64_t P, int64_t G, int64_t N, int64_t R, double norm_eps,
                     double A_floor, double pre_eps, int64_t heavy_tail, int64_t threads) {
    const int64_t E = H * P, stride = 2 * E + 2 * G * N + 3 * H + R;
    const real eps = (real)norm_eps, floor = (real)A_floor;
    for (int64_t row = 0; seen && row < rows; row++) seen[row]++;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        unsigned before = flush_denormals();
        const int64_t parts = omp_get_num_threads(), part = omp_get_thread_num();
        const real *in = normed(x, pre_weight, (real)pre_eps, work + rows * stride + parts * (3 * N + 2 * R) + part * rows * M, rows, M);
        real *room = work + rows * stride + part * (3 * N + 2 * R);
        Move m = {0, room, room + N, room + 2 * N, room + 3 * N, room + 3 * N + R};
        product(in_weight, NULL, in, M, work, stride, rows, share(stride, TOGETHER, part, parts),
                share(stride, TOGETHER, part + 1, parts), M);
#pragma omp barrier
        for (int64_t i = rows * H * part / parts; i < rows * H * (part + 1) / parts; i++) {
            const int64_t n = i % H;
            real *z = work + i / H * stride, *u = z + E, *B = u + E, *C = B + G * N, *steps = C + G * N;
            const real raw = steps[H + n], dt = vsoftplus(vset(steps[n] + dt_bias[n]))[0];
            real rate = !heavy_tail ? vsoftplus(vset(raw))[0] : raw > 0 ? 1 + raw : 1 / (1 - raw);
            rate = rate < floor ? floor : rate;
            const real weight = vsigmoid(vset(steps[2 * H + n]))[0];
            m.decay = vexp(vset(-dt * rate))[0];
            turn(&m, steps + 3 * H, angle + i * R, dt, R);
            real *key = k + i * N;
            for (int64_t j = 0; j < N; j++) m.old[j] = (1 - weight) * dt * m.decay * key[j];
            const int64_t group = n / (H / G) * N;
            turned(&m, B + group, B_weight, B_bias + n * N, key, N, R, eps);
            turned(&m, C + group, C_weight, C_bias + n * N, m.q, N, R, eps);
            for (int64_t j = 0; j < N; j++) m.new[j] = weight * dt * key[j];
            u += n * P;
            int64_t p = 0;
            for (; p + WIDE * LANES <= P; p += WIDE * LANES)
                columns(&m, h + i * N * P + p, v + i * P + p, u + p, u + p, D[n], N, P, WIDE, WIDE * LANES);
            for (; p < P; p += LANES)
                columns(&m, h + i * N * P + p, v + i * P + p, u + p, u + p, D[n], N, P, 1, P - p);
            leave(u, z + n * P, norm_weight ? norm_weight + n * P : NULL, P, eps);
        }
#pragma omp barrier
        product(out_weight, NULL, work, stride, y, M, rows, share(M, TOGETHER, part, parts),
                share(M, TOGETHER, part + 1, parts), E);
        if (pre_weight) add(y, x, rows, M, share(M, TOGETHER, part, parts), share(M, TOGETHER, part + 1, parts));
        restore_denormals(before);
    }
}
