/* The delta rule chunk by chunk: small matrix products whose operands stay in the first two caches.
 *
 * In a chunk that begins with the state S, with L(t, s) = e_{s+1} .. e_t, 0 across a reset, and s <= t,
 *
 *     A_qk(t, s) = sum_i q_ti k_si L(t, s)_i,   A_bk(t, s) = sum_i b_ti k_si L(t-1, s)_i for s < t; A_qa, A_ba alike
 *     (1 - A_ba) U = be S + A_bk V,   O = qe S + A_qk V + A_qa U,   S <- last * S + kw^T V + aw^T U,
 *
 * where qe, be have the decays since the chunk's beginning, kw, aw those to its end, and last has all (the WY form of
 * Yang et al. 2024, arXiv:2406.06484). The way back, with dR the gradient of be S + A_bk V:
 *
 *     (1 - A_ba)^T dR = A_qa^T dO + aw D,   dV = A_qk^T dO + A_bk^T dR + kw D,   D <- last * D + qe^T dO + be^T dR.
 *
 * Decays are only ever multiplied with each other: no exponential grows, and resets and g = -inf need no care. Between
 * the tokens of one half of a chunk they are multiplied pair by pair; from the first half to the second they are those
 * up to the border and those from there on, so that this corner of A is a matrix product.
 *
 * Columns of S do not meet each other: a panel is WIDE of them. Rows are padded with zeros, K to Kp.
 */
#ifndef CHUNKS_H
#define CHUNKS_H

#include "tiles.h"

#define TOKENS 32 /* of a chunk: CHUNK of native.py */
#define HALF 16
#define VECTORS_AT_ONCE (VECTOR_BYTES == 64 ? 4 : 2)

enum { NO_DECAY, PER_HEAD, PER_KEY };
enum { QK, QA, BK, BA, PAIRS };
enum { Q, B, KEY, A, ROWS_OF_TOKENS };

typedef struct {
    const real *q, *k, *v, *a, *b, *g, *initial;
    const uint8_t *reset;
    const int64_t *bounds;
    int64_t length, H, K, V;
    int64_t sq, sk, sv, sa, sb, sg;
    int64_t decay, row; /* numbers that the decay of a head and token has */
    int64_t Kp, tied;   /* whether a and k are the same */
} Call;

typedef struct {
    real *y, *final, *u, *kept;
} Results;

typedef struct {
    const real *dy, *dfinal, *u, *kept;
    real *rows[ROWS_OF_TOKENS], *dg, *dv, *dinitial;
} Gradients;

/* n tokens from `first` on; `rows` are whole tiles, `padded` whole halves. Matrices are (TOKENS, Kp), those that end in
 * T (Kp, TOKENS), pairs (TOKENS, TOKENS), panels (TOKENS, WIDE). */
typedef struct {
    int64_t first, n, rows, padded;
    real *x[ROWS_OF_TOKENS], *e;          /* what is given, and the decays */
    real *since, *until;                  /* products of decays from the half's beginning on, and to its end */
    real *qs, *bs, *ks, *as;              /* q, b; k, a with those */
    real *qe, *be, *kT, *aT, *last;       /* the same for the whole chunk */
    real *pairs[PAIRS];
    real *V, *U;
    /* for the way back: */
    real *dO, *dR, *VT, *UT, *ST, *DT, *S, *SD, *dg;
    real *dpairs[PAIRS], *dx[ROWS_OF_TOKENS], *corner[ROWS_OF_TOKENS];
} Chunk;

INLINE int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }
INLINE int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

