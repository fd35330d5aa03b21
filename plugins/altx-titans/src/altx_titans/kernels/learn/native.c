/* The loop over chunks of a one-layer network that is a memory, and its adjoint. Heads are independent: threads share
 * them. Equations are those of altx_titans.fast, in matrices of a chunk: keys K (C, I), the weights A at which its
 * gradients are taken (I, d), the errors E of its tokens (C, d).
 *
 *     Z = K A,   hat = (Z - mean) / deviation,   E0 = factor (hat g + bias + K - V),   G = E0 g,
 *     E = (G - mean G - hat mean(G hat)) / deviation,   Es = E0 hat
 *
 * A layer's bias is the last of the I rows, whose key is 1. State: (R, P), the I rows and then, where it is learned,
 * the norm's scale, of which Es are the errors. P, Q, L: d, I, C rounded up to PAD; what is beyond d, I, C is zero. */
#include "altx.h"

#define PAD 16
#define MOST 4

typedef struct {
    int64_t B, H, N, C, d, I, norm, scaled, P, Q, L, R;
    real eps, factor, bound;
    const real *key, *value, *query, *keep, *drift, *share, *last_keep, *last_drift, *last_share, *moving_keep;
    const real *moving_share, *gain, *bias;
    const uint8_t *full, *anew;
} Call;

typedef struct {
    real *hat, *rstd, *g, *E0, *E, *Ew, *rw, *mgh, *Es, *Eb, *rs;       /* of the gradients */
    real *QW, *QS, *QK, *PS, *KT, *O, *hato, *rstdo, *gt, *x;           /* of what is read */
    real *dEw, *dEb, *dO, *dgt, *kdO, *t1, *t2, *dP, *dPT, *dKT, *dQT, *M, *Ms, *XT; /* of the adjoint */
} Chunk;

INLINE real root(real x) { return sizeof(real) == 8 ? (real)__builtin_sqrt(x) : (real)__builtin_sqrtf((float)x); }

INLINE int64_t padded(int64_t n) { return (n + PAD - 1) / PAD * PAD; }

/* One tile: `rows` rows, `vectors` vectors of out = (add ? out : 0) + a b. */
INLINE void tile(real *out, int64_t ldo, const real *a, int64_t sai, int64_t sak, const real *b, int64_t ldb, int64_t k,
                 const int rows, const int vectors, const int add) {
    vec sum[4][MOST];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vectors; j++) sum[i][j] = add ? vload(out + i * ldo + j * LANES) : vset(0);
    for (int64_t l = 0; l < k; l++) {
        vec right[MOST];
        for (int j = 0; j < vectors; j++) right[j] = vload(b + l * ldb + j * LANES);
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < vectors; j++) sum[i][j] += a[i * sai + l * sak] * right[j];
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vectors; j++) vstore(out + i * ldo + j * LANES, sum[i][j]);
}

INLINE void strip(real *out, int64_t ldo, const real *a, int64_t sai, int64_t sak, const real *b, int64_t ldb, int64_t m,
                  int64_t k, const int vectors, const int add) {
    int64_t i = 0;
    for (; i + 4 <= m; i += 4) tile(out + i * ldo, ldo, a + i * sai, sai, sak, b, ldb, k, 4, vectors, add);
    for (; i < m; i++) tile(out + i * ldo, ldo, a + i * sai, sai, sak, b, ldb, k, 1, vectors, add);
}

INLINE void product_of(real *out, int64_t ldo, const real *a, int64_t sai, int64_t sak, const real *b, int64_t ldb,
                       int64_t m, int64_t k, int64_t n, const int add) {
    int64_t j = 0;
    for (; j + MOST * LANES <= n; j += MOST * LANES) strip(out + j, ldo, a, sai, sak, b + j, ldb, m, k, MOST, add);
    for (; j < n; j += LANES) strip(out + j, ldo, a, sai, sak, b + j, ldb, m, k, 1, add);
}

