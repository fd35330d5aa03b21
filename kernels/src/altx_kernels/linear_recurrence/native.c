/* Linear recurrences chunk by chunk, by small matrix products whose operands stay in the first two caches.
 *
 *     o = A v + qe S,    S <- last * S + kw^T v
 *
 * with, for the tokens t >= s of a chunk and a_t = exp(g_t), which is 0 at a reset,
 *     A_ts = sum_c q_tc (a_t a_{t-1} .. a_{s+1})_c k_sc,   qe_t = q_t (a_t .. a_1),   kw_s = k_s (a_L .. a_{s+1}),
 *     last = a_L .. a_1.
 * Decays are only ever multiplied with each other: no exponential grows, and resets and g = -inf need no care.
 *
 * A group's q k^T is computed once for all its heads. A task is a sequence, a group, and some of its units; a unit is a
 * head and a block of at most 96 value channels, whose part of the state, a slab (Kp, Vb), is meant for the first
 * cache.
 *
 * Matrices are padded with zeros: K to Kp and V to a multiple of Vb, so that no product has a rest; they have L columns
 * where their columns are tokens. A name that ends in T has its tokens (or value channels) as columns.
 */
#include "tiles.h"

typedef struct {
    int64_t N, H, G, K, V;      /* sequences, heads, groups, key and value channels */
    int64_t Kp, Vb, blocks, L;  /* padded K, value channels of a unit, units of a head, tokens of a chunk */
    int64_t sq, sk, sv, sg;     /* numbers from one token to the next */
    int64_t channel, splits;    /* whether each key channel decays by itself; tasks of a group */
    const real *q, *k, *v, *g;
    const uint8_t *reset;
    const int64_t *bounds;
} Problem;

/* What a chunk of a group has, and what its head in turn has. */
typedef struct {
    int64_t first, length, rows, padded, head; /* first token; tokens, then up to whole tiles; head */
    real *q, *k, *qT, *kT, *products;          /* of the group; products: q k^T */
    real *a, *M, *e, *w, *A, *qe, *kw, *last;
    real *v, *dO, *vT, *dOT, *rest;
} Chunk;

/* Memory for a thread's chunk, and `extra` numbers more at c->rest. */
static real *make_room(const Problem *p, Chunk *c, int64_t extra) {
    int64_t tokens = p->L * p->Kp, square = p->L * p->L, values = p->L * p->Vb;
    int64_t size = 9 * tokens + 3 * square + 4 * values + p->Kp + extra + 1024;
    real *memory = aligned_alloc(64, (size_t)up(size * (int64_t)sizeof(real), 64)), *at = memory;
    real **of_tokens[] = {&c->q, &c->k, &c->qT, &c->kT, &c->qe, &c->kw, &c->a, &c->e, &c->w};
    real **of_squares[] = {&c->products, &c->M, &c->A}, **of_values[] = {&c->v, &c->dO, &c->vT, &c->dOT};
    for (int i = 0; i < 9; i++) *of_tokens[i] = take(&at, tokens);
    for (int i = 0; i < 3; i++) *of_squares[i] = take(&at, square);
    for (int i = 0; i < 4; i++) *of_values[i] = take(&at, values);
    c->last = take(&at, p->Kp);
    c->rest = at;
    return memory;
}

/* ---- what a chunk's products are made of ---- */

static APART void open_group(const Problem *p, Chunk *c, int64_t group, int64_t first, int64_t length) {
    const int64_t Kp = p->Kp, L = p->L;
    c->first = first, c->length = length, c->rows = up(length, ROWS), c->padded = up(length, WIDE), c->head = -1;
    pack(c->q, Kp, c->padded, p->q + first * p->sq + group * p->K, p->sq, length, p->K);
    pack(c->k, Kp, c->padded, p->k + first * p->sk + group * p->K, p->sk, length, p->K);
    if (p->channel) return;
    transpose(c->k, Kp, c->kT, L, c->padded, Kp);
    for (int64_t r = 0; r < c->rows; r += ROWS)
        for (int64_t s = 0; s < r + ROWS; s += WIDE) {
            vec x[ROWS][2] = {0};
            product(c->q + r * Kp, Kp, 1, c->kT + s, L, Kp, x);
            store_tile(x, c->products + r * L + s, L);
        }
}

