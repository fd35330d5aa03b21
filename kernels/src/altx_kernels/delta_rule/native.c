/* The delta rule with a matrix decay, diagonal plus rank one:
 *
 *     u_t = b_t^T P_t,   S_t = diag(e_t) P_t + a_t u_t^T + k_t v_t^T,   o_t = q_t^T S_t,   e_t = exp g_t,
 *
 * where P_t is S_{t-1}, or zero at a reset. Columns of S do not meet each other. So the forward pass takes a slab of
 * columns that stays in the first cache, vectors along V, and reads and writes it once a token: while a row of S_t is
 * in a register it serves o_t and u_{t+1} too.
 *
 * The backward pass, D_t being the gradient of S_t and w_t = D_t^T a_t, runs through
 *
 *     D_{t-1} = diag(e_t) D_t + b_t w_t^T + q_{t-1} do_{t-1}^T
 *     dq = S_t do, dk = D_t v, dv = D_t^T k, da = D_t u, db = P_t w, dg = e_t * rowsum(P_t * D_t).
 *
 * Five of the six sum over V, so here vectors lie along K and a block is [K / LANES][columns][LANES]. The forward pass
 * kept u and every CHUNK-th state, and with u at hand the states between follow element by element.
 *
 * A head's matrix is K x V with V contiguous; tensors per token have a stride per token and heads end to end.
 */
#include "altx.h"

#define CHUNK 64
#define VECTORS (VECTOR_BYTES == 64 ? 4 : 2)
#define SLAB (VECTORS * LANES)
/* Columns that a register block of the backward pass holds, and those whose states of a chunk fit the second cache. */
#define COLUMNS (VECTOR_BYTES == 64 ? 8 : 4)
#define BLOCK 16

enum { NO_DECAY, PER_HEAD, PER_KEY };

INLINE int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }
INLINE int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

static real *scratch(int64_t numbers) {
    return aligned_alloc(64, (size_t)(pieces(numbers, LANES * 16) * LANES * 16) * sizeof(real));
}

/* vsum, fast. */
INLINE real vtotal(vec v) {
#if defined(__AVX512F__) && defined(ALTX_DOUBLE)
    return _mm512_reduce_add_pd((__m512d)v);
#elif defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    return vsum(v);
#endif
}

/* Tokens [start, stop) of a sequence among all, and which of the states kept per chunk are its own. */
typedef struct {
    int64_t start, stop, kept;
} Span;

static Span span_of(const int64_t *bounds, int64_t n, int64_t length) {
    Span s = {bounds ? bounds[n] : n * length, bounds ? bounds[n + 1] : (n + 1) * length, 0};
    s.kept = s.start / CHUNK + n;
    return s;
}