/* Memory for a thread's chunk; with `back` also for the way back. What a and k have in common is there once. */
static real *make_room(const Call *p, Chunk *c, int back) {
    const int64_t Kp = p->Kp, tokens = TOKENS * Kp, panel = TOKENS * WIDE, slab = Kp * WIDE, square = TOKENS * TOKENS;
    real **of_tokens[] = {&c->x[0], &c->x[1], &c->x[2], &c->x[3], &c->e,  &c->since, &c->until, &c->qs,
                          &c->bs,   &c->ks,   &c->as,   &c->qe,   &c->be, &c->kT,    &c->aT};
    const int64_t count = sizeof(of_tokens) / sizeof(*of_tokens);
    int64_t size = count * tokens + PAIRS * square + 2 * panel + Kp + 1024;
    if (back) size += 9 * tokens + PAIRS * square + 4 * panel + 3 * slab + Kp + 1024;
    real *memory = aligned_alloc(64, (size_t)up(size * (int64_t)sizeof(real), 64)), *at = memory;
    for (int64_t i = 0; i < count; i++) *of_tokens[i] = take(&at, tokens);
    for (int i = 0; i < PAIRS; i++) c->pairs[i] = take(&at, square);
    if (p->tied) {
        c->x[A] = c->x[KEY], c->as = c->ks, c->aT = c->kT;
        c->pairs[QA] = c->pairs[QK], c->pairs[BA] = c->pairs[BK];
    }
    c->V = take(&at, panel), c->U = take(&at, panel), c->last = take(&at, Kp);
    if (!back) return memory;
    for (int i = 0; i < ROWS_OF_TOKENS; i++) c->dx[i] = take(&at, tokens), c->corner[i] = take(&at, tokens);
    for (int i = 0; i < PAIRS; i++) c->dpairs[i] = take(&at, square);
    c->dg = take(&at, tokens), c->SD = take(&at, Kp);
    c->dO = take(&at, panel), c->dR = take(&at, panel), c->VT = take(&at, panel), c->UT = take(&at, panel);
    c->S = take(&at, slab), c->ST = take(&at, slab), c->DT = take(&at, slab);
    return memory;
}

/* ---- what a chunk's products are made of ---- */

static void decays(const Call *p, Chunk *c, int64_t h) {
    const int64_t Kp = p->Kp;
    for (int64_t t = 0; t < c->padded; t++) {
        real *e = c->e + t * Kp;
        const real *g = p->decay ? p->g + (c->first + t) * p->sg + h * p->row : NULL;
        const int gone = t < c->n && p->reset && p->reset[c->first + t];
        const vec one = gone ? vset(0) : p->decay == PER_HEAD && t < c->n ? vexp(vset(g[0])) : vset(1);
        const int64_t own = !gone && t < c->n && p->decay == PER_KEY ? p->K : 0;
        for (int64_t i = 0; i < Kp; i += LANES) vstore(e + i, i < own ? vexp(vload_n(g + i, own - i)) : one);
        if (gone) clear(c->x[B] + t * Kp, Kp); /* it reads nothing */
    }
}

/* Decays of the half [low, low + HALF) multiplied up, and what they are multiplied to. */
static void accumulate(const Call *p, Chunk *c, int64_t low) {
    const int64_t Kp = p->Kp;
    for (int64_t i = 0; i < Kp; i += LANES) {
        vec since = vset(1), until = vset(1);
        for (int64_t t = low; t < low + HALF; t++) {
            const int64_t at = t * Kp + i;
            vstore(c->bs + at, vload(c->x[B] + at) * since);
            since *= vload(c->e + at);
            vstore(c->qs + at, vload(c->x[Q] + at) * since);
            vstore(c->since + at, since);
        }
        for (int64_t t = low + HALF - 1; t >= low; t--) {
            const int64_t at = t * Kp + i;
            vstore(c->until + at, until);
            vstore(c->ks + at, vload(c->x[KEY] + at) * until);
            if (!p->tied) vstore(c->as + at, vload(c->x[A] + at) * until);
            until *= vload(c->e + at);
        }
    }
    transpose(c->ks + low * Kp, Kp, c->kT + low, TOKENS, HALF, Kp);
    if (!p->tied) transpose(c->as + low * Kp, Kp, c->aT + low, TOKENS, HALF, Kp);
}

/* Pairs of tokens of the half [low, stop), for nv vectors of key channels: along a row of pairs, q and b take up one
 * token's decay after the other. */