static void open_head_one_decay(const Problem *p, Chunk *c) {
    const int64_t Kp = p->Kp, L = p->L;
    for (int64_t t = 0; t < c->padded; t++)
        c->a[t] = p->g && t < c->length ? p->g[(c->first + t) * p->sg + c->head] : 0;
    for (int64_t t = 0; t < c->padded; t += LANES) vstore(c->a + t, vexp(vload(c->a + t)));
    if (p->reset)
        for (int64_t t = 0; t < c->length; t++)
            if (p->reset[c->first + t]) c->a[t] = 0;
    real e = 1;
    for (int64_t t = 0; t < c->rows; t++) {
        real *M = c->M + t * L, a = c->a[t];
        for (int64_t s = 0; s < c->padded; s += LANES) vstore(M + s, t ? vload(M - L + s) * a : vset(0));
        M[t] = 1;
        for (int64_t s = 0; s < up(t + 1, ROWS); s += LANES) /* as far as products of tiles read */
            vstore(c->A + t * L + s, vload(M + s) * vload(c->products + t * L + s));
        c->e[t] = e *= a;
    }
    memcpy(c->w, c->M + (c->rows - 1) * L, (size_t)c->padded * sizeof(real));
    for (int64_t t = 0; t < c->rows; t++)
        for (int64_t i = t * Kp; i < (t + 1) * Kp; i += LANES) {
            vstore(c->qe + i, vload(c->q + i) * c->e[t]);
            vstore(c->kw + i, vload(c->k + i) * c->w[t]);
        }
    for (int64_t i = 0; i < Kp; i += LANES) vstore(c->last + i, vset(e));
}

/* A for nv vectors of key channels: along a row, q_t takes up one token's decay after the other. */
INLINE void attend(const Problem *p, Chunk *c, int64_t i, const int nv) {
    const int64_t Kp = p->Kp;
    for (int64_t t = 0; t < c->length; t++) {
        vec x[8];
        for (int n = 0; n < nv; n++) x[n] = vload(c->q + t * Kp + i + n * LANES);
        for (int64_t s = t; s >= 0; s--) {
            const real *k = c->k + s * Kp + i, *a = c->a + s * Kp + i;
            vec sum = x[0] * vload(k), more = x[1] * vload(k + LANES);
            for (int n = 2; n < nv; n += 2) {
                sum += x[n] * vload(k + n * LANES);
                more += x[n + 1] * vload(k + (n + 1) * LANES);
            }
            for (int n = 0; n < nv; n++) x[n] *= vload(a + n * LANES);
            c->A[t * p->L + s] += vsum(sum + more);
        }
    }
}

static void open_head_many_decays(const Problem *p, Chunk *c) {
    const int64_t Kp = p->Kp, L = p->L;
    for (int64_t t = 0; t < c->rows; t++) {
        const real *g = p->g + (c->first + t) * p->sg + c->head * p->K;
        for (int64_t i = 0; i < Kp; i += LANES) {
            int here = t < c->length && i < p->K, gone = here && p->reset && p->reset[c->first + t];
            vstore(c->a + t * Kp + i, gone ? vset(0) : here ? vexp(vload_n(g + i, p->K - i)) : vset(1));
        }
    }
    for (int64_t i = 0; i < Kp; i += LANES) {
        vec e = vset(1), w = vset(1);
        for (int64_t t = 0; t < c->rows; t++) {
            const int64_t at = t * Kp + i;
            vstore(c->e + at, e *= vload(c->a + at));
            vstore(c->qe + at, vload(c->q + at) * e);
        }
        vstore(c->last + i, e);
        for (int64_t t = c->rows - 1; t >= 0; t--) {
            const int64_t at = t * Kp + i;
            vstore(c->w + at, w);
            vstore(c->kw + at, vload(c->k + at) * w);
            w *= vload(c->a + at);
        }
    }
    memset(c->A, 0, (size_t)(c->rows * L) * sizeof(real));
    int64_t i = 0;
    for (; i + 8 * LANES <= Kp; i += 8 * LANES) attend(p, c, i, 8);
    for (; i < Kp; i += WIDE) attend(p, c, i, 2);
}

