/* The delta rule with a matrix decay, diagonal plus rank one:
 *
 *     u_t = b_t^T P_t,   S_t = diag(e_t) P_t + a_t u_t^T + k_t v_t^T,   o_t = q_t^T S_t,   e_t = exp g_t,
 *
 * where P_t is S_{t-1}, or zero at a reset: chunk by chunk in chunks.h, which also says what the backward pass does.
 * A few tokens go one by one. Columns of S do not meet each other, so they take a slab of columns that stays in the
 * first cache, vectors along V, and read and write it once a token: while a row of S_t is in a register it serves o_t
 * and u_{t+1} too.
 *
 * A head's matrix is K x V with V contiguous; tensors per token have a stride per token and heads end to end.
 */
#include "chunks.h"

#define VECTORS (VECTOR_BYTES == 64 ? 4 : 2)
#define SLAB (VECTORS * LANES)
#define FEW 12 /* tokens that are not worth a chunk */

static real *scratch(int64_t numbers) {
    return aligned_alloc(64, (size_t)(pieces(numbers, LANES * 16) * LANES * 16) * sizeof(real));
}

/* e for n tokens, `row` numbers each. */
static void decays_of(const real *g, int64_t stride, real *e, int64_t row, int64_t n) {
    for (int64_t t = 0; t < n; t++, g += stride, e += row)
        for (int64_t j = 0; j < row; j += LANES) vstore_n(e + j, vexp(vload_n(g + j, row - j)), row - j);
}

/* One token: S_{t-1} is read from `from`, S_t written to `to`. u comes as u_t and leaves as u_{t+1}. */
INLINE void token(const real *from, int64_t from_row, real *to, int64_t to_row, const real *q, const real *k,
                  const real *a, const real *next_b, const real *e, int64_t K, vec *u, const vec *v, vec *o,
                  int decay) {
    vec next[VECTORS];
    for (int c = 0; c < VECTORS; c++) o[c] = next[c] = (vec){0};
    for (int64_t j = 0; j < K; j++) {
        for (int c = 0; c < VECTORS; c++) {
            vec s = vload(from + j * from_row + c * LANES);
            if (decay != NO_DECAY) s *= e[decay == PER_KEY ? j : 0];
            s += a[j] * u[c];
            s += k[j] * v[c];
            vstore(to + j * to_row + c * LANES, s);
            o[c] += q[j] * s;
            next[c] += next_b[j] * s;
        }
    }
    for (int c = 0; c < VECTORS; c++) u[c] = next[c];
}

/* Tokens [t, stop) of columns [c, c + n) of one head. S (K, SLAB) holds the state before and after, but that the state
 * before may come from `first` instead, and the one after go to `last`. */
INLINE void slab(const Call *p, const Results *r, int64_t h, int64_t t, int64_t stop, int64_t c, int64_t n,
                 const real *e, real *S, const real *first, real *last, int decay) {
    const int64_t H = p->H, K = p->K, V = p->V;
    vec u[VECTORS], v[VECTORS], o[VECTORS];
    const real *from = first ? first : S, *b = p->b + t * p->sb + h * K;
    int64_t row = first ? V : SLAB;
    for (int i = 0; i < VECTORS; i++) u[i] = (vec){0};
    for (int64_t j = 0; j < K; j++)
        for (int i = 0; i < VECTORS; i++) u[i] += b[j] * vload(from + j * row + i * LANES);
    for (; t < stop; t++, e += decay == PER_KEY ? K : 1) {
        if (p->reset && p->reset[t]) {
            clear(S, K * SLAB);
            from = S, row = SLAB;
            for (int i = 0; i < VECTORS; i++) u[i] = (vec){0};
        }
        for (int i = 0; i < VECTORS; i++) {
            int64_t m = n - i * LANES;
            v[i] = m > 0 ? vload_n(p->v + t * p->sv + h * V + c + i * LANES, m) : (vec){0};
        }
        int ends = t == stop - 1;
        b = p->b + (ends ? t : t + 1) * p->sb + h * K;
        token(from, row, ends && last ? last : S, ends && last ? V : SLAB, p->q + t * p->sq + h * K,
              p->k + t * p->sk + h * K, p->a + t * p->sa + h * K, b, e, K, u, v, o, decay);
        from = S, row = SLAB;
        for (int i = 0; i < VECTORS; i++)
            if (n > i * LANES) vstore_n(r->y + (t * H + h) * V + c + i * LANES, o[i], n - i * LANES);
    }
}

/* A task of a few tokens, or none, for one of its heads. S has room for a slab and FEW decays. */
static void few(const Call *p, const Results *r, const Task *a, int64_t h, real *S) {
    const int64_t K = p->K, V = p->V, start = a->start, stop = a->stop, high = least(a->high * WIDE, V);
    const real *initial = p->initial ? p->initial + (a->n * p->H + h) * K * V : NULL;
    real *final = r->final + (a->n * p->H + h) * K * V, *e = S + K * SLAB;
    if (p->decay) decays_of(p->g + start * p->sg + h * p->row, p->sg, e, p->row, stop - start);
    for (int64_t c = a->low * WIDE; c < high; c += SLAB) {
        const int64_t width = least(SLAB, high - c);
        /* A whole slab is read and written where it lies; of any other there is a copy filled up with zeros. */
        const int whole = width == SLAB && stop > start, in_place = whole && initial;
        if (!in_place) clear(S, K * SLAB);
        for (int64_t j = 0; initial && !in_place && j < K; j++)
            memcpy(S + j * SLAB, initial + j * V + c, (size_t)width * sizeof(real));
        const real *first = in_place ? initial + c : NULL;
        real *last = whole ? final + c : NULL;
        if (stop > start && p->decay == NO_DECAY) slab(p, r, h, start, stop, c, width, e, S, first, last, NO_DECAY);
        if (stop > start && p->decay == PER_HEAD) slab(p, r, h, start, stop, c, width, e, S, first, last, PER_HEAD);
        if (stop > start && p->decay == PER_KEY) slab(p, r, h, start, stop, c, width, e, S, first, last, PER_KEY);
        for (int64_t j = 0; !last && j < K; j++)
            memcpy(final + j * V + c, S + j * SLAB, (size_t)width * sizeof(real));
    }
}