INLINE void within(const Call *p, Chunk *c, int64_t low, int64_t stop, int64_t i, const int nv, const int tied) {
    const int64_t Kp = p->Kp;
    for (int64_t t = low; t < stop; t++) {
        vec q[VECTORS_AT_ONCE], b[VECTORS_AT_ONCE];
        for (int n = 0; n < nv; n++) {
            q[n] = vload(c->x[Q] + t * Kp + i + n * LANES);
            b[n] = vload(c->x[B] + t * Kp + i + n * LANES);
        }
        for (int64_t s = t; s >= low; s--) {
            const real *k = c->x[KEY] + s * Kp + i, *a = c->x[A] + s * Kp + i, *e = c->e + s * Kp + i;
            vec qk = {0}, qa = {0}, bk = {0}, ba = {0};
            for (int n = 0; n < nv; n++) {
                vec x = vload(k + n * LANES), y = tied ? x : vload(a + n * LANES), decay = vload(e + n * LANES);
                qk += q[n] * x, bk += b[n] * x;
                if (!tied) qa += q[n] * y, ba += b[n] * y;
                q[n] *= decay;
                if (s < t) b[n] *= decay;
            }
            const int64_t at = t * TOKENS + s;
            c->pairs[QK][at] += vsum(qk);
            if (!tied) c->pairs[QA][at] += vsum(qa);
            if (s == t) continue;
            c->pairs[BK][at] += vsum(bk);
            if (!tied) c->pairs[BA][at] += vsum(ba);
        }
    }
}

static APART void within_half(const Call *p, Chunk *c, int64_t low, int64_t stop) {
    for (int64_t i = 0, wide = VECTORS_AT_ONCE * LANES; i < p->Kp; i += i + wide <= p->Kp ? wide : LANES) {
        const int nv = i + wide <= p->Kp ? VECTORS_AT_ONCE : 1;
        if (p->tied && nv > 1) within(p, c, low, stop, i, VECTORS_AT_ONCE, 1);
        if (p->tied && nv == 1) within(p, c, low, stop, i, 1, 1);
        if (!p->tied && nv > 1) within(p, c, low, stop, i, VECTORS_AT_ONCE, 0);
        if (!p->tied && nv == 1) within(p, c, low, stop, i, 1, 0);
    }
}

/* Tokens of the second half with those of the first. */
INLINE void corner_of(const Call *p, const Chunk *c, const real *x, real *with_k, real *with_a, const int tied) {
    const int64_t Kp = p->Kp;
    for (int64_t r = HALF; r < c->rows; r += ROWS)
        for (int64_t s = 0; s < HALF; s += LANES) {
            vec k[ROWS] = {0}, a[ROWS] = {0};
            const real *left = x + r * Kp;
            for (int64_t i = 0; i < Kp; i++) {
                const vec of_k = vload(c->kT + i * TOKENS + s), of_a = tied ? of_k : vload(c->aT + i * TOKENS + s);
#pragma GCC unroll 8
                for (int n = 0; n < ROWS; n++) {
                    const vec y = vset(left[n * Kp + i]);
                    k[n] += y * of_k;
                    if (!tied) a[n] += y * of_a;
                }
            }
            for (int n = 0; n < ROWS; n++) {
                vstore(with_k + (r + n) * TOKENS + s, k[n]);
                if (!tied) vstore(with_a + (r + n) * TOKENS + s, a[n]);
            }
        }
}

static APART void corner(const Call *p, const Chunk *c, const real *x, real *with_k, real *with_a) {
    if (p->tied)
        corner_of(p, c, x, with_k, with_a, 1);
    else
        corner_of(p, c, x, with_k, with_a, 0);
}