static void open_head(const Problem *p, Chunk *c, int64_t head) {
    if (head == c->head) return;
    c->head = head;
    if (p->channel)
        open_head_many_decays(p, c);
    else
        open_head_one_decay(p, c);
}

/* S <- last * S + left^T right: the state forward (kw, v), or backward its gradient (qe, dO). */
static void update(const Problem *p, const Chunk *c, real *S, const real *left, const real *right) {
    for (int64_t i = 0; i < p->Kp; i += ROWS)
        for (int64_t j = 0; j < p->Vb; j += WIDE) {
            vec x[ROWS][2];
            load_tile(x, S + i * p->Vb + j, p->Vb);
            for (int r = 0; r < ROWS; r++) x[r][0] *= c->last[i + r], x[r][1] *= c->last[i + r];
            product(left + i, 1, p->Kp, right + j, p->Vb, c->rows, x);
            store_tile(x, S + i * p->Vb + j, p->Vb);
        }
}

/* A slab from or to the states (N, H, K, V). */
INLINE int64_t slab_at(const Problem *p, int64_t n, int64_t unit) {
    return (n * p->H + unit / p->blocks) * p->K * p->V + unit % p->blocks * p->Vb;
}
INLINE int64_t width(const Problem *p, int64_t unit) {
    int64_t left = p->V - unit % p->blocks * p->Vb;
    return left < p->Vb ? left : p->Vb;
}
static void load_slab(const Problem *p, real *S, const real *states, int64_t n, int64_t unit) {
    if (states)
        pack(S, p->Vb, p->Kp, states + slab_at(p, n, unit), p->V, p->K, width(p, unit));
    else
        memset(S, 0, (size_t)(p->Kp * p->Vb) * sizeof(real));
}
static void store_slab(const Problem *p, const real *S, real *states, int64_t n, int64_t unit) {
    for (int64_t i = 0; i < p->K; i++)
        memcpy(states + slab_at(p, n, unit) + i * p->V, S + i * p->Vb, (size_t)width(p, unit) * sizeof(real));
}

INLINE const real *values_at(const Problem *p, const real *v, int64_t stride, int64_t token, int64_t unit) {
    return v + token * stride + unit / p->blocks * p->V + unit % p->blocks * p->Vb;
}

/* The state before a chunk is kept at this place. Sequence n starts no earlier than its place. */
INLINE real *kept_at(const Problem *p, real *kept, int64_t n, int64_t first, int64_t unit) {
    int64_t chunk = p->bounds[n] / p->L + n + (first - p->bounds[n]) / p->L;
    return kept + (chunk * p->H * p->blocks + unit) * p->Kp * p->Vb;
}

/* The units of task number i: the range [*from, *to) of the units of all heads. */
INLINE void units_of(const Problem *p, int64_t i, int64_t *n, int64_t *group, int64_t *from, int64_t *to) {
    int64_t split = i % p->splits, count = p->H / p->G * p->blocks;
    *group = i / p->splits % p->G, *n = i / p->splits / p->G;
    *from = *group * count + count * split / p->splits;
    *to = *group * count + count * (split + 1) / p->splits;
}

/* ---- forward ---- */