/* e for n tokens, `row` numbers each. */
static void decays(const real *g, int64_t stride, real *e, int64_t row, int64_t n) {
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

typedef struct {
    const real *q, *k, *v, *a, *b, *g, *initial;
    const uint8_t *reset;
    const int64_t *bounds;
    int64_t length, H, K, V;
    int64_t sq, sk, sv, sa, sb, sg;
    int64_t decay, row; /* numbers that the decay of a head and token has */
} Call;

typedef struct {
    real *y, *final, *u, *kept;
} Results;

/* Tokens [t, stop), at most a chunk, of columns [c, c + SLAB) of one head. S (K, SLAB) holds the state before and
 * after, but that the state before may come from `first` instead, and the one after go to `last`. */
INLINE void slab(const Call *p, Results r, int64_t h, int64_t t, int64_t stop, int64_t c, const real *e, real *S,
                 const real *first, real *last, int decay) {
    if (t == stop) return;
    const int64_t H = p->H, K = p->K, V = p->V, n = V - c;
    vec u[VECTORS], v[VECTORS], o[VECTORS];
    const real *from = first ? first : S, *b = p->b + t * p->sb + h * K;
    int64_t row = first ? V : SLAB;
    for (int i = 0; i < VECTORS; i++) u[i] = (vec){0};
    for (int64_t j = 0; j < K; j++)
        for (int i = 0; i < VECTORS; i++) u[i] += b[j] * vload(from + j * row + i * LANES);
    for (; t < stop; t++, e += decay == PER_KEY ? K : 1) {
        if (p->reset && p->reset[t]) {
            memset(S, 0, (size_t)(K * SLAB) * sizeof(real));
            from = S, row = SLAB;
            for (int i = 0; i < VECTORS; i++) u[i] = (vec){0};
        }
        for (int i = 0; i < VECTORS; i++) {
            int64_t m = n - i * LANES;
            v[i] = m > 0 ? vload_n(p->v + t * p->sv + h * V + c + i * LANES, m) : (vec){0};
            if (r.u && m > 0) vstore_n(r.u + (t * H + h) * V + c + i * LANES, u[i], m);
        }
        int ends = t == stop - 1;
        b = p->b + (ends ? t : t + 1) * p->sb + h * K;
        token(from, row, ends && last ? last : S, ends && last ? V : SLAB, p->q + t * p->sq + h * K,
              p->k + t * p->sk + h * K, p->a + t * p->sa + h * K, b, e, K, u, v, o, decay);
        from = S, row = SLAB;
        for (int i = 0; i < VECTORS; i++)
            if (n > i * LANES) vstore_n(r.y + (t * H + h) * V + c + i * LANES, o[i], n - i * LANES);
    }
}

/* Slabs [low, high) of one head of one sequence. */
static void head(const Call *p, Results r, int64_t n, int64_t h, int64_t low, int64_t high, real *memory) {
    const int64_t H = p->H, K = p->K, V = p->V;
    Span s = span_of(p->bounds, n, p->length);
    const real *initial = p->initial ? p->initial + (n * H + h) * K * V : NULL;
    real *final = r.final + (n * H + h) * K * V, *e = memory, *states = memory + CHUNK * K;
    for (int64_t t = s.start; t < s.stop || s.start == s.stop; t += CHUNK) {
        int64_t stop = least(t + CHUNK, s.stop);
        if (p->decay) decays(p->g + t * p->sg + h * p->row, p->sg, e, p->row, stop - t);
        for (int64_t i = low; i < high; i++) {
            real *S = states + (i - low) * K * SLAB;
            int64_t c = i * SLAB, width = least(SLAB, V - c);
            int begins = t == s.start, ends = stop == s.stop, whole = width == SLAB;
            /* A whole slab is read and written where it lies; of any other there is a copy filled up with zeros. */
            int in_place = begins && initial && whole && stop > t;
            if (begins && !in_place) {
                memset(S, 0, (size_t)(K * SLAB) * sizeof(real));
                for (int64_t j = 0; initial && j < K; j++)
                    memcpy(S + j * SLAB, initial + j * V + c, (size_t)width * sizeof(real));
            }
            if (r.kept && stop > t) {
                real *kept = r.kept + ((s.kept + (t - s.start) / CHUNK) * H + h) * K * V + c;
                for (int64_t j = 0; j < K; j++)
                    memcpy(kept + j * V, in_place ? initial + j * V + c : S + j * SLAB, (size_t)width * sizeof(real));
            }
            const real *first = in_place ? initial + c : NULL;
            real *last = ends && whole && stop > t ? final + c : NULL;
            if (p->decay == NO_DECAY) slab(p, r, h, t, stop, c, e, S, first, last, NO_DECAY);
            if (p->decay == PER_HEAD) slab(p, r, h, t, stop, c, e, S, first, last, PER_HEAD);
            if (p->decay == PER_KEY) slab(p, r, h, t, stop, c, e, S, first, last, PER_KEY);
            for (int64_t j = 0; ends && !last && j < K; j++)
                memcpy(final + j * V + c, S + j * SLAB, (size_t)width * sizeof(real));
        }
        if (s.start == s.stop) break;
    }
}

/* y (tokens, H, V) and final (N, H, K, V); u (tokens, H, V) and kept (tokens / CHUNK + N, H, K, V) for the backward
 * pass, or NULL. bounds NULL: N sequences of `length` tokens. initial, reset and, without a decay, g may be NULL. */
EXPORT void FN(delta_rule)(const real *q, const real *k, const real *v, const real *a, const real *b, const real *g,
                           const real *initial, const uint8_t *reset, const int64_t *bounds, real *y, real *final,
                           real *u, real *kept, int64_t N, int64_t length, int64_t H, int64_t K, int64_t V, int64_t sq,
                           int64_t sk, int64_t sv, int64_t sa, int64_t sb, int64_t sg, int64_t decay, int64_t parts,
                           int64_t threads) {
    Call call = {q,  k,  v,  a,  b,  g,  initial, reset, bounds, length, H, K, V, sq, sk, sv, sa, sb, sg,
                 decay, decay == PER_KEY ? K : 1};
    Results results = {y, final, u, kept};
    const int64_t slabs = pieces(V, SLAB), tasks = N * H * parts;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        unsigned denormals = flush_denormals();
        real *memory = scratch(CHUNK * K + pieces(slabs, parts) * K * SLAB);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < tasks; i++) {
            const int64_t low = i % parts * slabs / parts, high = (i % parts + 1) * slabs / parts;
            head(&call, results, i / parts / H, i / parts % H, low, high, memory);
        }
        free(memory);
        restore_denormals(denormals);
    }
}