/* Tasks are `parts` of the panels of `group` heads each, and this is one of them. */
static Task task_of(const Call *p, int64_t i, int64_t group, int64_t parts) {
    const int64_t panels = pieces(p->V, WIDE), groups = pieces(p->H, group), part = i % parts;
    const int64_t n = i / parts / groups, from = i / parts % groups * group;
    Task a = {n, n * p->length, (n + 1) * p->length, 0, from, least(from + group, p->H),
              part * panels / parts, (part + 1) * panels / parts};
    if (p->bounds) a.start = p->bounds[n], a.stop = p->bounds[n + 1];
    a.kept = a.start / TOKENS + n;
    return a;
}

/* y (tokens, H, V) and final (N, H, K, V); u (tokens, H, V) and kept (tokens / TOKENS + N, H, K, V) for the backward
 * pass, or NULL. bounds NULL: N sequences of `length` tokens. initial, reset and, without a decay, g may be NULL. */
EXPORT void FN(delta_rule)(const real *q, const real *k, const real *v, const real *a, const real *b, const real *g,
                           const real *initial, const uint8_t *reset, const int64_t *bounds, real *y, real *final,
                           real *u, real *kept, int64_t N, int64_t length, int64_t H, int64_t K, int64_t V, int64_t sq,
                           int64_t sk, int64_t sv, int64_t sa, int64_t sb, int64_t sg, int64_t decay, int64_t group,
                           int64_t parts, int64_t threads) {
    const Call call = {q,  k,  v,  a,  b,  g,  initial, reset, bounds, length, H, K, V, sq, sk, sv, sa, sb, sg,
                       decay, decay == PER_KEY ? K : 1, up(K, WIDE), a == k && sa == sk};
    const Results results = {y, final, u, kept};
    const int64_t tasks = N * pieces(H, group) * parts, states = group * pieces(pieces(V, WIDE), parts) * WIDE;
    int chunked = kept != NULL;
    for (int64_t i = 0; i < tasks && !chunked; i++) {
        const Task t = task_of(&call, i, group, parts);
        chunked = t.stop - t.start > FEW;
    }
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        unsigned denormals = flush_denormals();
        Chunk chunk;
        real *room = chunked ? make_room(&call, &chunk, 0) : NULL;
        real *memory = scratch(K * (SLAB + FEW) + (chunked ? states * call.Kp : 0));
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < tasks; i++) {
            const Task t = task_of(&call, i, group, parts);
            if (kept || t.stop - t.start > FEW)
                chunks_forward(&call, &chunk, &results, &t, memory);
            else
                for (int64_t h = t.from; h < t.to; h++) few(&call, &results, &t, h, memory);
        }
        free(memory);
        free(room);
        restore_denormals(denormals);
    }
}

/* dq, dk, da, db and dg have a leading dimension of `parts`, each the sum over its part of V; dy and dfinal may be NULL
 * (zeros), and dinitial (not wanted). All are dense. */
EXPORT void FN(delta_rule_backward)(const real *dy, const real *dfinal, const real *q, const real *k, const real *v,
                                    const real *a, const real *b, const real *g, const uint8_t *reset,
                                    const int64_t *bounds, const real *u, const real *kept, real *dq, real *dk,
                                    real *dv, real *da, real *db, real *dg, real *dinitial, int64_t N, int64_t length,
                                    int64_t tokens, int64_t H, int64_t K, int64_t V, int64_t sq, int64_t sk,
                                    int64_t sv, int64_t sa, int64_t sb, int64_t sg, int64_t decay, int64_t group,
                                    int64_t parts, int64_t threads) {
    const Call call = {q,  k,  v,  a,  b,  g,  NULL, reset, bounds, length, H, K, V, sq, sk, sv, sa, sb, sg,
                       decay, decay == PER_KEY ? K : 1, up(K, WIDE), a == k && sa == sk};
    const int64_t tasks = N * pieces(H, group) * parts;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        unsigned denormals = flush_denormals();
        Chunk chunk;
        real *room = make_room(&call, &chunk, 1);
        real *memory = scratch(group * pieces(pieces(V, WIDE), parts) * call.Kp * WIDE);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < tasks; i++) {
            const Task t = task_of(&call, i, group, parts);
            const int64_t part = i % parts, all = part * tokens * H * K;
            Gradients r = {dy, dfinal, u, kept, {dq + all, db + all, dk + all, da + all}, NULL, dv, dinitial};
            if (dg) r.dg = dg + part * tokens * H * call.row;
            chunks_backward(&call, &chunk, &r, &t, memory);
        }
        free(memory);
        free(room);
        restore_denormals(denormals);
    }
}
