/* What Mamba-3's recurrence reads and takes in, from the tokens: angles, turned keys and queries, and inputs that are
 * those of the token before. native.py has the equations.
 *
 * Angles add up along a sequence, so a head of a sequence is a task; all else is done by blocks of tokens, whatever the
 * number of threads, so that sums over them are the same. Gradients turn cosines and sines out once more.
 */
#include "altx.h"

#define BLOCK 32
#define TURN 6.283185307179586

typedef struct {
    int64_t N, H, G, K, P, R, sx; /* sequences, heads, groups, state size, head width, angles; from token to token of x */
    const real *x, *B, *C, *B_bias, *C_bias, *angle, *a, *w, *k0, *v0;
    const uint8_t *reset;
    const int64_t *lengths, *bounds;
} Problem;

/* B and C of a head with their biases, and turned; gradients of the turned ones. Zeros up to whole vectors. */
typedef struct {
    real *b, *c, *key, *query, *dkey, *dquery, *cos, *sin;
} Room;

/* Where a token stands in its sequence, number n. */
typedef struct {
    int64_t n, start, stop, last; /* last: the last token that is no padding, start - 1 if all are */
    int fresh, used;              /* whether the past counts as zero; whether the next token takes this one in */
} Place;

static real *make_room(const Problem *p, Room *m) {
    const int64_t padded = (p->K + LANES - 1) / LANES * LANES;
    real *memory = aligned_alloc(64, (size_t)(8 * padded) * sizeof(real)), *at = memory;
    real **parts[] = {&m->b, &m->c, &m->key, &m->query, &m->dkey, &m->dquery, &m->cos, &m->sin};
    memset(memory, 0, (size_t)(8 * padded) * sizeof(real));
    for (int i = 0; i < 8; i++) *parts[i] = at, at += padded;
    return memory;
}

static Place place(const Problem *p, int64_t t, int64_t n) {
    while (t >= p->bounds[n + 1]) n++;
    Place at = {n, p->bounds[n], p->bounds[n + 1], p->bounds[n + 1] - 1, p->reset && p->reset[t], 0};
    if (p->lengths && p->lengths[n] < at.stop - at.start) at.last = at.start + p->lengths[n] - 1;
    at.used = t + 1 < at.stop && !(p->reset && p->reset[t + 1]);
    return at;
}

/* Whether sequence n has no token that is no padding. */
static int empty(const Problem *p, int64_t n) {
    return p->bounds[n + 1] == p->bounds[n] || (p->lengths && p->lengths[n] <= 0);
}

INLINE real inner(const real *a, const real *b, int64_t n) {
    vec sum = {0};
    for (int64_t i = 0; i < n; i += LANES) sum += vload_n(a + i, n - i) * vload_n(b + i, n - i);
    return vsum(sum);
}

INLINE void copy(real *to, const real *from, int64_t n) { memcpy(to, from, (size_t)n * sizeof(real)); }

INLINE void clear(real *x, int64_t n) { memset(x, 0, (size_t)n * sizeof(real)); }

/* to = factor * from; they do not overlap. */
INLINE void scaled(real *restrict to, const real *restrict from, real factor, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] = factor * from[i];
}

INLINE void add(real *restrict to, const real *restrict from, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] += from[i];
}

INLINE void rotate(real *restrict to, const real *restrict from, const Room *m, int64_t R, int64_t K) {
    const real *restrict cos = m->cos, *restrict sin = m->sin;
    for (int64_t r = 0; r < R; r++) {
        to[2 * r] = from[2 * r] * cos[r] - from[2 * r + 1] * sin[r];
        to[2 * r + 1] = from[2 * r] * sin[r] + from[2 * r + 1] * cos[r];
    }
    copy(to + 2 * R, from + 2 * R, K - 2 * R);
}

INLINE void rotate_back(real *x, const Room *m, int64_t R) {
    const real *restrict cos = m->cos, *restrict sin = m->sin;
    for (int64_t r = 0; r < R; r++) {
        const real even = x[2 * r], odd = x[2 * r + 1];
        x[2 * r] = even * cos[r] + odd * sin[r];
        x[2 * r + 1] = odd * cos[r] - even * sin[r];
    }
}

/* The key and the query of token t and head h. */
INLINE void open_head(const Problem *p, Room *m, int64_t t, int64_t h) {
    const int64_t K = p->K, group = (t * p->G + h / (p->H / p->G)) * K;
    const real *angle = p->angle + (t * p->H + h) * p->R;
    copy(m->b, p->B + group, K);
    copy(m->c, p->C + group, K);
    add(m->b, p->B_bias + h * K, K);
    add(m->c, p->C_bias + h * K, K);
    for (int64_t r = 0; r < p->R; r += LANES) {
        vec sin, cos;
        vsincos(vload_n(angle + r, p->R - r), &sin, &cos);
        vstore(m->sin + r, sin);
        vstore(m->cos + r, cos);
    }
    rotate(m->key, m->b, m, p->R, K);
    rotate(m->query, m->c, m, p->R, K);
}