/* out (m, n) = a (m, k) b (k, n), the numbers of a being `sai` and `sak` apart; n is a multiple of PAD. */
static void product(real *out, int64_t ldo, const real *a, int64_t sai, int64_t sak, const real *b, int64_t ldb,
                    int64_t m, int64_t k, int64_t n) {
    product_of(out, ldo, a, sai, sak, b, ldb, m, k, n, 0);
}

static void add_product(real *out, int64_t ldo, const real *a, int64_t sai, int64_t sak, const real *b, int64_t ldb,
                        int64_t m, int64_t k, int64_t n) {
    product_of(out, ldo, a, sai, sak, b, ldb, m, k, n, 1);
}

static void transposed(real *to, const real *from, int64_t rows, int64_t ld, int64_t columns, int64_t ldt) {
    for (int64_t j = 0; j < columns; j++)
        for (int64_t i = 0; i < rows; i++) to[j * ldt + i] = from[i * ld + j];
}

INLINE real dot(const real *a, const real *b, int64_t n) {
    vec sum = vset(0);
    for (int64_t i = 0; i < n; i += LANES) sum += vload(a + i) * vload(b + i);
    return vsum(sum);
}

/* to += c x */
INLINE void axpy(real *to, real c, const real *x, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) vstore(to + i, vload(to + i) + c * vload(x + i));
}

/* to = c x */
INLINE void times(real *to, real c, const real *x, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) vstore(to + i, c * vload(x + i));
}

INLINE real sum_of(const real *x, int64_t n) {
    vec sum = vset(0);
    for (int64_t i = 0; i < n; i += LANES) sum += vload(x + i);
    return vsum(sum);
}

/* What is beyond d becomes zero. */
INLINE void clear(real *x, int64_t d, int64_t P) {
    for (int64_t j = d; j < P; j++) x[j] = 0;
}

/* hat = (z - mean) / deviation; returns 1 / deviation. */
INLINE real normal(real *hat, const real *z, int64_t d, int64_t P, real eps) {
    real mean = sum_of(z, P) / d;
    for (int64_t j = 0; j < P; j += LANES) vstore(hat + j, vload(z + j) - mean);
    clear(hat, d, P);
    real rstd = 1 / root(dot(hat, hat, P) / d + eps);
    times(hat, rstd, hat, P);
    return rstd;
}

/* to = (u - mean u - hat mean(u hat)) rstd; returns mean(u hat). */
INLINE real projected(real *to, const real *u, const real *hat, real rstd, int64_t d, int64_t P) {
    real mean = sum_of(u, P) / d, along = dot(u, hat, P) / d;
    for (int64_t j = 0; j < P; j += LANES) vstore(to + j, (vload(u + j) - mean - along * vload(hat + j)) * rstd);
    clear(to, d, P);
    return along;
}

/* What an error is scaled down with to keep to the bound. */
INLINE real within(real square, real bound) {
    square /= bound * bound;
    return square > 1 ? 1 / root(square) : 1;
}

/* The errors of a chunk's tokens for weights A. */
static void errors(const Call *p, const Chunk *c, const real *A, const real *K, const real *V, const real *gain,
                   const real *bias) {
    const int64_t P = p->P, d = p->d;
    product(c->x, P, K, p->Q, 1, A, P, p->C, p->I, P);
    if (p->norm) {
        memcpy(c->g, gain, (size_t)P * sizeof(real));
        if (p->scaled) axpy(c->g, 1, A + p->I * P, P);
    }
    for (int64_t i = 0; i < p->C; i++) {
        real *hat = c->hat + i * P, *E0 = c->E0 + i * P, *E = c->E + i * P, *x = c->x + i * P, G[P];
        const real *k = K + i * p->Q, *v = V + i * P;
        if (p->norm) {
            c->rstd[i] = normal(hat, x, d, P, p->eps);
            for (int64_t j = 0; j < d; j++) E0[j] = p->factor * (hat[j] * c->g[j] + bias[j] + k[j] - v[j]);
            clear(E0, d, P);
            for (int64_t j = 0; j < P; j++) G[j] = E0[j] * c->g[j];
            c->mgh[i] = projected(E, G, hat, c->rstd[i], d, P);
        } else
            for (int64_t j = 0; j < P; j++) E[j] = p->factor * (x[j] - v[j]);
        c->rw[i] = p->bound > 0 ? within(dot(k, k, p->Q) * dot(E, E, P), p->bound) : 1;
        times(c->Ew + i * P, c->rw[i], E, P);
        if (!p->scaled) continue;
        real *Es = c->Es + i * P;
        for (int64_t j = 0; j < P; j++) Es[j] = E0[j] * hat[j];
        c->rs[i] = p->bound > 0 ? within(dot(Es, Es, P), p->bound) : 1;
        times(c->Eb + i * P, c->rs[i], Es, P);
    }
}