static APART void forward_unit(const Problem *p, const Chunk *c, int64_t unit, real *S, real *o) {
    const int64_t Kp = p->Kp, Vb = p->Vb;
    pack(c->v, Vb, c->padded, values_at(p, p->v, p->sv, c->first, unit), p->sv, c->length, width(p, unit));
    for (int64_t r = 0; r < c->rows; r += ROWS)
        for (int64_t j = 0; j < width(p, unit); j += WIDE) {
            vec x[ROWS][2] = {0};
            product(c->qe + r * Kp, Kp, 1, S + j, Vb, Kp, x);
            product(c->A + r * p->L, p->L, 1, c->v + j, Vb, r + ROWS, x);
            store_part(x, (real *)values_at(p, o, p->H * p->V, c->first + r, unit) + j, p->H * p->V, c->length - r,
                       width(p, unit) - j);
        }
    update(p, c, S, c->kw, c->v);
}

static void forward_task(const Problem *p, Chunk *c, int64_t i, const real *initial, real *o, real *final, real *kept) {
    int64_t n, group, from, to, slab = p->Kp * p->Vb;
    units_of(p, i, &n, &group, &from, &to);
    for (int64_t u = from; u < to; u++) load_slab(p, c->rest + (u - from) * slab, initial, n, u);
    for (int64_t first = p->bounds[n]; first < p->bounds[n + 1]; first += p->L) {
        int64_t left = p->bounds[n + 1] - first;
        open_group(p, c, group, first, left < p->L ? left : p->L);
        for (int64_t u = from; u < to; u++) {
            real *S = c->rest + (u - from) * slab;
            open_head(p, c, u / p->blocks);
            if (kept) memcpy(kept_at(p, kept, n, first, u), S, (size_t)slab * sizeof(real));
            forward_unit(p, c, u, S, o);
        }
    }
    for (int64_t u = from; u < to; u++) store_slab(p, c->rest + (u - from) * slab, final, n, u);
}

/* ---- backward ---- */

/* Gradients that a chunk gathers: P of q k^T and of q and k (rows of tokens, or transposed), for a group; U = S dO^T,
 * W = D v^T, dA = dO v^T and the products S * D, for a head. */
typedef struct {
    real *P, *dq, *dk, *U, *W, *dA, *SD;
    const real *do_, *dfinal, *kept;
    real *dQ, *dK, *dV, *dG, *dinitial;
} Grads;

static void open_grads(const Problem *p, Chunk *c, Grads *d) {
    int64_t tokens = p->L * p->Kp, square = p->L * p->L;
    real *at = c->rest;
    d->P = take(&at, square), d->dA = take(&at, square), d->SD = take(&at, p->Kp);
    d->dq = take(&at, tokens), d->dk = take(&at, tokens), d->U = take(&at, tokens), d->W = take(&at, tokens);
    c->rest = at;
}

/* to (Kp, L) += slab rows^T: what the tokens' rows, given transposed (Vb, L), read from a slab. */
static void read_slab(const Problem *p, const Chunk *c, const real *slab, const real *rowsT, real *to) {
    for (int64_t i = 0; i < p->Kp; i += ROWS)
        for (int64_t t = 0; t < c->padded; t += WIDE) {
            vec x[ROWS][2];
            load_tile(x, to + i * p->L + t, p->L);
            product(slab + i * p->Vb, p->Vb, 1, rowsT + t, p->L, p->Vb, x);
            store_tile(x, to + i * p->L + t, p->L);
        }
}