/* ---- angles ---- */

/* Sums of dt * turns in float64, from 0 to a full turn; float32 numbers may not add up over many tokens. */
EXPORT void FN(angles)(const real *dt, const real *turns, const real *initial, const uint8_t *reset,
                       const int64_t *bounds, real *angle, real *last, int64_t N, int64_t H, int64_t R,
                       int64_t threads) {
#pragma omp parallel for schedule(static) num_threads((int)threads) if (threads > 1)
    for (int64_t i = 0; i < N * H; i++) {
        const int64_t n = i / H, h = i % H;
        double *sum = malloc((size_t)R * sizeof(double));
        for (int64_t r = 0; r < R; r++) sum[r] = initial ? initial[i * R + r] : 0;
        for (int64_t t = bounds[n]; t < bounds[n + 1]; t++) {
            const real step = dt[t * H + h], *restrict turn = turns + t * R;
            real *restrict to = angle + (t * H + h) * R;
            if (reset && reset[t]) memset(sum, 0, (size_t)R * sizeof(double));
            for (int64_t r = 0; r < R; r++) {
                const double x = sum[r] + (double)step * turn[r];
                sum[r] = x - TURN * __builtin_floor(x * (1 / TURN));
                to[r] = (real)sum[r];
            }
        }
        for (int64_t r = 0; r < R; r++) last[i * R + r] = (real)sum[r];
        free(sum);
    }
}

/* `angle`, which holds the gradients of the angles, comes to hold those of each token's own turns. */
EXPORT void FN(angles_backward)(const real *dt, const real *turns, const uint8_t *reset, const int64_t *bounds,
                                real *angle, const real *dlast, real *ddt, real *dturns, real *dinitial, int64_t N,
                                int64_t H, int64_t R, int64_t threads) {
#pragma omp parallel num_threads((int)threads) if (threads > 1)
    {
        double *sum = malloc((size_t)R * sizeof(double));
#pragma omp for schedule(static)
        for (int64_t i = 0; i < N * H; i++) {
            const int64_t n = i / H, h = i % H;
            for (int64_t r = 0; r < R; r++) sum[r] = dlast ? dlast[i * R + r] : 0;
            for (int64_t t = bounds[n + 1] - 1; t >= bounds[n]; t--) {
                real *at = angle + (t * H + h) * R;
                for (int64_t r = 0; r < R; r++) at[r] = (real)(sum[r] += at[r]);
                ddt[t * H + h] = inner(at, turns + t * R, R);
                if (reset && reset[t]) memset(sum, 0, (size_t)R * sizeof(double));
            }
            for (int64_t r = 0; r < R; r++) dinitial[i * R + r] = (real)sum[r];
        }
        free(sum);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < bounds[N]; t++) {
            real *restrict to = dturns + t * R;
            clear(to, R);
            for (int64_t h = 0; h < H; h++) {
                const real *restrict from = angle + (t * H + h) * R, step = dt[t * H + h];
                for (int64_t r = 0; r < R; r++) to[r] += step * from[r];
            }
        }
    }
}

/* ---- keys, queries and inputs ---- */

EXPORT void FN(turn)(const real *x, const real *B, const real *C, const real *B_bias, const real *C_bias,
                     const real *angle, const real *a, const real *w, const real *k0, const real *v0,
                     const uint8_t *reset, const int64_t *lengths, const int64_t *bounds, real *q, real *k, real *v,
                     real *qk, real *last, int64_t N, int64_t H, int64_t G, int64_t K, int64_t P, int64_t R,
                     int64_t sx, int64_t threads) {
    const Problem problem = {N, H, G, K, P, R, sx, x, B, C, B_bias, C_bias, angle, a, w, k0, v0, reset, lengths, bounds};
    const Problem *p = &problem;
#pragma omp parallel num_threads((int)threads) if (threads > 1)
    {
        unsigned before = flush_denormals();
        Room room, *m = &room;
        real *memory = make_room(p, m);
#pragma omp for schedule(static)
        for (int64_t block = 0; block < (bounds[N] + BLOCK - 1) / BLOCK; block++) {
            Place here = {0};
            for (int64_t t = block * BLOCK; t < (block + 1) * BLOCK && t < bounds[N]; t++) {
                here = place(p, t, here.n);
                if (here.fresh)
                    clear(v + t * H * P, H * P);
                else
                    copy(v + t * H * P, t == here.start ? v0 + here.n * H * P : x + (t - 1) * sx, H * P);
                for (int64_t h = 0; h < H; h++) {
                    const int64_t at = t * H + h, own = (here.n * H + h) * K;
                    open_head(p, m, t, h);
                    qk[at] = inner(m->b, m->c, K); /* as turned ones have it */
                    scaled(q + at * K, m->query, a[at], K);
                    if (t == here.start) scaled(k + at * K, k0 + own, w[at], K);
                    if (here.fresh) clear(k + at * K, K);
                    if (here.used) scaled(k + (at + H) * K, m->key, w[at + H], K);
                    if (t == here.last) copy(last + own, m->key, K);
                }
            }
        }
        free(memory);
        restore_denormals(before);
    }
    for (int64_t n = 0; n < N; n++)
        if (empty(p, n)) copy(last + n * H * K, k0 + n * H * K, H * K);
}