static APART void open_chunk(const Call *p, Chunk *c, int64_t h, int64_t first, int64_t n) {
    const int64_t Kp = p->Kp, K = p->K;
    c->first = first, c->n = n, c->rows = up(n, ROWS), c->padded = up(n, HALF);
    pack(c->x[Q], Kp, c->padded, p->q + first * p->sq + h * K, p->sq, n, K);
    pack(c->x[KEY], Kp, c->padded, p->k + first * p->sk + h * K, p->sk, n, K);
    if (!p->tied) pack(c->x[A], Kp, c->padded, p->a + first * p->sa + h * K, p->sa, n, K);
    pack(c->x[B], Kp, c->padded, p->b + first * p->sb + h * K, p->sb, n, K);
    decays(p, c, h);
    for (int i = 0; i < PAIRS; i++) clear(c->pairs[i], TOKENS * TOKENS);
    for (int64_t low = 0; low < c->padded; low += HALF) {
        accumulate(p, c, low);
        within_half(p, c, low, least(low + HALF, n));
    }
    const int two = n > HALF;
    if (two) {
        corner(p, c, c->qs, c->pairs[QK], c->pairs[QA]);
        corner(p, c, c->bs, c->pairs[BK], c->pairs[BA]);
    }
    const real *to_border = c->since + (HALF - 1) * Kp, *from_border = c->since + (TOKENS - 1) * Kp;
    memcpy(c->qe, c->qs, (size_t)(HALF * Kp) * sizeof(real));
    memcpy(c->be, c->bs, (size_t)(HALF * Kp) * sizeof(real));
    for (int64_t t = HALF; t < c->padded; t++)
        for (int64_t i = 0; i < Kp; i += LANES) {
            const vec decay = vload(to_border + i);
            vstore(c->qe + t * Kp + i, vload(c->qs + t * Kp + i) * decay);
            vstore(c->be + t * Kp + i, vload(c->bs + t * Kp + i) * decay);
        }
    for (int64_t i = 0; i < Kp; i += LANES)
        vstore(c->last + i, two ? vload(to_border + i) * vload(from_border + i) : vload(to_border + i));
    for (int64_t i = 0; two && i < Kp; i++)
        for (int64_t s = i * TOKENS; s < i * TOKENS + HALF; s += LANES) {
            vstore(c->kT + s, vload(c->kT + s) * from_border[i]);
            if (!p->tied) vstore(c->aT + s, vload(c->aT + s) * from_border[i]);
        }
}

/* ---- forward ---- */

/* Solve (1 - A) y = x for a tile, or (1 - A)^T y = x: A is zero on and above its diagonal. */
INLINE void solve(const real *pairs, vec x[ROWS][2]) {
#pragma GCC unroll 8
    for (int r = 1; r < ROWS; r++)
#pragma GCC unroll 8
        for (int s = 0; s < r; s++) {
            const vec a = vset(pairs[r * TOKENS + s]);
            x[r][0] += a * x[s][0], x[r][1] += a * x[s][1];
        }
}

INLINE void solve_back(const real *pairs, vec x[ROWS][2]) {
#pragma GCC unroll 8
    for (int r = ROWS - 2; r >= 0; r--)
#pragma GCC unroll 8
        for (int s = ROWS - 1; s > r; s--) {
            const vec a = vset(pairs[s * TOKENS + r]);
            x[r][0] += a * x[s][0], x[r][1] += a * x[s][1];
        }
}

/* A tile of rows of U, then of O. With a = k both are read from V + U, which V becomes. */
INLINE void tile_of_u(const Call *p, const Chunk *c, int64_t r, const real *S, int64_t wide, real *u, int64_t stride) {
    vec x[ROWS][2] = {0};
    product(c->be + r * p->Kp, p->Kp, 1, S, WIDE, p->Kp, x);
    product(c->pairs[BK] + r * TOKENS, TOKENS, 1, c->V, WIDE, r + ROWS, x);
    if (!p->tied) product(c->pairs[BA] + r * TOKENS, TOKENS, 1, c->U, WIDE, r, x);
    solve(c->pairs[BA] + r * TOKENS + r, x);
    if (u) store_part(x, u + r * stride, stride, c->n - r, wide);
    if (!p->tied) {
        store_tile(x, c->U + r * WIDE, WIDE);
        return;
    }
    vec v[ROWS][2];
    load_tile(v, c->V + r * WIDE, WIDE);
    for (int n = 0; n < ROWS; n++) v[n][0] += x[n][0], v[n][1] += x[n][1];
    store_tile(v, c->V + r * WIDE, WIDE);
}

static APART void read_panel(const Call *p, const Chunk *c, const real *S, int64_t wide, real *u, real *y) {
    const int64_t stride = p->H * p->V;
    for (int64_t r = 0; r < c->rows; r += ROWS) {
        tile_of_u(p, c, r, S, wide, u, stride);
        vec x[ROWS][2] = {0};
        product(c->qe + r * p->Kp, p->Kp, 1, S, WIDE, p->Kp, x);
        product(c->pairs[QK] + r * TOKENS, TOKENS, 1, c->V, WIDE, r + ROWS, x);
        if (!p->tied) product(c->pairs[QA] + r * TOKENS, TOKENS, 1, c->U, WIDE, r + ROWS, x);
        store_part(x, y + r * stride, stride, c->n - r, wide);
    }
}