/* D, the gradient of the state after the chunk, becomes that of the state S before it. */
static APART void backward_unit(const Problem *p, Chunk *c, Grads *d, int64_t n, int64_t unit, real *D) {
    const int64_t Kp = p->Kp, Vb = p->Vb, L = p->L, wide = width(p, unit);
    const real *S = kept_at(p, (real *)d->kept, n, c->first, unit);
    pack(c->v, Vb, c->padded, values_at(p, p->v, p->sv, c->first, unit), p->sv, c->length, wide);
    pack(c->dO, Vb, c->padded, values_at(p, d->do_, p->H * p->V, c->first, unit), p->H * p->V, c->length, wide);
    transpose(c->v, Vb, c->vT, L, c->padded, Vb);
    transpose(c->dO, Vb, c->dOT, L, c->padded, Vb);
    for (int64_t r = 0; r < c->rows; r += ROWS) {
        for (int64_t j = 0; j < wide; j += WIDE) {
            vec x[ROWS][2] = {0};
            product(c->kw + r * Kp, Kp, 1, D + j, Vb, Kp, x);
            product(c->A + r * L + r, 1, L, c->dO + r * Vb + j, Vb, c->rows - r, x);
            store_part(x, (real *)values_at(p, d->dV, p->H * p->V, c->first + r, unit) + j, p->H * p->V, c->length - r,
                       wide - j);
        }
        for (int64_t s = 0; s < r + ROWS; s += WIDE) {
            vec x[ROWS][2];
            load_tile(x, d->dA + r * L + s, L);
            product(c->dO + r * Vb, Vb, 1, c->vT + s, L, Vb, x);
            store_tile(x, d->dA + r * L + s, L);
        }
    }
    read_slab(p, c, S, c->dOT, d->U);
    read_slab(p, c, D, c->vT, d->W);
    if (p->g)
        for (int64_t i = 0; i < Kp; i++) {
            vec sum = {0};
            for (int64_t j = i * Vb; j < (i + 1) * Vb; j += LANES) sum += vload(S + j) * vload(D + j);
            d->SD[i] += vsum(sum);
        }
    update(p, c, D, c->qe, c->dO);
}

/* The gradient of a decay is the sum over all that crosses it: token pairs, the state before to tokens from here on,
 * earlier tokens to the state after, and the one state to the other. Nothing is subtracted, so nothing cancels. */
static void close_head_one_decay(const Problem *p, Chunk *c, Grads *d, real *dg) {
    const int64_t L = p->L, Kp = p->Kp;
    real *crossing = c->kw; /* no longer needed, as all of the head's units are done */
    vec reads[64], writes[64];
    for (int64_t t = 0; t < c->padded; t += LANES) {
        const vec e = t < c->rows ? vload(c->e + t) : vset(0), w = vload(c->w + t);
        vec read = {0}, write = {0};
        for (int64_t i = 0; i < Kp; i++) {
            const int64_t at = i * L + t;
            const vec q = vload(d->U + at) * e, k = vload(d->W + at) * w;
            vstore(d->dq + at, vload(d->dq + at) + q);
            vstore(d->dk + at, vload(d->dk + at) + k);
            read += q * vload(c->qT + at);
            write += k * vload(c->kT + at);
        }
        reads[t / LANES] = read, writes[t / LANES] = write;
    }
    for (int64_t t = 0; t < c->rows; t++)
        for (int64_t s = t * L; s <= t * L + t; s += LANES)
            vstore(d->P + s, vload(d->P + s) + vload(c->M + s) * vload(d->dA + s));
    if (!p->g) return;
    real between = 0, read[64], written[64];
    for (int64_t i = 0; i < Kp; i++) between += d->SD[i];
    between *= c->last[0];
    real later = 0, earlier = 0;
    memset(crossing, 0, (size_t)c->padded * sizeof(real));
    for (int64_t t = c->length - 1; t >= 0; t--) {
        vec sum = {0};
        for (int64_t s = 0; s <= t; s += LANES) {
            vec x = vload(crossing + s) + vload(d->dA + t * L + s) * vload(c->A + t * L + s);
            vstore(crossing + s, x);
        }
        crossing[t] = 0; /* from here on only pairs with both earlier and later tokens count */
        for (int64_t s = 0; s < t; s += LANES) sum += vload(crossing + s);
        later += reads[t / LANES][t % LANES];
        read[t] = later + vsum(sum);
    }
    for (int64_t t = 0; t < c->length; t++) {
        written[t] = earlier;
        earlier += writes[t / LANES][t % LANES];
        dg[t * p->H] = read[t] + written[t] + between;
    }
}