/* Rows of a chunk, filled up with zeros to whole vectors, what becomes of their gradients, and columns of a block. */
enum { Q, A, B, KEY, E, ROWS };
enum { VALUE, DY, U, COLS };

typedef struct {
    real *rows[ROWS], *grads[ROWS], *cols[COLS]; /* [CHUNK][vectors * LANES], [CHUNK][columns] */
    real *before; /* P_t of a block, [CHUNK][K / LANES][BLOCK][LANES], each token a bit further */
    real *S, *D;  /* of all blocks: the state that was kept, and its gradient */
    real *zeros;  /* as many as a row has, or a block */
    int64_t vectors, columns;
} Work;

typedef struct {
    const real *dy, *dfinal, *u, *kept;
    real *grads[ROWS], *dv, *dinitial;
} Gradients;

/* Where column c of row j is in blocks [K / LANES][BLOCK][LANES] that follow each other. */
INLINE int64_t place(int64_t j, int64_t c, int64_t vectors) {
    return ((c / BLOCK * vectors + j / LANES) * BLOCK + c % BLOCK) * LANES + j % LANES;
}

/* n columns of a K x V matrix (zeros for NULL) to such blocks, zeros in what is left of them; and back. */
static void columns_in(const real *matrix, int64_t K, int64_t V, int64_t n, real *blocks, int64_t vectors) {
    memset(blocks, 0, (size_t)(pieces(n, BLOCK) * BLOCK * vectors * LANES) * sizeof(real));
    for (int64_t j = 0; matrix && j < K; j++)
        for (int64_t c = 0; c < n; c += BLOCK) {
            real *to = blocks + place(j, c, vectors);
            for (int64_t i = 0; i < least(BLOCK, n - c); i++) to[i * LANES] = matrix[j * V + c + i];
        }
}

static void columns_out(const real *blocks, int64_t K, int64_t V, int64_t n, real *matrix, int64_t vectors) {
    for (int64_t j = 0; j < K; j++)
        for (int64_t c = 0; c < n; c++) matrix[j * V + c] = blocks[place(j, c, vectors)];
}

static void rows_in(const real *from, int64_t stride, int64_t n, int64_t width, real *to, int64_t row) {
    for (int64_t t = 0; t < n; t++, from += stride, to += row) {
        memcpy(to, from, (size_t)width * sizeof(real));
        memset(to + width, 0, (size_t)(row - width) * sizeof(real));
    }
}

/* Numbers from a token's states to the next one's: not a multiple of the first cache's period. */
INLINE int64_t states_stride(int64_t vectors) { return (vectors * BLOCK + COLUMNS) * LANES; }