/* S <- last * S + left^T right, of one pair of matrices or two: a_ri at left[r rs + i cs]. */
static APART void update_panel(const Call *p, const Chunk *c, real *S, int64_t rs, int64_t cs, const real *left,
                               const real *right, const real *more_left, const real *more_right) {
    for (int64_t i = 0; i < p->Kp; i += ROWS) {
        vec x[ROWS][2];
        load_tile(x, S + i * WIDE, WIDE);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) x[r][0] *= c->last[i + r], x[r][1] *= c->last[i + r];
        product(left + i * rs, rs, cs, right, WIDE, c->rows, x);
        if (more_left) product(more_left + i * rs, rs, cs, more_right, WIDE, c->rows, x);
        store_tile(x, S + i * WIDE, WIDE);
    }
}

static void load_panel(const Call *p, real *S, const real *matrix, int64_t column, int64_t wide) {
    if (matrix)
        pack(S, WIDE, p->Kp, matrix + column, p->V, p->K, wide);
    else
        clear(S, p->Kp * WIDE);
}

static void store_panel(const Call *p, const real *S, real *matrix, int64_t column, int64_t wide) {
    for (int64_t i = 0; i < p->K; i++)
        memcpy(matrix + i * p->V + column, S + i * WIDE, (size_t)wide * sizeof(real));
}

/* A task: tokens [start, stop) of sequence n, heads [from, to) together, whose rows lie side by side, and of each the
 * panels [low, high). The states before its chunks are kept from number `kept` on. */
typedef struct {
    int64_t n, start, stop, kept, from, to, low, high;
} Task;

INLINE int64_t wide_of(const Call *p, int64_t panel) { return least(WIDE, p->V - panel * WIDE); }

/* The panels of a task from the matrices of all heads, zeros for NULL, and back. */
static void load_panels(const Call *p, const Task *a, const real *matrices, real *panels) {
    for (int64_t h = a->from; h < a->to; h++) {
        const real *matrix = matrices ? matrices + (a->n * p->H + h) * p->K * p->V : NULL;
        for (int64_t j = a->low; j < a->high; j++, panels += p->Kp * WIDE)
            load_panel(p, panels, matrix, j * WIDE, wide_of(p, j));
    }
}

static void store_panels(const Call *p, const Task *a, const real *panels, real *matrices) {
    for (int64_t h = a->from; h < a->to; h++)
        for (int64_t j = a->low; j < a->high; j++, panels += p->Kp * WIDE)
            store_panel(p, panels, matrices + (a->n * p->H + h) * p->K * p->V, j * WIDE, wide_of(p, j));
}

static void chunks_forward(const Call *p, Chunk *c, const Results *r, const Task *a, real *panels) {
    const int64_t matrix = p->K * p->V;
    int64_t kept = a->kept;
    load_panels(p, a, p->initial, panels);
    for (int64_t first = a->start; first < a->stop; first += TOKENS, kept++) {
        real *S = panels;
        for (int64_t h = a->from; h < a->to; h++) {
            open_chunk(p, c, h, first, least(TOKENS, a->stop - first));
            for (int64_t j = a->low; j < a->high; j++, S += p->Kp * WIDE) {
                const int64_t column = h * p->V + j * WIDE, wide = wide_of(p, j), at = first * p->H * p->V + column;
                if (r->kept) store_panel(p, S, r->kept + (kept * p->H + h) * matrix, j * WIDE, wide);
                pack(c->V, WIDE, c->padded, p->v + first * p->sv + column, p->sv, c->n, wide);
                read_panel(p, c, S, wide, r->u ? r->u + at : NULL, r->y + at);
                update_panel(p, c, S, TOKENS, 1, c->kT, c->V, p->tied ? NULL : c->aT, c->U);
            }
        }
    }
    store_panels(p, a, panels, r->final);
}

/* ---- backward ---- */