/* The same for nv vectors of channels that decay by themselves. Along a row t of A, y sums what comes from the tokens
 * up to s and x is q_t with the decays from there on. */
INLINE void attend_back(const Problem *p, Chunk *c, Grads *d, int64_t i, const int nv, real *crossing, real *dg) {
    const int64_t Kp = p->Kp;
    for (int64_t t = 0; t < c->length; t++) {
        const real *dA = d->dA + t * p->L;
        vec x[8], y[8];
        for (int n = 0; n < nv; n++) y[n] = vset(0);
        for (int64_t s = 0; s <= t; s++)
            for (int n = 0; n < nv; n++) {
                const int64_t at = s * Kp + i + n * LANES;
                y[n] *= vload(c->a + at);
                vstore(crossing + (s * nv + n) * LANES, y[n]);
                y[n] += vload(c->k + at) * dA[s];
            }
        for (int n = 0; n < nv; n++) {
            const int64_t at = t * Kp + i + n * LANES;
            vstore(d->dq + at, vload(d->dq + at) + y[n]);
            x[n] = vload(c->q + at);
        }
        for (int64_t s = t; s >= 0; s--)
            for (int n = 0; n < nv; n++) {
                const int64_t at = s * Kp + i + n * LANES;
                vstore(d->dk + at, vload(d->dk + at) + x[n] * dA[s]);
                vstore(dg + at, vload(dg + at) + x[n] * vload(crossing + (s * nv + n) * LANES));
                x[n] *= vload(c->a + at);
            }
    }
}

static void close_head_many_decays(const Problem *p, Chunk *c, Grads *d, real *to) {
    const int64_t L = p->L, Kp = p->Kp;
    real *U = c->qT, *W = c->kT, *dg = c->qe, *crossing = c->kw; /* none of them needed any more */
    transpose(d->U, L, U, Kp, Kp, c->padded);
    transpose(d->W, L, W, Kp, Kp, c->padded);
    for (int64_t i = 0; i < Kp; i += LANES) {
        vec later = vload(c->last + i) * vload(d->SD + i), earlier = {0};
        for (int64_t t = c->rows - 1; t >= 0; t--) {
            const int64_t at = t * Kp + i;
            const vec x = vload(U + at) * vload(c->e + at);
            vstore(d->dq + at, vload(d->dq + at) + x);
            vstore(dg + at, later += x * vload(c->q + at));
        }
        for (int64_t t = 0; t < c->rows; t++) {
            const int64_t at = t * Kp + i;
            const vec x = vload(W + at) * vload(c->w + at);
            vstore(d->dk + at, vload(d->dk + at) + x);
            vstore(dg + at, vload(dg + at) + earlier);
            earlier += x * vload(c->k + at);
        }
    }
    int64_t i = 0;
    for (; i + 8 * LANES <= Kp; i += 8 * LANES) attend_back(p, c, d, i, 8, crossing, dg);
    for (; i < Kp; i += WIDE) attend_back(p, c, d, i, 2, crossing, dg);
    for (int64_t t = 0; t < c->length; t++) memcpy(to + t * p->H * p->K, dg + t * Kp, (size_t)p->K * sizeof(real));
}