/* out = what the queries read. */
static void reading(const Call *p, const Chunk *c, const real *W, const real *S, const real *K, const real *q,
                    const real *keep, const real *drift, const real *share, const real *gain, const real *bias,
                    real *out) {
    const int64_t P = p->P, Q = p->Q, L = p->L, C = p->C, d = p->d;
    product(c->QW, P, q, Q, 1, W, P, C, p->I, P);
    if (drift) product(c->QS, P, q, Q, 1, S, P, C, p->I, P);
    memset(c->KT, 0, (size_t)(Q * L) * sizeof(real));
    transposed(c->KT, K, C, Q, p->I, L);
    product(c->QK, L, q, Q, 1, c->KT, L, C, p->I, L);
    for (int64_t t = 0; t < C; t++)
        for (int64_t i = 0; i < C; i++) c->PS[t * L + i] = -share[t * C + i] * c->QK[t * L + i];
    for (int64_t t = 0; t < C; t++) {
        times(c->O + t * P, keep[t], c->QW + t * P, P);
        if (drift) axpy(c->O + t * P, drift[t], c->QS + t * P, P);
    }
    add_product(c->O, P, c->PS, L, 1, c->Ew, P, C, C, P);
    if (p->scaled) {
        product(c->x, P, share, C, 1, c->Eb, P, C, C, P);
        for (int64_t t = 0; t < C; t++) {
            times(c->gt + t * P, keep[t], W + p->I * P, P);
            if (drift) axpy(c->gt + t * P, drift[t], S + p->I * P, P);
            axpy(c->gt + t * P, -1, c->x + t * P, P);
        }
    }
    for (int64_t t = 0; t < C; t++) {
        real *o = c->O + t * P, *y = out + t * P, *hat = c->hato + t * P, *g = c->gt + t * P;
        if (!p->norm) {
            memcpy(y, o, (size_t)P * sizeof(real));
            continue;
        }
        if (!p->scaled) memset(g, 0, (size_t)P * sizeof(real));
        axpy(g, 1, gain, P);
        c->rstdo[t] = normal(hat, o, d, P, p->eps);
        for (int64_t j = 0; j < d; j++) y[j] = hat[j] * g[j] + bias[j] + q[t * Q + j];
        clear(y, d, P);
    }
}

/* to = keep from + drift S - what the tokens share. */
static void moved(const Call *p, const Chunk *c, real *to, const real *from, real keep, const real *S, real drift,
                  const real *share, const real *K) {
    const int64_t P = p->P;
    times(to, keep, from, p->R * P);
    if (S) axpy(to, drift, S, p->R * P);
    for (int64_t i = 0; i < p->C; i++) times(c->x + i * P, -share[i], c->Ew + i * P, P);
    add_product(to, P, K, 1, p->Q, c->x, P, p->I, p->C, P);
    if (p->scaled)
        for (int64_t i = 0; i < p->C; i++) axpy(to + p->I * P, -share[i], c->Eb + i * P, P);
}

static int64_t room(const Call *p) {
    int64_t wide = p->C * p->P, square = p->C * p->L, turned = p->Q * p->L > p->P * p->L ? p->Q * p->L : p->P * p->L;
    return 21 * wide + 4 * square + 4 * turned + 6 * p->L + p->P;
}