static APART void dR_and_dV(const Call *p, const Chunk *c, const real *D, int64_t wide, real *dv) {
    const int64_t stride = p->H * p->V, rows = c->rows;
    for (int64_t r = rows - ROWS; r >= 0; r -= ROWS) {
        const int64_t diagonal = r * TOKENS + r, below = diagonal + ROWS * TOKENS;
        vec x[ROWS][2] = {0};
        product(c->aT + r, 1, TOKENS, D, WIDE, p->Kp, x);
        product(c->pairs[QA] + diagonal, 1, TOKENS, c->dO + r * WIDE, WIDE, rows - r, x);
        product(c->pairs[BA] + below, 1, TOKENS, c->dR + (r + ROWS) * WIDE, WIDE, rows - r - ROWS, x);
        solve_back(c->pairs[BA] + diagonal, x);
        store_tile(x, c->dR + r * WIDE, WIDE);
        vec y[ROWS][2] = {0};
        product(c->kT + r, 1, TOKENS, D, WIDE, p->Kp, y);
        product(c->pairs[QK] + diagonal, 1, TOKENS, c->dO + r * WIDE, WIDE, rows - r, y);
        product(c->pairs[BK] + diagonal, 1, TOKENS, c->dR + r * WIDE, WIDE, rows - r, y);
        store_part(y, dv + r * stride, stride, c->n - r, wide);
    }
}

/* to (TOKENS, n) += panel right (WIDE, n). */
static APART void add_product(const Chunk *c, const real *panel, const real *right, int64_t n, real *to, int lower) {
    for (int64_t r = 0; r < c->rows; r += ROWS)
        for (int64_t i = 0; i < (lower ? r + ROWS : n); i += WIDE) {
            vec x[ROWS][2];
            load_tile(x, to + r * n + i, n);
            product(panel + r * WIDE, WIDE, 1, right + i, n, WIDE, x);
            store_tile(x, to + r * n + i, n);
        }
}

/* D, the gradient of a panel's state after the chunk, becomes that of the state c->S before it. */
static void panel_back(const Call *p, Chunk *c, real *D, int64_t wide, real *dv) {
    const int64_t Kp = p->Kp;
    dR_and_dV(p, c, D, wide, dv);
    transpose(c->S, WIDE, c->ST, Kp, Kp, WIDE);
    transpose(D, WIDE, c->DT, Kp, Kp, WIDE);
    transpose(c->V, WIDE, c->VT, TOKENS, c->padded, WIDE);
    transpose(c->U, WIDE, c->UT, TOKENS, c->padded, WIDE);
    add_product(c, c->dO, c->ST, Kp, c->dx[Q], 0);
    add_product(c, c->dR, c->ST, Kp, c->dx[B], 0);
    add_product(c, c->V, c->DT, Kp, c->dx[KEY], 0);
    add_product(c, c->U, c->DT, Kp, c->dx[A], 0);
    add_product(c, c->dO, c->VT, TOKENS, c->dpairs[QK], 1);
    add_product(c, c->dO, c->UT, TOKENS, c->dpairs[QA], 1);
    add_product(c, c->dR, c->VT, TOKENS, c->dpairs[BK], 1);
    add_product(c, c->dR, c->UT, TOKENS, c->dpairs[BA], 1);
    for (int64_t i = 0; p->decay && i < Kp; i++) {
        vec sum = {0};
        for (int64_t j = i * WIDE; j < (i + 1) * WIDE; j += LANES) sum += vload(c->S + j) * vload(D + j);
        c->SD[i] += vsum(sum);
    }
    update_panel(p, c, D, 1, Kp, c->qe, c->dO, c->be, c->dR);
}

/* What tokens of one half have from those of the other. */
static APART void corner_back(const Call *p, Chunk *c) {
    const int64_t Kp = p->Kp;
    for (int64_t i = 0; i < Kp; i += WIDE) {
        for (int64_t r = HALF; r < c->rows; r += ROWS)
            for (int x = Q; x <= B; x++) {
                vec sum[ROWS][2] = {0};
                product(c->dpairs[x == Q ? QK : BK] + r * TOKENS, TOKENS, 1, c->ks + i, Kp, HALF, sum);
                product(c->dpairs[x == Q ? QA : BA] + r * TOKENS, TOKENS, 1, c->as + i, Kp, HALF, sum);
                store_tile(sum, c->corner[x] + r * Kp + i, Kp);
            }
        for (int64_t r = 0; r < HALF; r += ROWS)
            for (int x = KEY; x <= A; x++) {
                const int64_t from = HALF * TOKENS + r, at = HALF * Kp + i;
                vec sum[ROWS][2] = {0};
                product(c->dpairs[x == KEY ? QK : QA] + from, 1, TOKENS, c->qs + at, Kp, c->rows - HALF, sum);
                product(c->dpairs[x == KEY ? BK : BA] + from, 1, TOKENS, c->bs + at, Kp, c->rows - HALF, sum);
                store_tile(sum, c->corner[x] + r * Kp + i, Kp);
            }
    }
}