/* dB_bias and dC_bias have one more dimension in front, of as many blocks as there are, over which they are to be
 * summed. The gradients of the angles are those of each by itself. dk0 and dv0 are zeros. */
EXPORT void FN(turn_backward)(const real *x, const real *B, const real *C, const real *B_bias, const real *C_bias,
                              const real *angle, const real *a, const real *w, const real *k0, const real *v0,
                              const uint8_t *reset, const int64_t *lengths, const int64_t *bounds, const real *dq,
                              const real *dk, const real *dv, const real *dqk, const real *dlast, real *dx, real *dB,
                              real *dC, real *dB_bias, real *dC_bias, real *dangle, real *da, real *dw, real *dk0,
                              real *dv0, int64_t N, int64_t H, int64_t G, int64_t K, int64_t P, int64_t R, int64_t sx,
                              int64_t threads) {
    const Problem problem = {N, H, G, K, P, R, sx, x, B, C, B_bias, C_bias, angle, a, w, k0, v0, reset, lengths, bounds};
    const Problem *p = &problem;
#pragma omp parallel num_threads((int)threads) if (threads > 1)
    {
        unsigned before = flush_denormals();
        Room room, *m = &room;
        real *memory = make_room(p, m);
#pragma omp for schedule(static)
        for (int64_t block = 0; block < (bounds[N] + BLOCK - 1) / BLOCK; block++) {
            Place here = {0};
            real *of_B = dB_bias + block * H * K, *of_C = dC_bias + block * H * K;
            clear(of_B, H * K);
            clear(of_C, H * K);
            for (int64_t t = block * BLOCK; t < (block + 1) * BLOCK && t < bounds[N]; t++) {
                here = place(p, t, here.n);
                clear(dB + t * G * K, G * K);
                clear(dC + t * G * K, G * K);
                if (here.used)
                    copy(dx + t * H * P, dv + (t + 1) * H * P, H * P);
                else
                    clear(dx + t * H * P, H * P);
                if (t == here.start && !here.fresh) copy(dv0 + here.n * H * P, dv + t * H * P, H * P);
                for (int64_t h = 0; h < H; h++) {
                    const int64_t at = t * H + h, own = (here.n * H + h) * K, group = (t * G + h / (H / G)) * K;
                    open_head(p, m, t, h);
                    if (here.fresh) dw[at] = 0;
                    if (t == here.start && !here.fresh) {
                        dw[at] = inner(dk + at * K, k0 + own, K);
                        scaled(dk0 + own, dk + at * K, w[at], K);
                    }
                    if (here.used) {
                        dw[at + H] = inner(dk + (at + H) * K, m->key, K);
                        scaled(m->dkey, dk + (at + H) * K, w[at + H], K);
                    } else
                        clear(m->dkey, K);
                    if (t == here.last && dlast) add(m->dkey, dlast + own, K);
                    da[at] = inner(dq + at * K, m->query, K);
                    scaled(m->dquery, dq + at * K, a[at], K);
                    const real *restrict key = m->key, *restrict query = m->query;
                    const real *restrict dkey = m->dkey, *restrict dquery = m->dquery;
                    real *restrict to = dangle + at * R;
                    for (int64_t r = 0; r < R; r++)
                        to[r] = (dkey[2 * r + 1] * key[2 * r] - dkey[2 * r] * key[2 * r + 1]) +
                                (dquery[2 * r + 1] * query[2 * r] - dquery[2 * r] * query[2 * r + 1]);
                    rotate_back(m->dkey, m, R);
                    rotate_back(m->dquery, m, R);
                    for (int64_t i = 0; i < K; i += LANES) {
                        const vec b = vload(m->dkey + i) + vload(m->c + i) * dqk[at];
                        const vec c = vload(m->dquery + i) + vload(m->b + i) * dqk[at];
                        vstore_n(dB + group + i, vload_n(dB + group + i, K - i) + b, K - i);
                        vstore_n(dC + group + i, vload_n(dC + group + i, K - i) + c, K - i);
                        vstore_n(of_B + h * K + i, vload_n(of_B + h * K + i, K - i) + b, K - i);
                        vstore_n(of_C + h * K + i, vload_n(of_C + h * K + i, K - i) + c, K - i);
                    }
                }
            }
        }
        free(memory);
        restore_denormals(before);
    }
    for (int64_t n = 0; n < N && dlast; n++)
        if (empty(p, n)) add(dk0 + n * H * K, dlast + n * H * K, H * K);
}