/* P_t of n tokens for the columns [c, c + COLUMNS) of a block, the first from S, and their part of dq. */
INLINE void states_again(const Work *work, const real *S, const uint8_t *reset, int64_t n, int64_t c, int64_t first) {
    const Work w = *work; /* stores of vectors may alias *work, not this */
    const int64_t stride = states_stride(w.vectors), row = w.vectors * LANES;
    for (int64_t i = 0; i < w.vectors; i++) {
        vec s[COLUMNS];
        real *P = w.before + (i * BLOCK + c) * LANES;
        for (int x = 0; x < COLUMNS; x++) s[x] = vload(S + (i * BLOCK + c + x) * LANES);
        for (int64_t t = 0; t < n; t++, P += stride) {
            const int64_t at = t * row + i * LANES, column = t * w.columns + first + c;
            const real *u = w.cols[U] + column, *v = w.cols[VALUE] + column, *dy = w.cols[DY] + column;
            vec e = vload(w.rows[E] + at), a = vload(w.rows[A] + at), k = vload(w.rows[KEY] + at);
            vec dq = vload(w.grads[Q] + at);
            if (reset && reset[t])
                for (int x = 0; x < COLUMNS; x++) s[x] = (vec){0};
            for (int x = 0; x < COLUMNS; x++) {
                vstore(P + x * LANES, s[x]);
                s[x] = s[x] * e + a * u[x];
                s[x] += k * v[x];
                dq += s[x] * dy[x];
            }
            vstore(w.grads[Q] + at, dq);
        }
    }
}

/* One token of the way back, for the columns [c, c + COLUMNS) of a block; dv gets their gradients. D, in which the
 * token's q do^T is included, becomes that of the token before, for whose q and do `q` and `dy` stand. */
INLINE void token_back(const Work *work, real *D, int64_t t, int64_t c, int64_t first, const real *q, const real *dy,
                       real *dv, int decay, int cut) {
    const Work w = *work;
    const int64_t row = w.vectors * LANES, column = t * w.columns + first + c;
    const real *v = w.cols[VALUE] + column, *u = w.cols[U] + column;
    const real *P = w.before + t * states_stride(w.vectors) + c * LANES;
    vec sum_k[COLUMNS], sum_a[COLUMNS];
    real wa[COLUMNS];
    D += c * LANES;
    for (int x = 0; x < COLUMNS; x++) sum_k[x] = sum_a[x] = (vec){0};
    for (int64_t i = 0; i < w.vectors; i++) {
        const int64_t at = t * row + i * LANES;
        vec k = vload(w.rows[KEY] + at), a = vload(w.rows[A] + at), dk = vload(w.grads[KEY] + at);
        for (int x = 0; x < COLUMNS; x++) {
            vec d = vload(D + (i * BLOCK + x) * LANES);
            dk += d * v[x];
            sum_k[x] += d * k;
            sum_a[x] += d * a;
        }
        vstore(w.grads[KEY] + at, dk);
    }
    for (int x = 0; x < COLUMNS; x++) dv[x] = vtotal(sum_k[x]), wa[x] = vtotal(sum_a[x]);
    for (int64_t i = 0; i < w.vectors; i++) {
        const int64_t at = t * row + i * LANES;
        vec b = vload(w.rows[B] + at), e = vload(w.rows[E] + at), before = vload(q + i * LANES);
        vec da = vload(w.grads[A] + at), db = vload(w.grads[B] + at), de = vload(w.grads[E] + at);
        for (int x = 0; x < COLUMNS; x++) {
            vec d = vload(D + (i * BLOCK + x) * LANES), s = vload(P + (i * BLOCK + x) * LANES);
            da += d * u[x];
            db += s * wa[x];
            if (decay) de += s * d, d *= e;
            d = cut ? before * dy[x] : d + b * wa[x] + before * dy[x];
            vstore(D + (i * BLOCK + x) * LANES, d);
        }
        vstore(w.grads[A] + at, da);
        vstore(w.grads[B] + at, db);
        if (decay) vstore(w.grads[E] + at, de);
    }
}