/* A decay's gradient is the sum over all that crosses it: the state before to tokens from here on, earlier tokens to
 * the state after, the one state to the other, and pairs of tokens. Nothing is subtracted, so nothing cancels. */
static APART void states_and_corner(const Call *p, Chunk *c) {
    const int64_t Kp = p->Kp, n = c->n;
    for (int64_t i = 0; i < Kp; i += LANES) {
        const int two = n > HALF;
        const vec to_border = vload(c->since + (HALF - 1) * Kp + i);
        const vec from_border = two ? vload(c->since + (TOKENS - 1) * Kp + i) : vset(1);
        const vec all = p->decay ? vload(c->last + i) * vload(c->SD + i) : vset(0);
        vec read = all, read_by_b = {0}, across = {0}, across_by_b = {0};
        for (int64_t t = n - 1; t >= 0; t--) {
            const int64_t at = t * Kp + i;
            const vec since = vload(c->since + at), q = vload(c->x[Q] + at), b = vload(c->x[B] + at);
            const vec before = t % HALF ? vload(c->since + at - Kp) : vset(1);
            vec dq = vload(c->dx[Q] + at) * since, db = vload(c->dx[B] + at) * before;
            if (t >= HALF) {
                const vec other_q = vload(c->corner[Q] + at) * since, other_b = vload(c->corner[B] + at) * before;
                dq *= to_border, db *= to_border;
                across += q * other_q;
                read += q * dq;
                vstore(c->dg + at, read + read_by_b + across + across_by_b);
                across_by_b += b * other_b;
                read_by_b += b * db;
                dq += other_q, db += other_b;
            } else {
                read += q * dq;
                vstore(c->dg + at, read + read_by_b);
                read_by_b += b * db;
            }
            vstore(c->dx[Q] + at, dq), vstore(c->dx[B] + at, db);
        }
        vec written = {0};
        across = vset(0);
        for (int64_t s = 0; s < n; s++) {
            const int64_t at = s * Kp + i;
            const vec until = vload(c->until + at), k = vload(c->x[KEY] + at), a = vload(c->x[A] + at);
            vec dk = vload(c->dx[KEY] + at) * until, da = vload(c->dx[A] + at) * until;
            if (s < HALF && two) {
                const vec other_k = vload(c->corner[KEY] + at) * until, other_a = vload(c->corner[A] + at) * until;
                dk *= from_border, da *= from_border;
                vstore(c->dg + at, vload(c->dg + at) + written + across);
                across += k * other_k + a * other_a;
                written += k * dk + a * da;
                dk += other_k, da += other_a;
            } else {
                vstore(c->dg + at, vload(c->dg + at) + written);
                written += k * dk + a * da;
            }
            vstore(c->dx[KEY] + at, dk), vstore(c->dx[A] + at, da);
        }
    }
}