static Chunk make_room(const Call *p, real *s) {
    Chunk c;
    int64_t wide = p->C * p->P, square = p->C * p->L, turned = p->Q * p->L > p->P * p->L ? p->Q * p->L : p->P * p->L;
    real **wides[] = {&c.hat, &c.E0, &c.E, &c.Ew, &c.Es, &c.Eb, &c.QW, &c.QS, &c.O, &c.hato, &c.gt, &c.x,
                      &c.dEw, &c.dEb, &c.dO, &c.dgt, &c.kdO, &c.t1, &c.t2, &c.M, &c.Ms};
    real **squares[] = {&c.QK, &c.PS, &c.dP, &c.dPT}, **turns[] = {&c.KT, &c.dKT, &c.dQT, &c.XT};
    real **rows[] = {&c.rstd, &c.rw, &c.mgh, &c.rs, &c.rstdo};
    for (int i = 0; i < 21; i++, s += wide) *wides[i] = s;
    for (int i = 0; i < 4; i++, s += square) *squares[i] = s;
    for (int i = 0; i < 4; i++, s += turned) *turns[i] = s;
    for (int i = 0; i < 5; i++, s += p->L) *rows[i] = s;
    c.g = s;
    return c;
}

#define AT(x, size) ((x) ? (x) + (size) : 0)

EXPORT void FN(learn)(
    const real *key, const real *value, const real *query, const real *keep, const real *drift, const real *share,
    const real *last_keep, const real *last_drift, const real *last_share, const real *moving_keep,
    const real *moving_share, const uint8_t *full, const uint8_t *anew, const real *gain, const real *bias,
    const real *fresh, real *W, real *A, real *S, real *out, real *kept,
    int64_t B, int64_t H, int64_t N, int64_t C, int64_t d, int64_t I, int64_t norm, int64_t scaled, double eps,
    double factor, double bound, int64_t threads) {
    Call call = {B, H, N, C, d, I, norm, scaled, padded(d), padded(I), padded(C), I + scaled, (real)eps, (real)factor,
                 (real)bound}, *p = &call;
    const int64_t P = p->P, Q = p->Q, R = p->R, size = R * P;
    #pragma omp parallel num_threads(threads) if(threads > 1)
    {
    unsigned mode = flush_denormals();
    real *scratch = calloc((size_t)(room(p) + size), sizeof(real)), *next = scratch + room(p);
    Chunk c = make_room(p, scratch);
    #pragma omp for schedule(static)
    for (int64_t h = 0; h < B * H; h++) {
        real *w = W + h * size, *a = A + h * size, *s = AT(S, h * size);
        const real *g = AT(gain, h % H * P), *b = AT(bias, h % H * P);
        for (int64_t n = 0; n < N; n++) {
            int64_t m = h * N + n, row = h / H * N + n;
            if (anew && anew[row]) {
                memcpy(w, fresh + h * size, (size_t)size * sizeof(real));
                memcpy(a, fresh + h * size, (size_t)size * sizeof(real));
                if (s) memset(s, 0, (size_t)size * sizeof(real));
            }
            if (kept) {
                real *to = kept + m * (s ? 3 : 2) * size;
                memcpy(to, w, (size_t)size * sizeof(real));
                memcpy(to + size, a, (size_t)size * sizeof(real));
                if (s) memcpy(to + 2 * size, s, (size_t)size * sizeof(real));
            }
            const real *K = key + m * C * Q;
            errors(p, &c, a, K, value + m * C * P, g, b);
            if (query)
                reading(p, &c, w, s, K, query + m * C * Q, keep + m * C, AT(drift, m * C), share + m * C * C, g, b,
                        out + m * C * P);
            moved(p, &c, next, w, last_keep[m], last_drift ? s : 0, last_drift ? last_drift[m] : 0, last_share + m * C, K);
            memcpy(w, next, (size_t)size * sizeof(real));
            if (s) {
                moved(p, &c, next, s, moving_keep[m], 0, 0, moving_share + m * C, K);
                memcpy(s, next, (size_t)size * sizeof(real));
            }
            if (full[row]) memcpy(a, w, (size_t)size * sizeof(real));
        }
    }
    free(scratch);
    restore_denormals(mode);
    }
}