/* The gradients of a chunk's rows to where they belong. */
static void rows_out(const Call *p, const Work *w, const Gradients *r, int64_t h, int64_t t, int64_t n) {
    const int64_t H = p->H, K = p->K, row = w->vectors * LANES;
    for (int64_t i = 0; i < n; i++) {
        for (int x = Q; x < E; x++)
            memcpy(r->grads[x] + ((t + i) * H + h) * K, w->grads[x] + i * row, (size_t)K * sizeof(real));
        if (p->decay == NO_DECAY) continue;
        const real *e = w->rows[E] + i * row, *de = w->grads[E] + i * row;
        real *dg = r->grads[E] + ((t + i) * H + h) * p->row;
        if (p->decay == PER_HEAD) {
            vec sum = {0};
            for (int64_t j = 0; j < row; j += LANES) sum += vload(e + j) * vload(de + j);
            *dg = vtotal(sum);
        }
        for (int64_t j = 0; p->decay == PER_KEY && j < K; j++) dg[j] = e[j] * de[j];
    }
}

/* A chunk's rows and decay; their gradients are zero so far. */
static void chunk_in(const Call *p, const Work *w, int64_t h, int64_t t, int64_t n) {
    const int64_t K = p->K, row = w->vectors * LANES;
    rows_in(p->q + t * p->sq + h * K, p->sq, n, K, w->rows[Q], row);
    rows_in(p->k + t * p->sk + h * K, p->sk, n, K, w->rows[KEY], row);
    rows_in(p->a + t * p->sa + h * K, p->sa, n, K, w->rows[A], row);
    rows_in(p->b + t * p->sb + h * K, p->sb, n, K, w->rows[B], row);
    for (int64_t i = 0; i < n; i++) {
        real *e = w->rows[E] + i * row;
        const real *g = p->decay ? p->g + (t + i) * p->sg + h * p->row : w->zeros;
        for (int64_t j = 0; j < row; j += LANES)
            vstore(e + j, vexp(p->decay == PER_KEY ? vload_n(g + j, K - j) : vset(g[0])));
    }
    for (int x = 0; x < ROWS; x++) memset(w->grads[x], 0, (size_t)(CHUNK * row) * sizeof(real));
}

/* One block, columns [first, first + BLOCK) of the part at hand: n tokens from t on, S and D its blocks of those. */
static void block_back(const Call *p, const Work *w, const uint8_t *reset, int64_t n, int64_t first, int64_t width,
                       const real *S, real *D, real *dv) {
    const int64_t row = w->vectors * LANES;
    for (int64_t x = 0; x < width; x += COLUMNS) {
        const real *dy = w->cols[DY] + first + x;
        states_again(w, S, reset, n, x, first);
        for (int64_t i = 0; i < w->vectors; i++)
            for (int64_t y = 0; y < COLUMNS; y++) {
                real *to = D + (i * BLOCK + x + y) * LANES;
                vstore(to, vload(to) + vload(w->rows[Q] + (n - 1) * row + i * LANES) * dy[(n - 1) * w->columns + y]);
            }
        for (int64_t t = n - 1; t >= 0; t--) {
            real found[COLUMNS];
            const real *q = t ? w->rows[Q] + (t - 1) * row : w->zeros;
            const real *before = t ? dy + (t - 1) * w->columns : w->zeros;
            if (reset && reset[t])
                token_back(w, D, t, x, first, q, before, found, 1, 1);
            else if (p->decay)
                token_back(w, D, t, x, first, q, before, found, 1, 0);
            else
                token_back(w, D, t, x, first, q, before, found, 0, 0);
            memcpy(dv + t * p->H * p->V + x, found, (size_t)least(COLUMNS, width - x) * sizeof(real));
        }
    }
}