/* The gradients of a group's q and k. */
static APART void close_group(const Problem *p, Chunk *c, Grads *d, int64_t task_split, int64_t group) {
    const int64_t L = p->L, Kp = p->Kp, stride = p->G * p->K;
    const int64_t at = task_split * p->bounds[p->N] * stride + c->first * stride + group * p->K;
    const real *dq = d->dq, *dk = d->dk;
    if (!p->channel) {
        transpose(d->dq, L, c->qe, Kp, Kp, c->padded);
        transpose(d->dk, L, c->kw, Kp, Kp, c->padded);
        dq = c->qe, dk = c->kw;
    }
    for (int64_t r = 0; r < c->rows; r += ROWS)
        for (int64_t i = 0; i < p->K; i += WIDE) {
            vec x[ROWS][2];
            load_tile(x, dq + r * Kp + i, Kp);
            if (!p->channel) product(d->P + r * L, L, 1, c->k + i, Kp, r + ROWS, x);
            store_part(x, d->dQ + at + r * stride + i, stride, c->length - r, p->K - i);
            load_tile(x, dk + r * Kp + i, Kp);
            if (!p->channel) product(d->P + r * L + r, 1, L, c->q + r * Kp + i, Kp, c->rows - r, x);
            store_part(x, d->dK + at + r * stride + i, stride, c->length - r, p->K - i);
        }
}

static void backward_task(const Problem *p, Chunk *c, Grads *d, int64_t i) {
    const int64_t slab = p->Kp * p->Vb, tokens = p->L * p->Kp, square = p->L * p->L, decays = p->channel ? p->K : 1;
    int64_t n, group, from, to;
    units_of(p, i, &n, &group, &from, &to);
    for (int64_t u = from; u < to; u++) load_slab(p, c->rest + (u - from) * slab, d->dfinal, n, u);
    const int64_t start = p->bounds[n], stop = p->bounds[n + 1];
    for (int64_t first = start + (stop - start - 1) / p->L * p->L; first >= start && stop > start; first -= p->L) {
        open_group(p, c, group, first, stop - first < p->L ? stop - first : p->L);
        if (!p->channel) transpose(c->q, p->Kp, c->qT, p->L, c->padded, p->Kp);
        clear(d->dq, tokens), clear(d->dk, tokens), clear(d->P, square);
        for (int64_t u = from; u < to; u++) {
            const int64_t head = u / p->blocks;
            if (head != c->head) clear(d->U, tokens), clear(d->W, tokens), clear(d->dA, square), clear(d->SD, p->Kp);
            open_head(p, c, head);
            backward_unit(p, c, d, n, u, c->rest + (u - from) * slab);
            if (u + 1 < to && (u + 1) / p->blocks == head) continue;
            real *dg = d->dG ? d->dG + ((i % p->splits * p->bounds[p->N] + first) * p->H + head) * decays : NULL;
            if (p->channel)
                close_head_many_decays(p, c, d, dg);
            else
                close_head_one_decay(p, c, d, dg);
        }
        close_group(p, c, d, i % p->splits, group);
    }
    for (int64_t u = from; u < to; u++) store_slab(p, c->rest + (u - from) * slab, d->dinitial, n, u);
}

/* ---- what Python calls ---- */

static Problem problem(const real *q, const real *k, const real *v, const real *g, const uint8_t *reset,
                       const int64_t *bounds, int64_t N, int64_t H, int64_t G, int64_t K, int64_t V, int64_t sq,
                       int64_t sk, int64_t sv, int64_t sg, int64_t channel, int64_t chunk, int64_t splits) {
    int64_t Vb = V <= 96 ? up(V, WIDE) : up(V, 96) < up(V, 64) ? 96 : 64;
    return (Problem){N, H, G, K, V, up(K, WIDE), Vb, (V + Vb - 1) / Vb, chunk, sq, sk, sv, sg, channel, splits,
                     q, k, v, g, reset, bounds};
}

EXPORT void FN(forward)(const real *q, const real *k, const real *v, const real *g, const uint8_t *reset,
                        const int64_t *bounds, const real *initial, real *o, real *final, real *kept, int64_t N,
                        int64_t H, int64_t G, int64_t K, int64_t V, int64_t sq, int64_t sk, int64_t sv, int64_t sg,
                        int64_t channel, int64_t chunk, int64_t splits, int64_t threads) {
    const Problem p = problem(q, k, v, g, reset, bounds, N, H, G, K, V, sq, sk, sv, sg, channel, chunk, splits);
    const int64_t units = (H / G * p.blocks + splits - 1) / splits;
#pragma omp parallel num_threads((int)threads) if (threads > 1)
    {
        unsigned before = flush_denormals();
        Chunk c;
        real *memory = make_room(&p, &c, units * p.Kp * p.Vb);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < N * G * splits; i++) forward_task(&p, &c, i, initial, o, final, kept);
        free(memory);
        restore_denormals(before);
    }
}