/* The same for pairs within the half [low, stop). */
static APART void within_back(const Call *p, Chunk *c, int64_t low, int64_t stop) {
    const int64_t Kp = p->Kp;
    for (int64_t i = 0; i < Kp; i += LANES)
        for (int64_t t = low; t < stop; t++) {
            const int64_t own = t * Kp + i;
            const real *qk = c->dpairs[QK] + t * TOKENS, *qa = c->dpairs[QA] + t * TOKENS;
            const real *bk = c->dpairs[BK] + t * TOKENS, *ba = c->dpairs[BA] + t * TOKENS;
            vec q = vload(c->x[Q] + own), b = vload(c->x[B] + own), of_q[HALF], of_b[HALF];
            vec dq = qk[t] * vload(c->x[KEY] + own) + qa[t] * vload(c->x[A] + own), db = {0};
            vstore(c->dx[KEY] + own, vload(c->dx[KEY] + own) + qk[t] * q);
            vstore(c->dx[A] + own, vload(c->dx[A] + own) + qa[t] * q);
            vec decay = vload(c->e + own), before = vset(1);
            for (int64_t s = t - 1; s >= low; s--) {
                const int64_t at = s * Kp + i;
                const vec k = vload(c->x[KEY] + at), a = vload(c->x[A] + at), e = vload(c->e + at);
                const vec from_q = decay * (qk[s] * k + qa[s] * a), from_b = before * (bk[s] * k + ba[s] * a);
                const vec to_q = decay * q, to_b = before * b;
                dq += from_q, db += from_b;
                of_q[s - low] = q * from_q, of_b[s - low] = b * from_b;
                vstore(c->dx[KEY] + at, vload(c->dx[KEY] + at) + qk[s] * to_q + bk[s] * to_b);
                vstore(c->dx[A] + at, vload(c->dx[A] + at) + qa[s] * to_q + ba[s] * to_b);
                decay *= e, before *= e;
            }
            vstore(c->dx[Q] + own, vload(c->dx[Q] + own) + dq);
            vstore(c->dx[B] + own, vload(c->dx[B] + own) + db);
            vec crossing = {0}, crossing_by_b = {0};
            for (int64_t s = low; p->decay && s < t; s++) {
                real *dg = c->dg + (s + 1) * Kp + i;
                crossing += of_q[s - low];
                if (s + 1 < t) crossing_by_b += of_b[s - low];
                vstore(dg, vload(dg) + crossing + (s + 1 < t ? crossing_by_b : vset(0)));
            }
        }
}

static void rows_out(const Call *p, const Chunk *c, const Gradients *r, int64_t h) {
    const int64_t K = p->K, Kp = p->Kp;
    for (int64_t t = 0; t < c->n; t++) {
        const int64_t token = (c->first + t) * p->H + h;
        for (int x = Q; x < ROWS_OF_TOKENS; x++)
            if (x == B && p->reset && p->reset[c->first + t])
                clear(r->rows[x] + token * K, K);
            else
                memcpy(r->rows[x] + token * K, c->dx[x] + t * Kp, (size_t)K * sizeof(real));
        if (p->decay == PER_KEY) memcpy(r->dg + token * K, c->dg + t * Kp, (size_t)K * sizeof(real));
        if (p->decay != PER_HEAD) continue;
        vec sum = {0};
        for (int64_t i = 0; i < Kp; i += LANES) sum += vload(c->dg + t * Kp + i);
        r->dg[token] = vsum(sum);
    }
}

static void chunks_backward(const Call *p, Chunk *c, const Gradients *r, const Task *a, real *panels) {
    const int64_t matrix = p->K * p->V, stride = p->H * p->V;
    load_panels(p, a, r->dfinal, panels);
    for (int64_t i = pieces(a->stop - a->start, TOKENS) - 1; i >= 0; i--) {
        const int64_t first = a->start + i * TOKENS;
        real *D = panels;
        for (int64_t h = a->from; h < a->to; h++) {
            open_chunk(p, c, h, first, least(TOKENS, a->stop - first));
            for (int x = 0; x < ROWS_OF_TOKENS; x++)
                clear(c->dx[x], TOKENS * p->Kp), clear(c->dpairs[x], TOKENS * TOKENS);
            clear(c->SD, p->Kp);
            for (int64_t j = a->low; j < a->high; j++, D += p->Kp * WIDE) {
                const int64_t column = h * p->V + j * WIDE, wide = wide_of(p, j), at = first * stride + column;
                load_panel(p, c->S, r->kept + ((a->kept + i) * p->H + h) * matrix, j * WIDE, wide);
                pack(c->V, WIDE, c->padded, p->v + first * p->sv + column, p->sv, c->n, wide);
                pack(c->U, WIDE, c->padded, r->u + at, stride, c->n, wide);
                if (r->dy)
                    pack(c->dO, WIDE, c->padded, r->dy + at, stride, c->n, wide);
                else
                    clear(c->dO, TOKENS * WIDE);
                panel_back(p, c, D, wide, r->dv + at);
            }
            if (c->n > HALF) corner_back(p, c);
            states_and_corner(p, c);
            for (int64_t half = 0; half < c->n; half += HALF) within_back(p, c, half, least(half + HALF, c->n));
            rows_out(p, c, r, h);
        }
    }
    if (r->dinitial) store_panels(p, a, panels, r->dinitial);
}

#endif