/* Blocks [low, high) of one head of one sequence. */
static void head_back(const Call *p, Gradients r, Work w, int64_t n, int64_t h, int64_t low, int64_t high) {
    const int64_t V = p->V, matrix = p->K * V;
    const Span s = span_of(p->bounds, n, p->length);
    const int64_t c = low * BLOCK, width = least(high * BLOCK, V) - c;
    columns_in(r.dfinal ? r.dfinal + (n * p->H + h) * matrix + c : NULL, p->K, V, width, w.D, w.vectors);
    for (int64_t i = pieces(s.stop - s.start, CHUNK) - 1; i >= 0; i--) {
        const int64_t t = s.start + i * CHUNK, length = least(CHUNK, s.stop - t), at = (t * p->H + h) * V + c;
        const uint8_t *reset = p->reset ? p->reset + t : NULL;
        chunk_in(p, &w, h, t, length);
        rows_in(p->v + t * p->sv + h * V + c, p->sv, length, width, w.cols[VALUE], w.columns);
        rows_in(r.u + at, p->H * V, length, width, w.cols[U], w.columns);
        if (r.dy)
            rows_in(r.dy + at, p->H * V, length, width, w.cols[DY], w.columns);
        else
            memset(w.cols[DY], 0, (size_t)(CHUNK * w.columns) * sizeof(real));
        columns_in(r.kept + ((s.kept + i) * p->H + h) * matrix + c, p->K, V, width, w.S, w.vectors);
        for (int64_t x = 0; x < width; x += BLOCK) {
            const int64_t block = x * w.vectors * LANES;
            block_back(p, &w, reset, length, x, least(BLOCK, width - x), w.S + block, w.D + block, r.dv + at + x);
        }
        rows_out(p, &w, &r, h, t, length);
    }
    if (r.dinitial) columns_out(w.D, p->K, V, width, r.dinitial + (n * p->H + h) * matrix + c, w.vectors);
}

/* dq, dk, da, db and dg have a leading dimension of `parts`, each the sum over its part of V; dy and dfinal may be NULL
 * (zeros), and dinitial (not wanted). All are dense. */
EXPORT void FN(delta_rule_backward)(const real *dy, const real *dfinal, const real *q, const real *k, const real *v,
                                    const real *a, const real *b, const real *g, const uint8_t *reset,
                                    const int64_t *bounds, const real *u, const real *kept, real *dq, real *dk,
                                    real *dv, real *da, real *db, real *dg, real *dinitial, int64_t N, int64_t length,
                                    int64_t tokens, int64_t H, int64_t K, int64_t V, int64_t sq, int64_t sk,
                                    int64_t sv, int64_t sa, int64_t sb, int64_t sg, int64_t decay, int64_t parts,
                                    int64_t threads) {
    Call call = {q,  k,  v,  a,  b,  g,  NULL, reset, bounds, length, H, K, V, sq, sk, sv, sa, sb, sg,
                 decay, decay == PER_KEY ? K : 1};
    const int64_t vectors = pieces(K, LANES), chunk = CHUNK * vectors * LANES;
    const int64_t blocks = pieces(V, BLOCK), tasks = N * H * parts;
    const int64_t columns = pieces(blocks, parts) * BLOCK, state = columns * vectors * LANES;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        unsigned denormals = flush_denormals();
        Work w = {.vectors = vectors, .columns = columns};
        const int64_t states = CHUNK * states_stride(vectors), zeros = vectors * LANES + BLOCK;
        real *memory = scratch(2 * ROWS * chunk + states + COLS * CHUNK * columns + 2 * state + zeros);
        w.before = memory;
        w.S = w.before + states;
        w.D = w.S + state;
        for (int x = 0; x < ROWS; x++) w.rows[x] = w.D + state + x * chunk;
        for (int x = 0; x < ROWS; x++) w.grads[x] = w.rows[0] + (ROWS + x) * chunk;
        for (int x = 0; x < COLS; x++) w.cols[x] = w.rows[0] + 2 * ROWS * chunk + x * CHUNK * columns;
        w.zeros = w.cols[COLS - 1] + CHUNK * columns;
        memset(w.zeros, 0, (size_t)zeros * sizeof(real));
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < tasks; i++) {
            const int64_t part = i % parts, all = part * tokens * H * K;
            Gradients r = {dy, dfinal, u, kept, {dq + all, da + all, db + all, dk + all, NULL}, dv, dinitial};
            if (dg) r.grads[E] = dg + part * tokens * H * call.row;
            head_back(&call, r, w, i / parts / H, i / parts % H, part * blocks / parts, (part + 1) * blocks / parts);
        }
        free(memory);
        restore_denormals(denormals);
    }
}