/* dQ, dK and dG have one more dimension in front, of size `splits`, over which they are to be summed; dG is zeros. */
EXPORT void FN(backward)(const real *q, const real *k, const real *v, const real *g, const uint8_t *reset,
                         const int64_t *bounds, const real *kept, const real *do_, const real *dfinal, real *dQ,
                         real *dK, real *dV, real *dG, real *dinitial, int64_t N, int64_t H, int64_t G, int64_t K,
                         int64_t V, int64_t sq, int64_t sk, int64_t sv, int64_t sg, int64_t channel, int64_t chunk,
                         int64_t splits, int64_t threads) {
    const Problem p = problem(q, k, v, g, reset, bounds, N, H, G, K, V, sq, sk, sv, sg, channel, chunk, splits);
    const int64_t units = (H / G * p.blocks + splits - 1) / splits;
#pragma omp parallel num_threads((int)threads) if (threads > 1)
    {
        unsigned before = flush_denormals();
        Chunk c;
        Grads d = {.do_ = do_, .dfinal = dfinal, .kept = kept, .dQ = dQ, .dK = dK, .dV = dV, .dG = dG,
                   .dinitial = dinitial};
        real *memory = make_room(&p, &c, units * p.Kp * p.Vb + 2 * chunk * chunk + p.Kp + 4 * chunk * p.Kp + 1024);
        open_grads(&p, &c, &d);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < N * G * splits; i++) backward_task(&p, &c, &d, i);
        free(memory);
        restore_denormals(before);
    }
}

/* One token: o_n = S_n^T q_n with S_n = a_n S_n + k_n v_n^T, each state read and written once. */
EXPORT void FN(step)(const real *q, const real *k, const real *v, const real *g, const uint8_t *reset,
                     const real *initial, real *o, real *final, int64_t N, int64_t H, int64_t G, int64_t K, int64_t V,
                     int64_t sq, int64_t sk, int64_t sv, int64_t sg, int64_t channel, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads((int)threads) if (threads > 1)
    for (int64_t i = 0; i < N * H; i++) {
        unsigned before = flush_denormals();
        const int64_t n = i / H, h = i % H, group = h / (H / G);
        const real *q_ = q + n * sq + group * K, *k_ = k + n * sk + group * K, *v_ = v + n * sv + h * V;
        const real *g_ = g ? g + n * sg + h * (channel ? K : 1) : NULL;
        const int fresh = !initial || (reset && reset[n]);
        real one = !channel && g ? vexp(vset(g_[0]))[0] : 1;
        for (int64_t j = 0; j < V; j += 4 * LANES) {
            vec x[4] = {0}, value[4] = {0};
            for (int m = 0; m < 4 && j + m * LANES < V; m++) value[m] = vload_n(v_ + j + m * LANES, V - j - m * LANES);
            for (int64_t c = 0; c < K; c++) {
                const real *S = initial + (i * K + c) * V + j;
                real *to = final + (i * K + c) * V + j, a = channel ? vexp(vset(g_[c]))[0] : one;
                for (int m = 0; m < 4 && j + m * LANES < V; m++) {
                    vec s = value[m] * k_[c];
                    if (!fresh) s += vload_n(S + m * LANES, V - j - m * LANES) * a;
                    vstore_n(to + m * LANES, s, V - j - m * LANES);
                    x[m] += s * q_[c];
                }
            }
            for (int m = 0; m < 4 && j + m * LANES < V; m++)
                vstore_n(o + i * V + j + m * LANES, x[m], V - j - m * LANES);
        }
        restore_denormals(before);
    }
}