/* dE for Ew = E r, where r is 1 / (|E| |k|) of the bound or 1; returns what goes to k along k, over |k|^2. */
INLINE real unbound(real *dE, const real *dEw, const real *E, real r, int64_t P) {
    if (r >= 1) {
        memcpy(dE, dEw, (size_t)P * sizeof(real));
        return 0;
    }
    real along = dot(E, dEw, P);
    times(dE, r, dEw, P);
    axpy(dE, -r * along / dot(E, E, P), E, P);
    return r * along;
}

EXPORT void FN(learn_backward)(
    const real *key, const real *value, const real *query, const real *keep, const real *drift, const real *share,
    const real *last_keep, const real *last_drift, const real *last_share, const real *moving_keep,
    const real *moving_share, const uint8_t *full, const uint8_t *anew, const real *gain, const real *bias,
    const real *kept, const real *dout, real *dW, real *dA, real *dS, real *dkey, real *dvalue, real *dquery,
    real *dkeep, real *ddrift, real *dshare, real *dlast_keep, real *dlast_drift, real *dlast_share,
    real *dmoving_keep, real *dmoving_share, real *dgain, real *dbias, real *dfresh,
    int64_t B, int64_t H, int64_t N, int64_t C, int64_t d, int64_t I, int64_t norm, int64_t scaled, double eps,
    double factor, double bound, int64_t threads) {
    Call call = {B, H, N, C, d, I, norm, scaled, padded(d), padded(I), padded(C), I + scaled, (real)eps, (real)factor,
                 (real)bound}, *p = &call;
    const int64_t P = p->P, Q = p->Q, L = p->L, R = p->R, size = R * P;
    #pragma omp parallel num_threads(threads) if(threads > 1)
    {
    unsigned mode = flush_denormals();
    real *scratch = calloc((size_t)(room(p) + C * P), sizeof(real)), *unread = scratch + room(p);
    Chunk c = make_room(p, scratch);
    #pragma omp for schedule(static)
    for (int64_t h = 0; h < B * H; h++) {
        real *dw = dW + h * size, *da = dA + h * size, *ds = AT(dS, h * size);
        const real *g = AT(gain, h % H * P), *b = AT(bias, h % H * P);
        real *dg = AT(dgain, h * P), *db = AT(dbias, h * P);
        for (int64_t n = N - 1; n >= 0; n--) {
            int64_t m = h * N + n, row = h / H * N + n;
            const real *w = kept + m * (ds ? 3 : 2) * size, *a = w + size, *s = ds ? a + size : 0;
            const real *K = key + m * C * Q, *q = AT(query, m * C * Q);
            errors(p, &c, a, K, value + m * C * P, g, b);
            /* What the chunk has left. */
            if (full[row]) {
                axpy(dw, 1, da, size);
                memset(da, 0, (size_t)size * sizeof(real));
            }
            memset(c.dKT, 0, (size_t)(Q * L) * sizeof(real));
            memset(c.XT, 0, (size_t)(P * L) * sizeof(real));
            const real *ls = last_share + m * C, *ms = AT(moving_share, m * C);
            dlast_keep[m] = dot(w, dw, size);
            if (last_drift) dlast_drift[m] = dot(s, dw, size);
            product(c.M, P, K, Q, 1, dw, P, C, I, P);
            if (s) {
                dmoving_keep[m] = dot(s, ds, size);
                product(c.Ms, P, K, Q, 1, ds, P, C, I, P);
            }
            for (int64_t i = 0; i < C; i++) {
                real *dEw = c.dEw + i * P, *dEb = c.dEb + i * P, *Ew = c.Ew + i * P, *Eb = c.Eb + i * P;
                dlast_share[m * C + i] = -dot(Ew, c.M + i * P, P) - (scaled ? dot(Eb, dw + I * P, P) : 0);
                times(dEw, -ls[i], c.M + i * P, P);
                if (scaled) times(dEb, -ls[i], dw + I * P, P);
                times(c.t1 + i * P, -ls[i], Ew, P);
                if (!s) continue;
                dmoving_share[m * C + i] = -dot(Ew, c.Ms + i * P, P) - (scaled ? dot(Eb, ds + I * P, P) : 0);
                axpy(dEw, -ms[i], c.Ms + i * P, P);
                if (scaled) axpy(dEb, -ms[i], ds + I * P, P);
                times(c.t2 + i * P, -ms[i], Ew, P);
            }
            transposed(c.XT, c.t1, C, P, P, L);
            add_product(c.dKT, L, dw, P, 1, c.XT, L, I, P, L);
            if (s) {
                transposed(c.XT, c.t2, C, P, P, L);
                add_product(c.dKT, L, ds, P, 1, c.XT, L, I, P, L);
                times(ds, moving_keep[m], ds, size);
                if (last_drift) axpy(ds, last_drift[m], dw, size);
            }
            times(dw, last_keep[m], dw, size);
            /* What the queries have read. */
            if (q) {
                const real *kp = keep + m * C, *dr = AT(drift, m * C), *sh = share + m * C * C, *dy = dout + m * C * P;
                real *dsh = dshare + m * C * C, *dq = dquery + m * C * Q;
                reading(p, &c, w, s, K, q, kp, dr, sh, g, b, unread);
                memset(c.dQT, 0, (size_t)(Q * L) * sizeof(real));
                for (int64_t t = 0; t < C; t++) {
                    const real *y = dy + t * P, *hat = c.hato + t * P;
                    real *dO = c.dO + t * P, *dgt = c.dgt + t * P, *x = c.x + t * P;
                    if (norm) {
                        for (int64_t j = 0; j < P; j++) {
                            dgt[j] = y[j] * hat[j];
                            x[j] = y[j] * c.gt[t * P + j];
                        }
                        projected(dO, x, hat, c.rstdo[t], d, P);
                        axpy(dg, 1, dgt, P);
                        axpy(db, 1, y, P);
                    } else
                        memcpy(dO, y, (size_t)P * sizeof(real));
                    dkeep[m * C + t] = dot(dO, c.QW + t * P, P) + (scaled ? dot(dgt, w + I * P, P) : 0);
                    if (dr) ddrift[m * C + t] = dot(dO, c.QS + t * P, P) + (scaled ? dot(dgt, s + I * P, P) : 0);
                    if (scaled) {
                        axpy(dw + I * P, kp[t], dgt, P);
                        if (dr) axpy(ds + I * P, dr[t], dgt, P);
                    }
                    times(c.t1 + t * P, kp[t], dO, P);
                    if (dr) times(c.t2 + t * P, dr[t], dO, P);
                }
                transposed(c.XT, c.t1, C, P, P, L);
                add_product(c.dQT, L, w, P, 1, c.XT, L, I, P, L);
                add_product(dw, P, q, 1, Q, c.t1, P, I, C, P);
                if (dr) {
                    transposed(c.XT, c.t2, C, P, P, L);
                    add_product(c.dQT, L, s, P, 1, c.XT, L, I, P, L);
                    add_product(ds, P, q, 1, Q, c.t2, P, I, C, P);
                }
                /* PS = -share QK, O += PS Ew. */
                transposed(c.XT, c.Ew, C, P, P, L);
                product(c.dP, L, c.dO, P, 1, c.XT, L, C, P, L);
                add_product(c.dEw, P, c.PS, 1, L, c.dO, P, C, C, P);
                for (int64_t t = 0; t < C; t++)
                    for (int64_t i = 0; i < C; i++) {
                        dsh[t * C + i] = -c.dP[t * L + i] * c.QK[t * L + i];
                        c.dP[t * L + i] *= -sh[t * C + i];
                    }
                transposed(c.dPT, c.dP, C, L, C, L);
                add_product(c.dQT, L, K, 1, Q, c.dPT, L, I, C, L);
                add_product(c.dKT, L, q, 1, Q, c.dP, L, I, C, L);
                if (scaled) {
                    transposed(c.XT, c.Eb, C, P, P, L);
                    product(c.dP, L, c.dgt, P, 1, c.XT, L, C, P, L);
                    for (int64_t t = 0; t < C; t++)
                        for (int64_t i = 0; i < C; i++) {
                            dsh[t * C + i] -= c.dP[t * L + i];
                            c.dPT[t * L + i] = -sh[t * C + i];
                        }
                    add_product(c.dEb, P, c.dPT, 1, L, c.dgt, P, C, C, P);
                }
                for (int64_t t = 0; t < C; t++) {
                    for (int64_t r = 0; r < Q; r++) dq[t * Q + r] = r < I ? c.dQT[r * L + t] : 0;
                    if (norm)
                        for (int64_t j = 0; j < d; j++) dq[t * Q + j] += dy[t * P + j];
                }
            }
            /* The gradients at a, differentiated; dz into t1. */
            for (int64_t i = 0; i < C; i++) {
                const real *k = K + i * Q, *hat = c.hat + i * P, *E0 = c.E0 + i * P, *E = c.E + i * P;
                real *dz = c.t1 + i * P, *dk = dkey + (m * C + i) * Q, *dv = dvalue + (m * C + i) * P;
                real u[P], dhat[P], dE0[P], dEs[P], G[P], dG[P];
                real along = unbound(u, c.dEw + i * P, E, c.rw[i], P);
                memset(dk, 0, (size_t)Q * sizeof(real));
                if (along != 0) axpy(dk, -along / dot(k, k, Q), k, Q);
                if (!norm) {
                    times(dz, p->factor, u, P);
                    times(dv, -p->factor, u, P);
                    continue;
                }
                real rstd = c.rstd[i], steep = dot(u, E, P) * rstd / d, by_u = c.mgh[i];
                real by_G = projected(dG, u, hat, rstd, d, P);
                if (scaled) unbound(dEs, c.dEb + i * P, c.Es + i * P, c.rs[i], P);
                for (int64_t j = 0; j < P; j++) {
                    real gj = c.g[j], e;
                    G[j] = E0[j] * gj;
                    dhat[j] = -rstd * (by_u * u[j] + by_G * G[j]);
                    dE0[j] = dG[j] * gj;
                    if (scaled) {
                        dE0[j] += dEs[j] * hat[j];
                        dhat[j] += dEs[j] * E0[j];
                    }
                    e = p->factor * dE0[j];
                    dhat[j] += e * gj;
                    dG[j] = dG[j] * E0[j] + e * hat[j];
                    dE0[j] = e;
                    dv[j] = -e;
                }
                axpy(dg, 1, dG, P);
                if (scaled) axpy(da + I * P, 1, dG, P);
                axpy(db, 1, dE0, P);
                for (int64_t j = 0; j < d; j++) dk[j] += dE0[j];
                projected(dz, dhat, hat, rstd, d, P);
                axpy(dz, -steep, hat, P);
            }
            transposed(c.XT, c.t1, C, P, P, L);
            add_product(c.dKT, L, a, P, 1, c.XT, L, I, P, L);
            add_product(da, P, K, 1, Q, c.t1, P, I, C, P);
            for (int64_t i = 0; i < C; i++)
                for (int64_t r = 0; r < I; r++) dkey[(m * C + i) * Q + r] += c.dKT[r * L + i];
            if (anew && anew[row]) {
                axpy(dfresh + h * size, 1, dw, size);
                axpy(dfresh + h * size, 1, da, size);
                memset(dw, 0, (size_t)size * sizeof(real));
                memset(da, 0, (size_t)size * sizeof(real));
                if (ds) memset(ds, 0, (size_t)size * sizeof(real));
            }
        }
    }
    free(scratch);
    restore_denormals(mode);
    }
}
